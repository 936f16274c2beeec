"""README.md and docs/ say what the results say; their links, flags, commands and Python code work."""

import importlib
import importlib.metadata
import inspect
import json
import re
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.run
import tyro
from PIL import Image
from rdkit import Chem

import graft
import inverse_noise_correction
import noise_ppo
import pgraft
import tables
from conftest import PROMPTS, ROOT, randomise, stock_pipeline, with_lora
from layouts.pgraft_layouts import read_reward as read_layout_reward
from molecules.graft_molecules import read_reward
from rewards import read_rewards
from utils.prompts import read_prompt_sets
from utils.runs import parse_arguments, save_accepted

PAGES = tables.read_pages()
# not files of this project
ELSEWHERE = ("my_reward.py", "my_property.py", "my_prompts.txt", "train_dreambooth_lora_sd3.py")
METHODS = {module.__name__: module for module in (graft, pgraft, noise_ppo, inverse_noise_correction)}
CODE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# without code and generated parts; without code, in one line
PROSE = {page: tables.PART.sub("", CODE.sub("", text)) for page, text in PAGES.items()}
WORDS = {page: " ".join(CODE.sub("", text).split()) for page, text in PAGES.items()}
SPANS = {page: re.findall(r"`([^`]+)`", text) for page, text in WORDS.items()}
PYTHON = [
    (page, code) for page, text in PAGES.items() for kind, code in CODE.findall(text) if kind == "python"
]
COMMANDS = [
    (page, shlex.split(line, comments=True))
    for page, text in PAGES.items()
    for kind, code in CODE.findall(text)
    if kind == "bash"
    for line in code.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def changed(page, old, new):
    """The pages, with the first `old` of one replaced."""
    assert old in PAGES[page]
    return PAGES | {page: PAGES[page].replace(old, new, 1)}


# ---------------------------------------------------------------- results


def test_generated_parts_and_figures():
    assert tables.differences(PAGES) == []


@pytest.mark.parametrize(
    "page, old, new, named",
    [
        (
            "docs/graft.md",
            "0.919 ± 0.011 | 0.981",
            "0.929 ± 0.011 | 0.981",
            "docs/graft.md: part 'graft' differs",
        ),
        ("README.md", "no selection 0.208", "no selection 0.209", "README.md: part 'summary' differs"),
        ("docs/graft.md", "<!-- generated: jpeg -->\n", "", "part 'jpeg' stands in 0 places"),
        (
            "docs/models.md",
            "<!-- generated: grain -->",
            "<!-- generated: grains -->",
            "part 'grains' is unknown",
        ),
        (
            "docs/models.md",
            "<!-- generated: grain -->",
            "<!-- generated: base -->",
            "part 'base' stands in 2 places",
        ),
    ],
)
def test_drift_is_named(page, old, new, named):
    assert any(named in line for line in tables.differences(changed(page, old, new)))


def test_figure_drift_is_named(monkeypatch):
    monkeypatch.setitem(tables.FIGURES, "graft/graft__grid.png", lambda: (None, []))
    monkeypatch.setitem(tables.FIGURES, "no_such.png", lambda: (None, []))
    lines = tables.differences(PAGES)
    assert (
        len(lines) == 2 and "graft/graft__grid.png differs" in lines[0] and "no_such.png differs" in lines[1]
    )


def test_command_line(tmp_path, monkeypatch, capsys):
    for page, text in changed("docs/comparison.md", "0.670 ± 0.020", "0.770 ± 0.020").items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text, encoding="utf-8")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "FIGURES", {})
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 1 and "part 'base' differs" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tables.py"])
    assert tables.main() == 0 and tables.read_pages() == PAGES


def budgeted(rewards, images, calls, seconds):
    """A record of an arm at a budget; images, calls and seconds of each round."""
    cost = {"images": images, "calls": calls, "seconds": seconds}
    curve = [{name: n * i for name, n in cost.items()} | {"reward": r} for i, r in enumerate(rewards, 1)]
    rows = [{"metric": name, "base": 0.2, "tuned": rewards[-1]} for name in tables.FIVE]
    return curve[-1] | {"curve": curve, "results": {"table": rows}}


