"""The `paper` scale from end to end on random-weight stand-ins saved in the hub's formats: record, resumption, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from papercore.experiments import tint
from papercore.experiments.tint import paper, paper_tasks
from papercore.experiments.tint.config import Config
from papercore.experiments.tint.paper_settings import PaperSettings
from papercore.lab import models
from papercore.lab.claims import judge, load_claims
from papercore.lab.data import Missing
from papercore.lab.record import Record
from tests.experiments.mezo_tiny_hub import use_hub, write_parquet
from tests.experiments.tint_tiny_hub import make_hub, save_model

TINY = {
    "device": "cpu", "paper_block": 48, "paper_choose_documents": 2, "paper_documents": 3, "paper_fractions": (0.3, 0.7),
    "paper_language_layers": "2x1", "paper_tasks": ("sst2", "agnews"), "paper_seeds": (1, 2), "paper_shots": 4, "paper_held_out": 4,
    "paper_queries": 4, "paper_layer_steps": ("2x1", "1x2"), "paper_context_rates": (1e-4,), "paper_label_rates": (1e-3,),
    "paper_dynamic_layers": (2,), "paper_dynamic_rates": (1e-4,), "paper_resamples": 100, "paper_rates": (1e-5, 1e-4),
}  # fmt: skip


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    return make_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(autouse=True)
def environment(hub, tmp_path, monkeypatch):
    use_hub(monkeypatch, hub, tmp_path / "runs")


def test_whole_matrix_from_files_to_record(tmp_path, monkeypatch):
    config = Config.paper(**TINY)
    record = tint.run(config)
    m = record.metrics
    for label in ("gpt2", "opt-125m"):
        assert m[f"{label}/documents"] == 3 and record.arrays[f"{label}/losses_tint"].shape == (1, 2, 3)
        assert record.arrays[f"{label}/sweep_dynamic"].shape == (2, 2)
    assert m["gain_least"] == min(m["gpt2/gain_least"], m["opt-125m/gain_least"])
    assert m["gap_ratio_worst"] == max(m["gpt2/gap_ratio_worst"], m["opt-125m/gap_ratio_worst"])
    rows = {tuple(row[:3]): row for row in record.tables["language"]["rows"]}
    assert (
        len(rows) == 12
        and rows["gpt2", "tint", 0.3][4] == 25.1
        and rows["opt-125m", "vanilla", 0.7][4] == 28.0
    )
    assert rows["gpt2", "vanilla", 0.7][3] == pytest.approx(
        np.exp(record.arrays["gpt2/losses_vanilla"][0, 1].astype(float).mean()), rel=1e-5
    )
    table = {tuple(row[:4]): row for row in record.tables["classification"]["rows"]}
    assert table["opt-125m", "few-shot", "TinT", "sst2"][5] == 73.7
    assert table["opt-125m", "zero-shot", "vanilla", "agnews"][5] == 66.0
    assert table["opt-125m", "few-shot", "dynamic evaluation", "agnews"][5] == 66.7
    assert table["opt-1.3b", "few-shot", "vanilla", "sst2"][5] == 89.8
    assert m["icl_gain"] == m["opt-125m/icl_gain"] and m["opt-125m/icl_seeds"] == 2
    assert m["opt-125m/icl_best"] >= m["opt-125m/icl_tint"]
    verdicts = {row.id: row.verdict for row in (judge(c, "paper", record) for c in load_claims("tint"))}
    assert {verdicts[f"tint/{c}"] for c in ("C6", "C7", "C8")} <= {"holds", "fails"}
    again = Record.load(record.save(tmp_path / "paper.json"))
    assert again.metrics.keys() == m.keys()
    # The parts are on disk: a second run loads no model.
    monkeypatch.setattr(models, "load", lambda *a, **k: pytest.fail("computed twice"))
    assert tint.run(config).metrics == pytest.approx(m, nan_ok=True)


def test_vanilla_perplexity_is_the_librarys_own_loss():
    part = paper._perplexities(Config.paper(**TINY), "facebook/opt-125m", (2, 1), _NoStages())
    model, tokenizer = paper._load("facebook/opt-125m", Config.paper(**TINY))
    blocks = torch.from_numpy(paper.text_blocks("wikitext-103", "test", tokenizer, 48, 3))
    for number, fraction in enumerate((0.3, 0.7)):
        labels = blocks.clone()
        labels[:, : int(fraction * 48)] = -100
        with torch.no_grad():
            own = [
                float(model(ids[None], labels=label[None]).loss)
                for ids, label in zip(blocks, labels, strict=True)
            ]
        assert np.allclose(part["vanilla"][number], own, atol=1e-5)


class _NoStages:
    def get(self, name, part):
        return part()


def test_blocks_are_the_lines_behind_one_another():
    _, tokenizer = paper._load("gpt2", Config.paper(**TINY))
    blocks = paper.text_blocks("wikitext-103", "validation", tokenizer, 16, 0)
    whole = (
        tokenizer(" = Title = \n")["input_ids"] + tokenizer(" the the film was the and 0 . \n")["input_ids"]
    )
    assert blocks.reshape(-1)[: len(whole)].tolist() == whole
    with pytest.raises(
        ValueError, match=r"wikitext-103, split 'test': \d+ tokens are less than one document of 99999"
    ):
        paper.text_blocks("wikitext-103", "test", tokenizer, 99_999, 0)


def test_grids_are_the_papers():
    plain = PaperSettings()
    shapes = [paper.layers_and_steps(text) for text in plain.paper_layer_steps]
    assert shapes == [(12, 1), (6, 2), (3, 4)] and {a * b for a, b in shapes} == {12}
    assert plain.paper_context_rates == (1e-7, 1e-6, 1e-5) and plain.paper_label_rates == (1e-5, 1e-4, 1e-3)
    assert plain.paper_seeds == (1, 2, 3) and plain.paper_shots == 32 and plain.paper_queries == 200
    assert plain.paper_fractions == (0.3, 0.5, 0.7, 0.9) and plain.paper_block == 1024
    assert len(paper_tasks.TASKS) == 7 == len(plain.paper_tasks)
    with pytest.raises(ValueError, match="layers x steps '12': expected two numbers, such as 12x1"):
        paper.layers_and_steps("12")


def test_what_cannot_run_is_refused_with_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="paper_choose_split and paper_split are both 'test'"):
        tint.run(Config.paper(**TINY, paper_choose_split="test", paper_parts=("language",)))
    with pytest.raises(ValueError, match=r"n_layers = 12: the auxiliary has 2 layers, expected 1 to 2"):
        tint.run(Config.paper(**{**TINY, "paper_language_layers": "12x1"}, paper_parts=("language",)))
    with pytest.raises(
        ValueError, match="31 demonstrations leave 8 tokens for each of the model's 256 positions"
    ):
        paper_tasks.longest_text(paper_tasks.SENTIMENT, range(9), 31, 256)
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    with pytest.raises(
        Missing,
        match=r"data set 'mpqa' was not found(.|\n)*put \{train,test\}.jsonl with the columns text and label",
    ):
        paper_tasks.examples(paper_tasks.TASKS["mpqa"], "train")
    write_parquet(tmp_path / "cr", train=[{"sentence": "x", "label": 0}])
    with pytest.raises(
        ValueError, match=r"cr, split 'train': the columns are \['label', 'sentence'\]; needed: text, label"
    ):
        paper_tasks.examples(paper_tasks.TASKS["cr"], "train")
    write_parquet(tmp_path / "mr", train=[{"text": "x", "label": 2}])
    with pytest.raises(
        ValueError, match="mr, split 'train': labels from 2 to 2, but there are 2 label words"
    ):
        paper_tasks.examples(paper_tasks.TASKS["mr"], "train")


def test_a_post_norm_model_is_refused(tmp_path, monkeypatch):
    from transformers import OPTConfig, OPTForCausalLM

    place = save_model(tmp_path / "opt-350m", "opt")
    config = OPTConfig.from_pretrained(place)
    config.do_layer_norm_before = False
    OPTForCausalLM(config).save_pretrained(place)
    with pytest.raises(
        NotImplementedError, match="TinT simulates pre-LN blocks; this OPT normalises after each branch"
    ):
        tint.run(Config.paper(**TINY, paper_models=(str(place),), paper_parts=("language",)))


def test_large_sets_are_not_read_whole_from_the_hub(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setenv("PAPERCORE_DATA", str(tmp_path))
    monkeypatch.setattr(
        paper_tasks.data,
        "rows",
        lambda name, split, config: asked.append((name, split)) or [{"content": " fine ", "label": 1}],
    )
    texts, labels = paper_tasks.examples(paper_tasks.TASKS["amazon"], "train")
    assert (
        asked == [("fancyzhx/amazon_polarity", "train[:50000]")]
        and texts == ["fine"]
        and labels.tolist() == [1]
    )
