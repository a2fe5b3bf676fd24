"""The simulator's steps against SGD by autograd on the auxiliary's own forward pass, switch by switch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from papercore.tint import TinTConfig, TinTModel, dynamic_eval
from tests.tint.auxiliaries import (
    EXACT,
    KINDS,
    TINY,
    assert_same_updates,
    auxiliary,
    build,
    documents,
    first,
    relative,
)

LR = 1e-3


def sgd(
    model: nn.Module, ids: Tensor, trained: Tensor, names: list[str], *, lr: float = LR, steps: int = 1, **how
) -> tuple[dict[str, Tensor], Tensor]:
    """(changes of the named parameters, logits afterwards) of one document [T], by autograd on the model itself."""
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    now = {name: start[name].clone() for name in names}
    for _ in range(steps):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in now.items()}
        logits = functional_call(model, leaves, (ids[None],), how).logits[0]
        losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
        gradients = torch.autograd.grad(losses[trained[1:]].sum(), list(leaves.values()), allow_unused=True)
        for (name, tensor), gradient in zip(now.items(), gradients, strict=True):
            if gradient is not None:
                now[name] = tensor - lr * gradient
    with torch.no_grad():
        after = functional_call(model, now, (ids[None],)).logits[0]
    return {name: now[name] - start[name] for name in names}, after


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("kind", ["gpt2", "opt", *TINY])
def test_with_every_switch_exact_it_is_sgd_on_the_model(kind: str, steps: int) -> None:
    model, ids, mask = auxiliary(kind), documents(3), first(5, 9, 0)
    tint = build(model, **EXACT, attn_grad="full", update_layernorm="all", inner_lr=LR, n_steps=steps)
    output = tint(ids, mask)
    for row in range(3):
        changes, logits = sgd(model, ids[row], mask[row], list(output.updates), steps=steps)
        assert_same_updates({n: u[row] for n, u in output.updates.items()}, changes, 1e-9)
        torch.testing.assert_close(output.logits[row], logits, rtol=0, atol=1e-11)
    assert output.updates.keys() == {
        name
        for name, _ in model.named_parameters()
        if not any(x in name for x in ("wte", "wpe", "embed", "lm_head"))
    }


def test_llama_of_transformers() -> None:
    """Its norm computes in float32 whatever the dtype, so that the truth is no better than that."""
    model, ids, mask = auxiliary("llama"), documents(2), first(5, 9)
    output = build(model, **EXACT, attn_grad="full", update_layernorm="all", inner_lr=LR, n_steps=2)(
        ids, mask
    )
    for row in range(2):
        changes, _ = sgd(model, ids[row], mask[row], list(output.updates), steps=2)
        assert_same_updates({n: u[row] for n, u in output.updates.items()}, changes, 1e-4)


@pytest.mark.parametrize(("n_layers", "steps"), list(itertools.product([1, 2, 3], [1, 2, 4])))
@pytest.mark.parametrize("kind", TINY)
def test_steps_and_layers_with_constant_scores(kind: str, n_layers: int, steps: int) -> None:
    model, ids, mask = auxiliary(kind), documents(2), first(5, 9)
    settings = {"n_layers": n_layers, "update_layernorm": "all", "inner_lr": LR, "n_steps": steps}
    output = build(model, **EXACT, **settings)(ids, mask)
    assert min(int(name.split(".")[1]) for name in output.updates if name.startswith("h.")) == 3 - n_layers
    for row in range(2):
        changes, logits = sgd(
            model, ids[row], mask[row], list(output.updates), steps=steps, detach_scores=True
        )
        assert_same_updates({n: u[row] for n, u in output.updates.items()}, changes, 1e-9)
        torch.testing.assert_close(output.logits[row], logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_point_where_the_gradient_points(kind: str) -> None:
    model, ids, mask = auxiliary(kind, dtype=torch.float32), documents(2), first(5, 9)
    # relative: these random models have gradients of the size of 10, on which a fixed epsilon of 1e-2 is long
    output = build(model, inner_lr=LR, update_layernorm="all", fd_relative=True, fd_eps=1e-3)(ids, mask)
    truth = dynamic_eval(model, ids, mask, lr=LR, update_layernorm="all")
    for name, change in truth.updates.items():
        cosine = F.cosine_similarity(output.updates[name].flatten(1), change.flatten(1))
        assert bool((cosine > 0.999).all()), (name, cosine)


@pytest.mark.parametrize("switch", ["ln_grad", "act_grad"])
def test_each_difference_has_its_order(switch: str) -> None:
    """Alone among exact parts: halving epsilon halves the error, and quarters it where the difference is central."""
    model, ids, mask = auxiliary("gpt2"), documents(1), first(9)
    truth = build(model, **EXACT, inner_lr=LR)(ids, mask).updates

    def error(how: str, eps: float) -> float:
        found = build(model, **(EXACT | {switch: how}), inner_lr=LR, fd_eps=eps)(ids, mask).updates
        return sum(float((found[name] - truth[name]).square().sum()) for name in truth) ** 0.5

    assert 1.9 < error("finite_difference", 1e-4) / error("finite_difference", 5e-5) < 2.1
    assert 3.8 < error("central", 1e-3) / error("central", 5e-4) < 4.2


@pytest.mark.parametrize("kind", ["gpt2", "opt", *TINY])
def test_chunks_of_the_mlp_change_nothing(kind: str) -> None:
    """In particular the output bias is stepped once; the official code steps it once a chunk."""
    model, ids, mask = auxiliary(kind), documents(2), first(5, 9)
    settings = {"inner_lr": LR, "update_layernorm": "all", "n_steps": 2}
    one, two, four = (build(model, **EXACT, **settings, mlp_chunks=chunks)(ids, mask) for chunks in (1, 2, 4))
    for other in (two, four):
        assert_same_updates(other.updates, one.updates, 1e-12)
        torch.testing.assert_close(other.logits, one.logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "tiny_llama"])
def test_the_literal_construction_does_the_same(kind: str) -> None:
    model, ids, mask = auxiliary(kind), documents(2), first(5, 9)
    for settings in ({}, {"attn_grad": "full", "update_layernorm": "all", **EXACT}):
        fused, literal = (
            build(model, inner_lr=LR, n_steps=2, n_layers=2, backend=backend, **settings)(ids, mask)
            for backend in ("fused", "literal")
        )
        assert_same_updates(literal.updates, fused.updates, 1e-10)
        torch.testing.assert_close(literal.logits, fused.logits, rtol=0, atol=1e-10)
        torch.testing.assert_close(literal.initial_logits, fused.initial_logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_logits_are_the_models_own(kind: str) -> None:
    model, ids = auxiliary(kind, dtype=torch.float32), documents(2)
    with torch.no_grad():
        own = model(ids).logits
    found = build(model)(ids, first(0, 0)).initial_logits
    assert relative(found, own) < 1e-6
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_tree_is_the_auxiliarys(kind: str) -> None:
    model = auxiliary(kind)
    tint = build(model)
    names = {name for name, _ in tint.named_modules()}
    assert {name for name, _ in model.named_modules()} <= names
    for block in tint.auxiliary.blocks:
        for linear in block.linears():
            assert {f"{linear.name}.{role}" for role in ("forward", "backward", "descent")} <= names
        assert {f"{block.attention_name}.{role}" for role in ("forward", "backward")} <= names
    assert type(tint.get_submodule(f"{block.value.name}.forward")).__name__ == "LinearForward"
    assert list(tint.parameters()) == [] and list(tint.buffers()) == []
    assert model not in list(tint.modules())


def test_branches_are_reached_as_the_auxiliarys_are() -> None:
    tint = build(auxiliary("tiny_gpt"))
    assert type(tint.h[1].attn.v_proj.descent).__name__ == "LinearDescent"
    x = torch.ones(1, 2, 3)
    assert torch.equal(tint.h[1].attn.v_proj(x, torch.eye(3)), x)  # calling an operation calls its forward


@pytest.mark.parametrize("kind", KINDS)
def test_the_auxiliary_is_left_alone(kind: str) -> None:
    model, ids, mask = auxiliary(kind), documents(2), first(5, 9)
    before = copy.deepcopy(model.state_dict())
    output = build(model, inner_lr=LR, n_steps=2, n_layers=2)(ids, mask)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not output.logits.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_what_value_only_leaves_untouched(kind: str) -> None:
    """Queries and keys, embeddings, the head, scales of norms, and the layers below, bit by bit."""
    model, ids, mask = auxiliary(kind), documents(1), first(9)
    tint = build(model, inner_lr=LR, n_layers=1, n_steps=2)
    state, start = tint.updated_state_dict(tint(ids, mask)), model.state_dict()
    assert state.keys() == start.keys()
    changed = {name for name in state if not torch.equal(state[name], start[name])}
    last = tint.auxiliary.blocks[-1]
    allowed = {f"{linear.name}.{part}" for linear in last.linears() for part in ("weight", "bias")}
    allowed |= {f"{norm.name}.bias" for norm in (last.norm_1, last.norm_2, tint.auxiliary.final_norm)}
    if kind != "gpt2":
        allowed -= {
            f"{linear.name}.{part}" for linear in (last.query, last.key) for part in ("weight", "bias")
        }
    assert changed == allowed & start.keys()
    for linear in (last.query, last.key):
        assert torch.equal(linear.part_of_weight(state[f"{linear.name}.weight"]), linear.matrix())


@pytest.mark.parametrize("kind", KINDS)
def test_the_updated_weights_give_the_logits(kind: str) -> None:
    model, ids, mask = auxiliary(kind), documents(3), first(5, 9, 7)
    tint = build(model, inner_lr=LR, update_layernorm="all")
    output = tint(ids, mask)
    tolerance = 1e-4 if kind == "llama" else 1e-11
    for row in range(3):
        tuned = copy.deepcopy(model)
        tuned.load_state_dict(tint.updated_state_dict(output, row))
        with torch.no_grad():
            torch.testing.assert_close(
                tuned(ids[row : row + 1]).logits[0], output.logits[row], rtol=0, atol=tolerance
            )


@pytest.mark.parametrize("update_layernorm", ["none", "bias", "all"])
@pytest.mark.parametrize("update_bias", [True, False])
def test_which_tensors_are_trained(update_layernorm: str, update_bias: bool) -> None:
    tint = build(
        auxiliary("tiny_gpt"), n_layers=1, update_layernorm=update_layernorm, update_bias=update_bias
    )
    names = set(tint(documents(1), first(5)).updates)
    linear = [f"h.2.{m}" for m in ("attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out")]
    expected = {f"{name}.weight" for name in linear}
    expected |= {f"{name}.bias" for name in linear if update_bias}
    for norm in ("h.2.ln_1", "h.2.ln_2", "ln_f"):
        expected |= {f"{norm}.bias"} if update_layernorm != "none" else set()
        expected |= {f"{norm}.weight"} if update_layernorm == "all" else set()
    assert names == expected


def test_the_sum_is_n_times_the_mean() -> None:
    model, ids, mask = auxiliary("opt"), documents(2), first(5, 9)
    total, mean = (
        build(model, **EXACT, inner_lr=LR, reduction=r)(ids, mask).updates for r in ("sum", "mean")
    )
    for name, change in total.items():
        for row, n in enumerate((4, 8)):
            assert relative(n * mean[name][row], change[row]) < 1e-12, name


@pytest.mark.parametrize("loss", ["quadratic", "linear"])
def test_other_losses_at_the_output(loss: str) -> None:
    model, ids, mask = auxiliary("tiny_opt"), documents(1), first(9)
    output = build(model, **EXACT, attn_grad="full", inner_lr=1e-4, loss=loss)(ids, mask)
    leaves = {name: model.get_parameter(name) for name in output.updates}
    logits = model(ids).logits[0, :8]
    hot = F.one_hot(ids[0, 1:9], 13)
    if loss == "quadratic":
        value = 0.5 * (logits - hot).square().sum()
    else:
        value = (logits.mean(-1) - (logits * hot).sum(-1)).sum()
    gradients = torch.autograd.grad(value, list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert relative(output.updates[name][0], -1e-4 * gradient) < 1e-9, name


def test_attention_computed_again_is_the_same() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(2), first(5, 9)
    kept, again = (
        build(model, inner_lr=LR, n_steps=2, recompute_attention=flag)(ids, mask) for flag in (False, True)
    )
    assert_same_updates(again.updates, kept.updates, 1e-12)


def test_a_head_with_a_bias() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(9)
    model.lm_head = nn.Linear(16, 13).double()
    torch.nn.init.normal_(model.lm_head.bias, generator=torch.Generator().manual_seed(0))
    output = build(model, **EXACT, attn_grad="full", inner_lr=LR)(ids, mask)
    changes, logits = sgd(model, ids[0], mask[0], list(output.updates))
    assert_same_updates({n: u[0] for n, u in output.updates.items()}, changes, 1e-9)
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-11)


def test_half_precision_with_exact_gradients() -> None:
    model, ids, mask = auxiliary("tiny_gpt", dtype=torch.bfloat16), documents(1), first(9)
    found = build(model, **EXACT, inner_lr=LR)(ids, mask)
    assert found.logits.dtype == torch.bfloat16
    truth = build(copy.deepcopy(model).double(), **EXACT, inner_lr=LR)(ids, mask)
    for name, change in truth.updates.items():
        cosine = F.cosine_similarity(found.updates[name].double().flatten(), change.flatten(), dim=0)
        assert float(cosine) > 0.99, name


def test_no_config_is_the_default() -> None:
    assert TinTModel.from_auxiliary(auxiliary("tiny_gpt")).config == TinTConfig()


def test_the_norms_scale_is_a_vector() -> None:
    """The official descent writes off the diagonal too; ours is autograd's change, of the parameter's own shape."""
    model, ids, mask = auxiliary("gpt2"), documents(1), first(9)
    output = build(model, **EXACT, attn_grad="full", update_layernorm="all", inner_lr=LR)(ids, mask)
    name = "transformer.h.1.ln_2.weight"
    assert output.updates[name].shape == (1, 16)
    changes, _ = sgd(model, ids[0], mask[0], [name])
    assert relative(output.updates[name][0], changes[name]) < 1e-9
