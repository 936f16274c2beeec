"""P-GRAFT on layouts of pages: pgraft.py for another kind of data.

Run: python -m layouts.pgraft_layouts
     python -m layouts.pgraft_layouts --probe       (only V(t))
     python -m layouts.pgraft_layouts --switch 0    (GRAFT)

What differs from pgraft.py
    Data: a page x_0 of up to 12 boxes, (BOXES, 9) with gaps (model.py); the condition c is the multiset of
    the boxes' classes. A group is M pages of one multiset
    Levels: numbers t in [0, 1], alpha_t = cos(t pi/2), sigma_t = sin(t pi/2). The sampler's are
    ((N - k) / N)^2; those of the training are uniform above s
    --switch 0: the tuned model denoises all levels. That is GRAFT: (4) to (6) then are its loss
    Reward: of a page's boxes and their classes (judge.py)
    The learning rate falls to 0 in every round: a constant one ruins a small model within a few
    The LoRA is on every linear layer. The network with the LoRA merged is written, with the switch, to a file
    The table holds statistics of pages that show how a reward is hacked, and the Frechet distance to real
    pages
    Nothing here concerns prompts, guidance, precision or families of models
Notation
    x_t = alpha_t x_0 + sigma_t eps,  alpha_t^2 + sigma_t^2 = 1
    c the multiset of classes; p the model that is sampled; r(x) the reward
    M samples x_i a multiset; a rule accepts x_i with probability A_i, which does not decrease with r(x_i)
    and may depend on the other samples; X and A: one sample and its acceptance probability
    s the switch: the tuned model denoises the levels t > s, the base model the rest
Equations
    (1) accepted states follow  argmax_q  E_q[rhat] - KL(q || p),  q and p here distributions of x_s,
        rhat(x_s) = log E[A | X_s = x_s].  No KL weight is set: the rule decides how far q moves from p
    (2) K best of M:  rhat(x) = log sum_{j<K} C(M-1, j) U^(M-1-j) (1-U)^j,  U = P(r(X') <= r(x)),  X' ~ p,
        ties broken at random
    (3) KL(accepted pages || p) = integral_0^1 f log f du,  f = (M/K) exp(rhat);
        K = 1: log M - (M-1)/M;  better of a pair: M = 2;  the KL of the states x_s is at most this
    (4) loss  E (b / sigma_t)^2 |prediction(x_t, t, c) - target|^2,  t > s
        (the target's variance grows as 1 / b^2 towards s; the weight evens that out)
    (5) x_t = a x_s + b eps',  a = alpha_t / alpha_s,  b^2 = sigma_t^2 - a^2 sigma_s^2,  eps' ~ N(0, I)
    (6) target  sigma_t (eps' a / b - x_s) / alpha_s,  whose mean E[target | x_t] is the v wanted
    (7) V(t) = E[Var(r | X_t, c)] / E[Var(r | c)]: the share of the variance of r that x_t leaves undecided
    (8) step to the next level ('):  x' = alpha' x_0 + sqrt(sigma'^2 - std^2) eps + std w,
        std = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2),  w ~ N(0, I),
        x_0 and eps as predicted. This is DDIM
Deviation from the paper
    The paper's data are the accepted x_s (--data xs). By default (--data x0) the data in (4) to (6) are the
    accepted x_0: there alpha_s = 1, sigma_s = 0 and the weight is 1, but t stays above the switch. If the
    sampler drew x_0 exactly from its distribution given x_s, x_0 noised to s would be distributed like x_s:
    the same minimiser, a target with far less variance (docs/pgraft.md).
"""

