"""P-GRAFT (partial GRAFT): score the finished picture, accept the noisy state it came from, tune the model for the noisier levels.
Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.   Run: python pgraft.py

Notation  x_t = alpha_t x_0 + sigma_t eps, alpha_t^2 + sigma_t^2 = 1 (of a flow, as SD 3: alpha_t + sigma_t = 1); c the prompt;
          p the model that is sampled; r(x, c) the reward; M samples a prompt, of which a rule accepts some: sample i with
          probability A(x_i), non-decreasing in r;
          s the switch: the tuned model denoises the levels t > s, the base model the rest.
Equations (1) accepted states follow  argmax_q  E_q[rhat] - KL(q || p), laws of x_s,  with  rhat(x_s) = log E[A | X_s = x_s]
          (2) (3)  as in graft.py: rhat and KL(accepted || p) of K best of M; of the states x_s the KL is at most that of the pictures
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

import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import rewards as run  # rewards.py: besides the rewards, arguments, run folder, tables, pictures
from common import DTYPES, ROOT, InputError, Model, derived_seed, draw_noise
from rewards import average_hash, diversity, image_statistics, score


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


def accept(rewards, rule, *, top_k=1, threshold=None, beta=None, reward_max=None, accept_flat=True, keys=None, generator=None):
    """Which samples a rule accepts. rewards: (prompts, samples) -> bool mask of the same shape.

    "topk": the top_k best of each row. "preference": the better of each consecutive pair. Both break ties at random; without
    `accept_flat` they accept nothing of a row or pair whose rewards are all equal, nor are these duplicates of others.
    "exponential": each with probability exp((r - reward_max) / beta); reward_max is the reward's known upper bound, without
    one the row's maximum. "threshold": r >= threshold. "none": all. keys: integer ids, same shape; of the accepted samples of
    a row that share a key one is kept (the best; ties at random). ValueError for a rule without its parameter.
    Source: arXiv 2510.02692, generalised rejection sampling; equations (1) and (2).
    """
    samples = rewards.shape[1]
    chance = torch.rand(rewards.shape, generator=generator).to(rewards.device)  # breaks ties, and is exponential's coin
    if rule in ("topk", "preference"):
        size, best = (samples, top_k) if rule == "topk" else (2, 1)  # the best of every `size` samples
        if samples % size or not 1 <= best <= size:
            raise ValueError(f"{rule} cannot take the {best} best of {size} from {samples} samples")
        groups = rewards.reshape(-1, size)  # (groups, size)
        mask = _rank(groups, chance.reshape(-1, size)) < best
        mask = (mask & ((groups != groups[:, :1]).any(1, keepdim=True) | accept_flat)).reshape(rewards.shape)
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
        raise ValueError(f"rule {rule!r} must be topk, preference, exponential, threshold or none")
    if keys is not None:
        rank = _rank(rewards, torch.rand(rewards.shape, generator=generator).to(rewards.device))
        same = keys[:, :, None] == keys[:, None, :]  # (prompts, samples, samples)
        # [p, i, j]: j is accepted, has i's key and ranks before i
        better = mask[:, None, :] & same & (rank[:, None, :] < rank[:, :, None])
        mask = mask & ~better.any(2)
    return mask


def _rank(rewards, chance):
    """Place of each entry in its row, 0 the largest; ties in the order of `chance`. (rows, n) -> integer (rows, n)."""
    order = chance.argsort(1)
    order = order.gather(1, torch.argsort(rewards.gather(1, order), dim=1, descending=True, stable=True))
    return order.argsort(1)


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
    """How many steps the tuned model takes: those that start above the switch, the base model the others. timesteps: falling."""
    return sum(t > switch_timestep for t in timesteps)


# ================================================================ sampling


def guided_prediction(model, x, t, text, guidance):
    """The prediction that samples: unconditional + guidance * (conditional - unconditional). x: (batch, c, h, w), t: ()
    or (batch,), text: (batch, rows, width)."""
    if guidance == 1:
        return model.predict(x, t, text)
    text = torch.cat([model.empty.expand_as(text), text])  # (2 batch, rows, width)
    unconditional, conditional = model.predict(x.repeat(2, 1, 1, 1), t.expand(len(x)).repeat(2), text).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def denoise(model, x, levels, noise, text, guidance, eta):
    """Equation (8) along levels, falling timesteps of which -1 is the clean one. x: (batch, c, h, w) at levels[0],
    noise: (len(levels) - 1, batch, c, h, w) -> x at levels[-1], float32.

    DDIM is arXiv 2010.02502, equation 12. Of a flow, small steps with eta are the SDE of Flow-GRPO (arXiv 2505.05470) with
    a = sqrt(2) eta, which keeps the flow's marginals; its own step leaves noise behind, see graft.sample and the README.
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
    {reward or statistic: (n,)}, and the pictures, all but the first run.SHOWN at most 64 x 64 pixels."""
    latents, scores, pictures = [], [], []
    for i in tqdm(range(0, len(prompts), args.sample_batch), desc=label, unit="batch", leave=False, mininterval=1):
        part = slice(i, i + args.sample_batch)
        noise = draw_noise(seeds[part], args.steps, model.latent_shape, model.dtype)  # (steps + 1, batch, c, h, w)
        x_s, x_0 = sample(model, noise, model.encode(prompts[part]), args.guidance, args.eta, switch_at, tuned)
        images = model.decode(x_0, label)
        latents.append((x_s.cpu(), x_0.cpu()))
        scores.append(score(rewards, images, prompts[part]) | image_statistics(images))
        pictures += run.shrunk(images, i)
    scores = {name: torch.cat([s[name] for s in scores]) for name in scores[0]}
    return [torch.cat(part) for part in zip(*latents)], scores, pictures


def probe(model, reward, prompts, args):
    """V(t), equation (7), of the base model (the caller's lora_off) at up to nine levels between noise and picture. Two
    trajectories a prompt are followed; at each level the sampler is started again from their states, with fresh noise.
    Returns rows {step, timestep, switch, unresolved (V), se (its standard error)}."""
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
    for step, values in zip(steps, rewards.view(len(steps), args.probe_restarts, -1, 2)):  # (restarts, prompts, states)
        share, se = unresolved_share(values.permute(1, 2, 0))
        level = {"step": step, "timestep": levels[step], "switch": levels[step] / model.train_timesteps}
        rows.append(level | {"unresolved": share, "se": se})
    return rows


# ================================================================ loss, evaluation


def denoising_loss(model, x_s, level_s, text, t, noise, guidance):
    """Equation (4), mean over everything. x_s, noise: (batch, c, h, w) at level_s = (alpha_s, sigma_s), text: (batch, rows,
    width), t: (batch,) above that level."""
    x_t, target, weight = shaped_target(x_s, noise, *level_s, *model.alpha_sigma(t), model.prediction_type)
    return (weight * (guided_prediction(model, x_t, t, text, guidance) - target).square()).mean()


def evaluate(model, rewards, prompts, args, switch_at, tuned, label):
    """Fixed prompts x fixed seeds. Returns ({metric: (prompts,), the mean over a prompt's pictures}, the pictures of grid.png)."""
    n = args.eval_samples
    seeds = [derived_seed("eval", i, j) for i in range(len(prompts)) for j in range(n)]
    repeated = [p for p in prompts for _ in range(n)]
    _, scores, pictures = sample_and_score(model, rewards, repeated, seeds, args, switch_at, tuned, label)
    means = {name: values.view(-1, n).mean(1) for name, values in scores.items()}
    means["diversity"] = torch.tensor([diversity(pictures[i * n : i * n + n]) for i in range(len(prompts))])
    return means, pictures[: run.SHOWN]


# ================================================================ the run


def main(args):
    # eta: of the embedded model, SD 1.x and 2.x, SD XL, SD 3; the probe of a flow needs some
    run.complete(args, {"eta": (1.0, 1.0, 1.0, 0.5)}, choices={"data": ("x0", "xs")})
    run.check_switch(args)
    prompts, held_out, rewards = run.read_task(args)  # rewards[0] is optimised, all are reported
    model = Model(args.model, args.device, DTYPES[args.dtype], args.t5)
    grid = model.timesteps(args.steps)
    switch = None if args.switch == "auto" else float(args.switch) * model.train_timesteps  # a timestep; None: the probe says
    if args.evaluate:  # no training, any number of steps
        level = switch or run.read_switch(args.evaluate, "the level with --switch", model)
        at = switch_step(grid, level)
        return run.evaluate_saved(
            args, model, held_out, level, at, lambda *how: evaluate(model, rewards, held_out, args, at, *how)
        )
    if switch is not None and not 0 < switch_step(grid, switch) < args.steps:
        low, high = (f"{t / model.train_timesteps:g}" for t in (grid[-1], grid[0]))
        raise InputError(f"--switch {args.switch}: with --steps {args.steps} it must be at least {low} and below {high}")
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    if args.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    optimizer = run.make_adamw(parameters, args.lr, args.optimizer_8bit)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    schedule = run.schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    folder = run.make_run_folder(args, "pgraft", args.model, args.seed)
    more = run.describe_switch(args, len(prompts))
    print(run.describe(f"P-GRAFT -> {folder}", args, model, len(schedule[0]), held_out, more), flush=True)

    # every prompt's text is computed once, in an order that does not depend on where a run was resumed
    model.remember(["", *held_out, *(prompts[i] for i in sorted({i for part in schedule for i in part}))])
    # state: {round, rows, losses, accepted, seconds}, new or as stored; save() stores it with the LoRA, the optimiser and the scaler
    state, save = run.restore(args, folder, model, optimizer, scaler)

    # ------------------------------------------------------------ PROBE
    if args.probe or switch is None:
        if "probe" not in state:
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(derived_seed(args.seed, "probe")))
            with model.lora_off():
                state["probe"] = probe(model, rewards[0], [prompts[i] for i in order[: args.probe_prompts]], args)
            save()
        switch, reason = run.recommend(state["probe"], args.probe_limit)  # noisiest level with V(t) + s.e. at most the limit
        run.show_probe(folder, state["probe"], args, switch / model.train_timesteps, reason)
        if args.probe:
            print(f"\nIn {folder}: probe.csv, probe.png")
            return
    switch_at = switch_step(grid, switch)  # steps of the tuned model
    switch = grid[switch_at]  # the level of the states, and what is stored
    level_s = model.alpha_sigma(switch) if args.data == "xs" else (1.0, 0.0)  # (alpha_s, sigma_s) of the data
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
            reward = scores[args.reward].view(-1, args.samples)  # (prompts, samples)

            # ---------------------------------------------------- ACCEPT
            options = {"top_k": args.top_k, "threshold": args.threshold, "beta": args.beta, "reward_max": args.reward_max}
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "accept", r))
            keys = average_hash(pictures).view(-1, args.samples) if args.dedup else None
            mask = accept(reward, args.rule, **options, accept_flat=args.accept_flat, keys=keys, generator=generator)
            index = mask.flatten().nonzero().squeeze(1)  # (accepted,)
            state["accepted"].append(
                {"x_s": x_s[index], "x_0": x_0[index], "prompt": ids[index], "reward": reward.flatten()[index]}
            )
            state["rows"].append(run.sampled_row(r + 1, args, reward, index, scores, pictures))  # refuses an empty index
            if args.save_accepted:
                run.save_accepted(folder / "accepted", model, x_0[index], state["accepted"], prompts, args.sample_batch)
            save()

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
            t = model.draw_timesteps(args.batch, generator, switch).to(args.device)  # (batch,) uniform; of a flow logit-normal
            drop = torch.rand(args.batch, generator=generator) < args.prompt_dropout  # (batch,)
            text = model.encode(["" if d else prompts[i] for d, i in zip(drop, ids_kept[index])])  # (batch, rows, width)
            losses.append(0.0)
            for part in torch.arange(args.batch).split(args.micro_batch):  # (micro_batch,)
                with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32"):
                    guidance = args.guidance if args.guided_loss else 1
                    loss = denoising_loss(model, x_s[part], level_s, text[part], t[part], noise[part], guidance)
                scaler.scale(loss * len(part) / args.batch).backward()
                losses[-1] += loss.item() * len(part) / args.batch
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            run.check_finite(f"round {r + 1}, update {update + 1}", losses[-1], norm, scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = state["rows"][-1]
        row |= {"pictures_trained_on": len(data), "loss": sum(losses) / len(losses), "reward_held_out": math.nan}
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            state["tuned"], pictures = evaluate(model, rewards, held_out, args, switch_at, True, f"evaluate {r + 1}")
            row["reward_held_out"] = state["tuned"][args.reward].mean().item()
            run.save_grid(folder / "grid.png", base_pictures, pictures, held_out, args.eval_samples)
        state["losses"] += losses
        state["round"] = r + 1
        run.save_switch(folder, model, switch, args)
        model.save_lora(folder)
        run.write_metrics(folder, state, base, args.reward)
        save()
        run.print_round(state, args.rounds, speed)

    # ------------------------------------------------------------ SHOW
    where = {"steps": args.steps, "switch_at": switch_at, "switch_timestep": switch, "probe": state.get("probe")}
    run.write_results(folder, base, state["tuned"], args.reward, state["seconds"], **where)
    files = "LoRA, pgraft.json, results.json, metrics.csv, grid.png, curves.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {files}. To use it:\n")
    print(run.pgraft_code(model, folder, None, held_out[0], args))


if __name__ == "__main__":
    run.run_script(main, Args)
