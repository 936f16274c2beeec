"""benchmarks/ddpo.py: the log-density against a closed form, the gradient against a finite difference, the
sampler against graft.py's."""

import shutil
from types import SimpleNamespace

import pytest
import torch

import ddpo
import graft
import utils.runs
from common import draw_noise
from conftest import (
    PROMPTS,
    SEEDS,
    arguments_for,
    assert_one_line,
    assert_same_run,
    difference,
    randomise,
    run_inside,
    seeded,
    with_lora,
)

SCRIPT = "benchmarks/ddpo.py"


class Line:
    """A model of one number with one weight, for which everything is known: predicts eps = weight x."""

    prediction_type, device = "epsilon", "cpu"

    def __init__(self, weight):
        self.weight = torch.tensor(weight, dtype=torch.float64, requires_grad=True)

    def predict(self, x, t, text, guidance=1):
        return self.weight * x

    def alpha_sigma(self, t):
        alpha = {3: 0.2, 2: 0.5, 1: 0.8, 0: 0.95, -1: 1.0}[t]
        return alpha, (1 - alpha**2) ** 0.5


def test_log_prob_is_the_normal_density():
    x, mean = torch.randn(2, 5, 4, 3, 3, generator=seeded(), dtype=torch.float64)
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).mean((1, 2, 3))
    assert torch.allclose(ddpo.log_prob(x, mean, 0.3), expected, rtol=1e-12)


def test_step_distribution_of_a_linear_model():
    """DDIM's mean and standard deviation, written out (arXiv 2010.02502, equations 12 and 16)."""
    model, x = Line(0.3), torch.tensor([[1.5]], dtype=torch.float64)
    (alpha, sigma), (after, sigma_after) = model.alpha_sigma(2), model.alpha_sigma(1)
    std = 0.7 * (sigma_after / sigma) * (1 - alpha**2 / after**2) ** 0.5
    expected = after * (1.5 - sigma * 0.45) / alpha + (1 - after**2 - std**2) ** 0.5 * 0.45
    mean, found_std = ddpo.step_distribution(model, x, 1, [3, 2, 1, 0], None, 1.0, 0.7)
    assert mean.item() == pytest.approx(expected, rel=1e-12)
    assert found_std == pytest.approx(std, rel=1e-12)


def test_policy_gradient_is_the_finite_difference_of_the_expected_reward():
    """At ratio 1 the gradient of -(4), summed over the steps, is dE[r]/dweight. The reward is of the last
    state that was drawn: what the noiseless last step does is certain, so no policy gradient sees it."""
    grid, n, reward = [3, 2, 1, 0], 400_000, lambda x: (-x.square() / 4).exp()
    noise = torch.randn(5, n, 1, generator=seeded(), dtype=torch.float64)

    def drawn(weight):
        model, states = Line(weight), [noise[0]]
        for k in range(3):
            mean, std = ddpo.step_distribution(model, states[-1], k, grid, None, 1.0, 1.0)
            states.append((mean + std * noise[k + 1]).detach())
        return states

    h = 1e-3
    expected = (reward(drawn(0.4 + h)[3]).mean() - reward(drawn(0.4 - h)[3]).mean()).item() / (2 * h)
    model, states = Line(0.4), drawn(0.4)
    advantage, gradients = (reward(states[3]) - reward(states[3]).mean()).squeeze(1), []
    for k in range(3):
        mean, std = ddpo.step_distribution(model, states[k], k, grid, None, 1.0, 1.0)
        new = ddpo.log_prob(states[k + 1], mean, std)
        loss = ddpo.ppo_loss(new, new.detach(), advantage, 1e-4)
        gradients.append(-torch.autograd.grad(loss, model.weight)[0].item())
    assert sum(gradients) == pytest.approx(expected, rel=0.01)
    assert all(abs(g) > 0.1 * expected for g in gradients)  # every step matters: leaving one out would show


@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_clip_cuts_where_it_should(advantage):
    ratio = torch.tensor([0.5, 0.89, 0.91, 1.0, 1.09, 1.11, 2.0], dtype=torch.float64)
    new = ratio.log().requires_grad_()
    old, same = torch.zeros(7, dtype=torch.float64), torch.full((7,), advantage, dtype=torch.float64)
    ddpo.ppo_loss(new, old, same, 0.1).backward()
    kept = ratio < 1.1 if advantage > 0 else ratio > 0.9
    assert torch.allclose(new.grad, torch.where(kept, -advantage * ratio / 7, 0.0))


def test_advantages():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 8.0]])
    advantages = ddpo.advantages(rewards, 1.5)
    assert (
        torch.allclose(advantages[0], torch.tensor([-1.0, -1.0, 1.0, 1.0])) and advantages[1].abs().max() == 0
    )
    assert torch.allclose(advantages[2], torch.tensor([-(3**-0.5)] * 3 + [1.5]))


@pytest.mark.parametrize("kind", ["epsilon", "v"])
@pytest.mark.parametrize("guidance, eta", [(1.0, 1.0), (3.0, 0.5)])
def test_trajectories_end_where_graft_samples(models, kind, guidance, eta):
    """And with the LoRA merged or not the densities are the same: far within the clip."""
    model = with_lora(models[kind], "all")
    randomise(model, 0.05)
    grid, text = model.timesteps(5), model.encode(PROMPTS)
    noise = draw_noise(SEEDS, 5, model.latent_shape, torch.float32)
    args = SimpleNamespace(guidance=guidance, eta=eta)
    with model.lora_merged():
        states, densities = ddpo.sample_trajectories(model, noise, text, grid, args)
        expected = graft.sample(model, noise, text, guidance, eta)
    assert difference(states[-1], expected) < 1e-5
    assert states.shape == (6, 3, *model.latent_shape) and len(densities) == 4 + (kind == "epsilon")
    for k in range(len(densities)):
        with torch.no_grad():
            mean, std = ddpo.step_distribution(model, states[k], k, grid, text, guidance, eta)
        assert (ddpo.log_prob(states[k + 1], mean, std) - densities[k]).abs().max() < 1e-5


def test_run_and_resume(tiny_arguments, tmp_path, monkeypatch):
    """A run that is stopped after its first round ends as one that is not."""
    monkeypatch.chdir(tmp_path)
    argv = [
        *arguments_for(ddpo.Args, tiny_arguments),
        *"--eval_every 1 --epochs 2 --lr 3e-2 --clip 0.1".split(),
    ]
    code, out, error = run_inside([*argv, "--output", "complete"], SCRIPT)
    assert code == 0, error
    stopped, save = [], utils.runs.save_checkpoint

    def stop_after_the_first(folder, state):
        save(folder, state)
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt

    monkeypatch.setattr(utils.runs, "save_checkpoint", stop_after_the_first)
    code, _, error = run_inside([*argv, "--output", "stopped"], SCRIPT)
    assert code == 130 and "--resume stopped" in error
    code, _, error = run_inside(["--resume", "stopped"], SCRIPT)
    assert code == 0, error
    shutil.copy("complete/args.json", "stopped/args.json")  # they differ in the folder's name
    assert_same_run(tmp_path / "stopped", tmp_path / "complete")


@pytest.mark.parametrize(
    "flags, named", [("--eta 0", "--eta 0"), ("--epochs 0", "--epochs 0"), ("--clip -1", "--clip -1")]
)
def test_bad_input(tiny_arguments, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*arguments_for(ddpo.Args, tiny_arguments), *flags.split()], SCRIPT)
    assert_one_line(code, error, named)
    assert not list(tmp_path.iterdir())
