"""The fused kernels against BatchNorm in float64, and fused networks against plain ones. Without a GPU they are interpreted."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torchvision

triton = pytest.importorskip("triton", reason="Triton is not installed")

from inscon.nn import fused_norm, fused_pool
from inscon.nn.backbones import Backbone, build_backbone
from inscon.nn.fused_norm import FusedBatchNorm2d, batch_norm, channels_last, fuse, refusal
from inscon.nn.fused_pool import FusedMaxPool2d
from inscon.nn.norm import frozen_statistics, split_batch_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
DIGITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def in_float64(x, weight, bias, running, groups, momentum, residual, relu):
    """By the formula, and the running statistics after it."""
    made, (mean, variance) = [], [value.double() for value in running]
    wide = lambda value: value[:, None, None]  # noqa: E731
    for part in x.chunk(groups):
        count = part.numel() // part.shape[1]
        m, v = part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0)
        mean = mean + momentum * (m.detach() - mean)
        variance = variance + momentum * (v.detach() * count / max(count - 1, 1) - variance)
        made.append((part - wide(m)) / (wide(v) + 1e-5).sqrt() * wide(weight) + wide(bias))
    made = torch.cat(made) if residual is None else torch.cat(made) + residual
    return made.relu() if relu else made, mean, variance


def apart(ours, exact):
    """The largest difference, in the largest value."""
    return (ours.double() - exact).abs().max().item() / max(exact.abs().max().item(), 1e-9)


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize(("shape", "groups", "add", "relu"), [
    ((8, 70, 5, 3), 2, True, True),  # more channels than a tile, and not a multiple; less than a tile of rows
    ((4, 64, 16, 16), 1, False, True),
    ((6, 3, 1, 1), 6, True, False),  # one row in a group
    ((2, 5, 9, 17), 1, False, False),  # more slices than one, the last one short
    ((4, 4, 17, 31), 2, True, True),  # more than one round of a slice, the last one short
    ((2, 70, 17, 17), 1, True, True),  # slices combined in narrower tiles
])  # fmt: skip
def test_values_and_gradients_are_those_of_float64(shape, groups, add, relu, dtype, monkeypatch):
    for name, value in (("PROGRAMS", 12), ("COMBINED", 256)):
        monkeypatch.setattr(fused_norm, name, value)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    x, residual, gradient = (
        channels_last(value).to(DEVICE, dtype) for value in (draw(*shape) + 3, draw(*shape), draw(*shape))
    )
    weight, bias, mean = (draw(shape[1]).to(DEVICE) for _ in range(3))
    variance = mean.square() + 0.1
    given = [x, weight, bias, *([residual] if add else [])]
    ours, exact = (
        [value.clone().requires_grad_() for value in given],
        [value.double().requires_grad_() for value in given],
    )
    running = mean.clone(), variance.clone(), torch.tensor(4, device=DEVICE)
    made = batch_norm(
        *ours[:3], running, groups=groups, momentum=0.1, residual=ours[3] if add else None, relu=relu
    )  # fmt: skip
    expected, *moved = in_float64(*exact[:3], (mean, variance), groups, 0.1, exact[3] if add else None, relu)
    assert made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    assert apart(made, expected) < DIGITS[dtype]
    for value, true in zip(running, [*moved, torch.tensor(5)], strict=True):
        assert apart(value, true) < 2e-6
    made.backward(gradient), expected.backward(gradient.double())
    for value, true in zip(ours, exact, strict=True):
        assert value.grad.dtype == value.dtype and apart(value.grad, true.grad) < 2 * DIGITS[dtype]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from inscon.nn import fused_norm, fused_pool

sizes = dict(ROWS=64, COLUMNS=64, PIECES=64, GROUPS=8)
types = dict.fromkeys(("x", "residual", "y", "gradient", "of_x", "of_residual")) | {"tracked": "*i64", "chosen": "*u8"}
numbers = dict.fromkeys(("rows", "channels", "slices", "rounds", "length", "tiles", "of_all"), "i32")
numbers |= dict.fromkeys(("of_height", "of_width", "height", "width", "pixels"), "i32")
numbers |= dict.fromkeys(("eps", "momentum", "unbiased"), "fp32")
of_norm = ("_of_slices", "_of_group", "_follow", "_forward", "_backward_of_slices", "_backward", "_summed")
kernels = [getattr(fused_norm, name) for name in of_norm] + [fused_pool._max_of_windows, fused_pool._gradient_of_windows]
for kernel in kernels:
    for capability, dtype, flag in ((70, "*fp16", True), (80, "*bf16", False), (90, "*fp32", True)):
        fixed = sizes | {"ADD": flag, "RELU": True}
        signature = {
            a: "constexpr" if a in fixed else numbers.get(a) or types.get(a, "*fp32") or dtype for a in kernel.arg_names
        }
        values = {(place,): fixed[a] for place, a in enumerate(kernel.arg_names) if a in fixed}
        of_16 = {(place,) for place, a in enumerate(kernel.arg_names) if a == "channels" or signature[a][0] == "*"}
        source = ASTSource(kernel, signature, values, dict.fromkeys(of_16, [["tt.divisibility", 16]]))
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm
        assert made["cubin"] and "ld.global.b16" not in made["ptx"]
"""


