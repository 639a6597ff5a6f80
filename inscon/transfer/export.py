"""A trained backbone as a file for torchvision, timm, mmdet or detectron2: written, described, read back and compared.

torchvision, timm and mmdet name a ResNet's tensors alike, so their file is the same plain dictionary; detectron2 has names of its
own and wants a pickle of NumPy arrays. timm's networks are written for timm. What it was made from travels in the file: an
attribute `inscon` of the dictionary (.pth), the header (.safetensors), an entry (.pkl).
"""

import importlib.metadata
import io
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torchvision
import xxhash
from torch import Tensor, nn

from inscon import checkpoint, guard
from inscon.nn.backbones import TORCHVISION, Backbone, build_backbone
from inscon.transfer.backbone import backbone_tensors, load_contents, untrained_backbone

SUFFIXES = {
    "torchvision": (".pth", ".safetensors"),
    "timm": (".pth", ".safetensors"),
    "mmdet": (".pth",),
    "detectron2": (".pkl",),
}
"""Format -> how its files end. detectron2 takes a .pth for one of its own, loads none of it and trains from noise."""
CLOSE = 1e-5
"""How far features may be apart, of the largest feature, between our backbone and the library's."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""How the names of BatchNorm's buffers end."""
_NUMPY = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct")}


class ExportError(ValueError):
    """An export that cannot be written, or is not what it should be; the message says why and what to do."""


def to_detectron2(name: str) -> str:
    """detectron2's name of a ResNet tensor of torchvision's: layer1.0.downsample.0.weight -> res2.0.shortcut.weight."""
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    stage = re.match(r"layer(\d)\.", name)
    return f"res{int(stage[1]) + 1}.{name[stage.end() :]}" if stage else f"stem.{name}"


def from_detectron2(name: str) -> str:
    """The inverse of `to_detectron2`."""
    name = name.removeprefix("stem.")
    name = re.sub(r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}.", name)
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return re.sub(r"\bconv(\d)\.norm\b", r"bn\1", name)


def check_name(form: str, out: Path) -> None:
    """ExportError unless a file for `form` may be called so."""
    if form not in SUFFIXES:
        raise ExportError(f'there is no format "{form}"; set --format to one of: {", ".join(SUFFIXES)}')
    if out.suffix not in SUFFIXES[form]:
        raise ExportError(
            f"a file for {form} must end in {' or '.join(SUFFIXES[form])}, by which it is told apart. Found: {out.name}; "
            f"set --out {out.with_suffix(SUFFIXES[form][0]).name}"
        )


def check_format(form: str, backbone: str) -> None:
    """ExportError where the library has no such network."""
    if form != "timm" and backbone not in TORCHVISION:
        raise ExportError(f"{form} has no {backbone}, which is a network of timm's; set --format timm")


def export(
    run: Path, form: str, out: Path, statistics: Mapping[str, Tensor] | None = None, norm_batches: int = 0
) -> dict:
    """Write the backbone of `run` (a checkpoint, or a run folder's newest) to `out`; return what travels in it.

    `statistics`: BatchNorm buffers by name that replace the checkpoint's, estimated over `norm_batches` batches
    (`inscon.transfer.statistics`). The file gets its name when it has been read back and holds what it should. Raises
    ExportError or CheckpointError, and leaves an older file of that name as it is.
    """
    out = Path(out)
    check_name(form, out)
    contents, file = load_contents(run)
    check_format(form, contents["config"]["model"]["backbone"])
    tensors = backbone_tensors(contents) | dict(statistics or {})
    facts = {
        "format": form,
        "inscon": importlib.metadata.version("inscon"),
        "checkpoint": file.name,
        "step": contents["step"],
        "norm_batches": norm_batches,
        "untrained": untrained_parameters(contents["config"]),
        "digest": digest(tensors),
        "config": contents["config"],
    }
    guard.remove_unfinished(out.parent, f"{out.name}.*")
    with guard.whole_file(out) as file:
        file.write(_content(tensors, facts, out.suffix))
        file.flush()
        check(Path(file.name), contents, out.suffix)
    return facts


