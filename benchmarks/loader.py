"""What one source image costs in each loader: two full views at 224 px and the mosaic, from the same JPEG bytes.

    find IMAGES -name "*.JPEG" | awk "{for (i = 0; i < 16; i++) print}" > LIST       # 125 pictures, each 16 times
    python data_prep/make_dali.py --data LIST --out SHARDS
    python data_prep/make_ffcv.py --data SHARDS --out BETON
    python data_prep/make_ffcv.py --data LIST --out SHRUNK --max-resolution 400 --quality 90 --chroma 420
    python data_prep/make_ffcv.py --data LIST --out SHRUNK444 --max-resolution 400 --quality 90
    python data_prep/make_ffcv.py --data SHRUNK --out RAW --write-mode raw
    python benchmarks/loader.py --data SHARDS --beton BETON --shrunk SHRUNK --shrunk-444 SHRUNK444 --raw RAW --threads 2 --rounds 7

Contenders, each given the same number of threads or worker processes:

    decode      libjpeg-turbo (simplejpeg) decoding every picture whole and doing nothing else, in as many processes: the floor
    pil_decode  the same by PIL, whose decoder is libjpeg-turbo too, in threads
    dali        pipelines/dali.py, full views and mosaic
    crops       the same, crops alone as uint8: what a host does when color happens on a GPU
    ffcv        pipelines/ffcv.py, full views and mosaic
    ffcv_crops  the same, crops alone
    ffcv_own    FFCV as it comes: its own Loader with two pipelines on one field, crops alone (no color, no mosaic), seeds ignored
    dali_400    pipelines/dali.py from JPEGs whose longer side was shrunk to 400 px, quality 90, 4:2:0
    ffcv_400    pipelines/ffcv.py from the same
    ffcv_444    pipelines/ffcv.py from the same with whole color resolution, 4:4:4
    ffcv_raw    pipelines/ffcv.py from their pixels
    reference   pipelines/reference.py, full views and mosaic, decoded once
    moco_v2     the two-view torchvision transforms and DataLoader of MoCo v2, which decodes once and lays no mosaic

Rounds alternate between contenders, warm-up is apart, medians are reported. CPU time is that of the whole process tree,
since wall time on a shared machine says little. "image" is a source image throughout. Pictures are repeated lest an epoch be
three batches: FFCV's own loader stops between epochs.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import DatasetIndex
from inscon.config import Config, LoaderConfig, OptimConfig, ViewConfig
from inscon.methods import inscon
from inscon.report.measure import machine, versions
from pipelines import open_pipeline
from pipelines.finish import Finish
from pipelines.prefetch import StageClock
from scripts.train import feed_of

ENDLESS = 10**6
"""More steps than any round takes, so that no contender stops working ahead before the clock does."""


class MocoViews(Dataset):
    """Two views of each sample, as MoCo v2's `TwoCropsTransform` makes them."""

    def __init__(self, index: DatasetIndex, side: int):
        self._index = index
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
        self._transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(side, scale=(0.2, 1.0)),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([_PilBlur()], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int):
        image = Image.open(io.BytesIO(self._index.read(i))).convert("RGB")
        return self._transform(image), self._transform(image)


class _PilBlur:
    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=float(np.random.uniform(0.1, 2.0))))


@contextlib.contextmanager
def engine(name: str, config: Config):
    loader = dataclasses.replace(config.loader, pipeline=name)
    with open_pipeline(feed_of(config), loader, total_steps=ENDLESS) as pipeline:
        yield iter(pipeline)


def _open_in_worker(data: Path) -> None:
    global _index
    _index = DatasetIndex.open(data)


def _decode_in_worker(sample_id: int) -> None:
    simplejpeg.decode_jpeg(_index.read(sample_id))


@contextlib.contextmanager
def bare_decode(config: Config):
    feed = feed_of(config)
    with ProcessPoolExecutor(  # processes, since simplejpeg holds the interpreter's lock while it decodes
        config.loader.threads, multiprocessing.get_context("spawn"), _open_in_worker, (config.loader.data,)
    ) as pool:
        yield (list(pool.map(_decode_in_worker, feed.order.rank_batch(s, 0, 1), chunksize=8)) for s in range(ENDLESS))


