"""inverse_noise_correction.py: the inverse and the corrector against closed forms, the sampler against the
stock scheduler, whole runs."""

import copy
import json
import math
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import inverse_noise_correction as inc
from common import Flow, check_flow, derived_seed, model_hash
from conftest import (
    assert_mean,
    assert_one_line,
    assert_same_images,
    assert_same_run,
    environment,
    exit_code,
    read_metrics,
    read_scalars,
    run_inside,
    run_script,
    seeded,
)
from fashion import train
from inverse_noise_correction import (
    Corrector,
    correct,
    count_flops,
    euler_invert,
    euler_sample,
    flow_loss,
    frechet_distance,
    frechet_features,
    interpolant,
    new_network,
    noise_statistics,
)
from utils.images import read_images
from utils.runs import InputError

SCRIPT = "inverse_noise_correction.py"
EVEN = torch.linspace(1, 0, 9, dtype=torch.float64)
UNEVEN = torch.tensor([1, 0.97, 0.8, 0.55, 0.5, 0.2, 0.15, 0], dtype=torch.float64)
GRIDS = pytest.mark.parametrize("sigmas", [EVEN, UNEVEN], ids=["even", "uneven"])
MEMORY = pytest.mark.parametrize("memory", [0, 1, 2, 4])
ONE = torch.ones(1, 1, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def column(sigma, x):
    return sigma.view(-1, *[1] * (x.dim() - 1))


def affine(x, sigma):
    return 0.9 * x - 0.4 + column(sigma, x) * (0.3 * x.flip(1) + 1)


def nonlinear(x, sigma):
    return 1.5 * torch.sin(x + 3 * column(sigma, x)) - 0.5 * x


# ---------------------------------------------------------------- the sampler and its inverse


@GRIDS
def test_euler_sample_is_the_loop(sigmas):
    x, times = randn(3, 2, 4, 4), []

    def velocity(x, sigma):
        assert sigma.shape == (3,) and (sigma == sigma[0]).all()
        times.append(sigma[0].item())
        return nonlinear(x, sigma)

    sampled, expected = euler_sample(velocity, x, sigmas), x
    for k in range(len(sigmas) - 1):
        expected = expected + (sigmas[k + 1] - sigmas[k]) * nonlinear(expected, sigmas[k].repeat(3))
    assert torch.equal(sampled, expected) and times == sigmas[:-1].tolist()


@GRIDS
@MEMORY
@pytest.mark.parametrize("velocity", [affine, nonlinear])
def test_inverse(velocity, sigmas, memory):
    noise = randn(5, 2, 4, 4)
    x = euler_sample(velocity, noise, sigmas)
    inversion = euler_invert(velocity, x, sigmas, 200, 1e-12, memory)
    assert inversion.converged.all() and inversion.residual.max() <= 1e-12
    assert (inversion.noise - noise).abs().max() < 1e-10
    assert len(inversion.iterations) == len(inversion.contraction) == len(sigmas) - 1
    # two maps that are not the inverse: the velocity at the known point, or at the later level
    explicit, late = x, x
    for now, after in reversed(list(zip(sigmas, sigmas[1:]))):
        explicit = explicit - (after - now) * velocity(explicit, now.repeat(5))
    for now, after in reversed(list(zip(sigmas, sigmas[1:]))):
        y = late
        for _ in range(200):
            late = y - (after - now) * velocity(late, after.repeat(5))
    assert (explicit - noise).abs().max() > 1e-2 and (late - noise).abs().max() > 1e-2


@GRIDS
@MEMORY
def test_tolerance_bounds_the_residual_and_the_round_trip(sigmas, memory):
    x = randn(50, 1, 4, 4)
    coarse, fine = (euler_invert(nonlinear, x, sigmas, 200, limit, memory) for limit in (1e-3, 1e-9))
    assert coarse.calls < fine.calls and 1e-9 < coarse.residual.max() <= 1e-3
    errors = [(euler_sample(nonlinear, i.noise, sigmas) - x).abs().max() for i in (coarse, fine)]
    assert 1e-6 < errors[0] < 2e-2 and errors[1] < 1e-7
    assert all(a <= b for a, b in zip(coarse.iterations, fine.iterations))


@MEMORY
def test_contraction_is_the_slope_times_the_step(memory):
    slopes = torch.tensor([0.9, 0.1, 1.5, 2.0, 0.5, 0.05, 1.0], dtype=torch.float64)
    by_level = dict(zip(UNEVEN.tolist(), slopes.tolist()))

    def velocity(x, sigma):
        return by_level[sigma[0].item()] * x

    inversion = euler_invert(velocity, randn(6, 1, 2, 2), UNEVEN, 100, 1e-9, memory)
    assert inversion.contraction == pytest.approx((slopes * -UNEVEN.diff()).tolist(), rel=1e-3)


def test_acceleration_inverts_where_the_plain_iteration_expands():
    """Slopes of -12 on the even grid. T stretches by 2.5, so it has an inverse. The plain iteration expands
    by 1.5 and misses it."""

    def velocity(x, sigma):
        return -12 * x + 0.1 * torch.sin(3 * x)

    noise = 0.01 * randn(6, 1, 2, 2)
    x = euler_sample(velocity, noise, EVEN)
    plain, accelerated = (euler_invert(velocity, x, EVEN, 60, 1e-10, memory) for memory in (0, 2))
    assert not plain.converged.any() and accelerated.converged.all()
    assert (accelerated.noise - noise).abs().max() < 1e-9
    assert accelerated.contraction == pytest.approx([1.5] * 8, abs=0.05)


def test_expanding_step_is_detected_and_spares_the_others():
    """Samples above 1 expand in the last step (slope 9 on an even grid of 8 steps). The others are inverted
    as if they were alone."""

    def velocity(x, sigma):
        steep = (x.mean((1, 2, 3), keepdim=True) > 1) & (column(sigma, x) < 0.2)
        return x * torch.where(steep, 9.0, 0.5)

    x = 0.1 * randn(6, 1, 4, 4) + torch.tensor([2.0, 0, 2, 0, 0, 3]).view(6, 1, 1, 1)
    inversion = euler_invert(velocity, x, EVEN, 40, 1e-10, 0)
    converged = inversion.converged
    assert converged.tolist() == [False, True, False, True, True, False]
    assert (inversion.residual[~converged] > 1e-3).all() and inversion.iterations[-1] == 40
    assert max(inversion.iterations[:-1]) < 40  # nothing is spent on the failed ones afterwards
    alone = euler_invert(velocity, x[converged], EVEN, 40, 1e-10, 0)
    assert torch.equal(alone.noise, inversion.noise[converged]) and alone.converged.all()
    assert inversion.calls == alone.calls + 3 * 40


def test_residual_in_closed_form():
    """v = -0.6 x: the plain iteration's n-th change is (0.6 h)^n x, h the step. Of several steps the worst
    one's last change counts."""

    def invert(x, *sigmas):
        sigmas = torch.tensor(sigmas, dtype=torch.float64)
        return euler_invert(lambda x, sigma: -0.6 * x, x, sigmas, 100, 1e-4, 0)

    x = randn(8, 1, 3, 5) * torch.logspace(0, 1, 8, dtype=torch.float64).view(8, 1, 1, 1)
    inversion = invert(x[:1], 1.0, 0.0)
    expected = 0.6 ** inversion.iterations[0] * x[0].square().mean().sqrt().item()
    assert inversion.residual.item() == pytest.approx(expected)
    last = invert(x, 0.5, 0.0)
    first = invert(last.noise, 1.0, 0.5)
    assert torch.equal(invert(x, 1.0, 0.5, 0.0).residual, torch.maximum(last.residual, first.residual))
    assert (last.residual > first.residual).any() and (last.residual < first.residual).any()


def test_nan_has_not_converged():
    def velocity(x, sigma):
        return torch.where(x[:, :1] > 1, math.nan, 0.3 * x)

    x = torch.tensor([[0.5], [2.0], [-1.0]], dtype=torch.float64)
    assert euler_invert(velocity, x, EVEN, 20, 1e-10, 0).converged.tolist() == [True, False, True]


def test_converged_samples_cost_no_calls():
    """A sample at the fixed point already needs one call a step, the others more."""
    sizes = []

    def velocity(x, sigma):
        sizes.append(len(x))
        return 2 * x

    x = randn(4, 1, 2, 2)
    x[1] = 0
    inversion = euler_invert(velocity, x, EVEN, 100, 1e-6, 0)
    assert inversion.calls == sum(sizes) and sizes[:2] == [4, 3] and sum(sizes) < 4 * len(sizes)
    assert sum(inversion.iterations) == len(sizes)


def test_too_few_iterations_are_not_enough():
    inversion = euler_invert(lambda x, sigma: 4 * x, randn(3, 1, 2, 2), EVEN, 3, 1e-6, 0)
    # the first step that is tried is the last one of the sampler
    assert not inversion.converged.any() and inversion.calls == 9


def test_failed_images_are_left_out_and_counted(tmp_path):
    """Images above 1 cannot be inverted. The others' noises come in order, also from the files of a stopped
    run."""

    def velocity(x, sigma):
        calls.append(len(x))
        return x * torch.where(x.mean((1, 2, 3), keepdim=True) > 1, 20.0, 0.5)

    calls, bad = [], torch.tensor([3, 4, 20])
    x = 0.1 * randn(40, 1, 4, 4).float()
    x[bad] += 3
    flow, sigmas = SimpleNamespace(velocity=velocity), EVEN.float()
    args = SimpleNamespace(sample_batch=16, max_iterations=30, tolerance=1e-5, device="cpu")
    args.memory, args.max_failed = 0, 0.1
    (tmp_path / "args.json").write_text("{}")
    noises, report = inc.invert_images(flow, x, sigmas, args, tmp_path)
    good = torch.tensor([i for i in range(40) if i not in bad])
    assert (report["left_out"], report["images"]) == (3, 40)
    assert torch.allclose(euler_sample(velocity, noises, sigmas), x[good], atol=1e-4)
    assert report["calls"] == euler_invert(velocity, x, sigmas, 30, 1e-5, 0).calls
    assert report["largest_residual"] <= 1e-5
    assert 0 < report["round_trip_error"] < report["largest_round_trip_error"] < 1e-4
    calls.clear()
    again, _ = inc.invert_images(flow, x, sigmas, args, tmp_path)
    assert torch.equal(again, noises) and not calls
    args.max_failed = 0.05
    with pytest.raises(InputError, match="3 of the first 32 images.*--steps"):
        inc.invert_images(flow, x, sigmas, args, tmp_path)


# ---------------------------------------------------------------- the Gaussian case: everything is known


def gaussian_velocity(std):
    """E[eps - x | x_sigma] for images N(0, std^2)."""

    def velocity(x, sigma):
        sigma = column(sigma, x)
        return (sigma - (1 - sigma) * std**2) / (sigma**2 + (1 - sigma) ** 2 * std**2) * x

    return velocity


def sampled_std(std, sigmas):
    """Of T(eps) for the exact velocity of N(0, std^2)."""
    return euler_sample(gaussian_velocity(std), ONE, sigmas).item()


@pytest.mark.parametrize(
    "steps, std, expected", [(8, 0.1, 1.86), (8, 0.5, 1.20), (6, 0.1, 2.33), (16, 0.1, 1.33)]
)
def test_inverted_noise_of_gaussian_images(steps, std, expected):
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    images = std * randn(2000, 1, 2, 2)
    inversion = euler_invert(gaussian_velocity(std), images, sigmas, 100, 1e-10)
    ratio = std / sampled_std(std, sigmas)
    assert torch.allclose(inversion.noise, images / std * ratio)
    assert ratio == pytest.approx(expected, abs=0.01)
    slopes = [gaussian_velocity(std)(ONE, sigma[None]).item() for sigma in sigmas[:-1]]
    assert inversion.contraction == pytest.approx([abs(slope) / steps for slope in slopes], rel=1e-3)
    # the exact flow shrinks images by a(0) / a(sigma) in the last step: no bound for the inverse of Euler's
    last = sigmas[-2]
    exact = abs(std / (last**2 + (1 - last) ** 2 * std**2).sqrt().item() - 1)
    if (steps, std) == (8, 0.1):
        assert inversion.contraction[-1] == pytest.approx(0.62, abs=0.01)
        assert exact == pytest.approx(0.34, abs=0.01)


def corrector_velocity(r):
    """The corrector's exact velocity for z ~ N(0, r^2)."""

    def velocity(y, t):
        t = column(0.5 * math.pi * t, y)
        slope = (r**2 - 1) * t.sin() * t.cos() / (t.cos() ** 2 + r**2 * t.sin() ** 2)
        return 0.5 * math.pi * slope * y

    return velocity


@pytest.mark.parametrize("r", [0.5, 1.0, 1.8])
def test_exact_corrector_has_the_distribution_of_the_noises(r):
    one = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    errors = [abs(correct(corrector_velocity(r), one, n)[0].item() - r) for n in (50, 100, 1000)]
    assert errors[2] < 5e-3 and errors[1] <= 0.6 * errors[0] + 1e-12
    if r == 1:
        assert errors == [0, 0, 0]
    # whole chain: T of the corrected noise has the images' distribution
    std = 0.3
    ratio = std / sampled_std(std, EVEN)
    z = correct(corrector_velocity(ratio), one, 4000)
    assert euler_sample(gaussian_velocity(std), z, EVEN)[0].item() == pytest.approx(std, rel=1e-3)


def test_correct_is_evaluated_at_these_times():
    times = []

    def velocity(y, t):
        times.append(t.tolist())
        return torch.ones_like(y)

    corrected = correct(velocity, torch.zeros(2, 1), 4)
    assert times == [[t, t] for t in (0, 0.25, 0.5, 0.75)] and torch.equal(corrected, torch.ones(2, 1))


def test_interpolant():
    eps, z = randn(7, 2, 3, 3), randn(7, 2, 3, 3, seed=1)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)
    y, slope = interpolant(eps, z, t)
    assert torch.allclose(y[0], eps[0]) and torch.allclose(y[-1], z[-1]) and y.shape == eps.shape
    h = 1e-5
    numerical = (interpolant(eps, z, t + h)[0] - interpolant(eps, z, t - h)[0]) / (2 * h)
    assert torch.allclose(numerical, slope, atol=1e-8)
    angle = math.pi / 6
    third = interpolant(eps, z, torch.full_like(t, 1 / 3))[0]
    assert torch.allclose(third, math.cos(angle) * eps + math.sin(angle) * z)


