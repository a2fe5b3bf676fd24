"""Label noise and sharpness through public names: the law of the labels, and the Hessian written out."""

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from papercore.local_sgd import LabelNoise, sharpness
from tests.local_sgd.public_api_reference import batch, loss, network


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- labels (W13) ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "classes"), [(0.1, 10), (0.2, 10), (0.5, 3), (0.3, 2)])
def test_a_label_is_kept_or_uniform_among_the_others(p: float, classes: int) -> None:
    n = 20_000
    clean = torch.arange(n) % classes
    noisy = LabelNoise(p, classes)(clean, generator())
    assert noisy.shape == clean.shape and noisy.dtype == clean.dtype
    shift = ((noisy - clean) % classes).bincount(minlength=classes).numpy()
    expected = n * torch.tensor([1 - p] + [p / (classes - 1)] * (classes - 1), dtype=torch.float64).numpy()
    assert stats.chisquare(shift, expected).pvalue > 1e-3
    for label in range(classes):
        rate = (noisy != clean)[clean == label].double().mean()
        assert abs(float(rate) - p) < 5 * (p * (1 - p) * classes / n) ** 0.5, "whatever the label"


def test_noise_is_fresh_and_comes_from_the_generator_alone() -> None:
    noise, clean, one = LabelNoise(0.4, 10), torch.zeros(500, dtype=torch.int64), generator(5)
    state = torch.get_rng_state()
    first, second = noise(clean, one), noise(clean, one)
    assert not torch.equal(first, second)
    assert torch.equal(noise(clean, generator(5)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(clean, torch.zeros(500, dtype=torch.int64)), "the clean labels stay"


def test_no_noise() -> None:
    clean = torch.arange(100) % 7
    assert torch.equal(LabelNoise(0.0, 7)(clean, generator()), clean)


@pytest.mark.parametrize(
    ("p", "classes", "words"),
    [
        (0.9, 10, ("p", "0.9")),
        (0.95, 10, ("p", "0.95")),
        (0.5, 2, ("p", "0.5")),
        (-0.1, 10, ("p", "-0.1")),
        (float("nan"), 10, ("p", "nan")),
        (0.1, 1, ("num_classes", "1")),
    ],
)
def test_label_noise_refuses(p: float, classes: int, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        LabelNoise(p, classes)
    assert all(word in str(error.value) for word in words), str(error.value)


# ---- sharpness ---------------------------------------------------------------------------------------------------------


def written_out(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian [d, d] in all parameters."""
    shapes = [p.shape for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        named = {n: part.view(shape) for n, part, shape in zip(names, parts, shapes, strict=True)}
        return loss(lambda x: torch.func.functional_call(model, named, (x,)), pair)

    start = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return torch.autograd.functional.hessian(value, start)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_top_of_a_network(seed: int) -> None:
    model, pair = network(seed), batch(0, 0, seed)
    top = sharpness(model, loss, pair, kind="top")
    assert float(top) == pytest.approx(float(torch.linalg.eigvalsh(written_out(model, pair))[-1]), rel=5e-3)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trace_of_a_convex_model(seed: int) -> None:
    """Cross-entropy of one layer has no negative curvature, so the trace is well above the error of its estimate."""
    model, pair = nn.Linear(5, 3).to(torch.float64), batch(0, 0, seed)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    matrix = written_out(model, pair)
    found = float(sharpness(model, loss, pair, kind="trace", n_probe=400))
    # Rademacher probes: the variance of one is twice the sum of squares; Gaussian ones have at most that, too.
    se = float((2 * matrix.square().sum() / 400) ** 0.5)
    assert 0 < se < 0.06 * float(matrix.trace())
    assert abs(found - float(matrix.trace())) < 4 * se


def test_several_batches_are_their_mean() -> None:
    model, pairs = network(), [batch(t, 0) for t in range(3)]
    matrix = sum(written_out(model, pair) for pair in pairs) / 3
    found = sharpness(model, loss, pairs, kind="top")
    assert float(found) == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=5e-3)


def test_the_model_is_left_as_it_was() -> None:
    model, pair = network(), batch(0, 0)
    model.train()
    loss(model, pair).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    for kind in ("top", "trace"):
        sharpness(model, loss, pair, kind=kind)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sharpness(network(), loss, batch(0, 0), kind="median"), ("median", "top", "trace")),
        (lambda: sharpness(network(), loss, batch(0, 0), kind="trace", n_probe=0), ("n_probe", "0")),
        (lambda: sharpness(network().requires_grad_(False), loss, batch(0, 0)), ("param",)),
    ],
)
def test_sharpness_refuses(call: Callable, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
