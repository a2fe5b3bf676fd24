"""A small language that a model can be bad at in a new way with every document: topics, private names, a private taste for words.

A document is a walk over words. The next word depends on the present one, on the topic, and on how much this document likes each
word. Now and then a *name* comes instead of a word, and behind it what it stands for: name k of a document stands for the word in
place k of the same document. Its first places are, so to say, a list of definitions. To know the word behind a name one must look
back; that takes attention. A predictor that sees the last token alone cannot know it.

    logits(next word | x) = 0.3 B_0[x] + 0.7 B_topic[x] + u_document,    entries of B from 2 N(0, 1), of u from N(0, 1)

Glossary
    W, N       words and names; tokens 0..W-1 are words, W..W+N-1 names
    topics     matrices B [K, W, W]
    recall     place [documents, length] of a token behind a name: it can be known
    oracle     log-probability of each token under the rules, given topic and taste
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

SHARED, OWN = 0.3, 0.7


@dataclasses.dataclass(frozen=True)
class Documents:
    """Sampled documents. input_ids [n, T] int64, recall [n, T] bool, oracle [n, T] float32 (log-probability; 0 at the first token)."""

    input_ids: Tensor
    recall: Tensor
    oracle: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


class Language:
    """One language: words, names, a shared word matrix and topic matrices of every kind of document.

    Args:
        words, names: how many.
        topics: number of topics of each kind, such as {"train": 8, "choose": 8, "test": 8}; kinds share no topic.
        seed: draws the matrices.
        name_rate: share of places behind a word at which a name comes, below 1.
    """

    def __init__(
        self, words: int, names: int, topics: dict[str, int], seed: int, name_rate: float = 0.25
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.words, self.names, self.name_rate = words, names, name_rate
        self.shared = 2 * torch.randn(words, words, generator=g)
        self.topics = {kind: 2 * torch.randn(k, words, words, generator=g) for kind, k in topics.items()}

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return self.words + self.names

    def draw(self, n: int, length: int, kind: str, seed: int) -> Documents:
        """n documents of one kind of topic, all at once.

        Raises:
            KeyError: the language has no topics of this kind.
        """
        g = torch.Generator().manual_seed(seed)
        topics, W = self.topics[kind], self.words
        topic = torch.randint(len(topics), (n,), generator=g)
        taste = torch.randn(n, W, generator=g)
        matrix = SHARED * self.shared + OWN * topics  # [K, W, W]
        rows = torch.arange(n)
        ids = torch.zeros(n, length, dtype=torch.long)
        recall = torch.zeros(n, length, dtype=torch.bool)
        oracle = torch.zeros(n, length)
        ids[:, 0] = torch.randint(W, (n,), generator=g)
        for t in range(1, length):
            last = ids[:, t - 1]
            after_name = last >= W
            defined = ids[rows, (last - W).clamp(min=0)]
            log_p = (matrix[topic, last.clamp(max=W - 1)] + taste).log_softmax(-1)
            word = _pick(log_p.exp(), g)
            chosen = torch.randint(self.names, (n,), generator=g)
            rate = self.name_rate if t >= self.names else 0.0
            comes = torch.rand(n, generator=g) < rate
            ids[:, t] = torch.where(after_name, defined, torch.where(comes, W + chosen, word))
            recall[:, t] = after_name
            at_name = torch.tensor(max(rate, 1e-9) / self.names).log()
            at_word = torch.where(comes, at_name, log_p[rows, word] + math.log(1 - rate))
            oracle[:, t] = torch.where(after_name, 0.0, at_word)
        return Documents(ids, recall, oracle)


def _pick(p: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row, with the probabilities of that row."""
    uniform = torch.rand(len(p), 1, generator=generator)
    # Rounding may leave the last sum below 1.
    return (p.cumsum(-1) < uniform).sum(-1).clamp(max=p.shape[1] - 1)


def pair_counts(documents: Documents, vocabulary: int, *, smoothing: float = 0.1) -> Tensor:
    """Log-probability [V, V] of the next token given the last one, from counts: the best predictor without attention, near enough."""
    ids = documents.input_ids
    pairs = ids[:, :-1] * vocabulary + ids[:, 1:]
    counts = torch.bincount(pairs.flatten(), minlength=vocabulary**2).view(vocabulary, vocabulary)
    return (counts + smoothing).div((counts + smoothing).sum(1, keepdim=True)).log()


def pair_losses(documents: Documents, log_p: Tensor) -> Tensor:
    """Negative log-probability [n, T - 1] of every token but the first under `pair_counts`."""
    ids = documents.input_ids
    return -log_p[ids[:, :-1], ids[:, 1:]]
