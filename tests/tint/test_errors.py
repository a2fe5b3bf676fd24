"""Every refusal of the specification, by its text."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from papercore.tint import TinTModel, dynamic_eval
from tests.tint.auxiliaries import auxiliary, build, documents, first


def tint(**settings) -> TinTModel:
    return build(auxiliary("tiny_gpt"), **settings)


IDS, MASK = documents(2), first(5, 9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stack": 5}, ["stack = 5", "d_model = 16", "4 or 8"]),
        ({"heads": 5}, ["heads = 5", "64", "4 or 8"]),
        ({"n_layers": 4}, ["n_layers = 4", "3 layers", "1 to 3"]),
        ({"mlp_chunks": 3}, ["mlp_chunks = 3", "64"]),
    ],
)
def test_settings_that_do_not_fit_the_auxiliary(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        tint(**settings)
    for word in words:
        assert word in str(refused.value)


def test_a_config_of_another_kind() -> None:
    with pytest.raises(TypeError, match="config is dict: expected a TinTConfig"):
        TinTModel.from_auxiliary(auxiliary("tiny_gpt"), {"stack": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("switch", ["ln_grad", "act_grad"])
def test_half_precision_with_differences(dtype: torch.dtype, switch: str) -> None:
    settings = {"ln_grad": "exact", "act_grad": "exact"} | {switch: "central"}
    with pytest.raises(ValueError, match=rf"{dtype}.*model\.float\(\) \(float32\).*ln_grad='exact'"):
        build(auxiliary("tiny_gpt", dtype=dtype), **settings)
    model = auxiliary("tiny_gpt", dtype=torch.float32)
    simulator = build(model, **settings)
    model.to(dtype)  # later, behind the simulator's back
    with pytest.raises(ValueError, match=str(dtype)):
        simulator(IDS, MASK)


def test_a_difference_that_float32_rounds_away() -> None:
    model = auxiliary("tiny_gpt", dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"fd_eps = 1e-06 in float32.*at least 0.1 relative"):
        build(model, fd_eps=1e-6)
    build(model, fd_eps=1e-5)
    build(model, fd_eps=1e-6, ln_grad="exact", act_grad="exact")
    tint(fd_eps=1e-6)  # float64


def test_dropout_in_training_mode() -> None:
    model = auxiliary("gpt2")
    simulator = build(model)
    model.train()
    for call in (
        lambda: build(model),
        lambda: simulator(IDS, MASK),
        lambda: dynamic_eval(model, IDS, MASK, lr=1.0),
    ):
        with pytest.raises(
            ValueError, match=r"training mode and drops units out .*drop.*: .*model\.eval\(\)"
        ):
            call()
    build(auxiliary("tiny_gpt").train())(IDS, MASK)  # nothing to drop


def run(kind: str):
    model = auxiliary("tiny_gpt")
    return (
        build(model, inner_lr=1e-4)
        if kind == "tint"
        else lambda *a, **k: dynamic_eval(model, *a, lr=1e-4, **k)
    )


CALLS = [
    ({"input_ids": IDS[0]}, ValueError, ["input_ids", "(14,)", "[batch, length]"]),
    ({"input_ids": IDS.float()}, ValueError, ["input_ids", "torch.float32"]),
    ({"input_ids": [[1, 2]]}, TypeError, ["input_ids is list"]),
    ({"input_ids": IDS[:, :1]}, ValueError, ["two tokens", "(2, 1)"]),
    ({"input_ids": IDS + 13}, ValueError, ["input_ids from", "expected 0 to 12", "vocabulary"]),
    ({"input_ids": IDS - 13}, ValueError, ["input_ids from -13", "vocabulary"]),
    ({"input_ids": documents(2, length=21)}, ValueError, ["21 tokens", "20 positions"]),
    ({"train_mask": MASK.long()}, ValueError, ["train_mask is torch.int64", "torch.bool"]),
    ({"train_mask": MASK[:, :-1]}, ValueError, ["train_mask has shape (2, 13)", "(2, 14)"]),
    ({"train_mask": MASK[0]}, ValueError, ["train_mask has shape (14,)"]),
    ({"train_mask": [[True]]}, TypeError, ["train_mask is list"]),
    ({"train_mask": first(14, 14)}, ValueError, ["train_mask is True everywhere in document 0", "evaluate"]),
    ({"train_mask": first(5, 14)}, ValueError, ["train_mask is True everywhere in document 1"]),
    ({"gradient_mask": MASK.float()}, ValueError, ["gradient_mask is torch.float32"]),
    ({"gradient_mask": MASK[:1]}, ValueError, ["gradient_mask has shape (1, 14)"]),
    ({"attention_mask": torch.ones(2, 13).long()}, ValueError, ["attention_mask has shape (2, 13)"]),
    ({"attention_mask": torch.ones(2, 14)}, ValueError, ["attention_mask is torch.float32"]),
    ({"attention_mask": torch.ones(2, 14, 13).bool()}, ValueError, ["(2, 14, 13)", "(2, 14, 14)"]),
    ({"position_ids": torch.arange(13)[None]}, ValueError, ["position_ids", "(1, 13)", "(2, 14)"]),
    ({"position_ids": torch.arange(14)[None] + 7}, ValueError, ["position_ids from 7 to 20", "0 to 19"]),
    ({"position_ids": torch.arange(14)[None] - 1}, ValueError, ["position_ids from -1"]),
    ({"labels": IDS[:, :5]}, ValueError, ["labels", "(2, 5)"]),
    ({"labels": IDS.double()}, ValueError, ["labels is torch.float64"]),
    ({"labels": IDS + 7}, ValueError, ["labels (other than -100) from", "0 to 12"]),
    ({"labels": IDS.masked_fill(~MASK, -100)}, ValueError, ["document 0 has no test targets", "-100"]),
    ({"labels": torch.full_like(IDS, -100)}, ValueError, ["document 0 has no test targets"]),
    ({"train_mask": ~first(1, 1)}, ValueError, ["document 0 has no test targets", "token 0"]),
    ({"attention_mask": first(5, 9)}, ValueError, ["train_mask is True everywhere in document 0"]),
]


@pytest.mark.parametrize("kind", ["tint", "dynamic"])
@pytest.mark.parametrize(("changes", "error", "words"), CALLS)
def test_calls_that_are_refused(kind: str, changes: dict, error: type, words: list[str]) -> None:
    call = {"input_ids": IDS, "train_mask": MASK} | changes
    with pytest.raises(error) as refused:
        run(kind)(call.pop("input_ids"), call.pop("train_mask"), **call)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("kind", ["tint", "dynamic"])
def test_one_training_token_is_no_target(kind: str) -> None:
    with pytest.warns(
        UserWarning, match=r"documents \[1\] have training tokens but no training target.*2 tokens"
    ):
        output = run(kind)(IDS, first(5, 1))
    assert torch.equal(output.logits[1], output.initial_logits[1])
    assert not torch.equal(output.logits[0], output.initial_logits[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(kind)(IDS, first(0, 2))


def test_a_step_that_is_too_big() -> None:
    with pytest.warns(
        UserWarning, match=r"nats: inner_lr = 100.0 is too big \(the loss is summed over 8 targets: try 12\)"
    ):
        tint(inner_lr=100.0)(IDS, MASK)
    with pytest.warns(UserWarning, match=r"inner_lr = 100.0 is too big \(lower it\)"):
        tint(inner_lr=100.0, reduction="mean")(IDS, MASK)
    with pytest.warns(UserWarning, match=r"nats: lr = 100.0 is too big"):
        dynamic_eval(auxiliary("tiny_gpt"), IDS, MASK, lr=100.0)


def test_a_loss_that_is_no_number() -> None:
    model = auxiliary("tiny_gpt")
    with pytest.warns(UserWarning, match="to nan nats"):
        build(model, inner_lr=1e200, n_steps=3)(IDS, MASK)


def test_a_document_that_is_not_there() -> None:
    simulator = tint(inner_lr=1e-4)
    output = simulator(IDS, MASK)
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"index = {index}: the output has 2 documents"):
            simulator.updated_state_dict(output, index)
    last, same = (simulator.updated_state_dict(output, index) for index in (1, -1))
    assert all(torch.equal(last[name], same[name]) for name in last)


def test_a_refused_call_leaves_nothing_behind() -> None:
    model = auxiliary("tiny_gpt")
    before = copy.deepcopy(model.state_dict())
    simulator = build(model, inner_lr=1e-3)
    expected = simulator(IDS, MASK)
    with pytest.raises(ValueError):
        simulator(IDS, first(14, 14))
    again = simulator(IDS, MASK)
    assert torch.equal(again.logits, expected.logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
