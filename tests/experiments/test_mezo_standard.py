"""The standard scale on a tiny random encoder and a few made questions: parts against an independent truth, then the whole."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from papercore.experiments.mezo import standard
from papercore.experiments.mezo.config import StandardConfig
from papercore.experiments.mezo.encoder import ARMS, Classifier, Encoder, LowRank, build, calibration_error
from papercore.experiments.mezo.footprint import decoder_config, measure_footprint
from papercore.experiments.mezo.probe import logistic_regression, probe
from papercore.experiments.mezo.standard_fit import batch_of
from papercore.experiments.mezo.standard_report import best_check, compare, smooth, steps_to_common_level
from papercore.experiments.mezo.standard_task import Task
from papercore.lab import models
from papercore.lab.data import Missing
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from tests.tiny_bert import save_tiny_bert, write_questions

pytest.importorskip("transformers")

TEXTS = ["who is the king ?", "why", "where is the old city of the dog train sea name ?", "when is it ?"]
LABELS = ["a person", "a location or a number"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def bert(saved):
    return models.load("tiny", kind="BertModel", path=saved)


@pytest.fixture(scope="module")
def tokenizer(saved):
    return models.tokenizer("tiny", path=saved)


def _library_embeddings(bert, tokenizer, texts):
    padded = tokenizer(texts, padding=True, return_tensors="pt")
    states = bert(**{k: v for k, v in padded.items() if k != "token_type_ids"}).last_hidden_state
    mask = padded["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


def test_packed_forward_agrees_with_the_library(bert, tokenizer):
    encoder = Encoder(bert, tokenizer)
    with torch.no_grad():
        packed, library = encoder(encoder.ids(TEXTS)), _library_embeddings(bert, tokenizer, TEXTS)
    assert library.abs().mean() > 0.1
    assert torch.allclose(packed, library, atol=1e-5)


def test_packed_gradients_agree_with_the_library(bert, tokenizer):
    twin = copy.deepcopy(bert)
    encoder = Encoder(bert, tokenizer)
    encoder(encoder.ids(TEXTS)).square().sum().backward()
    _library_embeddings(twin, tokenizer, TEXTS).square().sum().backward()
    for (name, one), other in zip(bert.encoder.named_parameters(), twin.encoder.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=2e-4, rtol=1e-3), name


def test_first_word_is_the_library_s_hidden_state(bert, tokenizer):
    encoder = Encoder(bert, tokenizer)
    padded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = bert(
            padded["input_ids"], attention_mask=padded["attention_mask"], output_hidden_states=True
        ).hidden_states
        assert torch.allclose(encoder.first_word(encoder.ids(TEXTS), 1), states[1][:, 1], atol=1e-5)
    with pytest.raises(ValueError, match="layers 1 to 2, got 3"):
        encoder.first_word(encoder.ids(TEXTS), 3)


def test_prompt_head_is_a_scaled_cosine_with_live_descriptions(bert, tokenizer):
    classifier = Classifier(Encoder(bert, tokenizer), descriptions=LABELS, scale=7.0)
    ids = classifier.encoder.ids(TEXTS)
    with torch.no_grad():
        texts, classes = (_library_embeddings(bert, tokenizer, part) for part in (TEXTS, LABELS))
        expected = 7.0 * F.cosine_similarity(texts[:, None], classes[None], dim=-1)
        assert torch.allclose(classifier(ids), expected, atol=1e-4)
        assert torch.allclose(classifier.predict(ids, batch=3), expected, atol=1e-4)  # order is restored
        before = classifier(ids)
        bert.encoder.layer[1].output.dense.weight.add_(
            0.1 * torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
        )
        classes = _library_embeddings(bert, tokenizer, LABELS)
        moved = 7.0 * F.cosine_similarity(
            _library_embeddings(bert, tokenizer, TEXTS)[:, None], classes[None], dim=-1
        )
        assert torch.allclose(classifier(ids), moved, atol=1e-4) and not torch.allclose(
            before, moved, atol=1e-2
        )


def test_each_arm_tunes_what_it_says(saved, tokenizer):
    found = {}
    for arm in ARMS:
        bert = models.load("tiny", kind="BertModel", path=saved)
        inside = {id(p) for p in bert.encoder.parameters()}
        classifier, tuned = build(bert, tokenizer, arm, LABELS, rank=2)
        found[arm] = sum(p.numel() for p in tuned)
        trainable = {id(p) for p in classifier.parameters() if p.requires_grad}
        assert trainable == {id(p) for p in tuned}
        assert not bert.embeddings.word_embeddings.weight.requires_grad
        assert (arm in {"full", "norms_biases"}) == (trainable <= inside)
    d, ffn, layers = 16, 32, 2
    norms, biases = 4 * d, 5 * d + ffn  # a layer's LayerNorm tensors and its linear layers' biases
    assert found["norms_biases"] == layers * (norms + biases)
    assert found["full"] == layers * (4 * d * d + 2 * d * ffn + norms + biases)
    assert found["lora"] == layers * 2 * 2 * (2 * d)
    assert found["no_prompt"] == found["full"] + len(LABELS) * d


def test_lora_starts_as_the_base_and_agrees_with_peft(bert, tokenizer):
    classifier, tuned = build(copy.deepcopy(bert), tokenizer, "lora", LABELS, rank=2, alpha=4.0)
    plain, _ = build(copy.deepcopy(bert), tokenizer, "full", LABELS)
    ids = plain.encoder.ids(TEXTS)
    with torch.no_grad():
        assert torch.equal(classifier(ids), plain(ids))
        for matrix in tuned:
            matrix.normal_(generator=torch.Generator().manual_seed(matrix.shape[0]))
        ours = classifier(ids)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4.0, target_modules=["query", "value"], lora_dropout=0.0)
    adapted = peft.inject_adapter_in_model(config, copy.deepcopy(bert)).eval()
    theirs = [p for name, p in adapted.named_parameters() if "lora_" in name]
    with torch.no_grad():
        for matrix, value in zip(theirs, tuned, strict=True):
            matrix.copy_(value)
        # the packed forward pass calls whatever module stands in the library's place
        again = Classifier(Encoder(adapted, tokenizer), descriptions=LABELS)
        assert torch.allclose(again(ids), ours, atol=1e-4) and not torch.allclose(ours, plain(ids), atol=1e-2)


def test_boundaries_are_refused(bert, tokenizer):
    with pytest.raises(
        ValueError, match="unknown arm 'prefix': expected one of full, norms_biases, lora, no_prompt"
    ):
        build(bert, tokenizer, "prefix", LABELS)
    with pytest.raises(ValueError, match="descriptions .* or directions"):
        Classifier(Encoder(bert, tokenizer))
    with pytest.raises(ValueError, match="between 3 and the model's 64 positions, got 65"):
        Encoder(bert, tokenizer, max_tokens=65)
    with pytest.raises(TypeError, match="knows BERT encoders, got a model of type 'gpt2'"):
        Encoder(_Gpt2(), tokenizer)
    with pytest.raises(ValueError, match="rank 9 does not fit"):
        LowRank(torch.nn.Linear(8, 8), rank=9, alpha=1.0, generator=torch.Generator())


class _Gpt2(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.config = SimpleNamespace(model_type="gpt2")


def test_calibration_error_against_a_loop():
    generator = torch.Generator().manual_seed(3)
    probabilities = torch.randn(300, 4, generator=generator).mul(2).softmax(-1)
    labels = torch.randint(4, (300,), generator=generator)
    confidence, guess = (x.numpy() for x in probabilities.max(-1))
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence >= low) & (confidence < low + 0.1)
        if inside.any():
            gap = (guess[inside] == labels.numpy()[inside]).mean() - confidence[inside].mean()
            expected += inside.mean() * abs(gap)
    assert calibration_error(probabilities, labels, bins=10) == pytest.approx(expected, abs=1e-5)


def test_probe_agrees_with_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    features = torch.randn(60, 5, generator=generator) + torch.eye(3, 5)[labels]
    weights, intercepts = logistic_regression(features, labels, classes=3, c=0.5)
    theirs = linear.LogisticRegression(C=0.5, tol=1e-10, max_iter=5000).fit(
        features.double().numpy(), labels.numpy()
    )
    ours = (features.double() @ weights + intercepts).softmax(1).numpy()
    assert np.allclose(ours, theirs.predict_proba(features.double().numpy()), atol=1e-5)


def test_probe_penalty_is_chosen_on_held_out_examples():
    # one informative feature of small size beside noise that a weak penalty overfits
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(24) % 2
    noise = torch.randn(3, 24, 40, generator=generator)
    features = [torch.cat([(labels * 2.0 - 1)[:, None] * 0.3, part], dim=1) for part in noise]
    grid = (1e-4, 1.0, 1e4)
    logits, c = probe((features[0], labels), (features[1], labels), features[2], classes=2, grid=grid)
    scores = {}
    for one in grid:
        weights, intercepts = logistic_regression(features[0], labels, classes=2, c=one)
        guess = features[1].double() @ weights + intercepts
        scores[one] = (
            float((guess.argmax(1) == labels).double().mean()),
            -float(F.cross_entropy(guess, labels)),
        )
    assert c == max(scores, key=scores.get) and logits.shape == (24, 2)


def test_batches_cover_an_epoch_and_depend_on_seed_and_step_alone():
    train = np.array([3, 5, 8, 13, 21, 34])
    first = [batch_of(train, step, 2, 7) for step in range(3)]
    assert sorted(np.concatenate(first)) == train.tolist()
    assert np.array_equal(batch_of(train, 4, 2, 7), batch_of(train, 4, 2, 7))
    assert len(batch_of(train, 9, 32, 0)) == 6


def test_checkpoints_smoothing_levels_and_paired_differences():
    run = {"checks": [10, 20, 30], "held_accuracy": [0.5, 0.75, 0.75], "held_loss": [0.1, 0.9, 0.8]}
    assert best_check(run) == 2
    assert smooth(np.array([4.0, 2.0, 0.0, 2.0]), 2).tolist() == [4.0, 3.0, 1.0, 1.0]
    slow, fast = np.linspace(2, 1, 101)[None], np.linspace(2, 0, 101)[None]
    level, steps = steps_to_common_level({"slow": slow, "fast": fast})
    assert level == pytest.approx(slow[0, -20:].mean()) and steps["slow"] == 101
    assert 52 <= steps["fast"] <= 62
    first = np.array([[1, 1, 1, 0], [1, 1, 0, 1]], dtype=bool)
    gap, se, p = compare(first, np.zeros((1, 4), dtype=bool))
    assert gap == 0.75 and p == 0.0
    assert se == pytest.approx(np.std([1, 1, 0.5, 0.5], ddof=1) / 2)  # no spread over seeds: questions alone
    assert compare(first[:1], first[:1])[2] is None


@pytest.fixture
def config(saved, tmp_path, monkeypatch):
    write_questions(tmp_path / "nltk")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))
    monkeypatch.setenv("PAPERCORE_MODELS", str(saved.parent))
    monkeypatch.delenv("PAPERCORE_DATA", raising=False)
    monkeypatch.setenv("PAPERCORE_RUNS", str(tmp_path / "runs"))
    return StandardConfig(
        scale="standard",
        device="cpu",
        standard_model="tiny",
        standard_k=6,
        standard_seeds=(0, 1),
        standard_large_n=40,
        standard_large_held_out=12,
        standard_steps=6,
        standard_batch=8,
        standard_check_every=3,
        standard_tuning_seeds=(100,),
        standard_tuning_steps=12,
        standard_lr_full=(1e-6, 1e-5),
        standard_lr_norms_biases=(1e-5,),
        standard_lr_lora=(1e-5,),
        standard_lr_no_prompt=(1e-5,),
        standard_lr_adam=(3e-3, 1e-2),
        standard_adam_steps=40,
        standard_adam_large_steps=6,
        standard_probe_layer=1,
        standard_rank=2,
        standard_logit_scale=4.0,
    )


def test_end_to_end_resumes_and_repeats(config, tmp_path, monkeypatch):
    first = Record.start(config)
    standard.run_standard(config, first, Stages(tmp_path / "a"))
    first.finish().save(tmp_path / "first.json")
    found = Record.load(tmp_path / "first.json").metrics
    for arm in (*ARMS, "adam", "lp", "lp_word"):
        assert 0 <= found[f"standard_{arm}_mean"] <= 1
    assert found["standard_adam_mean"] > 0.5  # the first word gives the class away, and Adam finds it
    assert found["standard_full_minus_lp"] == pytest.approx(
        found["standard_full_mean"] - found["standard_lp_mean"]
    )
    assert found["standard_full_parameters"] == 4448
    assert found["standard_full_replay_gap"] == found["standard_lora_replay_gap"] == 0.0
    assert first.arrays["standard_k_full_loss"].shape == (2, 6)
    assert first.arrays["standard_k_full_steps"].tolist() == [3, 6]
    assert first.arrays["standard_large_full_loss"].shape == (1, 6)
    tuning = first.tables["standard_tuning"]["rows"]
    assert len(tuning) == 7 and sum(row[-1] for row in tuning) == 5  # one rate of each arm is chosen

    # a run that is killed in the middle of a stage loses nothing and ends at the same numbers
    calls = {"left": 3}
    real = Task.score

    def killed(self, *arguments):
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    stages = Stages(tmp_path / "b")
    for part in (tmp_path / "a").glob("tuning*"):
        stages.root.mkdir(exist_ok=True)
        (stages.root / part.name).write_bytes(part.read_bytes())
    monkeypatch.setattr(Task, "score", killed)
    second = Record.start(config)
    with pytest.raises(KeyboardInterrupt):
        calls["left"] = (
            4  # untouched, then the first evaluation of the first run (held out, test), then killed
        )
        standard.run_standard(config, second, stages)
    assert (stages.folder("k/full/seed0") / "state.pt").is_file()
    monkeypatch.setattr(Task, "score", real)
    second = Record.start(config)
    standard.run_standard(config, second, stages)
    timed = [name for name, moves in second.moves.items() if moves == "volatile"]
    assert second.metrics.keys() == first.metrics.keys()
    for name in second.metrics.keys() - set(timed):
        assert second.metrics[name] == pytest.approx(first.metrics[name], rel=0, abs=0, nan_ok=True), name
    assert np.array_equal(second.arrays["standard_k_full_loss"], first.arrays["standard_k_full_loss"])
    assert not (stages.folder("k/full/seed0")).exists()


def test_learning_rates_are_chosen_by_held_out_loss_and_divergence_loses():
    def run(accuracy, loss):
        return {"checks": [50, 100][: len(loss)], "held_accuracy": accuracy, "held_loss": loss}

    runs = {
        1e-3: [
            run([0.6, 0.7], [0.1, 0.9]),
            run([0.6, 0.7], [0.2, 0.7]),
        ],  # the checkpoint that is kept counts
        1e-2: [run([0.7, 0.6], [0.6, 0.1]), run([0.6, 0.7], [2.0, 0.9])],
        1e-1: [run([0.0], [float("inf")]), run([0.9], [0.1])],
    }
    assert standard.choose_lr(runs) == 1e-2


@pytest.mark.parametrize(
    ("best", "grid", "tried"),
    [
        (3.0, (1, 2, 3, 4, 5), [2, 3, 4]),
        (5.0, (1, 2, 3, 4, 5), [2, 3, 4, 5]),  # the grid ends there
        (1.6, (1, 2, 3, 4, 5), [1, 2, 3, 4]),
        (9.0, (7, 8), [7, 8]),
        (9.0, (7,), [7]),
    ],
)
def test_the_search_stops_beside_the_best_rate(best, grid, tried, config, tmp_path, monkeypatch):
    def tune(task, arm, lr, seed):
        return {"checks": [1], "held_accuracy": [0.5], "held_loss": [abs(lr - best)]}

    monkeypatch.setattr(standard, "_tune", tune)
    task = SimpleNamespace(
        config=config.replace(standard_lr_full=tuple(map(float, grid)), standard_tuning_seeds=(100, 101))
    )
    found = standard._search(task, "full", Stages(tmp_path / "search"))
    assert list(found) == tried and all(len(runs) == 2 for runs in found.values())


def test_settings_that_break_the_rules_are_refused(config, tmp_path):
    record, stages = Record.start(config), Stages(tmp_path / "none")
    with pytest.raises(ValueError, match=r"seeds \[1\] are both reported and used for tuning"):
        standard.run_standard(config.replace(standard_tuning_seeds=(1,)), record, stages)
    with pytest.raises(ValueError, match=r"standard_large_arms \['full'\] are not in standard_arms"):
        standard.run_standard(
            config.replace(standard_arms=("lora",), standard_large_arms=("full",)), record, stages
        )
    record.finish()


def test_missing_ingredients_are_named_before_any_work(config, tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "absent"))
    monkeypatch.setenv("HOME", str(tmp_path))
    record = Record.start(config)
    with pytest.raises(Missing, match=r"the NLTK corpus 'qc' was not found"):
        standard.run_standard(config, record, Stages(tmp_path / "none"))
    record.finish()
    assert not (tmp_path / "none").exists()


def test_footprint_on_a_tiny_decoder():
    config = decoder_config("opt-1.3b")
    config.update(
        {
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 64,
            "num_attention_heads": 2,
            "vocab_size": 99,
        }
    )
    state = torch.random.get_rng_state()
    rows = measure_footprint(config, torch.device("cpu"), shapes=((1, 12), (2, 5)), repeats=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [(row["method"], row["batch"]) for row in rows] == [
        (m, b) for m in ("inference", "mezo", "adam") for b in (1, 2)
    ]
    parameters = 99 * 32 + 2050 * 32 + 2 * (4 * 32 * 33 + 32 * 64 * 2 + 64 + 32 + 4 * 32) + 2 * 32
    assert {row["parameters"] for row in rows} == {parameters}
    assert all(row["bytes"] is None and row["seconds"] > 0 for row in rows)
    by_method = {row["method"]: row["modelled"] for row in rows}
    assert by_method["adam"] > 4 * by_method["mezo"] >= 4 * by_method["inference"] > 0
    with pytest.raises(ValueError, match="unknown decoder 'opt-2b': expected one of opt-1.3b"):
        decoder_config("opt-2b")
    with pytest.raises(ValueError, match="unknown method 'lora'"):
        measure_footprint(config, torch.device("cpu"), methods=("lora",))
