"""The backbone a detector starts from. Noise only for who asks for it: a file must match tensor for tensor, or is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from inscon import checkpoint
from inscon.nn.backbones import build_backbone
from inscon.transfer.export import ExportError, digest, read

RANDOM = "random"
COUNTER = "num_batches_tracked"
"""A BatchNorm's count of batches: read by nobody here, and missing in torchvision's oldest files."""
HOW = "write the backbone with scripts/export.py --format torchvision (or timm) and give that file, or a torchvision ResNet's"


@dataclass(frozen=True)
class Start:
    """What a detector's backbone starts as."""

    backbone: str
    tensors: dict[str, Tensor] | None
    """By the library's names; None: noise."""
    what: str
    """In words, for people."""

    @property
    def digest(self) -> str:
        return RANDOM if self.tensors is None else digest(self.tensors)


def read_start(source: str, backbone: str | None = None) -> Start:
    """`source`: an export of ours, a torchvision state dict of a ResNet, or the word "random".

    `backbone`: what it must be; for what is no export of ours, None is resnet50.

    Raises ExportError, in one sentence, for anything else: a detectron2 file, a checkpoint, names or shapes that don't match.
    """
    if source == RANDOM:
        return Start(backbone or "resnet50", None, "noise, as --weights random asks")
    path = Path(source)
    path = checkpoint.latest(path) or path if path.is_dir() else path
    if path.suffix == ".pkl":
        raise ExportError(f"{path.name} is written for detectron2, whose names torchvision doesn't know; {HOW}")
    if not path.is_file():
        raise ExportError(f"there is no file {path}; {HOW}, or set --weights random to start from noise")
    tensors, facts = _read(path)
    name = facts["config"]["model"]["backbone"] if facts else backbone or "resnet50"
    if backbone not in (None, name):
        raise ExportError(f"{path} holds a {name} and --backbone asks for a {backbone}; leave --backbone out")
    what = f"the backbone of step {facts['step']}" if facts else f"a {name} that is no export of ours"
    return Start(name, _matching(path, name, tensors), f"{path.name}, {what}")


def start_from(network: nn.Module, start: Start) -> tuple[int, int]:
    """Put the tensors into a detector's network (`backbone.body.network`), strictly; how many, of how many."""
    total = len(network.state_dict())
    if start.tensors is None:
        return 0, total
    network.load_state_dict(start.tensors, strict=True)
    return len(start.tensors), total


def _read(path: Path) -> tuple[dict[str, Tensor], dict | None]:
    """The tensors in a file, and what travels with them in an export of ours."""
    if path.suffix == ".safetensors":
        return read(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for what is no file of its own
        raise ExportError(f"{path} can't be read as weights ({type(error).__name__}); {HOW}") from None
    if hasattr(held, "inscon"):
        return read(path)
    held = held if isinstance(held, Mapping) else {}
    if "design" in held:
        raise ExportError(
            f"{path} is a detector ({held['design']['arch']}, iteration {held['step']}), no backbone; set --weights to what it "
            f"began with ({held['start']['what']}), and --out to its folder to go on with it or to judge it (--eval-only)"
        )
    if "version" in held:
        raise ExportError(f"{path} is a checkpoint of a run, with heads and queues; {HOW}")
    return {n: v for n, v in held.items() if torch.is_tensor(v) and n not in ("fc.weight", "fc.bias")}, None


def _matching(path: Path, backbone: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, all that the network has. ExportError where one is missing, has another shape, is too much or not finite."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in build_backbone(backbone).network.state_dict().items()}
    unfit = [name for name, shape in expected.items() if name not in tensors or tensors[name].shape != shape]
    wrong = sorted(set(tensors) - set(expected)) or [name for name in unfit if not name.endswith(COUNTER)]
    if wrong:
        raise ExportError(
            f"{path} matches {len(expected) - len(unfit)} of the {len(expected)} tensors of a {backbone}, by name and shape, and "
            f"differs at {wrong[0]}; set --backbone to what it holds, or {HOW}"
        )
    broken = checkpoint.not_finite(tensors)
    if broken:
        raise ExportError(f"{path} holds numbers that are not finite, the first in {broken}; export an earlier step")
    return tensors | {name: torch.tensor(0) for name in unfit}
