"""benchmarks/compare.py: the budget it states is what the runs do, curves, table and figure from stored results."""

import json
import sys

import pytest
import torch
from conftest import ROOT, arguments_for, run_inside

import common
import graft
import noise_ppo
import pgraft

sys.path.insert(0, str(ROOT / "benchmarks"))
import compare
import ddpo

SCRIPTS = {"graft.py": graft.Args, "pgraft.py": pgraft.Args, "noise_ppo.py": noise_ppo.Args, "benchmarks/ddpo.py": ddpo.Args}
MORE = {
    "graft.py": "",
    "pgraft.py": "--switch 0.5 --eta 1",
    "noise_ppo.py": "--iterations 2 --prompts_per_iteration 3 --no-controls --eval_steps 4",
    "benchmarks/ddpo.py": "--epochs 2",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_cost_is_what_a_run_calls(script, tiny_arguments, tmp_path, monkeypatch):
    """Calls of the model counted in a run, three times where gradients flow, less those of the evaluations."""
    monkeypatch.chdir(tmp_path)
    calls, predict = [], common.Model.predict

    def counted(model, x, t, text):
        calls.append(len(x) * (3 if torch.is_grad_enabled() else 1))
        return predict(model, x, t, text)

    monkeypatch.setattr(common.Model, "predict", counted)
    argv = [
        *arguments_for(SCRIPTS[script], tiny_arguments),
        "--guidance",
        "2",
        "--eval_every",
        "1",
        *MORE[script].split(),
    ]
    code, _, error = run_inside([*argv, "--output", "run"], script)
    assert code == 0, error
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    # two held-out prompts x two pictures x four steps, before, after each of two rounds, noise PPO also twice at the end
    evaluating = 2 * 2 * 4 * 2 * (5 if script == "noise_ppo.py" else 3)
    assert sum(calls) - evaluating == 2 * compare.cost(script, args)[1]
    assert compare.cost(script, args)[0] == 12

    seconds, total = (
        compare.seconds_at(tmp_path / "run"),
        json.loads((tmp_path / "run" / "results.json").read_text())["seconds"],
    )
    assert len(seconds) == 2 and 0 < seconds[0] < seconds[1] <= total + 0.5


def record(rewards, per_round, calls, seconds):
    curve = [
        {"pictures": per_round * i, "calls": calls * i, "seconds": seconds * i, "reward": reward}
        for i, reward in enumerate(rewards, 1)
    ]
    rows = [{"metric": name, "base": 0.2, "tuned": rewards[-1]} for name in compare.METRICS]
    return {"pictures": curve[-1]["pictures"], "calls": curve[-1]["calls"], "curve": curve, "table": rows}


@pytest.fixture
def stored(tmp_path):
    for seed in (0, 1):
        for arm, values in {
            "graft": record([0.5, 0.7 + 0.1 * seed, 0.9], 100, 2000, 10.0),
            "ddpo": record([0.3, 0.4, 0.7], 1000, 6000, 50.0),
        }.items():
            (tmp_path / f"{arm}__{seed}.json").write_text(json.dumps(values))
    return tmp_path


def test_table_and_figure(stored):
    lines = compare.table(stored).splitlines()
    (graft,) = (line for line in lines if line.startswith("| GRAFT (2)"))
    (ddpo,) = (line for line in lines if line.startswith("| DDPO (2)"))
    assert graft.split("|")[2:7] == [" 300 ", " 6 ", " 30 ", " 0.900 ± 0.000 ", " 0.900 ± 0.000 "]
    assert ddpo.split("|")[2:7] == [" 3,000 ", " 18 ", " 150 ", " 0.300 ± 0.000 ", " 0.700 ± 0.000 "]
    assert len({line.count("|") for line in lines}) == 1 and any(line.startswith("| best of 8 ") for line in lines)
    compare.figure(stored)
    assert (stored / "graft__compare.png").stat().st_size > 10_000


def test_reached(stored):
    """After its second round GRAFT's mean is 0.75, above DDPO's 0.7."""
    lines = compare.reached(stored).splitlines()
    costs = "200 (1/15.0) pictures, 4,000 (1/4.5) calls, 20 (1/7.5) seconds"
    for which, found in zip(("best", "last"), lines[2:], strict=True):
        assert found == f"| DDPO, {which}: 0.700 after 3,000 pictures, 18,000 calls, 150 seconds | 0.750 after {costs} |"
    for seed in (0, 1):
        (stored / f"ddpo__{seed}.json").write_text(json.dumps(record([0.95, 0.3], 1000, 6000, 50.0)))
    best, last = compare.reached(stored).splitlines()[2:]
    assert best == "| DDPO, best: 0.950 after 1,000 pictures, 6,000 calls, 50 seconds | not reached |"
    assert last.endswith("0.500 after 100 (1/20.0) pictures, 2,000 (1/6.0) calls, 10 (1/10.0) seconds |")
