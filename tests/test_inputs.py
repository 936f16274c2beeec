"""What users bring, and the machine they run on: nothing goes wrong in silence.

Inputs belong to a run; its device does not. Tables of prompts, prompts that are too long, images of every
kind, texts in figures, errors in drawing, terminals, paths with spaces, Ctrl-C, older versions of Python.
"""

import ast
import dataclasses
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import utils.figures
from common import LORA_FILE, Model, check_device
from conftest import PROMPTS, ROOT, arguments_for, assert_one_line, environment, run_inside
from graft import Args as GraftArgs
from inverse_noise_correction import find_enough_images
from noise_ppo import Args as NoiseArgs
from pgraft import shaped_target
from utils import runs
from utils.figures import plain, save_grid
from utils.images import read_images
from utils.prompts import read_prompts
from utils.runs import InputError, check_inputs, check_output, hash_inputs

SCRIPTS = ("graft.py", "pgraft.py", "noise_ppo.py", "inverse_noise_correction.py")
TEXT = SCRIPTS[:3]  # they take prompts


def save_images(folder, count=60, suffix="png", size=(8, 8)):
    """Random grey images, to be read as a data set."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(folder / f"{i:03d}.{suffix}")


@pytest.fixture
def arguments(tiny_v, tmp_path, monkeypatch):
    """{script: arguments of a tiny run in tmp_path}, with inputs of its own, which a test may change."""
    monkeypatch.chdir(tmp_path)
    Path("train.txt").write_text("\n".join([*PROMPTS, "a red square right of a red circle"]) + "\n")
    Path("held_out.csv").write_text("prompt,tag\na blue circle above a green square,x\na red circle,y\n")
    Path("own.py").write_text(
        "from rewards import jpeg_compressibility\n\n\ndef score(images, prompts):\n"
        "    return jpeg_compressibility(images, prompts)\n"
    )
    save_images(Path("data"))
    text = (
        f"--model {tiny_v} --prompts train.txt --eval_prompts held_out.csv:prompt --reward own.py:score "
        "--eval_rewards jpeg_compressibility --eval_samples 2 --samples 2 --guidance 1 --steps 4 --device cpu"
    )
    tune = f"{text} --rounds 1 --prompts_per_round 2 --updates 1 --batch 2 --micro_batch 2 --lora_rank 2"
    noise = "--iterations 1 --prompts_per_iteration 2 --minibatch 4 --eval_steps 4 --no-controls"
    return {
        "graft.py": tune.split(),
        "pgraft.py": f"{tune} --switch 0.5".split(),
        "noise_ppo.py": f"{text} {noise}".split(),
        "inverse_noise_correction.py": (
            "--data data --images 20 --sample_batch 20 --eval_images 20 --updates 2 --checkpoint_every 1 "
            "--batch 8 --max_failed 1 --memory 4 --eval_corrector_steps 3 --no-longer --device cpu"
        ).split(),
    }


class Reached(BaseException):
    pass


def instead_of_loading(monkeypatch, action):
    kinds = (diffusers.DiffusionPipeline, diffusers.ModelMixin, transformers.PreTrainedModel)
    for kind in kinds:
        monkeypatch.setattr(kind, "from_pretrained", action)


def begin(argv, script, monkeypatch):
    """A run in the folder `run` that was stopped when it had begun."""
    make = runs.make_run_folder

    def make_and_stop(*args, **options):
        make(*args, **options)
        raise InputError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "make_run_folder", make_and_stop)
        code, _, error = run_inside([*argv, "--output", "run"], script)
    assert code == 2 and "error: stopped" in error, error


# ---------------------------------------------------------------- inputs belong to a run


def append(path):
    return lambda: Path(path).write_text(Path(path).read_text() + "\n")


CHANGES = {  # what happens to the inputs of a run: (what the line says, how)
    "a prompt is put in": (
        "train.txt was changed",
        lambda: Path("train.txt").write_text("a red circle\n" + Path("train.txt").read_text()),
    ),
    "no prompts are left": ("train.txt was changed", lambda: Path("train.txt").write_text("")),
    "the prompts are gone": ("train.txt was removed", lambda: Path("train.txt").unlink()),
    "a tag changes": (
        "held_out.csv was changed",
        lambda: Path("held_out.csv").write_text(Path("held_out.csv").read_text().replace(",x", ",z")),
    ),
    "the reward changes": ("own.py was changed", append("own.py")),
    "an image changes": ("data/007.png was changed", lambda: Image.new("L", (8, 8)).save("data/007.png")),
    "an image is added": ("data/new.png was added", lambda: Image.new("L", (8, 8)).save("data/new.png")),
    "an image is removed": ("data/059.png was removed", lambda: Path("data/059.png").unlink()),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_changed_inputs_is_not_resumed(script, arguments, monkeypatch):
    """It says so before anything is loaded; with the old inputs the run goes on."""
    begin(arguments[script], script, monkeypatch)
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}

    def loading(*_, **__):
        raise Reached

    instead_of_loading(monkeypatch, loading)
    of_images = script.startswith("inverse")
    changes = [change for change in CHANGES.values() if change[0].startswith("data") == of_images]
    assert len(changes) == (3 if of_images else 5)
    for said, change in changes:
        files = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file() and p.parts[0] != "run"}
        change()
        code, _, error = run_inside(["--resume", "run"], script)
        assert_one_line(code, error, f"--resume run: {said} after the run began; put that back, or start a")
        for path in [p for p in Path("data").iterdir() if p not in files]:
            path.unlink()
        for path, content in files.items():
            path.write_bytes(content)
        with pytest.raises(Reached):
            run_inside(["--resume", "run"], script)
    assert before == {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file()}


def test_what_belongs_to_the_inputs(arguments, tiny_v, clip_folder, monkeypatch):
    """All files of the model, the default prompts, a local checkpoint of a reward, the LoRA below a policy;
    nothing of the run itself."""
    argv = [*arguments["graft.py"], "--eval_rewards", f"clip({clip_folder})"]
    begin(argv, "graft.py", monkeypatch)
    names = set(json.loads(Path("run/inputs.json").read_text()))
    weights = {f"{tiny_v}/{part}/config.json" for part in ("unet", "vae", "text_encoder")}
    weights |= {f"{tiny_v}/unet/diffusion_pytorch_model.safetensors", f"{tiny_v}/model_index.json"}
    assert names >= weights | {"train.txt", "held_out.csv", "own.py", f"{clip_folder}/config.json"}
    assert not any(name.startswith("run/") for name in names)
    Path("lora").mkdir()
    for name in (LORA_FILE, "pgraft.json"):
        Path("lora", name).write_text('{"switch_timestep": 499, "sigma": 0.5}')
    monkeypatch.setattr(runs, "hash_inputs", lambda files: {str(name): "" for name in files})
    instead_of_loading(monkeypatch, lambda *_, **__: pytest.fail("reads what it should not"))
    import noise_ppo

    inputs = noise_ppo.prepare(NoiseArgs(lora="lora"))[4]
    shapes = {str(ROOT / "shapes" / f"prompts_{name}.txt") for name in ("train", "eval")}
    assert set(inputs) - {""} == {common.EMBEDDED, *shapes, f"lora/{LORA_FILE}", "lora/pgraft.json"}


def test_hashes_of_inputs(tmp_path, monkeypatch):
    """Size and beginning of every file count; of a folder the files of a model, not those of runs in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("model/model_index.json", "model/unet/a.safetensors", "model/notes.md", "model/.hidden"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"0123456789" * 10)
    for name in ("model/run/args.json", "model/run/results.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    monkeypatch.setattr(runs, "HASHED_BYTES", 50)
    first = hash_inputs(["model", "", "model/notes.md"])
    assert set(first) == {"model/model_index.json", "model/unet/a.safetensors", "model/notes.md"}
    large = Path("model/unet/a.safetensors")
    begin = b"0123456789" * 5
    for content, same in ((b"0" * 100, False), (begin + b"x" * 50, True), (begin + b"x" * 51, False)):
        large.write_bytes(content)
        assert (hash_inputs(["model", "model/notes.md"]) == first) is same
    # a model of the hub is known by its commit
    cached = "/cache/models--owner--name/snapshots/0123abcd/model_index.json"
    monkeypatch.setattr(runs.hub, "try_to_load_from_cache", lambda *_: cached)
    assert hash_inputs(["owner/name"]) == {"owner/name": "0123abcd"}
    monkeypatch.setattr(runs.hub, "try_to_load_from_cache", lambda *_: None)
    assert hash_inputs(["owner/name"]) == {}


def test_changed_inputs_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(name).write_text(name)
    Path("inputs.json").write_text(json.dumps(check_inputs("", ["a", "b", "c"])))
    assert check_inputs(".", ["a", "b", "c"]) == hash_inputs(["a", "b", "c"])
    for name in "bc":
        Path(name).write_text("changed")
    with pytest.raises(InputError, match=r"--resume \.: b \(and 1 more\) was changed after the run began"):
        check_inputs(".", ["a", "b", "c"])
    for damaged in ("{", "[1]", "null"):
        Path("inputs.json").write_text(damaged)
        with pytest.raises(InputError, match="inputs.json is damaged"):
            check_inputs(".", ["a"])


def test_an_older_run_is_resumed_with_one_line(arguments, monkeypatch):
    """It has no inputs.json; from then on it has one."""
    begin(arguments["graft.py"], "graft.py", monkeypatch)
    hashes = Path("run/inputs.json").read_bytes()
    Path("run/inputs.json").unlink()
    code, _, error = run_inside(["--resume", "run"])
    lines = [line for line in error.split("\n") if "warning" in line]
    assert code == 0 and len(lines) == 1, error
    assert lines[0].startswith("warning: --resume run: has no inputs.json, as older runs")
    assert Path("run/inputs.json").read_bytes() == hashes
    append("train.txt")()
    code, _, error = run_inside(["--resume", "run"])
    assert_one_line(code, error, "train.txt was changed after the run began")


# ---------------------------------------------------------------- the device does not


def begun_on(device, folder="run"):
    """Change the stored run as if it had begun on another device."""
    path = Path(folder) / "args.json"
    text = path.read_text().replace('"device": "cpu"', f'"device": "{device}"')
    path.write_text(text)
    state = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)
    torch.save(state | {"args": text}, Path(folder) / "checkpoint.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_run_goes_on_on_the_device_there_is(arguments, monkeypatch):
    code, _, error = run_inside([*arguments["graft.py"], "--output", "run"])
    assert code == 0, error
    results = json.loads(Path("run/results.json").read_text())["table"]
    begun_on("cuda")
    line = "--device: the run in run began on cuda and goes on on {}"
    for given, there in (([], "the device there is"), (["--device", "cpu"], "cpu")):
        code, out, error = run_inside(["--resume", "run", *given])
        assert code == 0 and [text for text in out.split("\n") if "began on" in text] == [line.format(there)]
        assert "on cpu" in out and json.loads(Path("run/results.json").read_text())["table"] == results
    for given, words in (("--device cuda", "no CUDA device found"), ("--seed 3", "--seed 3 differs from")):
        code, _, error = run_inside(["--resume", "run", *given.split()])
        assert_one_line(code, error, words)
    monkeypatch.setattr(runs, "has_device", lambda name: True)
    args = runs.parse_arguments(GraftArgs, ["--resume", "run"])
    assert args.device == "cuda"  # where there is one, the run stays on it


@pytest.mark.parametrize("there, chosen", [((), "cpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda")])
def test_devices(there, chosen, monkeypatch):
    for name in ("cuda", "mps"):
        backend = {"cuda": torch.cuda, "mps": torch.backends.mps}[name]
        monkeypatch.setattr(backend, "is_available", lambda name=name: name in there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int("cuda" in there))
    assert check_device("auto", "float32") == chosen
    for name in ("cuda", "mps"):
        if name in there:
            assert check_device(name, "bfloat16") == name
        else:
            with pytest.raises(InputError, match=f"--device {name}: no {name.upper()} device found; use"):
                check_device(name, "float32")
    if chosen != "cuda":
        with pytest.raises(InputError, match="--dtype float16 needs a CUDA device; on (the CPU|MPS) use"):
            check_device("auto", "float16")


class NoFloat64(TorchDispatchMode):
    """MPS has no float64. Here its tensors are of FakeTensorMode, which has no values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.device.type == "mps":
                assert value.dtype != torch.float64, f"{function} makes float64 on MPS"
        return result


def test_no_float64_on_mps(models):
    model = models["v"]
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        t = torch.ones(2, device="mps")
        with pytest.raises(AssertionError, match="makes float64"):
            t.double()
        for kind in ("flow", "epsilon", "v_prediction"):
            x_t, target, weight = shaped_target(t, t, 0.9, 0.1, t, t, kind)
            assert {v.device.type for v in (x_t, target, weight)} == {"mps"}
        alpha, sigma = model.alpha_sigma(t)
        assert alpha.device.type == sigma.device.type == "mps" and alpha.dtype == torch.float32


# ---------------------------------------------------------------- prompts


TABLES = {  # file: (content, what the line says)
    "a.csv": ("prompt\na red circle\na green square, shiny, above\nblue\n", "line 3 has 3 fields, the first"),
    "b.csv": ('n,prompt\n\n1,"two\nlines"\n2,one, two\n', "line 5 has 3 fields, the first line has 2; if"),
    "c.csv": ("prompt\na red circle,\n", "line 2 has 2 fields, the first line has 1; if commas are part"),
    "d.tsv": ("prompt\tn\na\tb\tc\n", "line 2 has 3 fields, the first line has 2; if tabs are part of a"),
    "e.csv": ('prompt\na red circle\n"a green square\na blue\n', "the row on line 3 is no proper .csv row"),
    "f.csv": ('prompt\n"a green\na blue\n"red"\nnext\n', "the row on line 2 is no proper .csv row"),
    "g.csv": ('prompt\na\n"a sign "stop" here"\n', "the row on line 3 is no proper .csv row"),
    "h.csv": ('"prompt\na\nb\n', "the row on line 1 is no proper .csv row"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_in_which_prompts_would_be_cut_or_joined(name, tmp_path):
    content, said = TABLES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        read_prompts(f"{tmp_path / name}", "--prompts")
    assert said in str(error.value) and "or give a .txt file" in str(error.value)
    cure = "take them out" if name == "d.tsv" else "in quotation marks" if "fields" in said else "close its"
    assert cure in str(error.value)


def test_the_cures_of_such_tables_work(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n"a green square, shiny"\n"a sign ""stop"" here"\n"two\nlines"\n')
    expected = ["a green square, shiny", 'a sign "stop" here', "two lines"]
    assert read_prompts(str(tmp_path / "a.csv"), "--prompts") == expected
    (tmp_path / "b.csv").write_text('n,prompt\n1,a "red" circle\n\n2\n')
    assert read_prompts(str(tmp_path / "b.csv"), "--prompts") == ['a "red" circle']


LONG = "a red circle left of a blue square above a green square below a red circle"


@pytest.mark.parametrize("script", TEXT)
def test_prompts_that_are_cut_are_counted(script, arguments, monkeypatch):
    Path("train.txt").write_text("\n".join([*PROMPTS, f"{LONG} one", f"{LONG} two"]))
    monkeypatch.setattr(Model, "remember", lambda self, prompts: ([""] == prompts) or stop())

    def stop():
        raise Reached

    monkeypatch.setattr(Model, "encode", lambda self, prompts: None)
    argv = [*arguments[script], *arguments_for(GraftArgs, ["--prompts_per_round", "9"])]
    if script == "noise_ppo.py":
        argv = [*arguments[script], "--prompts_per_iteration", "9"]
        monkeypatch.setattr("noise_ppo.NoisePolicy", None)
    errors = []
    monkeypatch.setattr("builtins.print", lambda *text, **_: errors.append(" ".join(map(str, text))))
    with pytest.raises(Reached):
        run_inside(argv, script)
    (line,) = [text for text in errors if "warning" in text]
    assert line == (
        "warning: 2 of the 7 prompts are longer than the 12 tokens that the text encoder reads; the rest of "
        f"each is cut off. The first: {LONG + ' one'!r}"
    )


def test_the_encoder_that_reads_most_counts(families, models, capsys):
    """SD 3's third text encoder reads 256 tokens; without it the others' limit holds, 12 here. FLUX reads
    512, FLUX.1 schnell 256."""
    with_t5, without = (Model(families["sd3"], "cpu", torch.float32, t5) for t5 in (True, False))
    dev, schnell, klein = (
        Model(families[name], "cpu", torch.float32) for name in ("flux", "schnell", "klein")
    )
    longer = " ".join([LONG] * 20)
    for model, prompts, said in (
        (models["epsilon"], PROMPTS, None),
        (models["epsilon"], ["red " * 10], None),  # with start and end just 12
        (models["epsilon"], ["red " * 11], "1 of the 1 prompts are longer than the 12 tokens"),
        (models["epsilon"], [*PROMPTS, LONG], "1 of the 4 prompts are longer than the 12 tokens"),
        (Model(families["xl"], "cpu", torch.float32), [LONG], "1 of the 1 prompts are longer than the 12"),
        (without, [LONG, longer], "2 of the 2 prompts are longer than the 12 tokens"),
        (with_t5, [LONG], None),
        (with_t5, [LONG, longer], "1 of the 2 prompts are longer than the 256 tokens"),
        (with_t5, [], None),
        (dev, [LONG, longer], None),
        (schnell, [LONG, longer], "1 of the 2 prompts are longer than the 256 tokens"),
        (klein, [LONG], None),  # its tokenizer here knows single letters
        (klein, [LONG, longer], "1 of the 2 prompts are longer than the 512 tokens"),
    ):
        model.warn_of_cut(prompts)
        error = capsys.readouterr().err
        assert (said in error and error.count("\n") == 1) if said else not error


# ---------------------------------------------------------------- images


def png_of_16_bits(path, levels, kind):
    """Write levels (height, width, channels) as a PNG of 16 bits. kind: PNG's number for its channels."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width, _ = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def of_16_bits(folder):
    """Half grey of 16 bits: PNG, grey and in colour, and TIFF."""
    levels = np.full((8, 8, 4), 32896, np.uint16)  # 128 of 255
    png_of_16_bits(folder / "grey.png", levels[..., :1], 0)
    png_of_16_bits(folder / "colour.png", levels[..., :3], 2)
    Image.fromarray(levels[..., 0]).save(folder / "grey.tif")
    return [128 / 127.5 - 1] * 3


def transparent(folder):
    """Black pixels that nobody sees, in front of white; half transparent ones; a colour of a palette."""
    clear, half = np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 4), np.uint8)
    half[..., 3] = 51
    for name, pixels, mode in (
        ("rgba", clear, "RGBA"),
        ("la", clear[..., ::2], "LA"),
        ("half", half, "RGBA"),
    ):
        Image.fromarray(np.ascontiguousarray(pixels), mode).save(folder / f"{name}.png")
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(folder / "palette.gif", transparency=0)
    Image.new("RGB", (8, 8), "red").save(folder / "red.png", transparency=(255, 0, 0))
    levels = np.zeros((8, 8, 4), np.uint16)
    png_of_16_bits(folder / "sixteen.png", levels, 6)
    return [204 / 127.5 - 1 if name == "half" else 1.0 for name in sorted(p.stem for p in folder.iterdir())]


