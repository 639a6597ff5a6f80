"""What the two writers' commands share: run, sum up, and end in one sentence."""

import signal
import sys

import tyro

from data_prep.forecast import forecast, show
from data_prep.index import CHANGED_NAME, REJECTED_NAME, DatasetIndex
from data_prep.listing import kinds_in_words
from data_prep.packing import BYTES_PER_MB, PackConfig, Ranks, pack


def run(config_type: type[PackConfig]) -> None:
    """Parse the command line and pack, or say what packing would be (--plan)."""
    config = tyro.cli(config_type)
    sys.stdout.reconfigure(errors="backslashreplace")  # names may be no UTF-8
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that files are closed and taken away
    try:
        config.check()
        target = config.target()
        if config.plan:
            show(forecast(config, target))
            return
        index = pack(config, target, show_progress=True)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(
            f"Packing {config.data} into {config.out} stopped ({error}): see to that and run the same command again, it goes "
            "on where it stopped."
        ) from None
    except KeyboardInterrupt:
        print(f"Stopped. What is finished lies in {config.out}; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None
    ranks = Ranks.from_environment()
    print(
        _summary(index)
        if index
        else f"Rank {ranks.rank} of {ranks.world_size} has nothing left to write; rank 0 joins."
    )


def _summary(index: DatasetIndex) -> str:
    manifest = index.manifest
    megabytes = sum(shard.byte_count for shard in manifest.shards) / BYTES_PER_MB
    classes = f" of {len(index.class_names)} classes" if index.class_names else ""
    what = manifest.shards[0].name if manifest.container == "beton" else _counted(len(manifest.shards), "shard")
    return (
        f"Packed {_counted(len(index), 'picture')}{classes} into {what}, {megabytes:.1f} MB.\n"
        f"Left out: {_kinds(manifest.rejected, REJECTED_NAME)}\nChanged: {_kinds(manifest.changed, CHANGED_NAME)}\n"
        f"Ignored, as no pictures: {kinds_in_words(manifest.ignored) or 'none'}."
    )


def _kinds(counts: dict[str, int], listed_in: str) -> str:
    return f"{', '.join(f'{count} {kind}' for kind, count in counts.items())} (see {listed_in})." if counts else "none."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
