"""The study: its intervals against scipy's, its table, its planted faults, and in miniature a study that is cut off and goes on."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks import study, study_page, study_run
from inscon.methods.inscon import InsCon
from inscon.methods.method import KeyMethod, resolve
from inscon.nn.norm import SplitBatchNorm2d
from inscon.transfer.export import any_backbone
from scripts import train
from tests.inscon.test_train import batch_of, make_config

ROOT = Path(__file__).resolve().parents[1]
CHOSEN = {"lr": 0.05, "temperature": 0.3, "key_momentum": 0.9}


def run(seed, **figures):
    curve = [{"step": step, "loss": seed + step, "loss_single": 1.0, "knn": 0.1} for step in (5, 10)]
    return {"seed": seed, "figures": figures, "warnings": [], "curve": curve}


RESULT = {
    "settings": {"seeds": [0, 1, 2]},
    "runs": {
        "untrained": [run(0, knn=30.0), run(1, knn=31.0), run(2, knn=35.0)],
        "moco": [run(0, knn=40.0), run(1, knn=44.0)],
        "inscon": [run(0, knn=39.0, linear=50.0), run(1, knn=39.5), run(2)],
    },
}


@pytest.mark.parametrize("count", range(2, 11))
def test_the_interval_is_scipys(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)).tolist()
    mean, half = study_page.interval(values)
    low, high = stats.t.interval(0.95, count - 1, loc=sum(values) / count, scale=stats.sem(values))
    assert (mean, half) == (pytest.approx((low + high) / 2), pytest.approx((high - low) / 2, rel=1e-3))


def test_one_seed_has_no_interval_and_more_than_the_table_holds_are_refused():
    assert study_page.interval([41.0]) == (41.0, None)
    with pytest.raises(ValueError, match="at most 10. Found: 11"):
        study.parse(["--out", "x", "--seeds", *map(str, range(11))])


def test_the_table_pairs_seeds_and_has_the_papers_order_beside_it(tmp_path):
    text = study_page.page(RESULT)
    # kNN of moco: 40 and 44; over the same seeds untrained 10 and 13, half = 12.706 * 1.5 of both means' error.
    # InsCon's over moco: -1 and -4.5, half = 12.706 * 1.75.
    assert "| moco | 42.0 ± 25.4 | 11.5 ± 19.1 | 0.0 ± 0.0 | - | - | - | 39.8 | 67.5 |" in text
    assert "| inscon | 39.2 ± 3.2 | 8.8 ± 3.2 | -2.8 ± 22.2 | 50.0 | - | - | 40.9 | - |" in text
    assert "| untrained | 32.0 ± 6.6 | 0.0 ± 0.0 | -11.5 ± 19.1 |" in text
    assert "Here, by kNN: moco > inscon > untrained." in text and "In the paper, by box AP: inscon > moco." in text
    study_page.draw(RESULT, tmp_path / "study.png")
    assert Image.open(tmp_path / "study.png").size == (15 * 80, 512)


@pytest.mark.parametrize("name", [study.UNTRAINED, *study.HEADS, *study.methods.names()])
def test_what_was_chosen_reaches_every_method(name, monkeypatch):
    options, _ = study.parse(["--out", "x", "--batch-size", "32", "--steps", "80"])
    config = resolve(train.parse(study.flags_of(name, options, CHOSEN)), 1)
    known = {field.name: getattr(config.method, field.name) for field in dataclasses.fields(config.method)}
    wanted = {
        "temperature": 0.3,
        "cell_temperature": 0.3,
        "key_momentum": 0.9,
        "queue_size": 512,
        "dense_from_step": 20,
    }
    assert {key: known[key] for key in wanted if key in known} == {key: wanted[key] for key in wanted if key in known}
    assert config.optim.lr == {study.UNTRAINED: 0, "simclr": 1, "byol": 1, "pixpro": 1}.get(name, 0.05)
    assert known.get("heads") == study.HEADS.get(name, known.get("heads"))


def test_commands_of_the_page_are_understood():
    text = (ROOT / "docs/study.md").read_text().replace("\\\n", " ")
    found = [shlex.split(line) for line in re.findall(r"python benchmarks/study.py ([^;`\n]*)", text)]
    assert len(found) >= 4 and not any(study.parse(arguments)[1] for arguments in found)


def method_with(fault, tmp_path, monkeypatch):
    """A method in training, its key encoder already another than its query encoder."""
    for owner, name in ((KeyMethod, "encode_keys"), (KeyMethod, "__init__"), (InsCon, "key_inputs")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back
    study_run.PLANTS.get(fault, lambda: None)()
    torch.manual_seed(0)
    config = make_config(tmp_path)
    method = config.method.build(config, config.optim.batch_size).train()
    with torch.no_grad():
        for weight in method.query_encoder.parameters():
            weight.mul_(1.1)
    return method


@torch.no_grad()
def test_keys_from_the_query_encoder_are_planted(tmp_path, monkeypatch):
    method, batch = method_with("keys-from-query", tmp_path, monkeypatch), batch_of(0)
    wanted = method.shuffle(method.query_encoder, *method.key_inputs(batch))["single"]
    keys = method.prepare(batch).own["single"]
    assert torch.equal(keys, wanted)
    assert not torch.allclose(keys, method.shuffle(method.key_encoder, *method.key_inputs(batch))["single"])


@torch.no_grad()
def test_the_missing_shuffle_is_planted(tmp_path, monkeypatch):
    method, batch = method_with("no-shuffle", tmp_path, monkeypatch), batch_of(0)
    norms = [module for module in method.modules() if isinstance(module, SplitBatchNorm2d)]
    assert len(norms) > 20 and {norm.num_groups for norm in norms} == {1}
    keys = method.prepare(batch).own["single"]
    assert torch.equal(keys, method.key_encoder(*method.key_inputs(batch))["single"])


def test_cells_are_planted_one_to_the_right(tmp_path, monkeypatch):
    method, batch = method_with("cells-off-by-one", tmp_path, monkeypatch), batch_of(0)
    found, sound = method.key_inputs(batch)[1], batch.overlaps["query", "key"].second_box
    for (x0, y0, x1, y1), box in zip(sound.tolist(), found.tolist(), strict=True):
        third = (x1 - x0) / 3
        assert box == pytest.approx([x0 + third, y0, x1 + third, y1], rel=1e-5)


MINIATURE = (
    "--smallest --methods moco inscon --seeds 1 --steps 6 --batch-size 8 --pictures 24 --held-out 24 --boxed 4 --probe-epochs 1 "
    "--iterations 1 --jobs 2 --search --search-lr 0.01 --search-temperature 0.1 0.2"
)


@pytest.mark.slow
def test_a_study_is_cut_off_and_goes_on(tmp_path):
    for package in ("nvidia.dali", "timm", "pycocotools"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, ROOT / "benchmarks/study.py", *MINIATURE.split(), "--out", tmp_path]
    cut = subprocess.run([*command, "--minutes", "0.2"], capture_output=True, text=True)
    assert cut.returncode == study_run.LEFT and "the same command goes on" in cut.stdout, cut.stdout + cut.stderr
    before = {path: path.read_text() for path in tmp_path.rglob("result.json")}
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(json.loads(path.read_text()).items() >= json.loads(text).items() for path, text in before.items())
    result = json.loads((tmp_path / "study.json").read_text())
    assert [len(of) for of in result["runs"].values()] == [1, 1, 1] and len(result["tried"]) == 2
    assert result["tried"][0]["knn"] >= result["tried"][1]["knn"]
    for of in result["runs"].values():
        assert all(set(run["figures"]) == set(study_page.FIGURES) and run["curve"] for run in of)
    assert (tmp_path / "study.md").read_text() in done.stdout and str(tmp_path) not in json.dumps(result)
    start = dict(any_backbone(tmp_path / "runs/untrained-1/backbone.pth")[0].named_parameters())
    for name in ("moco-1", "inscon-1"):  # which began as the same network
        of_step_0 = dict(any_backbone(tmp_path / "runs" / name / "run", untrained=True)[0].named_parameters())
        assert all(torch.equal(start[key], of_step_0[key]) for key in start | of_step_0)
    again = subprocess.run([*command, "--steps", "7"], capture_output=True, text=True)
    assert again.returncode == 1 and "has other flags and steps; set another --out" in again.stderr
