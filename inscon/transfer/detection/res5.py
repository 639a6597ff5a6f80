"""The C4 design's own parts: a ResNet cut between res4 and res5, where the boxes are pooled in between.

C4 and C5 are the channels of res4 and res5 (1024 and 2048 in a ResNet-50), R the RoIs of all images.
"""

import torch
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import roi_align

STRIDE = 16
"""Of res4, px."""
POOLED = 14
"""Side of a RoI's map on res4; res5 halves it."""


class Res4(nn.Module):
    """conv1 to res4, under torchvision's names: [N 3 H W] -> [N C4 H/16 W/16]."""

    def __init__(self, resnet: ResNet):
        super().__init__()
        for name, child in resnet.named_children():
            if name not in ("layer4", "avgpool", "fc"):
                self.add_module(name, child)
        self.out_channels = resnet.layer4[0].conv1.in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer3(self.layer2(self.layer1(x)))


class Res4Align(nn.Module):
    """RoIAlign on res4: boxes in px of the resized image, a list of [n 4] -> [R C4 14 14]."""

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        return roi_align(features["0"], boxes, POOLED, spatial_scale=1 / STRIDE, sampling_ratio=0, aligned=True)


class Res5(nn.Module):
    """The box head: res5, one more BatchNorm, the mean. [R C4 14 14] -> [R C5]."""

    def __init__(self, resnet: ResNet):
        super().__init__()
        self.out_channels = resnet.fc.in_features
        self.layer4 = resnet.layer4
        self.norm = nn.BatchNorm2d(self.out_channels)
        self.made: Tensor | None = None
        """While `keeps`: the maps [R C5 7 7] of the last call."""
        self.keeps = False

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        self.made = maps if self.keeps else None
        return maps.mean((2, 3))

    def maps(self, x: Tensor) -> Tensor:
        return self.norm(self.layer4(x))


class Res5Masks(nn.Module):
    """res5's maps [n C5 7 7] of the RoIs that get a mask, by the box head's own weights.

    In training they are those of the box head's pass, chosen: a second pass over objects alone would have other BatchNorm
    statistics and mix them into the running ones. Judged are the boxes that were found, which need a pass of their own.
    """

    def __init__(self, pool: Res4Align, head: Res5):
        super().__init__()
        self.pool = pool
        self._head = (head,)  # in a tuple: its tensors are the box head's and are listed there
        self.chosen: Tensor | None = None
        """[R] bool: which of the sampled RoIs are objects, in training."""

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list) -> Tensor:
        (head,) = self._head
        if not self.training:
            return head.maps(self.pool(features, boxes, image_shapes))
        maps, head.made = head.made[self.chosen], None
        return maps


class Res5RoIHeads(RoIHeads):
    """torchvision's, telling the mask branch which RoIs are objects, and the box head to keep its maps for them."""

    def forward(self, features, proposals, image_shapes, targets=None):
        self.box_head.keeps = self.training
        return super().forward(features, proposals, image_shapes, targets)

    def select_training_samples(self, proposals, targets):
        proposals, matched, labels, regression = super().select_training_samples(proposals, targets)
        self.mask_roi_pool.chosen = torch.cat(labels) > 0
        return proposals, matched, labels, regression
