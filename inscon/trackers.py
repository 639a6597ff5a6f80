"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow get the same figures under the same names. One that fails
never stops a training: it is left out from then on, and one sentence says why. One that hangs is waited for."""

import importlib.util
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from inscon import guard


def tensorboard(run_dir: Path, settings: dict, _run_id: str | None, start_step: int) -> tuple:
    """Event files in `tensorboard/`, out of which steps after the checkpoint are taken."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
    lines = [f"    {name}: {value}" for name, value in _flat(settings).items()]  # indented: Markdown's code
    writer.add_text("settings", "\n".join(lines), start_step)

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return None, log, lambda _: writer.close()


def wandb(run_dir: Path, settings: dict, run_id: str | None, _start_step: int) -> tuple:
    """A run of Weights & Biases, in `wandb/` and nowhere else unless WANDB_MODE says so."""
    from wandb import init

    run = init(
        dir=run_dir, id=run_id, resume="allow" if run_id else None, config=settings, name=run_dir.absolute().name,
        project=os.environ.get("WANDB_PROJECT", "inscon"), mode=os.environ.get("WANDB_MODE", "offline"),
    )  # fmt: skip
    return run.id, lambda step, values: run.log(values, step), lambda done: run.finish(0 if done else 1)


def mlflow(run_dir: Path, settings: dict, run_id: str | None, _start_step: int) -> tuple:
    """A run of MLflow, in the files of `mlruns/` unless MLFLOW_TRACKING_URI names a server or another store."""
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # since version 3 it wants to be asked for
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # 13 s; its own 7 take four minutes
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or (run_dir.absolute() / "mlruns").as_uri())
    if run_id is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "inscon")
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else client.create_experiment(name)
        run_id = client.create_run(experiment, run_name=run_dir.absolute().name).info.run_id
        client.log_batch(run_id, params=[Param(name, value) for name, value in _flat(settings).items()])
    client.update_run(run_id, "RUNNING")

    def log(step: int, values: dict[str, float]) -> None:
        now_ms = int(1e3 * time.time())
        client.log_batch(run_id, [Metric(name, value, now_ms, step) for name, value in values.items()])

    return run_id, log, lambda done: client.set_terminated(run_id, "FINISHED" if done else "KILLED")


TRACKERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}
"""Each returns the id of its run to go on with, if any, and log(step, figures) and close(whether the training is finished)."""


def check_installed(names: Iterable[str]) -> None:
    """ValueError, with what to install, for a tracker whose package isn't. A mere folder of that name, as wandb makes, is none."""
    for name in names:
        if getattr(importlib.util.find_spec(name), "origin", None) is None:
            raise ValueError(f"--tracker {name} needs a package: pip install 'inscon[{name}]', or leave {name} out")


class Trackers:
    """Those named; if `start_step` is not 0, each in the run it had. Steps up to `logged_step`, which W&B and MLflow have of it and
    cannot take back, stay as they were. `say` prints a line."""

    def __init__(self, names: Iterable[str], run_dir: Path, settings: dict, start_step: int, logged_step: int, say):
        self._say, self._open = say, {}
        for name in dict.fromkeys(names):
            self._attempt(name, self._start, name, run_dir, settings, start_step, logged_step)

    def _start(self, name: str, run_dir: Path, settings: dict, start_step: int, logged_step: int) -> None:
        kept = run_dir / f"{name}-run-id"
        before = kept.read_text() if start_step and kept.exists() else None
        run_id, log, close = TRACKERS[name](run_dir, settings, before, start_step)
        self._open[name] = log, close, logged_step if before else 0
        if run_id != before:
            with guard.whole_file(kept) as file:
                file.write(run_id.encode())

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, (log, _, logged_step) in list(self._open.items()):
            if step > logged_step:
                self._attempt(name, log, step, values)

    def close(self, finished: bool) -> None:
        for name, (_, close, _) in list(self._open.items()):
            self._attempt(name, close, finished)

    def _attempt(self, name: str, action: Callable[..., object], *arguments) -> None:
        try:
            action(*arguments)
        except Exception as error:  # whatever a package of others raises
            self._open.pop(name, None)
            found = f"{type(error).__name__}: {guard.sentence_of(error)}"
            self._say(f"{name} gets nothing from here on, the training goes on without it ({found})")


def _flat(settings: dict[str, dict]) -> dict[str, str]:
    """By names like "optim.lr"."""
    return {f"{group}.{name}": str(value) for group, values in settings.items() for name, value in values.items()}
