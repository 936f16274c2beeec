"""What every method file needs and no method is about: arguments, model families, LoRA, seeds, run folder.

The denoising loops and the losses are not here: they stand in the method files, in sight.
"""

import contextlib
import dataclasses
import errno
import importlib
import io
import json
import math
import os
import re
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import tyro

try:
    import fcntl
except ImportError:  # Windows: folders are not locked
    fcntl = None

ROOT = Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LORA_FILE = "pytorch_lora_weights.safetensors"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # what a disk says, not a bug
HELD = []  # the open run folder, locked as long as it is open
FAMILIES = {  # pipeline class: further prompts that its encode_prompt takes
    "StableDiffusionPipeline": (),  # 1.x, 2.x
    "StableDiffusionXLPipeline": ("prompt_2",),
    "StableDiffusion3Pipeline": ("prompt_2", "prompt_3"),
}
ATTENTION = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()  # the last four: the text in SD 3


# ---------------------------------------------------------------- arguments and bad input


class InputError(Exception):
    """Something the user gave is wrong; the message is one line that names it and the fix."""


def run_script(main, cls) -> None:
    """main(args, folder_known) with the command line's arguments; main tells its run folder to folder_known. InputError, what the
    disk says and lack of memory end the program with one line and exit code 2, Ctrl-C with 130; after the disk's errors and
    Ctrl-C the line says how to continue."""
    folders = []
    # the thread of tensorboard's writer prints what it raises again in the main thread
    threading.excepthook = lambda seen: isinstance(seen.exc_value, OSError) or threading.__excepthook__(seen)
    try:
        main(parse_arguments(cls), folders.append)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Exception) as error:
        found = " ".join(str(error).split())
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", found):  # CUDA, CPU
            print(f"error: out of memory ({found}): lower the batch sizes or numbers", file=sys.stderr)
            sys.exit(2)
        command = f"Continue with: python {sys.argv[0]} --resume"
        then = f"{command} {folders[0]}" if folders else "Nothing was written."
        if isinstance(error, KeyboardInterrupt):
            print(f"\ninterrupted. {then}", file=sys.stderr)
            sys.exit(130)
        if not any(os.strerror(code) in str(error) for code in DISK_ERRORS):  # libraries wrap it in errors of their own
            raise
        print(f"error: {found}: make room or allow access; nothing saved is lost. {then}", file=sys.stderr)
        sys.exit(2)


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
            lines = [line.strip("│╭╮╰╯ ") for line in errors.getvalue().splitlines()[1:]]  # without the title
            message, below, *_ = (part for part in re.split("[─-]{9,}", "\n".join(lines)) if part.strip())
            near = re.findall(r"^--(\S+)", below, re.M) if "Perhaps you meant" in below else []
            hint = f"perhaps you meant {', '.join('--' + name.replace('-', '_') for name in near)}; " if near else ""
            raise InputError(f"{message} ({hint}see --help)") from None

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
        raise InputError(
            f"--resume {args.resume}: args.json is damaged or of another script ({error}); start a new run"
        ) from None
    args = cli(stored)
    for field in dataclasses.fields(cls):
        if getattr(args, field.name) != getattr(stored, field.name):
            raise InputError(
                f"--{field.name} {getattr(args, field.name)} differs from the run in {args.resume} "
                f"({getattr(stored, field.name)}): leave it out, or start a new run"
            )
    return args


def complete(args, defaults: dict, limits: dict, choices: dict) -> None:
    """Fill in the settings that were left out and check every argument of which a table can say what is right; InputError.

    defaults: {setting: (of the embedded model, then of FAMILIES in their order)}; limits: {setting: (least, most)}, a name in
    place of a number is that setting's value; choices: {setting: its values}.
    """
    embedded = Path(args.model).resolve() == ROOT / "shapes" / "pipeline"
    column = [*FAMILIES].index(check_model_name(args.model)) + 1
    for name, values in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, values[0 if embedded else column])
    args.device = check_device(args.device, args.dtype)
    check_output(args.output, args.resume)
    check_tables(args, limits, choices)


def check_tables(args, limits: dict, choices: dict) -> None:
    """InputError for an argument that limits or choices, as in complete, do not allow."""
    for name, (least, most) in limits.items():
        most = getattr(args, most) if isinstance(most, str) else most
        if not least <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)}: must be between {least:g} and {most:g}")
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            raise InputError(f"--{name} {getattr(args, name)}: must be one of {', '.join(allowed)}")


