"""The projection heads: features to embeddings. Outputs are not normalized here."""

from torch import nn


def instance_head(features: int, embedding_dim: int, mlp: bool) -> nn.Module:
    """Head on pooled features `[... F]` (MoCo v2; `mlp=False`: MoCo v1): no BatchNorm, biases on."""
    if not mlp:
        return nn.Linear(features, embedding_dim)
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, embedding_dim))


def jigsaw_head(features: int, embedding_dim: int, mlp: bool, patches: int) -> nn.Module:
    """Head on the pooled patches of each image `[B P F]`: an instance head for all of them, then one linear layer that joins the P
    embeddings into one (PIRL)."""
    each = instance_head(features, embedding_dim, mlp)
    return nn.Sequential(each, nn.Flatten(1), nn.Linear(patches * embedding_dim, embedding_dim))


def map_head(features: int, embedding_dim: int, mlp: bool) -> nn.Module:
    """Head on maps or pooled cells `[B F h w]`: the same with 1x1 convolutions (InsCon, section 3.2)."""
    if not mlp:
        return nn.Conv2d(features, embedding_dim, 1)
    return nn.Sequential(nn.Conv2d(features, features, 1), nn.ReLU(), nn.Conv2d(features, embedding_dim, 1))


def normed_head(features: int, hidden: int, embedding_dim: int) -> nn.Module:
    """Head on pooled features `[B F]` with BatchNorm (BYOL), which makes a bias before it idle."""
    return nn.Sequential(
        nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, embedding_dim)
    )


def normed_map_head(features: int, hidden: int, embedding_dim: int) -> nn.Module:
    """Head on maps `[B F h w]`: the same with 1x1 convolutions (PixPro)."""
    return nn.Sequential(
        nn.Conv2d(features, hidden, 1, bias=False),
        nn.BatchNorm2d(hidden),
        nn.ReLU(),
        nn.Conv2d(hidden, embedding_dim, 1),
    )
