"""A small pre-LN decoder of our own: the auxiliary model that TinT simulates where no library is installed.

One class covers the parts that the simulated models differ in: layer norm or RMS norm, a plain or a gated MLP, learned or
rotary positions, as many key heads as query heads or fewer. Its tensors are named as GPT-2 names them, with the
projections of attention apart (h.0.attn.v_proj.weight), each in nn.Linear's orientation [D_out, D_in].

Glossary (code name, symbol in arXiv 2307.01189, shape):
    n_embd          D    width of the residual stream
    n_head          H    query heads; n_kv_head key and value heads, each read by n_head / n_kv_head query heads
    n_layer         L    blocks
    n_positions     T    longest input
    input_ids            [B, T] integers
    attention_mask       [B, T], True where a token may be read; or [B, T, T], True where row t may read column s
    detach_scores        attention probabilities are constants of the backward pass (section 2.5 of the paper: TinT sends
                         gradients through the values alone)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class TinyGPTConfig:
    """Sizes and parts of a TinyGPT.

    Raises:
        ValueError: a size below one, a head count that does not divide the width, an unknown name.
    """

    vocab_size: int = 32
    n_positions: int = 96
    n_layer: int = 2
    n_embd: int = 48
    n_head: int = 6
    n_kv_head: int | None = None  # None: as many as n_head
    n_inner: int | None = None  # None: 4 * n_embd
    activation: str = "gelu_new"
    norm: str = "layernorm"  # or "rmsnorm" (a scale and no bias)
    norm_eps: float = 1e-5
    gated: bool = False  # MLP(x) = fc_out(f(fc_gate(x)) * fc_in(x))
    rotary: bool = False  # rotary positions in place of the table wpe
    rope_theta: float = 10_000.0
    bias: bool = True  # biases in the linear layers
    tied: bool = True  # the head is the embedding table
    init_std: float = 0.02
    model_type: str = "tiny_gpt"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head"):
            if getattr(self, name) < 1:
                raise ValueError(f"TinyGPTConfig: {name} must be at least 1, given {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"TinyGPTConfig: n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.kv_heads < 1 or self.n_head % self.kv_heads:
            raise ValueError(
                f"TinyGPTConfig: n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}"
            )
        if self.rotary and self.head_size % 2:
            raise ValueError(
                f"TinyGPTConfig: rotary positions turn pairs of coordinates, and a head has {self.head_size}; "
                "choose n_embd / n_head even"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"TinyGPTConfig: activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        if self.norm not in ("layernorm", "rmsnorm"):
            raise ValueError(f"TinyGPTConfig: norm {self.norm!r} is not one of layernorm, rmsnorm")

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def inner(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class TinyGPTOutput:
    """logits [B, T, vocabulary]; loss [] in nats a token where labels were given."""

    logits: Tensor
    loss: Tensor | None = None


Angles = tuple[Tensor, Tensor]  # cosine and sine, [B, T, head_size] each


def _empty(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    # Without the library's own initialisation, which would draw from the global random state.
    return nn.utils.skip_init(kind, *args, **kwargs)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of each head as Llama does. x [B, H, T, d]; cos, sin [B, T, d] -> [B, H, T, d]."""
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


