"""What every method keeps to: found by its name, fed by any pipeline, never waiting for the device, channels last throughout."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from inscon import methods
from inscon.batch import Batch
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, ViewConfig
from inscon.gradients import FlatGradients
from inscon.methods import byol, inscon, moco, pixpro, simclr
from inscon.methods.method import Follower, resolve, slow_copy
from pipelines import open_pipeline
from pipelines.feed import Feed, open_index
from tests.inscon.methods.steps import BATCH, backward, logged, make_batch, make_method, small_inscon, take_steps

TOY = "tests.inscon.methods.toy"
SMALL_MOCO = moco.Settings(queue_size=3 * BATCH)
WITHOUT_QUEUE = [simclr.Settings(), byol.Settings(hidden_dim=64), pixpro.Settings(hidden_dim=64, instance=True)]
THEIR_NAMES = ["simclr", "byol", "pixpro"]

# --------------------------------------------------------------------------------------------------------- by name


def test_methods_are_found_by_name():
    assert {"inscon", "moco"} <= set(methods.names()) and "method" not in methods.names()
    assert methods.settings_of("inscon") is inscon.Settings and methods.settings_of("moco") is moco.Settings
    assert issubclass(methods.settings_of(TOY), methods.MethodSettings)


@pytest.mark.parametrize("name", ["simsiam_of_mine", "json", "inscon.nn.norm", "method", "./agree", "agree.py", ""])
def test_what_is_no_method_is_refused(name):
    with pytest.raises(
        ValueError, match=f"no method {name}; set --method to one of .*inscon, .*moco, .*or to a module"
    ):
        methods.settings_of(name)


def test_a_method_that_imports_what_is_not_there_says_so(tmp_path, monkeypatch):
    (tmp_path / "method_of_mine.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="method_of_mine imports no_such_package, which is not installed"):
        methods.settings_of("method_of_mine")


# ------------------------------------------------------------------------------------- a step, fed by a pipeline


def opened(settings, steps, batch=8, view_size=64, **model):
    """(the method, its batches by the synthetic pipeline), as whoever trains it has them."""
    config = resolve(
        Config(
            method=settings,
            loader=LoaderConfig(pipeline="synthetic"),
            views=ViewConfig(view_size=view_size),
            model=ModelConfig(**{"backbone": "resnet18", **model}),
            optim=OptimConfig(batch_size=batch),
        ),
        1,
    )
    torch.manual_seed(0)
    method = config.method.build(config, batch).to(memory_format=torch.channels_last).train()
    specs, mosaics = config.method.view_specs(config.views), config.method.mosaics()
    feed = Feed(open_index(config.loader), specs, mosaics, batch_size=batch, seed=0)
    return method, open_pipeline(feed, config.loader, total_steps=steps)


@pytest.mark.parametrize(
    "settings",
    [methods.settings_of(TOY)(), SMALL_MOCO, small_inscon(), *WITHOUT_QUEUE],
    ids=["toy", "moco", "inscon", *THEIR_NAMES],
)
def test_a_method_trains_on_what_it_asks_for(settings):
    """Views of its own sizes, flat gradients, weights that move; the same pieces in every step."""
    method, pipeline = opened(settings, steps=3)
    before = [p.detach().clone() for p in method.backbone.parameters()]
    trained = [p for p in method.parameters() if p.requires_grad]
    gradients = FlatGradients(trained)
    optimizer, names = torch.optim.SGD(method.param_groups(), lr=0.03, momentum=0.9, fused=True), []
    with pipeline:
        for step, batch in zip(range(3), pipeline):
            gradients.zero()
            _, losses = backward(method, batch, step, 3)
            assert all(p.grad.abs().sum() > 0 for p in trained)
            optimizer.step()
            method.after_update()
            names.append(list(losses))
            figures = logged(losses)
            assert all(math.isfinite(value) and value.ndim == 0 for value in figures.values())
            assert not any(value.requires_grad for value in figures.values())
    assert names[0] == names[1] == names[2] and len(names[0]) >= 1
    assert all(not torch.equal(old, new) for old, new in zip(before, method.backbone.parameters(), strict=True))


def test_the_toys_views_have_two_sizes_and_share_a_region():
    _, pipeline = opened(methods.settings_of(TOY)(), steps=1)
    with pipeline:
        batch = next(iter(pipeline))
    assert {name: tuple(view.pixels.shape) for name, view in batch.views.items()} == {
        "large": (8, 3, 64, 64),
        "small": (8, 3, 32, 32),
    }
    assert list(batch.overlaps) == [("large", "small")] and batch.mosaic is None and batch.size == 8
    assert batch.overlaps["large", "small"].second_box.max() <= 32 + 1e-3
    assert len(batch.tensors()) == 9


def test_the_toy_learns_that_both_views_agree():
    method, pipeline = opened(methods.settings_of(TOY)(), steps=12)
    with pipeline:
        batch = next(iter(pipeline))
    losses = [logged(own)["loss_agree"].item() for own in take_steps(method, [batch] * 12)]
    assert losses[-1] < losses[0] - 0.2


def test_settings_name_their_module():
    config = Config(method=methods.settings_of(TOY)(embedding_dim=8))
    assert config.to_dict()["method"] == {"name": TOY, "embedding_dim": 8}
    assert Config(method=SMALL_MOCO).to_dict()["method"]["name"] == "moco"


# ------------------------------------------------------------------------------------------------- what is shared


def test_a_follower_moves_towards_its_leader_by_name():
    fast = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    slow = slow_copy(fast)
    assert not any(p.requires_grad for p in slow.parameters())
    start = [p.clone() for p in slow.parameters()]
    with torch.no_grad():
        for p in fast.parameters():
            p.add_(1)
        fast[1].running_mean.add_(5)
    follower = Follower(slow, fast, 0.9)
    for times in (1, 2):
        follower.move()
        for p, own in zip(slow.parameters(), start, strict=True):
            torch.testing.assert_close(p, own + 1 - 0.9**times)
    assert (slow[1].running_mean == 0).all()  # statistics are a twin's own
    follower.momentum = 0.0  # as a schedule may set it
    follower.move()
    torch.testing.assert_close(slow[0].weight, fast[0].weight)


def test_a_followers_momentum_may_change_from_step_to_step():
    """By numbers that the device holds in one place, as a captured step needs them."""
    fast, slow = nn.Linear(3, 2), nn.Linear(3, 2)
    follower, places = Follower(slow, fast, 0.5), set()
    for momentum in (0.9, 0.0, 1.0):
        expected = [
            momentum * s + (1 - momentum) * f for s, f in zip(slow.parameters(), fast.parameters(), strict=True)
        ]
        follower.schedule(momentum)
        follower.move()
        places.add(follower._share.data_ptr())
        assert follower.momentum == momentum and follower.fading == (momentum == 1)
        for p, moved in zip(slow.parameters(), expected, strict=True):
            torch.testing.assert_close(p, moved)
    assert len(places) == 1 and not Follower(slow, fast, 1.0).fading


@pytest.mark.parametrize("settings", [SMALL_MOCO, small_inscon(), *WITHOUT_QUEUE], ids=["moco", "inscon", *THEIR_NAMES])
def test_a_state_dict_holds_the_whole_method(settings):
    """Weights, statistics, keys and where the next ones go: from it, a fresh method goes on, bit for bit."""
    method = make_method(settings, dtype=torch.float32)
    batches = [make_batch(settings, seed=step, dtype=torch.float32) for step in range(2)]
    take_steps(method, batches[:1])
    other = make_method(settings, seed=7, dtype=torch.float32)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    made, expected = take_steps(other, batches[1:]), take_steps(method, batches[1:])
    assert logged(made[0]) == logged(expected[0])
    assert {name: queue.pointer for name, queue in other.queues.items()} == {
        name: queue.pointer for name, queue in method.queues.items()
    }
    for a, b in zip(other.parameters(), method.parameters(), strict=True):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------- nobody waits

ASKING = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "equal",
}
"""Operations whose answer, or the shape of it, the host must wait for."""


class NobodyWaits(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._schema.name.removeprefix("aten::")
        assert name not in ASKING, f"{name} waits for the device"
        if name in ("index", "index_put"):  # by a mask the shape would depend on data
            assert not any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]), f"{name} by a mask"
        return operation(*args, **(kwargs or {}))


STEPS = [SMALL_MOCO, small_inscon(), small_inscon(tile="half", aggregate="literal", cell_stage="res4"), *WITHOUT_QUEUE]


@pytest.mark.parametrize("settings", STEPS, ids=["moco", "inscon", "switches", *THEIR_NAMES])
def test_a_step_asks_the_device_nothing(settings, monkeypatch):
    """No `.item()`, `int()`, `bool()`, `tolist()` or shape that depends on data is reached, by every operation that runs."""
    method, batch = make_method(settings, dtype=torch.float32), make_batch(settings, dtype=torch.float32)
    gradients = FlatGradients(method.parameters())
    optimizer = torch.optim.SGD(method.param_groups(), lr=0.1, momentum=0.9, fused=True)
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    with NobodyWaits():
        gradients.zero()
        backward(method, batch)
        gradients.average()
        optimizer.step()
        method.after_update()


@pytest.mark.parametrize("question", [
    lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: int(t[0]), lambda t: t[t > 0], lambda t: t.nonzero(),
])  # fmt: skip
def test_the_check_above_notices_a_question(question):
    with pytest.raises(AssertionError, match="waits for the device|by a mask"), NobodyWaits():
        question(torch.ones(3))


# ------------------------------------------------------------------------------------------------- channels last


class ChannelsLast(TorchDispatchMode):
    """Collects maps that lie in another order than channels last where the network's operations take or make them, and copies."""

    LAYERS = ("convolution", "convolution_backward", "native_batch_norm", "native_batch_norm_backward", "relu", "relu_",
              "threshold_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "add", "add_",
              "_native_batch_norm_legit")  # fmt: skip
    COPIES = ("clone", "copy_", "_to_copy", "contiguous")

    def __init__(self):
        super().__init__()
        self.seen, self.astray = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        name = operation._schema.name.removeprefix("aten::")
        tensors = [t for t in [*args, *(made if isinstance(made, (tuple, list)) else [made])] if is_map(t)]
        if name in self.LAYERS:
            self.seen += bool(tensors)
            self.astray += [(name, tuple(t.shape), t.stride()) for t in tensors if not lies_channels_last(t)]
        if name in self.COPIES and len({lies_channels_last(t) for t in tensors}) > 1:
            self.astray.append((name, "changes the order", tuple(tensors[0].shape)))
        return made


