"""SD XL, SD 3, FLUX.1 and FLUX.2 klein, small, of the real classes: samplers, losses, LoRA, switch and noise
policy against the stock pipelines."""

import copy
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import graft
import noise_ppo
import pgraft
from common import (
    LORA_FILE,
    Model,
    check_model,
    derived_seed,
    draw_noise,
    read_switch,
    stock_call,
    stock_code,
)
from conftest import (
    FLUX_SIZE,
    PROMPTS,
    SEEDS,
    assert_mean,
    assert_same_images,
    assert_same_run,
    difference,
    exit_code,
    randomise,
    run_inside,
    seeded,
    stock,
    stock_pipeline,
    with_lora,
)
from flow_steps import GaussianFlow, distribution_of_samples, flow_grpo_step, linear_step, march
from utils.runs import InputError

FLUX = ("flux", "schnell", "klein_base", "klein")
UNGUIDED = ("schnell", "klein")  # distilled
KINDS = ("xl", "sd3", "no_t5", *FLUX)


def load(families, kind, dtype=torch.float32):
    return Model(families[kind], "cpu", dtype, kind != "no_t5", **FLUX_SIZE if kind in FLUX else {})


@pytest.fixture(scope="module")
def loaded(families):
    """Base models, for tests that do not change them."""
    return {kind: load(families, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pipelines(families):
    """Stock pipelines, for tests that do not change them."""
    return {kind: stock_pipeline(families[kind]) for kind in KINDS}


def ours(model, prompts=PROMPTS, seeds=SEEDS, steps=5, guidance=1.0, eta=0.0):
    """Latents by graft.sample."""
    noise = draw_noise(seeds, steps, model.latent_shape, model.dtype)
    return graft.sample(model, noise, model.encode(prompts), guidance, eta)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(
    "kind, eta, steps",
    [
        ("xl", 0.0, 5),
        ("xl", 1.0, 4),
        ("sd3", 0.0, 5),
        ("no_t5", 0.0, 10),
        *((kind, 0.0, 4 if kind in UNGUIDED else 5) for kind in FLUX),
    ],
)
def test_sample_equals_stock_pipeline(loaded, pipelines, kind, eta, steps, guidance):
    expected = stock(pipelines[kind], steps=steps, guidance=guidance, eta=eta)
    x = ours(loaded[kind], steps=steps, guidance=guidance, eta=eta)
    assert difference(x, expected) <= 1e-4
    images = stock(pipelines[kind], steps=steps, guidance=guidance, eta=eta, output="pil")
    for one, other in zip(loaded[kind].decode(expected), images, strict=True):
        assert np.array_equal(one, other)
    assert_same_images(loaded[kind].decode(x), images)
    for change in ({"seeds": [1, 2, 3]}, {"prompts": PROMPTS[::-1]}, {"guidance": 2.0}, {"steps": 3}):
        settings = {"steps": steps, "guidance": guidance, "eta": eta} | change
        gap = difference(ours(loaded[kind], **settings), x)
        assert gap == 0 if kind in UNGUIDED and "guidance" in change else gap > 1e-2, change


@pytest.mark.parametrize("kind", FLUX)
def test_grid_and_calls_of_the_stock_pipeline(loaded, pipelines, kind):
    """The grid is shifted by the image's tokens, of klein also by the number of steps; embedded guidance
    takes no second prediction."""
    model, pipeline = loaded[kind], pipelines[kind]
    for steps in (4, 7):
        stock(pipeline, steps=steps, guidance=3.0)
        grid = pipeline.scheduler.timesteps
        assert model.timesteps(steps) == grid.tolist() and grid[0] == 1000
        assert torch.allclose(
            grid / 1000, model.shift * (u := torch.arange(steps, 0, -1) / steps) / (1 + (model.shift - 1) * u)
        )
    assert model.shift == pytest.approx({"flux": math.exp(0.46208), "schnell": 1.0}.get(kind, 6.9), rel=0.02)
    calls = []
    handle = model.denoiser.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    ours(model, guidance=3.0, steps=4)
    handle.remove()
    assert calls == [6 if kind == "klein_base" else 3] * 4


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "schnell"])
def test_states_and_pooled_embedding_both_reach_the_model(loaded, kind):
    model = loaded[kind]
    x, t, text = (
        torch.randn(3, *model.latent_shape, generator=seeded()),
        torch.tensor(500),
        model.encode(PROMPTS),
    )
    states, pooled = model.split(text)
    assert states.shape[1] == {"xl": 12, "sd3": 12 + 256, "flux": 512, "schnell": 256}[kind]
    assert pooled.shape == (3, {"xl": 40, "sd3": 32}.get(kind, 16))
    other = text.clone()
    other[:, model.tokens :] = text.flip(0)[:, model.tokens :]
    swapped = torch.cat([text.flip(0)[:, : model.tokens], text[:, model.tokens :]], 1)
    for changed in (other, swapped):
        assert difference(model.predict(x, t, changed), model.predict(x, t, text)) > 1e-3


