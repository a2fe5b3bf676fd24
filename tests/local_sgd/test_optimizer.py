"""LocalOptimizer in one process (a group of one): arguments, refusals, schedulers, hooks, state dicts, warnings."""

import copy
import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from papercore.local_sgd import QSR, ConstantH, LocalOptimizer
from tests.local_sgd.ranks_problem import INNERS, batch, flat, loss_on, network


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    before = os.environ.get("GLOO_SOCKET_IFNAME")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    if before is None:
        del os.environ["GLOO_SOCKET_IFNAME"]


def make(
    model: nn.Module | None = None, inner: str = "sgd", schedule: object = None, **options: object
) -> tuple[nn.Module, LocalOptimizer]:
    model = network() if model is None else model
    options.setdefault("total_steps", 10)
    schedule = ConstantH(4) if schedule is None else schedule
    return model, LocalOptimizer(INNERS[inner](model.parameters()), schedule, **options)


def go(model: nn.Module, optimizer: LocalOptimizer, steps: int) -> list[bool]:
    flags = []
    for step in range(steps):
        loss_on(model, batch(0, step)).backward()
        flags.append(optimizer.step())
        optimizer.zero_grad()
    return flags


# ---- one worker is plain training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", list(INNERS))
def test_one_worker_is_the_wrapped_optimizer(inner: str) -> None:
    model, optimizer = make(inner=inner)
    with optimizer:
        go(model, optimizer, 10)
    plain = network()
    alone = INNERS[inner](plain.parameters())
    for step in range(10):
        loss_on(plain, batch(0, step)).backward()
        alone.step()
        alone.zero_grad()
    assert torch.equal(flat(model), flat(plain))


def test_h_and_position_say_where_the_round_stands() -> None:
    model, optimizer = make()
    assert (optimizer.h, optimizer.position, optimizer.global_step) == (0, 0, 0)
    seen = []
    for _ in range(10):
        go(model, optimizer, 1)
        seen.append((optimizer.h, optimizer.position))
    assert seen == [(4, 1), (4, 2), (4, 3), (4, 0)] * 2 + [(2, 1), (2, 0)]
    assert optimizer.rounds_done == 3 and optimizer.finish() is False


def test_without_total_steps_finish_averages_the_tail() -> None:
    model, optimizer = make(total_steps=None)
    assert go(model, optimizer, 6) == [False, False, False, True, False, False]
    assert optimizer.finish() is True and optimizer.finish() is False
    assert optimizer.rounds_done == 2 and optimizer.position == 0


def test_a_rate_of_zero_takes_the_remaining_steps() -> None:
    model, optimizer = make(schedule=QSR(0.1, 2), warmup_steps=2)
    go(model, optimizer, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    go(model, optimizer, 1)
    assert optimizer.h == 8
    assert go(model, optimizer, 7)[-1]


def test_the_reference_group_decides() -> None:
    model = network()
    inner = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.1}]
    )
    optimizer = LocalOptimizer(inner, QSR(0.3, 1), total_steps=100, reference_group=1)
    go(model, optimizer, 1)
    assert optimizer.h == 9
    optimizer.sync()


def test_a_closure_is_called_and_its_loss_kept() -> None:
    model = network()
    optimizer = LocalOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=3), ConstantH(2), total_steps=2)
    calls = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_on(model, batch(0, 0))
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    assert optimizer.step(closure) is False and optimizer.step(closure) is True
    assert len(calls) > 2 and calls[-1] < calls[0]
    assert float(optimizer.last_loss.detach()) in calls


# ---- schedulers, hooks, groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_the_wrapper", [True, False])
def test_a_scheduler_may_hold_either_optimizer(on_the_wrapper: bool) -> None:
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(
        optimizer if on_the_wrapper else optimizer.inner, 2, gamma=0.5
    )
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        go(model, optimizer, 1)
        scheduler.step()
    assert rates == [0.05, 0.05, 0.025, 0.025, 0.0125, 0.0125]
    optimizer.sync()


