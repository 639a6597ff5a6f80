"""How fast machines that are not at hand should be: a formula and its inputs, and never anything but a prediction."""

IMAGENET, EPOCHS = 1_281_167, 200
OVERHEAD = 1.0  # Percent of a step that is neither forward nor backward pass, on one H200 (docs/measured.md).
PUBLISHED = "NVIDIA DeepLearningExamples, ConvNets/resnet50v1.5 for PyTorch 21.03, mixed precision, channels last, 8 x "
MACHINES = {
    "v100x8": (8322, 8322, PUBLISHED + "V100 16 GB", "; target 2,650 images/s"),
    "a100x8": (16621, 16621, PUBLISHED + "A100 80 GB", "; target 6,000 images/s"),
    "h100x8": (16621 * 1.4, 16621 * 1.64, "an estimate: the A100's rate times the ratio of memory bandwidths, 1.4 to 1.64", ""),
}  # fmt: skip
"""images/s of ordinary ResNet-50 training at 224 px on all devices, from, to; where that was found; what the project set itself."""


def predict(name: str, config, trainings: float) -> str:
    """One sentence on the rate of a machine; `config` is an `inscon.config.Config`, `trainings` a source image's cost
    (`inscon.report.flops.StepFlops`). ValueError for a network whose rate on these machines nobody has told."""
    backbone, view_size = config.model.backbone, config.views.view_size
    if (backbone, view_size) != ("resnet50", 224):
        remedy = "leave --predict out, or set --recipe imagenet_r50"
        raise ValueError(f"the known rates are of resnet50 at 224 px. Found: {backbone} at {view_size} px; {remedy}")
    *resnet50, source, target = MACHINES[name]
    ceiling = [rate / trainings for rate in resnet50]
    rates = [rate * (1 - OVERHEAD / 100) for rate in ceiling]
    hours = [IMAGENET * EPOCHS / rate / 3600 for rate in reversed(rates)]
    return (
        f"PREDICTION, not measured, {name}: {_range(rates)} images/s, {_range(hours)} h for {EPOCHS} epochs of ImageNet (ceiling "
        f"{_range(ceiling)} images/s{target}). images/s = ResNet-50 training images/s / cost of an image * (1 - overhead). Inputs: "
        f"ResNet-50 training at {_range(resnet50)} images/s ({source}); cost {trainings:.2f}, the step's FLOPs over those of "
        f"ResNet-50's forward and backward pass, counted; overhead {OVERHEAD:g} %, measured on one H200, "
        "not on such a machine."
    )


def _range(bounds) -> str:
    return " to ".join(dict.fromkeys(f"{bound:,.0f}" for bound in bounds))
