"""Attention maps: strong where the backbone's map is, whatever the channel."""

import numpy as np
import pytest
import torch
from PIL import Image

from inscon.nn.backbones import Backbone, build_backbone
from scripts.attention_maps import AttentionConfig, attention, main, overlaid, picture_of
from tests.inscon.test_export import BACKBONES, make_run


class Fixed(Backbone):
    """Gives a map of its own instead of a network's."""

    channels = {32: 4}  # noqa: RUF012

    def __init__(self, given):
        super().__init__()
        self.given = given

    def forward(self, _pixels):
        return {32: self.given}


def test_strength_is_the_sum_of_squares():
    given = torch.zeros(1, 4, 3, 5)
    given[0, 1, 2, 3], given[0, 3, 0, 0] = -4.0, 2.0
    made = attention(Fixed(given).eval(), Image.new("RGB", (160, 96)))
    assert made.shape == (3, 5) and (made[2, 3], made[0, 0], made.sum()) == (1, 4 / 16, 1 + 4 / 16)


def test_a_flat_map_shows_nothing():
    made = attention(Fixed(torch.full((1, 4, 2, 2), 3.0)).eval(), Image.new("RGB", (64, 64)))
    assert made.shape == (2, 2) and not made.any()


def test_what_a_backbone_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"takes no picture of .64, 64. px .*; set another --side"):
        attention(build_backbone("pit_ti_224").eval(), Image.new("RGB", (64, 64)))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_command_shows_any_backbone_before_and_after_training(name, tmp_path):
    run = make_run(tmp_path / "run", name)
    Image.effect_noise((96, 64), 90).convert("RGB").save(tmp_path / "a.png")
    asked = {"runs": (str(run), "random"), "pictures": (tmp_path / "a.png",), "out": tmp_path / "sheet.png", "side": 64}
    with Image.open(main(AttentionConfig(**asked))) as sheet:
        _, trained, untrained = (np.asarray(sheet)[30:90, 104 * i : 104 * i + 96].astype(int) for i in range(3))
    assert trained.std() > 10 and abs(trained - untrained).mean() > (1 if name == "resnet18" else -1)


def test_the_sheet_is_bright_where_the_map_is():
    given = torch.zeros(1, 4, 2, 3)
    given[0, 2, 1, 2] = 7.0
    drawn = np.asarray(overlaid(Image.new("RGB", (96, 64), (90, 90, 90)), Fixed(given).eval()))
    assert drawn.shape == (64, 96, 3) and drawn[63, 95].min() > 170 and drawn[:32, :64].max() < 120


def test_pictures_are_read_as_packing_reads_them(tmp_path):
    """16 bits scaled, not clipped to white; turned as EXIF says; a decompression bomb is a sentence."""
    levels = np.linspace(0, 65_535, 128 * 64).reshape(64, 128).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    deep = np.asarray(picture_of(tmp_path / "deep.png", 64))
    assert deep.shape == (64, 128, 3) and deep[0].max() < 8 and deep[-1].min() > 247
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (128, 64)).save(tmp_path / "turned.jpg", exif=exif)
    assert picture_of(tmp_path / "turned.jpg", 64).size == (64, 128)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for name, reason in (("bomb.png", "too large"), ("missing.png", "No such file")):
        with pytest.raises(ValueError, match=f"{reason}.*give image files to --pictures"):
            picture_of(tmp_path / name, 64)
