"""Two real processes under torchrun (gloo): the same bits on both ranks, one scalar a draw on the wire."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from papercore.mezo import MeZO
from tests.mezo.two_ranks import STEPS, data, loss_on, network


def torchrun(script: str, folder: Path) -> None:
    """Two processes of a script beside this one; its own words if it fails."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *(str(Path(__file__).with_name(script)), str(folder)),
    ]
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun("two_ranks.py", folder)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def alone(n: int, **options) -> tuple[MeZO, nn.Module]:
    """The same run in one process, on the joined batch."""
    model, (x, y) = network(), data()
    order = torch.cat([torch.arange(0, 20, 2), torch.arange(1, 20, 2)])
    optimizer = MeZO(model.parameters(), 0.01, 1e-3, seed=5, n=n, **options)
    for _ in range(STEPS):
        optimizer.step(lambda: loss_on(model, x[order], y[order]))
    optimizer.flush()
    return optimizer, model


@pytest.mark.parametrize("scenario", ["batch", "pipelined", "wide", "directions"])
def test_ranks_hold_the_same_bits(ranks: list[dict], scenario: str) -> None:
    first, second = (rank[scenario] for rank in ranks)
    assert first["weights"] == second["weights"] and first["slopes"] == second["slopes"]
    assert first["replayed"] and second["replayed"], "either rank's log gives the weights back"


@pytest.mark.parametrize("scenario", ["batch", "pipelined"])
def test_batch_split_equals_the_joined_batch(ranks: list[dict], scenario: str) -> None:
    optimizer, model = alone(2, pipelined=scenario == "pipelined")
    expected = optimizer.log.projected_grads
    assert float(expected.abs().max()) > 0.1
    found = torch.tensor(ranks[0][scenario]["slopes"])
    # The first step starts from the same weights; later ones from weights that differ in the last bits.
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    for a, p in zip(ranks[0][scenario]["weights"], model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(a), p.detach().flatten(), rtol=1e-5, atol=1e-6)


def test_directions_split_equals_more_draws(ranks: list[dict]) -> None:
    optimizer, model = alone(4, momentum=0.5, mode="exact")
    found = torch.tensor(ranks[0]["directions"]["slopes"])
    torch.testing.assert_close(found[:4], optimizer.log.projected_grads[:4], rtol=1e-6, atol=1e-6)
    for a, p in zip(ranks[0]["directions"]["weights"], model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(a), p.detach().flatten(), rtol=1e-5, atol=1e-6)


def test_bytes_sent_are_eight_a_draw_whatever_the_model(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["batch"]["sent"] == rank["wide"]["sent"] == 8 * 2 * STEPS


def test_seed_is_that_of_rank_0(ranks: list[dict]) -> None:
    assert ranks[0]["seeds"]["seed"] == ranks[1]["seeds"]["seed"] == 2**64 - 7
    assert ranks[0]["seeds"]["warnings"] == []
    (warning,) = ranks[1]["seeds"]["warnings"]
    assert str(2**64 - 7) in warning and str(2**64 - 8) in warning


def test_trouble_is_the_same_on_both_ranks(ranks: list[dict]) -> None:
    for rank in ranks:
        said = rank["troubles"]
        assert "step 0" in said["nan"] and said["restored"], "a NaN of one rank stops both"
        assert "differ after step 1" in said["drift"]
        assert "starting weights differ" in said["start"] and "[1]" in said["start"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*pin_memory")
def test_trainer_on_two_ranks_equals_twice_the_batch(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    from tests.mezo.test_integrations import tiny, trainer_of

    torchrun("trainer_ranks.py", tmp_path)
    first, second = (json.loads((tmp_path / f"trainer{rank}.json").read_text()) for rank in range(2))
    assert first == second
    trainer = trainer_of(tiny(), tmp_path, steps=4, batch=8, mezo={"eps": 0.05})
    trainer.train()
    expected = trainer.mezo_optimizer.log.projected_grads
    assert float(expected.abs().max()) > 0.1
    torch.testing.assert_close(torch.tensor(first["slopes"]), expected, rtol=1e-3, atol=1e-4)


def test_a_group_needs_an_initialised_process() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="init_process_group"):
        MeZO([weight], 0.1, process_group="gloo")


def test_directions_need_exact_mode() -> None:
    with pytest.raises(ValueError, match="mode='exact'"):
        MeZO([nn.Parameter(torch.ones(2))], 0.1, process_group=object(), split="directions")
