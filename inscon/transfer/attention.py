"""What a trunk looks at: where its last map is strong (the paper's Fig. 3, whose method the paper doesn't say).

Activation-based attention (Zagoruyko and Komodakis, "Paying more attention to attention", ICLR 2017, F_sum^2): the sum of
squares over the channels of res5. It needs no label, no head and no gradient, so that it is equally fair to every
checkpoint; what it cannot say is which object a strong place belongs to.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@torch.inference_mode()
def attention(trunk: nn.Module, pixels: Float[Tensor, "B 3 H W"], stage: str = "res5") -> Float[Tensor, "B H W"]:
    """Strength of `stage` (res4 or res5) at every pixel, bilinearly enlarged, 0..1 within each picture; all 0 where it is flat.

    `trunk`: an `inscon.encoder.Trunk`, or what gives maps as it does, in eval mode (ValueError). `pixels`: normalized as for
    training, sides a multiple of 32.
    """
    if trunk.training:
        raise ValueError(
            "attention is drawn with the trunk in eval mode, or its statistics would move. Found: train mode"
        )
    energy = trunk(pixels)[stage].float().square().sum(1, keepdim=True)
    energy = F.interpolate(energy, size=pixels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = energy.amin((1, 2), keepdim=True), energy.amax((1, 2), keepdim=True)
    flat = high - low <= 1e-6 * high.abs()
    return torch.where(flat, 0.0, (energy - low) / torch.where(flat, 1.0, high - low))


def heat(strength: Float[Tensor, "H W"]) -> Float[Tensor, "H W 3"]:
    """Colors 0..1 for 0..1: black, red, yellow, white."""
    return torch.stack([(3 * strength).clamp(0, 1), (3 * strength - 1).clamp(0, 1), (3 * strength - 2).clamp(0, 1)], -1)
