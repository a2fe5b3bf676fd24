"""Settings and the simulator's shape: what is allowed, and what a refusal says."""

from __future__ import annotations

import dataclasses
import math

import pytest

from papercore.tint import TinTConfig, simulator_shape


def test_defaults_are_the_papers_but_for_epsilon() -> None:
    config = TinTConfig()
    assert (config.stack, config.n_layers, config.n_steps, config.inner_lr) == (4, None, 1, 1e-3)
    assert (config.ln_grad, config.act_grad, config.attn_grad) == (
        "finite_difference",
        "finite_difference",
        "value_only",
    )
    assert (config.update_layernorm, config.loss, config.reduction) == ("bias", "prediction", "sum")
    assert (config.fd_eps, config.fd_relative, config.backend) == (1e-2, False, "fused")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stack = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stack": 0}, ["stack = 0", "at least 1"]),
        ({"n_steps": 0}, ["n_steps = 0"]),
        ({"n_steps": 1.5}, ["n_steps = 1.5", "whole number"]),
        ({"n_layers": 0}, ["n_layers = 0"]),
        ({"mlp_chunks": -1}, ["mlp_chunks = -1"]),
        ({"heads": True}, ["heads = True"]),
        ({"inner_lr": math.nan}, ["inner_lr = nan", "finite"]),
        ({"inner_lr": -0.1}, ["inner_lr = -0.1"]),
        ({"fd_eps": 0.0}, ["fd_eps = 0.0", "positive"]),
        ({"fd_eps": math.inf}, ["fd_eps = inf"]),
        ({"reduction": "average"}, ["'average'", "'sum', 'mean'"]),
        ({"ln_grad": "exakt"}, ["ln_grad = 'exakt'", "Did you mean 'exact'?"]),
        ({"act_grad": "centre"}, ["act_grad = 'centre'", "'central'"]),
        ({"attn_grad": "values_only"}, ["Did you mean 'value_only'?"]),
        ({"update_layernorm": "every"}, ["'none', 'bias', 'all'"]),
        ({"loss": "predictions"}, ["Did you mean 'prediction'?"]),
        ({"backend": "literally"}, ["Did you mean 'literal'?"]),
    ],
)
def test_values_that_are_not_allowed(settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        TinTConfig(**settings)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("settings", [{"inner_lr": "1e-3"}, {"fd_eps": None}])
def test_values_of_the_wrong_kind(settings: dict) -> None:
    (name, value) = next(iter(settings.items()))
    with pytest.raises(TypeError, match=f"{name} = {value!r}: expected a number"):
        TinTConfig(**settings)


def test_the_simulators_shape() -> None:
    assert simulator_shape(768, 12, 4) == (4, 192, 3072, 12)
    assert simulator_shape(1024, 16, 4) == (4, 256, 4096, 16)
    assert simulator_shape(2048, 32, 4).heads == 16  # min(S^2, H)
    assert simulator_shape(48, 6, 2, heads=8).heads == 8


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((770, 11, 4), ["stack = 4", "d_model = 770", "2 or 5"]),
        ((768, 10, 4), ["n_head = 10", "d_model = 768", "8 or 12"]),
        ((48, 6, 4, 5), ["heads = 5", "192", "4 or 6"]),
        ((48, 6, 100), ["stack = 100", "the nearest that do are 48."]),
    ],
)
def test_sizes_that_do_not_divide_name_the_nearest_that_do(sizes: tuple, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        simulator_shape(*sizes)
    for word in words:
        assert word in str(refused.value)
