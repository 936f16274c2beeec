"""noise_ppo.py: equations against closed forms, the policy, the sampler against the stock pipeline, memory,
whole runs."""

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

import noise_ppo
from common import Model, derived_seed, draw_noise, schedule_prompts
from conftest import (
    PROMPTS,
    ROOT,
    SEEDS,
    assert_one_line,
    assert_same_images,
    assert_same_run,
    difference,
    environment,
    exit_code,
    randomise,
    read_metrics,
    read_scalars,
    run_inside,
    run_script,
    seeded,
    stock,
    stock_pipeline,
    with_lora,
)
from noise_ppo import (
    NoisePolicy,
    advantages,
    explained_variance,
    kl_to_standard_normal,
    log_prob,
    policy_statistics,
    ppo_loss,
)
from rewards import Reward, diversity
from utils.prompts import read_prompts

SCRIPT = "noise_ppo.py"
CALLBACK = ", callback_on_step_end=base_from_the_switch_on"
SHAPES = [(4, 8, 8), (4, 64, 96), (3, 5, 7), (16, 2, 2)]  # of latents


@pytest.fixture(scope="module")
def arguments(tiny_v, prompt_files):
    """The shortest run that does everything; later arguments replace earlier ones."""
    return (
        f"--prompts {prompt_files.train} --eval_prompts {prompt_files.held_out} --model {tiny_v} "
        "--device cpu --reward jpeg_compressibility --eval_rewards shapes_graded --guidance 1 --clip 1e-3 "
        "--sample_batch 64 --iterations 3 --prompts_per_iteration 3 --samples 4 --minibatch 6 "
        "--eval_samples 2 --eval_every 2 --no-mean_only --steps 4 --eval_steps 4 5"
    ).split()


def gaussian(seed=0, shape=(6, 4, 8, 8)):
    """z, mean and log_std, float64, mean and log_std to be differentiated."""
    z, mean, log_std = torch.randn(3, *shape, generator=seeded(seed), dtype=torch.float64)
    return z, mean.requires_grad_(), (0.5 * log_std).requires_grad_()


# ---------------------------------------------------------------- log-density, KL


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_log_prob(reduction):
    z, mean, log_std = gaussian()
    expected = getattr(torch.distributions.Normal(mean, log_std.exp()).log_prob(z).flatten(1), reduction)(1)
    values = log_prob(z, mean, log_std, reduction)
    assert values.shape == (6,) and torch.allclose(values, expected, rtol=1e-12)
    values.sum().backward()
    size = z[0].numel() if reduction == "mean" else 1
    assert torch.allclose(mean.grad, (z - mean) / (2 * log_std).exp() / size)
    assert torch.allclose(log_std.grad, (((z - mean) / log_std.exp()).square() - 1) / size)


def test_log_prob_of_another_reduction():
    with pytest.raises(ValueError, match="median"):
        log_prob(*gaussian(), "median")


def test_kl_to_standard_normal():
    _, mean, log_std = gaussian()
    normal = torch.distributions.Normal
    standard = normal(torch.zeros(()), torch.ones(()))
    expected = torch.distributions.kl_divergence(normal(mean, log_std.exp()), standard)
    kl = kl_to_standard_normal(mean, log_std)
    assert kl.shape == (6,) and torch.allclose(kl, expected.flatten(1).sum(1), rtol=1e-12)
    kl.sum().backward()
    assert torch.allclose(mean.grad, mean) and torch.allclose(log_std.grad, (2 * log_std).exp() - 1)
    assert (kl > 0).all() and (kl_to_standard_normal(0 * mean, 0 * log_std) == 0).all()


def test_kl_is_the_mean_log_ratio():
    _, mean, log_std = gaussian(shape=(1, 2, 2, 2))
    z = mean + log_std.exp() * torch.randn(100_000, 2, 2, 2, generator=seeded(), dtype=torch.float64)
    ratio = (log_prob(z, mean, log_std, "sum") - log_prob(z, 0 * mean, 0 * log_std, "sum")).detach()
    assert abs(ratio.mean() - kl_to_standard_normal(mean, log_std)) <= 4.5 * ratio.std() / len(z) ** 0.5


# ---------------------------------------------------------------- the clipped loss


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("clip", [1e-3, 0.2])
def test_first_update_is_the_plain_policy_gradient(reduction, clip):
    """At ratio 1 the loss is -mean(A), its gradient that of -mean(A log pi)."""
    z, mean, log_std = gaussian()
    advantage = torch.randn(6, generator=seeded(1), dtype=torch.float64)
    new = log_prob(z, mean, log_std, reduction)
    loss = ppo_loss(new, new.detach(), advantage, clip)
    assert loss.item() == pytest.approx(-advantage.mean().item())
    gradients = torch.autograd.grad(loss, (mean, log_std), retain_graph=True)
    expected = torch.autograd.grad(-(advantage * new).mean(), (mean, log_std))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(gradients, expected))


