"""An optimiser's state as torch.save stores it: the log says what the next step needs beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from papercore.mezo.log import ZOLog
from papercore.mezo.weights import Weight


def packed(log: ZOLog, n: int) -> dict[str, Any]:
    """The entry of the state dict: a tensor of bytes, so that torch.load(weights_only=True) reads it."""
    return {"log": torch.frombuffer(bytearray(log.to_bytes()), dtype=torch.uint8), "n": n}


def unpacked(state_dict: dict[str, Any], table: Iterable[Weight]) -> tuple[ZOLog, int]:
    """Log and draws of a state dict. ValueError if it is not MeZO's or belongs to other parameters."""
    saved = state_dict.get("mezo")
    if saved is None:
        raise ValueError("the state dict has no 'mezo' entry: it was not saved by a MeZO optimizer")
    log = ZOLog.from_bytes(saved["log"].cpu().numpy().tobytes(), source="the state dict")
    rows = list(table)
    if log.base is not None and _looks(log.base.table) != _looks(rows):
        raise ValueError(
            f"the state dict belongs to other parameters: its log has {len(log.base.table)} of them, this "
            f"optimizer {len(rows)}, or their names, shapes, dtypes, groups or order differ"
        )
    return log, int(saved["n"])


def _looks(table: Iterable[Weight]) -> list[tuple[Any, ...]]:
    return [(row.name, row.shape, row.dtype, row.group, row.trained) for row in table]
