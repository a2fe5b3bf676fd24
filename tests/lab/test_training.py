"""The training loop: it stops before a bad update, and an interrupted run ends bit for bit where the whole one ends."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from papercore.lab.training import Checkpoint, backward_step, train, warmup_linear

STEPS = 12


class Run:
    """A small regression with everything that has state: weights, Adam, a schedule, batches and dropout from generators."""

    def __init__(self, path=None, every=4):
        start = torch.Generator().manual_seed(1)
        self.model = nn.Linear(5, 3)
        with torch.no_grad():
            for p in self.model.parameters():
                p.normal_(generator=start)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.5)
        self.batches, self.noise = torch.Generator().manual_seed(2), torch.Generator().manual_seed(3)
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        self.checkpoint = path and Checkpoint(
            path, every, parts, {"batches": self.batches, "noise": self.noise}
        )
        self.seen: list[int] = []

    def step(self, index):
        self.seen.append(index)
        x = torch.randn(8, 5, generator=self.batches)
        keep = torch.rand(8, 3, generator=self.noise) > 0.3
        loss = ((self.model(x) - x.sum(1, keepdim=True)) * keep).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss

    def train(self, steps=STEPS, step=None):
        return train(step or self.step, steps, checkpoint=self.checkpoint)

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


@pytest.fixture(scope="module")
def whole():
    run = Run()
    return run.train(), run.weights()


@pytest.mark.parametrize("last", [3, 4, 7, 8, 11])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_ends_where_the_whole_one_ends(tmp_path, whole, last, error):
    def until(index):
        if index == last:
            raise error
        return first.step(index)

    first = Run(tmp_path / "deep" / "state.pt")
    with pytest.raises(error):
        first.train(step=until)
    second = Run(first.checkpoint.path)
    losses = second.train()
    saved = last // 4 * 4  # steps that were done at the last save
    assert second.seen == list(range(saved, STEPS))
    assert losses == whole[0] and torch.equal(second.weights(), whole[1])
    assert [p.name for p in (tmp_path / "deep").iterdir()] == (["state.pt"])


def test_the_loop_calls_each_step_once_and_returns_its_losses():
    assert train(lambda i: torch.tensor(float(i)), 4) == [0.0, 1.0, 2.0, 3.0]
    assert train(lambda i: 1 / 0, 0) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_with_its_step(tmp_path, bad):
    run = Run(tmp_path / "state.pt", every=2)
    with pytest.raises(
        FloatingPointError, match=rf"training: the loss is {bad} at step 5: lower the learning rate"
    ):
        run.train(step=lambda i: bad if i == 5 else run.step(i))
    # The last good state is what a second attempt begins with.
    again = Run(tmp_path / "state.pt")
    assert again.checkpoint.load()[0] == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_loss_never_reaches_the_weights(bad):
    run = Run()
    factors = [1.0, 1.0, bad, 1.0]
    states = []

    def loss_fn(index):
        states.append(run.weights())
        return run.model(torch.ones(2, 5)).square().mean() * factors[index]

    with pytest.raises(FloatingPointError, match="at step 2"):
        train(backward_step(loss_fn, run.optimizer), 4)
    assert len(states) == 3 and not torch.equal(states[1], states[2])
    assert torch.equal(run.weights(), states[2]) and torch.isfinite(run.weights()).all()
    assert all(int(s["step"]) == 2 for s in run.optimizer.state.values())


def test_a_backward_step_is_torch_by_hand():
    first, second = Run(), Run()
    x = torch.linspace(-1, 1, 10).reshape(2, 5)
    rates = [0.1, 0.01, 0.2]
    train(
        backward_step(
            lambda i: first.model(x).square().sum() * 100, first.optimizer, lr=rates.__getitem__, clip=0.5
        ),
        3,
    )
    for rate in rates:
        second.optimizer.param_groups[0]["lr"] = rate
        second.optimizer.zero_grad()
        (second.model(x).square().sum() * 100).backward()
        assert nn.utils.clip_grad_norm_(second.model.parameters(), 0.5) > 0.5
        second.optimizer.step()
    assert torch.equal(first.weights(), second.weights())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run = Run(tmp_path / "state.pt")
    run.train()
    path, parts, generators = run.checkpoint.path, run.checkpoint.parts, run.checkpoint.generators
    with pytest.raises(
        ValueError,
        match=r"state\.pt holds the parts \['model', 'optimizer', 'schedule'\], this run has \['model'\]: delete it",
    ):
        Checkpoint(path, 4, {"model": run.model}, generators).load()
    with pytest.raises(
        ValueError, match=r"state\.pt holds the generators \['batches', 'noise'\], this run has \['other'\]"
    ):
        Checkpoint(path, 4, parts, {"other": torch.Generator()}).load()
    with pytest.raises(
        ValueError, match=r"state\.pt is 8 steps into a longer run than this one of 5: delete it"
    ):
        Run(path).train(steps=5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Checkpoint(path, 4, {**parts, "model": nn.Linear(2, 2)}, generators).load()
    with pytest.raises(ValueError, match="a checkpoint every 0 steps: expected at least 1"):
        Checkpoint(path, 0, parts)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = Run(tmp_path / "state.pt")
    run.train()
    whole = run.checkpoint.path.read_bytes()
    for bad in (b"", b"text", whole[: len(whole) // 2], whole[:-10]):
        run.checkpoint.path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"state\.pt is not a checkpoint: .*Delete it to start afresh"):
            run.checkpoint.load()
    torch.save([1, 2], run.checkpoint.path)
    with pytest.raises(ValueError, match=r"state\.pt is not a checkpoint"):
        run.checkpoint.load()
    run.checkpoint.path.unlink()
    assert run.checkpoint.load() == (0, [])


FULL = """
import resource, sys
import torch
from papercore.lab.training import Checkpoint

model = torch.nn.Linear(200, 200)
checkpoint = Checkpoint(sys.argv[1], 1, {"model": model})
checkpoint.save(1, [0.5])
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    checkpoint.save(2, [0.5, 0.4])
except OSError as error:
    print(error)
print(checkpoint.load()[0])
"""


def test_a_disk_that_fills_while_torch_writes_is_named_and_the_old_state_kept(tmp_path):
    pytest.importorskip("resource")
    path = tmp_path / "state.pt"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr
    assert os.strerror(errno.EFBIG) in done.stdout and "nothing was changed there" in done.stdout
    assert done.stdout.splitlines()[-1] == "1" and list(tmp_path.iterdir()) == [path]


def test_the_learning_rate_climbs_and_falls_linearly():
    lr = warmup_linear(2.0, 10, warmup=4)
    assert [lr(i) for i in range(11)] == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, 5 / 3, 4 / 3, 1.0, 2 / 3, 1 / 3, 0.0]
    )
    assert lr(20) == 0.0
    plain = warmup_linear(1.0, 4)
    assert [plain(i) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [warmup_linear(1.0, 2, warmup=2)(i) for i in range(3)] == [0.5, 1.0, 0.0]
