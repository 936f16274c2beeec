"""Evaluate what graft.py, pgraft.py or noise_ppo.py left, on any prompts, rewards, steps, guidance or switch.

Run: python benchmarks/evaluate.py <run folder>                      (as the run itself did at its end)
     python benchmarks/evaluate.py <run folder> --prompts my.txt --steps 20
     python benchmarks/evaluate.py <run folder> --switch 0.4         (the base model from this level on)
Base and tuned model make their images from the same seeds. Of a noise policy, "standard" is the model with
standard noise, "learnt" the model with the policy's. A run folder of ddpo.py, diffusion_nft.py or awm.py is
evaluated like one of graft.py.
Result: the paired table, printed; results.json and grid.png in --output.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import (
    LORA_FILE,
    SWITCH_FILE,
    Device,
    Dtype,
    check_device,
    check_guidance,
    check_model,
    find_lora,
    load_model,
    read_switch,
    stock_call,
    stock_code,
    stock_switch,
)
from graft import evaluate as evaluate_graft
from noise_ppo import NoisePolicy, text_features
from noise_ppo import evaluate as evaluate_noise
from noise_ppo import usage_code as policy_code
from pgraft import evaluate as evaluate_pgraft
from pgraft import switch_step
from rewards import read_rewards
from utils.figures import save_grid
from utils.prompts import read_prompt_sets, read_prompts
from utils.runs import (
    InputError,
    check_output,
    check_range,
    make_run_folder,
    paired_table,
    print_table,
    run_script,
    write_json,
)

POLICY_FILE = "noise_ppo.json"  # what noise_ppo.py leaves beside its policy
NEEDED = (
    "seed model t5 device dtype prompts eval_prompts eval_samples steps guidance sample_batch reward".split()
)


@dataclass
class Args:
    """Evaluate a run folder of graft.py, pgraft.py or noise_ppo.py. What is left out is as in the run."""

    run: tyro.conf.Positional[str] = ""  # the run folder
    output: str = ""  # folder of the results; left out: runs/evaluate__<run folder>__<seed>__<time>
    resume: str = ""  # --output of an evaluation that was stopped: start it again there
    device: Device | None = None  # auto: CUDA or MPS if there is one
    dtype: Dtype | None = None  # precision of the model

    model: str | None = None  # folder or hub id of the pipeline, if it has moved
    model_config: str | None = None  # configuration of a single file as --model, if it has moved; "": none
    lora: str | None = None  # run folder of the LoRA below a noise policy, if it has moved
    prompts: str = ""  # .txt (one a line), .csv, .tsv or .jsonl; file.csv:column; left out: the held-out ones
    eval_samples: int | None = None  # images per prompt
    steps: int | None = None  # steps of the sampler
    guidance: float | None = None  # classifier-free guidance; 1: none
    eta: float | None = None  # 0: deterministic; 1: as random as DDPM; not of a noise policy
    sample_batch: int | None = None  # images sampled at a time
    switch: float | None = None  # level t / T from which on the base model denoises

    reward: str | None = None  # a name of rewards.py, file.py:function, or 0.7*one+0.3*other
    eval_rewards: str | None = None  # further rewards, with commas
    reward_device: Device | None = None  # of rewards that are models
    reward_dtype: Dtype | None = None  # their precision
    reward_batch: int | None = None  # images that they score at a time

    def __post_init__(self):
        """InputError for a value out of range."""
        check_range(self, "eval_samples", 2, 10**4)
        check_range(self, "steps", 1, 999)
        check_range(self, "guidance", 1, 10**6)
        check_range(self, "eta", 0, 1)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "reward_batch", 1, 10**6)
        if self.switch is not None and not 0 < self.switch < 1:
            raise InputError(f"--switch {self.switch}: must be a level t / T between 0 and 1, both excluded")


# ---------------------------------------------------------------- what to evaluate


def read_run(args):
    """(settings, method) of the run: its args.json with what is given in `args`; graft, pgraft or noise_ppo.
    InputError for a folder with nothing to evaluate, or for a setting that the method does not have."""
    folder = Path(args.run)
    if not args.run or not (folder / "args.json").is_file():
        raise InputError(
            f"{args.run or '(nothing)'}: no run there (no args.json); give the folder that a run printed"
        )
    if not any((folder / name).is_file() for name in (POLICY_FILE, LORA_FILE)):
        scripts = "graft.py, pgraft.py or noise_ppo.py"
        raise InputError(
            f"{folder}: has no {LORA_FILE} or {POLICY_FILE}; give the folder of a finished {scripts} run"
        )
    try:
        stored = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        missing = [name for name in NEEDED if name not in stored]
    except ValueError as error:
        missing = [error]
    if missing:
        raise InputError(f"{folder}/args.json: is damaged or of another script ({missing[0]})")
    method = "pgraft" if "switch" in stored or (folder / SWITCH_FILE).is_file() else "graft"
    method = "noise_ppo" if (folder / POLICY_FILE).is_file() else method
    stored = {"height": None, "width": None, "model_config": ""} | stored  # newer than some runs
    given = {name: value for name, value in asdict(args).items() if value is not None and name in stored}
    settings = SimpleNamespace(**stored | given | {"prompts": stored["prompts"]})
    settings.device = check_device(settings.device, settings.dtype)
    if args.guidance is not None:
        check_guidance(check_model(settings.model, settings.model_config), args.guidance)
    lora = settings.lora if method == "noise_ppo" else args.lora
    if method == "noise_ppo" and args.eta is not None:
        raise InputError(f"--eta {args.eta:g}: a noise policy is sampled without further noise; leave it out")
    if method == "noise_ppo" and args.switch is not None and not lora:
        raise InputError(f"--switch {args.switch:g}: the run in {folder} has no LoRA; leave it out")
    if method != "noise_ppo" and lora:
        raise InputError(f"--lora {lora}: is of a noise policy; leave it out")
    if lora:
        find_lora(lora, "--lora")
    if method == "pgraft" and args.switch is None:
        read_switch(args.run, "the level with --switch")  # again with the model, which takes longer
    return settings, method


def read_task(args, settings):
    """(prompts, rewards) to evaluate on. InputError for bad ones."""
    if args.prompts:
        prompts = read_prompts(args.prompts, "--prompts")
    else:
        _, prompts = read_prompt_sets(settings.prompts, settings.eval_prompts)
    if len(prompts) < 2:
        raise InputError(f"--prompts {args.prompts}: holds one prompt; the standard error needs at least two")
    rewards = read_rewards(settings.reward, settings.eval_rewards)
    for reward in rewards:
        reward.check_prompts(prompts, "--prompts")
    for reward in rewards:
        reward.load(settings.reward_device, settings.reward_dtype, settings.reward_batch)
    return prompts, rewards


# ---------------------------------------------------------------- the methods


def switch_of(args, settings, method, model):
    """The timestep of the switch; None without one. InputError if no step lies above it."""
    if args.switch is not None:
        switch = args.switch * model.train_timesteps
    elif method == "pgraft":
        switch = read_switch(args.run, "the level with --switch", model)
    elif method == "noise_ppo" and settings.lora:
        switch = settings.switch_timestep
    else:
        return None
    if not switch_step(model.timesteps(settings.steps), switch):
        raise InputError(
            f"--steps {settings.steps}: no step starts above the switch, timestep {switch:g}; give more"
        )
    return switch


def evaluate_lora(model, rewards, prompts, settings, switch):
    """Base and tuned model: a list of two ({metric: (prompts,)}, images)."""
    if switch is None:
        with model.lora_off():
            base = evaluate_graft(model, rewards, prompts, settings, "evaluate base")
        with model.lora_merged():
            return [base, evaluate_graft(model, rewards, prompts, settings, "evaluate tuned")]
    switch_at = switch_step(model.timesteps(settings.steps), switch)
    return [
        evaluate_pgraft(model, rewards, prompts, settings, switch_at, tuned, f"evaluate {name}")
        for name, tuned in (("base", False), ("tuned", True))
    ]


def load_policy(folder, model):
    """The noise policy in the folder. The model gets the scheduler that it was learnt with.
    InputError for a damaged file or another model."""
    try:
        stored = json.loads((Path(folder) / POLICY_FILE).read_text(encoding="utf-8"))
        policy = NoisePolicy.load(folder, model.pipeline).to(model.device)
    except Exception as error:  # a damaged file makes the loaders raise many kinds
        raise InputError(f"{folder}: its policy cannot be loaded ({error})") from None
    if model.prediction_type != "flow":
        scheduler, options = model.pipeline.scheduler, ("timestep_spacing", "clip_sample")
        options = {name: stored["scheduler"][name] for name in options}
        model.pipeline.scheduler = scheduler.from_config(scheduler.config, **options)
    tokens, width = text_features(model, [""]).shape[1:]
    shape = {"tokens": tokens, "width": width, "latent_shape": list(model.latent_shape)}
    if stored["policy"] | shape != stored["policy"]:
        raise InputError(f"{folder}: its policy is of another model; give --model {stored['model']}")
    return policy


def evaluate_policy(policy, model, rewards, prompts, settings):
    """Standard and learnt noise: a list of two ({metric: (prompts,)}, images)."""
    zero = torch.zeros(1, *model.latent_shape)
    with torch.no_grad():
        learnt = policy(text_features(model, prompts))  # (mean, log_std), each (prompts, c, h, w)
    return [
        evaluate_noise(model, rewards, prompts, *noise, settings.steps, settings, f"evaluate {name} noise")
        for name, noise in (("standard", (zero, zero)), ("learnt", learnt))
    ]


def lora_code(model, folder, switch, prompt, settings):
    """Python that makes the evaluation's first image with the LoRA in stock diffusers."""
    code = f"{stock_code(model)}\npipe.load_lora_weights({str(Path(folder).resolve())!r})\n"
    if switch is None:
        return code + stock_call(model, prompt, settings)
    call = stock_call(model, prompt, settings, ", callback_on_step_end=base_from_the_switch_on")
    return f"{code}\n{stock_switch(f'{switch:g}')}\n{call}"


