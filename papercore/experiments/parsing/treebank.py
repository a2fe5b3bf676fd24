"""Truncated inside-outside on the user's treebank: F1 and perplexity with few symbols (claim C3 on real trees).

The treebank stays with the user: what leaves this file are means over sentences.

Glossary
    gold        trees of the treebank without traces and function tags, unary chains collapsed, unknown words replaced
    unknown     words not in the grammar, replaced by their class
    one mask    perplexity of one masked word a sentence, the unigram mixed in with a share of 0.001
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from papercore.experiments.parsing.constructing import (
    MERGED_COLUMNS,
    TRUNCATION_COLUMNS,
    merged_scores,
    truncated_scores,
)
from papercore.experiments.parsing.corpus import Sentences, draw, of_trees
from papercore.experiments.parsing.probing import charts
from papercore.lab.data import corpus
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.parsing import (
    PCFG,
    Tree,
    branching,
    clean,
    debinarise,
    estimate,
    read_treebank,
    replace_unknown,
    tree_f1,
)

DIRECTIONS = 300  # sentences that the directions of merged heads come from


@dataclass(frozen=True)
class Treebank:
    """A grammar counted in the first trees of a treebank, and the cleaned rest."""

    grammar: PCFG
    counted: int
    held_out: tuple[Tree, ...]

    @classmethod
    def read(cls, path: str, held_out: int) -> Treebank:
        """From a path, or from NLTK's corpus `treebank` where none is given.

        Raises:
            papercore.lab.data.Missing: NLTK's corpus is nowhere.
            ValueError: no trees at the path, or too few to hold some out.
        """
        trees = read_treebank(path or corpus("treebank"))
        if len(trees) <= held_out:
            raise ValueError(
                f"{len(trees)} trees and {held_out} held out: no tree is left to count. Hold fewer out."
            )
        grammar = estimate(trees[:-held_out])
        known = frozenset(grammar.vocabulary)
        rest = [clean(tree) for tree in trees[-held_out:]]
        kept = tuple(_with_classes(tree, known) for tree in rest if tree is not None and len(tree) >= 2)
        return cls(grammar, len(trees) - held_out, kept)

    def sentences(self, trees: Sequence[Tree]) -> Sentences:
        """Held-out trees as sentences of the grammar."""
        return of_trees(self.grammar, trees, [tree.leaves() for tree in trees])

    def unigram(self) -> torch.Tensor:
        """Expected share of each word of the grammar, [V]."""
        counts = self.grammar.expected_counts()[len(self.grammar.nonterminals) :]
        shares = counts @ self.grammar.emissions.double()
        return shares / shares.sum()


def _with_classes(tree: Tree, known: frozenset[str]) -> Tree:
    """The same tree with every unknown word replaced by its class: what a parse of it is compared with."""
    if tree.is_preterminal:
        return Tree(tree.label, tuple(replace_unknown(tree.leaves(), known)))
    return Tree(
        tree.label, tuple(c if isinstance(c, str) else _with_classes(c, known) for c in tree.children)
    )


def kept_pairs(texts: Sequence[str], grammar: PCFG) -> list[tuple[int, int]]:
    """`["20/45"]` as pairs, cut to what the grammar has, all symbols first, each once.

    Raises:
        ValueError: a text is not of the form 20/45.
    """
    inner, outer = len(grammar.nonterminals), len(grammar.preterminals)
    pairs = [(inner, outer)]
    for text in texts:
        i, slash, p = text.partition("/")
        if not (slash and i.isdigit() and p.isdigit() and int(i) and int(p)):
            raise ValueError(f"kept symbols {text!r}: expected in-terminals/pre-terminals, such as 20/45.")
        pairs.append((min(int(i), inner), min(int(p), outer)))
    return list(dict.fromkeys(pairs))


def treebank_table(
    bank: Treebank, record: Record, stages: Stages, *, longest: int, tests: int, truncated: int, kept: Sequence[str],
    ranks: Sequence[int], seed: int
) -> None:  # fmt: skip
    """Fill the record: F1 with all symbols on `tests` sentences, and with fewer on the `truncated` shortest of them."""
    grammar = bank.grammar
    some = [tree for tree in bank.held_out if 4 <= len(tree) <= longest][:tests]
    if len(some) < 2:
        raise ValueError(f"{len(some)} held-out trees have 4 to {longest} words: expected at least 2.")

    def whole() -> dict[str, Any]:
        sentences = bank.sentences(some)
        _, trees, possible = charts(grammar, sentences, batch=10, back=debinarise)
        return {
            "corpus": float(tree_f1(some, trees)),
            "sentence": float(tree_f1(some, trees, average="sentence")),
            "labelled": float(tree_f1(some, trees, labelled=True)),
            "right": float(tree_f1(some, [branching(tree.leaves()) for tree in some])),
            "possible": float(possible.double().mean()),
        }

    found = stages.get("treebank, all symbols", whole)
    record.metric("treebank_counted", bank.counted, "exact")
    record.metric("treebank_tests", len(some), "exact")
    record.metric("treebank_in_terminals", len(grammar.nonterminals), "exact")
    record.metric("treebank_pre_terminals", len(grammar.preterminals), "exact")
    for name, value in found.items():
        record.metric(f"treebank_{name}" + ("" if name == "possible" else "_f1"), value, "abs:0.005")
    shortest = sorted(some, key=len)[:truncated]
    rows = []
    for pair in kept_pairs(kept, grammar):
        part = stages.get(f"treebank, {pair[0]} and {pair[1]} symbols", _cut(bank, shortest, pair, seed))
        rows += part["rows"]
    record.table("treebank", TRUNCATION_COLUMNS, rows)
    moderate = (min(20, len(grammar.nonterminals)), min(45, len(grammar.preterminals)))
    for row in rows:
        if (row[0], row[1]) == moderate:
            record.metric("treebank_drop", rows[0][5] - row[5], "abs:0.005")
            record.metric("treebank_kept_f1", row[5], "abs:0.005")
            record.metric("treebank_perplexity_ratio", row[6] / rows[0][6], "rel:0.02")
    record.metric("treebank_short_f1", rows[0][5], "abs:0.005")
    some_ranks = [rank for rank in ranks if rank <= moderate[0]]
    merged = stages.get(
        "treebank, merged heads", lambda: {"rows": _merged(bank, shortest, moderate, some_ranks, seed)}
    )["rows"]
    record.table("treebank_merged", MERGED_COLUMNS, merged)
    for row in merged:
        record.metric(f"treebank_merged_{row[0]}_f1", row[4], "abs:0.01")


def _merged(
    bank: Treebank, trees: Sequence[Tree], kept: tuple[int, int], ranks: Sequence[int], seed: int
) -> list[list[float]]:
    """Merged heads; their directions come from sentences that the grammar makes. In float64: scores of the construction are
    probabilities of whole spans, which grow small with the size of the vocabulary."""
    grammar, longest = bank.grammar.double(), max(map(len, trees))
    sample = draw(grammar, DIRECTIONS, 4, longest, seed + 1)
    return merged_scores(grammar, sample, bank.sentences(trees), kept, ranks, back=debinarise)


def _cut(bank: Treebank, trees: Sequence[Tree], pair: tuple[int, int], seed: int) -> Any:
    """A stage's function with its arguments bound now."""

    def part() -> dict[str, Any]:
        rows = truncated_scores(
            bank.grammar, bank.sentences(trees), bank.unigram(), [pair], seed, back=debinarise
        )
        return {"rows": rows}

    return part
