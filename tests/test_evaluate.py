"""benchmarks/evaluate.py: it gives what the runs themselves reported, for other settings what the methods'
functions give, and one line for what it cannot do."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import graft
import noise_ppo
import pgraft
import utils.figures
from common import LORA_FILE, Model, derived_seed, draw_noise
from conftest import (
    arguments_for,
    assert_one_line,
    assert_same_images,
    exit_code,
    run_inside,
    stock_pipeline,
)
from rewards import Reward
from utils.prompts import read_prompts
from utils.runs import paired_table

SCRIPT = "benchmarks/evaluate.py"
STRONG_LORA = "--lora_targets all --lr 5e-2".split()  # one that changes the images
NOISE = (
    "--iterations 2 --prompts_per_iteration 3 --minibatch 6 --lr 5e-2 --no-controls --eval_steps 4 5".split()
)
CODE = "import torch; from diffusers"  # the first words of the printed code


@pytest.fixture(scope="module")
def finished(tiny_arguments, tmp_path_factory):
    """{name: folder of a finished run}: one of each script, and a noise policy above P-GRAFT's LoRA."""
    cwd = tmp_path_factory.mktemp("finished")
    noise = [*arguments_for(noise_ppo.Args, tiny_arguments), *NOISE]
    runs = {
        "graft": ("graft.py", [*tiny_arguments, *STRONG_LORA]),
        "pgraft": ("pgraft.py", [*tiny_arguments, *STRONG_LORA, "--switch", "0.5"]),
        "noise_ppo": ("noise_ppo.py", noise),
        "both": ("noise_ppo.py", [*noise, "--lora", str(cwd / "pgraft")]),
    }
    for name, (script, argv) in runs.items():
        code = exit_code([*argv, "--output", name], cwd, script=script)
        assert code == 0, (cwd / "output.txt").read_text()
    return {name: cwd / name for name in runs}


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluate a run in an empty folder, return (folder, what was printed)."""

    def evaluate(run, *argv, name="evaluation"):
        monkeypatch.chdir(tmp_path)
        code, out, error = run_inside([str(run), *argv, "--output", name], SCRIPT)
        assert code == 0, error
        return tmp_path / name, out

    return evaluate


def read_json(path):
    return json.loads(path.read_text())


def run_code(out, name):
    """The image that the printed code makes."""
    exec(out[out.index(CODE) :], {})  # noqa: S102
    return Image.open(name)


def pixels_between(one, other):
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()


def assert_same_table(table, expected):
    for row, other in zip(table, expected, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def settings(**changes):
    sampling = {"eval_samples": 2, "sample_batch": 64, "steps": 4, "guidance": 1.0, "eta": 1.0}
    return SimpleNamespace(**sampling | {"switch_timestep": None} | changes)


@pytest.fixture
def tuned_model(finished, tiny_v):
    """The model with the LoRA of a run."""

    def load(name):
        model = Model(tiny_v, "cpu", torch.float32)
        model.load_lora(str(finished[name]))
        return model

    return load


def lora_table(model, prompt_files, switch_at, **changes):
    """The expected table of a LoRA, by the functions of pgraft.py."""
    rewards, prompts = [Reward("jpeg_compressibility"), Reward("shapes_graded")], prompt_files.held_out
    base, tuned = (
        pgraft.evaluate(model, rewards, read_prompts(prompts, ""), settings(**changes), switch_at, on, "")[0]
        for on in (False, True)
    )
    return paired_table(base, tuned)


def first_image(model, prompt_files, steps, switch_at):
    """The evaluation's first image, by the functions of pgraft.py."""
    noise = draw_noise([derived_seed("eval", 0, 0)], steps, model.latent_shape, model.dtype)
    text = model.encode(read_prompts(prompt_files.held_out, "")[:1])
    return model.decode(pgraft.sample(model, noise, text, 1.0, 1.0, switch_at)[1])[0]


def trailing(pipe):
    """The pipeline with the scheduler that noise policies are learnt with."""
    options = {"timestep_spacing": "trailing", "clip_sample": False}
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, **options)
    return pipe


def noise_table(run, model, names, file, **changes):
    """The expected table of a noise policy, by noise_ppo.py's functions. names: rewards; file: prompts."""
    policy = noise_ppo.NoisePolicy.load(run, trailing(model.pipeline))
    rewards, prompts, args = [Reward(name) for name in names], read_prompts(file, ""), settings(**changes)
    zero = torch.zeros(1, *model.latent_shape)
    standard, learnt = (
        noise_ppo.evaluate(model, rewards, prompts, *noise, args.steps, args, "")[0]
        for noise in ((zero, zero), policy(model.encode(prompts)))
    )
    return paired_table(standard, learnt, ("standard", "learnt", "gain"))


