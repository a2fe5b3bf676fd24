"""torch's PeriodicModelAverager and accelerate's LocalSGD beside LocalOptimizer, period 4, in two processes under torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from papercore.local_sgd import ConstantH, LocalOptimizer
from tests.local_sgd.ranks_problem import INNERS, batch, flat, loss_on, network

RANK, STEPS, PERIOD = 0, 14, 4


def spread(weights: torch.Tensor) -> float:
    """Largest difference between this rank's weights and the mean."""
    mean = weights.clone()
    dist.all_reduce(mean)
    return float((weights - mean / dist.get_world_size()).abs().max())


def ours() -> dict:
    model = network()
    optimizer = LocalOptimizer(INNERS["sgd"](model.parameters()), ConstantH(PERIOD), total_steps=STEPS)
    found = []
    with optimizer:
        for step in range(STEPS):
            loss_on(model, batch(RANK, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(spread(flat(model)))
    return {"spread": found, "end": spread(flat(model))}


def of_torch() -> dict:
    # Imported here: this module of torch warns of a deprecation, and pytest reads every file for its examples.
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model = network()
    pointers = [p.data_ptr() for p in model.parameters()]
    optimizer = PostLocalSGDOptimizer(INNERS["sgd"](model.parameters()), PeriodicModelAverager(period=PERIOD))
    found = []
    for step in range(STEPS):
        loss_on(model, batch(RANK, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(spread(flat(model)))
    kept = pointers == [p.data_ptr() for p in model.parameters()]
    averager, said = PeriodicModelAverager(period=PERIOD), ""
    try:
        averager.average_parameters(model.parameters())  # after zero_grad(): no parameter has a gradient
    except (RuntimeError, ValueError) as error:
        said = str(error)
    return {"spread": found, "end": spread(flat(model)), "kept": kept, "after_zero_grad": said}


def of_accelerate() -> dict:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    accelerator = Accelerator(cpu=True)
    plain = network()
    model, optimizer = accelerator.prepare(plain, INNERS["sgd"](plain.parameters()))
    found = []
    with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=PERIOD) as local:
        for step in range(STEPS):
            accelerator.backward(loss_on(model, batch(RANK, step)))
            optimizer.step()
            optimizer.zero_grad()
            local.step()
            found.append(spread(flat(plain)))
    return {"spread": found, "end": spread(flat(plain)), "kind": str(accelerator.distributed_type)}


def main() -> None:
    global RANK
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    found = {"ours": ours(), "torch": of_torch()}
    if "--accelerate" in sys.argv:
        found["accelerate"] = of_accelerate()
    torch.save(found, Path(sys.argv[1]) / f"rank{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
