"""All methods with a reward and their controls on the embedded model at one budget of model calls, and a policy gradient far beyond it.

Run: python benchmarks/compare.py            (what benchmarks/results/compare lacks, two runs at a time; then table and figure)
     python benchmarks/compare.py --tables   (only these, from the stored results)
     python benchmarks/compare.py --quick    (minutes: one seed, small runs in runs/compare_quick, which say little)
     python benchmarks/compare.py --tune     (what DDPO's and GRAFT's settings were chosen from, on validation prompts)
A run that was stopped goes on where it was (runs/compare/<arm>__<seed>).

A model call is one forward pass for one picture; a training step counts 3, as a backward pass costs about two forward ones.
Arms are ordinary commands. Their held-out reward is drawn against the pictures that they sampled and scored for training, and
against the seconds that they took, evaluations and all, but without loading the model and without
Noise PPO's final evaluation.
"""

import argparse
import csv
import json
import math
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from graft_shapes import ROOT, VALID, execute, header, line, load, mean_and_se
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(ROOT))
from rewards import save_figure  # noqa: E402

RESULTS, QUICK = ROOT / "benchmarks" / "results" / "compare", ROOT / "runs" / "compare_quick"
COSTS = ("pictures", "calls", "seconds")
METRICS = ("shapes_strict", "shapes_graded", "shapes_fit", "jpeg_compressibility", "diversity")
# arm: (label, command, what makes the run short for --quick); {run} is the folder of all runs. Pictures, calls and seconds of
# pgraft_noise_ppo are noise PPO's alone, to which the P-GRAFT run that it starts from adds its own
ARMS = {
    "none": ("control: GRAFT without selection", "graft.py --rule none", "--rounds 1"),
    "graft": ("GRAFT", "graft.py", "--rounds 1"),
    "graft_tuned": (
        "GRAFT, tuned",
        "graft.py --rule threshold --threshold 1 --batch 32 --micro_batch 32 --updates 120 --rounds 6",
        "--rounds 2",
    ),
    "pgraft": ("P-GRAFT, base from level 0.2 on", "pgraft.py --switch 0.2", "--rounds 1"),
    "noise_ppo": ("Noise PPO", "noise_ppo.py --iterations 36 --eval_steps 4,10 --no-controls", "--iterations 6"),
    "pgraft_noise_ppo": (
        "P-GRAFT, then Noise PPO",
        "noise_ppo.py --iterations 36 --eval_steps 4,10 --no-controls --lora {run}/pgraft__{seed}",
        "--iterations 6",
    ),
    "ddpo": ("DDPO", "benchmarks/ddpo.py", "--rounds 2"),
    # added when the setting above, the best after 8 rounds of tuning, had got worse after 8: the best of those tuned for 10
    "ddpo_steady": ("DDPO, clip 1e-3, batch 64", "benchmarks/ddpo.py --clip 1e-3 --batch 64", "--rounds 2"),
}
DDPO_TUNING = "benchmarks/ddpo.py --eval_samples 2"
LONG, SHORT = f"{DDPO_TUNING} --rounds 10 --eval_every 5 --batch 64", f"{DDPO_TUNING} --rounds 8 --eval_every 4"
TUNING = {  # what was tried, in this order, one seed each
    "ddpo, lr 1e-3, clip 1e-4": f"{LONG} --lr 1e-3 --clip 1e-4",
    "ddpo, lr 1e-3, clip 1e-3": f"{LONG} --lr 1e-3 --clip 1e-3",
    "ddpo, lr 3e-3, clip 1e-3": f"{LONG} --lr 3e-3 --clip 1e-3",
    "ddpo, lr 3e-3, clip 1e-2": f"{SHORT} --lr 3e-3 --clip 1e-2 --batch 64",
    "ddpo, lr 1e-2, clip 1e-3": f"{SHORT} --lr 1e-2 --clip 1e-3 --batch 64",
    "ddpo, lr 3e-3, clip 1e-3, batch 32": f"{SHORT} --lr 3e-3 --clip 1e-3 --batch 32",
    "ddpo, lr 3e-3, clip 1e-3, 16 samples a prompt": (
        f"{SHORT} --lr 3e-3 --clip 1e-3 --batch 64 --samples 16 --prompts_per_round 40"
    ),
    "ddpo, lr 3e-3, clip 1e-3, 2 epochs": f"{SHORT} --lr 3e-3 --clip 1e-3 --batch 64 --epochs 2",
    "ddpo, lr 3e-3, clip 1e-2, batch 32": f"{SHORT} --lr 3e-3 --clip 1e-2 --batch 32",
    "graft, default": "graft.py --eval_samples 2",
    "graft, threshold": "graft.py --eval_samples 2 --rule threshold --threshold 1",
    "graft, threshold, lr 3e-3": "graft.py --eval_samples 2 --rule threshold --threshold 1 --lr 3e-3",
    "graft, threshold, 6 rounds of 80 prompts, 30 updates": (
        "graft.py --eval_samples 2 --rule threshold --threshold 1 --rounds 6 --prompts_per_round 80 --updates 30"
    ),
    "graft, lr 3e-3": "graft.py --eval_samples 2 --lr 3e-3",
    "graft, threshold, batch 32, 120 updates": (
        "graft.py --eval_samples 2 --rule threshold --threshold 1 --batch 32 --micro_batch 32 --updates 120"
    ),
}
STYLES = {
    "none": "k:",
    "graft": "C0o-",
    "graft_tuned": "C0o--",
    "pgraft": "C1s-",
    "noise_ppo": "C2^-",
    "pgraft_noise_ppo": "C4v-",
    "ddpo": "C3d-",
    "ddpo_steady": "C3d--",
}


