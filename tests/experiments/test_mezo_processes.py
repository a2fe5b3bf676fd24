"""The quick chapter in one process and in two gives the same numbers, to the last digit."""

import numpy as np
import pytest
import torch

from papercore.experiments import configure
from papercore.experiments.mezo import quick
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
TRIED = {"full", "lora", "prefix", "batch_8", "n4"}


@pytest.fixture(scope="module")
def config():
    return configure("mezo", "quick", "cpu", overrides=SMALL)


def test_parts_in_processes_leave_what_one_process_would_compute(tmp_path, config):
    apart, together = Stages(tmp_path / "apart"), Stages(tmp_path / "together")
    shared, models = quick.shared_by_runs(config, together)
    parts = quick.all_parts(shared, models)
    assert {"theory", "checkpoint"} < {name for name, *_ in parts}
    last = shared.seeds[-1]
    tried = [part for part in parts if part[0] == "checkpoint" or (part[0] in TRIED and part[2] == last)]
    quick.shared_by_runs(config, apart)
    quick.parts_in_processes(config, apart, tried, 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, number, seed in tried:
            if name == "checkpoint":
                part, here = f"checkpoint{number}", shared.checkpoint(number, models[number])
            else:
                part, [here] = f"{name}/k{number}/seed{seed}", shared.runs(name, number, (seed,))
            there = apart.get(part, quick.chosen_rates)  # on disk, so nothing is computed
            assert here.keys() == there.keys()
            for key, value in here.items():
                np.testing.assert_array_equal(there[key], value, err_msg=f"{part} {key}")
    finally:
        torch.set_num_threads(threads)


def test_what_a_part_raises_in_its_process_is_raised_here(tmp_path, config):
    stages = Stages(tmp_path / "broken")
    quick.shared_by_runs(config, stages)
    with pytest.raises(KeyError, match="no_such_arm"):
        quick.parts_in_processes(config, stages, [("no_such_arm", 1, 0)], 2)
