"""Gradients in flat buffers of fixed place, averaged over the ranks once per step in a few large all-reduces."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from inscon import distributed

PIECE = 2**24
"""Elements of an all-reduce: 64 MB of float32."""


class FlatGradients:
    """`.grad` of each parameter becomes a view of one buffer, with the parameter's own strides. A parameter that a step leaves out
    has the gradient zero, on every rank alike; so methods need not touch all of them.

    Args:
        compression: "none", "fp16" or "bf16": in which format gradients travel and are summed.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], compression: str = "none"):
        self._wire = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}[compression]
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        dtypes = dict.fromkeys(parameter.dtype for parameter in trained)
        self.buffers = [_lay_out([p for p in trained if p.dtype == dtype]) for dtype in dtypes]

    def zero(self) -> None:
        """Before a step."""
        for buffer in self.buffers:
            buffer.zero_()

    def average(self) -> None:
        """Over the ranks; nothing without a process group. All ranks must call it."""
        if not dist.is_initialized():
            return
        under_way = []
        for buffer in self.buffers:
            for own in buffer.div_(distributed.world_size()).split(PIECE):
                sent = own if self._wire is None else own.to(self._wire)
                under_way.append((own, sent, dist.all_reduce(sent, async_op=True)))
        for own, sent, work in under_way:
            work.wait()
            if sent is not own:
                own.copy_(sent)


def _lay_out(parameters: list[torch.nn.Parameter]) -> Tensor:
    sizes = [parameter.numel() for parameter in parameters]
    buffer = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, own in zip(parameters, buffer.split(sizes), strict=True):
        # A parameter is dense in memory, whatever the order of its axes (channels last, say).
        parameter.grad = own.as_strided(parameter.shape, parameter.stride(), own.storage_offset())
    return buffer
