"""The compiled tail against PIL and torchvision: equal, to the last bit."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps

from inscon.plan import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    LATE,
    NEVER,
    ROW,
    SATURATION,
    VIEW_PLAN,
    ColorSpec,
    Grid,
    ViewPlan,
    ViewSpec,
    plan_views,
)
from tests.pipelines.conftest import PILLOW_13

ROOT = Path(__file__).resolve().parents[2]

kernels = pytest.importorskip("pipelines.kernels", reason="numba is not installed")
reference = pytest.importorskip("pipelines.reference")
from pipelines.compiled import drop_stale


def plan_of(
    boxes,
    *,
    flipped=False,
    ops=(),
    factors=(1, 1, 1, 0),
    sigma=0.0,
    size=224,
    side=None,
    offsets=(0, 0),
    solarize=NEVER,
) -> ViewPlan:
    n = len(boxes)
    plan = np.zeros(n, VIEW_PLAN).view(ViewPlan)
    plan.crop_box, plan.flipped, plan.resized, plan.side, plan.offset = boxes, flipped, size, side or size, offsets
    plan.color_ops[:, : len(ops)], plan.factors, plan.blur_sigma, plan.solarize = ops, factors, sigma, solarize
    return plan


def render(image: Image.Image, plan: ViewPlan, color=True) -> np.ndarray:
    out = np.empty((len(plan), *plan.side[[0, 0]].astype(int), 3), np.uint8)
    for made, [row] in zip(out, plan.rows(), strict=True):
        kernels.render_view(np.array(image), row, made, color)
    return out


def expected(image: Image.Image, plan: ViewPlan) -> np.ndarray:
    return np.stack([np.asarray(reference.render_view(image, plan, i)) for i in range(len(plan))])


def noise(height, width, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def agree(made, wanted, *, tall, colored=False):
    """Equal; before Pillow 13 a tall crop may be a level off, of noise in a quarter of its values, and color adds to it."""
    difference = np.abs(made.astype(int) - wanted)
    if PILLOW_13 or not tall:
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


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    "box", [(30, 20, 530, 300), (5, 0, 260, 900), (10, 10, 14, 13), (0, 40, 600, 41), (3, 0, 4, 900)]
)
def test_a_window_of_the_resized_crop_equals_pil(box, flipped):
    """A jigsaw's patches, by PIL alone: cut, resized (rows first, and columns first: the second box), mirrored, then the window."""
    image, corners = noise(900, 600), [(0, 0), (191, 191), (0, 191), (191, 0), (85, 107), (170, 3), (64, 128)]
    plan = plan_of([box] * len(corners), flipped=flipped, size=255, side=64, offsets=corners)
    whole = image.crop(box).resize((255, 255), Image.Resampling.BILINEAR)
    whole = ImageOps.mirror(whole) if flipped else whole
    wanted = np.stack([np.asarray(whole.crop((x, y, x + 64, y + 64))) for x, y in corners])
    agree(render(image, plan), wanted, tall=box[3] - box[1] > box[2] - box[0])


@pytest.mark.parametrize("threshold", [0, 1, 128, 200, 255])
def test_solarize_equals_pil(threshold):
    image = noise(64, 64)
    plan = plan_of([(0, 0, 64, 64)], size=64, solarize=threshold)
    np.testing.assert_array_equal(render(image, plan)[0], np.asarray(ImageOps.solarize(image, threshold)))
    np.testing.assert_array_equal(render(image, plan, color=False)[0], np.asarray(image))


def test_solarize_is_the_last_of_all():
    image = noise(64, 64)
    plan = plan_of([(0, 0, 64, 64)], size=64, ops=[BRIGHTNESS], factors=(0.7, 1, 1, 0), sigma=1.0, solarize=90)
    made = F.adjust_brightness(image, float(np.float32(0.7))).filter(ImageFilter.GaussianBlur(1.0))
    np.testing.assert_array_equal(render(image, plan)[0], np.asarray(ImageOps.solarize(made, 90)))


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
    made = render(Image.new("RGB", (60, 40), (7, 8, 9)), plan_of([box], size=32))
    assert (made == (7, 8, 9)).all()


def every_color() -> Image.Image:
    """One in 27 of the 16.7 million colors, grays and borders included."""
    levels = np.r_[0:256:3].astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3)
    return Image.fromarray(np.resize(cube, (812, 812, 3)))


