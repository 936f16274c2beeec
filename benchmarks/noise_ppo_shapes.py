"""Every noise PPO row of the README: arms x seeds of noise_ppo.py on the embedded model, each an ordinary command, two at a time.

Run: python benchmarks/noise_ppo_shapes.py            (everything that benchmarks/results/noise_ppo lacks, then the tables)
     python benchmarks/noise_ppo_shapes.py --tables   (only the tables, from the stored results)
     python benchmarks/noise_ppo_shapes.py --arms mean both --seeds 0 1 2
Arms "valid_..." hold out benchmarks/prompts_valid.txt, a part of the training prompts: settings may be chosen on them only.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from graft_shapes import ROOT, VALID, header, line, load, mean_and_se, store

RESULTS = ROOT / "benchmarks" / "results" / "noise_ppo"
SHORT = ["--eval_steps", "4,40", "--no-controls"]
BOTH = ["--no-mean_only"]  # mean and standard deviation are learnt
ARMS = {
    "mean": [],
    "both": BOTH,
    "unconditional": [*BOTH, "--policy", "unconditional"],
    "std_only": [*BOTH, "--std_only", *SHORT],
    **{f"both_kl_{weight}": [*BOTH, "--kl_weight", weight, *SHORT] for weight in ("0", "0.02", "0.05")},
    "both_sum": [*BOTH, "--reduction", "sum", "--clip", "0.256", *SHORT],  # 256 numbers in a latent: the same clip, in nats
    "both_clip_0.2": [*BOTH, "--clip", "0.2", *SHORT],  # averaged over 256 numbers a ratio hardly ever gets that far
    "both_sum_clip_100": [*BOTH, "--reduction", "sum", "--clip", "100", *SHORT],
    "valid_mean": [*VALID, *SHORT],
    "valid_both": [*VALID, *BOTH],
}
TRAINING = "clip_fraction approximate_kl explained_variance kl_per_dimension mean_rms mean_rms_own std std_spread".split()


def run(arm: str, seed: int) -> None:
    """One training run -> RESULTS/<arm>__<seed>.json with its command, tables and rows."""
    command = ["noise_ppo.py", "--seed", str(seed), *ARMS[arm]]
    record = store(RESULTS, arm, seed, command, ("grid.png", "curves.png", "gain.png"), "iterations")
    if record is None:
        return
    gains = ", ".join(f"{row['steps']}: {row['gain']:+.3f}" for row in record["by_steps"])
    print(f"{arm} {seed}: gain at steps {gains}; {record['seconds']:.0f} s", flush=True)


def by_steps(records: list[dict], steps: tuple[int, ...], name: str) -> list[str]:
    """One cell for each of `steps`: the mean of by_steps' `name` over runs; empty where no run was evaluated."""
    rows = [[row[name] for r in records for row in r["by_steps"] if row["steps"] == n] for n in steps]
    return [mean_and_se(values) if values and None not in values else "" for values in rows]


def tables(arms: list[str]) -> None:
    """Markdown, means over seeds +- standard error over seeds: reward by steps, gain by steps, diversity, and the training."""
    stored = {arm: records for arm in arms if (records := load(RESULTS, arm))}
    if not stored:
        return
    everything = [record for records in stored.values() for record in records]
    controls = [record for record in everything if "one_for_all" in record["by_steps"][0]]  # evaluated unless --no-controls
    widest = max(everything, key=lambda record: len(record["by_steps"][0]) * len(record["by_steps"]))
    steps = [row["steps"] for row in widest["by_steps"]]

    def table(title, lines):
        print("\n" + header(title, *steps))
        for name, cells in lines.items():
            print(line(name, *cells))

    same = [name for name in widest["by_steps"][0] if name in ("standard", "temperature") or name.startswith("best_of")]
    lines = {name: by_steps([widest], steps, name) for name in same}  # training has no part in these
    lines["one for all (mean of a policy over prompts)"] = by_steps(controls, steps, "one_for_all")
    lines |= {f"{arm} ({len(records)})": by_steps(records, steps, "learnt") for arm, records in stored.items()}
    table("held-out reward at steps", lines)
    table("gain at steps", {arm: by_steps(records, steps, "gain") for arm, records in stored.items()})
    kept = {arm: by_steps(records, steps, "diversity_kept") for arm, records in stored.items()}
    table("share of diversity kept at steps", kept)
    print("\n" + header("training, mean over iterations", *TRAINING, "held-out KL per dimension", "seconds"))
    for arm, records in stored.items():
        cells = [mean_and_se([np.mean([row[name] for row in r["iterations"]]) for r in records]) for name in TRAINING]
        cells += [mean_and_se([r["kl_per_dimension"] for r in records]), f"{np.mean([r['seconds'] for r in records]):.0f}"]
        print(line(arm, *cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    if not options.tables:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: run(*job), [(a, s) for s in options.seeds for a in options.arms]))
    tables(options.arms)
