from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Fields that only `standard` reads."""
