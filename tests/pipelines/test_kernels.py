"""The compiled tail against PIL and torchvision: equal, to the last bit."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import PIL
import pytest
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter

from inscon.config import ViewConfig
from inscon.plan import BRIGHTNESS, CONTRAST, GRAY, HUE, ROW, SATURATION, ViewPlan, plan_views

kernels = pytest.importorskip("pipelines.kernels", reason="numba is not installed")
reference = pytest.importorskip("pipelines.reference")

ROOT = Path(__file__).resolve().parents[2]

VERTICAL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""Pillow 13 changed the order of its two resize passes for tall pictures, and with it the last bit."""


def plan_of(boxes, *, flipped=False, ops=(), factors=(1, 1, 1, 0), sigma=0.0) -> ViewPlan:
    n = len(boxes)
    return ViewPlan(
        crop_box=np.array(boxes, np.float32).reshape(n, 4),
        flipped=np.full(n, flipped),
        color_ops=np.tile(np.array([*ops, *[0] * (5 - len(ops))], np.uint8), (n, 1)),
        factors=np.tile(np.array(factors, np.float32), (n, 1)),
        blur_sigma=np.full(n, sigma, np.float32),
    )


def render(image: Image.Image, plan: ViewPlan, side=224, color=True) -> np.ndarray:
    out = np.empty((len(plan), side, side, 3), np.uint8)
    kernels.render_views(np.array(image), plan.rows(), out, color)
    return out


def expected(image: Image.Image, plan: ViewPlan, side=224) -> np.ndarray:
    return np.stack([np.asarray(reference.render_view(image, plan, i, side)) for i in range(len(plan))])


def noise(height, width, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def agree(made, wanted, *, tall, colored=False):
    """Equal; before Pillow 13 a tall crop may be a level off, of noise in a quarter of its values, and color adds to it."""
    difference = np.abs(made.astype(int) - wanted)
    if VERTICAL_FIRST or not tall:
        assert difference.max() == 0
    else:
        assert difference.max() <= (16 if colored else 1) and difference.mean() <= (0.5 if colored else 0.3)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("height", "width"),
    [(1, 1), (1, 300), (300, 1), (2, 2), (40, 50), (224, 224), (224, 300), (300, 224), (333, 500), (500, 333), (448, 448),
     (240, 230), (1000, 600), (700, 2400), (2400, 300)],
)  # fmt: skip
def test_crop_and_resize_equals_pil(height, width, flipped):
    plan = plan_of([(0, 0, width, height)], flipped=flipped)
    image = noise(height, width)
    agree(render(image, plan), expected(image, plan), tall=height > width)


def test_crops_inside_real_pictures_equal_pil(real_pictures):
    rng = np.random.default_rng(1)
    for image in real_pictures:
        x0, y0 = rng.integers(0, image.width, 6), rng.integers(0, image.height, 6)
        x1, y1 = rng.integers(x0 + 1, image.width + 1), rng.integers(y0 + 1, image.height + 1)
        plan = plan_of(np.stack([x0, y0, x1, y1], 1), flipped=True)
        agree(render(image, plan), expected(image, plan), tall=True)


def test_nothing_outside_of_the_crop_bleeds_in():
    picture = np.zeros((300, 300, 3), np.uint8)
    picture[50:250, 50:250] = 200
    assert (render(Image.fromarray(picture), plan_of([(50, 50, 250, 250)])) == 200).all()


@pytest.mark.parametrize("box", [(-9, -9, 400, 300), (90, 90, 95, 99), (50, 50, 20, 20), (1e9, -1e9, 2e9, 1e9)])
def test_a_box_that_leaves_the_picture_is_clamped_into_it(box):
    made = render(Image.new("RGB", (60, 40), (7, 8, 9)), plan_of([box]), side=32)
    assert (made == (7, 8, 9)).all()


