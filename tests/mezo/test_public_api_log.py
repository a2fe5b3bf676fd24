"""The log of a run: its size, its round trip, replay to every step, and resuming from a state dict.

Replay repeats the additions of the run, so the weights come back bit for bit: in float32 always, in half precision
in exact mode.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, ZOLog, replay

pytestmark = pytest.mark.filterwarnings("ignore:.*eps.*:UserWarning", "ignore:.*eps.*:RuntimeWarning")

BACKENDS = [
    "torch",
    pytest.param(
        "numba", marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
    ),
]
ARITHMETIC = [
    ("inplace", torch.float32),
    ("exact", torch.float32),
    ("exact", torch.bfloat16),
    ("exact", torch.float16),
]
RULES = [
    {},
    {"n": 3, "weight_decay": 0.1},
    {"momentum": 0.9},
    {"betas": (0.9, 0.99), "weight_decay": 0.1},
    {"dist": "rademacher", "n": 2},
]
backends = pytest.mark.parametrize("backend", BACKENDS)
arithmetic = pytest.mark.parametrize(("mode", "dtype"), ARITHMETIC, ids=str)


class Perceptron(nn.Module):
    """A small network with a frozen layer; its loss is taken in float32 whatever the weights are."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.fixed, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        self.fixed.requires_grad_(False)
        self.to(dtype)
        self.x = torch.randn(16, 6, generator=generator).to(dtype)
        self.y = torch.randn(16, 2, generator=generator)

    def loss(self) -> Tensor:
        hidden = torch.tanh(self.fixed(torch.tanh(self.first(self.x.to(self.first.weight.dtype)))))
        return ((self.last(hidden.to(self.last.weight.dtype)).float() - self.y) ** 2).mean()


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trained(
    model: Perceptron, steps: int, *, falling: bool = False, **options
) -> tuple[MeZO, list[list[Tensor]]]:
    """A run of ``steps`` steps and the weights before the first and after each."""
    optimizer = MeZO(model.parameters(), lr=0.02, eps=0.02, seed=5, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / (2 * steps) if falling else 1.0)
    snapshots = [bits(model)]
    for _ in range(steps):
        optimizer.step(model.loss)
        schedule.step()
        snapshots.append(bits(model))
    return optimizer, snapshots


@backends
@arithmetic
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_replay_gives_the_same_bits_at_every_step(
    backend: str, mode: str, dtype: torch.dtype, rule: dict, tmp_path: Path
) -> None:
    model = Perceptron(dtype)
    base = copy.deepcopy(model)
    optimizer, snapshots = trained(model, 7, mode=mode, backend=backend, falling=True, **rule)
    optimizer.log.save(tmp_path / "run.zolog")
    log = ZOLog.load(tmp_path / "run.zolog")
    assert len(log) == len(optimizer.log) == 7
    assert not same(snapshots[0], snapshots[1]) and not same(snapshots[6], snapshots[7])
    for steps in (0, 1, 4, 7):
        assert same(bits(replay(copy.deepcopy(base), log, steps=steps)), snapshots[steps]), f"{steps} steps"
    again = replay(copy.deepcopy(base), log)
    assert isinstance(again, Perceptron)
    assert same(bits(again), snapshots[7])
    assert same(bits(replay(copy.deepcopy(base), optimizer.log)), snapshots[7]), "before saving, too"


@backends
def test_replay_of_mixed_precision(backend: str) -> None:
    model = Perceptron()
    model.first.to(torch.bfloat16)
    model.x = model.x.to(torch.bfloat16)
    model.fixed.to(torch.bfloat16)
    base = copy.deepcopy(model)
    optimizer, snapshots = trained(model, 5, mode="exact", backend=backend)
    assert same(bits(replay(base, optimizer.log)), snapshots[5])


@backends
def test_replay_of_a_pipelined_run(backend: str) -> None:
    model = Perceptron()
    base = copy.deepcopy(model)
    optimizer = MeZO(model.parameters(), lr=0.02, eps=0.02, pipelined=True, backend=backend)
    for _ in range(6):
        optimizer.step(model.loss)
    optimizer.flush()
    start = bits(base)
    for again, end, begin in zip(bits(replay(base, optimizer.log)), bits(model), start, strict=True):
        torch.testing.assert_close(again, end, rtol=1e-5, atol=1e-6)
        assert not end.requires_grad and (torch.equal(end, begin) or float((end - begin).abs().max()) > 1e-3)


@backends
@pytest.mark.parametrize("order", ["as in the model", "turned round"])
def test_replay_of_groups_is_right_or_refused(backend: str, order: str) -> None:
    model = Perceptron()
    base = copy.deepcopy(model)
    groups = [
        {"params": list(model.first.parameters()), "lr": 0.05},
        {"params": list(model.last.parameters())},
    ]
    optimizer = MeZO(
        groups if order == "as in the model" else groups[::-1], lr=0.01, eps=0.02, backend=backend
    )
    for _ in range(4):
        optimizer.step(model.loss)
    try:
        again = replay(base, optimizer.log)
    except ValueError:
        assert order == "turned round", "the order of the model's parameters must be replayed"
    else:
        assert same(bits(again), bits(model)), "a wrong replay must not pass in silence"


