"""Run the experiments behind every table of README and docs, and store one record for each arm and seed.

Run: python benchmarks/run.py                      (all that benchmarks/results lacks; 8 hours on 2 cores)
     python benchmarks/run.py graft compare/ddpo   (the arms of a folder, one arm)
     python benchmarks/run.py --quick compare      (minutes: seed 0, short runs, into runs/quick/results)
     python benchmarks/run.py --split_prompts      (write prompts_tune.txt and prompts_valid.txt again)
The tables are made from the records by benchmarks/tables.py.

Every arm is an ordinary command. Two run at a time, with one thread each, in runs/<folder>/<arm>__<seed>. A
run that was stopped goes on from there. The record is benchmarks/results/<folder>/<arm>__<seed>.json:
  command, seed, hardware
  seconds          of the run; None where its results.json does not say
  results          its results.json
  metrics          the rows of its metrics.csv; [] in stored records whose rows were not kept
  switched         {level: paired table}: its LoRA evaluated again, with the base model from that level on
  images, calls    that were sampled for training, and that this took (folders compare and tuning)
  curve            {images, calls, seconds, reward} at each evaluation of held-out prompts (the same folders)
A call is one forward pass of the model for one image. A training step counts 3: a backward pass costs about
two forward ones. Evaluations are not counted. The seconds of the curve include them, but not the loading of
the model.

Folders: "graft", "pgraft", "noise_ppo", "inc", "molecules" and "layouts" hold the experiments of one script
each. "compare" has all methods with a reward at about one budget of calls, and DDPO far beyond it. The
settings of GRAFT, DDPO, DiffusionNFT and AWM in "compare" were chosen from "tuning". The arms "valid_...",
"guidance3_..." and all of "tuning" hold out prompts_valid.txt, a part of the training prompts, because
settings may be chosen on these only.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ROOT
from shapes.render import PROMPT_FILES, REVERSED, parse
from utils.runs import write_json

RESULTS = ROOT / "benchmarks" / "results"
RUNS = Path("runs")  # relative to ROOT, so that the stored commands hold no path of this machine


@dataclass(frozen=True)
class Arm:
    """A command that is run once for each seed."""

    command: str  # script and flags; {runs} and {seed} are filled in
    seeds: tuple[int, ...] = (0, 1, 2)
    figures: tuple[str, ...] = ()  # of seed 0, kept beside the record as <arm>__<figure>
    switches: tuple[str, ...] = ()  # levels from which on the base model takes over in further evaluations
    needs: str = ""  # arm of the same folder that must have run with the same seed
    rows: str = "metrics.csv"  # the file of the run folder that goes into "metrics"
    flow: bool = False  # fashion/train.py trains the flow {runs}/inc/flow_{seed} first


VALID = "--prompts benchmarks/prompts_tune.txt --eval_prompts benchmarks/prompts_valid.txt"

# ---------------------------------------------------------------- GRAFT

GUIDED = f"{VALID} --guidance 3 --rounds 4 --prompts_per_round 80 --updates 40 --eval_samples 2"
GRAFT = {
    "graft": Arm("graft.py", figures=("grid.png", "curves.png")),
    "none": Arm("graft.py --rule none"),
    "preference": Arm("graft.py --rule preference"),
    "threshold": Arm("graft.py --rule threshold --threshold 1"),
    "jpeg": Arm("graft.py --reward jpeg_compressibility", figures=("grid.png",)),
    "jpeg_none": Arm("graft.py --reward jpeg_compressibility --rule none"),
    "valid_guidance3_guided": Arm(f"graft.py {GUIDED}"),
    "valid_guidance3_conditional": Arm(f"graft.py {GUIDED} --no-guided_loss"),
    "valid_guidance3_dropout": Arm(f"graft.py {GUIDED} --no-guided_loss --prompt_dropout 0.1"),
}

# ---------------------------------------------------------------- P-GRAFT
# Three budgets: the default; small: 32 accepted images, 200 updates; long: the same 32 images, 700 updates.
# Of the 10 steps, 8, 6, 5 and 3 start above the levels 0.2, 0.4, 0.5 and 0.7.

LEVELS = ("0.2", "0.4", "0.5", "0.7")
BUDGETS = {
    "default": "--eval_every 0",
    "small": "--rounds 1 --prompts_per_round 32 --updates 200",
    "long": "--rounds 1 --prompts_per_round 32 --updates 700",
}
TRAINED_LEVELS = {"default": LEVELS, "small": ("0.2", "0.4", "0.7"), "long": ("0.4",)}
PGRAFT = {
    "probe": Arm(
        "pgraft.py --probe --probe_prompts 128", seeds=(0,), figures=("probe.png",), rows="probe.csv"
    ),
    "default_none_0.2": Arm(f"pgraft.py --switch 0.2 --rule none {BUDGETS['default']}"),
    "default_graft": Arm(f"graft.py {BUDGETS['default']}", seeds=(0,), switches=LEVELS),
    "small_graft": Arm(f"graft.py {BUDGETS['small']}", switches=LEVELS),
    "long_graft": Arm(f"graft.py {BUDGETS['long']}", switches=LEVELS, figures=("grid.png",)),
}
for _budget, _levels in TRAINED_LEVELS.items():
    for _data in ("x0", "xs"):
        for _level in _levels:
            PGRAFT[f"{_budget}_{_data}_{_level}"] = Arm(
                f"pgraft.py --switch {_level} --data {_data} {BUDGETS[_budget]}",
                seeds=(0,) if (_budget, _data) == ("long", "xs") else (0, 1, 2),
                figures=("grid.png",) if (_budget, _data) == ("long", "x0") else (),
            )
PGRAFT |= {
    "valid_x0_0.2": Arm(f"pgraft.py {VALID} --switch 0.2 --eval_every 0", seeds=(0,)),
    "valid_x0_0.4": Arm(f"pgraft.py {VALID} --switch 0.4 --eval_every 0", seeds=(0,)),
    "guidance3_graft": Arm(f"graft.py {GUIDED} --no-guided_loss", switches=LEVELS),
    "guidance3_x0_0.4": Arm(f"pgraft.py {GUIDED} --no-guided_loss --switch 0.4"),
}

# ---------------------------------------------------------------- Noise PPO

BOTH = "noise_ppo.py --no-mean_only"  # mean and standard deviation are learnt
SHORT = "--eval_steps 4 40 --no-controls"
NOISE_PPO = {
    "mean": Arm("noise_ppo.py --no-controls", figures=("grid.png", "gain.png")),
    "both": Arm(BOTH),
    "unconditional": Arm(f"{BOTH} --policy unconditional"),
    "std_only": Arm(f"{BOTH} --std_only {SHORT}", seeds=(0,)),
    "both_kl_0": Arm(f"{BOTH} --kl_weight 0 {SHORT}", seeds=(0,)),
    "both_kl_0.02": Arm(f"{BOTH} --kl_weight 0.02 {SHORT}", seeds=(0,)),
    # a latent has 256 numbers: 0.256 is the same clip in nats
    "both_sum": Arm(f"{BOTH} --reduction sum --clip 0.256 {SHORT}", seeds=(0,)),
    "both_clip_0.2": Arm(f"{BOTH} --clip 0.2 {SHORT}", seeds=(0,)),
    "both_sum_clip_100": Arm(f"{BOTH} --reduction sum --clip 100 {SHORT}", seeds=(0,)),
    "valid_mean": Arm(f"noise_ppo.py {VALID} {SHORT}", seeds=(0,)),
    "valid_both": Arm(f"{BOTH} {VALID}", seeds=(0,)),
}

# ---------------------------------------------------------------- Inverse Noise Correction
# All seeds share base, images and evaluation noises; they differ in the training of the corrector. So the
# rows of the base and of the controls are the same in all. Only "largest_flow" has another base for each
# seed. Of the arms "grid_..." only the row "base" counts, of "anderson" and "plain_iteration" only the
# inversion.

CORRECTION = "inverse_noise_correction.py"
LARGEST = "--images 20000 --updates 12000 --no-longer"
OLD_NOISE = "--data_noise 0.02 --max_iterations 60"  # the defaults when these were run
ONE_ROW = "--updates 1 --eval_corrector_steps 2 --no-longer --max_failed 1"
INC = {
    "default": Arm(CORRECTION, seeds=(0,), figures=("curve.png", "grid.png", "noise.png")),
    "default_again": Arm(f"{CORRECTION} --no-longer --eval_steps 8", seeds=(1, 2)),
    "largest": Arm(f"{CORRECTION} {LARGEST}", seeds=(0,), figures=("grid.png",)),
    "largest_flow": Arm(
        f"{CORRECTION} --model {{runs}}/inc/flow_{{seed}} {LARGEST}", seeds=(1, 2), flow=True
    ),
    "largest_noise_0.001": Arm(f"{CORRECTION} {LARGEST} --data_noise 0.001", seeds=(0,)),
    "more_noise_0.02": Arm(f"{CORRECTION} --images 5000 --updates 2500 --no-longer {OLD_NOISE}", seeds=(0,)),
    "large_noise_0.02": Arm(
        f"{CORRECTION} --images 10000 --updates 5000 --no-longer {OLD_NOISE}", seeds=(0,)
    ),
    "largest_noise_0.02": Arm(f"{CORRECTION} {LARGEST} {OLD_NOISE}", seeds=(0,)),
    "data_noise_0.02": Arm(f"{CORRECTION} --data_noise 0.02 --no-longer", seeds=(0,)),
    "data_noise_0.01": Arm(f"{CORRECTION} --data_noise 0.01 --no-longer", seeds=(0,)),
    "data_noise_0.001": Arm(f"{CORRECTION} --data_noise 0.001 --no-longer", seeds=(0,)),
    "steps_64": Arm(
        f"{CORRECTION} --steps 64 --images 5000 --updates 4000 --eval_steps 64 --eval_corrector_steps 8 "
        "--no-longer --data_noise 0.015",
        seeds=(0,),
    ),
    "steps_64_noise_0.02": Arm(
        f"{CORRECTION} --steps 64 --images 10000 --updates 4000 --sample_batch 2000 "
        f"--eval_steps 64 80 128 256 --eval_corrector_steps 8 16 --no-longer {OLD_NOISE}",
        seeds=(0,),
    ),
    "power_0.7": Arm(f"{CORRECTION} --grid_power 0.7 --data_noise 0.01 --no-longer", seeds=(0,)),
    "power_0.7_noise_0.02": Arm(
        f"{CORRECTION} --grid_power 0.7 --images 5000 --updates 2500 --no-longer {OLD_NOISE}", seeds=(0,)
    ),
    "anderson": Arm(f"{CORRECTION} {ONE_ROW} --images 500 --eval_steps 8", seeds=(0,)),
    "plain_iteration": Arm(f"{CORRECTION} {ONE_ROW} --images 500 --eval_steps 8 --memory 0", seeds=(0,)),
}
for _steps in (8, 10, 16):
    INC[f"grid_0.6_{_steps}"] = Arm(
        f"{CORRECTION} --grid_power 0.6 --steps {_steps} --eval_steps {_steps} --images 100 {ONE_ROW}",
        seeds=(0,),
    )

# ---------------------------------------------------------------- all methods at one budget

LEAST_NOISE_PPO = "noise_ppo.py --iterations 36 --eval_steps 4 10 --no-controls"
COMPARE = {
    "none": Arm("graft.py --rule none"),
    "graft": Arm("graft.py"),
    "graft_tuned": Arm(
        "graft.py --rule threshold --threshold 1 --batch 32 --micro_batch 32 --updates 120 --rounds 6",
    ),
    "pgraft": Arm("pgraft.py --switch 0.2"),
    "noise_ppo": Arm(LEAST_NOISE_PPO),
    # its images, calls and seconds do not include those of the P-GRAFT run
    "pgraft_noise_ppo": Arm(f"{LEAST_NOISE_PPO} --lora {{runs}}/compare/pgraft__{{seed}}", needs="pgraft"),
    "ddpo": Arm("benchmarks/ddpo.py"),
    # "ddpo" is the best setting after 8 tuning rounds and gets worse later; this is the best after 10
    "ddpo_steady": Arm("benchmarks/ddpo.py --clip 1e-3 --batch 64"),
    "nft": Arm("benchmarks/diffusion_nft.py --beta 0.3"),
    "awm": Arm("benchmarks/awm.py --kl_old 0.4"),
    "graft_twice": Arm("graft.py --rounds 6"),
    "awm_twice": Arm("benchmarks/awm.py --kl_old 0.4 --rounds 6"),
}
LONG_DDPO = "benchmarks/ddpo.py --eval_samples 2 --rounds 10 --eval_every 5 --batch 64"
SHORT_DDPO = "benchmarks/ddpo.py --eval_samples 2 --rounds 8 --eval_every 4"
THRESHOLD = "graft.py --eval_samples 2 --rule threshold --threshold 1"
NFT, AWM = "benchmarks/diffusion_nft.py --eval_samples 2", "benchmarks/awm.py --eval_samples 2"
TUNING = {  # in the order in which they were tried
    "ddpo_lr_1e-3_clip_1e-4": f"{LONG_DDPO} --lr 1e-3 --clip 1e-4",
    "ddpo_lr_1e-3_clip_1e-3": f"{LONG_DDPO} --lr 1e-3 --clip 1e-3",
    "ddpo_lr_3e-3_clip_1e-3": f"{LONG_DDPO} --lr 3e-3 --clip 1e-3",
    "ddpo_lr_3e-3_clip_1e-2": f"{SHORT_DDPO} --lr 3e-3 --clip 1e-2 --batch 64",
    "ddpo_lr_1e-2_clip_1e-3": f"{SHORT_DDPO} --lr 1e-2 --clip 1e-3 --batch 64",
    "ddpo_lr_3e-3_clip_1e-3_batch_32": f"{SHORT_DDPO} --lr 3e-3 --clip 1e-3 --batch 32",
    "ddpo_lr_3e-3_clip_1e-3_16_samples_a_prompt": (
        f"{SHORT_DDPO} --lr 3e-3 --clip 1e-3 --batch 64 --samples 16 --prompts_per_round 40"
    ),
    "ddpo_lr_3e-3_clip_1e-3_2_epochs": f"{SHORT_DDPO} --lr 3e-3 --clip 1e-3 --batch 64 --epochs 2",
    "ddpo_lr_3e-3_clip_1e-2_batch_32": f"{SHORT_DDPO} --lr 3e-3 --clip 1e-2 --batch 32",
    "graft_default": "graft.py --eval_samples 2",
    "graft_threshold": THRESHOLD,
    "graft_threshold_lr_3e-3": f"{THRESHOLD} --lr 3e-3",
    "graft_threshold_6_rounds_of_80_prompts_30_updates": (
        f"{THRESHOLD} --rounds 6 --prompts_per_round 80 --updates 30"
    ),
    "graft_lr_3e-3": "graft.py --eval_samples 2 --lr 3e-3",
    "graft_threshold_batch_32_120_updates": f"{THRESHOLD} --batch 32 --micro_batch 32 --updates 120",
    "nft_beta_0.3": f"{NFT} --beta 0.3",
    "nft_beta_1": f"{NFT} --beta 1",
    "nft_beta_0.3_60_updates": f"{NFT} --beta 0.3 --updates 60",
    "nft_beta_0.1": f"{NFT} --beta 0.1",  # the paper's for text in images
    "nft_beta_0.3_lr_3e-3": f"{NFT} --beta 0.3 --lr 3e-3",
    "awm_kl_0.4": f"{AWM} --kl_old 0.4",
    "awm_kl_0.2": f"{AWM} --kl_old 0.2",
    "awm_kl_1": f"{AWM} --kl_old 1",
    "awm_kl_0.2_lr_5e-4": f"{AWM} --kl_old 0.2 --lr 5e-4",
    "awm_kl_0.4_120_updates": f"{AWM} --kl_old 0.4 --updates 120",
}
TUNING = {name: Arm(f"{command} {VALID}", seeds=(0,)) for name, command in TUNING.items()}

# ---------------------------------------------------------------- molecules
# Of six atoms there are few molecules, so copies are many. Every round is short and its learning rate high.

SMALL = "--atoms 6 --steps 25 --rounds 5 --groups_per_round 30 --top_k 1 --updates 80 --batch 48 --lr 1e-3"
SMALL = f"molecules/graft_molecules.py {SMALL} --eval_every 0 --eval_molecules 240"
MOLECULES = {
    "deduplicated": Arm(SMALL),
    "copies": Arm(f"{SMALL} --no-deduplicate"),
    "none": Arm(f"{SMALL.replace('--top_k 1 ', '')} --rule none --no-deduplicate"),
    "default": Arm("molecules/graft_molecules.py --eval_every 0", seeds=(0,), figures=("grid.png",)),
}

# ---------------------------------------------------------------- layouts
# Of the 20 steps, 18, 16 and 12 start above the levels 0.01, 0.04 and 0.16. The runs are short.

LAYOUT_LEVELS = ("0.01", "0.04", "0.16")
SMALL = "layouts/pgraft_layouts.py --rounds 2 --groups_per_round 100 --updates 100 --batch 48"
SMALL = f"{SMALL} --eval_every 0 --eval_pages 800"
LAYOUTS = {
    "probe": Arm(
        "layouts/pgraft_layouts.py --probe --probe_groups 128",
        seeds=(0,),
        figures=("probe.png",),
        rows="probe.csv",
    ),
    "graft": Arm(f"{SMALL} --switch 0", figures=("grid.png",)),
    "none": Arm(f"{SMALL} --switch 0 --rule none"),
    **{f"pgraft_{level}": Arm(f"{SMALL} --switch {level}") for level in LAYOUT_LEVELS},
    "default": Arm("layouts/pgraft_layouts.py --eval_every 0", seeds=(0,)),
}

ARMS = {
    "graft": GRAFT,
    "pgraft": PGRAFT,
    "noise_ppo": NOISE_PPO,
    "inc": INC,
    "molecules": MOLECULES,
    "layouts": LAYOUTS,
    "compare": COMPARE,
    "tuning": TUNING,
}
BUDGETED = ("compare", "tuning")  # folders whose records hold images, calls and curve
QUICK = {  # flags that make a run short
    "graft.py": "--rounds 1 --updates 20 --eval_samples 2",
    "pgraft.py": "--rounds 1 --updates 20 --eval_samples 2 --probe_prompts 8",
    "noise_ppo.py": "--iterations 6 --eval_samples 2",
    "inverse_noise_correction.py": "--images 400 --updates 50 --eval_images 200 --no-longer",
    "benchmarks/ddpo.py": "--rounds 2 --eval_samples 2",
    "benchmarks/diffusion_nft.py": "--rounds 1 --updates 20 --eval_samples 2",
    "benchmarks/awm.py": "--rounds 1 --updates 20 --eval_samples 2",
    "molecules/graft_molecules.py": "--rounds 1 --updates 20 --eval_molecules 100",
    "layouts/pgraft_layouts.py": "--rounds 1 --updates 20 --eval_pages 80 --probe_groups 8",
}


# ---------------------------------------------------------------- records


def load(folder: str, arm: str, results: Path = RESULTS) -> list[dict]:
    """The stored records of an arm, by seed; [] if there are none."""
    files = sorted((results / folder).glob(f"{arm}__[0-9]*.json"))
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def cost(script: str, args: dict) -> tuple[int, int]:
    """(images, calls) of one round or iteration of a run with these arguments (args.json)."""
    guided = 2 if args["guidance"] > 1 else 1
    if script == "noise_ppo.py":
        images = args["prompts_per_iteration"] * args["samples"]
        return images, images * args["steps"] * guided
    images = args["prompts_per_round"] * args["samples"]
    if script == "benchmarks/ddpo.py":  # the last step of the embedded model is not random: nothing to train
        return images, images * guided * (args["steps"] + 3 * args["epochs"] * (args["steps"] - 1))
    if script in ("benchmarks/diffusion_nft.py", "benchmarks/awm.py"):  # also what did the sampling, the base
        calls = 4 + (args.get("kl_base", 0) > 0)
        return images, guided * (images * args["steps"] + calls * args["updates"] * args["batch"])
    return images, guided * (images * args["steps"] + 3 * args["updates"] * args["batch"])


def seconds_at(run: Path) -> list[float]:
    """Seconds from the beginning of a run to each row of its metrics.csv. A resumed run adds up its parts."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("seconds")
    newest = {event.step: event.value for event in events}
    return [newest[step] for step in sorted(newest)]


