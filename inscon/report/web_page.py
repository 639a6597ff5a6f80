"""The report, and the curves of a run, as one HTML file: no script, nothing from elsewhere, dark or light as the system is."""

import json
import re
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from inscon.clock import WAIT
from inscon.report import page, verdict
from inscon.report.run import read_metrics

CURVES = ("loss", "top1", "knn", "images_per_s", "data_wait_percent", "mfu_percent", "lr")
"""Beginnings of the names in metrics.jsonl that are drawn, in this order. Axes begin at 0, but for those of losses and rates."""
MOST_POINTS = 120  # Of a curve; each is the mean of as many log windows as that takes.
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>
:root { --paper: #fff; --card: #f6f7f9; --ink: #14171c; --quiet: #667080; --line: #e3e6eb; --bar: #a9b2c0; --accent: #0b6bcb }
@media (prefers-color-scheme: dark) { :root { color-scheme: dark;
  --paper: #0e1116; --card: #171b22; --ink: #e7eaef; --quiet: #8e98a7; --line: #272d37; --bar: #566171; --accent: #58a6ff } }
* { box-sizing: border-box; margin: 0 }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
  max-width: 70rem; margin: auto; padding: 3rem 1.5rem }
html { background: var(--paper) } h1, .verdict h2, dd { font-size: 1.6rem; font-weight: 600; line-height: 1.3 }
h2 { font-size: 1rem; margin: 0 0 .75rem } p, dt, th, figcaption { color: var(--quiet); font-weight: 400 }
section { break-inside: avoid; padding-bottom: 2.5rem } section p { margin-top: .75rem; font-size: .875rem }
.verdict { margin: 0 0 2rem; padding: 1.25rem 1.5rem; background: var(--card); border-left: 4px solid var(--accent) }
h1 + p { margin-bottom: 2rem } .verdict h2 { margin: 0; color: var(--accent) } .verdict p { margin-top: .25rem; color: var(--ink) }
dl, .curves { display: grid; gap: 1.75rem 2rem; margin: 0 0 2.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(15rem, 45%), 1fr)) }
.columns { columns: 27rem; column-gap: 3rem } svg { display: block; width: 100%; fill: var(--ink) }
rect { fill: var(--line) } .bar { fill: var(--bar) } .marked { fill: var(--accent) }
figure svg { height: 7rem; margin: .25rem 0; background: var(--card) }
figcaption { display: flex; gap: .5rem; justify-content: space-between; font-size: .8125rem } figcaption b { color: var(--ink) }
path { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; vector-effect: non-scaling-stroke }
g { opacity: 0 } g:hover { opacity: 1 } g rect { fill: transparent } g path { stroke: var(--quiet); stroke-width: 1 }
table { width: 100%; border-collapse: collapse; font-size: .875rem } th:first-child { text-align: left }
td, th { padding: .3rem 0; border-bottom: 1px solid var(--line) } td + td, th + th { padding-left: 1rem; white-space: nowrap }
</style>"""


def web_page(report: dict | None, run: Path | None) -> str:
    """Of a report, of a run, or of both."""
    text = page.page(report) if report else page.title_of(json.loads((run / "config.json").read_text()))
    title, *sections = re.split("^#+ ", text, flags=re.MULTILINE)[1:]
    title, _, where = escape(title.partition("\n")[0]).partition(" on ")
    lines = [HEAD, f"<title>{title}</title><h1>{title}</h1><p>{where}</p>", *(_summary(report) if report else [])]
    if run:
        windows = read_metrics(run)
        names = sorted({name for window in windows for name in window})
        shown = [name for start in CURVES for name in names if name == start or name.startswith(f"{start}_")]
        curves = [_curve(name, [(line["step"], line[name]) for line in windows if name in line]) for name in shown]
        lines += [f'<h2>The run {escape(str(run))}</h2><div class="curves">', *curves, "</div>"]
    as_html = MarkdownIt("zero").enable(["heading", "table"]).render  # links, tags and emphasis stay text
    tables = "\n".join(f"<section>{as_html(f'## {section}')}</section>" for section in sections)
    return "\n".join([*lines, f'<div class="columns">{tables}</div></html>\n'])


def _summary(report: dict) -> list[str]:
    """The verdict, the figures that matter most, and where the time goes."""
    found, steps = report["verdict"], report["end_to_end"]
    says = escape(found["sentence"].removeprefix(f"{found['kind']}. ")).replace(" Next: ", "</p><p>Next: ")
    mfu = "not known" if report["mfu_percent"] is None else f"{report['mfu_percent']:.1f} %"
    figures = {
        "source images/s": f"{steps['images_per_s']:,.1f}", "a step": f"{steps['step_ms']:,.1f} ms",
        "of it waits for data": f"{report['shares'].get(WAIT, 0.0):.1f} %", "MFU": mfu,
    }  # fmt: skip
    rates, parts = {name: rate for name, rate in report["ceilings"].items() if rate}, steps["parts_ms"]
    return [
        f'<div class="verdict"><h2>{escape(found["kind"])}</h2><p>{says}</p></div>',
        "<dl>", *(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()), "</dl>",
        '<div class="columns">', _bars("Where the time of a step goes, ms", parts, steps["wall_ms"], max(parts, key=parts.get)),
        _bars("Source images/s", rates, max(rates.values()), verdict.END_TO_END), "</div>",
    ]  # fmt: skip


def _bars(title: str, values: dict[str, float], full: float, marked: str) -> str:
    """A bar for each value, as wide as the drawing at `full`; the marked one in the accent color."""
    rows = []
    for top, (name, value) in zip(range(0, 44 * len(values), 44), values.items()):
        kind, bar = "marked" if name == marked else "bar", f'y="{top + 22}" height="8" rx="4"'
        rows.append(
            f'<text y="{top + 14}">{escape(name)}</text><text x="100%" y="{top + 14}" text-anchor="end">{value:,.1f}</text>'
            f'<rect {bar} width="100%"/><rect class="{kind}" {bar} width="{min(100 * value / full, 100):.2f}%"/>'
        )
    return f'<section><h2>{title}</h2><svg height="{44 * len(values)}">{"".join(rows)}</svg></section>'


def _curve(name: str, logged: Sequence[tuple[int, float]]) -> str:
    """Value over step; what a point is can be read where the pointer is."""
    size = -(-len(logged) // MOST_POINTS)
    groups = [logged[start : start + size] for start in range(0, len(logged), size)]
    steps, values = [group[-1][0] for group in groups], [statistics.fmean(dict(group).values()) for group in groups]
    low, high, wide = min(values) if name.startswith(("loss", "lr")) else 0.0, max(values), 100 / len(steps)
    xs = [100 * (step - steps[0]) / max(steps[-1] - steps[0], 1) for step in steps]
    line = "L".join(f"{x:.2f} {96 - 92 * (value - low) / (high - low or 1):.2f}" for x, value in zip(xs, values))
    marks = [
        f'<g><title>step {step:,}: {value:.4g}</title><rect x="{x - wide / 2:.2f}" width="{wide:.2f}" height="100"/>'
        f'<path d="M{x:.2f} 0V100"/></g>' for step, value, x in zip(steps, values, xs)
    ]  # fmt: skip
    return (
        f"<figure><figcaption><b>{escape(name)}</b><b>{values[-1]:.4g}</b></figcaption>"
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none"><path d="M{line}"/>{"".join(marks)}</svg><figcaption>'
        f"<span>step {steps[0]:,}</span><span>↕ {low:.3g} – {high:.3g}</span><span>{steps[-1]:,}</span></figcaption></figure>"
    )
