"""The loop of inverse_noise_correction.py, recomputed: tiny real runs of its main() beside a plain one that
is written here, with stock networks and nothing of the script. What a run inverts, trains on, keeps, measures
and writes must be what the equations in the script's head say."""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import inverse_noise_correction as inc
from conftest import read_metrics
from fashion.features import FeatureNet
from fashion.images import FOLDER
from utils.runs import parse_arguments

# ---------------------------------------------------------------- the plain run: seeds, images, networks


def seed_of(*key):
    words = [int.from_bytes(word.encode(), "big") if isinstance(word, str) else word for word in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) // 2


def generator_of(*key):
    return torch.Generator().manual_seed(seed_of(*key))


def read_image(file, channels, size):
    """(channels, size, size) in [-1, 1] of the middle square."""
    image = Image.open(file).convert("RGB" if channels == 3 else "L")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    return torch.from_numpy(pixels.astype(np.float32)) / 127.5 - 1


def read_sheet(name):
    """[(1, 16, 16) in [-1, 1]] of the sheet of Fashion-MNIST: 100 images in a row."""
    levels = torch.from_numpy(np.asarray(Image.open(FOLDER / f"{name}.png")).astype(np.float32)) / 127.5 - 1
    return [image[None] for row in levels.split(16) for image in row.split(16, 1)]


def images_of(args, shape):
    """{what for: images (n, *shape)}"""
    if args.data:
        files = sorted(file for file in Path(args.data).glob("**/*") if file.is_file())
        files = [file for file in files if file.suffix != ".txt"]
        order = torch.randperm(len(files), generator=generator_of("split")).tolist()
        everything = [read_image(files[i], shape[0], shape[1]) for i in order]
        count = round(args.reference_share * len(files))
        others = everything[count:]
        parts = {"reference": everything[:count], "train": others}
    else:
        others, parts = read_sheet("train"), {"reference": read_sheet("reference")}
        parts["train"] = others
    parts |= {"invert": others[: args.images], "floor": others[max(0, len(others) - args.eval_images) :]}
    images = {name: torch.stack(part) for name, part in parts.items()}
    for name, x in images.items():
        images[name] = x + args.data_noise * torch.randn(x.shape, generator=generator_of("data noise", name))
    return images


def stock_flow(folder):
    """(network, scheduler), frozen."""
    if (Path(folder) / "unet").is_dir():
        network = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    else:
        network = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    return network.eval().requires_grad_(False), scheduler


def unet(size, inputs, outputs, widths):
    blocks = {"down_block_types": ["DownBlock2D"] * len(widths), "block_out_channels": widths}
    blocks |= {"up_block_types": ["UpBlock2D"] * len(widths), "layers_per_block": 1}
    groups = functools.reduce(math.gcd, widths, 8)
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=inputs,
        out_channels=outputs,
        norm_num_groups=groups,
        add_attention=False,
        **blocks,
    )


def transformer(size, inputs, outputs, widths, patch=None):
    return diffusers.DiTTransformer2DModel(
        sample_size=size,
        patch_size=patch or size,
        in_channels=inputs,
        out_channels=outputs,
        num_layers=len(widths),
        num_attention_heads=1,
        attention_head_dim=widths[0],
        num_embeds_ada_norm=1,
        norm_num_groups=1,
    )


def new_corrector(spec, shape, seed):
    """The corrector's network before its training: its output is 0."""
    kind, widths = spec.split(":")
    torch.manual_seed(seed)
    make = unet if kind == "unet" else transformer
    network = make(shape[1], shape[0] + 1, 2 * shape[0], [int(width) for width in widths.split(",")])
    last = network.conv_out if kind == "unet" else network.proj_out_2
    last.weight.data.zero_()
    last.bias.data.zero_()
    return network


def call(network, x, t):
    """The stock network's output at the times t (n,). A transformer is told "no class"."""
    if isinstance(network, diffusers.UNet2DModel):
        return network(x, t).sample
    return network(x, t, class_labels=torch.tensor([network.config.num_embeds_ada_norm] * len(x))).sample


def flops_of(function):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ---------------------------------------------------------------- the plain run: sampler, inverse, corrector


