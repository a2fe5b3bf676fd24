"""Settings of the chapter's `paper` scale."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Fields that only `paper` reads."""
