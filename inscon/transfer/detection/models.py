"""torchvision's `maskrcnn_resnet50_fpn_v2` around any backbone of four maps, and the same without masks. Every BatchNorm learns."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn_v2, maskrcnn_resnet50_fpn_v2
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from inscon import guard
from inscon.nn.backbones import TORCHVISION, Backbone, build_backbone, check_side, facts_of
from inscon.transfer.export import any_backbone, digest

ARCHES = {"maskrcnn-fpn": maskrcnn_resnet50_fpn_v2, "fasterrcnn-fpn": fasterrcnn_resnet50_fpn_v2}
STRIDES = (4, 8, 16, 32)  # Of the maps that a pyramid stands on, px.


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a fine-tuning depends on, beside detector, weights and data."""

    iterations: int = 90_000  # The rate falls to a tenth at 2/3 and 8/9 of them. 90000 on COCO is the 1x schedule.
    batch_size: int = 16  # Images per iteration.
    base_lr: float = 0.02  # For 16 images; what is used is this times batch_size / 16.
    warmup: int = 1000  # Iterations of linear warm-up, at most a tenth of all.
    min_size: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    """Short sides in training, px; one is drawn for every image. The last one is that of evaluation."""
    max_size: int = 1333  # Longest side, px.
    rois: int = 512  # Boxes an image to learn from is sampled for; fewer make trials on a CPU bearable.
    proposals: int = 1000  # Of an image that is judged; fewer as well.
    seed: int = 0  # Of the heads, the order, flips, sizes and sampled boxes.
    frozen: bool = False  # The backbone stays as it is, statistics too: the rest learns on top of it.

    def __post_init__(self):
        guard.check_ranges(
            self, iterations=1, batch_size=1, base_lr=1e-9, min_size=32, max_size=32, rois=4, proposals=1, seed=0
        )


@dataclass(frozen=True, kw_only=True)
class Design(Protocol):
    """All that a detector is built from, and how it learns."""

    arch: str
    backbone: str
    weights: str  # What the backbone began as.
    categories: dict[int, str]
    train_data: str  # checksum of its json

    def __post_init__(self):
        super().__post_init__()
        strides, remedy = tuple(facts_of(self.backbone).channels), "give another --backbone, or --weights of one"
        if strides != STRIDES:
            raise ValueError(f"a detector needs maps of strides {STRIDES}. Found: {strides}; {remedy}")
        check_side(self.backbone, 96, remedy)  # pictures have many sizes

    @property
    def has_masks(self) -> bool:
        return self.arch.startswith("maskrcnn")


def build(design: Design, backbone: Backbone | None = None, device: torch.device | str = "cpu") -> FasterRCNN:
    """The detector around a backbone; None: around one of noise. In train mode it takes images [3 H W] in 0..1 and targets of
    `CocoSet.target` and returns losses by name; in eval mode, per image, `boxes` [n 4] in px of the image given, `labels` [n],
    `scores` [n] and maybe `masks` [n 1 H W] in 0..1."""
    model = ARCHES[design.arch](
        weights=None, weights_backbone=None, num_classes=len(design.categories) + 1, min_size=design.min_size,
        max_size=design.max_size, rpn_post_nms_top_n_test=design.proposals, box_batch_size_per_image=design.rois,
    )  # fmt: skip
    body = (backbone or build_backbone(design.backbone)).requires_grad_(not design.frozen)
    fpn = FeaturePyramidNetwork(list(body.channels.values()), 256, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)
    model.backbone = nn.Sequential(OrderedDict(body=body, fpn=fpn))
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool)[: 1 + design.has_masks]:
        pool.featmap_names = STRIDES  # by which our backbones name their maps
    # Anchors and RoIs take the type of the maps, and box deltas that of the head: in bfloat16 a box at 900 px would move by 4.
    for part in (model.backbone, model.rpn.head, model.roi_heads.box_predictor, model.roi_heads.mask_predictor):
        if part is not None:
            part.register_forward_hook(lambda module, given, made: tree_map(Tensor.float, made))
    return model.to(device=device, memory_format=torch.channels_last)


def read_start(source: str, name: str | None = None) -> tuple[Backbone, str, str]:
    """The backbone a detector starts from, its name, and in words what it is, with a checksum. `source`: a run, a checkpoint or an
    export, "torchvision" or "random". `name`: what it must be; None: what the file holds, else resnet50. ValueError for others."""
    if source == "random":
        return build_backbone(name or "resnet50"), name or "resnet50", "noise"
    if source == "torchvision":
        name, what = name or "resnet50", "torchvision's supervised weights"
        if name not in TORCHVISION:
            raise ValueError(f"torchvision has no {name}; set --backbone to one of {', '.join(TORCHVISION)}")
        backbone = build_backbone(name)
        backbone.network = torchvision.models.get_model(name, weights="IMAGENET1K_V1")
        backbone.network.fc = nn.Identity()
    else:
        backbone, facts = any_backbone(Path(source))
        asked, name = name, facts["config"]["model"]["backbone"]
        if asked not in (None, name):
            raise ValueError(f"{source} holds a {name}. Found: --backbone {asked}; leave it out")
        what = f"the backbone of step {facts['step']}"
    state = backbone.network.state_dict()
    return backbone, name, f"{what}, {len(state)} tensors of {name}, checksum {digest(state)}"
