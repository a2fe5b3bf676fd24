"""A small language whose documents carry latent attributes, and the tasks that ask for them.

A document has a domain (A or B), a sentiment (2 values), a topic (4) and a style (2). Its 22 words are drawn from short lists of
words, one list for each attribute, value and domain; then come two template tokens, a label word and [SEP]:

    [CLS] w1 ... w22 T1 T2 LABEL [SEP]

Pre-training teaches the attributes: each has a template and label words of its own there. The tasks ask for the same attributes with
*other* templates and *other* label words, so that fine-tuning need not learn a skill anew; it has to route one.

Glossary
    attribute   sentiment, topic or style; its values are whole numbers from 0
    purity      probability that a word of an attribute shows the document's own value
    at          index of the label position, the same in every sequence (25)
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

ATTRIBUTES: dict[str, int] = {"sentiment": 2, "topic": 4, "style": 2}
SHARES = {"noise": 0.20, "sentiment": 0.25, "topic": 0.33, "style": 0.22}  # of a document's words
WORDS = 22
LIST = 6  # words of one attribute, value and domain
NOISE = 12  # words that say nothing
CLS, SEP, MASK = 0, 1, 2
TEMPLATE = {name: 3 + i for i, name in enumerate(("Q", "IT", "WAS", "ABOUT", "STY"))}
_FIRST_LABEL = 3 + len(TEMPLATE)
LABEL: dict[str, tuple[int, ...]] = {
    "sentiment": (_FIRST_LABEL, _FIRST_LABEL + 1),
    "topic": tuple(range(_FIRST_LABEL + 2, _FIRST_LABEL + 6)),
    "style": (_FIRST_LABEL + 6, _FIRST_LABEL + 7),
}
_FIRST_WORD = _FIRST_LABEL + 8
_STARTS = {"noise": _FIRST_WORD}
_STARTS["sentiment"] = _STARTS["noise"] + NOISE
_STARTS["topic"] = _STARTS["sentiment"] + 2 * 2 * LIST
_STARTS["style"] = _STARTS["topic"] + 2 * 4 * LIST
VOCABULARY = _STARTS["style"] + 2 * 2 * LIST
LENGTH = WORDS + 5
AT = WORDS + 3

PRETRAINING = {"sentiment": ("IT", "WAS"), "topic": ("IT", "ABOUT"), "style": ("IT", "STY")}
LABEL_NOISE = 0.25  # of pre-training: a random value instead of the true one
LABEL_BIAS = 0.30  # of pre-training: value 0, whatever the document says


@dataclasses.dataclass(frozen=True)
class Documents:
    """Words [n, 22], domain [n] (0 is A) and the value of each attribute [n]."""

    words: Tensor
    domain: Tensor
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.words)

    def take(self, index: Tensor) -> Documents:
        return Documents(self.words[index], self.domain[index], {k: v[index] for k, v in self.values.items()})


@dataclasses.dataclass(frozen=True)
class Task:
    """One way to ask for an attribute: a template, and the label word of each value."""

    name: str
    attribute: str
    template: tuple[str, str]
    labels: tuple[int, ...]

    @property
    def classes(self) -> int:
        return len(self.labels)

    def batch(self, documents: Documents, targets: Tensor | None = None) -> Batch:
        """Sequences with the label masked, and the targets: the attribute's values, or those that are given."""
        ids = sequences(documents.words, torch.tensor([TEMPLATE[t] for t in self.template]))
        y = documents.values[self.attribute] if targets is None else targets
        return Batch(ids, y, torch.tensor(self.labels))


@dataclasses.dataclass(frozen=True)
class Batch:
    """ids [n, 27], targets [n] (values), labels: the label words that logits are cut to, [classes] or [n, classes]."""

    ids: Tensor
    targets: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, index: Tensor) -> Batch:
        labels = self.labels if self.labels.ndim == 1 else self.labels[index]
        return Batch(self.ids[index], self.targets[index], labels)


def _swapped(labels: tuple[int, ...]) -> tuple[int, ...]:
    return labels[1:] + labels[:1]


# Label words that pre-training has told apart, but never tied to these attributes (sentiment, style), or tied to other
# values of the same attribute (topic: every answer has to move).
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sentiment", "sentiment", ("Q", "IT"), LABEL["style"]),
        Task("style", "style", ("Q", "WAS"), _swapped(LABEL["sentiment"])),
        Task("topic", "topic", ("ABOUT", "ABOUT"), _swapped(LABEL["topic"])),
    )
}


