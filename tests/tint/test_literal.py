"""The heads of a simulated layer are plain attention heads: their projections, written out, do the same; the trace shows them."""

import pytest
import torch

from papercore.tint.layout import Layout
from papercore.tint.linear import LinearBackward, LinearDescent, LinearForward
from papercore.tint.literal import backward_heads, descent_heads, forward_heads, run_heads

LAYOUT = Layout(12, 3, 2, context=7)
T = 5


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sequence() -> torch.Tensor:
    prefix = LAYOUT.stack_weight(numbers(12, 12), numbers(12, seed=1)).expand(2, -1, -1)
    tokens = LAYOUT.tokens(numbers(2, T, 12, seed=2), numbers(2, T, 12, seed=3))
    return torch.cat([prefix, tokens], 1)


@pytest.mark.parametrize("heads", [forward_heads(LAYOUT), backward_heads(LAYOUT), descent_heads(LAYOUT, 0.3)], ids=lambda h: h.name)  # fmt: skip
def test_dense_projections_do_the_same(heads) -> None:
    """W_Q, W_K, W_V with biases applied to [state | position], scores without softmax, W_O: nothing else."""
    state = sequence()
    count = state.shape[1]
    position = LAYOUT.positions(T, like=state).expand(2, -1, -1)
    whole = torch.cat([state, position], -1)

    def project(reading):
        weight, bias = reading.matrix(LAYOUT, torch.float64)
        return torch.einsum("bnx,hxd->bhnd", whole, weight) + bias[:, None]

    query, key, value = (project(r) for r in (heads.query, heads.key, heads.value))
    scores = torch.einsum("bhid,bhjd->bhij", query, key)
    output = torch.zeros(len(heads), heads.write.shape[1], LAYOUT.d_sim, dtype=torch.float64)
    output.scatter_(2, heads.write.unsqueeze(-1), 1.0)
    plain = torch.einsum("bhij,bhjd,hdx->bix", scores, value, output)
    added, trace = run_heads(LAYOUT, heads, state, restrict=False)
    torch.testing.assert_close(added, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace.scores, scores, rtol=1e-12, atol=1e-12)
    assert trace.scores.shape == (2, len(heads), count, count)


def test_projections_only_copy_and_are_nearly_all_zeros() -> None:
    for heads in (forward_heads(LAYOUT), backward_heads(LAYOUT), descent_heads(LAYOUT, 0.5)):
        for reading in (heads.query, heads.key, heads.value):
            weight, bias = reading.matrix(LAYOUT)
            used = torch.cat([weight, bias.unsqueeze(1)], 1)
            assert int((used != 0).sum(1).max()) == 1
            assert set(used.unique().tolist()) <= {0.0, 1.0, -0.5}
            assert float((weight == 0).double().mean()) > 0.95


def test_the_number_of_heads() -> None:
    for stack, shards in ((1, 1), (3, 2), (4, 3)):
        layout = Layout(12, stack, shards)
        assert len(forward_heads(layout)) == stack * shards + stack
        assert len(backward_heads(layout)) == stack * shards
        assert len(descent_heads(layout, 0.1)) == stack * shards + shards


def test_what_is_left_out_by_restricting_changes_nothing() -> None:
    state, prefix = sequence(), LAYOUT.n_prefix
    allowed = torch.cat([torch.zeros(2, prefix), torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])], 1).bool()
    for heads, mask, rows in (
        (forward_heads(LAYOUT), None, slice(prefix, None)),
        (backward_heads(LAYOUT), None, slice(prefix, None)),
        (descent_heads(LAYOUT, 0.3), allowed, slice(0, prefix)),
    ):
        whole, _ = run_heads(LAYOUT, heads, state, allowed=mask, restrict=False)
        part, trace = run_heads(LAYOUT, heads, state, allowed=mask)
        torch.testing.assert_close(part[:, rows], whole[:, rows], rtol=1e-13, atol=1e-13)
        assert trace.scores.shape[-2:] != whole.shape[1:2] * 2
        # The other rows do get something where nothing is left out: that is what gates are for.
    gated = run_heads(LAYOUT, forward_heads(LAYOUT), state, restrict=False)[0]
    assert gated[:, :prefix].any()


def test_the_trace_of_forward_shows_scores_that_add_up_to_y() -> None:
    x, weight = numbers(1, T, 12), numbers(12, 12, seed=1)
    y, (trace,) = LinearForward("literal", LAYOUT).trace(x, weight)
    stack, shards, k = 3, 2, LAYOUT.n_prefix
    assert (trace.name, trace.asks, trace.answers) == ("forward", "ordinary", "prefix")
    assert (
        trace.query.shape == (1, 9, T, 6)
        and trace.key.shape == (1, 9, k, 6)
        and trace.value.shape == (1, 9, k, k)
    )
    for s in range(stack):
        # head (s, c): scores with row k S + s over shard c
        scores = trace.scores[:, s * shards : (s + 1) * shards].sum(1)
        torch.testing.assert_close(scores, y[..., s::stack], rtol=1e-12, atol=1e-13)
        assert torch.equal(trace.value[0, s * shards], torch.eye(k, dtype=torch.float64))


def test_the_trace_of_backward_and_descent() -> None:
    x, grad, weight = numbers(1, T, 12), numbers(1, T, 12, seed=1), numbers(12, 12, seed=2)
    mask = torch.tensor([[True, True, False, False, True]])
    dx, (back,) = LinearBackward("literal", LAYOUT).trace(grad, weight)
    assert (back.asks, back.answers) == ("ordinary", "prefix")
    torch.testing.assert_close(
        back.scores[0, 2], grad[0, :, 1::3], rtol=1e-12, atol=1e-13
    )  # head (s, c) = (1, 0)
    torch.testing.assert_close(back.written[..., LAYOUT.signal], dx, rtol=0, atol=0)
    change, change_bias, (down,) = LinearDescent("literal", LAYOUT).trace(x, grad, mask, 0.25)
    assert (down.asks, down.answers) == ("prefix", "ordinary")
    assert not down.scores[..., ~mask[0]].any()
    torch.testing.assert_close(down.value[0, 1], -0.25 * x[0, :, 6:])  # head (0, 1)
    read = LAYOUT.unstack_weight(down.written)
    assert torch.equal(read[0], change) and torch.equal(read[1], change_bias)
    # Every prefix token's copy of the bias gets the update.
    assert (down.written[..., LAYOUT.bias] == change_bias[:, None]).all()


def test_large_weights_come_in_pieces_with_a_trace_each() -> None:
    x, weight = numbers(1, T, 30), numbers(40, 30, seed=1)
    y, traces = LinearForward("literal", LAYOUT).trace(x, weight)
    assert len(traces) == 4 * 3
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-12, atol=1e-12)