# ---------------------------------------------------------------- as the run did


@pytest.mark.drawn
@pytest.mark.parametrize("name", ["graft", "pgraft", "noise_ppo", "both"])
def test_reproduces_the_final_evaluation(evaluate, finished, name):
    folder, out = evaluate(finished[name])
    results, expected = read_json(folder / "results.json"), read_json(finished[name] / "results.json")
    assert results["table"] == expected["table"]
    assert max(abs(row["tuned" if "tuned" in row else "gain"]) for row in results["table"]) > 1e-3
    assert {p.name for p in folder.iterdir()} == {"args.json", "results.json", "grid.png", ".lock"}
    assert np.array_equal(Image.open(folder / "grid.png"), Image.open(finished[name] / "grid.png"))
    assert (results["method"], results["steps"]) == ({"both": "noise_ppo"}.get(name, name), 4)
    assert "round" not in out and "2 prompts" in out and "jpeg_compressibility" in out
    switched = name in ("pgraft", "both")
    assert ("tuned model for 2 of 4 steps, base model from timestep 499 on" in out) == switched
    assert ("switch_timestep" in results) == switched
    if name == "pgraft":
        for key in ("steps", "switch_at", "switch_timestep"):
            assert results[key] == expected[key]


def test_a_stopped_evaluation_is_started_again(evaluate, finished, tmp_path, monkeypatch):
    stopped, save_grid = [], utils.figures.save_grid

    def stop_once(*args):
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        save_grid(*args)

    monkeypatch.setattr(utils.figures, "save_grid", stop_once)
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([str(finished["graft"]), "--output", "stopped"], SCRIPT)
    assert code == 130 and error.endswith("--resume stopped\n")
    code, _, error = run_inside(["--resume", "stopped"], SCRIPT)
    assert code == 0, error
    table = read_json(tmp_path / "stopped" / "results.json")["table"]
    assert table == read_json(finished["graft"] / "results.json")["table"]


# ---------------------------------------------------------------- other settings


def test_other_steps_same_switch(evaluate, finished, tuned_model, prompt_files):
    """The level is kept: another number of steps lies above it. The printed code makes the same image."""
    folder, out = evaluate(finished["pgraft"], "--steps", "8")
    switch_at = pgraft.switch_step(range(999, 0, -125), 499)
    assert f"tuned model for {switch_at} of 8 steps" in out
    results, model = read_json(folder / "results.json"), tuned_model("pgraft")
    assert_same_table(results["table"], lora_table(model, prompt_files, switch_at, steps=8))
    assert (results["steps"], results["switch_timestep"]) == (8, 499)
    assert str(finished["pgraft"]) in out[out.index(CODE) :]
    assert_same_images([run_code(out, "tuned.png")], [first_image(model, prompt_files, 8, switch_at)])


def test_a_deterministic_sampler(evaluate, finished, tuned_model, prompt_files):
    folder, out = evaluate(finished["pgraft"], "--eta", "0")
    expected = lora_table(tuned_model("pgraft"), prompt_files, 2, eta=0.0)
    assert_same_table(read_json(folder / "results.json")["table"], expected)
    assert "eta 0\n" in out


def test_every_step_starts_above_the_switch(evaluate, finished):
    folder, out = evaluate(finished["pgraft"], "--steps", "1")
    assert "tuned model for 1 of 1 steps" in out
    assert any(row["difference"] for row in read_json(folder / "results.json")["table"])


def test_graft_with_a_switch(evaluate, finished, tuned_model, prompt_files):
    folder, out = evaluate(finished["graft"], "--switch", "0.5")
    assert "tuned model for 2 of 4 steps, base model from timestep 500 on" in out
    results, model = read_json(folder / "results.json"), tuned_model("graft")
    assert_same_table(results["table"], lora_table(model, prompt_files, 2))
    whole = read_json(finished["graft"] / "results.json")["table"]  # there the LoRA is on in all steps
    assert max(abs(a["tuned"] - b["tuned"]) for a, b in zip(results["table"], whole, strict=True)) > 1e-3
    image = run_code(out, "tuned.png")
    assert_same_images([image], [first_image(model, prompt_files, 4, 2)])
    assert pixels_between(image, first_image(model, prompt_files, 4, 4)) > 0.2


