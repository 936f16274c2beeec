"""--resume <run> --rounds n: a run with more rounds ends as one that was started with as many."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from conftest import arguments_for, assert_one_line, assert_same_run, exit_code, read_metrics, run_inside
from ddpo import Args as DdpoArgs
from noise_ppo import Args as NoiseArgs
from utils.runs import of_one_run

SCRIPTS = {  # script: its flags
    "graft.py": ["--save_accepted"],
    "pgraft.py": "--probe_prompts 2 --probe_restarts 2 --data xs".split(),
    "benchmarks/ddpo.py": [],
}
KILLED = {  # where the run that has been given more rounds is killed: before the n-th call
    "args.json": ("utils.runs", "write_atomically", 1),
    "round 3 sampled": ("utils.runs", "save_checkpoint", 1),
    "round 3 updating": ("torch.nn.utils", "clip_grad_norm_", 2),
    "round 4": ("utils.runs", "save_checkpoint", 4),
}


def run(argv, cwd, script="graft.py", killer=None):
    cwd.mkdir(exist_ok=True)
    return exit_code(argv, cwd, killer, script)


def arguments(tiny_arguments, script, rounds, eval_every=1):
    args = [*tiny_arguments, *SCRIPTS[script], "--output", "run"]
    args += ["--rounds", str(rounds), "--eval_every", str(eval_every)]
    if script.endswith("ddpo.py"):
        return arguments_for(DdpoArgs, args)
    return args


@pytest.fixture(scope="module", params=SCRIPTS)
def runs(request, tiny_arguments, tmp_path_factory):
    """(script, folder of a finished run of two rounds, folder of one of four)."""
    script, folders = request.param, []
    for rounds in (2, 4):
        folders.append(tmp_path_factory.mktemp("rounds") / str(rounds))
        argv = arguments(tiny_arguments, script, rounds)
        assert run(argv, folders[-1], script) == 0, (folders[-1] / "output.txt").read_text()
    return script, *folders


def test_a_finished_run(runs, tmp_path):
    script, two, four = runs
    shutil.copytree(two, tmp_path / "more")
    assert run(["--resume", "run", "--rounds", "4"], tmp_path / "more", script) == 0
    assert_same_run(tmp_path / "more" / "run", four / "run")
    kept = tmp_path / "more" / "run" / "results_2_rounds.json"
    assert kept.read_bytes() == (two / "run" / "results.json").read_bytes()
    # and once more, as it is
    assert run(["--resume", "run"], tmp_path / "more", script) == 0
    assert_same_run(tmp_path / "more" / "run", four / "run")
    assert {p.name for p in (tmp_path / "more" / "run").glob("results*")} == {"results.json", kept.name}


@pytest.mark.parametrize("runs", ["graft.py"], indirect=True)
@pytest.mark.parametrize("where", KILLED)
def test_killed_after_it_was_given_more(runs, tmp_path, where):
    script, two, four = runs
    shutil.copytree(two, tmp_path / "more")
    assert run(["--resume", "run", "--rounds", "4"], tmp_path / "more", script, KILLED[where]) == -9
    more = ["--rounds", "4"] if where == "args.json" else []
    assert run(["--resume", "run", *more], tmp_path / "more", script) == 0
    assert_same_run(tmp_path / "more" / "run", four / "run")


def test_a_run_that_was_stopped(tiny_arguments, runs, tmp_path):
    """Is given more rounds before it has ended, twice."""
    script, _, four = runs
    argv = arguments(tiny_arguments, script, 2)
    killer = ("torch.nn.utils", "clip_grad_norm_", 1)
    assert run(argv, tmp_path / "more", script, killer) == -signal.SIGKILL
    assert run(["--resume", "run", "--rounds", "3"], tmp_path / "more", script) == 0
    assert run(["--resume", "run", "--rounds", "4"], tmp_path / "more", script) == 0
    assert_same_run(tmp_path / "more" / "run", four / "run")
    assert {p.name for p in (tmp_path / "more" / "run").glob("results*")} == {
        "results.json",
        "results_3_rounds.json",
    }


@pytest.mark.parametrize("eval_every", [0, 3])
def test_an_evaluation_that_was_the_last_only(tiny_arguments, tmp_path, eval_every):
    """The shorter run's last evaluation is none of the longer run."""
    for name, rounds in (("more", 2), ("four", 4)):
        assert run(arguments(tiny_arguments, "graft.py", rounds, eval_every), tmp_path / name) == 0
    short = [row["reward_held_out"] for row in read_metrics(tmp_path / "more" / "run")]
    assert short[0] == "nan" != short[1]
    killer = ("utils.runs", "save_checkpoint", 1)  # and it stays away if the run is stopped
    assert run(["--resume", "run", "--rounds", "4"], tmp_path / "more", killer=killer) == -signal.SIGKILL
    assert run(["--resume", "run"], tmp_path / "more") == 0
    assert_same_run(tmp_path / "more" / "run", tmp_path / "four" / "run")
    metrics = read_metrics(tmp_path / "four" / "run")
    assert [row["reward_held_out"] != "nan" for row in metrics] == [False, False, eval_every == 3, True]
    assert run(["--resume", "run"], tmp_path / "four") == 0  # as it is: it keeps the evaluation
    assert read_metrics(tmp_path / "four" / "run") == metrics


@pytest.mark.parametrize("runs", ["graft.py"], indirect=True)
def test_what_is_refused(runs):
    _, two, _ = runs
    folder = str(two / "run")
    before = {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    for flags, words in (
        ("--rounds 1", "--rounds 1 differs from the run in | (2): give more, leave it out, or start a new"),
        ("--rounds 4 --lr 1", "--lr 1.0 differs from the run in | leave it out, or start a new run"),
        ("--rounds 100000", "--rounds 100000: must be between 1 and 10000"),
    ):
        code, _, error = run_inside(["--resume", folder, *flags.split()])
        for word in words.split(" | "):
            assert_one_line(code, error, word)
    assert before == {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_noise_ppo_cannot_be_given_more(tiny_arguments, tmp_path, monkeypatch):
    """Its learning rate falls to 0 over the iterations."""
    small = "--iterations 1 --prompts_per_iteration 2 --epochs 1 --eval_steps 4 --no-controls".split()
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside(
        [*arguments_for(NoiseArgs, tiny_arguments), *small, "--output", "run"], "noise_ppo.py"
    )
    assert code == 0, error
    code, _, error = run_inside(["--resume", "run", "--iterations", "2"], "noise_ppo.py")
    assert_one_line(code, error, "--iterations 2 differs from the run in run (1): leave it out")


def test_which_arguments_are_of_one_run():
    now = {"seed": 0, "rounds": 3}
    for before, same in (
        (now, True),
        (now | {"rounds": 2}, True),
        (now | {"rounds": 4}, False),
        (now | {"seed": 1}, False),
        ({"seed": 1, "rounds": 2}, False),
        ({"seed": 0}, False),
    ):
        assert of_one_run(json.dumps(before), json.dumps(now)) == same, before
    assert not of_one_run(None, json.dumps(now))
    assert not of_one_run(json.dumps({"iterations": 1}), json.dumps({"iterations": 2}))
