"""How language models answer: candidates' log-likelihoods, label words at a mask, greedy generation; and how answers are scored.

Everything works on batches and is held to an unbatched computation by tests. Losses keep their graph, so that the same functions
serve MeZO (called without gradients) and Adam.

Glossary
    N, T, V      sequences in a batch, tokens of the longest, vocabulary
    K            longest candidate in tokens
    C            candidates of one question, or label words
    score        log-likelihood of a candidate's tokens given the prompt, divided by their number (section 3 of the paper)

Causal models are padded on the left, so that candidates are right-aligned and only the last K + 1 positions need logits; masked
models on the right, and only the mask's position goes through the output layer. Position numbers count real tokens alone.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from papercore.experiments.mezo.prompts import MaskedPrompt, Question, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 50
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Both data sets of unanswerable questions; such a reference is right or wrong as a whole.
_REFUSALS = ("CANNOTANSWER", "no answer")


@dataclass(frozen=True)
class Encoded:
    """Token ids of a prompt and a candidate, of which the last `answer` are the candidate's."""

    ids: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class EncodedMask:
    """Token ids of a masked prompt and the position of the mask."""

    ids: tuple[int, ...]
    mask: int


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: Question, *, max_tokens: int, only: int | None = None
) -> list[Encoded]:
    """Each candidate behind its prompt, cut on the left to `max_tokens`; the beginning-of-text token stays.

    Prompt and candidate are tokenized apart, so that the boundary between them is a token boundary by construction.

    Args:
        only: position of the one candidate that is wanted; None for all.

    Raises:
        ValueError: a candidate without tokens, or one that fills `max_tokens` alone.
    """
    prompt = tokenizer.encode(question.prompt, add_special_tokens=False)
    wanted = question.candidates if only is None else question.candidates[only : only + 1]
    return [_joined(tokenizer, prompt, text, max_tokens) for text in wanted]


def _joined(
    tokenizer: PreTrainedTokenizerBase, prompt: list[int], candidate: str, max_tokens: int
) -> Encoded:
    answer = tokenizer.encode(candidate, add_special_tokens=False)
    begin = _beginning(tokenizer)
    room = max_tokens - len(begin) - len(answer)
    if not answer:
        raise ValueError(f"the candidate {candidate!r} has no token, so it has no likelihood.")
    if room < 1:
        raise ValueError(
            f"the candidate {candidate[:60]!r} has {len(answer)} tokens: no room for a prompt within {max_tokens}."
        )
    return Encoded((*begin, *prompt[-room:], *answer), len(answer))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """OPT was trained with this token in front of every text; not every tokenizer class adds it by itself."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def answer_log_probs(model: nn.Module, batch: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the candidates' tokens.

    Args:
        model: a causal language model of transformers, adapters included.
        pad: token id for the padding.

    Returns:
        (log_probs [N, K], is_answer [N, K]): float32, right-aligned; entries outside a candidate are 0.
    """
    ids, attention = _padded([row.ids for row in batch], pad, left=True, device=_device(model))
    longest = max(row.answer for row in batch)
    inputs = {
        "input_ids": ids,
        "attention_mask": attention,
        "use_cache": False,
        "logits_to_keep": longest + 1,
    }
    if not _prepends_tokens(model):
        inputs["position_ids"] = (attention.cumsum(-1) - 1).clamp_min(0)
    logits = model(**inputs).logits[:, -(longest + 1) : -1].float()
    targets = ids[:, -longest:].to(logits.device)
    picked = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    lengths = torch.tensor([row.answer for row in batch], device=logits.device)
    is_answer = torch.arange(longest, device=logits.device) >= longest - lengths.unsqueeze(1)
    return picked.where(is_answer, torch.zeros_like(picked)), is_answer


