"""One file per method: its settings, with reasons, and what a step of it is. `settings_of(name)` finds them by name."""

import importlib
import pkgutil

from inscon.methods.method import MethodSettings


def names() -> list[str]:
    """The methods that come with the project."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "method")


def settings_of(name: str) -> type[MethodSettings]:
    """The settings of a method of this project, or of a module of anybody's that has `Settings`, by its import name. ValueError for
    a name that is neither, and for a module that needs another one that is missing."""
    module = f"{__name__}.{name}" if name in names() else name
    is_path = not all(map(str.isidentifier, name.split(".")))
    try:
        found = None if is_path else importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"the method {name} imports {error.name}, which is not installed: pip install it"
            ) from None
        found = None
    if not hasattr(found, "Settings"):
        raise ValueError(
            f"there is no method {name}; set --method to one of {', '.join(names())}, or to a module that can be imported and has "
            "Settings"
        )
    return found.Settings