def animated(folder):
    """The first of several images; also an ordinary TIFF."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    for name in ("several.gif", "several.tif", "several.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:], lossless=True)
    frames[0].save(folder / "one.tiff")
    return [1.0] * 4


@pytest.mark.parametrize("kind", [of_16_bits, transparent, animated])
def test_images_are_read_as_they_look(kind, tmp_path):
    expected = kind(tmp_path)
    files = sorted(tmp_path.iterdir(), key=lambda file: file.stem)
    for channels in (1, 3):
        images = read_images(files, (channels, 8, 8))
        assert images.shape == (len(expected), channels, 8, 8)
        for file, image, value in zip(files, images, expected, strict=True):
            assert (image - value).abs().max() < 0.01, file.name


def test_levels_of_16_bits_are_kept_apart(tmp_path):
    levels = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "ramp.png")
    (image,) = read_images([tmp_path / "ramp.png"], (1, 8, 8))
    assert np.allclose(image[0].numpy(), levels / 32767.5 - 1, atol=0.005)
    for dtype in (np.int32, np.float32):
        Image.fromarray(levels.astype(dtype)).save(tmp_path / "ramp.tif")
        with pytest.raises(InputError, match="ramp.tif: cannot be read .pixels of 32 bits.*8 or 16 bits"):
            read_images([tmp_path / "ramp.tif"], (1, 8, 8))


def test_images_are_turned_as_exif_says(tmp_path):
    """A camera stores how it was held: 6 is a quarter to the right, and so on."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4, :4] = 255  # white above on the left
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}
    for orientation, (row, column) in corner.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for name in ("image.png", "image.tif", "image.webp"):
            Image.fromarray(pixels).save(tmp_path / name, exif=exif, lossless=True)
            (image,) = read_images([tmp_path / name], (1, 8, 8))
            bright = image[0].unflatten(0, (2, 4)).unflatten(2, (2, 4)).mean((1, 3)) > 0  # (2, 2)
            assert bright.nonzero().tolist() == [[row, column]], (name, orientation)


