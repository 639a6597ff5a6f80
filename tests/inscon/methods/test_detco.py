"""DetCo against a loop over four levels, three terms each; its queues; who is normalized with whom."""

import math

import pytest
import torch

from inscon.config import ViewConfig
from inscon.methods import detco
from inscon.plan import NO_COLOR
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
from tests.inscon.methods.test_moco import changed_rows

SETTINGS = small_rivals(FEW)["detco"]
TINY = {"batch": FEW, "norm": "sync", "backbone": "test_resnet"}
LEVELS = (4, 8, 16, 32)


def embedded(plain, batch, view):
    """(global, local) by level, unit vectors."""
    whole = plain.maps(batch.views[view].pixels)
    patches = plain.maps(batch.views[f"{view}_patches"].pixels.reshape(-1, 3, 16, 16))
    made = {}
    for level in LEVELS:
        nine = plain.mlp(patches[level].mean((2, 3)), f"heads.local_{level}.0").reshape(FEW, 9 * 128)
        made[f"global_{level}"] = norm(plain.mlp(whole[level].mean((2, 3)), f"heads.global_{level}"))
        made[f"local_{level}"] = norm(plain.linear(nine, f"heads.local_{level}.2"))
    return made


def test_loss_and_gradients_are_those_of_a_loop():
    weights = (1.0, 0.5, 2.0, 0.25)
    settings = detco.Settings(queue_size=3 * FEW, jigsaw_size=51, patch_size=16, level_weights=weights)
    method, batch = make_method(settings, batch=FEW, norm="sync"), make_batch(settings, batch=FEW)
    queues = {name: queue.keys.clone() for name, queue in method.queues.items()}
    plain, slow = Plain(method.query_encoder), Plain(method.key_encoder)
    _, losses = backward(method, batch)
    q = embedded(plain, batch, "query")
    with torch.no_grad():
        k = embedded(slow, batch, "key")
    total, terms, figures = 0.0, 0, logged(losses)
    for level, weight in zip(LEVELS, weights, strict=True):
        g, loc = f"global_{level}", f"local_{level}"
        for name, query, key, queue in ((g, g, g, g), (loc, loc, loc, loc), (f"across_{level}", loc, g, g)):
            term = torch.stack([nce(q[query][b], k[key][b], queues[queue], 0.2) for b in range(FEW)]).mean()
            assert figures[f"loss_{name}"].item() == pytest.approx(term.item()), name
            total, terms = total + weight * term, terms + 1
    assert figures["loss"].item() == pytest.approx(total.item())
    assert terms == 12 == sum(name.startswith("loss_") for name in figures)
    plain.check_gradients(total, method.query_encoder)
    assert len(queues) == 8 and k.keys() == queues.keys()
    for name, queue in method.queues.items():
        torch.testing.assert_close(queue.keys[:FEW], k[name])
        assert queue.pointer == FEW and torch.equal(queue.keys[FEW:], queues[name][FEW:])


def test_equal_vectors_cost_log_of_one_plus_k():
    method, batch = make_method(SETTINGS, **TINY), make_batch(SETTINGS, batch=FEW)
    with torch.no_grad():
        for encoder in (method.query_encoder, method.key_encoder):
            for head in encoder.heads.values():
                head[2].weight.zero_(), head[2].bias.fill_(1.0)
        for queue in method.queues.values():
            queue.keys.fill_(128**-0.5)
    figures = logged(backward(method, batch)[1])
    assert figures["loss"].item() == pytest.approx(3 * (0.1 + 0.4 + 0.7 + 1.0) * math.log(1 + 3 * FEW))


def test_an_images_patches_are_normalized_together_and_travel_together():
    """Changing image j's patches changes the queries of j's group, and the keys of the group that j's key is sent to."""
    settings = small_rivals(16)["detco"]
    method, batch = make_method(settings, batch=16, backbone="test_resnet"), make_batch(settings, batch=16)
    for j in (0, 5, 15):
        changed = make_batch(settings, batch=16)
        for name in ("query_patches", "key_patches"):
            changed.views[name].pixels[j, 4] += 3 * torch.randn_like(changed.views[name].pixels[j, 4])
        queries = [method.query_encoder.embed("local", b.views["query_patches"].pixels) for b in (batch, changed)]
        keys = [method.prepare(b).own for b in (batch, changed)]
        group = j // 4 * 4
        for level in LEVELS:
            name = f"local_{level}"
            company = changed_rows(*(made[name].detach() for made in queries))
            assert company == list(range(group, group + 4))
            met = changed_rows(*(made[name] for made in keys))
            assert j in met and len(met) == 4 and len(set(met) & set(company)) <= 2
            assert torch.equal(*(made[f"global_{level}"] for made in keys))


def test_views_are_two_whole_ones_and_their_patches():
    specs = {spec.name: spec for spec in detco.Settings().view_specs(VIEWS)}
    assert list(specs) == ["query", "key", "query_patches", "key_patches"]
    for name in ("query_patches", "key_patches"):
        assert (specs[name].size, specs[name].side, specs[name].count, specs[name].scale) == (255, 64, 9, (0.6, 1.0))
        assert specs[name].color == VIEWS.color() and not specs[name].grid.shuffled
    moved = {s.name: s.color.randaugment for s in detco.Settings().view_specs(ViewConfig(randaugment=2))}
    assert moved == {"query": 2, "key": 2, "query_patches": 0, "key_patches": 0}
    plain = detco.Settings(patch_colors=False).view_specs(VIEWS)
    assert [spec.color == NO_COLOR for spec in plain] == [False, False, True, True]


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="--level-weights must be at least 0. Found: .*-0.1"):
        detco.Settings(level_weights=(0.1, 0.4, 0.7, -0.1))
    with pytest.raises(
        ValueError, match="strides 4, 8, 16, 32 px .* vit_small_patch16_224 has others. Found: 16; set --b"
    ):
        make_config(SETTINGS, backbone="vit_small_patch16_224")
