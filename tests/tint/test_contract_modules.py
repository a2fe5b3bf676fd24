"""One simulated operation at a time, Forward, Backward and Descent, against autograd of the operation itself."""

from __future__ import annotations

import math

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


# Layer norm: forward exact, backward by a difference along the gradient, which needs the Jacobian symmetric


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_layer_norm_exactly(backend: str, kind: str, eps: float) -> None:
    x, g = drawn(2, 5, 16).requires_grad_(), drawn(2, 5, 16, seed=1)
    w, b = (1 + drawn(16, seed=2, scale=0.3)).requires_grad_(), drawn(16, seed=3).requires_grad_()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    expected = _norm(x, w, b, kind, eps)
    (grad_x,) = torch.autograd.grad((expected * g).sum(), x, retain_graph=True)
    y, memory = made(tint.LayerNormForward, backend, 16, kind, eps)(x.detach(), w.detach(), b.detach())
    assert relative(y, expected.detach()) < 1e-12
    backward = made(tint.LayerNormBackward, backend, 16, "exact")
    assert relative(backward(g, memory, w.detach()), grad_x) < 1e-11
    change_w, change_b = made(tint.LayerNormDescent, backend, 16)(g, memory, mask, 0.2)
    assert change_w.shape == (2, 16) and change_b.shape == (2, 16)  # a vector: nothing beside the diagonal
    for row in range(2):
        loss = (expected[row] * g[row] * mask[row, :, None]).sum()
        grads = torch.autograd.grad(loss, [w, b], retain_graph=True)
        assert relative(change_w[row], -0.2 * grads[0]) < 1e-11
        assert relative(change_b[row], -0.2 * grads[1]) < 1e-11


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_the_jacobian_of_the_normalisation_is_symmetric(kind: str) -> None:
    x, u, v, one = drawn(1, 1, 12), drawn(1, 1, 12, seed=1), drawn(1, 1, 12, seed=2), torch.ones(12).double()
    _, memory = tint.LayerNormForward(kind, 1e-5)(x, one)
    backward = tint.LayerNormBackward("exact")
    torch.testing.assert_close((backward(u, memory, one) * v).sum(), (backward(v, memory, one) * u).sum())


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(("grad", "order"), [("finite_difference", 1), ("central", 2)])
def test_the_error_of_the_layer_norms_difference(kind: str, grad: str, order: int) -> None:
    x, g, w = drawn(2, 5, 48, scale=2.0), drawn(2, 5, 48, seed=1), 1 + drawn(48, seed=2, scale=0.3)
    _, memory = tint.LayerNormForward(kind, 1e-5)(x, w)
    exact = tint.LayerNormBackward("exact")(g, memory, w)
    errors = [
        relative(tint.LayerNormBackward(grad, fd_eps=2.0**-k)(g, memory, w), exact) for k in range(6, 12)
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 0.95 * 2**order < coarse / fine < 1.05 * 2**order


def test_the_layer_norms_error_has_the_measured_size() -> None:
    """Width 768, states of deviation 2, gradients of 0.05: 1.27e-2 times the step, exactly linear from 1 to 1e-6."""
    x, g, one = drawn(1, 20, 768, scale=2.0), drawn(1, 20, 768, seed=1, scale=0.05), torch.ones(768).double()
    _, memory = tint.LayerNormForward("layernorm", 1e-5)(x, one)
    exact = tint.LayerNormBackward("exact")(g, memory, one)
    for eps in (1e-1, 1e-2, 1e-3, 1e-4):
        error = relative(tint.LayerNormBackward("finite_difference", fd_eps=eps)(g, memory, one), exact)
        assert 0.8e-2 < error / eps < 2e-2
    single = [t.float() for t in (x, g, one)]
    _, memory = tint.LayerNormForward("layernorm", 1e-5)(single[0], single[2])
    rounded = {
        eps: relative(
            tint.LayerNormBackward("finite_difference", fd_eps=eps)(single[1], memory, single[2]).double(),
            exact,
        )
        for eps in (1e-2, 1e-3, 1e-5)
    }
    assert (
        rounded[1e-2] < 1e-3 < rounded[1e-3] < 1e-2 < rounded[1e-5]
    )  # float32: the smaller step is the worse one


@pytest.mark.parametrize("operation", ["norm", "activation"])
def test_a_relative_step_does_not_depend_on_the_scale_of_the_gradient(operation: str) -> None:
    x, g, one = drawn(2, 5, 16), drawn(2, 5, 16, seed=1), torch.ones(16).double()
    if operation == "norm":
        _, memory = tint.LayerNormForward("layernorm", 1e-5)(x, one)
        module, rest = tint.LayerNormBackward, (memory, one)
        args: tuple = ()
    else:
        _, memory = tint.ActivationForward("gelu_new")(x)
        module, rest, args = tint.ActivationBackward, (memory,), ("gelu_new",)
    exact = module(*args, "exact")(g, *rest)
    errors, absolute = [], []
    for scale in (1e-6, 1.0, 1e6):
        found = module(*args, "finite_difference", fd_eps=1e-3, relative=True)(scale * g, *rest) / scale
        errors.append(relative(found, exact))
        if scale >= 1:
            absolute.append(
                relative(module(*args, "finite_difference", fd_eps=1e-3)(scale * g, *rest) / scale, exact)
            )
    assert max(errors) < 1e-2
    assert max(errors) < 1.01 * min(errors)
    assert absolute[1] > 10 * absolute[0]  # the absolute one does


# Activations


TORCH = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@pytest.mark.parametrize("name", TORCH)
def test_activations_exactly(name: str) -> None:
    x, g = drawn(2, 5, 16, scale=2.0).requires_grad_(), drawn(2, 5, 16, seed=1)
    expected = TORCH[name](x)
    (grad_x,) = torch.autograd.grad((expected * g).sum(), x)
    y, memory = tint.ActivationForward(name)(x.detach())
    assert relative(y, expected.detach()) < 1e-12
    assert relative(tint.ActivationBackward(name, "exact")(g, memory), grad_x) < 1e-11


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "silu"])
@pytest.mark.parametrize(("grad", "order"), [("finite_difference", 1), ("central", 2)])
def test_the_error_of_the_activations_difference(name: str, grad: str, order: int) -> None:
    x, g = drawn(2, 5, 16), drawn(2, 5, 16, seed=1)
    _, memory = tint.ActivationForward(name)(x)
    exact = tint.ActivationBackward(name, "exact")(g, memory)
    errors = [
        relative(tint.ActivationBackward(name, grad, fd_eps=2.0**-k)(g, memory), exact) for k in range(6, 12)
    ]
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 0.93 * 2**order < coarse / fine < 1.07 * 2**order


