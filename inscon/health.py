"""Is the run normal? What shows, between two log lines, the faults that raise no exception (docs/healthy-run.md).

A key encoder that stands still, a queue that isn't renewed, embeddings that fall into one point, BatchNorm that gives the
answer away: losses go on and look like losses. Looking costs some small kernels and one wait for the device per log line; who
is normalized with whom is tried out once, on the first batch, for about what a step costs.
"""

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from inscon import distributed
from inscon.batch import Batch, View
from inscon.key_queue import KeyQueue
from inscon.model import InsCon

LEAK_TOP1 = 0.99
"""Share of queries that find their key; above it BatchNorm gives the answer away (MoCo, section 3.3)."""
LEAK_LOOKS = 3
"""In so many log lines one after the other."""
LEAST_KEYS = 4096
"""Keys that a positive must beat for its share to tell anything: among a few hundred, a good run finds its own nearly always."""
SHARED = 0.6
"""Share of its query's BatchNorm group that an image's key may meet again; shuffling leaves half of them where there are two
groups, and fewer else (`inscon.norm.shuffle_order`)."""
CHANGED = 1e-4
"""How far a unit embedding moves at least, in some component, when another image of its BatchNorm group becomes another one."""
CONCENTRATED = 0.98
"""Length of the mean key, 0..1; with it, the keys of all images are one point within some 10 degrees."""
TURNS = 2
"""How often a queue must have been filled before its keys are judged: an untrained network's all look alike."""
RENEWED = 0.5
"""Least share of the keys that should have been replaced which must have been."""


@torch.no_grad()
def shared_statistics(model: InsCon, batch: Batch) -> float | None:
    """Share, 0..1, of the images that the first image's query is normalized among, which its key is normalized among, too.

    Found from outside: the first image becomes another one, and whose embeddings change is counted, over all ranks. Works on
    a copy of the model. None where the queries are mosaics only. All ranks must call it.
    """
    if not {"single", "cell"} & set(model.config.heads):
        return None
    probe = copy.deepcopy(model).train()
    overlap = probe._find_overlap(batch)
    met = {}
    for name, view, boxes in (("query", batch.query, overlap.query_box), ("key", batch.key, overlap.key_box)):
        pixels = view.pixels.float()
        other = pixels.clone()
        if distributed.rank() == 0:
            other[0] = 1 - 2 * other[0]
        views = [dataclasses.replace(view, pixels=made) for made in (pixels, other)]
        encode = _queries if name == "query" else lambda probe, view, _boxes: probe.encode_keys(view, overlap)
        one, another = (next(iter(encode(probe, made, boxes).values())).flatten(1) for made in views)
        met[name] = distributed.gather((one - another).abs().amax(1)) > CHANGED
        met[name][0] = False
    among = int(met["query"].sum())
    return float((met["query"] & met["key"]).sum()) / among if among else 0.0


def _queries(probe: InsCon, view: View, boxes: Tensor) -> dict[str, Tensor]:
    """Queries of single views, as the pieces of a step make them."""
    made = []
    for piece in (piece for piece in probe.pieces if piece.query):
        taken = probe._images(piece, len(view.flipped))
        made.append(probe.query_encoder(*(tensor[taken] for tensor in (view.pixels, boxes, view.flipped))))
    return {name: torch.cat([part[name] for part in made]) for name in made[0]}


def leaking(share: float, norm: str) -> str:
    """The sentence about what `shared_statistics` found."""
    return (
        f"BatchNorm leaks: the key of an image is normalized among {100 * share:.0f} % of the images that its query was, so the "
        f"batch can give the answer away, and does so late and silently (is norm, {norm}, without a shuffle?)"
    )


