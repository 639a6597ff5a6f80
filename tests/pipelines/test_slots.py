"""Memory of batches: where views lie, and when it is used again."""

import gc

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")

from inscon.plan import Grid, Mosaics, ViewSpec, plan_views
from pipelines.color import normalize
from pipelines.finish import assemble
from pipelines.kernels import render_at, render_view
from pipelines.slots import Slots, huge_pages

BATCH = 8
VIEWS = (
    ViewSpec(name="large", size=48),
    ViewSpec(name="patches", size=66, grid=Grid(cells=2, patch=32)),
    ViewSpec(name="small", size=32),
)


def slots(**changes) -> Slots:
    return Slots(VIEWS, BATCH, **{"tiles": "large", "normalized": True, "color": True, **changes})


def fill(slot) -> dict[str, torch.Tensor]:
    """Render the views of eight pictures of noise into `slot`; the same views as uint8 [B P S S 3], made apart."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (50 + i, 60 - i, 3)).astype(np.uint8) for i in range(BATCH)]
    sizes = np.array([picture.shape[:2] for picture in pictures])
    plans = plan_views(0, 0, np.arange(BATCH), sizes, VIEWS).views
    plain = {spec.name: np.empty((BATCH, spec.count, spec.side, spec.side, 3), np.uint8) for spec in VIEWS}
    for i, picture in enumerate(pictures):
        rows = np.concatenate([plans[spec.name].rows()[i] for spec in VIEWS])
        made = [view for spec in VIEWS for view in plain[spec.name][i]]
        for row, view in zip(rows, made, strict=True):
            render_view(picture, row, view, bool(slot.places[0, 0]))
        image, plan, places = (array.ctypes.data for array in (picture, rows, slot.places[i]))
        render_at().ctypes(image, *picture.shape[:2], plan, len(rows), places)
    return {name: torch.from_numpy(views) for name, views in plain.items()}


@pytest.mark.parametrize("tiles", ["large", "small"])
def test_views_and_mosaics_are_where_they_belong(tiles):
    slot = slots(tiles=tiles).take()
    plain = fill(slot)
    views, mosaic = slot.hand_out()
    assert list(views) == ["large", "patches", "small"]
    wanted = {name: normalize(levels.flatten(0, 1), torch.float32) for name, levels in plain.items()}
    for name, view in views.items():
        assert view.shape == plain[name].shape
        assert torch.equal(view.flatten(0, 1).permute(0, 3, 1, 2), wanted[name])
    assert torch.equal(mosaic.permute(0, 3, 1, 2), assemble(wanted[tiles], Mosaics(view=tiles)))


def test_levels_stay_levels_and_color_can_wait():
    slot = slots(tiles=None, normalized=False, color=False).take()
    plain = fill(slot)
    views, mosaic = slot.hand_out()
    assert mosaic is None and all(torch.equal(views[name], plain[name]) for name in plain)


def test_addresses_are_aligned():
    """For each of six rows of the plan: side, address of the view, address of the tile, which only the large view has."""
    places = slots().take().places[:, 3:].reshape(BATCH, 6, 3)
    assert (places[:, :, 1:] % 64 == 0).all() and (places[:, :, 1] > 0).all()
    assert (places[:, 0, 2] > 0).all() and (places[:, 1:, 2] == 0).all()
    assert (places[:, :, 0] == [48, 32, 32, 32, 32, 32]).all()


def test_where_there_are_no_huge_pages_small_ones_do(monkeypatch):
    monkeypatch.setattr("mmap.MADV_HUGEPAGE", 12345)  # the system refuses it, as a kernel without them does
    assert len(huge_pages(10_000)) == 10_000 and huge_pages(1).flags.writeable


def test_a_slot_is_used_again_when_the_last_tensor_of_it_is_gone():
    pool = slots()
    first = pool.take()
    views, mosaic = first.hand_out()
    piece = views["small"][3, 0, 2:4]
    del views, mosaic
    gc.collect()
    second = pool.take()
    assert second is not first  # a piece of it is still read
    del piece
    assert pool.take() is first
    second.hand_out()
    assert pool.take() is second
