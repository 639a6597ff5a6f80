"""Small batches, small methods and steps as the protocol has them, for the tests of methods."""

from collections.abc import Sequence

import numpy as np
import timm
import torch

from inscon.batch import Batch, View
from inscon.config import Config, ModelConfig, OptimConfig, ViewConfig
from inscon.geometry import Overlap
from inscon.methods import densecl, detco, infomin, inscon, resim
from inscon.methods.method import Losses, Method, MethodSettings, resolve
from inscon.plan import plan_views
from pipelines.finish import assemble

SIDE, BATCH = 64, 8
VIEWS = ViewConfig(view_size=SIDE, overlap_min_side=8.0)


def make_config(settings, batch=BATCH, views=VIEWS, **model) -> Config:
    """For one rank. Queues hold three batches."""
    if model.get("norm", "split") == "split":
        model.setdefault("split_size", 4)
    optim = OptimConfig(batch_size=batch)
    return resolve(
        Config(method=settings, views=views, model=ModelConfig(**{"backbone": "resnet18", **model}), optim=optim), 1
    )


def make_method(settings, seed=0, dtype=torch.float64, **config) -> Method:
    config = make_config(settings, **config)
    torch.manual_seed(seed)
    return config.method.build(config, config.optim.batch_size).to(dtype).train()


def timms(backbone) -> torch.nn.Module:
    """timm's own test_resnet, pooling included, of the weights of ours, in float64."""
    network = timm.create_model("test_resnet", num_classes=0).double()
    network.load_state_dict({name: value.clone() for name, value in backbone.network.state_dict().items()})
    return network.train()


def small_inscon(batch=BATCH, **settings) -> inscon.Settings:
    cells = settings.get("cell_grid", 3) ** 2
    return inscon.Settings(**{"queue_size": 3 * batch, "cell_queue_size": 3 * cells * batch, **settings})


def small_rivals(batch=BATCH) -> dict[str, MethodSettings]:
    """The other methods with queues, by name: patches of 16 px, and every loss from the first step on."""
    queue, jigsaw = {"queue_size": 3 * batch, "key_momentum": 0.9}, {"jigsaw_size": 51, "patch_size": 16}
    return {
        "densecl": densecl.Settings(**queue, dense_from_step=0),
        "resim": resim.Settings(**queue, pyramid_dim=16),
        "detco": detco.Settings(**queue, **jigsaw),
        "infomin": infomin.Settings(**queue, **jigsaw),
    }


def make_batch(settings, seed=0, batch=BATCH, dtype=torch.float64, views=VIEWS) -> Batch:
    """Views whose images share content, so that a leak would have something to find; boxes of a real plan."""
    specs, mosaics = settings.view_specs(views), settings.mosaics()
    plan = plan_views(seed, 0, np.arange(batch), np.full((batch, 2), 300), specs)
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(batch, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    made = {}
    for spec in specs:
        own, lead = plan.views[spec.name], (batch, spec.count) if spec.grid else (batch,)
        noise = torch.randn(batch * spec.count, 3, spec.side, spec.side, generator=generator, dtype=torch.float64)
        shown = content.repeat_interleave(spec.count, 0)[..., : spec.side, : spec.side] + 0.5 * noise
        whole = (slice(None), 0) if spec.grid else slice(None)  # the patches of an image share the crop
        made[spec.name] = View(
            pixels=shown.to(dtype, memory_format=torch.channels_last).unflatten(0, lead),
            crop_box=torch.from_numpy(own.crop_box[whole]),
            flipped=torch.from_numpy(own.flipped[whole] != 0),
        )
    overlaps = {
        pair: Overlap(
            first_box=torch.from_numpy(o.first_box),
            second_box=torch.from_numpy(o.second_box),
            weight=torch.from_numpy(o.weight),
        )
        for pair, o in plan.overlaps.items()
    }
    mosaic = None if mosaics is None else assemble(made[mosaics.view].pixels, mosaics)
    return Batch(views=made, overlaps=overlaps, mosaic=mosaic, sample_ids=torch.arange(batch))


def backward(method: Method, batch: Batch, step=0, total_steps=10) -> tuple[object, dict[str, Losses]]:
    """The first half of a step, up to the optimizer: (what was prepared, losses by piece)."""
    method.schedule(step, total_steps)
    prepared, losses = method.prepare(batch), {}
    for piece in method.pieces(batch, prepared):
        losses[piece.name] = piece.losses()
        losses[piece.name].total.backward()
    method.after_backward(prepared)
    return prepared, losses


def take_steps(method: Method, batches: Sequence[Batch], lr=0.05) -> list[dict[str, Losses]]:
    """Whole steps by plain SGD: the losses of each."""
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], lr=lr, momentum=0.9, weight_decay=1e-4
    )
    seen = []
    for step, batch in enumerate(batches):
        seen.append(backward(method, batch, step, len(batches))[1])
        optimizer.step()
        optimizer.zero_grad()
        method.after_update()
    return seen


def logged(losses: dict[str, Losses]) -> dict[str, torch.Tensor]:
    """Figures of all pieces of a step by name, and the total."""
    figures = {name: value for piece in losses.values() for name, value in piece.logged.items()}
    return figures | {"loss": torch.stack([piece.total.detach() for piece in losses.values()]).sum()}
