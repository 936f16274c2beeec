"""Rewards in a file of the user's: they run as in a program of their own, and cannot change the run."""

import asyncio
import json
import os
import random
import signal
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, arguments_for, assert_one_line, assert_same_run, exit_code, run_inside, run_script
from noise_ppo import Args as NoiseArgs
from rewards import Reward, read_rewards, score, takes, wants_metadata
from utils import user_code
from utils.prompts import Prompt, read_prompts
from utils.runs import InputError

IMAGES = [Image.new("RGB", (8, 8), (level, 7, 9)) for level in (10, 20, 30)]
PROMPTS = ["a", "b", "c"]


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return f"{file}:score"


def values(spec, images=IMAGES, prompts=PROMPTS):
    return Reward(spec)(images, prompts).tolist()


def settings():
    """What no reward may change."""
    return [read() for read, _ in user_code.SETTINGS], dict(os.environ)


# ---------------------------------------------------------------- a real module


DATACLASS = """
    from __future__ import annotations
    from dataclasses import dataclass, fields
    import typing

    @dataclass
    class Settings:
        weight: float = 2.0

    def score(images, prompts):
        assert typing.get_type_hints(Settings) == {"weight": float}
        return [Settings().weight * image.getpixel((0, 0))[0] for image in images]
    """
PICKLE = """
    import pickle

    class Judge:
        def __call__(self, image):
            return image.getpixel((0, 0))[0]

    def score(images, prompts):
        judge = pickle.loads(pickle.dumps(Judge()))
        assert type(judge) is Judge
        return [2 * judge(image) for image in images]
    """
POOL = """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    def judge(image):
        return 2 * image.getpixel((0, 0))[0]

    def score(images, prompts):
        with ProcessPoolExecutor(2, multiprocessing.get_context("METHOD")) as pool:
            return list(pool.map(judge, images))
    """


@pytest.mark.parametrize("text", [DATACLASS, PICKLE, POOL.replace("METHOD", "fork")], ids="dpf")
@pytest.mark.parametrize("name", ["mine.py", "my-reward 2.py", "rewards.py", "random.py", "conftest.py"])
def test_a_file_is_a_module_under_its_own_name(tmp_path, text, name):
    before = sys.modules.get(Path(name).stem)
    spec = write(tmp_path / name, text)
    assert values(spec) == [20, 40, 60]
    assert before is None or sys.modules[Path(name).stem] is before


KEPT_POOL = """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    pool = None

    def judge(image):
        return float(image.getpixel((0, 0))[0])

    def score(images, prompts):
        global pool
        pool = pool or ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return list(pool.map(judge, images))
    """


def test_worker_processes_that_import_the_file(tiny_arguments, tmp_path):
    """Where processes are not forked, as on macOS; in a whole run, whose script they import too."""
    write(tmp_path / "rewarding" / "slow.py", KEPT_POOL)
    flags = "--rounds 1 --updates 1 --rule none --sample_batch 64 --reward rewarding/slow.py:score".split()
    done = run_script([*tiny_arguments, *flags, "--output", "run"], tmp_path)
    assert done.returncode == 0 and (tmp_path / "run" / "results.json").is_file(), done.stderr


def test_a_file_is_run_once(tmp_path):
    text = "count = 0\n\ndef score(images, prompts):\n    global count\n    count += 1\n"
    text += "    return [float(count)] * len(images)\n\nother = score\n"
    (tmp_path / "once.py").write_text(text)
    file = tmp_path / "once.py"
    rewards = read_rewards(f"{file}:score", f"{file}:other")
    assert [r(IMAGES, PROMPTS).tolist() for r in rewards] == [[1.0] * 3, [2.0] * 3]


