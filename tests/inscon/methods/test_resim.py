"""ReSim's windows against rectangles worked by hand and against points, its losses against a loop."""

import dataclasses
import itertools
import math

import pytest
import torch

from inscon.batch import View
from inscon.methods import resim
from inscon.nn.pooling import pool_windows
from tests.inscon.methods.plain import FEW, Plain, nce, norm
from tests.inscon.methods.steps import (
    VIEWS,
    backward,
    logged,
    make_batch,
    make_config,
    make_method,
    small_rivals,
)

SETTINGS = small_rivals(FEW)["resim"]
TINY = {"batch": FEW, "norm": "sync", "backbone": "test_resnet"}
CORNERS = {16: [0, 32, 64, 96, 128, 160], 8: [0, 24, 48, 72, 96, 120, 144, 168]}
SIDES = {16: 48, 8: 32}


@pytest.mark.parametrize("stride", CORNERS)
def test_windows_are_those_of_the_table(stride):
    side = SIDES[stride]
    table = [[x, y, x + side, y + side] for y in CORNERS[stride] for x in CORNERS[stride]]
    assert resim.GRIDS[stride].boxes(224).tolist() == table
    smaller = resim.GRIDS[stride].boxes(112)
    assert smaller.tolist() == [[edge / 2 for edge in box] for box in table]
    assert resim.GRIDS[stride].boxes(64).max() <= 64


def at(crop, flipped):
    return View(pixels=torch.empty(1, 3, 0, 0), crop_box=torch.tensor([crop]), flipped=torch.tensor([flipped]))


def seen(query, key, stride, view_size=224):
    """(windows, regions, used) of one image."""
    views = {"query": at(*query), "key": at(*key)}
    method = make_method(SETTINGS, dtype=torch.float32, **TINY)
    method.view_size = view_size
    setattr(method, f"windows_{stride}", resim.GRIDS[stride].boxes(view_size))
    batch = dataclasses.replace(make_batch(SETTINGS), views=views)
    return [made[0] for made in method.windows_in_both(batch, stride)]


@pytest.mark.parametrize(("query", "key", "window", "region", "count"), [
    # the same crop: every window at its own place
    (((10.0, 20, 234, 244), False), ((10.0, 20, 234, 244), False), 7, (32, 32, 80, 80), 36),
    # 64 px to the right and 32 down: columns from 64 on and rows from 32 on lie within
    (((0.0, 0, 224, 224), False), ((64.0, 32, 288, 256), False), 8, (0, 0, 48, 48), 20),
    # the same, both mirrored: column 2 (64..112) shows source 112..160, which is 48..96 unmirrored and 128..176 mirrored
    (((0.0, 0, 224, 224), True), ((64.0, 32, 288, 256), True), 8, (128, 0, 176, 48), 20),
    # a key that sees twice as much in each direction
    (((100.0, 100, 324, 324), False), ((100.0, 100, 548, 548), False), 35, (80, 80, 104, 104), 36),
    # a key that sees the left half, at twice the width
    (((0.0, 0, 224, 224), False), ((0.0, 0, 112, 224), False), 2, (128, 0, 224, 48), 18),
    # crops that share nothing
    (((0.0, 0, 100, 100), False), ((100.0, 100, 200, 200), False), 0, (-224, -224, -224 + 48, -224 + 48), 0),
])  # fmt: skip
def test_regions_of_the_key_worked_by_hand(query, key, window, region, count):
    _, regions, used = seen(query, key, 16)
    assert regions[window].tolist() == pytest.approx(region, abs=1e-3)
    assert used.sum() == count and set(used.tolist()) <= {0.0, 1.0}


def source_coordinates(crop, flipped, side, step):
    """[1 2 h w]: x and y in source px of the places of a map, feature j at px j * step of the view."""
    at = torch.arange(0, side + step, step, dtype=torch.float64)
    x = (side - at if flipped else at) * (crop[2] - crop[0]) / side + crop[0]
    y = at * (crop[3] - crop[1]) / side + crop[1]
    return torch.stack([x.expand(len(at), -1), y[:, None].expand(-1, len(at))])[None]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("stride", CORNERS)