@backends
def test_replay_keeps_tied_weights_tied(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.linspace(-1, 1 + i, p.numel()).reshape(p.shape))
    model[2].weight = model[0].weight
    base, x = copy.deepcopy(model), torch.linspace(-1, 1, 12).reshape(3, 4)
    optimizer = MeZO(model.parameters(), 0.05, backend=backend)
    for _ in range(3):
        optimizer.step(lambda: (model(x) ** 2).mean())
    again = replay(base, optimizer.log)
    assert again[2].weight is again[0].weight
    assert same(bits(again), bits(model))


def test_replay_needs_neither_forward_nor_global_random_state() -> None:
    model = Perceptron()
    base = copy.deepcopy(model)
    optimizer, snapshots = trained(model, 3, backend="torch")
    base.forward = base.loss = None  # type: ignore[assignment, method-assign]
    state = torch.get_rng_state()
    assert same(bits(replay(base, optimizer.log)), snapshots[3])
    assert torch.equal(torch.get_rng_state(), state)


def test_replay_does_not_depend_on_the_backend() -> None:
    pytest.importorskip("numba")
    model = Perceptron()
    base = copy.deepcopy(model)
    optimizer, snapshots = trained(model, 5, dist="rademacher", backend="numba")
    for again, end in zip(bits(replay(base, optimizer.log)), snapshots[5], strict=True):
        torch.testing.assert_close(again, end, rtol=1e-5, atol=1e-6)


# ---- another base --------------------------------------------------------------------------------------------------


def changed_weight(model: Perceptron) -> nn.Module:
    with torch.no_grad():
        model.last.weight[1, 3] += 1e-3
    return model


def changed_shape(model: Perceptron) -> nn.Module:
    model.last = nn.Linear(9, 3)
    return model


def changed_dtype(model: Perceptron) -> nn.Module:
    return model.to(torch.float64)


def changed_order(model: Perceptron) -> nn.Module:
    """The same tensors in another order."""
    return nn.ModuleList([model.last, model.fixed, model.first])


@pytest.mark.parametrize("change", [changed_weight, changed_shape, changed_dtype, changed_order])
def test_replay_refuses_another_base(change, tmp_path: Path) -> None:
    model = Perceptron()
    base = copy.deepcopy(model)
    optimizer, _ = trained(model, 2, backend="torch")
    optimizer.log.save(tmp_path / "run.zolog")
    other = change(base)
    before = bits(other)
    with pytest.raises(ValueError):
        replay(other, ZOLog.load(tmp_path / "run.zolog"))
    assert same(bits(other), before), "a refused model is left as it was"


def test_replay_refuses_the_trained_model() -> None:
    model = Perceptron()
    optimizer, _ = trained(model, 2, backend="torch")
    with pytest.raises(ValueError):
        replay(model, optimizer.log)


# ---- size and files ------------------------------------------------------------------------------------------------


def test_log_grows_by_four_bytes_a_step(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = MeZO([weight], 1e-3, dist="rademacher", seed=2, backend="torch")
    sizes = []
    for part in range(3):
        for _ in range(100):
            optimizer.step(lambda: (weight**2).sum())
        optimizer.log.save(tmp_path / f"{part}.zolog")
        sizes.append((tmp_path / f"{part}.zolog").stat().st_size)
    growth = (sizes[2] - sizes[0]) / 200
    assert growth <= 4.1
    assert sizes[2] + growth * (20_000 - 300) < 100_000, "20,000 steps in less than 0.1 MB"


@pytest.mark.parametrize("ruin", ["cut", "other", "empty"])
def test_load_refuses_a_damaged_file(ruin: str, tmp_path: Path) -> None:
    model = Perceptron()
    optimizer, _ = trained(model, 20, backend="torch")
    path = tmp_path / "run.zolog"
    optimizer.log.save(path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-7], "other": b"not a log of any run" * 20, "empty": b""}[ruin])
    with pytest.raises(ValueError, match="run.zolog"):
        ZOLog.load(path)


def test_load_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match="absent.zolog"):
        ZOLog.load(tmp_path / "absent.zolog")


def test_save_accepts_a_string_and_replaces_a_file(tmp_path: Path) -> None:
    model = Perceptron()
    optimizer, _ = trained(model, 2, backend="torch")
    path = str(tmp_path / "run.zolog")
    optimizer.log.save(path)
    optimizer.step(model.loss)
    optimizer.log.save(path)
    assert len(ZOLog.load(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["run.zolog"]


# ---- resuming ------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("mode", ["inplace", "exact"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_resumed_run_takes_the_same_steps(backend: str, mode: str, rule: dict, tmp_path: Path) -> None:
    """A state dict carries all that the next step needs: the seeds' position, and the history of the moments."""

    def optimizer_of(model: Perceptron) -> MeZO:
        return MeZO(model.parameters(), lr=0.02, eps=0.02, seed=5, mode=mode, backend=backend, **rule)

    straight = Perceptron()
    optimizer = optimizer_of(straight)
    for step in range(6):
        if step == 3:
            torch.save(
                {"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "half.pt"
            )
        optimizer.step(straight.loss)

    resumed = Perceptron()
    stored = torch.load(tmp_path / "half.pt")
    resumed.load_state_dict(stored["model"])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(stored["optimizer"])
    for _ in range(3):
        optimizer.step(resumed.loss)
    assert same(bits(resumed), bits(straight))
    assert len(optimizer.log) == 6
    assert same(bits(replay(Perceptron(), optimizer.log)), bits(straight)), (
        "the log goes back to the first start"
    )
