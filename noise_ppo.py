"""Noise PPO: the model stays frozen; a policy over its initial noise is learnt by PPO against a black-box reward.
Paper: "A Minimalist Method for Fine-tuning Text-to-Image Diffusion Models", arXiv 2506.12036.   Run: python noise_ppo.py

Notation  c the prompt; z the initial noise (a latent of D numbers); x(z, c) the picture, a deterministic function of both; r(x, c)
          the reward; policy pi(z | c) = N(mu(c), diag sigma(c)^2); rho = pi(z | c) / pi_old(z | c); A the advantage; eps ~ N(0, I).
Equations (1) z = mu(c) + sigma(c) eps                    at the start mu = 0, sigma = 1: exactly the standard noise
          (2) log pi(z | c) = sum or mean over D of  -((z - mu) / sigma)^2 / 2 - log sigma - log(2 pi) / 2
          (3) A = a / root mean square of a over the batch,  a = r - mean of r over the prompt's pictures
          (4) loss  -E min(rho A, clip(rho, 1 - delta, 1 + delta) A) + beta KL
          (5) KL(pi || N(0, I)) = sum over D of  (mu^2 + sigma^2 - 1 - log sigma^2) / 2
Choices that the paper leaves open: log pi and KL are both means over D (--reduction sum: both sums; the gradient at rho = 1 is the
same but for the factor D, so beta keeps its meaning, and only delta acts on another scale); steps are spaced "trailing" and divide
the training steps, so that every number of steps starts at the same noise level and the same z means the same thing (a flow's
steps always start at pure noise); the policy reads the token states, or the pooled embedding where the model has one (SD XL, SD 3);
by default only mu is learnt, which gained as much at half the KL on validation prompts (--no-mean_only: sigma too).
"""

import inspect
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

try:  # training needs these; to load and use what was learnt this file is enough
    from tqdm import tqdm

    import rewards as run  # rewards.py: besides the rewards, arguments, run folder, tables, pictures
    from common import DTYPES, InputError, Model, derived_seed, draw_noise
    from rewards import diversity, explained_variance, image_statistics, score
except ImportError:
    if __name__ == "__main__":
        raise

ROOT = Path(__file__).resolve().parent
TEMPERATURES = (0.4, 0.6, 0.8, 1.0)  # the control s eps: the best s on training prompts
DEFAULTS = {"clip": (1e-3, 1e-4, 1e-4, 1e-4)}  # of the embedded model, SD 1.x and 2.x, SD XL, SD 3
# least, most; those of settings that all scripts have stand in rewards.py
LIMITS = {"samples": (2, 10**4), "iterations": (1, 10**5), "prompts_per_iteration": (1, 10**6), "hidden": (1, 10**4)}
LIMITS |= {"minibatch": (1, 10**6), "kl_weight": (0, 1e9), "grid": (1, 10**6)}
CHOICES = {"policy": ("conditional", "unconditional"), "normalise": ("batch", "prompt", "none"), "reduction": ("mean", "sum")}


