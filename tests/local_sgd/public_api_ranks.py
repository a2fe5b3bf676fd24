"""What each of two processes runs under torchrun (test_public_api_optimizer.py); the argument is a folder for results."""

import contextlib
import datetime
import io
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from papercore.local_sgd import QSR, ConstantH, LocalOptimizer, SyncSchedule, VirtualWorkers, cosine_lr
from tests.local_sgd.public_api_reference import batch, digits_batch, digits_network, flat, loss, network

TOTAL, WARM = 30, 4
RATE = cosine_lr(0.1, TOTAL, warmup_steps=WARM)
RESUMED = QSR(0.25, 3)
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=1.0),
    "momentum": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.05),
}


def wrapped(
    model: nn.Module, name: str = "momentum", schedule: SyncSchedule | None = None, **options
) -> LocalOptimizer:
    options = {"total_steps": TOTAL, "warmup_steps": WARM, **options}
    return LocalOptimizer(OPTIMIZERS[name](model.parameters()), schedule or QSR(0.2, 2), **options)


def gradient(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    value = loss(model, pair)
    value.backward()
    return value.detach()


def walk(
    model: nn.Module,
    optimizer: LocalOptimizer,
    rank: int,
    steps: range = range(TOTAL),
    rate: Callable[[int], float] = RATE,
) -> dict:
    """Local steps; after each one: whether the ranks met, the weights, the length of the round."""
    found: dict = {"synced": [], "weights": [], "h": []}
    dtype = flat(model).dtype
    for t in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(t)
        optimizer.zero_grad()
        gradient(model, batch(t, rank, dtype=dtype))
        found["synced"].append(optimizer.step())
        found["weights"].append(flat(model))
        found["h"].append(optimizer.h)
    found["weights"] = torch.stack(found["weights"])
    return found


def state_of(optimizer: LocalOptimizer, key: str) -> Tensor:
    return torch.cat(
        [optimizer.state[p][key].detach().reshape(-1) for g in optimizer.param_groups for p in g["params"]]
    ).clone()


def plain(rank: int, name: str, schedule: SyncSchedule | None = None, **options) -> dict:
    model = network()
    optimizer = wrapped(model, name, schedule, **options)
    addresses = [p.data_ptr() for p in model.parameters()]
    found = walk(model, optimizer, rank)
    found["in_place"] = addresses == [p.data_ptr() for p in model.parameters()]
    found["bytes"] = optimizer.bytes_sent
    found["global_step"] = optimizer.global_step
    return found


def closure(rank: int) -> dict:
    model = network()
    optimizer = wrapped(model)
    synced, losses = [], []
    for t in range(TOTAL):
        for group in optimizer.param_groups:
            group["lr"] = RATE(t)

        def evaluate(t: int = t) -> Tensor:
            optimizer.zero_grad()
            return gradient(model, batch(t, rank))

        expected = loss(model, batch(t, rank)).item()
        synced.append(optimizer.step(evaluate))
        losses.append((expected, float(optimizer.last_loss)))
    return {"synced": synced, "weights": flat(model), "losses": losses}


def scheduler(rank: int, on_wrapper: bool) -> dict:
    """An LRScheduler stepped after the optimizer; nobody adjusts H by hand."""
    model = network()
    inner = OPTIMIZERS["momentum"](model.parameters())
    optimizer = LocalOptimizer(inner, QSR(0.2, 2), total_steps=TOTAL, warmup_steps=WARM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer if on_wrapper else inner, RATE)
    synced = []
    for t in range(TOTAL):
        optimizer.zero_grad()
        gradient(model, batch(t, rank))
        synced.append(optimizer.step())
        schedule.step()
    return {"synced": synced, "weights": flat(model)}


def groups(rank: int) -> dict:
    """Two groups of different rates; the second one decides H."""
    model = network()
    inner = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "lr": 0.05}]
    )
    lengths = {}
    for reference in (0, 1):
        optimizer = LocalOptimizer(inner, QSR(0.1, 1), total_steps=50, reference_group=reference)
        gradient(model, batch(0, 0))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a long first round
            optimizer.step()
        lengths[reference] = optimizer.h
        optimizer.finish()
    return lengths


