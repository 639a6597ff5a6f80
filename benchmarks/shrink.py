"""What shrinking while packing costs and saves: bytes, decode time, and how far the training's views move.

    python benchmarks/shrink.py --pictures ../shared/data/imagenet_sample/train --out benchmarks/results/shrink.json

Per setting of the writers, over all pictures: bytes stored and CPU time of one decode to RGB against the originals'
(alternating rounds, medians), CPU time of packing one picture, PSNR in dB of the query views that training would cut (the
plan's crop boxes, 224 px, antialiased bilinear, no colors) against the same views of the original, and the share of
views whose crop has fewer pixels than the view, so that it is enlarged.
"""

import argparse
import datetime
import io
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.pictures import Treatment, prepare_picture
from inscon.config import ViewConfig
from inscon.plan import plan_views
from inscon.report.measure import machine, versions

SETTINGS = {
    "as they are": Treatment(),
    **{
        f"--short-side {n} --quality {q}": Treatment(short_side=n, quality=q) for n in (400, 320, 256) for q in (95, 90)
    },
    **{f"--max-resolution {n} --quality 90": Treatment(max_resolution=n, quality=90) for n in (500, 400)},
    "--max-resolution 400 --quality 90 --chroma 420": Treatment(max_resolution=400, quality=90, chroma="420"),
}
EPOCHS = 4
"""Views per picture."""


def views_of(jpeg: bytes, boxes: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """[views side side 3]; `boxes` are in px of a picture of `size` (height, width)."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    scale = np.array([image.width / size[1], image.height / size[0]] * 2)
    cut = [image.resize((side, side), Image.Resampling.BILINEAR, box=tuple(box * scale)) for box in boxes]
    return np.stack([np.asarray(view, np.float64) for view in cut])


def decode_ms(jpegs: list[bytes]) -> float:
    start = time.process_time()
    for jpeg in jpegs:
        simplejpeg.decode_jpeg(jpeg, "RGB")
    return (time.process_time() - start) / len(jpegs) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of real JPEGs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shrink.json"))
    arguments = parser.parse_args()
    originals = [path.read_bytes() for path in sorted(arguments.pictures.rglob("*.JPEG"))]
    query, ids = ViewConfig().spec("query"), np.arange(len(originals))
    sizes = np.array([(p.height, p.width) for p in (prepare_picture(o, Treatment()) for o in originals)])
    boxes = np.stack(
        [plan_views(0, epoch, ids, sizes, [query]).views["query"].crop_box for epoch in range(EPOCHS)], axis=1
    )
    stored, facts = {}, {}
    for name, treatment in SETTINGS.items():
        start = time.process_time()
        prepared = [prepare_picture(original, treatment) for original in originals]
        pack_ms = (time.process_time() - start) / len(originals) * 1e3
        stored[name] = [p.content for p in prepared]
        scales = np.array([p.height for p in prepared]) / sizes[:, 0]
        sides = np.stack([boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]]) * scales[:, None]
        facts[name] = {
            "mean_bytes": statistics.mean(map(len, stored[name])),
            "shrunk": sum("shrunk" in p.changes for p in prepared),
            "pack_ms": pack_ms,
            "enlarged_views": float((sides.min(0) < query.size).mean()),
        }
        if name != "as they are":
            errors = []
            for i, jpeg in enumerate(stored[name]):
                views = [views_of(j, boxes[i], sizes[i], query.size) for j in (originals[i], jpeg)]
                if jpeg is not originals[i] and jpeg != originals[i]:
                    errors += list(((views[0] - views[1]) ** 2).mean((1, 2, 3)))
            if errors:
                facts[name]["view_psnr_db"] = {
                    "mean": float(np.mean(10 * np.log10(255**2 / np.array(errors)))),
                    "lowest": float(10 * np.log10(255**2 / np.max(errors))),
                    "views": len(errors),
                }
    rounds = {name: [] for name in SETTINGS}
    for _ in range(arguments.rounds):
        for name, jpegs in stored.items():
            rounds[name].append(decode_ms(jpegs))
    base = facts["as they are"]
    for name, own in rounds.items():
        facts[name]["decode_ms"] = statistics.median(own)
        facts[name]["decode_over_original"] = statistics.median(
            mine / whole for mine, whole in zip(own, rounds["as they are"])
        )
        facts[name]["bytes_over_original"] = facts[name]["mean_bytes"] / base["mean_bytes"]
    table = Table()
    for column in ("setting", "bytes", "decode", "packing ms", "view PSNR", "views enlarged"):
        table.add_column(column)
    for name, f in facts.items():
        psnr = f"{f['view_psnr_db']['mean']:.1f} dB" if "view_psnr_db" in f else ""
        cells = (f"{f['bytes_over_original']:.2f}", f"{f['decode_over_original']:.2f}", f"{f['pack_ms']:.2f}", psnr)
        table.add_row(name, *cells, f"{f['enlarged_views']:.0%}")
    Console().print(table)
    report = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "pictures": len(originals),
        "rounds": arguments.rounds, "settings": facts,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