def cost(script: str, args: dict) -> tuple[int, int]:
    """(pictures sampled, model calls) of one round or iteration of a run with these arguments."""
    guided = 2 if args["guidance"] > 1 else 1
    if script == "noise_ppo.py":
        pictures = args["prompts_per_iteration"] * args["samples"]
        return pictures, pictures * args["steps"] * guided
    pictures = args["prompts_per_round"] * args["samples"]
    if script == "benchmarks/ddpo.py":  # the embedded model's last step is not random: nothing to train
        return pictures, pictures * guided * (args["steps"] + 3 * args["epochs"] * (args["steps"] - 1))
    return pictures, guided * (pictures * args["steps"] + 3 * args["updates"] * args["batch"])


def seconds_at(folder: Path) -> list[float]:
    """Seconds into the run at which each row of metrics.csv was logged; of a resumed run the sum over its parts."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("seconds")
    found = {event.step: event.value for event in events}
    return [found[step] for step in sorted(found)]


def run(target: Path, folder: Path, command: list[str], seed: int) -> None:
    """One run in `folder`, gone on with if it was begun there, -> target: command, budget, curve (pictures, calls, seconds, held-out
    reward) and final table. command: script and arguments."""
    if target.exists():
        return
    script, *arguments = command = [*command, "--seed", str(seed)]
    go_on = ["--resume", str(folder)] if (folder / "args.json").exists() else [*arguments, "--output", str(folder)]
    if failed := execute([script, *go_on]):
        print(f"{target.stem} failed:\n{failed}", file=sys.stderr, flush=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    found = record(folder, command, seed)
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{target.stem}: {found['curve'][-1]}", flush=True)


def record(folder: Path, command: list[str], seed: int) -> dict:
    """Of a finished run."""
    args, found = json.loads((folder / "args.json").read_text()), json.loads((folder / "results.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    pictures, calls = cost(command[0], args)
    curve = [
        {"pictures": pictures * i, "calls": calls * i, "seconds": round(seconds, 1), "reward": float(row["reward_held_out"])}
        for i, (row, seconds) in enumerate(zip(rows, seconds_at(folder)), 1)
        if row["reward_held_out"] != "nan"
    ]
    kept = {"command": " ".join(["python", *command]).replace(f"{ROOT}/", ""), "seed": seed}
    kept |= {"hardware": f"1 thread of {platform.processor() or platform.machine()}, torch CPU float32, two runs at a time"}
    kept |= {"pictures": pictures * len(rows), "calls": calls * len(rows), "curve": curve, "table": found["table"]}
    return kept | ({"by_steps": found["by_steps"]} if "by_steps" in found else {})


def final_means(record: dict) -> dict:
    """{metric: (base, tuned)} over the held-out prompts with 10 steps a picture."""
    if "by_steps" in record:
        (row,) = (row for row in record["by_steps"] if row["steps"] == 10)
        return {name: (row["means"]["standard"][name], row["means"]["learnt"][name]) for name in METRICS}
    return {row["metric"]: (row["base"], row["tuned"]) for row in record["table"]}


def at_budget(record: dict, budget: int) -> float:
    """The held-out reward of the last evaluation within a budget of model calls."""
    within = [point["reward"] for point in record["curve"] if point["calls"] <= budget * 1.02]
    return within[-1] if within else math.nan


def table(results: Path) -> str:
    """Markdown: budget and held-out means over seeds ± standard error over seeds, one row an arm."""
    stored = {arm: records for arm in ARMS if (records := load(results, arm))}
    if "graft" not in stored:
        return "(no result of GRAFT yet)"
    budget = stored["graft"][0]["calls"]
    names = ["", "pictures", "calls (thousands)", "seconds", f"strict at {budget / 1000:.0f} k calls", "strict, end"]
    lines = [header(*names, "graded", "fit", "JPEG (−kB)", "diversity")]
    base = final_means(stored["graft"][0])
    lines.append(line("base", "", "", "", "", *(f"{base[name][0]:.3f}" for name in METRICS)))
    for row in json.loads((ROOT / "benchmarks" / "results" / "base.json").read_text())["rows"]:
        if row.get("best_of", 1) > 1 and "held_out shapes_strict" in row:
            label, calls = f"best of {row['best_of']} at sampling time", f"{row['calls']} calls a picture"
            lines.append(line(label, "", calls, "", "", "{:.3f} ± {:.3f}".format(*row["held_out shapes_strict"]), *[""] * 4))
    for arm, records in stored.items():
        cells = [f"{ARMS[arm][0]} ({len(records)})", f"{records[0]['pictures']:,}", f"{records[0]['calls'] / 1000:.0f}"]
        cells.append(f"{np.mean([r['curve'][-1]['seconds'] for r in records]):.0f}")
        cells.append(mean_and_se([at_budget(r, budget) for r in records]))
        cells += [mean_and_se([final_means(r)[name][1] for r in records]) for name in METRICS]
        lines.append(line(*cells))
    return "\n".join(lines)


def slug(name: str) -> str:
    """For a file's name."""
    return re.sub(r"[^\w.-]+", "_", name)


