"""From nothing to a trained backbone in minutes, without a GPU: does it learn?

    make demo SEED=1        # or: python scripts/demo.py --out demo --seed 1

Scenes are drawn whose classes are a shape with a texture (data_prep/make_scenes.py), packed, and trained on through DALI by the
recipe `demo`, without labels. Then each scene of a held-out set is classified by its nearest neighbors among the training scenes,
by the network at step 0 and at the end, both with BatchNorm of the training scenes. OUT gets demo.png, summary.json, sets and run.
"""

import json
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if not __package__:  # run as a script, beside which Python looks
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from inscon.guard import share_cores

share_cores()

import torch
import tyro
from PIL import ImageOps

from data_prep.make_dali import pack_folder
from data_prep.make_scenes import make_scenes
from inscon import guard
from inscon.report.run import read_metrics
from inscon.scripts import show_views, train
from inscon.scripts.attention_maps import joined
from inscon.transfer import knn
from inscon.transfer.export import any_backbone, estimate_statistics
from pipelines.evaluation import LabelledViews
from pipelines.reference import picture_of

CLASSES, SIDE = 8, 96  # Kinds of scenes; their typical height and width, px.
NEIGHBORS = 20
SHOWN, NEAREST, TILE = 5, 4, 72  # Scenes of the picture, neighbors of each, side of each, px.


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What is made of which seed."""

    out: Path = Path("demo")  # New or empty folder.
    seed: int = 0  # Of scenes, weights and order: another seed is another demo.
    pictures: int = 4096  # To train on.
    held_out: int = 1024  # To judge on.
    max_steps: int | None = None  # Stop earlier, to try it.


def main(config: DemoConfig) -> dict:
    """The summary, as summary.json has it."""
    guard.check_ranges(config, seed=0, pictures=NEIGHBORS, held_out=1)
    if not find_spec("matplotlib"):
        raise ValueError("the demo draws its result with matplotlib, which is not installed: pip install matplotlib")
    start, out, recipe = time.perf_counter(), config.out, train.parse(flags(config))
    print(
        f"Draws {config.pictures} scenes to train on and {config.held_out} to judge on, packs them, takes {recipe.optim.epochs} "
        f"training passes over them, and compares the network with itself before: minutes on 2 cores. The result is {out}/demo.png."
    )
    guard.check_output_folder(out)
    scenes = {"num_images": config.pictures, "num_val": config.held_out, "num_classes": CLASSES, "size": SIDE}
    make_scenes(out / "scenes", seed=config.seed, **scenes)
    for split in ("train", "val"):
        pack_folder(out / "scenes" / split, out / split)
    train.main(flags(config))
    sets = [LabelledViews(out / split, recipe.views.view_size) for split in ("train", "val")]
    rows = {name: rows_of(out / "run", name == "untrained", sets) for name in ("untrained", "trained")}
    scores = {name: 100 * knn.accuracy(val, bank, NEIGHBORS) for name, (bank, val) in rows.items()}
    summary = {f"knn_{name}": round(score, 2) for name, score in scores.items()}
    summary |= {"pictures": config.held_out, "seconds": round(time.perf_counter() - start), "seed": config.seed}
    draw(config, rows, scores)
    with guard.whole_file(out / "summary.json") as file:
        file.write((json.dumps(summary, indent=1) + "\n").encode())
    votes = f"of {config.held_out} scenes are of the class that their {NEIGHBORS} neighbors vote for"
    for name, score in scores.items():
        print(f"{name}: {score:.1f} % +- {half_interval(score, config.held_out):.1f} {votes}")
    print(f"{out}/demo.png shows it; {summary['seconds']} s in all.")
    return summary


def flags(config: DemoConfig) -> list[str]:
    """Of scripts/train.py."""
    given = ["--recipe", "demo", "--data", config.out / "train", "--run-dir", config.out / "run", "--seed", config.seed]
    return list(map(str, given + (["--max-steps", config.max_steps] if config.max_steps else [])))


def rows_of(run: Path, untrained: bool, sets: list[LabelledViews]) -> list[knn.Rows]:
    """Features of each set, by the network of the run or as it began; its statistics are of the first set."""
    backbone, _ = any_backbone(run, untrained)
    estimate_statistics(backbone, (pixels for pixels, _ in sets[0].center_crops()))
    return [knn.features(backbone.eval(), views.center_crops()) for views in sets]


def half_interval(percent: float, count: int) -> float:
    """Half of the 95 % interval of a share that was seen in `count` cases, percent."""
    return 1.96 * (percent * (100 - percent) / count) ** 0.5


def draw(config: DemoConfig, rows: dict[str, list[knn.Rows]], scores: dict[str, float]) -> None:
    """OUT/demo.png."""
    from matplotlib import pyplot

    windows = read_metrics(config.out / "run")
    figure, axes = pyplot.subplots(2, 2, figsize=(14, 10), layout="constrained", width_ratios=(1, 1.2))
    for name in sorted(name for name in windows[-1] if name.startswith("loss_")):
        axes[0, 0].plot([w["step"] for w in windows], [w[name] for w in windows], label=name.removeprefix("loss_"))
    axes[0, 0].set(title="losses", xlabel="step")
    axes[0, 0].legend()
    errors = [half_interval(score, config.held_out) for score in scores.values()]
    bars = axes[1, 0].bar(list(scores), list(scores.values()), yerr=errors, capsize=8, color=["silver", "tab:green"])
    axes[1, 0].bar_label(bars, fmt="%.1f %%", label_type="center", padding=8)
    axes[1, 0].set(title=f"scenes classified by neighbors, % of {config.held_out}; chance: {100 / CLASSES:.1f}")
    shown = {
        "views, cells with one number show the same": show_views.sheet(train.parse(flags(config)), images=2),
        "nearest: scene | before | after": neighbors_of(config, rows),
    }
    for axis, (title, image) in zip(axes[:, 1], shown.items(), strict=True):
        axis.imshow(image)
        axis.set(title=title)
        axis.axis("off")
    with guard.whole_file(config.out / "demo.png") as file:
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)


def neighbors_of(config: DemoConfig, rows: dict[str, list[knn.Rows]]):
    """A row per scene of the held-out set, the first of each class: itself, its nearest before and after."""
    bank, val = (LabelledViews(config.out / split, 32) for split in ("train", "val"))
    queries = [int((val.labels == label).nonzero()[0]) for label in val.labels.unique()[:SHOWN]]
    lines = []
    for query in queries:
        tiles = [[tile_of(val, query)]]
        for trained_on, judged in rows.values():
            nearest = torch.cosine_similarity(trained_on[0], judged[0][query], dim=1).topk(NEAREST).indices
            tiles.append([tile_of(bank, int(i)) for i in nearest])
        lines.append(joined([joined(part) for part in tiles]))
    return joined(lines, down=True)


def tile_of(views: LabelledViews, sample_id: int):
    return ImageOps.fit(picture_of(views.index, sample_id), (TILE, TILE))


if __name__ == "__main__":
    guard.run_script("demo.py", lambda: main(tyro.cli(DemoConfig, description=__doc__)))