def candidate_scores(model: nn.Module, batch: Sequence[Encoded], pad: int) -> Tensor:
    """Mean log-likelihood of each candidate's tokens, [N]."""
    log_probs, is_answer = answer_log_probs(model, batch, pad)
    return log_probs.sum(-1) / is_answer.sum(-1)


def choice_loss(scores: Tensor, counts: Sequence[int], answers: Sequence[int]) -> Tensor:
    """Cross-entropy over the candidates' scores, mean over questions.

    Args:
        scores: [sum(counts)], question after question.
        counts: candidates of each question; answers: position of the right one.
    """
    table = pad_sequence(
        scores.split(list(counts)), batch_first=True, padding_value=float("-inf")
    )  # [questions, C]
    return functional.cross_entropy(table, torch.tensor(answers, device=scores.device))


def encode_masked(tokenizer: PreTrainedTokenizerBase, prompt: MaskedPrompt, row: Row) -> EncodedMask:
    """The prompt as token ids with one mask. A prompt that is too long loses the end of its longest text, never the template.

    Raises:
        ValueError: the tokenizer has no mask token, or the template alone is too long.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError(
            "this tokenizer has no mask token: label words at a mask need a masked language model such as roberta-large."
        )
    before, after = prompt.pieces(row)
    encoded = [(tokenizer.encode(text, add_special_tokens=False), cut) for text, cut in [*before, *after]]
    surplus = sum(len(ids) for ids, _ in encoded) + 3 - prompt.max_tokens
    while surplus > 0:
        longest: list[int] = max((ids for ids, cut in encoded if cut), key=len, default=[])
        if len(longest) < 2:
            raise ValueError(f"the prompt {prompt.template!r} does not fit {prompt.max_tokens} tokens.")
        longest.pop()
        surplus -= 1
    ids = [token for piece, _ in encoded[: len(before)] for token in piece]
    rest = [token for piece, _ in encoded[len(before) :] for token in piece]
    return EncodedMask(
        (tokenizer.cls_token_id, *ids, tokenizer.mask_token_id, *rest, tokenizer.sep_token_id), len(ids) + 1
    )


def word_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The token of each label word, with the space in front of it.

    Raises:
        ValueError: a word is not one token of this vocabulary, or two words share one.
    """
    pieces = {word: tokenizer.encode(f" {word}", add_special_tokens=False) for word in words}
    for word, ids in pieces.items():
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"the label word {word!r} is {len(ids)} tokens of this tokenizer, expected one known token: {tokenizer.convert_ids_to_tokens(ids)}."
            )
    if len({ids[0] for ids in pieces.values()}) < len(words):
        raise ValueError(f"label words {', '.join(words)} share a token of this tokenizer.")
    return [ids[0] for ids in pieces.values()]


def mask_logits(model: nn.Module, batch: Sequence[EncodedMask], words: Sequence[int], pad: int) -> Tensor:
    """Logits of the label words at the mask, [N, C] in float32."""
    ids, attention = _padded([row.ids for row in batch], pad, left=False, device=_device(model))
    with _output_layer(model, [row.mask for row in batch]):
        logits = model(input_ids=ids, attention_mask=attention).logits  # [N, V]
    return logits[:, list(words)].float()


def mask_features(model: nn.Module, batch: Sequence[EncodedMask], pad: int) -> Tensor:
    """What the output layer sees at the mask, [N, d] in float32: the input of the linear probe."""
    ids, attention = _padded([row.ids for row in batch], pad, left=False, device=_device(model))
    with _output_layer(model, [row.mask for row in batch]) as seen:
        model(input_ids=ids, attention_mask=attention)
    return seen[0].float()


