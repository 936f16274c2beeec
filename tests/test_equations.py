"""The equations of graft.py against closed forms and simple re-implementations. Every draw is seeded."""

import math
from fractions import Fraction
from itertools import chain, combinations, product

import numpy as np
import pytest
import torch

from common import derived_seed, schedule_prompts
from conftest import assert_mean, seeded
from graft import (
    accept,
    estimated_kl,
    implied_kl,
    reshaped_reward,
    training_target,
)
from utils.runs import paired_table

TOP_K = [(2, 1), (4, 1), (8, 1), (4, 2), (8, 3), (5, 4), (5, 5)]  # (M, K)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(300)
NODES, WEIGHTS = (NODES + 1) / 2, WEIGHTS / 2  # quadrature on [0, 1]


def uniform(rows, columns, seed=100):
    """Rewards that are their own quantiles, float64 so that none tie."""
    return torch.rand(rows, columns, generator=seeded(seed), dtype=torch.float64)


def assert_frequency(hits, chance, sigmas=4.5):
    """Each column of the boolean rows is true with probability `chance`."""
    chance = torch.as_tensor(chance, dtype=torch.float64)
    error = (chance * (1 - chance) / len(hits)).clamp(min=0) ** 0.5
    assert ((hits.double().mean(0) - chance).abs() <= sigmas * error + 1e-6).all()


# ---------------------------------------------------------------- top K of M


@pytest.mark.parametrize("m, k", TOP_K)
def test_topk_accepts_the_k_best_of_each_row(m, k):
    rewards = uniform(500, m)
    mask = accept(rewards, "topk", top_k=k, generator=seeded())
    assert mask.dtype == torch.bool and (mask.sum(1) == k).all()
    assert torch.equal(mask, rewards >= rewards.sort(1, descending=True).values[:, k - 1 : k])


@pytest.mark.parametrize("m, k", TOP_K)
def test_density_of_accepted_quantiles(m, k):
    rewards = uniform(20_000, m)
    accepted = rewards[accept(rewards, "topk", top_k=k, generator=seeded())].view(-1, k)
    density = m / k * reshaped_reward(NODES, m, k).exp().numpy()
    assert WEIGHTS @ density == pytest.approx(1, abs=1e-10)
    # the j-th best of M uniforms is Beta(M - j, j + 1)
    first = np.mean([(m - j) / (m + 1) for j in range(k)])
    second = np.mean([(m - j) * (m - j + 1) / ((m + 1) * (m + 2)) for j in range(k)])
    assert WEIGHTS @ (density * NODES) == pytest.approx(first, abs=1e-10)
    assert WEIGHTS @ (density * NODES**2) == pytest.approx(second, abs=1e-10)
    assert_mean(accepted.mean(1), first)  # rows are independent, the accepted of one row are not
    assert_mean(accepted.square().mean(1), second)
    for cut in (0.3, 0.6, 0.9):
        below = WEIGHTS @ (m / k * reshaped_reward(cut * NODES, m, k).exp().numpy()) * cut
        assert_mean((accepted < cut).double().mean(1), below)


