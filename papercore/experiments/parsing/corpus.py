"""Sentences of a grammar, and what is masked in them.

Glossary
    ids         word ids, right-padded with 0             [N, n]
    lengths     words of each sentence                    [N]
    mask        V, the id after the last word
    position    the masked word of a test sentence        [N]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.parsing import PCFG, Tree, sample

WARMED = 50  # batches whose sentences are sorted together, so that a batch holds sentences of like lengths


@dataclass(frozen=True)
class Sentences:
    """Sentences and, where they were asked for, their trees."""

    ids: Tensor
    lengths: Tensor
    trees: tuple[Tree, ...] = ()

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, start: int, end: int) -> Sentences:
        """Sentences start .. end - 1."""
        return Sentences(self.ids[start:end], self.lengths[start:end], self.trees[start:end])


def draw(grammar: PCFG, n: int, max_length: int, seed: int, *, trees: bool = False) -> Sentences:
    """n sentences of at most max_length words."""
    generator = torch.Generator().manual_seed(seed)
    if trees:
        ids, drawn = sample(grammar, n, max_length=max_length, generator=generator)
        return Sentences(ids, torch.tensor([len(tree) for tree in drawn]), tuple(drawn))
    ids, lengths = sample(grammar, n, max_length=max_length, generator=generator, trees=False)
    return Sentences(ids, lengths)


def one_mask(sentences: Sentences, mask: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One word of every sentence masked, each position as likely: (ids with the mask, positions [N], the words [N])."""
    u = torch.rand(len(sentences), generator=torch.Generator().manual_seed(seed))
    position = (u * sentences.lengths).long()
    rows = torch.arange(len(sentences))
    ids = sentences.ids.clone()
    words = ids[rows, position]
    ids[rows, position] = mask
    return ids, position, words


def training_batches(
    sentences: Sentences, batch: int, rate: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Without end: (ids [b, m], lengths [b], masked [b, m] bool), at least one mask a sentence, every mask a pure [MASK].

    Some masks are words or kept in BERT's recipe; the Bayes-optimal predictor would then need a model of that noise.
    """
    while True:
        order = torch.randperm(len(sentences), generator=generator)
        for start in range(0, len(order) - batch + 1, batch * WARMED):
            chunk = order[start : start + batch * WARMED]
            chunk = chunk[sentences.lengths[chunk].argsort(stable=True)]
            pieces = [p for p in chunk.split(batch) if len(p) == batch]
            for number in torch.randperm(len(pieces), generator=generator).tolist():
                rows = pieces[number]
                lengths = sentences.lengths[rows]
                longest = int(lengths.max())
                inside = torch.arange(longest) < lengths.unsqueeze(1)
                u = torch.rand(batch, longest, generator=generator)
                masked = (u < rate) & inside
                # Where no word was hit, the one with the smallest number.
                least = torch.where(inside, u, 2.0).argmin(1)
                masked[torch.arange(batch), least] |= ~masked.any(1)
                yield sentences.ids[rows, :longest], lengths, masked
