"""Bad input ends with exit code 2 and a message that names it and the fix, before the model loads, and leaves
nothing on disk."""

import ast
import dataclasses
import json
import math
import os
import resource
import shutil
import time
import typing
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import transformers

import common
import graft
import inverse_noise_correction
import noise_ppo
import pgraft
from common import LORA_FILE, check_flow, check_model, read_switch
from conftest import ROOT, assert_one_line, run_inside, run_script
from fashion.images import FOLDER
from utils.prompts import read_prompt_sets, read_prompts
from utils.runs import InputError, has_type, hash_inputs, stored_arguments

SD = '{"_class_name": "StableDiffusionPipeline"}'
EULER = '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
UNET = '{"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1}'
RESULTS = ("no_json", "not_json", "number", "no_level", "text", "infinite")  # folders of P-GRAFT's results
FILES = {
    # prompts
    "train.txt": b"a red circle left of a blue square\na green square above a red circle\n",
    "held_out.txt": b"a blue circle above a green square\na red circle above a red square\n",
    "empty.txt": b"",
    "blank.txt": b"\n  \n\t\n",
    "one.txt": b"a red circle left of a blue square\n",
    "other.txt": b"a photo of a cat\na photo of a dog\n",
    "latin.txt": "a red circle\na café\n".encode("latin-1"),
    "utf16.txt": "a red circle\n".encode("utf-16"),
    "words.csv": b"id,words\n1,a red circle\n",
    "words.tsv": b"id\twords\n1\ta red circle\n",
    "header.csv": b"prompt\n",
    "long.csv": b'prompt\n"' + b"x" * 200_000 + b'"\n',  # more than the csv module takes
    "broken.jsonl": b'{"prompt": "a red circle"}\n\n{"prompt": \n',
    "list.jsonl": b"[1]\n",
    "number.jsonl": b'{"prompt": "a red circle"}\n{"prompt": 3}\n',
    "change.jsonl": b'{"text": "a red circle"}\n{"caption": "a red circle"}\n',
    "prompts.xlsx": b"a red circle\n",
    "folder.txt/something": b"",
    # rewards
    "raises.py": b"raise RuntimeError('two\\nlines')\n",
    # models
    "model/unet/config.json": b'{"in_channels": 4, "out_channels": 4}',
    "model/model_index.json": SD.encode(),
    "no_pipeline/config.json": b"{}",
    "pixart/model_index.json": b'{"_class_name": "PixArtSigmaPipeline"}',
    "damaged/model_index.json": b"{",
    "list/model_index.json": b"[]",
    "unnamed/model_index.json": b"{}",
    "half/unet/config.json": b"{",
    "conditional/unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
    "ddpm/unet/config.json": UNET.encode(),
    "ddpm/scheduler/scheduler_config.json": b'{"_class_name": "DDPMScheduler"}',
    "alone/unet/config.json": UNET.encode(),
    "dynamic/unet/config.json": UNET.encode(),
    "dynamic/scheduler/scheduler_config.json": EULER.replace("}", ', "use_dynamic_shifting": true}').encode(),
    "rising/unet/config.json": UNET.encode(),
    "rising/scheduler/scheduler_config.json": EULER.replace("}", ', "invert_sigmas": true}').encode(),
    "random/unet/config.json": UNET.encode(),
    "random/scheduler/scheduler_config.json": EULER.replace("}", ', "stochastic_sampling": true}').encode(),
    "classes/unet/config.json": UNET.replace("}", ', "num_class_embeds": 10}').encode(),
    "classes/scheduler/scheduler_config.json": EULER.encode(),
    "four/unet/config.json": UNET.replace("8", "4").encode(),
    "four/scheduler/scheduler_config.json": EULER.encode(),
    "large/unet/config.json": UNET.replace("8", "128").encode(),
    "large/scheduler/scheduler_config.json": EULER.encode(),
    "few/image.png": b"",
    # runs
    "full/something.txt": b"",
    "a_run/args.json": b"{}",
    "run_damaged/args.json": b'{"seed": 3',
    "run_list/args.json": b"[]",
    "run_bytes/args.json": b"\xff\xfe\x00",
    "run_other/args.json": b'{"no_such_setting": 3}',
    "run_type/args.json": b'{"seed": "many"}',
    "run_choice/args.json": b'{"device": "tpu"}',
    "run_folder/args.json/something": b"",
    "run_model/args.json": b'{"model": "no/such/folder"}',
    # results of P-GRAFT, with a LoRA that is never looked into
    "no_lora/pgraft.json": b'{"switch_timestep": 499, "sigma": 0.5}',
    **{f"{name}/{LORA_FILE}": b"" for name in RESULTS},
    "not_json/pgraft.json": b"{",
    "number/pgraft.json": b"[499, 0.5]",
    "no_level/pgraft.json": b'{"sigma": 0.5}',
    "text/pgraft.json": b'{"switch_timestep": "high", "sigma": 0.5}',
    "infinite/pgraft.json": b'{"switch_timestep": Infinity, "sigma": 0.5}',
}
SCRIPTS = {
    "graft": graft,
    "pgraft": pgraft,
    "noise_ppo": noise_ppo,
    "inverse_noise_correction": inverse_noise_correction,
}
ALL = " ".join(SCRIPTS)
TEXT = "graft pgraft noise_ppo"  # they take prompts and a reward
TUNE = "graft pgraft"  # they tune a LoRA
PROMPTS = "--prompts @/train.txt --eval_prompts @/held_out.txt"
GOOD = {script: f"{PROMPTS} --model @/model --reward jpeg_compressibility" for script in TEXT.split()}
GOOD["inverse_noise_correction"] = "--images 20 --eval_images 20 --no-longer"

