"""The truth that papercore.tint is held against: GPT-2 and OPT written out here, and plain SGD on them by autograd.

One document at a time, float64, no module of the package: every layer is spelled out on a dictionary of tensors, so that the attention
probabilities can be detached. The tests at the end hold this truth itself against transformers.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

FAMILIES = ["gpt2", "opt"]
VOCABULARY, LENGTH, POSITIONS = 29, 12, 20


def auxiliary(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **config) -> nn.Module:
    """A tiny random GPT-2 or OPT without dropout; every tensor, biases and gains too, is far from its usual start."""
    if family == "gpt2":
        settings = {"n_embd": 16, "n_head": 4, "n_layer": 3, "n_positions": POSITIONS}
        settings |= {"vocab_size": VOCABULARY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        settings |= {"bos_token_id": 0, "eos_token_id": 0}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(settings | config)))
    else:
        settings = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 3, "ffn_dim": 64}
        settings |= {
            "max_position_embeddings": POSITIONS,
            "vocab_size": VOCABULARY,
            "word_embed_proj_dim": 16,
        }
        settings |= {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, "do_layer_norm_before": True}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**(settings | config)))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            gain = re.search(r"(ln_\w+|layer_norm)\.weight$", name)
            parameter.copy_(1 + 0.3 * drawn if gain else 0.3 * drawn)
    return model.to(dtype).eval()


def documents(rows: int, length: int = LENGTH, *, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def first(n: int, rows: int = 1, length: int = LENGTH) -> Tensor:
    """The mask of a training segment: the first n tokens of every row."""
    return (torch.arange(length) < n).expand(rows, length).clone()


def _norm(x: Tensor, p: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x_hat = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return x_hat * p[f"{name}.weight"] + p[f"{name}.bias"]


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, keep: Tensor, detach: bool) -> Tensor:
    n = len(q)
    q, k, v = (t.view(n, heads, -1).transpose(0, 1) for t in (q, k, v))
    seen = torch.ones(n, n, dtype=torch.bool).tril() & keep
    seen = seen | torch.eye(n, dtype=torch.bool)  # a padded token sees itself, so that no row is empty
    scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    shares = (scores - scores.amax(-1, keepdim=True)).exp()
    shares = shares / shares.sum(-1, keepdim=True)
    return ((shares.detach() if detach else shares) @ v).transpose(0, 1).reshape(n, -1)


_GELU = {
    "gelu_new": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "relu": lambda x: x.clamp(min=0),
}


def forward(
    model: nn.Module,
    p: dict[str, Tensor],
    ids: Tensor,
    *,
    detach: bool,
    keep: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits [T, V] of one document of these weights (names of the state dict)."""
    keep = torch.ones(len(ids), dtype=torch.bool) if keep is None else keep
    positions = torch.arange(len(ids)) if positions is None else positions
    c = model.config
    act, heads = _GELU[c.activation_function], c.num_attention_heads
    if model.config.model_type == "gpt2":
        x = p["transformer.wte.weight"][ids] + p["transformer.wpe.weight"][positions]
        for i in range(c.n_layer):
            at = f"transformer.h.{i}"
            h = _norm(x, p, f"{at}.ln_1", c.layer_norm_epsilon)
            q, k, v = (h @ p[f"{at}.attn.c_attn.weight"] + p[f"{at}.attn.c_attn.bias"]).chunk(3, -1)
            a = _attention(q, k, v, heads, keep, detach)
            x = x + a @ p[f"{at}.attn.c_proj.weight"] + p[f"{at}.attn.c_proj.bias"]
            h = _norm(x, p, f"{at}.ln_2", c.layer_norm_epsilon)
            h = act(h @ p[f"{at}.mlp.c_fc.weight"] + p[f"{at}.mlp.c_fc.bias"])
            x = x + h @ p[f"{at}.mlp.c_proj.weight"] + p[f"{at}.mlp.c_proj.bias"]
        x = _norm(x, p, "transformer.ln_f", c.layer_norm_epsilon)
    else:
        x = p["model.decoder.embed_tokens.weight"][ids]
        x = x + p["model.decoder.embed_positions.weight"][positions + 2]
        for i in range(c.num_hidden_layers):
            at = f"model.decoder.layers.{i}"
            h = _norm(x, p, f"{at}.self_attn_layer_norm", 1e-5)
            q, k, v = (
                h @ p[f"{at}.self_attn.{n}_proj.weight"].T + p[f"{at}.self_attn.{n}_proj.bias"] for n in "qkv"
            )
            a = _attention(q, k, v, heads, keep, detach)
            x = x + a @ p[f"{at}.self_attn.out_proj.weight"].T + p[f"{at}.self_attn.out_proj.bias"]
            h = _norm(x, p, f"{at}.final_layer_norm", 1e-5)
            h = act(h @ p[f"{at}.fc1.weight"].T + p[f"{at}.fc1.bias"])
            x = x + h @ p[f"{at}.fc2.weight"].T + p[f"{at}.fc2.bias"]
        x = _norm(x, p, "model.decoder.final_layer_norm", 1e-5)
    return x @ p["lm_head.weight"].T


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def target_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p(token t | tokens before it) at t; token 0 has no prediction and counts 0."""
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return torch.cat([logits.new_zeros(1), -log_p[:-1].gather(1, ids[1:, None])[:, 0]])


def mean_of_targets(logits: Tensor, ids: Tensor, counted: Tensor) -> float:
    """Mean over the counted targets of all documents together: logits [B, T, V], ids and counted [B, T]."""
    losses = torch.stack([target_losses(row, tokens) for row, tokens in zip(logits, ids, strict=True)])
    counted = counted.clone()
    counted[:, 0] = False
    return float(losses[counted].mean())


def layers(model: nn.Module) -> int:
    return model.config.num_hidden_layers


def updated_names(
    model: nn.Module, n_layers: int | None = None, *, layernorm: str = "bias", queries_and_keys: bool = False
) -> list[str]:
    """The tensors that TinT trains: the last n layers' value, output and MLP matrices with biases, layer norms as asked, final norm."""
    n_layers = layers(model) if n_layers is None else n_layers
    gpt2 = model.config.model_type == "gpt2"
    linear = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    norms, last, blocks = ["ln_1", "ln_2"], "transformer.ln_f", "transformer.h"
    if not gpt2:
        linear = ["self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"]
        norms, last = ["self_attn_layer_norm", "final_layer_norm"], "model.decoder.final_layer_norm"
        blocks = "model.decoder.layers"
        if queries_and_keys:
            linear += ["self_attn.q_proj", "self_attn.k_proj"]
    parts = {"none": [], "bias": ["bias"], "all": ["weight", "bias"]}[layernorm]
    names = []
    for i in range(layers(model) - n_layers, layers(model)):
        names += [f"{blocks}.{i}.{module}.{part}" for module in linear for part in ("weight", "bias")]
        names += [f"{blocks}.{i}.{module}.{part}" for module in norms for part in parts]
    return names + [f"{last}.{part}" for part in parts]