def budget(script: str, run: Path, rows: list[dict]) -> dict:
    """The entries seconds, images, calls and curve of a finished run. rows: of its metrics.csv."""
    images, calls = cost(script, json.loads((run / "args.json").read_text(encoding="utf-8")))
    curve = []
    for i, (row, seconds) in enumerate(zip(rows, seconds_at(run), strict=True), 1):
        if not np.isnan(row["reward_held_out"]):
            point = {"images": images * i, "calls": calls * i, "seconds": round(seconds, 1)}
            curve.append(point | {"reward": row["reward_held_out"]})
    return {
        "seconds": curve[-1]["seconds"],  # without the final evaluation of Noise PPO
        "images": images * len(rows),
        "calls": calls * len(rows),
        "curve": curve,
    }


def record(run: Path, folder: str, arm: Arm, command: list[str], seed: int, jobs: int) -> dict:
    """The record of a finished run, without "switched". command: script and flags; jobs: runs at a time."""
    results_file = run / "results.json"  # a probe has none
    results = json.loads(results_file.read_text(encoding="utf-8")) if results_file.exists() else {}
    seconds = results.get("seconds")
    with open(run / arm.rows, newline="", encoding="utf-8") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    entries = {"command": " ".join(["python", *command]), "seed": seed}
    processor = platform.processor() or platform.machine()
    entries["hardware"] = f"1 thread of {processor}, torch CPU float32, {jobs} runs at a time"
    entries["seconds"] = seconds["total"] if isinstance(seconds, dict) else seconds
    entries |= {"results": results, "metrics": rows}
    return entries | (budget(command[0], run, rows) if folder in BUDGETED else {})


