"""The built transformer equals the chart, is made of plain attention, and breaks when its relative position is moved."""

import pytest
import torch

from papercore.parsing import (
    ConstructedIO,
    construction_size,
    inside_outside,
    labelled_recall,
    merge_bases,
    tree_f1,
)
from tests.parsing.reference import random_grammar

LENGTH = 12


def some(grammar, n: int, rows: int) -> torch.Tensor:
    return torch.randint(len(grammar.vocabulary), (rows, n), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("seed", range(3))
def test_equals_the_chart_at_every_length(seed: int) -> None:
    grammar = random_grammar(4, 5, 6, seed=seed, keep=(1.0, 0.5, 0.2)[seed])
    module = ConstructedIO(grammar, LENGTH)
    for n in range(2, LENGTH + 1):
        ids = some(grammar, n, 2)
        chart, built = inside_outside(grammar, ids), module(ids)
        assert len(built.attentions) == 2 * n - 2
        assert float((built.span_marginals - chart.span_marginals).abs().max()) < 1e-10
        assert float((built.term_marginals - chart.term_marginals).abs().max()) < 1e-10
        torch.testing.assert_close(built.log_z, chart.log_z, rtol=0, atol=1e-10)
    assert module.size.layers == 2 * LENGTH - 2


def test_the_score_of_a_head_is_the_inside_probability() -> None:
    grammar = random_grammar(3, 3, 4, seed=5)
    ids = some(grammar, 6, 1)
    chart = inside_outside(grammar, ids).chart
    built = ConstructedIO(grammar, 6)(ids)
    for width in range(2, 7):
        scores = built.attentions[width - 2][0]
        for start in range(7 - width):
            alpha = chart.left[start, 0, width] * chart.scale[start, 0, width].exp()
            torch.testing.assert_close(scores[:3, start, start + width], alpha, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(scores[3:, start + width, start], alpha, rtol=1e-12, atol=1e-15)
        at = torch.arange(7)
        elsewhere = (at.unsqueeze(0) - at.unsqueeze(1)).abs() != width
        assert not scores[:, elsewhere].any()


def test_unequal_lengths_in_a_batch() -> None:
    grammar = random_grammar(3, 4, 5, seed=7)
    ids, lengths = some(grammar, 9, 4), [9, 2, 5, 8]
    chart, built = (
        run(ids, lengths=lengths)
        for run in (lambda *a, **k: inside_outside(grammar, *a, **k), ConstructedIO(grammar, 10))
    )
    assert float((built.span_marginals - chart.span_marginals).abs().max()) < 1e-12
    assert [str(t) for t in labelled_recall(built)] == [str(t) for t in labelled_recall(chart)]


@pytest.mark.parametrize("merged", [False, True])
def test_a_layer_is_a_plain_attention_layer(merged: bool) -> None:
    grammar = random_grammar(3, 2, 4, seed=9)
    bases = merge_bases(grammar, some(grammar, 4, 20), 2) if merged else None
    module = ConstructedIO(grammar, 4, bases=bases)
    ids = some(grammar, 4, 2)
    state = module.embed(ids, torch.tensor([4, 4]))
    at = torch.arange(5)
    for layer in module.layers(4):
        query, key, value, output = layer.dense_weights()
        half = layer.heads // 2
        scores = torch.einsum("bid,hde,hfe,bjf->bhij", state, query, key, state)
        allowed = (at.unsqueeze(1) + layer.width == at).double()
        scores = scores * torch.cat([allowed.expand(half, 5, 5), allowed.t().expand(half, 5, 5)])
        written = torch.einsum("bhij,bjd,hdv,hvf->bif", scores, state, value, output)
        after, ours = layer(state)
        torch.testing.assert_close(ours, scores, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(after, state + written, rtol=1e-12, atol=1e-15)
        assert query.shape[1] == module.size.dims and layer.heads <= module.size.heads
        state = after


@pytest.mark.parametrize("which", [0, 3, 5])
def test_moving_the_relative_position_by_one_breaks_it(which: int) -> None:
    grammar = random_grammar(3, 3, 4, seed=11)
    ids = some(grammar, 5, 1)
    module = ConstructedIO(grammar, 5)
    module.layers(5)[which].offset += 1
    gap = module(ids).span_marginals - inside_outside(grammar, ids).span_marginals
    assert float(gap.abs().max()) > 1e-3


def test_merged_heads_are_exact_at_full_rank_and_close_below() -> None:
    grammar = random_grammar(6, 5, 8, seed=13, keep=0.3)
    sample, ids = some(grammar, 8, 60), some(grammar, 7, 20)
    exact = inside_outside(grammar, ids)
    full = ConstructedIO(grammar, 8, bases=merge_bases(grammar, sample, 6))(ids)
    assert float((full.span_marginals - exact.span_marginals).abs().max()) < 1e-9
    gaps = []
    for rank in (1, 3, 5):
        module = ConstructedIO(grammar, 8, bases=merge_bases(grammar, sample, rank))
        assert module.size.dims == 4 * (5 + rank * 7) + 1
        gaps.append(float((module(ids).span_marginals - exact.span_marginals).abs().mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert tree_f1(labelled_recall(exact), labelled_recall(full)) == 1.0


def test_sizes_in_closed_form() -> None:
    exact = construction_size(1600, 25)
    assert (exact.dims, exact.layers, exact.heads) == (80_000, 50, 1600)
    small = construction_size(1600, 25, kept=(20, 45), heads=15)
    assert (small.dims, small.layers, small.heads) == (1275, 50, 15)
    grammar = random_grammar(3, 4, 5, seed=0)
    assert ConstructedIO(grammar, 6).size.dims == 4 * (4 + 3 * 5) + 1
    assert ConstructedIO(grammar, 6).embed(some(grammar, 3, 1), torch.tensor([3])).shape == (1, 4, 77)


def test_errors() -> None:
    grammar = random_grammar(3, 3, 4, seed=0)
    for make, text in (
        (lambda: ConstructedIO(grammar, 1), "max_length = 1: expected at least 2"),
        (lambda: ConstructedIO(grammar, 4)(some(grammar, 5, 1)), "5 words, this construction takes 4"),
        (
            lambda: ConstructedIO(grammar, 9, bases=merge_bases(grammar, some(grammar, 4, 3), 2)),
            "up to 4, expected up to max_length = 9",
        ),
        (lambda: merge_bases(grammar, some(grammar, 4, 3), 4), "rank = 4: expected 1 to 3"),
        (lambda: construction_size(0, 25), "symbols = 0"),
        (lambda: construction_size(30, 25, kept=(20, 45)), "at most 30 in all"),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert text in str(caught.value)
