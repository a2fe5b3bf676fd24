"""Starts a script of this folder under torchrun with real gloo processes and collects what every rank saved."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def torchrun(script: str, processes: int, folder: Path, *words: str) -> list[dict[str, Any]]:
    """The dict that each rank saved as FOLDER/rank<rank>.pt; the processes' own words if one fails."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1"),
        *(str(Path(__file__).with_name(script)), str(folder), *words),
    ]
    quiet = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