@pytest.mark.parametrize("m", [1, 2, 8])
def test_reshaped_reward_of_best_of_m_is_a_log_quantile(m):
    quantile = torch.tensor([[0.1, 0.5], [0.9, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(reshaped_reward(quantile, m, 1), (m - 1) * quantile.log())
    assert float(reshaped_reward(0.5, m, 1)) == pytest.approx((m - 1) * math.log(0.5))


@pytest.mark.parametrize("m, k", TOP_K)
def test_implied_kl(m, k):
    density = sum(math.comb(m - 1, j) * NODES ** (m - 1 - j) * (1 - NODES) ** j for j in range(k)) * m / k
    assert implied_kl(m, k) == pytest.approx(WEIGHTS @ (density * np.log(density)), abs=1e-5)
    rewards = uniform(20_000, m, seed=101)
    accepted = rewards[accept(rewards, "topk", top_k=k, generator=seeded())].view(-1, k)
    assert_mean((math.log(m / k) + reshaped_reward(accepted, m, k)).mean(1), implied_kl(m, k))


def exact_log_sum(m, k, u):
    """Equation (2) for a rational u, in whole numbers up to the logarithm."""
    u = Fraction(u)
    total = sum(math.comb(m - 1, j) * u ** (m - 1 - j) * (1 - u) ** j for j in range(k))
    # log of a fraction: numerator and denominator may be too large for a float
    return math.log(total.numerator) - math.log(total.denominator) if total else -math.inf


@pytest.mark.parametrize("m, k", [*TOP_K, (1, 1), (100, 20), (100, 99), (300, 150), (2000, 3)])
def test_reshaped_reward_is_exact(m, k):
    """C(99, 19) has 67 bits: no whole number of torch holds it."""
    quantiles = [
        Fraction(0),
        Fraction(1, 128),
        Fraction(3, 8),
        Fraction(1, 2),
        Fraction(127, 128),
        Fraction(1),
    ]
    values = reshaped_reward([float(u) for u in quantiles], m, k)
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx([exact_log_sum(m, k, u) for u in quantiles], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("m, k", [(100, 20), (64, 32)])
def test_implied_kl_of_many_samples(m, k):
    """Quadrature of exact values of equation (3)."""
    log_density = math.log(m / k) + np.array([exact_log_sum(m, k, u) for u in NODES])
    expected = WEIGHTS @ (np.exp(log_density) * log_density)
    assert implied_kl(m, k) == pytest.approx(expected, abs=1e-4) and expected < math.log(m / k)


def test_implied_kl_in_closed_form():
    for m in (1, 2, 8, 64):
        assert implied_kl(m, 1) == pytest.approx(math.log(m) - (m - 1) / m, abs=1e-12)
        assert implied_kl(m, m) == pytest.approx(0, abs=1e-9)
    # integral of 3/2 (1 - s^2) log of it
    assert implied_kl(3, 2) == pytest.approx(math.log(6) - 5 / 3, abs=1e-8)


# ---------------------------------------------------------------- ties


@pytest.mark.parametrize("k", [1, 2, 5])
def test_equal_rewards_are_accepted_equally_often(k):
    # the last: flat rows are skipped
    rewards = torch.cat([torch.zeros(20_000, 6), -torch.ones(20_000, 1)], 1)
    mask = accept(rewards, "topk", top_k=k, generator=seeded(k))
    assert_frequency(mask[:, :6], k / 6)
    assert not mask[:, 6].any()


def test_ties_at_the_cut_of_a_binary_reward_are_random():
    rewards = torch.tensor([1.0, 0, 1, 1, 0, 0]).repeat(20_000, 1)
    good, bad = [0, 2, 3], [1, 4, 5]
    two = accept(rewards, "topk", top_k=2, generator=seeded())
    assert not two[:, bad].any()
    for pair in combinations(good, 2):  # every subset equally often, not only every index
        assert_frequency(two[:, pair].all(1, keepdim=True), 1 / 3)
    four = accept(rewards, "topk", top_k=4, generator=seeded())
    assert four[:, good].all() and (four.sum(1) == 4).all()
    assert_frequency(four[:, bad], 1 / 3)


@pytest.mark.parametrize("rule", ["topk", "exponential"])
def test_the_generator_decides_alone(rule):
    rewards = torch.tensor([0.0, 0, 0, 0, 0, -1]).repeat(50, 1)

    def mask(seed):
        return accept(rewards, rule, top_k=2, beta=1.0, reward_max=0.7, generator=seeded(seed))

    torch.manual_seed(1)
    first = mask(3)
    torch.manual_seed(2)
    assert torch.equal(first, mask(3))
    assert not torch.equal(first, mask(4))


# ---------------------------------------------------------------- preference


def test_preference_accepts_the_better_of_each_consecutive_pair():
    rewards = uniform(5_000, 6)
    mask = accept(rewards, "preference", generator=seeded())
    pairs = rewards.view(-1, 2)
    assert torch.equal(mask.view(-1, 2), pairs == pairs.amax(1, keepdim=True))
    accepted = rewards[mask]  # the best of 2 is Beta(2, 1)
    assert_mean(accepted, 2 / 3)
    assert_mean(accepted.square(), 1 / 2)


# ---------------------------------------------------------------- exponential, threshold, none


def test_exponential_acceptance_probability():
    levels = torch.tensor([-1.0, 0.0, 0.4, 0.9, 1.0])
    mask = accept(levels.repeat(20_000, 1), "exponential", beta=0.5, reward_max=1.2, generator=seeded())
    assert_frequency(mask, ((levels - 1.2) / 0.5).exp())
    # bound: the row's maximum
    mask = accept(levels.repeat(20_000, 1), "exponential", beta=0.5, generator=seeded())
    assert_frequency(mask, ((levels - 1.0) / 0.5).exp())
    rows = uniform(200, 4) * 100 - 50
    mask = accept(rows, "exponential", beta=0.01, generator=seeded())
    assert mask.gather(1, rows.argmax(1, keepdim=True)).all()


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_exponential_tilts_the_distribution(beta):
    rewards = uniform(20_000, 4)
    accepted = rewards[accept(rewards, "exponential", beta=beta, reward_max=1.0, generator=seeded())]
    # density proportional to exp(r / beta) on [0, 1]
    assert_mean(accepted, 1 / (1 - math.exp(-1 / beta)) - beta)
    values = torch.tensor([0.0, 1.0, 3.0])
    weights = torch.tensor([0.5, 0.3, 0.2])
    rewards = values[torch.multinomial(weights, 40_000, True, generator=seeded(5))].view(-1, 4)
    accepted = rewards[accept(rewards, "exponential", beta=beta, reward_max=3.0, generator=seeded())]
    tilted = torch.softmax(weights.log() + values / beta, 0)
    for value, chance in zip(values, tilted):
        assert_frequency((accepted == value)[:, None], chance)


def test_threshold_and_none():
    rewards = torch.tensor([[0.2, 0.5, 0.7], [0.1, 0.1, 0.4]])
    mask = accept(rewards, "threshold", threshold=0.5, generator=seeded())
    assert mask.tolist() == [[False, True, True], [False, False, False]]  # the threshold itself is accepted
    assert accept(rewards, "none", generator=seeded()).all()


def test_flat_groups_are_skipped():
    """Nothing is accepted of a row (topk) or a pair (preference) whose rewards are all equal."""
    rewards = torch.tensor([[2.0, 2, 2, 2], [1, 1, 3, 1], [0, 0, 5, 4]])
    for top_k, best in ((1, [[2], [2]]), (2, [None, [2, 3]])):
        mask = accept(rewards, "topk", top_k=top_k, generator=seeded())
        assert mask.sum(1).tolist() == [0, top_k, top_k]
        for row, places in zip(mask[1:], best):
            assert places is None or row.nonzero().flatten().tolist() == places
    mask = accept(rewards, "preference", generator=seeded())
    assert mask.tolist() == [[False] * 4, [False, False, True, False], [False, False, True, False]]
    # the other rules rank nothing
    assert accept(rewards, "threshold", threshold=2.0, generator=seeded())[0].all()
    assert accept(rewards, "exponential", beta=1.0, generator=seeded())[0].all()


@pytest.mark.parametrize(
    "rule, options, message",
    [
        ("exponential", {}, "beta"),
        ("exponential", {"beta": 0.0}, "beta"),
        ("threshold", {}, "threshold"),
        ("best", {}, "topk, preference"),
        ("topk", {"top_k": 4}, "the 4 best of 3"),
        ("topk", {"top_k": 0}, "the 0 best"),
        ("preference", {}, "best of 2 from 3"),
    ],
)
def test_accept_refuses(rule, options, message):
    with pytest.raises(ValueError, match=message):
        accept(torch.zeros(2, 3), rule, **options)


@pytest.mark.parametrize(
    "rule, options",
    [
        ("topk", {"top_k": 2}),
        ("preference", {}),
        ("exponential", {"beta": 0.3}),
        ("threshold", {"threshold": 0.5}),
        ("none", {}),
    ],
)
def test_acceptance_does_not_fall_with_the_reward(rule, options):
    levels = torch.randint(5, (10_000, 4), generator=seeded(6))
    mask = accept(levels / 4, rule, **options, generator=seeded())
    share = torch.stack([mask[levels == level].double().mean() for level in range(5)])
    assert (share.diff() >= -0.015).all()  # four standard errors of a share
    assert rule == "none" or share[4] > share[0] + 0.2


# ---------------------------------------------------------------- KL of a round


def table_of(shares, samples=8, seed=7):
    """Rewards (prompts, samples) in which each value has exactly its share: {value: whole number}."""
    values = torch.tensor([value for value, count in shares.items() for _ in range(count)])
    return values[torch.randperm(len(values), generator=seeded(seed))].view(-1, samples)


def kl_of_discrete(shares, chance):
    """KL(accepted || sampled) of a discrete law {value: weight}
    of which a value is accepted with probability {value: chance}."""
    total = sum(shares.values())
    law = {value: weight / total for value, weight in shares.items()}
    rate = sum(law[value] * chance[value] for value in law)
    accepted = {value: law[value] * chance[value] / rate for value in law}
    return sum(q * math.log(q / law[value]) for value, q in accepted.items() if q > 0)


@pytest.mark.parametrize("accepted, of", [(16, 800), (3, 8), (799, 800), (800, 800)])
def test_kl_of_threshold_is_minus_log_of_the_acceptance_rate(accepted, of):
    """Over the round, not within the groups, where it could not exceed log(samples)."""
    rewards = table_of({1.0: accepted, 0.25: of - accepted})
    for threshold in (0.5, 1.0):  # the threshold itself is accepted
        kl = estimated_kl(rewards, "threshold", threshold=threshold)
        assert kl == pytest.approx(-math.log(accepted / of), abs=1e-12)
    assert math.isnan(estimated_kl(rewards, "threshold", threshold=2.0))
    assert estimated_kl(rewards, "threshold", threshold=0.25) == estimated_kl(rewards, "none") == 0
    if of == 800 and accepted == 16:
        assert kl == pytest.approx(3.91, abs=0.005) and kl > math.log(8)


@pytest.mark.parametrize("reward_max", [3.0, 5.0])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_kl_of_exponential_with_a_bound(beta, reward_max):
    """On a discrete law: the tilted law's KL, which does not depend on the bound."""
    shares = {0.0: 40, 1.0: 24, 3.0: 16}
    kl = estimated_kl(table_of(shares), "exponential", beta=beta, reward_max=reward_max)
    assert kl == pytest.approx(kl_of_discrete(shares, {v: math.exp(v / beta) for v in shares}), rel=1e-5)


def test_kl_of_exponential_with_rewards_above_the_bound():
    """Probabilities end at 1: not the 1.05 of the law tilted everywhere."""
    shares, beta = {0.0: 80, 1.0: 80, 2.0: 80}, 0.2
    rewards = table_of(shares)
    tilted = kl_of_discrete(shares, {v: math.exp(v / beta) for v in shares})
    cut = kl_of_discrete(shares, {v: min(1, math.exp((v - 1) / beta)) for v in shares})
    assert tilted > 1.05 and cut < 0.4
    kl = estimated_kl(rewards, "exponential", beta=beta, reward_max=1.0)
    assert kl == pytest.approx(cut, rel=1e-5)
    # the accepted ones have that law
    accepted = rewards.repeat(500, 1)
    accepted = accepted[accept(accepted, "exponential", beta=beta, reward_max=1.0, generator=seeded())]
    frequency = [(accepted == v).double().mean().item() for v in shares]
    assert sum(q * math.log(3 * q) for q in frequency if q) == pytest.approx(kl, abs=0.02)
    assert estimated_kl(rewards, "exponential", beta=beta, reward_max=-5.0) == 0  # accepts all


def chance_given_value(shares, samples, beta):
    """{value: E[A | reward]} of exponential without a bound, the other samples being drawn alike."""
    values, total, chance = list(shares), sum(shares.values()), {}
    for value in values:
        chance[value] = 0.0
        for others in product(values, repeat=samples - 1):
            weight = math.prod(shares[other] / total for other in others)
            chance[value] += weight * math.exp((value - max(value, *others)) / beta)
    return chance


def test_kl_of_exponential_without_a_bound_is_an_upper_bound():
    shares, beta = {0.0: 10_000, 1.0: 6_000, 3.0: 4_000}, 0.8
    rewards = table_of(shares, samples=4)
    chance = ((rewards - rewards.amax(1, keepdim=True)) / beta).exp().double().numpy()
    density = chance / chance.mean()
    kl = estimated_kl(rewards, "exponential", beta=beta)
    assert kl == pytest.approx((density * np.log(density)).mean(), rel=1e-5)
    truth = kl_of_discrete(shares, chance_given_value(shares, 4, beta))
    assert truth < kl < -math.log(chance.mean())


@pytest.mark.parametrize("m, k", TOP_K)
def test_kl_of_rules_that_rank_without_ties(m, k):
    """Equation (3), up to the width of a reward's share of the round."""
    rewards = uniform(2000, m)
    assert estimated_kl(rewards, "topk", top_k=k) == pytest.approx(implied_kl(m, k), abs=3e-4)
    rewards[0, 1] = rewards[0, 0]  # a tie changes little
    assert estimated_kl(rewards, "topk", top_k=k) == pytest.approx(implied_kl(m, k), abs=2e-3)
    if m % 2 == 0:
        assert estimated_kl(rewards, "preference") == pytest.approx(math.log(2) - 1 / 2, abs=2e-3)


@pytest.mark.parametrize(
    "rule, options", [("topk", {"top_k": 1}), ("topk", {"top_k": 3}), ("preference", {})]
)
def test_kl_of_rules_that_rank_with_ties(rule, options):
    """What accept does on a law of four values."""
    law = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    rewards = torch.multinomial(law, 4 * 200_000, True, generator=seeded(3)).view(-1, 4).float()
    accepted = rewards[accept(rewards, rule, **options, generator=seeded())]
    share = torch.bincount(accepted.long(), minlength=4) / len(accepted)
    truth = torch.xlogy(share, share / law).sum().item()
    assert estimated_kl(rewards, rule, **options) == pytest.approx(truth, abs=5e-3)


@pytest.mark.parametrize("ones", [16, 240, 600])
def test_kl_of_a_binary_reward_is_minus_log_of_its_share(ones):
    """Zeros are never accepted, and all ones are alike."""
    rewards = table_of({1.0: ones, 0.0: 800 - ones})
    for rule in ("topk", "preference"):
        assert estimated_kl(rewards, rule) == pytest.approx(-math.log(ones / 800), abs=1e-5)
    for rule in ("topk", "preference"):
        assert math.isnan(estimated_kl(torch.ones(3, 4), rule))


@pytest.mark.parametrize("values", [500, 2000])
def test_kl_of_a_reward_of_many_values(values):
    """A tie or two, as between sizes of files, change next to nothing."""
    rewards = (uniform(160, 8) * values).floor()
    assert 0 < (rewards.sort(1).values.diff(dim=1) == 0).sum() < 20
    assert estimated_kl(rewards, "topk", top_k=1) == pytest.approx(implied_kl(8, 1), abs=0.02)
    rewards += 10 * values * torch.arange(160)[:, None]  # each prompt has values of its own
    assert estimated_kl(rewards, "topk", top_k=1) == pytest.approx(implied_kl(8, 1), abs=0.02)


# ---------------------------------------------------------------- the loss's target


LEVELS = [(math.cos(a), math.sin(a)) for a in (0.1, 0.7, 1.2, 1.5)]  # (alpha_t, sigma_t), from clean to noise


def test_training_target_formulas():
    x_0, noise = (torch.randn(4, 2, 3, 5, generator=seeded(s), dtype=torch.float64) for s in (1, 2))
    alpha, sigma = torch.tensor(LEVELS, dtype=torch.float64).T  # a level of its own for each image
    x_t, epsilon = training_target(x_0, noise, alpha, sigma, "epsilon")
    again, v = training_target(x_0, noise, alpha, sigma, "v_prediction")
    assert torch.equal(x_t, again) and torch.equal(epsilon, noise)
    for i, (a, s) in enumerate(LEVELS):
        torch.testing.assert_close(x_t[i], a * x_0[i] + s * noise[i])
        torch.testing.assert_close(v[i], a * noise[i] - s * x_0[i])
        torch.testing.assert_close(a * x_t[i] - s * v[i], x_0[i])
        torch.testing.assert_close(s * x_t[i] + a * v[i], noise[i])


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_targets_regress_on_x_t_as_for_a_gaussian(alpha, sigma):
    mean, std, n = 0.8, 0.5, 200_000
    x_0, noise = (torch.randn(n, 1, generator=seeded(s), dtype=torch.float64) for s in (3, 4))
    level = torch.tensor([[alpha], [sigma]], dtype=torch.float64).expand(2, n)
    variance = alpha**2 * std**2 + sigma**2  # of x_t
    lines = {  # prediction type: (slope, E[target]) of E[target | x_t]
        "epsilon": (sigma / variance, 0.0),
        "v_prediction": (alpha * sigma * (1 - std**2) / variance, -sigma * mean),
    }
    for kind, (slope, centre) in lines.items():
        x_t, target = training_target(mean + std * x_0, noise, *level, kind)
        residual = target - centre - slope * (x_t - alpha * mean)
        assert_mean(residual.flatten(), 0)  # the two normal equations of least squares
        assert_mean((residual * (x_t - alpha * mean)).flatten(), 0)
        x_t, _ = training_target(x_0, noise, *level, kind)  # data of variance 1
        assert_mean(x_t.square().flatten(), 1)


# ---------------------------------------------------------------- table, schedule


def test_paired_table():
    base = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.zeros(4)}
    tuned = {"a": torch.tensor([2.0, 2, 5, 5]), "b": torch.ones(4)}
    first, second = paired_table(base, tuned)
    # changes 1, 0, 2, 1: standard deviation sqrt(2 / 3), divided by sqrt(4)
    expected = {"base": 2.5, "tuned": 3.5, "difference": 1.0, "se": math.sqrt(2 / 3) / 2}
    assert first.pop("metric") == "a" and first == pytest.approx(expected)
    assert second == {"metric": "b", "base": 0.0, "tuned": 1.0, "difference": 1.0, "se": 0.0}
    assert all(type(value) is float for value in first.values())  # goes into a JSON file


def test_schedule_uses_every_prompt_before_any_again():
    def schedule(count, **changes):
        return schedule_prompts(count, **{"seed": 0, "rounds": 6, "per_round": 5} | changes)

    rounds = schedule(15)
    first, second = list(chain(*rounds[:3])), list(chain(*rounds[3:]))
    assert [len(part) for part in rounds] == [5] * 6
    assert sorted(first) == sorted(second) == list(range(15))
    assert first != second  # another order the second time
    assert rounds == schedule(15) and rounds != schedule(15, seed=1)
    assert rounds[:2] == schedule(15, rounds=2)  # a longer run begins like a shorter one
    assert len({tuple(sorted(part)) for part in rounds}) == 6
    uneven = schedule(7)  # too few are left for a second round of the same order
    # none twice: its images would be the same
    assert all(len(part) == len(set(part)) == 5 for part in uneven)
    # fewer prompts than a round takes
    assert [sorted(part) for part in schedule(3, rounds=2)] == [[0, 1, 2]] * 2


def test_derived_seeds_differ_by_the_whole_key():
    keys = [("eval", i, j) for i in range(30) for j in range(30)] + [
        (0, r, i, j) for r in (0, 1) for i in range(20) for j in range(20)
    ]
    keys += [
        (seed, name, r) for seed in (0, 1) for name in ("prompts", "accept", "update") for r in range(20)
    ]
    seeds = [derived_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and 0 <= min(seeds) and max(seeds) < 2**63  # what torch takes
    assert derived_seed("eval", 0, 0) == 3252022647969609231  # the stored results were made with these
