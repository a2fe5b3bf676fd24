"""The parts of the `quick` run that take long, as functions of the config, made two at a time in processes of their own.

A part leaves its result in its stage, where quick.py finds it, whoever made it. Results are the same for any number of processes.

Glossary
    part    a name and a number: ("masked words", 0), ("probes", 2); numbers above 0 are seeds of probes
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.parsing import constructing
from papercore.experiments.parsing.config import QuickConfig
from papercore.experiments.parsing.corpus import Sentences, draw, one_mask
from papercore.experiments.parsing.masked_lm import log_probabilities, make_model, train_model
from papercore.experiments.parsing.predictors import Counts, Scores, posterior
from papercore.experiments.parsing.probing import probe_seed
from papercore.lab.progress import say
from papercore.lab.stages import Stages
from papercore.lab.sweep import sweep
from papercore.parsing import english

# Shares of the training run after which the model is tested.
CHECKS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
KEPT = (20, 45)  # in-terminals and pre-terminals that the paper keeps
PROCESSES = 2

Part = tuple[str, int]


def make_parts(config: QuickConfig, stages: Stages, processes: int) -> None:
    """Make what is not on disk yet. Training goes beside what needs no model, then the seeds of the probes side by side.

    Raises:
        what a part raises.
    """
    together(
        (("masked words", 0), ("truncation", 0), ("merged heads", 0), ("equality", 0)),
        config,
        stages,
        processes,
    )
    together([("probes", seed) for seed in range(config.probe_seeds)], config, stages, processes)


def together(parts: Sequence[Part], config: QuickConfig, stages: Stages, processes: int) -> None:
    """Make these parts, several at a time where there are processes for it."""
    missing = [part for part in parts if not stages.done(_stage(part))]
    if processes == 1 or len(missing) < 2:
        for part in missing:
            made(part, config, stages)
        return
    items = [(config, str(stages.root), part) for part in missing]
    for (_, _, part), outcome in sweep(_in_process, items, jobs=processes, text="parts"):
        if isinstance(outcome, BaseException):
            say(f"  {_stage(part)} failed")
            raise outcome


def made(part: Part, config: QuickConfig, stages: Stages) -> dict[str, Any]:
    """The result of a part, from its stage."""
    name, number = part
    work = {
        "masked words": lambda: train_and_test(config),
        "truncation": lambda: {"rows": truncated(config)},
        "merged heads": lambda: {"rows": merged(config)},
        "equality": lambda: {"rows": constructing.equality(config.longest_equal, 1000 * config.seed + 5)},
        "probes": lambda: probed(config, stages, number),
    }
    return stages.get(_stage(part), work[name])


def _stage(part: Part) -> str:
    name, number = part
    return f"{name}, seed {number}" if name == "probes" else name


def _in_process(item: tuple[QuickConfig, str, Part]) -> str:
    """In a process of its own: one part."""
    config, root, part = item
    os.environ["PAPERCORE_PROGRESS"] = "off"  # the main process shows how many parts are done
    torch.set_num_threads(1)
    made(part, config, Stages(root))
    return part[0]


def new_model(config: QuickConfig) -> nn.Module:
    """The model of this scale, untrained."""
    model = make_model(
        len(english().vocabulary), width=config.width, layers=config.layers, heads=config.heads,
        max_length=config.max_length, seed=1000 * config.seed,
    )  # fmt: skip
    return model.to(config.torch_device())


def trained_model(config: QuickConfig, stages: Stages) -> nn.Module:
    """The model as the part "masked words" left it."""
    stored, model = made(("masked words", 0), config, stages), new_model(config)
    model.load_state_dict(
        {k.removeprefix("w:"): torch.from_numpy(v) for k, v in stored.items() if k.startswith("w:")}
    )
    return model


def sentences_of(config: QuickConfig, n: int, number: int, *, trees: bool = False) -> Sentences:
    """n sentences; every use has a number of its own, and so sentences of its own."""
    return draw(english(), n, config.min_length, config.max_length, 1000 * config.seed + number, trees=trees)


def probed(config: QuickConfig, stages: Stages, seed: int) -> dict[str, Any]:
    """All probes of one seed, on sentences of its own."""
    sizes = (config.probe_train, config.probe_choose, config.probe_test)
    pool = sentences_of(config, sum(sizes), 100 + seed, trees=True)
    return probe_seed(
        trained_model(config, stages), english(), pool, sizes, 1000 * config.seed + seed, spans=config.probe_spans,
        steps=config.probe_steps,
    )  # fmt: skip


def kept_symbols(config: QuickConfig) -> list[tuple[int, int]]:
    """Pairs of kept in-terminals and pre-terminals, most first."""
    grammar = english()
    inner, outer = len(grammar.nonterminals), len(grammar.preterminals)
    ins, pres = (*config.kept_in, KEPT[0], inner), (*config.kept_pre, outer)
    return sorted({(min(i, inner), min(p, outer)) for i in ins for p in pres}, reverse=True)


def truncated(config: QuickConfig) -> list[list[float]]:
    """Scores of every truncated grammar."""
    grammar = english()
    tests = sentences_of(config, config.truncation_tests, 50, trees=True)
    counts = Counts.of(sentences_of(config, 20_000, 51), len(grammar.vocabulary))
    kept = kept_symbols(config)
    return constructing.truncated_scores(grammar, tests, counts.word.exp(), kept, 1000 * config.seed + 52)


def short_sentences(config: QuickConfig) -> Sentences:
    """What training begins with."""
    longest = min(config.short_length, config.max_length)
    return draw(english(), config.sentences, config.min_length, longest, 1000 * config.seed + 6)


def train_until(
    config: QuickConfig,
    model: nn.Module,
    texts: tuple[Sentences, Sentences],
    done: int,
    until: int,
    optimizer: torch.optim.Optimizer | None,
) -> tuple[list[float], torch.optim.Optimizer | None]:
    """Steps `done` .. `until` - 1: the first share of all steps on the first text, which is of short sentences, the rest on the second.

    In short sentences there are few places to attend to, and many masks give much to guess: a model finds its neighbours sooner.
    Few masks later on are closer to the test, where one word of a sentence is hidden.
    """
    turn, losses = round(config.short_share * config.steps), []
    phases = (
        (texts[0], config.short_batch, config.short_mask_rate, 0, turn),
        (texts[1], config.batch, config.mask_rate, turn, config.steps),
    )
    for text, batch, rate, first, last in phases:
        begin, end = max(first, done), min(last, until)
        if begin < end:
            more, optimizer = train_model(
                model, text, steps=config.steps, done=begin, until=end, batch=batch, lr=config.lr, warmup=config.warmup,
                mask_rate=rate, seed=1000 * config.seed + 4, optimizer=optimizer,
            )  # fmt: skip
            losses += more
    return losses, optimizer


def train_and_test(config: QuickConfig) -> dict[str, Any]:
    grammar = english()
    words = len(grammar.vocabulary)
    training, tests = sentences_of(config, config.sentences, 1), sentences_of(config, config.tests, 2)
    ids, position, targets = one_mask(tests, words, 1000 * config.seed + 3)
    bayes = posterior(grammar, ids, tests.lengths, position)
    counts = Counts.of(training, words)
    out: dict[str, Any] = {}
    for name, log_q in (
        ("unigram", counts.word.expand(len(ids), -1)),
        ("window", counts.window(ids, tests.lengths, position)),
    ):
        out |= {f"{name}_{k}": v for k, v in _arrays(Scores.of(log_q, bayes, targets)).items()}
    model, optimizer, done = new_model(config), None, 0
    texts = (short_sentences(config), training)
    losses: list[float] = []
    found: list[dict[str, np.ndarray]] = []
    for share in CHECKS:
        until = round(share * config.steps)
        more, optimizer = train_until(config, model, texts, done, until, optimizer)
        losses, done = losses + more, until
        log_q = log_probabilities(model, ids, tests.lengths, position)
        found.append(_arrays(Scores.of(log_q, bayes, targets)))
    rows = torch.arange(len(ids))
    out |= {f"model_{k}": np.stack([one[k] for one in found]) for k in found[0]}
    out |= {
        "bayes_nll": -bayes[rows, targets].log().numpy(),
        "bayes_accuracy": _accuracy(bayes, targets),
        "model_accuracy": _accuracy(log_q, targets),
        "losses": np.array(losses),
    }
    return out | {f"w:{k}": v.cpu().numpy() for k, v in model.state_dict().items()}


def _arrays(scores: Scores) -> dict[str, np.ndarray]:
    return {"nll": scores.nll.numpy(), "gap": scores.gap.numpy(), "kl": scores.kl.numpy()}


def _accuracy(scores: Tensor, targets: Tensor) -> float:
    return float((scores.argmax(1) == targets).double().mean())


def merged(config: QuickConfig) -> list[list[float]]:
    """Merged heads on sentences of at most 12 words, which are enough and need few layers."""
    grammar, longest = english(), min(12, config.max_length)
    sample, tests = (
        draw(
            grammar,
            config.truncation_tests,
            config.min_length,
            longest,
            1000 * config.seed + number,
            trees=True,
        )
        for number in (60, 61)
    )
    kept = (min(KEPT[0], len(grammar.nonterminals)), min(KEPT[1], len(grammar.preterminals)))
    ranks = [rank for rank in config.ranks if rank <= kept[0]]
    return constructing.merged_scores(grammar, sample, tests, kept, ranks)
