"""benchmarks/run.py: the budget it states is what the runs do; what it runs, resumes and stores; and that
the stored records are those of its arms."""

import json
import sys

import pytest
import torch
import tyro

import awm
import common
import ddpo
import diffusion_nft
import graft
import inverse_noise_correction
import noise_ppo
import pgraft
import run
from conftest import ROOT, arguments_for, run_inside
from fashion import train as fashion_train
from layouts import pgraft_layouts
from molecules import graft_molecules
from run import ARMS, Arm, Options
from utils.runs import parse_arguments

ARGS = {
    "graft.py": graft.Args,
    "pgraft.py": pgraft.Args,
    "noise_ppo.py": noise_ppo.Args,
    "inverse_noise_correction.py": inverse_noise_correction.Args,
    "benchmarks/ddpo.py": ddpo.Args,
    "benchmarks/diffusion_nft.py": diffusion_nft.Args,
    "benchmarks/awm.py": awm.Args,
    "molecules/graft_molecules.py": graft_molecules.Args,
    "layouts/pgraft_layouts.py": pgraft_layouts.Args,
}
FLAGS = {
    "graft.py": "",
    "pgraft.py": "--switch 0.5 --eta 1",
    "noise_ppo.py": "--iterations 2 --prompts_per_iteration 3 --no-controls --eval_steps 4",
    "benchmarks/ddpo.py": "--epochs 2",
    "benchmarks/diffusion_nft.py": "",
    "benchmarks/awm.py": "--kl_base 0.5",
}
EVERY_RECORD = [
    (folder, name, seed) for folder in ARMS for name, arm in ARMS[folder].items() for seed in arm.seeds
]


def read_json(path):
    return json.loads(path.read_text())


# ---------------------------------------------------------------- the budget


@pytest.mark.parametrize("script", FLAGS)
def test_cost_is_what_a_run_calls(script, tiny_arguments, tmp_path, monkeypatch):
    """Calls of the model in a run, three times where gradients flow, less those of the evaluations."""
    monkeypatch.chdir(tmp_path)
    calls, predict = [], common.Model.predict

    def counted(model, *values):
        calls.append(len(values[0]) * (3 if torch.is_grad_enabled() else 1))
        return predict(model, *values)

    monkeypatch.setattr(common.Model, "predict", counted)
    argv = [*arguments_for(ARGS[script], tiny_arguments), "--guidance", "2", "--eval_every", "1"]
    code, _, error = run_inside([*argv, *FLAGS[script].split(), "--output", "run"], script)
    assert code == 0, error
    args = read_json(tmp_path / "run" / "args.json")
    # two held-out prompts x two images x four steps x guidance: before, after each of two rounds; Noise PPO
    # also twice at the end
    evaluating = 2 * 2 * 4 * 2 * (5 if script == "noise_ppo.py" else 3)
    assert sum(calls) - evaluating == 2 * run.cost(script, args)[1]
    assert run.cost(script, args)[0] == 12

    seconds, total = run.seconds_at(tmp_path / "run"), read_json(tmp_path / "run" / "results.json")["seconds"]
    assert len(seconds) == 2 and 0 < seconds[0] < seconds[1] <= total + 0.5
    entries = run.record(tmp_path / "run", "compare", Arm(script), [script, "--seed", "0"], 0, 2)
    assert entries["images"] == 24 and entries["calls"] == 2 * run.cost(script, args)[1]
    assert [point["images"] for point in entries["curve"]] == [12, 24]
    assert [point["reward"] for point in entries["curve"]] == [
        row["reward_held_out"] for row in entries["metrics"]
    ]
    assert entries["seconds"] == entries["curve"][1]["seconds"] == round(seconds[1], 1)


# ---------------------------------------------------------------- the runner


@pytest.fixture
def options(tmp_path, tiny_arguments, monkeypatch):
    """Records and runs in tmp_path, commands inside this process. Of two tiny arms one needs the other."""
    tiny = " ".join(tiny_arguments)
    arms = {
        "second": Arm(
            f"noise_ppo.py {FLAGS['noise_ppo.py']} --lora {{runs}}/compare/first__{{seed}}", needs="first"
        ),
        "first": Arm(f"graft.py {tiny}", seeds=(0, 1), figures=("grid.png",), switches=("0.5",)),
    }
    noise = " ".join(arguments_for(noise_ppo.Args, tiny_arguments))
    arms["second"] = Arm(f"{arms['second'].command} {noise}", seeds=(1,), needs="first")
    monkeypatch.setitem(ARMS, "compare", arms)
    options = Options(results=tmp_path / "results", runs=tmp_path / "runs")
    options.executed = []

    def execute(command):
        options.executed.append(command)
        code, _, error = run_inside(command[1:], command[0])
        if code:
            raise RuntimeError(error)

    monkeypatch.setattr(run, "execute", execute)
    options.jobs = 1  # run_inside changes sys.argv
    return options


