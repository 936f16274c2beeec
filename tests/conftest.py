"""Tiny pipelines with random weights, ways to run the scripts on them, and what several test files assert."""

import contextlib
import copy
import csv
import dataclasses
import functools
import importlib
import inspect
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported

import torch  # noqa: E402

from common import LORA_FILE, Model  # noqa: E402
from shapes.train import TOKENS, make_tokenizer  # noqa: E402
from utils import runs  # noqa: E402

PROMPTS = [
    "a red circle left of a blue square",
    "a green square above a red circle",
    "a blue square below a red square",
]
SEEDS = [11, 12, 13]
torch.set_num_threads(1)  # the tests run in two processes
FLUX_SIZE = {"height": 16, "width": 32}  # of the small FLUX pipelines: they know no size of their own
NO_T5 = {"text_encoder_3": None, "tokenizer_3": None}  # what the stock loader must be given then
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_pipeline(folder: Path, scheduler, dtype=torch.float32) -> str:
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with tempfile.TemporaryDirectory() as files:
        tokenizer = make_tokenizer(Path(files))
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    with torch.no_grad():  # so that images have contrast and depend on their prompt
        vae.decoder.conv_out.weight *= 1.5
        for name, parameter in unet.named_parameters():
            parameter *= 3 if "attn2" in name else 1
    parts = (vae, text_encoder, tokenizer, unet, scheduler, None, None)
    StableDiffusionPipeline(*parts, requires_safety_checker=False).to(dtype).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_epsilon(tmp_path_factory) -> str:
    """Folder of a pipeline with the scheduler of Stable Diffusion 1.5, PNDM."""
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    return build_pipeline(tmp_path_factory.mktemp("models") / "tiny_epsilon", scheduler)


@pytest.fixture(scope="session")
def tiny_v(tmp_path_factory) -> str:
    """Folder of a v-prediction pipeline in half precision with trailing DDIM steps, as the embedded one."""
    from diffusers import DDIMScheduler

    options = {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "steps_offset": 1,
    }
    folder = tmp_path_factory.mktemp("models") / "tiny_v"
    return build_pipeline(folder, DDIMScheduler(**SCHEDULE, **options), torch.float16)