def sgd(
    model: nn.Module,
    ids: Tensor,
    trained: Tensor,
    names: list[str],
    *,
    lr: float,
    steps: int = 1,
    detach: bool = True,
    keep: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """(change of every named tensor, logits afterwards) of one document [T]: SGD on the summed loss of the targets t with trained[t]."""
    start = weights(model)
    now = dict(start)
    for _ in range(steps):
        leaves = {name: now[name].clone().requires_grad_() for name in names}
        logits = forward(model, now | leaves, ids, detach=detach, keep=keep, positions=positions)
        loss = (target_losses(logits, ids) * trained).sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for name, gradient in zip(names, gradients, strict=True):
            now[name] = now[name] - lr * gradient
    changes = {name: now[name] - start[name] for name in names}
    return changes, forward(model, now, ids, detach=True, keep=keep, positions=positions)


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, where b is not zero but for rounding (a key's bias has no gradient: softmax does not see it)."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).norm() / b.norm().clamp(min=1e-4))


def assert_updates(updates: dict[str, Tensor], row: int, truth: dict[str, Tensor], tol: float = 1e-9) -> None:
    """Document `row` changed as `truth` says, tensor by tensor, and nothing else changed."""
    assert set(truth) <= set(updates), f"missing: {sorted(set(truth) - set(updates))}"
    for name, change in truth.items():
        assert relative(updates[name][row], change) < tol, name
    for name in set(updates) - set(truth):
        assert not updates[name][row].any(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_model_of_transformers(family: str) -> None:
    model = auxiliary(family)
    ids = documents(2)
    theirs = model(ids).logits
    for row in range(2):
        for detach in (True, False):
            ours = forward(model, weights(model), ids[row], detach=detach)
            torch.testing.assert_close(ours, theirs[row], rtol=0, atol=1e-12)
    # torch's own cross-entropy in float64; the loss of transformers is taken in float32
    nn.functional.cross_entropy(model(ids[:1]).logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    names = updated_names(model, layernorm="all", queries_and_keys=True)
    changes, _ = sgd(model, ids[0], torch.ones(LENGTH), names, lr=1.0, detach=False)
    for name in names:
        gradient = model.get_parameter(name).grad
        assert relative(-changes[name], gradient) < 1e-10, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_causal_and_stops_at_the_scores(family: str) -> None:
    model = auxiliary(family)
    ids = documents(1)[0]
    names = updated_names(model, layernorm="all", queries_and_keys=True)
    changes, _ = sgd(model, ids, first(7)[0], names, lr=0.1)
    width = model.config.hidden_size
    for name, change in changes.items():
        if "q_proj" in name or "k_proj" in name:
            assert not change.any()
        elif "c_attn" in name:
            assert not change[..., : 2 * width].any() and change[..., 2 * width :].all()
        else:
            assert change.any()