def every_color() -> Image.Image:
    """One in 27 of the 16.7 million colors, grays and borders included."""
    levels = np.r_[0:256:3].astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    return Image.fromarray(np.resize(cube, (812, 812, 3)))


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.831, 1.0, 1.2345, 1.4])
@pytest.mark.parametrize(
    ("operation", "adjust"),
    [(BRIGHTNESS, F.adjust_brightness), (CONTRAST, F.adjust_contrast), (SATURATION, F.adjust_saturation)],
)
def test_blends_equal_torchvision(operation, adjust, factor):
    factors = [1, 1, 1, 0]
    factors[operation - 1] = factor
    plan, image = plan_of([(0, 0, 1, 1)], ops=[operation], factors=factors), every_color()
    view = np.array(image)
    kernels.color_view(view, plan.rows()[0])
    np.testing.assert_array_equal(view, np.asarray(adjust(image, float(np.float32(factor)))))


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.037, -0.001, 0.0, 0.05, 0.1, 0.4, 0.5])
def test_hue_equals_torchvision(turns):
    image = every_color()
    view = np.array(image)
    kernels.shift_hue(view, np.float32(turns))
    np.testing.assert_array_equal(view, np.asarray(F.adjust_hue(image, float(np.float32(turns)))))


def test_gray_equals_torchvision():
    image = every_color()
    view = np.array(image)
    kernels.color_view(view, plan_of([(0, 0, 1, 1)], ops=[GRAY]).rows()[0])
    np.testing.assert_array_equal(view, np.asarray(F.to_grayscale(image, 3)))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.3, 0.5, 0.83452356, 1.0, 1.2247, 1.2248, 1.7, 2.0, 5.0])
def test_blur_equals_pil(sigma):
    image = noise(64, 64)
    view = np.array(image)
    kernels.blur(view, np.float32(sigma))
    np.testing.assert_array_equal(view, np.asarray(image.filter(ImageFilter.GaussianBlur(float(np.float32(sigma))))))


def test_whole_views_of_real_pictures_equal_torchvision(real_pictures):
    config = ViewConfig(tiles_from="third")
    for i, image in enumerate(real_pictures):
        plans = plan_views(5, 2, np.array([i]), np.array([[image.height, image.width]]), config)
        for plan in (plans.query, plans.key, plans.tile):
            agree(render(image, plan), expected(image, plan), tall=True, colored=True)


def test_color_is_left_out_on_request():
    image = noise(80, 90)
    colored = plan_of([(3, 4, 80, 70)], flipped=True, ops=[HUE, GRAY], factors=(1, 1, 1, 0.1), sigma=1.0)
    plain = plan_of([(3, 4, 80, 70)], flipped=True)
    np.testing.assert_array_equal(render(image, colored, color=False), expected(image, plain))


def test_threads_do_not_disturb_each_other():
    image, plan = (
        noise(300, 320),
        plan_of([(10, 5, 300, 280)] * 3, ops=[HUE, CONTRAST], factors=(1, 0.7, 1, 0.1), sigma=1.5),
    )
    wanted, results = render(image, plan), {}
    threads = [threading.Thread(target=lambda n=n: results.update({n: render(image, plan)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for made in results.values():
        np.testing.assert_array_equal(made, wanted)


def test_row_layout_is_the_plans():
    assert ROW == 16


def test_compiled_code_is_kept_elsewhere_where_nothing_can_be_written(tmp_path):
    """Neither beside the code nor at home, as in a container run by another user: in a folder of this user's alone."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipelines import kernels
print(kernels._repeat_ends.stats.cache_path)
"""
    folder = tmp_path / f"inscon-numba-{os.getuid()}"
    # Numba's places but for its setting.
    nowhere = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "TMPDIR": str(tmp_path)}
    nowhere.pop("NUMBA_CACHE_DIR", None)

    def place():
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=nowhere)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())

    assert place().parent == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)  # another user's code could lie in it
    assert place().parent != folder
