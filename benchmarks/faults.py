"""What a run survives: every script killed, interrupted, out of disk, tampered with, run twice at once; then compared bit by bit.

Run: python benchmarks/faults.py   (one thread of the CPU; result: benchmarks/results/faults.json; exit code 1 if a case failed)
Every case is a run on the embedded model in a process of its own, but forked from one that has imported the libraries already.
A full disk and a read-only folder are a small tmpfs where the user may mount one, else a limit on the size of a file and chmod.
"""

import argparse
import functools
import hashlib
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
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
COMMON = "--device cpu --prompts ../train.txt --eval_prompts ../held_out.txt --reward shapes_graded --eval_rewards shapes_fit"
COMMON += " --steps 4 --samples 4 --eval_samples 2"
GRAFT = f"{COMMON} --rounds 2 --prompts_per_round 2 --updates 2 --batch 4 --micro_batch 4 --save_accepted"
INC = "--device cpu --pictures 60 --sample_batch 20 --eval_pictures 30 --updates 4 --checkpoint_every 2 --batch 8 --max_failed 0.5"
SCRIPTS = {  # a short run that does everything
    "graft.py": GRAFT,
    "pgraft.py": f"{GRAFT} --probe_prompts 2 --probe_restarts 2 --probe_limit 1",
    "noise_ppo.py": f"{COMMON} --iterations 2 --prompts_per_iteration 2 --eval_every 1 --eval_steps 2 --minibatch 4",
    "inverse_noise_correction.py": f"{INC} --eval_powers= --eval_corrector_steps 2",
}
PHASES = {  # label of a progress bar, or the n-th call of a function
    "graft.py": ["evaluate base", "sample 1", "update 2", "evaluate 2"],
    "pgraft.py": ["probe", "evaluate base", "sample 2", "update 1", "evaluate 1"],
    "noise_ppo.py": ["evaluate standard noise", "sample 2", ("torch.minimum", 3), "evaluate 1", "4 steps, learnt"],
    "inverse_noise_correction.py": ["invert", "corrector", "longer", ("torch.linalg.eigvalsh", 3)],
}
START = {"inverse_noise_correction.py": ("common.check_flow", 1)}  # of the others common.check_model_name
WRITERS = ("os.fsync", "os.replace", "PIL.Image.Image.save", "safetensors.torch.save_file")


# ---------------------------------------------------------------- a run in a process of its own


@functools.cache
def forkserver():
    """Starts processes that have imported torch and the scripts already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["graft", "pgraft", "noise_ppo", "inverse_noise_correction", "diffusers", "peft"])
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "tests"), before]
    )  # Python 3.11 preloads without sys.path
    multiprocessing.forkserver.ensure_running()
    os.environ["PYTHONPATH"] = before
    return context


def strike_at(place, n, action, after):
    """Make the n-th call of `place`, "module.function", do `action` before or after it."""
    owner, name = resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
    original, calls = getattr(owner, name), []

    def call(*args, **options):
        calls.append(1)
        hit = len(calls) == n or isinstance(n, str) and options.get("desc") == n
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
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()


def child(script, argv, cwd, fault, file_limit):
    """`python <script> <argv>` in the folder cwd. fault: (place, n, kill or interrupt, after) or None; file_limit: bytes or 0."""
    os.chdir(cwd)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell may have told its children to ignore it
    import torch

    torch.set_num_threads(1)
    counted = {place: strike_at(place, 0, None, False) for place in WRITERS}
    if fault:
        strike_at(*fault)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.argv = [script, *argv]
    runpy.run_path(str(ROOT / script), run_name="__main__")
    Path("writes.json").write_text(json.dumps({place: len(calls) for place, calls in counted.items()}))


def start(script, argv, cwd, fault=None, file_limit=0):
    cwd.mkdir(exist_ok=True)
    process = forkserver().Process(target=child, args=(script, argv, str(cwd), fault, file_limit))
    process.start()
    return process


def run(script, argv, cwd, fault=None, file_limit=0):
    """Exit code of a run; minus the signal's number if one ended it."""
    process = start(script, argv, cwd, fault, file_limit)
    process.join()
    return process.exitcode


