"""The noise floor, and how many seeds a gain takes."""

import numpy as np
import pytest
from scipy import stats

from service.noise import noise_floor, plan_seeds
from trainer.errors import UsageError

FACTOR = 0.5923


def made_up(points: int, seeds: int, sd: float, own: float, generator) -> np.ndarray:
    """Bpb [points, seeds]: what a seed moves for all points of its bank, and each final's own."""
    return (
        1.1
        + generator.normal(0, 0.01, (points, 1))
        + generator.normal(0, sd, (1, seeds))
        + generator.normal(0, own, (points, seeds))
    )


def test_noise_of_one_point_is_the_standard_deviation_over_its_seeds():
    row = np.array([[1.12278, 1.12360, 1.12357]])

    floor = noise_floor([row], FACTOR)

    assert floor.sd_bpb == pytest.approx(np.std(row, ddof=1))
    assert floor.sd_nats == pytest.approx(floor.sd_bpb / FACTOR)
    assert (floor.df, floor.paired_sd_bpb) == (2, None)


def test_points_of_several_banks_are_pooled_by_their_degrees_of_freedom():
    tables = [np.array([[1.0, 1.2]]), np.array([[1.0, 1.1, 1.5]])]

    floor = noise_floor(tables, FACTOR)

    pooled = (1 * np.var(tables[0], ddof=1) + 2 * np.var(tables[1], ddof=1)) / 3
    assert floor.sd_bpb == pytest.approx(pooled**0.5)
    assert floor.df == 3


def test_finals_of_one_bank_do_not_count_as_independent_seeds():
    one = np.array([[1.0, 1.2, 1.1]])

    alone, many = noise_floor([one], FACTOR), noise_floor([np.repeat(one, 80, axis=0)], FACTOR)

    assert (many.low_bpb, many.high_bpb) == pytest.approx((alone.low_bpb, alone.high_bpb))
    assert many.num_points == 80


def test_interval_is_that_of_the_chi_square_distribution():
    floor = noise_floor([np.array([[1.0, 1.2, 1.1, 1.4]])], FACTOR)

    low, high = (floor.sd_bpb * (3 / stats.chi2.ppf(q, 3)) ** 0.5 for q in (0.975, 0.025))
    assert (floor.low_bpb, floor.high_bpb) == pytest.approx((low, high))
    assert (floor.low_nats, floor.high_nats) == pytest.approx((low / FACTOR, high / FACTOR))


def test_noise_that_a_bank_shares_leaves_the_paired_difference():
    generator = np.random.default_rng(0)
    tables = [made_up(5, 40, sd=0.0008, own=0.0001, generator=generator) for _ in range(4)]

    floor = noise_floor(tables, FACTOR)

    assert floor.sd_bpb == pytest.approx(0.0008, rel=0.2)
    assert floor.paired_sd_bpb == pytest.approx(0.0001 * 2**0.5, rel=0.1)
    assert floor.paired_df == 4 * 4 * 39


def test_paired_noise_of_two_points_is_the_spread_of_their_difference():
    table = np.array([[1.10, 1.12, 1.15], [1.11, 1.12, 1.17]])

    floor = noise_floor([table], FACTOR)

    assert floor.paired_sd_bpb == pytest.approx(np.std(table[1] - table[0], ddof=1))


def test_points_that_lack_seeds_give_way_to_those_with_the_most_but_for_the_pairs():
    gap = np.nan
    table = np.array([[1.10, 1.12, 1.15], [1.11, 1.12, gap], [1.20, 1.23, gap]])

    floor = noise_floor([table], FACTOR)

    assert floor.sd_bpb == pytest.approx(np.std(table[0], ddof=1))
    assert (floor.df, floor.num_points) == (2, 1)
    pairs = noise_floor([table[:, :2]], FACTOR)
    assert (floor.paired_sd_bpb, floor.paired_df) == (pairs.paired_sd_bpb, 2)


def test_a_single_seed_has_no_noise_to_measure():
    with pytest.raises(UsageError, match="no point was scored with two seeds"):
        noise_floor([np.array([[1.1], [1.2]])], FACTOR)


@pytest.mark.parametrize("paired", [False, True])
def test_the_planned_number_of_seeds_is_the_first_that_reaches_the_power(paired):
    plan = plan_seeds(0.0008, 0.001, 0.01, 0.8, paired=paired)

    def power(n: int) -> float:
        df, scale = (n - 1, n**0.5) if paired else (2 * n - 2, (n / 2) ** 0.5)
        return stats.nct.sf(stats.t.ppf(0.99, df), df, 0.001 / 0.0008 * scale)

    assert plan.power == pytest.approx(power(plan.n))
    assert power(plan.n) >= 0.8 > power(plan.n - 1)


def test_the_planned_power_is_what_simulated_tests_reach():
    plan = plan_seeds(1.0, 1.5, 0.05, 0.8)
    generator = np.random.default_rng(0)
    old = generator.normal(1.5, 1, (4_000, plan.n))
    new = generator.normal(0.0, 1, (4_000, plan.n))

    p = stats.ttest_ind(old, new, axis=1, alternative="greater").pvalue

    assert (p < 0.05).mean() == pytest.approx(plan.power, abs=0.02)


def test_no_fewer_seeds_are_planned_than_are_asked_for():
    free, asked = plan_seeds(1.0, 12.0, 0.01, 0.8), plan_seeds(1.0, 12.0, 0.01, 0.8, min_n=3)

    assert (free.n, asked.n) == (2, 3)
    assert asked.power > free.power
    assert plan_seeds(1.0, 1.5, 0.05, 0.8, min_n=3) == plan_seeds(1.0, 1.5, 0.05, 0.8)


def test_pairs_take_fewer_seeds_than_two_samples_of_the_same_noise():
    assert plan_seeds(1, 1, 0.01, 0.9, paired=True).n < plan_seeds(1, 1, 0.01, 0.9).n


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((0.001, 0.0, 0.01, 0.8), "exceeds the asked one by 0 is never shown"),
        ((0.001, 1e-6, 0.01, 0.8), "1000 seeds reach a power of"),
        ((0.001, 0.001, 0.9, 0.8), "give 0 < alpha < power < 1"),
        ((0.0, 0.001, 0.01, 0.8), "give 0 < alpha < power < 1 and sd > 0"),
    ],
)
def test_what_no_number_of_seeds_shows_is_refused(asked, said):
    with pytest.raises(UsageError, match=said):
        plan_seeds(*asked)
