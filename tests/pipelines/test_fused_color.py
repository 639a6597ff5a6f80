"""The fused kernels against pipelines/color.py and `assemble` on a CPU, bit for bit. Without a GPU they are interpreted."""

import dataclasses
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

language = pytest.importorskip("triton.language", reason="Triton is not installed")
if not hasattr(language, "gather"):
    pytest.skip("Triton before 3.3, that of torch 2.7, cannot blur", allow_module_level=True)

from inscon.plan import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NEVER,
    SATURATION,
    ColorSpec,
    Grid,
    Mosaics,
    ViewSpec,
    plan_views,
)
from pipelines import color, finish, fused_color
from pipelines.feed import Feed
from tests.pipelines.test_color import plan_of, views

INTERPRETED = pytest.param(
    "cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
)
DEVICES = [INTERPRETED, pytest.param("cuda", marks=pytest.mark.gpu)]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
BUSY = ColorSpec(jitter_probability=0.9, gray_probability=0.3, solarize_probability=0.5, hue=0.5, blur_sigma=(0.1, 3.5))


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def assert_equals_the_oracle(pixels, plan, device, dtype=torch.float32):
    made, canvas = fused_color.color_views(torch.from_numpy(pixels).to(device), plan, dtype)
    wanted = color.color_views(torch.from_numpy(pixels), plan, dtype)
    assert canvas is None and made.dtype == dtype and made.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(made.cpu(), wanted)


def random_factors(count):
    """Of `plan_of`: each operation's whole range and more, a hue of up to half a turn either way."""
    return np.random.default_rng(1).uniform([0, 0, 0, -0.5], [2, 2, 2, 0.5], (count, 4)).astype(np.float32)


@pytest.mark.parametrize("operation", [BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY])
def test_each_operation_alone_on_65536_pixels(operation, device):
    """Factors at the ends of their ranges too; the last sample is left alone."""
    ops, factors = [[operation]] * 63 + [[]], random_factors(64)
    factors[:4] = (0, 0, 0, 0.5), (1, 1, 1, 0), (9, 9, 9, 0.3), (2, 2, 2, -0.5)
    assert_equals_the_oracle(views(64, side=32), plan_of(ops, factors), device)


def test_all_orders_of_jitter_with_gray_last_and_first_on_65536_pixels(device):
    orders = [list(order) for order in itertools.permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))]
    ops = [[*order, GRAY] for order in orders] + [[GRAY, *order] for order in orders] + orders[:16]
    assert_equals_the_oracle(views(64, side=32), plan_of(ops, random_factors(64)), device)


