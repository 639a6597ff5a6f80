"""From what the host has made of a step to a batch on the device: copied, colored, normalized, with its mosaic."""

import torch
from torch import Tensor

from inscon.batch import Batch
from pipelines.color import color_views, normalize
from pipelines.feed import Feed, Work, make_batch
from pipelines.slots import Slot, Slots


class Finish:
    """The last stage of an engine that decodes on the host, or on a GPU.

    Args:
        feed: of the engine.
        device, dtype: of the pixels.
        host_color: whether the host has applied color and blur; else that happens here, on `device`.
    """

    def __init__(self, feed: Feed, device: torch.device, dtype: torch.dtype, host_color: bool):
        self._feed, self._device, self._dtype, self._host_color = feed, device, dtype, host_color
        self.slots = make_slots(feed, device, host_color)
        """Memory for what the compiled kernels make; not allocated before it is taken."""

    def __call__(self, work: Work, made: "Slot | list[Tensor]") -> Batch:
        """The batch of `work`, whose views are in a slot, or are crops [n V S S 3] uint8 on the device, in parts."""
        if isinstance(made, Slot) and self.slots.normalized:
            views, mosaic = made.hand_out()
            pixels = [view.permute(0, 3, 1, 2).to(self._dtype) for view in views]
            mosaic = None if mosaic is None else mosaic.permute(0, 3, 1, 2).to(self._dtype)
            return make_batch(work, pixels, self._feed, mosaic)
        if isinstance(made, Slot):
            levels = made.tensors(made.memory.to(self._device, non_blocking=True))[0]
        else:
            levels = (made[0] if len(made) == 1 else torch.cat(made)).unbind(1)
        if self._host_color:
            return make_batch(work, [normalize(view, self._dtype) for view in levels], self._feed)
        pixels = [color_views(view, plan, self._dtype) for view, plan in zip(levels, work.views, strict=True)]
        return make_batch(work, pixels, self._feed)

    def release(self, made: "Slot | list[Tensor]") -> None:
        """Once the device is done with the batch: its slot can be taken again, unless the batch itself lies in it."""
        if isinstance(made, Slot) and not self.slots.normalized:
            self.slots.give_back(made)
        elif isinstance(made, list):
            made.clear()


def make_slots(feed: Feed, device: torch.device, host_color: bool) -> Slots:
    """Memory for what the compiled kernels make: the batch itself on a CPU, its levels for a device that finishes them."""
    views = feed.config.views
    finished = device.type == "cpu" and host_color
    every, on_canvas = tuple(range(feed.num_views)), finished and feed.wants_mosaic and views.tile == "full"
    return Slots(
        batch_size=feed.batch_size,
        view_size=views.view_size,
        views=feed.num_views,
        kept=every[:2] if on_canvas else every,
        tiles=every[2 if feed.num_views == 3 else 0] if on_canvas else None,
        normalized=finished,
        color=host_color,
        pinned=device.type == "cuda",
    )
