"""Make every table and figure of README.md and docs/ that shows results, from benchmarks/results.

Run: python benchmarks/tables.py           (rewrite them)
     python benchmarks/tables.py --check   (only print the differences; exit code 1 if there are any)
In a page, a part stands between `<!-- generated: name -->` and `<!-- end -->`. The function that is decorated
with @part("name") makes it.
"""

import contextlib
import functools
import hashlib
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import faults
import flow_steps
from graft import Args as GraftArgs
from noise_ppo import Args as NoiseArgs
from run import ARMS, LAYOUT_LEVELS, RESULTS, ROOT, load
from shapes.render import PROMPT_FILES
from shapes.train import CAPTIONS
from utils.figures import Figure, save_figure
from utils.runs import print_table, write_atomically

PART = re.compile(r"(<!-- generated: (.+?) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)

METRICS = {  # metric: column
    "shapes_strict": "strict",
    "shapes_graded": "graded",
    "shapes_fit": "fit",
    "jpeg_compressibility": "JPEG (−kB)",
    "diversity": "diversity",
    "brightness": "brightness",
    "contrast": "contrast",
    "saturation": "saturation",
}
FOUR = ["shapes_strict", "shapes_graded", "shapes_fit", "diversity"]
FIVE = ["shapes_strict", "shapes_graded", "shapes_fit", "jpeg_compressibility", "diversity"]
PARTS = {}  # name: function that makes the part


def part(name: str):
    """Decorator: the function makes the part of this name."""

    def add(function):
        PARTS[name] = function
        return function

    return add


# ---------------------------------------------------------------- stored results, Markdown


@functools.cache
def stored(name: str):
    """The content of benchmarks/results/<name>.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def runs(name: str) -> list[dict]:
    """The records of folder/arm, one for each seed. FileNotFoundError if there is none."""
    folder, arm = name.rsplit("/", 1)
    records = load(folder, arm)
    if not records:
        raise FileNotFoundError(f"benchmarks/results/{name}__*.json: no record")
    return records


def table(columns, rows) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def average(values) -> str:
    """The mean, ± its standard error if there is more than one value."""
    values = np.array(values)
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}"


def mean_of(cell: str) -> str:
    """A cell of `average` without the standard error."""
    return cell.split()[0]


def with_error(pair) -> str:
    """(mean, standard error) as a cell."""
    return "{:.3f} ± {:.3f}".format(*pair)


def final(records: list[dict], metrics=METRICS, column: str = "tuned", switch: str = "") -> list[str]:
    """A cell for each metric, averaged over the records' final tables.

    switch: use the evaluation in which the base model takes over at this level.
    """
    tables = [r["switched"][switch] if switch else r["results"]["table"] for r in records]
    rows = [{row["metric"]: row for row in rows} for rows in tables]
    return [average([row[metric][column] for row in rows]) for metric in metrics]


def strict(name: str) -> str:
    """The final strict reward of folder/arm."""
    return final(runs(name), ["shapes_strict"])[0]


def one_seed(label: str, records: list[dict]) -> str:
    """The label, which says so if there is one record only."""
    return f"{label} (one seed)" if len(records) == 1 else label


def seconds_of(records: list[dict]) -> str:
    """The mean time of a run."""
    return f"{np.mean([r['seconds'] for r in records]):.0f}"


def duration(seconds: float) -> str:
    """In words, rounded to ten seconds."""
    minutes, rest = divmod(round(seconds / 10) * 10, 60)
    return f"{minutes} minute{'s' * (minutes != 1)}" + (f" {rest} seconds" if rest else "")


# ---------------------------------------------------------------- README


@part("summary")
def summary() -> str:
    base, best = base_rows()[0]["held_out shapes_strict"][0], best_of("shapes_strict")[8][0]
    standard, learnt = (by_steps(runs("noise_ppo/mean"), (4,), name)[0] for name in ("standard", "learnt"))
    unconditional = by_steps(runs("noise_ppo/unconditional"), (4,), "learnt")[0]
    matched, scaled, corrector = (
        distance("default", arm, steps) for arm, steps in (("base", 10), ("scale only", 8), ("corrector", 8))
    )
    methods = [
        [
            "[GRAFT](docs/graft.md)",
            "LoRA, from accepted images",
            f"strict {base:.3f} → **{strict('graft/graft')}**",
            f"no selection {strict('graft/none')}; best of 8 for 8 × the calls {best:.3f}",
            stored("graft/default_run")["seconds"],
        ],
        [
            "[P-GRAFT](docs/pgraft.md)",
            "LoRA for the noisy levels only",
            f"strict {base:.3f} → **{strict('pgraft/default_x0_0.2')}**",
            f"no selection {strict('pgraft/default_none_0.2')}",
            stored("pgraft/default_run")["seconds"],
        ],
        [
            "[Noise PPO](docs/noise_ppo.md)",
            "distribution of the initial noise, by prompt",
            f"strict at 4 steps {mean_of(standard)} → **{learnt}**",
            f"one distribution for all prompts {unconditional}",
            stored("noise_ppo/default_run")["seconds"],
        ],
        [
            "[Inverse Noise Correction](docs/inverse_noise_correction.md)",
            "distribution of the initial noise, from images",
            f"Fréchet distance at equal FLOPs {matched} → **{corrector}**",
            f"noise times one number {scaled}",
            stored("inc/default_run")["seconds"],
        ],
    ]
    rows = [[*cells, duration(seconds)] for *cells, seconds in methods]
    columns = ["method", "what is learnt", "on held-out prompts", "controls", "default run on two CPU cores"]
    return table(columns, rows)


@part("output")
def output() -> str:
    """The end of what `python graft.py` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = stored("graft/default_run")["results"]["table"]
        print_table(rows, "held-out prompts", "   (shapes_strict was optimised)")
    return f"```text{printed.getvalue()}```"


# ---------------------------------------------------------------- the embedded model before any training


@part("world")
def world() -> str:
    train, held_out = (len(PROMPT_FILES[name].read_text().splitlines()) for name in ("train", "eval"))
    share = [f"{CAPTIONS[name]:.0%}".replace("%", " %") for name in ("reversed", "right", "colour")]
    columns = ["prompts to train on", "held-out prompts", "captions: relation reversed", "right"]
    return table([*columns, "one colour wrong"], [[train, held_out, *share]])


def base_rows() -> list[dict]:
    return stored("base")["rows"]


def best_of(reward: str) -> dict[int, tuple[float, float]]:
    """{n: (mean, standard error) of the best of n held-out images of the base}"""
    name = f"held_out {reward}"
    return {row["best_of"]: row[name] for row in base_rows() if "best_of" in row and name in row}


def base_label(row: dict) -> str:
    if "best_of" in row:
        return f"best of {row['best_of']} at sampling time"
    if "temperature" in row:
        return ("η = 0, " if row.get("eta") == 0 else "") + f"noise temperature {row['temperature']:g}"
    return f"guidance {row['guidance']:g}" + " (default)" * (row["guidance"] == 1)


@part("base")
def base() -> str:
    columns = [*(f"held_out {name}" for name in FOUR), "valid shapes_strict"]
    rows = [
        [base_label(row), row["calls"], *(with_error(row[name]) if name in row else "" for name in columns)]
        for row in base_rows()
        if row.get("best_of", 2) > 1 and "held_out shapes_strict" in row
    ]
    tried = [row for row in base_rows() if "valid shapes_strict" in row and "eta" not in row]
    tried = [tried[0] | {"temperature": 1}, *tried]  # the first has guidance 1 and leaves the noise as it is
    guidance, temperature = (
        max((row for row in tried if name in row), key=lambda row: row["valid shapes_strict"][0])[name]
        for name in ("guidance", "temperature")
    )
    titles = [*(METRICS[name] for name in FOUR), "(strict on validation)"]
    return f"""{table(["base, held-out prompts", "U-Net calls an image", *titles], rows)}

Best on the validation prompts: guidance {guidance:g} and noise temperature {temperature:g}, the defaults."""


# ---------------------------------------------------------------- GRAFT

GRAFT_ROWS = {
    "graft": "GRAFT, best of 8 (default)",
    "none": "control: no selection, `--rule none`",
    "preference": "better of each pair, `--rule preference`",
    "threshold": "`--rule threshold --threshold 1`",
}
JPEG_ROWS = {"jpeg": "GRAFT `--reward jpeg_compressibility`", "jpeg_none": "control: `--rule none`"}
GUIDANCE_ROWS = {
    "guided": "guided prediction (default)",
    "conditional": "conditional, `--no-guided_loss`",
    "dropout": "conditional, `--no-guided_loss --prompt_dropout 0.1`",
}


def graft_table(rows: dict[str, str], extra=()) -> str:
    """rows: {arm: label}; extra: further rows."""
    first = runs(f"graft/{next(iter(rows))}")[:1]
    lines = [["base", *final(first, column="base"), ""]]
    for arm, label in rows.items():
        lines.append([label, *final(runs(f"graft/{arm}")), seconds_of(runs(f"graft/{arm}"))])
    return table(["", *METRICS.values(), "seconds"], [*lines, *extra])


@part("graft")
def graft() -> str:
    args, rows = GraftArgs(), [run["results"]["table"][0] for run in runs("graft/none")]
    change, error = (np.mean([row[name] for row in rows]) for name in ("difference", "se"))
    return f"""{graft_table(GRAFT_ROWS)}

Every row: {args.rounds} × {args.prompts_per_round} prompts × {args.samples} samples, {args.rounds} × \
{args.updates} updates of {args.batch} images.
Without selection strict changes by {change:.3f}, paired over prompts, with a standard error of {error:.3f} \
(means over seeds)."""


@part("jpeg")
def jpeg() -> str:
    calls = next(row["calls"] for row in base_rows() if row.get("best_of") == 8)
    best = {"jpeg_compressibility": with_error(best_of("jpeg_compressibility")[8])}
    label = f"base, best of 8 at sampling time ({calls} calls an image)"
    return graft_table(JPEG_ROWS, [[label, *(best.get(metric, "") for metric in METRICS), ""]])


def by_round(records: list[dict]) -> list[str]:
    """The held-out reward that was optimised: a cell for the base, then one for each round."""
    rounds = zip(*([row["reward_held_out"] for row in r["metrics"]] for r in records))
    return [average([records[0]["results"]["table"][0]["base"]]), *map(average, rounds)]


def rounds_table(rows: dict[str, str]) -> str:
    """rows: {arm: label}."""
    lines = [[label, *by_round(runs(f"graft/{arm}"))] for arm, label in rows.items()]
    return table(["held-out reward after round", *range(len(lines[0]) - 1)], lines)


@part("graft by round")
def graft_by_round() -> str:
    return rounds_table(GRAFT_ROWS)


@part("jpeg by round")
def jpeg_by_round() -> str:
    return rounds_table(JPEG_ROWS)


@part("guidance")
def guidance() -> str:
    others = ["shapes_fit", "diversity"]
    reward, *cells = final(runs("graft/valid_guidance3_guided")[:1], ["shapes_strict", *others], "base")
    lines = [["base at guidance 3", reward, "", "", "", *cells, ""]]
    for arm, label in GUIDANCE_ROWS.items():
        records = runs(f"graft/valid_guidance3_{arm}")
        lines.append([label, *by_round(records)[1:], *final(records, others), seconds_of(records)])
    return table(["loss on", "strict after round 1", 2, 3, 4, "fit", "diversity", "seconds"], lines)


@part("speed")
def speed() -> str:
    rate = stored("graft/default_run")["images_per_second_by_round"]
    seconds = {name: value for name, value in stored("sampler_speed").items() if isinstance(value, float)}
    rows = [[name, f"{value:.2f}"] for name, value in seconds.items()]
    return f"""{table(["64 images, 10 steps, decoded", "seconds on one CPU thread"], rows)}

The default run samples and scores {min(rate)} to {max(rate)} images/s on two CPU cores."""


# ---------------------------------------------------------------- P-GRAFT

LEVELS = ("0.2", "0.4", "0.5", "0.7")


def probed() -> dict[str, str]:
    """{level: V(t) ± standard error} of the stored probe."""
    (record,) = runs("pgraft/probe")
    return {f"{row['switch']:.1f}": f"{row['unresolved']:.2f} ± {row['se']:.2f}" for row in record["metrics"]}


def pgraft_table(graft_arm: str, budget: str, arms, switches, switched_arm="", probe=True) -> str:
    """Rows: base, GRAFT, P-GRAFT, GRAFT's LoRA switched off.

    arms: data_level of the budget. switches: levels from which on the base takes over, in the evaluations of
    switched_arm (graft_arm if empty).
    """
    unresolved = probed() if probe else {}
    lines = [["base", "", *final(runs(graft_arm)[:1], FOUR, "base")]]
    lines.append(["GRAFT", "", *final(runs(graft_arm), FOUR)])
    for arm in arms:
        data, level = arm.split("_")
        label = f"P-GRAFT `--data {data} --switch {level}`"
        label = f"control: switch {level}, `--rule none`" if data == "none" else label
        records = runs(f"pgraft/{budget}_{arm}")
        lines.append([one_seed(label, records), unresolved.get(level, ""), *final(records, FOUR)])
    for level in switches:
        records = runs(switched_arm or graft_arm)
        label = one_seed(f"GRAFT's LoRA, base from {level} on", records)
        lines.append([label, unresolved.get(level, ""), *final(records, FOUR, switch=level)])
    return table(["", "V(t)", *(METRICS[name] for name in FOUR)], lines)


@part("pgraft")
def pgraft() -> str:
    arms = [f"{data}_{level}" for data in ("x0", "xs") for level in LEVELS] + ["none_0.2"]
    fastest = min(record["seconds"] for arm in arms for record in runs(f"pgraft/default_{arm}"))
    return f"""{pgraft_table("graft/graft", "default", arms, LEVELS, "pgraft/default_graft")}

One CPU thread each, two runs at a time. The fastest run took {fastest:.0f} s; others took longer, because \
other work ran beside them."""


@part("pgraft small")
def pgraft_small() -> str:
    levels = ("0.2", "0.4", "0.7")
    arms = [f"{data}_{level}" for data in ("x0", "xs") for level in levels]
    return pgraft_table("pgraft/small_graft", "small", arms, levels)


@part("pgraft long")
def pgraft_long() -> str:
    return pgraft_table("pgraft/long_graft", "long", ["x0_0.4", "xs_0.4"], ("0.2", "0.4", "0.7"))


@part("pgraft guidance")
def pgraft_guidance() -> str:
    return pgraft_table("pgraft/guidance3_graft", "guidance3", ["x0_0.4"], ("0.2", "0.4"), probe=False)


@part("pgraft limit")
def pgraft_limit() -> str:
    levels = ("0.2", "0.4")
    rows = [["base", final(runs("pgraft/valid_x0_0.2"), ["shapes_strict"], "base")[0]]]
    rows += [[f"`--switch {level}`", strict(f"pgraft/valid_x0_{level}")] for level in levels]
    return table(["one seed", "strict on the validation prompts"], rows)


@part("pgraft loss")
def pgraft_loss() -> str:
    def cell(arm):
        loss = np.mean([run["metrics"][-1]["loss"] for run in runs(f"pgraft/default_{arm}")])
        return f"{loss:.2f}" if loss < 1 else f"{loss:.1f}"

    rows = [[f"`--data {data}`", *(cell(f"{data}_{level}") for level in LEVELS)] for data in ("x0", "xs")]
    return table(["training loss in the last round, switch at", *LEVELS], rows)


# ---------------------------------------------------------------- Noise PPO

STEPS = (4, 5, 10, 20, 40)
NOISE_ROWS = {"mean": "learnt mean (default)", "both": "learnt mean and σ", "unconditional": "unconditional"}


def by_steps(records: list[dict], steps, name: str) -> list[str]:
    """A cell for each number of steps: the mean of by_steps' `name`; empty where no run was evaluated."""
    rows = [row for record in records for row in record["results"]["by_steps"]]
    columns = [[row[name] for row in rows if row["steps"] == n] for n in steps]
    return [average(values) if values else "" for values in columns]


@part("noise ppo")
def noise_reward() -> str:
    both = runs("noise_ppo/both")  # with its controls; the standard noise is the same in all runs
    learnt = {
        "**learnt mean, prompt-conditioned (default)**": "mean",
        "learnt mean and σ, `--no-mean_only`": "both",
        "one μ, σ for all prompts, `--no-mean_only --policy unconditional`": "unconditional",
        "learnt σ alone, `--no-mean_only --std_only`": "std_only",
    }
    lines = [["standard noise", *by_steps(both[:1], STEPS, "standard")]]
    for label, arm in learnt.items():
        records = runs(f"noise_ppo/{arm}")
        lines.append([one_seed(label, records), *by_steps(records, STEPS, "learnt")])
    lines.append(["the conditional policy's mean over prompts", *by_steps(both, STEPS, "one_for_all")])
    temperature = f"noise temperature {both[0]['results']['temperature']:g}, the best on training prompts"
    lines.append([temperature, *by_steps(both[:1], STEPS, "temperature")])
    for n, words in ((2, "twice"), (4, "four times")):
        lines.append([f"best of {n} ({words} the calls)", *by_steps(both[:1], STEPS, f"best_of_{n}")])
    args = NoiseArgs()
    return f"""{table(["strict at steps", *STEPS], lines)}

Trained at {args.steps} steps: {args.iterations} iterations × {args.prompts_per_iteration} prompts × \
{args.samples} samples."""


def noise_by_steps(title: str, name: str, rows: dict[str, str]) -> str:
    """rows: {arm: label}."""
    lines = []
    for arm, label in rows.items():
        records = runs(f"noise_ppo/{arm}")
        lines.append([one_seed(label, records), *by_steps(records, STEPS, name)])
    return table([title, *STEPS], lines)


@part("noise ppo gain")
def noise_gain() -> str:
    rows = NOISE_ROWS | {"std_only": "learnt σ alone"}
    return noise_by_steps("gain over standard noise at steps", "gain", rows)


@part("noise ppo diversity")
def noise_diversity() -> str:
    title = "share of the standard noise's diversity kept at steps"
    return noise_by_steps(title, "diversity_kept", NOISE_ROWS)


@part("noise ppo metrics")
def noise_metrics() -> str:
    standard, learnt = (final(runs("noise_ppo/mean"), column=name) for name in ("standard", "learnt"))
    rows = [["standard noise", *map(mean_of, standard)], ["learnt mean (default)", *learnt]]
    return table(["at 4 steps", *METRICS.values()], rows)


def at_steps(record: dict, steps: int) -> dict:
    """The row of by_steps."""
    return next(row for row in record["results"]["by_steps"] if row["steps"] == steps)


def kept_and_kl(record: dict) -> list[str]:
    """Two cells: the share of the diversity kept at 4 steps, the KL to N(0, I) divided by the dimension."""
    return [f"{at_steps(record, 4)['diversity_kept']:.2f}", f"{record['results']['kl_per_dimension']:.3f}"]


@part("noise ppo validation")
def noise_validation() -> str:
    rows = []
    for arm in ("mean", "both"):
        (record,) = runs(f"noise_ppo/valid_{arm}")
        row = at_steps(record, 4)
        rows.append([NOISE_ROWS[arm], with_error((row["gain"], row["se"])), *kept_and_kl(record)])
    columns = ["validation prompts, one seed", "gain at 4 steps (± over prompts)"]
    return table([*columns, "diversity kept", "KL a dimension"], rows)


@part("noise ppo clip")
def noise_clip() -> str:
    arms = {
        "mean, 0.001 (default)": "both",
        "mean, 0.2": "both_clip_0.2",
        "sum, 0.256": "both_sum",
        "sum, 100": "both_sum_clip_100",
    }
    rows = []
    for label, arm in arms.items():
        record = runs(f"noise_ppo/{arm}")[0]
        clipped = [row["clip_fraction"] for row in record["metrics"]]
        kl = np.mean([row["approximate_kl"] for row in record["metrics"]])
        rewards = [f"{at_steps(record, steps)['learnt']:.3f}" for steps in (4, 40)]
        cells = [f"{np.mean(clipped):.3f}; {clipped[0]:.3f}", f"{kl:.2f}", *rewards, *kept_and_kl(record)]
        rows.append([label, *cells])
    columns = ["`--reduction`, `--clip`", "clip fraction (mean over iterations; first)"]
    columns += ["approximate KL an iteration, nats", "strict at 4 steps", "at 40"]
    return table([*columns, "diversity kept", "KL a dimension"], rows)


@part("noise ppo kl")
def noise_kl() -> str:
    rows = []
    for label, arm in {"0": "both_kl_0", "0.005 (default)": "both", "0.02": "both_kl_0.02"}.items():
        record = runs(f"noise_ppo/{arm}")[0]
        rows.append([label, f"{at_steps(record, 4)['learnt']:.3f}", *kept_and_kl(record)])
    return table(["`--kl_weight`", "strict at 4 steps", "diversity kept", "KL a dimension"], rows)


# ---------------------------------------------------------------- Inverse Noise Correction

CORRECTION_ROWS = [  # label, arm of results/inc, row of its table, steps
    ("base", "default", "base", 8),
    ("base", "default", "base", 10),
    ("base", "default", "base", 16),
    ("base", "default", "base", 32),
    ("base, grid (1 − k/N)^0.6", "grid_0.6_10", "base", 10),
    ("base, grid (1 − k/N)^0.6", "grid_0.6_16", "base", 16),
    ("base trained on with the FLOPs of inversion and corrector", "default", "base trained on", 8),
    ("the same", "default", "base trained on", 10),
    ("scale only, s·ε", "default", "scale only", 8),
    ("Gaussian", "default", "gaussian", 8),
    ("Gaussian, norms matched", "default", "gaussian, norms matched", 8),
    ("**corrector, M = 4 (default)**", "default", "corrector", 8),
    ("corrector, M = 2", "default", "corrector, M = 2", 8),
    ("corrector, M = 8", "default", "corrector, M = 8", 8),
]


def correction_entries(arm: str, name: str, steps: int) -> list[dict]:
    """The row of each run's table."""
    records = [*runs(f"inc/{arm}"), *(runs("inc/default_again") if arm == "default" else [])]
    rows = [row for record in records for row in record["results"]["table"]]
    return [row for row in rows if (row["arm"], row["steps"]) == (name, steps)]


def distance(arm: str, name: str, steps: int) -> str:
    """Fréchet distance, averaged over the runs; without an error if it is the same in all."""
    values = [entry["fd"] for entry in correction_entries(arm, name, steps)]
    return average(values) if len(set(values)) > 1 else f"{values[0]:.2f}"


@part("correction")
def correction() -> str:
    rows, corrector = [], correction_entries("default", "corrector", 8)
    default = stored("inc/default_run")["results"]  # the only run whose times can be compared
    times = zip(default["table"], default["seconds"]["per_image"])
    timed = {(row["arm"], row["steps"], True): f"{1e3 * seconds:.1f}" for row, seconds in times}
    for label, arm, name, steps in CORRECTION_ROWS:
        entries = correction_entries(arm, name, steps)
        if len(entries) < len(corrector):  # of some rows of the base one seed was run: they are all the same
            entries = entries[:1] * len(corrector)
        gain = average([c["fd"] - entry["fd"] for c, entry in zip(corrector, entries, strict=True)])
        cost = [steps, f"{entries[0]['flops'] / 1e6:.0f}", timed.get((name, steps, arm == "default"), "")]
        rows.append([label, *cost, distance(arm, name, steps), "" if name == "corrector" else gain])
    floor = runs("inc/default")[0]["results"]["floor"]
    rows.append(["data against data (floor)", "", "", "", f"{floor:.2f}", ""])
    columns = ["steps", "MFLOP an image", "ms", "Fréchet distance", "corrector minus this, paired"]
    return table(["", *columns], rows)


FLOWS_ROWS = {  # (arm, steps) of a run's table: label
    ("base", 8): "base",
    ("base", 10): "base",
    ("base", 16): "base",
    ("base", 32): "base",
    ("scale only", 8): "scale only",
    ("gaussian", 8): "Gaussian",
    ("gaussian, norms matched", 8): "Gaussian, norms matched",
    ("corrector, M = 2", 8): "corrector, M = 2",
    ("corrector", 8): "**corrector, M = 4**",
    ("corrector, M = 8", 8): "corrector, M = 8",
}


@part("three flows")
def three_flows() -> str:
    records = [*runs("inc/largest"), *runs("inc/largest_flow")]
    entries = [{(row["arm"], row["steps"]): row for row in r["results"]["table"]} for r in records]
    corrector, rows = [entry["corrector", 8]["fd"] for entry in entries], []
    for (arm, steps), label in FLOWS_ROWS.items():
        distances = [entry[arm, steps]["fd"] for entry in entries]
        paired = average(np.subtract(corrector, distances)) if arm != "corrector" else ""
        cost = f"{entries[0][arm, steps]['flops'] / 1e6:.0f}"
        rows.append([label, steps, cost, *(f"{fd:.2f}" for fd in distances), average(distances), paired])
    columns = ["steps", "MFLOP an image", *(f"flow {i}" for i in range(len(entries))), "mean"]
    return table(["", *columns, "corrector minus this, paired"], rows)


@part("grids")
def grids() -> str:
    rows = []
    for power in ("1", "0.6"):
        arms = ["default" if power == "1" else f"grid_{power}_{steps}" for steps in (8, 10, 16)]
        rows.append([power, *(distance(arm, "base", steps) for arm, steps in zip(arms, (8, 10, 16)))])
    return table(["base, power of the grid", "N = 8", "N = 10", "N = 16"], rows)


@part("more images")
def more_images() -> str:
    updates = {  # arm: updates
        "data_noise_0.001": 1800,
        "largest_noise_0.001": 12_000,
        "default": 1800,
        "largest": 12_000,
        "data_noise_0.02": 1800,
        "more_noise_0.02": 2500,
        "large_noise_0.02": 5000,
        "largest_noise_0.02": 12_000,
    }
    rows = []
    for arm, count in updates.items():
        results = runs(f"inc/{arm}")[0]["results"]
        images, loss = results["inversion"]["images"], results["corrector"]
        names = ("corrector, M = 2", "corrector", "corrector, M = 8")
        cells = [f"{correction_entries(arm, name, 8)[0]['fd']:.2f}" for name in names]
        std = arm.rpartition("_")[2] if "noise" in arm else "0.005"
        rows.append([std, images, f"{count} × 128", *cells])
        rows[-1].append(f"{loss['held_out']:.4f} ({loss['identity']:.4f})")
    columns = ["inverted images", "updates × batch", "M = 2", "M = 4", "M = 8"]
    return table(["data noise, seed 0", *columns, "held-out loss (with velocity 0)"], rows)


JUDGES = {  # of benchmarks/judges.py: column
    "embedded": "embedded network",
    "another": "the same, another seed",
    "pixels": "means of 2 × 2 pixels",
    "imagenet": "EfficientNet-Lite0",
    "imagenet, KID": "its KID",
    "copies": "nearer to an inverted image",
}
SAMPLERS = {"base": "base", "gaussian": "Gaussian", "corrector": "**corrector, M = 4**", "": "data (floor)"}


def judgements(run: str) -> dict[str, dict]:
    """{judge: {sampler and steps: distance}} of benchmarks/judges.py for a run."""
    rows = stored(f"judges/{run}")["rows"]
    return {row["judge"]: {name: x for name, x in row.items() if name != "judge"} for row in rows}


@part("judges")
def judged() -> str:
    judges = judgements("largest__0")
    lines = []
    for name in judges["embedded"]:
        cells = [f"{judges[judge][name]:#.4g}" for judge in JUDGES if judge != "copies"]
        arm, _, steps = name.rpartition(" ")
        lines.append([SAMPLERS[arm], steps if arm else "", *cells, f"{judges['copies'][name]:.1%}"])
    return table(["Fréchet distance by", "steps", *JUDGES.values()], lines)


@part("runs judged")
def runs_judged() -> str:
    labels = {  # run: data noise, flow, inverted images and updates of the corrector
        "default__0": ("0.005", "3000 images, 1800 updates"),
        "default_noise_0.02": ("0.02", "the same"),
        "largest_noise_0.001__0": ("0.001", "20,000 images, 12,000 updates"),
        "largest_noise_0.02__0": ("0.02", "the same"),
        "largest__0": ("0.005", "the same"),
    }
    samplers = ("base 8", "base 10", "gaussian 8", "corrector 8")
    lines = []
    for run, label in labels.items():
        judges = [judgements(run)[judge] for judge in ("imagenet", "imagenet, KID")]
        lines.append([*label, *(f"{judge[name]:#.4g}" for judge in judges for name in samplers)])
    columns = ["base, 8 steps", "base, 10", "Gaussian, 8", "corrector, 8"]
    title = ["data noise", "by EfficientNet-Lite0"]
    return table([*title, *columns, *(f"KID: {name}" for name in columns)], lines)


@part("flows judged")
def flows_judged() -> str:
    flows = [judgements(run) for run in ("largest__0", "largest_flow__1", "largest_flow__2")]
    rows = []
    for name in ("base 8", "base 10", "base 16", "gaussian 8", "corrector 8"):
        cells = []
        for judge, scale in (("imagenet", 1), ("imagenet, KID", 1000)):
            values = scale * np.array([flow[judge][name] for flow in flows])
            change = scale * np.array([flow[judge]["corrector 8"] for flow in flows]) - values
            cells += [average(values), average(change) if name != "corrector 8" else ""]
        arm, _, steps = name.rpartition(" ")
        rows.append([SAMPLERS[arm], steps, *cells])
    change = "corrector minus this, paired"
    return table(
        ["mean of three flows", "steps", "EfficientNet-Lite0", change, "its KID × 1000", change], rows
    )


@part("data noise")
def data_noise() -> str:
    rows = []
    arms = {"0.02": "data_noise_0.02", "0.01": "data_noise_0.01"}
    arms |= {"0.005 (default)": "default", "0.001": "data_noise_0.001"}
    for std, arm in arms.items():
        report = runs(f"inc/{arm}")[0]["results"]["inversion"]
        names = ("base", "scale only", "gaussian", "corrector")
        distances = [f"{correction_entries(arm, name, 8)[0]['fd']:.2f}" for name in names]
        calls = f"{report['calls'] / report['images']:.1f}"
        rows.append([std, f"{report['left_out'] / report['images']:.1%}", calls, *distances])
    columns = ["left out", "model calls an image", "base", "scale only", "Gaussian", "**corrector, M = 4**"]
    return table(["`--data_noise`, seed 0, 8 steps", *columns], rows)


@part("black ground")
def black_ground() -> str:
    rows = []
    for row in stored("black_ground")["rows"]:
        name = f"N = {row['steps']}" + (f", power {row['power']:g}" if row["power"] != 1 else "")
        deviations = [f"{row[key]:.2f}" for key in ("ground", "elsewhere", "all")]
        rows.append([name, f"{row['own']:.4f}", row["data_noise"], f"{row['left_out']:.1%}", *deviations])
    columns = ["noise of its own samples there", "`--data_noise`", "left out", "inverted noise there"]
    return table(["on black ground", *columns, "elsewhere", "on all pixels"], rows)


@part("noise by pixels")
def noise_by_pixels() -> str:
    labels = {  # run: inverted images and updates of the corrector
        "data_noise_0.02__0": "3000 images, 1800 updates",
        "default__0": "the same",
        "data_noise_0.001__0": "the same",
        "largest__0": "20,000 images, 12,000 updates",
    }
    arms = ("inverted", "scale only", "gaussian", "corrector")
    noises, rows = stored("black_ground")["runs"], []
    for run, label in labels.items():
        entries = {row["arm"]: row for row in noises if row["run"] == run}
        cells = [f"{entries[arm]['ground']:.2f}, {entries[arm]['elsewhere']:.2f}" for arm in arms]
        rows.append([entries["inverted"]["data_noise"], label, *cells])
    columns = ["corrector of", "inverted", "scale only", "Gaussian", "corrector"]
    return table(["data noise; noise on black ground, elsewhere", *columns], rows)


def side_by_side(title: str, arms: dict[str, str]) -> str:
    """The distances of some runs; not all have each row. arms: {arm of results/inc: its column}."""
    tables = [runs(f"inc/{arm}")[0]["results"]["table"] for arm in arms]
    distances = [{(row["arm"], row["steps"]): f"{row['fd']:.2f}" for row in entries} for entries in tables]
    rows = []
    for row in max(tables, key=len):
        name, steps = row["arm"], row["steps"]
        cells = [entries.get((name, steps), "") for entries in distances]
        rows.append([name, steps, f"{row['flops'] / 1e6:.0f}", *cells])
    return table([title, "steps", "MFLOP an image", *arms.values()], rows)


@part("another grid")
def another_grid() -> str:
    arms = {"power_0.7": "`--data_noise 0.01`", "power_0.7_noise_0.02": "0.02, more training"}
    return side_by_side("`--grid_power 0.7`, seed 0", arms)


@part("many steps")
def many_steps() -> str:
    arms = {"steps_64": "noise 0.015, 5000 images", "steps_64_noise_0.02": "0.02, 10,000 images"}
    return side_by_side("`--steps 64`, seed 0, 4000 updates", arms)


@part("inversion")
def inversion() -> str:
    rows = []
    arms = {"Anderson acceleration (default)": "anderson", "plain iteration, `--memory 0`": "plain_iteration"}
    for label, arm in arms.items():
        report = runs(f"inc/{arm}")[0]["results"]["inversion"]
        contraction = ", ".join(f"{c:.2f}" for c in report["contraction"])
        left_out = f"{report['left_out']} of {report['images']}"
        calls = f"{report['calls'] / report['images']:.1f}"
        rows.append([label, calls, left_out, f"{report['round_trip_error']:.1e}", contraction])
    columns = ["seed 0", "model calls an image", "left out", "round trip"]
    return table([*columns, "median contraction of the eight steps"], rows)


# ---------------------------------------------------------------- samplers of flows, faults, mutations


@part("flow steps")
def flow_deviation() -> str:
    return flow_steps.table()


@part("grain")
def grain() -> str:
    columns = ["steps", "η = 0.5", "η = 1"]
    rows = zip(flow_steps.STEPS, *([f"{std:.3f}" for std in flow_steps.grain(eta)] for eta in (0.5, 1.0)))
    return table(columns, rows)


GPU_LABELS = {"sd15": "Stable Diffusion 1.5", "sd21": "Stable Diffusion 2.1, 768 pixels", "sdxl": "SD XL"}
GPU_LABELS |= {"sd3": "SD 3 medium without T5", "flux": "FLUX.1", "flux2klein": "FLUX.2 klein 4B"}


@part("gpu")
def gpu() -> str:
    records, rows, places = stored("gpu"), [], {}
    for name, record in sorted(records.items(), key=lambda item: list(GPU_LABELS).index(item[0])):
        phases, settings = {phase["phase"]: phase for phase in record["phases"]}, record["settings"]
        peaks, ended = [], record["checks"].get("the measured run ends", "ok") == "ok"
        for phase in ("load, encode prompts", "sample 1", "update 1", "stock pipeline call"):
            peak = phases.get(phase)
            peaks.append(f"{peak['allocated']:.1f} ({peak['reserved']:.1f})" if peak else "failed")
        trained = f"{phases['update 1']['per_second'] * settings['batch']:.1f}" if ended else ""
        speeds = [f"{phases[phase]['per_second']:.1f}" for phase in ("sample 1", "stock pipeline call")]
        equal = record["checks"].get("our images = stock images, bfloat16", "not measured").partition(":")[0]
        wait = record["checks"].get("no wait inside the sampler's loop", "not measured").partition(":")[0]
        settings = f"{settings['sample_batch']}, {settings['micro_batch']}, {settings['steps']}"
        device = record["device"].removeprefix("NVIDIA ")
        rows.append([GPU_LABELS[name], device, *peaks, settings, *speeds, trained, equal, wait])
        rate = f"{record['matrix_rate_teraflops']:.0f} TFLOP/s of bfloat16 matrix products"
        places[device] = f"{record['device']}: torch {record['torch']}, {rate}"
    columns = ["", "on one", "load, encode", "sampling", "training", "stock call"]
    columns += ["batch, micro-batch, steps", "images/s", "of the stock call", "images/s in training"]
    columns += ["images = stock", "no wait"]
    return f"{table(columns, rows)}\n\n{'. '.join(places.values())}."


@part("processes")
def processes() -> str:
    result = stored("processes")
    first = result["rows"][0]["seconds"]
    rows = [
        [row["processes"], row["threads"], f"{row['seconds']:.0f}", f"{first / row['seconds']:.2f}"]
        for row in result["rows"]
    ]
    header = ["processes", "threads of each", "seconds of the default run", "times as fast"]
    return f"{table(header, rows)}\n\nOn {result['hardware']}, torch {result['torch']}."


@part("faults")
def survived() -> str:
    return faults.table(stored("faults")["records"])


@part("mutations")
def mutations() -> str:
    records = stored("mutations")
    caught = sum(bool(record["caught_by"]) for record in records)
    return f"Places changed: {len(records)}. A test failed for {caught} of them."


# ---------------------------------------------------------------- all methods at one budget

COMPARED = {  # arm: (label, line in the figure)
    "none": ("control: GRAFT without selection", "k:"),
    "graft": ("GRAFT", "C0o-"),
    "graft_tuned": ("GRAFT, tuned", "C0o--"),
    "pgraft": ("P-GRAFT, base from level 0.2 on", "C1s-"),
    "noise_ppo": ("Noise PPO", "C2^-"),
    "pgraft_noise_ppo": ("P-GRAFT, then Noise PPO", "C4v-"),
    "ddpo": ("DDPO", "C3d-"),
    "ddpo_steady": ("DDPO, clip 1e-3, batch 64", "C3d--"),
}
COSTS = ("images", "calls", "seconds")


def final_means(record: dict, tuned: bool) -> list[float]:
    """FIVE over the held-out prompts with 10 steps an image, of the base or of the tuned model."""
    if "by_steps" in record["results"]:
        means = at_steps(record, 10)["means"]["learnt" if tuned else "standard"]
        return [means[name] for name in FIVE]
    rows = {row["metric"]: row for row in record["results"]["table"]}
    return [rows[name]["tuned" if tuned else "base"] for name in FIVE]


def at_budget(record: dict, budget: int) -> float:
    """The held-out reward of the last evaluation within a budget of model calls; NaN if there is none."""
    within = [point["reward"] for point in record["curve"] if point["calls"] <= budget * 1.02]
    return within[-1] if within else np.nan


@part("compare")
def compare() -> str:
    budget = runs("compare/graft")[0]["calls"]
    means = final_means(runs("compare/graft")[0], False)
    lines = [["base", "", "", "", "", *(f"{mean:.3f}" for mean in means)]]
    for row in base_rows():
        if row.get("best_of", 1) > 1 and "held_out shapes_strict" in row:
            reward = with_error(row["held_out shapes_strict"])
            lines.append([base_label(row), "", f"{row['calls']} calls an image", "", "", reward, *[""] * 4])
    for arm, (label, _) in COMPARED.items():
        records = runs(f"compare/{arm}")
        cost = [f"{records[0]['images']:,}", f"{records[0]['calls'] / 1000:.0f}", seconds_of(records)]
        within = average([at_budget(record, budget) for record in records])
        end = map(average, zip(*(final_means(record, True) for record in records)))
        lines.append([f"{label} ({len(records)})", *cost, within, *end])
    columns = ["", "images", "calls (thousands)", "seconds", f"strict at {budget / 1000:.0f} k calls"]
    columns.append("strict, end")
    stacked = runs("compare/pgraft_noise_ppo")
    before, after = (by_steps(stacked, (10,), name)[0] for name in ("standard", "learnt"))
    return f"""{table([*columns, *(METRICS[name] for name in FIVE[1:])], lines)}

P-GRAFT, then Noise PPO, at 10 deterministic steps: strict {before} before Noise PPO, {after} after it."""


def mean_curve(arm: str) -> dict[str, np.ndarray]:
    """{cost or "reward": its mean over seeds at every evaluation}"""
    records = runs(f"compare/{arm}")
    curves = {name: [[point[name] for point in r["curve"]] for r in records] for name in (*COSTS, "reward")}
    return {name: np.mean(values, 0) for name, values in curves.items()}


@part("reached")
def reached() -> str:
    """Where GRAFT's held-out reward passed DDPO's best and last one, and at what share of DDPO's cost."""
    rows = []
    for arm in ("ddpo", "ddpo_steady"):
        ddpo = mean_curve(arm)
        for which, at in (("best", ddpo["reward"].argmax()), ("last", -1)):
            spent = ", ".join(f"{ddpo[name][at]:,.0f} {name}" for name in COSTS)
            cells = [f"{COMPARED[arm][0]}, {which}: {ddpo['reward'][at]:.3f} after {spent}"]
            for graft in map(mean_curve, ("graft", "graft_tuned")):
                passed = np.flatnonzero(graft["reward"] >= ddpo["reward"][at])
                if not len(passed):
                    cells.append("not reached")
                    continue
                first = {name: values[passed[0]] for name, values in graft.items()}
                shares = {name: ddpo[name][at] / first[name] for name in COSTS}
                costs = [f"{first[name]:,.0f} (1/{share:.1f}) {name}" for name, share in shares.items()]
                cells.append(f"{first['reward']:.3f} after {', '.join(costs)}")
            rows.append(cells)
    return table(["reward of", COMPARED["graft"][0], COMPARED["graft_tuned"][0]], rows)


@part("tuning")
def tuning() -> str:
    """Each setting that was tried: an earlier evaluation / the last one."""
    rows = []
    for arm in ARMS["tuning"]:
        curve = runs(f"tuning/{arm}")[0]["curve"]
        points = [curve[-2 if len(curve) < 6 else 2], curve[-1]]
        cells = [(f"{p['images']:,}", f"{p['calls'] / 1000:.0f}", f"{p['reward']:.3f}") for p in points]
        rows.append([arm.replace("_", " "), *(" / ".join(pair) for pair in zip(*cells))])
    return table(["tried on validation prompts", "images", "calls (thousands)", "strict"], rows)


def curves_figure(arms: dict[str, tuple], x_labels: dict[str, str], columns: int) -> tuple[Figure, list]:
    """Held-out reward against costs, with its standard error; the data. arms: of "compare", {arm: (label,
    line)}; x_labels: {cost: label}, a panel each; columns: of the legend."""
    figure, data = Figure(figsize=(9, 3.6), layout="constrained"), []
    for axis, (cost, x_label) in zip(figure.subplots(1, 2, sharey=True), x_labels.items()):
        for arm, (label, style) in arms.items():
            x = mean_curve(arm)[cost]
            y = np.array([[point["reward"] for point in r["curve"]] for r in runs(f"compare/{arm}")])
            mean, error = y.mean(0), y.std(0, ddof=1) / len(y) ** 0.5
            (line,) = axis.plot(x, mean, style, markersize=3, linewidth=1, label=label)
            axis.fill_between(x, mean - error, mean + error, color=line.get_color(), alpha=0.2)
            data.append([label, x.tolist(), mean.tolist(), error.tolist()])
        axis.set(xlabel=x_label, xscale="log")
        least, most = axis.get_xlim()
        ticks = [n * 10**k for k in range(6) for n in (1, 2, 5) if least <= n * 10**k <= most]
        axis.set(xticks=ticks, xticklabels=ticks)
        axis.minorticks_off()
    figure.axes[0].set_ylabel("held-out strict reward")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, fontsize=7)
    return figure, data


