"""Inverse Noise Correction: better initial noise for a frozen flow, learnt from images without a reward.

Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.
Run: python inverse_noise_correction.py

Notation
    x_sigma = (1 - sigma) x + sigma eps, sigma from 1 (noise) to 0 (image)
    v(x, sigma) the frozen model's velocity, an estimate of eps - x
    1 = sigma_0 > ... > sigma_N = 0 the grid; T the sampler, N Euler steps on it
    Q the distribution of z = T^-1(image); w the standardised z; u(y, t) the corrector's velocity
Equations
    (1) T:     x_{k+1} = x_k + (sigma_{k+1} - sigma_k) v(x_k, sigma_k),  k = 0..N-1
    (2) T^-1:  for k = N-1..0 solve  x_k = g(x_k),  g(x) = x_{k+1} - (sigma_{k+1} - sigma_k) v(x, sigma_k),
        by iteration from x = x_{k+1}
    (3) corrector:  y_t = cos(pi t / 2) eps + sin(pi t / 2) w,  loss E |u(y_t, t) - dy_t / dt|^2
    (4) loss of the flow itself:  E |v(x_sigma, sigma) - (eps - x)|^2
    (5) Frechet distance:  |m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2)),
        m and S the mean and covariance of the images' features
    The losses (3) and (4) are means over the numbers of an image.
Sampling
    eps -> M Euler steps of u -> w -> z -> T -> image. T of the inverted noises is the images, up to the
    tolerance of (2), however imperfect v or small N. Images whose inversion fails are left out and counted.
Choices that the paper leaves open
    The interpolant in (3): the best u is E[dy_t / dt | y_t], which is 0 if w is N(0, I). The corrector starts
    at 0, so that an untrained one gives w = eps: the control "gaussian" (--normalise scale: "scale only").
    z is standardised by its mean and covariance, or by its scale alone where there are too few images
    (--normalise).
    The images get a little noise (--data_noise; the paper's is 1e-3), because flat images are hard to invert.
    It is less than T itself leaves where an image is flat: more makes the inverted noises larger there than
    elsewhere, and what the corrector confuses becomes grain (measured in docs/inverse_noise_correction.md).
    u = a + b y, where the network returns a and b. It is also told |y|^2, which its normalisation layers
    would hide: the norms of inverted noises spread less than a Gaussian's.
    Equation (2) is solved with Anderson acceleration (measured in docs/inverse_noise_correction.md).
    Of the averaged weights at each checkpoint, and the untrained network, those with the least held-out loss
    are kept.
Controls, a row of the table each
    The base with N steps, with as many as the corrected sampler's FLOPs buy, with 2 N and 4 N; the base
    trained on with the FLOPs of inversion and corrector; z = s eps, s the inverted noises' scale; a Gaussian
    with their mean and covariance; that Gaussian with its norms matched to theirs; other M.
"""

import copy
import importlib.util
import json
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs an older one is to read why it fails)
    print("error: Python 3.11 or newer is needed, this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import (
    ROOT,
    Device,
    Flow,
    check_device,
    check_flow,
    derived_seed,
    draw_noise,
    model_hash,
    predict_velocity,
)
from fashion.features import FILE, FeatureNet
from fashion.images import FOLDER, SHEETS, image_shape, reference_images, training_images
from utils.figures import Figure, keeps_the_run, save_figure
from utils.images import read_images
from utils.runs import (
    InputError,
    check_inputs,
    check_output,
    check_range,
    load_checkpoint,
    log_metrics,
    make_run_folder,
    run_script,
    save_checkpoint,
    write_atomically,
    write_json,
)

Normalise = Literal["auto", "scale", "gaussian"]
Features = Literal["auto", "fashion", "pixels", "inception"]
MOST_COVARIANCE = 4096  # numbers in an image; beyond, their covariance would be larger than any model here
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
GAUSSIAN_FILE = "gaussian.safetensors"  # in the corrector's folder


