"""What a training step costs, against an honest port of MoCo's code with InsCon's losses added the obvious way.

    python benchmarks/step.py --batch-size 16 --threads 2 --rounds 5 --out benchmarks/results/step_cpu.json

Contenders, each in a process of its own, so that its peak memory is its own; both in float32 on a CPU, in `--precision` on a GPU:

    naive   NCHW; the key encoder moved parameter by parameter; queues [D K] cloned for every loss, logits and their positive
            put together and given to cross_entropy; pointers in buffers, read with int(); accuracy and losses read with
            .item() every step, as MoCo's training loop does; split BatchNorm and shuffled keys as in MoCo's demo for one GPU
    ours    inscon/train.py's step with its defaults
    naive, memory kept    (on a CPU) the naive port in a process that keeps freed memory, as ours does by `keep_freed_memory`:
            what is left of the difference is the step's own

Same architecture, views, queues (full ones), batch and arithmetic type. Rounds alternate: each contender makes a few steps while
the others wait. A step is timed alone: batches are ready. Medians are reported, of wall-clock time and of processor time.
"""

import argparse
import datetime
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon import guard, train
from inscon.config import Config, LoaderConfig, ModelConfig, OptimConfig, RunConfig, ViewConfig
from inscon.host_memory import keep_freed_memory
from inscon.methods import inscon
from inscon.methods.method import resolve
from inscon.nn.pooling import precise_roi_pool
from inscon.precision import choose_precision
from inscon.report.measure import machine, versions
from pipelines import open_pipeline
from scripts.train import feed_of

TEMPERATURE = 0.2


class DemoBatchNorm(nn.BatchNorm2d):
    """Split BatchNorm as in MoCo's demo: the batch seen as one of fewer images with more channels (NCHW)."""

    def __init__(self, num_features: int, num_splits: int):
        super().__init__(num_features)
        self.num_splits = num_splits

    def forward(self, x):
        n, c, h, w = x.shape
        if not self.training:
            return super().forward(x)
        mean, variance = self.running_mean.repeat(self.num_splits), self.running_var.repeat(self.num_splits)
        outcome = F.batch_norm(
            x.view(-1, c * self.num_splits, h, w), mean, variance, self.weight.repeat(self.num_splits),
            self.bias.repeat(self.num_splits), True, self.momentum, self.eps,
        ).view(n, c, h, w)  # fmt: skip
        self.running_mean.data.copy_(mean.view(self.num_splits, c).mean(0))
        self.running_var.data.copy_(variance.view(self.num_splits, c).mean(0))
        return outcome


class NaiveEncoder(nn.Module):
    def __init__(self, backbone: str, splits: int, heads: tuple[str, ...]):
        super().__init__()
        net = torchvision.models.get_model(backbone, weights=None, norm_layer=lambda n: DemoBatchNorm(n, splits))
        features = net.fc.in_features
        self.backbone = nn.Sequential(*list(net.children())[:-2])

        def mlp(layer, out):
            return nn.Sequential(layer(features, features), nn.ReLU(), layer(features, out))

        self.single = mlp(nn.Linear, 128)
        self.multi = mlp(nn.Linear, 128) if "multi" in heads else None
        self.cell = mlp(lambda a, b: nn.Conv2d(a, b, 1), 256) if "cell" in heads else None

    def forward(self, x, box, flipped):
        maps = self.backbone(x)
        single = F.normalize(self.single(maps.mean((2, 3))), dim=1)
        if self.cell is None:
            return single, None
        cells = precise_roi_pool(maps.float(), box, 3, 1 / 32)
        cells = torch.where(flipped[:, None, None, None], cells.flip(-1), cells)
        cells = self.cell(cells).flatten(2).transpose(1, 2)
        return single, F.normalize(cells, dim=2)

    def tiles(self, mosaic):
        features = F.adaptive_avg_pool2d(self.backbone(mosaic), 2).flatten(2).transpose(1, 2)
        return F.normalize(self.multi(features), dim=2)


