"""The step against MoCo v2 written out independently, and the properties the method stands on."""

import copy
import dataclasses
import inspect
import math
from functools import cache
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from inscon import model as model_module
from inscon.batch import Batch, View
from inscon.config import Config, ModelConfig, OptimConfig, ViewConfig, resolve
from inscon.geometry import find_overlap
from inscon.loss import info_nce, multi_positive_info_nce, row_logits
from inscon.model import InsCon
from inscon.mosaic import assemble
from inscon.plan import plan_views

SIDE, BATCH = 64, 8
VIEWS = ViewConfig(view_size=SIDE, overlap_min_side=8.0)


def make_batch(seed=0, batch=BATCH, dtype=torch.float64, views=VIEWS):
    import numpy as np

    plans = plan_views(seed, 0, np.arange(batch), np.full((batch, 2), 300), views)
    generator = torch.Generator().manual_seed(seed)
    # Both views of an image share its content, so that a leak would have something to find.
    content = torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=dtype)

    def view(plan):
        pixels = content + 0.5 * torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=dtype)
        box, flipped = torch.from_numpy(plan.crop_box), torch.from_numpy(plan.flipped)
        return View(pixels=pixels.to(memory_format=torch.channels_last), crop_box=box, flipped=flipped)

    query, key = view(plans.query), view(plans.key)
    return Batch(query=query, key=key, mosaic=assemble(query.pixels, views.tile), sample_ids=torch.arange(batch))


def make_model(seed=0, batch=BATCH, views=VIEWS, dtype=torch.float64, **settings):
    settings = {"arch": "resnet18", "queue_size": 3 * batch, "cell_queue_size": 27 * batch, "split_size": 4, **settings}
    if settings.get("norm") == "sync":
        settings["split_size"] = None
    config = resolve(Config(views=views, model=ModelConfig(**settings), optim=OptimConfig(batch_size=batch)), 1)
    torch.manual_seed(seed)
    return InsCon(config.model, views, batch).to(dtype).train()


