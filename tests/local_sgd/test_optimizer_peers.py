"""When others average, shown by running them: torch's averager one step after the start of every period, and never at the end."""

import importlib.util

import pytest

from tests.local_sgd.ranks_launch import torchrun

ACCELERATE = importlib.util.find_spec("accelerate") is not None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    extra = ["--accelerate"] if ACCELERATE else []
    return torchrun("ranks_peers.py", 2, tmp_path_factory.mktemp("ranks"), *extra)


def agreement(found: dict) -> list[int]:
    """Steps, counted from 1, after which the two ranks hold the same weights."""
    return [step for step, spread in enumerate(found["spread"], 1) if spread < 1e-15]


def test_ours_agree_after_every_period_and_at_the_end(ranks: list[dict]) -> None:
    for rank in ranks:
        assert agreement(rank["ours"]) == [4, 8, 12, 14] and rank["ours"]["end"] == 0.0


def test_torchs_averager_is_off_by_one(ranks: list[dict]) -> None:
    """It averages where step % period == 0 before it counts: after steps 1, 5, 9, 13 of 14, so not after 12 nor at the end."""
    for rank in ranks:
        assert agreement(rank["torch"]) == [1, 5, 9, 13]
        assert rank["torch"]["end"] > 1e-4


def test_torchs_averager_rebinds_parameters_and_needs_gradients(ranks: list[dict]) -> None:
    for rank in ranks:
        assert not rank["torch"]["kept"]
        assert "expected a non-empty list" in rank["torch"]["after_zero_grad"]


@pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
def test_accelerates_averages_after_every_period_and_on_leaving(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["accelerate"]["kind"].endswith("MULTI_CPU")
        assert agreement(rank["accelerate"]) == [4, 8, 12]
        assert rank["accelerate"]["end"] < 1e-15
