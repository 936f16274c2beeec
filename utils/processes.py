"""The processes that torchrun starts: which one this is, sharing work out, gathering it, summing gradients.

Without torchrun there is one process, and nothing here does anything. Under it every process runs the whole
script with the same arguments. It computes its share of the images and has everything else in full.
"""

import atexit
import contextlib
import os
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # what torchrun tells its processes
LAUNCHED = all(name in os.environ for name in NAMES)
# this process's number, of how many; the same on this machine
RANK, SIZE, LOCAL_RANK, LOCAL_SIZE = (int(os.environ[name]) for name in NAMES) if LAUNCHED else (0, 1, 0, 1)
FIRST = RANK == 0  # it alone prints, draws and writes
TIMEOUT = timedelta(hours=2)  # to wait for the others, which may have a batch more, or a folder to write
STORES: list = []  # what all processes read and write, kept by torchrun itself; none or one


class ProcessLost(Exception):
    """Another process has ended, or cannot be reached."""


def start_processes() -> None:
    """Connect the processes: nccl between CUDA devices, gloo between CPUs. From here on "cuda" means this
    process's own device. ProcessLost if they do not find each other."""
    if not LAUNCHED or STORES:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(LOCAL_RANK % torch.cuda.device_count())
    with others_needed():
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    STORES.append(store)


def end_processes() -> None:
    """Disconnect them, when all have come here, and end this one."""
    gather([])
    if LAUNCHED:
        dist.destroy_process_group()
        STORES.clear()
        atexit._run_exitfuncs()
        leave(0)  # in the interpreter's own end threads of torch may abort the process


@contextlib.contextmanager
def others_needed():
    """Around everything that waits for the other processes. ProcessLost if one of them has ended."""
    try:
        yield
    except RuntimeError as error:  # of gloo, nccl and the store
        raise ProcessLost(str(error)) from error


def several_processes() -> str:
    """For the settings that a run prints: ", 8 processes"; of one process nothing."""
    return f", {SIZE} processes" if SIZE > 1 else ""


def own_share(items):
    """This process's share of a list, a range or a tensor that all have: every SIZE-th item."""
    return items[RANK::SIZE]


def gather(items: list) -> list:
    """The items that all processes made of their shares, in the order of the whole."""
    if not LAUNCHED:
        return items
    shares = [None] * SIZE
    with others_needed():
        dist.all_gather_object(shares, items)
    return [shares[i % SIZE][i // SIZE] for i in range(sum(map(len, shares)))]


def sum_gradients(parameters: Iterable[torch.nn.Parameter], loss: float = 0.0) -> float:
    """Give each parameter the sum of its gradients in all processes. Returns the sum of the losses. One
    transfer."""
    if not LAUNCHED:
        return loss
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradients[0].new_tensor([loss]), *(g.flatten() for g in gradients)])
    with others_needed():
        dist.all_reduce(flat)
    total, *sums = flat.split([1, *(g.numel() for g in gradients)])
    for parameter, gradient in zip(parameters, sums):
        parameter.grad = gradient.view_as(parameter)
    return total.item()


# ---------------------------------------------------------------- one voice


@contextlib.contextmanager
def one_voice():
    """Inside, nothing is printed but by the first process."""
    with contextlib.ExitStack() as stack:
        if not FIRST:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def first_to_report() -> bool:
    """Whether no other process has asked this before: an error is printed once, whoever meets it."""
    try:
        return STORES[0].add("reported", 1) == 1 if STORES else FIRST
    except RuntimeError:  # torchrun has gone
        return FIRST


def leave(code: int) -> None:
    """End this process. torchrun then ends the others."""
    if LAUNCHED:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # nccl's own end would wait for the others
    sys.exit(code)
