"""Prefix tuning of an encoder (section 3 and appendix): trained keys and values in front of every layer's own.

peft prepends a prefix through the key-value cache, which only causal models have. An encoder such as RoBERTa has none, so the
prefix is added where every model of transformers 5 passes by: the attention function, which a library call can exchange.

Glossary
    tokens    length of the prefix, 5 in the paper
    h, w      attention heads, width of a head
    start     keys and values that `tokens` random vocabulary tokens have in each layer ("real activations")
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "papercore_prefix"
_KEYS, _VALUES, _SEEN = "prefix_keys", "prefix_values", "_prefix_seen"


def attention_with_prefix(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention over the prefix of `module` and the tokens; queries see all of the prefix.

    Args:
        query, key, value: [batch, h, length, w].
        attention_mask: [batch, 1, queries, keys], True or 0 where a key is seen, or None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = getattr(module, _SEEN, None)
    if seen is not None:
        seen.append((key[0].detach(), value[0].detach()))
    keys = getattr(module, _KEYS, None)
    if keys is not None:
        batch = key.shape[0]
        key = torch.cat([keys.to(key).expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([getattr(module, _VALUES).to(value).expand(batch, -1, -1, -1), value], dim=2)
        if attention_mask is not None:
            visible = attention_mask.dtype == torch.bool
            attention_mask = functional.pad(attention_mask, (keys.shape[1], 0), value=float(visible))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


@torch.no_grad()
def prefix_encoder(model: nn.Module, tokens: int = 5, *, seed: int = 0) -> nn.Module:
    """Freeze `model` and give each of its attention layers a trained prefix [h, tokens, w] of keys and of values.

    Args:
        model: a masked language model of transformers; changed in place.
        seed: of the random vocabulary tokens that the prefix starts from; no global generator moves.

    Raises:
        ValueError: tokens < 1, or no attention layer of the model could be reached.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if tokens < 1:
        raise ValueError(f"a prefix of {tokens} tokens: expected at least 1.")
    AttentionInterface.register(NAME, attention_with_prefix)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config: Any = model.config
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    candidates = list(model.modules())
    for module in candidates:
        setattr(module, _SEEN, [])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=generator).to(
        next(model.parameters()).device
    )
    try:
        model.eval()(input_ids=ids)
        starts = [(module, getattr(module, _SEEN)) for module in candidates]
    finally:
        for module in candidates:
            delattr(module, _SEEN)
    model.requires_grad_(False)
    reached = [(module, seen[0]) for module, seen in starts if seen]
    if not reached:
        raise ValueError(
            f"no attention layer of {type(model).__name__} takes its attention function from transformers' registry."
        )
    for module, (keys, values) in reached:
        module.register_parameter(_KEYS, nn.Parameter(keys.clone()))
        module.register_parameter(_VALUES, nn.Parameter(values.clone()))
    return model