def sequences(words: Tensor, template: Tensor) -> Tensor:
    """[n, 27] ids with [MASK] at the label position; template: [2] or [n, 2]."""
    n = len(words)
    ids = torch.empty(n, LENGTH, dtype=torch.long)
    ids[:, 0], ids[:, AT], ids[:, AT + 1] = CLS, MASK, SEP
    ids[:, 1 : WORDS + 1] = words
    ids[:, WORDS + 1 : WORDS + 3] = template
    return ids


def documents(
    n: int,
    seed: int,
    *,
    domain: str = "both",
    purity: float = 0.9,
    spurious: float = 0.5,
) -> Documents:
    """n documents.

    Args:
        domain: "A", "B" or "both" (half and half).
        purity: probability that a word of an attribute shows the document's value (else a random value).
        spurious: probability that the style equals the sentiment; 0.5 makes them independent.

    Raises:
        ValueError: an unknown domain.
    """
    if domain not in ("A", "B", "both"):
        raise ValueError(f"domain is {domain!r}: expected A, B or both.")
    rng = np.random.default_rng([seed, 17])
    d = rng.integers(2, size=n) if domain == "both" else np.full(n, int(domain == "B"))
    values = {name: rng.integers(k, size=n) for name, k in ATTRIBUTES.items()}
    if spurious != 0.5:
        equal = rng.random(n) < spurious
        values["style"] = np.where(equal, values["sentiment"], 1 - values["sentiment"])
    kinds = list(SHARES)
    kind = rng.choice(len(kinds), size=(n, WORDS), p=[SHARES[k] for k in kinds])
    own_domain = rng.random((n, WORDS)) < 0.85
    word_domain = np.where(own_domain, d[:, None], 1 - d[:, None])
    words = _STARTS["noise"] + rng.integers(NOISE, size=(n, WORDS))
    for i, name in enumerate(kinds):
        if name == "noise":
            continue
        k = ATTRIBUTES[name]
        shown = np.where(
            rng.random((n, WORDS)) < purity, values[name][:, None], rng.integers(k, size=(n, WORDS))
        )
        place = rng.integers(LIST, size=(n, WORDS))
        word = _STARTS[name] + (word_domain * k + shown) * LIST + place
        words = np.where(kind == i, word, words)
    return Documents(
        torch.from_numpy(words), torch.from_numpy(d), {k: torch.from_numpy(v) for k, v in values.items()}
    )


def few_shot(task: Task, per_class: int, seed: int, *, domain: str = "A") -> Documents:
    """`per_class` documents of each value of the task's attribute, shuffled."""
    pool = documents(40 * per_class * task.classes, seed, domain=domain)
    value = pool.values[task.attribute]
    index = torch.cat([(value == v).nonzero().flatten()[:per_class] for v in range(task.classes)])
    g = torch.Generator().manual_seed(seed)
    return pool.take(index[torch.randperm(len(index), generator=g)])


def joined(parts: list[Batch]) -> Batch:
    """Batches of several tasks as one; label words are padded to four by repeating -1, which the loss leaves out."""
    widest = max(part.labels.shape[-1] for part in parts)
    labels = torch.cat(
        [
            torch.nn.functional.pad(part.labels, (0, widest - part.labels.shape[-1]), value=-1).expand(
                len(part), -1
            )
            for part in parts
        ]
    )
    return Batch(torch.cat([p.ids for p in parts]), torch.cat([p.targets for p in parts]), labels)


def pretraining_batch(n: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """ids [n, 27] with 15 % of the words masked, and the label word too in half of the rows; targets with -100 elsewhere."""
    docs = documents(n, int(rng.integers(2**31)))
    names = list(PRETRAINING)
    which = rng.integers(len(names), size=n)
    template = torch.tensor([[TEMPLATE[t] for t in PRETRAINING[name]] for name in names])[which]
    ids = sequences(docs.words, template)
    label = torch.empty(n, dtype=torch.long)
    for i, name in enumerate(names):
        k = ATTRIBUTES[name]
        value = docs.values[name].numpy()
        value = np.where(rng.random(n) < LABEL_NOISE, rng.integers(k, size=n), value)
        value = np.where(rng.random(n) < LABEL_BIAS, 0, value)
        rows = torch.from_numpy(which == i)
        label[rows] = torch.tensor(LABEL[name])[torch.from_numpy(value)[rows]]
    ids[:, AT] = label
    masked = torch.zeros_like(ids, dtype=torch.bool)
    masked[:, 1 : WORDS + 1] = torch.from_numpy(rng.random((n, WORDS)) < 0.15)
    masked[:, AT] = torch.from_numpy(rng.random(n) < 0.5)
    targets = torch.where(masked, ids, -100)
    return ids.masked_fill(masked, MASK), targets
