"""How far each executor's pixels are from PIL's and torchvision's, operation by operation, on real JPEGs.

    python benchmarks/parity.py --data FOLDER_OF_JPEGS [--out benchmarks/results/parity.json]

The reference is pipelines/reference.py: `torchvision.transforms.functional` on PIL images. Compared with it are the
compiled tail (pipelines/kernels.py), the device tail (pipelines/color.py), DALI's own operators where they are used:
its JPEG decoder, and the crop it makes on a GPU, run on the CPU here, with the device tail behind it; the decoder of
pipelines/ffcv.py, and, for comparison, FFCV's own decoder and crop, which that one does without. Differences are in gray
levels, 0..255.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon.config import ViewConfig
from inscon.plan import BRIGHTNESS, CONTRAST, GRAY, HUE, NOTHING, SATURATION, ViewPlan, plan_views
from inscon.report.measure import versions
from pipelines import color, kernels, reference

try:
    from nvidia.dali import Pipeline as Graph
    from nvidia.dali import fn, types

    from pipelines.dali import crop_by_dali
except ModuleNotFoundError:
    Graph = None

try:
    from ffcv.libffcv import imdecode, resize_crop

    from pipelines import ffcv
except (ImportError, ValueError):  # not installed, or it does not load
    ffcv = None

SIDE = 224
ALWAYS = ViewConfig(view_size=SIDE, jitter_probability=1, gray_probability=1, blur_probability=1)
OPERATIONS = {
    "crop + resize": None,
    "flip": None,
    "brightness": BRIGHTNESS,
    "contrast": CONTRAST,
    "saturation": SATURATION,
    "hue": HUE,
    "gray": GRAY,
    "blur": None,
}
WHOLE = "whole view"
DECODE = "decode"


class Differences:
    """A histogram of absolute differences in whole gray levels."""

    def __init__(self):
        self._counts = np.zeros(256, np.int64)

    def add(self, made: np.ndarray, wanted: np.ndarray) -> None:
        self._counts += np.bincount(np.abs(made.astype(int) - wanted).ravel(), minlength=256)

    def figures(self) -> dict:
        share = np.cumsum(self._counts) / self._counts.sum()
        return {
            "mean": float(self._counts @ np.arange(256) / self._counts.sum()),
            "p99.9": int(np.searchsorted(share, 0.999)),
            "max": int(np.flatnonzero(self._counts).max()),
            "unequal": float(1 - share[0]),
        }


def only(plan: ViewPlan, operation: str) -> ViewPlan:
    """`plan` with everything left out but the crop and one operation."""
    if operation == WHOLE:
        return plan
    code = OPERATIONS[operation]
    plan.flipped = operation == "flip"
    plan.color_ops = np.where((plan.color_ops == code) & (code is not None), plan.color_ops, NOTHING)
    plan.blur_sigma = plan.blur_sigma if operation == "blur" else 0
    return plan


def render(image: np.ndarray, plan: ViewPlan, *, with_color: bool) -> np.ndarray:
    out = np.empty((len(plan), SIDE, SIDE, 3), np.uint8)
    for row, view in zip(plan.rows()[:, 0], out, strict=True):
        kernels.render_view(image, row, view, with_color)
    return out


def device_tail(crops: np.ndarray, plan: ViewPlan) -> np.ndarray:
    levels = color.jitter(torch.from_numpy(crops).float(), plan)
    return color.blur(levels, plan.blur_sigma).numpy().astype(np.uint8)


def run_dali(inputs, build) -> np.ndarray:
    """One run of a small graph on the CPU."""
    graph = Graph(batch_size=1, num_threads=1, device_id=None)
    with graph:
        graph.set_outputs(build(*fn.external_source(lambda: inputs, num_outputs=len(inputs), batch=True)))
    return np.asarray(graph.run()[0].as_array())[0]


def decode_ours(jpeg: np.ndarray, height: int, width: int) -> np.ndarray:
    """As pipelines/ffcv.py decodes."""
    out, bench = np.empty((height, width, 3), np.uint8), ffcv.Bench()
    done = ffcv._decompress(int(bench.tools[0]), jpeg.ctypes.data, jpeg.size, out.ctypes.data, width, 0, height, 0, 0)
    bench.close()
    assert done == 0
    return out


def crop_by_ffcv(pixels: np.ndarray, row: np.ndarray) -> np.ndarray:
    out, (x0, y0, x1, y1) = np.empty((SIDE, SIDE, 3), np.uint8), (int(edge) for edge in row[:4])
    resize_crop(pixels, y0, y1, x0, x1, out)
    return out[:, ::-1] if row[4] else out


def compare(paths: list[Path], epochs: int) -> dict[str, dict[str, Differences]]:
    """{executor: {operation: differences}} over all pictures, two views per picture and epoch."""
    found: dict[str, dict[str, Differences]] = {
        "kernels": {}, "color.py": {}, "DALI": {}, "ffcv.py": {}, "FFCV itself": {},
    }  # fmt: skip

    def note(executor, operation, made, wanted):
        found[executor].setdefault(operation, Differences()).add(made, wanted)

    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        pixels = np.array(image)
        jpeg = np.fromfile(path, np.uint8)
        if ffcv:
            note("ffcv.py", DECODE, decode_ours(jpeg, *pixels.shape[:2]), pixels)
            theirs = np.empty_like(pixels)
            imdecode(jpeg, theirs, *pixels.shape[:2], *pixels.shape[:2])
            note("FFCV itself", DECODE, theirs, pixels)
        if Graph:
            decoded = run_dali(
                ([jpeg],), lambda source: fn.decoders.image(source, output_type=types.RGB, adjust_orientation=False)
            )
            note("DALI", DECODE, decoded, pixels)
        for epoch in range(epochs):
            for operation, plan in plans_of(number, epoch, image):
                wanted = np.stack([np.asarray(reference.render_view(image, plan, i)) for i in range(len(plan))])
                note("kernels", operation, render(pixels, plan, with_color=True), wanted)
                if operation not in ("crop + resize", "flip"):
                    note("color.py", operation, device_tail(render(pixels, plan, with_color=False), plan), wanted)
                if Graph and operation in ("crop + resize", "flip", WHOLE):
                    inputs = [([pixels], [row]) for row in plan.rows()[:, 0]]
                    crops = np.stack(
                        [run_dali(pair, lambda a, b: crop_by_dali(a, b, ALWAYS.spec("view"))) for pair in inputs]
                    )
                    note("DALI", operation, device_tail(crops, plan), wanted)
                if ffcv and operation in ("crop + resize", "flip"):
                    note(
                        "FFCV itself",
                        operation,
                        np.stack([crop_by_ffcv(pixels, row) for row in plan.rows()[:, 0]]),
                        wanted,
                    )
    return found


def plans_of(number: int, epoch: int, image: Image.Image):
    """(operation, plan of two views) of one picture: each operation always, then views as they are in training."""
    ids, sizes = np.array([number]), np.array([[image.height, image.width]])
    for operation in (*OPERATIONS, WHOLE):
        views = ALWAYS if operation != WHOLE else ViewConfig(view_size=SIDE)
        plans = plan_views(0, epoch, ids, sizes, [views.spec("query"), views.spec("key", views.overlap("query"))]).views
        yield operation, only(np.concatenate([plans["query"], plans["key"]]).view(ViewPlan), operation)


def show(figures: dict[str, dict[str, dict]], console: Console) -> None:
    table = Table(title="absolute difference to PIL/torchvision, gray levels: mean / 99.9 % / max")
    table.add_column("operation")
    for executor in figures:
        table.add_column(executor, justify="right")
    for operation in (DECODE, *OPERATIONS, WHOLE):
        cells = [figures[executor].get(operation) for executor in figures]
        table.add_row(operation, *(f"{c['mean']:.4f} / {c['p99.9']} / {c['max']}" if c else "" for c in cells))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of JPEGs, searched with its subfolders")
    parser.add_argument("--images", type=int, default=None, help="how many at most")
    parser.add_argument("--epochs", type=int, default=2, help="plans per picture, two views each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity.json"))
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.data.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[: arguments.images]
    if not paths:
        parser.error(f"no JPEG lies in {arguments.data}")
    found = compare(paths, arguments.epochs)
    figures = {executor: {name: d.figures() for name, d in rows.items()} for executor, rows in found.items()}
    show(figures, Console())
    report = {
        "date": datetime.date.today().isoformat(),
        "images": len(paths),
        "views_per_operation": 2 * arguments.epochs * len(paths),
        "view_size": SIDE,
        "versions": versions(),
        "differences": figures,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
