"""pgraft.py: equations against closed forms, the switched sampler against the stock pipeline, the probe on a
Gaussian, complete runs."""

import contextlib
import csv
import gc
import itertools
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import graft
import pgraft
from common import LORA_FILE, Model, derived_seed, draw_noise, schedule_prompts
from conftest import (
    PROMPTS,
    SCHEDULE,
    SEEDS,
    assert_mean,
    assert_one_line,
    assert_same_images,
    assert_same_run,
    difference,
    exit_code,
    forkserver,
    randomise,
    read_metrics,
    run_inside,
    seeded,
    stock,
    stock_pipeline,
    with_lora,
)
from pgraft import denoise, recommend, sample, shaped_target, switch_step, unresolved_share
from rewards import Reward
from utils.runs import InputError

# ---------------------------------------------------------------- the target


def preserving(angle):
    return math.cos(angle), math.sin(angle)


def flow(sigma):
    return 1 - sigma, sigma


# (prediction type, (alpha, sigma) at the switch, at t)
LEVELS = [
    (kind, preserving(s), preserving(t))
    for kind in ("epsilon", "v_prediction")
    for s, t in ((0.5, 0.51), (0.9, 1.3))
]
# zero terminal signal
LEVELS += [(kind, preserving(0.6), (0.0, 1.0)) for kind in ("epsilon", "v_prediction")]
LEVELS += [("flow", flow(s), flow(t)) for s, t in ((0.3, 0.31), (0.3, 0.8), (0.6, 1.0))]
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
PAIRS = torch.tensor(list(itertools.product(NODES, NODES)))  # quadrature for two independent normal variables
PAIR_WEIGHTS = torch.tensor([a * b / (2 * math.pi) for a, b in itertools.product(WEIGHTS, WEIGHTS)])


def wanted(kind, x_t, x_0, alpha, sigma):
    """E[eps, v or the flow's velocity | x_t], from x_0 = E[x_0 | x_t]."""
    eps = (x_t - alpha * x_0) / sigma
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x_0, "flow": eps - x_0}[kind]


def gaussian_mean(x_t, alpha, sigma, mean, std):
    """E[x_0 | x_t] of x_0 ~ N(mean, std^2)."""
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x_t - alpha * mean)


def quadrature(kind, s, t, mean, std):
    """(x_t, target, weight, the nodes' weights) for x_0 ~ N(mean, std^2), x_s = alpha_s x_0 + sigma_s eps."""
    x_s = s[0] * mean + math.hypot(s[0] * std, s[1]) * PAIRS[:, 0]
    return *shaped_target(x_s, PAIRS[:, 1], *s, *t, kind), PAIR_WEIGHTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_switch_at_the_clean_end_is_graft(dtype):
    x_0, noise = (torch.randn(5, 2, 3, 4, generator=seeded(i), dtype=dtype) for i in (1, 2))
    alpha, sigma = torch.tensor([preserving(a) for a in (0.03, 0.4, 0.8, 1.2, 1.57)], dtype=dtype).T
    for kind in ("epsilon", "v_prediction"):
        expected_x, expected = graft.training_target(x_0, noise, alpha, sigma, kind)
        x_t, target, weight = shaped_target(x_0, noise, 1.0, 0.0, alpha, sigma, kind)
        assert torch.equal(x_t, expected_x) and torch.equal(weight, torch.ones(5, 1, 1, 1, dtype=dtype))
        torch.testing.assert_close(target, expected, rtol=0, atol=2e-7 if dtype == torch.float32 else 1e-15)
        assert kind != "epsilon" or torch.equal(target, noise)
    alpha, sigma = torch.tensor([flow(v) for v in (0.02, 0.3, 0.5, 0.9, 1.0)], dtype=dtype).T
    x_t, target, weight = shaped_target(x_0, noise, 1.0, 0.0, alpha, sigma, "flow")
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    assert torch.equal(x_t, alpha * x_0 + sigma * noise) and torch.equal(weight, torch.ones_like(alpha))
    assert torch.equal(target, noise - x_0)


@pytest.mark.parametrize("std", [0.0, 0.5, 1.4])
@pytest.mark.parametrize("kind, s, t", LEVELS)
def test_regression_of_the_target_on_a_gaussian(kind, s, t, std):
    """The normal equations of least squares hold at the closed form, weighted or not. std = 0 for every mean
    proves it for all distributions of x_0, which are mixtures of such."""
    for mean in (0.8, -2.0):
        x_t, target, weight, share = quadrature(kind, s, t, mean, std)
        centred = x_t - t[0] * mean
        # the kernel from s to t keeps the marginal of x_t
        assert share @ centred == pytest.approx(0, abs=1e-12)
        assert share @ centred.square() == pytest.approx((t[0] * std) ** 2 + t[1] ** 2, rel=1e-12)
        residual = target - wanted(kind, x_t, gaussian_mean(x_t, *t, mean, std), *t)
        for factor in (1, weight):
            assert share @ (factor * residual) == pytest.approx(0, abs=1e-10)
            assert share @ (factor * residual * centred) == pytest.approx(0, abs=1e-10)
        assert share @ target.square() > 0.01  # the target is not 0 itself


@pytest.mark.parametrize("kind, s, t", [level for level in LEVELS if level[2][1] > level[1][1] + 0.1])
def test_regression_of_the_target_on_two_points(kind, s, t):
    """x_0 = 1 or -1: E[x_0 | x_t] = tanh(alpha_t x_t / sigma_t^2), not linear."""
    moments = 0
    for x_0 in (-1.0, 1.0):
        x_t, target, _, share = quadrature(kind, s, t, x_0, 0.0)
        residual = target - wanted(kind, x_t, torch.tanh(t[0] * x_t / t[1] ** 2), *t)
        tests = torch.stack([torch.ones_like(x_t), x_t, x_t**2, x_t**3, torch.tanh(x_t)])
        moments = moments + tests @ (share * residual) / 2
    assert moments.abs().max() < 1e-6


