"""Which tensors of a model a file of weights reaches. detectron2 trains from noise, with one line in a log, where none does."""

import json
import re
from collections.abc import Iterable

from inscon.transfer.detectron2.settings import SettingsError, telling
from inscon.transfer.export import STATISTICS

BACKBONE = re.compile(r"(^|\.)(stem|res[2-5]\.\d+)\.")
"""Names of a ResNet's tensors inside a model, wherever it keeps them: the C4 models have res5 in their head."""
EXPORT = "write it with scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl"
RUN = "run"
"""What is no format of an export but a checkpoint of a pre-training."""
DETECTOR = "set --config-file to one with {} in its name, or MODEL.WEIGHTS to an export"
WRITTEN_FOR = {
    RUN: ("a checkpoint of the pre-training", EXPORT),
    "detectron2": (
        "an export for detectron2",
        "take one of a resnet50, or set MODEL.RESNETS to the network that was trained",
    ),
}
"""Format -> what the file is, and what to do."""
NAMES = {
    r"backbone\.bottom_up\.": ("a detector with FPN", DETECTOR.format("fpn")),
    r"backbone\.res": ("a detector with C4", DETECTOR.format("c4")),
    r"backbone\.body\.": (
        "a detector of scripts/finetune_detection.py",
        "test it with scripts/finetune_detection.py --eval-only, or set MODEL.WEIGHTS to an export",
    ),
    r"layer[1-4]\.\d": ("torchvision's names", EXPORT),
}
"""How a name in it begins -> the same."""


def check_weights(file: str, model, whole: bool = False) -> str:
    """Load `file` into `model` as detectron2 does, and return a sentence of what matched.

    Raises SettingsError where that is none of the backbone or not all that is learned of it; with `whole`, for a fine-tuned
    model that is to be tested, where it is not all of the model.
    """
    if not file:
        raise SettingsError(
            "MODEL.WEIGHTS is empty, so that training would begin from noise; add MODEL.WEIGHTS r50.pkl to the command"
        )
    with telling(f"can't read {file}", EXPORT):
        held, missing, written_for = _load(file, model)
    return judge(file, held, tuple(model.state_dict()), missing, written_for, whole)


def _load(file: str, model) -> tuple[tuple[str, ...], set[str], str | None]:
    """(names in the file, names of the model that it leaves as they were, the format it was exported in)."""
    from detectron2.checkpoint import DetectionCheckpointer

    class Counting(DetectionCheckpointer):
        """Keeps what its parent logs."""

        def _load_model(self, checkpoint):
            self.held = tuple(checkpoint["model"])
            facts = checkpoint.get("inscon") or getattr(checkpoint["model"], "inscon", None)
            facts = json.loads(facts) if isinstance(facts, str) else facts or {}
            self.written_for = RUN if "config" in checkpoint else facts.get("format")
            # A run's has more than tensors.
            checkpoint["model"] = {n: v for n, v in checkpoint["model"].items() if not isinstance(v, dict)}
            self.incompatible = super()._load_model(checkpoint)
            return self.incompatible

        def _log_incompatible_keys(self, incompatible):
            pass  # the checkpointer that loads the file for training logs them

    loading = Counting(model, save_to_disk=False)
    loading.load(file, checkpointables=[])
    missing = set(loading.incompatible.missing_keys)
    # Of a file without versions PyTorch makes up the count of batches, and doesn't call it missing.
    missing |= {name for name in model.state_dict() if re.sub("num_batches_tracked$", "running_mean", name) in missing}
    return loading.held, missing, loading.written_for


def judge(
    file: str, held: Iterable[str], wanted: Iterable[str], missing: set[str], written_for: str | None = None,
    whole: bool = False,
) -> str:  # fmt: skip
    """What of the tensors `wanted` a file with the names `held` gives; SettingsError where that is not enough to begin with."""
    held, wanted = list(held), list(wanted)
    backbone = [name for name in wanted if BACKBONE.search(name)]
    lost = [name for name in backbone if name in missing]
    what, remedy = _kind_of(held, written_for)
    if len(lost) == len(backbone):
        raise SettingsError(
            f"{file} has none of the backbone's {len(backbone)} tensors, and detectron2 would train from noise. Found: "
            f"{what}, {held[0] if held else 'no tensor'} say; {remedy}"
        )
    if whole and missing:
        raise SettingsError(
            f"a test needs a whole model. Found: {file}, without {len(missing)} of its {len(wanted)} tensors, "
            f"{next(name for name in wanted if name in missing)} say; set MODEL.WEIGHTS OUTPUT_DIR/model_final.pth"
        )
    unlearned = [name for name in lost if not name.endswith(STATISTICS)]
    if unlearned:
        raise SettingsError(
            f"{file} has {len(backbone) - len(lost)} of the backbone's {len(backbone)} tensors, and the others would begin as "
            f"noise. Found: {what} without {unlearned[0]}; {remedy}"
        )
    others, rest = len(wanted) - len(backbone), "; what is left begins at random" if missing else ""
    return (
        f"{file}: {len(backbone) - len(lost)} of the backbone's {len(backbone)} tensors match, and "
        f"{others - len(missing) + len(lost)} of the other {others}{rest}."
    )


def _kind_of(held: list[str], written_for: str | None) -> tuple[str, str]:
    """What a file is, and what to do about it."""
    if written_for:
        export = (
            f"an export for {written_for}",
            "export the same run with scripts/export.py --format detectron2 --out r50.pkl",
        )
        return WRITTEN_FOR.get(written_for, export)
    found = (told for start, told in NAMES.items() if any(re.match(start, name) for name in held))
    return next(found, ("other names", EXPORT))
