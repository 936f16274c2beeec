"""--model as users have it: missing weights, fp16 files, sizes, inpainting models, LCMs, single files."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import graft
from common import (
    Model,
    check_model,
    config_source,
    draw_noise,
    is_checkpoint,
    load_model,
    load_part,
    stock_code,
)
from conftest import (
    FLUX_SIZE,
    PROMPTS,
    SEEDS,
    assert_one_line,
    build_xl,
    difference,
    run_inside,
    stock,
    stock_pipeline,
)
from utils.runs import InputError


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def change_weights(file, change):
    """change: the weights by name -> others."""
    save_file(change(load_file(file)), file, {"format": "pt"})


def ours(model, guidance=3.0, eta=0.0, steps=4):
    noise = draw_noise(SEEDS, steps, model.latent_shape, model.dtype)
    return graft.sample(model, noise, model.encode(PROMPTS), guidance, eta)


@pytest.fixture
def copy(tmp_path):
    """A function that copies a folder."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "model"))


# ---------------------------------------------------------------- weights


LACKS = {  # (pipeline, part): the first weight that is left out
    ("v", "unet"): "conv_out.weight",
    ("v", "vae"): "decoder.conv_out.weight",
    ("v", "text_encoder"): "text_model.final_layer_norm.bias",
    ("xl", "text_encoder_2"): "text_projection.weight",
    ("sd3", "transformer"): "proj_out.bias",
    ("sd3", "text_encoder_3"): "encoder.final_layer_norm.weight",
    ("flux", "text_encoder_2"): "encoder.final_layer_norm.weight",
    ("flux", "transformer"): "proj_out.weight",
    ("klein", "text_encoder"): "model.layers.27.self_attn.k_proj.weight",
    ("klein", "vae"): "bn.running_mean",
}


@pytest.mark.parametrize("kind, part", LACKS)
def test_a_missing_weight_is_named(families, tiny_v, copy, kind, part):
    folder, key = copy({"v": tiny_v, **families}[kind]), LACKS[kind, part]
    size = FLUX_SIZE if kind in ("flux", "klein") else {}
    Model(str(folder), "cpu", torch.float32, **size)
    names = list(load_file(weights(folder, part)))
    stored = next(name for name in names if name.endswith(key.removeprefix("text_model.")))
    change_weights(weights(folder, part), lambda state: {k: v for k, v in state.items() if k != stored})
    key = re.escape(key.removeprefix("text_model."))
    with pytest.raises(InputError, match=rf"cannot be loaded \({part} lacks the weights [\w.]*{key}\)$"):
        Model(str(folder), "cpu", torch.float32, **size)


def test_weights_with_other_names(tiny_v, copy):
    folder = copy(tiny_v)
    change_weights(weights(folder, "text_encoder"), lambda state: {f"a.{k}": v for k, v in state.items()})
    code, _, error = run_inside(["--model", str(folder), "--device", "cpu"])
    assert_one_line(code, error, "text_encoder lacks the weights embeddings.position_embedding.weight, ")
    count = len(load_file(weights(folder, "text_encoder"))) - 3
    assert f" and {count} more)" in error


def test_only_fp16_files(tiny_epsilon, copy, capfd):
    folder = copy(tiny_epsilon)
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    model = Model(str(folder), "cpu", torch.float32)
    assert "rror" not in "".join(capfd.readouterr())
    base = Model(tiny_epsilon, "cpu", torch.float32)
    assert torch.equal(ours(model), ours(base))
    scope = {}
    exec(stock_code(model), scope)
    assert difference(ours(model), stock(quiet(scope["pipe"]), steps=4, guidance=3.0, eta=0.0)) <= 1e-4
    assert "variant" not in stock_code(base)


class HubUnet:
    """A class whose files are on the hub, in the variants of `found`."""

    def __init__(self, *found):
        self.found = found

    def from_pretrained(self, name, variant, **_):
        if variant not in self.found:
            raise OSError(f"no file {variant}")
        return variant, {"missing_keys": []}


