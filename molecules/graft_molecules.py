"""x"""
import math
import torch
from molecules.model import atom_mask, project


def training_target(x_0, noise, alpha_t, sigma_t, prediction_type):
    """(x_t, target) of the denoising loss, equation (4). x_0, noise: (batch, ...); alpha_t, sigma_t:
    (batch,). prediction_type: "epsilon", "v_prediction" or "flow"."""
    alpha_t, sigma_t = (level.view(-1, *[1] * (x_0.dim() - 1)) for level in (alpha_t, sigma_t))
    x_t = alpha_t * x_0 + sigma_t * noise
    targets = {"epsilon": noise, "v_prediction": alpha_t * noise - sigma_t * x_0, "flow": noise - x_0}
    return x_t, targets[prediction_type]


@torch.no_grad()
def sample(model, noise, count, eta):
    """Equation (5)."""
    noise, count = noise.to(model.device), count.to(model.device)
    grid = model.levels(len(noise) - 1)
    times = torch.tensor(grid, device=model.device)  # one transfer, none inside the loop
    x = project(noise[0], count)
    for k, t in enumerate(grid):
        alpha, sigma = model.alpha_sigma(t)
        alpha_next, sigma_next = model.alpha_sigma(grid[k + 1] if k + 1 < len(grid) else 0)
        prediction = model.predict(x, times[k], count)
        x_0, eps = alpha * x - sigma * prediction, alpha * prediction + sigma * x
        std = eta * sigma_next / sigma * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))
        x = alpha_next * x_0 + math.sqrt(max(sigma_next**2 - std**2, 0)) * eps + std * project(noise[k + 1], count)
    return x


def denoising_loss(model, x_0, count, level, noise):
    """Equation (4), mean over the numbers of atoms"""
    alpha, sigma = model.alpha_sigma(level)
    x_t, target = training_target(project(x_0, count), project(noise, count), alpha, sigma, model.prediction_type)
    error = (model.predict(x_t, level, count) - target).square().sum()
    return error / (count.sum() * x_0.shape[2])