def numbers(args, name: str, kind: type, least: float, most: float) -> list:
    """The numbers of a setting such as "2,4", each an int or a float (`kind`) from least to most; InputError."""
    try:
        found = [kind(part) for part in getattr(args, name).split(",") if part.strip()]
    except ValueError:
        found = [float("nan")]
    if not all(least <= n <= most for n in found):
        wanted = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} {getattr(args, name)}: give {wanted} from {least:g} to {most:g}, separated by commas")
    return found


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
        raise InputError(f"--model {name}: is no diffusers pipeline; give the folder that holds a model_index.json")
    try:
        family = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        raise InputError(f"--model {name}: model_index.json is damaged; get the model again") from None
    if str(family) not in FAMILIES:
        raise InputError(f"--model {name}: is a {family}; supported: {', '.join(FAMILIES)}")
    return family


def read_switch(folder: str, instead: str) -> dict:
    """pgraft.json of a run, switch_timestep and sigma as floats; InputError, which tells to give `instead`, if there is none or it
    is damaged."""
    path = Path(folder) / "pgraft.json"
    if not path.is_file():
        raise InputError(f"{path}: does not exist; give the folder of a finished pgraft.py run, or {instead}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored |= {name: float(stored[name]) for name in ("switch_timestep", "sigma")}
        if math.isfinite(stored["switch_timestep"]):
            return stored
        raise ValueError("no number")
    except (ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: is damaged; give {instead}") from None


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
        """Inside, the LoRA is merged into the weights (as fast as the plain model); afterwards they are restored bit by bit
        from copies in main memory."""
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


def make_adamw(parameters: list, lr: float, eight_bit: bool) -> torch.optim.Optimizer:
    """AdamW without weight decay, or bitsandbytes' with its state in 8 bits; InputError without that package."""
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise InputError(f"--optimizer_8bit needs the package bitsandbytes ({error}); pip install bitsandbytes") from None
    return AdamW8bit(parameters, lr=lr, weight_decay=0.0)


# ---------------------------------------------------------------- seeds, run folder, files


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on nothing but the key, so that a picture or an update can be made again alone."""
    words = [w if isinstance(w, int) else int.from_bytes(w.encode(), "big") for w in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_output(output: str, resume: str) -> None:
    """InputError if --output holds anything already (unless the run is resumed) or cannot be made."""
    if resume:
        return
    path = Path(output)
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--output {output}: {there} is no folder that can be written to; give a new folder")
    # args.json.part: of a run that was killed before it had begun
    if not output or not path.exists() or {p.name for p in path.iterdir()} <= {"args.json.part"}:
        return
    if (path / "args.json").is_file():
        raise InputError(f"--output {output}: holds a run already; continue it with --resume {output}, or give a new folder")
    raise InputError(f"--output {output}: exists and is not a run; give a new folder")


def make_run_folder(args, script: str, model: str, seed: int) -> Path:
    """The folder of this run, with args.json: the one to resume, --output, or a new one under runs/. Until the process ends or
    makes the next folder, no other process can have it: InputError."""
    named = f"runs/{script}__{Path(model).name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.resume or args.output or named)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, "--resume" if args.resume else "--output")
        if not args.resume:
            check_output(str(folder), "")  # again: another process may have been faster
            write_atomically(folder / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be written ({error.strerror}); give another folder") from None
    return folder


def lock(folder: Path, flag: str) -> None:
    """Keep other processes from running in `folder`; the system ends that with the process, even a killed one."""
    if fcntl is None:
        return
    while HELD:
        os.close(HELD.pop())
    HELD.append(os.open(folder, os.O_RDONLY))
    try:
        fcntl.flock(HELD[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{flag} {folder}: in use by another process; wait for it, or give another folder") from None
    except OSError as error:  # some network file systems
        print(f"warning: {folder} cannot be locked ({error.strerror}); start no second run in it", file=sys.stderr)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, fsync, rename: at every moment `path` is the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_checkpoint(folder: Path, state: dict, name: str = "checkpoint.pt") -> None:
    """Atomically write `state` (tensors, numbers, strings, lists, dicts) and the run's arguments to the file `name`."""
    buffer = io.BytesIO()
    torch.save(state | {"args": (folder / "args.json").read_text(encoding="utf-8")}, buffer)
    write_atomically(folder / name, buffer.getvalue())


def load_checkpoint(folder: Path, name: str = "checkpoint.pt") -> dict | None:
    """What save_checkpoint wrote last, or None if the run was stopped before. InputError if one bit of it is not what was written,
    or if args.json is not what it was then."""
    path, refused = folder / name, f"--resume {folder}: {name}"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:  # torch does not look at the checksums
            if file.testzip():
                raise ValueError("checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise InputError(f"{refused} is damaged ({type(error).__name__}: {error}); start a new run") from None
    if state.pop("args", None) != (folder / "args.json").read_text(encoding="utf-8"):
        raise InputError(f"{refused} was made with another args.json; put that back, or start a new run")
    return state
