"""Inverse Noise Correction: better initial noise for a frozen flow model, learnt from pictures alone, without a reward.
Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.   Run: python inverse_noise_correction.py

Notation  x_sigma = (1 - sigma) x + sigma eps, sigma from 1 (noise) to 0 (picture); the frozen model's velocity v(x, sigma) estimates
          eps - x; 1 = sigma_0 > ... > sigma_N = 0 the grid; T the sampler with these N steps; Q the law of z = T^-1(picture).
Equations (1) T:     x_{k+1} = x_k + (sigma_{k+1} - sigma_k) v(x_k, sigma_k),  k = 0..N-1
          (2) T^-1:  for k = N-1..0 iterate  x <- x_{k+1} - (sigma_{k+1} - sigma_k) v(x, sigma_k)  until x stands still: that is x_k
          (3) corrector u: y_t = cos(pi t / 2) eps + sin(pi t / 2) w, loss E |u(y_t, t) - dy_t / dt|^2, w the standardised z; the
              exact u is 0 if Q is Gaussian, so that a network which starts at 0 starts as the Gaussian control
Sampling  eps -> M Euler steps of u -> w -> z -> T -> picture: T of Q is the law of the pictures, whatever v and N are.
Choices that the paper leaves open: the interpolant (3); z is standardised by its mean and covariance, or by its deviation alone where
there are too few pictures for a covariance (--normalise); u = a + b y with a and b from the network, which is also told |y|, because its
normalisation layers would hide it and inverted noises differ from a Gaussian in their norm first of all; equation (2) is solved with
Anderson acceleration (a fifth fewer calls, and it converges where the plain iteration does not); the averaged weights with the best
held-out loss are kept.
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
from common import ROOT, Flow, InputError, count_flops, derived_seed
from rewards import frechet_distance, frechet_features
from shapes import flow_data

AT_LEAST_ONE = "steps max_iterations sample_batch corrector_steps batch checkpoint_every size channels base_updates".split()
CHOICES = {"features": ("shapes", "pixels", "inception"), "normalise": ("", "scale", "gaussian")}
SHOWN = 8  # pictures of every kind in grid.png


@dataclass
class Args:
    """Inverse Noise Correction: invert pictures through a flow model and learn the law of their noises."""

    seed: int = 0  # seed of the training run; evaluation noises and reference pictures do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: str = "auto"  # auto (CUDA if there is one), cpu or cuda; everything is computed in float32

    model: str = str(ROOT / "shapes" / "flow")  # folder with unet/ or transformer/, and scheduler/ (FlowMatchEulerDiscrete)
    data: str = ""  # folder of pictures; left out: the embedded world of shapes
    data_noise: float = 0.0  # standard deviation of noise added to every picture, values in [-1, 1]; helps the inversion
    reference_share: float = 0.5  # share of --data kept for the Frechet distance, never trained on

    train_base: bool = False  # first train a flow on the pictures; --model is then not used
    size: int = 16  # --train_base: pixels of a side
    channels: int = 1  # --train_base: 1 grey, 3 RGB
    base_network: str = "unet:32,64,64"  # --train_base: see common.new_network
    base_updates: int = 8000  # --train_base: optimiser updates
    base_lr: float = 1e-3  # --train_base: AdamW learning rate

    steps: int = 6  # N, Euler steps of the sampler that is inverted and corrected
    grid_power: float = 1.0  # sigma_k = (1 - k / N)^power, before the scheduler's own shift; 1: even steps
    sample_batch: int = 500  # pictures inverted or sampled at a time

    pictures: int = 20_000  # pictures to invert, at most
    tolerance: float = 1e-3  # a step of the inversion has converged when its pixels change by less (root mean square)
    max_iterations: int = 60  # model calls per step of the inversion, at most
    memory: int = 2  # changes that Anderson acceleration combines; 0: the plain fixed-point iteration
    max_failed: float = 0.1  # stop if a larger share of the pictures does not converge

    corrector_network: str = "token:64,64"  # see common.new_network; for pictures above 8 x 8 such as "unet:16,32,32"
    corrector_steps: int = 4  # M, Euler steps of the corrector
    normalise: str = ""  # gaussian or scale; left out: gaussian if there are ten noises for each number of a picture
    held_out: float = 0.1  # share of the inverted noises that choose the weights and are not trained on
    updates: int = 4000  # optimiser updates of the corrector
    batch: int = 256  # pictures per update, also of the base
    lr: float = 1e-3  # AdamW learning rate of the corrector, warm-up, then cosine to 0
    checkpoint_every: int = 250  # updates between two checkpoints

    features: str = ""  # shapes (embedded pictures), pixels (means over 8 x 8 fields) or inception (needs torch-fidelity)
    eval_pictures: int = 4000  # pictures per row of the table
    eval_steps: str = ""  # steps of the base alone; left out: N, as many as the corrected sampler's FLOPs buy, 2N, 4N
    eval_powers: str = "0.7,1.4"  # other grids on which the base is shown, with as many steps as the corrected FLOPs buy
    eval_corrector_steps: str = "2,8"  # other M with which the corrector is shown
    longer: bool = True  # control: train the base on for as many FLOPs as inversion and corrector took
    longer_lr: float = 5e-4  # its learning rate


# ================================================================ equations: tensors in, tensors out


@torch.no_grad()
def euler_sample(velocity, noise, sigmas):
    """T, equation (1). velocity(x (batch, ...), sigma (batch,)); noise (batch, ...); sigmas (N + 1,) from 1 to 0 -> (batch, ...)."""
    x = noise
    for now, after in zip(sigmas, sigmas[1:]):
        x = x + (after - now) * velocity(x, now.expand(len(x)))
    return x


@dataclass
class Inversion:
    """What euler_invert found."""

    noise: torch.Tensor  # (batch, ...); without meaning where not converged
    residual: (
        torch.Tensor
    )  # (batch,) root mean square of x_{k+1} - (sigma_{k+1} - sigma_k) v(x, sigma_k) - x, the worst step's
    iterations: list  # (N,) model calls of the slowest sample in each step
    converged: torch.Tensor  # (batch,) bool
    contraction: list  # (N,) |change of the right side of (2)| / |change of x|, a sample's largest, median over the samples
    calls: int  # model calls, summed over the samples


@torch.no_grad()
def euler_invert(velocity, x, sigmas, max_iterations, tolerance, memory=2):
    """T^-1, equation (2). x: (batch, ...), sigmas as in euler_sample -> Inversion. Only samples that have neither converged in
    the step nor failed in an earlier one cost model calls. memory: 0 is the plain iteration, which needs a contraction; above 0
    the last changes are combined (Anderson acceleration, doi 10.1137/10078356X, each sample by itself), which does not."""
    shape, x = x.shape, x.flatten(1)  # (batch, d)
    residual = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    iterations, contraction, calls = [], [], 0
    for now, after in reversed(list(zip(sigmas, sigmas[1:]))):
        guess, slope, change = x.clone(), torch.full_like(residual, math.nan), torch.full_like(residual, math.inf)
        tried = active = (residual <= tolerance).nonzero().squeeze(1)  # (active,) indices
        count, history = 0, []
        while len(active) and count < max_iterations:
            old = guess[active]
            v = velocity(old.unflatten(1, shape[1:]), now.expand(len(active))).flatten(1)
            new = x[active] - (after - now) * v
            calls, count = calls + len(active), count + 1
            change[active] = (new - old).square().mean(1).sqrt()
            history = [*history, torch.stack([old, new])][-1 - max(memory, 1) :]  # each (2, active, d)
            moves = torch.stack(history).diff(dim=0)  # (moves, 2, active, d)
            if len(moves):
                length = moves[-1].norm(dim=2)
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
    return Inversion(x.view(shape), residual, iterations[::-1], residual <= tolerance, contraction[::-1], calls)


def anderson(new, old, moves):
    """The next guess: new = g(old) minus the combination of the last moves that cancels most of new - old. new, old: (batch, d),
    moves: (number, 2, batch, d), the last changes of old and of new."""
    change = (moves[:, 1] - moves[:, 0]).transpose(0, 1)  # (batch, number, d)
    gram = change @ change.mT
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(gram.dtype).tiny  # (batch,)
    gram = gram + ridge[:, None, None] * torch.eye(len(moves)).to(gram)
    weight = torch.linalg.solve(gram, change @ (new - old).unsqueeze(2))  # (batch, number, 1)
    return new - (moves[:, 1].transpose(0, 1) * weight).sum(1)


def interpolant(eps, z, t):
    """(y_t, dy_t / dt) of equation (3). eps, z: (batch, ...), t: (batch,) in [0, 1]; z has been divided by s."""
    angle = 0.5 * math.pi * t.view(-1, *[1] * (z.dim() - 1))
    return angle.cos() * eps + angle.sin() * z, 0.5 * math.pi * (angle.cos() * z - angle.sin() * eps)


@torch.no_grad()
def correct(velocity, noise, steps):
    """M = steps Euler steps of dy / dt = velocity(y (batch, ...), t (batch,)) from t = 0 to 1 -> (batch, ...)."""
    y = noise
    for m in range(steps):
        y = y + velocity(y, torch.full((len(y),), m / steps, dtype=y.dtype, device=y.device)) / steps
    return y


def gaussian_of(z):
    """Mean (d,), symmetric root of the covariance and its inverse (d, d) of z (n, ...), d the numbers in one."""
    flat = z.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T).reshape(flat.shape[1], -1))
    values = values.clamp(min=1e-6 * values.max().item()).sqrt()
    return [part.float() for part in (flat.mean(0), vectors * values @ vectors.T, vectors / values @ vectors.T)]


def match_norms(eps, norms):
    """eps (n, ...) from N(0, I) with its lengths moved to the law of `norms` (m,), order kept: |eps|^2 is chi-squared."""
    length = eps.flatten(1).norm(dim=1)  # (n,)
    quantile = torch.special.gammainc(torch.tensor(eps[0].numel() / 2).to(length), length.square() / 2)
    return eps * (torch.quantile(norms, quantile) / length).view(-1, *[1] * (eps.dim() - 1))


# ================================================================ corrector


def asked_levels(settings):
    """What scheduler.set_timesteps(sigmas=...) is given, as Python source."""
    power = "" if settings["grid_power"] == 1 else f" ** {settings['grid_power']!r}"
    return f"[(k / {settings['steps']}){power} for k in range({settings['steps']}, 0, -1)]"


class Corrector:
    """eps -> z, equation (3). It belongs to one sampler T, named in `settings`, and load() refuses any other. In use:
    corrector = Corrector.load(folder, network, scheduler);  latents = corrector(torch.randn(n, channels, height, width))."""

    def __init__(self, network, settings, law):
        """law: {} (then z is divided by settings["scale"]) or {"mean", "root", "inverse"} of gaussian_of. network: a stock one that
        takes a channel more than a picture has and returns twice as many."""
        self.network, self.settings, self.law = network, settings, law

    def velocity(self, y, t):
        """u = a + b y. y: (batch, channels, height, width), t: (batch,)."""
        square = y.square().mean((1, 2, 3), keepdim=True)  # 1 on average
        norm = (square - 1) * (y[0].numel() / 2) ** 0.5  # variance 1 for standard noise
        a, b = common.predict(self.network, torch.cat([y, norm.expand_as(y[:, :1])], 1), 1000 * (1 - t)).chunk(2, 1)
        return a + b * y

    def standardise(self, z):
        """What takes the place of z / s in equation (3)."""
        if not self.law:
            return z / self.settings["scale"]
        return ((z.flatten(1) - self.law["mean"]) @ self.law["inverse"]).view_as(z)

    def destandardise(self, y):
        if not self.law:
            return y * self.settings["scale"]
        return (self.law["mean"] + y.flatten(1) @ self.law["root"]).view_as(y)

    @torch.no_grad()
    def __call__(self, noise, steps=None):
        """noise: (batch, channels, height, width) from N(0, I) -> initial noise for the sampler, the same shape."""
        steps = steps or self.settings["corrector_steps"]
        return self.destandardise(correct(self.velocity, noise, steps))

    def save(self, folder):
        self.network.save_pretrained(folder)
        if self.law:
            common.write_atomically(
                folder / "law.safetensors", safetensors.torch.save({k: v.cpu() for k, v in self.law.items()})
            )
        common.write_atomically(folder / "corrector.json", json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder, network, scheduler):
        """The corrector saved in `folder`, for a flow's network and its scheduler, whose set_timesteps has been called.
        InputError if it was learnt for another network or grid."""
        import diffusers

        file = Path(folder) / "corrector.json"
        if not file.is_file():
            raise InputError(f"{folder}: holds no corrector (no corrector.json)")
        settings = json.loads(file.read_text(encoding="utf-8"))
        if common.model_hash(network) != settings["model_hash"]:
            raise InputError(f"{folder}: this corrector was learnt for another model; learn one for this model")
        given = scheduler.sigmas.tolist()
        levels = [sigma * scheduler.config.num_train_timesteps for sigma in given[:-1]]
        if given != settings["sigmas"] or not np.allclose(levels, settings["timesteps"]):
            raise InputError(
                f"{folder}: this corrector was learnt for the {settings['steps']} steps in corrector.json, the scheduler is set to "
                f"{len(given) - 1} others: call scheduler.set_timesteps(sigmas={asked_levels(settings)}) first"
            )
        file = Path(folder) / "law.safetensors"
        device = next(network.parameters()).device
        law = {k: v.to(device) for k, v in safetensors.torch.load_file(file).items()} if file.exists() else {}
        kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["_class_name"]
        return cls(getattr(diffusers, kind).from_pretrained(folder).to(device).requires_grad_(False), settings, law)


def draw_noise(seeds, shape):
    """eps (n, *shape), one CPU generator for each seed."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


