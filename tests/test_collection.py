"""What a machine rented for its GPU may lack stops only the tests that need it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LACKING = (
    "nvidia.dali",
    "ffcv",
    "simplejpeg",
    "webdataset",
    "scipy",
    "timm",
    "pycocotools",
    "safetensors",
    "yaml",
    "xxhash",
)
COLLECT = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # an import of it fails
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def collect(lacking, *options):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", COLLECT, " ".join(lacking), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_gpu_tests_are_collected_where_packages_are_missing():
    done = collect(LACKING, "-m", "gpu")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_optim.py::test_steps_with_an_overflow_never_were[cuda-True-torch-fused]" in done.stdout
    for name in ("scipy", "xxhash", "simplejpeg"):
        assert f"{name} is not installed" in done.stdout


@pytest.mark.slow
def test_elsewhere_a_missing_package_is_an_error():
    done = collect(["scipy"], "tests/inscon/test_plan.py")
    assert done.returncode == 2 and "scipy" in done.stdout
