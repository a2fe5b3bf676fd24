"""The problem that the ranks of test_optimizer_ranks.py train on: a tiny network and batches by (rank, step)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

Batch = tuple[Tensor, Tensor]


def network(dtype: torch.dtype = torch.float64, *, norm: bool = False, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    middle = nn.BatchNorm1d(6) if norm else nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def batch(rank: int, step: int, dtype: torch.dtype = torch.float64, rows: int = 5) -> Batch:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(rows, 4, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(dtype)


def loss_on(model: nn.Module, pair: Batch) -> Tensor:
    return functional.mse_loss(model(pair[0]), pair[1])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


INNERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, weight_decay=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
}
