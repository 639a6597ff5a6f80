"""Memory of batches: where views lie, and when it is used again."""

import gc

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")

from inscon.config import ViewConfig
from inscon.mosaic import assemble
from inscon.plan import plan_views
from pipelines.color import normalization, normalize
from pipelines.kernels import render_into, render_views
from pipelines.slots import Slots

SIDE, BATCH = 32, 8


def slots(**changes) -> Slots:
    settings = {"kept": (0, 1), "tiles": 0, "normalized": True, "color": True, **changes}
    return Slots(batch_size=BATCH, view_size=SIDE, views=3, **settings)


def fill(slot) -> list[torch.Tensor]:
    """Render three views of eight pictures of noise into `slot`; the same views as uint8, made apart."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (50 + i, 60 - i, 3)).astype(np.uint8) for i in range(BATCH)]
    sizes = np.array([picture.shape[:2] for picture in pictures])
    plans = plan_views(0, 0, np.arange(BATCH), sizes, ViewConfig(view_size=SIDE, tiles_from="third"))
    rows = np.stack([plans.query.rows(), plans.key.rows(), plans.tile.rows()], 1)
    plain = np.empty((BATCH, 3, SIDE, SIDE, 3), np.uint8)
    for i, picture in enumerate(pictures):
        render_views(picture, rows[i], plain[i], bool(slot.places[0, 1]))
        render_into(picture, rows[i], slot.places[i], *normalization(SIDE))
    return list(torch.from_numpy(plain).unbind(1))


@pytest.mark.parametrize("tiles", [0, 1, 2])
def test_views_and_mosaics_are_where_they_belong(tiles):
    slot = slots(tiles=tiles).take()
    plain = fill(slot)
    (query, key), mosaic = slot.hand_out()
    assert torch.equal(query.permute(0, 3, 1, 2), normalize(plain[0], torch.float32))
    assert torch.equal(key.permute(0, 3, 1, 2), normalize(plain[1], torch.float32))
    assert torch.equal(mosaic.permute(0, 3, 1, 2), assemble(normalize(plain[tiles], torch.float32)))


def test_levels_stay_levels_and_color_can_wait():
    slot = slots(kept=(0, 1, 2), tiles=None, normalized=False, color=False).take()
    plain = fill(slot)
    views, mosaic = slot.tensors(slot.memory)
    assert mosaic is None and all(torch.equal(made, wanted) for made, wanted in zip(views, plain, strict=True))


def test_addresses_are_aligned():
    places = slots().take().places
    assert (places[:, 4:] % 64 == 0).all() and (places[:, 8:] == 0).all() and (places[:, [4, 5, 6]] > 0).all()


def test_a_slot_is_used_again_when_the_last_tensor_of_it_is_gone():
    pool = slots()
    first = pool.take()
    views, mosaic = first.hand_out()
    piece = views[0][3, 2:4]
    del views, mosaic
    gc.collect()
    second = pool.take()
    assert second is not first and pool.allocated == 2  # a piece of it is still read
    del piece
    assert pool.take() is first and pool.allocated == 2
    pool.give_back(second)
    assert pool.take() is second
