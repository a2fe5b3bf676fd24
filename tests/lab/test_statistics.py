"""Means, spreads and tests over seeds, beside scipy and numbers done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from papercore.lab.statistics import Paired, Summary, paired, spearman, summarize

NUMBERS = st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=12)


def test_a_summary_by_hand():
    assert summarize([1, 2, 3, 4]) == Summary(2.5, math.sqrt(5 / 3), math.sqrt(5 / 12), 4)
    assert summarize(np.array([0.5, 0.5])) == Summary(0.5, 0.0, 0.0, 2)


@settings(max_examples=50)
@given(NUMBERS)
def test_summaries_agree_with_scipy(pairs):
    values = [a for a, _ in pairs]
    assume(np.ptp(values) > 1e-6)  # scipy warns of spreads that are lost in rounding
    found = summarize(values)
    assert found.n == len(values) and found.mean == pytest.approx(np.mean(values))
    assert found.se == pytest.approx(stats.sem(values)) and found.std == pytest.approx(stats.tstd(values))


@settings(max_examples=50)
@given(NUMBERS)
def test_paired_tests_agree_with_scipy(pairs):
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    gap = np.subtract(first, second)
    assume(np.ptp(gap) > 1e-6)
    found = paired(first, second)
    expected = stats.ttest_rel(first, second)
    assert found.difference == pytest.approx(gap.mean()) and found.n == len(pairs)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert found.difference / found.se == pytest.approx(expected.statistic, rel=1e-6, abs=1e-9)
    back = paired(second, first)
    assert (back.difference, back.se, back.p) == (-found.difference, found.se, found.p)


def test_without_spread_the_means_decide():
    assert paired([1, 2, 3], [1, 2, 3]) == Paired(0.0, 0.0, 1.0, 3)
    assert paired([2, 3, 4], [1, 2, 3]) == Paired(1.0, 0.0, 0.0, 3)
    assert math.isnan(paired([1, math.nan], [0, 0]).p)


def test_too_few_or_unlike_numbers_are_refused():
    for values in ([], [1.0]):
        with pytest.raises(ValueError, match=f"a spread needs at least two seeds, got {len(values)}"):
            summarize(values)
    for first, second in (([1, 2], [1, 2, 3]), ([1], [2]), ([[1, 2]], [[1, 2]])):
        with pytest.raises(
            ValueError, match="a paired test needs two lists of the same length >= 2, got shapes"
        ):
            paired(first, second)


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 25, 100]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: Pearson's correlation of the ranks.
    assert spearman([1, 2, 2, 5], [1, 2, 3, 4]) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    )
