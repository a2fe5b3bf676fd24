"""Prompts to the letter, label words in the hub's order, samples as the paper drew them, and errors as text."""

from __future__ import annotations

import pytest

from papercore.experiments.mezo.prompts import CAUSAL, MASKED
from papercore.experiments.mezo.tasks import (
    OF_FAMILY,
    TASKS,
    prompt_of,
)
from tests.experiments.mezo_tiny_hub import ROWS

NLI = {"premise": "A man sleeps.", "hypothesis": "He is awake"}


@pytest.mark.parametrize(
    ("task", "row", "text"),
    [
        ("sst2", {"sentence": "a gem of a film "}, "a gem of a film It was <mask>."),
        ("sst5", {"text": "a gem"}, "a gem It was <mask>."),
        ("trec", {"text": "What is a gem ?"}, "<mask>: What is a gem ?"),
        ("mnli", NLI, "A man sleeps? <mask>, he is awake"),
        ("snli", NLI, "A man sleeps? <mask>, he is awake"),
        (
            "rte",
            {"sentence1": NLI["premise"], "sentence2": NLI["hypothesis"]},
            "A man sleeps? <mask>, he is awake",
        ),
        ("rte", {"premise": "No stop", "hypothesis": "Braces {stay}"}, "No stop? <mask>, braces {stay}"),
    ],
)
def test_masked_prompts_to_the_letter(task, row, text):
    assert MASKED[task].text(row) == text


