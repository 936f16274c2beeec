"""Kill each script, interrupt it, fill its disk, damage its files, run it twice: is the result the same?

Run: python benchmarks/faults.py
It uses one CPU thread. Result: benchmarks/results/faults.json; exit code 1 if a case failed.
Every case is a short run on the embedded model. When it is resumed and ends, its files must equal those of an
uninterrupted run bit by bit. Each run is a process of its own, forked from one that has imported the
libraries. A full disk and a read-only folder are a small tmpfs where the user may mount one. Elsewhere they
are a limit on the size of files, and chmod.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import multiprocessing.forkserver
import os
import platform
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from pkgutil import resolve_name

ROOT = Path(__file__).resolve().parent.parent
SHARED = (
    "--device cpu --prompts ../train.txt --eval_prompts ../held_out.txt --reward shapes_graded "
    "--eval_rewards shapes_fit --steps 4 --samples 4 --eval_samples 2"
)
GRAFT = f"{SHARED} --rounds 2 --prompts_per_round 2 --updates 2 --batch 4 --micro_batch 4 --save_accepted"
NOISE = "--iterations 2 --prompts_per_iteration 2 --eval_every 1 --eval_steps 2 --minibatch 4"
CORRECTION = (
    "--device cpu --images 60 --sample_batch 20 --eval_images 30 --updates 4 --checkpoint_every 2 --batch 64 "
    "--max_failed 0.5 --eval_corrector_steps 2"
)
SCRIPTS = {  # the arguments of a short run that does everything
    "graft.py": GRAFT,
    "pgraft.py": f"{GRAFT} --probe_prompts 2 --probe_restarts 2 --probe_limit 1",
    "noise_ppo.py": f"{SHARED} {NOISE}",
    "inverse_noise_correction.py": CORRECTION,
}
WRITERS = ("os.fsync", "os.replace", "PIL.Image.Image.save", "safetensors.torch.save_file")
START, WRITE = ("common.check_model", 1), ("os.fsync", 3)
PHASES = {  # where Ctrl-C comes: the label of a progress bar, or (function, number of the call)
    "graft.py": [START, "evaluate base", "sample 1", "update 2", "evaluate 2", WRITE],
    "pgraft.py": [START, "probe", "evaluate base", "sample 2", "update 1", "evaluate 1", WRITE],
    "noise_ppo.py": [
        START,
        "evaluate standard noise",
        "sample 2",
        ("torch.minimum", 3),
        "evaluate 1",
        "4 steps, learnt",
        WRITE,
    ],
    "inverse_noise_correction.py": [
        ("common.check_flow", 1),
        "invert",
        "corrector",
        "longer",
        ("torch.linalg.eigvalsh", 3),
        WRITE,
    ],
}
# groups of cases; the name of a case holds the name of its group
GROUPS = ("kill -9", "Ctrl-C", "disk full", "read-only", "damaged", "at once")


# ---------------------------------------------------------------- a run in a process of its own


@functools.cache
def forkserver():
    """It starts processes that have imported torch and the scripts already."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*(script.removesuffix(".py") for script in SCRIPTS), "diffusers", "peft"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), before])  # Python 3.11 preloads without sys.path
    multiprocessing.forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


def strike_at(place, n, action=None, after=False):
    """Do `action` before or after a call of `place`, "module.function". n: the number of the call, or a
    progress bar's label. Returns a list that grows with every call."""
    owner, name = resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
    original, calls = getattr(owner, name), []

    def call(*args, **options):
        if any(isinstance(arg, io.IOBase) for arg in args):  # an image written to memory
            return original(*args, **options)
        calls.append(1)
        hit = n in (len(calls), options.get("desc"))
        if hit and not after:
            if action is kill and name == "fsync":  # half of the file is written
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            action()
        result = original(*args, **options)
        if hit and after:
            action()
        return result

    setattr(owner, name, call)
    return calls


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    """Ctrl-C a moment later, when the phase that begins is under way."""
    threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT)).start()