def test_store(options, tmp_path):
    assert run.run_all([("compare", "first", 0)], options)
    (stored,) = run.load("compare", "first", tmp_path / "results")
    folder = tmp_path / "runs" / "compare" / "first__0"
    assert stored["command"].startswith("python graft.py --prompts ") and stored["command"].endswith(
        " --seed 0"
    )
    assert stored["seed"] == 0 and "1 runs at a time" in stored["hardware"]
    assert stored["results"] == read_json(folder / "results.json")
    assert [row["round"] for row in stored["metrics"]] == [1, 2] and len(stored["curve"]) == 2
    table = read_json(folder.with_name("first__0__switch_0.5") / "results.json")["table"]
    assert stored["switched"] == {"0.5": table} and table != stored["results"]["table"]
    figure = tmp_path / "results" / "compare" / "first__grid.png"
    assert figure.read_bytes() == (folder / "grid.png").read_bytes()
    # what is stored is not run again
    count = len(options.executed)
    assert run.run_all([("compare", "first", 0)], options) and len(options.executed) == count


def test_a_stopped_run_goes_on(options, tmp_path, monkeypatch):
    save, saved = common.Model.save_lora, []

    def stop_in_the_second_round(model, folder):
        saved.append(1)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(model, folder)

    monkeypatch.setattr(common.Model, "save_lora", stop_in_the_second_round)
    assert not run.run_all([("compare", "first", 0)], options)  # it fails: exit code 130
    assert not (tmp_path / "results").exists()
    assert run.run_all([("compare", "first", 0)], options)
    folder = str(tmp_path / "runs" / "compare" / "first__0")
    first, again, evaluation = options.executed
    assert first[-2:] == ["--output", folder] and again == ["graft.py", "--resume", folder]
    assert evaluation[:2] == ["benchmarks/evaluate.py", folder]
    (resumed,) = run.load("compare", "first", tmp_path / "results")
    assert [row["round"] for row in resumed["metrics"]] == [1, 2]


def test_an_arm_that_needs_another_comes_after_it(options, tmp_path):
    jobs = [("compare", "second", 1), ("compare", "first", 1)]
    assert run.run_all(jobs, options)
    assert [command[0] for command in options.executed] == [
        "graft.py",
        "benchmarks/evaluate.py",
        "noise_ppo.py",
    ]
    (second,) = run.load("compare", "second", tmp_path / "results")
    assert f"--lora {tmp_path}/runs/compare/first__1" in second["command"]
    assert second["results"]["by_steps"] and second["images"] == 24


def test_a_needed_run_is_made_if_only_its_record_is_there(options, tmp_path):
    target = run.record_file("compare", "first", 1, options)
    target.parent.mkdir(parents=True)
    target.write_text("{}")
    assert run.run_all([("compare", "second", 1), ("compare", "first", 1)], options)
    assert [command[0] for command in options.executed] == ["graft.py", "noise_ppo.py"]


@pytest.mark.parametrize("quick", [False, True])
def test_the_flow_of_an_arm_is_trained_first(quick, options, tmp_path, monkeypatch):
    """It is not trained again, unless its folder is not complete."""
    arm = Arm("inverse_noise_correction.py --model {runs}/inc/flow_{seed}", seeds=(1,), flow=True)
    monkeypatch.setitem(ARMS, "inc", {"own": arm})
    options.quick, flow, done = quick, tmp_path / "runs" / "inc" / "flow_1", []
    monkeypatch.setattr(run, "execute", lambda command: done.append(command) or flow.mkdir(parents=True))
    monkeypatch.setattr(run, "finish", lambda *job: done.append(job[:3]))
    monkeypatch.setattr(run, "record", lambda *values: {})

    def run_again():
        done.clear()
        (tmp_path / "results" / "inc" / "own__1.json").unlink(missing_ok=True)
        assert run.run_all([("inc", "own", 1)], options)
        return done

    (module, name, *flags), job = run_again()
    assert [module, name, job] == ["-m", "fashion.train", ("inc", "own", 1)]
    args = tyro.cli(fashion_train.Args, args=flags, use_underscores=True)
    assert (args.seed, args.out, args.dtype, args.size) == (1, flow, "float32", 16)
    assert args.flow and not args.features and not args.images
    assert args.updates == (50 if quick else fashion_train.Args.updates)
    (flow / "unet").mkdir()
    assert len(run_again()) == 2 and not (flow / "unet").exists()  # of a training that was stopped
    (flow / "scheduler").mkdir()
    assert run_again() == [("inc", "own", 1)]


def test_a_failed_run_stores_nothing(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ARMS["compare"], "bad", Arm("graft.py --steps 0"))
    assert not run.run_all([("compare", "bad", 0)], options)
    assert "compare/bad 0 failed: " in capsys.readouterr().err and not (tmp_path / "results").exists()