import io
import math
import sys
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs an older one is to read why it fails)
    print("error: Python 3.11 or newer is needed, this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # torchrun and --resume give the file

from layouts.judge import FEATURES, FeatureNet, alignment, frechet_distance, overlap
from layouts.model import (
    BOXES,
    CLASSES,
    EMBEDDED,
    PAGES,
    TUNED_FILE,
    Device,
    Model,
    box_mask,
    boxes_of,
    check_device,
    check_finite,
    counts_of,
    derived_seed,
    draw_noise,
)
from utils.figures import keeps_the_run, save_curves, save_panels
from utils.processes import FIRST, gather, own_share, several_processes, sum_gradients
from utils.runs import (
    InputError,
    check_inputs,
    check_output,
    check_range,
    log_metrics,
    make_run_folder,
    print_table,
    restore,
    run_script,
    write_atomically,
    write_csv,
    write_json,
)
from utils.user_code import UserModule

Rule = Literal["topk", "preference", "exponential", "threshold", "none"]
RANKING = ("topk", "preference")  # rules for which only the order of the rewards counts
ROW = 4  # pages of one multiset in the evaluation, a row of grid.png
GRID_ROWS = 6  # multisets of grid.png
BLOCKS = 20  # of the jackknife
COLOURS = ("firebrick", "steelblue", "seagreen", "darkorange", "mediumpurple")  # of CLASSES


@dataclass
class Args:
    """P-GRAFT on layouts: GRAFT for the noisy part of the trajectory; the base model denoises the rest."""

    seed: int = 0  # seed of the training run; evaluation pages do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: Device = "auto"  # auto: CUDA if there is one

    model: str = EMBEDDED  # .safetensors that layouts/train.py or a run with --switch 0 has written
    eval_pages: int = 1000  # pages of an evaluation, four of each held-out multiset of classes
    eval_every: int = 1  # rounds between evaluations; 0: only before and after

    steps: int = 20  # steps of the sampler
    eta: float = 1.0  # 0: deterministic; 1: as random as DDPM
    sample_batch: int = 200  # pages sampled at a time

    switch: str = "auto"  # level in [0, 1) from which on the base model denoises; 0: GRAFT; auto: see --probe
    data: Literal["x0", "xs"] = "x0"  # trained on: the accepted pages, or their states at the switch
    probe: bool = False  # only measure V(t), how far each level leaves the reward open; recommends a switch
    probe_groups: int = 96  # multisets of the probe, with two trajectories each
    probe_restarts: int = 4  # times the sampler is started again from each stored state
    probe_limit: float = 0.1  # recommended: the noisiest level with V(t) + standard error at most this

    reward: str = "both"  # to maximise: alignment, overlap, both or file.py:function of a page

    rounds: int = 2  # times to sample, accept and update
    groups_per_round: int = 100  # multisets sampled in a round, none twice
    samples: int = 8  # M, samples per multiset
    rule: Rule = "topk"  # which samples are accepted; none: all of them, the control
    top_k: int = 1  # K of the rule topk
    threshold: float | None = None  # least accepted reward of the rule threshold
    beta: float | None = None  # temperature of the rule exponential, in units of the reward
    reward_max: float | None = None  # upper bound of the reward for exponential; None: each group's best
    accumulate: bool = True  # train on what all rounds accepted, not only on the newest round's
    reference: Literal["newest", "base"] = "newest"  # the model that rounds after the first sample

    lora_rank: int = 16  # rank of the LoRA, which is on every linear layer
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    updates: int = 100  # optimiser updates per round
    batch: int = 48  # pages per update
    lr: float = 5e-4  # AdamW learning rate at the start of a round; falls to 0 by its end

    def __post_init__(self):
        """InputError for a value out of range, or for settings that do not go together."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "eval_pages", BLOCKS * ROW, 10**6)
        check_range(self, "eval_every", 0, 10**9)
        check_range(self, "steps", 1, 999)
        check_range(self, "eta", 0, 1)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "rounds", 1, 10**4)
        check_range(self, "groups_per_round", 1, 10**6)
        check_range(self, "samples", 1, 10**4)
        check_range(self, "top_k", 1, self.samples)
        check_range(self, "lora_rank", 1, 1024)
        check_range(self, "lora_alpha", 1e-6, 1e6)
        check_range(self, "updates", 1, 10**6)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_rule(self)
        if self.eval_pages % ROW:
            raise InputError(f"--eval_pages {self.eval_pages}: must be a multiple of {ROW}")
        check_range(self, "probe_groups", 2, 10**6)
        check_range(self, "probe_restarts", 2, 10**4)
        check_range(self, "probe_limit", 0, 1)
        check_switch(self)


def check_rule(args):
    """InputError if --rule lacks its parameter or is given another rule's,
    or if the samples do not divide."""
    rules = {"top_k": "topk", "threshold": "threshold", "beta": "exponential", "reward_max": "exponential"}
    for name, rule in rules.items():
        value = getattr(args, name)
        if args.rule != rule and value != getattr(type(args), name):
            raise InputError(
                f"--{name} {value}: works only with --rule {rule}, not {args.rule}; leave out one of the two"
            )
        if not math.isfinite(value or 0):
            raise InputError(f"--{name} {value}: must be a finite number")
    if args.rule == "threshold" and args.threshold is None:
        raise InputError("--rule threshold needs --threshold, the least reward to accept")
    if args.rule == "exponential" and not (args.beta or 0) > 0:
        raise InputError("--rule exponential needs --beta above 0, in units of the reward")
    if args.rule == "topk" and args.samples == 1:
        raise InputError("--samples 1: leaves nothing to choose from; give at least 2, or another --rule")
    if args.rule == "preference" and args.samples % 2:
        raise InputError(f"--samples {args.samples}: must be even for --rule preference")


def check_switch(args):
    """InputError for settings of the switch and the probe that do not go together."""
    if args.probe or args.switch == "auto":
        if args.eta == 0:
            raise InputError(
                "--eta 0: nothing to probe in a deterministic sampler; give --eta above 0 or a --switch"
            )
        if args.steps == 1:
            raise InputError("--steps 1: no level lies between noise and page; give at least 2")
    try:
        level = 0.5 if args.switch == "auto" else float(args.switch)
    except ValueError:
        level = math.nan
    if not 0 <= level < 1:
        raise InputError(f"--switch {args.switch}: must be auto or a level from 0 to below 1")


# ================================================================ equations: tensors in, tensors out


def accept(rewards, rule, *, top_k=1, threshold=None, beta=None, reward_max=None, generator=None):
    """Which samples a rule accepts. rewards: (prompts, samples) -> bool mask of the same shape.

    "topk": the top_k best of each row, ties broken at random. "preference": the better of each consecutive
    pair. Rows (pairs) whose rewards are all equal are skipped. "exponential": each with probability
    exp((r - reward_max) / beta); reward_max is the reward's known upper bound, without one the row's maximum.
    "threshold": r >= threshold. "none": all. ValueError for a rule without its parameter.
    Source: arXiv 2510.02692, generalised rejection sampling; equations (1) and (2).
    """
    samples = rewards.shape[1]
    # breaks ties; tosses the coin of exponential
    chance = torch.rand(rewards.shape, generator=generator).to(rewards.device)
    if rule in RANKING:
        size, best = (samples, top_k) if rule == "topk" else (2, 1)  # the best of every `size` samples
        if samples % size or not 1 <= best <= size:
            raise ValueError(f"{rule} cannot take the {best} best of {size} from {samples} samples")
        groups = rewards.reshape(-1, size)  # (groups, size)
        mask = _rank(groups, chance.reshape(-1, size)) < best
        return (mask & (groups != groups[:, :1]).any(1, keepdim=True)).reshape(rewards.shape)
    if rule == "exponential":
        if beta is None or beta <= 0:
            raise ValueError("exponential needs beta > 0")
        bound = rewards.max(1, keepdim=True).values if reward_max is None else reward_max
        return chance < ((rewards - bound) / beta).exp()
    if rule == "threshold":
        if threshold is None:
            raise ValueError("threshold needs threshold")
        return rewards >= threshold
    if rule == "none":
        return torch.ones_like(rewards, dtype=torch.bool)
    raise ValueError(f"rule {rule!r} must be topk, preference, exponential, threshold or none")


def _rank(rewards, chance):
    """Place of each entry in its row, 0 the largest; ties in the order of `chance`.
    (rows, n) -> integer (rows, n)."""
    order = chance.argsort(1)
    order = order.gather(1, torch.argsort(rewards.gather(1, order), dim=1, descending=True, stable=True))
    return order.argsort(1)


def reshaped_reward(quantile, num_samples, top_k):
    """rhat of "the top_k best of num_samples" at quantile U in [0, 1], any shape. Equation (2)."""
    u, others = torch.as_tensor(quantile, dtype=torch.float64), num_samples - 1
    rhat = torch.full_like(u, -math.inf)
    for j in range(top_k):  # in logarithms: the binomial coefficients overflow
        log_count = math.lgamma(others + 1) - math.lgamma(j + 1) - math.lgamma(others - j + 1)
        rhat = torch.logaddexp(rhat, log_count + torch.xlogy(others - j, u) + torch.xlogy(j, 1 - u))
    return rhat


def implied_kl(num_samples, top_k):
    """KL(accepted || sampled) in nats of "the top_k best of num_samples", for a reward without ties.
    Equation (3)."""
    if top_k == 1:
        return math.log(num_samples) - (num_samples - 1) / num_samples
    nodes = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    density = num_samples / top_k * reshaped_reward(nodes, num_samples, top_k).exp()
    return torch.xlogy(density, density).mean().item()


def estimated_kl(rewards, rule, *, top_k=1, threshold=None, beta=None, reward_max=None):
    """KL(accepted || sampled) in nats, of images with their prompts, from a round's rewards (prompts,
    samples). NaN if nothing can be accepted.

    topk and preference: of the rewards, as if every prompt had the round's distribution of them; of many
    rewards without ties that is equation (3). threshold: -log of the acceptance rate. exponential: from the
    acceptance probabilities; without reward_max they depend on the group too: then it is an upper bound.
    """
    if rule in RANKING:
        samples, best = (rewards.shape[1], top_k) if rule == "topk" else (2, 1)
        _, count = rewards.flatten().unique(return_counts=True)  # (values,) from the least on
        share = count.double() / rewards.numel()
        u = torch.cat([torch.zeros(1, dtype=torch.float64), share.cumsum(0)]).clamp(max=1)  # (values + 1,)
        # b of a group's samples, with binomial probability, are among the share u of the least rewards; of
        # these the rule accepts b - (samples - best), if that is above 0
        b = torch.arange(samples - best, samples + 1, dtype=torch.float64)[:, None]  # (best + 1, 1)
        n = torch.tensor(samples, dtype=torch.float64)
        log_chance = (n + 1).lgamma() - (b + 1).lgamma() - (n - b + 1).lgamma()
        chance = (log_chance + torch.xlogy(b, u) + torch.xlogy(n - b, 1 - u)).exp()
        accepted = ((b - (samples - best)) * chance).sum(0).diff()  # (values,) of a group
        accepted = (accepted - best * share**samples).clamp(min=0)  # groups of one value are skipped
        density = accepted / accepted.sum() / share  # of the accepted relative to the sampled
        return (share * torch.xlogy(density, density)).sum().item()
    if rule == "exponential":
        bound = rewards.max(1, keepdim=True).values if reward_max is None else reward_max
        chance = ((rewards - bound) / beta).double().exp().clamp(max=1)
    else:
        chance = (rewards >= (-math.inf if rule == "none" else threshold)).double()
    density = chance / chance.mean()
    return torch.xlogy(density, density).mean().item()


def shaped_target(x_s, noise, alpha_s, sigma_s, alpha_t, sigma_t):
    """(x_t, target, weight) of the loss (4) for data x_s at level s and a noisier level t: equations (5),
    (6).

    x_s, noise: (batch, rows, 9). alpha_s, sigma_s: floats, alpha_t, sigma_t: (batch,). weight:
    (batch, 1, 1). alpha_s = 1, sigma_s = 0 gives the ordinary target with weight 1. It equals pgraft.py's
    function, which takes other predictions and shapes too; this one never leaves the device.
    """
    alpha_t, sigma_t = (level.double().view(-1, 1, 1) for level in (alpha_t, sigma_t))
    a = alpha_t / alpha_s
    b = (sigma_t**2 - (a * sigma_s) ** 2).sqrt()  # float64: near the switch this cancels
    noise_factor, x_s_factor, weight = sigma_t * a / (b * alpha_s), -sigma_t / alpha_s, (b / sigma_t) ** 2
    a, b, noise_factor, x_s_factor, weight = (v.to(x_s) for v in (a, b, noise_factor, x_s_factor, weight))
    return a * x_s + b * noise, noise_factor * noise + x_s_factor * x_s, weight


def unresolved_share(rewards):
    """(V, its standard error) of equation (7). rewards: (prompts, states, restarts), at least two of each.

    Numerator and denominator are unbiased: the variance of the states' means contains 1 / restarts of the
    variance within (analysis of variance). The error is the jackknife's over prompts. It is infinite if
    rewards differ for one prompt only. (nan, nan) if none differs.
    """
    rewards = rewards.double()
    within = rewards.var(2).mean(1)  # (prompts,)
    total = rewards.mean(2).var(1) + within * (1 - 1 / rewards.shape[2])
    if total.sum() <= 0:
        return math.nan, math.nan
    n, left_out = len(rewards), (within.sum() - within) / (total.sum() - total)
    if not left_out.isfinite().all():
        return (within.sum() / total.sum()).item(), math.inf
    return (within.sum() / total.sum()).item(), (
        (n - 1) / n * (left_out - left_out.mean()).square().sum()
    ).sqrt().item()


def switch_step(timesteps, switch_timestep):
    """How many steps the tuned model takes: those that start above the switch. The base model takes the
    others. timesteps: falling."""
    return sum(t > switch_timestep for t in timesteps)


def recommend(rows, limit):
    """(level of the recommended switch, the reason): the noisiest level with V(t) + its standard error <=
    limit, else the cleanest. rows: of `probe`, noisy to clean. InputError if no reward differed."""
    if all(math.isnan(row["unresolved"]) for row in rows):
        raise InputError("the probe saw no reward differ; raise --probe_groups or take another --reward")
    for row in rows:
        if row["unresolved"] + row["se"] <= limit:
            return row["switch"], f"the noisiest level with V(t) + s.e. at most {limit:g}"
    return rows[-1]["switch"], f"the cleanest level: V(t) + s.e. is nowhere at most {limit:g}"


def coverage(boxes, kind):
    """Which part of each cell of a grid of 16 x 16 cells the boxes of a class cover: (n, classes, 16, 16) in
    [0, 1]. boxes: (n, rows, 4) centre and size as shares of the page; kind: (n, rows), -1 for a gap."""
    low, high = (
        boxes[..., None, :2] + side * boxes[..., None, 2:] / 2 for side in (-1, 1)
    )  # (n, rows, 1, 2)
    cells = torch.arange(16, device=boxes.device)[:, None] / 16
    inside = 16 * (torch.minimum(high, cells + 1 / 16) - torch.maximum(low, cells)).clamp(min=0)
    of_class = torch.nn.functional.one_hot(kind.long() + 1, len(CLASSES) + 1)[..., 1:].to(boxes)
    covered = torch.einsum("nbx,nby,nbc->ncyx", inside[..., 0], inside[..., 1], of_class)
    return covered.clamp(max=1)


# ================================================================ sampling


@torch.no_grad()
def denoise(model, x, levels, noise, counts, eta):
    """Equation (8) along levels, falling, of which 0 is the clean one. x: (batch, rows, 9) at levels[0],
    noise: (len(levels) - 1, batch, rows, 9), counts: (batch, 5) -> x at levels[-1].

    DDIM is arXiv 2010.02502, equation 12.
    """
    mask = box_mask(counts, x.shape[1])
    x = x * mask
    times = torch.tensor(levels, device=model.device)  # one transfer, none inside the loop
    for k, (t, after) in enumerate(zip(levels, levels[1:])):
        alpha, sigma = model.alpha_sigma(t)
        alpha_next, sigma_next = model.alpha_sigma(after)
        prediction = model.predict(x, times[k], counts)
        x_0, eps = alpha * x - sigma * prediction, alpha * prediction + sigma * x  # v = alpha eps - sigma x_0
        std = eta * sigma_next / sigma * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))
        x = alpha_next * x_0 + math.sqrt(max(sigma_next**2 - std**2, 0)) * eps + std * noise[k] * mask
    return x


def sample(model, noise, counts, eta, switch_at, tuned=True):
    """The tuned model (the base, without `tuned`) takes the first `switch_at` steps, the base model the rest.
    noise: (steps + 1, batch, BOXES, 9), counts: (batch, 5) -> (x_s at the switch, x_0), each
    (batch, BOXES, 9)."""
    rows = int(counts.sum(1).max())  # the others are gaps
    noise, counts = noise[:, :, :rows].to(model.device), counts.to(model.device)
    levels = [*model.levels(len(noise) - 1), 0]
    with model.lora_merged() if tuned else model.lora_off():
        x_s = denoise(model, noise[0], levels[: switch_at + 1], noise[1 : switch_at + 1], counts, eta)
    with model.lora_off():
        x_0 = denoise(model, x_s, levels[switch_at:], noise[switch_at + 1 :], counts, eta)
    return [torch.nn.functional.pad(x, (0, 0, 0, BOXES - rows)) for x in (x_s, x_0)]


def sample_and_score(model, reward, counts, seeds, args, switch_at, tuned, label):
    """Pages with the classes `counts` (n, 5) and the seeds (n), a batch at a time. Returns (x_s, x_0), each
    (n, BOXES, 9), and the rewards (n,). reward: a function of (boxes, kind)."""
    batches = []
    starts = own_share(range(0, len(counts), args.sample_batch))  # of this process, under torchrun
    for i in tqdm(starts, desc=label, unit="batch", leave=False, mininterval=1):
        batch = slice(i, i + args.sample_batch)
        noise = draw_noise(seeds[batch], args.steps)  # (steps + 1, batch, BOXES, 9)
        states = sample(model, noise, counts[batch], args.eta, switch_at, tuned)
        x_s, x_0 = (state.cpu() for state in states)
        if not x_0.isfinite().all():
            raise InputError(f"{label}: NaN or Inf in the pages; use a lower --lr")
        batches.append((x_s, x_0, reward(*boxes_of(x_0, counts[batch]))))
    x_s, x_0, rewards = (torch.cat(parts) for parts in zip(*gather(batches)))  # of all batches, in order
    return (x_s, x_0), rewards


def probe(model, reward, counts, args):
    """V(t), equation (7), of the base model (the caller's lora_off) at up to nine levels between noise and
    page. Two trajectories of each of `counts` (n, 5) are followed; at each level the sampler is started again
    from their states, with fresh noise. Returns rows {step, switch (the level), unresolved (V), se (its
    standard error)}, noisy to clean."""
    levels = [*model.levels(args.steps), 0]
    steps = sorted({round(i * args.steps / 10) for i in range(1, 10)} - {0, args.steps})
    seeds = [derived_seed(args.seed, "probe", i, j) for i in range(len(counts)) for j in range(2)]
    counts = counts.repeat_interleave(2, 0)
    rewards = []  # of each batch (levels, restarts, batch)
    starts = own_share(range(0, len(counts), args.sample_batch))  # of this process, under torchrun
    for i in tqdm(starts, desc="probe", unit="batch", leave=False, mininterval=1):
        batch = slice(i, i + args.sample_batch)
        asked = counts[batch].to(model.device)
        noise = draw_noise(seeds[batch], args.steps).to(model.device)
        x, before = noise[0], 0
        rewards.append(torch.zeros(len(steps), args.probe_restarts, len(asked)))
        for k, step in enumerate(steps):
            x = denoise(model, x, levels[before : step + 1], noise[before + 1 : step + 1], asked, args.eta)
            before = step
            for j in range(args.probe_restarts):
                restart_seeds = [derived_seed(seed, step, j) for seed in seeds[batch]]
                fresh = draw_noise(restart_seeds, args.steps - step - 1)  # a draw for each step left
                x_0 = denoise(model, x, levels[step:], fresh.to(model.device), asked, args.eta)
                rewards[-1][k, j] = reward(*boxes_of(x_0.cpu(), counts[batch]))
    rows = []
    rewards = torch.cat(gather(rewards), 2).unflatten(2, (-1, 2))  # (levels, restarts, multisets, states)
    for step, values in zip(steps, rewards):
        share, se = unresolved_share(values.permute(1, 2, 0))
        rows.append({"step": step, "switch": levels[step], "unresolved": share, "se": se})
    return rows


# ================================================================ loss


def denoising_loss(model, x_s, level_s, counts, t, noise, seen=None):
    """Equation (4), mean over all numbers of all boxes. x_s: (batch, rows, 9), the data at level_s =
    (alpha_s, sigma_s); of clean data (1, 0); noise: like x_s; counts: (batch, 5); t: (batch,) above that
    level; seen: (batch,) as for Model.predict."""
    mask = box_mask(counts, x_s.shape[1])
    x_t, target, weight = shaped_target(x_s, noise * mask, *level_s, *model.alpha_sigma(t))
    error = weight * (model.predict(x_t, t.float(), counts, seen) - target).square()
    return error.sum() / (counts.sum() * x_s.shape[2])


# ================================================================ evaluation


def evaluate(model, reward, net, counts, args, switch_at, tuned, label):
    """Fixed multisets `counts` (n, 5) x fixed seeds. Returns ({measure: (pages,) or of each multiset (n,), or
    features (pages, .)}, (boxes, kind) of the pages)."""
    seeds = [derived_seed("eval", i) for i in range(ROW * len(counts))]
    asked = counts.repeat_interleave(ROW, 0)
    (_, x_0), rewards = sample_and_score(model, reward, asked, seeds, args, switch_at, tuned, label)
    boxes, kind = boxes_of(x_0, asked)
    return {"reward": rewards} | statistics(net, boxes, kind, asked), (boxes, kind)


def statistics(net, boxes, kind, asked):
    """{measure: (n,)} of pages, four of each multiset; diversity (n / 4,) and features (n, .) too. asked:
    (n, 5), how many boxes of each class the pages were to have."""
    cells, mask = coverage(boxes, kind), kind >= 0
    place = boxes[..., :2]
    half = boxes[..., 2:] / 2
    inside = ((place + half).clamp(0, 1) - (place - half).clamp(0, 1)).prod(2)  # (n, rows) area on the page
    area = boxes[..., 2:].prod(2)
    rows = cells.flatten(1).unflatten(0, (-1, ROW))  # (n / 4, 4, .)
    pairs = [(rows[:, i] - rows[:, j]).abs().sum(1) for i in range(ROW) for j in range(i)]
    return {
        "alignment": alignment(boxes, kind),
        "overlap": overlap(boxes, kind),
        "classes": (counts_of(kind) == asked).all(1).float(),
        "coverage": cells.sum(1).clamp(max=1).mean((1, 2)),
        "box_area": area.sum(1) / mask.sum(1),
        "outside": 1 - inside.sum(1) / area.sum(1).clamp(min=1e-9),
        "diversity": torch.stack(pairs).mean(0) / 256,
        "features": net(boxes, kind),
    }


def measures(found, reference):
    """{measure: number} of what `statistics` returned. reference: features (n, .) of real pages."""
    means = {name: values.mean().item() for name, values in found.items() if name != "features"}
    return means | {"frechet": frechet_distance(found["features"], reference)}


def results_table(base, tuned, reference):
    """Rows {metric, base, tuned, difference, se} of what evaluate returned for both. se: standard error of
    the difference, by the jackknife over BLOCKS blocks of multisets with equal seeds."""
    before, after = measures(base, reference), measures(tuned, reference)
    without = []  # differences without one of the blocks
    multisets = torch.arange(len(base["diversity"]))
    for block in range(BLOCKS):
        kept = multisets % BLOCKS != block
        pages = kept.repeat_interleave(ROW)
        rest = [
            measures({k: v[kept if k == "diversity" else pages] for k, v in part.items()}, reference)
            for part in (base, tuned)
        ]
        without.append({name: rest[1][name] - rest[0][name] for name in before})
    table = []
    for name in before:
        difference = after[name] - before[name]
        values = np.array([part[name] for part in without])
        se = math.sqrt((BLOCKS - 1) * values.var())
        table.append({"metric": name, "base": before[name], "tuned": after[name]})
        table[-1] |= {"difference": difference, "se": se}
    return table


def draw(boxes, kind):
    """An image of one page, boxes (rows, 4) and kind (rows,): large boxes first."""
    page = Image.new("RGB", (124, 175), "white")
    pencil = ImageDraw.Draw(page, "RGBA")
    pencil.rectangle((0, 0, page.width - 1, page.height - 1), outline="lightgrey")
    size = torch.tensor(page.size)
    for i in boxes[:, 2:].prod(1).argsort(descending=True).tolist():
        if kind[i] >= 0:
            corners = [(boxes[i, :2] + side * boxes[i, 2:] / 2) * size for side in (-1, 1)]
            colour = ImageColor.getrgb(COLOURS[kind[i]])
            pencil.rectangle([*corners[0].tolist(), *corners[1].tolist()], (*colour, 70), colour)
    return page


@keeps_the_run
def save_pages(path, base, tuned):
    """Draw what evaluate returned of both, (boxes, kind): a multiset a row, left the base's pages, and the
    colours of the classes below."""
    rows = min(GRID_ROWS, len(base[1]) // ROW)
    width, height = draw(base[0][0], base[1][0]).size
    grid = Image.new("RGB", (2 * ROW * (width + 6) + 20, rows * (height + 6) + 44), "white")
    pencil = ImageDraw.Draw(grid)
    for half, (title, (boxes, kind)) in enumerate((("base", base), ("tuned, same seeds", tuned))):
        left = half * (ROW * (width + 6) + 20)
        pencil.text((left + 2, 4), title, "black")
        for i in range(rows * ROW):
            at = (left + i % ROW * (width + 6), 20 + i // ROW * (height + 6))
            grid.paste(draw(boxes[i], kind[i]), at)
    for i, (name, colour) in enumerate(zip(CLASSES, COLOURS)):
        pencil.rectangle((4 + 90 * i, grid.height - 18, 16 + 90 * i, grid.height - 6), colour)
        pencil.text((22 + 90 * i, grid.height - 18), name, "black")
    buffer = io.BytesIO()
    grid.save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


# ================================================================ what a run prints and logs


def describe(args, model, folder, switch):
    """The checked, derived settings, printed before the run. switch: a level, or None."""
    rules = {"topk": f"{args.top_k} best of {args.samples}", "preference": "better of two"}
    kl = "estimated in every round"
    if args.rule in RANKING:  # then it does not depend on the rewards
        group, best = (args.samples, args.top_k) if args.rule == "topk" else (2, 1)
        kl = f"{implied_kl(group, best):.2f} nats if no rewards tie"
    reference = "base" if args.reference == "base" or args.rounds == 1 else "model of the round"
    size = sum(p.numel() for p in model.lora().values())
    pages = args.rounds * args.groups_per_round * args.samples
    probed = f"{args.probe_groups} multisets x 2 states x {args.probe_restarts} restarts"
    switch = f"chosen by probing {probed} at each level" if switch is None else f"{switch:g}"
    return f"""P-GRAFT of layouts -> {folder}
  model      {args.model}, v_prediction, on {args.device}{several_processes()}
  LoRA       rank {args.lora_rank}, alpha {args.lora_alpha:g}: {size:,} parameters
  sampling   {args.rounds} rounds x {args.groups_per_round} multisets x {args.samples} = {pages} pages, \
{args.steps} steps, eta {args.eta:g}
  acceptance {rules.get(args.rule, args.rule)} by {args.reward}; KL(accepted || {reference}) {kl}
  switch     {switch}; trained on {args.data} noised to the levels above it
  update     {args.rounds} rounds x {args.updates} = {args.rounds * args.updates} updates x {args.batch} \
pages, lr {args.lr:g}
  evaluation {args.eval_pages // ROW} held-out multisets x {ROW} pages, base and tuned on equal seeds"""


def sampled_row(number, args, rewards, index, options):
    """The columns of metrics.csv about a round's sampling. InputError if nothing was accepted.

    rewards: (groups, samples); index: (n,) the accepted ones among all samples; options: of the rule.
    """
    above = (rewards > (math.inf if args.reward_max is None else args.reward_max)).sum().item()
    if above:
        print(
            f"warning: {above} of {rewards.numel()} rewards are above --reward_max {args.reward_max:g} "
            f"(largest {rewards.max():.4g}) and count as equal to it; give the reward's true upper bound",
            file=sys.stderr,
        )
    group = 2 if args.rule == "preference" else args.samples  # the samples among which a rule ranks
    groups = rewards.view(len(rewards), -1, group)  # (multisets, groups, group)
    flat = ((groups.amax(2) == groups.amin(2)) & (args.rule in RANKING)).double().mean().item()
    if len(index) == 0:
        advice = "raise --samples or take another reward" + ", or lower --threshold" * (
            args.rule == "threshold"
        )
        raise InputError(
            f"--rule {args.rule} accepted nothing: {flat:.0%} of the groups had equal rewards, the best "
            f"reward was {rewards.max():.4g}; {advice}"
        )
    return {
        "round": number,
        "reward_sampled": rewards.mean().item(),
        "reward_accepted": rewards.flatten()[index].mean().item(),
        "acceptance_rate": len(index) / rewards.numel(),
        "flat_groups": flat,
        "kl": estimated_kl(rewards, args.rule, **options),
    }


def print_round(state, rounds, speed):
    """One line on the newest of the rounds."""
    row, left = state["rows"][-1], state["seconds"] / state["round"] * (rounds - state["round"])
    rates = f"{row['acceptance_rate']:.1%}; {row['flat_groups']:.0%} of groups without signal"
    rewarded = f"reward {row['reward_sampled']:.3f}, accepted {row['reward_accepted']:.3f} ({rates})"
    held_out = f"held-out reward {row['reward_held_out']:.3f}, training loss {row['loss']:.4f}"
    print(f"  round {state['round']}/{rounds}  {rewarded}, {held_out}, {speed}{left:.0f} s left", flush=True)


def show_probe(folder, rows, args, switch, reason):
    """Print V(t) of the probe with its standard error and the recommended switch;
    write probe.csv and probe.png."""
    write_csv(folder / "probe.csv", rows)
    levels, shares, errors = ([row[name] for row in rows] for name in ("switch", "unresolved", "se"))
    lines = {"V(t)": (levels, shares, errors), "--probe_limit": (levels, [args.probe_limit] * len(levels))}
    save_panels(folder / "probe.png", [("level (1: noise)", f"V(t) of {args.reward}", lines)])
    print("\n  step  --switch   V(t)   s.e.   (V: share of the reward's variance not yet decided)")
    for row in rows:
        print("  {step:4d}  {switch:8.3f}  {unresolved:5.2f}  {se:5.2f}".format(**row))
    print(f"  recommended: --switch {switch:.9g}, {reason}", flush=True)


def usage_code(folder, page, args, switch_at):
    """Python that makes a page of the evaluation with the tuned model. page: (5,) its classes."""
    return f"""import torch
from layouts.model import Model, boxes_of, derived_seed, draw_noise
from layouts.pgraft_layouts import denoise
base, tuned = (Model.load(name, "cpu") for name in ({args.model!r}, {str((folder / TUNED_FILE).resolve())!r}))
counts, noise = torch.tensor([{page.tolist()}]), draw_noise([derived_seed("eval", 0)], {args.steps})
levels = [*base.levels({args.steps}), 0]
x_s = denoise(tuned, noise[0], levels[:{switch_at + 1}], noise[1:{switch_at + 1}], counts, {args.eta})
x_0 = denoise(base, x_s, levels[{switch_at}:], noise[{switch_at + 1}:], counts, {args.eta})
print(boxes_of(x_0, counts))"""


# ================================================================ the run


REWARDS = {  # of pages, to maximise: both measures are 0 for the best page
    "alignment": lambda boxes, kind: -alignment(boxes, kind),
    "overlap": lambda boxes, kind: -overlap(boxes, kind),
    "both": lambda boxes, kind: -alignment(boxes, kind) - overlap(boxes, kind),
}


def read_reward(spec):
    """The reward `spec` of pages (boxes (n, rows, 4), kind (n, rows)) -> (n,). A function of the user's file
    gets one page, a list of boxes (class, left, top, right, bottom) in shares of the page, and returns a
    finite number. InputError if there is none, and from the function for anything else."""
    if spec in REWARDS:
        return REWARDS[spec]
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise InputError(
            f"--reward {spec}: no file {file}; give {', '.join(REWARDS)} or path/to/file.py:function"
        )
    try:
        user = UserModule(file)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's file may raise anything, and may exit
        raise InputError(f"--reward {spec}: {file} does not load ({type(error).__name__}: {error})") from None
    function = getattr(user.module, name, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {file} has no function {name!r}")

    def of_page(page):
        try:
            with user.running(zlib.crc32(repr(page).encode())):  # a resumed run sees the same random numbers
                value = float(function(page))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's function may raise anything, and may exit
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"reward {spec}: {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            ) from error
        if not math.isfinite(value):
            raise InputError(f"reward {spec}: is {value} for a page; must be finite")
        return value

    def reward(boxes, kind):
        corners = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], 2)
        pages = [
            [(CLASSES[k], *corner) for k, corner in zip(kinds, places) if k >= 0]
            for kinds, places in zip(kind.tolist(), corners.tolist())
        ]
        return torch.tensor([of_page(page) for page in pages])

    return reward


def read_pages(args):
    """(counts (n, 5) of the pages that multisets for training are taken from; counts (eval_pages / 4, 5) of
    the evaluation; boxes (m, 12, 4) and kind (m, 12) of held-out pages: the first eval_pages give those
    counts, the others are the reference). InputError if there are too few."""
    with np.load(PAGES) as file:
        counts, boxes, kind = (file[name] for name in ("counts", "boxes", "kind"))
    for name, most in (("groups_per_round", len(counts)), ("probe_groups", len(counts))):
        if getattr(args, name) > most:
            raise InputError(
                f"--{name} {getattr(args, name)}: there are {most} multisets; give at most as many"
            )
    if args.eval_pages > len(boxes) // 2:
        raise InputError(
            f"--eval_pages {args.eval_pages}: half of the {len(boxes)} held-out pages are the reference; "
            f"give at most {len(boxes) // 2 // ROW * ROW}"
        )
    boxes = torch.from_numpy(boxes / np.float32(np.iinfo(boxes.dtype).max))
    counts, kind = torch.from_numpy(counts).long(), torch.from_numpy(kind).long()
    return counts, counts_of(kind[: args.eval_pages : ROW]), boxes, kind


def main(args):
    check_output(args.output, args.resume)
    args.device = check_device(args.device)
    own = [] if args.reward in REWARDS else [args.reward.rpartition(":")[0]]  # the file of a reward
    inputs = check_inputs(args.resume, [args.model, PAGES, FEATURES, *own])
    reward, net = read_reward(args.reward), FeatureNet.load()
    all_counts, eval_counts, *real = read_pages(args)  # (n, 5), (n, 5), boxes and kind of real pages
    model = Model.load(args.model, args.device)
    if model.switch:
        raise InputError(
            f"--model {args.model}: is tuned for the levels above {model.switch:g} only; give the base"
        )
    grid = model.levels(args.steps)  # from noise on
    switch = None if args.switch == "auto" else float(args.switch)  # a level; None: the probe will say
    if switch and switch < grid[-1]:
        raise InputError(
            f"--switch {args.switch}: with --steps {args.steps} it must be 0 or at least {grid[-1]:.9g}"
        )
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    folder = make_run_folder(args, "pgraft_layouts", args.model, args.seed, inputs)
    print(describe(args, model, folder, switch), flush=True)

    # state: {round, rows, losses, accepted, seconds, tuned}; save() stores it with LoRA and optimiser
    state, save = restore(args, folder, model, optimizer, scaler)
    run_start = time.perf_counter() - state["seconds"]

    # ------------------------------------------------------------ PROBE
    if args.probe or switch is None:
        if "probe" not in state:
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "probe"))
            order = torch.randperm(len(all_counts), generator=generator)
            with model.lora_off():
                state["probe"] = probe(model, reward, all_counts[order[: args.probe_groups]], args)
            save()
        switch, reason = recommend(state["probe"], args.probe_limit)
        show_probe(folder, state["probe"], args, switch, reason)
        if args.probe:
            print(f"\nIn {folder}: probe.csv, probe.png")
            return
    switch_at = switch_step(grid, switch)  # steps of the tuned model
    switch = [*grid, 0][switch_at]  # the level of the states, and what is stored
    level_s = model.alpha_sigma(switch) if args.data == "xs" else (1.0, 0.0)  # (alpha_s, sigma_s) of the data
    print(
        f"  tuned model for {switch_at} of {args.steps} steps, base model from level {switch:g} on",
        flush=True,
    )

    # ------------------------------------------------------------ BASELINE
    n = args.eval_pages
    reference = net(*(part[n:] for part in real))  # features of real pages (m, .)
    part = [part[:n] for part in real]
    floor = measures({"reward": reward(*part)} | statistics(net, *part, counts_of(part[1])), reference)
    del floor["diversity"]  # is of pages of one multiset
    base, base_pages = evaluate(model, reward, net, eval_counts, args, switch_at, False, "evaluate base")
    base_reward = base["reward"].mean().item()
    print(f"  base       held-out {args.reward} {base_reward:.3f}", flush=True)

    for r in range(state["round"], args.rounds):
        speed = ""
        if len(state["accepted"]) == r:  # not so if the run was stopped after it had accepted
            # ---------------------------------------------------- SAMPLE, SCORE
            start, label = time.perf_counter(), f"sample {r + 1}"
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "groups", r))
            groups = torch.randperm(len(all_counts), generator=generator)[: args.groups_per_round]
            counts = all_counts[groups].repeat_interleave(args.samples, 0)  # (n, 5) n = groups x samples
            seeds = [
                derived_seed(args.seed, r, i, j) for i in range(len(groups)) for j in range(args.samples)
            ]
            tuned = args.reference == "newest" and r > 0  # a new LoRA does nothing in round 1
            (x_s, x_0), rewards = sample_and_score(
                model, reward, counts, seeds, args, switch_at, tuned, label
            )
            speed = f"{len(seeds) / (time.perf_counter() - start):.0f} pages/s, "
            rewards = rewards.view(-1, args.samples)  # (groups, samples)

            # ---------------------------------------------------- ACCEPT
            options = {"top_k": args.top_k, "threshold": args.threshold}
            options |= {"beta": args.beta, "reward_max": args.reward_max}
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "accept", r))
            mask = accept(rewards, args.rule, **options, generator=generator)  # (groups, samples)
            index = mask.flatten().nonzero().squeeze(1)  # (accepted,)
            accepted = {"x_s": x_s[index], "x_0": x_0[index], "counts": counts[index]}
            state["accepted"].append(accepted | {"reward": rewards.flatten()[index]})
            state["rows"].append(sampled_row(r + 1, args, rewards, index, options))
            save()

        # -------------------------------------------------------- UPDATE
        kept = state["accepted"] if args.accumulate else state["accepted"][-1:]
        data = torch.cat([a["x_s" if args.data == "xs" else "x_0"] for a in kept])  # (n, BOXES, 9)
        data_counts = torch.cat([a["counts"] for a in kept])  # (n, 5)
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        losses = []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            optimizer.param_groups[0]["lr"] = args.lr * (1 - update / args.updates)
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            x_s = data[index].to(args.device)  # (batch, BOXES, 9), at level_s; with --data x0 the clean x_0
            counts = data_counts[index].to(args.device)  # (batch, 5)
            noise = torch.randn(x_s.shape, generator=generator).to(args.device)
            t = torch.rand(args.batch, generator=generator, dtype=torch.float64)
            t = (switch + (1 - switch) * (1 - t)).to(args.device)  # (batch,) uniform above the switch
            losses.append(0.0)
            part = own_share(torch.arange(args.batch))  # of this process, under torchrun; it may be empty
            if len(part):
                loss = denoising_loss(model, x_s[part], level_s, counts[part], t[part], noise[part])
                loss = loss * counts[part].sum() / counts.sum()
                loss.backward()
                losses[-1] = loss.item()
            losses[-1] = sum_gradients(parameters, losses[-1])
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            check_finite(f"round {r + 1}, update {update + 1}", losses[-1], norm)
            optimizer.step()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = state["rows"][-1]
        row |= {"pages_trained_on": len(data), "loss": sum(losses) / len(losses)}
        row |= {f"{name}_held_out": math.nan for name in measures(base, reference)}  # without evaluation
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            label = f"evaluate {r + 1}"
            state["tuned"], pages = evaluate(model, reward, net, eval_counts, args, switch_at, True, label)
            row |= {f"{name}_held_out": v for name, v in measures(state["tuned"], reference).items()}
            if FIRST:
                save_pages(folder / "grid.png", base_pages, pages)
        state["losses"] += losses
        state["round"] = r + 1
        model.save_tuned(folder, switch)
        log_metrics(folder, state["rows"], state["round"], time.perf_counter() - run_start)
        save_curves(folder / "curves.png", state["rows"], state["losses"], base_reward, args.reward)
        save()
        print_round(state, args.rounds, speed)

    # ------------------------------------------------------------ SHOW
    table = results_table(base, state["tuned"], reference)
    extra = {"seconds": state["seconds"], "steps": args.steps, "switch_at": switch_at, "switch": switch}
    write_json(folder / "results.json", {"table": table, "real": floor, "probe": state.get("probe")} | extra)
    print_table(table, f"{n} held-out pages", f"   ({args.reward} was optimised)")
    print(f"real pages: {', '.join(f'{name} {value:.3f}' for name, value in floor.items())}")
    files = f"{TUNED_FILE}, results.json, metrics.csv, grid.png, curves.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {files}. To use it:\n")
    print(usage_code(folder, eval_counts[0], args, switch_at))


if __name__ == "__main__":
    run_script(main, Args, shared=True)
