"""InsCon's three losses by hand, its twins, its boxes and its switches."""

import dataclasses

import pytest
import torch

from inscon.geometry import find_overlap
from inscon.nn.backbones import Backbone
from tests.inscon.methods.steps import (
    BATCH,
    SIDE,
    VIEWS,
    backward,
    logged,
    make_batch,
    make_method,
    small_inscon,
    take_steps,
)
from tests.inscon.nn.test_loss import info_nce, multi_positive_info_nce


@pytest.mark.parametrize(("tile", "aggregate", "tiles_from"), [
    ("full", "mean", "query"), ("half", "literal", "query"), ("full", "literal", "third"),
])  # fmt: skip
def test_total_is_the_sum_of_the_three_losses_computed_by_hand(tile, aggregate, tiles_from):
    settings = small_inscon(tile=tile, aggregate=aggregate, tiles_from=tiles_from)
    method, batch = make_method(settings, norm="sync"), make_batch(settings)
    queues = {name: queue.keys.clone() for name, queue in method.queues.items()}
    prepared, losses = backward(method, batch)
    figures, keys = logged(losses), prepared.own
    query_view, overlap = batch.views["query"], batch.overlaps["query", "key"]
    query = method.query_encoder(query_view.pixels, overlap.first_box, query_view.flipped)
    single = info_nce(query["single"], keys["single"], queues["single"], 0.2)
    tiles = method.query_encoder.forward_mosaic(batch.mosaic)
    order = [[0, 1, 2, 3], [4, 5, 6, 7]] if tile == "full" else [
        [4 * g + (t + r) % 4 for t in range(4)] for g in range(2) for r in range(4)
    ]  # fmt: skip
    multi = multi_positive_info_nce(tiles, keys["single"][torch.tensor(order)], queues["single"], 0.2, aggregate)
    weight = overlap.weight.double()
    cell = multi_positive_info_nce(query["cell"], keys["cell"], queues["cell"], 0.2, aggregate, weight)
    for name, expected in {"single": single, "multi": multi, "cell": cell}.items():
        assert figures[f"loss_{name}"].item() == pytest.approx(expected.item()), name
        assert 0 <= figures[f"top1_{name}"].item() <= 1
    assert figures["loss"].item() == pytest.approx((single + multi + cell).item())
    assert {name: list(piece.logged) for name, piece in losses.items()} == {
        "query": ["loss_single", "loss_cell", "top1_single", "top1_cell"], "mosaic": ["loss_multi", "top1_multi"],
    }  # fmt: skip
    torch.testing.assert_close(keys["single"].norm(dim=-1), torch.ones(BATCH, dtype=torch.float64))


def test_boxes_come_from_the_plan():
    """The region that both crops share, in px of either view: a method never looks for it itself."""
    batch = make_batch(small_inscon())
    query, key = batch.views["query"], batch.views["key"]
    expected = find_overlap(query.crop_box, query.flipped, key.crop_box, key.flipped, (SIDE, SIDE), min_side=8.0)
    overlap = batch.overlaps["query", "key"]
    for name in ("first_box", "second_box", "weight"):
        assert torch.equal(getattr(overlap, name), getattr(expected, name))
    method = make_method(small_inscon())
    moved = dataclasses.replace(overlap, second_box=overlap.second_box + 5)
    keys = [
        method.prepare(dataclasses.replace(batch, overlaps={("query", "key"): own})).own for own in (overlap, moved)
    ]
    assert torch.equal(keys[0]["single"], keys[1]["single"]) and not torch.equal(keys[0]["cell"], keys[1]["cell"])


