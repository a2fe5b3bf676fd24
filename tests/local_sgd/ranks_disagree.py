"""Ranks that do not agree, under torchrun (test_optimizer_disagreement.py): every one of them must hear of it, none may hang.

The last rank is the odd one. A scenario returns what this rank was told, and whether its parameters were left alone.
"""

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from papercore.local_sgd import QSR, ConstantH, LocalOptimizer
from tests.local_sgd.ranks_problem import INNERS, batch, flat, loss_on, network

RANK = SIZE = 0


def odd() -> bool:
    return RANK == SIZE - 1


def make(model: nn.Module | None = None, h: int = 4, total: int | None = 12, **options: object) -> tuple:
    model = network() if model is None else model
    inner = INNERS[str(options.pop("inner", "sgd"))](model.parameters())
    schedule = options.pop("schedule", ConstantH(h))
    return model, LocalOptimizer(inner, schedule, total_steps=total, **options)


def told(model: nn.Module, call: Callable[[], object]) -> dict:
    seen = []
    try:
        call()
    except (RuntimeError, ValueError) as error:
        seen = [type(error).__name__, str(error)]
    return {"told": seen, "weights": flat(model)}


def go(model: nn.Module, optimizer: LocalOptimizer, steps: int, last: list | None = None) -> None:
    """Steps; `last` gets the weights after every local step, seen by a hook, and after every average."""
    if last is not None:
        optimizer.register_step_post_hook(lambda *_: last.append(flat(model)))
    for step in range(steps):
        loss_on(model, batch(RANK, step)).backward()
        if optimizer.step() and last is not None:
            last.append(flat(model))
        optimizer.zero_grad()


def at_the_start(change: Callable[[nn.Module, dict], object]) -> dict:
    model, options = network(), {}
    if odd():
        model = change(model, options) or model
    return told(model, lambda: make(model, **options))


def another_value(model: nn.Module, options: dict) -> None:
    with torch.no_grad():  # one last bit of one weight
        weight = model[2].weight
        weight[1, 2] = torch.nextafter(weight[1, 2], torch.tensor(9.0, dtype=weight.dtype))


def another_shape(model: nn.Module, options: dict) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def out_of_batches(steps: int, total: int | None) -> dict:
    """The odd rank has batches for `steps` steps, the others for 12."""
    model, optimizer = make(total=total)
    last: list = []

    def run() -> None:
        with optimizer:
            go(model, optimizer, steps if odd() else 12, last)

    found = told(model, run)
    return {**found, "alone": torch.equal(last[-1], found["weights"])}


def different_rates() -> dict:
    """The rule makes rounds of different lengths of them; they meet all the same."""
    model, optimizer = make(schedule=QSR(0.2, 1), total=40)
    optimizer.param_groups[0]["lr"] = 0.1 if odd() else 0.08
    return told(model, lambda: go(model, optimizer, 20))


def rates_of_equal_rounds() -> dict:
    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.1 if odd() else 0.08
    return told(model, lambda: go(model, optimizer, 12))


def one_calls_sync() -> dict:
    model, optimizer = make()

    def run() -> None:
        go(model, optimizer, 2)
        if odd():
            optimizer.sync()
        go(model, optimizer, 2)

    return told(model, run)


def another_checkpoint() -> dict:
    model, optimizer = make()
    go(model, optimizer, 4)
    saved = optimizer.state_dict()
    if odd():
        saved["local_sgd"]["global_step"] = 3
    optimizer.load_state_dict(saved)
    return told(model, lambda: go(model, optimizer, 8))


def frozen_by_one() -> dict:
    model, optimizer = make()
    go(model, optimizer, 1)
    model[0].requires_grad_(not odd())
    return told(model, lambda: go(model, optimizer, 3))


def no_state_on_one() -> dict:
    model, optimizer = make(inner="adamw", state="mean", h=2)

    def run() -> None:
        for step in range(2):
            loss_on(model, batch(RANK, step)).backward()
            if odd():
                model[0].bias.grad = None
            optimizer.step()

    return told(model, run)


SCENARIOS: dict[str, Callable[[], dict]] = {
    "values": lambda: at_the_start(another_value),
    "shapes": lambda: at_the_start(another_shape),
    "frozen": lambda: at_the_start(lambda model, _: model[0].requires_grad_(False) and None),
    "schedule": lambda: at_the_start(lambda _, options: options.update(h=5)),
    "total_steps": lambda: at_the_start(lambda _, options: options.update(total=13)),
    "reduction": lambda: at_the_start(lambda _, options: options.update(reduction="ordered")),
    "batches, inside a round": lambda: out_of_batches(6, 12),
    "batches, between rounds": lambda: out_of_batches(8, 12),
    "batches, no step at all": lambda: out_of_batches(4, None),
    "rates": different_rates,
    "rates, equal rounds": rates_of_equal_rounds,
    "sync": one_calls_sync,
    "checkpoint": another_checkpoint,
    "frozen by one": frozen_by_one,
    "no state": no_state_on_one,
}


def main() -> None:
    global RANK, SIZE
    torch.set_num_threads(1)
    # A scenario in which a rank waits for nobody ends here, with an error, and not with the test's patience.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    found = {name: scenario() for name, scenario in SCENARIOS.items()}
    # After all of them the ranks still work together: nothing is left over in the network.
    model, optimizer = make()
    go(model, optimizer, 12)
    torch.save({**found, "afterwards": flat(model)}, Path(sys.argv[1]) / f"rank{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
