"""Noise PPO: the model stays frozen; PPO learns a policy over its initial noise, against a black-box reward.

Paper: "A Minimalist Method for Fine-tuning Text-to-Image Diffusion Models", arXiv 2506.12036.
Run: python noise_ppo.py

Notation
    c the prompt; z the initial noise, a latent of D numbers; x(z, c) the image that the sampler makes of both
    r(x, c) the reward; A the advantage; eps ~ N(0, I)
    policy pi(z | c) = N(mu(c), diag sigma(c)^2);  l = log pi(z | c) / D;  rho = exp(l - l_old)
Equations
    (1) z = mu(c) + sigma(c) eps;  at the start mu = 0 and sigma = 1: exactly the standard noise
    (2) log pi(z | c) = sum over the D numbers of  [-((z - mu) / sigma)^2 / 2 - log sigma - log(2 pi) / 2]
    (3) A = a / root mean square of a over the batch,  a = r - mean of r over the prompt's images
    (4) loss  -E min(rho A, clip(rho, 1 - delta, 1 + delta) A) + beta KL(pi || N(0, I)) / D
    (5) KL(pi || N(0, I)) = sum over the D numbers of  (mu^2 + sigma^2 - 1 - log sigma^2) / 2
    (6) KL(pi_old || pi) = E_old[(log pi - log pi_old)^2] / 2  to second order: how far an iteration moved
    (7) explained variance = 1 - Var(r - b) / Var(r),  b: the mean reward of the prompt's other images;
        a prompt that says nothing gives about -1 / (images a prompt - 1)
Choices that the paper leaves open
    l and the KL of (4) are divided by D. With --reduction sum they are not: at rho = 1 that only scales the
    gradient by D, so beta keeps its meaning, but delta acts on another scale.
    Steps are spaced "trailing": every number of steps starts at the same noise level, so that the same z
    means the same thing. They divide the training steps, as the stock DDIM step needs. (A flow's steps always
    start at pure noise.)
    The policy reads the token states, or the pooled embedding where the model has one (SD XL, SD 3).
    By default only mu is learnt. On validation prompts that gained as much as learning sigma too
    (--no-mean_only), at half the KL.
"""

import inspect
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
from tqdm import tqdm

from common import (
    DTYPES,
    EMBEDDED,
    ROOT,
    SWITCH_FILE,
    Device,
    Dtype,
    Model,
    by_family,
    check_device,
    check_lora,
    derived_seed,
    draw_noise,
    read_switch,
    schedule_prompts,
    stock_code,
    stock_switch,
    with_family_defaults,
)
from rewards import diversity, image_statistics, read_rewards, score
from utils.figures import GRID_IMAGES, save_grid, save_panels, shrink
from utils.processes import SIZE, gather, own_share, several_processes, sum_gradients
from utils.prompts import TRAIN_PROMPTS, read_prompt_sets
from utils.runs import (
    InputError,
    check_output,
    check_range,
    load_checkpoint,
    log_metrics,
    make_run_folder,
    paired_table,
    print_table,
    run_script,
    save_checkpoint,
    write_atomically,
    write_json,
)

# delta for the embedded model, SD 1 and 2, SD XL, SD 3: smaller for larger latents
DEFAULT_CLIP = (1e-3, 1e-4, 1e-4, 1e-4)
# two controls: "temperature", noise s eps with the s that is best on training prompts, and "one_for_all", the
# policy's mu and log sigma averaged over the training prompts
TEMPERATURES = (0.4, 0.6, 0.8, 1.0)
Reduction = Literal["mean", "sum"]