def comparison_figure() -> tuple[Figure, list]:
    """All methods: reward against images sampled and against seconds."""
    x_labels = {"images": "images sampled and scored", "seconds": "seconds on one CPU thread"}
    return curves_figure(COMPARED, x_labels, 4)


# ---------------------------------------------------------------- the strongest rivals

RIVALS = {  # images: {arm of "compare": label}
    "3,840": {
        "none": COMPARED["none"][0],
        "graft": "GRAFT",
        "pgraft": COMPARED["pgraft"][0],
        "nft": "DiffusionNFT",
        "awm": "AWM",
    },
    "7,680": {
        "graft_twice": "GRAFT",
        "graft_tuned": "GRAFT, tuned",
        "awm_twice": "AWM",
        "ddpo": "DDPO",
        "ddpo_steady": COMPARED["ddpo_steady"][0],
    },
}
CURVES = {  # arm: (label, line in the figure)
    "none": COMPARED["none"],
    "graft_twice": ("GRAFT", "C0o-"),
    "graft_tuned": COMPARED["graft_tuned"],
    "pgraft": COMPARED["pgraft"],
    "nft": ("DiffusionNFT", "C5P-"),
    "awm_twice": ("AWM", "C6X-"),
    "ddpo": COMPARED["ddpo"],
    "ddpo_steady": COMPARED["ddpo_steady"],
}
FRONTIER = {  # method: (marker, {setting: folder/arm})
    "control": ("kv", {"no selection": "compare/none"}),
    "GRAFT": (
        "C0o",
        {
            "preference": "graft/preference",
            "best of 8": "compare/graft",
            "threshold": "graft/threshold",
            "best of 8, 6 rounds": "compare/graft_twice",
            "tuned, 6 rounds": "compare/graft_tuned",
        },
    ),
    "P-GRAFT": ("C1s", {f"level {level}": f"pgraft/default_x0_{level}" for level in (0.2, 0.4, 0.5, 0.7)}),
    "DiffusionNFT": ("C5P", {"β 0.3": "compare/nft"}),
    "AWM": ("C6X", {"penalty 0.4": "compare/awm", "penalty 0.4, 6 rounds": "compare/awm_twice"}),
    "DDPO": ("C3d", {"clip 1e-2": "compare/ddpo", "clip 1e-3": "compare/ddpo_steady"}),
}
TRIED = {"graft_": "GRAFT", "nft_": "DiffusionNFT", "awm_": "AWM", "ddpo_": "DDPO"}  # arms of "tuning"


