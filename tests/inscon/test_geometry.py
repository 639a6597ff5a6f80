"""Boxes against closed forms, and a ramp image that carries its own coordinates through crop, flip and pooling."""

import numpy as np
import pytest
import torch
from PIL import Image

from inscon.geometry import area, find_overlap, from_view, intersect, into_view, mirror
from inscon.nn.pooling import precise_roi_pool
from inscon.plan import OverlapRule, ViewSpec, plan_views


def boxes(*rows, kind):
    array = np.array(rows, np.float32)
    return array if kind == "numpy" else torch.from_numpy(array)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_intersections_by_hand(kind):
    a = boxes([0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], kind=kind)
    b = boxes([5, 2, 20, 8], [10, 0, 20, 10], [30, 40, 50, 60], kind=kind)
    shared = intersect(a, b)
    assert shared[0].tolist() == [5, 2, 10, 8]
    assert area(shared).tolist() == [30, 0, 0]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_into_view_scales_and_mirrors(kind):
    box, crop = (
        boxes([20, 30, 40, 50], [20, 30, 40, 50], kind=kind),
        boxes([10, 20, 60, 120], [10, 20, 60, 120], kind=kind),
    )
    flipped = np.array([False, True]) if kind == "numpy" else torch.tensor([False, True])
    seen = into_view(box, crop, flipped, 100)
    assert seen.tolist() == [[20, 10, 60, 30], [40, 10, 80, 30]]
    assert mirror(seen, 100)[1].tolist() == seen[0].tolist()
    assert from_view(seen, crop, flipped, 100).tolist() == box.tolist()
    several = from_view(seen[:, None], crop[None], flipped[None], 100)  # [2 1 4] of either view
    assert several[:, 0].tolist() == [[20, 30, 40, 50], [30, 30, 50, 50]] and several.shape == (2, 2, 4)


def test_numpy_and_torch_agree_to_the_last_bit():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 300, (500, 2, 2)).astype(np.float32)
    crops = np.concatenate([corner, corner + rng.uniform(40, 200, (500, 2, 2)).astype(np.float32)], -1)
    flips = rng.random((500, 2)) < 0.5
    arrays = crops[:, 0], flips[:, 0], crops[:, 1], flips[:, 1]
    ours = find_overlap(*arrays, (224, 160))
    theirs = find_overlap(*(torch.from_numpy(array) for array in arrays), (224, 160))
    for name in ("first_box", "second_box", "weight"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name).numpy())
    assert 0.2 < ours.weight.mean() < 0.99


@pytest.mark.parametrize(
    ("key_box", "valid"),
    [
        ([68, 0, 168, 100], True),  # shares 32 of 100 px: 32 px of a 100 px view
        ([69, 0, 169, 100], False),  # one source px less
        ([0, 0, 1000, 1000], False),  # all of the query, but 10 px of the key view
        ([0, 90, 100, 190], False),  # wide enough, not high enough
        ([200, 200, 300, 300], False),  # disjoint
    ],
)
def test_an_overlap_spans_one_cell_per_axis_in_both_views(key_box, valid):
    query, key, no = (
        torch.tensor([[0.0, 0, 100, 100]]),
        torch.tensor([key_box], dtype=torch.float32),
        torch.tensor([False]),
    )
    overlap = find_overlap(query, no, key, no, (100, 100))
    assert overlap.weight.item() == float(valid)
    assert torch.isfinite(overlap.first_box).all()


@pytest.mark.parametrize(
    ("sizes", "valid"), [((100, 100), True), ((100, 80), False), ((80, 100), False), ((80, 80), False)]
)
def test_the_extent_is_measured_in_px_of_either_view(sizes, valid):
    """40 source px of 100 are 40 px of a view of 100 and 32 of one of 80; boxes are in px of their own view."""
    first, second = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[60.0, 0, 160, 100]])
    no, yes = torch.tensor([False]), torch.tensor([True])
    overlap = find_overlap(first, no, second, yes, sizes, min_side=33.0)
    assert overlap.weight.item() == float(valid)
    assert overlap.first_box.tolist() == [[0.6 * sizes[0], 0, sizes[0], sizes[0]]]
    assert overlap.second_box.tolist() == [[0.6 * sizes[1], 0, sizes[1], sizes[1]]]  # mirrored
    assert find_overlap(first, no, second, yes, sizes, min_side=32.0).weight.item() == 1


def test_min_iou_is_measured_in_source_px():
    query, key, no = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[50.0, 0, 150, 100]]), torch.tensor([False])
    assert find_overlap(query, no, key, no, (224, 224), min_iou=0.33).weight.item() == 1  # the IoU is 1/3
    assert find_overlap(query, no, key, no, (224, 224), min_iou=0.34).weight.item() == 0


def coordinate_features(axis: int, size: tuple[int, int], crop: np.ndarray, flipped: bool, side: int, stride: int):
    """What a trunk that knew its source coordinate would see: feature j is the coordinate at px `stride * j` of the view."""
    height, width = size
    ramp = np.arange(width, dtype=np.float32) + 0.5 if axis == 0 else np.arange(height, dtype=np.float32)[:, None] + 0.5
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(ramp, size)))
    view = np.asarray(image.resize((side, side), Image.BILINEAR, box=tuple(float(c) for c in crop)))
    view = torch.from_numpy((view[:, ::-1] if flipped else view).copy())[None, None]
    centers = torch.arange(side // stride + 1) * stride / (side / 2) - 1
    grid = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), -1)[None]
    return torch.nn.functional.grid_sample(view, grid, padding_mode="border", align_corners=False)


@pytest.mark.parametrize("key_size", [224, 160])
def test_a_ramp_pooled_in_both_views_gives_the_same_source_coordinates(key_size):
    size, stride = (375, 500), 32
    specs = ViewSpec(name="query"), ViewSpec(name="key", size=key_size, overlap=OverlapRule(view="query"))
    plans = plan_views(3, 1, np.arange(24), np.tile(size, (24, 1)), specs)
    views, overlap = tuple(plans.views.values()), plans.overlaps["query", "key"]
    assert {(bool(q), bool(k)) for q, k in zip(views[0].flipped, views[1].flipped)} == {
        (a, b) for a in (0, 1) for b in (0, 1)
    }
    shared = intersect(views[0].crop_box, views[1].crop_box)
    for axis in (0, 1):
        pooled = []
        for view, view_boxes in zip(views, (overlap.first_box, overlap.second_box)):
            maps = [
                coordinate_features(axis, size, c, f, int(view.side[0]), stride)
                for c, f in zip(view.crop_box, view.flipped)
            ]
            cells = precise_roi_pool(torch.cat(maps), torch.from_numpy(view_boxes), 3, 1 / stride)[:, 0]
            pooled.append(torch.where(torch.from_numpy(view.flipped != 0)[:, None, None], cells.flip(-1), cells))
        low, high = torch.from_numpy(shared[:, axis]), torch.from_numpy(shared[:, axis + 2])
        centers = low[:, None] + (high - low)[:, None] * (torch.arange(3) + 0.5) / 3
        expected = (centers[:, None, :] if axis == 0 else centers[:, :, None]).expand(-1, 3, 3)
        # Half a source px of slack: the antialiased resize bends the ramp at the crop's edges.
        assert (pooled[0] - expected).abs().max() < 0.6
        assert (pooled[0] - pooled[1]).abs().max() < 0.8
