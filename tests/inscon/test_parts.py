"""The small parts: mosaic, queue, BatchNorm, heads, optimizer, precision."""

import argparse
import sys
import types

import pytest
import torch
from torch import nn

from inscon.config import Config, OptimConfig, ViewConfig, resolve
from inscon.encoder import Trunk
from inscon.heads import cell_head, instance_head
from inscon.key_queue import KeyQueue
from inscon.mosaic import assemble, image_order, tile_features
from inscon.norm import SplitBatchNorm2d, exchange_order, frozen_statistics, shuffle_order
from inscon.optim import learning_rate, make_optimizer
from inscon.precision import _choose, check_architecture, check_compiling

# mosaic


def numbered(batch, side):
    return torch.arange(batch, dtype=torch.float32)[:, None, None, None].expand(batch, 3, side, side).contiguous()


def test_full_tiles_lie_ul_ur_ll_lr():
    tiles = torch.randn(8, 3, 6, 6)
    canvas = assemble(tiles)
    assert canvas.shape == (2, 3, 12, 12) and canvas.is_contiguous(memory_format=torch.channels_last)
    for m in range(2):
        corners = canvas[m, :, :6, :6], canvas[m, :, :6, 6:], canvas[m, :, 6:, :6], canvas[m, :, 6:, 6:]
        for t, corner in enumerate(corners):
            assert torch.equal(corner, tiles[4 * m + t])
    assert image_order(8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_half_tiles_put_every_image_once_in_every_corner():
    canvas, order = assemble(numbered(8, 4), "half"), image_order(8, "half")
    assert canvas.shape == (8, 3, 4, 4)
    for m in range(8):
        corners = canvas[m, 0, 0, 0], canvas[m, 0, 0, 3], canvas[m, 0, 3, 0], canvas[m, 0, 3, 3]
        assert [int(c) for c in corners] == order[m].tolist()
        assert {image // 4 for image in order[m].tolist()} == {
            m // 4
        }  # never beyond four neighbors, so never beyond a rank
    for corner in range(4):
        assert sorted(order[:, corner].tolist()) == list(range(8))


def test_half_tiles_are_the_mean_of_two_by_two():
    tiles = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(assemble(tiles, "half")[0, :, :4, :4], tiles[0].reshape(3, 4, 2, 4, 2).mean((2, 4)))


@pytest.mark.parametrize(("batch", "side", "tile", "match"), [
    (6, 4, "full", "multiple of 4. Found: 6"),
    (4, 5, "half", "even view size. Found: 5"),
    (4, 4, "third", 'tile must be "full" or "half". Found: "third"'),
])  # fmt: skip
def test_mosaics_refuse(batch, side, tile, match):
    with pytest.raises(ValueError, match=match):
        assemble(numbered(batch, side), tile)


def test_tile_features_meet_at_the_seams():
    features = assemble(torch.randn(4, 5, 7, 7))  # a 14x14 map, as res5 of a 448 px canvas
    pooled = tile_features(features)
    assert pooled.shape == (1, 4, 5)
    quadrants = features[0, :, :7, :7], features[0, :, :7, 7:], features[0, :, 7:, :7], features[0, :, 7:, 7:]
    torch.testing.assert_close(pooled[0], torch.stack([q.mean((1, 2)) for q in quadrants]))


# queue


def test_queue_is_a_ring_and_its_pointer_is_saved():
    queue = KeyQueue(6, 2)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(6))
    rows = torch.arange(20.0).view(10, 2)
    for i in range(0, 10, 2):
        queue.enqueue(rows[i : i + 2])
    assert queue.keys.tolist() == [*rows[6:10].tolist(), *rows[4:6].tolist()] and queue.pointer == 4
    other = KeyQueue(6, 2)
    other.load_state_dict(queue.state_dict())
    assert other.pointer == 4 and torch.equal(other.keys, queue.keys)
    with pytest.raises(ValueError, match="queue of 6 keys must be a multiple of the 4 keys"):
        queue.enqueue(rows[:4])


