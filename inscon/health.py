"""Is the run normal? What shows, between two log lines, the faults that raise no exception (docs/healthy-run.md): a slow copy that
stands still, a queue that isn't renewed, embeddings that fall into one point, BatchNorm that gives the answer away. Looking costs
some small kernels and a few waits for the device per log line."""

from collections import Counter

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from inscon.methods.method import Method

LEAK_TOP1 = 0.99  # Share of queries that find their key; above it BatchNorm leaks (MoCo, section 3.3).
LEAK_LOOKS = 3  # In so many log lines one after the other.
LEAST_KEYS = 4096  # That a positive must beat for its share to tell anything: among few, a good run nearly always does.
CONCENTRATED = 0.995
"""Length of the mean embedding, 0..1; with it, those of all images are one point within some 6 degrees. At first all move one way,
which took sound runs to 0.954 (SimCLR) and 0.987 (MoCo with ResNet-18) before they parted; in a collapse they go on."""
SHRUNK = 10
"""The mean squared distance of embeddings from their mean must have been so many times as large once: a fresh network's are alike,
too, and stay so while the rate warms up."""
RENEWED = 0.5  # Least share of the keys that should have been replaced which must have been.
LOOKED_AT = 8192  # Keys whose length and rank are taken at most.


class Health:
    """Looks at a method at every log line, from `step` on, and remembers what it saw at the one before; nothing is written. `norm`:
    how BatchNorm is kept from leaking, for sentences."""

    def __init__(self, method: Method, step: int, norm: str):
        self._method, self._step, self._norm = method, step, norm
        self._slow = [weight for follower in method.followers for weight in follower.slow]
        self._fast = [weight for follower in method.followers for weight in follower.fast]
        self._warned, self._looks, self._most_apart = set(), Counter(), Counter()
        self._before = self._fingerprints()

    def look(self, step: int, values: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Figures for the metrics (docs/healthy-run.md says of what) and the warnings that are new, each a sentence, at `step`;
        `values` are those of the log line. Of a method without queues, the lengths that its losses come with are judged."""
        steps, now = step - self._step, self._fingerprints()
        if steps < 1:
            return {}, []
        figures = self._of_followers(now) if self._slow else {}
        for name in self._method.queues:
            figures |= self._of_queue(name, steps, now[name] != self._before[name])
        found = self._stale(figures, steps) | self._leaks(values) | self._collapses(values | figures)
        found |= self._stuck(figures, steps, set(found))
        self._before, self._step = now, step
        new = [sentence for cause, sentence in found.items() if cause not in self._warned]
        self._warned |= set(found)
        return figures, new

    def _stale(self, figures: dict[str, float], steps: int) -> dict[str, str]:
        fading = all(follower.fading for follower in self._method.followers)
        if fading or figures.get("key_moved") != 0 or figures["key_distance"] == 0:
            return {}
        found = f"the slow copy of the network has not moved in {steps} steps: it learns nothing"
        return {"stale": f"{found} (is its momentum, {self._method.followers[0].momentum}, 1?)"}

    def _leaks(self, values: dict[str, float]) -> dict[str, str]:
        found = {}
        for name, queue in self._method.queues.items():
            size, top1 = len(queue.keys), values.get(f"top1_{name}", 0.0)
            self._looks[name] = self._looks[name] + 1 if size >= LEAST_KEYS and top1 > LEAK_TOP1 else 0
            if self._looks[name] == LEAK_LOOKS:
                found[f"leak {name}"] = (
                    f"{100 * top1:.1f} % of the queries find their key among {size} others: BatchNorm may give the answer away "
                    f"(is norm, {self._norm}, without a shuffle?)"
                )
        return found

    def _collapses(self, figures: dict[str, float]) -> dict[str, str]:
        """By figure. A fresh network's embeddings are all alike, too, but move apart; in a collapse they come closer."""
        found = {}
        for name in (name for name in figures if name.startswith("length_")):
            apart = 1 - figures[name] ** 2  # the mean squared distance from their mean
            most = self._most_apart[name] = max(self._most_apart[name], apart)
            if figures[name] > CONCENTRATED and apart * SHRUNK < most:
                found[name] = (
                    f"the {name.removeprefix('length_')} embeddings have collapsed: their mean is {figures[name]:.3f} long, where "
                    f"1 says that all are the same, and was {(1 - most) ** 0.5:.3f}; go on with a lower --lr and "
                    "--change-on-resume lr, or begin again"
                )
        return found

    def _stuck(self, figures: dict[str, float], steps: int, found: set[str]) -> dict[str, str]:
        """Unless its keys have collapsed: a key like the one it replaces can't be seen to be new."""
        shares = {name: figures[f"queue_renewed_{name}"] for name in self._method.queues}
        return {
            f"stuck {name}": f"the {name} queue is stuck: {100 * share:.0f} % of the keys that {steps} steps should have replaced "
            "were, so queries are told apart from old or random keys"
            for name, share in shares.items()
            if share < RENEWED and f"length_{name}" not in found
        }

    def _of_queue(self, name: str, steps: int, new: Bool[Tensor, "K"]) -> dict[str, float]:
        """`new`: which keys have come since the last look; where none has, all are looked at."""
        queue, came = self._method.queues[name], int(new.sum())
        keys = (queue.keys[new] if came else queue.keys)[:LOOKED_AT].double()
        return {
            f"queue_renewed_{name}": came / min(steps * queue.per_step, len(queue.keys)),
            f"length_{name}": float(keys.mean(0).norm()),
            f"rank_{name}": effective_rank(keys),
        }

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


def effective_rank(rows: Float[Tensor, "N D"]) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the singular values' shares in their sum. From 1, all
    rows are multiples of one, to the lesser of N and D. The values are roots of a D x D matrix's, which the host takes."""
    rows = rows.double()
    singular = torch.linalg.eigvalsh((rows.T @ rows).cpu()).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())