@pytest.mark.parametrize("clip", [0.2, 1e-3, 3.0])
@pytest.mark.parametrize("advantage", [1.5, -0.7, 0.0])
def test_clip_cuts_exactly_where_it_should(clip, advantage):
    """A > 0: no gradient above 1 + clip; A < 0: none below 1 - clip; everywhere else that of ratio * A."""
    offsets = [-1.5, -1.001, -0.999, -0.5, 0.0, 0.5, 0.999, 1.001, 1.5, 10.0]
    ratio = 1 + clip * torch.tensor(offsets, dtype=torch.float64)
    ratio = ratio[ratio > 0]
    new, old = (0.3 + ratio.log()).requires_grad_(), torch.full_like(ratio, 0.3)
    loss = ppo_loss(new, old, torch.full_like(ratio, advantage), clip)
    cut = (ratio > 1 + clip) if advantage > 0 else (ratio < 1 - clip)
    bound = 1 + clip if advantage > 0 else 1 - clip
    expected = -(advantage * ratio.where(~cut, torch.tensor(bound, dtype=torch.float64)))
    assert loss.shape == () and loss.item() == pytest.approx(expected.mean().item(), abs=1e-12)
    loss.backward()
    assert torch.allclose(new.grad, -advantage * ratio * ~cut / len(ratio), atol=1e-12)


def test_reductions_differ_by_the_dimension_only():
    """At ratio 1 the gradients of loss and KL penalty are D times larger for sum than for mean. So the KL
    weight means the same."""
    z, mean, log_std = gaussian()
    advantage, gradients = torch.randn(6, generator=seeded(1), dtype=torch.float64), {}
    for reduction, size in (("mean", 256), ("sum", 1)):
        new = log_prob(z, mean, log_std, reduction)
        penalty = 0.01 * kl_to_standard_normal(mean, log_std).mean() / size
        loss = ppo_loss(new, new.detach(), advantage, 0.1) + penalty
        gradients[reduction] = torch.autograd.grad(loss, (mean, log_std))
    assert all(torch.allclose(256 * a, b, rtol=1e-9) for a, b in zip(gradients["mean"], gradients["sum"]))


# ---------------------------------------------------------------- advantages


IDS = torch.tensor([7, -2, 7, 100, -2, 7, 100, -2, -2])
REWARDS = torch.tensor([1.0, 0, 2, 5, 4, 6, 5, 4, 0])
CENTRED = torch.tensor([-2.0, -2, -1, 0, 2, 3, 0, 2, -2])


def test_advantages():
    square = CENTRED.square()
    group = torch.tensor([14 / 3, 4, 14 / 3, 1, 4, 14 / 3, 1, 4, 4])
    assert torch.allclose(advantages(REWARDS, IDS), CENTRED / square.mean().sqrt())
    assert torch.allclose(advantages(REWARDS, IDS, "none"), CENTRED)
    assert torch.allclose(advantages(REWARDS, IDS, "prompt"), CENTRED / group.sqrt(), atol=1e-6)
    order = torch.randperm(9, generator=seeded())
    for normalise in ("batch", "prompt", "none"):
        values = advantages(REWARDS, IDS, normalise)
        assert torch.allclose(advantages(REWARDS[order], IDS[order], normalise), values[order])
        if normalise != "none":  # neither the prompt's level nor the reward's unit matters
            assert torch.allclose(advantages(1000 * REWARDS + IDS, IDS, normalise), values, atol=1e-3)


@pytest.mark.parametrize("normalise", ["batch", "prompt", "none"])
def test_rewards_that_do_not_differ_teach_nothing(normalise):
    for rewards in (torch.ones(6), torch.full((6,), 0.1), torch.tensor([1.0, 1, 1, 2, 2, 2])):
        values = advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1]), normalise)
        assert values.isfinite().all() and values.abs().max() < 0.1


def test_explained_variance():
    per_prompt = torch.randn(500, 1, generator=seeded()).expand(-1, 4).flatten()
    noise = torch.randn(2000, generator=seeded(1))
    assert explained_variance(per_prompt, 4) == pytest.approx(1)
    # a baseline of three other images adds a third of the variance where prompts do not differ
    assert explained_variance(noise, 4) == pytest.approx(-1 / 3, abs=0.1)
    assert explained_variance(3 * per_prompt + noise, 4) == pytest.approx(1 - 4 / 30, abs=0.05)


def test_policy_statistics():
    mean = torch.tensor([[1.0, -1], [3, 1]]).view(2, 2, 1, 1)
    std = torch.tensor([[0.5, 1], [2, 4]]).view(2, 2, 1, 1)
    statistics = policy_statistics(mean, std.log(), torch.tensor([1.0, -3]), torch.tensor([4.0, 8]))
    assert statistics == pytest.approx(
        {
            "approximate_kl": 2.5,  # half of the mean of 1 and 9
            "kl_per_dimension": 3,  # 6 nats, two dimensions
            "mean_rms": 3**0.5,  # of 1, 1, 9, 1
            "mean_rms_own": 1,  # the mean over prompts is (2, 0)
            "std": 1.875,
            "std_spread": std.std().item(),
        }
    )


