"""benchmarks/diffusion_nft.py: the loss against closed forms (its gradient at r = 1/2, its minimum for a
Gaussian with a linear and with a binary reward, GRAFT's loss), resuming, bad input."""

import shutil

import pytest
import torch

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

SCRIPT = "benchmarks/diffusion_nft.py"
S = 0.7  # standard deviation of the Gaussian world


def drawn(n, alpha):
    """x_0 ~ N(0, S^2), x_t, the v target and its exact prediction E[v | x_t], each (n, 1)."""
    generator, sigma = seeded(), (1 - alpha**2) ** 0.5
    x_0, eps = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    x_0 = S * x_0
    x_t = alpha * x_0 + sigma * eps
    total = (alpha * S) ** 2 + sigma**2
    mean_0, mean_eps = alpha * S**2 / total * x_t, sigma / total * x_t
    return x_0, x_t, alpha * eps - sigma * x_0, alpha * mean_eps - sigma * mean_0


def loss_of(v, v_old, target, r, beta):
    policies = diffusion_nft.implicit_policies(v, v_old, beta)
    return diffusion_nft.contrastive_loss(*policies, target, r, False)


def minimum(features, v_old, target, r, beta):
    """The weights w of v = v_old + features w at which the loss is least: one Newton step, for it is
    quadratic. features: (n, k)."""
    w = torch.zeros(features.shape[1], 1, dtype=torch.float64, requires_grad=True)

    def gradient(w):
        loss = loss_of(v_old + features @ w, v_old, target, r, beta)
        return torch.autograd.grad(loss, w, create_graph=True)[0]

    hessian = torch.autograd.functional.jacobian(gradient, w).reshape(len(w), len(w))
    return -torch.linalg.solve(hessian, gradient(w).detach())


# ---------------------------------------------------------------- equations


def test_optimality():
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 2.0]])
    deviation = rewards.flatten().std(correction=0).item()
    r = diffusion_nft.optimality(rewards, "round", 2.0)
    assert r[0].tolist() == pytest.approx(
        [0.5 - 0.25 / (2 * deviation)] * 2 + [0.5 + 0.25 / (2 * deviation)] * 2
    )
    assert r[1].tolist() == [0.5] * 4 and r[2, 3] == pytest.approx(0.5 + 0.75 / (2 * deviation))
    r = diffusion_nft.optimality(rewards, "prompt", 1.0)
    assert r[0].tolist() == [0, 0, 1, 1] and r[1].tolist() == [0.5] * 4
    assert r[2].tolist() == pytest.approx([0.5 - 0.25 / 0.75**0.5] * 3 + [1])  # cut off at 1
    assert diffusion_nft.optimality(torch.ones(2, 3), "round", 1.0).tolist() == [[0.5] * 3] * 2


def test_implicit_policies_lie_on_both_sides():
    v, v_old = torch.randn(2, 3, 4, generator=seeded())
    positive, negative = diffusion_nft.implicit_policies(v, v_old, 0.3)
    assert torch.allclose(positive - v_old, 0.3 * (v - v_old), atol=1e-6)
    assert torch.allclose(negative - v_old, -0.3 * (v - v_old), atol=1e-6)


def test_loss_written_out():
    """Equation (6), on which the text of both baselines rests."""
    v, v_old, target = torch.randn(3, 6, 4, 2, 2, generator=seeded(), dtype=torch.float64)
    r = torch.rand(6, generator=seeded(1), dtype=torch.float64)
    d, u = (x.flatten(1) for x in (v - v_old, target - v_old))
    parts = [(a * b).mean(1) for a, b in ((d, d), (d, u), (u, u))]
    expected = (0.6**2 * parts[0] - 2 * 0.6 * (2 * r - 1) * parts[1] + parts[2]).mean()
    assert loss_of(v, v_old, target, r, 0.6).item() == pytest.approx(expected.item(), rel=1e-12)


def test_self_normalised_loss_written_out():
    """Twice the error doubles it, and the divisor has no gradient."""
    positive, negative, target = torch.randn(3, 5, 2, 3, 3, generator=seeded(), dtype=torch.float64)
    r = torch.rand(5, generator=seeded(1), dtype=torch.float64)
    positive.requires_grad_()
    loss = diffusion_nft.contrastive_loss(positive, negative, target, r, True)
    good, bad = (positive - target).detach(), negative - target
    expected = 0
    for i in range(5):
        for weight, error in ((r[i], good[i]), (1 - r[i], bad[i])):
            expected += weight * (error**2).mean() / error.abs().mean() / 5
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    loss.backward()
    for i in range(5):
        slope = r[i] * 2 * good[i] / 18 / good[i].abs().mean() / 5
        assert torch.allclose(positive.grad[i], slope, rtol=1e-10)
    exact = diffusion_nft.contrastive_loss(target, target, target, r, True)
    assert exact == 0  # no division by zero


@pytest.mark.parametrize("self_normalised", [False, True])
def test_no_gradient_at_even_odds(self_normalised):
    """With r = 1/2 the gradient at theta = theta_old vanishes; with another r it does not."""
    v_old, target = torch.randn(2, 6, 4, generator=seeded(), dtype=torch.float64)
    for r, vanishes in ((0.5, True), (0.6, False)):
        v = v_old.clone().requires_grad_()
        policies = diffusion_nft.implicit_policies(v, v_old, 0.8)
        chance = torch.full((6,), r, dtype=torch.float64)
        diffusion_nft.contrastive_loss(*policies, target, chance, self_normalised).backward()
        assert (v.grad.abs().max() < 1e-12) == vanishes


