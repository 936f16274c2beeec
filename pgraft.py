"""P-GRAFT (partial GRAFT): score the finished picture, accept the noisy state it came from, tune the model for the noisier levels.
Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.   Run: python pgraft.py

Notation  x_t = alpha_t x_0 + sigma_t eps, alpha_t^2 + sigma_t^2 = 1 (of a flow, as SD 3: alpha_t + sigma_t = 1); c the prompt;
          p the model that is sampled; r(x, c) the reward; M samples a prompt, of which a rule accepts some: sample i with
          probability A(x_i), non-decreasing in r;
          s the switch: the tuned model denoises the levels t > s, the base model the rest.
Equations (1) accepted states follow  argmax_q  E_q[rhat] - KL(q || p), laws of x_s,  with  rhat(x_s) = log E[A | X_s = x_s]
          (2) K best of M:  rhat = log sum_{j<K} C(M-1, j) U^(M-1-j) (1-U)^j,  U = P(r(X') <= r(x)), X' ~ p, ties broken at random
          (3) KL(accepted || p) = integral_0^1 f log f du,  f = (M/K) exp(rhat);  K = 1: log M - (M-1)/M;  better of a pair: M = 2
              (of the pictures; that of the states x_s is at most this)
          (4) loss  E (b / sigma_t)^2 |prediction(x_t, t, c) - target|^2,  t > s;  the target's variance grows as 1 / b^2 towards s,
              the weight evens that out
          (5) x_t = a x_s + b eps',  a = alpha_t / alpha_s,  b^2 = sigma_t^2 - a^2 sigma_s^2,  eps' ~ N(0, I) independent of x_s
          (6) target of eps: sigma_t eps' / b;  of v: sigma_t (eps' a / b - x_s) / alpha_s;  of a flow's velocity, eps - x_0:
              eps' (sigma_t + alpha_t (sigma_s / alpha_s)^2) / b - x_s / alpha_s.  E[target | x_t] is the prediction wanted at x_t
          (7) V(t) = E[Var(r | X_t, c)] / E[Var(r | c)], the share of the reward's variance that x_t does not determine
          (8) step to the next level ('): x' = alpha' x_0 + sqrt(sigma'^2 - std^2) eps + std w,  x_0 and eps as predicted,  w ~ N(0, I),
              std = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2):  DDIM; of a flow eta 0 is Euler's step
Choices that the paper leaves open: a LoRA is tuned; groups in which no reward differs are skipped by the rules that rank;
with --guidance > 1 the loss is on the guided prediction, because that is what samples (README, "Guidance").
Deviation from the paper, whose data are the accepted x_s (--data xs): by default (--data x0) the data in (4) to (6) are the
accepted x_0 (then alpha_s = 1, sigma_s = 0 there, but t stays above the switch). If the sampler were exact, x_0 noised to s
would have the law of x_s: the same minimiser, with far less variance in the target (README, "P-GRAFT").
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import common
import rewards as show  # what a run prints and writes
from common import DTYPES, ROOT, InputError, Model, derived_seed
from rewards import average_hash, check_rule, diversity, image_statistics, read_task, schedule_prompts, score

RANKING = ("topk", "preference")  # rules for which only the order of the rewards counts
# settings left out: of the embedded model, SD 1.x and 2.x, SD XL, SD 3; steps and guidance as in the stock call; eta: the probe
# of a flow needs some
DEFAULTS = {
    "steps": (10, 50, 50, 28),
    "guidance": (1.0, 7.5, 5.0, 7.0),
    "eta": (1.0, 1.0, 1.0, 0.5),
    "sample_batch": (64, 8, 4, 4),
    "micro_batch": (64, 2, 1, 1),
    "lora_targets": ("all", *["attention"] * 3),
    "lr": (1e-3, 1e-4, 1e-4, 1e-4),
    "eval_rewards": ("shapes_strict,shapes_graded,shapes_fit,jpeg_compressibility", *["jpeg_compressibility"] * 3),
}
AT_LEAST_ONE = "rounds prompts_per_round samples guidance sample_batch updates batch micro_batch lora_rank".split()
LIMITS = dict.fromkeys(AT_LEAST_ONE, (1, 10**6)) | {"top_k": (1, "samples"), "steps": (1, 999), "eta": (0, 1)}
LIMITS |= {"prompt_dropout": (0, 0.99), "eval_samples": (2, 10**4), "eval_every": (0, 10**9), "seed": (0, 2**63 - 1)}
LIMITS |= {"lr": (1e-12, 1), "lora_alpha": (1e-6, 1e6), "rounds": (1, 10**4), "samples": (1, 10**4), "lora_rank": (1, 1024)}
LIMITS |= {"probe_restarts": (2, 10**4), "probe_limit": (0, 1), "probe_prompts": (2, 10**9)}
CHOICES = {"reference": ("newest", "base"), "rule": (*RANKING, "exponential", "threshold", "none"), "data": ("x0", "xs")}
SHOWN = 24  # pictures that are kept whole, for grid.png: six prompts x 4


@dataclass
class Args:
    """P-GRAFT: GRAFT for the noisy part of the trajectory; the base model denoises the rest."""

    seed: int = 0  # seed of the training run; evaluation pictures do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: str = "auto"  # auto (CUDA if there is one), cpu or cuda
    dtype: str = "float32"  # precision of the frozen model: float32, bfloat16 or float16; the LoRA is always float32

    model: str = str(ROOT / "shapes" / "pipeline")  # folder or hub id of a Stable Diffusion 1.x, 2.x, XL or 3.x pipeline
    t5: bool = True  # SD 3: load its third text encoder; --no-t5: 10 GB less, long prompts are read less well
    prompts: str = str(ROOT / "shapes" / "prompts_train.txt")  # .txt (one a line), .csv, .tsv or .jsonl; file.csv:column
    eval_prompts: str = ""  # held-out prompts; left out: the shapes ones, or every tenth of --prompts, then not trained on
    eval_samples: int = 4  # pictures per held-out prompt
    eval_every: int = 1  # rounds between evaluations; 0: only before and after

    steps: int | None = None  # steps of the sampler (10; other models 50; SD 3 28)
    guidance: float | None = None  # classifier-free guidance scale, 1 is none (1; other models 7.5; SD XL 5, SD 3 7)
    eta: float | None = None  # 0 deterministic, 1 as random as DDPM; the probe needs some randomness (1; SD 3 0.5)
    sample_batch: int | None = None  # pictures sampled at a time; no picture depends on it (64; others 8; SD XL, SD 3 4)

    switch: str = "auto"  # level t / T in (0, 1) from which on the base model denoises; auto: as --probe recommends
    data: str = "x0"  # noised to the levels above the switch: x0 (the accepted picture) or xs (its state at the switch)
    probe: bool = False  # only measure V(t), how far the state at each level leaves the reward open, and recommend a switch
    probe_prompts: int = 96  # prompts of the probe, with two trajectories each
    probe_restarts: int = 4  # times the sampler is started again from each stored state
    probe_limit: float = 0.1  # the recommended switch is the noisiest level with V(t) + standard error at most this
    evaluate: str = ""  # no training: evaluate the LoRA in this folder, with its pgraft.json (or with --switch)

    reward: str = "shapes_strict"  # to maximise: a name of rewards.py, path/to/file.py:function, or "0.7*one+0.3*other"
    eval_rewards: str | None = None  # rewards reported too, separated by commas (the shapes ones and JPEG; others JPEG)
    reward_device: str = "auto"  # of rewards that are models: auto (CUDA if there is one), cpu or cuda
    reward_dtype: str = "float32"  # their precision: float32, bfloat16 or float16
    reward_batch: int = 16  # pictures that they judge at a time

    rounds: int = 3  # times to sample, accept and update
    prompts_per_round: int = 160  # prompts sampled in a round, none twice
    samples: int = 8  # M, samples per prompt
    rule: str = "topk"  # acceptance: topk, preference, exponential, threshold or none (the control)
    top_k: int = 1  # K of the rule topk
    threshold: float | None = None  # least accepted reward of the rule threshold
    beta: float | None = None  # temperature of the rule exponential, in units of the reward
    reward_max: float | None = None  # known upper bound of the reward for exponential; left out: the best of each prompt
    dedup: bool = False  # keep one of the accepted pictures of a prompt that have the same 8 x 8 average hash
    accept_flat: bool = False  # do not skip groups whose rewards are all equal (rules topk and preference)
    accumulate: bool = True  # train on what all rounds accepted; --no-accumulate: on the newest round's
    reference: str = "newest"  # the model that later rounds sample: newest or base

    lora_rank: int = 16  # rank of the LoRA
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    lora_targets: str | None = None  # attention, all (linear and convolution), or layer names (all; others attention)
    updates: int = 60  # optimiser updates per round
    batch: int = 64  # pictures per update
    micro_batch: int | None = None  # pictures per backward pass, accumulated to --batch (64; others 2; SD XL, SD 3 1)
    lr: float | None = None  # AdamW learning rate (1e-3; other models 1e-4)
    prompt_dropout: float = 0.0  # share of training prompts replaced by the empty one
    guided_loss: bool = True  # with guidance > 1, train the guided prediction; --no-guided_loss: the conditional one
    gradient_checkpointing: bool = False  # less memory, about a third slower
    optimizer_8bit: bool = False  # AdamW of the package bitsandbytes, with its state in 8 bits
    save_accepted: bool = False  # write accepted pictures to <run>/accepted with metadata.jsonl (imagefolder)


# ================================================================ equations: tensors in, tensors out


def accept(rewards, rule, *, top_k=1, threshold=None, beta=None, reward_max=None, keys=None, generator=None):
    """Which samples a rule accepts. rewards: (prompts, samples) -> bool mask of the same shape.

    "topk": the top_k best of each row. "preference": the better of each consecutive pair. Both break ties at random.
    "exponential": each with probability exp((r - reward_max) / beta); reward_max is the reward's known upper bound, without
    one the row's maximum. "threshold": r >= threshold. "none": all. keys: integer ids, same shape; of the accepted samples of
    a row that share a key one is kept (the best; ties at random). ValueError for a rule without its parameter.
    Source: arXiv 2510.02692, generalised rejection sampling; equations (1) and (2) above.
    """
    groups, samples = rewards.shape
    chance = torch.rand(rewards.shape, generator=generator).to(rewards.device)  # breaks ties, and is exponential's coin
    if rule == "topk":
        if not 1 <= top_k <= samples:
            raise ValueError(f"top_k {top_k} must be between 1 and the number of samples {samples}")
        mask = _rank(rewards, chance) < top_k
    elif rule == "preference":
        if samples % 2:
            raise ValueError(f"preference pairs need an even number of samples, not {samples}")
        pairs = (groups * samples // 2, 2)
        mask = (_rank(rewards.reshape(pairs), chance.reshape(pairs)) == 0).reshape(groups, samples)
    elif rule == "exponential":
        if beta is None or beta <= 0:
            raise ValueError("exponential needs beta > 0")
        bound = rewards.max(1, keepdim=True).values if reward_max is None else reward_max
        mask = chance < ((rewards - bound) / beta).exp()
    elif rule == "threshold":
        if threshold is None:
            raise ValueError("threshold needs threshold")
        mask = rewards >= threshold
    elif rule == "none":
        mask = torch.ones_like(rewards, dtype=torch.bool)
    else:
        raise ValueError(f"rule {rule!r} must be one of {', '.join(CHOICES['rule'])}")
    if keys is not None:
        rank = _rank(rewards, torch.rand(rewards.shape, generator=generator).to(rewards.device))
        same = keys[:, :, None] == keys[:, None, :]  # (prompts, samples, samples)
        better = mask[:, None, :] & same & (rank[:, None, :] < rank[:, :, None])
        mask = mask & ~better.any(2)
    return mask


def _rank(rewards, chance):
    """Place of each entry in its row, 0 the largest; ties in the order of `chance`. (rows, n) -> integer (rows, n)."""
    order = chance.argsort(1)
    order = order.gather(1, torch.argsort(rewards.gather(1, order), dim=1, descending=True, stable=True))
    return order.argsort(1)


def reshaped_reward(quantile, num_samples, top_k):
    """rhat of "the top_k best of num_samples", up to a constant, at quantile U in [0, 1], any shape. Equation (2)."""
    u = torch.as_tensor(quantile, dtype=torch.float64)
    terms = [math.comb(num_samples - 1, j) * u ** (num_samples - 1 - j) * (1 - u) ** j for j in range(top_k)]
    return torch.stack(terms).sum(0).log()


def implied_kl(num_samples, top_k):
    """KL(accepted || sampled) in nats of "the top_k best of num_samples", for a reward without ties. Equation (3)."""
    if top_k == 1:
        return math.log(num_samples) - (num_samples - 1) / num_samples
    nodes = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    density = num_samples / top_k * reshaped_reward(nodes, num_samples, top_k).exp()
    return torch.xlogy(density, density).mean().item()


def estimated_kl(rewards, rule, *, top_k=1, threshold=None, beta=None):
    """KL(accepted || sampled) in nats of a rule on rewards (prompts, samples). topk and preference: equation (3), an upper
    bound if rewards tie; others: from the acceptance probabilities, mean over the prompts that can accept."""
    if rule in RANKING:
        return implied_kl(rewards.shape[1], top_k) if rule == "topk" else implied_kl(2, 1)
    if rule == "none":
        return 0.0
    if rule == "threshold":
        chance = (rewards >= threshold).double()
    else:
        chance = ((rewards - rewards.max(1, True).values) / beta).double().exp()
    weight = (chance / chance.mean(1, keepdim=True))[chance.sum(1) > 0]
    return torch.xlogy(weight, weight).mean().item() if len(weight) else math.nan


def shaped_target(x_s, noise, alpha_s, sigma_s, alpha_t, sigma_t, prediction_type):
    """(x_t, target, weight) of the loss (4) for data x_s at level s and a noisier level t: equations (5), (6).

    x_s, noise: (batch, ...); the levels: () or (batch,), or of any shape that broadcasts; weight: like the levels, with the
    dimensions of x_s. prediction_type: "epsilon" or "v_prediction" (alpha^2 + sigma^2 = 1), or "flow" (alpha = 1 - sigma).
    alpha_s = 1, sigma_s = 0 gives the ordinary targets with weight 1. ValueError for another type.
    Source: derived for this project, the paper gives x_s as the data and no target; tested against closed forms.
    """
    levels = (torch.as_tensor(level, dtype=torch.float64, device=x_s.device) for level in (alpha_s, sigma_s, alpha_t, sigma_t))
    alpha_s, sigma_s, alpha_t, sigma_t = (v.view(*v.shape, *[1] * (x_s.dim() - v.dim())) for v in levels)
    a = alpha_t / alpha_s
    b = (sigma_t**2 - (a * sigma_s) ** 2).sqrt()  # float64: near the switch this cancels
    if prediction_type == "epsilon":
        of_noise, of_x_s = sigma_t / b, 0 * a
    elif prediction_type == "v_prediction":
        of_noise, of_x_s = sigma_t * a / (b * alpha_s), -sigma_t / alpha_s
    elif prediction_type == "flow":
        of_noise, of_x_s = (sigma_t + alpha_t * (sigma_s / alpha_s) ** 2) / b, -1 / alpha_s
    else:
        raise ValueError(f"prediction_type {prediction_type!r} must be epsilon, v_prediction or flow")
    a, b, weight, of_noise, of_x_s = (v.to(x_s.dtype) for v in (a, b, (b / sigma_t) ** 2, of_noise, of_x_s))
    return a * x_s + b * noise, of_noise * noise + of_x_s * x_s, weight


def unresolved_share(rewards):
    """(V, its standard error) of equation (7). rewards: (prompts, states, restarts), at least two of each.

    Numerator and denominator are unbiased (analysis of variance: the variance of the states' means contains 1 / restarts of
    the variance within); the error is the jackknife's over prompts, infinite if rewards differ for one prompt only. (nan, nan) if none differs.
    """
    rewards = rewards.double()
    within = rewards.var(2).mean(1)  # (prompts,)
    total = rewards.mean(2).var(1) + within * (1 - 1 / rewards.shape[2])
    if total.sum() <= 0:
        return math.nan, math.nan
    n, left_out = len(rewards), (within.sum() - within) / (total.sum() - total)
    if not left_out.isfinite().all():
        return (within.sum() / total.sum()).item(), math.inf
    return (within.sum() / total.sum()).item(), ((n - 1) / n * (left_out - left_out.mean()).square().sum()).sqrt().item()


def switch_step(timesteps, switch_timestep):
    """How many steps the tuned model takes: those that start above the switch. The base model takes the first step that starts
    at or below it and all later ones. timesteps: a scheduler's, falling; any number of steps."""
    return sum(t > switch_timestep for t in timesteps)