def test_approximate_kl_of_a_small_step():
    """Equation (6) is the KL to second order: for a step of 0.05 it is right within a few per cent."""
    normal, d = torch.distributions.Normal, 64
    old, new = normal(torch.zeros(d), torch.ones(d)), normal(0.05 * torch.ones(d), 1.02 * torch.ones(d))
    torch.manual_seed(0)
    z = old.sample((20_000,))  # from the policy that sampled
    log_ratio = (new.log_prob(z) - old.log_prob(z)).sum(1)
    zero = torch.zeros(2, 1, 1, 1)
    estimate = policy_statistics(zero, zero, log_ratio, torch.zeros(1))["approximate_kl"]
    kl = torch.distributions.kl_divergence(old, new).sum().item()
    assert estimate == pytest.approx(kl, rel=0.1) and kl > 0.05


# ---------------------------------------------------------------- policy


def new_policy(shape=(4, 8, 8), tokens=12, width=16, seed=None, **options):
    torch.manual_seed(0)
    policy = NoisePolicy(tokens, width, shape, **options)
    if seed is not None:  # as if learnt
        for parameter in policy.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=seeded(seed))
    return policy


@pytest.mark.parametrize(
    "options", [{}, {"policy": "unconditional"}, {"mean_only": True}, {"std_only": True}]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_policy_starts_as_the_standard_normal(shape, options):
    policy = new_policy(shape, **options)
    text = torch.randn(3, 12, 16, generator=seeded())
    policy.standardise(text)
    mean, log_std = policy(text)
    assert mean.shape == log_std.shape == (3, *shape) and (mean == 0).all() and (log_std == 0).all()
    eps = torch.randn(3, *shape, generator=seeded(1))
    assert torch.equal(mean + log_std.exp() * eps, eps) and (kl_to_standard_normal(mean, log_std) == 0).all()
    (mean * eps + log_std * eps).sum().backward()
    assert policy.head.weight.grad.abs().sum() > 0  # it can leave the start


def test_policy_learns_what_its_options_say():
    text = torch.randn(3, 12, 16, generator=seeded())
    for options in ({}, {"policy": "unconditional"}, {"mean_only": True}, {"std_only": True}):
        mean, log_std = new_policy(seed=1, **options)(text)
        assert (mean != 0).any() == ("std_only" not in options)
        assert (log_std != 0).any() == ("mean_only" not in options)
        for part in (mean, log_std):
            same = torch.allclose(part[0], part[1])
            assert same == ("policy" in options or not part.any())


def test_policy_is_smooth_in_space():
    """A grid of 2 x 2 enlarged to 8 x 8: corners are the grid's values, the middle is their mean. A finer
    grid has more detail."""
    mean, _ = new_policy((1, 8, 8), seed=1, grid=2)(torch.randn(1, 12, 16, generator=seeded()))
    corners = mean[0, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert mean[0, 0, 3:5, 3:5].mean().item() == pytest.approx(corners.mean().item(), abs=1e-6)
    assert torch.linalg.matrix_rank(mean[0, 0]) <= 2 and len(mean.unique()) > 30
    mean, _ = new_policy((1, 8, 8), seed=1, grid=8)(torch.randn(1, 12, 16, generator=seeded()))
    assert torch.linalg.matrix_rank(mean[0, 0]) > 2


def test_policy_sees_standardised_text():
    text = 50 + 3 * torch.randn(200, 12, 16, generator=seeded()) * torch.rand(12, 16, generator=seeded(1))
    text[:, 0] = 7.0  # the start token is the same for all prompts
    policy, seen = new_policy(), []
    policy.standardise(text)
    policy.body.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].view(200, 12, 16)))
    policy(text)
    assert seen[0].mean(0).abs().max() < 1e-3 and (seen[0][:, 0] == 0).all()
    std = seen[0][:, 1:].std(0)
    assert ((std - 1).abs() < 0.5).all() and std.median() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("width, shape, others", [(768, (4, 64, 64), 983e6), (1024, (4, 96, 96), 1290e6)])
def test_policy_is_small_beside_stable_diffusion(width, shape, others):
    with torch.device("meta"):
        policy = NoisePolicy(77, width, shape)
    assert sum(p.numel() for p in policy.parameters()) <= 0.05 * others


# ---------------------------------------------------------------- sampling


def trailing(model):
    """The model as the script uses it."""
    scheduler = model.pipeline.scheduler
    model.pipeline.scheduler = scheduler.from_config(scheduler.config, timestep_spacing="trailing")
    return model


@pytest.fixture(scope="module")
def frozen(tiny_epsilon, tiny_v):
    return {
        kind: trailing(Model(name, "cpu", torch.float32))
        for kind, name in (("epsilon", tiny_epsilon), ("v", tiny_v))
    }


@pytest.fixture(scope="module")
def lora_run(tiny_v, tmp_path_factory):
    """A folder with a LoRA that changes the images."""
    model, folder = with_lora(Model(tiny_v, "cpu", torch.float32), "all"), tmp_path_factory.mktemp("lora")
    randomise(model)
    model.save_lora(folder)
    return str(folder)


