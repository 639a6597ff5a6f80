"""Which number format a device gets."""

import pytest
import torch

from inscon.precision import _choose, check_architecture


def test_precision_by_capability():
    assert _choose("auto", None).name == "fp32" and _choose("auto", None).pixel_dtype == torch.float32
    assert _choose("auto", (7, 0)).name == "fp16" and _choose("auto", (7, 0)).needs_scaler
    assert _choose("auto", (9, 0)).name == "bf16" and not _choose("auto", (9, 0)).needs_scaler
    with pytest.raises(ValueError, match="precision fp16 needs a GPU. Found: cpu"):
        _choose("fp16", None)
    with pytest.raises(ValueError, match="needs compute capability 8.0 or newer. Found: 7.0; set --precision fp16"):
        _choose("bf16", (7, 0))


def test_builds_without_the_gpus_architecture_are_refused():
    check_architecture((8, 6), ["sm_80"], "x")
    check_architecture((9, 0), ["sm_80", "sm_90a"], "x")
    check_architecture((12, 0), ["compute_90"], "x")
    with pytest.raises(ValueError, match="holds no code for the GPU's architecture sm_70. Found: sm_75 sm_80"):
        check_architecture((7, 0), ["sm_75", "sm_80"], "2.11")
    with pytest.raises(ValueError, match="sm_90"):
        check_architecture((9, 0), ["sm_80", "sm_120"], "x")