def test_graft_without_a_switch_prints_code_of_its_image(evaluate, finished, tuned_model, prompt_files):
    _, out = evaluate(finished["graft"])
    assert "disable_lora" not in out
    assert_same_images([run_code(out, "tuned.png")], [first_image(tuned_model("graft"), prompt_files, 4, 4)])


def test_other_switch_below_a_policy(evaluate, finished, tuned_model, prompt_files):
    folder, out = evaluate(finished["both"], "--switch", "0.8")
    assert "tuned model for 1 of 4 steps, base model from timestep 800 on" in out
    model, rewards = tuned_model("pgraft"), ("jpeg_compressibility", "shapes_graded")
    expected = noise_table(finished["both"], model, rewards, prompt_files.held_out, switch_timestep=800)
    results = read_json(folder / "results.json")
    assert_same_table(results["table"], expected)
    own = read_json(finished["both"] / "results.json")["table"]
    assert max(abs(a["learnt"] - b["learnt"]) for a, b in zip(results["table"], own, strict=True)) > 1e-3


def test_other_prompts_rewards_and_sampling(evaluate, finished, tiny_v, prompt_files):
    names = ("shapes_strict", "jpeg_incompressibility")
    argv = ["--prompts", prompt_files.train, "--reward", names[0], "--eval_rewards", names[1]]
    sampling = "--steps 5 --guidance 2 --eval_samples 4 --sample_batch 3".split()
    folder, out = evaluate(finished["noise_ppo"], *argv, *sampling)
    model, changes = Model(tiny_v, "cpu", torch.float32), {"steps": 5, "guidance": 2.0}
    changes |= {"eval_samples": 4, "sample_batch": 3}
    table = read_json(folder / "results.json")["table"]
    assert_same_table(table, noise_table(finished["noise_ppo"], model, names, prompt_files.train, **changes))
    assert [row["metric"] for row in table[:2]] == list(names)
    assert "4 prompts x 4 images, 5 steps, guidance 2\n" in out


def test_code_of_a_policy_makes_the_evaluated_image(evaluate, finished, tiny_v, prompt_files):
    _, out = evaluate(finished["noise_ppo"], "--steps", "5")
    image, prompt = run_code(out, "learnt.png"), read_prompts(prompt_files.held_out, "")[0]
    pipe = trailing(stock_pipeline(tiny_v))
    policy = noise_ppo.NoisePolicy.load(finished["noise_ppo"], pipe)
    latents = policy.sample(prompt, torch.Generator().manual_seed(derived_seed("eval", 0, 0)))
    expected = pipe(prompt, latents=latents, num_inference_steps=5, guidance_scale=1.0).images[0]
    assert_same_images([image], [expected])


# ---------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def damaged(finished, tmp_path_factory):
    """A folder with damaged copies of the runs."""
    root = tmp_path_factory.mktemp("damaged")

    def copy(run, name, **contents):
        shutil.copytree(finished[run], root / name, ignore=shutil.ignore_patterns("tensorboard", "*.pt"))
        for file, content in contents.items():
            path = root / name / file.replace("__", ".")
            path.write_text(content) if content else path.unlink()

    copy("graft", "no_args", args__json="")
    copy("graft", "cut_args", args__json="{")
    copy("graft", "other_args", args__json=json.dumps({"seed": 0}))
    copy("graft", "no_lora", pytorch_lora_weights__safetensors="")
    copy("graft", "cut_lora", pytorch_lora_weights__safetensors="cut")
    copy("pgraft", "no_json", pgraft__json="")
    copy("pgraft", "cut_json", pgraft__json="{")
    stored = read_json(finished["pgraft"] / "pgraft.json")
    copy("pgraft", "other_level", pgraft__json=json.dumps(stored | {"sigma": 0.5 * stored["sigma"]}))
    copy("noise_ppo", "cut_policy", policy__safetensors="cut")
    stored = read_json(finished["both"] / "args.json")
    copy("both", "lost_lora", args__json=json.dumps(stored | {"lora": "lost"}))
    return root


