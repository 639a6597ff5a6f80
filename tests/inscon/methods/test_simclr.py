"""The step against SimCLR written out independently, and cases worked by hand."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inscon.config import OptimConfig
from inscon.methods import simclr
from inscon.methods.simclr import twin_logits
from inscon.nn.loss import unit
from inscon.optim import make_optimizer
from tests.inscon.methods.steps import BATCH, backward, logged, make_batch, make_method, timms
from tests.inscon.test_optim import lars_step

SETTINGS = simclr.Settings()


def loss_by_hand(z, temperature):
    """Of 2B unit vectors, of which i and i + B are views of one image: anchor by anchor."""
    count, terms = len(z), []
    for i in range(count):
        similarity = [(z[i] * z[j]).sum() / temperature for j in range(count)]
        others = torch.stack([similarity[j] for j in range(count) if j != i])
        terms.append(others.logsumexp(0) - similarity[(i + count // 2) % count])
    return torch.stack(terms).mean()


def test_steps_are_simclrs():
    """timm's network with a head, all views as one batch, LARS, float64."""
    ours = make_method(SETTINGS, backbone="test_resnet")
    features = ours.backbone.channels[32]
    head = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, 128)).double()
    head.load_state_dict(copy.deepcopy(ours.head.state_dict()))
    net = nn.Sequential(timms(ours.backbone), head)
    theirs = lambda name: name.replace("backbone.network.", "0.").replace("head.", "1.")  # noqa: E731
    config = OptimConfig(lr=2.0, weight_decay=0.01, optimizer="lars", decay_norm_and_bias=False)
    optimizer, _ = make_optimizer(ours.param_groups(), config, torch.device("cpu"))
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(3):
        batch = make_batch(SETTINGS, seed=step)
        figures = logged(backward(ours, batch)[1])
        pixels = torch.cat([batch.views[name].pixels.contiguous() for name in ("first", "second")])
        z = F.normalize(net(pixels), dim=1)
        loss = loss_by_hand(z, SETTINGS.temperature)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        torch.testing.assert_close(figures["loss"], loss.detach(), rtol=1e-9, atol=1e-9)
        similarity = (z @ z.T).detach().fill_diagonal_(-9)
        right = similarity.argmax(1) == torch.arange(2 * BATCH).roll(BATCH)
        assert figures["top1_twin"].item() == pytest.approx(right.double().mean().item())
        assert figures["length_twin"].item() == pytest.approx(z.mean(0).norm().item())
        by_name = {name: gradient for (name, _), gradient in zip(net.named_parameters(), gradients, strict=True)}
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, by_name[theirs(name)], rtol=1e-7, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for (name, p), gradient in zip(net.named_parameters(), gradients, strict=True):
                lars_step(p, gradient, velocity[name], lr=2.0, weight_decay=0.01)


@pytest.mark.parametrize("images", [1, 2, 8])
def test_views_that_are_all_alike_are_told_apart_by_chance(images):
    """log of the 2B - 1 others."""
    logits, twins = twin_logits(torch.ones(2 * images, 4, dtype=torch.float64) / 2, 0.1)
    assert F.cross_entropy(logits, twins).item() == pytest.approx(math.log(2 * images - 1))


def test_two_images_that_differ_by_a_right_angle():
    z = torch.eye(2, dtype=torch.float64).repeat(2, 1)
    logits, twins = twin_logits(z, 0.5)
    expected = torch.tensor(
        [[-torch.inf, 0, 2, 0], [0, -torch.inf, 0, 2], [2, 0, -torch.inf, 0], [0, 2, 0, -torch.inf]]
    )
    assert torch.equal(logits, expected.double()) and twins.tolist() == [2, 3, 0, 1]
    assert F.cross_entropy(logits, twins).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_logits_stay_in_full_precision_under_autocast():
    z = unit(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = twin_logits(z, 0.1)[0]
    assert logits.dtype == torch.float32 and torch.equal(logits, twin_logits(z, 0.1)[0])