@pytest.fixture
def records(monkeypatch):
    """{folder/arm: records} in the place of the stored ones."""
    known = {"compare/graft": [budgeted([0.5, 0.7 + 0.1 * seed, 0.9], 100, 2000, 10.0) for seed in (0, 1)]}
    known["compare/ddpo"] = [budgeted([0.3, 0.4, 0.7], 1000, 6000, 50.0)] * 2
    read = tables.runs
    monkeypatch.setattr(tables, "runs", lambda name: known.get(name) or read(name))
    return known


def test_table_at_a_budget(records):
    lines = tables.compare().split("\n\n")[0].splitlines()
    (graft,), (ddpo,) = (
        [line for line in lines if line.startswith(f"| {arm} (2)")] for arm in ("GRAFT", "DDPO")
    )
    assert graft.split("|")[2:7] == [" 300 ", " 6 ", " 30 ", " 0.900 ± 0.000 ", " 0.900 ± 0.000 "]
    assert ddpo.split("|")[2:7] == [" 3,000 ", " 18 ", " 150 ", " 0.300 ± 0.000 ", " 0.700 ± 0.000 "]
    assert len({line.count("|") for line in lines}) == 1
    assert any(line.startswith("| best of 8 ") for line in lines)


def test_where_graft_passed_ddpo(records):
    """After its second round GRAFT's mean is 0.75, above DDPO's 0.7."""
    costs = "200 (1/15.0) images, 4,000 (1/4.5) calls, 20 (1/7.5) seconds"
    for which, line in zip(("best", "last"), tables.reached().splitlines()[2:4], strict=True):
        passed = f"0.700 after 3,000 images, 18,000 calls, 150 seconds | 0.750 after {costs} |"
        assert line.startswith(f"| DDPO, {which}: {passed}")
    records["compare/ddpo"] = [budgeted([0.95, 0.3], 1000, 6000, 50.0)] * 2
    best, last = tables.reached().splitlines()[2:4]
    assert best.startswith("| DDPO, best: 0.950 after 1,000 images, 6,000 calls, 50 seconds | not reached |")
    assert "0.500 after 100 (1/20.0) images, 2,000 (1/6.0) calls, 10 (1/10.0) seconds |" in last


@pytest.fixture
def rivals(records, monkeypatch):
    """GRAFT's strict reward is 0.9; DiffusionNFT's 0.1 less, AWM's 0.02 more with seed 0 and 0.06 with 1."""
    gains = {"compare/nft": (-0.1, -0.1), "compare/awm": (0.02, 0.06), "compare/awm_twice": (0.02, 0.06)}
    arms = [f"compare/{arm}" for arms in tables.RIVALS.values() for arm in arms]
    arms += [arm for _, arms in tables.FRONTIER.values() for arm in arms.values()]
    for arm in arms:
        records[arm] = []
        for seed, gain in enumerate(gains.get(arm, (0, 0))):
            rows = [{"metric": name, "base": 0.2, "tuned": 0.9 + gain} for name in tables.METRICS]
            record = budgeted([0.5, 0.9 + gain], 100, 2000, 10.0) | {"results": {"table": rows}}
            records[arm].append(record | {"seed": seed})
    tried = {"metric": "shapes_strict", "tuned": 0.7}, {"metric": "diversity", "tuned": 0.3}
    records |= {f"tuning/{arm}": [{"results": {"table": tried}}] for arm in tables.ARMS["tuning"]}
    kls = {f"compare/{arm}__{seed}": {"kl": 1.5 + seed} for arm in ("graft", "awm") for seed in (0, 1)}
    monkeypatch.setattr(tables, "stored", {"path_kl": kls | {"compare/nft__0": {"kl": 9.0}}}.get)
    return records


def test_table_of_the_rivals(rivals):
    first, second, text = tables.rivals().split("\n\n")
    assert len({line.count("|") for line in f"{first}\n{second}".splitlines()}) == 1
    assert first.startswith("| 3,840 images |") and second.startswith("| 7,680 images |")
    lines = {line.split("|")[1].strip(): line for line in first.splitlines()}
    assert lines["DiffusionNFT (2)"].split("|")[2:4] == [" 4 ", " 0.800 ± 0.000 "]
    assert lines["DiffusionNFT (2)"].endswith("|  |")  # the KL of one seed only is not shown
    assert lines["AWM (2)"].endswith("| 2.000 ± 0.500 |") and lines["base"].endswith("| 0.200 | 0 |")
    gains = "DiffusionNFT -0.100 ± 0.000, AWM 0.040 ± 0.020; with 7,680 images AWM 0.040 ± 0.020."
    assert text == f"Strict minus GRAFT's, paired over seeds: {gains}"
    figure, data = tables.rivals_figure()
    assert len(data) == 2 * len(tables.CURVES) and len(figure.axes) == 2
    assert ["AWM", [100.0, 200.0], [0.5, 0.94], pytest.approx([0, 0.02])] in data


