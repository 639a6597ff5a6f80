"""Four views on one canvas, upper left, upper right, lower left, lower right; and the order back (METHOD, readings 1, 2).

`tile="full"`: `[B 3 S S]` views become `[B/4 3 2S 2S]` canvases, images 4m..4m+3 on canvas m. `tile="half"`: every view is
halved first and lies on four canvases `[B 3 S S]`, once in each corner: canvas 4g+r carries images 4g + (t + r) mod 4,
t = 0..3. Both stay inside groups of four neighbors, so the split of a batch over ranks changes no mosaic. Same FLOPs.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

TILES_PER_CANVAS = 4


def assemble(tiles: Float[Tensor, "B F S S"], tile: str = "full") -> Float[Tensor, "M F C C"]:
    """Lay `tiles` on 2x2 canvases, channels-last. `tile` is "full" or "half" (see the module).

    Raises ValueError if B is not a multiple of 4, or if `tile="half"` meets an odd side.
    """
    count, channels, side, _ = tiles.shape
    if count % TILES_PER_CANVAS:
        raise ValueError(f"a mosaic takes 4 images, so the batch per rank must be a multiple of 4. Found: {count}")
    if tile == "half":
        if side % 2:
            raise ValueError(f"half tiles need an even view size. Found: {side} px")
        tiles = F.avg_pool2d(tiles, 2)[image_order(count, tile, device=tiles.device).flatten()]
        count, side = tiles.shape[0], side // 2
    elif tile != "full":
        raise ValueError(f'tile must be "full" or "half". Found: "{tile}"')
    grid = tiles.permute(0, 2, 3, 1).reshape(count // TILES_PER_CANVAS, 2, 2, side, side, channels)
    canvas = grid.permute(0, 1, 3, 2, 4, 5).reshape(count // TILES_PER_CANVAS, 2 * side, 2 * side, channels)
    return canvas.permute(0, 3, 1, 2)


def image_order(batch_size: int, tile: str = "full", device: torch.device | str = "cpu") -> Int[Tensor, "M 4"]:
    """Which image of the batch lies on which tile: `[M 4]` int64, tiles in the order UL UR LL LR."""
    groups = torch.arange(batch_size, device=device).view(-1, TILES_PER_CANVAS)
    if tile == "full":
        return groups
    turns = torch.arange(TILES_PER_CANVAS, device=device)
    rotated = (turns[:, None] + turns[None, :]) % TILES_PER_CANVAS
    return groups[:, rotated].view(-1, TILES_PER_CANVAS)


def tile_features(feature_map: Float[Tensor, "M F h w"]) -> Float[Tensor, "M 4 F"]:
    """Pool the trunk's map of each canvas into one feature per tile, in the order of `image_order`.

    The adaptive average pool 2x2 of paper section 3.2 (multi-instance head); on an even map its windows meet exactly at the seams.
    """
    return F.adaptive_avg_pool2d(feature_map, 2).flatten(2).transpose(1, 2)
