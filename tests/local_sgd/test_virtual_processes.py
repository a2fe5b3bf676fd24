"""Virtual workers against real processes (gloo under torchrun): the same weights to the last bit after 300 steps of QSR in float32."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from papercore.local_sgd import VirtualWorkers
from tests.local_sgd import engine_ranks as run

# One launch for each number of processes. all_reduce adds two vectors in either order to the same sum; four it adds in an
# order of its own.
CASES = {
    2: ("all_reduce-momentum", "all_reduce-adamw"),
    4: ("ordered-momentum", "ordered-adamw", "all_reduce-momentum"),
}
Rank = dict[str, Any]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[Rank]]:
    """(k, case) -> what each of the k processes has found."""
    found: dict[int, list[dict[str, Rank]]] = {}

    def of(k: int, case: str) -> list[Rank]:
        if k not in found:
            found[k] = launch(tmp_path_factory.mktemp("ranks"), k, CASES[k])
        return [rank[case] for rank in found[k]]

    return of


def launch(folder: Path, k: int, cases: Sequence[str]) -> list[dict[str, Rank]]:
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(k),
            "--rdzv-backend",
            "c10d",
        ),
        *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *(str(Path(run.__file__)), str(folder), *cases),
    ]
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(k)]


def virtual(k: int, optimizer: str, engine: str) -> tuple[VirtualWorkers, torch.Tensor, list[bool]]:
    """Workers after the run, their losses [steps, k], and where they synchronised."""
    rate, losses, synced = run.rate_of(optimizer), [], []
    with run.same_kernels():
        workers = VirtualWorkers(
            run.network(),
            k,
            run.OPTIMIZERS[optimizer],
            run.SCHEDULE[optimizer],
            total_steps=run.STEPS,
            warmup_steps=run.WARMUP,
            engine=engine,
        )
        for step in range(run.STEPS):
            for group in workers.optimizer.param_groups:
                group["lr"] = rate(step)
            synced.append(workers.step(run.loss_on, [run.batch(step, w) for w in range(k)]))
            losses.append(workers.losses[0])
    return workers, torch.stack(losses), synced


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("k", "case"), [(2, case) for case in CASES[2]] + [(4, case) for case in CASES[4] if "ordered" in case]
)
def test_virtual_workers_are_processes_to_the_last_bit(
    processes: Callable[[int, str], list[Rank]], k: int, case: str
) -> None:
    ranks, optimizer = processes(k, case), case.split("-")[1]
    rounds = sum(ranks[0]["synced"])
    assert 20 < rounds < run.STEPS / 2, "the schedule mixes short rounds and long ones"
    assert ranks[0]["losses"][-20:].mean() < 0.2 * ranks[0]["losses"][:20].mean(), "something was learned"
    for engine in ("vmap", "loop"):
        workers, losses, synced = virtual(k, optimizer, engine)
        assert all(rank["synced"] == synced for rank in ranks)
        for w, rank in enumerate(ranks):
            # The loss of a batched call is a mean that is summed in another order. Its gradient is not.
            torch.testing.assert_close(rank["losses"], losses[:, w], rtol=1e-6, atol=0)
            mine = workers.parameters_of(0, w)
            assert all(torch.equal(rank["weights"][name], mine[name]) for name in mine), (
                f"{engine}, worker {w}"
            )
            # The state of an optimizer is never averaged: each worker's is that of its process.
            for p, momenta in zip(workers._parameters, rank["momenta"], strict=True):
                assert momenta, "the optimizer keeps a state"
                for key, value in momenta.items():
                    assert torch.equal(workers.optimizer.state[p][key][w], value), f"{engine}, {key} of {w}"
        mean = dict(workers.mean_model().named_parameters())
        assert all(torch.equal(ranks[0]["weights"][name], mean[name]) for name in mean)


@pytest.mark.timeout(600)
def test_all_reduce_of_four_processes_differs_in_the_last_bits_alone(
    processes: Callable[[int, str], list[Rank]],
) -> None:
    """Another order of the sum: equal up to rounding, at a learning rate where rounding is not amplified."""
    ranks = processes(4, "all_reduce-momentum")
    workers, _, synced = virtual(4, "momentum", "vmap")
    assert ranks[0]["synced"] == synced
    mean = dict(workers.mean_model().named_parameters())
    for name, weight in ranks[0]["weights"].items():
        torch.testing.assert_close(weight, mean[name], rtol=0, atol=2e-6)