def test_files_that_are_passed_over_are_counted(tmp_path, capsys):
    """Hidden files and what a run has written are no images of the data, and not worth a word."""
    save_images(tmp_path / "all", 10)
    for suffix in ("JPG", "tif", "tiff", "gif", "webp", "bmp"):
        save_images(tmp_path / "all" / suffix, 10, suffix)
    assert len(find_enough_images(str(tmp_path / "all"), 0.5)) == 70
    assert capsys.readouterr().err == ""
    for name in ("a.heic", "b.HEIC", "metadata.jsonl", "notes"):
        (tmp_path / "all" / name).write_text("")
    (tmp_path / "all" / "._000.png").write_text("")  # macOS writes such files beside images
    save_images(tmp_path / "all" / ".ipynb_checkpoints", 1)
    save_images(tmp_path / "all" / "runs" / "one" / "accepted", 1)
    (tmp_path / "all" / "runs" / "one" / "args.json").write_text("{}")
    assert len(find_enough_images(str(tmp_path / "all"), 0.5)) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "all: 4 files are passed over (2 .heic, 1 .jsonl, 1 without ending); read are .png .jpg .jpeg .webp "
        ".bmp .gif .tif .tiff"
    )
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.heic").write_text("")
    with pytest.raises(
        InputError, match=r"0 images are too few.*; 1 files are passed over \(1 .heic\); read"
    ):
        find_enough_images(str(tmp_path / "few"), 0.5)
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- figures


