"""Decoders against all trees one by one."""

import math
from collections import Counter

import pytest
import torch

from papercore.parsing import (
    ImpossibleSentence,
    inside_outside,
    labelled_recall,
    posterior_sample,
    tree_f1,
    viterbi,
)
from tests.parsing.reference import all_trees, random_grammar


def ids_of(grammar, n: int, seed: int) -> torch.Tensor:
    return torch.randint(len(grammar.vocabulary), (1, n), generator=torch.Generator().manual_seed(seed))


def expected_hits(tree, result, *, labelled: bool) -> float:
    """Expected number of constituents of a tree that the true one has too."""
    total = 0.0
    for start, end, label in tree.spans():
        mu = result.span_marginals[0, start, end - start - 1]
        total += float(mu[result.grammar.nonterminals.index(label)] if labelled else mu.sum())
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_viterbi_is_the_best_of_all_trees(seed: int, n: int, keep: float) -> None:
    grammar = random_grammar(3, 2, 3, seed=seed, keep=keep)
    ids = ids_of(grammar, n, seed)
    best, p = max(all_trees(grammar, ids[0].tolist()), key=lambda pair: pair[1])
    trees, score = viterbi(grammar, ids)
    assert float(score) == pytest.approx(math.log(p), abs=1e-12)
    assert trees[0] == best
    assert float(score) <= float(inside_outside(grammar, ids).log_z) + 1e-12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("labelled", [True, False])
def test_labelled_recall_has_most_expected_constituents(seed: int, labelled: bool) -> None:
    grammar = random_grammar(2, 2, 3, seed=seed)
    ids = ids_of(grammar, 5, seed)
    result = inside_outside(grammar, ids)
    (found,) = labelled_recall(result, labelled=labelled)
    # Every binary bracketing occurs among the trees of a dense grammar; labels are free, so the best label is taken for each span.
    shapes = {
        frozenset((s, e) for s, e, _ in tree.spans()) for tree, _ in all_trees(grammar, ids[0].tolist())
    }
    assert len(shapes) == 14
    score = result.span_marginals[0].amax(-1) if labelled else result.span_marginals[0].sum(-1)
    best = max(sum(float(score[s, e - s - 1]) for s, e in shape) for shape in shapes)
    assert sum(float(score[s, e - s - 1]) for s, e, _ in found.spans()) == pytest.approx(best, abs=1e-12)
    (likely,), _ = viterbi(grammar, ids)
    if labelled:
        assert (
            expected_hits(found, result, labelled=True)
            >= expected_hits(likely, result, labelled=True) - 1e-12
        )


def test_ties_go_to_the_shortest_left_part() -> None:
    from papercore.parsing import PCFG

    grammar = PCFG.from_string("S -> S S [0.3] | A A [0.2] | A S [0.25] | S A [0.25]\nA -> 'a' [1.0]")
    result = inside_outside(grammar, grammar.encode("a a a"))
    assert str(labelled_recall(result)[0]) == "(S (A a) (S (A a) (A a)))"


def test_samples_have_the_posterior_of_trees() -> None:
    grammar = random_grammar(2, 2, 2, seed=3)
    ids, draws = ids_of(grammar, 4, 1), 2000
    trees = list(all_trees(grammar, ids[0].tolist()))
    z = math.fsum(p for _, p in trees)
    (drawn,) = posterior_sample(grammar, ids, draws, generator=torch.Generator().manual_seed(0))
    count = Counter(drawn)
    assert set(count) <= {tree for tree, _ in trees}
    for tree, p in trees:
        share = p / z
        # 4.5 standard errors: a false alarm in about one of 150,000 comparisons.
        if share * draws >= 10:  # below that the normal approximation does not hold
            assert abs(count[tree] / draws - share) <= 4.5 * math.sqrt(share * (1 - share) / draws)
    spans = torch.zeros(4, 4)
    for tree in drawn:
        for start, end, _ in tree.spans():
            spans[start, end - start - 1] += 1 / draws
    mu = inside_outside(grammar, ids).span_marginals[0].sum(-1).float()
    assert float((spans - mu).abs().max()) < 4.5 * 0.5 / math.sqrt(draws)


def test_batches_and_lengths() -> None:
    grammar = random_grammar(3, 3, 4, seed=5)
    ids = torch.randint(4, (3, 8), generator=torch.Generator().manual_seed(2))
    lengths = [8, 3, 5]
    together = labelled_recall(inside_outside(grammar, ids, lengths=lengths))
    likely, scores = viterbi(grammar, ids, lengths=lengths)
    for row, n in enumerate(lengths):
        alone = ids[row : row + 1, :n]
        assert together[row] == labelled_recall(inside_outside(grammar, alone))[0]
        assert likely[row] == viterbi(grammar, alone)[0][0]
        assert together[row].leaves() == grammar.decode(ids[row, :n])
    assert scores.shape == (3,) and 0 < tree_f1(together, likely) <= 1


def test_errors() -> None:
    from papercore.parsing import PCFG

    grammar = PCFG.from_string("S -> A B [1.0]\nA -> 'a' [1.0]\nB -> 'b' [1.0]")
    wrong = torch.tensor([[1, 0]])
    with pytest.raises(ImpossibleSentence, match="sentence 0, 'b a'"):
        viterbi(grammar, wrong)
    with pytest.raises(ImpossibleSentence, match="'b a'"):
        posterior_sample(grammar, wrong)
    with pytest.raises(ValueError, match="n = 0"):
        posterior_sample(grammar, grammar.encode("a b"), 0)
    with pytest.raises(ValueError, match="do not fit"):
        labelled_recall(inside_outside(grammar, grammar.encode("a b")), [3])
