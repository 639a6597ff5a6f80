"""From generated scenes to a detector, in one command: pre-training, kNN, linear probe, fine-tuning; one report of what came out.

    python benchmarks/transfer.py [--out transfer]

Draws scenes, packs them, pre-trains a ResNet-18 on all three heads for a few minutes, and compares it with the network before
training by nearest neighbors, by a linear probe and by a short Mask R-CNN fine-tuning. Writes OUT/report.md, report.json and
report.png; under 15 minutes on 2 cores. So short a training says that the parts fit together, not how good the method is.
"""

import argparse
import datetime
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inscon.report.measure import machine, versions

SCENES = ["--num-images", 1024, "--num-val", 256, "--size", 128]
EPOCHS = 6
"""Of pre-training."""
PROBE = ["--epochs", 10, "--batch-size", 64]
DETECTION = ["--arch", "maskrcnn-fpn", "--min-size", 128, "--batch-size", 4,
             "--rois", 32, "--proposals", 40, "--base-lr", 0.08]  # fmt: skip
JUDGED = 64
"""Pictures of the validation set that detectors are judged on."""


class Steps:
    """Runs the project's commands, one after the other, and remembers how long each took."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, script: str, *arguments: object) -> str:
        print(f"{name}: python {script} {' '.join(map(str, arguments))}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{script} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        self.seconds[name] = time.perf_counter() - start
        return done.stdout


def first_of(annotations: Path, count: int, out: Path) -> Path:
    """COCO annotations of the first `count` images alone."""
    held = json.loads(annotations.read_text())
    held["images"] = held["images"][:count]
    kept = {image["id"] for image in held["images"]}
    held["annotations"] = [entry for entry in held["annotations"] if entry["image_id"] in kept]
    out.write_text(json.dumps(held))
    return out


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def measure(out: Path, iterations: int) -> dict:
    step, run = Steps(), out / "run"
    step("scenes", "data_prep/make_scenes.py", "--out", out / "scenes", *SCENES)
    sets = {name: out / f"shards_{name}" for name in ("train", "val")}
    for name, shards in sets.items():
        step(f"packing {name}", "data_prep/make_dali.py", "--data", out / "scenes" / name, "--out", shards)
    step("pre-training", "scripts/train.py", "--recipe", "smoke", "--epochs", EPOCHS, "--data", sets["train"], "--run-dir", run,
         "--eval-data", sets["val"], "--eval-every", 40)  # fmt: skip
    sides = ["--train", sets["train"], "--val", sets["val"]]
    said = step("kNN", "scripts/knn.py", "--run", run, *sides, "--k", 20)
    knn = {name: float(said.split(f") {name}: ")[1].split(" %")[0]) / 100 for name in ("untrained", "trained")}
    result = {"knn": knn, "linear": {}, "detection": {}}
    for name, flags in (("trained", []), ("untrained", ["--untrained"])):
        step(f"linear probe, {name}", "scripts/linear.py", "--checkpoint", run, *sides, "--out", out / f"probe_{name}",
             *flags, *PROBE)  # fmt: skip
        found = json.loads((out / f"probe_{name}/result.json").read_text())
        result["linear"][name] = {k: found[k] for k in ("top1", "top5") if k in found} | {
            "curve": lines_of(out / f"probe_{name}/metrics.jsonl")
        }
    step("export", "scripts/export.py", "--run", run, "--format", "torchvision", "--out", out / "backbone.pth")
    judged = first_of(out / "scenes/annotations_val.json", JUDGED, out / "annotations_judged.json")
    annotated = [
        "--train-json", out / "scenes/annotations.json", "--train-images", out / "scenes/train",
        "--val-json", judged, "--val-images", out / "scenes/val",
    ]  # fmt: skip
    for name, weights in (("trained", [out / "backbone.pth"]), ("random", ["random", "--backbone", "resnet18"])):
        folder = out / f"detection_{name}"
        step(f"fine-tuning, {name}", "scripts/finetune_detection.py", "--weights", *weights, *annotated, "--out", folder,
             "--iterations", iterations, *DETECTION)  # fmt: skip
        found = json.loads((folder / "results.json").read_text())
        found["val"]["json"] = Path(found["val"]["json"]).name  # no machine's paths
        result["detection"][name] = found | {"curve": lines_of(folder / "metrics.jsonl")}
    result |= {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "seconds": step.seconds,
        "scenes": SCENES, "epochs": EPOCHS, "probe": PROBE, "detection_flags": [*DETECTION, "--iterations", iterations],
        "pretraining": lines_of(run / "metrics.jsonl"),
    }  # fmt: skip
    return result


def page(result: dict) -> str:
    """report.md."""
    knn, linear, found = result["knn"], result["linear"], result["detection"]
    minutes, here = sum(result["seconds"].values()) / 60, result["machine"]
    lines = [
        "# Pre-trained for a few minutes, and used", "",
        f"{result['date']}, {here['cores']} cores of {here['cpu']}; {minutes:.1f} minutes in all. One run of each: so "
        "short a training says that the parts fit together, not how good the method is.", "",
        "| | before training | pre-trained |", "|---|---|---|",
        f"| kNN, k = 20 | {100 * knn['untrained']:.1f} % | {100 * knn['trained']:.1f} % |",
        f"| linear probe, top-1 | {100 * linear['untrained']['top1']:.1f} % | {100 * linear['trained']['top1']:.1f} % |",
    ]  # fmt: skip
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        for figure in ("AP", "AP50", "AP75"):
            values = [found[start][kind][figure] for start in ("random", "trained")]
            lines.append(f"| Mask R-CNN FPN, {name} {figure} | {values[0]:.1f} | {values[1]:.1f} |")
    lines += ["", "![curves](report.png)", "", "| step | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.0f} |" for name, seconds in result["seconds"].items()]
    return "\n".join(lines) + "\n"


def draw(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.6), layout="constrained")
    lines = result["pretraining"]
    for name in ("loss_single", "loss_multi", "loss_cell"):
        axes[0].plot([line["step"] for line in lines], [line[name] for line in lines], label=name[5:])
    axes[0].set_title("pre-training, losses")
    points = [(line["step"], 100 * line["knn"]) for line in lines if "knn" in line]
    axes[1].plot(*zip(*points), marker=".")
    axes[1].set_title("pre-training, kNN within the held-out set, %")
    for name, found in result["linear"].items():
        points = [(line["epoch"], 100 * line["top1"]) for line in found["curve"] if "top1" in line]
        axes[2].plot(*zip(*points), marker=".", label=name)
    axes[2].set_title("linear probe, top-1 %")
    for name, found in result["detection"].items():
        points = [(line["step"], line["loss"]) for line in found["curve"] if "loss" in line]
        axes[3].plot(*zip(*points), label=f"from {name}")
    axes[3].set_title("Mask R-CNN, loss")
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("transfer"))
    parser.add_argument("--iterations", type=int, default=20, help="of each fine-tuning")
    parser.add_argument("--result", type=Path, help="a second place for the JSON")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there already; give another --out, or remove it")
    arguments.out.mkdir(parents=True)
    result = measure(arguments.out, arguments.iterations)
    text = json.dumps(result, indent=1) + "\n"
    (arguments.out / "report.json").write_text(text)
    (arguments.out / "report.md").write_text(page(result))
    draw(result, arguments.out / "report.png")
    if arguments.result:
        shutil.copy(arguments.out / "report.json", arguments.result)
    print(page(result))


if __name__ == "__main__":
    main()