def drawn(text, **options):
    figure = Figure()
    figure.text(0.1, 0.5, text, **options)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=60)
    return np.asarray(Image.open(buffer))


@pytest.mark.parametrize(
    "text", ["a $red$ circle", "$$", "1 $", r"\$ and $x_1$", "$x^2_", "{}%s \\frac", "an \\ and $\\frac$"]
)
def test_text_in_figures_is_text(text):
    assert np.array_equal(drawn(plain(text)), drawn(text, parse_math=False))
    assert np.array_equal(drawn(plain("x" * 1000)), drawn("x" * 149 + "…"))


def test_figures_of_odd_prompts(tmp_path, recwarn):
    prompts = ["a price tag of $$", "a $red$ circle", "$", "x" * 100_000, "猫と犬", "\x07"]
    images = [Image.new("RGB", (8, 8), "red")] * 12
    save_grid(tmp_path / "grid.png", images, images, prompts, 2)
    assert Image.open(tmp_path / "grid.png").width < 4000 and not recwarn.list


def test_a_figure_that_cannot_be_drawn(tmp_path, capsys):
    save_grid(tmp_path / "grid.png", ["no image"] * 2, ["no image"] * 2, ["a"], 2)
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path}/grid.png was not drawn (")
    with pytest.raises(FileNotFoundError):  # an error of the disk
        save_grid(tmp_path / "none" / "grid.png", *[[Image.new("L", (8, 8))] * 2] * 2, ["a"], 2)


FIGURES = {  # script: figures, what must be on the disk before the first of a round is drawn
    "graft.py": ({"grid.png", "curves.png"}, {LORA_FILE, "metrics.csv"}),
    "pgraft.py": ({"grid.png", "curves.png"}, {LORA_FILE, "metrics.csv", "pgraft.json"}),
    "noise_ppo.py": (
        {"grid.png", "gain.png", "curves.png"},
        {"policy.safetensors", "metrics.csv", "results.json"},
    ),
    "inverse_noise_correction.py": (
        {"curve.png", "noise.png", "grid.png"},
        {"corrector", "metrics.csv", "results.json"},
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_drawing_never_loses_a_round(script, arguments, monkeypatch):
    """Weights and metrics are stored before figures; if none can be drawn the run ends all the same."""
    figures, stored = FIGURES[script]
    there, kept = [], utils.figures.Figure.savefig

    def savefig(*args, **options):
        there.append({path.name for path in Path("run").iterdir()})
        if broken:
            raise ValueError("ParseException:\nexpected end of text")
        kept(*args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    broken = True
    code, out, error = run_inside([*arguments[script], "--output", "run"], script)
    assert code == 0 and "To use" in out, error
    lines = [line.split("\r")[-1] for line in error.split("\n") if "warning" in line]
    reason = "was not drawn (ValueError: ParseException: expected end of text); the run goes on without it"
    assert sorted(lines) == sorted(f"warning: run/{name} {reason}" for name in figures)
    assert there and all(files >= stored and not files & figures for files in there)
    assert {path.name for path in Path("run").iterdir()} >= stored | {"checkpoint.pt", "results.json"}
    if script in ("noise_ppo.py", "inverse_noise_correction.py"):  # there a resume draws again
        broken = False
        code, _, error = run_inside(["--resume", "run"], script)
        assert code == 0 and {path.name for path in Path("run").iterdir()} >= figures, error


# ---------------------------------------------------------------- terminals, paths, Ctrl-C, Python


def python(code, **environ):
    """A process of Python that runs `code` in the project."""
    options = {"env": environment() | environ, "capture_output": True, "timeout": 300}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, **options)


SCRIPT = """
import atexit, dataclasses, os, signal, sys, time
from utils.runs import InputError, run_script
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have it ignored

@dataclasses.dataclass
class Args:
    resume: str = ""

def main(args):
    {main}

run_script(main, Args)
"""


def test_a_terminal_that_cannot_print_a_character():
    done = python(
        SCRIPT.format(main="print('± é', repr('猫')); raise InputError('±')"), PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 2 and done.stdout == b"\\xb1 \\xe9 '\\u732b'\n"
    assert done.stderr == b"error: \\xb1\n"


def test_a_second_interrupt_is_quiet():
    """It comes while the program ends."""
    again = "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.2)))"
    done = python(SCRIPT.format(main=f"{again}; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)"))
    assert done.returncode == 130 and done.stderr == b"\ninterrupted. Nothing was written.\n"


def test_paths_with_spaces_in_printed_commands(tmp_path, monkeypatch, capsys):
    @dataclasses.dataclass
    class Args:
        resume: str = ""
        output: str = str(tmp_path / "my run; 1")

    def main(args):
        runs.make_run_folder(args, "graft", "model", 0)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(sys, "argv", ["my scripts/graft.py"])
    with pytest.raises(SystemExit):
        runs.run_script(main, Args)
    command = f"Continue with: python 'my scripts/graft.py' --resume '{tmp_path}/my run; 1'\n"
    assert capsys.readouterr().err.endswith(command)
    with pytest.raises(InputError, match=f"continue it with --resume '{tmp_path}/my run; 1', or give a new"):
        check_output(str(tmp_path / "my run; 1"), "")


@pytest.mark.parametrize("script", [*SCRIPTS, "benchmarks/evaluate.py", "benchmarks/tables.py"])
def test_started_from_a_notebook_in_ascii(script):
    """Where MPLBACKEND names a backend that only the notebook has."""
    surroundings = {"MPLBACKEND": "module://matplotlib_inline.no_such_backend", "PYTHONIOENCODING": "ascii"}
    start = f"import runpy, sys; sys.argv = ['{script}', '--help']; runpy.run_path('{script}', run_name='x')"
    if script in SCRIPTS:
        start = start.replace("run_name='x'", "run_name='__main__'")
    start = f"import sys; sys.path[:0] = ['benchmarks']; {start}"
    done = python(start, **surroundings)
    assert done.returncode == 0, done.stderr.decode()
    assert script not in SCRIPTS or b"--seed" in done.stdout


CHECK = "if sys.version_info < (3, 11):"


OLDER = (*SCRIPTS, "molecules/graft_molecules.py")


@pytest.mark.parametrize("script", OLDER)
def test_older_python_gets_one_line(script):
    """The script's syntax is understood and the check reached, before a package is imported."""
    source = (ROOT / script).read_text()
    ast.parse(source, feature_version=(3, 8))
    start = (
        "import runpy, sys\nsys.version_info = (3, 10, 13, 'final', 0)\nsys.version = '3.10.13 (main)'\n"
        "sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
        f"runpy.run_path('{script}', run_name='__main__')"
    )
    done = python(start)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.decode() == "error: Python 3.11 or newer is needed, this is 3.10.13\n"
    blocks = {name: (ROOT / name).read_text().split(CHECK)[1].split("\n\n")[0] for name in OLDER}
    assert len(set(blocks.values())) == 1


def test_the_least_python_is_said_everywhere():
    import tomllib

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"
    assert "Python 3.11 or newer" in (ROOT / "README.md").read_text()
    assert 'python-version: "3.11"' in (ROOT / ".github/workflows/ci.yml").read_text()


# ---------------------------------------------------------------- a reward without differences


@pytest.mark.parametrize("body", ["[0.1] * len(images)", "[float(len(p)) for p in prompts]"])
def test_a_reward_that_never_differs_stops_noise_ppo(body, arguments):
    """Also one that differs between prompts only: there is nothing to learn from a prompt's images."""
    Path("own.py").write_text(f"def score(images, prompts):\n    return {body}\n")
    code, _, error = run_inside([*arguments["noise_ppo.py"], "--samples", "3"], "noise_ppo.py")
    assert_one_line(
        code, error.split("\r")[-1].lstrip(), "--reward own.py:score: no two images of a prompt had"
    )


def test_a_reward_that_stops_differing_does_not_stop_noise_ppo(arguments):
    """It may have become as good as it gets."""
    Path("own.py").write_text(
        "calls = []\n\n\ndef score(images, prompts):\n    calls.append(1)\n"
        "    return [float(i) if len(calls) == 2 else 1.0 for i in range(len(images))]\n"
    )
    argv = [*arguments["noise_ppo.py"], "--iterations", "2", "--eval_every", "0"]
    code, _, error = run_inside(argv, "noise_ppo.py")
    assert code == 0, error
