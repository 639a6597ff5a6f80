"""RandAugment's operations against timm's functions of PIL pictures, to the last bit: the kernels, the reference, the engines."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from inscon import plan as codes
from inscon.plan import FILL, NEVER, RANDAUGMENT, ColorSpec, Mosaics, ViewPlan, ViewSpec, plan_views
from pipelines.color import MEAN
from tests.pipelines.conftest import assert_same, batches, draw_picture, every, opened

kernels = pytest.importorskip("pipelines.kernels", reason="numba is not installed")
randaugment = pytest.importorskip("pipelines.randaugment")
reference = pytest.importorskip("pipelines.reference")
timm = pytest.importorskip("timm.data.auto_augment", reason="timm is not installed")

NAMES = {
    "AutoContrast": codes.AUTO_CONTRAST, "Equalize": codes.EQUALIZE, "Invert": codes.INVERT, "Rotate": codes.ROTATE,
    "Posterize": codes.POSTERIZE, "Solarize": codes.SOLARIZE, "SolarizeAdd": codes.SOLARIZE_ADD, "Color": codes.SATURATION,
    "Contrast": codes.CONTRAST, "Brightness": codes.BRIGHTNESS, "Sharpness": codes.SHARPNESS, "ShearX": codes.SHEAR_X,
    "ShearY": codes.SHEAR_Y, "TranslateX": codes.TRANSLATE_X, "TranslateY": codes.TRANSLATE_Y,
}  # fmt: skip
"""timm's names; its shifts that are given in px."""
WHOLE = (codes.POSTERIZE, codes.SOLARIZE, codes.SOLARIZE_ADD)