def weighted_variance(kind, s, t, mean=0.0, std=1.0):
    """(with the loss's weight, without) E[Var(target | x_t)]."""
    x_t, target, weight, share = quadrature(kind, s, t, mean, std)
    variance = share @ (target - wanted(kind, x_t, gaussian_mean(x_t, *t, mean, std), *t)).square()
    return (weight.mean() * variance).item(), variance.item()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_weight_bounds_the_variance_towards_the_switch(kind):
    make, start = (flow, 0.4) if kind == "flow" else (preserving, 0.7)
    s = make(start)
    gaps = [10.0**-i for i in range(2, 9)]
    weighted, plain = zip(*(weighted_variance(kind, s, make(start + gap)) for gap in gaps))
    # std = 1: Var(x_s) / alpha_s^2 times what the clean x_0 gives at the same t
    clean = [weighted_variance(kind, (1.0, 0.0), make(start + gap))[0] for gap in gaps]
    assert weighted == pytest.approx([math.hypot(*s) ** 2 / s[0] ** 2 * c for c in clean], rel=1e-4)
    assert max(weighted) < 3 * clean[0] / s[0] ** 2
    for one, other in itertools.pairwise(plain):
        assert other / one == pytest.approx(10, rel=0.1)  # 1 / b^2, and b^2 falls like t - s
    x_s, noise = (torch.randn(4, 3, generator=seeded(i)) for i in (1, 2))
    for part in shaped_target(x_s, noise, *s, *make(start + 1e-9), kind):  # float32 data
        assert part.isfinite().all()


def test_the_level_next_to_the_switch_in_float32(models):
    model = models["v"]
    x_s, noise = torch.randn(1, 4, generator=seeded(1)), torch.randn(1, 4, generator=seeded(2))
    for s in range(0, 999, 37):
        t = torch.tensor([s + 1])
        abar = model.alphas_cumprod[s : s + 2]
        exact = [abar[0].sqrt(), (1 - abar[0]).sqrt(), abar[1].sqrt(), (1 - abar[1]).sqrt()]
        ours = shaped_target(x_s, noise, *model.alpha_sigma(s), *model.alpha_sigma(t), "v_prediction")
        for one, other in zip(ours, shaped_target(x_s.double(), noise.double(), *exact, "v_prediction")):
            torch.testing.assert_close(one.double().expand_as(other), other, rtol=2e-3, atol=2e-3)


def test_shaped_target_broadcasts_its_levels():
    x_s, noise = (torch.randn(3, 4, 2, 2, generator=seeded(i)) for i in (1, 2))
    s, t = preserving(0.4), torch.tensor([preserving(a) for a in (0.5, 0.9, 1.4)])
    for kind in ("epsilon", "v_prediction"):
        x_t, target, weight = shaped_target(x_s, noise, *s, *t.T, kind)
        assert weight.shape == (3, 1, 1, 1) and x_t.shape == target.shape == x_s.shape
        assert x_t.dtype == target.dtype == weight.dtype == torch.float32
        many = shaped_target(x_s, noise, *torch.tensor([s] * 3).T, *(v.view(3, 1, 1, 1) for v in t.T), kind)
        for i in range(3):
            one = shaped_target(x_s[i : i + 1], noise[i : i + 1], *s, *(v[i] for v in t.T), kind)  # () levels
            assert one[2].shape == (1, 1, 1, 1)
            for a, b, c in zip(one, (x_t, target, weight), many):
                torch.testing.assert_close(a[0], b[i])
                torch.testing.assert_close(c[i], b[i])
        assert weight.flatten().tolist() == pytest.approx(
            [1 - (math.tan(0.4) / math.tan(a)) ** 2 for a in (0.5, 0.9, 1.4)], rel=1e-5
        )
    with pytest.raises(ValueError, match="'sample' must be epsilon, v_prediction or flow"):
        shaped_target(x_s, noise, *s, *t.T, "sample")


# ---------------------------------------------------------------- data x_s or x_0: one distribution


def test_accepted_states_are_the_accepted_images_noised():
    """x_0 ~ N(m, 1), acceptance a Gaussian in x_0, an exact sampler: x_s, then x_0 from its posterior."""
    n, mean, centre, width, s = 400_000, 0.3, 1.5, 0.8, preserving(1.0)
    x_s = s[0] * mean + torch.randn(n, generator=seeded(1), dtype=torch.float64)
    x_0 = gaussian_mean(x_s, *s, mean, 1.0) + s[1] * torch.randn(n, generator=seeded(2), dtype=torch.float64)
    reward = -(x_0 - centre).square() / 2
    mask = pgraft.accept(
        reward.view(-1, 8), "exponential", beta=width**2, reward_max=0.0, generator=seeded(3)
    ).flatten()
    x_s, x_0 = x_s[mask], x_0[mask]
    variance = 1 / (1 + width**-2)  # of the accepted x_0, their mean:
    shaped = variance * (mean + centre / width**2)
    assert_mean(x_0, shaped)
    assert_mean((x_0 - shaped).square(), variance)
    noised = s[0] * x_0 + s[1] * torch.randn(len(x_0), generator=seeded(4), dtype=torch.float64)
    spread = math.sqrt(s[0] ** 2 * variance + s[1] ** 2)
    for states in (x_s, noised):  # the same distribution
        assert_mean(states, s[0] * shaped)
        assert_mean((states - s[0] * shaped).square(), spread**2)
        for z in (-1.5, -0.5, 1.0, 2.0):
            assert_mean((states < s[0] * shaped + z * spread).double(), (1 + math.erf(z / math.sqrt(2))) / 2)
    assert abs(x_s.mean() - s[0] * mean) > 0.2  # not that of all states

    noise = torch.randn(len(x_0), generator=seeded(5), dtype=torch.float64)
    for kind, t in itertools.product(("epsilon", "v_prediction"), (preserving(1.1), preserving(1.4))):
        losses = []
        for data, level in ((x_s, s), (x_0, (1.0, 0.0))):
            x_t, target, weight = shaped_target(data, noise, *level, *t, kind)
            residual = target - wanted(kind, x_t, gaussian_mean(x_t, *t, shaped, variance**0.5), *t)
            assert_mean(residual, 0)  # the same minimiser
            assert_mean(residual * (x_t - t[0] * shaped), 0)
            losses.append((weight * residual.square()).mean().item())
        # Var(x_s) / (alpha_s^2 Var(x_0)): 1 / alpha_s^2 = 3.4 for data of variance 1
        assert losses[0] / losses[1] == pytest.approx(spread**2 / (s[0] ** 2 * variance), rel=0.02)
        assert losses[0] / losses[1] > 1 / s[0] ** 2


