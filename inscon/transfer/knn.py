"""k nearest neighbors on frozen features: is the run healthy, today, without training anything.

Protocol of Wu et al. (2018): pooled features, L2-normalized, cosine similarity, the k nearest vote with weight
exp(similarity / temperature).
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from inscon import distributed
from inscon.nn.backbones import Backbone

SIMILARITIES = 1 << 26
"""Computed at once, at most: 256 MB in float32."""


@torch.no_grad()
def pooled(backbone: Backbone, pixels: Tensor, amp_dtype: torch.dtype | None) -> Float[Tensor, "B F"]:
    """The mean of the last map, in float32; convolutions in `amp_dtype`, where it is not None."""
    with torch.autocast(pixels.device.type, amp_dtype, enabled=amp_dtype is not None):
        maps = backbone(pixels)
    return maps[backbone.last].float().mean((2, 3))


@torch.inference_mode()
def features(
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "N F"], Int[Tensor, "N"]]:
    """Unit features and labels of all `batches` of (pixels [B 3 S S], labels [B]), on the CPU; the backbone isn't changed.

    No batches, as for a rank without pictures, make N = 0. `amp_dtype`: as in `pooled`.
    FloatingPointError for features that are not finite.
    """
    if backbone.training:
        raise ValueError(
            "features are taken with the backbone in eval mode, or its statistics would move. Found: train mode"
        )
    device = torch.device(device)
    backbone = backbone.to(device=device, memory_format=torch.channels_last)
    rows = [(torch.zeros(0, backbone.channels[backbone.last]), torch.zeros(0, dtype=torch.int64))]
    for pixels, labels in batches:
        rows.append((F.normalize(pooled(backbone, pixels.to(device), amp_dtype), dim=1).cpu(), labels))
    found, labels = torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])
    broken = int((~found.isfinite()).any(1).sum())
    if broken:
        raise FloatingPointError(
            f"{broken} of {len(found)} pictures have features that are not finite; set --precision fp32"
        )
    return found, labels


def accuracy(
    queries: Float[Tensor, "N F"],
    query_labels: Int[Tensor, "N"],
    bank: Float[Tensor, "P F"],
    bank_labels: Int[Tensor, "P"],
    k: int = 200,
    temperature: float = 0.1,
    leave_one_out: bool = False,
    device: torch.device | str = "cpu",
) -> float:
    """Share of queries, 0..1, whose class wins the vote of their `k` nearest rows of `bank`. All rows are unit vectors.

    `leave_one_out`: queries are the bank, and none votes for itself. `device`: where similarities are computed.
    """
    others = len(bank) - leave_one_out
    if not 1 <= k <= others:
        raise ValueError(f"k must lie in 1..{others}, the size of the bank. Found: {k}")
    num_classes = int(max(query_labels.max(), bank_labels.max())) + 1
    correct, rows = 0, max(SIMILARITIES // len(bank), 1)
    bank, bank_labels = bank.to(device), bank_labels.to(device)
    for start in range(0, len(queries), rows):
        part, labels = queries[start : start + rows].to(device), query_labels[start : start + rows].to(device)
        similarities = part @ bank.T
        if leave_one_out:
            own = torch.arange(len(part), device=similarities.device)
            similarities[own, start + own] = -torch.inf
        similarity, nearest = similarities.topk(k, dim=1)
        votes = torch.zeros(len(part), num_classes, device=similarities.device).scatter_add_(
            1, bank_labels[nearest], (similarity.float() / temperature).exp()
        )
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(queries)


def monitor(
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    k: int = 20,
) -> float:
    """Share, 0..1, of a held-out set's pictures whose class wins among their `k` neighbors in the same set.

    For a backbone in training, whose mode is as it was afterwards; its weights and statistics aren't touched. Each rank gives
    the features of its own `batches`; all ranks know the answer.
    """
    was_training = backbone.training
    try:
        rows, labels = features(backbone.eval(), batches, device, amp_dtype)
    finally:
        backbone.train(was_training)
    if distributed.world_size() > 1:
        longest = int(distributed.worst({"rows": float(len(rows))})["rows"])
        padding = longest - len(rows)
        rows = distributed.gather(F.pad(rows, (0, 0, 0, padding)))
        labels = distributed.gather(F.pad(labels, (0, padding), value=-1))
        rows, labels = rows[labels >= 0], labels[labels >= 0]
    if len(rows) < 2:  # left off
        return math.nan
    return accuracy(rows, labels, rows, labels, min(k, len(rows) - 1), leave_one_out=True, device=device)
