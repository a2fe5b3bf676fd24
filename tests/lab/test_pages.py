"""The book's own scripts and style sheet: they load nothing, and in a browser, where there is one, they do their work."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from papercore.lab.explore import explore
from papercore.lab.plot import Plot
from papercore.lab.scoreboard import ROW_KEYS, verdict_table_html

STATIC = Path(__file__).parents[2] / "book" / "_static"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *(
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-extensions",
    ),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--virtual-time-budget=3000",
    ),
)


@pytest.mark.parametrize("name", ["explore.js", "scoreboard.js", "book.css"])
def test_own_files_name_no_other_host(name):
    text = (STATIC / name).read_text(encoding="utf-8")
    assert not re.search(
        r"https?:|//[a-z]+\.|@import|\burl\((?!#)|\bfetch\b|XMLHttpRequest|\beval\b|innerHTML", text
    )


@pytest.mark.skipif(
    shutil.which("node") is None, reason="node, which reads the scripts, is not on this machine"
)
@pytest.mark.parametrize("name", ["explore.js", "scoreboard.js"])
def test_scripts_are_valid_javascript(name):
    done = subprocess.run(["node", "--check", str(STATIC / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_style_sheet_knows_every_class_of_the_pages(pages):
    css = (STATIC / "book.css").read_text(encoding="utf-8")
    used = set(re.findall(r"pc-[a-z]+", " ".join(re.findall(r'class="([^"]*)"', pages))))
    styled = set(re.findall(r"\.(pc-[a-z]+)", css))
    assert len(used) > 12 and used - styled == set()


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """Two controls and the table of verdicts, as they lie in the built book."""
    monkeypatch.setenv("PAPERCORE_FIGURES", str(tmp_path))

    def power(p=1, kind="rise"):
        y = [x**p if kind == "rise" else -(x**p) for x in (0, 1, 2)]
        return Plot([0, 1, 2], {"y": y}, "x", "y", text=f"p is {p}", reported={"y": ([1], [0.9])})

    def decay(k=2):
        return Plot([1, 10, 100], {"a": [1, 0.1**k, 0.0]}, "x", "y", "log", "log", vlines={"here": 10})

    explore(power, name="power", alt="A power.", p=[1, 2, 3], kind=["rise", "fall"])
    explore(decay, name="decay", alt="A decay.", k=[1, 2, 3])
    verdicts = ["holds", "fails", "fails (expected)", "not tested at this scale", "not run", "stale"]
    rows = [
        dict.fromkeys(ROW_KEYS)
        | {
            "slug": slug,
            "id": f"{slug}/C{i}",
            "text": "A claim.",
            "where": "Table 1",
            "why": "size",
            "rule": "> 1",
        }
        | {"scale": ("quick", "standard")[i % 2], "verdict": verdict}
        for slug in ("mezo", "qsr")
        for i, verdict in enumerate(verdicts)
    ]
    parts = [(tmp_path / f"{name}.html").read_text(encoding="utf-8") for name in ("power", "decay")]
    return "\n".join([*parts, verdict_table_html(rows)])


DRIVER = """
const seen = {errors};
const figure = document.getElementById("explore-power");
const look = () => ({
  label: figure.querySelector("svg.pc-plot").getAttribute("aria-label"),
  text: figure.querySelector(".pc-text").textContent,
  curve: figure.querySelector("svg.pc-plot path[stroke-width='2']").getAttribute("d"),
  shown: figure.querySelector("output").textContent,
  spoken: figure.querySelector("input").getAttribute("aria-valuetext"),
});
const move = (node, value, event) => { node.value = value; node.dispatchEvent(new Event(event, { bubbles: true })); };
seen.start = look();
move(figure.querySelector("input"), 2, "input");
seen.moved = look();
move(figure.querySelector("select"), 1, "change");
seen.chosen = look();
seen.labelled = [...document.querySelectorAll(".pc-control")].map(
  row => row.querySelector("label").htmlFor === row.querySelector("input, select").id);