def test_gradients_of_the_pieces_are_those_of_the_sum():
    """In float64: a step in pieces is the step on the total."""
    settings = small_inscon()
    method, whole, batch = make_method(settings), make_method(settings), make_batch(settings)
    backward(method, batch)
    torch.stack([piece.losses().total for piece in whole.pieces(batch, whole.prepare(batch))]).sum().backward()
    for p, expected in zip(method.query_encoder.parameters(), whole.query_encoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_pieces_keep_fewer_activations_alive():
    """Counted by what autograd keeps for the backward pass: of one piece at a time, not of all."""
    method, batch = make_method(small_inscon(), dtype=torch.float32), make_batch(small_inscon(), dtype=torch.float32)
    kept = []
    for piece in method.pieces(batch, method.prepare(batch)):
        alive = {}

        def keep(tensor, alive=alive):
            alive[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            piece.losses()
        weights = {p.untyped_storage().data_ptr() for p in method.parameters()}
        kept.append(sum(t.untyped_storage().nbytes() for key, t in alive.items() if key not in weights))
    assert len(kept) == 2 and max(kept) < 0.6 * sum(kept)


def test_the_multi_head_starts_as_the_single_head():
    """METHOD 12: the multi head starts as a copy of the single head, unless asked otherwise."""
    heads = make_method(small_inscon()).query_encoder.heads
    single, multi = (heads[name].state_dict() for name in ("single", "multi"))
    assert all(torch.equal(single[k], multi[k]) for k in single)
    other = make_method(small_inscon(multi_head_init="independent")).query_encoder.heads
    assert not torch.equal(other["single"][0].weight, other["multi"][0].weight)


def test_keys_come_from_the_ema_weights_and_from_nothing_else():
    settings = small_inscon(key_momentum=0.5)
    method, batch = make_method(settings), make_batch(settings)
    before = method.prepare(batch).own
    with torch.no_grad():
        for p in method.query_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    same = method.prepare(batch).own
    assert torch.equal(before["single"], same["single"]) and torch.equal(before["cell"], same["cell"])
    expected = {
        n: 0.5 * p + 0.5 * method.query_encoder.get_parameter(n) for n, p in method.key_encoder.named_parameters()
    }
    method.after_update()
    for name, p in method.key_encoder.named_parameters():
        torch.testing.assert_close(p, expected[name])
    after = method.prepare(batch).own
    assert not torch.allclose(before["single"], after["single"]) and not torch.allclose(before["cell"], after["cell"])


def test_without_a_single_head_keys_follow_the_multi_head():
    """METHOD 3: the keys of tiles come from the follower of the head that makes the tiles."""
    method = make_method(small_inscon(heads=("multi",), key_momentum=0.5))
    fast, slow = method.query_encoder.heads["multi"], method.key_encoder.heads["single"]
    with torch.no_grad():
        fast[0].weight.add_(1)
    expected = 0.5 * slow[0].weight + 0.5 * fast[0].weight
    method.after_update()
    torch.testing.assert_close(slow[0].weight, expected)
    assert list(method.query_encoder.heads) == ["multi"] and list(method.key_encoder.heads) == ["single"]


class Steps(Backbone):
    """Sees positions: feature j is the pixel at 32j."""

    channels = {32: 512}  # noqa: RUF012

    def forward(self, pixels):
        return {32: pixels[:, :, ::32, ::32].repeat(1, 171, 1, 1)[:, :512]}


def test_cells_survive_flips_of_either_view():
    """A backbone that sees positions must give the same cells whether the views came mirrored or not."""
    encoder = make_method(small_inscon(cell_dim=4), norm="sync").eval().query_encoder
    encoder.backbone = Steps()
    pixels = torch.randn(1, 3, 1, 1, dtype=torch.float64) + torch.linspace(-1, 1, 129, dtype=torch.float64)
    pixels = pixels.expand(1, 3, 129, 129)  # 5 features at 0, 32 .. 128, symmetric under mirroring
    box = torch.tensor([[20.0, 30.0, 90.0, 100.0]])
    mirrored = torch.tensor([[128.0 - 90.0, 30.0, 128.0 - 20.0, 100.0]])
    plain = encoder(pixels, box, torch.tensor([False]))["cell"]
    flipped = encoder(pixels.flip(-1), mirrored, torch.tensor([True]))["cell"]
    torch.testing.assert_close(plain, flipped)
    assert (plain[:, 0] - plain[:, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("heads", [("single",), ("multi",), ("cell",), ("single", "cell"), ("multi", "cell")])
def test_any_subset_of_heads_trains(heads):
    settings = small_inscon(heads=heads)
    method, batch = make_method(settings, dtype=torch.float32), make_batch(settings, dtype=torch.float32)
    queues = {name: queue.keys.clone() for name, queue in method.queues.items()}
    _, losses = backward(method, batch)
    assert all(p.grad is not None for p in method.query_encoder.parameters())
    assert {n.removeprefix("loss_") for n in logged(losses) if n.startswith("loss_")} == set(heads)
    expected = ({"single"} if {"single", "multi"} & set(heads) else set()) | ({"cell"} & set(heads))
    assert set(method.queues) == expected
    assert all(not torch.equal(queue.keys, queues[name]) for name, queue in method.queues.items())
    method.after_update()


@pytest.mark.parametrize("settings", [
    {"cell_stage": "res4"}, {"mlp": False}, {"roi_border": "normalize", "roi_offset": 0.5}, {"cell_grid": 2},
    {"mosaic_updates_norm": True}, {"aggregate": "literal"}, {"tiles_from": "third", "tile": "half"},
])  # fmt: skip
def test_switches_train(settings):
    settings = small_inscon(**settings)
    method, batch = make_method(settings, dtype=torch.float32), make_batch(settings, dtype=torch.float32)
    running = method.backbone.network.bn1.running_mean.clone()
    prepared, losses = backward(method, batch)
    assert torch.isfinite(logged(losses)["loss"])
    assert prepared.own["cell"].shape == (BATCH, settings.cells, 256)
    assert not torch.equal(running, method.backbone.network.bn1.running_mean)


@pytest.mark.parametrize("updates", [False, True])
def test_mosaics_leave_running_statistics_alone_unless_asked(updates):
    """METHOD 14."""
    settings = small_inscon(mosaic_updates_norm=updates)
    method, batch = make_method(settings), make_batch(settings)
    pieces = {piece.name: piece for piece in method.pieces(batch, method.prepare(batch))}
    running = method.backbone.network.bn1.running_mean.clone()
    pieces["mosaic"].losses()
    assert torch.equal(running, method.backbone.network.bn1.running_mean) == (not updates)


def test_an_image_without_overlap_weighs_nothing_and_poisons_nothing():
    """Crops that share nothing have boxes of no area, and the weight 0."""
    method, batch = make_method(small_inscon()), make_batch(small_inscon())
    query, key = batch.views["query"], batch.views["key"]
    far = key.crop_box.clone()
    far[2] = torch.tensor([9000.0, 9000, 9100, 9100])
    overlap = find_overlap(query.crop_box, query.flipped, far, key.flipped, (SIDE, SIDE), min_side=8.0)
    assert overlap.weight[2] == 0
    prepared, losses = backward(method, dataclasses.replace(batch, overlaps={("query", "key"): overlap}))
    assert torch.isfinite(logged(losses)["loss"]) and torch.isfinite(prepared.own["cell"]).all()
    assert all(torch.isfinite(p.grad).all() for p in method.query_encoder.parameters())


def test_queue_two_takes_all_cells_of_an_image_in_a_row():
    method = make_method(small_inscon())
    prepared, _ = backward(method, make_batch(small_inscon()))
    torch.testing.assert_close(method.queues["cell"].keys[: 9 * BATCH], prepared.own["cell"].reshape(-1, 256))
    torch.testing.assert_close(method.queues["single"].keys[:BATCH], prepared.own["single"])
    assert method.queues["cell"].pointer == 9 * BATCH and method.queues["cell"].per_step == 9 * BATCH


@pytest.mark.parametrize(
    ("backbone", "settings"), [("convnext_atto", {}), ("vit_tiny_patch16_224", {"cell_stage": "res4"})]
)
def test_it_trains_backbones_of_other_families(backbone, settings):
    """No BatchNorm, other strides, other channels; the same method."""
    settings = small_inscon(**settings)
    method = make_method(settings, dtype=torch.float32, backbone=backbone, norm="auto", views=VIEWS)
    losses = take_steps(method, [make_batch(settings, seed=step, dtype=torch.float32) for step in range(2)])
    assert all(torch.isfinite(logged(own)["loss"]) for own in losses)
    assert method.shuffle.order is None and method.key_encoder.backbone.channels == method.backbone.channels