class Plain:
    """The run of `args`, made again piece by piece. Each piece is computed once."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.flow, self.scheduler = stock_flow(args.model)
        self.shape = (self.flow.config.in_channels, *[self.flow.config.sample_size] * 2)
        self.d, self.train_timesteps = math.prod(self.shape), self.scheduler.config.num_train_timesteps
        self.images = images_of(args, self.shape)
        self.sigmas = self.grid(args.steps, args.grid_power)
        self.call_flops = flops_of(lambda: self.velocity(self.flow, torch.zeros(1, *self.shape), 1.0))

    def grid(self, steps, power):
        sigmas = torch.tensor([(k / steps) ** power for k in range(steps, -1, -1)])
        return self.scheduler.shift * sigmas / (1 + (self.scheduler.shift - 1) * sigmas)

    def velocity(self, network, x, sigma):
        return call(network, x, torch.full((len(x),), float(sigma)) * self.train_timesteps)

    def sample(self, network, z, sigmas):
        for k in range(len(sigmas) - 1):
            z = z + (sigmas[k + 1] - sigmas[k]) * self.velocity(network, z, sigmas[k])
        return z

    def batches(self, x):
        return [x[i : i + self.args.sample_batch] for i in range(0, len(x), self.args.sample_batch)]

    @functools.cached_property
    def inversion(self):
        """Batch after batch, image by image; "noise" holds None for an image that is left out."""
        report = {"calls": 0, "noise": [], "residual": [], "iterations": [], "contraction": []}
        for batch in self.batches(self.images["invert"]):
            x, worst = list(batch), [0.0] * len(batch)
            iterations, contraction = [], []
            for k in reversed(range(self.args.steps)):
                step, guess = self.sigmas[k + 1] - self.sigmas[k], list(x)
                history, slopes, changes, count = [[] for _ in x], {}, {}, 0
                todo = [i for i in range(len(x)) if x[i] is not None]
                while todo and count < self.args.max_iterations:
                    velocities = self.velocity(
                        self.flow, torch.stack([guess[i] for i in todo]), self.sigmas[k]
                    )
                    count, report["calls"] = count + 1, report["calls"] + len(todo)
                    for i, v in zip(todo, velocities):
                        old, new = guess[i], x[i] - step * v
                        history[i].append((old, new))
                        changes[i] = (new - old).square().mean().sqrt().item()
                        if len(history[i]) > 1:
                            before, image = history[i][-2]
                            slope = ((new - image).norm() / (old - before).norm()).item()
                            slopes[i] = max(slopes.get(i, 0), slope)
                        guess[i] = new
                        if changes[i] > self.args.tolerance:
                            guess[i] = accelerated(history[i][-1 - self.args.memory :])
                    todo = [i for i in todo if changes[i] > self.args.tolerance]
                for i, change in changes.items():
                    worst[i] = max(worst[i], change)
                x = [None if i in todo else guess[i] for i in range(len(x))]
                iterations.insert(0, count)
                middle = sorted(slopes.values())
                contraction.insert(0, middle[(len(middle) - 1) // 2])
            report["noise"] += x
            report["residual"] += [residual for residual, z in zip(worst, x) if z is not None]
            report["iterations"].append(iterations)
            report["contraction"].append(contraction)
        return report

    @functools.cached_property
    def noises(self):
        """What the run stored, (n, *shape): compared with the inversion, and used by what follows."""
        files = sorted((self.folder / "inversion").iterdir())
        return torch.cat([torch.load(file, weights_only=True)["noise"] for file in files])

    @functools.cached_property
    def held_out(self):
        return self.noises[: max(10, round(self.args.held_out * len(self.noises)))]

    @functools.cached_property
    def training(self):
        return self.noises[len(self.held_out) :]

    @functools.cached_property
    def settings(self):
        return json.loads((self.folder / "corrector" / "corrector.json").read_text())

    @functools.cached_property
    def gaussian(self):
        """mean (d,), root and inverse (d, d) of the training noises, float64."""
        flat = self.training.flatten(1).double().numpy()
        mean = flat.mean(0)
        covariance = (flat - mean).T @ (flat - mean) / (len(flat) - 1)
        values, vectors = np.linalg.eigh(covariance)
        deviation = np.sqrt(np.maximum(values, 1e-6 * values.max()))
        return mean, vectors @ np.diag(deviation) @ vectors.T, vectors @ np.diag(1 / deviation) @ vectors.T

    def white(self, z):
        """z standardised, (n, *shape), in the run's own numbers."""
        if self.settings["normalise"] == "scale":
            return z / self.settings["scale"]
        stored = load_file(self.folder / "corrector" / "gaussian.safetensors")
        return ((z.flatten(1) - stored["mean"]) @ stored["inverse"]).view(z.shape)

    def coloured(self, w):
        """The inverse of white."""
        if self.settings["normalise"] == "scale":
            return w * self.settings["scale"]
        stored = load_file(self.folder / "corrector" / "gaussian.safetensors")
        return (stored["mean"] + w.flatten(1) @ stored["root"]).view(w.shape)

    def correction(self, network, y, t):
        """u(y, t) = a + b y; t (n,)."""
        square = y.square().mean((1, 2, 3))
        norm = ((square - 1) * (self.d / 2) ** 0.5).view(-1, 1, 1, 1).repeat(1, 1, *self.shape[1:])
        both = call(network, torch.cat([y, norm], 1), 1000 * (1 - t))
        return both[:, : self.shape[0]] + both[:, self.shape[0] :] * y

    def correct(self, eps, steps):
        """eps -> z by the trained corrector."""
        y = eps
        for m in range(steps):
            y = y + self.correction(self.trained.network, y, torch.full((len(y),), m / steps)) / steps
        return self.coloured(y)

    def corrector_loss(self, network, w, generator):
        eps = torch.randn(w.shape, generator=generator)
        t = torch.rand(len(w), generator=generator)
        angle = (0.5 * math.pi * t).view(-1, 1, 1, 1)
        cos, sin = angle.cos(), angle.sin()
        u = self.correction(network, cos * eps + sin * w, t)
        return (u - 0.5 * math.pi * (cos * w - sin * eps)).square().mean()

    def flow_loss(self, network, generator):
        images, batch = self.images["train"], self.args.batch
        x = images[torch.randint(len(images), (batch,), generator=generator)]
        eps = torch.randn(x.shape, generator=generator)
        sigma = torch.rand(batch, generator=generator)
        level = sigma.view(-1, 1, 1, 1)
        v = call(network, (1 - level) * x + level * eps, sigma * self.train_timesteps)
        return (v - (eps - x)).square().mean()

    @functools.cached_property
    def trained(self):
        """The corrector: its rows, the weights kept, what the checkpoints hold."""
        args, network = self.args, new_corrector(self.args.corrector_network, self.shape, self.args.seed)
        noises, held_out = self.white(self.training), self.white(self.held_out)

        def loss(generator):
            index = torch.randint(len(noises), (args.batch,), generator=generator)
            return self.corrector_loss(network, noises[index], generator)

        @torch.no_grad()
        def held_out_loss():
            generator, total = generator_of("held out"), 0.0
            for part in torch.cat([held_out] * 4).split(500):
                total += self.corrector_loss(network, part, generator).item() * len(part)
            return total / (4 * len(held_out))

        identity = held_out_loss()
        rows = [{"update": 0, "loss": math.nan, "held_out": identity, "identity": identity}]
        best, kept, before = identity, copy_of(network), 0
        snapshots, norms = {}, []
        for snapshot in train(network, loss, args.updates, args.lr, args, "corrector", norms):
            done, losses = snapshot["update"], snapshot["losses"][before:]
            value, before = held_out_loss(), done
            mean = sum(losses) / len(losses)
            rows.append({"update": done, "loss": mean, "held_out": value, "identity": identity})
            if value < best:
                best, kept = value, copy_of(network)
            snapshots[done] = snapshot | {"best": best, "rows": list(rows)}
        network.load_state_dict(kept)
        network.requires_grad_(False)
        return SimpleNamespace(rows=rows, best=best, network=network, snapshots=snapshots, norms=norms)

    @functools.cached_property
    def training_flops(self):
        network = new_corrector(self.args.corrector_network, self.shape, 0)
        w, generator = torch.zeros(self.args.batch, *self.shape), torch.Generator()
        update = flops_of(lambda: self.corrector_loss(network, w, generator).backward())
        calls = sum(torch.load(f, weights_only=True)["counts"][1].item() for f in self.inversion_files)
        return {"inversion": calls * self.call_flops, "corrector": self.args.updates * update}

    @property
    def inversion_files(self):
        return sorted((self.folder / "inversion").iterdir())

    @functools.cached_property
    def longer(self):
        """The base trained on."""
        network = stock_flow(self.args.model)[0].requires_grad_(True)
        update = flops_of(lambda: self.flow_loss(network, torch.Generator()).backward())
        updates = max(1, round(sum(self.training_flops.values()) / update))
        norms, snapshots = [], {}
        loss = functools.partial(self.flow_loss, network)
        for snapshot in train(network, loss, updates, self.args.longer_lr, self.args, "longer", norms):
            snapshots[snapshot["update"]] = snapshot
        network.requires_grad_(False)
        return SimpleNamespace(updates=updates, network=network, snapshots=snapshots, norms=norms)

    # ------------------------------------------------------------ the evaluation

    def standard(self, name, count):
        return torch.stack([torch.randn(self.shape, generator=generator_of(name, i)) for i in range(count)])

    def gaussian_noise(self, eps):
        mean, root, _ = self.gaussian
        return torch.from_numpy(mean + eps.flatten(1).double().numpy() @ root).float().view(eps.shape)

    def matched_norms(self, eps):
        """eps with its lengths where they stand among the chi-distributed ones -> where the standardised
        training noises have theirs."""
        mean, _, inverse = self.gaussian
        norms = np.linalg.norm((self.training.flatten(1).double().numpy() - mean) @ inverse, axis=1)
        changed = []
        for one in eps:
            length = one.double().norm()
            below = torch.special.gammainc(torch.tensor(self.d / 2).double(), length**2 / 2)
            changed.append(one * float(np.quantile(norms, below.item()) / length))
        return torch.stack(changed)

    def features(self, images):
        parts = []
        for part in self.batches(images):
            if self.args.features == "fashion":
                net = FeatureNet.load()
                parts.append(net.body(part))
            else:  # means over the fields of an 8 x 8 grid
                size = max(1, self.shape[1] // 8)
                parts.append(part.unflatten(3, (-1, size)).unflatten(2, (-1, size)).mean((3, 5)).flatten(1))
        return torch.cat(parts).double().numpy()

    @functools.cached_property
    def reference(self):
        return self.features(self.images["reference"])

    @functools.cached_property
    def matched_steps(self):
        return math.ceil(self.corrected_flops(self.args.corrector_steps) / self.call_flops)

    def corrected_flops(self, steps):
        """Of the sampler with the corrector, M = steps."""
        one = torch.zeros(1, *self.shape)
        correction = flops_of(lambda: self.correction(self.trained.network, one, torch.zeros(1)))
        colour = 2 * self.d**2 if self.settings["normalise"] == "gaussian" else 0
        return self.args.steps * self.call_flops + steps * correction + colour

    @functools.cached_property
    def rows(self):
        """[(arm, steps, Frechet distance, FLOPs, images)]"""
        args, n, eps = self.args, self.args.steps, self.standard("eval", self.args.eval_images)
        own, plan = self.sigmas, []  # (arm, network, initial noise of eps, levels, FLOPs)
        for k in sorted({n, *(args.eval_steps or (self.matched_steps, 2 * n, 4 * n))}):
            sigmas = own if k == n else self.grid(k, 1.0)
            plan.append(("base", self.flow, lambda eps: eps, sigmas, k * self.call_flops))
        for k in sorted({n, self.matched_steps}) if args.longer else ():
            sigmas, flops = self.grid(k, args.grid_power), k * self.call_flops
            plan.append(("base trained on", self.longer.network, lambda eps: eps, sigmas, flops))
        base, matrix = n * self.call_flops, 2 * self.d**2
        scale = float(np.sqrt(np.mean(self.training.double().numpy() ** 2)))
        plan.append(("scale only", self.flow, lambda eps: scale * eps, own, base))
        if self.d <= inc.MOST_COVARIANCE:
            plan.append(("gaussian", self.flow, self.gaussian_noise, own, base + matrix))
            matched = "gaussian, norms matched"
            twice = lambda eps: self.gaussian_noise(self.matched_norms(eps))  # noqa: E731
            plan.append((matched, self.flow, twice, own, base + matrix))
        for m in (None, *args.eval_corrector_steps):
            name, steps = ("corrector", args.corrector_steps) if m is None else (f"corrector, M = {m}", m)
            noise = functools.partial(self.correct, steps=steps)
            plan.append((name, self.flow, noise, own, self.corrected_flops(steps)))
        rows = []
        for arm, network, noise, sigmas, flops in plan:
            images = torch.cat([self.sample(network, noise(part), sigmas) for part in self.batches(eps)])
            distance = frechet(self.reference, self.features(images))
            rows.append((arm, len(sigmas) - 1, distance, flops, images))
        return rows

    @functools.cached_property
    def shown(self):
        """{name: noises (n, *shape)} of the statistics."""
        eps = self.standard("statistics", len(self.noises))
        shown = {"inverted": self.noises, "standard": eps}
        if self.d <= inc.MOST_COVARIANCE:
            shown["gaussian"] = self.gaussian_noise(eps)
        parts = [self.correct(part, self.args.corrector_steps) for part in self.batches(eps)]
        return shown | {"corrector": torch.cat(parts)}


def accelerated(history):
    """Anderson's next guess for one image, of its last (x, g(x)): from the newest g(x) that combination of
    the last changes of g is taken away which cancels most of g(x) - x."""
    old, new = history[-1]
    if len(history) == 1:
        return new
    changes = [
        ((after[1] - after[0]) - (before[1] - before[0])).flatten()
        for before, after in zip(history, history[1:])
    ]
    gram = torch.stack(changes) @ torch.stack(changes).T
    gram += (1e-6 * gram.trace() + torch.finfo(gram.dtype).tiny) * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, torch.stack(changes) @ (new - old).flatten())
    for w, before, after in zip(weight, history, history[1:]):
        new = new - w * (after[1] - before[1])
    return new


