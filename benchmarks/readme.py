"""The README's tables, argument reference and claims, made from benchmarks/results and the scripts' dataclasses.

Run: python benchmarks/readme.py           (rewrites the generated parts of README.md)
     python benchmarks/readme.py --check   (writes nothing; exit code 1 and a line for everything that differs)
A generated part stands between <!-- generated: name --> and <!-- end -->, where `name` is a key of PARTS. CLAIMS are numbers in
prose: sentences are not generated, but the README must hold each claim as the results give it. Every picture of the README must
exist and, if it shows results, have them beside it.
"""

import ast
import csv
import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys

import compare
import faults
import numpy as np
from graft_shapes import METRICS, ROOT, by_round, header, held_out, line, load
from inc_shapes import COLUMNS
from inc_shapes import rows as inc_rows
from noise_ppo_shapes import by_steps

sys.path.insert(0, str(ROOT))

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = ("graft", "pgraft", "noise_ppo", "inverse_noise_correction")
SHOWN = {"shapes_strict": "strict", "shapes_graded": "graded", "shapes_fit": "fit", "jpeg_compressibility": "JPEG (−kB)"}
SHORT = ["shapes_strict", "shapes_graded", "shapes_fit", "diversity"]
STEPS = (4, 5, 10, 20, 40)


@functools.cache
def read(name: str):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@functools.cache
def runs(name: str) -> list[dict]:
    """The stored records of folder/arm, by seed; there must be some."""
    folder, arm = name.rsplit("/", 1)
    records = load(RESULTS / folder, arm)
    if not records:
        raise FileNotFoundError(f"benchmarks/results/{name}__*.json: no result")
    return records


def table(columns, rows) -> str:
    return "\n".join([header(*columns), *(line(*row) for row in rows)])


def duration(seconds: float) -> str:
    """Rounded to ten seconds."""
    minutes, rest = divmod(round(seconds / 10) * 10, 60)
    return f"{minutes} minute{'s' * (minutes != 1)}" + (f" {rest} seconds" if rest else "")


# ---------------------------------------------------------------- the methods at a glance


def default_times() -> list[str]:
    """Of each of SCRIPTS run without arguments on two idle cores."""
    seconds = [read("default_run.json")["seconds"], read("pgraft/default_run.json")["wall_seconds"]]
    seconds += [read("noise_ppo/default_run.json")["seconds"], read("inc/default_run.json")["seconds"]["total"]]
    return [duration(value) for value in seconds]


def summary() -> str:
    base, best = base_rows()[0]["held_out shapes_strict"][0], best_of("shapes_strict")
    noise = {name: by_steps(runs("noise_ppo/mean"), (4,), name)[0] for name in ("standard", "learnt")}
    unconditional = by_steps(runs("noise_ppo/unconditional"), (4,), "learnt")[0]
    flow = {name: cells[3] for name, cells in inc_rows(runs("inc/default")).items()}
    rows = [
        [
            "[GRAFT](#graft-in-one-paragraph)",
            "LoRA, from accepted pictures",
            f"strict {base:.3f} → **{mean_of('graft/graft')}**",
            f"no selection {mean_of('graft/none')}; best of 8 for 8 × the calls {best[8][0]:.3f}",
        ],
        [
            "[P-GRAFT](#p-graft-the-same-at-an-intermediate-noise-level)",
            "LoRA for the noisy levels only",
            f"strict {base:.3f} → **{mean_of('pgraft/default_x0_0.2')}**",
            f"no selection {mean_of('pgraft/default_none_0.2')}",
        ],
        [
            "[Noise PPO](#noise-ppo-the-model-stays-frozen-the-initial-noise-is-learnt)",
            "law of the initial noise, by prompt",
            f"strict at 4 steps {noise['standard'].split()[0]} → **{noise['learnt']}**",
            f"one law for all prompts {unconditional}",
        ],
        [
            "[Inverse Noise Correction]"
            "(#inverse-noise-correction-a-better-initial-noise-for-a-flow-model-learnt-from-pictures-alone)",
            "law of the initial noise, from pictures",
            f"Fréchet distance at equal FLOPs {flow['base, matched FLOPs']} → **{flow['corrector']}**",
            f"Gaussian noise of their covariance {flow['gaussian']}",
        ],
    ]
    rows = [[*row, seconds] for row, seconds in zip(rows, default_times(), strict=True)]
    return table(["method", "what is learnt", "on held-out prompts", "controls", "default run on two CPU cores"], rows)