def test_empty_prompt_of_xl_as_its_pipeline_says(families, loaded, tmp_path):
    assert not loaded["xl"].encode([""]).any()
    folder = shutil.copytree(families["xl"], tmp_path / "xl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    model = Model(str(folder), "cpu", torch.float32)
    assert model.encode([""]).any()
    assert difference(ours(model, guidance=3.0), stock(stock_pipeline(folder), guidance=3.0, eta=0.0)) <= 1e-4


def test_no_t5(families, loaded):
    model = Model(families["sd3"], "cpu", torch.float32, t5=False)
    assert model.pipeline.text_encoder_3 is None
    assert "text_encoder_3=None, tokenizer_3=None" in stock_code(model)
    assert torch.equal(model.encode(PROMPTS), loaded["no_t5"].encode(PROMPTS))
    with pytest.raises(InputError, match="cannot be loaded.*text_encoder_3"):
        Model(families["no_t5"], "cpu", torch.float32)
    assert not torch.equal(model.encode(PROMPTS), loaded["sd3"].encode(PROMPTS))


# ---------------------------------------------------------------- the flow's stochastic step, on a Gaussian


def bias(states):
    """The largest error of mean or variance at four levels. states: of `march`."""
    exact = {s: GaussianFlow().marginal(s) for s in states if s in (0.8, 0.5, 0.2, 0.0)}
    return max(abs(a - b) for s in exact for a, b in zip(states[s][:2], exact[s]))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_flow_step_keeps_the_marginals(eta):
    biases = []
    for steps in (10, 20, 200, 400):
        sigmas = [1 - k / steps for k in range(steps + 1)]
        states = march(linear_step, sigmas, eta, 0.0, 1.0, GaussianFlow())
        biases.append(bias(states))
    assert all(np.isfinite(list(states.values())).ravel())  # also after sigma = 1 and at the last step
    assert biases[0] < {0.0: 0.08, 0.5: 0.08, 1.0: 0.12}[eta] and biases[3] < 5e-3
    assert 1.7 < biases[2] / biases[3] < 2.3  # of first order in the step


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_flow_step_is_the_sde_of_flow_grpo(eta):
    """With many steps the marginals and the dependence of levels are the same. With few, its plain step adds
    noise where x_0 is certain."""
    sigmas, flow, certain = [0.9 - 0.8 * k / 2000 for k in range(2001)], GaussianFlow(), GaussianFlow(0.0)
    own, theirs = (march(s, sigmas, eta, *flow.marginal(0.9), flow) for s in (linear_step, flow_grpo_step))
    for sigma in (0.5, 0.1):
        assert np.allclose(own[sigma], theirs[sigma], atol=4e-3)
        gain = march(linear_step, sigmas, 0.0, 0.0, 1.0, flow)[sigma][2]
        assert own[sigma][2] < 0.97 * gain  # eta shows in the gain
    sigmas = [0.9 - 0.8 * k / 10 for k in range(11)]
    own, theirs = (
        march(s, sigmas, eta, *certain.marginal(0.9), certain) for s in (linear_step, flow_grpo_step)
    )
    assert own[0.1][1] == pytest.approx(0.01, abs=1e-6) and theirs[0.1][1] > 0.013
    # at sigma = 1 its noise is that of the next level, here a = sqrt(2) eta sqrt(.9 / .1) for h = .1
    assert flow_grpo_step(flow, 1.0, 0.9, eta)[2] == pytest.approx(math.sqrt(2) * eta * 3 * math.sqrt(0.1))


def test_what_few_steps_cost():
    """The standard deviation that the samples of 28 steps of SD 3's grid lack, which are few."""
    for eta, lack in ((0.0, 0.051), (0.5, 0.059), (1.0, 0.092)):
        mean, std = distribution_of_samples(linear_step, 28, eta, GaussianFlow())
        assert (mean, 0.5 - std) == (pytest.approx(0.8, abs=1e-4), pytest.approx(lack, abs=6e-4))
        assert distribution_of_samples(linear_step, 28, eta, GaussianFlow(0.0)) == pytest.approx(
            (0.8, 0), abs=1e-4
        )


def test_step_of_a_flow_in_closed_form():
    # eta 0: Euler. eta 1: the posterior of x' given x and x_0, where x = (alpha / alpha') x' + b w
    model, x, v = GaussianFlow(), 0.3, GaussianFlow().velocity(0.3, 0.7)
    gain, offset, std = linear_step(model, 0.7, 0.4, 0.0)
    assert (gain * x + offset, std) == (pytest.approx(x - 0.3 * v, abs=1e-6), 0)
    b2 = 0.7**2 - (0.3 / 0.6 * 0.4) ** 2
    assert linear_step(model, 0.7, 0.4, 1.0)[2] == pytest.approx(0.4 * math.sqrt(b2) / 0.7, abs=1e-6)
    assert linear_step(model, 1.0, 0.4, 1.0)[2] == pytest.approx(0.4, abs=1e-6)  # forgets x but for x_0
    assert linear_step(model, 0.2, 0.0, 1.0)[2] == 0


def test_scripts_take_the_same_steps(loaded):
    model = loaded["no_t5"]
    noise, text = draw_noise(SEEDS, 4, model.latent_shape, model.dtype), model.encode(PROMPTS)
    for eta in (0.0, 0.7):
        x = graft.sample(model, noise, text, 1.0, eta)
        assert torch.equal(
            pgraft.denoise(model, noise[0], [*model.timesteps(4), -1], noise[1:], text, 1.0, eta), x
        )
    assert torch.equal(
        noise_ppo.sample(model, noise[0], text, 4, 1.0), graft.sample(model, noise, text, 1.0, 0.0)
    )
    assert difference(x, graft.sample(model, noise, text, 1.0, 0.0)) > 0.1


# ---------------------------------------------------------------- loss


def test_flow_target():
    x_0, noise = (
        GaussianFlow.M + GaussianFlow().S * torch.randn(200_000, 1, generator=seeded(1)),
        torch.randn(200_000, 1, generator=seeded(2)),
    )
    for sigma in (0.2, 0.7, 1.0):
        level = torch.full((200_000,), sigma)
        x_t, target = graft.training_target(x_0, noise, 1 - level, level, "flow")
        assert torch.equal(target, noise - x_0) and torch.allclose(x_t, (1 - sigma) * x_0 + sigma * noise)
        rest = (target - GaussianFlow().velocity(x_t, sigma)).flatten()
        for test in (1, x_t.flatten(), x_t.flatten() ** 2):  # E[target | x_t] is the exact velocity
            assert_mean(rest * test, 0)


@pytest.mark.parametrize("kind", ["xl", "sd3", *FLUX])
def test_denoising_loss(loaded, kind):
    model = loaded[kind]
    x_0, noise = (torch.randn(3, *model.latent_shape, generator=seeded(i)) for i in (3, 4))
    t, text, scheduler = torch.tensor([20, 300, 999]), model.encode(PROMPTS), model.pipeline.scheduler
    if kind != "xl":
        t = t.float()
        scheduler.set_timesteps(sigmas=[0.999, 0.3, 0.02], mu=1.0)  # shifted: the grid of the stock noising
        t = scheduler.timesteps.flip(0)
        x_t, target = scheduler.scale_noise(x_0, t, noise), noise - x_0
    else:
        x_t, target = scheduler.add_noise(x_0, noise, t), noise
    states, pooled = model.split(text)
    guidance = 3.0 if kind == "flux" else 1.0
    if kind in FLUX:
        out = flux_velocity(model, x_t, t / 1000, states, pooled, guidance)
    elif kind == "sd3":
        out = model.denoiser(x_t, timestep=t, encoder_hidden_states=states, pooled_projections=pooled).sample
    else:
        ids = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(3, -1)
        out = model.denoiser(
            x_t, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
    expected = (out - target).square().mean()
    assert graft.denoising_loss(model, x_0, text, t, noise, guidance).item() == pytest.approx(
        expected.item(), rel=1e-5
    )
    clean = pgraft.denoising_loss(model, x_0, (1.0, 0.0), text, t, noise, guidance)
    assert clean.item() == pytest.approx(expected.item(), rel=1e-4)
    if kind == "flux":
        assert graft.denoising_loss(model, x_0, text, t, noise, 1.0).item() != pytest.approx(
            expected.item(), rel=1e-2
        )


def flux_velocity(model, x, sigma, states, pooled, guidance):
    """The network's output in the layout of x, tokens and positions made by hand. sigma: (batch,)."""
    n, channels, height, width = x.shape
    rows = torch.arange(height if model.family.pipeline == "Flux2KleinPipeline" else height // 2)
    columns = torch.arange(width if model.family.pipeline == "Flux2KleinPipeline" else width // 2)
    places = torch.cartesian_prod(torch.arange(1), rows, columns)
    options = {"timestep": sigma, "encoder_hidden_states": states}
    if model.family.pipeline == "Flux2KleinPipeline":
        text_ids = torch.nn.functional.pad(torch.arange(states.shape[1])[:, None], (3, 0))
        options |= {"img_ids": torch.nn.functional.pad(places, (0, 1)), "txt_ids": text_ids}
        out = model.denoiser(x.flatten(2).transpose(1, 2), **options).sample
        return out.transpose(1, 2).unflatten(2, (height, width))
    options |= {"img_ids": places.float(), "txt_ids": torch.zeros(states.shape[1], 3)}
    options |= {"pooled_projections": pooled}
    if model.denoiser.config.guidance_embeds:
        options["guidance"] = torch.tensor([guidance]).expand(n)
    # a token holds the 2 x 2 numbers of each channel
    tokens = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    out = model.denoiser(tokens, **options).sample
    return torch.nn.functional.fold(out.transpose(1, 2), (height, width), 2, stride=2)


def test_flow_timesteps_to_train_on(loaded, models):
    model, n = loaded["sd3"], 40_000
    t = model.draw_timesteps(n, seeded()).double()
    u = t / 1000 / (3 - 2 * t / 1000)  # undo shift 3
    z = u.logit()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03
    above = model.draw_timesteps(n, seeded(1), 800.0)
    assert above.dtype == torch.float32 and above.min() > 800 and above.max() <= 1000
    for level in (850, 900, 950):  # the same distribution, given that it lies above
        share = (t[t > 800] > level).double()
        assert abs((above > level).double().mean() - share.mean()) < 0.015
    assert (model.draw_timesteps(1000, seeded(), 999.6) > 999.6).all()
    t = models["v"].draw_timesteps(5000, seeded(), 990.0)
    assert t.dtype == torch.int64 and set(t.tolist()) == set(range(991, 1000))
    assert models["v"].draw_timesteps(50_000, seeded()).min() == 0


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "klein_base"])
def test_gradient_checkpointing_gives_the_same_gradients(loaded, kind):
    model = with_lora(loaded[kind], "attention")
    randomise(model)
    x_0, noise = (torch.randn(3, *model.latent_shape, generator=seeded(i)) for i in (3, 4))
    gradients, t = [], torch.tensor([20, 300, 999])
    for checkpointing in (False, True):
        if checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        graft.denoising_loss(model, x_0, model.encode(PROMPTS), t, noise, 1.0).backward()
        gradients.append([p.grad.clone() for p in model.lora().values()])
        for parameter in model.lora().values():
            parameter.grad = None
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients))
    still = [name for name, gradient in zip(model.lora(), gradients[0]) if not gradient.any()]
    # SD 3 drops the text stream after its last block
    assert all("transformer_blocks.1.attn.add_q_proj" in name for name in still)


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize(
    "kind, targets",
    [
        ("xl", "all"),
        ("sd3", "attention"),
        ("no_t5", "all"),
        ("flux", "attention"),
        ("schnell", "all"),
        ("klein_base", "attention"),
        ("klein", "all"),
    ],
)
def test_saved_lora_in_the_stock_pipeline(loaded, families, tmp_path, kind, targets):
    model = with_lora(loaded[kind], targets, rank=8, alpha=4)
    assert torch.equal(ours(model), ours(loaded[kind]))
    randomise(model)
    model.save_lora(tmp_path)
    pipeline = stock_pipeline(families[kind])
    base = stock(pipeline, guidance=3.0, eta=0.0)
    pipeline.load_lora_weights(str(tmp_path))
    x = stock(pipeline, guidance=3.0, eta=0.0)
    assert difference(x, base) > 1e-2
    assert difference(ours(model, guidance=3.0), x) <= 1e-4
    with model.lora_merged():
        assert difference(ours(model, guidance=3.0), x) <= 1e-3
    with model.lora_off():
        assert difference(ours(model, guidance=3.0), base) <= 1e-4
    again = copy.deepcopy(loaded[kind])
    again.load_lora(str(tmp_path))
    assert torch.equal(ours(again), ours(model))


