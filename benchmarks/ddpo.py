"""DDPO: policy gradients on every sampling step. The baseline of the comparison.
It has the sampler, prompts, rewards, LoRA and evaluation of graft.py.
Paper: "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301.
Run: python benchmarks/ddpo.py

Notation  x_0 .. x_N the trajectory from noise to image (N steps), c the prompt, r the reward of the image,
          D the numbers in a latent
Equations (1) x_{k+1} ~ N(m(x_k, c), s_k^2)    a step of the stochastic sampler: m and s_k as in equation (5)
              of graft.py
          (2) log p(x_{k+1} | x_k, c) = mean over D of  -((x_{k+1} - m) / s_k)^2 / 2 - log s_k - log(2 pi) / 2
          (3) A = (r - mean of r over the prompt's images) / (their standard deviation)
          (4) loss  -E min(rho A, clip(rho, 1 - delta, 1 + delta) A),  rho = p_new / p_old of a step,
              mean over steps and images
A last step without noise has no density and is left out: s_k = 0 where it ends at the clean image, as in the
embedded model and in flows.
Choices: the gradient is clipped to norm 1; advantages are cut off; trajectories, not steps, are shuffled.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import (
    EMBEDDED,
    Device,
    by_family,
    check_device,
    derived_seed,
    draw_noise,
    load_model,
    schedule_prompts,
    with_family_defaults,
)
from graft import evaluate, guided_prediction
from rewards import read_rewards, score
from utils.figures import save_grid
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
    write_results,
)

# embedded model, other U-Nets, flows; the first was chosen on validation prompts
LEARNING_RATES = (3e-3, 3e-4, 3e-4)


@dataclass
class Args:
    """DDPO: policy gradients on every step of the sampler."""

    seed: int = 0  # seed of the training run; evaluation images do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: Device = "auto"  # auto: CUDA or MPS if there is one
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen model; the LoRA is always float32

    model: str = EMBEDDED  # folder or hub id of a pipeline, or one file: SD 1.x to 3.x, FLUX.1, FLUX.2 klein
    model_config: str = ""  # folder or hub id of a pipeline with the configuration of a file as --model
    t5: bool = True  # SD 3: load the third text encoder
    height: int | None = None  # of the images in pixels; None: as the stock pipeline has it
    width: int | None = None
    prompts: str = TRAIN_PROMPTS  # .txt (one a line), .csv, .tsv or .jsonl; file.csv:column
    eval_prompts: str = ""  # held-out prompts; left out: the shapes ones, or every tenth of --prompts
    eval_samples: int = 4  # images per held-out prompt
    eval_every: int = 3  # rounds between evaluations; 0: only before and after

    steps: Annotated[int | None, by_family("steps")] = None  # steps of the sampler
    guidance: Annotated[float | None, by_family("guidance")] = None  # classifier-free guidance; 1: none
    eta: float = 1.0  # randomness of a step, above 0; 1: as random as DDPM
    sample_batch: Annotated[int | None, by_family("sample_batch")] = None  # images sampled at a time

    reward: str = "shapes_strict"  # to maximise: a name of rewards.py, file.py:function, or 0.7*one+0.3*other
    eval_rewards: Annotated[str | None, by_family("eval_rewards")] = None  # to report too, with commas
    reward_device: Device = "auto"  # of rewards that are models
    reward_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # their precision
    reward_batch: int = 16  # images that they score at a time

    rounds: int = 12  # times to sample and update
    prompts_per_round: int = 80  # prompts sampled in a round, none twice
    samples: int = 8  # samples per prompt
    epochs: int = 1  # passes over a round's trajectories
    clip: float = 1e-2  # delta of equation (4)
    advantage_max: float = 5.0  # advantages are cut off at plus or minus this

    lora_rank: int = 16  # rank of the LoRA
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    lora_targets: Annotated[str | None, by_family("lora_targets")] = None  # or layer names, with commas
    batch: int = 32  # trajectories per update
    micro_batch: Annotated[int | None, by_family("micro_batch")] = None  # trajectories per backward pass
    lr: Annotated[float | None, by_family(LEARNING_RATES)] = None  # AdamW learning rate

    def __post_init__(self):
        """InputError for a value out of range."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "eval_samples", 2, 10**4)
        check_range(self, "eval_every", 0, 10**9)
        check_range(self, "height", 8, 10**4)
        check_range(self, "width", 8, 10**4)
        check_range(self, "steps", 1, 999)
        check_range(self, "guidance", 1, 10**6)
        check_range(self, "eta", 1e-6, 1)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "reward_batch", 1, 10**6)
        check_range(self, "rounds", 1, 10**4)
        check_range(self, "prompts_per_round", 1, 10**6)
        check_range(self, "samples", 2, 10**4)
        check_range(self, "epochs", 1, 10**4)
        check_range(self, "clip", 1e-9, 1e9)
        check_range(self, "advantage_max", 1e-9, 1e9)
        check_range(self, "lora_rank", 1, 1024)
        check_range(self, "lora_alpha", 1e-6, 1e6)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "micro_batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)