@dataclass
class Args:
    """Inverse Noise Correction: invert images through a flow, learn the distribution of their noises."""

    seed: int = 0  # seed of the training run; evaluation noises and reference images do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: Device = "auto"  # auto: CUDA or MPS if there is one; everything is computed in float32

    model: str = str(FOLDER)  # folder with unet/ or transformer/, and scheduler/ (FlowMatchEulerDiscrete)
    data: str = ""  # folder of images, or made by fashion.train; left out: Fashion-MNIST, 16 x 16
    data_noise: float = 0.005  # standard deviation of noise added to all images, so that all can be inverted
    reference_share: float = 0.5  # share of --data kept for the Frechet distance, never trained on

    steps: int = 8  # N, Euler steps of the sampler that is inverted and corrected
    grid_power: float = 1.0  # sigma_k = (1 - k / N)^power, before the scheduler's own shift; 1: even steps
    sample_batch: int = 250  # images inverted or sampled at a time

    images: int = 3000  # images to invert, at most
    tolerance: float = 1e-3  # a step has converged when its pixels change by less (root mean square)
    max_iterations: int = 200  # model calls per step of the inversion, at most
    memory: int = 2  # changes that Anderson acceleration combines; 0: the plain fixed-point iteration
    max_failed: float = 0.1  # stop if a larger share of the images does not converge

    corrector_network: str = "unet:16,32,32"  # see new_network
    corrector_steps: int = 4  # M, Euler steps of the corrector
    normalise: Normalise = "auto"  # of z; auto: gaussian if there are ten noises for each number of an image
    held_out: float = 0.1  # share of the inverted noises that choose the weights and are not trained on
    updates: int = 1800  # optimiser updates of the corrector
    batch: int = 128  # images per update
    lr: float = 1e-3  # AdamW learning rate of the corrector: warm-up, then cosine to 0
    checkpoint_every: int = 250  # updates between two checkpoints

    features: Features = "auto"  # auto: fashion without --data; else inception if it is installed, or pixels
    eval_images: int = 2000  # images per row of the table
    eval_steps: tuple[int, ...] = ()  # of the base, beside N; none: at equal FLOPs, 2N, 4N
    eval_corrector_steps: tuple[int, ...] = (2, 8)  # other M with which the corrector is shown
    longer: bool = True  # control: train the base on for as many FLOPs as inversion and corrector took
    longer_lr: float = 5e-4  # its learning rate

    def __post_init__(self):
        """InputError for a value out of range."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "data_noise", 0, 10)
        check_range(self, "reference_share", 0.05, 0.95)
        check_range(self, "steps", 2, 1000)
        check_range(self, "grid_power", 0.1, 10)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "images", 20, 10**7)
        check_range(self, "tolerance", 1e-7, 1)
        check_range(self, "max_iterations", 1, 10**9)
        check_range(self, "memory", 0, 20)
        check_range(self, "max_failed", 0, 1)
        check_range(self, "corrector_steps", 1, 10**9)
        check_range(self, "held_out", 0.01, 0.9)
        check_range(self, "updates", 1, 10**9)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_range(self, "checkpoint_every", 1, 10**9)
        check_range(self, "eval_images", 20, 10**6)
        check_range(self, "longer_lr", 1e-12, 1)
        for name in ("eval_steps", "eval_corrector_steps"):
            for steps in getattr(self, name):
                if not 1 <= steps <= 10**4:
                    raise InputError(f"--{name} {steps}: must be between 1 and {10**4}")


# ================================================================ equations: tensors in, tensors out


@torch.no_grad()
def euler_sample(velocity, noise, sigmas):
    """T, equation (1). velocity(x (batch, ...), sigma (batch,)); noise: (batch, ...); sigmas: (N + 1,) from 1
    to 0. Returns images (batch, ...)."""
    x = noise
    for now, after in zip(sigmas, sigmas[1:]):
        x = x + (after - now) * velocity(x, now.expand(len(x)))  # (1)
    return x


@dataclass
class Inversion:
    """The result of euler_invert."""

    noise: torch.Tensor  # (batch, ...) recovered noise; valid only where `converged`
    residual: torch.Tensor  # (batch,) root mean square of the last change of x in (2), in the worst step
    iterations: list  # (N,) model calls of the slowest sample in each step
    converged: torch.Tensor  # (batch,) bool
    # (N,) |change of the right side of (2)| / |change of x|: a sample's largest, median over the samples
    contraction: list
    calls: int  # model calls, summed over the samples


@torch.no_grad()
def euler_invert(velocity, x, sigmas, max_iterations, tolerance, memory=2):
    """T^-1, equation (2). x: (batch, ...); velocity and sigmas as in euler_sample. Returns an Inversion.

    Samples that have converged in a step, or failed in an earlier one, cost no model calls. memory: 0 is the
    plain iteration, which needs a contraction. Above 0 as many last changes are combined, for each sample by
    itself, which needs none (Anderson acceleration, doi 10.1137/10078356X).
    """
    shape, x = x.shape, x.flatten(1)  # (batch, d)
    residual = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    iterations, contraction, calls = [], [], 0
    for now, after in reversed(list(zip(sigmas, sigmas[1:]))):
        guess, slope = x.clone(), torch.full_like(residual, math.nan)
        change = torch.full_like(residual, math.inf)
        tried = active = (residual <= tolerance).nonzero().squeeze(1)  # (active,) indices
        count, history = 0, []
        while len(active) and count < max_iterations:
            old = guess[active]  # (active, d)
            v = velocity(old.unflatten(1, shape[1:]), now.expand(len(active))).flatten(1)
            new = x[active] - (after - now) * v  # (2)
            calls, count = calls + len(active), count + 1
            change[active] = (new - old).square().mean(1).sqrt()
            history = [*history, torch.stack([old, new])][-1 - max(memory, 1) :]  # each (2, active, d)
            moves = torch.stack(history).diff(dim=0)  # (moves, 2, active, d)
            if len(moves):
                length = moves[-1].norm(dim=2)  # (2, active)
                slope[active] = torch.fmax(slope[active], length[1] / length[0])
            guess[active] = new
            unfinished = (change[active] > tolerance) & change[active].isfinite()
            active, history = active[unfinished], [pair[:, unfinished] for pair in history]
            if memory and len(moves):
                guess[active] = anderson(new[unfinished], old[unfinished], moves[:, :, unfinished])
        residual[tried] = torch.maximum(residual[tried], change[tried])
        iterations.append(count)
        contraction.append(slope.nanmedian().item())
        x = guess
    converged = residual <= tolerance
    return Inversion(x.view(shape), residual, iterations[::-1], converged, contraction[::-1], calls)


def anderson(new, old, moves):
    """The next guess, (batch, d). new = g(old), both (batch, d); moves: (number, 2, batch, d), the last
    changes of old and of new. The combination that cancels most of new - old is subtracted from new."""
    change = (moves[:, 1] - moves[:, 0]).transpose(0, 1)  # (batch, number, d)
    gram = change @ change.mT
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(gram.dtype).tiny  # (batch,)
    gram = gram + ridge[:, None, None] * torch.eye(len(moves)).to(gram)
    weight = torch.linalg.solve(gram, change @ (new - old).unsqueeze(2))  # (batch, number, 1)
    return new - (moves[:, 1].transpose(0, 1) * weight).sum(1)


def interpolant(eps, w, t):
    """(y_t, dy_t / dt) of equation (3). eps, w: (batch, ...); t: (batch,) in [0, 1]."""
    angle = 0.5 * math.pi * t.view(-1, *[1] * (w.dim() - 1))  # (batch, 1, ...)
    y = angle.cos() * eps + angle.sin() * w
    return y, 0.5 * math.pi * (angle.cos() * w - angle.sin() * eps)


@torch.no_grad()
def correct(velocity, noise, steps):
    """M = steps Euler steps of dy / dt = velocity(y (batch, ...), t (batch,)) from t = 0 to 1:
    noise -> w, both (batch, ...)."""
    y = noise
    for m in range(steps):
        y = y + velocity(y, torch.full((len(y),), m / steps, dtype=y.dtype, device=y.device)) / steps
    return y


def gaussian_of(z):
    """The Gaussian with the mean and covariance of z (n, ...), d the numbers in one: {"mean": (d,), "root" of
    the covariance and its "inverse": (d, d), both symmetric}."""
    flat = z.flatten(1).cpu().double()  # (n, d); MPS has no float64
    values, vectors = torch.linalg.eigh(torch.cov(flat.T).reshape(flat.shape[1], -1))
    values = values.clamp(min=1e-6 * values.max().item()).sqrt()
    gaussian = {"mean": flat.mean(0)}
    gaussian |= {"root": vectors * values @ vectors.T, "inverse": vectors / values @ vectors.T}
    return {name: part.float().to(z.device) for name, part in gaussian.items()}


def match_norms(eps, norms):
    """eps (n, ...) from N(0, I), with its lengths changed so that they are distributed as `norms` (m,). Their
    order is kept. |eps|^2 is chi-squared."""
    length = eps.flatten(1).norm(dim=1)  # (n,)
    quantile = torch.special.gammainc(torch.tensor(eps[0].numel() / 2).to(length), length.square() / 2)
    return eps * (torch.quantile(norms, quantile) / length).view(-1, *[1] * (eps.dim() - 1))


def flow_loss(velocity, x, eps, sigma):
    """Equation (4), mean over everything. x, eps: (batch, ...); sigma: (batch,)."""
    level = sigma.view(-1, *[1] * (x.dim() - 1))  # (batch, 1, ...)
    x_sigma = (1 - level) * x + level * eps
    return (velocity(x_sigma, sigma) - (eps - x)).square().mean()


def frechet_distance(a, b):
    """Equation (5) of two sets of features (n, d) and (m, d), in float64."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T).reshape(a.shape[1], -1))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ torch.cov(b.T).reshape(root.shape) @ root
    cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()  # trace of the root
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross).item()


