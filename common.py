"""Models, and what every method needs of them: families, LoRA, noise levels, flows, seeds, initial noise.

The denoising loops and the losses are not here. They stand in the method files.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import inspect
import json
import math
import os
import pickle
import re
import sys
import warnings
from pathlib import Path
from typing import Literal

import huggingface_hub as hub
import numpy as np
import safetensors
import torch
import tyro

from utils.processes import FIRST, LOCAL_SIZE
from utils.runs import InputError, has_device

ROOT = Path(__file__).resolve().parent
EMBEDDED = str(ROOT / "shapes" / "pipeline")  # the embedded Stable Diffusion
LORA_FILE, SWITCH_FILE = "pytorch_lora_weights.safetensors", "pgraft.json"  # what graft.py, pgraft.py leave
SINGLE_FILES = (".safetensors", ".ckpt")  # of a whole pipeline
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Device = Literal["auto", "cpu", "cuda", "mps"]  # auto: CUDA or MPS if there is one
Dtype = Literal["float32", "float16", "bfloat16"]
SHAPES_REWARDS = "shapes_strict,shapes_graded,shapes_fit,jpeg_compressibility"
EMBEDDED_DEFAULTS = {"steps": 10, "guidance": 1.0, "eta": 1.0, "sample_batch": 64, "micro_batch": 64}
EMBEDDED_DEFAULTS |= {"lora_targets": "all", "lr": 1e-3, "eval_rewards": SHAPES_REWARDS}
# attention layers of SD 1.x, 2.x and XL; then of a transformer's text stream
ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
FLOW_NETWORKS = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}  # folder of a flow: class


# ---------------------------------------------------------------- what the user asks for


def by_family(values: str | tuple):
    """For Annotated: --help shows the defaults by model family.
    values: a name of the families' defaults, or (of the embedded model, of other U-Nets, of flows)."""
    own = EMBEDDED_DEFAULTS[values] if isinstance(values, str) else values[0]
    labels = {}  # value: the families that have it
    for family in FAMILIES:
        labels.setdefault(family_default(family, values), []).append(family.label)
    others = "; ".join(f"{', '.join(names)}: {value}" for value, names in labels.items())
    others = f"others: {next(iter(labels))}" if len(labels) == 1 else others
    return tyro.conf.arg(help_behavior_hint=f"(default: {own}; {others})")


def family_default(family, values: str | tuple):
    """A family's default. values: as in by_family."""
    return family.defaults[values] if isinstance(values, str) else values[1 + family.flow]


def with_family_defaults(args, **own_defaults):
    """A copy of args in which settings that are None have their default for the family of --model.
    own_defaults: the script's own {setting: values}, which go before the families'. InputError for a model
    that is not supported, and for settings that its family cannot have."""
    family = check_model(args.model, getattr(args, "model_config", ""))
    embedded = Path(args.model).resolve() == Path(EMBEDDED)
    defaults = EMBEDDED_DEFAULTS if embedded else family.defaults
    for name, values in own_defaults.items():
        defaults = defaults | {name: values[0] if embedded else family_default(family, values)}
    check_guidance(family, getattr(args, "guidance", None))
    for side in ("height", "width"):
        pixels = getattr(args, side, None)
        if pixels and pixels % family.multiple:
            raise InputError(f"--{side} {pixels}: must be a multiple of {family.multiple} for {family.label}")
    return dataclasses.replace(
        args, **{n: value for n, value in defaults.items() if getattr(args, n, 0) is None}
    )


def check_guidance(family, guidance: float | None) -> None:
    """InputError for a guidance that the family does not take. None: it was left out."""
    if not family.takes_guidance and guidance not in (None, 1):
        raise InputError(f"--guidance {guidance:g}: {family.label} takes no guidance; leave it out")


def check_device(device: str, dtype: str, prefix: str = "") -> str:
    """The device that will be used, "cuda", "mps" or "cpu". InputError for what this machine cannot do.
    prefix: of the flags."""
    if not has_device(device):
        raise InputError(
            f"--{prefix}device {device}: no {device.upper()} device found; use --{prefix}device cpu, or "
            f"install a build of torch with {device.upper()}"
        )
    if device == "auto":
        device = next((name for name in ("cuda", "mps") if has_device(name)), "cpu")
    if device == "cuda" and LOCAL_SIZE > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node {LOCAL_SIZE}: this machine has {torch.cuda.device_count()} CUDA devices; "
            f"start as many processes, or use --{prefix}device cpu"
        )
    if device != "cuda" and dtype == "float16":
        place = "the CPU" if device == "cpu" else "MPS"
        raise InputError(
            f"--{prefix}dtype float16 needs a CUDA device; on {place} use --{prefix}dtype float32 or "
            "bfloat16, in a new run if one has begun with float16"
        )
    return device


def is_checkpoint(name: str) -> bool:
    """Whether it is a folder or looks like a hub id, owner/name."""
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    return name != "" and (Path(name).is_dir() or hub_id and not Path(name).exists())


def read_config(name: str, file: str) -> dict:
    """A JSON file of a folder or hub id. Many kinds of errors: no network, no right to it, no such file."""
    path = Path(name) / file
    if not Path(name).is_dir():
        # without a network the download would try for half a minute
        if not hub.try_to_load_from_cache(name, file):
            hub.get_hf_file_metadata(hub.hf_hub_url(name, file))
        path = Path(hub.hf_hub_download(name, file))
    return json.loads(path.read_text(encoding="utf-8"))


def is_single_file(name: str) -> bool:
    """Whether it is one file with the weights of a whole pipeline."""
    return name.endswith(SINGLE_FILES) and Path(name).is_file()