# ---------------------------------------------------------------- running


@dataclass
class Options:
    """What all arms of one call share."""

    results: Path = RESULTS
    runs: Path = RUNS
    quick: bool = False
    jobs: int = 2  # runs at a time


def execute(command: list[str]) -> None:
    """`python <command>` in ROOT on one thread of the CPU, as the records say. RuntimeError with the end
    of its error output if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, **pipes)
    if done.returncode:
        raise RuntimeError(f"python {' '.join(command)}\n{done.stderr[-2000:] or 'it printed no error'}")


def command_of(folder: str, name: str, seed: int, options: Options) -> list[str]:
    """Script and flags of an arm."""
    text = ARMS[folder][name].command.format(runs=options.runs, seed=seed)
    script, *flags = text.split()
    return [script, *flags, *(QUICK[script].split() if options.quick else []), "--seed", str(seed)]


def run_folder(folder: str, name: str, seed: int, options: Options) -> Path:
    """Where an arm runs, relative to ROOT."""
    return options.runs / folder / f"{name}__{seed}"


def record_file(folder: str, name: str, seed: int, options: Options) -> Path:
    """Where its record stands."""
    return options.results / folder / f"{name}__{seed}.json"


def finish(folder: str, name: str, seed: int, options: Options) -> None:
    """Start or resume the run of an arm and wait for its end. RuntimeError if it fails."""
    run = run_folder(folder, name, seed, options)
    script, *flags = command_of(folder, name, seed, options)
    begun = (ROOT / run / "args.json").exists()
    execute([script, "--resume", str(run)] if begun else [script, *flags, "--output", str(run)])


def make_flow(seed: int, options: Options) -> None:
    """Train the flow of Arm.flow if it is not there. RuntimeError if that fails."""
    flow = options.runs / "inc" / f"flow_{seed}"
    if not (ROOT / flow / "scheduler").exists():  # what is written last
        shutil.rmtree(ROOT / flow, ignore_errors=True)
        flags = f"--seed {seed} --no-features --no-images --out {flow}"
        execute(["-m", "fashion.train", *flags.split(), *["--updates", "50"] * options.quick])


def evaluate_switched(run: Path, level: str) -> list[dict]:
    """The paired table of a run's LoRA with the base model from a level on. RuntimeError if that fails."""
    output = run.with_name(f"{run.name}__switch_{level}")
    shutil.rmtree(ROOT / output, ignore_errors=True)  # an evaluation that was stopped starts again
    execute(["benchmarks/evaluate.py", str(run), "--switch", level, "--output", str(output)])
    return json.loads((ROOT / output / "results.json").read_text(encoding="utf-8"))["table"]