@pytest.mark.parametrize("kind", ["sd3", *FLUX])
def test_lora_reaches_both_streams(loaded, kind):
    names = set(with_lora(loaded[kind], "attention").lora())
    for layer in loaded[kind].family.attention:
        assert any(f".{layer}." in name for name in names), layer
    if "klein" in kind:  # the layers of a single stream, which are joint there
        assert {name.split(".lora_A")[0] for name in names if "single" in name and "lora_A" in name} == {
            f"single_transformer_blocks.{i}.attn.{layer}"
            for i in (0, 1)
            for layer in ("to_qkv_mlp_proj", "to_out")
        }


@pytest.mark.parametrize("kind", ["v", "xl"])
def test_lora_in_the_format_of_webui(models, loaded, tiny_v, families, tmp_path, kind):
    """The documented conversion: kohya's key names, and the same images where diffusers reads them back."""
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
    from safetensors.torch import load_file, save_file

    model = with_lora((models | loaded)[kind], "attention", rank=4, alpha=4)
    randomise(model)
    model.save_lora(tmp_path)
    state = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(tmp_path / LORA_FILE)))
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"} <= set(state)
    assert len(state) == 3 * len(model.lora()) // 2 and all(name.startswith("lora_unet_") for name in state)
    save_file(state, tmp_path / "kohya.safetensors")
    pipeline = stock_pipeline({"v": tiny_v, "xl": families["xl"]}[kind])
    pipeline.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    assert difference(ours(model), stock(pipeline, eta=0.0)) <= 1e-4