def config_source(name: str, config: str) -> str:
    """The folder or hub id with the configuration of --model: the model itself, or for a single file
    --model_config or the one that diffusers takes for such a file. InputError if there is none."""
    if not is_single_file(name):
        if config:
            raise InputError(f"--model_config {config}: is for a single file as --model, not for {name}")
        if not is_checkpoint(name):
            raise InputError(
                f"--model {name}: no such folder, no .safetensors file and no hub id of the form owner/name"
            )
        return name
    if config and not is_checkpoint(config):
        raise InputError(f"--model_config {config}: no such folder, and no hub id of the form owner/name")
    if config:
        return config
    from diffusers.loaders import single_file_utils

    try:
        kind = single_file_utils.infer_diffusers_model_type(weight_shapes(name))
    except Exception as error:  # a damaged file, one that only pickle can read: many kinds
        raise InputError(
            f"--model {name}: cannot be read ({error}); give a .safetensors file with the whole pipeline"
        ) from None
    if "inpaint" in kind:
        raise InputError(f"--model {name}: is an inpainting model; give the text-to-image model")
    if kind not in ("v1", "xl_base"):  # SD 2.x predict eps or v: the file does not say which
        raise InputError(
            f"--model {name}: its kind ({kind}) does not say how it is sampled; give --model_config, the "
            "folder or hub id of a pipeline of its kind"
        )
    return single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"]


