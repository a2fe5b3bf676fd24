"""Settings of the chapter at `paper` scale."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PaperSettings:
    """Filled below."""
