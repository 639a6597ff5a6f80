"""The trainer: set up, then one visible loop. It takes any iterable of batches and doesn't know where they come from."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from inscon import checkpoint, distributed, guard
from inscon.batch import Batch
from inscon.clock import BACKWARD, OPTIMIZER, gradients_handed_over, part
from inscon.config import Config
from inscon.health import Health
from inscon.host_memory import keep_freed_memory
from inscon.meters import LossMeter, MetricsLog, Pace, Stopwatch, top1_of, window
from inscon.model import InsCon, Losses
from inscon.optim import learning_rate, make_optimizer, set_learning_rate
from inscon.precision import Precision, capability_of, check_compiling, check_device, choose_precision
from inscon.profiling.flops import image_flops, matrix_rate


@dataclass(kw_only=True)
class Training:
    """A run between two steps: all that changes, and what it runs on. Made by `set_up`, moved on by `train`."""

    config: Config
    device: torch.device
    precision: Precision
    model: InsCon
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    scaler: torch.amp.GradScaler
    data: str
    """Fingerprint of the data set; a checkpoint of another one is refused."""
    step: int = 0
    """Optimizer updates done."""
    changes: list[str] = field(default_factory=list)
    """What a resumed run has changed of the settings, "lr 0.03 -> 0.01"."""
    bad_samples: list[int] = field(default_factory=list)
    """Ids of the samples that no rank could use when the last checkpoint was written."""

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "config": self.config.to_dict(),
            "data": self.data,
            "bad_samples": self.bad_samples,
        }

    def load_state_dict(self, contents: dict) -> None:
        self.model.load_state_dict(contents["model"])
        # Momentum alone: learning rate, decay and implementation are this run's.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": contents["optimizer"]["state"]})
        if contents["scaler"]:  # {} where the run had none
            self.scaler.load_state_dict(contents["scaler"])
        torch.set_rng_state(contents["rng"].cpu())
        self.step = contents["step"]
        self.bad_samples = contents.get("bad_samples", [])


def set_up(config: Config, device: torch.device, data: str) -> Training:
    """Build everything a run needs from a resolved `config`, and continue from its newest checkpoint if there is one.

    Raises ValueError or CheckpointError, before any work, with the value found and what to set.
    """
    check_device(device)
    precision = choose_precision(config.optim.precision, device)
    if config.model.norm == "sync" and device.type == "cpu" and distributed.world_size() > 1:
        raise ValueError("norm=sync over several ranks needs GPUs. Found: cpu; set --norm shuffle")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 where the chip has it; boxes stay out of every product
    else:
        keep_freed_memory()  # PyTorch does so itself on a GPU
    torch.manual_seed(config.run.seed)
    model = InsCon(config.model, config.views, config.optim.batch_size // distributed.world_size(), config.optim.cut)
    if config.model.norm == "sync" and distributed.world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device=device, memory_format=torch.channels_last)
    if config.optim.compile:
        check_compiling(capability_of(device))
        for encoder in (model.query_encoder, model.key_encoder):
            encoder.trunk.compile(dynamic=False)  # views and mosaics have one size each; names in checkpoints stay
    optimizer, name = make_optimizer(model.query_encoder.parameters(), config.optim, device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.needs_scaler)
    training = Training(
        config=config, device=device, precision=precision, model=model, optimizer=optimizer, optimizer_name=name,
        scaler=scaler, data=data,
    )  # fmt: skip
    _resume(training)
    return training


def _resume(training: Training) -> None:
    config = training.config
    newest = checkpoint.latest(config.run.run_dir)
    if newest is None:
        return
    if config.run.resume == "never":
        raise ValueError(
            f"the run folder must hold no checkpoint with --resume never. Found: {newest}; "
            f"set --resume auto to go on from it, or another --run-dir"
        )
    contents = checkpoint.load(newest, training.device)
    training.changes = checkpoint.check_continues(contents, newest, config.to_dict(), training.data)
    training.load_state_dict(contents)


Monitor = Callable[[Callable[[], bool]], dict[str, float]]
"""(asks whether to leave off) -> figures of the trunk."""


class Telemetry(Protocol):
    """What a loader may say of itself."""

    def read(self) -> dict[str, float]:
        """Figures since the last reading, under names that begin with loader_."""

    def bad_samples(self) -> list[int]:
        """Ids of the samples that this rank could not use so far."""


def train(
    training: Training,
    loader: Iterable[Batch],
    steps_per_epoch: int,
    total_steps: int,
    telemetry: Telemetry | None = None,
    monitor: Monitor | None = None,
) -> bool:
    """Run steps `training.step` .. `total_steps - 1`; `loader` must start with the batch of the first of them.

    What `telemetry` reads goes into the metrics, and the bad samples it knows into the checkpoints. `monitor` evaluates the trunk
    every `eval_every` steps and at the end; its figures go into the metrics too, its time into none of them.
    On SIGTERM or Ctrl-C every rank finishes its step, leaves off an evaluation, rank 0 writes a checkpoint, and the function
    returns True. FloatingPointError for losses or weights that are not finite, which are neither saved nor evaluated.
    """
    config = training.config
    model = over_ranks(training.model, config.optim.gradient_wire).train()
    run_dir = config.run.run_dir
    _write_config(config)
    full_rate = rate_of_full_use(training)
    losses_meter, watch, pace = LossMeter(), Stopwatch(), Pace(training.device)
    health = Health(training.model, config.optim.batch_size, training.step)
    with MetricsLog(run_dir, total_steps, training.step, config.run.tensorboard) as log, guard.stop_requests() as stop:
        log.say(describe(training))
        if training.changes:
            log.say(f"Changed at step {training.step}: {', '.join(training.changes)}")
        first = True
        for step, batch in zip(range(training.step, total_steps), watch.waits(loader)):
            assert step == training.step
            if first:
                first = False
                for sentence in health.look_at_norm(batch):
                    log.warn(training.step, sentence)
                watch.restart()
            with pace.step():
                lr = take_step(training, model, batch, steps_per_epoch, losses_meter)
            finished = training.step == total_steps
            stopping = distributed.any_rank(stop.requested)
            evaluating = monitor and not stopping and (training.step % config.run.eval_every == 0 or finished)
            if training.step % config.run.log_every == 0 or finished or stopping or evaluating:
                figures = telemetry.read() if telemetry else None
                found = window(losses_meter, watch, config.optim.batch_size, lr, figures, full_rate)
                if not math.isfinite(found["loss"]):
                    raise _diverged(training, f"the loss is not finite any more. Found: {found['loss']}")
                if evaluating:
                    _check_weights(training)
                seen, warnings = health.look(training.step, top1_of(found))
                if evaluating:
                    evaluation = monitor(lambda: stop.requested)
                    stopping = distributed.any_rank(stop.requested)
                    seen |= {} if stopping else evaluation
                log.write(training.step, found | seen)
                for sentence in warnings + pace.look(found["data_wait_percent"]):
                    log.warn(training.step, sentence)
                watch.restart()  # looking and evaluating belong to no window
            stop.final = stopping or finished
            if training.step % config.run.checkpoint_every == 0 or finished or stopping:
                if telemetry:
                    training.bad_samples = distributed.union(telemetry.bad_samples())
                _save(training)
            if stopping and not finished:
                log.say(
                    f"Stopped by {stop.name}; the checkpoint of step {training.step} is in {run_dir}. Run again to go on."
                )
                return True
    return False


def rate_of_full_use(training: Training) -> float:
    """Source images/s of all ranks at the rate of bare matrix products, measured now: where MFU is 100 %."""
    flops = image_flops(training.config.model, training.config.views).step
    rate = matrix_rate(training.device, training.precision.pixel_dtype)
    return distributed.total({"rate": rate})["rate"] / flops


def take_step(
    training: Training, model: nn.Module, batch: Batch, steps_per_epoch: int, losses_meter: LossMeter
) -> float:
    """One turn of the loop, without waiting for data or looking at what came out; returns the learning rate."""
    lr = learning_rate(training.config.optim, training.step, steps_per_epoch)
    set_learning_rate(training.optimizer, lr)
    losses_meter.add(run_step(training, model, batch))
    training.step += 1
    return lr


def run_step(training: Training, model: nn.Module, batch: Batch) -> Losses:
    """One update from one batch; `model` is `training.model`, or DDP around it. Nothing here waits for the device."""
    inscon, scaler, optimizer = training.model, training.scaler, training.optimizer
    amp_dtype, losses = training.precision.autocast_dtype, None

    def autocast():
        return torch.autocast(training.device.type, amp_dtype, enabled=amp_dtype is not None)

    with autocast():
        prepared = inscon.prepare(batch)
    for piece in inscon.pieces:
        # Gradients travel once, with the last piece.
        later = piece is not inscon.pieces[-1] and model is not inscon
        with model.no_sync() if later else contextlib.nullcontext():
            with autocast():
                of_piece, _ = model(batch, prepared, piece)
            with part(BACKWARD):
                scaler.scale(of_piece.total).backward()
        losses = of_piece.detach() if losses is None else losses + of_piece.detach()
        del of_piece  # and with it the graph
    inscon.enqueue(prepared.keys)
    with part(OPTIMIZER):
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    inscon.update_key_encoder()
    return losses


def describe(training: Training) -> str:
    """One line: what runs on what."""
    c, world = training.config, distributed.world_size()
    return (
        f"InsCon {c.model.arch}, heads {' '.join(c.model.heads)}, batch {c.optim.batch_size} on {world} x "
        f"{training.device.type}, {training.precision.name}, SGD by {training.optimizer_name}, norm {c.model.norm}"
        + (f" in groups of {c.model.split_size}" if c.model.split_size else "")
        + f", queues {c.model.queue_size} and {c.model.cell_queue_size}, from step {training.step}"
    )


def over_ranks(inscon: InsCon, gradient_wire: str = "fp32", timed: bool = False) -> nn.Module:
    """DDP from outside. Buffers are not broadcast at every step: the queues are equal on all ranks by construction.

    `timed`: tells the clock when the last gradients have set out.
    """
    if distributed.world_size() == 1:
        return inscon
    model = DistributedDataParallel(inscon, broadcast_buffers=False, gradient_as_bucket_view=True)
    if timed:
        model.register_comm_hook(None, _timed(GRADIENT_HOOKS[gradient_wire]))
    elif gradient_wire != "fp32":
        model.register_comm_hook(None, GRADIENT_HOOKS[gradient_wire])
    return model


GRADIENT_HOOKS = {
    "fp32": default_hooks.allreduce_hook,
    "fp16": default_hooks.fp16_compress_hook,
    "bf16": default_hooks.bf16_compress_hook,
}
"""How gradients travel, by `gradient_wire`. DDP's own way of "fp32" is the same without Python."""


