"""Processes under torchrun: start K of them from anywhere, and be one of them.

`launch` runs a function in K new processes and brings back what the first one returns; it is what a notebook uses, since a
notebook must not fork. `Processes.join` makes this process one of those that torchrun started.

On one machine, and on two of 8 GPUs each (the same line on both; HOST is the name of one of them):

    torchrun --standalone --nproc-per-node 2 -m papercore run qsr --scale paper
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id qsr --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
      -m papercore run qsr --scale paper --device cuda

Glossary
    rank, world    number of this process; number of processes (K)
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from papercore.lab.paths import write_atomically

_TAIL = 20  # lines of a failed process that are shown


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this run and the device of this one."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: torch.device | str = "cpu", *, timeout: float = 600.0) -> Processes:
        """Join the process group that torchrun's variables describe; without them, a group of this process alone.

        gloo carries CPU tensors and NCCL those of CUDA, where the device becomes that of the local rank.

        Args:
            timeout: seconds to wait for the others in one operation before giving up.
        """
        device = torch.device(device)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            wait = timedelta(seconds=timeout)
            if world == 1:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=wait)
            else:
                dist.init_process_group(backend, timeout=wait)
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (anything that can be pickled), in the order of the ranks, on every process."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process has come here."""
        dist.barrier()


def launch(
    target: str, arguments: Mapping[str, Any], *, processes: int = 2, timeout: float = 600.0
) -> dict[str, Any]:
    """Run `target` in `processes` new processes under torchrun and return what the first one returns.

    Args:
        target: "package.module:function" of papercore or anything importable; called as function(processes, **arguments) with
            the joined `Processes`. It returns JSON values and numpy arrays by name.
        arguments: JSON values by name.
        timeout: seconds before the processes are ended.

    Raises:
        ValueError: fewer than one process, or a target that is no "module:function".
        RuntimeError: a process failed; the message ends with what it printed last.
        TimeoutError: they took too long; they are ended.
    """  # fmt: skip
    if processes < 1:
        raise ValueError(f"processes is {processes}: expected at least 1.")
    if target.count(":") != 1:
        raise ValueError(f"target {target!r}: expected 'package.module:function'.")
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.npz"
        job.write_text(
            json.dumps({"target": target, "arguments": dict(arguments), "result": str(result)}),
            encoding="utf-8",
        )
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--nnodes", "1",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
            "-m", "papercore.lab.torchrun", str(job),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A run inside a torchrun process must not take its variables for its own.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"):
            environment.pop(name, None)
        if sys.platform.startswith("linux"):
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: no name of a host is looked up
        run = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _end(run)
            raise TimeoutError(
                f"{processes} processes of {target} took more than {timeout:.0f} s and were ended."
            ) from None
        except BaseException:
            _end(run)
            raise
        if run.returncode or not result.is_file():
            # What a process itself died of says more than the launcher's summary of the others.
            told = sorted(Path(folder).glob("*.traceback"), key=lambda path: path.stat().st_mtime_ns)
            text = told[0].read_text(encoding="utf-8") if told else said
            lines = "\n".join(text.strip().splitlines()[-_TAIL:])
            raise RuntimeError(
                f"{processes} processes of {target} ended with status {run.returncode}:\n{lines}"
            )
        with np.load(result) as stored:
            values = json.loads(str(stored["plain"]))
            return {**values, **{k[6:]: stored[k] for k in stored.files if k.startswith("array_")}}


def _end(run: subprocess.Popen[str]) -> None:
    """End the launcher, which ends its processes; after ten seconds without asking."""
    run.terminate()
    try:
        run.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        run.kill()
        run.communicate()


def _main(job_file: str) -> None:
    """One of the processes that `launch` started."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    module, _, name = job["target"].partition(":")
    processes = Processes.join(job["arguments"].get("device", "cpu"))
    try:
        result = getattr(importlib.import_module(module), name)(processes, **job["arguments"])
    except BaseException:
        last = Path(job_file).with_name(f"rank-{processes.rank}.traceback")
        last.write_text(traceback.format_exc(), encoding="utf-8")
        raise
    if processes.first:
        plain = {k: v for k, v in result.items() if not isinstance(v, np.ndarray)}
        arrays = {f"array_{k}": v for k, v in result.items() if isinstance(v, np.ndarray)}
        write_atomically(
            Path(job["result"]),
            lambda path: np.savez_compressed(path, plain=np.array(json.dumps(plain)), **arrays),  # type: ignore[arg-type]
        )
    processes.wait()


if __name__ == "__main__":
    _main(sys.argv[1])
