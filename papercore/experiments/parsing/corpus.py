"""Sentences of a grammar, and what is masked in them.

Glossary
    ids         word ids, right-padded with 0             [N, n]
    lengths     words of each sentence                    [N]
    mask        V, the id after the last word
    position    the masked word of a test sentence        [N]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from papercore.parsing import PCFG, Tree, sample

CHUNK = 50  # batches whose sentences are sorted together, so that a batch holds sentences of like lengths


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

    def words(self, row: int, vocabulary: Sequence[str]) -> list[str]:
        """The words of one sentence."""
        return [vocabulary[i] for i in self.ids[row, : int(self.lengths[row])].tolist()]


def draw(
    grammar: PCFG, n: int, min_length: int, max_length: int, seed: int, *, trees: bool = False
) -> Sentences:
    """n sentences of min_length to max_length words, independent draws of the grammar under that condition.

    Raises:
        ValueError: fewer than one sentence in twenty has such a length.
    """
    generator = torch.Generator().manual_seed(seed)
    kept_ids, kept_lengths, kept_trees = [], [], []
    found, tried = 0, 0
    while found < n:
        if tried > 20 * n + 2000:
            raise ValueError(
                f"of {tried} sentences {found} have {min_length} to {max_length} words: expected one in twenty at least."
            )
        # A quarter more than asked for: short sentences are few, and one round mostly does.
        some = n - found + n // 4 + 8
        if trees:
            ids, drawn = sample(grammar, some, max_length=max_length, generator=generator)
            lengths = torch.tensor([len(tree) for tree in drawn], device=ids.device)
        else:
            ids, lengths = sample(grammar, some, max_length=max_length, generator=generator, trees=False)
        rows = (lengths >= min_length).nonzero().squeeze(1)[: n - found]
        padded = ids.new_zeros(len(rows), max_length)
        padded[:, : ids.shape[1]] = ids[rows]
        kept_ids.append(padded)
        kept_lengths.append(lengths[rows])
        if trees:
            kept_trees += [drawn[i] for i in rows.tolist()]
        found, tried = found + len(rows), tried + some
    return Sentences(torch.cat(kept_ids).cpu(), torch.cat(kept_lengths).cpu(), tuple(kept_trees))


def of_trees(grammar: PCFG, trees: Sequence[Tree], words: Sequence[Sequence[str]]) -> Sentences:
    """Sentences of given trees; `words` are their leaves as the grammar knows them (unknown ones replaced)."""
    lengths = torch.tensor([len(sentence) for sentence in words])
    ids = torch.zeros(len(words), int(lengths.max()), dtype=torch.long)
    for row, sentence in enumerate(words):
        ids[row, : len(sentence)] = grammar.encode(list(sentence))
    return Sentences(ids, lengths, tuple(trees))


def one_mask(sentences: Sentences, mask: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One word of every sentence masked, each position as likely: (ids with the mask, positions [N], the words [N])."""
    u = torch.rand(len(sentences), generator=torch.Generator().manual_seed(seed))
    position = (u * sentences.lengths).long().clamp(max=sentences.lengths - 1)
    rows = torch.arange(len(sentences))
    ids = sentences.ids.clone()
    words = ids[rows, position]
    ids[rows, position] = mask
    return ids, position, words


def training_batches(
    sentences: Sentences, batch: int, rate: float, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Without end: (ids [b, m], lengths [b], masked [b, m] bool), at least one mask a sentence, every mask a pure [MASK].

    BERT's recipe replaces some masks by random words and keeps others; the Bayes-optimal predictor would then need a model of that
    noise.

    Raises:
        ValueError: fewer sentences than one batch.
    """
    if len(sentences) < batch:
        raise ValueError(
            f"{len(sentences)} sentences do not fill a batch of {batch}: take more sentences or a smaller batch."
        )
    while True:
        order = torch.randperm(len(sentences), generator=generator)
        for start in range(0, len(order) - batch + 1, batch * CHUNK):
            chunk = order[start : start + batch * CHUNK]
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