# ================================================================ training


def flow_loss(velocity, x, eps, sigma):
    """E |v(x_sigma, sigma) - (eps - x)|^2, the base's own loss. x, eps: (batch, ...), sigma: (batch,)."""
    level = sigma.view(-1, *[1] * (x.dim() - 1))
    return (velocity((1 - level) * x + level * eps, sigma) - (eps - x)).square().mean()


def fit(network, loss, updates, lr, key, state, every, save=lambda: None, held_out=None):
    """AdamW (warm-up, cosine to 0); network ends with its averaged weights, with held_out() the averaged ones for which that was
    least. loss(generator): one update's, all its draws from generator, whose seed depends on key and the update alone.
    state: {} or, to go on, what save() stored; save() is called every `every` updates."""
    if state.get("update") != updates:
        parameters = list(network.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        if state:
            network.load_state_dict(state["weights"])
            optimizer.load_state_dict(state["optimizer"])
        else:
            first = held_out() if held_out else math.inf
            state.update(update=0, best=first, losses=[], rows=[{"update": 0, "loss": math.nan, "held_out": first}])
            state.update(final=copy.deepcopy(network.state_dict()), average=[p.detach().clone() for p in parameters])
        average = [p.to(parameters[0].device) for p in state["average"]]
        for i in tqdm(range(state["update"], updates), desc=key[-1], leave=False, mininterval=1):
            optimizer.param_groups[0]["lr"] = lr * min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / updates))
            value = loss(torch.Generator().manual_seed(derived_seed(*key, i)))
            if not value.isfinite():
                raise InputError(f"{key[-1]}, update {i + 1}: loss {value.item()}; lower the learning rate {lr:g}")
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, (i + 1) / (i + 10)))
            state["losses"].append(value.item())
            if (i + 1) % every == 0 or i + 1 == updates:
                current = [p.detach().clone() for p in parameters]
                torch._foreach_copy_([p.data for p in parameters], average)
                score = held_out() if held_out else -i
                if not score >= state["best"]:
                    state.update(best=score, final=copy.deepcopy(network.state_dict()))
                torch._foreach_copy_([p.data for p in parameters], current)
                recent = state["losses"][state["update"] :]
                state["rows"].append({"update": i + 1, "loss": sum(recent) / len(recent), "held_out": score})
                state.update(update=i + 1, average=average, weights=network.state_dict(), optimizer=optimizer.state_dict())
                if i + 1 == updates:
                    for name in ("average", "weights", "optimizer"):  # a finished network needs a small checkpoint only
                        del state[name]
                save()
    network.load_state_dict(state["final"])
    network.eval().requires_grad_(False)


