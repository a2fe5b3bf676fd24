"""TinTModel against explicit SGD by autograd on GPT-2 and OPT, tensor by tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.tint.test_contract_reference import (
    FAMILIES,
    assert_updates,
    auxiliary,
    documents,
    first,
    forward,
    layers,
    mean_of_targets,
    relative,
    sgd,
    updated_names,
    weights,
)

tint = pytest.importorskip("papercore.tint")

LR = 1e-2
EXACT = {"ln_grad": "exact", "act_grad": "exact", "attn_grad": "value_only", "inner_lr": LR}


def build(model: nn.Module, **settings):
    return tint.TinTModel.from_auxiliary(model, tint.TinTConfig(**settings))


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_k_steps_are_k_steps_of_explicit_sgd(family: str, steps: int) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    out = build(model, **EXACT, n_steps=steps)(ids, mask)
    for row in range(2):
        changes, logits = sgd(model, ids[row], mask[row], updated_names(model), lr=LR, steps=steps)
        assert_updates(out.updates, row, changes)
        assert relative(out.logits[row], logits) < 1e-9
        before = forward(model, weights(model), ids[row], detach=True)
        assert relative(out.initial_logits[row], before) < 1e-12
    assert float(out.initial_loss) == pytest.approx(mean_of_targets(out.initial_logits, ids, ~mask), rel=1e-9)
    assert float(out.loss) == pytest.approx(mean_of_targets(out.logits, ids, ~mask), rel=1e-9)


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_layers_are_trained(family: str, n_layers: int, steps: int) -> None:
    model, ids, mask = auxiliary(family, seed=3), documents(1, seed=4), first(6)
    out = build(model, **EXACT, n_layers=n_layers, n_steps=steps)(ids, mask)
    changes, logits = sgd(model, ids[0], mask[0], updated_names(model, n_layers), lr=LR, steps=steps)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize("layernorm", ["none", "bias", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_norms_are_trained_as_asked(family: str, layernorm: str) -> None:
    model, ids, mask = auxiliary(family), documents(1), first(8)
    out = build(model, **EXACT, update_layernorm=layernorm, n_steps=2)(ids, mask)
    names = updated_names(model, layernorm=layernorm)
    changes, logits = sgd(model, ids[0], mask[0], names, lr=LR, steps=2)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_without_biases_the_matrices_change_as_before(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(1), first(8)
    out = build(model, **EXACT, update_bias=False, update_layernorm="none")(ids, mask)
    names = [name for name in updated_names(model, layernorm="none") if name.endswith("weight")]
    changes, logits = sgd(model, ids[0], mask[0], names, lr=LR)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_gradient_through_the_scores_is_autograd(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    settings = EXACT | {"attn_grad": "full", "update_layernorm": "all"}
    out = build(model, **settings)(ids, mask)
    names = updated_names(model, layernorm="all", queries_and_keys=True)
    for row in range(2):
        changes, logits = sgd(model, ids[row], mask[row], names, lr=LR, detach=False)
        for name, change in changes.items():
            if name.endswith(
                "k_proj.bias"
            ):  # zero in exact arithmetic: softmax does not see a shift of the scores
                assert name not in out.updates or out.updates[name][row].abs().max() < 1e-12
            else:
                assert relative(out.updates[name][row], change) < 1e-9, name
        assert relative(out.logits[row], logits) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_loss_is_the_sum_over_the_number_of_targets(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    mask[1] = first(4)[0]
    total = build(model, **EXACT)(ids, mask)
    mean = build(model, **EXACT, reduction="mean")(ids, mask)
    for row, targets in enumerate([6, 3]):  # token 0 is nobody's target
        for name, change in total.updates.items():
            assert relative(targets * mean.updates[name][row], change[row]) < 1e-9, name


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_updated_state_dict_loads_into_the_auxiliary_and_gives_the_logits(
    family: str, steps: int
) -> None:
    model, ids, mask = auxiliary(family), documents(3), first(7, 3)
    simulator = build(model, **EXACT, n_steps=steps, n_layers=2)
    out = simulator(ids, mask)
    parameters = dict(model.named_parameters())
    for row in range(3):
        tuned = copy.deepcopy(model)
        tuned.load_state_dict(simulator.updated_state_dict(out, index=row), strict=True)
        with torch.no_grad():
            assert relative(tuned(ids[row : row + 1]).logits[0], out.logits[row]) < 1e-9
        for name, parameter in tuned.named_parameters():
            if name in out.updates:
                assert out.updates[name].shape == (3, *parameters[name].shape)
                torch.testing.assert_close(
                    parameter, parameters[name] + out.updates[name][row], rtol=0, atol=0
                )
            else:
                assert torch.equal(parameter, parameters[name]), name
    default = simulator.updated_state_dict(out)
    for name, value in simulator.updated_state_dict(out, index=0).items():
        assert torch.equal(default[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_change_in_the_orientation_of_the_auxiliary(family: str) -> None:
    """A one-step change is a sum of outer products: its rows and columns are the layer's inputs and output gradients, not the reverse."""
    model, ids, mask = auxiliary(family), documents(1), first(3)
    out = build(model, **EXACT)(ids, mask)
    last = layers(model) - 1
    if family == "gpt2":  # Conv1D: [in, out]
        mlp, shape, v = (
            f"transformer.h.{last}.mlp.c_fc.weight",
            (1, 16, 64),
            f"transformer.h.{last}.attn.c_attn.weight",
        )
        assert out.updates[v].shape == (1, 16, 48)
        assert not out.updates[v][..., :32].any() and out.updates[v][..., 32:].any()
        assert not out.updates[v.replace("weight", "bias")][..., :32].any()
    else:  # Linear: [out, in]
        mlp, shape = f"model.decoder.layers.{last}.fc1.weight", (1, 64, 16)
    assert out.updates[mlp].shape == shape
    assert int(torch.linalg.matrix_rank(out.updates[mlp][0], rtol=1e-9)) == 2  # tokens 1 and 2 are targets


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_embeddings_and_head_are_never_updated(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    for settings in (EXACT, {"inner_lr": LR, "update_layernorm": "all"}):
        out = build(model, **settings)(ids, mask)
        forbidden = ("q_proj", "k_proj", "wte", "wpe", "embed", "lm_head")
        assert not [name for name in out.updates if any(part in name for part in forbidden)]
        assert set(out.updates) <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_auxiliary_and_the_global_generator_are_left_alone(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    before, wants = weights(model), [p.requires_grad for p in model.parameters()]
    kept_ids, kept_mask, state = ids.clone(), mask.clone(), torch.get_rng_state()
    simulator = build(model, n_steps=2, inner_lr=LR, update_layernorm="all")
    first_run = simulator(ids, mask)
    again = simulator(ids, mask)
    tint.dynamic_eval(model, ids, mask, lr=LR, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [p.requires_grad for p in model.parameters()] == wants and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(ids, kept_ids) and torch.equal(mask, kept_mask)
    assert torch.equal(first_run.logits, again.logits)
    assert not first_run.logits.requires_grad and not any(t.requires_grad for t in first_run.updates.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_simulator_refers_to_the_auxiliary_and_holds_no_copy(family: str) -> None:
    model, ids, mask = auxiliary(family), documents(1), first(7)
    simulator = build(model, **EXACT)
    simulator(ids, mask)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    changes, logits = sgd(model, ids[0], mask[0], updated_names(model), lr=LR)
    out = simulator(ids, mask)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize("switch", ["ln_grad", "act_grad"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_error_of_finite_differences_halves_with_their_step(family: str, switch: str) -> None:
    if (family, switch) == (
        "opt",
        "act_grad",
    ):  # relu has no curvature: its differences are exact until a unit straddles 0
        family = "gpt2"
    model, ids, mask = auxiliary(family), documents(1), first(7)
    exact = build(model, **EXACT)(ids, mask).updates

    def error(eps: float, kind: str) -> float:
        settings = EXACT | {switch: kind, "fd_eps": eps}
        found = build(model, **settings)(ids, mask).updates
        return sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5

    for eps in (1e-3, 1e-4):
        assert 1.9 < error(eps, "finite_difference") / error(eps / 2, "finite_difference") < 2.1
    assert 3.8 < error(2e-2, "central") / error(1e-2, "central") < 4.2
    assert error(1e-2, "central") < error(1e-2, "finite_difference")


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("relative_step", [False, True])
def test_the_default_switches_point_the_same_way_as_autograd(
    family: str, relative_step: bool, steps: int
) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    settings = {"inner_lr": 1e-3, "fd_eps": 1e-3 if relative_step else 1e-2, "fd_relative": relative_step}
    out = build(model, **settings, update_layernorm="all", n_steps=steps)(ids, mask)
    for row in range(2):
        names = updated_names(model, layernorm="all")
        changes, _ = sgd(model, ids[row], mask[row], names, lr=1e-3, steps=steps)
        for name, change in changes.items():
            cosine = nn.functional.cosine_similarity(
                out.updates[name][row].flatten(), change.flatten(), dim=0
            )
            assert float(cosine) > 0.999, name


@pytest.mark.parametrize("other", ["literal", "dual"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [EXACT, {"inner_lr": LR}, {"inner_lr": LR, "update_layernorm": "all"}])
def test_backends_agree(family: str, settings: dict, other: str) -> None:
    model, ids, mask = auxiliary(family), documents(2), first(7, 2)
    fused = build(model, **settings, n_steps=2, n_layers=2, backend="fused")(ids, mask)
    try:
        config = tint.TinTConfig(**settings, n_steps=2, n_layers=2, backend=other)
    except ValueError as refused:
        if other == "literal":
            raise
        assert "fused" in str(refused) and "literal" in str(refused)  # the allowed ones are named
        return
    found = tint.TinTModel.from_auxiliary(model, config)(ids, mask)
    assert set(found.updates) == set(fused.updates)
    for row in range(2):
        for name, change in fused.updates.items():
            assert relative(found.updates[name][row], change[row]) < 1e-10, name
    for field in ("logits", "initial_logits", "loss", "initial_loss"):
        torch.testing.assert_close(getattr(found, field), getattr(fused, field), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("stack", [4, 8, 16])
def test_how_many_rows_a_prefix_token_carries_changes_nothing(stack: int) -> None:
    model, ids, mask = auxiliary("gpt2", n_layer=1), documents(1), first(7)
    out = build(model, **EXACT, stack=stack, backend="literal")(ids, mask)
    changes, logits = sgd(model, ids[0], mask[0], updated_names(model), lr=LR)
    assert_updates(out.updates, 0, changes)
    assert relative(out.logits[0], logits) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_keeps_to_float64(family: str) -> None:
    ids, mask = documents(2), first(7, 2)
    exact = build(auxiliary(family), **EXACT)(ids, mask)
    rounded = build(auxiliary(family, dtype=torch.float32), **EXACT)(ids, mask)
    assert rounded.logits.dtype == torch.float32
    assert all(change.dtype == torch.float32 for change in rounded.updates.values())
    assert relative(rounded.logits.double(), exact.logits) < 1e-4
    for name, change in exact.updates.items():
        assert relative(rounded.updates[name].double(), change) < 1e-3, name


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_bear_the_names_of_the_auxiliary(family: str) -> None:
    model = auxiliary(family)
    names = {name for name, _ in build(model).named_modules()}
    assert names >= {name for name, _ in model.named_modules()}
    trained = {name.rpartition(".")[0] for name in updated_names(model)}
    assert len(trained) == 3 * 6 + 1
    for name in trained:
        for role in ("forward", "backward", "descent"):
            assert any(found.startswith(f"{name}.") and role in found for found in names), (name, role)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_backends_multiply(family: str) -> None:
    """Heads multiply tokens with prefix tokens and then with one-hot values; fused costs no more than dynamic evaluation."""
    few = {"n_layer" if family == "gpt2" else "num_hidden_layers": 1}
    model, ids, mask = auxiliary(family, **few), documents(1), first(7)
    counts = {}
    for backend in ("fused", "literal"):
        simulator = build(model, **EXACT, backend=backend)
        with FlopCounterMode(display=False) as counter:
            simulator(ids, mask)
        counts[backend] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        tint.dynamic_eval(model, ids, mask, lr=LR)
    assert counts["literal"] > 1.5 * counts["fused"] > 0
    assert counts["fused"] <= counter.get_total_flops()
