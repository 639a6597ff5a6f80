"""How much arithmetic a source image takes, how much the device can do, and the share that a run makes of it (MFU)."""

import dataclasses
import functools
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from inscon.config import ModelConfig, ViewConfig
from inscon.encoder import Encoder, Trunk
from inscon.mosaic import TILES_PER_CANVAS

SIDE = {"cpu": 1536, "cuda": 8192}
"""Of the square matrices multiplied to find the device's rate."""
BURSTS = 5
"""The best of so many is the rate: what the device can do, not what others left of it."""
BURST_S = {"cpu": 0.05, "cuda": 0.1}
"""Least length of a burst."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFlops:
    """Floating-point operations (a multiply and an add are two) of one source image in a training step."""

    query: float
    """Forward pass of the query view through the trunk."""
    mosaic: float
    """Forward pass of the image's share of a mosaic."""
    key: float
    """Forward pass of the key view."""
    heads: float
    """Forward passes of all heads, and similarities to the queues."""
    single_view: float
    """Forward pass of one view of the size of training, whatever heads are trained: the unit of the budget."""

    @property
    def step(self) -> float:
        """All of a step. A backward pass counts twice its forward pass; nothing that is computed again counts."""
        return 3 * (self.query + self.mosaic + self.heads) + self.key

    @property
    def views_trained(self) -> float:
        """The three trunk passes in units of a forward and backward pass of one view: 2.36 for InsCon at 224 px."""
        return (3 * (self.query + self.mosaic) + self.key) / (3 * self.single_view)


@functools.lru_cache
def image_flops(model: ModelConfig, views: ViewConfig) -> ImageFlops:
    """Counted operator by operator on tensors without contents; `model` is resolved."""
    with torch.device("meta"), torch.no_grad():
        trunk = Trunk(model.arch).eval()
        side, tile = views.view_size, views.view_size if views.tile == "full" else views.view_size // 2
        view = _count(lambda: trunk(torch.empty(1, 3, side, side)))
        canvas = _count(lambda: trunk(torch.empty(1, 3, 2 * tile, 2 * tile))) / TILES_PER_CANVAS
        tiles = TILES_PER_CANVAS if views.tile == "half" else 1
        heads, encoder = set(model.heads), Encoder(model, model.heads)
        in_heads = {
            "single": lambda head, f: head(torch.empty(1, f)),
            "multi": lambda head, f: head(torch.empty(tiles, f)),
            "cell": lambda head, f: head(torch.empty(1, f, model.cell_grid, model.cell_grid)),
        }
        features = {"single": "res5", "multi": "res5", "cell": model.cell_stage}
        of_heads = sum(
            _count(functools.partial(in_heads[name], head, trunk.channels[features[name]]))
            for name, head in encoder.heads.items()
        )
    rows = {"single": 1, "multi": tiles, "cell": model.cells}
    similarities = 2 * sum(
        rows[name]
        * (model.cell_dim * model.cell_queue_size if name == "cell" else model.embedding_dim * model.queue_size)
        for name in heads
    )
    return ImageFlops(
        query=view if heads & {"single", "cell"} else 0.0,
        mosaic=canvas * tiles if "multi" in heads else 0.0,
        key=view,
        heads=of_heads + similarities,
        single_view=view,
    )


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
