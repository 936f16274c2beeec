"""The run around a method: arguments and --resume, the run folder and its lock, checkpoints, metrics and
result files.

Nothing here is a step of a method, so a reader who studies one can skip this file.
"""

import argparse
import csv
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import typing
import zipfile
from pathlib import Path

import filelock
import huggingface_hub as hub
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

LOCK_FILE, INPUTS_FILE = ".lock", "inputs.json"  # in the run folder
DEVICES = ("device", "reward_device")  # settings that do not belong to a run
MODEL_ENDINGS = (".json", ".txt", ".model", ".safetensors", ".bin", ".pth", ".pt")  # of a model's files
HASHED_BYTES = 64 * 2**20  # of a file: reading all of a large model would take minutes
LONGER = "rounds"  # the setting of which a resumed run can be given more; nothing may depend on the total
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

    With --resume the stored arguments are the defaults. InputError if another value is given beside it, other
    than more rounds and DEVICES: a run goes on on another device, and on one that is there.
    """

    options = {"args": argv, "use_underscores": True, "config": (tyro.conf.DisallowNone,)}
    # read before tyro does: combinations are to be checked with the stored values, not with the defaults
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", default="")
    folder = parser.parse_known_args(argv)[0].resume
    if not folder:
        return tyro.cli(args_class, **options)
    stored = stored_arguments(args_class, folder)
    missing = [name for name in DEVICES if not has_device(getattr(stored, name, "cpu"))]
    default = dataclasses.replace(stored, **dict.fromkeys(missing, "auto"))
    args = tyro.cli(args_class, default=default, **options)
    for field in dataclasses.fields(args_class):
        given, kept = getattr(args, field.name), getattr(stored, field.name)
        if given != kept and field.name in DEVICES:
            there = "the device there is" if given == "auto" else given
            print(f"--{field.name}: the run in {folder} began on {kept} and goes on on {there}", flush=True)
        elif given != kept and not (field.name == LONGER and given > kept):
            raise InputError(
                f"--{field.name} {given} differs from the run in {folder} ({kept}): "
                + ("give more, " if field.name == LONGER else "")
                + "leave it out, or start a new run"
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
        own = script_of(args_class)
        if values.pop("script", own) != own:  # older runs do not say
            raise ValueError(f"{own}.py did not begin it")
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


def script_of(args_class) -> str:
    """The name of the script that holds the class of its arguments."""
    return Path(sys.modules[args_class.__module__].__file__).stem


def has_device(name: str) -> bool:
    """Whether this machine can use the device "cuda" or "mps"; True for "cpu" and "auto"."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    return name not in backends or backends[name].is_available()


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
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot print a character gets \\x.. for it
        sys.stdout.reconfigure(errors="backslashreplace")
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
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program is ending: another Ctrl-C says nothing
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
    start = ["torchrun", "--nproc_per_node", str(LOCAL_SIZE)] if LAUNCHED else ["python"]
    command = shlex.join([*start, sys.argv[0], "--resume", str(folder)])
    hint = f"Continue with: {command}" if begun else "Nothing was written."
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
            f"--output {output}: holds a run already; continue it with --resume {shlex.quote(output)}, or "
            "give a new one"
        )
    raise InputError(f"--output {output}: exists and is not a run; give a new folder")


def make_run_folder(args, script: str, model: str, seed: int, inputs: dict | None = None) -> Path:
    """The folder of this run, with args.json: --resume, --output, or a new one under runs/. It is locked
    until the process ends or makes another. inputs: what check_inputs returned, stored in inputs.json.
    InputError if another process has the folder. Under torchrun only the first process makes and locks it."""
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
            write_json(folder / "args.json", {"script": script_of(type(args))} | dataclasses.asdict(args))
        elif hasattr(args, LONGER):
            lengthen(folder, args)
    except OSError as error:
        if args.resume:
            raise  # run_script says what to do
        raise InputError(
            f"--output {folder}: cannot be written ({error.strerror}); give another folder"
        ) from None
    if inputs is not None and not (folder / INPUTS_FILE).exists():
        write_json(folder / INPUTS_FILE, inputs)
    return folder


