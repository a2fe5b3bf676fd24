"""Activations equal transformers' and autograd; differences have the order they should; ReLU is exact away from zero."""

import re

import pytest
import torch

from papercore.tint.activation import (
    ACTIVATIONS,
    ActivationBackward,
    ActivationForward,
    GatedBackward,
    GatedForward,
)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_is_transformers_activation_of_that_name(name: str) -> None:
    from transformers.activations import ACT2FN

    x = 3 * numbers(4, 50)
    # gelu_fast rounds sqrt(2 / pi) to ten digits.
    torch.testing.assert_close(ActivationForward(name)(x)[0], ACT2FN[name](x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_exact_backward_is_autograd(name: str) -> None:
    x, dy = (3 * numbers(2, 5, 16)).requires_grad_(), numbers(2, 5, 16, seed=1)
    expected = torch.autograd.grad((ACTIVATIONS[name].function(x) * dy).sum(), x)[0]
    memory = ActivationForward(name)(x.detach())[1]
    assert relative(ActivationBackward(name, "exact")(dy, memory), expected) < 1e-12


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"relu", "linear"}))
@pytest.mark.parametrize(("grad", "ratio"), [("finite_difference", (1.9, 2.1)), ("central", (3.8, 4.2))])
@pytest.mark.parametrize("relative_step", [False, True])
def test_halving_the_step_divides_the_error(name: str, grad: str, ratio, relative_step: bool) -> None:
    x, dy = numbers(2, 5, 64), numbers(2, 5, 64, seed=1)
    memory = ActivationForward(name)(x)[1]
    exact = ActivationBackward(name, "exact")(dy, memory)
    coarse, fine = (
        relative(ActivationBackward(name, grad, e, relative_step)(dy, memory), exact) for e in (0.01, 0.005)
    )
    assert ratio[0] < coarse / fine < ratio[1]


def test_a_difference_of_relu_is_exact_until_a_sign_changes() -> None:
    x, dy = numbers(2, 5, 64), numbers(2, 5, 64, seed=1)
    memory = ActivationForward("relu")(x)[1]
    exact = dy * (x > 0)
    for grad in ("finite_difference", "central"):
        for epsilon in (1e-1, 1e-2, 1e-4):
            found = ActivationBackward("relu", grad, epsilon)(dy, memory)
            steps = (x + epsilon * dy, x - epsilon * dy) if grad == "central" else (x + epsilon * dy,)
            same = torch.stack([(s > 0) == (x > 0) for s in steps]).all(0)
            torch.testing.assert_close(found[same], exact[same], rtol=0, atol=1e-11)
            if epsilon == 1e-1:
                assert not same.all() and float((found - exact)[~same].abs().min()) > 0


def test_a_relative_step_forgets_the_scale_of_the_gradient() -> None:
    x, dy = numbers(1, 1, 64).expand(1, 3, 64), numbers(1, 1, 64, seed=1).expand(1, 3, 64)
    dy = dy * torch.tensor([1e-5, 1.0, 1e3]).view(1, 3, 1)
    memory = ActivationForward("gelu")(x)[1]
    exact = ActivationBackward("gelu", "exact")(dy, memory)
    errors = []
    for relative_step in (True, False):
        found = ActivationBackward("gelu", fd_eps=1e-3, relative=relative_step)(dy, memory)
        errors.append([relative(found[:, t], exact[:, t]) for t in range(3)])
    assert max(errors[0]) < 1e-2 and max(errors[0]) < 1.01 * min(errors[0])
    assert max(errors[1]) > 1000 * min(errors[1])
    dy = torch.zeros(1, 3, 64, dtype=torch.float64)
    assert not ActivationBackward("gelu", relative=True)(dy, memory).any()


def test_gelu_has_the_measured_error() -> None:
    """3.4e-2 epsilon at gradients of about 1; best near 1e-2 in float32."""
    x, dy = numbers(1, 50, 768), numbers(1, 50, 768, seed=1)
    memory = ActivationForward("gelu")(x)[1]
    exact = ActivationBackward("gelu", "exact")(dy, memory)
    for epsilon in (1e-2, 1e-4):
        error = relative(ActivationBackward("gelu", fd_eps=epsilon)(dy, memory), exact)
        assert 0.1 * epsilon < error < epsilon
    memory = ActivationForward("gelu")(x.float())[1]
    errors = [relative(ActivationBackward("gelu", fd_eps=e)(dy.float(), memory).double(), exact) for e in (1e-1, 1e-3, 1e-6)]  # fmt: skip
    assert errors[1] < errors[0] and errors[1] < errors[2]


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_a_gated_activation_equals_autograd(name: str) -> None:
    gate, up = numbers(2, 5, 16).requires_grad_(), numbers(2, 5, 16, seed=1).requires_grad_()
    dy = numbers(2, 5, 16, seed=2)
    expected = ACTIVATIONS[name].function(gate) * up
    truth = torch.autograd.grad((expected * dy).sum(), (gate, up))
    y, memory = GatedForward(name)(gate.detach(), up.detach())
    assert torch.equal(y, expected.detach())
    for found, true in zip(GatedBackward(name, "exact")(dy, memory), truth, strict=True):
        assert relative(found, true) < 1e-12
    dgate, dup = GatedBackward(name, fd_eps=1e-6)(dy, memory)
    assert relative(dgate, truth[0]) < 1e-5
    assert relative(dup, truth[1]) < 1e-15  # a product, not a difference


def test_errors_say_what_is_wrong() -> None:
    memory = ActivationForward("relu")(torch.ones(1, 1, 2, dtype=torch.float16))[1]
    for call, message in (
        (lambda: ActivationForward("gelu_newer"), "fn = 'gelu_newer': expected one of 'gelu', 'gelu_new',"),
        (lambda: GatedBackward("silo"), "Did you mean 'silu'?"),
        (lambda: ActivationBackward("relu", "forward"), "grad = 'forward': expected one of 'finite_difference', 'central', 'exact'."),
        (lambda: ActivationBackward("relu", fd_eps=0.0), "fd_eps = 0.0: expected a positive finite number"),
        (lambda: ActivationBackward("relu")(memory.x, memory), "a finite difference in torch.float16 is all rounding error"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=re.escape(message)):
            call()
    assert torch.equal(ActivationBackward("relu", "exact")(memory.x, memory), memory.x)
