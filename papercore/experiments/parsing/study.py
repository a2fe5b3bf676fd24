"""Larger masked language models of a grammar: trained, compared with the optimum, probed; the part that `standard` and `paper` share.

Every model and every seed of its probes is a stage, and a model's training keeps checkpoints: a killed run goes on where it was.

Glossary
    name        "A4L6": 4 heads, 6 layers
    source      what the models are trained on: sentences of one grammar
    elsewhere   where probes are also tested: another grammar's sentences, or a treebank's
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from papercore.experiments.parsing.corpus import Sentences, draw, one_mask
from papercore.experiments.parsing.masked_lm import log_probabilities, make_model, new_optimizer, train_model
from papercore.experiments.parsing.predictors import Counts, Scores, posterior
from papercore.experiments.parsing.probing import (
    KINDS,
    TASKS,
    bound,
    fit_and_test,
    material,
    probe_seed,
    summary,
)
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.lab.statistics import summarize
from papercore.lab.training import Checkpoint
from papercore.parsing import PCFG, branching, tree_f1

NAME = re.compile(r"A(\d+)L(\d+)")


@dataclass(frozen=True)
class Plan:
    """Sizes of a study; the settings of `standard` and `paper` under common names."""

    device: torch.device
    seed: int
    models: tuple[str, ...]
    pre_norm: bool
    width: int
    sentences: int
    min_length: int
    max_length: int
    steps: int
    batch: int
    lr: float
    warmup: int
    mask_rate: float
    save_every: int
    masked: int
    probe_seeds: int
    probe_train: int
    probe_choose: int
    probe_test: int
    probe_spans: int
    probe_steps: int

    @classmethod
    def of(cls, config: Any, prefix: str, **more: Any) -> Plan:
        """From a config's fields that begin with `prefix`."""
        names = [name for name in cls.__dataclass_fields__ if name not in ("device", "seed", *more)]
        taken = {name: getattr(config, f"{prefix}_{name}") for name in names}
        return cls(device=config.torch_device(), seed=1000 * config.seed, **taken, **more)

    @property
    def probe_sizes(self) -> tuple[int, int, int]:
        return self.probe_train, self.probe_choose, self.probe_test


Pool = Callable[[int], Sentences]  # probe seed -> sentences with trees


def heads_and_layers(name: str) -> tuple[int, int]:
    """(4, 6) of "A4L6".

    >>> heads_and_layers("A12L3")
    (12, 3)
    """
    found = NAME.fullmatch(name)
    if not found or not int(found[1]) or not int(found[2]):
        raise ValueError(f"model {name!r}: expected A<heads>L<layers>, such as A4L6.")
    return int(found[1]), int(found[2])


def run_study(
    plan: Plan, grammar: PCFG, record: Record, stages: Stages, *, elsewhere: Pool, shifted: PCFG | None = None
) -> None:
    """Train, score and probe every model; the first one is also probed elsewhere. With `shifted`, score on its sentences too."""
    for name in plan.models:
        heads_and_layers(name)  # all names are read before the first model is trained
    for number, name in enumerate(plan.models):
        model = trained(plan, name, grammar, stages)
        _score(plan, name, model, grammar, record, stages, first=number == 0, shifted=shifted)
        _probe(plan, name, model, grammar, record, stages, first=number == 0)
        if number == 0:
            _across(plan, name, model, grammar, record, stages, elsewhere)


def new_model(plan: Plan, name: str, words: int) -> nn.Module:
    """An untrained model of that name."""
    heads, layers = heads_and_layers(name)
    model = make_model(
        words, width=plan.width, layers=layers, heads=heads, max_length=plan.max_length, seed=plan.seed, pre_norm=plan.pre_norm
    )  # fmt: skip
    return model.to(plan.device)


