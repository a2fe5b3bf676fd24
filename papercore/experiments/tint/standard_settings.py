"""Settings of the chapter's `standard` scale, apart from the code that uses them, so that reading them loads nothing."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Fields that only `standard` reads."""
