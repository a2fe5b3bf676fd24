"""What each of two processes runs under torchrun (test_distributed.py); the argument is a folder for results."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from papercore.mezo import MeZO, noise, replay
from tests.mezo.reference import joined

STEPS = 8


def network(width: int = 6) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * noise(i, 0, p.numel()).reshape(p.shape))
    return model


def data() -> tuple[Tensor, Tensor]:
    return noise(20, 0, 80).reshape(20, 4), noise(21, 0, 40).reshape(20, 2)


def loss_on(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    # In double precision, so that the order of a sum over the batch does not show.
    return (model(x).double() - y.double()).square().mean()


def outcome(optimizer: MeZO, model: nn.Module) -> dict:
    return {
        "weights": [p.detach().flatten().tolist() for p in model.parameters()],
        "slopes": optimizer.log.projected_grads.tolist(),
        "seed": optimizer.log.seed,
        "sent": 0 if optimizer._ranks is None else optimizer._ranks.bytes_sent,
    }


def batch(rank: int, width: int = 6, **options: object) -> dict:
    """Each rank its half of the batch."""
    model, (x, y) = network(width), data()
    optimizer = MeZO(
        model.parameters(),
        0.01,
        1e-3,
        seed=5,
        n=2,
        process_group=dist.group.WORLD,
        check_every=0,
        **options,
    )
    before = optimizer._ranks.bytes_sent
    for _ in range(STEPS):
        optimizer.step(lambda: loss_on(model, x[rank::2], y[rank::2]))
    optimizer.flush()
    result = outcome(optimizer, model)
    result["sent"] -= before
    replayed = replay(network(width), optimizer.log)
    result["replayed"] = all(
        torch.equal(a, b) for a, b in zip(replayed.parameters(), model.parameters(), strict=True)
    )
    return result


def directions(rank: int) -> dict:
    """Each rank two directions of its own, on the whole batch."""
    model, (x, y) = network(), data()
    optimizer = MeZO(
        model.parameters(),
        0.01,
        1e-3,
        seed=5,
        n=2,
        momentum=0.5,
        process_group=dist.group.WORLD,
        split="directions",
        mode="exact",
    )
    for _ in range(STEPS):
        optimizer.step(lambda: loss_on(model, x, y))
    replayed = replay(network(), optimizer.log)
    result = outcome(optimizer, model)
    result["replayed"] = all(
        torch.equal(a, b) for a, b in zip(replayed.parameters(), model.parameters(), strict=True)
    )
    return result


def seeds(rank: int) -> dict:
    import warnings

    model, (x, y) = network(), data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = MeZO(model.parameters(), 0.01, seed=2**64 - 7 - rank, process_group=dist.group.WORLD)
    optimizer.step(lambda: loss_on(model, x, y))
    return {
        **outcome(optimizer, model),
        "warnings": [str(w.message) for w in caught if "seed" in str(w.message)],
    }


def troubles(rank: int) -> dict:
    """A NaN on one rank alone, weights that differ at the start, replicas that drift apart."""
    said = {}
    model, (x, y) = network(), data()
    optimizer = MeZO(model.parameters(), 0.01, process_group=dist.group.WORLD, check_every=2, mode="exact")
    before = joined(list(model.parameters()))
    try:
        optimizer.step(lambda: float("nan") if rank == 1 else 0.5)
    except FloatingPointError as error:
        said["nan"] = str(error)
    said["restored"] = torch.equal(joined(list(model.parameters())), before) and len(optimizer.log) == 0
    optimizer.step(lambda: loss_on(model, x, y))
    with torch.no_grad():
        model[0].bias[0] += 1e-3 * rank
    try:
        optimizer.step(lambda: loss_on(model, x, y))
    except RuntimeError as error:
        said["drift"] = str(error)
    other = network()
    with torch.no_grad():
        other[2].weight[1, 1] += rank
    try:
        MeZO(other.parameters(), 0.01, process_group=dist.group.WORLD)
    except ValueError as error:
        said["start"] = str(error)
    return said


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {
        "batch": batch(rank),
        "pipelined": batch(rank, pipelined=True),
        "wide": batch(rank, width=600),
        "directions": directions(rank),
        "seeds": seeds(rank),
        "troubles": troubles(rank),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    # Leave at once: interpreter teardown after gloo may take seconds on a busy machine.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