def test_neighbours(tmp_path):
    """Modules beside the file, also of the names of ours and of those beside another file."""
    ours = {name: sys.modules[name] for name in ("utils", "utils.runs", "rewards", "common", "conftest")}
    path, specs = list(sys.path), []
    for weight in (1, 2):
        folder = tmp_path / f"folder{weight}"
        write(folder / "utils.py", f"from helper import twice\nWEIGHT = {weight}\n")
        write(folder / "helper.py", f"def twice(x):\n    return 2 * {weight} * x\n")
        write(folder / "common" / "__init__.py", "")
        write(folder / "common" / "late.py", f"LATE = {weight}\n")
        body = """
            from utils import WEIGHT, twice

            def score(images, prompts):
                from common.late import LATE
                import helper
                assert LATE == WEIGHT and helper.twice(1) == twice(1)
                return [float(100 * WEIGHT + twice(1))] * len(images)
            """
        specs.append(write(folder / "own.py", body))
    rewards = [Reward(spec) for spec in specs]
    for _ in range(2):
        assert [r(IMAGES, PROMPTS)[0].item() for r in rewards] == [102, 204]
    assert sys.path == path and all(sys.modules[name] is module for name, module in ours.items())
    from utils.runs import InputError as again

    assert again is InputError


def test_our_own_rewards_can_be_imported(tmp_path):
    spec = write(tmp_path / "own.py", "from rewards import jpeg_incompressibility as score\n")
    assert values(spec) == values("jpeg_incompressibility")


def test_a_file_that_fails_leaves_nothing(tmp_path):
    before = settings()
    write(tmp_path / "fails_at_import.py", "import torch\ntorch.set_grad_enabled(False)\n1 / 0\n")
    with pytest.raises(InputError, match="ZeroDivisionError"):
        Reward(f"{tmp_path / 'fails_at_import.py'}:score")
    assert "fails_at_import" not in sys.modules and settings() == before


# ---------------------------------------------------------------- it cannot change the run


CHANGES = """
    import os, random, sys
    import numpy as np
    import torch

    def change():
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(3)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        sys.path.insert(0, "/elsewhere")
        os.chdir("/")
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def seen():
        return [torch.is_grad_enabled(), torch.get_default_dtype(), str(torch.get_default_device()),
                torch.get_num_threads(), torch.get_float32_matmul_precision(),
                torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark,
                torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32, sys.path[0], os.getcwd()]

    def score(images, prompts):
        BEFORE
        change()
        return [float(i.getpixel((0, 0))[0]) for i in images]
    """