def test_the_difference_of_relu_is_exact_where_no_unit_crosses_zero() -> None:
    x, g = drawn(2, 5, 16), drawn(2, 5, 16, seed=1)
    x = x + 0.1 * x.sign()  # nothing nearer to 0 than 0.1; the step is at most 0.01 · 4
    _, memory = tint.ActivationForward("relu")(x)
    found = tint.ActivationBackward("relu", "finite_difference", fd_eps=1e-2)(g, memory)
    assert float((found - g * (x > 0)).abs().max()) < 1e-12
    x = torch.full(
        (1, 1, 1), -1e-3, dtype=torch.float64
    )  # crosses: the difference is seen, as the method has it
    _, memory = tint.ActivationForward("relu")(x)
    found = tint.ActivationBackward("relu", "finite_difference", fd_eps=1e-2)(torch.ones_like(x), memory)
    assert float(found) == pytest.approx((0.01 - 1e-3) / 0.01)


# Attention


def _attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, detach: bool, keep: Tensor | None = None
) -> Tensor:
    b, n, d = q.shape
    q, k, v = (t.view(b, n, heads, d // heads).transpose(1, 2) for t in (q, k, v))
    seen = torch.ones(n, n, dtype=torch.bool).tril().expand(b, 1, n, n)
    if keep is not None:
        seen = seen & keep[:, None, None]
    shares = (q @ k.transpose(2, 3) / math.sqrt(d // heads)).masked_fill(~seen, -math.inf).softmax(-1)
    return ((shares.detach() if detach else shares) @ v).transpose(1, 2).reshape(b, n, d)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_through_values_and_in_full(backend: str, heads: int, padded: bool) -> None:
    q, k, v = (drawn(2, 6, 16, seed=s).requires_grad_() for s in range(3))
    g = drawn(2, 6, 16, seed=4)
    keep = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool) if padded else None
    if padded:
        g = g * keep[..., None]  # no gradient comes back from a padded token
    out, memory = made(tint.AttentionForward, backend, 16, heads, context=6)(
        q.detach(), k.detach(), v.detach(), keep
    )
    rows = slice(None) if keep is None else keep
    expected = _attention(q, k, v, heads, detach=False, keep=keep)
    assert relative(out[rows], expected.detach()[rows]) < 1e-12
    (grad_v,) = torch.autograd.grad((_attention(q, k, v, heads, detach=True, keep=keep) * g).sum(), v)
    values, both = (
        made(tint.AttentionBackward, backend, 16, kind, context=6) for kind in ("value_only", "full")
    )
    nothing_q, nothing_k, found = values(g, memory)
    assert nothing_q is None and nothing_k is None
    assert relative(found, grad_v) < 1e-12
    full = torch.autograd.grad((expected * g).sum(), [q, k, v])
    for ours, theirs in zip(both(g, memory), full, strict=True):
        assert relative(ours, theirs) < 1e-11


def test_attention_is_causal_in_both_directions() -> None:
    q, k, v, g = (drawn(1, 6, 8, seed=s) for s in range(4))
    out, memory = tint.AttentionForward(2)(q, k, v)
    late = v.clone()
    late[:, 4:] += 1
    changed, _ = tint.AttentionForward(2)(q, k, late)
    assert torch.equal(out[:, :4], changed[:, :4])
    only_early = g.clone()
    only_early[:, 3:] = 0
    *_, grad_v = tint.AttentionBackward("value_only")(only_early, memory)
    assert not grad_v[:, 3:].any() and grad_v[:, :3].all()


# All together


def test_modules_hold_no_parameters_and_draw_nothing() -> None:
    state = torch.get_rng_state()
    modules = [
        tint.LinearForward(),
        tint.LinearBackward(),
        tint.LinearDescent(),
        tint.LayerNormForward(),
        tint.LayerNormBackward(),
        tint.LayerNormDescent(),
        tint.ActivationForward(),
        tint.ActivationBackward(),
        tint.AttentionForward(2),
        tint.AttentionBackward(),
    ]
    for module in modules:
        assert isinstance(module, nn.Module) and not list(module.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_module_builds_a_graph() -> None:
    x, w = drawn(1, 4, 8).requires_grad_(), drawn(8, 8).requires_grad_()
    assert not tint.LinearForward()(x, w).requires_grad
    assert not tint.LinearBackward()(x, w).requires_grad
    assert not tint.LinearDescent()(x, x, None, 0.1)[0].requires_grad
    y, _ = tint.LayerNormForward()(x, w[0])
    assert not y.requires_grad
    assert not tint.ActivationForward("relu")(x)[0].requires_grad


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tint.LinearForward("fast"), ["fast", "fused", "literal"]),
        (lambda: tint.LayerNormForward("batchnorm"), ["batchnorm", "layernorm", "rmsnorm"]),
        (lambda: tint.LayerNormBackward("forward"), ["forward", "finite_difference", "central", "exact"]),
        (lambda: tint.LayerNormBackward(fd_eps=0.0), ["fd_eps", "0"]),
        (lambda: tint.LayerNormBackward(fd_eps=math.nan), ["fd_eps", "nan"]),
        (lambda: tint.ActivationForward("swoosh"), ["swoosh", "gelu", "gelu_new", "relu", "silu"]),
        (lambda: tint.ActivationBackward("relu", "exakt"), ["exakt", "exact", "finite_difference"]),
        (lambda: tint.AttentionBackward("keys"), ["keys", "value_only", "full"]),
    ],
)
def test_unknown_choices_name_the_known_ones(make, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        make()
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda: tint.LinearForward()(drawn(1, 4, 8), drawn(8, 7)), ["8", "7"]),
        (lambda: tint.LinearForward()(drawn(1, 4, 8), drawn(8, 8), drawn(5)), ["8", "5"]),
        (lambda: tint.LinearForward()(drawn(3, 4, 8), drawn(2, 8, 8)), ["3", "2"]),
        (lambda: tint.LinearBackward()(drawn(1, 4, 8), drawn(7, 8)), ["8", "7"]),
        (lambda: tint.LinearDescent()(drawn(1, 4, 8), drawn(1, 5, 8), None, 0.1), ["4", "5"]),
        (
            lambda: tint.LinearDescent()(
                drawn(1, 4, 8), drawn(1, 4, 8), torch.ones(1, 3, dtype=torch.bool), 0.1
            ),
            ["3", "4"],
        ),
        (lambda: tint.LayerNormForward()(drawn(1, 4, 8), drawn(7)), ["8", "7"]),
        (lambda: tint.AttentionForward(3)(drawn(1, 4, 8), drawn(1, 4, 8), drawn(1, 4, 8)), ["8", "3"]),
    ],
)
def test_shapes_that_do_not_fit(call, numbers: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        call()
    for number in numbers:
        assert number in str(refused.value)
