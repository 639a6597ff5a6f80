"""The projection heads."""

import torch
from torch import nn

from inscon.nn.heads import instance_head, jigsaw_head, map_head


def test_heads_have_mocos_shapes():
    shapes = [tuple(p.shape) for p in instance_head(2048, 128, True).parameters()]
    assert shapes == [(2048, 2048), (2048,), (128, 2048), (128,)]
    assert [tuple(p.shape) for p in instance_head(2048, 128, False).parameters()] == [(128, 2048), (128,)]
    assert [tuple(p.shape) for p in map_head(16, 8, False).parameters()] == [(8, 16, 1, 1), (8,)]


def test_the_map_head_is_the_instance_head_of_each_cell():
    cells, linear = map_head(16, 8, True), instance_head(16, 8, True)
    linear.load_state_dict({k: v.flatten(1) if v.dim() == 4 else v for k, v in cells.state_dict().items()})
    x = torch.randn(2, 16, 3, 3)
    assert cells(x).shape == (2, 8, 3, 3) and isinstance(linear, nn.Sequential)
    torch.testing.assert_close(cells(x), linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_the_jigsaw_head_joins_the_embeddings_of_an_images_patches():
    head, x = jigsaw_head(16, 8, True, 9), torch.randn(2, 9, 16)
    each = torch.stack([torch.cat([head[0](patch) for patch in image]) for image in x])
    torch.testing.assert_close(head(x), each @ head[2].weight.T + head[2].bias)
    assert head(x).shape == (2, 8) and head[2].weight.shape == (8, 72)