def trained(plan: Plan, name: str, grammar: PCFG, stages: Stages) -> nn.Module:
    """The trained model of that name, from its stage."""

    def part() -> dict[str, Any]:
        sentences = draw(grammar, plan.sentences, plan.min_length, plan.max_length, plan.seed + 1)
        model = new_model(plan, name, len(grammar.vocabulary))
        optimizer = new_optimizer(model, plan.lr)
        folder = stages.folder(f"model {name}")
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint = Checkpoint(
            folder / "state.pt", plan.save_every, {"model": model, "optimizer": optimizer}
        )
        losses, _ = train_model(
            model, sentences, steps=plan.steps, batch=plan.batch, lr=plan.lr, warmup=plan.warmup, mask_rate=plan.mask_rate,
            seed=plan.seed + 4, optimizer=optimizer, checkpoint=checkpoint, text=f"model {name}",
        )  # fmt: skip
        weights = {f"w:{k}": v.float().cpu().numpy() for k, v in model.state_dict().items()}
        return {"losses": np.array(losses), **weights}

    stored = stages.get(f"model {name}", part)
    model = new_model(plan, name, len(grammar.vocabulary))
    model.load_state_dict(
        {k.removeprefix("w:"): torch.from_numpy(v) for k, v in stored.items() if k.startswith("w:")}
    )
    return model


def _score(
    plan: Plan, name: str, model: nn.Module, grammar: PCFG, record: Record, stages: Stages, *, first: bool, shifted: PCFG | None
) -> None:  # fmt: skip
    """Cross-entropy, gap and divergence of a model on fresh sentences of its grammar, and of another one over the same words."""
    worst_gap, worst_kl = [], []
    for where, source in (("", grammar), *((("shifted_", shifted),) if shifted is not None else ())):

        def part(source: PCFG = source) -> dict[str, Any]:
            words = len(source.vocabulary)
            tests = draw(source, plan.masked, plan.min_length, plan.max_length, plan.seed + 2)
            ids, position, targets = one_mask(tests, words, plan.seed + 3)
            bayes = posterior(source, ids, tests.lengths, position)
            found = Scores.of(
                log_probabilities(model, ids, tests.lengths, position), bayes, targets
            ).summary()
            counts = Counts.of(draw(source, 30_000, plan.min_length, plan.max_length, plan.seed + 5), words)
            window = Scores.of(counts.window(ids, tests.lengths, position), bayes, targets).summary()
            return {"model": found, "window": window}

        found = stages.get(f"scores {where}{name}", part)
        for what, value in found["model"].items():
            record.metric(f"{name}_{where}{what}", value, "abs:0.05")
        one = found["model"]
        if where == "":
            worst_gap.append(one["gap"] / one["gap_se"])
            worst_kl.append(abs(one["gap"] - one["kl"]) / one["gap_minus_kl_se"])
        if first:
            record.metric(f"{where}window_gap", found["window"]["gap"], "abs:0.05")
            record.metric(f"{where}bayes_ce", one["ce"] - one["gap"], "abs:0.05")
    record.metric(f"{name}_gap_z", min(worst_gap), "volatile")
    record.metric(f"{name}_gap_minus_kl_z", max(worst_kl), "volatile")
    record.metric(f"{name}_weights", sum(p.numel() for p in model.parameters()), "exact")


def _probe(
    plan: Plan, name: str, model: nn.Module, grammar: PCFG, record: Record, stages: Stages, *, first: bool
) -> None:  # fmt: skip
    def part(seed: int) -> dict[str, Any]:
        pool = source_pool(plan, grammar, seed)
        return probe_seed(
            model, grammar, pool, plan.probe_sizes, plan.seed + seed, spans=plan.probe_spans, steps=plan.probe_steps
        )  # fmt: skip

    parts = [stages.get(f"probes {name}, seed {seed}", bound(part, seed)) for seed in range(plan.probe_seeds)]
    scores = np.stack([one["scores"] for one in parts])
    for t, task in enumerate(TASKS):
        for k, kind in enumerate(KINDS):
            record.array(f"{name}_probe_{task}_{kind}", scores[:, 1, t, k])
            if first:
                record.array(f"probe_{task}_{kind}", scores[:, 1, t, k])
    for what, value in summary(scores[:, 0], scores[:, 1]).items():
        moves = "abs:12" if what.endswith("_layer") else "abs:0.05"
        record.metric(f"{name}_{what}", value, moves)
        if first:
            record.metric(what, value, moves)
    if first:
        for what in ("right", "left", "io"):
            found = summarize([one[what] for one in parts])
            record.metric(f"{what}_f1", found.mean, "abs:0.02")
            record.metric(f"{what}_f1_se", found.se, "abs:0.02")
        record.metric("probe_seeds", plan.probe_seeds, "exact")


