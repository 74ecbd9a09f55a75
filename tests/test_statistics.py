"""Statistics against scipy, worked examples and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from dpoviz.analysis.statistics import (
    bootstrap,
    detectable_mean,
    effect,
    holm,
    mcnemar,
    order_share,
    percentile_interval,
    t_interval,
)

PROBABILITIES = st.lists(st.floats(0.01, 1), min_size=4, max_size=4)


def normalised(values):
    return np.array(values) / np.sum(values)


class TestBootstrap:
    @pytest.mark.parametrize("resamples", [1, 100, 250])
    def test_resamples_are_those_of_the_generator_in_one_go(self, resamples):
        """Committed numbers stay: blocks are for memory alone."""
        values = np.arange(7.0)
        got = bootstrap(lambda rows: values[rows].mean(axis=1), 7, resamples=resamples, rng=np.random.default_rng(3))
        again = np.random.default_rng(3).choice(values, size=(resamples, 7)).mean(axis=1)
        assert got.tolist() == again.tolist()

    def test_law_of_the_mean_of_two(self):
        values = np.array([0.0, 1.0])
        got = bootstrap(lambda rows: values[rows].mean(axis=1), 2, resamples=20_000, rng=np.random.default_rng(0))
        # 0, 1/2, 1 with 1/4, 1/2, 1/4; four standard errors
        assert [(got == v).mean() for v in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.015)

    def test_the_generator_goes_on(self):
        rng = np.random.default_rng(0)
        first, second = (bootstrap(lambda rows: rows[:, 0], 50, resamples=100, rng=rng) for _ in range(2))
        assert (first != second).any()

    def test_interval_leaves_nan_out(self):
        values = np.array([np.nan, *np.arange(101.0)])
        assert percentile_interval(values) == (2.5, 97.5)
        assert np.isnan(percentile_interval(np.array([np.nan]))).all()

    def test_share_of_the_order(self):
        low, high = np.array([1.0, 1.0, 3.0, 1.0]), np.array([2.0, 1.0, 2.0, 5.0])
        assert order_share([low, high]) == 0.5  # a tie is no order
        assert order_share([low, high, np.array([9.0, 9.0, 9.0, 4.0])]) == 0.25
        assert order_share([low]) == 1


class TestEffect:
    def test_against_scipy(self):
        values = [0.1, -0.2, 0.4, 0.3, 0.05, 0.2, 0.11, 0.0]
        found = effect(values)
        assert found.mean == pytest.approx(np.mean(values)) and found.n == 8
        assert found.p == pytest.approx(ttest_1samp(values, 0).pvalue)
        low, high = ttest_1samp(values, 0).confidence_interval()
        assert (found.low, found.high) == pytest.approx((low, high))

    def test_no_spread(self):
        assert effect([0.0, 0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0, 0.0, 3)
        assert effect([0.5, 0.5, 0.5])[:4] == (0.5, 0.5, 0.5, 0.0)

    @pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, math.nan], [[1.0], [2.0], [3.0]]])
    def test_refused(self, values):
        with pytest.raises(ValueError, match="values: got"):
            effect(values)

    @pytest.mark.slow
    def test_what_could_have_been_found(self):
        """Four simulated experiments in five find a difference of that size."""
        draw = np.random.default_rng(0)
        mean = detectable_mean(2.0, 8)
        found = [ttest_1samp(draw.normal(mean, 2.0, size=8), 0).pvalue < 0.05 for _ in range(4000)]
        assert np.mean(found) == pytest.approx(0.8, abs=0.025)
        assert mean > 2.0 * 2.8 / 8**0.5  # more than by the normal law: the spread is estimated too


class TestHolm:
    def test_worked_example(self):
        # sorted .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, and never falling
        assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])

    def test_at_most_one(self):
        assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
    def test_between_the_p_value_and_bonferroni(self, p):
        adjusted = holm(p)
        assert (adjusted >= np.array(p) - 1e-12).all()
        assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all()


class TestMcNemar:
    def test_against_a_count_of_coins(self):
        first = [1] * 7 + [0] * 2 + [1] * 5 + [0] * 4
        second = [0] * 7 + [1] * 2 + [1] * 5 + [0] * 4
        found = mcnemar(first, second)
        # seven of nine fair coins or more, on both sides; the items on which both agree do not count
        assert (found.gained, found.lost) == (7, 2)
        assert found.p == pytest.approx(2 * sum(math.comb(9, n) for n in (7, 8, 9)) / 2**9)
        assert mcnemar(second, first) == (2, 7, found.p)
        assert mcnemar([1, 0], [1, 0]) == (0, 0, 1.0)

    def test_other_items_are_refused(self):
        with pytest.raises(ValueError, match=r"first, second: got shapes \(2,\), \(3,\)"):
            mcnemar([1, 0], [1, 0, 1])


def test_the_t_interval_is_that_of_scipy():
    values = [0.3, 0.1, 0.4, 0.7]
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert t_interval(values) == pytest.approx((0.375, expected.low, expected.high))
    assert t_interval([2.0])[0] == 2.0 and math.isnan(t_interval([2.0])[1])