class Naive:
    """One step as `__call__`."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.precision = choose_precision(config.optim.precision, device)
        splits = config.optim.batch_size // config.model.split_size
        self.heads = config.method.heads
        self.encoder_q = NaiveEncoder(config.model.backbone, splits, self.heads).to(device).train()
        self.encoder_k = NaiveEncoder(config.model.backbone, splits, set(self.heads) - {"multi"}).to(device).train()
        for name, p in self.encoder_k.named_parameters():
            p.data.copy_(dict(self.encoder_q.named_parameters())[name].data)
            p.requires_grad = False
        self.queue = F.normalize(torch.randn(128, config.method.queue_size, device=device), dim=0)
        if "cell" in self.heads:
            self.cell_queue = F.normalize(torch.randn(256, config.method.cell_queue_size, device=device), dim=0)
        self.pointers = torch.zeros(2, dtype=torch.long, device=device)
        self.optimizer = torch.optim.SGD(self.encoder_q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
        self.criterion = nn.CrossEntropyLoss().to(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.needs_scaler)

    def __call__(self, batch) -> None:
        query, key, overlap = batch.views["query"], batch.views["key"], batch.overlaps["query", "key"]
        dtype = self.precision.autocast_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            q, q_cells = self.encoder_q(query.pixels, overlap.first_box, query.flipped)
            q_tiles = self.encoder_q.tiles(batch.mosaic) if "multi" in self.heads else None
            with torch.no_grad():
                for name, p_k in self.encoder_k.named_parameters():
                    p_k.data = p_k.data * 0.999 + self.encoder_q.get_parameter(name).data * 0.001
                order = torch.randperm(batch.size, device=self.device)
                back = torch.argsort(order)
                k, k_cells = self.encoder_k(key.pixels[order], overlap.second_box[order], key.flipped[order])
                k = k[back]
            terms = [self.contrast(q, k, self.queue)]
            if "multi" in self.heads:
                terms.append(self.contrast(q_tiles.flatten(0, 1), k, self.queue))
            if "cell" in self.heads:
                k_cells = k_cells[back].flatten(0, 1)
                terms.append(self.contrast(q_cells.flatten(0, 1), k_cells, self.cell_queue))
            loss = sum(value for value, _ in terms)
        for value, logits in terms:
            value.item()
            top = logits.topk(5, 1)[1].t()
            correct = top.eq(torch.zeros(1, dtype=torch.long, device=self.device))
            [correct[:n].reshape(-1).float().sum(0).item() for n in (1, 5)]
        self.enqueue(self.queue, k, 0)
        if "cell" in self.heads:
            self.enqueue(self.cell_queue, k_cells, 1)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def contrast(self, q, k, queue):
        positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", [q, queue.clone().detach().to(q.dtype)])
        logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
        return self.criterion(logits, torch.zeros(len(logits), dtype=torch.long, device=self.device)), logits

    @torch.no_grad()
    def enqueue(self, queue, keys, which):
        pointer = int(self.pointers[which])
        queue[:, pointer : pointer + len(keys)] = keys.T
        self.pointers[which] = (pointer + len(keys)) % queue.shape[1]


class Ours:
    def __init__(self, config: Config, device: torch.device):
        self.training = train.set_up(config, device, "none")
        self.training.method.train()

    def __call__(self, batch) -> None:
        train.update(self.training, batch)


class NaiveWithMemoryKept(Naive):
    def __init__(self, config: Config, device: torch.device):
        keep_freed_memory()
        super().__init__(config, device)


CONTENDERS = {"naive": Naive, "naive, memory kept": NaiveWithMemoryKept, "ours": Ours}


def work(name: str, config: Config, threads: int, device_name: str, commands) -> None:
    """A contender's process: answers each number of steps with their times (wall-clock and processor), 0 with its peak memory."""
    guard.end_with_parent()
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    layout = torch.channels_last if name == "ours" else torch.contiguous_format
    dtype = choose_precision(config.optim.precision, device).pixel_dtype if name == "ours" else torch.float32
    with open_pipeline(feed_of(config), config.loader, device=device, dtype=dtype, total_steps=1) as pipeline:
        [batch] = pipeline
    batch = in_layout(batch, layout)
    step = CONTENDERS[name](config, device)
    while steps := commands.recv():
        times = []
        for _ in range(steps):
            start, processor_start = time.perf_counter(), time.process_time()
            step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start, time.process_time() - processor_start))
        commands.send(times)
    on_device = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    commands.send(
        {
            "host_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "device_mb": on_device and on_device / 2**20,
        }
    )


