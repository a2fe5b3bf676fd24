"""What is refused or warned of, and that the message names what was given, what is allowed, and what to do."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.tint.test_contract_reference import (
    FAMILIES,
    LENGTH,
    POSITIONS,
    VOCABULARY,
    auxiliary,
    documents,
    first,
    weights,
)

tint = pytest.importorskip("papercore.tint")
transformers = pytest.importorskip("transformers")


def build(model: nn.Module, **settings):
    return tint.TinTModel.from_auxiliary(model, tint.TinTConfig(**settings))


def refusal(kind: type[Exception] | tuple[type[Exception], ...], call, *args, **kwargs) -> str:
    with pytest.raises(kind) as refused:
        call(*args, **kwargs)
    return str(refused.value)


def built_and_run(model: nn.Module, settings: dict) -> None:
    """Wherever the mistake is noticed: in the settings, on reading the model, or on the first call."""
    build(model, **settings)(documents(1), first(7))


@pytest.mark.parametrize("backend", ["fused", "literal"])
def test_a_width_that_does_not_stack(backend: str) -> None:
    message = refusal(ValueError, built_and_run, auxiliary("gpt2"), {"stack": 3, "backend": backend})
    assert {"16", "3"} <= set(re.findall(r"\d+", message))
    assert {"2", "4"} & set(re.findall(r"\d+", message))  # the nearest that divide 16


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("backend", "fuzed", ["fuzed", "fused", "literal"]),
        ("reduction", "average", ["average", "sum", "mean"]),
        ("ln_grad", "exakt", ["exakt", "exact", "finite_difference"]),
        ("act_grad", "autograd", ["autograd", "exact", "finite_difference"]),
        ("attn_grad", "values", ["values", "value_only", "full"]),
        ("update_layernorm", "gamma", ["gamma", "none", "bias", "all"]),
        ("stack", 0, ["stack", "0"]),
        ("stack", -4, ["stack", "-4"]),
        ("n_steps", 0, ["n_steps", "0", "1"]),
        ("n_steps", -1, ["n_steps", "-1"]),
        ("n_layers", -1, ["n_layers", "-1"]),
        ("n_layers", 4, ["n_layers", "4", "3"]),  # the model has three
        ("fd_eps", 0.0, ["fd_eps", "0"]),
        ("fd_eps", -1e-2, ["fd_eps", "-0.01"]),
        ("fd_eps", math.inf, ["fd_eps", "inf"]),
        ("fd_eps", math.nan, ["fd_eps", "nan"]),
        ("inner_lr", math.nan, ["inner_lr", "nan"]),
        ("inner_lr", math.inf, ["inner_lr", "inf"]),
        ("inner_lr", -1e-3, ["inner_lr", "-0.001"]),
    ],
)
def test_settings_out_of_range(setting: str, value: object, words: list[str]) -> None:
    message = refusal(ValueError, built_and_run, auxiliary("gpt2"), {setting: value})
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("n_steps", 1.5),
        ("n_steps", "2"),
        ("n_layers", 1.0),
        ("inner_lr", "1e-3"),
        ("fd_eps", None),
        ("stack", 2.0),
    ],
)
def test_settings_of_the_wrong_kind(setting: str, value: object) -> None:
    message = refusal((TypeError, ValueError), built_and_run, auxiliary("gpt2"), {setting: value})
    assert setting in message and str(value) in message


def test_a_setting_that_does_not_exist() -> None:
    assert "inner_learning_rate" in refusal(TypeError, tint.TinTConfig, inner_learning_rate=1e-3)


@pytest.mark.parametrize("run", ["simulated", "dynamic"])
@pytest.mark.parametrize(
    ("mask", "kind", "words"),
    [
        (first(7, length=LENGTH - 1), ValueError, [str(LENGTH - 1), str(LENGTH)]),
        (first(7, 2), ValueError, ["2", "1"]),
        (first(7)[0], ValueError, [str(LENGTH)]),
        (first(7).float(), (ValueError, TypeError), ["float32", "bool"]),
        (first(7).long(), (ValueError, TypeError), ["int64", "bool"]),
        ([True] * LENGTH, (ValueError, TypeError), ["list"]),
        (None, (ValueError, TypeError), ["None"]),
        (first(LENGTH), ValueError, ["True"]),
    ],
    ids=["short", "two rows", "one dimension", "float", "integers", "list", "none", "all true"],
)
def test_training_masks(run: str, mask: object, kind, words: list[str]) -> None:
    model, ids = auxiliary("gpt2"), documents(1)
    call = build(model) if run == "simulated" else tint.dynamic_eval
    arguments = ((ids, mask), {}) if run == "simulated" else ((model, ids, mask), {"lr": 1e-3})
    message = refusal(kind, call, *arguments[0], **arguments[1])
    assert "train_mask" in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("run", ["simulated", "dynamic"])
@pytest.mark.parametrize(
    ("ids", "kind", "words"),
    [
        (documents(1, POSITIONS + 1), ValueError, [str(POSITIONS + 1), str(POSITIONS)]),
        (
            documents(1).index_fill(1, torch.tensor([4]), VOCABULARY),
            ValueError,
            [str(VOCABULARY), str(VOCABULARY - 1)],
        ),
        (documents(1).index_fill(1, torch.tensor([4]), -1), ValueError, ["-1"]),
        (documents(1)[0], ValueError, [str(LENGTH)]),
        (documents(1).double(), (ValueError, TypeError), ["float64"]),
        (documents(1).tolist(), (ValueError, TypeError), ["list"]),
    ],
    ids=["too long", "not in the vocabulary", "negative", "one dimension", "floats", "list"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids(family: str, run: str, ids, kind, words: list[str]) -> None:
    model = auxiliary(family)
    mask = first(7, length=ids.shape[-1] if isinstance(ids, Tensor) else LENGTH)
    call = build(model) if run == "simulated" else tint.dynamic_eval
    arguments = ((ids, mask), {}) if run == "simulated" else ((model, ids, mask), {"lr": 1e-3})
    message = refusal(kind, call, *arguments[0], **arguments[1])
    assert "input_ids" in message
    for word in words:
        assert word in message, message


def test_ids_outside_the_vocabulary_are_refused_wherever_they_stand() -> None:
    model = auxiliary("gpt2")
    for token in range(LENGTH):
        ids = documents(1).index_fill(1, torch.tensor([token]), VOCABULARY + 70)
        assert str(VOCABULARY + 70) in refusal(ValueError, build(model), ids, first(7))


def test_no_test_targets() -> None:
    model, ids = auxiliary("gpt2"), documents(1)
    labels = ids.clone()
    labels[:, 7:] = -100
    assert "no test targets" in refusal(ValueError, build(model), ids, first(7), labels=labels)


@pytest.mark.parametrize("name", ["labels", "gradient_mask", "attention_mask", "position_ids"])
def test_other_arguments_of_the_wrong_shape(name: str) -> None:
    model, ids = auxiliary("gpt2"), documents(1)
    value = torch.ones(1, LENGTH - 1, dtype=torch.bool if name == "gradient_mask" else torch.long)
    message = refusal(ValueError, build(model), ids, first(7), **{name: value})
    assert name in message and str(LENGTH - 1) in message and str(LENGTH) in message


def test_positions_beyond_the_table() -> None:
    model, ids = auxiliary("gpt2"), documents(1)
    positions = torch.arange(LENGTH)[None] + POSITIONS - LENGTH + 1
    message = refusal(ValueError, build(model), ids, first(7), position_ids=positions)
    assert "position_ids" in message and str(POSITIONS) in message


def test_labels_outside_the_vocabulary() -> None:
    model, ids = auxiliary("gpt2"), documents(1)
    labels = ids.clone()
    labels[0, 9] = VOCABULARY
    message = refusal(ValueError, build(model), ids, first(7), labels=labels)
    assert "labels" in message and str(VOCABULARY) in message


@pytest.mark.parametrize("mask", [first(0), first(1)], ids=["nothing", "one token"])
def test_too_little_to_train_on_is_warned_of(mask: Tensor) -> None:
    """All False is a legal request to change nothing; that a single first token teaches nothing is worth a word."""
    simulator, ids = build(auxiliary("gpt2")), documents(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = simulator(ids, mask)
    assert torch.equal(out.logits, out.initial_logits)
    if mask.any():
        assert caught
    for warning in caught:
        assert "train" in str(warning.message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("switch", ["ln_grad", "act_grad"])
def test_half_precision_and_finite_differences(dtype: torch.dtype, switch: str) -> None:
    """Differences of half precision are noise: refused, or taken in float32 with a warning that says so; the result is then right."""
    settings = {"ln_grad": "exact", "act_grad": "exact", "inner_lr": 1e-3} | {switch: "finite_difference"}
    ids, mask = documents(1), first(7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = build(auxiliary("gpt2", dtype=dtype), **settings)(ids, mask)
        except (ValueError, TypeError) as refused:
            assert str(dtype).removeprefix("torch.") in str(refused)
            assert re.search(r"float32|float64|\.float\(\)", str(refused))
            return
    assert any("float32" in str(w.message) for w in caught)
    exact = build(auxiliary("gpt2"), ln_grad="exact", act_grad="exact", inner_lr=1e-3)(ids, mask)
    for name, change in exact.updates.items():
        cosine = nn.functional.cosine_similarity(
            out.updates[name].double().flatten(), change.flatten(), dim=0
        )
        assert float(cosine) > 0.95, name


def test_a_step_lost_in_rounding_is_warned_of() -> None:
    model, ids, mask = auxiliary("gpt2", dtype=torch.float32), documents(1), first(7)
    with pytest.warns(UserWarning, match="fd_eps"):
        build(model, fd_eps=1e-6)(ids, mask)
    build(model, fd_eps=1e-2)(ids, mask)  # no warning: warnings are errors here
    build(auxiliary("gpt2"), fd_eps=1e-6)(ids, mask)  # nor in float64
    build(model, fd_eps=1e-6, ln_grad="exact", act_grad="exact")(
        ids, mask
    )  # nor where no difference is taken


@pytest.mark.parametrize("inner_lr", [30.0, 1e30])
def test_a_learning_rate_too_large(inner_lr: float) -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(7)
    with pytest.warns(UserWarning, match="inner_lr") as caught:
        build(model, inner_lr=inner_lr)(ids, mask)
    said = " ".join(str(w.message) for w in caught)
    assert "sum" in said and "6" in said  # summed over the six targets


def test_training_mode_with_dropout() -> None:
    for family, config in (
        ("gpt2", {"resid_pdrop": 0.1}),
        ("opt", {"dropout": 0.1}),
        ("gpt2", {"attn_pdrop": 0.1}),
    ):
        model = auxiliary(family, **config).train()
        message = refusal(ValueError, built_and_run, model, {})
        assert "eval" in message and "dropout" in message
        assert model.training  # not switched behind the user's back
        built_and_run(model.eval(), {})
    simulator = build(model)
    model.train()
    assert "eval" in refusal(ValueError, simulator, documents(1), first(7))


def test_training_mode_without_dropout_is_no_matter() -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(7)
    still = build(model)(ids, mask)
    assert torch.equal(build(model.train())(ids, mask).logits, still.logits)
    assert model.training


def test_post_norm_blocks() -> None:
    model = auxiliary("opt", do_layer_norm_before=False)
    message = refusal(NotImplementedError, build, model)
    assert "layer" in message and re.search(r"post|before|after", message)


def test_cross_attention() -> None:
    message = refusal(NotImplementedError, build, auxiliary("gpt2", add_cross_attention=True))
    assert "cross" in message.lower()


@pytest.mark.parametrize("kind", ["bloom", "gpt_neox", "mpt"])
def test_other_architectures_are_refused_by_name(kind: str) -> None:
    if kind == "bloom":  # ALiBi
        model = transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
        )
    elif kind == "gpt_neox":  # attention and MLP side by side
        model = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(
                vocab_size=VOCABULARY,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
            )
        )
    else:
        model = transformers.MptForCausalLM(
            transformers.MptConfig(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2)
        )
    message = refusal(NotImplementedError, build, model.eval())
    assert type(model).__name__ in message
    assert "GPT" in message and "OPT" in message  # what can be simulated


@pytest.mark.parametrize("wrong", ["gpt2", None, nn.Linear(4, 4)], ids=["name", "none", "layer"])
def test_what_is_no_language_model(wrong: object) -> None:
    message = refusal((TypeError, NotImplementedError), build, wrong)
    given = (
        {str(wrong), type(wrong).__name__, "None"} if wrong is None else {str(wrong), type(wrong).__name__}
    )
    assert any(word in message for word in given) and "GPT2LMHeadModel" in message


def test_what_is_no_config() -> None:
    message = refusal(TypeError, tint.TinTModel.from_auxiliary, auxiliary("gpt2"), {"stack": 4})
    assert "TinTConfig" in message and "dict" in message


@pytest.mark.parametrize("index", [2, -3])
def test_documents_that_are_not_there(index: int) -> None:
    simulator = build(auxiliary("gpt2"))
    out = simulator(documents(2), first(7, 2))
    message = refusal((IndexError, ValueError), simulator.updated_state_dict, out, index=index)
    assert str(index) in message and "2" in message


def test_attention_masks() -> None:
    simulator, ids, mask = build(auxiliary("gpt2")), documents(2), first(7, 2)
    expected = simulator(ids, mask)
    for ones in (torch.ones_like(ids), torch.ones_like(ids).bool()):  # a tokenizer's integers, or booleans
        assert torch.equal(simulator(ids, mask, attention_mask=ones).logits, expected.logits)
    message = refusal((ValueError, TypeError), simulator, ids, mask, attention_mask=torch.zeros(ids.shape))
    assert "attention_mask" in message and "float32" in message and re.search(r"\bint", message)
    nothing = torch.ones_like(ids)
    nothing[1] = 0
    message = refusal(ValueError, simulator, ids, mask, attention_mask=nothing)
    assert "attention_mask" in message and re.search(r"\b1\b", message)  # document 1 has no token


@pytest.mark.parametrize("mistake", ["ids", "mask", "labels"])
def test_a_refused_call_leaves_everything_as_it_was(mistake: str) -> None:
    model, ids, mask = auxiliary("gpt2"), documents(1), first(7)
    before, simulator = weights(model), build(model)
    expected = simulator(ids, mask)
    bad_ids = ids.index_fill(1, torch.tensor([11]), VOCABULARY) if mistake == "ids" else ids
    bad_mask = first(LENGTH) if mistake == "mask" else mask
    labels = torch.full_like(ids, -100) if mistake == "labels" else None
    refusal(ValueError, simulator, bad_ids, bad_mask, labels=labels)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(simulator(ids, mask).logits, expected.logits)