@pytest.mark.parametrize("r", [1.0, 0.6])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_velocity_is_zero_only_for_standard_noise(r, t):
    """The regression of dy/dt on y is the exact velocity: zero for N(0, I) at every t."""
    times = torch.full((200_000,), t, dtype=torch.float64)
    y, slope = interpolant(randn(200_000, 1), r * randn(200_000, 1, seed=1), times)
    expected = corrector_velocity(r)(ONE, times[:1]).item()
    assert_mean(((slope - expected * y) * y).flatten(), 0.0)
    assert (expected == 0) == (r == 1)


def new_unet(seed=0, size=8, channels=1):
    torch.manual_seed(seed)
    return new_network("unet:4,8", size, channels, channels)


def settings_of(**changed):
    return {"corrector_steps": 3, "scale": 1.7, "normalise": "scale"} | changed


@pytest.mark.parametrize("spec", ["unet:4,8", "token:8,8"])
def test_new_corrector_is_the_control(spec):
    z = 1.7 * randn(400, 1, 4, 4).float() @ randn(4, 4, seed=2).float() + 0.5
    eps = randn(6, 1, 4, 4, seed=1).float()
    scale_only = Corrector(new_network(spec, 4, 2, 2, zero=True), settings_of(), {})
    assert torch.equal(scale_only(eps), 1.7 * eps)
    assert torch.equal(scale_only.standardise(1.7 * eps), 1.7 * eps / 1.7)
    gaussian = Corrector(new_network(spec, 4, 2, 2, zero=True), settings_of(), inc.gaussian_of(z))
    white = gaussian.standardise(z).flatten(1)
    assert white.mean(0).abs().max() < 1e-3 and (torch.cov(white.T) - torch.eye(16)).abs().max() < 1e-2
    assert torch.allclose(gaussian.destandardise(gaussian.standardise(z)), z, atol=1e-3)
    assert torch.equal(gaussian(eps), gaussian.destandardise(eps))
    many = gaussian.destandardise(torch.randn(100_000, 1, 4, 4, generator=seeded(3))).flatten(1)
    assert frechet_distance(many, z.flatten(1)) < 1e-3 * torch.cov(z.flatten(1).T).trace()