# ================================================================ equations: tensors in, tensors out


def step_distribution(model, x, k, grid, text, guidance, eta):
    """Mean (batch, c, h, w) and standard deviation (a number) of x_{k+1} given x_k = x, equation (1)."""
    alpha, sigma = model.alpha_sigma(grid[k])
    alpha_next, sigma_next = model.alpha_sigma(grid[k + 1] if k + 1 < len(grid) else -1)
    prediction = guided_prediction(model, x, torch.tensor(grid[k], device=x.device), text, guidance)
    if model.prediction_type == "epsilon":
        x_0, eps = (x - sigma * prediction) / alpha, prediction
    elif model.prediction_type == "v_prediction":
        x_0, eps = alpha * x - sigma * prediction, alpha * prediction + sigma * x
    else:
        x_0, eps = x - sigma * prediction, x + alpha * prediction
    std = eta * sigma_next / sigma * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))
    return alpha_next * x_0 + math.sqrt(max(sigma_next**2 - std**2, 0)) * eps, std


def log_prob(x, mean, std):
    """Equation (2). x, mean: (batch, ...), std: a number above 0 -> (batch,) nats per dimension."""
    each = -0.5 * ((x - mean) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)
    return each.flatten(1).mean(1)


def advantages(rewards, limit):
    """Equation (3), cut off at plus or minus `limit`. rewards: (prompts, samples) -> the same shape. A row of
    equal rewards gives 0."""
    spread = rewards.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).clamp(-limit, limit)


