"""Small auxiliary models for the tests, one of each kind that TinT simulates, with no tensor at its usual start."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from papercore.tint import TinTConfig, TinTModel, TinyGPT

VOCABULARY, POSITIONS, LENGTH = 13, 20, 14
TINY = {
    "tiny_gpt": {},
    "tiny_llama": {
        "norm": "rmsnorm",
        "gated": True,
        "rotary": True,
        "n_kv_head": 2,
        "bias": False,
        "tied": False,
        "activation": "silu",
    },
    "tiny_opt": {"activation": "relu", "tied": False, "n_inner": 40},
}
LIBRARY = ["gpt2", "opt", "llama"]
KINDS = [*TINY, *LIBRARY]
EXACT = {"ln_grad": "exact", "act_grad": "exact"}


def scramble(model: nn.Module, seed: int = 0) -> None:
    """Gains near one, everything else normal with deviation 0.3, from a seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_gain = re.search(r"(ln_\w+|norm)\.weight$", name)
            parameter.copy_(1 + 0.3 * drawn if is_gain else 0.3 * drawn)


def auxiliary(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> nn.Module:
    """A model of one kind in evaluation mode; library kinds skip the test where transformers is absent."""
    if kind in TINY:
        settings = {
            "vocab_size": VOCABULARY,
            "n_positions": POSITIONS,
            "n_embd": 16,
            "n_head": 4,
            "n_layer": 3,
        }
        model: nn.Module = TinyGPT(**(settings | TINY[kind] | changes))
    else:
        model = _library(kind, changes)
    scramble(model, seed)
    return model.to(dtype).eval()


def _library(kind: str, changes: dict) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        shared |= {"n_embd": 16, "n_head": 4, "n_layer": 3, "n_positions": POSITIONS}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(shared | changes)))
    shared |= {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3}
    shared |= {"max_position_embeddings": POSITIONS}
    if kind == "opt":
        shared |= {"ffn_dim": 64, "word_embed_proj_dim": 16}
        return transformers.OPTForCausalLM(transformers.OPTConfig(**(shared | changes)))
    shared |= {"num_key_value_heads": 2, "intermediate_size": 40}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shared | changes)))


def documents(rows: int, length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def first(*counts: int, length: int = LENGTH) -> Tensor:
    """Training masks of documents that train on their first 3, 5, ... tokens."""
    return torch.arange(length) < torch.tensor(counts)[:, None]


def build(model: nn.Module, **settings) -> TinTModel:
    return TinTModel.from_auxiliary(model, TinTConfig(**settings))


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; a tensor of rounding errors alone counts as zero."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).norm() / expected.norm().clamp(min=1e-6))


def assert_same_updates(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, change in expected.items():
        assert relative(found[name], change) < tolerance, name
