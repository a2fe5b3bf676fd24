"""The chapter's model: a small pre-norm encoder with a tied masked-language-model head, trained by papercore itself.

110,079 parameters, of which fine-tuning moves the 99,968 of the two layers; embeddings and head stay as they were.

Glossary
    width      d, 64: numbers of a hidden state
    at         index of the position whose logits are wanted; the last layer is then computed for that position alone
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papercore.experiments.grafting.world import AT, LENGTH, VOCABULARY


class Layer(nn.Module):
    """Attention and a two-layer perceptron, layer norms before each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.norm_ffn = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, 4 * width)
        self.ffn_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, at: int | None = None) -> Tensor:
        """x [n, T, d] -> [n, T, d], or [n, 1, d] for the position `at`."""
        h = self.norm_attention(x)
        rows = slice(None) if at is None else slice(at, at + 1)
        q, k, v = self._split(self.query(h[:, rows])), self._split(self.key(h)), self._split(self.value(h))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [n, T, d]
        x = x[:, rows] + self.output(mixed)
        return x + self.ffn_out(F.gelu(self.ffn_in(self.norm_ffn(x))))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [n, heads, T, d / heads]


class Encoder(nn.Module):
    """Masked language model of the small world; weights from `generator` or, by `pretrained()`, from the file beside it."""

    def __init__(
        self, *, width: int = 64, layers: int = 2, heads: int = 4, generator: torch.Generator
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(
            devices=[]
        ):  # the layers' own initialisation must not move the global generator
            self.words = nn.Embedding(VOCABULARY, width)
            self.places = nn.Parameter(torch.empty(LENGTH, width))
            self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
            self.norm = nn.LayerNorm(width)
            self.bias = nn.Parameter(torch.zeros(VOCABULARY))
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.05 if name in ("words.weight", "places") else 1 / math.sqrt(p.shape[1])
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor, at: int | None = AT) -> Tensor:
        """Logits over the vocabulary at one position [n, V], or at all of them [n, T, V] for at=None."""
        x = self.words(ids) + self.places
        for layer in self.layers[:-1]:
            x = layer(x)
        x = self.layers[-1](x, at)
        logits = F.linear(self.norm(x), self.words.weight, self.bias)
        return logits if at is None else logits[:, 0]


def graftable(name: str) -> bool:
    """Whether fine-tuning moves the parameter of this name: those of the layers."""
    return name.startswith("layers.")
