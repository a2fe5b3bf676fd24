"""A generated language with a hidden topic in every sentence, and the few-shot task that reads the topic out.

A document is a few segments; a segment is six words followed by `it was <adjective> .`. Each segment has one of four topics: its
words are drawn from the topic's own words with probability 0.5 and from neutral words otherwise. The adjective names the
topic only sometimes. A document is *reliable* with probability 0.4: then every adjective belongs to its segment's topic. In
the other documents the topic of the adjective is drawn from a fixed, lopsided prior (.85, .08, .04, .03), whatever the words say.

So a model that was trained on this text knows the topics, yet asked `<words> it was` it answers with the first topic: real language
models show the same majority-label bias. Demonstrations with true labels tell it that the document is reliable.

Glossary: C topics (4), V vocabulary, k examples per topic, n tokens.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOPICS = 4
TOPIC_WORDS, NEUTRAL_WORDS, ADJECTIVES = 40, 80, 4
WORDS_PER_SEGMENT = 6
TOPIC_WORD_PROBABILITY = 0.5
RELIABLE_PROBABILITY = 0.4
LABEL_PRIOR = (0.85, 0.08, 0.04, 0.03)
ADJECTIVE_PROBABILITY = (0.4, 0.3, 0.2, 0.1)

NEUTRAL_START = TOPICS * TOPIC_WORDS
ADJECTIVE_START = NEUTRAL_START + NEUTRAL_WORDS
IT = ADJECTIVE_START + TOPICS * ADJECTIVES
WAS, STOP, UNSEEN = IT + 1, IT + 2, IT + 3
VOCABULARY = UNSEEN + 1
SEGMENT = WORDS_PER_SEGMENT + 4  # words, it, was, adjective, stop

# The label word of each topic: its most frequent adjective.
LABEL_WORDS = torch.tensor([ADJECTIVE_START + ADJECTIVES * topic for topic in range(TOPICS)])


def _zipf(n: int) -> NDArray[np.float64]:
    p = 1.0 / np.arange(1, n + 1)
    return p / p.sum()


def words(topics: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Six words for each topic: [..., 6]."""
    shape = (*topics.shape, WORDS_PER_SEGMENT)
    own = topics[..., None] * TOPIC_WORDS + rng.choice(TOPIC_WORDS, size=shape, p=_zipf(TOPIC_WORDS))
    neutral = NEUTRAL_START + rng.choice(NEUTRAL_WORDS, size=shape, p=_zipf(NEUTRAL_WORDS))
    return np.where(rng.random(shape) < TOPIC_WORD_PROBABILITY, own, neutral)


def documents(n: int, segments: int, rng: np.random.Generator) -> Tensor:
    """`n` documents of `segments` segments each, as token ids [n, segments * 10]."""
    topics = rng.integers(TOPICS, size=(n, segments))
    reliable = rng.random((n, 1)) < RELIABLE_PROBABILITY
    named = np.where(reliable, topics, rng.choice(TOPICS, size=(n, segments), p=LABEL_PRIOR))
    adjective = (
        ADJECTIVE_START
        + ADJECTIVES * named
        + rng.choice(ADJECTIVES, size=(n, segments), p=ADJECTIVE_PROBABILITY)
    )
    fixed = np.broadcast_to([IT, WAS], (n, segments, 2))
    stop = np.full((n, segments, 1), STOP)
    return torch.from_numpy(
        np.concatenate([words(topics, rng), fixed, adjective[..., None], stop], axis=-1).reshape(n, -1)
    )


@dataclasses.dataclass(frozen=True)
class Examples:
    """Labelled sentences: words [N, 6], topic [N]."""

    words: Tensor
    topics: Tensor

    def __len__(self) -> int:
        return len(self.topics)

    def prompted(self) -> Tensor:
        """`<6 words> it was`: [N, 8]; the next token should be the label word."""
        return torch.cat([self.words, self.words.new_tensor([IT, WAS]).expand(len(self), 2)], dim=1)

    def unprompted(self) -> Tensor:
        """`<6 words> <token never seen>`: [N, 7]; a new head reads the last state."""
        return torch.cat([self.words, self.words.new_full((len(self), 1), UNSEEN)], dim=1)

    def to(self, device: torch.device) -> Examples:
        return Examples(self.words.to(device), self.topics.to(device))


def examples(per_topic: int, rng: np.random.Generator) -> Examples:
    """`per_topic` sentences of every topic, shuffled."""
    topics = rng.permutation(np.repeat(np.arange(TOPICS), per_topic))
    return Examples(torch.from_numpy(words(topics, rng)), torch.from_numpy(topics))


def with_demonstrations(queries: Examples, shown: Examples) -> Tensor:
    """Each query after the same demonstrations, written with their true label words: [N, len(shown) * 10 + 8]."""
    ends = torch.stack(
        [
            torch.tensor([IT, WAS]).expand(len(shown), 2)[:, 0],
            torch.full((len(shown),), WAS),
            LABEL_WORDS[shown.topics],
            torch.full((len(shown),), STOP),
        ],
        dim=1,
    )
    context = torch.cat([shown.words, ends], dim=1).reshape(1, -1)
    return torch.cat([context.expand(len(queries), -1), queries.prompted()], dim=1)


def bayes_accuracy(data: Examples) -> float:
    """Accuracy of the best possible reader of the words: the ceiling of every method."""
    w = data.words.numpy()
    zipf = _zipf(TOPIC_WORDS)
    log_odds = np.zeros((len(w), TOPICS))
    for topic in range(TOPICS):
        own = (w >= topic * TOPIC_WORDS) & (w < (topic + 1) * TOPIC_WORDS)
        p = np.where(own, TOPIC_WORD_PROBABILITY * zipf[np.where(own, w - topic * TOPIC_WORDS, 0)], 0.0)
        neutral = w >= NEUTRAL_START
        p = np.where(
            neutral, 1.0 - TOPIC_WORD_PROBABILITY, p
        )  # the neutral word's own probability is the same under every topic
        log_odds[:, topic] = np.log(np.maximum(p, 1e-12)).sum(axis=1)
    return float((log_odds.argmax(axis=1) == data.topics.numpy()).mean())
