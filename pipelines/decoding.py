"""Where JPEGs are decoded: which ways there are on a machine, and which of them a measurement chooses."""

from dataclasses import dataclass

ENGINE_SHARES = (0.65, 0.9)
"""Shares of the pictures given to a GPU's JPEG engine that are tried, where there is one: DALI's default, and more."""
FIRST_WITH_ENGINE = (8, 0)
"""Compute capability from which GPUs may have a JPEG engine. Where one of them has none, DALI decodes without."""
WORTH_THE_GPU = 1.1
"""Decoding on the GPU takes time from the training there, so it must be this much faster than on the host to be chosen."""


@dataclass(frozen=True, slots=True)
class Decode:
    """One way to decode."""

    device: str
    """ "cpu", or "mixed": nvJPEG on a GPU, its Huffman half on the host."""
    engine_share: float | None
    """Of the pictures, decoded by the GPU's JPEG engine; None is DALI's default."""

    def describe(self) -> str:
        """ "mixed, 90 % of it by the JPEG engine"."""
        return (
            self.device
            if self.engine_share is None
            else f"{self.device}, up to {self.engine_share:.0%} by the JPEG engine"
        )


def candidates(capability: tuple[int, int] | None, host_color: bool) -> list[Decode]:
    """The ways to decode where the GPU has this compute capability; None is no GPU.

    Color on the host needs the crops there, which leaves decoding there.
    """
    cpu = Decode("cpu", None)
    if capability is None or host_color:
        return [cpu]
    if capability < FIRST_WITH_ENGINE:
        return [cpu, Decode("mixed", None)]
    return [cpu, *(Decode("mixed", share) for share in ENGINE_SHARES)]


def choose(ways: list[Decode], rates: dict[Decode, float]) -> tuple[Decode, str]:
    """The way to take, and the measured rates as words for the log, "" where there was nothing to choose.

    `rates` are source images/s; the host wins unless the GPU is `WORTH_THE_GPU` times as fast.
    """
    if len(ways) == 1:
        return ways[0], ""
    handicap = {way: rates[way] * (WORTH_THE_GPU if way.device == "cpu" else 1) for way in ways}
    said = ", ".join(f"{way.describe()}: {rates[way]:.0f}" for way in ways)
    return max(ways, key=handicap.get), f" (measured, images/s: {said})"
