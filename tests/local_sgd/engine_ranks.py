"""What K processes run under torchrun (test_virtual_processes.py); arguments: a folder for results, then cases
such as ordered-momentum (a reduction and an optimizer).

A perceptron on scikit-learn's digits, 300 steps under QSR with a cosine learning rate, one thread, oneDNN off. The tests import
the same network, batches and rates for the virtual workers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from papercore.local_sgd import QSR, LocalOptimizer, cosine_lr

STEPS, WARMUP, EACH, HELD_OUT = 300, 20, 8, 400
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.05),
}
# Peak learning rates at which training is stable, and schedules that make some 80 rounds of them.
PEAK = {"momentum": 0.1, "adamw": 1e-2}
SCHEDULE = {"momentum": QSR(alpha=0.12, h_base=2), "adamw": QSR(alpha=1.2e-2, h_base=2)}


def rate_of(optimizer: str) -> Callable[[int], float]:
    return cosine_lr(PEAK[optimizer], STEPS, warmup_steps=WARMUP)


def network(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.15 if p.dim() > 1 else 0.01))
    return model


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def batch(step: int, worker: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """EACH training images of one worker, the same in every process: worker w takes slice w of one permutation."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    images, labels = digits()
    order = torch.randperm(len(images) - HELD_OUT, generator=generator)
    mine = order[worker * EACH : (worker + 1) * EACH]
    return images[mine], labels[mine]


def loss_on(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(pair[0]), pair[1])


@contextmanager
def same_kernels() -> Iterator[None]:
    """One thread and no oneDNN, so that a stacked product and a single one run the same code."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="TF32 acceleration"
        )  # of torch's own, on entering and leaving
        with torch.backends.mkldnn.flags(enabled=False):
            yield
    torch.set_num_threads(threads)


def train(reduction: str, optimizer: str) -> dict[str, object]:
    """One run of this rank: its weights, optimizer state, losses, and the steps at which it synchronised."""
    rank, model, rate = dist.get_rank(), network(), rate_of(optimizer)
    inner = OPTIMIZERS[optimizer](list(model.parameters()))
    losses, synced = [], []
    with (
        same_kernels(),
        LocalOptimizer(
            inner, SCHEDULE[optimizer], total_steps=STEPS, warmup_steps=WARMUP, reduction=reduction
        ) as local,
    ):
        for step in range(STEPS):
            for group in local.param_groups:
                group["lr"] = rate(step)
            local.zero_grad()
            loss = loss_on(model, batch(step, rank))
            loss.backward()
            synced.append(local.step())
            losses.append(loss.detach())
    return {
        "weights": {name: p.detach() for name, p in model.named_parameters()},
        "momenta": [
            {key: value for key, value in inner.state[p].items() if value.dim()} for p in model.parameters()
        ],
        "losses": torch.stack(losses),
        "synced": synced,
    }


def main(folder: Path, cases: list[str]) -> None:
    dist.init_process_group("gloo")
    results = {case: train(*case.split("-")) for case in cases}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
