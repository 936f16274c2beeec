"""The whole loop of noise_ppo.py, made again: tiny real runs beside plain loops that share no code with the
script. What is expected is computed by stock torch, diffusers and PIL, in the order in which the script adds:
images, gradients and weights are equal to the last digit, means to 1e-6."""

import copy
import inspect
import io
import itertools
import json
import math
import re
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
import utils.figures
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
SETTINGS = {
    "seed": 5,
    "steps": 4,
    "guidance": 1.0,
    "dtype": "float32",
    "sample_batch": 13,
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
    """A frozen stock pipeline, and the LoRA that it has above a timestep."""

    def __init__(self, folder, guidance, dtype, lora=None, switch=-1):
        self.guidance, self.dtype, self.switch, self.texts = guidance, dtype, switch, {}
        self.pipe = self.tuned = stock_pipeline(folder, dtype)
        self.flow = hasattr(self.pipe, "transformer")
        if not self.flow:
            options = {"timestep_spacing": "trailing", "clip_sample": False}
            self.pipe.scheduler = self.pipe.scheduler.from_config(self.pipe.scheduler.config, **options)
        if lora:
            self.tuned = stock_pipeline(folder, dtype)
            self.tuned.load_lora_weights(lora)
            self.tuned.fuse_lora()

    @torch.no_grad()
    def encode(self, prompts):
        """Remember their token states (tokens, width) and pooled embedding (width,) or None."""
        options = {"prompt_2": None, "prompt_3": None} if self.flow else {}
        options |= {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        states, _, *pooled = self.pipe.encode_prompt(prompt=prompts, **options)
        for i, prompt in enumerate(prompts):
            self.texts[prompt] = states[i], pooled[0][i] if pooled else None

    def text(self, prompt):
        if prompt not in self.texts:
            self.encode([prompt])
        return self.texts[prompt]

    def features(self, prompts):
        """What the policy reads (n, rows, width): the pooled embedding where there is one."""
        texts = [self.text(prompt) for prompt in prompts]
        return torch.stack([states if pooled is None else pooled[None] for states, pooled in texts])

    def levels(self, steps):
        """[(timestep, signal, noise)], and of the clean image"""
        if self.flow:
            self.pipe.scheduler.set_timesteps(steps)
            times = self.pipe.scheduler.timesteps.tolist()
            return [(t, 1 - t / 1000, t / 1000) for t in times] + [(None, 1, 0)]
        times = [1000 - 1000 // steps * k - 1 for k in range(steps)]
        left = [self.pipe.scheduler.alphas_cumprod[t].item() for t in times]
        levels = [(t, math.sqrt(part), math.sqrt(1 - part)) for t, part in zip(times, left)]
        left = self.pipe.scheduler.final_alpha_cumprod.item()
        return [*levels, (None, math.sqrt(left), math.sqrt(1 - left))]

    def predict(self, x, t, prompts):
        states = torch.stack([self.text(prompt)[0] for prompt in prompts])
        if self.flow:
            pooled = torch.stack([self.text(prompt)[1] for prompt in prompts])
            return self.pipe.transformer(x.to(self.dtype), states, pooled, torch.tensor([t] * len(x))).sample
        unet = self.tuned.unet if t > self.switch else self.pipe.unet
        if self.guidance == 1:
            return unet(x.to(self.dtype), t, states).sample.float()
        empty = torch.stack([self.text("")[0] for _ in prompts])
        output = unet(torch.cat([x, x]).to(self.dtype), t, torch.cat([empty, states])).sample.float()
        return output[: len(x)] + self.guidance * (output[len(x) :] - output[: len(x)])

    @torch.no_grad()
    def images(self, prompts, z, steps):
        """One batch of PIL images of the prompts from the initial noises z: DDIM with eta 0 and trailing
        steps, or Euler's steps."""
        x, levels = z.to(self.dtype).float(), self.levels(steps)
        for (t, signal, noise), (_, next_signal, next_noise) in zip(levels, levels[1:]):
            output = self.predict(x, t, prompts)
            if self.flow:
                clean, eps = x - noise * output, x + signal * output
            elif self.pipe.scheduler.config.prediction_type == "epsilon":
                clean, eps = (x - noise * output) / signal, output
            else:
                clean, eps = signal * x - noise * output, signal * output + noise * x
            x = next_signal * clean + next_noise * eps
        config = self.pipe.vae.config
        pixels = x.to(self.dtype) / config.scaling_factor + (config.shift_factor or 0)
        pixels = (self.pipe.vae.decode(pixels).sample / 2 + 0.5).clamp(0, 1)
        pixels = pixels.permute(0, 2, 3, 1).float().numpy()
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
        self.scale = 1 / (features.float().std(0, correction=0) + 0.01)

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
    """A run with these settings, by plain loops.

    scored: [(prompts, images)] of each batch; stages: how many batches are scored before each iteration, and
    before the final evaluation. gradients, rates: of each update; weights: after each iteration; rows of
    metrics.csv; results of results.json; grid: {noise: images}. used_seeds: {what for: [seeds]}.
    """

    def __init__(self, folder, settings, train, held_out, reward, others=(), lora=None, switch=-1):
        self.settings, self.train, self.held_out, self.reward = settings, train, held_out, reward
        self.folder, self.lora, self.others = folder, lora, others
        self.frozen = Frozen(folder, settings.guidance, getattr(torch, settings.dtype), lora, switch)
        self.scored, self.stages, self.gradients, self.rates = [], [], [], []
        self.weights, self.rows, self.used_seeds, self.clipped_sides = [], [], {}, set()
        self.shape = (self.frozen.pipe.vae.config.latent_channels, 8, 8)
        self.dimensions = math.prod(self.shape)
        self.chosen = sampled_prompts(
            settings.seed, settings.iterations, settings.prompts_per_iteration, len(train)
        )
        self.sampled = {number for numbers in self.chosen for number in numbers}
        used = [train[number] for number in sorted(self.sampled)]
        self.frozen.encode(list(dict.fromkeys([*held_out, *used])))  # together: rounded as in the run
        self.policy = Policy(settings.seed, self.frozen.features(used), self.shape, settings)
        self.baseline = self.measure([reward], held_out, None, settings.steps, "eval")[0]
        self.learn()
        self.finish()

    def note(self, tag, *keys):
        self.used_seeds.setdefault(tag, []).extend(seed_of(*key) for key in keys)

    def noise(self, tag, keys, dtype):
        """One draw for each key; notes the seeds."""
        self.note(tag, *keys)
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
            parts = {
                p: torch.tensor(OWN[p.rpartition(":")[2]](images, prompts)).float() for p in reward.parts
            }
            total = torch.zeros(len(prompts))
            for part, weight in reward.parts.items():
                total += weight * parts[part]
            scores |= {reward.name: total} | (parts if len(parts) > 1 else {})
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
            self.stages.append(len(self.scored))
            prompts = [self.train[number] for number in numbers for _ in range(s.samples)]
            keys = [(s.seed, it, number, j) for number in numbers for j in range(s.samples)]
            eps, text = self.noise("train", keys, torch.float32), self.frozen.features(prompts)
            with torch.no_grad():
                old_mean, old_log_std = policy(text)
            z = old_mean + old_log_std.exp() * eps
            old = densities(z, old_mean, old_log_std)
            scores, _ = self.make([self.reward], prompts, z, s.steps)
            rewarded = scores[self.reward.name]
            advantage = self.advantages(rewarded)
            optimizer.param_groups[0]["lr"] = s.lr * (s.iterations - it) / s.iterations
            self.note("update", (s.seed, "update", it))
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
                    loss = s.kl_weight * kl.mean() - torch.stack(terms).mean()
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
                    **{p: np.mean(scores[p].tolist()) for p in self.reward.parts if p != self.reward.name},
                    **self.moved(text, z, old),
                    "reward_held_out": math.nan,
                }
            )
            if it + 1 == s.iterations or s.eval_every and (it + 1) % s.eval_every == 0:
                with torch.no_grad():
                    learnt = policy(self.frozen.features(self.held_out))
                means, _ = self.measure([self.reward], self.held_out, learnt, s.steps, "eval")
                self.rows[-1]["reward_held_out"] = means[self.reward.name].mean()

    def advantages(self, rewarded):
        def mean(values):  # float32, one after the other, as the script adds
            total = torch.zeros(())
            for value in values:
                total = total + value
            return total / len(values)

        groups = rewarded.split(self.settings.samples)
        groups = [group - mean(group) for group in groups]
        if self.settings.normalise == "batch":
            root = torch.cat([group**2 for group in groups]).mean().sqrt()
            groups = [group / root for group in groups]
        elif self.settings.normalise == "prompt":
            groups = [group / mean(group**2).sqrt() for group in groups]
        return torch.cat(groups)

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
        nats = (densities(z, mean, log_std).sum(1) - old.sum(1)).double()
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
        self.stages.append(len(self.scored))
        s, everything = self.settings, [self.reward, *self.others]
        zero = torch.zeros(len(self.held_out), *self.shape)
        learnt = self.policy(self.frozen.features(self.held_out))
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
                parts = [part.mean(0) for part in self.policy(self.frozen.features(unique))]
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


# ---------------------------------------------------------------- the real runs


def described(spec, folder):
    """Reward "0.7*taste+0.3*calm" as --reward knows it, with the path of its file."""
    parts = {}
    for term in spec.split("+"):
        weight, _, name = term.rpartition("*")
        parts[f"{folder}/own.py:{name}"] = float(weight or 1)
    name = "+".join(part if weight == 1 else f"{weight}*{part}" for part, weight in parts.items())
    return types.SimpleNamespace(name=name, parts=parts)


class Recorded:
    """What a run did, beside what it wrote."""

    def __init__(self):
        self.scored, self.gradients, self.rates, self.states = [], [], [], []
        self.policies, self.figures, self.cells, self.titles, self.lines = [], [], {}, [], []

    def watch(self, patch, stop_after=None):
        """stop_after: the number of the checkpoint at which the user presses Ctrl-C."""

        def score(all_rewards, images, prompts):
            self.scored.append((list(prompts), [image.copy() for image in images]))
            return real_score(all_rewards, images, prompts)

        def save_checkpoint(folder, state, *rest):
            real_save(folder, state, *rest)
            self.states.append(torch.load(folder / "checkpoint.pt", weights_only=True))
            path = folder / "policy.safetensors"
            self.policies.append(load_file(path) if path.exists() else None)
            if len(self.states) == stop_after:
                raise KeyboardInterrupt

        def imshow(axis, image, *rest, **options):
            place = axis.get_subplotspec()
            self.cells[place.rowspan.start, place.colspan.start] = np.asarray(image)
            return real_imshow(axis, image, *rest, **options)

        def set_title(axis, text, *rest, **options):
            place = axis.get_subplotspec()
            self.titles.append((place.rowspan.start, place.colspan.start, text))
            return real_title(axis, text, *rest, **options)

        def errorbar(axis, *columns, **options):
            self.lines.append((options["label"], [list(column) for column in columns]))
            return real_errorbar(axis, *columns, **options)

        real_score, real_save = rewards.score, utils.runs.save_checkpoint
        real_imshow, real_title, real_errorbar = Axes.imshow, Axes.set_title, Axes.errorbar

        def save_figure(figure, path):  # drawing takes longer than all else
            self.figures.append(path.name)

        patch.setattr(rewards, "score", score)
        patch.setattr(utils.figures, "save_figure", save_figure)
        patch.setattr(utils.runs, "save_checkpoint", save_checkpoint)
        patch.setattr(Axes, "imshow", imshow)
        patch.setattr(Axes, "set_title", set_title)
        patch.setattr(Axes, "errorbar", errorbar)

    def note_update(self, optimizer, *_):
        (group,) = optimizer.param_groups
        self.gradients.append([p.grad.clone() for p in group["params"]])
        self.rates.append(group["lr"])


SCENARIOS = {  # name: settings, model, reward, further rewards, LoRA
    "mean": ({}, "v", "0.7*taste+0.3*calm", ("lively",), None),
    "both": (
        {
            "seed": 0,
            "guidance": 3.0,
            "reduction": "sum",
            "normalise": "prompt",
            "kl_weight": 0.02,
            "clip": 0.2,
            "mean_only": False,
            "eval_every": 1,
            "eval_samples": 8,
            "samples": 7,
            "minibatch": 9,
            "iterations": 2,
            "grid": 16,
            "eval_steps": (),
            "prompts_per_iteration": 2,
            "held_out": HELD_OUT[:3],
        },
        "epsilon",
        "lively",
        ("taste", "0.5*calm+2*taste"),
        None,
    ),
    "std": (
        {
            "seed": 12,
            "normalise": "none",
            "mean_only": False,
            "std_only": True,
            "eval_every": 0,
            "epochs": 3,
            "eval_samples": 3,
            "eval_steps": (),
            "lr": 0.1,
        },
        "v",
        "calm",
        (),
        ("pgraft.json", 499),
    ),
    "one": (
        {
            "seed": 3,
            "policy": "unconditional",
            "mean_only": False,
            "samples": 2,
            "minibatch": 64,
            "prompts_per_iteration": 5,
            "iterations": 2,
            "eval_samples": 3,
            "eval_steps": (2, 4, 5),
            "guidance": 2.0,
            "held_out": HELD_OUT[1:],
        },
        "epsilon",
        "taste",
        (),
        ("--switch_timestep", 749),
    ),
    "tuned": (
        {
            "controls": False,
            "mean_only": False,
            "iterations": 2,
            "samples": 9,  # 72 images: more than the texts that are stacked at a time
            "minibatch": 20,
            "prompts_per_iteration": 99,
            "eval_samples": 2,
            "eval_steps": (),
        },
        "v",
        "taste+-0.5*lively",
        ("taste",),
        ("", -1),
    ),
    "bfloat16": (
        {
            "dtype": "bfloat16",
            "controls": False,
            "iterations": 2,
            "eval_samples": 2,
            "eval_steps": (),
            "held_out": HELD_OUT[:3],
        },
        "v",
        "taste",
        (),
        None,
    ),
    "sd3": (
        {
            "iterations": 2,
            "prompts_per_iteration": 4,
            "samples": 3,
            "eval_samples": 2,
            "mean_only": False,
            "eval_steps": (),
            "held_out": HELD_OUT[:3],
        },
        "sd3",
        "taste",
        (),
        None,
    ),
}


@pytest.fixture(scope="module")
def start(tiny_v, tiny_epsilon, families, tmp_path_factory):
    """start(name, ...): (folder, arguments, arguments of Expected) of a scenario, in a new folder."""
    models = {"v": tiny_v, "epsilon": tiny_epsilon, **families}
    source = "import zlib\nimport numpy as np\n" + "\n\n".join(map(inspect.getsource, OWN.values()))

    def start(name, **changes):
        own, model, spec, others, lora = SCENARIOS[name]
        settings = SETTINGS | {"train": TRAIN, "held_out": HELD_OUT} | own | changes
        train, held_out = settings.pop("train"), settings.pop("held_out")
        folder = tmp_path_factory.mktemp(f"loop_{name}")
        (folder / "own.py").write_text(source)
        (folder / "train.txt").write_text("\n".join(train) + "\n")
        (folder / "held_out.txt").write_text("\n".join(held_out) + "\n")
        reward, *others = (described(s, folder) for s in (spec, *others))
        argv = ["--model", models[model], "--device", "cpu", "--output", str(folder / "run")]
        argv += ["--prompts", str(folder / "train.txt"), "--eval_prompts", str(folder / "held_out.txt")]
        argv += ["--reward", reward.name, "--eval_rewards", ",".join(other.name for other in others)]
        for key, value in settings.items():
            if isinstance(value, bool):
                argv.append(f"--{key}" if value else f"--no-{key}")
            else:
                argv += [f"--{key}", *map(str, value if isinstance(value, tuple) else [value])]
        options = {"train": train, "held_out": held_out, "reward": reward, "others": others}
        if lora:
            where, switch = lora
            tuned = with_lora(Model(models[model], "cpu", torch.float32), "all")
            randomise(tuned)
            (folder / "lora").mkdir()
            tuned.save_lora(folder / "lora")
            argv += ["--lora", str(folder / "lora")]
            if where == "pgraft.json":
                (folder / "lora" / where).write_text(json.dumps({"switch_timestep": switch, "sigma": 0.5}))
            elif where:  # goes before the file
                (folder / "lora" / "pgraft.json").write_text('{"switch_timestep": 499, "sigma": 0.5}')
                argv += [where, str(switch)]
            options |= {"lora": str(folder / "lora"), "switch": switch}
        settings["prompts_per_iteration"] = min(settings["prompts_per_iteration"], len(train))
        return folder, argv, (models[model], types.SimpleNamespace(**settings)), options

    return start


def recorded_run(argv, stop_after=None):
    """What noise_ppo.py did and printed (`out`)."""
    recorded = Recorded()
    with pytest.MonkeyPatch.context() as patch:
        recorded.watch(patch, stop_after)
        hook = register_optimizer_step_pre_hook(recorded.note_update)
        try:
            code, recorded.out, error = run_inside(argv, "noise_ppo.py")
        finally:
            hook.remove()
    assert code == (0 if stop_after is None else 130), error
    return recorded


@pytest.fixture(scope="module", params=SCENARIOS)
def pair(request, start):
    """(folder of the run, what it did and printed, what is expected)"""
    folder, argv, positional, options = start(request.param)
    recorded = recorded_run(argv)
    recorded.name = request.param
    return folder / "run", recorded, Expected(*positional, **options)


# ---------------------------------------------------------------- one beside the other


def close(numbers):
    return pytest.approx(numbers, rel=1e-6, abs=1e-6, nan_ok=True)


def assert_scored(scored, others):
    assert [prompts for prompts, _ in scored] == [prompts for prompts, _ in others]
    for (_, images), (_, again) in zip(scored, others, strict=True):
        assert all(map(np.array_equal, images, again)) and len(images) == len(again)


def assert_policy(tensors, number, expected):
    """tensors: {name: tensor}; number: of the iteration after which the policy had them, from 1."""
    weights = expected.weights[number - 1]
    assert tensors.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensors[name], tensor), name