def copy_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def train(network, loss, updates, lr, args, name, norms):
    """AdamW. Yields what a checkpoint holds, with the averaged weights in the network. norms: gradients'."""
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0)
    average, losses = [p.detach().clone() for p in parameters], []
    for i in range(updates):
        optimizer.param_groups[0]["lr"] = (
            lr * min(1, (i + 1) / 100) * (1 + math.cos(math.pi * i / updates)) / 2
        )
        value = loss(generator_of(args.seed, name, i))
        optimizer.zero_grad()
        value.backward()
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.grad *= (1 / (norm + 1e-6)).clamp(max=1)
        optimizer.step()
        losses.append(value.item())
        norms.append(norm.item())
        share = min(0.999, (i + 1) / (i + 10))
        for a, p in zip(average, parameters):
            a.lerp_(p.detach(), 1 - share)
        if (i + 1) % args.checkpoint_every == 0 or i + 1 == updates:
            weights = copy_of(network)
            moments = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in parameters]
            for a, p in zip(average, parameters):
                p.data.copy_(a)
            snapshot = {"update": i + 1, "weights": weights, "losses": list(losses), "moments": moments}
            yield snapshot | {"average": [a.clone() for a in average]}
            if i + 1 < updates:
                network.load_state_dict(weights)


def frechet(a, b):
    """Of features (n, d), (m, d): the trace of the root of the product of the covariances is the nuclear norm
    of the product of the centred features."""
    x, y = (a - a.mean(0)) / math.sqrt(len(a) - 1), (b - b.mean(0)) / math.sqrt(len(b) - 1)
    cross = np.linalg.norm(x @ y.T, "nuc")
    return np.sum((a.mean(0) - b.mean(0)) ** 2) + np.sum(x**2) + np.sum(y**2) - 2 * cross