class PerChannel(torch.nn.Module):
    """u = y times a polynomial of t, one for each channel: holds the exact velocity of N(0, diag) well
    enough."""

    config = SimpleNamespace()

    def __init__(self, channels):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(6, channels))

    def forward(self, x, t):
        assert x.shape[1] == self.weight.shape[1] + 1  # the norm's plane
        t = t / 500 - 1
        factor = torch.stack([t**k for k in range(6)], 1) @ self.weight
        factor = factor[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return SimpleNamespace(sample=torch.cat([torch.zeros_like(factor), factor], 1))


class OfTheNorm(torch.nn.Module):
    """u = y times a function of the norm's plane and of t."""

    config = SimpleNamespace()

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.SiLU(), torch.nn.Linear(32, 1))

    def forward(self, x, t):
        factor = self.body(torch.stack([x[:, -1, 0, 0], t / 500 - 1], 1))
        factor = factor[:, :, None, None].expand_as(x[:, :1])
        return SimpleNamespace(sample=torch.cat([torch.zeros_like(factor), factor], 1))


def test_corrector_is_told_the_norm():
    """u = a + b y. The extra plane is (|y|^2 / d - 1) sqrt(d / 2). With it alone a distribution on a thin
    shell is learnt."""
    calls = []

    def network(x, t, **_):
        calls.append((x, t))
        a, b = torch.full_like(x[:, :1], 3), torch.full_like(x[:, :1], 2)
        return SimpleNamespace(sample=torch.cat([a, b], 1))

    network.config = SimpleNamespace()
    y = randn(5, 1, 4, 4)
    u = Corrector(network, settings_of(), {}).velocity(y, torch.full((5,), 0.25))
    (inputs, t) = calls[0]
    assert torch.allclose(u, 3 + 2 * y) and torch.equal(inputs[:, :1], y) and (t == 750).all()
    plane = (y.square().mean((1, 2, 3)) - 1) * 8**0.5
    assert torch.allclose(inputs[:, 1], plane[:, None, None].expand(5, 4, 4))

    z = torch.randn(4000, 1, 4, 4, generator=seeded())
    z = z / z.square().mean((1, 2, 3), keepdim=True).sqrt()  # on the sphere
    torch.manual_seed(0)
    corrector = Corrector(OfTheNorm(), settings_of(scale=1.0, corrector_steps=50), {})
    args = SimpleNamespace(device="cpu", batch=256, updates=400, lr=0.01, seed=0)
    args.checkpoint_every = 100
    inc.train_corrector(corrector, z[:400], z[400:], args, {}, lambda: None)
    eps = torch.randn(4000, 1, 4, 4, generator=seeded(1))
    before, after = (x.square().mean((1, 2, 3)).sqrt() for x in (eps, corrector(eps)))
    assert before.std() > 0.15 and after.std() < 0.08 and after.mean().item() == pytest.approx(1, abs=0.03)


