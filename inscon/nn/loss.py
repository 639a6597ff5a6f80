"""InfoNCE with a queue of negatives, for one positive per query or several (paper equations 1 to 4). Every logit is divided by the
temperature; several positives are the mean of separate terms or one sum inside the logarithm, as printed (METHOD 4 and 5)."""

import contextlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26, "meta": 2**40}
"""Logits held at once, by device: 16 MB in float32, about what a CPU's cache holds; 256 MB on a GPU."""
KEPT_LOGITS = {"cpu": 2**22, "cuda": 2**25, "meta": 2**62}
"""Up to so many are kept for the backward pass; more are computed again there, a chunk at a time."""


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least."""
    return torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, products are taken in their factors' own precision, whatever autocast is on."""
    meta = device.type == "meta"  # which has no autocast
    return contextlib.nullcontext() if meta else torch.autocast(device.type, enabled=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogits:
    """What the losses need of each query's logits: never the logits themselves."""

    positive: Float[Tensor, "N"]
    negative_lse: Float[Tensor, "N"]  # log of the sum of exp over the negatives.
    hardest_negative: Float[Tensor, "N"]  # The largest negative logit, without gradient.

    @property
    def top1(self) -> Float[Tensor, ""]:
        """Share of queries whose positive beats every negative: the alarm for leaks (METHOD, last section)."""
        return (self.positive.detach() > self.hardest_negative).float().mean()


def row_logits(
    queries: Float[Tensor, "N D"], positives: Float[Tensor, "N D"], negatives: Float[Tensor, "K D"], temperature: float
) -> RowLogits:
    """Similarities over temperature, reduced per query, never in half precision. No gradient reaches positives or negatives."""
    with full_precision(queries.device):
        positive = (queries * positives.detach()).sum(-1) / temperature
        lse, hardest = _Negatives.apply(queries, negatives.detach(), temperature)
    return RowLogits(positive=positive, negative_lse=lse, hardest_negative=hardest)


class _Negatives(torch.autograd.Function):
    """(log of the sum of exp, maximum) over the keys of each query's similarities / temperature, as one stream of chunks. Autograd
    would keep the logits, their exponentials and the gradient of either, each [N K]. Here a chunk is made, reduced in place and
    forgotten; the gradient of a query is the softmax's mean key, so its chunk is made again and multiplied."""

    @staticmethod
    def forward(ctx, queries: Tensor, negatives: Tensor, temperature: float):
        lse, hardest = queries.new_empty(queries.shape[0]), queries.new_empty(queries.shape[0])
        few = queries.shape[0] * negatives.shape[0] <= KEPT_LOGITS[queries.device.type]
        kept = None
        for rows, logits in _chunks(queries, negatives, temperature, whole=few):
            torch.amax(logits, -1, out=hardest[rows])
            sums = logits.sub_(hardest[rows, None]).exp_().sum(-1)
            torch.add(hardest[rows], sums.log(), out=lse[rows])
            if few:
                kept = logits.div_(sums[:, None])
        ctx.save_for_backward(queries, negatives, lse, kept)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(hardest)
        return lse, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_lse: Tensor, _):
        queries, negatives, lse, kept = ctx.saved_tensors
        weight = (grad_lse / ctx.temperature)[:, None]
        if kept is not None:
            return kept @ negatives * weight, None, None
        grad = torch.empty_like(queries)
        for rows, logits in _chunks(queries, negatives, ctx.temperature):
            softmax = logits.sub_(lse[rows, None]).exp_()
            torch.mm(softmax, negatives, out=grad[rows])
        return grad.mul_(weight), None, None


def _chunks(queries: Tensor, negatives: Tensor, temperature: float, whole: bool = False):
    """(rows, logits [rows K] to be overwritten) for all queries; one piece of memory serves all chunks."""
    count, keys = queries.shape[0], negatives.shape[0]
    size = count if whole else max(min(CHUNK_LOGITS[queries.device.type] // keys, count), 1)
    memory = queries.new_empty(size, keys)
    scaled = queries / temperature
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        yield rows, torch.mm(scaled[rows], negatives.T, out=memory[: rows.stop - start])


def separate_terms(logits: RowLogits) -> Float[Tensor, "N"]:
    """InfoNCE of each query alone (equation 1, with every logit divided by the temperature); log(1 + K) for equal similarities."""
    return torch.logaddexp(logits.positive, logits.negative_lse) - logits.positive


def group_terms(logits: RowLogits, positives_each: int, aggregate: str) -> Float[Tensor, "N"]:
    """InfoNCE of rows in groups of `positives_each` (tiles of a mosaic, cells of an overlap), one value for each group: "mean" of
    separate terms, or "literal", equations 2 and 3 as printed, positives, and negatives, summed inside the log (METHOD 4)."""
    grouped = (-1, positives_each)
    if aggregate == "mean":
        return separate_terms(logits).unflatten(0, grouped).mean(-1)
    positive, negative = (lse.unflatten(0, grouped).logsumexp(-1) for lse in (logits.positive, logits.negative_lse))
    return torch.logaddexp(positive, negative) - positive
