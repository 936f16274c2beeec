"""AWM (advantage weighted matching): the denoising loss on own samples, weighted by signed advantages. A
baseline of the comparison. It has the sampler, prompts, rewards, LoRA and evaluation of graft.py.
Paper: "Advantage Weighted Matching", arXiv 2509.25050.
Run: python benchmarks/awm.py

Notation  x_0 a sample of the policy theta_old, the weights at the beginning of the round, R its reward;  x_t
          and the target v as in equation (4) of graft.py, in the model's own prediction type;  v_theta, v_old
          and v_base the predictions for x_t with the weights theta, theta_old and without the LoRA
Equations (1) A = (R - mean of R over the prompt's images) / (the rewards' standard deviation), cut off
          (2) L_theta = |v_theta - v|^2, the mean over the numbers of a latent; or, with the noise level
              sigma_t and p = 1/4,  sigma_t / p * (|v_theta - v|^2)^p
          (3) rho = exp(L_old - L_theta), with the same (t, eps) in both
          (4) loss  -E min(rho A, clip(rho, 1 - delta, 1 + delta) A)
                    + w_old E |v_theta - v_old|^2 + w_base E |v_theta - v_base|^2
What (4) does. At theta = theta_old its gradient is E[A grad L_theta]. If A is 1 for accepted samples and 0
for the others, that is GRAFT's gradient times m, the share of accepted samples. If A is 1 - m and -m, m times
the gradient of training on all samples is subtracted; that one is what GRAFT's control `--rule none` follows.
The plain loss of DiffusionNFT, divided by beta, is E[A L_theta] + beta E |v_theta - v_old|^2 for A = 2 r - 1,
without its part A |v_theta - v_old|^2, by which bad samples push without bound.
Choices: as in graft.py, a round's images are trained on in a random order with fresh noise, here the newest
round's alone; the guided prediction is trained. The gradient is clipped to norm 1. The clip of (4) is that of
the authors' code, where it hardly ever acts. That code divides A by 5, has w_old = 1, w_base = 0.003 and the
second form of (2), and evaluates an average of the weights; not here.
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

from common import EMBEDDED, Device, by_family, check_finite, derived_seed, load_model, schedule_prompts
from ddpo import prepare
from diffusion_nft import weights_set_to
from graft import evaluate, guided_prediction, sample_and_score, training_target
from utils.figures import save_grid
from utils.prompts import TRAIN_PROMPTS
from utils.runs import check_range, log_metrics, make_run_folder, restore, run_script, write_results

LEARNING_RATES = (1e-3, 3e-4, 3e-4)  # embedded model, other U-Nets, flows; the paper's for SD 3


@dataclass
class Args:
    """AWM: the denoising loss on own samples, weighted by signed advantages."""

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
    eval_every: int = 1  # rounds between evaluations; 0: only before and after

    steps: Annotated[int | None, by_family("steps")] = None  # steps of the sampler
    guidance: Annotated[float | None, by_family("guidance")] = None  # classifier-free guidance; 1: none
    eta: Annotated[float | None, by_family("eta")] = None  # 0: deterministic; 1: as random as DDPM
    sample_batch: Annotated[int | None, by_family("sample_batch")] = None  # images sampled at a time

    reward: str = "shapes_strict"  # to maximise: a name of rewards.py, file.py:function, or 0.7*one+0.3*other
    eval_rewards: Annotated[str | None, by_family("eval_rewards")] = None  # to report too, with commas
    reward_device: Device = "auto"  # of rewards that are models
    reward_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # their precision
    reward_batch: int = 16  # images that they score at a time

    rounds: int = 3  # times to sample and update
    prompts_per_round: int = 160  # prompts sampled in a round, none twice
    samples: int = 8  # samples per prompt
    spread: Literal["round", "prompt"] = "round"  # whose standard deviation equation (1) has
    advantage_max: float = 2.0  # advantages are cut off at plus or minus this

    matching: Literal["plain", "huber"] = "plain"  # first or second form of equation (2)
    clip: float = 1.0  # delta of equation (4)
    kl_old: float = 0.4  # w_old of equation (4)
    kl_base: float = 0.0  # w_base of equation (4); 0 saves a call of the model

    lora_rank: int = 16  # rank of the LoRA
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    lora_targets: Annotated[str | None, by_family("lora_targets")] = None  # or layer names, with commas
    updates: int = 60  # optimiser updates per round
    batch: int = 64  # images per update
    micro_batch: Annotated[int | None, by_family("micro_batch")] = None  # images per backward pass
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
        check_range(self, "eta", 0, 1)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "reward_batch", 1, 10**6)
        check_range(self, "rounds", 1, 10**4)
        check_range(self, "prompts_per_round", 1, 10**6)
        check_range(self, "samples", 2, 10**4)
        check_range(self, "advantage_max", 1e-9, 1e9)
        check_range(self, "clip", 1e-9, 1e9)
        check_range(self, "kl_old", 0, 1e6)
        check_range(self, "kl_base", 0, 1e6)
        check_range(self, "lora_rank", 1, 1024)
        check_range(self, "lora_alpha", 1e-6, 1e6)
        check_range(self, "updates", 1, 10**6)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "micro_batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)


# ================================================================ equations: tensors in, tensors out


def advantages(rewards, spread, limit):
    """Equation (1). rewards: (prompts, samples) -> the same shape; 0 in a row of equal rewards.
    spread: "round" or "prompt"; limit: where they are cut off."""
    deviation = rewards.std(correction=0) if spread == "round" else rewards.std(1, correction=0, keepdim=True)
    return ((rewards - rewards.mean(1, keepdim=True)) / deviation.clamp(min=1e-6)).clamp(-limit, limit)


def matching_loss(prediction, target, sigma_t, matching):
    """Equation (2). prediction, target: (batch, ...), sigma_t: (batch,) -> (batch,)."""
    square = (prediction - target).square().flatten(1).mean(1)
    if matching == "plain":
        return square
    return 4 * sigma_t * (square + 1e-10) ** 0.25  # its derivative is infinite at 0


def ppo_loss(loss, loss_old, advantage, clip):
    """First line of equation (4). All (batch,) -> scalar to minimise, the batch's mean."""
    ratio = (loss_old - loss).exp()  # equation (3)
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


