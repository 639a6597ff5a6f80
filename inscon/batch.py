"""The contract between the pipelines (who make batches) and the methods (which consume them).

Legend of axis letters, one for the whole project:

    B  images per rank and step                       S      side of a view, px
    P  patches of an image in a jigsaw                M  mosaic canvases per rank and step
    F h w  channels, height, width of a feature map   N  rows of a loss (queries)
    D  embedding dimension                            G      cells per side of the cell grid (3)
    K  keys in a queue
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from jaxtyping import Bool, Float, Int
from torch import Tensor

from inscon.geometry import Overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One augmented view of each image of a batch, as the encoder sees it."""

    pixels: Float[Tensor, "B *P 3 S S"]
    """Normalized by ImageNet's mean and standard deviation, channels-last in memory, on the training device. [B P 3 S S] of a
    jigsaw, whose patches lie one after the other; [B 3 S S] else."""
    crop_box: Float[Tensor, "B 4"]
    """x0 y0 x1 y1 of the crop in source px (see `inscon.geometry`), float32, on the training device."""
    flipped: Bool[Tensor, "B"]
    """Whether the crop was mirrored left to right after it was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank sees in one step. Fixed shapes, always full: every sample id occurs once."""

    views: Mapping[str, View]
    """By the names of the method's view specs."""
    overlaps: Mapping[tuple[str, str], Overlap]
    """By the names of two views, for every view spec with an overlap rule; tensors on the training device."""
    mosaic: Float[Tensor, "M 3 C C"] | None
    """Four views on each canvas, UL UR LL LR (see `inscon.plan.Mosaics`); None where the method wants none."""
    sample_ids: Int[Tensor, "B"]
    """int64 positions in the data set's index, on the CPU."""

    @property
    def size(self) -> int:
        """B, the number of source images."""
        return len(self.sample_ids)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor on the training device changed, always in the same order."""

        def changed(group):
            values = {field.name: getattr(group, field.name) for field in fields(group)}
            return type(group)(**{name: change(value) for name, value in values.items()})

        return Batch(
            views={name: changed(view) for name, view in self.views.items()},
            overlaps={pair: changed(overlap) for pair, overlap in self.overlaps.items()},
            mosaic=None if self.mosaic is None else change(self.mosaic),
            sample_ids=self.sample_ids,
        )

    def tensors(self) -> list[Tensor]:
        """Everything on the training device."""
        found: list[Tensor] = []
        self.each(lambda tensor: found.append(tensor) or tensor)
        return found