@dataclass
class Args:
    """Noise PPO: learn the initial noise of a frozen model by PPO."""

    seed: int = 0  # seed of the training run; evaluation pictures do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: str = "auto"  # auto (CUDA if there is one), cpu or cuda
    dtype: str = "float32"  # precision of the frozen model: float32, bfloat16 or float16; the policy is always float32

    model: str = str(ROOT / "shapes" / "pipeline")  # folder or hub id of a Stable Diffusion 1.x, 2.x, XL or 3.x pipeline
    t5: bool = True  # SD 3: load its third text encoder; --no-t5: 10 GB less, long prompts are read less well
    lora: str = ""  # run of graft.py or pgraft.py: the frozen model is its tuned one
    switch_timestep: float | None = None  # the LoRA is off in steps that start here or below (pgraft.json's; of graft.py none)
    prompts: str = str(ROOT / "shapes" / "prompts_train.txt")  # .txt (one a line), .csv, .tsv or .jsonl; file.csv:column
    eval_prompts: str = ""  # held-out prompts; left out: the shapes ones, or every tenth of --prompts, then not trained on
    eval_samples: int = 4  # pictures per held-out prompt
    eval_every: int = 10  # iterations between evaluations at --steps; 0: only before and after
    eval_steps: str = "4,5,10,20,40"  # numbers of steps of the final evaluation, beside --steps; to divide as --steps does
    controls: bool = True  # evaluate s eps and the policy's mean over prompts too; --no-controls: save the time

    steps: int = 4  # steps while training; must divide the training steps of SD 1.x, 2.x and XL
    guidance: float | None = None  # classifier-free guidance scale, 1 is none (1; other models 7.5; SD XL 5, SD 3 7)
    sample_batch: int | None = None  # pictures sampled at a time; no picture depends on it (64; others 8; SD XL, SD 3 4)

    reward: str | None = None  # to maximise: name of rewards.py, file.py:function, weighted sum (shapes_strict; others JPEG)
    eval_rewards: str | None = None  # rewards reported too, separated by commas (the shapes ones and JPEG; others JPEG)
    reward_device: str = "auto"  # of rewards that are models: auto (CUDA if there is one), cpu or cuda
    reward_dtype: str = "float32"  # their precision: float32, bfloat16 or float16
    reward_batch: int = 16  # pictures that they judge at a time

    iterations: int = 60  # times to sample and update
    prompts_per_iteration: int = 64  # prompts sampled in an iteration, none twice
    samples: int = 8  # pictures per prompt, whose mean reward is the baseline
    normalise: str = "batch"  # over what the root mean square that divides the advantage is taken: batch, prompt or none
    epochs: int = 2  # passes over an iteration's pictures
    minibatch: int = 256  # pictures per optimiser update
    clip: float | None = None  # delta of equation (4), in keeping with the latent's size (1e-3; other models 1e-4)
    reduction: str = "mean"  # of log-density and KL over the latent's D numbers: mean or sum
    kl_weight: float = 0.005  # beta of equation (4), advantage per nat
    lr: float = 6e-3  # AdamW learning rate, falls linearly to 0

    policy: str = "conditional"  # conditional, or unconditional: one mu and one sigma for all prompts
    mean_only: bool = True  # sigma stays 1; --no-mean_only: sigma is learnt too
    std_only: bool = False  # mu stays 0
    hidden: int = 64  # width of the policy's two layers
    grid: int = 4  # mu and log sigma are predicted on a grid x grid, enlarged bilinearly


# ================================================================ equations: tensors in, tensors out


