"""k nearest neighbors on frozen features: is the run healthy, today, without training anything.

Protocol of Wu et al. (2018): pooled res5 features, L2-normalized, cosine similarity, the k nearest vote with weight
exp(similarity / temperature).
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from inscon import distributed, guard
from inscon.encoder import Trunk

SIMILARITIES = 1 << 26
"""Computed at once, at most: 256 MB in float32."""


@torch.inference_mode()
def features(
    trunk: Trunk,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "N F"], Int[Tensor, "N"]]:
    """Unit features and labels of all `batches` of (pixels [B 3 S S], labels [B]), on the CPU; the trunk isn't changed.

    No batches, as for a rank without pictures, make N = 0. `amp_dtype`: what convolutions are computed in; None: as the trunk is.
    FloatingPointError for features that are not finite.
    """
    if trunk.training:
        raise ValueError(
            "features are taken with the trunk in eval mode, or its statistics would move. Found: train mode"
        )
    device = torch.device(device)
    trunk = trunk.to(device=device, memory_format=torch.channels_last)
    rows = [(torch.zeros(0, trunk.channels["res5"]), torch.zeros(0, dtype=torch.int64))]
    for pixels, labels in batches:
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            res5 = trunk(pixels.to(device))["res5"]
        rows.append((F.normalize(res5.float().mean((2, 3)), dim=1).cpu(), labels))
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
    trunk: Trunk,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    k: int = 20,
) -> float:
    """Share, 0..1, of a held-out set's pictures whose class wins among their `k` neighbors in the same set.

    For a trunk in training, whose mode is as it was afterwards; its weights and statistics aren't touched. Each rank gives
    the features of its own `batches`; all ranks know the answer.
    """
    was_training = trunk.training
    try:
        rows, labels = features(trunk.eval(), batches, device, amp_dtype)
    finally:
        trunk.train(was_training)
    if distributed.world_size() > 1:
        longest = int(distributed.worst({"rows": float(len(rows))})["rows"])
        padding = longest - len(rows)
        rows = distributed.gather(F.pad(rows, (0, 0, 0, padding)))
        labels = distributed.gather(F.pad(labels, (0, padding), value=-1))
        rows, labels = rows[labels >= 0], labels[labels >= 0]
    if len(rows) < 2:  # left off
        return math.nan
    return accuracy(rows, labels, rows, labels, min(k, len(rows) - 1), leave_one_out=True, device=device)


def kept_features(
    folder: Path,
    name: str,
    trunk: Trunk,
    batches_from: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    count: int,
    identity: str,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    say: Callable[[int], None] = lambda done: None,
) -> tuple[Float[Tensor, "N F"], Int[Tensor, "N"]]:
    """As `features`, kept in `folder` (float16) while they are made, so that a second call goes on where the first one stopped.

    Args:
        name: of the files in `folder`.
        batches_from: (rows done) -> the batches after these.
        count: N.
        identity: of the trunk and of the data; rows made with another one are thrown away.
        say: is told how many rows are done.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    guard.remove_unfinished(folder, f"{name}.json.*")
    width, state_file = trunk.channels["res5"], folder / f"{name}.json"
    state = json.loads(state_file.read_text()) if state_file.exists() else {}
    going_on = state.get("identity") == identity and state.get("shape") == [count, width]
    if not going_on:
        state_file.unlink(missing_ok=True)  # before its rows are
    rows = _kept(folder / f"{name}.npy", going_on, np.float16, (count, width))
    labels = _kept(folder / f"{name}_labels.npy", going_on, np.int64, (count,))
    done = state["done"] if going_on else 0
    for pixels, of_batch in batches_from(done) if done < count else ():
        made, of_batch = features(trunk, [(pixels, of_batch)], device, amp_dtype)
        rows[done : done + len(made)], labels[done : done + len(made)] = made.numpy(), of_batch.numpy()
        done += len(made)
        rows.flush()
        labels.flush()
        with guard.whole_file(state_file) as file:
            file.write(json.dumps({"identity": identity, "shape": [count, width], "done": done}).encode())
        say(done)
    return F.normalize(torch.from_numpy(np.array(rows, np.float32)), dim=1), torch.from_numpy(np.array(labels))


def _kept(path: Path, going_on: bool, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    """A mapped file of rows. A new one has its room on the disk from the start: writing to a map of a full disk kills (SIGBUS)."""
    if going_on:
        return np.lib.format.open_memmap(path, "r+")
    try:
        with guard.naming(path):
            rows = np.lib.format.open_memmap(path, "w+", dtype, shape)
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return rows
