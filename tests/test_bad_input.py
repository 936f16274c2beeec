"""Bad input ends with exit code 2 and one line that names it, and leaves nothing on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line, run_inside, run_script

import common
from rewards import read_prompts

FILES = {
    "empty.txt": b"",
    "blank.txt": b"\n  \n\t\n",
    "latin.txt": "a red circle\na caf\u00e9\n".encode("latin-1"),
    "words.csv": b"id,words\n1,a red circle\n",
    "words.tsv": b"id\twords\n1\ta red circle\n",
    "header.csv": b"prompt\n",
    "long.csv": b'prompt\n"' + b"x" * 200_000 + b'"\n',  # more than the csv module takes
    "broken.jsonl": b'{"prompt": "a red circle"}\n\n{"prompt": \n',
    "list.jsonl": b"[1]\n",
    "number.jsonl": b'{"prompt": "a red circle"}\n{"prompt": 3}\n',
    "change.jsonl": b'{"text": "a red circle"}\n{"caption": "a red circle"}\n',
    "prompts.xlsx": b"a red circle\n",
    "one.txt": b"a red circle left of a blue square\n",
    "other.txt": b"a photo of a cat\na photo of a dog\n",
    "raises.py": b"raise RuntimeError('two\\nlines')\n",
    "syntax.py": b"def f(:\n",
    "good.py": b"number = 3\ndef f(images, prompts):\n    return [0.0] * len(images)\n",
    "no_pipeline/config.json": b"{}",
    "flux/model_index.json": b'{"_class_name": "FluxPipeline"}',
    "damaged/model_index.json": b"{",
    "list/model_index.json": b"[]",
    "a_run/args.json": b"{}",
    "full/something.txt": b"",
    "run_damaged/args.json": b'{"rounds": 3',
    "run_list/args.json": b"[]",
    "run_other/args.json": b'{"no_such_setting": 3}',
    "run_type/args.json": b'{"rounds": "many"}',
}

# arguments -> what the message must contain; @ is the folder of FILES
CASES = {
    "--prompts @/missing.txt": "missing.txt",
    "--prompts @/empty.txt": "empty.txt",
    "--prompts @/blank.txt": "blank.txt",
    "--prompts @/latin.txt": "latin.txt: line 2",
    "--prompts @/words.csv": "words.csv: no column 'prompt' in the first line, which has id, words",
    "--prompts @/words.tsv": "words.tsv: no column 'prompt' in the first line, which has id, words",
    "--prompts @/words.csv:Words": "words.csv:Words: no column 'Words'",
    "--prompts @/missing.csv:words": "missing.csv:words: no such file",
    "--prompts @/one.txt:words": "one.txt:words: give a .txt",
    "--prompts @/header.csv": "header.csv",
    "--prompts @/long.csv": "long.csv",
    "--prompts @/broken.jsonl": "broken.jsonl: line 3",
    "--prompts @/list.jsonl": "list.jsonl: line 1",
    "--prompts @/number.jsonl": "number.jsonl: line 2",
    "--prompts @/change.jsonl": "change.jsonl: line 2",
    "--prompts @/change.jsonl:prompt": "change.jsonl:prompt: line 1",
    "--prompts @/prompts.xlsx": "prompts.xlsx",
    "--prompts @/one.txt --eval_prompts=": "one.txt",
    "--eval_prompts @/empty.txt": "--eval_prompts",
    "--prompts @/other.txt --reward shapes_strict": "--prompts",
    "--eval_prompts @/other.txt": "--eval_prompts",
    "--top_k 5": "--top_k",
    "--top_k 0": "--top_k",
    "--reward beauty": "'beauty'",
    "--eval_rewards jpeg_incompressibility,beauty": "--eval_rewards",
    "--reward x*shapes_graded": "--reward",
    "--reward nan*shapes_graded": "--reward",
    "--reward @/missing.py:f": "missing.py",
    "--reward @/good.py:g": "'g'",
    "--reward @/good.py:number": "'number'",
    "--reward @/raises.py:f": "two lines",
    "--reward @/syntax.py:f": "syntax.py",
    "--eval_rewards @/raises.py:f": "--eval_rewards",
    "--reward clip(@/missing)": "missing' is no folder",
    "--reward clip(@/full)": "--reward clip(",
    "--eval_rewards jpeg_compressibility,0.5*vqa(@/full)": "--eval_rewards 0.5*vqa(",
    "--reward_device tpu": "--reward_device tpu",
    "--reward_device cuda": "--reward_device cuda",
    "--reward_dtype int8": "--reward_dtype int8",
    "--reward_device cpu --reward_dtype float16": "--reward_dtype float16",
    "--reward_batch 0": "--reward_batch 0",
    "--rule best": "--rule best",
    "--rule threshold": "--threshold",
    "--rule exponential": "--beta",
    "--rule exponential --beta -1": "--beta",
    "--rule exponential --beta nan": "--beta",
    "--rule preference --samples 3": "--samples 3",
    "--reference oldest": "--reference",
    "--model @/no_pipeline": "no_pipeline",
    "--model @/flux": "FluxPipeline",
    "--model @/missing": "missing",
    "--model @/damaged": "model_index.json",
    "--model @/list": "model_index.json",
    "--output @/full": "--output",
    "--output @/empty.txt": "--output",
    "--output @/a_run": "--resume",
    "--device tpu": "--device tpu",
    "--device cuda": "--device cuda",
    "--dtype float16 --device cpu": "--dtype float16",
    "--dtype int8": "--dtype int8",
    "--rounds 0": "--rounds",
    "--rounds -1": "--rounds",
    "--samples 0": "--samples",
    "--prompts_per_round 0": "--prompts_per_round",
    "--steps 0": "--steps",
    "--updates 0": "--updates",
    "--batch 0": "--batch",
    "--micro_batch 0": "--micro_batch",
    "--micro_batch 3": "--micro_batch",
    "--sample_batch 0": "--sample_batch",
    "--eval_samples 0": "--eval_samples",
    "--lora_rank 0": "--lora_rank",
    "--lora_alpha 0": "--lora_alpha",
    "--lr 0": "--lr",
    "--lr -0.1": "--lr",
    "--lr nan": "--lr",
    "--guidance 0.5": "--guidance",
    "--eta 2": "--eta",
    "--prompt_dropout 1": "--prompt_dropout",
    "--seed -1": "--seed",
    "--seed 99999999999999999999": "--seed",
    "--roundz 3": "--roundz",
    "--rounds three": "--rounds",
    "--lr much": "--lr",
    "--rounds": "--rounds",
    "--shard 1/2": "--shard",
    "--sample_only --shard 3/2": "--s",
    "--sample_only --shard one": "--s",
    "--sample_only --shard 1000/1000": "--s",
}
RESUMED = {
    "--resume @/missing": "missing",
    "--resume @/full": "full",
    "--resume @/run_damaged": "args.json",
    "--resume @/run_list": "args.json",
    "--resume @/run_other": "args.json",
    "--resume @/run_type": "args.json",
    "--resume @/a_run --rounds 7": "--rounds 7",
    "--resume @/a_run --output elsewhere": "--output",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("script", ["graft.py", "pgraft.py"])
@pytest.mark.parametrize("arguments", [*CASES, *RESUMED])
def test_bad_input_is_found_before_the_model_loads(arguments, script, files, tiny_arguments, tmp_path, monkeypatch):
    if arguments.endswith("device cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.setattr(common, "Model", lambda *_: pytest.fail("the model is loaded"))
    monkeypatch.chdir(tmp_path)
    before = sorted(files.rglob("*"))
    argv = arguments.replace("@", str(files)).split()
    code, _, error = run_inside([*tiny_arguments, *argv] if arguments in CASES else argv, script)
    assert_one_line(code, error, (CASES | RESUMED)[arguments])
    assert not list(tmp_path.iterdir())
    assert [p for p in sorted(files.rglob("*")) if "__pycache__" not in p.parts] == before


@pytest.mark.parametrize("script", ["graft.py", "pgraft.py"])
def test_the_cases_are_bad_for_their_own_reason(script, tiny_arguments, tmp_path, monkeypatch):
    """The arguments to which the cases are added are good."""

    class Reached(Exception):
        pass

    def model(*_):
        raise Reached

    monkeypatch.setattr(common, "Model", model)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Reached):
        run_inside(tiny_arguments, script)


@pytest.mark.parametrize("arguments", ["--prompts missing.txt", "--roundz 3"])
def test_in_a_process_of_its_own(arguments, tiny_arguments, tmp_path):
    done = run_script([*tiny_arguments, *arguments.split()], tmp_path)
    assert_one_line(done.returncode, done.stderr, arguments.split()[0] if "z" in arguments else "missing.txt")
    assert not done.stdout and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- found when the model loads, or later


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--lora_targets to_z", "to_z"),
        ("--steps 999", "--steps 999"),
        ("--steps 2000", "--steps 2000"),
        ("--model nobody/nothing", "nobody/nothing"),  # offline
        ("--output @/empty.txt/run", "--output"),
    ],
)
def test_bad_input_leaves_nothing(arguments, named, files, tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, *arguments.replace("@", str(files)).split()])
    assert_one_line(code, error, named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder"])
def test_damaged_model(name, tiny_v, tiny_arguments, tmp_path, monkeypatch):
    model = Path(shutil.copytree(tiny_v, tmp_path / "model"))
    if (model / name).is_dir():
        shutil.rmtree(model / name)
    else:
        (model / name).write_bytes((model / name).read_bytes()[:1000][:-500])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    code, _, error = run_inside([*tiny_arguments, "--model", str(model)])
    assert_one_line(code, error, str(model))
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_checkpoint(damage, tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*tiny_arguments, "--output", "run", "--rounds", "1"]
    assert run_inside(argv)[0] == 0
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[damage])
    code, _, error = run_inside(["--resume", "run"])
    assert_one_line(code, error, "checkpoint.pt")


@pytest.mark.parametrize("body", ["[0.0]", "[float('nan')] * len(images)"])
def test_reward_that_returns_nonsense(body, tiny_arguments, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"def score(images, prompts):\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, "--reward", "mine.py:score"])
    assert_one_line(code, error.split("\r")[-1], "mine.py:score")  # what stands after the progress bar


# ---------------------------------------------------------------- good files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_read_prompts(tmp_path, mark):
    expected = ["a red, round circle", "a caf\u00e9 \u2028 below"]
    texts = {
        "good.txt": "a red, round circle  \r\n\r\na caf\u00e9 \u2028 below",
        "good.csv": 'id,prompt\n1,"a red, round circle"\n2,\n3,a caf\u00e9 \u2028 below\n4\n',
        "good.jsonl": "\n".join(json.dumps({"id": 1, "prompt": p}, ensure_ascii=False) for p in expected) + "\n\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(mark + text.encode())
        assert read_prompts(str(tmp_path / name), "--prompts") == expected, name


GENEVAL = """{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
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
        ["A red colored car.", "One cat and two dogs, sitting on the grass.", 'A sign that says "Deep Learning".'],
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
    (tmp_path / "train.txt").write_text("a red circle left of a blue square\nA blue square below a RED square\n")
    argv, printed = [*tiny_arguments[: tiny_arguments.index("--rounds")], "--prompts", str(tmp_path / "train.txt")], []
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
