"""What each stage of a loader costs by itself, over the run's own pictures and plan: to be set against what the run says.

The host's stages are measured in one thread, one after the other, with nobody beside them; a GPU's as it is done with them.
"""

import time
from collections.abc import Callable

import numpy as np
import simplejpeg
import torch

from data_prep.index import RAW
from inscon.config import Config
from inscon.mosaic import assemble
from inscon.plan import ROW
from pipelines.color import color_views
from pipelines.feed import Feed, open_feed

READ, PLAN, DECODE, CROP, COLOR, COPY, DEVICE = STAGES = (
    "read", "plan", "decode", "crop", "color", "copy", "device augmentation and mosaic",
)  # fmt: skip
"""In the order of an image's path. The last two exist on a GPU alone; color is there or on the host."""
PICTURES = 128
"""Over so many are the host's stages measured."""
REPEATS = 10
"""How often a GPU's stages are repeated."""


def stages_alone(config: Config, step: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds per source image of each stage by itself, of one core or of the device, from the batch of `step` on.

    Stages that cannot be measured here are missing: crop and color of the host without numba. ShardError as a pipeline.
    """
    feed = open_feed(config, 0, 1)
    numbers = range(step, step + max(PICTURES // feed.batch_size, 1))
    spent = dict.fromkeys((PLAN, READ, DECODE, CROP, COLOR), 0.0)
    decode, render = simplejpeg.decode_jpeg, _compiled_kernel(feed.config.views.view_size)
    if render is None:
        del spent[CROP], spent[COLOR]

    def timed(stage: str, call: Callable):
        start = time.perf_counter()
        made = call()
        spent[stage] += time.perf_counter() - start
        return made

    for number in numbers:
        work = timed(PLAN, lambda n=number: feed.work(n))
        _, stored, _ = timed(READ, lambda n=number: feed.load(n, pixels=True))
        raw = feed.index.records(work.sample_ids)["encoding"] == RAW
        rows = work.rows()
        for content, (height, width), is_raw, row in zip(stored, work.sizes, raw, rows, strict=True):
            picture = content.reshape(height, width, 3) if is_raw else timed(DECODE, lambda c=content: decode(c))
            if render is not None:
                crops = timed(CROP, lambda p=picture, r=row: render(p, r, False))
                before = spent[COLOR]
                timed(COLOR, lambda p=picture, r=row: render(p, r, True))
                spent[COLOR] = before + max(spent[COLOR] - before - crops[1], 0.0)
    images = len(numbers) * feed.batch_size
    found = {stage: 1e3 * seconds / images for stage, seconds in spent.items()}
    if device.type == "cuda":
        found |= _on_device(feed, work, device, dtype)
    return {stage: found[stage] for stage in STAGES if stage in found}


def _compiled_kernel(side: int) -> Callable | None:
    """(picture, rows, color) -> (views, seconds), compiled; None without numba."""
    try:
        from pipelines.kernels import render_views
    except ModuleNotFoundError:
        return None

    def render(picture, rows, color):
        start = time.perf_counter()
        render_views(picture, rows, out[: len(rows)], color)
        return out, time.perf_counter() - start

    out = np.empty((3, side, side, 3), np.uint8)
    nothing = np.zeros((1, ROW), np.float32)
    nothing[:, 2:4] = 8
    for color in (False, True):  # compiles
        render(np.zeros((8, 8, 3), np.uint8), nothing, color)
    return render


def _on_device(feed: Feed, work, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    side, size = feed.config.views.view_size, feed.batch_size
    levels = torch.randint(0, 256, (feed.num_views, size, side, side, 3), dtype=torch.uint8).pin_memory()
    arrived = levels.to(device)

    def augment():
        views = [color_views(view, plan, dtype) for view, plan in zip(arrived, work.views, strict=True)]
        if feed.wants_mosaic:
            assemble(views[-1 if feed.num_views == 3 else 0], feed.config.views.tile)

    found = {}
    for stage, run in ((COPY, lambda: levels.to(device, non_blocking=True)), (DEVICE, augment)):
        run()
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize(device)
        found[stage] = 1e3 * (time.perf_counter() - start) / (REPEATS * size)
    return found
