"""BatchNorm in groups, and who is normalized with whom."""

import copy

import pytest
import torch
from torch import nn

from inscon.nn.backbones import build_backbone
from inscon.nn.norm import (
    KeyShuffle,
    SplitBatchNorm2d,
    SyncBatchNorm,
    _BatchNormOfRanks,
    exchange_order,
    frozen_statistics,
    shuffle_order,
    split_batch_norm,
    sync_batch_norm,
)


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
    with pytest.raises(AssertionError, match="8 samples are no 3 equal groups"):
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


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm2d, (6, 5, 3, 2))])
def test_norm_over_the_ranks_is_plain_norm_on_one_process(kind, shape):
    """To the bit, and of the same parameters."""
    torch.manual_seed(0)
    plain, x = kind(5, momentum=0.2), torch.randn(shape)
    network = nn.Sequential(copy.deepcopy(plain))
    weight = network[0].weight
    sync_batch_norm(network, "mine")
    assert type(network[0]) is SyncBatchNorm and network[0].weight is weight
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    network(ours).square().sum().backward(), plain(theirs).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in network[0].state_dict().items())


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 3, 2)])
def test_gradients_of_norm_over_the_ranks_are_those_of_its_results(shape):
    torch.manual_seed(0)
    given = [torch.randn(size, dtype=torch.float64).requires_grad_() for size in (shape, (3,), (3,))]
    assert torch.autograd.gradcheck(lambda *tensors: _BatchNormOfRanks.apply(*tensors, 1e-5)[0], given)


DEVICES = ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_its_arithmetic_is_torchs(device, dtype, digits):
    """Of one rank, channels last, on either device."""
    torch.manual_seed(0)
    x, gradient = (torch.randn(8, 5, 4, 4).to(dtype=dtype, memory_format=torch.channels_last) for _ in range(2))
    plain = nn.BatchNorm2d(5).double()
    plain.weight.data.uniform_(0.5, 2)
    theirs, ours = x.double().requires_grad_(), x.to(device).requires_grad_()
    expected = plain(theirs)
    weight, bias = (p.detach().float().to(device).requires_grad_() for p in (plain.weight, plain.bias))
    made, mean, var = _BatchNormOfRanks.apply(ours, weight, bias, plain.eps)
    expected.backward(gradient.double()), made.backward(gradient.to(device))
    pairs = [(made, expected), (ours.grad, theirs.grad), (weight.grad, plain.weight.grad), (bias.grad, plain.bias.grad)]
    for one, other in [*pairs, (mean, x.double().mean((0, 2, 3))), (var, x.double().var((0, 2, 3), correction=0))]:
        torch.testing.assert_close(one.cpu().double(), other, rtol=digits, atol=digits)
    assert made.dtype == ours.grad.dtype == dtype and ours.grad.is_contiguous(memory_format=torch.channels_last)


def test_what_is_more_than_batchnorm_is_not_synchronized():
    class Fused(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="BatchNorm of mine cannot be synchronized.* Found: Fused; set --norm none"):
        sync_batch_norm(nn.Sequential(Fused(4)), "mine")
    ours = nn.Sequential(SplitBatchNorm2d(4))  # as whoever made it wants it
    sync_batch_norm(ours, "mine")
    assert type(ours[0]) is SplitBatchNorm2d


@pytest.mark.parametrize("groups", [1, 2])
def test_frozen_statistics_leave_running_values_alone(groups):
    network = build_backbone("resnet18", groups).train()
    network(torch.randn(4, 3, 32, 32))
    before = {k: v.clone() for k, v in network.state_dict().items() if "running" in k}
    with frozen_statistics(network):
        inside = network(10 * torch.randn(4, 3, 32, 32))[32]
    assert len(before) == 40 and all(torch.equal(before[k], network.state_dict()[k]) for k in before)
    assert inside.abs().mean() < 10  # normalized by its own statistics all the same
    network(torch.randn(4, 3, 32, 32))
    changed = "network.bn1.running_mean"
    assert not torch.equal(before[changed], network.state_dict()[changed])


@pytest.mark.parametrize(
    ("batch", "group"), [(256, 32), (64, 16), (32, 8), (24, 8), (16, 8), (8, 4), (12, 2), (10, 5), (27, 9)]
)
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


@pytest.mark.parametrize(("per_rank", "ranks"), [(32, 8), (4, 4), (8, 2), (6, 3), (5, 2), (9, 8)])
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
    for batch, group in ((8, 8), (10, 4), (2, 1)):
        with pytest.raises(AssertionError, match=f"{batch} images are no groups of {group}"):
            shuffle_order(batch, group)


# ------------------------------------------------------------------------------------------------- keys in any form


def encode(pixels, patches, boxes, wanted):
    """Tensors of every form that a method's keys may have, each image's from its own inputs alone."""
    return {
        "pooled": pixels.flatten(1).double().mean(1)[:, None],
        "maps": pixels[:, :, ::2, ::2],
        "patches": patches.flatten(2).sum(2),
        "boxes": boxes * 2,
        "wanted": wanted & (boxes[:, 0] > 0),
        "numbers": boxes[:, 0].long(),
    }


def inputs(batch):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
    patches = torch.randn(batch, 9, 3, 4, 4, generator=generator)
    boxes = torch.arange(batch * 4.0).view(batch, 4)
    return pixels, patches, boxes, torch.arange(batch) % 3 == 0


@pytest.mark.parametrize("norm", ["split", "sync", "none"])
def test_keys_of_any_form_come_back_in_the_order_of_the_batch(norm):
    seen, batch = [], inputs(16)

    def watched(*arrived):
        seen.append(arrived)
        return encode(*arrived)

    made = KeyShuffle(norm, 16, 4)(watched, *batch)
    for name, expected in encode(*batch).items():
        assert torch.equal(made[name], expected) and made[name].dtype == expected.dtype, name
    moved = not torch.equal(seen[0][2], batch[2])
    assert moved == (norm == "split")  # the encoder met another order
    assert all(tensor.dtype == own.dtype for tensor, own in zip(seen[0], batch, strict=True))
    if norm == "split":
        assert torch.equal(seen[0][2], batch[2][shuffle_order(16, 4)])


def test_the_assignment_is_not_in_checkpoints():
    """It follows from the settings, which may be others after a resume on other ranks."""
    assert KeyShuffle("split", 16, 4).state_dict() == {}


def test_what_is_more_than_batchnorm_is_not_split():
    fused = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="BatchNorm of mine cannot be split.* Found: BatchNorm1d; set --norm shuffle"):
        split_batch_norm(fused, 2, "mine")
