"""Runs in several processes, started by torchrun, equal the run in one process. Errors end all processes.

Whole batches of images are shared out, so an image is computed in the same batch, whatever the number of
processes: it is the same to the last bit. Sums of gradients are the same but for rounding.
"""

import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure

import common
from common import check_device
from conftest import ROOT, assert_one_line, environment, read_metrics, run_inside
from several_runs import recorded, struck
from utils import processes, runs
from utils.processes import gather, own_share, sum_gradients
from utils.runs import InputError

SHARED = "--device cpu --prompts train.txt --eval_prompts held_out.txt --eval_samples 2 --guidance 1"
SHARED += " --reward own.py:likes --eval_rewards jpeg_compressibility"
TUNE = f"{SHARED} --rounds 2 --updates 2 --lora_rank 4 --lr 1e-3 --steps 4"
# 7 prompts x 4 images in 10 batches, 7 images an update, two batches of evaluation
GRAFT = f"{TUNE} --prompts_per_round 7 --samples 4 --sample_batch 3 --batch 7 --micro_batch 7"
GRAFT += " --rule exponential --beta 3"
# fewer prompts, batches and images an update than processes
PGRAFT = f"{TUNE} --prompts_per_round 2 --samples 4 --sample_batch 8 --batch 2 --micro_batch 1 --data xs"
PGRAFT += " --probe_prompts 7 --probe_restarts 2 --probe_limit 1"
NOISE = f"{SHARED} --iterations 2 --prompts_per_iteration 7 --samples 2 --sample_batch 3 --minibatch 5"
NOISE += " --eval_every 1 --eval_steps 2 --lr 1e-3 --steps 4"
RUNS = {  # name: script, its arguments, scale of the gradients
    "graft": ("graft.py", GRAFT, None),
    "scaled": ("graft.py", GRAFT + " --rounds 1 --updates 9 --lora_alpha 3000", 2.0**127),
    "pgraft": ("pgraft.py", PGRAFT, None),
    "noise_ppo": ("noise_ppo.py", NOISE, None),
}
OWN = '''
import numpy as np


def likes(images, prompts):
    """It sees in which batch an image is."""
    return [np.asarray(i, float).mean() + len(p) / 9 + len(images) for i, p in zip(images, prompts)]
'''
KINDS = ("circle left of a blue square", "square above a red circle", "square right of a red square")
SECOND_ROUND = ("torch.nn.utils", "clip_grad_norm_", 3)  # a call in its first update


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """A folder with prompts and a reward."""
    folder = tmp_path_factory.mktemp("torchrun")
    prompts = [f"a {colour} {rest}" for rest in KINDS for colour in ("red", "green", "blue")]
    (folder / "train.txt").write_text("\n".join(prompts[:7]))
    (folder / "held_out.txt").write_text("\n".join(prompts[7:]))
    (folder / "own.py").write_text(OWN)
    return folder


def torchrun(number, cwd, steps):
    """The runs `steps` of several_runs.py, one after the other, in so many processes."""
    (cwd / "runs.json").write_text(json.dumps(steps))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    start += [str(ROOT / "tests" / "several_runs.py"), "runs.json"]
    return subprocess.run(start, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=200)


def one_run(name, model, output):
    script, settings, scale = RUNS[name]
    argv = ["--model", model, *settings.split(), "--output", output]
    return {"script": script, "argv": argv, "name": output, "scale": scale}


def state_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_close(one, other, bound):
    """Vectors whose distance is at most so small a part of their length."""
    assert (one - other).norm() <= bound * one.norm()


# ---------------------------------------------------------------- sharing, without other processes


