"""How the kernels for CPUs are compiled, and where numba keeps what it has made."""

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numba import config, njit

from inscon import plan

f32, i32, u32, u8 = np.float32, np.int32, np.uint32, np.uint8

compiled = njit(nogil=True, cache=True, error_model="numpy")
SOURCES = [Path(plan.__file__)]
SOURCES += [Path(__file__).with_name(f"{name}.py") for name in ("color", "kernels", "randaugment", "vectors")]


def drop_stale(folder: Path, sources: Sequence[Path]) -> None:
    """Remove compiled code older than any of `sources`. Numba itself asks only whether a function's own file has changed, not that
    of another function it calls or of a number it has frozen."""
    newest = max(source.stat().st_mtime for source in sources)
    for kept in folder.glob("*.nb?"):
        with contextlib.suppress(OSError):  # another process was first, or nothing can be written
            if kept.stat().st_mtime < newest:
                kept.unlink()


try:
    drop_stale(Path(compiled(lambda: None).stats.cache_path), SOURCES)
except RuntimeError:  # neither beside this file nor in the home folder, as in a container run by another user
    # A new folder each time: what lies in it is executed, so it must be nobody else's. Workers look into the environment.
    config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="inscon-numba-")
