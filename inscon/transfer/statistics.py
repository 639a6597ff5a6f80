"""BatchNorm's running statistics estimated anew over some batches ("precise BN"), without training.

During training they trail the weights by a moving average, and follow groups of 32 images; frozen use reads them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from inscon.encoder import Trunk


@torch.no_grad()
def estimate(trunk: Trunk, batches: Iterable[Tensor]) -> tuple[dict[str, Tensor], int]:
    """(the trunk's BatchNorm buffers by name, number of batches): plain means over `batches` of pixels [B 3 S S].

    The mean of the batches' means and of their unbiased variances, as torch.nn.BatchNorm2d has it with momentum None. The
    trunk itself ends in eval mode with these statistics. Raises ValueError where there is no batch.
    """
    norms = [module for module in trunk.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, getattr(norm, "num_groups", 1)) for norm in norms]
    count = 0
    trunk.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.num_groups = None, 1
    for pixels in batches:
        trunk(pixels)
        count += 1
    for norm, (momentum, num_groups) in zip(norms, before, strict=True):
        norm.momentum, norm.num_groups = momentum, num_groups
    trunk.eval()
    if not count:
        raise ValueError("BatchNorm's statistics need at least 1 batch. Found: 0; set --norm-batches 1 or more")
    ends = ("running_mean", "running_var", "num_batches_tracked")
    return {name: value.cpu().clone() for name, value in trunk.state_dict().items() if name.endswith(ends)}, count
