"""A sheet of whatever views a method asks for."""

import dataclasses

import pytest
import torch

from data_prep.index import DatasetIndex
from inscon.config import LoaderConfig, ViewConfig
from inscon.plan import Grid, Mosaics, ViewSpec
from pipelines import open_pipeline
from pipelines.feed import Feed
from scripts.show_views import colors, draw, draw_cells, to_image
from tests.packed import Sample, write_set
from tests.pipelines.conftest import as_jpeg, draw_picture

VIEWS = ViewConfig(view_size=64, overlap_min_side=8.0)


def sheet_of(specs, mosaics, tmp_path, images=2):
    samples = [Sample(as_jpeg(draw_picture(i, 90, 120)), 90, 120, 0, f"a/{i}.jpg") for i in range(4)]
    write_set(tmp_path / "shards", samples)
    feed = Feed(DatasetIndex.open(tmp_path / "shards"), specs, mosaics, batch_size=4, seed=0)
    with open_pipeline(feed, LoaderConfig(pipeline="reference", threads=0), total_steps=1) as loader:
        return draw(next(iter(loader)), feed.index, images)


@pytest.mark.parametrize("count", [1, 3])
def test_views_jigsaws_overlaps_and_mosaics_have_their_places(tmp_path, count):
    """Of sides 64, 64, 32 px, enlarged to 192, two by two where they overlap; nine patches of 32 px in a row; a mosaic."""
    small = dataclasses.replace(VIEWS.spec("small", VIEWS.overlap("query")), size=32)
    jigsaw = ViewSpec(name="jigsaw", size=96, grid=Grid(cells=3, patch=32))
    specs = VIEWS.spec("query"), VIEWS.spec("key", VIEWS.overlap("query")), small, jigsaw
    sheet = sheet_of(specs, Mosaics(view="query"), tmp_path, images=count)
    assert sheet.size == (2 * 192 + 8 + 4 * (192 + 8) + 9 * 32 + 8 * 8, count * (192 + 8) + 256)
    for number, frame in enumerate(
        (*colors(4)[:2], colors(4)[0], *colors(4)[2:])
    ):  # query twice: once with each partner
        assert sheet.getpixel((2 * 192 + 8 + number * 200, 0)) == frame


def test_a_method_without_overlaps_is_drawn_too(tmp_path):
    assert sheet_of((VIEWS.spec("one"), VIEWS.spec("two")), None, tmp_path).size == (2 * 192 + 2 * 200, 2 * 192 + 8)


def test_a_flipped_views_cells_run_backwards():
    plain, flipped = (to_image(torch.zeros(3, 90, 90), least_side=90) for _ in range(2))
    draw_cells(plain, [0.0, 0.0, 90.0, 90.0], flipped=False)
    draw_cells(flipped, [0.0, 0.0, 90.0, 90.0], flipped=True)
    first, third = colors(9)[0], colors(9)[2]
    assert (plain.getpixel((0, 5)), plain.getpixel((60, 5))) == (first, third)
    assert (flipped.getpixel((0, 5)), flipped.getpixel((60, 5))) == (third, first)
