"""benchmarks/awm.py: the gradient at theta = theta_old, its relation to GRAFT, to self-training and to
DiffusionNFT, the clip, resuming, bad input."""

import shutil

import pytest
import torch

import awm
import diffusion_nft
import graft
import utils.runs
from conftest import (
    PROMPTS,
    arguments_for,
    assert_one_line,
    assert_same_run,
    randomise,
    run_inside,
    seeded,
    with_lora,
)

SCRIPT = "benchmarks/awm.py"


@pytest.fixture
def denoised(models):
    """A model, {x_0, text, t, noise} of three images, and gradient(loss): its LoRA's, one vector."""
    model = with_lora(models["v"], "all")
    randomise(model, 0.2)
    x_0, noise = torch.randn(2, 3, *model.latent_shape, generator=seeded())
    t, text = torch.tensor([100, 400, 700]), model.encode(PROMPTS)

    def gradient(loss):
        gradients = torch.autograd.grad(loss, list(model.lora().values()))
        return torch.cat([g.flatten() for g in gradients])

    return model, {"x_0": x_0, "text": text, "t": t, "noise": noise}, gradient


def losses_of(model, images, matching="plain"):
    """L of equation (2), (3,), with its graph."""
    alpha, sigma = model.alpha_sigma(images["t"])
    x_t, target = graft.training_target(images["x_0"], images["noise"], alpha, sigma, "v_prediction")
    v = model.predict(x_t, images["t"], images["text"])
    return awm.matching_loss(v, target, sigma, matching)


# ---------------------------------------------------------------- equations


def test_advantages():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 8.0]])
    deviation = rewards.flatten().std(correction=0).item()
    found = awm.advantages(rewards, "round", 2.0)
    assert found[0].tolist() == pytest.approx([-0.5 / deviation] * 2 + [0.5 / deviation] * 2)
    assert found[1].tolist() == [0] * 4 and found[2, 3] == 2 < 6 / deviation
    found = awm.advantages(rewards, "prompt", 1.5)
    assert found[0].tolist() == [-1, -1, 1, 1] and found[1].tolist() == [0] * 4
    assert found[2].tolist() == pytest.approx([-(3**-0.5)] * 3 + [1.5])
    assert awm.advantages(rewards, "prompt", 0.5)[2].tolist() == [-0.5] * 3 + [0.5]  # on both sides
    assert awm.advantages(torch.ones(2, 3), "round", 1.0).tolist() == [[0] * 3] * 2


def test_matching_loss_written_out():
    prediction, target = torch.randn(2, 3, 2, 4, generator=seeded(), dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    square = torch.stack([((p - v) ** 2).sum() / 8 for p, v in zip(prediction, target)])
    assert torch.allclose(awm.matching_loss(prediction, target, sigma, "plain"), square, rtol=1e-12)
    huber = awm.matching_loss(prediction, target, sigma, "huber")
    assert torch.allclose(huber, sigma / 0.25 * square**0.25, rtol=1e-8)
    same = prediction.clone().requires_grad_()
    awm.matching_loss(same, prediction, sigma, "huber").sum().backward()
    assert same.grad.isfinite().all()


@pytest.mark.parametrize("matching", ["plain", "huber"])
def test_gradient_at_the_sampling_policy(denoised, matching):
    """E[A grad L_theta] at theta = theta_old, whatever the clip."""
    model, images, gradient = denoised
    advantage = torch.tensor([1.3, -0.6, 0.2])
    expected = sum(a * gradient(losses_of(model, images, matching)[i]) for i, a in enumerate(advantage)) / 3
    for clip in (1e-3, 1.0):
        loss = losses_of(model, images, matching)
        found = gradient(awm.ppo_loss(loss, loss.detach(), advantage, clip))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max())


def test_a_mask_gives_grafts_gradient(denoised):
    """With A the acceptance mask it is GRAFT's on what was accepted, times its share m; with A = mask - m it
    lacks m times the gradient of training on all samples, GRAFT's control."""
    model, images, gradient = denoised
    mask = graft.accept(torch.tensor([[0.2, 0.9, 0.7]]), "threshold", threshold=0.5).squeeze(0)

    def grafts(rows):
        chosen = {name: value[rows] for name, value in images.items()}
        return gradient(graft.denoising_loss(model, **chosen, guidance=1))

    def awms(advantage):
        loss = losses_of(model, images)
        return gradient(awm.ppo_loss(loss, loss.detach(), advantage, 0.2))

    accepted, everything = grafts(mask), grafts(torch.arange(3))
    scale = 1e-5 * accepted.abs().max()
    assert torch.allclose(awms(mask.float()), 2 / 3 * accepted, rtol=1e-4, atol=scale)
    expected = 2 / 3 * accepted - 2 / 3 * everything
    assert torch.allclose(awms(mask.float() - 2 / 3), expected, rtol=1e-4, atol=scale)
    assert expected.abs().max() > 0.1 * accepted.abs().max()


def test_diffusion_nft_is_its_first_order():
    """The plain loss of DiffusionNFT over beta has the gradient of E[A L] + beta E|v - v_old|^2 with
    A = 2 r - 1, less that of A |v - v_old|^2."""
    v, v_old, target = torch.randn(3, 6, 4, generator=seeded(), dtype=torch.float64)
    r = torch.rand(6, generator=seeded(1), dtype=torch.float64)
    v.requires_grad_()
    policies = diffusion_nft.implicit_policies(v, v_old, 0.4)
    contrast = diffusion_nft.contrastive_loss(*policies, target, r, False) / 0.4
    a, distance = 2 * r - 1, (v - v_old).square().mean(1)
    matching = (a * awm.matching_loss(v, target, r, "plain") + 0.4 * distance - a * distance).mean()
    gradients = [torch.autograd.grad(loss, v)[0] for loss in (contrast, matching)]
    assert torch.allclose(*gradients, rtol=1e-10)


@pytest.mark.parametrize("advantage", [1.5, -0.7])
def test_clip_cuts_where_it_should(advantage):
    """The ratio rises where the loss falls. Beyond the clip there is no gradient, on the side where the step
    would go further."""
    ratio = torch.tensor([0.5, 0.89, 0.91, 1.0, 1.09, 1.11, 2.0], dtype=torch.float64)
    loss = (0.3 - ratio.log()).requires_grad_()
    same = torch.full((7,), advantage, dtype=torch.float64)
    awm.ppo_loss(loss, torch.full((7,), 0.3, dtype=torch.float64), same, 0.1).backward()
    kept = ratio < 1.1 if advantage > 0 else ratio > 0.9
    assert torch.allclose(loss.grad, torch.where(kept, advantage * ratio / 7, 0.0))


# ---------------------------------------------------------------- runs


def test_run_and_resume(tiny_arguments, tmp_path, monkeypatch):
    """A run that is stopped after its first round ends as one that is not."""
    monkeypatch.chdir(tmp_path)
    argv = [*arguments_for(awm.Args, tiny_arguments), *"--eval_every 1 --kl_base 0.1".split()]
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
    "flags, named",
    [("--advantage_max 0", "--advantage_max 0"), ("--kl_old -1", "--kl_old -1"), ("--clip 0", "--clip 0")],
)
def test_bad_input(tiny_arguments, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*arguments_for(awm.Args, tiny_arguments), *flags.split()], SCRIPT)
    assert_one_line(code, error, named)
    assert not list(tmp_path.iterdir())
