"""One rank of test_ranks.py: steps on its share of fixed global batches, or one collective after the other; rank 0 writes.

torchrun --nproc_per_node=2 tests/inscon/rank_worker.py OUT [frozen|live|four|fp16|collectives|synchronized|a method's name ...]
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inscon import distributed
from inscon.config import Config, ModelConfig, OptimConfig
from inscon.gradients import FlatGradients
from inscon.methods import byol, moco, pixpro, simclr
from inscon.methods.method import resolve
from inscon.nn.norm import KeyShuffle, sync_batch_norm
from inscon.report.flops import step_flops
from pipelines.finish import assemble
from tests.inscon.methods.steps import VIEWS, backward, logged, make_batch, small_inscon, small_rivals

BATCH = 16
STEPS = {"live": 3, "moco": 3, "fp16": 1}
"""Of training, where it isn't two."""
METHODS = {
    "moco": moco.Settings(queue_size=2 * BATCH),
    "simclr": simclr.Settings(),
    "byol": byol.Settings(hidden_dim=32, target_momentum=0.5),
    "pixpro": pixpro.Settings(hidden_dim=32, target_momentum=0.5, instance=True),
} | small_rivals(BATCH)
"""Of modes that do not train InsCon."""


def share_of_batch(settings, step, rank, world_size):
    """The images of a rank out of a batch that every rank makes alike."""
    whole = make_batch(settings, seed=step, batch=BATCH)
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    part, mosaics = whole.each(lambda of: of[mine]), settings.mosaics()
    mosaic = None if mosaics is None else assemble(part.views[mosaics.view].pixels, mosaics)
    return dataclasses.replace(part, mosaic=mosaic, sample_ids=whole.sample_ids[mine])


def steps(mode, rank, world_size):
    """Some steps of training."""
    settings = METHODS.get(mode, small_inscon(BATCH, key_momentum=0.9))
    # As many images per BatchNorm group either way: a rank's share, or the split of one process
    model = ModelConfig(backbone="test_resnet", split_size=4 if mode == "four" else 8)
    config = resolve(Config(method=settings, views=VIEWS, model=model, optim=OptimConfig(batch_size=BATCH)), world_size)
    torch.manual_seed(0)
    method = config.method.build(config, BATCH // world_size).double().train(mode != "frozen")
    if config.model.norm == "sync" and world_size > 1:
        sync_batch_norm(method, config.model.backbone)
    gradients = FlatGradients(method.parameters(), "fp16" if mode == "fp16" else "none")
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.03, momentum=0.9)
    record = {"losses": []}
    for step in range(STEPS.get(mode, 2)):
        gradients.zero()
        losses = backward(method, share_of_batch(settings, step, rank, world_size), step, 3)[1]
        gradients.average()
        if step == 0:
            record["gradients"] = {n: p.grad.clone() for n, p in method.named_parameters() if p.requires_grad}
        optimizer.step()
        method.after_update()
        of_loss = {name: value.item() for name, value in logged(losses).items() if name.startswith("loss")}
        record["losses"].append(distributed.mean(of_loss))
    record["weights"] = {n: p.detach() for n, p in method.named_parameters()}
    record["queues"] = {name: queue.keys for name, queue in method.queues.items()}
    record["statistics"] = {name: value for name, value in method.named_buffers() if "running" in name}
    return record


def seen_by(rank):
    """What one rank brings to the shuffle: tensors of every form, numbered so that rank and image can be told."""
    number = torch.arange(4.0) + 4 * rank
    pixels = (torch.arange(192.0).view(3, 8, 8) + 1000 * number.view(4, 1, 1, 1)).to(memory_format=torch.channels_last)
    patches = torch.arange(432.0).view(9, 3, 4, 4) + 1000 * number.view(4, 1, 1, 1, 1)
    patches = patches.movedim(2, -1).contiguous().movedim(-1, 2)  # as a jigsaw comes: each patch channels last
    return {
        "pixels": pixels,
        "patches": patches,
        "boxes": number[:, None] + torch.arange(4) / 8,
        "flipped": number % 3 == 0,
    }


def shuffled(rank, world_size):
    """Whether keys of any form come back as they are without a shuffle, in other company and in the same layout."""
    arrived = []

    def encode(pixels, patches, boxes, flipped):
        arrived.append({"pixels": pixels, "patches": patches, "boxes": boxes, "flipped": flipped})
        keys = {
            "pooled": pixels.double().mean((1, 2, 3))[:, None],
            "maps": pixels[:, :, ::2],
            "patches": patches.sum((3, 4)),
        }
        return keys | {"boxes": boxes.long(), "flipped": ~flipped, "three": boxes[:, None].half()}

    own = seen_by(rank)
    made, expected = KeyShuffle("shuffle", 4, None)(encode, *own.values()), encode(*own.values())
    met = arrived[0]
    return {
        "back": {name: bool(torch.equal(made[name], expected[name])) for name in expected},
        "types": all(made[name].dtype == expected[name].dtype for name in expected),
        "met": distributed.gather(met["boxes"][:, 0].contiguous()).view(world_size, -1),
        "met_alike": bool((met["pixels"][:, 0, 0, 0] / 1000 == met["boxes"][:, 0]).all())
        and bool((met["patches"][:, 0, 0, 0, 0] / 1000 == met["boxes"][:, 0]).all())
        and torch.equal(met["flipped"], met["boxes"][:, 0] % 3 == 0),
        "channels_last": {name: met[name].movedim(-3, -1).is_contiguous() for name in ("pixels", "patches")},
    }


