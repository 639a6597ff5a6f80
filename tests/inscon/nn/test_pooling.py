"""Precise RoI pooling against exact integration of the bilinear interpolant, written as loops in float64."""

import math

import numpy as np
import pytest
import torch

from inscon.nn.pooling import pool_windows, precise_roi_pool

NODES = (-1 / math.sqrt(3), 1 / math.sqrt(3))
"""Two-point Gauss-Legendre integrates a bilinear function exactly, so a sum over unit cells is the exact integral."""


def interpolant(feature_map: np.ndarray, y: float, x: float, offset: float) -> float:
    """The bilinear interpolant with feature j at j + offset, 0 outside the map."""
    total = 0.0
    for i in range(feature_map.shape[0]):
        for j in range(feature_map.shape[1]):
            total += feature_map[i, j] * max(0, 1 - abs(y - offset - i)) * max(0, 1 - abs(x - offset - j))
    return total


def integral(feature_map: np.ndarray, y0, x0, y1, x1, offset) -> float:
    def cuts(a, b):
        inner = [k + offset for k in range(-3, 40) if a < k + offset < b]
        return [a, *inner, b]

    total = 0.0
    for ya, yb in zip(cuts(y0, y1), cuts(y0, y1)[1:]):
        for xa, xb in zip(cuts(x0, x1), cuts(x0, x1)[1:]):
            for u in NODES:
                for v in NODES:
                    y, x = (ya + yb) / 2 + u * (yb - ya) / 2, (xa + xb) / 2 + v * (xb - xa) / 2
                    total += interpolant(feature_map, y, x, offset) * (yb - ya) * (xb - xa) / 4
    return total


def pooled_by_loops(feature_map, box, bins, scale, offset=0.0, border="zero"):
    x0, y0, x1, y1 = (float(c) * scale for c in box)
    ones, out = np.ones_like(feature_map), np.zeros((bins, bins))
    for p in range(bins):
        for q in range(bins):
            a, b = y0 + (y1 - y0) * p / bins, y0 + (y1 - y0) * (p + 1) / bins
            c, d = x0 + (x1 - x0) * q / bins, x0 + (x1 - x0) * (q + 1) / bins
            divisor = (b - a) * (d - c) if border == "zero" else integral(ones, a, c, b, d, offset)
            out[p, q] = integral(feature_map, a, c, b, d, offset) / divisor if divisor > 0 else 0.0
    return out


BOXES = [
    [13.7, 40.2, 180.9, 200.0],
    [0.0, 0.0, 224.0, 224.0],  # reaches past the last feature, where the interpolant falls to 0
    [192.0, 192.0, 224.0, 224.0],
    [5.0, 5.0, 6.5, 100.0],  # thinner than a feature
    [64.0, 32.0, 96.0, 64.0],  # edges on features
]


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("border", ["zero", "normalize"])
def test_equals_exact_integration(offset, border):
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(len(BOXES), 2, 7, 7))
    ours = precise_roi_pool(
        torch.from_numpy(maps), torch.tensor(BOXES, dtype=torch.float64), 3, 1 / 32, offset=offset, border=border
    ).numpy()
    for b, box in enumerate(BOXES):
        for channel in range(2):
            expected = pooled_by_loops(maps[b, channel], box, 3, 1 / 32, offset, border)
            np.testing.assert_allclose(ours[b, channel], expected, atol=1e-12)


def test_float32_and_rectangular_maps_and_other_grids():
    rng = np.random.default_rng(1)
    maps = rng.normal(size=(1, 1, 4, 9))
    box = [[10.0, 3.0, 130.0, 60.0]]
    ours = precise_roi_pool(torch.from_numpy(maps).float(), torch.tensor(box), 2, 1 / 16)
    np.testing.assert_allclose(ours[0, 0], pooled_by_loops(maps[0, 0], box[0], 2, 1 / 16), atol=1e-5)


def test_gradients_for_features_and_coordinates():
    torch.manual_seed(0)
    features = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[11.0, 21, 90, 100], [33, 5, 71, 140]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f, b: precise_roi_pool(f, b, 3, 1 / 32), (features, boxes))


@pytest.mark.parametrize("border", ["zero", "normalize"])
@pytest.mark.parametrize("box", [[50.0, 50, 50, 50], [50, 50, 50, 90], [-900, -900, -800, -800]])
def test_empty_boxes_give_zero_with_zero_gradient(box, border):
    features = torch.ones(1, 2, 7, 7, requires_grad=True)
    boxes = torch.tensor([box], dtype=torch.float32, requires_grad=True)
    out = precise_roi_pool(features, boxes, 3, 1 / 32, border=border)
    out.sum().backward()
    assert (out == 0).all() and (features.grad == 0).all() and torch.isfinite(boxes.grad).all()


def test_a_constant_map_stays_constant_inside_the_map():
    out = precise_roi_pool(torch.full((1, 1, 7, 7), 3.5), torch.tensor([[32.0, 40, 150, 180]]), 3, 1 / 32)
    torch.testing.assert_close(out, torch.full((1, 1, 3, 3), 3.5))


def test_channels_last_and_contiguous_maps_agree():
    features, boxes = torch.randn(2, 8, 7, 7), torch.tensor(BOXES[:2])
    plain = precise_roi_pool(features, boxes, 3, 1 / 32)
    last = precise_roi_pool(features.to(memory_format=torch.channels_last), boxes, 3, 1 / 32)
    torch.testing.assert_close(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_low_precision_maps_keep_exact_boxes():
    features, boxes = torch.randn(1, 4, 7, 7), torch.tensor([[13.3, 7.7, 199.9, 210.1]])
    exact = precise_roi_pool(features, boxes, 3, 1 / 32)
    assert (precise_roi_pool(features.bfloat16(), boxes, 3, 1 / 32).float() - exact).abs().max() < 0.03
    with pytest.raises(AssertionError, match="torch.bfloat16 loses whole pixels"):
        precise_roi_pool(features, boxes.bfloat16(), 3, 1 / 32)
    with pytest.raises(ValueError, match='border must be "zero" or "normalize". Found: "reflect"'):
        precise_roi_pool(features, boxes, 3, 1 / 32, border="reflect")


def test_many_boxes_of_a_map_are_one_bin_each():
    """Windows of two maps, some of which lie outside, have no area or reach past the border."""
    rng = np.random.default_rng(2)
    maps, outside = rng.normal(size=(2, 3, 7, 7)), [[-90.0, 0, -40, 40], [50, 50, 50, 90], [-20, 10, 40, 60]]
    boxes = torch.tensor([BOXES + outside, outside + BOXES], dtype=torch.float64)
    features = torch.from_numpy(maps).requires_grad_()
    ours = pool_windows(features, boxes, 1 / 32)
    assert ours.shape == (2, 8, 3)
    for image, own in enumerate(boxes.tolist()):
        for number, box in enumerate(own):
            expected = [pooled_by_loops(channel, box, 1, 1 / 32)[0, 0] for channel in maps[image]]
            np.testing.assert_allclose(ours[image, number].detach().numpy(), expected, atol=1e-12)
    alone = precise_roi_pool(features, boxes[:, 0], 1, 1 / 32)
    torch.testing.assert_close(ours[:, 0], alone.flatten(1))
    assert torch.autograd.gradcheck(lambda f: pool_windows(f, boxes, 1 / 32), (features,))
    last = features.detach().float().to(memory_format=torch.channels_last)
    torch.testing.assert_close(pool_windows(last, boxes.float(), 1 / 32), ours.detach().float(), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match="torch.float16 loses whole pixels"):
        pool_windows(last, boxes.half(), 1 / 32)