# ================================================================ sampling


def guided_prediction(model, x, t, text, guidance):
    """The prediction that samples: unconditional + guidance * (conditional - unconditional). text: (batch, rows, width)."""
    if guidance == 1:
        return model.predict(x, t, text)
    text = torch.cat([model.empty.expand_as(text), text])
    both = model.predict(x.repeat(2, 1, 1, 1), t if t.dim() == 0 else t.repeat(2), text)
    unconditional, conditional = both.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def draw_noise(seeds, steps, shape, dtype):
    """(steps + 1, batch, *shape): the initial noise, then one draw a step, in the order in which the stock pipeline asks for
    them when it is given one CPU generator for each seed."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    draws = [[torch.randn(shape, generator=g, dtype=dtype) for g in generators] for _ in range(steps + 1)]
    return torch.stack([torch.stack(step) for step in draws])


@torch.no_grad()
def denoise(model, x, levels, noise, text, guidance, eta):
    """Equation (8) along levels, falling timesteps of which -1 is the clean one. x: (batch, c, h, w) at levels[0],
    noise: (len(levels) - 1, batch, c, h, w) -> x at levels[-1], float32.

    DDIM is arXiv 2010.02502, equation 12. Of a flow, small steps with eta are the SDE of Flow-GRPO (arXiv 2505.05470) with
    a = sqrt(2) eta, which keeps the flow's marginals; its Euler-Maruyama step is infinite at sigma = 1 and, where x_0 is certain,
    leaves more noise than the level has.
    """
    x, noise = x.to(model.device, torch.float32), noise.to(model.device, torch.float32)
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
        std = eta * sigma_next / sigma * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))
        x = alpha_next * x_0 + math.sqrt(max(sigma_next**2 - std**2, 0)) * eps + std * noise[k]
    return x


def sample(model, noise, text, guidance, eta, switch_at, tuned=True):
    """The tuned model (the base, without `tuned`) takes the first `switch_at` steps, the base model the rest.
    noise: (steps + 1, batch, c, h, w) -> (x_s at the switch, x_0), each (batch, c, h, w): no other state is kept."""
    levels = [*model.timesteps(len(noise) - 1), -1]
    with model.lora_merged() if tuned else model.lora_off():
        x_s = denoise(model, noise[0], levels[: switch_at + 1], noise[1 : switch_at + 1], text, guidance, eta)
    with model.lora_off():
        return x_s, denoise(model, x_s, levels[switch_at:], noise[switch_at + 1 :], text, guidance, eta)


def sample_and_score(model, rewards, prompts, seeds, args, switch_at, tuned, label):
    """Pictures of the prompts (n) with the seeds (n), a batch at a time. Returns (x_s, x_0), each (n, c, h, w),
    {reward or statistic: (n,)}, and the pictures, all but the first 24 at most 64 x 64 pixels."""
    latents, scores, pictures = [], [], []
    for i in tqdm(range(0, len(prompts), args.sample_batch), desc=label, unit="batch", leave=False, mininterval=1):
        part = slice(i, i + args.sample_batch)
        noise = draw_noise(seeds[part], args.steps, model.latent_shape, model.dtype)
        x_s, x_0 = sample(model, noise, model.encode(prompts[part]), args.guidance, args.eta, switch_at, tuned)
        images = model.decode(x_0, label)
        latents.append((x_s.cpu(), x_0.cpu()))
        scores.append(score(rewards, images, prompts[part]) | image_statistics(images))
        pictures += [p if i + j < SHOWN else p.resize((min(64, p.width), min(64, p.height))) for j, p in enumerate(images)]
    scores = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    return [torch.cat(part) for part in zip(*latents)], scores, pictures


# ================================================================ the switch


def probe(model, reward, prompts, args):
    """V(t), equation (7), of the base model (the caller's lora_off) at up to nine levels between noise and picture. Two
    trajectories a prompt are followed; at each level the sampler is started again from their states, with fresh noise.
    Returns rows {step, timestep, switch, unresolved, se}."""
    model.remember(prompts)
    levels = [*model.timesteps(args.steps), -1]
    steps = sorted({round(i * args.steps / 10) for i in range(1, 10)} - {0, args.steps})
    seeds = [derived_seed(args.seed, "probe", i, j) for i in range(len(prompts)) for j in range(2)]
    asked = [p for p in prompts for _ in range(2)]
    rewards = torch.zeros(len(steps), args.probe_restarts, len(asked))  # (levels, restarts, prompts x 2)
    for i in tqdm(range(0, len(asked), args.sample_batch), desc="probe", unit="batch", leave=False, mininterval=1):
        part = slice(i, i + args.sample_batch)
        text, noise = model.encode(asked[part]), draw_noise(seeds[part], args.steps, model.latent_shape, model.dtype)
        x, before = noise[0], 0
        for k, step in enumerate(steps):
            x = denoise(model, x, levels[before : step + 1], noise[before + 1 : step + 1], text, args.guidance, args.eta)
            before = step
            for j in range(args.probe_restarts):
                again = [derived_seed(seed, step, j) for seed in seeds[part]]
                fresh = draw_noise(again, args.steps - step - 1, model.latent_shape, model.dtype)  # a draw for each step left
                x_0 = denoise(model, x, levels[step:], fresh, text, args.guidance, args.eta)
                rewards[k, j, part] = reward(model.decode(x_0, "probe"), asked[part])
    rows = []
    for step, values in zip(steps, rewards):
        share, se = unresolved_share(values.T.view(len(prompts), 2, args.probe_restarts))
        level = {"step": step, "timestep": levels[step], "switch": levels[step] / model.train_timesteps}
        rows.append(level | {"unresolved": share, "se": se})
    return rows


def recommend(rows, limit):
    """(timestep of the recommended switch, the reason): the noisiest level with V(t) + its standard error <= limit."""
    if all(math.isnan(row["unresolved"]) for row in rows):
        raise InputError("the probe saw no reward differ; raise --probe_prompts or take another --reward")
    for row in rows:
        if row["unresolved"] + row["se"] <= limit:
            return row["timestep"], f"the noisiest level with V(t) + s.e. at most {limit:g}"
    return rows[-1]["timestep"], f"the cleanest level: V(t) + s.e. is nowhere at most {limit:g}"


def fitting_switch(folder, model):
    """The timestep of the switch in a run's pgraft.json; InputError if the model has another noise level there."""
    stored = common.read_switch(folder, "the level with --switch")
    timestep = stored["switch_timestep"]
    sigma = model.alpha_sigma(timestep)[1] if 0 <= timestep < model.train_timesteps else math.nan
    if not abs(sigma - stored["sigma"]) < 1e-3:
        raise InputError(
            f"{folder}/pgraft.json does not fit the model: noise level {stored['sigma']:.4f} at timestep {timestep:g}, the model "
            f"has {sigma:.4f}; give --model {stored.get('model')}"
        )
    return timestep


def save_switch(folder, model, timestep, args):
    """pgraft.json: what must travel with the LoRA. The level is a training timestep, so it holds for any number of steps."""
    alpha, sigma = model.alpha_sigma(timestep)
    scheduler = dict(model.pipeline.scheduler.config)
    content = {"switch_timestep": timestep, "switch": timestep / model.train_timesteps, "alpha": alpha, "sigma": sigma}
    content |= {"rule": "the LoRA is on in the steps that start at a timestep above switch_timestep, off in the others"}
    content |= {"model": args.model, "prediction_type": model.prediction_type, "scheduler": scheduler}
    content |= {name: getattr(args, name) for name in ("steps", "guidance", "eta", "data")}
    common.write_atomically(folder / "pgraft.json", json.dumps(content, indent=2) + "\n")


# ================================================================ loss


def denoising_loss(model, x_s, level_s, text, t, noise, guidance):
    """Equation (4), mean over everything. x_s, noise: (batch, c, h, w) at level_s = (alpha_s, sigma_s), text: (batch, tokens,
    width), t: (batch,) above that level."""
    x_t, target, weight = shaped_target(x_s, noise, *level_s, *model.alpha_sigma(t), model.prediction_type)
    return (weight * (guided_prediction(model, x_t, t, text, guidance) - target).square()).mean()


# ================================================================ evaluation


def evaluate(model, rewards, prompts, args, switch_at, tuned, label):
    """Fixed prompts x fixed seeds. Returns ({metric: (prompts,), the mean over a prompt's pictures}, first 24 pictures)."""
    n = args.eval_samples
    seeds = [derived_seed("eval", i, j) for i in range(len(prompts)) for j in range(n)]
    repeated = [p for p in prompts for _ in range(n)]
    _, scores, pictures = sample_and_score(model, rewards, repeated, seeds, args, switch_at, tuned, label)
    means = {name: values.view(-1, n).mean(1) for name, values in scores.items()}
    means["diversity"] = torch.tensor([diversity(pictures[i * n : i * n + n]) for i in range(len(prompts))])
    return means, pictures[:SHOWN]


# ================================================================ the run


def prepare(args):
    """Fill in what was left out, check all that needs no diffusion model, then load the rewards that are models.
    Returns (training prompts, held-out prompts, rewards): rewards[0] is optimised, all are reported."""
    common.complete(args, DEFAULTS, LIMITS, CHOICES)
    check_rule(args)
    if args.probe and args.evaluate:
        raise InputError("--probe --evaluate: the probe is of the base model and trains nothing; give one of the two")
    probes = args.probe or args.switch == "auto" and not args.evaluate
    if probes and args.eta == 0:
        raise InputError("--eta 0: a deterministic sampler has nothing to probe; give --eta above 0, or --switch a level")
    if probes and args.steps < 2:
        raise InputError(f"--steps {args.steps}: no level lies between noise and picture; give at least 2")
    try:
        level = 0.5 if args.switch == "auto" else float(args.switch)
    except ValueError:
        level = math.nan
    if not 0 < level < 1:
        raise InputError(f"--switch {args.switch}: must be auto or a level t / T between 0 and 1, both excluded")
    if args.evaluate and not (Path(args.evaluate) / common.LORA_FILE).is_file():
        raise InputError(f"--evaluate {args.evaluate}: has no {common.LORA_FILE}; give the folder of a finished run")
    if args.evaluate and args.switch == "auto":
        common.read_switch(args.evaluate, "the level with --switch")
    return read_task(args)


def main(args, folder_known):
    """One run. folder_known(folder) is called as soon as there is a run folder, so that an interruption can say how to continue."""
    prompts, held_out, rewards = prepare(args)
    model = Model(args.model, args.device, DTYPES[args.dtype], args.t5)
    grid = model.timesteps(args.steps)
    if args.evaluate:
        return evaluate_run(args, model, grid, held_out, rewards, folder_known)
    switch = None if args.switch == "auto" else float(args.switch) * model.train_timesteps  # None: the probe will say
    if switch is not None and not 0 < switch_step(grid, switch) < args.steps:
        low, high = (f"{t / model.train_timesteps:g}" for t in (grid[-1], grid[0]))
        raise InputError(f"--switch {args.switch}: with --steps {args.steps} it must be at least {low} and below {high}")
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    if args.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    optimizer = common.make_adamw(parameters, args.lr, args.optimizer_8bit)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    schedule = schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    folder = common.make_run_folder(args, "pgraft", args.model, args.seed)
    folder_known(folder)
    kl = estimated_kl(torch.zeros(1, args.samples), args.rule, top_k=args.top_k) if args.rule in RANKING else None
    probed = f"chosen by probing {min(args.probe_prompts, len(prompts))} prompts x 2 states x {args.probe_restarts} restarts at each level"
    level = f"  switch     {args.switch if switch else probed}; trained on {args.data} noised to the levels above it\n"
    print(show.describe(f"P-GRAFT -> {folder}", args, model, len(schedule[0]), held_out, kl, level), flush=True)

    # every prompt's text is computed once, in an order that does not depend on where a run was resumed
    model.remember(["", *held_out, *(prompts[i] for i in sorted({i for part in schedule for i in part}))])
    state = common.load_checkpoint(folder) if args.resume else None
    if state:
        for name, parameter in model.lora().items():
            parameter.data.copy_(state["lora"][name])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    else:
        state = {"round": 0, "rows": [], "losses": [], "accepted": [], "seconds": 0.0}
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=state["round"] + 1)
    begun = time.perf_counter() - state["seconds"]

    def checkpoint():
        state.update(lora={n: p.detach().cpu() for n, p in model.lora().items()}, optimizer=optimizer.state_dict())
        state.update(scaler=scaler.state_dict(), seconds=time.perf_counter() - begun)
        common.save_checkpoint(folder, state)

    # ------------------------------------------------------------ PROBE
    if args.probe or switch is None:
        if "probe" not in state:
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(derived_seed(args.seed, "probe")))
            with model.lora_off():
                state["probe"] = probe(model, rewards[0], [prompts[i] for i in order[: args.probe_prompts]], args)
            checkpoint()
        show.save_probe(folder, state["probe"], args.probe_limit, args.reward)
        switch, reason = recommend(state["probe"], args.probe_limit)
        print("\n  step  timestep  --switch   V(t)   s.e.   (the share of the reward that the state leaves open)")
        for row in state["probe"]:
            print("  {step:4d}  {timestep:8.0f}  {switch:8.3f}  {unresolved:5.2f}  {se:5.2f}".format(**row))
        print(f"  recommended: --switch {switch / model.train_timesteps:g}, {reason}", flush=True)
        if args.probe:
            print(f"\nIn {folder}: probe.csv, probe.png")
            return
    switch_at = switch_step(grid, switch)  # steps of the tuned model
    switch = grid[switch_at]  # the level of the states, and what is stored
    level_s = model.alpha_sigma(switch) if args.data == "xs" else (1.0, 0.0)
    print(f"  tuned model for {switch_at} of {args.steps} steps, base model from timestep {switch:g} on", flush=True)

    # ------------------------------------------------------------ BASELINE
    base, base_pictures = evaluate(model, rewards, held_out, args, switch_at, False, "evaluate base")
    print(f"  base       {args.reward} {base[args.reward].mean():.3f} on the held-out prompts", flush=True)

    for r in range(state["round"], args.rounds):
        speed = ""
        if len(state["accepted"]) == r:  # not so if the run was stopped after it had accepted
            # ---------------------------------------------------- SAMPLE, SCORE
            start = time.perf_counter()
            ids = torch.tensor(schedule[r]).repeat_interleave(args.samples)  # (prompts x samples,)
            seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
            asked = [prompts[i] for i in ids]
            tuned = args.reference == "newest" and r > 0  # in round 1 the LoRA does nothing yet
            label = f"sample {r + 1}"
            (x_s, x_0), scores, pictures = sample_and_score(model, rewards[:1], asked, seeds, args, switch_at, tuned, label)
            speed = f"{len(seeds) / (time.perf_counter() - start):.0f} pictures/s, "
            reward = scores[args.reward]  # (prompts x samples,)
            table = reward.view(-1, args.samples)  # (prompts, samples)

            # ---------------------------------------------------- ACCEPT
            options = {"top_k": args.top_k, "threshold": args.threshold, "beta": args.beta}
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "accept", r))
            keys = average_hash(pictures).view(-1, args.samples) if args.dedup else None
            mask = accept(table, args.rule, **options, reward_max=args.reward_max, keys=keys, generator=generator)
            groups = table.view(len(table), -1, 2 if args.rule == "preference" else args.samples)  # what a rule ranks
            flat = (groups.amax(2) == groups.amin(2)) & (args.rule in RANKING)  # no reward differs
            if not args.accept_flat:
                mask &= ~flat.repeat_interleave(groups.shape[2], 1)
            index = mask.flatten().nonzero().squeeze(1)  # (accepted,)
            if len(index) == 0:
                share = f"{flat.double().mean():.0%} of the groups had equal rewards, the best reward was {reward.max():.4g}"
                raise InputError(f"--rule {args.rule} accepted nothing: {share}; raise --samples or take another reward")
            state["accepted"].append({"x_s": x_s[index], "x_0": x_0[index], "prompt": ids[index], "reward": reward[index]})
            spread = [diversity(pictures[i : i + args.samples]) for i in range(0, len(pictures), args.samples)]
            row = {"round": r + 1, "reward_sampled": reward.mean().item(), "reward_accepted": reward[index].mean().item()}
            row |= {"acceptance_rate": len(index) / len(reward), "flat_groups": flat.double().mean().item()}
            row |= {"kl": estimated_kl(table, args.rule, **options), "diversity": sum(spread) / len(spread)}
            row |= {name: values.mean().item() for name, values in scores.items() if name != args.reward}
            state["rows"].append(row)
            if args.save_accepted:
                show.save_accepted(folder / "accepted", model, x_0[index], state["accepted"], prompts, args.sample_batch)
            checkpoint()

        # -------------------------------------------------------- UPDATE
        kept = state["accepted"] if args.accumulate else state["accepted"][-1:]
        data = torch.cat([a["x_s" if args.data == "xs" else "x_0"] for a in kept])  # (n, c, h, w)
        ids_kept = torch.cat([a["prompt"] for a in kept])  # (n,) indices of prompts
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        losses = []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            x_s = data[index].to(args.device)  # (batch, c, h, w), at level_s
            noise = torch.randn(x_s.shape, generator=generator).to(args.device)
            t = model.draw_timesteps(args.batch, generator, switch).to(args.device)  # (batch,)
            drop = torch.rand(args.batch, generator=generator) < args.prompt_dropout
            text = model.encode(["" if d else prompts[i] for d, i in zip(drop, ids_kept[index])])  # (batch, rows, width)
            losses.append(0.0)
            for part in torch.arange(args.batch).split(args.micro_batch):
                with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32"):
                    guidance = args.guidance if args.guided_loss else 1
                    loss = denoising_loss(model, x_s[part], level_s, text[part], t[part], noise[part], guidance)
                scaler.scale(loss * len(part) / args.batch).backward()
                losses[-1] += loss.item() * len(part) / args.batch
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            # float16: an infinite gradient is no error while the scale can fall; scaler.step skips the update
            if not (math.isfinite(losses[-1]) and (math.isfinite(norm) or scaler.get_scale() > 1)):
                found = f"round {r + 1}, update {update + 1}: loss {losses[-1]}, gradient norm {norm}"
                raise InputError(f"{found}; lower --lr or use --dtype float32 or bfloat16")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = state["rows"][-1]
        row |= {"pictures_trained_on": len(data), "loss": sum(losses) / len(losses), "reward_held_out": math.nan}
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            state["tuned"], pictures = evaluate(model, rewards, held_out, args, switch_at, True, f"evaluate {r + 1}")
            row["reward_held_out"] = state["tuned"][args.reward].mean().item()
            show.save_grid(folder / "grid.png", base_pictures, pictures, held_out, args.eval_samples)
        state["losses"] += losses
        state["round"] = r + 1
        save_switch(folder, model, switch, args)
        model.save_lora(folder)
        show.write_metrics(folder, writer, state, base, args.reward)
        checkpoint()
        show.print_round(state, args.rounds, speed)
    writer.close()

    # ------------------------------------------------------------ SHOW
    where = {"steps": args.steps, "switch_at": switch_at, "switch_timestep": switch, "probe": state.get("probe")}
    show.write_results(folder, base, state["tuned"], args.reward, state["seconds"], **where)
    written = "LoRA, pgraft.json, results.json, metrics.csv, grid.png, curves.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {written}. To use it:\n")
    print_snippet(model, folder.resolve(), None, held_out[0], args)