def small_vae(channels, **options):
    from diffusers import AutoencoderKL

    blocks = {"block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2}
    blocks |= {
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }
    vae = AutoencoderKL(latent_channels=channels, sample_size=16, **blocks, **options)
    with torch.no_grad():  # so that images have contrast
        vae.decoder.conv_out.weight *= 1.5
    return vae


def small_clip(tokenizer, projection, width=16):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": TOKENS, "projection_dim": projection}
    return CLIPTextModelWithProjection(CLIPTextConfig(**sizes, **ids))


def small_t5(width):
    """(encoder, tokenizer)"""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *(f"\u2581{word}" for word in " ".join(PROMPTS).split())]
    vocabulary = [
        (piece, -float(i)) for i, piece in enumerate(dict.fromkeys([*pieces, *map(chr, range(97, 123))]))
    ]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    sizes = {
        "vocab_size": len(vocabulary),
        "d_model": width,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    return T5EncoderModel(T5Config(**sizes)), tokenizer


def build_xl(folder: Path, width: int = 16) -> str:
    """A small SD XL with its scheduler; the pooled embedding is wider than the token states.
    width: of the second text encoder's states."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    with tempfile.TemporaryDirectory() as files:
        tokenizer = make_tokenizer(Path(files))
    torch.manual_seed(0)
    first, second = CLIPTextModel(small_clip(tokenizer, 16).config), small_clip(tokenizer, 40, width)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + width,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=40 + 6 * 8,
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter *= 3 if "attn2" in name or "add_embedding" in name else 1
    scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1)
    vae = small_vae(4, scaling_factor=0.13025)
    pipeline = StableDiffusionXLPipeline(
        vae, first, second, tokenizer, tokenizer, unet, scheduler, add_watermarker=False
    )
    pipeline.save_pretrained(folder)
    return str(folder)


def build_sd3(folder: Path) -> str:
    """A small SD 3 with its scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with tempfile.TemporaryDirectory() as files:
        tokenizer = make_tokenizer(Path(files))
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=12 + 20,
        pos_embed_max_size=8,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            parameter *= 3 if "add_" in name or "context" in name or "text_embedder" in name else 1
    encoders = (small_clip(tokenizer, 12), tokenizer, small_clip(tokenizer, 20), tokenizer, *small_t5(40))
    vae = small_vae(
        16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    StableDiffusion3Pipeline(transformer, scheduler, vae, *encoders).save_pretrained(folder)
    return str(folder)


def build_flux(folder: Path, guidance_embeds: bool) -> str:
    """A small FLUX.1 with its scheduler: dev, or without guidance_embeds schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    with tempfile.TemporaryDirectory() as files:
        tokenizer = make_tokenizer(Path(files))
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    with torch.no_grad():  # so that images depend on their prompt and on guidance
        for name, parameter in transformer.named_parameters():
            parameter *= 3 if any(word in name for word in ("add_", "context", "_embedder", "norm")) else 1
    clip, (t5, t5_tokenizer) = CLIPTextModel(small_clip(tokenizer, 16).config), small_t5(24)
    vae = small_vae(
        4, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    scheduler = FlowMatchEulerDiscreteScheduler(**dynamic)
    FluxPipeline(scheduler, vae, clip, tokenizer, t5, t5_tokenizer, transformer).save_pretrained(folder)
    return str(folder)


CHAT = """{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"""


def build_klein(folder: Path, is_distilled: bool) -> str:
    """A small FLUX.2 klein with its scheduler."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = [*map(chr, range(33, 127)), "\u0120"]  # the last is the space
    vocabulary = {piece: i for i, piece in enumerate([*letters, *special])}
    tokenizer = Qwen2TokenizerFast(vocab=vocabulary, merges=[], additional_special_tokens=special[1:])
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"vocab_size": len(tokenizer), "num_hidden_layers": 28, "head_dim": 8}  # 9, 18, 27 are read
    text_encoder = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    with torch.no_grad():
        for name, parameter in text_encoder.named_parameters():
            parameter *= 3 if "proj" in name else 1
        for name, parameter in transformer.named_parameters():
            parameter *= 3 if any(word in name for word in ("add_", "context", "modulation")) else 1
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        vae.decoder.conv_out.weight *= 1.5
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = (scheduler, vae, text_encoder, tokenizer, transformer)
    Flux2KleinPipeline(*parts, is_distilled=is_distilled).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def families(tmp_path_factory) -> dict[str, str]:
    """Folders of small pipelines: "xl", "sd3" and "no_t5", an SD 3 without its third text encoder; "flux" and
    "schnell"; "klein" and "klein_base"."""
    folder = tmp_path_factory.mktemp("families")
    folders = {"xl": build_xl(folder / "xl"), "sd3": build_sd3(folder / "sd3")}
    folders |= {name: build_flux(folder / name, name == "flux") for name in ("flux", "schnell")}
    folders |= {name: build_klein(folder / name, name == "klein") for name in ("klein", "klein_base")}
    shutil.copytree(folders["sd3"], folder / "no_t5", ignore=shutil.ignore_patterns("*_3"))
    index = json.loads((folder / "no_t5" / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "no_t5" / "model_index.json").write_text(json.dumps(index))
    return folders | {"no_t5": str(folder / "no_t5")}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A folder with a CLIPModel, its processor and aesthetic-model.pth."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip") / "a+b, c*d"  # may stand in parentheses
    folder.mkdir()
    tokenizer = make_tokenizer(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TOKENS,
        "pad_token_id": tokenizer.pad_token_id,
    }
    words |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=sizes | words,
        vision_config=sizes | {"image_size": 24, "patch_size": 8},
        projection_dim=768,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that images and prompts differ
            parameter += 0.2 * torch.randn(parameter.shape)
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    pixels.save_pretrained(folder)  # preprocessor_config.json, as in older repositories
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = {
        f"layers.{i}.weight": torch.randn(after, before) / before**0.5 for i, (before, after) in sizes.items()
    }
    head |= {f"layers.{i}.bias": torch.randn(after) for i, (_, after) in sizes.items()}
    torch.save(head, folder / "aesthetic-model.pth")
    return folder


@pytest.fixture(scope="session")
def models(tiny_epsilon, tiny_v):
    """Base models, for tests that do not change them."""
    return {
        kind: Model(name, "cpu", torch.float32) for kind, name in (("epsilon", tiny_epsilon), ("v", tiny_v))
    }


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory) -> SimpleNamespace:
    """Names of small prompt files, `train` and `held_out`."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "train.txt").write_text("\n".join([*PROMPTS, "a red square right of a red circle"]) + "\n")
    (folder / "held_out.txt").write_text(
        "a blue circle above a green square\na red circle above a red square\n"
    )
    return SimpleNamespace(train=str(folder / "train.txt"), held_out=str(folder / "held_out.txt"))


@pytest.fixture(scope="session")
def tiny_arguments(tiny_v, prompt_files) -> list[str]:
    """Arguments of the shortest run that does everything; later ones on the command line replace them."""
    files = (
        f"--prompts {prompt_files.train} --eval_prompts {prompt_files.held_out} --model {tiny_v} --device cpu"
    )
    rewards = "--reward jpeg_compressibility --eval_rewards shapes_graded"
    sizes = (
        "--rounds 2 --prompts_per_round 3 --samples 4 --updates 2 --batch 4 --micro_batch 2 --eval_samples 2"
    )
    rest = "--steps 4 --guidance 1 --lora_rank 4 --lora_targets attention --lr 1e-2"
    return f"{files} {rewards} {sizes} {rest}".split()


def arguments_for(cls, argv: list[str]) -> list[str]:
    """Those `--flag value` pairs that the dataclass cls has."""
    names = {f"--{field.name}" for field in dataclasses.fields(cls)}
    return [word for flag, value in zip(argv[::2], argv[1::2]) if flag in names for word in (flag, value)]


def writer_in_a_later_second(folder, writer=runs.SummaryWriter, **options):
    """TensorBoard reads a folder's files in the order of their names: the second, the host, the process's
    number as text. A test resumes a run within a second, and 10000 comes before 9999."""
    while any(int(path.name.split(".")[3]) >= int(time.time()) for path in Path(folder).glob("events.*")):
        time.sleep(0.02)
    return writer(folder, **options)


runs.SummaryWriter = writer_in_a_later_second


def run_inside(argv: list[str], script: str = "graft.py") -> tuple[int, str, str]:
    """Run a script in this process, as `python <script> <argv>` does. Returns (exit code, stdout, stderr)."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, sys.argv
    on_interrupt = signal.getsignal(signal.SIGINT)  # a script that is interrupted ignores further ones
    try:
        sys.argv = [script, *argv]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
        if threading.current_thread() is threading.main_thread():  # others set no handlers
            signal.signal(signal.SIGINT, on_interrupt)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True)
