"""A sentence encoder as a classifier without new parameters, and the parameter sets that the arms tune.

Glossary
    prompt head      logits = scale * cos(embedding of the text, embedding of the label's description)
    embedding        mean over the text's tokens of the last hidden state, [d]
    description      a short English text that stands for a class; it is embedded anew at each step, since the encoder moves
    directions       the head without a prompt: one random unit vector a class, trained too
    packed           the tokens of a batch one after another, [T, d], no padding; padded only inside attention
    N, L, T, d, C    texts in a batch, longest text, tokens in all, hidden size, classes

Deliberately different from the library: the forward pass works on packed tokens (questions have 10 tokens on average and up
to 40, so padding would triple the work). It calls the library's own modules, so adapters put in their place work too, and a
test holds it to the library's padded forward within 1e-5. Dropout is off everywhere, as in the paper's two evaluations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import BertModel, PreTrainedTokenizerBase

ARMS = ("full", "norms_biases", "lora", "no_prompt")

# What the figures call the arms.
ARM_LABELS = {
    "full": "all weights",
    "norms_biases": "LayerNorm + biases",
    "lora": "LoRA",
    "no_prompt": "no prompt",
}

TokenIds = list[int]


class LowRank(nn.Module):
    """A frozen linear layer plus a trained low-rank change: W x + b + (alpha / rank) B A x, with B = 0 at the start.

    Args:
        linear: the layer whose output is changed; its own parameters are left as they are.
        rank: rows of A and columns of B.
        alpha: scale, divided by `rank`.
        generator: draws A (Kaiming uniform with a = sqrt 5, i.e. uniform within 1 / sqrt(in_features)).
    """

    def __init__(self, linear: nn.Linear, *, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        if not 1 <= rank <= min(linear.in_features, linear.out_features):
            raise ValueError(
                f"LoRA rank {rank} does not fit a layer of {linear.in_features} -> {linear.out_features} features"
            )
        self.linear, self.scale = linear, alpha / rank
        bound = 1 / math.sqrt(linear.in_features)
        start = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(start.to(linear.weight))
        self.B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.linear(x) + self.scale * (x @ self.A.T) @ self.B.T


class Encoder(nn.Module):
    """Mean-pooled embeddings of token lists by a BERT of `transformers`, on packed tokens.

    Args:
        bert: a BertModel in eval mode.
        tokenizer: its tokenizer.
        max_tokens: longer texts are cut to this many tokens, special tokens included.
    """

    def __init__(self, bert: BertModel, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int = 48):
        super().__init__()
        if getattr(bert.config, "model_type", None) != "bert":
            kind = getattr(bert.config, "model_type", type(bert).__name__)
            raise TypeError(f"the packed forward pass knows BERT encoders, got a model of type {kind!r}")
        limit = int(bert.config.max_position_embeddings)
        if not 3 <= max_tokens <= limit:
            raise ValueError(
                f"max_tokens must lie between 3 and the model's {limit} positions, got {max_tokens}"
            )
        self.bert, self.tokenizer, self.max_tokens = bert.eval(), tokenizer, max_tokens
        self.heads = int(bert.config.num_attention_heads)

    @property
    def width(self) -> int:
        """Hidden size d."""
        return int(self.bert.config.hidden_size)

    def ids(self, texts: Sequence[str]) -> list[TokenIds]:
        """Token ids of each text with its special tokens, cut to `max_tokens`."""
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]

    def forward(self, batch: Sequence[TokenIds]) -> Tensor:
        """Embeddings [N, d] of N token lists."""
        x, layout = self._states(batch, len(self.bert.encoder.layer))
        # summed over padded rows, not scattered: the order of additions is then the same on every run, also on CUDA
        return layout.spread(x).sum(1) / layout.lengths[:, None]

    def first_word(self, batch: Sequence[TokenIds], layer: int) -> Tensor:
        """State of the first word piece after [CLS] at the output of `layer` (1 is the first), [N, d]."""
        layers = len(self.bert.encoder.layer)
        if not 1 <= layer <= layers:
            raise ValueError(f"this encoder has layers 1 to {layers}, got {layer}")
        x, layout = self._states(batch, layer)
        return x[layout.lengths.cumsum(0) - layout.lengths + 1]

    def _states(self, batch: Sequence[TokenIds], layers: int) -> tuple[Tensor, _Layout]:
        """Packed states [T, d] after the first `layers` layers, and where they belong."""
        layout = _Layout.of(batch, self.bert.device)
        tokens = torch.tensor([token for ids in batch for token in ids], device=self.bert.device)
        table = self.bert.embeddings
        x = table.word_embeddings(tokens) + table.token_type_embeddings.weight[0]
        x = table.LayerNorm(x + table.position_embeddings(layout.slots % layout.longest))
        for layer in self.bert.encoder.layer[:layers]:
            x = layer.attention.output(self._attend(layer.attention.self, x, layout), x)
            x = layer.output(layer.intermediate(x), x)
        return x, layout

    def _attend(self, attention: Any, x: Tensor, layout: _Layout) -> Tensor:
        """Self-attention of packed tokens [T, d], each text apart."""
        q, k, v = (
            layout.spread(part(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (attention.query, attention.key, attention.value)
        )  # each [N, heads, L, d / heads]
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask)
        return mixed.transpose(1, 2).flatten(2).flatten(0, 1)[layout.slots]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the packed tokens of a batch sit when it is padded to [N, L]."""

    n: int
    longest: int
    lengths: Tensor  # [N], tokens of each text
    slots: Tensor  # [T], index of each token among N * L
    mask: Tensor | None  # bool [N, 1, 1, L], True at tokens; None when nothing is padded

    @classmethod
    def of(cls, batch: Sequence[TokenIds], device: torch.device) -> _Layout:
        lengths = torch.tensor([len(ids) for ids in batch])
        longest = int(lengths.max())
        inside = torch.arange(longest)[None, :] < lengths[:, None]
        slots = inside.flatten().nonzero().flatten()
        mask = None if bool(inside.all()) else inside[:, None, None, :].to(device)
        return cls(len(batch), longest, lengths.to(device), slots.to(device), mask)

    def spread(self, x: Tensor) -> Tensor:
        """Packed rows [T, d] -> padded [N, L, d], zeros where there is no token."""
        padded = x.new_zeros(self.n * self.longest, x.shape[-1]).index_copy(0, self.slots, x)
        return padded.view(self.n, self.longest, -1)


