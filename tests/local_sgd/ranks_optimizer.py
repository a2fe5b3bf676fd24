"""What every process of test_optimizer_ranks.py runs under torchrun; the argument is a folder for results."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from papercore.local_sgd import QSR, ConstantH, LocalOptimizer, reestimate_batch_norm
from tests.local_sgd.ranks_problem import INNERS, batch, flat, loss_on, network

RANK = SIZE = 0


def train(
    model: nn.Module, optimizer: LocalOptimizer, steps: range, *, dtype: torch.dtype = torch.float64
) -> dict:
    """Steps of this rank; the weights before every average (a hook sees them) and after every step."""
    before: list[Tensor] = []
    handle = optimizer.register_step_post_hook(lambda *_: before.append(flat(model)))
    flags, after, lengths = [], [], []
    for step in steps:
        loss_on(model, batch(RANK, step, dtype)).backward()
        flags.append(optimizer.step())
        lengths.append(optimizer.h)
        after.append(flat(model))
        optimizer.zero_grad()
    handle.remove()
    return {"flags": flags, "h": lengths, "before": torch.stack(before), "after": torch.stack(after)}


def run(inner: str, h: int, steps: int, dtype: torch.dtype = torch.float64, **options: object) -> dict:
    model = network(dtype)
    with LocalOptimizer(
        INNERS[inner](model.parameters()), ConstantH(h), total_steps=steps, **options
    ) as optimizer:
        found = train(model, optimizer, range(steps), dtype=dtype)
    return {**found, "bytes": optimizer.bytes_sent, "rounds": optimizer.rounds_done}


def qsr() -> dict:
    """H grows under a scheduler that is stepped after the optimizer; the last round is cut."""
    model = network()
    inner = INNERS["sgd"](model.parameters())
    optimizer = LocalOptimizer(inner, QSR(0.05, 1), total_steps=40)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    rates, flags, lengths = [], [], []
    for step in range(40):
        rates.append(inner.param_groups[0]["lr"])
        loss_on(model, batch(RANK, step)).backward()
        flags.append(optimizer.step())
        lengths.append(optimizer.h)
        scheduler.step()
        optimizer.zero_grad()
    return {"rates": rates, "flags": flags, "h": lengths, "final": flat(model), "tail": optimizer.finish()}


def sync_by_hand() -> dict:
    model = network()
    optimizer = LocalOptimizer(INNERS["sgd"](model.parameters()), ConstantH(100), total_steps=None)
    found = train(model, optimizer, range(3))
    synced, again = optimizer.sync(), optimizer.sync()
    once = flat(model)
    # A step of rate 0 leaves the weights alone, and averaging equal weights must too.
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.schedule = ConstantH(1)
    found = {
        **found,
        "once": once,
        "synced": [synced, again],
        "twice": train(model, optimizer, range(1))["after"][0],
    }
    optimizer.schedule = ConstantH(100)
    optimizer.param_groups[0]["lr"] = 0.1
    train(model, optimizer, range(2))
    unfinished = flat(model)
    return {
        **found,
        "tail": [optimizer.finish(), optimizer.finish()],
        "unfinished": unfinished,
        "final": flat(model),
    }


def state_policies() -> dict:
    found = {}
    for policy in ("local", "mean"):
        model = network()
        inner = INNERS["adamw"](model.parameters())
        optimizer = LocalOptimizer(inner, ConstantH(3), total_steps=6, state=policy)
        moments: list[Tensor] = []

        def keep(*_: object, inner: torch.optim.Optimizer = inner, moments: list[Tensor] = moments) -> None:
            moments.append(torch.cat([s["exp_avg_sq"].flatten() for s in inner.state.values()]).clone())

        inner.register_step_post_hook(keep)
        train(model, optimizer, range(3))
        keep()
        found[policy] = {
            "before": moments[2],
            "after": moments[3],
            "bytes": optimizer.bytes_sent,
            "counter": float(next(iter(inner.state.values()))["step"]),
        }
        train(model, optimizer, range(3, 6))
    return found


def buffers() -> dict:
    found: dict = {}
    for policy in ("none", "mean", "reestimate"):
        model = network(norm=True)
        norm = model[1]
        optimizer = LocalOptimizer(
            INNERS["sgd"](model.parameters()), ConstantH(4), total_steps=4, model=model, buffers=policy
        )
        local: list[Tensor] = []
        optimizer.register_step_post_hook(
            lambda *_, norm=norm, local=local: local.append(norm.running_var.clone())
        )
        train(model, optimizer, range(4))
        if policy == "reestimate":
            untouched = norm.running_var.clone()
            used = optimizer.reestimate([batch(RANK, 50 + i) for i in range(3)])
            found["untouched"] = torch.equal(untouched, local[-1])
            found["used"] = used
        found[policy] = {
            "local": local[-1],
            "mean": norm.running_mean.clone(),
            "var": norm.running_var.clone(),
            "count": int(norm.num_batches_tracked),
            "weights": flat(model),
            "bytes": optimizer.bytes_sent,
        }
    model = network(norm=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        reestimate_batch_norm(model, [batch(RANK, i)[0] for i in range(2 + (RANK == 1))])
    except ValueError as error:
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        found["uneven"] = (str(error), same, model.training, model[1].momentum)
    return found


def resume() -> dict:
    """Stopped after step 6 of 10, two steps into a round: the same bits as without a stop."""

    def make() -> tuple[nn.Module, LocalOptimizer, torch.optim.lr_scheduler.LRScheduler]:
        model = network(torch.float32)
        optimizer = LocalOptimizer(INNERS["adamw"](model.parameters()), ConstantH(4), total_steps=10)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def go(parts: tuple, steps: range) -> None:
        model, optimizer, scheduler = parts
        for step in steps:
            loss_on(model, batch(RANK, step, torch.float32)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()

    straight = make()
    go(straight, range(6))
    saved = [{k: _copy(v) for k, v in part.state_dict().items()} for part in straight]
    local = flat(straight[0])
    go(straight, range(6, 10))
    again = make()
    for part, values in zip(again, saved, strict=True):
        part.load_state_dict(values)
    loaded = flat(again[0])
    place = (again[1].global_step, again[1].position, again[1].h, again[1].rounds_done)
    go(again, range(6, 10))
    other = {**saved[1], "local_sgd": {**saved[1]["local_sgd"], "rank": (RANK + 1) % SIZE}}
    return {
        "local": local,
        "loaded": loaded,
        "place": place,
        "straight": flat(straight[0]),
        "again": flat(again[0]),
        "bytes": (straight[1].bytes_sent, again[1].bytes_sent),
        "stranger": _said(lambda: again[1].load_state_dict(other)),
    }


def _copy(value: object) -> object:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value


def _said(call: object) -> tuple[str, str]:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def layouts() -> dict:
    """Several dtypes, strides, an empty and a frozen parameter, one that has a gradient on rank 0 alone; no new storages."""
    generator = torch.Generator().manual_seed(3)
    make = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator))  # noqa: E731
    params = [
        make(3, 2),
        nn.Parameter(torch.ones(5, dtype=torch.bfloat16)),
        nn.Parameter(torch.ones((), dtype=torch.float64)),
        nn.Parameter(torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.zeros(0)),
        nn.Parameter(torch.ones(2), requires_grad=False),
        nn.Parameter(torch.ones(4, dtype=torch.float16)),
    ]
    pointers = [p.data_ptr() for p in params]
    strides = [p.stride() for p in params]
    optimizer = LocalOptimizer(torch.optim.SGD(params, lr=1.0), ConstantH(2), total_steps=4)
    before = []
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = None
            if p.requires_grad and (i != 3 or RANK == 0):
                p.grad = torch.full_like(p, (RANK + 1) * 0.25 * (i + 1))
        handle = optimizer.register_step_post_hook(
            lambda *_: before.append([p.detach().clone() for p in params])
        )
        optimizer.step()
        handle.remove()
        if step == 1:
            middle = [p.detach().clone() for p in params]
    return {
        "before": before[1],
        "middle": middle,
        "kept": pointers == [p.data_ptr() for p in params] and strides == [p.stride() for p in params],
        "bytes": optimizer.bytes_sent,
    }


def unfreezing() -> dict:
    """A layer that all ranks unfreeze, and a group that all ranks add, inside a round, take part in its average."""
    model, extra = network(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    model[2].requires_grad_(False)
    optimizer = LocalOptimizer(INNERS["sgd"](model.parameters()), ConstantH(3), total_steps=6)
    loss_on(model, batch(RANK, 0)).backward()
    optimizer.step()
    model[2].requires_grad_(True)
    optimizer.zero_grad()
    first = train(model, optimizer, range(1, 3))
    loss_on(model, batch(RANK, 3)).backward()
    optimizer.step()
    optimizer.add_param_group({"params": [extra], "lr": 0.1, "weight_decay": 0.0})
    for _ in range(2):
        extra.grad = torch.full_like(extra, 1.0 + RANK)
        optimizer.step()
    return {"first": first, "extra": extra.detach().clone(), "bytes": optimizer.bytes_sent}


def scaler() -> dict:
    """A gradient that overflows on the last rank alone: its step is counted, not made."""
    found = {}
    for unscale in (False, True):
        model = network(torch.float32)
        optimizer = LocalOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ConstantH(2), total_steps=4)
        scaling = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
        steps = []
        for step in range(4):
            start = flat(model)
            loss = loss_on(model, batch(RANK, step, torch.float32))
            if step == 2 and RANK == SIZE - 1:
                loss = loss * float("inf")
            scaling.scale(loss).backward()
            if unscale:
                scaling.unscale_(optimizer)
            steps.append(scaling.step(optimizer))
            scaling.update()
            if step == 0:
                moved = flat(model) - start
            if step == 2:
                skipped = torch.equal(flat(model), start)
            optimizer.zero_grad()
        found[f"unscale={unscale}"] = {
            "flags": steps, "moved": moved, "skipped": skipped, "scale": scaling.get_scale(), "final": flat(model)
        }  # fmt: skip
    return found


def subgroup() -> dict:
    """Ranks 0 and the last average; the others train alone and are refused."""
    members = [0, SIZE - 1]
    group = dist.new_group(members)
    model = network()
    inner = INNERS["sgd"](model.parameters())
    if RANK not in members:
        return {
            "refused": _said(lambda: LocalOptimizer(inner, ConstantH(2), total_steps=2, process_group=group))
        }
    optimizer = LocalOptimizer(inner, ConstantH(2), total_steps=2, process_group=group)
    return train(model, optimizer, range(2))


SCENARIOS = {
    **{f"H=1 {inner}": (lambda inner=inner: run(inner, 1, 12)) for inner in INNERS},
    "H=4 of 10": lambda: run("momentum", 4, 10),
    "all_reduce": lambda: run("momentum", 4, 8, torch.float32),
    "ordered": lambda: run("momentum", 4, 8, torch.float32, reduction="ordered"),
    "qsr": qsr,
    "by hand": sync_by_hand,
    "state": state_policies,
    "buffers": buffers,
    "resume": resume,
    "layouts": layouts,
    "unfreezing": unfreezing,
    "scaler": scaler,
    "subgroup": subgroup,
}


def main() -> None:
    global RANK, SIZE
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    RANK, SIZE = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, scenario in SCENARIOS.items():
        found[name] = scenario()
    torch.save(found, Path(sys.argv[1]) / f"rank{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
