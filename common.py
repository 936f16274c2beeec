"""What every method file needs and no method is about: arguments, prompts, model families, LoRA, seeds, run folder, pictures.

The denoising loops and the losses are not here: they stand in the method files, in sight.
"""

import contextlib
import csv
import dataclasses
import hashlib
import importlib
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")
LORA_FILE = "pytorch_lora_weights.safetensors"
FAMILIES = {  # pipeline class: further prompts that its encode_prompt takes
    "StableDiffusionPipeline": (),  # 1.x, 2.x
    "StableDiffusionXLPipeline": ("prompt_2",),
    "StableDiffusion3Pipeline": ("prompt_2", "prompt_3"),
}
ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()  # the last four: the text in SD 3


# ---------------------------------------------------------------- arguments and bad input


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that names it and the fix."""


@contextlib.contextmanager
def exit_on_error(how_to_resume):
    """InputError ends the program with one line and exit code 2; Ctrl-C with exit code 130 and `how_to_resume()`."""
    try:
        yield
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted. {how_to_resume()}", file=sys.stderr)
        sys.exit(130)


def parse_arguments(cls, argv: list[str] | None = None):
    """Command line -> dataclass. tyro's boxed messages become one line. With --resume the stored arguments are the
    defaults, and any other value given beside it is an error."""
    argv = sys.argv[1:] if argv is None else argv

    def cli(default):
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                return tyro.cli(cls, args=argv, default=default)
        except SystemExit as stop:
            if stop.code in (0, None):
                raise
            message = errors.getvalue().split("│ ──")[0]  # above the rule is the message, below it help
            words = [w for w in message.split() if not set(w) <= set("─│╭╮╰╯")]
            raise InputError(" ".join(words) + " (see --help)") from None

    args = cli(cls())
    if not args.resume:
        return args
    stored_file = Path(args.resume) / "args.json"
    if not stored_file.is_file():
        raise InputError(f"--resume {args.resume}: no run there (no args.json); give the folder that the run printed")
    try:
        stored = cls(**{**json.loads(stored_file.read_text(encoding="utf-8")), "resume": args.resume})
        for field in dataclasses.fields(cls):
            value = getattr(stored, field.name)
            if not isinstance(value, (int, float, str, type(None)) if field.default is None else type(field.default)):
                raise ValueError(f"{field.name} is {value!r}")
    except (ValueError, TypeError) as error:
        raise InputError(f"--resume {args.resume}: args.json is damaged or of another script ({error})") from None
    args = cli(stored)
    for field in dataclasses.fields(cls):
        if getattr(args, field.name) != getattr(stored, field.name):
            raise InputError(
                f"--{field.name} {getattr(args, field.name)} differs from the run in {args.resume} "
                f"({getattr(stored, field.name)}): leave it out, or start a new run"
            )
    return args


def read_prompts(file: str, flag: str) -> list[str]:
    """Prompts of a .txt file (one a line), or of a column of a .csv, .tsv or .jsonl file, in order; InputError if there are none.

    The column is given as file.csv:column; left out, it is the first of PROMPT_COLUMNS there is, in capitals or not. A .tsv
    file has no quoting: in PartiPrompts.tsv a quotation mark at the start belongs to the prompt.
    """
    name, _, column = file.rpartition(":")
    if Path(name).suffix not in (".csv", ".tsv", ".jsonl"):
        name, column = file, ""
    path, kind = Path(name), Path(name).suffix
    if kind not in (".txt", ".csv", ".tsv", ".jsonl"):
        raise InputError(
            f"{flag} {file}: give a .txt file (one prompt a line), or .csv, .tsv or .jsonl with a column `prompt`"
        )
    if not path.is_file():
        raise InputError(f"{flag} {file}: no such file")
    lines = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{flag} {file}: line {number} is not UTF-8; save the file as UTF-8") from None
    if kind == ".txt":
        prompts = lines
    elif kind == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    column = column or choose_column(row.keys())
                    prompts.append(row[column] + "")
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(f'{flag} {file}: line {number} is not {{"{column or "prompt"}": "..."}}') from None
    else:
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
        try:
            reader = csv.DictReader(lines, **options)
            columns, rows = reader.fieldnames or [], list(reader)
        except csv.Error as error:
            raise InputError(f"{flag} {file}: is no proper {kind} file ({error})") from None
        chosen = column or choose_column(columns)
        if rows and chosen not in columns:
            raise InputError(
                f"{flag} {file}: no column {chosen or 'prompt'!r} in the first line, which has {', '.join(columns)}; "
                f"choose one as {path.name}:column"
            )
        prompts = [row[chosen] or "" for row in rows]
    prompts = [" ".join(part.strip() for part in p.split("\n")).strip() for p in prompts]
    prompts = [p for p in prompts if p]
    if not prompts:
        raise InputError(f"{flag} {file}: holds no prompt")
    return prompts


def choose_column(columns) -> str | None:
    """The first of PROMPT_COLUMNS among the names, whether in capitals or not."""
    named = {c.strip().lower(): c for c in reversed(list(columns))}
    return next((named[p] for p in PROMPT_COLUMNS if p in named), None)


def warn_of_overlap(prompts: list[str], held_out: list[str]) -> None:
    """Print a warning if prompts are trained on and held out at once."""
    trained = {p.casefold() for p in prompts}
    both = [p for p in held_out if p.casefold() in trained]
    if both:
        print(
            f"warning: {len(both)} of the {len(held_out)} held-out prompts are trained on as well, {both[0]!r} for one; "
            "what is reported as held out is then not quite",
            file=sys.stderr,
        )


def check_model_name(name: str) -> str:
    """The pipeline class, one of FAMILIES, of a folder or hub id (owner/name). InputError for another; no weights are read."""
    index = Path(name) / "model_index.json"
    if not Path(name).exists():
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise InputError(f"--model {name}: no such folder, and no hub id of the form owner/name")
        from huggingface_hub import hf_hub_download

        try:
            index = Path(hf_hub_download(name, index.name))
        except Exception as error:  # no network, no such model, no right to it: many kinds
            raise InputError(f"--model {name}: cannot be loaded ({error})") from None
    if not index.is_file():
        raise InputError(f"--model {name}: is no diffusers pipeline (no model_index.json)")
    try:
        family = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        raise InputError(f"--model {name}: model_index.json is damaged") from None
    if str(family) not in FAMILIES:
        raise InputError(f"--model {name}: is a {family}; supported: {', '.join(FAMILIES)}")
    return family


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
            self.remember([""])  # a missing tokenizer file shows only now
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
        # (T,) in float64: the square roots below are then exact to float32
        self.alphas_cumprod = scheduler.alphas_cumprod.double()

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
            ids = torch.tensor([[side, side, 0, 0, side, side]], dtype=self.dtype, device=x.device)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.expand(len(x), -1)}
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
        """The scheduler's timesteps, noisy to clean. InputError where the stock DDIM step would mistake the next one."""
        if steps >= self.train_timesteps:
            raise InputError(f"--steps {steps}: must be below the model's {self.train_timesteps} training steps")
        self.pipeline.scheduler.set_timesteps(steps)
        grid, stride = self.pipeline.scheduler.timesteps.tolist(), self.train_timesteps // steps
        if self.prediction_type != "flow" and any(t - stride != after for t, after in zip(grid, grid[1:])):
            spacing = self.pipeline.scheduler.config.timestep_spacing
            raise InputError(
                f"--steps {steps}: with {spacing!r} spacing the DDIM scheduler's steps do not join up; "
                f"take a number that divides {self.train_timesteps}"
            )
        return grid

    def alpha_sigma(self, t: float | torch.Tensor) -> tuple:
        """alpha_t, sigma_t: sqrt(abar_t), sqrt(1 - abar_t); of a flow 1 - t / T, t / T. A negative number is the level after the
        last step. Floats for a number, float32 tensors for a tensor."""
        if self.prediction_type == "flow":
            sigma = (t.double() if isinstance(t, torch.Tensor) else max(t, 0)) / self.train_timesteps
            alpha = 1 - sigma
        else:
            at = t.cpu() if isinstance(t, torch.Tensor) else torch.tensor(int(t))
            abar = self.pipeline.scheduler.final_alpha_cumprod.double() if (at < 0).any() else self.alphas_cumprod[at]
            alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        if isinstance(t, torch.Tensor):
            return alpha.float().to(t.device), sigma.float().to(t.device)
        return float(alpha), float(sigma)

    def draw_timesteps(self, n: int, generator: torch.Generator, above: float = -1) -> torch.Tensor:
        """(n,) timesteps to train on, above the timestep `above`: uniform; of a flow logit-normal and shifted as the scheduler
        shifts, the density of diffusers' train_dreambooth_lora_sd3.py, cut off there (a thousandth above it)."""
        if self.prediction_type != "flow":
            return torch.randint(int(above) + 1, self.train_timesteps, (n,), generator=generator)
        shift = self.pipeline.scheduler.shift
        sigma = max(above, 0) / self.train_timesteps
        sigma += (1 - sigma) / 1000
        least = torch.tensor(sigma / (shift - (shift - 1) * sigma), dtype=torch.float64).logit()
        chance = torch.special.ndtr(least)
        chance = chance + (1 - chance) * torch.rand(n, generator=generator, dtype=torch.float64)
        u = torch.special.ndtri(chance).sigmoid()
        return (self.train_timesteps * shift * u / (1 + (shift - 1) * u)).float()

    def stock_code(self, more: str = "") -> str:
        """Lines of Python that load this model in stock diffusers as `pipe`; more: options of the DDIM scheduler."""
        name, flow = str(Path(self.name).resolve()) if Path(self.name).exists() else self.name, self.prediction_type == "flow"
        options = f"dtype={self.dtype}" + "".join(f", {key}=None" for key in self.left_out)
        lines = ["import torch; from diffusers import " + ("" if flow else "DDIMScheduler, ") + self.family]
        lines += [f"pipe = {self.family}.from_pretrained({name!r}, {options}).to({self.device!r})"]
        ddim = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {more}clip_sample=False)"
        return "\n".join(lines if flow else [*lines, ddim])

    def stock_call(self, prompt: str, args, more: str = "") -> str:
        """The call that makes the evaluation's first picture; more: further arguments. Stock flows know no eta."""
        eta, remark = f"eta={args.eta}, ", ""
        if self.prediction_type == "flow":
            eta, remark = "", "# the stock flow is deterministic: not the picture of this run\n" if args.eta else ""
        call = f"pipe({prompt!r}, num_inference_steps={args.steps}, guidance_scale={args.guidance}, {eta}"
        generator = f"generator=torch.Generator().manual_seed({derived_seed('eval', 0, 0)})"
        return f'{remark}{call}{generator}{more}).images[0].save("tuned.png")'

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
        from safetensors import safe_open

        try:
            self.pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name="default")
            with safe_open(Path(folder) / LORA_FILE, "pt") as file:
                stored = len(file.keys())
        except Exception as error:  # a damaged file makes the loaders raise many kinds
            raise InputError(f"{folder}/{LORA_FILE}: cannot be loaded ({error})") from None
        if len(self.lora()) != stored:
            raise InputError(f"{folder}/{LORA_FILE}: only {len(self.lora())} of its {stored} tensors fit the model")

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA's parameters by name."""
        return {n: p for n, p in self.denoiser.named_parameters() if "lora_" in n}

    @contextlib.contextmanager
    def lora_merged(self):
        """Inside, the LoRA is merged into the weights (as fast as the plain model); afterwards they are restored bit by bit."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [m for m in self.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        saved = [layer.get_base_layer().weight.detach().clone() for layer in layers]
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


def make_adamw(parameters: list, lr: float, eight_bit: bool) -> torch.optim.Optimizer:
    """AdamW without weight decay, or bitsandbytes' with its state in 8 bits; InputError without that package."""
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(f"--optimizer_8bit needs the package bitsandbytes ({error}); pip install bitsandbytes") from None
    return AdamW8bit(parameters, lr=lr, weight_decay=0.0)