def in_layout(batch, layout):
    return batch.each(lambda of: of.contiguous(memory_format=layout) if of.ndim == 4 else of)


def ratio(rounds: list[list[float]], ours: list[list[float]]) -> float:
    """Median over rounds of how many times longer a step took than ours."""
    return statistics.median(statistics.median(own) / statistics.median(our) for own, our in zip(rounds, ours))


def contend(names: list[str], config: Config, arguments: argparse.Namespace) -> tuple[dict, dict]:
    """Each contender's rounds of (wall-clock, processor) seconds a step, and its peak memory. ChildProcessError if one ends."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        settings = name, config, arguments.threads, arguments.device, theirs
        processes[name] = context.Process(target=work, args=settings, daemon=True)
        processes[name].start()
        theirs.close()  # or nobody would notice that it is closed there

    def ask(name, steps):
        try:
            pipes[name].send(steps)
            return pipes[name].recv()
        except (EOFError, ConnectionError):
            processes[name].join()
            raise ChildProcessError(
                f'the contender "{name}" ended with exit code {processes[name].exitcode}, -9 where memory ran out; what it said is '
                "above; set a smaller --batch-size if memory is short"
            ) from None

    rounds = {name: [] for name in names}
    for name in names:
        ask(name, arguments.warm_up)
    for number in range(arguments.rounds):
        for name, own in rounds.items():
            own.append(ask(name, arguments.steps))
        print(f"round {number + 1}:", {name: round(min(own[-1])[0], 3) for name, own in rounds.items()}, flush=True)
    memory = {name: ask(name, 0) for name in names}
    for process in processes.values():
        process.join()
    return rounds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--heads", nargs="+", default=["single", "multi", "cell"], help="single alone: MoCo v2")
    parser.add_argument("--view-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="per round and contender")
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step_cpu.json"))
    arguments = parser.parse_args()
    config = resolve(
        Config(
            method=inscon.Settings(heads=tuple(arguments.heads)),
            loader=LoaderConfig(pipeline="synthetic"),
            views=ViewConfig(view_size=arguments.view_size),
            model=ModelConfig(backbone=arguments.backbone, norm="split"),
            optim=OptimConfig(batch_size=arguments.batch_size, precision=arguments.precision),
            run=RunConfig(run_dir=Path("runs/benchmark")),
        ),
        1,
    )
    names = [name for name in CONTENDERS if arguments.device == "cpu" or name != "naive, memory kept"]
    rounds, memory = contend(names, config, arguments)
    wall, processor = (
        {name: [[t[which] for t in own] for own in of] for name, of in rounds.items()} for which in (0, 1)
    )
    medians = {name: statistics.median(t for own in of for t in own) for name, of in wall.items()}
    ratios = {
        f"{name} / ours": {
            "wall": ratio(wall[name], wall["ours"]),
            "processor": ratio(processor[name], processor["ours"]),
        }
        for name in names
        if name != "ours"
    }
    table = Table(title=f"a step of {arguments.backbone}, batch {arguments.batch_size}, on {arguments.device}")
    for column in ("contender", "step, s", "images/s", "peak memory, MB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, median in medians.items():
        peak = memory[name]["device_mb"] or memory[name]["host_mb"]
        table.add_row(name, f"{median:.3f}", f"{arguments.batch_size / median:.2f}", f"{peak:.0f}")
    Console().print(table)
    for name, of in ratios.items():
        print(f"{name}, medians of rounds: {of['wall']:.3f} by the clock, {of['processor']:.3f} by processor time")
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    report = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "settings": settings,
        "step_s": medians, "ratios": ratios, "memory": memory, "rounds": wall, "processor_rounds": processor,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    guard.run_script("step.py", main)