def test_single_head_alone_is_moco_v2(monkeypatch):
    """Five steps against a loop of its own: torchvision's ResNet, a [D K] queue, cross entropy, EMA, plain SGD, float64."""
    seen = []
    monkeypatch.setattr(
        model_module,
        "row_logits",
        lambda q, k, n, t: seen.append((q.detach(), k, n.clone(), t)) or row_logits(q, k, n, t),
    )
    ours = make_model(heads=("single",), norm="sync", key_momentum=0.9)
    net = torchvision.models.resnet18(weights=None).double().train()
    net.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 128)).double()
    state = {
        k.removeprefix("trunk.").replace("heads.single.", "fc."): v for k, v in ours.query_encoder.state_dict().items()
    }
    net.load_state_dict(copy.deepcopy(state))
    follower = copy.deepcopy(net)
    queue, pointer = ours.key_queue.keys.T.clone(), 0
    optimizer = torch.optim.SGD(ours.query_encoder.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    velocity = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for step in range(5):  # the queue holds three batches: steps 3 and 4 write over a wrap
        batch = make_batch(seed=step)
        losses, new_keys = ours(batch)
        losses.total.backward()
        ours.enqueue(new_keys)
        optimizer.step()
        optimizer.zero_grad()
        ours.update_key_encoder()

        q = F.normalize(net(batch.query.pixels.contiguous()), dim=1)
        with torch.no_grad():
            k = F.normalize(follower(batch.key.pixels.contiguous()), dim=1)
        positive = torch.stack([(q[i] * k[i]).sum() for i in range(BATCH)])[:, None]
        logits = torch.cat([positive, q @ queue.clone()], 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        queue[:, pointer : pointer + BATCH] = k.T
        pointer = (pointer + BATCH) % queue.shape[1]
        with torch.no_grad():
            for (name, p), g in zip(net.named_parameters(), gradients):
                velocity[name] = 0.9 * velocity[name] + g + 1e-4 * p
                p -= 0.05 * velocity[name]
            for name, p in follower.named_parameters():
                p.copy_(0.9 * p + 0.1 * dict(net.named_parameters())[name])

        our_q, our_k, our_negatives, temperature = seen[-1]
        our_logits = torch.cat([(our_q * our_k).sum(1, keepdim=True), our_q @ our_negatives.T], 1) / temperature
        torch.testing.assert_close(our_logits, logits.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(losses.total, loss.detach(), rtol=1e-10, atol=1e-10, check_dtype=True)
        assert losses.top1["single"].item() == pytest.approx((logits.argmax(1) == 0).double().mean().item())
        torch.testing.assert_close(ours.key_queue.keys, queue.T, rtol=1e-9, atol=1e-9)
        assert ours.key_queue.pointer == pointer
        for name, p in follower.named_parameters():
            mine = ours.key_encoder.get_parameter(
                name.replace("fc.", "heads.single.") if name.startswith("fc.") else f"trunk.{name}"
            )
            torch.testing.assert_close(mine, p, rtol=1e-8, atol=1e-10)


def test_total_is_the_sum_of_the_three_losses_computed_by_hand():
    for tile, aggregate in (("full", "mean"), ("half", "literal")):
        views = dataclasses.replace(VIEWS, tile=tile)
        model, batch = make_model(norm="sync", aggregate=aggregate, views=views), make_batch(views=views)
        losses, keys = model(batch)
        overlap = find_overlap(
            batch.query.crop_box, batch.query.flipped, batch.key.crop_box, batch.key.flipped, SIDE, min_side=8.0
        )
        query = model.query_encoder(batch.query.pixels, overlap.query_box, batch.query.flipped)
        assert losses.single.item() == pytest.approx(
            info_nce(query["single"], keys.single, model.key_queue.keys, 0.2).item()
        )
        tiles = model.query_encoder.forward_mosaic(batch.mosaic)
        order = [[0, 1, 2, 3], [4, 5, 6, 7]] if tile == "full" else [
            [4 * g + (t + r) % 4 for t in range(4)] for g in range(2) for r in range(4)
        ]  # fmt: skip
        multi = multi_positive_info_nce(tiles, keys.single[torch.tensor(order)], model.key_queue.keys, 0.2, aggregate)
        assert losses.multi.item() == pytest.approx(multi.item())
        cell = multi_positive_info_nce(
            query["cell"], keys.cell, model.cell_queue.keys, 0.2, aggregate, overlap.weight.double()
        )
        assert losses.cell.item() == pytest.approx(cell.item())
        assert losses.total.item() == pytest.approx((losses.single + losses.multi + losses.cell).item())
        torch.testing.assert_close(keys.single.norm(dim=-1), torch.ones(BATCH, dtype=torch.float64))


def test_the_multi_head_starts_as_the_single_head():
    """METHOD 12: the multi head starts as a copy of the single head, unless asked otherwise."""
    model = make_model()
    single, multi = (model.query_encoder.heads[name].state_dict() for name in ("single", "multi"))
    assert all(torch.equal(single[k], multi[k]) for k in single)
    other = make_model(multi_head_init="independent").query_encoder.heads
    assert not torch.equal(other["single"][0].weight, other["multi"][0].weight)


def test_keys_come_from_the_ema_weights_and_from_nothing_else():
    model, batch = make_model(key_momentum=0.5), make_batch()
    before = model(batch)[1]
    with torch.no_grad():
        for p in model.query_encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    same = model(batch)[1]
    assert torch.equal(before.single, same.single) and torch.equal(before.cell, same.cell)
    expected = {
        n: 0.5 * p + 0.5 * model.query_encoder.get_parameter(n) for n, p in model.key_encoder.named_parameters()
    }
    model.update_key_encoder()
    for name, p in model.key_encoder.named_parameters():
        torch.testing.assert_close(p, expected[name])
    after = model(batch)[1]
    assert not torch.allclose(before.single, after.single) and not torch.allclose(before.cell, after.cell)


def test_no_gradient_reaches_the_key_side():
    model, batch = make_model(), make_batch()
    losses, keys = model(batch)
    losses.total.backward()
    assert all(p.grad is None and not p.requires_grad for p in model.key_encoder.parameters())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.query_encoder.parameters())
    assert not keys.single.requires_grad and not keys.cell.requires_grad and not model.key_queue.keys.requires_grad


def changed_rows(a, b):
    return ((a - b).flatten(1).abs().amax(1) > 1e-9).nonzero().flatten().tolist()


def test_keys_are_normalized_in_other_company_than_their_queries():
    """Changing image j changes the queries of j's group and the keys of j's *other* group: nobody keeps all its company."""
    model, batch = make_model(batch=16, split_size=4), make_batch(batch=16)
    boxes = find_overlap(batch.query.crop_box, batch.query.flipped, batch.key.crop_box, batch.key.flipped, SIDE)
    for j in (0, 5, 15):
        pixels = batch.query.pixels.clone()
        pixels[j] += 3 * torch.randn_like(pixels[j])
        queries = [
            model.query_encoder(p, boxes.query_box, batch.query.flipped)["single"].detach()
            for p in (batch.query.pixels, pixels)
        ]
        keys = [
            model.encode_keys(dataclasses.replace(batch.key, pixels=p), boxes)["single"]
            for p in (batch.query.pixels, pixels)
        ]
        query_company, key_company = changed_rows(*queries), changed_rows(*keys)
        group = j // 4 * 4
        assert query_company == list(range(group, group + 4))
        assert j in key_company and len(key_company) == 4
        assert (
            len(set(query_company) & set(key_company)) <= 2
        )  # itself and at most one more; without shuffling all four


def test_cells_survive_flips_of_either_view():
    """A trunk that sees positions must give the same cells whether the views came mirrored or not."""
    model = make_model(cell_dim=4, norm="sync").eval()
    encoder = model.query_encoder
    encoder.trunk.forward = lambda x: {"res5": x[:, :, ::32, ::32].repeat(1, 171, 1, 1)[:, :512]}
    pixels = torch.randn(1, 3, 1, 1, dtype=torch.float64) + torch.linspace(-1, 1, 129, dtype=torch.float64)
    pixels = pixels.expand(1, 3, 129, 129)  # 5 features at 0, 32 .. 128, symmetric under mirroring
    box = torch.tensor([[20.0, 30.0, 90.0, 100.0]])
    mirrored = torch.tensor([[128.0 - 90.0, 30.0, 128.0 - 20.0, 100.0]])
    plain = encoder(pixels, box, torch.tensor([False]))["cell"]
    flipped = encoder(pixels.flip(-1), mirrored, torch.tensor([True]))["cell"]
    torch.testing.assert_close(plain, flipped)
    assert (plain[:, 0] - plain[:, 2]).abs().max() > 1e-4


@pytest.mark.parametrize("heads", [("single",), ("multi",), ("cell",), ("single", "cell"), ("multi", "cell")])
def test_any_subset_of_heads_trains(heads):
    model, batch = make_model(heads=heads, dtype=torch.float32), make_batch(dtype=torch.float32)
    losses, keys = model(batch)
    losses.total.backward()
    assert all(p.grad is not None for p in model.query_encoder.parameters())
    assert {n for n in ("single", "multi", "cell") if getattr(losses, n) is not None} == set(heads) == set(losses.top1)
    model.enqueue(keys)
    model.update_key_encoder()
    assert hasattr(model, "key_queue") == bool({"single", "multi"} & set(heads)) and hasattr(model, "cell_queue") == (
        "cell" in heads
    )


@pytest.mark.parametrize("settings", [
    {"cell_stage": "res4"}, {"mlp": False}, {"roi_border": "normalize", "roi_offset": 0.5}, {"cell_grid": 2, "cell_queue_size": 64},
    {"mosaic_updates_norm": True}, {"aggregate": "literal"},
])  # fmt: skip
def test_switches_train(settings):
    model, batch = make_model(dtype=torch.float32, **settings), make_batch(dtype=torch.float32)
    running = model.query_encoder.trunk.bn1.running_mean.clone()
    losses, keys = model(batch)
    losses.total.backward()
    assert torch.isfinite(losses.total)
    assert keys.cell.shape == (BATCH, model.config.cells, 256)
    assert not torch.equal(running, model.query_encoder.trunk.bn1.running_mean)


def test_an_image_without_overlap_weighs_nothing_and_poisons_nothing():
    model, batch = make_model(), make_batch()
    far = batch.key.crop_box.clone()
    far[2] = torch.tensor([9000.0, 9000, 9100, 9100])
    batch = dataclasses.replace(batch, key=dataclasses.replace(batch.key, crop_box=far))
    losses, keys = model(batch)
    losses.total.backward()
    assert torch.isfinite(losses.total) and torch.isfinite(keys.cell).all()
    assert all(torch.isfinite(p.grad).all() for p in model.query_encoder.parameters())


def test_queue_two_takes_all_cells_of_an_image_in_a_row():
    model, batch = make_model(), make_batch()
    keys = model(batch)[1]
    model.enqueue(keys)
    torch.testing.assert_close(model.cell_queue.keys[: 9 * BATCH], keys.cell.reshape(-1, 256))
    torch.testing.assert_close(model.key_queue.keys[:BATCH], keys.single)
    assert model.cell_queue.pointer == 9 * BATCH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_on_a_gpu_equals_the_cpus():
    cpu, batch = make_model(dtype=torch.float32), make_batch(dtype=torch.float32)
    gpu = copy.deepcopy(cpu).cuda()

    def moved(view):
        return View(pixels=view.pixels.cuda(), crop_box=view.crop_box.cuda(), flipped=view.flipped.cuda())

    there = Batch(
        query=moved(batch.query), key=moved(batch.key), mosaic=batch.mosaic.cuda(), sample_ids=batch.sample_ids
    )
    for _ in range(2):
        (losses, keys), (gpu_losses, gpu_keys) = cpu(batch), gpu(there)
        for name in ("single", "multi", "cell", "total"):
            assert getattr(gpu_losses, name).item() == pytest.approx(getattr(losses, name).item(), rel=1e-2)
        gpu_losses.total.backward()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            assert gpu(there)[0].total.item() == pytest.approx(losses.total.item(), rel=2e-2)
        cpu.enqueue(keys), gpu.enqueue(gpu_keys)
        cpu.update_key_encoder(), gpu.update_key_encoder()


# ------------------------------------------------------------------------------------------------- a step in pieces


def run_steps(cut, steps, dtype=torch.float64, views=VIEWS, lr=0.02, compiled=False, **settings):
    """(losses of every step, the model) after `steps` updates by plain SGD."""
    settings = {"arch": "resnet18", "queue_size": 24, "cell_queue_size": 216, "split_size": 4, **settings}
    config = resolve(Config(views=views, model=ModelConfig(**settings), optim=OptimConfig(batch_size=BATCH)), 1)
    torch.manual_seed(0)
    model = InsCon(config.model, views, BATCH, cut).to(dtype).train()
    if compiled:
        for encoder in (model.query_encoder, model.key_encoder):
            encoder.trunk.compile(dynamic=False)
            for module in encoder.trunk.modules():  # without the tests' type checks, which compiling cannot read
                if hasattr(type(module).forward, "__wrapped__"):
                    module.forward = MethodType(inspect.unwrap(type(module).forward), module)
    optimizer = torch.optim.SGD(model.query_encoder.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    seen = []
    for step in range(steps):
        batch = in_type(make_batch(seed=step, views=views), dtype)
        prepared, total = model.prepare(batch), None
        for piece in model.pieces:
            losses, keys = model(batch, prepared, piece)
            losses.total.backward()
            assert keys is prepared.keys
            total = losses.detach() if total is None else total + losses.detach()
        model.enqueue(prepared.keys)
        optimizer.step()
        optimizer.zero_grad()
        model.update_key_encoder()
        seen.append(total)
    return seen, model


def in_type(batch, dtype):
    def view(of):
        return dataclasses.replace(of, pixels=of.pixels.to(dtype))

    query, key = view(batch.query), view(batch.key)
    return dataclasses.replace(batch, query=query, key=key, mosaic=batch.mosaic.to(dtype))


@cache
def three_joint_steps(tile="full", **settings):
    return run_steps("joint", 3, views=dataclasses.replace(VIEWS, tile=tile), **settings)


@pytest.mark.parametrize("settings", [
    {}, {"tile": "half"}, {"aggregate": "literal", "mosaic_updates_norm": True}, {"heads": ("single",)},
    {"heads": ("multi", "cell")},
])  # fmt: skip
@pytest.mark.parametrize("cut", ["passes", "groups"])
def test_pieces_of_a_step_add_up_to_it(cut, settings):
    """Losses, top-1, weights, statistics and queues after three steps, in float64."""
    wanted, plain = three_joint_steps(**settings)
    views = dataclasses.replace(VIEWS, tile=settings.get("tile", "full"))
    settings = {name: value for name, value in settings.items() if name != "tile"}
    made, model = run_steps(cut, 3, views=views, **settings)
    passes = 1 if settings.get("heads") == ("single",) else 2
    assert len(plain.pieces) == 1 and len(model.pieces) == passes * (2 if cut == "groups" else 1)
    for one, other in zip(made, wanted, strict=True):
        for name in ("single", "multi", "cell", "total"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-12)
        assert one.top1.keys() == other.top1.keys()
        for name, value in one.top1.items():
            torch.testing.assert_close(value, other.top1[name])
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        if torch.is_tensor(value):
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10)
        else:
            assert value == expected[name]


@cache
def run_plainly(**settings):
    """20 steps in float64, and in float32."""
    return tuple(run_steps("joint", 20, dtype, lr=3e-4, **settings) for dtype in (torch.float64, torch.float32))


@pytest.mark.parametrize(("cut", "settings"), [
    ("passes", {}), ("groups", {}), ("joint", {"compiled": True, "heads": ("single",), "split_size": BATCH // 2}),
])  # fmt: skip
def test_twenty_steps_in_float32_stay_within_its_rounding(cut, settings):
    """How far rounding alone drives two runs apart is taken from the plain version in float32 against float64."""
    plainly = {name: value for name, value in settings.items() if name != "compiled"}
    (exact, best), (plain, model) = run_plainly(**plainly)
    made, ours = run_steps(cut, 20, torch.float32, lr=3e-4, **settings)

    def apart(one, other):
        return max(abs(a.total.item() - b.total.item()) for a, b in zip(one, other, strict=True))

    def distance(one, other):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        return sum((a.double() - b.double()).square().sum().item() for a, b in pairs) ** 0.5

    assert 0 < apart(plain, exact) < 0.1 and apart(made, plain) <= 3 * apart(plain, exact)
    assert distance(model, best) > 0 and distance(ours, model) <= 3 * distance(model, best)


def test_pieces_keep_fewer_activations_alive():
    """Counted by what autograd keeps for the backward pass."""

    def kept_bytes(cut):
        model, batch = make_model(dtype=torch.float32), make_batch(dtype=torch.float32)
        model = InsCon(model.config, VIEWS, BATCH, cut).train()
        prepared, most = model.prepare(batch), 0
        for piece in model.pieces:
            alive = {}

            def keep(tensor, alive=alive):
                alive[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                model(batch, prepared, piece)
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            most = max(most, sum(t.untyped_storage().nbytes() for key, t in alive.items() if key not in weights))
        return most

    joint, passes, groups = (kept_bytes(cut) for cut in ("joint", "passes", "groups"))
    assert passes < 0.6 * joint and groups < 0.6 * passes


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


@pytest.mark.parametrize("cut", ["joint", "passes", "groups"])
def test_a_step_asks_the_device_nothing(cut, monkeypatch):
    """No `.item()`, `int()`, `bool()`, `tolist()` or shape that depends on data is reached, by every operation that runs."""
    model, batch = make_model(dtype=torch.float32), make_batch(dtype=torch.float32)
    model = InsCon(model.config, VIEWS, BATCH, cut).train()
    optimizer = torch.optim.SGD(model.query_encoder.parameters(), lr=0.1, momentum=0.9, fused=True)
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
    with NobodyWaits():
        prepared = model.prepare(batch)
        for piece in model.pieces:
            model(batch, prepared, piece)[0].total.backward()
        model.enqueue(prepared.keys)
        optimizer.step()
        model.update_key_encoder()


@pytest.mark.parametrize("question", [
    lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: int(t[0]), lambda t: t[t > 0], lambda t: t.nonzero(),
])  # fmt: skip
def test_the_check_above_notices_a_question(question):
    with pytest.raises(AssertionError, match="waits for the device|by a mask"), NobodyWaits():
        question(torch.ones(3))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_step_on_a_gpu_never_waits(precision, tmp_path):
    """CUDA's own watch: any call that makes the host wait for the device is an error, in steps as the trainer takes them."""
    from inscon import train
    from inscon.config import Config, RunConfig
    from inscon.meters import LossMeter

    device = torch.device("cuda")
    config = Config(
        views=VIEWS, model=ModelConfig(arch="resnet18", queue_size=24, cell_queue_size=216, split_size=4),
        optim=OptimConfig(batch_size=BATCH, precision=precision), run=RunConfig(run_dir=tmp_path / "none"),
    )  # fmt: skip
    training = train.set_up(resolve(config, 1), device, "none")
    training.model.train()
    batch = make_batch(dtype=torch.float32)

    def moved(view):
        return View(pixels=view.pixels.cuda(), crop_box=view.crop_box.cuda(), flipped=view.flipped.cuda())

    batch = Batch(
        query=moved(batch.query), key=moved(batch.key), mosaic=batch.mosaic.cuda(), sample_ids=batch.sample_ids
    )
    meter = LossMeter()
    for _ in range(2):
        train.take_step(training, training.model, batch, 10, meter)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError):
            torch.ones(1, device="cuda").item()  # the watch is on
        for _ in range(3):
            train.take_step(training, training.model, batch, 10, meter)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(meter.read()["loss"])


# ------------------------------------------------------------------------------------------------- channels last


class ChannelsLast(TorchDispatchMode):
    """Collects maps that lie in another order than channels last where the trunk's operations take or make them, and copies."""

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


@pytest.mark.parametrize("cut", ["joint", "passes", "groups"])
def test_no_layer_leaves_channels_last(cut):
    """Forward and backward, every map that the trunk's layers take or make; weights of kernels too."""
    model, batch = make_model(dtype=torch.float32), make_batch(dtype=torch.float32)
    model = InsCon(model.config, VIEWS, BATCH, cut).to(memory_format=torch.channels_last).train()
    with ChannelsLast() as watch:
        prepared = model.prepare(batch)
        for piece in model.pieces:
            model(batch, prepared, piece)[0].total.backward()
    assert watch.seen > 300 and not watch.astray, watch.astray[:5]


def test_the_check_above_notices_another_order():
    layer = nn.Conv2d(3, 4, 3)
    with ChannelsLast() as watch:
        layer(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last).contiguous())
    assert watch.astray
