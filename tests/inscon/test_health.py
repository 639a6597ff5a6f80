"""Faults that raise no exception are seen, each by its own sentence, and a sound run is left in peace. Batches are noise."""

import dataclasses
import json

import pytest
import torch

from benchmarks import health as planted
from inscon import model as model_module
from inscon import train
from inscon.batch import Batch, View
from inscon.config import resolve, smoke
from inscon.health import SHARED, Health, shared_statistics
from inscon.model import InsCon
from tests.inscon.test_train import BATCH, CPU, PER_EPOCH, batch_of, make_config


@pytest.fixture
def plant(monkeypatch):
    """Plants one of the faults that docs/healthy-run.md shows, for the length of a test."""

    def plant(fault):
        replaced = (
            (InsCon, "__init__"),
            (InsCon, "update_key_encoder"),
            (InsCon, "enqueue"),
            (model_module, "row_logits"),
        )
        for owner, name in replaced:
            monkeypatch.setattr(owner, name, getattr(owner, name))  # which puts it back afterwards
        planted.FAULTS[fault]()

    return plant


def run(tmp_path, total=4, **model):
    config = make_config(tmp_path)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    training = train.set_up(config, CPU, "set A")
    train.train(training, (batch_of(step % 3) for step in range(total)), PER_EPOCH, total)
    file = tmp_path / "warnings.jsonl"
    warnings = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()], warnings


def test_a_sound_run_is_left_in_peace(tmp_path, capsys):
    windows, warnings = run(tmp_path)
    assert warnings == [] and "warning" not in capsys.readouterr().out
    for line in windows:
        assert line["key_moved"] > 0.9 and 0 < line["key_distance"] < 0.5
        assert line["queue_renewed_single"] == line["queue_renewed_cell"] == 1
        assert 0 < line["queue_mean_length_single"] <= 1


def test_a_key_encoder_that_stands_still_is_noticed(tmp_path, plant, capsys):
    plant("stale")
    _, warnings = run(tmp_path)
    assert len(warnings) == 1 and warnings[0]["step"] == 1
    assert "the key encoder has not moved in 1 steps" in warnings[0]["warning"]
    assert "warning at step 1: the key encoder has not moved" in capsys.readouterr().out


def test_so_is_a_key_momentum_of_one(tmp_path):
    _, warnings = run(tmp_path, key_momentum=1.0)
    assert [w["step"] for w in warnings] == [1] and "is key_momentum, 1.0, 1?" in warnings[0]["warning"]


def test_a_queue_that_is_not_renewed_is_noticed(tmp_path, plant):
    plant("stuck")
    _, warnings = run(tmp_path)
    assert [w["warning"].split(":")[0] for w in warnings] == ["the single queue is stuck", "the cell queue is stuck"]
    assert "0 % of the keys that 1 steps should have replaced were" in warnings[0]["warning"]


def test_a_pointer_that_stands_still_is_noticed(tmp_path, monkeypatch):
    """Half of the queue is never written: with eight steps between two looks, only one step's keys are new."""
    from inscon.key_queue import KeyQueue

    enqueue = KeyQueue.enqueue

    def at_the_start(self, keys):
        self.pointer = 0
        enqueue(self, keys)

    config = resolve(dataclasses.replace(smoke()), 1)
    torch.manual_seed(0)
    model = InsCon(config.model, config.views, config.optim.batch_size)
    health, keys = Health(model, 16, 0), torch.nn.functional.normalize(torch.randn(16, 16, 128), dim=2)
    for of_step in keys[:8]:
        model.key_queue.enqueue(of_step)
    assert health.look(8, {})[0]["queue_renewed_single"] == 1
    monkeypatch.setattr(KeyQueue, "enqueue", at_the_start)
    for of_step in keys[8:]:
        model.key_queue.enqueue(of_step)
    figures, warnings = health.look(16, {})
    assert figures["queue_renewed_single"] == 1 / 8
    assert any("the single queue is stuck: 12 % of the keys that 8 steps" in sentence for sentence in warnings)


