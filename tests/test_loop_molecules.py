"""The whole loop of molecules/graft_molecules.py, made again: tiny real runs beside a plain loop."""

import csv
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from rdkit.Chem import Crippen

from common import derived_seed
from conftest import assert_one_line, exit_code, run_inside
from molecules.judge import judge, known_hash
from molecules.model import KNOWN, Model, save_weights
from test_torchrun import torchrun

SCRIPT = "molecules/graft_molecules.py"
SIZES = {"width": 16, "pair_width": 8, "layers": 2}
SETTINGS = {
    "seed": 3,
    "atoms": (1, 2),
    "eval_molecules": 24,
    "steps": 4,
    "eta": 0.8,
    "sample_batch": 7,
    "reward": "logp",
    "rounds": 3,
    "groups_per_round": 6,
    "samples": 5,
    "rule": "topk",
    "top_k": 2,
    "lora_rank": 3,
    "lora_alpha": 6.0,
    "updates": 4,
    "batch": 8,
    "lr": 0.02,
}


def argv_of(settings, model, output="run"):
    argv = ["--device", "cpu", "--model", model, "--output", output]
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            argv += [f"--{name}", *map(str, values)]
    return argv


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file of random weights that draw some stable molecules of one or two atoms."""
    torch.manual_seed(4)
    network = Model.new(SIZES, "cpu").network
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) * ("norm" not in name)
    path = tmp_path_factory.mktemp("molecules") / "tiny.safetensors"
    save_weights(network.state_dict(), SIZES, path)
    return str(path)


class Plain:
    """What a run with these settings must do, with nothing of the script's own."""

    def __init__(self, settings, model):
        self.o = {"deduplicate": True, "accumulate": True, "reference": "newest", **settings}
        self.model, self.base = Model.load(model, "cpu"), Model.load(model, "cpu").network
        self.parameters = self.model.add_lora(self.o["lora_rank"], self.o["lora_alpha"], self.o["seed"])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.o["lr"], weight_decay=0.0)
        self.accepted, self.losses, self.norms = [], [], []

    def weights(self):
        """Those of the network with the LoRA added."""
        lora = {n: p.detach() for n, p in self.model.network.named_parameters() if "lora_" in n}
        weights = {n: p.detach().clone() for n, p in self.base.named_parameters()}
        for name, down in lora.items():
            if "lora_A" in name:
                layer = name.partition(".lora_A")[0]
                up = lora[name.replace("lora_A", "lora_B")]
                weights[f"{layer}.weight"] += self.o["lora_alpha"] / self.o["lora_rank"] * up @ down
        return weights

    @torch.no_grad()
    def molecule(self, seed, n, weights):
        """One molecule (9, 7): equation (5) in the words of DDIM's paper."""
        noise = torch.randn(self.o["steps"] + 1, 9, 7, generator=torch.Generator().manual_seed(seed)).double()
        mask = (torch.arange(9) < n).double()[:, None]

        def centred(x):
            return torch.cat([x[:, :3] - x[:n, :3].mean(0), x[:, 3:]], 1) * mask

        x, steps = centred(noise[0]), self.o["steps"]
        for k in range(steps):
            level = 1 - k / steps
            a, s = math.cos(math.pi / 2 * level), math.sin(math.pi / 2 * level)
            a_next, s_next = (f(math.pi / 2 * (level - 1 / steps)) for f in (math.cos, math.sin))
            call = (x[None].float(), torch.tensor([level]), torch.tensor([n]))
            v = torch.func.functional_call(self.base, weights, call)[0].double()
            x_0, eps = a * x - s * v, a * v + s * x
            std = self.o["eta"] * s_next / s * math.sqrt(max(1 - (a / a_next) ** 2, 0))
            x = a_next * x_0 + math.sqrt(max(s_next**2 - std**2, 0)) * eps + std * centred(noise[k + 1])
        return x.float()

    def sampled(self, r):
        """[(x_0, number of atoms, judged, reward)] of a round, group by group."""
        weights = self.weights() if self.o["reference"] == "newest" else dict(self.base.named_parameters())
        found = []
        for i in range(self.o["groups_per_round"]):
            n = self.o["atoms"][i % len(self.o["atoms"])]
            for j in range(self.o["samples"]):
                x = self.molecule(derived_seed(self.o["seed"], r, i, j), n, weights)
                found.append((x, n, *self.judged(x, n)))
        return found

    def judged(self, x, n):
        judged = judge(x[:n])
        lowest = 0.0 if self.o["reward"] == "stable" else -math.inf
        value = 1.0 if self.o["reward"] == "stable" else Crippen.MolLogP(judged.molecule or judge(x[:1])[0])
        return judged, np.float32(value if judged.stable else lowest)

    def accept(self, r, found):
        """The numbers of a round's samples that the rule takes, and of those that are left without copies."""
        m, k = self.o["samples"], self.o.get("top_k", 1)
        generator = torch.Generator().manual_seed(derived_seed(self.o["seed"], "accept", r))
        chance = torch.rand(len(found) // m, m, generator=generator)
        ruled = []
        for g in range(len(found) // m):
            group = list(range(g * m, g * m + m))
            values = [found[i][3] for i in group]
            if self.o["rule"] == "topk":
                if len(set(values)) > 1:
                    group.sort(key=lambda i: (-found[i][3], chance[g, i - g * m].item()))
                    ruled += group[:k]
            elif self.o["rule"] == "threshold":
                ruled += [i for i, value in zip(group, values) if value >= self.o["threshold"]]
            else:
                ruled += group
        if self.o["rule"] != "none":
            ruled = [i for i in ruled if found[i][2].stable]
        ruled.sort()
        kept, taken = [], {key for part in self.accepted for key in part["keys"] if key}
        for i in torch.randperm(len(found), generator=generator).tolist() if self.o["deduplicate"] else []:
            key = found[i][2].key
            if i in ruled and key not in taken:
                kept.append(i)
                taken |= {key} - {""}
        return ruled, sorted(kept) if self.o["deduplicate"] else ruled

    def update(self, r):
        kept = self.accepted if self.o["accumulate"] else self.accepted[-1:]
        data, counts = (torch.cat([part[name] for part in kept]) for name in ("x_0", "count"))
        generator = torch.Generator().manual_seed(derived_seed(self.o["seed"], "update", r))
        size, updates = self.o["batch"], self.o["updates"]
        epochs = math.ceil(size * updates / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        losses = []
        for update in range(updates):
            index = order[update * size : update * size + size]
            rows = max(self.o["atoms"])
            noise = torch.randn(size, rows, 7, generator=generator)
            t = torch.rand(size, generator=generator)
            total = 0.0
            for x_0, n, eps, level in zip(data[index], counts[index], noise, t):
                eps = eps * (torch.arange(rows) < n)[:, None]
                eps = torch.cat([eps[:, :3] - eps[:n, :3].mean(0), eps[:, 3:]], 1)[:n]
                a, s = math.cos(math.pi / 2 * level), math.sin(math.pi / 2 * level)
                x_t = torch.zeros(1, rows, 7)
                x_t[0, :n] = a * x_0[:n] + s * eps
                v = self.model.network(x_t, level[None], n[None])[0, :n]
                total = total + (v - (a * eps - s * x_0[:n])).square().sum()
            loss = total / (7 * counts[index].sum())
            for group in self.optimizer.param_groups:
                group["lr"] = self.o["lr"] * (updates - update) / updates
            self.optimizer.zero_grad()
            loss.backward()
            norm = torch.stack([p.grad.square().sum() for p in self.parameters]).sum().sqrt()
            self.norms.append(norm.item())
            for parameter in self.parameters:
                parameter.grad *= min(1, 1 / (norm.item() + 1e-6))
            self.optimizer.step()
            losses.append(loss.item())
        self.losses += losses
        return sum(losses) / len(losses), len(data)


def mean(values):
    values = [float(v) for v in values if v > -math.inf]
    return sum(values) / len(values) if values else math.nan


def evaluation(plain, weights):
    """The measures of the evaluation's molecules, by hand."""
    known = {bytes(line) for line in np.load(KNOWN)}
    judged, values = [], []
    for i in range(plain.o["eval_molecules"]):
        n = plain.o["atoms"][i // 4 % len(plain.o["atoms"])]
        x = plain.molecule(derived_seed("eval", i), n, weights)
        one, value = plain.judged(x, n)
        judged.append(one)
        values.append(value)
    valid, stable = [j.key for j in judged if j.valid], [j.key for j in judged if j.stable]
    return {
        "reward": mean(values),
        "valid": len(valid) / len(judged),
        "stable": len(stable) / len(judged),
        "unique_of_valid": len(set(valid)) / len(valid),
        "distinct_stable": len(set(stable)) / len(judged),
        "new_of_distinct": sum(known_hash(key) not in known for key in set(stable)) / len(set(stable)),
        "logp": mean(Crippen.MolLogP(j.molecule) for j in judged if j.stable),
    }


def assert_replayed(settings, tiny, folder):
    """The run in `folder` did what its settings say; returns (plain loop, rows of metrics.csv)."""
    plain = Plain(settings, tiny)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == len(state["accepted"]) == plain.o["rounds"]
    base = evaluation(plain, dict(plain.base.named_parameters()))
    for r, (row, theirs) in enumerate(zip(rows, state["accepted"])):
        found = plain.sampled(r)
        ruled, kept = plain.accept(r, found)
        assert theirs["keys"] == [found[i][2].key for i in kept] and kept
        assert theirs["count"].tolist() == [found[i][1] for i in kept]
        assert torch.allclose(theirs["x_0"], torch.stack([found[i][0] for i in kept]), atol=1e-4)
        assert theirs["reward"].tolist() == pytest.approx([found[i][3] for i in kept], abs=1e-5)
        plain.accepted.append({name: theirs[name] for name in ("x_0", "count", "keys")})
        loss, size = plain.update(r)
        assert row["round"] == r + 1 and row["molecules_trained_on"] == size
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["reward_sampled"] == pytest.approx(mean(part[3] for part in found), rel=1e-4)
        assert row["reward_accepted"] == pytest.approx(mean(found[i][3] for i in kept), rel=1e-4)
        assert row["acceptance_rate"] == pytest.approx(len(kept) / len(found))
        assert row["stable"] == pytest.approx(sum(part[2].stable for part in found) / len(found), rel=1e-5)
        assert row["valid"] == pytest.approx(sum(part[2].valid for part in found) / len(found), rel=1e-5)
        distinct = {part[2].key for part in found if part[2].stable}
        assert row["distinct_stable"] == pytest.approx(len(distinct) / len(found))
        before, after = ([found[i][2].key for i in part] for part in (ruled, kept))
        shares = {key: (before.count(key) / len(ruled), after.count(key) / len(kept)) for key in set(after)}
        kl = sum(q * math.log(q / p) for p, q in shares.values())
        assert row["deduplication_kl"] == pytest.approx(kl, abs=1e-6)
        for name, value in evaluation(plain, plain.weights()).items():
            assert row[f"{name}_held_out"] == pytest.approx(value, rel=1e-4), name
    for mine, theirs in zip(plain.parameters, state["lora"].values(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4)
    assert state["losses"] == pytest.approx(plain.losses, rel=1e-4)
    tuned = safetensors.torch.load_file(folder / "tuned.safetensors")
    weights = plain.weights()
    assert tuned.keys() == weights.keys()
    assert all(torch.allclose(tuned[name], weights[name], atol=1e-3) for name in tuned)
    table = {row["metric"]: row for row in json.loads((folder / "results.json").read_text())["table"]}
    for name, value in base.items():
        assert table[name]["base"] == pytest.approx(value, rel=1e-4)
        assert table[name]["tuned"] == pytest.approx(rows[-1][f"{name}_held_out"], rel=1e-6)
    return plain, rows


def run_tiny(settings, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = run_inside(argv_of(settings, tiny), SCRIPT)
    assert code == 0, error
    return out, tmp_path / "run"


def assert_last_line(code, error, named):
    """The error is one line below the progress bars."""
    assert_one_line(code, error.rpartition("\r")[2], named)


@pytest.mark.drawn
def test_the_best_of_each_group(tiny, tmp_path, monkeypatch):
    out, folder = run_tiny(SETTINGS | {"save_accepted": True}, tiny, tmp_path, monkeypatch)
    plain, rows = assert_replayed(SETTINGS, tiny, folder)
    base = evaluation(plain, dict(plain.base.named_parameters()))
    keys = [key for part in plain.accepted for key in part["keys"]]
    assert len(keys) == len(set(keys)) and rows[0]["molecules_trained_on"] < rows[2]["molecules_trained_on"]
    for r, part in enumerate(plain.accepted, 1):
        assert (folder / f"accepted{r:03d}.smi").read_text().split() == part["keys"]
    for name in ("base", "tuned"):
        smiles = (folder / f"{name}.smi").read_text().splitlines()
        share = rows[-1]["stable_held_out"] if name == "tuned" else base["stable"]
        assert len(smiles) == round(24 * share) > 0
        blocks = (folder / f"{name}.xyz").read_text().splitlines()
        assert len(blocks) == sum(2 + int(line) for line in blocks if line in ("1", "2"))
        assert sum(line in ("1", "2") for line in blocks) == len(smiles) > 0
    assert (folder / "grid.png").stat().st_size > 1000 < (folder / "curves.png").stat().st_size
    code = out.partition("To use it:")[2]
    exec(code, {})  # what it prints runs


def test_threshold_without_accumulation(tiny, tmp_path, monkeypatch):
    """The base is sampled, copies are kept."""
    changes = {"rule": "threshold", "threshold": 0.1, "reward": "stable", "reference": "base"}
    settings = SETTINGS | changes | {"accumulate": False, "deduplicate": False, "rounds": 2, "eta": 0.0}
    del settings["top_k"]
    _, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    plain, rows = assert_replayed(settings, tiny, folder)
    assert rows[0]["deduplication_kl"] == 0
    assert any(len(part["keys"]) > len(set(part["keys"])) for part in plain.accepted)
    share = rows[0]["stable"]
    assert rows[0]["kl"] == pytest.approx(-math.log(share), rel=1e-4)


def test_control_without_selection(tiny, tmp_path, monkeypatch):
    """Everything is trained on, what is no molecule too; without copies of the molecules."""
    settings = SETTINGS | {"rule": "none", "rounds": 1, "lr": 1e-3}
    del settings["top_k"]
    _, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    plain, rows = assert_replayed(settings, tiny, folder)
    keys = plain.accepted[0]["keys"]
    assert "" in keys and len(set(keys) - {""}) == len([key for key in keys if key])


def test_killed_and_resumed(tiny, tmp_path, monkeypatch):
    """Killed at several writes, half of the file being written: the resumed run leaves the same files."""
    files = ("metrics.csv", "tuned.safetensors", "tuned.smi", "tuned.xyz", "grid.png")
    settings = SETTINGS | {"rounds": 2, "eval_every": 2}
    (tmp_path / "whole").mkdir()
    assert exit_code(argv_of(settings, tiny), tmp_path / "whole", script=SCRIPT) == 0
    whole = [(tmp_path / "whole" / "run" / name).read_bytes() for name in files]
    state = torch.load(tmp_path / "whole" / "run" / "checkpoint.pt", weights_only=True)
    (tmp_path / "parts").mkdir()
    argv, killed = argv_of(settings, tiny), 0
    for n in (5, 4, 7):
        killed += exit_code(argv, tmp_path / "parts", ("os", "fsync", n), SCRIPT) == -9
        argv = ["--resume", "run"]
    assert exit_code(argv, tmp_path / "parts", script=SCRIPT) == 0 and killed == 3
    assert [(tmp_path / "parts" / "run" / name).read_bytes() for name in files] == whole
    resumed = torch.load(tmp_path / "parts" / "run" / "checkpoint.pt", weights_only=True)
    for name, value in state["lora"].items():
        assert torch.equal(value, resumed["lora"][name])
    monkeypatch.chdir(tmp_path / "parts")
    code, _, error = run_inside(["--resume", "run", "--lr", "0.5"], SCRIPT)
    assert_one_line(code, error, "--lr 0.5 differs from the run in run (0.02)")


def test_three_processes_are_as_one(tiny, tmp_path, monkeypatch):
    """Whole batches of molecules are shared out, so the first round is the same to the last bit. Of two
    molecules an update one process has none."""
    settings = SETTINGS | {"rounds": 2, "batch": 2}
    _, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    argv = argv_of(settings, tiny, "shared")
    done = torchrun(3, tmp_path, [{"script": SCRIPT, "argv": argv, "name": "shared", "scale": None}])
    assert done.returncode == 0, done.stderr
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("run", "shared")
    )
    assert one["accepted"][0]["keys"] == other["accepted"][0]["keys"]
    assert torch.equal(one["accepted"][0]["x_0"], other["accepted"][0]["x_0"])
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)
    for name, value in one["lora"].items():
        assert torch.allclose(value, other["lora"][name], atol=1e-3)


def test_copies_run_out(tiny, tmp_path, monkeypatch):
    """Of molecules of one atom there are four: a later round finds nothing new, and trains on the earlier."""
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"atoms": (1,), "rounds": 4, "groups_per_round": 20, "eval_every": 0}
    code, _, error = run_inside(argv_of(settings, tiny), SCRIPT)
    assert code == 0, error
    with open("run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["acceptance_rate"]) == 0 and rows[-1]["deduplication_kl"] == "nan"
    assert 1 < float(rows[-1]["molecules_trained_on"]) < 5
    code, _, error = run_inside(argv_of(settings | {"accumulate": False}, tiny, "other"), SCRIPT)
    assert_last_line(
        code, error, "accepted only molecules that earlier rounds had accepted: give --accumulate"
    )


def test_no_molecule_is_stable(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"atoms": (9,), "eval_molecules": 20}
    code, _, error = run_inside(argv_of(settings, tiny), SCRIPT)
    assert_last_line(code, error, "--rule topk accepted nothing: 100% of the groups had equal rewards")


def test_rewards_of_the_user(tiny, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text("def fails(molecule):\n    return molecule.no_such\n")
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"reward": "own.py:fails"}
    code, _, error = run_inside(argv_of(settings, tiny), SCRIPT)
    assert_last_line(code, error, "own.py:fails: AttributeError")
