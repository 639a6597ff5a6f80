"""One command for all that scripts/ and data_prep/ do, from any folder; `python -m inscon` is the same.

inscon train --data SHARDS
torchrun --nproc_per_node=8 -m inscon train --data SHARDS
"""

import importlib.util
import sys

from inscon import guard

COMMANDS = {
    "pack": ("data_prep.make_dali", "pictures into tar shards, for --pipeline dali"),
    "pack-ffcv": ("data_prep.make_ffcv", "pictures or shards into a .beton, for --pipeline ffcv"),
    "verify": ("data_prep.verify", "read a packed set back"),
    "views": ("inscon.scripts.show_views", "draw what a step will see"),
    "train": ("inscon.scripts.train", "pre-train a backbone"),
    "report": ("inscon.scripts.throughput_report", "how fast this machine trains, and what holds it back"),
    "export": ("inscon.scripts.export", "a trained backbone for another library"),
    "knn": ("inscon.scripts.knn", "judge a backbone by nearest neighbors"),
    "linear": ("inscon.scripts.linear", "judge a backbone by a linear probe"),
    "detect": ("inscon.scripts.finetune_detection", "fine-tune a backbone for detection"),
    "attention": ("inscon.scripts.attention_maps", "draw what backbones look at"),
    "completion": ("inscon.scripts.completion", "print what completes these words in bash or zsh"),
}
"""Word -> the module that it runs, and what that does."""


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        print(screen())
    elif word not in COMMANDS:
        guard.run_script("inscon", lambda: refuse(word))
    else:
        start(word)


def screen() -> str:
    """The page of --help."""
    commands = "\n".join(f"  {word:12}{what}" for word, (_, what) in COMMANDS.items())
    return (
        "Pre-trains backbones for detection without labels. inscon COMMAND --help has\n"
        "every flag; where it says python scripts/train.py, say, inscon train will do.\n\n"
        f"{commands}\n\nOn several GPUs: torchrun --nproc_per_node=8 -m inscon train --data SHARDS"
    )


def start(word: str) -> None:
    """Run the module as `python -m` would, for worker processes too, but under a name that a user knows."""
    spec = importlib.util.find_spec(COMMANDS[word][0])
    module = sys.modules["__main__"] = importlib.util.module_from_spec(spec)
    module.__name__, sys.argv[:2] = "__main__", [f"inscon {word}"]
    exec(spec.loader.get_code(spec.name), vars(module))


def refuse(word: str) -> None:
    raise ValueError(f"there is no command {word}; choose one of: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