@pytest.mark.parametrize(
    ("task", "row", "prompt", "candidates", "right"),
    [
        ("sst2", {"sentence": " a gem ", "label": 1}, "a gem It was", (" terrible", " great"), " great"),
        (
            "rte",
            {**NLI, "label": 1},
            'A man sleeps.\nDoes this mean that "He is awake" is true? Yes or No?\n',
            ("Yes", "No"),
            "No",
        ),
        (
            "cb",
            {**NLI, "label": 2},
            'Suppose A man sleeps. Can we infer that "He is awake"? Yes, No, or Maybe?\n',
            ("Yes", "No", "Maybe"),
            "Maybe",
        ),
        (
            "boolq",
            {"passage": "Cats sit.", "question": "do cats sit", "label": 1},
            "Cats sit. Do cats sit?",
            (" No", " Yes"),
            " Yes",
        ),
        (
            "boolq",
            {"passage": "Cats sit.", "question": "Do cats sit?", "label": 0},
            "Cats sit. Do cats sit?",
            (" No", " Yes"),
            " No",
        ),
        (
            "wsc",
            {"text": "Ann saw Bo. She ran.", "span1_text": "Ann", "span2_text": "She", "label": 1},
            'Ann saw Bo. She ran.\nIn the previous sentence, does the pronoun "she" refer to Ann? Yes or No?\n',
            ("No", "Yes"),
            "Yes",
        ),
        (
            "wic",
            {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": 0},
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA bank.\nThe bank.\n',
            ("No", "Yes"),
            "No",
        ),
        (
            "multirc",
            {"paragraph": "Cats sit.", "question": "Who sits?", "answer": "cats", "label": 1},
            'Cats sit.\nQuestion: Who sits?\nI found this answer "cats". Is that correct? Yes or No?\n',
            ("No", "Yes"),
            "Yes",
        ),
        (
            "copa",
            {
                "premise": "It rained. ",
                "question": "effect",
                "choice1": "The road got wet.",
                "choice2": "I sang.",
                "label": 1,
            },
            "It rained so",
            (" the road got wet.", " I sang."),
            " I sang.",
        ),
        (
            "copa",
            {
                "premise": "It rained.",
                "question": "cause",
                "choice1": "It's spring.",
                "choice2": "Bo sang.",
                "label": 0,
            },
            "It rained because",
            (" it's spring.", " bo sang."),
            " it's spring.",
        ),
        (
            "record",
            {
                "passage": "Ann met Bo.\n@highlight\nThey ate",
                "query": "Later @placeholder slept",
                "entities": ["Ann", "Bo"],
                "answers": ["Bo", "Bo"],
            },
            "Ann met Bo.\n- They ate\n-",
            (" Later Ann slept", " Later Bo slept"),
            " Later Bo slept",
        ),
        (
            "squad",
            {
                "title": "Cats",
                "context": "Cats sit.",
                "question": " Who sits? ",
                "answers": {"text": ["Cats", "cats"]},
            },
            "Title: Cats\nContext: Cats sit.\nQuestion: Who sits?\nAnswer:",
            (" Cats\n",),
            " Cats\n",
        ),
        (
            "drop",
            {
                "passage": "Two cats.",
                "question": "How many?",
                "answers_spans": {"spans": ["2"], "types": ["number"]},
            },
            "Passage: Two cats.\nQuestion: How many?\nAnswer:",
            (" 2\n",),
            " 2\n",
        ),
    ],
)
def test_causal_prompts_to_the_letter(task, row, prompt, candidates, right):
    question = CAUSAL[task].question(row)
    assert (question.prompt, question.candidates) == (prompt, candidates)
    assert question.candidates[question.answers[0]] == right


def test_label_words_stand_in_the_hubs_order():
    assert MASKED["trec"].words == (
        "Expression",
        "Entity",
        "Description",
        "Human",
        "Location",
        "Number",
    )  # ABBR ENTY DESC HUM LOC NUM
    assert (
        MASKED["snli"].words == MASKED["mnli"].words == ("Yes", "Maybe", "No")
    )  # entailment neutral contradiction
    assert MASKED["sst5"].words == ("terrible", "bad", "okay", "good", "great")
    assert CAUSAL["cb"].words == ("Yes", "No", "Maybe")  # entailment contradiction neutral


def test_choosing_and_teaching_tasks_are_the_papers():
    taught = {name for name in CAUSAL if not CAUSAL[name].question(ROWS[name](1)).chooses}
    assert taught == {"copa", "record", "squad", "drop"}
    assert (
        {name for name in CAUSAL if CAUSAL[name].generates}
        == {"squad", "drop"}
        == {t.name for t in TASKS.values() if t.metric == "f1"}
    )
    assert set(OF_FAMILY["masked"]) == set(MASKED) and set(OF_FAMILY["causal"]) == set(CAUSAL)
    assert (
        prompt_of(TASKS["rte"], "masked") is MASKED["rte"]
        and prompt_of(TASKS["rte"], "causal") is CAUSAL["rte"]
    )


def test_demonstrations_come_answered_and_apart_by_a_blank_line():
    ask = CAUSAL["sst2"].question
    question = ask({"sentence": "good", "label": 1}).after(
        [ask({"sentence": "dull", "label": 0}), ask({"sentence": "fun", "label": 1})]
    )
    assert question.prompt == "dull It was terrible\n\nfun It was great\n\ngood It was"
    assert question.candidates == (" terrible", " great")
    answered = CAUSAL["squad"].question(ROWS["squad"](3)).demonstration()
    assert answered.endswith("Answer: the cat")


def test_pieces_put_together_are_the_text():
    for task in MASKED:
        row = ROWS[task](1)
        before, after = MASKED[task].pieces(row)
        text = "".join(t for t, _ in before) + "<mask>" + "".join(t for t, _ in after)
        assert text == MASKED[task].text(row).replace(" <mask>", "<mask>")
        assert any(cut for _, cut in [*before, *after])


@pytest.mark.parametrize(
    ("family", "task", "row", "message"),
    [
        (
            "causal",
            "sst2",
            {"sentence": "x", "label": 2},
            r"label 2 in column 'label' has no label word: expected 0 \(terrible\), 1 \(great\)",
        ),
        ("causal", "rte", {**NLI, "label": -1}, r"Hidden test labels \(-1\) cannot be scored"),
        ("causal", "sst2", {"text": "x", "label": 1}, "no column 'sentence': it has 'text', 'label'"),
        (
            "causal",
            "copa",
            {"premise": "x", "question": "why", "choice1": "a", "choice2": "b", "label": 0},
            "'effect' or a 'cause', got 'why'",
        ),
        (
            "causal",
            "record",
            {"passage": "p", "query": "q", "entities": ["Ann"], "answers": []},
            "none of the candidates",
        ),
        (
            "causal",
            "squad",
            {"title": "t", "context": "c", "question": "q", "answers": {"text": []}},
            "without an answer",
        ),
    ],
)
def test_rows_that_cannot_be_asked_say_why(family, task, row, message):
    with pytest.raises(ValueError, match=message):
        CAUSAL[task].question(row)