# ---------------------------------------------------------------- P-GRAFT's switch


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "klein_base", "klein"])
def test_switch_in_the_stock_pipeline(loaded, families, tmp_path, kind):
    model = with_lora(loaded[kind], "attention")
    randomise(model, 0.5)
    model.save_lora(tmp_path)
    pipeline = stock_pipeline(families[kind])
    pipeline.load_lora_weights(str(tmp_path))
    args = types.SimpleNamespace(model=families[kind], steps=5, guidance=3.0, eta=0.0, data="x0")
    pgraft.save_switch(tmp_path, model, model.timesteps(5)[2], args)
    switch = json.loads((tmp_path / "pgraft.json").read_text())["switch_timestep"]
    assert read_switch(tmp_path, "another", model) == switch
    switches = []
    for steps in (5, 8):  # trained with 5 steps, used with others

        def base_from_the_switch_on(pipe, i, t, kwargs):
            if i + 1 == (pipe.scheduler.timesteps > switch).sum():
                pipe.disable_lora()
            return kwargs

        switch_at = pgraft.switch_step(model.timesteps(steps), switch)
        noise = draw_noise(SEEDS, steps, model.latent_shape, model.dtype)
        x_s, x_0 = pgraft.sample(model, noise, model.encode(PROMPTS), 3.0, 0.0, switch_at)
        pipeline.enable_lora()
        expected = stock(
            pipeline, steps=steps, guidance=3.0, eta=0.0, callback_on_step_end=base_from_the_switch_on
        )
        assert difference(x_0, expected) <= 3e-4
        switches.append(switch_at)
        for other in (switch_at - 1, switch_at + 1):
            assert (
                difference(pgraft.sample(model, noise, model.encode(PROMPTS), 3.0, 0.0, other)[1], expected)
                > 3e-3
            )
    assert switches[0] == 2 and switches[1] > 2