def log_prob(z, mean, log_std, reduction):
    """log N(z; mean, diag exp(log_std)^2), equation (2). All (batch, ...) -> (batch,), nats ("sum") or nats per dimension ("mean")."""
    if reduction not in CHOICES["reduction"]:
        raise ValueError(f"reduction {reduction!r} must be mean or sum")
    each = -0.5 * ((z - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return getattr(each.flatten(1), reduction)(1)


def kl_to_standard_normal(mean, log_std):
    """KL(N(mean, diag exp(log_std)^2) || N(0, I)) in nats, equation (5). Both (batch, ...) -> (batch,)."""
    return (0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std).flatten(1).sum(1)


def ppo_loss(log_prob_new, log_prob_old, advantage, clip):
    """PPO's clipped objective (arXiv 1707.06347, equation 7), negated. All (batch,) -> scalar to minimise, the batch's mean."""
    ratio = (log_prob_new - log_prob_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def advantages(rewards, prompt_ids, normalise="batch"):
    """Equation (3). rewards, prompt_ids (any integers): (batch,) -> (batch,). Rewards that do not differ give 0, never NaN.

    normalise: what divides the centred rewards, their root mean square over the "batch" (then A has variance 1) or over the
    "prompt" (a prompt with little spread weighs as much as any), or "none".
    """
    _, place, count = prompt_ids.unique(return_inverse=True, return_counts=True)

    def prompt_mean(values):
        return (torch.zeros_like(values[: len(count)]).index_add(0, place, values) / count)[place]

    centred = rewards - prompt_mean(rewards)
    square = {"batch": centred.square().mean(), "prompt": prompt_mean(centred.square()), "none": torch.ones(())}
    return centred / square[normalise].sqrt().clamp(min=1e-6)


# ================================================================ policy


def read(model, prompts):
    """What the policy reads of prompts: the token states (n, tokens, width), or the pooled embedding (n, 1, width) of the models
    that have one, whose states are 10^5 to 10^6 numbers a prompt."""
    model.remember(prompts)
    parts = [model.split(model.encode(prompts[i : i + 64])) for i in range(0, len(prompts), 64)]
    return torch.cat([states if pooled is None else pooled[:, None] for states, pooled in parts])


class NoisePolicy(torch.nn.Module):
    """pi(z | c), equation (1), on what `read` takes from the frozen text encoders (batch, tokens, width).

    Two layers on the standardised, flattened states, then mu and log sigma on a coarse grid, enlarged bilinearly to any latent
    size. The last layer starts at zero: N(0, I) exactly. In use:  policy = NoisePolicy.load(folder, pipe);
    pipe(prompt, latents=policy.sample(prompt)), with the scheduler and the settings in noise_ppo.json.
    """

    def __init__(self, tokens, width, latent_shape, hidden=64, grid=4, policy="conditional", mean_only=False, std_only=False):
        super().__init__()
        channels, *self.size = latent_shape
        self.latent_shape = tuple(latent_shape)
        self.grid = [min(grid, side) for side in self.size]
        self.conditional, self.learn_mean, self.learn_std = policy == "conditional", not std_only, not mean_only
        self.register_buffer("centre", torch.zeros(tokens, width))
        self.register_buffer("scale", torch.ones(tokens, width))
        self.body = torch.nn.Sequential()
        for inputs in (tokens * width, hidden):
            self.body.extend([torch.nn.Linear(inputs, hidden), torch.nn.LayerNorm(hidden), torch.nn.GELU()])
        self.head = torch.nn.Linear(hidden, 2 * channels * math.prod(self.grid))
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def standardise(self, text):
        """Take centre and scale of each text state from the training prompts' (n, tokens, width): else all prompts look alike."""
        self.centre.copy_(text.float().mean(0))
        self.scale.copy_(1 / (text.float().std(0, correction=0) + 1e-2))

    def forward(self, text):
        """text: (batch, tokens, width) -> (mean, log_std), each (batch, channels, height, width), float32."""
        features = (text.float() - self.centre) * self.scale * self.conditional  # (batch, tokens, width)
        coarse = self.head(self.body(features.flatten(1))).unflatten(1, (-1, *self.grid))  # (batch, 2 channels, grid, grid)
        mean, log_std = torch.nn.functional.interpolate(coarse, self.size, mode="bilinear").chunk(2, 1)
        return mean * self.learn_mean, log_std * self.learn_std

    @torch.no_grad()
    def sample(self, prompt, generator=None):
        """Latents (n, channels, height, width) for a stock pipeline's `latents=`. prompt: string or list of n; generator: as there."""
        from diffusers.utils.torch_utils import randn_tensor

        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        more = [name for name in inspect.signature(self.pipe.encode_prompt).parameters if name in ("prompt_2", "prompt_3")]
        options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False} | dict.fromkeys(more)
        states, _, *pooled = self.pipe.encode_prompt(prompt=prompts, device=self.pipe.device, **options)
        text = pooled[0][:, None] if pooled else states
        eps = randn_tensor((len(prompts), *self.latent_shape), generator, self.pipe.device, text.dtype)
        mean, log_std = self(text)
        return (mean + log_std.exp() * eps).to(text.dtype)

    def save(self, folder, settings):
        """Write policy.safetensors and noise_ppo.json; settings["policy"] holds the arguments of this class."""
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        run.write_atomically(Path(folder) / "policy.safetensors", safetensors.torch.save(weights))
        run.write_atomically(Path(folder) / "noise_ppo.json", json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder, pipe):
        """The policy saved in `folder`, for `pipe`, the stock pipeline of the model it was learnt for."""
        policy = cls(**json.loads((Path(folder) / "noise_ppo.json").read_text(encoding="utf-8"))["policy"])
        policy.load_state_dict(safetensors.torch.load_file(Path(folder) / "policy.safetensors"))
        policy.pipe = pipe
        return policy.to(pipe.device).requires_grad_(False)


# ================================================================ sampling, evaluation


def guided_prediction(model, x, t, text, guidance):
    """The prediction that samples: unconditional + guidance * (conditional - unconditional). text: as encoded (batch, rows, width)."""
    if guidance == 1:
        return model.predict(x, t, text)
    text = torch.cat([model.empty.expand_as(text), text])
    unconditional, conditional = model.predict(x.repeat(2, 1, 1, 1), t, text).chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def denoise(model, x, levels, text, guidance):
    """DDIM with eta 0 (arXiv 2010.02502, equation 12), which of a flow is Euler's step, along levels, falling timesteps of which -1
    is the clean one. x: (batch, c, h, w) at levels[0] -> x at levels[-1], float32."""
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
    """z: (batch, c, h, w) -> clean latents x_0 (batch, c, h, w), float32. switch: of a model with a LoRA, which takes the steps that
    start above this timestep."""
    levels, x = [*model.timesteps(steps), -1], z.to(model.device, model.dtype).float()
    if switch is None:
        return denoise(model, x, levels, text, guidance)
    tuned = sum(t > switch for t in levels[:-1])  # steps
    with model.lora_merged():
        x = denoise(model, x, levels[: tuned + 1], text, guidance)
    with model.lora_off():
        return denoise(model, x, levels[tuned:], text, guidance)


def sample_and_score(model, rewards, prompts, z, steps, args, label, statistics=False):
    """Pictures of the prompts (n) from the initial noises z (n, c, h, w), a batch at a time.
    Returns {reward or statistic: (n,)} and the pictures, all but the first run.SHOWN at most 64 x 64 pixels."""
    scores, pictures = [], []
    for i in tqdm(range(0, len(prompts), args.sample_batch), desc=label, unit="batch", leave=False, mininterval=1):
        part = slice(i, i + args.sample_batch)
        x_0 = sample(model, z[part], model.encode(prompts[part]), steps, args.guidance, args.switch_timestep)
        images = model.decode(x_0, label)
        scores.append(score(rewards, images, prompts[part]) | (image_statistics(images) if statistics else {}))
        pictures += run.shrunk(images, i)
    return {name: torch.cat([s[name] for s in scores]) for name in scores[0]}, pictures


def evaluate(model, rewards, prompts, mean, log_std, steps, args, label):
    """Fixed prompts x fixed seeds, equation (1); mean, log_std: (prompts or 1, c, h, w).
    Returns {metric: (prompts,), the mean over a prompt's pictures; best_of_m: of rewards[0]} and the pictures of grid.png."""
    n = args.eval_samples
    seeds = [derived_seed("eval", i, j) for i in range(len(prompts)) for j in range(n)]
    eps = draw_noise(seeds, 0, model.latent_shape, model.dtype)[0].unflatten(0, (-1, n))  # (prompts, n, c, h, w), as stock
    z = (mean.cpu()[:, None] + log_std.exp().cpu()[:, None] * eps).flatten(0, 1)
    repeated = [p for p in prompts for _ in range(n)]
    scores, pictures = sample_and_score(model, rewards, repeated, z, steps, args, label, statistics=True)
    means = {name: values.view(-1, n).mean(1) for name, values in scores.items()}
    means["diversity"] = torch.tensor([diversity(pictures[i * n : i * n + n]) for i in range(len(prompts))])
    best = scores[rewards[0].spec].view(-1, n)
    means |= {f"best_of_{m}": best.view(-1, n // m, m).amax(2).mean(1) for m in (2, 4, 8) if n % m == 0}
    return means, pictures[: run.SHOWN]


@torch.no_grad()
def final_evaluation(model, policy, rewards, prompts, held_out, all_steps, args):
    """Standard noise, the policy and the controls at every number of steps, on the same seeds.
    Returns (results, {name: pictures of grid.png, at args.steps})."""
    zero = torch.zeros(1, *model.latent_shape)
    laws = {"standard": (zero, zero), "learnt": policy(read(model, held_out))}  # (mean, log_std), each (prompts or 1, c, h, w)
    results = {"kl": kl_to_standard_normal(*laws["learnt"]).mean().item()}
    results["kl_per_dimension"] = results["kl"] / zero.numel()
    if args.controls:
        some, tried = prompts[: max(2, len(held_out) // 2)], {}
        for s in TEMPERATURES:
            means, _ = evaluate(model, rewards[:1], some, zero, zero + math.log(s), args.steps, args, f"temperature {s}")
            tried[s] = means[args.reward].mean().item()
        results["temperature"] = max(tried, key=tried.get)
        laws["temperature"] = (zero, zero + math.log(results["temperature"]))
        if args.policy == "conditional":
            laws["one_for_all"] = [part.mean(0, keepdim=True) for part in policy(read(model, sorted(set(prompts))))]
    results["by_steps"], pictures = [], {}
    for steps in all_steps:
        found = {}
        for name, (mean, log_std) in laws.items():
            if name == "temperature" and results["temperature"] == 1:
                found[name] = found["standard"]
                continue
            found[name], shown = evaluate(model, rewards, held_out, mean, log_std, steps, args, f"{steps} steps, {name}")
            if steps == args.steps:
                pictures[name] = shown
        table = run.paired_table(found["standard"], found["learnt"], ("standard", "learnt", "gain"))
        results["by_steps"].append(run.steps_row(steps, found, table, args))
        if steps == args.steps:
            results["table"] = table
    return results, pictures


# ================================================================ the run


def prepare(args):
    """Fill in what was left out, check all that needs no diffusion model, then load the rewards that are models.
    Returns (training prompts, held-out prompts, rewards, numbers of steps to evaluate); rewards[0] is optimised, all are reported."""
    run.complete(args, DEFAULTS, LIMITS, CHOICES)
    all_steps = sorted({args.steps, *run.numbers(args, "eval_steps", int, 1, 999)})
    if args.mean_only and args.std_only:
        raise InputError("--mean_only --std_only: nothing is left to learn; give --no-mean_only with --std_only")
    run.read_lora(args)
    return *run.read_task(args), all_steps


def main(args):
    prompts, held_out, rewards, all_steps = prepare(args)
    model = Model(args.model, args.device, DTYPES[args.dtype], args.t5)
    if args.lora:
        model.load_lora(args.lora)
    scheduler, spacing = model.pipeline.scheduler, {}
    if model.prediction_type != "flow":
        spacing = {"timestep_spacing": "trailing", "clip_sample": False}
        model.pipeline.scheduler = scheduler.from_config(scheduler.config, **spacing)
        for steps in [args.steps, *all_steps]:
            if model.train_timesteps % steps:
                flag = "steps" if steps == args.steps else "eval_steps"
                raise InputError(f"--{flag} {steps}: must divide the model's {model.train_timesteps} training steps")
    schedule = run.schedule_prompts(len(prompts), args.prompts_per_iteration, args.iterations, args.seed)
    used = [prompts[i] for i in sorted({i for part in schedule for i in part})]
    # every prompt's text is computed once, in an order that does not depend on where a run was resumed
    model.remember(["", *held_out, *used])
    tokens, width = read(model, [""]).shape[1:]
    shape = {"tokens": tokens, "width": width, "latent_shape": model.latent_shape, "hidden": args.hidden, "grid": args.grid}
    shape |= {"policy": args.policy, "mean_only": args.mean_only, "std_only": args.std_only}
    torch.manual_seed(args.seed)
    policy = NoisePolicy(**shape).to(args.device)
    policy.standardise(read(model, used))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    folder = run.make_run_folder(args, "noise_ppo", args.model, args.seed)
    print(run.describe_noise(args, model, policy, len(schedule[0]), held_out, folder), flush=True)

    state = run.load_checkpoint(folder) if args.resume else None
    if state:
        policy.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
    else:
        state = {"iteration": 0, "rows": [], "seconds": 0.0}
    begun = time.perf_counter() - state["seconds"]
    settings = {"policy": shape, "model": args.model, "steps": args.steps, "guidance": args.guidance, "reward": args.reward}
    settings |= {"lora": str(Path(args.lora).resolve()), "switch_timestep": args.switch_timestep} if args.lora else {}
    settings |= {"scheduler": {"class": type(scheduler).__name__, **spacing, "eta": 0.0}}

    def checkpoint():
        state.update(policy=policy.state_dict(), optimizer=optimizer.state_dict(), seconds=time.perf_counter() - begun)
        run.save_checkpoint(folder, state)

    # ------------------------------------------------------------ BASELINE
    zero = torch.zeros(1, *model.latent_shape)
    means, _ = evaluate(model, rewards[:1], held_out, zero, zero, args.steps, args, "evaluate standard noise")
    print(f"  standard   {args.reward} {means[args.reward].mean():.3f} on the held-out prompts", flush=True)

    for it in range(state["iteration"], args.iterations):
        # -------------------------------------------------------- SAMPLE
        chosen = torch.tensor(schedule[it]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
        asked = [prompts[i] for i in chosen]
        seeds = [derived_seed(args.seed, it, i, j) for i in schedule[it] for j in range(args.samples)]
        states = read(model, asked)  # (n, tokens, width)
        with torch.no_grad():
            old_mean, old_log_std = policy(states)  # (n, c, h, w)
            eps = draw_noise(seeds, 0, model.latent_shape, torch.float32)[0].to(args.device)  # one seed a picture
            z = old_mean + old_log_std.exp() * eps  # (n, c, h, w), equation (1)
            old = log_prob(z, old_mean, old_log_std, args.reduction)  # (n,)

        # -------------------------------------------------------- SCORE
        scores, _ = sample_and_score(model, rewards[:1], asked, z, args.steps, args, f"sample {it + 1}")
        reward = scores[args.reward]  # (n,)
        advantage = advantages(reward, chosen, args.normalise).to(args.device)  # (n,)

        # -------------------------------------------------------- UPDATE
        optimizer.param_groups[0]["lr"] = args.lr * (1 - it / args.iterations)
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", it))
        losses, clipped = [], []
        orders = [torch.randperm(len(z), generator=generator) for _ in range(args.epochs)]
        for index in (part for order in orders for part in order.split(args.minibatch)):
            mean, log_std = policy(states[index])  # (minibatch, c, h, w)
            new = log_prob(z[index], mean, log_std, args.reduction)  # (minibatch,)
            kl = kl_to_standard_normal(mean, log_std).mean() / (z[0].numel() if args.reduction == "mean" else 1)
            loss = ppo_loss(new, old[index], advantage[index], args.clip) + args.kl_weight * kl  # equation (4)
            if not loss.isfinite():
                raise InputError(f"iteration {it + 1}: loss {loss.item()}; lower --lr or --clip")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            clipped.append((((new - old[index]).exp() - 1).abs() > args.clip).float().mean().item())

        # -------------------------------------------------------- EVALUATE, LOG
        row = {"iteration": it + 1, "reward": reward.mean().item(), "loss": sum(losses) / len(losses)}
        row |= {"clip_fraction": sum(clipped) / len(clipped), "explained_variance": explained_variance(reward, args.samples)}
        row |= {name: values.mean().item() for name, values in scores.items() if name != args.reward}  # parts of a sum
        with torch.no_grad():
            mean, log_std = policy(states)
            log_ratio = log_prob(z, mean, log_std, "sum") - log_prob(z, old_mean, old_log_std, "sum")  # (n,) nats
        row |= run.policy_statistics(mean, log_std, log_ratio, kl_to_standard_normal(mean, log_std))
        row["reward_held_out"] = math.nan
        if it + 1 == args.iterations or args.eval_every and (it + 1) % args.eval_every == 0:
            with torch.no_grad():
                law = policy(read(model, held_out))
            means, _ = evaluate(model, rewards[:1], held_out, *law, args.steps, args, f"evaluate {it + 1}")
            row["reward_held_out"] = means[args.reward].mean().item()
            policy.save(folder, settings)
        state["rows"].append(row)
        state["iteration"] = it + 1
        run.log(folder, state["rows"], it + 1, time.perf_counter() - begun)
        checkpoint()
        if not math.isnan(row["reward_held_out"]):
            run.print_iteration(row, args.iterations, time.perf_counter() - begun)

    # ------------------------------------------------------------ FINAL EVALUATION, SHOW
    results, pictures = final_evaluation(model, policy, rewards, prompts, held_out, all_steps, args)
    results["seconds"] = time.perf_counter() - begun
    run.write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    run.show_steps(folder, state["rows"], results, pictures, held_out, args)
    files = "the policy, results.json, metrics.csv, gain.png, grid.png, curves.png"
    print(f"\n{results['seconds']:.0f} s. In {folder}: {files}.")
    print("To use it (of this repository only noise_ppo.py is needed):\n")
    print(run.noise_code(model, folder, held_out[0], args))


if __name__ == "__main__":
    run.run_script(main, Args)