@contextlib.contextmanager
def pil_decode(config: Config):
    feed = feed_of(config)

    def decode(sample_id: int) -> None:
        Image.open(io.BytesIO(feed.index.read(sample_id))).convert("RGB")

    with ThreadPoolExecutor(config.loader.threads) as pool:
        yield (list(pool.map(decode, feed.order.rank_batch(step, 0, 1))) for step in range(ENDLESS))


@contextlib.contextmanager
def crops(name: str, config: Config):
    """The host's part of what happens where color is the GPU's."""
    engine_class = getattr(importlib.import_module(f"pipelines.{name}"), f"{name.title()}Engine")
    feed, loader = feed_of(config), dataclasses.replace(config.loader, pipeline=name)
    finish = Finish(feed, torch.device("cpu"), torch.float32, False)
    engine = engine_class(feed, loader, range(ENDLESS), finish, StageClock())
    yield engine.steps()
    engine.end()


def _own_round(beton: str, threads: int, batch_size: int, warm_up: int, steps: int) -> dict[str, float]:
    """In a process of its own, for FFCV's Loader changes numba's types and everybody's threads."""
    global _own
    if "_own" not in globals():
        from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.pipeline import PipelineSpec

        views = [RandomResizedCropRGBImageDecoder((224, 224), scale=(0.2, 1.0)) for _ in range(2)]
        pipelines = {"image": [views[0]], "again": PipelineSpec("image", decoder=views[1]), "label": None}
        loader = Loader(
            beton,
            batch_size=batch_size,
            num_workers=threads,
            order=OrderOption.RANDOM,
            batches_ahead=2,
            pipelines=pipelines,
        )
        _own = (batch for _ in range(ENDLESS) for batch in loader)
    for _ in range(warm_up):
        next(_own)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        one, other = next(_own)
    assert one.shape == other.shape == (batch_size, 224, 224, 3) and not np.array_equal(one, other)
    images = steps * batch_size
    return {
        "wall_ms": (time.perf_counter() - wall) / images * 1e3,
        "cpu_ms": (time.process_time() - cpu) / images * 1e3,
    }


@contextlib.contextmanager
def moco_v2(config: Config):
    loader = DataLoader(
        MocoViews(DatasetIndex.open(config.loader.data), config.views.view_size),
        batch_size=config.optim.batch_size,
        shuffle=True,
        num_workers=config.loader.threads,
        drop_last=True,
        persistent_workers=True,
    )
    yield (batch for _ in range(ENDLESS) for batch in loader)


CONTENDERS = {
    "decode": bare_decode,
    "pil_decode": pil_decode,
    "dali": lambda config: engine("dali", config),
    "crops": functools.partial(crops, "dali"),
    "ffcv": lambda config: engine("ffcv", config),
    "ffcv_crops": functools.partial(crops, "ffcv"),
    "ffcv_own": None,
    "dali_400": lambda config: engine("dali", config),
    "ffcv_400": lambda config: engine("ffcv", config),
    "ffcv_444": lambda config: engine("ffcv", config),
    "ffcv_raw": lambda config: engine("ffcv", config),
    "reference": lambda config: engine("reference", config),
    "moco_v2": moco_v2,
}
READS = {
    "ffcv": "beton",
    "ffcv_crops": "beton",
    "ffcv_own": "beton",
    "dali_400": "shrunk",
    "ffcv_400": "shrunk",
    "ffcv_444": "shrunk_444",
    "ffcv_raw": "raw",
}
"""Which of the data sets a contender reads; the others read --data."""


def tree_cpu_s() -> float:
    """CPU seconds of this process, its threads and its living child processes."""
    ticks = os.sysconf("SC_CLK_TCK")
    total = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / ticks
    return total


def measure(name: str, config: Config, warm_up: int, steps: int) -> dict[str, float]:
    """One round: {"wall_ms", "cpu_ms"} per source image."""
    with CONTENDERS[name](config) as batches:
        for _ in range(warm_up):
            next(batches)
        wall, cpu = time.perf_counter(), tree_cpu_s()
        for _ in range(steps):
            next(batches)
        images = steps * config.optim.batch_size
        wall, cpu = (time.perf_counter() - wall) / images * 1e3, (tree_cpu_s() - cpu) / images * 1e3
        batches.close() if hasattr(batches, "close") else None
    return {"wall_ms": wall, "cpu_ms": cpu}


