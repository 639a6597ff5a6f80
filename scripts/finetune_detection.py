"""A trained backbone fine-tuned for detection and segmentation with torchvision and pycocotools, without detectron2.

    python scripts/export.py --run RUN_DIR --format torchvision --out r50.pth
    python scripts/finetune_detection.py --arch maskrcnn-fpn --weights r50.pth --out fpn \
        --train-json instances_train2017.json --train-images train2017 \
        --val-json instances_val2017.json --val-images val2017
    python scripts/finetune_detection.py --eval-only --out fpn --val-json instances_val2017.json --val-images val2017

The same command goes on after a stop; Ctrl-C and SIGTERM let it finish the iteration and write a checkpoint. --out receives
checkpoints, metrics.jsonl and results.json (AP and AR in percent). Numbers compare with each other, say with those of --weights
random or of torchvision's supervised resnet50, and not with detectron2's tables.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from rich.console import Console
from rich.progress import Progress

from inscon import guard
from inscon.precision import check_device, choose_precision
from inscon.transfer.detection import loop
from inscon.transfer.detection.coco import check_same_categories, mask_tools, read_coco
from inscon.transfer.detection.evaluate import evaluate
from inscon.transfer.detection.models import Design, Protocol, build
from inscon.transfer.detection.weights import read_start, start_from


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(Protocol):
    """Fine-tuning for detection."""

    val_json: Path
    """Annotations to be judged by, in COCO's format."""
    val_images: Path
    """The folder its file names start from."""
    out: Path
    """Receives everything; a run that stopped goes on from here."""
    eval_only: bool = False
    """Judge the detector in --out; nothing is trained."""
    arch: Literal["maskrcnn-fpn", "fasterrcnn-fpn"] | None = None
    """The detector; fasterrcnn learns boxes alone."""
    train_json: Path | None = None
    """Annotations to learn from."""
    train_images: Path | None = None
    """The folder its file names start from."""
    weights: str | None = None
    """A file of scripts/export.py, a torchvision state dict, or the word random: from noise."""
    backbone: str | None = None
    """The network. None: what the file holds; with --weights random, resnet50."""
    checkpoint_every: int = 1000
    """Iterations."""
    log_every: int = 20
    """Iterations between lines of metrics.jsonl."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of the convolutions; boxes, losses and weights are float32."""
    workers: int | None = None
    """Processes that read pictures. None: the cores, at most 8; none without a GPU."""
    stall_timeout: float = 600.0
    """Seconds without a batch after which the workers are given up."""


LEAST = {"checkpoint_every": 1, "log_every": 1, "workers": 0, "stall_timeout": 1}


def main(config: DetectionConfig) -> None:
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}. Found: {value}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    mask_tools()
    if config.eval_only:
        return judge_only(config, device)
    missing = [name for name in ("arch", "train_json", "train_images", "weights") if getattr(config, name) is None]
    if missing:
        flags = " and ".join("--" + name.replace("_", "-") for name in missing)
        noise = "; --weights takes a file of scripts/export.py, or the word random to start from noise"
        raise ValueError(f"{flags} must be set to train{noise if 'weights' in missing else ''}")
    with guard.only_process(config.out, "--out"):
        guard.remove_unfinished(config.out)
        fine_tune(config, device)


def judge_only(config: DetectionConfig, device: torch.device) -> None:
    model, design, facts = loop.load_detector(config.out)
    if config.arch not in (None, design.arch):
        raise ValueError(f"{config.out} holds a {design.arch}. Found: --arch {config.arch}; leave it out")
    guard.check_output_folder(config.out)
    val = read_coco(config.val_json, config.val_images, design.has_masks)
    check_same_categories(design.categories, val.categories, str(config.out), str(config.val_json))
    judge(config, model.to(device=device, memory_format=torch.channels_last), design, facts, val, device)


def fine_tune(config: DetectionConfig, device: torch.device) -> None:
    precision, masks = choose_precision(config.precision, device), config.arch.startswith("maskrcnn")
    train = read_coco(config.train_json, config.train_images, masks)
    val = read_coco(config.val_json, config.val_images, masks)
    check_same_categories(train.categories, val.categories, str(config.train_json), str(config.val_json))
    start = read_start(config.weights, config.backbone)
    protocol = {field.name: getattr(config, field.name) for field in dataclasses.fields(Protocol)}
    design = Design(arch=config.arch, backbone=start.backbone, categories=train.categories, **protocol)
    torch.manual_seed(config.seed)
    model = build(design)
    loaded, total = start_from(model.backbone.body.network, start)
    about = {"what": start.what, "digest": start.digest}
    run = loop.FineTuning(model, design, about, train, config.out, device, precision)
    lr = loop.full_lr(design)
    rescaled = "" if lr == design.base_lr else f" ({design.base_lr:g} is for 16 images)"
    say(f"backbone: {loaded} of {total} tensors, {start.what}")
    say(
        f"{design.arch} on {len(run.data)} of {len(train)} images of {config.train_json.name}, {len(design.categories)} "
        f"categories, {design.iterations} iterations of {design.batch_size}, lr {lr:g}{rescaled}, {precision.name}, from "
        f"iteration {run.iteration}"
    )
    if train.left_out:
        say(train.left_out)
    with Progress(transient=True) as progress:
        bar = progress.add_task("training", total=design.iterations, completed=run.iteration)
        stopped_by = run.train(
            config.checkpoint_every, config.log_every, workers(config, device),
            lambda done, figures: progress.update(bar, completed=done, description=f"loss {figures['loss']:.3f}"),
            stall_timeout=config.stall_timeout,
        )  # fmt: skip
    if stopped_by:
        guard.ignore_stops()
        say(
            f"Stopped by {stopped_by}; the checkpoint of iteration {run.iteration} is in {config.out}. Run again to go on."
        )
        return
    judge(config, model, design, {"start": about, "step": run.iteration}, val, device)


def judge(config: DetectionConfig, model, design: Design, facts: dict, val, device: torch.device) -> None:
    """Write results.json."""
    kinds = ("bbox", "segm") if design.has_masks else ("bbox",)
    amp_dtype = choose_precision(config.precision, device).autocast_dtype
    try:
        with Progress(transient=True) as progress:
            bar = progress.add_task("judging", total=len(val))
            found = evaluate(
                model, val, kinds, device, amp_dtype, workers(config, device), lambda: progress.advance(bar),
                config.stall_timeout,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped by Ctrl-C while judging; the checkpoint stays, run again to judge it"
        ) from None
    results = {
        "arch": design.arch, "backbone": design.backbone, "start": facts["start"], "iteration": facts["step"],
        "val": {"json": str(config.val_json), "images": len(val), "short_side": design.test_size}, **found,
    }  # fmt: skip
    with guard.whole_file(config.out / "results.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    for kind, numbers in found.items():
        say(
            "  ".join(
                [kind, *(f"{name} {'-' if value is None else format(value, '.1f')}" for name, value in numbers.items())]
            )
        )


def workers(config: DetectionConfig, device: torch.device) -> int:
    if config.workers is not None:
        return config.workers
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 0


def say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    guard.run_script("finetune_detection.py", lambda: main(tyro.cli(DetectionConfig, description=__doc__)))
