"""GRAFT (generalised rejection sampling fine-tuning): sample, score, accept by a rule, fine-tune on what was accepted.
Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.   Run: python graft.py

Notation  x_t = alpha_t x_0 + sigma_t eps, alpha_t^2 + sigma_t^2 = 1 (of a flow, as SD 3: alpha_t + sigma_t = 1); c the prompt;
          p the model that is sampled; r(x, c) the reward; M samples a prompt, of which a rule accepts some: sample i with
          probability A(x_i), non-decreasing in r.
Equations (1) accepted samples follow  argmax_q  E_q[rhat] - KL(q || p)  with  rhat(x) = log E[A | X = x]: the rule is the regulariser
          (2) K best of M:  rhat = log sum_{j<K} C(M-1, j) U^(M-1-j) (1-U)^j,  U = P(r(X') <= r(x)), X' ~ p, ties broken at random
          (3) KL(accepted || p) = integral_0^1 f log f du,  f = (M/K) exp(rhat);  K = 1: log M - (M-1)/M;  better of a pair: M = 2
          (4) loss  E |prediction(x_t, t, c) - target|^2,  target eps, or v = alpha_t eps - sigma_t x_0;  of a flow eps - x_0
          (5) step to the next level ('): x' = alpha' x_0 + sqrt(sigma'^2 - std^2) eps + std w,  x_0 and eps as predicted,  w ~ N(0, I),
              std = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2):  DDIM; of a flow eta 0 is Euler's step
Choices that the paper leaves open: a LoRA is tuned; groups in which no reward differs are skipped by the rules that rank;
with --guidance > 1 the loss is on the guided prediction, because that is what samples (README, "Guidance").
"""

import math
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import rewards as run  # rewards.py: besides the rewards, arguments, run folder, tables, pictures
from common import DTYPES, ROOT, InputError, Model, derived_seed, draw_noise
from rewards import average_hash, diversity, image_statistics, score

# equations (2) and (3), which the reports of P-GRAFT need too
reshaped_reward, implied_kl = run.reshaped_reward, run.implied_kl


@dataclass
class Args:
    """GRAFT: sample, score, accept by a rule, fine-tune a LoRA on what was accepted."""

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
    eta: float | None = None  # 0 deterministic, 1 as random as DDPM (1; SD 3 0, the stock sampler)
    sample_batch: int | None = None  # pictures sampled at a time; no picture depends on it (64; others 8; SD XL, SD 3 4)

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
    sample_only: bool = False  # stop after the first round's accepted pictures are written: another trainer goes on
    shard: str = ""  # with --sample_only: i/n, only every n-th prompt of the round from the i-th on; together n runs are one


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


