"""Predictors of a masked word to compare a model with, from knowing nothing to knowing the grammar.

    unigram     how frequent a word is
    window      p(w | left word) p(w | right word) / p(w), from counts; the ends of the sentence count as words
    Bayes       the posterior of the grammar: no predictor has a lower cross-entropy (Zhao et al., section 3.2)

Cross-entropy is in nats a masked word. For any predictor q: CE(q) - CE(Bayes) = E KL(Bayes || q).

Glossary
    nll     -log q(the word)                                       [N]
    gap     log p(the word) - log q(the word), p Bayes             [N]
    kl      KL(p || q) over all words                              [N]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.experiments.parsing.corpus import Sentences
from papercore.lab.progress import progress
from papercore.parsing import PCFG, masked_posterior


@dataclass(frozen=True)
class Counts:
    """Smoothed log probabilities from counts: of a word [V], and of a word after and before a neighbour, [V + 1, V]."""

    word: Tensor
    after: Tensor
    before: Tensor

    @classmethod
    def of(cls, sentences: Sentences, words: int, *, smoothing: float = 0.05) -> Counts:
        """Neighbour number V is the end of the sentence. `smoothing` is added in proportion to the words' own frequency."""
        inside = torch.arange(sentences.ids.shape[1]) < sentences.lengths.unsqueeze(1)
        flat = sentences.ids[inside]
        single = torch.bincount(flat, minlength=words).double() + 0.5
        single /= single.sum()
        tables = []
        for beside in neighbours(sentences.ids, sentences.lengths, words):
            pairs = torch.bincount(beside[inside] * words + flat, minlength=(words + 1) * words).double()
            table = pairs.view(words + 1, words) + smoothing * words * single
            tables.append((table / table.sum(1, keepdim=True)).log())
        return cls(single.log(), *tables)

    def window(self, ids: Tensor, lengths: Tensor, position: Tensor) -> Tensor:
        """log q(w | left, right) at each masked position, [N, V]."""
        left, right = neighbours(ids, lengths, len(self.word))
        rows = torch.arange(len(ids))
        scores = self.after[left[rows, position]] + self.before[right[rows, position]] - self.word
        return scores.log_softmax(-1)


def neighbours(ids: Tensor, lengths: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """The word before and behind every position, [N, n] each; `end` beyond the sentence."""
    n = ids.shape[1]
    left = torch.cat([torch.full_like(ids[:, :1], end), ids[:, :-1]], 1)
    right = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], end)], 1)
    last = torch.arange(n) == (lengths - 1).unsqueeze(1)
    return left, torch.where(last, end, right)


def posterior(grammar: PCFG, ids: Tensor, lengths: Tensor, position: Tensor, *, batch: int = 100) -> Tensor:
    """The grammar's posterior at each masked position, [N, V], in float64 on the CPU; 0 where a sentence is impossible."""
    mask, out = len(grammar.vocabulary), []
    # Sentences of like lengths together: a chart is as wide as its longest sentence.
    order = lengths.argsort(stable=True)
    for rows in progress(list(order.split(batch)), "posterior of the grammar"):
        longest = int(lengths[rows].max())
        found = masked_posterior(grammar, ids[rows, :longest], mask, lengths=lengths[rows])
        out.append(found[torch.arange(len(rows)), position[rows]].double().cpu())
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return torch.cat(out)[back]


@dataclass(frozen=True)
class Scores:
    """What a predictor loses on each sentence: [N] in float64."""

    nll: Tensor
    gap: Tensor
    kl: Tensor

    @classmethod
    def of(cls, log_q: Tensor, bayes: Tensor, words: Tensor) -> Scores:
        """From log probabilities of a predictor and probabilities of Bayes, [N, V], at the words that were masked [N]."""
        rows = torch.arange(len(words))
        log_q = log_q.double()
        p = bayes.double()
        log_p = torch.where(p > 0, p, 1.0).log()
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
        nll = -log_q[rows, words]
        return cls(nll, p[rows, words].log() + nll, kl)

    def summary(self) -> dict[str, float]:
        """ce, gap, kl, with standard errors of gap and of gap - kl, over sentences."""
        root = math.sqrt(len(self.gap))
        return {
            "ce": float(self.nll.mean()),
            "gap": float(self.gap.mean()),
            "gap_se": float(self.gap.std()) / root,
            "kl": float(self.kl.mean()),
            "gap_minus_kl_se": float((self.gap - self.kl).std()) / root,
        }
