"""The linear probe: learns what is there to be learned, leaves the backbone alone, goes on where it stopped, keeps the protocol."""

import contextlib
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from inscon.nn.backbones import Backbone
from inscon.transfer import knn
from inscon.transfer.export import digest
from inscon.transfer.linear import Probe, Protocol
from pipelines.evaluation import LabelledViews

CPU, STEPS = torch.device("cpu"), 3


class Tiny(Backbone):
    """A convolution and a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.network, self.channels = (
            torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, 4), torch.nn.BatchNorm2d(16)),
            {4: 16},
        )

    def forward(self, pixels):
        return {4: self.network(pixels).relu()}


class Drifting(Tiny):
    """One whose statistics move though it is frozen."""

    def forward(self, pixels):
        with torch.no_grad():
            self.network[1].running_var[3] += 1e-6
        return super().forward(pixels)


def batches(start, stop):
    """Pictures of three colors, which are their classes."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(3, (8,), generator=generator)
        yield (
            F.one_hot(labels, 3).float()[:, :, None, None] + 0.1 * torch.randn(8, 3, 32, 32, generator=generator),
            labels,
        )


class Index(str):
    """Its own fingerprint, of as many samples as make `STEPS` batches of 8."""

    fingerprint = property(str)

    def __len__(self):
        return 8 * STEPS


class Views(LabelledViews):
    """As much as a probe asks for."""

    labels = torch.arange(3)

    def __init__(self, fingerprint="data", view_size=32):
        self.index, self.view_size = Index(fingerprint), view_size

    @contextlib.contextmanager
    def random_crops(self, start, stop):
        yield batches(start, stop)

    def center_crops(self):
        return batches(100, 104)


def make_probe(folder, backbone=None, data="data", view_size=32, **protocol):
    torch.manual_seed(0)
    protocol = Protocol(**{"epochs": 4, "batch_size": 8, "base_lr": 30.0, **protocol})
    return Probe(backbone or Tiny(), protocol, (Views(data, view_size), Views()), folder, CPU)


def train(probe, epochs=None, said=None):
    """Killed after so many epochs; returns the last evaluation."""
    for figures in itertools.islice(probe.train(), epochs):
        if said is not None:
            said.append(figures)
    return probe.evaluate()


def test_a_probe_equals_the_protocol_written_out(tmp_path):
    """Against a loop with the features taken once: N(0, 0.01), momentum 0.9, no decay, lr / 10 at 60 % and 80 %, lr by batch."""
    probe = make_probe(tmp_path, base_lr=1.0)
    weight, bias = probe.layer.weight.detach().clone().requires_grad_(), torch.zeros(3, requires_grad=True)
    assert weight.std().item() == pytest.approx(0.01, rel=0.1) and not probe.layer.bias.any()
    said = []
    found = train(probe, said=said)
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for step, (pixels, labels) in enumerate(batches(0, 4 * STEPS)):
        lr = 1 * 8 / 256 * (1 if step // STEPS < 2 else 0.1 if step // STEPS < 3 else 0.01)
        with torch.no_grad():
            pooled = probe.backbone(pixels)[4].mean((2, 3))
        loss = F.cross_entropy(pooled @ weight.T + bias, labels)
        for i, (parameter, gradient) in enumerate(zip((weight, bias), torch.autograd.grad(loss, (weight, bias)))):
            velocity[i] = 0.9 * velocity[i] + gradient
            parameter.data -= lr * velocity[i]
    torch.testing.assert_close(probe.layer.weight, weight, rtol=1e-3, atol=1e-5)
    assert found["top1"] > 0.6 and [figures["epoch"] for figures in said] == [1, 2, 3, 4] and set(found) == {"top1"}
    assert all(figures["top1"] > 0.3 for figures in said) and said[-1]["top1"] == found["top1"]
    assert [round(figures["lr"], 6) for figures in said] == [0.03125, 0.03125, 0.003125, 0.000313]


def test_the_backbone_is_untouched_and_a_touched_one_is_noticed(tmp_path):
    backbone = Tiny()
    backbone.network[1].running_mean.fill_(0.1)
    before = digest(backbone.state_dict())
    probe = make_probe(tmp_path, backbone)
    train(probe)
    assert digest(probe.backbone.state_dict()) == before == probe.before
    assert not any(p.requires_grad or p.grad is not None for p in probe.backbone.parameters())
    with pytest.raises(AssertionError, match="the frozen backbone has changed"):
        train(make_probe(tmp_path / "other", Drifting()))


def test_a_stopped_probe_goes_on(tmp_path):
    whole = make_probe(tmp_path / "whole")
    train(whole)
    train(make_probe(tmp_path / "stopped"), epochs=2)
    again = make_probe(tmp_path / "stopped")
    assert again.epoch == 2
    assert train(again) == train(whole)  # which has no epoch left
    assert torch.equal(again.layer.weight, whole.layer.weight)
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="is a probe with another data; set another --out, or delete it"):
        make_probe(tmp_path / "stopped", data="other data")
    with pytest.raises(ValueError, match="is a probe with another view_size;"):
        make_probe(tmp_path / "stopped", view_size=64)
    held = torch.load(tmp_path / "stopped/probe.pt")
    held["identity"].pop("view_size")  # as before it was there
    torch.save(held, tmp_path / "stopped/probe.pt")
    assert make_probe(tmp_path / "stopped").epoch == 4
    held["identity"].pop("format")  # as before there was one, with other contents
    torch.save(held, tmp_path / "stopped/probe.pt")
    with pytest.raises(ValueError, match="is a probe with another format;"):
        make_probe(tmp_path / "stopped")
    held["identity"]["format"] = 2
    torch.save(held, tmp_path / "stopped/probe.pt")
    with pytest.raises(ValueError, match="is a probe with another epochs and base_lr;"):
        make_probe(tmp_path / "stopped", epochs=5, base_lr=3.0)


