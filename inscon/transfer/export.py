"""A trained trunk as a file for torchvision, timm, mmdet or detectron2: written, described, read back and compared.

torchvision, timm and mmdet name a ResNet's tensors alike, so their file is the same plain dictionary; detectron2 has names of
its own and wants a pickle of NumPy arrays. It is always the query encoder's trunk, with BatchNorm's statistics. What it was
made from travels in the file: an attribute `inscon` of the dictionary (.pth), the header (.safetensors), an entry (.pkl).
"""

import importlib.metadata
import io
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
import torchvision
import xxhash
from torch import Tensor, nn

from inscon import checkpoint, guard
from inscon.encoder import Trunk
from inscon.transfer.trunk import PREFIX, load_contents, untrained_trunk

SUFFIXES = {
    "torchvision": (".pth", ".safetensors"),
    "timm": (".pth", ".safetensors"),
    "mmdet": (".pth",),
    "detectron2": (".pkl",),
}
"""Format -> how its files end. detectron2 takes a .pth for one of its own, loads none of it and trains from noise."""
KEY_PREFIX = "key_encoder.trunk."
CLOSE = 1e-5
"""How far features may be apart, of the largest feature, between our trunk and the library's."""
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


def export(
    run: Path, form: str, out: Path, statistics: Mapping[str, Tensor] | None = None, norm_batches: int = 0
) -> dict:
    """Write the query encoder's trunk of `run` (a checkpoint, or a run folder's newest) to `out`; return what travels in it.

    `statistics`: BatchNorm buffers by name that replace the checkpoint's, estimated over `norm_batches` batches
    (`inscon.transfer.statistics`). The file gets its name when it has been read back and holds what it should. Raises
    ExportError or CheckpointError, and leaves an older file of that name as it is.
    """
    out = Path(out)
    check_name(form, out)
    contents, file = load_contents(run)
    tensors = trunk_tensors(contents) | dict(statistics or {})
    facts = {
        "format": form,
        "encoder": "query",
        "inscon": importlib.metadata.version("inscon"),
        "checkpoint": file.name,
        "step": contents["step"],
        "norm_batches": norm_batches,
        "digest": digest(tensors),
        "config": contents["config"],
    }
    guard.remove_unfinished(out.parent, f"{out.name}.*")
    with guard.whole_file(out) as file:
        file.write(_content(tensors, facts, out.suffix))
        file.flush()
        check(Path(file.name), contents, out.suffix)
    return facts


def trunk_tensors(contents: dict, prefix: str = PREFIX) -> dict[str, Tensor]:
    """The trunk's tensors, by torchvision's names, out of a checkpoint's contents."""
    return {
        name.removeprefix(prefix): value.detach().cpu().contiguous()
        for name, value in contents["model"].items()
        if name.startswith(prefix) and torch.is_tensor(value)
    }


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A checksum of names, types, shapes and values, in the order of the names."""
    found = xxhash.xxh3_128()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def read(path: Path, suffix: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """The tensors of an export, by torchvision's names, and what travels with them; no code in it is run.

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


def load_for_torchvision(path: Path) -> tuple[dict[str, Tensor], dict]:
    """As `read`, for those who build on torchvision: ExportError for a file that was written for detectron2."""
    if Path(path).suffix == ".pkl":
        raise ExportError(
            f"{Path(path).name} is written for detectron2, whose names torchvision doesn't know; export the same run with "
            "--format torchvision"
        )
    return read(path)


def any_trunk(source: Path, untrained: bool = False) -> tuple[Trunk, dict]:
    """A trunk in eval mode out of a run folder, a checkpoint or an export, and {"what", "step", "config"} about it.

    `untrained`: the network as that run began. Raises CheckpointError or ExportError.
    """
    source = Path(source)
    if source.is_dir() or source.suffix == ".pt":
        contents, file = load_contents(source)
        facts = {"what": str(file), "step": contents["step"], "config": contents["config"]}
        tensors = trunk_tensors(contents)
    else:
        tensors, held = read(source)
        facts = {"what": str(source), "step": held["step"], "config": held["config"]}
    if untrained:
        return untrained_trunk(facts["config"]), facts | {"what": "the network before training", "step": 0}
    trunk = Trunk(facts["config"]["model"]["arch"])
    trunk.load_state_dict(tensors)
    return trunk.eval(), facts


