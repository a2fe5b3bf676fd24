"""The record of a run from which its weights can be made again: one scalar a draw.

Section 2.1 of the paper observes that a fine-tuned model is its base plus the sequence of (seed, projected
gradient). Here the seeds follow from one master seed (seeds.py), so that the log is 4 bytes a draw and a
header.

Glossary
    T             steps so far, len(log)
    draws         directions of a step (n, times the ranks when these split the directions)
    scalar        projected gradient of a draw, pg, float32: what the update used, to the last bit
    run           consecutive steps with the same draws, lr, eps and decay
    flush         a pipelined run's parameters were put at the centre after so many steps
    retreat       an attempt that an exception ended; in place it leaves rounding behind, so replay repeats it

File: 8 bytes magic, header length and CRC-32 of all that follows (two uint32), the header (JSON, zlib), the
scalars (float32), all little-endian. A NaN scalar marks a step that was skipped because a loss was not
finite.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papercore.mezo.seeds import draw_seed
from papercore.mezo.settings import GroupSettings, Rule, Settings
from papercore.mezo.weights import Weight

_MAGIC = b"ZOLOG\x00\x01\n"
_FRONT = struct.Struct("<8sII")


@dataclass(frozen=True)
class Base:
    """The starting weights: the table of parameters and checksums of what they held."""

    table: tuple[Weight, ...]
    checksum: int
    frozen_checksum: int


@dataclass(frozen=True)
class Entry:
    """One step of the log."""

    seeds: tuple[int, ...]
    projected_grads: tuple[float, ...]
    settings: Settings

    @property
    def skipped(self) -> bool:
        """True if a loss was not finite and the step made no update."""
        return math.isnan(self.projected_grads[0])

    @property
    def projected_grad(self) -> float:
        """Mean over the draws."""
        return sum(self.projected_grads) / len(self.projected_grads)


@dataclass(frozen=True)
class Retreat:
    """An attempt at step `step` that ended after `moves` perturbations."""

    step: int
    moves: int
    settings: Settings


@dataclass
class ZOLog:
    """(seed, projected gradient) of every step so far, with what is needed to repeat the run (section 2.1 of
    the paper).

    len(log) is the number of steps; log[t] is an `Entry` with .seeds, .projected_grads and .settings of step
    t, and iterating gives all of them. A file holds 4 bytes a draw: with n = 1 and a constant learning rate,
    20,000 steps take 80 kB and a header of a few kB at most; a learning rate that changes at each step adds
    about 11 bytes a step.

    >>> import torch
    >>> from papercore.mezo import MeZO, ZOLog
    >>> weight = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = MeZO([weight], lr=1e-2)
    >>> for _ in range(5):
    ...     _ = optimizer.step(lambda: (weight**2).sum())
    >>> len(optimizer.log), len(ZOLog.from_bytes(optimizer.log.to_bytes()))
    (5, 5)
    >>> optimizer.log[4].projected_grad == optimizer.projected_grad
    True
    """

    rule: Rule
    base: Base | None = None
    _scalars: array = field(default_factory=lambda: array("f"))
    _runs: list[Settings] = field(default_factory=list)
    _run_ends: list[int] = field(default_factory=list)  # steps up to and including each run
    _run_scalars: list[int] = field(default_factory=list)  # scalars before each run
    skipped: list[int] = field(default_factory=list)
    flushes: list[int] = field(default_factory=list)
    retreats: list[Retreat] = field(default_factory=list)
    first_of_many: int | None = None  # the first step with more than one draw
    before_save: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    # ---- reading

    def __len__(self) -> int:
        return self._run_ends[-1] if self._run_ends else 0

    def __getitem__(self, step: int) -> Entry:
        at = step + len(self) if step < 0 else step
        if not 0 <= at < len(self):
            raise IndexError(f"step {step} is not in a log of {len(self)} steps")
        settings, scalars = self.settings(at), self.scalars(at)
        seeds = tuple(draw_seed(self.rule.seed, at, draw) for draw in range(settings.draws))
        return Entry(seeds, tuple(scalars), settings)

    def __iter__(self) -> Iterator[Entry]:
        return (self[step] for step in range(len(self)))

    @property
    def seed(self) -> int:
        """The master seed."""
        return self.rule.seed

    @property
    def projected_grads(self) -> Tensor:
        """All scalars in order, float32 [number of draws]: a copy. NaN where a step was skipped."""
        return torch.tensor(self._scalars, dtype=torch.float32)

    def settings(self, step: int) -> Settings:
        """Draws, lr, eps and decay of a step."""
        return self._runs[bisect.bisect_right(self._run_ends, step)]

    def scalars(self, step: int) -> array:
        """Projected gradients of a step's draws."""
        run = bisect.bisect_right(self._run_ends, step)
        draws = self._runs[run].draws
        first = self._run_scalars[run] + (step - (self._run_ends[run - 1] if run else 0)) * draws
        return self._scalars[first : first + draws]

    def is_skipped(self, step: int) -> bool:
        """True if the step made no update because a loss was not finite."""
        at = bisect.bisect_left(self.skipped, step)
        return at < len(self.skipped) and self.skipped[at] == step

    def taken(self, step: int) -> int:
        """Number of updates among steps 0 .. step."""
        return step + 1 - bisect.bisect_right(self.skipped, step)

    # ---- writing, by the optimiser

    def append(self, scalars: list[float], settings: Settings) -> None:
        """Adds a step. A NaN among the scalars marks the step as skipped."""
        step = len(self)
        if any(math.isnan(value) for value in scalars):
            scalars = [math.nan] * len(scalars)
            self.skipped.append(step)
        if self._runs and self._runs[-1] == settings:
            self._run_ends[-1] += 1
        else:
            self._run_scalars.append(len(self._scalars))
            self._runs.append(settings)
            self._run_ends.append(step + 1)
            if settings.draws > 1 and self.first_of_many is None:
                self.first_of_many = step
        self._scalars.extend(scalars)

    # ---- bytes and files

    def _header(self) -> bytes:
        known: dict[Settings, int] = {}
        for settings in [*self._runs, *(r.settings for r in self.retreats)]:
            known.setdefault(settings, len(known))
        lengths = [b - a for a, b in zip([0, *self._run_ends], self._run_ends, strict=False)]
        content = {
            "rule": asdict(self.rule),
            "settings": [[s.draws, *s.groups] for s in known],
            "runs": [[n, known[s]] for n, s in zip(lengths, self._runs, strict=True)],
            "flushes": self.flushes,
            "retreats": [[r.step, r.moves, known[r.settings]] for r in self.retreats],
            "base": None
            if self.base is None
            else {
                "table": [[w.name, w.shape, w.dtype, w.group, w.decays, w.trained] for w in self.base.table],
                "checksum": self.base.checksum,
                "frozen_checksum": self.base.frozen_checksum,
            },
        }
        return zlib.compress(json.dumps(content, separators=(",", ":")).encode(), 9)

    @property
    def header_nbytes(self) -> int:
        """Bytes of a saved file that are not scalars."""
        return _FRONT.size + len(self._header())

    @property
    def nbytes(self) -> int:
        """Size of the saved file: header_nbytes + 4 bytes a draw."""
        return self.header_nbytes + 4 * len(self._scalars)

    def to_bytes(self) -> bytes:
        """The content of a saved file."""
        header = self._header()
        scalars = array("f", self._scalars)
        if sys.byteorder == "big":
            scalars.byteswap()
        rest = header + scalars.tobytes()
        return _FRONT.pack(_MAGIC, len(header), zlib.crc32(rest, len(header))) + rest

    @classmethod
    def from_bytes(cls, content: bytes, *, source: str = "these bytes") -> ZOLog:
        """The log that `to_bytes` wrote. ValueError if the bytes are something else, cut or damaged."""
        if len(content) < _FRONT.size or not content.startswith(_MAGIC[:5]):
            raise ValueError(f"{source}: not a log of a MeZO run (it does not begin with {_MAGIC[:5]!r})")
        magic, length, checksum = _FRONT.unpack_from(content)
        if magic != _MAGIC:
            raise ValueError(
                f"{source}: a log of another format version, {magic!r}; this one reads {_MAGIC!r}"
            )
        rest = content[_FRONT.size :]
        if zlib.crc32(rest, length) != checksum:  # started from the length, so that this is covered too
            raise ValueError(
                f"{source}: the log is damaged or cut short (its checksum does not fit its content)"
            )
        return cls._parse(json.loads(zlib.decompress(rest[:length])), rest[length:])

    @classmethod
    def _parse(cls, content: dict[str, Any], body: bytes) -> ZOLog:
        rule = content["rule"]
        if rule["betas"] is not None:
            rule["betas"] = tuple(rule["betas"])
        settings = [
            Settings(row[0], tuple(GroupSettings(*g) for g in row[1:])) for row in content["settings"]
        ]
        log = cls(Rule(**rule))
        if content["base"] is not None:
            table = tuple(Weight(row[0], tuple(row[1]), *row[2:]) for row in content["base"]["table"])
            log.base = Base(table, content["base"]["checksum"], content["base"]["frozen_checksum"])
        scalars = array("f")
        scalars.frombytes(body)
        if sys.byteorder == "big":
            scalars.byteswap()
        at = 0
        for count, which in content["runs"]:
            draws = settings[which].draws
            for _ in range(count):
                log.append(list(scalars[at : at + draws]), settings[which])
                at += draws
        log.flushes = list(content["flushes"])
        log.retreats = [Retreat(step, moves, settings[which]) for step, moves, which in content["retreats"]]
        return log

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the log, whole or not at all: a temporary file is renamed. A pipelined run is flushed first.

        An earlier log or an empty file at `path` is replaced; ValueError for anything else that stands there.
        """
        target = Path(path)
        _check_replaceable(target)
        if self.before_save is not None:
            self.before_save()
        draft = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            draft.write_bytes(self.to_bytes())
            os.replace(draft, target)
        finally:
            draft.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ZOLog:
        """Reads a saved log. Raises FileNotFoundError, or ValueError for a file that is none or is damaged."""
        return cls.from_bytes(Path(path).read_bytes(), source=str(path))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before_save": None}  # a copy belongs to no optimiser


def _check_replaceable(path: Path) -> None:
    """ValueError if something stands at `path` that is no log: nothing that was not written here is lost."""
    if not path.exists():
        return
    if path.is_dir():
        kind = "is a folder"
    elif not path.is_file():
        kind = "is no regular file (a device or a pipe)"
    else:
        with open(path, "rb") as file:
            begin = file.read(5)
        if begin in (b"", _MAGIC[:5]):
            return
        kind = "holds something that is no log of a MeZO run"
    raise ValueError(f"{path} {kind} and is not replaced: give the path of a new file or of an earlier log")
