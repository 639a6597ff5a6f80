"""DenseCL against a loop written from the paper's equations, its matches by hand, its weight over time."""

import math

import pytest
import torch

from inscon.methods import densecl
from tests.inscon.methods.plain import FEW, Plain, nce, norm
from tests.inscon.methods.steps import backward, logged, make_batch, make_method, small_rivals

SETTINGS = small_rivals(FEW)["densecl"]
TINY = {"batch": FEW, "norm": "sync", "backbone": "test_resnet"}


def test_loss_and_gradients_are_those_of_a_loop():
    weight = 0.3
    settings = densecl.Settings(queue_size=3 * FEW, dense_from_step=0, dense_weight=weight)
    method, batch = make_method(settings, batch=FEW, norm="sync"), make_batch(settings, batch=FEW)
    queues = {name: queue.keys.clone() for name, queue in method.queues.items()}
    assert not torch.equal(queues["single"], queues["dense"])
    query, key = Plain(method.query_encoder), Plain(method.key_encoder)
    _, losses = backward(method, batch)

    places = lambda plain, view: plain.maps(batch.views[view].pixels)[32].flatten(2).transpose(1, 2)  # noqa: E731
    f1 = places(query, "query")
    with torch.no_grad():
        f2 = places(key, "key")
        global_keys, dense_keys = norm(key.mlp(f2.mean(1), "head")), key.mlp(f2, "dense")
    single, dense = [], []
    for b in range(FEW):
        single.append(nce(norm(query.mlp(f1[b].mean(0), "head")), global_keys[b], queues["single"], 0.2))
        for s in range(4):
            cosines = [
                float(f1[b, s].detach() @ f2[b, t] / f1[b, s].detach().norm() / f2[b, t].norm()) for t in range(4)
            ]
            positive = norm(dense_keys[b, cosines.index(max(cosines))])
            dense.append(nce(norm(query.mlp(f1[b, s], "dense")), positive, queues["dense"], 0.2))
    single, dense = torch.stack(single).mean(), torch.stack(dense).mean()
    total, figures = (1 - weight) * single + weight * dense, logged(losses)
    assert figures["loss_single"].item() == pytest.approx(single.item())
    assert figures["loss_dense"].item() == pytest.approx(dense.item())
    assert figures["loss"].item() == pytest.approx(total.item())
    query.check_gradients(total, method.query_encoder)

    one_each = norm(dense_keys.mean(1))  # of each image, not of each place
    torch.testing.assert_close(method.queues["dense"].keys[:FEW], one_each)
    torch.testing.assert_close(method.queues["single"].keys[:FEW], global_keys)
    assert all(queue.pointer == FEW for queue in method.queues.values())


def test_matches_are_the_most_similar_places():
    eye = torch.eye(4)
    order = [[2, 0, 3, 1], [1, 1, 0, 3]]
    key = torch.stack([eye, eye])
    query = torch.stack([0.9 * eye[own] + 0.1 for own in order])
    assert densecl.best_matches(query, key).tolist() == order
    query, key = (torch.nn.functional.normalize(torch.randn(3, n, 8), dim=-1) for n in (5, 7))
    expected = [[max(range(7), key=lambda t: float(q @ k[t])) for q in qs] for qs, k in zip(query, key)]
    assert densecl.best_matches(query, key).tolist() == expected


def test_equal_vectors_cost_log_of_one_plus_k():
    method, batch = make_method(SETTINGS, **TINY), make_batch(SETTINGS, batch=FEW)
    with torch.no_grad():
        for encoder in (method.query_encoder, method.key_encoder):
            for head in (encoder.head, encoder.dense):
                head[2].weight.zero_(), head[2].bias.fill_(1.0)
        for queue in method.queues.values():
            queue.keys.fill_(128**-0.5)
    figures = logged(backward(method, batch)[1])
    for name in ("loss_single", "loss_dense", "loss"):
        assert figures[name].item() == pytest.approx(math.log(1 + 3 * FEW))


def test_the_dense_loss_begins_late():
    settings = densecl.Settings(queue_size=3 * FEW)
    method, batch = make_method(settings, **TINY), make_batch(settings, batch=FEW)
    for step, expected in ((0, 0.0), (999, 0.0), (1000, 0.5), (5000, 0.5)):
        figures = logged(backward(method, batch, step)[1])
        assert method.dense_weight.item() == expected
        parts = (1 - expected) * figures["loss_single"] + expected * figures["loss_dense"]
        assert figures["loss"].item() == pytest.approx(parts.item())
    assert "dense_weight" not in method.state_dict()


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="--dense-weight must be from 0 to 1. Found: 1.5"):
        densecl.Settings(dense_weight=1.5)
    with pytest.raises(ValueError, match="--dense-from-step must be at least 0. Found: -1"):
        densecl.Settings(dense_from_step=-1)
