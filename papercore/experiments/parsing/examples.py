"""A few sentences to look at: blanks with the grammar's posterior beside the model's, charts three times over, and trees.

Glossary
    blank       a masked word of an example, written ___
    chart       unlabelled marginals [n, n] by start and width - 1: of inside-outside, of a probe, of the built transformer
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from papercore.experiments.parsing.corpus import Sentences
from papercore.experiments.parsing.masked_lm import hidden_states, log_probabilities
from papercore.experiments.parsing.probes import Probe, features_of, spans_of
from papercore.experiments.parsing.probing import charts
from papercore.parsing import (
    ConstructedIO,
    english,
    inside_outside,
    labelled_recall,
    masked_posterior,
    viterbi,
)

if TYPE_CHECKING:
    from papercore.experiments.parsing.config import QuickConfig

# Sentence, and places of its blanks.
EXAMPLES = (
    ("the dog saw a cat in the garden", (1, 2, 5)),
    ("the guards that the king likes walk", (4, 5, 6)),
    ("someone thinks that the horses near the river sleep", (1, 4, 8)),
    ("anna watches the visit of the teacher and the child", (2, 4, 7)),
)
TOP = 8  # words shown for a blank
BLANK_COLUMNS = ["sentence", "rank", "word", "posterior", "model"]
TREE_COLUMNS = ["sentence", "labelled recall", "most probable", "probability of the latter"]


def examples(config: QuickConfig, model: nn.Module, fitted: Sentences, layer: int) -> dict[str, Any]:
    """Tables and charts of the examples. The probe is a two-layer one of `layer`, fitted on the sentences given."""
    grammar = english(dtype=torch.float64)
    texts = [text for text, _ in EXAMPLES]
    lengths = torch.tensor([len(text.split()) for text in texts])
    n = int(lengths.max())
    ids = torch.zeros(len(texts), max(n, 2), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, : lengths[row]] = grammar.encode(text).flatten()
    result = inside_outside(grammar, ids, lengths=lengths)
    result.require_possible()
    built = ConstructedIO(grammar, n)(ids, lengths)
    recalled = labelled_recall(result, labelled=False)
    best, log_p = viterbi(grammar, ids, lengths=lengths)
    share = (log_p - result.log_z).exp().tolist()
    trees = [[t, str(a), str(b), p] for t, a, b, p in zip(texts, recalled, best, share, strict=True)]
    return {
        "blank_columns": BLANK_COLUMNS,
        "blanks": _blanks(model, ids, lengths),
        "tree_columns": TREE_COLUMNS,
        "trees": trees,
        "chart_lengths": lengths.numpy(),
        "chart_io": result.span_marginals.sum(-1).float().numpy(),
        "chart_built": built.span_marginals.sum(-1).float().numpy(),
        "chart_probe": _probed(config, model, fitted, layer, ids, lengths),
    }


def _blanks(model: nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> list[list[Any]]:
    grammar = english()
    mask = len(grammar.vocabulary)
    rows: list[list[Any]] = []
    for number, (text, places) in enumerate(EXAMPLES):
        for at in places:
            masked = ids[number : number + 1].clone()
            masked[0, at] = mask
            size = lengths[number : number + 1]
            p = masked_posterior(grammar, masked, mask, lengths=size)[0, at]
            q = log_probabilities(model, masked, size, torch.tensor([at]))[0].exp()
            words = text.split()
            words[at] = "___"
            order = p.argsort(descending=True, stable=True)[:TOP].tolist()
            for rank, word in enumerate(order, 1):
                name = grammar.vocabulary[word]
                rows.append([" ".join(words), rank, name, float(p[word]), float(q[word])])
    return rows


def _probed(
    config: QuickConfig,
    model: nn.Module,
    fitted: Sentences,
    layer: int,
    ids: torch.Tensor,
    lengths: torch.Tensor,
) -> np.ndarray:
    """The probe's marginals of every span but the whole sentence, cut to 0 .. 1; [examples, n, n]."""
    grammar = english()
    marginals, _, _ = charts(grammar, fitted)
    words = len(grammar.vocabulary)
    pairs = spans_of(fitted, marginals, words, config.seed, most=config.probe_spans)
    states = hidden_states(model, fitted)[layer]
    probe = Probe("mlp", config.seed, steps=config.probe_steps).fit(features_of(states, pairs), pairs.target)
    own = Sentences(ids, lengths)
    out = torch.zeros(len(ids), ids.shape[1], ids.shape[1])
    every = spans_of(own, out, words, config.seed, most=10**6)
    found = probe.predict(features_of(hidden_states(model, own)[layer], every)).clamp(0, 1)
    out[every.sentence, every.first, every.second - every.first] = found
    for row, length in enumerate(lengths.tolist()):
        out[row, 0, length - 1] = 1.0
    return out.numpy()