def train_flow(flow, pictures, updates, lr, batch, key, state, every, save=lambda: None, flops=None):
    """Train flow.network on pictures (n, *shape) by its own loss. With flops: as many updates as these operations buy, not `updates`."""
    flow.network.requires_grad_(True)

    def loss(generator):
        x = pictures[torch.randint(len(pictures), (batch,), generator=generator)].to(flow.device)
        eps = torch.randn(x.shape, generator=generator).to(flow.device)
        return flow_loss(flow.velocity, x, eps, torch.rand(batch, generator=generator).to(flow.device))

    if flops is not None:
        updates = max(1, round(flops / count_flops(lambda: loss(torch.Generator().manual_seed(0)).backward())))
        flow.network.zero_grad()
    fit(flow.network, loss, updates, lr, key, state, every, save)
    return updates


# ================================================================ the phases


def load_pictures(args, shape, files):
    """{"invert": to learn the noises of, "train": to train a base on, "reference" and "floor": for the Frechet distance}, each
    (n, *shape) in [-1, 1]. Of a folder, "reference" shares no picture with the others."""
    if not args.data:
        sizes = {"invert": args.pictures, "reference": 5 * args.eval_pictures, "floor": args.eval_pictures}
        if args.train_base or args.longer:
            sizes["train"] = 20_000
        own = {"invert": (args.seed,), "train": (args.seed,)}  # the others are the same for every run
        pictures = {name: flow_data.draw(size, derived_seed(name, *own.get(name, ())))[0] for name, size in sizes.items()}
    else:
        loaded = []
        for file in tqdm(files, desc="read pictures", leave=False, mininterval=1):
            try:
                image = Image.open(file).convert("L" if shape[0] == 1 else "RGB")
            except Exception as error:  # PIL raises many kinds for a damaged file
                raise InputError(f"--data {file}: cannot be read ({error})") from None
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize(shape[1:], Image.Resampling.LANCZOS)
            loaded.append(torch.from_numpy(np.array(image)).view(*shape[1:], shape[0]).permute(2, 0, 1) / 127.5 - 1)
        generator = torch.Generator().manual_seed(derived_seed("split"))
        loaded = torch.stack(loaded)[torch.randperm(len(loaded), generator=generator)]
        kept = round(args.reference_share * len(loaded))
        pictures = {"reference": loaded[:kept], "train": loaded[kept:]}
        pictures |= {"invert": loaded[kept:][: args.pictures], "floor": loaded[kept:][: args.eval_pictures]}
    for name, x in pictures.items():  # the same noise on both sides of every comparison
        generator = torch.Generator().manual_seed(derived_seed("data noise", name))
        pictures[name] = x + args.data_noise * torch.randn(x.shape, generator=generator)
    return pictures


