"""BatchNorm that does not give the answer away (METHOD 13).

A query and its key normalized among the same images carry the same signature, and reading it solves the loss (MoCo, section 3.3,
"Shuffling BN"). So keys are normalized among others: over ranks by exchanging images, within one by splitting the batch.
"""

from collections.abc import Callable
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from inscon import distributed


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose statistics are taken over each of `num_groups` equal, contiguous parts of the batch; plain in eval mode.
    Running statistics follow the mean of the groups' statistics with the momentum of one update: each group updates with
    `1 - (1 - momentum)^(1/num_groups)`, which costs no further kernel."""

    def __init__(self, num_features: int, num_groups: int = 1):
        super().__init__(num_features)
        self.num_groups = num_groups

    @property
    def momentum_of_group(self) -> float:
        return 1 - (1 - self.momentum) ** (1 / self.num_groups)

    def check_divides(self, x: Tensor) -> None:
        assert x.shape[0] % self.num_groups == 0, f"{x.shape[0]} samples are no {self.num_groups} equal groups"

    def forward(self, x: Float[Tensor, "N F h w"]) -> Float[Tensor, "N F h w"]:
        if not self.training or self.num_groups == 1:
            return super().forward(x)
        momentum = self.momentum_of_group
        running = (self.running_mean, self.running_var)
        self.check_divides(x)
        self.num_batches_tracked.add_(1)
        if x.device.type == "cpu" and x.dtype == self.weight.dtype:
            return _BatchNormOfGroups.apply(x, self.weight, self.bias, *running, self.num_groups, momentum, self.eps)
        given = {"weight": self.weight, "bias": self.bias, "training": True, "momentum": momentum, "eps": self.eps}
        return torch.cat([F.batch_norm(part, *running, **given) for part in x.chunk(self.num_groups)])


class _BatchNormOfGroups(torch.autograd.Function):
    """BatchNorm of equal parts of a batch, written straight into one result: putting parts together costs a CPU a tenth of a step.
    The same kernels as `F.batch_norm` of each part, to the last bit."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, num_groups, momentum, eps):
        result, statistics = torch.empty_like(x), []
        for part, place in zip(x.chunk(num_groups), result.chunk(num_groups)):
            mean, inverse_std = x.new_empty(x.shape[1]), x.new_empty(x.shape[1])
            torch.ops.aten.native_batch_norm.out(
                part, weight, bias, running_mean, running_var, True, momentum, eps,
                out=place, save_mean=mean, save_invstd=inverse_std,
            )  # fmt: skip
            statistics += [mean, inverse_std]
        ctx.save_for_backward(x, weight, *statistics)
        ctx.eps = eps
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, *statistics = ctx.saved_tensors
        of_x, of_weight, of_bias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
        num_groups = len(statistics) // 2
        parts = (tensor.chunk(num_groups) for tensor in (x, gradient, of_x))
        for part, part_gradient, place, mean, inverse_std in zip(*parts, statistics[::2], statistics[1::2]):
            of_part, more_weight, more_bias = torch.ops.aten.native_batch_norm_backward(
                part_gradient, part, weight, None, None, mean, inverse_std, True, ctx.eps, [True, True, True]
            )
            place.copy_(of_part)
            of_weight += more_weight
            of_bias += more_bias
        return of_x, of_weight, of_bias, None, None, None, None, None


class SyncBatchNorm(_BatchNorm):
    """BatchNorm of `[N F]` or `[N F h w]` whose statistics are taken over the batches of all ranks, of equal shapes, which must all
    go forward and back. On one process, and in eval mode, it is plain BatchNorm."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # any

    def forward(self, x: Float[Tensor, "N F *hw"]) -> Float[Tensor, "N F *hw"]:
        if not self.training or distributed.world_size() == 1:
            return super().forward(x)
        result, mean, var = _BatchNormOfRanks.apply(x, self.weight, self.bias, self.eps)
        self.num_batches_tracked.add_(1)
        count = x.numel() // x.shape[1] * distributed.world_size()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return result


class _BatchNormOfRanks(torch.autograd.Function):
    """(normalized, mean, variance without Bessel's correction); the latter two without gradient. Back, with x' = (x - mean) / std
    and means over all ranks: of_x = weight / std * (g - mean(g) - x' * mean(g * x')). The gradients of weight and bias are those of
    the own batch, as all gradients are before they are averaged."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), [0, *range(2, x.ndim)], correction=0)
        means, variances = distributed.gather(torch.stack([mean, var])[None]).unbind(1)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _mean, _var):
        x, weight, mean, var = ctx.saved_tensors
        inverse_std = (var + ctx.eps).rsqrt()
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, inverse_std, True, ctx.eps, [False, True, True]
        )
        count = x.numel() // x.shape[1] * distributed.world_size()
        of_product, of_all = (distributed.sum_over_ranks(torch.stack([of_weight, of_bias])) / count).unbind()
        by_gradient = weight * inverse_std
        by_x = -by_gradient * inverse_std * of_product
        shape = (-1, *[1] * (x.ndim - 2))
        constant = (-by_gradient * of_all - by_x * mean).view(shape)
        of_x = torch.addcmul(torch.addcmul(constant, gradient, by_gradient.view(shape)), x, by_x.view(shape))
        return of_x.to(x.dtype), of_weight, of_bias, None


