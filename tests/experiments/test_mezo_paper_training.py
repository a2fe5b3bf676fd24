"""What happens inside a cell of the paper's table: training, interruption, the choice of the best check, adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from papercore.experiments import mezo
from papercore.experiments.mezo import paper_training
from papercore.experiments.mezo.attention_prefix import attention_with_prefix, prefix_encoder
from papercore.experiments.mezo.config import Config
from papercore.experiments.mezo.paper_models import LanguageModel, untie_output_layer
from papercore.experiments.mezo.paper_settings import (
    Trial,
)
from papercore.experiments.mezo.problems import CausalProblem, MaskedProblem
from papercore.experiments.mezo.processes import Processes
from papercore.experiments.mezo.prompts import CAUSAL, MASKED
from papercore.experiments.mezo.tasks import TASKS, Sample
from tests.experiments.mezo_tiny_hub import TINY, make_hub, rows_of, use_hub

pytest.importorskip("transformers")
pytest.importorskip("peft")
# peft asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def environment(hub, tmp_path, monkeypatch):
    use_hub(monkeypatch, hub, tmp_path / "runs")


def language_model(name: str, **settings) -> LanguageModel:
    return LanguageModel.find(name, Config.paper(**{**TINY, **settings}), ALONE)


def problem_of(model: LanguageModel, task: str, train: int = 8):
    rows = rows_of(task, train)
    sample = Sample(rows, rows_of(task, 6, start=50), rows_of(task, 6, start=90), rows)
    if model.family == "masked":
        return MaskedProblem(model.tokenizer(), TASKS[task], MASKED[task], sample)
    return CausalProblem(model.tokenizer(), TASKS[task], CAUSAL[task], sample, max_tokens=200)


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
        ("roberta-large", "mezo_prefix", 5.0, 1e-1),
    ],
)
def test_mezo_lowers_the_training_loss(tmp_path, name, method, lr, eps):
    model = language_model(name)
    problem = problem_of(model, "sst2")
    result = paper_training.tune_mezo(
        model, problem, method, Trial(lr, 8, 60, 60, eps), seed=0, folder=tmp_path
    )
    assert result["losses"][-5:].mean() < result["losses"][:5].mean() - 0.012
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
