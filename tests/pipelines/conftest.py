"""Pictures and shards for the tests of the engines."""

import gc
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig

REAL = Path(__file__).resolve().parents[3] / "shared/data/imagenet_sample/train"
SIZES = [(1, 1), (1, 90), (200, 3), (64, 64), (75, 500), (500, 75)] + [(90 + 7 * i, 160 - 5 * i) for i in range(14)]
"""(height, width), px."""
GRAY = (3, 8)
"""Which of the pictures have one channel."""


def draw_picture(number: int, height: int, width: int) -> Image.Image:
    """Smooth colors with some detail: what a JPEG keeps."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    fine = rng.integers(-20, 21, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8))


def as_jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92)
    return file.getvalue()


def write_shards(folder: Path, *, jpegs: dict[int, bytes] | None = None, sizes: dict[int, tuple] | None = None) -> Path:
    """Twenty pictures in several shards, and in a .beton beside them (`data_for`); `jpegs` and `sizes` replace what is stored of
    single samples."""
    from tests.packed import Sample, write_set  # what it needs may be missing: tests/conftest.py

    samples = []
    for i, (height, width) in enumerate(SIZES):
        image = draw_picture(i, height, width)
        jpeg = (jpegs or {}).get(i) or as_jpeg(image.convert("L") if i in GRAY else image)
        stored = (sizes or {}).get(i, (height, width))
        samples.append(Sample(jpeg, *stored, label=0, name=f"a/picture_{i}.jpg"))
    write_set(folder, samples, per_shard=6, class_names=["a"], seed=0)
    write_set(beton_beside(folder), samples, per_shard=6, class_names=["a"], seed=0, container="beton")
    return folder


def beton_beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-beton")


def data_for(name: str, folder: Path | None) -> Path | None:
    """What the engine `name` reads of a set made by `write_shards`: ffcv its .beton, the others its shards."""
    return beton_beside(folder) if name == "ffcv" and folder is not None else folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture
def make_shards(tmp_path):
    return lambda **changes: write_shards(tmp_path / "shards", **changes)


@pytest.fixture
def make_config(shards):
    """Batches of 8 out of 20 samples: two steps per epoch."""

    def make(data=shards, *, threads=2, batch_size=8, heads=("single", "multi", "cell"), decode="auto", **views):
        return Config(
            loader=LoaderConfig(data=data, threads=threads, decode=decode),
            views=ViewConfig(**{"view_size": 64, **views}),
            model=ModelConfig(heads=heads),
            optim=OptimConfig(batch_size=batch_size),
            run=RunConfig(seed=3),
        )

    return make


@pytest.fixture(scope="session")
def real_pictures():
    """A handful of ImageNet's pictures, RGB, among them a wide one."""
    paths = sorted(REAL.glob("*/*.JPEG"))
    if not paths:
        pytest.skip(f"no pictures in {REAL}")
    widest = max(paths, key=lambda path: Image.open(path).width)
    return [Image.open(path).convert("RGB") for path in [*paths[::8], widest]]


def held() -> dict[str, int]:
    """What this process holds of what a pipeline may leave behind, but for garbage that only refers to itself."""
    gc.collect()
    threads = {"threads": threading.active_count(), "native threads": len(os.listdir("/proc/self/task"))}
    return threads | {"open files": len(os.listdir("/proc/self/fd"))}


def assert_rounds_leave_nothing(run: Callable[[int], None], rounds: int) -> None:
    """`run(i)` for each round: what is held afterwards must not grow with their number.

    Two rounds go before, in which pools that stay may be started (OpenMP's, numba's, DALI's own); two that come later are
    forgiven. A thread that was joined may stay in the kernel's list for a moment: what is too many is looked at again.
    """
    for i in range(2):
        run(i)
    before = held()
    for i in range(2, rounds + 2):
        run(i)
    allowed = {name: count + 2 for name, count in before.items()}
    deadline = time.monotonic() + 20
    while any(count > allowed[name] for name, count in held().items()) and time.monotonic() < deadline:
        time.sleep(0.05)
    after = held()
    assert all(after[name] <= allowed[name] for name in before), f"before {before}, after {rounds} rounds {after}"
