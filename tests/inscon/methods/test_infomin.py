"""InfoMin against a loop: whole views and patches, both against the keys of whole views and one queue."""

import math

import pytest
import torch

from inscon.methods import infomin
from inscon.plan import NO_COLOR
from tests.inscon.methods.plain import FEW, Plain, nce, norm
from tests.inscon.methods.steps import VIEWS, backward, logged, make_batch, make_method, small_rivals

SETTINGS = small_rivals(FEW)["infomin"]
TINY = {"batch": FEW, "norm": "sync", "backbone": "test_resnet"}


def test_loss_and_gradients_are_those_of_a_loop():
    weight = 0.3
    settings = infomin.Settings(queue_size=3 * FEW, jigsaw_size=51, patch_size=16, jigsaw_weight=weight)
    method, batch = make_method(settings, batch=FEW, norm="sync"), make_batch(settings, batch=FEW)
    queue = method.queues["single"].keys.clone()
    query, key = Plain(method.query_encoder), Plain(method.key_encoder)
    _, losses = backward(method, batch)
    with torch.no_grad():
        keys = norm(key.mlp(key.maps(batch.views["key"].pixels)[32].mean((2, 3)), "head"))
    whole = query.maps(batch.views["query"].pixels)[32].mean((2, 3))
    patches = query.maps(batch.views["patches"].pixels.reshape(-1, 3, 16, 16))[32].mean((2, 3))
    single, jigsaw = [], []
    for b in range(FEW):
        single.append(nce(norm(query.mlp(whole[b], "head")), keys[b], queue, 0.15))
        nine = [query.mlp(patches[9 * b + p], "jigsaw.0") for p in range(9)]
        jigsaw.append(nce(norm(query.linear(torch.cat(nine), "jigsaw.2")), keys[b], queue, 0.15))
    single, jigsaw = torch.stack(single).mean(), torch.stack(jigsaw).mean()
    total, figures = (1 - weight) * single + weight * jigsaw, logged(losses)
    assert figures["loss_single"].item() == pytest.approx(single.item())
    assert figures["loss_jigsaw"].item() == pytest.approx(jigsaw.item())
    assert figures["loss"].item() == pytest.approx(total.item())
    query.check_gradients(total, method.query_encoder)
    torch.testing.assert_close(method.queues["single"].keys[:FEW], keys)
    assert list(method.queues) == ["single"] and list(losses) == ["query", "patches"]


def test_equal_vectors_cost_log_of_one_plus_k():
    method, batch = make_method(SETTINGS, **TINY), make_batch(SETTINGS, batch=FEW)
    with torch.no_grad():
        for layer in (method.query_encoder.head[2], method.query_encoder.jigsaw[2], method.key_encoder.head[2]):
            layer.weight.zero_(), layer.bias.fill_(1.0)
        method.queues["single"].keys.fill_(128**-0.5)
    figures = logged(backward(method, batch)[1])
    for name in ("loss_single", "loss_jigsaw", "loss"):
        assert figures[name].item() == pytest.approx(math.log(1 + 3 * FEW))


def test_patches_have_no_colors_and_come_in_any_order():
    query, key, patches = infomin.Settings().view_specs(VIEWS)
    assert query.color == key.color == VIEWS.color() and patches.color == NO_COLOR
    assert (patches.size, patches.side, patches.count, patches.scale) == (255, 64, 9, (0.6, 1.0))
    assert patches.grid.shuffled and patches.flip == 0.5


def test_the_key_encoder_has_no_head_for_patches():
    method = make_method(SETTINGS, **TINY)
    assert not hasattr(method.key_encoder, "jigsaw") and method.query_encoder.jigsaw is not None
    assert {n for n, _ in method.query_encoder.named_parameters() if not n.startswith("jigsaw")} == {
        n for n, _ in method.key_encoder.named_parameters()
    }


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="--jigsaw-weight must be from 0 to 1. Found: -0.5"):
        infomin.Settings(jigsaw_weight=-0.5)
    with pytest.raises(ValueError, match="a patch must fit its cell of 32 px. Found: 64 px"):
        infomin.Settings(jigsaw_size=96).view_specs(VIEWS)
