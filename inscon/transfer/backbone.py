"""A trained backbone out of a checkpoint: what a method trains for others, never its slow copy."""

import dataclasses
from pathlib import Path
from typing import get_type_hints

import torch
from torch import Tensor

from inscon import checkpoint, methods
from inscon.config import Config, from_dict
from inscon.nn.backbones import Backbone


def load_contents(path: Path) -> tuple[dict, Path]:
    """What a checkpoint holds, and its file: `path`, or the newest of a run folder. Raises CheckpointError."""
    path = Path(path)
    file = (checkpoint.latest(path) or path / "checkpoints/step-*.pt") if path.is_dir() else path
    contents = checkpoint.load(file)
    if "config" not in contents:
        raise checkpoint.CheckpointError(
            f"{file} is a detector of scripts/finetune_detection.py, no pre-training; give the run folder of a scripts/train.py"
        )
    return contents, file


def backbone_tensors(contents: dict) -> dict[str, Tensor]:
    """The backbone's tensors, by its library's names, out of a checkpoint's contents."""
    prefix = contents["backbone"] + "."
    return {
        name.removeprefix(prefix): value.detach().cpu().contiguous()
        for name, value in contents["model"].items()
        if name.startswith(prefix) and torch.is_tensor(value)
    }


def untrained_backbone(config: dict) -> Backbone:
    """The backbone as the run with this configuration, of `Config.to_dict`, started it; in eval mode."""
    config = rebuild(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, norm="none", split_size=None))
    torch.manual_seed(config.run.seed)
    return config.method.build(config, config.optim.batch_size).backbone.eval()


def rebuild(values: dict) -> Config:
    """The configuration that `Config.to_dict` made these values of."""
    method = dict(values["method"])
    kinds = get_type_hints(Config) | {"method": methods.settings_of(method.pop("name"))}
    return Config(**{group: from_dict(kinds[group], held) for group, held in (values | {"method": method}).items()})
