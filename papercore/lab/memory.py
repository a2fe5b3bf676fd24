"""How many bytes a piece of code holds at its worst, counted from allocation events: on the CPU by the profiler, on CUDA by
the caching allocator. Unlike resident memory, this does not depend on what ran before."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_allocated(run: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors allocated by `run` and alive at once, above what was alive before it.

    On the CPU numpy and numba buffers are not seen: only memory that torch allocates. Nor is it seen there that `run` frees
    what was alive before it; the peak is then that much too high.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler's C++ part prints two lines at every start and stop unless told otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    alive = peak = 0
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
