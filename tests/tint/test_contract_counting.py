"""Parameter counts of the simulator against the recomputed table, and the formula they follow, written out here."""

from __future__ import annotations

import inspect
import re

import pytest

tint = pytest.importorskip("papercore.tint")

# auxiliary: (layers, width, heads, context), Q, forward, backward, descent, total in units of 10^9 as the table rounds them
TABLE = {
    "OPT-125M": ((12, 768, 12, 2048), 5_013_504, 0.431, 0.424, 0.421, 1.276),
    "OPT-350M": ((24, 1024, 16, 2048), 6_225_920, 1.073, 1.055, 1.046, 3.174),
    "OPT-1.3B": ((24, 2048, 32, 2048), 21_233_664, 3.671, 3.586, 3.567, 10.824),
    "OPT-2.7B": ((32, 2560, 32, 2048), 32_030_720, 7.390, 7.206, 7.175, 21.771),
    "GPT-2": ((12, 768, 12, 1024), 4_227_072, 0.365, 0.358, 0.355, 1.078),
}


def count(layers: int, width: int, n_head: int, context: int, **others):
    return tint.count_parameters(n_layer=layers, d_model=width, n_head=n_head, n_ctx=context, **others)


def formula(layers: int, width: int, heads: int, context: int, stack: int = 4) -> dict[str, int]:
    """Theorem 1.1's construction: a split projection, a module of four of them and three position projections, 21 modules a layer."""
    d_sim, h_sim = stack * width, min(stack**2, heads)
    t_sim = context + width // stack
    split = d_sim**2 // h_sim + h_sim * d_sim
    module = 4 * split + 3 * t_sim * d_sim // h_sim
    parts = {
        "forward": layers * (7 * module + split),
        "backward": layers * (7 * module + 6 * d_sim * h_sim),
        "descent": layers * 7 * module,
    }
    return {"Q": module, **parts, "total": sum(parts.values())}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name: str) -> None:
    sizes, q, forward, backward, descent, total = TABLE[name]
    got = count(*sizes)
    assert q == got.Q
    for value, expected in ((got.forward, forward), (got.backward, backward), (got.descent, descent)):
        assert round(value / 1e9, 3) == expected
    assert round(got.total / 1e9, 3) == total
    assert got.total == got.forward + got.backward + got.descent


def test_numbers_to_the_last_digit() -> None:
    got = count(12, 768, 12, 2048)
    assert (got.forward, got.backward, got.descent) == (431_013_888, 423_788_544, 421_134_336)
    assert got.total == 1_275_936_768


@pytest.mark.parametrize("stack", [1, 2, 4, 8])
@pytest.mark.parametrize("sizes", [(1, 32, 8, 64), (3, 64, 8, 128), (2, 128, 16, 160)])
def test_the_formula(sizes: tuple[int, int, int, int], stack: int) -> None:
    got, expected = count(*sizes, stack=stack), formula(*sizes, stack=stack)
    for part, value in expected.items():
        assert getattr(got, part) == value, part
        assert isinstance(getattr(got, part), int), part


def test_the_claims_of_size() -> None:
    """Fewer than two billion for 125M parameters; 10.8 and 21.8 billion within one per cent; 3.4 is not what the formula gives."""
    small = count(*TABLE["OPT-125M"][0]).total
    assert small < 2e9 and abs(small - 1.2e9) < 0.1 * 1.2e9
    assert abs(count(*TABLE["OPT-1.3B"][0]).total - 10.8e9) < 0.01 * 10.8e9
    assert abs(count(*TABLE["OPT-2.7B"][0]).total - 21.8e9) < 0.01 * 21.8e9
    assert count(*TABLE["OPT-350M"][0]).total < 0.95 * 3.4e9


def test_layers_add_up_and_the_default_stack_is_four() -> None:
    one, six = count(1, 768, 12, 2048), count(6, 768, 12, 2048)
    assert six.total == 6 * one.total
    assert six.total == count(6, 768, 12, 2048, stack=4).total
    assert count(6, 768, 12, 2048, stack=2).total != six.total
    assert count(6, 768, 12, 4096).total > six.total


def test_heads_of_the_simulator_can_be_chosen() -> None:
    assert count(12, 768, 12, 2048, heads=12).total == count(12, 768, 12, 2048).total
    split = 3072**2 // 4 + 4 * 3072
    assert 4 * split + 3 * 2240 * 3072 // 4 == count(1, 768, 12, 2048, heads=4).Q


def test_every_argument_is_named() -> None:
    kinds = {p.kind for p in inspect.signature(tint.count_parameters).parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"d_model": 770}, ["770", "4"]),  # rows do not stack
        ({"n_head": 7}, ["768", "7"]),  # heads do not divide the width
        ({"stack": 5}, ["768", "5"]),
        ({"stack": 0}, ["stack", "0"]),
        ({"heads": 7}, ["3072", "7"]),  # the simulator's own heads
        ({"n_layer": 0}, ["n_layer", "0"]),
        ({"n_layer": -2}, ["n_layer", "-2"]),
        ({"n_ctx": 0}, ["n_ctx", "0"]),
        ({"d_model": 0}, ["d_model", "0"]),
        ({"n_head": 0}, ["n_head", "0"]),
    ],
)
def test_sizes_that_do_not_fit(changed: dict, words: list[str]) -> None:
    sizes = {"n_layer": 12, "d_model": 768, "n_head": 12, "n_ctx": 2048} | changed
    with pytest.raises(ValueError) as refused:
        tint.count_parameters(**sizes)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("d_model", "stack", "nearest"),
    [(770, 4, {"768", "772", "2", "5"}), (768, 5, {"4", "6", "765", "770"})],
)
def test_the_nearest_sizes_that_fit_are_named(d_model: int, stack: int, nearest: set[str]) -> None:
    """The nearest widths for this stack or the nearest stacks for this width."""
    with pytest.raises(ValueError) as refused:
        tint.count_parameters(n_layer=1, d_model=d_model, n_head=2, n_ctx=64, stack=stack)
    numbers = set(re.findall(r"\d+", str(refused.value)))
    assert {str(d_model), str(stack)} < numbers and numbers & nearest


@pytest.mark.parametrize("wrong", [12.5, "12", None])
def test_sizes_are_whole_numbers(wrong: object) -> None:
    with pytest.raises((ValueError, TypeError), match="n_layer"):
        tint.count_parameters(n_layer=wrong, d_model=768, n_head=12, n_ctx=2048)
