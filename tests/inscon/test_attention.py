"""Attention maps: strong where the backbone's map is, whatever the channel."""

import numpy as np
import pytest
import torch
from PIL import Image

from inscon.nn.backbones import Backbone, build_backbone
from inscon.transfer.attention import attention, heat
from scripts.attention_maps import AttentionConfig, main, picture_of
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
    made = attention(Fixed(given).eval(), torch.zeros(1, 3, 96, 160))[0]
    assert made.shape == (96, 160) and made.min() == 0 and made.max() == 1
    assert made[80, 112].item() == pytest.approx(1) and divmod(int(made.argmax()), 160)[0] in range(64, 96)
    assert made[8, 8].item() == pytest.approx(4 / 16, rel=0.03) and made[40, 80] < 1e-6


def test_a_flat_map_shows_nothing():
    made = attention(Fixed(torch.full((2, 4, 2, 2), 3.0)).eval(), torch.zeros(2, 3, 64, 64))
    assert made.shape == (2, 64, 64) and not made.any()


def test_what_a_backbone_does_not_take_is_refused():
    with pytest.raises(ValueError, match="with the backbone in eval mode.*Found: train mode"):
        attention(build_backbone("resnet18").train(), torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"takes no picture of this size. Found: .64, 64. px .*; set another --side"):
        attention(build_backbone("pit_ti_224").eval(), torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_command_shows_any_backbone_before_and_after_training(name, tmp_path):
    run = make_run(tmp_path / "run", name)
    Image.effect_noise((96, 64), 90).convert("RGB").save(tmp_path / "a.png")
    asked = {"runs": (str(run), "random"), "pictures": (tmp_path / "a.png",), "out": tmp_path / "sheet.png", "side": 64}
    with Image.open(main(AttentionConfig(**asked))) as sheet:
        _, trained, untrained = (np.asarray(sheet)[20:80, 104 * i : 104 * i + 96].astype(int) for i in range(3))
    assert trained.std() > 10 and abs(trained - untrained).mean() > (1 if name == "resnet18" else -1)
    main(AttentionConfig(**asked, stage="res4"))
    if name.startswith("vit"):
        with pytest.raises(ValueError, match=r"run's backbone has no map of stride 32 px. Found: 16; set --stage"):
            main(AttentionConfig(**asked, stage="res5"))


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
