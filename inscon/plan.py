"""Every random choice of a run, as a pure function of (seed, epoch, sample id): plan first, execute later.

A method names its views as `ViewSpec`s; `plan_views` draws, for any set of samples, where each view is cropped, mirrored,
jittered, made gray, blurred, changed by RandAugment and solarized. The numbers come from a counter-based generator
(`inscon.sampling.philox`), keyed by the seed and counted by (sample id, epoch, view, purpose). So there is no state: the same
numbers on every machine, in any order, for every way to split a batch, and a run resumes from two integers.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from inscon.geometry import Overlap, find_overlap, overlaps_enough
from inscon.guard import check_ranges
from inscon.sampling import philox

NOTHING, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(6)
"""Codes of the color operations in a plan's color_ops."""
AUTO_CONTRAST, EQUALIZE, INVERT, POSTERIZE, SOLARIZE, SOLARIZE_ADD, SHARPNESS = range(6, 13)
ROTATE, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y = range(13, 18)
"""Codes of what RandAugment does beside brightness, contrast and saturation: to levels, and from ROTATE on to places."""
RANDAUGMENT = {
    AUTO_CONTRAST: (0, 0), EQUALIZE: (0, 0), INVERT: (0, 0), ROTATE: (0, 30), POSTERIZE: (0, 4), SOLARIZE: (0, 256),
    SOLARIZE_ADD: (0, 110), SATURATION: (0.1, 1.9), CONTRAST: (0.1, 1.9), BRIGHTNESS: (0.1, 1.9), SHARPNESS: (0.1, 1.9),
    SHEAR_X: (0, 0.3), SHEAR_Y: (0, 0.3), TRANSLATE_X: (0, 0.45), TRANSLATE_Y: (0, 0.45),
}  # fmt: skip
"""Its operations -> their strengths (as in a plan, but shifts in sides of the view) at magnitudes 0 and 10, as timm's."""
EXECUTED = 0.5  # how often an operation that RandAugment has drawn is executed, as by timm's "rand" policies
FILL = (124, 116, 104)  # levels where a moved view has nothing to show: ImageNet's mean
LATE = 4  # places in a plan's late_ops: three for RandAugment, one for gray
NEVER = 256  # a solarize threshold that no level reaches
ATTEMPTS = 10  # torchvision's RandomResizedCrop tries this often before it falls back to a center crop


def check_range(name: str, bounds: tuple[float, float]) -> None:
    if not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"{name} must be a range 0 < low <= high. Found: {bounds[0]} {bounds[1]}")


@dataclass(frozen=True, kw_only=True)
class ColorSpec:
    """What happens to a view's colors after crop and flip: MoCo v2's by default."""

    jitter_probability: float = 0.8
    """How often color jitter is applied at all."""
    brightness: float = 0.4
    """Factor drawn from 1 +- this."""
    contrast: float = 0.4
    """Factor drawn from 1 +- this, around the mean gray of the view at that point of the order."""
    saturation: float = 0.4
    """Factor drawn from 1 +- this."""
    hue: float = 0.1
    """Shift drawn from +- this, in turns of the color circle; at most 0.5."""
    gray_probability: float = 0.2
    """How often a view becomes gray."""
    gray_first: bool = False
    """Gray before jitter, as MoCo v1 did; MoCo v2 does it after."""
    blur_probability: float = 0.5
    """How often a view is blurred."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the Gaussian's standard deviation, px of the view."""
    solarize_probability: float = 0.0
    """How often levels from `solarize_threshold` on are inverted, last of all."""
    solarize_threshold: int = 128
    """A level, 0..255."""
    randaugment: int = 0
    """RandAugment's operations after the blur, 0..3; gray then comes last of all. They may turn and shift what a view shows, which
    no box tells. 2 is InfoMin's "rand-m10-n2-mstd0.5" of timm, with PIL's bilinear filter where timm draws that or the bicubic."""
    magnitude: float = 10.0
    """Their mean strength, 0..10. As with timm, posterize and solarize are mildest at 10, and each is executed every other time."""
    magnitude_std: float = 0.5
    """Standard deviation of the strength, which is clipped to 0..10."""

    def __post_init__(self):
        share = (0, 1)
        check_ranges(
            self, jitter_probability=share, gray_probability=share, blur_probability=share, solarize_probability=share
        )
        check_ranges(self, brightness=0, contrast=0, saturation=0, hue=(0, 0.5), solarize_threshold=(0, 255))
        check_ranges(self, randaugment=(0, LATE - 1), magnitude=(0, 10), magnitude_std=0)
        check_range("blur_sigma", self.blur_sigma)