def invert_pictures(flow, pictures, sigmas, args, folder):
    """Equation (2) for all pictures, a file in folder/inversion per batch. Returns (noises of the converged (n, *shape), report)."""
    (folder / "inversion").mkdir(exist_ok=True)
    parts, failed = [], 0
    for i in tqdm(range(0, len(pictures), args.sample_batch), desc="invert", unit="batch", leave=False, mininterval=1):
        file = folder / "inversion" / f"{i:06d}.safetensors"
        if not file.exists():
            x = pictures[i : i + args.sample_batch].to(args.device)
            found = euler_invert(flow.velocity, x, sigmas, args.max_iterations, args.tolerance, args.memory)
            z = found.noise[found.converged]
            error = euler_sample(flow.velocity, z, sigmas) - x[found.converged]
            part = {"noise": z, "error": error.square().flatten(1).mean(1).sqrt(), "residual": found.residual[found.converged]}
            part |= {"iterations": torch.tensor(found.iterations), "contraction": torch.tensor(found.contraction)}
            part["counts"] = torch.tensor([len(x), found.calls])
            common.write_atomically(file, safetensors.torch.save({k: v.cpu().contiguous() for k, v in part.items()}))
        parts.append(safetensors.torch.load_file(file))
        failed += parts[-1]["counts"][0].item() - len(parts[-1]["noise"])
        if failed > args.max_failed * len(pictures):
            worst = torch.stack([p["contraction"] for p in parts]).nanmean(0)
            raise InputError(
                f"{failed} of the first {min(i + args.sample_batch, len(pictures))} pictures could not be inverted (median contraction "
                f"of the steps {', '.join(f'{c:.2f}' for c in worst)}; it must be below 1, better below 0.5): use more --steps, "
                f"more --data_noise, a --grid_power above 1 or more --max_iterations"
            )
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("noise", "error", "residual")}
    if len(joined["noise"]) < 20:
        raise InputError(f"only {len(joined['noise'])} pictures could be inverted: give more")
    report = {"pictures": len(pictures), "left_out": failed, "calls": sum(part["counts"][1].item() for part in parts)}
    report |= {"largest_residual": joined["residual"].max().item(), "round_trip_error": joined["error"].mean().item()}
    report["largest_round_trip_error"] = joined["error"].max().item()
    report["iterations"] = torch.stack([part["iterations"] for part in parts]).double().mean(0).tolist()
    report["contraction"] = torch.stack([part["contraction"] for part in parts]).double().nanmean(0).tolist()
    return joined["noise"], report