@pytest.mark.skipif(triton.__version__ < "3.3", reason="compiled by other words before Triton 3.3")
def test_the_kernels_compile(tmp_path):
    """For cards that are not there, V100 included; the interpreter takes programs that the compiler refuses. Halves are not loaded
    one by one."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_large_mean_costs_no_digits():
    x = channels_last(torch.randn(4, 8, 20, 20, generator=torch.Generator().manual_seed(0)) + 1000).to(DEVICE)
    one, zero = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    made = batch_norm(x, one, zero, (zero.clone(), one.clone(), torch.tensor(0, device=DEVICE)), groups=2)
    expected, *_ = in_float64(x.double(), one.double(), zero.double(), (zero, one), 2, 0.1, None, False)
    assert apart(made, expected) < 1e-4  # the pixels themselves are rounded to 6e-5


def test_nan_stays_visible():
    """A value that is none must reach the loss, which stops the run."""
    x = channels_last(torch.ones(2, 3, 4, 4)).to(DEVICE)
    x[0, 1, 2, 3] = torch.nan
    one, zero = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
    made = batch_norm(x, one, zero, (zero.clone(), one.clone(), torch.tensor(0, device=DEVICE)), relu=True)
    assert made[:, 1].isnan().all() and made[:, [0, 2]].isfinite().all()


class Small(Backbone):
    """torchvision's, with fewer channels and blocks, since Triton's interpreter is slow."""

    def __init__(self, block):
        super().__init__()
        self.channels = {32: 32}
        net = self.network = torchvision.models.resnet.ResNet(block, [1, 1, 1, 1])
        net.inplanes, width = 8, 32 // block.expansion
        net.conv1, net.bn1 = torch.nn.Conv2d(3, 8, 7, 2, 3, bias=False), torch.nn.BatchNorm2d(8)
        net.layer1, net.layer2 = net._make_layer(block, width, 1), net._make_layer(block, width, 1, stride=2)

    def forward(self, pixels):
        net = self.network
        return {32: net.layer2(net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(pixels))))))}


def torchvisions(block):
    network = Small(block)
    del network.network.layer3, network.network.layer4, network.network.fc
    return network


@pytest.mark.parametrize(("make", "side", "groups", "blocks"), [
    (lambda: torchvisions(torchvision.models.resnet.BasicBlock), 48, 2, 2),
    (lambda: torchvisions(torchvision.models.resnet.Bottleneck), 48, 1, 2),
    (lambda: build_backbone("test_resnet"), 32, 2, 4),
])  # fmt: skip
@torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
def test_a_fused_network_is_the_plain_one(make, side, groups, blocks):
    torch.manual_seed(0)
    plain = make()
    split_batch_norm(plain, groups, "this")
    plain.to(DEVICE, memory_format=torch.channels_last).train()
    fused = copy.deepcopy(plain)
    fused_pool.fuse(fused)
    assert fuse(fused) == blocks and copy.deepcopy(fused).state_dict().keys() == plain.state_dict().keys()
    assert all(type(m) is FusedBatchNorm2d for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert all(type(m) is FusedMaxPool2d for m in fused.modules() if isinstance(m, torch.nn.MaxPool2d))
    pixels = channels_last(torch.randn(4, 3, side, side)).to(DEVICE)
    for network in (plain, fused):
        network(pixels)[32].square().mean().backward()
        with frozen_statistics(network):
            network(pixels + 1)
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], value, rtol=1e-4, atol=1e-5)
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-3, atol=1e-4 * largest.item())
    with torch.no_grad():
        plain.eval(), fused.eval().load_state_dict(plain.state_dict())
        for stride, expected in plain(pixels).items():
            torch.testing.assert_close(fused(pixels)[stride], expected)


@pytest.mark.parametrize("more", [torch.nn.GELU(), torch.nn.Dropout2d(0.1), torch.nn.AvgPool2d(2)])
def test_timms_blocks_with_more_in_them_keep_their_way(more):
    """The last one is what resnetaa50 has between convolutions; in a shortcut, as of resnet50d, averaging is no hindrance."""
    network = build_backbone("test_resnet").network
    plain, other = network.layer1[0], network.layer2[0]
    plain.aa = more
    other.downsample = torch.nn.Sequential(torch.nn.AvgPool2d(2), *other.downsample)
    assert (
        fuse(network) == 3
        and type(plain).__module__ == "timm.models.resnet"
        and type(other).__name__.startswith("Fused")
    )


def test_blocks_with_more_in_them_keep_their_way():
    network, kind = build_backbone("resnet18"), torchvision.models.resnet.BasicBlock
    network.network.layer1[0].relu = torch.nn.GELU()
    assert (
        fuse(network) == 7 and type(network.network.layer1[0]) is kind and type(network.network.layer1[1]) is not kind
    )


@pytest.mark.parametrize("dtype", DIGITS)
@pytest.mark.parametrize(("planted", "reason"), [
    (lambda made, running: None, None),
    (lambda made, running: made.data.mul_(1.1), "away from PyTorch's"),
    (lambda made, running: made.register_hook(lambda gradient: 1.1 * gradient), "away from PyTorch's"),
    (lambda made, running: running[0].zero_(), "away from PyTorch's"),
    (lambda made, running: made.register_hook(lambda gradient: torch.nan * gradient), "inf away from"),
    (lambda made, running: made.nothing, "AttributeError"),
])  # fmt: skip
def test_a_card_that_computes_something_else_is_refused(planted, reason, dtype, monkeypatch):
    def wrong(*given, residual, **settings):
        made = batch_norm(*given, residual=residual, **settings)
        if residual is None:
            planted(made, given[3])
        return made

    monkeypatch.setattr(fused_norm, "CHECKED", (4, 3, 5, 5)), monkeypatch.setattr(fused_norm, "batch_norm", wrong)
    refusal.cache_clear()
    found = refusal(DEVICE, dtype)
    refusal.cache_clear()
    assert found is None if reason is None else reason in found


def test_groups_must_be_equal():
    norm = FusedBatchNorm2d(3, num_groups=2).to(DEVICE)
    with pytest.raises(AssertionError, match="5 samples are no 2 equal groups"):
        norm(torch.ones(5, 3, 2, 2, device=DEVICE))