def figures_not_drawn(request, monkeypatch):
    """Figures are made but not drawn, which would be half the time of a tiny run. A test with the marker
    `drawn`, a fixture of more than one test and a run in a process of its own do draw them."""

    def save_dot(figure, file, **options):
        Image.new("RGB", (1, 1)).save(file, "PNG")

    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_dot)


def run_script(argv: list[str], cwd: Path, script: str = "graft.py") -> subprocess.CompletedProcess:
    """Run a script in a process of its own, in the folder `cwd`."""
    command = [sys.executable, str(ROOT / script), *argv]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def assert_same_images(some, others):
    """Equal but for the rounding to 8 bit: at most one level, at most in one value of 1000."""
    for one, other in zip(some, others, strict=True):
        gap = np.abs(np.asarray(one, int) - np.asarray(other, int))
        assert gap.max() <= 1 and (gap > 0).mean() <= 1e-3


def assert_one_line(code, error, named):
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert named in error


# ---------------------------------------------------------------- draws


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_mean(values, expected, sigmas=4.5):
    """The mean of independent values is `expected`, within its standard error."""
    values = torch.as_tensor(values, dtype=torch.float64)
    assert abs(values.mean() - expected) <= sigmas * values.std() / len(values) ** 0.5 + 1e-12


# ---------------------------------------------------------------- LoRA, stock pipeline


def with_lora(model, targets, rank=8, alpha=4):
    model = copy.deepcopy(model)
    model.add_lora(rank, alpha, targets, seed=0)
    return model


