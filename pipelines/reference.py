"""PIL and torchvision executing the plan, slow and obvious: the oracle for the other engines, and what runs anywhere.

`render_view` is what MoCo v2's transforms do once their random numbers are known: RandomResizedCrop, flip, ColorJitter,
RandomGrayscale, GaussianBlur (PIL's, radius = sigma). Worker processes make whole batches (pipelines/workers.py).
"""

import functools
import io
import time

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from data_prep.index import RAW, DatasetIndex
from inscon import plan as codes
from inscon.config import LoaderConfig
from inscon.plan import BRIGHTNESS, CONTRAST, FILL, GRAY, HUE, NEVER, NOTHING, SATURATION, ViewPlan
from pipelines.feed import Engine, Feed, Refusal, Work, read, threads_per_rank, undecodable, wrong_size
from pipelines.finish import Finish
from pipelines.prefetch import StageClock
from pipelines.workers import made_by_workers

MOVED = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """What lies at (x, y) comes from (a x + b y + c, d x + e y + f), `matrix`."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, **MOVED)


OPERATIONS = {
    NOTHING: lambda image, factor: image,
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
    GRAY: lambda image, factor: F.to_grayscale(image, num_output_channels=3),
    codes.AUTO_CONTRAST: lambda image, _: ImageOps.autocontrast(image),
    codes.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    codes.INVERT: lambda image, _: ImageOps.invert(image),
    codes.POSTERIZE: lambda image, bits: ImageOps.posterize(image, int(bits)),
    codes.SOLARIZE: lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    codes.SOLARIZE_ADD: lambda image, more: image.point(3 * [i + int(more) if i < 128 else i for i in range(256)]),
    codes.SHARPNESS: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    codes.ROTATE: lambda image, degrees: image.rotate(degrees, **MOVED),
    codes.SHEAR_X: lambda image, slope: affine(image, 1, slope, 0, 0, 1, 0),
    codes.SHEAR_Y: lambda image, slope: affine(image, 1, 0, 0, slope, 1, 0),
    codes.TRANSLATE_X: lambda image, px: affine(image, 1, 0, px, 0, 1, 0),
    codes.TRANSLATE_Y: lambda image, px: affine(image, 1, 0, 0, 0, 1, px),
}
"""Code of an operation -> function of a PIL image and a factor, or strength."""


def render_view(image: Image.Image, plan: ViewPlan, i: int, color: bool = True) -> Image.Image:
    """Row `i` of a flat `plan` applied to a whole RGB picture: the view, or the patch of it, as an RGB picture.

    Without `color` it ends with the flip and the cut.
    """
    x0, y0, x1, y1 = (int(edge) for edge in plan.crop_box[i])
    size = int(plan.resized[i])
    view = F.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [size, size], F.InterpolationMode.BILINEAR, antialias=True)
    if plan.flipped[i]:
        view = F.hflip(view)
    left, top, side = (int(px) for px in (*plan.offset[i], plan.side[i]))
    view = view.crop((left, top, left + side, top + side))
    if not color:
        return view
    for operation in plan.color_ops[i].astype(int):
        factor = float(plan.factors[i, operation - 1]) if BRIGHTNESS <= operation <= HUE else 0.0
        view = OPERATIONS[operation](view, factor)
    if plan.blur_sigma[i] > 0:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(plan.blur_sigma[i])))
    for operation, strength in zip(plan.late_ops[i], plan.strengths[i], strict=True):
        view = OPERATIONS[int(operation)](view, float(strength))
    return F.solarize(view, int(plan.solarize[i])) if plan.solarize[i] < NEVER else view


def decode(index: DatasetIndex, sample_id: int, stored: np.ndarray) -> Image.Image:
    """One sample, a JPEG or raw pixels, as an RGB picture. Refusal where its bytes are no picture."""
    if index.records([sample_id])["encoding"][0] == RAW:
        return Image.fromarray(stored.reshape(*index.sizes([sample_id])[0], 3))
    try:
        return Image.open(io.BytesIO(stored)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "its bytes are no picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise undecodable(index, sample_id, reason, "PIL") from None


def picture_of(index: DatasetIndex, sample_id: int) -> Image.Image:
    """A sample of a packed set, JPEG or raw pixels, as an RGB picture. ShardError where it cannot be read or decoded."""
    try:
        return decode(index, sample_id, read(index, sample_id))
    except Refusal as refusal:
        raise refusal.args[1] from None


def render_step(feed: Feed, step: int, color: bool) -> tuple[Work, dict[str, np.ndarray], dict[str, float]]:
    """The work of a step, [B P S S 3] uint8 of each view, and the seconds that stages took. Bad samples go to `Feed.reject`."""
    read_s = 0.0
    while True:
        start = time.perf_counter()
        work, stored, _ = feed.load(step, pixels=True)
        loaded = time.perf_counter()
        read_s += loaded - start
        try:
            views = _render(feed, work, stored, color)
            return work, views, {"read": read_s, "decode": time.perf_counter() - loaded}
        except Refusal as refusal:
            feed.reject(*refusal.args)


def _render(feed: Feed, work: Work, stored: list[np.ndarray], color: bool) -> dict[str, np.ndarray]:
    plans = {name: plan.ravel() for name, plan in work.plan.views.items()}
    views = {s.name: np.empty((len(stored), s.count, s.side, s.side, 3), np.uint8) for s in feed.views}
    for i, content in enumerate(stored):
        image = decode(feed.index, int(work.sample_ids[i]), content)
        wrong_size(feed.index, work, i, np.array([[image.height, image.width]]))
        for spec in feed.views:
            for number in range(spec.count):
                views[spec.name][i, number] = render_view(image, plans[spec.name], i * spec.count + number, color)
    return views


class ReferenceEngine(Engine):
    """`loader.threads` are worker processes here, each a batch ahead; 0 works in this process."""

    works_ahead = True

    def __init__(self, feed: Feed, loader: LoaderConfig, steps: range, finish: Finish, clock: StageClock):
        self._make, self._steps = functools.partial(render_step, feed, color=finish.host_color), steps
        self._workers, self._timeout_s, self._clock = threads_per_rank(loader.threads), loader.stall_timeout, clock
        self.description = f"reference: PIL decode on the cpu, {self._workers} workers, {feed.index.path}"

    def steps(self):
        made = map(self._make, self._steps)
        if self._workers:  # which end with this generator
            made = made_by_workers(self._make, self._steps, self._workers, self._timeout_s)
        for work, views, spent in made:
            for stage, seconds in spent.items():
                self._clock.add(stage, seconds)
            yield work, ({name: torch.from_numpy(view) for name, view in views.items()}, None)