# ---------------------------------------------------------------- V(t): the estimator


def pairs_share(rewards):
    """V from squared differences of pairs, of one state and of two states of one prompt: unbiased."""
    same, other = [], []
    for prompt in rewards.tolist():
        for i, j in itertools.combinations(range(len(prompt)), 2):
            other += [(a - b) ** 2 / 2 for a in prompt[i] for b in prompt[j]]
        for state in prompt:
            same += [(a - b) ** 2 / 2 for a, b in itertools.combinations(state, 2)]
    return np.mean(same) / np.mean(other)


@pytest.mark.parametrize("shape", [(2, 2, 2), (5, 2, 4), (4, 3, 5), (3, 6, 2)])
def test_unresolved_share_is_the_one_of_unbiased_pairs(shape):
    rewards = (
        torch.randn(shape, generator=seeded(1)) + 3 * torch.randn(shape[:2], generator=seeded(2))[..., None]
    )
    rewards += 100 * torch.arange(shape[0]).view(-1, 1, 1)  # what the prompt alone decides does not matter
    assert unresolved_share(rewards)[0] == pytest.approx(pairs_share(rewards), rel=1e-9)
    assert unresolved_share(7 - 3 * rewards)[0] == pytest.approx(pairs_share(rewards), rel=1e-4)


def simulated(prompts, states, restarts, resolved, open_, seed):
    """Rewards with V = open_^2 / (resolved^2 + open_^2), and a prompt's own mean."""
    shape = (prompts, states, restarts)
    parts = [torch.randn(shape[: i + 1], generator=seeded(seed + i), dtype=torch.float64) for i in range(3)]
    return 2 * parts[0][:, None, None] + resolved * parts[1][:, :, None] + open_ * parts[2]


@pytest.mark.parametrize("states, restarts", [(2, 2), (2, 4), (3, 5), (8, 2)])
@pytest.mark.parametrize("resolved, open_", [(1.0, 1.0), (2.0, 0.5), (0.0, 1.0), (0.3, 1.0)])
def test_unresolved_share_in_closed_form(states, restarts, resolved, open_):
    share, se = unresolved_share(simulated(30_000, states, restarts, resolved, open_, seed=10))
    assert abs(share - open_**2 / (resolved**2 + open_**2)) <= 4 * se and se < 0.02


@pytest.mark.parametrize("resolved, open_", [(1.0, 1.0), (0.2, 1.0), (2.0, 0.5)])
def test_jackknife_error_is_the_spread(resolved, open_):
    shares = [unresolved_share(simulated(48, 2, 4, resolved, open_, seed=10 * i)) for i in range(400)]
    values, errors = np.array(shares).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.2)


def test_unresolved_share_at_the_ends():
    states = torch.randn(20, 2, 1, generator=seeded(1))
    assert unresolved_share(states.expand(20, 2, 3)) == (0, 0)  # restarts agree
    share, se = unresolved_share(torch.randn(20_000, 2, 3, generator=seeded(2)))  # states do not matter
    assert abs(share - 1) < 4 * se and 0 < se < 0.02
    assert all(map(math.isnan, unresolved_share(torch.ones(5, 2, 3))))
    # only prompts differ
    assert all(map(math.isnan, unresolved_share(torch.arange(5.0).view(5, 1, 1).expand(5, 2, 3))))


def test_recommendation():
    rows = [
        {"timestep": t, "unresolved": v, "se": e}
        for t, v, e in ((899, 0.9, 0.1), (599, 0.3, 0.1), (299, 0.2, 0.05))
    ]
    assert recommend(rows, 1.0) == (899, "the noisiest level with V(t) + s.e. at most 1")
    assert [recommend(rows, limit)[0] for limit in (0.99, 0.4, 0.39, 0.25)] == [599, 599, 299, 299]
    timestep, reason = recommend(rows, 0.24)
    assert timestep == 299 and "cleanest" in reason and "nowhere at most 0.24" in reason
    with pytest.raises(InputError, match="no reward differ"):
        recommend([row | {"unresolved": math.nan, "se": math.nan} for row in rows], 0.5)


# ---------------------------------------------------------------- V(t): the probe, on an exact Gaussian


