"""As mask_rcnn_r50_fpn_1x.py, for 24 epochs."""

_base_ = "./mask_rcnn_r50_fpn_1x.py"

train_cfg = {"max_epochs": 24}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 1000},
    {"type": "MultiStepLR", "by_epoch": True, "begin": 0, "end": 24, "milestones": [16, 22], "gamma": 0.1},
]
