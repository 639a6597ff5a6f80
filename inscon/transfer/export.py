"""A trained backbone as a file for torchvision, timm, mmdet or detectron2: written, read back and compared.

torchvision, timm and mmdet name a ResNet's tensors alike, so their file is the same plain dictionary; detectron2's is a pickle of
NumPy arrays. What it was made from travels in the file: an attribute `inscon` of the dictionary (.pth), an entry (.pkl).
"""

import importlib.metadata
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, get_type_hints

import torch
import xxhash
from torch import Tensor
from torch.optim.swa_utils import update_bn

from inscon import checkpoint, guard, methods
from inscon.config import Config, from_dict
from inscon.nn.backbones import TORCHVISION, Backbone, build_backbone

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # How names of BatchNorm's buffers end.


def to_detectron2(name: str) -> str:
    """detectron2's name of a ResNet tensor of torchvision's: layer1.0.downsample.0.weight -> res2.0.shortcut.weight."""
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    stage = re.match(r"layer(\d)\.", name)
    return f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"


def check_name(form: str, out: Path) -> None:
    """ValueError unless a file for `form` may be called so: detectron2 loads nothing of a .pth, and trains from noise."""
    suffix = ".pkl" if form == "detectron2" else ".pth"
    if out.suffix != suffix:
        name = out.with_suffix(suffix).name
        raise ValueError(f"a file for {form} must end in {suffix}. Found: {out.name}; set --out {name}")


def export(run: Path, form: str, out: Path, statistics: dict | None = None, norm_batches: int = 0) -> dict:
    """Write the backbone of `run` (a checkpoint, or a run folder's newest) to `out`, which gets its name when it has been read back
    and found the same; return what travels in it. `statistics`: of `estimate_statistics` over `norm_batches`, in place of the
    checkpoint's. ValueError leaves an older file as it is."""
    out = Path(out)
    check_name(form, out)
    tensors, facts = gather(run, form, statistics, norm_batches)
    guard.remove_unfinished(out.parent, f"{out.name}.*")
    with guard.whole_file(out) as file:
        _write(file, tensors, facts)
        file.flush()
        read(Path(file.name))
    return facts


def gather(run: Path, form: str, statistics: dict | None, norm_batches: int) -> tuple[dict[str, Tensor], dict]:
    """The tensors that `export` writes, and what travels with them."""
    tensors, contents, file = read_run(run)
    backbone = contents["config"]["model"]["backbone"]
    if form not in ("timm", "hub") and backbone not in TORCHVISION:
        raise ValueError(f"{form} has no {backbone}, which is a network of timm's; set --format timm")
    tensors |= statistics or {}
    facts = {name: contents[name] for name in ("step", "config", "data")}
    facts |= {"format": form, "checkpoint": file.name, "inscon": importlib.metadata.version("inscon")}
    facts |= {"norm_batches": norm_batches, "digest": digest(tensors)}
    return tensors, facts | {"untrained": untrained_parameters(contents["config"])}


def untrained_parameters(config: dict) -> list[str]:
    """Names of parameters that no training of maps reaches (a norm before the classifier, say), by a backward pass on noise."""
    backbone, side = build_backbone(config["model"]["backbone"]), config["views"]["view_size"]
    sum(made.square().sum() for made in backbone(torch.randn(2, 3, side, side)).values()).backward()
    return [name for name, parameter in backbone.network.named_parameters() if parameter.grad is None]


