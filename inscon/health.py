"""Is the run normal? What shows, between two log lines, the faults that raise no exception (docs/healthy-run.md).

A slow copy that stands still, a queue that isn't renewed, embeddings that fall into one point, BatchNorm that gives the
answer away: losses go on and look like losses. Looking costs some small kernels and one wait for the device per log line.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from inscon.methods.method import Method

LEAK_TOP1 = 0.99
"""Share of queries that find their key; above it BatchNorm gives the answer away (MoCo, section 3.3)."""
LEAK_LOOKS = 3
"""In so many log lines one after the other."""
LEAST_KEYS = 4096
"""Keys that a positive must beat for its share to tell anything: among a few hundred, a good run finds its own nearly always."""
CONCENTRATED = 0.98
"""Length of the mean key, 0..1; with it, the keys of all images are one point within some 10 degrees."""
TURNS = 2
"""How often a queue must have been filled before its keys are judged: an untrained network's all look alike."""
SETTLED = 512
"""Steps after which embeddings that join no queue are judged: two turns of a queue of 65536 keys at 256 a step."""
RENEWED = 0.5
"""Least share of the keys that should have been replaced which must have been."""


class Health:
    """Looks at a method at every log line and remembers what it saw at the one before.

    Args:
        method: as trained; slow copies and queues are read, nothing is written.
        step: at which the looking begins.
        norm: how BatchNorm is kept from leaking, for sentences.
    """

    def __init__(self, method: Method, step: int, norm: str):
        self._method, self._step, self._norm = method, step, norm
        self._slow = [weight for follower in method.followers for weight in follower.slow]
        self._fast = [weight for follower in method.followers for weight in follower.fast]
        self._warned, self._leaks = set(), Counter()
        self._before = self._fingerprints()

    def look(self, step: int, values: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Figures for the metrics and the warnings that are new, each a sentence, at `step`; `values` are those of the log line.

        Figures: `key_moved`, share of the slow copies' tensors that changed since the last look; `key_distance`, between their
        weights and those they follow, of the latter's length; by queue, `queue_renewed`, share of the keys that should have been
        replaced since and were, and `queue_mean_length`, 0 (keys in all directions) to 1 (all keys are one). Of a method without
        queues, the figures "length_NAME" that its losses come with are judged like the latter.
        """
        steps, now = step - self._step, self._fingerprints()
        if steps < 1:
            return {}, []
        figures, found = self._of_followers(now) if self._slow else {}, {}
        fading = all(follower.fading for follower in self._method.followers)
        if figures.get("key_moved") == 0 and figures["key_distance"] > 0 and not fading:
            found["stale"] = (
                f"the slow copy of the network has not moved in {steps} steps: its keys or targets are of one that learns nothing "
                f"(is its momentum, {self._method.followers[0].momentum}, 1?)"
            )
        for name in (name for name in values if name.startswith("length_") and step >= SETTLED):
            if values[name] > CONCENTRATED:
                found[f"collapsed {name}"] = (
                    f"the {name.removeprefix('length_')} embeddings have collapsed: the mean of a batch is {values[name]:.3f} long "
                    "where 1 says that all are the same; go on with a lower --lr and --change-on-resume lr, or begin again"
                )
        for name, queue in self._method.queues.items():
            size = len(queue.keys)
            expected = min(steps * queue.per_step, size)
            renewed = float((now[name] != self._before[name]).sum()) / expected
            length = float(queue.keys.mean(0, dtype=torch.float32).norm())
            figures |= {f"queue_renewed_{name}": renewed, f"queue_mean_length_{name}": length}
            if length > CONCENTRATED and step * queue.per_step >= TURNS * size:
                found[f"collapsed {name}"] = (
                    f"the {name} keys have collapsed: their mean is {length:.3f} long where 1 says that all are the same; look at "
                    "the losses, or go on with a lower --lr and --change-on-resume lr"
                )
            elif renewed < RENEWED:
                found[f"stuck {name}"] = (
                    f"the {name} queue is stuck: {100 * renewed:.0f} % of the keys that {steps} steps should have replaced "
                    "were, so queries are told apart from old or random keys"
                )
            top1 = values.get(f"top1_{name}", 0.0)
            self._leaks[name] = self._leaks[name] + 1 if size >= LEAST_KEYS and top1 > LEAK_TOP1 else 0
            if self._leaks[name] == LEAK_LOOKS:
                found[f"leak {name}"] = (
                    f"{100 * top1:.1f} % of the queries find their key among {size} others: BatchNorm may give the answer away "
                    f"(is norm, {self._norm}, without a shuffle?)"
                )
        self._before, self._step = now, step
        new = [sentence for cause, sentence in found.items() if cause not in self._warned]
        self._warned |= set(found)
        return figures, new

    @torch.no_grad()
    def _of_followers(self, now: dict[str, Tensor]) -> dict[str, float]:
        apart = torch.stack([(slow - fast).norm() for slow, fast in zip(self._slow, self._fast, strict=True)]).norm()
        length = torch.stack(torch._foreach_norm(self._fast)).norm()
        moved = (now[""] != self._before[""]).float().mean()
        moved, distance = torch.stack([moved, (apart / length).to(moved.dtype)]).tolist()
        return {"key_moved": moved, "key_distance": distance}

    def _fingerprints(self) -> dict[str, Tensor]:
        """A number for each row of a queue, by its name, and, under "", for each tensor of the slow copies, changing with it."""
        found = {"": torch.stack([key.sum(dtype=torch.float64) for key in self._slow])} if self._slow else {}
        for name, queue in self._method.queues.items():
            generator = torch.Generator().manual_seed(0)
            direction = F.normalize(torch.randn(queue.keys.shape[1], generator=generator), dim=0)
            found[name] = queue.keys @ direction.to(queue.keys)
        return found
