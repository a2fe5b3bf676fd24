"""Settings of the chapter at `standard` scale."""

from __future__ import annotations

import dataclasses

from papercore.lab.config import option


@dataclasses.dataclass(frozen=True)
class StandardSettings:
    """Filled below."""