def path_kl(arm: str) -> str:
    """The KL of the sampling paths of an arm of "compare" to the base's, nats; "" if it was not measured."""
    kls = [stored("path_kl").get(f"compare/{arm}__{record['seed']}") for record in runs(f"compare/{arm}")]
    return average([kl["kl"] for kl in kls]) if all(kls) else ""


def paired_gain(arm: str, other: str) -> str:
    """Strict of an arm minus that of another, averaged over the seeds that both have."""
    ends = [
        {r["seed"]: final([r], ["shapes_strict"])[0] for r in runs(f"compare/{name}")}
        for name in (arm, other)
    ]
    seeds = ends[0].keys() & ends[1].keys()
    return average([float(ends[0][seed]) - float(ends[1][seed]) for seed in sorted(seeds)])


@part("rivals")
def rivals() -> str:
    parts = []
    for images, arms in RIVALS.items():
        rows = [["base", "", *final(runs("compare/graft")[:1], column="base"), "0"]]
        for arm, label in arms.items():
            records = runs(f"compare/{arm}")
            calls = f"{records[0]['calls'] / 1000:.0f}"
            rows.append([f"{label} ({len(records)})", calls, *final(records), path_kl(arm)])
        columns = [f"{images} images", "calls (thousands)", *METRICS.values()]
        parts.append(table([*columns, "KL of the paths, nats"], rows))
    once = f"DiffusionNFT {paired_gain('nft', 'graft')}, AWM {paired_gain('awm', 'graft')}"
    twice = f"AWM {paired_gain('awm_twice', 'graft_twice')}"
    parts.append(f"Strict minus GRAFT's, paired over seeds: {once}; with 7,680 images {twice}.")
    return "\n\n".join(parts)


