"""Build the book's pages: put a source folder together, and run the strict build over it.

    python -m tooling.render                 # from the notebooks just executed in _build/notebooks
    python -m tooling.render --committed     # from the outputs stored in book/, without executing anything

The pages need no network to read: MathJax is copied from a pinned package, and nothing else is loaded from anywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from tooling.clean import clean_file
from tooling.contents import notebooks
from tooling.execute import BOOK, say, shown
from tooling.sandbox import BUILD, ROOT, environment

CONFIG = ROOT / "_config.yml"
MATHJAX_PACKAGE = "sphinx-mathjax-offline"
# The script with every TeX extension inside, and its fonts; the rest of the package (20 MB) is never asked for.
MATHJAX_FILES = re.compile(r".*/static/mathjax/(tex-chtml-full\.js|output/chtml/fonts/woff-v2/[\w-]+\.woff)")
NOT_SOURCES = ("_build", "records", "*.ipynb", ".ipynb_checkpoints", "__pycache__")
BUILDERS = (
    "jupyter-book",
    "Sphinx",
    "myst-nb",
    "myst-parser",
    "sphinx-book-theme",
    "pydata-sphinx-theme",
    MATHJAX_PACKAGE,
)


def render(executed: Path | None, *, book: Path = BOOK, build: Path = BUILD, config: Path = CONFIG) -> Path:
    """Build the pages; return the folder that holds index.html.

    Args:
        executed: folder with executed notebooks; None takes the outputs stored in `book`.
        build: takes the assembled source (`source/`), the log and the pages (`html/`). Its name must be `_build`.

    Raises:
        RuntimeError: the strict build found something; the message holds its warnings and names the log.
    """
    source, pages, log, stamp = (
        build / "source",
        build / "html",
        build / "logs" / "html.log",
        build / "html.key",
    )
    assemble(source, executed, book)
    key = _digest(source, config)
    if stamp.is_file() and stamp.read_text() == key and (pages / "index.html").is_file():
        say("pages: unchanged since the last strict build, and reused")
        return pages
    stamp.unlink(missing_ok=True)
    for old in (pages, build / ".doctrees"):  # left-overs of moved pages would be found by the search
        shutil.rmtree(old, ignore_errors=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source)]
    command += ["--path-output", str(build.parent), "--config", str(config), "-W", "--keep-going", "-n"]
    begun = time.monotonic()
    say(f"pages: the strict build begins (log {shown(log)})")
    with open(log, "w", encoding="utf-8") as out:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(build) | {"NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        while True:
            try:
                code = child.wait(15)
                break
            except subprocess.TimeoutExpired:
                say(f"  {time.monotonic() - begun:.0f} s, {_last_step(log)}")
    if code or not (pages / "index.html").is_file():
        raise RuntimeError(f"the strict build failed:\n{_complaints(log)}\nlog {shown(log)}")
    for template in pages.glob("_static/*macros.html"):  # the theme leaves its templates among the pages
        template.unlink()
    stamp.write_text(key)
    say(f"pages: built in {time.monotonic() - begun:.0f} s")
    return pages


def assemble(source: Path, executed: Path | None, book: Path) -> None:
    """Put together in `source` what the builder reads: pages, cleaned notebooks, style, MathJax."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(book, source, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for notebook in notebooks(book):
        made = notebook if executed is None else executed / notebook.name
        if not made.is_file():
            raise RuntimeError(f"{shown(made)} is missing: execute the notebooks first (make book)")
        clean_file(made, source / notebook.relative_to(book))
    copy_mathjax(source / "_static" / "mathjax")


def copy_mathjax(target: Path) -> None:
    """MathJax's script and fonts, from the installed package that holds them, with a line on where they are from."""
    try:
        package = metadata.distribution(MATHJAX_PACKAGE)
    except metadata.PackageNotFoundError:
        raise RuntimeError(f"{MATHJAX_PACKAGE} is not installed; it is in papercore's extra `book`") from None
    count = 0
    for file in package.files or []:
        if found := MATHJAX_FILES.fullmatch(file.as_posix()):
            place = target / found[1]
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), place)
            count += 1
    if count < 20:
        raise RuntimeError(
            f"{MATHJAX_PACKAGE} {package.version} holds {count} of the files that formulas need, expected at least 20"
        )
    (target / "NOTICE.txt").write_text(
        "MathJax 3 (https://www.mathjax.org), Copyright (c) The MathJax Consortium, licensed under the Apache License 2.0.\n"
        f"Copied at build time from the Python package {MATHJAX_PACKAGE} {package.version}.\n"
    )


def _digest(source: Path, config: Path) -> str:
    """Over every file the builder reads, its settings, and its version."""
    value = hashlib.sha256(config.read_bytes())
    value.update(repr([metadata.version(name) for name in BUILDERS]).encode())
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        value.update(f"{path.relative_to(source)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return value.hexdigest()


def _complaints(log: Path) -> str:
    lines = [" ".join(line.split()) for line in _text_of(log).replace(f"{ROOT}/", "").splitlines()]
    found = [line for line in lines if re.search(r"WARNING|ERROR|CRITICAL|Error:", line)]
    return "\n".join(f"  {line}" for line in list(dict.fromkeys(found or lines))[-25:])


def _last_step(log: Path) -> str:
    lines = [" ".join(line.split()) for line in _text_of(log).splitlines() if re.search(r"\w", line)]
    return lines[-1][:80] if lines else "starting"


def _text_of(log: Path) -> str:
    """The log without the codes that colour a terminal."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r", "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tooling.render", description=__doc__.split("\n")[0] if __doc__ else ""
    )
    parser.add_argument("--committed", action="store_true", help="render the outputs stored in book/")
    words = parser.parse_args()
    try:
        print(render(None if words.committed else BUILD / "notebooks"))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