NO_COLOR = ColorSpec(jitter_probability=0.0, gray_probability=0.0, blur_probability=0.0)


@dataclass(frozen=True, kw_only=True)
class OverlapRule:
    """How much of the source a view must share with an earlier one (METHOD 9)."""

    view: str  # name of the earlier view
    min_side: float = 32.0  # least extent of the shared region, per axis, px of either view
    min_iou: float = 0.0  # least intersection over union of the two crops, source px
    candidates: int = 16  # pairs of crops drawn at most until one overlaps

    def __post_init__(self):
        check_ranges(self, min_iou=(0, 1), candidates=1)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A jigsaw: the crop, resized to its view's size, is cut into cells, and of each a patch is shown."""

    cells: int = 3  # per side
    patch: int = 64  # side of a patch, px, at most that of a cell; drawn anywhere within its cell
    shuffled: bool = False  # whether the patches of an image come in a random order instead of row by row

    def __post_init__(self):
        check_ranges(self, cells=(1, 16))


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """One view that a method asks for, of every image."""

    name: str
    size: int = 224  # side that the crop is resized to, px; without a grid a multiple of 16
    scale: tuple[float, float] = (0.2, 1.0)  # range of the crop's share of the image area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width over height, drawn log-uniformly
    flip: float | str = 0.5  # probability to be mirrored; or the name of an earlier view, to be mirrored where that is
    color: ColorSpec = field(default_factory=ColorSpec)
    overlap: OverlapRule | None = None
    grid: Grid | None = None

    def __post_init__(self):
        check_range("scale", self.scale)
        check_range("ratio", self.ratio)
        if self.scale[1] > 1:
            raise ValueError(f"scale is a share of the image area, at most 1. Found: {self.scale[1]}")
        if not isinstance(self.flip, str) and not 0 <= self.flip <= 1:
            raise ValueError(f"flip_probability must lie in 0..1. Found: {self.flip}")
        if self.overlap is not None and not 0 <= self.overlap.min_side <= self.size:
            raise ValueError(f"overlap_min_side must lie in 0..{self.size} px. Found: {self.overlap.min_side}")
        if self.grid is not None and self.grid.patch > self.size // self.grid.cells:
            raise ValueError(
                f"a patch must fit its cell of {self.size // self.grid.cells} px. Found: {self.grid.patch} px"
            )
        if self.side < 16 or self.side % 16:
            raise ValueError(f"the side of a view or patch must be a positive multiple of 16 px. Found: {self.side}")

    @property
    def side(self) -> int:
        """Of what is made, px: the view's, or a patch's."""
        return self.size if self.grid is None else self.grid.patch

    @property
    def count(self) -> int:
        """Pictures that are made of each image: 1, or the patches."""
        return 1 if self.grid is None else self.grid.cells**2


