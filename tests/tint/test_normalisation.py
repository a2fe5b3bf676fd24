"""Norms forward, backward and descent: torch's own, autograd, the order of each difference, and a gamma that stays diagonal."""

import re

import pytest
import torch
from torch.nn import functional as F

from papercore.tint.layout import Layout
from papercore.tint.linear import LinearDescent
from papercore.tint.normalisation import LayerNormBackward, LayerNormDescent, LayerNormForward, normalise

KINDS = ["layernorm", "rmsnorm"]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def torch_norm(x, weight, bias, kind, eps):
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps) + bias


def backends(width: int, context: int = 5):
    return {}, {"backend": "literal", "layout": Layout(width, 2, 2, context=context)}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_exact_backward_and_descent_equal_torch(kind: str, own: bool) -> None:
    one = (2,) if own else ()
    x, grad = 3 + 2 * numbers(2, 5, 8), numbers(2, 5, 8, seed=1)
    weight, bias = numbers(*one, 8, seed=2), numbers(*one, 8, seed=3)
    mask = torch.tensor([[True, False, True, True, False], [True] * 5])
    for options in backends(8):
        y, memory = LayerNormForward(kind, 1e-3, **options)(x, weight, bias)
        dx = LayerNormBackward("exact", **options)(grad, memory, weight)
        change, change_bias = LayerNormDescent(**options)(grad, memory, mask, 0.3)
        assert change.shape == change_bias.shape == (2, 8)
        for i in range(2):
            leaves = [t.clone().requires_grad_() for t in (x[i], weight[i] if own else weight, bias[i] if own else bias)]  # fmt: skip
            expected = torch_norm(*leaves, kind, 1e-3)
            gx = torch.autograd.grad((expected * grad[i]).sum(), leaves[0], retain_graph=True)[0]
            gw, gb = torch.autograd.grad((expected * grad[i] * mask[i, :, None]).sum(), leaves[1:])
            assert relative(y[i], expected.detach()) < 1e-12
            assert relative(dx[i], gx) < 1e-12
            assert relative(change[i], -0.3 * gw) < 1e-12
            assert relative(change_bias[i], -0.3 * gb) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_the_jacobian_is_symmetric_without_gamma_and_not_with_it(kind: str) -> None:
    x, gamma = numbers(7), numbers(7, seed=1)

    jacobian = torch.autograd.functional.jacobian(lambda z: normalise(z, kind)[0], x)
    torch.testing.assert_close(jacobian, jacobian.t(), rtol=1e-12, atol=1e-14)
    inside = gamma.unsqueeze(1) * jacobian
    assert float((inside - inside.t()).norm() / inside.norm()) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grad", "ratio"), [("finite_difference", (1.9, 2.1)), ("central", (3.8, 4.2))])
@pytest.mark.parametrize("relative_step", [False, True])
def test_halving_the_step_divides_the_error(kind: str, grad: str, ratio, relative_step: bool) -> None:
    x, dy, gamma = 2 * numbers(2, 5, 48), numbers(2, 5, 48, seed=1), 1 + 0.1 * numbers(48, seed=2)
    memory = LayerNormForward(kind)(x, gamma)[1]
    exact = LayerNormBackward("exact")(dy, memory, gamma)
    errors = [
        relative(LayerNormBackward(grad, e, relative_step)(dy, memory, gamma), exact)
        for e in (0.02, 0.01, 0.005)
    ]
    assert ratio[0] < errors[0] / errors[1] < ratio[1]
    assert ratio[0] < errors[1] / errors[2] < ratio[1]


def test_the_error_is_linear_in_the_step_over_five_decades() -> None:
    x, dy, gamma = 2 * numbers(1, 20, 768), 0.05 * numbers(1, 20, 768, seed=1), torch.ones(768).double()
    memory = LayerNormForward()(x, gamma)[1]
    exact = LayerNormBackward("exact")(dy, memory, gamma)
    steps = torch.tensor([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6], dtype=torch.float64)
    errors = torch.tensor(
        [relative(LayerNormBackward(fd_eps=float(e))(dy, memory, gamma), exact) for e in steps]
    )
    slopes = errors.log10().diff() / steps.log10().diff()
    assert float((slopes - 1).abs().max()) < 0.1
    assert 1e-2 < float(errors[2]) / 1e-3 < 2e-2  # 1.27e-2 epsilon


