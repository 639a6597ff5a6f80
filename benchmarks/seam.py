"""What a run waits for its data, and what the seam between two epochs costs.

    python benchmarks/seam.py --data SHARDS [--steps 24] [--out benchmarks/results/seam_cpu.json] -- [flags of scripts/train.py]

Two measurements. Training: `scripts/train.py --log-every 1`, ResNet-50 as the paper has it unless the flags say otherwise;
the share of its time that went into waiting for data, and how much longer the first step of an epoch took than the median
step. The loader alone, without a trainer: how much longer the first batch of an epoch took than the median batch. A
hundred pictures make many seams.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inscon.report.measure import machine, versions
from pipelines import open_pipeline
from scripts.train import feed_of, parse

WARM_UP = 3
"""Steps left out at the start."""


def training(flags: list[str], data: Path, steps: int, steps_per_epoch: int) -> dict:
    with tempfile.TemporaryDirectory() as run_dir:
        fixed = ["--data", data, "--run-dir", run_dir, "--max-steps", steps, "--log-every", 1]
        command = [sys.executable, ROOT / "scripts/train.py", *flags, *map(str, fixed), "--checkpoint-every", "1000000"]
        subprocess.run(command, check=True)
        lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    waits = [line["step_s"] * line["data_wait_percent"] / 100 for line in lines]
    figures = seams([line["step_s"] for line in lines], steps_per_epoch)
    total = sum(line["step_s"] for line in lines[WARM_UP:])
    figures["data_wait_percent"] = 100 * sum(waits[WARM_UP:]) / total
    figures["data_wait_ms_worst"] = 1000 * max(waits[WARM_UP:])
    figures["images_per_s"] = statistics.median(line["images_per_s"] for line in lines[WARM_UP:])
    return figures


def loader_alone(flags: list[str], data: Path, steps: int) -> tuple[dict, int]:
    config = parse([*flags, "--data", str(data)])
    feed, seconds = feed_of(config), []
    with open_pipeline(feed, config.loader, total_steps=steps) as pipeline:
        start = time.perf_counter()
        for _ in pipeline:
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return seams(seconds, feed.steps_per_epoch), feed.steps_per_epoch


def seams(seconds: list[float], steps_per_epoch: int) -> dict:
    """Of the time of each step: the median, and how much longer the first steps of epochs took, in median steps."""
    median = statistics.median(seconds[WARM_UP:])
    first = [s / median - 1 for step, s in enumerate(seconds) if step % steps_per_epoch == 0 and step >= WARM_UP]
    assert first, "no seam was crossed: take more steps"
    others = [s / median - 1 for step, s in enumerate(seconds) if step % steps_per_epoch and step >= WARM_UP]
    return {
        "steps": len(seconds),
        "steps_per_epoch": steps_per_epoch,
        "median_ms": 1000 * median,
        "seams": len(first),
        "seam_costs_steps_median": statistics.median(first),
        "seam_costs_steps_worst": max(first),
        "other_steps_worst": max(others),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24, help="of training")
    parser.add_argument("--loader-steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/seam_cpu.json"))
    parser.add_argument("flags", nargs="*", help="after --: flags of scripts/train.py")
    settings = parser.parse_args()
    flags = settings.flags
    torch.set_num_threads(1)
    alone, steps_per_epoch = loader_alone(flags, settings.data, settings.loader_steps)
    print(json.dumps(alone))
    trained = training(flags, settings.data, settings.steps, steps_per_epoch)
    print(json.dumps(trained))
    report = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "flags": flags}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(report | {"loader_alone": alone, "training": trained}, indent=1) + "\n")


if __name__ == "__main__":
    main()
