"""Which number format a device trains in, and whether this build of PyTorch can use the device at all."""

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
    needs_scaler: bool
    """float16 gradients underflow without a scaled loss."""

    @property
    def pixel_dtype(self) -> torch.dtype:
        """What pipelines should deliver."""
        return self.autocast_dtype or torch.float32


def choose_precision(asked: str, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 where the GPU has it natively, fp16 on older GPUs, fp32 on the CPU.

    Raises ValueError for fp16 on a CPU or bf16 on a GPU that would only emulate it.
    """
    return _choose(asked, capability_of(device))


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU, such as (7, 0); None for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _choose(asked: str, capability: tuple[int, int] | None) -> Precision:
    has_bf16 = capability is None or capability >= FIRST_WITH_BF16
    if asked == "auto":
        asked = "fp32" if capability is None else ("bf16" if has_bf16 else "fp16")
    if asked == "fp16" and capability is None:
        raise ValueError("precision fp16 needs a GPU. Found: cpu; set --precision fp32")
    if asked == "bf16" and not has_bf16:
        raise ValueError(
            f"precision bf16 needs compute capability 8.0 or newer. Found: {capability[0]}.{capability[1]}; "
            f"set --precision fp16"
        )
    return {
        "fp32": Precision("fp32", None, False),
        "bf16": Precision("bf16", torch.bfloat16, False),
        "fp16": Precision("fp16", torch.float16, True),
    }[asked]


def check_device(device: torch.device) -> None:
    """Refuse a GPU for which this build of PyTorch holds no code, before the first kernel fails obscurely."""
    if device.type == "cuda":
        check_architecture(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list(), torch.__version__)


def check_architecture(capability: tuple[int, int], arch_list: list[str], version: str) -> None:
    """Raise ValueError unless one of `arch_list` ("sm_80", "compute_120", ...) runs on a GPU of `capability`.

    Binary code runs on its own major architecture from its minor version up; "compute_" code is compiled for any newer GPU.
    """
    major, minor = capability
    for arch in arch_list:
        kind, _, digits = arch.rstrip("af").partition("_")
        code = divmod(int(digits), 10)
        if (kind == "sm" and code[0] == major and code[1] <= minor) or (kind == "compute" and code <= capability):
            return
    raise ValueError(
        f"this PyTorch ({version}) holds no code for the GPU's architecture sm_{major}{minor}. Found: {' '.join(arch_list)}; "
        f"install a build that does: torch 2.10 from PyPI covers sm_70 (V100) to sm_120 (Blackwell)"
    )
