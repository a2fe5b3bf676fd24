"""Who was masked, when, by what: the log that travels with a bottleneck's weights.

Every change to the set of pairs that can be fetched adds an entry. Entries are never changed or removed. A mask hides pairs
and can be taken off; only `erase` and `compact` destroy keys and values, and only they are called erasure here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import torch
from torch import Tensor

__all__ = ["AuditEntry", "AuditLog"]

ACTIONS = ("mask", "unmask", "erase", "compact")


@dataclass(frozen=True)
class AuditEntry:
    """One change.

    action   mask, unmask, erase or compact
    time     UTC, ISO 8601
    by       the rule or person that asked, such as "unlearn_by_activations(num_pairs=300)"
    subject  what was to be forgotten, such as "class 3" or "5,000 examples"
    pairs    pairs whose state changed
    masked   pairs that cannot be fetched afterwards
    digest   SHA-256 of the changed pairs, as bits of the flat [C, K] mask
    shape    (C, K) before the change
    packed   the changed pairs themselves, compressed; `changed()` unpacks them
    """

    action: str
    time: str
    by: str
    subject: str
    pairs: int
    masked: int
    digest: str
    shape: tuple[int, int]
    packed: str

    def changed(self) -> Tensor:
        """BoolTensor [C, K] of the pairs that this entry changed."""
        bits = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(self.packed))), dtype=torch.uint8)
        flat = (bits.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
        return flat.flatten()[: self.shape[0] * self.shape[1]].bool().view(self.shape)

    def __str__(self) -> str:
        subject = f" to forget {self.subject}" if self.subject else ""
        source = f" by {self.by}" if self.by else ""
        return f"{self.time}  {self.action} of {self.pairs:,} pairs{source}{subject} ({self.masked:,} of {self.shape[0] * self.shape[1]:,} masked)"


class AuditLog:
    """The entries of one bottleneck, oldest first: len(log), log[i], iteration; print(log) for people."""

    def __init__(self) -> None:
        self._entries: list[AuditEntry] = []

    def add(
        self, action: str, changed: Tensor, masked: int, *, by: str = "", subject: str = ""
    ) -> AuditEntry:
        """A new entry for the pairs `changed`, BoolTensor [C, K]."""
        bits = _packed(changed.detach().cpu().flatten())
        entry = AuditEntry(
            action=action,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            by=by,
            subject=subject,
            pairs=int(changed.sum()),
            masked=masked,
            digest=hashlib.sha256(bits).hexdigest(),
            shape=(changed.shape[0], changed.shape[1]),
            packed=base64.b64encode(zlib.compress(bits)).decode(),
        )
        self._entries.append(entry)
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> AuditEntry:
        return self._entries[index]

    def __iter__(self) -> Iterator[AuditEntry]:
        return iter(self._entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self._entries)) or "nothing was masked"

    def __repr__(self) -> str:
        return f"AuditLog({len(self)} entries)"

    def to_json(self) -> str:
        """All entries as a JSON list."""
        return json.dumps([asdict(entry) for entry in self._entries])

    @classmethod
    def from_json(cls, text: str) -> AuditLog:
        """The log that `to_json` wrote; ValueError for anything else, or for an entry whose pairs do not match its digest."""
        log = cls()
        try:
            for fields in json.loads(text):
                entry = AuditEntry(**{**fields, "shape": tuple(fields["shape"])})
                bits = zlib.decompress(base64.b64decode(entry.packed))
                if hashlib.sha256(bits).hexdigest() != entry.digest:
                    raise ValueError(f"the pairs of the entry of {entry.time} do not match its digest")
                log._entries.append(entry)
        except (TypeError, KeyError, zlib.error, json.JSONDecodeError) as error:
            raise ValueError(f"not an audit log, or damaged ({type(error).__name__}: {error})") from None
        return log


def _packed(flat: Tensor) -> bytes:
    """Eight pairs a byte, the first in the lowest bit."""
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
    return bytes((padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8).tolist())
