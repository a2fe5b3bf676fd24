"""The quick chapter in one process and in two gives the same numbers, to the last digit."""

import numpy as np
import pytest
import torch

from papercore.experiments import configure
from papercore.experiments.mezo import quick
from papercore.experiments.mezo.comparison import all_runs
from papercore.lab.stages import Stages

SMALL = {
    "pretrain_steps": 3,
    "pretrain_batch": 2,
    "segments": 2,
    "shots": (1, 2),
    "seeds": 3,
    "steps": 4,
    "tests": 8,
}


@pytest.fixture(scope="module")
def config():
    return configure("mezo", "quick", "cpu", overrides=SMALL)


def test_runs_in_processes_leave_what_one_process_would_compute(tmp_path, config):
    apart, shared = Stages(tmp_path / "apart"), Stages(tmp_path / "shared")
    quick.runs_in_processes(quick.shared_by_runs(config, apart)[0], 2)
    alone, _ = quick.shared_by_runs(config, shared)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, shots, seed in all_runs(config, alone.seeds, alone.few):
            part = f"{name}/k{shots}/seed{seed}"
            assert apart.done(part), part
            if seed == alone.seeds[-1] and name in {"full", "lora", "prefix", "batch_8", "n4"}:
                [here] = alone.runs(name, shots, (seed,))
                there = apart.get(part, quick.chosen_rates)
                assert here.keys() == there.keys()
                for key, value in here.items():
                    np.testing.assert_array_equal(there[key], value, err_msg=f"{part} {key}")
    finally:
        torch.set_num_threads(threads)


def test_what_a_run_raises_in_its_process_is_raised_here(tmp_path, config, monkeypatch):
    stages = Stages(tmp_path / "broken")
    shared, _ = quick.shared_by_runs(config, stages)
    monkeypatch.setattr(quick, "all_runs", lambda *_: [("no_such_arm", 1, 0)])
    with pytest.raises(KeyError, match="no_such_arm"):
        quick.runs_in_processes(shared, 2)
