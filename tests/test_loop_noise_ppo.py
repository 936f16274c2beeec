"""The whole loop of noise_ppo.py, made again: tiny real runs beside plain loops that share no code with the
script. Only stock torch, diffusers and PIL are used to compute what is expected."""

import inspect
import io
import itertools
import json
import math
import types
import zlib

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import rewards
import utils.runs
from common import Model
from conftest import randomise, read_metrics, run_inside, stock_pipeline, with_lora

TRAIN = [
    "a red circle left of a blue square",
    "a green square above a red circle",
    "a blue square",
    "a red circle left of a blue square",  # again: it has a place of its own in the schedule
    "a blue circle below a red square below a green circle",
    "a green circle",
    "a red square right of a red circle",
    "a circle",
]
HELD_OUT = [
    "a blue circle above a green square",
    "a red circle above a red square",
    "a green square left of a blue circle above a red square",
    "a square",
    "a red square below a blue circle",
    "a blue square right of a green square",
]
SHAPE = (4, 8, 8)
COLUMNS = "iteration reward loss clip_fraction explained_variance approximate_kl kl_per_dimension mean_rms"
COLUMNS = f"{COLUMNS} mean_rms_own std std_spread reward_held_out".split()
STATISTICS = "brightness contrast saturation jpeg_kb diversity".split()
SETTINGS = {
    "seed": 5,
    "steps": 4,
    "guidance": 1.0,
    "dtype": "float32",
    "sample_batch": 7,
    "iterations": 3,
    "prompts_per_iteration": 3,
    "samples": 5,
    "normalise": "batch",
    "epochs": 2,
    "minibatch": 4,
    "clip": 1e-3,
    "reduction": "mean",
    "kl_weight": 0.05,
    "lr": 0.02,
    "policy": "conditional",
    "mean_only": True,
    "std_only": False,
    "hidden": 24,
    "grid": 2,
    "eval_samples": 4,
    "eval_every": 2,
    "eval_steps": (5,),
    "controls": True,
}


# ---------------------------------------------------------------- rewards that see every swap


def taste(images, prompts):
    """A weighted mean of the pixels; the weights are another draw for each prompt."""
    values = []
    for image, prompt in zip(images, prompts, strict=True):
        weights = np.random.default_rng(zlib.crc32(prompt.encode())).standard_normal((*image.size[::-1], 3))
        values.append(20 * (weights * np.asarray(image, float) / 255).mean())
    return values


def calm(images, prompts):
    """Little contrast, and a little less than nothing for a long prompt."""
    return [-np.asarray(i, float).std() / 50 - len(p) / 100 for i, p in zip(images, prompts, strict=True)]


def lively(images, prompts):
    return [np.asarray(i, float).std() / 50 + len(p) / 100 for i, p in zip(images, prompts, strict=True)]


OWN = {"taste": taste, "calm": calm, "lively": lively}


# ---------------------------------------------------------------- what is expected: seeds, noise, images


def seed_of(*key):
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "big") for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key):
    return torch.Generator().manual_seed(seed_of(*key))


def sampled_prompts(seed, iterations, per_iteration, count):
    """[[numbers of the prompts of an iteration]]: one after the other from a random order, and when too few
    are left, a new order."""
    chosen, orders, left = [], 0, []
    for _ in range(iterations):
        if len(left) < per_iteration:
            left = torch.randperm(count, generator=generator(seed, "prompts", orders)).tolist()
            orders += 1
        chosen.append(left[:per_iteration])
        left = left[per_iteration:]
    return chosen


