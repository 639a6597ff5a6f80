"""How fast machines that are not at hand should be: a formula and its inputs, and never anything but a prediction."""

from dataclasses import dataclass

IMAGENET, EPOCHS = 1_281_167, 200
COST = {"single": 1.0, "multi": 1.0, "key": 0.36}
"""Time of each trunk pass in units of a forward and backward pass of ResNet-50 at 224 px: design budget, 0.36 as measured there."""
V100_SOURCE = "NVIDIA DeepLearningExamples, ConvNets/resnet50v1.5 for PyTorch 21.03, mixed precision, channels last, 8 x V100 16 GB"
A100_SOURCE = "NVIDIA DeepLearningExamples, ConvNets/resnet50v1.5 for PyTorch 21.03, mixed precision, channels last, 8 x A100 80 GB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is known of a kind of machine."""

    devices: int
    resnet50_low: float
    """images/s of ordinary ResNet-50 training at 224 px, all devices together; `resnet50_high` where only a range is known."""
    resnet50_high: float
    source: str
    target: float | None
    """images/s of InsCon that the project set itself."""


MACHINES = {
    "v100x8": Machine(devices=8, resnet50_low=8322, resnet50_high=8322, source=V100_SOURCE, target=2650),
    "a100x8": Machine(devices=8, resnet50_low=16621, resnet50_high=16621, source=A100_SOURCE, target=6000),
    "h100x8": Machine(
        devices=8,
        resnet50_low=16621 * 1.4,
        resnet50_high=16621 * 1.64,
        source="an estimate: the A100's published rate times 1.4 to 1.64, the ratio of memory bandwidths",
        target=None,
    ),
    "h200": Machine(
        devices=1,
        resnet50_low=3300,
        resnet50_high=4500,
        source="an estimate, published nowhere",
        target=None,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Rates in source images/s of the whole machine, hours for ImageNet's 200 epochs."""

    machine: str
    ceiling_low: float
    ceiling_high: float
    """If nothing but trunk passes took time."""
    rate_low: float
    rate_high: float
    """With the overhead."""
    overhead_percent: float
    overhead_source: str
    cost: float
    """Of a source image, in ResNet-50 forward and backward passes."""
    hours_low: float
    hours_high: float
    formula: str
    source: str
    target: float | None

    def sentence(self) -> str:
        rate = _range(self.rate_low, self.rate_high)
        ceiling = _range(self.ceiling_low, self.ceiling_high)
        hours = _range(self.hours_low, self.hours_high, "{:.0f}")
        target = "" if self.target is None else f"; target {self.target:,.0f} images/s"
        return (
            f"PREDICTION, not measured, {self.machine}: {rate} images/s, {hours} h for {EPOCHS} epochs of ImageNet (ceiling "
            f"{ceiling} images/s{target}). {self.formula}. Inputs: ResNet-50 training at {_range(*_resnet(self))} images/s "
            f"({self.source}); cost {self.cost:.2f}; overhead {self.overhead_percent:.1f} % ({self.overhead_source})."
        )


def _resnet(prediction: Prediction) -> tuple[float, float]:
    return prediction.ceiling_low * prediction.cost, prediction.ceiling_high * prediction.cost


def _range(low: float, high: float, form: str = "{:,.0f}") -> str:
    one, other = sorted((form.format(low), form.format(high)), key=len)
    return one if one == other else f"{form.format(min(low, high))} to {form.format(max(low, high))}"


def check_machine(name: str) -> None:
    """ValueError for a machine that nothing is known of."""
    if name not in MACHINES:
        raise ValueError(f'nothing is known of the machine "{name}"; set --predict to one of: {", ".join(MACHINES)}')


def predict(name: str, heads: tuple[str, ...], overhead_percent: float, overhead_source: str) -> Prediction:
    """ValueError for a machine that nothing is known of.

    Args:
        heads: that are trained, see `inscon.config.ModelConfig`.
        overhead_percent: share of the step that is no trunk pass.
        overhead_source: where that comes from.
    """
    check_machine(name)
    machine = MACHINES[name]
    cost = COST["key"] + COST["single"] * bool({"single", "cell"} & set(heads)) + COST["multi"] * ("multi" in heads)
    low, high = machine.resnet50_low / cost, machine.resnet50_high / cost
    kept = 1 - overhead_percent / 100
    hours = [IMAGENET * EPOCHS / (rate * kept) / 3600 for rate in (high, low)]
    return Prediction(
        machine=name,
        ceiling_low=low,
        ceiling_high=high,
        rate_low=low * kept,
        rate_high=high * kept,
        overhead_percent=overhead_percent,
        overhead_source=overhead_source,
        cost=cost,
        hours_low=hours[0],
        hours_high=hours[1],
        formula="images/s = ResNet-50 training images/s / cost of an image * (1 - overhead)",
        source=machine.source,
        target=machine.target,
    )


def target_of(device_name: str | None, devices: int) -> tuple[float, str] | None:
    """images/s that the project set itself for so many devices of that name, and for what; None where it set none."""
    for name, machine in MACHINES.items():
        chip = name.partition("x")[0].upper()
        if device_name and chip in device_name.upper() and machine.target is not None:
            return (
                machine.target * devices / machine.devices,
                f"{machine.target:,.0f} on {machine.devices} x {chip}, in proportion",
            )
    return None
