"""The optimiser on a CUDA device: memory of a step, replay, and agreement with the CPU. Skipped where there is none."""

import copy

import pytest
import torch
from torch import Tensor, nn

from papercore.mezo import MeZO, ZOLog, noise, replay

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def network(width: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 4))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.3 * noise(i, 0, p.numel()).reshape(p.shape))
    return model.to("cuda", dtype)


def loss_of(model: nn.Module) -> Tensor:
    p = next(model.parameters())
    return model(torch.ones(8, 16, device=p.device, dtype=p.dtype)).float().square().mean()


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9, "n": 2}, {"pipelined": True}], ids=str)
def test_a_step_adds_next_to_nothing_to_a_forward(dist: str, rule: dict) -> None:
    """Noise is made in registers: 64 MiB of weights, less than 2 MiB beyond the forward pass."""
    model = nn.Linear(4096, 4096, device="cuda")
    x = torch.ones(4, 4096, device="cuda")

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x).square().mean()

    optimizer = MeZO(model.parameters(), 1e-4, dist=dist, **rule)
    optimizer.step(forward)
    peaks = []
    for run in (forward, lambda: optimizer.step(forward)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        run()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] - peaks[0] < 2 * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["inplace", "exact"])
@pytest.mark.parametrize("rule", [{}, {"momentum": 0.9}, {"betas": (0.9, 0.99)}], ids=str)
@pytest.mark.filterwarnings("ignore:eps=.*resolution:UserWarning")
def test_replay_is_bit_exact(dtype: torch.dtype, mode: str, rule: dict) -> None:
    model = network(300, dtype)
    base = copy.deepcopy(model)
    optimizer = MeZO(model.named_parameters(), 0.01, 1e-2, mode=mode, **rule)
    for _ in range(8):
        optimizer.step(lambda: loss_of(model))
    again = replay(base, ZOLog.from_bytes(optimizer.log.to_bytes()))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("dist", ["gaussian", "rademacher"])
def test_a_run_on_the_device_is_replayed_on_the_cpu(dist: str) -> None:
    model = network(300)
    base = copy.deepcopy(model).cpu()
    optimizer = MeZO(model.named_parameters(), 0.01, 1e-2, dist=dist)
    for _ in range(8):
        optimizer.step(lambda: loss_of(model))
    for p, q in zip(replay(base, optimizer.log).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach().cpu(), rtol=1e-5, atol=1e-6)


def test_random_states_stay_as_they_are() -> None:
    model = network(30)
    state = torch.cuda.get_rng_state()
    MeZO(model.parameters(), 0.01).step(lambda: loss_of(model))
    assert torch.equal(torch.cuda.get_rng_state(), state)