def is_map(t):
    return torch.is_tensor(t) and t.ndim == 4 and min(t.shape[1:]) > 1 and t.is_floating_point()


def lies_channels_last(t):
    return t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings", [SMALL_MOCO, small_inscon(), *WITHOUT_QUEUE], ids=["moco", "inscon", *THEIR_NAMES])
def test_no_layer_leaves_channels_last(settings):
    """Forward and backward, every map that the network's layers take or make; weights of kernels and their gradients too."""
    method, batch = make_method(settings, dtype=torch.float32), make_batch(settings, dtype=torch.float32)
    method = method.to(memory_format=torch.channels_last)
    gradients = FlatGradients(method.parameters())
    with ChannelsLast() as watch:
        gradients.zero()
        backward(method, batch)
    assert watch.seen > 140 * (1 if settings.mosaics() is None else 2) and not watch.astray, watch.astray[:5]


def test_the_check_above_notices_another_order():
    layer = nn.Conv2d(3, 4, 3)
    with ChannelsLast() as watch:
        layer(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).contiguous())
    assert watch.astray


# --------------------------------------------------------------------------------------------------------- on a GPU


def on_gpu(batch: Batch) -> Batch:
    def moved(item):
        names = [field.name for field in dataclasses.fields(item)]
        return dataclasses.replace(item, **{name: getattr(item, name).cuda() for name in names})

    return dataclasses.replace(
        batch,
        views={name: moved(view) for name, view in batch.views.items()},
        overlaps={pair: moved(overlap) for pair, overlap in batch.overlaps.items()},
        mosaic=None if batch.mosaic is None else batch.mosaic.cuda(),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_equals_the_cpus():
    settings = small_inscon()
    batch = make_batch(settings, dtype=torch.float32)
    there = on_gpu(batch)
    cpu, gpu = (make_method(settings, dtype=torch.float32) for _ in range(2))
    gpu.cuda()
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            half = {piece.name: piece.losses() for piece in gpu.pieces(there, gpu.prepare(there))}
        expected, made = logged(backward(cpu, batch)[1]), logged(backward(gpu, there)[1])
        for name in ("loss_single", "loss_multi", "loss_cell", "loss"):
            assert made[name].item() == pytest.approx(expected[name].item(), rel=1e-2)
        assert logged(half)["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.1)
        cpu.after_update(), gpu.after_update()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_a_step_on_a_gpu_never_waits(dtype):
    """CUDA's own watch: any call that makes the host wait for the device is an error."""
    settings = small_inscon()
    method = make_method(settings, dtype=torch.float32).to("cuda", memory_format=torch.channels_last)
    batch = on_gpu(make_batch(settings, dtype=torch.float32))
    gradients = FlatGradients(method.parameters())
    optimizer = torch.optim.SGD(method.query_encoder.parameters(), lr=0.1, momentum=0.9, fused=True)

    def step():
        gradients.zero()
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            losses = backward(method, batch)[1]
        gradients.average()
        optimizer.step()
        method.after_update()
        return losses

    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones(1, device="cuda").item()  # the watch is on
        for _ in range(3):
            losses = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(logged(losses)["loss"])


def test_the_method_on_the_page_trains(tmp_path, monkeypatch):
    """The example of docs/methods.md, saved as a file of somebody's."""
    page = (Path(__file__).resolve().parents[3] / "docs/methods.md").read_text()
    (tmp_path / "agree_of_the_page.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    method, pipeline = opened(methods.settings_of("agree_of_the_page")(dim=32), steps=1)
    with pipeline:
        batch = next(iter(pipeline))
    losses = [logged(own)["loss_agree"].item() for own in take_steps(method, [batch] * 12)]
    assert losses[-1] < losses[0] - 0.2
