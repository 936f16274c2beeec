"""benchmarks/base.py and benchmarks/evaluate.py: tiny real measurements, computed again from stock diffusers,
torch and numpy alone (the class Twin of test_loop_ddpo.py).

The run folders that evaluate.py reads are written here, not by the scripts: random weights and args.json.
"""

import json
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file

import base
import evaluate
from conftest import assert_same_images, run_inside
from test_loop_ddpo import (
    CALLS,
    HELD_OUT,
    LAYERS,
    TRAIN,
    Twin,
    assert_equal_images,
    assert_same_calls,
    assert_same_table,
    by_prompt,
    distance,
    hashed,
    paired,
    recorded,
    seed_of,
    write_files,
)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working directory, with prompts and rewards."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- base.py, rewards


SETTINGS = [
    {"guidance": 1.0},
    {"guidance": 1.5},
    {"guidance": 2.0},
    {"guidance": 3.0},
    {"guidance": 5.0},
    {"guidance": 7.5},
    {"temperature": 0.4},
    {"temperature": 0.6},
    {"temperature": 0.8},
    {"temperature": 0.9},
    {"eta": 0.0, "temperature": 0.4},
    {"eta": 0.0, "temperature": 0.6},
    {"eta": 0.0, "temperature": 0.8},
    {"eta": 0.0, "temperature": 1.0},
]
METRICS = ["shapes_strict", "shapes_graded", "shapes_fit", "jpeg_compressibility"]


