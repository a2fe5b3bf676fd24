"""The `paper` scale from end to end on random-weight stand-ins saved in the hub's formats: record, resumption, refusals, torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from papercore.experiments import mezo
from papercore.experiments.mezo import paper, paper_training
from papercore.experiments.mezo.config import Config
from papercore.experiments.mezo.paper_models import family_of
from papercore.experiments.mezo.paper_settings import (
    METHODS,
    PaperSettings,
    Trial,
    ft_trials,
    head_trials,
    mezo_trials,
    seeds_of,
)
from papercore.experiments.mezo.tasks import TASKS
from papercore.lab.data import Missing
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from tests.experiments.mezo_tiny_hub import TINY, make_hub, use_hub

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def environment(hub, tmp_path, monkeypatch):
    use_hub(monkeypatch, hub, tmp_path / "runs")


def test_whole_matrix_from_files_to_record(tmp_path):
    config = Config.paper(
        **{**TINY, "paper_seeds": (0, 1)},
        paper_models=("facebook/opt-13b", "roberta-large"),
        paper_tasks=("sst2",),
    )
    record = mezo.run(config)
    for method in METHODS:
        assert 0 <= record.metrics[f"opt-13b/sst2/{method}"] <= 100
        assert f"opt-13b/sst2/{method}/std" in record.metrics
        assert (f"roberta-large-k2/sst2/{method}" in record.metrics) == (method != "icl")
    table = record.tables["opt-13b"]
    assert table["columns"] == paper.COLUMNS
    by_method = {row[2]: row for row in table["rows"]}
    assert [by_method[m][6] for m in METHODS] == [58.8, 87.0, 93.4, 91.4, 89.6, 90.7, 92.0]  # Table 1, SST-2
    assert by_method["mezo"][7] == pytest.approx(by_method["mezo"][3] - 91.4) and by_method["mezo"][5] == 2
    assert by_method["mezo"][8] == "lr0.0001-b4"
    # k = 2 is not in Table 18; its zero-shot row holds for every k.
    assert {row[2]: row[6] for row in record.tables["roberta-large-k2"]["rows"]}["zero_shot"] == 79.0
    assert record.arrays["opt-13b/sst2/mezo/validation"].shape == (2, 2)
    assert record.arrays["roberta-large-k2/sst2/mezo_prefix/losses"].shape == (2, 4)
    assert record.metrics["opt-13b/tasks"] == 1 and "opt-13b/best_mezo_above/icl" in record.metrics
    assert "MeZO mode inplace" in record.notes["opt-13b/setting"]
    again = Record.load(record.save(tmp_path / "paper.json"))
    assert again.metrics.keys() == record.metrics.keys()


@pytest.mark.parametrize(
    ("name", "tasks"), [("opt-13b", ("copa", "squad")), ("roberta-large", ("trec", "snli"))]
)
def test_other_kinds_of_task_run(name, tasks):
    methods = ("zero_shot", "icl", "lp", "mezo") if name == "opt-13b" else ("zero_shot", "lp", "mezo")
    record = mezo.run(Config.paper(**TINY, paper_models=(name,), paper_tasks=tasks, paper_methods=methods))
    label = next(iter(record.tables))
    assert [(row[0], row[2]) for row in record.tables[label]["rows"]] == [
        (TASKS[t].title, m) for t in tasks for m in methods
    ]
    assert all(np.isfinite(value) for value in record.metrics.values())
    assert (f"{label}/squad/mezo/exact_match" in record.metrics) == ("squad" in tasks)


def test_finished_parts_are_not_computed_again(tmp_path, monkeypatch):
    config = Config.paper(
        **TINY, paper_models=("opt-13b",), paper_tasks=("sst2",), paper_methods=("zero_shot", "mezo", "ft")
    )
    stages, first = Stages(tmp_path / "parts"), Record.start(config)
    real = paper_training.tune_adam
    monkeypatch.setattr(paper_training, "tune_adam", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        paper.run_paper(config, first, stages)
    monkeypatch.setattr(paper_training, "tune_adam", real)
    for name in ("tune_mezo", "zero_shot"):
        monkeypatch.setattr(paper_training, name, lambda *a, **k: pytest.fail("computed twice"))
    second, third = Record.start(config), Record.start(config)
    paper.run_paper(config, second, stages)
    paper.run_paper(config, third, stages)
    assert second.metrics == third.metrics and len(second.tables["opt-13b"]["rows"]) == 3


def test_grids_are_the_papers():
    plain = PaperSettings()
    rates = {
        m: [t.lr for t in mezo_trials(plain, "causal", m, generates=False)]
        for m in ("mezo", "mezo_lora", "mezo_prefix")
    }
    assert rates == {"mezo": [1e-6, 1e-7], "mezo_lora": [1e-4, 5e-5], "mezo_prefix": [1e-2, 1e-3]}
    assert [t.lr for t in mezo_trials(plain, "causal", "mezo", generates=True)] == [1e-6, 5e-7, 1e-7]
    assert mezo_trials(plain, "masked", "mezo_lora", generates=False)[0] == Trial(
        1e-5, 64, 100_000, 10_000, 1e-3, 0.1
    )
    assert mezo_trials(plain, "causal", "mezo_prefix", generates=False)[0] == Trial(
        1e-2, 16, 20_000, 4_000, 1e-1, 0.0
    )
    assert ft_trials(plain, "causal", 1000) == [Trial(lr, 8, 625, 125) for lr in (1e-5, 5e-5, 8e-5)]
    assert {(t.batch, t.steps) for t in ft_trials(plain, "masked", 32)} == {(2, 1000), (4, 1000), (8, 1000)}
    assert {t.batch for t in ft_trials(PaperSettings(paper_shots=512), "masked", 1024)} == {8, 16, 32}
    assert head_trials(plain, 1000) == [Trial(lr, 8, 625, 125) for lr in (1e-4, 5e-4)]
    assert seeds_of(plain, "masked") == (13, 21, 42, 87, 100) and seeds_of(plain, "causal", shift=7) == (7,)


def test_refused_settings_say_what_is_allowed(tmp_path, monkeypatch):
    def run(**settings):
        return mezo.run(Config.paper(**{**TINY, "paper_models": ("opt-13b",), **settings}))

    with pytest.raises(
        ValueError,
        match="unknown task of the causal models 'sst-2': expected one of sst2, .* Did you mean 'sst2'",
    ):
        run(paper_tasks=("sst-2",))
    with pytest.raises(ValueError, match="unknown paper_methods 'mezzo'.*Did you mean 'mezo'"):
        run(paper_methods=("mezzo",))
    with pytest.raises(ValueError, match="none of paper_methods = .*'icl'.* applies to masked models"):
        run(paper_models=("roberta-large",), paper_tasks=("sst2",), paper_methods=("icl",))
    with pytest.raises(ValueError, match="two models of one name"):
        run(paper_models=("opt-13b", "facebook/opt-13b"))
    with pytest.raises(
        Missing, match=r"(?s)the model 'opt-14b' was not found.*PAPERCORE_MODELS.*hf download opt-14b"
    ):
        run(paper_models=("opt-14b",))
    with pytest.raises(ValueError, match="no label has more than k = 18 training rows.*lower paper_shots"):
        run(paper_models=("roberta-large",), paper_tasks=("sst2",), paper_shots=18)
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    with pytest.raises(Missing, match=r"(?s)the data set 'cb' was not found.*PAPERCORE_DATA.*super_glue"):
        run(paper_tasks=("cb",))
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["T5ForConditionalGeneration"]}), encoding="utf-8"
    )
    with pytest.raises(
        ValueError, match="holds T5ForConditionalGeneration: expected a masked or a causal language model"
    ):
        family_of(tmp_path)


def test_two_processes_do_what_one_does(hub, tmp_path):
    settings = {
        **TINY,
        "paper_models": ("opt-13b",),
        "paper_tasks": ("copa",),
        "paper_methods": ("zero_shot", "mezo", "ft"),
    }
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from papercore.experiments.mezo.config import Config\n"
        "from papercore.experiments.mezo.paper import run_paper\n"
        "from papercore.lab.record import Record\n"
        "from papercore.lab.stages import Stages\n"
        "torch.set_num_threads(1)\n"
        f"config = Config.paper(**{settings!r})\n"
        "for again in range(2):  # the second time everything is on disk\n"
        "    record = Record.start(config)\n"
        "    run_paper(config, record, Stages(sys.argv[1] + '/parts'))\n"
        "rank = torch.distributed.get_rank()\n"
        "torch.distributed.destroy_process_group()\n"
        "record.finish().save(f'{sys.argv[1]}/{rank}.json')\n",
        encoding="utf-8",
    )
    source = str(Path(paper.__file__).parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": source}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two, other = (Record.load(tmp_path / f"{rank}.json") for rank in (0, 1))
    one = mezo.run(Config.paper(**settings))
    assert two.metrics == other.metrics == one.metrics
    for name in ("mezo", "ft"):
        validation = f"opt-13b/copa/{name}/validation"
        np.testing.assert_array_equal(two.arrays[validation], one.arrays[validation])
    # The mean of the shares' losses is the loss of the joint batch. (Adam's dropout differs by process.)
    losses = "opt-13b/copa/mezo/losses"
    np.testing.assert_allclose(two.arrays[losses], one.arrays[losses], rtol=1e-4)
    assert "2 process(es)" in two.notes["opt-13b/setting"]
