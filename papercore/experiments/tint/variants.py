"""Auxiliary models of many kinds, untrained: what the construction must bear besides the one model that the chapter trains.

Random weights are enough here: the question is whether the simulator follows the model, not what the model says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from papercore.experiments.tint.auxiliaries import new_auxiliary

if TYPE_CHECKING:
    from papercore.experiments.tint.config import QuickConfig

LARGER = 0.1  # standard deviation of first weights: with GPT-2's 0.02 a model this small is nearly linear
# Label, fields of TinyGPTConfig.
TINY: dict[str, dict[str, Any]] = {
    "GELU": {"activation": "gelu"},
    "GELU, tanh form": {"activation": "gelu_new"},
    "ReLU": {"activation": "relu"},
    "separate head": {"tied": False},
    "no biases": {"bias": False},
    "RMS norm": {"norm": "rmsnorm"},
    "gated units (SiLU)": {"gated": True, "activation": "silu"},
    "rotary positions": {"rotary": True},
    "shared key heads": {"n_kv_head": 2},
    "all of the last four": {
        "norm": "rmsnorm", "gated": True, "activation": "silu", "rotary": True, "n_kv_head": 2, "bias": False, "tied": False,
    },
}  # fmt: skip
OURS = tuple(TINY)[5:]  # beyond the paper's code: this book's extension


def tiny_variants(config: QuickConfig) -> dict[str, nn.Module]:
    """A random TinyGPT of every kind in TINY."""
    return {label: new_auxiliary(config, 0, init_std=LARGER, **fields) for label, fields in TINY.items()}


def library_variants(config: QuickConfig) -> dict[str, nn.Module]:
    """A random, tiny GPT-2, OPT and Llama of transformers. The global random state is left as it was."""
    import transformers

    vocabulary, width, layers, heads = config.words + config.names, config.width, config.layers, config.heads
    sizes: dict[str, Callable[[], nn.Module]] = {
        "GPT-2 (transformers)": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=vocabulary, n_positions=config.length, n_embd=width, n_layer=layers, n_head=heads, resid_pdrop=0.0,
                embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=LARGER, bos_token_id=0, eos_token_id=0,
            )
        ),
        "OPT (transformers)": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                vocab_size=vocabulary, max_position_embeddings=config.length, hidden_size=width, word_embed_proj_dim=width,
                ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=heads, dropout=0.0, init_std=LARGER, pad_token_id=1,
                bos_token_id=0, eos_token_id=0,
            )
        ),
        "Llama (transformers)": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary, max_position_embeddings=config.length, hidden_size=width, intermediate_size=2 * width,
                num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2, initializer_range=LARGER,
                pad_token_id=None, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
            )
        ),
    }  # fmt: skip
    out: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        for number, (label, make) in enumerate(sizes.items()):
            torch.manual_seed(1000 * config.seed + number)
            out[label] = make().eval().to(config.torch_device())
    return out
