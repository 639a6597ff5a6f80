"""Is this tree faster than another checkout of the project? Both side by side in one run, in rounds that take turns.

    git worktree add /tmp/landed a8f9974
    python benchmarks/landed.py /tmp/landed --data SHARDS --beton BETON --pictures FOLDER --out landed.json [--quick]

Compared are the loaders (dali and ffcv: full views with the mosaic, and crops alone), the step (ResNet-50, batch 16, float32, full
queues, a ready batch) with its peak memory, packing, and the plan. For each of them both trees have a process of their own, with
their own tree on sys.path, that waits while the other one works; who begins alternates. Timed are the clock and the processor, the
latter of the whole process tree. A ratio is the other tree's cost over this one's, so above 1 this tree is better. Given are its
median over the rounds, and the order statistics that hold the median with 95 % or more (of 9 rounds, the second and the eighth).

Sets are packed by the older tree, which may not read what the newer one packs.

--quick takes views of 64 px and mosaics of 128, and fewer images: to try the benchmark, not to report figures.
"""

import argparse
import datetime
import importlib
import json
import math
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# Nothing of the project is imported up here: a contender's process has another tree.
HERE = Path(__file__).resolve().parents[1]
ENDLESS = 10**6
PLANNED, PLAN_CALLS = 256, 20
"""Images in a plan, and plans in a round."""


class Tree(NamedTuple):
    """What differs between the two: how a configuration, its feed, its batches, a step and a plan are asked for."""

    resolve: Callable
    feed: Callable
    batches: Callable
    step: Callable
    plan: Callable


def adapter(root: Path) -> Tree:
    """Of the tree that is first on sys.path. Commit a8f9974 and before have no methods."""
    return now() if (root / "inscon/methods").is_dir() else before_methods()


def now() -> Tree:
    from inscon import train
    from inscon.methods.method import resolve
    from inscon.plan import plan_views
    from pipelines import open_pipeline
    from scripts.train import feed_of

    return Tree(
        resolve,
        feed_of,
        lambda config: open_pipeline(feed_of(config), config.loader, total_steps=ENDLESS),
        train.run_step,
        lambda epoch, ids, sizes, config: plan_views(0, epoch, ids, sizes, config.method.view_specs(config.views)),
    )


def before_methods() -> Tree:
    from inscon import train
    from inscon.config import resolve
    from inscon.plan import plan_views
    from pipelines import open_pipeline
    from pipelines.feed import open_feed

    return Tree(
        resolve,
        lambda config: open_feed(config, 0, 1),
        lambda config: open_pipeline(config.loader.pipeline, config=config, total_steps=ENDLESS),
        lambda training, batch: train.run_step(training, training.model, batch),
        lambda epoch, ids, sizes, config: plan_views(0, epoch, ids, sizes, config.views),
    )