# ---------------------------------------------------------------- what is asked of it


def plain(value):
    """A nested value with times left out and tensors as hashes, so that equal means equal to the last bit."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if k != "seconds"}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return hashlib.sha256(value.numpy().tobytes()).hexdigest() if hasattr(value, "numpy") else repr(value)


def content(path):
    """What a file of a run must have in common with the same file of another run."""
    import torch
    from safetensors.torch import load_file

    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    return plain(load_file(path)) if path.suffix == ".safetensors" else path.read_bytes()


def differences(folder, other):
    """Names of the files that differ between two runs or stand in one alone; tensorboard's have names of their own."""
    names = {str(p.relative_to(f)) for f in (folder, other) for p in f.rglob("*") if p.is_file()}
    names = sorted(n for n in names if not n.startswith("tensorboard"))
    both = [n for n in names if (folder / n).is_file() and (other / n).is_file()]
    return [n for n in names if n not in both or content(folder / n) != content(other / n)]


def expect_line(code, cwd, wanted_code, *words):
    """The run ended with this code and one line on stderr that holds the words."""
    text = (cwd / "stderr.txt").read_bytes().decode()
    lines = [line.split("\r")[-1].strip() for line in text.split("\n")]
    lines = [line for line in lines if line and "%|" not in line]  # a progress bar that was cut short
    assert code == wanted_code, f"exit code {code}, not {wanted_code}: {text[-300:]}"
    assert len(lines) == 1 and all(word in lines[0] for word in words), f"not one line with {words}: {text[-600:]}"


def expect_same(script, cwd, reference):
    """The run in cwd, resumed, or begun anew if it had not begun, ends as the reference did."""
    code = run(script, ["--resume", "run"], cwd)
    if not (cwd / "run" / "args.json").exists():
        expect_line(code, cwd, 2, "--resume run", "no run there")
        code = run(script, arguments(script), cwd)
    assert code == 0, f"exit code {code}: {(cwd / 'stderr.txt').read_text()[-600:]}"
    differing = differences(cwd / "run", reference)
    assert not differing, f"not as the uninterrupted run: {differing}"


def arguments(script):
    return [*SCRIPTS[script].split(), "--output", "run"]


# ---------------------------------------------------------------- the cases


def killed_at(script, cwd, reference, seconds, again):
    """kill -9 after these seconds, and once more after `again` seconds of the resumed run."""
    for argv, moment in ((arguments(script), seconds), (["--resume", "run"], again)):
        if moment is not None:
            process = start(script, argv, cwd)
            process.join(moment)
            process.kill()
            process.join()
    expect_same(script, cwd, reference)


def killed_writing(script, cwd, reference, place, n, after):
    """kill -9 at the n-th call of a function that writes."""
    assert run(script, arguments(script), cwd, (place, n, kill, after)) == -signal.SIGKILL
    expect_same(script, cwd, reference)


def interrupted(script, cwd, reference, phase):
    """Ctrl-C at a progress bar with this label, or at a call."""
    place, n = ("tqdm.std.tqdm.__init__", phase) if isinstance(phase, str) else phase
    code = run(script, arguments(script), cwd, (place, n, interrupt, False))
    begun = (cwd / "run").exists()
    expect_line(code, cwd, 130, "interrupted", f"python {script} --resume run" if begun else "Nothing was written.")
    expect_same(script, cwd, reference)


def mounted(cwd, size):
    """A tmpfs of that many bytes at cwd; False where the user may not mount one."""
    cwd.mkdir(exist_ok=True)
    return not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(cwd)], capture_output=True
    ).returncode


def full_disk(script, cwd, reference, share):
    """Room for this share of the run only; then room enough."""
    files = [p.stat().st_size for p in reference.rglob("*") if p.is_file()]
    if mounted(cwd, int(share * sum(files))):
        expect_line(
            run(script, arguments(script), cwd), cwd, 2, "No space left on device", "make room", f"{script} --resume run"
        )
        subprocess.run(["mount", "-o", "remount,size=1g", str(cwd)], check=True)
        method = "tmpfs"
    else:
        code = run(script, arguments(script), cwd, file_limit=int(share * max(files)))
        expect_line(code, cwd, 2, "File too large", "make room", f"{script} --resume run")
        method = "limit on the size of a file"
    expect_same(script, cwd, reference)
    return method


