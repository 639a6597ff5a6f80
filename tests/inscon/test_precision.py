"""Which number format a device gets."""

import pytest
import torch

from inscon.precision import _choose, choose_precision


def test_precision_by_capability():
    assert _choose("auto", None).name == "fp32" and _choose("auto", None).pixel_dtype == torch.float32
    assert _choose("auto", (7, 0)).name == "fp16" and _choose("auto", (7, 0)).needs_scaler
    assert _choose("auto", (9, 0)).name == "bf16" and not _choose("auto", (9, 0)).needs_scaler
    with pytest.raises(ValueError, match="precision fp16 needs a GPU. Found: cpu"):
        _choose("fp16", None)
    with pytest.raises(ValueError, match="needs compute capability 8.0 or newer. Found: 7.0; set --precision fp16"):
        _choose("bf16", (7, 0))


def test_a_gpu_that_torch_holds_no_code_for_is_refused(monkeypatch):
    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch, "zeros", no_kernel)
    with pytest.raises(
        ValueError, match=r"does not run on this GPU \(CUDA error: no kernel .* device\); install a build"
    ):
        choose_precision("auto", torch.device("cuda"))