def cpu_s() -> float:
    """Of this process, its threads, and the children that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def timed(work: Callable[[], object], images: int) -> dict[str, float]:
    """Milliseconds per image."""
    wall, cpu = time.perf_counter(), cpu_s()
    work()
    return {"wall_ms": 1e3 * (time.perf_counter() - wall) / images, "cpu_ms": 1e3 * (cpu_s() - cpu) / images}


# Each of these gets (tree, root, settings) and returns what a round is.


def loader(tree: Tree, settings: dict, name: str, crops: bool) -> Callable[[], dict[str, float]]:
    from scripts.train import parse

    size = [
        "--view-size",
        settings["view_size"],
        "--batch-size",
        settings["loader_batch"],
        "--threads",
        settings["threads"],
    ]
    config = parse(["--pipeline", name, "--data", settings["beton" if name == "ffcv" else "data"], *map(str, size)])

    def one_round(warm_up=settings["warm_up"], batches=settings["batches"]):
        if crops:
            engine = crops_engine(tree.feed(config), config.loader)
            source, end = engine.steps(), engine.end
        else:
            pipeline = tree.batches(config)
            source, end = iter(pipeline), pipeline.close
        for _ in range(warm_up):
            next(source)
        found = timed(lambda: [next(source) and None for _ in range(batches)], batches * settings["loader_batch"])
        end()
        return found

    one_round(1, 1)  # compiles
    return one_round


def crops_engine(feed, loader):
    """Makes uint8 crops, without color: what a host does where color happens on a GPU."""
    import torch

    from pipelines.finish import Finish
    from pipelines.prefetch import StageClock

    module, cpu, steps = importlib.import_module(f"pipelines.{loader.pipeline}"), torch.device("cpu"), range(ENDLESS)
    current = getattr(module, f"{loader.pipeline.title()}Engine", None)
    if current is not None:
        return current(feed, loader, steps, Finish(feed, cpu, torch.float32, False), StageClock())
    decode = [module.Decode("cpu", None)] if loader.pipeline == "dali" else []
    return module.Engine(feed, steps, cpu, torch.float32, loader.threads, *decode, False)


def step(tree: Tree, settings: dict) -> Callable[[], dict[str, float]]:
    import torch

    from inscon import train
    from scripts.train import parse

    flags = ["--pipeline", "synthetic", "--norm", "split", "--run-dir", settings["work"] + "/run"]
    flags += ["--batch-size", str(settings["step_batch"]), "--view-size", str(settings["view_size"])]
    config = tree.resolve(parse(flags), 1)
    torch.set_num_threads(settings["threads"])
    with tree.batches(config) as pipeline:
        batch = next(iter(pipeline))
    training = train.set_up(config, torch.device("cpu"), "none")
    (getattr(training, "method", None) or training.model).train()
    tree.step(training, batch)

    def one_round():
        found = timed(lambda: [tree.step(training, batch) for _ in range(settings["steps"])], settings["steps"])
        return found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}

    return one_round


def plan(tree: Tree, settings: dict) -> Callable[[], dict[str, float]]:
    import numpy as np

    from data_prep.index import DatasetIndex
    from scripts.train import parse

    config, index, rng = parse([]), DatasetIndex.open(settings["data"]), np.random.default_rng(0)
    sizes = index.sizes(rng.integers(0, len(index), PLANNED))

    def one_round():
        return timed(
            lambda: [tree.plan(call, np.arange(PLANNED), sizes, config) for call in range(PLAN_CALLS)],
            PLANNED * PLAN_CALLS,
        )

    return one_round


def packing(root: str, settings: dict, writer: str) -> Callable[[], dict[str, float]]:
    """The whole command, start-up included."""

    def one_round():
        with tempfile.TemporaryDirectory(dir=settings["work"]) as out:
            command = [
                sys.executable,
                f"{root}/data_prep/{writer}.py",
                "--data",
                settings["pictures"],
                "--out",
                out + "/set",
            ]
            command += ["--workers", str(settings["threads"])]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            return timed(lambda: subprocess.run(command, check=True, cwd=root, **silent), settings["count"])

    return one_round


TASKS: dict[str, Callable[[Tree, str, dict], Callable[[], dict[str, float]]]] = {
    "dali, full": lambda tree, root, settings: loader(tree, settings, "dali", False),
    "dali, crops": lambda tree, root, settings: loader(tree, settings, "dali", True),
    "ffcv, full": lambda tree, root, settings: loader(tree, settings, "ffcv", False),
    "ffcv, crops": lambda tree, root, settings: loader(tree, settings, "ffcv", True),
    "step": lambda tree, root, settings: step(tree, settings),
    "plan": lambda tree, root, settings: plan(tree, settings),
    "make_dali": lambda tree, root, settings: packing(root, settings, "make_dali"),
    "make_ffcv": lambda tree, root, settings: packing(root, settings, "make_ffcv"),
}


def contend(root: str, task: str, settings: dict, commands) -> None:
    """A contender's process: a round for every True it is sent."""
    sys.path[:] = [root, *(path for path in sys.path if Path(path or ".").resolve() not in (HERE, HERE / "benchmarks"))]
    import inscon

    assert Path(inscon.__file__).resolve().parents[1] == Path(root), f"{inscon.__file__} is not of {root}"
    one_round = TASKS[task](adapter(Path(root)), root, settings)
    commands.send("ready")
    while commands.recv():
        commands.send(one_round())


