"""A short version of benchmarks/faults.py on a tiny pipeline, and tests of what a run folder withstands."""

import dataclasses
import errno
import io
import random
import sys
import zipfile
from types import SimpleNamespace

import filelock
import pytest
import torch

import faults
from conftest import assert_one_line, run_inside
from utils import runs
from utils.runs import InputError, load_checkpoint, make_run_folder, run_script, save_checkpoint

SCRIPT = "graft.py"


@pytest.fixture(scope="module")
def uninterrupted(tiny_arguments, tmp_path_factory):
    """(folder of the cases, reference run, its done.json); graft.py runs with the tiny arguments."""
    folder = tmp_path_factory.mktemp("faults")

    def cannot_mount(cwd, options):  # the cases then do only what every user may do
        cwd.mkdir(exist_ok=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(faults.SCRIPTS, SCRIPT, " ".join([*tiny_arguments, "--save_accepted"]))
        patch.setattr(faults, "mount", cannot_mount)
        yield folder, *faults.make_reference(SCRIPT, folder)


CASES = [
    (faults.killed_writing, ("os.replace", 1, False)),  # args.json has no name yet
    (faults.killed_writing, ("safetensors.torch.save_file", 1, True)),
    (faults.interrupted, (("common.check_model", 1),)),
    (faults.interrupted, ("update 2",)),
    (faults.full_disk, (0.6,)),
    (faults.damaged, ("checkpoint.pt", "changed", random.Random(0))),
    (faults.damaged, ("args.json", "changed", random.Random(0))),
    (faults.two_at_once, ()),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].__name__} {case[1][:2]}")
def test_survived(case, uninterrupted):
    folder, reference, _ = uninterrupted
    function, options = case
    cwd = folder / (function.__name__ if function is faults.damaged else f"case{CASES.index(case)}")
    assert faults.check(function, SCRIPT, cwd, reference, options)["outcome"] == "ok"


def test_killed_at_a_random_moment(uninterrupted):
    folder, reference, done = uninterrupted
    moment = random.uniform(0.3, 0.9) * done["seconds"]
    record = faults.check(faults.killed_at, SCRIPT, folder / "moment", reference, (moment, 0.5 * moment))
    assert record["outcome"] == "ok", f"killed after {moment} s: {record}"


def test_a_difference_is_seen(uninterrupted, tmp_path):
    """One bit in a tensor, one digit, a missing file."""
    _, reference, _ = uninterrupted
    state = torch.load(reference / "checkpoint.pt", weights_only=True)
    weights = next(iter(state["lora"].values()))
    weights.view(torch.int32).view(-1)[0] ^= 1
    for name in ("metrics.csv", "args.json"):
        (tmp_path / name).write_bytes((reference / name).read_bytes())
    torch.save(state, tmp_path / "checkpoint.pt")
    args = (reference / "args.json").read_text()
    (tmp_path / "args.json").write_text(args.replace('"seed": 0', '"seed": 1'))
    names = faults.differences(tmp_path, reference)
    assert {"checkpoint.pt", "args.json", "grid.png"} <= set(names) and "metrics.csv" not in names
    assert not faults.differences(reference, reference)


# ---------------------------------------------------------------- the run folder


def test_every_flipped_bit_of_a_checkpoint_is_refused_or_harmless(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    save_checkpoint(tmp_path, {"weights": torch.zeros(60), "loss": 1.5})
    path = tmp_path / "checkpoint.pt"
    intact, refused = path.read_bytes(), 0
    for place in range(0, len(intact), 3):
        path.write_bytes(intact[:place] + bytes([intact[place] ^ 16]) + intact[place + 1 :])
        try:
            state = load_checkpoint(tmp_path)
            assert state["loss"] == 1.5 and torch.equal(state["weights"], torch.zeros(60)), place
        except InputError:
            refused += 1
    assert refused > 0.3 * len(intact) / 3
    with zipfile.ZipFile(io.BytesIO(intact)) as file:
        data = max((file.read(name) for name in file.namelist() if "data/" in name), key=len)
    place = intact.index(data)
    path.write_bytes(intact[:place] + b"\1" + intact[place + 1 :])
    assert torch.load(path, weights_only=True)["weights"].any()  # torch alone would take it
    with pytest.raises(InputError, match="checkpoint.pt is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("code, used", [(errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EIO, False)])
def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch, capsys, code, used):
    """On a file system that knows no locks the folder is used, with a warning."""

    def refuse(*_, **__):
        raise OSError(code, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    args = SimpleNamespace(resume=str(tmp_path), output="")
    if used:
        assert make_run_folder(args, "graft", "model", 0) == tmp_path
        assert "cannot be locked (No locks available)" in capsys.readouterr().err
    else:
        with pytest.raises(OSError, match="No locks available"):
            make_run_folder(args, "graft", "model", 0)
        args.resume, args.output = "", str(tmp_path)
        with pytest.raises(InputError, match="cannot be written"):
            make_run_folder(args, "graft", "model", 0)


def test_errors_that_are_not_the_disks_keep_their_traceback(monkeypatch):
    @dataclasses.dataclass
    class Args:
        resume: str = ""

    def main(args):
        raise OSError(errno.EBADF, "odd")

    monkeypatch.setattr(sys, "argv", ["some.py"])
    with pytest.raises(OSError, match="odd"):
        run_script(main, Args)


@pytest.mark.parametrize("script", list(faults.SCRIPTS))
def test_disk_error_while_writing(script, tmp_path, monkeypatch):
    """The first file that a run writes after args.json does not fit on the disk."""
    write = runs.write_atomically

    def write_on_a_full_disk(path, content):
        if path.name != "args.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    for name, shape in (("train", "circle"), ("held_out", "square")):
        prompts = f"a red {shape} left of a blue square\na green square above a red {shape}\n"
        (tmp_path / f"{name}.txt").write_text(prompts)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    monkeypatch.setattr(runs, "write_atomically", write_on_a_full_disk)
    code, _, error = run_inside(faults.arguments(script), script)
    error = error.split("\r")[-1]
    assert_one_line(code, error, f"{script} --resume run")
    assert "No space left on device: make room" in error
