"""Runs of graft.py and pgraft.py made again, by plain loops that share no code with the scripts: one
step, one update after the other. Only stock torch, diffusers, peft and PIL compute what is expected."""

import csv
import functools
import io
import json
import math
import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from conftest import read_scalars, run_inside

TRAIN = [  # of different lengths and in no order
    "a red circle left of a blue square",
    "a green square",
    "a blue circle above a red square below a green circle",
    "a red square right of a red circle",
    "a circle",
    "a green circle below a blue square",
    "a blue square left of a red circle above a green square",
]
HELD_OUT = [
    "a blue circle above a green square",
    "a square",
    "a red circle above a red square left of a blue circle",
    "a green square left of a blue circle",
    "a red square",
]
SHAPE = (4, 8, 8)  # of a latent
GRIDS = {  # {model: {steps: the stock scheduler's timesteps}}
    "v": {4: [999, 749, 499, 249], 5: [999, 799, 599, 399, 199]},
    "epsilon": {4: [751, 501, 251, 1], 5: [801, 601, 401, 201, 1]},
}
SETTINGS = {
    "seed": 3,
    "steps": 4,
    "guidance": 1.0,
    "eta": 1.0,
    "sample_batch": 5,
    "reward": "own.py:likes",
    "eval_rewards": "own.py:colours,jpeg_compressibility",
    "rounds": 3,
    "prompts_per_round": 3,
    "samples": 4,
    "rule": "topk",
    "accumulate": True,
    "reference": "newest",
    "lora_rank": 4,
    "lora_alpha": 6.0,
    "lora_targets": "attention",
    "updates": 2,
    "batch": 6,
    "micro_batch": 2,
    "lr": 0.01,
    "prompt_dropout": 0.0,
    "guided_loss": True,
    "gradient_checkpointing": False,
    "eval_samples": 2,
    "eval_every": 1,
    "save_accepted": True,
}


# ---------------------------------------------------------------- rewards that see every swap


SCORED = []  # (reward, pixels, prompt) of every image that a run has scored, in order
CALLS = []  # how many images each call of `likes` had
STOPS = []  # where runs are interrupted: ("score" or "step", after so many of them)


def interrupted(kind, count):
    if STOPS and STOPS[0] == (kind, count):
        STOPS.pop(0)
        raise KeyboardInterrupt


def liking(pixels, prompt, salt=""):
    """A weighted sum of the pixels. The weights are another draw for each prompt."""
    weights = np.random.default_rng(zlib.crc32((salt + prompt).encode())).standard_normal(pixels.shape)
    return float((weights * pixels).sum() / 255 / 10)


def likes(images, prompts):
    SCORED.extend(("likes", np.array(i), p) for i, p in zip(images, prompts, strict=True))
    CALLS.append(len(images))
    interrupted("score", len(CALLS))
    return [liking(np.array(i), p) for i, p in zip(images, prompts)]


def colours(images, prompts):
    SCORED.extend(("colours", np.array(i), p) for i, p in zip(images, prompts, strict=True))
    return [liking(np.array(i), p, "colours of ") for i, p in zip(images, prompts)]


def coarse(images, prompts):
    """Few values, so that many are equal."""
    return [float(round(value / 3)) for value in likes(images, prompts)]