def test_variants_on_the_hub():
    assert load_part(HubUnet(None, "fp16"), "a/b", "unet", torch.float32) == (None, None)
    assert load_part(HubUnet("fp16"), "a/b", "unet", torch.float32) == ("fp16", "fp16")
    with pytest.raises(OSError, match="no file None"):
        load_part(HubUnet(), "a/b", "unet", torch.float32)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---------------------------------------------------------------- networks that are refused


@pytest.mark.parametrize(
    "config, words",
    [
        ({"in_channels": 9}, "its U-Net takes 9 channels and gives 4: an inpainting or editing model"),
        ({"time_cond_proj_dim": 256}, "expects guidance embeddings .time_cond_proj_dim.: an LCM"),
    ],
)
def test_networks_that_are_sampled_in_another_way(tiny_v, copy, config, words):
    folder = copy(tiny_v)
    edit(folder / "unet" / "config.json", **config)
    weights(folder, "unet").unlink()  # refused before anything loads
    with pytest.raises(InputError, match=f"--model {folder}: .*{words}"):
        graft.prepare(graft.Args(model=str(folder)))


def test_a_flow_whose_levels_rise(families, copy):
    folder = copy(families["sd3"])
    edit(folder / "scheduler" / "scheduler_config.json", invert_sigmas=True)
    with pytest.raises(InputError, match="invert_sigmas"):
        Model(str(folder), "cpu", torch.float32)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "size, latent", [([8, 8], (4, 8, 8)), ([8, 12], (4, 8, 12)), (10, (4, 10, 10)), ([12, 6], (4, 12, 6))]
)
def test_size_of_the_configuration(tiny_epsilon, copy, size, latent):
    folder = copy(tiny_epsilon)
    edit(folder / "unet" / "config.json", sample_size=size)
    model = Model(str(folder), "cpu", torch.float32)
    assert model.latent_shape == latent
    expected = stock(stock_pipeline(folder), steps=4, guidance=3.0, eta=0.0)
    assert expected.shape[1:] == latent and difference(ours(model), expected) <= 1e-4
    assert "height" not in graft.stock_call(model, "a", graft.Args(steps=4, guidance=1.0, eta=1.0))


@pytest.mark.parametrize("kind", ["epsilon", "xl", "sd3"])
def test_height_and_width(families, tiny_epsilon, kind):
    folder, size = {"epsilon": tiny_epsilon, **families}[kind], {"height": 16, "width": 32}
    model, pipeline = Model(folder, "cpu", torch.float32, **size), stock_pipeline(folder)
    expected = stock(pipeline, steps=4, guidance=3.0, eta=0.0, **size)
    assert model.latent_shape == expected.shape[1:]
    assert difference(ours(model), expected) <= 1e-4
    images = stock(pipeline, steps=4, guidance=3.0, eta=0.0, output="pil", **size)
    for one, other in zip(model.decode(expected), images, strict=True):
        assert one.size == (32, 16) and np.array_equal(one, other)


def test_one_of_height_and_width(tiny_epsilon):
    model = Model(tiny_epsilon, "cpu", torch.float32, width=48)
    call = graft.stock_call(model, "a", graft.Args(steps=4, guidance=1.0, eta=1.0))
    assert model.latent_shape == (4, 8, 12) and ", height=32, width=48)" in call
    both = graft.Args(model=tiny_epsilon, device="cpu", dtype="float32", height=24, width=40)
    assert load_model(both).latent_shape == (4, 6, 10)  # as the flags say, not turned


def test_no_t5(families):
    args = graft.Args(model=families["sd3"], device="cpu", dtype="float32")
    for t5 in (True, False):
        pipeline = load_model(dataclasses.replace(args, t5=t5)).pipeline
        assert (pipeline.text_encoder_3 is not None) == (pipeline.tokenizer_3 is not None) == t5


def test_a_file_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_checkpoint("owner/name")
    Path("owner").mkdir()
    Path("owner/name").write_text("")
    assert is_checkpoint("owner") and not is_checkpoint("owner/name")


