"""The run around a method: arguments and --resume, the run folder and its lock, checkpoints, metrics and
result files.

Nothing here is a step of a method, so a reader who studies one can skip this file.
"""

import argparse
import csv
import dataclasses
import errno
import io
import json
import os
import re
import sys
import threading
import time
import traceback
import typing
import zipfile
from pathlib import Path

import filelock
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter

from utils.processes import (
    FIRST,
    LAUNCHED,
    LOCAL_SIZE,
    SIZE,
    ProcessLost,
    end_processes,
    first_to_report,
    leave,
    one_voice,
    start_processes,
)

LOCK_FILE = ".lock"  # in the run folder
# what a full, read-only or broken disk says; anything else is a bug
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of some network file systems
LOCKS: list[filelock.FileLock] = []  # the lock of the newest run folder; none or one
WRITERS: list[SummaryWriter] = []  # its tensorboard writer; none or one


class InputError(Exception):
    """The user gave something wrong. The message is one line that names it and the fix."""


# ---------------------------------------------------------------- arguments


def check_range(args, name: str, least: float, most: float) -> None:
    """InputError unless least <= args.name <= most. None passes: the setting was left out."""
    value = getattr(args, name)
    if value is not None and not least <= value <= most:
        raise InputError(f"--{name} {value}: must be between {least} and {most}")


def parse_arguments(args_class, argv: list[str] | None = None):
    """Command line -> args_class, by tyro, which exits with code 2 if it cannot read the line.

    With --resume the stored arguments are the defaults. InputError if another value is given beside it.
    """

    options = {"args": argv, "use_underscores": True, "config": (tyro.conf.DisallowNone,)}
    # read before tyro does: combinations are to be checked with the stored values, not with the defaults
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", default="")
    folder = parser.parse_known_args(argv)[0].resume
    if not folder:
        return tyro.cli(args_class, **options)
    stored = stored_arguments(args_class, folder)
    args = tyro.cli(args_class, default=stored, **options)
    for field in dataclasses.fields(args_class):
        given, kept = getattr(args, field.name), getattr(stored, field.name)
        if given != kept:
            raise InputError(
                f"--{field.name} {given} differs from the run in {folder} ({kept}): "
                "leave it out, or start a new run"
            )
    return args


def stored_arguments(args_class, folder: str):
    """The arguments of the run in `folder`. InputError if there is no run, or one of another script."""
    file = Path(folder) / "args.json"
    if not file.is_file():
        raise InputError(
            f"--resume {folder}: no run there (no args.json); give the folder that the run printed"
        )
    types = typing.get_type_hints(args_class)
    try:
        values = json.loads(file.read_text(encoding="utf-8")) | {"resume": folder}
        for name, value in values.items():
            if isinstance(value, list):  # JSON has no tuples
                values[name] = value = tuple(value)
            if not has_type(value, types[name]):
                raise ValueError(f"{name} is {value!r}")
        return args_class(**values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"--resume {folder}: args.json is damaged or of another script ({error}); start a new run"
        ) from None