def rivals_figure() -> tuple[Figure, list]:
    """The rivals beside GRAFT: reward against images sampled and against model calls."""
    return curves_figure(CURVES, {"images": "images sampled and scored", "calls": "model calls"}, 4)


def frontier_points() -> list[tuple]:
    """(method, setting, (strict, diversity) of each seed) of every arm of FRONTIER."""
    return [
        (method, setting, [tuple(map(float, final([r], ["shapes_strict", "diversity"]))) for r in runs(arm)])
        for method, (_, arms) in FRONTIER.items()
        for setting, arm in arms.items()
    ]


def tried_points() -> list[tuple]:
    """(method, setting, (strict, diversity)) of every arm of "tuning"."""
    points = []
    for arm in ARMS["tuning"]:
        start = next(start for start in TRIED if arm.startswith(start))
        spot = tuple(map(float, final(runs(f"tuning/{arm}"), ["shapes_strict", "diversity"])))
        points.append((TRIED[start], arm.removeprefix(start).replace("_", " "), spot))
    return points


def frontier_figure() -> tuple[Figure, list]:
    """Strict against diversity, on the left held out, on the right of the settings tried; the data."""
    figure, data = Figure(figsize=(9, 4.2), layout="constrained"), []
    left, right = figure.subplots(1, 2, sharey=True)
    base = [float(cell) for cell in final(runs("compare/graft")[:1], ["shapes_strict", "diversity"], "base")]
    left.plot(base[1], base[0], "k*", label="base")
    labelled = set()
    for method, setting, seeds in frontier_points():
        mean, error = np.mean(seeds, 0), np.std(seeds, 0, ddof=1) / len(seeds) ** 0.5
        label, style = None if method in labelled else method, FRONTIER[method][0]
        left.errorbar(mean[1], mean[0], error[0], error[1], style, markersize=4, linewidth=0.8, label=label)
        left.annotate(setting, (mean[1], mean[0]), fontsize=5, xytext=(3, 3), textcoords="offset points")
        labelled.add(method)
        data.append([method, setting, mean.tolist(), error.tolist()])
    for method, setting, spot in tried_points():
        right.plot(spot[1], spot[0], FRONTIER[method][0], markersize=4)
        data.append([method, setting, *spot])
    left.set(xlabel="diversity", ylabel="strict reward", title="held-out prompts, three seeds")
    right.set(xlabel="diversity", title="settings tried, validation prompts, one seed")
    figure.legend(loc="outside lower center", ncols=7, fontsize=7)
    return figure, data


