"""One command for all that scripts/ and data_prep/ do, from any folder; `python -m inscon` is the same.

inscon train --data SHARDS
torchrun --nproc_per_node=8 -m inscon train --data SHARDS
"""

import importlib
import re
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
"""Word -> the module whose `command` it starts, and what that does. Modules are imported when they are asked for."""


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        print(screen())
    elif word not in COMMANDS:
        guard.run_script("inscon", lambda: refuse(word))
    else:
        sys.argv[:2] = [f"inscon {word}"]
        module = importlib.import_module(COMMANDS[word][0])
        module.__doc__ = as_called_here(module.__doc__)
        module.command()


def screen() -> str:
    """The page of --help."""
    commands = "\n".join(f"  {word:12}{what}" for word, (_, what) in COMMANDS.items())
    return (
        f"Pre-train backbones for detection without labels.\n\ninscon COMMAND --help explains each of:\n{commands}\n\n"
        "On several GPUs: torchrun --nproc_per_node=8 -m inscon train --data SHARDS"
    )


def as_called_here(page: str) -> str:
    """A --help with `inscon train` for `python scripts/train.py`."""
    for word, (module, _) in COMMANDS.items():
        file = f"{module.removeprefix('inscon.').replace('.', '/')}.py"
        page = re.sub(rf"(torchrun .*){file}", rf"\1-m inscon {word}", page.replace(f"python {file}", f"inscon {word}"))
    return page


def refuse(word: str) -> None:
    raise ValueError(f"there is no command {word}; choose one of: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
