"""The `paper` scale from end to end on random-weight stand-ins saved in the hub's formats, and what it promises on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from papercore.experiments import mezo
from papercore.experiments.mezo import paper, paper_training
from papercore.experiments.mezo.attention_prefix import attention_with_prefix, prefix_encoder
from papercore.experiments.mezo.config import Config
from papercore.experiments.mezo.paper_models import LanguageModel, family_of, untie_output_layer
from papercore.experiments.mezo.paper_settings import (
    METHODS,
    PaperSettings,
    Trial,
    ft_trials,
    head_trials,
    mezo_trials,
    seeds_of,
)
from papercore.experiments.mezo.problems import CausalProblem, MaskedProblem
from papercore.experiments.mezo.processes import Processes
from papercore.experiments.mezo.prompts import CAUSAL, MASKED
from papercore.experiments.mezo.tasks import TASKS, Sample
from papercore.lab.data import Missing
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from tests.experiments.mezo_tiny_hub import ROWS, rows_of, save_opt, save_roberta, write_parquet

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ALONE = Processes(0, 1, torch.device("cpu"))
TINY = {
    "device": "cpu",
    "paper_steps": 4,
    "paper_eval_every": 2,
    "paper_batch": 4,
    "paper_tune_steps": 2,
    "paper_shots": 2,
    "paper_seeds": (0,),
    "paper_train": 8,
    "paper_validation": 4,
    "paper_test": 6,
    "paper_demonstrations": 2,
    "paper_max_tokens": 200,
    "paper_dtype": "float32",
    "paper_lr_mezo": (1e-4,),
    "paper_lr_lora": (1e-3,),
    "paper_lr_prefix": (1e-2,),
    "paper_lr_ft": (1e-3,),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder of models and one of data; the tiny OPT has the name of a model that the paper reports."""
    root = tmp_path_factory.mktemp("hub")
    save_opt(root / "models" / "opt-13b")
    save_roberta(root / "models" / "roberta-large")
    for task in ROWS:
        test = "test" if task in ("sst5", "trec") else "validation"
        write_parquet(root / "data" / task, train=rows_of(task, 36), **{test: rows_of(task, 8, start=100)})
    return root


