"""Weights to share: a folder whose card says what it is, and whose lines load it."""

import contextlib
import json
import os
import re
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
import yaml

from inscon.transfer import export, hub
from scripts import export as export_script
from tests.inscon.test_export import make_run, tensors_of

pytest.importorskip("safetensors", reason="safetensors is not installed")
NETWORKS = {
    "resnet18": {"torchvision", "timm", "detectron2"},
    "test_resnet": {"timm"},
    "resnet26": {"timm"},
}
"""Backbone -> who its card shows how to load it with."""
WINDOWS = [
    {"step": 5, "loss": 9.0},
    {"step": 7, "loss": 4.5, "loss_single": 2.25, "knn": 0.5, "images_per_s": 3.0},
    {"step": 9, "loss": 1.0},
]


@pytest.fixture(scope="module", params=NETWORKS)
def shared(request, tmp_path_factory):
    """(backbone, run folder, folder to share)."""
    folder = tmp_path_factory.mktemp("shared")
    run = make_run(folder / "private/run", request.param)
    (run / "metrics.jsonl").write_text("".join(json.dumps(window) + "\n" for window in WINDOWS))
    (folder / "out.unfinished").mkdir()  # of a killed export
    export_script.main(export_script.ExportConfig(run=run, format="hub", out=folder / "out", license="cc-by-4.0"))
    assert sorted(path.name for path in folder.iterdir()) == ["out", "private"]
    return request.param, run, folder / "out"


def test_the_lines_of_the_card_load_the_weights(shared):
    name, run, folder = shared
    card = (folder / "README.md").read_text()
    lines, expected = dict(re.findall(r"With (\w+):\n\n```python\n(.*?)\n```", card, re.DOTALL)), tensors_of(run)[0]
    assert set(lines) == NETWORKS[name] and all(len(code.splitlines()) <= 6 for code in lines.values())
    for library in filter(find_spec, lines):
        held = {}
        with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else moved(folder):
            exec(lines[library], held)
        found = held["model"].state_dict()
        if library == "detectron2":  # whose frozen BatchNorm counts no batches
            wanted = {n: f"backbone.bottom_up.{export.to_detectron2(n)}" for n in expected if "batches" not in n}
            found, expected = {n: found[theirs] for n, theirs in wanted.items()}, {n: expected[n] for n in wanted}
        assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found), library


@contextlib.contextmanager
def moved(folder):
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def test_the_card_says_what_it_is_and_nothing_private(shared):
    name, _, folder = shared
    header, text = re.fullmatch(r"---\n(.*?)---\n(.*)", (folder / "README.md").read_text(), re.DOTALL).groups()
    assert yaml.safe_load(header)["license"] == "cc-by-4.0" and yaml.safe_load(header)["library_name"] == "timm"
    assert "after 7 steps" in text and "a set" in text and f"torch {version('torch')} " in text
    assert "\nloss 4.5, loss_single 2.25, knn 0.5\n" in text
    assert json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])["model"]["backbone"] == name
    assert all(b"private" not in path.read_bytes() for path in folder.iterdir())


def test_timm_adds_a_classifier_and_knows_how_pictures_come(shared):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    _, run, folder = shared
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    expected = tensors_of(run)[0]
    assert all(torch.equal(value, expected[n]) for n, value in model.state_dict().items() if n in expected)
    assert timm.data.resolve_model_data_config(model)["mean"] == [0.485, 0.456, 0.406]


def test_wrong_use_is_one_sentence_and_leaves_nothing(shared, tmp_path, small_files, monkeypatch):
    _, run, folder = shared
    with pytest.raises(ValueError, match="yours to choose. Found: None; set --license cc-by-4.0"):
        hub.check(tmp_path / "a", None)
    with pytest.raises(ValueError, match="Found: my own\nterms; set --license"):
        hub.check(tmp_path / "a", "my own\nterms")
    with pytest.raises(ValueError, match="a new or empty folder. Found: .*out; set another --out"):
        hub.check(folder, "mit")
    with pytest.raises(ValueError, match="a new or empty folder. Found: .*README.md; set another --out"):
        hub.check(folder / "README.md", "mit")
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="needs the package safetensors: pip install 'inscon.hub.'"):
        hub.check(tmp_path / "a", "mit")
    monkeypatch.undo()
    with small_files(10_000), pytest.raises(OSError, match="File too large"):
        hub.export(run, tmp_path / "a", "mit")
    assert not list(tmp_path.iterdir())
