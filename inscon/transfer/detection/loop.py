"""Fine-tuning and judging: SGD, warm-up, two steps down; AP and AR by pycocotools. What is drawn depends on the seed alone, so a
stopped run goes on as if nothing had been. A folder receives `checkpoints/step-*.pt`, enough to build the detector again, and
`metrics.jsonl`."""

import contextlib
import io
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_tools
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.progress import track
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection import FasterRCNN
from torchvision.ops._utils import split_normalization_params

from inscon import checkpoint, guard
from inscon.meters import LossMeter, MetricsLog, Stopwatch, window
from inscon.optim import set_learning_rate
from inscon.precision import Precision
from inscon.transfer.detection.coco import CocoSet
from inscon.transfer.detection.models import Design, Protocol, build

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In pycocotools' order: over IoU .5 to .95, at .5, at .75, for small, medium and large objects; AR at 1, 10, 100 boxes."""
Batch = list[tuple[Tensor, dict[str, Tensor]]]  # Images [3 H W] in 0..1, each with its target of `CocoSet.target`.


def lr_at(protocol: Protocol, iteration: int) -> float:
    """Proportional to the batch size, a tenth after 2/3 and after 8/9 of the iterations, at the start linear from a thousandth."""
    lr = protocol.base_lr * protocol.batch_size / 16
    lr *= 0.1 ** sum(iteration >= round(share * protocol.iterations) for share in (2 / 3, 8 / 9))
    warmup = min(protocol.warmup, protocol.iterations // 10)
    return lr * (0.001 + 0.999 * iteration / warmup) if iteration < warmup else lr


class FineTuning:
    """A fine-tuning between two iterations; `iteration` is the next one, counted from 0. `model`: (images, targets) -> losses by
    name. Goes on from what is in `folder`; ValueError if that is of another run."""

    def __init__(self, model: nn.Module, design: Design, data: CocoSet, folder: Path, precision: Precision):
        self.model, self.design, self.data, self.folder, self.precision = model, design, data, Path(folder), precision
        self.device = next(model.parameters()).device
        norms, others = split_normalization_params(model)  # norms are not decayed, as in detectron2
        groups = [{"params": others, "weight_decay": 1e-4}, {"params": norms, "weight_decay": 0.0}]
        self.optimizer = torch.optim.SGD(groups, lr=design.base_lr, momentum=0.9)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.needs_scaler)
        self._parts = {"model": model, "optimizer": self.optimizer, "scaler": self.scaler}
        self.iteration = 0
        if path := checkpoint.latest(self.folder):
            held = _read(path, self.device)
            if other := [name for name, value in asdict(design).items() if held["design"][name] != value]:
                raise ValueError(f"{path} has another {' and '.join(other)}; set another --out, or the old settings")
            for name, part in self._parts.items():
                part.load_state_dict(held[name])
            self.iteration = held["step"]

    def train(self, checkpoint_every: int = 1000, log_every: int = 20, workers: int = 4) -> str | None:
        """The iterations that are left. On SIGTERM, SIGUSR1 or Ctrl-C it finishes one, writes a checkpoint and returns its name.
        FloatingPointError for losses or weights that are not finite, which are not saved."""
        left = range(self.iteration, self.design.iterations)
        losses, watch = LossMeter(), Stopwatch(self.device)
        log = MetricsLog(self.folder, left.stop, left.start)
        loaded = batches(self.data, self.design, left.start, workers)
        with guard.stop_requests() as asked, contextlib.closing(loaded):
            for iteration, batch in zip(left, watch.waits(loaded)):
                losses.add(self.step(iteration, batch))
                done = self.iteration = iteration + 1
                stopping = asked.requested
                last = asked.final = stopping or done == left.stop
                if done % log_every == 0 or last:
                    log.write(done, window(losses, watch, self.design.batch_size, lr_at(self.design, iteration)))
                if done % checkpoint_every == 0 or last:
                    held = {name: part.state_dict() for name, part in self._parts.items()}
                    checkpoint.save(self.folder, {"step": done, "design": asdict(self.design), **held}, keep=2)
                if stopping:
                    return asked.name
        return None

    def step(self, iteration: int, batch: Batch) -> dict[str, Tensor]:
        """One iteration; its losses by name and `loss`, their sum. FloatingPointError for a loss that is not finite."""
        torch.manual_seed((self.design.seed << 32) + iteration)  # of the sizes and boxes that torchvision draws
        self.model.train()
        if self.design.frozen:
            self.model.backbone.body.eval()
        set_learning_rate(self.optimizer, lr_at(self.design, iteration))
        images, targets = zip(*tree_map_only(Tensor, lambda value: value.to(self.device), batch))
        amp_dtype = self.precision.autocast_dtype
        with torch.autocast(self.device.type, amp_dtype, enabled=amp_dtype is not None):
            losses = self.model(images, targets)
        loss = sum(losses.values())
        if not math.isfinite(loss.item()):
            found = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            raise FloatingPointError(f"the loss is not finite any more. Found: {found} at iteration {iteration}")
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss, **losses}