# ---------------------------------------------------------------- molecules

MEASURES = {  # of molecules/graft_molecules.py: column
    "stable": "stable",
    "valid": "valid",
    "unique_of_valid": "unique of valid",
    "distinct_stable": "distinct stable",
    "new_of_distinct": "new of these",
    "logp": "logP",
    "qed": "QED",
}
MOLECULE_ROWS = {
    "deduplicated": "without copies (default)",
    "copies": "with copies, `--no-deduplicate`",
    "none": "control: no selection, `--rule none --no-deduplicate`",
}


def molecules_table(rows: dict[str, str]) -> str:
    """rows: {arm: label}."""
    first = runs(f"molecules/{next(iter(rows))}")[:1]
    lines = [["base", *final(first, MEASURES, "base"), ""]]
    for arm, label in rows.items():
        records = runs(f"molecules/{arm}")
        lines.append([label, *final(records, MEASURES), seconds_of(records)])
    return table(["", *MEASURES.values(), "seconds"], lines)


@part("molecules")
def molecules() -> str:
    return molecules_table(MOLECULE_ROWS)


@part("molecules by round")
def molecules_by_round() -> str:
    lines = []
    for arm, label in MOLECULE_ROWS.items():
        rounds = zip(*([row["distinct_stable"] for row in r["metrics"]] for r in runs(f"molecules/{arm}")))
        lines.append([label, *map(average, rounds)])
    return table(["distinct stable in round", *range(1, len(lines[0]))], lines)


