"""How fast the writers pack, against reading and decoding the same files and nothing else; and how much memory they take.

    python benchmarks/packing.py --pictures ../shared/data/imagenet_sample/train --out benchmarks/results/packing.json

Rate: some thousand different JPEGs, each a large crop of a real one, encoded anew. Contenders, each with the same number of
processes, in alternating rounds, medians reported:

    decode      reads every file and decodes it whole to RGB with libjpeg-turbo (simplejpeg), nothing else: the bare loop
    make_dali   the whole command, from start to end, writing to --work
    make_ffcv   the same, jpg mode

The page cache is warm for all. The bare loop's clock starts when its processes are ready; the commands' own start-up,
listing and joining are counted.

Memory and index (--entries): the writers with 2 workers on a list of 10,000 and of 1,280,000 entries, which name 1,000
small pictures again and again; the sum of the resident memory of all processes, at its peak; then the index of the large
set: opened in new processes, and 256 random lookups of records, sizes and labels, median of many.
"""

import argparse
import concurrent.futures
import datetime
import functools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_prep.index import DatasetIndex
from inscon import guard
from inscon.report.measure import machine, versions

WRITERS = ("make_dali", "make_ffcv")


def make_pictures(source: Path, folder: Path, count: int) -> None:
    """`count` different JPEGs: crops of 80 to 100 % of the real ones' sides, at about their bytes per pixel."""
    originals = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not originals:
        raise ValueError(f"{source} has no .jpg and no .jpeg; give a folder of JPEGs, with folders of them or without")
    parts = (range(first, min(first + 50, count)) for first in range(0, count, 50))
    with concurrent.futures.ProcessPoolExecutor() as pool:
        list(pool.map(functools.partial(_make, originals, folder), parts))


def _make(originals: list[Path], folder: Path, numbers: range) -> None:
    for i in numbers:
        image, rng = Image.open(originals[i % len(originals)]), np.random.default_rng(i)
        share = rng.uniform(0.8, 1)
        width, height = max(1, round(image.width * share)), max(1, round(image.height * share))
        left, top = rng.integers(0, image.width - width + 1), rng.integers(0, image.height - height + 1)
        path = folder / f"class_{i % 100:02d}/{i:06d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + width, top + height)).save(path, quality=95)


def decode_files(paths: list[str], ready, go) -> None:
    import simplejpeg

    ready.release()
    go.wait()
    for path in paths:
        with open(path, "rb") as file:
            simplejpeg.decode_jpeg(file.read(), "RGB")