def lengthen(folder: Path, args) -> None:
    """Store that a resumed run has more rounds, if it has. The results of the fewer rounds are kept."""
    stored = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    if LONGER in stored and stored[LONGER] < getattr(args, LONGER):
        if (folder / "results.json").exists():
            os.replace(folder / "results.json", folder / f"results_{stored[LONGER]}_{LONGER}.json")
        write_json(folder / "args.json", stored | {LONGER: getattr(args, LONGER)})


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


# ---------------------------------------------------------------- what a run reads


def check_inputs(resume: str, names: list) -> dict[str, str]:
    """hash_inputs of what a run reads. InputError, naming the file, if one differs from what the run in the
    folder `resume` began with; one line if that run has stored no hashes."""
    hashes = hash_inputs(names)
    if not resume:
        return hashes
    path = Path(resume) / INPUTS_FILE
    if not path.is_file():
        print(
            f"warning: --resume {resume}: has no {INPUTS_FILE}, as older runs: whether its prompts, images, "
            "rewards and model are those that it began with is not known; from now on it is checked",
            file=sys.stderr,
        )
        return hashes
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise InputError(f"--resume {resume}: {INPUTS_FILE} is damaged; start a new run") from None
    changed = [name for name in stored | hashes if stored.get(name) != hashes.get(name)]
    if changed:
        others = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        happened = "changed" if changed[0] in stored else "added"
        happened = happened if changed[0] in hashes else "removed"
        raise InputError(
            f"--resume {resume}: {changed[0]}{others} was {happened} after the run began; put that back, or "
            "start a new run"
        )
    return hashes


def hash_inputs(names: list) -> dict[str, str]:
    """{file: SHA-256 of its size and its first HASHED_BYTES} of the files `names`, and of the model files in
    those that are folders and in their subfolders. Of a hub id {id: its commit in the cache}."""
    hashes = {}
    for name in (str(name) for name in names if str(name)):
        files = [Path(name)] if Path(name).is_file() else []
        if Path(name).is_dir():
            folders = [Path(name), *(f for f in Path(name).iterdir() if f.is_dir())]
            folders = (f for f in folders if not (f / "args.json").exists())  # a run
            inside = (file for folder in folders for file in folder.iterdir())
            files = sorted(file for file in inside if file.suffix in MODEL_ENDINGS and file.is_file())
        elif not files and re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # perhaps an id of the hub
            cached = hub.try_to_load_from_cache(name, "model_index.json")
            hashes |= {name: Path(cached).parent.name} if isinstance(cached, str) else {}
        for file in files:
            with open(file, "rb") as content:
                digest = hashlib.sha256(f"{file.stat().st_size} ".encode() + content.read(HASHED_BYTES))
            hashes[str(file)] = digest.hexdigest()
    return hashes


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
    if not of_one_run(state.pop("args", None), (folder / "args.json").read_text(encoding="utf-8")):
        raise InputError(f"{prefix} was made with another args.json; put that back, or start a new run")
    return state


def of_one_run(before: str | None, now: str) -> bool:
    """Whether two contents of args.json are equal, or differ in that the newer one has more rounds."""
    if before is None or before == now:
        return before == now
    old, new = json.loads(before), json.loads(now)
    return old.get(LONGER, math.inf) < new.get(LONGER, 0) and old | {LONGER: 0} == new | {LONGER: 0}


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
        forget_evaluation(args, folder, state)
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


def forget_evaluation(args, folder: Path, state: dict) -> None:
    """Take the newest round's evaluation out of the metrics, if it was made only because the run ended there
    and has been given more rounds since."""
    done = state["round"]
    if done in (0, args.rounds) or args.eval_every and done % args.eval_every == 0:
        return
    row = state["rows"][done - 1]
    evaluated = [name for name in row if name.endswith("_held_out") and not math.isnan(row[name])]
    if evaluated:
        row.update(dict.fromkeys(evaluated, math.nan))
        log_metrics(folder, state["rows"][:done], done, state["seconds"])


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
