"""What VirtualWorkers refuses, in which words, and that nothing is half-done then."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from papercore.local_sgd import ConstantH, VirtualWorkers
from tests.local_sgd.engine_ranks import batch, loss_on, network

SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
ENGINES = pytest.mark.parametrize("engine", ["vmap", "loop"])


def workers(
    model: Any = None, k: Any = 2, make: Any = SGD, schedule: Any = None, **options: Any
) -> VirtualWorkers:
    options = {"total_steps": 10, **options}
    return VirtualWorkers(
        network() if model is None else model,
        k,
        make,
        ConstantH(4) if schedule is None else schedule,
        **options,
    )


def pairs(k: int = 2, step: int = 0) -> list[tuple[Tensor, Tensor]]:
    return [batch(step, w) for w in range(k)]


def everything(found: VirtualWorkers) -> dict[str, Any]:
    return copy.deepcopy(found.state_dict())


def unchanged(found: VirtualWorkers, before: dict[str, Any]) -> None:
    after = everything(found)
    for name in ("global_step", "position", "h", "rounds_done"):
        assert after[name] == before[name]
    assert all(torch.equal(after["parameters"][name], value) for name, value in before["parameters"].items())
    for number, entries in before["optimizer"]["state"].items():
        assert all(torch.equal(after["optimizer"]["state"][number][k], v) for k, v in entries.items())
    # The template has its own weights back, and a step goes through.
    found.step(loss_on, pairs(found.k))
    assert found.global_step == before["global_step"] + 1


class Lamb(torch.optim.Optimizer):
    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(p.grad.sign(), alpha=-self.param_groups[0]["lr"])


class SignSGD(Lamb):
    elementwise = True


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "k = 0: expected a whole number >= 1."),
        ({"k": 1.5}, "k = 1.5: expected a whole number >= 1."),
        ({"total_steps": 0}, "total_steps = 0: expected a whole number >= 1."),
        ({"warmup_steps": 11}, "warmup_steps = 11 is more than total_steps = 10."),
        ({"state": "average"}, "state = 'average': expected 'local' or 'mean'."),
        ({"engine": "jit"}, "engine = 'jit': expected 'vmap' or 'loop'."),
        ({"chunk_size": 0}, "chunk_size = 0: expected a whole number >= 1."),
        ({"chunk_size": 2, "engine": "loop"}, "chunk_size goes with engine='vmap'"),
        ({"reference_group": 1}, "reference_group = 1: the optimizer has 1 group(s)."),
        ({"model": []}, "model is an empty sequence: give one module per seed."),
        (
            {"model": nn.ReLU()},
            "the model has no trainable parameter: nothing to synchronise.",
        ),
        (
            {"make": torch.optim.LBFGS},
            "LBFGS is not known to be elementwise: on stacked parameters a norm, a factored state or a line search would mix",
        ),
        (
            {"make": lambda p: torch.optim.Muon([p[1], p[3]])},
            "Muon is not known to be elementwise",
        ),
        ({"make": Lamb}, "set the attribute `elementwise = True` on the optimizer's class"),
        (
            {"make": lambda _: torch.optim.SGD(network().parameters(), lr=0.1)},
            "build it over the list that the callable is given, not over model.parameters().",
        ),
        (
            {"model": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))},
            "'1' is BatchNorm1d with running statistics, which the stacked workers would share: use GroupNorm or LayerNorm, "
            "track_running_stats=False, or put the layer in eval mode",
        ),
        (
            {"model": nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))},
            "'1' is SyncBatchNorm with running statistics",
        ),
        ({"model": nn.LSTM(2, 2)}, "the model is LSTM, which keeps its weights in a fused buffer of its own"),
        (
            {"model": nn.LazyLinear(2)},
            "'weight' has no shape yet: run one forward pass of the lazy module first.",
        ),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        workers(**options)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"model": 3}, "model must be a torch.nn.Module or a sequence of them, one per seed; got int."),
        ({"model": [network(), "net"]}, "one per seed; got str."),
        ({"k": "two"}, "k must be a whole number, got 'two'."),
        ({"schedule": 4}, "schedule must be a SyncSchedule such as ConstantH(4), got 4."),
        ({"make": SGD(network().parameters())}, "optimizer must be a function of the stacked parameters"),
        ({"make": lambda p: None}, "optimizer(parameters) must return a torch.optim.Optimizer, got NoneType"),
    ],
)
def test_kinds(options: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError) as error:
        workers(**options)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (
            nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)),
            "1: ReLU(), train mode and 1: Tanh(), train mode",
        ),
        (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 11)), "out_features=10"),
        (
            network().double(),
            "0.weight [32, 64] torch.float32 cpu trainable and 0.weight [32, 64] torch.float64 cpu trainable",
        ),
        (network().eval(), "eval mode"),
        (network().requires_grad_(False), "trainable and 0.weight [32, 64] torch.float32 cpu fixed"),
        (nn.Sequential(*network(), nn.ReLU()), "differ"),
    ],
)
def test_seeds_of_another_architecture(other: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match="the modules of seed 0 and seed 2 differ") as error:
        workers([network(0), network(1), other])
    assert text in str(error.value)


def test_an_optimizer_that_says_it_is_elementwise() -> None:
    found = workers(make=SignSGD)
    found.step(loss_on, pairs())
    moved = (found.parameters_of(0, 1)["0.bias"] - network()[0].bias.detach()).abs()
    assert ((moved - 0.1).abs() < 1e-6).logical_or(moved == 0).all() and moved.max() > 0


@ENGINES
@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda x, y: [(x[0], y[0])], "got a list of 1 batches for k = 2 workers: expected one for each."),
        (
            lambda x, y: (x[:1], y[:1]),
            "a tensor of the batches has shape [1, 8, 64]; expected the leading axes k = 2",
        ),
        (lambda x, y: (x, y[0]), "a tensor of the batches has shape [8]; expected the leading axes k = 2"),
        (
            lambda x, y: [(x[0], y[0]), (x[1, :5], y[1, :5])],
            "the workers' batches differ in shape: [[8, 64], [5, 64]]; every worker needs as many samples",
        ),
        (lambda x, y: [(x[0], y[0]), {"x": x[1], "y": y[1]}], "the workers' batches differ in structure"),
    ],
)
def test_batches(given: Callable[[Tensor, Tensor], Any], text: str, engine: str) -> None:
    x, y = (torch.stack(part) for part in zip(*pairs(), strict=True))
    found = workers(engine=engine)
    found.step(loss_on, pairs())
    before = everything(found)
    with pytest.raises(ValueError) as error:
        found.step(loss_on, given(x, y))
    assert text in str(error.value)
    unchanged(found, before)


def test_batches_of_seeds() -> None:
    found = workers([network(0), network(1), network(2)])
    x, y = (torch.stack(part) for part in zip(*pairs(), strict=True))
    with pytest.raises(
        ValueError, match=r"has shape \[2, 8, 64\]; expected the leading axes \[seeds, k\] = \[3, 2\]"
    ):
        found.step(loss_on, (x, y))
    with pytest.raises(ValueError, match="must hold 3 lists of 2 batches each, got a list of 2"):
        found.step(loss_on, pairs())
    with pytest.raises(TypeError, match="the batches hold no tensor, got str"):
        found.step(loss_on, "batch")


@ENGINES
@pytest.mark.parametrize(
    ("loss", "kind", "text"),
    [
        (lambda m, b: m(b[0]), ValueError, "loss_fn must return a scalar, got shape [8, 10]: reduce it"),
        (lambda m, b: 1.0, TypeError, "loss_fn must return a tensor, got float."),
    ],
)
def test_losses(loss: Callable, kind: type[Exception], text: str, engine: str) -> None:
    found = workers(engine=engine)
    found.step(loss_on, pairs())
    before = everything(found)
    with pytest.raises(kind) as error:
        found.step(loss, pairs())
    assert text in str(error.value)
    unchanged(found, before)


@ENGINES
def test_a_loss_that_is_not_finite_names_its_worker_and_changes_nothing(engine: str) -> None:
    found = workers([network(0), network(1)], k=3, engine=engine)
    x, y = (torch.stack(part) for part in zip(*pairs(3), strict=True))
    x, y = torch.stack([x, x]), torch.stack([y, y])
    found.step(loss_on, (x, y))
    before, losses = everything(found), found.losses.clone()
    bad = x.clone()
    bad[1, 2, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError) as error:
        found.step(loss_on, (bad, y))
    assert "the loss of seed 1, worker 2 is nan at step 1; the weights are as before this step." in str(
        error.value
    )
    bad[0, 1, 3, 5] = float("inf")
    with pytest.raises(FloatingPointError, match=r"seed 0, worker 1 \(and 1 more\) is (nan|inf)"):
        found.step(loss_on, (bad, y))
    assert torch.equal(found.losses, losses) and all(p.grad is None for p in found._parameters)
    after = everything(found)
    assert after["global_step"] == 1 and after["position"] == 1
    assert all(torch.equal(after["parameters"][n], value) for n, value in before["parameters"].items())
    for number, entries in before["optimizer"]["state"].items():
        assert all(torch.equal(after["optimizer"]["state"][number][k], v) for k, v in entries.items())


class Counting(nn.Module):
    """Writes into a buffer in place, or binds it to a new tensor."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.inside, self.way = network(), way
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "in place":
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return self.inside(x)


