"""Every random choice of a run, as a pure function of (seed, epoch, sample id): plan first, execute later.

`plan_views` draws, for any set of samples, where each view is cropped, mirrored, jittered, made gray and blurred. The
numbers come from a counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011), keyed by the seed and counted by (sample id, epoch, purpose). So there is no state: the same numbers on every
machine, in any order, for every way to split a batch, and a run resumes from two integers.
"""

import itertools
import math
from dataclasses import dataclass, fields

import numpy as np

from inscon.config import ViewConfig
from inscon.geometry import find_overlap
from inscon.philox import philox

NOTHING, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(6)
"""Codes of the color operations in `ViewPlan.color_ops`."""
ROW = 16
"""Floats per view in `ViewPlan.rows`."""
ATTEMPTS = 10
"""torchvision's RandomResizedCrop tries this often before it falls back to a center crop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewPlan:
    """How one view of each of B samples is made: a struct of NumPy arrays, executed in the order of the fields."""

    crop_box: np.ndarray
    """[B 4] float32, x0 y0 x1 y1 in source px, whole numbers; resized to S x S, antialiased bilinear."""
    flipped: np.ndarray
    """[B] bool: mirrored left to right after the resize."""
    color_ops: np.ndarray
    """[B 5] uint8: codes of this module in order of execution; NOTHING where there is none."""
    factors: np.ndarray
    """[B 4] float32: factors of brightness, contrast, saturation (1 = unchanged) and the shift of hue in turns."""
    blur_sigma: np.ndarray
    """[B] float32: standard deviation of the Gaussian, px of the view; 0 = no blur."""

    def __len__(self) -> int:
        return len(self.flipped)

    def __getitem__(self, which) -> "ViewPlan":
        """The plan of some of the samples: `which` is a slice or an array of positions."""
        return ViewPlan(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    def rows(self) -> np.ndarray:
        """[B 16] float32 for compiled executors: crop_box 0:4, flipped 4, color_ops 5:10, factors 10:14, blur_sigma 14, 0."""
        rows = np.zeros((len(self), ROW), np.float32)
        rows[:, 0:4], rows[:, 4], rows[:, 5:10] = self.crop_box, self.flipped, self.color_ops
        rows[:, 10:14], rows[:, 14] = self.factors, self.blur_sigma
        return rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """The plans of all views of the same B samples."""

    query: ViewPlan
    key: ViewPlan | None
    """None for evaluation, which makes one view."""
    tile: ViewPlan | None
    """The independent third view for the mosaic; None where the query views are its tiles."""

    def __getitem__(self, which) -> "Plans":
        """Those of some of the samples, as `ViewPlan[which]`."""
        plans = {field.name: getattr(self, field.name) for field in fields(self)}
        return Plans(**{name: None if plan is None else plan[which] for name, plan in plans.items()})


def plan_views(seed: int, epoch: int, sample_ids: np.ndarray, sizes: np.ndarray, config: ViewConfig) -> Plans:
    """Draw the query and the key view (and the third, if `config.tiles_from` asks) of any set of samples.

    Args:
        seed: 0 .. 2**64-1.
        epoch: 0 .. 2**32-1; every epoch draws anew.
        sample_ids: [B] integers from 0; a sample's views depend on its own id alone.
        sizes: [B 2] (height, width) of each source image in px, each at least 1.

    The two crops are drawn until they overlap as `config` asks, at most `overlap_candidates` pairs; if none does, the
    last pair stays, and `find_overlap` gives it weight 0 (METHOD 9; paper section 3.2).
    """
    ids, sizes = np.asarray(sample_ids, np.int64), np.asarray(sizes, np.int64)
    if len(ids) and (sizes.shape != (len(ids), 2) or sizes.min() < 1):
        raise ValueError(
            f"sizes must be [B 2] (height, width) of at least 1 px for {len(ids)} samples. Found: {sizes.shape}"
        )
    draw = _Draw(seed, epoch, ids)
    boxes = _overlapping_boxes(draw, sizes, config)
    tile = None
    if config.tiles_from == "third":
        tile = _view_plan(draw, 2, _crop_boxes(draw, np.array([2]), np.array([0]), sizes, config)[:, 0, 0], config)
    return Plans(
        query=_view_plan(draw, 0, boxes[:, 0], config), key=_view_plan(draw, 1, boxes[:, 1], config), tile=tile
    )


def plan_center(sizes: np.ndarray, view_size: int) -> ViewPlan:
    """The view of ImageNet's evaluation: the shorter side to 256/224 of `view_size`, the center cut out; nothing is random.

    `sizes`: [B 2] (height, width), px. Said as a box of source px, edges rounded to whole ones, as every engine executes it.
    """
    sizes = np.asarray(sizes, np.int64)
    side = np.maximum(np.rint(sizes.min(1) * view_size / (view_size * 256 // 224)), 1).astype(np.int64)
    y, x = ((sizes - side[:, None]) // 2).T
    n = len(sizes)
    return ViewPlan(
        crop_box=np.stack([x, y, x + side, y + side], 1).astype(np.float32),
        flipped=np.zeros(n, bool),
        color_ops=np.full((n, 5), NOTHING, np.uint8),
        factors=np.tile(np.array([1, 1, 1, 0], np.float32), (n, 1)),
        blur_sigma=np.zeros(n, np.float32),
    )


def _overlapping_boxes(draw: "_Draw", sizes: np.ndarray, config: ViewConfig) -> np.ndarray:
    """[B 2 4] crop boxes of query and key: the first candidate pair that overlaps, else the last.

    Nearly every first pair overlaps, so later candidates are drawn only for the rest, and in growing handfuls, since
    NumPy's cost is per call rather than per number.
    """
    views = np.array([0, 1])
    boxes = _crop_boxes(draw, views, np.array([0]), sizes, config)[:, :, 0]
    pending = np.flatnonzero(~_overlaps(boxes, config))
    first, handful = 1, 2
    while len(pending) and first < config.overlap_candidates:
        candidates = np.arange(first, min(first + handful, config.overlap_candidates))
        drawn = _crop_boxes(draw.some(pending), views, candidates, sizes[pending], config).swapaxes(1, 2)
        valid = _overlaps(drawn, config)
        chosen = np.where(valid.any(-1), valid.argmax(-1), len(candidates) - 1)
        boxes[pending] = drawn[np.arange(len(pending)), chosen]
        pending = pending[~valid.any(-1)]
        first, handful = first + handful, handful * 2
    return boxes


def _overlaps(boxes: np.ndarray, config: ViewConfig) -> np.ndarray:
    """[...] bool for pairs of boxes [... 2 4]."""
    unflipped = np.zeros(boxes.shape[:-2], bool)  # mirroring changes no side of the shared region
    query, key = boxes[..., 0, :], boxes[..., 1, :]
    sides = config.overlap_min_side, config.overlap_min_iou
    return find_overlap(query, unflipped, key, unflipped, config.view_size, *sides).weight > 0


def _crop_boxes(
    draw: "_Draw", views: np.ndarray, candidates: np.ndarray, sizes: np.ndarray, config: ViewConfig
) -> np.ndarray:
    """[B views candidates 4] float32: torchvision's `RandomResizedCrop.get_params`, ten attempts at once, the first that fits."""
    height, width = (sizes[:, i].astype(np.float64)[:, None, None, None] for i in (0, 1))
    streams = _stream(views[:, None, None], _CROP, candidates[:, None], np.arange(ATTEMPTS))
    u = draw.uniforms(streams)
    share = config.scale[0] + u[..., 0] * (config.scale[1] - config.scale[0])
    log_low, log_high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratio = np.exp(log_low + u[..., 1] * (log_high - log_low))
    w = np.rint(np.sqrt(height * width * share * ratio))
    h = np.rint(np.sqrt(height * width * share / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    x = np.floor(u[..., 3] * (width - w + 1))
    y = np.floor(u[..., 2] * (height - h + 1))
    first = fits.argmax(-1)[..., None]
    box = np.stack([np.take_along_axis(a, first, -1)[..., 0] for a in (x, y, x + w, y + h)], -1)
    return np.where(fits.any(-1)[..., None], box, _center_box(sizes, config)[:, None, None, :]).astype(np.float32)


def _center_box(sizes: np.ndarray, config: ViewConfig) -> np.ndarray:
    """[B 4]: the crop torchvision falls back to, the largest centerd one whose ratio is allowed."""
    height, width = sizes[:, 0], sizes[:, 1]
    ratio = width / height
    w = np.where(ratio > config.ratio[1], np.rint(height * config.ratio[1]), width)
    h = np.where(ratio < config.ratio[0], np.rint(width / config.ratio[0]), height)
    x, y = (width - w) // 2, (height - h) // 2
    return np.stack([x, y, x + w, y + h], -1)


def _view_plan(draw: "_Draw", view: int, boxes: np.ndarray, config: ViewConfig) -> ViewPlan:
    """Flip, jitter, gray and blur of one view: three blocks of four numbers."""
    u = draw.uniforms(_stream(view, _COLOR, 0, np.arange(3)))
    coin, factor_u, rest = u[:, 0], u[:, 1], u[:, 2]
    spans = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    centers = np.array([1.0, 1.0, 1.0, 0.0])
    low, high = np.maximum(centers - spans, [0, 0, 0, -0.5]), centers + spans
    jittered = coin[:, 1] < config.jitter_probability
    # A random permutation of four operations: 24 equally likely ones, picked by one number.
    orders = _ORDERS[np.minimum((rest[:, 0] * len(_ORDERS)).astype(np.int64), len(_ORDERS) - 1)]
    jitter_ops = np.where(jittered[:, None], orders, NOTHING)
    gray_op = np.where(coin[:, 2] < config.gray_probability, GRAY, NOTHING)[:, None]
    ops = [gray_op, jitter_ops] if config.gray_first else [jitter_ops, gray_op]
    sigma = config.blur_sigma[0] + rest[:, 1] * (config.blur_sigma[1] - config.blur_sigma[0])
    return ViewPlan(
        crop_box=np.ascontiguousarray(boxes),
        flipped=coin[:, 0] < config.flip_probability,
        color_ops=np.concatenate(ops, 1).astype(np.uint8),
        factors=np.where(jittered[:, None], low + factor_u * (high - low), centers).astype(np.float32),
        blur_sigma=np.where(coin[:, 3] < config.blur_probability, sigma, 0.0).astype(np.float32),
    )


_CROP, _COLOR = 1, 2
_ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), np.uint8)


def _stream(view, purpose: int, candidate: int, attempt):
    """The fourth counter word: which of a sample's many draws this is. Works on scalars and arrays."""
    return (view << 28) | (purpose << 24) | (candidate << 8) | attempt


class _Draw:
    """Uniform numbers of some samples in one epoch."""

    def __init__(self, seed: int, epoch: int, sample_ids: np.ndarray):
        self._seed, self._epoch, self._ids = seed, epoch, sample_ids

    def some(self, positions: np.ndarray) -> "_Draw":
        return _Draw(self._seed, self._epoch, self._ids[positions])

    def uniforms(self, streams) -> np.ndarray:
        """[B *streams.shape 4] float64 in (0, 1): four numbers for each sample and stream."""
        streams = np.asarray(streams)
        ids = self._ids.reshape(-1, *[1] * streams.ndim)
        ids, streams = np.broadcast_arrays(ids, streams[None])
        words = philox(self._seed, (ids & 0xFFFFFFFF, ids >> 32, np.full_like(ids, self._epoch), streams))
        return (np.stack(words, -1) + 0.5) * 2.0**-32