def jpeg_kb(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return len(buffer.getvalue()) / 1000


STATISTICS = {
    "brightness": lambda pixels: np.asarray(Image.fromarray(pixels).convert("L"), float).mean() / 255,
    "contrast": lambda pixels: np.asarray(Image.fromarray(pixels).convert("L"), float).std() / 255,
    "saturation": lambda pixels: (
        np.asarray(Image.fromarray(pixels).convert("HSV"), float)[..., 1].mean() / 255
    ),
    "jpeg_kb": jpeg_kb,
}
VALUES = {
    "own.py:likes": liking,
    "own.py:coarse": lambda pixels, prompt: float(round(liking(pixels, prompt) / 3)),
    "own.py:colours": lambda pixels, prompt: liking(pixels, prompt, "colours of "),
    "jpeg_compressibility": lambda pixels, prompt: -jpeg_kb(pixels),
}


def worth(spec, pixels, prompt):
    """The value of a reward, or of a weighted sum as in --reward."""
    total = 0
    for term in spec.split("+"):
        *weight, name = term.split("*")
        total += float(weight[0] if weight else 1) * VALUES[name](pixels, prompt)
    return total


def parts_of(spec):
    return [term.split("*")[-1] for term in spec.split("+")] if "+" in spec else []


def spread(pictures):
    """Mean distance of all pairs."""
    pairs = [(a, b) for i, a in enumerate(pictures) for b in pictures[i + 1 :]]
    return np.mean([np.sqrt(np.mean((a / 255.0 - b / 255.0) ** 2)) for a, b in pairs])


# ---------------------------------------------------------------- a real run, watched


def arguments(settings):
    argv = []
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no_{name}")
        else:
            argv += [f"--{name}", str(value)]
    return argv


def watched(settings, model, cwd, monkeypatch, script, stops=(), scale=None):
    """Run the script in cwd/run; at each of `stops` it is interrupted and resumed. Returns what it did: every
    call of the denoiser, every image scored, the gradients that each step of the optimiser was given and the
    weights after it, every figure, what it printed. scale: the gradients are scaled at first by so much, as
    they are with float16, and twice as much after every two steps."""
    from diffusers import UNet2DConditionModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen = SimpleNamespace(
        calls=[], gradients=[], weights=[], optimizers=[], figures=[], out=[], error=[], folder=cwd / "run"
    )
    forward = UNet2DConditionModel.forward

    def watched_forward(net, x, t, encoder_hidden_states, **rest):
        layers = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
        states = {"off" if m.disable_adapters else "merged" if m.merged else "on" for m in layers}
        call = {"x": x, "t": torch.as_tensor(t).expand(len(x)), "text": encoder_hidden_states}
        call = {name: value.detach().clone() for name, value in call.items()}
        call |= {"lora": "/".join(sorted(states)), "grad": torch.is_grad_enabled()}
        call |= {"autocast": torch.is_autocast_enabled("cpu"), "checkpointing": net.is_gradient_checkpointing}
        seen.calls.append(SimpleNamespace(**call))
        assert not rest
        return forward(net, x, t, encoder_hidden_states)

    def before_step(optimizer, *_):
        (group,) = optimizer.param_groups
        seen.optimizers.append(type(optimizer).__name__)
        seen.gradients.append([p.grad.clone() for p in group["params"]])

    def after_step(optimizer, *_):
        (group,) = optimizer.param_groups
        seen.weights.append([p.detach().clone() for p in group["params"]])
        interrupted("step", len(seen.weights))

    def kept_savefig(figure, *_, **__):  # to draw them would take longer than all the rest
        seen.figures.append(figure)

    (cwd / "own.py").write_text("from replay import coarse, colours, likes  # noqa: F401\n")
    (cwd / "train.txt").write_text("\n".join(TRAIN) + "\n")
    (cwd / "held_out.txt").write_text("\n".join(HELD_OUT) + "\n")
    SCORED.clear(), CALLS.clear()
    STOPS[:] = stops
    files = f"--model {model} --prompts train.txt --eval_prompts held_out.txt --device cpu --output run"
    argv = [*files.split(), *arguments(settings)]
    hooks = [register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)]
    try:
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(UNet2DConditionModel, "forward", watched_forward)
            patch.setattr(Figure, "savefig", kept_savefig)
            if scale:
                options = {"init_scale": scale, "growth_interval": 2}
                scaler = functools.partial(torch.amp.GradScaler, "cpu", **options)
                patch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler())
            for stop in (*stops, None):
                status, out, error = run_inside(argv, script)
                seen.out.append(out), seen.error.append(error)
                assert status == (0 if stop is None else 130), error
                argv = ["--resume", "run"]
    finally:
        for hook in hooks:
            hook.remove()
    seen.scored = {
        name: [(pixels, prompt) for n, pixels, prompt in SCORED if n == name] for name in ("likes", "colours")
    }
    seen.sizes = list(CALLS)
    return seen


# ---------------------------------------------------------------- the same, by hand


def seed_of(*words):
    numbers = [w if isinstance(w, int) else int.from_bytes(w.encode(), "big") for w in words]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) // 2


def generator_of(*words):
    return torch.Generator().manual_seed(seed_of(*words))


def close(mine, theirs, bound=1e-5):
    """Equal, in units of the scale of what the run has."""
    assert mine.shape == theirs.shape
    scale = theirs.abs().max().item() or 1.0
    return (mine - theirs).abs().max().item() <= bound * scale


