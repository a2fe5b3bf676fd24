"""Ranks that disagree: all of them are told, in words, none waits for ever, and no parameter is changed."""

import pytest
import torch

from tests.local_sgd.ranks_launch import torchrun

Ranks = list[dict]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return torchrun("ranks_disagree.py", request.param, tmp_path_factory.mktemp("ranks"))


def said(ranks: Ranks, scenario: str) -> tuple[str, str]:
    """What all ranks were told."""
    everyone = [tuple(rank[scenario]["told"]) for rank in ranks]
    assert len(set(everyone)) == 1, everyone
    return everyone[0]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (
            "values",
            "the starting values of the parameters differ between rank 0 and rank {odd}: seed all ranks alike or broadcast the "
            "model from rank 0 before making the optimizer. (To resume inside a round, make it first and load each rank's "
            "checkpoint then.)",
        ),
        (
            "shapes",
            "the shapes, dtypes or order of the parameters differ between rank 0 and rank {odd}: build the same model and the "
            "same parameter groups on all ranks.",
        ),
        (
            "frozen",
            "the shapes, dtypes or order of the parameters differ between rank 0 and rank {odd}: build the same model and the "
            "same parameter groups on all ranks.",
        ),
    ],
)
def test_a_different_start_is_refused(ranks: Ranks, scenario: str, message: str) -> None:
    assert said(ranks, scenario) == ("ValueError", message.format(odd=len(ranks) - 1))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("schedule", ("ConstantH(h=4)", "ConstantH(h=5)")),
        ("total_steps", ("12", "13")),
        ("reduction", ("'all_reduce'", "'ordered'")),
    ],
)
def test_different_settings_are_refused(ranks: Ranks, name: str, values: tuple[str, str]) -> None:
    odd = len(ranks) - 1
    for rank, found in enumerate(ranks):
        kind, message = found[name]["told"]
        assert kind == "ValueError" and message == (
            f"the values of {name} differ between rank 0 and rank {odd}: it is {values[rank == odd]} on this rank; make it the "
            "same on all ranks."
        )


def others(ranks: Ranks) -> str:
    return "rank 0" if len(ranks) == 2 else "ranks 0, 1, 2"


@pytest.mark.parametrize(
    ("scenario", "met", "finished"),
    [
        ("batches, inside a round", "8 (4 of H = 4", "6 (2 of H = 4"),
        ("batches, between rounds", "12 (4 of H = 4", "8 (0 of H = 4"),
        ("batches, no step at all", "8 (4 of H = 4", "4 (0 of H = 4"),
    ],
)
def test_a_rank_that_runs_out_of_batches_stops_all(
    ranks: Ranks, scenario: str, met: str, finished: str
) -> None:
    kind, message = said(ranks, scenario)
    assert kind == "RuntimeError" and message == (
        f"the ranks met at different places, so nothing was averaged ({others(ranks)}: the end of a round after step {met}, lr "
        f"0.05); rank {len(ranks) - 1}: a call of finish() after step {finished}, lr 0.05)). Every rank must make the same "
        "number of steps and the same calls: give all ranks equally many batches (DistributedSampler with drop_last=True), and "
        "call sync() and finish() on all of them at the same step."
    )
    assert all(rank[scenario]["alone"] for rank in ranks), "the weights are those after the last local step"


def test_different_rates_are_found_whether_or_not_the_rounds_differ(ranks: Ranks) -> None:
    odd = len(ranks) - 1
    advice = "The learning rate at the start of a round must be the same on all ranks: it decides the round's length."
    start = "the ranks met at different places, so nothing was averaged"
    kind, message = said(ranks, "rates")
    assert kind == "RuntimeError" and message == (
        f"{start} ({others(ranks)}: the end of a round after step 6 (6 of H = 6, lr 0.08); rank {odd}: the end of a round after "
        f"step 4 (4 of H = 4, lr 0.1)). {advice}"
    )
    kind, message = said(ranks, "rates, equal rounds")
    assert kind == "RuntimeError" and message == (
        f"{start} ({others(ranks)}: the end of a round after step 4 (4 of H = 4, lr 0.08); rank {odd}: the end of a round after "
        f"step 4 (4 of H = 4, lr 0.1)). {advice}"
    )


def test_a_call_or_a_checkpoint_of_one_rank_is_found(ranks: Ranks) -> None:
    odd = len(ranks) - 1
    kind, message = said(ranks, "sync")
    assert kind == "RuntimeError"
    assert (
        f"rank {odd}: a call of sync() after step 2 (2 of H = 4" in message
        and "sync() and finish() on all" in message
    )
    kind, message = said(ranks, "checkpoint")
    assert kind == "RuntimeError" and f"rank {odd}: the end of a round after step 7" in message
    assert message.endswith(
        "Every rank must count the same steps: attempt a step for every batch on all ranks, also where a gradient scaler skips "
        "the update, and resume all ranks from the same checkpoint."
    )


def test_layouts_that_part_on_the_way_are_found(ranks: Ranks) -> None:
    odd = len(ranks) - 1
    assert said(ranks, "frozen by one") == (
        "RuntimeError",
        f"the parameters to average differ between rank 0 and rank {odd} at step 4, so nothing was averaged. Freeze, unfreeze "
        "and convert parameters on all ranks at the same step.",
    )
    assert said(ranks, "no state") == (
        "RuntimeError",
        f"the optimizer states to average differ between rank 0 and rank {odd} at step 2, so nothing was averaged. A parameter "
        "that got no gradient on some rank has no state there: use state='local', or give every parameter a gradient on all "
        "ranks.",
    )


def test_the_ranks_work_together_after_all_that(ranks: Ranks) -> None:
    assert all(torch.equal(rank["afterwards"], ranks[0]["afterwards"]) for rank in ranks)


def test_weights_of_ranks_that_met_at_different_places_stay_apart(ranks: Ranks) -> None:
    weights = [rank["batches, inside a round"]["weights"] for rank in ranks]
    assert not torch.equal(weights[0], weights[-1])
