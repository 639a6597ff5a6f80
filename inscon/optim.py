"""SGD by the fastest implementation that is really there, LARS, and the cosine schedule (Table 1)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from inscon.config import OptimConfig


def make_optimizer(parameters, config: OptimConfig, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """SGD over `parameters`, tensors or groups of them, and the name of the implementation chosen: apex, torch-fused, foreach, or
    lars.

    torch-fused and lars take their learning rate from a tensor on the device, which `set_learning_rate` fills.

    Raises ValueError if apex is asked for by name and NVIDIA's apex isn't importable on a GPU.
    """
    settings = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    parameters = parameters if config.decay_norm_and_bias else without_decay(parameters)
    chosen = "torch-fused" if config.optimizer == "auto" else config.optimizer
    if chosen in ("torch-fused", "lars"):
        settings["lr"] = torch.tensor(config.lr, device=device)
    if chosen == "lars":
        return LARS(parameters, **settings), chosen
    if chosen == "apex":
        if device.type == "cuda" and (apex_sgd := _find_apex_sgd()):
            return apex_sgd(parameters, **settings), chosen
        raise ValueError(
            "optimizer apex needs NVIDIA's apex with its CUDA extensions, on a GPU (the package named apex on PyPI is "
            f"something else). Found: none on {device.type}; set --optimizer auto"
        )
    optimizer = torch.optim.SGD(parameters, **settings, fused=chosen == "torch-fused", foreach=chosen == "foreach")
    if chosen == "torch-fused":
        _zero_missing_momentum(optimizer)
        optimizer.register_load_state_dict_post_hook(_zero_missing_momentum)
    return optimizer, chosen


def without_decay(parameters: Iterable[Tensor | dict]) -> list[dict]:
    """Groups of these tensors, or groups of them, in which vectors have no weight decay: biases, and all that BatchNorm has."""
    given = list(parameters)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    split = []
    for group in groups:
        vectors = [p for p in group["params"] if p.ndim <= 1]
        split += [{**group, "params": [p for p in group["params"] if p.ndim > 1]}]
        split += [{**group, "params": vectors, "weight_decay": 0.0}]
    return [group for group in split if group["params"]]


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled, tensor by tensor (You et al., arXiv 1708.03888, as SimCLR and BYOL have it).

        g = gradient + weight_decay * p;   v = momentum * v + trust * |p| / |g| * g;   p = p - lr * v

    The factor is 1 where |p| or |g| is 0, and for vectors: biases and all that BatchNorm has. The rate may be a tensor on the
    device, and nothing here waits for it. A gradient scaler hands over its factor and whether something overflowed: then neither
    p nor v change.
    """

    _step_supports_amp_scaling = True

    def __init__(self, parameters, lr: float | Tensor, momentum: float, weight_decay: float, trust: float = 0.001):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})
        _zero_missing_momentum(self)
        self.register_load_state_dict_post_hook(_zero_missing_momentum)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            of_group = [p for p in group["params"] if p.grad is not None]
            for weights in ([p for p in of_group if p.ndim > 1], [p for p in of_group if p.ndim <= 1]):
                if weights:
                    self._move(weights, group)

    def _move(self, weights: list[Tensor], group: dict) -> None:
        velocity, lr, momentum = [self.state[p]["momentum_buffer"] for p in weights], group["lr"], group["momentum"]
        scale, overflow = (
            getattr(self, name, None) for name in ("grad_scale", "found_inf")
        )  # of a scaler, while it steps
        gradients = [p.grad for p in weights]
        gradients = gradients if scale is None else torch._foreach_div(gradients, scale)
        steps = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        if weights[0].ndim > 1:
            lengths, of_steps = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, steps))
            factors = torch.where((lengths > 0) & (of_steps > 0), group["trust"] * lengths / of_steps, 1.0)
            for step, factor in zip(steps, factors.unbind(), strict=True):
                step.mul_(factor)
        if overflow is not None:
            sound = overflow == 0
            for step in steps:
                step.copy_(torch.where(sound, step, 0.0))
            lr, momentum = lr * sound, torch.where(sound, momentum, 1.0)
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, steps)
        torch._foreach_sub_(weights, torch._foreach_mul(velocity, lr))


def _zero_missing_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros where there is no momentum yet; the first update is the same number.

    torch's fused kernel is given buffers that nobody filled, and leaves them so where a gradient scaler found an overflow.
    """
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if optimizer.state[parameter].get("momentum_buffer") is None:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _find_apex_sgd():
    """NVIDIA's FusedSGD, or None. PyPI's unrelated `apex` has no `optimizers`; an apex built without CUDA has no amp_C."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedSGD
    except ImportError:
        return None
    return FusedSGD


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int) -> float:
    """The rate at global step `step`, from 0: lr * (1 + cos(pi * progress)) / 2, progress by whole epochs or by steps, after a
    warm-up in which it is lr * step / steps of the warm-up."""
    warm_up = config.warmup_epochs
    if step < warm_up * steps_per_epoch:
        return config.lr * step / (warm_up * steps_per_epoch)
    done = step // steps_per_epoch if config.schedule == "cosine-epoch" else step / steps_per_epoch
    return config.lr * 0.5 * (1 + math.cos(math.pi * min((done - warm_up) / (config.epochs - warm_up), 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Of the next step; where the rate is a tensor it is copied there, and nothing waits."""
    for group in optimizer.param_groups:
        if not torch.is_tensor(group["lr"]):
            group["lr"] = lr
        elif group["lr"].is_cuda:  # PyTorch keeps the pinned block until the copy is done
            group["lr"].copy_(torch.tensor(lr, pin_memory=True), non_blocking=True)
        else:
            group["lr"].fill_(lr)


def asks_the_host(optimizer: torch.optim.Optimizer, scaled: bool) -> bool:
    """Whether a step takes its learning rate from the host or, with a gradient scaler, leaves it to the host to skip an update."""
    fixed = any(not torch.is_tensor(group["lr"]) for group in optimizer.param_groups)
    return fixed or (scaled and not getattr(optimizer, "_step_supports_amp_scaling", False))
