"""torchvision's `maskrcnn_resnet50_fpn_v2` around any backbone of four maps, and the same without masks. Every BatchNorm learns."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from inscon.nn.backbones import Backbone, build_backbone, check_side, facts_of
from inscon.transfer.detection.coco import Categories

ARCHES = ("maskrcnn-fpn", "fasterrcnn-fpn")
STRIDES = (4, 8, 16, 32)
"""Of the maps that a pyramid stands on, px."""
SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
"""Of the anchors, px of the resized image; heights by widths."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB in 0..1, as in pre-training."""
LEAST = {"iterations": 1, "batch_size": 1, "warmup": 0, "test_size": 32, "max_size": 32, "rois": 4, "proposals": 4}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a fine-tuning depends on, beside detector, weights and data."""

    iterations: int = 90_000
    """The learning rate falls to a tenth at 2/3 and at 8/9 of them. 90000 on COCO is the 1x schedule."""
    batch_size: int = 16
    """Images per iteration."""
    base_lr: float = 0.02
    """For 16 images; what is used is this times batch_size / 16."""
    warmup: int = 1000
    """Iterations of linear warm-up, at most a tenth of all."""
    min_size: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Short sides in training, px; one is drawn for every image."""
    test_size: int = 800
    """Short side in evaluation, px; --eval-only judges with that of the run."""
    max_size: int = 1333
    """Longest side, px."""
    rois: int = 512
    """Boxes an image to learn from is sampled for; fewer make trials on a CPU bearable."""
    proposals: int = 1000
    """Of an image that is judged; fewer as well."""
    seed: int = 0
    """Of the heads, the order, flips, sizes and sampled boxes."""

    def __post_init__(self):
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}. Found: {getattr(self, name)}")
        if not 0 < self.base_lr < math.inf:
            raise ValueError(f"base_lr must be greater than 0. Found: {self.base_lr}")
        if not self.min_size or min(self.min_size) < 32:
            raise ValueError(f"min_size must be sides of at least 32 px. Found: {self.min_size}")


@dataclass(frozen=True, kw_only=True)
class Design(Protocol):
    """All that a detector is built from, and how it learns."""

    arch: str
    backbone: str
    categories: Categories

    def __post_init__(self):
        super().__post_init__()
        if self.arch not in ARCHES:
            raise ValueError(f"arch must be one of {', '.join(ARCHES)}. Found: {self.arch}")
        strides = tuple(facts_of(self.backbone).channels)
        if strides != STRIDES:
            raise ValueError(
                f"{self.arch} stands on maps of strides {STRIDES} px. Found: {self.backbone} with {strides}; give a "
                "backbone with these four"
            )
        try:
            check_side(self.backbone, 96)
        except ValueError:
            raise ValueError(
                f"a detector sees pictures of many sizes, and {self.backbone} takes one; give another backbone, resnet50 or "
                "convnext_tiny, say"
            ) from None

    @property
    def has_masks(self) -> bool:
        return self.arch.startswith("maskrcnn")


def build(design: Design) -> FasterRCNN:
    """The detector with a backbone of noise; `weights.start_from` puts one into its `backbone.body.network`.

    In train mode it takes images [3 H W] in 0..1 and targets as in `batches.Batch` and returns losses by name; in eval mode it
    returns, per image, `boxes` [n 4] in px of the image given, `labels` [n], `scores` [n] and maybe `masks` [n 1 H W] in 0..1.
    """
    anchors = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * len(SIZES))
    masks = {"mask_head": MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d)} if design.has_masks else {}
    model = (MaskRCNN if design.has_masks else FasterRCNN)(
        Pyramid(build_backbone(design.backbone)), num_classes=len(design.categories) + 1, rpn_anchor_generator=anchors,
        rpn_head=RPNHead(256, anchors.num_anchors_per_location()[0], conv_depth=2),
        rpn_post_nms_top_n_test=design.proposals, box_batch_size_per_image=design.rois,
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d), **masks,
    )  # fmt: skip
    model.transform = Resizing(design.test_size, design.max_size, list(MEAN), list(STD))
    # Anchors and RoIs take the type of the maps, and box deltas that of the head: in bfloat16 a box at 900 px would move by 4.
    for part in (model.backbone, model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        if part is not None:
            part.register_forward_hook(_in_float32)
    return model


class Resizing(GeneralizedRCNNTransform):
    """torchvision's, but for the short side: an image to learn from brings its own (`short_side`), and shrinks smoothly."""

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        before = list(image.shape[-2:])
        side = target["short_side"] if self.training and target is not None else self.min_size[-1]
        scale = min(side / min(before), self.max_size / max(before))
        after = [max(1, round(length * scale)) for length in before]
        image = F.interpolate(image[None], after, mode="bilinear", antialias=True)[0]
        if target is None:
            return image, None
        target["boxes"] = resize_boxes(target["boxes"], before, after)
        if "masks" in target:
            target["masks"] = F.interpolate(target["masks"][None], after, mode="nearest-exact")[0]
        return image, target


class Pyramid(nn.Module):
    """[N 3 H W] -> maps [N 256 h w] of the strides 4 to 64 px, by torchvision's names."""

    out_channels = 256

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.body = backbone
        channels = list(backbone.channels.values())
        self.fpn = FeaturePyramidNetwork(channels, self.out_channels, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(place): made for place, made in enumerate(self.body(x).values())})


def _in_float32(module: nn.Module, given, made):
    if isinstance(made, Tensor):
        return made.float()
    if isinstance(made, Mapping):
        return type(made)((name, value.float()) for name, value in made.items())
    return type(made)(_in_float32(module, given, value) for value in made)
