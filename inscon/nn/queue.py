"""KeyQueue: a ring of the newest keys, the negatives of the contrastive losses (MoCo, section 3.1)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class KeyQueue(nn.Module):
    """The last `size` keys, each a row of `keys [K D]`, a persistent buffer; the oldest are overwritten first. The pointer (the row
    the next key goes to) lives beside them, so that a captured step moves it too. Fresh queues hold random unit vectors."""

    def __init__(self, size: int, embedding_dim: int, per_step: int):
        super().__init__()
        self.per_step = per_step  # Keys that join in a step, over all ranks.
        self.register_buffer("keys", F.normalize(torch.randn(size, embedding_dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def enqueue(self, keys: Float[Tensor, "N D"]) -> None:
        """Overwrite the N oldest keys, in order. N must divide the size, so that no write ever wraps."""
        size = self.keys.shape[0]
        assert size % keys.shape[0] == 0, f"a queue of {size} keys takes no {keys.shape[0]} at once"
        places = self.pointer + torch.arange(keys.shape[0], device=keys.device)
        self.keys.index_copy_(0, places, keys.to(self.keys.dtype))
        self.pointer.add_(keys.shape[0]).remainder_(size)

    def get_extra_state(self) -> dict:
        return {"pointer": int(self.pointer)}

    def set_extra_state(self, state: dict) -> None:
        self.pointer.fill_(state["pointer"])
