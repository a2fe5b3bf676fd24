"""LocalOptimizer on two real processes (gloo) against a loop over workers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from papercore.local_sgd import QSR, ConstantH, SyncSchedule
from tests.local_sgd import public_api_reference as truth
from tests.local_sgd.public_api_ranks import OPTIMIZERS, RATE, RESUMED, TOTAL, WARM
from tests.local_sgd.public_api_reference import batch, digits_network, flat, loss, network

Ranks = list[dict]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    folder = tmp_path_factory.mktemp("public_api_ranks")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *(str(Path(__file__).with_name("public_api_ranks.py")), str(folder)),
    ]
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def layout(schedule: SyncSchedule, warm: int = WARM) -> list[tuple[int, int]]:
    return [(r.start, r.length) for r in schedule.rounds(RATE, TOTAL, warmup_steps=warm)]


def looped(name: str, schedule: SyncSchedule, batches: Callable = batch, k: int = 2) -> Tensor:
    models = [network() for _ in range(k)]
    return flat(truth.loop_over_workers(models, OPTIMIZERS[name], loss, batches, layout(schedule), RATE)[0])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# ---- two processes: steps and averages ---------------------------------------------------------------------------------

RUNS = {"sgd": QSR(0.2, 2), "momentum": QSR(0.2, 2), "adamw": QSR(0.2, 2)}
RUNS |= {"tail": ConstantH(7), "whole": ConstantH(1000), "ordered": QSR(0.2, 2), "h1_momentum": ConstantH(1)}


@pytest.mark.parametrize("run", RUNS)
def test_ranks_agree_where_a_round_ends_and_only_there(ranks: Ranks, run: str) -> None:
    ends = {start + length for start, length in layout(RUNS[run])}
    for rank in ranks:
        assert rank[run]["synced"] == [t + 1 in ends for t in range(TOTAL)]
        assert all(type(value) is bool for value in rank[run]["synced"])
        assert rank[run]["in_place"], "the parameters keep their storages"
        assert rank[run]["global_step"] == TOTAL
    first, second = (rank[run]["weights"] for rank in ranks)
    for t in range(TOTAL):
        assert torch.equal(first[t], second[t]) == (t + 1 in ends)
    assert torch.equal(first[-1], second[-1]), "the final model is an averaged one"


@pytest.mark.parametrize("run", RUNS)
def test_h_is_that_of_the_round(ranks: Ranks, run: str) -> None:
    expected = [length for _, length in layout(RUNS[run]) for _ in range(length)]
    inside = [h for h, synced in zip(ranks[0][run]["h"], ranks[0][run]["synced"], strict=True) if not synced]
    wanted = [h for h, synced in zip(expected, ranks[0][run]["synced"], strict=True) if not synced]
    assert inside == wanted, "between two rounds h may be that of either"


@pytest.mark.parametrize("run", RUNS)
def test_equals_a_loop_over_workers(ranks: Ranks, run: str) -> None:
    name = run.removeprefix("h1_") if run.removeprefix("h1_") in OPTIMIZERS else "momentum"
    expected = looped(name, RUNS[run])
    close(ranks[0][run]["weights"][-1], expected, 1e-9 if name == "adamw" else 1e-12)
    assert (expected - flat(network())).abs().max() > 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_h_of_one_is_data_parallel_for_sgd_alone(ranks: Ranks, name: str) -> None:
    """V8."""

    def joined(t: int, _: int) -> tuple[Tensor, Tensor]:
        (x, y), (z, w) = batch(t, 0), batch(t, 1)
        return torch.cat([x, z]), torch.cat([y, w])

    alone = looped(name, ConstantH(1), joined, k=1)
    found = ranks[0][f"h1_{name}"]["weights"][-1]
    if name == "adamw":
        assert (found - alone).abs().max() > 1e-4
    else:
        close(found, alone)


def test_bytes_are_rounds_times_parameters(ranks: Ranks) -> None:
    """V15: R * P * itemsize."""
    numel = flat(network()).numel()
    for run in ("sgd", "momentum", "adamw", "tail", "whole"):
        for rank in ranks:
            assert rank[run]["bytes"] == len(layout(RUNS[run])) * numel * 8


def test_a_closure_is_evaluated_before_the_step(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["closure"]["synced"] == rank["momentum"]["synced"]
        assert torch.equal(rank["closure"]["weights"], rank["momentum"]["weights"][-1])
        for expected, found in rank["closure"]["losses"]:
            assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("holder", ["inner", "wrapper"])
def test_an_lr_scheduler_is_all_it_takes(ranks: Ranks, holder: str) -> None:
    """The rate is read lazily, at the first step of the round: nobody adjusts H by hand."""
    for rank in ranks:
        assert rank[f"scheduler_{holder}"]["synced"] == rank["momentum"]["synced"]
        assert torch.equal(rank[f"scheduler_{holder}"]["weights"], rank["momentum"]["weights"][-1])


def test_the_reference_group_decides(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["groups"] == {0: 50, 1: 4}, "(0.1 / 0.01)^2 is cut to 50; (0.1 / 0.05)^2 = 4"


def test_a_group_of_one_is_a_worker_alone(ranks: Ranks) -> None:
    for index, rank in enumerate(ranks):
        expected = looped("momentum", ConstantH(1), lambda t, _, index=index: batch(t, index), k=1)
        close(rank["subgroup"]["weights"][-1], expected)
    assert not torch.equal(ranks[0]["subgroup"]["weights"][-1], ranks[1]["subgroup"]["weights"][-1])


# ---- two processes: what a sync does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["local", "mean"])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_sync_keeps_the_mean_and_the_state_policy(ranks: Ranks, policy: str, name: str) -> None:
    """V10, V11, V14."""
    runs = [rank[policy][name] for rank in ranks]
    mean = (runs[0]["weights"] + runs[1]["weights"]) / 2
    assert not torch.equal(runs[0]["weights"], runs[1]["weights"])
    for run in runs:
        close(run["averaged"], mean, 1e-16)
        assert torch.equal(run["again"], run["averaged"]), "a second sync changes nothing"
        for key, before in run["before"].items():
            if policy == "local":
                assert torch.equal(run["after"][key], before)
            else:
                close(run["after"][key], (runs[0]["before"][key] + runs[1]["before"][key]) / 2, 1e-16)
    assert torch.equal(runs[0]["averaged"], runs[1]["averaged"])
    for key in runs[0]["before"]:
        assert not torch.equal(runs[0]["before"][key], runs[1]["before"][key])


def test_sync_ends_the_round(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["local"]["momentum"]["next"] == [False] * 19 + [True, False]


@pytest.mark.parametrize("way", ["finish", "context"])
def test_the_end_is_averaged(ranks: Ranks, way: str) -> None:
    runs = [rank[way] for rank in ranks]
    assert not torch.equal(runs[0]["before"], runs[1]["before"])
    for run in runs:
        close(run["once"], (runs[0]["before"] + runs[1]["before"]) / 2, 1e-16)
        assert torch.equal(run["twice"], run["once"])
    assert torch.equal(runs[0]["once"], runs[1]["once"])


def test_parameters_without_gradients_are_averaged(ranks: Ranks) -> None:
    for rank in ranks:
        close(rank["unused"]["some"], torch.full((3,), 0.9, dtype=torch.float64))
        assert torch.equal(rank["unused"]["none"], torch.ones(2, dtype=torch.float64))


def test_sync_after_zero_grad(ranks: Ranks) -> None:
    mean = (ranks[0]["zeroed"]["before"] + ranks[1]["zeroed"]["before"]) / 2
    for rank in ranks:
        close(rank["zeroed"]["after"], mean, 1e-16)


# ---- two processes: buffers (V12) --------------------------------------------------------------------------------------

STATISTICS = ("norm.running_mean", "norm.running_var")


def test_buffers_stay_local(ranks: Ranks) -> None:
    for rank in ranks:
        for name in STATISTICS:
            assert torch.equal(rank["buffers_none"]["after"][name], rank["buffers_none"]["before"][name])
    assert not torch.equal(*(rank["buffers_none"]["after"][STATISTICS[0]] for rank in ranks))


def test_buffers_are_averaged(ranks: Ranks) -> None:
    for name in STATISTICS:
        mean = sum(rank["buffers_mean"]["before"][name] for rank in ranks) / 2
        for rank in ranks:
            close(rank["buffers_mean"]["after"][name], mean, 1e-15)
    for rank in ranks:
        counter = rank["buffers_mean"]["after"]["norm.num_batches_tracked"]
        assert counter.dtype == torch.int64 and int(counter) == 6, "counters are no statistics"


def test_batch_norm_is_reestimated(ranks: Ranks) -> None:
    """Cumulative means over this rank's batches, then the mean over ranks; of variances too, not the pooled one."""
    every = torch.cat([rank["buffers_reestimate"]["batches"] for rank in ranks])  # [12, 4, 5]
    mean, variance = every.mean((0, 1)), every.var(1).mean(0)
    for rank in ranks:
        after = rank["buffers_reestimate"]["after"]
        close(after[STATISTICS[0]], mean, 1e-14)
        close(after[STATISTICS[1]], variance, 1e-14)
    assert (variance - every.flatten(0, 1).var(0)).abs().max() > 1e-3, "the pooled variance is another number"
    assert torch.equal(*(rank["buffers_reestimate"]["weights"] for rank in ranks))