def test_frontier(rivals):
    figure, data = tables.frontier_figure()
    held_out = sum(len(arms) for _, arms in tables.FRONTIER.values())
    assert len(data) == held_out + len(tables.ARMS["tuning"])
    (entry,) = [row for row in data if row[:2] == ["AWM", "penalty 0.4"]]
    assert entry[2] == pytest.approx([0.94, 0.94]) and entry[3] == pytest.approx([0.02, 0.02])
    assert ["DDPO", "lr 1e-3 clip 1e-4", 0.7, 0.3] in data and ["GRAFT", "default", 0.7, 0.3] in data
    assert any(list(line.get_xdata()) == [0.94] for line in figure.axes[0].lines)
    assert all(list(line.get_xdata()) == [0.3] for line in figure.axes[1].lines)


# ---------------------------------------------------------------- form, links, images


def test_form():
    assert len(PAGES["README.md"].splitlines()) <= 200
    for page, text in PROSE.items():
        assert page == "README.md" or "This page answers:" in text.split("\n\n")[1], page
        long = [line for line in text.splitlines() if len(line) > 110 and line[0] != "|" and line[:2] != "!["]
        assert not long, f"{page}: {long}"


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Relative links, images and anchors; files that are named in the text."""
    for target in re.findall(r"\]\(([^)]+)\)", WORDS[page]):
        if not target.startswith("https://"):
            name, _, anchor = target.partition("#")
            file = (ROOT / page).parent / name if name else ROOT / page
            assert file.is_file(), target
            assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target
    for span in SPANS[page]:
        name = re.fullmatch(
            r"(?:benchmarks|docs|shapes|tests|utils|\.github)/[\w./]*|\w+\.(?:py|toml|txt|cff)", span
        )
        if name and span not in ELSEWHERE:
            assert (ROOT / span).exists() or (ROOT / "benchmarks" / span).exists(), span


def test_every_result_image_is_shown_and_has_a_record():
    shown = {
        name
        for text in PAGES.values()
        for name in re.findall(r"\((?:\.\./)?benchmarks/results/(.+?\.png)\)", text)
    }
    assert shown == {file.relative_to(tables.RESULTS).as_posix() for file in tables.RESULTS.rglob("*.png")}
    for name in shown - set(tables.FIGURES):
        assert (tables.RESULTS / f"{name.rpartition('__')[0]}__0.json").is_file(), name


# ---------------------------------------------------------------- flags and commands


def flags_of(script):
    for name in METHODS[script].Args.__dataclass_fields__:
        yield from (f"--{name}", f"--no-{name}")


def test_flags_exist():
    """Those that the text names, and those of code of the methods."""
    fields = {flag for script in METHODS for flag in flags_of(script)} | {"--help", "--dist"}
    actions = torch.distributed.run.get_args_parser()._actions
    fields |= {flag for action in actions for flag in action.option_strings}
    rooms = ("benchmarks", "shapes", "fashion", "molecules", "layouts")
    files = [file for room in rooms for file in (ROOT / room).glob("*.py")]
    others = "".join(file.read_text(encoding="utf-8") for file in files)
    for page, spans in SPANS.items():
        for flag in (flag for span in spans for flag in re.findall(r"--[a-z][\w-]*", span)):
            name = flag.removeprefix("--").removeprefix("no-")
            assert flag in fields or f'"{flag}"' in others or f"    {name}: " in others, f"{page}: {flag}"


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch):
    """The working directory, with every file that the commands name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rewards.OCR_PACKAGES", ())  # a command is right without them too
    prompts = "\n".join(
        [*PROMPTS, *(f"a {colour} square left of a red circle" for colour in ("red", "blue") * 8)]
    )
    (tmp_path / "my_prompts.txt").write_text(prompts)
    (tmp_path / "captions.csv").write_text("caption\n" + prompts)
    (tmp_path / "PartiPrompts.tsv").write_text(
        "Prompt\tCategory\n" + "".join(f"{p}\tAnimals\n" for p in prompts.split("\n"))
    )
    (tmp_path / "signs.txt").write_text("".join(f'a sign that says "{word}"\n' for word in prompts.split()))
    code = next(code for _, code in PYTHON if "my_reward.py" in code)
    (tmp_path / "my_reward.py").write_text(f"{code}\nscore = blueness\n")


