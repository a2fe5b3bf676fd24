"""A transformer that carries out inside-outside, built and not trained (Zhao et al., 2023, section 3 and its appendix).

Token i stands for the gap before word i; one more token ends the sentence. Its state holds, for every width w, the inside
probabilities of the spans that START at the gap and of those that END there, and likewise the outside probabilities. Consider
the span from gap i to gap e = i + w:

    alpha(A, i, e) = sum over k of  p(A -> B C) alpha(B, i, k) alpha(C, k, e)      token i: starts;  token e: ends
    beta(A, i, e)  = sum over f > e of p(B -> A C) beta(B, i, f) alpha(C, e, f)    token i: starts;  token e: starts
                   + sum over h < i of p(B -> C A) beta(B, h, e) alpha(C, h, i)    token e: ends;    token i: ends

Every term is a product of a number of token i and a number of token e. So each line is ONE bilinear form of their two states: an
attention score, query of i times key of e. That is the whole construction. Head A of the layer for width w attends from i to
i + w alone (relative position), its score is the inside probability itself, not normalised, its value is 1, and its output goes
into the slot (A, w, starts) of token i. A second head attends the other way and writes (A, w, ends) of token e.

Layers: one for each width 2 .. n upwards, then one for each width n - 1 .. 1 downwards: 2 n - 2 for a sentence of n words.

Departures from the paper, all of them ours: tokens are gaps, which puts both parts of beta into one score (the paper indexes by
words and speaks of 4 |N| heads with hard attention, |N| with relative positions, as recalled); the embedding of a gap reads the
word on either side of it, which would be one more attention layer if it had to be; the sentence's length enters with the root,
written into the outside slot of the whole sentence.

Merged heads. The inside vectors of one width lie near a subspace: k < I numbers a = U^T alpha, alpha ~ U a, carry them, and
likewise the outside vectors. With such bases the layers have k heads each way and k numbers a slot. This is the paper's "linear
merging" of 20 in-terminals into 15 heads; it trains the maps, we take leading singular vectors of a sample's charts.

Glossary
    n, L          words of a sentence, and the most that the module takes (max_length)
    |N| = I + P   symbols: in-terminals and pre-terminals
    state         [B, n + 1, dims], dims = 4 (P + I (L - 1)) + 1: inside/outside times starts/ends, widths 1 .. L, and a constant 1
    bases         U, V for inside and outside, [I, k], one for each width from 2 on; None: all I numbers are kept
    scores        [B, heads, n + 1, n + 1] of one layer, zero but at the relative position of the layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from papercore.parsing.chart import inside, outside
from papercore.parsing.grammar import PCFG
from papercore.parsing.inference import IOResult, _checked, _emitted

__all__ = ["ConstructedIO", "ConstructionSize", "IOAttention", "construction_size", "merge_bases"]

INSIDE, OUTSIDE = 0, 1
STARTS, ENDS = 0, 1
Slot = tuple[int, int, int]  # part, side, width
Bases = tuple[list[Tensor], list[Tensor]]  # of inside and outside vectors, one for each width from 2 on


@dataclass(frozen=True)
class ConstructionSize:
    """How big a construction is: numbers of a token's state, layers, attention heads of a layer."""

    dims: int
    layers: int
    heads: int


def construction_size(
    symbols: int, length: int, *, kept: tuple[int, int] | None = None, heads: int | None = None
) -> ConstructionSize:
    """The paper's closed forms.

    Args:
        symbols: |N|, all symbols of the grammar.
        length: L.
        kept: None: the exact construction, 2 |N| L numbers, 2 L layers, |N| heads (soft relative attention). Else the restricted
            one with (in-terminals, pre-terminals) kept: 2 I L numbers and 275 more for the pre-terminals and the rest, as recalled
            for 20 and 45; other pre-terminal counts scale the 275.
        heads: of the restricted construction after merging in-terminals; default: one for each kept in-terminal.

    >>> construction_size(1600, 25)
    ConstructionSize(dims=80000, layers=50, heads=1600)
    >>> construction_size(1600, 25, kept=(20, 45), heads=15)
    ConstructionSize(dims=1275, layers=50, heads=15)
    """
    for name, value in (("symbols", symbols), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} = {value}: expected at least 1.")
    if kept is None:
        return ConstructionSize(2 * symbols * length, 2 * length, symbols)
    inner, outer = kept
    if inner < 1 or outer < 1 or inner + outer > symbols:
        raise ValueError(f"kept = {kept}: expected at least one of each kind and at most {symbols} in all.")
    return ConstructionSize(2 * inner * length + round(275 * outer / 45), 2 * length, heads or inner)