def noise_statistics(z):
    """Statistics that tell z (n, channels, height, width) from N(0, I)."""
    z = z.double()
    square = z.flatten(1).square().mean(1)  # (n,) 1 for N(0, I)
    centred = (z - z.mean(0)) / z.std(0)  # every pixel standardised
    energy = (centred.square() - 1) / centred.square().std()

    def neighbours(values, lag):
        across = values[..., lag:] * values[..., :-lag]
        down = values[..., lag:, :] * values[..., :-lag, :]
        return (0.5 * (across.mean() + down.mean())).item()

    return {
        "norm": square.sqrt().mean().item(),  # divided by the square root of the dimension
        "norm_spread": square.sqrt().std().item(),
        "mean": z.mean().item(),
        "variance": z.var(0).mean().item(),
        "kurtosis": (centred**4).mean().item(),  # 3 for any Gaussian
        "correlation_1": neighbours(centred, 1),  # of neighbours
        "correlation_2": neighbours(centred, 2),
        # of neighbours' squares; for a Gaussian the mean of the squared correlations of its pairs
        "energy_correlation_1": neighbours(energy, 1),
        "energy_correlation_2": neighbours(energy, 2),
    }


# ================================================================ networks


def new_network(spec, size, inputs, outputs, zero=False):
    """A stock network for size x size images, with `inputs` and `outputs` channels. zero: it returns 0 until
    it is trained.

    spec: "unet:24,48,48" is a UNet2DModel with these channels and no attention. "token:128,128,128" is a
    DiTTransformer2DModel for very small images: the whole image is one token of this width, with as many
    layers.
    """
    import diffusers

    kind, _, widths = spec.partition(":")
    widths = [int(width) for width in widths.split(",")]
    options = {"sample_size": size, "in_channels": inputs, "out_channels": outputs}
    if kind == "token":
        options |= {"patch_size": size, "num_layers": len(widths), "attention_head_dim": widths[0]}
        options |= {"num_attention_heads": 1, "num_embeds_ada_norm": 1, "norm_num_groups": 1}
        network = diffusers.DiTTransformer2DModel(**options)
    else:
        options |= {"down_block_types": ("DownBlock2D",) * len(widths), "block_out_channels": widths}
        options |= {"up_block_types": ("UpBlock2D",) * len(widths), "layers_per_block": 1}
        options |= {"norm_num_groups": math.gcd(8, *widths), "add_attention": False}
        network = diffusers.UNet2DModel(**options)
    if zero:
        for parameter in (network.proj_out_2 if kind == "token" else network.conv_out).parameters():
            torch.nn.init.zeros_(parameter)
    return network


def check_network(spec, size, flag):
    """InputError, naming `flag`, unless new_network can make this for size x size images."""
    kind, _, widths = spec.partition(":")
    widths = [int(width) if width.isdecimal() else 0 for width in widths.split(",")]
    if kind not in ("unet", "token") or any(not 4 <= width <= 4096 or width % 4 for width in widths):
        raise InputError(
            f"{flag} {spec}: give unet: or token: and numbers from 4 to 4096 that 4 divides, as in "
            "unet:32,64,64 or token:64,64"
        )
    if kind == "token" and len(set(widths)) > 1:
        raise InputError(f"{flag} {spec}: the layers of a token network have one width, as in token:64,64")
    if kind == "unet" and size % 2 ** (len(widths) - 1):
        divisor = 2 ** (len(widths) - 1)
        raise InputError(f"{flag} {spec}: {len(widths)} levels need a size that {divisor} divides")