# ---------------------------------------------------------------- the evaluation


def main(args):
    start = time.perf_counter()
    check_output(args.output, args.resume)
    settings, method = read_run(args)
    prompts, rewards = read_task(args, settings)
    model = load_model(settings)
    if lora := settings.lora if method == "noise_ppo" else args.run:
        model.load_lora(lora)
    policy = load_policy(args.run, model) if method == "noise_ppo" else None
    grid = model.timesteps(settings.steps)
    switch = settings.switch_timestep = switch_of(args, settings, method, model)
    model.warn_of_cut(prompts)
    model.remember(["", *prompts])
    folder = make_run_folder(args, "evaluate", str(Path(args.run).resolve()), settings.seed)
    eta = "" if policy else f", eta {settings.eta:g}"
    print(f"""Evaluation of {args.run} ({method}.py) -> {folder}
  sampling   {len(prompts)} prompts x {settings.eval_samples} images, {settings.steps} steps, \
guidance {settings.guidance:g}{eta}""")
    extra = {"run": args.run, "method": method, "steps": settings.steps}
    if switch is not None and switch >= 0:  # -1: the LoRA is on in all steps
        extra |= {"switch_at": switch_step(grid, switch), "switch_timestep": switch}
        steps = f"tuned model for {extra['switch_at']} of {settings.steps} steps"
        print(f"  switch     {steps}, base model from timestep {switch:g} on", flush=True)

    if policy:
        pairs = evaluate_policy(policy, model, rewards, prompts, settings)
        columns = ("standard", "learnt", "gain")
        title = "learnt noise, same random draws (standard noise on the left)"
    else:
        pairs = evaluate_lora(model, rewards, prompts, settings, switch)
        columns = ("base", "tuned", "difference")
        title = "tuned, same seeds (base on the left)"
    (base, base_images), (tuned, tuned_images) = pairs
    table, seconds = paired_table(base, tuned, columns), time.perf_counter() - start
    write_json(folder / "results.json", {"table": table, "seconds": seconds, **extra})
    save_grid(folder / "grid.png", base_images, tuned_images, prompts, settings.eval_samples, title)
    print_table(table, f"{len(prompts)} prompts")
    print(f"\n{seconds:.0f} s. In {folder}: results.json, grid.png.")
    print("To use what was evaluated:\n")
    if policy:
        print(policy_code(model, Path(args.run), prompts[0], settings))
    else:
        print(lora_code(model, args.run, switch, prompts[0], settings))


if __name__ == "__main__":
    run_script(main, Args)
