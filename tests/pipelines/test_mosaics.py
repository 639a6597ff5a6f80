"""Four images on a canvas."""

import torch
import torch.nn.functional as F

from inscon.plan import Mosaics
from pipelines.finish import assemble

FULL, HALF = Mosaics(view="query"), Mosaics(view="query", tile="half")


def numbered(batch, side):
    return torch.arange(batch, dtype=torch.float32)[:, None, None, None].expand(batch, 3, side, side).contiguous()


def test_full_tiles_lie_ul_ur_ll_lr():
    tiles = torch.randn(8, 3, 6, 6)
    canvas = assemble(tiles, FULL)
    assert canvas.shape == (2, 3, 12, 12) and canvas.is_contiguous(memory_format=torch.channels_last)
    for m in range(2):
        corners = canvas[m, :, :6, :6], canvas[m, :, :6, 6:], canvas[m, :, 6:, :6], canvas[m, :, 6:, 6:]
        for t, corner in enumerate(corners):
            assert torch.equal(corner, tiles[4 * m + t])


def test_half_tiles_put_every_image_once_in_every_corner():
    canvas, order = assemble(numbered(8, 4), HALF), HALF.order(8)
    assert canvas.shape == (8, 3, 4, 4)
    for m in range(8):
        corners = canvas[m, 0, 0, 0], canvas[m, 0, 0, 3], canvas[m, 0, 3, 0], canvas[m, 0, 3, 3]
        assert [int(c) for c in corners] == order[m].tolist()


def test_half_tiles_are_the_mean_of_two_by_two():
    tiles = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(assemble(tiles, HALF)[0, :, :4, :4], tiles[0].reshape(3, 4, 2, 4, 2).mean((2, 4)))


def test_adaptive_pooling_meets_at_the_seams():
    """What a 14x14 map of a 448 px canvas becomes: the means of its four quadrants, in the order of the tiles."""
    tiles = torch.randn(4, 5, 7, 7)
    pooled = F.adaptive_avg_pool2d(assemble(tiles, FULL), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled[0], tiles.mean((2, 3)))
