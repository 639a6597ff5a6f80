"""SGD by the fastest implementation that is really there, and the cosine schedule (Table 1)."""

import math

import torch

from inscon.config import OptimConfig


def make_optimizer(parameters, config: OptimConfig, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """SGD over `parameters`, tensors or groups of them, and the name of the implementation chosen: apex, torch-fused or foreach.

    torch-fused takes its learning rate from a tensor on the device, which `set_learning_rate` fills.

    Raises ValueError if apex is asked for by name and NVIDIA's apex isn't importable on a GPU.
    """
    settings = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    chosen = "torch-fused" if config.optimizer == "auto" else config.optimizer
    if chosen == "apex":
        if device.type == "cuda" and (apex_sgd := _find_apex_sgd()):
            return apex_sgd(parameters, **settings), chosen
        raise ValueError(
            "optimizer apex needs NVIDIA's apex with its CUDA extensions, on a GPU (the package named apex on PyPI is "
            f"something else). Found: none on {device.type}; set --optimizer auto"
        )
    if chosen == "torch-fused":
        settings["lr"] = torch.tensor(config.lr, device=device)
    optimizer = torch.optim.SGD(parameters, **settings, fused=chosen == "torch-fused", foreach=chosen == "foreach")
    if chosen == "torch-fused":
        _zero_missing_momentum(optimizer)
        optimizer.register_load_state_dict_post_hook(_zero_missing_momentum)
    return optimizer, chosen


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
    """The rate at global step `step`, from 0: lr * (1 + cos(pi * progress)) / 2, progress by whole epochs or by steps."""
    done = step // steps_per_epoch if config.schedule == "cosine-epoch" else step / steps_per_epoch
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done / config.epochs, 1.0)))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def asks_the_host(optimizer: torch.optim.Optimizer, scaled: bool) -> bool:
    """Whether a step takes its learning rate from the host or, with a gradient scaler, leaves it to the host to skip an update."""
    fixed = any(not torch.is_tensor(group["lr"]) for group in optimizer.param_groups)
    return fixed or (scaled and not getattr(optimizer, "_step_supports_amp_scaling", False))
