"""The chapter at `quick` scale: a small world, a pre-trained model that comes with the book, and every claim that it can test.

The parts do not depend on each other: several processes make them at once, and each leaves its result where `run_quick` looks for it.
Everything is on the CPU: a GPU would wait for tensors this small. Settings were chosen with --seed 90; the seeds of two
runs have nothing in common.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from papercore.experiments.grafting import report
from papercore.experiments.grafting.config import QuickConfig
from papercore.experiments.grafting.continual import continual_seed
from papercore.experiments.grafting.curves import curve, deranged
from papercore.experiments.grafting.laws import density_by_rate
from papercore.experiments.grafting.multitask import multitask_seed
from papercore.experiments.grafting.pretraining import pretrained
from papercore.experiments.grafting.trust import OVERFIT, trust_seed
from papercore.experiments.grafting.world import TASKS, Documents, documents
from papercore.lab.progress import say
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.sweep import sweep

PROCESSES = 4  # at most
CURVES = ("sentiment", "style")  # tasks whose label words were unbound before; topic is the deranged one

Item = tuple[QuickConfig, str, str, str, int]  # config, folder of the stages, kind, task, seed


def run_quick(config: QuickConfig, record: Record, stages: Stages) -> None:
    """Fill the record; every part is a stage, so that an interrupted run goes on."""
    threads = torch.get_num_threads()
    # The tensors are small: more threads only wait for each other, and the sums stay in one order.
    torch.set_num_threads(1)
    try:
        processes = min(threads, PROCESSES)
        items = parts(config, stages)
        if processes > 1:
            for item, outcome in sweep(make_part, items, jobs=processes, text="grafting"):
                if isinstance(outcome, BaseException):
                    say(f"  {name_of(item)} failed")
                    raise outcome
        for item in items:
            make_part(item)
    finally:
        torch.set_num_threads(threads)
    found = {name_of(item): stages.get(name_of(item), _missing) for item in items}
    report.curves(config, record, found, CURVES)
    report.deranged(config, record, found)
    report.multitask(config, record, found)
    report.trust(config, record, found, list(OVERFIT))
    report.continual(config, record, found)
    report.law(record, found)


def parts(config: QuickConfig, stages: Stages) -> list[Item]:
    """All parts of a run, the longest first."""
    root = str(stages.root)
    out: list[Item] = []
    for s in range(config.seeds):
        out += [(config, root, "curve", name, s) for name in CURVES]
    for s in range(config.seeds):
        out += [(config, root, "tasks", "", s), (config, root, "stages", "", s)]
    for s in range(config.seeds):
        out += [(config, root, "trust", name, s) for name in OVERFIT]
        out += [(config, root, "deranged", "topic", s)]
    return [*out, (config, root, "law", "sentiment", 0)]


def name_of(item: Item) -> str:
    """The stage of a part, such as "curve style 0"."""
    _, _, kind, task, s = item
    return " ".join(str(word) for word in (kind, task, s) if word != "")


def make_part(item: Item) -> str:
    """Compute one part, unless it is on disk; its name."""
    config, root, kind, task, s = item
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    if os.getpid() != _MAIN:
        os.environ["PAPERCORE_PROGRESS"] = "off"  # the main process shows how many parts are done
    Stages(root).get(name_of(item), lambda: _part(config, kind, task, s))
    return name_of(item)


_MAIN = os.getpid()


def _part(config: QuickConfig, kind: str, task: str, s: int) -> dict[str, Any]:
    model, seed = pretrained(), 10_000 * config.seed + 1000 * s
    if kind == "curve":
        return curve(config, model, TASKS[task], test_documents(config), seed + CURVES.index(task))
    if kind == "deranged":
        return deranged(config, model, TASKS[task], test_documents(config), seed + 5)
    if kind == "tasks":
        return multitask_seed(config, model, list(TASKS.values()), test_documents(config), seed + 100)
    if kind == "stages":
        return continual_seed(
            config, model, [TASKS[n] for n in config.order], test_documents(config), seed + 200
        )
    if kind == "trust":
        return trust_seed(config, model, OVERFIT[task], seed + 300 + 100 * list(OVERFIT).index(task))
    return density_by_rate(config, model, TASKS[task], seed)


def test_documents(config: QuickConfig) -> Documents:
    """The test documents: domain A, other words than any training."""
    return documents(config.tests, 10_000 * config.seed + 9990, domain="A")


def _missing() -> dict[str, Any]:
    raise RuntimeError("a part was to be on disk and is not")