def count_flops(function):
    """Floating-point operations of function(), by torch's counter,
    which knows attention only in its plain form."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Corrector:
    """eps -> z, equation (3). It belongs to one sampler T, named in `settings`; load() refuses any other.

    In use: corrector = Corrector.load(folder, network, scheduler)
            z = corrector(torch.randn(n, channels, height, width))
    """

    def __init__(self, network, settings, gaussian):
        """network: a stock one. C + 1 input channels, 2 C output channels. settings: what corrector.json
        holds. gaussian: of gaussian_of, or {}: then z is divided by settings["scale"]."""
        self.network, self.settings, self.gaussian = network, settings, gaussian

    def velocity(self, y, t):
        """u = a + b y. y: (batch, C, height, width); t: (batch,)."""
        square = y.square().mean((1, 2, 3), keepdim=True)  # (batch, 1, 1, 1), 1 on average
        norm = (square - 1) * (y[0].numel() / 2) ** 0.5  # |y|^2, standardised: mean 0, variance 1 for N(0, I)
        inputs = torch.cat([y, norm.expand_as(y[:, :1])], 1)  # (batch, C + 1, height, width)
        a, b = predict_velocity(self.network, inputs, 1000 * (1 - t)).chunk(2, 1)
        return a + b * y

    def standardise(self, z):
        """z -> w of equation (3), (n, ...)."""
        if not self.gaussian:
            return z / self.settings["scale"]
        return ((z.flatten(1) - self.gaussian["mean"]) @ self.gaussian["inverse"]).view_as(z)

    def destandardise(self, w):
        """w -> z, (n, ...)."""
        if not self.gaussian:
            return w * self.settings["scale"]
        return (self.gaussian["mean"] + w.flatten(1) @ self.gaussian["root"]).view_as(w)

    @torch.no_grad()
    def __call__(self, noise, steps=None):
        """noise (batch, C, height, width) from N(0, I) -> initial noise z for the sampler, same shape."""
        steps = steps or self.settings["corrector_steps"]
        return self.destandardise(correct(self.velocity, noise, steps))

    def save(self, folder):
        """Write the network, the Gaussian and corrector.json."""
        self.network.save_pretrained(folder)
        if self.gaussian:
            parts = {name: part.cpu() for name, part in self.gaussian.items()}
            write_atomically(folder / GAUSSIAN_FILE, safetensors.torch.save(parts))
        write_json(folder / "corrector.json", self.settings)

    @classmethod
    def load(cls, folder, network, scheduler):
        """The corrector in `folder`, for a flow's network and its scheduler, whose set_timesteps has been
        called. InputError if it was learnt for another network or grid."""
        from diffusers import AutoModel

        settings = read_settings(Path(folder), network, scheduler)
        device = str(next(network.parameters()).device)
        gaussian = {}
        if settings["normalise"] == "gaussian":
            gaussian = safetensors.torch.load_file(Path(folder) / GAUSSIAN_FILE, device)
        own_network = AutoModel.from_pretrained(str(folder)).to(device).requires_grad_(False)
        return cls(own_network, settings, gaussian)


def read_settings(folder, network, scheduler):
    """corrector.json of a corrector's folder. InputError if there is none, or if the corrector was learnt for
    another network, or for other levels than the scheduler's, whose set_timesteps has been called."""
    if not (folder / "corrector.json").is_file():
        raise InputError(f"{folder}: holds no corrector (no corrector.json)")
    settings = json.loads((folder / "corrector.json").read_text(encoding="utf-8"))
    if model_hash(network) != settings["model_hash"]:
        raise InputError(f"{folder}: this corrector was learnt for another model; learn one for this model")
    sigmas = scheduler.sigmas.tolist()
    timesteps = torch.tensor([sigma * scheduler.config.num_train_timesteps for sigma in sigmas[:-1]])
    if sigmas != settings["sigmas"] or not timesteps.allclose(torch.tensor(settings["timesteps"])):
        levels = sigmas_code(settings["steps"], settings["grid_power"])
        raise InputError(
            f"{folder}: this corrector was learnt for the {settings['steps']} steps in corrector.json, "
            f"the scheduler is set to {len(sigmas) - 1} others: call "
            f"scheduler.set_timesteps(sigmas={levels}) first"
        )
    return settings


def sigmas_code(steps, power):
    """Python source of the levels that Flow.grid gives to scheduler.set_timesteps(sigmas=...)."""
    return f"[(k / {steps}){'' if power == 1 else f' ** {power!r}'} for k in range({steps}, 0, -1)]"


# ================================================================ training


def fit(network, loss, updates, lr, key, state, every):
    """Train the network with AdamW on loss(generator) and average its weights. A generator function.

    After every `every` updates, and after the last, it yields the number of updates done. At a yield and at
    the end the network holds the averaged weights. `state` is the checkpoint. It is {} at first; with one
    that was stored at a yield, training continues from there. key: (seed, name). The draws of update i depend
    on key and i alone. InputError for a loss that is NaN or Inf.
    """
    parameters = list(network.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    average = [p.detach().clone() for p in parameters]
    done, losses = state.get("update", 0), state.setdefault("losses", [])
    if done:
        network.load_state_dict(state["weights"])
    if 0 < done < updates:
        optimizer.load_state_dict(state["optimizer"])
        average = [p.to(parameters[0].device) for p in state["average"]]
    for i in tqdm(range(done, updates), desc=key[-1], leave=False, mininterval=1):
        warm_up, cosine = min(1, (i + 1) / 100), 0.5 * (1 + math.cos(math.pi * i / updates))
        optimizer.param_groups[0]["lr"] = lr * warm_up * cosine
        value = loss(torch.Generator().manual_seed(derived_seed(*key, i)))
        if not value.isfinite():
            raise InputError(
                f"{key[-1]}, update {i + 1}: loss {value.item()}; lower the learning rate {lr:g}"
            )
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (i + 1) / (i + 10))  # of the running average; short at first
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        losses.append(value.item())
        if (i + 1) % every == 0 or i + 1 == updates:
            weights = copy.deepcopy(network.state_dict())
            torch._foreach_copy_([p.data for p in parameters], average)
            state.update(update=i + 1, average=average, optimizer=optimizer.state_dict())
            if i + 1 == updates:  # of a finished network only the averaged weights are needed
                weights = copy.deepcopy(network.state_dict())
                del state["average"], state["optimizer"]
            state["weights"] = weights
            yield i + 1
            network.load_state_dict(weights)
    network.eval().requires_grad_(False)


def update_flops(network, loss):
    """Floating-point operations of one loss(generator) and its gradient."""
    network.requires_grad_(True)
    flops = count_flops(lambda: loss(torch.Generator().manual_seed(0)).backward())
    network.zero_grad()
    return flops


def flow_objective(flow, images, batch):
    """Equation (4) as loss(generator) for fit, on `batch` of the images (n, *shape), sigma uniform."""

    def loss(generator):
        index = torch.randint(len(images), (batch,), generator=generator)
        x = images[index].to(flow.device)  # (batch, *shape)
        eps = torch.randn(x.shape, generator=generator).to(flow.device)
        sigma = torch.rand(batch, generator=generator).to(flow.device)  # (batch,)
        return flow_loss(flow.velocity, x, eps, sigma)

    return loss