# ---------------------------------------------------------------- the base


def base_rows() -> list[dict]:
    return read("base.json")["rows"]


def best_of(reward: str) -> dict[int, tuple[float, float]]:
    """{n: (mean, standard error) of the best of n held-out pictures of the base}"""
    return {
        row["best_of"]: row[f"held_out {reward}"] for row in base_rows() if f"held_out {reward}" in row and "best_of" in row
    }


def base() -> str:
    def cell(row, name):
        return "{:.3f} ± {:.3f}".format(*row[name]) if name in row else ""

    def label(row):
        if "best_of" in row:
            return f"best of {row['best_of']} at sampling time"
        if "temperature" in row:
            return ("η = 0, " if row.get("eta") == 0 else "") + f"noise temperature {row['temperature']:g}"
        return f"guidance {row['guidance']:g}" + " (default)" * (row["guidance"] == 1)

    kept = [r for r in base_rows() if r.get("best_of", 2) > 1 and "held_out shapes_strict" in r]
    columns = [*(f"held_out {name}" for name in SHORT), "valid shapes_strict"]
    names = ["strict", "graded", "fit", "diversity", "(strict on validation)"]
    rows = [[label(r), r["calls"], *(cell(r, name) for name in columns)] for r in kept]
    return table(["base, held-out prompts", "U-Net calls a picture", *names], rows)


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


def mean_of(arm: str, metric: str = "shapes_strict", column: str = "tuned", switched: str = "") -> str:
    """Of an arm's final tables: mean ± standard error over seeds."""
    return held_out([r["switched"][switched] if switched else r["table"] for r in runs(arm)], [metric], column)[0]


def mean_seconds(records: list[dict]) -> str:
    return f"{np.mean([r['seconds'] for r in records]):.0f}"


def graft(rows: dict[str, str]) -> str:
    stored = {label: runs(f"graft/{arm}") for arm, label in rows.items()}
    first = next(iter(stored.values()))[0]
    lines = [["base", *held_out([first["table"]], column="base"), ""]]
    lines += [[label, *held_out([r["table"] for r in records]), mean_seconds(records)] for label, records in stored.items()]
    return table(["", *(SHOWN.get(name, name) for name in METRICS), "seconds"], lines)


def graft_rounds(rows: dict[str, str]) -> str:
    lines = [[label, *by_round(runs(f"graft/{arm}"))] for arm, label in rows.items()]
    return table(["held-out reward after round", *range(len(lines[0]) - 1)], lines)


def guidance() -> str:
    stored = {label: runs(f"graft/valid_guidance3_{arm}") for arm, label in GUIDANCE_ROWS.items()}
    first, more = next(iter(stored.values()))[0], ["shapes_fit", "diversity"]
    strict, *others = held_out([first["table"]], ["shapes_strict", *more], "base")
    lines = [["base at guidance 3", strict, "", "", "", *others, ""]]
    for label, records in stored.items():
        lines.append([label, *by_round(records)[1:], *held_out([r["table"] for r in records], more), mean_seconds(records)])
    return table(["loss on", "strict after round 1", 2, 3, 4, "fit", "diversity", "seconds"], lines)


# ---------------------------------------------------------------- P-GRAFT