def test_a_window_and_its_region_show_the_same_part_of_the_source(stride, flipped):
    """Maps that hold their places' source coordinates give the same center in both views, and all four edges fit by brute force."""
    generator = torch.Generator().manual_seed(stride)
    total = 0
    for _ in range(8):
        x, y, w, h = torch.rand(4, generator=generator).tolist()
        query = ((40.0, 30.0, 240.0, 260.0), flipped)
        key = ((20.0 + 60 * x, 10.0 + 60 * y, 150.0 + 150 * w, 150.0 + 150 * h), flipped)
        windows, regions, used = (made.double() for made in seen(query, key, stride))
        centers = [
            pool_windows(source_coordinates(*view, 224, stride), boxes[None], 1 / stride)[0]
            for view, boxes in ((query, windows), (key, regions))
        ]
        inside = used.bool()
        torch.testing.assert_close(centers[0][inside], centers[1][inside], rtol=0, atol=1e-3)
        for window, region, use in zip(windows.tolist(), regions.tolist(), used.tolist()):
            expected = by_points(window, query, key)
            assert region == pytest.approx(expected, abs=1e-3)
            assert bool(use) == (min(expected) >= -1e-3 and max(expected) <= 224 + 1e-3)
        total += int(used.sum())
    assert 0 < total < 8 * len(windows)


def by_points(window, query, key):
    """The rectangle around a window's four corners, each followed from view to source to view."""
    (qx0, qy0, qx1, qy1), q_flipped = query
    (kx0, ky0, kx1, ky1), k_flipped = key
    found = []
    for x in (window[0], window[2]):
        for y in (window[1], window[3]):
            sx = qx0 + (224 - x if q_flipped else x) / 224 * (qx1 - qx0)
            sy = qy0 + y / 224 * (qy1 - qy0)
            kx, ky = (sx - kx0) / (kx1 - kx0) * 224, (sy - ky0) / (ky1 - ky0) * 224
            found.append((224 - kx if k_flipped else kx, ky))
    xs, ys = zip(*found)
    return [min(xs), min(ys), max(xs), max(ys)]


def mean_of_interpolant(feature_map, box, stride):
    """[F]: of the bilinear interpolant over a box, exactly, by the midpoints of pieces on which hats are straight."""

    def weights(start, end, count):
        cuts = [start, *range(math.floor(start) + 1, math.ceil(end)), end]
        middles = [((a + b) / 2, b - a) for a, b in itertools.pairwise(cuts)]
        return torch.tensor([sum(max(0.0, 1 - abs(m - j)) * d for m, d in middles) / (end - start) for j in range(count)],
                            dtype=torch.float64)  # fmt: skip

    x0, y0, x1, y1 = (edge / stride for edge in box)
    height, width = feature_map.shape[1:]
    return torch.einsum("fyx,y,x->f", feature_map, weights(y0, y1, height), weights(x0, x1, width))


