"""Exact nearest keys in every codebook: one biased matrix product a block of codebooks, and an argmax that reads it once.

    argmin_j ||h - k_j||^2  =  argmax_j ( h . k_j - ||k_j||^2 / 2 )

The norm goes into the product as one more component, [h, 1] . [k_j, -||k_j||^2 / 2], and a masked pair has -infinity there: the
mask costs nothing. Scores of all C x B x K pairs never exist at once; a buffer of BLOCK scores is used again and again. Keys and
heads are both shifted by the codebook's mean key, which changes no distance and keeps the digits that a common offset would
take. Ties go to the lowest index, as in torch.argmin.

Glossary (Shah et al., 2023, section 3; Traeuble et al., 2023)
    heads   h_c = R_c^T z, and a last component 1   [B, C, d_k + 1]
    table   [k_cj - m_c, -||k_cj - m_c||^2 / 2]     [C, d_k + 1, K'], K' = K rounded up to whole groups
    m_c     mean key of codebook c                  [C, d_k]

Different from the papers' code: no ||h||^2, no square root, no one-hot, always float32 or float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest_keys", "search_table"]

BLOCK = {"cpu": 2**20, "cuda": 2**26}  # scores at a time: on a CPU they should stay in its cache
GROUP, GROUPED_FROM = 128, 512  # argmax over groups pays for larger codebooks


def search_table(keys: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """(table [C, d+1, K'], mean key [C, d]) for keys [C, K, d] and a BoolTensor [C, K] of pairs that are never fetched."""
    exact = keys.detach().to(torch.float64 if keys.dtype == torch.float64 else torch.float32)
    mean = exact.mean(1)
    shifted = exact - mean.unsqueeze(1)
    bias = shifted.square().sum(-1).mul_(-0.5).masked_fill_(masked, -torch.inf)
    count = keys.shape[1]
    padding = -count % GROUP if count >= GROUPED_FROM else 0
    table = torch.cat([shifted, bias.unsqueeze(-1)], dim=-1)
    if padding:
        rows = table.new_zeros(table.shape[0], padding, table.shape[2])
        rows[..., -1] = -torch.inf
        table = torch.cat([table, rows], dim=1)
    return table.transpose(1, 2).contiguous(), mean


def nearest_keys(heads: Tensor, table: Tensor, *, block: int | None = None) -> Tensor:
    """Index of the nearest key, LongTensor [B, C].

    Args:
        heads: [B, C, d+1], shifted by the mean keys, last component 1; dtype of the table.
        table: as `search_table` makes it.
        block: scores held at a time; at least those of one codebook and one example are.

    >>> keys = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    >>> table, mean = search_table(keys, torch.zeros(1, 2, dtype=torch.bool))
    >>> heads = torch.cat([torch.tensor([[[0.9, 0.8]], [[0.1, 0.3]]]) - mean, torch.ones(2, 1, 1)], -1)
    >>> nearest_keys(heads, table).tolist()
    [[1], [0]]
    """
    rows, codebooks, _ = heads.shape
    width = table.shape[2]
    budget = block or BLOCK.get(heads.device.type, 2**24)
    at_once = max(1, min(rows, budget // width))
    books = max(1, min(codebooks, budget // (width * at_once)))
    found = torch.empty(codebooks, rows, dtype=torch.long, device=heads.device)
    buffer = torch.empty(books * at_once * width, dtype=table.dtype, device=heads.device)
    by_codebook = heads.transpose(0, 1)
    for row in range(0, rows, at_once):
        end = min(row + at_once, rows)
        some = by_codebook[:, row:end].contiguous()
        for book in range(0, codebooks, books):
            last = min(book + books, codebooks)
            scores = buffer[: (last - book) * (end - row) * width].view(last - book, end - row, width)
            torch.bmm(some[book:last], table[book:last], out=scores)
            found[book:last, row:end] = _argmax(scores)
    return found.t()


def _argmax(scores: Tensor) -> Tensor:
    """argmax over the last axis: first the best group by a vectorised maximum, then the place within that group."""
    books, rows, width = scores.shape
    if width < GROUPED_FROM:
        return scores.argmax(-1)
    groups = width // GROUP
    grouped = scores.view(-1, GROUP)
    best = grouped.amax(-1).view(-1, groups).argmax(-1)
    row = torch.arange(len(best), device=best.device) * groups
    inside = grouped.index_select(0, best + row).argmax(-1)
    return (best * GROUP + inside).view(books, rows)
