"""Every method on one data set, side by side: how fast it trains, whether it waits for data, and whether it learns.

    unzip cifar10_mini.zip && python data_prep/make_dali.py --data cifar10_mini/train --out TRAIN   (and val)
    python benchmarks/methods.py --train TRAIN --val VAL --steps 400 --out benchmarks/results/methods.json

Each is trained by `scripts/train.py` as a user would, with its recipe's views, loss and optimizer, at a size that a CPU can do: a
small backbone, small views, short queues (`SMALL`). Its rate is measured on ready batches and through dali, in turn, three times;
its cost is counted (inscon/report/flops.py). kNN is of the last run through dali, beside the same network untrained. Runs as short
as these say that a method learns, not how good it is.
"""

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

from inscon import methods
from inscon.methods.method import resolve
from inscon.report.flops import step_flops
from inscon.report.measure import machine, versions
from scripts.train import parse

QUEUE = ("--queue-size", "2048", "--key-momentum", "0.99", "--lr", "0.06")
RATE = ("--lr", "1", "--warmup-epochs", "1")
SMALL = {
    "moco": QUEUE, "inscon": (*QUEUE, "--cell-queue-size", "4608"), "densecl": (*QUEUE, "--dense-from-step", "100"),
    "resim": QUEUE, "detco": QUEUE, "infomin": QUEUE, "simclr": RATE, "byol": RATE, "pixpro": RATE,
}  # fmt: skip
"""What a few thousand pictures need that ImageNet does not: queues shorter than the set, copies that follow faster, short
warm-ups."""


def command(script: str, *flags: object) -> list[str]:
    return [sys.executable, str(HERE / "scripts" / script), *map(str, flags)]


def windows(run_dir: Path) -> list[dict]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return found[1:]  # in the first one everything happens for the first time


def train(name: str, run_dir: Path, steps: int, flags: list[str]) -> dict[str, float]:
    """Medians over the windows of a run."""
    most = ["--max-steps", steps, "--log-every", max(steps // 8, 1), "--checkpoint-every", 10**6]
    subprocess.run(
        command("train.py", "--method", name, "--run-dir", run_dir, *most, *flags), check=True, capture_output=True
    )
    names = ("images_per_s", "data_wait_percent")
    return {figure: statistics.median(window[figure] for window in windows(run_dir)) for figure in names}


def knn(run_dir: Path, train_set: Path, val: Path) -> dict[str, float]:
    """Percent, "untrained" and "trained"."""
    done = subprocess.run(
        command("knn.py", "--run", run_dir, "--train", train_set, "--val", val, "--k", 20),
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {name: float(share) for name, share in re.findall(r"(untrained|trained): ([\d.]+) %", done.stdout)}


def measure(name: str, arguments: argparse.Namespace, work: Path) -> dict:
    size = ["--backbone", arguments.backbone, "--view-size", str(arguments.view_size)]
    size += ["--batch-size", str(arguments.batch_size), *SMALL[name]]
    synthetic, dali = [*size, "--pipeline", "synthetic"], [*size, "--pipeline", "dali", "--data", str(arguments.train)]
    short = {"synthetic": synthetic, "dali": dali}
    rounds = {pipeline: [] for pipeline in short}
    for number in range(arguments.rounds):
        for pipeline, flags in short.items():
            run_dir = work / f"{name}-{pipeline}-{number}"
            rounds[pipeline].append(train(name, run_dir, arguments.rate_steps, flags))
    found = {
        pipeline: {figure: statistics.median(one[figure] for one in of) for figure in of[0]}
        for pipeline, of in rounds.items()
    }
    found["trainings"] = step_flops(resolve(parse(["--method", name, *synthetic]), 1)).trainings
    train(name, work / name, arguments.steps, [*dali, "--schedule", "cosine-step", "--epochs", str(arguments.epochs)])
    losses = [window["loss"] for window in windows(work / name)]
    return found | {"knn": knn(work / name, arguments.train, arguments.val), "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="labelled packed set")
    parser.add_argument("--val", type=Path, required=True, help="another one, of the same classes")
    parser.add_argument("--methods", nargs="+", default=methods.names())
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--view-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400, help="of the run that kNN is of")
    parser.add_argument("--epochs", type=int, default=4, help="of its schedule")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rate-steps", type=int, default=16, help="of the runs that rates are of")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/methods.json"))
    arguments = parser.parse_args()
    results, settings = (
        {},
        {key: str(value) for key, value in vars(arguments).items() if key not in ("train", "val", "out")},
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.methods:
            results[name] = measure(name, arguments, Path(folder))
            print(name, json.dumps(results[name] | {"losses": results[name]["losses"][-1:]}), flush=True)
            report = {
                "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(),
                "settings": settings, "small": SMALL, "results": results,
            }  # fmt: skip
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
