"""Probes of every layer of a model over several seeds, with their controls and what bounds them.

A seed draws its own sentences, in three parts: the probe is fitted on the first, the layer is chosen on the second, and what is
reported comes from the third. So a spread over seeds holds both what the probe was fitted on and what it was tested on.

Glossary
    task      "parse": F1 of trees from depths; "marginal": correlation with span marginals; "control": the same with random targets
    kind      "linear" or "mlp"
    layer 0   embeddings of words and positions
    source    sentences that the probe is fitted on; target: those it is tested on
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from papercore.experiments.parsing.corpus import Sentences
from papercore.experiments.parsing.masked_lm import hidden_states
from papercore.experiments.parsing.probes import (
    Pairs,
    Probe,
    correlation,
    features_of,
    gaps_of,
    parse_f1,
    spans_of,
)
from papercore.lab.progress import progress
from papercore.lab.statistics import summarize
from papercore.parsing import PCFG, IOResult, Tree, branching, inside_outside, labelled_recall, tree_f1

KINDS = ("linear", "mlp")
TASKS = ("parse", "marginal", "control")
PARTS = ("train", "choose", "test")


@dataclass(frozen=True)
class Material:
    """What probes are fitted or tested on: sentences, their states [layers + 1, N, n, width], their pairs of words."""

    sentences: Sentences
    states: Tensor
    gaps: Pairs
    spans: Pairs


def charts(
    grammar: PCFG,
    sentences: Sentences,
    *,
    batch: int = 100,
    back: Callable[[Tree], Tree] | None = None,
) -> tuple[Tensor, list[Tree], Tensor]:
    """Unlabelled span marginals [N, n, n], the trees of highest expected recall, and which sentences are possible [N].

    `back` turns a tree of the grammar into one of the treebank. A sentence that the grammar cannot make has marginals 0 and the
    right-branching tree.
    """
    n = sentences.ids.shape[1]
    marginals = torch.zeros(len(sentences), n, n)
    possible = torch.zeros(len(sentences), dtype=torch.bool)
    trees: dict[int, Tree] = {}
    order = sentences.lengths.argsort(stable=True)
    for rows in progress(list(order.split(batch)), "inside-outside"):
        longest = int(sentences.lengths[rows].max())
        ids, lengths = sentences.ids[rows, :longest], sentences.lengths[rows]
        result = inside_outside(grammar, ids, lengths=lengths)
        marginals[rows, :longest, :longest] = result.span_marginals.sum(-1).float().cpu()
        possible[rows] = result.possible.cpu()
        trees |= dict(zip(rows.tolist(), recalled(result, back=back), strict=True))
    return marginals, [trees[row] for row in range(len(sentences))], possible


def recalled(result: IOResult, *, back: Callable[[Tree], Tree] | None = None) -> list[Tree]:
    """Trees of highest expected recall; right-branching ones for sentences without any."""
    good = result.possible
    some = replace(
        result,
        log_z=result.log_z[good],
        span_marginals=result.span_marginals[good],
        term_marginals=result.term_marginals[good],
        lengths=result.lengths[good],
        input_ids=result.input_ids[good],
    )
    found = iter(labelled_recall(some, labelled=False) if bool(good.any()) else [])
    trees = []
    for row, fine in enumerate(good.tolist()):
        tree = next(found) if fine else branching(result.words(row))
        trees.append(back(tree) if fine and back else tree)
    return trees


def material(
    model: nn.Module, sentences: Sentences, marginals: Tensor, words: int, seed: int, spans: int
) -> Material:
    """States and pairs of some sentences."""
    return Material(
        sentences,
        hidden_states(model, sentences),
        gaps_of(sentences, words, seed),
        spans_of(sentences, marginals, words, seed, most=spans),
    )


def fit_and_test(
    source: Material, targets: Sequence[Material], seed: int, *, steps: int, tasks: Sequence[str] = TASKS
) -> np.ndarray:
    """Scores [targets, tasks, kinds, layers + 1] of probes fitted on `source`."""
    layers = len(source.states)
    out = np.zeros((len(targets), len(tasks), len(KINDS), layers))
    jobs = [(t, k, layer) for t in range(len(tasks)) for k in range(len(KINDS)) for layer in range(layers)]
    for t, k, layer in progress(jobs, "probes"):
        task = tasks[t]
        states = source.states[layer]
        pairs = source.gaps if task == "parse" else source.spans
        target = pairs.control if task == "control" else pairs.target
        probe = Probe(KINDS[k], seed, steps=steps).fit(features_of(states, pairs), target)
        for number, tested in enumerate(targets):
            if task == "parse":
                score = parse_f1(probe, tested.states[layer], tested.gaps, tested.sentences)
            else:
                truth = tested.spans.control if task == "control" else tested.spans.target
                score = correlation(probe.predict(features_of(tested.states[layer], tested.spans)), truth)
            out[number, t, k, layer] = score
    return out


def baselines(sentences: Sentences, io_trees: Sequence[Tree]) -> dict[str, float]:
    """F1 of trees that need no probe: always right, always left, and inside-outside."""
    gold = sentences.trees
    return {
        "right": float(tree_f1(gold, [branching(tree.leaves()) for tree in gold])),
        "left": float(tree_f1(gold, [branching(tree.leaves(), side="left") for tree in gold])),
        "io": float(tree_f1(gold, io_trees)),
    }


def probe_seed(
    model: nn.Module,
    grammar: PCFG,
    pool: Sentences,
    sizes: Sequence[int],
    seed: int,
    *,
    spans: int,
    steps: int,
) -> dict[str, Any]:
    """All probes of one seed: scores [choose and test, tasks, kinds, layers + 1], and the baselines of the test part."""
    marginals, trees, _ = charts(grammar, pool)
    words, begin, parts = len(grammar.vocabulary), 0, []
    for size in sizes:
        rows = slice(begin, begin + size)
        part = pool.part(begin, begin + size)
        parts.append(material(model, part, marginals[rows], words, seed, spans))
        begin += size
    scores = fit_and_test(parts[0], parts[1:], seed, steps=steps)
    return {"scores": scores, **baselines(parts[-1].sentences, trees[begin - sizes[-1] : begin])}


def summary(chosen: np.ndarray, tested: np.ndarray) -> dict[str, float]:
    """Metrics of all probes, from scores [seeds, tasks, kinds, layers + 1] on the choosing and on the test sentences.

    The layer of a task and kind is the one that is best on the choosing sentences, in the mean over seeds, layer 0 left out;
    the control is read at the layer chosen for the marginal probe.
    """
    out: dict[str, float] = {}
    best: dict[tuple[str, str], int] = {}
    gains: dict[tuple[str, str], np.ndarray] = {}
    for t, task in enumerate(TASKS):
        for k, kind in enumerate(KINDS):
            at = 1 + int(chosen[:, t, k, 1:].mean(0).argmax())
            best[task, kind] = at = best["marginal", kind] if task == "control" else at
            name, values = f"{task}_{kind}", tested[:, t, k]
            out[f"{name}_layer"] = at
            gains[task, kind] = values[:, at] - values[:, 0]
            for what, numbers in (
                ("best", values[:, at]),
                ("layer0", values[:, 0]),
                ("gain", gains[task, kind]),
            ):
                found = summarize(numbers.tolist())
                out[f"{name}_{what}"], out[f"{name}_{what}_se"] = found.mean, found.se
    for k, kind in enumerate(KINDS):
        at = best["marginal", kind]
        found = summarize((tested[:, 1, k, at] - tested[:, 2, k, at]).tolist())
        out[f"selectivity_{kind}"], out[f"selectivity_{kind}_se"] = found.mean, found.se
    found = summarize((gains["parse", "linear"] - gains["parse", "mlp"]).tolist())
    out["linear_over_mlp"], out["linear_over_mlp_se"] = found.mean, found.se
    return out


def bound(part: Callable[[int], dict[str, Any]], seed: int) -> Callable[[], dict[str, Any]]:
    """A stage's function with its seed bound now, not when a loop has moved on."""
    return lambda: part(seed)