def train_corrector(corrector, held_out, noises, args, state, save):
    """Fit equation (3) to `noises` (n, *shape). At the end the network has the averaged weights whose loss on
    the noises `held_out` (m, *shape) was least.

    `state` is the checkpoint, {} at first; save() stores it. Returns the floating-point operations.
    """
    network = corrector.network
    held_out, noises = corrector.standardise(held_out), corrector.standardise(noises)  # from here on w

    def loss(generator, w=None):
        if w is None:
            w = noises[torch.randint(len(noises), (args.batch,), generator=generator)]  # (batch, c, h, w)
        eps = torch.randn(w.shape, generator=generator).to(args.device)
        t = torch.rand(len(w), generator=generator).to(args.device)  # (batch,)
        y, target = interpolant(eps, w, t)
        return (corrector.velocity(y, t) - target).square().mean()  # (3)

    @torch.no_grad()
    def held_out_loss():
        generator = torch.Generator().manual_seed(derived_seed("held out"))
        # four draws of eps and t for each, not in parts of --sample_batch, on which no draw may depend
        parts = held_out.repeat(4, 1, 1, 1).split(500)
        return sum(loss(generator, part).item() * len(part) for part in parts) / (4 * len(held_out))

    if not state:
        state.update(best=held_out_loss(), final=copy.deepcopy(network.state_dict()))
        # identity: the loss of u = 0, of the control without a network
        first = {"update": 0, "loss": math.nan, "held_out": state["best"], "identity": state["best"]}
        state["rows"] = [first]
    flops = args.updates * update_flops(network, loss)
    key = (args.seed, "corrector")
    for update in fit(network, loss, args.updates, args.lr, key, state, args.checkpoint_every):
        value, recent = held_out_loss(), state["losses"][state["rows"][-1]["update"] :]
        if value < state["best"]:
            state.update(best=value, final=copy.deepcopy(network.state_dict()))
        row = {"update": update, "loss": sum(recent) / len(recent), "held_out": value}
        state["rows"].append(state["rows"][0] | row)
        save()
    network.load_state_dict(state["final"])
    return flops


# ================================================================ inversion of the images


def invert_images(flow, images, sigmas, args, folder):
    """Equation (2) for images (n, *shape); each batch is stored in folder/inversion. Returns (the noises of
    those that converged (m, *shape), report)."""
    (folder / "inversion").mkdir(exist_ok=True)
    batches, failed = [], 0
    for i in tqdm(
        range(0, len(images), args.sample_batch), desc="invert", unit="batch", leave=False, mininterval=1
    ):
        file = f"inversion/{i:06d}.pt"
        batch = load_checkpoint(folder, file)
        if not batch:  # a resumed run has stored some
            x = images[i : i + args.sample_batch].to(args.device)  # (batch, c, h, w)
            inversion = euler_invert(
                flow.velocity, x, sigmas, args.max_iterations, args.tolerance, args.memory
            )
            z = inversion.noise[inversion.converged]  # (converged, c, h, w)
            error = euler_sample(flow.velocity, z, sigmas) - x[inversion.converged]  # T(z) - x
            batch = {"noise": z, "error": error.square().flatten(1).mean(1).sqrt()}
            batch["residual"] = inversion.residual[inversion.converged]
            batch["iterations"] = torch.tensor(inversion.iterations)
            batch["contraction"] = torch.tensor(inversion.contraction)
            batch["counts"] = torch.tensor([len(x), inversion.calls])
            batch = {name: value.cpu().contiguous() for name, value in batch.items()}
            save_checkpoint(folder, batch, file)
        batches.append(batch)
        failed += batch["counts"][0].item() - len(batch["noise"])
        check_inverted(batches, failed, args.max_failed * len(images))
    return torch.cat([batch["noise"] for batch in batches]), inversion_report(batches)


def check_inverted(batches, failed, most):
    """InputError if more than `most` images failed, of the batches of invert_images so far."""
    if failed > most:
        tried = sum(batch["counts"][0].item() for batch in batches)
        contraction = torch.stack([batch["contraction"] for batch in batches]).nanmean(0)
        contraction = ", ".join(f"{c:.2f}" for c in contraction)
        raise InputError(
            f"{failed} of the first {tried} images could not be inverted (median contraction of the steps "
            f"{contraction}; the smaller the better, with --memory 0 below 1): use more --steps, more "
            "--data_noise, a --grid_power above 1 or more --max_iterations"
        )


def inversion_report(batches):
    """What results.json says of the batches of invert_images. InputError if too few images were inverted."""
    images, calls = (sum(batch["counts"][i].item() for batch in batches) for i in (0, 1))
    inverted = sum(len(batch["noise"]) for batch in batches)
    if inverted < 20:
        raise InputError(f"only {inverted} images could be inverted: give more")
    error, residual = (torch.cat([batch[name] for batch in batches]) for name in ("error", "residual"))
    by_batch = {name: [batch[name] for batch in batches] for name in ("iterations", "contraction")}
    iterations, contraction = (torch.stack(values).double() for values in by_batch.values())  # (batches, N)
    return {
        "images": images,
        "left_out": images - inverted,
        "calls": calls,
        "largest_residual": residual.max().item(),
        "round_trip_error": error.mean().item(),
        "largest_round_trip_error": error.max().item(),
        "iterations": iterations.mean(0).tolist(),
        "contraction": contraction.nanmean(0).tolist(),
    }


# ================================================================ evaluation


def frechet_features(name, device, batch, file=FILE):
    """A function: images (n, channels, height, width) in [-1, 1] -> features (n, d), a batch at a time.

    name: "fashion", 64 of the network in the file, which tells the classes of Fashion-MNIST; "pixels", means
    over the fields of an 8 x 8 grid; "inception", the 2048 of the standard FID, from the package
    torch-fidelity.
    """
    if name == "fashion":
        network = FeatureNet.load(file).to(device)
    elif name == "pixels":

        def network(x):
            return F.adaptive_avg_pool2d(x, min(8, x.shape[-1])).flatten(1)
    else:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()

        def network(x):
            levels = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            return inception(levels.expand(-1, 3, -1, -1))[0]

    @torch.no_grad()
    def features(images):
        return torch.cat([network(part.to(device)).float().cpu() for part in images.split(batch)])

    return features


def sample_images(flow, initial_noise, sigmas, args):
    """(--eval_images images (n, *shape) from initial_noise(eps), eps of fixed seeds; seconds of an image)."""
    images, seconds = [], 0.0
    seeds = [derived_seed("eval", number) for number in range(args.eval_images)]
    for i in range(0, len(seeds), args.sample_batch):
        eps = draw_noise(seeds[i : i + args.sample_batch], 0, flow.shape, torch.float32)[0].to(args.device)
        start = time.perf_counter()
        images.append(euler_sample(flow.velocity, initial_noise(eps), sigmas).cpu())
        seconds += time.perf_counter() - start
    return torch.cat(images), seconds / len(seeds)


def evaluate(flow, initial_noise, sigmas, reference, features, args):
    """The Frechet distance of sample_images from the reference: features (n, d).
    Returns {"fd", equation (5); "flops" and "seconds" of an image; "images": the first eight}."""
    images, seconds = sample_images(flow, initial_noise, sigmas, args)
    fd = frechet_distance(reference, features(images)) if images.isfinite().all() else math.nan
    eps = torch.zeros(1, *flow.shape).to(args.device)
    flops = count_flops(lambda: euler_sample(flow.velocity, initial_noise(eps), sigmas))
    return {"fd": fd, "flops": flops, "seconds": seconds, "images": images[:8].clone()}


