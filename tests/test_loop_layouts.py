"""The whole loop of layouts/pgraft_layouts.py, made again: tiny real runs beside a plain loop."""

import csv
import json
import math

import numpy as np
import pytest
import safetensors.torch
import torch

from common import derived_seed
from conftest import assert_one_line, exit_code, run_inside
from layouts.judge import FeatureNet, alignment, frechet_distance, overlap
from layouts.model import PAGES, Model, save_weights
from test_torchrun import torchrun

SCRIPT = "layouts/pgraft_layouts.py"
SIZES = {"width": 16, "pair_width": 8, "heads": 2, "layers": 2}
SETTINGS = {
    "seed": 3,
    "eval_pages": 80,
    "steps": 4,
    "eta": 0.8,
    "sample_batch": 7,
    "switch": 0.3,
    "data": "xs",
    "reward": "both",
    "rounds": 2,
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
            argv += [f"--{name}", str(value)]
    return argv


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file of random weights."""
    torch.manual_seed(4)
    network = Model.new(SIZES, "cpu").network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("layouts") / "tiny.safetensors"
    save_weights(network.state_dict(), SIZES, path)
    return str(path)


def held_out():
    """(counts of training pages, boxes, kind of held-out pages)."""
    with np.load(PAGES) as file:
        boxes = torch.from_numpy(file["boxes"] / np.float32(np.iinfo(file["boxes"].dtype).max))
        return torch.from_numpy(file["counts"]).long(), boxes, torch.from_numpy(file["kind"]).long()


class Plain:
    """What a run with these settings must do, with nothing of the script's own. level: of the states, which
    is that of the first step of the base."""

    def __init__(self, settings, model, level):
        self.o = {"accumulate": True, "reference": "newest", **settings}
        self.model, self.base = Model.load(model, "cpu"), Model.load(model, "cpu").network
        self.parameters = self.model.add_lora(self.o["lora_rank"], self.o["lora_alpha"], self.o["seed"])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.o["lr"], weight_decay=0.0)
        self.accepted, self.losses, self.norms, self.level = [], [], [], level
        self.counts, self.boxes, self.kind = held_out()
        self.untuned = dict(self.base.named_parameters())

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
    def page(self, seed, counts, weights):
        """(x_s, x_0) of one page, each (12, 9): equation (8) in the words of DDIM's paper; `weights` at the
        levels above the switch."""
        steps, n = self.o["steps"], int(counts.sum())
        noise = torch.randn(steps + 1, 12, 9, generator=torch.Generator().manual_seed(seed)).double()
        x, x_s = noise[0, :n], None
        for k in range(steps):
            level, after = ((steps - k) / steps) ** 2, ((steps - k - 1) / steps) ** 2
            if level <= self.o["switch"] and x_s is None:
                x_s = x
            a, s = math.cos(math.pi / 2 * level), math.sin(math.pi / 2 * level)
            a_next, s_next = (f(math.pi / 2 * after) for f in (math.cos, math.sin))
            call = (x[None].float(), torch.tensor([level]), counts[None], torch.ones(1))
            chosen = weights if x_s is None else self.untuned
            v = torch.func.functional_call(self.base, chosen, call)[0].double()
            x_0, eps = a * x - s * v, a * v + s * x
            std = self.o["eta"] * s_next / s * math.sqrt(max(s**2 - (a * s_next / a_next) ** 2, 0))
            x = a_next * x_0 + math.sqrt(max(s_next**2 - std**2, 0)) * eps + std * noise[k + 1, :n]
        whole = torch.zeros(2, 12, 9)
        whole[0, :n], whole[1, :n] = (x if x_s is None else x_s), x
        return whole

    def reward(self, x_0, counts):
        return -(alignment(*self.shown(x_0, counts)) + overlap(*self.shown(x_0, counts)))

    @staticmethod
    def shown(x_0, counts):
        """(boxes, kind) of pages x_0 (n, 12, 9), counts (n, 5)."""
        boxes, kind = torch.zeros(len(x_0), 12, 4), torch.full((len(x_0), 12), -1)
        for i, n in enumerate(counts.sum(1)):
            boxes[i, :n] = x_0[i, :n, :4] / 4 + torch.tensor([0.5, 0.5, 0.5, 0.15])
            boxes[i, :n, 2:].clamp_(min=0)
            kind[i, :n] = x_0[i, :n, 4:].argmax(1)
        return boxes, kind

    def sampled(self, r):
        """(x_s, x_0, counts, rewards) of a round, group by group."""
        weights = self.weights() if self.o["reference"] == "newest" else self.untuned
        generator = torch.Generator().manual_seed(derived_seed(self.o["seed"], "groups", r))
        groups = torch.randperm(len(self.counts), generator=generator)[: self.o["groups_per_round"]]
        states, asked = [], []
        for i, group in enumerate(groups):
            for j in range(self.o["samples"]):
                asked.append(self.counts[group])
                states.append(self.page(derived_seed(self.o["seed"], r, i, j), asked[-1], weights))
        (x_s, x_0), asked = torch.stack(states, 1), torch.stack(asked)
        return x_s, x_0, asked, self.reward(x_0, asked)

    def accept(self, r, rewards):
        """The numbers of a round's samples that the rule takes."""
        m, k = self.o["samples"], self.o.get("top_k", 1)
        generator = torch.Generator().manual_seed(derived_seed(self.o["seed"], "accept", r))
        torch.rand(len(rewards) // m, m, generator=generator)  # no rewards tie
        taken = []
        for g in range(len(rewards) // m):
            group = list(range(g * m, g * m + m))
            if self.o["rule"] == "topk":
                group.sort(key=lambda i: -rewards[i])
                group = group[:k]
            elif self.o["rule"] == "threshold":
                group = [i for i in group if rewards[i] >= self.o["threshold"]]
            taken += group
        return sorted(taken)

    def update(self, r):
        kept = self.accepted if self.o["accumulate"] else self.accepted[-1:]
        data = torch.cat([part["x_s" if self.o["data"] == "xs" else "x_0"] for part in kept])
        counts = torch.cat([part["counts"] for part in kept])
        generator = torch.Generator().manual_seed(derived_seed(self.o["seed"], "update", r))
        size, updates = self.o["batch"], self.o["updates"]
        epochs = math.ceil(size * updates / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        low = self.level if self.o["data"] == "xs" else 0.0
        a_s, s_s = math.cos(math.pi / 2 * low), math.sin(math.pi / 2 * low)
        losses = []
        for update in range(updates):
            index = order[update * size : update * size + size]
            noise = torch.randn(size, 12, 9, generator=generator)
            chance = torch.rand(size, generator=generator, dtype=torch.float64)
            total = 0.0
            for x_s, asked, eps, u in zip(data[index], counts[index], noise, chance.tolist()):
                n, level = int(asked.sum()), self.level + (1 - self.level) * (1 - u)
                alpha, sigma = math.cos(math.pi / 2 * level), math.sin(math.pi / 2 * level)
                a = alpha / a_s
                b = math.sqrt(sigma**2 - (a * s_s) ** 2)
                x_t = a * x_s[:n] + b * eps[:n]
                v = self.model.network(x_t[None], torch.tensor([level]), asked[None], torch.ones(1))[0]
                target = sigma * (eps[:n] * a / b - x_s[:n]) / a_s
                total = total + (b / sigma) ** 2 * (v - target).square().sum()
            loss = total / (9 * counts[index].sum())
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

    def evaluation(self, weights):
        """Measures of the evaluation's pages."""
        asked = self.counts_of_pages().repeat_interleave(4, 0)
        pages = [self.page(derived_seed("eval", i), c, weights)[1] for i, c in enumerate(asked)]
        boxes, kind = self.shown(torch.stack(pages), asked)
        reference = FeatureNet.load()(*(part[self.o["eval_pages"] :] for part in (self.boxes, self.kind)))
        matches = [
            sorted(k[k >= 0].tolist()) == [*np.repeat(range(5), c)] for k, c in zip(kind, asked.tolist())
        ]
        return {
            "reward": self.reward(torch.stack(pages), asked).mean().item(),
            "alignment": alignment(boxes, kind).mean().item(),
            "overlap": overlap(boxes, kind).mean().item(),
            "classes": sum(matches) / len(matches),
            "box_area": np.mean([b[:n, 2:].prod(1).mean() for b, n in zip(boxes, asked.sum(1))]),
            "frechet": frechet_distance(FeatureNet.load()(boxes, kind), reference),
        }

    def counts_of_pages(self):
        kind = self.kind[: self.o["eval_pages"] : 4]
        return torch.tensor([[(row == c).sum() for c in range(5)] for row in kind])


def assert_replayed(settings, tiny, folder, level):
    """The run in `folder` did what its settings say; returns (plain loop, rows of metrics.csv, results)."""
    plain = Plain(settings, tiny, level)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == len(state["accepted"]) == plain.o["rounds"]
    base = plain.evaluation(plain.untuned)
    for r, (row, theirs) in enumerate(zip(rows, state["accepted"])):
        x_s, x_0, asked, rewards = plain.sampled(r)
        kept = plain.accept(r, rewards)
        assert torch.equal(theirs["counts"], asked[kept]) and kept
        assert torch.allclose(theirs["x_0"], x_0[kept], atol=1e-4)
        assert torch.allclose(theirs["x_s"], x_s[kept], atol=1e-4)
        assert theirs["reward"].tolist() == pytest.approx(rewards[kept].tolist(), abs=0.02)
        plain.accepted.append({name: theirs[name] for name in ("x_0", "x_s", "counts")})
        loss, size = plain.update(r)
        assert row["round"] == r + 1 and row["pages_trained_on"] == size
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        assert row["reward_sampled"] == pytest.approx(rewards.mean().item(), abs=0.02)
        assert row["reward_accepted"] == pytest.approx(rewards[kept].mean().item(), abs=0.02)
        assert row["acceptance_rate"] == pytest.approx(len(kept) / len(rewards))
        for name, value in plain.evaluation(plain.weights()).items():
            assert row[f"{name}_held_out"] == pytest.approx(value, rel=1e-3, abs=0.02), name
    for mine, theirs in zip(plain.parameters, state["lora"].values(), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4)
    assert state["losses"] == pytest.approx(plain.losses, rel=1e-4)
    tuned = safetensors.torch.load_file(folder / "tuned.safetensors")
    weights = plain.weights()
    assert tuned.keys() == weights.keys()
    assert all(torch.allclose(tuned[name], weights[name], atol=1e-3) for name in tuned)
    assert Model.load(f"{folder}/tuned.safetensors", "cpu").switch == level
    results = json.loads((folder / "results.json").read_text())
    table = {row["metric"]: row for row in results["table"]}
    for name, value in base.items():
        assert table[name]["base"] == pytest.approx(value, rel=1e-3, abs=0.02)
        assert table[name]["tuned"] == pytest.approx(rows[-1][f"{name}_held_out"], rel=1e-6)
    assert results["switch"] == level and results["switch_at"] == round((1 - level**0.5) * plain.o["steps"])
    return plain, rows, results


def run_tiny(settings, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = run_inside(argv_of(settings, tiny), SCRIPT)
    assert code == 0, error
    return out, tmp_path / "run"


def assert_last_line(code, error, named):
    """The error is one line below the progress bars."""
    assert_one_line(code, error.rpartition("\r")[2], named)


@pytest.mark.drawn
def test_states_at_the_switch(tiny, tmp_path, monkeypatch):
    """The switch is between two levels: the base begins at the lower one, where the states are taken."""
    out, folder = run_tiny(SETTINGS, tiny, tmp_path, monkeypatch)
    _, rows, results = assert_replayed(SETTINGS, tiny, folder, 0.25)
    assert rows[0]["pages_trained_on"] < rows[1]["pages_trained_on"]
    assert "tuned model for 2 of 4 steps, base model from level 0.25 on" in out
    assert results["real"]["overlap"] >= 0 and results["real"]["classes"] == 1
    assert (folder / "grid.png").stat().st_size > 1000 < (folder / "curves.png").stat().st_size
    exec(out.partition("To use it:")[2], namespace := {})  # what it prints runs
    plain = Plain(SETTINGS, tiny, 0.25)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["lora"]
    for name, parameter in plain.model.lora().items():
        parameter.data.copy_(state[name])
    counts = plain.counts_of_pages()[0]
    x_0 = plain.page(derived_seed("eval", 0), counts, plain.weights())[1]
    assert torch.allclose(namespace["x_0"][0], x_0, atol=1e-3)


def test_clean_pages_without_accumulation(tiny, tmp_path, monkeypatch):
    """The base is sampled; the pages are noised to the levels above the switch."""
    changes = {"rule": "threshold", "reference": "base", "eta": 0.0, "switch": 0.5}
    settings = SETTINGS | changes | {"accumulate": False, "data": "x0"}
    del settings["top_k"]
    rewards = Plain(settings, tiny, 0.25).sampled(0)[3].sort().values
    settings["threshold"] = rewards[14:16].mean().item()  # half of them are above
    _, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    _, rows, _ = assert_replayed(settings, tiny, folder, 0.25)
    assert rows[0]["acceptance_rate"] == 0.5


def test_switch_at_the_clean_end_is_graft(tiny, tmp_path, monkeypatch):
    """The states are the pages: both kinds of data give the same run."""
    settings = SETTINGS | {"switch": 0.0, "rounds": 1}
    _, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    assert_replayed(settings, tiny, folder, 0)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert torch.equal(state["accepted"][0]["x_s"], state["accepted"][0]["x_0"])
    code, _, error = run_inside(argv_of(settings | {"data": "x0"}, tiny, "other"), SCRIPT)
    assert code == 0, error
    other = torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)
    assert state["losses"] == other["losses"]


def test_control_without_selection(tiny, tmp_path, monkeypatch):
    settings = SETTINGS | {"rule": "none", "rounds": 1, "lr": 1e-3}
    del settings["top_k"]
    _, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    _, rows, _ = assert_replayed(settings, tiny, folder, 0.25)
    assert rows[0]["acceptance_rate"] == 1 and rows[0]["kl"] == 0


PROBE = {"switch": "auto", "probe_groups": 4, "probe_restarts": 2, "probe_limit": 1.0}


def test_from_the_probe_to_the_pages(tiny, tmp_path, monkeypatch):
    settings = SETTINGS | PROBE | {"rounds": 1}
    out, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    with open(folder / "probe.csv", newline="") as file:
        probed = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [(row["step"], row["switch"]) for row in probed] == [(1, 0.5625), (2, 0.25), (3, 0.0625)]
    chosen = next((row for row in probed if row["unresolved"] + row["se"] <= 1), probed[-1])["switch"]
    assert f"recommended: --switch {chosen:g}" in out
    assert_replayed(settings | {"switch": chosen}, tiny, folder, chosen)
    code, out, error = run_inside([*argv_of(settings, tiny, "probed"), "--probe"], SCRIPT)
    assert code == 0 and "probe.csv, probe.png" in out, error
    assert (tmp_path / "probed" / "probe.csv").read_text() == (folder / "probe.csv").read_text()
    assert (tmp_path / "probed" / "probe.png").exists() and not (tmp_path / "probed" / "metrics.csv").exists()


def test_killed_and_resumed(tiny, tmp_path, monkeypatch):
    """Killed at several writes, half of the file being written: the resumed run leaves the same files."""
    files = ("probe.csv", "metrics.csv", "tuned.safetensors", "grid.png")
    settings = SETTINGS | PROBE | {"eval_every": 2}
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


def test_two_processes_are_as_one(tiny, tmp_path, monkeypatch):
    """Whole batches of pages are shared out, so the first round is the same to the last bit. Of one page an
    update one process has none."""
    settings = SETTINGS | PROBE | {"batch": 1}
    _, folder = run_tiny(settings, tiny, tmp_path, monkeypatch)
    argv = argv_of(settings, tiny, "shared")
    done = torchrun(2, tmp_path, [{"script": SCRIPT, "argv": argv, "name": "shared", "scale": None}])
    assert done.returncode == 0, done.stderr
    one, other = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("run", "shared")
    )
    assert (folder / "probe.csv").read_text() == (tmp_path / "shared" / "probe.csv").read_text()
    assert torch.equal(one["accepted"][0]["x_0"], other["accepted"][0]["x_0"])
    assert torch.equal(one["accepted"][0]["x_s"], other["accepted"][0]["x_s"])
    assert one["losses"] == pytest.approx(other["losses"], rel=1e-3)
    for name, value in one["lora"].items():
        assert torch.allclose(value, other["lora"][name], atol=1e-3)


def test_nothing_is_accepted(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"rule": "threshold", "threshold": 1.0}
    del settings["top_k"]
    code, _, error = run_inside(argv_of(settings, tiny), SCRIPT)
    assert_last_line(code, error, "--rule threshold accepted nothing: 0% of the groups had equal rewards")


def test_rewards_of_the_user(tiny, tmp_path, monkeypatch):
    """The file belongs to the run."""
    (tmp_path / "own.py").write_text("def top(page):\n    return -min(top for _, _, top, _, _ in page)\n")
    monkeypatch.chdir(tmp_path)
    settings = SETTINGS | {"reward": "own.py:top", "rounds": 1}
    code, _, error = run_inside(argv_of(settings, tiny), SCRIPT)
    assert code == 0, error
    state = torch.load("run/checkpoint.pt", weights_only=True)["accepted"][0]
    tops = [(x[:n, 1] / 4 + 0.5 - (x[:n, 3] / 4 + 0.15).clamp(min=0) / 2).min().item()
            for x, n in zip(state["x_0"], state["counts"].sum(1))]  # fmt: skip
    assert state["reward"].tolist() == pytest.approx([-top for top in tops], abs=1e-5)
    (tmp_path / "own.py").write_text("def top(page):\n    return page.no_such\n")
    code, _, error = run_inside(["--resume", "run"], SCRIPT)
    assert_one_line(code, error, "--resume run: own.py was changed after the run began")
    code, _, error = run_inside(argv_of(settings, tiny, "other"), SCRIPT)
    assert_last_line(code, error, "own.py:top: AttributeError")