# ---- two processes: bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["all_reduce", "ordered"])
def test_processes_and_virtual_workers_have_the_same_bits(ranks: Ranks, reduction: str) -> None:
    """V9."""
    for rank in ranks:
        assert rank["bits"][reduction].dtype == torch.float32
        assert torch.equal(rank["bits"][reduction], rank["bits"]["virtual"])
    assert (ranks[0]["bits"][reduction] - flat(digits_network())).abs().max() > 0.01


@pytest.mark.parametrize("stop", [5, 11, 12, 25])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_resume_anywhere_is_bitwise(ranks: Ranks, name: str, stop: int) -> None:
    """V13."""
    ends = {start + length for start, length in layout(RESUMED)}
    assert {5, 11, 12, 25} - ends, "some of the stops are inside a round"
    for rank in ranks:
        resumed = rank[f"resume_{name}"]["resumed"][stop]
        assert torch.equal(resumed["weights"], rank[f"resume_{name}"]["straight"])
        assert resumed["synced"] == [t + 1 in ends for t in range(stop, TOTAL)]
        assert resumed["at"] == TOTAL


# ---- two processes: disagreement ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("rates", ("H",)),
        ("schedules", ()),
        ("layouts", ("param",)),
        ("order", ("param",)),
        ("starts", ()),
        ("counts", ("8", "6")),
    ],
)
def test_disagreement_is_raised_on_both_ranks(ranks: Ranks, trouble: str, words: tuple[str, ...]) -> None:
    for rank in ranks:
        said = rank["troubles"][trouble]
        assert {"ValueError", "RuntimeError"} & set(said["kinds"]), said
        assert "DistBackendError" not in said["kinds"] and "timeout" not in said["text"].lower(), said
        assert "rank" in said["text"], said
        assert all(word.lower() in said["text"].lower() for word in words), said