def bare_loop(paths: list[str], workers: int) -> float:
    """Seconds."""
    context = multiprocessing.get_context("spawn")
    ready, go = context.Semaphore(0), context.Event()
    processes = [
        context.Process(target=decode_files, args=(paths[i::workers], ready, go), daemon=True) for i in range(workers)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        while not ready.acquire(timeout=1):
            assert not any(process.exitcode for process in processes), "a decoding process ended; what it said is above"
    start = time.perf_counter()
    go.set()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return time.perf_counter() - start


class PeakMemory(threading.Thread):
    """Sums the resident memory of a process and its children, again and again; `peak_mb` is the largest sum."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self._pid, self.peak_mb = pid, 0.0

    def run(self):
        while os.path.exists(f"/proc/{self._pid}"):
            self.peak_mb = max(self.peak_mb, sum(map(_resident_mb, _tree(self._pid))))
            time.sleep(0.02)


def _tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(below for child in children for below in _tree(int(child)))]


def _resident_mb(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
    except (OSError, IndexError):
        return 0.0


def write(writer: str, data: Path, out: Path, workers: int, *options: str) -> dict[str, float]:
    """Run a writer's command; {"wall_s", "peak_mb"}."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(ROOT / f"data_prep/{writer}.py"), "--data", str(data), "--out", str(out)]
    command += ["--workers", str(workers), *options]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    memory = PeakMemory(process.pid)
    memory.start()
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    return {"wall_s": time.perf_counter() - start, "peak_mb": memory.peak_mb}


def rates(arguments: argparse.Namespace, work: Path) -> dict:
    pictures = work / "pictures"
    make_pictures(arguments.pictures, pictures, arguments.count)
    paths = [str(path) for path in sorted(pictures.rglob("*.JPEG"))]
    byte_count = sum(os.path.getsize(path) for path in paths)
    rounds = {name: [] for name in ("decode", *WRITERS)}
    bare_loop(paths, arguments.workers)  # warms the page cache
    for number in range(arguments.rounds):
        rounds["decode"].append({"wall_s": bare_loop(paths, arguments.workers)})
        for writer in WRITERS:
            options = ("--shard-mb", "32") if writer == "make_dali" else ()
            rounds[writer].append(write(writer, pictures, work / "out", arguments.workers, *options))
        print(f"round {number}:", {name: round(own[-1]["wall_s"], 2) for name, own in rounds.items()}, flush=True)
    medians = {}
    for name, own in rounds.items():
        over = [floor["wall_s"] / mine["wall_s"] for mine, floor in zip(own, rounds["decode"])]
        wall_s = statistics.median(r["wall_s"] for r in own)
        medians[name] = {"pictures_per_s": len(paths) / wall_s, "mb_per_s": byte_count / 1e6 / wall_s}
        medians[name]["rate_over_decode"] = statistics.median(over)
        if "peak_mb" in own[0]:
            medians[name]["peak_mb"] = max(r["peak_mb"] for r in own)
    return {"pictures": len(paths), "mean_bytes": byte_count / len(paths), "medians": medians, "rounds": rounds}


def memory_and_index(arguments: argparse.Namespace, work: Path) -> dict:
    small = work / "small"
    small.mkdir()
    rng = np.random.default_rng(0)
    for i in range(1000):
        pixels = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        size = tuple(int(side) for side in rng.integers(8, 33, 2))
        Image.fromarray(pixels).resize(size).save(small / f"{i:03d}.jpg")
    result: dict = {}
    for writer in reversed(WRITERS):
        result[writer] = {}
        for entries in (10_000, arguments.entries):
            listing = work / f"{entries}.tsv"
            with listing.open("w") as file:
                file.writelines(f"{small}/{i % 1000:03d}.jpg\t{i % 1000}\n" for i in range(entries))
            options = ("--shard-mb", "1") if writer == "make_dali" else ()  # so that the small set has several, too
            measured = write(writer, listing, work / "out", 2, *options)
            result[writer][str(entries)] = measured
            print(writer, entries, measured, flush=True)
    result["index"] = index_times(work / "out")
    print(result["index"])
    return result


OPEN = """
import sys, time
sys.path.insert(0, sys.argv[2])
from data_prep.index import DatasetIndex
start = time.perf_counter()
index = DatasetIndex.open(sys.argv[1])
print(1e3 * (time.perf_counter() - start))
"""


def index_times(folder: Path) -> dict:
    """Milliseconds. Each opening is a new process's first; lookups are of other random ids each time, files in page cache."""
    opened = [
        float(
            subprocess.run(
                [sys.executable, "-c", OPEN, folder, ROOT], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(11)
    ]
    index = DatasetIndex.open(folder)
    rng = np.random.default_rng(0)
    costs: dict[str, list[float]] = {"records": [], "sizes_and_labels": [], "read": []}
    for _ in range(201):
        ids = rng.integers(0, len(index), 256)
        for name, look_up in {
            "records": lambda ids=ids: index.records(ids),
            "sizes_and_labels": lambda ids=ids: (index.sizes(ids), index.labels(ids)),
            "read": lambda ids=ids: [index.read(i) for i in ids],
        }.items():
            start = time.perf_counter()
            look_up()
            costs[name].append(1e3 * (time.perf_counter() - start))
    return {
        "samples": len(index),
        "index_mb": index.manifest.index.byte_count / 1e6,
        "open_ms": {"median": statistics.median(opened), "max": max(opened)},
        "lookups_of_256_ms": {
            name: {"median": statistics.median(own), "p99": float(np.quantile(own, 0.99))}
            for name, own in costs.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of real JPEGs")
    parser.add_argument("--count", type=int, default=16000, help="pictures to make of them")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--entries", type=int, default=1_280_000, help="of the large simulated set; 0: leave this part out"
    )
    parser.add_argument(
        "--work", type=Path, default=None, help="folder for what is written; a temporary one by default"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/packing.json"))
    arguments = parser.parse_args()
    report = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "workers": arguments.workers,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        report["rates"] = rates(arguments, Path(work))
        if arguments.entries:
            report["scale"] = memory_and_index(arguments, Path(work))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["rates"]["medians"], indent=1))


if __name__ == "__main__":
    guard.run_script("packing.py", main)
