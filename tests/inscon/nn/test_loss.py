"""InfoNCE in its two aggregations against loops in float64 and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F

from inscon.nn import loss as loss_module
from inscon.nn.loss import group_terms, row_logits, separate_terms


def info_nce(queries, positives, negatives, temperature):
    """The mean of N queries, each against its own positive and all K negatives."""
    return separate_terms(row_logits(queries, positives, negatives, temperature)).mean()


def multi_positive_info_nce(queries, positives, negatives, temperature, aggregate, weight=1.0):
    """The mean of N groups of M queries [N M D], query m of a group against positive m, times the groups' weights."""
    logits = row_logits(queries.flatten(0, 1), positives.flatten(0, 1), negatives, temperature)
    return (group_terms(logits, queries.shape[1], aggregate) * weight).mean()


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def info_nce_by_loops(queries, positives, negatives, temperature):
    terms = []
    for q, k in zip(queries, positives):
        positive = math.exp(float(q @ k) / temperature)
        negative = sum(math.exp(float(q @ n) / temperature) for n in negatives)
        terms.append(-math.log(positive / (positive + negative)))
    return sum(terms) / len(terms)


def literal_by_loops(queries, positives, negatives, temperature):
    groups = []
    for query_group, positive_group in zip(queries, positives):
        positive = sum(math.exp(float(q @ k) / temperature) for q, k in zip(query_group, positive_group))
        negative = sum(math.exp(float(q @ n) / temperature) for q in query_group for n in negatives)
        groups.append(-math.log(positive / (positive + negative)))
    return sum(groups) / len(groups)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_equals_loops(temperature):
    queries, positives, negatives = unit(6, 16), unit(6, 16, seed=1), unit(40, 16, seed=2)
    ours = info_nce(queries, positives, negatives, temperature)
    assert ours.item() == pytest.approx(info_nce_by_loops(queries, positives, negatives, temperature), abs=1e-12)
    torch_says = F.cross_entropy(
        torch.cat([(queries * positives).sum(1, keepdim=True), queries @ negatives.T], 1) / temperature,
        torch.zeros(6, dtype=torch.long),
    )
    torch.testing.assert_close(ours, torch_says)


@pytest.mark.parametrize("keys", [1, 63, 65536])
def test_equal_similarities_cost_log_of_one_plus_k(keys):
    row = unit(1, 8).float()
    ours = info_nce(row.repeat(5, 1), row.repeat(5, 1), row.repeat(keys, 1), 0.2)
    assert ours.item() == pytest.approx(math.log(1 + keys), rel=1e-5)
    many = row.repeat(10, 1).view(5, 2, 8)
    for aggregate in ("mean", "literal"):
        both = multi_positive_info_nce(many, many, row.repeat(keys, 1), 0.2, aggregate)
        assert both.item() == pytest.approx(math.log(1 + keys), rel=1e-5)


def test_two_aggregations_equal_loops():
    queries, positives, negatives = unit(3, 9, 16), unit(3, 9, 16, seed=1), unit(30, 16, seed=2)
    mean = multi_positive_info_nce(queries, positives, negatives, 0.2, aggregate="mean")
    flat = queries.flatten(0, 1), positives.flatten(0, 1)
    assert mean.item() == pytest.approx(info_nce_by_loops(*flat, negatives, 0.2), abs=1e-12)
    literal = multi_positive_info_nce(queries, positives, negatives, 0.2, aggregate="literal")
    assert literal.item() == pytest.approx(literal_by_loops(queries, positives, negatives, 0.2), abs=1e-12)
    assert abs(literal.item() - mean.item()) > 1e-3


