"""A trained backbone for detection and segmentation: written for another library, and read back.

    python scripts/export.py --run RUN_DIR --format torchvision --out r50.pth      # also loads into timm and mmdet
    python scripts/export.py --run RUN_DIR --format timm --out r50.safetensors
    python scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl
    python scripts/export.py --run RUN_DIR --format torchvision --out r50.pth --norm-batches 200 --data SHARDS
    python scripts/export.py --run RUN_DIR --check r50.pth                         # is this file that run's?

torchvision: `model.fc = torch.nn.Identity(); model.load_state_dict(torch.load("r50.pth"))`. timm, also for its own networks:
`timm.create_model(NAME, num_classes=0).load_state_dict(torch.load("r50.pth"))`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from inscon import guard
from inscon.transfer import export
from inscon.transfer.backbone import load_backbone, load_contents
from inscon.transfer.statistics import estimate
from pipelines.evaluation import Engine, LabelledViews


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A file for another library, or a look at one."""

    run: Annotated[Path, tyro.conf.arg(aliases=("--checkpoint",))]
    """A run folder, whose newest checkpoint is taken, or a checkpoint file."""
    format: Literal["torchvision", "timm", "mmdet", "detectron2"] = "torchvision"
    """Whose names and file format; a network of timm's is written for timm alone."""
    out: Path | None = None
    """The file: .pkl for detectron2, .pth for the others, .safetensors for torchvision and timm."""
    norm_batches: int = 0
    """Estimate BatchNorm's statistics anew over so many batches of training crops of --data; 0: those of the run."""
    data: Path | None = None
    """Packed set for --norm-batches."""
    pipeline: Engine = "auto"
    """Engine that reads it."""
    batch_size: int = 64
    """Of --norm-batches."""
    check: Path | None = None
    """Write nothing; compare this file with the run."""


def main(config: ExportConfig) -> dict:
    if config.check:
        contents, file = load_contents(config.run)
        facts = export.check(config.check, contents)
        print(f"{config.check} is the backbone of {file}, step {facts['step']}, for {facts['format']}.")
        return facts
    if config.out is None:
        raise ValueError("out is not set: where to, say --out r50.pth")
    export.check_name(config.format, config.out)
    guard.check_output_file(config.out)
    statistics, count = estimate_statistics(config) if config.norm_batches else (None, 0)
    facts = export.export(config.run, config.format, config.out, statistics, count)
    tensors, _ = export.read(config.out)
    print(
        f"{config.out}: {len(tensors)} tensors of the {facts['config']['model']['backbone']} for {config.format}, step "
        f"{facts['step']} of {facts['config']['run']['run_dir']}, read back and equal."
    )
    if facts["untrained"]:
        print(f"Never trained, for no map depends on them: {', '.join(facts['untrained'])}.")
    return facts


def estimate_statistics(config: ExportConfig) -> tuple[dict[str, torch.Tensor], int]:
    """BatchNorm's buffers over `norm_batches` batches of the crops the run was trained on, without their colors."""
    if config.data is None:
        raise ValueError("norm_batches needs pictures: set --data SHARDS, or --norm-batches 0")
    backbone, settings = load_backbone(config.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    views = LabelledViews(
        config.data, settings["views"]["view_size"], config.batch_size, config.pipeline, device=device,
        scale=tuple(settings["views"]["scale"]), labels_needed=False,
    )  # fmt: skip
    backbone = backbone.to(device=device, memory_format=torch.channels_last)
    with views.random_crops(0, config.norm_batches) as batches:
        return estimate(backbone, (pixels for pixels, _ in batches))


if __name__ == "__main__":
    guard.run_script("export.py", lambda: main(tyro.cli(ExportConfig, description=__doc__)))