def has_type(value, kind) -> bool:
    """Whether a value from JSON suits the type of a dataclass field."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return value in choices
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(has_type(item, choices[0]) for item in value)
    if choices:  # a union
        return any(has_type(value, choice) for choice in choices)
    return isinstance(value, (int, float) if kind is float else kind)


def run_script(main, args_class, shared: bool = False) -> None:
    """main(args) with the arguments of the command line. shared: torchrun may start it in several processes.

    InputError, a full or read-only disk and lack of memory end the program with one line and exit code 2;
    Ctrl-C with 130. The line says how to continue the run, if there is one. An error in one process ends all.
    """
    # tensorboard's thread prints an OSError that is raised in the main thread too
    threading.excepthook = lambda hook: isinstance(hook.exc_value, OSError) or threading.__excepthook__(hook)
    try:
        try:
            start_processes()
            with one_voice():
                if SIZE > 1 and not shared:
                    raise InputError(
                        f"{sys.argv[0]} uses one process; start it with python, not with torchrun"
                    )
                main(parse_arguments(args_class))
            end_processes()
        except ProcessLost:  # by now torchrun is ending this one too, if they were on one machine
            time.sleep(5)
            raise
    except SystemExit as stop:  # tyro has printed what was wrong, or the help
        leave(stop.code or 0)
    except (KeyboardInterrupt, Exception) as error:
        text, code = last_words(error)
        reports = FIRST if isinstance(error, KeyboardInterrupt) else first_to_report()
        if reports and text:
            print("" if FIRST else "\n", text, sep="", file=sys.stderr)  # below the first one's progress bar
        elif reports and not LAUNCHED:
            raise
        elif reports:
            traceback.print_exception(error)
        leave(code)


def last_words(error: BaseException) -> tuple[str, int]:
    """(what to print about it, exit code). An error that is neither the user's nor the machine's has no
    words: its traceback says more."""
    message = " ".join(str(error).split())
    if isinstance(error, InputError):
        return f"error: {message}", 2
    if isinstance(error, ProcessLost):
        return f"error: another process has ended or cannot be reached ({message})", 1
    of_memory = "out of memory|can't allocate memory"  # CUDA's words, the CPU's
    if isinstance(error, MemoryError) or re.search(of_memory, message):
        return f"error: out of memory ({message}): lower the batch sizes", 2
    folder = Path(LOCKS[0].lock_file).parent if LOCKS else None
    begun = folder and (folder / "args.json").is_file()
    start = f"torchrun --nproc_per_node {LOCAL_SIZE}" if LAUNCHED else "python"
    hint = f"Continue with: {start} {sys.argv[0]} --resume {folder}" if begun else "Nothing was written."
    hint = hint if FIRST else ""  # only the first process knows
    if isinstance(error, KeyboardInterrupt):
        return f"\ninterrupted. {hint}", 130
    # libraries wrap the disk's errors in their own
    if any(os.strerror(code) in str(error) for code in DISK_ERRORS):
        return f"error: {message}: make room or allow access; nothing saved is lost. {hint}", 2
    return "", 1


# ---------------------------------------------------------------- the run folder


def check_output(output: str, resume: str) -> None:
    """InputError if --output holds anything already (unless the run is resumed) or cannot be made."""
    if resume or not FIRST:  # the first may have made the folder already
        return
    path = Path(output)
    parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(
            f"--output {output}: {parent} is no folder that can be written to; give a new folder"
        )
    # a run that was killed at its very beginning may have left these two files
    if not output or not path.exists() or {p.name for p in path.iterdir()} <= {"args.json.part", LOCK_FILE}:
        return
    if (path / "args.json").is_file():
        raise InputError(
            f"--output {output}: holds a run already; continue it with --resume {output}, or give a new one"
        )
    raise InputError(f"--output {output}: exists and is not a run; give a new folder")


def make_run_folder(args, script: str, model: str, seed: int) -> Path:
    """The folder of this run, with args.json: --resume, --output, or a new one under runs/. It is locked
    until the process ends or makes another. InputError if another process has it. Under torchrun only the
    first process makes and locks it."""
    default = f"runs/{script}__{Path(model).name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.resume or args.output or default)
    while WRITERS:
        WRITERS.pop().close()
    if not FIRST:
        return folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, "--resume" if args.resume else "--output")
        if not args.resume:
            check_output(str(folder), "")  # again: another process may have been faster
            write_json(folder / "args.json", dataclasses.asdict(args))
    except OSError as error:
        if args.resume:
            raise  # run_script says what to do
        raise InputError(
            f"--output {folder}: cannot be written ({error.strerror}); give another folder"
        ) from None
    return folder


def lock(folder: Path, flag: str) -> None:
    """Keep other processes out of `folder`.
    The system releases the lock with the process, even a killed one."""
    while LOCKS:
        LOCKS.pop().release()
    # a soft lock would outlive a killed process
    LOCKS.append(filelock.FileLock(folder / LOCK_FILE, fallback_to_soft=False))
    try:
        LOCKS[0].acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(
            f"{flag} {folder}: in use by another process; wait for it, or give another folder"
        ) from None
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        print(
            f"warning: {folder} cannot be locked ({error.strerror}); start no second run in it",
            file=sys.stderr,
        )


# ---------------------------------------------------------------- files that are whole or not there
# under torchrun only the first process writes them


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, fsync, rename: at every moment `path` is the old file or the new one, never a part."""
    if not FIRST:
        return
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, content) -> None:
    """Atomically write JSON."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Atomically write rows with the first row's columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def save_checkpoint(folder: Path, state: dict, name: str = "checkpoint.pt") -> None:
    """Atomically write `state` (tensors, numbers, strings, lists,
    dicts) and the run's arguments to folder/name."""
    if not FIRST:
        return
    buffer = io.BytesIO()
    torch.save(state | {"args": (folder / "args.json").read_text(encoding="utf-8")}, buffer)
    write_atomically(folder / name, buffer.getvalue())


