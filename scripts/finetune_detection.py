"""A trained trunk fine-tuned for detection and segmentation with torchvision and pycocotools, without detectron2.

    python scripts/export.py --run RUN_DIR --format torchvision --out r50.pth
    python scripts/finetune_detection.py --arch maskrcnn-fpn --weights r50.pth --out fpn \
        --train-json instances_train2017.json --train-images train2017 \
        --val-json instances_val2017.json --val-images val2017
    python scripts/finetune_detection.py --eval-only --out fpn --val-json instances_val2017.json --val-images val2017

The same command goes on after a stop; Ctrl-C and SIGTERM let it finish the iteration and write a checkpoint. --out receives
checkpoints, metrics.jsonl, results.json (AP and AR in percent) and samples.png. Numbers compare with each other, say with those
of --weights random or of torchvision's supervised resnet50, and not with detectron2's tables.
"""

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
from inscon.precision import Precision, check_device, choose_precision
from inscon.transfer.detection import loop
from inscon.transfer.detection.coco import CocoSet, check_same_categories, mask_tools, read_coco
from inscon.transfer.detection.evaluate import evaluate
from inscon.transfer.detection.models import Design, build, trunk_of
from inscon.transfer.detection.pictures import samples
from inscon.transfer.detection.weights import read_start, start_from


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Fine-tuning for detection."""

    val_json: Path
    """Annotations to be judged by, in COCO's format."""
    val_images: Path
    """The folder its file names start from."""
    out: Path
    """Receives everything; a run that stopped goes on from here."""
    eval_only: bool = False
    """Judge the detector in --out; nothing is trained."""
    arch: Literal["maskrcnn-fpn", "fasterrcnn-c4", "maskrcnn-c4"] | None = None
    """The detector."""
    train_json: Path | None = None
    """Annotations to learn from."""
    train_images: Path | None = None
    """The folder its file names start from."""
    weights: str | None = None
    """A file of scripts/export.py --format torchvision, a torchvision state dict, or the word random: from noise."""
    trunk: Literal["resnet18", "resnet34", "resnet50", "resnet101"] | None = None
    """The ResNet. None: what the file holds; with --weights random, resnet50."""
    iterations: int = 90_000
    """The learning rate falls to a tenth at 2/3 and at 8/9 of them. 90000 on COCO is the 1x schedule."""
    batch_size: int = 16
    """Images per iteration."""
    base_lr: float = 0.02
    """For 16 images; what is used is this times batch_size / 16."""
    warmup: int = 1000
    """Iterations of linear warm-up, at most a tenth of all."""
    min_size: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Short sides in training, px; one is drawn for every image."""
    test_size: int = 800
    """Short side in evaluation, px; --eval-only judges with that of the run."""
    max_size: int = 1333
    """Longest side, px."""
    rois: int = 512
    """Boxes an image to learn from is sampled for; fewer make trials on a CPU bearable."""
    proposals: int = 1000
    """Of an image that is judged; fewer as well."""
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
    samples: int = 4
    """Pictures in samples.png; 0: no such file."""
    seed: int = 0
    """Of the heads, the order, flips, sizes and sampled boxes."""


LEAST = {"checkpoint_every": 1, "log_every": 1, "workers": 0, "samples": 0, "stall_timeout": 1}


def main(config: DetectionConfig) -> dict | None:
    for name, least in LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}. Found: {value}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    precision = choose_precision(config.precision, device)
    mask_tools()
    if config.eval_only:
        model, design, facts = loop.load_detector(config.out)
        if config.arch not in (None, design.arch):
            raise ValueError(f"{config.out} holds a {design.arch}. Found: --arch {config.arch}; leave it out")
        guard.check_output_folder(config.out)
        val = read_coco(config.val_json, config.val_images, design.has_masks)
        check_same_categories(design.categories, val.categories, str(config.out), str(config.val_json))
        model.to(device=device, memory_format=torch.channels_last)
        return judge(config, model, design, facts, val, device, precision)
    missing = [name for name in ("arch", "train_json", "train_images", "weights") if getattr(config, name) is None]
    if missing:
        flags = " and ".join("--" + name.replace("_", "-") for name in missing)
        noise = "; --weights takes a file of scripts/export.py, or the word random to start from noise"
        raise ValueError(f"{flags} must be set to train{noise if 'weights' in missing else ''}")
    with guard.only_process(config.out, "--out"):
        guard.remove_unfinished(config.out)
        return fine_tune(config, device, precision)


def fine_tune(config: DetectionConfig, device: torch.device, precision: Precision) -> dict | None:
    """The results; None after a stop."""
    schedule = loop.Schedule(
        iterations=config.iterations, batch_size=config.batch_size, base_lr=config.base_lr, warmup=config.warmup,
        short_sides=config.min_size, seed=config.seed,
    )  # fmt: skip
    masks = config.arch.startswith("maskrcnn")
    train = read_coco(config.train_json, config.train_images, masks)
    val = read_coco(config.val_json, config.val_images, masks)
    check_same_categories(train.categories, val.categories, str(config.train_json), str(config.val_json))
    start = read_start(config.weights, config.trunk)
    design = Design(
        arch=config.arch, trunk=start.trunk, categories=train.categories, test_side=config.test_size,
        max_side=config.max_size, rois=config.rois, proposals=config.proposals,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = build(design)
    loaded, total = start_from(trunk_of(model), start)
    about = {"what": start.what, "digest": start.digest}
    run = loop.FineTuning(model, design, schedule, about, train, config.out, device, precision)
    rescaled = "" if schedule.lr == schedule.base_lr else f" ({schedule.base_lr:g} is for 16 images)"
    say(f"trunk: {loaded} of {total} tensors, {start.what}")
    say(
        f"{design.arch} on {len(train.trainable())} of {len(train)} images of {config.train_json.name}, "
        f"{len(design.categories)} categories, {schedule.iterations} iterations of {schedule.batch_size}, lr {schedule.lr:g}"
        f"{rescaled}, {precision.name}, from iteration {run.iteration}"
    )
    if train.left_out:
        say(train.left_out)
    with Progress(transient=True) as progress:
        bar = progress.add_task("training", total=schedule.iterations, completed=run.iteration)
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
        return None
    return judge(config, model, design, {"start": about, "step": run.iteration}, val, device, precision)


def judge(
    config: DetectionConfig,
    model,
    design: Design,
    facts: dict,
    val: CocoSet,
    device: torch.device,
    precision: Precision,
) -> dict:
    """Write results.json and samples.png."""
    kinds = ("bbox", "segm") if design.has_masks else ("bbox",)
    try:
        with Progress(transient=True) as progress:
            bar = progress.add_task("judging", total=len(val))
            found = evaluate(
                model, val, kinds, device, precision.autocast_dtype, workers(config, device), lambda: progress.advance(bar),
                config.stall_timeout,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped by Ctrl-C while judging; the checkpoint stays, run again to judge it"
        ) from None
    results = {
        "arch": design.arch, "trunk": design.trunk, "start": facts["start"], "iteration": facts["step"],
        "val": {"json": str(config.val_json), "images": len(val), "short_side": design.test_side}, **found,
    }  # fmt: skip
    with guard.whole_file(config.out / "results.json") as file:
        file.write((json.dumps(results, indent=2) + "\n").encode())
    if config.samples:
        samples(model, val, config.out / "samples.png", device, design.has_masks, config.samples)
    for kind, numbers in found.items():
        figures = "  ".join(
            f"{name} {'-' if numbers[name] is None else format(numbers[name], '.1f')}" for name in numbers
        )
        say(f"{kind}  {figures}")
    return results


def workers(config: DetectionConfig, device: torch.device) -> int:
    if config.workers is not None:
        return config.workers
    return min(8, os.cpu_count() or 1) if device.type == "cuda" else 0


def say(text: str) -> None:
    Console().print(text, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    guard.run_script("finetune_detection.py", lambda: main(tyro.cli(DetectionConfig, description=__doc__)))