def untrained_parameters(config: dict) -> list[str]:
    """Names of parameters that no training of maps reaches (a norm before the classifier, say), by a backward pass on noise."""
    backbone, side = build_backbone(config["model"]["backbone"]), config["views"]["view_size"]
    sum(made.square().sum() for made in backbone(torch.randn(2, 3, side, side)).values()).backward()
    return [name for name, parameter in backbone.network.named_parameters() if parameter.grad is None]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, types, shapes and values, in the order of the names."""
    found = xxhash.xxh3_128()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def read(path: Path, suffix: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """The tensors of an export, by torchvision's or timm's names, and what travels with them; no code in it is run.

    `suffix`: of what it is, if its name doesn't end so yet. Raises ExportError for a file that is none, or isn't finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ExportError(f"there is no file {path}; write one with scripts/export.py")
    tensors, facts = _read(path, suffix or path.suffix)
    broken = checkpoint.not_finite(tensors)
    if broken:
        raise ExportError(f"{path} is of a run that had diverged: {broken} is not finite; export an earlier step")
    return tensors, facts


def _read(path: Path, suffix: str) -> tuple[dict[str, Tensor], dict]:
    try:
        if suffix == ".pkl":
            with open(path, "rb") as file:
                held = _NumpyOnly(file).load()
            tensors = {from_detectron2(name): torch.from_numpy(value.copy()) for name, value in held["model"].items()}
            return tensors, held["inscon"]
        if suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["inscon"])  # noqa: SIM118
        held = torch.load(path, map_location="cpu", weights_only=True)
        return dict(held), json.loads(held.inscon)
    except ImportError as error:
        raise ExportError(f"{path.name} needs the package {error.name}: pip install {error.name}") from None
    except Exception as error:  # of torch, pickle and safetensors alike, for whatever else the file may be
        raise ExportError(
            f"{path} is no export of this program ({type(error).__name__}); write one with scripts/export.py"
        ) from error


def any_backbone(source: Path, untrained: bool = False) -> tuple[Backbone, dict]:
    """A backbone in eval mode out of a run folder, a checkpoint or an export, and {"what", "step", "config"} about it.

    `untrained`: the network as that run began. Raises CheckpointError or ExportError.
    """
    source = Path(source)
    if source.is_dir() or source.suffix == ".pt":
        held, file = load_contents(source)
        tensors = backbone_tensors(held)
    else:
        tensors, held = read(source)
        file = source
    facts = {"what": str(file), "step": held["step"], "config": held["config"]}
    if untrained:
        return untrained_backbone(facts["config"]), facts | {"what": "the network before training", "step": 0}
    backbone = build_backbone(facts["config"]["model"]["backbone"])
    backbone.network.load_state_dict(tensors)
    return backbone.eval(), facts


def check(path: Path, contents: dict, suffix: str | None = None) -> dict:
    """Compare a file with the checkpoint it should come from, tensor by tensor, and by what it computes; return its facts.

    `suffix`: see `read`. Raises ExportError where tensors are missing (BatchNorm's statistics, say) or too many, where they differ
    from the checkpoint's or from what was written, and where the library computes other features.
    """
    tensors, facts = read(path, suffix)
    ours = backbone_tensors(contents)
    missing, unknown = sorted(set(ours) - set(tensors)), sorted(set(tensors) - set(ours))
    if missing or unknown:
        statistics = any(name.endswith(STATISTICS) for name in missing)
        raise ExportError(
            f"{path} holds {len(tensors)} tensors where the backbone has {len(ours)}; "
            + (f"missing is {missing[0]}" if missing else f"unknown is {unknown[0]}")
            + (": BatchNorm's statistics are left out" if statistics else "")
            + "; export it again"
        )
    compared = [name for name in ours if not (facts["norm_batches"] and name.endswith(STATISTICS))]
    wrong = [n for n in compared if tensors[n].dtype != ours[n].dtype or not torch.equal(tensors[n], ours[n])]
    if wrong:
        raise ExportError(
            f"{path} differs from its checkpoint in {len(wrong)} of {len(compared)} tensors, the first is {wrong[0]}; export it "
            "again"
        )
    if digest(tensors) != facts["digest"]:
        raise ExportError(f"{path} is not as it was written, its checksum differs; export it again")
    _compare_features(tensors, facts, path)
    return facts


