"""Two gloo processes against one process on the joined batch, in float64."""

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("rank_worker.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(mode, ranks): what came out, once for each."""

    @cache
    def run(mode, ranks):
        out = tmp_path_factory.mktemp("ranks") / "out"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(out), mode], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out, weights_only=True)

    return run


@pytest.mark.parametrize("mode", ["frozen", "live"])
def test_two_ranks_equal_one_process_on_the_joined_batch(run, mode):
    """frozen: BatchNorm in eval mode. live: two ranks shuffle, one process splits into the same groups of images; and the two
    cut their steps into passes, the one into groups."""
    one, two = run(mode, 1), run(mode, 2)
    assert one["stop"] is two["stop"] is True and two["worst"] == {"rank": 1.0}
    assert two["total"] == {"rank": 3.0} and two["union"] == [2, 7] and one["union"] == []
    for a, b in zip(one["losses"], two["losses"]):
        assert a == pytest.approx(b, rel=1e-9)
    for part in ("gradients", "weights", "queues"):
        assert one[part].keys() == two[part].keys()
        for name in one[part]:
            torch.testing.assert_close(
                one[part][name], two[part][name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_four_ranks_send_each_other_what_one_process_deals_its_groups(run):
    """With four of them every rank sends to three, and images, boxes and keys must find their way back."""
    one, four = run("four", 1), run("four", 4)
    for a, b in zip(one["losses"], four["losses"]):
        assert a == pytest.approx(b, rel=1e-9)
    for name in one["queues"]:
        torch.testing.assert_close(one["queues"][name], four["queues"][name], rtol=1e-7, atol=1e-9)


def test_gradients_may_travel_in_half_precision(run):
    """Three digits of them arrive, and not more: otherwise the switch would do nothing."""
    one, two = run("live", 1), run("fp16", 2)
    for name, gradient in one["gradients"].items():
        apart = (two["gradients"][name] - gradient).abs().max()
        assert apart <= 2e-3 * gradient.abs().max() + 1e-6, name
    assert any(not torch.allclose(two["gradients"][n], g, rtol=1e-6, atol=0) for n, g in one["gradients"].items())
