"""Shapes and types written in annotations are checked while the tests run."""

import contextlib
from importlib.util import find_spec

import pytest
import torch
from jaxtyping import install_import_hook

pytest.register_assert_rewrite("tests.inscon.test_train")  # whose helpers other tests import

MODULES = ("batch", "encoder", "geometry", "key_queue", "loss", "model", "mosaic", "norm", "pooling", "transfer")
CHECKED = [*(f"inscon.{name}" for name in MODULES), "pipelines.colour", "pipelines.feed"]
"""Where tensors are passed. Settings are left out: what they refuse themselves is tested with wrong types."""

if find_spec("beartype"):  # comes with the dev extra
    install_import_hook(CHECKED, "beartype.beartype")

# Importing FFCV sets PyTorch to one thread. pipelines/ffcv.py guards against it; tests that look whether it is there would not.
THREADS = torch.get_num_threads()
with contextlib.suppress(ImportError):
    import ffcv  # noqa: F401
torch.set_num_threads(THREADS)
