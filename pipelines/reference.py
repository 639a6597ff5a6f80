"""PIL and torchvision executing the plan, slow and obvious: the oracle for the other engines, and what runs anywhere.

`render_view` is what MoCo v2's transforms do once their random numbers are known: RandomResizedCrop, flip, ColorJitter,
RandomGrayscale, GaussianBlur (PIL's, radius = sigma). The loader around it is a plain torch DataLoader.
"""

import functools
import io
import multiprocessing

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from data_prep.index import DatasetIndex, ShardError
from inscon.config import Config
from inscon.plan import BRIGHTNESS, CONTRAST, GREY, HUE, NOTHING, SATURATION, ViewPlan
from pipelines.colour import normalise
from pipelines.feed import Feed, Pipeline, check_sizes, make_batch, open_feed, threads_per_rank

COLOUR = {
    NOTHING: lambda image, factor: image,
    BRIGHTNESS: F.adjust_brightness,
    CONTRAST: F.adjust_contrast,
    SATURATION: F.adjust_saturation,
    HUE: F.adjust_hue,
    GREY: lambda image, factor: F.to_grayscale(image, num_output_channels=3),
}
"""Code of an operation -> function of a PIL image and a factor."""


def render_view(image: Image.Image, plan: ViewPlan, i: int, view_size: int) -> Image.Image:
    """Row `i` of `plan` applied to a whole RGB picture: the view as an RGB picture of `view_size` px square."""
    x0, y0, x1, y1 = (int(edge) for edge in plan.crop_box[i])
    view = F.resized_crop(
        image, y0, x0, y1 - y0, x1 - x0, [view_size, view_size], F.InterpolationMode.BILINEAR, antialias=True
    )
    if plan.flipped[i]:
        view = F.hflip(view)
    for operation in plan.colour_ops[i]:
        factor = float(plan.factors[i, operation - 1]) if BRIGHTNESS <= operation <= HUE else 0.0
        view = COLOUR[int(operation)](view, factor)
    if plan.blur_sigma[i] > 0:
        view = view.filter(ImageFilter.GaussianBlur(radius=float(plan.blur_sigma[i])))
    return view


def decode(index: DatasetIndex, sample_id: int) -> Image.Image:
    """One sample as an RGB picture. ShardError, naming sample and shard, where its bytes are no JPEG."""
    try:
        return Image.open(io.BytesIO(index.jpeg_bytes(sample_id))).convert("RGB")
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = "its bytes are no picture" if isinstance(error, UnidentifiedImageError) else str(error)
        raise undecodable(index, sample_id, reason) from None


def undecodable(index: DatasetIndex, sample_id: int, reason: str) -> ShardError:
    """The one sentence about a picture that was sound when it was packed and cannot be decoded any more."""
    return ShardError(
        f"{index.describe(sample_id)} cannot be decoded ({reason}), so the shard changed after it was packed: "
        "copy it again or rerun data_prep/make_dali.py"
    )


class _Steps(Dataset):
    """Item `step` is everything one step needs, so that the plan of a batch is drawn in one go."""

    def __init__(self, feed: Feed):
        self._feed = feed

    def __getstate__(self) -> tuple:
        # A worker opens the shards itself when the first step is asked for, where a failure can be told as any other.
        return self._feed.config, self._feed.rank, self._feed.world_size

    def __setstate__(self, state: tuple) -> None:
        self._feed = functools.partial(open_feed, *state)

    def __getitem__(self, step: int):
        try:
            if isinstance(self._feed, functools.partial):
                self._feed = self._feed()
            return self._render(step)
        except ValueError as error:
            # As a value, not raised: the DataLoader would bury the sentence in the worker's traceback.
            return error

    def _render(self, step: int):
        work, side = self._feed.work(step), self._feed.config.views.view_size
        views = np.empty((len(work.views), self._feed.batch_size, side, side, 3), np.uint8)
        sizes = work.sizes.copy()
        for i, sample_id in enumerate(work.sample_ids):
            image = decode(self._feed.index, sample_id)
            sizes[i] = image.height, image.width
            for view, plan in zip(views, work.views, strict=True):
                view[i] = render_view(image, plan, i, side)
        check_sizes(self._feed.index, work, sizes)
        return work, torch.from_numpy(views)


def _alive(loader: DataLoader):
    """What the workers made; whatever the death of one of them looks like from here becomes one sentence."""
    try:
        yield from loader
    except (EOFError, ConnectionError, FileNotFoundError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            "a worker process of the pipeline reference died (killed, or out of memory): run again to go on from the last "
            "checkpoint, with fewer --threads if memory was short"
        ) from error


def open_reference(
    *,
    config: Config,
    rank: int,
    world_size: int,
    device: torch.device,
    dtype: torch.dtype,
    start_step: int,
    total_steps: int,
) -> Pipeline:
    """See `pipelines.open_pipeline`. `loader.threads` are worker processes here; 0 works in this process."""
    feed = open_feed(config, rank, world_size)
    workers = threads_per_rank(config.loader.threads)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pipelines.reference"])
    loader = DataLoader(
        _Steps(feed),
        batch_size=None,
        sampler=range(start_step, total_steps),
        num_workers=workers,
        # The DataLoader counts per worker; at least one batch each, or the worker idles.
        prefetch_factor=max(config.loader.prefetch // workers, 1) if workers else None,
        # Forked from a clean server, not from this process: a fork beside DALI's or OpenMP's threads can hang.
        # No timeout: PyTorch looks for dead workers every 5 s by itself, and with one it would look at its end only.
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=device.type == "cuda",
    )

    def batches():
        for made in _alive(loader):
            if isinstance(made, ValueError):
                raise made
            work, views = made
            views = views.to(device, non_blocking=True)
            yield make_batch(work, [normalise(view, dtype) for view in views], feed)

    description = (
        f"reference: PIL decode on the cpu, {workers} workers, prefetch {config.loader.prefetch}, {feed.index.path}"
    )
    # The DataLoader's workers end with its iterator, which the generator holds and closing it frees.
    return Pipeline(batches(), lambda: None, feed.steps_per_epoch, description)