# ---------------------------------------------------------------- unconditional flow models

FLOW_NETWORKS = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}  # folder: class


class Flow:
    """A stock diffusers network with a FlowMatchEulerDiscreteScheduler."""

    def __init__(self, network, scheduler, device):
        self.network, self.scheduler, self.device = network.to(device).eval(), scheduler, device
        self.shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)

    @classmethod
    def load(cls, folder, device):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        try:
            part = next(name for name in FLOW_NETWORKS if (Path(folder) / name).is_dir())
            network = getattr(diffusers, FLOW_NETWORKS[part]).from_pretrained(folder, subfolder=part, dtype=torch.float32)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        except Exception as error:  # a broken folder makes the loaders raise many kinds
            raise InputError(f"--model {folder}: cannot be loaded ({error})") from None
        return cls(network.requires_grad_(False), scheduler, device)

    def velocity(self, x, sigma):
        """v(x, sigma). x: (batch, ...), sigma: (batch,) from 1 (noise) to 0 (picture)."""
        return predict(self.network, x, sigma * self.scheduler.config.num_train_timesteps)

    def grid(self, steps, power):
        """The scheduler's levels (steps + 1,) for sigma_k = (1 - k / steps)^power, as the Flux pipelines ask for theirs."""
        self.scheduler.set_timesteps(sigmas=[(k / steps) ** power for k in range(steps, 0, -1)])
        grid = self.scheduler.sigmas
        if grid[0] != 1 or grid[-1] != 0 or (grid.diff() >= 0).any():
            raise InputError(f"--model: its scheduler's levels do not fall from 1 to 0 ({grid.tolist()})")
        return grid.to(self.device)

    def save(self, folder):
        part = next(name for name, kind in FLOW_NETWORKS.items() if kind == type(self.network).__name__)
        self.network.save_pretrained(folder / part)
        self.scheduler.save_pretrained(folder / "scheduler")