def colored(image: Image.Image, operation: int, factor: float = 0.0) -> np.ndarray:
    factors = [1, 1, 1, 0, 0]
    factors[operation - 1] = factor
    view = np.array(image)
    kernels.color_view(view, plan_of([(0, 0, 1, 1)], ops=[operation], factors=factors[:4]).rows()[0, 0])
    return view


@pytest.mark.parametrize("factor", [0.0, 0.6, 0.831, 1.0, 1.2345, 1.4])
@pytest.mark.parametrize(
    ("operation", "adjust"),
    [(BRIGHTNESS, F.adjust_brightness), (CONTRAST, F.adjust_contrast), (SATURATION, F.adjust_saturation)],
)
def test_blends_equal_torchvision(operation, adjust, factor):
    image = every_color()
    np.testing.assert_array_equal(
        colored(image, operation, factor), np.asarray(adjust(image, float(np.float32(factor))))
    )


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.037, -0.001, 0.0, 0.05, 0.1, 0.4, 0.5])
def test_hue_equals_torchvision(turns):
    image = every_color()
    np.testing.assert_array_equal(colored(image, HUE, turns), np.asarray(F.adjust_hue(image, float(np.float32(turns)))))


def test_gray_equals_torchvision():
    image = every_color()
    np.testing.assert_array_equal(colored(image, GRAY), np.asarray(F.to_grayscale(image, 3)))


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.3, 0.5, 0.83452356, 1.0, 1.2247, 1.2248, 1.7, 2.0, 5.0])
def test_blur_equals_pil(sigma):
    image = noise(64, 64)
    view = np.array(image)
    kernels.blur(view, np.float32(sigma))
    np.testing.assert_array_equal(view, np.asarray(image.filter(ImageFilter.GaussianBlur(float(np.float32(sigma))))))


def test_whole_views_of_real_pictures_equal_torchvision(real_pictures):
    specs = [
        ViewSpec(name="a", color=ColorSpec(solarize_probability=0.5)),
        ViewSpec(name="b", size=96),
        ViewSpec(name="c", size=255, grid=Grid()),
    ]
    for i, image in enumerate(real_pictures):
        for plan in plan_views(5, 2, np.array([i]), np.array([[image.height, image.width]]), specs).views.values():
            agree(render(image, plan.ravel()), expected(image, plan.ravel()), tall=True, colored=True)


def test_color_is_left_out_on_request():
    image = noise(80, 90)
    planned = plan_of([(3, 4, 80, 70)], flipped=True, ops=[HUE, GRAY], factors=(1, 1, 1, 0.1), sigma=1.0, solarize=9)
    plain = plan_of([(3, 4, 80, 70)], flipped=True)
    np.testing.assert_array_equal(render(image, planned, color=False), expected(image, plain))


def test_threads_do_not_disturb_each_other():
    image = noise(300, 320)
    plan = plan_of([(10, 5, 300, 280)] * 3, ops=[HUE, CONTRAST], factors=(1, 0.7, 1, 0.1), sigma=1.5)
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
    assert ROW == 28 and LATE == 4


def test_compiled_code_older_than_any_of_its_sources_is_made_anew(tmp_path):
    """Numba keeps it where only another file has changed: a row of another length would be read beyond its end."""
    for name, age in {"a.py": 30, "b.py": 20, "old.1.nbc": 25, "old.nbi": 25, "new.1.nbc": 10, "notes.txt": 40}.items():
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    drop_stale(tmp_path, [tmp_path / "a.py", tmp_path / "b.py"])
    assert {path.name for path in tmp_path.iterdir()} == {"a.py", "b.py", "new.1.nbc", "notes.txt"}
    drop_stale(tmp_path / "not there", [tmp_path / "a.py"])


def test_compiled_code_is_kept_elsewhere_where_nothing_can_be_written(tmp_path):
    """Neither beside the code nor at home, as in a container run by another user: in a new folder of this user's alone."""
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pipelines import kernels
print(kernels._repeat_ends.stats.cache_path)
"""
    # Numba's places but for its setting.
    nowhere = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "TMPDIR": str(tmp_path)}
    nowhere.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=nowhere)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip()).parent
    assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700
