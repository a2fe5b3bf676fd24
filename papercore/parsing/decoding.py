"""Trees from charts: the tree with most expected constituents, the most probable tree, and trees drawn from the posterior.

labelled_recall     maximises the expected number of right constituents (Goodman, 1996):
                    M(i, w) = max_A mu(A, i, w) + max over k of M(i, k) + M(i + k, w - k)
                    It need not be a tree of the grammar. Ties go to the shortest left part.
viterbi             the tree of highest probability
posterior_sample    trees with their probabilities given the words

What a reader of trees should know: the first is right more often, constituent by constituent; the second is right more often as
a whole. They differ exactly where the grammar is unsure.

Glossary
    mu          marginals of spans          [B, n, n, I] by start and width - 1
    best        M of the text               [B, n, n] by start and width - 1
    log_chart   log inside, sum or maximum  [n, B, n + 1, I] by start and width
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from papercore.parsing.chart import inside
from papercore.parsing.grammar import PCFG
from papercore.parsing.inference import ImpossibleSentence, IOResult, _checked, _emitted
from papercore.parsing.trees import Tree

__all__ = ["labelled_recall", "posterior_sample", "viterbi"]


def labelled_recall(
    result: IOResult, lengths: Tensor | Sequence[int] | None = None, *, labelled: bool = True
) -> list[Tree]:
    """The tree with most constituents in expectation, for each sentence of an inside-outside result.

    Args:
        result: from `inside_outside`, or from any model that gives span marginals (`ConstructedIO`, a probe).
        lengths: words of each sentence; default: those of the result.
        labelled: score a span by its best label; False: by the sum over labels, which maximises unlabelled recall. The label shown
            is the best one in both cases.

    Raises:
        ImpossibleSentence: the grammar cannot make a sentence. ValueError: lengths do not fit.
    """
    result.require_possible()
    size = result.lengths if lengths is None else torch.as_tensor(lengths)
    if (
        size.shape != result.lengths.shape
        or bool((size < 2).any())
        or int(size.max()) > result.span_marginals.shape[1]
    ):
        raise ValueError(
            f"lengths {size.tolist()} do not fit {result.lengths.numel()} sentences of at most {result.span_marginals.shape[1]} words."
        )
    best_label = result.span_marginals.max(-1)
    score = best_label.values if labelled else result.span_marginals.sum(-1)
    split = _best_splits(score).cpu()
    labels = best_label.indices.cpu()
    tags = result.term_marginals.argmax(-1).cpu()
    grammar, trees = result.grammar, []
    for row, length in enumerate(size.tolist()):
        words = result.words(row)

        def build(start: int, width: int, row: int = row, words: list[str] = words) -> Tree:
            if width == 1:
                return Tree(grammar.preterminals[int(tags[row, start])], (words[start],))
            left = int(split[row, start, width - 1])
            kids = (build(start, left), build(start + left, width - left))
            return Tree(grammar.nonterminals[int(labels[row, start, width - 1])], kids)

        trees.append(build(0, length))
    return trees


def _best_splits(score: Tensor) -> Tensor:
    """Width of the left part of every span's best split, [B, n, n] by start and width - 1."""
    batch, n, _ = score.shape
    best = torch.zeros_like(score)
    split = torch.zeros(batch, n, n, dtype=torch.long, device=score.device)
    for width in range(2, n + 1):
        spans = n - width + 1
        starts = torch.arange(spans, device=score.device)
        sums = torch.stack(
            [best[:, :spans, k - 1] + best[:, starts + k, width - k - 1] for k in range(1, width)], -1
        )
        # argmax gives no promise on ties; the first of the largest is wanted.
        top = sums.max(-1, keepdim=True).values
        split[:, :spans, width - 1] = (sums == top).to(torch.uint8).argmax(-1) + 1
        best[:, :spans, width - 1] = score[:, :spans, width - 1] + top.squeeze(-1)
    return split


def viterbi(
    grammar: PCFG, input_ids: Tensor, *, lengths: Tensor | Sequence[int] | None = None
) -> tuple[list[Tree], Tensor]:
    """The most probable tree of each sentence, and the logarithm of its probability, [B] in nats.

    Args:
        grammar, input_ids, lengths: as for `inside_outside`.

    Raises:
        ImpossibleSentence: the grammar cannot make a sentence. ValueError, TypeError: as `inside_outside`.
    """
    ids, size = _checked(grammar, input_ids, lengths, None)
    log_words = _emitted(grammar, ids, None).log().transpose(0, 1)
    chart = _max_chart(grammar, log_words)
    walk = _Walk(grammar, log_words, chart)
    trees, scores = [], []
    for row, length in enumerate(size.tolist()):
        start = chart[0, row, length] + grammar.root.log()
        scores.append(start.max())
        if scores[-1] == -math.inf:
            words = " ".join(grammar.decode(ids[row, :length]))
            raise ImpossibleSentence(f"the grammar cannot make sentence {row}, {words!r}: it has no tree.")
        trees.append(
            walk.tree(row, length, int(start.argmax()), grammar.decode(ids[row, :length]), _first_best)
        )
    return trees, torch.stack(scores)


