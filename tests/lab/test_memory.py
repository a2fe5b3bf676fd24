"""Peak memory from allocation events: known sizes come out to the byte, and what ran before does not count."""

from __future__ import annotations

import pytest
import torch

from papercore.lab.memory import peak_allocated

KILO = 250 * 4  # bytes of 250 floats


def _two_after_each_other():
    first = torch.ones(1000)
    del first
    return torch.ones(2000)


def _two_at_once():
    return torch.ones(1000), torch.ones(2000)


def _nothing():
    return None


def _freed_before_the_end():
    for _ in range(5):
        torch.ones(3000).sum()


@pytest.mark.parametrize(
    ("run", "floats"),
    [(_two_after_each_other, 2000), (_two_at_once, 3000), (_nothing, 0), (_freed_before_the_end, 3000)],
)
def test_the_peak_is_what_is_alive_at_once(run, floats):
    before = torch.ones(100_000)  # alive before, so not counted
    found = peak_allocated(run)
    assert floats * 4 <= found <= floats * 4 + 256  # sums and other scalars take a little
    assert len(before) == 100_000


def test_freeing_what_was_alive_before_earns_nothing_on_the_cpu():
    held = [torch.ones(10_000)]

    def run():
        held.clear()
        held.append(torch.ones(5000))

    assert peak_allocated(run) == 5000 * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_peak_on_cuda():
    found = peak_allocated(lambda: torch.ones(1_000_000, device="cuda"), "cuda")
    assert 4_000_000 <= found <= 4_200_000
