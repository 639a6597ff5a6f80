"""What the plan costs: microseconds of one core per source image for both views, on the image sizes of a data set.

python benchmarks/plan.py --data SHARDS --out benchmarks/results/plan.json
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_prep.index import DatasetIndex
from inscon.config import ViewConfig
from inscon.methods import inscon
from inscon.plan import plan_views
from inscon.report.measure import machine, versions
from inscon.sampling import EpochOrder


def measure(sizes: np.ndarray, batch_size: int, rounds: int, calls: int) -> dict[str, float]:
    """Medians over rounds of the CPU time of order and plan together, per image."""
    rng, costs = np.random.default_rng(0), {"order_us": [], "plan_us": []}
    specs = inscon.Settings().view_specs(ViewConfig())
    picked = sizes[rng.integers(0, len(sizes), (calls, batch_size))]
    order = EpochOrder(1_281_167, batch_size, seed=0)
    for r in range(rounds + 1):
        start = time.process_time()
        ids = [order.rank_batch(call, 0, 1) for call in range(calls)]
        middle = time.process_time()
        for batch_ids, batch_sizes in zip(ids, picked):
            plan_views(0, r, batch_ids, batch_sizes, specs)
        end = time.process_time()
        if r:  # the first round warms up
            costs["order_us"].append(1e6 * (middle - start) / calls / batch_size)
            costs["plan_us"].append(1e6 * (end - middle) / calls / batch_size)
    return {name: statistics.median(values) for name, values in costs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder written by data_prep/make_dali.py")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan.json"))
    arguments = parser.parse_args()
    index = DatasetIndex.open(arguments.data)
    sizes = index.sizes(np.arange(len(index)))
    costs = {str(b): measure(sizes, b, arguments.rounds, arguments.calls) for b in (32, 256, 1024)}
    for batch_size, cost in costs.items():
        print(f"batch {batch_size}: plan {cost['plan_us']:.1f} us, order {cost['order_us']:.1f} us per image, one core")
    report = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "rounds": arguments.rounds,
        "calls": arguments.calls, "image_sizes": len(sizes), "us_per_image_by_batch_size": costs,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