class GaussianModel:
    """x_0 ~ N(m, std^2), m the prompt, and its exact predictions. An image is its latent."""

    device, dtype, latent_shape, train_timesteps = "cpu", torch.float32, (1, 1, 1), 1000

    def __init__(self, std=0.7, prediction_type="epsilon"):
        self.std, self.prediction_type = std, prediction_type
        self.alphas_cumprod = (
            torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double().square().neg().add(1).cumprod(0)
        )

    def timesteps(self, steps):
        return list(range(999, -1, -1000 // steps))

    def encode(self, prompts):
        return torch.tensor([float(p) for p in prompts]).view(-1, 1, 1)

    def remember(self, prompts):
        pass

    def alpha_sigma(self, t):
        abar = self.alphas_cumprod[t].item() if t >= 0 else 1.0
        return abar**0.5, (1 - abar) ** 0.5

    def predict(self, x, t, text, guidance=1):
        level = self.alpha_sigma(int(t))
        x_0 = gaussian_mean(x, *level, text[..., None], self.std)
        return wanted(self.prediction_type, x, x_0, *level)

    def decode(self, latents, phase="decode"):
        return latents.flatten().tolist()

    lora_off = lora_merged = contextlib.nullcontext


def last_value(images, prompts):
    return torch.tensor(images)


def sampler_shares(model, steps):
    """V at every step of DDPM's ancestral sampler (which eta = 1 is), by linear recursion."""
    levels, gains, noises = [*model.timesteps(steps), -1], [], []
    for t, after in itertools.pairwise(levels):
        (alpha, sigma), (alpha_next, sigma_next) = model.alpha_sigma(t), model.alpha_sigma(after)
        ratio = (alpha / alpha_next) ** 2
        of_x_0, of_x = alpha_next * (1 - ratio) / sigma**2, ratio**0.5 * sigma_next**2 / sigma**2
        gains.append(of_x + of_x_0 * alpha * model.std**2 / ((alpha * model.std) ** 2 + sigma**2))
        noises.append((1 - ratio) * sigma_next**2 / sigma**2)
    left = [
        sum(v * math.prod(gains[j + 1 :]) ** 2 for j, v in enumerate(noises) if j >= k) for k in range(steps)
    ]
    return [v / (math.prod(gains) ** 2 + left[0]) for v in left]  # the first state has variance 1


def probe_args(**changes):
    defaults = {"steps": 10, "seed": 3, "probe_restarts": 4, "sample_batch": 700, "guidance": 1, "eta": 1.0}
    return SimpleNamespace(**defaults | changes)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_probe_on_a_gaussian(kind):
    model = GaussianModel(prediction_type=kind)
    prompts = [str(5 * i) for i in range(300)]
    rows = pgraft.probe(model, last_value, prompts, probe_args())
    expected = sampler_shares(model, 10)
    assert expected[1] > 0.95 and 0.1 < expected[8] < 0.3
    for row, step in zip(rows, range(1, 10), strict=True):
        t = 999 - 100 * step
        assert (row["step"], row["timestep"], row["switch"]) == (step, t, t / 1000)
        assert abs(row["unresolved"] - expected[step]) <= 4 * row["se"] + 1e-6, row
        assert row["se"] < 0.06
    assert rows[-1]["unresolved"] == rows[-1]["se"] == 0  # the last step draws no noise
    assert list(rows[0]) == ["step", "timestep", "switch", "unresolved", "se"]


@pytest.mark.parametrize("steps", [2, 4, 20])
def test_probe_levels(steps):
    rows = pgraft.probe(GaussianModel(), last_value, ["0", "1", "2"], probe_args(steps=steps))
    grid = GaussianModel().timesteps(steps)
    expected = {2: [1], 4: [1, 2, 3], 20: list(range(2, 20, 2))}[steps]
    assert [row["step"] for row in rows] == expected and [row["timestep"] for row in rows] == [
        grid[i] for i in expected
    ]


@pytest.mark.parametrize("eta", [1e-6, 1.0])
def test_restarts_begin_at_the_stored_state(eta):
    """A restart that draws no noise ends where the trajectory itself does: with next to no eta from every
    level, else from the last."""
    model, seen = GaussianModel(), []

    def reward(images, prompts):
        seen.append((images, prompts))
        return torch.tensor(images)

    prompts = ["3", "-1", "0.5"]
    pgraft.probe(model, reward, prompts, probe_args(eta=eta, steps=5))
    seeds = [derived_seed(3, "probe", i, j) for i in range(3) for j in range(2)]
    repeated = [p for p in prompts for _ in range(2)]
    noise = draw_noise(seeds, 5, (1, 1, 1), torch.float32)
    end = denoise(model, noise[0], [*model.timesteps(5), -1], noise[1:], model.encode(repeated), 1, eta)
    assert len(seen) == 4 * 4 and end.std() > 1
    for images, of in seen[-4 if eta == 1 else 0 :]:
        assert of == repeated and images == pytest.approx(end.flatten().tolist(), abs=1e-4)


def test_restarts_differ_and_do_not_depend_on_the_batch():
    def seen(**changes):
        values = {}

        def reward(images, prompts):
            for image, prompt in zip(images, prompts):
                values.setdefault(prompt, []).append(round(image, 4))
            return torch.tensor(images)

        rows = pgraft.probe(GaussianModel(), reward, ["3", "-1"], probe_args(steps=5, **changes))
        return rows, {prompt: sorted(v) for prompt, v in values.items()}

    rows, values = seen()
    # the last level's restarts agree
    assert len(values["3"]) == 4 * 2 * 4 and len(set(values["3"])) == 3 * 2 * 4 + 2
    again, others = seen(sample_batch=1)
    for one, other in zip(rows, again):
        assert one == pytest.approx(other, abs=1e-4)
    for prompt in values:
        assert others[prompt] == pytest.approx(values[prompt], abs=2e-4)
    assert seen(seed=4)[1] != values


# ---------------------------------------------------------------- which step is the switch


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_switch_step(spacing):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing=spacing, steps_offset=1)
    for steps in (1, 2, 4, 5, 8, 10, 20, 25, 50, 100):
        scheduler.set_timesteps(steps)
        grid = scheduler.timesteps.tolist()
        for k, t in enumerate(grid):
            assert switch_step(grid, t) == k  # on the grid: the base model takes the step that starts there
            assert switch_step(grid, t - 1) == k + 1 and switch_step(grid, t - 0.5) == k + 1
        for level in (0, 1, 137, 249.7, 499, 500, 501, 999):
            tuned = switch_step(grid, level)
            assert all(t > level for t in grid[:tuned]) and all(t <= level for t in grid[tuned:])
            assert switch_step(scheduler.timesteps, level) == tuned
            if tuned < steps:  # the level that is trained on gives the same step again
                assert switch_step(grid, grid[tuned]) == tuned
    assert switch_step([999, 899, 799], 899) == 1 and switch_step([999, 899, 799], 900) == 1


# ---------------------------------------------------------------- sampling with a switch


@pytest.fixture
def tuned_model(models):
    model = with_lora(models["v"], "attention")
    randomise(model)
    return model


def drawn(model, steps=4, guidance=1.0, eta=1.0):
    """(noise, text, guidance, eta) for sample."""
    return draw_noise(SEEDS, steps, model.latent_shape, model.dtype), model.encode(PROMPTS), guidance, eta


@pytest.mark.parametrize("kind, guidance, eta", [("epsilon", 1.0, 1.0), ("v", 3.0, 1.0), ("v", 1.0, 0.0)])
def test_without_the_tuned_model_it_is_graft(models, kind, guidance, eta):
    model = with_lora(models[kind], "attention")
    randomise(model)
    rest = drawn(model, 4, guidance, eta)
    base = graft.sample(models[kind], *rest)
    with model.lora_merged():
        tuned = graft.sample(model, *rest)
    assert difference(tuned, base) > 1e-2
    for switch in range(5):
        assert torch.equal(sample(model, *rest, switch, tuned=False)[1], base)
    assert torch.equal(sample(model, *rest, 0)[1], base)
    x_s, x_0 = sample(model, *rest, 4)
    assert torch.equal(x_0, tuned) and torch.equal(x_s, tuned)


def test_sampling_is_the_composition_of_its_steps(models, tuned_model):
    noise, *rest = drawn(tuned_model, 5)
    levels = [*tuned_model.timesteps(5), -1]
    x, states = noise[0], [noise[0]]
    with tuned_model.lora_merged():
        for k in range(5):
            x = denoise(tuned_model, x, levels[k : k + 2], noise[k + 1 : k + 2], *rest)
            states.append(x)
    for switch in range(6):
        x_s, x_0 = sample(tuned_model, noise, *rest, switch)
        assert torch.equal(x_s, states[switch])
        for k in range(switch, 5):  # the base model takes the others
            x_s = denoise(models["v"], x_s, levels[k : k + 2], noise[k + 1 : k + 2], *rest)
        assert torch.equal(x_0, x_s)


def test_adapter_is_on_again_after_sampling(models, tuned_model):
    rest = drawn(tuned_model)
    weights = {n: v.clone() for n, v in tuned_model.denoiser.state_dict().items()}
    plain = graft.sample(tuned_model, *rest)  # the adapter as layers of its own
    for tuned in (True, False):
        first = sample(tuned_model, *rest, 2, tuned)
        again = sample(tuned_model, *rest, 2, tuned)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert torch.equal(graft.sample(tuned_model, *rest), plain)
        assert all(p.requires_grad for p in tuned_model.lora().values())
        assert all(torch.equal(weights[n], v) for n, v in tuned_model.denoiser.state_dict().items())
    assert difference(plain, graft.sample(models["v"], *rest)) > 1e-2


def switching_off(switch, states):
    """The callback that the script prints; the state at the switch goes into `states`."""

    def base_from_the_switch_on(pipe, i, t, kwargs):
        if i + 1 == (pipe.scheduler.timesteps > switch).sum():
            pipe.disable_lora()
            states.append(kwargs["latents"])
        return kwargs

    return base_from_the_switch_on


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind, eta", [("epsilon", 1.0), ("v", 1.0), ("v", 0.0)])
def test_sampling_equals_the_stock_pipeline(models, tiny_epsilon, tiny_v, tmp_path, kind, guidance, eta):
    model = with_lora(models[kind], "attention")
    randomise(model)
    model.save_lora(tmp_path)
    pipeline = stock_pipeline({"epsilon": tiny_epsilon, "v": tiny_v}[kind])
    base = stock(pipeline, steps=5, guidance=guidance, eta=eta)
    pipeline.load_lora_weights(str(tmp_path))
    everywhere = stock(pipeline, steps=5, guidance=guidance, eta=eta)
    switch = model.timesteps(5)[2]  # trained with 5 steps, used with others
    for steps in (5, 4, 10):
        rest = drawn(model, steps, guidance, eta)
        switch_at = switch_step(model.timesteps(steps), switch)
        assert 0 < switch_at < steps
        x_s, x_0 = sample(model, *rest, switch_at)
        states = []
        pipeline.enable_lora()
        callback = switching_off(switch, states)
        expected = stock(pipeline, steps=steps, guidance=guidance, eta=eta, callback_on_step_end=callback)
        assert difference(x_0, expected) <= 1e-5
        assert len(states) == 1 and difference(x_s, states[0]) <= 1e-5
        if steps == 5:
            assert difference(expected, base) > 5e-3 and difference(expected, everywhere) > 5e-3
    # one step earlier or later would be seen
    rest = drawn(model, 10, guidance, eta)
    for other in (switch_at - 1, switch_at + 1):
        assert difference(sample(model, *rest, other)[1], x_0) > 1e-3


def test_memory_does_not_depend_on_the_number_of_steps(tuned_model, monkeypatch):
    """Tensors alive at every call of the model and of the decoder: only the noise of the batch in hand grows
    with the steps."""
    predict, decode, draw_noise = tuned_model.predict, tuned_model.decode, pgraft.draw_noise
    tuned_model.encode(PROMPTS)

    def most_kept(steps):
        noise, sizes = [], []

        def count():
            tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point()]
            kept = [s for s in (t.untyped_storage() for t in tensors) if s.data_ptr() not in noise]
            sizes.append((len(kept), sum(s.nbytes() for s in kept)))

        def counted_draw(*args):
            noise[:] = [(drawn := draw_noise(*args)).untyped_storage().data_ptr()]
            return drawn

        monkeypatch.setattr(pgraft, "draw_noise", counted_draw)
        monkeypatch.setattr(tuned_model, "predict", lambda *args: (count(), predict(*args))[1])
        monkeypatch.setattr(tuned_model, "decode", lambda *args: (count(), decode(*args))[1])
        args = SimpleNamespace(sample_batch=2, steps=steps, guidance=1.0, eta=1.0)
        gc.collect()
        gc.freeze()  # what is frozen is not among the objects
        try:
            latents, scores, _ = pgraft.sample_and_score(
                tuned_model, [], PROMPTS * 2, range(6), args, 2, True, "test"
            )
        finally:
            gc.unfreeze()
        assert len(sizes) == 3 * (steps + 1)
        for state in latents:
            assert state.shape == (6, *tuned_model.latent_shape) and state.grad_fn is None
            assert state.untyped_storage().nbytes() == 4 * state.numel()
        assert all(len(values) == 6 for values in scores.values())
        return [max(sizes[i : i + steps + 1]) for i in range(0, len(sizes), steps + 1)]  # of each batch

    assert most_kept(4) == most_kept(8) == most_kept(20)