def test_sizes_that_the_model_cannot_take(families, tiny_v):
    for folder, pixels, step in ((tiny_v, 20, 8), (families["sd3"], 24, 16), (families["flux"], 24, 16)):
        for side in ("height", "width"):
            with pytest.raises(InputError, match=f"--{side} {pixels}: must be a multiple of {step} for "):
                graft.prepare(graft.Args(model=folder, **{side: pixels}))
    with pytest.raises(InputError, match="--width 48: the model takes at most 32"):
        Model(families["sd3"], "cpu", torch.float32, width=48)
    with pytest.raises(InputError, match="--height 4: must be between 8 and 10000"):
        graft.Args(height=4)


# ---------------------------------------------------------------- single files


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
ENDS = {"time_embedding.linear_": "time_embed.", "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0"}
ENDS |= {"conv_out": "out.2", "add_embedding.linear_": "label_emb.0."}
OPEN_CLIP = {"self_attn": "attn", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc"}
OPEN_CLIP |= {
    "mlp.fc2": "mlp.c_proj",
    "encoder.layers": "transformer.resblocks",
    "final_layer_norm": "ln_final",
}
OPEN_CLIP |= {"embeddings.position_embedding.weight": "positional_embedding", "embeddings.token": "token"}


def original_unet(key, layers, attention):
    """The name of a U-Net's weight in the original checkpoints. attention: the up blocks that have it."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key):
        way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        first, name = (layers + 1) * block, "input_blocks" if way == "down" else "output_blocks"
        if kind == "downsamplers":
            return f"{name}.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            return f"{name}.{first + layers}.{2 if block in attention else 1}.{rest}"
        place = first + layer + (way == "down")
    elif match := re.match(r"mid_block\.(\w+)\.(\d)\.(.*)", key):
        kind, rest = match[1], match[3]
        name, place = "middle_block", 1 if kind == "attentions" else 2 * int(match[2])
    else:
        old, new = next(pair for pair in ENDS.items() if key.startswith(pair[0]))
        rest = key.removeprefix(old)
        return new + (f"{2 * int(rest[0]) - 2}{rest[1:]}" if "linear" in old else rest)
    if kind == "resnets":
        layer, _, end = rest.partition(".")
        rest = f"{RESNET[layer]}.{end}"
    place = f"{place}" if name == "middle_block" else f"{place}.{int(kind == 'attentions')}"
    return f"{name}.{place}.{rest}"


def original_vae(key, blocks):
    """The name of a VAE's weight in the original checkpoints."""
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}", key)
    key = key.replace("down_blocks", "down").replace("resnets", "block")
    return re.sub(r"(down|up)samplers\.0", r"\1sample", key)


