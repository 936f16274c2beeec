"""benchmarks/diffusion_nft.py and benchmarks/awm.py: short real runs, computed again here from stock
diffusers, torch and numpy alone (the class Twin of test_loop_ddpo.py).

Written out below: which samples, rewards, noises and levels enter each update, r or A, both losses, the
optimiser's step, how theta_old follows, which weights sample and which are evaluated. The arithmetic is the
same, so the images are equal in every pixel.
"""

import contextlib
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

import utils.runs
from conftest import run_inside
from test_loop_ddpo import (
    CALLS,
    HELD_OUT,
    LAYERS,
    TRAIN,
    Twin,
    assert_expected,
    assert_same_calls,
    assert_same_updates,
    by_prompt,
    first,
    hashed,
    paired,
    recorded,
    rounds_of,
    second,
    seed_of,
    write_files,
)

__all__ = ["first", "second"]  # reward.py imports them


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working directory, with prompts and rewards."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- both methods


@contextlib.contextmanager
def lora_set_to(twin, values):
    """Inside, the twin's LoRA has these values."""
    own = [p.detach().clone() for p in twin.lora.values()]
    for p, value in zip(twin.lora.values(), values, strict=True):
        p.data.copy_(value)
    yield
    for p, value in zip(twin.lora.values(), own, strict=True):
        p.data.copy_(value)


def noised(twin, x_0, eps, timesteps):
    """(x_t, the target of the model's own kind, alpha, sigma), each a batch."""
    bars = [float(twin.pipe.scheduler.alphas_cumprod[t]) for t in timesteps]
    alpha, sigma = (
        torch.tensor([math.sqrt(bar) for bar in part]).view(-1, 1, 1, 1)
        for part in (bars, [1 - bar for bar in bars])
    )
    v = twin.pipe.scheduler.config.prediction_type == "v_prediction"
    return alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0 if v else eps, alpha, sigma


def predicted(twin, unet, x, t, prompts, guidance):
    text = twin.texts(prompts)
    if guidance == 1:
        return unet(x, t, encoder_hidden_states=text).sample
    both = torch.cat([twin.text[""].expand(len(x), -1, -1), text])
    output = unet(torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=both).sample
    without, given = output.chunk(2)
    return without + guidance * (given - without)


def signals(rewards, args, method):
    """r or A of every image."""
    found, everything = [], torch.tensor(rewards)
    for n in range(0, len(rewards), args.samples):
        own = everything[n : n + args.samples]
        deviation = (everything if args.spread == "round" else own).std(correction=0)
        for value in own:
            difference = value - own.mean()
            if method == "nft":
                z = max(args.spread_factor * deviation, torch.tensor(1e-6))
                found.append(0.5 + 0.5 * min(max(difference / z, torch.tensor(-1.0)), torch.tensor(1.0)))
            else:
                a = difference / max(deviation, torch.tensor(1e-6))
                found.append(max(-args.advantage_max, min(args.advantage_max, a.item())))
    return torch.tensor(found)


def nft_loss(twin, args, v, v_old, target, x_0, x_t, alpha, sigma, r):
    terms = []
    signs = (1 - args.beta, args.beta), (1 + args.beta, -args.beta)
    for (of_old, of_new), share in zip(signs, (r, 1 - r), strict=True):
        implicit = of_old * v_old + of_new * v
        error = implicit - target
        if args.loss == "self_normalised":
            kind = twin.pipe.scheduler.config.prediction_type
            clean = alpha * x_t - sigma * implicit if "v" in kind else (x_t - sigma * implicit) / alpha
            error = clean - x_0
        square = (error**2).flatten(1).mean(1)
        if args.loss == "self_normalised":
            square = square / error.detach().abs().flatten(1).mean(1)
        terms.append(share * square)
    return (terms[0] + terms[1]).mean()


def awm_loss(args, v, v_old, v_base, target, sigma, a):
    """Also the share of images at the clip."""
    new, before = (((p - target) ** 2).flatten(1).mean(1) for p in (v, v_old))
    if args.matching == "huber":
        new, before = (4 * sigma.flatten() * (x + 1e-10) ** 0.25 for x in (new, before))
    ratio = torch.exp(before - new)
    within = ratio.clamp(1 - args.clip, 1 + args.clip)
    loss = -torch.minimum(ratio * a, within * a).mean() + args.kl_old * ((v - v_old) ** 2).mean()
    if args.kl_base:
        loss = loss + args.kl_base * ((v - v_base) ** 2).mean()
    return loss, sum(abs(x - 1) > args.clip for x in ratio.tolist()) / len(a)