def read_only(script, cwd, reference):
    """A run begun, then its folder may not be written."""
    method = "tmpfs" if mounted(cwd, "1g") else "chmod"
    assert method == "tmpfs" or os.geteuid(), "may not mount, and permissions do not bind root"
    lock, free = (
        (["mount", "-o", "remount,ro"], ["mount", "-o", "remount,rw"])
        if method == "tmpfs"
        else (["chmod", "a-w"], ["chmod", "u+w"])
    )
    folder, outside = cwd if method == "tmpfs" else cwd / "run", cwd.with_suffix(".log")
    assert run(script, arguments(script), cwd, ("os.replace", 3, kill, False)) == -signal.SIGKILL
    before = {p: p.read_bytes() for p in (cwd / "run").rglob("*") if p.is_file()}
    subprocess.run([*lock, str(folder)], check=True)
    code = run(script, ["--resume", str(cwd / "run")], outside)
    expect_line(code, outside, 2, "allow access", f"{script} --resume")
    code = run(script, [*SCRIPTS[script].split(), "--output", str(cwd / "run" / "new")], outside)
    expect_line(code, outside, 2, "--output", "cannot be written")
    subprocess.run([*free, str(folder)], check=True)
    assert before == {p: p.read_bytes() for p in (cwd / "run").rglob("*") if p.is_file()}
    expect_same(script, cwd, reference)
    return method


def damaged(script, cwd, reference, rng, file, damage):
    """A file of a run that was killed is cut off or has one bit flipped: refused; put back, the run goes on."""
    if not cwd.exists():
        run(
            script,
            arguments(script),
            cwd,
            ("tensorboard.summary.writer.event_file_writer.EventFileWriter.close", 1, kill, False),
        )
    path = next((cwd / "run").glob(file))
    whole = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif path.suffix == ".json":
        path.write_bytes(whole.replace(b'"seed": 0', b'"seed": 1'))
    else:
        with zipfile.ZipFile(path) as file:
            largest = max((file.read(name) for name in file.namelist()), key=len)
        place = whole.index(largest) + rng.randrange(len(largest))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
    assert path.read_bytes() != whole
    expect_line(run(script, ["--resume", "run"], cwd), cwd, 2, "--resume run", path.name)
    path.write_bytes(whole)


def two_at_once(script, cwd, reference):
    """Two started together for one folder, then --resume of it while it is running: one ends as if alone, the others are refused."""
    both = [start(script, [*SCRIPTS[script].split(), "--output", "../two/run"], cwd.with_name(f"two {i}")) for i in (0, 1)]
    cwd.mkdir(exist_ok=True)
    while not (cwd / "run" / "args.json").exists() and any(p.is_alive() for p in both):
        time.sleep(0.01)
    expect_line(run(script, ["--resume", "run"], cwd), cwd, 2, "--resume run", "in use by another process")
    for process in both:
        process.join()
    refused = [i for i, process in enumerate(both) if process.exitcode]
    assert len(refused) == 1, f"exit codes {[process.exitcode for process in both]}"
    expect_line(both[refused[0]].exitcode, cwd.with_name(f"two {refused[0]}"), 2, "--output ../two/run")
    assert set(differences(cwd / "run", reference)) <= {"args.json", "checkpoint.pt"}  # both hold the name of the folder


