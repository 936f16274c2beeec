"""Models, and what every method needs of them: families, LoRA, noise levels, flows, seeds, initial noise.

The denoising loops and the losses are not here. They stand in the method files.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import math
import os
from pathlib import Path
from typing import Literal

import huggingface_hub as hub
import numpy as np
import torch
import tyro

from utils.processes import FIRST, LOCAL_SIZE
from utils.runs import InputError

ROOT = Path(__file__).resolve().parent
EMBEDDED = str(ROOT / "shapes" / "pipeline")  # the embedded Stable Diffusion
LORA_FILE, SWITCH_FILE = "pytorch_lora_weights.safetensors", "pgraft.json"  # what graft.py, pgraft.py leave
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Device = Literal["auto", "cpu", "cuda"]  # auto: CUDA if there is one
Dtype = Literal["float32", "float16", "bfloat16"]
FAMILIES = {  # pipeline class: further prompts that its encode_prompt takes
    "StableDiffusionPipeline": (),  # 1.x, 2.x
    "StableDiffusionXLPipeline": ("prompt_2",),
    "StableDiffusion3Pipeline": ("prompt_2", "prompt_3"),
}
SHAPES_REWARDS = "shapes_strict,shapes_graded,shapes_fit,jpeg_compressibility"
FAMILY_DEFAULTS = {  # setting: (embedded model, then FAMILIES); steps and guidance as in the stock call
    "steps": (10, 50, 50, 28),
    "guidance": (1.0, 7.5, 5.0, 7.0),
    "eta": (1.0, 1.0, 1.0, 0.0),
    "sample_batch": (64, 8, 4, 4),
    "micro_batch": (64, 2, 1, 1),
    "lora_targets": ("all", "attention", "attention", "attention"),
    "lr": (1e-3, 1e-4, 1e-4, 1e-4),
    "eval_rewards": (SHAPES_REWARDS, *["jpeg_compressibility"] * 3),
}
# of SD 1.x, 2.x and XL; then of SD 3's text stream
ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
FLOW_NETWORKS = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}  # folder of a flow: class


# ---------------------------------------------------------------- what the user asks for


def by_family(values: str | tuple):
    """For Annotated: --help shows the defaults by model family.
    values: a key of FAMILY_DEFAULTS or a tuple like there."""
    own, sd, xl, sd3 = FAMILY_DEFAULTS[values] if isinstance(values, str) else values
    others = f"others: {sd}" if sd == xl == sd3 else f"SD 1 and 2: {sd}; SD XL: {xl}; SD 3: {sd3}"
    return tyro.conf.arg(help_behavior_hint=f"(default: {own}; {others})")


def with_family_defaults(args, **own_defaults):
    """A copy of args in which settings that are None have their default for the family of --model.
    own_defaults: the script's own {setting: values}, which go before FAMILY_DEFAULTS. InputError for a model
    that is not supported."""
    family = check_model(args.model)
    column = 0 if Path(args.model).resolve() == Path(EMBEDDED) else 1 + list(FAMILIES).index(family)
    defaults = {name: values[column] for name, values in (FAMILY_DEFAULTS | own_defaults).items()}
    return dataclasses.replace(
        args, **{n: value for n, value in defaults.items() if getattr(args, n, 0) is None}
    )


def check_device(device: str, dtype: str, prefix: str = "") -> str:
    """The device that will be used, "cuda" or "cpu". InputError for what this machine cannot do.
    prefix: of the flags."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--{prefix}device cuda: no CUDA device found; use --{prefix}device cpu, or install a CUDA build "
            "of torch"
        )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device == "cuda" and LOCAL_SIZE > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node {LOCAL_SIZE}: this machine has {torch.cuda.device_count()} CUDA devices; "
            f"start as many processes, or use --{prefix}device cpu"
        )
    if device == "cpu" and dtype == "float16":
        raise InputError(
            f"--{prefix}dtype float16 needs a CUDA device; on the CPU use --{prefix}dtype float32 or bfloat16"
        )
    return device


def is_checkpoint(name: str) -> bool:
    """Whether it is a folder or looks like a hub id, owner/name."""
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    return name != "" and (Path(name).is_dir() or hub_id and not Path(name).exists())