def store(folder: str, name: str, seed: int, options: Options) -> bool:
    """Run an arm and write its record. Returns whether that succeeded; one line says how it ended."""
    arm, run = ARMS[folder][name], run_folder(folder, name, seed, options)
    try:
        if arm.needs and not (ROOT / run_folder(folder, arm.needs, seed, options) / "results.json").exists():
            finish(folder, arm.needs, seed, options)
        if arm.flow:
            make_flow(seed, options)
        finish(folder, name, seed, options)
        entries = record(ROOT / run, folder, arm, command_of(folder, name, seed, options), seed, options.jobs)
        if arm.switches:
            entries["switched"] = {level: evaluate_switched(run, level) for level in arm.switches}
    except RuntimeError as error:
        print(f"{folder}/{name} {seed} failed: {error}", file=sys.stderr, flush=True)
        return False
    target = record_file(folder, name, seed, options)
    target.parent.mkdir(parents=True, exist_ok=True)
    for figure in arm.figures if seed == 0 else ():
        shutil.copy(ROOT / run / figure, target.with_name(f"{name}__{figure}"))
    write_json(target, entries)
    print(f"{folder}/{name} {seed}: stored", flush=True)
    return True


def run_all(jobs: list[tuple[str, str, int]], options: Options) -> bool:
    """Run every (folder, arm, seed) that has no record, some at a time. Returns whether all succeeded."""
    jobs = [job for job in jobs if not record_file(*job, options).exists()]
    needy = [job for job in jobs if ARMS[job[0]][job[1]].needs]  # they start from runs of the others
    others = [job for job in jobs if job not in needy]
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            done = [list(pool.map(lambda job: store(*job, options), part)) for part in (others, needy)]
        except KeyboardInterrupt:  # the running commands got it too
            pool.shutdown(cancel_futures=True)
            raise
    return all(map(all, done))


