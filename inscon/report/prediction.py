"""How fast machines that are not at hand should be: a formula and its inputs, and never anything but a prediction."""

from dataclasses import dataclass

IMAGENET, EPOCHS = 1_281_167, 200
OVERHEAD = 10.0
"""Percent of a step that is neither forward nor backward pass: the most that the project allows itself."""
PUBLISHED = "NVIDIA DeepLearningExamples, ConvNets/resnet50v1.5 for PyTorch 21.03, mixed precision, channels last, 8 x "


@dataclass(frozen=True, slots=True)
class Machine:
    """What is known of a kind of machine."""

    devices: int
    resnet50: tuple[float, float]
    """images/s of ordinary ResNet-50 training at 224 px, all devices together: from, to."""
    source: str
    target: float | None = None
    """source images/s of InsCon that the project set itself."""


MACHINES = {
    "v100x8": Machine(8, (8322, 8322), PUBLISHED + "V100 16 GB", 2650),
    "a100x8": Machine(8, (16621, 16621), PUBLISHED + "A100 80 GB", 6000),
    "h100x8": Machine(
        8, (16621 * 1.4, 16621 * 1.64), "an estimate: the A100's rate times 1.4 to 1.64, the ratio of memory bandwidths"
    ),
    "h200": Machine(1, (3300, 4500), "an estimate, published nowhere"),
}


def machine_of(name: str) -> Machine:
    """ValueError for a machine that nothing is known of."""
    if name not in MACHINES:
        raise ValueError(f'nothing is known of the machine "{name}"; set --predict to one of: {", ".join(MACHINES)}')
    return MACHINES[name]


def check_comparable(backbone: str, view_size: int) -> None:
    """ValueError for networks that nobody has published the rates of."""
    if (backbone, view_size) != ("resnet50", 224):
        raise ValueError(
            f"the published rates are of resnet50 at 224 px. Found: {backbone} at {view_size} px; leave --predict out, or set "
            "--recipe imagenet_r50"
        )


def predict(name: str, trainings: float) -> str:
    """One sentence on the rate of a machine; `trainings` is a source image's cost (`inscon.report.flops.StepFlops`)."""
    machine = machine_of(name)
    ceiling = [rate / trainings for rate in machine.resnet50]
    rates = [rate * (1 - OVERHEAD / 100) for rate in ceiling]
    hours = [IMAGENET * EPOCHS / rate / 3600 for rate in reversed(rates)]
    target = "" if machine.target is None else f"; target {machine.target:,.0f} images/s"
    return (
        f"PREDICTION, not measured, {name}: {_range(rates)} images/s, {_range(hours)} h for {EPOCHS} epochs of ImageNet (ceiling "
        f"{_range(ceiling)} images/s{target}). images/s = ResNet-50 training images/s / cost of an image * (1 - overhead). Inputs: "
        f"ResNet-50 training at {_range(machine.resnet50)} images/s ({machine.source}); cost {trainings:.2f}, the step's FLOPs "
        f"over those of ResNet-50's forward and backward pass, counted; overhead {OVERHEAD:g} %, the most that the project allows "
        "itself, not measured on such a machine."
    )


def _range(bounds) -> str:
    return " to ".join(dict.fromkeys(f"{bound:,.0f}" for bound in bounds))


def target_of(gpu: str | None, devices: int) -> str | None:
    """What the project set itself for so many GPUs of that name; None where it set nothing."""
    for name, machine in MACHINES.items():
        if gpu and name.partition("x")[0].upper() in gpu.upper() and machine.target is not None:
            share = machine.target * devices / machine.devices
            return f"{share:,.0f} images/s of InsCon, in proportion to {machine.target:,.0f} of {name}"
    return None
