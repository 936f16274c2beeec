"""GRAFT (generalised rejection sampling fine-tuning): sample, score, accept by a rule, fine-tune.

Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.
Run: python graft.py

Notation
    x_t = alpha_t x_0 + sigma_t eps:  alpha_t^2 + sigma_t^2 = 1;  of flows (SD 3, FLUX)  alpha_t + sigma_t = 1
    c the prompt; p the model that is sampled; r(x, c) the reward
    M samples x_i a prompt; a rule accepts x_i with probability A_i, which does not decrease with r(x_i, c)
    and may depend on the other samples; X and A: one sample and its acceptance probability
Equations
    (1) accepted samples follow  argmax_q  E_q[rhat] - KL(q || p),  rhat(x) = log E[A | X = x].
        No KL weight is set: the rule itself decides how far q moves from p
    (2) K best of M:  rhat = log sum_{j<K} C(M-1, j) U^(M-1-j) (1-U)^j,  U = P(r(X') <= r(x)),  X' ~ p,
        ties broken at random
    (3) KL(accepted || p) = integral_0^1 f log f du,  f = (M/K) exp(rhat);
        K = 1: log M - (M-1)/M;  better of a pair: M = 2
    (4) loss  E |prediction(x_t, t, c) - target|^2,
        target eps, or v = alpha_t eps - sigma_t x_0, or of a flow eps - x_0
    (5) step to the next level ('):  x' = alpha' x_0 + sqrt(sigma'^2 - std^2) eps + std w,
        std = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2),  w ~ N(0, I),
        x_0 and eps as predicted. This is DDIM; for a flow with eta 0 it is Euler's step
Choices that the paper leaves open
    A LoRA is tuned; it and AdamW's state go on from round to round. Rules that rank skip groups whose rewards
    are all equal; where that happens, (2) and (3) no longer hold exactly. By default later rounds sample the
    tuned model (--reference) and train on what all rounds accepted (--accumulate). With --guidance > 1 the
    loss is on the guided prediction, because that is what samples (docs/models.md, "Guidance").
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
    schedule_prompts,
    stock_call,
    stock_code,
    with_family_defaults,
)
from rewards import diversity, image_statistics, read_rewards, score
from utils.figures import GRID_IMAGES, save_curves, save_grid, shrink
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
    write_results,
)

Rule = Literal["topk", "preference", "exponential", "threshold", "none"]
RANKING = ("topk", "preference")  # rules for which only the order of the rewards counts


@dataclass
class Args:
    """GRAFT: sample, score, accept by a rule, fine-tune a LoRA on what was accepted."""

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
    eta: Annotated[float | None, by_family("eta")] = None  # 0: deterministic; 1: as random as DDPM
    sample_batch: Annotated[int | None, by_family("sample_batch")] = None  # images sampled at a time

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


def training_target(x_0, noise, alpha_t, sigma_t, prediction_type):
    """(x_t, target) of the denoising loss, equation (4). x_0, noise: (batch, ...); alpha_t, sigma_t:
    (batch,). prediction_type: "epsilon", "v_prediction" or "flow"."""
    alpha_t, sigma_t = (level.view(-1, *[1] * (x_0.dim() - 1)) for level in (alpha_t, sigma_t))
    x_t = alpha_t * x_0 + sigma_t * noise
    targets = {"epsilon": noise, "v_prediction": alpha_t * noise - sigma_t * x_0, "flow": noise - x_0}
    return x_t, targets[prediction_type]


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
def sample(model, noise, text, guidance, eta):
    """Equation (5). noise: (steps + 1, batch, c, h, w) -> clean latents x_0 (batch, c, h, w), float32.

    DDIM is arXiv 2010.02502, equation 12. Of a flow, small steps with eta are the SDE of Flow-GRPO (arXiv
    2505.05470) with a = sqrt(2) eta, which keeps the flow's marginals. Flow-GRPO's own Euler-Maruyama step is
    infinite at sigma = 1; where x_0 is certain it leaves more noise than the level has.
    """
    noise = noise.to(model.device, torch.float32)
    grid = model.timesteps(len(noise) - 1)
    times = torch.tensor(grid, device=model.device)  # one transfer, none inside the loop
    x = noise[0]
    for k, t in enumerate(grid):
        alpha, sigma = model.alpha_sigma(t)
        alpha_next, sigma_next = model.alpha_sigma(grid[k + 1] if k + 1 < len(grid) else -1)
        prediction = guided_prediction(model, x, times[k], text, guidance)
        if model.prediction_type == "epsilon":
            x_0, eps = (x - sigma * prediction) / alpha, prediction
        elif model.prediction_type == "v_prediction":  # v = alpha eps - sigma x_0
            x_0, eps = alpha * x - sigma * prediction, alpha * prediction + sigma * x
        else:  # a flow's velocity eps - x_0
            x_0, eps = x - sigma * prediction, x + alpha * prediction
        std = eta * sigma_next / sigma * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))
        x = alpha_next * x_0 + math.sqrt(max(sigma_next**2 - std**2, 0)) * eps + std * noise[k + 1]
    return x


def sample_and_score(model, rewards, prompts, seeds, args, label):
    """Images of the prompts (n) with the seeds (n), a batch at a time.
    Returns latents (n, c, h, w), {reward or statistic: (n,)}, and the images, most of them shrunk."""
    latents, scores, images = [], [], []
    starts = own_share(range(0, len(prompts), args.sample_batch))  # of this process, under torchrun
    for i in tqdm(starts, desc=label, unit="batch", leave=False, mininterval=1):
        batch = slice(i, i + args.sample_batch)
        # (steps + 1, batch, c, h, w)
        noise = draw_noise(seeds[batch], args.steps, model.latent_shape, model.dtype)
        x_0 = sample(model, noise, model.encode(prompts[batch]), args.guidance, args.eta)
        batch_images = model.decode(x_0, label)
        latents.append(x_0.cpu())
        scores.append(score(rewards, batch_images, prompts[batch]) | image_statistics(batch_images))
        images.append(shrink(batch_images, i))
    latents, scores, images = gather(latents), gather(scores), gather(images)  # of all batches, in order
    scores = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    return torch.cat(latents), scores, [image for batch in images for image in batch]


# ================================================================ loss


def denoising_loss(model, x_0, text, t, noise, guidance):
    """Equation (4), mean over everything.
    x_0, noise: (batch, c, h, w), text: (batch, rows, width), t: (batch,)."""
    alpha, sigma = model.alpha_sigma(t)
    x_t, target = training_target(x_0, noise, alpha, sigma, model.prediction_type)
    return (guided_prediction(model, x_t, t, text, guidance) - target).square().mean()


# ================================================================ evaluation


def evaluate(model, rewards, prompts, args, label):
    """Fixed prompts x fixed seeds.
    Returns ({metric: (prompts,), the mean over a prompt's images}, images of grid.png)."""
    n = args.eval_samples
    seeds = [derived_seed("eval", i, j) for i in range(len(prompts)) for j in range(n)]
    repeated = [p for p in prompts for _ in range(n)]
    _, scores, images = sample_and_score(model, rewards, repeated, seeds, args, label)
    means = {name: values.view(-1, n).mean(1) for name, values in scores.items()}
    means["diversity"] = torch.tensor([diversity(images[i * n : i * n + n]) for i in range(len(prompts))])
    return means, images[:GRID_IMAGES]


# ================================================================ what a run prints and logs


def describe(args, model, per_round, held_out, folder):
    """The checked, derived settings, printed before the run. per_round: number of prompts; held_out: list."""
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
    return f"""GRAFT -> {folder}
  model      {args.model}, {model.prediction_type}, {args.dtype} on {args.device}{several_processes()}
  LoRA       {lora}: {size:,} parameters
  sampling   {args.rounds} rounds x {per_round} prompts x {args.samples} = {images} images, \
{args.steps} steps, guidance {args.guidance:g}, eta {args.eta:g}
  acceptance {rules.get(args.rule, args.rule)} by {args.reward}; KL(accepted || {reference}) {kl}
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


# ================================================================ the run


def prepare(args):
    """Check all that needs no diffusion model, then load the rewards that are models. Returns (args without
    gaps, training prompts, held-out prompts, rewards, hashes of what the run reads): rewards[0] is optimised,
    all are reported."""
    check_output(args.output, args.resume)
    lora_folder = check_start(args)
    if lora_folder and (lora_folder / SWITCH_FILE).is_file():
        raise InputError(
            f"--lora {args.lora}: is of pgraft.py, for the levels above its switch; go on with pgraft.py"
        )
    args = with_family_defaults(args)
    args.device = check_device(args.device, args.dtype)
    if args.dtype == "float16" and args.batch < SIZE:  # every process must scale a loss
        raise InputError(f"--batch {args.batch}: with float16 at least one for each of the {SIZE} processes")
    rewards = read_rewards(args.reward, args.eval_rewards)
    inputs = [args.model, args.model_config, *prompt_files(args.prompts, args.eval_prompts)]
    inputs += [find_lora(args.lora, "--lora")] if args.lora else []
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
    # the indices of each round's prompts
    schedule = schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    model = load_model(args)
    model.timesteps(args.steps)  # only to refuse numbers of steps that the sampler cannot take
    if args.lora:
        parameters = model.load_lora(args.lora)
    else:
        parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    if args.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    folder = make_run_folder(args, "graft", args.model, args.seed, inputs)
    print(describe(args, model, len(schedule[0]), held_out, folder), flush=True)

    # every prompt's text is computed once, in an order that does not depend on where a run was resumed
    texts = [*held_out, *(prompts[i] for i in sorted({i for ids in schedule for i in ids}))]
    model.warn_of_cut(texts)
    model.remember(["", *texts])
    # state: {round, rows, losses, accepted, seconds, tuned}; save() stores it with LoRA, optimiser and scaler
    state, save = restore(args, folder, model, optimizer, scaler)
    run_start = time.perf_counter() - state["seconds"]

    # ------------------------------------------------------------ BASELINE
    with model.lora_off():
        base, base_images = evaluate(model, rewards, held_out, args, "evaluate base")
    print(f"  base       held-out {args.reward} {base[args.reward].mean():.3f}", flush=True)

    for r in range(state["round"], args.rounds):
        speed = ""
        if len(state["accepted"]) == r:  # not so if the run was stopped after it had accepted
            # ---------------------------------------------------- SAMPLE, SCORE
            start, label = time.perf_counter(), f"sample {r + 1}"
            ids = torch.tensor(schedule[r]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
            seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
            image_prompts = [prompts[i] for i in ids]
            with model.lora_off() if args.reference == "base" else model.lora_merged():
                latents, scores, images = sample_and_score(
                    model, rewards[:1], image_prompts, seeds, args, label
                )
            speed = f"{len(seeds) / (time.perf_counter() - start):.0f} images/s, "
            reward = scores[args.reward].view(-1, args.samples)  # (prompts, samples)

            # ---------------------------------------------------- ACCEPT
            options = {"top_k": args.top_k, "threshold": args.threshold}
            options |= {"beta": args.beta, "reward_max": args.reward_max}
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "accept", r))
            mask = accept(reward, args.rule, **options, generator=generator)  # (prompts, samples)
            index = mask.flatten().nonzero().squeeze(1)  # (accepted,)
            accepted = {"latents": latents[index], "prompt": ids[index], "sample": index % args.samples}
            state["accepted"].append(accepted | {"reward": reward.flatten()[index]})
            state["rows"].append(sampled_row(r + 1, args, reward, index, scores, images, options))
            if args.save_accepted:
                save_accepted(folder, model, latents[index], state["accepted"], prompts, args.sample_batch)
            save()

        # -------------------------------------------------------- UPDATE
        kept = state["accepted"] if args.accumulate else state["accepted"][-1:]
        data = torch.cat([a["latents"] for a in kept])  # (n, c, h, w)
        data_prompts = torch.cat([a["prompt"] for a in kept])  # (n,) indices of prompts
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        losses = []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            x_0 = data[index].to(args.device)  # (batch, c, h, w)
            noise = torch.randn(x_0.shape, generator=generator).to(args.device)
            # (batch,) uniform; for a flow logit-normal
            t = model.draw_timesteps(args.batch, generator).to(args.device)
            drop = torch.rand(args.batch, generator=generator) < args.prompt_dropout  # (batch,)
            text = model.encode(["" if d else prompts[i] for d, i in zip(drop, data_prompts[index])])
            losses.append(0.0)
            own = own_share(torch.arange(args.batch))  # of this process, under torchrun
            for i in range(0, len(own), args.micro_batch):
                part = own[i : i + args.micro_batch]  # (micro_batch,)
                with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32"):
                    guidance = args.guidance if args.guided_loss else 1
                    loss = denoising_loss(model, x_0[part], text[part], t[part], noise[part], guidance)
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
            with model.lora_merged():
                state["tuned"], tuned_images = evaluate(model, rewards, held_out, args, f"evaluate {r + 1}")
            row["reward_held_out"] = state["tuned"][args.reward].mean().item()
        state["losses"] += losses
        state["round"] = r + 1
        model.save_lora(folder)
        log_metrics(folder, state["rows"], state["round"], time.perf_counter() - run_start)
        if not math.isnan(row["reward_held_out"]):
            save_grid(folder / "grid.png", base_images, tuned_images, held_out, args.eval_samples)
        base_reward = base[args.reward].mean().item()
        save_curves(folder / "curves.png", state["rows"], state["losses"], base_reward, args.reward)
        save()
        print_round(state, args.rounds, speed)

    # ------------------------------------------------------------ SHOW
    write_results(folder, base, state["tuned"], args.reward, state["seconds"])
    files = "the LoRA, results.json, metrics.csv, grid.png, curves.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {files}. To use it:\n")
    print(f"""{stock_code(model)}
pipe.load_lora_weights({str(folder.resolve())!r})
{stock_call(model, held_out[0], args)}""")


if __name__ == "__main__":
    run_script(main, Args, shared=True)
