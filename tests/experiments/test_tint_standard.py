"""The `standard` scale from end to end on made corpora: text, training, perplexity, few-shot classification, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

from papercore.experiments import tint
from papercore.experiments.tint import standard, standard_model, standard_text
from papercore.experiments.tint.adapting import Way, document_losses, search
from papercore.experiments.tint.config import Config
from papercore.experiments.tint.standard_forms import FULL, REDUCED, Form
from papercore.lab.claims import judge, load_claims
from papercore.lab.data import Missing
from papercore.lab.record import Record
from papercore.tint import TinyGPT
from tests.experiments.tint_tiny_text import make_text, use_text

TINY = {
    "device": "cpu", "standard_vocabulary": 320, "standard_context": 160, "standard_layers": 2, "standard_width": 16, "standard_heads": 2,
    "standard_train_steps": 6, "standard_batch": 4, "standard_warmup": 1, "standard_seeds": (0, 1), "standard_fractions": (0.3, 0.7),
    "standard_rates": (1e-4, 1e-3, 1e-2), "standard_choose_documents": 3, "standard_documents": 6, "standard_eval_batch": 4,
    "standard_layer_steps": ("2x1", "1x2"), "standard_tasks": ("mr", "trec"), "standard_shots": 6, "standard_text_tokens": 3,
    "standard_held_out": 6, "standard_queries": 12, "standard_context_rates": (1e-3, 1e-2), "standard_label_rates": (1e-3, 1e-2),
    "standard_resamples": 100, "standard_checkpoint": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def environment(text, tmp_path, monkeypatch):
    use_text(monkeypatch, text, tmp_path / "runs")


def test_whole_run_from_files_to_record(tmp_path):
    config = Config.standard(**TINY)
    record = tint.run(config)
    m = record.metrics
    assert m["documents"] == 6 and m["models"] == 2 and m["seen_tokens"] == 6 * 4 * 160
    rows = record.tables["perplexity"]["rows"]
    assert [row[0] for row in rows] == [0.3, 0.7]
    for number, row in enumerate(rows):
        for method, column in (("vanilla", 1), ("tint", 2), ("dynamic", 3)):
            losses = record.arrays[f"losses_{method}"]
            assert losses.shape == (2, 2, 6)
            assert row[column] == pytest.approx(np.exp(losses[:, number].astype(float).mean()), rel=1e-5)
        assert row[4] == pytest.approx(row[1] - row[2], rel=1e-3)
        assert row[5] <= row[4] <= row[6]
    assert m["gain_least"] == min(row[4] for row in rows)
    assert m["gap_ratio_30"] == pytest.approx(abs(rows[0][12]) / rows[0][9], rel=1e-4)
    assert record.arrays["chosen_tint"].shape == (2, 2)
    assert [row[0] for row in record.tables["layer steps"]["rows"]] == ["2x1", "1x2"]
    assert len(record.tables["few shot cells"]["rows"]) == 8 and len(record.tables["few shot"]["rows"]) == 4
    assert {row[1]: row[2] for row in record.tables["few shot"]["rows"]} == pytest.approx(
        {"mr": 50.0, "trec": 100 / 6}
    )
    assert m["icl_gain"] == pytest.approx(m["icl_tint"] - m["icl_vanilla"], abs=1e-4)
    assert m["icl_gain_low"] <= m["icl_gain"] <= m["icl_gain_high"]
    again = Record.load(record.save(tmp_path / "standard.json"))
    assert again.metrics.keys() == record.metrics.keys()
    verdicts = {row.id: row.verdict for row in (judge(c, "standard", record) for c in load_claims("tint"))}
    assert {verdicts[f"tint/{c}"] for c in ("C6", "C7", "C8")} <= {"holds", "fails"}
    # The parts are on disk: a second run computes nothing and finds the same.
    assert tint.run(config).metrics == m


def test_a_stopped_training_goes_on_where_it_was(tmp_path):
    config = Config.standard(**TINY)
    form = config.form()
    stream = np.random.default_rng(0).integers(320, size=2000).astype(np.uint16)
    cpu = torch.device("cpu")
    whole = standard_model.trained_part(form, 3, stream, cpu, folder=tmp_path / "whole", every=2)
    real = standard_model.windows

    def stopping(stream, form, seed, step):
        if step == 5:
            raise KeyboardInterrupt
        return real(stream, form, seed, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard_model, "windows", stopping)
        with pytest.raises(KeyboardInterrupt):
            standard_model.trained_part(form, 3, stream, cpu, folder=tmp_path / "half", every=2)
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(standard_model, "windows", lambda *a: steps.append(a[-1]) or real(*a))
        again = standard_model.trained_part(form, 3, stream, cpu, folder=tmp_path / "half", every=2)
    assert steps == [4, 5]
    for name, values in whole.items():
        assert np.array_equal(values, again[name]), name


def test_corpora_are_read_without_tags_and_markup():
    brown = standard_text.corpus_documents("brown")
    assert len(brown) == 2 and brown[1] == '" He and/or she "' and "/nn" not in brown[0]
    plays = standard_text.corpus_documents("shakespeare")
    assert len(plays) == 1 and plays[0].startswith("HAMLET\n") and "<" not in plays[0]
    assert len(standard_text.corpus_documents("movie_reviews")) == 2
    assert standard_text.corpus_documents("webtext")[0].endswith("caf\xe9")


def test_wikitext_comes_from_text_or_from_the_hubs_columns(text, tmp_path, monkeypatch):
    lines = standard_text.wikitext_lines("validation")
    assert lines[0] == " = Title 0 = \n" and len(lines) == 120 and all(line.strip() for line in lines)
    monkeypatch.setattr(standard_text.data, "folder", lambda name: tmp_path)
    monkeypatch.setattr(
        standard_text.data,
        "rows",
        lambda name, split, config: [
            {"text": config.replace("wikitext-2-v1", "")},
            {"text": f" = {split} = \n"},
            {"text": " words \n"},
        ],
    )
    assert standard_text.wikitext_lines("test") == [" = test = \n", " words \n"]


def test_the_tokenizer_gives_back_every_text():
    tokenizer = standard_text.train_tokenizer(["the film was good", "the film was bad"] * 3, 280)
    for words in ("the film was good", "na\xefve \u2013 <unk>\n\t x", ""):
        assert tokenizer.decode(tokenizer.encode(words).ids) == words
    again = standard_text.tokenizer_from({"tokenizer": tokenizer.to_str()})
    assert again.encode("the film").ids == tokenizer.encode("the film").ids
    with pytest.raises(ValueError, match="standard_vocabulary = 200: .* expected at least 258"):
        standard_text.train_tokenizer(["x"], 200)


def test_documents_are_spread_over_the_text():
    stream = np.arange(1005, dtype=np.uint16)
    found = standard_text.documents(stream, 10, 4)
    assert found[:, 0].tolist() == [0, 250, 500, 750] and found.shape == (4, 10)
    assert standard_text.documents(stream, 10, 500).shape == (100, 10)
    with pytest.raises(ValueError, match="the text has 1005 tokens: expected at least one document of 2000"):
        standard_text.documents(stream, 2000, 4)


def test_document_losses_are_those_of_the_last_tokens():
    model = TinyGPT(n_embd=12, n_head=3, vocab_size=11, n_positions=10)
    ids = np.random.default_rng(0).integers(11, size=(5, 10))
    found = document_losses(model, ids, 0.35, Way("vanilla"), batch=2, device=torch.device("cpu"))
    with torch.no_grad():
        log_p = model(torch.from_numpy(ids)).logits.log_softmax(-1).numpy()
    wanted = [np.mean([-log_p[i, t - 1, ids[i, t]] for t in range(3, 10)]) for i in range(5)]
    assert np.allclose(found, wanted, atol=1e-6)
    for method in ("tint", "dynamic"):
        way = Way(method, 1e-2, steps=2, layers=1)
        other = document_losses(model, ids, 0.35, way, batch=2, device=torch.device("cpu"))
        assert other.shape == (5,) and not np.allclose(other, found)
    with pytest.raises(ValueError, match="train fraction 0.1 is 1 of 10 tokens"):
        document_losses(model, ids, 0.1, Way("vanilla"), batch=2, device=torch.device("cpu"))


@pytest.mark.parametrize("best", range(7))
def test_the_search_finds_the_least_of_a_valley(best):
    grid = [2.0**i for i in range(7)]
    asked = []

    def score(rate):
        asked.append(rate)
        return float("nan") if rate > 2 ** (best + 2) else abs(np.log2(rate) - best)

    found, tried = search(grid, score, first=3)
    assert found == best and len(asked) == len(set(asked)) == len(tried)
    assert {i for i in (best - 1, best + 1) if 0 <= i < 7} <= set(tried)


def test_missing_text_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(Missing, match=r"NLTK corpus 'brown' was not found(.|\n)*nltk.downloader brown"):
        tint.run(Config.standard(**TINY))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"standard_seeds": (3,)}, r"standard_seeds = \(3,\): expected at least two different seeds"),
        ({"standard_fractions": (0.001,)}, r"standard_fractions has 0.001: of 160 tokens"),
        ({"standard_rates": (1e-2, 1e-3)}, r"standard_rates = .*: expected rates that rise"),
        ({"standard_layer_steps": ("3x2",)}, r"standard_layer_steps has '3x2': expected LAYERSxSTEPS, such as 2x1, of at most 2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_any_work(changes, message, monkeypatch):
    monkeypatch.setattr(standard, "tokens_part", lambda *a: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        tint.run(Config.standard(**{**TINY, **changes}))


@pytest.mark.parametrize("form", [FULL, REDUCED], ids=["full", "reduced"])
def test_both_forms_fit_together(form):
    standard._check(form)
    assert form.width % form.heads == 0 == form.width % Way("tint").stack
    classes = {"mr": 2, "subj": 2, "cr": 2, "trec": 6}
    assert all(form.shots % classes[task] == 0 for task in form.tasks)
    assert len(form.seeds) >= 3 and list(form.context_rates) == sorted(form.context_rates)
    assert {int(a) * int(b) for a, b in (shape.split("x") for shape in form.layer_steps)} <= {form.layers}


def test_a_setting_overrides_its_number_and_the_device_chooses_the_form():
    config = Config.standard(device="cpu", standard_rates=(1e-3,), standard_shots=2)
    assert config.form() == dataclasses.replace(REDUCED, rates=(1e-3,), shots=2)
    assert Config.standard(device="cpu", standard_form="full").form() == FULL
    assert {f"standard_{f.name}" for f in dataclasses.fields(Form)} <= set(config.as_dict())
