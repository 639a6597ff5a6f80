"""SGD by any implementation, LARS, and the schedule of the rate."""

import math
import sys
import types

import pytest
import torch
from torch import nn

from inscon.config import OptimConfig
from inscon.methods.method import Follower, slow_copy
from inscon.optim import _find_apex_sgd, asks_the_host, learning_rate, make_optimizer, set_learning_rate


def test_cosine_per_epoch_and_per_step():
    per_epoch = OptimConfig(lr=1.0, epochs=4)
    assert [round(learning_rate(per_epoch, s, 10), 6) for s in (0, 9, 10, 19, 20, 30, 39)] == [
        1.0, 1.0, 0.853553, 0.853553, 0.5, 0.146447, 0.146447,
    ]  # fmt: skip
    per_step = OptimConfig(lr=1.0, epochs=4, schedule="cosine-step")
    assert learning_rate(per_step, 20, 10) == pytest.approx(0.5) and learning_rate(per_step, 5, 10) < 1.0
    assert learning_rate(per_step, 40, 10) == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["auto", "torch-fused", "foreach"])
def test_every_optimizer_is_sgd_with_momentum_and_decay(name):
    torch.manual_seed(0)
    weight = torch.randn(7, 3)
    p, velocity, expected = nn.Parameter(weight.clone()), torch.zeros(7, 3), weight.clone()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer, chosen = make_optimizer([p, frozen], OptimConfig(lr=0.1, optimizer=name), torch.device("cpu"))
    assert chosen == ("torch-fused" if name == "auto" else name)
    assert (asks_the_host(optimizer, scaled=False), asks_the_host(optimizer, scaled=True)) == (name == "foreach",) * 2
    for i in range(4):
        gradient = torch.randn(7, 3, generator=torch.Generator().manual_seed(i))
        p.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 1e-4 * expected
        expected = expected - 0.1 * velocity
    torch.testing.assert_close(p.data, expected)


def test_a_rate_on_the_device_is_filled_and_a_scaler_needs_an_optimizer_that_skips_there():
    p = nn.Parameter(torch.ones(3))
    fused, _ = make_optimizer([p], OptimConfig(lr=0.1), torch.device("cpu"))
    rate = fused.param_groups[0]["lr"]
    set_learning_rate(fused, 0.25)
    assert fused.param_groups[0]["lr"] is rate and rate.item() == 0.25
    plain = torch.optim.SGD([p], lr=torch.tensor(0.1))
    assert not asks_the_host(plain, scaled=False) and asks_the_host(plain, scaled=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_apex_equals_torchs_fused_sgd():
    if _find_apex_sgd() is None:
        pytest.skip("NVIDIA's apex is not installed")
    weights = {}
    for name in ("apex", "torch-fused"):
        p = nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda"))
        optimizer, chosen = make_optimizer([p], OptimConfig(lr=0.1, optimizer=name), torch.device("cuda"))
        assert chosen == name
        for i in range(20):
            p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(i)).cuda()
            optimizer.step()
        weights[name] = p.detach().cpu()
    torch.testing.assert_close(weights["apex"], weights["torch-fused"], rtol=1e-6, atol=1e-7)


