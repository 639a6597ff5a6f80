"""k nearest neighbors on frozen features, by the protocol of Wu et al. (2018): cosine similarity of pooled features, the k nearest
vote with weight exp(similarity / 0.1)."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from inscon import distributed
from inscon.nn.backbones import Backbone

Batches = Iterable[tuple[Tensor, Tensor]]  # (pixels [B 3 S S], labels [B]).
Device, Dtype = torch.device | str, torch.dtype | None
Rows = tuple[Tensor, Tensor]  # Pooled features [N F] float32 and labels [N] int64, on the CPU.
TEMPERATURE = 0.1
SIMILARITIES = 1 << 26  # Computed at once, at most: 256 MB in float32.
MONITORED = 20  # Neighbors in `monitor`.


@torch.no_grad()
def pooled(backbone: Backbone, pixels: Tensor, amp_dtype: Dtype) -> Float[Tensor, "B F"]:
    """The mean of the last map, in float32; convolutions in `amp_dtype`, where it is not None."""
    with torch.autocast(pixels.device.type, amp_dtype, enabled=amp_dtype is not None):
        maps = backbone(pixels)
    return maps[backbone.last].float().mean((2, 3))


@torch.inference_mode()
def features(backbone: Backbone, batches: Batches, device: Device = "cpu", amp_dtype: Dtype = None) -> Rows:
    """Of all `batches`, which may be none; `amp_dtype`: as in `pooled`. FloatingPointError where they are not finite."""
    assert not backbone.training, "its statistics would move"
    backbone = backbone.to(device=device, memory_format=torch.channels_last)
    found = [(torch.zeros(0, backbone.channels[backbone.last]), torch.zeros(0, dtype=torch.int64))]
    for pixels, labels in batches:
        found.append((pooled(backbone, pixels.to(device), amp_dtype).cpu(), labels))
    rows, labels = map(torch.cat, zip(*found))
    if broken := int((~rows.isfinite()).any(1).sum()):
        found = f"{broken} of {len(rows)} pictures have features that are not finite"
        raise FloatingPointError(f"{found}; set --precision fp32")
    return rows, labels


def accuracy(queries: Rows, bank: Rows | None, k: int = 200, device: Device = "cpu") -> float:
    """Share of queries, 0..1, whose class wins the vote of their `k` nearest rows of `bank`; None: the queries themselves, of which
    none votes for itself. `device`: where similarities are computed."""
    rows, labels = queries
    others, classes = (part.to(device) for part in bank or queries)
    rows, others = F.normalize(rows, dim=1), F.normalize(others, dim=1)
    most = len(others) - (bank is None)
    if not 1 <= k <= most:
        raise ValueError(f"k must lie in 1..{most}, the size of the bank. Found: {k}; set --k {min(200, most)}")
    num_classes = int(max(labels.max(), classes.max())) + 1
    correct, at_once = 0, max(SIMILARITIES // len(others), 1)
    for start in range(0, len(rows), at_once):
        similarities = rows[start : start + at_once].to(device) @ others.T
        if bank is None:
            similarities.diagonal(start).fill_(-torch.inf)
        similarity, nearest = similarities.topk(k, dim=1)
        votes = torch.zeros(len(similarity), num_classes, device=device)
        votes.scatter_add_(1, classes[nearest], (similarity.float() / TEMPERATURE).exp())
        correct += int((votes.argmax(1).cpu() == labels[start : start + at_once]).sum())
    return correct / len(rows)


def monitor(backbone: Backbone, batches: Batches, device: Device = "cpu", amp_dtype: Dtype = None) -> float:
    """Share, 0..1, of a held-out set's pictures whose class wins among their neighbors in the same set; NaN of less than two. The
    backbone may be in training, and stays as it is. Each rank gives the features of its own `batches`; all know the answer."""
    was_training = backbone.training
    rows, labels = features(backbone.eval(), batches, device, amp_dtype)
    backbone.train(was_training)
    padding = int(distributed.worst({"rows": float(len(rows))})["rows"]) - len(rows)
    rows = distributed.gather(F.pad(rows, (0, 0, 0, padding)))
    labels = distributed.gather(F.pad(labels, (0, padding), value=-1))
    everyone = rows[labels >= 0], labels[labels >= 0]
    count = len(everyone[0])
    return accuracy(everyone, None, min(MONITORED, count - 1), device) if count > 1 else math.nan