def drawn(twin, prompts, samples, tag, batch, guidance=1.0, eta=1.0, temperature=1.0):
    """Images, prompt by prompt."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    seeds = [seed_of(tag, i, j) for i in range(len(prompts)) for j in range(samples)]
    args = SimpleNamespace(sample_batch=batch, guidance=guidance, eta=eta)
    return twin.sampled(twin.base, repeated, seeds, args, temperature)[0]


def rounded(values):
    return [round(statistics.mean(values), 4), round(statistics.stdev(values) / math.sqrt(len(values)), 4)]


def test_rewards_of_the_base_model(tiny_v, tmp_path, monkeypatch):
    """Every row of base.json: which seeds, which noises are scaled, standard errors, best of n."""
    held_out, valid = HELD_OUT[:4], TRAIN[:2]
    sets = {"valid": tmp_path / "valid.txt", "held_out": tmp_path / "held_out.txt"}
    assert list(base.METRICS) == METRICS and base.SETTINGS == SETTINGS
    assert [base.PROMPT_SETS[name].rpartition("/")[2] for name in sets] == [
        "prompts_valid.txt",
        "prompts_eval.txt",
    ]
    assert (base.SAMPLES, base.BEST_OF, base.STEPS, base.EMBEDDED[-15:]) == (4, 16, 10, "shapes/pipeline")
    for name, prompts in (("valid", valid), ("held_out", held_out)):
        sets[name].write_text("\n".join(prompts) + "\n")

    def reward(name):
        return lambda images, prompts: torch.tensor(
            [hashed(name, image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        )

    changes = {"EMBEDDED": tiny_v, "STEPS": 4, "SAMPLES": 3, "BATCH": 10, "RESULTS": tmp_path}
    changes |= {"PROMPT_SETS": {name: str(file) for name, file in sets.items()}}
    changes |= {"REWARDS": {name: reward(name) for name in METRICS}}
    for name, value in changes.items():
        monkeypatch.setattr(base, name, value)
    base.main("rewards")
    stored = json.loads((tmp_path / "base.json").read_text())
    assert stored["command"] == "python benchmarks/base.py rewards" and set(stored) == {
        "command",
        "seed",
        "rows",
    }

    twin, rows = Twin(tiny_v, 4), []
    twin.learn_text([""])
    for setting in SETTINGS:
        rows.append(setting | {"calls": 8 if setting.get("guidance", 1) > 1 else 4})
        for name, prompts in (("valid", valid), ("held_out", held_out)):
            images = drawn(twin, prompts, 3, "eval", 10, **setting)
            groups = [images[n : n + 3] for n in range(0, len(images), 3)]
            for metric in METRICS:
                means = [
                    statistics.mean(hashed(metric, image, prompt) for image in group)
                    for group, prompt in zip(groups, prompts, strict=True)
                ]
                rows[-1][f"{name} {metric}"] = rounded(means)
            rows[-1][f"{name} diversity"] = rounded([distance(group) for group in groups])
    images = drawn(twin, held_out, 16, "best", 10)
    for metric in ("shapes_strict", "jpeg_compressibility"):
        for n in (1, 2, 4, 8, 16):
            bests = []
            for p, prompt in enumerate(held_out):
                scores = [hashed(metric, image, prompt) for image in images[p * 16 : p * 16 + 16]]
                bests.append(statistics.mean(max(scores[k : k + n]) for k in range(0, 16, n)))
            rows.append({"best_of": n, "calls": 4 * n, f"held_out {metric}": rounded(bests)})
    assert len(stored["rows"]) == len(rows) == 24
    for row, expected in zip(stored["rows"], rows):
        assert list(row) == list(expected)
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, abs=1.01e-4 if isinstance(value, list) else 0), (
                name,
                expected,
            )
    assert len({json.dumps(row["held_out shapes_fit"]) for row in rows[:14]}) == 14  # every setting counts


# ---------------------------------------------------------------- base.py, speed


def test_speed_of_the_base_model(tiny_v, tmp_path, monkeypatch):
    """Medians without the first repetition, by a clock that moves only while something is sampled. All ways
    sample the same images."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # seconds of the repetitions: the first is not counted; the median of the others differs from their mean
    durations = {"stock": 3.0, "ours": 1.0, "merged": 2.0, "unmerged": 5.0}
    clock, order, images, decode = [0.0], [], {}, base.Model.decode
    sample, call = base.sample, StableDiffusionPipeline.__call__
    factors = [1000, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 100]

    def spend(name):
        order.append(name)
        clock[0] += durations[name] * factors[order.count(name) - 1]

    def our_sample(model, *args):
        layers = [m for m in model.denoiser.modules() if isinstance(m, BaseTunerLayer)]
        name = "ours" if not layers else "merged" if all(m.merged for m in layers) else "unmerged"
        spend(name)
        return sample(model, *args)

    def our_decode(model, *args):
        images[order[-1]] = decode(model, *args)
        return images[order[-1]]

    def stock_call(pipeline, *args, **options):
        spend("stock")
        images["stock"] = call(pipeline, *args, **options)
        return images["stock"]

    monkeypatch.setattr(base, "sample", our_sample)
    monkeypatch.setattr(base.Model, "decode", our_decode)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", stock_call)
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for name, value in {"EMBEDDED": tiny_v, "BATCH": 3, "STEPS": 2, "RESULTS": tmp_path}.items():
        monkeypatch.setattr(base, name, value)
    base.main("speed")
    assert order == ["stock", "ours"] * 10 + ["merged", "unmerged"] * 10  # alternating
    stored = json.loads((tmp_path / "sampler_speed.json").read_text())
    assert stored.pop("command") == "OMP_NUM_THREADS=1 python benchmarks/base.py speed"
    assert stored.pop("threads") == torch.get_num_threads() and isinstance(stored.pop("processor"), str)
    median = 1.4
    assert stored == pytest.approx(
        {
            "stock pipeline call": 3 * median,
            "ours": median,
            "ours, LoRA merged (as graft.py samples)": 2 * median,
            "ours, LoRA not merged": 5 * median,
        }
    )
    twin = Twin(tiny_v, 2)
    twin.learn_text([""])
    prompts = (base.ROOT / "shapes" / "prompts_train.txt").read_text().splitlines()[:3]
    args = SimpleNamespace(sample_batch=3, guidance=1, eta=1)
    assert_equal_images(images["ours"], twin.sampled(twin.base, prompts, range(3), args)[0])
    for name in ("merged", "unmerged"):
        assert_same_images(images[name], images["ours"])
    assert_same_images(images["stock"].images, images["ours"])