def posterior_sample(
    grammar: PCFG,
    input_ids: Tensor,
    n: int = 1,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> list[list[Tree]]:
    """n trees for each sentence, drawn with their probabilities given the words.

    Args:
        grammar, input_ids, lengths: as for `inside_outside`.
        n: trees for each sentence, at least 1.
        generator: on the CPU; default: a new one with seed 0, so that the global generator is not touched.

    Raises:
        ImpossibleSentence: the grammar cannot make a sentence. ValueError, TypeError: as `inside_outside`; n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}: expected at least 1 tree a sentence.")
    ids, size = _checked(grammar, input_ids, lengths, None)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    emitted = _emitted(grammar, ids, None)
    chart = inside(grammar.tables(), emitted, size)
    log_chart = chart.left.log() + chart.scale.unsqueeze(-1).nan_to_num(neginf=0.0)
    walk = _Walk(grammar, emitted.log().transpose(0, 1), log_chart)

    def draw(logs: Tensor) -> int:
        return int(torch.multinomial(torch.softmax(logs.double().cpu(), 0), 1, generator=generator))

    out = []
    for row, length in enumerate(size.tolist()):
        words = grammar.decode(ids[row, :length])
        if chart.log_z[row] == -math.inf:
            raise ImpossibleSentence(
                f"the grammar cannot make sentence {row}, {' '.join(words)!r}: it has no tree."
            )
        start = log_chart[0, row, length] + grammar.root.log()
        out.append([walk.tree(row, length, draw(start), words, draw) for _ in range(n)])
    return out


def _first_best(logs: Tensor) -> int:
    return int((logs == logs.max()).to(torch.uint8).argmax())


class _Walk:
    """From the top of a chart to the words: at every node one of its splits and rules is chosen by a function of their logarithms."""

    def __init__(self, grammar: PCFG, log_words: Tensor, log_chart: Tensor) -> None:
        self.grammar, self.words, self.chart = grammar, log_words, log_chart
        self.rules = grammar.rules.log()

    def tree(self, row: int, length: int, label: int, words: list[str], choose: object) -> Tree:
        names, inner = self.grammar.symbols, len(self.grammar.nonterminals)

        def build(start: int, width: int, symbol: int) -> Tree:
            if width == 1:
                return Tree(names[symbol], (words[start],))
            logs, decode = self._options(row, start, width, symbol)
            left, b, c = decode(choose(logs))  # type: ignore[operator]
            kids = (build(start, left, b), build(start + left, width - left, c))
            return Tree(names[symbol], kids)

        assert label < inner
        return build(0, length, label)

    def _children(self, row: int, start: int, width: int) -> tuple[Tensor, int]:
        """Logarithms of one child's symbols, and the number of the first of them."""
        if width == 1:
            return self.words[start, row], len(self.grammar.nonterminals)
        return self.chart[start, row, width], 0

    def _options(self, row: int, start: int, width: int, symbol: int) -> tuple[Tensor, object]:
        """Logarithms of all (split, B, C) of a node in one line, and the function that finds them again."""
        parts, places = [], []
        for left in range(1, width):
            x, b = self._children(row, start, left)
            y, c = self._children(row, start + left, width - left)
            block = self.rules[symbol, b : b + len(x), c : c + len(y)] + x.unsqueeze(1) + y
            parts.append(block.flatten())
            places.append((left, b, c, len(y)))

        def decode(index: int) -> tuple[int, int, int]:
            for part, (left, b, c, width_of_row) in zip(parts, places, strict=True):
                if index < len(part):
                    return left, b + index // width_of_row, c + index % width_of_row
                index -= len(part)
            raise AssertionError("an index beyond all options")

        return torch.cat(parts), decode


def _max_chart(grammar: PCFG, log_words: Tensor) -> Tensor:
    """Log probability of the best tree of every symbol over every span, [n, B, n + 1, I] by start and width."""
    n, batch, _ = log_words.shape
    inner = len(grammar.nonterminals)
    log_rules = grammar.rules.log()
    chart = log_words.new_full((n, batch, n + 1, inner), -math.inf)
    for width in range(2, n + 1):
        spans = n - width + 1
        best = log_words.new_full((spans, batch, inner), -math.inf)
        right_word = log_words[width - 1 :]
        if width == 2:
            _raise_to(
                best, log_words[:spans].unsqueeze(-1) + right_word.unsqueeze(-2), log_rules[:, inner:, inner:]
            )
        else:
            after = chart[1 : spans + 1, :, width - 1]
            _raise_to(
                best, log_words[:spans].unsqueeze(-1) + after.unsqueeze(-2), log_rules[:, inner:, :inner]
            )
            before = chart[:spans, :, width - 1]
            _raise_to(best, before.unsqueeze(-1) + right_word.unsqueeze(-2), log_rules[:, :inner, inner:])
        if width > 3:
            # A rule's probability does not depend on the split: the best split of every pair of children comes first.
            pairs = log_words.new_full((spans, batch, inner, inner), -math.inf)
            for left in range(2, width - 1):
                x, y = chart[:spans, :, left], chart[left : left + spans, :, width - left]
                torch.maximum(pairs, x.unsqueeze(-1) + y.unsqueeze(-2), out=pairs)
            _raise_to(best, pairs, log_rules[:, :inner, :inner])
        chart[:spans, :, width] = best
    return chart


def _raise_to(best: Tensor, pairs: Tensor, log_rules: Tensor) -> None:
    """best_A = max(best_A, max over B, C of pairs + log p(A -> B C)), one parent at a time to keep memory at that of `pairs`."""
    flat = pairs.flatten(-2)
    for parent in range(log_rules.shape[0]):
        of_parent = log_rules[parent].flatten()
        used = (of_parent > -math.inf).nonzero().squeeze(1)
        if used.numel():
            found = (flat.index_select(-1, used) + of_parent[used]).amax(-1)
            torch.maximum(best[..., parent], found, out=best[..., parent])
