"""Faults that raise no exception are seen, each by its own sentence, and a sound run is left in peace. Batches are noise."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from benchmarks.health import HEALTHY, ROOT
from inscon import train
from inscon.config import Config, ModelConfig, OptimConfig
from inscon.health import Health, effective_rank
from inscon.methods import byol
from inscon.methods.method import Follower, resolve
from inscon.nn.queue import KeyQueue
from inscon.recipes import smoke
from tests.inscon.test_train import BATCH, CPU, PER_EPOCH, batch_of, make_config


def run(tmp_path, total=4, **model):
    config = make_config(tmp_path)
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, **model))
    training = train.set_up(config, CPU, "set A")
    train.train(training, (batch_of(step % 3) for step in range(total)), PER_EPOCH, total)
    file = tmp_path / "warnings.jsonl"
    warnings = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()], warnings


def method_of(batch_size=64, **settings):
    """An untrained one, of the recipe smoke with a smaller network."""
    config = smoke()
    optim = dataclasses.replace(config.optim, batch_size=batch_size)
    model = dataclasses.replace(config.model, backbone="test_resnet", split_size=None)
    settings = {"cell_queue_size": 18 * batch_size, **settings}
    config = dataclasses.replace(
        config, optim=optim, model=model, method=dataclasses.replace(config.method, **settings)
    )
    return resolve(config, 1).method.build(resolve(config, 1), batch_size)


def test_a_sound_run_is_left_in_peace(tmp_path, capsys):
    windows, warnings = run(tmp_path)
    assert warnings == [] and "warning" not in capsys.readouterr().out
    for line in windows:
        assert line["key_moved"] > 0.5 and 0 < line["key_distance"] < 0.5
        assert line["queue_renewed_single"] == line["queue_renewed_cell"] == 1
        assert 0 < line["length_single"] <= 1 <= line["rank_single"] <= 8  # keys of a step


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


def collapses(lengths):
    """The steps at which a run whose log lines have these lengths is told that it has collapsed."""
    method, said = without_queue(), []
    health = Health(method, 0, "sync")
    for step, length in zip(range(10, 10**6, 10), lengths):
        method.online.projector[3].bias.data.add_(1)
        method.after_update()  # or it would be stale
        sentences = health.look(step, {"length_first": length})[1]
        assert all(f"embeddings have collapsed: their mean is {length:.3f} long" in s for s in sentences)
        said += [step] * len(sentences)
    return said


@pytest.mark.parametrize(
    ("lengths", "warned"),
    [
        ([0.987, 0.99, 0.991, 0.987, 0.95, 0.9], []),  # a fresh network, whose embeddings are all alike
        ([0.9, 0.96, 0.987, 0.988, 0.98, 0.9], []),  # at first all move one way
        ([0.999, 0.999, 0.999, 0.999, 0.999], []),  # nothing has moved yet, in a warm-up
        ([0.3, 0.2, 0.9, 0.95, 0.3], []),
        ([0.873, 0.913, 0.961, 0.985, 0.992, 0.997], [60]),
        ([0.987, 0.99, 0.995, 0.998, 0.9999], [50]),  # fresh, and then worse
        ([0.9, 0.5, 0.4, 0.5, 0.997, 0.3, 0.997], [50]),  # late; said once
    ],
)
def test_embeddings_that_come_closer_until_they_are_one_are_noticed(lengths, warned):
    assert collapses(lengths) == warned


RECORDED = json.loads((ROOT / "benchmarks/results/health.json").read_text())["runs"]


def judged(name):
    """The lengths of a recorded run."""
    figures = RECORDED[name]["figures"]
    return [values for figure, values in figures.items() if figure.startswith("length_")]


@pytest.mark.parametrize("name", sorted({"healthy", *HEALTHY} & set(RECORDED)))
def test_sound_runs_that_were_recorded_are_left_in_peace(name):
    assert judged(name) and RECORDED[name]["warnings"] == []
    for lengths in judged(name):
        assert collapses(lengths) == []


def test_they_are_ten():
    assert set(HEALTHY) <= set(RECORDED) and len(HEALTHY) == 10


@pytest.mark.parametrize("name", ["alike", "collapse"])
def test_a_collapse_that_was_recorded_is_noticed_in_time(name):
    for lengths in judged(name):
        [step] = collapses(lengths)
        assert step <= 150  # of a log line in 10 steps


def test_the_effective_rank_is_that_of_the_definition():
    one, dim = torch.nn.functional.normalize(torch.randn(16), dim=0), 16
    assert effective_rank(one.expand(100, dim)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(torch.eye(dim).repeat(5, 1)) == pytest.approx(dim)
    assert effective_rank(torch.eye(dim)[:4].repeat(3, 1)) == pytest.approx(4, abs=1e-5)  # of 16 dimensions, 4 used
    assert effective_rank(torch.zeros(5, dim)) == 1
    rows = torch.randn(7, dim, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, dim)  # 7 < 16
    share = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    share /= share.sum()
    assert effective_rank(rows) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-5)


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


def test_keys_that_become_alike_are_noticed():
    method, generator = method_of(), torch.Generator().manual_seed(0)
    health = Health(method, 0, "split")
    one = torch.nn.functional.normalize(torch.randn(128, generator=generator), dim=0)

    def look(step, apart):
        """After 64 new keys, half of the queue."""
        keys = torch.nn.functional.normalize(one + apart * torch.randn(64, 128, generator=generator), dim=1)
        method.queues["single"].enqueue(keys)
        figures, warnings = health.look(step, {})
        assert figures["length_single"] == pytest.approx(
            float(keys.double().mean(0).norm()), rel=1e-5
        )  # of the new ones
        assert figures["rank_single"] == pytest.approx(effective_rank(keys), rel=1e-5)
        return [sentence for sentence in warnings if "collapsed" in sentence]

    assert look(1, apart=0.01) == []  # an untrained network's are alike, too
    assert look(2, apart=0.05) == []
    [sentence] = look(3, apart=1e-4)
    assert sentence.startswith(
        "the single embeddings have collapsed: their mean is 1.000 long, where 1 says that all are"
    )
    assert look(4, apart=1e-4) == []  # said once


def test_keys_that_are_all_the_same_number_by_number_are_no_stuck_queue():
    method = method_of()
    health, queue = Health(method, 0, "split"), method.queues["single"]
    queue.enqueue(torch.nn.functional.normalize(torch.randn(64, 128), dim=1))
    health.look(1, {})
    same = torch.nn.functional.normalize(torch.ones(64, 128), dim=1)
    said = []
    for step in range(2, 6):
        queue.enqueue(same)
        said += health.look(step, {})[1]
    assert sum("the single embeddings have collapsed" in s for s in said) == 1
    assert not any("the single queue is stuck" in s for s in said)


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
