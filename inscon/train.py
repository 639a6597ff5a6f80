"""The trainer: set up, then one visible loop. It takes any iterable of batches and any method, and knows neither."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from inscon import checkpoint, distributed, guard
from inscon.batch import Batch
from inscon.clock import AFTER_UPDATE, BACKWARD, OPTIMIZER, PREPARE, WIRE, forward, part
from inscon.config import Config
from inscon.gradients import FlatGradients
from inscon.graph import CudaGraphs, GraphedStep, NotCaptured
from inscon.health import Health
from inscon.host_memory import keep_freed_memory
from inscon.meters import LossMeter, MetricsLog, Pace, Stopwatch, window
from inscon.methods.method import Method
from inscon.nn.norm import sync_batch_norm
from inscon.optim import asks_the_host, learning_rate, make_optimizer, set_learning_rate
from inscon.precision import Precision, choose_precision
from inscon.report.flops import matrix_rate, step_flops
from inscon.trackers import check_installed

SEARCHED = 3
"""Algorithms that cuDNN tries for a convolution, those first that it expects to be fast. On an H200 the search among ten took 1.3 s
longer and made no step faster."""


@dataclass(kw_only=True)
class Training:
    """A run between two steps: all that changes, and what it runs on. Made by `set_up`, moved on by `train`."""

    config: Config
    device: torch.device
    precision: Precision
    method: Method
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    gradients: FlatGradients
    scaler: torch.amp.GradScaler
    data: str
    """Fingerprint of the data set; a checkpoint of another one is refused."""
    step: int = 0
    """Optimizer updates done."""
    changes: Sequence[str] = ()
    """What a resumed run has changed of the settings, "lr 0.03 -> 0.01"."""
    losses: LossMeter = field(default_factory=LossMeter)
    """Of the steps since they were read last."""
    graph: GraphedStep | None = None
    """None: the host launches the kernels of every step."""

    def close(self) -> None:
        """Forget what was captured, for which NCCL would wait at the end of a process; another step begins anew."""
        if self.graph is not None:
            self.graph.forget()

    def state_dict(self) -> dict:
        return {
            "step": self.step,
            "model": self.method.state_dict(),
            "backbone": next(n for n, module in self.method.named_modules() if module is self.method.backbone.network),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": torch.get_rng_state(),
            "config": self.config.to_dict(),
            "data": self.data,
        }

    def load_state_dict(self, contents: dict) -> None:
        self.method.load_state_dict(contents["model"])
        # Momentum alone: learning rate, decay and implementation are this run's.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": contents["optimizer"]["state"]})
        if contents["scaler"]:  # {} where the run had none
            self.scaler.load_state_dict(contents["scaler"])
        torch.set_rng_state(contents["rng"].cpu())
        self.step = contents["step"]


def set_up(config: Config, device: torch.device, data: str) -> Training:
    """Build everything a run needs from a resolved `config`, and continue from its newest checkpoint if there is one.

    Raises ValueError, before any work, with the value found and what to set.
    """
    check_installed(config.run.tracker)
    precision, world = choose_precision(config.optim.precision, device), distributed.world_size()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.benchmark_limit = True, SEARCHED
        torch.set_float32_matmul_precision("high")  # TF32 where the chip has it; boxes stay out of every product
    else:
        keep_freed_memory()  # PyTorch does so itself on a GPU
    torch.manual_seed(config.run.seed)
    method = config.method.build(config, config.optim.batch_size // world)
    synced = config.model.norm == "sync" and world > 1
    if device.type == "cuda":
        fuse_kernels(method, device, precision.autocast_dtype or torch.float32, synced)
    if synced:
        sync_batch_norm(method, config.model.backbone)
    method = method.to(device=device, memory_format=torch.channels_last)
    optimizer, name = make_optimizer(method.param_groups(), config.optim, device)
    training = Training(
        config=config, device=device, precision=precision, method=method, optimizer=optimizer, optimizer_name=name,
        gradients=FlatGradients(method.parameters(), config.optim.gradient_compression),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.needs_scaler), data=data,
    )  # fmt: skip
    if newest := checkpoint.latest(config.run.run_dir):
        contents = checkpoint.load(newest, device)
        training.changes = checkpoint.check_continues(contents, newest, config.to_dict(), data)
        training.load_state_dict(contents)
    if device.type == "cuda" and config.optim.graph == "auto":
        training.graph = _graph(training)
    return training


def _graph(training: Training) -> GraphedStep | None:
    """For the steps on a GPU; None, and why, where the optimizer cannot be in one."""
    if not asks_the_host(training.optimizer, training.scaler.is_enabled()):
        return GraphedStep(CudaGraphs())
    guard.say_once(
        f"the step is no CUDA graph, the host launches its kernels: SGD by {training.optimizer_name} takes the learning rate from "
        "there; set --optimizer torch-fused"
    )
    return None


def fuse_kernels(method: Method, device: torch.device, dtype: torch.dtype, synced: bool) -> None:
    """Have `method`, which will be on `device`, normalize maps of `dtype`, add and cut off at once, and pool, where the devices of
    all ranks run these kernels, or say why not. Names and tensors stay as they are. `synced`: with the statistics of all ranks."""
    try:
        from inscon.nn import fused_norm, fused_pool  # need Triton, which is not everywhere

        reasons = {"BatchNorm": fused_norm.refusal(device, dtype), "pooling": fused_pool.refusal(device, dtype)}
    except ImportError as error:
        reasons = dict.fromkeys(("BatchNorm", "pooling"), str(error))
    for name, reason in reasons.items():
        if distributed.any_rank(reason is not None):  # ranks must exchange the same things
            why = reason or "on another rank"
            guard.say_once(f"the {name} kernels do not serve on {device} ({why}); PyTorch's own ones take longer")
        elif name == "BatchNorm":
            fused_norm.fuse(method, synced)
        else:
            fused_pool.fuse(method)


def train(
    training: Training, loader: Iterable[Batch], steps_per_epoch: int, total_steps: int,
    telemetry: Callable[[], dict[str, float]] | None = None,
    monitor: Callable[[Callable[[], bool]], dict[str, float]] | None = None,
) -> bool:  # fmt: skip
    """Run steps `training.step` .. `total_steps - 1`; `loader` must start with the batch of the first of them.

    What `telemetry` returns, figures of the loader since its last call, goes into the metrics. So do those of `monitor`, which
    evaluates the backbone every `eval_every` steps and at the end and is given what says whether to leave off; its time goes into
    none. On SIGTERM, SIGUSR1 or Ctrl-C every rank finishes its step, leaves off an evaluation, rank 0 writes a checkpoint, and True
    is returned. FloatingPointError for losses or weights that are not finite, which are neither saved nor evaluated.
    """
    config = training.config
    training.method.train()
    if distributed.rank() == 0:
        with guard.whole_file(Path(config.run.run_dir, "config.json")) as file:
            file.write((json.dumps(config.to_dict(), indent=2) + "\n").encode())
    rate = distributed.total({"rate": matrix_rate(training.device, training.precision.pixel_dtype)})["rate"]
    full_rate = rate / step_flops(config).per_image  # source images/s of bare matrix products: where MFU is 100 %
    watch, pace = Stopwatch(training.device), Pace(training.device)
    health = Health(training.method, training.step, config.model.norm)
    log = MetricsLog(config.run.run_dir, total_steps, training.step, config.run.tracker, config.to_dict())
    with guard.stop_requests() as stop, contextlib.closing(training), contextlib.closing(log):
        log.say(describe(training))
        for step, batch in zip(range(training.step, total_steps), watch.waits(loader)):
            assert step == training.step
            with pace.step():
                lr = take_step(training, batch, steps_per_epoch)
            finished = training.step == total_steps
            stopping = distributed.any_rank(stop.requested)
            evaluating = monitor and not stopping and (training.step % config.run.eval_every == 0 or finished)
            if training.step % config.run.log_every == 0 or finished or stopping or evaluating:
                figures = telemetry() if telemetry else None
                found = window(training.losses, watch, config.optim.batch_size, lr, figures, full_rate)
                if not math.isfinite(found["loss"]):
                    raise _diverged(training, f"the loss is not finite any more. Found: {found['loss']}")
                seen, warnings = health.look(training.step, found)
                if evaluating:
                    _check_weights(training)
                    evaluation = monitor(lambda: stop.requested)
                    stopping = distributed.any_rank(stop.requested)
                    seen |= {} if stopping else evaluation
                log.write(training.step, found | seen)
                for sentence in warnings + pace.look(found["data_wait_percent"]):
                    log.warn(training.step, sentence)
                watch.restart()  # looking and evaluating belong to no window
            stop.final = stopping or finished
            if training.step % config.run.checkpoint_every == 0 or finished or stopping:
                _check_weights(training)
                if distributed.rank() == 0:
                    checkpoint.save(config.run.run_dir, training.state_dict(), config.run.keep_checkpoints)
            if stopping and not finished:
                where = f"the checkpoint of step {training.step} is in {config.run.run_dir}"
                log.say(f"Stopped by {stop.name}; {where}. Run again to go on.")
                return True
    return False


def take_step(training: Training, batch: Batch, steps_per_epoch: int) -> float:
    """One turn of the loop, without waiting for data or looking at what came out; returns the learning rate."""
    config = training.config
    lr = learning_rate(config.optim, training.step, steps_per_epoch)
    set_learning_rate(training.optimizer, lr)
    training.method.schedule(training.step, config.optim.epochs * steps_per_epoch)
    update(training, batch)
    training.step += 1
    return lr


def update(training: Training, batch: Batch) -> None:
    """`run_step`, as a graph where there is one; its figures are added up."""

    def step(batch: Batch) -> None:
        training.losses.add(run_step(training, batch))

    if training.graph is not None:
        try:
            return training.graph(step, batch)
        except NotCaptured as reason:
            guard.say_once(
                f"the step is no CUDA graph, the host launches its kernels: {reason}; --graph off does not try"
            )
            training.graph = None
            _forget_half_a_step(training)
    step(batch)


def _forget_half_a_step(training: Training) -> None:
    """What the gradient scaler has noted on the host, and has told the optimizer, in a step that never was."""
    scaler = torch.amp.GradScaler(training.device.type, enabled=training.scaler.is_enabled())
    if scaler.is_enabled():
        scaler.load_state_dict(training.scaler.state_dict())
    training.scaler = scaler
    for name in ("grad_scale", "found_inf"):
        vars(training.optimizer).pop(name, None)


def run_step(training: Training, batch: Batch) -> dict[str, torch.Tensor]:
    """One update from one batch; its losses and figures by name. Nothing here waits for the device."""
    method, scaler, optimizer = training.method, training.scaler, training.optimizer
    amp_dtype, found = training.precision.autocast_dtype, {}

    def autocast():
        return torch.autocast(training.device.type, amp_dtype, enabled=amp_dtype is not None)

    training.gradients.zero()
    with part(PREPARE), autocast():
        prepared = method.prepare(batch)
    for piece in method.pieces(batch, prepared):
        with part(forward(piece.name)), autocast():
            losses = piece.losses()
        with part(BACKWARD):
            scaler.scale(losses.total).backward()
        found = found | losses.logged | {"loss": found.get("loss", 0) + losses.total.detach()}
        del losses  # and with it the graph
    with part(WIRE):
        training.gradients.average()
        method.after_backward(prepared)
    with part(OPTIMIZER):
        scaler.step(optimizer)
        scaler.update()
    with part(AFTER_UPDATE):
        method.after_update()
    return found


def describe(training: Training) -> str:
    """One line: what runs on what, and what a resumed run has changed."""
    c = training.config
    return (
        f"{c.to_dict()['method']['name']} with {c.model.backbone}, batch {c.optim.batch_size} on {distributed.world_size()} x "
        f"{training.device.type}, {training.precision.name}, SGD by {training.optimizer_name}, norm {c.model.norm}, "
        f"{'' if training.graph is None else 'a CUDA graph per step, '}from step {training.step}"
        + (f". Changed: {', '.join(training.changes)}" if training.changes else "")
    )


def _check_weights(training: Training) -> None:
    """FloatingPointError, on all ranks, where weights, queues or momentum are not finite on one of them."""
    broken = checkpoint.not_finite(training.state_dict())
    if distributed.any_rank(broken is not None):
        raise _diverged(training, f"{broken or 'a weight of another rank'} is not finite any more")


def _diverged(training: Training, found: str) -> FloatingPointError:
    """The end of a run whose numbers are lost: what was found, the last checkpoint, and how to go on from it."""
    config, last = training.config, checkpoint.latest(training.config.run.run_dir)
    advice = f"there is no checkpoint yet: begin again with --lr {config.optim.lr / 2:g}"
    if last:
        advice = f"the last checkpoint, {last}, is finite: go on from it with --lr {config.optim.lr / 2:g} --change-on-resume lr"
    if training.precision.name != "fp32":
        advice += ", or with --precision fp32"
    return FloatingPointError(f"{found} at step {training.step}; {advice}")