def test_match_norms():
    eps, norms = randn(20_000, 1, 3, 4), 2 + torch.rand(5000, generator=seeded(1), dtype=torch.float64)
    matched = inc.match_norms(eps, norms)
    length, before = matched.flatten(1).norm(dim=1), eps.flatten(1).norm(dim=1)
    grid = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    assert torch.allclose(length.quantile(grid), norms.quantile(grid), atol=0.02)
    assert torch.equal(length.argsort(), before.argsort())
    assert torch.allclose(matched / eps, (length / before)[:, None, None, None])


def test_learnt_corrector_has_the_known_distribution():
    """z ~ N(0, diag(0.6, 1.4)^2): the trained corrector's noises have these deviations, those of the
    scale-only control do not."""
    stds = torch.tensor([0.6, 1.4]).view(1, 2, 1, 1)
    z = stds * torch.randn(3000, 2, 1, 1, generator=seeded())
    scale = z.square().mean().sqrt().item()
    corrector = Corrector(PerChannel(2), settings_of(scale=scale, corrector_steps=50), {})
    args = SimpleNamespace(device="cpu", batch=256, updates=300, lr=0.05, seed=0)
    args.checkpoint_every = 50
    state, saved = {}, []
    inc.train_corrector(corrector, z[:300], z[300:], args, state, lambda: saved.append(state["update"]))
    assert saved == [50, 100, 150, 200, 250, 300] == [row["update"] for row in state["rows"][1:]]
    sampled = corrector(torch.randn(20_000, 2, 1, 1, generator=seeded(1)))
    assert sampled.std((0, 2, 3)).tolist() == pytest.approx([0.6, 1.4], rel=0.06)
    assert state["best"] < state["rows"][0]["held_out"] - 0.05
    # E |dy/dt|^2, z / s having variance 1
    assert state["rows"][0]["held_out"] == pytest.approx((math.pi / 2) ** 2, rel=0.2)


def test_best_held_out_weights_are_kept():
    """30 noises and many updates: the held-out loss rises again. The kept weights are those of the least one,
    at worst the control's."""
    z = torch.randn(40, 2, 1, 1, generator=seeded())
    corrector = Corrector(PerChannel(2), settings_of(), {})
    args = SimpleNamespace(device="cpu", batch=30, updates=60, lr=0.3, seed=0)
    args.checkpoint_every = 10
    state = {}
    inc.train_corrector(corrector, z[:10], z[10:], args, state, lambda: None)
    losses = [row["held_out"] for row in state["rows"]]
    assert state["best"] == min(losses) < losses[-1]
    for name, value in corrector.network.state_dict().items():
        assert torch.equal(value, state["final"][name])
    assert not {"optimizer", "average"} & set(state)


# ---------------------------------------------------------------- measures


def exactly(mean, covariance, count=500, seed=0):
    """A sample whose mean and covariance are exactly these."""
    x = randn(count, len(mean), seed=seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return mean + x @ torch.linalg.cholesky(covariance).T


def test_frechet_distance_of_gaussians():
    d = 5
    one = torch.eye(d, dtype=torch.float64)
    roots = [randn(d, d, seed=s) for s in (1, 2)]
    s1, s2 = (root @ root.T + 0.1 * one for root in roots)
    m1, m2 = randn(d, seed=3), randn(d, seed=4)
    # trace of the root of a product that is not symmetric
    cross = torch.linalg.eigvals(s1 @ s2).real.sqrt().sum()
    expected = ((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * cross).item()
    a, b = exactly(m1, s1), exactly(m2, s2, 700, 5)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a.float(), a.flip(0)) == pytest.approx(0, abs=1e-5)
    wider = exactly(m1, 9 * one, seed=6)
    assert frechet_distance(exactly(m1, 4 * one), wider) == pytest.approx(d, rel=1e-9)  # d (3 - 2)^2
    moved = exactly(m1 + 2, one)
    assert frechet_distance(exactly(m1, one), moved) == pytest.approx(4 * d, rel=1e-9)
    few = randn(4, d)  # fewer than dimensions: singular
    assert frechet_distance(few, few + 1) == pytest.approx(d, rel=1e-6)


def test_noise_statistics():
    standard = noise_statistics(randn(4000, 1, 16, 16))
    expected = {"norm": 1, "norm_spread": 1 / math.sqrt(512), "mean": 0, "variance": 1, "kurtosis": 3}
    expected |= {f"{name}_{lag}": 0 for name in ("correlation", "energy_correlation") for lag in (1, 2)}
    assert standard == pytest.approx(expected, abs=0.02)
    white = randn(4000, 1, 16, 17, seed=1)
    # correlated along rows only: one half, half of that with columns
    smooth = noise_statistics((white[..., 1:] + white[..., :-1]) / math.sqrt(2))
    correlations = [smooth[name] for name in ("correlation_1", "correlation_2", "energy_correlation_1")]
    assert correlations == pytest.approx([0.25, 0, 0.125], abs=0.02)
    scale = torch.where(torch.rand(4000, 1, 1, 1, generator=seeded()) < 0.5, 0.5, 1.5).double()
    mixture = noise_statistics(scale * randn(4000, 1, 16, 16) + 0.3)
    # E s^4 / (E s^2)^2 = 2.5625 / 1.5625
    assert mixture["kurtosis"] == pytest.approx(3 * 2.5625 / 1.5625, rel=0.02)
    assert mixture["mean"] == pytest.approx(0.3, abs=0.02)
    norm = (math.sqrt(0.25 + 0.09) + math.sqrt(2.25 + 0.09)) / 2  # the mean of two norms, no root mean square
    assert mixture["norm"] == pytest.approx(norm, abs=0.02)
    assert mixture["energy_correlation_1"] == pytest.approx(1 / 6.125, rel=0.05)
    assert abs(mixture["correlation_1"]) < 0.02
    assert mixture["variance"] == pytest.approx(1.25, rel=0.05) and mixture["norm_spread"] > 0.3
    columns = 2 * (-1.0) ** torch.arange(16)  # every pixel about a mean of its own
    striped = noise_statistics(randn(4000, 1, 16, 16) + columns)
    assert striped["variance"] == pytest.approx(1, abs=0.02)
    assert abs(striped["correlation_1"]) < 0.02 and striped["kurtosis"] == pytest.approx(3, abs=0.05)


def test_count_flops():
    linear, conv = torch.nn.Linear(5, 7), torch.nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(lambda: linear(torch.ones(11, 5))) == 2 * 11 * 5 * 7
    assert count_flops(lambda: conv(torch.ones(2, 3, 6, 6))) == 2 * 2 * 36 * 3 * 9 * 8
    q = torch.ones(1, 2, 10, 4)
    attention = count_flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention == 2 * 2 * 2 * 10 * 10 * 4


# ---------------------------------------------------------------- stock models


def save_flow(folder, network, **scheduler):
    from diffusers import FlowMatchEulerDiscreteScheduler

    train.save_flow(Flow(network, FlowMatchEulerDiscreteScheduler(**scheduler), "cpu"), folder)
    return str(folder)


def damped(network):
    network.conv_out.weight.data *= 0.1
    return network


def tiny_transformer():
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "num_layers": 1, "norm_num_groups": 1}
    sizes |= {"num_embeds_ada_norm": 5, "num_attention_heads": 2, "attention_head_dim": 8}
    return DiTTransformer2DModel(attention_bias=True, **sizes)


