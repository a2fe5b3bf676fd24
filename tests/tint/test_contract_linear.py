"""LinearForward, LinearBackward and LinearDescent are exact, as one matrix product and as attention heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tint.test_contract_reference import relative

tint = pytest.importorskip("papercore.tint")

BACKENDS = ["fused", "literal"]


def drawn(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


def made(kind, backend: str, width: int, *args, stack: int = 4, context: int = 5) -> nn.Module:
    """The module of this backend; heads need to know the auxiliary's width and context."""
    if backend == "fused":
        return kind(*args)
    return kind(*args, backend=backend, layout=tint.Layout(width, stack=stack, context=context))


@pytest.mark.parametrize("own", [False, True], ids=["shared weights", "weights of each document"])
@pytest.mark.parametrize(("d_in", "d_out"), [(8, 8), (8, 16), (16, 8), (48, 48)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_modules_are_exact(backend: str, d_in: int, d_out: int, own: bool) -> None:
    x, g = drawn(3, 5, d_in), drawn(3, 5, d_out, seed=1)
    w = drawn(*([3] if own else []), d_out, d_in, seed=2).requires_grad_()
    b = drawn(*([3] if own else []), d_out, seed=3).requires_grad_()
    leaf = x.clone().requires_grad_()
    if own:
        expected = torch.stack([F.linear(leaf[i], w[i], b[i]) for i in range(3)])
    else:
        expected = F.linear(leaf, w, b)
    (grad_x,) = torch.autograd.grad((expected * g).sum(), leaf)
    width = min(d_in, d_out)
    y = made(tint.LinearForward, backend, width)(x, w.detach(), b.detach())
    assert relative(y, expected.detach()) < 1e-12
    assert relative(made(tint.LinearBackward, backend, width)(g, w.detach()), grad_x) < 1e-12
    without = made(tint.LinearForward, backend, width)(x, w.detach())
    shift = b.detach()[:, None] if own else b.detach()
    assert relative(without, expected.detach() - shift) < 1e-12


@pytest.mark.parametrize(("d_in", "d_out"), [(8, 8), (8, 16), (16, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_descent_is_one_step_for_each_document(backend: str, d_in: int, d_out: int) -> None:
    x, g, lr = drawn(3, 5, d_in), drawn(3, 5, d_out, seed=1), 0.3
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    change_w, change_b = made(tint.LinearDescent, backend, min(d_in, d_out))(x, g, mask, lr)
    assert change_w.shape == (3, d_out, d_in) and change_b.shape == (3, d_out)
    for row in range(3):
        w, b = torch.zeros(d_out, d_in, dtype=x.dtype).requires_grad_(), torch.zeros(d_out, dtype=x.dtype)
        b.requires_grad_()
        loss = (F.linear(x[row], w, b) * g[row] * mask[row, :, None]).sum()
        grad_w, grad_b = torch.autograd.grad(loss, [w, b])
        assert relative(change_w[row], -lr * grad_w) < 1e-12
        assert relative(change_b[row], -lr * grad_b) < 1e-12
    everywhere = made(tint.LinearDescent, backend, min(d_in, d_out))(x, g, None, lr)
    torch.testing.assert_close(everywhere[0][2], change_w[2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_exact_to_its_own_rounding(backend: str) -> None:
    x, g, w = drawn(2, 9, 48), drawn(2, 9, 48, seed=1), drawn(48, 48, seed=2)
    single = [t.float() for t in (x, g, w)]
    assert (
        relative(made(tint.LinearForward, backend, 48, context=9)(single[0], single[2]).double(), x @ w.T)
        < 1e-5
    )
    assert (
        relative(made(tint.LinearBackward, backend, 48, context=9)(single[1], single[2]).double(), g @ w)
        < 1e-5
    )
    change, _ = made(tint.LinearDescent, backend, 48, context=9)(single[0], single[1], None, 1.0)
    assert change.dtype == torch.float32
    assert relative(change.double(), -torch.einsum("bto,bti->boi", g, x)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_step_of_linear_regression_has_the_closed_form(backend: str) -> None:
    """W - lr Σ (W x - y) xᵀ: the step that linear attention can make (von Oswald et al., 2023)."""
    x, y, w, lr = drawn(1, 7, 8), drawn(1, 7, 8, seed=1), drawn(8, 8, seed=2), 0.05
    error = made(tint.LinearForward, backend, 8, context=7)(x, w) - y
    change, _ = made(tint.LinearDescent, backend, 8, context=7)(x, error, None, lr)
    closed = w - lr * sum(torch.outer(w @ x[0, t] - y[0, t], x[0, t]) for t in range(7))
    assert relative(w + change[0], closed) < 1e-12
