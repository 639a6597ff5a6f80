"""How much arithmetic a step takes, how much the device can do, and the share that a run makes of it (MFU)."""

import dataclasses
import functools
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from inscon.batch import Batch, View
from inscon.config import Config
from inscon.geometry import Overlap
from inscon.methods.method import Method
from inscon.nn.backbones import build_backbone

SIDE = {"cpu": 1536, "cuda": 8192}
"""Of the square matrices multiplied to find the device's rate."""
BURSTS = 5
"""The best of so many is the rate: what the device can do, not what others left of it."""
BURST_S = {"cpu": 0.05, "cuda": 0.1}
"""Least length of a burst."""
COUNTED_IMAGES = 32
"""Over so many, or the batch if that is less, is the arithmetic of a step counted."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepFlops:
    """Floating-point operations (a multiply and an add are two); nothing that is computed again counts."""

    per_image: float
    """Of one source image in a training step: every pass through every network, heads, losses against queues."""
    view: float
    """Forward pass of one view through the backbone: the unit of the budget."""

    @property
    def trainings(self) -> float:
        """The step in units of a forward and backward pass of one view: 2.37 for InsCon at 224 px."""
        return self.per_image / (3 * self.view)


@functools.lru_cache
def step_flops(config: Config) -> StepFlops:
    """Counted operator by operator on tensors without contents; `config` is resolved."""
    model = dataclasses.replace(config.model, norm="none", split_size=None)  # whose groups change no count
    config = dataclasses.replace(config, model=model)
    with torch.device("meta"):
        size = min(COUNTED_IMAGES, config.optim.batch_size)
        method, batch = config.method.build(config, size), _empty_batch(config, size)
        step = _count(lambda: _passes(method, batch))
        backbone, spec = build_backbone(config.model.backbone), config.method.view_specs(config.views)[0]
        view = _count(lambda: backbone(torch.empty(1, 3, spec.side, spec.side)))
    return StepFlops(step / size, view)


def _passes(method: Method, batch: Batch) -> None:
    prepared = method.prepare(batch)
    for piece in method.pieces(batch, prepared):
        piece.losses().total.backward()


def _empty_batch(config: Config, size: int) -> Batch:
    specs, mosaics = config.method.view_specs(config.views), config.method.mosaics()
    patches = {spec.name: () if spec.grid is None else (spec.count,) for spec in specs}
    views = {
        spec.name: View(
            pixels=torch.empty(size, *patches[spec.name], 3, spec.side, spec.side), crop_box=torch.empty(size, 4),
            flipped=torch.empty(size, dtype=torch.bool),
        )
        for spec in specs
    }  # fmt: skip
    overlaps = {
        (spec.overlap.view, spec.name): Overlap(
            first_box=torch.empty(size, 4), second_box=torch.empty(size, 4), weight=torch.empty(size)
        )
        for spec in specs
        if spec.overlap is not None
    }
    mosaic = None
    if mosaics is not None:
        tile = next(spec.side for spec in specs if spec.name == mosaics.view)
        shape = (size // 4, 2 * tile) if mosaics.tile == "full" else (size, tile)
        mosaic = torch.empty(shape[0], 3, shape[1], shape[1])
    return Batch(views=views, overlaps=overlaps, mosaic=mosaic, sample_ids=torch.empty(size, dtype=torch.int64))


def _count(run) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best burst of square matrix products on `device` in `dtype`: measured now, in half a second or less.

    float32 on a GPU is TF32 if the trainer's settings allow it.
    """
    side = SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)  # noise: products of zeros draw less power and run faster
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = 0.0
    torch.mm(a, b, out=out)
    for _ in range(BURSTS):
        _wait(device)
        start, products, took = time.perf_counter(), 0, 0.0
        while took < BURST_S[device.type]:
            for _ in range(1 if device.type == "cpu" else 8):
                torch.mm(a, b, out=out)
                products += 1
            _wait(device)
            took = time.perf_counter() - start
        best = max(best, 2 * side**3 * products / took)
    return best


matrix_rate = functools.lru_cache(measure_matrix_rate)
"""The same, measured once in a process."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