def sync_batch_norm(module: nn.Module, name: str) -> None:
    """Make every plain BatchNorm of `module` take its statistics over all ranks. ValueError as `split_batch_norm`."""
    remedy = "set --norm none, or another --backbone"
    for norm in _batch_norms(module, (nn.BatchNorm1d, nn.BatchNorm2d), f"of {name} cannot be synchronized", remedy):
        norm.__class__ = SyncBatchNorm  # of the same parameters, which slow copies know


def split_batch_norm(module: nn.Module, num_groups: int, name: str) -> None:
    """Make every BatchNorm of `module` take its statistics over `num_groups` parts of a batch. ValueError, with the `name` of the
    network, where there is one that is more than nn.BatchNorm2d."""
    remedy = "set --norm shuffle, on several ranks, or another --backbone"
    for norm in _batch_norms(module, (nn.BatchNorm2d,), f"of {name} cannot be split into groups", remedy):
        norm.__class__, norm.num_groups = SplitBatchNorm2d, num_groups


def _batch_norms(module: nn.Module, kinds: tuple[type, ...], refusal: str, remedy: str) -> list[nn.Module]:
    """Those that are not split yet; all of them must be of these kinds."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and not isinstance(m, SplitBatchNorm2d)]
    for norm in norms:
        if type(norm) not in kinds:
            found = f"as it is fused with something else. Found: {type(norm).__name__}"
            raise ValueError(f"BatchNorm {refusal}, {found}; {remedy}")
    return norms


class KeyShuffle(nn.Module):
    """Has keys normalized among other images than their queries were (MoCo's shuffling BN), by a fixed assignment. `norm`: "split",
    over the rank's groups of `split_size` of its `rank_batch_size` images; "shuffle", over the ranks; else keys stay."""

    def __init__(self, norm: str, rank_batch_size: int, split_size: int | None):
        super().__init__()
        order, self._counts = None, None
        if norm == "split":
            order = shuffle_order(rank_batch_size, split_size)
        elif norm == "shuffle":
            ranks = distributed.world_size(), distributed.rank()
            order, self._counts = exchange_order(rank_batch_size, *ranks)
        # On the device from the start, so that no step copies them.
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", None if order is None else order.argsort(), persistent=False)

    def forward(self, encode: Callable[..., dict[str, Tensor]], *inputs: Tensor) -> dict[str, Tensor]:
        """`encode(*inputs)`, whose inputs and outputs begin with [B], in the order of the batch: of any tensors by name."""
        if self.order is None:
            return encode(*inputs)
        if self._counts is None:
            return {name: made[self.back] for name, made in encode(*(tensor[self.order] for tensor in inputs)).items()}
        made, (send, receive) = encode(*map(self._exchange, inputs)), self._counts
        return {name: distributed.exchange(tensor, receive, send)[self.back] for name, tensor in made.items()}

    def _exchange(self, tensor: Tensor) -> Tensor:
        if tensor.ndim >= 4:  # as it lies in memory: channels last
            return distributed.exchange(tensor.movedim(-3, -1)[self.order], *self._counts).movedim(-1, -3)
        return distributed.exchange(tensor[self.order], *self._counts)


@contextmanager
def frozen_statistics(module: nn.Module):
    """While inside, forward passes of `module` leave BatchNorm's running statistics as they are (METHOD 14), though those of the
    batch still normalize: momentum is 0 meanwhile."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


def shuffle_order(batch_size: int, group_size: int) -> Int[Tensor, "B"]:
    """Which image each slot of the key pass takes: slots `[k*group_size, (k+1)*group_size)` are normalized together.

    A fixed assignment will do, since other images come in every step. An image never meets the group of its own number again (of
    two groups every second image stays, since a plain swap would bring the same ones together), and shares with its query's group
    at most ceil(group_size / max(groups - 1, 2)) images.
    """
    groups, remainder = divmod(batch_size, group_size)
    assert groups > 1 and group_size > 1 and not remainder, f"{batch_size} images are no groups of {group_size}"
    group = torch.arange(groups)[:, None]
    place = torch.arange(group_size)[None, :]
    target = (group + place) % 2 if groups == 2 else (group + 1 + place % (groups - 1)) % groups
    return target.flatten().argsort(stable=True)


def exchange_order(per_rank: int, ranks: int, rank: int) -> tuple[Int[Tensor, "B"], tuple[list[int], list[int]]]:
    """`shuffle_order` of a batch whose groups are the ranks' shares, as `rank` sees it: its images sorted by the rank that encodes
    their keys, and how many it sends to each rank and receives from each. What it receives is then in that order."""
    order = shuffle_order(per_rank * ranks, per_rank)
    destination = order.argsort()[rank * per_rank :][:per_rank] // per_rank
    origin = order[rank * per_rank :][:per_rank] // per_rank
    counts = (torch.bincount(of, minlength=ranks).tolist() for of in (destination, origin))
    return destination.argsort(stable=True), tuple(counts)