@pytest.mark.parametrize(("side", "dtype"), list(zip([75, 48, 15], TYPES)))
def test_whole_plans(side, dtype, device):
    """Odd sides too, which no plan has."""
    spec = ViewSpec(name="view", size=48, color=dataclasses.replace(BUSY, gray_first=side == 48))
    plan = plan_views(side, 0, np.arange(6), np.full((6, 2), 200), [spec]).views["view"]
    assert_equals_the_oracle(views(6, side), plan, device, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_blur_and_solarize(dtype, device):
    """The last sigma reaches further than the view is wide."""
    sigma = np.float32([0.0, 2.0, 0.1, 1.3, 20.0])
    thresholds = np.float32([128, NEVER, 0, 255, 77])
    assert_equals_the_oracle(views(5, side=16), plan_of([[]] * 5, (1, 1, 1, 0), sigma, thresholds), device, dtype)


def test_nothing_to_do_is_normalization(device):
    assert_equals_the_oracle(views(2), plan_of([[], []], (1, 1, 1, 0)), device, torch.bfloat16)


def test_a_mean_gray_of_one_half_is_rounded_up(device):
    pixels = np.full((4, 48, 48, 3), np.arange(100, 104)[:, None, None, None], np.uint8)
    pixels[:, :24] += 1
    assert_equals_the_oracle(pixels, plan_of([[CONTRAST]] * 4, (1, 0, 1, 0)), device)


class Pictures:
    """An index of eight."""

    def __len__(self):
        return 8

    def sizes(self, ids):
        return np.full((len(ids), 2), 150)


@pytest.mark.parametrize(
    ("tile", "side", "dtype"), [("full", 48, torch.float32), ("half", 32, torch.bfloat16), ("full", 32, torch.float16)]
)
def test_a_batch_with_patches_and_mosaics(tile, side, dtype, device, monkeypatch):
    specs = (
        ViewSpec(name="view", size=side, color=BUSY),
        ViewSpec(name="patches", size=48, color=BUSY, grid=Grid(cells=2, patch=16)),
    )
    feed = Feed(Pictures(), specs, Mosaics(view="view", tile=tile), batch_size=8, seed=1)
    work = feed.work(0)
    levels = {"view": torch.from_numpy(views(8, side)).unsqueeze(1)}
    levels["patches"] = torch.from_numpy(views(32, side=16)).unflatten(0, (8, 4))
    plain = finish.Finish(feed, torch.device("cpu"), dtype, host_color=False)(work, levels)
    if device.type == "cpu":
        monkeypatch.setattr(finish, "fused_kernels", lambda *_: fused_color)
    fused = finish.Finish(feed, device, dtype, host_color=False)(work, levels)
    assert torch.equal(fused.mosaic.cpu(), plain.mosaic)
    assert fused.mosaic.is_contiguous(memory_format=torch.channels_last)
    for name, view in plain.views.items():
        assert torch.equal(fused.views[name].pixels.cpu(), view.pixels)


def test_a_card_that_colors_otherwise_is_refused(device, monkeypatch):
    fused_color.refusal.cache_clear()
    assert fused_color.refusal(device, torch.bfloat16, 16) is None
    one_level_off = fused_color._shares(torch.float32, device).roll(1, 0)
    monkeypatch.setattr(fused_color, "_shares", lambda *_: one_level_off)
    assert fused_color.refusal(device, torch.float32, 16) == "their pixels are not those of the CPU"
    monkeypatch.setattr(fused_color, "_shares", None)
    assert "TypeError" in fused_color.refusal(device, torch.float16, 16)
    fused_color.refusal.cache_clear()


def test_where_the_kernels_do_not_serve_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(fused_color, "refusal", lambda *_: "no compiler")
    finish.fused_kernels.cache_clear()
    for _ in range(2):
        assert finish.fused_kernels(torch.device("cuda"), torch.float32, frozenset([16])) is None
        assert finish.fused_kernels(torch.device("cpu"), torch.float32, frozenset([16])) is None
    finish.fused_kernels.cache_clear()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no compiler" in said and "--color host" in said


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipelines import fused_color as kernels

types = dict(views="*u8", levels="*u8", totals="*i64", steps="*fp32", taps="*i32", pixels="*bf16", canvas="*bf16", shares="*bf16")
sizes = dict(SIDE=48, PIXELS=1024, REACH=4, ON_CANVAS=True)
tiles = {"_sum_gray": {}, "_rows": dict(TALL=16, WIDE=64), "_columns": dict(TALL=64, WIDE=64)}
for name, tile in tiles.items():
    kernel = getattr(kernels, name)
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    fixed = {argument: (sizes | tile)[argument] for argument in kernel.arg_names if argument not in types}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(key),): value for key, value in fixed.items()})
    for capability in (70, 90):
        options = {"enable_fp_fusion": False, "num_warps": 8 if name == "_columns" else 4}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert "fma.rn.f32" not in made.asm["ptx"] and "div.full" not in made.asm["ptx"] and made.asm["cubin"]
"""


def test_the_kernels_compile_without_contracted_products(tmp_path):
    """For a card that is not there; the interpreter takes programs that the compiler refuses."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
