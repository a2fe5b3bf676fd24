"""Small models with a skill to localise, and the official mask-learning loop written out plainly.

The loop is a restatement of the published code's algorithm (github.com/abhishekpanigrahi1996/Skill-Localization-by-grafting,
7 commits of May 2023) with its layout kept: three models, dense S, base, difference, gradients and accumulators, both
models copied into the live one at every interpolation, and an evaluation on train and development data at every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from papercore.grafting import Graft, Mask, random_mask, task_vector

Batch = tuple[Tensor, Tensor]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(
    seed: int = 0, *, width: int = 16, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> nn.Module:
    """Two linear layers with a LayerNorm and a BatchNorm's buffers aside: 4 inputs, 3 classes."""
    model = nn.Sequential(
        nn.Linear(4, width), nn.LayerNorm(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3)
    )
    generator = seeded(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("1."):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model.to(dtype)


def finetuned(base: nn.Module, seed: int = 1, *, scale: float = 0.3) -> nn.Module:
    """The base with every parameter moved at random."""
    model = copy.deepcopy(base)
    generator = seeded(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def trained(base: nn.Module, data: list[Batch], *, steps: int = 60, lr: float = 0.5) -> nn.Module:
    """The base fine-tuned by plain gradient descent."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum((loss(model, batch) for batch in data), torch.zeros(())).div(len(data)).backward()  # type: ignore[union-attr]
        optimizer.step()
    optimizer.zero_grad()
    return model


def batches(
    count: int = 3, size: int = 8, *, seed: int = 5, dtype: torch.dtype = torch.float32
) -> list[Batch]:
    """Labels that follow from the signs of two inputs."""
    generator = seeded(seed)
    made = []
    for _ in range(count):
        x = torch.randn(size, 4, generator=generator)
        made.append((x.to(dtype), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()))
    return made


def loss(model: Any, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]).float(), batch[1])


def exact_loss(model: Any, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def accuracy(model: Any, batch: Batch) -> float:
    return float((model(batch[0]).argmax(1) == batch[1]).double().mean())


class Quadratic(nn.Module):
    """theta alone; losses are functions of it."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class OfficialLoop:
    """Mask learning as the published code lays it out."""

    def __init__(
        self,
        model: nn.Module,
        pre: nn.Module,
        ft: nn.Module,
        names: list[str],
        *,
        logits: dict[str, Tensor],
        base: dict[str, Tensor] | None = None,
        bias: float = 10.0,
    ) -> None:
        self.model, self.pre, self.ft, self.names, self.bias = model, pre, ft, names, bias
        self.difference = [
            dict(ft.named_parameters())[n].detach() - dict(pre.named_parameters())[n].detach() for n in names
        ]
        self.logits = [logits[n].clone() for n in names]
        self.base = [
            torch.zeros_like(d) if base is None else base[n].to(d.dtype)
            for n, d in zip(names, self.difference, strict=True)
        ]

    def interpolate(self, *, rounded: bool) -> None:
        """theta_pre loaded into the live model, then gamma * difference added, tensor by tensor found by name."""
        for counter, name in enumerate(self.names):
            for pre_name, pre_tensor in self.pre.named_parameters():
                if pre_name != name:
                    continue
                for live_name, live in self.model.named_parameters():
                    if live_name == name:
                        gate = torch.sigmoid(self.logits[counter] - self.bias)
                        gamma = self.base[counter] * (1 - gate) + (1 - self.base[counter]) * gate
                        if rounded:
                            gamma = torch.round(gamma)
                        with torch.no_grad():
                            live += pre_tensor - live
                            live += gamma * self.difference[counter]

    def update(
        self, loss_fn: Callable[[Any, Any], Tensor], data: list[Any], lr: float, *, most: int = 128
    ) -> None:
        """One update of S: the mean over at most 128 micro-batches of grad * difference, then plain descent."""
        self.interpolate(rounded=False)
        total = [torch.zeros_like(d) for d in self.difference]
        used = data[:most]
        for batch in used:
            loss_fn(self.model, batch).backward()
            grads = dict(self.model.named_parameters())
            product = [grads[n].grad * d for n, d in zip(self.names, self.difference, strict=True)]
            total = [t + p for t, p in zip(total, product, strict=True)]
            self.model.zero_grad()
        for counter in range(len(self.names)):
            gate = torch.sigmoid(self.logits[counter] - self.bias)
            slope = gate * (1 - gate) * (1 - 2 * self.base[counter])
            self.logits[counter] -= lr * slope * total[counter] / len(used)

    def run(
        self,
        loss_fn: Callable[[Any, Any], Tensor],
        metric: Callable[[Any, Any], float],
        data: list[Any],
        val: list[Any],
        *,
        lr: float,
        steps: int,
    ) -> dict[str, Tensor]:
        """round(gamma(S)) of the step with the best metric on train plus development data."""
        best, kept = 0.0, [s.clone() for s in self.logits]
        for _ in range(steps):
            self.update(loss_fn, data, lr)
            self.interpolate(rounded=True)
            with torch.no_grad():
                score = sum(metric(self.model, b) for b in data) / len(data) + sum(
                    metric(self.model, b) for b in val
                ) / len(val)
            if score > best:
                best, kept = score, [s.clone() for s in self.logits]
        self.logits = kept
        return {
            n: torch.round(torch.sigmoid(s - self.bias) * (1 - 2 * g) + g) == 1
            for n, s, g in zip(self.names, kept, self.base, strict=True)
        }


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def made(
    dtype: torch.dtype = torch.float32, *, k: int = 20, seed: int = 0
) -> tuple[nn.Module, nn.Module, Mask, Graft]:
    """Two models, a mask and the graft that it makes of them."""
    base = network(dtype=dtype)
    tuned = finetuned(base, seed + 1)
    mask = random_mask(task_vector(base, tuned), k=k, generator=seed)
    return base, tuned, mask, Graft.from_mask(tuned, mask)