def first_lines(words):
    """Check environment and packages of a command; return what comes after them."""
    environment, source, install, command = (part.split() for part in " ".join(words).split("&&"))
    assert environment[:3] == ["python3", "-m", "venv"] and source == [".", f"{environment[3]}/bin/activate"]
    assert install[:2] == ["pip", "install"]
    for line in (ROOT / install[install.index("-r") + 1]).read_text().split():
        name, relation, wanted = re.fullmatch(r"([\w-]+)(==|>=)([\d.]+)", line).groups()
        version = importlib.metadata.version(name)
        installed, least = ([int(n) for n in re.findall(r"\d+", v.split("+")[0])] for v in (version, wanted))
        fits = installed == least if relation == "==" else installed >= least
        assert fits, f"these tests run with {name} {version}, requirements.txt says {line}"
    return command


def check_command(words):
    """AssertionError or InputError unless a command can run as it stands, once its run folders exist."""
    if words[0] == "python3":
        words = first_lines(words)
    if words[0] in ("pip", "pre-commit", ".ci/run"):
        assert words[0] != ".ci/run" or (ROOT / words[0]).is_file()
        return
    if words[0] == "accelerate":
        check_trainer(dict(zip(words[3::2], words[4::2], strict=True)))
        return
    if words[0] == "torchrun":
        options = torch.distributed.run.get_args_parser().parse_args(words[1:])
        words = ["python", options.training_script, *options.training_script_args]
    python, script, *flags = words
    assert python == "python"
    if script == "-m" and flags[0] == "pytest":
        assert flags == ["pytest", "-q", "-n", "2", "--dist", "loadfile"]
    elif script == "-m":
        parse_flags(importlib.import_module(flags[0]), flags[1:])
    elif script.removesuffix(".py") in METHODS:
        check_method(METHODS[script.removesuffix(".py")], [word for word in flags if word != "<run>"])
    else:
        assert (ROOT / script).is_file(), script
        parse_flags(importlib.import_module(script.removeprefix("benchmarks/").removesuffix(".py")), flags)


def check_trainer(options):
    """The trainer of diffusers reads what the command before it writes."""
    page, _ = next((page, words) for page, words in COMMANDS if words[0] == "accelerate")
    before = next(words for where, words in COMMANDS if where == page and "--save_accepted" in words)
    assert options["--train_data_dir"] == f"{before[before.index('--output') + 1]}/accepted"
    assert f'"{options["--caption_column"]}"' in inspect.getsource(save_accepted)  # a key of metadata.jsonl


def parse_flags(module, flags):
    """By tyro where a script has Args. Else each flag must stand in its source; run.py must have the arms."""
    if hasattr(module, "Args"):
        tyro.cli(module.Args, args=flags, use_underscores=True)
        return
    source = (ROOT / module.__file__).read_text(encoding="utf-8")
    for word in flags:
        if word.startswith("--"):
            assert f'"{word}"' in source, word
        elif module.__name__ == "run":
            module.choose([word])


def check_method(module, flags):
    if "--resume" in flags:
        assert "resume" in module.Args.__dataclass_fields__
        return
    args = parse_arguments(module.Args, flags)
    if hasattr(args, "prompts"):
        train, held_out = read_prompt_sets(args.prompts, args.eval_prompts)
        assert len(train) > 10 and len(held_out) > 1
        read_rewards(args.reward or "shapes_strict", args.eval_rewards or "")


@pytest.mark.parametrize(
    "page, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else " ".join(value)[-50:]
)
def test_command(page, words, folder_of_a_reader):
    check_command(words)


