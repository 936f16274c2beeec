"""The sampler, the loss and the LoRA of graft.py against the stock pipeline."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import graft
from common import Model, draw_noise
from conftest import (
    PROMPTS,
    SEEDS,
    assert_same_images,
    difference,
    randomise,
    run_inside,
    stock,
    stock_pipeline,
    with_lora,
)
from rewards import Reward
from utils.runs import InputError


@pytest.fixture
def tuned(models):
    """A v-prediction model of its own with a LoRA of random weights, alpha half the rank."""
    model = with_lora(models["v"], "attention")
    randomise(model)
    return model


def ours(model, prompts=PROMPTS, seeds=SEEDS, steps=5, guidance=1.0, eta=1.0):
    """Latents by graft.sample."""
    noise = draw_noise(seeds, steps, model.latent_shape, model.dtype)
    return graft.sample(model, noise, model.encode(prompts), guidance, eta)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind, steps", [("epsilon", 4), ("epsilon", 30), ("v", 4), ("v", 10)])
def test_sample_equals_stock_pipeline(models, tiny_epsilon, tiny_v, kind, steps, eta, guidance):
    pipeline = stock_pipeline({"epsilon": tiny_epsilon, "v": tiny_v}[kind])
    expected = stock(pipeline, steps=steps, guidance=guidance, eta=eta)
    x = ours(models[kind], steps=steps, guidance=guidance, eta=eta)
    assert difference(x, expected) <= 1e-5
    images = stock(pipeline, steps=steps, guidance=guidance, eta=eta, output="pil")
    # given the same latents the decoder is exact
    for one, other in zip(models[kind].decode(expected), images, strict=True):
        assert np.array_equal(one, other)
    assert_same_images(models[kind].decode(x), images)


def test_many_prompts_are_encoded_as_one_is(tiny_epsilon):
    """More than the 64 that are encoded at a time."""
    model = Model(tiny_epsilon, "cpu", torch.float32)
    words = ["red", "green", "blue", "yellow", "circle", "square", "triangle", "left", "right"]
    prompts = [f"{a} {b}" for a in words for b in words]  # 81
    together, calls = model.encode(prompts), []
    encode_prompt = model.pipeline.encode_prompt
    model.pipeline.encode_prompt = lambda **options: (calls.append(options), encode_prompt(**options))[1]
    for i in (0, 63, 64, 80):
        model.text_cache.clear()
        assert difference(model.encode([prompts[i]])[0], together[i]) <= 1e-5
    assert len(together) == 81 and len(calls) == 4


def test_settings_of_the_stock_comparison_matter(models):
    """Each of seed, prompt, eta, guidance and steps changes the latents: equality above is not vacuous."""
    x = ours(models["epsilon"])
    changes = (
        {"seeds": [1, 2, 3]},
        {"prompts": PROMPTS[::-1]},
        {"eta": 0.0},
        {"guidance": 3.0},
        {"steps": 6},
    )
    for change in changes:
        assert difference(ours(models["epsilon"], **change), x) > 1e-2, change


def test_scheduler_that_clips_is_not_obeyed(models, tiny_epsilon):
    # latents are unbounded; DDIM's own default clips them to [-1, 1]
    assert ours(models["epsilon"]).abs().max() > 1.5
    assert models["epsilon"].pipeline.scheduler.config.clip_sample is False


def test_steps_that_do_not_join_up(models, tiny_arguments, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="--steps 30"):
        models["v"].timesteps(30)
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, "--steps", "30"])
    assert code == 2 and error.startswith("error: --steps 30") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1000, 1001, 2000])
def test_too_many_steps(models, steps):
    # leading spacing with an offset of 1 would ask for timestep 1000, which does not exist
    with pytest.raises(InputError, match=f"--steps {steps}"):
        models["epsilon"].timesteps(steps)


def test_an_image_does_not_depend_on_its_batch(models):
    def sampled(order, batch):
        args = SimpleNamespace(sample_batch=batch, steps=4, guidance=3.0, eta=1.0)
        prompts, seeds = [PROMPTS[i % 3] for i in order], [100 + i for i in order]
        latents, scores, _ = graft.sample_and_score(models["v"], [reward], prompts, seeds, args, "test")
        at = torch.tensor(order).argsort()
        return latents[at], {name: values[at] for name, values in scores.items()}

    reward = Reward("jpeg_compressibility")
    latents, scores = sampled(list(range(6)), 6)
    assert len(scores["jpeg_compressibility"].unique()) > 3
    for order, batch in ((list(range(6)), 1), ([3, 5, 0, 4, 1, 2], 4)):
        other, other_scores = sampled(order, batch)
        assert difference(other, latents) <= 1e-5
        for name, values in scores.items():
            assert torch.allclose(values, other_scores[name], rtol=1e-3, atol=2e-3), name


def test_merged_sampling_costs_no_more_than_the_stock_call(tuned, tiny_v):
    pipeline = stock_pipeline(tiny_v)
    calls = {"ours": [], "stock": [], "lora": []}

    def count(name):
        return lambda module, inputs, output: calls[name].append(len(inputs[0]))

    tuned.denoiser.register_forward_hook(count("ours"))
    pipeline.unet.register_forward_hook(count("stock"))
    for name, module in tuned.denoiser.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(count("lora"))
    for guidance in (1.0, 3.0):
        stock(pipeline, guidance=guidance)
        with tuned.lora_merged():
            ours(tuned, guidance=guidance)
    assert calls["ours"] == calls["stock"] == [3] * 5 + [6] * 5  # rows of each call
    assert not calls["lora"]
    ours(tuned)
    assert calls["lora"]  # the hooks do count


def test_text_is_encoded_once_per_prompt(tiny_arguments, tmp_path, monkeypatch):
    from transformers import CLIPTextModel

    seen, forward = [], CLIPTextModel.forward

    def counted(self, input_ids, *rest, **options):
        seen.extend(tuple(row) for row in input_ids.tolist())
        return forward(self, input_ids, *rest, **options)

    monkeypatch.setattr(CLIPTextModel, "forward", counted)
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, "--guidance", "3", "--prompt_dropout", "0.5"])
    assert code == 0, error
    assert len(seen) == len(set(seen)) == 4 + 2 + 1  # training, held out, empty


# ---------------------------------------------------------------- LoRA


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_new_lora_changes_nothing(models, targets):
    model = with_lora(models["v"], targets)
    assert torch.equal(ours(model), ours(models["v"]))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.lora().values())
    assert {n for n, p in model.denoiser.named_parameters() if p.requires_grad} == set(model.lora())


def test_lora_targets(models):
    sizes = {t: len(with_lora(models["v"], t).lora()) for t in ("to_q,conv_in", "attention", "all")}
    layers = [m for m in models["v"].denoiser.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    assert sizes["to_q,conv_in"] < sizes["attention"] < sizes["all"] == 2 * len(layers)
    with pytest.raises(InputError, match="--lora_targets.*to_z"):
        with_lora(models["v"], "to_q,to_z")


def test_lora_is_scaled_by_alpha_over_rank(models):
    model = with_lora(models["v"], "attention", rank=8, alpha=4)
    randomise(model)
    lora, layers = model.lora(), dict(model.denoiser.named_modules())
    for name in (
        n.removesuffix(".lora_A.default.weight") for n in lora if n.endswith(".lora_A.default.weight")
    ):
        change = lora[f"{name}.lora_B.default.weight"] @ lora[f"{name}.lora_A.default.weight"]
        before = layers[name].get_base_layer().weight.clone()
        with model.lora_merged():
            merged_change = layers[name].get_base_layer().weight - before
        assert torch.allclose(merged_change, 4 / 8 * change, atol=1e-6) and change.abs().max() > 0.01


def test_lora_seed(models):
    a, b = with_lora(models["v"], "attention").lora(), with_lora(models["v"], "attention").lora()
    model = copy.deepcopy(models["v"])
    model.add_lora(8, 4, "attention", seed=1)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not all(torch.equal(a[n], p) for n, p in model.lora().items())


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_lora_merged_and_off(models, targets):
    model = with_lora(models["v"], targets)
    randomise(model)
    before = {n: v.clone() for n, v in model.denoiser.state_dict().items()}
    x, base = ours(model), ours(models["v"])
    assert difference(x, base) > 1e-2
    with model.lora_merged():
        assert difference(ours(model), x) <= 1e-4
    with pytest.raises(RuntimeError, match="inside"), model.lora_merged():
        raise RuntimeError("inside")
    assert all(torch.equal(before[n], v) for n, v in model.denoiser.state_dict().items())
    with model.lora_off():
        assert torch.equal(ours(model), base)
    assert torch.equal(ours(model), x)
    assert all(p.requires_grad for p in model.lora().values())


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_saved_lora_in_the_stock_pipeline(models, tiny_v, tmp_path, targets):
    # alpha differs from the rank: without metadata diffusers would load another scale
    model = with_lora(models["v"], targets, rank=8, alpha=4)
    randomise(model)
    model.save_lora(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipeline = stock_pipeline(tiny_v)
    base = stock(pipeline, guidance=3.0)
    pipeline.load_lora_weights(str(tmp_path))
    x = stock(pipeline, guidance=3.0)
    assert difference(x, base) > 1e-2
    assert difference(ours(model, guidance=3.0), x) <= 1e-5
    with model.lora_merged():
        images = model.decode(ours(model, guidance=3.0))
    assert_same_images(images, stock(pipeline, guidance=3.0, output="pil"))


# ---------------------------------------------------------------- loss


@pytest.fixture
def batch(models):
    """x_0, noise, t with the extreme timesteps."""
    generator = torch.Generator().manual_seed(3)
    shape = (3, *models["v"].latent_shape)
    return (
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
        torch.tensor([0, 300, 999]),
    )


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_denoising_loss(models, batch, kind, guidance):
    model, (x_0, noise, t) = models[kind], batch
    text, empty = model.encode(PROMPTS), model.encode([""]).expand(3, -1, -1)
    scheduler = model.pipeline.scheduler
    x_t = scheduler.add_noise(x_0, noise, t)
    target = noise if kind == "epsilon" else scheduler.get_velocity(x_0, noise, t)
    with torch.no_grad():
        conditional, unconditional = (model.denoiser(x_t, t, c).sample for c in (text, empty))
        prediction = unconditional + guidance * (conditional - unconditional)
        loss = graft.denoising_loss(model, x_0, text, t, noise, guidance)
    assert loss.item() == pytest.approx((prediction - target).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_gradients_reach_only_the_lora(tuned, batch, guidance):
    x_0, noise, t = batch
    graft.denoising_loss(tuned, x_0, tuned.encode(PROMPTS), t, noise, guidance).backward()
    parts = (tuned.denoiser, tuned.pipeline.vae, tuned.pipeline.text_encoder)
    reached = {n for part in parts for n, p in part.named_parameters() if p.grad is not None}
    assert reached == set(tuned.lora()) and all(p.grad.abs().sum() > 0 for p in tuned.lora().values())


def test_gradient_checkpointing_gives_the_same_gradients(tuned, batch):
    x_0, noise, t = batch
    gradients, calls = [], []
    tuned.denoiser.conv_in.register_forward_hook(lambda *_: calls.append("in"))
    tuned.denoiser.mid_block.resnets[0].register_forward_hook(lambda *_: calls.append("mid"))
    for checkpointing in (False, True):
        if checkpointing:
            tuned.denoiser.enable_gradient_checkpointing()
        graft.denoising_loss(tuned, x_0, tuned.encode(PROMPTS), t, noise, 1.0).backward()
        gradients.append([p.grad.clone() for p in tuned.lora().values()])
        for parameter in tuned.lora().values():
            parameter.grad = None
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients))
    assert calls.count("in") == 2 and calls.count("mid") == 2  # resnets[0] lies outside what is recomputed


# ---------------------------------------------------------------- half precision


def test_bfloat16(tiny_v, batch):
    model = Model(tiny_v, "cpu", torch.bfloat16)
    pipeline = stock_pipeline(tiny_v, torch.bfloat16)
    parameters = model.add_lora(8, 4, "all", seed=0)
    expected = stock(pipeline).float()
    with model.lora_merged():
        assert (ours(model) - expected).square().mean().sqrt() <= 0.1 * expected.std()
    randomise(model)
    with model.lora_merged():
        assert ours(model).isfinite().all() and len(model.decode(ours(model))) == 3
    x_0, noise, t = batch
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = graft.denoising_loss(model, x_0, model.encode(PROMPTS), t, noise, 3.0)
    loss.backward()
    optimizer.step()
    assert loss.dtype == torch.float32 and loss.isfinite()
    for old, new in zip(before, parameters):
        assert new.dtype == torch.float32 and new.isfinite().all() and not torch.equal(old, new)
