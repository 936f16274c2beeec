"""benchmarks/gpu.py: models of the published sizes, the script on shrunk ones, and its CUDA branches as far
as a CPU goes."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import common
import gpu
import graft
from conftest import ROOT, run_inside
from utils.runs import parse_arguments

PUBLISHED = {  # parameters of the denoiser, the text encoders
    "sd15": (859_520_964, [123_060_480]),
    "sd21": (865_910_724, [340_387_840]),
    "sdxl": (2_567_463_684, [123_060_480, 694_659_840]),
    "sd3": (2_028_328_000, [123_650_304, 694_659_840]),
    "flux": (11_901_408_320, [123_060_480, 4_762_310_656]),
    "flux2klein": (3_875_544_576, [4_022_468_096]),
}


def size(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", gpu.FAMILIES)
def test_published_sizes(name):
    with torch.device("meta"):
        denoiser, vae, encoders = gpu.make_networks(
            name, {"vocab_size": 49408, "max_position_embeddings": 77}
        )
    assert (size(denoiser), [size(e) for e in encoders]) == PUBLISHED[name]
    sizes = {"sd3": 83_819_683, "flux": 83_819_683, "flux2klein": 84_046_115}
    assert size(vae) == sizes.get(name, 83_653_863)
    if name.startswith("flux"):  # it takes patches of 2 x 2; its configuration knows no size of images
        assert denoiser.config.in_channels == 4 * vae.config.latent_channels
        return
    latent = (
        denoiser.config.in_channels,
        denoiser.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1),
    )
    assert latent == ((16 if name == "sd3" else 4), {"sd15": 512, "sd21": 768}.get(name, 1024))


@pytest.mark.parametrize("name", gpu.FAMILIES)
def test_flags_are_those_of_the_docs(name):
    text = " ".join((ROOT / "docs" / "models.md").read_text().replace("\\\n", " ").split())
    model = re.escape(gpu.FAMILIES[name]["model"])
    command = re.search(rf"python graft\.py --model {model} .*?(?= #| ```)", text)[0].split()
    flags = gpu.FAMILIES[name]["flags"].split()
    for flag, following in zip(flags, [*flags[1:], "--"]):
        assert flag in command
        if flag.startswith("--") and not following.startswith("--"):  # it has a value
            assert following == command[command.index(flag) + 1]
    args = parse_arguments(graft.Args, command[2:])
    assert args.gradient_checkpointing and args.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["sd3", "flux", "flux2klein"])
def test_whole_script_on_a_shrunk_model(name, tmp_path):
    bars, out = graft.tqdm, tmp_path / "gpu.json"
    argv = f"--tiny --device cpu --families {name} --steps 2 --images 16 --updates 2 --out {out}".split()
    code, text, error = run_inside(argv, "benchmarks/gpu.py")
    assert code == 0 and graft.tqdm is bars, error
    record = json.loads(out.read_text())[name]
    assert record["tiny"] and record["device"] == "cpu" and record["matrix_rate_teraflops"] > 0
    assert record["settings"]["dtype"] == "bfloat16" and record["settings"]["steps"] == 2
    assert record["flops"]["train"] == 3 * record["flops"]["call"] > 0 and record["flops"]["decode"] > 0
    assert record["checks"].pop("the measured run ends") == "ok"
    phases = {phase["phase"]: phase for phase in record["phases"]}
    assert list(phases) == [
        "load, encode prompts",
        "evaluate base",
        "sample 1",
        "update 1",
        "evaluate 1",
        "stock pipeline call",
    ]
    for phase, rate in (("sample 1", "images"), ("update 1", "updates"), ("stock pipeline call", "images")):
        assert phases[phase]["per_second_of"] == rate and phases[phase]["per_second"] > 0
        assert 0 < phases[phase]["share_of_matrix_rate"] < 1 and phases[phase]["reserved"] is None
        assert f"  {phase} " in text
    equal = [value for check, value in record["checks"].items() if check.startswith("our images")]
    assert len(equal) == 2 and all(value.startswith("ok") for value in equal)
    others = [value for check, value in record["checks"].items() if not check.startswith("our images")]
    assert len(others) == 3 and set(others) == {"not measured: needs CUDA"}


def test_time_for_a_family(tmp_path):
    """With a limit: fewer steps and images, and no check that would begin later."""
    out = tmp_path / "gpu.json"
    argv = f"--tiny --device cpu --families sd15 --updates 2 --seconds 1 --out {out}".split()
    code, _, error = run_inside(argv, "benchmarks/gpu.py")
    assert code == 0, error
    record = json.loads(out.read_text())["sd15"]
    assert 2 <= record["settings"]["steps"] < 50 and record["settings"]["sample_batch"] == 8
    assert record["checks"]["our images = stock images, float32"] == "not measured: 1 seconds had passed"


def test_families_measured_before_are_kept(tmp_path, monkeypatch):
    checks = {"the measured run ends": "ok"}
    monkeypatch.setattr(gpu, "measure", lambda name, options, rate: {"of": name, "checks": checks})
    monkeypatch.setattr(gpu, "show", lambda name, record: None)
    out = tmp_path / "gpu.json"
    for name in ("sd15", "sdxl"):
        monkeypatch.setattr(sys, "argv", f"gpu.py --tiny --device cpu --families {name} --out {out}".split())
        gpu.main()
    stored = json.loads(out.read_text())
    assert {name: record["of"] for name, record in stored.items()} == {"sd15": "sd15", "sdxl": "sdxl"}
    out.write_text(json.dumps(stored | {"sd15": stored["sd15"] | {"device": "another"}}))
    gpu.main()
    stored = json.loads(out.read_text())
    assert {name: record["device"] for name, record in stored.items()} == {"sd15": "another", "sdxl": "cpu"}


def test_a_run_that_fails_keeps_what_was_measured(tmp_path, monkeypatch):
    """As after a CUDA error: the phases before it are stored, and no other family is begun."""

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    monkeypatch.setattr(graft, "denoising_loss", broken)
    out = tmp_path / "gpu.json"
    argv = "--tiny --device cpu --families sd15 sdxl --steps 2 --images 16 --updates 2 --out".split()
    monkeypatch.setattr(sys, "argv", ["gpu.py", *argv, str(out)])
    with pytest.raises(SystemExit, match="device may be unusable"):
        gpu.main()
    families = json.loads(out.read_text())
    assert list(families) == ["sd15"]
    phases = [phase["phase"] for phase in families["sd15"]["phases"]]
    assert phases == ["load, encode prompts", "evaluate base", "sample 1", "stock pipeline call"]
    assert families["sd15"]["checks"]["the measured run ends"] == (
        "FAILED: CUDA error: an illegal memory access"
    )


def test_attention_of_cudnn_is_off():
    """Its backward pass ended FLUX's update."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    given = {"model": common.EMBEDDED, "model_config": "", "height": None, "width": None, "t5": False}
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        common.load_model(SimpleNamespace(device="cpu", dtype="float32", **given))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_bad_options(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for argv, named in (([], "no CUDA device found"), ("--device cpu --images 10".split(), "--images")):
        code, _, error = run_inside(argv, "benchmarks/gpu.py")
        assert code == 2 and named in error


class Card(str):
    """The CPU that says it is a CUDA device."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"


@pytest.fixture
def card(monkeypatch):
    """A device on which the script takes its CUDA branches. mode: how torch is to treat waits for it."""
    state = SimpleNamespace(device=Card("cpu"), mode="default", fractions=[])
    used = iter(range(10**9, 10**12, 10**9))
    fakes = {name: lambda: None for name in ("empty_cache", "synchronize", "reset_peak_memory_stats")}
    fakes |= {
        "max_memory_allocated": lambda: 2e9,
        "max_memory_reserved": lambda: next(used),
        "memory_reserved": lambda: 10**9,
    }
    fakes |= {
        "mem_get_info": lambda: (84 * 10**9, 86 * 10**9),
        "set_sync_debug_mode": lambda mode: setattr(state, "mode", mode),
    }
    fakes |= {"get_device_properties": lambda index: SimpleNamespace(total_memory=86 * 10**9)}
    fakes |= {"set_per_process_memory_fraction": state.fractions.append}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_cuda_branches(card, monkeypatch):
    options = SimpleNamespace(device=card.device, tiny=True, images=16, steps=2, updates=2, seconds=0)
    record = gpu.measure("sd15", options, 1e12)
    assert [phase["reserved"] for phase in record["phases"]] == [3, 4, 5, 6, 7, 2]
    checks = record["checks"]
    assert checks["no wait inside the sampler's loop"] == "ok" and card.mode == "default"
    refused = "FAILED: --dtype float16 needs a CUDA device"  # so says graft.py itself
    assert checks["20 updates in float16"].startswith(refused)
    assert checks["memory target"].startswith(
        "met: 8 GB, of which 1.00 are outside torch; ok: 2 updates, at most "
    )
    assert card.fractions[:2] == [pytest.approx(7 / 86), 1.0]

    def too_much(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "run_graft", too_much)
    target = gpu.check_target([], card.device, 8.0)
    assert target.startswith("missed: 8 GB") and target.endswith("FAILED: out of memory")
    assert gpu.check_target([], card.device, None) == "not measured: none is set"


@pytest.mark.parametrize("script_encodes", [False, True])
def test_a_wait_inside_the_loop_is_found(card, models, tiny_epsilon, monkeypatch, script_encodes):
    """With guidance, nothing may go from main memory to the device inside the loop. An encoded text would."""

    def encode(model, prompts, original=common.Model.encode):
        if card.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return original(model, prompts)

    monkeypatch.setattr(common.Model, "encode", encode)
    if script_encodes:

        def predict(model, x, t, text, guidance):
            return model.predict(x, t, model.encode([""]))

        monkeypatch.setattr(graft, "guided_prediction", predict)
    args = SimpleNamespace(guidance=3.0, eta=1.0)
    model = common.Model(tiny_epsilon, card.device, torch.float32)
    answer = gpu.check_no_wait(model, ["a red circle"], args)
    assert answer.startswith("FAILED: waits in graft.py, line ") if script_encodes else answer == "ok"
    assert card.mode == "default"