def training_target(x_0, noise, alpha_t, sigma_t, prediction_type):
    """(x_t, target) of the denoising loss, equation (4). x_0, noise: (batch, ...); alpha_t, sigma_t: (batch,).
    prediction_type: "epsilon", "v_prediction" or "flow"."""
    alpha_t, sigma_t = (level.view(-1, *[1] * (x_0.dim() - 1)) for level in (alpha_t, sigma_t))
    x_t = alpha_t * x_0 + sigma_t * noise
    return x_t, {"epsilon": noise, "v_prediction": alpha_t * noise - sigma_t * x_0, "flow": noise - x_0}[prediction_type]


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
def sample(model, noise, text, guidance, eta):
    """Equation (5). noise: (steps + 1, batch, c, h, w) -> clean latents x_0 (batch, c, h, w), float32.

    DDIM is arXiv 2010.02502, equation 12. Of a flow, small steps with eta are the SDE of Flow-GRPO (arXiv 2505.05470) with
    a = sqrt(2) eta, which keeps the flow's marginals; its Euler-Maruyama step is infinite at sigma = 1 and, where x_0 is certain,
    leaves more noise than the level has.
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
    """Pictures of the prompts (n) with the seeds (n), a batch at a time.
    Returns latents (n, c, h, w), {reward or statistic: (n,)}, and the pictures, all but the first run.SHOWN at most 64 x 64 pixels."""
    latents, scores, pictures = [], [], []
    for i in tqdm(range(0, len(prompts), args.sample_batch), desc=label, unit="batch", leave=False, mininterval=1):
        part = slice(i, i + args.sample_batch)
        noise = draw_noise(seeds[part], args.steps, model.latent_shape, model.dtype)  # (steps + 1, batch, c, h, w)
        x_0 = sample(model, noise, model.encode(prompts[part]), args.guidance, args.eta)
        images = model.decode(x_0, label)
        latents.append(x_0.cpu())
        scores.append(score(rewards, images, prompts[part]) | image_statistics(images))
        pictures += run.shrunk(images, i)
    return torch.cat(latents), {name: torch.cat([s[name] for s in scores]) for name in scores[0]}, pictures


# ================================================================ loss


def denoising_loss(model, x_0, text, t, noise, guidance):
    """Equation (4), mean over everything. x_0, noise: (batch, c, h, w), text: (batch, rows, width), t: (batch,)."""
    alpha, sigma = model.alpha_sigma(t)
    x_t, target = training_target(x_0, noise, alpha, sigma, model.prediction_type)
    return (guided_prediction(model, x_t, t, text, guidance) - target).square().mean()


# ================================================================ evaluation


def evaluate(model, rewards, prompts, args, label):
    """Fixed prompts x fixed seeds. Returns ({metric: (prompts,), the mean over a prompt's pictures}, the pictures of grid.png)."""
    n = args.eval_samples
    seeds = [derived_seed("eval", i, j) for i in range(len(prompts)) for j in range(n)]
    repeated = [p for p in prompts for _ in range(n)]
    _, scores, pictures = sample_and_score(model, rewards, repeated, seeds, args, label)
    means = {name: values.view(-1, n).mean(1) for name, values in scores.items()}
    means["diversity"] = torch.tensor([diversity(pictures[i * n : i * n + n]) for i in range(len(prompts))])
    return means, pictures[: run.SHOWN]


# ================================================================ the run


def prepare(args):
    """Fill in what was left out, check all that needs no diffusion model, then load the rewards that are models.
    Returns (training prompts, held-out prompts, rewards): rewards[0] is optimised, all are reported."""
    run.complete(args)
    if args.shard and not (args.sample_only and shard_of(args.shard)):
        raise InputError(f"--shard {args.shard}: give --sample_only and i/n with i from 1 to n, as in 2/4")
    if args.sample_only:
        args.rounds, args.save_accepted = 1, True
    return run.read_task(args)


def shard_of(text):
    """The prompts of shard "i/n" of a round as a slice, of "" all; None for anything else."""
    i, slash, n = (text or "1/1").partition("/")
    if slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n):
        return slice(int(i) - 1, None, int(n))


def main(args):
    prompts, held_out, rewards = prepare(args)
    schedule = run.schedule_prompts(len(prompts), args.prompts_per_round, args.rounds, args.seed)
    shard = shard_of(args.shard)
    if not schedule[0][shard]:
        raise InputError(f"--shard {args.shard}: a round has only {len(schedule[0])} prompts; take fewer shards")
    model = Model(args.model, args.device, DTYPES[args.dtype], args.t5)
    model.timesteps(args.steps)  # only to refuse numbers of steps that the sampler cannot take
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.lora_targets, args.seed)
    if args.gradient_checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    optimizer = run.make_adamw(parameters, args.lr, args.optimizer_8bit)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    folder = run.make_run_folder(args, "graft", args.model, args.seed)
    print(run.describe(f"GRAFT -> {folder}", args, model, len(schedule[0]), held_out), flush=True)

    # every prompt's text is computed once, in an order that does not depend on where a run was resumed
    model.remember(["", *held_out, *(prompts[i] for i in sorted({i for part in schedule for i in part}))])
    # state: {round, rows, losses, accepted, seconds}, new or as stored; save() stores it with the LoRA, the optimiser and the scaler
    state, save = run.restore(args, folder, model, optimizer, scaler)

    # ------------------------------------------------------------ BASELINE
    if not args.sample_only:
        with model.lora_off():
            base, base_pictures = evaluate(model, rewards, held_out, args, "evaluate base")
        print(f"  base       {args.reward} {base[args.reward].mean():.3f} on the held-out prompts", flush=True)

    for r in range(state["round"], args.rounds):
        speed = ""
        if len(state["accepted"]) == r:  # not so if the run was stopped after it had accepted
            # ---------------------------------------------------- SAMPLE, SCORE
            start = time.perf_counter()
            ids = torch.tensor(schedule[r][shard]).repeat_interleave(args.samples)  # (prompts x samples,) indices of prompts
            seeds = [derived_seed(args.seed, r, i, j) for i in schedule[r][shard] for j in range(args.samples)]
            asked = [prompts[i] for i in ids]
            with model.lora_off() if args.reference == "base" else model.lora_merged():
                latents, scores, pictures = sample_and_score(model, rewards[:1], asked, seeds, args, f"sample {r + 1}")
            speed = f"{len(seeds) / (time.perf_counter() - start):.0f} pictures/s, "
            reward = scores[args.reward].view(-1, args.samples)  # (prompts, samples)

            # ---------------------------------------------------- ACCEPT
            options = {"top_k": args.top_k, "threshold": args.threshold, "beta": args.beta, "reward_max": args.reward_max}
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "accept", r))
            mine = torch.arange(len(schedule[r]))[shard]  # (prompts,) this shard's rows of the round; without --shard all
            whole = torch.zeros(len(schedule[r]), args.samples)  # rows of other shards only hold the places of their draws
            keys = whole.long().index_copy(0, mine, average_hash(pictures).view(-1, args.samples)) if args.dedup else None
            table = whole.index_copy(0, mine, reward)
            mask = accept(table, args.rule, **options, accept_flat=args.accept_flat, keys=keys, generator=generator)[mine]
            index = mask.flatten().nonzero().squeeze(1)  # (accepted,)
            accepted = {"latents": latents[index], "prompt": ids[index], "sample": index % args.samples}
            state["accepted"].append(accepted | {"reward": reward.flatten()[index]})
            state["rows"].append(run.sampled_row(r + 1, args, reward, index, scores, pictures))  # refuses an empty index
            if args.save_accepted:
                run.save_accepted(folder / "accepted", model, latents[index], state["accepted"], prompts, args.sample_batch)
            save()
        if args.sample_only:
            number = len(state["accepted"][0]["reward"])
            print(f"  accepted   {number} of {args.samples} x {len(schedule[r][shard])} pictures -> {folder}/accepted")
            return

        # -------------------------------------------------------- UPDATE
        kept = state["accepted"] if args.accumulate else state["accepted"][-1:]
        data = torch.cat([a["latents"] for a in kept])  # (n, c, h, w)
        ids_kept = torch.cat([a["prompt"] for a in kept])  # (n,) indices of prompts
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        losses = []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            x_0 = data[index].to(args.device)  # (batch, c, h, w)
            noise = torch.randn(x_0.shape, generator=generator).to(args.device)
            t = model.draw_timesteps(args.batch, generator).to(args.device)  # (batch,) uniform; of a flow logit-normal
            drop = torch.rand(args.batch, generator=generator) < args.prompt_dropout  # (batch,)
            text = model.encode(["" if d else prompts[i] for d, i in zip(drop, ids_kept[index])])  # (batch, rows, width)
            losses.append(0.0)
            for part in torch.arange(args.batch).split(args.micro_batch):  # (micro_batch,)
                with torch.autocast(args.device, DTYPES[args.dtype], enabled=args.dtype != "float32"):
                    guidance = args.guidance if args.guided_loss else 1
                    loss = denoising_loss(model, x_0[part], text[part], t[part], noise[part], guidance)
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
            with model.lora_merged():
                state["tuned"], pictures = evaluate(model, rewards, held_out, args, f"evaluate {r + 1}")
            row["reward_held_out"] = state["tuned"][args.reward].mean().item()
            run.save_grid(folder / "grid.png", base_pictures, pictures, held_out, args.eval_samples)
        state["losses"] += losses
        state["round"] = r + 1
        model.save_lora(folder)
        run.write_metrics(folder, state, base, args.reward)
        save()
        run.print_round(state, args.rounds, speed)

    # ------------------------------------------------------------ SHOW
    run.write_results(folder, base, state["tuned"], args.reward, state["seconds"])
    print(f"\n{state['seconds']:.0f} s. In {folder}: the LoRA, results.json, metrics.csv, grid.png, curves.png. To use it:\n")
    print(f"""{run.stock_code(model)}
pipe.load_lora_weights({str(folder.resolve())!r})
{run.stock_call(model, held_out[0], args)}""")


if __name__ == "__main__":
    run.run_script(main, Args)