def test_switch_of_another_flow_is_refused(loaded, models, tmp_path):
    args = types.SimpleNamespace(model="", steps=5, guidance=3.0, eta=0.0, data="x0")
    pgraft.save_switch(tmp_path, loaded["sd3"], 789.5, args)
    with pytest.raises(InputError, match=r"does not fit the model.*789\.5"):
        read_switch(tmp_path, "another", models["v"])


# ---------------------------------------------------------------- noise policy


@pytest.mark.parametrize("kind", ["xl", "sd3", "no_t5", *FLUX])
def test_noise_policy_with_the_stock_pipeline(loaded, pipelines, kind):
    model, pipeline = copy.copy(loaded[kind]), pipelines[kind]
    if kind == "xl":
        scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
        model.pipeline = copy.copy(model.pipeline)
        pipeline, model.pipeline.scheduler = copy.copy(pipeline), scheduler
        pipeline.scheduler = scheduler
    text = noise_ppo.text_features(model, PROMPTS)
    shapes = {"xl": (1, 40), "flux": (1, 16), "schnell": (1, 16), "klein_base": (512, 48), "klein": (512, 48)}
    assert text.shape == (3, *shapes.get(kind, (1, 32)))
    policy = noise_ppo.NoisePolicy(*text.shape[1:], model.latent_shape)
    policy.standardise(text)
    torch.nn.init.normal_(policy.head.weight, std=0.2, generator=seeded())
    policy.pipe = pipeline
    given = policy.sample(PROMPTS, [torch.Generator().manual_seed(s) for s in SEEDS])
    packed = kind in ("flux", "schnell")  # in the form that latents= takes
    sizes = (*FLUX_SIZE.values(), pipeline.vae_scale_factor)
    latents = pipeline._unpack_latents(given, *sizes) if packed else given
    mean, log_std = policy(text)
    z = mean + log_std.exp() * draw_noise(SEEDS, 0, model.latent_shape, torch.float32)[0]
    assert torch.allclose(latents, z, atol=1e-5) and difference(z, mean) > 0.1 and mean.std() > 0.05
    expected = stock(pipeline, steps=4, guidance=3.0, eta=0.0, latents=given)
    assert difference(noise_ppo.sample(model, z, model.encode(PROMPTS), 4, 3.0), expected) <= 1e-4


REAL = {  # (tokens, width) that the policy reads, latent, denoiser
    "1.5": (77, 768, (4, 64, 64), {"cross_attention_dim": 768}),
    "xl": (
        1,
        1280,
        (4, 128, 128),
        {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
        },
    ),
    "sd3": (
        1,
        2048,
        (16, 128, 128),
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536},
    ),
    "flux": (1, 768, (16, 128, 128), {"guidance_embeds": True}),
    "klein": (
        1,
        7680,
        (128, 64, 64),
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
    ),
}


@pytest.mark.parametrize("kind", REAL)
def test_noise_policy_is_small_beside_the_real_model(kind):
    import diffusers

    names = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}
    names |= {"klein": "Flux2Transformer2DModel"}
    tokens, width, latent, config = REAL[kind]
    with torch.device("meta"):
        denoiser = getattr(diffusers, names.get(kind, "UNet2DConditionModel"))(**config)
        policy = noise_ppo.NoisePolicy(tokens, width, latent)
    numbers = [sum(p.numel() for p in module.parameters()) for module in (policy, denoiser)]
    assert numbers[1] > 8e8 and numbers[0] / numbers[1] < 0.005


