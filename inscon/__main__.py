"""One command for all that scripts/ and data_prep/ do, from any folder; `python -m inscon` is the same.

inscon train --data SHARDS
torchrun --nproc_per_node=8 -m inscon train --data SHARDS
"""

import importlib.util
import sys

from inscon import guard

COMMANDS = {
    "pack": ("data_prep.make_dali", "DaliConfig", "pictures into tar shards, for --pipeline dali"),
    "pack-ffcv": ("data_prep.make_ffcv", "BetonConfig", "pictures or shards into a .beton, for --pipeline ffcv"),
    "verify": ("data_prep.verify", "verify", "read a packed set back"),
    "views": ("inscon.scripts.show_views", "options", "draw what a step will see"),
    "train": ("inscon.scripts.train", None, "pre-train a backbone"),
    "report": ("inscon.scripts.throughput_report", "options", "how fast this machine trains, and what holds it back"),
    "export": ("inscon.scripts.export", "ExportConfig", "a trained backbone for another library"),
    "knn": ("inscon.scripts.knn", "KnnConfig", "judge a backbone by nearest neighbors"),
    "linear": ("inscon.scripts.linear", "LinearConfig", "judge a backbone by a linear probe"),
    "detect": ("inscon.scripts.finetune_detection", "DetectionConfig", "fine-tune a backbone for detection"),
    "attention": ("inscon.scripts.attention_maps", "AttentionConfig", "draw what backbones look at"),
    "completion": ("inscon.scripts.completion", "completion", "print what completes these words in bash or zsh"),
}
"""Word -> the module that it runs; what has its flags there, where `options`, or None for none, stand beside those of training;
and what it does."""
HELP = """Pre-trains backbones for detection without labels. inscon COMMAND --help has
every flag; where it says python scripts/train.py, say, inscon train will do.
"""


def main() -> None:
    """Run the module as `python -m` would, for worker processes too, but under a name that a user knows."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in ("-h", "--help"):
        print(HELP, *(f"  {word:12}{what}" for word, (_, _, what) in COMMANDS.items()), sep="\n")
        print("\nOn several GPUs: torchrun --nproc_per_node=8 -m inscon train --data SHARDS")
        return
    if word not in COMMANDS:
        sentence = f"inscon: there is no command {word}; choose one of: {', '.join(COMMANDS)}"
        raise SystemExit(1 if guard.say_once(sentence) else 0)
    spec = importlib.util.find_spec(COMMANDS[word][0])
    module = sys.modules["__main__"] = importlib.util.module_from_spec(spec)
    module.__name__, sys.argv[:2] = "__main__", [f"inscon {word}"]
    exec(spec.loader.get_code(spec.name), vars(module))


if __name__ == "__main__":
    main()
