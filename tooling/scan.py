"""Look through built pages for anything that a browser would fetch from another host, or not find at all.

    python -m tooling.scan _build/html

Links that a reader may click are no requests. What counts: addresses in src, srcset, poster, data and the like, in <link>
elements that load something, in url() and @import of styles, and in the calls by which scripts load things.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADING = {
    "src",
    "srcset",
    "imagesrcset",
    "poster",
    "data",
    "background",
    "action",
    "formaction",
    "ping",
    "manifest",
    "xlink:href",
}
# Relations of <link> that only say something about the page.
TELLING = {
    "next",
    "prev",
    "up",
    "index",
    "search",
    "canonical",
    "author",
    "license",
    "help",
    "bookmark",
    "alternate",
    "genindex",
    "copyright",
    "top",
}
LOADS_BY_HREF = {"image", "use", "feimage", "script"}  # SVG's elements
EXTERNAL = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//|^\s*(?:https?|ftp|wss?):", re.IGNORECASE)
IN_STYLE = re.compile(r"url\(\s*['\"]?\s*([^'\")\s]+)|@import\s+['\"]([^'\"]+)", re.IGNORECASE)
ADDRESS = r"['\"`]\s*((?:https?:|wss?:)?//[^'\"`\s]+)"
IN_SCRIPT = re.compile(
    rf"(?:\bfetch|\bimport|\bimportScripts|\bsendBeacon|\bloadScript|\bgetScript|\brequire)\s*\(\s*\[?\s*{ADDRESS}"
    rf"|\bnew\s+(?:Worker|SharedWorker|WebSocket|EventSource|URL)\s*\(\s*{ADDRESS}"
    rf"|\.open\(\s*['\"](?:GET|POST|HEAD)['\"]\s*,\s*{ADDRESS}"
    rf"|\b(?:import|export)\b[^;'\"`]{{0,200}}\bfrom\s*{ADDRESS}"
    rf"|\bimport\s*{ADDRESS}"
    rf"|\.(?:src|href)\s*=\s*{ADDRESS}"
    rf"|setAttribute\(\s*['\"](?:src|href)['\"]\s*,\s*{ADDRESS}"
)
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def scan(folder: Path) -> list[str]:
    """Every external request and every missing local file in the pages under `folder`, as `file: what`; sorted.

    Raises:
        ValueError: there is no page to scan, which must not pass for a clean book.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".html", ".css", ".js", ".svg"})
    if not any(path.suffix == ".html" for path in files):
        raise ValueError(f"no HTML page under {folder}: build the book first")
    found = set()
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        for address in _addresses(path, text):
            if EXTERNAL.match(address):
                found.add(f"{path.relative_to(folder)}: requests {address[:120]}")
            elif path.suffix != ".js" and (gone := _missing(path, folder, address)):
                found.add(f"{path.relative_to(folder)}: needs {gone}, which is not there")
    return sorted(found)


def _addresses(path: Path, text: str) -> Iterator[str]:
    """What the file makes a browser load."""
    if path.suffix == ".css":
        yield from _in_style(text)
    elif path.suffix == ".js":
        yield from _in_script(text)
    else:
        page = _Page()
        page.feed(text)
        page.close()
        yield from page.addresses


def _in_style(text: str) -> Iterator[str]:
    for match in IN_STYLE.finditer(COMMENT.sub("", text)):
        yield match[1] or match[2]


def _in_script(text: str) -> Iterator[str]:
    for match in IN_SCRIPT.finditer(text):
        yield next(group for group in match.groups() if group)


def _missing(page: Path, folder: Path, address: str) -> str | None:
    """The local file that the address names, if it is not there."""
    parts = urlsplit(address.strip())
    if parts.scheme or not parts.path:
        return None  # data:, about:, blob:, or a place on the same page
    name = unquote(parts.path)
    target = folder / name.lstrip("/") if name.startswith("/") else page.parent / name
    return None if target.exists() else name


class _Page(HTMLParser):
    """Collects what a page loads, inline styles and scripts included."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.addresses: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self._inside = tag if tag in {"style", "script"} else ""
        if tag == "script" and values.get("type", "").endswith("json"):
            self._inside = ""  # data, not code
        for name, value in values.items():
            if name in LOADING and not (tag == "form" and name == "action" and not EXTERNAL.match(value)):
                self.addresses += (
                    [word.strip(",") for word in value.split() if not re.fullmatch(r"[\d.]+[wx],?", word)]
                    if "srcset" in name
                    else [value]
                )
            elif name == "style":
                self.addresses += _in_style(value)
            elif name.startswith("on"):
                self.addresses += _in_script(value)
        relations = set(values.get("rel", "").lower().split())
        if "href" in values and ((tag == "link" and not relations <= TELLING) or tag in LOADS_BY_HREF):
            self.addresses.append(values["href"])
        if tag == "base":
            self.addresses.append(values.get("href", ""))
        if (
            tag == "meta"
            and values.get("http-equiv", "").lower() == "refresh"
            and "url=" in values.get("content", "").lower()
        ):
            self.addresses.append(re.split("url=", values["content"], flags=re.IGNORECASE)[1].strip("'\" "))

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.addresses += _in_style(data)
        elif self._inside == "script":
            self.addresses += _in_script(data)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("_build/html")
    try:
        found = scan(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for line in found:
        print(line)
    if not found:
        print(f"scan: {sum(1 for _ in folder.rglob('*.html'))} pages, no request to another host")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
