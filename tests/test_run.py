"""Whole runs of graft.py on a tiny pipeline: what they write. A killed one continues as if nothing had
happened."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common import LORA_FILE, Model, derived_seed, draw_noise
from conftest import (
    assert_same_images,
    assert_same_run,
    environment,
    exit_code,
    read_metrics,
    read_scalars,
    run_inside,
    run_script,
)
from graft import sample
from rewards import jpeg_compressibility
from shapes.render import all_scenes, prompt_of
from utils import runs
from utils.figures import save_panels

ALL = ["--lora_targets", "all", "--save_accepted"]


# ---------------------------------------------------------------- one run, in a process of its own


@pytest.fixture(scope="module")
def finished(tiny_arguments, tmp_path_factory):
    """(folder, stdout) of a finished run."""
    cwd = tmp_path_factory.mktemp("finished")
    done = run_script([*tiny_arguments, *ALL, "--output", "run"], cwd)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in cwd.iterdir()] == ["run"]
    return cwd / "run", done.stdout


def test_run_prints_settings_rounds_and_table(finished):
    _, out = finished
    settings = ("model", "LoRA", "sampling", "acceptance", "update", "evaluation")
    assert all(re.search(rf"^  {word} ", out, re.M) for word in settings)
    assert len(re.findall(r"^  round \d/2 .*s left$", out, re.M)) == 2
    for metric in (
        "jpeg_compressibility",
        "shapes_graded",
        "brightness",
        "contrast",
        "saturation",
        "diversity",
    ):
        assert re.search(rf"^{metric} +-?\d.* [+-]\d", out, re.M), metric


def test_run_folder(finished, tiny_v):
    folder, _ = finished
    files = {"args.json", "metrics.csv", "results.json", "curves.png", "grid.png", "checkpoint.pt", LORA_FILE}
    assert {p.name for p in folder.iterdir()} == files | {"tensorboard", "accepted", "inputs.json", ".lock"}
    stored = json.loads((folder / "args.json").read_text())
    assert stored["model"] == tiny_v and stored["script"] == "graft"
    rows = read_metrics(folder)
    assert [r["round"] for r in rows] == ["1", "2"] and [r["acceptance_rate"] for r in rows] == [
        "0.25",
        "0.25",
    ]
    assert all(float(r["reward_accepted"]) > float(r["reward_sampled"]) for r in rows)
    for tag, points in read_scalars(folder).items():
        assert [step for step, _ in points] == [1, 2]
        assert [value for _, value in points] == pytest.approx(
            [float(r[tag]) for r in rows], rel=1e-5, nan_ok=True
        )
    table = json.loads((folder / "results.json").read_text())["table"]
    for row in table:
        assert row["difference"] == pytest.approx(row["tuned"] - row["base"], abs=1e-5)
    assert any(row["difference"] for row in table)
    for name in ("curves.png", "grid.png"):
        assert np.asarray(Image.open(folder / name)).std() > 0


def test_printed_code_makes_the_evaluated_image(finished, tiny_v, prompt_files, tmp_path):
    folder, out = finished
    code = out[out.index("import torch; from diffusers") :]
    assert len(code.strip().splitlines()) == 5
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, timeout=300)
    image = Image.open(tmp_path / "tuned.png")

    model = Model(tiny_v, "cpu", torch.float32)
    noise = draw_noise([derived_seed("eval", 0, 0)], 4, model.latent_shape, model.dtype)
    text = model.encode(Path(prompt_files.held_out).read_text().splitlines()[:1])
    base = model.decode(sample(model, noise, text, 1.0, 1.0))[0]
    model.add_lora(4, 16.0, "all", 0)
    trained = torch.load(folder / "checkpoint.pt", weights_only=True)["lora"]
    assert set(trained) == set(model.lora())
    for name, parameter in model.lora().items():
        parameter.data.copy_(trained[name])
    with model.lora_merged():
        tuned = model.decode(sample(model, noise, text, 1.0, 1.0))[0]
    assert_same_images([image], [tuned])
    assert np.abs(np.asarray(image, float) - np.asarray(base, float)).mean() > 1


def test_accepted_images(finished, prompt_files):
    folder, _ = finished
    lines = [json.loads(line) for line in (folder / "accepted" / "metadata.jsonl").read_text().splitlines()]
    names = sorted(p.name for p in (folder / "accepted").glob("*.png"))
    assert sorted(line["file_name"] for line in lines) == names and len(names) == 2 * 3
    prompts = Path(prompt_files.train).read_text().splitlines()
    for line in lines:
        assert line["text"] in prompts
        image = Image.open(folder / "accepted" / line["file_name"])
        assert line["reward"] == pytest.approx(jpeg_compressibility([image], [""]).item(), abs=2e-3)


def accepted_set(folder):
    """{file name: (line of metadata.jsonl, pixels)}"""
    lines = [json.loads(line) for line in (folder / "accepted" / "metadata.jsonl").read_text().splitlines()]
    assert {line["file_name"] for line in lines} == {p.name for p in (folder / "accepted").glob("*.png")}
    return {
        line["file_name"]: (line, np.asarray(Image.open(folder / "accepted" / line["file_name"]), float))
        for line in lines
    }


def test_imagefolder_is_read_by_datasets(finished):
    datasets = pytest.importorskip("datasets")
    folder, _ = finished
    accepted = accepted_set(folder)
    loaded = datasets.load_dataset(
        "imagefolder",
        data_dir=str(folder / "accepted"),
        split="train",
        cache_dir=str(folder.parent / "cache"),
    )
    assert len(loaded) == len(accepted) and set(loaded.column_names) == {"image", "text", "reward"}
    assert sorted(loaded["text"]) == sorted(line["text"] for line, _ in accepted.values())


def test_lora_of_the_diffusers_trainer_is_loaded(tiny_v, tmp_path):
    """As examples/text_to_image/train_text_to_image_lora.py of diffusers makes and saves it."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    trained, ours = (Model(tiny_v, "cpu", torch.float32) for _ in range(2))
    layers = ["to_k", "to_q", "to_v", "to_out.0"]
    trained.denoiser.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=layers)
    )
    for parameter in trained.lora().values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.denoiser))
    StableDiffusionPipeline.save_lora_weights(
        save_directory=tmp_path, unet_lora_layers=state, safe_serialization=True
    )
    ours.load_lora(str(tmp_path))
    assert trained.lora().keys() == ours.lora().keys() and len(ours.lora()) > 8
    for name, parameter in trained.lora().items():
        assert torch.equal(ours.lora()[name], parameter)