def statistics(z):
    z = z.double().numpy()
    norm = np.sqrt((z.reshape(len(z), -1) ** 2).mean(1))
    white = (z - z.mean(0)) / z.std(0, ddof=1)
    energy = (white**2 - 1) / (white**2).std(ddof=1)
    report = {"norm": norm.mean(), "norm_spread": norm.std(ddof=1), "mean": z.mean()}
    report |= {"variance": z.var(0, ddof=1).mean(), "kurtosis": (white**4).mean()}
    for name, values in (("correlation", white), ("energy_correlation", energy)):
        for lag in (1, 2):
            across = [values[..., :, i] * values[..., :, i + lag] for i in range(z.shape[3] - lag)]
            down = [values[..., i, :] * values[..., i + lag, :] for i in range(z.shape[2] - lag)]
            report[f"{name}_{lag}"] = (np.mean(across) + np.mean(down)) / 2
    return report


# ---------------------------------------------------------------- the real runs


@contextlib.contextmanager
def recording():
    """What a run really did: seeds, calls of the networks, figures (which are not drawn), what it printed."""
    seen = SimpleNamespace(seeds=[], drawn=[], calls=[], figures={}, ticks=0, out=io.StringIO())

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            seen.seeds.append(seed)
            return super().manual_seed(seed)

    def default_rng(seed, original=np.random.default_rng):
        seen.drawn.append(seed)
        return original(seed)

    def recorded(original):
        def forward(network, x, t, **options):
            t = torch.as_tensor(t)
            seen.calls.append((network.config.out_channels, len(x), t.flatten()[0].item()))
            return original(network, x, t, **options)

        return forward

    def tick():
        seen.ticks += 1
        return seen.ticks

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(seen.out):
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(np.random, "default_rng", default_rng)
        for network_class in (diffusers.UNet2DModel, diffusers.DiTTransformer2DModel):
            patch.setattr(network_class, "forward", recorded(network_class.forward))
        patch.setattr(inc, "time", SimpleNamespace(perf_counter=tick))
        patch.setattr(inc, "save_figure", lambda figure, path: seen.figures.update({path.name: figure}))
        seen.patch = patch
        yield seen


def do_run(folder, **settings):
    """A whole run, and the plain one beside it."""
    args = inc.Args(output=str(folder), device="cpu", **settings)
    with recording() as seen:
        inc.main(args)
    results = json.loads((folder / "results.json").read_text())
    return SimpleNamespace(args=args, folder=folder, seen=seen, results=results, plain=Plain(args, folder))


def save_flow(folder, network, name, damping, **scheduler):
    with torch.no_grad():
        (network.conv_out if name == "unet" else network.proj_out_2).weight *= damping
    network.save_pretrained(folder / name)
    FlowMatchEulerDiscreteScheduler(**scheduler).save_pretrained(folder / "scheduler")
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder with 100 small images, bright and dark, wide and high, in subfolders, of several kinds."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for i in range(100):
        pixels = rng.normal(rng.uniform(60, 190), rng.uniform(10, 40), (17 + i % 4, 17 + i % 3, 3))
        name = folder / f"{'ab' * (i % 3)}{i % 7}" / f"{99 - i}.{('png', 'BMP', 'webp')[i % 3]}"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(name, lossless=True)
    (folder / "notes.txt").write_text("no image")
    return str(folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, pictures):
    """{name: settings of a run}"""
    models, many = tmp_path_factory.mktemp("models"), str(tmp_path_factory.mktemp("many"))
    for i, pixels in enumerate(np.random.default_rng(6).normal(128, 40, (200, 4, 4)).clip(0, 255)):
        Image.fromarray(pixels.astype(np.uint8)).save(f"{many}/{i}.png")
    torch.manual_seed(0)
    grey = save_flow(models / "grey", unet(16, 1, 1, (4, 8)), "unet", 0.5, shift=2.0, num_train_timesteps=500)
    coloured = transformer(16, 3, 3, (16, 16), patch=8)
    coloured = save_flow(models / "coloured", coloured, "transformer", 0.57)
    small = save_flow(models / "small", unet(4, 1, 1, (4,)), "unet", 0.3)
    fashion = {"model": grey, "seed": 3, "steps": 3, "grid_power": 1.4, "sample_batch": 14, "data_noise": 0.1}
    fashion |= {"images": 39, "tolerance": 1e-4, "max_iterations": 9, "memory": 0, "max_failed": 0.5}
    fashion |= {"corrector_network": "unet:4,8", "corrector_steps": 3, "held_out": 0.4, "updates": 20}
    fashion |= {"batch": 31, "lr": 0.9, "checkpoint_every": 3, "eval_images": 22}
    fashion |= {"eval_corrector_steps": (1, 2), "longer_lr": 0.3}
    folder = {"model": coloured, "data": pictures, "seed": 1, "steps": 3, "sample_batch": 16}
    folder |= {"data_noise": 0.3, "reference_share": 0.37, "images": 45, "tolerance": 1e-3}
    folder |= {"max_iterations": 4, "max_failed": 0.5, "corrector_network": "token:8,8", "features": "pixels"}
    folder |= {"corrector_steps": 3, "normalise": "gaussian", "updates": 10, "batch": 16, "lr": 0.9}
    folder |= {"checkpoint_every": 4, "eval_images": 70, "eval_steps": (7, 2), "eval_corrector_steps": ()}
    little = {"model": small, "data": many, "seed": 7, "steps": 2, "sample_batch": 100, "images": 178}
    little |= {"corrector_network": "token:4", "corrector_steps": 1, "updates": 130, "checkpoint_every": 50}
    little |= {"batch": 12, "lr": 1e-2, "features": "pixels", "eval_images": 30, "longer": False}
    little |= {"reference_share": 0.1, "eval_steps": (3,), "eval_corrector_steps": (2,)}
    # one noise less than ten for each number of an image
    fewer = little | {"images": 177, "updates": 20, "seed": 8}
    worse = little | {"lr": 1.0, "updates": 5, "batch": 1, "checkpoint_every": 2}
    stopped = little | {"images": 60, "sample_batch": 25, "updates": 8, "lr": 1.0, "checkpoint_every": 3}
    stopped |= {"longer": True, "corrector_network": "unet:4", "seed": 4, "eval_corrector_steps": ()}
    return {
        "fashion": fashion,
        "folder": folder,
        "little": little,
        "fewer": fewer,
        "worse": worse,
        "stopped": stopped,
    }


