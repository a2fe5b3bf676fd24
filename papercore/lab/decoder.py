"""A small causal transformer (pre-layer-norm, learned positions, tied embedding) that trains in seconds on a laptop.

Glossary: B batch, n tokens, d width, V vocabulary, p length of a key-value prefix.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`: vocabulary V, width d, layers, heads, longest sequence, length p of a learned key-value prefix."""

    vocabulary: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    prefix: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.heads} heads.")


class Block(nn.Module):
    """Attention and feed-forward, each behind a layer norm and around a residual."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.out = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        # Keys and values that every token can attend to, learned per layer (prefix tuning); absent when p = 0.
        self.prefix = nn.Parameter(torch.zeros(2, config.prefix, d)) if config.prefix else None

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, n, d] of this block's input x [B, n, d]."""
        h = self.norm_attention(x)
        return self.k(h), self.v(h)

    def forward(self, x: Tensor, mask: Tensor | None, *, last: bool = False) -> Tensor:
        """[B, n, d] -> [B, n, d]; with `last` only the last position's state, [B, 1, d], which sees all others."""
        batch, n, d = x.shape
        h = self.norm_attention(x)
        q, k, v = self.q(h[:, -1:] if last else h), self.k(h), self.v(h)
        if last:
            x = x[:, -1:]
        if self.prefix is not None:
            k = torch.cat([self.prefix[0].expand(batch, -1, -1), k], dim=1)  # [B, p + n, d]
            v = torch.cat([self.prefix[1].expand(batch, -1, -1), v], dim=1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)
        )  # [B, heads, ., d / heads]
        if last:
            a = F.scaled_dot_product_attention(q, k, v)
        elif mask is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Decoder(nn.Module):
    """Causal language model: `forward(input_ids [B, n])` gives logits [B, n, V].

    Args:
        config: sizes.
        generator: source of the initial weights; the global generator is never used.
    """

    def __init__(self, config: DecoderConfig, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        # Built on the meta device and then filled, so that no weight is ever drawn from the global generator.
        with torch.device("meta"):
            self.embedding = nn.Embedding(config.vocabulary, config.width)
            self.position = nn.Embedding(config.context, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.width)
        self.to_empty(device="cpu")
        self._fill(generator)

    def _fill(self, generator: torch.Generator) -> None:
        scale = 0.02 / (2 * self.config.layers) ** 0.5
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "norm" in name:
                    p.fill_(1.0 if name.endswith("weight") else 0.0)
                elif name.endswith("bias"):
                    p.zero_()
                else:
                    # Layers that write into the residual stream start smaller, so that its variance does not grow with depth.
                    p.normal_(
                        0.0, scale if ".out." in name or ".down." in name else 0.02, generator=generator
                    )

    def hidden(self, input_ids: Tensor) -> Tensor:
        """Final hidden states [B, n, d] after the last layer norm."""
        return self._hidden(input_ids, last=False)

    def last_hidden(self, input_ids: Tensor) -> Tensor:
        """The last position's final hidden state [B, d]: the last block works on no other position's output."""
        return self._hidden(input_ids, last=True)[:, -1]

    def _hidden(self, input_ids: Tensor, *, last: bool) -> Tensor:
        n = input_ids.shape[1]
        if n > self.config.context:
            raise ValueError(f"{n} tokens, but this decoder was built for at most {self.config.context}.")
        x = self.embedding(input_ids) + self.position.weight[:n]
        mask = None
        if self.config.prefix:
            causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
            mask = torch.cat(
                [torch.ones(n, self.config.prefix, dtype=torch.bool, device=x.device), causal], dim=1
            )  # [n, p + n]
        for number, block in enumerate(self.blocks, 1):
            x = block(x, mask, last=last and number == len(self.blocks))
        return self.norm(x)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.hidden(input_ids) @ self.embedding.weight.T

    def next_logits(self, input_ids: Tensor) -> Tensor:
        """Logits [B, V] of the token after the last one; cheaper than `forward` when only that is wanted."""
        return self.last_hidden(input_ids) @ self.embedding.weight.T

    @torch.no_grad()
    def with_prefix(self, tokens: Tensor) -> Decoder:
        """A copy with a learned prefix that starts at the keys and values of `tokens` [p] run through this model.

        Starting from real activations is what makes prefix tuning stable without gradients (Malladi et al. 2023, appendix E).

        Raises:
            ValueError: `tokens` is not a list of 1 to `context` token ids, or this decoder has a prefix already.
        """
        if self.config.prefix:
            raise ValueError(
                f"this decoder has a prefix of {self.config.prefix} already: take the one without."
            )
        if tokens.dim() != 1 or not 1 <= len(tokens) <= self.config.context:
            raise ValueError(
                f"a prefix starts from 1 to {self.config.context} token ids [p], got shape {tuple(tokens.shape)}."
            )
        config = dataclasses.replace(self.config, prefix=len(tokens))
        copy = Decoder(config, generator=torch.Generator().manual_seed(0)).to(
            self.embedding.weight
        )  # device and dtype
        copy.load_state_dict(self.state_dict(), strict=False)
        x = self.embedding(tokens[None]) + self.position.weight[: len(tokens)]
        for mine, theirs in zip(self.blocks, copy.blocks, strict=True):
            assert isinstance(mine, Block) and isinstance(theirs, Block) and theirs.prefix is not None
            k, v = mine.keys_values(x)
            theirs.prefix.copy_(torch.cat([k, v]))
            x = mine(x, None)
        return copy
