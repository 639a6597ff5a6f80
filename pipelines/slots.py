"""Memory of whole batches: allocated once, written by compiled kernels through addresses, used again when it is free.

A `Slot` holds the views of one batch and its mosaics, in the form that the trainer wants: normalized float32 on a CPU, uint8
levels, page-locked, where a GPU finishes them. `Slot.places` tells `pipelines.kernels.render_into` where each view of each
picture goes, so that no pixel is copied on its way to the batch, and the mosaic's tiles are written with the views.

    slot = slots.take()          # free memory, or new
    ...                          # a kernel writes
    pixels = slot.hand_out()     # tensors; when the last of them is gone, the slot is free again
"""

import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class Slots:
    """The slots of one pipeline.

    Args:
        batch_size: B images.
        view_size: S px.
        views: V, how many views of each image are made.
        kept: which of these become a `[B 3 S S]` tensor of their own.
        tiles: which view lies on mosaics of 2S px, or None for no mosaic.
        normalized: float32, ready for the model; else uint8.
        color: whether the kernel applies color and blur.
        pinned: page-locked, for copies to a GPU that nobody waits for.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        view_size: int,
        views: int,
        kept: tuple[int, ...],
        tiles: int | None,
        normalized: bool,
        color: bool,
        pinned: bool = False,
    ):
        assert batch_size % 4 == 0 or tiles is None
        self.batch_size, self.view_size, self.views, self.kept, self.tiles = batch_size, view_size, views, kept, tiles
        self.normalized, self.color, self.pinned = normalized, color, pinned
        self.dtype = np.dtype(np.float32 if normalized else np.uint8)
        self.view_bytes = 3 * view_size**2 * self.dtype.itemsize
        self.num_bytes = self.view_bytes * batch_size * (len(kept) + (tiles is not None))
        self.allocated = 0
        self._free: deque[Slot] = deque()

    def take(self) -> "Slot":
        """A slot that nobody reads; a new one if there is none, so their number follows how many batches are kept."""
        try:
            return self._free.popleft()
        except IndexError:
            self.allocated += 1
            return Slot(self)

    def give_back(self, slot: "Slot") -> None:
        """For whoever took a slot and did not hand it out."""
        self._free.append(slot)


class Slot:
    """Memory of one batch."""

    def __init__(self, slots: Slots):
        self._slots = slots
        if slots.pinned:
            self.bytes: np.ndarray = torch.empty(slots.num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        else:
            self.bytes = huge_pages(slots.num_bytes)
        self.places = _places(slots, self.bytes.ctypes.data)
        """[B, 4 + 2V] int64, see `pipelines.kernels.render_into`."""

    @property
    def memory(self) -> Tensor:
        """[bytes] uint8, all of it."""
        return torch.from_numpy(self.bytes)

    def hand_out(self) -> tuple[list[Tensor], Tensor | None]:
        """The kept views `[B S S 3]` and the mosaics `[M 2S 2S 3]`; the slot is taken until all of them are gone."""
        lent = self.bytes.view()
        weakref.finalize(lent, self._slots.give_back, self).atexit = False
        return self.tensors(torch.from_numpy(lent))

    def tensors(self, memory: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """As `hand_out`, of a copy of its `memory`, or of that itself, without a claim on the slot."""
        s = self._slots
        parts = memory.view(torch.float32 if s.normalized else torch.uint8).chunk(len(s.kept) + (s.tiles is not None))
        views = [part.view(s.batch_size, s.view_size, s.view_size, 3) for part in parts[: len(s.kept)]]
        canvas = (s.batch_size // 4, 2 * s.view_size, 2 * s.view_size, 3)
        return views, parts[-1].view(canvas) if s.tiles is not None else None


def huge_pages(size: int) -> np.ndarray:
    """Memory of its own, page-aligned, in pages of 2 MB where the system has them to give: touched in a fraction of the time."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _places(slots: Slots, start: int) -> np.ndarray:
    side, pixel = slots.view_size, 3 * slots.dtype.itemsize
    canvas_row = 2 * side * pixel
    places = np.zeros((slots.batch_size, 4 + 2 * slots.views), np.int64)
    places[:, 0:4] = side, slots.color, slots.normalized, canvas_row
    image = np.arange(slots.batch_size)
    for number, view in enumerate(slots.kept):
        places[:, 4 + 2 * view] = start + (number * slots.batch_size + image) * slots.view_bytes
    if slots.tiles is not None:
        canvas, tile = divmod(image, 4)
        down, right = divmod(tile, 2)
        first = start + len(slots.kept) * slots.batch_size * slots.view_bytes
        places[:, 5 + 2 * slots.tiles] = first + (canvas * 2 * side + down * side) * canvas_row + right * side * pixel
    return places