def prompt_features(model: nn.Module, batch: Sequence[Encoded], pad: int) -> Tensor:
    """What the output layer sees at the last token of the prompt, [N, d] in float32."""
    prompts = [row.ids[: len(row.ids) - row.answer] for row in batch]
    ids, attention = _padded(prompts, pad, left=True, device=_device(model))
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    with _output_layer(model, [-1] * len(batch)) as seen:
        model(input_ids=ids, attention_mask=attention, position_ids=positions, use_cache=False)
    return seen[0].float()


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_tokens: int = 2048,
    new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Greedy continuations up to the first newline, without the spaces around them.

    Args:
        prompts: cut on the left so that prompt and continuation fit `max_tokens`.
    """
    begin = _beginning(tokenizer)
    room = max_tokens - new_tokens - len(begin)
    if room < 1:
        raise ValueError(
            f"max_tokens = {max_tokens} leaves no room for a prompt before {new_tokens} new tokens."
        )
    encoded = [(*begin, *tokenizer.encode(text, add_special_tokens=False)[-room:]) for text in prompts]
    pad = padding_id(tokenizer)
    ids, attention = _padded(encoded, pad, left=True, device=_device(model))
    ends = [*newline_ids(tokenizer), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
    options: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "max_new_tokens": new_tokens,
        "eos_token_id": ends,
        "pad_token_id": pad,
    }
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=attention, **options)  # type: ignore[operator]
    texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [text.split("\n")[0].strip() for text in texts]


@lru_cache(maxsize=8)
def newline_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every token whose text holds a newline: generation stops at any of them."""
    vocabulary = tokenizer.get_vocab()
    return tuple(
        sorted(i for token, i in vocabulary.items() if "\n" in tokenizer.convert_tokens_to_string([token]))
    )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or any other: padding is hidden by the attention mask."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, 0)
    return next(i for i in ids if i is not None)


def normalized_answer(text: str) -> str:
    """Lower case, without punctuation, articles and surplus spaces, as SQuAD's evaluation has it.

    >>> normalized_answer("The  Eiffel-Tower, in an old photo.")
    'eiffeltower in old photo'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def f1(prediction: str, references: Sequence[str]) -> float:
    """Overlap of words with the best reference, between 0 and 1.

    >>> f1("the red house", ["a red house", "house"])
    1.0
    """
    if references and references[0] in _REFUSALS:
        return exact_match(prediction, references[:1])
    words = normalized_answer(prediction).split()
    return max(_overlap(words, answer.split()) for answer in _normalized(references))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 when the prediction equals a reference after normalization, else 0.0."""
    return float(normalized_answer(prediction) in _normalized(references))


def _normalized(references: Sequence[str]) -> list[str]:
    if not references:
        raise ValueError("an answer is scored against at least one reference, got none.")
    return [normalized_answer(reference) for reference in references]


def _overlap(predicted: list[str], wanted: list[str]) -> float:
    shared = (Counter(predicted) & Counter(wanted)).total()
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of `size`, longest first, so that little is padding and a batch too big fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(
    rows: Sequence[Sequence[int]], pad: int, *, left: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids [N, T], attention [N, T]) with the padding on one side."""
    side = "left" if left else "right"
    ids = pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=pad, padding_side=side
    )
    attention = pad_sequence(
        [torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True, padding_side=side
    )
    return ids.to(device), attention.to(device)


@contextmanager
def _output_layer(model: nn.Module, positions: Sequence[int]) -> Iterator[list[Tensor]]:
    """Let the output layer see one position of each row only; yields a list that receives what it saw, [N, d]."""
    seen: list[Tensor] = []

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        hidden = inputs[0]
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        seen.append(hidden[rows, torch.tensor(positions, device=hidden.device)])
        return (seen[-1],)

    handle = model.get_output_embeddings().register_forward_pre_hook(select)  # type: ignore[operator]
    try:
        yield seen
    finally:
        handle.remove()


def _device(model: nn.Module) -> torch.device:
    """Where the inputs go: the device of the first parameter (layers spread over several devices move them on)."""
    return next(model.parameters()).device


def _prepends_tokens(model: nn.Module) -> bool:
    """True for adapters that put virtual tokens in front: they number the positions themselves."""
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))
