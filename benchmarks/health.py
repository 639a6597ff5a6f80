"""Healthy runs of ten settings, none of which may warn, and one with each planted fault, which must: for docs/healthy-run.md.

    python data_prep/make_scenes.py --out SCENES --num-images 4096 --num-val 512 --size 96
    python data_prep/make_dali.py --data SCENES/train --out TRAIN && python data_prep/make_dali.py --data SCENES/val --out VAL
    python benchmarks/health.py --data TRAIN --val VAL                  # the planted faults, and the same run without any
    python benchmarks/health.py --healthy --data TRAIN --other PACKED   # the ten; PACKED: a packed set of real pictures

Every run is `scripts/train.py` on a network of 0.4 million weights; a fault is a function of the method that is replaced
by one that has it. Writes benchmarks/results/health.json, run by run, and docs/healthy-run.png.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from torch import nn

from inscon.methods import byol, inscon, method
from inscon.methods.inscon import InsCon
from inscon.nn.norm import SplitBatchNorm2d
from inscon.report.measure import machine, versions
from scripts import train

SMALL = "--backbone test_resnet --view-size 32 --overlap-min-side 8 --batch-size 32 --epochs 2 --log-every 10"
OF_HEADS = f"{SMALL} --batch-size 16 --split-size 4 --cell-stage res4 --cell-grid 2 --checkpoint-every 9999"
PLANTED = f"--recipe smoke {OF_HEADS} --queue-size 4096 --cell-queue-size 4096 --eval-every 50"
OF_BYOL = f"--recipe byol_r50 {SMALL} --hidden-dim 256 --embedding-dim 64 --lr 0.5 --warmup-epochs 0"
HEALTHY = {
    "smoke": f"--recipe smoke {OF_HEADS} --cell-queue-size 512",
    "demo": f"--recipe demo {OF_HEADS} --cell-queue-size 4096",
    "moco_v2": f"--recipe moco_v2 {SMALL} --queue-size 1024",
    "moco_v1": f"--recipe moco_v1 {SMALL} --queue-size 4096 --key-momentum 0.99 --lr 0.1 --warmup-epochs 1",
    "cells": f"--recipe r3 {OF_HEADS} --queue-size 512 --cell-queue-size 2048 --key-momentum 0.99 --temperature 0.1 --lr 0.06",
    "densecl": f"--recipe densecl_r50 {SMALL} --queue-size 1024 --key-momentum 0.99 --view-size 64",
    "resim": f"--recipe resim_r50 {SMALL} --queue-size 1024 --key-momentum 0.99 --view-size 64 --batch-size 16",
    "byol": OF_BYOL,
    "pixpro": OF_BYOL.replace("byol_r50", "pixpro_r50") + " --view-size 64",
    "simclr": f"--recipe simclr_r50 {SMALL} --lr 0.5 --warmup-epochs 1",
}
"""Name -> flags: methods, recipes, temperatures, queues, rates, networks."""
OF_OTHER = ("moco_v2", "cells", "byol", "simclr", "moco_v1")
"""Those that learn from the other set."""
KEPT = ("loss", "top1_", "length_", "rank_", "key_", "queue_", "knn")
"""How the figures begin that the result keeps."""
SHARED = "this machine seems to be shared"
"""Begins the warning that is of the machine, not of the run."""
SHOWN = {
    "loss_single": "single loss", "top1_single": "single top-1", "knn": "kNN (held out)", "key_distance": "encoders apart",
    "length_single": "length of the mean key", "rank_single": "effective rank of the keys",
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
    plain = method.row_logits

    def without_negatives(queries, positives, negatives, temperature):
        return plain(queries, positives, 0 * negatives, temperature)

    method.row_logits = inscon.row_logits = without_negatives


def stuck() -> None:
    """New keys never reach the queues."""
    InsCon.after_backward = lambda self, prepared: None


def alike() -> None:
    """Of BYOL: no predictor, so that all that is asked for is that embeddings agree."""
    byol.BYOL.build_predictor = lambda self: nn.Identity()


FAULTS: dict[str, Callable[[], None]] = {
    "leak": leak, "stale": stale, "collapse": collapse, "stuck": stuck, "alike": alike,
}  # fmt: skip
RUNS = HEALTHY | dict.fromkeys(["healthy", *FAULTS], PLANTED) | {"alike": f"{OF_BYOL} --target-momentum 0"}
"""Name -> flags."""


def run_with(name: str, flags: list[str]) -> None:
    """`scripts/train.py` in this process, in silence, with the fault of that name planted, if there is one."""
    FAULTS.get(name, lambda: None)()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.main(flags)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def one_run(name: str, arguments: argparse.Namespace) -> dict:
    """Its flags, its figures, each a list over the log lines, and its warnings."""
    data = arguments.other if name in OF_OTHER else arguments.data
    with tempfile.TemporaryDirectory() as folder:
        flags = [*RUNS[name].split(), "--data", data, "--run-dir", folder, "--max-steps", arguments.steps]
        flags += ["--eval-data", arguments.val] if "--eval-every" in RUNS[name] else []
        process = multiprocessing.get_context("fork").Process(target=run_with, args=(name, list(map(str, flags))))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"the run {name} ended with status {process.exitcode}")
        windows, warnings = lines(Path(folder) / "metrics.jsonl"), lines(Path(folder) / "warnings.jsonl")
    names = ["step", *(name for name in windows[-1] if name.startswith(KEPT))]
    figures = {name: [rounded(window.get(name)) for window in windows] for name in names}
    warnings = [w for w in warnings if not w["warning"].startswith(SHARED)]
    of = "other" if name in OF_OTHER else "scenes"
    return {"flags": RUNS[name], "set": of, "figures": figures, "warnings": warnings}


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    planted = {fault: run for fault, run in result["runs"].items() if run["flags"] == PLANTED}
    for axis, (name, title) in zip(axes.flat, SHOWN.items()):
        for fault, run in planted.items():
            figures = zip(run["figures"]["step"], run["figures"][name], strict=True)
            points = [(step, value) for step, value in figures if value is not None]
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
    parser.add_argument("--val", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--healthy", action="store_true")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", nargs="+", choices=RUNS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/health.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/healthy-run.png")
    arguments = parser.parse_args()
    names = arguments.runs or (HEALTHY if arguments.healthy else ["healthy", *FAULTS])
    for name in names:
        run = one_run(name, arguments)
        result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"runs": {}}
        result |= {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions()}
        result["runs"][name] = run
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, {name: values[-1] for name, values in run["figures"].items()}, run["warnings"], flush=True)
    if set(names) & set(FAULTS):
        draw(result, arguments.picture)
    if alarmed := [name for name in names if name not in FAULTS and result["runs"][name]["warnings"]]:
        sys.exit(f"a healthy run must not warn. Found: {', '.join(alarmed)}")


if __name__ == "__main__":
    main()