BAD_INPUT = {  # what is given: what the line names; @: damaged runs, %: good ones
    "": "(nothing): no run there",
    "missing": "missing: no run there (no args.json)",
    "@no_args": "no_args: no run there (no args.json)",
    "@cut_args": "args.json: is damaged or of another script",
    "@other_args": "args.json: is damaged or of another script (model)",
    "@no_lora": f"has no {LORA_FILE} or noise_ppo.json; give the folder of a finished",
    "@no_json": "no_json/pgraft.json: does not exist; give the folder of a finished pgraft.py run",
    "@cut_json": "cut_json/pgraft.json: is damaged; give the level with --switch",
    "@lost_lora": f"--lora lost: has no {LORA_FILE}",
    "%pgraft --switch 0": "--switch 0.0: must be a level",
    "%pgraft --switch 1": "--switch 1.0: must be a level",
    "%pgraft --steps 0": "--steps 0: must be between 1 and 999",
    "%graft --eval_samples 1": "--eval_samples 1: must be between",
    "%graft --lora %pgraft": "is of a noise policy; leave it out",
    "%graft --prompts none.txt": "--prompts none.txt: no such file",
    "%graft --reward none": "--reward none: no reward 'none'",
    "%graft --device cpu --dtype float16": "--dtype float16 needs a CUDA device",
    "%noise_ppo --eta 0.5": "--eta 0.5: a noise policy is sampled without further noise",
    "%noise_ppo --switch 0.5": "has no LoRA; leave it out",
}


def words(given, finished, damaged):
    return given.replace("@", f"{damaged}/").replace("%", f"{finished['graft'].parent}/").split()


@pytest.mark.parametrize("given", BAD_INPUT)
def test_bad_input_is_found_before_the_model_loads(given, finished, damaged, tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("common.Model.__init__", load)
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside(words(given, finished, damaged), SCRIPT)
    assert_one_line(code, error, BAD_INPUT[given])
    assert not list(tmp_path.iterdir())


BAD_FOR_THE_MODEL = {
    "%graft --switch 0.9999": "--steps 4: no step starts above the switch, timestep 999.9; give more",
    "%both --switch 0.9999": "--steps 4: no step starts above the switch, timestep 999.9; give more",
    "%graft --steps 3": "--steps 3: must be below the model's 1000 training steps and, with 'trailing'",
    "%noise_ppo --steps 7": "--steps 7: must be below the model's 1000 training steps",
    "%graft --model &": f"graft/{LORA_FILE}: ",
    "%noise_ppo --model &": "noise_ppo: its policy is of another model; give --model ",
    "@cut_lora": f"cut_lora/{LORA_FILE}: cannot be loaded",
    "@cut_policy": "cut_policy: its policy cannot be loaded",
    "@other_level": "other_level/pgraft.json does not fit the model",
}


@pytest.mark.parametrize("given", BAD_FOR_THE_MODEL)
def test_bad_input_that_only_the_model_shows(given, finished, damaged, families, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [families["xl"] if word == "&" else word for word in words(given, finished, damaged)]
    code, _, error = run_inside(argv, SCRIPT)
    assert_one_line(code, error.split("\r")[-1].lstrip(), BAD_FOR_THE_MODEL[given])
    assert not list(tmp_path.iterdir())


def test_one_prompt_has_no_standard_error(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("a red circle left of a blue square\n")
    code, _, error = run_inside([str(finished["graft"]), "--prompts", "one.txt"], SCRIPT)
    assert_one_line(code, error, "--prompts one.txt: holds one prompt")


def test_prompts_that_a_reward_does_not_understand(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("evaluate.load_model", None)  # found before the model loads
    Path("cats.txt").write_text("a cat\na dog\n")
    flags = ["--prompts", "cats.txt", "--reward", "shapes_strict"]
    code, _, error = run_inside([str(finished["graft"]), *flags], SCRIPT)
    assert_one_line(code, error, "--prompts: 'a cat' is not a shapes prompt")


def test_evaluations_are_the_scripts_own():
    """The functions that make the tables of the runs are those that evaluate.py calls."""
    import evaluate

    assert evaluate.evaluate_graft is graft.evaluate and evaluate.evaluate_pgraft is pgraft.evaluate
    assert evaluate.evaluate_noise is noise_ppo.evaluate


def test_a_model_without_guidance_refuses_it(finished, families, tmp_path):
    run = shutil.copytree(finished["graft"], tmp_path / "run", ignore=shutil.ignore_patterns("*.pt"))
    stored = read_json(run / "args.json") | {"model": families["schnell"]}
    (run / "args.json").write_text(json.dumps(stored))
    code, _, error = run_inside([str(run), "--guidance", "5"], "benchmarks/evaluate.py")
    assert_one_line(code, error, "--guidance 5: FLUX.1 schnell takes no guidance; leave it out")