def split_noises(noises, args):
    """(held out, to learn from)."""
    held_out = max(10, round(args.held_out * len(noises)))
    return noises[:held_out], noises[held_out:]


def train_corrector(corrector, noises, args, state, save):
    """Fit equation (3) to z (n, *shape) in place. Returns the floating-point operations of the training."""
    kept, train = (corrector.standardise(part.to(args.device)) for part in split_noises(noises, args))

    def loss_of(z, generator):
        eps = torch.randn(z.shape, generator=generator).to(args.device)
        t = torch.rand(len(z), generator=generator).to(args.device)
        y, target = interpolant(eps, z, t)
        return (corrector.velocity(y, t) - target).square().mean()

    def loss(generator):
        return loss_of(train[torch.randint(len(train), (args.batch,), generator=generator)], generator)

    @torch.no_grad()
    def held_out():
        generator = torch.Generator().manual_seed(derived_seed("held out"))
        parts = kept.repeat(4, 1, 1, 1).split(args.sample_batch)  # four draws of eps and t for each
        return sum(loss_of(part, generator).item() * len(part) for part in parts) / (4 * len(kept))

    flops = count_flops(lambda: loss(torch.Generator().manual_seed(0)).backward())
    corrector.network.zero_grad()
    fit(corrector.network, loss, args.updates, args.lr, (args.seed, "corrector"), state, args.checkpoint_every, save, held_out)
    return flops * args.updates


def noise_statistics(z):
    """Numbers that tell z (n, channels, height, width) from N(0, I)."""
    z = z.double()
    square = z.flatten(1).square().mean(1)  # (n,) 1 for N(0, I)
    centred = (z - z.mean(0)) / z.std(0)  # every pixel standardised
    energy = (centred.square() - 1) / centred.square().std()

    def neighbours(values, lag):
        return (
            0.5 * ((values[..., lag:] * values[..., :-lag]).mean() + (values[..., lag:, :] * values[..., :-lag, :]).mean())
        ).item()

    return {
        "norm": square.sqrt().mean().item(),  # divided by the square root of the dimension
        "norm_spread": square.sqrt().std().item(),
        "mean": z.mean().item(),
        "variance": z.var(0).mean().item(),
        "kurtosis": (centred**4).mean().item(),  # 3 for any Gaussian
        "correlation_1": neighbours(centred, 1),  # of neighbours
        "correlation_2": neighbours(centred, 2),
        "energy_correlation_1": neighbours(energy, 1),  # of neighbours' squares: that correlation squared for any Gaussian
        "energy_correlation_2": neighbours(energy, 2),
    }


def evaluate(flow, start, sigmas, reference, features, args):
    """Sample args.eval_pictures from start(eps), fixed seeds. Returns {"fd", "flops" and "seconds" of a picture, "pictures": some}."""
    pictures, seconds = [], 0.0
    for i in range(0, args.eval_pictures, args.sample_batch):
        count = min(args.sample_batch, args.eval_pictures - i)
        eps = draw_noise([derived_seed("eval", i + j) for j in range(count)], flow.shape).to(args.device)
        begun = time.perf_counter()
        pictures.append(euler_sample(flow.velocity, start(eps), sigmas).cpu())
        seconds += time.perf_counter() - begun
    pictures = torch.cat(pictures)
    if not pictures.isfinite().all():
        return {"fd": math.nan, "flops": math.nan, "seconds": math.nan, "pictures": pictures[:SHOWN].clone()}
    flops = count_flops(lambda: euler_sample(flow.velocity, start(eps[:1]), sigmas))
    row = {"fd": frechet_distance(reference, features(pictures)), "flops": flops}
    return row | {"seconds": seconds / len(pictures), "pictures": pictures[:SHOWN].clone()}


# ================================================================ the run


def numbers(args, name, kind, least, most):
    """The numbers of a setting such as "2,4"."""
    try:
        found = [kind(part) for part in getattr(args, name).split(",") if part.strip()]
    except ValueError:
        found = [math.nan]
    if not all(least <= n <= most for n in found):
        wanted = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} {getattr(args, name)}: give {wanted} from {least:g} to {most:g}, separated by commas")
    return found