def sync_by_hand(rank: int, state: str) -> dict:
    """Three steps of a long round, then an average by hand, twice."""
    found: dict = {}
    for name, keys in {"momentum": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}.items():
        model = network()
        optimizer = wrapped(model, name, ConstantH(20), state=state)
        walk(model, optimizer, rank, range(3), lambda t: 0.05)
        before = {key: state_of(optimizer, key) for key in keys}
        weights = flat(model)
        optimizer.sync()
        found[name] = {"before": before, "after": {key: state_of(optimizer, key) for key in keys}}
        found[name] |= {"weights": weights, "averaged": flat(model)}
        optimizer.sync()
        found[name]["again"] = flat(model)
        found[name]["next"] = walk(model, optimizer, rank, range(3, 24), lambda t: 0.05)["synced"]
    return found


def early(rank: int, by_context: bool) -> dict:
    """A run that ends inside a round."""
    model = network()
    optimizer = wrapped(model, "momentum", ConstantH(8))
    leave = optimizer if by_context else contextlib.nullcontext()
    with leave:
        walk(model, optimizer, rank, range(13))
        before = flat(model)
    if not by_context:
        optimizer.finish()
    once = flat(model)
    optimizer.finish()
    return {"before": before, "once": once, "twice": flat(model)}


def unused(rank: int) -> dict:
    """A parameter that gets a gradient on rank 0 alone, and one that never does."""
    model = nn.ParameterDict(
        {"some": torch.ones(3, dtype=torch.float64), "none": torch.ones(2, dtype=torch.float64)}
    )
    optimizer = wrapped(model, "sgd", ConstantH(2))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(2):
        optimizer.zero_grad()
        if rank == 0:
            model["some"].sum().backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.items()}


def zeroed(rank: int) -> dict:
    """sync() straight after zero_grad() sets every gradient to None."""
    model = network()
    optimizer = wrapped(model, "sgd", ConstantH(20))
    walk(model, optimizer, rank, range(3), lambda t: 0.05)
    optimizer.zero_grad(set_to_none=True)
    before = flat(model)
    optimizer.sync()
    return {"before": before, "after": flat(model)}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5, dtype=torch.float64)
        self.net = network()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.norm(x))


def buffers(rank: int, policy: str) -> dict:
    model = Normed()
    ours = [batch(100 + i, rank)[0] for i in range(6)]
    options = {"model": model, "buffers": policy}
    if policy == "reestimate":
        options["batches"] = lambda: ours
    optimizer = LocalOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), ConstantH(3), total_steps=6, **options
    )
    with optimizer:
        for t in range(6):
            if t == 5:
                optimizer.zero_grad()
                gradient(model, batch(t, rank))
                before = {name: b.clone() for name, b in model.named_buffers()}
            else:
                optimizer.zero_grad()
                gradient(model, batch(t, rank))
            optimizer.step()
    after = {name: b.clone() for name, b in model.named_buffers()}
    return {"before": before, "after": after, "weights": flat(model), "batches": torch.stack(ours)}


def subgroup(rank: int) -> dict:
    """A group of this rank alone: no communication with the other."""
    mine = [dist.new_group([r]) for r in range(2)][rank]
    model = network()
    optimizer = wrapped(model, process_group=mine)
    return walk(model, optimizer, rank)


def bits(rank: int) -> dict:
    """V9: single precision, one thread, oneDNN off, the digits network, momentum and QSR."""
    make = lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9)  # noqa: E731
    schedule, rate = QSR(0.1, 2), cosine_lr(0.05, TOTAL, warmup_steps=WARM)
    options = {"total_steps": TOTAL, "warmup_steps": WARM}
    found = {}
    with torch.backends.mkldnn.flags(enabled=False):
        for reduction in ("all_reduce", "ordered"):
            model = digits_network()
            optimizer = LocalOptimizer(make(model.parameters()), schedule, reduction=reduction, **options)
            for t in range(TOTAL):
                for group in optimizer.param_groups:
                    group["lr"] = rate(t)
                optimizer.zero_grad()
                gradient(model, digits_batch(t, rank))
                optimizer.step()
            found[reduction] = flat(model)
        workers = VirtualWorkers(digits_network(), 2, make, schedule, **options)
        for t in range(TOTAL):
            for group in workers.optimizer.param_groups:
                group["lr"] = rate(t)
            workers.step(loss, [digits_batch(t, w) for w in range(2)])
        found["virtual"] = flat(workers.mean_model())
    return found


