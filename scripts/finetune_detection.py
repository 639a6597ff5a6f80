"""A trained backbone fine-tuned for detection and segmentation with torchvision and pycocotools, without detectron2.

    python scripts/finetune_detection.py --arch maskrcnn-fpn --weights runs/r50 --out fpn \
        --train-json instances_train2017.json --train-images train2017 \
        --val-json instances_val2017.json --val-images val2017
    python scripts/finetune_detection.py --eval-only --out fpn --val-json instances_val2017.json --val-images val2017

The same command goes on after a stop; Ctrl-C and SIGTERM let it finish the iteration and write a checkpoint. --out receives
checkpoints, metrics.jsonl and results.json (AP and AR in percent). Numbers compare with each other, say with those of --weights
random or of torchvision's supervised resnet50, and not with detectron2's tables.
"""

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from inscon import guard
from inscon.precision import choose_precision

try:
    from inscon.transfer.detection import loop
    from inscon.transfer.detection.coco import read_coco
    from inscon.transfer.detection.models import Design, Protocol, build, read_start
except ModuleNotFoundError as error:
    raise SystemExit(f"finetune_detection.py needs the package {error.name}: pip install 'inscon[transfer]'") from None


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(Protocol):
    """Fine-tuning for detection."""

    val_json: Path  # Annotations to be judged by, in COCO's format.
    val_images: Path  # The folder its file names start from.
    out: Path  # Receives everything; a run that stopped goes on from here.
    eval_only: bool = False  # Judge the detector in --out; nothing is trained.
    arch: Literal["maskrcnn-fpn", "fasterrcnn-fpn"] | None = None  # The detector; fasterrcnn learns boxes alone.
    train_json: Path | None = None  # Annotations to learn from.
    train_images: Path | None = None  # The folder its file names start from.
    weights: str | None = None
    """A run, a file of scripts/export.py, or a word: torchvision, its supervised weights; random, noise."""
    backbone: str | None = None  # The network. None: what --weights holds; for a word, resnet50.
    checkpoint_every: int = 1000  # Iterations.
    log_every: int = 20  # Iterations between lines of metrics.jsonl.
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"  # Of the convolutions; all else is float32.
    workers: int = 4  # Threads that read pictures ahead.

    def __post_init__(self):
        super().__post_init__()
        guard.check_ranges(self, checkpoint_every=1, log_every=1, workers=1)


def main(config: DetectionConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.eval_only:
        guard.check_output_folder(config.out)
        return judge(config, device)
    if None in (config.arch, config.train_json, config.train_images, config.weights):
        raise ValueError("training needs --arch, --train-json, --train-images and --weights (random starts from noise)")
    with guard.only_process(config.out, "--out"):
        guard.remove_unfinished(config.out)
        if fine_tune(config, device):
            judge(config, device)


def fine_tune(config: DetectionConfig, device: torch.device) -> bool:
    """Whether it came to its end."""
    masks, precision = config.arch.startswith("maskrcnn"), choose_precision(config.precision, device)
    train = read_coco(config.train_json, config.train_images, masks).learnable()
    read_coco(config.val_json, config.val_images, masks, train.categories)  # before the work, which it is to judge
    torch.manual_seed(config.seed)
    backbone, name, weights = read_start(config.weights, config.backbone)
    settings = {field.name: getattr(config, field.name) for field in fields(Protocol)}
    design = Design(
        arch=config.arch, backbone=name, weights=weights, categories=train.categories, train_data=train.fingerprint, **settings
    )  # fmt: skip
    run = loop.FineTuning(build(design, backbone, device), design, train, config.out, precision)
    objects = sum(len(train.objects(image)) for image in train.images)
    print(
        f"{design.arch} from {weights}\n{objects} objects of {len(design.categories)} categories in {len(train.images)} images, "
        f"{design.iterations} iterations of {design.batch_size}, {precision.name}, from iteration {run.iteration}"
    )
    try:
        stopped_by = run.train(config.checkpoint_every, config.log_every, config.workers)
    except FloatingPointError as error:
        raise ValueError(f"{error}; set a smaller --base-lr than {config.base_lr:g} and another --out") from None
    if stopped_by:
        guard.ignore_stops()
        print(f"Stopped by {stopped_by}; iteration {run.iteration} is saved in {config.out}. Run again to go on.")
    return stopped_by is None


def judge(config: DetectionConfig, device: torch.device) -> None:
    """Write results.json."""
    model, design, iteration = loop.load_detector(config.out, device)
    val = read_coco(config.val_json, config.val_images, design.has_masks, design.categories)
    kinds, dtype = ("bbox", "segm")[: 1 + design.has_masks], choose_precision(config.precision, device).autocast_dtype
    found = loop.evaluate(model, val, kinds, dtype, config.workers)
    results = {
        "arch": design.arch, "backbone": design.backbone, "start": design.weights, "iteration": iteration,
        "val": {"json": str(config.val_json), "images": len(val.images), "short_side": design.min_size[-1]}, **found,
    }  # fmt: skip
    with guard.whole_file(config.out / "results.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    for kind, numbers in found.items():
        print(kind, *(f" {name} {'-' if value is None else format(value, '.1f')}" for name, value in numbers.items()))


if __name__ == "__main__":
    guard.run_script("finetune_detection.py", lambda: main(tyro.cli(DetectionConfig, description=__doc__)))