# ---------------------------------------------------------------- evaluate.py: run folders


RANK, ALPHA, SEED = 4, 6.0, 9
SWITCH, POLICY_SWITCH = 501.0, 499.0  # both begin a step: of the leading spacing, of the trailing spacing
STEPS, SAMPLES, BATCH, GUIDANCE, ETA = 4, 2, 5, 1.5, 0.6
KINDS = ("graft", "ddpo", "pgraft", "noise_ppo", "noise_ppo_graft", "noise_ppo_pgraft")
OTHER = ["a yellow square above a red circle", "blue", "a green circle left of a green square"]


def save_lora(folder, twin):
    """Random weights for the twin's LoRA, stored as stock diffusers stores them."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    generator = torch.Generator().manual_seed(4)
    for parameter in twin.lora.values():
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    weights = get_peft_model_state_dict(twin.tuned)
    weights = {n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): w for n, w in weights.items()}
    StableDiffusionPipeline.save_lora_weights(folder, weights, **_collate_lora_metadata({"unet": twin.tuned}))


def save_policy(folder, twin, model):
    """A random policy over the noise, its weights and what must travel with them."""
    tokens, width = twin.texts([""]).shape[1:]
    policy = {"tokens": tokens, "width": width, "latent_shape": [4, 8, 8], "hidden": 6, "grid": 2}
    policy |= {"policy": "conditional", "mean_only": False, "std_only": False}
    generator = torch.Generator().manual_seed(5)
    shapes = {"centre": (tokens, width), "scale": (tokens, width), "head.weight": (32, 6), "head.bias": (32,)}
    for number, inputs in ((0, tokens * width), (3, 6)):
        shapes |= {f"body.{number}.weight": (6, inputs), f"body.{number}.bias": (6,)}
        shapes |= {f"body.{number + 1}.weight": (6,), f"body.{number + 1}.bias": (6,)}
    weights = {n: 0.4 * torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    save_file(weights, folder / "policy.safetensors")
    settings = {"policy": policy, "model": model, "steps": STEPS, "guidance": GUIDANCE, "reward": "first"}
    settings["scheduler"] = {"class": "PNDMScheduler", "timestep_spacing": "trailing", "clip_sample": False}
    (folder / "noise_ppo.json").write_text(json.dumps(settings))
    return weights


def policy_of(weights, text):
    """Mean and log standard deviation of the initial noise, each (prompts, 4, 8, 8)."""
    x = ((text - weights["centre"]) * weights["scale"]).flatten(1)
    for number in (0, 3):
        linear, norm = (
            [weights[f"body.{n}.{part}"] for part in ("weight", "bias")] for n in (number, number + 1)
        )
        x = F.gelu(F.layer_norm(F.linear(x, *linear), (6,), *norm))
    coarse = F.linear(x, weights["head.weight"], weights["head.bias"]).view(-1, 8, 2, 2)
    fine = F.interpolate(coarse, (8, 8), mode="bilinear")
    return fine[:, :4], fine[:, 4:]


@pytest.fixture(scope="module")
def folders(tiny_epsilon, tmp_path_factory):
    """Run folders of every kind; what the twin needs of them."""
    root = tmp_path_factory.mktemp("runs")
    common = {"seed": SEED, "output": "", "resume": "", "device": "cpu", "dtype": "float32", "t5": True}
    common |= {"model": tiny_epsilon, "prompts": "train.txt", "eval_prompts": "held_out.txt"}
    common |= {"eval_samples": SAMPLES, "steps": STEPS, "guidance": GUIDANCE, "sample_batch": BATCH}
    common |= {"reward": "reward.py:first", "eval_rewards": "reward.py:second", "reward_device": "cpu"}
    common |= {"reward_dtype": "float32", "reward_batch": 16}
    twin = Twin(tiny_epsilon, STEPS)
    twin.add_lora(RANK, ALPHA, LAYERS, 0)
    own = [{"eta": ETA, "rule": "topk"}, {"eta": ETA, "clip": 1e-2}, {"eta": ETA, "switch": "0.7"}]
    own += [{"lora": "", "switch_timestep": None}]
    own += [{"lora": str(root / "graft"), "switch_timestep": -1.0}]
    own += [{"lora": str(root / "pgraft"), "switch_timestep": POLICY_SWITCH}]
    for kind, values in zip(KINDS, own, strict=True):
        (root / kind).mkdir()
        (root / kind / "args.json").write_text(json.dumps(common | values))
        if kind.startswith("noise_ppo"):
            weights = save_policy(root / kind, twin, tiny_epsilon)
        else:
            save_lora(root / kind, twin)
    bar = float(twin.pipe.scheduler.alphas_cumprod[int(SWITCH)])
    stored = {"switch_timestep": SWITCH, "sigma": math.sqrt(1 - bar), "model": tiny_epsilon}
    (root / "pgraft" / "pgraft.json").write_text(json.dumps(stored))
    return SimpleNamespace(root=root, weights=weights, lora=twin.lora, model=tiny_epsilon)


# ---------------------------------------------------------------- evaluate.py: the same again


def evaluation(folders, kind, switch, **changes):
    """What evaluate.py should ask the rewards and report: calls, images of both models, table, steps of the
    LoRA. switch: the timestep from which on the LoRA is off, None for a LoRA that is on in all steps."""
    how = {"prompts": HELD_OUT, "samples": SAMPLES, "steps": STEPS, "guidance": GUIDANCE, "eta": ETA}
    how = SimpleNamespace(**how | {"sample_batch": BATCH, "names": ("first", "second")} | changes)
    twin, noisy = Twin(folders.model, how.steps), kind.startswith("noise_ppo")
    if noisy:
        config = twin.pipe.scheduler.config
        twin.use(DDIMScheduler.from_config(config, timestep_spacing="trailing", clip_sample=False), how.steps)
    twin.scale, twin.lora = ALPHA / RANK, {} if kind == "noise_ppo" else folders.lora
    twin.learn_text([""])
    twin.learn_text(how.prompts)
    merged = twin.merged()
    tuned = [merged if switch is None or t > switch else twin.base for t in twin.grid]
    repeated = [prompt for prompt in how.prompts for _ in range(how.samples)]
    seeds = [seed_of("eval", i, j) for i in range(len(how.prompts)) for j in range(how.samples)]
    if noisy:
        how.eta, (mean, log_std) = 0, policy_of(folders.weights, twin.texts(how.prompts))
        learn = [(mean[i], log_std[i].exp()) for i in range(len(how.prompts)) for _ in range(how.samples)]
        before, _, _ = twin.sampled(tuned, repeated, seeds, how)
        after, _, _ = twin.sampled(
            tuned, repeated, seeds, how, start=lambda x, n: learn[n][0] + learn[n][1] * x
        )
    else:
        (before, _, _), (after, _, _) = (
            twin.sampled(unets, repeated, seeds, how) for unets in (twin.base, tuned)
        )
    calls, tables = [], []
    for images in (before, after):
        for i in range(0, len(images), how.sample_batch):
            part = slice(i, i + how.sample_batch)
            calls += [(name, images[part], repeated[part]) for name in how.names]
        tables.append(by_prompt(images, how.prompts, how.samples, how.names))
        scores = [hashed(how.names[0], image, p) for image, p in zip(images, repeated, strict=True)]
        for m in (m for m in (2, 4, 8) if noisy and how.samples % m == 0):
            tables[-1][f"best_of_{m}"] = []
            for n in range(0, len(scores), how.samples):
                bests = [max(scores[k : k + m]) for k in range(n, n + how.samples, m)]
                tables[-1][f"best_of_{m}"].append(statistics.mean(bests))
    table = paired(*tables, ("standard", "learnt", "gain") if noisy else ("base", "tuned", "difference"))
    count = None if switch is None else sum(unet is merged for unet in tuned)
    return SimpleNamespace(calls=calls, before=before, after=after, table=table, switch_at=count, how=how)


def assert_evaluated(folders, kind, argv, switch, wanted, tmp_path):
    """evaluate.py asks, reports and leaves what was computed here, and leaves the run as it is."""
    run = folders.root / kind
    contents = {path: path.read_bytes() for path in run.iterdir()}
    with recorded() as seen:
        code, _, error = run_inside([str(run), *argv, "--output", "found"], "benchmarks/evaluate.py")
    assert code == 0, error
    assert_same_calls(CALLS, wanted.calls)
    assert_same_table(tmp_path / "found", wanted.table)
    stored = json.loads((tmp_path / "found" / "results.json").read_text())
    expected = {"run": str(run), "method": kind.partition("_graft")[0].partition("_pgraft")[0]}
    expected["method"] = "graft" if kind == "ddpo" else expected["method"]
    expected["steps"] = wanted.how.steps
    expected |= {} if switch is None else {"switch_at": wanted.switch_at, "switch_timestep": switch}
    assert {k: v for k, v in stored.items() if k not in ("table", "seconds")} == expected
    ((file, before, after, prompts, per_prompt, title),) = seen.grids
    assert (file, prompts, per_prompt) == ("grid.png", wanted.how.prompts, wanted.how.samples)
    assert title.startswith("learnt noise" if kind.startswith("noise") else "tuned")
    assert_equal_images([*before, *after], [*wanted.before[:24], *wanted.after[:24]])
    assert not seen.updates and contents == {path: path.read_bytes() for path in run.iterdir()}


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_of_a_run(folders, files, kind):
    """Held-out prompts, the fixed seeds, base and tuned weights, the stored switch."""
    switch = {"pgraft": SWITCH, "noise_ppo_pgraft": POLICY_SWITCH}.get(kind)
    wanted = evaluation(folders, kind, switch)
    assert wanted.switch_at in (None, 2 if kind.startswith("noise") else 1)
    assert_evaluated(folders, kind, [], switch, wanted, files)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_with_everything_changed(folders, files, kind):
    """Other prompts, images, steps, guidance, rewards and switch than in the run."""
    (files / "other.txt").write_text("\n".join(OTHER) + "\n")
    argv = "--prompts other.txt --eval_samples 4 --steps 5 --guidance 1 --sample_batch 7"
    argv += " --reward reward.py:second --eval_rewards reward.py:first"
    argv += "" if kind.startswith("noise") else " --eta 0.9"
    argv += "" if kind == "noise_ppo" else " --switch 0.3"
    changes = {"prompts": OTHER, "samples": 4, "steps": 5, "guidance": 1, "sample_batch": 7, "eta": 0.9}
    switch = None if kind == "noise_ppo" else 300.0
    wanted = evaluation(folders, kind, switch, names=("second", "first"), **changes)
    assert_evaluated(folders, kind, argv.split(), switch, wanted, files)


def test_a_switch_is_known_by_the_arguments_or_by_its_file(folders, files):
    """Either makes a run one of pgraft.py."""
    stored = json.loads((folders.root / "graft" / "args.json").read_text())
    for name, more, kept in (
        ("file", {}, True),
        ("argument", {"switch": "0.7"}, False),
        ("neither", {}, False),
    ):
        shutil.copytree(folders.root / "graft", files / name)
        (files / name / "args.json").write_text(json.dumps(stored | more))
        if kept:
            shutil.copy(folders.root / "pgraft" / "pgraft.json", files / name)
        # the level is given where its file is missing
        args = evaluate.Args(run=name, switch=0.5 if name == "argument" else None)
        assert evaluate.read_run(args)[1] == ("graft" if name == "neither" else "pgraft")