@torch.inference_mode()
def _compare_features(tensors: Mapping[str, Tensor], facts: dict, path: Path) -> None:
    """What the library makes of the file, on noise, against the backbone that was trained."""
    name = facts["config"]["model"]["backbone"]
    backbone = build_backbone(name).eval()
    backbone.network.load_state_dict(dict(tensors))
    theirs = _pooled_by(facts["format"], name, tensors)
    if theirs is None:
        return
    # timm's networks as they come take one size.
    side = 96 if name in TORCHVISION else backbone.network.pretrained_cfg["input_size"][-1]
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = backbone.pooled(backbone(pixels))
    apart = float((theirs(pixels) - ours).abs().max() / ours.abs().max())
    if not apart <= CLOSE:
        raise ExportError(f"{path} makes {facts['format']} compute other features, {apart:.1e} apart; export it again")


def _pooled_by(form: str, name: str, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    """(pixels) -> pooled features of the library's own network with these weights; None where it is not installed.

    mmdet's ResNet is torchvision's.
    """
    if form == "detectron2":
        return _pooled_by_detectron2(name, tensors)
    if form == "timm":
        try:
            import timm
        except ImportError:
            return None
        network = timm.create_model(name, num_classes=0)
    else:
        network = torchvision.models.get_model(name, weights=None)
        network.fc = nn.Identity()
    network.load_state_dict(dict(tensors), strict=True)
    if name in TORCHVISION:
        return network.eval()
    backbone = build_backbone(name).eval()  # whose maps are pooled, where timm may pool a token or norm the mean
    backbone.network = network.eval()
    return lambda pixels: backbone.pooled(backbone(pixels))


def _pooled_by_detectron2(name: str, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    try:
        from detectron2.config import get_cfg
        from detectron2.modeling import build_backbone as build
    except ImportError:
        return None
    config, like = get_cfg(), torchvision.models.get_model(name, weights=None)
    resnet = config.MODEL.RESNETS
    resnet.DEPTH, resnet.STRIDE_IN_1X1 = int(re.search(r"\d+", name)[0]), False
    resnet.NUM_GROUPS, resnet.WIDTH_PER_GROUP = like.groups, like.base_width
    resnet.NORM, resnet.OUT_FEATURES = "BN", ["res5"]
    resnet.RES2_OUT_CHANNELS = like.fc.in_features // 8
    config.MODEL.BACKBONE.FREEZE_AT = 0
    network = build(config)
    network.load_state_dict({to_detectron2(name): value for name, value in tensors.items()}, strict=True)
    network.eval()
    return lambda pixels: network(pixels)["res5"].mean((2, 3))


def _content(tensors: Mapping[str, Tensor], facts: dict, suffix: str) -> bytes:
    if suffix == ".pkl":
        return _pickled(tensors, facts)
    if suffix == ".safetensors":
        try:
            from safetensors.torch import save
        except ImportError:
            raise ExportError("a .safetensors file needs the package: pip install safetensors") from None
        return save(dict(tensors), metadata={"inscon": json.dumps(facts), "format": "pt"})
    held, file = OrderedDict(tensors), io.BytesIO()
    held.inscon = json.dumps(facts)
    torch.save(held, file)
    return file.getvalue()


def _pickled(tensors: Mapping[str, Tensor], facts: dict) -> bytes:
    """detectron2's own format of converted weights, readable for NumPy 1 and 2."""
    model = {to_detectron2(name): value.numpy() for name, value in tensors.items()}
    content = {"model": model, "__author__": "InsCon", "matching_heuristics": True, "inscon": facts}
    # Protocol 3 names globals in plain text; NumPy 2 moved this one, and the old name is there in both.
    return pickle.dumps(content, protocol=3).replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


class _NumpyOnly(pickle.Unpickler):
    """Reads arrays, numbers, strings and containers; anything else a pickle may ask to run is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _NUMPY:
            raise pickle.UnpicklingError(f"{module}.{name} is asked for")
        if name == "_reconstruct":
            return np.empty(0).__reduce__()[0]
        return super().find_class(module, name)