def load_checkpoint(folder: Path, name: str = "checkpoint.pt") -> dict | None:
    """The newest state that save_checkpoint wrote; None if there is none yet. InputError if the checkpoint is
    corrupt or was made with another args.json."""
    path, prefix = folder / name, f"--resume {folder}: {name}"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:  # torch does not look at the checksums
            if file.testzip():
                raise ValueError("checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise InputError(f"{prefix} is damaged ({type(error).__name__}: {error}); start a new run") from None
    if state.pop("args", None) != (folder / "args.json").read_text(encoding="utf-8"):
        raise InputError(f"{prefix} was made with another args.json; put that back, or start a new run")
    return state


def restore(
    args, folder: Path, model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> tuple:
    """(state, save) of a run that tunes a LoRA.

    state: a new one, or with --resume the stored one; then the LoRA, the optimiser and the scaler are
    restored too. save(): write `state`, the LoRA, the optimiser and the scaler to the checkpoint.
    """
    state = load_checkpoint(folder) if args.resume else None
    if state:
        for name, parameter in model.lora().items():
            parameter.data.copy_(state["lora"][name])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    else:
        state = {"round": 0, "rows": [], "losses": [], "accepted": [], "seconds": 0.0}
    start = time.perf_counter() - state["seconds"]

    def save():
        state.update(
            lora={n: p.detach().cpu() for n, p in model.lora().items()}, optimizer=optimizer.state_dict()
        )
        state.update(scaler=scaler.state_dict(), seconds=time.perf_counter() - start)
        save_checkpoint(folder, state)

    return state, save


# ---------------------------------------------------------------- metrics and results


def log_metrics(folder: Path, rows: list[dict], step: int, seconds: float) -> None:
    """metrics.csv with all rows; the newest row also to TensorBoard. Elapsed time goes only to TensorBoard,
    so that metrics.csv is reproducible."""
    if not FIRST:
        return
    write_csv(folder / "metrics.csv", rows)
    if not WRITERS:
        WRITERS.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step))
    for name, value in (rows[-1] | {"seconds": seconds}).items():
        WRITERS[0].add_scalar(name, value, step)
    WRITERS[0].flush()


def paired_table(base: dict, tuned: dict, columns: tuple = ("base", "tuned", "difference")) -> list[dict]:
    """Rows {metric, *columns, se} of {metric: (prompts,)}.
    se: standard error over prompts of the mean difference."""
    rows = []
    for name in base:
        change = tuned[name] - base[name]
        values = (base[name].mean(), tuned[name].mean(), change.mean(), change.std() / len(change) ** 0.5)
        rows.append({"metric": name} | dict(zip((*columns, "se"), map(float, values))))
    return rows


def print_table(table: list[dict], title: str, remark: str = "") -> None:
    """Print what paired_table returned."""
    _, first, second, *_ = table[0]
    print(f"\n{title:<34}{first:>9}{second:>9}{'difference':>12}   s.e.{remark}")
    for metric, base, tuned, difference, se in (row.values() for row in table):
        print(f"{metric:<34}{base:>9.3f}{tuned:>9.3f}{difference:>+12.3f}  {se:.3f}")


def write_results(folder: Path, base: dict, tuned: dict, reward: str, seconds: float, **extra) -> None:
    """results.json with the paired table of {metric: (prompts,)} and `extra`. The table is printed too."""
    table = paired_table(base, tuned)
    write_json(folder / "results.json", {"table": table, "seconds": seconds, **extra})
    print_table(table, "held-out prompts", f"   ({reward} was optimised)")


def save_accepted(
    folder: Path, model, latents: torch.Tensor, rounds: list[dict], prompts: list[str], batch: int
) -> None:
    """Write the accepted images of the newest round, and metadata.jsonl (file_name, text, reward) of all
    rounds.

    latents: clean (n, c, h, w) of the newest round. rounds: {prompt (n,), reward (n,)} of each round, and
    {sample (n,)} if the file names are to hold the numbers of prompt and sample.
    """
    if not FIRST:
        return
    folder = folder / "accepted"
    folder.mkdir(exist_ok=True)
    rows = []
    for number, accepted in enumerate(rounds, 1):
        labels = [f"{i:06d}" for i in range(len(accepted["prompt"]))]
        if "sample" in accepted:
            pairs = zip(accepted["prompt"].tolist(), accepted["sample"].tolist())
            labels = [f"{prompt:06d}_{sample:03d}" for prompt, sample in pairs]
        for label, prompt, reward in zip(labels, accepted["prompt"].tolist(), accepted["reward"].tolist()):
            rows.append(
                {"file_name": f"round{number:03d}_{label}.png", "text": prompts[prompt], "reward": reward}
            )
    newest = rows[-len(latents) :]
    for i in range(0, len(newest), batch):
        for row, image in zip(newest[i:], model.decode(latents[i : i + batch])):
            image.save(folder / row["file_name"])
    write_atomically(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