def test_hooks_groups_and_state_are_the_wrapped_ones() -> None:
    model, optimizer = make(inner="momentum")
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    go(model, optimizer, 1)
    optimizer.state_dict()
    assert calls == ["before", "after", "saved"]
    assert optimizer.param_groups is optimizer.inner.param_groups and optimizer.state is optimizer.inner.state
    assert optimizer.defaults["momentum"] == 0.9 and len(optimizer.state) == 4
    assert isinstance(optimizer, torch.optim.Optimizer) and "step 1 of 10" in repr(optimizer)
    optimizer.sync()


def test_a_group_that_cannot_be_averaged_is_not_added() -> None:
    _, optimizer = make()
    with pytest.raises(ValueError, match="has dtype torch.complex64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


# ---- saving --------------------------------------------------------------------------------------------------------


def test_a_state_dict_goes_through_a_file_and_resumes(tmp_path: object) -> None:
    model, optimizer = make(inner="adamw")
    go(model, optimizer, 6)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{tmp_path}/rank0.pt")
    saved = torch.load(f"{tmp_path}/rank0.pt", weights_only=True)
    again, other = make(inner="adamw")
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert (other.global_step, other.position, other.h, other.rounds_done) == (6, 2, 4, 1)
    for each, o in ((model, optimizer), (again, other)):
        assert go(each, o, 4) == [False, True, False, True]
    assert torch.equal(flat(model), flat(again)) and other.bytes_sent == optimizer.bytes_sent


def test_another_number_of_ranks_resumes_between_rounds_only() -> None:
    model, optimizer = make()
    go(model, optimizer, 4)
    saved = optimizer.state_dict()
    saved["local_sgd"] |= {"rank": 3, "size": 4}
    optimizer.load_state_dict(saved)
    go(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["local_sgd"] |= {"rank": 3, "size": 4}
    with pytest.raises(
        ValueError, match=r"inside a round by rank 3 of 4; this is rank 0 of 1\. Load every rank's own file"
    ):
        optimizer.load_state_dict(saved)
    optimizer.sync()


def test_foreign_and_late_state_dicts_are_refused() -> None:
    _, optimizer = make()
    with pytest.raises(ValueError, match=r"has no entry 'local_sgd'.*load it into that before wrapping"):
        optimizer.load_state_dict(optimizer.inner.state_dict())
    saved = optimizer.state_dict()
    saved["local_sgd"]["global_step"] = 11
    with pytest.raises(ValueError, match="the state dict is from step 11, beyond total_steps = 10"):
        optimizer.load_state_dict(saved)
    with pytest.raises(TypeError, match=r"is not copied: keep its state_dict\(\)"):
        copy.deepcopy(optimizer)


# ---- rounds left open ----------------------------------------------------------------------------------------------


def test_an_open_round_is_reported_when_the_optimizer_goes() -> None:
    model, optimizer = make()
    go(model, optimizer, 6)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del optimizer
        gc.collect()
    (warning,) = [w for w in seen if w.category is RuntimeWarning]
    assert str(warning.message) == (
        "a LocalOptimizer was left 2 steps into a round, after step 6: the ranks hold different parameters that were never "
        "averaged. Call finish() at the end, or use it as a context manager."
    )


def test_an_open_round_is_reported_at_the_end_of_the_program() -> None:
    program = (
        "import torch, torch.distributed as dist\n"
        "from papercore.local_sgd import ConstantH, LocalOptimizer\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "p = torch.nn.Parameter(torch.ones(2))\n"
        "optimizer = LocalOptimizer(torch.optim.SGD([p], 0.1), ConstantH(4), total_steps=8)\n"
        "optimizer.step()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0 and "was left 1 steps into a round, after step 1" in done.stderr


def test_an_error_inside_the_context_is_not_followed_by_an_average() -> None:
    model, optimizer = make()
    with pytest.raises(KeyError, match="lost"), optimizer:
        go(model, optimizer, 2)
        raise KeyError("lost")
    assert optimizer.rounds_done == 0 and optimizer.position == 2
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        del optimizer
        gc.collect()
    assert not [w for w in seen if w.category is RuntimeWarning], "the error was enough"


def test_no_step_after_the_last() -> None:
    model, optimizer = make()
    go(model, optimizer, 10)
    with pytest.raises(
        RuntimeError, match=r"total_steps = 10 steps were made: the last round has ended\. Give a larger"
    ):
        optimizer.step()
    model, optimizer = make()
    go(model, optimizer, 3)
    optimizer.finish()
    with pytest.raises(RuntimeError, match=r"finish\(\) was called after step 3: .* call sync\(\)"):
        optimizer.step()


# ---- rates and schedules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [float("nan"), -0.1, float("inf")])
def test_a_rate_without_a_length_is_refused_before_the_step(lr: float) -> None:
    model, optimizer = make(schedule=QSR(0.1, 2), warmup_steps=10)
    optimizer.param_groups[0]["lr"] = lr
    before = flat(model)
    loss_on(model, batch(0, 0)).backward()
    with pytest.raises(ValueError, match=f"lr is {lr} at step 0: H is undefined"):
        optimizer.step()
    assert torch.equal(flat(model), before) and optimizer.global_step == 0


def test_a_long_first_round_without_warm_up_is_reported() -> None:
    model, optimizer = make(schedule=QSR(0.1, 2), total_steps=1000)
    optimizer.param_groups[0]["lr"] = 1e-6
    with pytest.warns(
        UserWarning, match=r"the first round lasts 1000 of 1000 steps: the learning rate is 1e-06 there"
    ):
        go(model, optimizer, 1)
    optimizer.sync()


@pytest.mark.parametrize("h", [0, -2, 2.5, True, None])
def test_a_schedule_of_ones_own_must_give_whole_numbers(h: object) -> None:
    class Own:
        def next_h(self, step: int, lr: float, **_: object) -> object:
            return h

    _, optimizer = make(schedule=Own())
    with pytest.raises(ValueError, match=rf"gave H = {h} at step 0: expected a whole number >= 1"):
        optimizer.step()


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, r"total_steps = 0: expected a whole number >= 1"),
        ({"total_steps": "10"}, TypeError, "total_steps must be a whole number, got '10'"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps = -1: expected a whole number >= 0"),
        ({"state": "sum"}, ValueError, "state = 'sum': expected one of 'local', 'mean'"),
        ({"buffers": "all"}, ValueError, "buffers = 'all': expected one of 'none', 'mean', 'reestimate'"),
        ({"reduction": "ring"}, ValueError, "reduction = 'ring': expected one of 'all_reduce', 'ordered'"),
        ({"buffers": "mean"}, ValueError, "buffers='mean' needs the module that holds them: give model="),
        ({"batches": list}, ValueError, "batches goes with buffers='reestimate'"),
        ({"reference_group": 1}, ValueError, "reference_group = 1: the optimizer has 1 parameter groups"),
        ({"schedule": 4}, TypeError, r"schedule must be a SyncSchedule such as QSR\(0.2, 2\), got 4"),
        (
            {"process_group": "gloo"},
            TypeError,
            r"must be a torch.distributed process group or None .*, got 'gloo'",
        ),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
    ],
)
def test_arguments_are_checked(options: dict, error: type[Exception], message: str) -> None:
    model = network()
    schedule = options.pop("schedule", ConstantH(2))
    options = {"total_steps": 10, **options}
    with pytest.raises(error, match=message):
        LocalOptimizer(INNERS["sgd"](model.parameters()), schedule, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own import
def test_only_plain_optimizers_are_wrapped() -> None:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model, optimizer = make()
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got list"):
        LocalOptimizer(list(model.parameters()), ConstantH(2), total_steps=2)  # type: ignore[arg-type]
    for twice in (optimizer, PostLocalSGDOptimizer(optimizer.inner, PeriodicModelAverager(2))):
        with pytest.raises(ValueError, match="communicates by itself: wrap the plain optimizer"):
            LocalOptimizer(twice, ConstantH(2), total_steps=2)


def test_state_that_is_a_list_has_no_mean() -> None:
    model = network()
    optimizer = LocalOptimizer(
        torch.optim.LBFGS(model.parameters()), ConstantH(1), total_steps=2, state="mean"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_on(model, batch(0, 0))
        loss.backward()
        return loss

    with pytest.raises(
        ValueError, match=r"state='mean' cannot average LBFGS's '\w+', which is a list: use state='local'"
    ):
        optimizer.step(closure)


# ---- parameters and modules that cannot work -----------------------------------------------------------------------


def refused(params: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalOptimizer(torch.optim.SGD(params, lr=0.1), ConstantH(2), total_steps=2)


def test_parameters_without_a_mean_are_refused() -> None:
    refused(
        [nn.Parameter(torch.ones(2, dtype=torch.complex64))],
        r"parameter 0 of the optimizer \(shape \(2,\)\) has dtype torch.complex64",
    )
    whole = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    refused(
        [nn.Parameter(torch.ones(1)), whole],
        r"parameter 1 .* has dtype torch.int8: only float64, float32, float16 and bfloat16",
    )
    refused([nn.Parameter(torch.ones(2, device="meta"))], "holds no data yet")
    refused(
        [nn.Parameter(torch.ones(2), requires_grad=False)],
        "no parameter of the optimizer requires a gradient",
    )
    refused(
        [nn.Parameter(torch.ones(2, 2).to_sparse())], r"has layout torch.sparse_coo: only dense \(strided\)"
    )


def test_lazy_parameters_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.LazyLinear(3)
    refused(list(lazy.parameters()), r"\(shape unknown\) holds no data yet: make one forward pass")


def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    sharded = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Replicate()]))
    refused(
        [sharded], "is sharded: every rank holds a part of it, .* instead of FSDP, fully_shard or DTensor"
    )


def test_parameters_that_fsdp_has_flattened_are_refused() -> None:
    """FSDP with use_orig_params=True leaves plain parameters behind and marks them."""
    for mark in ("_fsdp_flattened", "_is_flat_param"):
        p = nn.Parameter(torch.ones(2))
        setattr(p, mark, True)
        refused([p], "is sharded: every rank holds a part of it")


def test_modules_that_communicate_are_refused() -> None:
    wrapped = nn.parallel.DistributedDataParallel(network())
    with pytest.raises(ValueError, match=r"^model is wrapped in DistributedDataParallel, .*model\.module"):
        LocalOptimizer(INNERS["sgd"](wrapped.parameters()), ConstantH(2), total_steps=2, model=wrapped)
    norms = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    with pytest.raises(
        ValueError, match=r"^model\.1 is a SyncBatchNorm, .*buffers='reestimate', or GroupNorm"
    ):
        LocalOptimizer(INNERS["sgd"](norms.parameters()), ConstantH(2), total_steps=2, model=norms)


def test_reestimate_is_refused_where_it_would_mislead() -> None:
    model = network(norm=True)
    inner = INNERS["sgd"](model.parameters())
    plain = LocalOptimizer(inner, ConstantH(4), total_steps=8, model=model)
    with pytest.raises(ValueError, match="needs buffers='reestimate' and model="):
        plain.reestimate([])
    optimizer = LocalOptimizer(inner, ConstantH(4), total_steps=8, model=model, buffers="reestimate")
    go(model, optimizer, 1)
    with pytest.raises(ValueError, match=r"inside a round \(1 of 4 steps\)"):
        optimizer.reestimate([batch(0, 0)])
    optimizer.sync()
    with pytest.raises(ValueError, match="has no batches"):
        optimizer.reestimate()
    assert optimizer.reestimate([batch(0, 0)]) == 1


def test_finish_reestimates_with_the_batches_given() -> None:
    model = network(norm=True)
    drawn = []

    def batches() -> Iterator[object]:
        drawn.append(1)
        yield batch(0, 7)

    options = {"model": model, "buffers": "reestimate", "batches": batches}
    with LocalOptimizer(
        INNERS["sgd"](model.parameters()), ConstantH(4), total_steps=8, **options
    ) as optimizer:
        go(model, optimizer, 8)
        assert not drawn
    assert drawn == [1]
    with torch.no_grad():
        expected = model[0](batch(0, 7)[0]).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-12, atol=1e-13)


def test_without_torch_distributed_it_says_what_to_do() -> None:
    program = (
        "import torch\n"
        "from papercore.local_sgd import ConstantH, LocalOptimizer\n"
        "p = torch.nn.Parameter(torch.ones(2))\n"
        "try:\n"
        "    LocalOptimizer(torch.optim.SGD([p], 0.1), ConstantH(4), total_steps=8)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == (
        "torch.distributed is not initialised: call torch.distributed.init_process_group('gloo') (CPU) or ('nccl') (GPUs) first "
        "and start the program with torchrun, or use VirtualWorkers for workers inside one process."
    ), done.stderr