def check_model(name: str) -> str:
    """The pipeline class, one of FAMILIES, of a folder or hub id. InputError for another.
    Reads no weights."""
    if not is_checkpoint(name):
        raise InputError(f"--model {name}: no such folder, and no hub id of the form owner/name")
    index = Path(name) / "model_index.json"
    try:
        if not Path(name).is_dir():
            # without a network the download would try for half a minute
            if not hub.try_to_load_from_cache(name, index.name):
                hub.get_hf_file_metadata(hub.hf_hub_url(name, index.name))
            index = Path(hub.hf_hub_download(name, index.name))
        family = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except Exception as error:  # no network, no right to it, no pipeline, a damaged file: many kinds
        raise InputError(
            f"--model {name}: cannot be loaded ({error}); give the folder or hub id of a pipeline"
        ) from None
    if str(family) not in FAMILIES:
        raise InputError(f"--model {name}: is a {family}; supported: {', '.join(FAMILIES)}")
    return family


# ---------------------------------------------------------------- a pipeline of one of the families


def quiet_loading() -> None:
    """Turn off what the libraries print while they load: it would bury the run's settings."""
    for library in ("diffusers", "transformers"):
        logging = importlib.import_module(f"{library}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


class Model:
    """A loaded pipeline of FAMILIES, and the few calls in which they differ.
    Without `t5`, SD 3 loads no third text encoder."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, t5: bool = True):
        quiet_loading()
        import diffusers

        self.name, self.device, self.dtype = name, device, dtype
        self.text_cache = {}  # prompt: its text condition, in main memory
        self.family = check_model(name)
        self.part = "transformer" if self.family == "StableDiffusion3Pipeline" else "unet"
        self.left_out = {} if t5 or self.part == "unet" else {"text_encoder_3": None, "tokenizer_3": None}
        options = self.left_out | (
            {"safety_checker": None} if self.family == "StableDiffusionPipeline" else {}
        )
        try:
            pipeline = getattr(diffusers, self.family).from_pretrained(name, dtype=dtype, **options)
            for module in (m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)):
                module.eval().requires_grad_(False)
            self.pipeline, self.vae = pipeline, pipeline.vae.to(device)
            self.denoiser = getattr(pipeline, self.part).to(device)
            size = self.denoiser.config.sample_size
            self.latent_shape = (self.denoiser.config.in_channels, size, size)  # (channels, height, width)
            # (1, rows, width), kept on the device; a missing tokenizer file shows only now
            self.empty = self.encode([""])
        except Exception as error:  # a broken folder makes the loaders raise many kinds
            raise InputError(f"--model {name}: cannot be loaded ({error})") from None
        self.set_scheduler()
        pipeline.set_progress_bar_config(disable=True)
        if size >= 64:  # decoding a batch of such images at once would need more memory than anything else
            self.vae.enable_slicing()
        if dtype == torch.float16 and "XL" in self.family and self.vae.config.force_upcast:
            self.vae.float()

    def set_scheduler(self) -> None:
        """DDIM with the pipeline's own noise levels, or the flow's Euler steps.
        InputError for levels of another kind."""
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        own, prefix = self.pipeline.scheduler, f"--model {self.name}"
        self.train_timesteps = own.config.num_train_timesteps
        if self.part == "transformer":
            if type(own) is not FlowMatchEulerDiscreteScheduler or own.config.use_dynamic_shifting:
                raise InputError(
                    f"{prefix}: its scheduler must be FlowMatchEulerDiscreteScheduler, "
                    "without dynamic shifting"
                )
            self.prediction_type, self.pipeline.scheduler = (
                "flow",
                own.from_config(own.config, stochastic_sampling=False),
            )
            return
        if not hasattr(own, "alphas_cumprod"):
            raise InputError(f"{prefix}: its {type(own).__name__} has no noise levels that DDIM could use")
        # latents are unbounded: a scheduler's default clipping to [-1, 1] would be wrong for them
        scheduler = DDIMScheduler.from_config(own.config, clip_sample=False, thresholding=False)
        self.prediction_type, self.pipeline.scheduler = scheduler.config.prediction_type, scheduler
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"{prefix}: prediction type {self.prediction_type}; supported: epsilon, v_prediction"
            )
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
        options = dict.fromkeys(FAMILIES[self.family])
        options |= {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        for part in (new[i : i + 64] for i in range(0, len(new), 64)):
            states, _, *pooled = self.pipeline.encode_prompt(prompt=part, **options)
            self.tokens, self.pooled = states.shape[1], pooled[0].shape[1] if pooled else 0
            if pooled:  # padded with zeros to full rows
                rows = torch.nn.functional.pad(pooled[0], (0, -self.pooled % states.shape[2]))
                states = torch.cat([states, rows.unflatten(1, (-1, states.shape[2]))], 1)
            self.text_cache.update(zip(part, states.to("cpu", self.dtype)))
        if "" in new and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            self.text_cache[""] = torch.zeros_like(self.text_cache[""])
        for encoder in encoders:
            encoder.to("cpu")

    def split(self, text: torch.Tensor) -> tuple:
        """(token states (n, tokens, width), pooled embedding (n,
        pooled) or None) of what `encode` returned."""
        return text[:, : self.tokens], text[:, self.tokens :].flatten(1)[
            :, : self.pooled
        ] if self.pooled else None

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The model's raw prediction, float32.
        x: (batch, ...) latents, t: (batch,) or () timesteps, text: as encoded."""
        (states, pooled), x = self.split(text), x.to(self.dtype)
        if self.part == "transformer":
            return self.denoiser(x, states, pooled, t.expand(len(x))).sample.float()
        extra = {}
        if pooled is not None:
            # original size, crop corner, target size; made on the device: no step waits for a transfer
            ids = x.new_full((len(x), 6), self.latent_shape[1] * self.pipeline.vae_scale_factor)
            ids[:, 2:4].zero_()
            extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return self.denoiser(x, t, encoder_hidden_states=states, **extra).sample.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, phase: str = "decode") -> list:
        """PIL images of clean latents (n, ...). InputError, naming the phase, for NaN or Inf."""
        latents = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        pixels = self.vae.decode(latents + (self.vae.config.shift_factor or 0)).sample
        if not pixels.isfinite().all():
            raise InputError(
                f"{phase}: NaN or Inf in the images; use --dtype float32 or bfloat16, or a lower --lr"
            )
        return self.pipeline.image_processor.postprocess(pixels, output_type="pil")

    def timesteps(self, steps: int) -> list:
        """Set the scheduler to `steps` steps; its timesteps, noisy to clean. InputError for as many as in
        training, or where the stock DDIM step would mistake the next one."""
        scheduler, total = self.pipeline.scheduler, self.train_timesteps
        scheduler.set_timesteps(min(steps, total))
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
        return grid

    def alpha_sigma(self, t: float | torch.Tensor) -> tuple:
        """alpha_t, sigma_t: sqrt(abar_t), sqrt(1 - abar_t); of a flow 1 - t / T, t / T. A negative t is the
        level after the last step. Floats for a number, float32 tensors for a tensor."""
        at = torch.as_tensor(t, dtype=torch.float64)
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
        shift = self.pipeline.scheduler.shift
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
        attention = [n for n in ATTENTION if any(layer.endswith("." + n) for layer in layers)]
        names = {"attention": attention, "all": layers}.get(targets, targets.split(","))
        unknown = [n for n in names if not any(layer == n or layer.endswith("." + n) for layer in layers)]
        if unknown:
            raise InputError(
                f"--lora_targets {targets}: the model has no linear or convolution layer {unknown[0]!r}"
            )
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
        self.denoiser.add_adapter(config)
        for parameter in self.lora().values():
            parameter.data = parameter.data.float()
        return list(self.lora().values())

    def load_lora(self, folder: str) -> None:
        """Load the LoRA of a run, in place of add_lora.
        InputError if the file is damaged or belongs to another model."""
        from safetensors.torch import load_file

        try:
            self.pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="default")
            stored = len(load_file(Path(folder) / LORA_FILE))
        except Exception as error:  # a damaged file makes the loaders raise many kinds
            raise InputError(f"{folder}/{LORA_FILE}: cannot be loaded ({error})") from None
        if len(self.lora()) != stored:
            raise InputError(
                f"{folder}/{LORA_FILE}: only {len(self.lora())} of its {stored} tensors fit the model"
            )

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