seen.still = document.querySelectorAll(".pc-still").length;
seen.ids = [...document.querySelectorAll("[id]")].map(node => node.id);
seen.gap = document.querySelector("#explore-decay svg.pc-plot path[stroke-width='2']").getAttribute("d");
const board = document.querySelector(".pc-verdicts"), lists = board.querySelectorAll("select");
const left = () => ({
  rows: [...board.querySelectorAll("tr[data-verdict]")].filter(row => row.offsetParent !== null).length,
  tables: [...board.querySelectorAll("table")].filter(table => table.offsetParent !== null).length,
  claims: [...board.querySelectorAll("tr.pc-claim")].filter(row => row.offsetParent !== null).length,
  says: board.querySelector(".pc-filters output").textContent,
});
seen.all = left();
move(lists[2], "fails (expected)", "change");
seen.verdict = left();
move(lists[0], "qsr", "change");
seen.chapter = left();
move(lists[1], "standard", "change");
seen.none = left();
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
board.querySelector("form").reset();
setTimeout(() => {
  seen.reset = left();
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
}, 50);
"""


def _dump(page, profile):
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={profile}",
        "--window-size=500,900",
        "--dump-dom",
        page.as_uri(),
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    except (subprocess.TimeoutExpired, OSError):
        return ""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine to run the scripts in")
def test_controls_and_filters_work_in_a_browser(pages, tmp_path):
    head = "<!doctype html><html><head><meta charset='utf-8'>"
    empty = tmp_path / "empty.html"
    empty.write_text(f"{head}<title>ready</title></head><body></body></html>", encoding="utf-8")
    if "ready" not in _dump(empty, tmp_path / "profile"):
        pytest.skip("the browser of this machine does not start without a screen")
    page = tmp_path / "page.html"
    catch = "<script>const errors = []; window.onerror = message => { errors.push(message); };</script>"
    scripts = "".join(
        f"<script src='{(STATIC / name).as_uri()}'></script>" for name in ("explore.js", "scoreboard.js")
    )
    style = f"<link rel='stylesheet' href='{(STATIC / 'book.css').as_uri()}'>"
    driver = f"<script>window.addEventListener('load', () => {{{DRIVER.replace('{errors}', '{ errors }')}}});</script>"
    page.write_text(
        f"{head}{catch}{style}{scripts}{driver}</head><body>{pages}</body></html>", encoding="utf-8"
    )
    dumped = re.search(r'<pre id="seen">(.*?)</pre>', _dump(page, tmp_path / "profile"), flags=re.DOTALL)
    assert dumped, "the page's script did not come to its end"
    seen = json.loads(dumped[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert seen["errors"] == []

    assert seen["start"]["label"] == "A power. Shown: p = 1, kind = rise."
    assert seen["moved"]["label"] == "A power. Shown: p = 3, kind = rise."
    assert seen["chosen"]["label"] == "A power. Shown: p = 3, kind = fall."
    assert (seen["moved"]["text"], seen["moved"]["shown"], seen["moved"]["spoken"]) == ("p is 3", "3", "3")
    assert len({seen[state]["curve"] for state in ("start", "moved", "chosen")}) == 3
    assert all(seen["labelled"]) and len(seen["labelled"]) == 3
    assert seen["still"] == 0, "the note for readers without scripts is gone"
    assert len(set(seen["ids"])) == len(seen["ids"]), "several figures share a page"
    assert seen["gap"].count("L") == 1, "zero on a log axis is a gap"

    assert (seen["all"]["rows"], seen["all"]["tables"], seen["all"]["claims"]) == (12, 2, 12)
    assert (seen["verdict"]["rows"], seen["verdict"]["tables"], seen["verdict"]["claims"]) == (2, 2, 2)
    assert (seen["chapter"]["rows"], seen["chapter"]["tables"]) == (1, 1)
    assert (seen["none"]["tables"], seen["none"]["says"]) == (0, "No verdict matches.")
    assert seen["reset"]["rows"] == 12
    assert seen["wide"] <= 0, "a narrow page does not scroll sideways"