def test_sample_and_score_pairs_states_and_images(tuned_model):
    """x_s, x_0 and scores of an image belong together, whatever the batch."""
    args = SimpleNamespace(sample_batch=2, steps=4, guidance=1.0, eta=1.0)
    reward = Reward("jpeg_compressibility")
    (x_s, x_0), scores, images = pgraft.sample_and_score(
        tuned_model, [reward], PROMPTS, SEEDS, args, 3, True, "test"
    )
    expected_s, expected_0 = sample(tuned_model, *drawn(tuned_model), 3)
    assert difference(x_s, expected_s) <= 1e-5 and difference(x_0, expected_0) <= 1e-5
    assert difference(x_s, x_0) > 1e-2
    assert_same_images(images, tuned_model.decode(expected_0))
    assert torch.allclose(scores[reward.spec], reward(images, PROMPTS))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_loss(models, kind, guidance):
    model = models[kind]
    x_s, noise = (torch.randn(3, *model.latent_shape, generator=seeded(i)) for i in (1, 2))
    t, text = torch.tensor([301, 600, 999]), model.encode(PROMPTS)
    with torch.no_grad():
        clean = pgraft.denoising_loss(model, x_s, (1.0, 0.0), text, t, noise, guidance)
        assert clean.item() == pytest.approx(
            graft.denoising_loss(model, x_s, text, t, noise, guidance).item(), rel=1e-6
        )
        loss = pgraft.denoising_loss(model, x_s, model.alpha_sigma(300), text, t, noise, guidance)
        abar, abar_s = model.alphas_cumprod[t].view(-1, 1, 1, 1), model.alphas_cumprod[300]
        a = (abar / abar_s).sqrt()
        b = (1 - a**2).sqrt()  # alpha^2 + sigma^2 = 1
        x_t = (a * x_s + b * noise).float()
        # the conditional score of the kernel, -noise / b, in the units of the prediction
        eps = (1 - abar).sqrt() * noise / b
        target = eps if kind == "epsilon" else (eps - (1 - abar).sqrt() * x_t) / abar.sqrt()
        empty = model.encode([""]).expand(3, -1, -1)
        conditional, unconditional = (model.denoiser(x_t, t, c).sample for c in (text, empty))
        prediction = unconditional + guidance * (conditional - unconditional)
        expected = (b**2 / (1 - abar) * (prediction - target).square()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert abs(loss - clean) > 0.02 * clean


def test_gradients_reach_only_the_lora(tuned_model):
    x_s, noise = (torch.randn(3, *tuned_model.latent_shape, generator=seeded(i)) for i in (1, 2))
    level_s, t = tuned_model.alpha_sigma(300), torch.tensor([301, 600, 999])
    pgraft.denoising_loss(tuned_model, x_s, level_s, tuned_model.encode(PROMPTS), t, noise, 3.0).backward()
    reached = {
        n for n, p in tuned_model.denoiser.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert reached == set(tuned_model.lora())


# ---------------------------------------------------------------- complete runs


@pytest.fixture(scope="module")
def arguments(tiny_arguments):
    return [*tiny_arguments, *"--probe_prompts 4 --probe_restarts 2 --data xs --save_accepted".split()]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """(folder, what it printed) of a finished run with --switch auto."""
    cwd = tmp_path_factory.mktemp("finished")
    code = exit_code([*arguments, "--output", "run"], cwd, script="pgraft.py")
    out = (cwd / "output.txt").read_text()
    assert code == 0, out
    return cwd / "run", out


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script in an empty folder, return (folder, what it printed)."""

    def run(argv, script="pgraft.py", name="run"):
        monkeypatch.chdir(tmp_path)
        code, out, error = run_inside([*argv, "--output", name], script)
        assert code == 0, error
        return tmp_path / name, out

    return run


def read_probe(folder):
    rows = csv.DictReader((folder / "probe.csv").read_text().splitlines())
    return [{name: float(value) for name, value in row.items()} for row in rows]


def read_json(path):
    return json.loads(path.read_text())


def trained_model(folder, tiny_v, targets="attention"):
    """The model with the LoRA of the run's checkpoint."""
    model = Model(tiny_v, "cpu", torch.float32)
    model.add_lora(4, 16.0, targets, 0)
    trained = torch.load(folder / "checkpoint.pt", weights_only=True)["lora"]
    assert set(trained) == set(model.lora())
    for name, parameter in model.lora().items():
        parameter.data.copy_(trained[name])
    return model


def test_run_prints_the_probe_and_the_switch(finished):
    folder, out = finished
    assert re.search(
        r"^  switch     chosen by probing 4 prompts x 2 states x 2 restarts .*; trained on xs ", out, re.M
    )
    rows = read_probe(folder)
    assert [(row["step"], row["timestep"], row["switch"]) for row in rows] == [
        (1, 749, 0.749),
        (2, 499, 0.499),
        (3, 249, 0.249),
    ]
    printed = re.findall(r"^ +(\d) +(\d+) +([\d.]+) +(-?[\d.]+) +([\d.]+)$", out, re.M)
    assert len(printed) == 3
    for line, row in zip(printed, rows):
        assert [float(v) for v in line] == pytest.approx(list(row.values()), abs=0.006)
    timestep, reason = recommend(rows, pgraft.Args.probe_limit)
    assert f"  recommended: --switch {timestep / 1000:g}, {reason}\n" in out
    switch_at = [749, 499, 249].index(timestep) + 1
    assert f"tuned model for {switch_at} of 4 steps, base model from timestep {timestep:.0f} on" in out
    assert len(re.findall(r"^  round \d/2 .*s left$", out, re.M)) == 2
    for metric in ("jpeg_compressibility", "shapes_graded", "brightness", "diversity"):
        assert re.search(rf"^{metric} +-?\d.* [+-]\d", out, re.M), metric


def test_run_folder(finished, models, tiny_v):
    folder, _ = finished
    files = (
        "args.json metrics.csv results.json curves.png grid.png checkpoint.pt probe.csv probe.png pgraft.json"
    )
    assert {p.name for p in folder.iterdir()} == {
        *files.split(),
        LORA_FILE,
        "inputs.json",
        "tensorboard",
        "accepted",
        ".lock",
    }
    assert np.asarray(Image.open(folder / "probe.png")).std() > 0
    stored, timestep = (
        read_json(folder / "pgraft.json"),
        int(recommend(read_probe(folder), pgraft.Args.probe_limit)[0]),
    )
    abar = models["v"].pipeline.scheduler.alphas_cumprod[timestep].item()
    level = {
        "switch_timestep": timestep,
        "switch": timestep / 1000,
        "alpha": abar**0.5,
        "sigma": (1 - abar) ** 0.5,
    }
    assert {name: stored.pop(name) for name in level} == pytest.approx(level, abs=1e-6)
    assert "above switch_timestep" in stored.pop("rule")
    scheduler = stored.pop("scheduler")
    assert {name: scheduler[name] for name in SCHEDULE} == SCHEDULE and scheduler[
        "timestep_spacing"
    ] == "trailing"
    of_args = {"steps": 4, "guidance": 1.0, "eta": 1.0, "data": "xs"}
    assert stored == {"model": tiny_v, "prediction_type": "v_prediction"} | of_args
    results = read_json(folder / "results.json")
    assert (results["steps"], results["switch_timestep"]) == (4, timestep)
    assert results["switch_at"] == switch_step([999, 749, 499, 249], timestep)
    assert [row["unresolved"] for row in results["probe"]] == [
        row["unresolved"] for row in read_probe(folder)
    ]
    assert any(row["difference"] for row in results["table"])


def test_probe_stops_before_training(arguments, finished, run):
    folder, out = run([*arguments, "--probe", "--lora_rank", "2"])  # on which the probe does not depend
    assert (folder / "probe.csv").read_bytes() == (finished[0] / "probe.csv").read_bytes()
    assert {p.name for p in folder.iterdir()} == {
        "args.json",
        "inputs.json",
        "checkpoint.pt",
        "probe.csv",
        "probe.png",
        ".lock",
    }
    table = out[out.index("\n  step") : out.index("\nIn ")].strip()
    assert table in finished[1] and "base  " not in out and "round 1" not in out


def candidates(model, folder, r, switch_at, tuned):
    """(prompt index, x_s, x_0, reward) of all images sampled in round r."""
    args = SimpleNamespace(**read_json(folder / "args.json"))
    prompts = Path(args.prompts).read_text().splitlines()
    chosen = schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)[r]
    index = [i for i in chosen for _ in range(args.samples)]
    seeds = [derived_seed(args.seed, r, i, j) for i in chosen for j in range(args.samples)]
    noise = draw_noise(seeds, args.steps, model.latent_shape, model.dtype)
    text = model.encode([prompts[i] for i in index])
    x_s, x_0 = sample(model, noise, text, args.guidance, args.eta, switch_at, tuned)
    return torch.tensor(index), x_s, x_0, Reward(args.reward)(model.decode(x_0), [prompts[i] for i in index])


def assert_accepted(accepted, sampled):
    """The best of each group of four, with its own state."""
    index, x_s, x_0, reward = sampled
    best = reward.view(-1, 4).argmax(1) + 4 * torch.arange(len(reward) // 4)
    assert accepted["prompt"].tolist() == index[best].tolist()
    assert torch.allclose(accepted["reward"], reward[best], atol=2e-3)
    assert difference(accepted["x_s"], x_s[best]) <= 1e-4 and difference(accepted["x_0"], x_0[best]) <= 1e-4
    assert difference(x_s[best], x_0[best]) > 0.1


def test_states_of_the_best_images_are_accepted(arguments, finished, run, tiny_v):
    switch_at = read_json(finished[0] / "results.json")["switch_at"]
    accepted = torch.load(finished[0] / "checkpoint.pt", weights_only=True)["accepted"]
    base = Model(tiny_v, "cpu", torch.float32)
    base.add_lora(4, 16.0, "attention", 0)
    assert_accepted(accepted[0], candidates(base, finished[0], 0, switch_at, False))
    # the second round samples the model that the first has tuned, above the switch
    shorter, _ = run([*arguments, "--rounds", "1"])
    model = trained_model(shorter, tiny_v)
    sampled = candidates(model, finished[0], 1, switch_at, True)
    assert_accepted(accepted[1], sampled)
    assert difference(sampled[1], candidates(model, finished[0], 1, switch_at, False)[1]) > 1e-3
    rows = read_metrics(finished[0])
    assert float(rows[1]["reward_sampled"]) == pytest.approx(sampled[3].mean().item(), abs=1e-3)
    # --reference base: the same prompts and seeds from the base model
    other, _ = run([*arguments, "--reference", "base"], name="other")
    newest = torch.load(other / "checkpoint.pt", weights_only=True)["accepted"][1]
    assert_accepted(newest, candidates(base, finished[0], 1, switch_at, False))


@pytest.mark.parametrize("data, guidance", [("xs", 2.0), ("x0", 1.0)])
def test_data_and_levels_of_the_update(arguments, run, tiny_v, monkeypatch, data, guidance):
    """The first update's loss is equation (4) of the accepted data, with guidance and prompt dropout. Later
    ones are of every level above the switch and of no other, with the LoRA on."""
    flags = f"--data {data} --switch 0.8 --rounds 1 --updates 8 --batch 256 --micro_batch 128"
    flags += f" --guidance {guidance} --prompt_dropout 0.4"
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen, predict = [], Model.predict

    def recorded(model, x, t, text, guidance=1.0):
        if torch.is_grad_enabled():
            layers = [m for m in model.denoiser.modules() if isinstance(m, BaseTunerLayer)]
            assert layers and not any(m.disable_adapters or m.merged for m in layers)
            seen.append(t)
        return predict(model, x, t, text, guidance)

    monkeypatch.setattr(Model, "predict", recorded)
    folder, out = run([*arguments, *flags.split()])
    levels = torch.cat(seen)
    assert "tuned model for 1 of 4 steps, base model from timestep 749 on" in out
    assert levels.min() == 750 and levels.max() == 999 and len(levels) == 8 * 256 * guidance

    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    kept, model = state["accepted"][0], Model(tiny_v, "cpu", torch.float32)
    prompts = Path(read_json(folder / "args.json")["prompts"]).read_text().splitlines()
    generator = torch.Generator().manual_seed(derived_seed(0, "update", 0))
    order = torch.cat([torch.randperm(3, generator=generator) for _ in range(8 * 256 // 3 + 1)])[:256]
    noise = torch.randn(256, *model.latent_shape, generator=generator)
    t = torch.randint(750, 1000, (256,), generator=generator)
    drop = torch.rand(256, generator=generator) < 0.4
    text = model.encode(["" if d else prompts[kept["prompt"][i]] for d, i in zip(drop, order)])
    level = model.alpha_sigma(749) if data == "xs" else (1.0, 0.0)
    with torch.no_grad():
        loss = pgraft.denoising_loss(
            model, kept["x_s" if data == "xs" else "x_0"][order], level, text, t, noise, guidance
        )
    assert state["losses"][0] == pytest.approx(loss.item(), rel=1e-4)
    assert (
        read_json(folder / "pgraft.json")["data"] == data
        and read_json(folder / "pgraft.json")["switch_timestep"] == 749
    )


# ---------------------------------------------------------------- the printed code


def execute(code, cwd):
    """In a new process: run code."""
    os.chdir(cwd)
    torch.set_num_threads(1)
    exec(code, {})  # noqa: S102


def printed_code(out):
    code = out[out.index("import json; import torch; from diffusers") :]
    code = code[: code.index('save("tuned.png")') + len('save("tuned.png")')]
    assert len(code.splitlines()) == 13
    return code


def run_code(code, cwd):
    cwd.mkdir(exist_ok=True)
    process = forkserver().Process(target=execute, args=(code, str(cwd)))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return Image.open(cwd / "tuned.png")


def evaluated_image(model, prompt_files, steps, switch_at, tuned=True):
    """The first image of the first held-out prompt, by the script's functions."""
    noise = draw_noise([derived_seed("eval", 0, 0)], steps, model.latent_shape, model.dtype)
    text = model.encode(Path(prompt_files.held_out).read_text().splitlines()[:1])
    return model.decode(sample(model, noise, text, 1.0, 1.0, switch_at, tuned)[1])[0]


def pixels_between(one, other):
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()


def test_printed_code_makes_the_evaluated_image(arguments, run, tiny_v, prompt_files, tmp_path):
    folder, out = run([*arguments, *"--switch 0.6 --lora_targets all --lr 5e-2".split()])
    code = printed_code(out)
    image = run_code(code, tmp_path / "code")
    model = trained_model(folder, tiny_v, "all")
    images = [evaluated_image(model, prompt_files, 4, k) for k in range(5)]
    # every step of the tuned model shows
    assert min(pixels_between(a, b) for a, b in itertools.pairwise(images)) > 0.2
    assert_same_images([image], [images[2]])
    # it reads the switch from pgraft.json
    stored = read_json(folder / "pgraft.json")
    (folder / "pgraft.json").write_text(json.dumps(stored | {"switch_timestep": 749}))
    assert_same_images([run_code(code, tmp_path / "code")], [images[1]])


# ---------------------------------------------------------------- killed and resumed


KILLERS = [
    [("rewards", "jpeg_kilobytes", 20)],  # probing
    [("utils.runs", "save_checkpoint", 1)],  # probed, not saved
    [("utils.runs", "write_csv", 1)],  # probe saved, its table not written
    # pgraft.json has no name yet; round 2 sampled, not saved
    [("os", "replace", 8), ("utils.runs", "save_checkpoint", 2)],
    [("torch.nn.utils", "clip_grad_norm_", 4)],  # last update
]


@pytest.mark.parametrize("killers", KILLERS, ids=lambda k: "+".join(f"{name}{n}" for _, name, n in k))
def test_killed_and_resumed(arguments, finished, tmp_path, killers):
    argv = [*arguments, "--output", "run"]
    for killer in killers:
        assert exit_code(argv, tmp_path, killer, "pgraft.py") == -signal.SIGKILL
        argv = ["--resume", "run"]
    if killers[0][1] == "write_csv":  # the probe need not be made again
        assert "probe" in torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (tmp_path / "run" / "pgraft.json").exists() == (
        len(killers) == 2 or killers[0][1] == "clip_grad_norm_"
    )
    assert exit_code(argv, tmp_path, script="pgraft.py") == 0, (tmp_path / "output.txt").read_text()
    assert_same_run(tmp_path / "run", finished[0])


# ---------------------------------------------------------------- good and bad settings


def test_the_levels_next_to_the_bad_ones_are_good(tiny_arguments, run):
    for level, tuned in (("0.249", 3), ("0.998", 1)):
        folder, out = run([*tiny_arguments, *f"--switch {level} --rounds 1 --updates 1".split()], name=level)
        assert f"tuned model for {tuned} of 4 steps" in out
        assert read_json(folder / "pgraft.json")["switch_timestep"] == [999, 749, 499, 249][tuned]


def test_a_reward_that_never_differs_cannot_be_probed(arguments, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def flat(images, prompts):\n    return [1.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*arguments, "--probe", "--reward", "own.py:flat"], "pgraft.py")
    assert_one_line(code, error.split("\r")[-1].lstrip(), "no reward differ")
