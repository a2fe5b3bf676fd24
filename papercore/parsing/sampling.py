"""Sentences and their trees from a PCFG, all at once: one level of all trees is drawn in one step.

A level holds the nodes of all sentences at one depth. Its in-terminals draw a rule each (one search in a table of cumulative
probabilities) and their children, side by side, are the next level; the k-th in-terminal's children are nodes 2k and 2k + 1 there.
Sizes of subtrees come from the bottom up, first words from the top down: a left child starts where its parent does, a right child
behind its sibling.

Sentences longer than max_length are thrown away and drawn anew, which gives exactly the grammar's distribution under the condition
length <= max_length. One is given up as soon as its words so far, two for each in-terminal still open, are too many; so the
drawing ends for grammars whose sentences need not (spectral radius >= 1) too.

Glossary
    bounds      row + cumulative probability, sorted over all rows of a distribution      [entries]
    lengths     P(A makes exactly w words)                                               [S, w]
    open        nodes of a level that draw a rule
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from papercore.parsing.grammar import PCFG
from papercore.parsing.trees import Tree

__all__ = ["length_distribution", "sample"]

_ROUND = 1 << 16  # sentences drawn together: bounds memory, long enough to hide Python's share
_RAREST = 1e-6  # share of sentences kept below which rejection is refused


@overload
def sample(
    grammar: PCFG,
    n: int,
    *,
    max_length: int | None = ...,
    generator: torch.Generator | None,
    trees: Literal[True] = ...,
) -> tuple[Tensor, list[Tree]]: ...
@overload
def sample(
    grammar: PCFG,
    n: int,
    *,
    max_length: int | None = ...,
    generator: torch.Generator | None,
    trees: Literal[False],
) -> tuple[Tensor, Tensor]: ...
def sample(
    grammar: PCFG,
    n: int,
    *,
    max_length: int | None = None,
    generator: torch.Generator | None,
    trees: bool = True,
) -> tuple[Tensor, list[Tree]] | tuple[Tensor, Tensor]:
    """Draw sentences independently of each other.

    Args:
        grammar: proper, that is, with probabilities that add up to 1.
        n: how many sentences, 0 or more.
        max_length: longest sentence; longer ones are drawn anew (see above). None: no limit, for a spectral radius below 1.
        generator: where the randomness comes from; the only source. Its device need not be the grammar's.
        trees: False leaves out the trees, which take most of the time, and returns lengths in their place.

    Returns:
        input_ids: LongTensor [n, longest sentence drawn], right-padded with 0, on the grammar's device.
        trees, a list of n, or lengths, LongTensor [n].

    Raises:
        ValueError: no generator; n negative; max_length below 2, or one that fewer than a millionth of sentences keep; without
            max_length, a spectral radius of 1 or more (the radius is given); a truncated grammar.

    >>> grammar = PCFG.from_string("S -> A B [1.0]\\nA -> 'x' [0.5] | 'y' [0.5]\\nB -> 'z' [1.0]")
    >>> ids, trees = sample(grammar, 3, generator=torch.Generator().manual_seed(0))
    >>> ids.shape, str(trees[0]).startswith("(S (A ")
    (torch.Size([3, 2]), True)
    """
    _check(grammar, n, max_length, generator)
    assert generator is not None
    tables = _TABLES.get(grammar)
    if tables is None:
        tables = _TABLES[grammar] = _Tables.of(grammar)
    kept = 1.0 if max_length is None else _share_kept(grammar, max_length)
    forests: list[_Forest] = []
    missing = n
    while missing > 0:
        tries = min(math.ceil(missing / kept * 1.02) + 8, _ROUND)
        forests.append(_Forest.grow(tables, tries, missing, max_length, generator))
        missing -= len(forests[-1].lengths)
    lengths = torch.cat([grammar.rules.new_zeros(0, dtype=torch.long), *(f.lengths for f in forests)])
    ids = lengths.new_zeros(n, int(lengths.max()) if n else 0)
    made: list[Tree] = []
    done = 0
    for forest in forests:
        rows = ids[done : (done := done + len(forest.lengths))]
        if len(rows):
            sentence, place, word = forest.words(tables, generator)
            rows[sentence, place] = word
        if trees:
            made.extend(forest.trees(grammar, rows))
    return (ids, made) if trees else (ids, lengths)


def length_distribution(grammar: PCFG, max_length: int) -> Tensor:
    """P(a sentence has w words) for w = 0 .. max_length, [max_length + 1] in float64; what is missing to 1 is longer or endless.

    From the recursion of the inside pass with all words alike: a pre-terminal makes 1 word, and

        P(A makes w words) = sum over k and rules A -> B C of p(A -> B C) P(B makes k) P(C makes w - k).

    >>> grammar = PCFG.from_string("S -> S A [0.5] | A A [0.5]\\nA -> 'x' [1.0]")
    >>> length_distribution(grammar, 4).tolist()
    [0.0, 0.0, 0.5, 0.25, 0.125]
    """
    if max_length < 0:
        raise ValueError(f"max_length = {max_length}: expected 0 or more.")
    i, s = len(grammar.nonterminals), len(grammar.symbols)
    rules = grammar.rules.double().flatten(1)
    lengths = rules.new_zeros(s, max_length + 2)
    lengths[i:, 1] = grammar.emissions.double().sum(1)
    for width in range(2, max_length + 1):
        pairs = lengths[:, 1:width] @ lengths[:, 1:width].flip(1).t()
        lengths[:i, width] = rules @ pairs.flatten()
    return grammar.root.double() @ lengths[:i, : max_length + 1]


def _share_kept(grammar: PCFG, max_length: int) -> float:
    kept = float(length_distribution(grammar, max_length).sum())
    if kept < _RAREST:
        raise ValueError(
            f"max_length = {max_length}: sentences of this grammar are that short with probability {kept:.3g}, too rarely to draw "
            "them by rejection; raise max_length."
        )
    return kept


def _check(grammar: PCFG, n: int, max_length: int | None, generator: torch.Generator | None) -> None:
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator = {generator!r}: expected a torch.Generator, such as torch.Generator().manual_seed(0)."
        )
    if n < 0:
        raise ValueError(f"n = {n}: expected a number of sentences, 0 or more.")
    if not grammar.proper:
        raise ValueError(
            "the probabilities of this grammar add up to less than 1 (it is truncated): sample from the whole one."
        )
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length = {max_length}: sentences have two or more words.")
    if max_length is None and (radius := grammar.spectral_radius()) >= 1:
        raise ValueError(
            f"the spectral radius of this grammar is {radius:.4f} >= 1: its sentences have no expected length and may never end. "
            "Give max_length."
        )


@dataclass
class _Draw:
    """Rows of discrete distributions, of which one entry a row is drawn. Entries of probability 0 are not held."""

    bounds: Tensor
    last: Tensor  # last entry of each row
    columns: Tensor  # column of each entry

    @classmethod
    def of(cls, rows: Tensor) -> _Draw:
        """From [R, C]; every row holds something positive."""
        row, column = rows.nonzero(as_tuple=True)
        last = torch.bincount(row, minlength=len(rows)).cumsum(0) - 1
        sums = rows[row, column].double().cumsum(0)
        before = torch.cat([sums.new_zeros(1), sums[last[:-1]]])[row]
        bounds = row + (sums - before) / (sums[last][row] - before)
        # Rounding in a sum over all rows must not disturb the order of rows.
        bounds[last] = torch.arange(1, len(rows) + 1, dtype=bounds.dtype, device=rows.device)
        return cls(bounds, last, column)

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """One column for each of `rows`, [m]."""
        u = torch.rand(rows.shape, dtype=torch.float64, device=generator.device, generator=generator)
        entry = torch.searchsorted(self.bounds, rows + u.to(rows.device), right=True)
        # row + u may round up to the next row.
        return self.columns[torch.minimum(entry, self.last[rows])]


@dataclass
class _Tables:
    root: _Draw
    rules: _Draw
    words: _Draw
    in_terminals: int
    symbols: int

    @classmethod
    def of(cls, grammar: PCFG) -> _Tables:
        return cls(
            _Draw.of(grammar.root.unsqueeze(0)),
            _Draw.of(grammar.rules.flatten(1)),
            _Draw.of(grammar.emissions),
            len(grammar.nonterminals),
            len(grammar.symbols),
        )


_TABLES: WeakKeyDictionary[PCFG, _Tables] = WeakKeyDictionary()


@dataclass
class _Forest:
    """Trees without words, level by level."""

    symbols: list[Tensor]  # of each node
    sentences: list[Tensor]  # number of each node's sentence
    lengths: Tensor  # words of each sentence
    in_terminals: int

    @classmethod
    def grow(
        cls, tables: _Tables, tries: int, wanted: int, max_length: int | None, generator: torch.Generator
    ) -> _Forest:
        """Draw `tries` trees and keep the first `wanted`, or fewer, that are not too long."""
        sentence = torch.arange(tries, device=tables.rules.bounds.device)
        symbol = tables.root(torch.zeros_like(sentence), generator)
        least = torch.full_like(sentence, 2)  # words of each sentence, at least
        levels = []
        while len(sentence):
            levels.append((symbol, sentence))
            opened = symbol < tables.in_terminals
            if max_length is not None:
                opened &= least[sentence] <= max_length
            parents = sentence[opened]
            pair = tables.rules(symbol[opened], generator)
            symbol = torch.stack([pair // tables.symbols, pair % tables.symbols], 1).flatten()
            sentence = parents.repeat_interleave(2)
            # An open node stood for 2 words; of its children an open one stands for 2, another for 1.
            least.index_add_(0, parents, (symbol < tables.in_terminals).view(-1, 2).sum(1))
        kept = torch.ones_like(least, dtype=torch.bool) if max_length is None else least <= max_length
        number = kept.cumsum(0) - 1
        kept &= number < wanted
        forest = cls([], [], least[kept], tables.in_terminals)
        for symbol, sentence in levels:
            stays = kept[sentence]
            if bool(stays.any()):
                forest.symbols.append(symbol[stays])
                forest.sentences.append(number[sentence[stays]])
        return forest

    def starts(self) -> list[Tensor]:
        """First word of each node, level by level."""
        opened = [symbol < self.in_terminals for symbol in self.symbols]
        sizes = [torch.ones_like(symbol) for symbol in self.symbols]
        for level in range(len(sizes) - 2, -1, -1):
            sizes[level][opened[level]] = sizes[level + 1].view(-1, 2).sum(1)
        starts = [torch.zeros_like(sizes[0])] if sizes else []
        for level in range(len(sizes) - 1):
            left = starts[level][opened[level]]
            starts.append(torch.stack([left, left + sizes[level + 1].view(-1, 2)[:, 0]], 1).flatten())
        return starts

    def words(self, tables: _Tables, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(sentence, place, word) of every word."""
        sentence, start, symbol = (torch.cat(x) for x in (self.sentences, self.starts(), self.symbols))
        leaf = symbol >= self.in_terminals
        return sentence[leaf], start[leaf], tables.words(symbol[leaf] - self.in_terminals, generator)

    def trees(self, grammar: PCFG, ids: Tensor) -> list[Tree]:
        """The trees, over the words `ids`."""
        names, vocabulary = grammar.symbols, grammar.vocabulary
        leaves: dict[tuple[int, int], Tree] = {}  # trees are never changed, so equal leaves are one
        below: list[Tree] = []
        starts = self.starts()
        for level in range(len(starts) - 1, -1, -1):
            words = ids[self.sentences[level], starts[level]].tolist()
            children = iter(below)
            below = []
            for symbol, word in zip(self.symbols[level].tolist(), words, strict=True):
                if symbol < self.in_terminals:
                    below.append(Tree(names[symbol], (next(children), next(children))))
                    continue
                leaf = leaves.get((symbol, word))
                if leaf is None:
                    leaf = leaves[symbol, word] = Tree(names[symbol], (vocabulary[word],))
                below.append(leaf)
        return below
