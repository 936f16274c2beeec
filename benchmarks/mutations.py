"""Do the tests catch wrong equations? Each mutation changes one place of one function in a copy of the repository (a sign, an index,
a level, a weight, a clamp, a normaliser, who wins a tie) and the tests named beside it must fail; unchanged they must pass.

Run: OMP_NUM_THREADS=1 python benchmarks/mutations.py                (all, some ten minutes on one core; --jobs 2 runs two at a time)
     OMP_NUM_THREADS=1 python benchmarks/mutations.py --only accept  (those whose file, function or texts contain the word)
Result: a table, and benchmarks/results/mutations.json, in which --only replaces its rows; exit code 1 if a mutation survives.
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

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "mutations.json"
PRELOAD = [
    "pytest",
    "torch",
    "tyro",
    "matplotlib.figure",
    "torch.utils.tensorboard",
    "peft",
    "safetensors.torch",
    "torch.utils.flop_counter",
]
PRELOAD += ["transformers.models.clip.modeling_clip", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"]
LIMIT = 600  # seconds for the tests of one mutation

EQUATIONS, PGRAFT, NOISE = "tests/test_equations.py", "tests/test_pgraft.py", "tests/test_noise_ppo.py"
INVERSE, PIPELINE, FAMILIES = "tests/test_inverse_noise_correction.py", "tests/test_pipeline.py", "tests/test_families.py"
REWARDS, MODELS, DDPO = "tests/test_rewards.py", "tests/test_reward_models.py", "tests/test_ddpo.py"
TWO_STEPS = "tests/test_pipeline.py -k 'test_sample_equals_stock_pipeline and 4'"

# {(file, function, test files and -k): [(old, new)]}; old stands once in the function. accept, _rank and
# guided_prediction, the copies in pgraft.py, are compared with graft.py's by a test, so that they are changed in graft.py alone.
TABLE = {
    # ------------------------------------------------------------ GRAFT
    ("graft.py", "accept", f"{EQUATIONS} -k 'topk or quantiles'"): [
        ("reshape(-1, size)) < best", "reshape(-1, size)) <= best")
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k preference"): [
        ("chance.reshape(-1, size)) < best", "chance.reshape(-1, size)) >= best"),
        ("chance.reshape(-1, size))", "torch.zeros(len(groups), size))"),  # ties by index
        ("else (2, 1)", "else (2, 2)"),
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k flat"): [
        ("groups != groups[:, :1]", "groups == groups[:, :1]"),
        ("mask & ((groups", "mask | ((groups"),
        (".any(1, keepdim=True)", ".all(1, keepdim=True)"),
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k exponential"): [
        ("((rewards - bound) / beta)", "((bound - rewards) / beta)"),
        ("((rewards - bound) / beta)", "((rewards - bound) * beta)"),
        ("rewards.max(1, keepdim=True).values", "rewards.max()"),
        ("rewards.max(1, keepdim=True).values", "rewards.mean(1, keepdim=True)"),
    ],
    ("graft.py", "accept", f"{EQUATIONS} -k threshold"): [("mask = rewards >= threshold", "mask = rewards > threshold")],
    ("graft.py", "accept", f"{EQUATIONS} -k 'keys or copies'"): [
        ("rank[:, None, :] < rank[:, :, None]", "rank[:, None, :] > rank[:, :, None]"),
        ("mask[:, None, :] & same", "same"),
        ("torch.rand(rewards.shape, generator=generator).to(rewards.device))", "torch.arange(samples).expand_as(rewards))"),
    ],
    ("graft.py", "_rank", f"{EQUATIONS} -k 'equal_rewards or ties'"): [
        ("order = chance.argsort(1)", "order = torch.arange(chance.shape[1]).expand_as(chance)"),
    ],
    ("graft.py", "_rank", f"{EQUATIONS} -k topk"): [
        ("descending=True", "descending=False"),
        ("return order.argsort(1)", "return order"),
    ],
    ("rewards.py", "reshaped_reward", f"{EQUATIONS} -k 'reshaped_reward or quantiles or implied_kl'"): [
        ("u ** (num_samples - 1 - j)", "u ** (num_samples - j)"),
        ("math.comb(num_samples - 1, j)", "math.comb(num_samples, j)"),
        ("(1 - u) ** j", "(1 - u)"),
        ("range(top_k)", "range(top_k + 1)"),
    ],
    ("rewards.py", "implied_kl", f"{EQUATIONS} -k implied_kl"): [
        ("- (num_samples - 1) / num_samples", "- num_samples / (num_samples + 1)"),
        ("- (num_samples - 1) / num_samples", "+ (num_samples - 1) / num_samples"),
        ("num_samples / top_k *", "num_samples *"),
    ],
    ("rewards.py", "estimated_kl", f"{EQUATIONS} -k estimated_kl"): [
        ("implied_kl(2, 1)", "implied_kl(rewards.shape[1], 1)"),
        ("chance.mean(1, keepdim=True)", "chance.mean()"),
        ("chance.mean(1, keepdim=True)", "chance.sum(1, keepdim=True)"),
        ("(rewards >= threshold)", "(rewards > threshold)"),
        ("/ beta)", "* beta)"),
    ],
    ("graft.py", "training_target", f"{EQUATIONS} -k 'training_target or regress'"): [
        ("x_t = alpha_t * x_0 + sigma_t * noise", "x_t = sigma_t * x_0 + alpha_t * noise"),
        ("alpha_t * noise - sigma_t * x_0", "alpha_t * noise + sigma_t * x_0"),
        ('"epsilon": noise', '"epsilon": x_0'),
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
    ("rewards.py", "schedule_prompts", f"{EQUATIONS} -k schedule"): [
        ("divmod(r, count // per_round)", "divmod(r, count // per_round + 1)"),
        ("[place * per_round :", "[0:"),
        ('"prompts", order))', '"prompts", 0))'),
    ],
    ("rewards.py", "paired_table", f"{EQUATIONS} -k paired_table"): [
        ("change.std() / len(change) ** 0.5", "change.std()"),
        ("tuned[name] - base[name]", "base[name] - tuned[name]"),
    ],
    # ------------------------------------------------------------ P-GRAFT
    ("pgraft.py", "shaped_target", f"{PGRAFT} -k 'regression or clean_end'"): [
        ("a = alpha_t / alpha_s", "a = alpha_t"),
        ("(a * sigma_s) ** 2", "sigma_s**2"),
        ("of_noise, of_x_s = sigma_t / b, 0 * a", "of_noise, of_x_s = b / sigma_t, 0 * a"),
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
    ("pgraft.py", "switch_step", f"{PGRAFT} -k test_switch_step"): [("t > switch_timestep", "t >= switch_timestep")],
    ("pgraft.py", "sample", f"{PGRAFT} -k composition"): [
        ("noise[switch_at + 1 :]", "noise[switch_at:]"),
        (
            "noise[0], levels[: switch_at + 1], noise[1 : switch_at + 1]",
            "noise[0], levels[:switch_at], noise[1 : switch_at + 1]",
        ),
        ("model.lora_merged() if tuned else model.lora_off()", "model.lora_off()"),
        ("return x_s, denoise(model, x_s, levels[switch_at:]", "return x_s, denoise(model, noise[0], levels[switch_at:]"),
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
    ("rewards.py", "recommend", f"{PGRAFT} -k recommendation"): [
        ('row["unresolved"] + row["se"] <= limit', 'row["unresolved"] <= limit'),
        ("for row in rows:", "for row in rows[::-1]:"),
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
    ("rewards.py", "explained_variance", f"{NOISE} -k explained_variance"): [("* samples / (samples - 1)", "")],
    ("noise_ppo.py", "NoisePolicy.forward", f"{NOISE} -k 'standardised_text or options_say'"): [
        ("- self.centre) * self.scale", "- self.centre)"),
        ("log_std * self.learn_std", "log_std * self.learn_mean"),
    ],
    ("noise_ppo.py", "denoise", f"{NOISE} -k 'equals_stock and 4'"): [
        ("(x - sigma * prediction) / alpha, prediction", "x - sigma * prediction, prediction"),
        ("alpha * prediction + sigma * x", "alpha * prediction - sigma * x"),
        ("alpha_next * x_0 + sigma_next * eps", "alpha * x_0 + sigma_next * eps"),
    ],
    ("noise_ppo.py", "sample", f"{NOISE} -k 'equals_stock and 4'"): [("(steps), -1]", "(steps), 0]")],
    ("noise_ppo.py", "sample", f"{NOISE} -k with_a_lora"): [
        ("t > switch", "t >= switch"),
        ("levels[: tuned + 1]", "levels[:tuned]"),
        ("model.lora_off()", "model.lora_merged()"),
    ],
    ("noise_ppo.py", "denoise", f"{FAMILIES} -k same_steps"): [
        ("x - sigma * prediction, x + alpha * prediction", "x - sigma * prediction, x - alpha * prediction"),
    ],
    ("noise_ppo.py", "evaluate", f"{NOISE} -k test_evaluate"): [
        ("log_std.exp().cpu()", "log_std.cpu()"),
        (".amax(2).mean(1)", ".mean(2).mean(1)"),
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
    ("inverse_noise_correction.py", "euler_invert", f"{INVERSE} -k 'residual or expanding or iterations_are'"): [
        ("torch.maximum(residual[tried], change[tried])", "change[tried]"),
        (".square().mean(1).sqrt()", ".square().sum(1).sqrt()"),
        ("residual <= tolerance, contraction", "residual >= 0, contraction"),
    ],
    ("inverse_noise_correction.py", "anderson", f"{INVERSE} -k acceleration"): [
        ("moves[:, 1] - moves[:, 0]", "moves[:, 1]"),
        ("return new - (moves[:, 1]", "return new + (moves[:, 1]"),
        ("change @ (new - old)", "change @ (old - new)"),
    ],
    ("inverse_noise_correction.py", "interpolant", f"{INVERSE} -k 'test_interpolant or only_if_the_law'"): [
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
        ("flat.mean(0), ", "0 * flat.mean(0), "),
    ],
    ("inverse_noise_correction.py", "match_norms", f"{INVERSE} -k match_norms"): [
        ("length.square() / 2", "length.square()"),
        ("quantile) / length)", "quantile))"),
    ],
    ("inverse_noise_correction.py", "Corrector.velocity", f"{INVERSE} -k 'told_the_norm or is_the_control'"): [
        ("return a + b * y", "return a"),
        ("1000 * (1 - t)", "1000 * t"),
        ("(square - 1)", "square"),
    ],
    ("inverse_noise_correction.py", "Corrector.standardise", f"{INVERSE} -k is_the_control"): [
        ('- self.law["mean"]', '+ self.law["mean"]'),
        ('z / self.settings["scale"]', 'z * self.settings["scale"]'),
    ],
    ("inverse_noise_correction.py", "Corrector.destandardise", f"{INVERSE} -k is_the_control"): [
        ('self.law["mean"] + w', "w"),
    ],
    ("shapes/flow.py", "flow_loss", f"{INVERSE} -k test_flow_loss"): [
        ("- (eps - x)", "- (x - eps)"),
        ("(1 - level) * x + level * eps", "level * x + (1 - level) * eps"),
    ],
    ("inverse_noise_correction.py", "train_corrector", f"{INVERSE} -k best_held_out"): [
        ('if value < state["best"]', 'if value > state["best"]'),
    ],
    # ------------------------------------------------------------ shared
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
    ("common.py", "Model.decode", TWO_STEPS): [("/ self.vae.config.scaling_factor", "* self.vae.config.scaling_factor")],
    ("common.py", "Model.add_lora", f"{PIPELINE} -k 'lora'"): [("lora_alpha=alpha", "lora_alpha=rank")],
    ("common.py", "Model.save_lora", f"{PIPELINE} -k saved_lora"): [
        ('_lora_layers": state, **_collate_lora_metadata({self.part: self.denoiser})', '_lora_layers": state'),
    ],
    ("common.py", "derived_seed", f"{EQUATIONS} -k seed"): [
        ("SeedSequence(words)", "SeedSequence(words[:-1])"),
        ("SeedSequence(words)", "SeedSequence([sum(words)])"),
        (" >> np.uint64(1)", ""),
    ],
    # ------------------------------------------------------------ rewards
    ("rewards.py", "frechet_distance", f"{INVERSE} -k frechet_distance"): [
        ("- 2 * cross", "- cross"),
        ("a.var(0).sum() + b.var(0).sum()", "a.var(0).sum() + a.var(0).sum()"),
        ("a.mean(0) - b.mean(0)", "a.mean(0) + b.mean(0)"),
        ("root @ torch.cov(b.T)", "torch.cov(b.T)"),
    ],
    ("rewards.py", "image_embeddings", f"{MODELS} -k clip_scores"): [
        ("F.normalize(embeddings.float(), dim=1)", "embeddings.float()"),
    ],
    ("rewards.py", "text_embeddings", f"{MODELS} -k clip_scores"): [
        (".pooler_output.float(), dim=1)", ".pooler_output.float(), dim=0)")
    ],
    ("rewards.py", "pickscore", f"{MODELS} -k clip_scores"): [
        (".logit_scale.float().exp()", ".logit_scale.float()"),
        ("scale * cosine", "cosine"),
    ],
    ("rewards.py", "vqa", f"{MODELS} -k 'vqa_score or neither_batch'"): [
        (".float().softmax(1)[", ".float()["),
        ('padding_side="left"', 'padding_side="right"'),
    ],
    ("rewards.py", "Reward.scores", f"{REWARDS} -k weighted_sum"): [("weight * parts[name]", "parts[name]")],
    ("rewards.py", "diversity", f"{REWARDS} -k diversity"): [("numel() ** 0.5", "numel()")],
    ("rewards.py", "average_hash", f"{REWARDS} -k average_hash"): [("cells.mean(1, keepdim=True)", "cells.mean()")],
    # ------------------------------------------------------------ DDPO
    ("benchmarks/ddpo.py", "step_law", f"{DDPO} -k step_law"): [
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
    # ------------------------------------------------------------ statistics of pictures
    ("rewards.py", "jpeg_compressibility", f"{REWARDS} -k jpeg"): [("-torch.tensor", "torch.tensor")],
    ("rewards.py", "image_statistics", f"{REWARDS} -k image_statistics"): [("g.std()", "g.var()")],
}
NAMES = ("file", "function", "tests", "old", "new")
MUTATIONS = [(*where, *change) for where, changes in TABLE.items() for change in changes]  # as NAMES says


parse = functools.cache(ast.parse)


def mutated(source: str, function: str, old: str, new: str) -> str:
    """The source with `old` replaced in one function ("name" or "Class.name"); ValueError unless it stands there exactly once."""
    node = parse(source)
    for name in function.split("."):
        found = [n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name]
        if not found:
            raise ValueError(f"there is no {function}")
        node = found[0]
    lines = source.splitlines(keepends=True)
    first, last = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno, node.end_lineno
    text = "".join(lines[first:last])
    if text.count(old) != 1:
        raise ValueError(f"{function} has {text.count(old)} times {old!r}")
    return "".join(lines[:first]) + text.replace(old, new) + "".join(lines[last:])


def run_tests(folder: str, tests: str, queue) -> None:
    """In a new process: run the tests in the folder; puts (exit code, the first test that failed) into the queue."""
    import pytest

    class Watch:
        failed = ""

        def pytest_runtest_logreport(self, report):
            self.failed = self.failed or (report.nodeid if report.failed else "")

    os.chdir(folder)
    watch = Watch()
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "benchmarks")]
    signal.alarm(LIMIT)
    with open("output.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)], plugins=[watch]))
    queue.put((code, watch.failed))


def outcome(context, folder: Path, tests: str) -> tuple[int, str]:
    """What run_tests found; tests that do not end have failed."""
    queue = context.SimpleQueue()
    process = context.Process(target=run_tests, args=(str(folder), tests, queue))
    process.start()
    process.join()
    if queue.empty() and process.exitcode != -signal.SIGALRM:
        raise SystemExit(f"{tests}: crashed, exit code {process.exitcode}")
    return (1, f"no end within {LIMIT} s") if queue.empty() else queue.get()


def copy_repository(folder: Path) -> None:
    """The files that git knows or would take, without results and pictures."""
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("benchmarks/results"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the file, function, tests or texts")
    parser.add_argument("--rest", action="store_true", help="those that the stored result lacks, or that survived")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    begun, stored = time.perf_counter(), json.loads(RESULT.read_text()) if RESULT.exists() else []
    rows = {tuple(row[name] for name in NAMES): row for row in stored}
    chosen = [m for m in MUTATIONS if options.only in " ".join(m)]
    if options.rest:
        chosen = [m for m in chosen if not rows.get(m, {}).get("caught_by")]
    clock = count(10**9)

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        sources = {file: (ROOT / file).read_text() for file in {m[0] for m in chosen}}
        free = [Path(temporary) / str(i) for i in range(options.jobs)]
        for folder in free:
            folder.mkdir()
            copy_repository(folder)

        def write(path, text):  # at a time of its own: bytecode of another mutation is never taken for this one's
            path.write_text(text)
            os.utime(path, (moment := next(clock), moment))

        def unchanged(tests):
            folder = free.pop()
            code, failed = outcome(context, folder, tests)
            if code:
                raise SystemExit(f"unchanged, {tests} must pass: {failed}\n{(folder / 'output.txt').read_text()[-3000:]}")
            free.append(folder)

        def change(mutation, text):
            file, function, tests, old, new = mutation
            folder = free.pop()
            write(folder / file, text)
            code, failed = outcome(context, folder, tests)
            write(folder / file, sources[file])
            if code not in (0, 1) or (code == 1 and not failed):
                raise SystemExit(
                    f"{file}, {function}, {new!r}: the tests do not run\n{(folder / 'output.txt').read_text()[-3000:]}"
                )
            free.append(folder)
            return dict(zip(NAMES, mutation)) | {"caught_by": failed}

        for tests in (EQUATIONS, REWARDS, NOISE, INVERSE, PGRAFT, PIPELINE, DDPO, MODELS, FAMILIES):  # the cheap ones first
            part = [m for m in chosen if m[2].startswith(tests)]
            expressions = dict.fromkeys(shlex.split(m[2])[2] for m in part)
            if part:
                unchanged(f'{tests} -k "({") or (".join(expressions)})"')
                print(f"{tests}: what is needed of it passes on the unchanged code", flush=True)
            texts = [mutated(sources[file], function, old, new) for file, function, _, old, new in part]
            for row in pool.map(change, part, texts):
                rows[tuple(row[name] for name in NAMES)] = row
                RESULT.write_text(json.dumps([rows[m] for m in MUTATIONS if m in rows], indent=1) + "\n")
                verdict = f"caught by {row['caught_by'].removeprefix('tests/')}" if row["caught_by"] else "SURVIVED"
                print("{file} {function}: {old!r} -> {new!r}: {}".format(verdict, **row), flush=True)
    survived = [m for m in chosen if not rows[m]["caught_by"]]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} mutations caught, {time.perf_counter() - begun:.0f} s")
    return int(bool(survived))


if __name__ == "__main__":
    sys.exit(main())
