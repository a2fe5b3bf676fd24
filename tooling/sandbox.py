"""The environment in which chapters and tests run: no network, capped threads, caches under _build, nothing from HOME."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
OFFLINE = ROOT / "tooling" / "offline"

# Settings of the caller's own that would change what a chapter computes or how its pages look.
NOT_INHERITED = (
    "PYTHONHOME",
    "PYTHONSTARTUP",
    "PYTHONWARNINGS",
    "MPLBACKEND",
    "MATPLOTLIBRC",
    "PAPERCORE_FIGURES",
    "PAPERCORE_PROGRESS",
    "PAPERCORE_RECORDS",
)


def environment(
    build: Path = BUILD,
    *,
    runs: Path | None = None,
    threads: int | None = None,
    offline: bool = True,
    gpu: bool = True,
) -> dict[str, str]:
    """Environment variables for a child process.

    Args:
        build: the folder that takes caches.
        runs: the folder that takes records; default: runs/ in `build`.
        threads: cap for every library that starts threads; None leaves them alone.
        offline: block every connection beyond this machine, in the child and in all of its children.
        gpu: False hides GPUs: quick scale then gives the same everywhere, and chapters do not fight over one card.
    """
    env = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    cache = build / "cache"
    # Some libraries warn of a folder that is missing.
    for name in ("ipython", "matplotlib", "numba", "jupyter/runtime"):
        (cache / name).mkdir(parents=True, exist_ok=True)
    env |= {
        "PAPERCORE_RUNS": str(runs or build / "runs"),
        "MPLBACKEND": "agg",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "IPYTHONDIR": str(cache / "ipython"),
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "XDG_CACHE_HOME": str(cache),
        "XDG_CONFIG_HOME": str(cache / "config"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(cache / "hypothesis"),
        "JUPYTER_CONFIG_DIR": str(cache / "jupyter" / "config"),
        "JUPYTER_DATA_DIR": str(cache / "jupyter" / "data"),
        "JUPYTER_RUNTIME_DIR": str(cache / "jupyter" / "runtime"),
        "JUPYTER_PATH": str(ROOT / "tooling"),  # holds kernels/papercore-replay
    }
    path = [str(ROOT)]
    if offline:
        path.insert(0, str(OFFLINE))
        env |= {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo" if Path("/sys/class/net/lo").exists() else "lo0",
            "HF_HOME": str(cache / "huggingface"),
        }
    env["PYTHONPATH"] = os.pathsep.join(path)
    if not gpu:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if threads is not None:
        env |= dict.fromkeys(
            (
                "OMP_NUM_THREADS",
                "MKL_NUM_THREADS",
                "OPENBLAS_NUM_THREADS",
                "NUMEXPR_NUM_THREADS",
                "NUMBA_NUM_THREADS",
            ),
            str(threads),
        )
    return env


def cores() -> int:
    """CPU cores that this process may use: its affinity, capped by the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(count, 1)


def free_gigabytes() -> float:
    """Memory that a new process can have, in GiB; infinite where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) / 2**20
    except (OSError, ValueError, KeyError):
        return float("inf")