def test_commands_in_sentences(folder_of_a_reader):
    """Commands with <...> or a place to fill in, such as {0,1,2}, are understood by their scripts."""
    spans = [
        re.sub(r"\{(\w+),.*?\}", r"\1", span)
        for page in SPANS
        for span in SPANS[page]
        if span.startswith("python ")
    ]
    assert len(spans) > 15
    for span in spans:
        if "<script>" not in span:
            check_command(shlex.split(span.replace("<run folder>", "run")))


def test_every_flag_is_explained(capsys, monkeypatch):
    """--help is the reference of the arguments."""
    monkeypatch.setenv("COLUMNS", "300")
    for script, module in METHODS.items():
        with pytest.raises(SystemExit):
            parse_arguments(module.Args, ["--help"])
        text = capsys.readouterr().out
        for name in module.Args.__dataclass_fields__:
            line = text[text.index(f"--{name}") :].split("\n--")[0].split("│ --")[0]
            words = re.sub(r"\(default:.*?\)", "", line.replace("│", "")).split()
            assert len([word for word in words if not word.startswith(("--", "{"))]) >= 3, (
                f"{script} --{name}"
            )


# ---------------------------------------------------------------- Python code


def block(page, name):
    (code,) = (code for where, code in PYTHON if where == page and name in code)
    return code


@pytest.fixture(scope="module")
def lora(tiny_v, models, tmp_path_factory):
    """Folder with a LoRA of the small pipeline and its switch, as pgraft.py leaves them."""
    folder = tmp_path_factory.mktemp("lora")
    model = with_lora(models["v"], "attention")
    randomise(model)
    model.save_lora(folder)
    args = SimpleNamespace(model=tiny_v, steps=10, guidance=1.0, eta=1.0, data="x0")
    pgraft.save_switch(folder, model, 499, args)
    return folder


def test_every_python_block_is_run_here():
    run_here = ("my_reward.py", "load_lora_weights", "base_from_the_switch_on", "NoisePolicy.load")
    run_here += ("policy.safetensors", "Corrector", "kohya", "my_property.py", "my_layout.py")
    assert [sum(name in code for name in run_here) for _, code in PYTHON] == [1] * 11


@pytest.mark.parametrize("page", ["README.md", "docs/rewards.md"])
def test_reward(page):
    scope = {}
    exec(block(page, "my_reward.py"), scope)
    images = [Image.new("RGB", (8, 8), (200, 0, 255)), Image.new("RGB", (8, 8))]
    assert scope["blueness"](images, PROMPTS[:2]) == [1.0, 0.0]


def test_reward_of_a_molecule(tmp_path):
    (tmp_path / "my_property.py").write_text(block("docs/molecules.md", "my_property.py"))
    rings = read_reward(f"{tmp_path}/my_property.py:rings")
    assert [rings(Chem.MolFromSmiles(smiles)) for smiles in ("CC", "C1CC1", "C1CC12CC2")] == [0, 1, 2]


def test_reward_of_a_page(tmp_path):
    (tmp_path / "my_layout.py").write_text(block("docs/layouts.md", "my_layout.py"))
    reward = read_layout_reward(f"{tmp_path}/my_layout.py:figures_on_top")
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.25], [0.5, 0.75, 1.0, 0.5]]]).expand(2, 2, 4)
    assert reward(boxes, torch.tensor([[1, 3], [0, 1]])).tolist() == [-0.5, 0]


def test_lora(lora, tiny_v, tmp_path, monkeypatch):
    """The line in README stands in the code of docs/graft.md, which makes another image than the base."""
    monkeypatch.chdir(tmp_path)
    code = block("docs/graft.md", "load_lora_weights").replace("<model>", tiny_v).replace("<run>", str(lora))
    assert block("README.md", "load_lora_weights").replace("<run>", str(lora)) in code
    for name, source in {"tuned": code, "base": code.replace("pipe.load", "# pipe.load")}.items():
        torch.manual_seed(0)
        exec(source.replace("tuned.png", f"{name}.png"), {})
    tuned, base = (np.asarray(Image.open(f"{name}.png"), int) for name in ("tuned", "base"))
    assert tuned.shape == base.shape and abs(tuned - base).max() > 2


