"""Do two engines train alike? The losses of short runs through each, from one seed, against the spread of several seeds.

    python data_prep/make_scenes.py --out SCENES --num-images 1024 --num-val 256 --size 128
    python data_prep/make_dali.py --data SCENES/train --out SHARDS
    python benchmarks/curves.py --data SHARDS [--engines reference dali] [--steps 300] [--seeds 0 1 2]

Runs `scripts/train.py --recipe smoke` as a user would: every engine with the first seed, the first engine with the others too. Two
curves lie on each other if at every step they are closer than the seeds are apart there.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from inscon.report.measure import machine, versions

LOSSES = ("loss_single", "loss_multi", "loss_cell")
WINDOW = 10
"""Steps that the curves are averaged over, before seeds are compared."""


def losses_of(engine: str, seed: int, data: Path, steps: int, run_dir: Path) -> np.ndarray:
    """[steps 3]: the losses of every step of a run."""
    flags = ["--recipe", "smoke", "--pipeline", engine, "--seed", seed, "--data", data, "--run-dir", run_dir]
    flags += ["--max-steps", steps, "--epochs", 20, "--log-every", 1, "--checkpoint-every", 10**6]
    subprocess.run([sys.executable, ROOT / "scripts/train.py", *map(str, flags)], check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    return np.array([[line[name] for name in LOSSES] for line in lines])


def smooth(curve: np.ndarray) -> np.ndarray:
    return curve.reshape(-1, WINDOW, len(LOSSES)).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", default=["reference", "dali"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/curves.json"))
    arguments = parser.parse_args()
    if arguments.steps % WINDOW:
        parser.error(f"--steps must be a multiple of {WINDOW}")
    first, *others = arguments.engines
    runs = [(engine, arguments.seeds[0]) for engine in arguments.engines]
    runs += [(first, seed) for seed in arguments.seeds[1:]]
    curves = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine, seed in runs:
            run_dir = Path(folder) / f"{engine}-{seed}"
            curves[engine, seed] = losses_of(engine, seed, arguments.data, arguments.steps, run_dir)
            print(engine, seed, "last losses", smooth(curves[engine, seed])[-1].round(4))
    seeds = np.stack([smooth(curves[first, seed]) for seed in arguments.seeds])
    spread = seeds.max(0) - seeds.min(0)
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "steps": arguments.steps,
        "window": WINDOW,
        "losses": LOSSES,
        "spread_of_seeds": {"mean": spread.mean(0).tolist(), "least": spread.min(0).tolist()},
        "engines": {},
        "curves": {
            f"{engine}, seed {seed}": smooth(curve).round(5).tolist() for (engine, seed), curve in curves.items()
        },
    }
    for engine in others:
        apart = np.abs(curves[engine, arguments.seeds[0]] - curves[first, arguments.seeds[0]])
        within = np.abs(smooth(curves[engine, arguments.seeds[0]]) - seeds[0]) <= spread
        result["engines"][engine] = {
            "against": first,
            "greatest_difference_of_a_step": apart.max(0).tolist(),
            "steps_that_are_equal": int((apart.max(1) == 0).sum()),
            "windows_within_the_spread": f"{int(within.all(1).sum())} of {len(within)}",
        }
        print(engine, result["engines"][engine])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
