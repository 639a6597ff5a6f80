"""The device tail against torchvision's PIL functions, each operation alone and whole plans; here on the CPU."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch.overrides import TorchFunctionMode

from inscon.plan import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    NEVER,
    SATURATION,
    VIEW_PLAN,
    ColorSpec,
    ViewPlan,
    ViewSpec,
    plan_views,
)
from pipelines import color, reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def views(count, side=48, seed=0) -> np.ndarray:
    """Noise, with every second one pale, so that small saturations and grays occur."""
    made = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3)).astype(np.uint8)
    made[1::2] = made[1::2, :, :, :1] + made[1::2] // 64
    return made


def plan_of(ops, factors, sigma=0.0, solarize=NEVER) -> ViewPlan:
    """One row per list of operations, for views that are cut already."""
    plan = np.zeros(len(ops), VIEW_PLAN).view(ViewPlan)
    for row, codes in zip(plan.color_ops, ops, strict=True):
        row[: len(codes)] = codes
    plan.resized, plan.side, plan.factors, plan.blur_sigma, plan.solarize = 48, 48, factors, sigma, solarize
    return plan


def colored(pixels, plan, device) -> np.ndarray:
    levels = color.jitter(torch.from_numpy(pixels).to(device).float(), plan)
    return color.solarize(color.blur(levels, plan.blur_sigma), plan.solarize).cpu().numpy()


OPERATIONS = {
    "brightness": (BRIGHTNESS, (1.37, 1, 1, 0), lambda image: F.adjust_brightness(image, float(np.float32(1.37)))),
    "contrast": (CONTRAST, (1, 0.63, 1, 0), lambda image: F.adjust_contrast(image, float(np.float32(0.63)))),
    "saturation": (SATURATION, (1, 1, 1.4, 0), lambda image: F.adjust_saturation(image, float(np.float32(1.4)))),
    "hue": (HUE, (1, 1, 1, -0.08), lambda image: F.adjust_hue(image, float(np.float32(-0.08)))),
    "gray": (GRAY, (1, 1, 1, 0), lambda image: F.to_grayscale(image, 3)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_equals_torchvision(name, device):
    operation, factors, adjust = OPERATIONS[name]
    pixels = views(6)
    # The third sample is left alone: operations are per sample.
    made = colored(pixels, plan_of([[operation]] * 2 + [[]] + [[operation]] * 3, factors), device)
    np.testing.assert_array_equal(made[2], pixels[2])
    for i in (0, 1, 3, 4, 5):
        np.testing.assert_array_equal(made[i], np.asarray(adjust(Image.fromarray(pixels[i]))))


def some_colors() -> np.ndarray:
    """One in 27 of the 16.7 million colors, grays and borders included, as a picture."""
    shades = np.r_[0:256:3].astype(np.uint8)
    return np.resize(np.stack(np.meshgrid(shades, shades, shades, indexing="ij"), -1), (1, 798, 798, 3))


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.001, 0.037, 0.1])
def test_hue_of_every_color_equals_torchvision(turns, device):
    cube = some_colors()
    shift = torch.tensor(np.trunc(np.float64(np.float32(turns)) * 255), dtype=torch.float32, device=device)
    made = color.shift_hue(torch.from_numpy(cube).to(device).float(), shift.view(1, 1, 1))
    wanted = np.asarray(F.adjust_hue(Image.fromarray(cube[0]), float(np.float32(turns))))
    np.testing.assert_array_equal(made[0].cpu().numpy(), wanted)


class LikeCuda(TorchFunctionMode):
    """Divisions as CUDA compiles them: by a number as a product with its reciprocal, and so are means."""

    DIVISIONS = (torch.div, torch.true_divide, torch.Tensor.div, torch.Tensor.__truediv__, torch.Tensor.div_)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.DIVISIONS and not torch.is_tensor(args[1]):
            return args[0] * (torch.ones((), dtype=args[0].dtype) / args[1])
        if function in (torch.mean, torch.Tensor.mean):
            summed = args[0].sum(*args[1:], **kwargs)
            return summed * (torch.ones((), dtype=summed.dtype) / (args[0].numel() // summed.numel()))
        return function(*args, **kwargs)


@pytest.mark.parametrize("turns", [0.0, -0.1])
def test_hue_divides_exactly_where_a_number_would_become_its_reciprocal(turns):
    """A CUDA device's arithmetic, on the CPU; with `/ 6` some of the colors were up to 6 levels off."""
    cube = torch.from_numpy(some_colors()).float()
    shift = torch.full((1, 1, 1), float(np.trunc(turns * 255)))
    with LikeCuda():
        made = color.shift_hue(cube, shift)
        assert float(torch.full((), 41.0) / 41) != 1  # the mode is on
    assert torch.equal(made, color.shift_hue(cube, shift))


