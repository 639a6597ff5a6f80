"""Save, load, find the newest: everything that changes during a run, atomic, versioned, loadable with weights_only.

A checkpoint is `run_dir/checkpoints/step-00001000.pt`, a plain dictionary: `version`, `step`, `model` (both encoders, both
queues and their pointers), `optimizer`, `scaler`, `rng`, `config`, `data` (the fingerprint of the shards).
"""

import os
from pathlib import Path

import torch

VERSION = 1
_ELASTIC = {
    "optim": {"max_steps", "optimizer", "precision", "cut", "gradient_wire", "compile"},
    "model": {"norm", "split_size"},
}
"""Settings that may change between a run and its continuation; so may all of `loader` but the order, of `run` but the seed."""


class CheckpointError(ValueError):
    """A checkpoint that can't be continued from; the message says why and what to do."""


def save(run_dir: Path, contents: dict, keep: int) -> Path:
    """Write `contents` (with its `step`) under its final name only when it is whole on the disk; keep the newest `keep`."""
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{contents['step']:08d}.pt"
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        torch.save({"version": VERSION, **contents}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    for old in _all(run_dir)[:-keep]:
        old.unlink()
    return path


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    found = _all(run_dir)
    return found[-1] if found else None


def _all(run_dir: Path) -> list[Path]:
    return sorted((Path(run_dir) / "checkpoints").glob("step-*.pt"))


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint without running any code that may be in it. Raises CheckpointError if it isn't one of ours."""
    if not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint at {path}; give a step-*.pt file or a run folder that holds one")
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for damaged files
        raise CheckpointError(
            f"{path} can't be read as a checkpoint ({type(error).__name__}); delete it to go on from the one before"
        ) from error
    version = contents.get("version") if isinstance(contents, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{path} is of checkpoint version {version}, this program reads {VERSION}; use the release that wrote it"
        )
    return contents


def check_continues(contents: dict, path: Path, config: dict, data: str) -> None:
    """Refuse to continue a checkpoint with settings, or shards, under which it would become another run."""
    differences = [
        f"{group}.{name} was {before!r} and is {now.get(name)!r}"
        for group, now in config.items()
        for name, before in contents["config"].get(group, {}).items()
        if _matters(group, name) and before != now.get(name)
    ]
    if contents["data"] != data:
        differences.append(f"the data set was {contents['data']} and is {data}")
    if differences:
        raise CheckpointError(
            f"{path} belongs to another configuration: {'; '.join(differences)}. "
            f"Start with the old settings, or set another --run-dir"
        )


def _matters(group: str, name: str) -> bool:
    if group == "loader":
        return name == "shuffle_window"
    return name == "seed" if group == "run" else name not in _ELASTIC.get(group, ())
