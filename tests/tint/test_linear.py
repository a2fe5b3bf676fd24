"""A linear layer's three roles equal F.linear and autograd, fused and literal, to 1e-12."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from papercore.tint.layout import Layout
from papercore.tint.linear import LinearBackward, LinearDescent, LinearForward


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def truth(x, weight, bias, grad, mask, lr):
    """y, dx, dW, db of each document by F.linear and autograd."""
    out = []
    for i in range(len(x)):
        w, b = (t[i] if t.dim() == n else t for t, n in ((weight, 3), (bias, 2)))
        leaves = [t.clone().requires_grad_() for t in (x[i], w, b)]
        y = F.linear(*leaves)
        dx = torch.autograd.grad((y * grad[i]).sum(), leaves[0], retain_graph=True)[0]
        dw, db = torch.autograd.grad((y * grad[i] * mask[i, :, None]).sum(), leaves[1:])
        out.append((y.detach(), dx, -lr * dw, -lr * db))
    return [torch.stack(parts) for parts in zip(*out, strict=True)]


@pytest.mark.parametrize("restrict", [True, False])
@given(
    stack=st.integers(1, 3),
    shards=st.sampled_from([1, 2, 4]),
    d_in=st.integers(1, 30),
    d_out=st.integers(1, 30),
    own=st.booleans(),
    seed=st.integers(0, 999),
)
def test_both_backends_are_exact(restrict: bool, stack, shards, d_in, d_out, own, seed) -> None:
    layout = Layout(12, stack, shards, context=6)
    x, grad = numbers(3, 5, d_in, seed=seed), numbers(3, 5, d_out, seed=seed + 1)
    one = (3,) if own else ()
    weight, bias = numbers(*one, d_out, d_in, seed=seed + 2), numbers(*one, d_out, seed=seed + 3)
    mask = torch.tensor([[True, True, False, True, False], [True] * 5, [False] * 4 + [True]])
    y, dx, dw, db = truth(x, weight, bias, grad, mask, 0.3)
    for options in ({}, {"backend": "literal", "layout": layout, "restrict": restrict}):
        assert relative(LinearForward(**options)(x, weight, bias), y) < 1e-12
        assert relative(LinearForward(**options)(x, weight) + (bias[:, None] if own else bias), y) < 1e-12
        assert relative(LinearBackward(**options)(grad, weight), dx) < 1e-12
        change, change_bias = LinearDescent(**options)(x, grad, mask, 0.3)
        assert relative(change, dw) < 1e-12
        assert relative(change_bias, db) < 1e-12


def test_float32_is_exact_to_its_rounding() -> None:
    layout = Layout(48, 3, 3, context=16)
    x, grad, weight, bias = numbers(1, 16, 48), numbers(1, 16, 48, seed=1), numbers(48, 48, seed=2), numbers(48, seed=3)  # fmt: skip
    mask = torch.ones(1, 16, dtype=torch.bool)
    y, dx, dw, _ = truth(x, weight, bias, grad, mask, 0.1)
    x, grad, weight, bias = (t.float() for t in (x, grad, weight, bias))
    for options in ({}, {"backend": "literal", "layout": layout}):
        assert relative(LinearForward(**options)(x, weight, bias).double(), y) < 1e-5
        assert relative(LinearBackward(**options)(grad, weight).double(), dx) < 1e-5
        assert relative(LinearDescent(**options)(x, grad, mask, 0.1)[0].double(), dw) < 1e-5


def test_one_step_of_linear_regression_is_von_oswalds_construction() -> None:
    """W - eta sum of (W x - y) x^T (von Oswald et al., 2023), from nothing but the three modules."""
    x, y, weight = numbers(4, 20, 6), numbers(4, 20, 2, seed=1), numbers(4, 2, 6, seed=2)
    for options in ({}, {"backend": "literal", "layout": Layout(6, 2, context=20)}):
        error = LinearForward(**options)(x, weight) - y
        change, _ = LinearDescent(**options)(x, error, None, 0.01)
        closed = torch.stack(
            [w - 0.01 * sum(torch.outer(w @ a - b, a) for a, b in zip(xs, ys, strict=True)) for w, xs, ys in zip(weight, x, y, strict=True)]
        )  # fmt: skip
        torch.testing.assert_close(weight + change, closed, rtol=1e-12, atol=1e-14)


def test_a_sum_over_tokens_and_a_rate_for_each_document() -> None:
    x, grad, mask = numbers(2, 6, 4), numbers(2, 6, 3, seed=1), torch.rand(2, 6, generator=torch.Generator().manual_seed(3)) > 0.3  # fmt: skip
    counts = mask.sum(1).double()
    layout = Layout(4, 2, context=6)
    for options in ({}, {"backend": "literal", "layout": layout}):
        descent = LinearDescent(**options)
        summed, mean = descent(x, grad, mask, 0.6), descent(x, grad, mask, 0.6 / counts)
        for a, b in zip(summed, mean, strict=True):
            assert relative(a, b * counts.view(-1, *[1] * (b.dim() - 1))) < 1e-12
        # No rate for all documents gives what a rate of their own gives: the counts differ.
        assert counts[0] != counts[1]


def test_a_document_depends_on_itself_alone() -> None:
    x, grad, weight = numbers(3, 5, 4), numbers(3, 5, 4, seed=1), numbers(3, 4, 4, seed=2)
    order = torch.tensor([2, 0, 1])
    for options in ({}, {"backend": "literal", "layout": Layout(4, 2, context=5)}):
        for call in (
            lambda i: LinearForward(**options)(x[i], weight[i]),  # noqa: B023
            lambda i: LinearBackward(**options)(grad[i], weight[i]),  # noqa: B023
            lambda i: LinearDescent(**options)(x[i], grad[i], None, 0.1)[0],  # noqa: B023
        ):
            torch.testing.assert_close(call(torch.arange(3))[order], call(order), rtol=1e-13, atol=1e-15)


def test_tokens_that_do_not_count_change_nothing() -> None:
    x, grad = numbers(1, 6, 4), numbers(1, 6, 4, seed=1)
    mask = torch.tensor([[True, False, True, True, False, False]])
    other_x, other_grad = x.clone(), grad.clone()
    other_x[~mask], other_grad[~mask] = 77.0, -5.0
    for options in ({}, {"backend": "literal", "layout": Layout(4, 2, context=6)}):
        descent = LinearDescent(**options)
        for a, b in zip(descent(x, grad, mask, 0.1), descent(other_x, other_grad, mask, 0.1), strict=True):
            assert torch.equal(a, b)
        assert not any(t.any() for t in descent(x, grad, torch.zeros_like(mask), 0.1))


def test_an_output_bias_is_stepped_once_in_however_many_pieces_the_input_comes() -> None:
    """The official code cuts D -> 4 D -> D into four and steps the output bias four times."""
    x, grad = numbers(2, 5, 16), numbers(2, 5, 4, seed=1)
    layout = Layout(4, 2, context=5)
    bias = LinearDescent("literal", layout)(x, grad, None, 1.0)[1]
    torch.testing.assert_close(bias, -grad.sum(1), rtol=1e-12, atol=1e-14)


def test_nothing_is_recorded_for_autograd() -> None:
    x, weight = numbers(1, 2, 4).requires_grad_(), numbers(4, 4).requires_grad_()
    assert not LinearForward()(x, weight).requires_grad
    assert not LinearDescent()(x, x, None, 0.1)[0].requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearForward("litteral"), "backend = 'litteral': expected one of 'fused', 'literal'. Did you mean 'literal'?"),
        (lambda: LinearForward("literal"), "backend = 'literal' has prefix tokens, so it needs a layout: pass layout=Layout("),
        (lambda: LinearForward().trace(numbers(1, 2, 3), numbers(3, 3)), "LinearForward has no layout, so there are no heads to show"),
        (lambda: LinearForward()(numbers(2, 3), numbers(3, 3)), "x has shape (2, 3): expected [B, T, D]."),
        (lambda: LinearForward()(numbers(1, 2, 3), numbers(3, 4)), "weight has shape (3, 4), x (1, 2, 3): expected weight [D_out, D_in] or [B, D_out, D_in] with D_in = 3."),
        (lambda: LinearBackward()(numbers(1, 2, 4), numbers(3, 4)), "with D_out = 4."),
        (lambda: LinearForward()(numbers(2, 2, 3), numbers(3, 3, 3)), "3 weights for 2 documents: expected one each."),
        (lambda: LinearDescent()(numbers(1, 2, 3), numbers(1, 3, 3), None, 0.1), "x has shape (1, 2, 3), grad (1, 3, 3): expected [B, T, D_in] and [B, T, D_out]."),
        (lambda: LinearDescent()(numbers(1, 2, 3), numbers(1, 2, 3), torch.ones(1, 2), 0.1), "mask is torch.float32 (1, 2): expected torch.bool (1, 2), one a token of grad."),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