class Frozen:
    """A frozen pipeline of the hub, and the LoRA that it has above a timestep."""

    def __init__(self, folder, guidance, dtype, lora=None, switch=-1):
        self.guidance, self.dtype, self.switch = guidance, dtype, switch
        self.pipe = self.tuned = stock_pipeline(folder, dtype)
        self.stable_diffusion = type(self.pipe).__name__ == "StableDiffusionPipeline"
        config = self.pipe.scheduler.config
        if hasattr(self.pipe, "unet"):  # no flow
            options = {"timestep_spacing": "trailing", "clip_sample": False}
            self.pipe.scheduler = self.pipe.scheduler.from_config(config, **options)
        if lora:
            self.tuned = stock_pipeline(folder, dtype)
            self.tuned.load_lora_weights(lora)
            self.tuned.fuse_lora()

    def text(self, prompts):
        """(token states (n, tokens, width), what the policy reads (n, rows, width))"""
        signature = inspect.signature(self.pipe.encode_prompt).parameters
        options = {name: None for name in ("prompt_2", "prompt_3") if name in signature}
        options |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        with torch.no_grad():
            states, _, *pooled = self.pipe.encode_prompt(prompt=prompts, **options)
        return states, pooled[0][:, None] if pooled else states

    @torch.no_grad()
    def images(self, prompts, z, steps):
        """One batch of PIL images of the prompts from the initial noises z: DDIM, eta 0, trailing steps."""
        z = z.to(self.dtype)
        if not self.stable_diffusion:
            options = {"latents": z, "num_inference_steps": steps, "guidance_scale": self.guidance}
            return self.pipe(prompts, **options).images
        x, states = z.float(), self.text(prompts)[0]
        abar, last = self.pipe.scheduler.alphas_cumprod, self.pipe.scheduler.final_alpha_cumprod
        levels = [1000 - 1000 // steps * k - 1 for k in range(steps)]
        for k, t in enumerate(levels):
            unet = self.tuned.unet if t > self.switch else self.pipe.unet
            if self.guidance > 1:
                empty = self.text([""])[0].expand_as(states)
                both = torch.cat([x, x]).to(self.dtype), t, torch.cat([empty, states])
                without, conditional = unet(*both).sample.float().chunk(2)
                output = without + self.guidance * (conditional - without)
            else:
                output = unet(x.to(self.dtype), t, states).sample.float()
            now, then = abar[t].item(), (abar[levels[k + 1]] if k + 1 < steps else last).item()
            signal, noise = math.sqrt(now), math.sqrt(1 - now)
            if self.pipe.scheduler.config.prediction_type == "epsilon":
                clean, eps = (x - noise * output) / signal, output
            else:
                clean, eps = signal * x - noise * output, signal * output + noise * x
            x = math.sqrt(then) * clean + math.sqrt(1 - then) * eps
        pixels = self.pipe.vae.decode(x.to(self.dtype) / self.pipe.vae.config.scaling_factor).sample
        pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
        return [Image.fromarray(p) for p in (pixels * 255).round().astype("uint8")]


# ---------------------------------------------------------------- what is expected: the policy


class Policy(torch.nn.Module):
    """mu and log sigma of a prompt."""

    def __init__(self, seed, features, shape, settings):
        super().__init__()
        self.settings, self.shape = settings, shape
        torch.manual_seed(seed)
        hidden, self.cells = settings.hidden, min(settings.grid, shape[1])
        self.one, self.norm_one = torch.nn.Linear(features[0].numel(), hidden), torch.nn.LayerNorm(hidden)
        self.two, self.norm_two = torch.nn.Linear(hidden, hidden), torch.nn.LayerNorm(hidden)
        self.last = torch.nn.Linear(hidden, 2 * shape[0] * self.cells**2)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.bias.zero_()
        self.centre = features.float().mean(0)
        self.scale = 1 / (features.float().var(0, correction=0).sqrt() + 0.01)

    def forward(self, features):
        x = ((features.float() - self.centre) * self.scale).flatten(1)
        if self.settings.policy == "unconditional":
            x = torch.zeros_like(x)
        gelu = torch.nn.functional.gelu
        x = self.last(gelu(self.norm_two(self.two(gelu(self.norm_one(self.one(x)))))))
        x = x.reshape(len(x), 2 * self.shape[0], self.cells, self.cells)
        x = torch.nn.functional.interpolate(x, self.shape[1:], mode="bilinear", align_corners=False)
        mean, log_std = x[:, : self.shape[0]], x[:, self.shape[0] :]
        if self.settings.std_only:
            mean = torch.zeros_like(mean)
        if self.settings.mean_only:
            log_std = torch.zeros_like(log_std)
        return mean, log_std

    def named(self):
        """The tensors under their names in policy.safetensors."""
        names = {"body.0": self.one, "body.1": self.norm_one, "body.3": self.two, "body.4": self.norm_two}
        names["head"] = self.last
        tensors = {"centre": self.centre, "scale": self.scale}
        for name, module in names.items():
            tensors |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def densities(z, mean, log_std):
    """(n, numbers of a latent): the terms of log pi(z)"""
    each = -(((z - mean) * torch.exp(-log_std)) ** 2) * 0.5 - log_std - 0.5 * math.log(2 * math.pi)
    return each.reshape(len(z), -1)


def divergences(mean, log_std):
    """(n,): KL to N(0, I) in nats"""
    each = 0.5 * (mean**2 + torch.exp(2 * log_std) - 1) - log_std
    return each.reshape(len(mean), -1).sum(1)


# ---------------------------------------------------------------- what is expected: the run


class Expected:
    """A run with these settings, by plain loops. scored: [(prompts, images)] of each batch that is scored;
    gradients, rates: of each update; weights: after each iteration; rows, results, panels: as written."""

    def __init__(self, folder, settings, train, held_out, reward, others=(), lora=None, switch=-1):
        self.settings, self.train, self.held_out, self.reward = settings, train, held_out, reward
        self.others = others
        self.frozen = Frozen(folder, settings.guidance, getattr(torch, settings.dtype), lora, switch)
        self.scored, self.gradients, self.rates, self.weights, self.rows = [], [], [], [], []
        self.used_seeds, self.clipped_sides = {}, set()
        _, probe = self.frozen.text(["", *train])
        self.shape = (
            SHAPE if self.frozen.stable_diffusion else (self.frozen.pipe.vae.config.latent_channels, 8, 8)
        )
        self.dimensions = math.prod(self.shape)
        self.chosen = sampled_prompts(
            settings.seed, settings.iterations, settings.prompts_per_iteration, len(train)
        )
        used = [train[i] for i in range(len(train)) if any(i in numbers for numbers in self.chosen)]
        self.policy = Policy(settings.seed, self.features(used), self.shape, settings)
        self.baseline = self.measure([reward], held_out, None, settings.steps, "eval")[0]
        self.learn()
        self.finish()

    def features(self, prompts):
        return torch.cat([self.frozen.text([prompt])[1] for prompt in prompts])

    def noise(self, tag, keys, dtype):
        """One draw for each key; notes the seeds."""
        self.used_seeds.setdefault(tag, set()).update(seed_of(*key) for key in keys)
        return torch.stack([torch.randn(self.shape, generator=generator(*k), dtype=dtype) for k in keys])

    def make(self, names, prompts, z, steps):
        """({reward or part: (n,)}, images), a batch at a time. names: of rewards, {part: weight} each."""
        scores, images = {}, []
        for i in range(0, len(prompts), self.settings.sample_batch):
            some = prompts[i : i + self.settings.sample_batch]
            made = self.frozen.images(some, z[i : i + len(some)], steps)
            self.scored.append((some, made))
            images += made
        for reward in names:
            total = torch.zeros(len(prompts))
            for part, weight in reward.parts.items():
                scores[part] = torch.tensor(OWN[part.rpartition(":")[2]](images, prompts)).float()
                total += weight * scores[part]
            scores[reward.name] = total
        return scores, images

    def measure(self, names, prompts, noise, steps, tag):
        """({metric: (prompts,)}, images). noise: mu and log sigma of each prompt; None: standard."""
        n = self.settings.eval_samples
        keys = [(tag, i, j) for i in range(len(prompts)) for j in range(n)]
        z = self.noise(tag, keys, getattr(torch, self.settings.dtype))
        if noise is not None:
            z = torch.stack([noise[0][k // n] + noise[1][k // n].exp() * z[k] for k in range(len(z))])
        scores, images = self.make(names, [p for p in prompts for _ in range(n)], z, steps)
        pixels = [np.asarray(image, np.float64) / 255 for image in images]
        scores["brightness"] = [(np.asarray(i.convert("L"), float) / 255).mean() for i in images]
        scores["contrast"] = [(np.asarray(i.convert("L"), float) / 255).std() for i in images]
        scores["saturation"] = [np.asarray(i.convert("HSV"), float)[:, :, 1].mean() / 255 for i in images]
        scores["jpeg_kb"] = []
        for image in images:
            image.save(file := io.BytesIO(), "JPEG", quality=95)
            scores["jpeg_kb"].append(len(file.getvalue()) / 1000)
        groups = [range(i * n, i * n + n) for i in range(len(prompts))]
        means = {}
        for name, values in scores.items():
            means[name] = np.array([np.mean([float(values[k]) for k in group]) for group in groups])
        means["diversity"] = np.array(
            [
                np.mean(
                    [((pixels[a] - pixels[b]) ** 2).mean() ** 0.5 for a, b in itertools.combinations(g, 2)]
                )
                for g in groups
            ]
        )
        for m in (2, 4, 8):
            if n % m == 0:
                values = scores[names[0].name].tolist()
                means[f"best_of_{m}"] = np.array(
                    [np.mean([max(values[k : k + m]) for k in range(g[0], g[0] + n, m)]) for g in groups]
                )
        return means, images

    # ------------------------------------------------------------ training

    def learn(self):
        s, policy = self.settings, self.policy
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=s.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0
        )
        for it, numbers in enumerate(self.chosen):
            prompts = [self.train[number] for number in numbers for _ in range(s.samples)]
            keys = [(s.seed, it, number, j) for number in numbers for j in range(s.samples)]
            eps, text = self.noise("train", keys, torch.float32), self.features(prompts)
            with torch.no_grad():
                old_mean, old_log_std = policy(text)
            z = old_mean + old_log_std.exp() * eps
            old = densities(z, old_mean, old_log_std)
            scores, _ = self.make([self.reward], prompts, z, s.steps)
            rewarded = scores[self.reward.name]
            advantage = self.advantages(rewarded)
            optimizer.param_groups[0]["lr"] = s.lr * (s.iterations - it) / s.iterations
            shuffle, losses, fractions = generator(s.seed, "update", it), [], []
            for order in [torch.randperm(len(z), generator=shuffle) for _ in range(s.epochs)]:
                for start in range(0, len(z), s.minibatch):
                    index = order[start : start + s.minibatch]
                    mean, log_std = policy(text[index])
                    difference, kl = densities(z[index], mean, log_std), divergences(mean, log_std)
                    if s.reduction == "mean":
                        difference = difference.mean(1) - old[index].mean(1)
                        kl = kl / self.dimensions
                    else:
                        difference = difference.sum(1) - old[index].sum(1)
                    ratio, terms = difference.exp(), []
                    for rho, a in zip(ratio, advantage[index]):
                        cut = rho.clamp(1 - s.clip, 1 + s.clip) * a
                        terms.append(torch.minimum(rho * a, cut))
                        if (rho * a - cut).item() > 0:
                            self.clipped_sides.add((rho.item() > 1, a.item() > 0))
                    loss = -sum(terms) / len(terms) + s.kl_weight * kl.mean()
                    optimizer.zero_grad()
                    loss.backward()
                    self.gradients.append([p.grad.clone() for p in policy.parameters()])
                    self.rates.append(optimizer.param_groups[0]["lr"])
                    optimizer.step()
                    losses.append(loss.item())
                    fractions.append(np.mean([abs(rho - 1) > s.clip for rho in ratio.tolist()]))
            self.weights.append(policy.named())
            self.rows.append(
                {
                    "iteration": it + 1,
                    "reward": np.mean(rewarded.tolist()),
                    "loss": np.mean(losses),
                    "clip_fraction": np.mean(fractions),
                    "explained_variance": self.explained_variance(rewarded.tolist()),
                    **self.moved(text, z, old),
                    "reward_held_out": math.nan,
                }
            )
            if len(self.reward.parts) > 1:
                self.rows[-1] |= {part: np.mean(scores[part].tolist()) for part in self.reward.parts}
            if it + 1 == s.iterations or s.eval_every and (it + 1) % s.eval_every == 0:
                with torch.no_grad():
                    learnt = policy(self.features(self.held_out))
                means, _ = self.measure([self.reward], self.held_out, learnt, s.steps, "eval")
                self.rows[-1]["reward_held_out"] = means[self.reward.name].mean()

    def advantages(self, rewarded):
        groups = rewarded.reshape(-1, self.settings.samples)
        centred = torch.stack([group - group.mean() for group in groups])
        if self.settings.normalise == "batch":
            centred = centred / (centred**2).mean().sqrt()
        elif self.settings.normalise == "prompt":
            centred = torch.stack([group / (group**2).mean().sqrt() for group in centred])
        return centred.flatten()

    def explained_variance(self, rewarded):
        residuals, n = [], self.settings.samples
        for k, value in enumerate(rewarded):
            first = k // n * n
            others = [rewarded[i] for i in range(first, first + n) if i != k]
            residuals.append(value - np.mean(others))
        return 1 - np.var(residuals) / np.var(rewarded)

    def moved(self, text, z, old):
        """The columns on the new policy and how far it is from the old one."""
        with torch.no_grad():
            mean, log_std = self.policy(text)
        nats = (densities(z, mean, log_std) - old).sum(1).double()
        std, common = log_std.double().exp(), mean.double().mean(0)
        return {
            "approximate_kl": (nats**2).mean().item() / 2,
            "kl_per_dimension": divergences(mean, log_std).double().mean().item() / self.dimensions,
            "mean_rms": (mean.double() ** 2).mean().item() ** 0.5,
            "mean_rms_own": ((mean.double() - common) ** 2).mean().item() ** 0.5,
            "std": std.mean().item(),
            "std_spread": std.std().item(),
        }

    # ------------------------------------------------------------ the final evaluation

    @torch.no_grad()
    def finish(self):
        s, everything = self.settings, [self.reward, *self.others]
        zero = torch.zeros(len(self.held_out), *self.shape)
        learnt = self.policy(self.features(self.held_out))
        noises = {"standard": None, "learnt": learnt}
        kl = divergences(*learnt).mean().item()
        self.results = {"kl": kl, "kl_per_dimension": kl / self.dimensions}
        if s.controls:
            tuning = self.train[: max(2, len(self.held_out) // 2)]
            found = {}
            for scale in (0.4, 0.6, 0.8, 1.0):
                noise = (zero, zero + math.log(scale))
                means, _ = self.measure([self.reward], tuning, noise, s.steps, "temperature")
                found[scale] = means[self.reward.name].mean()
            self.by_temperature = found
            best = self.results["temperature"] = max(found, key=found.get)
            noises["temperature"] = (zero, zero + math.log(best))
            if s.policy == "conditional":
                unique = sorted(set(self.train))
                parts = [part.mean(0) for part in self.policy(self.features(unique))]
                noises["one_for_all"] = [part.expand_as(zero) for part in parts]
        self.results["by_steps"], self.grid = [], {}
        for steps in sorted({s.steps, *s.eval_steps}):
            metrics = {}
            for name, noise in noises.items():
                if name == "temperature" and best == 1:  # the same noise: not made again
                    metrics[name] = metrics["standard"]
                    continue
                metrics[name], images = self.measure(everything, self.held_out, noise, steps, "eval")
                if steps == s.steps:
                    self.grid[name] = images
            self.results["by_steps"].append(self.summary(steps, metrics))
            if steps == s.steps:
                self.results["table"] = [self.compared(metrics, name) for name in metrics["standard"]]

    def compared(self, metrics, name):
        standard, learnt = metrics["standard"][name], metrics["learnt"][name]
        gains = [b - a for a, b in zip(standard, learnt)]
        row = {
            "metric": name,
            "standard": np.mean(standard),
            "learnt": np.mean(learnt),
            "gain": np.mean(gains),
        }
        spread = sum((gain - row["gain"]) ** 2 for gain in gains) / (len(gains) - 1)
        return row | {"se": (spread / len(gains)) ** 0.5}

    def summary(self, steps, metrics):
        name = self.reward.name
        row = self.compared(metrics, name) | {"steps": steps}
        del row["metric"]
        row["calls"] = steps if self.settings.guidance == 1 else 2 * steps
        row |= {arm: metrics[arm][name].mean() for arm in metrics}
        row |= {m: v.mean() for m, v in metrics["standard"].items() if m.startswith("best_of_")}
        kept = [metrics[arm]["diversity"].mean() for arm in ("learnt", "standard")]
        row["diversity_kept"] = kept[0] / kept[1]
        row["means"] = {arm: {m: v.mean() for m, v in means.items()} for arm, means in metrics.items()}
        return row