def test_a_mean_gray_of_one_half_is_rounded_up_everywhere():
    """As PIL does; of 7 x 7 pixels and so on, a product with the reciprocal falls below."""
    for side, level in itertools.product((14, 28, 56, 224), range(0, 255, 5)):
        pixels = np.full((1, side, side, 3), level, np.uint8)
        pixels[0, : side // 2] += 1
        plan = plan_of([[CONTRAST]], (1, 0.0, 1, 0))
        with LikeCuda():
            made = color.jitter(torch.from_numpy(pixels).float(), plan)
        assert (made == level + 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.001, 0.0, 0.037, 0.1])
def test_on_a_gpu_the_hue_of_all_colors_is_the_cpus(turns):
    shift = torch.full((1, 1, 1), float(np.trunc(turns * 255)))
    shades = torch.arange(256.0)
    cube = torch.stack(torch.meshgrid(shades, shades, shades, indexing="ij"), -1).view(16, 1024, 1024, 3)
    for some in cube.split(1):
        assert torch.equal(color.shift_hue(some.cuda(), shift.cuda()).cpu(), color.shift_hue(some, shift))


def test_blur_equals_pil(device):
    sigma = np.float32([0.1, 0.0, 0.5, 1.0, 1.3, 2.0, 3.5, 0.9])
    pixels = views(8)
    made = colored(pixels, plan_of([[]] * 8, (1, 1, 1, 0), sigma), device)
    np.testing.assert_array_equal(made[1], pixels[1])
    for i in (0, 2, 3, 4, 5, 6, 7):
        wanted = np.asarray(Image.fromarray(pixels[i]).filter(ImageFilter.GaussianBlur(float(sigma[i]))))
        np.testing.assert_array_equal(made[i], wanted)


def test_solarize_equals_pil(device):
    """The second is left alone; one threshold inverts everything."""
    thresholds = np.float32([128, NEVER, 0, 255, 1, 77])
    pixels = views(6)
    made = colored(pixels, plan_of([[]] * 6, (1, 1, 1, 0), solarize=thresholds), device)
    np.testing.assert_array_equal(made[1], pixels[1])
    for i in (0, 2, 3, 4, 5):
        wanted = np.asarray(ImageOps.solarize(Image.fromarray(pixels[i]), int(thresholds[i])))
        np.testing.assert_array_equal(made[i], wanted)


def test_whole_plans_equal_the_reference(device):
    count = 24
    spec = ViewSpec(
        name="view", size=64, color=ColorSpec(jitter_probability=0.9, gray_probability=0.3, solarize_probability=0.5)
    )
    plan = plan_views(1, 0, np.arange(count), np.full((count, 2), 80), [spec]).views["view"]
    pictures = [Image.fromarray(picture) for picture in views(count, side=80, seed=4)]
    crops, wanted = (
        np.stack([np.asarray(reference.render_view(picture, plan, i, whole)) for i, picture in enumerate(pictures)])
        for whole in (False, True)
    )
    np.testing.assert_array_equal(colored(crops, plan, device), wanted)
    finished = color.color_views(torch.from_numpy(crops).to(device), plan, torch.float32)
    assert torch.equal(finished.cpu(), color.normalize(torch.from_numpy(wanted), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalize_equals_torchvision(dtype):
    pixels = views(3, side=10)
    made = color.normalize(torch.from_numpy(pixels), dtype)
    assert made.dtype == dtype and made.shape == (3, 3, 10, 10)
    assert made.is_contiguous(memory_format=torch.channels_last)
    wanted = torch.stack([F.normalize(F.to_tensor(view), color.MEAN, color.STD) for view in pixels])
    torch.testing.assert_close(made, wanted.to(dtype), atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0)


def test_box_taps_have_the_gaussians_variance():
    sigma = np.float32([0.1, 1.0, 2.0, 4.0])
    taps = color.box_taps(sigma) / 2**24
    np.testing.assert_allclose(taps.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(taps, taps[:, ::-1])
    # Three boxes have three times the variance of one.
    distance = np.arange(taps.shape[1]) - taps.shape[1] // 2
    np.testing.assert_allclose(3 * (taps * distance**2).sum(1), sigma**2, rtol=1e-4)
