"""All that one GPU can tell of this project, in one command that goes on after a failure and ends in time.

    python benchmarks/gpu.py --out RESULTS --minutes 8                          # ready batches only
    python benchmarks/gpu.py --out RESULTS --minutes 8 --pictures FOLDER        # and end to end, from JPEGs of class folders

In order: the tests of a GPU; steps on ready batches (precisions, batch sizes, with and without the graph, beside the naive port
of benchmarks/step.py); 200 steps in fp16; through dali and ffcv with color on either side; the report; the other methods.
RESULTS/gpu.json is written anew after each of them, with device, versions and date; log.txt beside it has what each one printed.
What has no time left is listed as not run. Rates are source images/s, medians of the windows of a run's metrics but the first two.

--quick takes tiny sizes and any device: to try the benchmark, not to report figures.
"""

import argparse
import datetime
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from benchmarks.packing import make_pictures
from inscon import methods
from inscon.report.measure import machine, versions

LIMIT_S = 150
"""Of one item; a graph's capture and cudnn's search take seconds of it."""


class Item(NamedTuple):
    name: str
    command: list[str]
    """Behind the interpreter."""
    run_dir: Path | None = None
    """Of a training whose metrics tell a rate."""
    limit_s: float = LIMIT_S


def training(name: str, work: Path, quick: bool, *flags: object, steps: int = 60) -> Item:
    run_dir = work / "runs" / name.replace(" ", "_")
    command = [
        "scripts/train.py",
        "--pipeline",
        "synthetic",
        "--run-dir",
        run_dir,
        "--max-steps",
        8 if quick else steps,
    ]
    command += ["--log-every", 2 if quick else 5, "--checkpoint-every", 10**6, *flags]
    command += ["--view-size", 64, "--batch-size", 16, "--backbone", "resnet18"] if quick else []
    return Item(name, list(map(str, command)), run_dir)


def ready_batches(work: Path, quick: bool) -> Iterator[Item]:
    for precision in ("fp32",) if quick else ("bf16", "fp16"):
        sizes = (
            "--batch-size 16 --view-size 64 --backbone resnet18 --steps 1" if quick else "--batch-size 256 --steps 10"
        )
        out = work / f"naive_{precision}.json"
        command = f"benchmarks/step.py {sizes} --rounds 3 --precision {precision} --out {out}"
        yield Item(f"naive port beside ours {precision}", command.split())
        yield training(f"{precision} 256", work, quick, "--precision", precision, "--batch-size", 256)
        yield training(
            f"{precision} 256 eager", work, quick, "--precision", precision, "--batch-size", 256, "--graph", "off"
        )
        for batch_size in (32, 64, 128, 512):
            yield training(
                f"{precision} {batch_size}", work, quick, "--precision", precision, "--batch-size", batch_size
            )
    yield training("moco bf16 256", work, quick, "--method", "moco")
    fp16 = () if quick else ("--precision", "fp16")
    yield training("200 steps of fp16", work, quick, *fp16, "--batch-size", 64, steps=200)


def end_to_end(work: Path, quick: bool) -> Iterator[Item]:
    for name, writer in (("dali", "make_dali.py"), ("ffcv", "make_ffcv.py")):
        yield Item(f"pack {name}", f"data_prep/{writer} --data {work}/pictures --out {work}/{name}".split())
        for color in ("auto", "host", "device"):
            flags = "--pipeline", name, "--data", work / name, "--color", color, "--epochs", 10, "--decode", "auto"
            yield training(f"{name} color {color}", work, quick, *flags)
    size = "--recipe smoke" if quick else ""
    report = f"scripts/throughput_report.py {size} --pipeline dali --data {work}/dali --out {work}/report"
    yield Item("report", report.split())


def others(work: Path, quick: bool) -> Iterator[Item]:
    for name in methods.names():
        yield training(f"method {name}", work, quick, "--method", name)


def rates(run_dir: Path) -> dict[str, float]:
    """Medians over the windows of a run but the first two, and whether its losses are finite."""
    windows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    late = windows[2:] or windows
    found = {
        name: statistics.median(window[name] for window in late)
        for name in ("images_per_s", "step_s", "data_wait_percent", "mfu_percent")
        if all(name in window for window in late)
    }
    return found | {"finite": all(math.isfinite(window["loss"]) for window in windows), "loss": windows[-1]["loss"]}


def run(item: Item, out: Path, left_s: float) -> dict:
    """What came of it."""
    log, start = out / "log.txt", time.perf_counter()
    with log.open("ab") as file:
        file.write(f"\n== {item.name}: {' '.join(item.command)}\n".encode())
        file.flush()
        try:
            command = [sys.executable, *item.command]
            limit = min(item.limit_s, left_s)
            status = subprocess.run(command, cwd=HERE, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            status = "timed out"
    found = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    if item.run_dir and (item.run_dir / "metrics.jsonl").exists():
        found |= rates(item.run_dir)
    else:
        found["said"] = log.read_text(errors="replace").splitlines()[-1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs; more are made of them")
    parser.add_argument("--count", type=int, default=16000, help="pictures to make")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", nargs="+", default=[], help="items whose names begin so")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, any device: to try it")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        items = [Item("tests", ["-m", "pytest", "-q", "-m", "gpu", "-x" if arguments.quick else "-q"])]
        items += ready_batches(work, arguments.quick)
        if arguments.pictures:
            make_pictures(arguments.pictures, work / "pictures", 64 if arguments.quick else arguments.count)
            items += end_to_end(work, arguments.quick)
        items += others(work, arguments.quick)
        results = {}
        for item in items:
            if arguments.only and not item.name.startswith(tuple(arguments.only)):
                continue
            left = end - time.monotonic()
            results[item.name] = run(item, arguments.out, left) if left > 10 else {"status": "not run: no time left"}
            print(item.name, results[item.name], flush=True)
            for made in (*work.glob("*.json"), *work.glob("report/report.*")):
                (arguments.out / made.name).write_bytes(made.read_bytes())
            report = {
                "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(),
                "quick": arguments.quick, "results": results,
            }  # fmt: skip
            (arguments.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