def resume(rank: int, name: str) -> dict:
    """Stop inside a round, save, start afresh, go on."""
    straight = network()
    walk(straight, wrapped(straight, name, RESUMED), rank)
    found = {"straight": flat(straight), "resumed": {}}
    for stop in (5, 11, 12, 25):
        model = network()
        optimizer = wrapped(model, name, RESUMED)
        walk(model, optimizer, rank, range(stop))
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        kept = torch.load(file, weights_only=True)
        fresh = network()
        second = wrapped(fresh, name, RESUMED)
        fresh.load_state_dict(kept["model"])
        second.load_state_dict(kept["optimizer"])
        rest = walk(fresh, second, rank, range(stop, TOTAL))
        found["resumed"][stop] = {"weights": flat(fresh), "synced": rest["synced"], "at": second.global_step}
    return found


def said(action: Callable[[], object]) -> dict:
    try:
        action()
    except Exception as error:  # which kind it is, the test decides
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"kinds": kinds, "text": str(error)}
    return {"kinds": [], "text": "nothing was raised"}


def troubles(rank: int) -> dict:
    """What ranks can disagree on. Each on a group of its own, so that one trouble does not disturb the next."""

    def group() -> dist.ProcessGroup:
        return dist.new_group([0, 1], timeout=datetime.timedelta(seconds=20))

    def rates() -> None:
        model = network()
        optimizer = wrapped(model, "sgd", QSR(0.2, 2), process_group=group(), warmup_steps=0)
        walk(model, optimizer, rank, range(20), lambda t: 0.1 if rank == 0 else 0.05)

    def schedules() -> None:
        model = network()
        optimizer = wrapped(model, "sgd", ConstantH(2 + rank), process_group=group())
        walk(model, optimizer, rank, range(6))

    def layouts() -> None:
        model = nn.Sequential(nn.Linear(5, 6 + rank), nn.Tanh(), nn.Linear(6 + rank, 3))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        optimizer = wrapped(model, "sgd", ConstantH(2), process_group=group())
        for t in range(2):
            gradient(model, batch(t, rank, dtype=torch.float32))
            optimizer.step()

    def order() -> None:
        model = [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))]
        optimizer = LocalOptimizer(
            torch.optim.SGD(model[:: 1 - 2 * rank], lr=0.1),
            ConstantH(1),
            total_steps=2,
            process_group=group(),
        )
        optimizer.step()

    def starts() -> None:
        model = network(seed=rank)
        optimizer = wrapped(model, "sgd", ConstantH(2), process_group=group())
        walk(model, optimizer, rank, range(2))

    def counts() -> None:
        model = network()
        optimizer = wrapped(model, "sgd", ConstantH(8), process_group=group())
        walk(model, optimizer, rank, range(8 - 2 * rank))
        optimizer.finish()

    results = {}
    for action in (rates, schedules, layouts, order, starts, counts):
        results[action.__name__] = said(action)
        dist.barrier()
    return results


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    results = {
        **{name: plain(rank, name) for name in OPTIMIZERS},
        **{f"h1_{name}": plain(rank, name, ConstantH(1)) for name in OPTIMIZERS},
        "tail": plain(rank, "momentum", ConstantH(7)),
        "whole": plain(rank, "momentum", ConstantH(1000)),
        "ordered": plain(rank, "momentum", reduction="ordered"),
        "closure": closure(rank),
        "scheduler_inner": scheduler(rank, on_wrapper=False),
        "scheduler_wrapper": scheduler(rank, on_wrapper=True),
        "groups": groups(rank),
        "local": sync_by_hand(rank, "local"),
        "mean": sync_by_hand(rank, "mean"),
        "finish": early(rank, by_context=False),
        "context": early(rank, by_context=True),
        "unused": unused(rank),
        "zeroed": zeroed(rank),
        **{f"buffers_{policy}": buffers(rank, policy) for policy in ("none", "mean", "reestimate")},
        "subgroup": subgroup(rank),
        "bits": bits(rank),
        **{f"resume_{name}": resume(rank, name) for name in ("momentum", "adamw")},
        "troubles": troubles(rank),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