def weight_shapes(name: str) -> dict[str, torch.Tensor]:
    """The weights of a single file, as tensors without content."""
    if name.endswith(".safetensors"):
        with safetensors.safe_open(name, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
        return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    try:
        state = torch.load(name, map_location="meta", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("it needs pickle, which can run any code") from None
    return state.get("state_dict", state)


def check_model(name: str, config: str = ""):
    """The family, one of FAMILIES, of a folder, hub id or single file. InputError for another, and for a
    network that this project does not sample as the stock pipeline does. config: --model_config. Loads no
    weights."""
    source = config_source(name, config)
    flag, advice = f"--model {name}", "give the folder or hub id of a pipeline"
    if source != name:
        advice = "give as --model_config the folder of a pipeline of its kind"
    try:
        class_name = read_config(source, "model_index.json").get("_class_name")
        family = find_family(class_name, lambda file: read_config(source, file))
        network = read_config(source, f"{family.part}/config.json") if family else {}
    except Exception as error:  # no network, no right to it, no pipeline, a damaged file: many kinds
        of = f"the configuration {source} " if source != name else ""
        raise InputError(f"{flag}: {of}cannot be loaded ({error}); {advice}") from None
    if not family:
        supported = ", ".join(dict.fromkeys(family.pipeline for family in FAMILIES))
        raise InputError(f"{flag}: is a {class_name}; supported: {supported}")
    if source != name and family.flow:
        raise InputError(f"{flag}: single files are read for SD 1.x, 2.x and XL only; give a folder")
    if problem := family.problem(network):
        raise InputError(f"{flag}: {problem}")
    return family


# ---------------------------------------------------------------- families


class StableDiffusion:
    """Stable Diffusion 1.x and 2.x. Each further family is a subclass that holds what it does differently.

    It has no state: what belongs to a loaded pipeline is kept by its Model, m.
    """

    label = "SD 1 and 2"
    pipeline = "StableDiffusionPipeline"  # its class in diffusers
    variant = ()  # (file, setting, value) that tells families of one pipeline class apart
    part = "unet"  # the network that is tuned
    flow = False  # it predicts the velocity eps - x_0
    classifier_free = True  # guidance takes a second prediction, for the empty prompt
    takes_guidance = True
    multiple = 8  # of pixels that height and width must be
    left_out = {"safety_checker": None}  # components that are not loaded
    t5 = ()  # further ones that --no-t5 leaves out
    further_prompts = ()  # that encode_prompt must be given
    upcast_vae = False  # with float16 its stock call decodes in float32 if the VAE's configuration says so
    call = {}  # arguments of the stock call that are not its defaults
    attention = ATTENTION  # layers of the LoRA
    # steps and guidance as in the stock call
    defaults = {"steps": 50, "guidance": 7.5, "eta": 1.0, "sample_batch": 8, "micro_batch": 2}
    defaults |= {"lora_targets": "attention", "lr": 1e-4, "eval_rewards": "jpeg_compressibility"}

    @staticmethod
    def problem(config: dict) -> str:
        """Why a network with this config.json cannot be used; "" if it can."""
        inputs, outputs = config.get("in_channels"), config.get("out_channels")
        if inputs != outputs:
            return (
                f"its U-Net takes {inputs} channels and gives {outputs}: an inpainting or editing model; "
                "give the text-to-image model"
            )
        if config.get("time_cond_proj_dim") is not None:
            return (
                "its U-Net expects guidance embeddings (time_cond_proj_dim): an LCM, which DDIM does not "
                "sample; give the model that it was distilled from"
            )
        return ""

    @staticmethod
    def scheduler(own, prefix: str):
        """DDIM with the noise levels of the pipeline's `own` scheduler. InputError for levels of another
        kind."""
        from diffusers import DDIMScheduler

        if not hasattr(own, "alphas_cumprod"):
            raise InputError(f"{prefix}: its {type(own).__name__} has no noise levels that DDIM could use")
        # latents are unbounded: a scheduler's default clipping to [-1, 1] would be wrong for them
        scheduler = DDIMScheduler.from_config(own.config, clip_sample=False, thresholding=False)
        kind = scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise InputError(f"{prefix}: prediction type {kind}; supported: epsilon, v_prediction")
        return scheduler

    def set_timesteps(self, m, steps: int) -> None:
        """Set the scheduler's grid as the stock call does."""
        m.pipeline.scheduler.set_timesteps(steps)

    @staticmethod
    def size(pipeline) -> tuple[int, int]:
        """(height, width) in pixels of the stock call without height and width."""
        size = getattr(pipeline, "unet", None) or pipeline.transformer
        size = size.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * pipeline.vae_scale_factor, width * pipeline.vae_scale_factor

    @staticmethod
    def latent_shape(pipeline, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the initial noise."""
        network, scale = getattr(pipeline, "unet", None) or pipeline.transformer, pipeline.vae_scale_factor
        return network.config.in_channels, height // scale, width // scale

    def encode(self, pipeline, prompts: list[str], device: str) -> tuple:
        """(token states (n, tokens, width), pooled embedding (n, width) or None) by the text encoders."""
        options = dict.fromkeys(self.further_prompts)
        options |= {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        states, _, *pooled = pipeline.encode_prompt(prompt=prompts, **options)
        return states, pooled[0] if pooled else None

    def prepare(self, m) -> None:
        """Make what every prediction takes and what depends on the image's size alone."""

    def predict(self, m, x, t, states, pooled, guidance: float):
        """The network's output, like x. x: (batch, *latent_shape), t: (batch,) or (), states, pooled: of
        `encode`; guidance: for networks in which it is embedded."""
        return m.denoiser(x, t, encoder_hidden_states=states).sample

    def to_vae(self, m, latents):
        """What the VAE decodes, of clean latents."""
        config = m.vae.config
        return latents / config.scaling_factor + (config.shift_factor or 0)

    @staticmethod
    def stock_latents(pipeline, latents):
        """What the stock call takes as latents=, of initial noise (batch, *latent_shape)."""
        return latents


class StableDiffusionXL(StableDiffusion):
    """Its network also takes a pooled embedding and the image's size."""

    label, pipeline, left_out = "SD XL", "StableDiffusionXLPipeline", {}
    further_prompts, upcast_vae = ("prompt_2",), True
    defaults = StableDiffusion.defaults | {"guidance": 5.0, "sample_batch": 4, "micro_batch": 1}

    def prepare(self, m):
        size, width = (m.height, m.width), m.pipeline.text_encoder_2.config.projection_dim
        ids = m.pipeline._get_add_time_ids(size, (0, 0), size, m.dtype, width)
        m.time_ids = ids.to(m.device)  # (1, 6) original size, crop corner, target size

    def predict(self, m, x, t, states, pooled, guidance):
        extra = {"text_embeds": pooled, "time_ids": m.time_ids.expand(len(x), -1)}
        return m.denoiser(x, t, encoder_hidden_states=states, added_cond_kwargs=extra).sample


class StableDiffusion3(StableDiffusion):
    """A flow, by a transformer."""

    label, pipeline, part, flow = "SD 3", "StableDiffusion3Pipeline", "transformer", True
    multiple, left_out = 16, {}
    t5, further_prompts = ("text_encoder_3", "tokenizer_3"), ("prompt_2", "prompt_3")
    defaults = StableDiffusionXL.defaults | {"steps": 28, "guidance": 7.0, "eta": 0.0}
    dynamic = False  # whether its stock call shifts the grid by the image's size

    @staticmethod
    def problem(config):
        return ""

    def scheduler(self, own, prefix):
        """The pipeline's own Euler steps. InputError for a scheduler of another kind."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        kind, config = type(own), own.config
        if kind is not FlowMatchEulerDiscreteScheduler or config.use_dynamic_shifting > self.dynamic:
            raise InputError(
                f"{prefix}: its scheduler must be FlowMatchEulerDiscreteScheduler"
                + ", without dynamic shifting" * (not self.dynamic)
            )
        if config.invert_sigmas:
            raise InputError(f"{prefix}: its scheduler's levels rise (invert_sigmas); they must fall")
        return own.from_config(config, stochastic_sampling=False)

    def shift(self, m, steps: int) -> float:
        """s of the grid's levels s u / (1 + (s - 1) u), u even."""
        return m.pipeline.scheduler.shift

    def prepare(self, m):
        config = m.denoiser.config  # its position embedding is cut out of a square table
        most = config.pos_embed_max_size * config.patch_size * m.pipeline.vae_scale_factor
        for side in ("height", "width"):
            if getattr(m, side) > most:
                raise InputError(f"--{side} {getattr(m, side)}: the model takes at most {most}")

    def predict(self, m, x, t, states, pooled, guidance):
        return m.denoiser(x, states, pooled, t.expand(len(x))).sample


class Flux(StableDiffusion3):
    """Its latents are packed into tokens, its guidance is a number that the network takes."""

    label, pipeline = "FLUX.1 dev", "FluxPipeline"
    variant = ("transformer/config.json", "guidance_embeds", True)
    classifier_free, dynamic, t5 = False, True, ()
    defaults = StableDiffusion3.defaults | {"guidance": 3.5}

    @staticmethod
    def size(pipeline):
        return (pipeline.default_sample_size * pipeline.vae_scale_factor,) * 2

    @staticmethod
    def latent_shape(pipeline, height, width):
        scale = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, height // scale, width // scale

    @staticmethod
    def tokens(m) -> int:
        """The number of an image's tokens."""
        return m.latent_shape[1] * m.latent_shape[2] // 4

    def mu(self, m, steps: int) -> float:
        """What the stock call shifts the grid by."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(self.tokens(m), *(m.pipeline.scheduler.config[name] for name in names))

    def set_timesteps(self, m, steps):
        sigmas = np.linspace(1.0, 1 / steps, steps)
        m.pipeline.scheduler.set_timesteps(sigmas=sigmas, mu=self.mu(m, steps))

    def shift(self, m, steps):
        scheduler = m.pipeline.scheduler
        if not scheduler.config.use_dynamic_shifting:
            return scheduler.shift
        half = scheduler.time_shift(self.mu(m, steps), 1.0, torch.tensor(0.5, dtype=torch.float64)).item()
        return half / (1 - half)

    def encode(self, pipeline, prompts, device):
        states, pooled, _ = pipeline.encode_prompt(prompts, device=device, **self.call)
        return states, pooled

    def prepare(self, m):
        states, pooled = m.split(m.empty)
        options = {"prompt_embeds": states, "pooled_prompt_embeds": pooled, "device": m.device}
        *_, m.text_ids = m.pipeline.encode_prompt(None, **options)
        height, width = m.latent_shape[1] // 2, m.latent_shape[2] // 2
        m.image_ids = m.pipeline._prepare_latent_image_ids(1, height, width, m.device, m.dtype)

    def predict(self, m, x, t, states, pooled, guidance):
        options = {"timestep": t.expand(len(x)).to(x.dtype) / 1000, "encoder_hidden_states": states}
        options |= {"pooled_projections": pooled, "txt_ids": m.text_ids, "img_ids": m.image_ids}
        if m.denoiser.config.guidance_embeds:
            options["guidance"] = torch.full((len(x),), guidance, device=x.device)
        out = m.denoiser(self.stock_latents(m.pipeline, x), **options).sample  # (batch, tokens, 4 channels)
        return m.pipeline._unpack_latents(out, m.height, m.width, m.pipeline.vae_scale_factor)

    @staticmethod
    def stock_latents(pipeline, latents):
        return pipeline._pack_latents(latents.contiguous(), *latents.shape)


class FluxSchnell(Flux):
    """Distilled to few steps and without guidance."""

    label, variant = "FLUX.1 schnell", ("transformer/config.json", "guidance_embeds", False)
    takes_guidance, call = False, {"max_sequence_length": 256}  # as its model card has it
    defaults = Flux.defaults | {"steps": 4, "guidance": 1.0}


class Flux2KleinBase(Flux):
    """Its latents are patches of 2 x 2, normalised by the VAE's batch norm."""

    label, pipeline = "FLUX.2 klein base", "Flux2KleinPipeline"
    variant, classifier_free = ("model_index.json", "is_distilled", False), True
    attention = [*ATTENTION, "to_qkv_mlp_proj", "attn.to_out"]
    defaults = Flux.defaults | {"steps": 50, "guidance": 4.0}

    @staticmethod
    def latent_shape(pipeline, height, width):
        scale = 2 * pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // scale, width // scale

    @staticmethod
    def tokens(m):
        return m.latent_shape[1] * m.latent_shape[2]

    def mu(self, m, steps):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return compute_empirical_mu(self.tokens(m), steps)

    def encode(self, pipeline, prompts, device):
        return pipeline.encode_prompt(prompts, device=device)[0], None

    def prepare(self, m):
        pipeline, states = m.pipeline, m.split(m.empty)[0]
        m.text_ids = pipeline.encode_prompt(None, prompt_embeds=states, device=m.device)[1]
        m.image_ids = pipeline._prepare_latent_ids(torch.empty(1, *m.latent_shape)).to(m.device)

    def predict(self, m, x, t, states, pooled, guidance):
        options = {"timestep": t.expand(len(x)).to(x.dtype) / 1000, "encoder_hidden_states": states}
        options |= {"txt_ids": m.text_ids, "img_ids": m.image_ids}
        out = m.denoiser(m.pipeline._pack_latents(x), **options).sample  # (batch, tokens, channels)
        ids = m.image_ids.expand(len(x), -1, -1)
        return m.pipeline._unpack_latents_with_ids(out, ids, *m.latent_shape[1:])

    def to_vae(self, m, latents):
        norm, epsilon = m.vae.bn, m.vae.config.batch_norm_eps
        mean, variance = (v.view(1, -1, 1, 1) for v in (norm.running_mean, norm.running_var))
        std = torch.sqrt(variance + epsilon).to(latents.device, latents.dtype)
        return m.pipeline._unpatchify_latents(latents * std + mean.to(latents.device, latents.dtype))

    @staticmethod
    def stock_latents(pipeline, latents):
        return latents


class Flux2Klein(Flux2KleinBase):
    """Distilled to few steps and without guidance."""

    label, variant = "FLUX.2 klein", ("model_index.json", "is_distilled", True)
    classifier_free, takes_guidance = False, False
    defaults = Flux2KleinBase.defaults | {"steps": 4, "guidance": 1.0}


FAMILIES = (StableDiffusion, StableDiffusionXL, StableDiffusion3)
FAMILIES += (Flux, FluxSchnell, Flux2KleinBase, Flux2Klein)


def find_family(class_name: str, read):
    """The family of a pipeline class; None for another. read: a file of the pipeline -> its dict."""
    for family in FAMILIES:
        if family.pipeline == class_name:
            file, setting, value = family.variant or ("", "", False)
            if not file or bool(read(file).get(setting)) == value:
                return family()


def family_of(pipeline):
    """The family of a stock pipeline that is loaded."""
    configs = {"model_index.json": pipeline.config}
    if hasattr(pipeline, "transformer"):
        configs["transformer/config.json"] = pipeline.transformer.config
    return find_family(type(pipeline).__name__, configs.get)


# ---------------------------------------------------------------- a pipeline of one of the families


def load_model(args) -> "Model":
    """The Model that the arguments of a script name."""
    size = (args.height, args.width)
    # backwards, cuDNN's attention ends FLUX's update with an illegal memory access (torch 2.11, H100)
    torch.backends.cuda.enable_cudnn_sdp(False)
    return Model(args.model, args.device, DTYPES[args.dtype], args.t5, *size, args.model_config)


def quiet_loading() -> None:
    """Turn off what the libraries print while they load: it would bury the run's settings."""
    for library in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def load_pipeline(name: str, family, left_out: dict, dtype: torch.dtype) -> tuple:
    """(the stock pipeline in main memory, the variant of its files, "fp16" or None). InputError that names
    the weights which a part lacks: the libraries would leave them random."""
    import diffusers

    parts, variants = dict(left_out), set()
    for part, value in read_config(name, "model_index.json").items():
        if part in left_out or not isinstance(value, list) or value[0] not in ("diffusers", "transformers"):
            continue
        kind = getattr(importlib.import_module(value[0]), value[1])
        if issubclass(kind, torch.nn.Module):
            parts[part], variant = load_part(kind, name, part, dtype)
            variants.add(variant)
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(name, dtype=dtype, **parts)
    return pipeline, "fp16" if "fp16" in variants else None


def load_part(kind, name: str, part: str, dtype: torch.dtype) -> tuple:
    """(one network of a pipeline, of the class `kind`, the variant of its files): the fp16 files are taken if
    there are no others."""
    files = [f.name for f in (Path(name) / part).glob("*") if f.suffix in (".safetensors", ".bin")]
    only_half = files and all(".fp16" in file for file in files)  # of a hub id: not known yet
    options = {"subfolder": part, "dtype": dtype, "output_loading_info": True}
    errors = []
    for variant in ("fp16",) if only_half else (None, "fp16"):
        try:
            module, info = kind.from_pretrained(name, variant=variant, **options)
        except OSError as error:  # no such files
            errors.append(error)
            continue
        refuse_missing(part, info["missing_keys"])
        return module, variant
    raise errors[0]


def load_single_file(name: str, source: str, family, dtype: torch.dtype):
    """The stock pipeline of a file, in main memory. source: the configuration. InputError as in
    load_pipeline."""
    import diffusers
    from diffusers.loaders import single_file_utils

    shapes = weight_shapes(name)
    for part, kind in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        config = read_config(source, f"{part}/config.json")
        with torch.device("meta"):
            expected = kind.from_config(config).state_dict()
        convert = getattr(single_file_utils, f"convert_ldm_{part}_checkpoint")
        refuse_missing(part, expected.keys() - convert(dict(shapes), config=config).keys())
    pipeline = getattr(diffusers, family.pipeline).from_single_file(name, config=source)
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            refuse_missing(part, [key for key, value in module.state_dict().items() if value.is_meta])
    return pipeline.to(dtype)


def refuse_missing(part: str, weights) -> None:
    """InputError if there are any."""
    if weights := sorted(weights):
        more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
        raise InputError(f"{part} lacks the weights {', '.join(weights[:3])}{more}")


class Model:
    """A loaded pipeline of FAMILIES. Without `t5`, SD 3 loads no third text encoder. height, width: of the
    images in pixels; None: as the stock call has it. config: --model_config, of a single file."""

    def __init__(
        self,
        name: str,
        device: str,
        dtype: torch.dtype,
        t5: bool = True,
        height: int | None = None,
        width: int | None = None,
        config: str = "",
    ):
        quiet_loading()
        self.name, self.device, self.dtype = name, device, dtype
        self.text_cache = {}  # prompt: its text condition, in main memory
        self.family = check_model(name, config)
        self.source, self.variant = config_source(name, config), None
        self.part, self.classifier_free = self.family.part, self.family.classifier_free
        self.left_out = {} if t5 else dict.fromkeys(self.family.t5)
        self.resized = bool(height or width)
        try:
            if self.source != name:
                pipeline = load_single_file(name, self.source, self.family, dtype)
            else:
                left_out = self.family.left_out | self.left_out
                pipeline, self.variant = load_pipeline(name, self.family, left_out, dtype)
            for module in (m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)):
                module.eval().requires_grad_(False)
            self.pipeline, self.vae = pipeline, pipeline.vae.to(device)
            self.denoiser = getattr(pipeline, self.part).to(device)
            self.height, self.width = self.family.size(pipeline)
            self.height, self.width = height or self.height, width or self.width
            # (channels, height, width)
            self.latent_shape = self.family.latent_shape(pipeline, self.height, self.width)
            # (1, rows, width), kept on the device; a missing tokenizer file shows only now
            self.empty = self.encode([""])
        except Exception as error:  # a broken folder makes the loaders raise many kinds
            raise InputError(f"--model {name}: cannot be loaded ({error})") from None
        self.family.prepare(self)
        self.set_scheduler()
        pipeline.set_progress_bar_config(disable=True)
        # decoding a batch of such images at once would need more memory than anything else
        if max(self.height, self.width) // pipeline.vae_scale_factor >= 64:
            self.vae.enable_slicing()
        if dtype == torch.float16 and self.family.upcast_vae and self.vae.config.force_upcast:
            self.vae.float()

    def set_scheduler(self) -> None:
        """DDIM with the pipeline's own noise levels, or the flow's Euler steps.
        InputError for levels of another kind."""
        own = self.pipeline.scheduler
        self.train_timesteps = own.config.num_train_timesteps
        scheduler = self.pipeline.scheduler = self.family.scheduler(own, f"--model {self.name}")
        if self.family.flow:
            self.prediction_type = "flow"
            self.timesteps(self.family.defaults["steps"])
            return
        self.prediction_type = scheduler.config.prediction_type
        # (T + 1,), the last is the level after the last step; float64: square roots are exact to float32
        self.alphas_cumprod = torch.cat(
            [scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.view(1)]
        ).double()

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Text conditions (n, rows, width) on the device, in the model's dtype: the token states; where the
        family has a pooled embedding, further rows hold it. `split` takes them apart."""
        self.remember(prompts)
        return torch.stack([self.text_cache[p] for p in prompts]).to(self.device)

    @torch.no_grad()
    def remember(self, prompts: list[str]) -> None:
        """Compute the text conditions of new prompts once and keep them in main memory. The text encoders are
        on the device only meanwhile."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.text_cache]
        encoders = (
            [m for name, m in self.pipeline.components.items() if "text_encoder" in name and m] if new else []
        )
        for encoder in encoders:
            encoder.to(self.device)
        for part in (new[i : i + 64] for i in range(0, len(new), 64)):
            states, pooled = self.family.encode(self.pipeline, part, self.device)
            self.tokens, self.pooled = states.shape[1], 0 if pooled is None else pooled.shape[1]
            if self.pooled:  # padded with zeros to full rows
                rows = torch.nn.functional.pad(pooled, (0, -self.pooled % states.shape[2]))
                states = torch.cat([states, rows.unflatten(1, (-1, states.shape[2]))], 1)
            self.text_cache.update(zip(part, states.to("cpu", self.dtype)))
        if "" in new and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            self.text_cache[""] = torch.zeros_like(self.text_cache[""])
        for encoder in encoders:
            encoder.to("cpu")

    def warn_of_cut(self, prompts: list[str]) -> None:
        """Print one line if prompts are longer than what the text encoders read (of several the one that
        reads most): the pipelines drop the rest."""
        parts, most, cut = self.pipeline.components.items(), 0, prompts
        for tokenizer in (part for name, part in parts if name.startswith("tokenizer") and part is not None):
            limit = tokenizer.model_max_length
            if not type(tokenizer).__name__.startswith("CLIP"):  # then the pipeline says how much it reads
                parameters = inspect.signature(self.pipeline.encode_prompt).parameters
                default = parameters["max_sequence_length"].default
                limit = self.family.call.get("max_sequence_length", default)
            most = max(most, limit)
            cut = [p for p, ids in zip(cut, tokenizer(cut).input_ids if cut else []) if len(ids) > limit]
        if cut:
            print(
                f"warning: {len(cut)} of the {len(prompts)} prompts are longer than the {most} tokens that "
                f"the text encoder reads; the rest of each is cut off. The first: {cut[0][:100]!r}",
                file=sys.stderr,
            )

    def split(self, text: torch.Tensor) -> tuple:
        """(token states (n, tokens, width), pooled embedding (n, pooled) or None) of what encode returned."""
        pooled = text[:, self.tokens :].flatten(1)[:, : self.pooled] if self.pooled else None
        return text[:, : self.tokens], pooled

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, guidance: float = 1.0
    ) -> torch.Tensor:
        """The model's raw prediction, float32. x: (batch, ...) latents, t: (batch,) or () timesteps, text: as
        encoded; guidance: of networks in which it is embedded."""
        return self.family.predict(self, x.to(self.dtype), t, *self.split(text), guidance).float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, phase: str = "decode") -> list:
        """PIL images of clean latents (n, ...). InputError, naming the phase, for NaN or Inf."""
        latents = self.family.to_vae(self, latents.to(self.device, self.vae.dtype))
        pixels = self.vae.decode(latents).sample
        if not pixels.isfinite().all():
            raise InputError(
                f"{phase}: NaN or Inf in the images; use --dtype float32 or bfloat16, or a lower --lr"
            )
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    def timesteps(self, steps: int) -> list:
        """Set the scheduler to `steps` steps; its timesteps, noisy to clean. InputError for as many as in
        training, or where the stock DDIM step would mistake the next one."""
        scheduler, total = self.pipeline.scheduler, self.train_timesteps
        self.family.set_timesteps(self, min(steps, total))
        grid, flow = scheduler.timesteps.tolist(), self.prediction_type == "flow"
        if (
            steps >= total
            or not flow
            and any(t - total // steps != after for t, after in zip(grid, grid[1:]))
        ):
            if not flow and scheduler.config.timestep_spacing == "linspace":  # no number of steps suits it
                raise InputError(
                    f"--model {self.name}: set timestep_spacing in scheduler_config.json to leading"
                )
            spaced = "" if flow else f" and, with {scheduler.config.timestep_spacing!r} spacing, divide them"
            raise InputError(f"--steps {steps}: must be below the model's {total} training steps{spaced}")
        if flow:
            self.shift = self.family.shift(self, steps)  # some stock calls shift by the number of steps
        return grid

    def alpha_sigma(self, t: float | torch.Tensor) -> tuple:
        """alpha_t, sigma_t: sqrt(abar_t), sqrt(1 - abar_t); of a flow 1 - t / T, t / T. A negative t is the
        level after the last step. Floats for a number, float32 tensors for a tensor."""
        t_cpu = t.cpu() if isinstance(t, torch.Tensor) else t  # MPS has no float64
        at = torch.as_tensor(t_cpu, dtype=torch.float64)
        if self.prediction_type == "flow":
            sigma = at.clamp(min=0) / self.train_timesteps
            alpha = 1 - sigma
        else:
            abar = self.alphas_cumprod[at.cpu().long().clamp(min=-1)]  # -1: the last
            alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        if isinstance(t, torch.Tensor):
            return alpha.float().to(t.device), sigma.float().to(t.device)
        return alpha.item(), sigma.item()

    def draw_timesteps(self, n: int, generator: torch.Generator, above: float = -1) -> torch.Tensor:
        """(n,) timesteps to train on, above the timestep `above`: uniform; of a flow logit-normal, shifted as
        the scheduler shifts (the density of diffusers' train_dreambooth_lora_sd3.py) and cut off a thousandth
        above it."""
        if self.prediction_type != "flow":
            return torch.randint(int(above) + 1, self.train_timesteps, (n,), generator=generator)
        shift = self.shift
        sigma = max(above, 0) / self.train_timesteps
        sigma += (1 - sigma) / 1000
        chance = torch.special.ndtr(
            torch.tensor(sigma / (shift - (shift - 1) * sigma), dtype=torch.float64).logit()
        )
        chance = chance + (1 - chance) * torch.rand(n, generator=generator, dtype=torch.float64)
        u = torch.special.ndtri(chance).sigmoid()
        return (self.train_timesteps * shift * u / (1 + (shift - 1) * u)).float()

    # ------------------------------------------------------------ LoRA

    def add_lora(self, rank: int, alpha: float, targets: str, seed: int) -> list[torch.nn.Parameter]:
        """Add a LoRA to the denoiser, float32, without effect at first; returns its parameters. targets:
        "attention", "all" (every linear and convolution layer) or module names separated by commas.
        InputError for another name."""
        from peft import LoraConfig

        layers = [
            n for n, m in self.denoiser.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
        ]
        attention = [n for n in self.family.attention if any(layer.endswith("." + n) for layer in layers)]
        names = {"attention": attention, "all": layers}.get(targets, targets.split(","))
        unknown = [n for n in names if not any(layer == n or layer.endswith("." + n) for layer in layers)]
        if unknown:
            raise InputError(
                f"--lora_targets {targets}: the model has no linear or convolution layer {unknown[0]!r}"
            )
        # a name such as attn.to_out may also end the names of modules that are no layers
        names = [layer for layer in layers if any(layer == n or layer.endswith("." + n) for n in names)]
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
        self.denoiser.add_adapter(config)
        for parameter in self.lora().values():
            parameter.data = parameter.data.float()
        return list(self.lora().values())

    def load_lora(self, source: str) -> list[torch.nn.Parameter]:
        """Load a LoRA, float32, in place of add_lora; returns its parameters. Rank, alpha, layers are those
        of the file. source: as in find_lora. InputError if the file is damaged, or if the stock loader would
        leave a part of it out."""
        from diffusers.utils import convert_unet_state_dict_to_peft
        from safetensors.torch import load_file

        file = find_lora(source, "--lora")
        try:
            names = [name for name in load_file(file) if not name.endswith(".alpha")]
        except Exception as error:  # a damaged file makes the loaders raise many kinds
            raise InputError(f"{file}: cannot be loaded ({error})") from None
        of_text = sum(name.startswith(("lora_te", "text_encoder")) for name in names)
        if of_text:
            raise InputError(
                f"{file}: {of_text} of its {len(names)} tensors are of a text encoder; give a LoRA of the "
                f"{self.part} alone (of kohya's scripts: --network_train_unet_only)"
            )
        try:
            options = {"unet_config": self.denoiser.config, "return_lora_metadata": True}
            state = self.pipeline.lora_state_dict(str(file), **options)[0]
            with warnings.catch_warnings(action="ignore"):  # of what is refused below
                self.pipeline.load_lora_weights(str(file), adapter_name="default")
        except Exception as error:
            raise InputError(f"{file}: cannot be loaded ({error})") from None
        state = {name.removeprefix(f"{self.part}."): value for name, value in state.items()}
        if not any("lora_A" in name for name in state):
            state = convert_unet_state_dict_to_peft(state)
        state = {
            re.sub(r"\.(lora_[AB])\.weight$", r".\1.default.weight", name): v for name, v in state.items()
        }
        fit = state.keys() & self.lora().keys()
        if not len(fit) == len(names) == len(self.lora()):
            raise InputError(f"{file}: only {len(fit)} of its {len(names)} tensors fit the model")
        for name, parameter in self.lora().items():  # the loader has rounded them to the model's precision
            parameter.data = state[name].to(parameter.device, torch.float32)
            parameter.requires_grad_(True)
        return list(self.lora().values())

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA's parameters by name."""
        return {n: p for n, p in self.denoiser.named_parameters() if "lora_" in n}

    @contextlib.contextmanager
    def lora_merged(self):
        """Inside, the LoRA is merged into the weights: as fast as the plain model. Afterwards the weights are
        restored bit by bit from main memory."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        saved = [layer.get_base_layer().weight.detach().to("cpu", copy=True) for layer in layers]
        try:
            for layer in layers:
                layer.merge()
            yield
        finally:
            for layer, weight in zip(layers, saved):
                layer.get_base_layer().weight.data.copy_(weight)
                layer.merged_adapters.clear()  # unmerge() would subtract and leave rounding errors

    @contextlib.contextmanager
    def lora_off(self):
        """Inside, the model is the base model."""
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()  # also makes the parameters trainable again

    def save_lora(self, folder: Path) -> None:
        """Write pytorch_lora_weights.safetensors,
        with the metadata without which diffusers takes alpha for the rank."""
        if not FIRST:
            return
        from diffusers.training_utils import _collate_lora_metadata
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.denoiser)
        if self.part == "unet":
            # one naming for all keys: diffusers judges a file by its first key and drops the others
            names = {k: k.replace("lora_A", "lora.down").replace("lora_B", "lora.up") for k in state}
            state = {names[k]: v for k, v in state.items()}
        options = {f"{self.part}_lora_layers": state, **_collate_lora_metadata({self.part: self.denoiser})}
        self.pipeline.save_lora_weights(folder, weight_name="part.safetensors", **options)
        os.replace(folder / "part.safetensors", folder / LORA_FILE)


# ---------------------------------------------------------------- what a tuned run left


def find_lora(source: str, flag: str) -> Path:
    """The file of a LoRA. source: that file, or a folder that holds LORA_FILE or one other .safetensors file.
    InputError, naming `flag`, if there is none."""
    path = Path(source)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    files = sorted(path.glob("*.safetensors"))
    files = [path / LORA_FILE] if path / LORA_FILE in files else files
    if len(files) != 1:
        found = f"holds {len(files)} .safetensors files" if files else f"has no {LORA_FILE}"
        raise InputError(
            f"{flag} {source}: {found}; give the folder of a finished graft.py or pgraft.py run, or one "
            ".safetensors file"
        )
    return files[0]


def check_start(args) -> Path | None:
    """The folder of --lora, from which the tuning starts; None without. InputError if there is no LoRA, or if
    a setting is given that comes from its file."""
    if not args.lora:
        return None
    for name in ("lora_rank", "lora_alpha", "lora_targets"):
        value = getattr(args, name)
        if value != getattr(type(args), name) and not args.resume:  # a stored run has its defaults filled in
            raise InputError(f"--{name} {value}: comes from the file of --lora; leave it out")
    return find_lora(args.lora, "--lora").parent


def read_switch(folder: str, instead: str, model: Model | None = None) -> float:
    """The timestep of the switch in a run's pgraft.json. InputError, with the advice to give `instead`, if
    the file is missing or damaged, or if the model has another noise level there."""
    path = Path(folder) / SWITCH_FILE
    if not path.is_file():
        raise InputError(f"{path}: does not exist; give the folder of a finished pgraft.py run, or {instead}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        timestep, level = float(stored["switch_timestep"]), float(stored["sigma"])
        if not math.isfinite(timestep):
            raise ValueError("no number")
    except (ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: is damaged; give {instead}") from None
    if model:
        sigma = model.alpha_sigma(timestep)[1] if 0 <= timestep < model.train_timesteps else math.nan
        if not abs(sigma - level) < 1e-3:
            raise InputError(
                f"{path} does not fit the model: noise level {level:.4f} at timestep {timestep:g}, the model "
                f"has {sigma:.4f}; give --model {stored.get('model')}"
            )
    return timestep


def stock_code(model: Model, scheduler_options: str = "") -> str:
    """Python that loads the model in stock diffusers as `pipe`. scheduler_options: of DDIM."""
    name = str(Path(model.name).resolve()) if Path(model.name).exists() else model.name
    options = f"dtype={model.dtype}" + "".join(f", {key}=None" for key in model.left_out)
    options += f", variant={model.variant!r}" if model.variant else ""
    kind, load = model.family.pipeline, "from_pretrained"
    if model.source != model.name:
        source = str(Path(model.source).resolve()) if Path(model.source).exists() else model.source
        load, options = "from_single_file", f"config={source!r}, {options}"
    load = f"pipe = {kind}.{load}({name!r}, {options}).to({model.device!r})"
    if model.prediction_type == "flow":
        return f"import torch; from diffusers import {kind}\n{load}"
    return f"""import torch; from diffusers import DDIMScheduler, {kind}
{load}
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {scheduler_options}clip_sample=False)"""


def stock_options(model: Model) -> str:
    """Further arguments of the stock call that makes the model's images."""
    size = {"height": model.height, "width": model.width} if model.resized else {}
    return "".join(f", {name}={value}" for name, value in (size | model.family.call).items())


