"""Runs of scripts, one after the other in the same processes. tests/test_torchrun.py starts it with torchrun:
torchrun ... several_runs.py runs.json. To start the processes takes longer than such a run."""

import contextlib
import errno
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from utils import processes, runs  # noqa: E402


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def press_ctrl_c():
    """The terminal sends it to torchrun, which passes it on."""
    os.kill(os.getppid(), signal.SIGINT)


def interrupt():
    raise KeyboardInterrupt


def fill_disk():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail():
    raise ValueError("too hot")


ACTIONS = {action.__name__: action for action in (kill, press_ctrl_c, interrupt, fill_disk, fail)}


@contextlib.contextmanager
def struck(module, name, number, action):
    """Inside, an action, one of ACTIONS, comes before the number-th call of module.name."""
    owner = importlib.import_module(module)
    original, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(1)
        if len(calls) == number:
            ACTIONS[action]()
        return original(*args, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def recorded(name, scale=None):
    """Inside, <name>_<rank>.pt gets the weights before each step of the optimiser, and the gradients that the
    step was given. scale: of the gradients at first, as with float16."""
    steps = []

    def record(optimizer, *_):
        (group,) = optimizer.param_groups
        weights = torch.cat([p.detach().flatten() for p in group["params"]])
        steps.append((weights, torch.cat([p.grad.flatten() for p in group["params"]])))

    hook, scaler = register_optimizer_step_pre_hook(record), torch.amp.GradScaler
    if scale:
        torch.amp.GradScaler = lambda device, enabled: scaler(device, init_scale=scale)
    try:
        yield
    finally:
        hook.remove()
        torch.amp.GradScaler = scaler
    torch.save(steps, f"{name}_{processes.RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs.end_processes = lambda: None  # all runs use one connection
    Figure.savefig = lambda *_, **__: None  # it takes longer than all the rest
    for run in json.loads(Path(sys.argv[1]).read_text()):
        with contextlib.ExitStack() as stack:
            rank, *fault = run.get("fault", [None])
            if rank == processes.RANK:
                stack.enter_context(struck(*fault))
            stack.enter_context(recorded(run["name"], run.get("scale")))
            sys.argv = [run["script"], *run["argv"]]
            runpy.run_path(str(ROOT / run["script"]), run_name="__main__")
    processes.end_processes()
