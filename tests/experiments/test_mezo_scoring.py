"""Batched scores against one sequence at a time, losses against their formulas, F1 by hand, and errors as text."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from papercore.experiments.mezo import scoring
from papercore.experiments.mezo.problems import CausalProblem, MaskedProblem
from papercore.experiments.mezo.processes import Processes
from papercore.experiments.mezo.prompts import CAUSAL, MASKED, MaskedPrompt
from papercore.experiments.mezo.tasks import TASKS, Sample
from tests.experiments.mezo_tiny_hub import ROWS, rows_of, save_opt, save_roberta

transformers = pytest.importorskip("transformers")
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def opt(tmp_path_factory):
    folder = save_opt(tmp_path_factory.mktemp("opt"))
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder
    ).eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    folder = save_roberta(tmp_path_factory.mktemp("roberta"))
    return transformers.AutoModelForMaskedLM.from_pretrained(
        folder
    ).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def sample_of(task: str, train: int = 6, test: int = 6) -> Sample:
    rows = rows_of(task, train)
    return Sample(rows, rows_of(task, 4, start=50), rows_of(task, test, start=80), rows)


def log_probs_alone(model, row: scoring.Encoded) -> torch.Tensor:
    """One sequence, no padding, all logits: the definition."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    first = len(row.ids) - row.answer
    return torch.stack([logits[t - 1, row.ids[t]] for t in range(first, len(row.ids))])


