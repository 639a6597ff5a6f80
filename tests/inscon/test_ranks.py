"""Two gloo processes against one process on the joined batch, in float64; and what they send each other, by itself."""

import copy
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from inscon import distributed
from tests.inscon.rank_worker import counted, to_normalize

WORKER = Path(__file__).with_name("rank_worker.py")


WITH_TRITON = ("synchronized",) if find_spec("triton") else ()
SHUFFLED = ("densecl", "resim", "detco", "infomin")
SYNCED = ("simclr", "byol", "pixpro")
MODES = {
    1: ("frozen", "live", "moco", "four", *SHUFFLED, *SYNCED, *WITH_TRITON),
    2: ("frozen", "live", "moco", "fp16", "collectives", *SHUFFLED, *SYNCED, *WITH_TRITON),
    4: ("four",),
}
"""Number of ranks -> what they do, one after the other: starting them takes longer."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(mode, ranks): what came out, once for each."""

    @cache
    def start(ranks):
        out = tmp_path_factory.mktemp("ranks") / "out"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, str(WORKER), str(out), *MODES[ranks]], capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out, weights_only=True)

    return lambda mode, ranks: start(ranks)[mode]


@pytest.mark.parametrize("mode", ["frozen", "live", "moco", *SHUFFLED, *SYNCED])
def test_two_ranks_equal_one_process_on_the_joined_batch(run, mode):
    """frozen: BatchNorm in eval mode. SYNCED: over both ranks, negatives of both. Others: two ranks shuffle, one
    process splits into the same groups of images."""
    one, two = run(mode, 1), run(mode, 2)
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    for part in ("gradients", "weights", "statistics" if mode in SYNCED else "queues"):
        assert one[part].keys() == two[part].keys() and len(one[part])
        for name in one[part]:
            torch.testing.assert_close(
                one[part][name], two[part][name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_four_ranks_send_each_other_what_one_process_deals_its_groups(run):
    """With four of them every rank sends to three, and images, boxes and keys must find their way back."""
    one, four = run("four", 1), run("four", 4)
    for a, b in zip(one["losses"], four["losses"], strict=True):
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


@pytest.mark.parametrize(("compression", "digits"), [("none", 1e-6), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_ranks_average_gradients_in_any_format(run, compression, digits):
    """Every type, in the parameters' own strides; a parameter that one rank left out counts as zero there, and none is lost."""
    result = run("collectives", 2)["averaged"][compression]
    assert result["strides"]
    for name, made in result["made"].items():
        expected = result["own"][name].mean(0)
        torch.testing.assert_close(made, expected, rtol=digits, atol=digits * expected.abs().max().item())
        rounded = not torch.allclose(made, expected, rtol=1e-6, atol=0)
        assert rounded == (compression != "none" and not name.startswith("none")), name
    assert (result["own"]["one.weight"][0] == 0).all() and (result["made"]["one.weight"] != 0).any()
    assert all((result["made"][name] == 0).all() for name in ("none.weight", "none.bias"))


def test_keys_of_any_form_travel_and_come_back(run):
    """Pixels, a jigsaw's patches, boxes, flags; each image in company of the other rank's, and channels last as it came."""
    result = run("collectives", 2)["shuffled"]
    assert all(result["back"].values()), result["back"]
    assert result["types"] and result["met_alike"] and all(result["channels_last"].values()), result["channels_last"]
    assert [sorted(own) for own in result["met"].tolist()] == [[0, 2, 5, 7], [1, 3, 4, 6]]


@pytest.mark.skipif(not WITH_TRITON, reason="Triton is not installed")
def test_fused_blocks_have_the_statistics_of_all_ranks(run):
    """Values, every gradient and the running statistics, against a plain block on the joined batch."""
    one, two = run("synchronized", 1), run("synchronized", 2)
    assert one.keys() == two.keys() and {"made", "of x", "bn2.weight", "downsample.1.running_var"} <= set(one)
    for name, expected in one.items():
        largest = max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(two[name].to(expected.dtype), expected, rtol=1e-5, atol=2e-6 * largest, msg=name)


@pytest.mark.parametrize("form", ["1d", "2d", "half"])
def test_batchnorm_over_ranks_is_torchs_on_the_whole_batch(run, form):
    """Results, gradients and running statistics; vectors and maps far from 0, and maps in bfloat16."""
    made = run("collectives", 2)["synced"][form]
    x, gradient, norm = to_normalize()[form]
    plain = copy.deepcopy(norm).double()
    whole = x.double().requires_grad_()
    result = plain(whole)
    result.backward(gradient.double())
    digits = {"rtol": 2e-2, "atol": 3e-2} if form == "half" else {"rtol": 1e-5, "atol": 2e-5}
    assert made["made"].dtype == made["of_x"].dtype == x.dtype and made["channels_last"]
    expected = {"made": result, "of_x": whole.grad, "of_weight": plain.weight.grad, "of_bias": plain.bias.grad}
    for name, value in expected.items():
        torch.testing.assert_close(made[name].double(), value, **digits, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(made["state"][f"0.{name}"].to(value.dtype), value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made["evaluated"].double(), plain.eval()(x.double()), **digits)


def test_what_is_gathered_gets_the_gradient_of_every_ranks_loss(run):
    found = run("collectives", 2)["gathered"]
    rows = torch.arange(6.0).view(2, 3)
    assert torch.equal(found["everything"], torch.cat([rows, rows + 10]))
    assert torch.equal(found["gradient"], torch.arange(12.0).view(4, 3) * (1 + 2))


def test_the_few_collectives_beside_them(run):
    assert run("collectives", 2)["counted"] == counted(1)
    two = run("collectives", 2)
    assert two["stop"] is True and two["worst"] == {"rank": 1.0} and two["total"] == {"rank": 3.0}


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="every rank takes a GPU, and this one sees 4; set --nproc_per_node .* 4$"):
        distributed.start()
