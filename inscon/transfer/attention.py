"""What a backbone looks at: where its last map is strong (the paper's Fig. 3, whose method the paper doesn't say).

Activation-based attention (Zagoruyko and Komodakis, "Paying more attention to attention", ICLR 2017, F_sum^2): the sum of
squares over the channels of a map. It needs no label, no head and no gradient, so that it is equally fair to every
checkpoint; what it cannot say is which object a strong place belongs to.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from inscon.nn.backbones import Backbone

STAGES = {"res4": 16, "res5": 32}
"""A map's name -> its stride, px."""


@torch.inference_mode()
def attention(
    backbone: Backbone, pixels: Float[Tensor, "B 3 H W"], stride: int | None = None
) -> Float[Tensor, "B H W"]:
    """Strength of the map of `stride` px (None: the last one) at every pixel, 0..1 within each picture; all 0 where it is flat.

    `pixels`: normalized as for training, sides a multiple of 32. ValueError for a backbone in train mode, or one that takes no
    pictures of this size.
    """
    if backbone.training:
        raise ValueError(
            "attention is drawn with the backbone in eval mode, or its statistics would move. Found: train mode"
        )
    try:
        maps = backbone(pixels)
    except (AssertionError, RuntimeError) as error:  # of timm's networks that take one size
        raise ValueError(
            f"the backbone takes no picture of this size. Found: {tuple(pixels.shape[-2:])} px ({error}); set another --side, and "
            "crop the pictures to squares if it takes no others"
        ) from None
    energy = maps[stride or backbone.last].float().square().sum(1, keepdim=True)
    energy = F.interpolate(energy, size=pixels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = energy.amin((1, 2), keepdim=True), energy.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * high.abs()
    return torch.where(flat, 0.0, (energy - low) / torch.where(flat, 1.0, high - low))


def heat(strength: Float[Tensor, "H W"]) -> Float[Tensor, "H W 3"]:
    """Colors 0..1 for 0..1: black, red, yellow, white."""
    return torch.stack([(3 * strength).clamp(0, 1), (3 * strength - 1).clamp(0, 1), (3 * strength - 2).clamp(0, 1)], -1)
