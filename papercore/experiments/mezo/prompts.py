"""Prompt templates and label words of the paper's experiments (section 3 and appendix), as data, and what turns a row into a prompt.

Two families, two tables. `MASKED` (RoBERTa): the label word is predicted at a mask. `CAUSAL` (OPT): every candidate is appended
to the prompt and the more likely one wins, or the model writes the answer itself.

Glossary
    row          one example, a dict with the hub's column names
    label word   the word that stands for a label; words are listed in the order of the hub's label numbers
    candidate    a continuation of a prompt, with the space that it begins with
    reference    an answer that counts as right in a generation task
    k            labelled examples of each class

Deliberately explicit: the order of labels is the hub's, not that of the original files (the hub's TREC begins with ABBR; files
that other projects use begin with DESC), and the templates follow the released scripts where the paper's table prints tokens
apart: no space stands before the mask's full stop, and the first sentence of a pair gives up its full stop. (The scripts cut
its last character, whatever it is; here only a punctuation mark goes.)
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

MASK_FIELD = "mask"
DEMONSTRATION_SEPARATOR = "\n\n"


def column(row: Row, *names: str) -> Any:
    """The value of the first of `names` that this row has; ValueError lists what it has instead."""
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(
        f"a row has no column {' or '.join(map(repr, names))}: it has {', '.join(map(repr, row))}."
    )


def label_of(row: Row, name: str, words: Sequence[str]) -> int:
    """The label number of a row, checked against the label words.

    Raises:
        ValueError: the label has no word (hidden test labels are -1).
    """
    value = column(row, name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(words):
        known = ", ".join(f"{i} ({word})" for i, word in enumerate(words))
        raise ValueError(
            f"label {value!r} in column {name!r} has no label word: expected {known}. Hidden test labels (-1) cannot be scored."
        )
    return value


@dataclass(frozen=True)
class MaskedPrompt:
    """A template with one mask, its label words, and the columns that fill it.

    Fields:
        template: text with {fields} and {mask}.
        words: one word a label; each is looked up with a leading space, as it stands inside a sentence.
        fill: row -> the values of the fields.
        max_tokens: longest prompt in tokens, the two special ones included.
    """

    template: str
    words: tuple[str, ...]
    fill: Callable[[Row], dict[str, str]]
    max_tokens: int = 128

    def text(self, row: Row, mask: str = "<mask>") -> str:
        """The prompt as one string, for people to read.

        >>> MASKED["sst2"].text({"sentence": "a gem of a film "})
        'a gem of a film It was <mask>.'
        """
        return self.template.format(**self.fill(row), **{MASK_FIELD: mask})

    def pieces(self, row: Row) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
        """The prompt before and after the mask, each a list of (text, may be shortened).

        A space between two pieces goes with the later one, as byte-level tokenizers want it; the one before the mask is dropped,
        since the mask token of RoBERTa takes it up.
        """
        values = self.fill(row)
        before: list[tuple[str, bool]] = []
        after: list[tuple[str, bool]] = []
        part = before
        for literal, field, _, _ in string.Formatter().parse(self.template):
            fixed = literal.rstrip(" ") if field else literal
            space = literal[len(fixed) :] if field != MASK_FIELD else ""
            if fixed:
                part.append((fixed, False))
            if field == MASK_FIELD:
                part = after
            elif field:
                part.append((space + values[field], True))
        return before, after


@dataclass(frozen=True)
class Question:
    """One example for a causal language model.

    Fields:
        prompt: text that the candidates continue; it never ends in a space.
        candidates: continuations; a generation task has one, its first reference and a newline.
        answers: positions of the right candidates; the first is the one that training aims at.
        references: right answers of a generation task, else empty.
        chooses: True when training compares the candidates, False when it teaches the first answer word by word.
    """

    prompt: str
    candidates: tuple[str, ...]
    answers: tuple[int, ...]
    references: tuple[str, ...] = ()
    chooses: bool = True

    def demonstration(self) -> str:
        """The prompt with its answer, as it stands before a question of in-context learning."""
        return (self.prompt + self.candidates[self.answers[0]]).strip()

    def after(self, demonstrations: Sequence[Question]) -> Question:
        """The same question with answered examples in front of it, a blank line between them."""
        texts = [d.demonstration() for d in demonstrations]
        prompt = DEMONSTRATION_SEPARATOR.join([*texts, self.prompt]).lstrip()
        return Question(prompt, self.candidates, self.answers, self.references, self.chooses)


@dataclass(frozen=True)
class CausalPrompt:
    """A template for a causal language model.

    Fields:
        template: the prompt with {fields}.
        fill: row -> the values of the fields.
        words: label words; empty when candidates or answers come with the row.
        lead: what stands between the prompt and a label word.
        choose: row -> (candidates, positions of the right ones), for tasks whose candidates come with the row.
        answers: row -> references, for generation tasks.
    """

    template: str
    fill: Callable[[Row], dict[str, str]]
    words: tuple[str, ...] = ()
    lead: str = ""
    choose: Callable[[Row], tuple[tuple[str, ...], tuple[int, ...]]] | None = None
    answers: Callable[[Row], tuple[str, ...]] | None = None
    label: str = "label"

    @property
    def generates(self) -> bool:
        """True when the model writes the answer: SQuAD and DROP, measured in F1."""
        return self.answers is not None

    def question(self, row: Row) -> Question:
        """The row as a question.

        >>> q = CAUSAL["sst2"].question({"sentence": "a gem ", "label": 1})
        >>> q.prompt, q.candidates, q.answers
        ('a gem It was', (' terrible', ' great'), (1,))

        Raises:
            ValueError: a missing column, a label without a word, no right candidate, or no answer.
        """
        prompt = self.template.format(**self.fill(row))
        if self.answers is not None:
            references = self.answers(row)
            if not references:
                raise ValueError(f"a row without an answer cannot be scored: {dict(row)}")
            return Question(prompt, (f" {references[0]}\n",), (0,), references, chooses=False)
        if self.choose is not None:
            candidates, right = self.choose(row)
            if not right:
                raise ValueError(f"none of the candidates {candidates} is the answer of {dict(row)}")
            return Question(prompt, candidates, right, chooses=False)
        answer = label_of(row, self.label, self.words)
        return Question(prompt, tuple(self.lead + word for word in self.words), (answer,))


def _fields(*names: str) -> Callable[[Row], dict[str, str]]:
    """Columns taken as they are."""
    return lambda row: {name: str(column(row, name)) for name in names}


def _stripped(*names: str) -> Callable[[Row], dict[str, str]]:
    """Columns without the spaces around them; the first name is the field, the others are columns tried in turn."""
    return lambda row: {names[0]: str(column(row, *names)).strip()}


def _first_letter(text: str, change: Callable[[str], str]) -> str:
    return change(text[:1]) + text[1:]


def _pair(row: Row) -> dict[str, str]:
    """Premise and hypothesis under the column names of either GLUE or SNLI/MNLI, joined into one sentence by the template."""
    first, second = (
        str(column(row, "premise", "sentence1")).strip(),
        str(column(row, "hypothesis", "sentence2")).strip(),
    )
    return {
        "first": first[:-1] if first.endswith(tuple(string.punctuation)) else first,
        "second": _first_letter(second, str.lower),
    }


def _entailment(row: Row) -> dict[str, str]:
    return {
        "premise": str(column(row, "premise", "sentence1")),
        "hypothesis": str(column(row, "hypothesis", "sentence2")),
    }


def _boolq(row: Row) -> dict[str, str]:
    question = str(column(row, "question")).rstrip("?")
    return {"passage": str(column(row, "passage")), "question": _first_letter(question, str.upper)}


def _wsc(row: Row) -> dict[str, str]:
    return {
        "text": str(column(row, "text")),
        "noun": str(column(row, "span1_text")),
        "pronoun": str(column(row, "span2_text")).lower(),
    }


def _copa(row: Row) -> dict[str, str]:
    joined = {"effect": "so", "cause": "because"}
    asked = column(row, "question")
    if asked not in joined:
        raise ValueError(f"COPA asks for an 'effect' or a 'cause', got {asked!r}.")
    return {"premise": str(column(row, "premise")).rstrip().removesuffix("."), "conjunction": joined[asked]}


def _copa_choices(row: Row) -> tuple[tuple[str, ...], tuple[int, ...]]:
    texts = [str(column(row, name)) for name in ("choice1", "choice2")]
    choices = tuple(f" {t if t.split(' ')[0] == 'I' else _first_letter(t, str.lower)}" for t in texts)
    return choices, (label_of(row, "label", ("choice1", "choice2")),)


def _record(row: Row) -> dict[str, str]:
    # Highlights of the news article become a list, and the query becomes its next item.
    return {"passage": str(column(row, "passage")).replace("@highlight\n", "- ")}


def _record_choices(row: Row) -> tuple[tuple[str, ...], tuple[int, ...]]:
    query, entities, right = (
        str(column(row, "query")),
        list(column(row, "entities")),
        set(column(row, "answers")),
    )
    return tuple(f" {query.replace('@placeholder', e)}" for e in entities), tuple(
        i for i, e in enumerate(entities) if e in right
    )


def _question(*names: str) -> Callable[[Row], dict[str, str]]:
    return lambda row: {**_fields(*names)(row), "question": str(column(row, "question")).strip()}


def _squad_answers(row: Row) -> tuple[str, ...]:
    return tuple(column(row, "answers")["text"])


def _drop_answers(row: Row) -> tuple[str, ...]:
    return tuple(column(row, "answers_spans")["spans"])


_SENTIMENT = "{sentence} It was {mask}."
_NLI = "{first}? {mask}, {second}"

MASKED: dict[str, MaskedPrompt] = {
    "sst2": MaskedPrompt(_SENTIMENT, ("terrible", "great"), _stripped("sentence", "text")),
    "sst5": MaskedPrompt(
        _SENTIMENT, ("terrible", "bad", "okay", "good", "great"), _stripped("sentence", "text")
    ),
    # ABBR, ENTY, DESC, HUM, LOC, NUM on the hub.
    "trec": MaskedPrompt(
        "{mask}: {sentence}",
        ("Expression", "Entity", "Description", "Human", "Location", "Number"),
        _stripped("sentence", "text"),
    ),
    "mnli": MaskedPrompt(_NLI, ("Yes", "Maybe", "No"), _pair, 256),
    "snli": MaskedPrompt(_NLI, ("Yes", "Maybe", "No"), _pair, 256),
    "rte": MaskedPrompt(_NLI, ("Yes", "No"), _pair, 256),
}

CAUSAL: dict[str, CausalPrompt] = {
    "sst2": CausalPrompt("{sentence} It was", _stripped("sentence"), ("terrible", "great"), " "),
    "rte": CausalPrompt(
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', _entailment, ("Yes", "No")
    ),
    # entailment, contradiction, neutral on the hub.
    "cb": CausalPrompt(
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        _entailment,
        ("Yes", "No", "Maybe"),
    ),
    # The paper's table; the released code's default puts a newline, not a space, before the answer.
    "boolq": CausalPrompt("{passage} {question}?", _boolq, ("No", "Yes"), " "),
    "wsc": CausalPrompt(
        '{text}\nIn the previous sentence, does the pronoun "{pronoun}" refer to {noun}? Yes or No?\n',
        _wsc,
        ("No", "Yes"),
    ),
    "wic": CausalPrompt(
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
        _fields("word", "sentence1", "sentence2"),
        ("No", "Yes"),
    ),
    "multirc": CausalPrompt(
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        _fields("paragraph", "question", "answer"),
        ("No", "Yes"),
    ),
    "copa": CausalPrompt("{premise} {conjunction}", _copa, choose=_copa_choices),
    "record": CausalPrompt("{passage}\n-", _record, choose=_record_choices),
    "squad": CausalPrompt(
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        _question("title", "context"),
        answers=_squad_answers,
    ),
    "drop": CausalPrompt(
        "Passage: {passage}\nQuestion: {question}\nAnswer:", _question("passage"), answers=_drop_answers
    ),
}
