"""Curves by hand, and statistics against scipy, worked examples and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from dpoviz.analysis.statistics import (
    Curve,
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


class TestCurve:
    def test_at(self):
        curve = Curve([2.0, 1.0, 4.0], [0.8, 0.6, 0.7], start=0.2)
        assert curve.at([0, 0.5, 1, 1.5, 2, 3, 4, 9]).tolist() == pytest.approx(
            [0.2, 0.4, 0.6, 0.7, 0.8, 0.75, 0.7, 0.7]
        )

    def test_best_within_a_budget(self):
        curve = Curve([1.0, 2.0, 4.0], [0.6, 0.8, 0.7], start=0.2)
        assert [curve.best(b) for b in (0, 0.5, 1.5, 2, 8)] == pytest.approx([0.2, 0.4, 0.7, 0.8, 0.8])
        assert Curve([1.0], [0.1], start=0.5).best(2.0) == 0.5  # the reference may be the best

    def test_a_sampled_kl_below_zero(self):
        assert Curve([-0.01, 1.0], [0.5, 1.0], start=0.4).at(0.5) == pytest.approx(0.75)

    def test_mean_difference(self):
        straight = Curve([1.0, 3.0], [1.0, 3.0], start=0.0)
        assert straight.mean_difference(straight) == 0
        # from 1 to 2, where the shorter one ends: 0.5 above at 1, level with it at 2
        other = Curve([1.0, 2.0], [1.5, 2.0], start=0.0)
        assert other.mean_difference(straight) == pytest.approx(0.25, abs=1e-4)
        assert straight.mean_difference(other) == pytest.approx(-0.25, abs=1e-4)

    def test_one_run_is_compared_where_it_is(self):
        straight = Curve([1.0, 3.0], [1.0, 3.0], start=0.0)
        assert Curve([2.0], [2.5], start=0.0).mean_difference(straight) == pytest.approx(0.5)
        assert Curve([9.0], [2.5], start=0.0).mean_difference(straight) == pytest.approx(2.5 / 3 - 3)

    @given(PROBABILITIES, PROBABILITIES, PROBABILITIES, st.floats(0, 1))
    def test_the_line_between_two_policies_can_be_had(self, one, two, ref, weight):
        """KL of a policy that tosses a coin is at most the mean of the KLs."""
        one, two, ref = map(normalised, (one, two, ref))
        mixed = weight * one + (1 - weight) * two

        def kl(p):
            return float(np.sum(p * np.log(p / ref)))

        assert kl(mixed) <= weight * kl(one) + (1 - weight) * kl(two) + 1e-12

    @pytest.mark.parametrize(
        "arguments", [([], [], 0.0), ([1.0], [1.0, 2.0], 0.0), ([math.nan], [1.0], 0.0), ([1.0], [1.0], math.inf)]
    )
    def test_refused(self, arguments):
        kl, reward, start = arguments
        with pytest.raises(ValueError, match="kl, reward"):
            Curve(kl, reward, start=start)


class TestEffect:
    def test_against_scipy(self):
        values = [0.1, -0.2, 0.4, 0.3, 0.05, 0.2, 0.11, 0.0]
        found = effect(values)
        assert found.mean == pytest.approx(np.mean(values)) and found.n == 8
        assert found.p == pytest.approx(ttest_1samp(values, 0).pvalue)
        low, high = ttest_1samp(values, 0).confidence_interval()
        assert found.low < found.mean < found.high
        # near the t interval, which it is a free-hand version of
        assert found.low == pytest.approx(low, abs=0.05) and found.high == pytest.approx(high, abs=0.05)

    def test_the_interval_keeps_its_promise(self):
        """95 % of intervals over the truth: simulated, with eight seeds from a normal and from a skewed law."""
        draw = np.random.default_rng(0)
        for sample in (lambda: draw.normal(size=8), lambda: draw.gamma(3.0, size=8) - 3.0):
            hits = [e.low <= 0 <= e.high for e in (effect(sample(), resamples=400) for _ in range(400))]
            assert 0.90 < np.mean(hits) < 0.985

    def test_no_spread(self):
        assert effect([0.0, 0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0, 0.0, 3)
        assert effect([0.5, 0.5, 0.5])[:4] == (0.5, 0.5, 0.5, 0.0)

    @pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 2.0, math.nan], [[1.0], [2.0], [3.0]]])
    def test_refused(self, values):
        with pytest.raises(ValueError, match="values: got"):
            effect(values)

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