def model_hash(network):
    """SHA-256 of the weights, in float32, and their names."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def new_network(spec, size, inputs, outputs):
    """A stock network for size x size pictures. spec: "unet:24,48,48", a UNet2DModel with these channels and no attention, or
    "token:128,128,128", a DiTTransformer2DModel with one token of this width and as many layers, for very small pictures."""
    import diffusers

    kind, widths = spec.split(":")[0], [int(width) for width in spec.split(":")[1].split(",")]
    shape = {"sample_size": size, "in_channels": inputs, "out_channels": outputs}
    if kind == "token":
        shape |= {"patch_size": size, "num_layers": len(widths), "attention_head_dim": widths[0], "num_attention_heads": 1}
        return diffusers.DiTTransformer2DModel(**shape, num_embeds_ada_norm=1, norm_num_groups=1)
    blocks = {"down_block_types": ("DownBlock2D",) * len(widths), "up_block_types": ("UpBlock2D",) * len(widths)}
    shape |= {"block_out_channels": widths, "norm_num_groups": math.gcd(8, *widths), "add_attention": False}
    return diffusers.UNet2DModel(**shape, **blocks, layers_per_block=1)


def check_network(spec, size, flag):
    """InputError unless new_network can make this for size x size pictures."""
    kind, _, widths = spec.partition(":")
    widths = [int(width) if width.isdecimal() else 0 for width in widths.split(",")]
    if kind not in ("unet", "token") or any(width < 4 or width % 4 for width in widths):
        raise InputError(f"{flag} {spec}: give unet: or token: and numbers that 4 divides, as in unet:32,64,64 or token:64,64")
    if kind == "token" and len(set(widths)) > 1:
        raise InputError(f"{flag} {spec}: the layers of a token network have one width, as in token:64,64")
    if kind == "unet" and size % 2 ** (len(widths) - 1):
        raise InputError(f"{flag} {spec}: {len(widths)} levels need a size that {2 ** (len(widths) - 1)} divides")


def predict(network, x, t):
    """A stock network's output. x: (batch, channels, height, width), t: (batch,) from 1000 (noise) to 0."""
    classes = getattr(network.config, "num_embeds_ada_norm", None)  # of a transformer: its last class is "none"
    more = {} if classes is None else {"class_labels": torch.full((len(x),), classes, device=x.device)}
    return network(x, t, **more).sample