@dataclass(frozen=True, kw_only=True)
class Mosaics:
    """Which view lies on 2x2 canvases, four neighbors of the batch each (METHOD, readings 1 and 2).

    tile "full": `[B 3 S S]` views become `[B/4 3 2S 2S]` canvases, images 4m..4m+3 on canvas m. "half": every view is halved
    first and lies on four canvases `[B 3 S S]`, once in each corner: canvas 4g+r carries images 4g + (t + r) mod 4, t = 0..3.
    Both stay inside groups of four neighbors, so the split of a batch over ranks changes no mosaic. Same FLOPs.
    """

    view: str
    tile: Literal["full", "half"] = "full"

    def order(self, batch_size: int) -> np.ndarray:
        """Which image of the batch lies on which tile: [M 4] int64, tiles in the order UL UR LL LR."""
        groups = np.arange(batch_size).reshape(-1, 4)
        if self.tile == "full":
            return groups
        turns = np.arange(4)
        return groups[:, (turns[:, None] + turns) % 4].reshape(-1, 4)


VIEW_PLAN = np.dtype(
    [
        ("crop_box", "f4", 4),  # 0:4, x0 y0 x1 y1 in source px, whole numbers; resized, antialiased bilinear
        ("flipped", "f4"),  # 4, whether it is mirrored left to right after the resize
        ("color_ops", "f4", 5),  # 5:10, codes of this module in order of execution; NOTHING where there is none
        ("factors", "f4", 4),  # 10:14, of brightness, contrast, saturation (1 = unchanged); shift of hue in turns
        ("blur_sigma", "f4"),  # 14, standard deviation of the Gaussian, px of the view; 0 = no blur
        ("solarize", "f4"),  # 15, last of all, levels from this on are inverted; NEVER = none
        ("resized", "f4"),  # 16, side of the square that the crop is resized to, px
        ("offset", "f4", 2),  # 17:19, x y of the upper left corner of what is made, px of the resized and mirrored crop
        ("late_ops", "f4", LATE),  # 19:23, as color_ops, after the blur: of RandAugment, and then also gray
        ("strengths", "f4", LATE),  # 23:27, of these: degrees, px, px per px, a factor, bits, a threshold or levels
        ("side", "f4"),  # 27, of what is made, px: `resized`, or less where only a patch of it is
    ]
)
"""How a view of a sample is made; and the places of its floats, by which compiled executors know them."""
ROW = VIEW_PLAN.itemsize // 4


