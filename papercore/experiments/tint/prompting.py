"""Classification as prompts: templates, demonstrations in one context or each by itself, and the masks that the simulator gets.

    single   each demonstration, and the query, reads itself alone, and its positions begin at 0
    multi    the usual concatenation: later demonstrations, and the query, read what stands before them

Every token but the last, the query's label, is in the training segment, as in the paper. Loss on the `context` trains on all of
it; loss on the `label` trains on the label words of the demonstrations alone.

Glossary
    segment       a demonstration with its label and the blank line behind it, or the query
    content-free  the query without a text: what a label's probability is calibrated with
    labels        [B, T], -100 at the first token of a segment that does not read what stands before it
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FORMATS = ("single", "multi")
LOSSES = ("context", "label")
SEPARATOR = "\n\n"
Encode = Callable[[str], list[int]]


@dataclasses.dataclass(frozen=True)
class Template:
    """`{before}{text}{after}{word}`; the content-free prompt is `free`. Words begin with their space."""

    before: str
    after: str
    words: tuple[str, ...]
    free: str = ""

    @property
    def content_free(self) -> str:
        return self.free or self.after


@dataclasses.dataclass(frozen=True)
class Prompter:
    """A template in the tokens of one model.

    Fields:
        encode: text to ids, without special tokens; begin: ids in front of every context; text_tokens: longer texts are cut.
        longest: tokens that the model has positions for.
    """

    template: Template
    encode: Encode
    text_tokens: int
    longest: int
    begin: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        first = self.label_ids
        if len(set(first)) < len(first):
            raise ValueError(
                f"two of the label words {', '.join(map(repr, self.template.words))} begin with the same token {first}: "
                "only a label's first token is scored, so choose other words or a larger vocabulary."
            )

    @property
    def label_ids(self) -> list[int]:
        """The first token of each label word."""
        return [self.encode(word)[0] for word in self.template.words]

    def query(self, text: str | None) -> list[int]:
        """The prompt of a text; None for the content-free one."""
        if text is None:
            return self.encode(self.template.content_free)
        cut = self.encode(self.template.before + text)[
            : self.text_tokens + len(self.encode(self.template.before))
        ]
        return cut + self.encode(self.template.after)

    def demonstration(self, text: str, label: int) -> tuple[list[int], int, int]:
        """Tokens, and where the label word begins and ends."""
        prompt, word = self.query(text), self.encode(self.template.words[label])
        return prompt + word + self.encode(SEPARATOR), len(prompt), len(prompt) + len(word)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Contexts padded on the right; see the module's glossary. `last` [B]: the position that predicts the query's label."""

    input_ids: Tensor
    train_mask: Tensor
    gradient_mask: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    last: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def contexts(
    prompter: Prompter, shown: Sequence[tuple[str, int]], queries: Sequence[str | None], layout: str, loss: str
) -> Batch:  # fmt: skip
    """One context a query, all with the same demonstrations.

    Raises:
        ValueError: an unknown layout or loss, loss on labels without demonstrations, or more tokens than positions.
    """
    if layout not in FORMATS or loss not in LOSSES:
        raise ValueError(
            f"layout {layout!r} and loss {loss!r}: expected one of {FORMATS} and one of {LOSSES}."
        )
    if loss == "label" and not shown:
        raise ValueError("loss on label words needs demonstrations: there is none (zero-shot).")
    begin, demonstrations = list(prompter.begin), [prompter.demonstration(*one) for one in shown]
    rows = []
    for text in queries:
        ids: list[int] = [] if layout == "single" else list(begin)
        segment, positions, trained = [0] * len(ids), list(range(len(ids))), [False] * len(ids)
        apart = [True] * min(1, len(ids)) + [False] * (len(ids) - 1)
        # The last token stands for the query's label; which one it is reaches no number.
        query = [*prompter.query(text), prompter.label_ids[0]]
        for number, (tokens, start, stop) in enumerate([*demonstrations, (query, 0, 0)]):
            alone = layout == "single"
            offset = len(begin) if alone else 0
            new = begin + tokens if alone else tokens
            positions += list(range(0 if alone else len(ids), (0 if alone else len(ids)) + len(new)))
            apart += [(alone or not ids) and i == 0 for i in range(len(new))]
            segment += [number if alone else 0] * len(new)
            trained += [start <= i - offset < stop for i in range(len(new))]
            ids += new
        if len(ids) > prompter.longest:
            raise ValueError(
                f"{len(shown)} demonstrations and a query have {len(ids)} tokens, the model {prompter.longest} positions: "
                "take fewer demonstrations or cut texts shorter."
            )
        rows.append((ids, segment, positions, trained, apart))
    return _padded(rows, loss)


def _padded(rows: list[tuple[list[int], list[int], list[int], list[bool], list[bool]]], loss: str) -> Batch:
    length, batch = max(len(row[0]) for row in rows), len(rows)
    ids = torch.zeros(batch, length, dtype=torch.long)
    segment = torch.full((batch, length), -1)
    positions, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    train, gradient = (torch.zeros(batch, length, dtype=torch.bool) for _ in range(2))
    last = torch.zeros(batch, dtype=torch.long)
    for row, (tokens, segments, places, trained, apart) in enumerate(rows):
        n = len(tokens)
        ids[row, :n] = torch.tensor(tokens)
        segment[row, :n] = torch.tensor(segments)
        positions[row, :n] = torch.tensor(places)
        labels[row, :n] = torch.tensor(tokens).masked_fill(torch.tensor(apart), -100)
        train[row, : n - 1] = True
        gradient[row, :n] = torch.tensor(trained) if loss == "label" else True
        last[row] = n - 2
    readable = (segment[:, :, None] == segment[:, None, :]) & (segment >= 0)[:, :, None]
    return Batch(ids, train, gradient & train, readable, positions, labels, last)