@pytest.fixture(scope="module")
def tiny_flow(tmp_path_factory):
    """Folder of a UNet2DModel flow with random weights, 8 x 8 grey, that can be inverted in 3 steps."""
    return save_flow(tmp_path_factory.mktemp("flows") / "tiny", damped(new_unet()))


@pytest.mark.parametrize(
    "kind, power, shift",
    [("unet", 1.0, 1.0), ("unet", 0.7, 1.0), ("unet", 1.0, 3.0), ("transformer", 1.0, 1.0)],
)
def test_euler_sample_equals_the_stock_scheduler(tmp_path, kind, power, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    network = new_unet() if kind == "unet" else tiny_transformer()
    folder = save_flow(tmp_path / "flow", network, shift=shift)
    flow = Flow.load(folder, "cpu")
    assert check_flow(folder) == flow.shape == (1, 8, 8)
    noise = torch.randn(3, 1, 8, 8, generator=seeded())
    sampled = euler_sample(flow.velocity, noise, flow.grid(5, power))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[(k / 5) ** power for k in (5, 4, 3, 2, 1)])
    x = noise
    for t in scheduler.timesteps:
        labels = {} if kind == "unet" else {"class_labels": torch.tensor([5] * 3)}
        with torch.no_grad():
            x = scheduler.step(flow.network(x, t.expand(3), **labels).sample, t, x).prev_sample
    assert torch.allclose(sampled, x, atol=1e-6) and (sampled - noise).abs().max() > 0.1
    expected = torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 0]) ** power
    assert torch.allclose(flow.grid(5, power), shift * expected / (1 + (shift - 1) * expected))


@pytest.mark.parametrize(
    "levels", [(1, 0.5, 0.5, 0), (1, 0.4, 0.6, 0), (0.9, 0.5, 0.2, 0), (1, 0.5, 0.2, 0.1)]
)
def test_levels_that_do_not_fall_from_1_to_0(tiny_flow, levels):
    flow = Flow.load(tiny_flow, "cpu")
    sigmas = torch.tensor(levels, dtype=torch.float32)
    flow.scheduler = SimpleNamespace(sigmas=sigmas, set_timesteps=lambda sigmas: None)
    with pytest.raises(InputError, match="levels do not fall from 1 to 0"):
        flow.grid(3, 1.0)


def test_grid_is_even_unlike_the_schedulers_own(tiny_flow):
    flow = Flow.load(tiny_flow, "cpu")
    assert not any(p.requires_grad for p in flow.network.parameters())  # it is frozen
    assert torch.allclose(flow.grid(8, 1.0), EVEN.float())
    flow.scheduler.set_timesteps(8)
    assert flow.scheduler.sigmas[-2] < 0.01


def test_flow_loss():
    """Its minimiser is E[eps - x | x_sigma]: for Gaussian images the known velocity beats changed ones."""
    x, eps = 0.3 * randn(50_000, 1), randn(50_000, 1, seed=1)
    sigma = torch.rand(50_000, generator=seeded(2), dtype=torch.float64)
    exact = gaussian_velocity(0.3)
    best = flow_loss(exact, x, eps, sigma)
    for other in (
        lambda x, s: 1.05 * exact(x, s),
        lambda x, s: exact(x, 1 - s),
        lambda x, s: -exact(x, s),
        lambda x, s: exact(x, s) + 0.1,
    ):
        assert flow_loss(other, x, eps, sigma) > best + 1e-3


def test_flow_objective():
    """The loss of a batch of images drawn at random, sigma uniform."""
    images = randn(50, 1, 2, 2).float()
    flow = SimpleNamespace(velocity=lambda x, sigma: column(sigma, x) * x, device="cpu")
    value, generator = inc.flow_objective(flow, images, 20)(seeded(3)), seeded(3)
    x = images[torch.randint(50, (20,), generator=generator)]
    eps = torch.randn(x.shape, generator=generator)
    sigma = column(torch.rand(20, generator=generator), x)
    expected = (sigma * ((1 - sigma) * x + sigma * eps) - (eps - x)).square().mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_fit():
    """Adam with clipped gradients, a warm-up and a cosine; at a yield the network holds averaged weights."""

    def loss(network, generator):
        x = torch.randn(8, 3, generator=generator)
        factor = 10 ** (4 * torch.rand((), generator=generator) - 2)  # some gradients are clipped, some not
        return factor * (network(x) - x.sum(1, keepdim=True)).square().mean()

    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    expected = copy.deepcopy(network)
    optimizer, norms = torch.optim.Adam(expected.parameters()), []
    average, averages, weights = [p.detach().clone() for p in expected.parameters()], [], []
    for i in range(7):
        optimizer.param_groups[0]["lr"] = 0.5 * (i + 1) / 100 * 0.5 * (1 + math.cos(math.pi * i / 7))
        optimizer.zero_grad()
        loss(expected, seeded(derived_seed(0, "name", i))).backward()
        norms.append(torch.cat([p.grad.flatten() for p in expected.parameters()]).norm().item())
        for p in expected.parameters():
            p.grad *= min(1, 1 / norms[-1])
        optimizer.step()
        share = (i + 1) / (i + 10)
        average = [share * a + (1 - share) * p.detach() for a, p in zip(average, expected.parameters())]
        averages.append(average)
        weights.append([p.detach().clone() for p in expected.parameters()])
    assert min(norms) < 1 and max(norms) > 2

    def assert_close(parameters, others):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, others, strict=True))

    state, yields = {}, []
    training = inc.fit(network, lambda generator: loss(network, generator), 7, 0.5, (0, "name"), state, 3)
    for update in training:
        yields.append(update)
        assert_close(network.parameters(), averages[update - 1])
        stored = averages if update == 7 else weights  # what is trained on; at the end the average
        assert_close(state["weights"].values(), stored[update - 1])
    assert yields == [3, 6, 7] and len(state["losses"]) == 7
    assert_close(network.parameters(), averages[-1])
    assert not any(p.requires_grad for p in network.parameters())


