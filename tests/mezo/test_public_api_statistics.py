"""The noise as a function of (seed, index), the moments of the estimator, and the closed form of memory.

All draws are fixed by their seeds. Each statistical bound is at least four standard errors wide, so an honest
generator fails one of them with a chance below 1e-4; the standard errors are theory's, not the sample's, where known.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, memory_model, noise, spsa_grad

DISTS = ["gaussian", "rademacher"]
dists = pytest.mark.parametrize("dist", DISTS)
MILLION = 1_000_000


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return noise(17, 0, MILLION).double()


@pytest.fixture(scope="module")
def signs() -> Tensor:
    return noise(17, 0, MILLION, dist="rademacher").double()


# ---- noise is a function of seed and index -------------------------------------------------------------------------


@dists
@pytest.mark.parametrize("start", [0, 1, 3, 127, 128, 1000, 4097])
@pytest.mark.parametrize("numel", [1, 5, 127, 128, 129, 2051])
def test_a_slice_depends_on_its_indices_alone(dist: str, start: int, numel: int) -> None:
    whole = noise(9, 0, 7000, dist=dist)
    assert torch.equal(noise(9, start, numel, dist=dist), whole[start : start + numel])


@dists
def test_any_chunking_gives_the_same_bits(dist: str) -> None:
    whole = noise(9, 100, 3000, dist=dist)
    for chunk in (1000, 384, 250, 77):
        parts = [noise(9, 100 + at, min(chunk, 3000 - at), dist=dist) for at in range(0, 3000, chunk)]
        assert torch.equal(torch.cat(parts), whole)


@dists
def test_number_of_threads_does_not_matter(dist: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = noise(9, 0, 200_000, dist=dist)
        torch.set_num_threads(2)
        two = noise(9, 0, 200_000, dist=dist)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


@dists
def test_indices_and_seeds_are_not_cut_to_32_bits(dist: str) -> None:
    here = noise(5, 3, 256, dist=dist)
    for far in (2**32, 2**34, 2**40):
        there = noise(5, far + 3, 256, dist=dist)
        assert not torch.equal(there, here)
        assert torch.equal(noise(5, far + 3 + 100, 60, dist=dist), there[100:160])
    assert not torch.equal(noise(5 + 2**32, 3, 256, dist=dist), here)
    # a slice across the point where the low word of the counter overflows
    for words in (2**32, 2**34, 2**39):
        across = noise(5, words - 70, 140, dist=dist)
        assert torch.equal(
            torch.cat([noise(5, words - 70, 70, dist=dist), noise(5, words, 70, dist=dist)]), across
        )


@dists
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_rounds_the_draw_but_does_not_change_it(dist: str, dtype: torch.dtype) -> None:
    z = noise(9, 11, 1000, dist=dist, dtype=dtype)
    assert z.dtype == dtype and z.shape == (1000,) and z.device.type == "cpu"
    error = (z.double() - noise(9, 11, 1000, dist=dist).double()).abs().max()
    assert float(error) <= (0.0 if dist == "rademacher" else 5 * torch.finfo(dtype).eps + 5e-6)


@dists
def test_noise_leaves_the_global_state_alone(dist: str) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = noise(1, 0, 100, dist=dist)
    torch.manual_seed(4)
    assert torch.equal(noise(1, 0, 100, dist=dist), first)
    torch.manual_seed(3)
    noise(1, 0, 100, dist=dist)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_empty_slice_is_empty() -> None:
    assert noise(1, 5, 0).shape == (0,)


# ---- its distribution ----------------------------------------------------------------------------------------------


def test_gaussian_moments_and_tail(gaussian: Tensor) -> None:
    root = math.sqrt(MILLION)
    assert abs(float(gaussian.mean())) < 4 / root
    assert abs(float((gaussian**2).mean()) - 1) < 4 * math.sqrt(2) / root
    assert abs(float((gaussian**3).mean())) < 4 * math.sqrt(15) / root
    assert abs(float((gaussian**4).mean()) - 3) < 4 * math.sqrt(96) / root
    assert 4.2 < float(gaussian.abs().max()) < 6.5  # P(max < 4.2) = 3e-12, P(max > 6.5) = 8e-5 over a million
    assert bool(gaussian.isfinite().all())


def test_gaussian_distribution_function(gaussian: Tensor) -> None:
    ordered = gaussian.sort().values
    grid = torch.arange(1, MILLION + 1, dtype=torch.float64) / MILLION
    distance = float((torch.special.ndtr(ordered) - grid).abs().max()) + 1 / MILLION
    assert distance * math.sqrt(MILLION) < 2.2  # Kolmogorov's tail beyond 2.2 has 1.3e-4


def test_rademacher_is_fair_signs(signs: Tensor) -> None:
    assert bool((signs.abs() == 1).all())
    assert abs(float(signs.mean())) < 4 / math.sqrt(MILLION)
    # each of the 128 places that one counter may fill is fair by itself
    places = signs[: MILLION // 128 * 128].reshape(-1, 128).mean(0)
    assert float(places.abs().max()) < 5 / math.sqrt(MILLION // 128)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 32, 64, 128, 512])
@pytest.mark.parametrize("power", [1, 2])
def test_no_autocorrelation(gaussian: Tensor, signs: Tensor, lag: int, power: int) -> None:
    """Of the draws, and of their squares: the two Gaussians of a Box-Muller pair share a radius if it goes wrong."""
    for z in (gaussian, signs) if power == 1 else (gaussian,):
        z = z**power - (z**power).mean()
        correlation = float((z[lag:] * z[:-lag]).mean() / (z**2).mean())
        assert abs(correlation) < 4 / math.sqrt(MILLION - lag)


@dists
@pytest.mark.parametrize("seeds", [(0, 1), (1, 2), (7, 8), (0, 2**32), (1, 2**40), (12345, 54321)])
def test_seeds_are_uncorrelated(dist: str, seeds: tuple[int, int]) -> None:
    size = 100_000
    a, b = (noise(seed, 0, size, dist=dist).double() for seed in seeds)
    for shift in (0, 1, 4):
        assert abs(float((a[shift:] * b[: size - shift]).mean())) < 4.5 / math.sqrt(size)


# ---- the estimator's moments ---------------------------------------------------------------------------------------


@dists
@pytest.mark.parametrize(("d", "n"), [(50, 1), (50, 4), (500, 1)])
def test_second_moment_of_the_estimate(dist: str, d: int, n: int) -> None:
    """E g_hat = g, and E|g_hat|^2 / |g|^2 is (d + n + 1) / n (Gaussian) or (d + n - 1) / n (Rademacher): Lemmas 2, 5."""
    draws = 4000 if d == 50 else 1000
    g = noise(99, 0, d).double()
    z = noise(1234, 0, draws * n * d, dist=dist).double().reshape(draws, n, d)
    estimate = ((z @ g)[..., None] * z).mean(1)
    norms = (estimate**2).sum(-1) / (g**2).sum()
    expected = (d + n + 1) / n if dist == "gaussian" else (d + n - 1) / n
    assert abs(float(norms.mean()) - expected) < 4 * float(norms.std()) / math.sqrt(draws)
    assert bool(((estimate.mean(0) - g).abs() < 4.5 * estimate.std(0) / math.sqrt(draws)).all())
    # the bound is narrow enough to tell the estimate from plain gradient descent and from one lost factor n
    assert 4 * float(norms.std()) / math.sqrt(draws) < 0.4 * expected


@pytest.mark.parametrize("dist", DISTS)
def test_second_moment_matrix(dist: str) -> None:
    """E[g_hat g_hat^T] at d = 4, n = 1: 2 g g^T + |g|^2 I, less twice the diagonal of g g^T for Rademacher."""
    draws = 250_000
    g = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
    z = (noise(4321, 0, 4 * draws, dist=dist)).double().reshape(draws, 4)
    estimate = z * (z @ g)[:, None]
    products = estimate[:, :, None] * estimate[:, None, :]
    outer, norm = torch.outer(g, g), (g**2).sum()
    expected = 2 * outer + norm * torch.eye(4, dtype=torch.float64)
    if dist == "rademacher":
        expected = expected - 2 * torch.diag(g**2)
    error = (products.mean(0) - expected).abs()
    assert bool((error <= 4.5 * products.std(0) / math.sqrt(draws) + 1e-12).all())


@dists
def test_estimate_is_unbiased(dist: str) -> None:
    d, n = 20, 400
    params = [
        nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64)),
        nn.Parameter(torch.ones(2, 4).double()),
    ]
    scale = torch.linspace(0.5, 2, d, dtype=torch.float64)

    def loss() -> Tensor:
        theta = torch.cat([p.detach().reshape(-1) for p in params])
        return 0.5 * (scale * theta**2).sum()

    gradient = scale * torch.cat([p.detach().reshape(-1) for p in params])
    estimate = torch.cat([g.reshape(-1) for g in spsa_grad(loss, params, 1e-3, n=n, dist=dist, seed=5)])
    extra = 1 if dist == "gaussian" else -1  # Var g_hat_i = |g|^2 + g_i^2, Rademacher |g|^2 - g_i^2
    deviation = ((gradient**2).sum() + extra * gradient**2).sqrt() / math.sqrt(n)
    assert bool(((estimate - gradient).abs() < 4.3 * deviation).all())
    assert float(((estimate - gradient) / deviation).abs().max()) > 0.5, "an estimate, not the gradient"


@dists
def test_one_step_on_a_quadratic_meets_the_descent_bound_with_equality(dist: str) -> None:
    """H a projector of rank r, gradient in its span: E L(theta - eta g_hat) = L (1 - 2 eta + eta^2 gamma).

    gamma = (r + n + 1) / n for Gaussian directions and (r + n - 1) / n for Rademacher ones (projector on coordinates),
    whatever the number d of weights is.
    """
    r, d, n, eta, repeats = 4, 30, 1, 0.1, 300
    start = torch.cat([torch.ones(r), torch.zeros(d - r)]).double()
    weight = nn.Parameter(start.clone())
    optimizer = MeZO([weight], eta, 1e-2, n=n, dist=dist, seed=21, backend="torch")

    def loss() -> Tensor:
        return 0.5 * (weight[:r] ** 2).sum()

    values = []
    for _ in range(repeats):
        with torch.no_grad():
            weight.copy_(start)
        optimizer.step(loss)
        values.append(float(loss().detach()))
    values = torch.tensor(values) / (r / 2)
    gamma = (r + n + 1) / n if dist == "gaussian" else (r + n - 1) / n
    error = abs(float(values.mean()) - (1 - 2 * eta + eta**2 * gamma))
    assert error < 4 * float(values.std()) / math.sqrt(repeats)


# ---- memory in closed form -----------------------------------------------------------------------------------------

OPT = {
    "1.3B": 1_315_758_080,
    "2.7B": 2_651_596_800,
    "6.7B": 6_658_473_984,
    "13B": 12_853_473_280,
    "30B": 29_974_540_288,
    "66B": 65_719_701_504,
}


def test_memory_grows_with_the_bytes_of_a_weight() -> None:
    more = OPT["13B"] - OPT["6.7B"]

    def slope(method: str, **options: int) -> float:
        return (
            memory_model(OPT["13B"], method, **options) - memory_model(OPT["6.7B"], method, **options)
        ) / more

    assert slope("inference") == pytest.approx(2, rel=1e-6)
    assert slope("mezo") == pytest.approx(2, rel=1e-6)
    assert slope("mezo", dtype_bytes=4) == pytest.approx(4, rel=1e-6)
    assert slope("adam") == pytest.approx(16, rel=1e-6)  # float32 weights, gradients and two moments


def test_mezo_needs_what_inference_needs() -> None:
    for count in OPT.values():
        assert memory_model(count, "mezo") == pytest.approx(memory_model(count, "inference"), rel=0.05)
        assert memory_model(count, "inference") >= 2 * count
        assert memory_model(count, "adam") >= 16 * count


def test_largest_model_on_one_device_of_80_gigabytes() -> None:
    room = 80 * 2**30
    fits = {
        method: [name for name, count in OPT.items() if memory_model(count, method) <= room]
        for method in ("mezo", "adam")
    }
    assert fits["mezo"][-1] == "30B"
    assert fits["adam"][-1] == "2.7B"


@pytest.mark.parametrize("method", ["prefix", "lora"])
def test_adapters_lie_between_inference_and_adam(method: str) -> None:
    for count in OPT.values():
        assert memory_model(count, "inference") <= memory_model(count, method) < memory_model(count, "adam")