# ================================================================ the images of a run


def fashion_folder(data):
    """The folder of the sheets of images and the feature network of a run: fashion/ itself for "", `data` if
    fashion.train made it, None if that is a folder of image files."""
    folder = Path(data) if data else FOLDER
    return folder if all((folder / name).is_file() for name in (*SHEETS, FILE.name)) else None


def find_enough_images(data, reference_share):
    """The image files in the folder `data` and its subfolders, sorted; [] for "". Hidden files and the
    folders of runs are left out; other files are counted in one line. InputError if there is no such folder,
    or if the images are too few to split."""
    if not data:
        return []
    if not Path(data).is_dir():
        raise InputError(f"--data {data}: no such folder")
    inside = {file.relative_to(data): file for file in sorted(Path(data).rglob("*")) if file.is_file()}
    of_runs = {name.parent for name in inside if name.name == "args.json"} - {Path()}
    found = [
        file
        for name, file in inside.items()
        if not of_runs & set(name.parents) and not any(part.startswith(".") for part in name.parts)
    ]
    files = [file for file in found if file.suffix.lower() in IMAGE_ENDINGS]
    endings = (file.suffix.lower() for file in found)
    others = Counter(ending or "without ending" for ending in endings if ending not in IMAGE_ENDINGS)
    counts = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
    passed_over = f"{others.total()} files are passed over ({counts}); read are {' '.join(IMAGE_ENDINGS)}"
    reference = round(reference_share * len(files))
    if min(reference, len(files) - reference) < 20:
        raise InputError(
            f"--data {data}: {len(files)} images are too few, 20 to invert and 20 as reference are needed"
            + f"; {passed_over}" * bool(others)
        )
    if others:
        print(f"warning: --data {data}: {passed_over}", file=sys.stderr)
    return files


def split_images(images, reference_share):
    """(reference images, the others) of images (n, *shape), always the same ones."""
    generator = torch.Generator().manual_seed(derived_seed("split"))
    images = images[torch.randperm(len(images), generator=generator)]
    count = round(reference_share * len(images))
    return images[:count], images[count:]


def add_data_noise(images, std, name):
    """Images (n, *shape) plus noise of that standard deviation, always the same. name: key of load_images."""
    generator = torch.Generator().manual_seed(derived_seed("data noise", name))
    return images + std * torch.randn(images.shape, generator=generator)


def load_images(args, shape, files):
    """The images of a run, from the files or of fashion_folder, each (n, *shape), about [-1, 1].

    Returns {"invert": to learn the noises of, "reference": for the Frechet distance, "floor": their distance
    from the reference is that of as many perfect samples, "train": to train the base on}. "reference" has no
    image in common with the others. "floor" may hold fewer than --eval_images: then its distance is larger
    than that of --eval_images perfect samples.
    """
    if files:
        reference, others = split_images(read_images(files, shape), args.reference_share)
    else:
        sheets = fashion_folder(args.data)
        reference, others = reference_images(sheets), training_images(sheets)
    images = {"reference": reference, "train": others}
    images |= {"invert": others[: args.images], "floor": others[-args.eval_images :]}
    return {name: add_data_noise(x, args.data_noise, name) for name, x in images.items()}


def check_images(args, shape):
    """InputError if the images, the features or a covariance do not suit a model of images of that shape."""
    if shape[0] not in (1, 3):
        raise InputError(f"--model {args.model}: {shape[0]} channels: must be 1 (grey) or 3 (RGB)")
    d = math.prod(shape)
    if args.normalise == "gaussian" and d > MOST_COVARIANCE:
        raise InputError(
            f"--normalise gaussian: {d} numbers in an image are too many, {MOST_COVARIANCE} at most; take "
            "scale"
        )
    sheets = fashion_folder(args.data)
    judged = image_shape(sheets or FOLDER)  # of the images of Fashion-MNIST and their judge
    if sheets and shape != judged:
        raise InputError(
            f"--data {sheets}: its images are {judged}, the model's {shape}; give a folder of images"
        )
    if args.features == "fashion" and shape != judged:
        raise InputError(
            f"--features fashion: judges images of shape {judged} only, not {shape}; use pixels or inception"
        )
    if args.features == "inception" and not importlib.util.find_spec("torch_fidelity"):
        raise InputError(
            "--features inception: needs the package torch-fidelity (pip install torch-fidelity), or use "
            "pixels"
        )


# ================================================================ what a run prints and draws


def describe(args, flow, network, images, folder):
    """The checked, derived settings, printed before the run. network: the corrector's."""
    size, corrector_size = (sum(p.numel() for p in part.parameters()) for part in (flow.network, network))
    return f"""Inverse Noise Correction -> {folder}
  model      {args.model}: {type(flow.network).__name__}, {size:,} parameters, images {tuple(flow.shape)}, \
float32 on {args.device}
  sampler    Euler, {args.steps} steps, grid power {args.grid_power:g}
  inversion  {len(images["invert"])} images, data noise {args.data_noise:g}, tolerance {args.tolerance:g}, \
at most {args.max_iterations} iterations a step
  corrector  {corrector_size:,} parameters, {args.corrector_steps} steps, {args.updates} updates x \
{args.batch}, lr {args.lr:g}
  evaluation {args.eval_images} images a row against {len(images["reference"])}, Frechet distance on the \
features {args.features!r}"""


def print_inversion(report):
    """One line on what inversion_report returned."""
    contraction = ", ".join(f"{c:.2f}" for c in report["contraction"])
    left_out = f"{report['left_out']} of {report['images']} left out"
    error = f"|T(z) - x| {report['round_trip_error']:.1e}, median contraction {contraction}"
    print(f"  inverted   {left_out}, {report['calls']} model calls, {error}", flush=True)