@pytest.fixture(scope="module")
def run_once(settings, tmp_path_factory):
    return functools.cache(lambda name: do_run(tmp_path_factory.mktemp("runs") / name, **settings[name]))


@pytest.fixture(params=["fashion", "folder"])
def ran(request, run_once):
    return run_once(request.param)


# ---------------------------------------------------------------- the comparison


def test_images_and_their_noises(ran):
    """Which images are inverted, by which iteration, to which noises; which are left out and counted."""
    plain, report = ran.plain, ran.results["inversion"]
    images, mine = plain.images["invert"], plain.inversion
    kept = [i for i, z in enumerate(mine["noise"]) if z is not None]
    assert len(images) == ran.args.images and 20 < len(kept) < len(images) - 2
    noises = torch.stack([mine["noise"][i] for i in kept])
    if ran.args.memory == 0:
        assert torch.equal(plain.noises, noises)
    assert torch.allclose(plain.noises, noises, atol=1e-5)
    assert (noises - images[kept]).std() > 0.1
    error = plain.sample(plain.flow, plain.noises, plain.sigmas) - images[kept]
    error = error.square().mean((1, 2, 3)).sqrt()
    expected = {"images": len(images), "left_out": len(images) - len(kept), "calls": mine["calls"]}
    expected |= {"largest_residual": pytest.approx(max(mine["residual"]), rel=1e-3)}
    expected |= {"round_trip_error": pytest.approx(error.mean().item(), rel=1e-3)}
    expected |= {"largest_round_trip_error": pytest.approx(error.max().item(), rel=1e-3)}
    for name in ("iterations", "contraction"):
        expected[name] = pytest.approx(np.mean(mine[name], axis=0).tolist(), rel=1e-5)
    assert report == expected | {"flops": mine["calls"] * plain.call_flops}
    left_out = f"{len(images) - len(kept)} of {len(images)} left out, {mine['calls']} model calls"
    assert left_out in ran.seen.out.getvalue()
    # what was really called until the corrector is called first: once to count, to invert, to go back
    channels = ran.seen.calls[0][0]
    before = next(i for i, one in enumerate(ran.seen.calls) if one[0] != channels)
    called = sum(count for _, count, _ in ran.seen.calls[:before])
    assert called == 1 + report["calls"] + ran.args.steps * len(kept)


def test_training_of_the_corrector(ran):
    """Split, standardisation, draws, loss, clipped gradient, optimiser, average, held-out loss: the rows of
    metrics.csv and the weights that are kept."""
    plain = ran.plain
    trained, count = plain.trained, len(plain.noises)
    assert len(plain.held_out) == {"fashion": round(0.4 * count), "folder": 10}[ran.folder.name]
    rows = read_metrics(ran.folder)
    assert rows == [{name: str(value) for name, value in row.items()} for row in trained.rows]
    assert min(trained.norms) < 1 < max(trained.norms)  # some gradients are clipped, some are not
    losses = [row["held_out"] for row in trained.rows]
    assert min(losses) < losses[0]
    if ran.folder.name == "folder":
        assert losses.index(min(losses)) not in (0, len(losses) - 1)
    assert ran.results["corrector"] == {
        "held_out": min(losses),
        "identity": losses[0],
        "flops": plain.corrected_flops(ran.args.corrector_steps) - ran.args.steps * plain.call_flops,
    }
    printed = f"held-out loss {min(losses):.4f}, {losses[0]:.4f} with velocity 0"
    assert printed in ran.seen.out.getvalue()


def digest(network):
    """SHA-256 of the names and the weights."""
    content = [name.encode() + p.numpy().tobytes() for name, p in sorted(network.state_dict().items())]
    return hashlib.sha256(type(network).__name__.encode() + b"".join(content)).hexdigest()


