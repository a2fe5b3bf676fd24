"""Large grammars from small ones: every symbol split into k, as the latent symbols of treebank grammars are.

The grammar of Zhao et al. (2023, arXiv 2303.08117, section 3) has 1,600 symbols because each label of the treebank has many latent
variants. This is the random counterpart, for measuring at that size without a treebank:

    p(A_a -> B_b C_c) = p(A -> B C) g(a, B b C c) / sum over B C, b, c of the same,     g ~ Gamma(mean 1, variance noise)

and in the same way for words and the root. For alternatives that are equally likely this is a Dirichlet distribution of
concentration 1 / noise an alternative. noise = 0 makes the k variants alike: the grammar of the trees without their numbers is then
the old one. With noise, variants prefer some words and some variants of their children.
"""

from __future__ import annotations

import torch
from torch import Tensor

from papercore.parsing.grammar import PCFG
from papercore.parsing.trees import Tree

__all__ = ["merge_symbols", "split_symbols"]

_MOST_RULES = 1 << 30  # entries of the rule tensor


def split_symbols(grammar: PCFG, k: int, *, noise: float, generator: torch.Generator) -> PCFG:
    """A grammar with k variants A#0 .. A#(k-1) of every symbol A.

    Args:
        grammar: proper; with I in-terminals and P pre-terminals over V words.
        k: variants of each symbol, 1 or more.
        noise: variance of the factors g, 0 or more; at 1 and above a few alternatives take most of the probability.
        generator: the only source of randomness.

    Returns:
        kI in-terminals and kP pre-terminals over the same words, of the same dtype and on the same device. The spectral radius
        moves a little with noise: `sample` checks it.

    Raises:
        ValueError: k or noise out of range, a truncated grammar, or more than 2^30 possible rules.

    >>> grammar = PCFG.from_string("S -> A B [1.0]\\nA -> 'x' [0.5] | 'y' [0.5]\\nB -> 'z' [1.0]")
    >>> split_symbols(grammar, 3, noise=0.5, generator=torch.Generator().manual_seed(0))
    PCFG(3 in-terminals, 6 pre-terminals, 3 words, 27 binary rules, torch.float32, cpu)
    """
    if k < 1:
        raise ValueError(f"k = {k}: expected 1 or more variants.")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise = {noise}: expected a variance of 0 or more.")
    if not grammar.proper:
        raise ValueError(
            "the probabilities of this grammar add up to less than 1 (it is truncated): split the whole one."
        )
    i, s = len(grammar.nonterminals), len(grammar.symbols)
    if i * s * s * k**3 > _MOST_RULES:
        raise ValueError(
            f"k = {k} makes {i * s * s * k**3:.2g} possible rules of {k * i} in-terminals and {k * (s - i)} pre-terminals, more than "
            f"the {_MOST_RULES:.2g} that are held: use a smaller k."
        )
    rules = grammar.rules
    for axis in (0, 1, 2):
        rules = rules.repeat_interleave(k, axis)
    return PCFG(
        _shaken(grammar.root.repeat_interleave(k).unsqueeze(0), noise, generator).squeeze(0),
        _shaken(rules.flatten(1), noise, generator).view(rules.shape),
        _shaken(grammar.emissions.repeat_interleave(k, 0), noise, generator),
        nonterminals=[f"{name}#{a}" for name in grammar.nonterminals for a in range(k)],
        preterminals=[f"{name}#{a}" for name in grammar.preterminals for a in range(k)],
        vocabulary=grammar.vocabulary,
    )


def merge_symbols(tree: Tree) -> Tree:
    """The tree without the numbers of variants: A#3 becomes A."""
    return tree.map_labels(lambda label: label.rpartition("#")[0] or label)


def _shaken(rows: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Rows times independent Gamma factors, divided by their sums."""
    used = rows.nonzero(as_tuple=True)
    values = rows[used]
    if noise > 0:
        shape = torch.full(values.shape, 1 / noise, dtype=torch.float64, device=generator.device)
        # Factors that underflow leave a row with nothing in the worst case; the smallest number keeps its largest entry.
        factors = torch._standard_gamma(shape, generator=generator).clamp(min=1e-300)
        values = (values.double() * factors.to(values.device)).clamp(min=1e-290)
    shaken = rows.new_zeros(rows.shape, dtype=torch.float64)
    shaken[used] = values.double()
    return (shaken / shaken.sum(1, keepdim=True)).to(rows.dtype)
