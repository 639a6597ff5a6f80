"""AP and AR of a detector by pycocotools: twelve numbers for boxes, twelve for masks."""

import contextlib
import functools
import io
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from inscon.transfer.detection.batches import load
from inscon.transfer.detection.coco import Categories, CocoSet, decode_mask, mask_tools

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In pycocotools' order: over IoU .5 to .95, at .5, at .75, for small, medium and large objects; AR at 1, 10, 100 boxes."""


@torch.inference_mode()
def evaluate(
    model: nn.Module, data: CocoSet, kinds: tuple[str, ...], device: torch.device, amp_dtype: torch.dtype | None = None,
    workers: int = 0, advance: Callable[[], None] = lambda: None, stall_timeout: float = 600.0,
) -> dict[str, dict[str, float | None]]:  # fmt: skip
    """{"bbox": {"AP": ...}, "segm": ...} as asked in `kinds`, in percent. `advance` is called after every image."""
    mask_tools()  # missing: said before the first image
    model.eval()
    found = []
    asked = (functools.partial(data.part([position]).pixels, 0) for position in range(len(data)))
    for about, image in zip(data.images, load(asked, workers, stall_timeout), strict=True):
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            (made,) = model([image.to(device)])
        found += detections(made, about["id"], data.categories)
        advance()
    return {kind: score(data, found, kind) for kind in kinds}


def detections(made: dict[str, Tensor], image_id: int | str, categories: Categories) -> list[dict]:
    """What a detector finds in an image, in COCO's results format: x y width height, its category ids, masks as RLE."""
    ids, boxes = list(categories), made["boxes"].float().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    found = [
        {"image_id": image_id, "category_id": ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes.tolist(), made["labels"].tolist(), made["scores"].tolist(), strict=True)
    ]
    if "masks" in made:
        tools = mask_tools()
        for entry, mask in zip(found, made["masks"][:, 0], strict=True):
            entry["segmentation"] = tools.encode(np.asfortranarray((mask > 0.5).cpu().numpy().astype(np.uint8)))
    return found


def score(data: CocoSet, found: list[dict], kind: str) -> dict[str, float | None]:
    """The twelve numbers in percent of `found` (results format); None where the set has no such objects.

    `kind`: "bbox" or "segm"; sizes of found objects are then those of their boxes or of their masks.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if kind == "segm":
        found = [{name: value for name, value in entry.items() if name != "bbox"} for entry in found]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, made = COCO(), COCO()
        truth.dataset = _truth(data, kind)
        truth.createIndex()
        made.dataset = truth.dataset | {"annotations": []}
        made.createIndex()
        judged = COCOeval(truth, truth.loadRes(found) if found else made, kind)  # of none loadRes makes an IndexError
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {name: None if value < 0 else 100 * float(value) for name, value in zip(NAMES, judged.stats, strict=True)}


def _truth(data: CocoSet, kind: str) -> dict:
    """The data set as pycocotools wants it: annotations counted from 1, for it takes 0 for "not found"; crowds marked."""
    annotations = []
    for image, of_image in zip(data.images, data.annotations, strict=True):
        for annotation in of_image:
            entry = {"iscrowd": 0, **annotation, "id": len(annotations) + 1}
            annotations.append(entry if "area" in entry else entry | {"area": _area(entry, image, kind)})
    categories = [{"id": number, "name": name} for number, name in data.categories.items()]
    return {"info": {}, "images": list(data.images), "annotations": annotations, "categories": categories}


def _area(annotation: dict, image: dict, kind: str) -> float:
    if kind == "segm":
        return float(decode_mask(annotation["segmentation"], image["height"], image["width"]).sum())
    return float(annotation["bbox"][2] * annotation["bbox"][3])
