"""Parts of the parsing experiment against independent truths: masking, predictors, probes, truncation, the model's loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from papercore.experiments.parsing import constructing, corpus, predictors, probes, probing
from papercore.parsing import PCFG, Tree, english, inside_outside, tree_f1

GRAMMAR = PCFG.from_string(
    """
    S -> A S [0.3] | S B [0.2] | A B [0.5]
    A -> 'a' [0.6] | 'b' [0.4]
    B -> 'b' [0.5] | 'c' [0.5]
"""
)


def test_drawn_sentences_have_the_lengths_and_trees_asked_for():
    drawn = corpus.draw(GRAMMAR, 200, 3, 6, 0, trees=True)
    assert len(drawn) == 200 and drawn.ids.shape == (200, 6)
    assert int(drawn.lengths.min()) == 3 and int(drawn.lengths.max()) <= 6
    for row in range(5):
        assert drawn.words(row, GRAMMAR.vocabulary) == drawn.trees[row].leaves()
    assert torch.equal(drawn.ids, corpus.draw(GRAMMAR, 200, 3, 6, 0, trees=True).ids)
    with pytest.raises(ValueError, match="have 6 to 6 words: expected one in twenty"):
        corpus.draw(PCFG.from_string("S -> A A [0.999] | A S [0.001]\nA -> 'a' [1.0]"), 50, 6, 6, 0)


def test_one_mask_hits_every_position_alike():
    drawn = corpus.draw(GRAMMAR, 3000, 3, 3, 1)
    ids, position, words = corpus.one_mask(drawn, 9, 0)
    assert (ids == 9).sum(1).eq(1).all() and torch.equal(drawn.ids[range(3000), position], words)
    counts = torch.bincount(position, minlength=3) / 3000
    assert (counts - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 3000)


def test_training_batches_mask_inside_sentences_at_the_rate_and_at_least_once():
    drawn = corpus.draw(GRAMMAR, 400, 3, 6, 2)
    batches = corpus.training_batches(drawn, 32, 0.3, torch.Generator().manual_seed(0))
    seen = hits = 0
    for _ in range(60):
        ids, lengths, masked = next(batches)
        inside = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        assert not (masked & ~inside).any() and masked.any(1).all()
        seen, hits = seen + int(inside.sum()), hits + int(masked.sum())
    assert 0.3 < hits / seen < 0.45  # 0.3, and more where a sentence would have had none
    with pytest.raises(ValueError, match="do not fill a batch of 500"):
        next(corpus.training_batches(drawn, 500, 0.3, torch.Generator()))


def test_window_and_unigram_are_the_counts():
    ids = torch.tensor([[0, 1, 2], [0, 1, 0]])
    sentences = corpus.Sentences(ids, torch.tensor([3, 2]))
    counts = predictors.Counts.of(sentences, 3, smoothing=1e-9)
    assert counts.word.exp().tolist() == pytest.approx([2.5 / 6.5, 2.5 / 6.5, 1.5 / 6.5])
    assert counts.after.exp()[3].tolist() == pytest.approx([1, 0, 0], abs=1e-6)  # sentences begin with 0
    assert counts.before.exp()[3].tolist() == pytest.approx([0, 0.5, 0.5], abs=1e-6)  # and end in 2 or 1
    q = counts.window(ids[:1], torch.tensor([3]), torch.tensor([1])).exp()[0]
    assert float(q.sum()) == pytest.approx(1) and int(q.argmax()) == 1


def test_posterior_is_bayes_by_enumeration():
    drawn = corpus.draw(GRAMMAR, 20, 3, 6, 3)
    ids, position, _ = corpus.one_mask(drawn, 3, 1)
    found = predictors.posterior(GRAMMAR, ids, drawn.lengths, position, batch=7)
    for row in range(20):
        tries = ids[row].repeat(3, 1)
        tries[:, position[row]] = torch.arange(3)
        z = inside_outside(GRAMMAR, tries, lengths=drawn.lengths[row].repeat(3)).log_z.softmax(0)
        torch.testing.assert_close(found[row].float(), z, atol=1e-5, rtol=1e-4)


def test_gap_and_divergence_agree_when_words_come_from_bayes():
    """CE(q) - CE(p) = E KL(p || q): a claim about the mean, which holds for any q."""
    g = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, 5, generator=g, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    q = torch.rand(20_000, 5, generator=g, dtype=torch.float64).log_softmax(1)
    words = torch.multinomial(p, 1, generator=g).squeeze(1)
    found = predictors.Scores.of(q, p, words).summary()
    assert (
        abs(found["gap"] - found["kl"]) < 4 * found["gap_minus_kl_se"] and found["gap"] > 10 * found["gap_se"]
    )
    same = predictors.Scores.of(p.log(), p, words).summary()
    assert same["gap"] == pytest.approx(0, abs=1e-12) and same["kl"] == pytest.approx(0, abs=1e-12)


def test_true_depths_give_back_any_binary_tree():
    drawn = corpus.draw(english(), 60, 4, 15, 4, trees=True)
    for tree in drawn.trees:
        again = probes.tree_of_depths(probes.depths(tree).tolist(), tree.leaves())
        assert float(tree_f1([tree], [again])) == 1.0


def test_pairs_have_their_targets_and_controls_depend_on_words_alone():
    drawn = corpus.draw(english(), 30, 4, 10, 5, trees=True)
    marginals, trees, possible = probing.charts(english(), drawn)
    assert bool(possible.all()) and len(trees) == 30
    pairs = probes.spans_of(drawn, marginals, 286, 1, most=10_000)
    assert torch.equal(pairs.target, marginals[pairs.sentence, pairs.first, pairs.second - pairs.first])
    assert (pairs.second < drawn.lengths[pairs.sentence]).all() and (pairs.second > pairs.first).all()
    whole = (pairs.first == 0) & (pairs.second == drawn.lengths[pairs.sentence] - 1)
    assert not whole.any() and len(pairs.first) == int((drawn.lengths * (drawn.lengths - 1) // 2 - 1).sum())
    kinds = (drawn.ids[pairs.sentence, pairs.first] * 286 + drawn.ids[pairs.sentence, pairs.second]).tolist()
    seen: dict[int, float] = {}
    assert all(seen.setdefault(kind, c) == c for kind, c in zip(kinds, pairs.control.tolist(), strict=True))
    many = probes._scattered(torch.arange(20_000), 1)
    assert abs(float(many.mean()) - 0.5) < 0.01 and abs(float(many.var()) - 1 / 12) < 0.003
    gaps = probes.gaps_of(drawn, 286, 1)
    assert torch.equal(gaps.second - gaps.first, torch.ones_like(gaps.first))
    assert gaps.target[: int(drawn.lengths[0]) - 1].tolist() == probes.depths(drawn.trees[0]).tolist()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_probes_find_a_linear_target_and_the_network_a_bent_one(kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=g)
    line, bent = x @ torch.arange(6.0), (x[:, 0] * x[:, 1])
    probe = probes.Probe(kind, 0, steps=400).fit(x[:1500], line[:1500])
    assert probes.correlation(probe.predict(x[1500:]), line[1500:]) > 0.99
    probe = probes.Probe(kind, 0, steps=800).fit(x[:1500], bent[:1500])
    found = probes.correlation(probe.predict(x[1500:]), bent[1500:])
    assert found < 0.2 if kind == "linear" else found > 0.6
    assert probes.correlation(torch.ones(5), torch.arange(5.0)) == 0.0
    with pytest.raises(ValueError, match="expected 'linear' or 'mlp'"):
        probes.Probe("deep", 0)


def test_summary_takes_the_layer_from_the_choosing_sentences():
    chosen = np.zeros((3, 3, 2, 4))
    chosen[..., 2] = 1.0
    chosen[..., 0] = 5.0  # layer 0 is never chosen
    tested = np.arange(4.0) + np.zeros((3, 3, 2, 4)) + 0.1 * np.arange(3)[:, None, None, None]
    found = probing.summary(chosen, tested)
    assert found["parse_linear_layer"] == 2 and found["parse_linear_gain"] == pytest.approx(2)
    assert found["parse_mlp_best"] == pytest.approx(2.1) and found["parse_mlp_best_se"] == pytest.approx(
        0.1 / 3**0.5
    )
    assert found["selectivity_linear"] == pytest.approx(0) and found["linear_over_mlp"] == pytest.approx(0)


def test_the_construction_equals_the_chart_and_a_shifted_one_does_not():
    rows = constructing.equality(5, 3)
    assert len(rows) == 12 and all(row[2] <= 1e-12 and row[3] == 2 * row[0] - 2 for row in rows)
    assert all(not row[2] < 0.01 for row in constructing.equality(4, 3, shift=1))
    sizes = constructing.closed_forms()
    assert (sizes["exact_dims"], sizes["exact_layers"], sizes["moderate_dims"]) == (80_000, 50, 1275)


def test_fewer_symbols_cost_and_all_symbols_cost_nothing():
    grammar = english()
    drawn = corpus.draw(grammar, 40, 4, 10, 6, trees=True)
    unigram = predictors.Counts.of(drawn, 286).word.exp()
    rows = constructing.truncated_scores(grammar, drawn, unigram, [(26, 42), (10, 20)], 0)
    _, trees, _ = probing.charts(grammar, drawn)
    assert rows[0][2:5] == [1.0, 1.0, 1.0] and rows[0][5] == float(tree_f1(drawn.trees, trees))
    assert rows[1][4] < 1 and rows[1][5] < rows[0][5] and rows[1][6] > rows[0][6]
    merged = constructing.merged_scores(grammar, drawn, drawn.part(0, 10), (26, 42), [26, 8])
    whole = float(tree_f1(drawn.trees[:10], trees[:10]))
    assert merged[0][4] == pytest.approx(whole, abs=0.02) and merged[1][1] < merged[0][1]
    assert merged[1][4] < merged[0][4]


def test_impossible_sentences_get_the_right_branching_tree():
    cut = english().truncate(10, 20)
    drawn = corpus.draw(english(), 30, 4, 10, 7, trees=True)
    marginals, trees, possible = probing.charts(cut, drawn)
    assert 0 < int(possible.sum()) < 30
    for row in (~possible).nonzero().flatten().tolist():
        assert float(marginals[row].abs().max()) == 0 and str(trees[row]).startswith("(X (X ")
    assert [t.leaves() for t in trees] == [t.leaves() for t in drawn.trees]
    renamed = probing.charts(cut, drawn, back=lambda tree: Tree("T", tree.children))[1]
    assert {t.label for t, good in zip(renamed, possible.tolist(), strict=True) if good} == {"T"}