def assert_metrics(folder, expected):
    rows = [{name: float(value) for name, value in row.items()} for row in read_metrics(folder)]
    assert [list(row) for row in rows] == [list(row) for row in expected.rows]
    for row, again in zip(rows, expected.rows):
        assert row == close(again)


def assert_results(folder, expected):
    results, again = json.loads((folder / "results.json").read_text()), copy.deepcopy(expected.results)
    assert results.keys() == {*again, "seconds"} and results["seconds"] > 0
    for row, other in zip(results.pop("by_steps"), again.pop("by_steps"), strict=True):
        means, others = row.pop("means"), other.pop("means")
        assert list(means) == list(others)
        for arm in means:
            assert means[arm] == close(others[arm]), arm
        assert row == close(other)
    for row, other in zip(results.pop("table"), again.pop("table"), strict=True):
        assert row.pop("metric") == other.pop("metric")
        assert row == close(other)
    assert {k: v for k, v in results.items() if k != "seconds"} == close(again)


# ---------------------------------------------------------------- whole runs


def test_what_is_sampled_and_scored(pair):
    """Each batch that a reward sees, from the first evaluation to the last: its prompts, in their order, and
    its images. They depend on the seeds, the newest policy, the LoRA, the steps and the guidance."""
    _, recorded, expected = pair
    assert_scored(recorded.scored, expected.scored)


