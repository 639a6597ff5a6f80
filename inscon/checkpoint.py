"""Save, load, find the newest: everything that changes during a run, atomic, versioned, finite, loadable with weights_only.

A checkpoint is `run_dir/checkpoints/step-00001000.pt`, a plain dictionary: `version`, `step`, `model` (a method's encoders and
queues), `backbone` (its name there), `optimizer`, `scaler`, `rng`, `config`, `data` (the fingerprint of the shards).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from inscon import guard
from inscon.config import Changeable

VERSION = 2
_ELASTIC = {"max_steps", "optimizer", "graph", "precision", "gradient_compression", "norm", "split_size"}
"""May change when a run goes on, but LARS, which is another optimizer; so may all of `loader`, and of `run` all but the seed."""


def save(run_dir: Path, contents: dict, keep: int) -> Path:
    """Write `contents` (with its `step`) under its final name only when it is whole on the disk; keep the newest `keep`. What
    killed processes left unfinished goes. FloatingPointError, before anything, for weights or momentum that are not finite."""
    folder = Path(run_dir) / "checkpoints"
    if broken := not_finite(contents):
        raise FloatingPointError(f"step {contents['step']} is not saved: {broken} is not finite any more")
    path = folder / f"step-{contents['step']:08d}.pt"
    guard.remove_unfinished(folder)
    with guard.whole_file(path) as file:
        torch.save({"version": VERSION, **contents}, file)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def not_finite(contents: object) -> str | None:
    """The name of the first tensor in nested dictionaries that holds inf or NaN; waits for the device once."""
    tensors = dict(_floats(contents))
    finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist() if tensors else []
    return next((name for name, fine in zip(tensors, finite) if not fine), None)


def _floats(contents: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(contents, dict):
        for key, value in contents.items():
            yield from _floats(value, f"{name}.{key}" if name else str(key))
    elif torch.is_tensor(contents) and contents.is_floating_point():
        yield name, contents


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    return max((Path(run_dir) / "checkpoints").glob("step-*.pt"), default=None)


def load(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint without running any code that may be in it. ValueError if it isn't one of ours, or isn't finite."""
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint at {path}; give a step-*.pt file or a run folder that holds one")
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
    except (PermissionError, MemoryError, torch.OutOfMemoryError):
        raise  # which say nothing of the file
    except Exception as error:  # torch raises half a dozen types for damaged files
        if "DefaultCPUAllocator" in str(error):
            raise  # as above, of the host's memory
        raise ValueError(f"{path} can't be read as a checkpoint ({type(error).__name__}); {_without(path)}") from error
    version = contents.get("version") if isinstance(contents, dict) else None
    if version != VERSION:
        said = f"{path} is of checkpoint version {version}, this program reads {VERSION}"
        raise ValueError(f"{said}; the commit that wrote it reads it, of version 1 a8f9974")
    if broken := not_finite(contents):
        raise ValueError(f"{path} is of a run that had diverged: {broken} is not finite; {_without(path)}")
    return contents


def _without(path: Path) -> str:
    """What to do about a checkpoint that is of no use; a file that is none of ours is not to be deleted."""
    if not Path(path).name.startswith(("step-", "probe")):
        return "give a checkpoint of this program"
    before = max((other for other in Path(path).parent.glob("step-*.pt") if other < Path(path)), default=None)
    return f"delete it to go on from the one before, {before.name}" if before else "delete it to begin again"


def check_continues(contents: dict, path: Path, config: dict, data: str) -> list[str]:
    """ValueError for settings, or shards, under which a checkpoint would become another run. Returns what `run.change_on_resume`
    lets change, "lr 0.03 -> 0.01" for each setting."""
    changed = {
        (group, name): (before, now.get(name))
        for group, now in config.items()
        for name, before in contents.get("config", {}).get(group, {}).items()
        if before != now.get(name)
        and group != "loader"
        and (group != "run" or name == "seed")
        and (name not in _ELASTIC or "lars" in (before, now.get(name)))
    }
    asked = {("optim", name) for name in config["run"].get("change_on_resume", ())}
    said = [f"{'.'.join(key)} was {old!r} and is {new!r}" for key, (old, new) in changed.items() if key not in asked]
    same_data = contents.get("data") == data
    if not same_data:
        said.append(f"the data set was {contents.get('data')} and is {data}")
    if said:
        helps = same_data and {("optim", name) for name in get_args(Changeable)} >= set(changed)
        flags = " ".join(sorted(name for _, name in changed))
        raise ValueError(
            f"{path} belongs to another configuration: {'; '.join(said)}. Start with the old settings and data, "
            + (f"go on with the new ones by --change-on-resume {flags}, " if helps else "")
            + "or set another --run-dir"
        )
    return [f"{name} {old} -> {new}" for (_, name), (old, new) in changed.items()]
