"""Progress on stderr: a bar in a terminal, silence elsewhere, plain lines on request.

PAPERCORE_PROGRESS=line prints a line every ten seconds (for logs); =off prints nothing even in a terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def _mode() -> str:
    asked = os.environ.get("PAPERCORE_PROGRESS", "auto")
    if asked in {"line", "off", "bar"}:
        return asked
    return "bar" if sys.stderr.isatty() else "off"


def progress(iterable: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
    """Yield from `iterable`, showing how far it is. `total` is needed when the iterable has no length."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    mode = _mode()
    if mode == "off":
        yield from iterable
    elif mode == "bar":
        from tqdm import tqdm

        yield from tqdm(iterable, desc=text, total=total, file=sys.stderr, leave=False, dynamic_ncols=True)
    else:
        begun = shown = time.monotonic()
        for done, item in enumerate(iterable, 1):
            yield item
            now = time.monotonic()
            if now - shown > SECONDS_BETWEEN_LINES:
                shown = now
                print(
                    f"{text}: {done}{f'/{total}' if total else ''} after {now - begun:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )


def say(text: str) -> None:
    """One line on stderr when progress is shown at all."""
    if _mode() != "off":
        print(text, file=sys.stderr, flush=True)