def synced(rank, world_size):
    """BatchNorm over the ranks on their shares of random numbers: results and gradients, by the form of what is normalized."""
    record = {}
    for name, (x, gradient, norm) in to_normalize().items():
        network = nn.Sequential(norm)
        sync_batch_norm(network, name)
        share = x.chunk(world_size)[rank].detach().requires_grad_()
        made = network(share)
        made.backward(gradient.chunk(world_size)[rank])
        record[name] = {
            "made": distributed.gather(made.detach()),
            "of_x": distributed.gather(share.grad),
            "of_weight": distributed.gather(norm.weight.grad[None]).sum(0),
            "of_bias": distributed.gather(norm.bias.grad[None]).sum(0),
            "state": network.state_dict(),
            "evaluated": network.eval()(x.detach()).detach(),
            "channels_last": x.ndim < 4 or share.grad.is_contiguous(memory_format=torch.channels_last),
        }
    return record


def to_normalize():
    """(x, gradient of the result, BatchNorm) of each form, equal on every rank; x is far from 0."""
    torch.manual_seed(0)
    forms = {
        "1d": ((6, 5), nn.BatchNorm1d),
        "2d": ((4, 5, 3, 2), nn.BatchNorm2d),
        "half": ((8, 5, 3, 2), nn.BatchNorm2d),
    }
    made = {}
    for name, (shape, kind) in forms.items():
        x, gradient, norm = (
            torch.randn(shape) + 30 * torch.rand(5).view(5, *[1] * (len(shape) - 2)),
            torch.randn(shape),
            kind(5),
        )
        norm.weight.data.uniform_(0.5, 2), norm.bias.data.normal_()
        if len(shape) == 4:
            x, gradient = (t.to(memory_format=torch.channels_last) for t in (x, gradient))
        dtype = torch.bfloat16 if name == "half" else torch.float32
        made[name] = x.to(dtype), gradient.to(dtype), norm
    return made


def gathered(rank, world_size):
    """Each rank's loss weighs what all ranks brought by numbers of its own."""
    own = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_()
    everything = distributed.gather_with_gradient(own)
    (everything * torch.arange(12.0).view(4, 3) * (rank + 1)).sum().backward()
    return {"everything": everything.detach(), "gradient": distributed.gather(own.grad)}


def counted(world_size):
    """Cost of an image of a method with collectives in its step, which tensors without contents do not take part in."""
    model, optim = ModelConfig(backbone="test_resnet"), OptimConfig(batch_size=BATCH)
    return step_flops(resolve(Config(method=METHODS["simclr"], model=model, optim=optim), world_size)).trainings


def averaged(rank, compression):
    """Gradients of a small network on this rank's own numbers, averaged; one parameter is used by rank 1 alone, one by none."""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {"conv": nn.Conv2d(3, 4, 3), "one": nn.Linear(3, 2), "none": nn.Linear(3, 2), "fine": nn.Linear(3, 2)}
    )
    net.to(memory_format=torch.channels_last)["fine"].double()
    flat = FlatGradients(net.parameters(), compression)
    for number in range(2):  # the second step forgets the first
        flat.zero()
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(10 * number + rank))
        total = net["conv"](x).square().sum() + net["fine"](x[..., 0, 0].double()).square().sum()
        if rank == 1:
            total = total + net["one"](x[..., 0, 0]).square().sum()
        total.backward()
        own = {name: p.grad.clone() for name, p in net.named_parameters()}
        flat.average()
    gathered = {name: distributed.gather(value[None]) for name, value in own.items()}
    return {
        "made": {name: p.grad.clone() for name, p in net.named_parameters()},
        "own": gathered,
        "strides": all(p.grad.stride() == p.stride() for p in net.parameters()),
    }


def synchronized(rank, world_size):
    """A residual block on this rank's share of a batch, fused, with the statistics of both ranks; on one process plain, float64."""
    from inscon.nn.fused_norm import fuse  # needs Triton

    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5))
    block = torchvision.models.resnet.BasicBlock(3, 5, downsample=shortcut)
    x, weight = torch.randn(4, 3, 6, 5) + 2, torch.randn(4, 5, 6, 5)
    if world_size == 1:
        block, x, weight = block.double(), x.double(), weight.double()
    else:
        assert fuse(block, synced=True) == 1
    flat, mine = FlatGradients(block.parameters()), slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    x = x[mine].to(memory_format=torch.channels_last).requires_grad_()
    made = block(x)
    (made * weight[mine]).mean().backward()
    flat.average()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    return gradients | dict(block.named_buffers()) | {
        "made": distributed.gather(made.detach()), "of x": distributed.gather(x.grad / world_size)
    }  # fmt: skip


def collectives(rank, world_size):
    return {
        "stop": distributed.any_rank(rank == world_size - 1),
        "worst": distributed.worst({"rank": float(rank)}),
        "total": distributed.total({"rank": float(rank + 1)}),
        "shuffled": shuffled(rank, world_size),
        "synced": synced(rank, world_size),
        "gathered": gathered(rank, world_size),
        "counted": counted(world_size),
        "averaged": {compression: averaged(rank, compression) for compression in ("none", "fp16", "bf16")},
    }


def main(out: Path, modes: list[str]) -> None:
    distributed.start()
    ranks = distributed.rank(), distributed.world_size()
    others = {"collectives": collectives, "synchronized": synchronized}
    record = {mode: others[mode](*ranks) if mode in others else steps(mode, *ranks) for mode in modes}
    if ranks[0] == 0:
        torch.save(record, out)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