class Classifier(nn.Module):
    """The encoder with one of two heads; its `forward` gives logits [N, C].

    Args:
        encoder: the encoder.
        descriptions: one text a class: the prompt head.
        directions: Tensor[C, d] instead: the head without a prompt, a trained parameter.
        scale: logits = scale * cosine; 20 unless said.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        descriptions: Sequence[str] | None = None,
        directions: Tensor | None = None,
        scale: float = 20.0,
    ):
        super().__init__()
        if (descriptions is None) == (directions is None):
            raise ValueError(
                "a classifier needs descriptions (prompt head) or directions (no prompt), not both or neither"
            )
        self.encoder, self.scale = encoder, scale
        self.labels = encoder.ids(descriptions) if descriptions is not None else []
        self.directions = nn.Parameter(directions) if directions is not None else None

    def forward(self, batch: Sequence[TokenIds]) -> Tensor:
        """Logits [N, C] of N token lists. The descriptions ride in the same packed batch."""
        if self.directions is not None:
            sides = [self.encoder(batch), self.directions]
        else:
            sides = self.encoder([*batch, *self.labels]).split([len(batch), len(self.labels)])
        texts, classes = (nn.functional.normalize(side, dim=-1) for side in sides)
        return self.scale * texts @ classes.T

    def loss(self, batch: Sequence[TokenIds], labels: Tensor) -> Tensor:
        """Mean cross-entropy of a batch; labels int64 [N]."""
        return nn.functional.cross_entropy(self(batch), labels.to(self.encoder.bert.device))

    @torch.no_grad()
    def predict(self, texts: Sequence[TokenIds], *, batch: int = 128) -> Tensor:
        """Logits [N, C] on the CPU, in batches of texts of like length."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = [self([texts[i] for i in order[a : a + batch]]).cpu() for a in range(0, len(order), batch)]
        logits = torch.cat(parts)
        return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)


def build(
    bert: BertModel,
    tokenizer: PreTrainedTokenizerBase,
    arm: str,
    descriptions: Sequence[str],
    *,
    seed: int = 0,
    rank: int = 8,
    alpha: float = 16.0,
    max_tokens: int = 48,
    scale: float = 20.0,
) -> tuple[Classifier, list[nn.Parameter]]:
    """The classifier of one arm and the parameters that it tunes; all others are frozen. `bert` is changed in place.

    full            every tensor of the encoder's layers (embeddings stay frozen)
    norms_biases    of these, LayerNorm weights and all biases
    lora            rank `rank` on query and value, `alpha` as in the paper
    no_prompt       as full, and the class directions: random unit vectors of `seed` in place of the descriptions

    Raises:
        ValueError: an arm that is not one of ARMS.
    """
    if arm not in ARMS:
        raise ValueError(f"unknown arm {arm!r}: expected one of {', '.join(ARMS)}")
    bert.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(bert, tokenizer, max_tokens=max_tokens)
    directions = None
    if arm == "no_prompt":
        drawn = torch.randn(len(descriptions), encoder.width, generator=generator)
        directions = nn.functional.normalize(drawn, dim=-1).to(bert.device)
    if arm == "lora":
        tuned = []
        layers: Any = bert.encoder.layer
        for layer in layers:
            attention = layer.attention.self
            for name in ("query", "value"):
                adapter = LowRank(getattr(attention, name), rank=rank, alpha=alpha, generator=generator)
                setattr(attention, name, adapter)
                tuned += [adapter.A, adapter.B]
    else:
        tuned = [
            p
            for name, p in bert.encoder.named_parameters()
            if arm != "norms_biases" or _is_norm_or_bias(name)
        ]
    classifier = Classifier(
        encoder,
        descriptions=None if directions is not None else descriptions,
        directions=directions,
        scale=scale,
    )
    if classifier.directions is not None:
        tuned.append(classifier.directions)
    for parameter in tuned:
        parameter.requires_grad_(True)
    return classifier, tuned


def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    """Expected calibration error: mean over `bins` equal bins of confidence of |accuracy - confidence|, by bin size.

    >>> calibration_error(torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1])) # accuracy .5, confidence .8
    0.3
    """
    confidence, guess = probabilities.double().max(-1)
    correct = (guess == labels).double()
    which = (confidence * bins).long().clamp_(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, correct - confidence)
    return round(float(gap.abs().sum() / len(labels)), 6)


def _is_norm_or_bias(name: str) -> bool:
    return name.endswith(".bias") or "LayerNorm" in name