class Health:
    """Looks at a model at every log line and remembers what it saw at the one before.

    Args:
        model: as trained; the key encoder's weights and the queues are read, nothing is written.
        batch_size: keys of single views that a step adds to the queue, over all ranks.
        step: at which the looking begins.
    """

    def __init__(self, model: InsCon, batch_size: int, step: int):
        self._model, self._batch_size, self._step = model, batch_size, step
        self._warned: set[str] = set()
        self._leaks = 0
        self._before = self._fingerprints()

    def look(self, step: int, top1: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """Figures for the metrics and the warnings that are new, each a sentence, at `step`; `top1` by head, shares 0..1.

        Figures: `key_moved`, share of the key encoder's tensors that changed since the last look; `key_distance`, between the
        encoders' weights, of the query encoder's length; by queue, `queue_renewed`, share of the keys that should have been
        replaced since and were, and `queue_mean_length`, 0 (keys in all directions) to 1 (all keys are one).
        """
        steps, now = step - self._step, self._fingerprints()
        if steps < 1:
            return {}, []
        figures, found = self._of_encoders(now), {}
        if figures["key_moved"] == 0:
            found["stale"] = (
                f"the key encoder has not moved in {steps} steps: its keys come from a network that learns nothing (is "
                f"key_momentum, {self._model.config.key_momentum}, 1?)"
            )
        for name, queue in self._queues().items():
            keys_per_step = self._batch_size * (self._model.config.cells if name == "cell" else 1)
            size = len(queue.keys)
            expected = min(steps * keys_per_step, size)
            renewed = float((now[name] != self._before[name]).sum()) / expected
            length = float(queue.keys.mean(0, dtype=torch.float32).norm())
            figures |= {f"queue_renewed_{name}": renewed, f"queue_mean_length_{name}": length}
            if length > CONCENTRATED and step * keys_per_step >= TURNS * size:
                found[f"collapsed {name}"] = (
                    f"the {name} keys have collapsed: their mean is {length:.3f} long where 1 says that all are the same; look at "
                    "the losses, or go on with a lower --lr and --change-on-resume lr"
                )
            elif renewed < RENEWED:
                found[f"stuck {name}"] = (
                    f"the {name} queue is stuck: {100 * renewed:.0f} % of the keys that {steps} steps should have replaced "
                    "were, so queries are told apart from old or random keys"
                )
        self._leaks = self._leaks + 1 if self._leaking(top1) else 0
        if self._leaks == LEAK_LOOKS:
            found["leak"] = (
                f"{100 * top1['single']:.1f} % of the queries find their key among {len(self._model.key_queue.keys)} others: "
                f"BatchNorm may give the answer away (is norm, {self._model.config.norm}, without a shuffle?)"
            )
        self._before, self._step = now, step
        new = [sentence for cause, sentence in found.items() if cause not in self._warned]
        self._warned |= set(found)
        return figures, new

    def look_at_norm(self, batch: Batch) -> list[str]:
        """The warning, if there is one, about who is normalized with whom in `batch`; none where norm = sync was asked for."""
        if self._model.config.norm == "sync":
            return []
        share = shared_statistics(self._model, batch)
        return [leaking(share, self._model.config.norm)] if share is not None and share > SHARED else []

    def _leaking(self, top1: dict[str, float]) -> bool:
        queue = self._queues().get("single")
        return queue is not None and len(queue.keys) >= LEAST_KEYS and top1.get("single", 0.0) > LEAK_TOP1

    def _queues(self) -> dict[str, KeyQueue]:
        held = {"single": getattr(self._model, "key_queue", None), "cell": getattr(self._model, "cell_queue", None)}
        return {name: queue for name, queue in held.items() if queue is not None}

    @torch.no_grad()
    def _of_encoders(self, now: dict[str, Tensor]) -> dict[str, float]:
        keys, queries = self._model._followers
        apart = torch.stack([(key - query).square().sum() for key, query in zip(keys, queries)]).sum()
        length = torch.stack(torch._foreach_norm(queries)).square().sum()
        moved = (now["key encoder"] != self._before["key encoder"]).float().mean()
        moved, distance = torch.stack([moved, (apart / length).sqrt().to(moved.dtype)]).tolist()
        return {"key_moved": moved, "key_distance": distance}

    @torch.no_grad()
    def _fingerprints(self) -> dict[str, Tensor]:
        """One number for each tensor of the key encoder and for each row of a queue, that changes when these do."""
        keys, _ = self._model._followers
        found = {"key encoder": torch.stack([key.sum(dtype=torch.float64) for key in keys])}
        for name, queue in self._queues().items():
            generator = torch.Generator().manual_seed(0)
            direction = F.normalize(torch.randn(queue.keys.shape[1], generator=generator), dim=0)
            found[name] = queue.keys @ direction.to(queue.keys)
        return found