class TinyAttention(nn.Module):
    """Causal softmax attention with its four projections apart."""

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.n_embd, config.kv_heads * config.head_size
        self.q_proj = _empty(nn.Linear, width, width, bias=config.bias)
        self.k_proj = _empty(nn.Linear, width, kv_width, bias=config.bias)
        self.v_proj = _empty(nn.Linear, width, kv_width, bias=config.bias)
        self.out_proj = _empty(nn.Linear, width, width, bias=config.bias)

    def forward(
        self, x: Tensor, readable: Tensor | None, angles: Angles | None, detach_scores: bool
    ) -> Tensor:
        """x [B, T, D], readable [B, 1, T, T] or None (causal), angles for rotate or None -> [B, T, D]."""
        config = self.config
        batch, length, width = x.shape
        q = self.q_proj(x).view(batch, length, config.n_head, -1).transpose(1, 2)  # [B, H, T, d]
        k = self.k_proj(x).view(batch, length, config.kv_heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, config.kv_heads, -1).transpose(1, 2)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if config.kv_heads != config.n_head:
            k, v = (t.repeat_interleave(config.n_head // config.kv_heads, dim=1) for t in (k, v))
        if detach_scores:
            if readable is None:
                readable = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            scores = q @ k.transpose(-1, -2) / math.sqrt(config.head_size)
            # The lowest number and not -inf: a padded row that may read nothing stays finite.
            scores = scores.masked_fill(~readable, torch.finfo(scores.dtype).min)
            mixed = scores.softmax(dim=-1).detach() @ v
        elif readable is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            penalty = torch.zeros(readable.shape, dtype=q.dtype, device=q.device)
            penalty = penalty.masked_fill(~readable, torch.finfo(q.dtype).min)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=penalty)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class TinyMLP(nn.Module):
    """fc_out(f(fc_in(x))), or fc_out(f(fc_gate(x)) * fc_in(x)) where gated."""

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc_in = _empty(nn.Linear, config.n_embd, config.inner, bias=config.bias)
        self.fc_gate = (
            _empty(nn.Linear, config.n_embd, config.inner, bias=config.bias) if config.gated else None
        )
        self.fc_out = _empty(nn.Linear, config.inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.fc_in(x)
        if self.fc_gate is None:
            return self.fc_out(self.activation(inner))
        return self.fc_out(self.activation(self.fc_gate(x)) * inner)


def _norm(config: TinyGPTConfig) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class TinyBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)): pre-LN."""

    def __init__(self, config: TinyGPTConfig) -> None:
        super().__init__()
        self.ln_1 = _norm(config)
        self.attn = TinyAttention(config)
        self.ln_2 = _norm(config)
        self.mlp = TinyMLP(config)

    def forward(
        self, x: Tensor, readable: Tensor | None, angles: Angles | None, detach_scores: bool
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), readable, angles, detach_scores)
        return x + self.mlp(self.ln_2(x))


class TinyGPT(nn.Module):
    """A pre-LN GPT with as many parts as the simulator knows.

    Args:
        config: sizes and parts; None for TinyGPTConfig(**sizes).
        generator: draws the first weights; None seeds one with 0. The global random state is not touched.
        sizes: fields of TinyGPTConfig, where config is None.

    Weights are normal with standard deviation init_std, those that end a branch divided by sqrt(2 L) (GPT-2);
    biases are zero and norms one.

    >>> model = TinyGPT(vocab_size=11, n_positions=8, n_embd=12, n_head=3)
    >>> model(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 11])
    """

    def __init__(
        self, config: TinyGPTConfig | None = None, *, generator: torch.Generator | None = None, **sizes: Any
    ) -> None:
        super().__init__()
        if config is not None and sizes:
            raise ValueError(f"TinyGPT: given a config and also {', '.join(sizes)}; put them in the config")
        self.config = config = TinyGPTConfig(**sizes) if config is None else config
        self.wte = _empty(nn.Embedding, config.vocab_size, config.n_embd)
        self.wpe = None if config.rotary else _empty(nn.Embedding, config.n_positions, config.n_embd)
        self.h = nn.ModuleList(TinyBlock(config) for _ in range(config.n_layer))
        self.ln_f = _norm(config)
        self.lm_head = (
            None if config.tied else _empty(nn.Linear, config.n_embd, config.vocab_size, bias=False)
        )
        half = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        self.inv_freq = nn.Buffer(config.rope_theta**-half, persistent=False)  # [head_size / 2]
        self._initialise(torch.Generator().manual_seed(0) if generator is None else generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if ".ln_" in name or name.startswith("ln_f"):
                continue
            if name.endswith(".bias"):
                parameter.zero_()
                continue
            ends_a_branch = name.endswith(("attn.out_proj.weight", "mlp.fc_out.weight"))
            std = self.config.init_std / (math.sqrt(2 * self.config.n_layer) if ends_a_branch else 1.0)
            parameter.normal_(0.0, std, generator=generator)

    @property
    def n_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        detach_scores: bool = False,
    ) -> TinyGPTOutput:
        """Logits of the next token.

        Args:
            input_ids: [B, T] integers below vocab_size.
            attention_mask: [B, T] or [B, T, T], True or 1 where a token may be read. None: all of them.
            labels: [B, T]; position t - 1 is scored against labels[t], -100 is passed over. The loss is the mean in nats.
            position_ids: [B, T] or [1, T]; None counts from 0, padding included.
            detach_scores: attention probabilities are constants of the backward pass.

        Raises:
            ValueError: an input longer than n_positions, or a mask of another shape.
        """
        if input_ids.ndim != 2:
            raise ValueError(
                f"TinyGPT: input_ids must be [batch, length], given shape {tuple(input_ids.shape)}"
            )
        batch, length = input_ids.shape
        if length > self.config.n_positions:
            raise ValueError(
                f"TinyGPT: {length} tokens are more than n_positions={self.config.n_positions}; cut the input"
            )
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        readable = readable_pairs(attention_mask, batch, length, input_ids.device)
        x = self.wte(input_ids)
        if self.wpe is not None:
            x = x + self.wpe(position_ids)
        angles = None
        if self.config.rotary:
            # In float32 at least: half precision has no fraction left at positions of thousands.
            dtype = torch.promote_types(x.dtype, torch.float32)
            angle = position_ids[..., None].to(dtype) * self.inv_freq.to(dtype)
            angle = torch.cat([angle, angle], dim=-1)
            angles = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.h:
            x = block(x, readable, angles, detach_scores)
        x = self.ln_f(x)
        logits = F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)
        if labels is None:
            return TinyGPTOutput(logits)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        return TinyGPTOutput(logits, loss)


def readable_pairs(
    attention_mask: Tensor | None, batch: int, length: int, device: torch.device
) -> Tensor | None:
    """Which token may read which: [B or 1, 1, T, T] bool, or None where the causal order alone decides."""
    if attention_mask is None:
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if attention_mask.shape == (batch, length):
        return (attention_mask.bool()[:, None, :] & causal)[:, None]
    if attention_mask.shape in ((batch, length, length), (1, length, length)):
        return (attention_mask.bool() & causal)[:, None]
    raise ValueError(
        f"attention_mask must be [{batch}, {length}] or [{batch}, {length}, {length}], "
        f"given shape {tuple(attention_mask.shape)}"
    )