@pytest.mark.parametrize("task", ["sst2", "rte", "copa", "record", "squad"])
def test_scores_equal_one_sequence_at_a_time(opt, task):
    model, tokenizer = opt
    rows = [
        c
        for i in range(5)
        for c in scoring.encode_question(tokenizer, CAUSAL[task].question(ROWS[task](i * 7)), max_tokens=200)
    ]
    assert len({len(row.ids) for row in rows}) > 1, "the batch must need padding"
    alone = [log_probs_alone(model, row) for row in rows]
    with torch.no_grad():
        log_probs, is_answer = scoring.answer_log_probs(model, rows, pad=1)
        scores = scoring.candidate_scores(model, rows, pad=1)
    assert is_answer.sum(-1).tolist() == [row.answer for row in rows]
    for got, wanted in zip(log_probs, alone, strict=True):
        torch.testing.assert_close(got[-len(wanted) :], wanted, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(scores, torch.stack([a.mean() for a in alone]), atol=1e-4, rtol=1e-5)


def test_models_that_do_not_read_positions_off_the_mask_are_told_them(opt):
    _, tokenizer = opt
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=2,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    rows = [
        c
        for i in (1, 123456)
        for c in scoring.encode_question(tokenizer, CAUSAL["sst2"].question(ROWS["sst2"](i)), max_tokens=99)
    ]
    wanted = torch.stack([log_probs_alone(model, row).mean() for row in rows])
    with torch.no_grad():
        torch.testing.assert_close(scoring.candidate_scores(model, rows, pad=1), wanted, atol=1e-5, rtol=1e-5)


def test_prompt_and_candidate_tokenized_apart_are_tokenized_together(opt):
    _, tokenizer = opt
    for task, prompt in CAUSAL.items():
        question = prompt.question(ROWS[task](3))
        for text, row in zip(
            question.candidates, scoring.encode_question(tokenizer, question, max_tokens=400), strict=True
        ):
            assert list(row.ids) == [
                tokenizer.bos_token_id,
                *tokenizer.encode(question.prompt + text, add_special_tokens=False),
            ], task


def test_long_prompts_lose_their_beginning_but_not_the_first_token(opt):
    _, tokenizer = opt
    question = CAUSAL["sst2"].question({"sentence": "film " * 50, "label": 0})
    whole = scoring.encode_question(tokenizer, question, max_tokens=500)[0]
    cut = scoring.encode_question(tokenizer, question, max_tokens=20)[0]
    assert len(cut.ids) == 20 and cut.ids[0] == tokenizer.bos_token_id and cut.ids[1:] == whole.ids[-19:]
    with pytest.raises(ValueError, match="no room for a prompt within 2"):
        scoring.encode_question(tokenizer, question, max_tokens=2)


def test_choice_loss_is_cross_entropy_question_by_question():
    scores, counts, answers = torch.tensor([0.1, -2.0, 0.5, 1.5, -0.3], requires_grad=True), [2, 3], [1, 0]
    parts = scores.split(counts)
    wanted = torch.stack([-part.log_softmax(0)[a] for part, a in zip(parts, answers, strict=True)]).mean()
    got = scoring.choice_loss(scores, counts, answers)
    torch.testing.assert_close(got, wanted)
    (gradient,) = torch.autograd.grad(got, scores)
    assert torch.isfinite(gradient).all() and abs(float(gradient.sum())) < 1e-6


def test_classification_loss_and_accuracy_by_brute_force(opt):
    model, tokenizer = opt
    problem = CausalProblem(tokenizer, TASKS["cb"], CAUSAL["cb"], sample_of("cb"), max_tokens=200, batch=4)
    tables = []
    for split in ("train", "test"):
        questions = problem.questions[split]
        encoded = [scoring.encode_question(tokenizer, q, max_tokens=200) for q in questions]
        tables.append(torch.tensor([[float(log_probs_alone(model, c).mean()) for c in cs] for cs in encoded]))
    answers = torch.tensor([q.answers[0] for q in problem.questions["train"]])
    wanted = torch.nn.functional.cross_entropy(tables[0], answers)
    for context in (torch.no_grad(), torch.enable_grad()):  # in parts, and whole with its graph
        with context:
            torch.testing.assert_close(problem.loss(model, range(6)).detach(), wanted, atol=1e-4, rtol=1e-5)
    right = [
        int(row.argmax()) in q.answers for row, q in zip(tables[1], problem.questions["test"], strict=True)
    ]
    assert problem.evaluate(model, "test", ALONE) == {"accuracy": pytest.approx(100 * sum(right) / 6)}


@pytest.mark.parametrize("task", ["copa", "record", "squad"])
def test_teacher_forcing_is_the_mean_over_the_right_answers_tokens(opt, task):
    model, tokenizer = opt
    problem = CausalProblem(tokenizer, TASKS[task], CAUSAL[task], sample_of(task), max_tokens=200, batch=2)
    taught = [
        scoring.encode_question(tokenizer, q, max_tokens=200)[q.answers[0]]
        for q in problem.questions["train"]
    ]
    wanted = -torch.cat([log_probs_alone(model, row) for row in taught]).mean()
    with torch.no_grad():
        torch.testing.assert_close(problem.loss(model, range(6)), wanted, atol=1e-4, rtol=1e-5)
        # Two processes: the mean of their losses is the joint batch's loss although their answers differ in length.
        joint = [0, 1, 2, 3, 4, 5]
        halves = [problem.loss(model, joint[rank::2], joint) for rank in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, wanted, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("task", list(MASKED))
def test_mask_logits_equal_the_full_forward_pass(roberta, task):
    model, tokenizer = roberta
    rows = [scoring.encode_masked(tokenizer, MASKED[task], ROWS[task](i)) for i in (1, 22, 333333)]
    words = scoring.word_ids(tokenizer, MASKED[task].words)
    with torch.no_grad():
        got = scoring.mask_logits(model, rows, words, pad=1)
        alone = [model(input_ids=torch.tensor([row.ids])).logits[0, row.mask, words] for row in rows]
    assert all(
        row.ids[row.mask] == tokenizer.mask_token_id and row.ids.count(tokenizer.mask_token_id) == 1
        for row in rows
    )
    torch.testing.assert_close(got, torch.stack(alone), atol=1e-4, rtol=1e-5)


def test_masked_problem_by_brute_force(roberta):
    model, tokenizer = roberta
    problem = MaskedProblem(tokenizer, TASKS["trec"], MASKED["trec"], sample_of("trec", 12, 7), batch=5)
    logits = {}
    for split in ("train", "test"):
        with torch.no_grad():
            rows = [
                model(input_ids=torch.tensor([row.ids])).logits[0, row.mask, problem.words]
                for row in problem.rows[split]
            ]
        logits[split] = torch.stack(rows)
    with torch.no_grad():
        loss = problem.loss(model, [3, 5, 8, 9, 10, 11])
    wanted = torch.nn.functional.cross_entropy(
        logits["train"][[3, 5, 8, 9, 10, 11]], torch.tensor([3, 5, 2, 3, 4, 5])
    )
    torch.testing.assert_close(loss, wanted, atol=1e-4, rtol=1e-5)
    right = (logits["test"].argmax(-1) == torch.tensor(problem.labels["test"])).double().mean()
    assert problem.evaluate(model, "test", ALONE)["accuracy"] == pytest.approx(100 * float(right))


def test_features_are_what_the_output_layer_sees(opt, roberta):
    model, tokenizer = opt
    problem = CausalProblem(
        tokenizer, TASKS["sst2"], CAUSAL["sst2"], sample_of("sst2"), max_tokens=200, batch=3
    )
    found, labels = problem.features(model, "train", ALONE)
    for x, label, row in zip(found, labels, problem.train, strict=True):
        with torch.no_grad():
            hidden = model.model(input_ids=torch.tensor([row[0].ids[: -row[0].answer]])).last_hidden_state[
                0, -1
            ]
        np.testing.assert_allclose(x, hidden.numpy(), atol=1e-4)
        assert label == problem.questions["train"][list(labels).index(label)].answers[0]
    model, tokenizer = roberta
    masked = MaskedProblem(tokenizer, TASKS["sst2"], MASKED["sst2"], sample_of("sst2"), batch=3)
    found, labels = masked.features(model, "test", ALONE)
    with torch.no_grad():
        logits = scoring.mask_logits(model, masked.rows["test"], range(len(tokenizer)), pad=1)
        again = torch.from_numpy(found) @ model.lm_head.decoder.weight.T + model.lm_head.decoder.bias
    torch.testing.assert_close(again, logits, atol=1e-4, rtol=1e-4)
    assert labels.tolist() == masked.labels["test"]


def test_generation_is_greedy_and_stops_at_a_newline(opt):
    model, tokenizer = opt
    prompts = ["the cat", "Context: the cat sat on the mat\nQuestion: who?\nAnswer:", "Paris"]
    got = scoring.generate(model, tokenizer, prompts, max_tokens=200, new_tokens=12)
    ends = {*scoring.newline_ids(tokenizer), tokenizer.eos_token_id}
    for prompt, text in zip(prompts, got, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
        new: list[int] = []
        while len(new) < 12 and not ends.intersection(new):
            with torch.no_grad():
                new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(new, skip_special_tokens=True).split("\n")[0].strip()
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        scoring.generate(model, tokenizer, ["x"], max_tokens=50, new_tokens=50)


def test_a_forced_newline_ends_the_answer(opt):
    model, tokenizer = opt
    newline = scoring.newline_ids(tokenizer)[0]
    handle = model.get_output_embeddings().register_forward_hook(
        lambda _m, _i, out: out.index_fill(-1, torch.tensor([newline]), 1e4)
    )
    try:
        assert scoring.generate(model, tokenizer, ["the cat", "a dog sat"], max_tokens=200) == ["", ""]
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("prediction", "references", "f1", "exact"),
    [
        ("The cat!", ["cat"], 1.0, 1.0),  # article and punctuation go
        ("the black cat", ["cat"], 2 / 3, 0.0),  # black cat against cat: precision 1/2, recall 1
        ("black cat", ["a cat", "black dog cat"], 0.8, 0.0),  # best reference: 2 shared of 2 and 3
        ("cat cat", ["cat"], 2 / 3, 0.0),  # a word counts as often as it occurs
        ("dog", ["cat"], 0.0, 0.0),
        ("", ["cat"], 0.0, 0.0),
        ("no answer", ["no answer"], 1.0, 1.0),
        ("no", ["no answer"], 0.0, 0.0),  # a refusal is right or wrong as a whole
        ("in 1,000 A.D.", ["in 1000 AD"], 1.0, 1.0),
        ("  In\tParis ", ["in  paris"], 1.0, 1.0),
    ],
)
def test_f1_and_exact_match_by_hand(prediction, references, f1, exact):
    assert scoring.f1(prediction, references) == pytest.approx(f1)
    assert scoring.exact_match(prediction, references) == exact


def test_refused_inputs_say_what_is_wrong(opt, roberta):
    _, causal = opt
    _, masked = roberta
    with pytest.raises(ValueError, match="has no mask token"):
        scoring.encode_masked(causal, MASKED["sst2"], ROWS["sst2"](0))
    with pytest.raises(
        ValueError, match=r"label word 'preposterous' is \d+ tokens of this tokenizer, expected one"
    ):
        scoring.word_ids(masked, ("great", "preposterous"))
    with pytest.raises(ValueError, match="share a token"):
        scoring.word_ids(masked, ("great", "great"))
    with pytest.raises(ValueError, match="does not fit 6 tokens"):
        scoring.encode_masked(
            masked,
            MaskedPrompt("{sentence} It was {mask}.", ("great",), lambda row: dict(row), 6),
            {"sentence": "a film"},
        )
    with pytest.raises(ValueError, match="at least one reference"):
        scoring.f1("x", [])
    with pytest.raises(ValueError, match="batch of 6 examples does not divide over 4 processes"):
        Processes(0, 4, torch.device("cpu")).share(range(6), "a batch")
    with pytest.raises(ValueError, match="no test example"):
        CausalProblem(
            causal, TASKS["sst2"], CAUSAL["sst2"], sample_of("sst2", test=0), max_tokens=99
        ).evaluate(torch.nn.Identity(), "test", ALONE)


def test_a_long_masked_prompt_keeps_its_template(roberta):
    _, tokenizer = roberta
    row = scoring.encode_masked(
        tokenizer, MASKED["rte"], {"premise": "film " * 400, "hypothesis": "A dog sat", "label": 0}
    )
    assert len(row.ids) == 256
    assert (
        tokenizer.decode(row.ids[row.mask :], skip_special_tokens=False).replace(" ", "")
        == "<mask>,adogsat</s>"
    )
    assert tokenizer.decode([row.ids[row.mask - 1]]) == "?"


def test_batches_by_length_cover_everything_longest_first():
    lengths = [3, 9, 1, 4, 9]
    parts = list(scoring.by_length(lengths, 2))
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3, 4] and [len(p) for p in parts] == [
        2,
        2,
        1,
    ]
    assert parts[0] == [1, 4] and math.isclose(lengths[parts[-1][0]], 1)