def source_pool(plan: Plan, grammar: PCFG, seed: int) -> Sentences:
    """Sentences of one probe seed, with trees."""
    return draw(
        grammar, sum(plan.probe_sizes), plan.min_length, plan.max_length, plan.seed + 100 + seed, trees=True
    )


def _across(
    plan: Plan, name: str, model: nn.Module, grammar: PCFG, record: Record, stages: Stages, elsewhere: Pool
) -> None:
    """Three settings of the parse probe: fitted and tested at home; fitted and tested elsewhere; fitted at home, tested elsewhere.

    The layer of the first and the third is chosen at home: nothing of elsewhere is looked at.
    """
    words = len(grammar.vocabulary)

    def part(seed: int) -> dict[str, Any]:
        home, away = source_pool(plan, grammar, seed), elsewhere(seed)
        parts = [
            material(model, one, torch.ones(len(one), *one.ids.shape[1:] * 2), words, plan.seed + seed, 10)
            for pool in (home, away)
            for one in _split(pool, plan.probe_sizes)
        ]
        at_home = fit_and_test(
            parts[0],
            [parts[1], parts[2], parts[5]],
            plan.seed + seed,
            steps=plan.probe_steps,
            tasks=("parse",),
        )
        there = fit_and_test(
            parts[3], [parts[4], parts[5]], plan.seed + seed, steps=plan.probe_steps, tasks=("parse",)
        )
        gold = parts[5].sentences.trees
        right = float(tree_f1(gold, [branching(tree.leaves()) for tree in gold]))
        return {"home": at_home[:, 0], "there": there[:, 0], "right": right}

    found = [stages.get(f"across {name}, seed {seed}", bound(part, seed)) for seed in range(plan.probe_seeds)]
    home = np.stack([one["home"] for one in found])  # [seeds, choose test away, kinds, layers + 1]
    there = np.stack([one["there"] for one in found])
    for k, kind in enumerate(KINDS):
        at = 1 + int(home[:, 0, k, 1:].mean(0).argmax())
        own = 1 + int(there[:, 0, k, 1:].mean(0).argmax())
        for what, values in (
            ("home", home[:, 1, k, at]),
            ("elsewhere", there[:, 1, k, own]),
            ("ood", home[:, 2, k, at]),
            ("ood_drop", np.minimum(home[:, 1, k, at], there[:, 1, k, own]) - home[:, 2, k, at]),
        ):
            mean = summarize(values.tolist())
            record.metric(f"{what}_{kind}", mean.mean, "abs:0.05")
            record.metric(f"{what}_{kind}_se", mean.se, "abs:0.05")
    record.metric("elsewhere_right_f1", float(np.mean([one["right"] for one in found])), "abs:0.02")


def _split(pool: Sentences, sizes: Sequence[int]) -> list[Sentences]:
    """Parts of a pool in the proportion of `sizes`; a smaller pool gives smaller parts."""
    share = min(1.0, len(pool) / sum(sizes))
    counts = [max(2, int(size * share)) for size in sizes]
    starts = [0, counts[0], counts[0] + counts[1]]
    return [pool.part(start, start + count) for start, count in zip(starts, counts, strict=True)]
