"""Shapes and types written in annotations are checked while the tests run."""

import contextlib
import os
import resource
import signal
import sys
from importlib.util import find_spec

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # threads that wait sleep: two jobs on two cores would starve each other

# A shell ignores it in what it starts in the background, and so would whatever tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # Triton's kernels run on a CPU, slowly; it is read when Triton is imported

from jaxtyping import install_import_hook

pytest.register_assert_rewrite("tests.inscon.test_train")  # whose helpers other tests import

NN = [
    f"nn.{name}" for name in ("backbones", "heads", "loss", "norm", "pooling", "queue")
]  # Triton reads its kernels' source
CHECKED = [
    *(f"inscon.{name}" for name in ("batch", "geometry", "methods", *NN, "transfer")),
    "pipelines.color",
    "pipelines.feed",
]
"""Where tensors are passed. Settings are left out: what they refuse themselves is tested with wrong types."""

if find_spec("beartype"):  # comes with the dev extra
    install_import_hook(CHECKED, "beartype.beartype")

# Importing FFCV sets PyTorch to one thread. pipelines/ffcv.py guards against it; tests that look whether it is there would not.
THREADS = torch.get_num_threads()
with contextlib.suppress(ImportError):
    import ffcv  # noqa: F401
torch.set_num_threads(THREADS)

OURS = {"inscon", "pipelines", "data_prep", "scripts", "benchmarks", "tests"}


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """With -m gpu, as on a machine rented for it, a missing package leaves out the tests that need it, and not the others too."""
    report = yield
    error = report.call.excinfo.value if report.failed and "gpu" in collector.config.option.markexpr else None
    while error and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    missing = error.name if error else None
    if missing and missing.split(".")[0] not in OURS:
        # Else it stays there half imported, and tests that import from it fail in another way.
        sys.modules.pop(".".join(collector.path.relative_to(collector.config.rootpath).with_suffix("").parts), None)
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: {missing} is not installed")
    return report


@pytest.fixture
def small_files():
    """`with small_files(bytes):` no file of this process can grow beyond, as if the disk were full."""

    @contextlib.contextmanager
    def limited(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
