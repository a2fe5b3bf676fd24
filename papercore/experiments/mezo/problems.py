"""A task in the form that training and evaluation want: encoded once, with a loss over training examples and a score on a split.

`MaskedProblem` serves RoBERTa, `CausalProblem` OPT. Both answer the same calls, so that the methods of the table know no family:

    problem.train_examples                      number of training examples
    problem.loss(model, mine, joint)            mean loss of some training examples, with its graph
    problem.evaluate(model, split, processes)   {"accuracy": ...} or {"f1": ..., "exact_match": ...}, in percent
    problem.features(model, split, processes)   what a linear probe sees, and the labels

Glossary
    split   "train", "validation" or "test"
    mine    indices of the training examples of this process; joint: those of all processes together
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from papercore.experiments.mezo import scoring
from papercore.experiments.mezo.processes import Processes
from papercore.experiments.mezo.prompts import CausalPrompt, MaskedPrompt, Question, label_of
from papercore.experiments.mezo.tasks import Sample, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "validation", "test")

T = TypeVar("T")


class Problem(Protocol):
    """What both families offer."""

    metric: str
    has_labels: bool

    @property
    def train_examples(self) -> int: ...

    def loss(self, model: nn.Module, mine: Sequence[int], joint: Sequence[int] | None = None) -> Tensor: ...

    def evaluate(self, model: nn.Module, split: str, processes: Processes) -> dict[str, float]: ...

    def features(
        self, model: nn.Module, split: str, processes: Processes
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...


class MaskedProblem:
    """Label words at a mask.

    Args:
        batch: sequences in a forward pass without gradients.

    Raises:
        ValueError: a label word that is not one token, a label outside the words, a prompt that does not fit.
    """

    metric = "accuracy"
    has_labels = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        prompt: MaskedPrompt,
        sample: Sample,
        *,
        batch: int = 16,
    ) -> None:
        self.batch, self.pad = batch, scoring.padding_id(tokenizer)
        self.words = scoring.word_ids(tokenizer, prompt.words)
        rows = {"train": sample.train, "validation": sample.validation, "test": sample.test}
        self.rows = {
            split: [scoring.encode_masked(tokenizer, prompt, row) for row in rows[split]] for split in SPLITS
        }
        self.labels = {
            split: [label_of(row, task.label, prompt.words) for row in rows[split]] for split in SPLITS
        }

    @property
    def train_examples(self) -> int:
        return len(self.labels["train"])

    def loss(self, model: nn.Module, mine: Sequence[int], joint: Sequence[int] | None = None) -> Tensor:
        """Cross-entropy over the label words' logits, mean over `mine` (equal shares make `joint` superfluous here)."""
        logits = [
            scoring.mask_logits(model, [self.rows["train"][i] for i in part], self.words, self.pad)
            for part in _parts(mine, self.batch)
        ]
        targets = torch.tensor([self.labels["train"][i] for i in mine], device=logits[0].device)
        return functional.cross_entropy(torch.cat(logits), targets)

    def evaluate(self, model: nn.Module, split: str, processes: Processes) -> dict[str, float]:
        """Accuracy in percent."""
        rows, labels = self.rows[split], self.labels[split]

        def right(batch: list[int]) -> list[float]:
            logits = scoring.mask_logits(model, [rows[i] for i in batch], self.words, self.pad)
            return [
                float(guess == labels[i]) for i, guess in zip(batch, logits.argmax(-1).tolist(), strict=True)
            ]

        return {
            "accuracy": _percent(_each(processes, [len(row.ids) for row in rows], self.batch, right), split)
        }

    def features(
        self, model: nn.Module, split: str, processes: Processes
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What the output layer sees at the mask, [n, d], and the labels [n]."""
        rows = self.rows[split]

        def seen(batch: list[int]) -> list[NDArray[np.float32]]:
            return list(scoring.mask_features(model, [rows[i] for i in batch], self.pad).cpu().numpy())

        return _stacked(_each(processes, [len(row.ids) for row in rows], self.batch, seen)), np.array(
            self.labels[split]
        )


class CausalProblem:
    """Candidates behind a prompt, or an answer to be written.

    Args:
        max_tokens: longest prompt with its candidate; prompts are cut on the left.
        batch: sequences in a forward pass without gradients.

    Raises:
        ValueError: a label outside the words, a row without a right answer, a candidate that does not fit.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        prompt: CausalPrompt,
        sample: Sample,
        *,
        max_tokens: int = 2048,
        batch: int = 16,
    ) -> None:
        self.tokenizer, self.prompt, self.max_tokens, self.batch = tokenizer, prompt, max_tokens, batch
        self.metric, self.has_labels = task.metric, bool(prompt.words)
        self.pad = scoring.padding_id(tokenizer)
        rows = {"train": sample.train, "validation": sample.validation, "test": sample.test}
        self.questions = {split: [prompt.question(row) for row in rows[split]] for split in SPLITS}
        # What a loss reads is encoded ahead: all candidates where it compares them, else the right one.
        self.train = [self._for_training(question) for question in self.questions["train"]]

    def _for_training(self, question: Question) -> list[scoring.Encoded]:
        only = None if question.chooses else question.answers[0]
        return scoring.encode_question(self.tokenizer, question, max_tokens=self.max_tokens, only=only)

    @property
    def train_examples(self) -> int:
        return len(self.train)

    def loss(self, model: nn.Module, mine: Sequence[int], joint: Sequence[int] | None = None) -> Tensor:
        """Cross-entropy over the candidates' scores, or, for COPA, ReCoRD, SQuAD and DROP, teacher forcing on the right answer.

        Teacher forcing averages over tokens, so a process's share is divided by the tokens of the joint batch: the mean of the
        processes' losses is then the loss of that batch.
        """
        questions = self.questions["train"]
        if questions[mine[0]].chooses:
            encoded = [candidate for i in mine for candidate in self.train[i]]
            scores = torch.cat(
                [scoring.candidate_scores(model, part, self.pad) for part in _parts(encoded, self.batch)]
            )
            return scoring.choice_loss(
                scores, [len(self.train[i]) for i in mine], [questions[i].answers[0] for i in mine]
            )
        joint = mine if joint is None else joint
        share = sum(self.train[i][0].answer for i in joint) * len(mine) / len(joint)
        taught = [self.train[i][0] for i in mine]
        return (
            -torch.stack(
                [
                    scoring.answer_log_probs(model, part, self.pad)[0].sum()
                    for part in _parts(taught, self.batch)
                ]
            ).sum()
            / share
        )

    def evaluate(self, model: nn.Module, split: str, processes: Processes) -> dict[str, float]:
        """Accuracy, or F1 and exact match, in percent."""
        return self.score(model, self.questions[split], processes, split)

    def score(
        self, model: nn.Module, questions: Sequence[Question], processes: Processes, what: str
    ) -> dict[str, float]:
        """The same for any questions, for instance with demonstrations in front."""
        return (
            self._written(model, questions, processes, what)
            if self.prompt.generates
            else self._chosen(model, questions, processes, what)
        )

    def _chosen(
        self, model: nn.Module, questions: Sequence[Question], processes: Processes, what: str
    ) -> dict[str, float]:
        """Share of questions whose likeliest candidate is right."""

        def work(mine: list[int]) -> list[float]:
            encoded = [
                scoring.encode_question(self.tokenizer, questions[i], max_tokens=self.max_tokens)
                for i in mine
            ]
            flat = [candidate for candidates in encoded for candidate in candidates]
            scores = np.empty(len(flat))
            for part in scoring.by_length([len(c.ids) for c in flat], self.batch):
                scores[part] = (
                    scoring.candidate_scores(model, [flat[i] for i in part], self.pad).cpu().numpy()
                )
            ends = np.cumsum([len(candidates) for candidates in encoded])
            best = [int(s.argmax()) for s in np.split(scores, ends)[:-1]]
            return [float(guess in questions[i].answers) for i, guess in zip(mine, best, strict=True)]

        with torch.no_grad():
            return {"accuracy": _percent(processes.spread(len(questions), work), what)}

    def _written(
        self, model: nn.Module, questions: Sequence[Question], processes: Processes, what: str
    ) -> dict[str, float]:
        """F1 and exact match of what the model writes."""

        def both(batch: list[int]) -> list[tuple[float, float]]:
            texts = scoring.generate(
                model, self.tokenizer, [questions[i].prompt for i in batch], max_tokens=self.max_tokens
            )
            pairs = [(text, questions[i].references) for i, text in zip(batch, texts, strict=True)]
            return [
                (scoring.f1(text, references), scoring.exact_match(text, references))
                for text, references in pairs
            ]

        results = _each(processes, [len(q.prompt) for q in questions], self.batch, both)
        return {
            "f1": _percent([f for f, _ in results], what),
            "exact_match": _percent([e for _, e in results], what),
        }

    def features(
        self, model: nn.Module, split: str, processes: Processes
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """What the output layer sees at the last token of the prompt, [n, d], and the labels [n]."""
        questions = self.questions[split]
        # The first candidate stands for all: only the prompt before it is read.
        rows = [
            scoring.encode_question(self.tokenizer, q, max_tokens=self.max_tokens, only=0)[0]
            for q in questions
        ]

        def seen(batch: list[int]) -> list[NDArray[np.float32]]:
            return list(scoring.prompt_features(model, [rows[i] for i in batch], self.pad).cpu().numpy())

        return _stacked(_each(processes, [len(row.ids) for row in rows], self.batch, seen)), np.array(
            [q.answers[0] for q in questions]
        )


def _each(
    processes: Processes, lengths: Sequence[int], size: int, work: Callable[[list[int]], list[T]]
) -> list[T]:
    """`work` on batches of indices of like length, over the processes and without gradients; results in order of index."""

    def run(mine: list[int]) -> list[T]:
        results: dict[int, T] = {}
        for part in scoring.by_length([lengths[i] for i in mine], size):
            batch = [mine[i] for i in part]
            results.update(zip(batch, work(batch), strict=True))
        return [results[i] for i in mine]

    with torch.no_grad():
        return processes.spread(len(lengths), run)


def _parts(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive parts of at most `size`; one part when gradients are wanted, since its graph is needed whole."""
    size = len(items) if torch.is_grad_enabled() else size
    return [items[start : start + size] for start in range(0, len(items), size)]


def _stacked(rows: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack(rows)


def _percent(results: Sequence[float], what: str) -> float:
    if not results:
        raise ValueError(f"there is no {what} example to score.")
    return 100 * sum(results) / len(results)
