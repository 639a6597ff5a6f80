"""The linear probe: learns what is there to be learned, leaves the backbone alone, goes on where it stopped, keeps the protocol."""

import contextlib
import json
import signal

import pytest
import torch
import torch.nn.functional as F

from inscon.nn.backbones import Backbone
from inscon.transfer import knn
from inscon.transfer.export import digest
from inscon.transfer.linear import Probe, Protocol

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


def batches(start, stop):
    """Pictures of three colors, which are their classes."""
    for step in range(start, stop):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(3, (8,), generator=generator)
        yield (
            F.one_hot(labels, 3).float()[:, :, None, None] + 0.1 * torch.randn(8, 3, 32, 32, generator=generator),
            labels,
        )


@contextlib.contextmanager
def crops(start, stop):
    yield batches(start, stop)


def make_probe(folder, backbone=None, data="data", **protocol):
    torch.manual_seed(0)
    protocol = Protocol(num_classes=3, **{"epochs": 4, "batch_size": 8, "base_lr": 30.0, **protocol})
    return Probe(backbone or Tiny(), protocol, folder, CPU, data)


def train(probe, epochs=None, said=None):
    def say(epoch, figures):
        if said is not None:
            said.append((epoch, figures))
        if epoch == epochs:
            raise KeyboardInterrupt

    return probe.train(crops, STEPS, lambda: probe.evaluate(batches(100, 104)), say, evaluate_every=2)


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
    assert found["top1"] > 0.6 and [epoch for epoch, _ in said] == [1, 2, 3, 4] and set(found) == {"top1"}
    assert ["top1" in figures for _, figures in said] == [False, True, False, True]
    assert [round(figures["lr"], 6) for _, figures in said] == [0.03125, 0.03125, 0.003125, 0.000313]


def test_the_backbone_is_untouched_and_a_touched_one_is_noticed(tmp_path):
    backbone = Tiny()
    backbone.network[1].running_mean.fill_(0.1)
    before = digest(backbone.state_dict())
    probe = make_probe(tmp_path, backbone)
    train(probe)
    assert digest(probe.backbone.state_dict()) == before == probe.before
    assert not any(p.requires_grad or p.grad is not None for p in probe.backbone.parameters())
    with torch.no_grad():
        probe.backbone.network[1].running_var[3] += 1e-6
    with pytest.raises(AssertionError, match="the frozen backbone has changed"):
        probe.check_backbone()


def test_a_stopped_probe_goes_on(tmp_path):
    whole = make_probe(tmp_path / "whole")
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(make_probe(tmp_path / "stopped"), epochs=2)
    again = make_probe(tmp_path / "stopped")
    assert again.step == 2 * STEPS
    train(again)
    assert torch.equal(again.layer.weight, whole.layer.weight)
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="is a probe with another data; set another --out, or delete it"):
        make_probe(tmp_path / "stopped", data="other data")
    with pytest.raises(ValueError, match="is a probe with another epochs and base_lr;"):
        make_probe(tmp_path / "stopped", epochs=5, base_lr=3.0)


@pytest.mark.parametrize(
    ("number", "at"),
    [(signal.SIGTERM, 4), (signal.SIGINT, 4), (signal.SIGTERM, 5), (signal.SIGTERM, "evaluation")],
)
def test_a_probe_that_is_asked_to_stop_goes_on_within_the_epoch(tmp_path, number, at):
    """Steps 4 and 5 are within the second epoch and its last; it is evaluated after the second epoch. Signals come in numbers."""

    def ask_at(step, batches):
        for place, batch in enumerate(batches):
            for _ in range(3 * (place == step)):
                signal.raise_signal(number)
            yield batch

    @contextlib.contextmanager
    def crops_of(start, stop):
        yield ask_at(at, batches(start, stop))

    whole, stopped = make_probe(tmp_path / "whole"), make_probe(tmp_path / "stopped")
    train(whole)
    last = ask_at(1 if at == "evaluation" else None, batches(100, 104))
    assert stopped.train(crops_of, STEPS, lambda: stopped.evaluate(last), lambda *_: None, evaluate_every=2) is None
    again = make_probe(tmp_path / "stopped")
    assert again.step == (6 if at == "evaluation" else at + 1)
    assert train(again) == train(whole)
    assert torch.equal(again.layer.weight, whole.layer.weight)
    lines = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in
             ("whole", "stopped")]  # fmt: skip
    assert [(line["epoch"], line["loss"]) for line in lines[0]] == [(line["epoch"], line["loss"]) for line in lines[1]]


