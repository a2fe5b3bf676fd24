"""The three scales from end to end on tiny settings: records, resumption, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from papercore.experiments import parsing
from papercore.experiments.parsing import masked_lm, quick_parts, study, treebank, tuning
from papercore.experiments.parsing.config import Config
from papercore.experiments.parsing.corpus import draw
from papercore.lab.claims import judge, load_claims
from papercore.lab.data import Missing
from papercore.lab.record import Record
from papercore.lab.stages import Stages
from papercore.parsing import english

QUICK = {
    "sentences": 300, "steps": 16, "batch": 8, "warmup": 2, "tests": 40, "width": 8, "layers": 2, "heads": 2, "probe_seeds": 2, "probe_train": 30,
    "short_batch": 8, "short_length": 6,
    "probe_choose": 10, "probe_test": 12, "probe_spans": 60, "probe_steps": 3, "truncation_tests": 12, "kept_in": (20,), "kept_pre": (42,),
    "ranks": (20, 15), "longest_equal": 4, "max_length": 12,
}  # fmt: skip
STUDY = {
    "width": 8, "sentences": 200, "steps": 6, "batch": 8, "warmup": 1, "save_every": 2, "masked": 20, "probe_seeds": 2, "probe_train": 12,
    "probe_choose": 6, "probe_test": 6, "probe_spans": 40, "probe_steps": 3,
}  # fmt: skip
WORDS = {"D": "the a", "N": "dog cat bird tree", "V": "sees likes finds", "P": "near with"}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERCORE_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def bank(tmp_path):
    """A made treebank in the format of the real one: traces, function tags, n-ary branching."""
    g = torch.Generator().manual_seed(0)

    def pick(tag):
        if tag == "N" and float(torch.rand(1, generator=g)) < 0.2:
            return (
                f"(N wug{int(torch.randint(10**6, (1,), generator=g))})"  # most words of the end are unknown
            )
        words = WORDS[tag].split()
        return f"({tag} {words[int(torch.randint(len(words), (1,), generator=g))]})"

    def phrase():
        if float(torch.rand(1, generator=g)) < 0.3:
            return f"(NP (NP {pick('D')} {pick('N')}) (PP-LOC {pick('P')} {phrase()}))"
        return f"(NP-SBJ {pick('D')} {pick('N')})"

    lines = [f"( (S {phrase()} (VP {pick('V')} {phrase()} (NP (-NONE- *))) (. .)) )" for _ in range(80)]
    folder = tmp_path / "bank"
    folder.mkdir()
    (folder / "wsj_0001.mrg").write_text("\n".join(lines))
    return str(folder)


def test_quick_fills_the_record_that_its_claims_read(tmp_path):
    config = Config.quick(device="cpu", **QUICK)
    threads = torch.get_num_threads()
    record = parsing.run(config)
    assert torch.get_num_threads() == threads
    rows = [judge(claim, "quick", record) for claim in load_claims("parsing")]
    by_id = {row.id: row for row in rows}
    assert not [row.id for row in rows if row.verdict in ("not run", "stale")]
    assert {by_id[f"parsing/{c}"].verdict for c in ("C1", "C2", "C4")} == {"holds"}
    assert {by_id[f"parsing/{c}"].verdict for c in ("C7", "C9")} == {"not tested at this scale"}
    assert all("?" not in row.shown for row in rows)
    again = Record.load(record.save(tmp_path / "quick.json"))
    assert again.metrics.keys() == record.metrics.keys()
    # The parts are on disk: a second run computes nothing and finds the same.
    assert parsing.run(config).metrics == record.metrics


def test_training_begins_on_short_sentences_and_goes_on_where_it_was(monkeypatch):
    config = Config.quick(
        device="cpu", **{**QUICK, "short_share": 0.5, "short_mask_rate": 0.6, "mask_rate": 0.1}
    )
    texts = (quick_parts.short_sentences(config), quick_parts.sentences_of(config, 50, 1))
    assert int(texts[0].lengths.max()) == 6 and int(texts[1].lengths.max()) > 6
    calls = []

    def train(model, text, **options):
        calls.append((text, *(options[k] for k in ("batch", "mask_rate", "done", "until", "steps"))))
        return [0.0] * (options["until"] - options["done"]), options["optimizer"]

    monkeypatch.setattr(quick_parts, "train_model", train)
    for done, until in ((0, 0), (0, 4), (4, 12), (12, 16)):
        losses, _ = quick_parts.train_until(config, None, texts, done, until, None)
        assert len(losses) == until - done
    wanted = [(0, 8, 0.6, 0, 4, 16), (0, 8, 0.6, 4, 8, 16), (1, 8, 0.1, 8, 12, 16), (1, 8, 0.1, 12, 16, 16)]
    assert [call[1:] for call in calls] == [one[1:] for one in wanted]
    assert all(call[0] is texts[one[0]] for call, one in zip(calls, wanted, strict=True))


def test_parts_are_the_same_from_one_process_and_from_two(tmp_path):
    config = Config.quick(device="cpu", **QUICK)
    parts = (("equality", 0), ("merged heads", 0))
    found = []
    for processes in (1, 2):
        stages = Stages(tmp_path / str(processes))
        quick_parts.together(parts, config, stages, processes)
        assert all(stages.done(name) for name, _ in parts)
        found.append([quick_parts.made(part, config, stages) for part in parts])
    assert found[0] == found[1]


def test_settings_are_those_of_the_best_trial_on_another_seed():
    tuned, config = Record.load(tuning.TUNING), Config.quick()
    assert tuned.config["seed"] == tuning.SEED != config.seed
    rows = tuned.tables["sweep"]["rows"]
    assert [tuple(row[:5]) for row in rows] == list(tuning.TRIALS)
    best = min(rows, key=lambda row: row[-1])
    assert tuple(best[:5]) == tuple(getattr(config, name) for name in tuning.NAMES)
    same = {f: v for f, v in config.as_dict().items() if f not in ("seed", "device", *tuning.NAMES)}
    assert same == {f: tuned.config[f] for f in same}


def test_standard_on_a_made_treebank_and_tiny_models(bank):
    settings = {f"standard_{k}": v for k, v in STUDY.items()} | {
        "standard_treebank": bank, "standard_held_out": 20, "standard_tests": 15, "standard_truncated": 8, "standard_kept": ("20/45", "2/3"),
        "standard_ranks": (20, 2, 1),
        "standard_models": ("A2L2", "A1L1"), "standard_train_on": "any", "standard_max_length": 12,
    }  # fmt: skip
    record = parsing.run(Config.standard(device="cpu", **settings))
    m = record.metrics
    assert m["treebank_counted"] == 60 and m["treebank_tests"] == 15
    assert m["treebank_corpus_f1"] > m["treebank_right_f1"]
    table = record.tables["treebank"]["rows"]
    assert len(table) == 2 and table[0][:2] == [m["treebank_in_terminals"], m["treebank_pre_terminals"]]
    assert table[1][5] <= table[0][5] and m["treebank_drop"] == 0  # fewer than 20 and 45 symbols in all
    merged = record.tables["treebank_merged"]["rows"]
    assert [row[0] for row in merged] == [2, 1] and merged[1][4] <= merged[0][4] <= table[0][5] + 0.02
    for name in ("A2L2", "A1L1"):
        assert (
            m[f"{name}_gap"] > 0 and m[f"{name}_shifted_gap"] > 0 and 0 < m[f"{name}_parse_linear_best"] < 1
        )
    assert m["parse_linear_best"] == m["A2L2_parse_linear_best"] and -1 < m["ood_drop_linear"] < 1
    assert record.arrays["A1L1_probe_parse_linear"].shape == (2, 2)


def test_held_out_words_that_were_not_counted_become_their_class(bank):
    read = treebank.Treebank.read(bank, 20)
    leaves = [word for tree in read.held_out for word in tree.leaves()]
    assert "UNK-num" in leaves and set(leaves) <= set(read.grammar.vocabulary)
    sentences = read.sentences(read.held_out)
    assert [sentences.words(row, read.grammar.vocabulary) for row in range(20)] == [
        tree.leaves() for tree in read.held_out
    ]


def test_standard_without_a_gpu_leaves_the_models_out_and_says_so(bank):
    settings = {
        "standard_treebank": bank,
        "standard_held_out": 20,
        "standard_truncated": 4,
        "standard_kept": (),
    }
    record = parsing.run(Config.standard(device="cpu", **settings))
    assert "want a GPU" in record.notes["models"] and "A4L6_gap" not in record.metrics


def test_paper_on_a_made_treebank(bank):
    settings = {f"paper_{k}": v for k, v in STUDY.items()} | {
        "paper_treebank": bank, "paper_held_out": 30, "paper_longest": 14, "paper_truncated": 5, "paper_kept": ("3/3",), "paper_models": ("A2L2",),
    }  # fmt: skip
    record = parsing.run(Config.paper(device="cpu", **settings))
    assert record.metrics["A2L2_gap"] > 0 and 0 < record.metrics["elsewhere_right_f1"] < 1
    assert {"home_linear", "elsewhere_linear", "ood_linear", "ood_drop_mlp"} <= record.metrics.keys()


def test_what_cannot_be_run_is_refused(bank, tmp_path, monkeypatch):
    for name in ("A0L3", "L3", "A2L2x"):
        with pytest.raises(ValueError, match="expected A<heads>L<layers>, such as A4L6"):
            study.heads_and_layers(name)
    with pytest.raises(ValueError, match="80 trees and 80 held out"):
        treebank.Treebank.read(bank, 80)
    with pytest.raises(ValueError, match="kept symbols '20-45': expected in-terminals/pre-terminals"):
        treebank.kept_pairs(["20-45"], english())
    with pytest.raises(ValueError, match="width = 10 is no multiple of heads = 4"):
        masked_lm.make_model(5, width=10, layers=1, heads=4, max_length=5, seed=0)
    for name in ("PAPERCORE_DATA", "NLTK_DATA"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))
    monkeypatch.setattr("papercore.lab.data._nltk_roots", lambda: [tmp_path / "nothing"])
    with pytest.raises(Missing, match="nltk.downloader treebank"):
        treebank.Treebank.read("", 5)


def test_the_model_sees_the_mask_and_no_padding():
    grammar = english()
    model = masked_lm.make_model(286, width=16, layers=2, heads=2, max_length=12, seed=0)
    state = torch.random.get_rng_state()
    other = masked_lm.make_model(286, width=16, layers=2, heads=2, max_length=12, seed=0)
    assert torch.equal(state, torch.random.get_rng_state())
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    drawn = draw(grammar, 12, 4, 12, 0)
    position = drawn.lengths // 2
    rows = torch.arange(12)
    q = masked_lm.log_probabilities(model, drawn.ids, drawn.lengths, position)
    torch.testing.assert_close(q.exp().sum(1), torch.ones(12))
    changed = drawn.ids.clone()
    changed[rows, position] = 5  # the masked word is not seen
    changed[torch.arange(12) >= drawn.lengths.unsqueeze(1)] = 9  # nor what is behind the end
    torch.testing.assert_close(
        q, masked_lm.log_probabilities(model, changed, drawn.lengths, position, batch=5)
    )
    changed[rows, position - 1] = 17
    assert not torch.allclose(q, masked_lm.log_probabilities(model, changed, drawn.lengths, position))
    states = masked_lm.hidden_states(model, drawn, batch=5)
    assert states.shape == (3, 12, 12, 16)


def test_training_lowers_the_loss_and_goes_on_where_it_stopped():
    drawn = draw(english(), 400, 4, 10, 0)
    model = masked_lm.make_model(286, width=16, layers=1, heads=2, max_length=10, seed=0)
    options = {"steps": 60, "batch": 16, "lr": 1e-2, "warmup": 5, "mask_rate": 0.15, "seed": 0}
    first, optimizer = masked_lm.train_model(model, drawn, until=30, **options)
    second, _ = masked_lm.train_model(model, drawn, done=30, optimizer=optimizer, **options)
    assert len(first) == len(second) == 30
    assert sum(second[-10:]) < sum(first[:10]) - 2
