"""The construction at work: equal to the chart at every length, its sizes, and what is lost when symbols are dropped or merged.

Glossary
    kept          in-terminals and pre-terminals of a truncated grammar (the most frequent ones)
    rank          k, numbers that stand for the kept in-terminals in a layer with merged heads
    perplexity    exp of the mean cross-entropy of one masked word
    possible      share of sentences that the truncated grammar can make at all
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from papercore.experiments.parsing.corpus import Sentences, one_mask
from papercore.experiments.parsing.predictors import posterior
from papercore.experiments.parsing.probing import charts, recalled
from papercore.lab.progress import progress
from papercore.parsing import (
    PCFG,
    ConstructedIO,
    Tree,
    construction_size,
    inside_outside,
    merge_bases,
    tree_f1,
)

SIZES = ((3, 4, 6), (4, 5, 8), (6, 3, 5))  # in-terminals, pre-terminals, words of the random grammars
TRUNCATION_COLUMNS = [
    "in-terminals",
    "pre-terminals",
    "share of in-terminals",
    "share of pre-terminals",
    "possible",
    "F1",
    "perplexity",
]
MERGED_COLUMNS = ["rank", "numbers of a state", "layers", "heads", "F1"]
UNIGRAM = 1e-3  # share of the unigram in every truncated posterior, so that no word has the probability 0


def random_grammar(inner: int, outer: int, words: int, seed: int) -> PCFG:
    """A dense grammar in float64 with every rule possible."""
    g = torch.Generator().manual_seed(seed)
    symbols = inner + outer
    root, rules, emissions = (
        torch.rand(shape, generator=g, dtype=torch.float64) ** 3
        for shape in ((inner,), (inner, symbols, symbols), (outer, words))
    )
    return PCFG(
        root, rules, emissions, nonterminals=[f"N{i}" for i in range(inner)],
        preterminals=[f"T{i}" for i in range(outer)], vocabulary=[f"w{i}" for i in range(words)], normalize=True,
    )  # fmt: skip


def equality(longest: int, seed: int, *, shift: int = 0) -> list[list[float]]:
    """Rows [length, grammar, largest difference of any marginal or of log Z, layers used], for lengths 2 .. longest.

    `shift` moves the relative position of every layer: a construction that is wrong on purpose, which must be found out.
    """
    rows = []
    for number, sizes in enumerate(SIZES):
        grammar = random_grammar(*sizes, seed=seed + number)
        model = ConstructedIO(grammar, longest)
        for layer in model.layers(longest):
            layer.offset += shift
        g = torch.Generator().manual_seed(seed + 100 + number)
        for n in range(2, longest + 1):
            ids = torch.randint(len(grammar.vocabulary), (4, n), generator=g)
            built, chart = model(ids), inside_outside(grammar, ids)
            differences = [
                (built.log_z - chart.log_z).abs().max(),
                (built.span_marginals - chart.span_marginals).abs().max(),
                (built.term_marginals - chart.term_marginals).abs().max(),
            ]
            rows.append([n, number, float(max(differences)), len(built.attentions)])
    return rows


def closed_forms() -> dict[str, float]:
    """Sizes for the paper's treebank grammar, and for English of BERT's size."""
    exact = construction_size(1600, 25)
    moderate = construction_size(1600, 25, kept=(20, 45), heads=15)
    return {
        "exact_dims": exact.dims,
        "exact_layers": exact.layers,
        "exact_heads": exact.heads,
        "moderate_dims": moderate.dims,
        "moderate_layers": moderate.layers,
        "moderate_heads": moderate.heads,
    }


def truncated_scores(
    grammar: PCFG,
    sentences: Sentences,
    unigram: Tensor,
    kept: Sequence[tuple[int, int]],
    seed: int,
    *,
    back: Callable[[Tree], Tree] | None = None,
) -> list[list[float]]:
    """Rows under TRUNCATION_COLUMNS for each pair of kept symbols; `back` as for `charts`."""
    weights = grammar.expected_counts()
    inner = len(grammar.nonterminals)
    shares = [weights[:inner].sort(descending=True).values, weights[inner:].sort(descending=True).values]
    ids, position, words = one_mask(sentences, len(grammar.vocabulary), seed)
    at = torch.arange(len(words))
    rows = []
    for i, p in progress(list(kept), "truncated grammars"):
        cut = grammar.truncate(i, p, weights=weights)
        _, trees, possible = charts(cut, sentences, back=back)
        found = posterior(cut, ids, sentences.lengths, position)
        # Where even the other words are impossible, the posterior is 0 throughout and the unigram takes over.
        share = torch.where(found.sum(1) > 0, UNIGRAM, 1.0).unsqueeze(1)
        mixed = (1 - share) * found + share * unigram
        rows.append(
            [
                i,
                p,
                float(shares[0][:i].sum() / shares[0].sum()),
                float(shares[1][:p].sum() / shares[1].sum()),
                float(possible.double().mean()),
                float(tree_f1(sentences.trees, trees)),
                math.exp(-float(mixed[at, words].log().mean())),
            ]
        )
    return rows


def merged_scores(
    grammar: PCFG,
    sample: Sentences,
    sentences: Sentences,
    kept: tuple[int, int],
    ranks: Sequence[int],
    *,
    back: Callable[[Tree], Tree] | None = None,
) -> list[list[float]]:
    """Rows [rank, numbers of a state, layers, heads, F1] of constructions of a truncated grammar with merged heads.

    The directions come from `sample`, the F1 from `sentences`; `back` as for `charts`. A sentence whose probability comes out at 0 or below counts with the
    right-branching tree.
    """
    cut = grammar.truncate(*kept)
    longest = int(sentences.lengths.max())
    rows = []
    for rank in progress(list(ranks), "merged heads"):
        bases = merge_bases(cut, sample.ids, rank, lengths=sample.lengths)
        model = ConstructedIO(cut, longest, bases=bases)
        trees: dict[int, Tree] = {}
        order = sentences.lengths.argsort(stable=True)
        for part in order.split(50):
            n = int(sentences.lengths[part].max())
            result = model(sentences.ids[part, :n], sentences.lengths[part])
            trees |= dict(zip(part.tolist(), recalled(result, back=back), strict=True))
        found = [trees[row] for row in range(len(sentences))]
        size = model.size
        rows.append([rank, size.dims, size.layers, size.heads, float(tree_f1(sentences.trees, found))])
    return rows


def size_curves() -> dict[str, Any]:
    """Numbers of a token's state against the length, for the figure."""
    lengths = [5, 10, 15, 20, 25, 30, 40, 50]
    return {
        "size_lengths": lengths,
        "size_exact_1600": [construction_size(1600, n).dims for n in lengths],
        "size_exact_68": [construction_size(68, n).dims for n in lengths],
        "size_moderate": [construction_size(1600, n, kept=(20, 45), heads=15).dims for n in lengths],
    }
