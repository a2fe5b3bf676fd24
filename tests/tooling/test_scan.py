from pathlib import Path

import pytest

from tooling.scan import scan

FETCHED = {
    "script": '<script src="https://host.example/x.js"></script>',
    "without scheme": '<script src="//host.example/x.js"></script>',
    "picture": '<img alt="" src="http://host.example/x.png">',
    "one of several pictures": '<img alt="" src="data:," srcset="data:, 1x, https://host.example/x.png 2x">',
    "style sheet": '<link rel="stylesheet" href="https://host.example/x.css">',
    "font": '<link rel="preload" as="font" href="https://host.example/x.woff2">',
    "warm-up": '<link rel="dns-prefetch" href="//host.example">',
    "icon": '<link rel="icon" href="https://host.example/i.ico">',
    "style element": "<style>@import 'https://host.example/x.css';</style>",
    "style attribute": '<p style="background: url(https://host.example/x.png)">',
    "frame": '<iframe src="https://host.example/"></iframe>',
    "object": '<object data="https://host.example/x.svg"></object>',
    "vector picture": '<svg><image href="https://host.example/x.png"/></svg>',
    "form": '<form action="https://host.example/search">',
    "base": '<base href="https://host.example/">',
    "refresh": '<meta http-equiv="refresh" content="0; url=https://host.example/">',
    "fetch": "<script>fetch('https://host.example/data.json')</script>",
    "import": '<script type="module">import {a} from "https://host.example/m.js"</script>',
    "import at once": '<script type="module">import "https://host.example/m.js"</script>',
    "import later": "<script>import(`https://host.example/m.js`)</script>",
    "made element": '<script>s.src = "https://host.example/x.js"</script>',
    "require": "<script>require(['https://host.example/x.js'])</script>",
    "socket": "<script>new WebSocket('wss://host.example')</script>",
    "request": "<script>r.open('GET', 'https://host.example/x')</script>",
    "on load": "<body onload=\"fetch('https://host.example/')\">",
}
HARMLESS = {
    "a link to click": '<a href="https://host.example/">paper</a>',
    "what the page says of itself": '<link rel="canonical" href="https://host.example/page"><link rel="license" href="https://host.example/l">',
    "a name, not an address": '<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    "data in the page": '<img alt="" src="data:image/png;base64,AAAA">',
    "data that names a host": '<script type="application/json">{"src": "https://host.example", "import": "https://host.example"}</script>',
    "words": "<p>See https://host.example, fetch('https://host.example').</p>",
    "a constant": '<script>const HOME = "https://host.example";</script>',
    "a place on the page": '<a href="#top">up</a><svg><use href="#shape"/></svg>',
    "a local form": '<form action="search.html">',
}


def page(folder: Path, body: str) -> Path:
    (folder / "index.html").write_text(f"<!doctype html><html><body>{body}</body></html>")
    return folder


@pytest.mark.parametrize("what", FETCHED)
def test_requests_to_another_host_are_found(tmp_path: Path, what: str) -> None:
    found = scan(page(tmp_path, FETCHED[what]))
    assert len(found) == 1 and found[0].startswith("index.html: requests ") and "host.example" in found[0]


@pytest.mark.parametrize("what", HARMLESS)
def test_what_loads_nothing_is_let_pass(tmp_path: Path, what: str) -> None:
    assert scan(page(tmp_path, HARMLESS[what])) == []


def test_style_sheets_and_scripts_are_read(tmp_path: Path) -> None:
    page(tmp_path, '<link rel="stylesheet" href="a.css"><script src="b.js"></script>')
    (tmp_path / "a.css").write_text(
        '/* url(https://in.a.comment/) */ @font-face { src: url("https://host.example/f.woff") } @import url(//host.example/x.css);'
    )
    (tmp_path / "b.js").write_text(
        "export * from 'https://host.example/m.js'; const ns = 'http://www.w3.org/1999/xhtml'"
    )
    assert scan(tmp_path) == [
        "a.css: requests //host.example/x.css",
        "a.css: requests https://host.example/f.woff",
        "b.js: requests https://host.example/m.js",
    ]


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.css").write_text("p { background: url(gone.png) }")
    page(tmp_path, '<link rel="stylesheet" href="there.css?v=1"><script src="gone.js#x"></script>')
    assert scan(tmp_path) == [
        "index.html: needs gone.js, which is not there",
        "there.css: needs gone.png, which is not there",
    ]


def test_an_empty_folder_is_no_clean_book(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="build the book first"):
        scan(tmp_path)
