"""The step against BYOL written out independently, its schedule, and cases worked by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inscon.config import ViewConfig
from inscon.methods import byol, pixpro
from tests.inscon.methods.steps import backward, logged, make_batch, make_method, timms

SETTINGS = byol.Settings(hidden_dim=48, embedding_dim=24, target_momentum=0.6)


def head(ours):
    """Of the weights of ours, and with a bias before BatchNorm, as published: it changes nothing."""
    hidden, features = ours[0].weight.shape
    made = nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 24)).double()
    missing = made.load_state_dict(copy.deepcopy(ours.state_dict()), strict=False)
    assert missing.missing_keys == ["0.bias"] and not missing.unexpected_keys
    return made


def theirs(name):
    return name.replace("backbone.network.", "0.").replace("projector.", "1.")


def test_steps_are_byols():
    """Every step has a momentum of its own, which moves the target after its update; the step after it meets that target."""
    ours, total = make_method(SETTINGS, backbone="test_resnet"), 4
    online = nn.Sequential(timms(ours.backbone), head(ours.online.projector))
    predictor = head(ours.predictor)
    target = copy.deepcopy(online)
    optimizer = torch.optim.SGD(ours.param_groups(), lr=0.05)
    trained = [*online.parameters(), *predictor.parameters()]
    names = [f"online.{name}" for name, _ in online.named_parameters()]
    names += [f"predictor.{name}" for name, _ in predictor.named_parameters()]
    for step in range(total):
        batch = make_batch(SETTINGS, seed=step)
        figures = logged(backward(ours, batch, step, total)[1])
        x1, x2 = (batch.views[name].pixels.contiguous() for name in ("first", "second"))
        with torch.no_grad():
            z1, z2 = target(x1), target(x2)
        losses = [
            torch.stack([2 - 2 * F.cosine_similarity(p, z, dim=0) for p, z in zip(predicted, aim, strict=True)]).mean()
            for predicted, aim in ((predictor(online(x1)), z2), (predictor(online(x2)), z1))
        ]
        gradients = torch.autograd.grad(sum(losses), trained)
        assert figures["loss_first"].item() == pytest.approx(losses[0].item(), rel=1e-9)
        assert figures["loss"].item() == pytest.approx(sum(losses).item(), rel=1e-9)
        length = torch.stack([z / z.norm() for z in z2]).mean(0).norm()
        assert figures["length_first"].item() == pytest.approx(length.item())
        by_name = dict(zip(names, gradients, strict=True))
        for name, p in ours.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, by_name[theirs(name)], rtol=1e-6, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        ours.after_update()
        momentum = 1 - (1 - 0.6) * (math.cos(math.pi * step / total) + 1) / 2
        with torch.no_grad():
            for p, gradient in zip(trained, gradients, strict=True):
                p -= 0.05 * gradient
            for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
                slow.copy_(momentum * slow + (1 - momentum) * fast)
        moved = dict(target.named_parameters())
        for name, p in ours.target.named_parameters():
            torch.testing.assert_close(p, moved[theirs(name)], rtol=1e-7, atol=1e-10)


def test_the_momentum_rises_to_one_along_a_cosine():
    method, seen = make_method(SETTINGS, backbone="test_resnet", dtype=torch.float32), []
    for step in (0, 25, 50, 75, 100):
        method.schedule(step, 100)
        seen.append(method.followers[0].momentum)
    assert seen == pytest.approx([0.6, 0.6 + 0.4 * (1 - math.cos(math.pi / 4)) / 2, 0.8,
                                  0.6 + 0.4 * (1 + math.cos(math.pi / 4)) / 2, 1.0])  # fmt: skip


@pytest.mark.parametrize(("turn", "expected"), [(1.0, 0.0), (-2.0, 8.0)])
def test_predictions_that_are_their_targets_cost_nothing_and_opposite_ones_eight(turn, expected):
    """Lengths don't count."""
    method, batch = make_method(SETTINGS, backbone="test_resnet"), make_batch(SETTINGS)
    targets = {name: torch.randn(8, 24, dtype=torch.float64) for name in ("first", "second")}
    made = iter([targets["second"], targets["first"]])
    method.online.forward = lambda pixels: next(made)
    method.predictor = nn.Linear(24, 24, bias=False).double()
    method.predictor.weight.data = turn * torch.eye(24, dtype=torch.float64)
    total = sum(method.losses(name, batch, targets).total.item() for name in ("first", "second"))
    assert total == pytest.approx(expected)


@pytest.mark.parametrize("settings", [byol.Settings(), pixpro.Settings()], ids=["byol", "pixpro"])
def test_views_are_colored_differently(settings):
    first, second = settings.view_specs(ViewConfig(blur_probability=1.0, saturation=0.2))
    assert (first.color.blur_probability, first.color.solarize_probability) == (1.0, 0.0)
    assert (second.color.blur_probability, second.color.solarize_probability) == (0.1, 0.2)
    assert first.color.saturation == second.color.saturation == 0.2 and second.color.solarize_threshold == 128


def test_the_target_gets_no_gradient_and_is_no_part_of_what_is_trained():
    method = make_method(SETTINGS, backbone="test_resnet")
    backward(method, make_batch(SETTINGS))
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    [group] = method.param_groups()
    assert len(group["params"]) == len([*method.online.parameters(), *method.predictor.parameters()])
    assert all(p.grad is not None for p in group["params"]) and method.backbone is method.online.backbone
