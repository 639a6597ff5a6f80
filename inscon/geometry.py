"""Boxes: intersect, map into a view, mirror, decide whether an overlap is big enough.

The one coordinate rule of the project: a box is `x0 y0 x1 y1` in continuous pixel edges (the first pixel spans 0..1,
the width is x1 - x0), float32, in the space its docstring names; a flip is a field of its own, never swapped
corners; a size is `(height, width)`. Every function takes NumPy arrays or torch tensors and answers in kind, with the
same elementwise float32 arithmetic.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Array = np.ndarray | Tensor


def _namespace(array):
    return np if isinstance(array, np.ndarray) else torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """The region that two crops of each image share."""

    first_box: Float[Array, "*B 4"]
    """The shared region in px of the first view as the encoder sees it (after the flip)."""
    second_box: Float[Array, "*B 4"]
    """The same in px of the second view."""
    weight: Float[Array, "*B"]
    """1 where the overlap is valid, 0 where it is not (METHOD, reading 9)."""


def intersect(a, b):
    """The intersection `[... 4]` of boxes `a` and `b` of one space; disjoint boxes give a box of zero area."""
    xp = _namespace(a)
    low = xp.maximum(a[..., :2], b[..., :2])
    high = xp.maximum(xp.minimum(a[..., 2:], b[..., 2:]), low)
    return xp.concatenate([low, high], -1)


def area(box):
    """Area `[...]` of boxes `[... 4]`, in squared units of their space."""
    return (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])


def into_view(box, crop_box, flipped, view_size: int):
    """Map boxes `[... 4]` from source px into px of the view cut by `crop_box`, resized to a square and mirrored if `flipped`.

    `crop_box [... 4]` in source px, `flipped [...]` bool, `view_size` = S, the side of the view in px.
    """
    xp = _namespace(box)
    low, extent = crop_box[..., :2], crop_box[..., 2:] - crop_box[..., :2]
    # Multiply, then divide: torch computes scalar / tensor by a reciprocal, which rounds twice and NumPy's doesn't.
    corners = [(box[..., :2] - low) * view_size / extent, (box[..., 2:] - low) * view_size / extent]
    inside = xp.concatenate(corners, -1)
    return xp.where(flipped[..., None], mirror(inside, view_size), inside)


def from_view(box, crop_box, flipped, view_size: int):
    """The way back: boxes `[... 4]` in px of the view into source px; arguments as `into_view`."""
    xp = _namespace(crop_box)
    seen = xp.where(flipped[..., None], mirror(box, view_size), box)
    low, extent = crop_box[..., :2], crop_box[..., 2:] - crop_box[..., :2]
    return xp.concatenate([low + corner * extent / view_size for corner in (seen[..., :2], seen[..., 2:])], -1)


def cell_centers(crop_box, flipped, cells: int):
    """Where the centers of `cells` x `cells` equal parts of a view lie, `[B cells*cells 2]` x y in source px, row by row as the
    encoder sees them: in a `flipped` view x runs backwards. `crop_box [B 4]` in source px, `flipped [B]` bool; torch tensors.
    """
    steps = (torch.arange(cells, device=crop_box.device, dtype=crop_box.dtype) + 0.5) / cells
    along_x = torch.where(flipped[:, None], 1 - steps, steps)
    low, extent = crop_box[:, None, :2], (crop_box[:, 2:] - crop_box[:, :2])[:, None]
    x = along_x[:, None, :].expand(-1, cells, -1).flatten(1)
    y = steps[:, None].expand(cells, cells).flatten().expand_as(x)
    return low + torch.stack([x, y], -1) * extent


def mirror(box, view_size: int):
    """Boxes `[... 4]` after their view of width `view_size` px was mirrored left to right."""
    xp = _namespace(box)
    x0, y0, x1, y1 = box[..., 0], box[..., 1], box[..., 2], box[..., 3]
    return xp.stack([view_size - x1, y0, view_size - x0, y1], -1)


def overlaps_enough(first_crop, second_crop, sizes: tuple[int, int], min_side: float = 32.0, min_iou: float = 0.0):
    """Whether the region that two crops of each image share is big enough to be used, `[...]` bool; arguments as `find_overlap`."""
    shared = intersect(first_crop, second_crop)
    extent = shared[..., 2:] - shared[..., :2]
    # A tolerance of 1e-3 px, so that a shared region of exactly one cell is not lost to float32 rounding.
    valid = (extent > 0).all(-1)
    for crop, size in zip((first_crop, second_crop), sizes, strict=True):
        valid = valid & (extent * size >= (min_side - 1e-3) * (crop[..., 2:] - crop[..., :2])).all(-1)
    if min_iou > 0:
        shared_area = area(shared)
        valid = valid & (shared_area >= min_iou * (area(first_crop) + area(second_crop) - shared_area))
    return valid


def find_overlap(
    first_crop, first_flipped, second_crop, second_flipped, sizes: tuple[int, int], min_side: float = 32.0, min_iou: float = 0.0
) -> Overlap:  # fmt: skip
    """The region shared by two crops of each image, in px of both views, and whether it is big enough to be used.

    Args:
        first_crop, second_crop: `[... 4]` float32 crop boxes in source px.
        first_flipped, second_flipped: `[...]` bool.
        sizes: sides of the two views in px.
        min_side: least extent of the shared region along each axis in both views, px of the view. The default is one
            res5 cell, i.e. the backbone's stride (METHOD, reading 9).
        min_iou: least intersection over union of the two crops in source px, 0..1.

    Source: paper section 3.2, cell-instance learning head ("valid overlap area").
    """
    shared = intersect(first_crop, second_crop)
    valid = overlaps_enough(first_crop, second_crop, sizes, min_side, min_iou)
    return Overlap(
        first_box=into_view(shared, first_crop, first_flipped, sizes[0]),
        second_box=into_view(shared, second_crop, second_flipped, sizes[1]),
        weight=valid.astype(np.float32) if isinstance(valid, np.ndarray) else valid.to(first_crop.dtype),
    )
