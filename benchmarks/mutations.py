"""Do the tests catch wrong equations and wrong loops? Each mutation changes one place of one function in a
copy of the repository: a sign, an index, a level, a weight, a clamp, a normaliser, who wins a tie; or which
images are trained on, which weights are evaluated, which seeds are used (loop_mutations.py); or what models,
rewards, files and reports do (shared_mutations.py). The tests named beside it must then fail. Without the
change they must pass.

Run: OMP_NUM_THREADS=1 python benchmarks/mutations.py
     Options: --only WORD  only mutations whose file, function, tests or texts contain the word
              --rest       only those that the stored result lacks, or that survived
              --jobs 2     two at a time
All take about an hour on one core. Result: benchmarks/results/mutations.json, in which --only and
--rest replace their rows. Exit code 1 if a mutation survives.
"""

import argparse
import ast
import contextlib
import functools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from loop_mutations import LOOP_TESTS, LOOPS
from shared_mutations import SHARED

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutations.json"
LIMIT = 600  # seconds for the tests of one mutation
PRELOAD = [  # imported once, before the processes of the tests are forked
    "pytest",
    "torch",
    "tyro",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "peft",
    "safetensors.torch",
    "torch.utils.flop_counter",
    "transformers.models.clip.modeling_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
]

EQUATIONS, RUN, PIPELINE = "tests/test_equations.py", "tests/test_run.py", "tests/test_pipeline.py"
PGRAFT, NOISE = "tests/test_pgraft.py", "tests/test_noise_ppo.py"
TORCHRUN = "tests/test_torchrun.py"
INVERSE, FAMILIES = "tests/test_inverse_noise_correction.py", "tests/test_families.py"
REWARDS, MODELS, DDPO = "tests/test_rewards.py", "tests/test_reward_models.py", "tests/test_ddpo.py"
FOLDERS, OCR = "tests/test_model_folders.py", "tests/test_ocr.py"
NFT, AWM, KL = "tests/test_diffusion_nft.py", "tests/test_awm.py", "tests/test_path_kl.py"
TWO_STEPS = f"{PIPELINE} -k 'test_sample_equals_stock_pipeline and 4'"
MOLECULES = "tests/test_molecules.py"
LAYOUTS, PAGE_JUDGE = "tests/test_layouts.py", "tests/test_layouts_judge.py"
PAGE_TRAINING, PAGE_LOOP = "tests/test_layouts_train.py", "tests/test_loop_layouts.py"
CHEAP_FIRST = (
    EQUATIONS,
    MOLECULES,
    LAYOUTS,
    PAGE_JUDGE,
    PAGE_TRAINING,
    PAGE_LOOP,
    REWARDS,
    OCR,
    DDPO,
    NFT,
    AWM,
    KL,
    PIPELINE,
    INVERSE,
    NOISE,
    PGRAFT,
    MODELS,
    FOLDERS,
)
CHEAP_FIRST += (FAMILIES, RUN, TORCHRUN)
CHEAP_FIRST += tuple(
    dict.fromkeys(f for *_, tests in SHARED if (f := tests.split(" -k ")[0]) not in CHEAP_FIRST)
)

