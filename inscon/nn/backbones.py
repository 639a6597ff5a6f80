"""Networks that give feature maps: torchvision's ResNets, and timm's that offer intermediate ones.

    backbone = build_backbone("resnet50")          # also resnext50_32x4d, wide_resnet50_2, convnext_tiny, vit_small_patch16_224
    maps = backbone(pixels)                        # {4: [N 256 h w], 8: ..., 16: ..., 32: [N 2048 h w]}

Strides and channels are asked of the network. Below `network` tensors have the names that the library's own network loads.
"""

import functools

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from inscon.nn.norm import split_batch_norm
from inscon.nn.pooling import places

TORCHVISION = torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
LEAST_STRIDE = 4
OLDEST_TIMM = (1, 0, 22)
"""Earlier ones give other maps of some networks, or none on the meta device."""


class Backbone(nn.Module):
    """A network without its classifier, and the maps that it gives."""

    network: nn.Module
    channels: dict[int, int]
    """Stride of a map, px of the input -> its channels, in ascending order; the last one is what gets pooled."""

    @property
    def last(self) -> int:
        """Stride of the last map."""
        return max(self.channels)

    @property
    def has_batch_norm(self) -> bool:
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.modules())

    def forward(self, pixels: Float[Tensor, "N 3 H W"]) -> dict[int, Tensor]:
        """[N F h w] by stride."""
        raise NotImplementedError

    def pooled(self, maps: dict[int, Tensor], stride: int | None = None) -> Float[Tensor, "N F"]:
        """The mean of the last map, or of that of `stride`."""
        return places(maps[stride or self.last]).mean(1)


class _TorchvisionResNet(Backbone):
    def __init__(self, name: str):
        super().__init__()
        self.network = torchvision.models.get_model(name, weights=None)
        features = self.network.fc.in_features
        self.network.fc = nn.Identity()
        self.channels = {32 >> i: features >> i for i in (3, 2, 1, 0)}

    def forward(self, pixels):
        net, maps = self.network, {}
        x = net.maxpool(net.relu(net.bn1(net.conv1(pixels))))
        for stride, layer in zip(self.channels, (net.layer1, net.layer2, net.layer3, net.layer4), strict=True):
            maps[stride] = x = layer(x)
        return maps


class _TimmNetwork(Backbone):
    def __init__(self, name: str):
        super().__init__()
        self.network = _create(name)
        strides = [info["reduction"] for info in self.network.feature_info]
        last = {stride: place for place, stride in enumerate(strides) if stride >= LEAST_STRIDE}
        self.channels = {stride: self.network.feature_info[place]["num_chs"] for stride, place in sorted(last.items())}
        self._indices = [last[stride] for stride in self.channels]

    def forward(self, pixels):
        maps = self.network.forward_intermediates(pixels, indices=self._indices, norm=True, intermediates_only=True)
        return dict(zip(self.channels, maps, strict=True))


def _create(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        found = f"the backbone {name} is none of torchvision's ({', '.join(TORCHVISION)}), and timm is not installed"
        raise ValueError(f"{found}: pip install timm") from None
    if tuple(map(int, timm.__version__.split(".")[:3])) < OLDEST_TIMM:
        raise ValueError(f"timm {timm.__version__} is too old for the backbone {name}: pip install -U timm")
    if not timm.is_model(name):
        raise ValueError(f"there is no backbone {name}; set --backbone to a name of torchvision's ResNets or of timm's")
    try:
        # Views and mosaics have sizes of their own, which a ViT takes if it is told.
        network = timm.create_model(name, num_classes=0, dynamic_img_size=True)
    except TypeError:
        network = timm.create_model(name, num_classes=0)
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "feature_info"):
        raise ValueError(f"timm's {name} gives no feature maps; set --backbone to another one, resnet50, say")
    return network


def build_backbone(name: str, norm_groups: int = 1) -> Backbone:
    """The network, its weights drawn from PyTorch's generator. `norm_groups`: BatchNorm is taken over so many parts of a batch.
    ValueError for a name that nobody knows, a library that is missing, or a network whose BatchNorm cannot be split."""
    backbone = _TorchvisionResNet(name) if name in TORCHVISION else _TimmNetwork(name)
    if norm_groups > 1:
        split_batch_norm(backbone, norm_groups, name)
    return backbone


@functools.lru_cache
def facts_of(name: str) -> Backbone:
    """The network on the meta device, without memory, to be asked what it has. ValueError as `build_backbone`."""
    with torch.device("meta"):
        return build_backbone(name)


def check_side(name: str, side: int, remedy: str = "set --view-size to another one, or take another backbone") -> None:
    """ValueError unless the network takes pictures of `side` x `side` px: some of timm's take one size alone."""
    if name in TORCHVISION:
        return
    try:
        facts_of(name)(torch.empty(2, 3, side, side, device="meta"))
    except (AssertionError, RuntimeError) as error:
        found = f"{side} px ({str(error).strip()})"
        raise ValueError(f"the backbone {name} takes no pictures of this size. Found: {found}; {remedy}") from None
