"""--lora: tuning starts from a LoRA, also one made by diffusers or kohya's scripts."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from common import LORA_FILE, SWITCH_FILE, Model, check_start, derived_seed, draw_noise, find_lora
from conftest import PROMPTS as SOME
from conftest import (
    SEEDS,
    arguments_for,
    assert_one_line,
    assert_same_images,
    assert_same_run,
    difference,
    exit_code,
    randomise,
    read_metrics,
    run_inside,
    stock,
    stock_pipeline,
    with_lora,
)
from graft import Args as GraftArgs
from graft import sample
from noise_ppo import Args as NoiseArgs
from utils.runs import InputError

ONE = "--rounds 1 --updates 1"


def finished(argv, folder, script="graft.py"):
    code, out, error = run_inside([*argv, "--output", str(folder)], script)
    assert code == 0, error
    return json.loads((folder / "results.json").read_text()), out


def column(results, name):
    return {row["metric"]: row[name] for row in results["table"]}


@pytest.fixture(scope="module")
def plain(tiny_v, prompt_files, tmp_path_factory, models):
    """Arguments of a short run without settings of the LoRA, and the folder of a LoRA of the model."""
    folder = tmp_path_factory.mktemp("plain")
    model = with_lora(models["v"], "attention", rank=4, alpha=8)
    randomise(model, 0.3)
    model.save_lora(folder)
    files = f"--prompts {prompt_files.train} --eval_prompts {prompt_files.held_out} --model {tiny_v}"
    sizes = "--prompts_per_round 3 --samples 4 --batch 4 --micro_batch 2 --eval_samples 2 --steps 4"
    rest = "--device cpu --reward jpeg_compressibility --eval_rewards shapes_graded --guidance 1 --lr 1e-2"
    return f"{files} {sizes} {rest}".split(), folder


# ---------------------------------------------------------------- which files are read


def kohya(model, folder, name="kohya.safetensors"):
    """Write the LoRA of `model` as kohya's scripts do, half of the layers with half the rank, alpha 2."""
    from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya

    model.save_lora(folder)
    state = convert_state_dict_to_kohya(convert_all_state_dict_to_peft(load_file(folder / LORA_FILE)))
    (folder / LORA_FILE).unlink()
    layers = sorted({key.partition(".")[0] for key in state})
    for i, layer in enumerate(layers):
        state[f"{layer}.alpha"] = torch.tensor(2.0)
        if i % 2:
            down, up = (f"{layer}.lora_{part}.weight" for part in ("down", "up"))
            half = len(state[down]) // 2
            state[down], state[up] = state[down][:half].contiguous(), state[up][:, :half].contiguous()
    save_file(state, folder / name)
    return folder / name


def images_of(model, steps=5):
    noise = draw_noise(SEEDS, steps, model.latent_shape, model.dtype)
    with model.lora_merged():
        return sample(model, noise, model.encode(SOME), 1.0, 0.0)


@pytest.mark.parametrize("given", ["file", "folder"])
@pytest.mark.parametrize("kind", ["v", "xl"])
def test_a_lora_of_kohyas_scripts(models, tiny_v, families, tmp_path, kind, given):
    """Ranks and alphas of its layers differ. It is sampled as in the stock pipeline, tuned, and saved so that
    the stock pipeline loads it."""
    name = {"v": tiny_v, "xl": families["xl"]}[kind]
    made = with_lora(Model(name, "cpu", torch.float32), "attention", rank=4, alpha=4)
    randomise(made)
    file = kohya(made, tmp_path)
    model = Model(name, "cpu", torch.float32)
    parameters = model.load_lora(str(file if given == "file" else tmp_path))
    assert {len(p) for n, p in model.lora().items() if "lora_A" in n} == {2, 4}
    pipeline = stock_pipeline(name)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    expected = stock(pipeline, eta=0.0)
    assert difference(images_of(model), expected) <= 1e-4
    assert difference(images_of(made), expected) > 1e-2  # ranks and alphas count
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    for parameter in parameters:
        parameter.data *= 1.5
    (tmp_path / "saved").mkdir()
    model.save_lora(tmp_path / "saved")
    again = stock_pipeline(name)
    again.load_lora_weights(str(tmp_path / "saved"))
    assert difference(images_of(model), stock(again, eta=0.0)) <= 1e-4
    ours = Model(name, "cpu", torch.float32)
    ours.load_lora(str(tmp_path / "saved"))
    assert torch.equal(images_of(ours), images_of(model))


