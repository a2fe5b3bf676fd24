"""A run as a log: what it holds, what it weighs, and the weights that it gives back, bit for bit."""

import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import AnotherBase, MeZO, ZOLog, draw_seed, noise, replay
from papercore.mezo.weights import Weights

pytestmark = pytest.mark.filterwarnings("ignore:eps=.*resolution:UserWarning")


class Net(nn.Module):
    """Two trained layers around a frozen one, with a LayerNorm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first, self.fixed, self.norm, self.last = (
            nn.Linear(5, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(0.4 * noise(i, 0, p.numel()).reshape(p.shape))
        self.fixed.requires_grad_(False)
        self.to(dtype)
        self.x = noise(50, 0, 60).reshape(12, 5)

    def loss(self) -> Tensor:
        h = torch.tanh(self.first(self.x.to(self.first.weight.dtype)))
        return (self.last(self.norm(torch.tanh(self.fixed(h)))).float() - 1).square().mean()


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run(model: Net, steps: int, **options) -> MeZO:
    optimizer = MeZO(model.named_parameters(), **{"lr": 0.02, "eps": 0.01, "seed": 6, **options})
    for _ in range(steps):
        optimizer.step(model.loss)
    return optimizer


# ---- replay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("mode", ["inplace", "exact"])
@pytest.mark.parametrize(
    "rule", [{}, {"momentum": 0.9, "n": 2}, {"betas": (0.9, 0.99), "weight_decay": 0.1}], ids=str
)
def test_replay_is_bit_exact(dtype: torch.dtype, mode: str, rule: dict, tmp_path: Path) -> None:
    """Also in place in half precision: the rounding of the perturbations repeats like everything else."""
    model = Net(dtype)
    optimizer = run(model, 9, mode=mode, **rule)
    optimizer.log.save(tmp_path / "run.zolog")
    again = replay(Net(dtype), ZOLog.load(tmp_path / "run.zolog"))
    assert same(bits(again), bits(model))
    assert not same(bits(again), bits(Net(dtype)))


def test_replay_of_a_pipelined_run_with_flushes_here_and_there() -> None:
    model = Net()
    optimizer = run(model, 3, pipelined=True, n=2)
    optimizer.flush()
    halfway = bits(model)
    for step in range(5):
        optimizer.step(model.loss)
        if step == 2:
            optimizer.state_dict()
    optimizer.flush()
    assert optimizer.log.flushes == [3, 6, 8]
    assert same(bits(replay(Net(), optimizer.log)), bits(model))
    assert same(bits(replay(Net(), optimizer.log, steps=3)), halfway)


def test_replay_of_a_run_with_accidents() -> None:
    """Interrupted attempts and skipped steps leave rounding behind in place, and replay repeats that too."""
    for pipelined in (False, True):
        model = Net()
        optimizer = MeZO(
            model.named_parameters(),
            0.02,
            0.01,
            n=2,
            momentum=0.5,
            pipelined=pipelined,
            on_nonfinite="skip",
        )
        after_three = []
        for attempt in range(9):
            calls = []

            def closure() -> Tensor:
                calls.append(1)  # noqa: B023
                if attempt in (2, 6, 8) and len(calls) == attempt // 2:  # noqa: B023
                    raise KeyboardInterrupt
                if attempt == 4:  # noqa: B023
                    return torch.tensor(math.nan)
                return model.loss()  # noqa: B023

            try:
                optimizer.step(closure)
            except KeyboardInterrupt:
                continue
            if len(optimizer.log) == 3:
                optimizer.flush()
                after_three = bits(model)
        optimizer.flush()
        log = ZOLog.from_bytes(optimizer.log.to_bytes())
        assert len(log) == 6 and log.skipped == [3] and [r.step for r in log.retreats] == [2, 5, 6]
        assert log[3].skipped and math.isnan(log[3].projected_grad) and not log[2].skipped
        assert same(bits(replay(Net(), log)), bits(model))
        assert same(bits(replay(Net(), log, steps=3)), after_three)


def test_replay_of_changing_settings_and_groups() -> None:
    model = Net()
    groups = [
        {"params": list(model.first.named_parameters("first"))},
        {"params": [("last.weight", model.last.weight)], "lr": 0.05, "eps": 0.03},
    ]
    optimizer = MeZO(groups, 0.02, 0.01, momentum=0.6, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    for step in range(12):
        optimizer.n = 1 + step // 5
        optimizer.param_groups[0]["eps"] = 0.01 * (1 + step % 2)
        optimizer.step(model.loss)
        schedule.step()
    assert same(bits(replay(Net(), optimizer.log)), bits(model))


def test_replay_may_start_from_a_step_of_the_run() -> None:
    model = Net()
    optimizer = run(model, 10, momentum=0.9, lr=0.002)
    part = replay(Net(), optimizer.log, steps=4)
    assert same(bits(replay(part, optimizer.log, start=4)), bits(model))


@pytest.mark.parametrize(
    "rule", [{}, {"momentum": 0.9}, {"betas": (0.9, 0.99)}, {"n": 12, "weight_decay": 0.3}], ids=str
)
def test_updates_alone_come_within_the_rounding_of_float32(rule: dict) -> None:
    model = Net()
    optimizer = run(model, 25, lr=0.004, **rule)
    near = replay(Net(), optimizer.log, exact=False)
    moved = max(float((a - b).abs().max()) for a, b in zip(bits(model), bits(Net()), strict=True))
    assert moved > 0.01
    for a, b in zip(bits(near), bits(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_drift_of_update_only_replay_in_half_precision() -> None:
    """In place, bfloat16 rounds the perturbations into the weights; in exact mode only the updates round."""
    gaps = {}
    for mode in ("inplace", "exact"):
        model = Net(torch.bfloat16)
        optimizer = run(model, 100, lr=1e-3, mode=mode)
        near = replay(Net(torch.bfloat16), optimizer.log, exact=False)
        gaps[mode] = sum(
            float((a.float() - b.float()).square().sum())
            for a, b in zip(bits(near), bits(model), strict=True)
        )
    assert gaps["exact"] < 0.5 * gaps["inplace"]


def test_replay_of_plain_tensors() -> None:
    weight = nn.Parameter(torch.ones(40))
    optimizer = MeZO([weight], 0.1)
    for _ in range(3):
        optimizer.step(lambda: weight.square().sum())
    base = [torch.ones(40)]
    assert replay(base, optimizer.log) is base
    assert torch.equal(base[0], weight)


# ---- another base --------------------------------------------------------------------------------------------------


def test_names_find_weights_in_any_order_and_state() -> None:
    model = Net()
    optimizer = run(model, 3)

    class Reordered(Net):
        def __init__(self) -> None:
            super().__init__()
            self._modules = dict(reversed(self._modules.items()))
            self.requires_grad_(True)

    again = replay(Reordered(), optimizer.log)
    assert torch.equal(again.first.weight, model.first.weight) and torch.equal(
        again.last.bias, model.last.bias
    )
    assert torch.equal(again.fixed.weight, model.fixed.weight)


def spoil(model: Net, what: str) -> Net:
    with torch.no_grad():
        if what == "one low bit":
            model.last.bias.view(torch.int32)[1] ^= 1
        elif what == "two elements swapped":
            model.first.weight[0, :2] = model.first.weight[0, :2].flip(0).clone()
        elif what == "a frozen weight":
            model.fixed.weight[2, 2] += 1
        elif what == "dtype":
            model.to(torch.float16)
        elif what == "shape":
            model.last = nn.Linear(8, 4)
        elif what == "a name":
            model.other = model.last
            del model.last
    return model


@pytest.mark.parametrize(
    "what", ["one low bit", "two elements swapped", "a frozen weight", "dtype", "shape", "a name"]
)
def test_another_base_is_refused_and_left_alone(what: str) -> None:
    log = run(Net(), 2).log
    other = spoil(Net(), what)
    before = bits(other)
    with pytest.raises(AnotherBase):
        replay(other, log)
    assert same(bits(other), before)


def test_unnamed_log_says_how_to_name() -> None:
    model = Net()
    optimizer = MeZO(model.last.parameters(), 0.1)
    optimizer.step(model.loss)
    with pytest.raises(AnotherBase, match="named_parameters"):
        replay(Net(), optimizer.log)


def test_checksum_is_of_the_bits_and_their_places() -> None:
    values = noise(3, 0, 700_000)
    whole = Weights([("", values, 0, True)], trained=[True])
    parts = Weights([("", part, 0, True) for part in values.split(123_457)], trained=[True] * 6)
    assert whole.checksum() == parts.checksum()
    before = values.clone()
    whole.checksum()
    assert torch.equal(values, before)
    transposed = Weights([("", values.reshape(700, 1000).T.contiguous().T, 0, True)], trained=[True])
    assert transposed.checksum() == whole.checksum()
    seen = set()
    for where in (0, 1, 262_144, 699_999):
        for bit in (0, 15, 31):
            changed = values.clone()
            changed.view(torch.int32)[where] ^= torch.tensor(1 << bit).to(torch.int32)
            seen.add(Weights([("", changed, 0, True)], trained=[True]).checksum())
    assert len(seen) == 12 and whole.checksum() not in seen


# ---- what the log holds and weighs ---------------------------------------------------------------------------------


def test_size_is_four_bytes_a_draw_and_a_header(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(3))
    for n in (1, 3):
        optimizer = MeZO([weight], 1e-3, n=n)
        sizes = []
        for _ in range(3):
            for _ in range(50):
                optimizer.step(lambda: weight.square().sum())
            optimizer.log.save(tmp_path / "run.zolog")
            sizes.append((tmp_path / "run.zolog").stat().st_size)
            assert (
                sizes[-1] == optimizer.log.nbytes == optimizer.log.header_nbytes + 4 * n * len(optimizer.log)
            )
        assert optimizer.log.header_nbytes < 500


def test_twenty_thousand_steps_of_a_large_model_stay_below_a_tenth_of_a_megabyte() -> None:
    """The table of parameters of the 66B OPT, 1,028 names, on the meta device; 20,000 float32 scalars."""
    from papercore.mezo.log import Base
    from papercore.mezo.settings import GroupSettings, Rule, Settings
    from papercore.mezo.weights import Weight

    table = [
        Weight(f"model.decoder.layers.{i}.{name}", (9216, 9216), "float16", 0, "weight" in name, True)
        for i in range(64)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "layer_norm_a", "layer_norm_b")
        for name in (f"{part}.weight", f"{part}.bias")
    ]
    log = ZOLog(Rule(seed=1), base=Base(tuple(table), 2**63 + 1, 7))
    settings = Settings(1, (GroupSettings(1e-6, 1e-3, 0.0),))
    values = noise(1, 0, 20_000).tolist()
    for value in values:
        log.append([value], settings)
    assert log.nbytes < 100_000
    again = ZOLog.from_bytes(log.to_bytes())
    assert again.projected_grads.tolist() == values and again.base == log.base


def test_a_schedule_costs_what_the_docstring_says() -> None:
    from papercore.mezo.settings import GroupSettings, Rule, Settings

    log = ZOLog(Rule(seed=1))
    for step in range(20_000):
        lr = 1e-6 * (1 + math.cos(math.pi * step / 20_000)) / 2
        log.append([0.5], Settings(1, (GroupSettings(lr, 1e-3, 0.0),)))
    assert log.header_nbytes < 15 * 20_000


def test_entries_are_seeds_and_scalars() -> None:
    model = Net()
    optimizer = run(model, 4, n=2)
    log = optimizer.log
    assert [e.seeds for e in log] == [tuple(draw_seed(6, t, j) for j in range(2)) for t in range(4)]
    assert log.seed == 6 and log.projected_grads.shape == (8,)
    assert log[-1].projected_grad == pytest.approx(optimizer.projected_grad)
    assert log[-1].settings.groups[0].lr == 0.02
    with pytest.raises(IndexError, match="4 steps"):
        log[4]


@pytest.mark.parametrize("at", [0, 9, 20, 60, -1])
def test_any_damage_is_noticed(at: int, tmp_path: Path) -> None:
    content = bytearray(run(Net(), 20).log.to_bytes())
    content[at] ^= 0x40
    (tmp_path / "bad.zolog").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="bad.zolog"):
        ZOLog.load(tmp_path / "bad.zolog")


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = run(Net(), 2).log
    path = tmp_path / "run.zolog"
    log.save(path)
    before = path.read_bytes()

    def no_space(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space"):
        log.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["run.zolog"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "is a folder and is not replaced"),
        (lambda path: os.mkfifo(path), "is no regular file (a device or a pipe)"),
        (lambda path: path.write_text("a thesis"), "holds something that is no log of a MeZO run"),
        (lambda path: path.symlink_to(os.devnull), "is no regular file (a device or a pipe)"),
    ],
    ids=["folder", "pipe", "other file", "device"],
)
def test_only_a_log_or_an_empty_file_is_replaced(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    log, path = run(Net(), 2).log, tmp_path / "run.zolog"
    make(path)
    before = path.lstat().st_ino
    with pytest.raises(ValueError, match=re.escape(f"{path} {message}")):
        log.save(path)
    assert path.lstat().st_ino == before and [p.name for p in tmp_path.iterdir()] == ["run.zolog"]
    (tmp_path / "empty").touch()
    log.save(tmp_path / "empty")
    log.save(tmp_path / "empty")  # an earlier log
    assert len(ZOLog.load(tmp_path / "empty")) == 2


def test_saving_flushes_a_pipelined_run(tmp_path: Path) -> None:
    model = Net()
    optimizer = run(model, 3, pipelined=True)
    optimizer.log.save(tmp_path / "run.zolog")
    assert same(bits(replay(Net(), ZOLog.load(tmp_path / "run.zolog"))), bits(model))


# ---- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [{"momentum": 0.9, "n": 2}, {"betas": (0.9, 0.99)}, {"pipelined": True}], ids=str
)
def test_resumed_runs_take_the_same_steps(rule: dict, tmp_path: Path) -> None:
    """From a file read with weights_only=True, with a scheduler, into an optimiser made with other options."""

    def schedule_of(optimizer: MeZO) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    straight = Net()
    optimizer = run(straight, 0, **rule)
    schedule = schedule_of(optimizer)
    for step in range(8):
        if step == 4:
            state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({"model": straight.state_dict(), **state}, tmp_path / "half.pt")
        optimizer.step(straight.loss)
        schedule.step()
    optimizer.flush()

    resumed, stored = Net(), torch.load(tmp_path / "half.pt", weights_only=True)
    resumed.load_state_dict(stored["model"])
    other = MeZO(resumed.named_parameters(), 9.0, 9.0, dist="rademacher", seed=99)
    schedule = schedule_of(other)
    other.load_state_dict(stored["optimizer"])
    schedule.load_state_dict(stored["schedule"])
    assert other.projected_grad == optimizer.log[3].projected_grad
    for _ in range(4):
        other.step(resumed.loss)
        schedule.step()
    other.flush()
    assert same(bits(resumed), bits(straight))
    assert other.log.to_bytes() == optimizer.log.to_bytes()
    assert same(bits(replay(Net(), other.log)), bits(straight))


def test_state_of_something_else_is_refused() -> None:
    optimizer = run(Net(), 1)
    with pytest.raises(ValueError, match="not saved by a MeZO"):
        optimizer.load_state_dict(torch.optim.SGD(Net().parameters(), 0.1).state_dict())
    other = MeZO([nn.Parameter(torch.ones(2))], 0.1)
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict(optimizer.state_dict())
