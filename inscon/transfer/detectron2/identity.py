"""Whose OUTPUT_DIR it is: the weights and settings that a fine-tuning began with, so that no other one is laid over it."""

import hashlib
import json
from pathlib import Path

from inscon import guard
from inscon.transfer.detectron2.settings import SettingsError, flat

NAME = "identity.json"
"""In OUTPUT_DIR, beside detectron2's files."""
LAST = "last_checkpoint"
"""detectron2's note of what it goes on from."""
FREE = (
    "OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "SOLVER.MAX_ITER", "SOLVER.STEPS",
    "SOLVER.CHECKPOINT_PERIOD", "CUDNN_BENCHMARK", "VIS_PERIOD", "DATASETS.TEST", "INPUT.MIN_SIZE_TEST", "TEST.",
)  # fmt: skip
"""How settings begin that may change on --resume: how long, where, and how it is tested."""
ELSEWHERE = "set OUTPUT_DIR to another folder"


def identity(cfg) -> dict:
    """What a fine-tuning of `cfg` is: {"weights": file, "digest": of it, "settings": {key: value}}."""
    kept = {key: value for key, value in flat(cfg).items() if not key.startswith(FREE)}
    return {"weights": cfg.MODEL.WEIGHTS, "digest": digest(cfg.MODEL.WEIGHTS), "settings": kept}


def write_identity(cfg) -> None:
    """Say in OUTPUT_DIR, which is made, whose it is."""
    with guard.whole_file(Path(cfg.OUTPUT_DIR, NAME)) as file:
        file.write((json.dumps(identity(cfg), indent=1) + "\n").encode())


def check_output(cfg, resume: bool, eval_only: bool) -> Path | None:
    """The checkpoint in OUTPUT_DIR that `resume` goes on from, or None.

    SettingsError where OUTPUT_DIR holds another fine-tuning than this one, which would be replaced or tested in its place.
    """
    folder, weights = Path(cfg.OUTPUT_DIR), cfg.MODEL.WEIGHTS
    newest, held = newest_checkpoint(folder), _read(folder / NAME)
    if newest is None:
        return None
    whose = f"{folder} holds a fine-tuning{' of ' + held['weights'] if held else ''}"
    if not resume and not eval_only:
        raise SettingsError(f"{whose}; add --resume without MODEL.WEIGHTS to go on with it, or {ELSEWHERE}")
    if not resume and folder.resolve() not in Path(weights).resolve().parents:
        raise SettingsError(
            f"{whose}, and MODEL.WEIGHTS is from elsewhere. Found: {weights}; {ELSEWHERE}, so that one's results don't replace the "
            "other's"
        )
    if not resume:
        return None
    if not (folder / LAST).is_file() or not newest.is_file():
        raise SettingsError(
            f"{folder / LAST} must name what --resume goes on from, and names no file there; write one of its model_*.pth into it"
        )
    same = Path(weights).resolve() == newest.resolve() or (held and digest(weights) == held["digest"])
    if weights and not same:
        raise SettingsError(
            f"{whose}, which --resume takes, and MODEL.WEIGHTS is another file. Found: {weights}; leave MODEL.WEIGHTS out, or "
            f"{ELSEWHERE}"
        )
    before, now = held["settings"] if held else {}, identity(cfg)["settings"]
    changes = [f"{key} was {before[key]} and is {now[key]}" for key in before if key in now and before[key] != now[key]]
    if changes:
        raise SettingsError(
            f"{folder} holds a fine-tuning with other settings. Found: {', '.join(changes)}; set them (and --num-gpus) as they "
            f"were, or {ELSEWHERE}"
        )
    return newest


def newest_checkpoint(folder: Path) -> Path | None:
    """What detectron2 would go on from; or, without its note of that, any of its models."""
    if (folder / LAST).is_file():
        return folder / (folder / LAST).read_text().strip()
    return max(folder.glob("model_*.pth"), key=lambda path: path.stat().st_mtime, default=None)


def digest(file: str) -> str:
    """SHA-256 of a file here; of what only detectron2 can fetch (https://, detectron2://) the name itself."""
    if not Path(file).is_file():
        return file
    found = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _read(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} can't be read ({error}); remove it, or {ELSEWHERE}") from None
