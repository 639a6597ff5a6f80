"""The contract between the pipelines (who make batches) and the method (which consumes them).

Legend of axis letters, one for the whole project:

    B  images per rank and step, a multiple of 4      S      side of a view, px
    M  mosaic canvases per rank and step              F h w  channels, height, width of a trunk map
    N  rows of a loss (queries)                       G      cells per side of the cell grid (3)
    D  embedding dimension                            K      keys in a queue
"""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One augmented view of each image of a batch, as the encoder sees it."""

    pixels: Float[Tensor, "B 3 S S"]
    """Normalized by ImageNet's mean and standard deviation, channels-last in memory, on the training device."""
    crop_box: Float[Tensor, "B 4"]
    """x0 y0 x1 y1 of the crop in source px (see `inscon.geometry`), float32, on the training device."""
    flipped: Bool[Tensor, "B"]
    """Whether the crop was mirrored left to right after it was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one rank sees in one step. Fixed shapes, always full: every sample id occurs once."""

    query: View
    key: View
    mosaic: Float[Tensor, "M 3 C C"] | None
    """Four views on each canvas, UL UR LL LR, in batch order (see `inscon.mosaic`); None where no head wants it."""
    sample_ids: Int[Tensor, "B"]
    """int64 positions in the data set's index, on the CPU."""

    @property
    def size(self) -> int:
        """B, the number of source images."""
        return self.query.pixels.shape[0]