@part("molecules default")
def molecules_default() -> str:
    return molecules_table({"default": "tuned"})


# ---------------------------------------------------------------- layouts

PAGE_MEASURES = {  # of layouts/pgraft_layouts.py: column
    "reward": "reward",
    "alignment": "alignment",
    "overlap": "overlap",
    "frechet": "Fréchet",
    "classes": "classes",
    "coverage": "coverage",
    "box_area": "box area",
    "diversity": "diversity",
}


def layout_levels() -> dict[str, str]:
    """{level: V(t) ± standard error as a cell} of the probe."""
    rows = runs("layouts/probe")[0]["metrics"]
    return {f"{row['switch']:g}": f"{row['unresolved']:.2f} ± {row['se']:.2f}" for row in rows}


@part("layouts probe")
def layouts_probe() -> str:
    levels = layout_levels()
    return table(["level", *levels], [["V(t)", *levels.values()]])


@part("layouts")
def layouts() -> str:
    shares, first = layout_levels(), runs("layouts/graft")[:1]
    real = first[0]["results"]["real"]
    lines = [["held-out pages", "", *(f"{real[name]:.3f}" if name in real else "" for name in PAGE_MEASURES)]]
    lines.append(["base", "", *final(first, PAGE_MEASURES, "base")])
    lines.append(["GRAFT, `--switch 0`", "0", *final(runs("layouts/graft"), PAGE_MEASURES)])
    for level in LAYOUT_LEVELS:
        records = runs(f"layouts/pgraft_{level}")
        label = one_seed(f"P-GRAFT, `--switch {level}`", records)
        lines.append([label, shares[level], *final(records, PAGE_MEASURES)])
    label = "control: no selection, `--switch 0 --rule none`"
    lines.append([label, "0", *final(runs("layouts/none"), PAGE_MEASURES)])
    return table(["", "V(t)", *PAGE_MEASURES.values()], lines)


