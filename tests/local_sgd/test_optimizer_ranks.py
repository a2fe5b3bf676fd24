"""LocalOptimizer in 2 and 4 real processes under torchrun (gloo), against data parallel training and plain means."""

import pytest
import torch
from torch import Tensor

from papercore.local_sgd import QSR
from tests.local_sgd.ranks_launch import torchrun
from tests.local_sgd.ranks_problem import INNERS, batch, flat, loss_on, network

Ranks = list[dict]
ELEMENTS = sum(p.numel() for p in network().parameters())


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return torchrun("ranks_optimizer.py", request.param, tmp_path_factory.mktemp("ranks"))


def every(ranks: Ranks, *keys: object) -> list:
    found = ranks
    for key in keys:
        found = [part[key] for part in found]
    return found


def same(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


# ---- H = 1 against data parallel (V8) ------------------------------------------------------------------------------


def data_parallel(inner: str, steps: int, size: int) -> Tensor:
    """One process that averages gradients: the weights after every step."""
    model = network()
    optimizer = INNERS[inner](model.parameters())
    path = []
    for step in range(steps):
        sum(loss_on(model, batch(rank, step)) / size for rank in range(size)).backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(flat(model))
    return torch.stack(path)


@pytest.mark.parametrize("inner", ["sgd", "momentum"])
def test_h_1_follows_data_parallel(ranks: Ranks, inner: str) -> None:
    found = ranks[0][f"H=1 {inner}"]
    expected = data_parallel(inner, 12, len(ranks))
    assert float((expected[-1] - expected[0]).abs().max()) > 0.05, "the path goes somewhere"
    torch.testing.assert_close(found["after"], expected, rtol=0, atol=1e-12)
    assert found["flags"] == [True] * 12


def test_h_1_with_adamw_differs_from_data_parallel(ranks: Ranks) -> None:
    found, expected = ranks[0]["H=1 adamw"]["after"], data_parallel("adamw", 12, len(ranks))
    assert float((found[0] - expected[0]).abs().max()) > 1e-3


# ---- rounds --------------------------------------------------------------------------------------------------------


def test_an_average_ends_each_round_and_the_last_one_is_cut(ranks: Ranks) -> None:
    for rank in ranks:
        found = rank["H=4 of 10"]
        assert [step for step, flag in enumerate(found["flags"], 1) if flag] == [4, 8, 10]
        assert found["h"] == [4] * 8 + [2] * 2 and found["rounds"] == 3
    for step in range(10):
        assert same(every(ranks, "H=4 of 10", "after", step)) == (step + 1 in (4, 8, 10))


def test_an_average_keeps_the_mean(ranks: Ranks) -> None:
    for step in (3, 7, 9):
        mean = torch.stack(every(ranks, "H=4 of 10", "before", step)).mean(0)
        for after in every(ranks, "H=4 of 10", "after", step):
            torch.testing.assert_close(after, mean, rtol=2e-16, atol=1e-16)


def test_ordered_is_the_sum_in_the_order_of_the_ranks(ranks: Ranks) -> None:
    for step in (3, 7):
        before = every(ranks, "ordered", "before", step)
        total = before[0].clone()
        for part in before[1:]:
            total = total + part
        assert all(torch.equal(after, total / len(ranks)) for after in every(ranks, "ordered", "after", step))
    if len(ranks) == 2:
        assert torch.equal(ranks[0]["ordered"]["after"], ranks[0]["all_reduce"]["after"])
    torch.testing.assert_close(
        ranks[0]["ordered"]["after"], ranks[0]["all_reduce"]["after"], rtol=0, atol=1e-6
    )
    assert ranks[0]["ordered"]["bytes"] == ranks[0]["all_reduce"]["bytes"]


def test_the_rule_reads_the_rate_of_a_rounds_first_step(ranks: Ranks) -> None:
    found = ranks[0]["qsr"]
    lengths, flags, step = [], [], 0
    while step < 40:
        h = QSR(0.05, 1).next_h(step, found["rates"][step], total_steps=40)
        lengths += [h] * h
        flags += [False] * (h - 1) + [True]
        step += h
    assert found["h"] == lengths and found["flags"] == flags
    assert len(set(lengths)) > 3 and found["rates"][0] == 0.05
    assert same(every(ranks, "qsr", "final")) and found["tail"] is False


def test_sync_and_finish_by_hand(ranks: Ranks) -> None:
    mean = torch.stack(every(ranks, "by hand", "before", 2)).mean(0)
    for rank in ranks:
        found = rank["by hand"]
        torch.testing.assert_close(found["once"], mean, rtol=2e-16, atol=1e-16)
        assert torch.equal(found["once"], found["twice"]), "averaging equal weights changes nothing"
        assert found["synced"] == [True, False] and found["tail"] == [True, False]
    assert not same(every(ranks, "by hand", "unfinished"))
    assert same(every(ranks, "by hand", "final"))


def test_bytes_are_rounds_times_parameters_times_their_size(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["H=4 of 10"]["bytes"] == 3 * ELEMENTS * 8
        assert rank["H=1 adamw"]["bytes"] == 12 * ELEMENTS * 8
        assert rank["all_reduce"]["bytes"] == 2 * ELEMENTS * 4
        assert rank["state"]["local"]["bytes"] == ELEMENTS * 8
        assert rank["state"]["mean"]["bytes"] == 3 * ELEMENTS * 8, "exp_avg and exp_avg_sq too"


# ---- optimizer state and buffers -----------------------------------------------------------------------------------


def test_state_stays_local_by_default(ranks: Ranks) -> None:
    for rank in ranks:
        assert torch.equal(rank["state"]["local"]["before"], rank["state"]["local"]["after"])
    assert not same(every(ranks, "state", "local", "after"))


def test_state_is_averaged_on_request(ranks: Ranks) -> None:
    before = every(ranks, "state", "mean", "before")
    assert not same(before)
    for rank in ranks:
        torch.testing.assert_close(
            rank["state"]["mean"]["after"], torch.stack(before).mean(0), rtol=1e-15, atol=0
        )
        assert rank["state"]["mean"]["counter"] == 3.0


def test_buffers_stay_local_or_are_averaged(ranks: Ranks) -> None:
    for policy in ("none", "mean", "reestimate"):
        assert not same(every(ranks, "buffers", policy, "local"))
        assert same(every(ranks, "buffers", policy, "weights"))
    for rank in ranks:
        assert torch.equal(rank["buffers"]["none"]["local"], rank["buffers"]["none"]["var"])
        mean = torch.stack(every(ranks, "buffers", "mean", "local")).mean(0)
        torch.testing.assert_close(rank["buffers"]["mean"]["var"], mean, rtol=1e-15, atol=0)
        assert rank["buffers"]["mean"]["count"] == 4
    sent = ranks[0]["buffers"]
    assert sent["mean"]["bytes"] - sent["none"]["bytes"] == 2 * 6 * 8


def test_reestimation_is_the_mean_over_all_batches_of_all_ranks(ranks: Ranks) -> None:
    assert all(every(ranks, "buffers", "untouched")) and every(ranks, "buffers", "used") == [3] * len(ranks)
    assert same(every(ranks, "buffers", "reestimate", "mean"))
    assert same(every(ranks, "buffers", "reestimate", "var"))
    model = network(norm=True)
    torch.nn.utils.vector_to_parameters(ranks[0]["buffers"]["reestimate"]["weights"], model.parameters())
    with torch.no_grad():
        hidden = [model[0](batch(rank, 50 + i)[0]) for rank in range(len(ranks)) for i in range(3)]
    found = ranks[0]["buffers"]["reestimate"]
    pooled = torch.cat(hidden)
    torch.testing.assert_close(found["mean"], pooled.mean(0), rtol=1e-13, atol=1e-14)
    documented = torch.stack([h.var(0) for h in hidden]).mean(0)
    torch.testing.assert_close(found["var"], documented, rtol=1e-13, atol=1e-14)
    assert float((pooled.var(0) - documented).abs().max()) > 1e-3, "which is not the pooled variance"


def test_uneven_batches_are_refused_and_change_nothing(ranks: Ranks) -> None:
    counts = [2 + (rank == 1) for rank in range(len(ranks))]
    for message, unchanged, training, momentum in every(ranks, "buffers", "uneven"):
        assert message == (
            f"batches of the ranks: {counts}. Batch-norm statistics need at least one batch on every rank, and equally many, "
            "so that the mean over ranks weighs all batches alike."
        )
        assert unchanged and training and momentum == 0.1


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_a_run_resumed_inside_a_round_has_the_same_bits(ranks: Ranks) -> None:
    assert not same(every(ranks, "resume", "local")), "it was stopped where the ranks differ"
    for rank in ranks:
        found = rank["resume"]
        assert torch.equal(found["local"], found["loaded"]) and tuple(found["place"]) == (6, 2, 4, 1)
        assert torch.equal(found["straight"], found["again"])
        assert found["bytes"][0] == found["bytes"][1] == 3 * ELEMENTS * 4
    assert same(every(ranks, "resume", "again"))


def test_another_ranks_state_is_refused_inside_a_round(ranks: Ranks) -> None:
    size = len(ranks)
    for rank, found in enumerate(ranks):
        other = (rank + 1) % size
        assert found["resume"]["stranger"] == (
            "ValueError",
            f"the state dict was taken inside a round by rank {other} of {size}; this is rank {rank} of {size}. Load every "
            "rank's own file, or save where step() returned True.",
        )


# ---- parameters of all kinds ---------------------------------------------------------------------------------------


def test_every_dtype_and_layout_is_averaged_in_place(ranks: Ranks) -> None:
    exact = (torch.float64, torch.float32)
    for number in range(7):
        before = every(ranks, "layouts", "before", number)
        mean = torch.stack([b.double() for b in before]).mean(0)
        for rank in ranks:
            middle = rank["layouts"]["middle"][number]
            assert middle.dtype == before[0].dtype
            rtol = 1e-6 if middle.dtype in exact else 1e-2
            torch.testing.assert_close(middle.double(), mean, rtol=rtol, atol=1e-7)
    assert not same(every(ranks, "layouts", "before", 3)), "a gradient on rank 0 alone"
    assert same(every(ranks, "layouts", "before", 5)), "frozen"
    assert all(every(ranks, "layouts", "kept")), "storages and strides stay"
    sizes = 6 * 4 + 5 * 2 + 1 * 8 + 96 * 4 + 0 + 0 + 4 * 2
    assert every(ranks, "layouts", "bytes") == [2 * sizes] * len(ranks)


def test_what_all_ranks_unfreeze_or_add_inside_a_round_is_averaged(ranks: Ranks) -> None:
    first = every(ranks, "unfreezing", "first")
    mean = torch.stack([found["before"][-1] for found in first]).mean(0)
    for found in first:
        torch.testing.assert_close(found["after"][-1], mean, rtol=1e-15, atol=1e-16)
    size = len(ranks)
    expected = torch.full((3,), 1 - 0.1 * 2 * (size + 1) / 2, dtype=torch.float64)
    for extra in every(ranks, "unfreezing", "extra"):
        torch.testing.assert_close(extra, expected, rtol=1e-14, atol=0)
    assert every(ranks, "unfreezing", "bytes") == [8 * (ELEMENTS + ELEMENTS + 3)] * size


@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_overflows_is_counted_and_not_made(ranks: Ranks, unscale: bool) -> None:
    found = every(ranks, "scaler", f"unscale={unscale}")
    last = len(ranks) - 1
    for rank, part in enumerate(found):
        assert part["flags"] == [False, True, False, True], "the ranks meet although one skipped a step"
        assert part["skipped"] == (rank == last)
        assert part["scale"] == (512.0 if rank == last else 1024.0)
        model = network(torch.float32)
        loss_on(model, batch(rank, 0, torch.float32)).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(part["moved"], -0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert same([part["final"] for part in found])


def test_a_group_averages_its_members_alone(ranks: Ranks) -> None:
    members = [0, len(ranks) - 1]
    after = [ranks[rank]["subgroup"]["after"][-1] for rank in members]
    mean = torch.stack([ranks[rank]["subgroup"]["before"][-1] for rank in members]).mean(0)
    assert same(after)
    torch.testing.assert_close(after[0], mean, rtol=1e-15, atol=1e-16)
    for rank in range(len(ranks)):
        if rank not in members:
            kind, message = ranks[rank]["subgroup"]["refused"]
            assert kind == "ValueError"
            assert (
                message
                == "this process is not a member of process_group: make the optimizer only on its members."
            )
