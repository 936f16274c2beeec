"""What few steps of a flow's sampler cost, exactly: SD 3's grid, x_0 ~ N(0.8, S^2), the exact velocity.

A step is then linear in the state and the noise, so mean and variance follow in closed form.
Run: python benchmarks/flow_steps.py   (seconds; prints the table of docs/models.md, and the same for S = 0)
"""

import math
import sys
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pgraft import denoise

STEPS = (10, 28, 50)


class GaussianFlow:
    """x_0 ~ N(M, S^2) and its exact velocity: the part of common.Model that a sampler needs."""

    device, dtype, train_timesteps, prediction_type = "cpu", torch.float32, 1000, "flow"
    M = 0.8

    def __init__(self, std=0.5):
        self.S = std

    def alpha_sigma(self, t):
        """(alpha, sigma) at timestep t; a negative t is the clean level."""
        return 1 - max(t, 0) / 1000, max(t, 0) / 1000

    def velocity(self, x, sigma):
        """E[eps - x_0 | x] at the level sigma."""
        alpha = 1 - sigma
        variance = alpha**2 * self.S**2 + sigma**2
        noise = sigma / variance * (x - alpha * self.M)  # E[eps | x]
        return noise - self.M - alpha * self.S**2 / variance * (x - alpha * self.M)

    def predict(self, x, t, text, guidance):
        """As common.Model.predict."""
        return self.velocity(x.double(), t.item() / 1000)

    def marginal(self, sigma):
        """(mean, variance) of x at the level sigma."""
        return (1 - sigma) * self.M, (1 - sigma) ** 2 * self.S**2 + sigma**2


def linear_step(model, sigma, after, eta):
    """(gain, offset, std) of pgraft.denoise's step from sigma to `after`: x' = gain x + offset + std w."""
    x, noise = (
        torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1),
        torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1, 1),
    )
    levels = [1000 * sigma, 1000 * after if after else -1]
    offset, of_x, of_noise = denoise(model, x, levels, noise, None, 1, eta).flatten().tolist()
    return of_x - offset, offset, of_noise - offset


def flow_grpo_step(model, sigma, after, eta):
    """The same of an Euler-Maruyama step of Flow-GRPO's SDE (arXiv 2505.05470, equation 9), a = sqrt(2) eta.
    At sigma = 1, where its noise is infinite, the noise is taken from the next level."""
    level = after if sigma == 1 else sigma
    h, variance = sigma - after, 2 * eta**2 * level / (1 - level)

    def drift(x):
        v = model.velocity(x, sigma)
        return x - h * (v + variance / (2 * sigma) * (x + (1 - sigma) * v))

    return drift(1.0) - drift(0.0), drift(0.0), math.sqrt(variance * h)


def march(step, sigmas, eta, mean, variance, model):
    """Follow mean and variance along the levels. Returns {sigma: (mean, variance, gain since the start)}."""
    states, gain = {}, 1.0
    for sigma, after in zip(sigmas, sigmas[1:]):
        a, b, std = step(model, sigma, after, eta)
        mean, variance, gain = a * mean + b, a**2 * variance + std**2, a * gain
        states[round(after, 6)] = (mean, variance, gain)
    return states


def distribution_of_samples(step, steps, eta, model):
    """(mean, standard deviation) of the samples on SD 3's grid."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    mean, variance, _ = march(step, scheduler.sigmas.double().tolist(), eta, 0.0, 1.0, model)[0.0]
    return mean, variance**0.5


def table():
    """Markdown: by how much the standard deviation of the samples falls short of x_0's, 0.5."""
    settings = {f"η = {eta:g}": (linear_step, eta) for eta in (0.0, 0.5, 1.0)}
    settings["Flow-GRPO's Euler–Maruyama step, η = 0.5"] = (flow_grpo_step, 0.5)
    model = GaussianFlow()
    rows = [["steps", *settings], ["---"] * (len(settings) + 1)]
    for steps in STEPS:
        stds = [distribution_of_samples(step, steps, eta, model)[1] for step, eta in settings.values()]
        rows.append([str(steps), *(f"{model.S - std:.3f}" for std in stds)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def grain(eta):
    """Standard deviation of the samples by Flow-GRPO's step where x_0 is certain, for each of STEPS."""
    return [distribution_of_samples(flow_grpo_step, steps, eta, GaussianFlow(0.0))[1] for steps in STEPS]


if __name__ == "__main__":
    print(table())
    for eta in (0.5, 1.0):
        values = ", ".join(f"{std:.3f}" for std in grain(eta))
        print(f"x_0 certain, η = {eta}: Flow-GRPO's step leaves {values}")