def test_switch(lora, tiny_v, monkeypatch):
    pipe = stock_pipeline(tiny_v)
    pipe.load_lora_weights(str(lora))
    calls, step = [], pipe.unet.forward
    layers = [layer for layer in pipe.unet.modules() if hasattr(layer, "lora_A")]

    def forward(*args, **options):
        calls.append(layers[0].disable_adapters)
        return step(*args, **options)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    code = block("docs/pgraft.md", "switch_timestep").replace("<run>", str(lora))
    exec(code, {"pipe": pipe, "prompt": PROMPTS[0], "json": json})
    assert calls == [t <= 499 for t in pipe.scheduler.timesteps.tolist()] and len(set(calls)) == 2


@pytest.fixture(
    scope="module", params=[("conditional", True, False), ("conditional", False, False)], ids=["mean", "both"]
)
def policy(request, tiny_v, tmp_path_factory):
    """(folder of a policy with random weights, the policy)."""
    pipe, folder = stock_pipeline(tiny_v), tmp_path_factory.mktemp("policy")
    _, tokens, width = pipe.encode_prompt(PROMPTS[0], pipe.device, 1, False)[0].shape
    name, mean_only, std_only = request.param
    size = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    shape = {"tokens": tokens, "width": width, "latent_shape": size, "hidden": 16, "grid": 4, "policy": name}
    shape |= {"mean_only": mean_only, "std_only": std_only}
    torch.manual_seed(0)
    made = noise_ppo.NoisePolicy(**shape)
    torch.nn.init.normal_(made.head.weight, std=0.3)
    torch.nn.init.normal_(made.centre, std=0.3)
    made.save(folder, {"policy": shape, "model": tiny_v, "steps": 4, "guidance": 1.0})
    return folder, noise_ppo.NoisePolicy.load(folder, pipe)


def test_policy_without_this_repository(policy):
    """The block under <!-- tested: use_policy --> draws what NoisePolicy.sample draws."""
    folder, expected = policy
    ((_, code),) = CODE.findall(PAGES["docs/noise_ppo.md"].partition("<!-- tested: use_policy -->\n")[2])[:1]
    names = set(re.findall(r"^(?:import|from) (\w+)|, (torch)", code, re.MULTILINE))
    assert {a or b for a, b in names} == {"json", "torch", "diffusers", "safetensors"}
    scope = {}
    with torch.no_grad():
        exec(code.replace("<run>", str(folder)), scope)
    latents = expected.sample(scope["prompt"], torch.Generator().manual_seed(0))
    assert torch.allclose(scope["latents"], latents, atol=1e-5) and scope["mean"].abs().max() > 0.1
    assert scope["pipe"].scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_policy(policy, tiny_v):
    from diffusers import DDIMScheduler

    folder, _ = policy
    scope = {"pipe": stock_pipeline(tiny_v), "prompt": PROMPTS[0], "DDIMScheduler": DDIMScheduler}
    scope["NoisePolicy"] = noise_ppo.NoisePolicy
    exec(block("docs/noise_ppo.md", "NoisePolicy.load").replace("<run>", str(folder)), scope)
    assert scope["pipe"].scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_corrector(tmp_path):
    from common import Flow, model_hash

    flow = Flow.load(ROOT / "fashion", "cpu")
    sigmas = flow.grid(8, 1.0)
    settings = {"model_hash": model_hash(flow.network), "steps": 8, "grid_power": 1.0, "scale": 1.5}
    settings |= {"sigmas": sigmas.tolist(), "timesteps": flow.scheduler.timesteps.tolist()}
    settings |= {"corrector_steps": 4, "normalise": "scale"}
    network = inverse_noise_correction.new_network("unet:4,8", 16, 2, 2, zero=True)
    inverse_noise_correction.Corrector(network, settings, {}).save(tmp_path / "corrector")
    code = block("docs/inverse_noise_correction.md", "Corrector").replace("<run>", str(tmp_path))
    scope = {"torch": torch, "network": flow.network, "scheduler": flow.scheduler}
    scope["Corrector"] = inverse_noise_correction.Corrector
    with torch.no_grad():
        exec(code, scope)
    assert scope["x"].shape == (1, 1, 16, 16) and scope["x"].isfinite().all()


def test_conversion(lora, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    exec(block("docs/models.md", "kohya").replace("<run>", str(lora)), {})
    names = load_file("my_lora.safetensors")
    assert names and all(name.startswith("lora_unet_") for name in names)
