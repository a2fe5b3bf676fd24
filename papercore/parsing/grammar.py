"""Probabilistic context-free grammars as three tensors (Zhao et al., 2023, arXiv 2303.08117, section 2.1).

Symbols are of two kinds. In-terminals have binary rules alone, A -> B C. Pre-terminals have words alone, A -> w. The start is a
distribution over the in-terminals. Every sentence therefore has at least two words.

Glossary
    root        p(A starts)         [I]
    rules       p(A -> B C)         [I, S, S], S = I + P, children in the order [in-terminals | pre-terminals]
    emissions   p(A -> w)           [P, V]
    vocabulary  words by id, 0 .. V - 1; ids above are no words (a mask id may be any of them)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from papercore.parsing.rules import RuleTables

if TYPE_CHECKING:
    from papercore.parsing.trees import Tree

__all__ = ["PCFG"]

_TOLERANCE = 1e-4  # of a sum of float32 probabilities


class PCFG:
    """A grammar whose probabilities have been checked.

    Args:
        root: [I], a distribution over the in-terminals.
        rules: [I, S, S], for each in-terminal a distribution over pairs of children.
        emissions: [P, V], for each pre-terminal a distribution over words.
        nonterminals, preterminals, vocabulary: names, all different within their kind; an in-terminal and a pre-terminal must not
            share a name.
        normalize: divide every row by its sum in place of refusing it.
        proper: False allows sums below 1, as a truncated grammar has them.

    Raises:
        ValueError: shapes do not fit; a value is negative, NaN or infinite; a row does not add up to 1 (the symbol is named; rows
            of logarithms are recognised); names repeat.
        TypeError: not a tensor of floating-point numbers.
    """

    def __init__(
        self,
        root: Tensor,
        rules: Tensor,
        emissions: Tensor,
        *,
        nonterminals: Sequence[str],
        preterminals: Sequence[str],
        vocabulary: Sequence[str],
        normalize: bool = False,
        proper: bool = True,
    ) -> None:
        self.nonterminals, self.preterminals = tuple(nonterminals), tuple(preterminals)
        self.vocabulary = tuple(vocabulary)
        self._check_names()
        i, p, v = len(self.nonterminals), len(self.preterminals), len(self.vocabulary)
        shapes = {"root": (i,), "rules": (i, i + p, i + p), "emissions": (p, v)}
        tensors = {"root": root, "rules": rules, "emissions": emissions}
        for name, tensor in tensors.items():
            tensors[name] = _checked(
                name, tensor, shapes[name], f"{i} in-terminals, {p} pre-terminals, {v} words"
            )
        if normalize:
            tensors = {
                "root": tensors["root"] / tensors["root"].sum(),
                "rules": tensors["rules"] / tensors["rules"].sum((1, 2), keepdim=True),
                "emissions": tensors["emissions"] / tensors["emissions"].sum(1, keepdim=True),
            }
        self.root, self.rules, self.emissions = tensors["root"], tensors["rules"], tensors["emissions"]
        self.proper = proper
        self._check_sums()
        self._ids = {word: number for number, word in enumerate(self.vocabulary)}
        self._tables: RuleTables | None = None

    def _check_names(self) -> None:
        for kind in ("nonterminals", "preterminals", "vocabulary"):
            names = getattr(self, kind)
            if not names:
                raise ValueError(f"{kind} is empty: a grammar needs at least one.")
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"{kind} holds {twice!r} more than once: names must differ.")
        if both := set(self.nonterminals) & set(self.preterminals):
            raise ValueError(
                f"{sorted(both)[0]!r} is an in-terminal and a pre-terminal: a symbol has either binary rules or words. "
                "PCFG.from_string removes rules of one symbol, such as NP -> N, exactly."
            )

    def _check_sums(self) -> None:
        groups = [
            ("the root distribution", ["root"], self.root.sum().unsqueeze(0)),
            ("the rules of", list(self.nonterminals), self.rules.sum((1, 2))),
            ("the words of", list(self.preterminals), self.emissions.sum(1)),
        ]
        for what, names, sums in groups:
            wrong = (sums - 1).abs() > _TOLERANCE if self.proper else sums > 1 + _TOLERANCE
            if bool(wrong.any()):
                at = int(wrong.nonzero()[0])
                of = f" {names[at]!r}" if what.endswith("of") else ""
                raise ValueError(
                    f"{what}{of} add up to {float(sums[at]):.6g}, expected {'1' if self.proper else 'at most 1'}: pass "
                    "probabilities (not counts or logarithms), or normalize=True."
                )

    @property
    def symbols(self) -> tuple[str, ...]:
        """All symbols in the order of the rule tensor's axes: in-terminals, then pre-terminals."""
        return self.nonterminals + self.preterminals

    @property
    def dtype(self) -> torch.dtype:
        return self.rules.dtype

    @property
    def device(self) -> torch.device:
        return self.rules.device

    def __repr__(self) -> str:
        return (
            f"PCFG({len(self.nonterminals)} in-terminals, {len(self.preterminals)} pre-terminals, {len(self.vocabulary)} words, "
            f"{int((self.rules > 0).sum())} binary rules, {self.dtype}, {self.device})"
        )

    def tables(self) -> RuleTables:
        """The rules laid out for the chart, made once."""
        if self._tables is None:
            self._tables = RuleTables.of(self.root, self.rules)
        return self._tables

    def _with(self, root: Tensor, rules: Tensor, emissions: Tensor, **more: Any) -> PCFG:
        names = {
            "nonterminals": self.nonterminals,
            "preterminals": self.preterminals,
            "vocabulary": self.vocabulary,
        }
        return PCFG(root, rules, emissions, **{**names, "proper": self.proper, **more})

    def to(self, *args: Any, **kwargs: Any) -> PCFG:
        """A copy on another device or in another dtype; arguments as torch.Tensor.to."""
        return self._with(*(t.to(*args, **kwargs) for t in (self.root, self.rules, self.emissions)))

    def double(self) -> PCFG:
        """A copy in float64."""
        return self.to(torch.float64)

    @classmethod
    def from_string(cls, text: str, **options: Any) -> PCFG:
        """From NLTK's notation, rules of one symbol removed exactly; see notation.py for what is read.

        >>> grammar = PCFG.from_string('''
        ...     S -> NP VP [1.0]
        ...     NP -> D N [0.6] | 'dogs' [0.4]
        ...     VP -> V NP [0.7] | 'bark' [0.3]
        ...     D -> 'the' [1.0]
        ...     N -> 'dog' [0.5] | 'bark' [0.5]
        ...     V -> 'see' [1.0]
        ... ''')
        >>> len(grammar.nonterminals), grammar.vocabulary
        (3, ('dogs', 'bark', 'the', 'dog', 'see'))
        """
        from papercore.parsing.notation import read

        return read(text, **options)

    @classmethod
    def from_treebank(cls, trees: Iterable[Any], **options: Any) -> PCFG:
        """By counting in parse trees (ours, NLTK's, or bracketed text); options and steps: see treebank.py."""
        from papercore.parsing.treebank import estimate

        return estimate(trees, **options)

    def sample(
        self, n: int, *, max_length: int | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[Tree]]:
        """Draw n sentences: ids right-padded with 0, and their trees, whose leaves say how long each is; see sampling.py.

        `papercore.parsing.sample(..., trees=False)` returns lengths in place of trees, ten times faster.
        """
        from papercore.parsing.sampling import sample

        return sample(self, n, max_length=max_length, generator=generator)

    def mean_matrix(self) -> Tensor:
        """Expected number of in-terminals that each in-terminal is rewritten to: [I, I] in float64."""
        i = len(self.nonterminals)
        rules = self.rules.double()
        return rules[:, :i].sum(2) + rules[:, :, :i].sum(1)

    def spectral_radius(self) -> float:
        """Largest eigenvalue of the mean matrix. Below 1 every sentence is finite, with an expected length."""
        return float(torch.linalg.eigvals(self.mean_matrix()).abs().max())

    def expected_length(self) -> float:
        """Expected number of words of a sentence: the solution of (1 - M) length = words of one rewriting; inf at radius >= 1."""
        if self.spectral_radius() >= 1:
            return float("inf")
        i = len(self.nonterminals)
        rules, m = self.rules.double(), self.mean_matrix()
        words = rules[:, i:].sum((1, 2)) + rules[:, :, i:].sum((1, 2))
        lengths = torch.linalg.solve(torch.eye(i, dtype=m.dtype, device=m.device) - m, words)
        return float(self.root.double() @ lengths)

    def expected_counts(self) -> Tensor:
        """Expected number of times each symbol occurs in a tree, [S] in float64. ValueError at a spectral radius of 1 or more."""
        radius = self.spectral_radius()
        if radius >= 1:
            raise ValueError(
                f"the spectral radius of this grammar is {radius:.4f} >= 1: expected counts are infinite."
            )
        i = len(self.nonterminals)
        m, rules = self.mean_matrix(), self.rules.double()
        eye = torch.eye(i, dtype=m.dtype, device=m.device)
        inner = torch.linalg.solve((eye - m).t(), self.root.double())
        leaves = inner @ (rules[:, i:].sum(2) + rules[:, :, i:].sum(1))
        return torch.cat([inner, leaves])

    def truncate(self, in_terminals: int, pre_terminals: int, *, weights: Tensor | None = None) -> PCFG:
        """Keep the most frequent symbols; rules with another symbol are dropped and nothing is renormalised (paper, section 3.3).

        Args:
            in_terminals, pre_terminals: how many to keep, from 1 to what there is. The most frequent start symbol is always kept.
            weights: [S], how frequent each symbol is; default: `expected_counts`.

        Returns:
            A grammar with sums below 1 (`proper` is False); its probabilities never exceed those of the whole one.
        """
        i, p = len(self.nonterminals), len(self.preterminals)
        for name, value, most in (("in_terminals", in_terminals, i), ("pre_terminals", pre_terminals, p)):
            if not 1 <= value <= most:
                raise ValueError(f"{name} = {value}: expected 1 to {most}.")
        weights = self.expected_counts() if weights is None else weights
        if weights.shape != (i + p,):
            raise ValueError(
                f"weights of shape {tuple(weights.shape)}: expected one for each of the {i + p} symbols."
            )
        inner = weights[:i].double().clone()
        inner[self.root.argmax()] = float("inf")
        kept_i = inner.topk(in_terminals).indices.sort().values.to(self.device)
        kept_p = weights[i:].topk(pre_terminals).indices.sort().values.to(self.device)
        both = torch.cat([kept_i, kept_p + i])
        rules = self.rules[kept_i][:, both][:, :, both]
        return PCFG(
            self.root[kept_i],
            rules,
            self.emissions[kept_p],
            nonterminals=[self.nonterminals[j] for j in kept_i.tolist()],
            preterminals=[self.preterminals[j] for j in kept_p.tolist()],
            vocabulary=self.vocabulary,
            proper=False,
        )

    def encode(
        self, words: str | Sequence[str] | Sequence[Sequence[str]], *, unk: str | None = None
    ) -> Tensor:
        """Ids of words: [n] for one sentence, [B, n] right-padded with 0 for several.

        Args:
            words: a sentence as text (split at blanks) or as words, or a list of sentences given as lists of words.
            unk: the word of the vocabulary that stands in for unknown ones; default: unknown words are refused.

        Raises:
            KeyError: words that are not in the vocabulary, listed. ValueError: no word at all, or `unk` is not a word.

        >>> grammar = PCFG.from_string("S -> A A [1.0]\\nA -> 'x' [0.5] | 'y' [0.5]")
        >>> grammar.encode("y x"), grammar.encode([["x", "y"], ["y", "y"]])
        (tensor([1, 0]), tensor([[0, 1],
                [1, 1]]))
        """
        if isinstance(words, str):
            words = words.split()
        if not words:
            raise ValueError("a sentence needs at least one word.")
        if unk is not None and unk not in self._ids:
            raise ValueError(f"unk = {unk!r} is not in the vocabulary of {len(self.vocabulary)} words.")
        several = not isinstance(words[0], str)
        sentences: list[Sequence[str]] = list(words) if several else [words]  # type: ignore[list-item]
        missing = sorted({w for s in sentences for w in s if w not in self._ids})
        if missing and unk is None:
            shown = ", ".join(map(repr, missing[:10]))
            raise KeyError(
                f"not in the vocabulary of {len(self.vocabulary)} words: {shown}. Give unk=, a word that stands in for them."
            )
        other = self._ids[unk] if unk is not None else 0
        rows = [torch.tensor([self._ids.get(w, other) for w in s], dtype=torch.long) for s in sentences]
        if not several:
            return rows[0].to(self.device)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)

    def decode(self, input_ids: Iterable[int] | Tensor) -> list[str]:
        """Words of one row of ids; an id that is no word becomes "_"."""
        ids = input_ids.tolist() if isinstance(input_ids, Tensor) else list(input_ids)
        return [self.vocabulary[k] if 0 <= k < len(self.vocabulary) else "_" for k in ids]


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], sizes: str) -> Tensor:
    """`tensor` detached, of a dtype to compute in, finite and not negative."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of floating-point probabilities, got {kind}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {shape} for {sizes}.")
    if tensor.dtype in (torch.float16, torch.bfloat16):
        warnings.warn(
            f"{name} is {tensor.dtype}, too coarse for charts: it is used in float32.", stacklevel=4
        )
        tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinity; expected probabilities.")
    if bool((tensor < 0).any()):
        hint = " They look like logarithms: pass their exp()." if bool((tensor <= 0).all()) else ""
        raise ValueError(f"{name} holds {float(tensor.min()):.6g}; expected probabilities from 0 to 1.{hint}")
    return tensor.detach()
