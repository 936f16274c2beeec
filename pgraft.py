"""P-GRAFT (partial GRAFT): score the image, accept the noisy state it came from, tune the noisier levels.

Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.
Run: python pgraft.py

Notation
    x_t = alpha_t x_0 + sigma_t eps:  alpha_t^2 + sigma_t^2 = 1;  of flows (SD 3, FLUX)  alpha_t + sigma_t = 1
    c the prompt; p the model that is sampled; r(x, c) the reward
    M samples x_i a prompt; a rule accepts x_i with probability A_i, which does not decrease with r(x_i, c)
    and may depend on the other samples; X and A: one sample and its acceptance probability
    s the switch: the tuned model denoises the levels t > s, the base model the rest
Equations
    (1) accepted states follow  argmax_q  E_q[rhat] - KL(q || p),  q and p here distributions of x_s,
        rhat(x_s) = log E[A | X_s = x_s].  No KL weight is set: the rule decides how far q moves from p
    (2) K best of M:  rhat(x) = log sum_{j<K} C(M-1, j) U^(M-1-j) (1-U)^j,  U = P(r(X') <= r(x)),  X' ~ p,
        ties broken at random
    (3) KL(accepted images || p) = integral_0^1 f log f du,  f = (M/K) exp(rhat);
        K = 1: log M - (M-1)/M;  better of a pair: M = 2;  the KL of the states x_s is at most this
    (4) loss  E (b / sigma_t)^2 |prediction(x_t, t, c) - target|^2,  t > s
        (the target's variance grows as 1 / b^2 towards s; the weight evens that out)
    (5) x_t = a x_s + b eps',  a = alpha_t / alpha_s,  b^2 = sigma_t^2 - a^2 sigma_s^2,  eps' ~ N(0, I)
    (6) target, whose mean E[target | x_t] is the prediction wanted
        eps:                 sigma_t eps' / b
        v:                   sigma_t (eps' a / b - x_s) / alpha_s
        velocity eps - x_0:  eps' (sigma_t + alpha_t (sigma_s / alpha_s)^2) / b - x_s / alpha_s
    (7) V(t) = E[Var(r | X_t, c)] / E[Var(r | c)]: the share of the variance of r that x_t leaves undecided
    (8) step to the next level ('):  x' = alpha' x_0 + sqrt(sigma'^2 - std^2) eps + std w,
        std = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2),  w ~ N(0, I),
        x_0 and eps as predicted. This is DDIM; for a flow with eta 0 it is Euler's step
Choices that the paper leaves open
    A LoRA is tuned; it and AdamW's state go on from round to round. Rules that rank skip groups whose rewards
    are all equal; where that happens, (2) and (3) no longer hold exactly. By default later rounds sample the
    tuned model (--reference) and train on what all rounds accepted (--accumulate). With --guidance > 1 the
    loss is on the guided prediction, because that is what samples (docs/models.md, "Guidance").
Deviation from the paper
    The paper's data are the accepted x_s (--data xs). By default (--data x0) the data in (4) to (6) are the
    accepted x_0: there alpha_s = 1, sigma_s = 0 and the weight is 1, but t stays above the switch. If the
    sampler drew x_0 exactly from its distribution given x_s, x_0 noised to s would be distributed like x_s:
    the same minimiser, a target with far less variance (docs/pgraft.md).
"""

