"""Mask R-CNN with FPN, and Faster and Mask R-CNN in the C4 design, around a ResNet whose BatchNorms all learn.

Built of torchvision's parts. `maskrcnn-fpn` is its `maskrcnn_resnet50_fpn_v2`, tensor for tensor, for any ResNet. The C4 pair
follows the transfer protocol of MoCo: RPN and RoIs on res4, res5 as the box head with one more BatchNorm after it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from inscon.transfer.detection.coco import Categories
from inscon.transfer.detection.res5 import Res4, Res4Align, Res5, Res5Masks, Res5RoIHeads

ARCHES = ("maskrcnn-fpn", "fasterrcnn-c4", "maskrcnn-c4")
TRUNKS = ("resnet18", "resnet34", "resnet50", "resnet101")
SIZES, RATIOS = (32, 64, 128, 256, 512), (0.5, 1.0, 2.0)
"""Of the anchors, px of the resized image; heights by widths."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB in 0..1, as in pre-training."""
FPN_STAGES = {f"layer{stage}": str(stage - 1) for stage in range(1, 5)}


@dataclass(frozen=True, kw_only=True)
class Design:
    """All that is needed to build a detector."""

    arch: str
    trunk: str
    categories: Categories
    test_side: int = 800
    """Short side of an image that is judged, px."""
    max_side: int = 1333
    """Long side of any image, px."""
    rois: int = 512
    """Sampled from an image to learn from; at most a quarter of them are objects."""
    proposals: int = 1000
    """Of an image that is judged; each goes through the box head."""

    def __post_init__(self):
        for name, value, known in (("arch", self.arch, ARCHES), ("trunk", self.trunk, TRUNKS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}. Found: {value}; set --{name} {known[0]}")
        for name in ("rois", "proposals", "test_side", "max_side"):
            if getattr(self, name) < 4:
                raise ValueError(f"{name} must be at least 4. Found: {getattr(self, name)}")

    @property
    def has_masks(self) -> bool:
        return self.arch.startswith("maskrcnn")

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, held: Mapping) -> "Design":
        categories = Categories(tuple(held["categories"]["ids"]), tuple(held["categories"]["names"]))
        return cls(**{**held, "categories": categories})


def build(design: Design) -> GeneralizedRCNN:
    """The detector with a trunk of noise; `weights.start_from` puts one in.

    In train mode it takes images [3 H W] in 0..1 and targets as in `batches.Batch` and returns losses by name; in eval mode it
    returns, per image, `boxes` [n 4] in px of the image given, `labels` [n], `scores` [n] and maybe `masks` [n 1 H W] in 0..1.
    """
    make = _fpn if design.arch == "maskrcnn-fpn" else _c4
    model = make(design)
    model.transform = Resizing(design.test_side, design.max_side, list(MEAN), list(STD))
    # Anchors and RoIs take the type of the maps, and box deltas that of the head: in bfloat16 a box at 900 px would move by 4.
    predictors = [model.backbone, model.rpn.head, model.roi_heads.box_predictor]
    for part in predictors + ([model.roi_heads.mask_predictor] if design.has_masks else []):
        part.register_forward_hook(_in_float32)
    return model


def trunk_of(model: GeneralizedRCNN) -> nn.Module:
    """The ResNet inside a detector, under torchvision's names: its state dict has the names of an exported trunk."""
    if isinstance(model.backbone, Res4):
        return nn.ModuleDict({**dict(model.backbone.named_children()), "layer4": model.roi_heads.box_head.layer4})
    return model.backbone.body


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


def _fpn(design: Design) -> MaskRCNN:
    resnet = get_model(design.trunk, weights=None)
    width = resnet.fc.in_features // 8
    backbone = BackboneWithFPN(
        resnet, FPN_STAGES, [width, 2 * width, 4 * width, 8 * width], 256, norm_layer=nn.BatchNorm2d
    )
    anchors = AnchorGenerator(tuple((size,) for size in SIZES), (RATIOS,) * len(SIZES))
    return MaskRCNN(
        backbone,
        num_classes=len(design.categories) + 1,
        rpn_anchor_generator=anchors,
        rpn_head=RPNHead(256, anchors.num_anchors_per_location()[0], conv_depth=2),
        rpn_post_nms_top_n_test=design.proposals,
        box_batch_size_per_image=design.rois,
        box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d),
        mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d),
    )


def _c4(design: Design) -> GeneralizedRCNN:
    """Numbers as in detectron2's C4: 12000 (test: 6000) candidates, 2000 (1000) proposals, 512 RoIs, a quarter of them objects."""
    resnet, num_classes = get_model(design.trunk, weights=None), len(design.categories) + 1
    backbone, pool = Res4(resnet), Res4Align()
    head = Res5(resnet)
    anchors = AnchorGenerator((SIZES,), (RATIOS,))
    rpn = RegionProposalNetwork(
        anchors, RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7, bg_iou_thresh=0.3, batch_size_per_image=256, positive_fraction=0.5,
        pre_nms_top_n={"training": 12000, "testing": 6000}, post_nms_top_n={"training": 2000, "testing": design.proposals},
        nms_thresh=0.7,
    )  # fmt: skip
    boxes = {
        "fg_iou_thresh": 0.5, "bg_iou_thresh": 0.5, "batch_size_per_image": design.rois, "positive_fraction": 0.25,
        "bbox_reg_weights": (10.0, 10.0, 5.0, 5.0), "score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 100,
    }  # fmt: skip
    predictor = FastRCNNPredictor(head.out_channels, num_classes)
    if not design.has_masks:
        roi_heads = RoIHeads(pool, head, predictor, **boxes)
    else:
        masks = {
            "mask_roi_pool": Res5Masks(pool, head), "mask_head": nn.Identity(),
            "mask_predictor": MaskRCNNPredictor(head.out_channels, 256, num_classes),
        }  # fmt: skip
        roi_heads = Res5RoIHeads(pool, head, predictor, **boxes, **masks)
    return GeneralizedRCNN(backbone, rpn, roi_heads, nn.Identity())


def _in_float32(module: nn.Module, given, made):
    if isinstance(made, Tensor):
        return made.float()
    if isinstance(made, Mapping):
        return type(made)((name, value.float()) for name, value in made.items())
    return type(made)(_in_float32(module, given, value) for value in made)