@dataclass
class Args:
    """Noise PPO: learn the initial noise of a frozen model by PPO."""

    seed: int = 0  # seed of the training run; evaluation images do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: Device = "auto"  # auto: CUDA if there is one
    dtype: Dtype = "float32"  # precision of the frozen model; the policy is always float32

    model: str = EMBEDDED  # folder or hub id of a Stable Diffusion 1.x, 2.x, XL or 3.x pipeline
    t5: bool = True  # SD 3: load the third text encoder, 10 GB, which reads long prompts better
    lora: str = ""  # run folder of graft.py or pgraft.py: the frozen model is its tuned one
    switch_timestep: float | None = None  # the LoRA is off from this timestep on; None: pgraft.json's
    prompts: str = TRAIN_PROMPTS  # .txt (one a line), .csv, .tsv or .jsonl; file.csv:column
    eval_prompts: str = ""  # held-out prompts; left out: the shapes ones, or every tenth of --prompts
    eval_samples: int = 4  # images per held-out prompt
    eval_every: int = 10  # iterations between evaluations at --steps; 0: only before and after
    eval_steps: tuple[int, ...] = (4, 5, 10, 20, 40)  # numbers of steps of the final evaluation
    controls: bool = True  # evaluate the controls too, see TEMPERATURES

    steps: int = 4  # steps while training; must divide the training steps of SD 1.x, 2.x and XL
    guidance: Annotated[float | None, by_family("guidance")] = None  # classifier-free guidance; 1: none
    sample_batch: Annotated[int | None, by_family("sample_batch")] = None  # images sampled at a time

    reward: str = "shapes_strict"  # to maximise: a name of rewards.py, file.py:function, or 0.7*one+0.3*other
    eval_rewards: Annotated[str | None, by_family("eval_rewards")] = None  # further ones to report: a,b
    reward_device: Device = "auto"  # of rewards that are models
    reward_dtype: Dtype = "float32"  # their precision
    reward_batch: int = 16  # images that they score at a time

    iterations: int = 60  # times to sample and update
    prompts_per_iteration: int = 64  # prompts sampled in an iteration, none twice
    samples: int = 8  # images per prompt, whose mean reward is the baseline
    normalise: Literal["batch", "prompt", "none"] = "batch"  # what A is normalised over
    epochs: int = 2  # passes over an iteration's images
    minibatch: int = 256  # images per optimiser update
    clip: Annotated[float | None, by_family(DEFAULT_CLIP)] = None  # delta of equation (4)
    reduction: Reduction = "mean"  # of log-density and KL over the latent's D numbers
    kl_weight: float = 0.005  # beta of equation (4), advantage per nat
    lr: float = 6e-3  # AdamW learning rate, falls linearly to 0

    policy: Literal["conditional", "unconditional"] = "conditional"  # or one mu and one sigma for all prompts
    mean_only: bool = True  # sigma stays 1
    std_only: bool = False  # mu stays 0
    hidden: int = 64  # width of the policy's two layers
    grid: int = 4  # mu and log sigma are predicted on a grid x grid, enlarged bilinearly

    def __post_init__(self):
        """InputError for a value out of range, or for settings that do not go together."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "switch_timestep", -1, 999)
        check_range(self, "eval_samples", 2, 10**4)
        check_range(self, "eval_every", 0, 10**9)
        check_range(self, "steps", 1, 999)
        check_range(self, "guidance", 1, 10**6)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "reward_batch", 1, 10**6)
        check_range(self, "iterations", 1, 10**5)
        check_range(self, "prompts_per_iteration", 1, 10**6)
        check_range(self, "samples", 2, 10**4)
        check_range(self, "epochs", 1, 10**4)
        check_range(self, "minibatch", 1, 10**6)
        check_range(self, "clip", 1e-9, 1e9)
        check_range(self, "kl_weight", 0, 1e9)
        check_range(self, "lr", 1e-12, 1)
        check_range(self, "hidden", 1, 10**4)
        check_range(self, "grid", 1, 10**6)
        if not all(1 <= steps <= 999 for steps in self.eval_steps):
            raise InputError(f"--eval_steps {' '.join(map(str, self.eval_steps))}: must be between 1 and 999")
        if self.mean_only and self.std_only:
            raise InputError(
                "--mean_only --std_only: nothing is left to learn; give --no-mean_only with --std_only"
            )
        if self.switch_timestep is not None and not self.lora:
            raise InputError(
                f"--switch_timestep {self.switch_timestep:g}: is of a LoRA; give --lora, its run folder"
            )


# ================================================================ equations: tensors in, tensors out


def log_prob(z, mean, log_std, reduction):
    """log N(z; mean, diag exp(log_std)^2), equation (2). All (batch, ...) -> (batch,), in nats (reduction
    "sum") or nats per dimension ("mean"). ValueError for another reduction."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} must be mean or sum")
    each = -0.5 * ((z - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return getattr(each.flatten(1), reduction)(1)


def kl_to_standard_normal(mean, log_std):
    """KL(N(mean, diag exp(log_std)^2) || N(0, I)) in nats, equation (5). Both (batch, ...) -> (batch,)."""
    return (0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std).flatten(1).sum(1)


def ppo_loss(log_prob_new, log_prob_old, advantage, clip):
    """PPO's clipped objective (arXiv 1707.06347, equation 7), negated.
    All (batch,) -> scalar to minimise, the batch's mean."""
    ratio = (log_prob_new - log_prob_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def advantages(rewards, prompt_ids, normalise="batch"):
    """Equation (3). rewards, prompt_ids (any integers): (batch,) -> (batch,). Equal rewards give 0, never
    NaN.

    normalise: what divides the centred rewards: their root mean square over the "batch" (then A has variance
    1) or over the "prompt" (a prompt with little spread weighs as much as any), or "none".
    """
    _, place, count = prompt_ids.unique(return_inverse=True, return_counts=True)

    def prompt_mean(values):
        return (torch.zeros_like(values[: len(count)]).index_add(0, place, values) / count)[place]

    centred = rewards - prompt_mean(rewards)
    square = {
        "batch": centred.square().mean(),
        "prompt": prompt_mean(centred.square()),
        "none": torch.ones(()),
    }
    return centred / square[normalise].sqrt().clamp(min=1e-6)


def explained_variance(rewards, samples):
    """Equation (7). rewards: (prompts x samples,), prompt by prompt."""
    group = rewards.view(-1, samples)
    residual = (group - group.mean(1, keepdim=True)) * samples / (samples - 1)
    return 1 - (residual.square().mean() / rewards.var(correction=0)).item()


def policy_statistics(mean, log_std, log_ratio, kl):
    """What an iteration did. mean, log_std: of the new policy (n, c, h, w); log_ratio: log rho of what was
    sampled (n,), in nats; kl: to N(0, I) (n,), in nats."""
    return {
        "approximate_kl": 0.5 * log_ratio.square().mean().item(),  # equation (6), nats
        "kl_per_dimension": kl.mean().item() / mean[0].numel(),
        "mean_rms": mean.square().mean().sqrt().item(),
        "mean_rms_own": (mean - mean.mean(0))
        .square()
        .mean()
        .sqrt()
        .item(),  # of the part that differs by prompt
        "std": log_std.exp().mean().item(),
        "std_spread": log_std.exp().std().item(),
    }


# ================================================================ policy


def text_features(model, prompts):
    """What the policy reads: the token states (n, tokens, width), or the pooled embedding (n, 1, width) of
    the models that have one, whose states are 10^5 to 10^6 numbers a prompt."""
    model.remember(prompts)
    parts = [model.split(model.encode(prompts[i : i + 64])) for i in range(0, len(prompts), 64)]
    return torch.cat([states if pooled is None else pooled[:, None] for states, pooled in parts])


class NoisePolicy(torch.nn.Module):
    """pi(z | c), equation (1), on the frozen text encoders' text_features (batch, tokens, width).

    Two layers on the standardised, flattened features, then mu and log sigma on a coarse grid, enlarged
    bilinearly to any latent size. The last layer starts at zero: N(0, I) exactly. In use:  policy =
    NoisePolicy.load(folder, pipe); pipe(prompt, latents=policy.sample(prompt)), with the scheduler and the
    settings in noise_ppo.json.
    """

    def __init__(
        self,
        tokens,
        width,
        latent_shape,
        hidden=64,
        grid=4,
        policy="conditional",
        mean_only=False,
        std_only=False,
    ):
        super().__init__()
        channels, *self.size = latent_shape
        self.latent_shape = tuple(latent_shape)
        self.grid = [min(grid, side) for side in self.size]
        self.conditional, self.learn_mean, self.learn_std = (
            policy == "conditional",
            not std_only,
            not mean_only,
        )
        self.register_buffer("centre", torch.zeros(tokens, width))
        self.register_buffer("scale", torch.ones(tokens, width))
        self.body = torch.nn.Sequential()
        for inputs in (tokens * width, hidden):
            self.body.extend([torch.nn.Linear(inputs, hidden), torch.nn.LayerNorm(hidden), torch.nn.GELU()])
        self.head = torch.nn.Linear(hidden, 2 * channels * math.prod(self.grid))
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def standardise(self, text):
        """Take centre and scale from the training prompts' features (n, tokens, width).
        Without, all prompts look alike."""
        self.centre.copy_(text.float().mean(0))
        self.scale.copy_(1 / (text.float().std(0, correction=0) + 1e-2))

    def forward(self, text):
        """text: (batch, tokens, width) -> (mean, log_std), each (batch, channels, height, width), float32."""
        features = (text.float() - self.centre) * self.scale * self.conditional  # (batch, tokens, width)
        coarse = self.head(self.body(features.flatten(1)))  # (batch, 2 channels x grid x grid)
        coarse = coarse.unflatten(1, (-1, *self.grid))  # (batch, 2 channels, grid, grid)
        mean, log_std = torch.nn.functional.interpolate(coarse, self.size, mode="bilinear").chunk(2, 1)
        return mean * self.learn_mean, log_std * self.learn_std

    @torch.no_grad()
    def sample(self, prompt, generator=None):
        """Latents (n, channels, height, width) for a stock pipeline's `latents=`. prompt: a string or a list
        of n. generator: as there."""
        from diffusers.utils.torch_utils import randn_tensor

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        parameters = inspect.signature(self.pipe.encode_prompt).parameters
        options = {name: None for name in ("prompt_2", "prompt_3") if name in parameters}
        options |= {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        states, _, *pooled = self.pipe.encode_prompt(prompt=prompts, device=self.pipe.device, **options)
        text = pooled[0][:, None] if pooled else states
        eps = randn_tensor((len(prompts), *self.latent_shape), generator, self.pipe.device, text.dtype)
        mean, log_std = self(text)
        return (mean + log_std.exp() * eps).to(text.dtype)

    def save(self, folder, settings):
        """Write policy.safetensors and noise_ppo.json;
        settings["policy"] holds the arguments of this class."""
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        write_atomically(Path(folder) / "policy.safetensors", safetensors.torch.save(weights))
        write_json(Path(folder) / "noise_ppo.json", settings)

    @classmethod
    def load(cls, folder, pipe):
        """The policy saved in `folder`, for `pipe`, the stock pipeline of the model it was learnt for."""
        settings = json.loads((Path(folder) / "noise_ppo.json").read_text(encoding="utf-8"))
        policy = cls(**settings["policy"])
        policy.load_state_dict(safetensors.torch.load_file(Path(folder) / "policy.safetensors"))
        policy.pipe = pipe
        return policy.to(pipe.device).requires_grad_(False)


# ================================================================ sampling


def guided_prediction(model, x, t, text, guidance):
    """The prediction that samples: unconditional + guidance * (conditional - unconditional). x: (batch, c, h,
    w), t: () or (batch,), text: (batch, rows, width)."""
    if guidance == 1:
        return model.predict(x, t, text)
    text = torch.cat([model.empty.expand_as(text), text])  # (2 batch, rows, width)
    predictions = model.predict(x.repeat(2, 1, 1, 1), t.expand(len(x)).repeat(2), text)
    unconditional, conditional = predictions.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def denoise(model, x, levels, text, guidance):
    """DDIM with eta 0 (arXiv 2010.02502, equation 12; of a flow: Euler's step) along levels, falling
    timesteps of which -1 is the clean one. x: (batch, c, h, w) at levels[0] -> x at levels[-1], float32."""
    times = torch.tensor(levels, device=model.device)  # one transfer, none inside the loop
    for k, (t, after) in enumerate(zip(levels, levels[1:])):
        alpha, sigma = model.alpha_sigma(t)
        alpha_next, sigma_next = model.alpha_sigma(after)
        prediction = guided_prediction(model, x, times[k], text, guidance)
        if model.prediction_type == "epsilon":
            x_0, eps = (x - sigma * prediction) / alpha, prediction
        elif model.prediction_type == "v_prediction":  # v = alpha eps - sigma x_0
            x_0, eps = alpha * x - sigma * prediction, alpha * prediction + sigma * x
        else:  # a flow's velocity eps - x_0
            x_0, eps = x - sigma * prediction, x + alpha * prediction
        x = alpha_next * x_0 + sigma_next * eps
    return x


def sample(model, z, text, steps, guidance, switch=None):
    """z: (batch, c, h, w) -> clean latents x_0 (batch, c, h, w), float32. switch: of a model with a LoRA,
    which takes the steps that start above this timestep."""
    levels, x = [*model.timesteps(steps), -1], z.to(model.device, model.dtype).float()
    if switch is None:
        return denoise(model, x, levels, text, guidance)
    tuned = sum(t > switch for t in levels[:-1])  # number of steps
    with model.lora_merged():
        x = denoise(model, x, levels[: tuned + 1], text, guidance)
    with model.lora_off():
        return denoise(model, x, levels[tuned:], text, guidance)


def sample_and_score(model, rewards, prompts, z, steps, args, label, statistics=False):
    """Images of the prompts (n) from the initial noises z (n, c, h, w), a batch at a time.
    Returns {reward or statistic: (n,)} and the images, most of them shrunk."""
    scores, images = [], []
    starts = own_share(range(0, len(prompts), args.sample_batch))  # of this process, under torchrun
    for i in tqdm(starts, desc=label, unit="batch", leave=False, mininterval=1):
        batch = slice(i, i + args.sample_batch)
        x_0 = sample(
            model, z[batch], model.encode(prompts[batch]), steps, args.guidance, args.switch_timestep
        )
        batch_images = model.decode(x_0, label)
        extra = image_statistics(batch_images) if statistics else {}
        scores.append(score(rewards, batch_images, prompts[batch]) | extra)
        images.append(shrink(batch_images, i))
    scores, images = gather(scores), gather(images)  # of all batches, in order
    scores = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    return scores, [image for batch in images for image in batch]


# ================================================================ evaluation


def evaluate(model, rewards, prompts, mean, log_std, steps, args, label, tag="eval"):
    """Fixed prompts x fixed seeds, others for each tag, equation (1). mean, log_std: (prompts or 1, c, h, w).
    Returns ({metric: (prompts,), the mean over a prompt's images; best_of_m: of rewards[0]}, images of
    grid.png)."""
    n = args.eval_samples
    seeds = [derived_seed(tag, i, j) for i in range(len(prompts)) for j in range(n)]
    eps = draw_noise(seeds, 0, model.latent_shape, model.dtype)[0]  # as the stock pipeline draws
    eps = eps.unflatten(0, (-1, n))  # (prompts, n, c, h, w)
    z = (mean.cpu()[:, None] + log_std.exp().cpu()[:, None] * eps).flatten(0, 1)
    repeated = [p for p in prompts for _ in range(n)]
    scores, images = sample_and_score(model, rewards, repeated, z, steps, args, label, statistics=True)
    means = {name: values.view(-1, n).mean(1) for name, values in scores.items()}
    means["diversity"] = torch.tensor([diversity(images[i * n : i * n + n]) for i in range(len(prompts))])
    rewarded = scores[rewards[0].spec].view(-1, n)  # (prompts, n)
    means |= {f"best_of_{m}": rewarded.view(-1, n // m, m).amax(2).mean(1) for m in (2, 4, 8) if n % m == 0}
    return means, images[:GRID_IMAGES]


@torch.no_grad()
def final_evaluation(model, policy, rewards, prompts, held_out, all_steps, args):
    """Standard noise, the policy and the controls at every number of steps, on the same seeds.
    Returns (results, {name: images of grid.png, at args.steps})."""
    zero = torch.zeros(1, *model.latent_shape)
    # name: (mean, log_std), each (prompts or 1, c, h, w)
    noises = {"standard": (zero, zero), "learnt": policy(text_features(model, held_out))}
    results = {"kl": kl_to_standard_normal(*noises["learnt"]).mean().item()}
    results["kl_per_dimension"] = results["kl"] / zero.numel()
    if args.controls:
        tuning_prompts, reward_by_s = prompts[: max(2, len(held_out) // 2)], {}
        for s in TEMPERATURES:
            label = f"temperature {s}"
            options = (zero, zero + math.log(s), args.steps, args, label)
            # on other seeds than those of the evaluation
            means, _ = evaluate(model, rewards[:1], tuning_prompts, *options, tag="temperature")
            reward_by_s[s] = means[args.reward].mean().item()
        results["temperature"] = max(reward_by_s, key=reward_by_s.get)
        noises["temperature"] = (zero, zero + math.log(results["temperature"]))
        if args.policy == "conditional":
            by_prompt = policy(text_features(model, sorted(set(prompts))))
            noises["one_for_all"] = [part.mean(0, keepdim=True) for part in by_prompt]
    results["by_steps"], grid_images = [], {}
    for steps in all_steps:
        metrics = {}
        for name, (mean, log_std) in noises.items():
            if name == "temperature" and results["temperature"] == 1:
                metrics[name] = metrics["standard"]
                continue
            label = f"{steps} steps, {name}"
            metrics[name], images = evaluate(model, rewards, held_out, mean, log_std, steps, args, label)
            if steps == args.steps:
                grid_images[name] = images
        table = paired_table(metrics["standard"], metrics["learnt"], ("standard", "learnt", "gain"))
        results["by_steps"].append(steps_row(steps, metrics, table, args))
        if steps == args.steps:
            results["table"] = table
    return results, grid_images


def steps_row(steps, metrics, table, args):
    """The final evaluation at one number of steps.
    metrics: {noise: {metric: (prompts,)}}, table: of paired_table."""
    row = {"steps": steps, "calls": steps * (2 if args.guidance > 1 else 1)}
    row |= {key: table[0][key] for key in ("standard", "learnt", "gain", "se")}
    row |= {name: means[args.reward].mean().item() for name, means in metrics.items() if name not in row}
    best = {name: values for name, values in metrics["standard"].items() if name.startswith("best_of")}
    row |= {name: values.mean().item() for name, values in best.items()}
    kept = metrics["learnt"]["diversity"].mean() / metrics["standard"]["diversity"].mean()
    row["diversity_kept"] = kept.item()
    row["means"] = {name: {k: v.mean().item() for k, v in means.items()} for name, means in metrics.items()}
    return row


# ================================================================ what a run prints


def describe(args, model, policy, per_iteration, held_out, all_steps, folder):
    """The checked, derived settings, printed before the run.
    per_iteration: number of prompts; held_out: list."""
    images, size = per_iteration * args.samples, sum(p.numel() for p in policy.parameters())
    share = size / sum(p.numel() for p in model.denoiser.parameters())
    learns = "sigma stays 1" if args.mean_only else "mu stays 0" if args.std_only else "mu and sigma"
    lora = f", with the LoRA of {args.lora}" if args.lora else ""
    steps = ", ".join(map(str, all_steps))
    return f"""Noise PPO -> {folder}
  model      {args.model}, {model.prediction_type}, {args.dtype} on {args.device}{several_processes()}, \
frozen{lora}
  policy     {args.policy}, {learns}: {size:,} parameters, {share:.1%} of the denoiser's; noise \
{tuple(model.latent_shape)}
  sampling   {args.iterations} iterations x {per_iteration} prompts x {args.samples} = \
{args.iterations * images} images, {args.steps} steps, guidance {args.guidance:g}, reward {args.reward}
  update     {args.epochs} epochs in minibatches of {min(args.minibatch, images)}, clip {args.clip:g} on the \
ratio of the {args.reduction} log-density, KL weight {args.kl_weight:g}, lr {args.lr:g}
  evaluation {len(held_out)} held-out prompts x {args.eval_samples} images at {steps} steps, \
equal seeds for all noises"""


def print_iteration(row, iterations, seconds):
    """One line on an iteration. seconds: since the run began."""
    left = seconds / row["iteration"] * (iterations - row["iteration"])
    rewarded = f"reward {row['reward']:.3f}, held-out {row['reward_held_out']:.3f}"
    moved = f"clipped {row['clip_fraction']:.0%}, KL {row['kl_per_dimension']:.3f} a dimension"
    print(f"  iteration {row['iteration']}/{iterations}  {rewarded}, {moved}, {left:.0f} s left", flush=True)


def show_steps(folder, rows, results, grid_images, prompts, args):
    """Write grid.png, gain.png and curves.png; print the tables of the final evaluation.
    rows: of metrics.csv."""
    title = "learnt noise, same random draws (standard noise on the left)"
    images = (grid_images["standard"], grid_images["learnt"])
    save_grid(folder / "grid.png", *images, prompts, args.eval_samples, title)
    by_steps = results["by_steps"]
    columns = {name: [row[name] for row in by_steps] for name in by_steps[0] if name != "means"}
    steps, gain = columns.pop("steps"), (columns["gain"], columns.pop("se"))
    no_reward = ("calls", "gain", "diversity_kept")
    lines = {name: (steps, values) for name, values in columns.items() if name not in no_reward}
    panels = [("steps", args.reward, lines), ("steps", "gain ± s.e.", {"learnt - standard": (steps, *gain)})]
    save_panels(folder / "gain.png", panels, log_x=True)
    panels = []
    for names in (
        ("reward", "reward_held_out"),
        ("clip_fraction", "explained_variance"),
        ("kl_per_dimension", "mean_rms", "std"),
    ):
        lines = {name: ([row["iteration"] for row in rows], [row[name] for row in rows]) for name in names}
        panels.append(("iteration", args.reward if "reward" in names else "", lines))
    save_panels(folder / "curves.png", panels)

    print(f"\nheld-out {args.reward} (calls: of the denoiser an image; best of n takes n times as many)")
    print("steps" + "".join(f"{name:>16}" for name in columns))
    for i, n in enumerate(steps):
        cells = [f"{values[i]:.3f}" for values in columns.values()]
        cells[0], cells[3] = str(columns["calls"][i]), f"{gain[0][i]:+.3f} ± {gain[1][i]:.3f}"
        print(f"{n:>5}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"KL to standard noise {results['kl']:.1f} nats, {results['kl_per_dimension']:.3f} a dimension")
    print_table(results["table"], f"at {args.steps} steps")


def usage_code(model, folder, prompt, args):
    """Python that makes the evaluation's first image with the learnt noise in stock diffusers."""
    lora, callback = "", ""
    if args.lora:
        lora = f"\npipe.load_lora_weights({str(Path(args.lora).resolve())!r})"
    if args.lora and args.switch_timestep >= 0:
        callback = ", callback_on_step_end=base_from_the_switch_on"
        lora += "\n\n" + stock_switch(f"{args.switch_timestep:g}")
    settings = f"latents=latents, num_inference_steps={args.steps}, guidance_scale={args.guidance}"
    return f"""{stock_code(model, 'timestep_spacing="trailing", ')}{lora}
import sys; sys.path.insert(0, {str(ROOT)!r}); from noise_ppo import NoisePolicy
policy = NoisePolicy.load({str(folder.resolve())!r}, pipe)
latents = policy.sample({prompt!r}, torch.Generator().manual_seed({derived_seed("eval", 0, 0)}))
pipe({prompt!r}, {settings}{callback}).images[0].save("learnt.png")"""


# ================================================================ the run


def prepare(args):
    """Check all that needs no diffusion model, then load the rewards that are models. Returns (args without
    gaps, training prompts, held-out prompts, rewards): rewards[0] is optimised, all are reported."""
    check_output(args.output, args.resume)
    args = with_family_defaults(args, clip=DEFAULT_CLIP)
    args.device = check_device(args.device, args.dtype)
    if args.lora:
        check_lora(args.lora, "--lora")
    if args.lora and args.switch_timestep is None:  # -1: the LoRA is on in all steps
        switched = (Path(args.lora) / SWITCH_FILE).is_file()
        args.switch_timestep = read_switch(args.lora, "--switch_timestep") if switched else -1.0
        check_range(args, "switch_timestep", -1, 999)
    prompts, held_out = read_prompt_sets(args.prompts, args.eval_prompts)
    rewards = read_rewards(args.reward, args.eval_rewards)
    for reward in rewards:
        reward.check_prompts(prompts, "--prompts")
        reward.check_prompts(held_out, "--eval_prompts")
    for reward in rewards:
        reward.load(args.reward_device, args.reward_dtype, args.reward_batch)
    return args, prompts, held_out, rewards


def main(args):
    args, prompts, held_out, rewards = prepare(args)
    all_steps = sorted({args.steps, *args.eval_steps})
    model = Model(args.model, args.device, DTYPES[args.dtype], args.t5)
    if args.lora:
        model.load_lora(args.lora)
    scheduler, scheduler_options = model.pipeline.scheduler, {}
    if model.prediction_type != "flow":
        scheduler_options = {"timestep_spacing": "trailing", "clip_sample": False}
        model.pipeline.scheduler = scheduler.from_config(scheduler.config, **scheduler_options)
        for steps in all_steps:
            if model.train_timesteps % steps:
                flag = "steps" if steps == args.steps else "eval_steps"
                raise InputError(
                    f"--{flag} {steps}: must divide the model's {model.train_timesteps} training steps"
                )
    # the indices of each iteration's prompts
    schedule = schedule_prompts(len(prompts), args.prompts_per_iteration, args.iterations, args.seed)
    used = [prompts[i] for i in sorted({i for ids in schedule for i in ids})]
    # every prompt's text is computed once, in an order that does not depend on where a run was resumed
    model.remember(["", *held_out, *used])
    tokens, width = text_features(model, [""]).shape[1:]
    policy_arguments = {"tokens": tokens, "width": width, "latent_shape": model.latent_shape}
    policy_arguments |= {"hidden": args.hidden, "grid": args.grid, "policy": args.policy}
    policy_arguments |= {"mean_only": args.mean_only, "std_only": args.std_only}
    torch.manual_seed(args.seed)
    policy = NoisePolicy(**policy_arguments).to(args.device)
    policy.standardise(text_features(model, used))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    folder = make_run_folder(args, "noise_ppo", args.model, args.seed)
    print(describe(args, model, policy, len(schedule[0]), held_out, all_steps, folder), flush=True)

    state = load_checkpoint(folder) if args.resume else None
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"iteration": 0, "rows": [], "seconds": 0.0}
    run_start = time.perf_counter() - state["seconds"]
    settings = {
        "policy": policy_arguments,
        "model": args.model,
        "steps": args.steps,
        "guidance": args.guidance,
    }
    settings["reward"] = args.reward
    if args.lora:
        settings |= {"lora": str(Path(args.lora).resolve()), "switch_timestep": args.switch_timestep}
    settings["scheduler"] = {"class": type(scheduler).__name__, **scheduler_options, "eta": 0.0}

    # ------------------------------------------------------------ BASELINE
    zero = torch.zeros(1, *model.latent_shape)
    means, _ = evaluate(model, rewards[:1], held_out, zero, zero, args.steps, args, "evaluate standard noise")
    print(f"  standard   held-out {args.reward} {means[args.reward].mean():.3f}", flush=True)

    for it in range(state["iteration"], args.iterations):
        # -------------------------------------------------------- SAMPLE
        ids = torch.tensor(schedule[it]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
        image_prompts = [prompts[i] for i in ids]
        seeds = [derived_seed(args.seed, it, i, j) for i in schedule[it] for j in range(args.samples)]
        features = text_features(model, image_prompts)  # (n, tokens, width)
        with torch.no_grad():
            old_mean, old_log_std = policy(features)  # (n, c, h, w)
            eps = draw_noise(seeds, 0, model.latent_shape, torch.float32)[0].to(args.device)
            z = old_mean + old_log_std.exp() * eps  # (n, c, h, w), equation (1)
            old = log_prob(z, old_mean, old_log_std, args.reduction)  # (n,)

        # -------------------------------------------------------- SCORE
        scores, _ = sample_and_score(
            model, rewards[:1], image_prompts, z, args.steps, args, f"sample {it + 1}"
        )
        reward = scores[args.reward]  # (n,)
        advantage = advantages(reward, ids, args.normalise).to(args.device)  # (n,)

        # -------------------------------------------------------- UPDATE
        optimizer.param_groups[0]["lr"] = args.lr * (1 - it / args.iterations)
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", it))
        losses, clipped = [], []
        dimensions = z[0].numel() if args.reduction == "mean" else 1  # what divides the KL
        orders = [torch.randperm(len(z), generator=generator) for _ in range(args.epochs)]
        for index in (part for order in orders for part in order.split(args.minibatch)):
            mean, log_std = policy(features[index])  # (minibatch, c, h, w)
            new = log_prob(z[index], mean, log_std, args.reduction)  # (minibatch,)
            kl = kl_to_standard_normal(mean, log_std).mean() / dimensions
            # equation (4)
            loss = ppo_loss(new, old[index], advantage[index], args.clip) + args.kl_weight * kl
            if not loss.isfinite():
                raise InputError(f"iteration {it + 1}: loss {loss.item()}; lower --lr or --clip")
            optimizer.zero_grad()
            (loss / SIZE).backward()  # under torchrun every process computes all of it: it is little
            sum_gradients(policy.parameters())  # then the policies stay equal to the last bit
            optimizer.step()
            losses.append(loss.item())
            clipped.append((((new - old[index]).exp() - 1).abs() > args.clip).float().mean().item())

        # -------------------------------------------------------- EVALUATE, LOG
        row = {"iteration": it + 1, "reward": reward.mean().item(), "loss": sum(losses) / len(losses)}
        row["clip_fraction"] = sum(clipped) / len(clipped)
        row["explained_variance"] = explained_variance(reward, args.samples)
        parts = {name: values for name, values in scores.items() if name != args.reward}  # of a weighted sum
        row |= {name: values.mean().item() for name, values in parts.items()}
        with torch.no_grad():
            mean, log_std = policy(features)
            log_ratio = log_prob(z, mean, log_std, "sum")  # (n,) nats
            log_ratio -= log_prob(z, old_mean, old_log_std, "sum")
        row |= policy_statistics(mean, log_std, log_ratio, kl_to_standard_normal(mean, log_std))
        row["reward_held_out"] = math.nan  # of an iteration without evaluation
        if it + 1 == args.iterations or args.eval_every and (it + 1) % args.eval_every == 0:
            with torch.no_grad():
                mean, log_std = policy(text_features(model, held_out))  # (prompts, c, h, w)
            label = f"evaluate {it + 1}"
            means, _ = evaluate(model, rewards[:1], held_out, mean, log_std, args.steps, args, label)
            row["reward_held_out"] = means[args.reward].mean().item()
            policy.save(folder, settings)
        state["rows"].append(row)
        state["iteration"] = it + 1
        seconds = time.perf_counter() - run_start
        log_metrics(folder, state["rows"], it + 1, seconds)
        state.update(policy=policy.state_dict(), optimizer=optimizer.state_dict(), seconds=seconds)
        save_checkpoint(folder, state)
        if not math.isnan(row["reward_held_out"]):
            print_iteration(row, args.iterations, time.perf_counter() - run_start)

    # ------------------------------------------------------------ FINAL EVALUATION, SHOW
    results, images = final_evaluation(model, policy, rewards, prompts, held_out, all_steps, args)
    results["seconds"] = time.perf_counter() - run_start
    write_json(folder / "results.json", results)
    show_steps(folder, state["rows"], results, images, held_out, args)
    files = "the policy, results.json, metrics.csv, gain.png, grid.png, curves.png"
    print(f"\n{results['seconds']:.0f} s. In {folder}: {files}. To use it:\n")
    print(usage_code(model, folder, held_out[0], args))


if __name__ == "__main__":
    run_script(main, Args, shared=True)