def computed(folder, args, method):
    """The run: what the rewards were asked, the updates, rows, table, LoRA and images of the grid."""
    twin, settings = Twin(folder, args.steps), SimpleNamespace(**vars(args))
    twin.add_lora(args.lora_rank, args.lora_alpha, args.layers, args.seed)
    parameters = list(twin.lora.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    schedule = rounds_of(len(TRAIN), args.prompts_per_round, args.rounds, args.seed)
    twin.learn_text([""])
    twin.learn_text([*HELD_OUT, *(TRAIN[i] for i in sorted({i for indices in schedule for i in indices}))])
    asked, updates, rows, begun, norms = [], [], [], [], []
    eval_seeds = [seed_of("eval", i, j) for i in range(len(HELD_OUT)) for j in range(args.eval_samples)]
    old = [p.detach().clone() for p in parameters]

    def evaluated(unet):
        prompts = [prompt for prompt in HELD_OUT for _ in range(args.eval_samples)]
        images, _, _ = twin.sampled(unet, prompts, eval_seeds, settings)
        for i in range(0, len(images), args.sample_batch):
            part = slice(i, i + args.sample_batch)
            asked.extend((name, images[part], prompts[part]) for name in ("first", "second"))
        return by_prompt(images, HELD_OUT, args.eval_samples), images

    base, base_images = evaluated(twin.base)
    for r in range(args.rounds):
        begun.append((len(asked), len(updates)))
        if method == "awm":
            old = [p.detach().clone() for p in parameters]
        with lora_set_to(twin, old):
            sampling = twin.merged()
        prompts = [TRAIN[i] for i in schedule[r] for _ in range(args.samples)]
        seeds = [seed_of(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
        images, states, _ = twin.sampled(sampling, prompts, seeds, settings)
        for i in range(0, len(images), args.sample_batch):
            part = slice(i, i + args.sample_batch)
            asked.append(("first", images[part], prompts[part]))
        rewards = [hashed("first", image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        signal = signals(rewards, args, method)

        generator = torch.Generator().manual_seed(seed_of(args.seed, "update", r))
        order = []
        while len(order) < args.updates * args.batch:
            order += torch.randperm(len(images), generator=generator).tolist()
        losses, moved, clipped = [], [], []
        for update in range(args.updates):
            chosen = order[update * args.batch : (update + 1) * args.batch]
            x_0 = torch.stack([states[n][-1] for n in chosen])
            eps = torch.randn(x_0.shape, generator=generator)
            t = torch.randint(0, 1000, (args.batch,), generator=generator)
            losses.append(0)
            moved.append(0)
            clipped.append(0)
            for start in range(0, args.batch, args.micro_batch):
                part = slice(start, start + args.micro_batch)
                own, words = x_0[part], [prompts[n] for n in chosen[part]]
                x_t, target, alpha, sigma = noised(twin, own, eps[part], t[part])
                with torch.no_grad():
                    with lora_set_to(twin, old):
                        v_old = predicted(twin, twin.tuned, x_t, t[part], words, args.guidance)
                    v_base = predicted(twin, twin.base, x_t, t[part], words, args.guidance)
                v = predicted(twin, twin.tuned, x_t, t[part], words, args.guidance)
                weights, share = signal[chosen[part]], len(words) / args.batch
                if method == "nft":
                    loss = nft_loss(twin, args, v, v_old, target, own, x_t, alpha, sigma, weights)
                else:
                    loss, cut = awm_loss(args, v, v_old, v_base, target, sigma, weights)
                    clipped[-1] += cut * share
                (loss * share).backward()
                losses[-1] += loss.item() * share
                moved[-1] += ((v - v_old) ** 2).mean().item() * share
            norm = torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]).norm()
            norms.append(norm.item())
            for p in parameters:
                p.grad *= torch.clamp(1 / (norm + 1e-6), max=1)
            gradients = [p.grad.clone() for p in parameters]
            optimizer.step()
            optimizer.zero_grad()
            updates.append((gradients, [p.detach().clone() for p in parameters]))

        row = {"round": r + 1, "reward_sampled": statistics.mean(rewards), "loss": statistics.mean(losses)}
        row["moved"] = statistics.mean(moved)
        if method == "nft":
            kept = min(args.old_rise * (r + 1), args.old_most)
            old = [kept * was + (1 - kept) * p.detach() for was, p in zip(old, parameters)]
            row["old_kept"] = kept
        else:
            row["clip_fraction"] = statistics.mean(clipped)
        row |= {"samples": (r + 1) * len(images), "reward_held_out": math.nan, "diversity_held_out": math.nan}
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            tuned, tuned_images = evaluated(twin.merged())
            row["reward_held_out"] = statistics.mean(tuned["first"])
            row["diversity_held_out"] = statistics.mean(tuned["diversity"])
        rows.append(row)
    result = {
        "norms": norms,
        "asked": asked,
        "updates": updates,
        "rows": rows,
        "begun": begun,
        "table": paired(base, tuned),
    }
    return SimpleNamespace(**result, lora=twin.lora, grid=(base_images, tuned_images))


# ---------------------------------------------------------------- the runs


COMMON = "--prompts train.txt --eval_prompts held_out.txt --device cpu --eval_samples 2 --steps 5"
COMMON += " --reward reward.py:first --eval_rewards reward.py:second"
# numbers of prompts, samples and images differ, and none divides the batches
FIRST = "--seed 5 --rounds 3 --prompts_per_round 3 --samples 4 --sample_batch 7 --eval_every 2 --guidance 1"
FIRST += " --updates 4 --batch 5 --micro_batch 2 --lora_rank 4 --lora_alpha 1000 --lora_targets attention"
SECOND = "--seed 6 --rounds 2 --prompts_per_round 5 --samples 3 --sample_batch 4 --eval_every 0"
SECOND += " --guidance 2.5 --eta 0.6 --updates 3 --batch 8 --micro_batch 3"
SECOND += " --lora_rank 3 --lora_alpha 3 --lora_targets to_q,to_out.0"
RUNS = {
    "nft, epsilon": ("nft", f"{FIRST} --lr 5e-4 --beta 0.7 --loss plain --old_rise 0.3 --old_most 0.5"),
    "nft, v": (
        "nft",
        f"{SECOND} --lr 1e-2 --beta 0.4 --spread prompt --spread_factor 0.8 --old_rise 0.9 --old_most 0.6",
    ),
    "nft, self-normalised epsilon": ("nft", f"{FIRST} --lr 5e-4 --old_rise 0 --spread_factor 2.0"),
    "awm, epsilon": ("awm", f"{FIRST} --lr 5e-4 --clip 5e-3 --advantage_max 1.1 --kl_base 0.7"),
    "awm, v": (
        "awm",
        f"{SECOND} --lr 1e-2 --clip 2e-3 --matching huber --spread prompt --advantage_max 0.9 --kl_old 0",
    ),
}
SCRIPTS = {"nft": "benchmarks/diffusion_nft.py", "awm": "benchmarks/awm.py"}
DEFAULTS = {"eta": 1.0, "spread": "round", "steps": 5, "eval_samples": 2}
DEFAULTS |= {"spread_factor": 1.0, "beta": 0.3, "loss": "self_normalised", "old_rise": 0.001, "old_most": 0.5}
DEFAULTS |= {"advantage_max": 2.0, "matching": "plain", "clip": 1.0, "kl_old": 0.4, "kl_base": 0.0}
TEXTS = ("spread", "loss", "matching")


def settings(words):
    """The arguments as the independent computation reads them."""
    words = words.split()
    given = {f.removeprefix("--"): v for f, v in zip(words[::2], words[1::2], strict=True)}
    targets = given.pop("lora_targets")
    texts = {name: given.pop(name) for name in TEXTS if name in given}
    given = {name: float(v) if {".", "e"} & set(v) else int(v) for name, v in given.items()}
    layers = LAYERS if targets == "attention" else targets.split(",")
    return SimpleNamespace(**DEFAULTS | given | texts, layers=layers)


@pytest.fixture(scope="module")
def expected(tiny_epsilon, tiny_v):
    """{name: (model, what the independent computation gives)}"""
    found = {}
    for name, (method, words) in RUNS.items():
        folder = tiny_epsilon if name.endswith("epsilon") else tiny_v
        found[name] = folder, computed(folder, settings(words), method)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(files, expected, name):
    (model, wanted), (method, words) = expected[name], RUNS[name]
    with recorded() as seen:
        argv = [*f"{COMMON} {words} --model {model} --output run".split()]
        code, _, error = run_inside(argv, SCRIPTS[method])
    assert code == 0, error
    assert_same_calls(CALLS, wanted.asked)
    assert_same_updates(seen.updates, wanted.updates)
    assert_expected(files / "run", seen, wanted)
    # every case that the loop knows has occurred
    if method == "awm":
        assert 0 < wanted.rows[-1]["clip_fraction"] < 1
    assert wanted.rows[-1]["moved"] > 1e-7
    assert max(wanted.norms) > 1 or "epsilon" not in name  # gradients are clipped


@pytest.mark.parametrize("name, after", [("nft, epsilon", 1), ("nft, epsilon", 2), ("awm, v", 1)])
def test_stopped_and_resumed(files, expected, monkeypatch, name, after):
    """The base is evaluated again, now with a LoRA to switch off; theta_old is that of the stopped run."""
    (model, wanted), (method, words) = expected[name], RUNS[name]
    saved, save = [], utils.runs.save_checkpoint

    def stop(folder, state):
        save(folder, state)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(utils.runs, "save_checkpoint", stop)
    with recorded() as seen:
        code, _, error = run_inside(f"{COMMON} {words} --model {model} --output run".split(), SCRIPTS[method])
        assert code == 130 and "--resume run" in error
        CALLS.clear()
        seen.grids.clear()
        code, _, error = run_inside(["--resume", "run"], SCRIPTS[method])
    assert code == 0, error
    first_round, first_calls = wanted.begun[0][0], [*wanted.begun, (len(wanted.asked), 0)][after][0]
    assert_same_calls(CALLS, wanted.asked[:first_round] + wanted.asked[first_calls:])
    assert_same_updates(seen.updates, wanted.updates)
    assert_expected(files / "run", seen, wanted)
