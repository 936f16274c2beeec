"""DDPO: policy gradients on every sampling step; the baseline of compare.py, with the sampler, prompts, rewards, LoRA and evaluation
of graft.py. Paper: "Training Diffusion Models with Reinforcement Learning", arXiv 2305.13301.   Run: python benchmarks/ddpo.py

Notation  x_0 .. x_N the trajectory from noise to picture (N steps), c the prompt, r the reward of the picture; D numbers in a latent
Equations (1) x_{k+1} ~ N(m(x_k, c), s_k^2)             a step of the stochastic sampler: m and s_k as in equation (5) of graft.py
          (2) log p(x_{k+1} | x_k, c) = mean over D of  -((x_{k+1} - m) / s_k)^2 / 2 - log s_k - log(2 pi) / 2
          (3) A = (r - mean of r over the prompt's pictures) / (their standard deviation)
          (4) loss  -E min(rho A, clip(rho, 1 - delta, 1 + delta) A),  rho = p_new / p_old of a step, mean over steps and pictures
A last step without noise (s_k = 0: it ends at the clean picture, as in the embedded model and in flows) has no density and is left out.
Choices: the gradient is clipped to norm 1; advantages are cut off; trajectories, not single steps, are shuffled.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import graft
import rewards as run  # rewards.py: besides the rewards, arguments, run folder, tables, pictures
from common import DTYPES, ROOT, InputError, Model, derived_seed, draw_noise
from rewards import score

# what is not as in graft.py; the learning rate of the embedded model was chosen on validation prompts
DEFAULTS = {"eta": (1.0,) * 4, "lr": (3e-3, 3e-4, 3e-4, 3e-4)}
LIMITS = {"eta": (1e-6, 1), "advantage_max": (1e-9, 1e9), "samples": (2, 10**4)}


@dataclass
class Args:
    """DDPO: policy gradients on every step of the sampler."""

    seed: int = 0  # seed of the training run; evaluation pictures do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: str = "auto"  # auto (CUDA if there is one), cpu or cuda
    dtype: str = "float32"  # precision of the frozen model: float32 or bfloat16; the LoRA is always float32

    model: str = str(ROOT / "shapes" / "pipeline")  # folder or hub id of a Stable Diffusion 1.x, 2.x, XL or 3.x pipeline
    t5: bool = True  # SD 3: load its third text encoder
    prompts: str = str(ROOT / "shapes" / "prompts_train.txt")  # .txt (one a line), .csv, .tsv or .jsonl; file.csv:column
    eval_prompts: str = ""  # held-out prompts; left out: the shapes ones, or every tenth of --prompts, then not trained on
    eval_samples: int = 4  # pictures per held-out prompt
    eval_every: int = 3  # rounds between evaluations; 0: only before and after

    steps: int | None = None  # steps of the sampler (10; other models 50; SD 3 28)
    guidance: float | None = None  # classifier-free guidance scale, 1 is none (1; other models 7.5; SD XL 5, SD 3 7)
    eta: float | None = None  # randomness of a step, above 0, at most 1: as random as DDPM (1)
    sample_batch: int | None = None  # pictures sampled at a time; no picture depends on it (64; others 8; SD XL, SD 3 4)

    reward: str = "shapes_strict"  # to maximise: a name of rewards.py, path/to/file.py:function, or "0.7*one+0.3*other"
    eval_rewards: str | None = None  # rewards reported too, separated by commas (the shapes ones and JPEG; others JPEG)
    reward_device: str = "auto"  # of rewards that are models: auto (CUDA if there is one), cpu or cuda
    reward_dtype: str = "float32"  # their precision: float32, bfloat16 or float16
    reward_batch: int = 16  # pictures that they judge at a time

    rounds: int = 12  # times to sample and update
    prompts_per_round: int = 80  # prompts sampled in a round, none twice
    samples: int = 8  # samples per prompt
    epochs: int = 1  # passes over a round's trajectories
    clip: float = 1e-2  # delta of equation (4)
    advantage_max: float = 5.0  # advantages are cut off at plus or minus this

    lora_rank: int = 16  # rank of the LoRA
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    lora_targets: str | None = None  # attention, all (linear and convolution), or layer names (all; others attention)
    batch: int = 32  # trajectories per update
    micro_batch: int | None = None  # trajectories per backward pass, accumulated to --batch (64; others 2; SD XL, SD 3 1)
    lr: float | None = None  # AdamW learning rate (3e-3; other models 3e-4)


# ================================================================ equations: tensors in, tensors out


def step_law(model, x, k, grid, text, guidance, eta):
    """Mean (batch, c, h, w) and standard deviation (a number) of x_{k+1} given x_k = x (batch, c, h, w), equation (1)."""
    alpha, sigma = model.alpha_sigma(grid[k])
    alpha_next, sigma_next = model.alpha_sigma(grid[k + 1] if k + 1 < len(grid) else -1)
    prediction = graft.guided_prediction(model, x, torch.tensor(grid[k], device=x.device), text, guidance)
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
    return (-0.5 * ((x - mean) / std).square() - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def advantages(rewards, most):
    """Equation (3), cut off at plus or minus `most`. rewards: (prompts, samples) -> the same shape; 0 where all are equal."""
    spread = rewards.std(1, correction=0, keepdim=True).clamp(min=1e-6)
    return ((rewards - rewards.mean(1, keepdim=True)) / spread).clamp(-most, most)


def ppo_loss(log_prob_new, log_prob_old, advantage, clip):
    """Equation (4) of one step. All (batch,) -> scalar to minimise, the batch's mean."""
    ratio = (log_prob_new - log_prob_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


# ================================================================ sampling


@torch.no_grad()
def sample_trajectories(model, noise, text, grid, args):
    """noise: (steps + 1, batch, c, h, w) -> states (steps + 1, batch, c, h, w) and log-densities (noisy steps, batch)."""
    noise = noise.to(model.device, torch.float32)
    states, densities = [noise[0]], []
    for k in range(len(grid)):
        mean, std = step_law(model, states[-1], k, grid, text, args.guidance, args.eta)
        states.append(mean + std * noise[k + 1])
        if std > 0:
            densities.append(log_prob(states[-1], mean, std))
    return torch.stack(states), torch.stack(densities)


# ================================================================ the run


def main(args):
    run.complete(args, DEFAULTS, LIMITS, {"dtype": ("float32", "bfloat16")})
    prompts, held_out, rewards = run.read_task(args)
    model = Model(args.model, args.device, DTYPES[args.dtype], args.t5)
    grid = model.timesteps(args.steps)
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = run.schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    folder = run.make_run_folder(args, "ddpo", args.model, args.seed)
    pictures = args.rounds * len(schedule[0]) * args.samples
    print(f"""DDPO -> {folder}
  sampling   {args.rounds} rounds x {len(schedule[0])} prompts x {args.samples} = {pictures} pictures, {args.steps} steps, eta {args.eta:g}
  update     {args.epochs} epochs x {math.ceil(len(schedule[0]) * args.samples / args.batch)} updates x {args.batch} trajectories a round, \
clip {args.clip:g}, lr {args.lr:g}""")
    model.remember(["", *held_out, *(prompts[i] for i in sorted({i for part in schedule for i in part}))])
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    state, save = run.restore(args, folder, model, optimizer, scaler)
    with model.lora_off():
        base, base_pictures = graft.evaluate(model, rewards, held_out, args, "evaluate base")
    print(f"  base       {args.reward} {base[args.reward].mean():.3f} on the held-out prompts", flush=True)

    for r in range(state["round"], args.rounds):
        # -------------------------------------------------------- SAMPLE, SCORE
        chosen = torch.tensor(schedule[r]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
        seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
        states, old, scores = [], [], []
        with model.lora_merged():
            for part in tqdm(
                torch.arange(len(chosen)).split(args.sample_batch), desc=f"sample {r + 1}", leave=False, mininterval=1
            ):
                asked = [prompts[i] for i in chosen[part]]
                noise = draw_noise([seeds[i] for i in part], args.steps, model.latent_shape, model.dtype)
                trajectory, densities = sample_trajectories(model, noise, model.encode(asked), grid, args)
                scores.append(score(rewards[:1], model.decode(trajectory[-1], f"sample {r + 1}"), asked)[args.reward])
                states.append(trajectory)
                old.append(densities)
        states, old = torch.cat(states, 1), torch.cat(old, 1)  # (steps + 1, n, c, h, w), (noisy steps, n)
        table = torch.cat(scores).view(-1, args.samples)  # (prompts, samples)
        advantage = advantages(table, args.advantage_max).flatten().to(args.device)  # (n,)

        # -------------------------------------------------------- UPDATE
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        losses, clipped, moved = [], [], []
        orders = [torch.randperm(len(chosen), generator=generator) for _ in range(args.epochs)]
        for index in (part for order in orders for part in order.split(args.batch)):
            for part in index.split(args.micro_batch):
                text = model.encode([prompts[i] for i in chosen[part]])
                for k in range(len(old)):
                    mean, std = step_law(model, states[k, part], k, grid, text, args.guidance, args.eta)
                    new = log_prob(states[k + 1, part], mean, std)  # (micro_batch,)
                    loss = ppo_loss(new, old[k, part], advantage[part], args.clip)
                    (loss * len(part) / len(index) / len(old)).backward()
                    losses.append(loss.item())
                    ratio = (new - old[k, part]).detach().exp()
                    clipped.append(((ratio - 1).abs() > args.clip).float().mean().item())
                    moved.append((ratio - 1).abs().mean().item())
            if not math.isfinite(sum(losses)):
                raise InputError(f"round {r + 1}: loss {losses[-1]}; lower --lr or --clip")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = {"round": r + 1, "reward_sampled": table.mean().item(), "loss": sum(losses) / len(losses)}
        row |= {"clip_fraction": sum(clipped) / len(clipped), "ratio_moved": sum(moved) / len(moved)}
        row |= {"samples": (r + 1) * len(chosen), "reward_held_out": math.nan, "diversity_held_out": math.nan}
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            with model.lora_merged():
                state["tuned"], shown = graft.evaluate(model, rewards, held_out, args, f"evaluate {r + 1}")
            row |= {
                f"{name}_held_out": state["tuned"][key].mean().item()
                for name, key in (("reward", args.reward), ("diversity", "diversity"))
            }
            run.save_grid(folder / "grid.png", base_pictures, shown, held_out, args.eval_samples)
        state["rows"].append(row)
        state["round"] = r + 1
        model.save_lora(folder)
        run.log(folder, state["rows"], r + 1, time.perf_counter() - state["begun"])
        save()
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    run.write_results(folder, base, state["tuned"], args.reward, state["seconds"])


if __name__ == "__main__":
    run.run_script(main, Args)