def tuning() -> str:
    """Markdown: reward on the validation prompts at two numbers of pictures, one row a setting."""
    lines = [header("tried on validation prompts", "pictures", "calls (thousands)", "strict")]
    for name in TUNING:
        (found,) = load(RESULTS / "tuning", slug(name)) or [None]
        if found:
            middle, end = found["curve"][-2 if len(found["curve"]) < 6 else 2], found["curve"][-1]
            cells = [
                (f"{point['pictures']:,}", f"{point['calls'] / 1000:.0f}", f"{point['reward']:.3f}") for point in (middle, end)
            ]
            lines.append(line(name, *(" / ".join(pair) for pair in zip(*cells))))
    return "\n".join(lines)


def reached(results: Path) -> str:
    """Markdown: where GRAFT's held-out reward passed DDPO's best and last one, and at what share of DDPO's cost until there (curves:
    means over seeds, at the evaluations that there were)."""

    def curve(arm):
        records = load(results, arm)
        names = records[0]["curve"][0] if records else ()
        return {name: np.mean([[point[name] for point in r["curve"]] for r in records], 0) for name in names}

    curves = {arm: found for arm in ARMS if (found := curve(arm))}
    ours = [arm for arm in ("graft", "graft_tuned") if arm in curves]
    lines = [header("reward of", *(ARMS[arm][0] for arm in ours))]
    for arm, which in [(arm, which) for arm in curves for which in ("best", "last") if arm.startswith("ddpo") and ours]:
        ddpo, cells = curves[arm], []
        at = ddpo["reward"].argmax() if which == "best" else -1
        for graft in (curves[arm] for arm in ours):
            passed = np.flatnonzero(graft["reward"] >= ddpo["reward"][at])
            cells.append("not reached")
            if len(passed):
                costs = [f"{graft[name][passed[0]]:,.0f} (1/{ddpo[name][at] / graft[name][passed[0]]:.1f})" for name in COSTS]
                said = ", ".join(f"{cost} {name}" for cost, name in zip(costs, COSTS))
                cells[-1] = f"{graft['reward'][passed[0]]:.3f} after {said}"
        spent = ", ".join(f"{ddpo[name][at]:,.0f} {name}" for name in COSTS)
        lines.append(line(f"{ARMS[arm][0]}, {which}: {ddpo['reward'][at]:.3f} after {spent}", *cells))
    return "\n".join(lines) if len(lines) > 1 else ""