def test_what_the_policy_reads():
    """The pooled embedding, or states of at most 10^5 numbers, or their mean over the tokens."""
    states, pooled = torch.randn(2, 77, 1024, generator=seeded()), torch.randn(2, 5, generator=seeded(1))
    assert torch.equal(noise_ppo.policy_input(states, pooled), pooled[:, None])
    assert torch.equal(noise_ppo.policy_input(states, None), states)
    states = torch.randn(2, 512, 256, generator=seeded())
    assert torch.equal(noise_ppo.policy_input(states, None)[:, 0], states.mean(1))


# ---------------------------------------------------------------- precision and memory


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "klein_base"])
def test_bfloat16(families, pipelines, kind):
    model = load(families, kind, torch.bfloat16)
    expected = stock(stock_pipeline(families[kind], torch.bfloat16), guidance=3.0, eta=0.0).float()
    assert (ours(model, guidance=3.0) - expected).square().mean().sqrt() <= 0.1 * expected.std()
    parameters = model.add_lora(4, 8, "attention", seed=0)
    x_0, noise = (torch.randn(3, *model.latent_shape, generator=seeded(i)) for i in (3, 4))
    with torch.autocast("cpu", torch.bfloat16):
        loss = graft.denoising_loss(
            model, x_0, model.encode(PROMPTS), torch.tensor([20, 300, 999]), noise, 3.0
        )
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in parameters)


def test_vae_in_float32_where_the_stock_pipeline_does_so(families):
    dtypes = {kind: Model(families[kind], "cpu", torch.float16).vae.dtype for kind in ("xl", "sd3")}
    assert dtypes == {"xl": torch.float32, "sd3": torch.float16}


def test_large_images_are_decoded_one_at_a_time(families, loaded, tmp_path):
    folder = Path(shutil.copytree(families["xl"], tmp_path / "large"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 64}))
    model, sizes = Model(str(folder), "cpu", torch.float32), []
    model.vae.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    latents = torch.randn(3, 4, 8, 8, generator=seeded())
    assert_same_images(model.decode(latents), loaded["xl"].decode(latents))
    assert model.latent_shape == (4, 64, 64) and sizes == [1, 1, 1] and not loaded["xl"].vae.use_slicing


def test_level_after_the_last_step_of_a_flow(loaded):
    model = loaded["sd3"]
    assert model.alpha_sigma(-1) == (1.0, 0.0) and model.alpha_sigma(250) == pytest.approx((0.75, 0.25))
    alpha, sigma = model.alpha_sigma(torch.tensor([-5.0, 1000.0]))
    assert alpha.tolist() == [1, 0] and sigma.tolist() == [0, 1]


def test_what_the_stock_call_cannot_make(loaded):
    """A flow's random steps: the printed code says so, and only then."""
    for eta, said in ((0.0, False), (0.5, True)):
        code = stock_call(loaded["sd3"], "a", graft.Args(steps=4, guidance=1.0, eta=eta))
        assert code.startswith("# the stock flow is deterministic") == said and "eta=" not in code
    assert "eta=0.5" in stock_call(loaded["xl"], "a", graft.Args(steps=4, guidance=1.0, eta=0.5))


def test_the_vae_of_xl_has_the_models_precision(families):
    """Only float16 decodes in float32: bfloat16 has the range."""
    model = Model(families["xl"], "cpu", torch.bfloat16)
    assert model.vae.config.force_upcast and model.vae.dtype == torch.bfloat16


def test_text_encoders_are_on_the_device_only_while_they_encode(families, monkeypatch):
    model, moves = Model(families["sd3"], "cpu", torch.float32), []
    # no accelerator is needed to see the moves
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        encoder = getattr(model.pipeline, name)
        monkeypatch.setattr(encoder, "to", lambda device, name=name: moves.append((name[13:], device)))
    encode_prompt = model.pipeline.encode_prompt
    monkeypatch.setattr(
        model.pipeline, "encode_prompt", lambda **o: (moves.append("encode"), encode_prompt(**o))[1]
    )
    model.device = "cpu:0"  # not the word for main memory
    model.encode(PROMPTS)
    model.encode(PROMPTS)  # known now
    assert moves == [*((n, "cpu:0") for n in ("", "2", "3")), "encode", *((n, "cpu") for n in ("", "2", "3"))]


# ---------------------------------------------------------------- what is refused


def test_another_pipeline_is_refused_before_anything_loads(monkeypatch, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, filename: str(tmp_path / filename))
    with pytest.raises(
        InputError,
        match="pixart/sigma: is a PixArtSigmaPipeline; supported: .*XLPipeline, StableDiffusion3Pipeline",
    ):
        Model("pixart/sigma", "cpu", torch.float32)
    monkeypatch.undo()
    with pytest.raises(InputError, match="no/such: cannot be loaded"):
        check_model("no/such")


