"""Grammars as text, in the notation of NLTK's PCFG.fromstring, and back.

    S  -> NP VP [1.0]                       # a comment; the first rule's left side is the start symbol
    NP -> D N [0.5] | 'dogs' [0.3]          | alternatives of one symbol
    NP -> N [0.2]                           a rule of one symbol: removed exactly, see unaries.py
    VP -> V NP 'up' [1.0]                   words between symbols, and rules of three and more: split exactly, see below
    %start S                                names the start symbol

A word among symbols gets a symbol of its own that is always this word. A rule A -> B C D becomes A -> B @A:C_D and
@A:C_D -> C D [1.0]. Both leave the probability of every sentence as it is, and the spans of trees too once nodes named @... are
spliced out (`papercore.parsing.debinarise`).

Beyond NLTK: a symbol may hold any characters but blanks, quotes, brackets and bars; numbers may have an exponent; with
normalize=True numbers are weights, and a missing one is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from papercore.parsing.grammar import PCFG
from papercore.parsing.unaries import LooseRule, eliminate_unaries

__all__ = ["loose_rules", "read", "to_nltk", "write"]

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<word>"[^"]*"|'[^']*')
    | \[(?P<number>[^\]\[]*)\]
    | (?P<bar>\|)
    | (?P<arrow>->|→)
    | (?P<symbol>(?:(?!->)[^\s"'|\[\]→])+)
    )""",
    re.VERBOSE,
)

# (children, whether each is a word, number)
_Side = tuple[list[str], list[bool], float]


def read(
    text: Any,
    *,
    start: str | None = None,
    normalize: bool = False,
    single_words: str = "refuse",
    dtype: torch.dtype | None = None,
) -> PCFG:
    """The grammar that `text` describes.

    Args:
        text: rules in the notation above, or an nltk.PCFG.
        start: the start symbol; default: what %start names, else the left side of the first rule.
        normalize: divide each symbol's numbers by their sum in place of refusing sums other than 1.
        single_words: "refuse", "condition" or "drop": sentences of one word, see `eliminate_unaries`.
        dtype: of the grammar's tensors; default torch.get_default_dtype().

    Raises:
        ValueError: with the line that cannot be read; and all that `eliminate_unaries` refuses.
        TypeError: neither text nor a grammar of NLTK's.

    >>> grammar = read('''
    ...     S -> NP VP [1.0]
    ...     NP -> D N [0.6] | N [0.4]
    ...     VP -> V NP [0.7] | V [0.3]
    ...     D -> 'the' [1.0]
    ...     N -> 'dogs' [0.5] | 'cats' [0.5]
    ...     V -> 'chase' [1.0]
    ... ''')
    >>> grammar
    PCFG(3 in-terminals, 3 pre-terminals, 4 words, 8 binary rules, torch.float32, cpu)
    """
    rules, first = loose_rules(text)
    start = first if start is None else start
    return eliminate_unaries(rules(normalize), start=start, normalize=normalize, single_words=single_words, dtype=dtype)


def loose_rules(text: Any) -> tuple[Any, str | None]:
    raise NotImplementedError
