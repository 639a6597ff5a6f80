"""Every way to decode and every place for color, on the device that is there: the loader alone, and training against noise.

    python benchmarks/decode_modes.py --data SHARDS [--seconds 20] [--out FILE.json] -- [flags of scripts/train.py]

For each pair of `--decode` and `--color` that the device allows: source images/s of the pipeline dali with nobody behind it,
the time until the first batch, and the device memory that it takes. Then the model alone, on `--pipeline synthetic`, and
trained end to end through the pair that was fastest. Prints a table. On a CPU there is one way to decode.
"""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inscon.config import Config
from inscon.methods.method import resolve
from inscon.precision import choose_precision
from inscon.report.measure import machine, versions
from inscon.report.run import read_metrics, run_speed
from pipelines import open_pipeline
from scripts.train import feed_of, parse

WARM_UP = 5
"""Batches that are left out of a rate."""


def pairs(device: torch.device) -> list[tuple[str, str]]:
    if device.type == "cpu":
        return [("cpu", "host"), ("cpu", "device")]
    return [("mixed", "device"), ("cpu", "device"), ("cpu", "host"), ("auto", "auto")]


def loader_alone(config: Config, device: torch.device, seconds: float) -> dict:
    dtype = choose_precision(config.optim.precision, device).pixel_dtype
    start = time.perf_counter()
    with open_pipeline(feed_of(config), config.loader, device=device, dtype=dtype, total_steps=10**6) as pipeline:
        opened = time.perf_counter()
        batches = iter(pipeline)
        next(batches)
        first = time.perf_counter()
        for _ in range(WARM_UP - 1):
            next(batches)
        pipeline.read()
        begin, images = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            images += next(batches).size
        rate = images / (time.perf_counter() - begin)
        return {
            "images_per_s": rate,
            "opened_s": opened - start,
            "first_batch_s": first - opened,
            "said": pipeline.description.replace(str(config.loader.data), "SHARDS"),
            **pipeline.read(),
        }


def trained(flags: list[str], steps: int) -> dict:
    with tempfile.TemporaryDirectory() as run_dir:
        fixed = ["--run-dir", run_dir, "--max-steps", str(steps), "--log-every", "5"]
        subprocess.run(
            [sys.executable, ROOT / "scripts/train.py", *flags, *fixed], check=True, stdout=subprocess.DEVNULL
        )
        return run_speed(read_metrics(Path(run_dir)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20, help="of each loader")
    parser.add_argument("--steps", type=int, default=60, help="of each training, 30 at least")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_modes.json"))
    parser.add_argument("flags", nargs="*", help="after --: flags of scripts/train.py")
    settings = parser.parse_args()
    flags = settings.flags
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve(parse([*flags, "--data", str(settings.data)]), 1)
    rates = {}
    for decode, color in pairs(device):
        loader = dataclasses.replace(config.loader, decode=decode, color=color)
        rates[decode, color] = loader_alone(dataclasses.replace(config, loader=loader), device, settings.seconds)
        print(decode, color, json.dumps(rates[decode, color]), flush=True)
    decode, color = max(rates, key=lambda pair: rates[pair]["images_per_s"])
    synthetic = trained([*flags, "--pipeline", "synthetic"], settings.steps)
    data = ["--data", str(settings.data), "--decode", decode, "--color", color]
    through = trained([*flags, "--pipeline", "dali", *data], settings.steps)
    ceiling = synthetic["images_per_s"]
    print(
        "| --decode | --color | loader alone, images/s | against the step on noise | first batch, s | device memory, MB |"
    )
    print("|---|---|---|---|---|---|")
    for (d, c), r in rates.items():
        cells = f"{r['images_per_s']:.0f} | {r['images_per_s'] / ceiling:.2f}x | {r['first_batch_s']:.1f}"
        print(f"| {d} | {c} | {cells} | {r.get('loader_device_mb', 0):.0f} |")
    share = through["images_per_s"] / ceiling
    print(
        f"trained on noise {ceiling:.1f} images/s, through dali ({decode}, {color}) {through['images_per_s']:.1f}: {share:.1%}"
    )
    report = {"date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "flags": flags}
    report["loaders"] = [{"decode": d, "color": c, **r} for (d, c), r in rates.items()]
    report |= {"synthetic": synthetic, "end_to_end": {"decode": decode, "color": color, **through, "share": share}}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