def prepare(args):
    """Check every argument before any model loads and fill in what was left out. Returns (shape of a picture, files of --data)."""
    args.device = common.check_device(args.device, "float32")
    common.check_output(args.output, args.resume)
    limits = {name: (1, 10**9) for name in AT_LEAST_ONE} | {"updates": (1, 10**9), "steps": (2, 1000), "pictures": (20, 10**7)}
    limits |= {"eval_pictures": (20, 10**6), "seed": (0, 2**63 - 1), "data_noise": (0, 10), "reference_share": (0.05, 0.95)}
    limits |= {"batch": (1, 10**6), "size": (1, 1024)}
    limits |= {
        "grid_power": (0.1, 10),
        "memory": (0, 20),
        "tolerance": (1e-7, 1),
        "max_failed": (0, 1),
        "held_out": (0.01, 0.9),
    }
    for name, (least, most) in (limits | {name: (1e-12, 1) for name in ("lr", "base_lr", "longer_lr")}).items():
        if not least <= getattr(args, name) <= most:
            raise InputError(f"--{name} {getattr(args, name)}: must be between {least:g} and {most:g}")
    default = "shapes" if not args.data else "inception" if find_spec("torch_fidelity") else "pixels"
    args.features = args.features or default
    for name, choices in CHOICES.items():
        if getattr(args, name) not in choices:
            raise InputError(f"--{name} {getattr(args, name)}: must be one of {', '.join(choices)}")
    for name, kind, least in (("eval_steps", int, 1), ("eval_corrector_steps", int, 1), ("eval_powers", float, 0.1)):
        numbers(args, name, kind, least, 10**4)
    shape = (args.channels, args.size, args.size) if args.train_base else common.check_flow(args.model)
    for name in ("corrector_network", *(["base_network"] if args.train_base else [])):
        common.check_network(getattr(args, name), shape[1], f"--{name}")
    if shape[0] not in (1, 3):
        raise InputError(f"--channels {shape[0]}: must be 1 (grey) or 3 (RGB)")
    if args.normalise == "gaussian" and math.prod(shape) > 4096:
        raise InputError(
            f"--normalise gaussian: {math.prod(shape)} numbers in a picture are too many, 4096 at most; take scale"
        )
    world = (1, flow_data.SIZE, flow_data.SIZE)
    if not args.data and shape != world:
        raise InputError(f"--data: the embedded pictures are {world}, the model's {shape}; give a folder of pictures")
    if args.features == "shapes" and shape != world:
        raise InputError(f"--features shapes: judges pictures of shape {world} only, not {shape}; use pixels or inception")
    if args.features == "inception" and not find_spec("torch_fidelity"):
        raise InputError("--features inception: needs the package torch-fidelity (pip install torch-fidelity), or use pixels")
    files = []
    if args.data:
        if not Path(args.data).is_dir():
            raise InputError(f"--data {args.data}: no such folder")
        endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
        files = sorted(f for f in Path(args.data).rglob("*") if f.suffix.lower() in endings)
        kept = round(args.reference_share * len(files))
        if min(kept, len(files) - kept) < 20:
            raise InputError(
                f"--data {args.data}: {len(files)} pictures are too few, 20 to invert and 20 as reference are needed"
            )
    return shape, files


def describe(args, flow, corrector_size, pictures, folder):
    """The checked, derived settings."""
    model = f"trained here, {args.base_updates} updates" if args.train_base else args.model
    size = sum(p.numel() for p in flow.network.parameters())
    return f"""Inverse Noise Correction -> {folder}
  model      {model}: {type(flow.network).__name__}, {size:,} parameters, pictures {tuple(flow.shape)}, float32 on {args.device}
  sampler    Euler, {args.steps} steps, grid power {args.grid_power:g}
  inversion  {len(pictures["invert"])} pictures, data noise {args.data_noise:g}, tolerance {args.tolerance:g}, \
at most {args.max_iterations} iterations a step
  corrector  {corrector_size:,} parameters, {args.corrector_steps} steps, {args.updates} updates x {args.batch}, lr {args.lr:g}
  evaluation {args.eval_pictures} pictures a row against {len(pictures["reference"])}, Frechet distance on the features {args.features!r}"""


