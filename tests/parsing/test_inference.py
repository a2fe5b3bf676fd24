"""Inside-outside against all trees one by one, autograd, sum rules, and itself on other layouts of the same question."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from papercore.parsing import (
    PCFG,
    ImpossibleSentence,
    inside_outside,
    labelled_recall,
    log_partition,
    masked_posterior,
)
from tests.parsing.reference import all_trees, log_z, mass_of_length, masses_of_lengths, random_grammar

GRAMMARS = [(2, 3, 5, 1.0), (2, 2, 3, 1.0), (4, 3, 4, 0.15), (1, 1, 1, 1.0)]


def some(grammar: PCFG, n: int, rows: int, seed: int = 0) -> Tensor:
    return torch.randint(len(grammar.vocabulary), (rows, n), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("inner", "outer", "words", "keep"), GRAMMARS)
@pytest.mark.parametrize("n", [2, 3, 4])
def test_equals_the_sum_over_all_trees(inner: int, outer: int, words: int, keep: float, n: int) -> None:
    grammar = random_grammar(inner, outer, words, seed=n, keep=keep)
    ids = some(grammar, n, 2)
    result = inside_outside(grammar, ids, expected_rules=True)
    uses = torch.zeros_like(grammar.rules)
    for row in range(2):
        trees = list(all_trees(grammar, ids[row].tolist()))
        z = math.fsum(p for _, p in trees)
        assert float(result.log_z[row]) == pytest.approx(math.log(z), abs=1e-12)
        spans = torch.zeros(n, n, inner, dtype=torch.float64)
        terms = torch.zeros(n, outer, dtype=torch.float64)
        for tree, p in trees:
            for start, end, node in tree.nodes():
                symbol = grammar.symbols.index(node.label)
                if end - start > 1:
                    spans[start, end - start - 1, symbol] += p / z
                    kids = [grammar.symbols.index(c.label) for c in node.children]
                    uses[symbol, kids[0], kids[1]] += p / z
                else:
                    terms[start, symbol - inner] += p / z
        torch.testing.assert_close(result.span_marginals[row], spans, rtol=0, atol=1e-12)
        torch.testing.assert_close(result.term_marginals[row], terms, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.expected_rules, uses, rtol=0, atol=1e-11)


@pytest.mark.parametrize("keep", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sum_rules(keep: float, dtype: torch.dtype) -> None:
    grammar = random_grammar(5, 6, 7, seed=3, keep=keep, dtype=dtype)
    lengths = [12, 7, 2, 3, 11]
    result = inside_outside(grammar, some(grammar, 12, 5), lengths=lengths, expected_rules=True)
    close = {"rtol": 0, "atol": 1e-12 if dtype == torch.float64 else 2e-5}
    for row, n in enumerate(lengths):
        spans, terms = result.span_marginals[row], result.term_marginals[row]
        assert float(spans.min()) >= 0 and float(spans.sum(-1).max()) <= 1 + 1e-5
        torch.testing.assert_close(terms[:n].sum(-1), torch.ones(n, dtype=dtype), **close)
        torch.testing.assert_close(spans[0, n - 1].sum(), torch.tensor(1.0, dtype=dtype), **close)
        torch.testing.assert_close(spans.sum(), torch.tensor(n - 1.0, dtype=dtype), rtol=1e-5, atol=0)
        assert not terms[n:].any() and not spans[n:].any()
    total = torch.tensor(float(sum(lengths) - len(lengths)), dtype=dtype)
    torch.testing.assert_close(result.expected_rules.sum(), total, rtol=1e-5, atol=0)


def test_derivatives_equal_autograd_through_the_definition() -> None:
    grammar = random_grammar(3, 3, 4, seed=5, keep=0.5)
    ids, lengths, weight = some(grammar, 6, 3), [6, 4, 5], torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    ours = [t.clone().requires_grad_() for t in (grammar.root, grammar.rules, grammar.emissions)]
    theirs = [t.clone().requires_grad_() for t in (grammar.root, grammar.rules, grammar.emissions)]
    (weight * log_partition(*ours, ids, lengths=lengths)).sum().backward()
    total = sum(weight[row] * log_z(*theirs, ids[row, :n]) for row, n in enumerate(lengths))
    total.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    grammar = random_grammar(2, 2, 3, seed=2)
    tensors = [t.clone().requires_grad_() for t in (grammar.root, grammar.rules, grammar.emissions)]
    ids = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 0]])
    assert torch.autograd.gradcheck(lambda *t: log_partition(*t, ids, lengths=[4, 3]), tensors)


@pytest.mark.parametrize("n", [20, 60])
def test_float32_is_stable(n: int) -> None:
    grammar = random_grammar(8, 9, 30, seed=7)
    ids = some(grammar, n, 2)
    exact, rounded = inside_outside(grammar, ids), inside_outside(grammar.to(torch.float32), ids)
    assert float((exact.log_z - rounded.log_z).abs().max()) < 1e-3
    assert float((exact.span_marginals - rounded.span_marginals).abs().max()) < 1e-4
    assert float((exact.term_marginals - rounded.term_marginals).abs().max()) < 1e-4


def test_a_batch_equals_its_sentences_and_ignores_what_stands_behind_them() -> None:
    grammar = random_grammar(4, 5, 6, seed=11, keep=0.4)
    ids, lengths = some(grammar, 9, 4), [9, 2, 5, 8]
    junk = ids.clone()
    for row, n in enumerate(lengths):
        junk[row, n:] = 10**6
    batch = inside_outside(grammar, junk, lengths=lengths)
    for row, n in enumerate(lengths):
        alone = inside_outside(grammar, ids[row, :n])
        torch.testing.assert_close(batch.log_z[row : row + 1], alone.log_z, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            batch.span_marginals[row, :n, :n], alone.span_marginals[0], rtol=0, atol=1e-12
        )
        torch.testing.assert_close(batch.term_marginals[row, :n], alone.term_marginals[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_all_strings_of_a_length_have_its_probability(n: int) -> None:
    grammar = random_grammar(2, 3, 2, seed=n)
    ids = torch.tensor(list(itertools.product(range(2), repeat=n)))
    total = float(inside_outside(grammar, ids).log_z.exp().sum())
    assert total == pytest.approx(mass_of_length(grammar, n), rel=1e-12)


def test_lengths_add_up_to_one_below_radius_one() -> None:
    grammar = random_grammar(2, 2, 2, seed=1)
    rules = grammar.rules.clone()
    rules[:, 2:, 2:] += 0.5
    grammar = PCFG(
        grammar.root,
        rules,
        grammar.emissions,
        nonterminals=["A", "B"],
        preterminals=["C", "D"],
        vocabulary=["x", "y"],
        normalize=True,
    )
    assert grammar.spectral_radius() < 0.9
    masses = masses_of_lengths(grammar, 90)
    assert math.fsum(masses) == pytest.approx(1.0, abs=1e-3)
    mean = math.fsum(n * mass for n, mass in enumerate(masses))
    assert mean == pytest.approx(grammar.expected_length(), rel=1e-2)


def test_posterior_of_one_mask_is_a_ratio_of_sentence_probabilities() -> None:
    grammar = random_grammar(3, 4, 5, seed=13, keep=0.5)
    ids = some(grammar, 6, 1)
    for place in range(6):
        masked = ids.clone()
        masked[0, place] = 5
        filled = ids.repeat(5, 1)
        filled[:, place] = torch.arange(5)
        expected = torch.softmax(inside_outside(grammar, filled).log_z, 0)
        found = masked_posterior(grammar, masked, 5)
        torch.testing.assert_close(found[0, place], expected, rtol=1e-10, atol=1e-12)
        known = torch.nn.functional.one_hot(ids[0], 5).double()
        rest = [i for i in range(6) if i != place]
        torch.testing.assert_close(found[0, rest], known[rest])


def test_posterior_of_several_masks_sums_the_others_out() -> None:
    grammar = random_grammar(3, 3, 4, seed=17)
    ids = torch.tensor([[-1, 2, -1, 1, -1]])
    joint = torch.zeros(4, 4, 4, dtype=torch.float64)
    for a, b, c in itertools.product(range(4), repeat=3):
        joint[a, b, c] = inside_outside(grammar, torch.tensor([[a, 2, b, 1, c]])).log_z.exp()
    joint /= joint.sum()
    found = masked_posterior(grammar, ids, -1)[0]
    for place, axes in ((0, (1, 2)), (2, (0, 2)), (4, (0, 1))):
        torch.testing.assert_close(found[place], joint.sum(axes), rtol=1e-10, atol=1e-12)


def test_everything_masked_is_the_grammar_given_the_length() -> None:
    grammar = random_grammar(2, 2, 3, seed=19)
    found = masked_posterior(grammar, torch.full((1, 4), 9), 9)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 4, dtype=torch.float64))
    result = inside_outside(grammar, torch.full((1, 4), 9), mask_token_id=9)
    assert float(result.log_z.exp()) == pytest.approx(mass_of_length(grammar, 4), rel=1e-12)


def test_renaming_symbols_and_scaling_emissions() -> None:
    grammar = random_grammar(4, 3, 5, seed=23)
    ids = some(grammar, 7, 1)
    plain = inside_outside(grammar, ids)
    i, p = torch.randperm(4, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 0, 1])
    both = torch.cat([i, p + 4])
    other = PCFG(
        grammar.root[i], grammar.rules[i][:, both][:, :, both], grammar.emissions[p],
        nonterminals=list("abcd"), preterminals=list("efg"), vocabulary=grammar.vocabulary,
    )  # fmt: skip
    renamed = inside_outside(other, ids)
    torch.testing.assert_close(renamed.log_z, plain.log_z)
    torch.testing.assert_close(renamed.span_marginals, plain.span_marginals[..., i])
    scaled = log_partition(grammar.root, grammar.rules, grammar.emissions * 3.0, ids)
    torch.testing.assert_close(scaled, plain.log_z + 7 * math.log(3.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_impossible_sentences_are_flagged_and_never_nan(dtype: torch.dtype) -> None:
    grammar = PCFG.from_string("S -> A B [0.5] | A S [0.5]\nA -> 'a' [1.0]\nB -> 'b' [1.0]").to(dtype)
    result = inside_outside(grammar, torch.tensor([[1, 0, 0], [0, 0, 1]]), expected_rules=True)
    assert result.possible.tolist() == [False, True]
    assert (
        result.log_z[0] == -math.inf
        and not result.span_marginals[0].any()
        and not result.term_marginals[0].any()
    )
    for tensor in (result.span_marginals, result.term_marginals, result.expected_rules):
        assert bool(torch.isfinite(tensor).all())
    assert float(result.expected_rules.sum()) == pytest.approx(2.0)
    posterior = masked_posterior(grammar, torch.tensor([[1, 7, 0], [0, 7, 1]]), 7)
    assert not posterior[0].any() and float(posterior[1, 1].sum()) == pytest.approx(1.0)
    with pytest.raises(ImpossibleSentence, match=r"cannot make sentence 0, 'b a a'.*float64|double"):
        labelled_recall(result)


def test_no_global_generator_is_touched_and_inputs_stay() -> None:
    grammar = random_grammar(3, 3, 4, seed=29)
    ids, before = some(grammar, 5, 2), torch.get_rng_state()
    kept = ids.clone()
    inside_outside(grammar, ids)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(ids, kept)


@pytest.mark.parametrize(
    ("ids", "options", "error", "text"),
    [
        (torch.zeros(1, 3), {}, TypeError, "must be a LongTensor of word ids, got torch.float32"),
        ([[0, 1]], {}, TypeError, "got list"),
        (torch.zeros(1, 2, 2, dtype=torch.long), {}, ValueError, "expected [B, n]"),
        (torch.zeros(0, 3, dtype=torch.long), {}, ValueError, "at least one sentence"),
        (torch.zeros(1, 1, dtype=torch.long), {}, ValueError, "sentence 0 has the length 1"),
        (
            torch.zeros(2, 4, dtype=torch.long),
            {"lengths": [3, 5]},
            ValueError,
            "sentence 1 has the length 5: expected 2 to 4",
        ),
        (torch.zeros(2, 4, dtype=torch.long), {"lengths": [3, 0]}, ValueError, "sentence 1 has the length 0"),
        (
            torch.zeros(2, 4, dtype=torch.long),
            {"lengths": [3]},
            ValueError,
            "lengths must be 2 whole numbers",
        ),
        (torch.tensor([[0, 4]]), {}, ValueError, "input_ids[0, 1] = 4: expected a word id from 0 to 3"),
        (torch.tensor([[0, -1]]), {}, ValueError, "a mask needs mask_token_id"),
        (torch.tensor([[0, 1]]), {"mask_token_id": 1}, ValueError, "mask_token_id = 1 is the word 'w1'"),
    ],
)
def test_errors(ids, options: dict, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        inside_outside(random_grammar(2, 2, 4, seed=0), ids, **options)
    assert text in str(caught.value)


def test_a_grammar_is_wanted() -> None:
    with pytest.raises(TypeError, match="must be a PCFG, got str"):
        inside_outside("S -> A B", torch.tensor([[0, 1]]))
    grammar = random_grammar(2, 2, 4, seed=0)
    with pytest.raises(ValueError, match=r"root has the shape \(3,\), expected \(2,\)"):
        log_partition(torch.ones(3), grammar.rules, grammar.emissions, torch.tensor([[0, 1]]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees() -> None:
    grammar = random_grammar(6, 7, 20, seed=31)
    ids, lengths = some(grammar, 15, 4), [15, 9, 2, 12]
    here, there = (
        inside_outside(grammar, ids, lengths=lengths),
        inside_outside(grammar.to("cuda"), ids, lengths=lengths),
    )
    torch.testing.assert_close(there.span_marginals.cpu(), here.span_marginals, rtol=0, atol=1e-12)
    torch.testing.assert_close(there.log_z.cpu(), here.log_z)