def test_float32_is_best_near_a_hundredth() -> None:
    x, dy, gamma = 2 * numbers(1, 20, 768), 0.05 * numbers(1, 20, 768, seed=1), torch.ones(768).double()
    exact = LayerNormBackward("exact")(dy, LayerNormForward()(x, gamma)[1], gamma)
    memory = LayerNormForward()(x.float(), gamma.float())[1]

    def error(grad: str, epsilon: float) -> float:
        return relative(LayerNormBackward(grad, epsilon)(dy.float(), memory, gamma.float()).double(), exact)

    assert error("finite_difference", 1e-2) < 1e-3 < error("finite_difference", 1e-3) < 1e-2
    assert error("finite_difference", 1e-5) > 0.1
    assert error("central", 0.1) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_relative_step_forgets_the_scale_of_gradient_and_input(kind: str) -> None:
    """Of each token: one is a million times smaller than the next."""
    x, dy, gamma = (
        numbers(1, 3, 16),
        numbers(1, 1, 16, seed=1).expand(1, 3, 16),
        1 + 0.1 * numbers(16, seed=2),
    )
    x = x[:, :1].expand(1, 3, 16)
    sizes = torch.tensor([1e-4, 1.0, 1e3], dtype=torch.float64).view(1, 3, 1)
    for inputs, grads in ((x, dy * sizes), (x * sizes, dy)):
        memory = LayerNormForward(kind, eps=0.0)(inputs, gamma)[1]
        exact = LayerNormBackward("exact")(grads, memory, gamma)
        found = LayerNormBackward(fd_eps=1e-3, relative=True)(grads, memory, gamma)
        errors = [relative(found[:, t], exact[:, t]) for t in range(3)]
        assert max(errors) < 1e-2 and max(errors) < 1.01 * min(errors)
        fixed = LayerNormBackward(fd_eps=1e-3)(grads, memory, gamma)
        errors = [relative(fixed[:, t], exact[:, t]) for t in range(3)]
        assert max(errors) > 100 * min(errors)


@pytest.mark.parametrize("grad", ["finite_difference", "central", "exact"])
@pytest.mark.parametrize("relative_step", [False, True])
def test_a_token_without_gradient_gets_none(grad: str, relative_step: bool) -> None:
    x, dy = numbers(1, 4, 8), numbers(1, 4, 8, seed=1)
    dy[:, 2] = 0.0
    memory = LayerNormForward()(x, torch.ones(8).double())[1]
    dx = LayerNormBackward(grad, relative=relative_step)(dy, memory, torch.ones(8).double())
    assert not dx[:, 2].any() and dx[:, 1].any() and dx.isfinite().all()


def test_gamma_stays_diagonal_where_the_linear_descent_alone_would_not() -> None:
    x, dy, gamma = numbers(1, 5, 8), numbers(1, 5, 8, seed=1), numbers(8, seed=2)
    memory = LayerNormForward()(x, gamma)[1]
    fused, literal = (LayerNormDescent(**o)(dy, memory, None, 0.1) for o in backends(8))
    for a, b in zip(fused, literal, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
    whole = LinearDescent()(memory.normalised, dy, None, 0.1)[0][0]
    torch.testing.assert_close(whole.diagonal(), fused[0][0], rtol=1e-13, atol=1e-15)
    assert float((whole - whole.diagonal().diag()).norm() / whole.diagonal().norm()) > 1.5


@pytest.mark.parametrize("grad", ["finite_difference", "central"])
def test_backends_agree_on_differences(grad: str) -> None:
    x, dy, gamma, beta = (numbers(*s, seed=i) for i, s in enumerate([(2, 5, 8), (2, 5, 8), (2, 8), (8,)]))
    fused, literal = backends(8)
    y, memory = LayerNormForward(**fused)(x, gamma, beta)
    torch.testing.assert_close(LayerNormForward(**literal)(x, gamma, beta)[0], y, rtol=0, atol=1e-13)
    a, b = (LayerNormBackward(grad, 1e-2, **o)(dy, memory, gamma) for o in (fused, literal))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LayerNormForward("rms"), "kind = 'rms': expected one of 'layernorm', 'rmsnorm'."),
        (lambda: LayerNormBackward("centrale"), "Did you mean 'central'?"),
        (lambda: LayerNormBackward(fd_eps=float("inf")), "fd_eps = inf: expected a positive finite number"),
        (lambda: LayerNormBackward(fd_eps=-1.0), "fd_eps = -1.0: expected a positive finite number"),
        (lambda: LayerNormForward()(numbers(1, 2, 4), numbers(3)), "weight has shape (3,): expected [D] or [B, D], D = 4."),
        (lambda: LayerNormForward()(numbers(1, 2, 4), numbers(4), numbers(5)), "bias has shape (5,): expected [D] or [B, D], D = 4."),
        (
            lambda: LayerNormBackward()(numbers(1, 3, 4), LayerNormForward()(numbers(1, 2, 4), numbers(4))[1], numbers(4)),
            "grad has shape (1, 3, 4): expected that of the norm's input, (1, 2, 4).",
        ),
        (
            lambda: LayerNormBackward()(numbers(1, 2, 4).bfloat16(), LayerNormForward()(numbers(1, 2, 4).bfloat16(), numbers(4).bfloat16())[1], numbers(4).bfloat16()),
            "a finite difference in torch.bfloat16 is all rounding error: use float32 or float64, or grad='exact'.",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
