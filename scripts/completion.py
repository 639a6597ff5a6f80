"""Print what makes a shell complete `inscon`: its commands and their flags, those of every method among them.

inscon completion bash > ~/.local/share/bash-completion/completions/inscon
"""

import dataclasses
import importlib
from typing import Annotated, Literal, Union

import tyro

from inscon import config, guard, methods
from inscon.__main__ import COMMANDS
from inscon.recipes import RECIPES


def completion(shell: tyro.conf.Positional[Literal["bash", "zsh"]]) -> None:
    kinds = [Annotated[kind, tyro.conf.subcommand(word)] for word in COMMANDS if (kind := flags_of(word))]
    tyro.cli(Union[tuple(kinds)], prog="inscon", args=["--tyro-print-completion", shell])  # noqa: UP007


def flags_of(word: str):
    """What tyro makes flags of; None where a package that the command needs is missing."""
    place, name, _ = COMMANDS[word]
    try:
        module = importlib.import_module(place)
    except SystemExit:  # which it says itself when it is called
        return None
    if name not in (None, "options"):
        return vars(module)[name]
    groups = [kind for kind in vars(config).values() if dataclasses.is_dataclass(kind) and kind is not config.Config]
    groups += map(methods.settings_of, methods.names())
    found = {field.name: field.type for group in groups for field in dataclasses.fields(group)}
    for action in module.options()._actions[1:] if name else ():  # the first is --help
        plain = bool if isinstance(action.default, bool) else str
        found[action.dest] = Literal[tuple(action.choices)] if action.choices else plain
    found |= {"recipe": Literal[tuple(RECIPES)], "method": Literal[tuple(methods.names())]}
    fields = [(field, bool, False) if kind is bool else (field, kind | None, None) for field, kind in found.items()]
    return dataclasses.make_dataclass("Flags", fields)


if __name__ == "__main__":
    guard.run_script("completion.py", lambda: tyro.cli(completion, description=__doc__))
