"""The head of the C4 models: detectron2's res5 head with one more norm, which detectron2 itself does not have."""

from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """Regions through res5, then a norm of MODEL.RESNETS.NORM, for res5 ends in a sum of unknown scale; then boxes and masks."""

    @classmethod
    def from_config(cls, cfg, input_shape):
        parts = super().from_config(cfg, input_shape)
        res5 = parts["res5"]
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, res5[-1].out_channels))
        return parts