def test_model_hash(tiny_flow):
    first, again, other = damped(new_unet()), Flow.load(tiny_flow, "cpu").network, damped(new_unet())
    assert model_hash(first) == model_hash(again)
    other.conv_out.bias.data[0] += 1e-6
    assert model_hash(first) != model_hash(other)
    layer = torch.nn.Linear(2, 2)
    hashes = {model_hash(torch.nn.ModuleDict({name: layer})) for name in ("a", "b")}
    assert len(hashes) == 2 and model_hash(layer) not in hashes  # the same numbers under other names


def test_timesteps_of_a_scheduler_with_another_number_of_them(tiny_flow):
    flow, seen = Flow.load(tiny_flow, "cpu"), []
    flow.scheduler = flow.scheduler.from_config(flow.scheduler.config, num_train_timesteps=500)
    flow.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    flow.velocity(torch.zeros(2, *flow.shape), torch.tensor([1.0, 0.3]))
    assert torch.allclose(seen[0], torch.tensor([500.0, 150.0]))


# ---------------------------------------------------------------- images of a folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of 90 small images, some colour, some not square."""
    folder, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    (folder / "subfolder").mkdir(parents=True)
    for i in range(90):
        pixels = rng.normal(128, 25, (12, 12 + i % 3, 3)) + rng.uniform(-40, 40)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / ("subfolder" if i % 2 else ".") / f"{i:03d}.png")
    (folder / "notes.txt").write_text("no image")
    return str(folder)


def images_of(data, shape=(1, 8, 8), **changed):
    """load_images for these settings."""
    settings = {
        "data_noise": 0.0,
        "reference_share": 0.5,
        "images": 40,
        "eval_images": 20,
        "seed": 0,
    } | changed
    files = inc.find_enough_images(data, settings["reference_share"])
    return inc.load_images(SimpleNamespace(**settings), shape, files)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8)])
def test_load_images(data, shape):
    sizes = {"reference_share": 0.4, "images": 30, "eval_images": 25}
    images = images_of(data, shape, **sizes)
    counts = {"reference": 36, "train": 54, "invert": 30, "floor": 25}
    assert {name: tuple(x.shape) for name, x in images.items()} == {
        name: (count, *shape) for name, count in counts.items()
    }
    everything = torch.cat([images["reference"], images["train"]])
    assert len(everything.unique(dim=0)) == 90 and -1 <= everything.min() < -0.3 < 0.3 < everything.max() <= 1
    assert torch.equal(images["train"][:30], images["invert"])
    image = Image.open(f"{data}/000.png")
    assert image.size == (12, 12)
    image = image.convert("L" if shape[0] == 1 else "RGB").resize((8, 8), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, float).reshape(8, 8, -1)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    assert (everything - expected).abs().amax((1, 2, 3)).min() < 1e-6
    noisy = images_of(data, shape, **sizes, data_noise=0.2)
    for name, x in images.items():
        assert (noisy[name] - x).std().item() == pytest.approx(0.2, rel=0.1)


def test_the_middle_square_is_taken(tmp_path):
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes.swapaxes(0, 1)).save(tmp_path / "high.png")
    images = read_images([tmp_path / "wide.png", tmp_path / "high.png"], (1, 10, 10))
    assert images.shape == (2, 1, 10, 10) and (images == 1).all()


@pytest.mark.parametrize("share, enough", [(0.2, False), (0.3, True), (0.7, True), (0.8, False)])
def test_images_for_both_sides(data, share, enough):
    """Of 90 images, 20 must be left on each side."""
    if enough:
        assert len(inc.find_enough_images(data, share)) == 90
    else:
        with pytest.raises(InputError, match="90 images are too few, 20 to invert and 20 as reference"):
            inc.find_enough_images(data, share)


# ---------------------------------------------------------------- one run, in a process of its own


@pytest.fixture(scope="module")
def arguments(tiny_flow, data):
    """The shortest run that does everything; later arguments replace earlier ones."""
    sizes = "--steps 3 --images 40 --sample_batch 16 --eval_images 20 --batch 8 --eval_corrector_steps 3"
    training = "--corrector_network unet:4 --corrector_steps 2 --updates 5 --checkpoint_every 2 --lr 0.01"
    data = f"--model {tiny_flow} --data {data} --data_noise 0 --features pixels"
    return f"{data} --device cpu {sizes} {training}".split()


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """(folder, stdout) of a finished run."""
    cwd = tmp_path_factory.mktemp("finished")
    done = run_script([*arguments, "--output", "run"], cwd, SCRIPT)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in cwd.iterdir()] == ["run"]
    return cwd / "run", done.stdout


def test_run_folder_and_metrics(finished):
    folder, out = finished
    files = "args.json inputs.json checkpoint.pt curve.png grid.png metrics.csv noise.png results.json .lock"
    assert {p.name for p in folder.iterdir()} == {*files.split(), "tensorboard", "corrector", "inversion"}
    rows = read_metrics(folder)
    assert [row["update"] for row in rows] == ["0", "2", "4", "5"]
    assert rows[0]["held_out"] == rows[0]["identity"] == rows[3]["identity"]
    assert rows[1]["held_out"] != rows[2]["held_out"]
    for tag, points in read_scalars(folder).items():
        expected = [(int(row["update"]), pytest.approx(float(row[tag]), rel=1e-5)) for row in rows[1:]]
        assert points == expected
    for name in ("curve.png", "grid.png", "noise.png"):
        assert np.asarray(Image.open(folder / name)).std() > 0
    for word in ("model", "sampler", "inversion", "corrector", "evaluation", "inverted", "control"):
        assert f"\n  {word} " in out, word


def evaluation_noise():
    """(20, 1, 8, 8), the noise that the arms of a run start from."""
    draws = [torch.randn(1, 8, 8, generator=seeded(derived_seed("eval", i))) for i in range(20)]
    return torch.stack(draws)