def test_keys_that_are_all_alike_are_noticed():
    config = resolve(dataclasses.replace(smoke()), 1)
    model = InsCon(config.model, config.views, config.optim.batch_size)
    health = Health(model, 64, 0)
    one = torch.nn.functional.normalize(torch.randn(128), dim=0)
    keys = torch.nn.functional.normalize(one + 1e-3 * torch.randn(128, 128), dim=1)
    model.key_queue.enqueue(keys)
    assert not any(
        "collapsed" in sentence for sentence in health.look(2, {})[1]
    )  # an untrained network's keys are alike, too
    model.key_queue.enqueue(keys.flip(0))
    figures, warnings = health.look(4, {})
    assert figures["queue_mean_length_single"] == pytest.approx(float(keys.double().mean(0).norm()), rel=1e-5)
    assert any("the single keys have collapsed: their mean is 1.000 long" in sentence for sentence in warnings)
    assert not any("collapsed" in sentence for sentence in health.look(6, {})[1])  # said once


def test_answers_that_are_always_right_are_noticed():
    config = resolve(dataclasses.replace(smoke()), 1)
    settings = dataclasses.replace(config.model, queue_size=4096)
    health = Health(InsCon(settings, config.views, config.optim.batch_size), 64, 0)
    said = [health.look(step, {"single": 0.999 if step != 3 else 0.98})[1] for step in range(1, 9)]
    leaks = [
        step for step, sentences in enumerate(said, 1) if any("find their key" in sentence for sentence in sentences)
    ]
    assert leaks == [6]  # the third time in a row
    [sentence] = [sentence for sentence in said[5] if "find their key" in sentence]
    assert sentence.startswith(
        "99.9 % of the queries find their key among 4096 others: BatchNorm may give the answer away"
    )
    few = Health(InsCon(config.model, config.views, config.optim.batch_size), 64, 0)  # 128 keys tell nothing
    assert not any("find their key" in s for step in range(1, 9) for s in few.look(step, {"single": 1.0})[1])


def test_statistics_that_leak_are_noticed_on_the_first_batch(tmp_path, plant):
    plant("leak")
    _, warnings = run(tmp_path)
    assert [w["step"] for w in warnings] == [0]
    assert warnings[0]["warning"].startswith(
        "BatchNorm leaks: the key of an image is normalized among 100 % of the images that its query was"
    )


@pytest.mark.parametrize("cut", ["joint", "passes", "groups"])
@pytest.mark.parametrize(("batch_size", "split_size"), [(8, 4), (16, 4), (24, 8)])
def test_who_is_normalized_with_whom_is_found_from_outside(cut, batch_size, split_size):
    """Against the groups written out: query i is in group i // size, the key in slot s in group s // size."""
    settings = dataclasses.replace(
        smoke().model, norm="split", split_size=split_size, queue_size=48, cell_queue_size=432
    )
    torch.manual_seed(0)
    model = InsCon(settings, smoke().views, batch_size, cut)
    with_query, slot = set(range(1, split_size)), model.key_order.tolist().index(0)
    with_key = {model.key_order[s].item() for s in range(batch_size) if s // split_size == slot // split_size} - {0}
    expected = len(with_query & with_key) / len(with_query)
    parts = [batch_of(step) for step in range(batch_size // BATCH)]

    def joined(name):
        return View(
            **{f: torch.cat([getattr(getattr(b, name), f) for b in parts]) for f in ("pixels", "crop_box", "flipped")}
        )

    batch = Batch(query=joined("query"), key=joined("key"), mosaic=None, sample_ids=torch.arange(batch_size))
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    assert shared_statistics(model, batch) == pytest.approx(expected) and expected <= SHARED
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.key_order = model.key_order_back = torch.arange(batch_size)
    assert shared_statistics(model, batch) == 1


def test_figures_do_not_disturb_the_run(tmp_path, monkeypatch):
    """The same losses with and without anybody looking."""
    looked, _ = run(tmp_path / "looked")
    monkeypatch.setattr(Health, "look", lambda self, step, top1: ({}, []))
    monkeypatch.setattr(Health, "look_at_norm", lambda self, batch: [])
    alone, _ = run(tmp_path / "alone")
    assert [line["loss"] for line in looked] == [line["loss"] for line in alone] and BATCH == 8
