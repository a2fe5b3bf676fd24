"""Many runs over any executor; what a pool of processes does is tested with the command line."""

from __future__ import annotations

import concurrent.futures
import sys
import threading
import time

import pytest

from papercore.lab.config import Config
from papercore.lab.sweep import sweep

CONFIGS = [Config.quick(device="cpu", seed=seed) for seed in range(4)]


def _run(config):
    if config.seed == 2:
        raise FloatingPointError("the loss is nan at step 3")
    return f"record of {config.seed}"


def test_every_config_is_answered_with_its_record_or_its_error():
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        outcomes = dict(sweep(_run, [*CONFIGS, CONFIGS[0]], executor=executor))
        assert executor.submit(int, "3").result() == 3  # an executor that was given is not shut down
    assert outcomes.keys() == set(CONFIGS)
    assert {c.seed: o for c, o in outcomes.items() if c.seed != 2} == {s: f"record of {s}" for s in (0, 1, 3)}
    assert isinstance(outcomes[CONFIGS[2]], FloatingPointError) and "step 3" in str(outcomes[CONFIGS[2]])
    assert list(sweep(_run, [])) == []


def test_outcomes_come_as_they_end():
    gate = threading.Event()

    def run(config):
        if config.seed == 0:
            assert gate.wait(30)
        return str(config.seed)

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        answers = sweep(run, CONFIGS, executor=executor)
        early = [next(answers)[0].seed for _ in range(3)]
        gate.set()
        assert early == [1, 2, 3] and [c.seed for c, _ in answers] == [0]


def test_a_sweep_that_is_given_up_starts_nothing_more():
    started = []

    def run(config):
        started.append(config.seed)
        time.sleep(0.05)
        return ""

    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        answers = sweep(run, CONFIGS, executor=executor)
        next(answers)
        answers.close()
    assert started in ([0], [0, 1])


def test_what_cannot_run_is_refused():
    with pytest.raises(ValueError, match="--jobs 0: expected at least 1"):
        next(sweep(_run, CONFIGS, jobs=0))


def test_dask_without_dask_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(
        ImportError, match=r"--dask needs the package distributed: pip install 'papercore\[dask\]'"
    ):
        next(sweep(_run, CONFIGS, dask="tcp://localhost:1"))


@pytest.mark.filterwarnings("ignore:Couldn't detect a suitable IP address:RuntimeWarning")
def test_a_dask_cluster_answers_as_a_pool_does():
    distributed = pytest.importorskip("distributed")
    # On the loopback by name, so that nothing asks the network which address this machine has.
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=2,
        processes=False,
        dashboard_address=None,
        host="127.0.0.1",
        protocol="tcp://",
    ) as cluster:
        outcomes = dict(sweep(_run, CONFIGS, dask=cluster.scheduler_address))
    assert outcomes.keys() == set(CONFIGS) and outcomes[CONFIGS[3]] == "record of 3"
    assert isinstance(outcomes[CONFIGS[2]], FloatingPointError)
