"""Other auxiliaries: the small GPT in all its parts and Llama, by autograd through their own forward pass; GPT-2 and OPT of other shapes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.tint.test_contract_reference import (
    POSITIONS,
    VOCABULARY,
    assert_updates,
    auxiliary,
    documents,
    first,
    relative,
    target_losses,
    updated_names,
)
from tests.tint.test_contract_reference import sgd as reference_sgd

tint = pytest.importorskip("papercore.tint")
transformers = pytest.importorskip("transformers")

LR = 1e-2
EXACT = {"ln_grad": "exact", "act_grad": "exact", "attn_grad": "value_only", "inner_lr": LR}
NEVER = ("q_proj", "k_proj", "wte", "wpe", "embed", "lm_head")

Logits = Callable[[dict[str, Tensor], Tensor], Tensor]


def build(model: nn.Module, **settings):
    return tint.TinTModel.from_auxiliary(model, tint.TinTConfig(**settings))


def shaken(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            parameter.copy_(
                1 + noise if ("ln_" in name or "norm" in name) and name.endswith("weight") else noise
            )
    return model.to(dtype).eval()


def sgd(model: nn.Module, logits_of: Logits, ids: Tensor, trained: Tensor, names: list[str], steps: int):
    """Changes and final logits of one document, by autograd through the model's own forward pass with detached scores."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    now = dict(start)
    for _ in range(steps):
        leaves = {name: now[name].clone().requires_grad_() for name in names}
        loss = (target_losses(logits_of(now | leaves, ids), ids) * trained).sum()
        for name, gradient in zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            now[name] = now[name] - LR * gradient
    return {name: now[name] - start[name] for name in names}, logits_of(now, ids)


def check(model: nn.Module, logits_of: Logits, steps: int, tol: float, **settings) -> None:
    ids, mask = documents(2), first(7, 2)
    mask[1] = first(4)[0]
    config = tint.TinTConfig(**(EXACT | {"update_layernorm": "all", "n_steps": steps} | settings))
    simulator = tint.TinTModel.from_auxiliary(model, config)
    out = simulator(ids, mask)
    names = [name for name, _ in model.named_parameters() if not any(part in name for part in NEVER)]
    assert set(out.updates) == set(names)
    for row in range(2):
        changes, logits = sgd(model, logits_of, ids[row], mask[row], names, steps)
        for name, change in changes.items():
            assert relative(out.updates[name][row], change) < tol, name
        assert relative(out.logits[row], logits.detach()) < tol
        tuned = copy.deepcopy(model)
        tuned.load_state_dict(simulator.updated_state_dict(out, index=row), strict=True)
        with torch.no_grad():
            assert relative(tuned(ids[row : row + 1]).logits[0], out.logits[row]) < tol


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("backend", ["fused", "literal"])
@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"norm": "rmsnorm"},
        {"gated": True, "activation": "silu"},
        {"rotary": True},
        {"n_kv_head": 2},
        {"bias": False},
        {"tied": False},
        {"activation": "relu", "n_inner": 32},
        {"norm": "rmsnorm", "gated": True, "rotary": True, "n_kv_head": 1, "bias": False, "tied": False},
    ],
    ids=lambda parts: "+".join(parts) or "plain",
)
def test_the_small_gpt_in_every_part(parts: dict, backend: str, steps: int) -> None:
    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_layer": 2, "n_embd": 16, "n_head": 4}
    model = shaken(tint.TinyGPT(**sizes, **parts))

    def logits_of(p: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(model, p, (ids[None],), {"detach_scores": True}).logits[0]

    check(model, logits_of, steps, 1e-9, backend=backend)


def _detached(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention as transformers calls it, causal, with detached probabilities."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    n = query.shape[2]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(hidden, -math.inf).softmax(-1).detach()
    return (shares @ value).transpose(1, 2).contiguous(), shares


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_llama(kv_heads: int) -> None:
    """Its norm is taken in float32 by transformers whatever the weights are, so float32 rounding is what can be asked."""
    transformers.AttentionInterface.register("papercore_detached", _detached)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
    )
    model = shaken(transformers.LlamaForCausalLM(config))
    differentiated = copy.deepcopy(model)
    differentiated.set_attn_implementation("papercore_detached")
    with torch.no_grad():
        ids = documents(1)
        assert (
            relative(differentiated(ids).logits, model(ids).logits) < 1e-6
        )  # the registered attention is the right one

    def logits_of(p: dict[str, Tensor], ids: Tensor) -> Tensor:
        return functional_call(differentiated, p, (ids[None],), {"use_cache": False}).logits[0]

    check(model, logits_of, 2, 1e-4)


# GPT-2 and OPT in their other shapes, against the reference


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"activation_function": "gelu"}),
        ("gpt2", {"activation_function": "relu"}),
        ("opt", {"activation_function": "gelu"}),
        ("gpt2", {"layer_norm_epsilon": 0.3}),  # read from the model, not fixed
        ("gpt2", {"n_inner": 24}),
        ("opt", {"ffn_dim": 40}),
        ("gpt2", {"n_head": 2}),
        ("gpt2", {"n_layer": 1}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("opt", {"tie_word_embeddings": False}),
    ],
)
def test_other_shapes_of_the_two_families(family: str, config: dict) -> None:
    model, ids, mask = auxiliary(family, **config), documents(1), first(7)
    out = build(model, **EXACT, n_steps=2)(ids, mask)
    with torch.no_grad():
        assert relative(out.initial_logits[0], model(ids).logits[0]) < 1e-10
    changes, logits = reference_sgd(model, ids[0], mask[0], updated_names(model), lr=LR, steps=2)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("opt", {"word_embed_proj_dim": 8}),
        ("opt", {"_remove_final_layer_norm": True}),
    ],
)
def test_rarer_shapes_are_simulated_exactly_or_refused(family: str, config: dict) -> None:
    model, ids, mask = auxiliary(family, **config), documents(1), first(7)
    try:
        simulator = build(model, **EXACT)
    except NotImplementedError as refused:
        assert str(refused)
        return
    with torch.no_grad():
        expected = model(ids).logits
    out = simulator(ids, mask)
    assert relative(out.initial_logits[0], expected[0]) < 1e-10
    tuned = copy.deepcopy(model)
    tuned.load_state_dict(simulator.updated_state_dict(out), strict=True)
    with torch.no_grad():
        assert relative(tuned(ids).logits[0], out.logits[0]) < 1e-9
