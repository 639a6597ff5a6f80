"""Precise RoI pooling (Jiang et al., IoUNet, ECCV 2018) for one box per image, exact, as two matrix products; for many boxes per
image and one bin each, as one.

The pooled value of a bin is the integral of the map's bilinear interpolant over it, divided by its area. With one box per image
that separates: `out = Wy F Wx^T / (bin height * bin width)`, where `Wy [G H]` and `Wx [G W]` hold the integrals of each feature's
hat function over each bin. So it needs no kernel, keeps channels-last, and autograd is exact for features and coordinates.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def precise_roi_pool(
    features: Float[Tensor, "B F h w"], boxes: Float[Tensor, "B 4"], output_size: int, spatial_scale: float,
    offset: float = 0.0, border: str = "zero",
) -> Float[Tensor, "B F G G"]:  # fmt: skip
    """Pool one box of each map into `output_size` x `output_size` cells.

    Args:
        features: the maps, any float type, any memory format (channels-last stays).
        boxes: x0 y0 x1 y1 in px of the map's input, float32 or float64; never less: bfloat16 boxes lose whole pixels.
        output_size: G, cells per side.
        spatial_scale: features per px, 1/stride.
        offset: feature j sits at x = j + offset after scaling; 0 is the published op (METHOD 8).
        border: "zero", the published op: 0 outside the map, the divisor is the bin's full area; "normalize": the covered weight.

    Empty boxes give 0 with zero gradient. ValueError for an unknown border.
    """
    if border not in ("zero", "normalize"):
        raise ValueError(f'border must be "zero" or "normalize". Found: "{border}"')
    wy, wx = _weights(features, boxes, output_size, spatial_scale, offset, border)
    rows = features.permute(0, 2, 3, 1)  # channels-last memory: a view without a copy
    rows = wy.to(features.dtype) @ rows.flatten(2)
    cells = wx.to(features.dtype)[:, None] @ rows.unflatten(2, (features.shape[-1], -1))
    return cells.permute(0, 3, 1, 2)


def pool_windows(
    features: Float[Tensor, "B F h w"], boxes: Float[Tensor, "B n 4"], spatial_scale: float
) -> Float[Tensor, "B n F"]:
    """The mean of each map over each of its n boxes: `precise_roi_pool` into one cell, the published op, as one matrix product."""
    wy, wx = _weights(features, boxes.flatten(0, 1), 1, spatial_scale, 0.0, "zero")
    weights = (wy.transpose(1, 2) * wx).flatten(1).unflatten(0, boxes.shape[:2])
    return weights.to(features.dtype) @ places(features)


def places(maps: Float[Tensor, "B F h w"]) -> Float[Tensor, "B hw F"]:
    """The features of each place, row by row; of a channels-last map, so that the gradient goes back channels last too."""
    return maps.permute(0, 2, 3, 1).flatten(1, 2)


def _weights(features: Tensor, boxes: Tensor, bins: int, spatial_scale: float, offset: float, border: str):
    """Of a map's rows in each bin, [B G h], and of its columns, [B G w]."""
    assert boxes.dtype in (torch.float32, torch.float64), f"{boxes.dtype} loses whole pixels"
    x0, y0, x1, y1 = (boxes * spatial_scale - offset).unbind(1)
    height, width = features.shape[-2:]
    return _hat_integrals(y0, y1, bins, height, border), _hat_integrals(x0, x1, bins, width, border)


def _hat_integrals(start: Tensor, end: Tensor, bins: int, length: int, border: str) -> Float[Tensor, "B G L"]:
    """Mean weight of each of `length` features over each of `bins` equal parts of [start, end]; 0 for empty extents."""
    shares = torch.linspace(0, 1, bins + 1, device=start.device, dtype=start.dtype)
    edges = start[:, None] + (end - start)[:, None] * shares
    distance = edges[:, :, None] - torch.arange(length, device=start.device, dtype=start.dtype)
    integral = _hat_antiderivative(distance).diff(dim=1)
    bin_length = (end - start)[:, None, None] / bins
    divisor = bin_length if border == "zero" else integral.sum(-1, keepdim=True)
    empty = (bin_length <= 0) | (divisor <= 0)
    # A safe divisor inside `where`, so that neither the value nor the gradient of an empty box is ever 0/0.
    return torch.where(empty, 0.0, integral / torch.where(empty, 1.0, divisor))


def _hat_antiderivative(t: Tensor) -> Tensor:
    """Integral of max(0, 1 - |s|) from minus infinity to `t`."""
    u = t.clamp(-1, 1)
    return 0.5 + u - 0.5 * u * u.abs()
