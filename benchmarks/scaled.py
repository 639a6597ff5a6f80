"""Would decoding at half scale pay, where both crops are so large that no view is enlarged by it?

    python benchmarks/scaled.py --pictures ../shared/data/imagenet_sample/train

libjpeg-turbo can decode to half the size in its transform, which spares half of that and of the upsampling, but no
entropy decoding. Over the plan of several epochs: the share of pictures whose query and key crops both have at least twice
the view's side in either direction; what their decoding costs at half scale against whole (alternating rounds, medians of CPU
time); and how far their views then are from those of the whole picture, which must be 0.15 gray levels at most in the mean.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon.config import ViewConfig
from inscon.plan import plan_views
from inscon.profiling.rates import machine, versions

EPOCHS = 40
ROUNDS = 7


def decode(jpeg: bytes, half: bool) -> np.ndarray:
    if not half:
        return simplejpeg.decode_jpeg(jpeg, "RGB")
    height, width, _, _ = simplejpeg.decode_jpeg_header(jpeg)
    return simplejpeg.decode_jpeg(jpeg, "RGB", min_height=-(-height // 2), min_width=-(-width // 2), min_factor=2)


def decode_ms(jpegs: list[bytes], half: bool) -> float:
    start = time.process_time()
    for jpeg in jpegs:
        decode(jpeg, half)
    return (time.process_time() - start) / len(jpegs) * 1e3


def view(pixels: np.ndarray, box: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    image = Image.fromarray(pixels)
    scale = np.array([image.width / size[1], image.height / size[0]] * 2)
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=tuple(box * scale))).astype(int)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of JPEGs, searched with its subfolders")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scaled.json"))
    arguments = parser.parse_args()
    paths = sorted(arguments.pictures.rglob("*.JPEG"))
    jpegs, side = [path.read_bytes() for path in paths], ViewConfig().view_size
    sizes = np.array([simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs])
    shares, eligible, differences = [], [], []
    for epoch in range(EPOCHS):
        plans = plan_views(0, epoch, np.arange(len(jpegs)), sizes, ViewConfig())
        boxes = np.stack([plans.query.crop_box, plans.key.crop_box], 1)
        large = ((boxes[..., 2:] - boxes[..., :2]) >= 2 * side).all((1, 2))
        shares.append(large.mean())
        eligible += np.flatnonzero(large).tolist()
        for i in np.flatnonzero(large) if epoch < 4 else ():
            whole, half = decode(jpegs[i], False), decode(jpegs[i], True)
            assert half.shape[0] == -(-sizes[i][0] // 2)
            for box in boxes[i]:
                made = [view(pixels, box, sizes[i], side) for pixels in (whole, half)]
                differences.append(np.abs(made[0] - made[1]))
    large = [jpegs[i] for i in eligible]
    rounds = [
        (decode_ms(jpegs, False), decode_ms(large, False), decode_ms(large, True)) if large else (1.0, 0.0, 0.0)
        for _ in range(ROUNDS)
    ]
    every, whole, half = (statistics.median(column) for column in zip(*rounds))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "pictures": len(jpegs),
        "epochs": EPOCHS,
        "share_of_pictures": float(np.mean(shares)),
        "decode_ms": {"every_picture": every, "these": whole, "these_at_half_scale": half},
        "saved_share_of_all_decoding": float(np.mean(shares)) * (whole - half) / every,
        "difference_of_views": {
            "mean": float(np.mean([d.mean() for d in differences])),
            "least_mean_of_a_view": float(np.min([d.mean() for d in differences])),
            "max": int(np.max([d.max() for d in differences])),
        },
    }
    print(json.dumps(result, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
