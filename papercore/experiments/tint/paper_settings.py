"""Settings of the chapter's `paper` scale, apart from the code that uses them, so that reading them loads nothing."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Fields that only `paper` reads."""
