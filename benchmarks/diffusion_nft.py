"""DiffusionNFT: contrast good and bad samples on the forward process. A baseline of the comparison.
It has the sampler, prompts, rewards, LoRA and evaluation of graft.py.
Paper: "DiffusionNFT: Online Diffusion Reinforcement with Forward Process", arXiv 2509.16117.
Run: python benchmarks/diffusion_nft.py

Notation  x_0 a sample of the policy theta_old, c its prompt, R its reward;  x_t and the target v as in
          equation (4) of graft.py, in the model's own prediction type;  v_theta and v_old the predictions for
          x_t with the weights theta and theta_old
Equations (1) r = 1/2 + 1/2 clip((R - mean of R over the prompt's images) / Z, -1, 1),
              Z a multiple of the rewards' standard deviation
          (2) v+ = (1 - beta) v_old + beta v_theta,   v- = (1 + beta) v_old - beta v_theta
          (3) loss  E  r |v+ - v|^2 + (1 - r) |v- - v|^2
          (4) the same with x_0 in the place of v, as v+ and v- predict it; each square is divided by the
              image's mean |error|, without gradient
          (5) after round i = 1, 2, ...:  theta_old <- s theta_old + (1 - s) theta,  s = min(rise i, most)
What (3) does. With d = v_theta - v_old and u = v - v_old it is
          (6) beta^2 |d|^2 - 2 beta (2 r - 1) d u + |u|^2,
so at d = 0 samples of r = 1/2 have no gradient, and the minimum is v_old + E[(2 r - 1) u | x_t] / beta. That
is the paper's guidance, 2 / beta times (share of good samples) times (prediction of the good ones - v_old).
Choices: as in graft.py, a round's images are trained on in a random order with fresh noise, here the newest
round's alone; the guided prediction is trained. The gradient is clipped to norm 1. The authors' code also has
a KL to the base of weight 1e-4, divides the loss by beta and evaluates an average of the weights; not here.
"""

import contextlib
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
from graft import evaluate, guided_prediction, sample_and_score, training_target
from utils.figures import save_grid
from utils.prompts import TRAIN_PROMPTS
from utils.runs import check_range, log_metrics, make_run_folder, restore, run_script, write_results

LEARNING_RATES = (1e-3, 3e-4, 3e-4)  # embedded model, other U-Nets, flows; the paper's for SD 3


@dataclass
class Args:
    """DiffusionNFT: contrast good and bad samples on the forward process."""

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
    spread: Literal["round", "prompt"] = (
        "round"  # whose standard deviation Z is: all rewards' or the prompt's
    )
    spread_factor: float = 1.0  # Z in standard deviations; the authors' code has 5

    beta: float = 0.3  # of equation (2): the smaller, the further a round goes
    loss: Literal["plain", "self_normalised"] = "self_normalised"  # equation (3) or (4)
    old_rise: float = 0.001  # rise of equation (5)
    old_most: float = 0.5  # most of equation (5)

    lora_rank: int = 16  # rank of the LoRA
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    lora_targets: Annotated[str | None, by_family("lora_targets")] = None  # or layer names, with commas
    updates: int = 120  # optimiser updates per round
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
        check_range(self, "spread_factor", 1e-6, 1e6)
        check_range(self, "beta", 1e-6, 1e3)
        check_range(self, "old_rise", 0, 1)
        check_range(self, "old_most", 0, 0.9999)
        check_range(self, "lora_rank", 1, 1024)
        check_range(self, "lora_alpha", 1e-6, 1e6)
        check_range(self, "updates", 1, 10**6)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "micro_batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)


# ================================================================ equations: tensors in, tensors out


def optimality(rewards, spread, factor):
    """Equation (1). rewards: (prompts, samples) -> r, the same shape, in [0, 1]; 1/2 in a row of equal
    rewards. spread: "round" or "prompt"; factor: Z in standard deviations."""
    deviation = rewards.std(correction=0) if spread == "round" else rewards.std(1, correction=0, keepdim=True)
    centred = rewards - rewards.mean(1, keepdim=True)
    return 0.5 + 0.5 * (centred / (factor * deviation).clamp(min=1e-6)).clamp(-1, 1)


def implicit_policies(v, v_old, beta):
    """Equation (2): (v+, v-). v, v_old: (batch, ...)."""
    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def clean_prediction(prediction, x_t, alpha_t, sigma_t, prediction_type):
    """The x_0 that a prediction of that type means.
    prediction, x_t: (batch, c, h, w), the levels: (batch,)."""
    alpha_t, sigma_t = (level.view(-1, 1, 1, 1) for level in (alpha_t, sigma_t))
    if prediction_type == "epsilon":
        return (x_t - sigma_t * prediction) / alpha_t
    return (alpha_t if prediction_type == "v_prediction" else 1) * x_t - sigma_t * prediction


def contrastive_loss(positive, negative, target, r, self_normalised):
    """Equation (3), or with x_0 in all three places (4). positive, negative, target: (batch, ...),
    r: (batch,) -> scalar, the mean over the batch and the numbers of a latent."""
    errors = [(prediction - target).flatten(1) for prediction in (positive, negative)]
    good, bad = (error.square().mean(1) for error in errors)  # (batch,)
    if self_normalised:
        good, bad = (
            square / error.detach().abs().mean(1).clamp(min=1e-5)
            for square, error in zip((good, bad), errors)
        )
    return (r * good + (1 - r) * bad).mean()


