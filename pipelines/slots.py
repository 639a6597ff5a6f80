"""Memory of whole batches: allocated once, written by compiled kernels through addresses, used again when it is free.

A `Slot` holds the views of one batch and its mosaics, in the form that the trainer wants: normalized float32 on a CPU, uint8
levels, page-locked, where a GPU finishes them. `Slot.places` tells pipelines/kernels.py where each view of each picture goes, so
that no pixel is copied on its way to the batch, and the mosaic's tiles are written with the views.

    slot = slots.take()                # free memory, or new
    ...                                # a kernel writes
    views, mosaic = slot.hand_out()    # tensors; when the last of them is gone, the slot is free again
"""

import contextlib
import math
import mmap
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from inscon.plan import ViewSpec


class Slots:
    """The slots of one pipeline.

    Args:
        views: what is made of each image; each view becomes a block `[B P S S 3]` of its own.
        batch_size: B images.
        tiles: the view that also lies on mosaics of 2S px, or None for no mosaic.
        normalized: float32, ready for the model; else uint8.
        color: whether the kernel applies color and blur.
        pinned: page-locked, for copies to a GPU that nobody waits for.
    """

    def __init__(
        self, views: Sequence[ViewSpec], batch_size: int, *, tiles: str | None, normalized: bool, color: bool,
        pinned: bool = False,
    ):  # fmt: skip
        assert batch_size % 4 == 0 or tiles is None
        self.views, self.batch_size, self.tiles = tuple(views), batch_size, tiles
        self.normalized, self.color, self.pinned = normalized, color, pinned
        shapes = {spec.name: (batch_size, spec.count, spec.side, spec.side, 3) for spec in views}
        if tiles is not None:
            side = 2 * shapes[tiles][2]
            shapes[""] = (batch_size // 4, side, side, 3)
        ends = np.cumsum([math.prod(shape) * (4 if normalized else 1) for shape in shapes.values()]).tolist()
        self.blocks = dict(zip(shapes, zip([0, *ends], ends, shapes.values())))
        """Name of a view, "" of the mosaics -> (first byte, behind the last byte, shape)."""
        self.num_bytes = ends[-1]
        self.free: deque[Slot] = deque()

    def take(self) -> "Slot":
        """A slot that nobody reads; a new one if there is none, so their number follows how many batches are kept."""
        return self.free.popleft() if self.free else Slot(self)


class Slot:
    """Memory of one batch."""

    def __init__(self, slots: Slots):
        self._slots = slots
        if slots.pinned:
            self._bytes: np.ndarray = torch.empty(slots.num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            self._bytes = huge_pages(slots.num_bytes)
        self.places = _places(slots, self._bytes.ctypes.data)
        """[B, 3 + 3R] int64, see `pipelines.kernels.render_views`."""

    def hand_out(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The views `[B P S S 3]` and the mosaics `[M 2S 2S 3]`; the slot is taken until all of them are gone."""
        lent = self._bytes.view()
        weakref.finalize(lent, self._slots.free.append, self).atexit = False
        memory, dtype = torch.from_numpy(lent), torch.float32 if self._slots.normalized else torch.uint8
        blocks = self._slots.blocks.items()
        found = {name: memory[start:end].view(dtype).view(shape) for name, (start, end, shape) in blocks}
        return found, found.pop("", None)


def huge_pages(size: int) -> np.ndarray:
    """Memory of its own, page-aligned, in pages of 2 MB where the system has them to give: touched in a fraction of the time."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # macOS, or a kernel without them, such as a real-time one
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _places(slots: Slots, start: int) -> np.ndarray:
    pixel, image = 3 * (4 if slots.normalized else 1), np.arange(slots.batch_size)
    canvas_row = 0 if slots.tiles is None else slots.blocks[""][2][2] * pixel
    columns = [np.tile([slots.color, slots.normalized, canvas_row], (slots.batch_size, 1))]
    for spec in slots.views:
        tile = np.zeros_like(image)
        if spec.name == slots.tiles:
            canvas, (down, right) = image // 4, divmod(image % 4, 2)
            rows = (canvas * 2 + down) * spec.side
            tile = start + slots.blocks[""][0] + rows * canvas_row + right * canvas_row // 2
        for number in range(spec.count):
            block = start + slots.blocks[spec.name][0] + (image * spec.count + number) * spec.side**2 * pixel
            columns.append(np.stack([np.full_like(image, spec.side), block, tile], 1))
    return np.ascontiguousarray(np.concatenate(columns, 1), np.int64)
