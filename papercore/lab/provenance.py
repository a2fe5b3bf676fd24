"""Facts on the machine and the libraries behind a number, and the memory that a run took."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import papercore

PACKAGE = Path(papercore.__file__).resolve().parent
VERSIONS_OF = (
    "torch",
    "numpy",
    "scipy",
    "transformers",
    "peft",
    "numba",
    "triton",
    "scikit-learn",
    "datasets",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on (those that are installed)."""
    from importlib import metadata

    out = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            out[name] = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return out


def commit() -> str | None:
    """Short name of the commit of the source tree, with `+` when tracked files differ from it; None outside git."""
    try:
        shown = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=PACKAGE,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None if shown.returncode == 0 else None


def hardware(device: str) -> dict[str, Any]:
    """What ran it: the device's name, cores, threads."""
    import torch

    facts: dict[str, Any] = {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "system": platform.system(),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class MemoryWatch:
    """Peak memory of this process in bytes between `start` and `stop`, sampled ten times a second (resident set), and of the GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0
        self._end = threading.Event()
        # The thread holds no reference to the watch, so that it ends with a run that failed and never called `stop`.
        self._thread = threading.Thread(target=_sample, args=(weakref.ref(self), self._end), daemon=True)

    def start(self) -> MemoryWatch:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def stop(self) -> dict[str, int]:
        self._end.set()
        self._thread.join()
        out = {"peak_memory_bytes": self.peak}
        if self.device == "cuda":
            import torch

            out["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        return out


def _sample(reference: weakref.ref[MemoryWatch], end: threading.Event) -> None:
    """Keep a watch's peak up to date until it stops or is gone."""
    while True:
        watch = reference()
        if watch is None:
            return
        watch.peak = max(watch.peak, resident_bytes())
        del watch
        if end.wait(0.1):
            return


def resident_bytes() -> int:
    """Resident set of this process; the largest so far where the system does not tell the present one."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        try:
            import resource
        except ImportError:
            return 0
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024