# In the tables: scripts -> {arguments, added to the GOOD ones: what the message must contain, parts separated
# by |}. @ is the folder of FILES, % that of late_files, $ the script.
UNREADABLE = [  # tyro says so
    (
        ALL,
        {
            "--seedz 3": "Unrecognized options: --seedz | Perhaps you meant | --seed INT",
            "hello": "Unrecognized options: hello | --help",
            "--seed": "Missing value for argument '--seed' | --help",
            "--lr much": "Error parsing --lr | 'much' | --help",
            "--device tpu": "invalid choice 'tpu' for argument '--device' | 'auto', 'cpu', 'cuda' | --help",
        },
    ),
    (
        TUNE,
        {
            "--accumulate no": "Unrecognized options: no | --help",
            "--rule best": "invalid choice 'best' | 'topk', 'preference'",
        },
    ),
    ("noise_ppo", {"--eval_steps 4 x": "--eval_steps | x", "--eval_steps 4,5": "--eval_steps | '4,5'"}),
    ("inverse_noise_correction", {"--features beauty": "invalid choice 'beauty' | 'fashion', 'pixels'"}),
]
EARLY = [  # found before anything is loaded
    (
        ALL,
        {
            "--lr 0": "--lr 0.0: must be between 1e-12 and 1",
            "--device cuda": "--device cuda: no CUDA device found; use --device cpu",
            "--output @/full": "--output | full: exists and is not a run; give a new folder",
            "--output @/empty.txt": "--output | empty.txt | give a new folder",
            "--output @/empty.txt/run": "--output | empty.txt | give a new folder",
            "--output @/a_run": "--output | a_run: holds a run already; continue it with --resume",
            "--model @/missing": "--model | missing: no such folder",
            "--model=": "--model | folder",
        },
    ),
    (
        TEXT,
        {
            "--prompts @/missing.txt": "--prompts | missing.txt: no such file; give",
            "--eval_prompts @/one.txt": "--eval_prompts | one.txt: too few to hold out two for evaluation",
            "--prompts @/other.txt --reward shapes_strict": "--prompts | choose another --reward",
            "--eval_prompts @/other.txt --eval_rewards shapes_fit": "--eval_prompts | --eval_rewards",
            "--dtype float16 --device cpu": "--dtype float16 needs a CUDA device; on the CPU use --dtype",
            "--reward beauty": "--reward beauty: no reward 'beauty'; take shapes_strict",
            "--reward @/raises.py:f": "--reward | raises.py does not load (RuntimeError: two lines)",
            "--eval_rewards jpeg_incompressibility,beauty": "--eval_rewards beauty: no reward 'beauty'; take",
            "--reward clip(@/missing)": "clip( | missing' is neither a folder nor a hub id owner/name",
            # names before models
            "--reward clip(@/full) --eval_rewards beauty": "--eval_rewards beauty: no reward 'beauty'",
            "--reward clip(@/full)": "clip( | full cannot be loaded | is given as 'clip(folder or hub id)'",
            "--eval_rewards jpeg_compressibility,0.5*vqa(@/full)": "--eval_rewards 0.5*vqa( | given as 'vqa(",
            "--reward_device cuda": "--reward_device cuda: no CUDA device found; use --reward_device cpu",
            "--reward_device cpu --reward_dtype float16": "--reward_dtype float16 needs a CUDA device",
            "--model @/pixart": "--model | pixart: is a PixArtSigmaPipeline; supported: StableDiffusion",
            "--height 100": "--height 100: must be a multiple of 8 for SD 1 and 2",
            "--model_config @/full": "--model_config @/full: is for a single file as --model, not for",
            "--model nobody/nothing": "--model nobody/nothing: cannot be loaded",  # offline
        },
    ),
    (
        TUNE,
        {
            "--samples 4 --top_k 5": "--top_k 5: must be between 1 and 4",
            "--rule none --top_k 2": "--top_k 2: works only with --rule topk, not none",
            "--threshold 0.5": "--threshold 0.5: works only with --rule threshold, not topk; leave",
            "--rule threshold --threshold 1 --beta 0.1": "--beta 0.1: works only with --rule exponential",
            "--rule preference --reward_max 1": "--reward_max 1.0: works only with --rule exponential",
            "--rule threshold": "--rule threshold needs --threshold, the least reward",
            "--rule threshold --threshold nan": "--threshold nan: must be a finite number",
            "--rule exponential": "--rule exponential needs --beta above 0",
            "--rule exponential --beta -1": "--rule exponential needs --beta above 0",
            "--rule exponential --beta nan": "--beta nan: must be a finite number",
            "--rule exponential --beta inf": "--beta inf: must be a finite number",
            "--rule exponential --beta 1 --reward_max nan": "--reward_max nan: must be a finite number",
            "--rule preference --samples 3": "--samples 3: must be even for --rule preference",
            "--micro_batch 3": "--micro_batch 3: must divide --batch 64",
        },
    ),
    (
        "pgraft",
        {
            **{
                f"--switch={level}": f"--switch {level}: must be auto or a level t / T"
                for level in ("0", "1", "1.5", "-0.2", "nan", "noisy", "")
            },
            "--eta 0": "--eta 0: | deterministic sampler; give --eta above 0 or a --switch",
            "--eta 0 --probe --switch 0.5": "--eta 0: | give --eta above 0",
            "--probe --steps 1": "--steps 1: no level lies between noise and image; give at least 2",
        },
    ),
    (
        "noise_ppo",
        {
            "--lora @/no_lora": f"--lora @/no_lora: has no {LORA_FILE}; give the folder of a finished",
            "--lora @/not_json": "not_json/pgraft.json: is damaged; give --switch_timestep",
            "--switch_timestep 200": "--switch_timestep 200: is of a LoRA; give --lora",
            "--mean_only --std_only": "--mean_only --std_only: nothing is left to learn; give --no-mean_only",
            "--eval_steps 0": "--eval_steps 0: must be between 1 and 999",
            "--eval_steps 4 1000": "--eval_steps | 1000: must be between 1 and 999",
        },
    ),
    (
        "inverse_noise_correction",
        {
            "--model @/full": "--model | full: no such folder, or neither unet/ nor transformer/ in it",
            "--model @/four": "--data | fashion: its images are (1, 16, 16), the model's (1, 4, 4); give",
            "--data @/missing": "--data | missing: no such folder",
            "--data @/one.txt": "--data | one.txt: no such folder",
            "--data @/few": "--data | few: 1 images are too few, 20 to invert and 20 as reference are needed",
            "--model @/four --data @/few --features fashion": "--features fashion: | (1, 16, 16) only",
            "--features inception": "--features inception: needs the package torch-fidelity | or use pixels",
            "--model @/large --corrector_network unet:4 --normalise gaussian": "--normalise gaussian: 16384 "
            "numbers | take scale",
            "--eval_steps 0": "--eval_steps 0: must be between 1 and 10000",
            "--eval_corrector_steps 2 0": "--eval_corrector_steps 0: must be between 1 and 10000",
            "--corrector_network 8,8": "--corrector_network 8,8: give unet: or token: and numbers",
            "--corrector_network unet:5": "--corrector_network unet:5: give unet: or token: and numbers",
            "--corrector_network unet:": "--corrector_network unet:: give unet: or token: and numbers",
            "--corrector_network token:99999999": "token:99999999: give | numbers from 4 to 4096",
            "--corrector_network unet:4,4,4,4,4,4": "unet:4,4,4,4,4,4: 6 levels need a size that 32",
            "--corrector_network token:8,4": "--corrector_network token:8,4: | have one width, as in",
        },
    ),
    (  # in place of the GOOD arguments
        ALL,
        {
            "--resume @/missing": "--resume | missing: no run there (no args.json); give the folder that the",
            "--resume @/run_damaged": "run_damaged: args.json is damaged or of another script",
            "--resume @/run_model": "--model no/such/folder: no such folder",
            "--resume @/a_run --seed 7": "--seed 7 differs from the run in | a_run (0): leave it out",
            "--resume @/a_run --output elsewhere": "--output elsewhere differs from | leave it out",
            **{
                f"--resume @/run_of_{script}": "--resume | args.json is damaged or of another script"
                for script in SCRIPTS
            },
        },
    ),
]
LATE = [  # found when the model has been loaded
    (
        ALL,
        {
            "--output /proc/run": "--output /proc/run: cannot be written | give another folder",
            "--resume %/cut_$": "--resume | checkpoint.pt is damaged | start a new run",
        },
    ),
    ("graft", {f"--resume %/{damage}_$": "checkpoint.pt is damaged" for damage in ("text", "no_bytes")}),
    (TEXT, {"--model %/cut_unet": "--model | cut_unet: cannot be loaded"}),
    (
        "graft",
        {
            f"--model %/{name}": f"--model | {name}: cannot be loaded"
            for name in ("cut_vae", "no_text_encoder")
        },
    ),
    (
        TUNE,
        {
            "--lora_targets to_z": "--lora_targets to_z: the model has no linear or convolution layer 'to_z'",
            "--lora_targets=": "--lora_targets | the model has no linear or convolution layer ''",
            "--steps 999": "--steps 999: must be below the model's 1000 training steps | divide them",
        },
    ),
    (
        "pgraft",
        {
            "--switch 0.01 --steps 10": "with --steps 10 it must be at least 0.099 and below 0.999",
            "--switch 0.0989 --steps 10": "--switch 0.0989: with --steps 10 it must be at least 0.099",
            "--switch 0.9999 --steps 10": "--switch 0.9999: with --steps 10 it must be | below 0.999",
            "--switch 0.999 --steps 10": "--switch 0.999: with --steps 10 it must be | below 0.999",
            "--switch 0.5 --steps 1": "--switch 0.5: with --steps 1 it must be",
        },
    ),
    (
        "noise_ppo",
        {
            "--steps 3": "--steps 3: must divide the model's 1000 training steps",
            "--eval_steps 4 30": "--eval_steps 30: must divide the model's 1000 training steps",
            "--lora %/cut_lora": f"cut_lora/{LORA_FILE}: cannot be loaded",
        },
    ),
    ("inverse_noise_correction", {"--model %/cut_flow": "--model | cut_flow: cannot be loaded"}),
]