# {(file, function, test file and -k): [(old, new)]}; `old` stands once in the function. The blocks that
# pgraft.py shares with graft.py are compared by a test, so they are changed in graft.py alone.
TABLE = {
    # ------------------------------------------------------------ molecules
    ("molecules/judge.py", "bond_orders", f"{MOLECULES} -k 'bond_orders or real'"): [
        ("free[b] -= 1", "free[b] -= 0"),
        ("(shorter + longer) / 2 - distance", "shorter - distance"),
        ("else min(most, 1)", "else min(most, 2)"),
        ("if total + rest[n] <= best[0]", "if total + rest[n] / 2 <= best[0]"),
        ("search(n + 1, total + gains[open_bonds[n]][more])", "search(n + 1, total + more)"),
    ],
    ("molecules/judge.py", "is_linear", f"{MOLECULES} -k 'line or real'"): [
        ("return True", "return False"),
        ("np.cos(np.radians(LINE))", "-np.cos(np.radians(LINE))"),
    ],
    ("molecules/judge.py", "fits", f"{MOLECULES} -k 'distance'"): [
        ("typical[-1] - SHORTER", "typical[-1] - 3 * SHORTER"),
        ("distance > typical[order]", "distance > typical[order - 1]"),
    ],
    ("molecules/judge.py", "judge", f"{MOLECULES} -k 'fragments or neighbours or real'"): [
        ("[0] + MARGIN", "[0] + 3 * MARGIN"),
        ("if len(Chem.GetMolFrags(molecule)) > 1", "if len(Chem.GetMolFrags(molecule)) > 2"),
        ("100 * np.sqrt", "90 * np.sqrt"),
    ],
    ("molecules/model.py", "project", f"{MOLECULES} -k 'projection or gaps'"): [
        ("/ count.view(-1, 1, 1)", "/ x.shape[1]"),
        ("x[..., :3] - mean", "x[..., :3]"),
        ("2) * mask", "2)"),
    ],
    ("molecules/model.py", "Layer.forward", f"{MOLECULES} -k equivariant"): [
        ("apart / (distance + 1) * weight", "apart.abs() / (distance + 1) * weight"),
        (
            "torch.cat([pairs, self.radial(distance)], 3)",
            "torch.cat([pairs, self.radial(apart[..., :1])], 3)",
        ),
    ],
    ("molecules/model.py", "Network.forward", f"{MOLECULES} -k 'equivariant or gaps or depends or places'"): [
        ("mask.unsqueeze(1)", "mask.unsqueeze(2)"),
        ("place - x[..., :3]", "place"),
        (" + self.count(count)", ""),
    ],
    ("molecules/model.py", "Model.save_tuned", f"{MOLECULES} -k lora"): [
        ("with self.lora_merged():", "with self.lora_off():"),
    ],
    ("molecules/graft_molecules.py", "deduplicate", f"{MOLECULES} -k 'kept'"): [
        ("set(seen)", "set()"),
        ("torch.randperm(len(mask), generator=generator).tolist()", "range(len(mask))"),
        ('keys[i] == "" or keys[i] not in taken', "keys[i] not in taken"),
        ("taken.add(keys[i])", "taken.add(i)"),
    ],
    ("molecules/graft_molecules.py", "deduplication_kl", f"{MOLECULES} -k kl_of"): [
        ("before[key] / len(accepted)", "before[key] / len(kept)"),
        ("n / len(kept)", "1 / len(kept)"),
    ],
    ("molecules/graft_molecules.py", "denoising_loss", f"{MOLECULES} -k loss"): [
        ("noise = project(noise, count)", "noise = noise"),
        ("count.sum() * x_0.shape[2]", "x_0.numel()"),
    ],
    ("molecules/graft_molecules.py", "sample", f"{MOLECULES} -k sampler"): [
        ("project(noise[k + 1], count)", "noise[k + 1]"),
        ("eta * sigma_next / sigma", "eta * sigma / sigma_next"),
        ("alpha * x - sigma * prediction", "alpha * x + sigma * prediction"),
    ],
    ("molecules/graft_molecules.py", "measures", f"{MOLECULES} -k measures"): [
        ("len(keys) / len(rows)", "len(keys) / len(stable)"),
        ("len(new) / len(keys)", "len(new) / len(rows)"),
        ("in rows if math.isfinite", "in stable if math.isfinite"),
    ],
    ("molecules/graft_molecules.py", "results_table", f"{MOLECULES} -k table"): [
        ("(BLOCKS - 1) * values.var()", "values.var()"),
    ],
    ("molecules/train.py", "train", f"{MOLECULES} -k training_by_hand"): [
        ("1 - decay", "decay"),
        ("torch._foreach_copy_(parameters, averaged)", "torch._foreach_copy_(averaged, parameters)"),
    ],
    ("molecules/train.py", "molecules_of", f"{MOLECULES} -k qm9"): [
        ("(1000 * SCALE)", "1000"),
        ("HALF * one_hot", "one_hot"),
    ],
    # ------------------------------------------------------------ layouts
    ("layouts/model.py", "boxes_of", f"{LAYOUTS} -k back"): [
        (".clamp(min=0)", ""),
        ("* mask", ""),
    ],
    ("layouts/model.py", "differences", f"{LAYOUTS} -k differences"): [
        (".flip(-1)", ""),
        ("mine - other", "other - mine"),
        ("2 * noise + 0.005", "noise + 0.005"),
    ],
    ("layouts/model.py", "Layer.forward", f"{LAYOUTS} -k 'equivariant or gaps or layer or bias'"): [
        (" + gaps", ""),
        (" + self.bias(pairs).permute(0, 3, 1, 2)", ""),
        ('"bhij,bijp->bihp"', '"bhij,bjip->bihp"'),
    ],
    ("layouts/model.py", "Network.forward", f"{LAYOUTS} -k 'gaps or depends'"): [
        ("* seen.unsqueeze(1)", ""),
        ("self.out(self.norm(states)) * mask", "self.out(self.norm(states))"),
        ("(BOXES + 1) * torch.arange", "0 * torch.arange"),
    ],
    ("layouts/judge.py", "alignment", f"{PAGE_JUDGE} -k 'grid or hand or gaps or one_box'"): [
        (" | torch.eye", " & torch.eye"),
        ("masked_fill(alone, 0)", "masked_fill(kind < 0, 0)"),
        ("-least.clamp", "least.clamp"),
    ],
    ("layouts/judge.py", "overlap", f"{PAGE_JUDGE} -k 'grid or overlap or gaps'"): [
        ("inner.clamp(min=0)", "inner"),
        ("(share * others).sum", "share.sum"),
        ("there.unsqueeze(2) * there.unsqueeze(1) *", ""),
    ],
    ("layouts/judge.py", "frechet_distance", f"{PAGE_JUDGE} -k frechet"): [("2 * cross", "cross")],
    ("layouts/train.py", "shaken", f"{PAGE_TRAINING} -k whole"): [
        ("scale[..., i - 2 : i - 1]", "scale[..., :1]"),
        ("change[:, None, 2:]", "change[:, None, :2]"),
    ],
    ("layouts/train.py", "split", f"{PAGE_TRAINING} -k whole"): [
        ('np.unique(data["group"])', 'np.unique(data["group"])[:2]'),
    ],
    ("layouts/train.py", "train", f"{PAGE_TRAINING} -k training_by_hand"): [
        (">= BLIND", "< BLIND"),
        ("1 - decay)", "decay)"),
    ],
    ("layouts/pgraft_layouts.py", "shaped_target", f"{LAYOUTS} -k target"): [
        ("sigma_t * a / (b * alpha_s)", "sigma_t / (b * alpha_s)"),
        ("(a * sigma_s) ** 2", "sigma_s**2"),
        ("(b / sigma_t) ** 2", "b / sigma_t"),
    ],
    ("layouts/pgraft_layouts.py", "denoising_loss", f"{LAYOUTS} -k loss"): [
        ("noise * mask", "noise"),
        ("weight * (model", "(model"),
        ("counts.sum() * x_s.shape[2]", "x_s.numel()"),
    ],
    ("layouts/pgraft_layouts.py", "denoise", f"{LAYOUTS} -k 'sampler or switch'"): [
        ("std * noise[k] * mask", "std * noise[k]"),
        ("alpha * prediction + sigma * x", "alpha * prediction - sigma * x"),
    ],
    ("layouts/pgraft_layouts.py", "sample", f"{LAYOUTS} -k switch"): [
        ("noise[switch_at + 1 :]", "noise[switch_at:]"),
        ("model.lora_merged() if tuned", "model.lora_merged() if not tuned"),
        ("    with model.lora_off():\n        x_0", "    with model.lora_merged():\n        x_0"),
    ],
    ("layouts/pgraft_layouts.py", "probe", f"{LAYOUTS} -k probe_by_hand"): [
        ("derived_seed(seed, step, j)", "derived_seed(seed, step, 0)"),
        ("noise[before + 1 : step + 1]", "noise[before:step]"),
    ],
    ("layouts/pgraft_layouts.py", "statistics", f"{LAYOUTS} -k statistics"): [
        (".clamp(0, 1)).prod", ".clamp(-9, 9)).prod"),
        ("mask.sum(1)", "mask.shape[1]"),
        (".mean(0) / 256", ".sum(0) / 256"),
    ],
    ("layouts/pgraft_layouts.py", "results_table", f"{LAYOUTS} -k table"): [
        ("kept.repeat_interleave(ROW)", "kept.repeat(ROW)"),
        ("(BLOCKS - 1) * values.var()", "values.var()"),
    ],
    ("layouts/pgraft_layouts.py", "main", f"{PAGE_LOOP} -k 'states or clean_pages'"): [
        ("switch + (1 - switch) * (1 - t)", "1 - t"),
        ('if args.data == "xs" else (1.0, 0.0)', 'if args.data != "xs" else (1.0, 0.0)'),
        ('"x_s" if args.data == "xs" else "x_0"', '"x_0" if args.data == "xs" else "x_s"'),
        ("args.lr * (1 - update / args.updates)", "args.lr"),
        ('args.reference == "newest" and r > 0', "r > 0"),
        ('else state["accepted"][-1:]', 'else state["accepted"]'),
        ("loss * counts[part].sum() / counts.sum()", "loss * counts[part].sum()"),
        ("[*grid, 0][switch_at]", "grid[switch_at - 1]"),
    ],
    # ------------------------------------------------------------ GRAFT
    ("graft.py", "accept", f"{EQUATIONS} -k 'topk or quantiles'"): [
        ("reshape(-1, size)) < best", "reshape(-1, size)) <= best")
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k preference"): [
        ("chance.reshape(-1, size)) < best", "chance.reshape(-1, size)) >= best"),
        ("else (2, 1)", "else (2, 2)"),
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k 'equal_rewards or ties'"): [
        ("chance.reshape(-1, size))", "torch.zeros(len(groups), size))"),  # ties by index
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k flat"): [
        ("groups != groups[:, :1]", "groups == groups[:, :1]"),
        ("mask & (groups", "mask | (groups"),
        (".any(1, keepdim=True)", ".all(1, keepdim=True)"),
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k exponential"): [
        ("((rewards - bound) / beta)", "((bound - rewards) / beta)"),
        ("((rewards - bound) / beta)", "((rewards - bound) * beta)"),
        ("rewards.max(1, keepdim=True).values", "rewards.max()"),
        ("rewards.max(1, keepdim=True).values", "rewards.mean(1, keepdim=True)"),
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k threshold"): [
        ("return rewards >= threshold", "return rewards > threshold")
    ],
    ("graft.py", "_rank", f"{EQUATIONS} -k 'equal_rewards or ties'"): [
        ("order = chance.argsort(1)", "order = torch.arange(chance.shape[1]).expand_as(chance)"),
    ],
    ("graft.py", "_rank", f"{EQUATIONS} -k topk"): [
        ("descending=True", "descending=False"),
        ("return order.argsort(1)", "return order"),
    ],
    ("graft.py", "reshaped_reward", f"{EQUATIONS} -k 'reshaped_reward or quantiles or implied_kl'"): [
        ("torch.xlogy(others - j, u)", "torch.xlogy(others - j + 1, u)"),
        ("math.lgamma(others - j + 1)", "math.lgamma(others - j + 2)"),
        ("torch.xlogy(j, 1 - u)", "(1 - u).log()"),
        ("range(top_k)", "range(top_k + 1)"),
    ],
    ("graft.py", "implied_kl", f"{EQUATIONS} -k implied_kl"): [
        ("- (num_samples - 1) / num_samples", "- num_samples / (num_samples + 1)"),
        ("- (num_samples - 1) / num_samples", "+ (num_samples - 1) / num_samples"),
        ("num_samples / top_k *", "num_samples *"),
    ],
    ("graft.py", "estimated_kl", f"{EQUATIONS} -k kl_of"): [
        ("else (2, 1)", "else (rewards.shape[1], 1)"),
        ("torch.arange(samples - best, samples + 1", "torch.arange(samples - best, samples"),
        ("(b - (samples - best))", "b"),
        ("torch.xlogy(n - b, 1 - u)", "torch.xlogy(b, 1 - u)"),
        ("best * share**samples", "share**samples"),
        ("best * share**samples", "0"),
        ("accepted / accepted.sum() / share", "accepted / accepted.sum()"),
        ("share * torch.xlogy(density, density)", "torch.xlogy(density, density) / len(share)"),
        ("/ beta)", "* beta)"),
        ("rewards.max(1, keepdim=True).values", "rewards.max()"),
        (".exp().clamp(max=1)", ".exp()"),
        ("rewards >= (", "rewards > ("),
        ("chance / chance.mean()", "chance / chance.sum()"),
    ],
    ("graft.py", "training_target", f"{EQUATIONS} -k 'training_target or regress'"): [
        ("x_t = alpha_t * x_0 + sigma_t * noise", "x_t = sigma_t * x_0 + alpha_t * noise"),
        ("alpha_t * noise - sigma_t * x_0", "alpha_t * noise + sigma_t * x_0"),
        ('"epsilon": noise', '"epsilon": x_0'),
    ],
    ("pgraft.py", "prepare", f"{FAMILIES} -k own_defaults"): [
        ("with_family_defaults(args, eta=ETA)", "with_family_defaults(args)"),
    ],
    ("graft.py", "training_target", f"{FAMILIES} -k flow_target"): [("noise - x_0", "x_0 - noise")],
    ("graft.py", "guided_prediction", f"{PIPELINE} -k test_denoising_loss"): [
        ("unconditional + guidance *", "conditional + guidance *"),
        ("[model.empty.expand_as(text), text]", "[text, model.empty.expand_as(text)]"),
    ],
    ("graft.py", "sample", TWO_STEPS): [
        ("(x - sigma * prediction) / alpha, prediction", "x - sigma * prediction, prediction"),
        ("alpha * x - sigma * prediction, alpha", "alpha * x + sigma * prediction, alpha"),
        ("alpha * prediction + sigma * x", "alpha * prediction - sigma * x"),
        ("std = eta * sigma_next / sigma *", "std = eta *"),
        ("(alpha * sigma_next / alpha_next) ** 2", "(alpha_next * sigma_next / alpha) ** 2"),
        ("max(sigma_next**2 - std**2, 0)", "max(sigma_next**2, 0)"),
        ("+ std * noise[k + 1]", "+ std * noise[k]"),
        ("grid[k + 1] if", "grid[k] if"),
        ("else -1", "else 0"),
        ("times[k], text", "times[max(k - 1, 0)], text"),
    ],
    ("graft.py", "sample", f"{FAMILIES} -k same_steps"): [
        ("x - sigma * prediction, x + alpha * prediction", "x + sigma * prediction, x + alpha * prediction"),
        ("x - sigma * prediction, x + alpha * prediction", "x - sigma * prediction, x + sigma * prediction"),
    ],
    ("graft.py", "denoising_loss", f"{PIPELINE} -k test_denoising_loss"): [
        (".square().mean()", ".abs().mean()"),
        ("model, x_t, t, text", "model, x_0, t, text"),
    ],
    ("graft.py", "sampled_row", f"{RUN} -k flat_groups"): [
        ('group = 2 if args.rule == "preference" else args.samples', "group = args.samples"),
        ("groups.amax(2) == groups.amin(2)", "groups.amax(2) != groups.amin(2)"),
        ("rewards.flatten()[index]", "rewards.flatten()"),
        ("/ rewards.numel()", "/ len(rewards)"),
    ],
    # ------------------------------------------------------------ several processes
    ("utils/processes.py", "own_share", f"{TORCHRUN} -k shares"): [
        ("items[RANK::SIZE]", "items[RANK :: SIZE + 1]"),
        ("items[RANK::SIZE]", "items[RANK * (len(items) // SIZE) : (RANK + 1) * (len(items) // SIZE)]"),
    ],
    ("utils/processes.py", "gather", f"{TORCHRUN} -k shares"): [
        ("shares[i % SIZE]", "shares[(i + 1) % SIZE]"),
        ("sum(map(len, shares))", "len(items) * SIZE"),
    ],
    ("utils/processes.py", "sum_gradients", f"{TORCHRUN} -k sum_of_gradients"): [
        ("new_tensor([loss])", "new_tensor([loss / SIZE])"),
        ("zip(parameters, sums)", "zip(parameters, gradients)"),
        ("if p.grad is None else p.grad", "if p.grad is None else p.grad.sign()"),
    ],
    ("graft.py", "main", f"{TORCHRUN} -k 'updates and graft'"): [
        ("own_share(torch.arange(args.batch))", "torch.arange(args.batch)"),
        ("scale(loss * len(part) / args.batch)", "scale(loss * len(part) / len(own))"),
        ("losses[-1] = sum_gradients(parameters, losses[-1])", "pass"),
    ],
    ("pgraft.py", "main", f"{TORCHRUN} -k 'updates and pgraft'"): [
        ("scale(loss * len(part) / args.batch)", "scale(loss * len(part) / len(own))"),
        ("losses[-1] = sum_gradients(parameters, losses[-1])", "pass"),
    ],
    ("noise_ppo.py", "main", f"{TORCHRUN} -k 'updates and noise_ppo'"): [("(loss / SIZE)", "loss")],
    # ------------------------------------------------------------ P-GRAFT
    ("pgraft.py", "shaped_target", f"{PGRAFT} -k 'regression or clean_end'"): [
        ("a = alpha_t / alpha_s", "a = alpha_t"),
        ("(a * sigma_s) ** 2", "sigma_s**2"),
        ("noise_factor, x_s_factor = sigma_t / b, 0 * a", "noise_factor, x_s_factor = b / sigma_t, 0 * a"),
        ("sigma_t * a / (b * alpha_s)", "sigma_t / (b * alpha_s)"),
        ("-sigma_t / alpha_s", "sigma_t / alpha_s"),
        ("alpha_t * (sigma_s / alpha_s) ** 2", "alpha_t * (sigma_s / alpha_s)"),
        ("(sigma_t + alpha_t *", "(sigma_t - alpha_t *"),
        ("-1 / alpha_s", "-1"),
    ],
    ("pgraft.py", "shaped_target", f"{PGRAFT} -k 'weight or test_loss'"): [
        ("(b / sigma_t) ** 2", "b / sigma_t"),
        ("(b / sigma_t) ** 2", "(sigma_t / b) ** 2"),
    ],
    ("pgraft.py", "denoising_loss", f"{PGRAFT} -k test_loss"): [("(weight * (", "(1.0 * (")],
    ("pgraft.py", "unresolved_share", f"{PGRAFT} -k 'unresolved_share or jackknife'"): [
        ("(1 - 1 / rewards.shape[2])", "1"),
        ("rewards.mean(2).var(1)", "rewards.mean(2).var(1, correction=0)"),
        ("rewards.var(2).mean(1)", "rewards.var(2, correction=0).mean(1)"),
        ("(n - 1) / n *", "1 / n *"),
        ("(total.sum() - total)", "total.sum()"),
    ],
    ("pgraft.py", "switch_step", f"{PGRAFT} -k test_switch_step"): [
        ("t > switch_timestep", "t >= switch_timestep")
    ],
    ("pgraft.py", "sample", f"{PGRAFT} -k composition"): [
        ("noise[switch_at + 1 :]", "noise[switch_at:]"),
        (
            "noise[0], levels[: switch_at + 1], noise[1 : switch_at + 1]",
            "noise[0], levels[:switch_at], noise[1 : switch_at + 1]",
        ),
        ("model.lora_merged() if tuned else model.lora_off()", "model.lora_off()"),
        (
            "return x_s, denoise(model, x_s, levels[switch_at:]",
            "return x_s, denoise(model, noise[0], levels[switch_at:]",
        ),
    ],
    ("pgraft.py", "denoise", f"{PGRAFT} -k without_the_tuned_model"): [
        ("(x - sigma * prediction) / alpha, prediction", "x - sigma * prediction, prediction"),
        ("alpha * prediction + sigma * x", "alpha * prediction - sigma * x"),
        ("(alpha * sigma_next / alpha_next) ** 2", "(alpha_next * sigma_next / alpha) ** 2"),
        ("max(sigma_next**2 - std**2, 0)", "max(sigma_next**2, 0)"),
        ("std * noise[k]", "std * noise[0]"),
        ("model.alpha_sigma(after)", "model.alpha_sigma(t)"),
    ],
    ("pgraft.py", "denoise", f"{FAMILIES} -k same_steps"): [
        ("x - sigma * prediction, x + alpha * prediction", "x - sigma * prediction, x + sigma * prediction"),
    ],
    ("pgraft.py", "probe", f"{PGRAFT} -k 'probe_on_a_gaussian or restarts_begin'"): [
        ("denoise(model, x, levels[step:]", "denoise(model, noise[0], levels[step:]"),
        ("noise[before + 1 : step + 1]", "noise[before : step + 1]"),
    ],
    ("pgraft.py", "recommend", f"{PGRAFT} -k recommendation"): [
        ('row["unresolved"] + row["se"] <= limit', 'row["unresolved"] <= limit'),
        ("for row in rows:", "for row in rows[::-1]:"),
        ('return rows[-1]["timestep"]', 'return rows[0]["timestep"]'),
    ],
    ("pgraft.py", "save_switch", f"{FAMILIES} -k 'switch_in_the_stock and sd3'"): [
        ('"sigma": sigma', '"sigma": alpha'),
        ('"switch_timestep": timestep,', '"switch_timestep": timestep / 2,'),
    ],
    ("pgraft.py", "usage_code", f"{PGRAFT} -k printed_code"): [
        (', ", callback_on_step_end=base_from_the_switch_on")', ")")
    ],
    ("pgraft.py", "main", f"{PGRAFT} -k data_and_levels"): [
        ("draw_timesteps(args.batch, generator, switch)", "draw_timesteps(args.batch, generator)"),
        ('if args.data == "xs" else (1.0, 0.0)', "if True else (1.0, 0.0)"),
        ('a["x_s" if args.data == "xs" else "x_0"]', 'a["x_s"]'),
        ("< args.prompt_dropout", "> args.prompt_dropout"),
        ("args.guidance if args.guided_loss else 1", "1"),
    ],
    ("pgraft.py", "main", f"{PGRAFT} -k levels_next_to"): [
        ("switch = grid[switch_at]", "switch = grid[switch_at - 1]")
    ],
    # ------------------------------------------------------------ Noise PPO
    ("noise_ppo.py", "log_prob", f"{NOISE} -k log_prob"): [
        ("-0.5 * ((z - mean)", "-1.0 * ((z - mean)"),
        ("(-log_std).exp()", "log_std.exp()"),
        ("- log_std - 0.5", "+ log_std - 0.5"),
        ("0.5 * math.log(2 * math.pi)", "math.log(2 * math.pi)"),
    ],
    ("noise_ppo.py", "kl_to_standard_normal", f"{NOISE} -k kl"): [
        ("(2 * log_std).exp() - 1) - log_std", "(2 * log_std).exp() - 1) + log_std"),
        ("(2 * log_std).exp()", "log_std.exp()"),
        ("mean.square()", "mean.abs()"),
        (".sum(1)", ".mean(1)"),
    ],
    ("noise_ppo.py", "ppo_loss", f"{NOISE} -k 'policy_gradient or clip_cuts'"): [
        ("torch.minimum", "torch.maximum"),
        ("ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(1 - clip, 1)"),
        ("ratio.clamp(1 - clip, 1 + clip)", "ratio.clamp(max=1 + clip)"),
        ("(log_prob_new - log_prob_old)", "(log_prob_old - log_prob_new)"),
        ("return -torch", "return torch"),
    ],
    ("noise_ppo.py", "advantages", f"{NOISE} -k advantages"): [
        ("rewards - prompt_mean(rewards)", "rewards - rewards.mean()"),
        ('"batch": centred.square().mean()', '"batch": rewards.square().mean()'),
        ('"prompt": prompt_mean(centred.square())', '"prompt": centred.square().mean()'),
        ("square[normalise].sqrt()", "square[normalise]"),
        ("/ count)[place]", "/ len(values))[place]"),
    ],
    ("noise_ppo.py", "advantages", f"{NOISE} -k do_not_differ"): [(".clamp(min=1e-6)", "")],
    ("noise_ppo.py", "explained_variance", f"{NOISE} -k explained_variance"): [
        ("* samples / (samples - 1)", ""),
        ("residual.square().mean()", "residual.abs().mean()"),
    ],
    ("noise_ppo.py", "policy_statistics", f"{NOISE} -k 'policy_statistics or approximate_kl'"): [
        ("0.5 * log_ratio.square()", "log_ratio.square()"),
        ("log_ratio.square().mean()", "log_ratio.mean().square()"),
        ("/ mean[0].numel()", "/ mean.numel()"),
        ("mean - mean.mean(0)", "mean - mean.mean()"),
    ],
    ("noise_ppo.py", "NoisePolicy.forward", f"{NOISE} -k 'standardised_text or options_say'"): [
        ("- self.centre) * self.scale", "- self.centre)"),
        ("log_std * self.learn_std", "log_std * self.learn_mean"),
    ],
    ("noise_ppo.py", "denoise", f"{NOISE} -k 'equals_stock and 4'"): [
        ("(x - sigma * prediction) / alpha, prediction", "x - sigma * prediction, prediction"),
        ("alpha * prediction + sigma * x", "alpha * prediction - sigma * x"),
        ("alpha_next * x_0 + sigma_next * eps", "alpha * x_0 + sigma_next * eps"),
    ],
    ("noise_ppo.py", "denoise", f"{FAMILIES} -k same_steps"): [
        ("x - sigma * prediction, x + alpha * prediction", "x - sigma * prediction, x - alpha * prediction"),
    ],
    ("noise_ppo.py", "sample", f"{NOISE} -k 'equals_stock and 4'"): [("(steps), -1]", "(steps), 0]")],
    ("noise_ppo.py", "sample", f"{NOISE} -k with_a_lora"): [
        ("t > switch", "t >= switch"),
        ("levels[: tuned + 1]", "levels[:tuned]"),
        ("model.lora_off()", "model.lora_merged()"),
    ],
    ("noise_ppo.py", "evaluate", f"{NOISE} -k test_evaluate"): [
        ("derived_seed(tag, i, j)", "derived_seed(tag, i)"),
        ("log_std.exp().cpu()", "log_std.cpu()"),
        (".amax(2).mean(1)", ".mean(2).mean(1)"),
    ],
    ("noise_ppo.py", "final_evaluation", f"{NOISE} -k test_controls"): [
        ("max(reward_by_s, key=reward_by_s.get)", "min(reward_by_s, key=reward_by_s.get)"),
        ("zero + math.log(s)", "zero + s"),
        ('tag="temperature"', 'tag="eval"'),
        ("part.mean(0, keepdim=True)", "part[:1]"),
        ("sorted(set(prompts))", "sorted(set(held_out))"),
    ],
    ("noise_ppo.py", "policy_input", f"{FAMILIES} -k policy_reads"): [
        ("if pooled is not None", "if pooled is None"),
        ("states.mean(1, keepdim=True)", "states.mean(2, keepdim=True)"),
    ],
    ("noise_ppo.py", "steps_row", f"{NOISE} -k 'other_ways and guidance'"): [
        ("2 if args.guidance > 1 and model.classifier_free else 1", "1")
    ],
    ("noise_ppo.py", "usage_code", f"{NOISE} -k tuned_model"): [
        ('pipe.load_lora_weights({str(Path(args.lora).resolve())!r})"', '"'),
        ('callback = ", callback_on_step_end=base_from_the_switch_on"', 'callback = ""'),
    ],
    ("noise_ppo.py", "main", f"{NOISE} -k updates_of_a_run"): [
        ("(1 - it / args.iterations)", "1"),
        ('z[0].numel() if args.reduction == "mean" else 1', "z[0].numel()"),
        ("old[index], advantage[index]", "old[index], reward[index]"),
        ("+ args.kl_weight * kl", "- args.kl_weight * kl"),
        ("z = old_mean + old_log_std.exp() * eps", "z = old_mean + eps"),
    ],
    # ------------------------------------------------------------ Inverse Noise Correction
    ("inverse_noise_correction.py", "euler_sample", f"{INVERSE} -k is_the_loop"): [
        ("(after - now)", "(now - after)"),
        ("now.expand(len(x))", "after.expand(len(x))"),
    ],
    ("inverse_noise_correction.py", "euler_invert", f"{INVERSE} -k 'nonlinear or contraction_is'"): [
        ("x[active] - (after - now) * v", "x[active] + (after - now) * v"),
        ("now.expand(len(active))", "after.expand(len(active))"),
        ("length[1] / length[0]", "length[0] / length[1]"),
    ],
    (
        "inverse_noise_correction.py",
        "euler_invert",
        f"{INVERSE} -k 'residual or expanding or iterations_are'",
    ): [
        ("torch.maximum(residual[tried], change[tried])", "change[tried]"),
        (".square().mean(1).sqrt()", ".square().sum(1).sqrt()"),
        ("converged = residual <= tolerance", "converged = residual >= 0"),
    ],
    ("inverse_noise_correction.py", "anderson", f"{INVERSE} -k acceleration"): [
        ("moves[:, 1] - moves[:, 0]", "moves[:, 1]"),
        ("return new - (moves[:, 1]", "return new + (moves[:, 1]"),
        ("change @ (new - old)", "change @ (old - new)"),
    ],
    ("inverse_noise_correction.py", "interpolant", f"{INVERSE} -k 'test_interpolant or zero_only_for'"): [
        ("angle.cos() * w - angle.sin() * eps", "angle.cos() * w + angle.sin() * eps"),
        ("angle.cos() * eps + angle.sin() * w", "angle.sin() * eps + angle.cos() * w"),
        ("angle = 0.5 * math.pi", "angle = math.pi"),
        ("0.5 * math.pi * (angle", "math.pi * (angle"),
    ],
    ("inverse_noise_correction.py", "correct", f"{INVERSE} -k 'exact_corrector or these_times'"): [
        ("m / steps", "(m + 1) / steps"),
        ("device=y.device)) / steps", "device=y.device)) / (steps + 1)"),
    ],
    ("inverse_noise_correction.py", "gaussian_of", f"{INVERSE} -k is_the_control"): [
        ("vectors / values", "vectors * values"),
        (".sqrt()", ""),
        ('"mean": flat.mean(0)', '"mean": 0 * flat.mean(0)'),
    ],
    ("inverse_noise_correction.py", "match_norms", f"{INVERSE} -k match_norms"): [
        ("length.square() / 2", "length.square()"),
        ("quantile) / length)", "quantile))"),
    ],
    ("inverse_noise_correction.py", "flow_loss", f"{INVERSE} -k test_flow_loss"): [
        ("- (eps - x)", "- (x - eps)"),
        ("(1 - level) * x + level * eps", "level * x + (1 - level) * eps"),
    ],
    ("inverse_noise_correction.py", "frechet_distance", f"{INVERSE} -k frechet_distance"): [
        ("- 2 * cross", "- cross"),
        ("a.var(0).sum() + b.var(0).sum()", "a.var(0).sum() + a.var(0).sum()"),
        ("a.mean(0) - b.mean(0)", "a.mean(0) + b.mean(0)"),
        ("root @ torch.cov(b.T)", "torch.cov(b.T)"),
    ],
    ("inverse_noise_correction.py", "noise_statistics", f"{INVERSE} -k noise_statistics"): [
        ("square.sqrt().mean()", "square.mean().sqrt()"),
        ("(z - z.mean(0)) / z.std(0)", "z / z.std(0)"),
        ("centred**4", "centred**2"),
        ("(centred.square() - 1) / centred.square().std()", "centred.square() / centred.square().std()"),
        ("values[..., lag:] * values[..., :-lag]", "values[..., 1:] * values[..., :-1]"),
    ],
    ("inverse_noise_correction.py", "new_network", f"{INVERSE} -k is_the_control"): [
        ("torch.nn.init.zeros_(parameter)", "torch.nn.init.ones_(parameter)")
    ],
    ("inverse_noise_correction.py", "count_flops", f"{INVERSE} -k count_flops"): [
        ("sdpa_kernel(SDPBackend.MATH), ", "")
    ],
    (
        "inverse_noise_correction.py",
        "Corrector.velocity",
        f"{INVERSE} -k 'told_the_norm or is_the_control'",
    ): [
        ("return a + b * y", "return a"),
        ("1000 * (1 - t)", "1000 * t"),
        ("(square - 1)", "square"),
    ],
    ("inverse_noise_correction.py", "Corrector.standardise", f"{INVERSE} -k is_the_control"): [
        ('- self.gaussian["mean"]', '+ self.gaussian["mean"]'),
        ('z / self.settings["scale"]', 'z * self.settings["scale"]'),
    ],
    ("inverse_noise_correction.py", "Corrector.destandardise", f"{INVERSE} -k is_the_control"): [
        ('self.gaussian["mean"] + w', "w"),
    ],
    ("inverse_noise_correction.py", "read_settings", f"{INVERSE} -k refuses_another"): [
        ('sigmas != settings["sigmas"]', "False"),
        ('model_hash(network) != settings["model_hash"]', "False"),
    ],
    ("inverse_noise_correction.py", "fit", f"{INVERSE} -k test_fit"): [
        ("min(1, (i + 1) / 100)", "1"),
        ("math.cos(math.pi * i / updates)", "math.cos(math.pi * (i + 1) / updates)"),
        ("derived_seed(*key, i)", "derived_seed(*key, 0)"),
        ("(i + 1) / (i + 10)", "i / (i + 10)"),
        ("parameters, 1.0)", "parameters, 2.0)"),
        ("p.data for p in parameters], average)", "p.data for p in parameters], parameters)"),
        ("network.load_state_dict(weights)", "pass"),
    ],
    ("inverse_noise_correction.py", "flow_objective", f"{INVERSE} -k test_flow_objective"): [
        ("torch.rand(batch, generator=generator)", "torch.rand(batch, generator=generator).square()"),
        ("torch.randint(len(images),", "torch.randint(batch,"),
    ],
    ("inverse_noise_correction.py", "update_flops", f"{INVERSE} -k test_results"): [(".backward()", "")],
    ("inverse_noise_correction.py", "train_corrector", f"{INVERSE} -k best_held_out"): [
        ('if value < state["best"]', 'if value > state["best"]'),
        ('load_state_dict(state["final"])', 'load_state_dict(state["weights"])'),
    ],
    ("inverse_noise_correction.py", "train_corrector", f"{INVERSE} -k learnt_corrector"): [
        ("- target).square()", "+ target).square()"),
        ("/ (4 * len(held_out))", "/ len(held_out)"),
    ],
    ("inverse_noise_correction.py", "invert_images", f"{INVERSE} -k failed_images"): [
        ("inversion.noise[inversion.converged]", "inversion.noise[: inversion.converged.sum()]"),
        ("args.max_failed * len(images)", "args.max_failed * len(x)"),
    ],
    ("inverse_noise_correction.py", "check_inverted", f"{INVERSE} -k failed_images"): [
        ("failed > most", "failed > 2 * most")
    ],
    ("inverse_noise_correction.py", "inversion_report", f"{INVERSE} -k failed_images"): [
        ("images - inverted", "inverted"),
        ("error.mean()", "error.max()"),
    ],
    ("inverse_noise_correction.py", "split_images", f"{INVERSE} -k test_load_images"): [
        ("return images[:count], images[count:]", "return images[:count], images"),
    ],
    ("inverse_noise_correction.py", "add_data_noise", f"{INVERSE} -k test_load_images"): [
        ("+ std *", "+ std**2 *"),
    ],
    ("inverse_noise_correction.py", "sample_images", f"{INVERSE} -k test_results"): [
        ("initial_noise(eps), sigmas)", "eps, sigmas)"),
        ('derived_seed("eval", number)', 'derived_seed("eval", number + 1)'),
    ],
    ("inverse_noise_correction.py", "main", f"{INVERSE} -k test_results"): [
        ("noises.square().mean().sqrt()", "noises.square().mean()"),
        ("math.ceil(corrected_flops / call_flops)", "math.floor(corrected_flops / call_flops)"),
        ("sum(training_flops.values())", 'training_flops["corrector"]'),
        ("match_norms(eps, norms)", "eps"),
    ],
    ("inverse_noise_correction.py", "main", f"{INVERSE} -k other_grid"): [
        ("args.grid_power if k == n else 1.0", "args.grid_power"),
    ],
    # ------------------------------------------------------------ models
    ("common.py", "family_default", f"{FAMILIES} -k own_defaults"): [
        ("values[1 + family.flow]", "values[2 - family.flow]"),
    ],
    ("common.py", "find_family", f"{FAMILIES} -k distilled"): [
        ("bool(read(file).get(setting)) == value", "bool(read(file).get(setting)) != value"),
    ],
    ("common.py", "Flux", f"{FAMILIES} -k 'grid_and_calls and flux'"): [
        ("m.latent_shape[1] * m.latent_shape[2] // 4", "m.latent_shape[1] * m.latent_shape[2]"),
        ("np.linspace(1.0, 1 / steps, steps)", "np.linspace(1.0, 0.5 / steps, steps)"),
        ("return half / (1 - half)", "return half"),
    ],
    ("common.py", "Flux.predict", f"{FAMILIES} -k 'test_denoising_loss and flux'"): [
        ("torch.full((len(x),), guidance", "torch.full((len(x),), 1.0"),
        ("t.expand(len(x)).to(x.dtype) / 1000", "t.expand(len(x)).to(x.dtype)"),
    ],
    ("common.py", "Flux2KleinBase.to_vae", f"{FAMILIES} -k 'equals_stock and klein_base'"): [
        ("torch.sqrt(variance + epsilon)", "(variance + epsilon)"),
    ],
    ("common.py", "Flux2KleinBase.mu", f"{FAMILIES} -k 'grid_and_calls and klein'"): [
        ("compute_empirical_mu(self.tokens(m), steps)", "compute_empirical_mu(self.tokens(m), 4)"),
    ],
    ("common.py", "refuse_missing", f"{FOLDERS} -k missing_weight"): [("sorted(weights)", "[]")],
    ("common.py", "StableDiffusion.size", f"{FOLDERS} -k size_of"): [
        ("else size\n", "else size[::-1]\n"),
    ],
    ("common.py", "Model.alpha_sigma", TWO_STEPS): [
        ("abar.sqrt(), (1 - abar).sqrt()", "abar, 1 - abar"),
        ("(1 - abar).sqrt()", "(1 - abar)"),
        ("at.cpu().long().clamp(min=-1)", "(at.cpu().long() + 1).clamp(max=999)"),
    ],
    ("common.py", "Model.alpha_sigma", f"{FAMILIES} -k 'test_denoising_loss and sd3'"): [
        ("alpha = 1 - sigma", "alpha = (1 - sigma**2) ** 0.5")
    ],
    ("common.py", "Model.draw_timesteps", f"{FAMILIES} -k timesteps_to_train"): [
        ("torch.randint(int(above) + 1,", "torch.randint(int(above),"),
        ("self.train_timesteps, (n,)", "self.train_timesteps - 1, (n,)"),
        ("shift * u / (1 + (shift - 1) * u)", "u / (1 + (shift - 1) * u)"),
        ("sigma / (shift - (shift - 1) * sigma)", "sigma"),
        ("chance + (1 - chance) *", "chance + chance *"),
    ],
    ("common.py", "Model.split", f"{FAMILIES} -k 'both_reach and sd3'"): [
        ("text[:, self.tokens :].flatten(1)", "text[:, : self.tokens].flatten(1)"),
    ],
    ("common.py", "StableDiffusion.to_vae", TWO_STEPS): [
        ("latents / config.scaling_factor", "latents * config.scaling_factor")
    ],
    ("common.py", "Model.add_lora", f"{PIPELINE} -k 'lora'"): [("lora_alpha=alpha", "lora_alpha=rank")],
    ("common.py", "Model.save_lora", f"{PIPELINE} -k saved_lora"): [
        (
            '_lora_layers": state, **_collate_lora_metadata({self.part: self.denoiser})',
            '_lora_layers": state',
        ),
    ],
    ("common.py", "read_switch", f"{FAMILIES} -k another_flow"): [
        ("abs(sigma - level) < 1e-3", "abs(sigma - level) < 1")
    ],
    ("common.py", "stock_call", f"{RUN} -k printed_code"): [
        ("derived_seed('eval', 0, 0)", "derived_seed('eval', 0, 1)"),
        ("num_inference_steps={args.steps}", "num_inference_steps={args.steps + 1}"),
    ],
    ("common.py", "stock_switch", f"{PGRAFT} -k printed_code"): [
        ("timesteps > {level}", "timesteps >= {level}")
    ],
    ("common.py", "Flow.grid", f"{INVERSE} -k 'equals_the_stock or grid_is_even'"): [
        ("(k / steps) ** power", "k / steps"),
        ("range(steps, 0, -1)", "range(steps - 1, -1, -1)"),
    ],
    ("common.py", "Flow.velocity", f"{INVERSE} -k equals_the_stock"): [
        ("sigma * self.scheduler", "(1 - sigma) * self.scheduler")
    ],
    ("common.py", "predict_velocity", f"{INVERSE} -k equals_the_stock"): [
        ("(len(x),), classes,", "(len(x),), classes - 1,")
    ],
    ("common.py", "model_hash", f"{INVERSE} -k model_hash"): [
        (".float().contiguous()", ".half().contiguous()")
    ],
    ("common.py", "derived_seed", f"{EQUATIONS} -k seed"): [
        ("SeedSequence(words)", "SeedSequence(words[:-1])"),
        ("SeedSequence(words)", "SeedSequence([sum(words)])"),
        (" >> np.uint64(1)", ""),
    ],
    ("common.py", "draw_noise", TWO_STEPS): [
        ("range(steps + 1)", "range(steps + 2)"),
        ("torch.stack(draws, 1)", "torch.stack(draws, 1).flip(0)"),
    ],
    ("common.py", "schedule_prompts", f"{EQUATIONS} -k schedule"): [
        ("divmod(r, count // per_round)", "divmod(r, count // per_round + 1)"),
        ("[place * per_round :", "[0:"),
        ('"prompts", order))', '"prompts", 0))'),
    ],
    ("common.py", "check_finite", f"{FAMILIES} -k 'stay_infinite and graft.py-True'"): [
        ("scaler.get_scale() > 1", "scaler.get_scale() > 1e3")
    ],
    ("utils/runs.py", "paired_table", f"{EQUATIONS} -k paired_table"): [
        ("change.std() / len(change) ** 0.5", "change.std()"),
        ("tuned[name] - base[name]", "base[name] - tuned[name]"),
    ],
    # ------------------------------------------------------------ rewards
    ("rewards.py", "jpeg_compressibility", f"{REWARDS} -k jpeg"): [("-torch.tensor", "torch.tensor")],
    ("rewards.py", "image_embeddings", f"{MODELS} -k clip_scores"): [
        ("F.normalize(embeddings.float(), dim=1)", "embeddings.float()"),
    ],
    ("rewards.py", "text_embeddings", f"{MODELS} -k clip_scores"): [
        (".pooler_output.float(), dim=1)", ".pooler_output.float(), dim=0)")
    ],
    ("rewards.py", "pickscore", f"{MODELS} -k clip_scores"): [
        (".exp()", ""),
        ("scale * cosine", "cosine"),
    ],
    ("rewards.py", "vqa", f"{MODELS} -k 'vqa_score or neither_batch'"): [
        (".float().softmax(1)[", ".float()["),
        ('padding_side="left"', 'padding_side="right"'),
    ],
    ("rewards.py", "edit_distance", f"{OCR} -k edit_distance"): [
        ("before[j] + 1", "before[j]"),
        ("(letter != other)", "1"),
    ],
    ("rewards.py", "text_score", f"{OCR} -k text_score"): [
        ("if wanted in seen", "if wanted == seen"),
        ("min(edit_distance(seen, wanted), len(wanted))", "edit_distance(seen, wanted)"),
        ("/ len(wanted)", "/ max(len(seen), len(wanted))"),
    ],
    ("rewards.py", "Reward.scores", f"{REWARDS} -k weighted_sum"): [("weight * parts[name]", "parts[name]")],
    ("rewards.py", "image_statistics", f"{REWARDS} -k image_statistics"): [("g.std()", "g.var()")],
    ("rewards.py", "diversity", f"{REWARDS} -k diversity"): [("numel() ** 0.5", "numel()")],
    # ------------------------------------------------------------ DDPO
    ("benchmarks/ddpo.py", "step_distribution", f"{DDPO} -k step_distribution"): [
        ("sigma_next**2 - std**2", "sigma_next**2"),
        ("(alpha * sigma_next / alpha_next)", "(sigma_next / alpha_next)"),
    ],
    ("benchmarks/ddpo.py", "log_prob", f"{DDPO} -k normal_density"): [("- math.log(std)", "+ math.log(std)")],
    ("benchmarks/ddpo.py", "ppo_loss", f"{DDPO} -k 'clip_cuts or finite_difference'"): [
        ("torch.minimum", "torch.maximum"),
        ("-torch.minimum", "torch.minimum"),
        ("1 - clip, 1 + clip", "1 - clip, 1 + 2 * clip"),
    ],
    ("benchmarks/ddpo.py", "advantages", f"{DDPO} -k advantages"): [
        ("rewards.mean(1, keepdim=True)", "rewards.mean()"),
        ("correction=0", "correction=1"),
    ],
    # ------------------------------------------------------------ DiffusionNFT
    ("benchmarks/diffusion_nft.py", "optimality", f"{NFT} -k optimality"): [
        ("rewards.mean(1, keepdim=True)", "rewards.mean()"),
        ('if spread == "round" else', 'if spread == "prompt" else'),
        ("rewards.std(1, correction=0", "rewards.std(1, correction=1"),
        ("factor * deviation", "deviation"),
        (".clamp(min=1e-6)", ""),
        (".clamp(-1, 1)", ""),
        ("0.5 + 0.5 *", "0.5 - 0.5 *"),
    ],
    ("benchmarks/diffusion_nft.py", "implicit_policies", f"{NFT} -k 'implicit or written or even_odds'"): [
        ("(1 - beta) * v_old + beta * v,", "beta * v_old + (1 - beta) * v,"),
        ("(1 + beta) * v_old - beta * v", "(1 - beta) * v_old + beta * v"),
        ("(1 + beta) * v_old - beta * v", "(1 + beta) * v - beta * v_old"),
    ],
    ("benchmarks/diffusion_nft.py", "clean_prediction", f"{NFT} -k clean_prediction"): [
        ("(x_t - sigma_t * prediction) / alpha_t", "x_t - sigma_t * prediction"),
        ('if prediction_type == "v_prediction" else 1', "if True else 1"),
        ("* x_t - sigma_t * prediction\n", "* x_t + sigma_t * prediction\n"),
    ],
    (
        "benchmarks/diffusion_nft.py",
        "contrastive_loss",
        f"{NFT} -k 'written or gaussian or positive_branch'",
    ): [
        ("r * good + (1 - r) * bad", "(1 - r) * good + r * bad"),
        ("r * good + (1 - r) * bad", "r * good - (1 - r) * bad"),
        ("r * good + (1 - r) * bad", "r * good"),
        ("error.detach().abs()", "error.abs()"),
        ("error.detach().abs().mean(1)", "error.detach().abs().mean()"),
        (".clamp(min=1e-5)", ""),
        ("error.square().mean(1)", "error.square().sum(1)"),
    ],
    ("benchmarks/diffusion_nft.py", "kept_share", f"{NFT} -k kept_share"): [
        ("min(rise * i, most)", "max(rise * i, most)"),
        ("rise * i", "rise * (i - 1)"),
    ],
    ("benchmarks/diffusion_nft.py", "weights_set_to", f"{NFT} -k weights_come_back"): [
        (
            "            parameter.data = value\n        yield",
            "            parameter.data = parameter\n        yield",
        ),
        ("zip(parameters, own)", "zip(parameters, values)"),
    ],
    # ------------------------------------------------------------ AWM
    ("benchmarks/awm.py", "advantages", f"{AWM} -k advantages"): [
        ("rewards - rewards.mean(1, keepdim=True)", "rewards - rewards.mean()"),
        ('if spread == "round" else', 'if spread == "prompt" else'),
        ("rewards.std(1, correction=0", "rewards.std(1, correction=1"),
        (".clamp(min=1e-6)", ""),
        (".clamp(-limit, limit)", ".clamp(max=limit)"),
    ],
    ("benchmarks/awm.py", "matching_loss", f"{AWM} -k matching_loss"): [
        (".mean(1)", ".sum(1)"),
        ("4 * sigma_t", "4"),
        ("** 0.25", "** 0.5"),
        ("square + 1e-10", "square"),
    ],
    ("benchmarks/awm.py", "ppo_loss", f"{AWM} -k 'clip_cuts or sampling_policy or grafts_gradient'"): [
        ("(loss_old - loss).exp()", "(loss - loss_old).exp()"),
        ("torch.minimum", "torch.maximum"),
        ("1 - clip, 1 + clip", "1 - clip, 1 + 2 * clip"),
        ("return -torch", "return torch"),
    ],
    # ------------------------------------------------------------ the KL of sampling paths
    ("benchmarks/path_kl.py", "path_kl", f"{KL} -k 'chains or refused'"): [
        ("(2 * std**2)", "std**2"),
        ("(2 * std**2)", "(2 * std)"),
        (".sum(1)", ".mean(1) * 2"),
        ("x = tuned + std", "x = base + std"),
        ("k < switch_at", "k <= switch_at"),
        ("std * noise[k + 1]", "std * noise[k]"),
    ],
    ("benchmarks/path_kl.py", "measure", f"{KL} -k run_folders"): [
        ("if (folder / SWITCH_FILE).is_file()", "if False"),
    ],
}