def check_flow(name):
    """The shape of the pictures of the flow in the folder `name`, from its configuration files; InputError if it is none."""
    configs = []
    folder = Path(name)
    part = next((part for part in FLOW_NETWORKS if (folder / part).is_dir()), None)
    if part is None:
        raise InputError(f"--model {name}: no such folder, or neither unet/ nor transformer/ in it")
    for file in (folder / part / "config.json", folder / "scheduler" / "scheduler_config.json"):
        try:
            configs.append(json.loads(file.read_text(encoding="utf-8")))
            kind = configs[-1].get("_class_name")
        except (OSError, ValueError, AttributeError):
            raise InputError(f"--model {name}: {file.relative_to(folder)} is missing or damaged") from None
        wanted = "FlowMatchEulerDiscreteScheduler" if file.parent.name == "scheduler" else FLOW_NETWORKS[part]
        if kind != wanted:
            raise InputError(f"--model {name}: {file.parent.name} is a {kind}; supported: {wanted}")
    network, scheduler = configs
    for setting in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"):
        if scheduler.get(setting):
            raise InputError(f"--model {name}: a scheduler with {setting} is not supported")
    if part == "unet" and (network.get("class_embed_type") or network.get("num_class_embeds")):
        raise InputError(f"--model {name}: wants a class with every picture; only unconditional models are supported")
    size, channels = network.get("sample_size"), network.get("in_channels")
    if not isinstance(size, int) or network.get("out_channels") not in (channels, None):
        raise InputError(f"--model {name}: needs square pictures (sample_size a number) and as many channels out as in")
    return channels, size, size