def summarise(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians, and how many times the bare decode, MoCo v2's pipeline and FFCV's own cost, round by round."""
    summary = {}
    for name, own in rounds.items():
        entry = {key: statistics.median(r[key] for r in own) for key in ("wall_ms", "cpu_ms")}
        entry["images_per_s"] = 1e3 / entry["wall_ms"]
        for key in ("wall_ms", "cpu_ms"):
            pairs = [
                (mine[key], floor[key], moco[key])
                for mine, floor, moco in zip(own, rounds["decode"], rounds["moco_v2"])
            ]
            entry[f"{key}_over_decode"] = statistics.median(mine / floor for mine, floor, _ in pairs)
            entry[f"{key}_moco_v2_over_this"] = statistics.median(moco / mine for mine, _, moco in pairs)
            if "ffcv_own" in rounds:
                others = zip(own, rounds["ffcv_own"], strict=True)
                entry[f"{key}_ffcv_own_over_this"] = statistics.median(other[key] / mine[key] for mine, other in others)
        summary[name] = entry
    return summary


def show(summary: dict[str, dict[str, float]], console: Console) -> None:
    table = Table(title="per source image, medians over rounds")
    for column in (
        "contender",
        "images/s",
        "wall ms",
        "CPU ms",
        "x decode (CPU)",
        "MoCo v2 / this (CPU)",
        "MoCo v2 / this (wall)",
        "FFCV's own / this (wall)",
    ):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, e in summary.items():
        cells = [e["images_per_s"], e["wall_ms"], e["cpu_ms"], e["cpu_ms_over_decode"]]
        cells += [e["cpu_ms_moco_v2_over_this"], e["wall_ms_moco_v2_over_this"]]
        cells += [e.get("wall_ms_ffcv_own_over_this", float("nan"))]
        table.add_row(name, f"{cells[0]:.0f}", *(f"{cell:.2f}" for cell in cells[1:]))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="tar shards written by data_prep/make_dali.py")
    parser.add_argument("--beton", type=Path, help="the same samples, packed by data_prep/make_ffcv.py")
    parser.add_argument("--shrunk", type=Path, help="a .beton of JPEGs shrunk to 400 px, 4:2:0")
    parser.add_argument("--shrunk-444", type=Path, help="the same with whole color resolution")
    parser.add_argument("--raw", type=Path, help="a .beton of the pixels of these")
    parser.add_argument("--threads", type=int, default=2, help="threads or worker processes of each contender")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="timed batches per round and contender")
    parser.add_argument("--warm-up", type=int, default=8, help="batches before the clock starts")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loader_cpu.json"))
    arguments = parser.parse_args()
    # The consumer only normalizes; OpenMP threads that spin for work would be counted as cost.
    torch.set_num_threads(1)
    sets = {"data": arguments.data, "beton": arguments.beton, "shrunk": arguments.shrunk, "raw": arguments.raw}
    sets["shrunk_444"] = arguments.shrunk_444
    configs = {
        name: Config(
            method=inscon.Settings(),
            loader=LoaderConfig(data=sets[READS.get(name, "data")], threads=arguments.threads),
            views=ViewConfig(),
            optim=OptimConfig(batch_size=arguments.batch_size),
        )
        for name in CONTENDERS
        if sets[READS.get(name, "data")] is not None
    }
    config = configs["decode"]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    for name in {"dali", "ffcv"} & configs.keys():
        measure(name, configs[name], 1, 1)  # compiles
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own_process:
        for number in range(arguments.rounds):
            for name, own in rounds.items():
                if name == "ffcv_own":
                    lengths = arguments.batch_size, arguments.warm_up, arguments.steps
                    beton = str(sets["beton"] / "samples.beton")
                    own.append(own_process.submit(_own_round, beton, arguments.threads, *lengths).result())
                else:
                    own.append(measure(name, configs[name], arguments.warm_up, arguments.steps))
            print(f"round {number + 1} of {arguments.rounds} done", flush=True)
    summary = summarise(rounds)
    show(summary, Console())
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "samples": len(DatasetIndex.open(arguments.data)),
        "view_size": config.views.view_size,
        "loader": {
            k: v for k, v in dataclasses.asdict(config.loader).items() if k in ("threads", "prefetch", "decode")
        },
        "medians": summary,
        "rounds": rounds,
    }
    for name in (*sets, "out"):
        report["settings"].pop(name)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
