"""Binary rules laid out for the chart: four tables, by whether the left and the right child are words or longer spans.

Where both children are of one kind, a `PairTable` knows the products "sum over rules A -> B C of p x y" that the chart is made
of, in both directions. It holds the pairs (B, C) that occur in any rule as rows of one matrix, [pairs, I]. For a dense grammar these are all pairs, and the row of a pair is
found by reshaping. For a sparse one (a treebank's grammar uses a thousandth of all triples) only pairs with a rule are kept, and
the outer product is gathered at these: the matrix product shrinks by as much as pairs do.

Glossary
    table     p(A -> B C)       [pairs, I]
    left, right                 index of B and C in their kind of symbol, [pairs]; None when all pairs are kept in order
    x, y                        scaled vectors of a left and a right child, [..., X] and [..., Y]
    g         d log Z / d h     of the parent, [..., I]
    words_spans, spans_words    p(A -> B C) with one word among B and C, [P, I * I]: the word's pre-terminal, then the other
                                child, then A
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PairTable", "RuleTables"]

# Below this share of pairs, gathering them costs less than multiplying by their zeros.
SPARSE_BELOW = 0.4


@dataclass
class PairTable:
    """Rules whose left child is one of X symbols and whose right child is one of Y."""

    table: Tensor  # [pairs, I]
    left: Tensor | None  # [pairs]
    right: Tensor | None
    sizes: tuple[int, int]

    @classmethod
    def of(cls, block: Tensor, *, sparse: bool | None = None) -> PairTable:
        """From a block of the rule tensor, [I, X, Y]."""
        count, x, y = block.shape
        flat = block.reshape(count, x * y)
        used = (flat != 0).any(0).nonzero().squeeze(1)
        if sparse is None:
            sparse = used.numel() < SPARSE_BELOW * x * y
        if not sparse:
            return cls(flat.t().contiguous(), None, None, (x, y))
        return cls(flat[:, used].t().contiguous(), used // y, used % y, (x, y))

    def _outer(self, x: Tensor, y: Tensor) -> Tensor:
        """x_B y_C of all kept pairs, [rows, pairs]."""
        rows = x.shape[:-1].numel()
        if self.left is None or self.right is None:
            return (x.unsqueeze(-1) * y.unsqueeze(-2)).reshape(rows, -1)
        return (x.index_select(-1, self.left) * y.index_select(-1, self.right)).reshape(rows, -1)

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        """sum over B, C of p(A -> B C) x_B y_C: [..., I]."""
        return (self._outer(x, y) @ self.table).reshape(*x.shape[:-1], -1)

    def _many_outer(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """sum over splits of weight x_B y_C, of all kept pairs, [rows, pairs]; x [..., splits, X], weights [..., splits]."""
        left = (x * weights.unsqueeze(-1)).flatten(0, -3)
        outer = torch.bmm(left.transpose(1, 2), y.flatten(0, -3)).flatten(1)
        if self.left is None or self.right is None:
            return outer
        return outer.index_select(1, self.left * self.sizes[1] + self.right)

    def combine_many(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """sum over splits of `combine`, each times its weight: [..., I]."""
        return (self._many_outer(x, y, weights) @ self.table).reshape(*x.shape[:-2], -1)

    def _pair_matrix(self, g: Tensor) -> Tensor:
        """sum over A of g_A p(A -> B C) as a matrix [rows, X, Y]."""
        flat = g.reshape(-1, g.shape[-1]) @ self.table.t()
        if self.left is not None and self.right is not None:
            full = flat.new_zeros(flat.shape[0], self.sizes[0] * self.sizes[1])
            full[:, self.left * self.sizes[1] + self.right] = flat
            flat = full
        return flat.view(-1, *self.sizes)

    def split(self, g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of sum_A g_A combine(x, y)_A with respect to x and y."""
        pairs = self._pair_matrix(g)
        to_x = torch.bmm(pairs, y.reshape(-1, self.sizes[1], 1)).view(x.shape)
        to_y = torch.bmm(x.reshape(-1, 1, self.sizes[0]), pairs).view(y.shape)
        return to_x, to_y

    def split_many(self, g: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of sum_A g_A combine_many(x, y, weights)_A with respect to x and y."""
        pairs = self._pair_matrix(g)
        scaled = weights.unsqueeze(-1)
        to_x = torch.bmm((y * scaled).flatten(0, -3), pairs.transpose(1, 2)).view(x.shape)
        to_y = torch.bmm((x * scaled).flatten(0, -3), pairs).view(y.shape)
        return to_x, to_y

    def count(self, g: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Derivative of sum over rows of g_A combine(x, y)_A with respect to the table, [pairs, I]."""
        return self._outer(x, y).t() @ g.reshape(-1, g.shape[-1])

    def count_many(self, g: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """As `count`, for `combine_many`."""
        return self._many_outer(x, y, weights).t() @ g.reshape(-1, g.shape[-1])

    def block(self, values: Tensor) -> Tensor:
        """`values`, laid out like the table, as a block [I, X, Y] with zeros where there is no pair."""
        x, y = self.sizes
        if self.left is None or self.right is None:
            return values.t().reshape(-1, x, y)
        full = values.new_zeros(values.shape[1], x * y)
        full[:, self.left * y + self.right] = values.t()
        return full.view(-1, x, y)


@dataclass
class RuleTables:
    """The four tables of a grammar and its root probabilities [I]. Child symbols stand in the order [in-terminals | pre-terminals]."""

    root: Tensor
    words_words: PairTable
    words_spans: Tensor  # [P, I * I]
    spans_words: Tensor  # [P, I * I]
    spans_spans: PairTable

    @classmethod
    def of(cls, root: Tensor, rules: Tensor, *, sparse: bool | None = None) -> RuleTables:
        """From root [I] and rules [I, S, S]."""
        i = root.shape[0]
        before = rules[:, i:, :i].permute(1, 2, 0).flatten(1).contiguous()
        after = rules[:, :i, i:].permute(2, 1, 0).flatten(1).contiguous()
        words, spans = (PairTable.of(block, sparse=sparse) for block in (rules[:, i:, i:], rules[:, :i, :i]))
        return cls(root, words, before, after, spans)

    def around_words(self, words: Tensor, table: Tensor) -> Tensor:
        """What each word does to a span beside it: words [n, B, P] to matrices [n, B, I, I], child first."""
        i = self.root.shape[0]
        return (words.flatten(0, 1) @ table).view(*words.shape[:2], i, i)

    def back_to_words(self, matrices: Tensor, table: Tensor) -> Tensor:
        """The transpose of `around_words`: derivatives of the matrices to derivatives of the words."""
        return (matrices.flatten(0, 1).flatten(1) @ table.t()).view(*matrices.shape[:2], -1)

    def zero_counts(self) -> list[Tensor]:
        tables = (self.words_words.table, self.words_spans, self.spans_words, self.spans_spans.table)
        return [torch.zeros_like(table) for table in tables]

    def full_counts(self, counts: list[Tensor]) -> Tensor:
        """The four tables of counts as one tensor [I, S, S]."""
        i, p = self.root.shape[0], self.words_spans.shape[0]
        pp, ss = self.words_words.block(counts[0]), self.spans_spans.block(counts[3])
        ps = counts[1].view(p, i, i).permute(2, 0, 1)
        sp = counts[2].view(p, i, i).permute(2, 1, 0)
        return torch.cat([torch.cat([ss, sp], 2), torch.cat([ps, pp], 2)], 1)
