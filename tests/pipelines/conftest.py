"""Pictures and shards for the tests of the engines, engines opened on them, batches compared."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from inscon.batch import Batch
from inscon.config import LoaderConfig
from inscon.plan import Mosaics, OverlapRule, ViewSpec

with contextlib.suppress(
    ModuleNotFoundError
):  # what these need may be missing, which each test says: tests/conftest.py
    from data_prep.index import DatasetIndex
    from pipelines import open_pipeline
    from pipelines.color import STD
    from pipelines.feed import Feed, open_index
    from pipelines.prefetch import Pipeline

REAL = Path(__file__).resolve().parents[3] / "shared/data/imagenet_sample/train"
SIZES = [(1, 1), (1, 90), (200, 3), (64, 64), (75, 500), (500, 75)] + [(90 + 7 * i, 160 - 5 * i) for i in range(14)]
"""(height, width), px."""
GRAY = (3, 8)
"""Which of the pictures have one channel."""
NO_JPEG = b"\xff\xd8\xff\xe0" + bytes(3000)
"""With the right checksum: packed like that, say by another program. No decoder takes it."""
PAIR = (ViewSpec(name="query", size=64), ViewSpec(name="key", size=64, overlap=OverlapRule(view="query")))
MOSAICS = Mosaics(view="query")
PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13
"""It changed the order of its two resize passes for tall pictures, and with it the last bit; the kernels do as it does."""
every = pytest.mark.parametrize("name", ["dali", "ffcv", "reference"])
compiled = pytest.mark.parametrize("name", ["dali", "ffcv"])


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


def write_shards(
    folder: Path, *, jpegs: dict[int, bytes] | None = None, sizes: dict[int, tuple] | None = None, copies: int = 1
) -> Path:
    """Twenty pictures, or so many copies of them, in several shards, and in a .beton beside them (`data_for`); `jpegs` and `sizes`
    replace what is stored of single samples."""
    from tests.packed import Sample  # what it needs may be missing: tests/conftest.py

    samples = []
    for i, (height, width) in enumerate(SIZES):
        image = draw_picture(i, height, width)
        jpeg = (jpegs or {}).get(i) or as_jpeg(image.convert("L") if i in GRAY else image)
        stored = (sizes or {}).get(i, (height, width))
        samples.append(Sample(jpeg, *stored, label=0, name=f"a/picture_{i}.jpg"))
    write_both(folder, samples * copies)
    return folder


def write_both(folder: Path, samples: list) -> None:
    """`tests.packed.Sample`s as shards, and as a .beton beside them."""
    from tests.packed import write_set

    write_set(folder, samples, per_shard=6, class_names=["a"], seed=0)
    write_set(beton_beside(folder), samples, per_shard=6, class_names=["a"], seed=0, container="beton")


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


def damage(folder: Path, sample_id: int, how: str = "flip") -> None:
    """Change one sample of a packed set behind its back: one bit of its bytes, or everything from it on is gone."""
    index = DatasetIndex.open(folder)
    record = index.records([sample_id])[0]
    shard = folder / index.manifest.shards[record["shard"]].name
    if how == "cut":
        os.truncate(shard, int(record["offset"]) + 10)
        return
    at = int(record["offset"]) + int(record["byte_count"]) // 2
    with open(shard, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def installed(name: str) -> str:
    """The engine `name`; skips where it is not installed."""
    if name == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
        pytest.importorskip("numba", reason="numba is not installed")
    if name == "ffcv":
        pytest.importorskip("ffcv", reason="FFCV is not installed", exc_type=ImportError)
    return name


def stored_in(name: str, shard: str = r"shard-\d+.tar") -> str:
    """How an engine's messages call the file that a sample is in."""
    return "samples.beton" if name == "ffcv" else shard


def loader_of(name: str, folder: Path | None, **settings) -> LoaderConfig:
    """Settings to read a set made by `write_shards`: two threads, and no workers of the reference, which take long to start."""
    threads = 0 if name == "reference" else 2
    return LoaderConfig(**{"data": data_for(name, folder), "pipeline": name, "threads": threads, **settings})


def feed_of(loader: LoaderConfig, views=PAIR, mosaics=MOSAICS, **settings) -> Feed:
    """Batches of 8: of 20 samples two steps per epoch; four steps show all of them."""
    return Feed(open_index(loader), views, mosaics, **{"batch_size": 8, "seed": 0, **settings})


def opened(
    name: str,
    folder: Path | None,
    total_steps: int,
    *,
    start_step=0,
    device="cpu",
    dtype=torch.float32,
    loader=None,
    **feed,
) -> Pipeline:
    """`open_pipeline` of the engine `name`; `loader` and `feed` are settings of these."""
    config = loader_of(installed(name), folder, **(loader or {}))
    return open_pipeline(
        feed_of(config, **feed), config, device=device, dtype=dtype, start_step=start_step, total_steps=total_steps
    )


def batches(name: str, folder: Path | None, total_steps: int, **settings) -> list[Batch]:
    with opened(name, folder, total_steps, **settings) as pipeline:
        return list(pipeline)


@pytest.fixture(scope="session")
def whole(shards):
    """(engine) -> the first seven batches of `shards`, made once."""
    return functools.cache(lambda name: batches(name, shards, 7))


def assert_same(one: Batch, other: Batch, *, by_pil: bool = False) -> None:
    """To the last bit; where PIL cut one of them (`by_pil`) with a Pillow before 13, pixels up to a fraction of a level."""
    assert list(one.views) == list(other.views) and one.overlaps.keys() == other.overlaps.keys()
    assert torch.equal(one.sample_ids, other.sample_ids)
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.ndim >= 4 and by_pil and not PILLOW_13:
            assert levels_apart(a, b) <= 0.5
        else:
            assert torch.equal(a, b)


def levels_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean difference of normalized pixels, levels 0..255."""
    return float((one.cpu() - other.cpu()).abs().mean()) * 255 * float(np.mean(STD))


def digest(batch: Batch) -> str:
    """Equal for batches that are the same to the last bit."""
    found = hashlib.sha256(batch.sample_ids.numpy())
    for tensor in batch.tensors():
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()


def ids_of(made: list[Batch]) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in made]


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
