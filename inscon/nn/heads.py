"""The projection heads: features to embeddings. Outputs are not normalized here."""

import functools

from torch import nn

_pointwise = functools.partial(nn.Conv2d, kernel_size=1)


def instance_head(features: int, embedding_dim: int, mlp: bool, layer=nn.Linear) -> nn.Module:
    """Head on pooled features `[... F]` (MoCo v2; `mlp=False`: MoCo v1): no BatchNorm, biases on."""
    if not mlp:
        return layer(features, embedding_dim)
    return nn.Sequential(layer(features, features), nn.ReLU(), layer(features, embedding_dim))


def jigsaw_head(features: int, embedding_dim: int, mlp: bool, patches: int) -> nn.Module:
    """Head on the pooled patches of each image `[B P F]`: an instance head for all of them, then one linear layer that joins the P
    embeddings into one (PIRL)."""
    each = instance_head(features, embedding_dim, mlp)
    return nn.Sequential(each, nn.Flatten(1), nn.Linear(patches * embedding_dim, embedding_dim))


def map_head(features: int, embedding_dim: int, mlp: bool) -> nn.Module:
    """Head on maps or pooled cells `[B F h w]`: the same with 1x1 convolutions (InsCon, section 3.2)."""
    return instance_head(features, embedding_dim, mlp, _pointwise)


def normed_head(features: int, hidden: int, embedding_dim: int, layer=nn.Linear, norm=nn.BatchNorm1d) -> nn.Module:
    """Head on pooled features `[B F]` with BatchNorm (BYOL), which makes a bias before it idle."""
    return nn.Sequential(layer(features, hidden, bias=False), norm(hidden), nn.ReLU(), layer(hidden, embedding_dim))


def normed_map_head(features: int, hidden: int, embedding_dim: int) -> nn.Module:
    """Head on maps `[B F h w]`: the same with 1x1 convolutions (PixPro)."""
    return normed_head(features, hidden, embedding_dim, _pointwise, nn.BatchNorm2d)
