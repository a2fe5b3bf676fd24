"""Inside-outside for a batch of sentences: probability, marginals, expected rules, and the posterior of masked words.

The masked posterior is what a masked language model of a PCFG's language should predict. Let M be the masked positions. Give
every masked word the emission sum_w p(A -> w) in place of p(A -> w_i); then one inside-outside pass yields, at every masked
position at once, with the other masked words summed out,

    p(w_i = w | the words that are not masked, n) = sum over A of beta(A, i, 1) p(A -> w) / Z

No predictor can have a lower cross-entropy on such text (Zhao et al., 2023, section 3.2).

Glossary
    input_ids       word ids, right-padded              [B, n]
    lengths         words of each sentence              [B]
    log_z           log of the sentence's probability   [B], nats; -inf where the grammar cannot make the sentence
    span_marginals  mu(A, i, w), A in-terminal          [B, n, n, I] by start i and width - 1; zero at width 1
    term_marginals  mu(A, i, 1), A pre-terminal         [B, n, P]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from papercore.parsing.chart import Chart, inside, outside
from papercore.parsing.grammar import PCFG
from papercore.parsing.rules import RuleTables

__all__ = ["IOResult", "ImpossibleSentence", "inside_outside", "log_partition", "masked_posterior"]


class ImpossibleSentence(ValueError):
    """The grammar gives a sentence the probability 0."""


@dataclass
class IOResult:
    """What `inside_outside` found; shapes in the head of this file."""

    log_z: Tensor
    span_marginals: Tensor
    term_marginals: Tensor
    lengths: Tensor
    input_ids: Tensor
    grammar: PCFG
    expected_rules: Tensor | None = None  # [I, S, S], expected uses of each rule, summed over the batch
    chart: Chart | None = None

    @property
    def possible(self) -> Tensor:
        """BoolTensor [B]: whether the grammar can make the sentence. Where it cannot, log_z is -inf and all marginals are 0."""
        return self.log_z > -torch.inf

    def require_possible(self) -> None:
        """Raise ImpossibleSentence naming the first sentence of probability 0."""
        wrong = (~self.possible).nonzero().flatten().tolist()
        if wrong:
            words = " ".join(self.words(wrong[0]))
            raise ImpossibleSentence(
                f"the grammar cannot make sentence {wrong[0]}, {words!r} (log Z = -inf). If it should, the probabilities may be too "
                "small for float32: try grammar.double()."
            )

    def words(self, row: int) -> list[str]:
        """The words of one sentence."""
        return self.grammar.decode(self.input_ids[row, : int(self.lengths[row])])


def inside_outside(
    grammar: PCFG,
    input_ids: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    mask_token_id: int | None = None,
    expected_rules: bool = False,
) -> IOResult:
    """Probability and marginals of every constituent, for a batch of sentences of any lengths.

    Args:
        grammar: computes in its dtype, on its device.
        input_ids: LongTensor [B, n] of word ids, or [n] for one sentence. What stands behind a sentence's length is ignored.
        lengths: words of each sentence, from 2 to n; default: every row is full.
        mask_token_id: an id that stands for "any word"; not a word of the vocabulary.
        expected_rules: also return how often each rule is used, in expectation.

    Returns:
        IOResult. Time is O(B n^3 I^2 + B n^2 I^3), memory O(B n^2 I).

    Raises:
        ValueError: a shape, a length or an id is out of range; a sentence of one word (which no rule can make).
        TypeError: ids are not whole numbers.

    >>> from papercore.parsing import PCFG, inside_outside
    >>> grammar = PCFG.from_string("S -> S S [0.3] | A A [0.7]\\nA -> 'a' [1.0]")
    >>> result = inside_outside(grammar, grammar.encode("a a a a"))
    >>> round(float(result.log_z.exp()), 4), round(float(result.span_marginals[0, 0, 1, 0]), 4)
    (0.147, 1.0)
    """
    ids, size = _checked(grammar, input_ids, lengths, mask_token_id)
    emitted = _emitted(grammar, ids, mask_token_id)
    tables = grammar.tables()
    chart = inside(tables, emitted, size)
    down = outside(chart, tables, with_rules=expected_rules)
    return IOResult(
        log_z=chart.log_z,
        span_marginals=down.span,
        term_marginals=down.term,
        lengths=size,
        input_ids=ids,
        grammar=grammar,
        expected_rules=None if down.rules is None else down.rules * grammar.rules,
        chart=chart,
    )


def masked_posterior(
    grammar: PCFG,
    input_ids: Tensor,
    mask_token_id: int,
    *,
    lengths: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """The probability of every word at every position, given all words that are not masked, and the length.

    Args:
        grammar, input_ids, lengths: as for `inside_outside`.
        mask_token_id: the id of masked positions, not a word of the vocabulary: for example len(grammar.vocabulary).

    Returns:
        [B, n, V]. At masked positions the posterior, each with the other masked words summed out; at words that are given, 1 at
        that word; behind the end of a sentence, and where the given words are impossible, 0.

    Raises:
        ValueError, TypeError: as `inside_outside`.
    """
    ids, size = _checked(grammar, input_ids, lengths, mask_token_id)
    tables = grammar.tables()
    chart = inside(tables, _emitted(grammar, ids, mask_token_id), size)
    down = outside(chart, tables)
    # d log Z / d e counts in units of the largest emission of the position, by which e was divided.
    largest = chart.word_scale.transpose(0, 1).exp().unsqueeze(-1)
    per_emission = torch.where(largest > 0, down.words / torch.where(largest > 0, largest, 1.0), 0.0)
    posterior = per_emission @ grammar.emissions
    masked = (ids == mask_token_id).unsqueeze(-1)
    known = torch.zeros_like(posterior).scatter_(2, torch.where(masked, 0, ids.unsqueeze(-1)), 1.0)
    known *= (chart.log_z > -torch.inf).to(known.dtype).view(-1, 1, 1)
    inside_sentence = torch.arange(ids.shape[1], device=ids.device) < size.unsqueeze(1)
    return torch.where(masked, posterior, known) * inside_sentence.unsqueeze(-1)


class _LogPartition(torch.autograd.Function):
    """log Z with the outside pass as its derivative."""

    @staticmethod
    def forward(
        ctx: Any, root: Tensor, rules: Tensor, emissions: Tensor, ids: Tensor, lengths: Tensor
    ) -> Tensor:
        # Pairs without a rule are kept: their derivative need not be 0.
        tables = RuleTables.of(root, rules, sparse=False)
        emitted = emissions.t()[ids]
        chart = inside(tables, emitted, lengths)
        ctx.tables, ctx.chart, ctx.shape = tables, chart, emissions.shape
        ctx.save_for_backward(ids)
        return chart.log_z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        (ids,) = ctx.saved_tensors
        chart: Chart = ctx.chart
        down = outside(chart, ctx.tables, with_rules=True, weight=grad)
        to_root = (down.root * grad.unsqueeze(-1)).sum(0)
        largest = chart.word_scale.transpose(0, 1).exp().unsqueeze(-1)
        words = torch.where(largest > 0, down.words / torch.where(largest > 0, largest, 1.0), 0.0)
        words = words * grad.view(-1, 1, 1)
        to_emissions = words.new_zeros(ctx.shape[1], ctx.shape[0])
        to_emissions.index_add_(0, ids.flatten(), words.flatten(0, 1))
        return to_root, down.rules, to_emissions.t(), None, None


def log_partition(
    root: Tensor,
    rules: Tensor,
    emissions: Tensor,
    input_ids: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """log Z [B] in nats, differentiable in the three tensors of a grammar, which need not be normalised: for training one.

    Args:
        root, rules, emissions: [I], [I, S, S], [P, V], not negative.
        input_ids, lengths: as for `inside_outside`.

    The derivative costs one outside pass and keeps no tape. It is for first derivatives only.

    Raises:
        ValueError, TypeError: as `inside_outside`, and for tensors whose shapes do not fit each other.
    """
    count, symbols = rules.shape[0], rules.shape[-1]
    expected = {
        "root": (count,),
        "rules": (count, symbols, symbols),
        "emissions": (symbols - count, emissions.shape[-1]),
    }
    for name, tensor in (("root", root), ("rules", rules), ("emissions", emissions)):
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {expected[name]}.")
    ids, size = _checked_ids(input_ids, lengths, emissions.shape[1], None, rules.device)
    return _LogPartition.apply(root, rules, emissions, ids, size)


def _emitted(grammar: PCFG, ids: Tensor, mask_token_id: int | None) -> Tensor:
    """p(A -> w_i), [B, n, P]; for a masked word the sum over all words."""
    rows = grammar.emissions.t()
    if mask_token_id is None:
        return rows[ids]
    masked = ids == mask_token_id
    emitted = rows[torch.where(masked, 0, ids)]
    emitted[masked] = grammar.emissions.sum(1)
    return emitted


def _checked(
    grammar: PCFG, input_ids: Tensor, lengths: Tensor | Sequence[int] | None, mask_token_id: int | None
) -> tuple[Tensor, Tensor]:
    if not isinstance(grammar, PCFG):
        raise TypeError(
            f"grammar must be a PCFG, got {type(grammar).__name__}: PCFG.from_string reads NLTK's notation."
        )
    words = len(grammar.vocabulary)
    if mask_token_id is not None and 0 <= mask_token_id < words:
        raise ValueError(
            f"mask_token_id = {mask_token_id} is the word {grammar.vocabulary[mask_token_id]!r}: expected an id that is no word, such as {words}."
        )
    return _checked_ids(input_ids, lengths, words, mask_token_id, grammar.device)


def _checked_ids(
    input_ids: Tensor,
    lengths: Tensor | Sequence[int] | None,
    words: int,
    mask_token_id: int | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """ids [B, n] with 0 behind the ends, and lengths [B], both on `device`."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be a LongTensor of word ids, got {kind}.")
    ids = input_ids.to(device=device, dtype=torch.long)
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.numel() == 0:
        raise ValueError(
            f"input_ids has the shape {tuple(input_ids.shape)}, expected [B, n] with at least one sentence."
        )
    rows, n = ids.shape
    size = torch.full((rows,), n) if lengths is None else torch.as_tensor(lengths)
    if size.is_floating_point() or size.shape != (rows,):
        raise ValueError(
            f"lengths must be {rows} whole numbers, one a sentence, got {tuple(size.shape)} {size.dtype}."
        )
    size = size.to(device=device, dtype=torch.long)
    least, most = int(size.min()), int(size.max())
    if least < 2 or most > n:
        at = int((size < 2).nonzero()[0]) if least < 2 else int((size > n).nonzero()[0])
        raise ValueError(
            f"sentence {at} has the length {int(size[at])}: expected 2 to {n}. (Every in-terminal has two children, so a grammar of this "
            "kind makes no sentence of fewer than two words.)"
        )
    inside_sentence = torch.arange(n, device=device) < size.unsqueeze(1)
    ids = torch.where(inside_sentence, ids, 0)
    wrong = (ids < 0) | (ids >= words)
    if mask_token_id is not None:
        wrong &= ids != mask_token_id
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        hint = "" if mask_token_id is not None else " (a mask needs mask_token_id)"
        raise ValueError(
            f"input_ids[{row}, {column}] = {int(ids[row, column])}: expected a word id from 0 to {words - 1}{hint}."
        )
    return ids, size
