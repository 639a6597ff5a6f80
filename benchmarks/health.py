"""What a run looks like that is healthy, and one with each of four faults: curves and warnings for docs/healthy-run.md.

    python data_prep/make_scenes.py --out SCENES --num-images 4096 --num-val 512 --size 96
    python data_prep/make_dali.py --data SCENES/train --out TRAIN && python data_prep/make_dali.py --data SCENES/val --out VAL
    python benchmarks/health.py --data TRAIN --val VAL [--steps 400]

Every run is `scripts/train.py --recipe smoke` with queues of 4,096 and 9,216 keys and, but for the healthy one, one function
of the method replaced by one that has the fault. Writes benchmarks/results/health.json and docs/healthy-run.png.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inscon.methods import inscon
from inscon.methods.inscon import InsCon
from inscon.nn.norm import SplitBatchNorm2d
from inscon.report.measure import machine, versions

FLAGS = ["--recipe", "smoke", "--queue-size", 4096, "--cell-queue-size", 9216, "--log-every", 20, "--checkpoint-every", 10**6,
         "--eval-every", 100, "--epochs", 20]  # fmt: skip
SHOWN = {
    "loss_single": "single loss", "top1_single": "single top-1", "knn": "kNN (held out)", "key_distance": "encoders apart",
    "queue_mean_length_single": "length of the mean key", "loss_cell": "cell loss",
}  # fmt: skip


def leak() -> None:
    """BatchNorm sees a query and its key among the same images: one group, no shuffle."""
    begin = InsCon.__init__

    def without_groups(self, *arguments, **named):
        begin(self, *arguments, **named)
        self.shuffle.order = self.shuffle.back = None
        for module in self.modules():
            if isinstance(module, SplitBatchNorm2d):
                module.num_groups = 1

    InsCon.__init__ = without_groups


def stale() -> None:
    """The key encoder never follows the query encoder."""
    InsCon.after_update = lambda self: None


def collapse() -> None:
    """Nothing keeps embeddings apart: the negatives say nothing."""
    plain = inscon.row_logits

    def without_negatives(queries, positives, negatives, temperature):
        return plain(queries, positives, 0 * negatives, temperature)

    inscon.row_logits = without_negatives


def stuck() -> None:
    """New keys never reach the queues."""
    InsCon.after_backward = lambda self, prepared: None


FAULTS: dict[str, Callable[[], None]] = {"leak": leak, "stale": stale, "collapse": collapse, "stuck": stuck}


def run_with(fault: str, flags: list[str]) -> None:
    """`scripts/train.py` in this process, with the fault planted."""
    from scripts import train

    if fault != "healthy":
        FAULTS[fault]()
    train.main(flags)


def windows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def warnings(run_dir: Path) -> list[dict]:
    path = run_dir / "warnings.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for axis, (name, title) in zip(axes.flat, SHOWN.items()):
        for fault, run in result["runs"].items():
            points = [(line["step"], line[name]) for line in run["windows"] if name in line]
            axis.plot(*zip(*points), label=fault, color="black" if fault == "healthy" else None,
                      linewidth=2.2 if fault == "healthy" else 1.3, marker="." if name == "knn" else None)  # fmt: skip
            first = min((w["step"] for w in run["warnings"]), default=None)
            near = [value for step, value in points if first is not None and step >= first]
            if near and fault != "healthy" and name != "knn":
                axis.plot(first, near[0], "v", color=axis.lines[-1].get_color(), markersize=7)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8, title="triangle: first warning", title_fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--runs", nargs="+", default=["healthy", *FAULTS])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/health.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/healthy-run.png")
    arguments = parser.parse_args()
    # Of some runs anew, the others as they were.
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"steps": arguments.steps, "runs": {}}
    if before["steps"] != arguments.steps:
        parser.error(f"{arguments.out} is of {before['steps']} steps; remove it, or give --steps {before['steps']}")
    runs = before["runs"]
    with tempfile.TemporaryDirectory() as folder:
        for fault in arguments.runs:
            run_dir = Path(folder) / fault
            flags = [*FLAGS, "--data", arguments.data, "--eval-data", arguments.val, "--max-steps", arguments.steps]
            flags += ["--run-dir", run_dir]
            command = [sys.executable, __file__, "--plant", fault, *map(str, flags)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            runs[fault] = {"windows": windows(run_dir), "warnings": warnings(run_dir)}
            last = {
                name: round(v, 3)
                for name, v in runs[fault]["windows"][-1].items()
                if name in SHOWN or "renewed" in name
            }
            print(fault, last, runs[fault]["warnings"], flush=True)
    result = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "flags": FLAGS,
        "steps": arguments.steps, "faults": {name: fault.__doc__ for name, fault in FAULTS.items()},
        "runs": {name: runs[name] for name in ("healthy", *FAULTS) if name in runs},
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.picture)


if __name__ == "__main__":
    if "--plant" in sys.argv[1:2]:
        run_with(sys.argv[2], sys.argv[3:])
    else:
        main()