def test_a_probe_killed_within_an_epoch_goes_on_from_the_one_before(tmp_path):
    whole, killed = make_probe(tmp_path / "whole"), make_probe(tmp_path / "killed")
    train(whole)
    killed.layer.weight.register_hook(lambda _: (_ for _ in ()).throw(KeyboardInterrupt) if killed.epoch == 2 else None)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    again = make_probe(tmp_path / "killed")
    train(again)
    assert torch.equal(again.layer.weight, whole.layer.weight)
    assert (tmp_path / "killed/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()


def test_the_learning_rate_fits_the_batch():
    assert Protocol(batch_size=2048).lr_at(0) == 240
    assert [Protocol().lr_at(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    with pytest.raises(ValueError, match="--base-lr must be at least 1e-09"):
        Protocol(base_lr=0.0)


def test_a_rate_that_explodes_is_one_sentence(tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"the probe's loss is not finite any more. Found: .*; set a smaller --base-lr than 1e\+40",
    ):
        train(make_probe(tmp_path, base_lr=1e40))


def test_a_layer_that_is_not_finite_is_neither_saved_nor_evaluated(tmp_path):
    """The last step of the second epoch spoils it, after a loss that is sound."""
    probe, said, steps = make_probe(tmp_path / "a"), [], itertools.count(1)
    probe.layer.weight.register_hook(lambda gradient: gradient * (torch.nan if next(steps) == 2 * STEPS else 1))
    with pytest.raises(FloatingPointError, match=r"layer.weight is not .*smaller --base-lr than 30 and another --out"):
        train(probe, said=said)
    assert [figures["epoch"] for figures in said] == [1] and make_probe(tmp_path / "a").epoch == 1
    assert train(make_probe(tmp_path / "b", base_lr=15.0))["top1"] > 0.5  # as the sentence advises


def test_a_probe_that_cannot_be_written_is_named_and_leaves_no_rest(tmp_path, small_files):
    probe = make_probe(tmp_path)
    (tmp_path / "probe.unfinished").write_bytes(b"of a killed process")
    with small_files(1000), pytest.raises(OSError, match="File too large") as found:
        train(probe)
    assert found.value.filename == str(tmp_path / "probe.pt") and list(tmp_path.iterdir()) == []


def test_features_that_are_not_finite_are_no_features():
    backbone = Tiny().eval()
    with torch.no_grad():
        backbone.network[1].weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="24 of 24 pictures have features that are not finite"):
        knn.monitor(backbone, batches(0, 3))


# ------------------------------------------------------------------------------------------------------------ neighbors


def rows_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 8, generator=generator), dim=1), torch.randint(
        4, (count,), generator=generator
    )


def test_leaving_one_out_equals_a_bank_without_it():
    rows, labels = rows_of(30, 0)
    others = [torch.arange(30) != i for i in range(30)]
    alone = [knn.accuracy((rows[~o], labels[~o]), (rows[o], labels[o]), k=5) for o in others]
    assert knn.accuracy((rows, labels), None, k=5) == pytest.approx(sum(alone) / 30)
    assert 0 < sum(alone) < 30
    with pytest.raises(ValueError, match=r"k must lie in 1..29, the size of the bank. Found: 30; set --k 29"):
        knn.accuracy((rows, labels), None, k=30)


def test_accuracy_in_pieces_is_the_same(monkeypatch):
    every, bank = rows_of(50, 1), rows_of(30, 2)
    whole, alone = knn.accuracy(every, bank, k=5), knn.accuracy(every, None, k=5)
    monkeypatch.setattr(knn, "SIMILARITIES", 100)
    assert (knn.accuracy(every, bank, k=5), knn.accuracy(every, None, k=5)) == (whole, alone)


def test_the_monitor_leaves_the_backbone_in_training():
    backbone = Tiny().train()
    before = digest(backbone.state_dict())
    share = knn.monitor(backbone, batches(0, 3))
    assert backbone.training and digest(backbone.state_dict()) == before and 0 <= share <= 1


def test_a_rank_without_pictures_changes_no_answer(monkeypatch):
    backbone = Tiny().eval()
    rows, labels = knn.features(backbone, [])
    assert rows.shape == (0, 16) and labels.shape == (0,)
    alone = knn.monitor(backbone, batches(0, 3))
    # Two ranks, this one without pictures: what the other one sends is put before what this one does.
    theirs = knn.features(backbone, batches(0, 3))
    monkeypatch.setattr("inscon.distributed.world_size", lambda: 2)
    monkeypatch.setattr("inscon.distributed.worst", lambda values: {"rows": float(len(theirs[0]))})
    monkeypatch.setattr(
        "inscon.distributed.gather",
        lambda mine: torch.cat([theirs[0] if mine.is_floating_point() else theirs[1], mine]),
    )
    assert knn.monitor(backbone, []) == alone
