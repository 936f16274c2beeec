"""What few steps of a flow's sampler cost, exactly: SD 3's grid, x_0 ~ N(0.8, S^2), the exact velocity. A step is then linear in the
state and the noise, so that mean and variance are followed in closed form; nothing is drawn.

Run: python benchmarks/flow_steps.py   (seconds; the table of the README's "Samplers", and the same for S = 0)
"""

import math
import sys

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from graft_shapes import ROOT, header, line

sys.path.insert(0, str(ROOT))
import pgraft  # noqa: E402

STEPS = (10, 28, 50)


class GaussianFlow:
    """x_0 ~ N(M, S^2) and the exact velocity; the part of common.Model that a sampler needs."""

    device, dtype, train_timesteps, prediction_type = "cpu", torch.float32, 1000, "flow"
    M = 0.8

    def __init__(self, std=0.5):
        self.S = std

    def alpha_sigma(self, t):
        return 1 - max(t, 0) / 1000, max(t, 0) / 1000

    def velocity(self, x, sigma):
        alpha = 1 - sigma
        variance = alpha**2 * self.S**2 + sigma**2
        # E[eps | x] - E[x_0 | x]
        return sigma / variance * (x - alpha * self.M) - self.M - alpha * self.S**2 / variance * (x - alpha * self.M)

    def predict(self, x, t, text):
        return self.velocity(x.double(), t.item() / 1000)

    def law(self, sigma):
        return (1 - sigma) * self.M, (1 - sigma) ** 2 * self.S**2 + sigma**2


def linear_step(model, sigma, after, eta):
    """(gain, offset, std) of pgraft.denoise's step, which is linear in x and the noise."""
    x, noise = torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1, 1), torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1, 1)
    levels = [1000 * sigma, 1000 * after if after else -1]
    offset, one, noisy = pgraft.denoise(model, x, levels, noise, None, 1, eta).flatten().tolist()
    return one - offset, offset, noisy - offset


def flow_grpo_step(model, sigma, after, eta):
    """The same of an Euler-Maruyama step of Flow-GRPO's SDE (arXiv 2505.05470, equation 9) with a = sqrt(2) eta. At sigma = 1,
    where its noise is infinite, it is taken from the next level."""
    level = after if sigma == 1 else sigma
    h, variance = sigma - after, 2 * eta**2 * level / (1 - level)

    def drift(x):
        v = model.velocity(x, sigma)
        return x - h * (v + variance / (2 * sigma) * (x + (1 - sigma) * v))

    return drift(1.0) - drift(0.0), drift(0.0), math.sqrt(variance * h)


def march(step, sigmas, eta, mean, variance, model):
    """{sigma: (mean, variance, gain since the start)}"""
    found, gain = {}, 1.0
    for sigma, after in zip(sigmas, sigmas[1:]):
        a, b, std = step(model, sigma, after, eta)
        mean, variance, gain = a * mean + b, a**2 * variance + std**2, a * gain
        found[round(after, 6)] = (mean, variance, gain)
    return found


def law_of_samples(step, steps: int, eta: float, model: GaussianFlow) -> tuple[float, float]:
    """Mean and standard deviation of the samples on SD 3's grid."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    mean, variance, _ = march(step, scheduler.sigmas.double().tolist(), eta, 0.0, 1.0, model)[0.0]
    return mean, variance**0.5


def table() -> str:
    """Markdown: by how much the standard deviation falls short."""
    lines = [header("steps", "η = 0", "η = 0.5", "η = 1", "Flow-GRPO's Euler–Maruyama step, η = 0.5")]
    for steps in STEPS:
        settings = [(linear_step, 0.0), (linear_step, 0.5), (linear_step, 1.0), (flow_grpo_step, 0.5)]
        found = [law_of_samples(step, steps, eta, GaussianFlow())[1] for step, eta in settings]
        lines.append(line(steps, *(f"{GaussianFlow().S - std:.3f}" for std in found)))
    return "\n".join(lines)


def grain(eta: float) -> list[float]:
    """Standard deviation of the samples where x_0 is certain, by Euler-Maruyama's step, for each of STEPS."""
    return [law_of_samples(flow_grpo_step, steps, eta, GaussianFlow(0.0))[1] for steps in STEPS]


if __name__ == "__main__":
    print(table())
    for eta in (0.5, 1.0):
        print(f"x_0 certain, η = {eta}: Euler–Maruyama leaves " + ", ".join(f"{std:.3f}" for std in grain(eta)))