class ViewPlan(np.recarray):
    """[B] records of VIEW_PLAN, one view of each of B samples; of a jigsaw [B P]. `plan.crop_box` is [B 4] float32, and so on."""

    def rows(self) -> np.ndarray:
        """[B 1 ROW] float32, or [B P ROW] of a jigsaw, for compiled executors."""
        return np.ascontiguousarray(self).view(np.float32).reshape(len(self), -1, ROW)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The plans of all views of the same B samples, and what they share."""

    views: Mapping[str, ViewPlan]
    overlaps: Mapping[tuple[str, str], Overlap]
    """(earlier view, view) -> their overlap, NumPy arrays; for every view with a rule."""


def check_views(specs: Sequence[ViewSpec], mosaics: Mosaics | None = None) -> None:
    """ValueError for views that a name is twice among, that refer to none of the earlier ones, or that are too many."""
    if len(specs) > 16:
        raise ValueError(f"there can be at most 16 views. Found: {len(specs)}")
    for number, spec in enumerate(specs):
        earlier = [other.name for other in specs[:number]]
        if spec.name in earlier:
            raise ValueError(f"every view needs a name of its own. Found: {spec.name} twice")
        referred = {spec.flip} if isinstance(spec.flip, str) else set()
        referred |= {spec.overlap.view} if spec.overlap else set()
        for name in referred - set(earlier):
            raise ValueError(f"the view {spec.name} refers to {name}, which must come before it. Found: {earlier}")
        if spec.overlap and any(o.color.randaugment for o in specs if o.name in (spec.name, spec.overlap.view)):
            raise ValueError(
                f"{spec.name} shall overlap {spec.overlap.view}, and RandAugment moves what views show; set --randaugment 0"
            )
    if mosaics is not None and mosaics.view not in [spec.name for spec in specs if spec.grid is None]:
        raise ValueError(f"mosaics are laid of one of the views, not of patches. Found: {mosaics.view}")


def plan_views(
    seed: int, epoch: int, sample_ids: np.ndarray, sizes: np.ndarray, specs: Sequence[ViewSpec]
) -> BatchPlan:
    """Draw all views of any set of samples.

    Args:
        seed: 0 .. 2**64-1.
        epoch: 0 .. 2**32-1; every epoch draws anew.
        sample_ids: [B] integers from 0; a sample's views depend on its own id alone.
        sizes: [B 2] (height, width) of each source image in px, each at least 1.
        specs: at most 16; `check_views` holds.

    Two crops with an overlap rule are drawn until they overlap enough, at most `candidates` pairs; where an earlier rule has
    settled the first one, the second is drawn alone. If no candidate does, the last one stays, and its overlap has weight 0
    (METHOD 9; paper section 3.2).
    """
    ids, sizes = np.asarray(sample_ids, np.int64), np.asarray(sizes, np.int64)
    if len(ids) and (sizes.shape != (len(ids), 2) or sizes.min() < 1):
        raise ValueError(
            f"sizes must be [B 2] (height, width) of at least 1 px for {len(ids)} samples. Found: {sizes.shape}"
        )
    draw = functools.partial(_uniforms, seed, epoch)
    numbers = draw(ids, _stream(np.arange(len(specs))[:, None], _COLOR, 0, np.arange(3)))
    boxes = _crops(draw, ids, sizes, specs)
    flips, overlaps, views = {}, {}, {}
    for number, spec in enumerate(specs):
        own = numbers[:, number]
        flips[spec.name] = flips[spec.flip] if isinstance(spec.flip, str) else own[:, 0, 0] < spec.flip
        plan = _view_plan(own, boxes[number], flips[spec.name], spec)
        if spec.color.randaugment:
            _add_randaugment(draw(ids, _stream(number, _RANDAUGMENT, 0, np.arange(spec.color.randaugment))), plan, spec)
        if spec.grid is not None:
            plan = _patches(draw(ids, _stream(number, _PATCH, 0, np.arange(spec.count))), plan, spec)
        views[spec.name] = plan
        if spec.overlap is not None:
            first, bounds = _rule(specs, spec)
            crops = boxes[first], flips[spec.overlap.view], boxes[number], flips[spec.name]
            overlaps[spec.overlap.view, spec.name] = find_overlap(*crops, *bounds)
    return BatchPlan(views=views, overlaps=overlaps)


def plan_center(sizes: np.ndarray, view_size: int) -> ViewPlan:
    """The view of ImageNet's evaluation: the shorter side to 256/224 of `view_size`, the center cut out; nothing is random.

    `sizes`: [B 2] (height, width), px. Said as a box of source px, edges rounded to whole ones, as every engine executes it.
    """
    sizes = np.asarray(sizes, np.int64)
    side = np.maximum(np.rint(sizes.min(1) * view_size / (view_size * 256 // 224)), 1).astype(np.int64)
    y, x = ((sizes - side[:, None]) // 2).T
    boxes, n = np.stack([x, y, x + side, y + side], 1).astype(np.float32), len(sizes)
    return _view_plan(np.zeros((n, 3, 4)), boxes, np.zeros(n, bool), ViewSpec(name="", size=view_size, color=NO_COLOR))


def _rule(specs: Sequence[ViewSpec], spec: ViewSpec) -> tuple[int, tuple]:
    """Place of the earlier view that the rule of `spec` is about; sizes of the two, least side and IoU."""
    rule, first = spec.overlap, [other.name for other in specs].index(spec.overlap.view)
    return first, ((specs[first].size, spec.size), rule.min_side, rule.min_iou)


def _crops(draw: Callable, ids: np.ndarray, sizes: np.ndarray, specs: Sequence[ViewSpec]) -> list[np.ndarray]:
    """The crop boxes [B 4] of each view; those without an overlap that a rule asks for are drawn again, candidate by candidate."""
    boxes = _crop_boxes(draw, ids, range(len(specs)), 0, sizes, specs)
    settled: set[int] = set()
    for second, spec in enumerate(specs):
        if spec.overlap is None:
            continue
        first, bounds = _rule(specs, spec)
        again = [view for view in (first, second) if view not in settled]
        for candidate in range(1, spec.overlap.candidates):
            valid = overlaps_enough(boxes[first], boxes[second], *bounds)
            if valid.all():
                break
            for view, made in zip(again, _crop_boxes(draw, ids[~valid], again, candidate, sizes[~valid], specs)):
                boxes[view][~valid] = made
        settled |= {first, second}
    return boxes


def _crop_boxes(
    draw: Callable, ids: np.ndarray, views: Sequence[int], candidate: int, sizes: np.ndarray, specs: Sequence[ViewSpec]
) -> list[np.ndarray]:
    """[B 4] float32 of each of `views`: torchvision's `RandomResizedCrop.get_params`, ten attempts at once, the first that fits."""
    picked = [specs[view] for view in views]
    u = draw(ids, _stream(np.array(views)[:, None], _CROP, candidate, np.arange(ATTEMPTS)))
    height, width = (sizes[:, i].astype(np.float64)[:, None, None] for i in (0, 1))
    low, high = np.array([spec.scale for spec in picked]).T[:, :, None]
    log_low, log_high = np.array([[math.log(r) for r in spec.ratio] for spec in picked]).T[:, :, None]
    area = (low + u[..., 0] * (high - low)) * (height * width)
    ratio = np.exp(log_low + u[..., 1] * (log_high - log_low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(-1)[..., None]
    w, h, u_y, u_x = (np.take_along_axis(a, first, -1)[..., 0] for a in (w, h, u[..., 2], u[..., 3]))
    x, y = np.floor(u_x * (width[..., 0] - w + 1)), np.floor(u_y * (height[..., 0] - h + 1))
    boxes = np.stack([x, y, x + w, y + h], -1)
    if not fits.any(-1).all():
        fallback = np.stack([_center_box(sizes, spec.ratio) for spec in picked], 1)
        boxes = np.where(fits.any(-1)[..., None], boxes, fallback)
    return list(boxes.astype(np.float32).swapaxes(0, 1))


def _center_box(sizes: np.ndarray, allowed: tuple[float, float]) -> np.ndarray:
    """[B 4]: the crop torchvision falls back to, the largest centered one whose ratio is allowed."""
    height, width = sizes[:, 0], sizes[:, 1]
    ratio = width / height
    w = np.where(ratio > allowed[1], np.rint(height * allowed[1]), width)
    h = np.where(ratio < allowed[0], np.rint(width / allowed[0]), height)
    x, y = (width - w) // 2, (height - h) // 2
    return np.stack([x, y, x + w, y + h], -1)


def _view_plan(u: np.ndarray, boxes: np.ndarray, flipped: np.ndarray, spec: ViewSpec) -> ViewPlan:
    """Jitter, gray, blur and solarize of one view, from three blocks of four numbers, `u` [B 3 4]."""
    coin, factor_u, rest = u[:, 0], u[:, 1], u[:, 2]
    color = spec.color
    spans = np.array([color.brightness, color.contrast, color.saturation, color.hue])
    centers = np.array([1.0, 1.0, 1.0, 0.0])
    low, high = np.maximum(centers - spans, [0, 0, 0, -0.5]), centers + spans
    jittered = coin[:, 1] < color.jitter_probability
    # A random permutation of four operations: 24 equally likely ones, picked by one number.
    orders = _ORDERS[np.minimum((rest[:, 0] * len(_ORDERS)).astype(np.int64), len(_ORDERS) - 1)]
    jitter_ops = np.where(jittered[:, None], orders, NOTHING)
    gray_op = np.where(coin[:, 2] < color.gray_probability, GRAY, NOTHING)[:, None]
    ops = [gray_op, jitter_ops] if color.gray_first else [jitter_ops, gray_op]
    sigma = color.blur_sigma[0] + rest[:, 1] * (color.blur_sigma[1] - color.blur_sigma[0])
    plan = np.zeros(len(boxes), VIEW_PLAN)
    plan["crop_box"], plan["flipped"], plan["resized"], plan["side"] = boxes, flipped, spec.size, spec.side
    plan["color_ops"] = np.concatenate(ops, 1)
    plan["factors"] = np.where(jittered[:, None], low + factor_u * (high - low), centers)
    plan["blur_sigma"] = np.where(coin[:, 3] < color.blur_probability, sigma, 0.0)
    plan["solarize"] = np.where(rest[:, 2] < color.solarize_probability, color.solarize_threshold, NEVER)
    return plan.view(ViewPlan)


def _add_randaugment(u: np.ndarray, plan: ViewPlan, spec: ViewSpec) -> None:
    """RandAugment's operations, drawn with repetition by `u` [B n 4], and gray behind them unless it comes first."""
    color, codes = spec.color, np.array(list(RANDAUGMENT), np.uint8)
    which = np.minimum((u[..., 0] * len(codes)).astype(np.int64), len(codes) - 1)
    ops, (low, high) = codes[which], np.array(list(RANDAUGMENT.values()))[which].T.swapaxes(1, 2)
    normal = np.sqrt(-2 * np.log(u[..., 2])) * np.cos(2 * np.pi * u[..., 3])  # Box and Muller, 1958
    strength = low + (high - low) * np.clip((color.magnitude + color.magnitude_std * normal) / 10, 0, 1)
    strength = np.where(np.isin(ops, (POSTERIZE, SOLARIZE, SOLARIZE_ADD)), np.floor(strength), strength)
    strength = np.maximum(strength, ops == POSTERIZE)  # PIL wants to keep a bit at least
    strength = np.where(ops >= TRANSLATE_X, strength * spec.side, strength)
    strength = np.where((ops >= ROTATE) & (u[..., 1] < EXECUTED / 2), -strength, strength)
    executed = u[..., 1] < EXECUTED
    plan.late_ops[:, : color.randaugment] = np.where(executed, ops, NOTHING)
    plan.strengths[:, : color.randaugment] = np.where(executed, strength, 0)
    if not color.gray_first:
        plan.late_ops[:, -1], plan.color_ops[:, -1] = plan.color_ops[:, -1], NOTHING


def _patches(u: np.ndarray, plan: ViewPlan, spec: ViewSpec) -> ViewPlan:
    """The plan of each patch of a jigsaw, [B P ...]: the crop's own, executed on the patch alone, which lies where `u` [B P 4]
    says."""
    grid, cell = spec.grid, spec.size // spec.grid.cells
    rows, columns = np.divmod(np.arange(spec.count), grid.cells)
    corner = np.stack([columns, rows], -1) * cell
    offset = corner + np.floor(u[..., :2] * (cell - grid.patch + 1))
    if grid.shuffled:
        offset = np.take_along_axis(offset, u[..., 2].argsort(-1)[..., None], 1)
    patches = plan[:, None].repeat(spec.count, 1)
    patches.offset = offset
    return patches


_CROP, _COLOR, _PATCH, _RANDAUGMENT = 1, 2, 3, 4
_ORDERS = np.array(list(itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))), np.uint8)


def _stream(view, purpose: int, candidate, attempt):
    """The fourth counter word: which of a sample's many draws this is. Works on scalars and arrays."""
    return (view << 28) | (purpose << 24) | (candidate << 8) | attempt


def _uniforms(seed: int, epoch: int, sample_ids: np.ndarray, streams) -> np.ndarray:
    """[B *streams.shape 4] float64 in (0, 1): four numbers for each sample and stream."""
    streams = np.asarray(streams)
    ids = sample_ids.reshape(-1, *[1] * streams.ndim)
    words = philox(seed, np.broadcast_arrays(ids & 0xFFFFFFFF, ids >> 32, epoch, streams[None]))
    return (np.stack(words, -1) + 0.5) * 2.0**-32