def original_open_clip(state):
    """The weights of XL's second text encoder as OpenCLIP holds them: query, key and value in one."""
    new = {"text_projection": state.pop("text_projection.weight").T.contiguous()}
    for key in sorted(state):  # k, q, v
        name = key.removeprefix("text_model.")
        for old, other in OPEN_CLIP.items():
            name = name.replace(old, other)
        if match := re.match(r"(.*\.attn)\.q_proj\.(weight|bias)", name):
            joint = [state[key.replace("q_proj", f"{which}_proj")] for which in "qkv"]
            new[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(joint)
        elif not re.search("attn.[kv]_proj", name):
            new[name] = state[key]
    return new


def write_single_file(folder, original, text_encoder):
    """(a file in the format of the original checkpoints with the weights of the pipeline in the folder
    `original`, a folder with the configuration alone). text_encoder: the prefix of the first one."""
    source = Path(shutil.copytree(original, folder / "config"))
    parts = {file.parent.name: load_file(file) for file in source.glob("*/*.safetensors")}
    blocks = len(json.loads((source / "vae" / "config.json").read_text())["block_out_channels"])
    state = {f"model.diffusion_model.{original_unet(k, 1, {0})}": v for k, v in parts["unet"].items()}
    state |= {f"first_stage_model.{original_vae(k, blocks)}": v for k, v in parts["vae"].items()}
    for key, value in parts["text_encoder"].items():
        state[f"{text_encoder}.text_model.{key.removeprefix('text_model.')}"] = value
    if "text_encoder_2" in parts:
        second = original_open_clip(parts["text_encoder_2"])
        state |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    for file in source.rglob("*.safetensors"):
        file.unlink()
    save_file(state, folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors", source


@pytest.fixture(scope="module")
def single_file(tiny_epsilon, tmp_path_factory):
    return write_single_file(tmp_path_factory.mktemp("single"), tiny_epsilon, "cond_stage_model.transformer")


def test_single_file_of_xl(tmp_path):
    folder = build_xl(tmp_path / "xl", width=24)
    file, source = write_single_file(tmp_path, folder, "conditioner.embedders.0.transformer")
    model = Model(str(file), "cpu", torch.float32, config=str(source))
    assert torch.equal(ours(model), ours(Model(folder, "cpu", torch.float32)))


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file(single_file, tiny_epsilon, tmp_path, suffix):
    file, source = single_file
    if suffix == ".ckpt":
        file = tmp_path / "checkpoint.ckpt"
        torch.save({"state_dict": load_file(single_file[0])}, file)
    model = Model(str(file), "cpu", torch.float32, config=str(source))
    assert difference(ours(model), ours(Model(tiny_epsilon, "cpu", torch.float32))) == 0
    scope = {}
    exec(stock_code(model), scope)
    assert difference(ours(model), stock(quiet(scope["pipe"]), steps=4, guidance=3.0, eta=0.0)) <= 1e-4
    half = Model(str(file), "cpu", torch.bfloat16, config=str(source))
    parts = (half.denoiser, half.vae, half.pipeline.text_encoder)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.bfloat16}


def test_run_on_a_single_file(single_file, tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, source = single_file
    argv = [*tiny_arguments, "--rounds", "1", "--model", str(file), "--model_config", str(source)]
    code, out, error = run_inside([*argv, "--output", "run"])
    assert code == 0, error
    assert json.loads(Path("run/args.json").read_text())["model_config"] == str(source)
    exec(out[out.index("import torch; from diffusers") :], {})
    assert Path("tuned.png").is_file()


def test_weights_that_a_single_file_lacks(single_file, tmp_path):
    file, source = single_file
    for part, key, weight in (
        ("unet", "model.diffusion_model.out.2.weight", "conv_out.weight"),
        ("vae", "first_stage_model.decoder.conv_out.weight", "decoder.conv_out.weight"),
        (
            "text_encoder",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "final_layer_norm.bias",
        ),
    ):
        state = load_file(file)
        state.pop(key)
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=rf"{part} lacks the weights {re.escape(weight)}\)"):
            Model(str(tmp_path / "model.safetensors"), "cpu", torch.float32, config=str(source))


def test_single_files_without_configuration(single_file, tmp_path):
    """Its kind says which configuration is meant; without a network it must be there."""
    file = str(single_file[0])
    assert config_source(file, "") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    with pytest.raises(InputError, match="configuration stable-diffusion-v1-5.*give as --model_config"):
        check_model(file)
    key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    first = "model.diffusion_model.input_blocks.0.0.weight"
    for state, words in (
        ({key: torch.zeros(4, 1024)}, r"its kind \(v2\) does not say how it is sampled; give --model_config"),
        ({first: torch.zeros(4, 9, 3, 3)}, "is an inpainting model"),
    ):
        save_file(state, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match=words):
            config_source(str(tmp_path / "other.safetensors"), "")


def test_bad_single_files(single_file, tmp_path, families, tiny_v):
    file, source = map(str, single_file)
    (tmp_path / "damaged.safetensors").write_bytes(b"no weights")
    torch.save({"state_dict": {}, "callbacks": InputError("an object")}, tmp_path / "pickle.ckpt")
    for name in ("damaged.safetensors", "pickle.ckpt"):
        with pytest.raises(InputError, match=f"{name}: cannot be read .*give a .safetensors file"):
            check_model(str(tmp_path / name))
        with pytest.raises(InputError, match=f"{name}: cannot be loaded"):
            Model(str(tmp_path / name), "cpu", torch.float32, config=source)
    with pytest.raises(InputError, match="--model_config no/such/folder: no such folder"):
        check_model(file, "no/such/folder")
    with pytest.raises(InputError, match="is for a single file as --model"):
        check_model(tiny_v, source)
    with pytest.raises(InputError, match="single files are read for SD 1.x, 2.x and XL only"):
        check_model(file, families["sd3"])