def test_apex_is_refused_where_it_is_not_really_there(monkeypatch):
    with pytest.raises(ValueError, match="needs NVIDIA's apex.*set --optimizer auto"):
        make_optimizer([nn.Parameter(torch.ones(1))], OptimConfig(optimizer="apex"), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # the web toolkit of that name
    assert _find_apex_sgd() is None


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody filled holds NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


def test_the_rate_warms_up_in_a_line_and_then_follows_the_cosine():
    config = OptimConfig(lr=2.0, epochs=6, warmup_epochs=2, schedule="cosine-step")
    assert [learning_rate(config, step, 10) for step in (0, 1, 10, 19)] == pytest.approx([0.0, 0.1, 1.0, 1.9])
    assert [learning_rate(config, step, 10) for step in (20, 40, 60)] == pytest.approx([2.0, 1.0, 0.0])
    by_epoch = OptimConfig(lr=2.0, epochs=6, warmup_epochs=2)
    assert [learning_rate(by_epoch, step, 10) for step in (5, 29, 49)] == pytest.approx([0.5, 2.0, 1.0])


def lars_step(p, gradient, velocity, lr, weight_decay, momentum=0.9, trust=0.001):
    """In place, from the equation: vectors are neither adapted nor decayed."""
    factor = 1.0
    if p.ndim > 1:
        gradient = gradient + weight_decay * p
        lengths = [math.sqrt(sum(value * value for value in t.flatten().tolist())) for t in (p, gradient)]
        factor = trust * lengths[0] / lengths[1] if all(lengths) else 1.0
    velocity.copy_(momentum * velocity + factor * gradient)
    p.sub_(lr * velocity)


SHAPES = {"conv": (5, 3, 2, 2), "linear": (4, 7), "bias": (5,), "norm": (5,), "zero": (2, 2), "still": (3, 2)}


def lars_of(decay=False, **settings):
    """(weights, copies of them in float64, the optimizer): one is all zeros."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    weights["zero"].data.zero_()
    config = OptimConfig(optimizer="lars", decay_norm_and_bias=decay, **settings)
    optimizer, name = make_optimizer([{"params": list(weights.values())}], config, torch.device("cpu"))
    assert name == "lars"
    return weights, {name: p.detach().double() for name, p in weights.items()}, optimizer


def gradients_of(step):
    """Of each weight; one has none that differs from 0."""
    generator = torch.Generator().manual_seed(step)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return made | {"still": torch.zeros(SHAPES["still"])}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.02])
def test_lars_is_its_equation(as_tensor, weight_decay):
    weights, expected, optimizer = lars_of(lr=3.0, weight_decay=weight_decay)
    velocity = {name: torch.zeros_like(p) for name, p in expected.items()}
    for step, lr in enumerate((3.0, 2.0, 0.0, 1.0)):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr) if as_tensor else lr
        for name, gradient in gradients_of(step).items():
            weights[name].grad = gradient.clone()
            lars_step(expected[name], gradient.double(), velocity[name], lr, weight_decay)
        optimizer.step()
    for name, p in weights.items():
        torch.testing.assert_close(p.detach().double(), expected[name], rtol=1e-5, atol=1e-6)
        held = optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(held.double(), velocity[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(weights["zero"], torch.zeros(2, 2)) and torch.equal(
        weights["still"], lars_of()[0]["still"]
    ) == (weight_decay == 0)


def test_lars_asks_the_device_nothing():
    from tests.inscon.methods.test_method import NobodyWaits  # which needs packages that a machine with a GPU may lack

    weights, _, optimizer = lars_of()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    for name, gradient in gradients_of(0).items():
        weights[name].grad = gradient
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with NobodyWaits():
        optimizer.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_lars_and_a_slow_copy_are_captured_with_rates_that_change():
    """As one CUDA graph, replayed; against the same steps on the CPU."""
    rates, momenta, made = [3.0, 2.0, 1.0, 0.5], [0.9, 0.5, 0.7, 1.0], {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).to(device)
        follower = Follower(slow_copy(net), net, 0.9)
        config = OptimConfig(optimizer="lars", decay_norm_and_bias=False, weight_decay=0.01)
        optimizer, _ = make_optimizer(net.parameters(), config, torch.device(device))
        lr = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in net.parameters():
            p.grad = torch.zeros_like(p)

        def step(optimizer=optimizer, follower=follower):
            optimizer.step()
            follower.move()

        follower.schedule(0.9)
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for number, (rate, momentum) in enumerate(zip(rates, momenta, strict=True)):
            lr.fill_(rate)
            follower.schedule(momentum)
            for p in net.parameters():
                p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)))
            step()
        made[device] = [p.detach().cpu() for p in (*net.parameters(), *follower.slow)]
    for cpu, gpu in zip(made["cpu"], made["cuda"], strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["torch-fused", "foreach", "lars"])
def test_vectors_may_go_without_decay(name):
    """Groups that a method gives keep what else they say."""
    matrix, vector, other = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,), (3, 3)))
    config = OptimConfig(optimizer=name, decay_norm_and_bias=False, weight_decay=0.5)
    given = [{"params": [matrix, vector]}, {"params": [other], "momentum": 0.0}]
    optimizer, _ = make_optimizer(given, config, torch.device("cpu"))
    found = [(group["params"], group["weight_decay"], group["momentum"]) for group in optimizer.param_groups]
    assert found == [([matrix], 0.5, 0.9), ([vector], 0.0, 0.9), ([other], 0.5, 0.0)]
    [group] = make_optimizer([matrix, vector], OptimConfig(optimizer=name), torch.device("cpu"))[0].param_groups
    assert group["params"] == [matrix, vector]


DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]  # fmt: skip


@pytest.mark.parametrize("name", ["torch-fused", "lars"])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_steps_with_an_overflow_never_were(device, loaded, name, poisoned):
    """Under a gradient scaler, against plain SGD in float64 over the other steps, which LARS is for a vector. `loaded`: after the
    state of an optimizer that had no momentum yet."""
    p = nn.Parameter(torch.linspace(-1, 1, 21, device=device))
    expected, velocity = p.detach().double().cpu(), torch.zeros(21, dtype=torch.float64)
    settings = OptimConfig(lr=0.1, optimizer=name)
    optimizer, _ = make_optimizer([p], settings, torch.device(device))
    if loaded:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    scaler = torch.amp.GradScaler(device, init_scale=65536.0)
    for step in range(8):
        gradient = torch.randn(21, generator=torch.Generator().manual_seed(step))
        overflows = step in (0, 1, 4)
        scaler.scale((p * gradient.to(device)).sum()).backward()
        if overflows:
            p.grad[3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not overflows:
            velocity = 0.9 * velocity + gradient.double() + 1e-4 * expected
            expected = expected - 0.1 * velocity
    assert scaler.get_scale() == 65536 / 8
    torch.testing.assert_close(p.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)
