"""Attention maps: strong where the trunk's map is, whatever the channel."""

import pytest
import torch
from torch import nn

from inscon.encoder import Trunk
from inscon.transfer.attention import attention, heat


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


def test_colours_run_from_black_to_white():
    assert heat(torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0]])).tolist()[0] == [
        [0, 0, 0], pytest.approx([1, 0, 0]), pytest.approx([1, 1, 0]), pytest.approx([1, 1, 1])
    ]  # fmt: skip