CHANGED = [False, torch.float64, "meta", 3, "medium", 1, True, True, False, "/elsewhere", "/"]


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("when", ["call", "import"])
@pytest.mark.parametrize("ours", [torch.enable_grad, torch.no_grad])
def test_global_state(tmp_path, when, ours):
    """Restored after the import and after each call; a file meets its own again."""
    text = textwrap.dedent(CHANGES.replace("BEFORE", "log.append(seen())")) + "\nlog = []\n"
    spec = write(tmp_path / f"{when}.py", text + ("change()\n" if when == "import" else ""))
    before = settings()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = [draws(), draws()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    reward = Reward(spec)
    assert settings() == before
    with ours():
        grad = torch.is_grad_enabled()
        first = draws()
        assert reward(IMAGES, PROMPTS).tolist() == reward(IMAGES, PROMPTS).tolist() == [10, 20, 30]
        assert torch.is_grad_enabled() == grad and reward(IMAGES, PROMPTS).dtype == torch.float32
    assert settings() == before and [first, draws()] == expected
    log = reward.parts[0][2].user.module.log
    assert log[1] == CHANGED and (when == "call" or log[0] == CHANGED)
    if when == "call":  # at first all is as in a new program
        assert log[0][:2] == [True, torch.float32] and log[0][-2:] == [str(tmp_path), os.getcwd()]


def test_gradients_inside_a_reward(tmp_path):
    """Also where the run itself needs none, as in the final evaluation of noise_ppo.py."""
    body = """
        import torch

        def score(images, prompts):
            x = torch.tensor([float(i.getpixel((0, 0))[0]) for i in images], requires_grad=True)
            (x ** 2).sum().backward()
            return x.grad
        """
    spec = write(tmp_path / "own.py", body)
    with torch.no_grad():
        assert values(spec) == [20, 40, 60]


def test_arguments_are_copies(tmp_path):
    body = """
        def score(images, prompts, metadata):
            assert type(images) is type(prompts) is type(metadata) is list
            assert all(type(p) is str for p in prompts)
            for image, row in zip(images, metadata):
                image.paste((0, 0, 0), (0, 0, 8, 8))
                row["list"].append(1)
            images.reverse(), prompts.clear(), metadata.clear()
            return [0.0] * len(images)
        """
    spec = write(tmp_path / "own.py", body)
    prompts = [Prompt(p, {"list": []}) for p in PROMPTS]
    images = [i.copy() for i in IMAGES]
    Reward(spec)(images, prompts)
    assert prompts == PROMPTS and all(p.metadata == {"list": []} for p in prompts)
    assert [i.tobytes() for i in images] == [i.tobytes() for i in IMAGES]


def test_results_are_copies(tmp_path):
    body = """
        import torch
        buffer = torch.zeros(3)

        def score(images, prompts):
            buffer.add_(1)
            return buffer
        """
    reward = Reward(write(tmp_path / "own.py", body))
    first, second = reward(IMAGES, PROMPTS), reward(IMAGES, PROMPTS)
    assert first.tolist() == [1, 1, 1] and second.tolist() == [2, 2, 2]


RANDOM = """
    import random
    import numpy as np
    import torch

    def score(images, prompts):
        return [DRAW for _ in images]
    """


DRAWS = ["random.random()", "np.random.rand()", "torch.rand(()).item()"]


@pytest.mark.parametrize("draw", DRAWS)
def test_random_rewards_depend_on_the_images(tmp_path, draw):
    """Not on what was drawn before, so that a resumed run sees the same. Yet calls differ."""
    reward, values = Reward(write(tmp_path / "own.py", RANDOM.replace("DRAW", draw))), []
    for images in (IMAGES, IMAGES[::-1], IMAGES):
        values.append(reward(images, PROMPTS))
        draws()  # a run draws in between
    first, other, again = values
    assert torch.equal(first, again) and not torch.equal(first, other) and len(set(first.tolist())) == 3


def test_functions_that_do_not_tell_their_arguments(monkeypatch):
    """Some that are written in C: they are taken for rewards of (images, prompts)."""

    def unknown(function):
        raise ValueError("no signature found")

    monkeypatch.setattr("rewards.inspect.signature", unknown)
    assert [takes(max, count) for count in range(4)] == [False, False, True, False]
    assert not wants_metadata(max)


QUIET = "def score(images, prompts):\n    return [float(i.getpixel((0, 0))[0]) for i in images]\n"


def test_a_run_is_the_same_whatever_a_reward_changes(tiny_arguments, tmp_path):
    for folder, text in (("quiet", QUIET), ("loud", textwrap.dedent(CHANGES.replace("BEFORE", "")))):
        write(tmp_path / folder / "own.py", text)
        argv = [*tiny_arguments, "--reward", "own.py:score", "--output", "run"]
        code = exit_code(argv, tmp_path / folder)
        assert code == 0, (tmp_path / folder / "output.txt").read_text()
    for folder in ("loud", "quiet"):
        (tmp_path / folder / "run" / "inputs.json").unlink()  # the two rewards' files differ
    assert_same_run(tmp_path / "loud" / "run", tmp_path / "quiet" / "run")


def test_a_run_with_a_random_reward_is_resumed(tiny_arguments, tmp_path):
    for folder in ("whole", "killed"):
        write(tmp_path / folder / "own.py", RANDOM.replace("DRAW", " + ".join(DRAWS)))
    argv = [*tiny_arguments, "--reward", "own.py:score", "--output", "run"]
    assert exit_code(argv, tmp_path / "whole") == 0
    killer = ("torch.nn.utils", "clip_grad_norm_", 2)
    assert exit_code(argv, tmp_path / "killed", killer) == -signal.SIGKILL
    assert exit_code(["--resume", "run"], tmp_path / "killed") == 0
    assert_same_run(tmp_path / "killed" / "run", tmp_path / "whole" / "run")


# ---------------------------------------------------------------- what a reward returns


RETURNED = {  # body: what the line must contain
    "return None": "returned None",
    "pass": "returned None",
    "return (x for x in images)": "returned a generator",
    "yield 1.0": "returned a generator",
    "return ['good'] * 3": "returned a list of str",
    "return ['1.0'] * 3": "returned a list of str",
    "return 'good'": "returned a str",
    "return np.array(['1', '2', '3'])": "returned a ndarray",
    "return {'a': 1.0}": "returned a dict",
    "return images": "returned a list of Image",
    "return [None] * 3": "returned a list of NoneType",
    "return [1j] * 3": "returned a list of complex",
    "return [[1.0], [1.0, 2.0], []]": "returned a list of list",
    "return print": "returned a builtin_function_or_method",
    "return (None, {})": "returned a tuple of NoneType",
}


@pytest.mark.parametrize("start", ["def", "async def"])
@pytest.mark.parametrize("body", RETURNED)
@pytest.mark.filterwarnings("error")
def test_anything_but_numbers(tmp_path, body, start):
    spec = write(tmp_path / "own.py", f"import numpy as np\n{start} score(images, prompts):\n    {body}\n")
    with pytest.raises(InputError) as error:
        Reward(spec)(IMAGES, PROMPTS)
    words = RETURNED[body]
    if start == "async def":
        words = "returned a async_generator" if body.startswith("yield") else "returned a coroutine"
    assert str(error.value).startswith(f"reward {spec}: {words}"), error.value
    assert "a reward returns a number for each image" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "body",
    [
        "[1, 2.5, 3]",
        "(1, 2.5, 3)",
        "([1, 2.5, 3], {})",
        "(np.array([1, 2.5, 3]), {'answers': np.array(['x', 'y', 'z'])})",
        "(torch.tensor([1, 2.5, 3]), None)",
        "(torch.tensor([1, 2.5, 3], dtype=torch.bfloat16, requires_grad=True), [0, 1])",
        "[np.float64(1), torch.tensor(2.5), 3]",
    ],
)
def test_numbers(tmp_path, body):
    text = f"import numpy as np\nimport torch\ndef score(images, prompts):\n    return {body}\n"
    assert values(write(tmp_path / "own.py", text)) == [1, 2.5, 3]


