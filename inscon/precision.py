"""Which number format a device trains in."""

from dataclasses import dataclass

import torch

FIRST_WITH_BF16 = (8, 0)
"""Compute capability of the first GPUs with bfloat16 matrix units (A100); a V100 is (7, 0)."""


@dataclass(frozen=True, slots=True)
class Precision:
    """How the forward pass is computed; weights, losses, boxes and optimizer stay float32."""

    name: str
    autocast_dtype: torch.dtype | None
    """None: no autocast, everything in float32."""

    @property
    def needs_scaler(self) -> bool:
        """float16 gradients underflow without a scaled loss."""
        return self.autocast_dtype is torch.float16

    @property
    def pixel_dtype(self) -> torch.dtype:
        """What pipelines should deliver."""
        return self.autocast_dtype or torch.float32


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 where the GPU has it natively, fp16 on older GPUs, fp32 on the CPU.

    Raises ValueError for fp16 on a CPU, bf16 on a GPU that would only emulate it, or a GPU that this PyTorch holds no code for.
    """
    if device.type != "cuda":
        return _choose(asked, None)
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:
        raise ValueError(
            f"torch {torch.__version__} does not run on this GPU ({str(error).splitlines()[0]}); install a build that does: "
            "torch 2.10 from PyPI covers sm_70 (V100) to sm_120 (Blackwell)"
        ) from None
    return _choose(asked, torch.cuda.get_device_capability(device))


def _choose(asked: str, capability: tuple[int, int] | None) -> Precision:
    """`capability`: of a GPU, such as (7, 0); None for a CPU."""
    if capability is None:
        asked = "fp32" if asked == "auto" else asked
        if asked == "fp16":
            raise ValueError("precision fp16 needs a GPU. Found: cpu; set --precision fp32")
    elif asked == "auto":
        asked = "bf16" if capability >= FIRST_WITH_BF16 else "fp16"
    elif asked == "bf16" and capability < FIRST_WITH_BF16:
        found = ".".join(map(str, capability))
        raise ValueError(f"precision bf16 needs compute capability 8.0 or newer. Found: {found}; set --precision fp16")
    return Precision(asked, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[asked])
