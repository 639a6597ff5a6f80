"""Which tensors of a model a file of weights reaches. detectron2 trains from noise, with one line in a log, where none does."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

TRUNK = re.compile(r"(^|\.)(stem|res[2-5]\.\d+)\.")
"""Names of a ResNet's tensors inside a model, wherever it keeps them: the C4 models have res5 in their head."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
EXPORT = "write it with scripts/export.py --run RUN_DIR --format detectron2 --out r50.pkl"


class WeightsError(ValueError):
    """Weights that detectron2 would ignore, or load in part; the message says what they are and what to do."""


@dataclass(frozen=True)
class Match:
    """What a file and a model have in common; names are the model's, but for `held`."""

    file: str
    held: tuple[str, ...] = field(repr=False)
    """Names in the file, as they are written there."""
    wanted: tuple[str, ...] = field(repr=False)
    missing: tuple[str, ...] = field(repr=False)
    """Those of `wanted` that the file leaves as they were."""
    written_for: str | None = None
    """The format scripts/export.py wrote it in; None for other files."""

    @property
    def trunk(self) -> tuple[int, int]:
        """Tensors of the trunk that match, and how many it has."""
        return self._matched(_trunk(self.wanted), _trunk(self.missing))

    @property
    def rest(self) -> tuple[int, int]:
        """The same of everything else in the model."""
        missing, wanted = set(_trunk(self.missing)), set(_trunk(self.wanted))
        return self._matched([n for n in self.wanted if n not in wanted], [n for n in self.missing if n not in missing])

    @staticmethod
    def _matched(wanted: list[str], missing: list[str]) -> tuple[int, int]:
        return len(wanted) - len(missing), len(wanted)

    def __str__(self) -> str:
        (trunk, of_trunk), (other, of_other) = self.trunk, self.rest
        rest = "; what is left begins at random" if self.missing else ""
        return (
            f"{self.file}: {trunk} of the trunk's {of_trunk} tensors match, and {other} of the other {of_other}{rest}."
        )


def check_weights(file: str, model, whole: bool = False) -> Match:
    """Load `file` into `model` as detectron2 does, and return what matched.

    Raises WeightsError where that is none of the trunk or not all that is learned of it; with `whole`, for a fine-tuned
    model that is to be tested, where it is not all of the model.
    """
    if not file:
        raise WeightsError(
            "MODEL.WEIGHTS is empty, so that training would begin from noise; add MODEL.WEIGHTS r50.pkl to the command"
        )
    match = matched_tensors(file, model)
    judge(match, whole)
    return match


def matched_tensors(file: str, model) -> Match:
    """As `check_weights`, whatever matches. Raises WeightsError only for a file that detectron2 cannot read."""
    from detectron2.checkpoint import DetectionCheckpointer

    class Counting(DetectionCheckpointer):
        """Keeps what its parent logs."""

        def _load_model(self, checkpoint):
            tensors = checkpoint["model"]
            self.held = tuple(tensors)
            facts = checkpoint.get("inscon") or getattr(tensors, "inscon", None)
            self.written_for = (json.loads(facts) if isinstance(facts, str) else facts or {}).get("format")
            self.incompatible = super()._load_model(checkpoint)
            return self.incompatible

        def _log_incompatible_keys(self, incompatible):
            pass  # the checkpointer that loads the file for training logs them

    loading = Counting(model, save_to_disk=False)
    try:
        loading.load(file, checkpointables=[])
    except Exception as error:  # of pickle, torch, the network and the matching alike, for whatever the file may be
        raise WeightsError(
            f"detectron2 can't read {file} ({type(error).__name__}: {str(error).partition(chr(10))[0]}); {EXPORT}"
        ) from error
    wanted, missing = tuple(model.state_dict()), set(loading.incompatible.missing_keys)
    # Of a file without versions PyTorch makes up the count of batches, and doesn't call it missing.
    missing |= {name for name in wanted if re.sub("num_batches_tracked$", "running_mean", name) in missing}
    return Match(file, loading.held, wanted, tuple(name for name in wanted if name in missing), loading.written_for)


def judge(match: Match, whole: bool = False) -> None:
    """Raise WeightsError where `match` is not enough to begin with: all that is learned of the trunk, or the whole model."""
    matched, of = match.trunk
    if not matched:
        raise WeightsError(
            f"{match.file} has none of the trunk's {of} tensors, and detectron2 would train from noise. Found: "
            f"{_whose(match)}, {match.held[0] if match.held else 'no tensor'} say; {_remedy(match)}"
        )
    if whole and match.missing:
        raise WeightsError(
            f"a test needs a whole model. Found: {match.file}, without {len(match.missing)} of its {len(match.wanted)} "
            f"tensors, {match.missing[0]} say; set MODEL.WEIGHTS OUTPUT_DIR/model_final.pth"
        )
    unlearned = [name for name in _trunk(match.missing) if not name.endswith(STATISTICS)]
    if unlearned:
        raise WeightsError(
            f"{match.file} has {matched} of the trunk's {of} tensors, and the others would begin as noise. Found: "
            f"{_whose(match)} without {unlearned[0]}; {_remedy(match)}"
        )


def _trunk(names: Iterable[str]) -> list[str]:
    return [name for name in names if TRUNK.search(name)]


def _whose(match: Match) -> str:
    if match.written_for:
        return f"an export for {match.written_for}"
    if any(name.startswith("query_encoder.") for name in match.held):
        return "a checkpoint of the pre-training"
    kind = detector(match.held)
    if kind:
        return f"a detector {kind}"
    if any(re.match(r"layer[1-4]\.\d", name) for name in match.held):
        return "torchvision's names"
    return "other names"


def detector(held: Iterable[str]) -> str | None:
    """Of which kind the fine-tuned detector is whose tensors are called so; None for other files."""
    starts = {
        "backbone.bottom_up.": "with FPN",
        "backbone.res": "with C4",
        "backbone.body.": "of scripts/finetune_detection.py",
    }
    return next((kind for start, kind in starts.items() if any(name.startswith(start) for name in held)), None)


def _remedy(match: Match) -> str:
    kind = detector(match.held)
    if kind in ("with FPN", "with C4"):
        return f"set --config-file to one with {kind[5:].lower()} in its name, or MODEL.WEIGHTS to an export"
    if kind:
        return "test it with scripts/finetune_detection.py --eval-only, or set MODEL.WEIGHTS to an export"
    if match.written_for == "detectron2":
        return "take one of a resnet50, or set MODEL.RESNETS to the network that was trained"
    if match.written_for:
        return "export the same run with scripts/export.py --format detectron2 --out r50.pkl"
    return EXPORT