def test_a_tuple_of_two_numbers_is_two_numbers(tmp_path):
    for i, body in enumerate(("(1.0, 2.0)", "(np.float32(1), np.float32(2))", "tuple(torch.tensor([1, 2]))")):
        text = f"import numpy as np\nimport torch\ndef score(images, prompts):\n    return {body}\n"
        assert values(write(tmp_path / f"own{i}.py", text), IMAGES[:2], PROMPTS[:2]) == [1, 2]


LEAVES = {  # body: what the line must contain
    "sys.exit(0)": "it ends the program, SystemExit: 0",
    "sys.exit()": "it ends the program, SystemExit",
    "exit()": "it ends the program, SystemExit",
    "raise SystemExit('no licence')": "it ends the program, SystemExit: no licence",
    "argparse.ArgumentParser().parse_args(['--what'])": "it ends the program, SystemExit: 2",
    "raise GeneratorExit": "GeneratorExit",
    "raise asyncio.CancelledError": "CancelledError",
    "raise StopIteration": "StopIteration",
    "raise MemoryError": "MemoryError",
    "raise Exception('two\\nlines')": "Exception: two",
}


@pytest.mark.parametrize("body", LEAVES)
def test_leaving_is_an_error(tmp_path, body):
    head, state = "import argparse, asyncio, sys\n", settings()
    spec = write(tmp_path / "own.py", f"{head}def score(images, prompts):\n    {body}\n")
    with pytest.raises(InputError) as error:
        Reward(spec)(IMAGES, PROMPTS)
    assert f"reward {spec}: {LEAVES[body]}" in str(error.value)
    spec = write(tmp_path / "made.py", f"{head}def score():\n    {body}\n")
    with pytest.raises(InputError) as error:
        Reward(spec, "--eval_rewards").load()
    assert f"--eval_rewards {spec}: {LEAVES[body]}" in str(error.value)
    spec = write(tmp_path / "imported.py", f"{head}{body}\n")
    with pytest.raises(InputError, match="does not load"):
        Reward(spec)
    assert settings() == state