@ENGINES
@pytest.mark.parametrize("way", ["in place", "anew"])
def test_a_buffer_that_a_forward_pass_writes(way: str, engine: str) -> None:
    found = workers(Counting(way), engine=engine)
    before = everything(found)
    with pytest.raises(ValueError) as error:
        found.step(loss_on, pairs())
    assert "the model or loss_fn writes into a tensor that all workers share" in str(error.value)
    # Of a write in place under torch.func, torch names the operation: it is the cause of this error.
    assert "buffer 'calls'" in str(error.value) or "aten::add_" in str(error.value.__cause__)
    after = everything(found)
    assert after["global_step"] == 0 and not after["optimizer"]["state"]
    assert all(torch.equal(after["parameters"][n], value) for n, value in before["parameters"].items())


def test_steps_beyond_the_end() -> None:
    found = workers(total_steps=3)
    assert [found.step(loss_on, pairs()) for _ in range(3)] == [False, False, True]
    before = everything(found)
    with pytest.raises(RuntimeError, match="all total_steps = 3 steps have been made"):
        found.step(loss_on, pairs())
    assert everything(found)["global_step"] == before["global_step"] == 3
    assert found.finish() is False


def test_no_step_follows_finish() -> None:
    found = workers()
    found.step(loss_on, pairs())
    assert found.finish() is True and found.finish() is False
    with pytest.raises(RuntimeError, match=r"finish\(\) was called after step 1: no step follows it"):
        found.step(loss_on, pairs())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("h"), "this is no state of VirtualWorkers: h missing."),
        (lambda s: s.update(k=3), "the state has k = 3 and 1 seed(s), these workers have k = 2 and 1."),
        (lambda s: s.update(global_step=11), "the state is of step 11, beyond total_steps = 10."),
        (
            lambda s: s["parameters"].update({"0.bias": torch.zeros(2, 31)}),
            "the state is of another network: '0.bias' [2, 31] in the state, [2, 32] here.",
        ),
        (lambda s: s["parameters"].pop("0.bias"), "'0.bias' missing in the state, [2, 32] here."),
    ],
)
def test_states_of_something_else(change: Callable[[dict[str, Any]], Any], text: str) -> None:
    found = workers()
    found.step(loss_on, pairs())
    before, state = everything(found), everything(workers(network(3)))
    change(state)
    with pytest.raises(ValueError) as error:
        found.load_state_dict(state)
    assert text in str(error.value)
    unchanged(found, before)


def test_indices() -> None:
    found = workers([network(0), network(1)], k=3)
    assert torch.isnan(found.losses).all() and found.losses.shape == (2, 3)
    for call, text in (
        (lambda: found.parameters_of(2, 0), "seed = 2: expected 0 to 1."),
        (lambda: found.parameters_of(0, 3), "worker = 3: expected 0 to 2."),
        (lambda: found.parameters_of(0, -1), "worker = -1: expected a whole number >= 0."),
        (lambda: found.mean_model(2), "seed = 2: expected 0 to 1."),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert text in str(error.value)