@part("layouts default")
def layouts_default() -> str:
    rows = {row["metric"]: row for row in runs("layouts/default")[0]["results"]["table"]}
    lines = [
        [column, *(f"{rows[name][column]:.3f}" for name in PAGE_MEASURES)] for column in ("base", "tuned")
    ]
    pairs = ((rows[name]["difference"], rows[name]["se"]) for name in PAGE_MEASURES)
    lines.append(["difference, ± s.e. over pages", *map(with_error, pairs)])
    return table(["", *PAGE_MEASURES.values()], lines)


# ---------------------------------------------------------------- the pages

FIGURES = {  # file: (figure, data)
    "compare/compare.png": comparison_figure,
    "compare/rivals.png": rivals_figure,
    "compare/frontier.png": frontier_figure,
}


def read_pages() -> dict[str, str]:
    """{page: text} of README.md and docs/*.md."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}


def digest(data: list) -> str:
    """Of a figure's data. Its PNG file holds it, because another matplotlib may draw other pixels."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


def differences(pages: dict[str, str]) -> list[str]:
    """A line for each part or figure that differs from the results, is missing, unknown or there twice."""
    lines, places = [], []
    for page, text in pages.items():
        for _, name, content, _ in PART.findall(text):
            places.append(name)
            if name not in PARTS:
                lines.append(f"{page}: part '{name}' is unknown")
            elif content != f"{PARTS[name]()}\n":
                lines.append(f"{page}: part '{name}' differs; run python benchmarks/tables.py")
    counts = {name: places.count(name) for name in PARTS}
    lines += [f"part '{name}' stands in {n} places" for name, n in counts.items() if n != 1]
    for name, make in FIGURES.items():
        file = RESULTS / name
        if not file.is_file() or Image.open(file).info.get("data") != digest(make()[1]):
            lines.append(f"benchmarks/results/{name} differs; run python benchmarks/tables.py")
    return lines


def rewrite() -> None:
    """Make every known part and figure again."""

    def remade(match):
        return f"{match[1]}{PARTS[match[2]]()}\n{match[4]}" if match[2] in PARTS else match[0]

    for page, text in read_pages().items():
        write_atomically(ROOT / page, PART.sub(remade, text))
    for name, make in FIGURES.items():
        figure, data = make()
        save_figure(figure, RESULTS / name)
        image, text = Image.open(RESULTS / name), PngInfo()
        text.add_text("data", digest(data))
        image.save(RESULTS / name, pnginfo=text)


def main() -> int:
    """Returns the exit code."""
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__)
        return 2
    if not sys.argv[1:]:
        rewrite()
    lines = differences(read_pages())
    print("\n".join(lines) or "README.md and docs/ agree with the results")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