@pytest.fixture(autouse=True)
def environment(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_MODELS", str(hub / "models"))
    monkeypatch.setenv("PAPERCORE_DATA", str(hub / "data"))
    monkeypatch.setenv("PAPERCORE_RUNS", str(tmp_path / "runs"))
    # Without a network: what is not in the folders is missing, at once.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "datasets", None)


def language_model(name: str, **settings) -> LanguageModel:
    return LanguageModel.find(name, Config.paper(**{**TINY, **settings}), ALONE)


def problem_of(model: LanguageModel, task: str, train: int = 8):
    rows = rows_of(task, train)
    sample = Sample(rows, rows_of(task, 6, start=50), rows_of(task, 6, start=90), rows)
    if model.family == "masked":
        return MaskedProblem(model.tokenizer(), TASKS[task], MASKED[task], sample)
    return CausalProblem(model.tokenizer(), TASKS[task], CAUSAL[task], sample, max_tokens=200)


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


@pytest.mark.parametrize(
    ("name", "method", "dtype"),
    [
        ("opt-13b", "mezo", "bfloat16"),
        ("opt-13b", "mezo_prefix", "float32"),
        ("roberta-large", "mezo_lora", "float32"),
    ],
)
def test_interrupted_mezo_goes_on_bit_for_bit(tmp_path, monkeypatch, name, method, dtype):
    model = language_model(name, paper_dtype=dtype)
    assert model.mode == ("exact" if dtype == "bfloat16" else "inplace")
    trial, problem = Trial(1e-3, 4, 7, 2, 1e-2, 0.01), problem_of(model, "sst2")
    whole = paper_training._mezo_run(model, problem, method, trial, 3, tmp_path / "whole")
    calls = iter(range(100))
    loss = type(problem).loss

    def killed_in_step_5(self, *args):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(type(problem), "loss", killed_in_step_5)
    with pytest.raises(KeyboardInterrupt):
        paper_training._mezo_run(model, problem, method, trial, 3, tmp_path / "killed")
    monkeypatch.setattr(type(problem), "loss", loss)
    log, curve, losses, tuned = paper_training._mezo_run(
        model, problem, method, trial, 3, tmp_path / "killed"
    )
    assert torch.equal(log.projected_grads, whole[0].projected_grads) and losses == whole[2]
    assert (curve.steps, curve.scores) == (whole[1].steps, whole[1].scores) and curve.steps == [2, 4, 6, 7]
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), whole[3].parameters(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_best_check_is_what_is_tested(tmp_path, monkeypatch, dtype):
    model = language_model("opt-13b", paper_dtype=dtype)
    problem, scores, tested = problem_of(model, "sst2"), iter([10.0, 40.0, 40.0, 20.0]), []

    def evaluate(self, tuned, split, processes):
        if split == "test":
            tested.append([p.detach().clone() for p in tuned.parameters()])
            return {"accuracy": 1.0}
        return {"accuracy": next(scores)}

    monkeypatch.setattr(CausalProblem, "evaluate", evaluate)
    result = paper_training.tune_mezo(
        model, problem, "mezo", Trial(1e-3, 4, 8, 2, 1e-2), seed=0, folder=tmp_path / "a"
    )
    assert (result["best_step"], result["validation"], result["checked"]) == (
        4,
        40.0,
        [10.0, 40.0, 40.0, 20.0],
    )
    scores = iter([1.0])
    paper_training.tune_mezo(
        model, problem, "mezo", Trial(1e-3, 4, 4, 4, 1e-2), seed=0, folder=tmp_path / "b"
    )
    assert all(torch.equal(a, b) for a, b in zip(*tested, strict=True)), (
        "the weights after 4 steps, to the last bit"
    )


@pytest.mark.parametrize(
    ("name", "method", "lr", "eps"),
    [
        ("opt-13b", "mezo", 3e-3, 1e-3),
        ("opt-13b", "mezo_lora", 1e-2, 1e-2),
        ("opt-13b", "mezo_prefix", 1e-1, 1e-1),
        ("roberta-large", "mezo", 3e-3, 1e-3),
        ("roberta-large", "mezo_prefix", 4.0, 1e-1),
    ],
)
def test_mezo_lowers_the_training_loss(tmp_path, name, method, lr, eps):
    model = language_model(name)
    problem = problem_of(model, "sst2")
    result = paper_training.tune_mezo(
        model, problem, method, Trial(lr, 8, 60, 60, eps), seed=0, folder=tmp_path
    )
    assert result["losses"][-5:].mean() < result["losses"][:5].mean() - 0.015
    assert result["log_bytes"] < 2000 and result["diverged"] == ""


@pytest.mark.parametrize(
    ("name", "task", "head_only"),
    [("opt-13b", "sst2", False), ("opt-13b", "squad", True), ("roberta-large", "sst2", False)],
)
def test_adam_lowers_the_training_loss_and_leaves_the_generator_alone(name, task, head_only):
    model = language_model(name)
    before = torch.random.get_rng_state()
    result = paper_training.tune_adam(
        model, problem_of(model, task), Trial(5e-3, 8, 30, 15), seed=0, head_only=head_only
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert result["losses"][-5:].mean() < 0.8 * result["losses"][:5].mean() and result["checks"] == [15, 30]


def test_a_learning_rate_that_diverges_is_a_result(tmp_path):
    model = language_model("opt-13b")
    problem = problem_of(model, "sst2")
    for result in (
        paper_training.tune_mezo(model, problem, "mezo", Trial(1e30, 4, 6, 6, 1e-3), seed=0, folder=tmp_path),
        paper_training.tune_adam(model, problem, Trial(1e30, 4, 6, 6), seed=0),
    ):
        assert np.isnan(result["test"]) and result["validation"] == float("-inf") and result["diverged"]
    config = Config.paper(
        **{**TINY, "paper_lr_mezo": (1e30, 1e-4)},
        paper_models=("opt-13b",),
        paper_tasks=("sst2",),
        paper_methods=("mezo",),
    )
    assert mezo.run(config).tables["opt-13b"]["rows"][0][8] == "lr0.0001-b4"


def test_linear_probe_finds_what_is_linearly_there(hub):
    model = language_model("opt-13b")
    problem = problem_of(model, "sst2", train=12)

    class Told(CausalProblem):
        def features(self, _model, split, processes):
            labels = np.array([q.answers[0] for q in problem.questions[split]])
            noise = np.random.default_rng(len(labels)).normal(size=(len(labels), 3))
            return np.c_[noise, 4.0 * labels - 2], labels

    problem.__class__ = Told
    assert paper_training.linear_probe(model, problem) == {"test": 100.0, "folds": 5}


def test_batches_are_epochs_laid_end_to_end():
    drawn = [i for step in range(6) for i in paper_training.batch_of(9, step, 6, seed=1)]
    for epoch in range(4):
        assert sorted(drawn[9 * epoch : 9 * (epoch + 1)]) == list(range(9))
    assert drawn[:9] != drawn[9:18] and drawn != [
        i for step in range(6) for i in paper_training.batch_of(9, step, 6, seed=2)
    ]
    assert [len(paper_training.batch_of(5, step, 12, seed=0)) for step in range(3)] == [5, 5, 5]


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


def test_half_precision_is_perturbed_exactly_unless_asked_otherwise():
    assert (
        language_model("opt-13b", paper_dtype="paper").dtype,
        language_model("opt-13b", paper_dtype="paper").mode,
    ) == (torch.float16, "exact")
    assert (
        language_model("roberta-large", paper_dtype="paper").dtype,
        language_model("roberta-large").mode,
    ) == (torch.float32, "inplace")
    assert language_model("opt-13b", paper_dtype="float16", paper_mode="inplace").mode == "inplace"


def test_prefix_attention_by_hand():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=generator) for _ in range(3))
    module = torch.nn.Module()
    module.prefix_keys, module.prefix_values = (torch.randn(3, 2, 4, generator=generator) for _ in range(2))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[1, :, :, 3:] = False
    options = {"scaling": 0.5, "dropout": 0.0, "is_causal": False}
    floats = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, float("-inf"))
    for given in (mask, floats):
        got, _ = attention_with_prefix(module, q, k, v, given, **options)
        for b in range(2):
            for h in range(3):
                keys, values = (
                    torch.cat([module.prefix_keys[h], k[b, h]]),
                    torch.cat([module.prefix_values[h], v[b, h]]),
                )
                scores = 0.5 * q[b, h] @ keys.T
                scores[:, 2:][~mask[b, 0]] = float("-inf")
                torch.testing.assert_close(got[b, :, h], scores.softmax(-1) @ values, atol=1e-5, rtol=1e-5)


