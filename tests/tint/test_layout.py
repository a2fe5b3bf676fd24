"""Weights go into prefix tokens and come back bit by bit; every number has a place; positions and gates are exact."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papercore.tint.layout import Layout, gate


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    stack=st.integers(1, 4),
    prefix=st.integers(1, 4),
    batch=st.sampled_from([(), (3,), (2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_what_is_stacked_is_read_back_bit_by_bit(stack, prefix, batch, dtype, data) -> None:
    d = stack * prefix
    d_out, d_in = (data.draw(st.integers(1, d)) for _ in range(2))
    layout = Layout(d, stack)
    weight, bias = numbers(*batch, d_out, d_in).to(dtype), numbers(*batch, d_out, seed=1).to(dtype)
    tokens = layout.stack_weight(weight, bias)
    assert tokens.shape == (*batch, layout.n_prefix, layout.d_sim) and tokens.dtype == dtype
    read_weight, read_bias = layout.unstack_weight(tokens, d_out, d_in)
    assert torch.equal(read_weight, weight) and torch.equal(read_bias, bias)


def test_prefix_token_k_holds_the_rows_from_k_s_on_and_the_bias() -> None:
    layout, weight, bias = Layout(12, 3), numbers(12, 12), numbers(12, seed=1)
    tokens = layout.stack_weight(weight, bias)
    for k in range(layout.n_prefix):
        for s in range(3):
            assert torch.equal(tokens[k, layout.row(s)], weight[3 * k + s])
        assert torch.equal(tokens[k, layout.bias], bias)


def test_round_trip_of_both_orientations_of_transformers() -> None:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layout = Layout(8, 2)
    conv, linear = Conv1D(8, 8), nn.Linear(8, 8)
    for module, weight in ((conv, conv.weight.t()), (linear, linear.weight)):
        read, bias = layout.unstack_weight(layout.stack_weight(weight.detach(), module.bias.detach()))
        assert torch.equal(read, weight) and torch.equal(bias, module.bias)
        x = numbers(3, 8)
        torch.testing.assert_close(x @ read.t() + bias, module(x))


def test_one_bias_may_serve_many_weights() -> None:
    layout = Layout(4, 2)
    tokens = layout.stack_weight(numbers(5, 4, 4), numbers(4, seed=1))
    assert tokens.shape == (5, 2, 12)
    assert torch.equal(tokens[3, 1, layout.bias], numbers(4, seed=1))


@pytest.mark.parametrize(("d", "stack", "context"), [(768, 3, 1024), (768, 4, 2048), (12, 2, 5), (5, 5, 1)])
def test_sizes(d: int, stack: int, context: int) -> None:
    layout = Layout(d, stack, context=context)
    assert layout.n_prefix * stack == d
    assert layout.d_sim == (stack + 1) * d
    assert layout.n_position == context + layout.n_prefix


def test_the_slots_of_a_prefix_token_cover_it_once_and_no_memory_touches_the_signal() -> None:
    for stack in range(1, 6):
        layout = Layout(60, stack, context=7)
        covered = [i for slot in layout.describe() if slot.token == "prefix" for i in range(slot.start, slot.stop)]  # fmt: skip
        assert covered == list(range(layout.d_sim))
        ordinary = [i for slot in layout.describe() if slot.token == "ordinary" for i in range(slot.start, slot.stop)]  # fmt: skip
        assert len(ordinary) == len(set(ordinary)) == 60 * (1 + min(stack, 3))
        assert max(ordinary) == layout.d_sim - 1


def test_tokens_hold_signal_and_memories() -> None:
    layout = Layout(6, 3, context=9)
    signal, *memories = (numbers(2, 4, n, seed=n) for n in (6, 6, 4, 2))
    state = layout.tokens(signal, *memories)
    assert torch.equal(state[..., layout.signal], signal)
    for i, memory in enumerate(memories):
        assert torch.equal(state[..., layout.memory(i, 3)][..., : memory.shape[-1]], memory)
    assert float(state.square().sum()) == pytest.approx(
        sum(float(t.square().sum()) for t in (signal, *memories))
    )


def test_positions_are_one_hot_and_tell_prefix_from_ordinary() -> None:
    layout = Layout(8, 2, context=5)
    position = layout.positions(3, like=torch.zeros(1, dtype=torch.float64))
    assert position.shape == (7, 9) and position.dtype == torch.float64
    assert torch.equal(position.sum(1), torch.ones(7, dtype=torch.float64))
    assert position.argmax(1).tolist() == [5, 6, 7, 8, 0, 1, 2]
    assert (position @ layout.is_prefix(like=position)).tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_gates_are_open_or_shut_to_the_last_bit() -> None:
    assert abs(math.tanh(10) - 1) < 1e-8 and math.tanh(20) == 1.0
    layout = Layout(8, 2, context=5)
    old, new = numbers(2, 7, 24).double(), numbers(2, 7, 24, seed=1).double()
    position, prefix = layout.positions(3, like=old), layout.is_prefix(like=old)
    out = gate(old, new, position, keep=prefix, take=1 - prefix)
    assert torch.equal(out[:, :4], old[:, :4]) and torch.equal(out[:, 4:], new[:, 4:])
    out = gate(old, new, position, keep=prefix, take=prefix)
    assert torch.equal(out[:, :4], old[:, :4] + new[:, :4]) and not out[:, 4:].any()
    official = gate(old, new, position, keep=prefix, take=1 - prefix, scale=10.0)
    assert 0 < float((official - gate(old, new, position, prefix, 1 - prefix)).abs().max()) < 1e-7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model = 0: expected at least 1."),
        ({"d_model": 768, "stack": 5}, "stack = 5 does not divide d_model = 768: the nearest that do are 4 or 6."),
        ({"d_model": 10, "stack": 2, "shards": 20}, "shards = 20 does not divide d_model = 10: the nearest that do are 10."),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Layout(**arguments)


def test_what_does_not_fit_into_tokens() -> None:
    layout = Layout(6, 2, context=3)
    for call, message in (
        (lambda: layout.memory(0, 3), "stack = 2 leaves room for 2 memories of 6 numbers beside the signal, 3 are needed: use stack >= 3."),
        (lambda: layout.stack_weight(numbers(6, 7)), "weight has shape (6, 7): expected at most 6 rows and columns."),
        (lambda: layout.stack_weight(numbers(6, 6), numbers(5)), "bias has 5 numbers: expected 6."),
        (lambda: layout.unstack_weight(numbers(3, 17)), "prefix has shape (3, 17): expected [..., 3, 18]."),
        (lambda: layout.tokens(numbers(1, 4, 6)), "4 tokens: this layout has context = 3."),
        (lambda: layout.tokens(numbers(1, 3, 7)), "7 numbers a token: a slot has d_model = 6."),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
