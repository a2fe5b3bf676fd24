"""The chapters: what exists, how a config of one is made, how it is run, and where its records are.

config = configure("mezo", scale="quick", device="cpu")
record = execute(config)          # runs it, or reuses the record of the same config and the same code
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from papercore.lab import claims
from papercore.lab.config import SCALES, Config, checked_choice
from papercore.lab.paths import record_folders, refuse_unwritable, runs_folder
from papercore.lab.progress import say
from papercore.lab.record import Record
from papercore.lab.stages import Stages


@dataclasses.dataclass(frozen=True)
class Chapter:
    """A chapter of the book: slug, title, the part it stands in, the paper's number on arXiv."""

    slug: str
    title: str
    part: str
    arxiv: str


CHAPTERS: dict[str, Chapter] = {
    c.slug: c
    for c in (
        Chapter("mezo", "MeZO: fine-tuning with just forward passes", "Optimisation", "2305.17333"),
        Chapter("qsr", "QSR: synchronise less as the learning rate falls", "Optimisation", "2310.14423"),
        Chapter("local_sgd", "Local SGD: fewer averages, flatter minima", "Optimisation", "2303.01215"),
        Chapter(
            "tint", "TinT: a transformer that fine-tunes a transformer", "Inside transformers", "2307.01189"
        ),
        Chapter(
            "parsing",
            "Parsing: what a masked language model knows of grammar",
            "Inside transformers",
            "2303.08117",
        ),
        Chapter(
            "grafting", "Grafting: where in the weights a skill sits", "Inside transformers", "2302.06600"
        ),
    )
}


def load(slug: str) -> ModuleType:
    """The experiment package of a chapter. ValueError for an unknown slug lists the known ones."""
    checked_choice("chapter", slug, CHAPTERS)
    return importlib.import_module(f"papercore.experiments.{slug}")


def configure(
    slug: str,
    scale: str = "quick",
    device: str = "auto",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The config of a chapter at a scale.

    Args:
        overrides: fields by name, as given by papermill or `--set`.

    Raises:
        ValueError: unknown slug, scale, device or field (the message lists the valid ones).
        TypeError: a value of the wrong kind.
    """
    experiment = load(slug)
    checked_choice("scale", scale, SCALES)
    taken = {"scale", "device", "seed"} & set(overrides or {})
    if taken:
        raise ValueError(
            f"overrides must not hold {', '.join(sorted(taken))}: these have a parameter of their own."
        )
    return experiment.Config.at(scale, device=device, seed=seed, **dict(overrides or {}))


def run_path(config: Config) -> Path:
    """Where the record of this config goes when no file is named."""
    return runs_folder() / config.slug / f"{config.scale}-{config.digest()}.json"


def finished(config: Config, path: Path | None = None) -> Record | None:
    """The record of exactly this config by exactly this code, if one is on disk.

    Raises:
        ValueError: `path` was named, and holds something that is no record: it may be someone's file.
    """
    own = path is None or path == run_path(config)
    path = run_path(config) if path is None else path
    if not path.is_file():
        return None
    try:
        record = Record.load(path)
    except ValueError as error:
        if not own:
            raise
        say(f"{config.slug}: {error}")
        return None
    same = (record.slug, record.scale, record.provenance.get("digest")) == (
        config.slug,
        config.scale,
        config.digest(),
    )
    return record if same and record.fresh else None


def execute(config: Config, *, force: bool = False, out: str | Path | None = None) -> Record:
    """Run a config and save its record, or reuse the finished one.

    Args:
        force: run even when a finished record is there.
        out: file of the record (.json); default: runs/<slug>/<scale>-<digest>.json.

    Raises:
        OSError: the record's folder cannot be written; this is found out before the run, not after it.
        ValueError: `out` is not a .json file, or holds something that is no record (and force is not given).
    """
    path = Path(out) if out is not None else run_path(config)
    if path.suffix != ".json":
        raise ValueError(f"a record is a .json file, got --out {path}.")
    if not force and (record := finished(config, path)):
        say(f"{config.slug}: reusing {path} (same settings, same code; --force runs it again)")
        return record
    stages = Stages.of(config)
    refuse_unwritable(path)
    refuse_unwritable(run_path(config))  # finished parts go there, wherever the record goes
    if force:
        stages.clear()
    earlier = stages.seconds()
    record = load(config.slug).run(config)
    if earlier:
        # Parts that an interrupted run had finished count: the record says what the whole took, and that it came in slices.
        record.provenance |= {"seconds": round(record.provenance["seconds"] + earlier, 1), "resumed": True}
    # Under torchrun every process measures the same numbers; one of them writes.
    if int(os.environ.get("RANK", "0")) == 0:
        record.save(path)
        stages.clear()
    return record


def records(slug: str, scale: str, *, own_runs: bool = True) -> list[Record]:
    """Records of a chapter at a scale, the one to show first: fresh before stale, own runs before the book's, CUDA before CPU."""
    names = [f"{scale}-cuda.json", f"{scale}-cpu.json", f"{scale}.json"]
    paths = [folder / slug / name for folder in record_folders() for name in names]
    if own_runs:
        own = []
        for device in ("auto", "cpu"):
            config = configure(slug, scale, device)
            own.append(run_path(config))
        paths = [*dict.fromkeys(own), *paths]
    found = [Record.load(p) for p in dict.fromkeys(paths) if p.is_file()]
    return sorted(found, key=lambda record: not is_current(record))


def is_current(record: Record) -> bool:
    """True when the record was made by the code that is here now and with the settings that are now the scale's own."""
    if not record.fresh:
        return False
    return (
        record.provenance.get("digest")
        == configure(record.slug, record.scale, record.config["device"]).digest()
    )


def scoreboard(
    slugs: Iterable[str] | None = None, scales: Iterable[str] = SCALES, *, own_runs: bool = True
) -> list[claims.Row]:
    """Every claim of the chapters at every scale with its verdict."""
    rows = []
    for slug in slugs or CHAPTERS:
        checked_choice("chapter", slug, CHAPTERS)
        shown = {
            scale: next(iter(records(slug, checked_choice("scale", scale, SCALES), own_runs=own_runs)), None)
            for scale in scales
        }
        for scale, record in shown.items():
            current = record is not None and is_current(record)
            rows += [claims.judge(claim, scale, record, fresh=current) for claim in claims.load_claims(slug)]
    return rows


def sweep_one(config: Config) -> str:
    """One run of a sweep: execute, return the record's path (finished runs are skipped)."""
    return str(execute(config).path)