class IOAttention(nn.Module):
    """One layer: the heads that make inside (or outside) probabilities of one width.

    Args:
        rules: [I, S, S].
        width: w, the relative position between the two gaps.
        part: INSIDE or OUTSIDE.
        max_length: L.
        bases: for merged heads, as in the head of this file.

    `forward(state)` returns (new state, scores [B, heads, n + 1, n + 1]). The weights have so much structure (the rules, once for
    every pair of widths) that `forward` multiplies by the rules in place of matrices full of zeros; `dense_weights` writes the
    matrices out, and a plain attention layer with them does the same.
    """

    rules: Tensor

    def __init__(
        self, rules: Tensor, width: int, part: int, max_length: int, bases: Bases | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("rules", rules)
        self.width, self.part, self.max_length, self.bases = width, part, max_length, bases
        self.offset = width
        self.inner, self.outer = rules.shape[0], rules.shape[1] - rules.shape[0]
        self.kept = self.inner if bases is None else bases[0][0].shape[1]
        self.heads_each_way = self.outer if width == 1 else self.kept

    @property
    def heads(self) -> int:
        """Attention heads: one a symbol and direction."""
        return 2 * self.heads_each_way

    def slot(self, part: int, side: int, width: int) -> slice:
        """Where the numbers of one width stand in a token's state."""
        per_side = self.outer + self.kept * (self.max_length - 1)
        begin = (2 * part + side) * per_side
        if width == 1:
            return slice(begin, begin + self.outer)
        begin += self.outer + self.kept * (width - 2)
        return slice(begin, begin + self.kept)

    def basis(self, part: int, width: int) -> Tensor | None:
        """[I, k] of a slot; None where all symbols are kept."""
        return None if self.bases is None or width == 1 else self.bases[part][width - 2]

    def _symbols(self, width: int) -> slice:
        """The symbols that spans of a width can have, as a slice of the rules' axes."""
        return slice(self.inner, None) if width == 1 else slice(0, self.inner)

    def _terms(self, most: int) -> list[tuple[Slot, Slot, Tensor]]:
        """The bilinear form: the slot of the earlier gap's numbers x, that of the later gap's y, and t [heads, x, y] of
        score = sum over terms of t x y; parents of up to `most` words."""
        terms: list[tuple[Slot, Slot, Tensor]] = []
        w, own = self.width, self._symbols(self.width)
        if self.part == INSIDE:
            for k in range(1, w):
                block = self.rules[:, self._symbols(k), self._symbols(w - k)]
                terms.append(((INSIDE, STARTS, k), (INSIDE, ENDS, w - k), block))
        else:
            for r in range(1, most - w + 1):
                # As the left child: the parent starts at the earlier gap and is r wider; the sibling starts at the later gap.
                block = self.rules[:, own, self._symbols(r)].permute(1, 0, 2)
                terms.append(((OUTSIDE, STARTS, w + r), (INSIDE, STARTS, r), block))
                # As the right child: the sibling ends at the earlier gap, the parent at the later one.
                block = self.rules[:, self._symbols(r), own].permute(2, 1, 0)
                terms.append(((INSIDE, ENDS, r), (OUTSIDE, ENDS, w + r), block))
        return terms if self.bases is None else [self._merged(*term) for term in terms]

    def _merged(self, x: Slot, y: Slot, block: Tensor) -> tuple[Slot, Slot, Tensor]:
        """A term between slots that hold k numbers in place of I."""
        for axis, basis in enumerate(
            (self.basis(self.part, self.width), self.basis(x[0], x[2]), self.basis(y[0], y[2]))
        ):
            if basis is not None:
                block = torch.tensordot(block, basis, ([axis], [0])).movedim(-1, axis)
        return x, y, block

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = state.shape[1]
        # Query of the earlier gap: its numbers. Key of the later gap: the rules applied to its numbers.
        scores = state.new_zeros(state.shape[0], self.heads_each_way, tokens, tokens)
        for x, y, block in self._terms(tokens - 1):
            query = state[..., self.slot(*x)]
            key = torch.einsum("bjc,axc->bajx", state[..., self.slot(*y)], block)
            scores += query.unsqueeze(1) @ key.transpose(-1, -2)
        at = torch.arange(tokens, device=state.device)
        forward = (at.unsqueeze(1) + self.offset == at).to(state.dtype)
        scores = torch.cat([scores * forward, (scores * forward).transpose(-1, -2)], 1)
        # The value of every token is its constant 1; each head writes into a slot of its own.
        written = (scores @ state[:, None, :, -1:]).squeeze(-1).transpose(1, 2)
        state = state.clone()
        half = self.heads_each_way
        state[..., self.slot(self.part, STARTS, self.width)] += written[..., :half]
        state[..., self.slot(self.part, ENDS, self.width)] += written[..., half:]
        return state, scores

    @torch.no_grad()
    def dense_weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_Q, W_K [heads, dims, d_head], W_V [heads, dims, 1], W_O [heads, 1, dims] of the same layer as a plain attention layer."""
        per_side = self.outer + self.kept * (self.max_length - 1)
        dims, half = 4 * per_side + 1, self.heads_each_way
        terms = self._terms(self.max_length)
        d_head = sum(block.shape[1] for _, _, block in terms)
        early, late = (self.rules.new_zeros(half, dims, d_head) for _ in range(2))
        column = 0
        for x, y, block in terms:
            size = block.shape[1]
            columns = slice(column, column + size)
            early[:, self.slot(*x), columns] = torch.eye(size, dtype=early.dtype, device=early.device)
            late[:, self.slot(*y), columns] = block.transpose(1, 2)
            column += size
        value = self.rules.new_zeros(2 * half, dims, 1)
        value[:, -1] = 1.0
        output = self.rules.new_zeros(2 * half, 1, dims)
        for side in (STARTS, ENDS):
            slot = self.slot(self.part, side, self.width)
            output[side * half : (side + 1) * half, 0, slot] = torch.eye(
                half, dtype=output.dtype, device=output.device
            )
        # Heads of the second half attend from the later gap to the earlier one: query and key change places.
        return torch.cat([early, late]), torch.cat([late, early]), value, output


class ConstructedIO(nn.Module):
    """The transformer: an embedding, 2 L - 2 attention layers of which a sentence of n words uses 2 n - 2, and a read-out.

    Args:
        grammar: any PCFG, a truncated one too. Computes in its dtype; probabilities are not scaled, so use float64 for long sentences.
        max_length: L, the most words of a sentence, at least 2.
        bases: from `merge_bases`, for a smaller, approximate module.

    `forward(input_ids, lengths=None)` returns an IOResult as `inside_outside` does, with `.attentions`: the scores of every layer
    that was used, [B, heads, n + 1, n + 1] each.

    Raises:
        ValueError: max_length < 2; a sentence longer than max_length.
    """

    words: Tensor
    root: Tensor

    def __init__(self, grammar: PCFG, max_length: int, *, bases: Bases | None = None) -> None:
        super().__init__()
        if max_length < 2:
            raise ValueError(f"max_length = {max_length}: expected at least 2 words.")
        if bases is not None and any(len(part) < max_length - 1 for part in bases):
            raise ValueError(
                f"bases for widths up to {min(map(len, bases)) + 1}, expected up to max_length = {max_length}."
            )
        self.grammar, self.max_length = grammar, max_length
        self.register_buffer("words", grammar.emissions.t().contiguous())
        self.register_buffer("root", grammar.root)
        rules = grammar.rules
        self.upward = nn.ModuleList(
            IOAttention(rules, w, INSIDE, max_length, bases) for w in range(2, max_length + 1)
        )
        self.downward = nn.ModuleList(
            IOAttention(rules, w, OUTSIDE, max_length, bases) for w in range(max_length - 1, 0, -1)
        )

    @property
    def size(self) -> ConstructionSize:
        """Numbers of a token's state, layers for the longest sentence, heads of the widest layer."""
        kept, outer = self._slots.kept, len(self.grammar.preterminals)
        dims = 4 * (outer + kept * (self.max_length - 1)) + 1
        return ConstructionSize(dims, 2 * self.max_length - 2, 2 * max(kept, outer))

    @property
    def _slots(self) -> IOAttention:
        """Any layer: all know where everything stands."""
        return self.upward[0]  # type: ignore[return-value]

    def layers(self, n: int) -> list[IOAttention]:
        """The layers that sentences of at most n words use, in order: 2 n - 2."""
        up, down = list(self.upward)[: n - 1], list(self.downward)[self.max_length - n :]
        return [*up, *down]  # type: ignore[list-item]

    def embed(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """The state before the first layer: emissions of the word behind a gap (starts) and before it (ends), the root, and 1."""
        batch, n = ids.shape
        layer = self._slots
        state = self.words.new_zeros(batch, n + 1, self.size.dims)
        inside_sentence = torch.arange(n, device=ids.device) < lengths.unsqueeze(1)
        emitted = self.words[ids] * inside_sentence.unsqueeze(-1)
        state[:, :-1, layer.slot(INSIDE, STARTS, 1)] = emitted
        state[:, 1:, layer.slot(INSIDE, ENDS, 1)] = emitted
        for row, length in enumerate(lengths.tolist()):
            basis = layer.basis(OUTSIDE, length)
            root = self.root if basis is None else self.root @ basis
            state[row, 0, layer.slot(OUTSIDE, STARTS, length)] = root
            state[row, length, layer.slot(OUTSIDE, ENDS, length)] = root
        state[..., -1] = 1.0
        return state

    def forward(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> ConstructedResult:
        ids, size = _checked(self.grammar, input_ids, lengths, None)
        ids, size = ids.to(self.words.device), size.to(self.words.device)
        n = int(size.max())
        if n > self.max_length:
            raise ValueError(
                f"a sentence has {n} words, this construction takes {self.max_length}: make ConstructedIO(grammar, {n})."
            )
        state, attentions = self.embed(ids[:, :n], size), []
        for layer in self.layers(n):
            state, scores = layer(state)
            attentions.append(scores)
        return self._read(state, ids, size, attentions)

    def _read(
        self, state: Tensor, ids: Tensor, lengths: Tensor, attentions: list[Tensor]
    ) -> ConstructedResult:
        (batch, width), layer, n = ids.shape, self._slots, state.shape[1] - 1

        def numbers(part: int, w: int) -> Tensor:
            """alpha or beta of the spans of w words, [B, n + 1 - w, symbols]; merged ones are spread out again, never below 0."""
            found, basis = state[:, : n + 1 - w, layer.slot(part, STARTS, w)], layer.basis(part, w)
            return found if basis is None else (found @ basis.t()).clamp_min(0)

        z = torch.stack(
            [numbers(INSIDE, length)[row, 0] @ self.root for row, length in enumerate(lengths.tolist())]
        )
        over_z = torch.where(z > 0, 1.0 / torch.where(z > 0, z, 1.0), 0.0).view(-1, 1, 1)
        spans = state.new_zeros(batch, width, width, layer.inner)
        terms = state.new_zeros(batch, width, layer.outer)
        terms[:, :n] = numbers(INSIDE, 1) * numbers(OUTSIDE, 1) * over_z
        for w in range(2, n + 1):
            spans[:, : n + 1 - w, w - 1] = numbers(INSIDE, w) * numbers(OUTSIDE, w) * over_z
        return ConstructedResult(
            log_z=z.log(), span_marginals=spans, term_marginals=terms, lengths=lengths, input_ids=ids,
            grammar=self.grammar, attentions=attentions,
        )  # fmt: skip


@dataclass
class ConstructedResult(IOResult):
    """An IOResult with the attention scores of the layers that made it."""

    attentions: list[Tensor] | None = None


def merge_bases(
    grammar: PCFG, input_ids: Tensor, rank: int, *, lengths: Tensor | Sequence[int] | None = None
) -> Bases:
    """Subspaces of k dimensions that the inside and outside vectors of a sample of sentences lie near, for each width.

    Args:
        grammar, input_ids, lengths: the sample; widths up to its longest sentence get a basis.
        rank: k, from 1 to I.

    Every span counts by the root of its probability to be a constituent, each vector scaled to length 1.

    Returns:
        (inside, outside): lists over widths 2, 3, ... of orthonormal [I, k].

    Raises:
        ValueError: rank out of range; as `inside_outside`.
    """
    count = len(grammar.nonterminals)
    if not 1 <= rank <= count:
        raise ValueError(f"rank = {rank}: expected 1 to {count}, the number of in-terminals.")
    ids, size = _checked(grammar, input_ids, lengths, None)
    tables = grammar.tables()
    chart = inside(tables, _emitted(grammar, ids, None), size)
    down = outside(chart, tables)
    out: Bases = ([], [])
    for w in range(2, int(size.max()) + 1):
        spans = ids.shape[1] + 1 - w
        h, mu = chart.left[:spans, :, w], down.span[:, :spans, w - 1].transpose(0, 1)
        g = torch.where(h > 0, mu / torch.where(h > 0, h, 1.0), 0.0)
        weight = mu.sum(-1, keepdim=True).clamp_min(0).sqrt()
        for part, vectors in zip(out, (h, g), strict=True):
            scaled = torch.nn.functional.normalize(vectors, dim=-1) * weight
            # Directions in order of what they explain; eigh goes upwards.
            directions = torch.linalg.eigh(scaled.flatten(0, 1).t() @ scaled.flatten(0, 1)).eigenvectors
            part.append(directions.flip(1)[:, :rank].contiguous())
    return out