def test_ctrl_c_is_no_error_of_the_reward(tmp_path):
    for text in ("raise KeyboardInterrupt\n", "def score(images, prompts):\n    raise KeyboardInterrupt\n"):
        spec = write(tmp_path / f"own{len(text)}.py", text)
        with pytest.raises(KeyboardInterrupt):
            Reward(spec)(IMAGES, PROMPTS)
    assert asyncio.CancelledError  # the test above needs it


def test_a_run_whose_reward_exits(tiny_arguments, tmp_path, monkeypatch):
    write(tmp_path / "own.py", "import sys\ndef score(images, prompts):\n    sys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, "--reward", "own.py:score"])
    assert_one_line(code, error.split("\r")[-1].lstrip(), "own.py:score: it ends the program")


def test_noise_ppo_stops_where_no_reward_differs(tiny_arguments, tmp_path, monkeypatch):
    """Within the images of a prompt; that prompts differ teaches nothing."""
    text = "def score(images, prompts):\n    return [0.1 * len(p) for p in prompts]\n"
    write(tmp_path / "own.py", text)
    monkeypatch.chdir(tmp_path)
    small = "--iterations 2 --prompts_per_iteration 3 --epochs 1 --eval_steps 4 --reward own.py:score".split()
    code, _, error = run_inside([*arguments_for(NoiseArgs, tiny_arguments), *small], "noise_ppo.py")
    named = "--reward own.py:score: no two images of a prompt had different rewards"
    assert_one_line(code, error.split("\r")[-1].lstrip(), named)


# ---------------------------------------------------------------- metadata


FILES = {
    "rows.jsonl": '{"prompt": "a", "count": 2}\n\n{"prompt": "", "count": 3}\n'
    '{"count": [4], "prompt": "a"}\n',
    "rows.csv": 'count,prompt\n2,a\n3,\n"[4]",a\n',
    "rows.tsv": "count\tprompt\n2\ta\n3\t\n[4]\ta\n",
}


@pytest.mark.parametrize("name", FILES)
def test_metadata_of_a_prompt_file(tmp_path, name):
    """Each row keeps its own, also of equal prompts; a row without a prompt is left out with its metadata."""
    (tmp_path / name).write_text(FILES[name])
    prompts = read_prompts(str(tmp_path / name), "--prompts")
    first, last = (2, [4]) if name == "rows.jsonl" else ("2", "[4]")
    assert prompts == ["a", "a"]
    assert [p.metadata for p in prompts] == [{"prompt": "a", "count": n} for n in (first, last)]


def test_metadata_of_text_and_of_geneval(tmp_path):
    (tmp_path / "plain.txt").write_text("a\nb\n")
    assert [p.metadata for p in read_prompts(str(tmp_path / "plain.txt"), "")] == [{}, {}]
    row = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a red car"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = read_prompts(str(tmp_path / "evaluation_metadata.jsonl"), "")
    assert prompt.metadata == row


SIGNATURES = {  # signature: whether it gets metadata
    "images, prompts": False,
    "images, prompts, metadata": True,
    "pictures, texts, rows": True,
    "images, prompts, metadata=None": True,
    "images, prompts, scale=2.0": False,
    "images, prompts, *, scale=2.0": False,
    "*arguments": False,
    "images, prompts, metadata, scale=2.0": True,
    "images, prompts, /, metadata": True,
}


@pytest.mark.parametrize("signature", SIGNATURES)
def test_who_gets_metadata(tmp_path, signature):
    body = "return [float(sum(isinstance(v, list) for v in locals().values()) or len(arguments))] * 3"
    text = f"arguments = ()\ndef score({signature}):\n    {body}\n"
    expected = 3.0 if SIGNATURES[signature] else 2.0
    assert values(write(tmp_path / "own.py", text)) == [expected] * 3


@pytest.mark.parametrize(
    "signature", ["images", "images, prompts, metadata, strict", "images, *, prompts", "a"]
)
def test_signatures_that_are_refused(tmp_path, signature):
    spec = write(tmp_path / "own.py", f"def score({signature}):\n    return [1.0]\n")
    with pytest.raises(InputError) as error:
        Reward(spec, "--eval_rewards")
    assert str(error.value).startswith(
        f"--eval_rewards {spec}: score({signature}) cannot be called; a reward"
    )


def test_metadata_in_a_run(tiny_arguments, tmp_path, monkeypatch):
    """Every image is judged with the row of its own prompt, in training and in the evaluation."""
    shapes = [f"a {c} {s} left of a blue circle" for c in ("red", "green") for s in ("circle", "square")]
    for name, some in (("train", shapes), ("held_out", shapes[:3])):
        rows = [{"prompt": p, "reversed": p[::-1], "row": i} for i, p in enumerate(some)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    body = """
        def score(images, prompts, metadata):
            assert [p[::-1] for p in prompts] == [row["reversed"] for row in metadata]
            return [row["row"] + i.getpixel((0, 0))[0] / 1000 for i, row in zip(images, metadata)]
        """
    write(tmp_path / "own.py", body)
    monkeypatch.chdir(tmp_path)
    files = "--prompts train.jsonl --eval_prompts held_out.jsonl --reward own.py:score --output".split()
    for script, extra in (
        ("graft.py", ""),
        ("pgraft.py", "--switch 0.5"),
        ("noise_ppo.py", "--iterations 1 --eval_steps 4 --prompts_per_iteration 4 --epochs 1"),
    ):
        argv = arguments_for(NoiseArgs, tiny_arguments) if script == "noise_ppo.py" else tiny_arguments
        code, _, error = run_inside([*argv, *files, script[:-3], *extra.split()], script)
        assert code == 0, error


# ---------------------------------------------------------------- reward files of other projects


DDPO = """
    import io

    import numpy as np
    import torch
    from PIL import Image

    def score():  # a factory; its reward takes arrays or tensors, and returns (scores, info)
        def reward(images, prompts, metadata):
            if isinstance(images, torch.Tensor):
                assert images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
                images = (images * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
                images = images.transpose(0, 2, 3, 1)
            sizes = []
            for image in images:
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, format="JPEG", quality=95)
                sizes.append(buffer.tell() / 1000)
            return np.array(sizes), {"prompts": prompts, "metadata": metadata}
        return reward
    """


@pytest.mark.parametrize("signature", ["", "device", "device='cuda'"])
def test_factories(tmp_path, signature):
    """As ddpo-pytorch and Flow-GRPO write them: the same pixels as ours get."""
    text = DDPO.replace("score()", f"score({signature})")
    if signature:
        text = text.replace("def reward(", "assert device == torch.device('cpu')\n        def reward(")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 10, 3), np.uint8)
    images = [Image.fromarray(p) for p in pixels]
    reward = Reward(write(tmp_path / "rewards.py", text))
    reward.load("cpu")
    assert torch.equal(reward(images, PROMPTS), Reward("jpeg_incompressibility")(images, PROMPTS))


