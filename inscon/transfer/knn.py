"""k nearest neighbours on frozen features: is the run healthy, today, without training anything.

Protocol of Wu et al. (2018): pooled res5 features, L2-normalised, cosine similarity, the k nearest vote with weight
exp(similarity / temperature).
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from inscon.encoder import Trunk


@torch.inference_mode()
def features(
    trunk: Trunk, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "N F"], Int[Tensor, "N"]]:
    """Unit features and labels of all `batches` of (pixels [B 3 S S], labels [B]), on the CPU; the trunk isn't changed."""
    if trunk.training:
        raise ValueError(
            "features are taken with the trunk in eval mode, or its statistics would move. Found: train mode"
        )
    trunk = trunk.to(device=device, memory_format=torch.channels_last)
    rows = [(F.normalize(trunk(x.to(device))["res5"].mean((2, 3)).float(), dim=1).cpu(), y) for x, y in batches]
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def accuracy(
    queries: Float[Tensor, "N F"],
    query_labels: Int[Tensor, "N"],
    bank: Float[Tensor, "P F"],
    bank_labels: Int[Tensor, "P"],
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Share of queries, 0..1, whose class wins the vote of their `k` nearest rows of `bank`. All rows are unit vectors."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k must lie in 1..{len(bank)}, the size of the bank. Found: {k}")
    num_classes = int(max(query_labels.max(), bank_labels.max())) + 1
    correct = 0
    for part, labels in zip(queries.split(1024), query_labels.split(1024)):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)
        votes = torch.zeros(len(part), num_classes).scatter_add_(
            1, bank_labels[nearest], (similarity / temperature).exp()
        )
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(queries)
