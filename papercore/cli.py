"""The `papercore` command: list chapters, run one without Jupyter, show claims, run many.

Exit status: 0 well; 1 an unexpected verdict, or a run that failed; 2 words that were not understood; 130 interrupted.
Errors are one line; with PAPERCORE_TRACEBACK=1 they come with the place in the code.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from papercore import __version__
from papercore.lab.config import DEVICES, SCALES, parse_settings


class _Parser(argparse.ArgumentParser):
    """Choices are checked by the library, whose messages say more; argparse only splits words."""

    def error(self, message: str) -> Any:
        self.exit(2, f"papercore: {message}\n  {self.prog} --help shows what it takes.\n")


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="papercore",
        description="Ten deep-learning papers that run: list the chapters, run one, show what holds.",
    )
    top.add_argument("--version", action="version", version=f"papercore {__version__}")
    verbs = top.add_subparsers(
        dest="verb", required=True, metavar="list | run | claims | sweep", parser_class=_Parser
    )

    one = verbs.add_parser("list", help="chapters, scales, what each needs, state of its records")
    one.add_argument("--json", action="store_true", help="a JSON list instead of a table")

    run = verbs.add_parser("run", help="run one chapter, without Jupyter")
    run.add_argument("slug", help="the chapter")
    run.add_argument("--scale", default="quick", help=f"size of the run: {', '.join(SCALES)} (default quick)")
    run.add_argument(
        "--device", default="auto", help=f"where tensors live: {', '.join(DEVICES)} (default auto)"
    )
    run.add_argument("--seed", type=int, default=0, help="added to every seed (default 0)")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        nargs="+",
        dest="settings",
        help="settings by name (see `papercore list --json`)",
    )
    run.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the record (default runs/<slug>/<scale>-<digest>.json)",
    )
    run.add_argument("--force", action="store_true", help="run even when the record is there")

    claims = verbs.add_parser("claims", help="reported beside measured; status 1 on an unexpected verdict")
    claims.add_argument("slug", nargs="?", help="one chapter (default all)")
    claims.add_argument("--scale", help=f"one scale of {', '.join(SCALES)} (default all)")
    claims.add_argument("--json", action="store_true", help="a JSON list of rows")
    claims.add_argument("--summary", action="store_true", help="one line per chapter and scale")

    sweep = verbs.add_parser("sweep", help="run many configs over a pool of processes or a Dask cluster")
    sweep.add_argument("slug", help="the chapter")
    sweep.add_argument("--scale", default="quick", help="size of every run")
    sweep.add_argument("--device", default="auto", help="device of every run")
    sweep.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="FIELD=V1,V2",
        nargs="+",
        help="values of a field; `seed` is a field too; all combinations are run",
    )
    sweep.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    sweep.add_argument(
        "--dask", metavar="ADDRESS", help="scheduler of a Dask cluster instead of local processes"
    )
    return top


def main(argv: Sequence[str] | None = None) -> int:
    words = parser().parse_args(argv)
    verbs = {"list": list_chapters, "run": run_chapter, "claims": show_claims, "sweep": sweep_chapter}
    try:
        status = verbs[words.verb](words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(
            "\npapercore: interrupted; finished parts are kept, the same command goes on after them.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`papercore claims | head`): nothing is left to say, also at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError, RuntimeError) as error:
        if os.environ.get("PAPERCORE_TRACEBACK"):
            raise
        words_at_fault = isinstance(error, (ValueError, TypeError))
        print(f"papercore: {'' if words_at_fault else type(error).__name__ + ': '}{error}", file=sys.stderr)
        return 2 if words_at_fault else 1


def list_chapters(words: argparse.Namespace) -> int:
    """Chapters, the scales and what each needs, and the state of the records."""
    from papercore import experiments

    rows: list[dict[str, Any]] = []
    for slug, chapter in experiments.CHAPTERS.items():
        module = experiments.load(slug)
        state = {}
        for scale in SCALES:
            shown = next(iter(experiments.records(slug, scale)), None)
            if shown is None:
                state[scale] = "none"
            else:
                age = "fresh" if experiments.is_current(shown) else "stale"
                state[scale] = (
                    f"{age}, {shown.provenance['hardware']['device']}, {shown.provenance['finished']}"
                )
        settings = {scale: _settings(module.Config.at(scale)) for scale in SCALES}
        rows.append(
            {
                "slug": slug,
                "title": chapter.title,
                "part": chapter.part,
                "arxiv": chapter.arxiv,
                "needs": dict(module.NEEDS),
                "records": state,
                "settings": settings,
            }
        )
    if words.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print(f"{row['slug']:12} {row['title']}  (arXiv {row['arxiv']})")
        for scale in SCALES:
            print(f"  {scale:10} record: {row['records'][scale]:28} needs: {row['needs'][scale]}")
    print(
        "\npapercore run SLUG --scale SCALE runs one; papercore claims SLUG shows reported beside measured."
    )
    return 0


def _settings(config: Any) -> list[dict[str, Any]]:
    """Every setting of a scale with its value there and its help."""
    values = config.as_dict()
    return [{"name": name, "default": values[name], "help": text} for name, _, text in config.describe()]


def run_chapter(words: argparse.Namespace) -> int:
    """Run, then print the verdict table of that scale. Status 1 on an unexpected verdict of an unchanged config."""
    from papercore import experiments
    from papercore.lab import claims

    settings = parse_settings(pair for group in words.settings for pair in group)
    config = experiments.configure(words.slug, words.scale, words.device, words.seed, settings)
    path = words.out or experiments.run_path(config)
    reused = not words.force and experiments.finished(config, path) is not None
    record = experiments.execute(config, force=words.force, out=words.out)
    print(
        f"{'reused' if reused else 'wrote'} {path}"
        + (" (same settings, same code; --force runs it again)" if reused else "")
    )
    rows = [claims.judge(claim, words.scale, record) for claim in claims.load_claims(words.slug)]
    _print_rows(rows)
    seconds, memory = record.provenance["seconds"], record.provenance["peak_memory_bytes"] / 2**30
    print(
        f"\n{config.slug} at {config.scale} on {record.config['device']}: {seconds:.0f} s, {memory:.1f} GiB; {_totals(rows)}"
    )
    # Verdicts are judged for the settings of the book, on any device; a run with other settings only shows them.
    return 0 if config.changed().keys() - {"device"} else _surprises(rows)


def show_claims(words: argparse.Namespace) -> int:
    """Reported beside measured; exit status 1 on an unexpected verdict."""
    from papercore import experiments

    rows = experiments.scoreboard(
        [words.slug] if words.slug else None, [words.scale] if words.scale else SCALES
    )
    if words.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    elif words.summary:
        for slug in dict.fromkeys(row.slug for row in rows):
            for scale in dict.fromkeys(row.scale for row in rows):
                print(
                    f"{slug:12} {scale:9} {_totals([r for r in rows if r.slug == slug and r.scale == scale])}"
                )
    else:
        for scale in dict.fromkeys(row.scale for row in rows):
            print(f"--- {scale}")
            _print_rows([row for row in rows if row.scale == scale])
    return _surprises(rows)


def _surprises(rows: Sequence[Any]) -> int:
    """Name every unexpected verdict on stderr; the exit status, 1 when there is one."""
    surprises = [row for row in rows if row.unexpected]
    for row in surprises:
        print(
            f"unexpected: {row.id} at {row.scale} {row.verdict}"
            + (" although marked as expected to fail" if row.expected else ""),
            file=sys.stderr,
        )
    return int(bool(surprises))


def sweep_chapter(words: argparse.Namespace) -> int:
    """Run every combination of a grid; finished records are kept whatever happens to the others."""
    from papercore.lab.sweep import sweep

    grid: dict[str, tuple[Any, ...]] = {}
    for name, value in parse_settings(pair for group in words.grid for pair in group).items():
        grid[name] = value if isinstance(value, tuple) else (value,)
    from papercore.experiments import configure, sweep_one

    configs = []
    for point in _points(grid):
        seed = point.pop("seed", 0)
        configs.append(configure(words.slug, words.scale, words.device, seed, point))
    failures = 0
    for config, outcome in sweep(sweep_one, configs, jobs=words.jobs, dask=words.dask):
        changed = ", ".join(f"{k}={v}" for k, v in config.changed().items()) or "defaults"
        failures += isinstance(outcome, BaseException)
        print(
            f"{changed}: {f'FAILED {type(outcome).__name__}: {outcome}' if isinstance(outcome, BaseException) else outcome}",
            flush=True,
        )
    return int(failures > 0)


def _points(grid: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = [{}]
    for name, values in grid.items():
        points = [{**point, name: value} for point in points for value in values]
    return points


def _totals(rows: Sequence[Any]) -> str:
    from papercore.lab.claims import totals

    return ", ".join(f"{n} {label}" for label, n in totals(list(rows)).items())


def _print_rows(rows: Sequence[Any]) -> None:
    """The verdict table; as wide as the terminal allows, one claim a block, so that nothing is cut."""
    for row in rows:
        mark = {"holds": "+", "fails": "-"}.get(row.verdict, " ")
        print(f"{mark} {row.id:10} {row.label:26} {row.text}")
        if row.verdict in {"holds", "fails", "stale"}:
            print(f"    reported {row.reported}\n    measured {row.shown}   rule {row.rule}")
        if row.why and row.verdict != "holds":
            print(f"    why      {row.why}")
