"""Faults that raise no exception are seen, each by its own sentence, and a sound run is left in peace. Batches are noise."""

import dataclasses
import json

import pytest
import torch

from inscon import train
from inscon.config import Config, ModelConfig, OptimConfig
from inscon.health import Health
from inscon.methods import byol
from inscon.methods.method import Follower, resolve
from inscon.nn.queue import KeyQueue
from inscon.recipes import smoke
from tests.inscon.test_train import BATCH, CPU, PER_EPOCH, batch_of, make_config


def run(tmp_path, total=4, **model):
    config = make_config(tmp_path)
    whole = dataclasses.replace(config.model, backbone="resnet18")
    config = dataclasses.replace(config, model=whole, method=dataclasses.replace(config.method, **model))
    training = train.set_up(config, CPU, "set A")
    train.train(training, (batch_of(step % 3) for step in range(total)), PER_EPOCH, total)
    file = tmp_path / "warnings.jsonl"
    warnings = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()], warnings


def method_of(batch_size=64, **settings):
    """An untrained one, of the recipe smoke."""
    config = smoke()
    optim = dataclasses.replace(config.optim, batch_size=batch_size)
    model = dataclasses.replace(config.model, split_size=None)
    settings = {"cell_queue_size": 18 * batch_size, **settings}
    config = dataclasses.replace(
        config, optim=optim, model=model, method=dataclasses.replace(config.method, **settings)
    )
    return resolve(config, 1).method.build(resolve(config, 1), batch_size)


def test_a_sound_run_is_left_in_peace(tmp_path, capsys):
    windows, warnings = run(tmp_path)
    assert warnings == [] and "warning" not in capsys.readouterr().out
    for line in windows:
        assert line["key_moved"] > 0.9 and 0 < line["key_distance"] < 0.5
        assert line["queue_renewed_single"] == line["queue_renewed_cell"] == 1
        assert 0 < line["queue_mean_length_single"] <= 1


def test_a_key_encoder_that_stands_still_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Follower, "move", lambda self: None)
    _, warnings = run(tmp_path)
    assert len(warnings) == 1 and warnings[0]["step"] == 1
    assert "the slow copy of the network has not moved in 1 steps" in warnings[0]["warning"]
    assert "warning at step 1: the slow copy of the network has not moved" in capsys.readouterr().out


def test_so_is_a_momentum_of_one(tmp_path):
    _, warnings = run(tmp_path, key_momentum=1.0)
    assert [w["step"] for w in warnings] == [1] and "is its momentum, 1.0, 1?" in warnings[0]["warning"]


def without_queue():
    settings = byol.Settings(hidden_dim=8, embedding_dim=4)
    optim = OptimConfig(batch_size=8)
    config = resolve(Config(method=settings, model=ModelConfig(backbone="test_resnet"), optim=optim), 1)
    return config.method.build(config, 8)


@pytest.mark.parametrize(("step", "stale"), [(0, True), (500, True), (999, False)])
def test_a_momentum_that_a_schedule_brings_to_one_is_no_fault(step, stale):
    method = without_queue()
    health = Health(method, step, "sync")
    method.schedule(step, 1000)
    assert (
        health.look(step + 1, {})[1] == []
    )  # where both are equal there is nothing to follow, as in a warm-up's first step
    method.online.projector[3].bias.data.add_(1)
    figures, warnings = health.look(step + 2, {})  # without a move
    assert figures["key_moved"] == 0 and [("has not moved" in sentence) for sentence in warnings] == [True] * stale


def test_embeddings_in_no_queue_that_are_all_alike_are_noticed_once_the_run_has_settled():
    method, said = without_queue(), []
    health = Health(method, 0, "sync")
    for step, length in ((500, 0.999), (520, 0.97), (540, 0.999), (560, 0.999)):
        method.online.projector[3].bias.data.add_(1)
        method.after_update()  # or it would be stale
        said += [(step, sentence) for sentence in health.look(step, {"length_first": length, "length_second": 0.5})[1]]
    [(step, sentence)] = said
    assert step == 540 and sentence.startswith("the first embeddings have collapsed: the mean of a batch is 0.999 long")


def test_a_queue_that_is_not_renewed_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(KeyQueue, "enqueue", lambda self, keys: None)
    _, warnings = run(tmp_path)
    assert [w["warning"].split(":")[0] for w in warnings] == ["the single queue is stuck", "the cell queue is stuck"]
    assert "0 % of the keys that 1 steps should have replaced were" in warnings[0]["warning"]


def test_a_pointer_that_stands_still_is_noticed(tmp_path, monkeypatch):
    """Half of the queue is never written: with eight steps between two looks, only one step's keys are new."""
    enqueue = KeyQueue.enqueue

    def at_the_start(self, keys):
        self.pointer.zero_()
        enqueue(self, keys)

    torch.manual_seed(0)
    method = method_of(batch_size=16, queue_size=128)
    health, keys = Health(method, 0, "split"), torch.nn.functional.normalize(torch.randn(16, 16, 128), dim=2)
    for of_step in keys[:8]:
        method.queues["single"].enqueue(of_step)
    assert health.look(8, {})[0]["queue_renewed_single"] == 1
    monkeypatch.setattr(KeyQueue, "enqueue", at_the_start)
    for of_step in keys[8:]:
        method.queues["single"].enqueue(of_step)
    figures, warnings = health.look(16, {})
    assert figures["queue_renewed_single"] == 1 / 8
    assert any("the single queue is stuck: 12 % of the keys that 8 steps" in sentence for sentence in warnings)


def test_keys_that_are_all_alike_are_noticed():
    method = method_of()
    health = Health(method, 0, "split")
    one = torch.nn.functional.normalize(torch.randn(128), dim=0)
    keys = torch.nn.functional.normalize(one + 1e-3 * torch.randn(128, 128), dim=1)
    method.queues["single"].enqueue(keys)
    assert not any(
        "collapsed" in sentence for sentence in health.look(2, {})[1]
    )  # an untrained network's keys are alike, too
    method.queues["single"].enqueue(keys.flip(0))
    figures, warnings = health.look(4, {})
    assert figures["queue_mean_length_single"] == pytest.approx(float(keys.double().mean(0).norm()), rel=1e-5)
    assert any("the single keys have collapsed: their mean is 1.000 long" in sentence for sentence in warnings)
    assert not any("collapsed" in sentence for sentence in health.look(6, {})[1])  # said once


def test_answers_that_are_always_right_are_noticed():
    health = Health(method_of(queue_size=4096), 0, "split")
    said = [health.look(step, {"top1_single": 0.999 if step != 3 else 0.98})[1] for step in range(1, 9)]
    leaks = [
        step for step, sentences in enumerate(said, 1) if any("find their key" in sentence for sentence in sentences)
    ]
    assert leaks == [6]  # the third time in a row
    [sentence] = [sentence for sentence in said[5] if "find their key" in sentence]
    assert sentence.startswith(
        "99.9 % of the queries find their key among 4096 others: BatchNorm may give the answer away"
    )
    few = Health(method_of(), 0, "split")  # 128 keys tell nothing
    assert not any("find their key" in s for step in range(1, 9) for s in few.look(step, {"top1_single": 1.0})[1])


def test_figures_do_not_disturb_the_run(tmp_path, monkeypatch):
    """The same losses with and without anybody looking."""
    looked, _ = run(tmp_path / "looked")
    monkeypatch.setattr(Health, "look", lambda self, step, values: ({}, []))
    alone, _ = run(tmp_path / "alone")
    assert [line["loss"] for line in looked] == [line["loss"] for line in alone] and BATCH == 8