class Plain:
    """The stock pipeline with a LoRA, and what a run with the settings makes of it."""

    def __init__(self, settings, model, kind):
        from diffusers import StableDiffusionPipeline
        from peft import LoraConfig

        self.o = SimpleNamespace(**{"top_k": 1, "reward_max": None, "probe_prompts": 0} | settings)
        self.model, self.kind, self.grid = model, kind, GRIDS[kind][self.o.steps]
        pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
        self.pipe, self.net, self.texts = pipe, pipe.unet, {}
        # as exact as floats are; after the last step comes the cleanest level of the stock scheduler
        self.abar = pipe.scheduler.alphas_cumprod.double().tolist()
        self.abar_end = float(pipe.scheduler.final_alpha_cumprod)
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.eval().requires_grad_(False)
        torch.manual_seed(self.o.seed)
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        rank, alpha = self.o.lora_rank, self.o.lora_alpha
        self.net.add_adapter(
            LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
        )
        self.parameters = [p for n, p in self.net.named_parameters() if "lora_" in n]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.o.lr, weight_decay=0.0)
        self.seeds = []  # of every image, round and update

    # ------------------------------------------------------------ prompts and their order

    def chosen(self, r):
        """The numbers of the prompts of round r."""
        per_round = self.o.prompts_per_round
        rounds_an_order = len(TRAIN) // per_round
        seed = seed_of(self.o.seed, "prompts", r // rounds_an_order)
        order = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(seed)).tolist()
        start = r % rounds_an_order * per_round
        return order[start : start + per_round]

    @torch.no_grad()
    def text(self, prompt):
        if prompt not in self.texts:
            tokenizer = self.pipe.tokenizer
            options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
            ids = tokenizer([prompt], **options, return_tensors="pt").input_ids
            self.texts[prompt] = self.pipe.text_encoder(ids)[0]
        return self.texts[prompt]

    # ------------------------------------------------------------ sampling

    def predict(self, x, t, texts, guidance):
        """The guided prediction for a batch; x: (n, 4, 8, 8), t: (n,), texts: n of (1, rows, width)."""
        if guidance == 1:
            return self.net(x, t, torch.cat(texts)).sample
        both = torch.cat([self.text("")] * len(x) + texts)
        without, given = self.net(torch.cat([x, x]), torch.cat([t, t]), both).sample.chunk(2)
        return without + guidance * (given - without)

    @torch.no_grad()
    def step(self, x, k, prompts, tuned, noise):
        """From the k-th level to the next, by DDIM. x, noise: (n, 4, 8, 8)."""
        (self.net.enable_adapters if tuned else self.net.disable_adapters)()
        times, texts = torch.tensor([self.grid[k]] * len(x)), [self.text(p) for p in prompts]
        out, abar = self.predict(x, times, texts, self.o.guidance), self.abar[self.grid[k]]
        after = self.abar[self.grid[k + 1]] if k + 1 < len(self.grid) else self.abar_end
        if self.kind == "epsilon":
            eps, x_0 = out, (x - (1 - abar) ** 0.5 * out) / abar**0.5
        else:
            eps = abar**0.5 * out + (1 - abar) ** 0.5 * x
            x_0 = abar**0.5 * x - (1 - abar) ** 0.5 * out
        variance = self.o.eta**2 * (1 - after) / (1 - abar) * (1 - abar / after)
        return after**0.5 * x_0 + (1 - after - variance) ** 0.5 * eps + variance**0.5 * noise

    def sample(self, prompts, seeds, tuned_steps):
        """[(n, 4, 8, 8)] at all levels, the last is clean. Each image has noise of its own; the LoRA is on in
        the first `tuned_steps` steps."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        states = [torch.stack([torch.randn(SHAPE, generator=g) for g in generators])]
        for k in range(len(self.grid)):
            noise = torch.stack([torch.randn(SHAPE, generator=g) for g in generators])
            states.append(self.step(states[-1], k, prompts, k < tuned_steps, noise))
        return states

    @torch.no_grad()
    def picture(self, x_0):
        values = self.pipe.vae.decode(x_0[None] / self.pipe.vae.config.scaling_factor).sample[0]
        values = (values / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        return (values * 255).round().astype("uint8")

    def sampled(self, r, tuned_steps):
        """[(number of the prompt, of the sample, its states)] of round r."""
        numbers = [(i, j) for i in self.chosen(r) for j in range(self.o.samples)]
        seeds = [seed_of(self.o.seed, r, i, j) for i, j in numbers]
        self.seeds += seeds
        states = self.sample([TRAIN[i] for i, _ in numbers], seeds, tuned_steps)
        return [(*number, [level[n] for level in states]) for n, number in enumerate(numbers)]

    def evaluated(self, tuned_steps):
        """Clean latents of the held-out prompts. No seed of the run is in them."""
        numbers = [(i, j) for i in range(len(HELD_OUT)) for j in range(self.o.eval_samples)]
        seeds = [seed_of("eval", i, j) for i, j in numbers]
        return self.sample([HELD_OUT[i] for i, _ in numbers], seeds, tuned_steps)[-1]

    # ------------------------------------------------------------ acceptance

    def accepted(self, r, rewards):
        """The places of the accepted among the round's images. Of equal rewards the smallest coin wins.
        Groups of equal rewards are left out."""
        o, kept = self.o, []
        self.seeds.append(seed_of(o.seed, "accept", r))
        coins = torch.rand(len(rewards) // o.samples, o.samples, generator=generator_of(o.seed, "accept", r))
        coins = coins.flatten().tolist()
        size, best = (2, 1) if o.rule == "preference" else (o.samples, o.top_k)
        for first in range(0, len(rewards), size):
            group = range(first, first + size)
            for n in group:
                reward = rewards[n]
                if o.rule in ("topk", "preference"):
                    better = [m for m in group if (-rewards[m], coins[m]) < (-reward, coins[n])]
                    good = len(better) < best and len({rewards[m] for m in group}) > 1
                elif o.rule == "threshold":
                    good = reward >= o.threshold
                elif o.rule == "exponential":
                    bound = max(rewards[m] for m in group) if o.reward_max is None else o.reward_max
                    good = coins[n] < math.exp(min(0, (reward - bound) / o.beta))
                else:
                    good = True
                if good:
                    kept.append(n)
        return kept

    def kl(self, rewards, kept):
        o = self.o
        if o.rule in ("topk", "preference"):
            # the round's rewards are the distribution; a value takes an interval of quantiles
            m, k = (o.samples, o.top_k) if o.rule == "topk" else (2, 1)
            nodes, weights = np.polynomial.legendre.leggauss(60)
            total, start, parts = 0.0, 0.0, []
            for value in sorted(set(rewards)):
                width = rewards.count(value) / len(rewards)
                u = start + width * (nodes + 1) / 2
                terms = sum(math.comb(m - 1, j) * u ** (m - 1 - j) * (1 - u) ** j for j in range(k))
                chance = weights @ terms / 2 - k / m * width ** (m - 1)  # less that of flat groups
                total, start = total + width * chance, start + width
                parts.append((width, max(chance, 0.0)))
            return sum(w * c / total * math.log(c / total) for w, c in parts if c > 1e-12)
        if o.rule == "threshold":
            return -math.log(len(kept) / len(rewards))
        if o.rule == "none":
            return 0.0
        groups = np.reshape(rewards, (-1, o.samples))
        bounds = groups.max(1, keepdims=True) if o.reward_max is None else o.reward_max
        chance = np.exp(np.minimum(0, (groups - bounds) / o.beta))
        return (chance / chance.mean() * np.log(chance / chance.mean())).mean()

    # ------------------------------------------------------------ updates

    def noised(self, x, t, noise, level):
        """(x_t, target, weight) of clean data, or of states at the timestep `level`; float64."""
        x, noise, abar = x.double(), noise.double(), self.abar[t]
        start = 1.0 if level is None else self.abar[level]
        a = (abar / start) ** 0.5
        b = (1 - abar - a**2 * (1 - start)) ** 0.5
        x_t = a * x + b * noise
        eps = (1 - abar) ** 0.5 * noise / b  # minus the score of x_t given x, in units of the noise
        v = (eps - (1 - abar) ** 0.5 * x_t) / abar**0.5
        return x_t.float(), (eps if self.kind == "epsilon" else v).float(), b**2 / (1 - abar)

    def update(self, r, data, prompts, level=None, above=-1):
        """The updates of round r on `data`, clean or of the timestep `level`, with `prompts`, at timesteps
        above `above`; yields after each what went in and came out."""
        o, generator = self.o, generator_of(self.o.seed, "update", r)
        self.seeds.append(seed_of(o.seed, "update", r))
        self.net.enable_adapters()
        order = []
        while len(order) < o.updates * o.batch:
            order += torch.randperm(len(data), generator=generator).tolist()
        for u in range(o.updates):
            chosen = order[u * o.batch : (u + 1) * o.batch]
            noise = torch.randn(o.batch, *SHAPE, generator=generator)
            times = torch.randint(above + 1, 1000, (o.batch,), generator=generator).tolist()
            dropped = (torch.rand(o.batch, generator=generator) < o.prompt_dropout).tolist()
            words = ["" if gone else prompts[i] for i, gone in zip(chosen, dropped)]
            guidance = o.guidance if o.guided_loss else 1.0
            inputs, total = [], 0.0
            for first in range(0, o.batch, o.micro_batch):
                part = range(first, first + o.micro_batch)
                x, targets, weights = zip(
                    *(self.noised(data[chosen[n]], times[n], noise[n], level) for n in part)
                )
                t = torch.tensor([times[n] for n in part])
                out = self.predict(torch.stack(x), t, [self.text(words[n]) for n in part], guidance)
                errors = [w * ((y - z) ** 2).mean() for w, y, z in zip(weights, out, targets)]
                (sum(errors) / o.batch).backward()
                total += sum(e.item() for e in errors) / o.batch
                inputs.append((torch.stack(x), t, [words[n] for n in part]))
            norm = math.sqrt(sum((p.grad.double() ** 2).sum().item() for p in self.parameters))
            for p in self.parameters:
                p.grad *= min(1.0, 1.0 / (norm + 1e-6))
            gradients = [p.grad.clone() for p in self.parameters]
            self.optimizer.step()
            self.optimizer.zero_grad()
            weights = [p.detach().clone() for p in self.parameters]
            yield SimpleNamespace(
                inputs=inputs,
                loss=total,
                norm=norm,
                gradients=gradients,
                weights=weights,
                words=words,
                times=times,
                guidance=guidance,
            )


# ---------------------------------------------------------------- compare


class Replay:
    """Compares a watched run, stage by stage. Later stages go on from what the run has, once it is shown to
    be right, so that errors of rounding do not add up."""

    def __init__(self, plain, seen, phases):
        """phases: what the run does one after the other: ("base",), ("sample", r), ("update", r),
        ("eval", r). A further number: it is interrupted after so many batches or updates."""
        self.plain, self.seen, self.o, self.phases = plain, seen, plain.o, phases
        self.state = torch.load(seen.folder / "checkpoint.pt", weights_only=True)
        self.pictures, self.updates, self.rows, self.losses = {}, {}, [], []
        self.means = {}  # {phase: {metric: [of each held-out prompt]}}
        self.kept = []  # of each round: [(number of the prompt, of the sample, pixels, reward)]
        self.split_pictures()

    def batches(self, kind):
        """How many images are sampled at a time. The probe scores a batch once a level and restart."""
        o = self.o
        n = {"sample": o.prompts_per_round * o.samples, "probe": 2 * o.probe_prompts}
        n = n.get(kind, len(HELD_OUT) * o.eval_samples)
        sizes = [min(o.sample_batch, n - first) for first in range(0, n, o.sample_batch)]
        times = (len(self.plain.grid) - 1) * o.probe_restarts if kind == "probe" else 1
        return [size for size in sizes for _ in range(times)]

    def split_pictures(self):
        """{phase: [(pixels, prompt)]} of what was scored. What is made again is the same again."""
        scored, sizes, place, coloured = self.seen.scored["likes"], [], 0, []
        for kind, *rest in self.phases:
            if kind == "update":
                continue
            batches = self.batches(kind)[: rest[1] if len(rest) > 1 else None]
            pictures = scored[place : place + sum(batches)]
            sizes, place = sizes + batches, place + sum(batches)
            phase = (kind, *rest[:1])
            for (one, prompt), (again, other) in zip(self.pictures.get(phase, pictures), pictures):
                assert np.array_equal(one, again) and prompt == other, phase
            if len(pictures) >= len(self.pictures.get(phase, ())):
                self.pictures[phase] = pictures
            if kind in ("base", "eval") or "own.py:colours" in parts_of(
                self.o.reward
            ):  # the others are for reports
                coloured += pictures[: -batches[-1] if len(rest) > 1 else None]
        assert place == len(scored) and sizes == self.seen.sizes
        for (one, prompt), (again, other) in zip(coloured, self.seen.scored["colours"], strict=True):
            assert np.array_equal(one, again) and prompt == other

    def assert_pictures(self, phase, latents, prompts):
        """Exactly these latents were decoded and scored, each with its prompt."""
        pictures = self.pictures[phase]
        assert [prompt for _, prompt in pictures] == prompts, phase
        for (pixels, _), x_0 in zip(pictures, latents, strict=True):
            gap = np.abs(pixels.astype(int) - self.plain.picture(x_0))
            assert gap.max() <= 1 and (gap > 0).sum() <= 6, phase
        assert len({p.tobytes() for p, _ in pictures}) == len(pictures)

    def values(self, phase, specs):
        """{reward or statistic: [of each picture]}"""
        pictures = self.pictures[phase]
        values = {spec: [worth(spec, *picture) for picture in pictures] for spec in specs}
        return values | {name: [f(pixels) for pixels, _ in pictures] for name, f in STATISTICS.items()}

    # ------------------------------------------------------------ stages

    def evaluate(self, phase, tuned_steps):
        o, prompts = self.o, [p for p in HELD_OUT for _ in range(self.o.eval_samples)]
        self.assert_pictures(phase, self.plain.evaluated(tuned_steps), prompts)
        names = [o.reward, *parts_of(o.reward)]
        names += [name for name in o.eval_rewards.split(",") if name not in names]
        n, means = o.eval_samples, {}
        for name, values in self.values(phase, names).items():
            means[name] = [np.mean(values[i * n : i * n + n]) for i in range(len(HELD_OUT))]
        pixels = [p for p, _ in self.pictures[phase]]
        means["diversity"] = [spread(pixels[i * n : i * n + n]) for i in range(len(HELD_OUT))]
        self.means[phase] = means

    def sample(self, r, tuned_steps, names):
        """Sampled, scored and accepted images of round r. names: {key of the checkpoint: place of the state
        among the levels}. Returns the run's accepted entry, shown to be right."""
        o, phase = self.o, ("sample", r)
        images = self.plain.sampled(r, tuned_steps)
        prompts = [TRAIN[i] for i, _, _ in images]
        self.assert_pictures(phase, [states[-1] for _, _, states in images], prompts)
        values = self.values(phase, [o.reward, *parts_of(o.reward)])
        rewards = values[o.reward]
        kept, entry = self.plain.accepted(r, rewards), self.state["accepted"][r]
        assert 0 < len(kept) and entry.keys() >= {"prompt", "reward", *names}
        assert entry["prompt"].tolist() == [images[n][0] for n in kept]
        assert np.allclose(entry["reward"], [rewards[n] for n in kept], rtol=1e-5)
        for name, place in names.items():
            for n, latent in zip(kept, entry[name], strict=True):
                assert close(images[n][2][place], latent), (r, name)
        size = {"topk": o.samples, "preference": 2}.get(o.rule, len(rewards) + 1)
        ranked = [rewards[n : n + size] for n in range(0, len(rewards), size)] if size <= len(rewards) else []
        pixels = [p for p, _ in self.pictures[phase]]
        groups = [pixels[n : n + o.samples] for n in range(0, len(pixels), o.samples)]
        row = {
            "round": r + 1,
            "reward_sampled": np.mean(rewards),
            "reward_accepted": np.mean([rewards[n] for n in kept]),
            "acceptance_rate": len(kept) / len(rewards),
            "flat_groups": np.mean([len(set(group)) == 1 for group in ranked]) if ranked else 0.0,
            "kl": self.plain.kl(rewards, kept),
            "diversity": np.mean([spread(group) for group in groups]),
        }
        row |= {name: np.mean(v) for name, v in values.items() if name != o.reward}
        self.rows.append(row)
        self.kept.append([(images[n][0], images[n][1], pixels[n], rewards[n]) for n in kept])
        return entry

    def update(self, r, data, prompts, level=None, above=-1):
        """The updates of round r, each time that the run makes them."""
        numbers, n = [], 0  # of the steps at which each repetition begins, and how many it makes
        for kind, *rest in self.phases:
            if kind == "update":
                steps = rest[1] if len(rest) > 1 else self.o.updates
                numbers += [(n, steps)] * (rest[0] == r)
                n += steps
        self.updates[r] = []
        for u, update in enumerate(self.plain.update(r, data, prompts, level, above)):
            for first, steps in numbers:
                if u < steps:
                    self.assert_step(update, first + u)
            for parameter, weight in zip(self.plain.parameters, self.seen.weights[numbers[-1][0] + u]):
                parameter.data.copy_(weight)
            self.updates[r].append(update)
        losses = [update.loss for update in self.updates[r]]
        self.losses += losses
        self.rows[r] |= {"images_trained_on": len(data), "loss": np.mean(losses)}
        self.rows[r]["reward_held_out"] = math.nan

    def assert_step(self, update, n):
        """The n-th step of the optimiser had the clipped gradient and left the weights."""
        assert self.seen.optimizers[n] == "AdamW"
        for mine, theirs in zip(update.gradients, self.seen.gradients[n], strict=True):
            assert close(mine, theirs, 1e-4), f"gradient of step {n + 1}"
        total = math.sqrt(sum((g.double() ** 2).sum().item() for g in self.seen.gradients[n]))
        assert abs(total - min(1, update.norm)) < 1e-4, f"norm of the gradient of step {n + 1}"
        for mine, theirs, gradient in zip(
            update.weights, self.seen.weights[n], update.gradients, strict=True
        ):
            # at first half of the gradients are zero: nothing pulls those weights, no decay either
            bound = 1e-2 * self.o.lr if gradient.any() else 1e-9
            assert (mine - theirs).abs().max() <= bound, f"weights after step {n + 1}"

    # ------------------------------------------------------------ the calls of the denoiser

    def assert_calls(self, lora, probe=()):
        """Which weights every call had, at which level, for how many images; and exactly what went into those
        with gradients. lora(phase, step): the state of the LoRA; probe: (timestep, images) of its calls."""
        calls = iter(self.seen.calls)
        for kind, *rest in self.phases:
            limit = rest[1] if len(rest) > 1 else None
            if kind == "probe":
                for t, size in probe:
                    call = next(calls)
                    assert not call.grad and call.lora == "off" and set(call.t.tolist()) == {t}
                    assert len(call.x) == size * (1 if self.o.guidance == 1 else 2)
            elif kind == "update":
                for update in self.updates[rest[0]][:limit]:
                    for x, t, words in update.inputs:
                        call, empty = next(calls), [self.plain.text("")] * len(x)
                        assert call.grad and call.lora == "on" and not call.autocast
                        assert call.checkpointing == self.o.gradient_checkpointing
                        copies, empty = (1, []) if update.guidance == 1 else (2, empty)
                        assert close(torch.cat([x] * copies), call.x, 1e-6)
                        assert call.t.tolist() == torch.cat([t] * copies).tolist()
                        assert close(torch.cat([*empty, *map(self.plain.text, words)]), call.text)
            else:
                for size in self.batches(kind)[:limit]:
                    for k, t in enumerate(self.plain.grid):
                        call = next(calls)
                        assert not call.grad and call.lora == lora((kind, *rest[:1]), k), (kind, rest, k)
                        assert call.t.tolist() == [t] * size * (1 if self.o.guidance == 1 else 2)
        assert next(calls, None) is None

    # ------------------------------------------------------------ what the run has written

    def assert_reports(self):
        """metrics.csv, TensorBoard, the checkpoint's rows and losses, the LoRA's file, results.json, what was
        printed, the figures, accepted/. Returns what else results.json holds."""
        for phase, means in self.means.items():
            if phase[0] == "eval":
                self.rows[phase[1]]["reward_held_out"] = np.mean(means[self.o.reward])
        self.assert_rows()
        self.assert_weights()
        self.assert_figures()
        self.assert_accepted()
        return self.assert_results()

    def assert_rows(self):
        o, seen = self.o, self.seen
        with open(seen.folder / "metrics.csv") as file:
            written = list(csv.DictReader(file))
        for rows in (written, self.state["rows"]):
            assert len(rows) == len(self.rows) == o.rounds
            for mine, theirs in zip(self.rows, rows):
                assert list(theirs) == list(mine)
                theirs = {name: float(value) for name, value in theirs.items()}
                assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-6, nan_ok=True)
        scalars = read_scalars(seen.folder)
        assert scalars.keys() == self.rows[0].keys()
        for name, points in scalars.items():
            assert [step for step, _ in points] == list(range(1, o.rounds + 1))
            expected = [row[name] for row in self.rows]
            assert [value for _, value in points] == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
        assert self.state["losses"] == pytest.approx(self.losses, rel=1e-5)
        assert self.state["round"] == o.rounds

    def assert_weights(self):
        """The stock pipeline loads the weights after the last step; the optimiser's state is of as many steps
        as one run makes."""
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(
            self.plain.model, dtype=torch.float32, safety_checker=None
        )
        pipe.load_lora_weights(str(self.seen.folder))
        (config,) = pipe.unet.peft_config.values()
        assert (config.r, config.lora_alpha) == (self.o.lora_rank, self.o.lora_alpha)
        loaded = [p for n, p in pipe.unet.named_parameters() if "lora_" in n]
        for stored in (loaded, self.state["lora"].values()):
            for mine, theirs in zip(self.seen.weights[-1], stored, strict=True):
                assert torch.equal(mine, theirs)
        made = self.plain.optimizer.state_dict()["state"].values()
        for mine, theirs in zip(made, self.state["optimizer"]["state"].values(), strict=True):
            assert mine["step"] == theirs["step"] == self.o.rounds * self.o.updates
            for name in ("exp_avg", "exp_avg_sq"):
                assert close(mine[name], theirs[name], 1e-3)

    def assert_results(self):
        o, seen = self.o, self.seen
        evaluations = [phase for phase in self.means if phase[0] == "eval"]
        base, tuned = self.means["base",], self.means[evaluations[-1]]
        results = json.loads((seen.folder / "results.json").read_text())
        table = results.pop("table")
        assert [row["metric"] for row in table] == list(base) == list(tuned)
        for row in table:
            name = row.pop("metric")
            change = np.subtract(tuned[name], base[name])
            expected = {"base": np.mean(base[name]), "tuned": np.mean(tuned[name])}
            expected |= {"difference": change.mean(), "se": change.std(ddof=1) / len(HELD_OUT) ** 0.5}
            assert row == pytest.approx(expected, rel=1e-4, abs=2e-6), name
            (printed,) = re.findall(rf"^{re.escape(name)} +(\S+) +(\S+) +(\S+) +(\S+)$", seen.out[-1], re.M)
            assert [float(word) for word in printed] == pytest.approx(list(expected.values()), abs=6e-4)
        assert f"   ({o.reward} was optimised)" in seen.out[-1]
        printed = "\n".join(seen.out)
        for value in re.findall(rf"^  base +held-out {re.escape(o.reward)} (\S+)$", printed, re.M):
            assert float(value) == pytest.approx(np.mean(base[o.reward]), abs=6e-4)
        pattern = (
            rf"^  round (\d)/{o.rounds}  reward (\S+), accepted (\S+) \((\S+)%; (\d+)% of groups without"
        )
        pattern += r" signal\), held-out reward (\S+), training loss (\S+), (?:\d+ images/s, )?\d+ s left$"
        lines = re.findall(pattern, printed, re.M)
        assert [int(line[0]) for line in lines] == list(range(1, o.rounds + 1))
        for line, row in zip(lines, self.rows):
            names = ("reward_sampled", "reward_accepted", "acceptance_rate", "flat_groups", "reward_held_out")
            expected = [row[name] * (100 if name in names[2:4] else 1) for name in (*names, "loss")]
            assert [float(word) for word in line[1:]] == pytest.approx(expected, abs=0.06, nan_ok=True)
            assert float(line[1]) == pytest.approx(row["reward_sampled"], abs=6e-4)
            assert float(line[2]) == pytest.approx(row["reward_accepted"], abs=6e-4)
            assert float(line[6]) == pytest.approx(row["loss"], abs=6e-5)
        assert results.pop("seconds") > 0
        return results

    def assert_figures(self):
        """The last grid.png and the last curves.png."""
        o, n = self.o, self.o.eval_samples
        evaluations = [phase for phase in self.means if phase[0] == "eval"]
        grid = [f for f in self.seen.figures if f.axes[0].images][-1]
        curves = [f for f in self.seen.figures if len(f.axes) == 2 and not f.axes[0].images][-1]
        shown = [axis.images[0].get_array() for axis in grid.axes]
        expected = []
        for i, prompt in enumerate(HELD_OUT):
            assert grid.axes[2 * n * i].get_title(loc="left") == prompt
            for phase in (("base",), evaluations[-1]):
                expected += [pixels for pixels, _ in self.pictures[phase][n * i : n * i + n]]
        for one, other in zip(shown, expected, strict=True):
            assert np.array_equal(one, other)
        left, right = curves.axes
        lines = {line.get_label().split(",")[0]: line.get_xydata().tolist() for line in left.lines}
        rows = [row["round"] for row in self.rows]
        held_out = [(0, np.mean(self.means["base",][o.reward]))]
        held_out += [(r + 1, np.mean(self.means["eval", r][o.reward])) for _, r in evaluations]
        for name, points in (
            ("accepted", list(zip(rows, [row["reward_accepted"] for row in self.rows]))),
            ("sampled", list(zip(rows, [row["reward_sampled"] for row in self.rows]))),
            ("held out", held_out),
        ):
            assert np.allclose(lines.pop(name), points, rtol=1e-5, atol=1e-6)
        assert not lines and np.allclose(right.lines[0].get_ydata(), self.losses, rtol=1e-5)

    def assert_accepted(self):
        """accepted/ holds the accepted images, clean, with their prompts and rewards."""
        folder, by_number = self.seen.folder / "accepted", "sample" not in self.state["accepted"][0]
        if not self.o.save_accepted:
            assert not folder.exists()
            return
        lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        expected = []
        for r, kept in enumerate(self.kept):
            for n, (i, j, pixels, reward) in enumerate(kept):
                label = f"{n:06d}" if by_number else f"{i:06d}_{j:03d}"
                expected.append((f"round{r + 1:03d}_{label}.png", i, pixels, reward))
        assert sorted(p.name for p in folder.glob("*.png")) == sorted(name for name, *_ in expected)
        for line, (name, i, pixels, reward) in zip(lines, expected, strict=True):
            assert line == {"file_name": name, "text": TRAIN[i], "reward": pytest.approx(reward, rel=1e-5)}
            gap = np.abs(np.array(Image.open(folder / name)).astype(int) - pixels)
            assert gap.max() <= 1 and (gap > 0).sum() <= 6

    def assert_telling(self):
        """The tuned images differ from the base's, no seed comes twice, no held-out prompt is trained on."""
        evaluations = [phase for phase in self.means if phase[0] == "eval"]
        for phase in evaluations:
            for (one, _), (other, _) in zip(self.pictures["base",], self.pictures[phase]):
                assert (np.abs(one.astype(int) - other) > 1).sum() > 60
        seeds = [seed_of("eval", i, j) for i in range(len(HELD_OUT)) for j in range(self.o.eval_samples)]
        seeds += self.plain.seeds
        assert len(set(seeds)) == len(seeds)
        trained = {w for updates in self.updates.values() for update in updates for w in update.words}
        assert not trained & set(HELD_OUT)
        assert ("" in trained) == (self.o.prompt_dropout > 0)


# ---------------------------------------------------------------- half precision


def assert_bfloat16(plain, seen, name, **levels):
    """The frozen model is in bfloat16 and trained under autocast; the LoRA, its gradients and the loss are
    float32 and close to those of a float32 model. name: of the data in the checkpoint, of one round."""
    (kept,) = torch.load(seen.folder / "checkpoint.pt", weights_only=True)["accepted"]
    prompts = [TRAIN[i] for i in kept["prompt"].tolist()]
    assert kept[name].dtype == torch.float32
    for call in seen.calls:
        assert call.x.dtype == call.text.dtype == torch.bfloat16 and call.autocast == call.grad
    (update,), (gradients,), (weights,) = (
        list(plain.update(0, kept[name], prompts, **levels)),
        seen.gradients,
        seen.weights,
    )
    (loss,) = torch.load(seen.folder / "checkpoint.pt", weights_only=True)["losses"]
    assert loss == pytest.approx(update.loss, rel=0.03)
    for mine, theirs, weight in zip(update.gradients, gradients, weights, strict=True):
        assert theirs.dtype == weight.dtype == torch.float32
        assert close(mine, theirs, 0.2)