def unresolved() -> dict[str, str]:
    """{level: V(t) ± standard error} of the probe."""
    with open(RESULTS / "pgraft" / "probe.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {f"{float(r['switch']):.1f}": f"{float(r['unresolved']):.2f} ± {float(r['se']):.2f}" for r in rows}


def pgraft(graft_arm: str, arms: dict[str, str], switched: tuple[str, ...] = (), probed: bool = True) -> str:
    """arms: {arm of results/pgraft: label, of which the last number is the level}; switched: levels at which GRAFT's LoRA ends."""
    level = unresolved() if probed else {}
    records = runs(graft_arm)
    lines = [["base", "", *held_out([records[0]["table"]], SHORT, "base")]]
    lines.append(["GRAFT", "", *held_out([r["table"] for r in records], SHORT)])
    for arm, label in arms.items():
        cells = held_out([r["table"] for r in runs(f"pgraft/{arm}")], SHORT)
        lines.append([label, level.get(arm.split("_")[-1], ""), *cells])
    for switch in switched:
        cells = held_out([r["switched"][switch] for r in records], SHORT)
        lines.append([f"GRAFT's LoRA, base from {switch} on", level.get(switch, ""), *cells])
    return table(["", "V(t)", *(SHOWN.get(name, name) for name in SHORT)], lines)


def switches(budget: str, *levels: str) -> dict[str, str]:
    """Arms data_level of a budget and their labels."""
    return {f"{budget}_{x}": "P-GRAFT `--data {} --switch {}`".format(*x.split("_")) for x in levels}


PGRAFT_ROWS = switches("default", *(f"{data}_{level}" for data in ("x0", "xs") for level in ("0.2", "0.4", "0.5", "0.7")))
PGRAFT_ROWS["default_none_0.2"] = "control: switch 0.2, `--rule none`"

# ---------------------------------------------------------------- noise PPO

NOISE_ROWS = {
    "mean": "learnt mean (default)",
    "both": "learnt mean and σ",
    "unconditional": "unconditional",
}


def noise_reward() -> str:
    first = runs("noise_ppo/both")  # with its controls; standard noise is the same in all runs
    learnt = {
        "**learnt mean, prompt-conditioned (default)**": "mean",
        "learnt mean and σ, `--no-mean_only`": "both",
        "one μ, σ for all prompts, `--no-mean_only --policy unconditional`": "unconditional",
        "learnt σ alone, `--no-mean_only --std_only` (one seed)": "std_only",
    }
    lines = [["standard noise", *by_steps(first[:1], STEPS, "standard")]]
    lines += [[label, *by_steps(runs(f"noise_ppo/{arm}"), STEPS, "learnt")] for label, arm in learnt.items()]
    lines.append(["the conditional policy's mean over prompts", *by_steps(first, STEPS, "one_for_all")])
    lines.append([f"noise temperature {first[0]['temperature']:g}", *by_steps(first[:1], STEPS, "temperature")])
    for n, words in ((2, "twice"), (4, "four times")):
        lines.append([f"best of {n} ({words} the calls)", *by_steps(first[:1], STEPS, f"best_of_{n}")])
    return table(["strict at steps", *STEPS], lines)


def noise_by_steps(title: str, name: str) -> str:
    return table(
        [title, *STEPS], [[label, *by_steps(runs(f"noise_ppo/{arm}"), STEPS, name)] for arm, label in NOISE_ROWS.items()]
    )


def at_4_and_40(record: dict) -> tuple[dict, dict]:
    found = {row["steps"]: row for row in record["by_steps"]}
    return found[4], found[40]


def noise_clip() -> str:
    arms = {
        "mean, 0.001 (default)": "both",
        "mean, 0.2": "both_clip_0.2",
        "sum, 0.256": "both_sum",
        "sum, 100": "both_sum_clip_100",
    }
    lines = []
    for label, arm in arms.items():
        record = runs(f"noise_ppo/{arm}")[0]
        rows, (few, many) = record["iterations"], at_4_and_40(record)
        clipped = [row["clip_fraction"] for row in rows]
        cells = [f"{np.mean(clipped):.3f}; {clipped[0]:.3f}", f"{np.mean([row['approximate_kl'] for row in rows]):.2f}"]
        cells += [
            f"{few['learnt']:.3f}",
            f"{many['learnt']:.3f}",
            f"{few['diversity_kept']:.2f}",
            f"{record['kl_per_dimension']:.3f}",
        ]
        lines.append([label, *cells])
    columns = "`--reduction`, `--clip` | clip fraction (mean over iterations; first) | approximate KL an iteration, nats"
    return table([*columns.split(" | "), "strict at 4 steps", "at 40", "diversity kept", "KL a dimension"], lines)


def noise_kl() -> str:
    lines = []
    for label, arm in {"0": "both_kl_0", "0.005 (default)": "both", "0.02": "both_kl_0.02"}.items():
        record = runs(f"noise_ppo/{arm}")[0]
        few, _ = at_4_and_40(record)
        lines.append([label, f"{few['learnt']:.3f}", f"{few['diversity_kept']:.2f}", f"{record['kl_per_dimension']:.3f}"])
    return table(["`--kl_weight`", "strict at 4 steps", "diversity kept", "KL a dimension"], lines)


# ---------------------------------------------------------------- Inverse Noise Correction

INC_ROWS = {
    "base, 1 N": "base",
    "base, matched FLOPs": "base",
    "base, 2 N": "base",
    "base, 4 N": "base",
    "base, grid power 0.7": "base, grid (1 − k/7)^0.7",
    "base, grid power 1.4": "base, grid (1 − k/7)^1.4",
    "base trained on, 1 N": "base trained on with the FLOPs of inversion and corrector",
    "base trained on, matched FLOPs": "the same",
    "scale only": "scale only, s·ε",
    "gaussian": "Gaussian",
    "gaussian, norms matched": "Gaussian, norms matched",
    "corrector": "**corrector, M = 4 (default)**",
    "corrector, M = 2": "corrector, M = 2",
    "corrector, M = 8": "corrector, M = 8",
    "data against data": "data against data (floor)",
}


def inc() -> str:
    found = inc_rows(runs("inc/default"))
    if found.keys() != INC_ROWS.keys():
        raise KeyError(f"rows of inc/default and of the README differ: {sorted(found.keys() ^ INC_ROWS.keys())}")
    lines = [[label, *found[name]] for name, label in INC_ROWS.items()]
    for cells in lines:  # the corrector against itself, and the floor, are no comparisons
        cells[-1] = "" if cells[0].startswith(("**", "data")) else cells[-1]
    return table(["", *COLUMNS], lines)


# ---------------------------------------------------------------- arguments


def arguments_of(script: str) -> list[tuple[str, str, str]]:
    """(flag, default, help) of every field of a script's Args; help is the comment behind the field."""
    args = importlib.import_module(script).Args
    helps = {}
    for owner in reversed(args.__mro__[:-1]):
        source = inspect.getsource(owner)
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                helps[node.target.id] = source.splitlines()[node.end_lineno - 1].partition("  # ")[2]
    found = []
    for field in dataclasses.fields(args):
        if not helps[field.name]:
            raise ValueError(f"{script}.py: the field {field.name} has no comment")
        default = "" if field.default in (None, "") else f"`{str(field.default).replace(f'{ROOT}/', '')}`"
        flag = f"`--{field.name}`"
        if isinstance(field.default, bool):
            flag, default = (f"`--no-{field.name}`", "on") if field.default else (flag, "off")
        text = re.sub(r"(<\w+>)", r"`\1`", helps[field.name]).replace("|", "\\|")
        found.append((flag, default, text))
    return found


def arguments() -> str:
    blocks = []
    for script in SCRIPTS:
        rows = arguments_of(script)
        summary = f"<summary><code>{script}.py</code>: {len(rows)} arguments</summary>"
        blocks.append(f"<details>\n{summary}\n\n{table(['flag', 'default', 'what it does'], rows)}\n\n</details>")
    return "\n\n".join(blocks)


def flow_steps() -> str:
    import flow_steps  # takes the steps of pgraft.py

    return flow_steps.table()


SWITCHED = ("0.2", "0.4", "0.7")
PARTS = {
    "summary": summary,
    "base": base,
    "graft": lambda: graft(GRAFT_ROWS),
    "graft by round": lambda: graft_rounds(GRAFT_ROWS),
    "jpeg": lambda: graft(JPEG_ROWS),
    "jpeg by round": lambda: graft_rounds(JPEG_ROWS),
    "pgraft": lambda: pgraft("graft/graft", PGRAFT_ROWS),
    "pgraft small": lambda: pgraft(
        "pgraft/small_graft", switches("small", *(f"{data}_{level}" for data in ("x0", "xs") for level in SWITCHED)), SWITCHED
    ),
    "pgraft long": lambda: pgraft("pgraft/long_graft", switches("long", "x0_0.4"), SWITCHED),
    "pgraft guidance": lambda: pgraft("pgraft/guidance3_graft", switches("guidance3", "x0_0.4"), ("0.2", "0.4"), probed=False),
    "noise ppo": noise_reward,
    "noise ppo gain": lambda: noise_by_steps("gain over standard noise at steps", "gain"),
    "noise ppo diversity": lambda: noise_by_steps("share of the standard noise's diversity kept at steps", "diversity_kept"),
    "noise ppo clip": noise_clip,
    "noise ppo kl": noise_kl,
    "inc": inc,
    "flow steps": flow_steps,
    "faults": lambda: faults.table(read("faults.json")["records"]),
    "compare": lambda: compare.table(RESULTS / "compare"),
    "reached": lambda: compare.reached(RESULTS / "compare"),
    "tuning": lambda: compare.tuning(),
    "guidance": guidance,
    "arguments": arguments,
}


# ---------------------------------------------------------------- numbers in prose


def plain(number: str) -> str:
    """Without its standard error."""
    return number.split()[0]


def settings_claims() -> list[str]:
    """Of the dataclasses, of shapes/, and of the times of the default runs."""
    from shapes.train import CAPTIONS

    args, noise = importlib.import_module("graft").Args(), importlib.import_module("noise_ppo").Args()
    share = {name: f"{value * 100:.0f} %" for name, value in CAPTIONS.items()}
    prompts = sum(len((ROOT / "shapes" / f"prompts_{x}.txt").read_text().splitlines()) for x in ("train", "eval"))
    base_settings = [row for row in base_rows() if "valid shapes_strict" in row and "eta" not in row]
    no_guidance = {**base_settings[0], "temperature": 1}
    settings = {
        name: max((r for r in [no_guidance, *base_settings] if name in r), key=lambda r: r["valid shapes_strict"][0])[name]
        for name in ("guidance", "temperature")
    }
    times, speed = default_times(), read("sampler_speed.json")
    rate = read("default_run.json")["pictures_per_second_by_round"]
    merged, unmerged = speed["ours, LoRA merged (as graft.py samples)"], speed["ours, LoRA not merged"]
    return [
        f"The first command tunes it and shows what changed ({times[0]} on two CPU cores",
        f"tunes, evaluates: {times[1]} on two CPU cores",
        f"python noise_ppo.py # {times[2]} on two CPU cores",
        f"python inverse_noise_correction.py # {times[3]} on two CPU cores",
        f"{np.log(8) - 7 / 8:.2f} |",
        f"{np.log(2) - 1 / 2:.2f} |",
        f"{share['reversed']} of the captions stated the relation the wrong way round, {share['right']} were right, and "
        f"{share['colour']} named",
        f"{prompts} prompts",
        f"the best guidance is {settings['guidance']:g} and the best noise temperature is {settings['temperature']:g}",
        f"Equal sampling ({args.rounds} × {args.prompts_per_round} prompts × {args.samples}) and equal updates "
        f"({args.rounds} × {args.updates} × {args.batch})",
        f"{noise.iterations} iterations × {noise.prompts_per_iteration} prompts × {noise.samples} samples",
        f"stock pipeline call {speed['stock pipeline call']:.2f} s, ours {speed['ours']:.2f} s, ours with the LoRA merged as "
        f"`graft.py` samples {merged:.2f} s, with an unmerged LoRA it would be {unmerged:.2f} s",
        f"samples and scores {min(rate)} to {max(rate)} pictures/s",
    ]


def graft_claims() -> list[str]:
    strict, jpeg = best_of("shapes_strict"), best_of("jpeg_compressibility")
    none = [run["table"][0] for run in runs("graft/none")]
    before, after = (
        {name: float(plain(mean_of("graft/jpeg", name, column))) for name in METRICS} for column in ("base", "tuned")
    )
    return [
        f"the base's own standard error over prompts is {base_rows()[0]['held_out shapes_strict'][1]:.3f} for strict",
        f"takes the base from {none[0]['base']:.2f} to {float(plain(mean_of('graft/graft'))):.2f} strict",
        "with eighty ({:.3f} ± {:.3f})".format(*strict[8]),
        f"leaves it at {mean_of('graft/none')} (paired difference {np.mean([row['difference'] for row in none]):.3f}, of the size "
        f"of its standard error over prompts, {np.mean([row['se'] for row in none]):.3f})",
        f"falls from {plain(mean_of('graft/graft', 'diversity', 'base'))} to about "
        f"{float(plain(mean_of('graft/graft', 'diversity'))):.2f}",
        f"The size falls by {100 - 100 * after['jpeg_compressibility'] / before['jpeg_compressibility']:.0f} %",
        "({:.3f} ± {:.3f} at eighty model calls a picture)".format(*jpeg[8]),
    ]


def pgraft_claims() -> list[str]:
    def losses(level):
        found = [np.mean([run["rounds"][-1]["loss"] for run in runs(f"pgraft/default_{x}_{level}")]) for x in ("x0", "xs")]
        return " against ".join(f"{x:.2f}" if x < 1 else f"{x:.1f}" for x in found)

    valid = {level: mean_of(f"pgraft/valid_x0_{level}") for level in ("0.2", "0.4")}
    of_graft = [f"{mean_of('pgraft/default_graft', switched=level)} at {level}" for level in ("0.2", "0.4", "0.5", "0.7")]
    long = {level: mean_of("pgraft/long_graft", switched=level) for level in ("0.4",)}
    guided, of_guided, name = "pgraft/guidance3_x0_0.4", "pgraft/guidance3_graft", "shapes_fit"
    fastest = min(run["seconds"] for arm in PGRAFT_ROWS for run in runs(f"pgraft/{arm}"))
    return [
        f"strict {valid['0.2']} with the switch at 0.2, {valid['0.4']} at 0.4, base {mean_of('pgraft/valid_x0_0.2', column='base')}",
        f"a run took {fastest:.0f} s at the least",
        f"level with GRAFT ({mean_of('pgraft/default_x0_0.2')} against {mean_of('graft/graft')})",
        f"(training loss {losses('0.2')} at 0.2, {losses('0.7')} at 0.7)",
        f"gives {', '.join(of_graft)}",
        f"diversity {plain(mean_of('pgraft/long_graft', 'diversity'))} of the base's "
        f"{mean_of('pgraft/long_graft', 'diversity', 'base').split()[0]}",
        f"({long['0.4']} against {mean_of('pgraft/long_graft')})",
        f"({mean_of('pgraft/long_x0_0.4')}; with `--data xs` {mean_of('pgraft/long_xs_0.4')}, one seed)",
        f"strict {mean_of(guided)} against {mean_of(of_guided)}",
        f"(fit {plain(mean_of(guided, name))} against {plain(mean_of(of_guided, name))})",
        f"{plain(mean_of(guided, 'diversity'))} against {plain(mean_of(of_guided, 'diversity'))}",
        f"({mean_of(of_guided, switched='0.2')}) and more diversity "
        f"({plain(mean_of(of_guided, 'diversity', switched='0.2'))})",
    ]


def noise_claims() -> list[str]:
    def change(metric):
        standard, learnt = (mean_of("noise_ppo/mean", metric, column) for column in ("standard", "learnt"))
        return f"{plain(standard)} → {learnt}"

    def at_4(arm, name):
        return by_steps(runs(f"noise_ppo/{arm}"), (4,), name)[0]

    mean, both = (runs(f"noise_ppo/valid_{arm}")[0] for arm in ("mean", "both"))
    (few, _), (few_both, _) = at_4_and_40(mean), at_4_and_40(both)
    kept = at_4("mean", "diversity_kept")
    return [
        f"takes strict from {float(plain(at_4('mean', 'standard'))):.2f} to {at_4('mean', 'learnt')} at four model calls a picture, "
        f"more than best-of-4 gets from sixteen calls ({plain(at_4('mean', 'best_of_4'))})",
        f"gains nothing ({at_4('unconditional', 'gain')})",
        f"nor does σ alone ({at_4('std_only', 'gain')}, one seed)",
        f"(the best s on training prompts is {runs('noise_ppo/both')[0]['temperature']:g})",
        f"(+{few['gain']:.3f} against +{few_both['gain']:.3f} ± {few_both['se']:.3f}, one seed each) and kept more diversity "
        f"({few['diversity_kept'] * 100:.0f} against {few_both['diversity_kept'] * 100:.0f} %)",
        f"`graded` {change('shapes_graded')}, `fit` {change('shapes_fit')}",
        f"Brightness drifts ({change('brightness')}) and with it diversity falls by a fifth, {kept} is kept",
    ]


def inc_claims() -> list[str]:
    found, seed_0 = inc_rows(runs("inc/default")), runs("inc/default")[0]
    flops, distance = {name: cells[1] for name, cells in found.items()}, {name: cells[3] for name, cells in found.items()}
    margin = {name: cells[4].lstrip("-") for name, cells in found.items()}
    first = {name: float(cells[3]) for name, cells in inc_rows([seed_0]).items()}
    (many,), (plain_run,), (large,), (scale,) = (
        runs(f"inc/{x}") for x in ("steps_64", "plain_iteration", "as_large", "scale_start")
    )
    table_64 = {(row["arm"], row["steps"]): f"{row['fd']:.3f}" for row in many["table"]}
    of_others = [{row["arm"]: row for row in run["table"]}["corrector"] for run in (large, scale)]
    inversion, other = seed_0["inversion"], plain_run["inversion"]
    calls, other_calls = (f"{i['calls'] / i['pictures']:.1f}" for i in (inversion, other))
    base_64 = ", ".join(table_64["base", steps] for steps in (64, 65, 128))
    loss = many["corrector"]
    return [
        f"{distance['corrector']} at {flops['corrector']} MFLOP a picture, against {distance['base, matched FLOPs']} for the base "
        f"with as many FLOPs on the even grid, {distance['base, grid power 1.4']} on the better of two other grids, and "
        f"{distance['base, 4 N']} for the base at 24 steps and {flops['base, 4 N']} MFLOP. In wall-clock the same: "
        f"{found['corrector'][2]} against {found['base, 4 N'][2]} ms",
        f"better than the Gaussian by {margin['gaussian']} (paired)",
        f"the corrector is better by {margin['gaussian, norms matched']} (paired)",
        f"{distance['corrector']} against the floor of {plain(distance['data against data'])}",
        f"Base at 64, 65 and 128 steps: {base_64};",
        f"scale only has {table_64['scale only', 64]}, the Gaussian {table_64['gaussian', 64]}, the corrector "
        f"{table_64['corrector', 64]}",
        f"(the inverted noises have deviation {many['noise']['inverted']['variance'] ** 0.5:.3f})",
        f"(held-out loss {loss['held_out']:.4f}, {loss['identity']:.4f} with velocity 0)",
        f"the largest contraction is {max(many['inversion']['contraction']):.2f}",
        f"{calls} model calls a picture with Anderson acceleration, {inversion['left_out']} of {inversion['pictures']} left out, "
        f"round trip {inversion['round_trip_error']:.1e}, median contraction of the six steps "
        f"{', '.join(f'{c:.2f}' for c in inversion['contraction'])}; {other_calls} calls and {other['left_out']} left out with the",
        f"(seed 0, where the default has {first['corrector']:.3f}, the Gaussian {first['gaussian']:.3f} and the Gaussian with norms "
        f"matched {first['gaussian, norms matched']:.3f})",
        "{:.3f} at {:.1f} MFLOP; a corrector that starts".format(of_others[0]["fd"], of_others[0]["flops"] / 1e6),
        "{:.3f} at {:.1f} MFLOP.".format(of_others[1]["fd"], of_others[1]["flops"] / 1e6),
    ]


def flow_claims() -> list[str]:
    import flow_steps

    half, one = ([f"{std:.3f}" for std in flow_steps.grain(eta)] for eta in (0.5, 1.0))
    return ["{}, {} and {}, grain in the picture (at η = 1: {}, {}, {})".format(*half, *one)]


def mutation_claims() -> list[str]:
    return [f"changes the equations in {len(read('mutations.json'))} places"]


def compare_claims() -> list[str]:
    budget = runs("compare/graft")[0]["calls"]
    at = {
        arm: compare.mean_and_se([compare.at_budget(r, budget) for r in runs(f"compare/{arm}")]) for arm in ("graft", "ddpo")
    }
    slow, fast = (
        runs(f"compare/tuning/{compare.slug(name)}")[0]["curve"][-1]
        for name in ("ddpo, lr 1e-3, clip 1e-4", "ddpo, lr 3e-3, clip 1e-2, batch 32")
    )
    both = {name: by_steps(runs("compare/pgraft_noise_ppo"), (10,), name)[0] for name in ("standard", "learnt")}
    return [
        f"raises strict at 10 deterministic steps from {both['standard']} to {both['learnt']}. P-GRAFT's own stochastic sampler has "
        f"{mean_of('compare/pgraft')} there",
        f"(strict {at['graft']} against {at['ddpo']})",
        f"holds: {mean_of('compare/ddpo_steady')} after {runs('compare/ddpo_steady')[0]['pictures']:,} pictures",
        f"and ends at {mean_of('compare/graft_tuned')}, with cleaner drawing (`fit` {mean_of('compare/graft_tuned', 'shapes_fit')} against "
        f"{mean_of('compare/ddpo_steady', 'shapes_fit')}) and less diversity ({mean_of('compare/graft_tuned', 'diversity')} against "
        f"{mean_of('compare/ddpo_steady', 'diversity')})",
        f"was at {slow['reward']:.3f} after {slow['pictures']:,} pictures on validation prompts, the chosen ones at "
        f"{fast['reward']:.3f} after {fast['pictures']:,}",
    ]


CLAIMS = (compare_claims, mutation_claims, settings_claims, graft_claims, pgraft_claims, noise_claims, inc_claims, flow_claims)


# ---------------------------------------------------------------- the file


def generated(text: str) -> str:
    """The README with every generated part made again."""
    pattern = re.compile(r"(<!-- generated: (.+?) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
    names = [match[1] for match in pattern.findall(text)]
    if sorted(names) != sorted(PARTS):
        raise ValueError(f"README.md: parts missing, unknown or twice: {sorted(set(names) ^ set(PARTS)) or names}")
    return pattern.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[4]}", text)


def parts_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- generated: (.+?) -->\n(.*?)<!-- end -->\n", text, re.DOTALL))


def words_of(text: str) -> str:
    """One line, with one kind of minus sign, so that it does not matter where lines break."""
    return " ".join(text.replace("−", "-").split())


def problems(text: str) -> list[str]:
    """One line for each part that differs from the results, each claim that the text does not hold, each bad picture."""
    now, expected = parts_of(text), parts_of(generated(text))
    found = [f"part '{name}' differs: run python benchmarks/readme.py" for name in expected if now[name] != expected[name]]
    words = words_of(text)
    claims = [claim for make in CLAIMS for claim in make()]
    found += [f"not in the text, but in the results: {claim}" for claim in claims if words_of(claim) not in words]
    for name in re.findall(r"!\[.*?\]\((.+?)\)", text):
        picture = ROOT / name
        if not picture.is_file():
            found.append(f"picture {name}: no such file")
        results = (picture.with_name(f"{picture.stem.split('__')[0]}{suffix}.json") for suffix in ("", "__0"))
        if not any(file.is_file() for file in results):
            found.append(f"picture {name}: no result beside it")
    return found


def main() -> int:
    if sys.argv[1:] not in ([], ["--check"]):
        print(__doc__)
        return 2
    text = README.read_text(encoding="utf-8")
    if not sys.argv[1:]:
        new = generated(text)
        changed = [name for name, part in parts_of(new).items() if part != parts_of(text)[name]]
        README.write_text(new, encoding="utf-8")
        print(f"README.md: {len(PARTS)} parts, changed: {', '.join(changed) or 'none'}")
        text = new
    found = problems(text)
    print("\n".join(found) or "README.md agrees with the results")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
