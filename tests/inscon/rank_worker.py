"""One rank of test_ranks.py: a step on its share of a fixed global batch; rank 0 writes what came out.

torchrun --nproc_per_node=2 tests/inscon/rank_worker.py OUT frozen|live|four|fp16
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from inscon import distributed
from inscon.batch import Batch, View
from inscon.config import Config, ModelConfig, OptimConfig, ViewConfig, resolve
from inscon.model import InsCon
from inscon.mosaic import assemble
from inscon.plan import plan_views
from inscon.train import over_ranks

BATCH, SIDE = 16, 64


def share_of_batch(step: int, rank: int, world_size: int) -> Batch:
    views = ViewConfig(view_size=SIDE)
    plans = plan_views(0, step, np.arange(BATCH), np.full((BATCH, 2), 300), views)
    generator = torch.Generator().manual_seed(step)
    mine = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)

    def view(plan):
        pixels = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)[mine]
        pixels = pixels.to(memory_format=torch.channels_last)
        return View(
            pixels=pixels, crop_box=torch.from_numpy(plan.crop_box)[mine], flipped=torch.from_numpy(plan.flipped)[mine]
        )

    query, key = view(plans.query), view(plans.key)
    return Batch(query=query, key=key, mosaic=assemble(query.pixels), sample_ids=torch.arange(BATCH)[mine])


def main(out: Path, mode: str) -> None:
    distributed.start()
    rank, world_size = distributed.rank(), distributed.world_size()
    config = resolve(
        Config(
            views=ViewConfig(view_size=SIDE),
            # As many images per BatchNorm group either way: a rank's share, or the split of one process
            model=ModelConfig(
                arch="resnet18",
                queue_size=2 * BATCH,
                cell_queue_size=18 * BATCH,
                split_size=4 if mode == "four" else 8,
                key_momentum=0.9,
            ),
            optim=OptimConfig(batch_size=BATCH),
        ),
        world_size,
    )
    torch.manual_seed(0)
    cut = "joint" if mode == "frozen" else "passes" if world_size > 1 else "groups"
    inscon = InsCon(config.model, config.views, BATCH // world_size, cut).double().train(mode != "frozen")
    model = over_ranks(inscon, "fp16" if mode == "fp16" else "fp32")
    optimizer = torch.optim.SGD(inscon.query_encoder.parameters(), lr=0.03, momentum=0.9)
    record = {"losses": []}
    for step in range(3):
        batch = share_of_batch(step, rank, world_size)
        prepared, losses = inscon.prepare(batch), None
        for piece in inscon.pieces:
            later = piece is not inscon.pieces[-1] and world_size > 1
            with model.no_sync() if later else contextlib.nullcontext():
                of_piece, _ = model(batch, prepared, piece)
                of_piece.total.backward()
            losses = of_piece.detach() if losses is None else losses + of_piece.detach()
        inscon.enqueue(prepared.keys)
        if step == 0:
            record["gradients"] = {n: p.grad.clone() for n, p in inscon.query_encoder.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        inscon.update_key_encoder()
        parts = {"single": losses.single, "multi": losses.multi, "cell": losses.cell, "total": losses.total}
        record["losses"].append(distributed.mean({name: value.item() for name, value in parts.items()}))
    record["weights"] = {n: p.detach() for n, p in inscon.named_parameters()}
    record["queues"] = {"single": inscon.key_queue.keys, "cell": inscon.cell_queue.keys}
    record["stop"] = distributed.any_rank(rank == world_size - 1)
    record["worst"] = distributed.worst({"rank": float(rank)})
    record["total"] = distributed.total({"rank": float(rank + 1)})
    record["union"] = distributed.union([7, rank + 1] if rank else [])
    if rank == 0:
        torch.save(record, out)
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