def rows(table):
    """(script, arguments, words) of a table, without resuming a script's own run."""
    every = (
        (s, given, words)
        for scripts, lines in table
        for given, words in lines.items()
        for s in scripts.split()
    )
    return [row for row in every if not row[1].endswith(f"run_of_{row[0]}")]


IN_A_PROCESS = [
    row
    for row in rows(EARLY) + rows(LATE)
    if row[:2]
    in {
        ("graft", "--lora_targets to_z"),
        ("pgraft", "--lr 0"),
        ("noise_ppo", "--prompts @/missing.txt"),
        ("inverse_noise_correction", "--data @/missing"),
    }
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, script in SCRIPTS.items():
        (folder / f"run_of_{name}").mkdir()
        stored = {"script": name} | dataclasses.asdict(script.Args())
        (folder / f"run_of_{name}" / "args.json").write_text(json.dumps(stored))
    return folder


@pytest.fixture(scope="module")
def late_files(files, tiny_v, tmp_path_factory):
    folder = tmp_path_factory.mktemp("late_files")
    shutil.copytree(tiny_v, folder / "cut_unet")
    shutil.copytree(tiny_v, folder / "cut_vae")
    shutil.copytree(tiny_v, folder / "no_text_encoder", ignore=shutil.ignore_patterns("text_encoder"))
    shutil.copytree(ROOT / "fashion", folder / "cut_flow")
    weights = "diffusion_pytorch_model.safetensors"
    for name in (f"cut_unet/unet/{weights}", "cut_vae/vae/config.json", f"cut_flow/unet/{weights}"):
        os.truncate(folder / name, 500)
    for name, level in {
        "too_large": 1000,
        "far": 12345,
        "negative": -1,
        "other_level": 499,
        "cut_lora": 499,
    }.items():
        (folder / name).mkdir()
        stored = {"switch_timestep": level, "sigma": 0.5, "model": "other/model"}
        (folder / name / "pgraft.json").write_text(json.dumps(stored))
        (folder / name / LORA_FILE).write_bytes(safetensors.torch.save({"unet.lora": torch.zeros(100)})[:-10])
    torch.save({"round": 1, "rows": [{"loss": 1.0}] * 100}, folder / "checkpoint.pt")
    checkpoint = (folder / "checkpoint.pt").read_bytes()
    for script in SCRIPTS:
        stored, inputs = {"images": 20, "eval_images": 20, "longer": False}, [FOLDER]
        if script in TEXT.split():
            stored = {"prompts": str(files / "train.txt"), "eval_prompts": str(files / "held_out.txt")}
            stored |= {"model": tiny_v, "reward": "jpeg_compressibility"}
            inputs = [stored[name] for name in ("model", "prompts", "eval_prompts")]
        cut = checkpoint[: len(checkpoint) // 2]
        for damage, content in {"cut": cut, "text": b"hello", "no_bytes": b""}.items():
            run = folder / f"{damage}_{script}"
            run.mkdir()
            (run / "args.json").write_text(json.dumps(stored | {"device": "cpu"}))
            (run / "inputs.json").write_text(json.dumps(hash_inputs(inputs)))
            (run / "checkpoint.pt").write_bytes(content)
    return folder


def arguments_of(script, given, files, late_files="", model=""):
    """The script's good arguments and the bad ones."""
    good = "" if given.startswith("--resume") else GOOD[script]
    good += f" --model {model}" if model and script in TEXT.split() and good else ""
    text = f"{good} {given}".replace("@", str(files)).replace("%", str(late_files)).replace("$", script)
    return text.split()


def assert_refused(code, error, words, seconds, files):
    """Exit code 2 and one line with the words, in less than ten seconds of the processor, and no new file."""
    parts = [part.strip() for part in words.replace("@", str(files)).split("|")]
    assert_one_line(code, error, parts[0])
    assert all(part in error for part in parts), error
    assert seconds < 10 and not list(Path.cwd().iterdir())


def paths(*folders):
    return [
        sorted(p for p in Path(folder).rglob("*") if "__pycache__" not in p.parts and p.name != ".lock")
        for folder in folders
    ]


def instead_of_loading(monkeypatch, action):
    kinds = (diffusers.DiffusionPipeline, diffusers.ModelMixin, diffusers.SchedulerMixin)
    for kind in (*kinds, transformers.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", action)


# ---------------------------------------------------------------- the scripts


@pytest.mark.parametrize("script, given, words", rows(UNREADABLE))
def test_unreadable_arguments(script, given, words, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside(arguments_of(script, given, files), f"{script}.py")
    message = " ".join(error.replace("\u2502", " ").split())  # without the sides of the box
    assert code == 2 and all(part.strip() in message for part in words.split("|")), message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script, given, words", rows(EARLY))
def test_found_before_the_model_loads(script, given, words, files, tmp_path, monkeypatch):
    if "device cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    instead_of_loading(monkeypatch, lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    before, start = paths(files), time.process_time()
    code, _, error = run_inside(arguments_of(script, given, files), f"{script}.py")
    assert_refused(code, error, words, time.process_time() - start, files)
    assert paths(files) == before


@pytest.mark.parametrize("script, given, words", rows(LATE))
def test_found_when_the_model_is_loaded(
    script, given, words, files, late_files, tiny_v, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before, start = paths(files, late_files), time.process_time()
    code, _, error = run_inside(arguments_of(script, given, files, late_files, tiny_v), f"{script}.py")
    assert_refused(code, error, words, time.process_time() - start, files)
    assert paths(files, late_files) == before


@pytest.mark.parametrize("script, given, words", IN_A_PROCESS)
def test_in_a_process_of_its_own(script, given, words, files, late_files, tiny_v, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script(arguments_of(script, given, files, late_files, tiny_v), tmp_path, f"{script}.py")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert_refused(done.returncode, done.stderr, words, seconds, files)
    assert not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_rows_are_bad_for_their_own_reason(script, files, tmp_path, monkeypatch):
    """The arguments to which they are added are good."""

    class Reached(BaseException):
        pass

    def loading(*_, **__):
        raise Reached

    instead_of_loading(monkeypatch, loading)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Reached):
        run_inside(arguments_of(script, "", files), f"{script}.py")


def test_out_of_memory_is_one_line(files, tiny_v, tmp_path, monkeypatch):
    """torch's own error on the CPU, MemoryError, and no other RuntimeError."""
    monkeypatch.chdir(tmp_path)
    small = f"--model {tiny_v} --steps 2 --rounds 1 --samples 2 --rule none --eval_samples 2 --output"

    def run(action):
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", action)
        folder = len(list(Path.cwd().iterdir()))
        return run_inside(arguments_of("graft", f"{small} {folder}", files), "graft.py")

    for action in (lambda *_: torch.empty(2**60), lambda *_: bytearray(2**62)):
        code, _, error = run(action)
        assert_one_line(code, error.split("\r")[-1].lstrip(), "out of memory (")
        assert "lower the batch sizes" in error
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(lambda *_: torch.zeros(2) + torch.zeros(3))


def test_a_folder_that_must_not_be_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, who may run the tests, is refused nothing
    monkeypatch.chdir(tmp_path)
    for given in ("--output new/run", ""):
        code, _, error = run_inside(arguments_of("graft", given, files), "graft.py")
        assert_one_line(code, error, f"{tmp_path} is no folder that can be written to; give a new folder")


@pytest.mark.parametrize("body", ["[0.0]", "[float('nan')] * len(images)"])
def test_reward_that_returns_nonsense(body, tiny_arguments, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(f"def score(images, prompts):\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, "--reward", "own.py:score"])
    assert_one_line(code, error.split("\r")[-1], "own.py:score")  # what follows the progress bar


# ---------------------------------------------------------------- ranges


def ranges(script):
    """{setting: (least, most)} of the calls of check_range in the script's Args, with its defaults."""
    tree = ast.parse((ROOT / f"{script}.py").read_text())
    (args_class,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    calls = [
        n for n in ast.walk(args_class) if isinstance(n, ast.Call) and ast.unparse(n.func) == "check_range"
    ]
    names = {"self": SCRIPTS[script].Args()}
    bounds = [[eval(ast.unparse(argument), names) for argument in call.args[1:]] for call in calls]
    return {name: (least, most) for name, least, most in bounds}


RANGES = [(script, *setting) for script in SCRIPTS for setting in ranges(script).items()]


def number_types(script):
    """{setting: int or float} of the settings that are numbers, or None."""
    kinds = {}
    for name, hint in typing.get_type_hints(SCRIPTS[script].Args).items():
        for kind in (int, float):
            if hint == kind or hint == kind | None:
                kinds[name] = kind
    return kinds


@pytest.mark.parametrize("script, name, bounds", RANGES)
def test_range(script, name, bounds):
    args_class, (least, most) = SCRIPTS[script].Args, bounds
    assert least < most
    if number_types(script)[name] is float:
        outside = [
            math.nextafter(least, -math.inf),
            math.nextafter(most, math.inf),
            -math.inf,
            math.inf,
            math.nan,
        ]
    else:
        outside = [least - 1, most + 1]
    for value in outside:
        with pytest.raises(InputError) as error:
            args_class(**{name: value})
        assert str(error.value) == f"--{name} {value}: must be between {least} and {most}"
    for value in bounds:  # may be refused for another reason only
        try:
            assert getattr(args_class(**{name: value}), name) == value
        except InputError as error:
            assert "must be between" not in str(error)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_has_a_range(script):
    of_rules = {"threshold", "beta", "reward_max"} if script in TUNE.split() else set()  # see check_rule
    assert number_types(script).keys() == ranges(script).keys() | of_rules


# ---------------------------------------------------------------- files, by the functions that read them


def refused(words, function, *given):
    """The function raises an InputError that contains the words, parts separated by |."""
    with pytest.raises(InputError) as error:
        function(*given)
    assert all(part.strip() in str(error.value) for part in words.split("|")), str(error.value)


PROMPT_FILES = {
    "folder.txt": "folder.txt: no such file; give",
    "folder": "folder: give a .txt file",
    "": "give a .txt file",
    "a.red.circle": "a.red.circle: give a .txt file",
    "prompts.xlsx": "prompts.xlsx: give a .txt file",
    "empty.txt": "empty.txt: holds no prompt; write",
    "blank.txt": "blank.txt: holds no prompt; write",
    "latin.txt": "latin.txt: line 2 is not UTF-8; save the file as UTF-8",
    "utf16.txt": "utf16.txt: line 1 is not UTF-8; save the file as UTF-8",
    "words.csv": "words.csv: no column 'prompt' in | which has id, words; choose one as words.csv:column",
    "words.tsv": "words.tsv: no column 'prompt' in | which has id, words; choose one as words.tsv:column",
    "words.csv:Words": "words.csv:Words: no column 'Words' | choose one as words.csv:column",
    "missing.csv:words": "missing.csv:words: no such file; give",
    "one.txt:words": "one.txt:words: give a .txt file",
    "header.csv": "header.csv: holds no prompt; write",
    "long.csv": "long.csv: the row on line 2 is no proper .csv row (field larger than field limit",
    "broken.jsonl": 'broken.jsonl: line 3 is not {"prompt": "..."}',
    "list.jsonl": 'list.jsonl: line 1 is not {"prompt": "..."}',
    "number.jsonl": 'number.jsonl: line 2 is not {"prompt": "..."}',
    "change.jsonl": 'change.jsonl: line 2 is not {"text": "..."}',
    "change.jsonl:prompt": 'change.jsonl:prompt: line 1 is not {"prompt": "..."}',
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_bad_prompt_files(name, files):
    refused(f"--eval_prompts | {PROMPT_FILES[name]}", read_prompts, f"{files}/{name}", "--eval_prompts")


def test_too_few_prompts(files):
    advice = "one.txt: too few to hold out two for evaluation; add more or give --eval_prompts"
    refused(f"--prompts | {advice}", read_prompt_sets, f"{files}/one.txt", "")


PIPELINES = {
    "one.txt": "one.txt: no such folder, no .safetensors file and no hub id",
    "no_pipeline": "cannot be loaded | No such file | model_index.json | give the folder or hub id",
    "unnamed": "unnamed: is a None; supported: StableDiffusionPipeline",
    "damaged": "damaged: cannot be loaded (Expecting property name | give the folder or hub id of a pipeline",
    "list": "list: cannot be loaded | give the folder or hub id of a pipeline",
}
FLOWS = {
    "list": "list: no such folder, or neither unet/ nor transformer/ in it",
    "half": "half: unet/config.json is missing or damaged",
    "alone": "alone: scheduler/scheduler_config.json is missing or damaged",
    "conditional": "is a UNet2DConditionModel; supported: UNet2DModel",
    "ddpm": "is a DDPMScheduler; supported: FlowMatchEulerDiscreteScheduler",
    "dynamic": "a scheduler with use_dynamic_shifting is not supported",
    "rising": "a scheduler with invert_sigmas is not supported",
    "random": "a scheduler with stochastic_sampling is not supported",
    "classes": "only unconditional models are supported",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_bad_pipelines(name, files):
    refused(f"--model | {PIPELINES[name]}", check_model, f"{files}/{name}")


def test_a_flow_is_no_pipeline():
    refused("--model | fashion: cannot be loaded | model_index.json", check_model, f"{ROOT}/fashion")


@pytest.mark.parametrize("name", FLOWS)
def test_bad_flows(name, files):
    refused(f"--model | {FLOWS[name]}", check_flow, f"{files}/{name}")


@pytest.mark.parametrize("name", ["full", "one.txt", "run_folder"])
def test_no_run(name, files):
    words = f"--resume | {name}: no run there (no args.json); give the folder that the run printed"
    refused(words, stored_arguments, graft.Args, f"{files}/{name}")


@pytest.mark.parametrize("name", ["damaged", "list", "bytes", "other", "type", "choice"])
def test_bad_stored_arguments(name, files):
    words = f"--resume | run_{name}: args.json is damaged or of another script | start a new run"
    for script in SCRIPTS.values():
        refused(words, stored_arguments, script.Args, f"{files}/run_{name}")


@pytest.mark.parametrize(
    "value, kind, suits",
    [
        ((8, 16), tuple[int, ...], True),
        ((8, "x"), tuple[int, ...], False),
        ((), tuple[int, ...], True),
        (1, float, True),
        (1.5, int, False),
        ("a", str, True),
        (None, float | None, True),
        (2, float | None, True),
        ("2", float | None, False),
    ],
)
def test_types_of_stored_arguments(value, kind, suits):
    assert has_type(value, kind) == suits


def test_bad_results_of_pgraft(files, late_files, models):
    advice = "give the folder of a finished pgraft.py run, or the level with --switch"
    refused(f"no_json/pgraft.json: does not exist; {advice}", read_switch, files / "no_json", advice[-23:])
    for name in RESULTS[1:]:
        words = f"{name}/pgraft.json: is damaged; give the level with --switch"
        refused(words, read_switch, files / name, "the level with --switch")
    for name in ("too_large", "far", "negative", "other_level"):
        words = f"{name}/pgraft.json does not fit the model: | give --model other/model"
        refused(words, read_switch, late_files / name, "another", models["v"])


# ---------------------------------------------------------------- good files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_read_prompts(tmp_path, mark):
    expected = ["a red, round circle", "a café \u2028 below"]
    texts = {
        "good.txt": "a red, round circle  \r\n\r\na café \u2028 below",
        "good.csv": 'id,prompt\n1,"a red, round circle"\n2,\n3,a café \u2028 below\n4\n',
        "good.jsonl": "\n".join(json.dumps({"id": 1, "prompt": p}, ensure_ascii=False) for p in expected)
        + "\n\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(mark + text.encode())
        assert read_prompts(str(tmp_path / name), "--prompts") == expected, name


GENEVAL = """{"tag": "single", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"}
"""
PARTI = """Prompt\tCategory\tChallenge\tNote
bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings
"G I G G L E" painted in thick colorful lettering as graffiti.\tIllustrations\tWriting & Symbols\t
"so it begins\tIllustrations\tWriting & Symbols\tLongest word: "a lung disease"
42\tAbstract\tBasic\tSimple numbers
"""
DRAWBENCH = """Prompts,Category
A red colored car.,Colors
"One cat and two dogs, sitting on the grass.",Counting
"A sign that says ""Deep
Learning"".",Text
"""
PUBLISHED = {
    "evaluation_metadata.jsonl": (GENEVAL, ["a photo of a bench", "a photo of a red car"]),
    "PartiPrompts.tsv": (
        PARTI,
        ["bond", '"G I G G L E" painted in thick colorful lettering as graffiti.', '"so it begins', "42"],
    ),
    "drawbench.csv": (
        DRAWBENCH,
        [
            "A red colored car.",
            "One cat and two dogs, sitting on the grass.",
            'A sign that says "Deep Learning".',
        ],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_published_prompt_files(tmp_path, name, ends):
    """Files in the layout of GenEval, PartiPrompts and DrawBench."""
    text, expected = PUBLISHED[name]
    (tmp_path / name).write_bytes(text.replace("\n", ends).encode())
    assert read_prompts(str(tmp_path / name), "--prompts") == expected


def test_column_of_prompts(tmp_path):
    for kind, between in ((".csv", ","), (".tsv", "\t")):
        for columns, chosen in (
            ("Text,caption,id", "caption"),
            ("id,TEXT", "TEXT"),
            ("caption,Prompts, Prompt ", " Prompt "),
            ("prompt,Prompt", "prompt"),
        ):
            file, names = tmp_path / f"file{kind}", columns.split(",")
            rows = [between.join(names), between.join(f"in {name}" for name in names)]
            file.write_text("\n".join(rows) + "\n")
            assert read_prompts(str(file), "--prompts") == [f"in {chosen}".strip()]
            for name in names:  # chosen by its exact name
                assert read_prompts(f"{file}:{name}", "--prompts") == [f"in {name}".strip()]
    line = json.dumps({"file_name": "a.png", "text": "in text", "Other": "in Other"})
    (tmp_path / "metadata.jsonl").write_text(line + "\n")  # as --save_accepted writes it
    assert read_prompts(str(tmp_path / "metadata.jsonl"), "--prompts") == ["in text"]
    assert read_prompts(f"{tmp_path / 'metadata.jsonl'}:Other", "--prompts") == ["in Other"]
    (tmp_path / "a:b.csv").write_text("prompt\nin a:b\n")
    assert read_prompts(str(tmp_path / "a:b.csv"), "--prompts") == ["in a:b"]


@pytest.mark.parametrize("script", ["graft.py", "pgraft.py", "noise_ppo.py"])
def test_overlap_of_prompts(script, tiny_arguments, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def model(*_):
        raise Reached

    monkeypatch.setattr(common, "Model", model)
    (tmp_path / "train.txt").write_text(
        "a red circle left of a blue square\nA blue square below a RED square\n"
    )
    argv, printed = (
        [*tiny_arguments[: tiny_arguments.index("--rounds")], "--prompts", str(tmp_path / "train.txt")],
        [],
    )
    monkeypatch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
    for held_out, warned in (
        (["a red circle left of a green square", "a red square above a red circle"], None),
        (["a red square above a red circle", "a blue square BELOW a red square"], "1 of the 2"),
    ):
        (tmp_path / "held_out.txt").write_text("\n".join(held_out))
        with pytest.raises(Reached):
            run_inside([*argv, "--eval_prompts", str(tmp_path / "held_out.txt")], script)
        assert len(printed) == bool(warned)
    assert printed[0].startswith("warning: 1 of the 2 held-out prompts") and held_out[1] in printed[0]
