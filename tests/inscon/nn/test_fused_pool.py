"""The stem's pooling against PyTorch's. Without a GPU the kernels are interpreted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed")

from inscon.nn.fused_pool import FusedMaxPool2d, fuse, refusal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 9, 7), (1, 130, 8, 16), (3, 3, 1, 1), (2, 64, 33, 18)])
def test_values_and_gradients_are_pytorchs(shape, dtype):
    """Of few different numbers, so that many are equal: the first of a window has the gradient. Sums of integers are exact."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, shape, generator=generator).to(DEVICE, dtype)
    ours, theirs = (values.clone().requires_grad_() for _ in range(2))
    made, expected = FusedMaxPool2d(3, 2, 1)(ours), F.max_pool2d(theirs.cpu(), 3, 2, 1)
    assert made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made.cpu(), expected)
    gradient = torch.randint(-4, 5, expected.shape, generator=generator).to(dtype)
    made.backward(gradient.to(DEVICE)), expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


def test_nan_and_infinite_values_come_through():
    values = torch.tensor([[1.0, torch.nan, 0, 0], [0, 0, 0, 0], [0, 0, 0, -torch.inf], [0, 0, 0, torch.inf]])[
        None, None
    ]
    torch.testing.assert_close(
        FusedMaxPool2d(3, 2, 1)(values.to(DEVICE)).cpu(), F.max_pool2d(values, 3, 2, 1), equal_nan=True, rtol=0, atol=0
    )


def test_backward_keeps_a_byte_per_window():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes) or tensor, lambda kept: kept
    ):
        FusedMaxPool2d(3, 2, 1)(torch.ones(2, 3, 8, 8, device=DEVICE, requires_grad=True))
    assert kept == [2 * 3 * 4 * 4]


@pytest.mark.parametrize("pool", [
    nn.MaxPool2d(2, 2), nn.MaxPool2d(3, 2), nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.MaxPool2d(3, 2, 1, 2),
    nn.MaxPool2d(3, 2, 1, return_indices=True), nn.AvgPool2d(3, 2, 1),
])  # fmt: skip
def test_other_poolings_stay(pool):
    kind = type(pool)
    fuse(nn.Sequential(pool))
    assert type(pool) is kind


@pytest.mark.parametrize(("planted", "reason"), [
    (lambda made: made, None),
    (lambda made: made + 1, "their results are not PyTorch's"),
    (lambda made: made + (made - made.detach()), "their results are not PyTorch's"),  # twice the gradient
    (lambda made: made.nothing, "AttributeError: 'Tensor' object has no attribute 'nothing'"),
])  # fmt: skip
def test_a_card_that_computes_something_else_is_refused(planted, reason, monkeypatch):
    pool = FusedMaxPool2d.forward
    monkeypatch.setattr(FusedMaxPool2d, "forward", lambda self, x: planted(pool(self, x)))
    refusal.cache_clear()
    found = refusal(DEVICE, torch.bfloat16)
    refusal.cache_clear()
    assert found == reason