def stock_call(model: Model, prompt: str, args, options: str = "") -> str:
    """Python that makes the evaluation's first image. options: further arguments of the call.
    Stock flows know no eta."""
    eta, remark = f"eta={args.eta}, ", ""
    if model.prediction_type == "flow":
        eta, remark = "", "# the stock flow is deterministic: not the image of this run\n" if args.eta else ""
    call = f"pipe(prompt={prompt!r}, num_inference_steps={args.steps}, guidance_scale={args.guidance}, {eta}"
    generator = f"generator=torch.Generator().manual_seed({derived_seed('eval', 0, 0)})"
    return f'{remark}{call}{generator}{stock_options(model)}{options}).images[0].save("tuned.png")'


def stock_switch(level: str) -> str:
    """Python that switches the LoRA of `pipe` off in the steps that start at the timestep `level` or
    below."""
    return f"""def base_from_the_switch_on(pipe, i, t, kwargs):  # called after step i
    if i + 1 == (pipe.scheduler.timesteps > {level}).sum():
        pipe.disable_lora()
    return kwargs

pipe.enable_lora()  # before every call: the last one has switched it off"""


# ---------------------------------------------------------------- an unconditional flow


class Flow:
    """A stock network whose output is the velocity, and its scheduler.
    shape: of an image, (channels, height, width)."""

    def __init__(self, network, scheduler, device: str):
        self.network, self.scheduler, self.device = network.to(device).eval(), scheduler, device
        self.shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)

    @classmethod
    def load(cls, folder: str, device: str) -> "Flow":
        """The flow in the folder, frozen, in float32. InputError if it cannot be loaded."""
        quiet_loading()
        import diffusers

        try:
            part = next(name for name in FLOW_NETWORKS if (Path(folder) / name).is_dir())
            network_class = getattr(diffusers, FLOW_NETWORKS[part])
            network = network_class.from_pretrained(folder, subfolder=part, dtype=torch.float32)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
                folder, subfolder="scheduler"
            )
        except Exception as error:  # a broken folder makes the loaders raise many kinds
            raise InputError(f"--model {folder}: cannot be loaded ({error})") from None
        return cls(network.requires_grad_(False), scheduler, device)

    def velocity(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """v(x, sigma), like x. x: (batch, ...), sigma: (batch,) from 1 (noise) to 0 (image)."""
        if not len(x):  # a transformer cannot take an empty batch
            return x
        return predict_velocity(self.network, x, sigma * self.scheduler.config.num_train_timesteps)

    def grid(self, steps: int, power: float) -> torch.Tensor:
        """The scheduler's levels (steps + 1,) for sigma_k = (1 - k / steps)^power, asked for as the Flux
        pipelines do. InputError if they do not fall from 1 to 0."""
        self.scheduler.set_timesteps(sigmas=[(k / steps) ** power for k in range(steps, 0, -1)])
        grid = self.scheduler.sigmas
        if grid[0] != 1 or grid[-1] != 0 or (grid.diff() >= 0).any():
            raise InputError(f"--model: its scheduler's levels do not fall from 1 to 0 ({grid.tolist()})")
        return grid.to(self.device)


def predict_velocity(network, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A stock network's output. x: (batch, channels, height, width), t: (batch,) from 1000 (noise) to 0."""
    # of a transformer: the number of its classes; one more stands for "no class"
    classes = getattr(network.config, "num_embeds_ada_norm", None)
    extra = {} if classes is None else {"class_labels": torch.full((len(x),), classes, device=x.device)}
    return network(x, t, **extra).sample


def model_hash(network) -> str:
    """SHA-256 of the weights, in float32, and their names."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_flow(name: str) -> tuple[int, int, int]:
    """The shape of an image of the flow in the folder `name`, from its configuration files.
    InputError if it is none."""
    configs = []
    folder = Path(name)
    part = next((part for part in FLOW_NETWORKS if (folder / part).is_dir()), None)
    if part is None:
        raise InputError(f"--model {name}: no such folder, or neither unet/ nor transformer/ in it")
    for file in (folder / part / "config.json", folder / "scheduler" / "scheduler_config.json"):
        try:
            configs.append(json.loads(file.read_text(encoding="utf-8")))
            class_name = configs[-1].get("_class_name")
        except (OSError, ValueError, AttributeError):
            raise InputError(f"--model {name}: {file.relative_to(folder)} is missing or damaged") from None
        wanted = "FlowMatchEulerDiscreteScheduler" if file.parent.name == "scheduler" else FLOW_NETWORKS[part]
        if class_name != wanted:
            raise InputError(f"--model {name}: {file.parent.name} is a {class_name}; supported: {wanted}")
    network, scheduler = configs
    for setting in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"):
        if scheduler.get(setting):
            raise InputError(f"--model {name}: a scheduler with {setting} is not supported")
    if part == "unet" and (network.get("class_embed_type") or network.get("num_class_embeds")):
        raise InputError(
            f"--model {name}: wants a class with every image; only unconditional models are supported"
        )
    size, channels = network.get("sample_size"), network.get("in_channels")
    if not isinstance(size, int) or network.get("out_channels") not in (channels, None):
        raise InputError(
            f"--model {name}: needs square images (sample_size a number) and as many channels out as in"
        )
    return channels, size, size


# ---------------------------------------------------------------- seeds, noise, schedule, numerical errors


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on nothing but the key, so that one image or update can be made again alone.

    A key of fewer than four 32-bit words is filled up with zeros, so short keys that differ only by zeros at
    the end give the same seed. tests/test_seeds.py lists the keys in use and searches for collisions.
    """
    words = [w if isinstance(w, int) else int.from_bytes(w.encode(), "big") for w in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_noise(seeds: list[int], steps: int, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """(steps + 1, n, *shape): the initial noise, then one draw a step, in the order in which the stock
    pipeline asks for them when it is given one CPU generator for each of the n seeds."""
    generators = (torch.Generator().manual_seed(s) for s in seeds)
    draws = [
        torch.stack([torch.randn(shape, generator=g, dtype=dtype) for _ in range(steps + 1)])
        for g in generators
    ]
    return torch.stack(draws, 1)


def schedule_prompts(count: int, per_round: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round the indices of its prompts: slices of a random order of all `count` prompts. When too
    few are left for a round, a new order begins."""
    per_round, schedule = min(per_round, count), []
    for r in range(rounds):
        order, place = divmod(r, count // per_round)
        generator = torch.Generator().manual_seed(derived_seed(seed, "prompts", order))
        permutation = torch.randperm(count, generator=generator)
        schedule.append(permutation[place * per_round : (place + 1) * per_round].tolist())
    return schedule


def check_finite(where: str, loss: float, norm: float, scaler: torch.amp.GradScaler) -> None:
    """InputError for a loss or gradient norm that is NaN or Inf. With float16 an infinite gradient is no
    error as long as the scale can fall: scaler.step skips the update."""
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1)):
        raise InputError(
            f"{where}: loss {loss}, gradient norm {norm}; lower --lr or use --dtype float32 or bfloat16"
        )