def pyramid(plain, maps):
    """{16: map, 8: map}: 1x1 convolutions, doubled by repeating, 3x3 convolutions."""
    w = plain.weights

    def conv(x, name):
        weight = w[f"pyramid.{name}.0.weight"]
        return torch.nn.functional.conv2d(x, weight, w[f"pyramid.{name}.0.bias"], padding=weight.shape[-1] // 2)

    double = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # noqa: E731
    p5 = conv(maps[32], "inner_blocks.2")
    p4 = conv(maps[16], "inner_blocks.1") + double(p5)
    p3 = conv(maps[8], "inner_blocks.0") + double(p4)
    return {16: conv(p4, "layer_blocks.1"), 8: conv(p3, "layer_blocks.0")}


def test_loss_and_gradients_are_those_of_a_loop():
    method, batch = make_method(SETTINGS, batch=FEW, norm="sync"), make_batch(SETTINGS, batch=FEW)
    queue = method.queues["single"].keys.clone()
    query, key = Plain(method.query_encoder), Plain(method.key_encoder)
    _, losses = backward(method, batch)
    q_maps, q_view, k_view = query.maps(batch.views["query"].pixels), batch.views["query"], batch.views["key"]
    assert torch.equal(q_view.flipped, k_view.flipped) and q_view.flipped.any() and not q_view.flipped.all()
    with torch.no_grad():
        k_maps = key.maps(k_view.pixels)
        k_levels = pyramid(key, k_maps)
        keys = norm(key.mlp(k_maps[32].mean((2, 3)), "head"))
    q_levels = pyramid(query, q_maps)
    parts, figures = {}, logged(losses)
    q = norm(query.mlp(q_maps[32].mean((2, 3)), "head"))
    parts["single"] = torch.stack([nce(q[b], keys[b], queue, 0.2) for b in range(FEW)]).mean()
    for stride, corners in CORNERS.items():
        k_map = k_levels[stride]
        side = k_map.shape[-1] - 2
        places = torch.stack([norm(k_map[b, :, i : i + 3, j : j + 3].mean((1, 2))) for b in range(FEW) for i in range(side)
                  for j in range(side)])  # fmt: skip
        assert len(places) == FEW * {16: 2, 8: 6}[stride] ** 2
        terms = []
        for b in range(FEW):
            views = [(view.crop_box[b].tolist(), bool(view.flipped[b])) for view in (q_view, k_view)]
            for y in corners:
                for x in corners:
                    region = by_points([x, y, x + SIDES[stride], y + SIDES[stride]], *views)
                    if min(region) < -1e-3 or max(region) > 224 + 1e-3:
                        continue
                    window = [edge * 64 / 224 for edge in (x, y, x + SIDES[stride], y + SIDES[stride])]
                    u = norm(mean_of_interpolant(q_levels[stride][b], window, stride))
                    v = norm(mean_of_interpolant(k_map[b], [edge * 64 / 224 for edge in region], stride))
                    terms.append(nce(u, v, places, 0.2))
        assert 0 < len(terms) < FEW * len(corners) ** 2
        parts[f"region_{stride}"] = torch.stack(terms).mean()
    for name, value in parts.items():
        assert figures[f"loss_{name}"].item() == pytest.approx(value.item(), rel=1e-5), name
        assert 0 <= figures[f"top1_{name}"].item() <= 1
    total = sum(parts.values())
    assert figures["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    query.check_gradients(total, method.query_encoder, digits=1e-5)  # boxes are float32


def test_equal_maps_cost_log_of_one_plus_the_places():
    method, batch = make_method(SETTINGS, **TINY), make_batch(SETTINGS, batch=FEW)
    with torch.no_grad():
        for encoder in (method.query_encoder, method.key_encoder):
            for block in encoder.pyramid.layer_blocks[:2]:
                block[0].weight.zero_(), block[0].bias.fill_(1.0)
    figures = logged(backward(method, batch)[1])
    assert figures["loss_region_16"].item() == pytest.approx(math.log(1 + FEW * 4))
    assert figures["loss_region_8"].item() == pytest.approx(math.log(1 + FEW * 36))


def test_a_batch_without_a_common_region_has_no_region_loss():
    method, batch = make_method(SETTINGS, **TINY), make_batch(SETTINGS, batch=FEW)
    far = dataclasses.replace(batch.views["key"], crop_box=batch.views["key"].crop_box + 9000)
    _, losses = backward(method, dataclasses.replace(batch, views=batch.views | {"key": far}))
    figures = logged(losses)
    assert figures["loss_region_16"] == figures["loss_region_8"] == 0 and figures["loss"] == figures["loss_single"]
    assert all(torch.isfinite(p.grad).all() for p in method.query_encoder.parameters())


def test_wrong_settings_are_refused():
    with pytest.raises(
        ValueError, match="strides 8, 16, 32 px .* vit_small_patch16_224 has others. Found: 16; set --b"
    ):
        make_config(SETTINGS, backbone="vit_small_patch16_224")
    with pytest.raises(ValueError, match="RandAugment moves what boxes tell. Found: 2; set --randaugment 0"):
        make_config(SETTINGS, views=dataclasses.replace(VIEWS, randaugment=2))
    small = dataclasses.replace(VIEWS, view_size=32)
    with pytest.raises(ValueError, match="3x3 places. Found: view_size 32; set --view-size 64 or more"):
        make_config(SETTINGS, views=small)