def test_execute_says_what_failed():
    with pytest.raises(RuntimeError, match="python -c import sys; sys.exit"):
        run.execute(["-c", "import sys; sys.exit('no good')"])
    run.execute(["-c", "import os; assert os.environ['OMP_NUM_THREADS'] == '1'"])
    run.execute(["-c", "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == ''"])


@pytest.mark.parametrize(
    "argv, count, seeds",
    [
        ("graft/none", 1, {0, 1, 2}),
        ("graft --seeds 4", len(ARMS["graft"]), {4}),
        ("tuning compare/ddpo", len(ARMS["tuning"]) + 1, {0, 1, 2}),
        ("--quick compare", len(ARMS["compare"]), {0}),
        ("", sum(map(len, ARMS.values())), {0, 1, 2}),
    ],
)
def test_command_line(argv, count, seeds, monkeypatch):
    chosen = []

    def run_all(jobs, options):
        chosen.append((jobs, options))
        return True

    monkeypatch.setattr(run, "run_all", run_all)
    monkeypatch.setattr(sys, "argv", ["run.py", *argv.split()])
    assert run.main() == 0
    ((jobs, options),) = chosen
    assert len({job[:2] for job in jobs}) == count and {seed for _, _, seed in jobs} == seeds
    assert options.quick == (options.results != run.RESULTS) == ("--quick" in argv)


def test_unknown_names_are_refused(monkeypatch, capsys):
    for name in ("nothing", "graft/nothing"):
        monkeypatch.setattr(sys, "argv", ["run.py", name])
        with pytest.raises(SystemExit) as stop:
            run.main()
        assert stop.value.code == 2 and "no folder or arm 'nothing'" in capsys.readouterr().err


# ---------------------------------------------------------------- the arms and their records


@pytest.mark.parametrize("quick", [False, True])
def test_every_command_is_one_that_its_script_takes(quick):
    for folder, name, seed in EVERY_RECORD:
        script, *flags = run.command_of(folder, name, seed, Options(quick=quick))
        assert parse_arguments(ARGS[script], flags).seed == seed


@pytest.mark.parametrize("folder", ARMS)
def test_stored_records_are_those_of_the_arms(folder):
    """Every record is there and none is left over. Each says how it was made and has the same entries."""
    names = {f"{name}__{seed}.json" for of, name, seed in EVERY_RECORD if of == folder}
    assert {f.name for f in (run.RESULTS / folder).glob("*.json")} - {"default_run.json"} == names
    for name, arm in ARMS[folder].items():
        for seed, stored in zip(arm.seeds, run.load(folder, name), strict=True):
            command = " ".join(["python", *run.command_of(folder, name, seed, Options())])
            controls = " --no-controls"  # the controls change no other number
            assert stored["command"].replace(controls, "") == command.replace(controls, "")
            keys = {"command", "seed", "hardware", "seconds", "results", "metrics"}
            keys |= {"images", "calls", "curve"} if folder in run.BUDGETED else set()
            assert stored.keys() == keys | ({"switched"} if arm.switches else set())
            assert tuple(stored.get("switched", ())) == arm.switches
        for figure in arm.figures:
            assert (run.RESULTS / folder / f"{name}__{figure}").is_file()


def test_budgets_of_the_stored_records_are_those_of_their_settings():
    defaults = {
        "prompts_per_round": 160,
        "samples": 8,
        "steps": 10,
        "guidance": 1.0,
        "updates": 60,
        "batch": 64,
    }
    assert run.load("compare", "graft")[0]["calls"] == 3 * run.cost("graft.py", defaults)[1]
    tuned = defaults | {"batch": 32, "updates": 120}
    assert run.load("compare", "graft_tuned")[0]["calls"] == 6 * run.cost("graft.py", tuned)[1]
    noise = {"prompts_per_iteration": 64, "samples": 8, "steps": 4, "guidance": 1.0}
    assert run.load("compare", "noise_ppo")[0]["calls"] == 36 * run.cost("noise_ppo.py", noise)[1]
    rival = defaults | {"updates": 120, "kl_base": 0.1}
    assert run.cost("benchmarks/diffusion_nft.py", defaults | {"updates": 120})[1] == 12800 + 4 * 120 * 64
    assert run.cost("benchmarks/awm.py", rival)[1] == 12800 + 5 * 120 * 64
    policy = {"prompts_per_round": 80, "samples": 8, "steps": 10, "guidance": 1.0, "epochs": 1}
    assert run.load("compare", "ddpo")[0]["calls"] == 12 * run.cost("benchmarks/ddpo.py", policy)[1]


def test_prompts_are_split_as_they_are_stored(tmp_path):
    run.split_prompts(tmp_path)
    for name in ("prompts_tune.txt", "prompts_valid.txt"):
        assert (tmp_path / name).read_bytes() == (ROOT / "benchmarks" / name).read_bytes()
