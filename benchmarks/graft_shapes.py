"""Every GRAFT row of the README: arms x seeds of graft.py on the embedded model, each an ordinary command, two at a time.

Run: python benchmarks/graft_shapes.py            (everything that benchmarks/results/graft lacks, then the tables)
     python benchmarks/graft_shapes.py --tables   (only the tables, from the stored results)
     python benchmarks/graft_shapes.py --arms graft none --seeds 0 1 2
The "valid" arms compare the losses under guidance; they hold out benchmarks/prompts_valid.txt, a part of the training prompts.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "graft"
VALID = ["--prompts", "benchmarks/prompts_tune.txt", "--eval_prompts", "benchmarks/prompts_valid.txt"]
METRICS = "shapes_strict shapes_graded shapes_fit jpeg_compressibility diversity brightness contrast saturation".split()
GUIDED = ["--guidance", "3", "--rounds", "4", "--prompts_per_round", "80", "--updates", "40", "--eval_samples", "2"]
ARMS = {
    "graft": [],
    "none": ["--rule", "none"],
    "preference": ["--rule", "preference"],
    "threshold": ["--rule", "threshold", "--threshold", "1"],
    "valid_guidance3_guided": [*VALID, *GUIDED],
    "valid_guidance3_conditional": [*VALID, *GUIDED, "--no-guided_loss"],
    "valid_guidance3_dropout": [*VALID, *GUIDED, "--no-guided_loss", "--prompt_dropout", "0.1"],
    "jpeg": ["--reward", "jpeg_compressibility"],
    "jpeg_none": ["--reward", "jpeg_compressibility", "--rule", "none"],
}


def execute(command: list[str]) -> str:
    """`python <command>` on one thread; what it says if it fails, else nothing."""
    pipes = {"capture_output": True, "text": True, "start_new_session": True}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    return done.stderr[-2000:] or "it said nothing" if done.returncode else ""


def store(
    results: Path, arm: str, seed: int, command: list[str], pictures: tuple[str, ...], rows_of: str, switches: list[str] = []
) -> dict | None:
    """One run of a script -> results/<arm>__<seed>.json with its command, results.json and, as rows_of, metrics.csv; of seed 0 the
    pictures too. switches: evaluate its LoRA also with the base model from these levels on (pgraft.py --evaluate). None if it is
    there already or the run failed."""
    target = results / f"{arm}__{seed}.json"
    if target.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        output = f"{folder}/run"
        runs = {output: command}
        for switch in switches:
            runs[f"{folder}/{switch}"] = ["pgraft.py", "--evaluate", output, "--switch", switch]
        for place, arguments in runs.items():
            if failed := execute([*arguments, "--output", place]):
                print(f"{arm} {seed} failed:\n{failed}", file=sys.stderr, flush=True)
                return None
        found, *switched = (json.loads(Path(place, "results.json").read_text()) for place in runs)
        with open(Path(output, "metrics.csv"), newline="") as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
        if seed == 0:
            for name in pictures:
                (results / f"{arm}__{name}").write_bytes(Path(output, name).read_bytes())
    hardware = f"1 thread of {platform.processor() or platform.machine()}, torch CPU float32, two runs at a time on two cores"
    record = {"command": " ".join(["python", *command]), "seed": seed, "hardware": hardware, **found, rows_of: rows}
    if switched:
        record["switched"] = {switch: result["table"] for switch, result in zip(switches, switched)}
    target.write_text(json.dumps(record, indent=1) + "\n")
    return record


def run(results: Path, arm: str, command: list[str], seed: int, switches: list[str]) -> None:
    """A run of graft.py or pgraft.py, as `store` keeps it; one line says how it ended."""
    record = store(results, arm, seed, [*command, "--seed", str(seed)], ("grid.png", "curves.png"), "rounds", switches)
    if record:
        change = record["table"][0]
        gained = f"{change['base']:.3f} -> {change['tuned']:.3f} +- {change['se']:.3f}"
        print(f"{arm} {seed}: {gained}, {record['seconds']:.0f} s", flush=True)


def load(results: Path, arm: str) -> list[dict]:
    """The stored records of an arm, by seed."""
    return [json.loads(f.read_text()) for f in sorted(results.glob(f"{arm}__[0-9]*.json"))]


def line(*cells) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def header(*cells) -> str:
    return line(*cells) + "\n" + "|---" * len(cells) + "|"


def held_out(tables: list[list[dict]], metrics: list[str] = METRICS, column: str = "tuned") -> list[str]:
    """One cell for each metric: the mean over runs of their final tables, +- standard error over runs."""
    found = [{row["metric"]: row for row in table} for table in tables]
    return [mean_and_se([table[metric][column] for table in found]) for metric in metrics]


def by_round(records: list[dict]) -> list[str]:
    """One cell for each round, from the base on: the held-out reward that was optimised."""
    rounds = zip(*([row["reward_held_out"] for row in r["rounds"]] for r in records))
    return [mean_and_se([records[0]["table"][0]["base"]]), *map(mean_and_se, rounds)]


def tables(results: Path, arms: list[str]) -> None:
    """Markdown: held-out means over seeds +- standard error over seeds, one row per arm; then the held-out reward by round."""
    stored = {arm: records for arm in arms if (records := load(results, arm))}
    print(header("", *METRICS, "seconds"))
    for i, (arm, records) in enumerate(stored.items()):
        if not i:
            print(line("base", *held_out([records[0]["table"]], column="base"), ""))
        seconds = f"{np.mean([r['seconds'] for r in records]):.0f}"
        print(line(f"{arm} ({len(records)})", *held_out([r["table"] for r in records]), seconds))
        for switch in records[0].get("switched", ()):
            print(line(f"{arm}, base from {switch} on", *held_out([r["switched"][switch] for r in records]), ""))
    rounds = {arm: by_round(records) for arm, records in stored.items()}
    print("\n" + header("held-out reward after round", *range(max(map(len, rounds.values()), default=0))))
    for arm, cells in rounds.items():
        print(line(arm, *cells))


def main(doc: str, results: Path, arms: dict[str, list[str]], switches: dict[str, list[str]]) -> None:
    """Command line of a runner. arms: name -> script and arguments; switches: name -> levels for run()."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=list(arms))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    results.mkdir(parents=True, exist_ok=True)
    if not options.tables:
        jobs = [(arm, seed) for seed in options.seeds for arm in options.arms]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: run(results, job[0], arms[job[0]], job[1], switches.get(job[0], [])), jobs))
    tables(results, options.arms)


def mean_and_se(values) -> str:
    """Mean, and its standard error if there is more than one value."""
    values = np.array(values)
    se = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{se}"


if __name__ == "__main__":
    main(__doc__, RESULTS, {name: ["graft.py", *arguments] for name, arguments in ARMS.items()}, {})
