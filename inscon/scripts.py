"""The programs of scripts/ as modules: `from inscon.scripts import show_views, train`.

In a clone they lie beside this package, after `pip install .` inside it.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
__path__ = [str(_HERE / "_scripts" if (_HERE / "_scripts").is_dir() else _HERE.parent / "scripts")]
