"""How much arithmetic a step takes, and how much the device can do: together they give MFU. And how fast it copies."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from inscon.config import Config
from inscon.nn.backbones import build_backbone
from pipelines.feed import Feed, MadeUpIndex
from pipelines.finish import Finish

PRODUCTS = {"cpu": (1536, 1), "cuda": (8192, 16)}
"""Side of the square matrices whose product tells the device's rate, and how many products are timed at once."""
COPIED = {"cpu": 2**27, "cuda": 2**30}  # Bytes of a copy that tells the rate of memory: more than caches hold.
MEASURED_S = {"cpu": 0.5, "cuda": 0.1}  # At least; a CPU's turns differ more.
COUNTED_IMAGES = 32  # Over so many, or the batch if that is less, the arithmetic of a step is counted.


class StepFlops(NamedTuple):
    """Floating-point operations (a multiply and an add are two); nothing that is computed again counts."""

    per_image: float  # Of a source image in a training step: all networks, heads, losses against queues.
    trainings: float  # The same in forward and backward passes of one view through the backbone: 2.36 for InsCon.


@functools.lru_cache
def step_flops(config: Config) -> StepFlops:
    """Counted operator by operator on tensors without contents; `config` is resolved. BatchNorm, which counts nothing and takes
    most of the time, is left out."""
    config = config.replaced(norm="none", split_size=None)
    size, specs = min(COUNTED_IMAGES, config.optim.batch_size), config.method.view_specs(config.views)
    feed = Feed(MadeUpIndex(), specs, config.method.mosaics(), batch_size=size, seed=0)
    with torch.device("meta"):
        method, backbone = config.method.build(config, size), build_backbone(config.model.backbone).eval()
        _leave_out_norms(method), _leave_out_norms(backbone)
        views = {spec.name: torch.empty(size, spec.count, spec.side, spec.side, 3) for spec in specs}
        batch = Finish(feed, torch.device("meta"), torch.float32, host_color=True)(feed.work(0), views)
        with FlopCounterMode(display=False) as step:
            prepared = method.prepare(batch)
            for piece in method.pieces(batch, prepared):
                piece.losses().total.backward()
        with FlopCounterMode(display=False) as view:
            backbone(batch.views[specs[0].name].pixels.flatten(0, -4)[:1])
    per_image = step.get_total_flops() / size
    return StepFlops(per_image, per_image / (3 * view.get_total_flops()))


def _leave_out_norms(network: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                setattr(parent, name, nn.Identity())


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product on `device` in `dtype`, measured now: what the device can do, not what others
    left of it. float32 on a GPU is TF32 if the trainer's settings allow it."""
    side, count = PRODUCTS[device.type]
    generator = torch.Generator(device).manual_seed(0)  # noise: products of zeros draw less power and run faster
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out = a @ b
    return 2 * side**3 * count / _fastest_s(lambda: [torch.mm(a, b, out=out) for _ in range(count)], device)


def measure_copy_rate(device: torch.device) -> float:
    """Bytes/s, read and written ones added up, of copies within the memory of `device`, measured now."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    copied = source.clone()
    return 2 * len(source) / _fastest_s(lambda: copied.copy_(source), device)


def _fastest_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of as many turns as fit into MEASURED_S, and one more."""
    took = []
    while sum(took) < MEASURED_S[device.type]:
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        took.append(time.perf_counter() - start)
    return min(took)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


matrix_rate = functools.lru_cache(measure_matrix_rate)  # The same, measured once in a process.