def test_folder_of_the_corrector(ran):
    """The best averaged weights; the training noises' scale, mean and covariance; the sampler it is for."""
    plain, folder = ran.plain, ran.folder / "corrector"
    files, kind = {"config.json", "diffusion_pytorch_model.safetensors", "corrector.json"}, "scale"
    if ran.folder.name == "folder":
        files, kind = files | {"gaussian.safetensors"}, "gaussian"
        stored = load_file(folder / "gaussian.safetensors")
        for name, expected in zip(("mean", "root", "inverse"), plain.gaussian):
            assert np.allclose(stored[name].numpy(), expected, rtol=1e-4, atol=1e-5 * abs(expected).max())
    assert {file.name for file in folder.iterdir()} == files
    stored = type(plain.trained.network).from_pretrained(str(folder)).state_dict()
    expected = plain.trained.network.state_dict()
    assert stored.keys() == expected.keys() and all(torch.equal(stored[n], expected[n]) for n in stored)
    scale = np.sqrt(np.mean(plain.training.double().numpy() ** 2))
    times = [sigma * plain.train_timesteps for sigma in plain.sigmas[:-1].tolist()]
    assert plain.settings == {
        "model_hash": digest(plain.flow),
        "steps": ran.args.steps,
        "grid_power": ran.args.grid_power,
        "sigmas": pytest.approx(plain.sigmas.tolist(), rel=1e-6),
        "timesteps": pytest.approx(times, rel=1e-6),
        "scale": pytest.approx(scale, rel=1e-6),
        "corrector_steps": ran.args.corrector_steps,
        "normalise": kind,
    }
    assert ran.results["scale"] == plain.settings["scale"]


def test_base_trained_on(ran):
    """For as many updates as inversion and corrector cost, on its own images and draws; averaged weights."""
    longer, training = ran.plain.longer, ran.plain.training_flops
    assert ran.results["training_flops"] == training and longer.updates > 10
    assert (min(longer.norms) < 1 < max(longer.norms)) == (ran.folder.name == "fashion")
    printed = f"base trained on for {longer.updates} updates, as many FLOPs as inversion and corrector took"
    assert printed in ran.seen.out.getvalue()
    state = torch.load(ran.folder / "checkpoint.pt", weights_only=True)["longer"]
    assert state["update"] == longer.updates and state["losses"] == longer.snapshots[longer.updates]["losses"]
    weights = longer.network.state_dict()
    assert all(torch.equal(state["weights"][name], weights[name]) for name in weights)
    assert not {"average", "optimizer"} & set(state)


def test_rows(ran):
    """Every row: which flow, from which noise, on which grid; the distance of exactly these images."""
    plain, table = ran.plain, ran.results["table"]
    stored = torch.load(ran.folder / "checkpoint.pt", weights_only=True)["rows"]
    assert [(row["arm"], row["steps"]) for row in table] == [row[:2] for row in plain.rows]
    assert len({row["fd"] for row in table}) == len(table) > 8
    for row, kept, (arm, _, distance, flops, images) in zip(table, stored, plain.rows, strict=True):
        assert set(row) == {"arm", "steps", "fd", "flops"} and row["flops"] == flops, arm
        assert row["fd"] == pytest.approx(distance, rel=1e-5 if "gaussian" in arm else 1e-6, abs=3e-5), arm
        assert torch.allclose(kept["images"], images[:8], atol=1e-4 if "gaussian" in arm else 1e-6), arm
        assert len(kept["images"]) == 8 and row == {name: kept[name] for name in row}
    assert ran.results["matched_steps"] == plain.matched_steps not in (ran.args.steps, 2 * ran.args.steps)
    assert ran.results["steps"] == ran.args.steps


def test_floor(ran):
    """Data against data. Of a folder there may be fewer images than in a row; then the output says so."""
    images = ran.plain.images["floor"]
    distance = frechet(ran.plain.reference, ran.plain.features(images))
    assert ran.results["floor"] == pytest.approx(distance, rel=1e-6, abs=3e-5)
    count = {"fashion": 22, "folder": 63}[ran.folder.name]
    assert ran.results["floor_images"] == len(images) == count
    assert (count < ran.args.eval_images) == (ran.folder.name == "folder")
    printed = rf"data against data, {count} images +{ran.results['floor']:.4f}"
    assert re.search(printed, ran.seen.out.getvalue())


def test_noise_statistics(ran):
    expected = {name: statistics(z) for name, z in ran.plain.shown.items()}
    assert list(ran.results["noise"]) == list(expected) == ["inverted", "standard", "gaussian", "corrector"]
    for name, values in expected.items():
        assert ran.results["noise"][name] == pytest.approx(values, rel=1e-5, abs=1e-6), name


def test_seeds(ran):
    """All seeds that were drawn from, and how often: no update's twice, none of the evaluation in training,
    and the evaluation's do not depend on --seed."""
    plain, args = ran.plain, ran.args
    training = [seed_of(args.seed, "corrector", i) for i in range(args.updates)]
    training += [seed_of(args.seed, "longer", i) for i in range(plain.longer.updates)]
    rows, count = len(plain.rows), len(plain.noises)
    evaluation = rows * [seed_of("eval", i) for i in range(args.eval_images)]
    evaluation += [seed_of("statistics", i) for i in range(count)]
    others = [seed_of("data noise", name) for name in plain.images] + 2 * [0]  # 0: to count operations
    others += len(plain.trained.rows) * [seed_of("held out")] + (["split"] if args.data else [])
    others = [seed_of(seed) if seed == "split" else seed for seed in others]
    assert Counter(ran.seen.seeds) == Counter(training + evaluation + others)
    assert len(set(training)) == len(training) and not set(training) & set(evaluation + others)
    assert len(set(evaluation)) == args.eval_images + count
    assert not ran.seen.drawn  # nothing is drawn from numpy


def test_printed(ran):
    """The table's lines and the settings before it."""
    out, results, plain = ran.seen.out.getvalue(), ran.results, ran.plain
    batches = math.ceil(ran.args.eval_images / ran.args.sample_batch)
    seconds = results["seconds"]
    assert seconds == {
        "total": ran.seen.ticks - 1,
        "per_image": [batches / ran.args.eval_images] * len(plain.rows),
    }
    lines = out[out.index("Frechet distance\n") :].splitlines()[1:]
    for line, row in zip(lines, results["table"]):
        cost = [f"{row['flops'] / 1e6:.1f}", f"{1e3 * batches / ran.args.eval_images:.2f}"]
        assert line.rsplit(maxsplit=4) == [row["arm"], str(row["steps"]), *cost, f"{row['fd']:.4f}"]
    lines = out[out.index("\nnoise  ") :].splitlines()[1:]
    assert lines[0].split() == ["noise", *results["noise"]]
    for line, name in zip(lines[1:], results["noise"]["inverted"]):
        assert line.split() == [name, *(f"{values[name]:.3f}" for values in results["noise"].values())]
    counts = f"{ran.args.eval_images} images a row against {len(plain.images['reference'])}, "
    assert counts in out and f"\n  inversion  {ran.args.images} images, " in out
    parameters = [
        sum(p.numel() for p in network.parameters()) for network in (plain.flow, plain.trained.network)
    ]
    assert re.search(r" ([\d,]+) parameters, images", out)[1] == f"{parameters[0]:,}"
    assert f"corrector  {parameters[1]:,} parameters, " in out


