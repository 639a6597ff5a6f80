"""How much arithmetic a step takes, and how much the device can do: together they give MFU."""

import dataclasses
import functools
import time
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from inscon.config import Config
from inscon.nn.backbones import build_backbone
from pipelines.feed import Feed, MadeUpIndex
from pipelines.finish import Finish

PRODUCTS = {"cpu": (1536, 1), "cuda": (8192, 16)}
"""Side of the square matrices whose product tells the device's rate, and how many products are timed at once."""
MEASURED_S = 0.5
COUNTED_IMAGES = 32
"""Over so many, or the batch if that is less, is the arithmetic of a step counted."""


class StepFlops(NamedTuple):
    """Floating-point operations (a multiply and an add are two); nothing that is computed again counts."""

    per_image: float
    """Of one source image in a training step: every pass through every network, heads, losses against queues."""
    trainings: float
    """The same in units of a forward and backward pass of one view through the backbone: 2.37 for InsCon at 224 px."""


@functools.lru_cache
def step_flops(config: Config) -> StepFlops:
    """Counted operator by operator on tensors without contents; `config` is resolved."""
    model = dataclasses.replace(config.model, norm="none", split_size=None)  # whose groups change no count
    config = dataclasses.replace(config, model=model)
    size, specs = min(COUNTED_IMAGES, config.optim.batch_size), config.method.view_specs(config.views)
    feed = Feed(MadeUpIndex(), specs, config.method.mosaics(), batch_size=size, seed=0)
    with torch.device("meta"):
        method, backbone = config.method.build(config, size), build_backbone(config.model.backbone)
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


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest square matrix product on `device` in `dtype`, measured now: what the device can do, not what others
    left of it. float32 on a GPU is TF32 if the trainer's settings allow it."""
    side, count = PRODUCTS[device.type]
    generator = torch.Generator(device).manual_seed(0)  # noise: products of zeros draw less power and run faster
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out, took = a @ b, []
    while sum(took) < MEASURED_S:
        wait_for(device)
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(a, b, out=out)
        wait_for(device)
        took.append(time.perf_counter() - start)
    return 2 * side**3 * count / min(took)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


matrix_rate = functools.lru_cache(measure_matrix_rate)
"""The same, measured once in a process."""