@pytest.mark.parametrize("alpha, beta", [(0.8, 1.0), (0.5, 0.3)])
def test_gaussian_with_a_linear_reward_moves_by_the_amount_of_the_theorem(alpha, beta):
    """x_0 ~ N(0, S^2) and r = 1/2 + k x_0. Then E[(2 r - 1) (v - v_old) | x_t] = 2 k Cov(x_0, v | x_t), and
    v is alpha x_t / sigma - x_0 / sigma: the prediction of x_0 moves by 2 k / beta times its variance given
    x_t, the same for every x_t, towards the larger reward."""
    k, sigma = 0.2, (1 - alpha**2) ** 0.5
    x_0, x_t, target, v_old = drawn(400_000, alpha)
    r = (0.5 + k * x_0).squeeze(1)
    found = minimum(torch.cat([torch.ones_like(x_t), x_t], 1), v_old, target, r, beta)
    variance = S**2 * sigma**2 / ((alpha * S) ** 2 + sigma**2)
    shift = -sigma * found[0].item()  # of x_0 = alpha x_t - sigma v
    assert shift == pytest.approx(2 * k / beta * variance, rel=0.02)
    assert abs(found[1].item()) < 0.02 * abs(found[0].item())


def test_binary_reward_moves_from_the_bad_to_the_good():
    """Theorem of the paper: the minimum is v_old + 2 / beta * a (v_good - v_old) with a = P(good | x_t), and
    a (v_good - v_old) = (1 - a) (v_old - v_bad). Good: x_0 above 0.3. For x_t in a narrow window."""
    x_0, x_t, target, v_old = drawn(2_000_000, 0.6)
    inside = (x_t - 0.4).abs().squeeze(1) < 0.02
    x_0, target, v_old = x_0[inside], target[inside], v_old[inside]
    good = (x_0 > 0.3).squeeze(1)
    found = minimum(torch.ones_like(x_0), v_old, target, good.double(), 0.5).item()
    share = good.double().mean().item()
    towards = (target - v_old)[good].mean().item()
    away = (target - v_old)[~good].mean().item()
    assert 0.2 < share < 0.8 and min(-towards, away) > 0.1  # v falls where x_0 grows
    assert found == pytest.approx(2 / 0.5 * (share * towards - (1 - share) * away) / 2, rel=1e-6)
    assert share * towards == pytest.approx(-(1 - share) * away, rel=0.03)
    assert found == pytest.approx(2 / 0.5 * share * towards, rel=0.03)


def test_positive_branch_is_grafts_threshold_rule(models):
    """With beta = 1 and r the acceptance mask the first branch is GRAFT's loss on what was accepted, times
    its share. The second branch is switched off by giving it the target."""
    model = with_lora(models["v"], "all")
    randomise(model, 0.2)
    x_0, noise = torch.randn(2, 3, *model.latent_shape, generator=seeded())
    t, text = torch.tensor([100, 400, 700]), model.encode(PROMPTS)
    x_t, target = graft.training_target(x_0, noise, *model.alpha_sigma(t), model.prediction_type)
    v = model.predict(x_t, t, text)
    positive, _ = diffusion_nft.implicit_policies(v, torch.randn(v.shape, generator=seeded(2)), 1.0)
    mask = graft.accept(torch.tensor([[0.2, 0.9, 0.7]]), "threshold", threshold=0.5).squeeze(0)
    loss = diffusion_nft.contrastive_loss(positive, target, target, mask.float(), False)
    expected = graft.denoising_loss(model, x_0[mask], text[mask], t[mask], noise[mask], 1.0)
    assert loss.item() == pytest.approx(2 / 3 * expected.item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_clean_prediction_inverts_the_target(kind):
    x_0, noise = torch.randn(2, 3, 4, 2, 2, generator=seeded())
    sigma = torch.tensor([0.1, 0.5, 0.9])
    alpha = 1 - sigma if kind == "flow" else (1 - sigma**2).sqrt()
    x_t, target = graft.training_target(x_0, noise, alpha, sigma, kind)
    found = diffusion_nft.clean_prediction(target, x_t, alpha, sigma, kind)
    assert torch.allclose(found, x_0, atol=1e-5)


def test_kept_share():
    assert [diffusion_nft.kept_share(i, 0.2, 0.5) for i in (1, 2, 3, 9)] == [0.2, 0.4, 0.5, 0.5]


def test_weights_come_back():
    parameters = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.zeros(3))]
    with pytest.raises(KeyError), diffusion_nft.weights_set_to(parameters, [torch.zeros(2), torch.ones(3)]):
        assert parameters[0].sum() == 0 and parameters[1].sum() == 3
        raise KeyError
    assert parameters[0].sum() == 2 and parameters[1].sum() == 0


# ---------------------------------------------------------------- runs


def test_run_and_resume(tiny_arguments, tmp_path, monkeypatch):
    """A run that is stopped after its first round ends as one that is not: theta_old is in the checkpoint."""
    monkeypatch.chdir(tmp_path)
    argv = [*arguments_for(diffusion_nft.Args, tiny_arguments), *"--eval_every 1 --old_rise 0.4".split()]
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
    [("--beta 0", "--beta 0"), ("--old_most 1", "--old_most 1"), ("--spread_factor 0", "--spread_factor 0")],
)
def test_bad_input(tiny_arguments, tmp_path, monkeypatch, flags, named):
    monkeypatch.chdir(tmp_path)
    argv = [*arguments_for(diffusion_nft.Args, tiny_arguments), *flags.split()]
    code, _, error = run_inside(argv, SCRIPT)
    assert_one_line(code, error, named)
    assert not list(tmp_path.iterdir())