def test_no_seed_is_used_twice(pair):
    """Neither within training nor in training and evaluation; the temperature is chosen on its own ones."""
    seeds, settings = pair[2].used_seeds, pair[2].settings
    assert len(seeds["train"]) == settings.iterations * settings.prompts_per_iteration * settings.samples
    sets = {tag: set(values) for tag, values in seeds.items()}
    assert all(len(sets[tag]) == len(seeds[tag]) for tag in ("train", "update"))
    assert sets.keys() == {"train", "update", "eval", *(["temperature"] if settings.controls else [])}
    assert sum(map(len, sets.values())) == len(set().union(*sets.values()))
    assert len(sets["eval"]) == settings.eval_samples * len(pair[2].held_out)


def test_updates(pair):
    """The gradient and the learning rate of each update, the policy after each iteration."""
    _, recorded, expected = pair
    assert recorded.rates == pytest.approx(expected.rates, rel=1e-12)
    for gradients, others in zip(recorded.gradients, expected.gradients, strict=True):
        assert all(map(torch.equal, gradients, others)) and len(gradients) == len(others)
    for number, state in enumerate(recorded.states, 1):
        assert state["iteration"] == number == len(state["rows"])
        assert_policy(state["policy"], number, expected)
    assert len(recorded.states) == expected.settings.iterations
    # the run would not show all that is to be seen, were no ratio cut on one of the sides
    small = expected.settings.minibatch > 50  # one update an epoch
    assert small or expected.clipped_sides == {(True, True), (False, False)}