def test_the_learning_rate_fits_the_batch():
    assert Protocol(num_classes=9, batch_size=2048).lr == 240 and Protocol(num_classes=9).lr == 30
    assert [Protocol(num_classes=9).lr_at(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx(
        [30, 30, 3, 3, 0.3, 0.3]
    )
    with pytest.raises(ValueError, match="base_lr must be greater than 0. Found: 0"):
        Protocol(num_classes=9, base_lr=0.0)


def test_a_rate_that_explodes_is_one_sentence(tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"the probe's loss is not finite any more. Found: .*; set a smaller --base-lr than 1e\+40",
    ):
        train(make_probe(tmp_path, base_lr=1e40))


def test_a_layer_that_is_not_finite_is_neither_saved_nor_evaluated(tmp_path):
    """The last step of the second epoch spoils it, after a loss that is sound."""
    probe, said = make_probe(tmp_path / "a"), []
    probe.layer.weight.register_hook(lambda gradient: gradient * (torch.nan if probe.step == 2 * STEPS - 1 else 1))
    with pytest.raises(FloatingPointError, match=r"layer.weight is not .*smaller --base-lr than 30 and another --out"):
        train(probe, said=said)
    assert [epoch for epoch, _ in said] == [1] and make_probe(tmp_path / "a").step == STEPS
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
        knn.monitor(backbone, batches(0, 3), k=3)


# ------------------------------------------------------------------------------------------------------------ neighbors


def rows_of(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 8, generator=generator), dim=1), torch.randint(
        4, (count,), generator=generator
    )


def test_leaving_one_out_equals_a_bank_without_it():
    rows, labels = rows_of(30, 0)
    alone = [knn.accuracy(rows[i : i + 1], labels[i : i + 1], torch.cat([rows[:i], rows[i + 1 :]]),
                          torch.cat([labels[:i], labels[i + 1 :]]), k=5) for i in range(30)]  # fmt: skip
    assert knn.accuracy(rows, labels, rows, labels, k=5, leave_one_out=True) == pytest.approx(sum(alone) / 30)
    assert 0 < sum(alone) < 30
    with pytest.raises(ValueError, match=r"k must lie in 1..29, the size of the bank. Found: 30"):
        knn.accuracy(rows, labels, rows, labels, k=30, leave_one_out=True)


def test_accuracy_in_pieces_is_the_same(monkeypatch):
    rows, labels = rows_of(50, 1)
    whole = knn.accuracy(rows[:20], labels[:20], rows[20:], labels[20:], k=5)
    monkeypatch.setattr(knn, "SIMILARITIES", 100)
    assert knn.accuracy(rows[:20], labels[:20], rows[20:], labels[20:], k=5) == whole
    alone = knn.accuracy(rows, labels, rows, labels, k=5, leave_one_out=True)
    monkeypatch.undo()
    assert knn.accuracy(rows, labels, rows, labels, k=5, leave_one_out=True) == alone


def test_the_monitor_leaves_the_backbone_in_training():
    backbone = Tiny().train()
    before = digest(backbone.state_dict())
    share = knn.monitor(backbone, batches(0, 3), k=3)
    assert backbone.training and digest(backbone.state_dict()) == before and 0 <= share <= 1


def test_a_rank_without_pictures_changes_no_answer(monkeypatch):
    backbone = Tiny().eval()
    rows, labels = knn.features(backbone, [])
    assert rows.shape == (0, 16) and labels.shape == (0,)
    alone = knn.monitor(backbone, batches(0, 3), k=3)
    # Two ranks, this one without pictures: what the other one sends is put before what this one does.
    theirs = knn.features(backbone, batches(0, 3))
    monkeypatch.setattr("inscon.distributed.world_size", lambda: 2)
    monkeypatch.setattr("inscon.distributed.worst", lambda values: {"rows": float(len(theirs[0]))})
    monkeypatch.setattr(
        "inscon.distributed.gather",
        lambda mine: torch.cat([theirs[0] if mine.is_floating_point() else theirs[1], mine]),
    )
    assert knn.monitor(backbone, [], k=3) == alone