def evaluate_run(args, model, grid, held_out, rewards, folder_known):
    """--evaluate: base and tuned on the held-out prompts, at any number of steps, without training."""
    begun = time.perf_counter()
    given = None if args.switch == "auto" else float(args.switch) * model.train_timesteps
    switch = given or fitting_switch(args.evaluate, model)
    switch_at = switch_step(grid, switch)
    if switch_at == 0:
        raise InputError(f"--steps {args.steps}: no step starts above the switch, timestep {switch:g}; give more")
    model.load_lora(args.evaluate)
    model.remember(["", *held_out])
    folder = common.make_run_folder(args, "pgraft_evaluate", args.model, args.seed)
    folder_known(folder)
    print(f"P-GRAFT, evaluation of {args.evaluate} -> {folder}")
    print(f"  tuned model for {switch_at} of {args.steps} steps, base model from timestep {switch:g} on", flush=True)
    base, base_pictures = evaluate(model, rewards, held_out, args, switch_at, False, "evaluate base")
    tuned, pictures = evaluate(model, rewards, held_out, args, switch_at, True, "evaluate tuned")
    show.save_grid(folder / "grid.png", base_pictures, pictures, held_out, args.eval_samples)
    seconds, where = time.perf_counter() - begun, {"steps": args.steps, "switch_at": switch_at, "switch_timestep": switch}
    show.write_results(folder, base, tuned, args.reward, seconds, **where)
    print(f"\n{seconds:.0f} s. In {folder}: results.json, grid.png. To use the LoRA:\n")
    print_snippet(model, Path(args.evaluate).resolve(), given, held_out[0], args)


def print_snippet(model, weights, switch, prompt, args):
    """The evaluation's first picture in stock diffusers. weights: folder of the LoRA; switch: a timestep, None: pgraft.json's."""
    level = switch or f'json.load(open({str(weights / "pgraft.json")!r}))["switch_timestep"]'
    print(f"""import json; {show.stock_code(model)}
pipe.load_lora_weights({str(weights)!r})
switch = {level}

{show.stock_switch("switch")}
{show.stock_call(model, prompt, args, ", callback_on_step_end=base_from_the_switch_on")}""")


if __name__ == "__main__":
    common.run_script(main, Args)