COLUMNS = ("file", "function", "tests", "old", "new")
MUTATIONS = [  # see COLUMNS
    (*where, *change) for table in (TABLE, SHARED) for where, changes in table.items() for change in changes
]
for (_file, _function), _changes in LOOPS.items():
    MUTATIONS += [(_file, _function, LOOP_TESTS[_file], old, new) for old, new in _changes]

parse = functools.cache(ast.parse)
clock = count(10**9)  # a new second for every written file: no bytecode of another mutation is used


def mutate(source: str, function: str, old: str, new: str) -> str:
    """The source with `old` replaced by `new` in one function, "name" or "Class.name". ValueError unless
    `old` stands there exactly once, not counting the docstring."""
    node = parse(source)
    for name in function.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((n for n in node.body if isinstance(n, kinds) and n.name == name), None)
        if node is None:
            raise ValueError(f"there is no {function}")
    lines = source.splitlines(keepends=True)
    first, last = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno, node.end_lineno
    text = "".join(lines[first:last])
    if text.count(old) != 1:
        raise ValueError(f"{function}: {old!r} stands there {text.count(old)} times")
    return "".join(lines[:first]) + text.replace(old, new) + "".join(lines[last:])


def run_tests(folder: str, tests: str, queue) -> None:
    """In a new process: run the tests in the folder. Puts (exit code, the first test that failed) into the
    queue."""
    import pytest

    class FirstFailure:
        name = ""

        def pytest_runtest_logreport(self, report):
            self.name = self.name or (report.nodeid if report.failed else "")

    os.chdir(folder)
    failure = FirstFailure()
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "benchmarks")]
    signal.alarm(LIMIT)
    with open("output.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        options = ["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
        code = int(pytest.main(options, plugins=[failure]))
    queue.put((code, failure.name))


def outcome(context, folder: Path, tests: str) -> tuple[int, str]:
    """What run_tests puts into the queue. Tests that do not end in time have failed. SystemExit if the tests
    do not run."""
    queue = context.SimpleQueue()
    process = context.Process(target=run_tests, args=(str(folder), tests, queue))
    process.start()
    process.join()
    if queue.empty() and process.exitcode == -signal.SIGALRM:
        return 1, f"no end within {LIMIT} s"
    code, failed = (process.exitcode, "") if queue.empty() else queue.get()
    if code != 0 and not (code == 1 and failed):
        output = (folder / "output.txt").read_text()[-3000:]
        raise SystemExit(f"{tests}: the tests do not run, exit code {code}\n{output}")
    return code, failed


def copy_repository(folder: Path) -> None:
    """Copy the files that git tracks or would add, without stored results."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def write(path: Path, text: str) -> None:
    path.write_text(text)
    os.utime(path, (moment := next(clock), moment))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="")
    parser.add_argument("--rest", action="store_true")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    begin, stored = time.perf_counter(), json.loads(RESULT.read_text()) if RESULT.exists() else []
    rows = {tuple(row[name] for name in COLUMNS): row for row in stored}
    chosen = [m for m in MUTATIONS if options.only in " ".join(m)]
    if options.rest:
        chosen = [m for m in chosen if not rows.get(m, {}).get("caught_by")]
    sources = {file: (ROOT / file).read_text() for file in {m[0] for m in chosen}}
    texts = {m: mutate(sources[m[0]], m[1], *m[3:]) for m in chosen}

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        free = [Path(temporary) / str(i) for i in range(options.jobs)]  # copies that no thread uses
        for folder in free:
            folder.mkdir()
            copy_repository(folder)

        def try_mutation(mutation):
            file, tests = mutation[0], mutation[2]
            folder = free.pop()
            write(folder / file, texts[mutation])
            _, failed = outcome(context, folder, tests)
            write(folder / file, sources[file])
            free.append(folder)
            return dict(zip(COLUMNS, mutation)) | {"caught_by": failed}

        for tests in dict.fromkeys([*CHEAP_FIRST, *LOOP_TESTS.values()]):
            part = [m for m in chosen if m[2] == tests or m[2].startswith(f"{tests} -k")]
            if not part:
                continue
            expressions = dict.fromkeys(shlex.split(m[2])[2] for m in part if m[2] != tests)
            unchanged = f'{tests} -k "({") or (".join(expressions)})"' if expressions else tests
            code, failed = outcome(context, free[0], unchanged)
            if code:
                raise SystemExit(f"{failed} must pass on the unchanged code")
            print(f"{tests}: the tests that are used pass on the unchanged code", flush=True)
            for row in pool.map(try_mutation, part):
                rows[tuple(row[name] for name in COLUMNS)] = row
                RESULT.write_text(json.dumps([rows[m] for m in MUTATIONS if m in rows], indent=1) + "\n")
                verdict = "SURVIVED"
                if row["caught_by"]:
                    verdict = f"caught by {row['caught_by'].removeprefix('tests/')}"
                print("{file} {function}: {old!r} -> {new!r}: {}".format(verdict, **row), flush=True)
    survived = [m for m in chosen if not rows[m]["caught_by"]]
    seconds = time.perf_counter() - begin
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations caught, {seconds:.0f} s")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