def _timed(hook):
    """The hook, telling the clock when it has sent the last bucket."""

    def timed(group, bucket):
        on_its_way = hook(group, bucket)
        if bucket.is_last():
            gradients_handed_over()
        return on_its_way

    return timed


def _save(training: Training) -> None:
    _check_weights(training)
    if distributed.rank() == 0:
        checkpoint.save(training.config.run.run_dir, training.state_dict(), training.config.run.keep_checkpoints)


def _check_weights(training: Training) -> None:
    """FloatingPointError, on all ranks, where weights, queues or momentum are not finite on one of them."""
    broken = checkpoint.not_finite(training.state_dict())
    if distributed.any_rank(broken is not None):
        raise _diverged(training, f"{broken or 'a weight of another rank'} is not finite any more")


def _diverged(training: Training, found: str) -> FloatingPointError:
    """The end of a run whose numbers are lost: what was found, the last checkpoint, and how to go on from it."""
    config, last = training.config, checkpoint.latest(training.config.run.run_dir)
    remedy = f"--lr {config.optim.lr / 2:g}"
    if last is not None:
        remedy += " --change-on-resume lr" + " --resume auto" * (config.run.resume == "never")
    if training.precision.name != "fp32":
        remedy += ", or with --precision fp32"
    kept = (
        f"the last checkpoint, {last}, is finite: go on from it" if last else "there is no checkpoint yet: begin again"
    )
    return FloatingPointError(f"{found} at step {training.step}; {kept} with {remedy}")


def _write_config(config: Config) -> None:
    if distributed.rank() == 0:
        with guard.whole_file(Path(config.run.run_dir) / "config.json") as file:
            file.write(json.dumps(config.to_dict(), indent=2).encode() + b"\n")
