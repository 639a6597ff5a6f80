"""Exports: what other libraries make of them, and what is caught when they are read back."""

import json
import pickle
import re
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from inscon import checkpoint, train
from inscon.config import Config, ModelConfig, OptimConfig, RunConfig, ViewConfig
from inscon.methods import inscon, moco
from inscon.methods.method import resolve
from inscon.nn.backbones import build_backbone
from inscon.transfer import export
from scripts import export as export_script

BACKBONES = ["resnet18", "convnext_atto", "vit_tiny_patch16_224"]
"""Of torchvision and, convolutions and a transformer, of timm."""


def make_run(folder, backbone="resnet18", step=7):
    """A run folder with a checkpoint of weights as they were drawn; the two encoders differ in every weight and statistic."""
    of_all = backbone == "resnet18"
    settings = inscon.Settings(queue_size=16, cell_queue_size=144) if of_all else moco.Settings(queue_size=16)
    model, run = ModelConfig(backbone=backbone), RunConfig(run_dir=folder)
    config = Config(
        method=settings, views=ViewConfig(view_size=64), model=model, optim=OptimConfig(batch_size=8), run=run
    )
    training = train.set_up(resolve(config, 1), torch.device("cpu"), "a set")
    training.step = step
    with torch.no_grad():
        for name, value in training.method.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(0, 0.1)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif name.endswith("num_batches_tracked"):
                value.fill_(7)
        for parameter in training.method.key_encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    checkpoint.save(folder, training.state_dict(), keep=1)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run50(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run50"), "resnet50")


@pytest.fixture(scope="module")
def jpeg():
    """A real JPEG's pixels: a smooth picture, compressed and read again."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(3, 12, 12, generator=generator)
    levels = nn.functional.interpolate(coarse[None], size=(224, 224), mode="bicubic")[0].clamp(0, 1).mul(255).byte()
    decoded = torchvision.io.decode_jpeg(torchvision.io.encode_jpeg(levels, quality=90)).float() / 255
    return torchvision.transforms.functional.normalize(decoded, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))[None]


def tensors_of(run):
    return export.read_run(run)[:2]


def load(file):
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_library_loads_an_export_strictly_and_computes_what_we_compute(run50, jpeg, tmp_path, library):
    file = tmp_path / "r50.pth"
    export.export(run50, library, file)
    held = load(file)
    assert len(held) == 318 and set(held) == set(tensors_of(run50)[0])
    if library == "torchvision":
        network = torchvision.models.resnet50(weights=None)
        network.fc = nn.Identity()
    else:
        timm = pytest.importorskip("timm", reason="timm is not installed")
        network = timm.create_model("resnet50", pretrained=False, num_classes=0)
    network.load_state_dict(held, strict=True)
    backbone = build_backbone("resnet50").eval()
    backbone.network.load_state_dict(tensors_of(run50)[0])
    theirs, hooks = {}, []
    for stride, layer in zip(backbone.channels, ("layer1", "layer2", "layer3", "layer4"), strict=True):
        keep = lambda _module, _given, made, stride=stride: theirs.update({stride: made})  # noqa: E731
        hooks.append(network.get_submodule(layer).register_forward_hook(keep))
    with torch.inference_mode():
        ours = backbone(jpeg)
        network.eval()(jpeg)
    for stride, value in ours.items():
        assert value.abs().max() > 1e-3
        torch.testing.assert_close(theirs[stride], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BACKBONES[1:])
def test_timm_loads_its_own_networks_and_what_no_training_reached_is_listed(name, tmp_path, capsys):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    folder, file = make_run(tmp_path / "run", name), tmp_path / "a.pth"
    facts = export_script.main(export_script.ExportConfig(run=folder, format="timm", out=file))
    untrained = {"convnext_atto": ["head.norm.weight", "head.norm.bias"]}.get(name, [])
    assert facts["untrained"] == untrained and export.read(file)[1] == facts
    assert (f"no map depends on them: {', '.join(untrained)}." in capsys.readouterr().out) == bool(untrained)
    network = timm.create_model(name, num_classes=0)
    network.load_state_dict(load(file), strict=True)
    pixels = torch.randn(1, 3, 224, 224)
    backbone, about = export.any_backbone(file)
    assert about["step"] == 7
    with torch.inference_mode():
        theirs = network.eval().forward_features(pixels)
        theirs = theirs if theirs.ndim == 4 else theirs[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        torch.testing.assert_close(theirs, backbone(pixels)[backbone.last])
    for form, out in (("torchvision", "b.pth"), ("mmdet", "b.pth"), ("detectron2", "b.pkl")):
        with pytest.raises(ValueError, match=f"{form} has no {name}, .* set --format timm"):
            export.export(folder, form, tmp_path / out)
    if name == "convnext_atto":
        with pytest.raises(ValueError, match="a backbone with BatchNorm; .*leave it out"):
            export.estimate_statistics(backbone, [])


# The map of TRANSFER's table, written again from it and by other means than the exporter's: rules in order, first to last.
RULES = [(r"^(conv1|bn1)\b", r"stem.\1")] + [(rf"^layer{n}\.", f"res{n + 1}.") for n in (1, 2, 3, 4)]
RULES += [(r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"), (r"\bbn1", "conv1.norm"),
          (r"\bbn2", "conv2.norm"), (r"\bbn3", "conv3.norm")]  # fmt: skip


def test_the_file_for_detectron2_holds_every_tensor_under_its_name(run50, tmp_path):
    file = tmp_path / "r50.pkl"
    export.export(run50, "detectron2", file)
    held = pickle.loads(file.read_bytes())
    assert held["__author__"] and held["matching_heuristics"] is True
    expected, _ = tensors_of(run50)
    assert len(expected) == len(held["model"]) == 318
    for name, value in expected.items():
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        assert (held["model"].pop(name) == value.numpy()).all()
    assert not held["model"]
    assert {"stem.conv1.norm.running_var", "res2.0.shortcut.norm.bias", "res5.2.conv3.weight"} <= {
        export.to_detectron2(name) for name in expected
    }
    assert b"numpy._core" not in file.read_bytes()[:4096]  # where NumPy 1 couldn't read it


@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_what_made_it_travels_in_the_file(run, tmp_path, name):
    facts = export.export(run, "detectron2" if name.endswith("pkl") else "mmdet", tmp_path / name)
    tensors, held = export.read(tmp_path / name)
    assert held == facts and held["step"] == 7 and held["norm_batches"] == 0 and held["untrained"] == []
    assert held["config"]["model"]["backbone"] == "resnet18" and held["inscon"]
    assert all(torch.equal(tensors[n], v) for n, v in tensors_of(run)[0].items())


def spoiled(file, change):
    """The file again, after `change` of its dictionary."""
    held = load(file)
    made = OrderedDict(change(dict(held)))
    made.inscon = held.inscon
    torch.save(made, file)
    return file


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held | {"layer3.0.conv2.weight": held["layer3.0.conv2.weight"] + 1e-7},
        lambda held: {name: value for name, value in held.items() if not name.endswith(export.STATISTICS)},
        lambda held: held | {"fc.weight": torch.zeros(2)},
        lambda held: held | {"bn1.running_mean": held["bn1.running_mean"].double()},
    ],
)
def test_reading_back_catches_what_is_wrong(run, tmp_path, change):
    file = tmp_path / "a.pth"
    export.export(run, "torchvision", file)
    export.read(spoiled(file, dict))
    with pytest.raises(ValueError, match="a.pth is not as it was written, its checksum differs; export it again"):
        export.read(spoiled(file, change))


def test_an_export_is_of_the_trained_encoder_not_of_its_slow_copy(run, tmp_path):
    contents = tensors_of(run)[1]
    export.export(run, "torchvision", tmp_path / "a.pth")
    for name, value in load(tmp_path / "a.pth").items():
        assert torch.equal(value, contents["model"][f"query_encoder.backbone.network.{name}"])


def test_an_export_that_is_wrong_never_gets_its_name(run, tmp_path, monkeypatch):
    file = tmp_path / "a.pth"
    file.write_bytes(b"an older file")
    write = export._write

    def careless(opened, tensors, facts):
        write(opened, {n: torch.zeros_like(v) for n, v in tensors.items()}, facts)

    monkeypatch.setattr(export, "_write", careless)
    with pytest.raises(ValueError, match="is not as it was written"):
        export.export(run, "torchvision", file)
    assert file.read_bytes() == b"an older file" and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_wrong_use_is_one_sentence(run, tmp_path):
    with pytest.raises(ValueError, match=r"a file for detectron2 must end in .pkl.*Found: a.pth; set --out a.pkl"):
        export.export(run, "detectron2", tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a file for mmdet must end in .pth.*Found: a.pkl"):
        export.export(run, "mmdet", tmp_path / "a.pkl")
    (tmp_path / "b.pth").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="b.pth is no export of this program"):
        export.read(tmp_path / "b.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="c.pth is no export of this program"):
        export.read(tmp_path / "c.pth")
    (tmp_path / "foreign.pt").write_bytes(b"of another program")
    with pytest.raises(ValueError, match=r"foreign.pt can't be read .*; give a checkpoint of this program$"):
        export.any_backbone(tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="there is no file .*d.pth; give a run folder"):
        export.read(tmp_path / "d.pth")
    contents = checkpoint.load(checkpoint.latest(run))
    torch.save(contents | {"version": 99}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match="is of checkpoint version 99, this program reads"):
        export.export(tmp_path / "old.pt", "torchvision", tmp_path / "e.pth")
    assert not (tmp_path / "e.pth").exists()


@pytest.mark.parametrize("error", [
    PermissionError(13, "Permission denied", "a.pt"), torch.OutOfMemoryError("no room"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
])  # fmt: skip
def test_what_says_nothing_of_a_checkpoint_is_no_reason_to_delete_it(run, monkeypatch, error):
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        export.read_run(run)


def test_weights_that_are_not_finite_are_no_export(run, tmp_path):
    export.export(run, "torchvision", tmp_path / "a.pth")
    held = torch.load(tmp_path / "a.pth", weights_only=True)
    broken = OrderedDict(dict(held) | {"conv1.weight": held["conv1.weight"] * torch.inf})
    broken.inscon = held.inscon
    torch.save(broken, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth .*: conv1.weight is not finite; export an earlier step"):
        export.any_backbone(tmp_path / "b.pth")
    contents = torch.load(checkpoint.latest(run), weights_only=True)
    contents["model"]["query_encoder.backbone.network.bn1.running_var"][0] = torch.nan
    torch.save(contents, tmp_path / "step-00000007.pt")
    with pytest.raises(ValueError, match="bn1.running_var is not finite; delete it to begin again"):
        export.export(tmp_path / "step-00000007.pt", "torchvision", tmp_path / "c.pth")
    assert not (tmp_path / "c.pth").exists()


def test_an_export_that_cannot_be_written_leaves_the_older_one(run, tmp_path, small_files):
    (tmp_path / "a.pth").write_bytes(b"an older one")
    (tmp_path / "a.pth.host-1-2.unfinished").write_bytes(b"of a killed process")
    with small_files(1_000_000), pytest.raises(OSError, match="File too large") as found:
        export.export(run, "torchvision", tmp_path / "a.pth")
    assert found.value.filename == str(tmp_path / "a.pth") and (tmp_path / "a.pth").read_bytes() == b"an older one"
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


class Bomb:
    def __reduce__(self):
        return print, ("run by a pickle",)


def test_a_pickle_that_wants_to_run_something_is_refused(tmp_path, capsys):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"model": {}, "inscon": Bomb()}))
    with pytest.raises(ValueError, match=r"a.pkl is no export of this program \(UnpicklingError\)"):
        export.read(tmp_path / "a.pkl")
    assert "run by a pickle" not in capsys.readouterr().out


def test_statistics_of_one_batch_are_its_own(run, tmp_path):
    """Closed form at the first layer: mean and unbiased variance of what the convolution gives, over all batches' means."""
    backbone, _ = export.any_backbone(run)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(6, 3, 64, 64, generator=generator) * (1 + i) for i in range(3)]
    made = export.estimate_statistics(backbone, batches)
    assert not backbone.training
    maps = [backbone.network.conv1(batch).detach() for batch in batches]
    mean = sum(m.mean((0, 2, 3)) for m in maps) / 3
    variance = sum(m.var((0, 2, 3), unbiased=True) for m in maps) / 3
    torch.testing.assert_close(made["bn1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made["bn1.running_var"], variance, rtol=1e-4, atol=1e-5)
    assert len(made) == 60
    export.export(run, "torchvision", tmp_path / "a.pth", made, 3)
    tensors, facts = export.read(tmp_path / "a.pth")
    assert facts["norm_batches"] == 3 and all(torch.equal(tensors[name], value) for name, value in made.items())
    assert json.loads(load(tmp_path / "a.pth").inscon)["digest"] == facts["digest"]
    with pytest.raises(ValueError, match="need at least 1 batch.*set --norm-batches 1 or more"):
        export.estimate_statistics(backbone, [])
