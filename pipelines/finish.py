"""The last stage of every engine: from what was made of a step to a batch on the device, copied, colored, normalized, with its
mosaics."""

import functools
from collections.abc import Iterator
from dataclasses import fields

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from inscon.batch import Batch, View
from inscon.geometry import Overlap
from inscon.guard import say_once
from inscon.plan import Mosaics, ViewPlan
from pipelines.color import color_views, normalize
from pipelines.feed import Engine, Feed, Work, to_device
from pipelines.prefetch import StageClock
from pipelines.slots import Slots


class Finish:
    """Makes batches, their pixels of `dtype` on `device`, of what the host, or a GPU's decoder, has made. With `host_color` color
    and blur are applied already, else here."""

    def __init__(self, feed: Feed, device: torch.device, dtype: torch.dtype, host_color: bool):
        self._feed, self.device, self.dtype, self.host_color = feed, device, dtype, host_color
        self._fused = None if host_color else fused_kernels(device, dtype, frozenset(spec.side for spec in feed.views))
        finished = device.type == "cpu" and host_color
        on_canvas = finished and feed.mosaics is not None and feed.mosaics.tile == "full"
        self.slots = Slots(
            feed.views, feed.batch_size, tiles=feed.mosaics.view if on_canvas else None, normalized=finished,
            color=host_color, pinned=device.type == "cuda",
        )  # fmt: skip
        """Memory for what the compiled kernels make; not allocated before it is taken."""

    def batches(self, engine: Engine, clock: StageClock) -> Iterator[Batch]:
        """One batch per step. Whoever asks for the next one has waited until the device was done with the one before: the memory of
        its views is free then."""
        for work, made in engine.steps():
            clock.substituted += work.substituted
            with clock.at("color and copy", "finish"):
                batch = self(work, *made)
            clock.add("images", batch.size)
            yield batch
            del batch, made

    def __call__(self, work: Work, views: dict[str, Tensor], mosaic: Tensor | None = None) -> Batch:
        """The batch of `work`. `views` [B P S S 3] by name, on the device or to be copied, are uint8 levels or, like a `mosaic`
        [M 2S 2S 3], finished."""
        plans, mosaics = work.plan.views, self._feed.mosaics
        if self._fused is not None:
            levels = {name: view.flatten(0, 1).to(self.device, non_blocking=True) for name, view in views.items()}
            pixels, mosaic = self._fused.color_batch(levels, plans, mosaics, self.dtype)
        else:
            pixels = {name: self._finished(view.flatten(0, 1), plans[name]) for name, view in views.items()}
            mosaic = None if mosaic is None else mosaic.permute(0, 3, 1, 2).to(self.dtype)
        if mosaic is None and mosaics is not None:
            mosaic = assemble(pixels[mosaics.view], mosaics)
        views = {spec.name: self._view(plans[spec.name], pixels[spec.name]) for spec in self._feed.views}
        overlaps = {
            pair: Overlap(**{f.name: to_device(getattr(found, f.name), self.device) for f in fields(Overlap)})
            for pair, found in work.plan.overlaps.items()
        }
        return Batch(views=views, overlaps=overlaps, mosaic=mosaic, sample_ids=torch.from_numpy(work.sample_ids))

    def _finished(self, view: Tensor, plan: ViewPlan) -> Float[Tensor, "n 3 S S"]:
        view = view.to(self.device, non_blocking=True)
        if view.dtype != torch.uint8:
            return view.permute(0, 3, 1, 2).to(self.dtype)
        return normalize(view, self.dtype) if self.host_color else color_views(view, plan.ravel(), self.dtype)

    def _view(self, plan: ViewPlan, pixels: Tensor) -> View:
        box, flipped = plan.crop_box, plan.flipped != 0
        if flipped.ndim == 2:  # patches of a jigsaw, which share the crop
            pixels, box, flipped = pixels.unflatten(0, flipped.shape), box[:, 0], flipped[:, 0]
        return View(pixels=pixels, crop_box=to_device(box, self.device), flipped=to_device(flipped, self.device))


@functools.cache
def fused_kernels(device: torch.device, dtype: torch.dtype, sides: frozenset[int]):
    """The module pipelines/fused_color.py where it serves on `device` for views of these sides, px; else None, and of a GPU why is
    said."""
    if device.type != "cuda":
        return None
    try:
        from pipelines import fused_color

        reason = next(filter(None, (fused_color.refusal(device, dtype, side) for side in sides)), None)
    except ImportError as error:
        reason = str(error)
    if reason is None:
        return fused_color
    say_once(
        f"the color kernels do not serve on {device} ({reason}); views are colored by plain PyTorch, which takes longer: "
        "--color host may be faster"
    )
    return None


def assemble(tiles: Float[Tensor, "B F S S"], mosaics: Mosaics) -> Float[Tensor, "M F C C"]:
    """Lay `tiles`, whose B is a multiple of 4, on 2x2 canvases, channels-last, as `mosaics` says."""
    count, channels, side, _ = tiles.shape
    if mosaics.tile == "half":
        tiles = F.avg_pool2d(tiles, 2)[to_device(mosaics.order(count).ravel(), tiles.device)]
        count, side = tiles.shape[0], side // 2
    grid = tiles.permute(0, 2, 3, 1).reshape(count // 4, 2, 2, side, side, channels)
    canvas = grid.permute(0, 1, 3, 2, 4, 5).reshape(count // 4, 2 * side, 2 * side, channels)
    return canvas.permute(0, 3, 1, 2)