import math
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs an older one is to read why it fails)
    print("error: Python 3.11 or newer is needed, this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import torch
from tqdm import tqdm

from common import (
    DTYPES,
    EMBEDDED,
    SWITCH_FILE,
    Device,
    Dtype,
    by_family,
    check_device,
    check_finite,
    check_start,
    derived_seed,
    draw_noise,
    find_lora,
    load_model,
    read_switch,
    schedule_prompts,
    stock_call,
    stock_code,
    stock_switch,
    with_family_defaults,
)
from rewards import diversity, image_statistics, read_rewards, score
from utils.figures import GRID_IMAGES, save_curves, save_grid, save_panels, shrink
from utils.processes import SIZE, gather, own_share, several_processes, sum_gradients
from utils.prompts import TRAIN_PROMPTS, prompt_files, read_prompt_sets
from utils.runs import (
    InputError,
    check_inputs,
    check_output,
    check_range,
    log_metrics,
    make_run_folder,
    restore,
    run_script,
    save_accepted,
    write_csv,
    write_json,
    write_results,
)

Rule = Literal["topk", "preference", "exponential", "threshold", "none"]
RANKING = ("topk", "preference")  # rules for which only the order of the rewards counts

# embedded model, other U-Nets, flows: the probe needs a random sampler, for a flow too
ETA = (1.0, 1.0, 0.5)


@dataclass
class Args:
    """P-GRAFT: GRAFT for the noisy part of the trajectory; the base model denoises the rest."""

    seed: int = 0  # seed of the training run; evaluation images do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: Device = "auto"  # auto: CUDA or MPS if there is one
    dtype: Dtype = "float32"  # precision of the frozen model; the LoRA is always float32

    model: str = EMBEDDED  # folder or hub id of a pipeline, or one file: SD 1.x to 3.x, FLUX.1, FLUX.2 klein
    model_config: str = ""  # folder or hub id of a pipeline with the configuration of a file as --model
    t5: bool = True  # SD 3: load the third text encoder, 10 GB, which reads long prompts better
    height: int | None = None  # of the images in pixels; None: as the stock pipeline has it
    width: int | None = None
    lora: str = ""  # LoRA to start from: a folder or .safetensors file, also of diffusers or kohya's scripts
    prompts: str = TRAIN_PROMPTS  # .txt (one a line), .csv, .tsv or .jsonl; file.csv:column
    eval_prompts: str = ""  # held-out prompts; left out: the shapes ones, or every tenth of --prompts
    eval_samples: int = 4  # images per held-out prompt
    eval_every: int = 1  # rounds between evaluations; 0: only before and after

    steps: Annotated[int | None, by_family("steps")] = None  # steps of the sampler
    guidance: Annotated[float | None, by_family("guidance")] = None  # classifier-free guidance; 1: none
    eta: Annotated[float | None, by_family(ETA)] = None  # 0: deterministic; 1: as random as DDPM
    sample_batch: Annotated[int | None, by_family("sample_batch")] = None  # images sampled at a time

    switch: str = "auto"  # level t / T in (0, 1) from which on the base model denoises; auto: see --probe
    data: Literal["x0", "xs"] = "x0"  # trained on: the accepted images, or their states at the switch
    probe: bool = False  # only measure V(t), how far each level leaves the reward open; recommends a switch
    probe_prompts: int = 96  # prompts of the probe, with two trajectories each
    probe_restarts: int = 4  # times the sampler is started again from each stored state
    probe_limit: float = 0.1  # recommended: the noisiest level with V(t) + standard error at most this

    reward: str = "shapes_strict"  # to maximise: a name of rewards.py, file.py:function, or 0.7*one+0.3*other
    eval_rewards: Annotated[str | None, by_family("eval_rewards")] = None  # further ones to report: a,b
    reward_device: Device = "auto"  # of rewards that are models
    reward_dtype: Dtype = "float32"  # their precision
    reward_batch: int = 16  # images that they score at a time

    rounds: int = 3  # times to sample, accept and update
    prompts_per_round: int = 160  # prompts sampled in a round, none twice
    samples: int = 8  # M, samples per prompt
    rule: Rule = "topk"  # which samples are accepted; none: all of them, the control
    top_k: int = 1  # K of the rule topk
    threshold: float | None = None  # least accepted reward of the rule threshold
    beta: float | None = None  # temperature of the rule exponential, in units of the reward
    reward_max: float | None = None  # upper bound of the reward for exponential; None: each prompt's best
    accumulate: bool = True  # train on what all rounds accepted, not only on the newest round's
    reference: Literal["newest", "base"] = "newest"  # the model that rounds after the first sample

    lora_rank: int = 16  # rank of the LoRA
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    lora_targets: Annotated[str | None, by_family("lora_targets")] = None  # attention, all or layer names
    updates: int = 60  # optimiser updates per round
    batch: int = 64  # images per update
    micro_batch: Annotated[int | None, by_family("micro_batch")] = None  # images per backward pass
    lr: Annotated[float | None, by_family("lr")] = None  # AdamW learning rate
    prompt_dropout: float = 0.0  # share of training prompts replaced by the empty one
    guided_loss: bool = True  # with guidance > 1: train the guided prediction, not the conditional one
    gradient_checkpointing: bool = False  # less memory, about a third slower
    save_accepted: bool = False  # write accepted images to <run>/accepted with metadata.jsonl (imagefolder)

    def __post_init__(self):
        """InputError for a value out of range, or for settings that do not go together."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "eval_samples", 2, 10**4)
        check_range(self, "eval_every", 0, 10**9)
        check_range(self, "height", 8, 10**4)
        check_range(self, "width", 8, 10**4)
        check_range(self, "steps", 1, 999)
        check_range(self, "guidance", 1, 10**6)
        check_range(self, "eta", 0, 1)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "reward_batch", 1, 10**6)
        check_range(self, "rounds", 1, 10**4)
        check_range(self, "prompts_per_round", 1, 10**6)
        check_range(self, "samples", 1, 10**4)
        check_range(self, "top_k", 1, self.samples)
        check_range(self, "lora_rank", 1, 1024)
        check_range(self, "lora_alpha", 1e-6, 1e6)
        check_range(self, "updates", 1, 10**6)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "micro_batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_range(self, "prompt_dropout", 0, 0.99)
        check_rule(self)
        if self.micro_batch and self.batch % min(self.micro_batch, self.batch):
            raise InputError(f"--micro_batch {self.micro_batch}: must divide --batch {self.batch}")
        check_range(self, "probe_prompts", 2, 10**9)
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
    if args.probe or (args.switch == "auto" and not own_switch(args)):
        if args.eta == 0:
            raise InputError(
                "--eta 0: nothing to probe in a deterministic sampler; give --eta above 0 or a --switch"
            )
        if args.steps == 1:
            raise InputError("--steps 1: no level lies between noise and image; give at least 2")
    try:
        level = 0.5 if args.switch == "auto" else float(args.switch)
    except ValueError:
        level = math.nan
    if not 0 < level < 1:
        raise InputError(
            f"--switch {args.switch}: must be auto or a level t / T between 0 and 1, both excluded"
        )


def own_switch(args):
    """The file with the switch of --lora, which a run of this script leaves, if this run takes it; else None.
    InputError if there is no LoRA."""
    if not args.lora or args.probe or args.switch != "auto":
        return None
    file = find_lora(args.lora, "--lora").parent / SWITCH_FILE
    return file if file.is_file() else None


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


def shaped_target(x_s, noise, alpha_s, sigma_s, alpha_t, sigma_t, prediction_type):
    """(x_t, target, weight) of the loss (4) for data x_s at level s and a noisier level t: equations (5),
    (6).

    x_s, noise: (batch, ...). The levels: () or (batch,), or of any shape that broadcasts. weight: like the
    levels, with the dimensions of x_s. prediction_type: "epsilon" or "v_prediction" (alpha^2 + sigma^2 = 1),
    or "flow" (alpha = 1 - sigma). alpha_s = 1, sigma_s = 0 gives the ordinary targets with weight 1.
    ValueError for another type. Source: derived for this project and tested against closed forms; the paper
    gives the data x_s but no target.
    """
    levels = [  # on the CPU: MPS has no float64
        torch.as_tensor(v.cpu() if isinstance(v, torch.Tensor) else v, dtype=torch.float64)
        for v in (alpha_s, sigma_s, alpha_t, sigma_t)
    ]
    alpha_s, sigma_s, alpha_t, sigma_t = (v.view(*v.shape, *[1] * (x_s.dim() - v.dim())) for v in levels)
    a = alpha_t / alpha_s
    b = (sigma_t**2 - (a * sigma_s) ** 2).sqrt()  # float64: near the switch this cancels
    if prediction_type == "epsilon":
        noise_factor, x_s_factor = sigma_t / b, 0 * a
    elif prediction_type == "v_prediction":
        noise_factor, x_s_factor = sigma_t * a / (b * alpha_s), -sigma_t / alpha_s
    elif prediction_type == "flow":
        noise_factor, x_s_factor = (sigma_t + alpha_t * (sigma_s / alpha_s) ** 2) / b, -1 / alpha_s
    else:
        raise ValueError(f"prediction_type {prediction_type!r} must be epsilon, v_prediction or flow")
    weight = (b / sigma_t) ** 2
    a, b, weight, noise_factor, x_s_factor = (v.to(x_s) for v in (a, b, weight, noise_factor, x_s_factor))
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
    """(timestep of the recommended switch, the reason): the noisiest level with V(t) + its standard error <=
    limit, else the cleanest. rows: of `probe`, noisy to clean. InputError if no reward differed."""
    if all(math.isnan(row["unresolved"]) for row in rows):
        raise InputError("the probe saw no reward differ; raise --probe_prompts or take another --reward")
    for row in rows:
        if row["unresolved"] + row["se"] <= limit:
            return row["timestep"], f"the noisiest level with V(t) + s.e. at most {limit:g}"
    return rows[-1]["timestep"], f"the cleanest level: V(t) + s.e. is nowhere at most {limit:g}"


# ================================================================ sampling


def guided_prediction(model, x, t, text, guidance):
    """The prediction that samples: unconditional + guidance * (conditional - unconditional). x: (batch, c, h,
    w), t: () or (batch,), text: (batch, rows, width)."""
    if guidance == 1 or not model.classifier_free:  # else the network takes guidance as an input, if at all
        return model.predict(x, t, text, guidance)
    text = torch.cat([model.empty.expand_as(text), text])  # (2 batch, rows, width)
    predictions = model.predict(x.repeat(2, 1, 1, 1), t.expand(len(x)).repeat(2), text)
    unconditional, conditional = predictions.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def denoise(model, x, levels, noise, text, guidance, eta):
    """Equation (8) along levels, falling timesteps of which -1 is the clean one. x: (batch, c, h, w) at
    levels[0], noise: (len(levels) - 1, batch, c, h, w) -> x at levels[-1], float32.

    DDIM is arXiv 2010.02502, equation 12. Of a flow, small steps with eta are the SDE of Flow-GRPO (arXiv
    2505.05470) with a = sqrt(2) eta, which keeps the flow's marginals. Flow-GRPO's own Euler-Maruyama step
    leaves noise behind (docs/models.md, "Samplers").
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
    noise: (steps + 1, batch, c, h, w) -> (x_s at the switch, x_0), each (batch, c, h, w)."""
    levels = [*model.timesteps(len(noise) - 1), -1]
    with model.lora_merged() if tuned else model.lora_off():
        x_s = denoise(model, noise[0], levels[: switch_at + 1], noise[1 : switch_at + 1], text, guidance, eta)
    with model.lora_off():
        return x_s, denoise(model, x_s, levels[switch_at:], noise[switch_at + 1 :], text, guidance, eta)


def sample_and_score(model, rewards, prompts, seeds, args, switch_at, tuned, label):
    """Images of the prompts (n) with the seeds (n), a batch at a time. Returns (x_s, x_0), each (n, c, h, w),
    {reward or statistic: (n,)}, and the images, most of them shrunk."""
    latents, scores, images = [], [], []
    starts = own_share(range(0, len(prompts), args.sample_batch))  # of this process, under torchrun
    for i in tqdm(starts, desc=label, unit="batch", leave=False, mininterval=1):
        batch = slice(i, i + args.sample_batch)
        # (steps + 1, batch, c, h, w)
        noise = draw_noise(seeds[batch], args.steps, model.latent_shape, model.dtype)
        x_s, x_0 = sample(
            model, noise, model.encode(prompts[batch]), args.guidance, args.eta, switch_at, tuned
        )
        batch_images = model.decode(x_0, label)
        latents.append((x_s.cpu(), x_0.cpu()))
        scores.append(score(rewards, batch_images, prompts[batch]) | image_statistics(batch_images))
        images.append(shrink(batch_images, i))
    latents, scores, images = gather(latents), gather(scores), gather(images)  # of all batches, in order
    scores = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    images = [image for batch in images for image in batch]
    return [torch.cat(states) for states in zip(*latents)], scores, images


def probe(model, reward, prompts, args):
    """V(t), equation (7), of the base model (the caller's lora_off) at up to nine levels between noise and
    image. Two trajectories a prompt are followed; at each level the sampler is started again from their
    states, with fresh noise. Returns rows {step, timestep, switch, unresolved (V), se (its standard error)},
    noisy to clean."""
    model.remember(prompts)
    levels = [*model.timesteps(args.steps), -1]
    steps = sorted({round(i * args.steps / 10) for i in range(1, 10)} - {0, args.steps})
    seeds = [derived_seed(args.seed, "probe", i, j) for i in range(len(prompts)) for j in range(2)]
    repeated = [p for p in prompts for _ in range(2)]
    rewards = []  # of each batch (levels, restarts, batch)
    starts = own_share(range(0, len(repeated), args.sample_batch))  # of this process, under torchrun
    for i in tqdm(starts, desc="probe", unit="batch", leave=False, mininterval=1):
        batch = slice(i, i + args.sample_batch)
        text = model.encode(repeated[batch])
        noise = draw_noise(seeds[batch], args.steps, model.latent_shape, model.dtype)
        x, before = noise[0], 0
        rewards.append(torch.zeros(len(steps), args.probe_restarts, len(text)))
        for k, step in enumerate(steps):
            between = noise[before + 1 : step + 1]
            x = denoise(model, x, levels[before : step + 1], between, text, args.guidance, args.eta)
            before = step
            for j in range(args.probe_restarts):
                restart_seeds = [derived_seed(seed, step, j) for seed in seeds[batch]]
                # a draw for each step left
                fresh = draw_noise(restart_seeds, args.steps - step - 1, model.latent_shape, model.dtype)
                x_0 = denoise(model, x, levels[step:], fresh, text, args.guidance, args.eta)
                rewards[-1][k, j] = reward(model.decode(x_0, "probe"), repeated[batch])
    rows = []
    rewards = torch.cat(gather(rewards), 2).unflatten(2, (-1, 2))  # (levels, restarts, prompts, states)
    for step, values in zip(steps, rewards):
        share, se = unresolved_share(values.permute(1, 2, 0))
        level = {"step": step, "timestep": levels[step], "switch": levels[step] / model.train_timesteps}
        rows.append(level | {"unresolved": share, "se": se})
    return rows


# ================================================================ loss


def denoising_loss(model, x_s, level_s, text, t, noise, guidance):
    """Equation (4), mean over everything. x_s: (batch, c, h, w), the data at level_s = (alpha_s, sigma_s); of
    clean data (1, 0); noise: like x_s; text: (batch, rows, width); t: (batch,) above that level."""
    x_t, target, weight = shaped_target(x_s, noise, *level_s, *model.alpha_sigma(t), model.prediction_type)
    return (weight * (guided_prediction(model, x_t, t, text, guidance) - target).square()).mean()


# ================================================================ evaluation


def evaluate(model, rewards, prompts, args, switch_at, tuned, label):
    """Fixed prompts x fixed seeds.
    Returns ({metric: (prompts,), the mean over a prompt's images}, images of grid.png)."""
    n = args.eval_samples
    seeds = [derived_seed("eval", i, j) for i in range(len(prompts)) for j in range(n)]
    repeated = [p for p in prompts for _ in range(n)]
    _, scores, images = sample_and_score(model, rewards, repeated, seeds, args, switch_at, tuned, label)
    means = {name: values.view(-1, n).mean(1) for name, values in scores.items()}
    means["diversity"] = torch.tensor([diversity(images[i * n : i * n + n]) for i in range(len(prompts))])
    return means, images[:GRID_IMAGES]


# ================================================================ what a run prints and logs


def describe(args, model, per_round, held_out, folder, prompts, switch):
    """The checked, derived settings, printed before the run starts.
    per_round: number of prompts; held_out, prompts: lists; switch: a timestep, or None."""
    rules = {"topk": f"{args.top_k} best of {args.samples}", "preference": "better of two"}
    kl = "estimated in every round"
    if args.rule in RANKING:  # then it does not depend on the rewards
        group, best = (args.samples, args.top_k) if args.rule == "topk" else (2, 1)
        kl = f"{implied_kl(group, best):.2f} nats if no rewards tie"
    reference = (
        "base" if args.reference == "base" or args.rounds == 1 and not args.lora else "model of the round"
    )
    guided = "" if args.guidance == 1 else ", guided loss" if args.guided_loss else ", conditional loss"
    lora = f"rank {args.lora_rank}, alpha {args.lora_alpha:g}, {args.lora_targets}"
    if args.lora:
        config = model.denoiser.peft_config["default"]
        most = " in most layers" if config.rank_pattern or config.alpha_pattern else ""
        lora = f"started from {args.lora}, rank {config.r}, alpha {config.lora_alpha:g}{most}"
    size = sum(p.numel() for p in model.lora().values())
    images, updates = args.rounds * per_round * args.samples, args.rounds * args.updates
    probed = f"{min(args.probe_prompts, len(prompts))} prompts x 2 states x {args.probe_restarts} restarts"
    if switch is None:
        switch = f"chosen by probing {probed} at each level"
    else:
        switch = f"{switch / model.train_timesteps:.9g}"
    return f"""P-GRAFT -> {folder}
  model      {args.model}, {model.prediction_type}, {args.dtype} on {args.device}{several_processes()}
  LoRA       {lora}: {size:,} parameters
  sampling   {args.rounds} rounds x {per_round} prompts x {args.samples} = {images} images, \
{args.steps} steps, guidance {args.guidance:g}, eta {args.eta:g}
  acceptance {rules.get(args.rule, args.rule)} by {args.reward}; KL(accepted || {reference}) {kl}
  switch     {switch}; trained on {args.data} noised to the levels above it
  update     {args.rounds} rounds x {args.updates} = {updates} updates x {args.batch} images, \
lr {args.lr:g}{guided}
  evaluation {len(held_out)} held-out prompts x {args.eval_samples} images, base and tuned on equal seeds"""


def sampled_row(number, args, rewards, index, scores, images, options):
    """The columns of metrics.csv about a round's sampling. InputError if nothing was accepted.

    rewards: (prompts, samples); index: (n,) the accepted ones among all samples; scores: {reward or
    statistic: (prompts x samples,)}; options: of the rule.
    """
    above = (rewards > (math.inf if args.reward_max is None else args.reward_max)).sum().item()
    if above:
        print(
            f"warning: {above} of {rewards.numel()} rewards are above --reward_max {args.reward_max:g} "
            f"(largest {rewards.max():.4g}) and count as equal to it; give the reward's true upper bound",
            file=sys.stderr,
        )
    group = 2 if args.rule == "preference" else args.samples  # the samples among which a rule ranks
    groups = rewards.view(len(rewards), -1, group)  # (prompts, groups, group)
    flat = ((groups.amax(2) == groups.amin(2)) & (args.rule in RANKING)).double().mean().item()
    if len(index) == 0:
        advice = "raise --samples or take another reward" + ", or lower --threshold" * (
            args.rule == "threshold"
        )
        raise InputError(
            f"--rule {args.rule} accepted nothing: {flat:.0%} of the groups had equal rewards, the best "
            f"reward was {rewards.max():.4g}; {advice}"
        )
    spread = [diversity(images[i : i + args.samples]) for i in range(0, len(images), args.samples)]
    return {
        "round": number,
        "reward_sampled": rewards.mean().item(),
        "reward_accepted": rewards.flatten()[index].mean().item(),
        "acceptance_rate": len(index) / rewards.numel(),
        "flat_groups": flat,
        "kl": estimated_kl(rewards, args.rule, **options),
        "diversity": sum(spread) / len(spread),
    } | {name: values.mean().item() for name, values in scores.items() if name != args.reward}


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
    save_panels(folder / "probe.png", [("level t / T (1: noise)", f"V(t) of {args.reward}", lines)])
    print("\n  step  timestep  --switch   V(t)   s.e.   (V: share of the reward's variance not yet decided)")
    for row in rows:
        print("  {step:4d}  {timestep:8.0f}  {switch:8.3f}  {unresolved:5.2f}  {se:5.2f}".format(**row))
    print(f"  recommended: --switch {switch:.9g}, {reason}", flush=True)


def save_switch(folder, model, timestep, args):
    """pgraft.json: what must travel with the LoRA.
    The switch is a training timestep, valid for any number of steps."""
    alpha, sigma = model.alpha_sigma(timestep)
    content = {
        "switch_timestep": timestep,
        "switch": timestep / model.train_timesteps,
        "alpha": alpha,
        "sigma": sigma,
    }
    content["rule"] = (
        "the LoRA is on in the steps that start at a timestep above switch_timestep, off in the others"
    )
    content |= {"model": args.model, "prediction_type": model.prediction_type}
    content["scheduler"] = dict(model.pipeline.scheduler.config)
    content |= {name: getattr(args, name) for name in ("steps", "guidance", "eta", "data")}
    write_json(folder / SWITCH_FILE, content)


def usage_code(model, folder, prompt, args):
    """Python that makes the evaluation's first image with the tuned model in stock diffusers."""
    folder = folder.resolve()
    return f"""import json; {stock_code(model)}
pipe.load_lora_weights({str(folder)!r})
switch = json.load(open({str(folder / SWITCH_FILE)!r}))["switch_timestep"]

{stock_switch("switch")}
{stock_call(model, prompt, args, ", callback_on_step_end=base_from_the_switch_on")}"""


# ================================================================ the run


def prepare(args):
    """Check all that needs no diffusion model, then load the rewards that are models. Returns (args without
    gaps, training prompts, held-out prompts, rewards, hashes of what the run reads): rewards[0] is optimised,
    all are reported."""
    check_output(args.output, args.resume)
    lora_folder = check_start(args)
    args = with_family_defaults(args, eta=ETA)
    args.device = check_device(args.device, args.dtype)
    if args.dtype == "float16" and args.batch < SIZE:  # every process must scale a loss
        raise InputError(f"--batch {args.batch}: with float16 at least one for each of the {SIZE} processes")
    rewards = read_rewards(args.reward, args.eval_rewards)
    inputs = [args.model, args.model_config, *prompt_files(args.prompts, args.eval_prompts)]
    inputs += [find_lora(args.lora, "--lora"), lora_folder / SWITCH_FILE] if args.lora else []
    inputs = check_inputs(args.resume, [*inputs, *(file for reward in rewards for file in reward.files())])
    prompts, held_out = read_prompt_sets(args.prompts, args.eval_prompts)
    for reward in rewards:
        reward.check_prompts(prompts, "--prompts")
        reward.check_prompts(held_out, "--eval_prompts")
    for reward in rewards:
        reward.load(args.reward_device, args.reward_dtype, args.reward_batch)
    return args, prompts, held_out, rewards, inputs


def main(args):
    args, prompts, held_out, rewards, inputs = prepare(args)
    model = load_model(args)
    grid = model.timesteps(args.steps)
    # a timestep; None: the probe will say
    switch = None if args.switch == "auto" else float(args.switch) * model.train_timesteps
    source = f"--switch {args.switch}"
    if file := own_switch(args):
        switch = read_switch(file.parent, "a --switch", model)
        source = f"{file}, switch {switch / model.train_timesteps:.9g}"
    if switch is not None and not 0 < switch_step(grid, switch) < args.steps:
        low, high = (f"{t / model.train_timesteps:.9g}" for t in (grid[-1], grid[0]))
        raise InputError(f"{source}: with --steps {args.steps} it must be at least {low} and below {high}")
    if args.lora:
        parameters = model.load_lora(args.lora)
    else:
        parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    if args.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    # the indices of each round's prompts
    schedule = schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    folder = make_run_folder(args, "pgraft", args.model, args.seed, inputs)
    print(describe(args, model, len(schedule[0]), held_out, folder, prompts, switch), flush=True)

    # every prompt's text is computed once, in an order that does not depend on where a run was resumed
    texts = [*held_out, *(prompts[i] for i in sorted({i for ids in schedule for i in ids}))]
    model.warn_of_cut(texts)
    model.remember(["", *texts])
    # state: {round, rows, losses, accepted, seconds, tuned}; save() stores it with LoRA, optimiser and scaler
    state, save = restore(args, folder, model, optimizer, scaler)
    run_start = time.perf_counter() - state["seconds"]

    # ------------------------------------------------------------ PROBE
    if args.probe or switch is None:
        if "probe" not in state:
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "probe"))
            order = torch.randperm(len(prompts), generator=generator)
            with model.lora_off():
                chosen = [prompts[i] for i in order[: args.probe_prompts]]
                state["probe"] = probe(model, rewards[0], chosen, args)
            save()
        switch, reason = recommend(state["probe"], args.probe_limit)
        show_probe(folder, state["probe"], args, switch / model.train_timesteps, reason)
        if args.probe:
            print(f"\nIn {folder}: probe.csv, probe.png")
            return
    switch_at = switch_step(grid, switch)  # steps of the tuned model
    switch = grid[switch_at]  # the level of the states, and what is stored
    level_s = model.alpha_sigma(switch) if args.data == "xs" else (1.0, 0.0)  # (alpha_s, sigma_s) of the data
    print(
        f"  tuned model for {switch_at} of {args.steps} steps, base model from timestep {switch:g} on",
        flush=True,
    )

    # ------------------------------------------------------------ BASELINE
    base, base_images = evaluate(model, rewards, held_out, args, switch_at, False, "evaluate base")
    print(f"  base       held-out {args.reward} {base[args.reward].mean():.3f}", flush=True)

    for r in range(state["round"], args.rounds):
        speed = ""
        if len(state["accepted"]) == r:  # not so if the run was stopped after it had accepted
            # ---------------------------------------------------- SAMPLE, SCORE
            start, label = time.perf_counter(), f"sample {r + 1}"
            ids = torch.tensor(schedule[r]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
            seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
            image_prompts = [prompts[i] for i in ids]
            # a new LoRA does nothing in round 1
            tuned = args.reference == "newest" and (r > 0 or args.lora != "")
            (x_s, x_0), scores, images = sample_and_score(
                model, rewards[:1], image_prompts, seeds, args, switch_at, tuned, label
            )
            speed = f"{len(seeds) / (time.perf_counter() - start):.0f} images/s, "
            reward = scores[args.reward].view(-1, args.samples)  # (prompts, samples)

            # ---------------------------------------------------- ACCEPT
            options = {"top_k": args.top_k, "threshold": args.threshold}
            options |= {"beta": args.beta, "reward_max": args.reward_max}
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "accept", r))
            mask = accept(reward, args.rule, **options, generator=generator)  # (prompts, samples)
            index = mask.flatten().nonzero().squeeze(1)  # (accepted,)
            accepted = {"x_s": x_s[index], "x_0": x_0[index], "prompt": ids[index]}
            state["accepted"].append(accepted | {"reward": reward.flatten()[index]})
            state["rows"].append(sampled_row(r + 1, args, reward, index, scores, images, options))
            if args.save_accepted:
                save_accepted(folder, model, x_0[index], state["accepted"], prompts, args.sample_batch)
            save()

        # -------------------------------------------------------- UPDATE
        kept = state["accepted"] if args.accumulate else state["accepted"][-1:]
        data = torch.cat([a["x_s" if args.data == "xs" else "x_0"] for a in kept])  # (n, c, h, w)
        data_prompts = torch.cat([a["prompt"] for a in kept])  # (n,) indices of prompts
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        losses = []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            x_s = data[index].to(args.device)  # (batch, c, h, w), at level_s; with --data x0 the clean x_0
            noise = torch.randn(x_s.shape, generator=generator).to(args.device)
            # (batch,) uniform; for a flow logit-normal
            t = model.draw_timesteps(args.batch, generator, switch).to(args.device)
            drop = torch.rand(args.batch, generator=generator) < args.prompt_dropout  # (batch,)
            text = model.encode(["" if d else prompts[i] for d, i in zip(drop, data_prompts[index])])
            losses.append(0.0)
            own = own_share(torch.arange(args.batch))  # of this process, under torchrun
            for i in range(0, len(own), args.micro_batch):
                part = own[i : i + args.micro_batch]  # (micro_batch,)
                with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32"):
                    guidance = args.guidance if args.guided_loss else 1
                    loss = denoising_loss(
                        model, x_s[part], level_s, text[part], t[part], noise[part], guidance
                    )
                scaler.scale(loss * len(part) / args.batch).backward()
                losses[-1] += loss.item() * len(part) / args.batch
            losses[-1] = sum_gradients(parameters, losses[-1])
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            check_finite(f"round {r + 1}, update {update + 1}", losses[-1], norm, scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = state["rows"][-1]
        row |= {"images_trained_on": len(data), "loss": sum(losses) / len(losses)}
        row["reward_held_out"] = math.nan  # of a round without evaluation
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            label = f"evaluate {r + 1}"
            state["tuned"], tuned_images = evaluate(model, rewards, held_out, args, switch_at, True, label)
            row["reward_held_out"] = state["tuned"][args.reward].mean().item()
        state["losses"] += losses
        state["round"] = r + 1
        save_switch(folder, model, switch, args)
        model.save_lora(folder)
        log_metrics(folder, state["rows"], state["round"], time.perf_counter() - run_start)
        if not math.isnan(row["reward_held_out"]):
            save_grid(folder / "grid.png", base_images, tuned_images, held_out, args.eval_samples)
        base_reward = base[args.reward].mean().item()
        save_curves(folder / "curves.png", state["rows"], state["losses"], base_reward, args.reward)
        save()
        print_round(state, args.rounds, speed)

    # ------------------------------------------------------------ SHOW
    extra = {
        "steps": args.steps,
        "switch_at": switch_at,
        "switch_timestep": switch,
        "probe": state.get("probe"),
    }
    write_results(folder, base, state["tuned"], args.reward, state["seconds"], **extra)
    files = "the LoRA, pgraft.json, results.json, metrics.csv, grid.png, curves.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {files}. To use it:\n")
    print(usage_code(model, folder, held_out[0], args))


if __name__ == "__main__":
    run_script(main, Args, shared=True)