# ---------------------------------------------------------------- killed and resumed


@pytest.fixture(scope="module")
def uninterrupted(tiny_arguments, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("uninterrupted")
    assert exit_code([*tiny_arguments, *ALL, "--output", "run"], cwd) == 0, (cwd / "output.txt").read_text()
    return cwd / "run"


def test_same_arguments_same_run(finished, uninterrupted):
    assert_same_run(finished[0], uninterrupted)


KILLERS = [
    [("utils.runs", "save_checkpoint", 1)],  # sampled, nothing saved
    [("torch.nn.utils", "clip_grad_norm_", 1)],  # first checkpoint written, no update made
    [("torch.nn.utils", "clip_grad_norm_", 2)],  # between two updates
    [("utils.runs", "save_checkpoint", 2)],  # round 1 ended, not saved
    [("rewards", "jpeg_kilobytes", 45)],  # round 1 saved, round 2 sampling
    [("torch.nn.utils", "clip_grad_norm_", 4)],  # last update
    [("utils.runs", "save_checkpoint", 4)],  # everything made, round 2 not saved
    [
        ("rewards", "jpeg_kilobytes", 9),
        ("torch.nn.utils", "clip_grad_norm_", 1),
        ("utils.runs", "save_checkpoint", 1),
    ],
]


@pytest.mark.parametrize("killers", KILLERS, ids=lambda k: "+".join(f"{name}{n}" for _, name, n in k))
def test_killed_and_resumed(tiny_arguments, uninterrupted, tmp_path, killers):
    argv = [*tiny_arguments, *ALL, "--output", "run"]
    for killer in killers:
        assert exit_code(argv, tmp_path, killer) == -signal.SIGKILL
        argv = ["--resume", "run"]
    assert exit_code(argv, tmp_path) == 0, (tmp_path / "output.txt").read_text()
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("n", (1, 4))
def test_every_file_is_replaced_not_overwritten(tiny_arguments, tmp_path, n):
    """Killed in the middle of the n-th write, a run keeps every older file intact."""

    def files():
        load_file(tmp_path / "run" / LORA_FILE)  # its bytes may differ, the metadata is in no fixed order
        return {
            p.name: p.read_bytes()
            for p in (tmp_path / "run").iterdir()
            if p.is_file() and p.name != LORA_FILE
        }

    killer = ("utils.runs", "save_checkpoint", 4)
    assert exit_code([*tiny_arguments, "--output", "run"], tmp_path, killer) == -signal.SIGKILL
    before = files()
    assert exit_code(["--resume", "run"], tmp_path, ("os", "fsync", n)) == -signal.SIGKILL
    after = files()
    assert before == {name: after[name] for name in before}
    assert [name for name in after if name not in before and name.endswith(".part")]


def test_resume_of_a_finished_run(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert exit_code(["--resume", "run"], tmp_path) == 0
    assert_same_run(tmp_path / "run", uninterrupted)
    assert "import torch; from diffusers" in (tmp_path / "output.txt").read_text()


def test_tensorboard_shows_every_row(tmp_path, monkeypatch):
    """However fast they come, and after a resume those that were logged before it was stored."""
    monkeypatch.setattr(runs, "WRITERS", [])
    rows = [{"value": float(step)} for step in range(1, 31)]
    for stop in (20, 30):
        for step in range(max(1, stop - 12), stop + 1):
            runs.log_metrics(tmp_path, rows[:step], step, float(step))
        runs.WRITERS.pop().close()  # as the next run does
    assert read_scalars(tmp_path) == {"value": [(step, float(step)) for step in range(8, 31)]}


# ---------------------------------------------------------------- rules and flags


def rows_of(argv, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = folder / f"run{len(list(folder.iterdir()))}"
    code, _, error = run_inside([*argv, "--output", str(run)])
    assert code == 0, error
    return read_metrics(run)


RULES = {  # arguments -> least and greatest share accepted
    "--rule topk --top_k 3 --gradient_checkpointing": (0.75, 0.75),
    "--rule preference --dtype bfloat16 --guidance 3": (0.5, 0.5),
    "--rule exponential --beta 0.05 --eta 0": (0.25, 0.99),
    "--rule threshold --threshold -0.001": None,
    "--rule threshold --threshold -1e9 --eval_every 0": (1, 1),
    "--rule none --sample_batch 5": (1, 1),
}


@pytest.mark.parametrize("flags", RULES)
def test_rules(tiny_arguments, tmp_path, monkeypatch, flags):
    argv = [*tiny_arguments, *flags.split(), "--rounds", "1"]
    if RULES[flags]:
        (row,) = rows_of(argv, tmp_path, monkeypatch)
        assert RULES[flags][0] <= float(row["acceptance_rate"]) <= RULES[flags][1]
    else:
        monkeypatch.chdir(tmp_path)
        code, _, error = run_inside(argv)
        assert code == 2 and "accepted nothing" in error


def test_flags_change_what_they_say(tiny_arguments, tmp_path, monkeypatch):
    def rows(flags):
        return rows_of([*tiny_arguments, *flags.split()], tmp_path, monkeypatch)

    plain, base = rows(""), rows("--reference base --no-accumulate")
    assert [r["images_trained_on"] for r in plain] == ["3", "6"]
    assert [r["images_trained_on"] for r in base] == ["3", "3"]
    again = rows("--reference base --lr 0.5 --prompt_dropout 0.9")
    assert [r["reward_sampled"] for r in again] == [r["reward_sampled"] for r in base]
    assert plain[0]["reward_sampled"] == base[0]["reward_sampled"]
    assert plain[1]["reward_sampled"] != base[1]["reward_sampled"]
    assert again[0]["loss"] != base[0]["loss"]
    guided, conditional = rows("--rounds 1 --guidance 3"), rows("--rounds 1 --guidance 3 --no-guided_loss")
    assert guided[0]["reward_sampled"] == conditional[0]["reward_sampled"] != plain[0]["reward_sampled"]
    assert guided[0]["loss"] != conditional[0]["loss"]
    assert rows("--rounds 1 --seed 1")[0]["reward_sampled"] != plain[0]["reward_sampled"]
    assert float(rows("--micro_batch 4")[1]["loss"]) == pytest.approx(float(plain[1]["loss"]), rel=1e-3)


def test_flat_groups(tiny_arguments, tmp_path, monkeypatch):
    """Groups of equal rewards are counted and skipped."""
    (tmp_path / "own.py").write_text(
        "def flat(images, prompts):\n    return [1.0] * len(images)\n\n\n"
        "def almost_flat(images, prompts):\n    return [2.0, *flat(images[1:], prompts)]\n"
    )
    argv = [*tiny_arguments, *"--rounds 1 --sample_batch 64 --reward".split()]
    (row,) = rows_of([*argv, f"0.5*{tmp_path / 'own.py'}:almost_flat"], tmp_path, monkeypatch)
    measured = [float(row[name]) for name in ("flat_groups", "acceptance_rate", "reward_sampled")]
    assert measured == pytest.approx([2 / 3, 1 / 12, 0.5 * 13 / 12]) and float(row["reward_accepted"]) == 1
    preference = [*argv, f"{tmp_path / 'own.py'}:almost_flat", "--rule", "preference"]
    (row,) = rows_of(preference, tmp_path, monkeypatch)  # there a group is a pair
    assert float(row["flat_groups"]) == pytest.approx(5 / 6)
    code, _, error = run_inside([*argv, f"{tmp_path / 'own.py'}:flat"])
    assert code == 2 and "accepted nothing" in error and "100%" in error


def test_without_held_out_prompts_every_tenth_is_held_out(tiny_arguments, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("\n".join(prompt_of(*s) for s in all_scenes()[:20]))
    monkeypatch.chdir(tmp_path)
    argv = [
        *tiny_arguments,
        "--prompts",
        "prompts.txt",
        "--eval_prompts",
        "",
        "--rounds",
        "1",
        "--prompts_per_round",
        "99",
    ]
    code, out, error = run_inside(argv)
    assert code == 0, error
    assert "2 held-out prompts" in out and "1 rounds x 18 prompts" in out


@pytest.mark.drawn
def test_line_of_nan_only_is_left_out(tmp_path):
    """Such as the explained variance of a reward that never varies."""
    lines = {"nan": ([1, 2], [float("nan")] * 2), "one": ([1, 2], [0.0, 1.0])}
    save_panels(tmp_path / "panels.png", [("round", "", lines)])
    assert np.asarray(Image.open(tmp_path / "panels.png").convert("L")).std() > 0


def test_a_checkpoint_of_other_arguments(tmp_path):
    (tmp_path / "args.json").write_text('{"lr": 1}')
    runs.save_checkpoint(tmp_path, {"round": 2})
    assert runs.load_checkpoint(tmp_path) == {"round": 2}
    (tmp_path / "args.json").write_text('{"lr": 2}')
    with pytest.raises(runs.InputError, match="checkpoint.pt was made with another args.json; put that back"):
        runs.load_checkpoint(tmp_path)


def test_the_scaler_is_restored(tmp_path):
    """With float16 its scale has fallen to one that suits the model."""
    (tmp_path / "args.json").write_text("{}")
    parameter = torch.nn.Parameter(torch.ones(2))
    model, optimizer = SimpleNamespace(lora=lambda: {"p": parameter}), torch.optim.SGD([parameter])
    args = SimpleNamespace(resume="", rounds=1, eval_every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # sets the scale
    _, save = runs.restore(args, tmp_path, model, optimizer, scaler)
    save()
    args.resume, scaler = str(tmp_path), torch.amp.GradScaler("cpu", init_scale=1024.0)
    parameter.data += 1
    runs.restore(args, tmp_path, model, optimizer, scaler)
    assert scaler.get_scale() == 8 and parameter.tolist() == [1, 1]


def test_what_an_interrupted_run_is_told(tmp_path, monkeypatch):
    """How to go on, if there is something to go on with."""
    monkeypatch.setattr(runs, "LOCKS", [])
    assert runs.last_words(KeyboardInterrupt())[0] == "\ninterrupted. Nothing was written."
    runs.LOCKS.append(SimpleNamespace(lock_file=str(tmp_path / runs.LOCK_FILE)))
    assert runs.last_words(KeyboardInterrupt())[0] == "\ninterrupted. Nothing was written."
    (tmp_path / "args.json").write_text("{}")
    text, code = runs.last_words(KeyboardInterrupt())
    assert text.endswith(f" --resume {tmp_path}") and "Continue with: python " in text and code == 130
