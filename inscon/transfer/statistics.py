"""BatchNorm's running statistics estimated anew over some batches ("precise BN"), without training.

During training they trail the weights by a moving average, and follow groups of 32 images; frozen use reads them.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from inscon.nn.backbones import Backbone
from inscon.transfer.export import STATISTICS


@torch.no_grad()
def estimate(backbone: Backbone, batches: Iterable[Tensor]) -> tuple[dict[str, Tensor], int]:
    """(BatchNorm's buffers by their names in `backbone.network`, number of batches): means over `batches` of pixels [B 3 S S].

    The mean of the batches' means and of their unbiased variances, as torch.nn.BatchNorm2d has it with momentum None. The
    backbone itself ends in eval mode with these statistics. Raises ValueError where there is no batch, or no BatchNorm.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        raise ValueError("the backbone has no BatchNorm whose statistics could be estimated; leave --norm-batches out")
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    backbone.train()
    count = 0
    for pixels in batches:
        backbone(pixels)
        count += 1
    backbone.eval()
    if not count:
        raise ValueError("BatchNorm's statistics need at least 1 batch. Found: 0; set --norm-batches 1 or more")
    held = backbone.network.state_dict()
    return {name: value.cpu().clone() for name, value in held.items() if name.endswith(STATISTICS)}, count
