"""Attention maps: strong where the trunk's map is, whatever the channel."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from inscon.encoder import Trunk
from inscon.transfer.attention import attention, heat
from scripts.attention_maps import picture_of


class Fixed(nn.Module):
    """Gives a map of its own instead of a trunk's."""

    def __init__(self, given):
        super().__init__()
        self.given = given

    def forward(self, _pixels):
        return {"res5": self.given}


def test_strength_is_the_sum_of_squares():
    given = torch.zeros(1, 4, 3, 5)
    given[0, 1, 2, 3], given[0, 3, 0, 0] = -4.0, 2.0
    made = attention(Fixed(given).eval(), torch.zeros(1, 3, 96, 160))[0]
    assert made.shape == (96, 160) and made.min() == 0 and made.max() == 1
    assert made[80, 112].item() == pytest.approx(1) and divmod(int(made.argmax()), 160)[0] in range(64, 96)
    assert made[8, 8].item() == pytest.approx(4 / 16, rel=0.03) and made[40, 80] < 1e-6


def test_a_flat_map_shows_nothing():
    made = attention(Fixed(torch.full((2, 4, 2, 2), 3.0)).eval(), torch.zeros(2, 3, 64, 64))
    assert made.shape == (2, 64, 64) and not made.any()


def test_a_trunk_in_training_is_refused():
    with pytest.raises(ValueError, match="with the trunk in eval mode.*Found: train mode"):
        attention(Trunk("resnet18").train(), torch.zeros(1, 3, 64, 64))


def test_colors_run_from_black_to_white():
    assert heat(torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0]])).tolist()[0] == [
        [0, 0, 0], pytest.approx([1, 0, 0]), pytest.approx([1, 1, 0]), pytest.approx([1, 1, 1])
    ]  # fmt: skip


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
    for name, reason in (("bomb.png", "too large"), ("missing.png", "there is no picture")):
        with pytest.raises(ValueError, match=f"{reason}.*give image files to --pictures"):
            picture_of(tmp_path / name, 64)