def test_literal_is_winner_takes_all():
    """METHOD, reading 4: positives at cosine .9 .6 .5 .3 get 71, 16, 10 and 4 % of the gradient."""
    cosines = torch.tensor([0.9, 0.6, 0.5, 0.3], dtype=torch.float64)
    key = F.one_hot(torch.tensor(0), 8).double()
    rows = torch.stack(
        [F.one_hot(torch.tensor(0), 8) * c + F.one_hot(torch.tensor(1), 8) * (1 - c * c).sqrt() for c in cosines]
    )
    queries = rows[None].clone().requires_grad_()
    negatives = F.one_hot(torch.tensor(7), 8).double().repeat(1000, 1)
    multi_positive_info_nce(queries, key.expand(1, 4, 8), negatives, 0.2, aggregate="literal").backward()
    share = queries.grad[0, :, 0] / queries.grad[0, :, 0].sum()
    assert (100 * share).round().tolist() == [71, 16, 10, 4]


@pytest.mark.parametrize("aggregate", ["mean", "literal"])
def test_weights_switch_groups_off(aggregate):
    queries, positives, negatives = unit(4, 9, 16).requires_grad_(), unit(4, 9, 16, seed=1), unit(30, 16, seed=2)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    value = multi_positive_info_nce(queries, positives, negatives, 0.2, aggregate, weight=weight)
    value.backward()
    alone = multi_positive_info_nce(queries.detach()[[0, 2]], positives[[0, 2]], negatives, 0.2, aggregate)
    assert value.item() == pytest.approx(alone.item() / 2)  # the divisor is all images, so that ranks agree
    assert (queries.grad[[1, 3]] == 0).all() and (queries.grad[[0, 2]] != 0).any()


def limit(monkeypatch, chunk, kept):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", {"cpu": chunk})
    monkeypatch.setattr(loss_module, "KEPT_LOGITS", {"cpu": kept})


@pytest.mark.parametrize("rows", [1, 7, 25, 50, 60])
def test_chunks_change_nothing(rows, monkeypatch):
    """Against the dense form, differentiated by autograd."""
    queries, positives, negatives = unit(50, 16).requires_grad_(), unit(50, 16, seed=1), unit(64, 16, seed=2)
    logits = torch.cat([(queries * positives).sum(1, keepdim=True), queries @ negatives.T], 1) / 0.2
    dense = F.cross_entropy(logits, torch.zeros(50, dtype=torch.long))
    (gradient,) = torch.autograd.grad(dense, queries)
    for kept in (0, 50 * 64):
        limit(monkeypatch, 64 * rows, kept)
        chunked = info_nce(queries, positives, negatives, 0.2)
        torch.testing.assert_close(chunked, dense, rtol=1e-14, atol=0)
        torch.testing.assert_close(torch.autograd.grad(chunked, queries)[0], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("aggregate", ["mean", "literal"])
def test_gradients_are_those_of_finite_differences(aggregate, kept, monkeypatch):
    limit(monkeypatch, 3 * 20, kept)
    queries, positives, negatives = unit(4, 3, 6).requires_grad_(), unit(4, 3, 6, seed=1), unit(20, 6, seed=2)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q: multi_positive_info_nce(q, positives, negatives, 0.2, aggregate, weight), (queries,)
    )


def test_large_similarities_do_not_overflow():
    queries = torch.full((2, 4), 30.0, requires_grad=True)
    value = info_nce(queries, queries.detach(), torch.full((5, 4), 30.0), 0.2)
    value.backward()
    assert value.item() == pytest.approx(math.log(6), abs=2e-3) and torch.isfinite(queries.grad).all()


def test_no_gradient_reaches_keys():
    queries, positives, negatives = (unit(4, 8, seed=s).requires_grad_() for s in range(3))
    info_nce(queries, positives, negatives, 0.2).backward()
    assert queries.grad is not None and positives.grad is None and negatives.grad is None


def test_top1_counts_positives_above_every_negative():
    eye = torch.eye(4)
    logits = row_logits(eye, eye[[0, 1, 3, 3]], 0.5 * eye[[2, 2]], 0.2)
    assert logits.top1.item() == 0.75  # query 2 has positive 0 and hardest negative 0.5
