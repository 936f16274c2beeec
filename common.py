"""What every method file needs and no method is about: the models and their families, LoRA, the optimiser, seeds and noise.

The denoising loops and the losses are not here: they stand in the method files, in sight.
"""

import contextlib
import importlib
import json
import os
from pathlib import Path

import huggingface_hub as hub
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LORA_FILE = "pytorch_lora_weights.safetensors"
FAMILIES = {  # pipeline class: further prompts that its encode_prompt takes
    "StableDiffusionPipeline": (),  # 1.x, 2.x
    "StableDiffusionXLPipeline": ("prompt_2",),
    "StableDiffusion3Pipeline": ("prompt_2", "prompt_3"),
}
ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()  # the last four: the text in SD 3


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that names it and the fix."""


def check_device(device: str, dtype: str, of: str = "") -> str:
    """The device that will be used ("cuda" or "cpu"); InputError for what this machine cannot do. of: "reward_" for its flags."""
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"--{of}device {device}: must be auto, cpu or cuda")
    if dtype not in DTYPES:
        raise InputError(f"--{of}dtype {dtype}: must be one of {', '.join(DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--{of}device cuda: no CUDA device found; use --{of}device cpu, or install a CUDA build of torch")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if device == "cpu" and dtype == "float16":
        raise InputError(f"--{of}dtype float16 needs a CUDA device; on the CPU use --{of}dtype float32 or bfloat16")
    return device


def check_model_name(name: str) -> str:
    """The pipeline class, one of FAMILIES, of a folder or hub id (owner/name). InputError for another; no weights are read."""
    index = Path(name) / "model_index.json"
    try:
        if not Path(name).is_dir():
            if not hub.try_to_load_from_cache(name, index.name):  # the download would try for half a minute without a network
                hub.get_hf_file_metadata(hub.hf_hub_url(name, index.name))
            index = Path(hub.hf_hub_download(name, index.name))
        family = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except Exception as error:  # no network, no right to it, no pipeline, a damaged file: many kinds
        raise InputError(f"--model {name}: cannot be loaded ({error}); give the folder or hub id of a pipeline") from None
    if str(family) not in FAMILIES:
        raise InputError(f"--model {name}: is a {family}; supported: {', '.join(FAMILIES)}")
    return family


# ---------------------------------------------------------------- model families


class Model:
    """A loaded pipeline of FAMILIES and the few calls in which they differ; without `t5`, SD 3 loads no third text encoder."""

    def __init__(self, name: str, device: str, dtype: torch.dtype, t5: bool = True):
        for library in ("diffusers", "transformers"):  # their notes while loading would bury the settings
            logging = importlib.import_module(f"{library}.utils.logging")
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        import diffusers

        self.name, self.device, self.dtype, self.texts = name, device, dtype, {}
        self.family = check_model_name(name)
        self.part = "transformer" if self.family == "StableDiffusion3Pipeline" else "unet"
        self.left_out = {} if t5 or self.part == "unet" else {"text_encoder_3": None, "tokenizer_3": None}
        options = self.left_out | ({"safety_checker": None} if self.family == "StableDiffusionPipeline" else {})
        try:
            pipeline = getattr(diffusers, self.family).from_pretrained(name, dtype=dtype, **options)
            for module in (m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)):
                module.eval().requires_grad_(False)
            self.pipeline, self.vae, self.denoiser = pipeline, pipeline.vae.to(device), getattr(pipeline, self.part).to(device)
            size = self.denoiser.config.sample_size
            self.latent_shape = (self.denoiser.config.in_channels, size, size)  # (channels, height, width)
            self.empty = self.encode([""])  # (1, rows, width), kept on the device; a missing tokenizer file shows only now
        except Exception as error:  # a broken folder makes the loaders raise many kinds
            raise InputError(f"--model {name}: cannot be loaded ({error})") from None
        self.set_scheduler()
        pipeline.set_progress_bar_config(disable=True)
        if size >= 64:  # a batch of such pictures at once would be what needs the most memory
            self.vae.enable_slicing()
        if dtype == torch.float16 and "XL" in self.family and self.vae.config.force_upcast:
            self.vae.float()

    def set_scheduler(self) -> None:
        """DDIM with the pipeline's own noise levels, or the flow's Euler steps. InputError for levels of another kind."""
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        own, name = self.pipeline.scheduler, f"--model {self.name}"
        self.train_timesteps = own.config.num_train_timesteps
        if self.part == "transformer":
            if type(own) is not FlowMatchEulerDiscreteScheduler or own.config.use_dynamic_shifting:
                raise InputError(f"{name}: its scheduler must be FlowMatchEulerDiscreteScheduler, without dynamic shifting")
            self.prediction_type, self.pipeline.scheduler = "flow", own.from_config(own.config, stochastic_sampling=False)
            return
        if not hasattr(own, "alphas_cumprod"):
            raise InputError(f"{name}: its {type(own).__name__} has no noise levels that DDIM could use")
        # latents are unbounded: a scheduler's default clipping to [-1, 1] would be wrong for them
        scheduler = DDIMScheduler.from_config(own.config, clip_sample=False, thresholding=False)
        self.prediction_type, self.pipeline.scheduler = scheduler.config.prediction_type, scheduler
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"{name}: prediction type {self.prediction_type}; supported: epsilon, v_prediction")
        # (T + 1,), the level after the last step at the end; in float64, so that the square roots are exact to float32
        self.alphas_cumprod = torch.cat([scheduler.alphas_cumprod, scheduler.final_alpha_cumprod.view(1)]).double()

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Text conditions (n, rows, width) on the device, in the model's dtype: the token states, and the pooled embedding in
        further rows where the family has one; `split` takes them apart."""
        self.remember(prompts)
        return torch.stack([self.texts[p] for p in prompts]).to(self.device)

    @torch.no_grad()
    def remember(self, prompts: list[str]) -> None:
        """Compute the text conditions of new prompts, once, and keep them in main memory. The text encoders stay there too and
        are on the device only meanwhile."""
        new = [p for p in dict.fromkeys(prompts) if p not in self.texts]
        encoders = [m for name, m in self.pipeline.components.items() if "text_encoder" in name and m] if new else []
        for encoder in encoders:
            encoder.to(self.device)
        options = dict.fromkeys(FAMILIES[self.family])
        options |= {"device": self.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        for part in (new[i : i + 64] for i in range(0, len(new), 64)):
            states, _, *pooled = self.pipeline.encode_prompt(prompt=part, **options)
            self.tokens, self.pooled = states.shape[1], pooled[0].shape[1] if pooled else 0
            if pooled:  # filled up with zeros to whole rows
                rows = torch.nn.functional.pad(pooled[0], (0, -self.pooled % states.shape[2]))
                states = torch.cat([states, rows.unflatten(1, (-1, states.shape[2]))], 1)
            self.texts.update(zip(part, states.to("cpu", self.dtype)))
        if "" in new and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            self.texts[""] = torch.zeros_like(self.texts[""])
        for encoder in encoders:
            encoder.to("cpu")

    def split(self, text: torch.Tensor) -> tuple:
        """(token states (n, tokens, width), pooled embedding (n, pooled) or None) of what `encode` returned."""
        return text[:, : self.tokens], text[:, self.tokens :].flatten(1)[:, : self.pooled] if self.pooled else None

    def predict(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The model's raw prediction, float32. x: (batch, ...) latents, t: (batch,) or () timesteps, text: as encoded."""
        (states, pooled), x = self.split(text), x.to(self.dtype)
        if self.part == "transformer":
            return self.denoiser(x, states, pooled, t.expand(len(x))).sample.float()
        more = {}
        if pooled is not None:
            side = self.latent_shape[1] * self.pipeline.vae_scale_factor  # of the picture: original size, corner, target size
            ids = x.new_full((len(x), 6), side)  # made on the device: a transfer would make every step wait
            ids[:, 2:4].zero_()
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return self.denoiser(x, t, encoder_hidden_states=states, **more).sample.float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, phase: str = "decode") -> list:
        """PIL pictures of clean latents (n, ...). InputError that names the phase for NaN or Inf."""
        latents = latents.to(self.device, self.vae.dtype) / self.vae.config.scaling_factor
        pictures = self.vae.decode(latents + (self.vae.config.shift_factor or 0)).sample
        if not pictures.isfinite().all():
            raise InputError(f"{phase}: NaN or Inf in the pictures; use --dtype float32 or bfloat16, or a lower --lr")
        return self.pipeline.image_processor.postprocess(pictures, output_type="pil")

    def timesteps(self, steps: int) -> list:
        """Set the scheduler to `steps` steps; its timesteps, noisy to clean. InputError for as many as in training, or where the
        stock DDIM step would mistake the next one."""
        scheduler, total = self.pipeline.scheduler, self.train_timesteps
        scheduler.set_timesteps(min(steps, total))
        grid, flow = scheduler.timesteps.tolist(), self.prediction_type == "flow"
        if steps >= total or not flow and any(t - total // steps != after for t, after in zip(grid, grid[1:])):
            if not flow and scheduler.config.timestep_spacing == "linspace":  # which suits no number
                raise InputError(
                    f"--model {self.name}: set timestep_spacing in scheduler_config.json to leading, not linspace"
                )
            spaced = "" if flow else f" and, with {scheduler.config.timestep_spacing!r} spacing, divide them"
            raise InputError(f"--steps {steps}: must be below the model's {total} training steps{spaced}")
        return grid

    def alpha_sigma(self, t: float | torch.Tensor) -> tuple:
        """alpha_t, sigma_t: sqrt(abar_t), sqrt(1 - abar_t); of a flow 1 - t / T, t / T. A negative number is the level after the
        last step. Floats for a number, float32 tensors for a tensor."""
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
        """(n,) timesteps to train on, above the timestep `above`: uniform; of a flow logit-normal and shifted as the scheduler
        shifts, the density of diffusers' train_dreambooth_lora_sd3.py, cut off there (a thousandth above it)."""
        if self.prediction_type != "flow":
            return torch.randint(int(above) + 1, self.train_timesteps, (n,), generator=generator)
        shift = self.pipeline.scheduler.shift
        sigma = max(above, 0) / self.train_timesteps
        sigma += (1 - sigma) / 1000
        chance = torch.special.ndtr(torch.tensor(sigma / (shift - (shift - 1) * sigma), dtype=torch.float64).logit())
        chance = chance + (1 - chance) * torch.rand(n, generator=generator, dtype=torch.float64)
        u = torch.special.ndtri(chance).sigmoid()
        return (self.train_timesteps * shift * u / (1 + (shift - 1) * u)).float()

    # ------------------------------------------------------------ LoRA

    def add_lora(self, rank: int, alpha: float, targets: str, seed: int) -> list[torch.nn.Parameter]:
        """Add a LoRA to the denoiser, float32, initially doing nothing; returns its parameters. targets: "attention", "all"
        (every linear and convolution layer) or module names separated by commas."""
        from peft import LoraConfig

        layers = [n for n, m in self.denoiser.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
        attention = [n for n in ATTENTION if any(layer.endswith("." + n) for layer in layers)]
        names = {"attention": attention, "all": layers}.get(targets, targets.split(","))
        unknown = [n for n in names if not any(layer == n or layer.endswith("." + n) for layer in layers)]
        if unknown:
            raise InputError(f"--lora_targets {targets}: the model has no linear or convolution layer {unknown[0]!r}")
        torch.manual_seed(seed)
        self.denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian"))
        for parameter in self.lora().values():
            parameter.data = parameter.data.float()
        return list(self.lora().values())

    def load_lora(self, folder: str) -> None:
        """Load pytorch_lora_weights.safetensors of a run, in place of add_lora."""
        from safetensors.torch import load_file

        try:
            self.pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="default")
            stored = len(load_file(Path(folder) / LORA_FILE))
        except Exception as error:  # a damaged file makes the loaders raise many kinds
            raise InputError(f"{folder}/{LORA_FILE}: cannot be loaded ({error})") from None
        if len(self.lora()) != stored:
            raise InputError(f"{folder}/{LORA_FILE}: only {len(self.lora())} of its {stored} tensors fit the model")

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA's parameters by name."""
        return {n: p for n, p in self.denoiser.named_parameters() if "lora_" in n}

    @contextlib.contextmanager
    def lora_merged(self):
        """Inside, the LoRA is merged into the weights, as fast as the plain model; then they are restored bit by bit, from main memory."""
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
        """Write pytorch_lora_weights.safetensors, with the metadata without which diffusers reloads alpha as the rank."""
        from diffusers.training_utils import _collate_lora_metadata
        from peft.utils import get_peft_model_state_dict

        state = get_peft_model_state_dict(self.denoiser)
        if self.part == "unet":  # one naming for all keys: diffusers recognises a file by its first key and drops the others
            state = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value for k, value in state.items()}
        options = {f"{self.part}_lora_layers": state, **_collate_lora_metadata({self.part: self.denoiser})}
        self.pipeline.save_lora_weights(folder, weight_name="part.safetensors", **options)
        os.replace(folder / "part.safetensors", folder / LORA_FILE)


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on nothing but the key, so that a picture or an update can be made again alone."""
    words = [w if isinstance(w, int) else int.from_bytes(w.encode(), "big") for w in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_noise(seeds: list[int], steps: int, shape: tuple, dtype: torch.dtype) -> torch.Tensor:
    """(steps + 1, n, *shape): the initial noise, then one draw a step, in the order in which the stock pipeline asks for them when
    it is given one CPU generator for each of the n seeds."""
    generators = (torch.Generator().manual_seed(s) for s in seeds)
    draws = [torch.stack([torch.randn(shape, generator=g, dtype=dtype) for _ in range(steps + 1)]) for g in generators]
    return torch.stack(draws, 1)
