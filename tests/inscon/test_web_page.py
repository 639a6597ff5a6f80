"""The page for a browser says what the page of Markdown says, draws what a run logged, and needs nothing but its own file."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from inscon.report import page
from inscon.report.web_page import web_page
from scripts.throughput_report import main
from tests.scripts.test_throughput_report import ON_GPU, by_step, changed, windows_with

SETTINGS, WINDOWS = changed()["settings"], windows_with([60.0] * 9)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Reader(html.parser.HTMLParser):
    """The tags of a page with what they hold: [(tag, attributes, text)]."""

    def __init__(self, text):
        super().__init__()
        self.seen, self._open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        self.seen[-1][2] += data


def tags(text, name):
    return [(attributes, inside.strip()) for tag, attributes, inside in Reader(text).seen if tag == name]


def test_every_cell_and_sentence_of_the_report_is_there():
    report = changed(ON_GPU, by_step(), ("device/fed_kernel_ms", {"color": 24.0}), ("memory", {"a | b": 1.0}))
    report |= {"predictions": ["PREDICTION, not measured"]}
    text, markdown = web_page(report, None), page.page(report)
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    cells = [cell.replace("\\|", "|").strip() for row in rows for cell in re.split(r"(?<!\\)\|", row)[1:-1]]
    assert len(cells) > 60 and "a | b" in cells
    assert [inside.strip() for tag, _, inside in Reader(text).seen if tag in ("td", "th")] == cells
    assert {title for _, title in tags(text, "h2")} >= set(re.findall(r"^## (.*)$", markdown, re.MULTILINE))
    said = " ".join(sentence for _, sentence in tags(text, "p"))
    assert report["verdict"]["sentence"].removeprefix("host-bound. ") in said and "PREDICTION, not measured" in said
    assert tags(text, "h2")[0] == ({}, "host-bound")


def test_without_rows_there_is_no_table():
    made = page.table("The loader by stage", ("", "value"), [], "synthetic.")
    assert made.split("\n\n") == ["## The loader by stage", "\nsynthetic.\n"]


def test_bars_are_as_long_as_what_they_show():
    bars = [found for found, _ in tags(web_page(changed(), None), "rect") if found.get("class") in ("bar", "marked")]
    ms = [2.0, 100.0, 210.0, 4.0, 8.0, 2.0]  # of 326
    expected = [100 * value / 326 for value in ms] + [100.0, 50.0, 49.0]
    assert [float(bar["width"].rstrip("%")) for bar in bars] == pytest.approx(expected, abs=0.01)
    assert [number for number, bar in enumerate(bars) if bar["class"] == "marked"] == [2, 8]


def folder_of_a_run(folder, windows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in windows))
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return folder


def drawn(folder, windows):
    """Name -> (points, what they say) of each curve."""
    found, name = {}, None
    for tag, attributes, inside in Reader(web_page(None, folder_of_a_run(folder, windows))).seen:
        if tag == "figure":
            name = None
        elif tag == "b" and name is None:
            name, found[inside] = inside, ([], [])
        elif tag == "path" and "L" in attributes["d"]:
            found[name][0].extend(tuple(map(float, spot.split())) for spot in attributes["d"][1:].split("L"))
        elif tag == "title" and name:
            found[name][1].append(inside)
    return found


def test_curves_are_where_the_figures_are(tmp_path):
    windows = [
        {"step": 10, "loss": 1.0, "loss_x": 5.0, "images_per_s": 50.0, "key_moved": 1.0},
        {"step": 20, "loss": 3.0, "loss_x": 5.0, "images_per_s": 100.0, "knn": 0.5},
        {"step": 40, "loss": 2.0, "loss_x": 5.0, "images_per_s": 0.0, "knn": 0.25},
    ]
    curves = drawn(tmp_path, windows)
    assert list(curves) == ["loss", "loss_x", "knn", "images_per_s"]
    assert curves["loss"][0] == [(0, 96), (33.33, 4), (100, 50)]
    assert curves["loss"][1] == ["step 10: 1", "step 20: 3", "step 40: 2"]
    assert curves["images_per_s"][0] == [(0, 50), (33.33, 4), (100, 96)]
    assert curves["knn"][0] == [(0, 4), (100, 50)]  # from 0 on
    assert {y for _, y in curves["loss_x"][0]} == {96}  # all the same


def test_a_long_run_is_drawn_by_means(tmp_path):
    curves = drawn(tmp_path, [{"step": n, "loss": float(n)} for n in range(1, 1001)])
    points, said = curves["loss"]
    assert len(points) == 112 and said[0] == "step 9: 5" and said[-1] == "step 1,000: 1000"


def test_what_people_write_is_no_html(tmp_path):
    evil = "<img src=x onerror=alert(1)>\"'&[a](b)**c**"
    report = changed(("machine/cpu", evil), ("described", evil), ("settings/model/backbone", evil))
    run = folder_of_a_run(tmp_path / evil, [{"step": 1, f"loss_{evil}": 1.0}])
    text = web_page(report | {"predictions": [evil]}, run)
    names = {tag for tag, _, _ in Reader(text).seen}
    assert not names & {"img", "a", "strong", "script"} and text.count("&lt;img src=x") >= 6
    assert f"The run {run}" in {title for _, title in tags(text, "h2")}


def test_nothing_is_fetched_and_nothing_runs(tmp_path):
    text = web_page(changed(), folder_of_a_run(tmp_path, WINDOWS))
    assert not re.search(r"http|<script|src=|href|url\(|@import|//", text)


def test_the_command_writes_a_page_of_a_run(tmp_path, capsys):
    run, out = str(folder_of_a_run(tmp_path, WINDOWS)), tmp_path / "pages/run.html"
    assert main(["--run", run, "--html", str(out)]) == 0
    text = out.read_text()
    assert "<b>images_per_s</b>" in text and f"The run {run}" in text and "<td" not in text
    assert f"{out}\n" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match="--run beside a measurement is for its curves in --html FILE; set that, or leave --run out"
    ):
        main(["--run", run, "--pipeline", "synthetic"])
    with pytest.raises(ValueError, match="is a folder where a file is to be written; set --html to a file name"):
        main(["--run", run, "--html", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--compare a b", "no comparison; leave"),
        ("--predict v100x8", "no page; set --data SHARDS"),
        ("--run none", "no metrics at none"),
    ],
)
def test_what_has_no_page_is_refused(tmp_path, flags, says):
    with pytest.raises(ValueError, match=says):
        main([*flags.split(), "--html", str(tmp_path / "page.html")])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_measurement_gets_the_curves_of_a_run_beside_it(tmp_path):
    flags = (
        "--pipeline synthetic --method tests.inscon.methods.toy --backbone test_resnet --view-size 64 --batch-size 8"
    )
    own = ["--steps", "10", "--warm-up", "2", "--out", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]
    assert main([*own, "--run", str(folder_of_a_run(tmp_path, WINDOWS)), *flags.split()]) == 0
    text, report = (tmp_path / "page.html").read_text(), json.loads((tmp_path / "out/report.json").read_text())
    assert text == web_page(report, tmp_path)


def in_browser(path, *flags):
    """(picture, what the console said) of the page as a browser shows it."""
    shot = path.with_suffix(".png")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    command += [f"--user-data-dir={path.parent}/browser", "--window-size=1000,1600", f"--screenshot={shot}", *flags]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return Image.open(shot).convert("RGB"), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize(("flags", "paper"), [([], (255, 255, 255)), (["--blink-settings=preferredColorScheme=0"], (14, 17, 22))],
                         ids=["light", "dark"])  # fmt: skip
def test_a_browser_shows_it(tmp_path, flags, paper):
    path = tmp_path / "page.html"
    path.write_text(web_page(changed(), folder_of_a_run(tmp_path, WINDOWS)))
    picture, said = in_browser(path, *flags)
    assert said == []
    colors = {color: count for count, color in picture.getcolors(1 << 24)}
    assert picture.getpixel((2, 2)) == paper and len(colors) > 50
    accent = (11, 107, 203) if paper[0] == 255 else (88, 166, 255)
    assert colors[accent] > 1000 and colors[paper] < 0.95 * picture.width * picture.height


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_check_above_would_notice_an_error(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(web_page(changed(), None).replace("</html>", "<script>nothing.here()</script></html>"))
    assert "nothing is not defined" in in_browser(path)[1][0]
