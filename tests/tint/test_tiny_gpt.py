"""The small GPT against Llama and GPT-2 of transformers, and against itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from papercore.tint import TinyGPT, TinyGPTConfig
from tests.tint.auxiliaries import TINY, auxiliary, documents


def copied(small: TinyGPT, names: dict[str, str], state: dict[str, torch.Tensor]) -> None:
    """Load tensors of another model under this one's names."""
    own = {}
    for name in small.state_dict():
        theirs = name
        for ours, other in names.items():
            theirs = theirs.replace(ours, other)
        own[name] = state[theirs]
    small.load_state_dict(own)


def test_it_is_llama_with_llamas_weights() -> None:
    llama = auxiliary("llama", dtype=torch.float32)
    small = TinyGPT(
        **TINY["tiny_llama"],
        vocab_size=13,
        n_positions=20,
        n_embd=16,
        n_head=4,
        n_layer=3,
        n_inner=40,
        norm_eps=1e-6,
    )
    names = {
        "wte": "model.embed_tokens",
        "h.": "model.layers.",
        "attn.out_proj": "self_attn.o_proj",
        ".attn.": ".self_attn.",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
        "fc_in": "up_proj",
        "fc_gate": "gate_proj",
        "fc_out": "down_proj",
        "ln_f": "model.norm",
    }
    copied(small, names, llama.state_dict())
    ids, mask = documents(2), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    torch.testing.assert_close(small(ids).logits, llama(ids).logits, rtol=1e-5, atol=1e-5)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours = small(ids, mask, position_ids=positions).logits[mask.bool()]
    theirs = llama(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_is_gpt2_with_gpt2s_weights() -> None:
    gpt2 = auxiliary("gpt2")
    state = {name.removeprefix("transformer."): tensor for name, tensor in gpt2.state_dict().items()}
    for i in range(3):
        weight, bias = state[f"h.{i}.attn.c_attn.weight"].T, state[f"h.{i}.attn.c_attn.bias"]
        for name, rows, entries in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            state[f"h.{i}.attn.{name}_proj.weight"], state[f"h.{i}.attn.{name}_proj.bias"] = rows, entries
        for ours, theirs in (("attn.out", "attn.c"), ("mlp.fc_in", "mlp.c_fc"), ("mlp.fc_out", "mlp.c_proj")):
            ours, theirs = (n if "fc" in n or n == "mlp.c_proj" else f"{n}_proj" for n in (ours, theirs))
            state[f"h.{i}.{ours}.weight"] = state[f"h.{i}.{theirs}.weight"].T
            state[f"h.{i}.{ours}.bias"] = state[f"h.{i}.{theirs}.bias"]
    small = TinyGPT(vocab_size=13, n_positions=20, n_embd=16, n_head=4, n_layer=3).double()
    copied(small, {}, state)
    ids = documents(2)
    torch.testing.assert_close(small(ids).logits, gpt2(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TINY)
def test_constant_scores_change_the_gradient_and_not_the_logits(kind: str) -> None:
    model, ids = auxiliary(kind), documents(2)
    gradients = []
    for detach in (False, True):
        model.zero_grad()
        output = model(ids, labels=ids, detach_scores=detach)
        output.loss.backward()
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(model(ids).logits, output.logits, rtol=0, atol=1e-12)
    full, stopped = gradients
    assert stopped["h.0.attn.q_proj.weight"] is None and full["h.0.attn.q_proj.weight"].norm() > 1e-3
    last = "h.2.mlp.fc_out.weight"  # nothing above it is attention
    torch.testing.assert_close(full[last], stopped[last], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", TINY)
def test_masks(kind: str) -> None:
    model, ids = auxiliary(kind), documents(2)
    every = torch.ones(2, 14, 14, dtype=torch.bool)
    torch.testing.assert_close(model(ids, every).logits, model(ids).logits, rtol=0, atol=1e-12)
    # Two halves that do not see each other are two documents.
    halves = torch.block_diag(*[torch.ones(7, 7)] * 2).bool().expand(1, 14, 14)
    positions = torch.arange(7).repeat(2)[None]
    apart = torch.cat([model(half).logits for half in ids.split(7, dim=1)], dim=1)
    torch.testing.assert_close(model(ids, halves, position_ids=positions).logits, apart, rtol=0, atol=1e-12)


def test_the_loss_is_the_mean_over_labels() -> None:
    model, ids = auxiliary("tiny_gpt"), documents(2)
    labels = ids.clone()
    labels[0, :6] = -100
    logits = model(ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, 13)
    expected = torch.cat([losses[0, 5:], losses[1]]).mean()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_the_generator_alone_decides_the_first_weights() -> None:
    before = torch.get_rng_state()
    first, again = TinyGPT(), TinyGPT(generator=torch.Generator().manual_seed(0))
    other = TinyGPT(generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.wte.weight, other.wte.weight)
    assert float(first.wte.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(first.h[0].mlp.fc_out.weight.detach().std()) == pytest.approx(
        0.01, rel=0.1
    )  # 0.02 / sqrt(2 L)


def test_sizes() -> None:
    # Tables, then a block of 12 D^2 + 13 D, then the final norm's 2 D.
    model = TinyGPT(vocab_size=32, n_positions=96, n_embd=48, n_head=6, n_layer=2)
    assert model.n_parameters == (32 + 96) * 48 + 2 * (12 * 48**2 + 13 * 48) + 2 * 48


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"n_embd": 10, "n_head": 3}, ["n_head=3", "n_embd=10"]),
        ({"n_head": 6, "n_kv_head": 4}, ["n_kv_head=4", "n_head=6"]),
        ({"n_embd": 9, "n_head": 3, "rotary": True}, ["3", "even"]),
        ({"activation": "gelo"}, ["gelo", "gelu_new"]),
        ({"norm": "batchnorm"}, ["batchnorm", "rmsnorm"]),
        ({"n_layer": 0}, ["n_layer", "0"]),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        TinyGPT(**sizes)
    for word in words:
        assert word in str(refused.value)


def test_inputs_that_do_not_fit() -> None:
    model = TinyGPT(n_positions=8)
    with pytest.raises(ValueError, match="9 tokens are more than n_positions=8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[1, 4\] or \[1, 4, 4\], given shape \(1, 3\)"):
        model(torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"given shape \(4,\)"):
        model(torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="put them in the config"):
        TinyGPT(TinyGPTConfig(), n_layer=3)