def cases(script, seconds, writes, number, rng):
    """(name, function, its arguments) for one script; a run takes `seconds` and calls each of WRITERS as often as in writes."""
    spots = [(place, n + 1, after) for place, calls in writes.items() for n in range(calls) for after in (False, True)]
    for i in range(number):
        if i % 2:
            place, n, after = rng.choice(spots)
            yield f"kill -9 {'after' if after else 'before'} {place} {n}", killed_writing, (place, n, after)
        else:
            moments = rng.uniform(0, seconds), rng.choice([None, rng.uniform(0, seconds)])
            yield "kill -9 after " + " and ".join(f"{t:.2f} s" for t in moments if t), killed_at, moments
    for phase in [START.get(script, ("common.check_model_name", 1)), *PHASES[script], ("os.fsync", 3)]:
        yield f"Ctrl-C at {phase}", interrupted, (phase,)
    for share in (0.1, 0.4, 0.7):
        yield f"disk full after {share:.0%} of the run", full_disk, (share,)
    yield "read-only folder", read_only, ()
    files = ["args.json", *["inversion/*.pt"] * script.startswith("inverse"), *["checkpoint.pt"] * 3]
    for file in files:
        for damage in ("cut off", "changed"):
            yield f"{file} {damage}", damaged, (rng, file, damage)
    yield "two at once", two_at_once, ()


def check(script, function, cwd, reference, options):
    """{"outcome": "ok" or what was wrong, "seconds", "method" where there are two}"""
    begun = time.perf_counter()
    try:
        method = function(script, cwd, reference, *options)
        found = {"outcome": "ok"} | ({"method": method} if method else {})
    except (AssertionError, OSError) as error:
        found = {"outcome": " ".join(str(error).split()) or "failed"}
    finally:
        subprocess.run(["umount", str(cwd)], capture_output=True)
    return found | {"seconds": round(time.perf_counter() - begun, 2)}


def test_script(script, folder, number, seed, show=print):
    """All cases of a script in `folder`, where prompt files are made. Returns the list of records."""
    for name in ("train", "eval"):
        lines = (ROOT / "shapes" / f"prompts_{name}.txt").read_text().splitlines()[: 4 if name == "train" else 2]
        (folder / f"{'train' if name == 'train' else 'held_out'}.txt").write_text("\n".join(lines) + "\n")
    forkserver()
    for name in ("warm", "reference"):  # the first run reads files that later ones find in memory
        begun = time.perf_counter()
        assert run(script, arguments(script), folder / name) == 0, (folder / name / "stderr.txt").read_text()
        seconds = time.perf_counter() - begun
    reference, writes = folder / "reference" / "run", json.loads((folder / "reference" / "writes.json").read_text())
    differing = differences(folder / "warm" / "run", reference)
    records = [
        {"case": "the same run twice", "outcome": f"differ: {differing}" if differing else "ok", "seconds": round(seconds, 2)}
    ]
    for i, (name, function, options) in enumerate(cases(script, seconds, writes, number, random.Random(seed))):
        cwd = folder / {damaged: "damaged", two_at_once: "two"}.get(function, f"case {i}")
        records.append({"case": name} | check(script, function, cwd, reference, options))
        show(f"{script:<28} {name:<56} {records[-1]['seconds']:6.1f} s  {records[-1]['outcome']}")
        if function not in (damaged, two_at_once):
            shutil.rmtree(cwd)
    return [{"script": script} | record for record in records]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--kills", type=int, default=20, help="kill -9 of each script, half of them while it writes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    options = parser.parse_args()
    records = []
    for script in options.scripts:
        with tempfile.TemporaryDirectory() as folder:
            records += test_script(script, Path(folder), options.kills, options.seed, functools.partial(print, flush=True))
    failed = [record for record in records if record["outcome"] != "ok"]
    hardware = f"1 thread of {platform.processor() or platform.machine()}, {os.cpu_count()} cores, CPU float32"
    report = {"command": "python " + " ".join(sys.argv), "hardware": hardware, "cases": len(records), "failed": len(failed)}
    report |= {"seconds": round(sum(record["seconds"] for record in records)), "records": records}
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print("\n| script | kill -9 | Ctrl-C | full disk | read-only | damaged file | two at once |\n" + "|---" * 7 + "|")
    for script in options.scripts:
        words = ("kill -9", "Ctrl-C", "disk full", "read-only", (" cut off", " changed"), "two at once")
        groups = [
            [
                r
                for r in records
                if r["script"] == script and any(w in r["case"] for w in (word if isinstance(word, tuple) else (word,)))
            ]
            for word in words
        ]
        print(f"| {script} | " + " | ".join(f"{sum(r['outcome'] == 'ok' for r in g)} of {len(g)}" for g in groups) + " |")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