def randomise(model, scale=0.2):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.lora().values():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def stock_pipeline(folder, dtype=torch.float32):
    from diffusers import DDIMScheduler, DiffusionPipeline

    parts = NO_T5 if Path(folder).name == "no_t5" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **parts)
    if not type(pipeline.scheduler).__name__.startswith("Flow"):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stock(pipeline, prompts=PROMPTS, seeds=SEEDS, steps=5, guidance=1.0, eta=1.0, output="latent", **extra):
    """Latents in the layout of the initial noise, or PIL images, by the stock pipeline."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": output} | extra
    if "eta" in inspect.signature(pipeline.__call__).parameters:  # a flow is deterministic
        options["eta"] = eta
    name = type(pipeline).__name__
    if name.startswith("Flux"):
        options |= FLUX_SIZE
        if name == "FluxPipeline" and not pipeline.transformer.config.guidance_embeds:
            options["max_sequence_length"] = 256  # as the model card of schnell has it
    images = pipeline(prompt=prompts, generator=generators, **options).images
    if output == "latent" and name == "FluxPipeline":
        return pipeline._unpack_latents(images, *FLUX_SIZE.values(), pipeline.vae_scale_factor)
    if output == "latent" and name == "Flux2KleinPipeline":
        norm = pipeline.vae.bn
        mean, variance = (v.view(1, -1, 1, 1) for v in (norm.running_mean, norm.running_var))
        return (pipeline._patchify_latents(images) - mean) / (variance + norm.eps).sqrt()
    return images


def difference(a, b):
    """Largest difference in units of the latents' scale."""
    return ((a - b).abs().max() / b.std()).item()


# ---------------------------------------------------------------- what a run wrote


def read_metrics(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def read_scalars(folder):
    """{tag: [(step, value)]} of the tensorboard events, but for the times, in which no two runs agree."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    times = [value for _, value in scalars.pop("seconds")]
    assert times == sorted(times) and times[0] > 0
    return scalars


def assert_same_run(folder, other):
    """Every file of the run `other` is in `folder` with equal content, but for times and the checkpoint."""
    for path in (p for p in other.rglob("*") if p.is_file() and p.name != "checkpoint.pt"):
        again = folder / path.relative_to(other)
        if path.name == LORA_FILE:  # its bytes may differ, the metadata is in no fixed order
            from safetensors.torch import load_file

            weights, expected = load_file(again), load_file(path)
            assert weights.keys() == expected.keys() and all(
                torch.equal(weights[n], expected[n]) for n in expected
            )
        elif path.name == "results.json":
            assert json.loads(again.read_text()) | {"seconds": 0} == json.loads(path.read_text()) | {
                "seconds": 0
            }
        elif path.suffix == ".png":
            assert np.array_equal(Image.open(again), Image.open(path)), path.name
        elif path.parent.name != "tensorboard":
            assert again.read_bytes() == path.read_bytes(), path.name
    scalars, expected_scalars = read_scalars(folder), read_scalars(other)
    for tag, points in expected_scalars.items():
        assert np.array_equal(scalars[tag], points, equal_nan=True), tag


# ---------------------------------------------------------------- processes that may be killed


@functools.cache
def forkserver():
    """Starts processes that have imported torch and the scripts already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["graft", "pgraft", "inverse_noise_correction", "conftest", "diffusers", "peft"]
    )
    before = os.environ.get("PYTHONPATH")
    # Python 3.11 preloads without sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before:
        os.environ["PYTHONPATH"] = before
    return context


def run_until(argv, script, cwd, killer):
    """In a new process: run the script; kill -9 it before the n-th call of killer = (module, name, n)."""
    os.chdir(cwd)
    torch.set_num_threads(1)
    if killer:
        module, name, n = killer
        owner = importlib.import_module(module)
        original, calls = getattr(owner, name), []

        def kill_at_call(*args, **options):
            calls.append(1)
            if len(calls) == n:
                if name == "fsync":  # half of the file is written
                    os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(owner, name, kill_at_call)
    code, out, error = run_inside(argv, script)
    Path("output.txt").write_text(out + error)
    sys.exit(code)


def exit_code(argv, cwd, killer=None, script="graft.py"):
    """Of a run in a process of its own; what it printed is in output.txt."""
    process = forkserver().Process(target=run_until, args=(argv, script, str(cwd), killer))
    process.start()
    process.join(120)
    return process.exitcode
