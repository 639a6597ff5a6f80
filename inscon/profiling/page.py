"""A report as a page: the same sections as Markdown, as tables on the screen, and as a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

from rich.console import Console
from rich.table import Table

from inscon.clock import PARTS


@dataclass(frozen=True, slots=True)
class Section:
    """A table with a title; the first column is text, the others are figures. `notes` stand below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def markdown(title: str, verdict: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    lines = [f"# {title}", "", f"**{verdict}**", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines.append("| " + " | ".join(section.columns) + " |")
            lines.append("|" + "---|" * len(section.columns))
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in section.rows]
            lines.append("")
        for note in section.notes:
            lines += [note, ""]
    return "\n".join(lines)


def show(console: Console, title: str, verdict: str, sections: Sequence[Section]) -> None:
    """The same on a screen."""
    console.rule()
    console.print(title, highlight=False, markup=False)
    console.print(verdict, style="bold", highlight=False, markup=False)
    for section in sections:
        if section.rows:
            table = Table(title=section.title, title_justify="left")
            for number, column in enumerate(section.columns):
                table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
            for row in section.rows:
                table.add_row(*row)
            console.print(table, markup=False)
        for note in section.notes:
            console.print(note, highlight=False, markup=False)


def draw(report: dict, file: BinaryIO) -> bool:
    """Ceilings, the step's parts and the loader's stages as a PNG in `file`; False, and no picture, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    ceilings = {name: rate for name, rate in report["ceilings"].items() if rate is not None}
    bars = left.barh(
        list(ceilings), list(ceilings.values()), color=["#4c72b0", "#55a868", "#55a868", "#c44e52"][: len(ceilings)]
    )
    left.bar_label(bars, fmt="%.4g", padding=3)
    left.set(title="source images/s", xlim=(0, 1.2 * max(ceilings.values())))
    left.invert_yaxis()
    shares = report["shares"]
    bars = middle.barh(PARTS, [shares[name] for name in PARTS], color="#8172b3")
    middle.bar_label(bars, fmt="%.1f", padding=3)
    middle.set(title="the step, %", xlim=(0, 1.2 * max(shares.values())))
    middle.invert_yaxis()
    alone = report.get("stages_alone_ms") or {"not measured": 0.0}
    bars = right.barh(list(alone), list(alone.values()), color="#ccb974")
    right.bar_label(bars, fmt="%.3g", padding=3)
    right.set(title="the loader's stages alone, ms per image", xlim=(0, 1.2 * max(alone.values()) or 1))
    right.invert_yaxis()
    figure.suptitle(report["verdict"]["kind"] + ": " + report["verdict"]["stage"], x=0.01, ha="left")
    figure.savefig(file, dpi=110, format="png")
    pyplot.close(figure)
    return True