@pytest.mark.parametrize("kind", ["tiny", "xl", "sd3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_lora_keeps_its_precision(tiny_v, families, tmp_path, kind, dtype):
    """In float32, whatever the model's precision."""
    name = families.get(kind, tiny_v)
    made = with_lora(Model(name, "cpu", torch.float32), "attention", rank=4, alpha=8)
    randomise(made)
    made.save_lora(tmp_path)
    model = Model(name, "cpu", dtype)
    model.load_lora(str(tmp_path))
    assert made.lora().keys() == model.lora().keys()
    for name, parameter in made.lora().items():
        assert torch.equal(model.lora()[name], parameter)


def add(file, tensors):
    save_file(load_file(file) | tensors, file)


def test_what_is_refused(plain, families, models, tiny_v, tmp_path):
    _, lora = plain
    made = with_lora(models["v"], "attention", rank=4, alpha=4)
    layer = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    one = torch.ones(4, 16)
    cases = {
        "text": ({f"{text}.lora_down.weight": one, f"{text}.lora_up.weight": one.T.contiguous()}, "2 of its"),
        "diffusers": ({"text_encoder.text_model.q_proj.lora_A.weight": one}, "1 of its"),
        "dora": ({f"{layer}.dora_scale": one}, "tensors fit the model"),
        "loha": ({f"{layer}.hada_w1_a": one}, ""),
        "unknown": ({"lora_unet_no_such_layer.lora_down.weight": one}, ""),
    }
    for name, (tensors, words) in cases.items():
        (tmp_path / name).mkdir()
        file = kohya(made, tmp_path / name)
        add(file, tensors)
        with pytest.raises(InputError) as error:
            Model(tiny_v, "cpu", torch.float32).load_lora(str(file))
        assert str(error.value).startswith(f"{file}: ") and words in str(error.value), name
    with pytest.raises(InputError, match="fit the model|cannot be loaded"):
        Model(families["xl"], "cpu", torch.float32).load_lora(str(lora))
    with pytest.raises(InputError, match="fit the model|cannot be loaded"):
        Model(families["sd3"], "cpu", torch.float32).load_lora(str(lora))


BAD = {  # arguments beside --lora: what the line must contain
    "--lora_rank 4": "--lora_rank 4: comes from the file of --lora; leave it out",
    "--lora_alpha 4": "--lora_alpha 4.0: comes from the file of --lora",
    "--lora_targets all": "--lora_targets all: comes from the file of --lora",
    "--lora MISSING": "MISSING: has no pytorch_lora_weights.safetensors; give the folder",
    "--lora TWO": "TWO: holds 2 .safetensors files; give the folder",
}


@pytest.mark.parametrize("script", ["graft.py", "pgraft.py"])
@pytest.mark.parametrize("flags", BAD)
def test_bad_settings(plain, tmp_path, monkeypatch, script, flags):
    argv, lora = plain
    (tmp_path / "TWO").mkdir()
    for name in "ab":
        shutil.copy(lora / LORA_FILE, tmp_path / "TWO" / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.Model", None)  # not loaded
    code, _, error = run_inside([*argv, "--lora", str(lora), *flags.split()], script)
    assert_one_line(code, error, BAD[flags])


def test_the_file_of_a_run_is_taken_whatever_lies_beside_it(plain, tmp_path):
    folder = Path(shutil.copytree(plain[1], tmp_path / "run"))
    shutil.copy(folder / LORA_FILE, folder / "another.safetensors")
    assert find_lora(str(folder), "--lora") == folder / LORA_FILE
    (folder / LORA_FILE).unlink()
    assert find_lora(str(folder), "--lora") == folder / "another.safetensors"


def test_a_stored_run_has_its_rank(plain):
    """A resumed run's arguments come from args.json, where the rank is filled in."""
    _, lora = plain
    assert check_start(GraftArgs(lora=str(lora), lora_rank=4, resume="run")) == lora
    with pytest.raises(InputError, match="--lora_rank 4: comes from the file of --lora"):
        check_start(GraftArgs(lora=str(lora), lora_rank=4))


# ---------------------------------------------------------------- whole runs


def test_graft_starts_from_it(plain, tmp_path):
    """Updates too small to count leave the given LoRA; round 1 samples it, but with --reference base the base
    model, which stays the one without a LoRA."""
    argv, lora = plain
    flags = [*argv, *ONE.split(), "--lora", str(lora)]
    without, _ = finished([*argv, *ONE.split(), "--lr", "1e-12"], tmp_path / "without")
    same, out = finished([*flags, "--lr", "1e-12"], tmp_path / "same")
    base, _ = finished([*flags, "--reference", "base"], tmp_path / "base")
    assert f"LoRA       started from {lora}, rank 4, alpha 8: " in out
    assert "KL(accepted || model of the round)" in out
    assert column(same, "base") == column(without, "base") == column(base, "base")
    kept, given = load_file(tmp_path / "same" / LORA_FILE), load_file(lora / LORA_FILE)
    assert kept.keys() == given.keys() and all(torch.allclose(kept[n], given[n], atol=1e-9) for n in given)
    assert abs(column(same, "difference")["jpeg_compressibility"]) > 1e-3
    sampled = {r: read_metrics(tmp_path / r)[0]["reward_sampled"] for r in ("without", "same", "base")}
    assert sampled["without"] == sampled["base"] != sampled["same"]
    tuned = load_file(tmp_path / "base" / LORA_FILE)
    assert any(not torch.equal(tuned[n], given[n]) for n in given)


def test_pgraft_keeps_the_base(plain, tmp_path):
    """The LoRA belongs to the levels above the switch. Base model and probe know nothing of it."""
    argv, lora = plain
    flags = [*argv, *ONE.split(), *"--lr 1e-12 --probe_prompts 3 --probe_restarts 2".split()]
    without, _ = finished(flags, tmp_path / "without", "pgraft.py")
    same, out = finished([*flags, "--lora", str(lora)], tmp_path / "same", "pgraft.py")
    assert f"LoRA       started from {lora}, rank 4, alpha 8: " in out
    assert column(same, "base") == column(without, "base")
    probes = [(tmp_path / name / "probe.csv").read_text() for name in ("same", "without")]
    assert probes[0] == probes[1]
    # the tuned model is the LoRA above the switch and the base below it
    switch = json.loads((tmp_path / "same" / SWITCH_FILE).read_text())["switch"]
    both = {}
    for name, reference in (("newest", "newest"), ("base", "base")):
        run = [*flags, "--switch", f"{switch:.9g}", "--reference", reference, "--lora", str(lora)]
        both[name], _ = finished(run, tmp_path / name, "pgraft.py")
    assert column(both["newest"], "tuned") == column(same, "tuned") != column(same, "base")
    sampled = {
        r: read_metrics(tmp_path / r)[0]["reward_sampled"] for r in ("without", "same", "newest", "base")
    }
    assert sampled["base"] == sampled["without"] != sampled["same"] == sampled["newest"]


def test_a_switch_travels_with_its_lora(plain, tmp_path, monkeypatch):
    argv, lora = plain
    first = [*argv, *ONE.split(), "--switch", "0.3"]
    finished([*first, "--lora", str(lora)], tmp_path / "first", "pgraft.py")
    for given in (tmp_path / "first", tmp_path / "first" / LORA_FILE):
        second = tmp_path / f"second_{given.name}"
        _, out = finished([*argv, *ONE.split(), "--lora", str(given)], second, "pgraft.py")
        assert "recommended" not in out  # nothing is probed
        stored = [json.loads((f / SWITCH_FILE).read_text())["switch"] for f in (tmp_path / "first", second)]
        assert stored[0] == stored[1] and f"switch     {stored[0]:.9g};" in out
        monkeypatch.chdir(tmp_path)
        code, _, error = run_inside([*argv, "--lora", str(given)])
        assert_one_line(code, error, "is of pgraft.py, for the levels above its switch; go on with pgraft.py")
    lora, third = ["--lora", str(tmp_path / "first")], tmp_path / "third"
    finished([*argv, *ONE.split(), *lora, "--eta", "0"], third, "pgraft.py")  # needs no probe
    assert json.loads((third / SWITCH_FILE).read_text())["switch"] == stored[0]
    code, _, error = run_inside([*argv, *lora, "--steps", "1"], "pgraft.py")
    named = f"{tmp_path / 'first' / SWITCH_FILE}, switch {stored[0]:.9g}: with --steps 1 it must be at least"
    assert_one_line(code, error, named)


@pytest.mark.parametrize("script", ["graft.py", "pgraft.py"])
def test_killed_and_resumed(plain, tmp_path, script):
    argv, lora = plain
    flags = [*argv, "--rounds", "2", "--updates", "2", "--lora", str(lora), "--output", "run"]
    flags += ["--switch", "0.5"] if script == "pgraft.py" else []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert exit_code(flags, tmp_path / "whole", script=script) == 0
    killer = ("torch.nn.utils", "clip_grad_norm_", 3)
    assert exit_code(flags, tmp_path / "killed", killer, script) == -signal.SIGKILL
    assert exit_code(["--resume", "run"], tmp_path / "killed", script=script) == 0
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


def test_noise_ppo_takes_the_same_files(plain, tmp_path):
    """A file beside its switch is as its folder."""
    argv, lora = plain
    shutil.copytree(lora, tmp_path / "lora")
    stored = {"switch_timestep": 499, "sigma": 0.5, "model": "any"}
    (tmp_path / "lora" / SWITCH_FILE).write_text(json.dumps(stored))
    small = "--iterations 1 --prompts_per_iteration 3 --epochs 1 --eval_steps 4 --no-controls".split()
    results = []
    for given in (tmp_path / "lora", tmp_path / "lora" / LORA_FILE):
        flags = [*arguments_for(NoiseArgs, argv), *small, "--lora", str(given)]
        result, _ = finished(flags, tmp_path / f"run{len(results)}", "noise_ppo.py")
        assert (
            json.loads((tmp_path / f"run{len(results)}" / "args.json").read_text())["switch_timestep"] == 499
        )
        results.append(result | {"seconds": 0})
    assert results[0] == results[1]


@pytest.mark.drawn
def test_printed_code_makes_the_evaluated_image(plain, tmp_path, monkeypatch):
    """Of a LoRA with other ranks and alphas, tuned further: the stock pipeline makes the run's image."""
    argv, _ = plain
    made = with_lora(Model(argv[argv.index("--model") + 1], "cpu", torch.float32), "attention", 4, 4)
    randomise(made, 0.3)
    file = kohya(made, tmp_path)
    _, out = finished([*argv, *ONE.split(), "--lora", str(file)], tmp_path / "run")
    assert ", rank 4, alpha " in out or ", rank 2, alpha " in out
    monkeypatch.chdir(tmp_path)
    exec(out[out.index("import torch; from diffusers") :], {})
    grid = np.asarray(Image.open(tmp_path / "run" / "grid.png"))
    assert grid.std() > 0 and Image.open("tuned.png").size == (32, 32)
    model = Model(argv[argv.index("--model") + 1], "cpu", torch.float32)
    model.load_lora(str(file))
    trained = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["lora"]
    for name, parameter in model.lora().items():
        parameter.data.copy_(trained[name])
    noise = draw_noise([derived_seed("eval", 0, 0)], 4, model.latent_shape, model.dtype)
    with model.lora_merged():
        x_0 = sample(model, noise, model.encode(["a blue circle above a green square"]), 1.0, 1.0)
    assert_same_images([Image.open("tuned.png")], model.decode(x_0))