def test_columns_of_metrics(pair):
    assert_metrics(pair[0], pair[2])


def test_final_evaluation(pair):
    folder, recorded, expected = pair
    assert_results(folder, expected)
    if recorded.name in ("one", "both"):  # the best temperature is 1, and is another
        assert (expected.results["temperature"] == 1) == (recorded.name == "one")


def test_policy_that_is_left(pair):
    folder, _, expected = pair
    s = expected.settings
    assert_policy(load_file(folder / "policy.safetensors"), s.iterations, expected)
    stored = json.loads((folder / "noise_ppo.json").read_text())
    size = expected.frozen.features(["a"]).shape
    policy = {"tokens": size[1], "width": size[2], "latent_shape": list(expected.shape), "hidden": s.hidden}
    policy |= {"grid": s.grid, "policy": s.policy, "mean_only": s.mean_only, "std_only": s.std_only}
    scheduler = {"class": "FlowMatchEulerDiscreteScheduler", "eta": 0}
    if not expected.frozen.flow:
        scheduler |= {"class": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": False}
    again = {"policy": policy, "model": expected.folder, "steps": s.steps, "guidance": s.guidance}
    again |= {"reward": expected.reward.name, "scheduler": scheduler}
    if expected.lora:
        again |= {"lora": expected.lora, "switch_timestep": expected.frozen.switch}
    assert stored == again


def test_pictures_that_are_left(pair):
    """grid.png: standard noise on the left, the learnt one on the right, the same prompt in a row. curves.png
    and gain.png: the columns of metrics.csv and results.json."""
    _, recorded, expected = pair
    n = expected.settings.eval_samples
    rows = min(6, len(expected.held_out), 24 // n)
    assert recorded.figures == ["grid.png", "gain.png", "curves.png"] and len(recorded.cells) == rows * 2 * n
    for (row, column), image in recorded.cells.items():
        images = expected.grid["standard" if column < n else "learnt"]
        assert np.array_equal(image, images[row * n + column % n])
    titles = [(row, 0, expected.held_out[row]) for row in range(rows)]
    assert recorded.titles[:-1] == titles and recorded.titles[-1][:2] == (0, n)

    by_steps, lines = expected.results["by_steps"], {}
    steps = [row["steps"] for row in by_steps]
    for name in by_steps[0]:
        if name not in ("steps", "calls", "gain", "se", "diversity_kept", "means"):
            lines[name] = [steps, [row[name] for row in by_steps]]
    lines["learnt - standard"] = [steps, [row["gain"] for row in by_steps], [row["se"] for row in by_steps]]
    for (
        name
    ) in "reward reward_held_out clip_fraction explained_variance kl_per_dimension mean_rms std".split():
        there = [row for row in expected.rows if not math.isnan(row[name])]
        lines[name] = [[row["iteration"] for row in there], [row[name] for row in there]]
    drawn = dict(recorded.lines)
    assert drawn.keys() == lines.keys() and len(drawn) == len(recorded.lines)
    for name, columns in lines.items():
        assert len(drawn[name]) == len(columns)
        for column, other in zip(drawn[name], columns):
            assert column == close(other), name


def printed(out, start):
    """The numbers behind `start` in each line that begins so."""
    lines = [line.removeprefix(start) for line in out.splitlines() if line.startswith(start)]
    return [[float(number) for number in re.findall(r"[-+]?[0-9.]+", line)] for line in lines]


def test_what_is_printed(pair):
    _, recorded, expected = pair
    out, name, by_steps = recorded.out, expected.reward.name, expected.results["by_steps"]

    def rounded(numbers):
        return pytest.approx(numbers, abs=6e-4)

    ((baseline,),) = printed(out, f"  standard   held-out {name} ")
    assert baseline == rounded(expected.baseline[name].mean())
    shown = [row for row in expected.rows if not math.isnan(row["reward_held_out"])]
    lines = printed(out, "  iteration ")
    for numbers, row in zip(lines, shown, strict=True):
        assert numbers[:2] == [row["iteration"], expected.settings.iterations]
        assert numbers[2:4] == rounded([row["reward"], row["reward_held_out"]])
        assert numbers[4] == pytest.approx(100 * row["clip_fraction"], abs=0.51)
        assert numbers[5] == rounded(row["kl_per_dimension"])
    arms = [arm for arm in by_steps[0]["means"] if arm not in ("standard", "learnt")]
    arms += [key for key in by_steps[0] if key.startswith("best_of")]
    header = ["steps", "calls", "standard", "learnt", "gain", *arms, "diversity_kept"]
    assert any(line.split() == header for line in out.splitlines())
    columns = ["standard", "learnt", "gain", "se", *arms, "diversity_kept"]
    for row in by_steps:
        (numbers,) = printed(out, f"{row['steps']:>5} ")
        assert numbers[0] == row["calls"] and numbers[1:] == rounded([row[column] for column in columns])
    (numbers,) = printed(out, "KL to standard noise ")
    kl = [expected.results["kl"], expected.results["kl_per_dimension"]]
    assert numbers == pytest.approx(kl, abs=0.06) and numbers[1] == rounded(kl[1])
    for row in expected.results["table"]:
        (numbers,) = printed(out, f"{row['metric']:<34} ")
        assert numbers == rounded([row[column] for column in ("standard", "learnt", "gain", "se")])


# ---------------------------------------------------------------- resumed; what training does not see


def test_resumed_run(start):
    """Interrupted after the third of four iterations, of which the second was evaluated."""
    changes = {"iterations": 4, "mean_only": False, "eval_steps": ()}
    folder, argv, positional, options = start("mean", **changes)
    first = recorded_run(argv, stop_after=3)
    expected = Expected(*positional, **options)
    ends = expected.stages
    assert_scored(first.scored, expected.scored[: ends[3]])
    assert first.policies[0] is None
    for policy, number in ((first.policies[1], 2), (first.policies[2], 2)):
        assert_policy(policy, number, expected)
    assert_policy(first.states[2]["policy"], 3, expected)
    second = recorded_run(["--resume", str(folder / "run")])
    # the standard noise is measured again, the iterations are not made again
    assert_scored(second.scored, expected.scored[: ends[0]] + expected.scored[ends[3] :])
    updates = len(first.gradients)
    assert first.rates + second.rates == pytest.approx(expected.rates, rel=1e-12)
    for gradients, others in zip(second.gradients, expected.gradients[updates:], strict=True):
        assert all(map(torch.equal, gradients, others)) and len(gradients) == len(others)
    (state,) = second.states
    assert state["iteration"] == 4 and len(state["rows"]) == 4
    assert_policy(state["policy"], 4, expected)
    assert_policy(second.policies[0], 4, expected)
    assert_metrics(folder / "run", expected)
    assert_results(folder / "run", expected)


def test_training_does_not_see_the_evaluation(start):
    """Other held-out prompts, images, steps and controls change nothing of the training, not even what the
    policy's input is standardised by; nor do other training prompts in the place of those that no iteration
    samples."""
    seen = {number for numbers in sampled_prompts(5, 2, 3, len(TRAIN)) for number in numbers}
    assert len(seen) == 6 < len(TRAIN)
    plain = {"iterations": 2, "controls": False, "eval_steps": (), "eval_every": 0, "eval_samples": 2}
    other = {"iterations": 2, "controls": True, "eval_steps": (5,), "eval_every": 1, "eval_samples": 3}
    other["held_out"] = ["a green circle above a green square", "a blue circle"]
    other["train"] = [p if i in seen else "a green square below a green circle" for i, p in enumerate(TRAIN)]
    runs = []
    for changes in (plain, other):
        folder, argv, *_ = start("bfloat16", dtype="float32", **changes)
        runs.append((recorded_run(argv), read_metrics(folder / "run")))
    (one, rows), (two, others) = runs
    assert len(one.scored) != len(two.scored) and len(one.gradients) == 16
    for tensors, again in zip(one.gradients, two.gradients, strict=True):
        assert all(map(torch.equal, tensors, again))
    for state, again in zip(one.states, two.states, strict=True):
        assert all(torch.equal(state["policy"][name], again["policy"][name]) for name in state["policy"])
    assert rows[1].pop("reward_held_out") != others[1].pop("reward_held_out")
    assert rows[0].pop("reward_held_out") == "nan" != others[0].pop("reward_held_out")
    assert rows == others