def main(args, folder_known):
    shape, files = prepare(args)
    pictures = load_pictures(args, shape, files)
    features = frechet_features(args.features, args.device, args.sample_batch)
    if args.train_base:
        from diffusers import FlowMatchEulerDiscreteScheduler

        torch.manual_seed(args.seed)
        network = common.new_network(args.base_network, args.size, args.channels, args.channels)
        flow = Flow(network, FlowMatchEulerDiscreteScheduler(), args.device)
    else:
        flow = Flow.load(args.model, args.device)
    sigmas = flow.grid(args.steps, args.grid_power)
    folder = common.make_run_folder(args, "inverse_noise_correction", "own" if args.train_base else args.model, args.seed)
    folder_known(folder)
    state = common.load_checkpoint(folder) if args.resume else None
    state = state or {"base": {}, "corrector": {}, "longer": {}, "rows": [], "seconds": 0.0}
    begun = time.perf_counter() - state["seconds"]

    def checkpoint():
        state["seconds"] = time.perf_counter() - begun
        common.save_checkpoint(folder, state)

    torch.manual_seed(args.seed)
    network = common.new_network(args.corrector_network, shape[1], shape[0] + 1, 2 * shape[0]).to(args.device)
    for parameter in getattr(network, "conv_out" if hasattr(network, "conv_out") else "proj_out_2").parameters():
        torch.nn.init.zeros_(parameter)
    print(describe(args, flow, sum(p.numel() for p in network.parameters()), pictures, folder), flush=True)

    # ------------------------------------------------------------ BASE
    if args.train_base:
        options = (args.base_updates, args.base_lr, args.batch, (args.seed, "base"), state["base"], args.checkpoint_every)
        train_flow(flow, pictures["train"], *options, checkpoint)
        flow.save(folder / "flow")
        args.model = str(folder / "flow")
        print(f"  base       trained, loss {np.mean(state['base']['losses'][-200:]):.4f}", flush=True)

    # ------------------------------------------------------------ INVERT
    noises, report = invert_pictures(flow, pictures["invert"], sigmas, args, folder)
    report["flops"] = report["calls"] * count_flops(lambda: flow.velocity(torch.zeros(1, *shape).to(args.device), sigmas[:1]))
    contraction = ", ".join(f"{c:.2f}" for c in report["contraction"])
    error, left_out = f"|T(z) - x| {report['round_trip_error']:.1e}", f"{report['left_out']} of {report['pictures']} left out"
    print(f"  inverted   {left_out}, {report['calls']} model calls, {error}, median contraction {contraction}", flush=True)

    # ------------------------------------------------------------ CORRECT
    known = split_noises(noises, args)[1].to(args.device)
    scale = known.square().mean().sqrt().item()
    args.normalise = args.normalise or ("gaussian" if len(known) >= 10 * math.prod(shape) else "scale")
    law = {}
    if math.prod(shape) <= 4096:  # beyond, the covariance would be larger than any model here
        law = dict(zip(("mean", "root", "inverse"), (part.to(args.device) for part in gaussian_of(known))))
    settings = {"model_hash": common.model_hash(flow.network), "steps": args.steps, "grid_power": args.grid_power}
    settings |= {"sigmas": sigmas.tolist(), "timesteps": flow.scheduler.timesteps.tolist(), "scale": scale}
    settings |= {"corrector_steps": args.corrector_steps, "normalise": args.normalise}
    corrector = Corrector(network, settings, law if args.normalise == "gaussian" else {})
    gaussian = Corrector(None, settings, law)
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=state["corrector"].get("update", 0) + 1)

    def log():
        rows = [row | {"identity": state["corrector"]["rows"][0]["held_out"]} for row in state["corrector"]["rows"]]
        common.write_csv(folder / "metrics.csv", rows)
        for name, value in rows[-1].items():
            writer.add_scalar(name, value, rows[-1]["update"])
        writer.flush()
        checkpoint()

    learning = train_corrector(corrector, noises, args, state["corrector"], log)
    writer.close()
    corrector.save(folder / "corrector")
    best, identity = state["corrector"]["best"], state["corrector"]["rows"][0]["held_out"]
    print(f"  corrector  held-out loss {best:.4f}, {identity:.4f} with velocity 0", flush=True)

    # ------------------------------------------------------------ TRAIN THE BASE ON (control)
    cost = {"inversion": report["flops"], "corrector": learning}
    samplers = {"base": flow}
    if args.longer:
        samplers["longer"] = Flow(copy.deepcopy(flow.network), flow.scheduler, args.device)
        options = (args.longer_lr, args.batch, (args.seed, "longer"), state["longer"], args.checkpoint_every, checkpoint)
        updates = train_flow(samplers["longer"], pictures["train"], None, *options, flops=sum(cost.values()))
        print(f"  control    base trained on for {updates} updates, as many FLOPs as inversion and corrector took", flush=True)

    # ------------------------------------------------------------ EVALUATE
    reference = features(pictures["reference"])
    floor = frechet_distance(reference, features(pictures["floor"]))
    eps = torch.zeros(1, *shape).to(args.device)
    n, call = args.steps, count_flops(lambda: flow.velocity(eps, sigmas[:1]))
    corrected = count_flops(lambda: euler_sample(flow.velocity, corrector(eps), sigmas))
    matched = math.ceil(corrected / call)  # steps of the base that cost as much as a corrected sample, or a little more
    steps = sorted({n, *(numbers(args, "eval_steps", int, 1, 10**4) or (matched, 2 * n, 4 * n))})
    arms = [("base", "base", k, args.grid_power if k == n else 1.0, lambda eps: eps) for k in steps]
    powers = numbers(args, "eval_powers", float, 0.1, 10)
    arms += [(f"base, grid power {power:g}", "base", matched, power, lambda eps: eps) for power in powers]
    arms += [("base trained on", "longer", k, args.grid_power, lambda eps: eps) for k in sorted({n, matched}) if args.longer]
    starts = {"scale only": lambda eps: scale * eps}
    if law:
        norms = gaussian.standardise(known).flatten(1).norm(dim=1)  # (n,)
        starts["gaussian"] = gaussian.destandardise
        starts["gaussian, norms matched"] = lambda eps: gaussian.destandardise(match_norms(eps, norms))
    starts["corrector"] = corrector
    for m in numbers(args, "eval_corrector_steps", int, 1, 10**4):
        starts[f"corrector, M = {m}"] = lambda eps, m=m: corrector(eps, m)
    arms += [(name, "base", n, args.grid_power, start) for name, start in starts.items()]
    for i, (name, which, k, power, start) in enumerate(arms):
        if i >= len(state["rows"]):  # not so if the run was stopped after it had this row
            row = evaluate(samplers[which], start, samplers[which].grid(k, power), reference, features, args)
            state["rows"].append({"arm": name, "steps": k} | row)
            checkpoint()

    # ------------------------------------------------------------ SHOW
    laws = {"inverted": noises, "standard": draw_noise([derived_seed("statistics", i) for i in range(len(noises))], shape)}
    for name, start in {"gaussian": gaussian.destandardise if law else None, "corrector": corrector}.items():
        if start:
            laws[name] = torch.cat([start(part.to(args.device)).cpu() for part in laws["standard"].split(args.sample_batch)])
    results = {"table": [{k: row[k] for k in ("arm", "steps", "fd", "flops")} for row in state["rows"]], "floor": floor}
    results |= {"steps": n, "matched_steps": matched, "inversion": report, "scale": scale, "training_flops": cost}
    results["corrector"] = {"held_out": best, "identity": identity, "flops": corrected - n * call}
    results["noise"] = {name: noise_statistics(z) for name, z in laws.items()}
    checkpoint()
    results["seconds"] = {"total": state["seconds"], "per_picture": [row["seconds"] for row in state["rows"]]}
    common.write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    save_plots(folder, results, laws)
    save_pictures(folder / "grid.png", pictures["floor"], state["rows"], laws)
    show(args, folder, flow, settings, results)


