"""Tiny stable diffusion pipelines with random weights, and ways to run the script on them."""

import contextlib
import io
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported

import torch  # noqa: E402

from shapes.train import TOKENS, make_tokenizer  # noqa: E402

PROMPTS = [
    "a red circle left of a blue square",
    "a green square above a red circle",
    "a blue square below a red square",
]
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
    with torch.no_grad():  # so that pictures have contrast and depend on their prompt
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
    """Folder of a v-prediction pipeline in half precision with trailing DDIM steps, like the embedded one."""
    from diffusers import DDIMScheduler

    options = {
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "steps_offset": 1,
    }
    folder = tmp_path_factory.mktemp("models") / "tiny_v"
    return build_pipeline(folder, DDIMScheduler(**SCHEDULE, **options), torch.float16)


@pytest.fixture(scope="session")
def prompt_files(tmp_path_factory) -> SimpleNamespace:
    """Names of small prompt files, `train` and `held_out`."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "train.txt").write_text("\n".join([*PROMPTS, "a red square right of a red circle"]) + "\n")
    (folder / "held_out.txt").write_text("a blue circle above a green square\na red circle above a red square\n")
    return SimpleNamespace(train=str(folder / "train.txt"), held_out=str(folder / "held_out.txt"))


@pytest.fixture(scope="session")
def tiny_arguments(tiny_v, prompt_files) -> list[str]:
    """Arguments of the shortest run that does everything; later ones on the command line replace them."""
    files = f"--prompts {prompt_files.train} --eval_prompts {prompt_files.held_out} --model {tiny_v} --device cpu"
    rewards = "--reward jpeg_compressibility --eval_rewards shapes_graded"
    sizes = "--rounds 2 --prompts_per_round 3 --samples 4 --updates 2 --batch 4 --micro_batch 2 --eval_samples 2"
    return f"{files} {rewards} {sizes} --steps 4 --guidance 1 --lora_rank 4 --lora_targets attention --lr 1e-2".split()


def run_inside(argv: list[str], script: str = "graft.py") -> tuple[int, str, str]:
    """Run a script in this process, as `python <script> <argv>` does. Returns (exit code, stdout, stderr)."""
    out, err, code, before = io.StringIO(), io.StringIO(), 0, sys.argv
    try:
        sys.argv = [script, *argv]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def run_script(argv: list[str], cwd: Path, script: str = "graft.py") -> subprocess.CompletedProcess:
    """Run a script in a process of its own, in the folder `cwd`."""
    command = [sys.executable, str(ROOT / script), *argv]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def assert_same_pictures(some, others):
    """Equal but for the rounding to 8 bit: at most one level, at most in one value of 1000."""
    for one, other in zip(some, others, strict=True):
        gap = np.abs(np.asarray(one, int) - np.asarray(other, int))
        assert gap.max() <= 1 and (gap > 0).mean() <= 1e-3