def ppo_loss(log_prob_new, log_prob_old, advantage, clip):
    """Equation (4) of one step. All (batch,) -> scalar to minimise, the batch's mean."""
    ratio = (log_prob_new - log_prob_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


# ================================================================ sampling


@torch.no_grad()
def sample_trajectories(model, noise, text, grid, args):
    """noise: (steps + 1, batch, c, h, w) -> states, like noise, and log-densities (noisy steps, batch)."""
    noise = noise.to(model.device, torch.float32)
    states, densities = [noise[0]], []
    for k in range(len(grid)):
        mean, std = step_distribution(model, states[-1], k, grid, text, args.guidance, args.eta)
        states.append(mean + std * noise[k + 1])
        if std > 0:
            densities.append(log_prob(states[-1], mean, std))
    return torch.stack(states), torch.stack(densities)


# ================================================================ the run


def prepare(args, learning_rates=LEARNING_RATES):
    """Check all that needs no diffusion model, then load the rewards that are models. Also of the rivals.
    Returns (args without gaps, training prompts, held-out prompts, rewards, hashes of what the run reads).
    rewards[0] is optimised."""
    check_output(args.output, args.resume)
    args = with_family_defaults(args, lr=learning_rates)
    args.device = check_device(args.device, args.dtype)
    rewards = read_rewards(args.reward, args.eval_rewards)
    inputs = [args.model, args.model_config, *prompt_files(args.prompts, args.eval_prompts)]
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
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    folder = make_run_folder(args, "ddpo", args.model, args.seed, inputs)
    per_round = len(schedule[0]) * args.samples  # trajectories
    print(f"""DDPO -> {folder}
  sampling   {args.rounds} rounds x {len(schedule[0])} prompts x {args.samples} = {args.rounds * per_round} \
images, {args.steps} steps, eta {args.eta:g}
  update     {args.epochs} epochs x {math.ceil(per_round / args.batch)} updates x {args.batch} trajectories \
a round, clip {args.clip:g}, lr {args.lr:g}""")
    texts = [*held_out, *(prompts[i] for i in sorted({i for ids in schedule for i in ids}))]
    model.warn_of_cut(texts)
    model.remember(["", *texts])
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    state, save = restore(args, folder, model, optimizer, scaler)
    run_start = time.perf_counter() - state["seconds"]
    with model.lora_off():
        base, base_images = evaluate(model, rewards, held_out, args, "evaluate base")
    print(f"  base       {args.reward} {base[args.reward].mean():.3f} on the held-out prompts", flush=True)

    for r in range(state["round"], args.rounds):
        # -------------------------------------------------------- SAMPLE, SCORE
        ids = torch.tensor(schedule[r]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
        seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
        states, old, scores = [], [], []
        with model.lora_merged():
            batches = torch.arange(len(ids)).split(args.sample_batch)
            for batch in tqdm(batches, desc=f"sample {r + 1}", leave=False, mininterval=1):
                batch_prompts = [prompts[i] for i in ids[batch]]
                noise = draw_noise([seeds[i] for i in batch], args.steps, model.latent_shape, model.dtype)
                text = model.encode(batch_prompts)
                trajectory, densities = sample_trajectories(model, noise, text, grid, args)
                images = model.decode(trajectory[-1], f"sample {r + 1}")
                scores.append(score(rewards[:1], images, batch_prompts)[args.reward])
                states.append(trajectory)
                old.append(densities)
        states, old = torch.cat(states, 1), torch.cat(old, 1)  # (steps + 1, n, c, h, w), (noisy steps, n)
        reward = torch.cat(scores).view(-1, args.samples)  # (prompts, samples)
        advantage = advantages(reward, args.advantage_max).flatten().to(args.device)  # (n,)

        # -------------------------------------------------------- UPDATE
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        losses, clipped, moved = [], [], []
        orders = [torch.randperm(len(ids), generator=generator) for _ in range(args.epochs)]
        for index in (part for order in orders for part in order.split(args.batch)):  # (batch,)
            for part in index.split(args.micro_batch):  # (micro_batch,)
                text = model.encode([prompts[i] for i in ids[part]])
                for k in range(len(old)):
                    x = states[k, part]  # (micro_batch, c, h, w)
                    mean, std = step_distribution(model, x, k, grid, text, args.guidance, args.eta)
                    new = log_prob(states[k + 1, part], mean, std)  # (micro_batch,)
                    loss = ppo_loss(new, old[k, part], advantage[part], args.clip)
                    (loss * len(part) / len(index) / len(old)).backward()
                    ratio = (new - old[k, part]).detach().exp()
                    losses += [loss.item()] * len(part)  # by trajectory: micro-batches differ in size
                    clipped += ((ratio - 1).abs() > args.clip).tolist()
                    moved += (ratio - 1).abs().tolist()
            if not math.isfinite(sum(losses)):
                raise InputError(f"round {r + 1}: loss {losses[-1]}; lower --lr or --clip")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = {"round": r + 1, "reward_sampled": reward.mean().item(), "loss": sum(losses) / len(losses)}
        row |= {"clip_fraction": sum(clipped) / len(clipped), "ratio_moved": sum(moved) / len(moved)}
        row |= {"samples": (r + 1) * len(ids), "reward_held_out": math.nan, "diversity_held_out": math.nan}
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            with model.lora_merged():
                state["tuned"], tuned_images = evaluate(model, rewards, held_out, args, f"evaluate {r + 1}")
            row["reward_held_out"] = state["tuned"][args.reward].mean().item()
            row["diversity_held_out"] = state["tuned"]["diversity"].mean().item()
        state["rows"].append(row)
        state["round"] = r + 1
        model.save_lora(folder)
        log_metrics(folder, state["rows"], r + 1, time.perf_counter() - run_start)
        if not math.isnan(row["reward_held_out"]):
            save_grid(folder / "grid.png", base_images, tuned_images, held_out, args.eval_samples)
        save()
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    write_results(folder, base, state["tuned"], args.reward, state["seconds"])


if __name__ == "__main__":
    run_script(main, Args)