def child(script, argv, cwd, fault, file_limit):
    """`python <script> <argv>` in the folder cwd. fault: arguments of strike_at, or None. file_limit: in
    bytes, 0 for none."""
    os.chdir(cwd)
    for number in (1, 2):  # stdout and stderr go beside the folder, which may become full
        os.dup2(os.open(f"{cwd}.output{number}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    # a background shell may have told its children to ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    resolve_name("torch").set_num_threads(1)
    counted = {place: strike_at(place, 0) for place in WRITERS}
    if fault:
        strike_at(*fault)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [script, *argv]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    writes = {place: len(calls) for place, calls in counted.items()}
    Path("done.json").write_text(json.dumps({"writes": writes, "seconds": time.process_time()}))


def start(script, argv, cwd, fault=None, file_limit=0):
    """The process of a run, see `child`."""
    cwd.mkdir(exist_ok=True)
    process = forkserver().Process(target=child, args=(script, argv, str(cwd), fault, file_limit))
    process.start()
    return process


def run(*args, **options):
    """Exit code of a run; minus the signal's number if one ended it."""
    process = start(*args, **options)
    process.join()
    return process.exitcode


def kill_after(process, seconds):
    """kill -9 after so many seconds of computing. (Elapsed time would depend on the machine's other work.)"""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
        while process.is_alive():
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            times = fields[11:13]  # user, system
            if sum(map(int, times)) / os.sysconf("SC_CLK_TCK") >= seconds:
                process.kill()
            process.join(0.005)
    process.join()


# ---------------------------------------------------------------- what must hold


def plain(value):
    """A nested value without times and without the text of args.json, tensors as hashes: equal means equal
    bit by bit."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k not in ("seconds", "args")}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return hashlib.sha256(value.numpy().tobytes()).hexdigest() if hasattr(value, "numpy") else repr(value)


def content(path):
    """What a file must have in common with the same file of another run."""
    if path.suffix == ".pt":
        return plain(resolve_name("torch.load")(path, weights_only=True))
    if path.suffix == ".safetensors":  # in the file itself the metadata is in no fixed order
        return plain(resolve_name("safetensors.torch.load_file")(path))
    return plain(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def differences(folder, other):
    """Names of the files that differ between two runs, or that only one has. TensorBoard's are left out:
    their names differ."""
    names = {str(p.relative_to(f)) for f in (folder, other) for p in f.rglob("*") if p.is_file()}
    names = sorted(n for n in names if not n.startswith("tensorboard"))
    both = [n for n in names if (folder / n).is_file() and (other / n).is_file()]
    return [n for n in names if n not in both or content(folder / n) != content(other / n)]


def printed(cwd):
    """What the last run in cwd printed to stderr."""
    return Path(f"{cwd}.output2").read_bytes().decode()


def expect_line(code, cwd, wanted, *words):
    """The run ended with the exit code `wanted` and one line on stderr that holds the words."""
    text = printed(cwd)
    lines = [line.split("\r")[-1].strip() for line in text.split("\n")]
    lines = [line for line in lines if line and "%|" not in line]  # a progress bar that was cut short
    assert code == wanted, f"exit code {code}, not {wanted}: {text[-500:]}"
    one_line = len(lines) == 1 and all(word in lines[0] for word in words)
    assert one_line, f"not one line with {words}: {text[-500:]}"


def arguments(script):
    return [*SCRIPTS[script].split(), "--output", "run"]


def expect_same(script, cwd, reference):
    """The run in cwd, resumed, ends as the reference did. If it had not begun, it is started again."""
    code = run(script, ["--resume", "run"], cwd)
    if not (cwd / "run" / "args.json").exists():
        expect_line(code, cwd, 2, "--resume run", "no run there")
        code = run(script, arguments(script), cwd)
    assert code == 0, f"exit code {code}: {printed(cwd)[-500:]}"
    different = differences(cwd / "run", reference)
    assert not different, f"not as the uninterrupted run: {different}"


# ---------------------------------------------------------------- the cases


def killed_at(script, cwd, reference, seconds, again):
    """kill -9 after so much computing, and once more after `again` seconds of the resumed run."""
    kill_after(start(script, arguments(script), cwd), seconds)
    if again:
        kill_after(start(script, ["--resume", "run"], cwd), again)
    expect_same(script, cwd, reference)


def killed_writing(script, cwd, reference, place, n, after):
    """kill -9 before or after the n-th call of a function that writes."""
    assert run(script, arguments(script), cwd, (place, n, kill, after)) == -signal.SIGKILL
    expect_same(script, cwd, reference)


def interrupted(script, cwd, reference, phase):
    """Ctrl-C in a phase of PHASES."""
    place, n = ("tqdm.std.tqdm.__init__", phase) if isinstance(phase, str) else phase
    code = run(script, arguments(script), cwd, (place, n, interrupt))
    begun = (cwd / "run").exists()
    expect_line(code, cwd, 130, "interrupted", f"{script} --resume run" if begun else "Nothing was written.")
    expect_same(script, cwd, reference)


def mount(cwd, options):
    """Mount a tmpfs at cwd, or change its options. False where the user may not."""
    cwd.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(cwd)]
    return subprocess.run(command, capture_output=True).returncode == 0


def full_disk(script, cwd, reference, share):
    """First there is room for this share of the run only, then room enough."""
    sizes = [p.stat().st_size for p in reference.rglob("*") if p.is_file()]
    method, message, limit = "tmpfs", "No space left on device", 0
    if not mount(cwd, f"size={int(share * sum(sizes))}"):
        method, message, limit = "limit on the size of files", "File too large", int(share * max(sizes))
    code = run(script, arguments(script), cwd, file_limit=limit)
    expect_line(code, cwd, 2, message, "make room", f"{script} --resume run")
    assert limit or mount(cwd, "remount,size=1g")
    expect_same(script, cwd, reference)
    return method


def read_only(script, cwd, reference):
    """The folder of a killed run becomes read-only, then writable again."""
    method, folder, outside = "tmpfs", cwd / "run", cwd.with_suffix(".log")
    if not mount(cwd, "size=1g"):
        method = "chmod"
        assert os.geteuid(), "may not mount, and permissions do not bind root"
    assert run(script, arguments(script), cwd, ("os.replace", 3, kill)) == -signal.SIGKILL
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert mount(cwd, "remount,ro") if method == "tmpfs" else not folder.chmod(0o555)
    code = run(script, ["--resume", str(folder)], outside)
    expect_line(code, outside, 2, "allow access", f"{script} --resume {folder}")
    code = run(script, [*arguments(script)[:-1], str(folder / "new")], outside)
    expect_line(code, outside, 2, f"--output {folder / 'new'}", "written")
    assert mount(cwd, "remount,rw") if method == "tmpfs" else not folder.chmod(0o755)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    expect_same(script, cwd, reference)
    return method


def damaged(script, cwd, reference, file, damage, rng):
    """A file of a finished run is "cut off" or "changed": the seed in args.json, one bit of a checkpoint's
    largest tensor."""
    if not cwd.exists():
        assert run(script, arguments(script), cwd) == 0
    path = next((cwd / "run").glob(file))
    intact = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(intact[: rng.randrange(len(intact))])
    elif path.suffix == ".json":
        path.write_bytes(intact.replace(b'"seed": 0', b'"seed": 1'))
    else:
        with zipfile.ZipFile(path) as archive:
            largest = max((archive.read(name) for name in archive.namelist()), key=len)
        place = intact.index(largest) + rng.randrange(len(largest))
        flipped = bytes([intact[place] ^ 1 << rng.randrange(8)])
        path.write_bytes(intact[:place] + flipped + intact[place + 1 :])
    assert path.read_bytes() != intact
    expect_line(run(script, ["--resume", "run"], cwd), cwd, 2, "--resume run", path.name)
    path.write_bytes(intact)


def two_at_once(script, cwd, reference):
    """Two runs start together in one folder, and a --resume comes while one runs. One ends as if it were
    alone, the others are refused."""
    cwds = [cwd.with_name(f"{cwd.name} {i}") for i in (1, 2)]
    both = [start(script, [*arguments(script)[:-1], f"../{cwd.name}/run"], c) for c in cwds]
    while not (cwd / "run" / "args.json").exists() and any(p.is_alive() for p in both):
        time.sleep(0.01)
    code = run(script, ["--resume", "run"], cwd)
    expect_line(code, cwd, 2, "--resume run", "in use by another process")
    for process in both:
        process.join()
    codes = [process.exitcode for process in both]
    assert sorted(codes) == [0, 2], f"exit codes {codes}"
    expect_line(2, cwds[codes.index(2)], 2, f"--output ../{cwd.name}/run")
    assert set(differences(cwd / "run", reference)) <= {"args.json"}  # holds the name of the folder


def cases(script, done, kills, rng):
    """(name, function, its options) for one script. done: done.json of the reference run."""
    places = [place for place, calls in done["writes"].items() if calls]
    for i in range(kills):
        if i % 2:
            place, after = rng.choice(places), rng.choice([False, True])
            n = rng.randint(1, done["writes"][place])
            yield f"kill -9 {'after' if after else 'before'} {place} {n}", killed_writing, (place, n, after)
        else:
            seconds = rng.uniform(0, 0.95 * done["seconds"])
            again = rng.choice([0, rng.uniform(0, 0.95 * done["seconds"])])
            twice = f" and {again:.2f} s" if again else ""
            yield f"kill -9 after {seconds:.2f} s{twice}", killed_at, (seconds, again)
    for phase in PHASES[script]:
        label = phase if isinstance(phase, str) else " ".join(map(str, phase))
        yield f"Ctrl-C at {label}", interrupted, (phase,)
    for share in (0.1, 0.4, 0.7):
        yield f"disk full after {share:.0%} of the run", full_disk, (share,)
    yield "read-only folder", read_only, ()
    for file in ["args.json", *["inversion/*.pt"] * script.startswith("inverse"), *["checkpoint.pt"] * 2]:
        for damage in ("cut off", "changed"):
            yield f"damaged {file}, {damage}", damaged, (file, damage, rng)
    yield "two at once", two_at_once, ()


def check(function, script, cwd, reference, options):
    """{"outcome": "ok" or what was wrong, "seconds"}; of cases that have two, also the "method"."""
    begin = time.perf_counter()
    try:
        method = function(script, cwd, reference, *options)
        record = {"outcome": "ok"} | ({"method": method} if method else {})
    except (AssertionError, OSError) as error:
        record = {"outcome": " ".join(str(error).split()) or "failed"}
    finally:
        subprocess.run(["umount", str(cwd)], capture_output=True)
    return record | {"seconds": round(time.perf_counter() - begin, 2)}


def make_reference(script, folder):
    """An uninterrupted run and its prompt files. Returns its folder and its done.json."""
    for name, file, count in (("train", "train", 4), ("eval", "held_out", 2)):
        lines = (ROOT / "shapes" / f"prompts_{name}.txt").read_text().splitlines()[:count]
        (folder / f"{file}.txt").write_text("\n".join(lines) + "\n")
    assert run(script, arguments(script), folder / "reference") == 0, printed(folder / "reference")
    return folder / "reference" / "run", json.loads((folder / "reference" / "done.json").read_text())


def table(records):
    """Markdown: the number of cases that ended well, a row for each script."""
    lines = ["| script | " + " | ".join(GROUPS) + " |\n" + "|---" * (len(GROUPS) + 1) + "|"]
    for script in dict.fromkeys(r["script"] for r in records):
        own = [r for r in records if r["script"] == script]
        groups = [[r["outcome"] == "ok" for r in own if group in r["case"]] for group in GROUPS]
        lines.append(f"| {script} | " + " | ".join(f"{sum(g)} of {len(g)}" for g in groups) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument(
        "--kills", type=int, default=20, help="kill -9 of each script, half of them while it writes"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    options = parser.parse_args()
    hardware = (
        f"1 thread of {platform.processor() or platform.machine()}, {os.cpu_count()} cores, CPU float32"
    )
    report = {"command": " ".join(["python", *sys.argv]), "hardware": hardware, "records": []}
    for script in options.scripts:
        with tempfile.TemporaryDirectory() as name:
            folder, rng = Path(name), random.Random(options.seed)
            reference, done = make_reference(script, folder)
            for i, (case, function, case_options) in enumerate(cases(script, done, options.kills, rng)):
                cwd = folder / ("damaged" if function is damaged else f"case{i}")
                record = {"script": script, "case": case}
                record |= check(function, script, cwd, reference, case_options)
                print(f"{script:<28} {case:<48} {record['seconds']:6.1f} s  {record['outcome']}", flush=True)
                report["records"].append(record)
                options.output.write_text(json.dumps(report, indent=1) + "\n")
                if function is not damaged:
                    shutil.rmtree(cwd)
    print("\n" + table(report["records"]))
    sys.exit(any(record["outcome"] != "ok" for record in report["records"]))


if __name__ == "__main__":
    main()
