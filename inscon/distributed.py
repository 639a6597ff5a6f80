"""Ranks as torchrun gives them, and the few collectives a step needs. Every function answers on one process too."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from inscon import guard

_WAIT_S = 5.0
"""Long enough for the last processes of a killed run to end."""


def start() -> torch.device:
    """Join torchrun's process group if there is one, and return this rank's device. CPU tensors always travel by gloo."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return device


def stop() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """Every rank's `[n ...]` as one `[world*n ...]`, in the order of ranks; without gradient."""
    if world_size() == 1 or tensor.is_meta:  # as when the arithmetic of a step is counted
        return tensor
    result = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(result, tensor.contiguous())
    return result


@torch.no_grad()
def exchange(tensor: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """Rows of `[n ...]` to the ranks, `send[r]` of them to rank r, in order; those that came, `receive[r]` from rank r."""
    if tensor.dtype == torch.bool:  # which not every gloo sends
        return exchange(tensor.to(torch.uint8), send, receive).bool()
    arrived = tensor.new_empty(sum(receive), *tensor.shape[1:])
    dist.all_to_all_single(arrived, tensor.contiguous(), receive, send)
    return arrived


class Gathering:
    """A `gather` under way."""

    def __init__(self, result: Tensor, work, sent: Tensor):
        self._result, self._work, self._sent = result, work, sent

    def wait(self) -> Tensor:
        """Every rank's `[n ...]` as one `[world*n ...]`; on a GPU the stream waits, not the host."""
        self._work.wait()
        return self._result


@torch.no_grad()
def start_gather(tensor: Tensor) -> Gathering | None:
    """As `gather`, while other work goes on; None on one process."""
    if world_size() == 1 or tensor.is_meta:  # as when the arithmetic of a step is counted
        return None
    sent = tensor.contiguous()
    result = sent.new_empty(world_size() * sent.shape[0], *sent.shape[1:])
    return Gathering(result, dist.all_gather_into_tensor(result, sent, async_op=True), sent)


def on_rank_0(check: Callable[[], object]) -> None:
    """Run `check` on rank 0 alone; what it refuses there (ValueError, OSError) is a ValueError on every rank."""
    refusal: list[str | None] = [None]
    if rank() == 0:
        try:
            check()
        except (ValueError, OSError) as error:
            refusal = [guard.sentence_of(error)]
    if world_size() > 1:
        dist.broadcast_object_list(refusal, device=torch.device("cpu"))
    if refusal[0] is not None:
        raise ValueError(refusal[0])


@contextlib.contextmanager
def hold(folder: Path, flag: str) -> Iterator[None]:
    """`guard.only_process` for all ranks: rank 0 holds `folder` against other runs, and every rank is refused with it."""
    with contextlib.ExitStack() as held:
        on_rank_0(lambda: held.enter_context(guard.only_process(folder, flag, _WAIT_S)))
        yield


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; travels over the CPU and never waits for a GPU."""
    if world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def worst(values: dict[str, float]) -> dict[str, float]:
    """Each value's maximum over the ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def mean(values: dict[str, float]) -> dict[str, float]:
    """Each value's mean over the ranks."""
    return {name: value / world_size() for name, value in total(values).items()}


def total(values: dict[str, float]) -> dict[str, float]:
    """Each value's sum over the ranks."""
    return _reduce(values, dist.ReduceOp.SUM)


def _reduce(values: dict[str, float], operation) -> dict[str, float]:
    if world_size() == 1:
        return values
    packed = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(packed, op=operation)
    return dict(zip(values, packed.tolist()))
