"""The loss and its gradients against PixPro written as loops, its pairs against brute force, and cases worked by hand."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from inscon.batch import View
from inscon.methods import pixpro
from inscon.methods.pixpro import pair_loss
from inscon.nn.backbones import Backbone
from inscon.nn.loss import unit
from tests.inscon.methods.steps import backward, logged, make_batch, make_method

SETTINGS = pixpro.Settings(hidden_dim=24, embedding_dim=12, instance=True, instance_weight=0.5)
IMAGES = 4


class Cells(Backbone):
    """4 x 4 cells of 32 features, from pixels of 64 px."""

    def __init__(self):
        super().__init__()
        self.channels, self.network = {16: 32}, nn.Conv2d(3, 32, 16, stride=16)

    def forward(self, pixels):
        return {16: self.network(pixels)}


def small(settings=SETTINGS):
    torch.manual_seed(0)
    method = make_method(settings, backbone="test_resnet")
    method.online = pixpro.Encoder(Cells(), settings).double()
    method.target = pixpro.Encoder(Cells(), settings).double()
    return method


def centers(box, flipped, cells):
    """In source px, cell by cell, row by row."""
    x0, y0, x1, y1 = box.tolist()
    found = []
    for row, column in itertools.product(range(cells), range(cells)):
        seen = cells - 1 - column if flipped else column
        found.append((x0 + (seen + 0.5) * (x1 - x0) / cells, y0 + (row + 0.5) * (y1 - y0) / cells))
    return found


def pairs_of(first, second, image, cells, limit=0.7):
    """[[bool]]: which cell of the first view is near which one of the second."""
    sides = [(view.crop_box[image, 2:] - view.crop_box[image, :2]) / cells for view in (first, second)]
    diagonal = max(math.hypot(*side.tolist()) for side in sides)
    here, there = (centers(view.crop_box[image], bool(view.flipped[image]), cells) for view in (first, second))
    return [[math.dist(a, b) / diagonal < limit for b in there] for a in here]


def view_of(boxes, flipped):
    return View(pixels=torch.zeros(len(boxes), 3, 64, 64), crop_box=torch.tensor(boxes), flipped=torch.tensor(flipped))


@pytest.mark.parametrize("cells", [2, 7])
def test_pairs_are_those_of_brute_force_with_both_flips(cells):
    generator = torch.Generator().manual_seed(1)
    corner, size = torch.rand(64, 2, generator=generator) * 60, 40 + torch.rand(64, 2, generator=generator) * 100
    boxes = torch.cat([corner, corner + size], 1)
    flips = torch.tensor(list(itertools.product((False, True), repeat=2)) * 8)
    views = {
        "first": view_of(boxes[:32].tolist(), flips[:, 0].tolist()),
        "second": view_of(boxes[32:].tolist(), flips[:, 1].tolist()),
    }
    method, batch = small(), dataclasses.replace(make_batch(SETTINGS, batch=32), views=views)
    found = {name: method.pairs(name, batch, cells) for name in views}
    expected = torch.tensor([pairs_of(*views.values(), image, cells) for image in range(32)])
    assert torch.equal(found["first"], expected) and torch.equal(found["second"], expected.mT)
    assert 0.01 < expected.double().mean() < 0.6


def test_a_view_and_its_mirror_image_pair_each_cell_with_the_mirrored_one():
    box = [[10.0, 20, 90, 100]]
    views = {"first": view_of(box, [False]), "second": view_of(box, [True])}
    method, batch = small(), dataclasses.replace(make_batch(SETTINGS), views=views)
    method.settings = dataclasses.replace(SETTINGS, pair_distance=0.1)
    expected = torch.eye(9).view(3, 3, 3, 3).flip(1).reshape(1, 9, 9).bool()
    assert torch.equal(method.pairs("first", batch, 3), expected)


def conv(layer, vector):
    return layer.weight.flatten(1) @ vector + (0 if layer.bias is None else layer.bias)


def head_by_hand(head, maps):
    """[B c D]: the layers of a head on each place, BatchNorm over all places of the batch."""
    places = [[conv(head[0], image[:, place]) for place in range(maps.shape[2])] for image in maps]
    hidden = torch.stack([torch.stack(of_image) for of_image in places])
    mean, var = hidden.mean((0, 1)), hidden.var((0, 1), correction=0)
    hidden = (hidden - mean) / (var + head[1].eps).sqrt() * head[1].weight + head[1].bias
    return torch.stack([torch.stack([conv(head[3], place.relu()) for place in image]) for image in hidden])


def losses_by_hand(method, batch, name, other):
    """(pixel loss, instance loss) of the view `name` against the target of the other one."""
    online, target = method.online, method.target
    maps, theirs = (
        encoder.backbone(batch.views[view].pixels)[16].flatten(2) for encoder, view in ((online, name), (target, other))
    )
    x, aim = (head_by_hand(e.projectors["pixel"], m) for e, m in ((online, maps), (target, theirs)))
    losses = []
    for image in range(IMAGES):
        near = pairs_of(batch.views[name], batch.views[other], image, 4)
        cosines = []
        for i in range(16):
            y = sum(
                nn.functional.cosine_similarity(x[image, i], x[image, j], dim=0).clamp(min=0) ** 2
                * unit(conv(method.predictor["pixel"], x[image, j]))
                for j in range(16)
            )
            cosines += [nn.functional.cosine_similarity(y, aim[image, j], dim=0) for j in range(16) if near[i][j]]
        losses.append(-2 * sum(cosines) / (len(cosines) + 1e-6))
    z = head_by_hand(online.projectors["instance"], maps)
    z = head_by_hand(method.predictor["instance"], z.mT).mean(1)
    aim = head_by_hand(target.projectors["instance"], theirs).mean(1)
    cosines = [nn.functional.cosine_similarity(z[i], aim[i], dim=0) for i in range(IMAGES)]
    return sum(losses) / IMAGES, 2 - 2 * sum(cosines) / IMAGES


def test_losses_and_gradients_are_those_of_loops():
    method, batch = small(), make_batch(SETTINGS, batch=IMAGES)
    expected = {
        name: losses_by_hand(method, batch, name, other) for name, other in (("first", "second"), ("second", "first"))
    }
    total = sum(pixel + 0.5 * instance for pixel, instance in expected.values())
    trained = {name: p for name, p in method.named_parameters() if not name.startswith("target")}
    gradients = torch.autograd.grad(total, list(trained.values()))
    figures = logged(backward(method, batch)[1])
    assert figures["loss"].item() == pytest.approx(total.item(), rel=1e-9)
    for name, (pixel, instance) in expected.items():
        assert figures[f"loss_{name}"].item() == pytest.approx(pixel.item(), rel=1e-9)
        assert figures[f"loss_{name}_instance"].item() == pytest.approx(instance.item(), rel=1e-9)
    for (name, p), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.grad is None for p in method.target.parameters())


def test_the_instance_branch_is_off_by_default():
    method = make_method(pixpro.Settings(hidden_dim=8), backbone="test_resnet")
    assert list(method.online.projectors) == list(method.predictor) == ["pixel"]
    assert set(logged(backward(method, make_batch(SETTINGS))[1])) == {
        "loss", "loss_first", "loss_second", "length_first", "length_second",
    }  # fmt: skip


def test_equal_features_reach_the_least_loss_and_an_image_without_pairs_counts_nothing():
    ours = torch.ones(4, 9, 5, dtype=torch.float64) / math.sqrt(5)
    near = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    assert pair_loss(ours, ours, near).item() == pytest.approx(-2, rel=1e-6)
    near[1] = False
    assert pair_loss(ours, ours, near).item() == pytest.approx(-2 * 3 / 4, rel=1e-6)
    assert pair_loss(ours, -ours, near).item() == pytest.approx(2 * 3 / 4, rel=1e-6)
    assert pair_loss(ours, ours, torch.zeros_like(near)).item() == 0


def test_features_at_right_angles_propagate_nothing():
    """Each place keeps what g makes of its own, of unit length."""
    method = small()
    maps = torch.eye(12, dtype=torch.float64)[:, :9].view(1, 12, 3, 3).contiguous() * 3
    expected = unit(method.predictor["pixel"](maps).flatten(2).mT)
    torch.testing.assert_close(method.propagated(maps.requires_grad_()), expected)
