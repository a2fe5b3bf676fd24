"""Prompts, masks and scores of classification against models run on each text by itself, and the report's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from papercore.experiments.tint.adapting import Way
from papercore.experiments.tint.few_shot import balanced, better, judged, scored
from papercore.experiments.tint.few_shot_cells import classified
from papercore.experiments.tint.few_shot_report import chosen, gain_of, report_few_shot
from papercore.experiments.tint.prompting import Prompter, Template, contexts
from papercore.lab.record import Record
from papercore.tint import TinyGPT

CPU = torch.device("cpu")
SHOWN = [("abc", 0), ("bd", 1), ("dcba", 0)]
QUERIES = ["dd", "abcde", "c"]


def encode(text: str) -> list[int]:
    return [ord(letter) % 64 for letter in text]


@pytest.fixture(scope="module")
def model():
    g = torch.Generator().manual_seed(3)
    return TinyGPT(vocab_size=64, n_positions=80, n_embd=16, n_head=2, init_std=0.3, generator=g).eval()


@pytest.fixture(params=[(), (7,)], ids=["no begin", "begin"])
def prompter(request):
    return Prompter(
        Template("T ", "->", (" x", "yz")), encode, text_tokens=4, longest=80, begin=request.param
    )


def log_p(model, ids, prompter):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    return logits.log_softmax(-1)[prompter.label_ids].numpy()


def demonstrations(prompter):
    return [[*prompter.begin, *prompter.demonstration(*one)[0]] for one in SHOWN]


@pytest.mark.parametrize("layout", ["single", "multi"])
@pytest.mark.parametrize("loss", ["context", "label"])
def test_scores_before_an_update_are_the_models_own(model, prompter, layout, loss):
    found = scored(model, prompter, SHOWN, QUERIES, layout, loss, Way("tint", 1e-3), batch=2, device=CPU)
    front: list[int] = list(prompter.begin)
    if layout == "multi":
        front += [t for one in SHOWN for t in prompter.demonstration(*one)[0]]
    for text, row in zip([None, *QUERIES], [found.free_before, *found.before], strict=True):
        assert np.allclose(row, log_p(model, front + prompter.query(text), prompter), atol=1e-5)
    assert np.allclose(
        found.of("after", "calibrated"), found.after - found.free_after
    ) and not np.allclose(found.before, found.after, atol=1e-4)  # fmt: skip


def stepped(model, sequences, rate, names, trained=None):
    """One SGD step by autograd, each sequence run by itself, attention probabilities constant."""
    copy = TinyGPT(model.config)
    copy.load_state_dict(model.state_dict())
    total = torch.zeros(())
    for number, ids in enumerate(sequences):
        tokens = torch.tensor([ids])
        losses = F.cross_entropy(
            copy(tokens, detach_scores=True).logits[0, :-1], tokens[0, 1:], reduction="none"
        )
        total = total + (losses if trained is None else losses[trained[number]]).sum()
    named = {k: v for k, v in copy.named_parameters() if k in names}
    grads = torch.autograd.grad(total, list(named.values()))
    with torch.no_grad():
        for parameter, gradient in zip(named.values(), grads, strict=True):
            parameter -= rate * gradient
    return copy


@pytest.mark.parametrize("layout", ["single", "multi"])
@pytest.mark.parametrize("loss", ["context", "label"])
def test_scores_after_an_update_are_those_of_sgd_on_the_texts(model, prompter, layout, loss):
    rate = 2e-3
    way = Way("tint", rate, fd_eps=1e-3)
    found = scored(model, prompter, SHOWN, QUERIES, layout, loss, way, batch=2, device=CPU)
    one = contexts(prompter, SHOWN, QUERIES[:1], layout, loss)
    names = set(way.simulator(model)(one.input_ids, one.train_mask, labels=one.labels).updates)
    n_begin = len(prompter.begin)
    for text, row in zip(QUERIES, found.after, strict=True):
        query = [*prompter.begin, *prompter.query(text)]
        if layout == "single":
            sequences = demonstrations(prompter)
            spans = [[n_begin + i - 1 for i in range(*prompter.demonstration(*d)[1:])] for d in SHOWN]
        else:
            sequences, spans = [list(prompter.begin)], [[]]
            for d in SHOWN:
                tokens, start, stop = prompter.demonstration(*d)
                spans[0] += [len(sequences[0]) + i - 1 for i in range(start, stop)]
                sequences[0] += tokens
        if loss == "context":
            sequences = [*sequences, query] if layout == "single" else [sequences[0] + prompter.query(text)]
            spans = None
        after = stepped(model, sequences, rate, names, spans)
        ids = (
            query if layout == "single" else sequences[0] + (prompter.query(text) if loss == "label" else [])
        )
        assert np.allclose(row, log_p(after, ids, prompter), atol=3e-3)
        assert not np.allclose(row, log_p(model, ids, prompter), atol=3e-3)


def test_one_update_serves_every_query_of_a_loss_on_labels(model, prompter):
    for layout in ("single", "multi"):
        way = Way("tint", 2e-3, steps=2, layers=1)
        shared = scored(model, prompter, SHOWN, QUERIES, layout, "label", way, batch=2, device=CPU)
        some = contexts(prompter, SHOWN, [None, *QUERIES], layout, "label")
        output = way.run(
            model, some.input_ids, some.train_mask, labels=some.labels, gradient_mask=some.gradient_mask,
            attention_mask=some.attention_mask, position_ids=some.position_ids,
        )  # fmt: skip
        logits = output.logits[torch.arange(4), some.last].double().log_softmax(-1)[:, prompter.label_ids]
        assert np.allclose(np.vstack([shared.free_after, shared.after]), logits.numpy(), atol=1e-5)


def test_dynamic_evaluation_takes_the_same_contexts(model, prompter):
    found = scored(
        model, prompter, SHOWN, QUERIES, "multi", "context", Way("dynamic", 1e-3), batch=2, device=CPU
    )
    tint = scored(model, prompter, SHOWN, QUERIES, "multi", "context", Way("tint", 1e-3), batch=2, device=CPU)
    assert np.allclose(found.before, tint.before, atol=1e-5)
    assert not np.allclose(found.after, found.before, atol=1e-3)


def test_texts_are_cut_and_prompts_that_do_not_fit_are_refused():
    template = Template("T ", "->", (" x", "yz"))
    prompter = Prompter(template, encode, text_tokens=2, longest=30)
    assert prompter.query("abcdef") == encode("T ab->") and prompter.query(None) == encode("->")
    with pytest.raises(
        ValueError, match="3 demonstrations and a query have 36 tokens, the model 30 positions"
    ):
        contexts(prompter, SHOWN, ["a"], "multi", "context")
    with pytest.raises(
        ValueError, match=r"loss on label words needs demonstrations: there is none \(zero-shot\)"
    ):
        contexts(prompter, [], ["a"], "single", "label")
    with pytest.raises(ValueError, match="layout 'both' and loss 'context': expected one of"):
        contexts(prompter, [], ["a"], "both", "context")
    with pytest.raises(ValueError, match="two of the label words ' xa', ' xb' begin with the same token"):
        Prompter(Template("", "", (" xa", " xb")), encode, 4, 80)


def test_draws_are_balanced_and_disjoint():
    labels = np.array([0] * 10 + [1] * 5 + [2] * 6)
    first = balanced(labels, 6, np.random.default_rng(0))
    second = balanced(labels, 7, np.random.default_rng(1), leave_out=first.tolist())
    assert np.bincount(labels[first]).tolist() == [2, 2, 2] and sorted(np.bincount(labels[second])) == [
        2,
        2,
        3,
    ]
    assert not set(first) & set(second)
    with pytest.raises(ValueError, match="class 1 has 5 examples left, 6 are needed"):
        balanced(labels, 18, np.random.default_rng(0))


def test_answers_and_choices():
    scores = np.log(np.array([[0.2, 0.1], [0.1, 0.3], [0.3, 0.1]]))
    right, loss = judged(scores, np.array([0, 1, 1]))
    assert right.tolist() == [True, True, False]
    assert loss == pytest.approx(-np.mean(np.log([2 / 3, 3 / 4, 1 / 4])))
    good = {"held": 0.7, "held_loss": 2.0}
    assert better(good, None) and better(good, {"held": 0.6, "held_loss": 1.0})
    assert better(good, {"held": 0.7, "held_loss": 2.1}) and not better(good, dict(good))


def test_every_cell_is_there_and_the_optimistic_choice_is_no_worse(model, prompter):
    labels = np.array([0, 1, 0])
    held, test = (QUERIES, labels), (["a", "bb", "ccc"], labels)
    ways = {loss: [Way("tint", rate) for rate in (1e-4, 1e-2)] for loss in ("context", "label")}
    found = classified(model, prompter, SHOWN, held, test, ways, optimistic=True, batch=4, device=CPU)
    assert found["tint"].shape == (2, 2, 2, 3) and found["vanilla"].shape == (2, 2, 3)
    assert found["zero_tint"].shape == (2, 3) and found["tint_way"].max() <= 1
    assert (found["tint_best"] >= found["tint"].mean(-1)).all()
    plain = classified(model, prompter, SHOWN, held, test, ways, batch=4, device=CPU)
    assert np.array_equal(plain["tint"], found["tint"]) and np.array_equal(
        plain["tint_way"], found["tint_way"]
    )


def made_part(queries, rng, better_by):
    vanilla, tint = rng.random((2, 2, queries)) < 0.5, rng.random((2, 2, 2, queries)) < 0.5 + better_by
    return {
        "tint": tint, "vanilla": vanilla, "tint_held": np.arange(8).reshape(2, 2, 2) / 8, "vanilla_held": np.array([[0.1, 0.5], [0.5, 0.2]]),
        "zero_tint": tint[0, 0], "zero_vanilla": vanilla[0], "zero_tint_held": np.array([0.2, 0.1]), "zero_vanilla_held": np.array([0.1, 0.2]),
        "classes": 2,
    }  # fmt: skip


def test_the_report_takes_what_held_out_examples_chose():
    from papercore.experiments.tint.config import Config

    rng = np.random.default_rng(0)
    parts = {task: [made_part(400, rng, 0.2) for _ in range(3)] for task in ("mr", "cr")}
    record = Record.start(Config.standard(device="cpu"))
    report_few_shot(record, parts, resamples=200, seed=0)
    tint = np.mean([p["tint"][1, 1, 1].mean() for some in parts.values() for p in some])
    own = np.mean([p["vanilla"][0, 1].mean() for some in parts.values() for p in some])
    assert record.metrics["icl_gain"] == pytest.approx(100 * (tint - own), rel=1e-5)
    assert record.metrics["icl_gain_low"] > 10 and record.metrics["icl_gain_high"] < 30
    zero = np.mean([p["zero_tint"][0].mean() for some in parts.values() for p in some])
    assert record.metrics["icl_zero_tint"] == pytest.approx(100 * zero, rel=1e-5)
    cells = record.tables["few shot cells"]["rows"]
    assert [row[:3] for row in cells[:2]] == [
        ["single", "context", "plain"],
        ["single", "context", "calibrated"],
    ]
    assert cells[-1][4] == pytest.approx(100 * tint, rel=1e-5)


def test_no_difference_has_no_gain_and_the_interval_shrinks_with_queries():
    same = {"mr": np.ones((3, 50))}
    assert gain_of(same, same, resamples=100, seed=0) == (0.0, 0.0, 0.0)
    widths = []
    for queries in (50, 5000):
        rng = np.random.default_rng(1)
        own, tint = ({"mr": (rng.random((3, queries)) < p).astype(float)} for p in (0.5, 0.6))
        gain, low, high = gain_of(own, tint, resamples=500, seed=0)
        assert low <= gain <= high
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert chosen({"x": np.eye(3), "x_held": np.array([0.1, 0.7, 0.7])}, "x").tolist() == [0.0, 1.0, 0.0]
