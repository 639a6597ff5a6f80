"""What DenseCL, ReSim, DetCo and InfoMin share: trained on what they ask for, never waiting, what a step costs."""

import copy
from pathlib import Path

import pytest
import torch

from inscon.gradients import FlatGradients
from inscon.methods.method import resolve
from inscon.recipes import RECIPES
from inscon.report.flops import step_flops
from tests.inscon.methods.steps import backward, logged, make_batch, make_method, small_rivals, take_steps
from tests.inscon.methods.test_method import ChannelsLast, NobodyWaits, on_gpu, opened

RIVALS = small_rivals()
each = pytest.mark.parametrize("name", RIVALS)


def small(name):
    """(method, batch) in float32."""
    method = make_method(RIVALS[name], dtype=torch.float32, backbone="test_resnet")
    return method, make_batch(RIVALS[name], dtype=torch.float32)


@each
def test_a_method_trains_on_what_it_asks_for(name):
    """Views of its own sizes by a pipeline; a gradient for every weight, and a loss that falls while keys and queues stay."""
    method, pipeline = opened(RIVALS[name], steps=1, backbone="test_resnet")
    with pipeline:
        batch = next(iter(pipeline))
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer, figures = torch.optim.SGD(trained, lr=0.02, momentum=0.9), []
    method.schedule(0, 8)
    prepared = method.prepare(batch)
    for _ in range(8):
        optimizer.zero_grad()
        losses = {}
        for piece in method.pieces(batch, prepared):
            losses[piece.name] = piece.losses()
            losses[piece.name].total.backward()
        figures.append(logged(losses))
        optimizer.step()
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert not any(value.requires_grad or value.ndim for value in figures[0].values())
    # In the first step the branches of timm's blocks are zero, and what lies before them has no gradient.
    assert all(p.grad.abs().sum() > 0 for p in trained)


@each
def test_a_step_asks_the_device_nothing(name, monkeypatch):
    method, batch = small(name)
    for asking in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, asking, lambda *_, asking=asking: pytest.fail(f"{asking} waits"))
    with NobodyWaits():
        backward(method, batch)
        method.after_update()


@each
def test_half_precision_changes_digits_alone(name):
    method, batch = small(name)
    method.schedule(0, 10)
    with torch.autocast("cpu", torch.bfloat16):
        half = logged({piece.name: piece.losses() for piece in method.pieces(batch, method.prepare(batch))})
    whole = logged(backward(method, batch)[1])
    for loss in (loss for loss in whole if loss.startswith("loss")):
        assert half[loss].dtype == torch.float32 and half[loss].item() == pytest.approx(whole[loss].item(), rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each
def test_a_step_on_a_gpu_equals_the_cpus_and_never_waits(name):
    cpu, batch = small(name)
    gpu, there = small(name)[0].to("cuda", memory_format=torch.channels_last), on_gpu(batch)
    expected, made = logged(backward(cpu, batch)[1]), logged(backward(gpu, there)[1])
    for loss in (loss for loss in expected if loss.startswith("loss")):
        assert made[loss].item() == pytest.approx(expected[loss].item(), rel=1e-2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            backward(gpu, there)
        gpu.after_update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each
def test_no_layer_leaves_channels_last(name):
    """Nor do patches on their way to the keys' BatchNorm groups."""
    method, batch = small(name)
    method = method.to(memory_format=torch.channels_last)
    FlatGradients(method.parameters()).zero()
    with ChannelsLast() as watch:
        backward(method, batch)
    assert watch.seen > 50 and not watch.astray, watch.astray[:5]


@each
def test_a_state_dict_holds_the_whole_method(name):
    method, batch = small(name)
    take_steps(method, [batch])
    other = make_method(RIVALS[name], seed=7, dtype=torch.float32, backbone="test_resnet")
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    made, expected = take_steps(other, [batch]), take_steps(method, [batch])
    assert logged(made[0]) == logged(expected[0])
    assert {n: q.pointer for n, q in other.queues.items()} == {n: q.pointer for n, q in method.queues.items()}
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), method.parameters(), strict=True))


FORWARD = 4.09e9
"""Multiplications of ResNet-50 at 224 px."""


@pytest.mark.parametrize(("recipe", "networks", "rows", "negatives", "dim"), [
    ("densecl_r50", 1.40, 49, 65536, 128),  # every place against a queue
    ("resim_r50", 1.58, 64, 32 * 26**2, 256),  # every window against the places of 32 images
    ("detco_r50", 2.31, 0, 0, 0),
    ("infomin_r50", 2.07, 0, 0, 0),
])  # fmt: skip
def test_what_an_image_costs(recipe, networks, rows, negatives, dim):
    """Passes through the networks, by hand, and the products of rows with negatives where they weigh: made, and differentiated."""
    expected = networks + 2 * rows * negatives * dim / (3 * FORWARD)
    counted = step_flops(resolve(RECIPES[recipe](), 1)).trainings
    assert counted == pytest.approx(expected, rel=0.05)
    assert f"| {counted:.2f} |" in (Path(__file__).resolve().parents[3] / "docs/methods.md").read_text()