def batches(data: CocoSet, design: Design, start: int, workers: int) -> Iterator[Batch]:
    """That of each iteration from `start` on."""

    def make(draws: list[tuple[int, bool]]) -> Batch:
        images = [data.images[position] for position, _ in draws]
        made = [(data.pixels(image), data.target(image, design.has_masks)) for image in images]
        return [flip(*pair) if flipped else pair for pair, (_, flipped) in zip(made, draws)]

    size = design.batch_size
    drawn = itertools.islice(draws(design.seed, len(data.images)), start * size, design.iterations * size)
    return ahead(make, iter(lambda: list(itertools.islice(drawn, size)), []), workers)


def draws(seed: int, count: int) -> Iterator[tuple[int, bool]]:
    """Positions among `count` images, and whether each is flipped, for ever: every epoch in a new order."""
    for epoch in itertools.count():
        rng = np.random.default_rng([seed, epoch])
        yield from zip(rng.permutation(count).tolist(), (rng.random(count) < 0.5).tolist())


def flip(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Image [3 H W], boxes and masks, left to right."""
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    width = image.shape[-1]
    masks = {"masks": target["masks"].flip(-1)} if "masks" in target else {}
    return image.flip(-1), target | {"boxes": torch.stack([width - x1, y0, width - x0, y1], 1)} | masks


def ahead(make: Callable, asked: Iterable, workers: int) -> Iterator:
    """`make` of each of `asked`, in order, made by `workers` threads while others are used. Raises what it raises."""
    asked = iter(asked)
    with ThreadPoolExecutor(workers) as pool:
        made = deque(pool.submit(make, one) for one in itertools.islice(asked, workers))
        while made:
            yield made.popleft().result()
            made.extend(pool.submit(make, one) for one in itertools.islice(asked, 1))


def load_detector(folder: Path, device: torch.device | str = "cpu") -> tuple[FasterRCNN, Design, int]:
    """The newest detector of a fine-tuning's folder, in eval mode, and its iterations; `models.build` says how to use it."""
    held = _read(checkpoint.latest(folder) or Path(folder) / "checkpoints/step-*.pt", device)
    design = Design(**held["design"])
    model = build(design, device=device)
    model.load_state_dict(held["model"], strict=True)
    return model.eval(), design, held["step"]


def _read(path: Path, device: torch.device | str) -> dict:
    held = checkpoint.load(path, device)
    design = {"frozen": False, **held.get("design", {})}  # which older ones do not say
    if set(design) != {field.name for field in fields(Design)}:
        raise ValueError(f"{path} is no detector that this version fine-tuned; set another --out")
    return held | {"design": design}


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: CocoSet, kinds: tuple[str, ...], amp_dtype: torch.dtype | None = None, workers: int = 4
) -> dict[str, dict[str, float | None]]:
    """{"bbox": {"AP": ...}, "segm": ...} as asked in `kinds`, in percent."""
    device, found = next(model.parameters()).device, []
    model.eval()
    loaded = zip(data.images, ahead(data.pixels, data.images, workers), strict=True)
    for about, image in track(loaded, "judging", len(data.images), transient=True):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            (made,) = model([image.to(device)])
        found += detections(made, about["id"], list(data.categories))
    return {kind: score(data, found, kind) for kind in kinds}


def detections(made: dict[str, Tensor], image_id: int, categories: list[int]) -> list[dict]:
    """What a detector finds in an image, in COCO's results format: x y width height, its category ids, masks as RLE."""
    boxes = made["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    found = [
        {"image_id": image_id, "category_id": categories[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), made["labels"].tolist(), made["scores"].tolist(), strict=True)
    ]
    for entry, mask in zip(found, made.get("masks", ())):
        entry["segmentation"] = mask_tools.encode(np.asfortranarray((mask[0] > 0.5).cpu().numpy().astype(np.uint8)))
    return found


def score(data: CocoSet, found: list[dict], kind: str) -> dict[str, float | None]:
    """The twelve numbers in percent of `found` (results format); None where the set has no such objects. `kind`: "bbox" or "segm",
    by which objects have their sizes."""
    if kind == "segm":
        found = [{name: value for name, value in entry.items() if name != "bbox"} for entry in found]
    with contextlib.redirect_stdout(io.StringIO()):
        made = data.truth.loadRes(found) if found else COCO()  # of none loadRes makes an IndexError
        judged = COCOeval(data.truth, made, kind)
        judged.params.imgIds = [image["id"] for image in data.images]
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(NAMES, judged.stats, strict=True)}