def print_results(results):
    """The tables of results.json: Frechet distances, statistics of the noises."""
    print(f"\n{'':<26}{'steps':>6}{'MFLOP':>11}{'ms':>8}{'Frechet distance':>18}")
    for row, seconds in zip(results["table"], results["seconds"]["per_image"]):
        cost = f"{row['steps']:>6}{row['flops'] / 1e6:>11.1f}{1e3 * seconds:>8.2f}"
        print(f"{row['arm']:<26}{cost}{row['fd']:>18.4f}")
    label = f"data against data, {results['floor_images']} images"
    print(f"{label:<51}{results['floor']:>18.4f}")
    print("(MFLOP and ms: of one image)\n")
    print(f"{'noise':<24}" + "".join(f"{name:>12}" for name in results["noise"]))
    for name in results["noise"]["inverted"]:
        values = (statistics[name] for statistics in results["noise"].values())
        print(f"{name:<24}" + "".join(f"{value:>12.3f}" for value in values))


@keeps_the_run
def save_noise_figure(path, noises, statistics):
    """Distributions of {name: noises (n, channels, height, width)}; right: the deviation of the first by
    pixel. statistics: {name: noise_statistics of the noises}."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    norms, values, lags, deviation = figure.subplots(1, 4)
    for name, z in noises.items():
        norm = z.flatten(1).square().mean(1).sqrt()  # (n,)
        norms.hist(norm.numpy(), 40, histtype="step", density=True, label=name)
        value_bins = np.linspace(-6, 6, 61)
        values.hist(z.flatten()[:100_000].numpy(), value_bins, histtype="step", density=True, label=name)
        correlation = [statistics[name][f"correlation_{lag}"] for lag in (1, 2)]
        lags.plot((1, 2), correlation, "o-", label=name)
    norms.set(xlabel="norm / sqrt(dimension)", ylabel="density")
    values.set(xlabel="value", ylabel="density", yscale="log")
    lags.set(xlabel="distance in pixels", ylabel="correlation", xticks=(1, 2))
    norms.legend(fontsize=7)
    first, z = next(iter(noises.items()))
    by_pixel = deviation.imshow(z.std(0).mean(0).numpy())
    figure.colorbar(by_pixel, ax=deviation, label=f"deviation of {first} noise by pixel")
    save_figure(figure, path)


@keeps_the_run
def save_frechet_curve(path, rows, floor):
    """Frechet distance against operations an image, a line for each arm of the table's rows;
    floor: of data against data."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axis, lines = figure.subplots(), {}
    for row in rows:
        lines.setdefault(row["arm"], []).append((row["flops"] / 1e6, row["fd"]))
    for name, points in lines.items():
        style = "o-" if name.startswith("base") else "s"
        axis.plot(*zip(*points), style, markersize=4, linewidth=1, label=name)
    axis.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label="data against data")
    axis.set(xscale="log", yscale="log", xlabel="MFLOP per image", ylabel="Frechet distance")
    figure.legend(loc="outside right upper", fontsize=7)
    save_figure(figure, path)