def check_lora(folder: str, flag: str) -> None:
    """InputError, naming `flag`, if there is no LoRA in the folder."""
    if not (Path(folder) / LORA_FILE).is_file():
        raise InputError(
            f"{flag} {folder}: has no {LORA_FILE}; give the folder of a finished graft.py or pgraft.py run"
        )


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
    load = f"pipe = {model.family}.from_pretrained({name!r}, {options}).to({model.device!r})"
    if model.prediction_type == "flow":
        return f"import torch; from diffusers import {model.family}\n{load}"
    return f"""import torch; from diffusers import DDIMScheduler, {model.family}
{load}
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {scheduler_options}clip_sample=False)"""


def stock_call(model: Model, prompt: str, args, options: str = "") -> str:
    """Python that makes the evaluation's first image. options: further arguments of the call.
    Stock flows know no eta."""
    eta, remark = f"eta={args.eta}, ", ""
    if model.prediction_type == "flow":
        eta, remark = "", "# the stock flow is deterministic: not the image of this run\n" if args.eta else ""
    call = f"pipe({prompt!r}, num_inference_steps={args.steps}, guidance_scale={args.guidance}, {eta}"
    generator = f"generator=torch.Generator().manual_seed({derived_seed('eval', 0, 0)})"
    return f'{remark}{call}{generator}{options}).images[0].save("tuned.png")'


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