# ================================================================ the run


def main(args):
    args, prompts, held_out, rewards, inputs = prepare(args, LEARNING_RATES)
    schedule = schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    model = load_model(args)
    model.timesteps(args.steps)  # only to refuse numbers of steps that the sampler cannot take
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    folder = make_run_folder(args, "awm", args.model, args.seed, inputs)
    per_round = len(schedule[0]) * args.samples
    print(f"""AWM -> {folder}
  sampling   {args.rounds} rounds x {len(schedule[0])} prompts x {args.samples} = {args.rounds * per_round} \
images, {args.steps} steps, eta {args.eta:g}
  update     {args.rounds} rounds x {args.updates} updates x {args.batch} images, KL to the sampling \
policy {args.kl_old:g}, to the base {args.kl_base:g}, lr {args.lr:g}""")
    texts = [*held_out, *(prompts[i] for i in sorted({i for ids in schedule for i in ids}))]
    model.warn_of_cut(texts)
    model.remember(["", *texts])
    state, save = restore(args, folder, model, optimizer, scaler)
    run_start = time.perf_counter() - state["seconds"]
    with model.lora_off():
        base, base_images = evaluate(model, rewards, held_out, args, "evaluate base")
    print(f"  base       {args.reward} {base[args.reward].mean():.3f} on the held-out prompts", flush=True)

    for r in range(state["round"], args.rounds):
        # -------------------------------------------------------- SAMPLE, SCORE
        ids = torch.tensor(schedule[r]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
        seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
        image_prompts = [prompts[i] for i in ids]
        with model.lora_merged():
            latents, scores, _ = sample_and_score(
                model, rewards[:1], image_prompts, seeds, args, f"sample {r + 1}"
            )  # (n, c, h, w)
        reward = scores[args.reward].view(-1, args.samples)  # (prompts, samples)
        advantage = advantages(reward, args.spread, args.advantage_max).flatten().to(args.device)  # (n,)

        # -------------------------------------------------------- UPDATE
        old = [parameter.detach().clone() for parameter in parameters]  # theta_old
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(ids))
        order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(epochs)])
        losses, moved, clipped = [], [], []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            noise = torch.randn(latents[index].shape, generator=generator).to(args.device)
            t = model.draw_timesteps(args.batch, generator).to(args.device)  # (batch,)
            losses.append(0.0)
            moved.append(0.0)
            clipped.append(0.0)
            for part in torch.arange(args.batch).split(args.micro_batch):  # (micro_batch,)
                text = model.encode([image_prompts[i] for i in index[part]])
                x_0 = latents[index[part]].to(args.device)  # (micro_batch, c, h, w)
                alpha, sigma = model.alpha_sigma(t[part])
                x_t, target = training_target(x_0, noise[part], alpha, sigma, model.prediction_type)
                with torch.no_grad(), weights_set_to(parameters, old):
                    v_old = guided_prediction(model, x_t, t[part], text, args.guidance)
                if args.kl_base:
                    with torch.no_grad(), model.lora_off():
                        v_base = guided_prediction(model, x_t, t[part], text, args.guidance)
                v = guided_prediction(model, x_t, t[part], text, args.guidance)
                new, before = (matching_loss(p, target, sigma, args.matching) for p in (v, v_old))
                loss = ppo_loss(new, before, advantage[index[part]], args.clip)
                distance = (v - v_old).square().mean()
                loss = loss + args.kl_old * distance
                if args.kl_base:
                    loss = loss + args.kl_base * (v - v_base).square().mean()
                share = len(part) / args.batch
                (loss * share).backward()
                losses[-1] += loss.item() * share
                moved[-1] += distance.item() * share
                ratio = (before - new).detach().exp()  # (micro_batch,)
                clipped[-1] += ((ratio - 1).abs() > args.clip).float().mean().item() * share
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            check_finite(f"round {r + 1}, update {update + 1}", losses[-1], norm, scaler)
            optimizer.step()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = {"round": r + 1, "reward_sampled": reward.mean().item(), "loss": sum(losses) / len(losses)}
        row |= {"moved": sum(moved) / len(moved), "clip_fraction": sum(clipped) / len(clipped)}
        row |= {"samples": (r + 1) * len(ids)}
        row |= {"reward_held_out": math.nan, "diversity_held_out": math.nan}
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            with model.lora_merged():
                state["tuned"], tuned_images = evaluate(model, rewards, held_out, args, f"evaluate {r + 1}")
            row["reward_held_out"] = state["tuned"][args.reward].mean().item()
            row["diversity_held_out"] = state["tuned"]["diversity"].mean().item()
            save_grid(folder / "grid.png", base_images, tuned_images, held_out, args.eval_samples)
        state["rows"].append(row)
        state["round"] = r + 1
        model.save_lora(folder)
        log_metrics(folder, state["rows"], r + 1, time.perf_counter() - run_start)
        save()
        print("  " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    write_results(folder, base, state["tuned"], args.reward, state["seconds"])


if __name__ == "__main__":
    run_script(main, Args)