@keeps_the_run
def save_strips(path, strips):
    """{title: images (n, channels, height, width) in [-1, 1]}, a row of the figure each."""
    figure = Figure(figsize=(1.2 * max(map(len, strips.values())), 1.4 * len(strips)))
    for axis, (title, images) in zip(figure.subplots(len(strips), 1), strips.items()):
        framed = F.pad(images.clamp(-1, 1), (1, 1, 1, 1), value=1.0)  # (n, c, h, w) with a white frame
        strip = framed.permute(1, 2, 0, 3).flatten(2)  # (c, h, n w)
        axis.imshow(((strip + 1) / 2).permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_axis_off()
    save_figure(figure, path)


def usage_code(args, flow, folder):
    """Python that makes the evaluation's first image with the corrector in `folder`, in stock diffusers."""
    network_class = type(flow.network).__name__
    part, call = "unet", "network(x, t)"
    if network_class == "DiTTransformer2DModel":
        no_class = f"torch.tensor([{flow.network.config.num_embeds_ada_norm}], device=device)"
        part, call = "transformer", f"network(x, t.expand(1), {no_class})"
    shape = ", ".join(map(str, flow.shape))
    return f"""import sys, torch; from diffusers import FlowMatchEulerDiscreteScheduler, {network_class}
from PIL import Image
sys.path.insert(0, {str(ROOT)!r}); from inverse_noise_correction import Corrector
device, model = {args.device!r}, {str(Path(args.model).resolve())!r}
network = {network_class}.from_pretrained(model, subfolder={part!r}).to(device)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
scheduler.set_timesteps(sigmas={sigmas_code(args.steps, args.grid_power)}, device=device)
# refuses another model or grid
corrector = Corrector.load({str(folder.resolve())!r}, network, scheduler)
generator = torch.Generator().manual_seed({derived_seed("eval", 0)})
x = corrector(torch.randn(1, {shape}, generator=generator).to(device))
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step({call}.sample, t, x).prev_sample
pixels = ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu()
Image.fromarray(pixels.squeeze(2).numpy()).save("corrected.png")"""


# ================================================================ the run


def prepare(args):
    """Check all that needs no model and resolve "auto". Returns (shape of an image, files of --data, hashes
    of what the run reads)."""
    check_output(args.output, args.resume)
    args.device = check_device(args.device, "float32")
    sheets = fashion_folder(args.data)
    if args.features == "auto":
        standard = "inception" if importlib.util.find_spec("torch_fidelity") else "pixels"
        args.features = "fashion" if sheets else standard
    shape = check_flow(args.model)
    check_network(args.corrector_network, shape[1], "--corrector_network")
    check_images(args, shape)
    files = [] if sheets else find_enough_images(args.data, args.reference_share)
    read = [sheets / name for name in (*SHEETS, FILE.name)] if args.data and sheets else files
    return shape, files, check_inputs(args.resume, [args.model, *read])


def main(args):
    shape, files, inputs = prepare(args)
    images = load_images(args, shape, files)
    judge = (fashion_folder(args.data) or FOLDER) / FILE.name
    features = frechet_features(args.features, args.device, args.sample_batch, judge)
    flow = Flow.load(args.model, args.device)
    sigmas = flow.grid(args.steps, args.grid_power)  # (N + 1,)
    folder = make_run_folder(args, "inverse_noise_correction", args.model, args.seed, inputs)
    state = load_checkpoint(folder) if args.resume else None
    state = state or {"corrector": {}, "longer": {}, "rows": [], "seconds": 0.0}
    run_start = time.perf_counter() - state["seconds"]

    def save():
        state["seconds"] = time.perf_counter() - run_start
        save_checkpoint(folder, state)

    torch.manual_seed(args.seed)
    network = new_network(args.corrector_network, shape[1], shape[0] + 1, 2 * shape[0], zero=True)
    network = network.to(args.device)
    print(describe(args, flow, network, images, folder), flush=True)

    # ------------------------------------------------------------ INVERT
    single_image = torch.zeros(1, *shape).to(args.device)  # to count operations
    call_flops = count_flops(lambda: flow.velocity(single_image, sigmas[:1]))  # of a model call
    inverted, report = invert_images(flow, images["invert"], sigmas, args, folder)  # (n, *shape)
    report["flops"] = report["calls"] * call_flops
    print_inversion(report)

    # ------------------------------------------------------------ CORRECT
    count = max(10, round(args.held_out * len(inverted)))
    held_out, noises = inverted[:count].to(args.device), inverted[count:].to(args.device)
    scale = noises.square().mean().sqrt().item()
    gaussian = gaussian_of(noises) if math.prod(shape) <= MOST_COVARIANCE else {}
    normalise = args.normalise
    if normalise == "auto":
        enough = gaussian and len(noises) >= 10 * math.prod(shape)  # for a covariance
        normalise = "gaussian" if enough else "scale"
    settings = {  # a corrector belongs to this model and grid
        "model_hash": model_hash(flow.network),
        "steps": args.steps,
        "grid_power": args.grid_power,
        "sigmas": sigmas.tolist(),
        "timesteps": flow.scheduler.timesteps.tolist(),
        "scale": scale,
        "corrector_steps": args.corrector_steps,
        "normalise": normalise,
    }
    corrector = Corrector(network, settings, gaussian if normalise == "gaussian" else {})
    training = state["corrector"]

    def log_and_save():
        log_metrics(folder, training["rows"], training["update"], time.perf_counter() - run_start)
        save()

    flops = train_corrector(corrector, held_out, noises, args, training, log_and_save)
    training_flops = {"inversion": report["flops"], "corrector": flops}
    corrector.save(folder / "corrector")
    best, identity = training["best"], training["rows"][0]["held_out"]
    print(f"  corrector  held-out loss {best:.4f}, {identity:.4f} with velocity 0", flush=True)

    # ------------------------------------------------------------ TRAIN THE BASE ON (control)
    if args.longer:
        longer = Flow(copy.deepcopy(flow.network), flow.scheduler, args.device)
        loss, key = flow_objective(longer, images["train"], args.batch), (args.seed, "longer")
        updates = max(1, round(sum(training_flops.values()) / update_flops(longer.network, loss)))
        every, lr = args.checkpoint_every, args.longer_lr
        for _ in fit(longer.network, loss, updates, lr, key, state["longer"], every):
            save()
        cost = "as many FLOPs as inversion and corrector took"
        print(f"  control    base trained on for {updates} updates, {cost}", flush=True)

    # ------------------------------------------------------------ EVALUATE
    reference = features(images["reference"])  # (n, d)
    floor = frechet_distance(reference, features(images["floor"]))
    corrected_flops = count_flops(lambda: euler_sample(flow.velocity, corrector(single_image), sigmas))
    n, matched = args.steps, math.ceil(corrected_flops / call_flops)  # steps of the base at equal FLOPs
    base_steps = sorted({n, *(args.eval_steps or (matched, 2 * n, 4 * n))})
    initial_noises = {"scale only": lambda eps: scale * eps}  # {arm: function eps -> z}
    if gaussian:
        control = Corrector(None, settings, gaussian)  # only standardises: it has no network
        norms = control.standardise(noises).flatten(1).norm(dim=1)  # (n,)
        initial_noises["gaussian"] = control.destandardise
        initial_noises["gaussian, norms matched"] = lambda eps: control.destandardise(match_norms(eps, norms))
    initial_noises["corrector"] = corrector
    for m in args.eval_corrector_steps:
        initial_noises[f"corrector, M = {m}"] = lambda eps, m=m: corrector(eps, m)
    # (arm, flow, steps, grid power, function eps -> z). The base has --grid_power at N steps, else even
    # steps; the base trained on always has --grid_power.
    arms = [("base", flow, k, args.grid_power if k == n else 1.0, torch.clone) for k in base_steps]
    if args.longer:
        arms += [("base trained on", longer, k, args.grid_power, torch.clone) for k in sorted({n, matched})]
    arms += [(name, flow, n, args.grid_power, noise) for name, noise in initial_noises.items()]
    for name, sampler, k, power, noise in arms[len(state["rows"]) :]:  # a stopped run has the first rows
        row = evaluate(sampler, noise, sampler.grid(k, power), reference, features, args)
        state["rows"].append({"arm": name, "steps": k} | row)
        save()

    # ------------------------------------------------------------ SHOW
    seeds = [derived_seed("statistics", i) for i in range(len(inverted))]
    eps = draw_noise(seeds, 0, shape, torch.float32)[0]  # (n, *shape)
    shown = {"inverted": inverted, "standard": eps}
    for name in ("gaussian", "corrector"):
        if name in initial_noises:
            parts = eps.to(args.device).split(args.sample_batch)
            shown[name] = torch.cat([initial_noises[name](part).cpu() for part in parts])
    save()
    results = {
        "table": [{key: row[key] for key in ("arm", "steps", "fd", "flops")} for row in state["rows"]],
        "floor": floor,
        "floor_images": len(images["floor"]),
        "steps": n,
        "matched_steps": matched,
        "inversion": report,
        "scale": scale,
        "training_flops": training_flops,
        "seconds": {"total": state["seconds"], "per_image": [row["seconds"] for row in state["rows"]]},
        "corrector": {"held_out": best, "identity": identity, "flops": corrected_flops - n * call_flops},
        "noise": {name: noise_statistics(z) for name, z in shown.items()},
    }
    write_json(folder / "results.json", results)
    save_frechet_curve(folder / "curve.png", results["table"], floor)
    save_noise_figure(folder / "noise.png", shown, results["noise"])
    strips = {"data": images["floor"][:8]}
    for row in state["rows"]:
        if row["arm"] in ("base", "scale only", "gaussian", "corrector"):
            strips[f"{row['arm']}, {row['steps']} steps"] = row["images"]
    strips |= {f"noise: {name}": z[:8] / 3 for name, z in shown.items()}
    save_strips(folder / "grid.png", strips)
    print_results(results)
    written = "corrector/, results.json, metrics.csv, curve.png, grid.png, noise.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {written}. To use the corrector:\n")
    print(usage_code(args, flow, folder / "corrector"))


if __name__ == "__main__":
    run_script(main, Args)
