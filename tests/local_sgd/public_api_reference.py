"""Independent truth for the test_public_api files: the rule, the recursions and the loops, written plainly here.

Nothing in this file calls papercore. Symbols are those of the papers: T steps in all, W of warm-up, K workers, s2 the
variance of the label noise that one worker sees.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Learning = Callable[[int], float]
FLOOR = 1e-6  # where the warm-up starts and where the cosine and the line end


def cosine(peak: float, total: int, warm: int = 0) -> Learning:
    def rate(t: int) -> float:
        if t < warm:
            return FLOOR + (peak - FLOOR) * t / warm
        return FLOOR + (peak - FLOOR) * 0.5 * (1 + math.cos(math.pi * (t - warm) / (total - warm)))

    return rate


def line(peak: float, total: int, warm: int = 0) -> Learning:
    def rate(t: int) -> float:
        if t < warm:
            return FLOOR + (peak - FLOOR) * t / warm
        return peak + (FLOOR - peak) * (t - warm) / (total - warm)

    return rate


def staircase(peak: float, warm: int, milestones: Sequence[int]) -> Learning:
    """A tenth of the rate from each milestone on."""

    def rate(t: int) -> float:
        if t < warm:
            return FLOOR + (peak - FLOOR) * t / warm
        return peak * 0.1 ** sum(t >= m for m in milestones)

    return rate


def powers_of_two(rate: Learning) -> Learning:
    """The rate rounded to the nearest power of two, on the scale of the logarithm."""
    return lambda t: 2.0 ** round(math.log2(rate(t)))


def rounds(
    rate: Learning, total: int, *, warm: int, alpha: float, h_base: int, power: float
) -> list[tuple[int, int]]:
    """(start, length) of every round: section 2 of the QSR sheet, line by line."""
    found, t = [], 0
    while t < total:
        if t < warm or alpha == 0:
            h = h_base
        elif rate(t) == 0:
            h = total
        else:
            h = max(h_base, math.floor((alpha / rate(t)) ** power * (1 + 1e-12)))
        h = max(1, min(h, total - t))
        found.append((t, h))
        t += h
    return found


# ---- the hyperbola: L = (uv - 1)^2 / 2 with label noise -------------------------------------------------------------


def psi(x: float) -> float:
    return 0.0 if x == 0 else 1 + math.expm1(-x) / x


def hyperbola_theory(
    layout: Sequence[tuple[int, int]],
    rate: Learning,
    *,
    k: int,
    s2: float,
    start: tuple[float, float] = (2.0, 0.5),
    continuous: bool = False,
) -> list[float]:
    """Sharpness lambda after each round (and at the start): the Local SGD sheet, section 2, "Exact toy"."""
    log_d = math.log(start[0] ** 2 - start[1] ** 2)
    sharp = [math.hypot(math.exp(log_d), 2)]
    m = s2 * rate(0) * sharp[0] / ((2 - rate(0) * sharp[0]) * k)
    for first, h in layout:
        lam, loss, w = sharp[-1], 0.0, 0.0
        for t in range(first, first + h):
            eta = rate(t)
            if continuous:
                loss += eta**2 * s2 * (1 / k + (1 - 1 / k) * psi(2 * eta * h * lam))
                continue
            q = (1 - eta * lam) ** 2
            loss += eta**2 * (s2 + m)
            m = q * m + eta**2 * lam**2 * s2
            w = q * w + eta**2 * s2
        log_d += -loss + (1 - 1 / k) * w
        m -= lam**2 * w * (1 - 1 / k)
        sharp.append(math.hypot(math.exp(log_d), 2))
    return sharp


# ---- Local SGD as a loop over workers --------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]
DOUBLE = torch.float64


def network(seed: int = 0, dtype: torch.dtype = DOUBLE) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=DOUBLE))
    return model


def digits_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network of the sheets' digits: 64-48-48-10, ReLU."""
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)).to(
        dtype
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=DOUBLE))
    return model


def digits_batch(step: int, worker: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + worker)
    return torch.rand(4, 64, generator=generator), torch.randint(10, (4,), generator=generator)


def batch(step: int, worker: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10_000 * seed + 100 * step + worker)
    x = torch.randn(4, 5, generator=generator, dtype=DOUBLE).to(dtype)
    return x, torch.randint(3, (4,), generator=generator)


def loss(model: Callable, pair: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(pair[0]), pair[1])


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def average_(models: Sequence[nn.Module]) -> None:
    """Sum in worker order, then divide: into the storages that are there."""
    with torch.no_grad():
        for group in zip(*(model.parameters() for model in models), strict=True):
            total = group[0].clone()
            for other in group[1:]:
                total += other
            total /= len(models)
            for p in group:
                p.copy_(total)


def loop_over_workers(
    models: Sequence[nn.Module],
    make_optimizer: Callable,
    loss: Callable[[nn.Module, Batch], Tensor],
    batches: Callable[[int, int], Batch],
    layout: Sequence[tuple[int, int]],
    rate: Learning,
) -> Sequence[nn.Module]:
    """Each worker its own optimizer; parameters are averaged where a round of ``layout`` ends."""
    optimizers = [make_optimizer(model.parameters()) for model in models]
    ends = {start + length for start, length in layout}
    for t in range(max(ends)):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            for group in optimizer.param_groups:
                group["lr"] = rate(t)
            optimizer.zero_grad()
            loss(model, batches(t, worker)).backward()
            optimizer.step()
        if t + 1 in ends:
            average_(models)
    return models
