"""Every Inverse Noise Correction row of the README: arms x seeds of inverse_noise_correction.py, each an ordinary command, two at a time.

Run: python benchmarks/inc_shapes.py            (everything that benchmarks/results/inc lacks, then the tables)
     python benchmarks/inc_shapes.py --tables   (only the tables, from the stored results)
     python benchmarks/inc_shapes.py --arms default as_large --seeds 0 1 2
Every seed has a base of its own, seed 0 the embedded one, the others trained first into runs/inc_bases/<seed>: the standard errors are
over bases, and all rows of one seed share base, pictures and evaluation noises, so that differences are paired.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from graft_shapes import ROOT, header, line, load, mean_and_se, store

RESULTS = ROOT / "benchmarks" / "results" / "inc"
BASES = Path("runs") / "inc_bases"  # relative to ROOT, so that the stored commands hold no local path
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = ["--no-longer", "--eval_powers=", "--eval_steps=6"]
ARMS = {
    "default": [],
    "steps_64": ["--steps", "64", "--pictures", "6000", "--no-longer", "--eval_powers=", "--eval_steps", "64,65,128"],
    "scale_start": ["--normalise", "scale", *SHORT],
    "as_large": ["--corrector_network", "token:128,128,128", *SHORT],
    "plain_iteration": ["--memory", "0", "--updates", "1", *SHORT],
    "three_times": ["--pictures", "60000", "--updates", "12000", *SHORT],
}
COLUMNS = ("steps", "MFLOP a picture", "ms", "Fréchet distance", "corrector minus this, paired")


def base_of(seed: int) -> str:
    """The base of a seed: the embedded one is seed 0's."""
    return str(BASES / str(seed)) if seed else "shapes/flow"


def train_base(seed: int) -> None:
    """The base of a seed, unless it is there."""
    if seed and not (ROOT / BASES / str(seed) / "scheduler").exists():
        command = f"-m shapes.train_flow --seed {seed} --no-features --out {base_of(seed)}".split()
        subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, check=True, start_new_session=True)


def run(arm: str, seed: int) -> None:
    """One run -> RESULTS/<arm>__<seed>.json with its command, results and rows."""
    command = ["inverse_noise_correction.py", "--seed", str(seed), "--model", base_of(seed), *ARMS[arm]]
    record = store(RESULTS, arm, seed, command, ("curve.png", "grid.png", "noise.png"), "updates")
    if record is None:
        return
    found = values_of(record)
    shown = {name: value for name, value in found.items() if not name.startswith("base,")}
    print(f"{arm} {seed}: " + ", ".join(f"{name} {fd:.3f}" for name, fd in shown.items()), flush=True)


def values_of(record: dict) -> dict[str, float]:
    """{row of the run's table: Frechet distance}; base rows are named by their steps as multiples of N where they are."""
    n, found = record["steps"], {"data against data": record["floor"]}
    for row in record["table"]:
        name = row["arm"]
        if name in ("base", "base trained on"):
            by_flops = row["steps"] == record["matched_steps"] and row["steps"] % n
            name += (
                ", matched FLOPs" if by_flops else f", {row['steps'] // n} N" if row["steps"] % n == 0 else f", {row['steps']}"
            )
        found[name] = row["fd"]
    return found


def rows(records: list[dict]) -> dict[str, list]:
    """{row of the table: its COLUMNS}, means over records +- standard error; the floor has no steps and no cost."""
    found, costs = [values_of(r) for r in records], [["", "", ""]]
    milliseconds = np.mean([r["seconds"]["per_picture"] for r in records], 0) * 1e3
    for row, time in zip(records[0]["table"], milliseconds, strict=True):
        costs.append([row["steps"], f"{row['flops'] / 1e6:.1f}", f"{time:.2f}"])
    return {
        name: [*cost, *(mean_and_se(x) for x in ([v[name] for v in found], [v["corrector"] - v[name] for v in found]))]
        for name, cost in zip(found[0], costs, strict=True)
    }


def tables(arms: list[str]) -> None:
    """Markdown: Frechet distances, mean over seeds +- standard error; paired differences of the corrector; the inversion."""
    for arm in arms:
        records = load(RESULTS, arm)
        if not records:
            continue
        print("\n" + header(f"{arm} ({len(records)})", *COLUMNS))
        for name, cells in rows(records).items():
            print(line(name, *cells))
        inversion = [r["inversion"] for r in records]
        print(
            f"\nleft out {mean_and_se([i['left_out'] / i['pictures'] for i in inversion])}, round trip "
            f"{np.mean([i['round_trip_error'] for i in inversion]):.1e}, model calls per picture "
            f"{mean_and_se([i['calls'] / i['pictures'] for i in inversion])}, contraction "
            + " ".join(f"{c:.2f}" for c in np.mean([i["contraction"] for i in inversion], 0))
        )
        held_out = [(r["corrector"]["held_out"], r["corrector"]["identity"]) for r in records]
        lines = [
            f"held-out loss {mean_and_se([a for a, _ in held_out])} ({mean_and_se([b for _, b in held_out])} with velocity 0)"
        ]
        lines.append(f"kurtosis of the inverted noises {mean_and_se([r['noise']['inverted']['kurtosis'] for r in records])}")
        lines.append(f"{np.mean([r['seconds']['total'] for r in records]):.0f} s")
        print(", ".join(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not options.tables:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(train_base, options.seeds))
            list(pool.map(lambda job: run(*job), [(a, s) for s in options.seeds for a in options.arms]))
    tables(options.arms)