def check(path: Path, contents: dict, suffix: str | None = None) -> dict:
    """Compare a file with the checkpoint it should come from, tensor by tensor, and by what it computes; return its facts.

    `suffix`: see `read`.

    Raises ExportError where tensors are missing (BatchNorm's statistics, say) or too many, where they are the key encoder's,
    where they differ from the checkpoint's or from what was written, and where the library computes other features.
    """
    tensors, facts = read(path, suffix)
    trunk = Trunk(contents["config"]["model"]["arch"]).eval()
    expected, query, key = (set(trunk.state_dict()), trunk_tensors(contents), trunk_tensors(contents, KEY_PREFIX))
    missing, unknown = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unknown:
        statistics = any(name.endswith(("running_mean", "running_var")) for name in missing)
        raise ExportError(
            f"{path} holds {len(tensors)} tensors where the trunk has {len(expected)}; "
            + (f"missing is {missing[0]}" if missing else f"unknown is {unknown[0]}")
            + (": BatchNorm's statistics are left out" if statistics else "")
            + "; export it again"
        )
    learned = [name for name, value in query.items() if not _is_statistic(name) and value.is_floating_point()]
    if all(torch.equal(tensors[n], key[n]) for n in learned) and any(
        not torch.equal(query[n], key[n]) for n in learned
    ):
        raise ExportError(f"{path} holds the key encoder's trunk, a slow copy; export the query encoder's again")
    compared = query if not facts["norm_batches"] else {name: query[name] for name in learned}
    wrong = [name for name, value in compared.items() if not _same(tensors[name], value)]
    if wrong:
        raise ExportError(
            f"{path} differs from its checkpoint in {len(wrong)} of {len(compared)} tensors, the first is {wrong[0]}; export it "
            "again"
        )
    if digest(tensors) != facts["digest"]:
        raise ExportError(f"{path} is not as it was written, its checksum differs; export it again")
    bad = [n for n, v in tensors.items() if n.endswith("running_var") and not (v >= 0).all()]
    if bad:
        raise ExportError(f"{path} holds variances that are none, the first is {bad[0]}; export it again")
    trunk.load_state_dict(tensors)
    _compare_features(trunk, tensors, facts, path)
    return facts


def stages(network: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Maps res2 to res5 of a network with torchvision's names: our trunk, torchvision's or timm's ResNet."""
    activate = getattr(network, "relu", None) or network.act1
    x, found = network.maxpool(activate(network.bn1(network.conv1(pixels)))), {}
    for number in range(1, 5):
        x = getattr(network, f"layer{number}")(x)
        found[f"res{number + 1}"] = x
    return found


@torch.inference_mode()
def _compare_features(trunk: Trunk, tensors: Mapping[str, Tensor], facts: dict, path: Path) -> None:
    """What the library makes of the file, on noise, against the trunk that was trained."""
    networks = dict(_networks(facts["config"]["model"]["arch"], tensors, facts["format"]))
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    ours = stages(trunk, pixels)
    for library, network in networks.items():
        theirs = stages(network.eval(), pixels) if library != "detectron2" else network.eval()(pixels)
        for name, value in ours.items():
            apart = float((theirs[name] - value).abs().max() / value.abs().max())
            if not apart <= CLOSE:
                raise ExportError(
                    f"{path} makes {library} compute other features at {name}, {apart:.1e} apart; export again"
                )


def _networks(arch: str, tensors: Mapping[str, Tensor], form: str) -> Iterable[tuple[str, nn.Module]]:
    """The libraries' own networks with these weights, as far as they are installed; torchvision's always."""
    network = torchvision.models.get_model(arch, weights=None)
    network.fc = nn.Identity()
    network.load_state_dict(dict(tensors), strict=True)
    yield "torchvision", network
    if form == "timm":
        try:
            import timm
        except ImportError:
            return
        network = timm.create_model(arch, pretrained=False, num_classes=0)
        network.load_state_dict(dict(tensors), strict=True)
        yield "timm", network
    if form == "detectron2":
        try:
            from detectron2.config import get_cfg
            from detectron2.modeling import build_backbone
        except ImportError:
            return
        config = get_cfg()
        config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.STRIDE_IN_1X1 = int(arch.removeprefix("resnet")), False
        config.MODEL.RESNETS.NORM, config.MODEL.RESNETS.OUT_FEATURES = "BN", ["res2", "res3", "res4", "res5"]
        config.MODEL.BACKBONE.FREEZE_AT = 0
        if arch in ("resnet18", "resnet34"):
            config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        network = build_backbone(config)
        network.load_state_dict({to_detectron2(name): value for name, value in tensors.items()}, strict=True)
        yield "detectron2", network


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


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