def pictures(side: int) -> dict[str, np.ndarray]:
    """Noise, few levels, what a photo is like, and what histograms trip over: one level, two, nearly all of one."""
    rng = np.random.default_rng(side)
    noise = rng.integers(0, 256, (side, side, 3), np.uint8)
    sparse = np.full_like(noise, 77)
    sparse[0, :5] = noise[0, :5]
    steps = (np.indices((side, side)).sum(0) // 9 * 13 % 256).astype(np.uint8)
    return {
        "noise": noise, "dark": noise // 9 + 40, "binary": noise // 128 * 255, "two levels": noise // 128 * 3 + 100,
        "one level": np.full_like(noise, 130), "black": np.zeros_like(noise), "sparse": sparse,
        "steps": np.stack([steps, 255 - steps, steps // 2], -1), "smooth": np.asarray(draw_picture(side, side, side)),
    }  # fmt: skip


def by_timm(name: str, picture: np.ndarray, strength: float) -> np.ndarray:
    settings = {"resample": Image.Resampling.BILINEAR, "fillcolor": FILL}
    whole = int(strength) if NAMES[name] in WHOLE else float(strength)
    given = () if name in ("AutoContrast", "Equalize", "Invert") else (whole,)
    return np.asarray(timm.NAME_TO_OP[name](Image.fromarray(picture), *given, **settings))


def strengths(code: int, side: int, count: int = 5) -> np.ndarray:
    """Some within the range of an operation and both its ends, as float32; of those with a sign both."""
    low, high = RANDAUGMENT[code]
    made = np.r_[low, high, np.random.default_rng(code).uniform(low, high, count)]
    made = np.maximum(np.floor(made), code == codes.POSTERIZE) if code in WHOLE else made
    made = made * side if code in (codes.TRANSLATE_X, codes.TRANSLATE_Y) else made
    return np.float32(np.r_[made, -made] if code >= codes.ROTATE else made)


def row_of(code: int, strength: float) -> np.ndarray:
    """A row of a plan in which RandAugment does one thing."""
    row = np.zeros(codes.ROW, np.float32)
    row[20], row[24] = code, strength
    return row


@pytest.mark.parametrize("side", [16, 97, 224])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_timms(name, side):
    code = NAMES[name]
    for kind, picture in pictures(side).items():
        for strength in strengths(code, side, count=8 if side < 200 else 1):
            wanted, made = by_timm(name, picture, strength), picture.copy()
            kernels.augment_view(made, row_of(code, strength))
            np.testing.assert_array_equal(made, wanted, f"{kind}, {strength}")
            other = reference.OPERATIONS[code](Image.fromarray(picture), float(strength))
            np.testing.assert_array_equal(np.asarray(other), wanted)


def test_sines_and_cosines_are_rounded_as_python_does():
    numbers = np.r_[
        np.cos(np.radians(np.float32(np.linspace(0, 360, 20001)).astype(float))), 0, 1, -1, 0.5, 1e-16, 5e-16
    ]
    for number in numbers.tolist():
        assert randaugment._rounded(number) == round(number, 15)
    assert any(
        round(number, 15) != np.rint(number * 1e15) / 1e15 for number in numbers.tolist()
    )  # what is lost matters


def drawn(seed=0, count=4000, side=224, **settings) -> ViewPlan:
    spec = ViewSpec(name="view", size=side, color=ColorSpec(**{"randaugment": 2, **settings}))
    return plan_views(seed, 1, np.arange(count), np.full((count, 2), 300), [spec]).views["view"]


def test_the_fill_is_imagenets_mean():
    assert tuple(round(255 * share) for share in MEAN) == FILL


@pytest.mark.parametrize("magnitude", [0.0, 3.3, 7.0, 10.0])
def test_strengths_are_timms(magnitude):
    plan = drawn(magnitude=magnitude, magnitude_std=0.0)
    for name, code in NAMES.items():
        shift = name.startswith("Translate")
        level = timm.LEVEL_TO_ARG[f"{name}Rel" if shift else name]
        [wanted] = level(magnitude, {}) if level else [0]
        wanted = max(wanted, 1) if name == "Posterize" else abs(wanted) * (224 if shift else 1)  # PIL refuses no bits
        found = plan.strengths[plan.late_ops == code]
        np.testing.assert_allclose(np.abs(found), wanted, rtol=1e-6)
        if code >= codes.ROTATE and magnitude:
            assert abs((found > 0).mean() - 0.5) < 0.1
        else:
            assert (found >= 0).all()


def test_operations_are_drawn_alike_and_every_other_one_is_executed():
    plan = drawn(count=20000)
    drawn_ops = plan.late_ops[:, :2]
    assert abs((drawn_ops > 0).mean() - 0.5) < 0.01 and (plan.late_ops[:, 2] == 0).all()
    assert stats.chisquare([(drawn_ops == code).sum() for code in NAMES.values()]).pvalue > 1e-3
    assert abs(np.corrcoef(drawn_ops[:, 0], drawn_ops[:, 1])[0, 1]) < 0.03
    assert (plan.strengths[plan.late_ops == 0] == 0).all()
    assert abs((plan.late_ops[:, 3] == codes.GRAY).mean() - 0.2) < 0.01 and (plan.color_ops[:, 4] == 0).all()


def test_magnitudes_are_normal_and_clipped():
    plan = drawn(count=20000, magnitude=5.0, magnitude_std=1.0)
    levels = (plan.strengths[plan.late_ops == codes.SATURATION] - 0.1) / 0.18
    assert stats.kstest(levels, stats.norm(5, 1).cdf).pvalue > 1e-3
    plan = drawn(count=20000)  # InfoMin's: half of a bell around the upper end
    levels = (plan.strengths[plan.late_ops == codes.SATURATION] - 0.1) / 0.18
    assert levels.max() <= 10 + 1e-5 and abs((levels > 10 - 1e-5).mean() - 0.5) < 0.05
    assert stats.kstest((10 - levels[levels < 10 - 1e-5]) / 0.5, stats.halfnorm.cdf).pvalue > 1e-3
    assert set(np.unique(plan.strengths[plan.late_ops == codes.POSTERIZE])) <= {2, 3, 4}


def test_nothing_else_is_drawn_otherwise():
    """A view's crop, jitter and blur are those without RandAugment; gray comes last, or, gray_first, first as ever."""
    for first in (False, True):
        plain, plan = drawn(randaugment=0, gray_first=first), drawn(gray_first=first)
        for name in ("crop_box", "flipped", "factors", "blur_sigma", "solarize"):
            np.testing.assert_array_equal(getattr(plan, name), getattr(plain, name))
        assert (plain.late_ops == 0).all() and (plain.strengths == 0).all()
        moved = np.c_[plan.color_ops[:, :4], plan.late_ops[:, 3]]
        np.testing.assert_array_equal(plan.color_ops if first else moved, plain.color_ops)


def test_draws_are_the_same_in_every_company():
    specs = [ViewSpec(name=n, color=ColorSpec(randaugment=3)) for n in ("a", "b")]
    ids, sizes = np.random.default_rng(0).permutation(1000)[:100], np.full((100, 2), 300)
    whole = plan_views(7, 3, ids, sizes, specs).views
    assert (whole["a"].late_ops != whole["b"].late_ops).any()
    for part in np.array_split(np.arange(100), 7):
        piece = plan_views(7, 3, ids[part], sizes[part], specs[:2]).views
        for name in ("a", "b"):
            np.testing.assert_array_equal(piece[name].late_ops, whole[name].late_ops[part])
            np.testing.assert_array_equal(piece[name].strengths, whole[name].strengths[part])
    with_other_seed = plan_views(8, 3, ids, sizes, specs).views["a"]
    assert (with_other_seed.late_ops != whole["a"].late_ops).any(1).mean() > 0.8


INFOMIN = ColorSpec(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, randaugment=2)


def test_the_order_is_blur_randaugment_gray_solarize():
    """Against the steps one by one; solarize at 255 leaves all but the brightest alone, so a view shows what came before."""
    spec = ViewSpec(
        name="view", size=64, color=ColorSpec(randaugment=3, gray_probability=0.5, solarize_probability=0.5)
    )
    picture, count = Image.fromarray(pictures(97)["smooth"]), 60
    plan = plan_views(3, 0, np.arange(count), np.full((count, 2), 97), [spec]).views["view"]
    for i, row in enumerate(plan.rows()[:, 0]):
        made = np.empty((64, 64, 3), np.uint8)
        kernels.render_view(np.asarray(picture), row, made, False)  # the crop; PIL's depends on its version
        cut = Image.fromarray(made.copy())
        kernels.render_view(np.asarray(picture), row, made, True)
        for operation in plan.color_ops[i].astype(int):
            factor = plan.factors[i, max(operation, 1) - 1] if operation <= codes.HUE else 0
            cut = reference.OPERATIONS[int(operation)](cut, float(factor))
        if plan.blur_sigma[i]:
            cut = cut.filter(reference.ImageFilter.GaussianBlur(float(plan.blur_sigma[i])))
        names = {code: name for name, code in NAMES.items()}
        view = np.asarray(cut)
        for operation, strength in zip(plan.late_ops[i], plan.strengths[i]):
            if operation == codes.GRAY:
                view = np.asarray(Image.fromarray(view).convert("L").convert("RGB"))
            elif operation:
                view = by_timm(names[int(operation)], view, strength)
        view = np.asarray(timm.solarize(Image.fromarray(view), 128)) if plan.solarize[i] < NEVER else view
        np.testing.assert_array_equal(made, view)
    assert (plan.late_ops[:, 3] == codes.GRAY).any() and (plan.solarize < NEVER).any()


VIEWS = (
    ViewSpec(name="query", size=64, color=INFOMIN),
    ViewSpec(name="key", size=96, color=ColorSpec(randaugment=3, magnitude=5.0, magnitude_std=3.0)),
    ViewSpec(name="plain", size=48),
)


@pytest.fixture(scope="module")
def wanted(shards):
    return batches("reference", shards, 5, views=VIEWS)


@every
@pytest.mark.parametrize("color", ["auto", "host"])
def test_engines_are_equal_to_the_last_bit(name, color, shards, wanted):
    for one, other in zip(batches(name, shards, 5, views=VIEWS, loader={"color": color}), wanted, strict=True):
        assert_same(one, other, by_pil=name != "reference")


@pytest.mark.parametrize("settings", [{"color": "device"}, {"decode": "mixed"}])
def test_a_device_is_refused(settings, shards):
    with pytest.raises(ValueError, match="RandAugment.*Found: color .*; set --color host and --decode cpu"):
        opened("reference", shards, 1, views=VIEWS, mosaics=Mosaics(view="query"), loader=settings)