# BatchNorm


def test_split_norm_is_plain_norm_on_each_part():
    torch.manual_seed(0)
    x, split, plain = torch.randn(12, 5, 4, 4), SplitBatchNorm2d(5, num_groups=3), nn.BatchNorm2d(5)
    expected = torch.cat([plain(part) for part in x.chunk(3)])
    torch.testing.assert_close(split(x), expected)
    means = torch.stack([part.mean((0, 2, 3)) for part in x.chunk(3)])
    torch.testing.assert_close(split.running_mean, 0.1 * means.mean(0), rtol=0.1, atol=2e-3)
    x2 = torch.ones(12, 5, 4, 4) * torch.randn(5)[:, None, None]
    split.reset_running_stats()
    split(x2)
    torch.testing.assert_close(split.running_mean, 0.1 * x2[0, :, 0, 0])  # equal groups: exactly one update's momentum
    assert split.num_batches_tracked == 1
    split.eval(), plain.load_state_dict(split.state_dict())
    torch.testing.assert_close(split(x), plain.eval()(x))
    with pytest.raises(ValueError, match="multiple of 3 samples.* Found: 8"):
        split.train()(x[:8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_split_norm_are_those_of_each_part(dtype, layout):
    torch.manual_seed(0)
    x, gradient = (torch.randn(12, 5, 4, 4).to(dtype=dtype, memory_format=layout) for _ in range(2))
    split, plain = SplitBatchNorm2d(5, num_groups=3).to(dtype), nn.BatchNorm2d(5).to(dtype)
    for norm in (split, plain):
        norm.weight.data = torch.rand(5, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = split(ours), torch.cat([plain(part) for part in theirs.chunk(3)])
    assert torch.equal(y, expected) and y.is_contiguous(memory_format=layout)
    y.backward(gradient), expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad) and ours.grad.is_contiguous(memory_format=layout)
    torch.testing.assert_close(split.weight.grad, plain.weight.grad)
    torch.testing.assert_close(split.bias.grad, plain.bias.grad)
    if dtype == torch.float64:
        small = torch.randn(4, 5, 2, 2, dtype=dtype).requires_grad_()
        assert torch.autograd.gradcheck(SplitBatchNorm2d(5, num_groups=2).double(), small)


def test_frozen_statistics_leave_running_values_alone():
    trunk = Trunk("resnet18", num_groups=2).train()
    trunk(torch.randn(4, 3, 32, 32))
    before = {k: v.clone() for k, v in trunk.state_dict().items() if "running" in k}
    with frozen_statistics(trunk):
        inside = trunk(10 * torch.randn(4, 3, 32, 32))["res5"]
    assert all(torch.equal(before[k], trunk.state_dict()[k]) for k in before)
    assert inside.abs().mean() < 10  # normalized by its own statistics all the same
    trunk(torch.randn(4, 3, 32, 32))
    assert not torch.equal(before["bn1.running_mean"], trunk.state_dict()["bn1.running_mean"])


@pytest.mark.parametrize(("batch", "group"), [(256, 32), (64, 16), (32, 8), (24, 8), (16, 8), (8, 4), (12, 2)])
def test_shuffling_parts_every_query_from_its_company(batch, group):
    order = shuffle_order(batch, group)
    assert sorted(order.tolist()) == list(range(batch))
    groups = batch // group
    bound = -(-group // max(groups - 1, 2))
    for k, members in enumerate(order.view(groups, group).tolist()):
        origins = [image // group for image in members]
        assert max(origins.count(origin) for origin in origins) <= bound < group
        if groups > 2:
            assert k not in origins  # no query shares its group's number with its key


@pytest.mark.parametrize(("per_rank", "ranks"), [(32, 8), (4, 4), (8, 2), (6, 3)])
def test_what_ranks_exchange_is_the_shuffle_of_the_whole_batch(per_rank, ranks):
    """Every rank's parcels, delivered by hand, against `shuffle_order`; and no rank receives more than its share."""
    wanted = shuffle_order(per_rank * ranks, per_rank).view(ranks, per_rank)
    parcels = {}
    for sender in range(ranks):
        order, (send, _) = exchange_order(per_rank, ranks, sender)
        images = (sender * per_rank + order).split(send)
        parcels |= {(sender, to): images[to] for to in range(ranks)}
    for rank in range(ranks):
        arrived = [parcels[sender, rank] for sender in range(ranks)]
        assert [len(part) for part in arrived] == exchange_order(per_rank, ranks, rank)[1][1]
        assert torch.equal(torch.cat(arrived), wanted[rank])
        if ranks > 2:
            assert len(parcels[rank, rank]) == 0  # no query shares its group with its key


def test_shuffling_needs_two_groups():
    for batch, group in ((8, 8), (10, 4), (9, 3)):
        with pytest.raises(ValueError, match=f"Found: {batch} images in groups of {group}"):
            shuffle_order(batch, group)


# trunk and heads


def test_trunk_is_torchvisions_resnet50():
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = Trunk("resnet50").eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    assert len(state) == 318
    ours.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 64, 64)
    maps = ours(x)
    assert maps["res4"].shape == (1, 1024, 4, 4) and ours.channels == {"res4": 1024, "res5": 2048}
    torch.testing.assert_close(theirs.fc(maps["res5"].mean((2, 3))), theirs(x))


def test_heads_have_mocos_shapes():
    assert [tuple(p.shape) for p in instance_head(2048, 128, True).parameters()] == [
        (2048, 2048),
        (2048,),
        (128, 2048),
        (128,),
    ]
    assert [tuple(p.shape) for p in instance_head(2048, 128, False).parameters()] == [(128, 2048), (128,)]
    cells = cell_head(16, 8, True)
    assert cells(torch.randn(2, 16, 3, 3)).shape == (2, 8, 3, 3)
    linear = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    linear.load_state_dict({k: v.flatten(1) if v.dim() == 4 else v for k, v in cells.state_dict().items()})
    x = torch.randn(2, 16, 3, 3)
    torch.testing.assert_close(cells(x), linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


# optimizer


def test_cosine_per_epoch_and_per_step():
    per_epoch = OptimConfig(lr=1.0, epochs=4)
    assert [round(learning_rate(per_epoch, s, 10), 6) for s in (0, 9, 10, 19, 20, 30, 39)] == [
        1.0, 1.0, 0.853553, 0.853553, 0.5, 0.146447, 0.146447,
    ]  # fmt: skip
    per_step = OptimConfig(lr=1.0, epochs=4, schedule="cosine-step")
    assert learning_rate(per_step, 20, 10) == pytest.approx(0.5) and learning_rate(per_step, 5, 10) < 1.0
    assert learning_rate(per_step, 40, 10) == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["auto", "torch-fused", "foreach"])
def test_every_optimizer_is_sgd_with_momentum_and_decay(name):
    torch.manual_seed(0)
    weight = torch.randn(7, 3)
    p, velocity, expected = nn.Parameter(weight.clone()), torch.zeros(7, 3), weight.clone()
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer, chosen = make_optimizer([p, frozen], OptimConfig(lr=0.1, optimizer=name), torch.device("cpu"))
    assert chosen == ("torch-fused" if name == "auto" else name)
    for i in range(4):
        gradient = torch.randn(7, 3, generator=torch.Generator().manual_seed(i))
        p.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 1e-4 * expected
        expected = expected - 0.1 * velocity
    torch.testing.assert_close(p.data, expected)


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody filled holds NaN."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(torch.nan))


DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]  # fmt: skip


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_steps_with_an_overflow_never_were(device, loaded, poisoned):
    """torch's fused SGD under a gradient scaler, against plain SGD in float64 over the other steps. `loaded`: after the state of
    an optimizer that had no momentum yet."""
    p = nn.Parameter(torch.linspace(-1, 1, 21, device=device))
    expected, velocity = p.detach().double().cpu(), torch.zeros(21, dtype=torch.float64)
    settings = OptimConfig(lr=0.1, optimizer="torch-fused")
    optimizer, _ = make_optimizer([p], settings, torch.device(device))
    if loaded:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    scaler = torch.amp.GradScaler(device, init_scale=65536.0)
    for step in range(8):
        gradient = torch.randn(21, generator=torch.Generator().manual_seed(step))
        overflows = step in (0, 1, 4)
        scaler.scale((p * gradient.to(device)).sum()).backward()
        if overflows:
            p.grad[3] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not overflows:
            velocity = 0.9 * velocity + gradient.double() + 1e-4 * expected
            expected = expected - 0.1 * velocity
    assert scaler.get_scale() == 65536 / 8
    torch.testing.assert_close(p.detach().cpu().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_apex_equals_torchs_fused_sgd():
    from inscon.optim import _find_apex_sgd

    if _find_apex_sgd() is None:
        pytest.skip("NVIDIA's apex is not installed")
    weights = {}
    for name in ("apex", "torch-fused"):
        p = nn.Parameter(torch.linspace(-1, 1, 1000, device="cuda"))
        optimizer, chosen = make_optimizer([p], OptimConfig(lr=0.1, optimizer=name), torch.device("cuda"))
        assert chosen == name
        for i in range(20):
            p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(i)).cuda()
            optimizer.step()
        weights[name] = p.detach().cpu()
    torch.testing.assert_close(weights["apex"], weights["torch-fused"], rtol=1e-6, atol=1e-7)


def test_apex_is_refused_where_it_is_not_really_there(monkeypatch):
    with pytest.raises(ValueError, match="needs NVIDIA's apex.*set --optimizer auto"):
        make_optimizer([nn.Parameter(torch.ones(1))], OptimConfig(optimizer="apex"), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # the web toolkit of that name
    from inscon.optim import _find_apex_sgd

    assert _find_apex_sgd() is None


# benchmark


def test_a_contender_that_ends_ends_the_benchmark():
    from benchmarks.step import contend

    config = resolve(Config(views=ViewConfig(view_size=64), optim=OptimConfig(batch_size=8)), 1)
    arguments = argparse.Namespace(threads=1, device="cpu", warm_up=1, steps=1, rounds=1)
    with pytest.raises(ChildProcessError, match='"nobody" ended with exit code 1.*; set a smaller --batch-size'):
        contend(["nobody"], config, arguments)  # whose process knows of no such contender


# precision


def test_precision_by_capability():
    assert _choose("auto", None).name == "fp32" and _choose("auto", None).pixel_dtype == torch.float32
    assert _choose("auto", (7, 0)).name == "fp16" and _choose("auto", (7, 0)).needs_scaler
    assert _choose("auto", (9, 0)).name == "bf16" and not _choose("auto", (9, 0)).needs_scaler
    with pytest.raises(ValueError, match="precision fp16 needs a GPU. Found: cpu"):
        _choose("fp16", None)
    with pytest.raises(ValueError, match="needs compute capability 8.0 or newer. Found: 7.0; set --precision fp16"):
        _choose("bf16", (7, 0))


def test_compiling_is_refused_on_old_gpus():
    check_compiling(None), check_compiling((8, 0))
    with pytest.raises(
        ValueError, match="--compile needs a GPU of compute capability 8.0 or newer. Found: 7.0; set --no-compile"
    ):
        check_compiling((7, 0))


def test_builds_without_the_gpus_architecture_are_refused():
    check_architecture((8, 6), ["sm_80"], "x")
    check_architecture((9, 0), ["sm_80", "sm_90a"], "x")
    check_architecture((12, 0), ["compute_90"], "x")
    with pytest.raises(ValueError, match="holds no code for the GPU's architecture sm_70. Found: sm_75 sm_80"):
        check_architecture((7, 0), ["sm_75", "sm_80"], "2.11")
    with pytest.raises(ValueError, match="sm_90"):
        check_architecture((9, 0), ["sm_80", "sm_120"], "x")