def test_figures(ran):
    """What the three figures show."""
    plain, figures = ran.plain, ran.seen.figures
    assert set(figures) == {"curve.png", "noise.png", "grid.png"}
    lines, points = figures["curve.png"].axes[0].lines, {}
    for row in ran.results["table"]:
        points.setdefault(row["arm"], []).append((row["flops"] / 1e6, row["fd"]))
    assert {line.get_label(): list(zip(*line.get_data())) for line in lines[:-1]} == points
    assert set(lines[-1].get_ydata()) == {ran.results["floor"]}

    norms, values, lags, deviation, *_ = figures["noise.png"].axes
    names, shown = list(ran.results["noise"]), [z.numpy() for z in plain.shown.values()]
    for axis in (norms, values):
        assert [patch.get_label() for patch in axis.patches] == names
    for z, name, norm, value, lag in zip(shown, names, norms.patches, values.patches, lags.lines):
        length = np.sqrt((z.reshape(len(z), -1) ** 2).mean(1))
        heights = np.histogram(length, 40, density=True)[0]
        assert norm.get_xy()[:, 1].max() == pytest.approx(heights.max(), rel=1e-3)
        assert norm.get_xy()[:, 0].min() == pytest.approx(length.min(), abs=1e-5)
        heights = np.histogram(z.flatten()[:100_000], np.linspace(-6, 6, 61), density=True)[0]
        assert value.get_xy()[:, 1].max() == pytest.approx(heights.max(), rel=1e-3)
        report = ran.results["noise"][name]
        assert lag.get_label() == name
        assert list(lag.get_ydata()) == [report["correlation_1"], report["correlation_2"]]
    by_pixel = plain.noises.numpy().std(0, ddof=1).mean(0)
    assert np.allclose(deviation.images[0].get_array(), by_pixel, atol=1e-5)

    strips = {"data": plain.images["floor"][:8]}
    for arm, steps, *_, images in plain.rows:
        if arm in ("base", "scale only", "gaussian", "corrector"):
            strips[f"{arm}, {steps} steps"] = images[:8]
    strips |= {f"noise: {name}": z[:8] / 3 for name, z in plain.shown.items()}
    axes = figures["grid.png"].axes
    assert [axis.get_title("left") for axis in axes] == list(strips)
    size = plain.shape[1]
    for axis, images in zip(axes, strips.values(), strict=True):
        strip = np.asarray(axis.images[0].get_array())
        assert strip.shape == (size + 2, 8 * (size + 2), 3)
        for i, image in enumerate(images.clamp(-1, 1)):
            own = strip[:, i * (size + 2) :][:, : size + 2]
            assert own[0].min() == own[-1].min() == own[:, 0].min() == own[:, -1].min() == 1  # a white frame
            expected = (image.permute(1, 2, 0).expand(-1, -1, 3).numpy() + 1) / 2
            assert np.allclose(own[1:-1, 1:-1], expected, atol=1e-4)


# ---------------------------------------------------------------- other settings


@pytest.mark.parametrize("name, kind, training", [("little", "gaussian", 160), ("fewer", "scale", 159)])
def test_normalise_auto(run_once, name, kind, training):
    """A Gaussian if there are ten noises for each of an image's 16 numbers. Also 130 updates: the warm-up is
    over after 100."""
    ran = run_once(name)
    assert len(ran.plain.training) == training and ran.plain.settings["normalise"] == kind
    rows = [{key: str(value) for key, value in row.items()} for row in ran.plain.trained.rows]
    assert read_metrics(ran.folder) == rows
    assert all(
        row["fd"] == pytest.approx(own[2], rel=1e-5) for row, own in zip(ran.results["table"], ran.plain.rows)
    )
    assert [row["arm"] for row in ran.results["table"]] == [own[0] for own in ran.plain.rows]
    # of 180 images as many as in a row, the first
    assert ran.results["floor_images"] == len(ran.plain.images["floor"]) == 30
    distance = frechet(ran.plain.reference, ran.plain.features(ran.plain.images["floor"]))
    assert ran.results["floor"] == pytest.approx(distance, rel=1e-6, abs=1e-6)


def test_untrained_corrector_may_be_the_best(run_once):
    """Then its noise is the control's."""
    ran = run_once("worse")
    best = ran.plain.trained.rows[0]["held_out"]
    assert all(row["held_out"] > best for row in ran.plain.trained.rows[1:])
    assert ran.results["corrector"]["held_out"] == ran.results["corrector"]["identity"] == best
    table = {(row["arm"], row["steps"]): row["fd"] for row in ran.results["table"]}
    assert table["corrector", 2] == table["corrector, M = 2", 2] == table["gaussian", 2]


def test_evaluation_does_not_depend_on_the_seed(run_once):
    """Nor on how long was trained: the base's rows and the floor are the same in both runs."""
    one, other = run_once("little"), run_once("fewer")
    assert one.args.seed != other.args.seed and one.results["floor"] == other.results["floor"]
    pairs = list(zip(one.results["table"], other.results["table"]))
    assert all((a == b) == (a["arm"] == "base") for a, b in pairs) and pairs[1][0]["arm"] == "base"


def test_images_too_large_for_a_covariance(settings, tmp_path, monkeypatch):
    """No Gaussian is asked for, nor shown. Here the base is trained on for one update, the least."""
    once = {"updates": 1, "longer": True, "batch": 300, "images": 40}
    for most, arms, changed in (
        (15, [], once),
        (16, ["gaussian", "gaussian, norms matched"], {"updates": 1}),
    ):
        monkeypatch.setattr(inc, "MOST_COVARIANCE", most)
        ran = do_run(tmp_path / str(most), **settings["little"] | changed)
        assert [row["arm"] for row in ran.results["table"]] == [own[0] for own in ran.plain.rows]
        assert [row["arm"] for row in ran.results["table"] if "gaussian" in row["arm"]] == arms
        assert list(ran.results["noise"]) == list(ran.plain.shown)
        assert ran.plain.settings["normalise"] == ("gaussian" if arms else "scale")
        if ran.args.longer:
            assert ran.plain.longer.updates == 1 and "trained on for 1 updates" in ran.seen.out.getvalue()