@pytest.mark.parametrize("size, count", [(1, 3), (2, 7), (3, 7), (3, 2), (4, 0), (8, 9)])
def test_shares_make_the_whole(monkeypatch, size, count):
    """Each item is in one share, shares are as even as can be, and gathered they have their order again."""
    monkeypatch.setattr(processes, "LAUNCHED", True)
    monkeypatch.setattr(processes, "SIZE", size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(processes, "RANK", rank)
        shares.append(own_share(range(count)))
        assert own_share(torch.arange(count)).tolist() == list(shares[-1])
    assert sorted(i for share in shares for i in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    made = [[f"made of {i}" for i in share] for share in shares]

    def all_gather_object(everything, mine):
        assert mine in made
        everything[:] = made

    monkeypatch.setattr(processes.dist, "all_gather_object", all_gather_object)
    for mine in made:
        assert gather(mine) == [f"made of {i}" for i in range(count)]


def test_sum_of_gradients(monkeypatch):
    """Over processes of which one had no image of the batch."""
    monkeypatch.setattr(processes, "LAUNCHED", True)
    monkeypatch.setattr(processes, "SIZE", 3)
    shapes = ((2, 3), (4,), ())
    parameters = [[torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(3)]
    for p in (*parameters[0], *parameters[1]):
        p.grad = torch.randn(p.shape)
    expected = [p.grad + q.grad for p, q in zip(*parameters[:2])]
    sent = []
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: sent.append(flat.clone()))
    for part, loss in zip(parameters, (1.5, 2.25, 0.0)):
        sum_gradients(part, loss)
    monkeypatch.setattr(processes.dist, "all_reduce", lambda flat: flat.copy_(sum(sent)))
    assert sum_gradients(parameters[2], 0.0) == 3.75
    for p, gradient in zip(parameters[2], expected, strict=True):
        assert p.grad.shape == gradient.shape and torch.allclose(p.grad, gradient, atol=1e-6)


# ---------------------------------------------------------------- as in one process


@pytest.fixture(scope="module")
def finished(cwd, tiny_v):
    """The folder of the runs alone/<name>, three/<name>, and three/begun, which one process began."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(Figure, "savefig", lambda *_, **__: None)  # it takes longer than all the rest
        with struck(*SECOND_ROUND, "interrupt"):
            code, _, error = run_inside(one_run("graft", tiny_v, "three/begun")["argv"])
        assert code == 130, error
        for name in RUNS:
            run = one_run(name, tiny_v, f"alone/{name}")
            (cwd / "alone").mkdir(exist_ok=True)
            with recorded(run["name"], run["scale"]):
                code, _, error = run_inside(run["argv"], run["script"])
            assert code == 0, error
    steps = [one_run(name, tiny_v, f"three/{name}") for name in RUNS]
    steps.append({"script": "graft.py", "argv": ["--resume", "three/begun"], "name": "three/begun"})
    done = torchrun(3, cwd, steps)
    assert done.returncode == 0, done.stderr
    settings = re.findall(r"^  model .*$", done.stdout, re.M)  # the first process alone has printed
    assert len(settings) == len(steps) and all("on cpu, 3 processes" in line for line in settings)
    assert "warning" not in done.stderr.lower()
    return cwd


@pytest.mark.parametrize("name", RUNS)
def test_updates(finished, name):
    """The same but for the order of sums; in the three processes the very same."""
    alone = torch.load(finished / "alone" / f"{name}_0.pt")
    three = [torch.load(finished / "three" / f"{name}_{rank}.pt") for rank in range(3)]
    assert len(alone) == len(three[0]) >= 2
    (weights, gradients), (other_weights, other_gradients) = alone[0], three[0][0]
    assert torch.equal(weights, other_weights)
    assert_close(gradients, other_gradients, 1e-5)
    assert_close(alone[1][0], three[0][1][0], 1e-5)  # after the first update
    for steps in zip(*three, strict=True):
        for vectors in zip(*steps):
            assert all(torch.equal(vectors[0], vector) for vector in vectors) and vectors[0].isfinite().all()


@pytest.mark.parametrize("name", ["graft", "pgraft"])
def test_first_round_is_the_same_to_the_last_bit(finished, name):
    alone, three = (state_of(finished / folder / name) for folder in ("alone", "three"))
    (one, *_), (other, *_) = alone["accepted"], three["accepted"]
    assert one.keys() == other.keys() and len(one["prompt"]) > 1
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert 0.1 < alone["rows"][0]["acceptance_rate"] < 0.9
    later = {"loss": pytest.approx(three["rows"][0]["loss"], rel=1e-6), "reward_held_out": 0}
    assert alone["rows"][0] | later == three["rows"][0] | {"reward_held_out": 0}
    assert name == "graft" or alone["probe"] == three["probe"]


def test_first_iteration_is_the_same_to_the_last_bit(finished):
    alone, three = (state_of(finished / folder / "noise_ppo")["rows"][0] for folder in ("alone", "three"))
    for key in ("reward", "explained_variance"):
        assert alone[key] == three[key]


@pytest.mark.parametrize("name", ["graft", "begun", "pgraft", "noise_ppo"])
def test_end_of_the_run(finished, name):
    """Whatever follows on the first update differs by rounding, and by pixels of 8 bits that it changes."""
    alone, three = finished / "alone" / name.replace("begun", "graft"), finished / "three" / name
    assert {p.name for p in alone.iterdir()} == {p.name for p in three.iterdir()}
    for one, other in zip(read_metrics(alone), read_metrics(three), strict=True):
        assert {k: float(v) for k, v in one.items()} == pytest.approx(
            {k: float(v) for k, v in other.items()}, rel=1e-3, abs=2e-3
        )
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (alone, three))
    for row, others in zip(one["table"], other["table"], strict=True):
        assert row.pop("metric") == others.pop("metric")
        assert row == pytest.approx(others, rel=1e-3, abs=1e-3)
    one, other = (json.loads((folder / "args.json").read_text()) for folder in (alone, three))
    assert one | {"output": ""} == other | {"output": ""}


def test_infinite_gradients_are_skipped_together(finished):
    one, other = (state_of(finished / folder / "scaled")["scaler"] for folder in ("alone", "three"))
    assert one == other and one["scale"] < 2.0**127


# ---------------------------------------------------------------- errors


def assert_ends(done, line):
    """torchrun failed, and the scripts printed one line of error."""
    assert done.returncode != 0
    error = done.stderr.replace("\r", "\n")
    said = [text for text in error.splitlines() if re.match("error:|interrupted|Traceback", text)]
    assert said.pop().startswith("Traceback")  # torchrun's own
    assert len(said) == (line != "") and re.fullmatch(line, "".join(said)), error


def test_killed_in_two_processes_and_resumed_in_one(finished, tiny_v, monkeypatch):
    run = one_run("graft", tiny_v, "killed") | {"fault": [1, *SECOND_ROUND, "kill"]}
    done = torchrun(2, finished, [run])
    assert_ends(done, "")
    assert "SIGKILL" in done.stderr
    monkeypatch.chdir(finished)
    code, _, error = run_inside(["--resume", "killed"])
    assert code == 0, error
    for one, other in zip(read_metrics(finished / "alone" / "graft"), read_metrics(finished / "killed")):
        assert {k: float(v) for k, v in one.items()} == pytest.approx(
            {k: float(v) for k, v in other.items()}, rel=1e-3, abs=2e-3
        )


FAULTS = {  # process, the call before which it happens, what happens; what is then printed
    "reward": (
        [1, "rewards", "jpeg_kilobytes", 1, "fail"],
        r"error: reward jpeg_compressibility: .*too hot.*",
    ),
    "disk": (
        [0, "utils.runs", "save_checkpoint", 1, "fill_disk"],
        r"error: .*No space left.* Continue with: torchrun --nproc_per_node 2 .*graft.py --resume disk",
    ),
    "ctrl_c": (
        [0, "rewards", "jpeg_kilobytes", 1, "press_ctrl_c"],
        r"interrupted\. Continue with: torchrun --nproc_per_node 2 .*graft.py --resume ctrl_c",
    ),
    "bug": ([1, "utils.runs", "parse_arguments", 1, "fail"], "Traceback.*"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_error_in_one_process_ends_all(cwd, tiny_v, name):
    fault, line = FAULTS[name]
    start = time.monotonic()
    assert_ends(torchrun(2, cwd, [one_run("graft", tiny_v, name) | {"fault": fault}]), line)
    assert time.monotonic() - start < 100  # nothing waits for a time limit


def test_an_error_of_all_is_printed_once(cwd, tiny_v):
    run = one_run("graft", tiny_v, "nothing")
    run["argv"] += ["--micro_batch", "5"]
    assert_ends(torchrun(2, cwd, [run]), "error: --micro_batch 5: must divide --batch 7")
    assert not (cwd / "nothing").exists()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(common, "LOCAL_SIZE", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        InputError, match="^--nproc_per_node 3: this machine has 2 CUDA devices; start as many"
    ):
        check_device("auto", "float32")
    assert check_device("cpu", "float32") == "cpu"


def test_a_script_of_one_process_is_refused(cwd, monkeypatch):
    monkeypatch.setattr(runs, "SIZE", 2)
    code, _, error = run_inside([], "inverse_noise_correction.py")
    assert_one_line(code, error, "inverse_noise_correction.py uses one process; start it with python")


ENDED = """
import atexit, os, sys
from dataclasses import dataclass
from utils.runs import run_script

@dataclass
class Args:
    pass

class Busy:
    def __del__(self, abort=os.abort):
        abort()

def main(args):
    sys.busy = Busy()
    atexit.register(print, "put in order")

run_script(main, Args, shared=True)
"""


def test_nothing_fails_after_the_end():
    """What is still busy when the interpreter ends, as threads of torch may be, makes no run fail. What was
    asked for at the end is done."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", ENDED]
    # without torchrun the interpreter ends as always, which shows that the class does what it should
    for env, code in ((environment() | names, 0), (environment(), -signal.SIGABRT)):
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
        assert (done.returncode, done.stdout) == (code, "put in order\n"), done.stderr
