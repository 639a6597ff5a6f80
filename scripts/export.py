"""A trained backbone for detection and segmentation: written for another library, and read back.

    python scripts/export.py --run RUN_DIR --format torchvision --out r50.pth      # also loads into timm and mmdet
    python scripts/export.py --run RUN_DIR --format timm --out r50.pth
    python scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl
    python scripts/export.py --run RUN_DIR --format torchvision --out r50.pth --norm-batches 200 --data SHARDS
    python scripts/export.py --run RUN_DIR --format hub --license cc-by-4.0 --out r50             # a folder to share

torchvision: `model.fc = torch.nn.Identity(); model.load_state_dict(torch.load("r50.pth"))`. timm, also for its own networks:
`timm.create_model(NAME, num_classes=0).load_state_dict(torch.load("r50.pth"))`.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from inscon import guard
from inscon.transfer import export, hub
from pipelines.evaluation import LabelledViews


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """A file for another library."""

    run: Path  # A run folder, whose newest checkpoint is taken, or a checkpoint file.
    format: Literal["torchvision", "timm", "mmdet", "detectron2", "hub"] = "torchvision"
    """Whose names and file format; a network of timm's is written for timm alone. hub: a folder with a model card."""
    out: Path  # The file: .pkl for detectron2, .pth for the others; of hub the folder, new or empty.
    license: str | None = None  # Of the weights, for hub's model card: a short name that the Hugging Face hub knows.
    norm_batches: int = 0
    """Estimate BatchNorm's statistics anew over so many batches of training crops of --data; 0: those of the run."""
    data: Path | None = None  # Packed set for --norm-batches.
    batch_size: int = 64  # Of --norm-batches.


def main(config: ExportConfig) -> dict:
    guard.check_ranges(config, norm_batches=0, batch_size=1)
    if config.format == "hub":
        hub.check(config.out, config.license)
        write = functools.partial(hub.export, config.run, config.out, config.license)
    else:
        export.check_name(config.format, config.out)
        guard.check_output_file(config.out)
        write = functools.partial(export.export, config.run, config.format, config.out)
    facts = write(estimate_statistics(config) if config.norm_batches else {}, config.norm_batches)
    print(
        f"{config.out}: the {facts['config']['model']['backbone']} of step {facts['step']} of "
        f"{facts['config']['run']['run_dir']} for {config.format}, read back and equal."
    )
    if facts["untrained"]:
        print(f"Never trained, for no map depends on them: {', '.join(facts['untrained'])}.")
    return facts


def estimate_statistics(config: ExportConfig) -> dict[str, torch.Tensor]:
    """BatchNorm's buffers over `norm_batches` batches of the crops the run was trained on, without their colors."""
    if config.data is None:
        raise ValueError("norm_batches needs pictures: set --data SHARDS, or --norm-batches 0")
    backbone, facts = export.any_backbone(config.run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = facts["config"]["views"]
    views = LabelledViews(
        config.data, seen["view_size"], config.batch_size, device=device, scale=tuple(seen["scale"]), labels_needed=False
    )  # fmt: skip
    backbone = backbone.to(device=device, memory_format=torch.channels_last)
    with views.random_crops(0, config.norm_batches) as batches:
        return export.estimate_statistics(backbone, batches)


if __name__ == "__main__":
    guard.run_script("export.py", lambda: main(tyro.cli(ExportConfig, description=__doc__)))
