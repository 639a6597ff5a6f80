"""The trunk a detector starts from. Noise only for who asks for it: a file must match tensor for tensor, or is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model

from inscon import checkpoint
from inscon.transfer.detection.models import TRUNKS
from inscon.transfer.export import ExportError, digest, load_for_torchvision

RANDOM = "random"
COUNTER = "num_batches_tracked"
"""A BatchNorm's count of batches: read by nobody here, and missing in torchvision's oldest files."""


@dataclass(frozen=True)
class Start:
    """What a detector's trunk starts as."""

    trunk: str
    """The ResNet's name."""
    tensors: dict[str, Tensor] | None
    """By torchvision's names; None: noise."""
    what: str
    """In words, for people."""

    @property
    def digest(self) -> str:
        return RANDOM if self.tensors is None else digest(self.tensors)


def read_start(source: str, trunk: str | None = None) -> Start:
    """`source`: an export of ours, a torchvision state dict of a ResNet, or the word "random". `trunk`: must be this ResNet.

    Raises ExportError, in one sentence, for anything else: a detectron2 file, a checkpoint, names or shapes that don't match.
    """
    if source == RANDOM:
        return Start(trunk or "resnet50", None, "noise, as --weights random asks")
    path = Path(source)
    if path.is_dir():
        newest = checkpoint.latest(path)
        if newest is None:
            raise ExportError(f"{path} is a folder; {_HOW}")
        path = newest
    if path.suffix in (".pkl", ".safetensors"):
        return _of_ours(path, trunk)
    if not path.is_file():
        raise ExportError(f"there is no file {path}; {_HOW}, or set --weights random to start from noise")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for what is no file of its own
        raise ExportError(f"{path} can't be read as weights ({type(error).__name__}); {_HOW}") from None
    if hasattr(held, "inscon"):
        return _of_ours(path, trunk)
    if isinstance(held, Mapping) and {"design", "start", "step"} <= set(held):
        raise ExportError(
            f"{path} is a detector ({held['design']['arch']}, iteration {held['step']}), not a trunk; set --weights to what it "
            f"began with ({held['start']['what']}), and --out to its folder to go on with it or to judge it (--eval-only)"
        )
    if isinstance(held, Mapping) and {"version", "step", "model"} <= set(held):
        raise ExportError(f"{path} is a checkpoint of a run, with heads and queues; {_HOW}")
    tensors = {n: v for n, v in held.items() if torch.is_tensor(v)} if isinstance(held, Mapping) else {}
    of_detector = [name for name in _names(held) if name.startswith(_DETECTORS)]
    if of_detector:
        raise ExportError(
            f"{path} is a whole detector (with {of_detector[0]}), not a trunk; {_HOW}, or give a torchvision resnet50"
        )
    return _of_others(path, tensors, trunk)


_DETECTORS = ("rpn.", "roi_heads.", "proposal_generator.", "rpn_head.", "roi_head.")
"""How names begin that torchvision's, detectron2's and mmdet's detectors have beside a trunk's."""
_HOW = "write the trunk with scripts/export.py --format torchvision and give that file"


def _names(held: object) -> list[str]:
    """Of the tensors in a file, also where they are one level down."""
    if not isinstance(held, Mapping):
        return []
    inner = [held[key] for key in ("model", "state_dict") if isinstance(held.get(key), Mapping)]
    return [str(name) for names in (held, *inner) for name in names]


def _of_ours(path: Path, trunk: str | None) -> Start:
    tensors, facts = load_for_torchvision(path)
    arch = facts["config"]["model"]["arch"]
    _check_trunk(path, arch, trunk)
    _check_all(path, arch, tensors)
    return Start(arch, tensors, f"{path.name}, the query encoder's trunk at step {facts['step']}")


def _of_others(path: Path, tensors: dict[str, Tensor], trunk: str | None) -> Start:
    tensors = {name: value for name, value in tensors.items() if name not in ("fc.weight", "fc.bias")}
    arch = max(TRUNKS, key=lambda name: (_matching(tensors, name), name == trunk or name == "resnet50"))
    if not _matching(tensors, arch):
        arch = trunk or "resnet50"
    counters = {name: value for name, value in _expected(arch).items() if name.endswith(COUNTER)}
    if _matching(tensors, arch) == len(_expected(arch)) - len(counters):
        tensors = counters | tensors
    _check_all(path, arch, tensors)
    _check_trunk(path, arch, trunk)
    return Start(arch, tensors, f"{path.name}, a {arch} that is no export of ours")


def start_from(model_trunk: nn.Module, start: Start) -> tuple[int, int]:
    """Put the tensors into a detector's trunk (`models.trunk_of`), strictly; how many, of how many."""
    total = len(model_trunk.state_dict())
    if start.tensors is None:
        return 0, total
    model_trunk.load_state_dict(start.tensors, strict=True)
    equal = sum(torch.equal(value.cpu(), start.tensors[name]) for name, value in model_trunk.state_dict().items())
    assert equal == total, "strict loading put in other values"
    return equal, total


def _expected(arch: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        network = get_model(arch, weights=None)
    return {
        name: torch.zeros((), dtype=torch.int64) if name.endswith(COUNTER) else value
        for name, value in network.state_dict().items()
        if not name.startswith("fc.")
    }


def _matching(tensors: Mapping[str, Tensor], arch: str) -> int:
    return sum(name in tensors and tensors[name].shape == value.shape for name, value in _expected(arch).items())


def _check_all(path: Path, arch: str, tensors: Mapping[str, Tensor]) -> None:
    expected = _expected(arch)
    matching, unknown = _matching(tensors, arch), sorted(set(tensors) - set(expected))
    if matching < len(expected) or unknown:
        wrong = unknown or sorted(n for n, v in expected.items() if n not in tensors or tensors[n].shape != v.shape)
        raise ExportError(
            f"{path} matches {matching} of the {len(expected)} tensors of a {arch}, by name and shape, and differs at {wrong[0]}; "
            f"{_HOW}, or give a torchvision {arch}"
        )
    bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if bad:
        raise ExportError(f"{path} holds numbers that are not finite, the first in {bad[0]}; export an earlier step")


def _check_trunk(path: Path, arch: str, trunk: str | None) -> None:
    if trunk is not None and trunk != arch:
        raise ExportError(f"{path} holds a {arch} and --trunk asks for a {trunk}; leave --trunk out")
