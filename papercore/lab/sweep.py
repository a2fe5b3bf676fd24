"""Many runs over any `concurrent.futures.Executor`: a pool of processes here, or the executor of a Dask cluster.

Each run writes its own record, so Ctrl-C or a lost worker loses no finished one, and a rerun skips what is finished. Ctrl-C
ends the runs under way; their finished parts are kept.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

from papercore.lab.progress import progress

Item = TypeVar("Item", bound=Hashable)


def sweep(
    run_one: Callable[[Item], str],
    configs: Sequence[Item],
    *,
    jobs: int = 1,
    dask: str | None = None,
    executor: concurrent.futures.Executor | None = None,
    text: str = "sweep",
) -> Iterator[tuple[Item, str | BaseException]]:
    """Run every config; yield (config, what `run_one` returned or the exception that it raised) as each ends.

    Args:
        run_one: importable function of one config (it travels to other processes by name).
        configs: configs, or anything else that can be hashed and pickled, such as the parts of one run.
        jobs: processes of the local pool.
        dask: address of a Dask scheduler to submit to instead.
        executor: any executor to use as it is; it is not shut down here.
        text: what the progress bar says.

    Raises:
        ValueError: jobs < 1. ImportError: `dask` without the package distributed.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs}: expected at least 1.")
    client: Any = None
    pool: concurrent.futures.ProcessPoolExecutor | None = None
    if executor is None and dask:
        try:
            from distributed import Client
        except ImportError as error:
            raise ImportError(
                "--dask needs the package distributed: pip install 'papercore[dask]'."
            ) from error
        client = Client(dask)
        executor = client.get_executor()
    elif executor is None:
        # Fresh interpreters: a forked child would inherit torch's threads in an unusable state.
        fresh = multiprocessing.get_context("spawn")
        executor = pool = concurrent.futures.ProcessPoolExecutor(jobs, fresh, _leave_interrupts_alone)
    futures: dict[concurrent.futures.Future[str], Item] = {}
    try:
        # A config that stands there twice is run once: two runs of it would write the same files.
        for config in dict.fromkeys(configs):
            futures[executor.submit(run_one, config)] = config
        for future in progress(concurrent.futures.as_completed(futures), text, total=len(futures)):
            raised = future.exception()
            yield futures[future], raised if raised is not None else future.result()
    finally:
        for future in futures:
            future.cancel()
        if client is not None:
            client.close()
        if pool is not None:
            _end(pool)


def _leave_interrupts_alone() -> None:
    """In a worker: Ctrl-C reaches every process of a terminal, but it is the main one that decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """End the workers now. Without this an interrupted sweep would wait for the runs under way and for one more of each worker."""
    workers = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()
