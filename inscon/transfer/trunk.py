"""A trained trunk out of a checkpoint: the query encoder's, never the key encoder's."""

from pathlib import Path

import torch

from inscon import checkpoint
from inscon.encoder import Trunk

PREFIX = "query_encoder.trunk."


def load_trunk(path: Path) -> tuple[Trunk, dict]:
    """The query encoder's trunk in eval mode and the configuration it was trained with.

    `path` is a checkpoint file or a run folder, whose newest checkpoint is taken. Raises CheckpointError.
    """
    contents, _ = load_contents(path)
    trunk = Trunk(contents["config"]["model"]["arch"])
    trunk.load_state_dict({k.removeprefix(PREFIX): v for k, v in contents["model"].items() if k.startswith(PREFIX)})
    return trunk.eval(), contents["config"]


def load_contents(path: Path) -> tuple[dict, Path]:
    """What a checkpoint holds, and its file; `path` as in `load_trunk`."""
    path = Path(path)
    file = (checkpoint.latest(path) or path / "checkpoints/step-*.pt") if path.is_dir() else path
    contents = checkpoint.load(file)
    if "config" not in contents:
        raise checkpoint.CheckpointError(
            f"{file} is a detector of scripts/finetune_detection.py, no pre-training; give the run folder of a scripts/train.py"
        )
    return contents, file


def untrained_trunk(config: dict) -> Trunk:
    """The trunk as the run with this configuration started it, in eval mode.

    The trunk is the first thing a run draws after its seed, so its initial weights are these.
    """
    torch.manual_seed(config["run"]["seed"])
    return Trunk(config["model"]["arch"]).eval()
