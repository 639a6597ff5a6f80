"""InfoNCE with a queue of negatives, for one positive per query or several (paper equations 1 to 4).

Readings 4 and 5 of METHOD: every logit is divided by the temperature, and several positives are either the mean of
separate terms or one sum inside the logarithm, as printed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 2**26
"""Logits held at once, 256 MB in float32; beyond, rows go through in chunks that are recomputed in the backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogits:
    """What the losses need of each query's logits: never the logits themselves."""

    positive: Float[Tensor, "N"]
    negative_lse: Float[Tensor, "N"]
    """log of the sum of exp over the negatives."""
    hardest_negative: Float[Tensor, "N"]
    """The largest negative logit, without gradient."""

    @property
    def top1(self) -> Float[Tensor, ""]:
        """Share of queries whose positive beats every negative: the alarm for leaks (METHOD, last section)."""
        return (self.positive.detach() > self.hardest_negative).float().mean()


def row_logits(
    queries: Float[Tensor, "N D"], positives: Float[Tensor, "N D"], negatives: Float[Tensor, "K D"], temperature: float
) -> RowLogits:
    """Similarities over temperature, reduced per query. No gradient reaches positives or negatives."""
    positives, negatives = positives.detach(), negatives.detach()
    rows = max(CHUNK_LOGITS // negatives.shape[0], 1)
    if queries.shape[0] <= rows:
        positive, lse, hardest = _reduce(queries, positives, negatives, temperature)
    else:
        parts = [
            checkpoint(_reduce, q, p, negatives, temperature, use_reentrant=False)
            for q, p in zip(queries.split(rows), positives.split(rows))
        ]
        positive, lse, hardest = (torch.cat(column) for column in zip(*parts))
    return RowLogits(positive=positive, negative_lse=lse, hardest_negative=hardest)


def _reduce(queries: Tensor, positives: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    positive = (queries * positives).sum(-1) / temperature
    logits = queries @ negatives.T / temperature
    return positive, logits.logsumexp(-1), logits.detach().amax(-1)


def separate_terms(logits: RowLogits) -> Float[Tensor, "N"]:
    """InfoNCE of each query alone (equation 1, with every logit divided by the temperature)."""
    return torch.logaddexp(logits.positive, logits.negative_lse) - logits.positive


def joint_term(logits: RowLogits, positives_each: int) -> Float[Tensor, "N"]:
    """Equations 2 and 3 as printed, for rows in groups of `positives_each`: positives, and negatives, summed inside the log."""
    positive = logits.positive.unflatten(0, (-1, positives_each)).logsumexp(-1)
    negative = logits.negative_lse.unflatten(0, (-1, positives_each)).logsumexp(-1)
    return torch.logaddexp(positive, negative) - positive


def info_nce(
    queries: Float[Tensor, "N D"], positives: Float[Tensor, "N D"], negatives: Float[Tensor, "K D"], temperature: float
) -> Float[Tensor, ""]:
    """Mean InfoNCE of N queries, each against its own positive and all K negatives. Inputs are L2-normalised rows.

    With equal similarities it is log(1 + K).
    """
    return separate_terms(row_logits(queries, positives, negatives, temperature)).mean()


def multi_positive_info_nce(
    queries: Float[Tensor, "N M D"],
    positives: Float[Tensor, "N M D"],
    negatives: Float[Tensor, "K D"],
    temperature: float,
    aggregate: str = "mean",
    weight: Float[Tensor, "N"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE of N groups of M queries, query m of a group against positive m (tiles of a mosaic, cells of an overlap).

    `aggregate="mean"`: the mean of separate terms; "literal": one sum inside the log per group (METHOD 4). A group's
    loss is multiplied by its `weight` (0 for an overlap that is none); the mean is over all N, so that ranks agree.
    """
    logits = row_logits(queries.flatten(0, 1), positives.flatten(0, 1), negatives, temperature)
    return aggregate_groups(logits, queries.shape[1], aggregate, weight)


def aggregate_groups(
    logits: RowLogits, positives_each: int, aggregate: str, weight: Tensor | None
) -> Float[Tensor, ""]:
    """The second half of `multi_positive_info_nce`, for callers who also want `logits.top1`."""
    if aggregate == "mean":
        groups = separate_terms(logits).unflatten(0, (-1, positives_each)).mean(-1)
    elif aggregate == "literal":
        groups = joint_term(logits, positives_each)
    else:
        raise ValueError(f'aggregate must be "mean" or "literal". Found: "{aggregate}"')
    return (groups if weight is None else groups * weight).mean()