@pytest.mark.parametrize(
    "kind, config",
    [
        ("xl", {"_class_name": "EDMEulerScheduler"}),
        ("xl", {"prediction_type": "sample"}),
        ("sd3", {"use_dynamic_shifting": True}),
        ("sd3", {"_class_name": "FlowMatchHeunDiscreteScheduler"}),
    ],
)
def test_scheduler_of_another_kind_is_refused(families, tmp_path, kind, config):
    folder = Path(shutil.copytree(families[kind], tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    stored = json.loads(file.read_text())
    if "_class_name" in config:
        stored = {"num_train_timesteps": 1000}
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(
            json.dumps(index | {"scheduler": ["diffusers", config["_class_name"]]})
        )
    file.write_text(json.dumps(stored | config))
    with pytest.raises(InputError, match=f"--model {folder}: (its|prediction type)"):
        Model(str(folder), "cpu", torch.float32)


@pytest.mark.parametrize(
    "kind, config",
    [
        ("xl", {"thresholding": True, "clip_sample": True}),  # for pixels: latents are unbounded
        ("sd3", {"stochastic_sampling": True}),  # a sampler that this project does not have
    ],
)
def test_settings_of_a_scheduler_that_are_turned_off(families, tmp_path, kind, config):
    folder = Path(shutil.copytree(families[kind], tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    model = Model(str(folder), "cpu", torch.float32)
    assert not any(model.pipeline.scheduler.config[name] for name in config)


def test_flux_with_a_constant_shift(families, tmp_path):
    """A scheduler without dynamic shifting: its own shift is that of the levels and of the training draws."""
    folder = Path(shutil.copytree(families["flux"], tmp_path / "model"))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dynamic_shifting": False, "shift": 2.5}))
    model = Model(str(folder), "cpu", torch.float32)
    grid = torch.tensor(model.timesteps(4)) / 1000
    u = torch.tensor([1.0, 0.75, 0.5, 0.25])
    assert model.shift == 2.5 and torch.allclose(grid, 2.5 * u / (1 + 1.5 * u))


# ---------------------------------------------------------------- NaN


def test_images_that_are_not_numbers(loaded):
    with pytest.raises(InputError, match="sample 3: NaN or Inf"):
        loaded["no_t5"].decode(torch.full((1, 16, 8, 8), math.inf), "sample 3")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_pixel_that_is_no_number(loaded, monkeypatch, value):
    pixels = torch.zeros(2, 3, 8, 8)
    pixels[1, 2, 3, 4] = value
    monkeypatch.setattr(loaded["xl"].vae, "decode", lambda latents: types.SimpleNamespace(sample=pixels))
    with pytest.raises(InputError, match="decode: NaN or Inf"):
        loaded["xl"].decode(torch.zeros(2, 4, 8, 8))


class OverflowingScaler(torch.amp.GradScaler):
    """float16's scaler on the CPU, every gradient infinite."""

    def __init__(self, device, enabled):
        super().__init__("cpu", enabled=True)

    def unscale_(self, optimizer):
        for group in optimizer.param_groups:
            group["params"][0].grad.fill_(math.inf)
        super().unscale_(optimizer)


@pytest.mark.parametrize(
    "script, scaled", [("graft.py", True), ("graft.py", False), ("pgraft.py", True), ("pgraft.py", False)]
)
def test_gradients_that_stay_infinite(tiny_arguments, tmp_path, monkeypatch, script, scaled):
    monkeypatch.chdir(tmp_path)
    argv = [*tiny_arguments, *"--rounds 1 --updates 30 --output run".split()]
    argv += ["--switch", "0.5"] if script == "pgraft.py" else []
    if scaled:
        monkeypatch.setattr(torch.amp, "GradScaler", OverflowingScaler)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    code, _, error = run_inside(argv, script)
    # float16 halves the scale of 65536 sixteen times, and the weights stay as they were
    where = "round 1, update 17: loss 0." if scaled else "round 1, update 1: loss "
    assert code == 2 and where in error and f"gradient norm {'inf' if scaled else 'nan'}; lower --lr" in error


# ---------------------------------------------------------------- complete runs


def arguments(folder, prompt_files, script):
    sizes = "--rounds 1 --prompts_per_round 2 --samples 2 --updates 1 --batch 2 --lr 1e-2"
    sizes += " --lora_rank 2 --lora_alpha 5"
    sizes += {"graft.py": "", "pgraft.py": " --probe_prompts 2 --probe_restarts 2 --steps 4"}.get(script, "")
    if script == "noise_ppo.py":
        sizes = (
            "--iterations 1 --prompts_per_iteration 2 --samples 2 --eval_steps 2 3 --no-controls --hidden 8"
        )
        sizes = sizes.replace("2 3", "2 4") if "xl" in folder else sizes
    files = (
        f"--prompts {prompt_files.train} --eval_prompts {prompt_files.held_out} --model {folder} --device cpu"
    )
    rest = f"--steps 2 --eval_samples 2 --reward jpeg_incompressibility --output run {sizes}"
    if Path(folder).name in FLUX:
        rest += " --height 16 --width 32"
    return f"{files} {rest}".split()


SCRIPTS = ("graft.py", "pgraft.py", "noise_ppo.py")
RUNS = [(kind, script) for kind in ("xl", "sd3", "flux", "klein_base") for script in SCRIPTS]


@pytest.mark.drawn
@pytest.mark.parametrize("kind, script", [*RUNS, *((kind, "graft.py") for kind in UNGUIDED)])
def test_complete_run(families, prompt_files, tmp_path, monkeypatch, kind, script):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    argv = arguments(families[kind], prompt_files, script)
    code, out, error = run_inside([*argv, "--eval_rewards", "jpeg_compressibility"], script)
    assert code == 0, error
    stored = json.loads(Path("run/args.json").read_text())
    guidance = {"xl": 5.0, "sd3": 7.0, "flux": 3.5, "klein_base": 4.0}
    assert stored["guidance"] == guidance.get(kind, 1.0)
    assert stored.get("steps") == {"pgraft.py": 4}.get(script, 2)
    eta = 1.0 if kind == "xl" else {"graft.py": 0.0, "pgraft.py": 0.5}.get(script)
    assert stored.get("eta") == (None if script == "noise_ppo.py" else eta)
    printed = out[out.index("import torch; from diffusers") :]
    names = {"xl": "DDIMScheduler, StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline"}
    names |= dict.fromkeys(("flux", "schnell"), "FluxPipeline")
    assert f"from diffusers import {names.get(kind, 'Flux2KleinPipeline')}\n" in printed
    assert ("# the stock flow is deterministic" in printed) == (kind != "xl" and script == "pgraft.py")
    exec(printed, {"json": json})
    name = "learnt.png" if script == "noise_ppo.py" else "tuned.png"
    image, shown = Image.open(name), Image.open("run/grid.png")
    assert image.size == (32 if kind in FLUX else 16, 16) and np.asarray(shown).std() > 0
    if script == "graft.py":
        model = load(families, kind)
        model.load_lora("run")
        prompt = Path(prompt_files.held_out).read_text().splitlines()[:1]
        x = ours(model, prompt, [derived_seed("eval", 0, 0)], 2, stored["guidance"], stored["eta"])
        assert_same_images([image], model.decode(x))


def test_killed_and_resumed(families, prompt_files, tmp_path):
    argv = [*arguments(families["sd3"], prompt_files, "pgraft.py"), "--no-t5"]
    for name in ("complete", "killed"):
        (tmp_path / name).mkdir()
    assert exit_code(argv, tmp_path / "complete", script="pgraft.py") == 0, (
        tmp_path / "complete" / "output.txt"
    ).read_text()
    for killer in (("torch.nn.utils", "clip_grad_norm_", 1), ("utils.runs", "save_checkpoint", 1)):
        assert exit_code(argv, tmp_path / "killed", killer, "pgraft.py") < 0
        argv = ["--resume", "run"]
    assert exit_code(argv, tmp_path / "killed", script="pgraft.py") == 0, (
        tmp_path / "killed" / "output.txt"
    ).read_text()
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "complete" / "run")


def test_what_a_distilled_model_cannot_take(families):
    for kind, label in (("schnell", "FLUX.1 schnell"), ("klein", "FLUX.2 klein")):
        options = {"model": families[kind], "reward": "jpeg_compressibility", "device": "cpu"}
        args = graft.prepare(graft.Args(**options))[0]
        assert (args.steps, args.guidance) == (4, 1.0)
        assert graft.prepare(graft.Args(**options, guidance=1.0))[0].guidance == 1.0  # none is no guidance
        with pytest.raises(InputError, match=f"--guidance 3: {label} takes no guidance; leave it out"):
            graft.prepare(graft.Args(**options, guidance=3.0))
    for kind, defaults in (("flux", (28, 3.5)), ("klein_base", (50, 4.0))):
        args = graft.prepare(graft.Args(**options | {"model": families[kind]}))[0]
        assert (args.steps, args.guidance) == defaults


def test_own_defaults_of_a_script(families):
    """P-GRAFT's probe needs a random sampler for a flow too; PPO's clip is smaller for larger latents."""
    options = {"model": families["no_t5"], "reward": "jpeg_compressibility", "device": "cpu"}
    assert graft.prepare(graft.Args(**options))[0].eta == 0.0
    assert pgraft.prepare(pgraft.Args(**options))[0].eta == 0.5
    assert noise_ppo.prepare(noise_ppo.Args(**options))[0].clip == 1e-4
    assert noise_ppo.prepare(noise_ppo.Args())[0].clip == 1e-3


def test_defaults_of_the_embedded_model():
    """They are not those of Stable Diffusion, whose class it has."""
    sampling = {"steps": 10, "guidance": 1.0, "sample_batch": 64}
    tuning = {"eta": 1.0, "micro_batch": 64, "lora_targets": "all", "lr": 1e-3}
    rewards = {"eval_rewards": "shapes_strict,shapes_graded,shapes_fit,jpeg_compressibility"}
    for script, expected in (
        (graft, sampling | tuning | rewards),
        (pgraft, sampling | tuning | rewards),
        (noise_ppo, sampling | rewards | {"steps": 4}),  # its own
    ):
        args = vars(script.prepare(script.Args(device="cpu"))[0])
        assert {name: args[name] for name in expected} == expected