def estimate_statistics(backbone: Backbone, batches: Iterable) -> dict[str, Tensor]:
    """BatchNorm's buffers by their names in `backbone.network`, estimated anew over `batches` of pixels [B 3 S S] ("precise BN"):
    means of the batches' means and unbiased variances. ValueError where there is no batch, or no BatchNorm."""
    update_bn(batches, backbone)
    held = backbone.network.state_dict()
    statistics = {name: value.cpu().clone() for name, value in held.items() if name.endswith(STATISTICS)}
    if not statistics or not all(n for name, n in statistics.items() if name.endswith(STATISTICS[2])):
        remedy = "set --norm-batches 1 or more or leave it out"
        raise ValueError(f"BatchNorm statistics need at least 1 batch and a backbone with BatchNorm; {remedy}")
    return statistics


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, types, shapes and values, in the order of the names."""
    found = xxhash.xxh3_128()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def any_backbone(source: str | Path, untrained: bool = False) -> tuple[Backbone, dict]:
    """A backbone in eval mode out of a run folder, a checkpoint or an export, and {"what", "step", "config"} about it; `untrained`:
    the network as that run began."""
    file = Path(source)
    if file.is_dir() or file.suffix == ".pt":
        tensors, held, file = read_run(file)
    else:
        tensors, held = read(file)
    facts = {"what": str(file), "step": held["step"], "config": held["config"]}
    if untrained:
        config = rebuild(facts["config"]).replaced(norm="none", split_size=None)
        torch.manual_seed(config.run.seed)
        backbone = config.method.build(config, config.optim.batch_size).backbone.eval()
        return backbone, facts | {"what": "the network before training", "step": 0}
    backbone = build_backbone(facts["config"]["model"]["backbone"])
    backbone.network.load_state_dict(tensors)
    return backbone.eval(), facts


def rebuild(values: dict) -> Config:
    """The configuration that `Config.to_dict` made these values of."""
    method = dict(values["method"])
    kinds = get_type_hints(Config) | {"method": methods.settings_of(method.pop("name"))}
    return Config(**{group: from_dict(kinds[group], held) for group, held in (values | {"method": method}).items()})


def read_run(path: Path) -> tuple[dict[str, Tensor], dict, Path]:
    """Of a checkpoint, `path` or the newest of a run folder: the tensors of the backbone, what a method trains for others and never
    its slow copy, by its library's names; all that it holds; its file."""
    path = Path(path)
    file = (checkpoint.latest(path) or path / "checkpoints/step-*.pt") if path.is_dir() else path
    contents = checkpoint.load(file)
    if "config" not in contents:
        made_by = "is a detector of scripts/finetune_detection.py, or a probe of scripts/linear.py"
        raise ValueError(f"{file} {made_by}; give the run folder of a scripts/train.py")
    prefix = contents["backbone"] + "."
    tensors = {
        name.removeprefix(prefix): value.cpu().contiguous()
        for name, value in contents["model"].items()
        if name.startswith(prefix) and torch.is_tensor(value)
    }
    return tensors, contents, file


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of an export, by torchvision's or timm's names, and what travels with them; no code in it is run. Raises
    ValueError for a file that is none, isn't finite, or isn't as it was written."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}; give a run folder, a checkpoint, or a file of scripts/export.py")
    try:
        tensors, facts = _read(path)
    except Exception as error:  # of torch and pickle alike, for whatever the file may be
        found = f"is no export of this program ({type(error).__name__})"
        raise ValueError(f"{path} {found}; write one with scripts/export.py") from error
    if broken := checkpoint.not_finite(tensors):
        raise ValueError(f"{path} is of a run that had diverged: {broken} is not finite; export an earlier step")
    if digest(tensors) != facts.get("digest"):
        raise ValueError(f"{path} is not as it was written, its checksum differs; export it again")
    return tensors, facts


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    if ".pkl" not in Path(path).suffixes:
        held = torch.load(path, map_location="cpu", weights_only=True)
        return dict(held), json.loads(held.inscon)
    with open(path, "rb") as file:
        held = _NumpyOnly(file).load()
    with torch.device("meta"):
        names = build_backbone(held["inscon"]["config"]["model"]["backbone"]).network.state_dict()
    return {name: torch.from_numpy(held["model"][to_detectron2(name)].copy()) for name in names}, held["inscon"]


def _write(file: BinaryIO, tensors: dict[str, Tensor], facts: dict) -> None:
    if facts["format"] == "detectron2":
        file.write(for_detectron2(tensors, facts))
    else:
        held = OrderedDict(tensors)
        held.inscon = json.dumps(facts)
        torch.save(held, file)


def for_detectron2(tensors: dict[str, Tensor], facts: dict) -> bytes:
    """A pickle with detectron2's names."""
    model = {to_detectron2(name): value.numpy() for name, value in tensors.items()}
    held = {"model": model, "__author__": "InsCon", "matching_heuristics": True, "inscon": facts}
    # Protocol 3 names globals in plain text; NumPy 2 moved this one, and the old name is there in both.
    return pickle.dumps(held, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


class _NumpyOnly(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers; anything else a pickle may ask to run is refused."""

    def find_class(self, module: str, name: str):
        if f"{module}.{name}" not in ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct"):
            raise pickle.UnpicklingError(f"{module}.{name} is asked for")
        return super().find_class(module, name)
