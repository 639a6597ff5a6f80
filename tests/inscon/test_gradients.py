"""Gradients in flat buffers: what the optimizer sees is what autograd would have left."""

import copy

import pytest
import torch
from torch import nn

from inscon.config import OptimConfig
from inscon.gradients import FlatGradients
from inscon.optim import make_optimizer

LAST = torch.channels_last


def network(width=5):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.Conv2d(width, 4, 3), nn.Flatten()
    )


def test_every_gradient_is_a_view_of_one_buffer_in_its_parameters_strides():
    net = network().to(memory_format=LAST)
    flat = FlatGradients(net.parameters())
    [buffer] = flat.buffers
    assert buffer.numel() == sum(p.numel() for p in net.parameters())
    for p in net.parameters():
        assert p.grad.shape == p.shape and p.grad.stride() == p.stride()
        assert p.grad.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    before = [p.grad for p in net.parameters()]
    net(torch.randn(2, 3, 7, 7).to(memory_format=LAST)).square().sum().backward()
    assert all(p.grad is own for p, own in zip(net.parameters(), before, strict=True))  # autograd adds in place
    assert sorted(buffer.tolist()) == sorted(x for p in net.parameters() for x in p.grad.flatten().tolist())


def test_gradients_of_pieces_add_up_and_zero_forgets_them():
    net, x = network(), torch.randn(2, 3, 7, 7)
    plain = copy.deepcopy(net)
    flat = FlatGradients(net.parameters())
    for _ in range(2):
        flat.zero()
        for scale in (1.0, 0.5):
            (scale * net(x)).square().sum().backward()
    for scale in (1.0, 0.5):
        (scale * plain(x)).square().sum().backward()
    for p, expected in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, expected.grad)


def test_what_a_step_leaves_out_has_the_gradient_zero():
    """Also after a step in which it had another; and what is not trained has none."""
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "sometimes": nn.Linear(3, 2), "frozen": nn.Linear(3, 2)})
    net["frozen"].requires_grad_(False)
    flat, x = FlatGradients(net.parameters()), torch.randn(4, 3)
    flat.zero()
    (net["used"](x) + net["sometimes"](x)).sum().backward()
    assert net["sometimes"].weight.grad.abs().sum() > 0
    flat.zero()
    net["used"](x).sum().backward()
    flat.average()  # nothing, on one process
    assert (net["sometimes"].weight.grad == 0).all() and net["used"].weight.grad.abs().sum() > 0
    assert net["frozen"].weight.grad is None


def test_every_type_has_a_buffer_of_its_own():
    net = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2).double()])
    flat = FlatGradients(net.parameters())
    assert [(b.dtype, b.numel()) for b in flat.buffers] == [(torch.float32, 8), (torch.float64, 8)]
    assert all(p.grad.dtype == p.dtype for p in net.parameters())


@pytest.mark.parametrize("optimizer", ["torch-fused", "foreach"])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_steps_equal_those_on_ordinary_gradients_bit_for_bit(optimizer, layout):
    torch.manual_seed(0)
    ours = nn.Sequential(network(211), nn.Linear(36, 7)).to(memory_format=layout)  # sizes that fill no vector register
    theirs = copy.deepcopy(ours)
    flat = FlatGradients(ours.parameters())
    made = [
        make_optimizer(net.parameters(), OptimConfig(lr=0.1, optimizer=optimizer), torch.device("cpu"))[0]
        for net in (ours, theirs)
    ]
    for step in range(5):
        x = torch.randn(4, 3, 7, 7, generator=torch.Generator().manual_seed(step)).to(memory_format=layout)
        for net in (ours, theirs):
            net(x).square().mean().backward()
        for sgd in made:
            sgd.step()
        flat.zero(), made[1].zero_grad()
    for p, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.isfinite(p).all() and torch.equal(p, expected)