def count_flops(function):
    """Floating-point operations of function(), by torch's counter (attention in its plain form, which the counter knows)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ---------------------------------------------------------------- seeds, run folder, files


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on nothing but the key, so that a picture or an update can be made again alone."""
    words = [w if isinstance(w, int) else int.from_bytes(w.encode(), "big") for w in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_output(output: str, resume: str) -> None:
    """InputError if --output exists already (unless the run is resumed)."""
    path = Path(output)
    if not output or resume or not path.exists() or path.is_dir() and not any(path.iterdir()):
        return
    if (path / "args.json").is_file():
        raise InputError(f"--output {output}: holds a run already; continue it with --resume {output}, or give a new folder")
    raise InputError(f"--output {output}: exists and is not a run; give a new folder")


def make_run_folder(args, script: str, model: str, seed: int) -> Path:
    """The folder of this run, with args.json: the one to resume, --output, or a new one under runs/."""
    if args.resume:
        return Path(args.resume)
    folder = Path(args.output or f"runs/{script}__{Path(model).name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be written ({error.strerror})") from None
    return folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, fsync, rename: at every moment `path` is the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_checkpoint(folder: Path, state: dict) -> None:
    """Atomically write `state` (tensors, numbers, strings, lists, dicts) to checkpoint.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(folder / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(folder: Path) -> dict | None:
    """The last checkpoint, or None if the run was stopped before the first."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"--resume {folder}: checkpoint.pt is damaged ({type(error).__name__}); start a new run") from None


def write_csv(path: Path, rows: list[dict]) -> None:
    """Atomically write rows with the first row's columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


# ---------------------------------------------------------------- pictures of a run


def save_grid(
    path: Path,
    base: list,
    tuned: list,
    prompts: list[str],
    per_prompt: int,
    title: str = "tuned, same seeds (base on the left)",
) -> None:
    """Up to six prompts, one a row: left the base's pictures, right the tuned model's with the same seeds. Lists prompt by prompt."""
    rows = min(6, len(prompts), len(base) // per_prompt)
    figure = Figure(figsize=(2.2 * per_prompt, 1.35 * rows))
    axes = figure.subplots(rows, 2 * per_prompt, squeeze=False)
    for r in range(rows):
        for c in range(per_prompt):
            axes[r, c].imshow(base[r * per_prompt + c])
            axes[r, per_prompt + c].imshow(tuned[r * per_prompt + c])
        axes[r, 0].set_title(prompts[r], fontsize=8, loc="left")
    axes[0, per_prompt].set_title(title, fontsize=8, loc="left")
    for axis in axes.flat:
        axis.set_axis_off()
    save_figure(figure, path)


def save_curves(path: Path, rows: list[dict], losses: list[float], base: float, reward: str) -> None:
    """Reward by round of the accepted, the sampled and the held-out pictures (round 0: the base's); loss by update."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("accepted", "sampled"):
        left.plot([r["round"] for r in rows], [r[f"reward_{name}"] for r in rows], "o-", label=name)
    held_out = {0: base} | {r["round"]: r["reward_held_out"] for r in rows}
    held_out = {k: v for k, v in held_out.items() if not np.isnan(v)}
    left.plot(held_out.keys(), held_out.values(), "s-", label="held out, after the round")
    left.set(xlabel="round", ylabel=reward, xticks=[r["round"] for r in rows])
    left.legend()
    right.plot(losses, linewidth=0.8)
    right.set(xlabel="update", ylabel="denoising loss")
    save_figure(figure, path)


def save_panels(path: Path, panels: list[tuple[str, str, dict]], log_x: bool = False) -> None:
    """Panels side by side, each (x label, y label, {line: (x, y) or (x, y, standard errors)}); NaN values are left out."""
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for axis, (x_label, y_label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, columns in lines.items():
            kept = [point for point in zip(*columns) if not np.isnan(point[1])]
            if kept:
                axis.errorbar(*zip(*kept), fmt="o-", markersize=3, linewidth=1, capsize=2, label=label)
        axis.set(xlabel=x_label, ylabel=y_label)
        if log_x:
            ticks = sorted({x for columns in lines.values() for x in columns[0]})
            axis.set(xscale="log", xticks=ticks, xticklabels=ticks)
            axis.minorticks_off()
        axis.legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Atomically write a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