def figure(results: Path) -> None:
    """graft__compare.png: held-out reward against pictures sampled and against seconds; bands: standard error over seeds."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, name in zip(canvas.subplots(1, 2, sharey=True), ("pictures", "seconds")):
        for arm in ARMS:
            records = load(results, arm)
            if not records:
                continue
            x = np.mean([[point[name] for point in r["curve"]] for r in records], 0)
            y = np.array([[point["reward"] for point in r["curve"]] for r in records])
            axis.plot(x, y.mean(0), STYLES[arm], markersize=3, linewidth=1, label=ARMS[arm][0])
            if len(y) > 1:
                error = y.std(0, ddof=1) / len(y) ** 0.5
                axis.fill_between(x, y.mean(0) - error, y.mean(0) + error, color=axis.lines[-1].get_color(), alpha=0.2)
        axis.set(
            xlabel={"pictures": "pictures sampled and scored", "seconds": "seconds on one CPU thread"}[name], xscale="log"
        )
        least, most = axis.get_xlim()
        ticks = [n * 10**k for k in range(6) for n in (1, 2, 5) if least <= n * 10**k <= most]
        axis.set(xticks=ticks, xticklabels=ticks)
        axis.minorticks_off()
    canvas.axes[0].set_ylabel("held-out strict reward")
    canvas.legend(*canvas.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    save_figure(canvas, results / "graft__compare.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    runs, results = (QUICK, QUICK / "results") if options.quick else (ROOT / "runs" / "compare", RESULTS)
    with ThreadPoolExecutor(options.jobs) as pool:

        def start(jobs):
            list(pool.map(lambda job: run(*job), jobs))

        if options.tune:
            start(
                (RESULTS / "tuning" / f"{slug(a)}__0.json", runs / slug(a), [*c.split(), *VALID], 0) for a, c in TUNING.items()
            )
            print(tuning())
            sys.exit()
        for seed in () if options.tables else options.seeds or ([0] if options.quick else [0, 1, 2]):
            commands = {arm: ARMS[arm][1].format(run=runs, seed=seed).split() for arm in options.arms}
            if options.quick:
                commands = {arm: [*c, *ARMS[arm][2].split(), "--eval_samples", "2"] for arm, c in commands.items()}
            jobs = [(results / f"{arm}__{seed}.json", runs / f"{arm}__{seed}", c, seed) for arm, c in commands.items()]
            start(job for job in jobs if "pgraft_noise_ppo" not in job[0].name)
            start(job for job in jobs if "pgraft_noise_ppo" in job[0].name)  # needs P-GRAFT's run of this seed
    print(f"{table(results)}\n\n{reached(results)}")
    figure(results)