def stock_trailing(folder):
    pipeline = stock_pipeline(folder)
    config = pipeline.scheduler.config
    pipeline.scheduler = pipeline.scheduler.from_config(
        config, timestep_spacing="trailing", clip_sample=False
    )
    return pipeline


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind, steps", [("epsilon", 4), ("epsilon", 20), ("v", 4), ("v", 10)])
def test_sample_equals_stock_pipeline_for_given_latents(frozen, tiny_epsilon, tiny_v, kind, steps, guidance):
    pipeline = stock_trailing({"epsilon": tiny_epsilon, "v": tiny_v}[kind])
    z = 0.7 * torch.randn(3, 4, 8, 8, generator=seeded()) + 0.5
    expected = stock(pipeline, steps=steps, guidance=guidance, eta=0.0, latents=z)
    latents = noise_ppo.sample(frozen[kind], z, frozen[kind].encode(PROMPTS), steps, guidance)
    assert difference(latents, expected) <= 1e-5
    for other in (noise_ppo.sample(frozen[kind], -z, frozen[kind].encode(PROMPTS), steps, guidance), z):
        assert difference(other, expected) > 1e-2
    drawn = draw_noise(SEEDS, 0, (4, 8, 8), torch.float32)[0]
    standard = noise_ppo.sample(frozen[kind], drawn, frozen[kind].encode(PROMPTS), steps, guidance)
    assert difference(standard, stock(pipeline, steps=steps, guidance=guidance, eta=0.0)) <= 1e-5


def test_sample_with_a_lora_equals_stock_pipeline(lora_run, tiny_v):
    """A LoRA of graft.py is on in all steps. One of pgraft.py is on until the printed code's callback turns
    it off."""
    model = Model(tiny_v, "cpu", torch.float32)
    model.load_lora(lora_run)
    model, pipeline = trailing(model), stock_trailing(tiny_v)
    pipeline.load_lora_weights(lora_run)
    z = 0.7 * torch.randn(3, 4, 8, 8, generator=seeded()) + 0.5
    text, latents = model.encode(PROMPTS), []
    for switch, tuned in ((-1.0, 4), (249.0, 3), (500.0, 2), (999.0, 0)):
        if tuned == 0:
            pipeline.disable_lora()
        elif tuned < 4:
            pipeline.enable_lora()

        def base_from_the_switch_on(pipe, i, t, kwargs, tuned=tuned):
            if i + 1 == tuned:
                pipe.disable_lora()
            return kwargs

        expected = stock(pipeline, steps=4, eta=0.0, latents=z, callback_on_step_end=base_from_the_switch_on)
        latents.append(noise_ppo.sample(model, z, text, 4, 1.0, switch))
        assert difference(latents[-1], expected) <= 1e-5
    assert min(difference(a, b) for a, b in zip(latents, latents[1:])) > 1e-2


def keep_grids(monkeypatch):
    """A list to which runs add (images of standard noise, of learnt noise) instead of writing grid.png."""
    grids = []

    def keep(path, standard, learnt, *rest):
        grids.append((standard, learnt))

    monkeypatch.setattr("utils.figures.save_grid", keep)
    return grids


@pytest.mark.parametrize("switch", [None, 249])
def test_run_on_top_of_a_tuned_model(lora_run, arguments, tmp_path, monkeypatch, switch):
    """Its printed code makes the evaluation's image, which without the LoRA would be another."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(lora_run, "tuned")
    if switch:
        (tmp_path / "tuned" / "pgraft.json").write_text(json.dumps({"switch_timestep": switch, "sigma": 0.5}))
    grids = keep_grids(monkeypatch)
    flags = "--lora tuned --iterations 1 --no-controls --eval_steps 4 --lr 0.1 --output run".split()
    code, out, error = run_inside([*arguments, *flags], SCRIPT)
    assert code == 0, error
    settings = json.loads((tmp_path / "run" / "noise_ppo.json").read_text())
    assert settings["switch_timestep"] == (switch or -1) and settings["lora"] == str(tmp_path / "tuned")
    snippet = out[out.index("import torch; from diffusers") :]
    exec(snippet, {})
    assert_same_images([Image.open("learnt.png")], [grids[0][1][0]])
    for text, other in (("pipe.load_lora_weights", "id"), ("pipe.enable_lora()", ""), (CALLBACK, "")):
        snippet = snippet.replace(text, other)
    exec(snippet, {})
    without = np.asarray(Image.open("learnt.png"), float)
    assert np.abs(without - np.asarray(grids[0][1][0], float)).mean() > 0.5


def test_every_number_of_steps_starts_at_the_same_level(frozen):
    for kind in ("epsilon", "v"):
        assert {frozen[kind].timesteps(n)[0] for n in (4, 5, 8, 10, 20, 40)} == {999}


def peak_bytes(function):
    """The most memory that was allocated at a time while function() ran, and what it returned."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(np.cumsum(changes)), result