def test_encoder_prefix_starts_from_activations_and_is_all_that_trains():
    model = language_model("roberta-large")
    plain, prefixed = model.fresh(), model.adapted("mezo_prefix", seed=4)
    trained = {n: p for n, p in prefixed.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 2 * 2 * 4 * 5 * 8 and all(
        "prefix_" in n for n in trained
    )
    ids = torch.randint(plain.config.vocab_size, (1, 5), generator=torch.Generator().manual_seed(4))
    first = plain.roberta.encoder.layer[0].attention.self
    with torch.no_grad():
        wanted = first.key(plain.roberta.embeddings(ids)).view(5, 4, 8).transpose(0, 1)
    torch.testing.assert_close(trained["roberta.encoder.layer.0.attention.self.prefix_keys"].detach(), wanted)
    again = dict(model.adapted("mezo_prefix", seed=4).named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in trained.items())
    with pytest.raises(ValueError, match="a prefix of 0 tokens"):
        prefix_encoder(plain, 0)


@pytest.mark.parametrize("name", ["opt-13b", "roberta-large"])
def test_padding_does_not_matter_behind_a_prefix(name):
    model = language_model(name)
    problem = problem_of(model, "rte" if name == "roberta-large" else "copa")
    tuned = model.adapted("mezo_prefix", seed=0)
    with torch.no_grad():
        joint = problem.loss(tuned, range(8))
        shares = [float(problem.loss(tuned, [i], range(8))) for i in range(8)]
    assert float(joint) == pytest.approx(np.mean(shares), rel=1e-4)
    with torch.no_grad():
        assert abs(float(problem.loss(model.untouched(), range(8))) - float(joint)) > 1e-3, (
            "the prefix is seen"
        )


def test_tuning_the_head_leaves_the_embeddings():
    tuned = language_model("opt-13b").fresh()
    embedding = tuned.get_input_embeddings().weight
    assert tuned.get_output_embeddings().weight is embedding
    head = untie_output_layer(tuned)
    assert tuned.get_output_embeddings().weight is head is not embedding and torch.equal(head, embedding)


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
    # A process keeps the losses of its share; their mean is the loss of the joint batch. (Adam's dropout differs by process.)
    shares = [record.arrays["opt-13b/copa/mezo/losses"] for record in (two, other)]
    np.testing.assert_allclose(np.mean(shares, axis=0), one.arrays["opt-13b/copa/mezo/losses"], rtol=1e-4)
    assert "2 process(es)" in two.notes["opt-13b/setting"]