def test_results(finished, tiny_flow, data):
    """Every row of the table made again: what it starts from, how many steps, its FLOPs, its distance."""
    folder, out = finished
    results = json.loads((folder / "results.json").read_text())
    images, flow = images_of(data), Flow.load(tiny_flow, "cpu")
    sigmas = flow.grid(3, 1.0)
    inversion, report = euler_invert(flow.velocity, images["invert"], sigmas, 60, 1e-3), results["inversion"]
    assert inversion.converged.all() and report["left_out"] == 0 and report["images"] == 40
    assert report["calls"] == inversion.calls
    error = euler_sample(flow.velocity, inversion.noise, sigmas) - images["invert"]
    error = error.square().flatten(1).mean(1).sqrt()
    assert report["round_trip_error"] == pytest.approx(error.mean().item(), rel=1e-2)
    assert 0 < report["largest_round_trip_error"] < 1e-2
    noises = inversion.noise[10:]  # the first ten choose the weights
    assert results["scale"] == pytest.approx(noises.square().mean().sqrt().item(), rel=1e-5)
    assert results["noise"]["inverted"] == pytest.approx(noise_statistics(inversion.noise), rel=1e-4)

    corrector = Corrector.load(folder / "corrector", flow.network, set_grid(flow, 3))
    control = Corrector(None, {}, inc.gaussian_of(noises))
    mean, root = control.gaussian["mean"], control.gaussian["root"]
    eps = evaluation_noise()
    gaussian = (mean + eps.flatten(1) @ root).view_as(eps)
    matched_norms = inc.match_norms(eps, control.standardise(noises).flatten(1).norm(dim=1))
    matched_norms = (mean + matched_norms.flatten(1) @ root).view_as(eps)
    call = count_flops(lambda: flow.velocity(eps[:1], sigmas[:1]))
    correction = count_flops(lambda: corrector.velocity(eps[:1], torch.zeros(1)))
    matched = math.ceil((3 * call + 2 * correction) / call)
    assert results["matched_steps"] == matched
    expected = [("base", eps, k, k * call) for k in sorted({3, matched, 6, 12})]
    expected += [("base trained on", None, k, k * call) for k in sorted({3, matched})]
    expected += [("scale only", results["scale"] * eps, 3, 3 * call)]
    expected += [("gaussian", gaussian, 3, 3 * call + 2 * 64 * 64)]
    expected += [("gaussian, norms matched", matched_norms, 3, 3 * call + 2 * 64 * 64)]
    expected += [("corrector", corrector(eps), 3, 3 * call + 2 * correction)]
    expected += [("corrector, M = 3", corrector(eps, 3), 3, 3 * call + 3 * correction)]
    measure = frechet_features("pixels", "cpu", 7)
    reference = measure(images["reference"])
    table = results["table"]
    assert [(row["arm"], row["steps"]) for row in table] == [(name, k) for name, _, k, _ in expected]
    for row, (name, z, k, flops) in zip(table, expected):
        assert row["flops"] == flops, name
        if z is not None:
            sampled = measure(euler_sample(flow.velocity, z, flow.grid(k, 1.0)))
            assert row["fd"] == pytest.approx(frechet_distance(reference, sampled), rel=1e-4), name
        assert f"{row['fd']:>18.4f}" in out
    floor = frechet_distance(reference, measure(images["floor"]))
    assert results["floor"] == pytest.approx(floor, rel=1e-6)
    values = {(row["arm"], row["steps"]): row["fd"] for row in table}
    assert values["base", 3] != values["base trained on", 3] and len(set(values.values())) == len(values)
    assert results["corrector"]["flops"] == 2 * correction
    training = results["training_flops"]
    assert training["inversion"] == inversion.calls * call
    corrector.network.requires_grad_(True)
    update = count_flops(lambda: corrector.velocity(torch.zeros(8, 1, 8, 8), torch.zeros(8)).sum().backward())
    assert training["corrector"] == 5 * update
    flow.network.requires_grad_(True)
    update = count_flops(lambda: flow.network(torch.zeros(8, 1, 8, 8), 0.0).sample.sum().backward())
    assert f"trained on for {round(sum(training.values()) / update)} updates" in out


def set_grid(flow, steps):
    flow.grid(steps, 1.0)
    return flow.scheduler


