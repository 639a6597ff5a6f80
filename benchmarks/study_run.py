"""One run of benchmarks/study.py, in a process of its own: trained by scripts/train.py, then judged, maybe with a fault planted.

Its folder receives log.txt, run/ (of the training), backbone.pth (with BatchNorm's statistics estimated anew over training crops),
and result.json, whose figures, in percent, are written one by one: what is there is not computed again.
"""

import functools
import json
import os
from pathlib import Path

import torch

from inscon import guard
from inscon.methods.inscon import InsCon
from inscon.methods.method import KeyMethod
from inscon.nn.backbones import TORCHVISION, facts_of
from inscon.nn.norm import SplitBatchNorm2d
from inscon.transfer import knn
from scripts import export, finetune_detection, linear, train
from scripts.knn import KnnConfig, open_frozen

LEFT = 3
"""Exit status of what was stopped and is to be gone on from."""
NEIGHBORS = 20
DETECTION = {"arch": "fasterrcnn-fpn", "batch_size": 4, "base_lr": 0.16, "min_size": (96,), "rois": 16, "proposals": 30,
             "workers": 1}  # fmt: skip


def keys_from_query() -> None:
    """Keys are the query encoder's."""
    KeyMethod.encode_keys = lambda self, batch: self.shuffle(self.query_encoder, *self.key_inputs(batch))


def no_shuffle() -> None:
    """BatchNorm sees a query and its key among the same images: one group, no shuffle."""
    begin = KeyMethod.__init__

    def without_groups(self, *arguments, **named):
        begin(self, *arguments, **named)  # the key encoder is copied from the query encoder later
        self.shuffle.order = self.shuffle.back = None
        for module in self.modules():
            if isinstance(module, SplitBatchNorm2d):
                module.num_groups = 1

    KeyMethod.__init__ = without_groups


def cells_off_by_one() -> None:
    """The key's cells lie one cell to the right of the query's."""
    begin = InsCon.key_inputs

    def misplaced(self, batch):
        pixels, box, flipped = begin(self, batch)
        cell = (box[:, 2:3] - box[:, 0:1]) / self.settings.cell_grid
        return pixels, box + cell * box.new_tensor([1, 0, 1, 0]), flipped

    InsCon.key_inputs = misplaced


PLANTS = {"keys-from-query": keys_from_query, "no-shuffle": no_shuffle, "cells-off-by-one": cells_off_by_one}


def results_of(job: dict) -> dict[str, float]:
    path = Path(job["folder"], "result.json")
    return json.loads(path.read_text()) if path.exists() else {}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def work(job: dict, threads: int) -> None:
    """A whole process."""
    log = os.open(Path(job["folder"], "log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    guard.end_with_parent()
    if job["plant"]:
        PLANTS[job["plant"]]()
    guard.run_script("study.py", lambda: carry_out(job, threads))


def carry_out(job: dict, threads: int) -> int:
    """Train, then every figure of `stages` that is not there yet; LEFT where it was stopped in between."""
    folder = Path(job["folder"])
    train.main([*job["flags"], "--threads", str(threads)])
    if not (folder / f"run/checkpoints/step-{job['steps']:08d}.pt").exists():
        return LEFT
    for name in job["stages"]:
        results = results_of(job)
        if name not in results:
            value = STAGES[name](job, folder, threads)
            if value is None:
                return LEFT
            with guard.whole_file(folder / "result.json") as file:
                file.write(json.dumps(results | {name: round(value, 3)}).encode())
    return 0


def monitored(job: dict, folder: Path, threads: int) -> float:
    """kNN at the end of the training, within the set that it was watched on."""
    return 100 * lines_of(folder / "run/metrics.jsonl")[-1]["knn"]


def exported(job: dict, folder: Path) -> Path:
    out, name = folder / "backbone.pth", job["backbone"]
    if not out.exists():
        form = "torchvision" if name in TORCHVISION else "timm"
        batches = 32 if facts_of(name).has_batch_norm else 0
        export.main(export.ExportConfig(
            run=folder / "run", format=form, out=out, norm_batches=batches, data=Path(job["sets"]["train"]),
            batch_size=job["batch_size"],
        ))  # fmt: skip
    return out


def sets_of(job: dict) -> dict[str, Path]:
    return {name: Path(job["sets"][name]) for name in ("train", "val")}


def neighbors(job: dict, folder: Path, threads: int) -> float:
    """Share of the held-out pictures that their neighbors among the training pictures classify."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = KnnConfig(checkpoint=exported(job, folder), threads=threads, k=NEIGHBORS, **sets_of(job))
    backbone, _, precision, sets = open_frozen(config, device, untrained=False)
    bank, rows = (knn.features(backbone, views.center_crops(), device, precision.autocast_dtype) for views in sets)
    return 100 * knn.accuracy(rows, bank, config.k, device)


def probed(job: dict, folder: Path, threads: int) -> float:
    """Top-1 of the linear probe."""
    linear.main(linear.LinearConfig(
        checkpoint=exported(job, folder), out=folder / "probe", epochs=job["probe_epochs"], threads=threads, seed=job["seed"],
        batch_size=job["batch_size"], **sets_of(job),
    ))  # fmt: skip
    return 100 * json.loads((folder / "probe/result.json").read_text())["top1"]


def detected(job: dict, folder: Path, threads: int, frozen: bool) -> float | None:
    """Box AP; None where it was stopped."""
    boxes, out = Path(job["sets"]["boxes"]), folder / ("frozen" if frozen else "full")
    finetune_detection.main(finetune_detection.DetectionConfig(
        weights=str(exported(job, folder)), out=out, train_json=boxes / "annotations.json", train_images=boxes / "train",
        val_json=boxes / "annotations_val.json", val_images=boxes / "val", iterations=job["iterations"], frozen=frozen,
        seed=job["seed"], checkpoint_every=max(job["iterations"] // 8, 1), **DETECTION,
    ))  # fmt: skip
    found = out / "results.json"
    return json.loads(found.read_text())["bbox"]["AP"] if found.exists() else None


STAGES = {
    "monitor": monitored, "knn": neighbors, "linear": probed, "frozen": functools.partial(detected, frozen=True),
    "full": functools.partial(detected, frozen=False),
}  # fmt: skip
