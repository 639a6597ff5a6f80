"""Ranks as torchrun gives them, and the few collectives a step needs. Every function answers on one process too."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from inscon import guard


def start() -> torch.device:
    """Join torchrun's process group if there is one, and return this rank's device. CPU tensors always travel by gloo."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= (count := torch.cuda.device_count()):
            remedy = f"set --nproc_per_node (of Slurm, --ntasks-per-node) {count}"
            raise ValueError(f"every rank takes a GPU, and this one sees {count}; {remedy}")
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def stop() -> None:
    """Leave the process group, if any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(tensor: Tensor) -> Tensor:
    """Every rank's `[n ...]` as one `[world*n ...]`, in the order of ranks; without gradient."""
    arriving = start_gather(tensor)
    return tensor if arriving is None else arriving()


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """As `gather`; each rank gets the gradient of its own share, the sum over the losses of all ranks. All ranks must go back."""
    return tensor if world_size() == 1 or tensor.is_meta else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone()).chunk(world_size())[rank()]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor, now each rank's sum of all; without gradient."""
    if world_size() > 1 and not tensor.is_meta:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def start_gather(tensor: Tensor) -> Callable[[], Tensor] | None:
    """As `gather`, while other work goes on: what waits for it, on a GPU the stream and not the host. None without a group."""
    if not dist.is_initialized() or tensor.is_meta:  # as when the arithmetic of a step is counted
        return None
    result = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
    work = dist.all_gather_into_tensor(result, tensor.contiguous(), async_op=True)

    def arrive() -> Tensor:
        work.wait()
        return result

    return arrive


@torch.no_grad()
def exchange(tensor: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """Rows of `[n ...]` to the ranks, `send[r]` of them to rank r, in order; those that came, `receive[r]` from rank r."""
    if tensor.dtype == torch.bool:  # which not every gloo sends
        return exchange(tensor.to(torch.uint8), send, receive).bool()
    arrived = tensor.new_empty(sum(receive), *tensor.shape[1:])
    dist.all_to_all_single(arrived, tensor.contiguous(), receive, send)
    return arrived


@contextlib.contextmanager
def hold(folder: Path, flag: str) -> Iterator[None]:
    """`guard.only_process` for all ranks: rank 0 holds `folder` against other runs, and every rank is refused with it."""
    refusal: list[str | None] = [None]
    with contextlib.ExitStack() as held:
        if rank() == 0:
            try:
                held.enter_context(guard.only_process(folder, flag, wait_s=5))  # for a killed run's last processes
            except (ValueError, OSError) as error:
                refusal = [guard.sentence_of(error)]
        if world_size() > 1:
            dist.broadcast_object_list(refusal, device=torch.device("cpu"))
        if refusal[0] is not None:
            raise ValueError(refusal[0])
        yield


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; travels over the CPU and never waits for a GPU."""
    return bool(worst({"flag": float(flag)})["flag"])


def worst(values: dict[str, float]) -> dict[str, float]:
    """Each value's maximum over the ranks."""
    return _reduced(values, dist.ReduceOp.MAX)


def total(values: dict[str, float]) -> dict[str, float]:
    """Each value's sum over the ranks."""
    return _reduced(values, dist.ReduceOp.SUM)


def mean(values: dict[str, float]) -> dict[str, float]:
    """Each value's mean over the ranks."""
    return {name: value / world_size() for name, value in total(values).items()}


def _reduced(values: dict[str, float], operation) -> dict[str, float]:
    if world_size() == 1:
        return values
    packed = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(packed, op=operation)
    return dict(zip(values, packed.tolist()))
