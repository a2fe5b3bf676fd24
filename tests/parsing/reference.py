"""The truth that the kernel is tested against: trees one by one, and the chart by its definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from papercore.parsing import PCFG, Tree


def random_grammar(
    inner: int, outer: int, words: int, *, seed: int, keep: float = 1.0, dtype=torch.float64
) -> PCFG:
    """Probabilities drawn at random; a share `keep` of the rules, never none of a symbol's."""
    g = torch.Generator().manual_seed(seed)
    rules = torch.rand(inner, inner + outer, inner + outer, generator=g, dtype=torch.float64) ** 3
    dropped = torch.rand(rules.shape, generator=g) >= keep
    rules = torch.where(dropped, 0.0, rules)
    rules[:, -1, -1] += 0.2  # words can end every derivation
    root = torch.rand(inner, generator=g, dtype=torch.float64)
    emissions = torch.rand(outer, words, generator=g, dtype=torch.float64) ** 2
    names = {
        "nonterminals": [f"N{i}" for i in range(inner)],
        "preterminals": [f"P{i}" for i in range(outer)],
        "vocabulary": [f"w{i}" for i in range(words)],
    }
    return PCFG(root.to(dtype), rules.to(dtype), emissions.to(dtype), normalize=True, **names)


def all_trees(grammar: PCFG, ids: list[int]) -> Iterator[tuple[Tree, float]]:
    """Every tree over these words with its probability (root included), by plain recursion."""
    inner = len(grammar.nonterminals)
    rules, emissions = grammar.rules.tolist(), grammar.emissions.tolist()

    def under(symbol: int, start: int, end: int) -> Iterator[tuple[Tree, float]]:
        if end - start == 1:
            if symbol >= inner and (p := emissions[symbol - inner][ids[start]]) > 0:
                yield Tree(grammar.symbols[symbol], (grammar.vocabulary[ids[start]],)), p
            return
        if symbol >= inner:
            return
        for middle in range(start + 1, end):
            for b, c in itertools.product(range(len(grammar.symbols)), repeat=2):
                if (rule := rules[symbol][b][c]) > 0:
                    for left, p in under(b, start, middle):
                        for right, q in under(c, middle, end):
                            yield Tree(grammar.symbols[symbol], (left, right)), rule * p * q

    for symbol in range(inner):
        if (start := float(grammar.root[symbol])) > 0:
            for tree, p in under(symbol, 0, len(ids)):
                yield tree, start * p


def log_z(root: Tensor, rules: Tensor, emissions: Tensor, ids: Tensor) -> Tensor:
    """log Z of one sentence by the definition, differentiable by autograd."""
    inner, outer = root.shape[0], emissions.shape[0]
    alpha = {}
    for i, word in enumerate(ids.tolist()):
        alpha[i, 1] = torch.cat([emissions.new_zeros(inner), emissions[:, word]])
    for width in range(2, len(ids) + 1):
        for i in range(len(ids) - width + 1):
            total = sum(
                torch.einsum("abc,b,c->a", rules, alpha[i, k], alpha[i + k, width - k])
                for k in range(1, width)
            )
            alpha[i, width] = torch.cat([total, emissions.new_zeros(outer)])
    return (root * alpha[0, len(ids)][:inner]).sum().log()


def masses_of_lengths(grammar: PCFG, most: int) -> list[float]:
    """P(a sentence has n words) for n = 0 .. most, by the recursion of the generating function."""
    inner = len(grammar.nonterminals)
    made = torch.zeros(most + 1, len(grammar.symbols), dtype=torch.float64)
    made[1, inner:] = 1.0
    rules = grammar.rules.double()
    for width in range(2, most + 1):
        pairs = made[1:width].t() @ made[1:width].flip(0)
        made[width, :inner] = (rules * pairs).sum((1, 2))
    return (made[:, :inner] @ grammar.root.double()).tolist()


def mass_of_length(grammar: PCFG, n: int) -> float:
    return masses_of_lengths(grammar, n)[n]