def test_memory_does_not_grow_with_steps_and_no_graph_is_kept(frozen):
    model, z = frozen["v"], torch.randn(8, 4, 8, 8, generator=seeded()).requires_grad_()
    text = model.encode([PROMPTS[0]] * 8)
    peaks, graphs = {}, {}

    def with_a_graph(model, x, text, steps, guidance):
        return noise_ppo.denoise.__wrapped__(model, x, [*model.timesteps(steps), -1], text, guidance)

    for name, sampler in (("ours", noise_ppo.sample), ("with a graph", with_a_graph)):
        for steps in (4, 20):
            peaks[name, steps], x = peak_bytes(lambda: sampler(model, z, text, steps, 1.0))
            graphs[name] = x.requires_grad
    assert graphs == {"ours": False, "with a graph": True}
    assert peaks["ours", 20] <= 1.02 * peaks["ours", 4]
    assert peaks["with a graph", 20] > 3 * peaks["with a graph", 4]  # the measurement sees a graph


def test_nothing_is_differentiated_but_the_policy(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls, load = [], Model.__init__

    def watched(self, *rest):
        load(self, *rest)
        for part in (self.denoiser, self.pipeline.vae.decoder, self.pipeline.text_encoder):
            assert not any(p.requires_grad for p in part.parameters())
            part.register_forward_hook(lambda module, inputs, output: calls.append(torch.is_grad_enabled()))

    monkeypatch.setattr(Model, "__init__", watched)
    code, _, error = run_inside([*arguments, "--no-controls"], SCRIPT)
    assert code == 0, error
    assert len(calls) > 20 and not any(calls)


def test_evaluate(frozen):
    """Images and scores are those of mean + sigma eps, with the prompt's mean and sigma and fixed draws."""
    model, n = frozen["v"], 4
    mean, log_std = torch.randn(2, 3, 4, 8, 8, generator=seeded())
    settings = SimpleNamespace(eval_samples=n, sample_batch=5, guidance=1.0, switch_timestep=None)
    rewards = [Reward("jpeg_compressibility"), Reward("shapes_graded")]
    means, shown = noise_ppo.evaluate(model, rewards, PROMPTS, mean, log_std, 5, settings, "test")
    images = []
    for i, prompt in enumerate(PROMPTS):
        eps = draw_noise([derived_seed("eval", i, j) for j in range(n)], 0, (4, 8, 8), torch.float32)[0]
        x = noise_ppo.sample(model, mean[i] + log_std[i].exp() * eps, model.encode([prompt] * n), 5, 1.0)
        images += model.decode(x)
    assert_same_images(shown, images)
    sizes = rewards[0](images, [""] * len(images)).view(3, n)
    expected = {"jpeg_compressibility": sizes.mean(1), "best_of_4": sizes.amax(1)}
    expected["best_of_2"] = (sizes[:, :2].amax(1) + sizes[:, 2:].amax(1)) / 2
    expected["diversity"] = torch.tensor([diversity(images[i : i + n]) for i in range(0, len(images), n)])
    for name, values in expected.items():
        assert torch.allclose(means[name], values, atol=5e-3), name
    assert "best_of_8" not in means and means["shapes_graded"].shape == (3,)


def test_controls(frozen, monkeypatch):
    """The temperature that is best on training prompts and seeds of its own; the policy's mean over them."""
    calls, tags, held_out = [], [], PROMPTS[:2]
    prompts = [PROMPTS[2], "a red square above a red circle", PROMPTS[2]]

    def evaluate(model, rewards, prompts, mean, log_std, steps, args, label, tag="eval"):
        calls.append((prompts, mean, log_std, steps))
        tags.append(tag)
        reward = -(log_std.exp().mean() - 0.6).abs()  # best at 0.6
        return {"r": reward.expand(len(prompts)), "diversity": torch.ones(len(prompts))}, []

    monkeypatch.setattr(noise_ppo, "evaluate", evaluate)
    args = SimpleNamespace(controls=True, policy="conditional", steps=4, reward="r", guidance=1.0)
    model, policy = frozen["v"], new_policy(seed=1)
    results, _ = noise_ppo.final_evaluation(model, policy, ["r"], prompts, held_out, [4, 10], args)
    assert results["temperature"] == 0.6 and tags == ["temperature"] * 4 + ["eval"] * 8
    assert [(call[0], call[3]) for call in calls[:4]] == [(prompts[:2], 4)] * 4
    assert [call[2].mean().exp().item() for call in calls[:4]] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    by_prompt = policy(model.encode(prompts[:2]))
    expected = {  # name: (mean, log_std)
        "standard": (torch.zeros(()), torch.zeros(())),
        "learnt": policy(model.encode(held_out)),
        "temperature": (torch.zeros(()), torch.tensor(0.6).log()),
        "one_for_all": [part.mean(0) for part in by_prompt],
    }
    for steps, part in ((4, calls[4:8]), (10, calls[8:])):
        for (used, *noise, count), pair in zip(part, expected.values(), strict=True):
            assert (used, count) == (held_out, steps)
            assert all(torch.allclose(a, b.expand_as(a), atol=1e-6) for a, b in zip(noise, pair))
    assert set(results["by_steps"][0]["means"]) == set(expected)


def test_run_shows_the_stock_pipelines_images(arguments, tiny_epsilon, prompt_files, tmp_path, monkeypatch):
    """With trailing steps, though the model comes with PNDM and leading ones; two rows, standard noise."""
    monkeypatch.chdir(tmp_path)
    grids = keep_grids(monkeypatch)
    argv = [*arguments, *"--iterations 1 --no-controls --eval_steps 4 --model".split(), tiny_epsilon]
    code, _, error = run_inside(argv, SCRIPT)
    assert code == 0, error
    ((standard, learnt),) = grids
    repeated = [p for p in read_prompts(prompt_files.held_out, "") for _ in range(2)]
    seeds = [derived_seed("eval", i, j) for i in range(2) for j in range(2)]
    options = {"prompts": repeated, "seeds": seeds, "steps": 4, "eta": 0.0, "output": "pil"}
    assert_same_images(standard, stock(stock_trailing(tiny_epsilon), **options))
    pairs = [(np.asarray(a, float), np.asarray(b, float)) for a, b in zip(standard, learnt)]
    assert max(np.abs(a - b).mean() for a, b in pairs) > 0.5


# ---------------------------------------------------------------- one run, in a process of its own


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
    images, files = "curves.png gain.png grid.png", "args.json checkpoint.pt metrics.csv noise_ppo.json"
    files = f"{images} {files} policy.safetensors results.json tensorboard inputs.json .lock"
    assert {p.name for p in folder.iterdir()} == set(files.split())
    rows = read_metrics(folder)
    assert [row["iteration"] for row in rows] == ["1", "2", "3"]
    for name in rows[0]:
        values = [float(row[name]) for row in rows]
        assert len(set(values)) > 1, f"{name} is constant"
        assert all(math.isfinite(v) for v in values) or name == "reward_held_out"
    assert [math.isnan(float(row["reward_held_out"])) for row in rows] == [True, False, False]
    scalars = read_scalars(folder)
    assert set(scalars) == set(rows[0])
    for tag, points in scalars.items():
        expected = [float(row[tag]) for row in rows]
        assert [value for _, value in points] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    for name in ("curves.png", "grid.png", "gain.png"):
        assert np.asarray(Image.open(folder / name)).std() > 0
    words = ("model", "policy", "sampling", "update", "evaluation", "standard")
    for word in (*words, "iteration 2/3", "iteration 3/3"):
        assert f"\n  {word} " in out, word


def test_results(finished, tiny_v, prompt_files):
    folder, out = finished
    results = json.loads((folder / "results.json").read_text())
    assert [row["steps"] for row in results["by_steps"]] == [4, 5]
    for row in results["by_steps"]:
        means = row["means"]
        assert set(means) == {"standard", "learnt", "temperature", "one_for_all"}
        for arm in means:
            assert row[arm] == pytest.approx(means[arm]["jpeg_compressibility"])
        assert row["gain"] == pytest.approx(row["learnt"] - row["standard"], abs=1e-6) and row["gain"] != 0
        kept = means["learnt"]["diversity"] / means["standard"]["diversity"]
        assert row["diversity_kept"] == pytest.approx(kept)
        assert row["best_of_2"] >= row["standard"] and row["calls"] == row["steps"]
        assert f"{row['gain']:+.3f} ± {row['se']:.3f}" in out
    for row in results["table"]:
        assert row["gain"] == pytest.approx(row["learnt"] - row["standard"], abs=1e-5)
        assert row["standard"] == pytest.approx(results["by_steps"][0]["means"]["standard"][row["metric"]])
    # made again from the saved policy
    policy = NoisePolicy.load(folder, stock_trailing(tiny_v))
    model = trailing(Model(tiny_v, "cpu", torch.float32))
    held_out = read_prompts(prompt_files.held_out, "")
    mean, log_std = policy(model.encode(held_out))
    kl = kl_to_standard_normal(mean, log_std).mean().item()
    assert results["kl"] == pytest.approx(kl, rel=1e-5)
    assert results["kl_per_dimension"] == pytest.approx(kl / 256, rel=1e-5)
    sizes = []
    for i, prompt in enumerate(held_out):
        eps = draw_noise([derived_seed("eval", i, j) for j in range(2)], 0, (4, 8, 8), torch.float32)[0]
        x = noise_ppo.sample(model, mean[i] + log_std[i].exp() * eps, model.encode([prompt] * 2), 5, 1.0)
        sizes += [Reward("jpeg_compressibility")([image], [prompt]).item() for image in model.decode(x)]
    assert results["by_steps"][1]["learnt"] == pytest.approx(np.mean(sizes), abs=2e-3)


def test_printed_code_makes_the_evaluated_image(finished, tiny_v, prompt_files, tmp_path):
    folder, out = finished
    snippet = out[out.index("import torch; from diffusers") :]
    assert len(snippet.strip().splitlines()) == 7 and repr(str(ROOT)) in snippet
    command = [sys.executable, "-c", snippet]
    options = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0, done.stderr
    image = Image.open(tmp_path / "learnt.png")

    model = trailing(Model(tiny_v, "cpu", torch.float32))
    prompt = read_prompts(prompt_files.held_out, "")[:1]
    policy = NoisePolicy(12, 16, (4, 8, 8))
    policy.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["policy"])
    with torch.no_grad():
        mean, log_std = policy(model.encode(prompt))
    eps = draw_noise([derived_seed("eval", 0, 0)], 0, (4, 8, 8), torch.float32)[0]
    learnt, standard = (
        model.decode(noise_ppo.sample(model, z, model.encode(prompt), 4, 1.0))[0]
        for z in (mean + log_std.exp() * eps, eps)
    )
    assert_same_images([image], [learnt])
    assert np.abs(np.asarray(image, float) - np.asarray(standard, float)).mean() > 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_updates_of_a_run(arguments, tiny_v, prompt_files, tmp_path, monkeypatch, reduction):
    """Two iterations made again from equations (1) to (5) leave the same policy."""
    flags = f"--reduction {reduction} --iterations 2 --lr 0.05 --kl_weight 0.5 --no-controls --output run"
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*arguments, *flags.split()], SCRIPT)
    assert code == 0, error

    model, normal = trailing(Model(tiny_v, "cpu", torch.float32)), torch.distributions.Normal
    prompts = read_prompts(prompt_files.train, "")
    schedule = schedule_prompts(len(prompts), 3, 2, 0)
    policy = new_policy()
    policy.standardise(model.encode([prompts[i] for i in sorted({i for part in schedule for i in part})]))
    optimizer = torch.optim.Adam(policy.parameters())
    for it, chosen in enumerate(schedule):
        texts = [prompts[i] for i in chosen for _ in range(4)]
        features = model.encode(texts)
        seeds = [derived_seed(0, it, i, j) for i in chosen for j in range(4)]
        eps = draw_noise(seeds, 0, (4, 8, 8), torch.float32)[0]
        with torch.no_grad():
            mean, log_std = policy(features)
            z = mean + log_std.exp() * eps
            old = getattr(normal(mean, log_std.exp()).log_prob(z).flatten(1), reduction)(1)
        images = model.decode(noise_ppo.sample(model, z, features, 4, 1.0))
        reward = Reward("jpeg_compressibility")(images, texts)
        advantage = reward.view(3, 4) - reward.view(3, 4).mean(1, keepdim=True)
        advantage = (advantage / advantage.square().mean().sqrt()).flatten()
        generator = seeded(derived_seed(0, "update", it))
        orders = [torch.randperm(12, generator=generator) for _ in range(2)]
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - it / 2)
        for index in torch.stack(orders).view(4, 6):
            mean, log_std = policy(features[index])
            new = getattr(normal(mean, log_std.exp()).log_prob(z[index]).flatten(1), reduction)(1)
            ratio = (new - old[index]).exp()
            clipped = ratio.clamp(1 - 1e-3, 1 + 1e-3)
            gain = torch.minimum(ratio * advantage[index], clipped * advantage[index]).mean()
            kl = torch.distributions.kl_divergence(normal(mean, log_std.exp()), normal(0.0, 1.0))
            optimizer.zero_grad()
            (0.5 * getattr(kl.flatten(1), reduction)(1).mean() - gain).backward()
            optimizer.step()
    trained, start = torch.load("run/checkpoint.pt", weights_only=True)["policy"], new_policy().state_dict()
    for name, value in policy.named_parameters():  # Adam enlarges rounding errors of very small gradients
        assert (trained[name] - value).norm() < 1e-2 * (value - start[name]).norm(), name