def kept_share(i, rise, most):
    """s of equation (5) after round i, counted from 1."""
    return min(rise * i, most)


# ================================================================ the sampling policy


@contextlib.contextmanager
def weights_set_to(parameters, values):
    """Inside, the parameters have these values. No backward pass may cross the border."""
    own = [parameter.data for parameter in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, own):
            parameter.data = value


# ================================================================ the run


def main(args):
    args, prompts, held_out, rewards, inputs = prepare(args, LEARNING_RATES)
    schedule = schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    model = load_model(args)
    model.timesteps(args.steps)  # only to refuse numbers of steps that the sampler cannot take
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    folder = make_run_folder(args, "diffusion_nft", args.model, args.seed, inputs)
    per_round = len(schedule[0]) * args.samples
    print(f"""DiffusionNFT -> {folder}
  sampling   {args.rounds} rounds x {len(schedule[0])} prompts x {args.samples} = {args.rounds * per_round} \
images, {args.steps} steps, eta {args.eta:g}
  update     {args.rounds} rounds x {args.updates} updates x {args.batch} images, beta {args.beta:g}, \
{args.loss}, lr {args.lr:g}""")
    texts = [*held_out, *(prompts[i] for i in sorted({i for ids in schedule for i in ids}))]
    model.warn_of_cut(texts)
    model.remember(["", *texts])
    state, save = restore(args, folder, model, optimizer, scaler)
    state.setdefault("old", [parameter.detach().cpu().clone() for parameter in parameters])
    run_start = time.perf_counter() - state["seconds"]
    with model.lora_off():
        base, base_images = evaluate(model, rewards, held_out, args, "evaluate base")
    print(f"  base       {args.reward} {base[args.reward].mean():.3f} on the held-out prompts", flush=True)

    for r in range(state["round"], args.rounds):
        # -------------------------------------------------------- SAMPLE, SCORE
        old = [values.to(args.device) for values in state["old"]]  # theta_old
        ids = torch.tensor(schedule[r]).repeat_interleave(args.samples)  # (n,) n = prompts x samples
        seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
        image_prompts = [prompts[i] for i in ids]
        with weights_set_to(parameters, old), model.lora_merged():
            latents, scores, _ = sample_and_score(
                model, rewards[:1], image_prompts, seeds, args, f"sample {r + 1}"
            )  # (n, c, h, w)
        reward = scores[args.reward].view(-1, args.samples)  # (prompts, samples)
        chance = optimality(reward, args.spread, args.spread_factor).flatten().to(args.device)  # r: (n,)

        # -------------------------------------------------------- UPDATE
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(ids))
        order = torch.cat([torch.randperm(len(ids), generator=generator) for _ in range(epochs)])
        losses, moved = [], []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            noise = torch.randn(latents[index].shape, generator=generator).to(args.device)
            t = model.draw_timesteps(args.batch, generator).to(args.device)  # (batch,)
            losses.append(0.0)
            moved.append(0.0)
            for part in torch.arange(args.batch).split(args.micro_batch):  # (micro_batch,)
                text = model.encode([image_prompts[i] for i in index[part]])
                x_0 = latents[index[part]].to(args.device)  # (micro_batch, c, h, w)
                alpha, sigma = model.alpha_sigma(t[part])
                x_t, target = training_target(x_0, noise[part], alpha, sigma, model.prediction_type)
                with torch.no_grad(), weights_set_to(parameters, old):
                    v_old = guided_prediction(model, x_t, t[part], text, args.guidance)
                v = guided_prediction(model, x_t, t[part], text, args.guidance)
                policies = implicit_policies(v, v_old, args.beta)
                if args.loss == "self_normalised":
                    levels = (x_t, alpha, sigma, model.prediction_type)
                    policies, target = [clean_prediction(p, *levels) for p in policies], x_0
                loss = contrastive_loss(*policies, target, chance[index[part]], args.loss != "plain")
                (loss * len(part) / args.batch).backward()
                losses[-1] += loss.item() * len(part) / args.batch
                moved[-1] += (v.detach() - v_old).square().mean().item() * len(part) / args.batch
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            check_finite(f"round {r + 1}, update {update + 1}", losses[-1], norm, scaler)
            optimizer.step()
            optimizer.zero_grad()

        # -------------------------------------------------------- THE SAMPLING POLICY FOLLOWS
        kept = kept_share(r + 1, args.old_rise, args.old_most)
        state["old"] = [
            (kept * before + (1 - kept) * parameter.detach()).cpu()
            for before, parameter in zip(old, parameters)
        ]

        # -------------------------------------------------------- EVALUATE, LOG
        row = {"round": r + 1, "reward_sampled": reward.mean().item(), "loss": sum(losses) / len(losses)}
        row |= {"moved": sum(moved) / len(moved), "old_kept": kept, "samples": (r + 1) * len(ids)}
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
