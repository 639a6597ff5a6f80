"""The last stage of every engine: from what was made of a step to a batch on the device, copied, colored, normalized, with its
mosaics."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from inscon.batch import Batch, View
from inscon.geometry import Overlap
from inscon.plan import Mosaics
from pipelines.color import color_views, normalize
from pipelines.feed import Feed, Work, to_device
from pipelines.slots import Slot, Slots


class Finish:
    """Makes batches of what the host, or a GPU's decoder, has made.

    Args:
        feed: of the engine.
        device, dtype: of the pixels.
        host_color: whether the host has applied color and blur; else that happens here, on `device`.
    """

    def __init__(self, feed: Feed, device: torch.device, dtype: torch.dtype, host_color: bool):
        self._feed, self._device, self._dtype, self._host_color = feed, device, dtype, host_color
        finished = device.type == "cpu" and host_color
        on_canvas = finished and feed.mosaics is not None and feed.mosaics.tile == "full"
        self.slots = Slots(
            feed.views, feed.batch_size, tiles=feed.mosaics.view if on_canvas else None, normalized=finished,
            color=host_color, pinned=device.type == "cuda",
        )  # fmt: skip
        """Memory for what the compiled kernels make; not allocated before it is taken."""

    def __call__(self, work: Work, made: "Slot | dict[str, Tensor]") -> Batch:
        """The batch of `work`; its views are in a slot, or are levels [B P S S 3] uint8 by name, on the device or to be copied."""
        if isinstance(made, Slot) and self.slots.normalized:
            views, mosaic = made.hand_out()
            mosaic = None if mosaic is None else mosaic.permute(0, 3, 1, 2).to(self._dtype)
            return self._batch(
                work, {n: v.flatten(0, 1).permute(0, 3, 1, 2).to(self._dtype) for n, v in views.items()}, mosaic
            )
        if isinstance(made, Slot):
            made = made.tensors(made.memory.to(self._device, non_blocking=True))[0]
        levels = {name: view.to(self._device, non_blocking=True).flatten(0, 1) for name, view in made.items()}
        if self._host_color:
            return self._batch(work, {name: normalize(view, self._dtype) for name, view in levels.items()})
        plans = work.plan.views
        return self._batch(work, {n: color_views(view, plans[n].flat(), self._dtype) for n, view in levels.items()})

    def release(self, made: "Slot | dict[str, Tensor]") -> None:
        """Once the device is done with the batch: its slot can be taken again, unless the batch itself lies in it."""
        if isinstance(made, Slot) and not self.slots.normalized:
            self.slots.give_back(made)

    def _batch(self, work: Work, pixels: dict[str, Tensor], mosaic: Tensor | None = None) -> Batch:
        return make_batch(work, pixels, self._feed, mosaic)


def make_batch(
    work: Work, pixels: dict[str, Float[Tensor, "n 3 S S"]], feed: Feed, mosaic: Float[Tensor, "M 3 C C"] | None = None
) -> Batch:
    """A `Batch` from the finished `pixels` of each view, B or B*P pictures, on their device; lays the mosaic unless it is given."""
    device = next(iter(pixels.values())).device
    if feed.mosaics is not None and mosaic is None:
        mosaic = assemble(pixels[feed.mosaics.view], feed.mosaics)
    views = {}
    for spec in feed.views:
        plan, own = work.plan.views[spec.name], pixels[spec.name]
        box, flipped = plan.crop_box, plan.flipped
        if spec.grid is not None:
            own, box, flipped = own.unflatten(0, (-1, spec.count)), box[:, 0], flipped[:, 0]
        views[spec.name] = View(pixels=own, crop_box=to_device(box, device), flipped=to_device(flipped, device))
    overlaps = {
        pair: Overlap(
            first_box=to_device(overlap.first_box, device),
            second_box=to_device(overlap.second_box, device),
            weight=to_device(overlap.weight, device),
        )
        for pair, overlap in work.plan.overlaps.items()
    }
    return Batch(views=views, overlaps=overlaps, mosaic=mosaic, sample_ids=torch.from_numpy(work.sample_ids))


def assemble(tiles: Float[Tensor, "B F S S"], mosaics: Mosaics) -> Float[Tensor, "M F C C"]:
    """Lay `tiles` on 2x2 canvases, channels-last, as `mosaics` says. ValueError if B is not a multiple of 4 or S is odd."""
    count, channels, side, _ = tiles.shape
    if count % 4:
        raise ValueError(f"a mosaic takes 4 images, so the batch per rank must be a multiple of 4. Found: {count}")
    if mosaics.tile == "half":
        tiles = F.avg_pool2d(tiles, 2)[to_device(mosaics.order(count).ravel(), tiles.device)]
        count, side = tiles.shape[0], side // 2
    grid = tiles.permute(0, 2, 3, 1).reshape(count // 4, 2, 2, side, side, channels)
    canvas = grid.permute(0, 1, 3, 2, 4, 5).reshape(count // 4, 2 * side, 2 * side, channels)
    return canvas.permute(0, 3, 1, 2)