def test_policy_sample_of_a_loaded_policy(finished, tiny_v):
    folder, _ = finished
    pipeline = stock_trailing(tiny_v)
    policy = NoisePolicy.load(folder, pipeline)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    latents = policy.sample(PROMPTS, generators)
    one = policy.sample(PROMPTS[1], torch.Generator().manual_seed(SEEDS[1]))
    assert latents.shape == (3, 4, 8, 8) and not latents.requires_grad
    assert torch.allclose(latents[1:2], one, atol=1e-6)
    mean, log_std = policy(pipeline.encode_prompt(PROMPTS, "cpu", 1, False)[0])
    eps = draw_noise(SEEDS, 0, (4, 8, 8), torch.float32)[0]
    assert torch.allclose(latents, mean + log_std.exp() * eps, atol=1e-6)
    settings = json.loads((folder / "noise_ppo.json").read_text())
    assert settings["model"] == tiny_v and settings["steps"] == 4 and settings["guidance"] == 1
    assert settings["policy"]["latent_shape"] == [4, 8, 8]
    expected = {"class": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": False, "eta": 0.0}
    assert settings["scheduler"] == expected


# ---------------------------------------------------------------- killed and resumed


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("uninterrupted")
    code = exit_code([*arguments, "--output", "run"], cwd, script=SCRIPT)
    assert code == 0, (cwd / "output.txt").read_text()
    return cwd / "run"


def test_same_arguments_same_run(finished, uninterrupted):
    assert_same_run(finished[0], uninterrupted)


KILLERS = [
    [("utils.runs", "save_checkpoint", 1)],  # one iteration made, nothing saved
    [("rewards", "jpeg_kilobytes", 31)],  # in the second iteration's sampling
    [("torch", "minimum", 7)],  # between two updates of the second iteration
    [("os", "fsync", 7)],  # in the middle of writing a file
    [("utils.figures", "save_panels", 1)],  # trained, evaluated, not all written
    [
        ("utils.runs", "save_checkpoint", 2),
        ("utils.runs", "write_csv", 1),
        ("utils.runs", "save_checkpoint", 1),
    ],
]


@pytest.mark.parametrize("killers", KILLERS, ids=lambda k: "+".join(f"{name}{n}" for _, name, n in k))
def test_killed_and_resumed(arguments, uninterrupted, tmp_path, killers):
    argv = [*arguments, "--output", "run"]
    for killer in killers:
        assert exit_code(argv, tmp_path, killer, SCRIPT) == -signal.SIGKILL
        argv = ["--resume", "run"]
    assert exit_code(argv, tmp_path, script=SCRIPT) == 0, (tmp_path / "output.txt").read_text()
    assert_same_run(tmp_path / "run", uninterrupted)


# ---------------------------------------------------------------- flags, learning


def rows_of(argv, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = folder / f"run{len(list(folder.iterdir()))}"
    code, _, error = run_inside([*argv, "--output", str(run)], SCRIPT)
    assert code == 0, error
    return [{k: float(v) for k, v in row.items()} for row in read_metrics(run)]


def test_flags_change_what_they_say(arguments, tmp_path, monkeypatch):
    short = [*arguments, *"--iterations 2 --no-controls --eval_steps 4".split()]

    def last(flags):
        return rows_of([*short, *flags.split()], tmp_path, monkeypatch)[-1]

    plain = last("")
    assert last("--clip 1e8")["clip_fraction"] == 0 < plain["clip_fraction"]
    # the first update is at ratio 1, where the reductions differ by a factor that Adam ignores
    once = [
        last(f"--iterations 1 --minibatch 99 --epochs 1 --reduction {reduction}")
        for reduction in ("mean", "sum")
    ]
    assert once[0]["mean_rms"] == pytest.approx(once[1]["mean_rms"], rel=1e-3)
    assert last("--reduction sum")["approximate_kl"] != plain["approximate_kl"]
    mean_only, std_only = last("--mean_only"), last("--std_only")
    assert (mean_only["std"], mean_only["std_spread"]) == (1, 0) and mean_only["mean_rms"] > 0
    assert std_only["mean_rms"] == std_only["mean_rms_own"] == 0 and std_only["std_spread"] > 0
    shared = last("--policy unconditional")
    assert shared["mean_rms_own"] < 1e-6 < shared["mean_rms"] and plain["mean_rms_own"] > 0.01
    assert last("--kl_weight 1000")["kl_per_dimension"] < 0.5 * plain["kl_per_dimension"]
    assert last("--epochs 5")["approximate_kl"] != plain["approximate_kl"]
    for flags in (
        "--normalise prompt",
        "--normalise none",
        "--hidden 32",
        "--grid 2",
        "--seed 1",
        "--steps 5",
    ):
        assert last(flags)["loss"] != plain["loss"], flags
    assert last("--sample_batch 5")["reward"] == pytest.approx(plain["reward"], abs=1e-3)


@pytest.mark.parametrize("flags", ["--guidance 3", "--dtype bfloat16", "--eval_every 0 --eval_steps"])
def test_other_ways_to_run(arguments, tmp_path, monkeypatch, flags):
    rows = rows_of([*arguments, *flags.split(), "--iterations", "1", "--no-controls"], tmp_path, monkeypatch)
    assert math.isfinite(rows[-1]["reward_held_out"])
    results = json.loads(next(tmp_path.rglob("results.json")).read_text())
    assert [row["steps"] for row in results["by_steps"]] == ([4] if "eval_steps" in flags else [4, 5])
    assert results["by_steps"][0]["calls"] == (8 if "guidance" in flags else 4)
    assert set(results["by_steps"][0]["means"]) == {"standard", "learnt"}


def test_it_learns_a_black_box_reward(arguments, tmp_path, monkeypatch):
    """Brightness of the image's left half minus the right half's: the model knows nothing of it."""
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def side(images, prompts):\n"
        "    grey = [np.asarray(i.convert('L'), float) / 255 for i in images]\n"
        "    return [g[:, :16].mean() - g[:, 16:].mean() for g in grey]\n"
    )
    flags = (
        f"--reward {tmp_path / 'own.py'}:side --iterations 8 --samples 16 --minibatch 24 --eval_samples 16"
    )
    flags += " --clip 5e-3 --lr 2e-2"
    rows_of([*arguments, *flags.split(), "--no-controls", "--eval_every", "0"], tmp_path, monkeypatch)
    for row in json.loads(next(tmp_path.rglob("results.json")).read_text())["by_steps"]:
        assert row["gain"] > 0.02 and row["gain"] > 4 * row["se"], row


def test_update_that_diverges(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside(
        [*arguments, *"--lr 1 --reduction sum --clip 1e9 --epochs 50".split()], SCRIPT
    )
    assert_one_line(code, error.split("\r")[-1], "--lr")