def test_average_of_a_long_run():
    """It never remembers more than a thousand updates. Of 200,000 some in the middle."""

    def loss(network, generator):
        return network(torch.randn(8, 3, generator=generator)).square().mean()

    network, own, average = (torch.nn.Linear(3, 1) for _ in range(3))
    own.load_state_dict(network.state_dict())
    optimizer, i = torch.optim.AdamW(own.parameters(), weight_decay=0), 100_000
    loss(own, torch.Generator().manual_seed(0)).backward()
    optimizer.step()
    state = {"update": i, "weights": copy_of(own), "losses": [0.0] * i}
    state |= {"optimizer": copy.deepcopy(optimizer.state_dict())}
    state |= {"average": [p.detach().clone() for p in average.parameters()]}
    rounds = inc.fit(network, lambda g: loss(network, g), 2 * i, 0.2, (5, "name"), state, 4)
    assert next(rounds) == i + 4
    for update in range(i, i + 4):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + math.cos(math.pi * update / (2 * i)))
        optimizer.zero_grad()
        value = loss(own, generator_of(5, "name", update))
        value.backward()
        norm = torch.stack([p.grad.norm() for p in own.parameters()]).norm()
        for p in own.parameters():
            p.grad *= (1 / (norm + 1e-6)).clamp(max=1)
        optimizer.step()
        for p, a in zip(own.parameters(), average.parameters()):
            a.data = 0.999 * a.data + 0.001 * p.data
    for p, a in zip(network.parameters(), average.parameters()):
        assert torch.allclose(p, a, atol=1e-6)
    assert all(torch.allclose(state["weights"][name], p, atol=1e-6) for name, p in own.state_dict().items())
    assert state["losses"][-1] == pytest.approx(value.item(), rel=1e-5)


# ---------------------------------------------------------------- stopped and resumed


class Stop(Exception):
    pass


def stop_at(seen, owner, name, count):
    """The count-th call of owner.name ends the run."""
    original, calls = getattr(owner, name), []

    def stopping(*args, **options):
        calls.append(1)
        if len(calls) == count:
            raise Stop
        return original(*args, **options)

    seen.patch.setattr(owner, name, stopping)


def test_resumed(run_once, tmp_path):
    """Stopped in the inversion, between two checkpoints of the corrector and of the base trained on, and in
    the evaluation. Each time it goes on from what was stored; at the end nothing differs."""
    whole = run_once("stopped")
    plain, folder, args = whole.plain, tmp_path / "stopped", whole.args
    updates, legs = plain.longer.updates, []
    losses = [row["held_out"] for row in plain.trained.rows]
    assert losses.index(min(losses)) == 1  # the best is not of the legs that end the training
    stops = [(inc, "euler_invert", 3), (torch.nn.utils, "clip_grad_norm_", 5)]
    stops += [(torch.nn.utils, "clip_grad_norm_", args.updates - 3 + 8), (inc, "frechet_distance", 5), None]
    for stop in stops:
        resumed = inc.Args(**vars(args) | {"output": str(folder)})
        if folder.exists():
            resumed = parse_arguments(inc.Args, ["--resume", str(folder)])
        with recording() as seen:
            if stop:
                stop_at(seen, *stop)
            with pytest.raises(Stop) if stop else contextlib.nullcontext():
                inc.main(resumed)
        stored = folder / "checkpoint.pt"
        state = torch.load(stored, weights_only=True) if stored.exists() else None
        legs.append(SimpleNamespace(seen=seen, state=state))

    def drawn(leg, name, count):
        """The updates that drew in a leg, in order."""
        numbers = {seed_of(args.seed, name, i): i for i in range(count)}
        return [numbers[seed] for seed in legs[leg].seen.seeds if seed in numbers]

    assert [drawn(leg, "corrector", args.updates) for leg in range(5)] == [
        [],
        [0, 1, 2, 3, 4],
        [3, 4, 5, 6, 7],
        [],
        [],
    ]
    assert [drawn(leg, "longer", updates) for leg in range(5)] == [
        [],
        [],
        [*range(8)],
        [*range(6, updates)],
        [],
    ]
    # two batches of the inversion were stored, the third was inverted by the second leg alone
    sampled = [sum(n for channels, n, _ in leg.seen.calls if channels == 1) for leg in legs]
    assert legs[0].state is None and len(list((folder / "inversion").iterdir())) == 3
    third = 60 - 2 * 25
    first_call = next(call for call in legs[1].seen.calls[1:] if call[0] == 1)
    assert first_call[1] == third and sampled[0] > 0

    for leg, name, snapshots in (
        (1, "corrector", plain.trained.snapshots),
        (2, "longer", plain.longer.snapshots),
    ):
        state = legs[leg].state[name]
        snapshot = snapshots[state["update"]]
        assert state["update"] == (3 if name == "corrector" else 6) and state["losses"] == snapshot["losses"]
        assert all(torch.equal(state["weights"][n], p) for n, p in snapshot["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(state["average"], snapshot["average"], strict=True))
        moments = state["optimizer"]["state"]
        for i, expected in enumerate(snapshot["moments"]):
            assert all(torch.equal(moments[i][key], value) for key, value in expected.items())
        if name == "corrector":
            assert state["best"] == snapshot["best"] and str(state["rows"]) == str(snapshot["rows"])
    assert [len(leg.state["rows"]) for leg in legs[1:]] == [0, 0, 3, len(plain.rows)]
    # the last leg samples no row again
    seeds = Counter(legs[4].seen.seeds)
    assert seeds[seed_of("eval", 0)] == len(plain.rows) - 3

    results = json.loads((folder / "results.json").read_text())
    seconds = results.pop("seconds")
    expected = {name: value for name, value in whole.results.items() if name != "seconds"}
    assert results == expected and seconds["per_image"] == whole.results["seconds"]["per_image"]
    assert seconds["total"] == legs[3].state["seconds"] + legs[4].seen.ticks - 1
    for file in ("metrics.csv", "corrector/corrector.json", "corrector/diffusion_pytorch_model.safetensors"):
        assert (folder / file).read_bytes() == (whole.folder / file).read_bytes(), file