def test_snippet_makes_the_evaluated_image(finished, tmp_path):
    folder, out = finished
    snippet = out[out.index("import sys, torch; from diffusers") :]
    command = [sys.executable, "-c", snippet]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=300)
    rows = torch.load(folder / "checkpoint.pt", weights_only=True)["rows"]
    images = [next(row["images"][0] for row in rows if row["arm"] == arm) for arm in ("corrector", "base")]
    expected, base = (((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy() for x in images)
    assert_same_images([Image.open(tmp_path / "corrected.png")], [Image.fromarray(expected)])
    assert np.abs(expected.astype(float) - base).mean() > 0.5


def test_corrector_refuses_another_model_or_grid(finished, tiny_flow):
    folder, _ = finished
    flow = Flow.load(tiny_flow, "cpu")
    Corrector.load(folder / "corrector", flow.network, set_grid(flow, 3))
    with pytest.raises(InputError, match="another model"):
        Corrector.load(folder / "corrector", new_unet(seed=1), set_grid(flow, 3))
    with pytest.raises(InputError, match=r"3 steps .* set to 4 .*\(k / 3\) for k in range\(3, 0, -1\)"):
        Corrector.load(folder / "corrector", flow.network, set_grid(flow, 4))
    with pytest.raises(InputError, match="no corrector.json"):
        Corrector.load(folder, flow.network, set_grid(flow, 3))
    flow.scheduler.set_timesteps(3)  # the scheduler's own three levels
    with pytest.raises(InputError, match="set_timesteps"):
        Corrector.load(folder / "corrector", flow.network, flow.scheduler)


# ---------------------------------------------------------------- killed and resumed


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("uninterrupted")
    code = exit_code([*arguments, "--output", "run"], cwd, script=SCRIPT)
    assert code == 0, (cwd / "output.txt").read_text()
    return cwd / "run"


def test_same_arguments_same_run(finished, uninterrupted):
    assert_same_run(finished[0], uninterrupted)


KILLERS = [  # one after the other, each in the run that goes on from the one before
    ("os", "fsync", 3),  # in the middle of writing the second batch's noises
    ("torch.nn.utils", "clip_grad_norm_", 4),  # between two updates of the corrector, two are saved
    ("utils.runs", "write_csv", 2),
    ("utils.runs", "save_checkpoint", 1),
    # one update of the corrector, then the base trained on: two are saved
    ("torch.nn.utils", "clip_grad_norm_", 4),
    ("torch.linalg", "eigvalsh", 3),  # in the evaluation, one row is saved
    ("utils.figures", "save_figure", 2),  # the end
]


def test_killed_and_resumed(arguments, uninterrupted, tmp_path):
    argv = [*arguments, "--output", "run"]
    for killer in KILLERS:
        assert exit_code(argv, tmp_path, killer, SCRIPT) == -signal.SIGKILL, killer
        argv = ["--resume", "run"]
    assert exit_code(argv, tmp_path, script=SCRIPT) == 0, (tmp_path / "output.txt").read_text()
    assert_same_run(tmp_path / "run", uninterrupted)


# ---------------------------------------------------------------- a flow of your own images


def test_flow_trained_on_a_folder(arguments, data, tmp_path, monkeypatch):
    """fashion/train.py trains on the images that are no reference, RGB; its flow can be corrected."""
    monkeypatch.chdir(tmp_path)
    trained_on, train_flow = [], train.train_flow
    monkeypatch.setattr(
        train, "train_flow", lambda args, images: trained_on.append(images) or train_flow(args, images)
    )
    settings = {"data": data, "size": 8, "channels": 3, "data_noise": 0.5, "network": "unet:4,4"}
    args = train.Args(out=tmp_path / "flow", updates=5, batch=8, device="cpu", **settings)
    train.main(args)
    assert torch.equal(trained_on[0], images_of(data, (3, 8, 8), data_noise=0.5)["train"])
    assert {p.name for p in (tmp_path / "flow").iterdir()} == {"unet", "scheduler"}
    flow = Flow.load("flow", "cpu")
    assert flow.shape == check_flow("flow") == (3, 8, 8)
    with pytest.raises(InputError, match="flow/unet exists: remove it or choose another --out"):
        train.main(args)

    flags = "--model flow --steps 20 --data_noise 0.5 --eval_steps 20 --max_failed 0.5 --no-longer"
    argv = [*arguments, *flags.split(), "--eval_corrector_steps", "--output", "run"]
    code, _, error = run_inside(argv, SCRIPT)
    assert code == 0, error
    corrector = Corrector.load("run/corrector", flow.network, set_grid(flow, 20))
    assert corrector(torch.zeros(2, 3, 8, 8)).shape == (2, 3, 8, 8)
    arms = [row["arm"] for row in json.loads((tmp_path / "run" / "results.json").read_text())["table"]]
    assert arms == ["base", "scale only", "gaussian", "gaussian, norms matched", "corrector"]


# ---------------------------------------------------------------- flags


@pytest.fixture
def run_with(arguments, tmp_path, monkeypatch):
    """(folder, results.json) of a run with further flags."""
    monkeypatch.chdir(tmp_path)

    def run(flags):
        code, _, error = run_inside([*arguments, *flags.split(), "--output", "run"], SCRIPT)
        assert code == 0, error
        return tmp_path / "run", json.loads((tmp_path / "run" / "results.json").read_text())

    return run


def distances(results):
    return {(row["arm"], row["steps"]): row["fd"] for row in results["table"]}


def test_gaussian_start(finished, tiny_flow, run_with):
    folder, results = run_with("--normalise gaussian --corrector_network token:8,8")
    before, after = distances(json.loads((finished[0] / "results.json").read_text())), distances(results)
    same = {key for key in before if after.get(key) == pytest.approx(before[key], rel=1e-6)}
    assert {("scale only", 3), ("gaussian", 3), ("base", 3)} <= same and ("corrector", 3) not in same
    assert (folder / "corrector" / "gaussian.safetensors").is_file()
    flow = Flow.load(tiny_flow, "cpu")
    assert Corrector.load(folder / "corrector", flow.network, set_grid(flow, 3)).gaussian


def test_other_grid_and_noise(finished, tiny_flow, data, run_with):
    """--grid_power is the grid of the N steps only: the base's other numbers of steps are even."""
    _, results = run_with("--grid_power 1.5 --data_noise 0.1 --no-longer --seed 3")
    first = json.loads((finished[0] / "results.json").read_text())
    before, after = distances(first), distances(results)
    assert before["base", 3] != after["base", 3] and ("base trained on", 3) not in after
    assert first["floor"] != results["floor"] and first["scale"] != results["scale"]
    flow, measure = Flow.load(tiny_flow, "cpu"), frechet_features("pixels", "cpu", 20)
    reference = measure(images_of(data, data_noise=0.1)["reference"])
    for steps, power in ((3, 1.5), (6, 1.0)):
        sampled = measure(euler_sample(flow.velocity, evaluation_noise(), flow.grid(steps, power)))
        assert after["base", steps] == pytest.approx(frechet_distance(reference, sampled), rel=1e-6)


def test_a_batch_of_which_none_is_inverted_stops_the_run(arguments, tmp_path, monkeypatch):
    """Of a transformer, which cannot be called with an empty batch."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    folder = save_flow(tmp_path / "flow", new_network("token:8,8", 8, 1, 1))
    flags = "--images 40 --sample_batch 20 --max_iterations 2 --tolerance 1e-6 --output run"
    code, _, error = run_inside([*arguments, "--model", folder, *flags.split()], SCRIPT)
    named = "20 of the first 20 images could not be inverted"
    assert_one_line(code, error.split("\r")[-1].lstrip(), named)


def test_too_many_failures_stop_the_run(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--max_iterations 1 --tolerance 1e-6 --output run"
    code, _, error = run_inside([*arguments, *flags.split()], SCRIPT)
    assert_one_line(code, error.split("\r")[-1].lstrip(), "--data_noise")
    assert not list((tmp_path / "run").rglob("corrector*"))


def test_damaged_image_is_named(arguments, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "images")
    (tmp_path / "images" / "000.png").write_bytes(b"no image")
    code, _, error = run_inside([*arguments, "--data", "images"], SCRIPT)
    assert_one_line(code, error.split("\r")[-1].lstrip(), "000.png")


def test_features_inception_are_asked_for_as_the_package_wants(monkeypatch):
    """uint8 RGB in, the first of a tuple out; the package itself is not needed here."""
    asked = []

    class Extractor(torch.nn.Module):
        def __init__(self, name, features):
            super().__init__()
            asked.extend([name, features])

        def forward(self, x):
            assert x.dtype == torch.uint8 and x.shape[1:] == (3, 8, 8)
            return (x.float().flatten(1)[:, :4],)

    module = SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    features = frechet_features("inception", "cpu", 4)
    x = torch.linspace(-1.2, 1.2, 10 * 64).view(10, 1, 8, 8)
    assert features(x).shape == (10, 4) and features(x).min() == 0 and features(x).max() <= 255
    assert asked == ["inception-v3-compat", ["2048"]]