def test_a_class_is_made_once(tmp_path):
    body = """
        class score:
            made = 0

            def __init__(self):
                score.made += 1

            def __call__(self, images, prompts):
                return [score.made + i.getpixel((0, 0))[0] for i in images]
        """
    reward = Reward(write(tmp_path / "own.py", body))
    assert [reward(IMAGES, PROMPTS).tolist() for _ in range(2)] == [[11, 21, 31]] * 2


@pytest.mark.parametrize("body", ["return None", "return [1.0]", "return lambda images: [1.0]"])
def test_a_factory_that_makes_no_reward(tmp_path, body):
    spec = write(tmp_path / "own.py", f"def score():\n    {body}\n")
    with pytest.raises(InputError) as error:
        Reward(spec).load("cpu")
    assert str(error.value).startswith(f"--reward {spec}: returned a ") and "prompts" in str(error.value)


def test_rewards_of_one_file_share_nothing_with_others(tmp_path):
    """A sum of two files, one of which is named as our module, scored as a list of rewards."""
    specs = [write(tmp_path / name / "rewards.py", QUIET) for name in "ab"]
    scores = score(read_rewards("+".join(specs), specs[0]), IMAGES, PROMPTS)
    assert scores["+".join(specs)].tolist() == [20, 40, 60] and scores[specs[0]].tolist() == [10, 20, 30]
    assert Path(sys.modules["rewards"].__file__) == ROOT / "rewards.py"
