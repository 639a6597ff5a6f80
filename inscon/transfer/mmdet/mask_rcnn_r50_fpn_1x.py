"""Mask R-CNN with FPN on COCO, 12 epochs, for mmdet 3: a backbone of scripts/export.py --format mmdet, all of it trained.

    python tools/train.py mask_rcnn_r50_fpn_1x.py --cfg-options model.backbone.init_cfg.checkpoint=r50.pth

tools/train.py is mmdet's. Two images on each of 8 GPUs; with other numbers the learning rate follows. The 2x schedule: add
`train_cfg.max_epochs=24 param_scheduler.1.end=24 "param_scheduler.1.milestones=[16,22]"`.
"""

_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"  # SGD, learning rate 0.02, 12 epochs

norm = {"type": "SyncBN", "requires_grad": True}
box_head = {"type": "Shared4Conv1FCBBoxHead", "conv_out_channels": 256, "norm_cfg": norm}
model = {
    # mean and std are those of red, green, blue; mmdet reads blue first, so it turns the pixels around.
    "data_preprocessor": {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "bgr_to_rgb": True},
    "backbone": {
        "style": "pytorch",  # strides in the 3x3
        "frozen_stages": -1,  # mmdet's word for none
        "norm_eval": False,
        "norm_cfg": norm,
        "init_cfg": {"type": "Pretrained", "checkpoint": "r50.pth"},
    },
    "neck": {"norm_cfg": norm},
    "roi_head": {"bbox_head": box_head, "mask_head": {"norm_cfg": norm}},
}

train_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
    {"type": "RandomChoiceResize", "scales": [(1333, side) for side in range(640, 801, 32)], "keep_ratio": True},
    {"type": "RandomFlip", "prob": 0.5},
    {"type": "PackDetInputs"},
]
train_dataloader = {"batch_size": 2, "dataset": {"pipeline": train_pipeline}}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 1000},
    {"type": "MultiStepLR", "by_epoch": True, "begin": 0, "end": 12, "milestones": [8, 11], "gamma": 0.1},
]
auto_scale_lr = {"enable": True, "base_batch_size": 16}