def compare(task: str, trees: dict[str, str], settings: dict, rounds: int) -> dict[str, list[dict[str, float]]]:
    """The rounds of each tree. ChildProcessError where one ends."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, {}
    for name, root in trees.items():
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=contend, args=(root, task, settings, theirs), daemon=True)
        processes[name].start()
        theirs.close()

    def receive(name):
        try:
            return pipes[name].recv()
        except EOFError:
            raise ChildProcessError(f"{task}: {name} ended; what it said is above") from None

    found = {name: [] for name in trees if receive(name)}
    for number in range(rounds):
        for name in list(trees)[:: 1 if number % 2 else -1]:
            pipes[name].send(True)
            found[name].append(receive(name))
    for name, process in processes.items():
        pipes[name].send(False)
        process.join()
    return found


def interval(values: list[float]) -> tuple[float, float] | None:
    """Order statistics between which the median of what was sampled lies with 95 % or more; None where there are too few."""
    n, ordered = len(values), sorted(values)
    for k in range(n // 2, 0, -1):
        if 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n >= 0.95:
            return ordered[k - 1], ordered[n - k]
    return None


def ratios(found: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """By figure: medians of both trees, and the other's over this one's, round by round."""
    result = {}
    for figure in found["this"][0]:
        pairs = [(this[figure], other[figure]) for this, other in zip(found["this"], found["other"], strict=True)]
        of_rounds = [other / this for this, other in pairs]
        result[figure] = {
            "this": statistics.median(this for this, _ in pairs),
            "other": statistics.median(other for _, other in pairs),
            "ratio": statistics.median(of_rounds),
            "interval": interval(of_rounds),
        }
    return result


def said(of: dict) -> str:
    within = "too few rounds for an interval" if of["interval"] is None else "{:.3f} to {:.3f}".format(*of["interval"])
    return f"{of['ratio']:.3f} ({within})"


def commit(root: str) -> str:
    """As git tells it, with a + where files differ from it."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True)
    return said.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("other", type=Path, help="another checkout, a worktree of a8f9974, say")
    parser.add_argument("--data", type=Path, help="tar shards, for dali and the plan")
    parser.add_argument("--beton", type=Path, help="a .beton of the same, for ffcv")
    parser.add_argument("--pictures", type=Path, help="folder of JPEGs, for packing")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="None: all that there are data for")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small views, few images: to try it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/landed.json"))
    arguments = parser.parse_args()
    quick = arguments.quick
    settings = {
        "view_size": 64 if quick else 224, "loader_batch": 8 if quick else 32, "warm_up": 2 if quick else 8,
        "batches": 4 if quick else 30, "step_batch": 16, "steps": 1 if quick else 2, "threads": arguments.threads,
        "count": 40 if quick else 4000,
    }  # fmt: skip
    needs = {
        "dali": arguments.data,
        "ffcv": arguments.beton,
        "plan": arguments.data,
        "make": arguments.pictures,
        "step": "noise",
    }
    tasks = arguments.tasks or [task for task in TASKS if needs[task.replace("_", ",").split(",")[0]]]
    paths = {name: str(getattr(arguments, name).resolve()) for name in ("data", "beton") if getattr(arguments, name)}
    trees = {"this": str(HERE), "other": str(arguments.other.resolve())}
    results, rounds = {}, {}
    with tempfile.TemporaryDirectory() as work:
        given = settings | paths | {"work": work, "pictures": f"{work}/pictures"}
        if any(task.startswith("make") for task in tasks):
            sys.path.insert(0, str(HERE))
            from benchmarks.packing import make_pictures

            make_pictures(arguments.pictures, Path(work) / "pictures", settings["count"])
        print("what, figure, this tree, the other, ratio and its interval")
        for task in tasks:
            rounds[task] = compare(task, trees, given, arguments.rounds)
            results[task] = ratios(rounds[task])
            for figure, own in results[task].items():
                print(f"{task:12} {figure:8} {own['this']:10.3f} {own['other']:10.3f}  {said(own)}", flush=True)
    sys.path.insert(0, str(HERE))
    from inscon.report.measure import machine, versions

    report = {
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": versions(), "quick": quick,
        "commits": {name: commit(root) for name, root in trees.items()}, "settings": settings | {"rounds": arguments.rounds},
        "results": results, "rounds": rounds,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
