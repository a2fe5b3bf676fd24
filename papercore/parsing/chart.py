"""The inside-outside algorithm for a given grammar: batched, scaled, and with the outside pass written out.

Zhao et al. (2023, arXiv 2303.08117), section 2, in the notation of the paper: alpha is the inside, beta the outside. (Other
libraries swap the two names.) A span (i, w) covers the words i .. i + w - 1.

    alpha(A, i, w) = sum over splits k and rules A -> B C of  p(A -> B C) alpha(B, i, k) alpha(C, i + k, w - k)
    Z              = sum over A of root(A) alpha(A, 0, n)
    mu(A, i, w)    = alpha(A, i, w) beta(A, i, w) / Z        the probability that the tree holds the constituent A over the span

How it is computed. Spans of single words hold pre-terminals only and longer ones in-terminals only, so there are four cases, by
which of the two children is a word. Two long children: all splits of all spans of one width, of all sentences, go into one
batched product, an outer product summed over splits, and one matrix product with the rules. One word: its matrix of rules,
"what a span becomes when this word is put before (behind) it", does not depend on the span. It is made once a position, which
leaves a product of a vector and a small matrix for each span. The outside pass sums up what comes back to these matrices and
multiplies it with the rules once, at the end.

Numbers. Inside probabilities fall exponentially with the width. Every span therefore keeps a vector h whose largest entry is 1
and a logarithm m, with alpha = h exp(m). The outside pass carries g = d log Z / d h, which is of order 1 wherever it matters,
and mu = g h. An entry below about 1e-38 of the largest of its span is lost in float32: use float64 for such grammars.

Glossary
    B, n, P, I      sentences, words of the longest, pre-terminals, in-terminals; S = I + P
    words           e       p(A -> w_i) / largest        [n, B, P]
    word_scale              log of that largest          [n, B]
    left            h       by start and width           [n, B, n + 1, I]
    right           h       by end and n - width         [n + 1, B, n + 1, I]
    scale           m       by start and width           [n, B, n + 1]; right_scale by end and n - width
    before, after           sum_B e_B p(A -> B C), sum_C e_C p(A -> B C): a word before or behind a span  [n, B, I, I], child first
    g_left, g_right         parts of d log Z / d h from parents to the right and to the left, laid out like left and right

Both layouts put the splits of a span side by side in memory: as k grows, the left child (i, k) moves on in `left`, and the
right child, which ends where the span ends, moves on in `right`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.parsing.rules import RuleTables

__all__ = ["Chart", "inside", "outside"]


@dataclass
class Chart:
    """The inside chart of a batch. Made by `inside`, read by `outside`, by decoders and by samplers."""

    words: Tensor  # [n, B, P]
    word_scale: Tensor  # [n, B]
    before: Tensor  # [n, B, I, I]
    after: Tensor  # [n, B, I, I]
    left: Tensor  # [n, B, n + 1, I]
    right: Tensor  # [n + 1, B, n + 1, I]
    scale: Tensor  # [n, B, n + 1]
    right_scale: Tensor  # [n + 1, B, n + 1]
    log_z: Tensor  # [B]
    lengths: Tensor  # [B]

    @property
    def n(self) -> int:
        return self.left.shape[0]

    def split_weights(self, width: int) -> tuple[Tensor, Tensor]:
        """Relative weight of every split of the spans of `width`, [spans, B, width - 1], and the log of the largest one, [spans, B]."""
        n, spans = self.n, self.n - width + 1
        logs = self.left.new_empty(spans, self.left.shape[1], width - 1)
        # Splits k = 1 .. width - 1: children of one word at the two ends, longer ones in between.
        right_words = self.word_scale[width - 1 :]
        if width == 2:
            logs[..., 0] = self.word_scale[:spans] + right_words
        else:
            logs[..., 0] = self.word_scale[:spans] + self.right_scale[width:, :, n - width + 1]
            logs[..., -1] = self.scale[:spans, :, width - 1] + right_words
            if width > 3:
                logs[..., 1:-1] = self.scale[:spans, :, 2 : width - 1]
                logs[..., 1:-1] += self.right_scale[width:, :, n - width + 2 : n - 1]
        top = logs.amax(-1)
        shift = torch.where(top == -math.inf, 0.0, top)
        return torch.exp(logs - shift.unsqueeze(-1)), top


def inside(rules: RuleTables, emitted: Tensor, lengths: Tensor) -> Chart:
    """Fill the inside chart.

    Args:
        rules: the grammar's rules, of the dtype and on the device to compute in.
        emitted: [B, n, P], p(A -> w) of every word; what stands behind a sentence's length is not looked at.
        lengths: LongTensor [B], words of each sentence, each from 2 to n.

    Returns:
        The chart; log_z is -inf for a sentence that the grammar cannot make.
    """
    batch, n, _ = emitted.shape
    count = rules.root.shape[0]
    inside_sentence = torch.arange(n, device=emitted.device).unsqueeze(1) < lengths
    words = torch.where(inside_sentence.unsqueeze(-1), emitted.transpose(0, 1), 0.0)
    largest = words.amax(-1)
    word_scale = largest.log()
    words = words / torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
    chart = Chart(
        words=words,
        word_scale=word_scale,
        before=rules.around_words(words, rules.words_spans),
        after=rules.around_words(words, rules.spans_words),
        left=emitted.new_zeros(n, batch, n + 1, count),
        right=emitted.new_zeros(n + 1, batch, n + 1, count),
        scale=emitted.new_full((n, batch, n + 1), -math.inf),
        right_scale=emitted.new_full((n + 1, batch, n + 1), -math.inf),
        log_z=emitted.new_full((batch,), -math.inf),
        lengths=lengths,
    )
    by_length = lengths.tolist()
    for width in range(2, max(by_length) + 1):
        spans = n - width + 1
        weights, top = chart.split_weights(width)
        made = _combine(chart, rules, width, weights)
        largest = made.amax(-1)
        made /= torch.where(largest > 0, largest, 1.0).unsqueeze(-1)
        scale = top + largest.log()
        chart.left[:spans, :, width] = made
        chart.right[width:, :, n - width] = made
        chart.scale[:spans, :, width] = scale
        chart.right_scale[width:, :, n - width] = scale
        whole = [b for b, length in enumerate(by_length) if length == width]
        if whole:
            chart.log_z[whole] = (made[0, whole] @ rules.root).log() + scale[0, whole]
    return chart


def _children(chart: Chart, width: int) -> tuple[Tensor, Tensor]:
    """Left and right children longer than a word, [spans, B, width - 3, I], in the order of the splits k = 2 .. width - 2."""
    n, spans = chart.n, chart.n - width + 1
    return chart.left[:spans, :, 2 : width - 1], chart.right[width:, :, n - width + 2 : n - 1]


def _combine(chart: Chart, rules: RuleTables, width: int, weights: Tensor) -> Tensor:
    """Inside of all spans of one width, divided by exp(top): [spans, B, I]."""
    n, spans = chart.n, chart.n - width + 1
    if width == 2:
        return rules.words_words.combine(chart.words[:spans], chart.words[1:])
    made = _through(chart.right[width:, :, n - width + 1] * weights[..., :1], chart.before[:spans])
    made += _through(chart.left[:spans, :, width - 1] * weights[..., -1:], chart.after[width - 1 :])
    if width > 3:
        made += rules.spans_spans.combine_many(*_children(chart, width), weights[..., 1:-1])
    return made


def _through(vectors: Tensor, matrices: Tensor) -> Tensor:
    """vectors [..., I] times matrices [..., I, I], span by span: [..., I]."""
    size = vectors.shape[-1]
    return torch.bmm(vectors.reshape(-1, 1, size), matrices.flatten(0, -3)).view(vectors.shape)


@dataclass
class Outside:
    """What the outside pass gives, all as derivatives of log Z, which are expectations once multiplied by their variable."""

    term: Tensor  # mu of pre-terminals, [B, n, P]
    span: Tensor  # mu of in-terminals, [B, n, n, I] by start and width - 1
    root: Tensor  # d log Z / d root(A), [B, I]
    rules: Tensor | None  # sum over sentences of weight times d log Z / d p(A -> B C), [I, S, S]
    words: Tensor  # d log Z / d e, e as in Chart.words, [B, n, P]


def outside(
    chart: Chart, rules: RuleTables, *, with_rules: bool = False, weight: Tensor | None = None
) -> Outside:
    """The adjoint of `inside`, from the whole sentence down to its words.

    Args:
        chart, rules: as filled by, and given to, `inside`.
        with_rules: also sum up the derivatives for every rule (one more matrix product a width).
        weight: [B], a factor for each sentence in the sum over sentences of `rules`; default 1.
    """
    n, batch, count = chart.n, chart.left.shape[1], rules.root.shape[0]
    down = _Down(
        *(
            torch.zeros_like(part)
            for part in (chart.left, chart.right, chart.words, chart.before, chart.after)
        )
    )
    span = chart.left.new_zeros(n, batch, n, count)
    root = chart.left.new_zeros(batch, count)
    counts = rules.zero_counts() if with_rules else None
    by_length = chart.lengths.tolist()
    for width in range(max(by_length), 1, -1):
        spans = n - width + 1
        g = down.left[:spans, :, width] + down.right[width:, :, n - width]
        whole = [b for b, length in enumerate(by_length) if length == width]
        if whole:
            h = chart.left[0, whole, width]
            total = (h @ rules.root).unsqueeze(-1)
            possible = total > 0
            safe = torch.where(possible, total, 1.0)
            g[0, whole] += torch.where(possible, rules.root / safe, 0.0)
            root[whole] = torch.where(possible, h / safe, 0.0)
        span[:spans, :, width - 1] = g * chart.left[:spans, :, width]
        weights, top = chart.split_weights(width)
        # The parent is the sum over splits divided by its largest entry, whose logarithm is scale - top.
        scale = chart.scale[:spans, :, width]
        weights *= torch.where(scale == -math.inf, 0.0, torch.exp(top - scale)).unsqueeze(-1)
        weighted = g if weight is None else g * weight.unsqueeze(-1)
        _pass_down(chart, rules, width, weights, g, down)
        if counts is not None and width == 2:
            counts[0] += rules.words_words.count(weighted * weights, chart.words[:spans], chart.words[1:])
        elif counts is not None and width > 3:
            counts[3] += rules.spans_spans.count_many(weighted, *_children(chart, width), weights[..., 1:-1])
    words = down.words
    words += rules.back_to_words(down.before, rules.words_spans)
    words += rules.back_to_words(down.after, rules.spans_words)
    if counts is not None:
        each = chart.words if weight is None else chart.words * weight.unsqueeze(-1)
        counts[1] += each.flatten(0, 1).t() @ down.before.flatten(0, 1).flatten(1)
        counts[2] += each.flatten(0, 1).t() @ down.after.flatten(0, 1).flatten(1)
    return Outside(
        term=(words * chart.words).transpose(0, 1),
        span=span.transpose(0, 1),
        root=root,
        rules=None if counts is None else rules.full_counts(counts),
        words=words.transpose(0, 1),
    )


@dataclass
class _Down:
    """d log Z / d (part of the chart), filled from the parents."""

    left: Tensor
    right: Tensor
    words: Tensor
    before: Tensor
    after: Tensor


def _pass_down(chart: Chart, rules: RuleTables, width: int, weights: Tensor, g: Tensor, down: _Down) -> None:
    """Hand the derivatives of all spans of one width on to their children."""
    n, spans = chart.n, chart.n - width + 1
    if width == 2:
        to_left, to_right = rules.words_words.split(g * weights, chart.words[:spans], chart.words[1:])
        down.words[:spans] += to_left
        down.words[1:] += to_right
        return
    first, last = g * weights[..., :1], g * weights[..., -1:]
    right_long, left_long = chart.right[width:, :, n - width + 1], chart.left[:spans, :, width - 1]
    down.right[width:, :, n - width + 1] += _through(first, chart.before[:spans].transpose(-1, -2))
    down.left[:spans, :, width - 1] += _through(last, chart.after[width - 1 :].transpose(-1, -2))
    down.before[:spans].addcmul_(right_long.unsqueeze(-1), first.unsqueeze(-2))
    down.after[width - 1 :].addcmul_(left_long.unsqueeze(-1), last.unsqueeze(-2))
    if width > 3:
        to_left, to_right = rules.spans_spans.split_many(g, *_children(chart, width), weights[..., 1:-1])
        down.left[:spans, :, 2 : width - 1] += to_left
        down.right[width:, :, n - width + 2 : n - 1] += to_right
