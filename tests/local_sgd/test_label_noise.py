"""The sampler's frequencies, and the property of the noise that the theory rests on: its covariance is c times the Hessian."""

import math

import pytest
import torch
from scipy.stats import chi2

from papercore.local_sgd import LabelNoise


@pytest.mark.parametrize("p, classes", [(0.1, 10), (0.4, 3), (0.3, 2)])
def test_the_right_class_has_1_minus_p_and_the_others_share_p(p: float, classes: int) -> None:
    n = 20_000
    noise, generator = LabelNoise(p, classes), torch.Generator().manual_seed(0)
    for label in range(classes):
        counts = torch.bincount(noise(torch.full((n,), label), generator), minlength=classes).double()
        expected = torch.full((classes,), n * p / (classes - 1), dtype=torch.float64)
        expected[label] = n * (1 - p)
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < chi2.isf(1e-4, classes - 1)


def test_draws_are_fresh_and_independent() -> None:
    noise, generator = LabelNoise(0.2, 10), torch.Generator().manual_seed(1)
    clean = torch.randint(0, 10, (50_000,), generator=generator)
    first, second = ((noise(clean, generator) != clean).double() for _ in range(2))
    se = 0.2 * 0.8 / math.sqrt(50_000)
    for other in (second, first.roll(1)):
        assert abs(float(((first - 0.2) * (other - 0.2)).mean())) < 4 * se


def test_shape_dtype_input_and_generators_are_kept() -> None:
    noise, clean = LabelNoise(0.5, 5), torch.arange(5).repeat(4, 1)
    state = torch.random.get_rng_state()
    for dtype in (torch.int64, torch.int32, torch.uint8):
        out = noise(clean.to(dtype), torch.Generator().manual_seed(2))
        assert out.shape == (4, 5) and out.dtype == dtype
        assert torch.equal(out.long(), noise(clean, torch.Generator().manual_seed(2)))
    assert torch.equal(clean, torch.arange(5).repeat(4, 1)) and torch.equal(
        torch.random.get_rng_state(), state
    )
    assert torch.equal(LabelNoise(0.0, 5)(clean, torch.Generator()), clean)
    assert noise(clean[:0], torch.Generator()).shape == (0, 5)


def test_label_noise_of_squared_loss_has_the_hessian_for_covariance() -> None:
    """At zero residual, gradient of ((f - y - delta)^2 / 2) = -delta grad f: covariance over samples and delta = sigma^2 H."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    theta = torch.randn(4, generator=generator, dtype=torch.float64)

    def f(p: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ p[:2]) * p[2] + p[3]

    y, sigma, n = f(theta), 0.6, 100_000
    hessian = torch.autograd.functional.hessian(lambda p: ((f(p) - y) ** 2 / 2).mean(), theta)
    jacobian = torch.autograd.functional.jacobian(f, theta)
    which = torch.randint(0, 30, (n,), generator=generator)
    delta = sigma * torch.randn(n, generator=generator, dtype=torch.float64)
    gradients = -delta[:, None] * jacobian[which]
    products = gradients[:, :, None] * gradients[:, None, :]
    assert float(hessian.abs().max()) > 0.1
    assert ((products.mean(0) - sigma**2 * hessian).abs() < 4 * products.std(0) / math.sqrt(n)).all()


def test_errors_say_what_is_allowed() -> None:
    for p, classes, message in [
        (0.9, 10, r"p = 0.9: expected 0 <= p < \(C - 1\) / C = 0.9 for C = 10 classes"),
        (-0.1, 10, "p = -0.1"),
        (math.nan, 10, "p = nan"),
        (0.5, 2, "C = 0.5 for C = 2"),
        (0.1, 1, "num_classes = 1: expected a whole number >= 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            LabelNoise(p, classes)
    noise, generator = LabelNoise(0.1, 3), torch.Generator()
    with pytest.raises(ValueError, match=r"targets must lie in 0 .. 2 .* got values from -1 to 3"):
        noise(torch.tensor([-1, 3]), generator)
    with pytest.raises(TypeError, match="tensor of integer classes, got torch.float32"):
        noise(torch.tensor([1.0]), generator)
    with pytest.raises(TypeError, match="generator must be a torch.Generator, got NoneType"):
        noise(torch.tensor([1]), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="p must be a number"):
        LabelNoise("0.1", 3)  # type: ignore[arg-type]