def save_plots(folder, results, laws):
    """curve.png: Frechet distance against FLOPs; noise.png: the inverted noises beside the other laws."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis, lines = figure.subplots(), {}
    for row in results["table"]:
        lines.setdefault(row["arm"], []).append((row["flops"] / 1e6, row["fd"]))
    for name, points in lines.items():
        axis.plot(*zip(*points), "o-" if name.startswith("base") else "s", markersize=4, linewidth=1, label=name)
    axis.axhline(results["floor"], color="grey", linewidth=0.8, linestyle=":", label="data against data")
    axis.set(xscale="log", yscale="log", xlabel="MFLOP per picture", ylabel="Frechet distance")
    axis.legend(fontsize=7)
    common.save_figure(figure, folder / "curve.png")
    figure = Figure(figsize=(14, 3), layout="constrained")
    norms, values, lags, where = figure.subplots(1, 4)
    for name, z in laws.items():
        norms.hist(z.flatten(1).square().mean(1).sqrt().numpy(), 40, histtype="step", density=True, label=name)
        values.hist(z.flatten()[:100_000].numpy(), np.linspace(-6, 6, 61), histtype="step", density=True, label=name)
        found = results["noise"][name]
        lags.plot((1, 2), [found["correlation_1"], found["correlation_2"]], "o-", label=name)
    norms.set(xlabel="norm / sqrt(dimension)", ylabel="density")
    values.set(xlabel="value", ylabel="density", yscale="log")
    lags.set(xlabel="distance in pixels", ylabel="correlation", xticks=(1, 2))
    norms.legend(fontsize=7)
    figure.colorbar(
        where.imshow(laws["inverted"].std(0).mean(0).numpy()), ax=where, label="deviation of inverted noise by pixel"
    )
    common.save_figure(figure, folder / "noise.png")


def save_pictures(path, data, rows, laws):
    """A row of pictures of the data and of the table's main rows with the same eps; at the end inverted and corrected noises."""
    kept = [row for row in rows if "," not in row["arm"] and row["arm"] != "base trained on"]
    shown = {"data": data} | {f"{row['arm']}, {row['steps']} steps": row["pictures"] for row in kept}
    shown |= {f"noise: {name}": laws[name] / 3 for name in laws}
    figure = Figure(figsize=(1.2 * SHOWN, 1.4 * len(shown)))
    for axis, (name, pictures) in zip(figure.subplots(len(shown), 1), shown.items()):
        strip = F.pad(pictures[:SHOWN].clamp(-1, 1), (1, 1, 1, 1), value=1.0).permute(1, 2, 0, 3).flatten(2)  # (c, h, n w)
        axis.imshow(((strip + 1) / 2).permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axis.set_title(name, fontsize=8, loc="left")
        axis.set_axis_off()
    common.save_figure(figure, path)


def show(args, folder, flow, settings, results):
    """The tables and how to use the corrector, printed."""
    print(f"\n{'':<26}{'steps':>6}{'MFLOP':>11}{'ms':>8}{'Frechet distance':>18}")
    for row, seconds in zip(results["table"], results["seconds"]["per_picture"]):
        print(f"{row['arm']:<26}{row['steps']:>6}{row['flops'] / 1e6:>11.1f}{1e3 * seconds:>8.2f}{row['fd']:>18.4f}")
    print(f"{'data against data':<51}{results['floor']:>18.4f}")
    print("(MFLOP and ms: of one picture)\n\n" + f"{'noise':<24}" + "".join(f"{name:>12}" for name in results["noise"]))
    for name in results["noise"]["inverted"]:
        print(f"{name:<24}" + "".join(f"{found[name]:>12.3f}" for found in results["noise"].values()))
    kind, part = type(flow.network).__name__, "unet" if hasattr(flow.network, "conv_in") else "transformer"
    one = f"torch.tensor([{getattr(flow.network.config, 'num_embeds_ada_norm', 0)}], device=device)"
    call = "network(x, t)" if part == "unet" else f"network(x, t.expand(1), {one})"
    print(f"""
{results["seconds"]["total"]:.0f} s. In {folder}: corrector/, results.json, metrics.csv, curve.png, grid.png, noise.png. To use the corrector:

import sys, torch; from diffusers import FlowMatchEulerDiscreteScheduler, {kind}; from PIL import Image
sys.path.insert(0, {str(ROOT)!r}); from inverse_noise_correction import Corrector
device, model = {args.device!r}, {str(Path(args.model).resolve())!r}
network = {kind}.from_pretrained(model, subfolder={part!r}).to(device)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
scheduler.set_timesteps(sigmas={asked_levels(settings)}, device=device)
corrector = Corrector.load({str((folder / "corrector").resolve())!r}, network, scheduler)  # refuses another model or grid
x = corrector(torch.randn(1, {", ".join(map(str, flow.shape))}, generator=torch.Generator().manual_seed({derived_seed("eval", 0)})).to(device))
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step({call}.sample, t, x).prev_sample
pixels = ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu()
Image.fromarray(pixels.squeeze(2).numpy()).save("corrected.png")""")


if __name__ == "__main__":
    known = []
    with common.exit_on_error(
        lambda: f"Continue with: python inverse_noise_correction.py --resume {known[0]}" if known else "Nothing was written."
    ):
        main(common.parse_arguments(Args), known.append)