# ---------------------------------------------------------------- prompts to choose settings on


def split_prompts(target: Path = ROOT / "benchmarks") -> None:
    """Split 40 scenes (80 prompts) off the training prompts: prompts_valid.txt, the others: prompts_tune.txt.

    A scene has two wordings, "a left of b" and "b right of a", which stay together.
    """
    scenes = {}
    for prompt in PROMPT_FILES["train"].read_text(encoding="utf-8").splitlines():
        first, relation, second = parse(prompt)
        scene = min((first, relation, second), (second, REVERSED[relation], first))
        scenes.setdefault(scene, []).append(prompt)
    wordings, order = list(scenes.values()), np.random.default_rng(1).permutation(len(scenes))
    for name, chosen in (("valid", order[:40]), ("tune", order[40:])):
        lines = "".join(f"{prompt}\n" for i in chosen for prompt in wordings[i])
        (target / f"prompts_{name}.txt").write_text(lines, encoding="utf-8")


def choose(names: list[str]) -> list[tuple[str, str]]:
    """(folder, arm) of names such as "graft" (a folder) and "compare/ddpo". KeyError for an unknown one."""
    chosen = []
    for name in names or ARMS:
        folder, _, arm = name.partition("/")
        chosen += [(folder, arm)] if arm and ARMS[folder][arm] else [(folder, arm) for arm in ARMS[folder]]
    return chosen


def main() -> int:
    """Returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="name", help="a folder, or folder/arm; left out: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="left out: those of each arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, with one thread each")
    parser.add_argument("--quick", action="store_true", help="seed 0, short runs, which say little")
    parser.add_argument("--split_prompts", action="store_true", help="only write the two prompt files")
    given = parser.parse_args()
    if given.split_prompts:
        split_prompts()
        return 0
    try:
        arms = choose(given.names)
    except KeyError as error:
        parser.error(f"no folder or arm {error}")
    options = Options(jobs=given.jobs)
    if given.quick:
        options = Options(ROOT / RUNS / "quick" / "results", RUNS / "quick", True, given.jobs)
    jobs = [
        (folder, name, seed)
        for folder, name in arms
        for seed in given.seeds or ((0,) if given.quick else ARMS[folder][name].seeds)
    ]
    return 0 if run_all(jobs, options) else 1


if __name__ == "__main__":
    sys.exit(main())
