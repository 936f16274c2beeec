"""The whole loop of pgraft.py, made again: tiny real runs beside the plain loops of replay.py."""

import csv
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

from replay import SETTINGS, TRAIN, Plain, Replay, assert_bfloat16, generator_of, seed_of, watched, worth


def replayed(settings, model, kind, cwd, monkeypatch, phases, switch_at=None, **options):
    """The run, shown to be what its arguments say: (comparison, what the run did, what else results.json
    holds). switch_at: steps of the tuned model; None: as the probe recommends."""
    seen = watched(settings, model, cwd, monkeypatch, "pgraft.py", **options)
    plain = Plain(settings, model, kind)
    replay, o = Replay(plain, seen, phases), plain.o
    probe = ()
    if switch_at is None:
        switch_at, probe = probed(replay)
    switch = replay.switch = plain.grid[switch_at]
    assert (
        f"  tuned model for {switch_at} of {o.steps} steps, base model from timestep {switch} on"
        in seen.out[-1]
    )
    assert len(replay.state["accepted"]) == o.rounds
    replay.evaluate(("base",), 0)
    for r in range(o.rounds):
        newest = r > 0 and o.reference == "newest"
        replay.sample(r, switch_at if newest else 0, {"x_s": switch_at, "x_0": -1})
        kept = replay.state["accepted"][0 if o.accumulate else r : r + 1]
        latents = [x for part in kept for x in part["x_s" if o.data == "xs" else "x_0"]]
        prompts = [TRAIN[i] for part in kept for i in part["prompt"].tolist()]
        replay.update(r, latents, prompts, switch if o.data == "xs" else None, switch)
        times = [t for update in replay.updates[r] for t in update.times]
        assert min(times) > switch
        if ("eval", r) in phases:
            replay.evaluate(("eval", r), switch_at)

    def lora(phase, step):
        newest = phase[0] == "sample" and phase[1] > 0 and o.reference == "newest"
        return "merged" if step < switch_at and (phase[0] == "eval" or newest) else "off"

    replay.assert_calls(lora, probe)
    results = replay.assert_reports()
    replay.assert_telling()
    assert results.pop("steps") == o.steps
    assert results.pop("switch_at") == switch_at and results.pop("switch_timestep") == switch
    stored = json.loads((seen.folder / "pgraft.json").read_text())
    level = {"alpha": plain.abar[switch] ** 0.5, "sigma": (1 - plain.abar[switch]) ** 0.5}
    level |= {"switch_timestep": switch, "switch": switch / 1000}
    assert {name: stored[name] for name in level} == pytest.approx(level, abs=1e-7)
    assert stored["model"] == model and stored["prediction_type"] == {"v": "v_prediction"}.get(kind, kind)
    assert {name: stored[name] for name in ("steps", "guidance", "eta", "data")} == {
        name: getattr(o, name) for name in ("steps", "guidance", "eta", "data")
    }
    assert stored["scheduler"]["beta_end"] == 0.012 and stored["scheduler"]["num_train_timesteps"] == 1000
    return replay, seen, results


# ---------------------------------------------------------------- the probe


def pairs_share(rewards):
    """Equation (7) from pairs of images of one state, and of two states of one prompt.
    rewards: [prompt][state][restart]"""
    same, other = [], []
    for first, second in rewards:
        same += [(a - b) ** 2 for state in (first, second) for a, b in itertools.combinations(state, 2)]
        other += [(a - b) ** 2 for a in first for b in second]
    return np.mean(same) / np.mean(other)


def probed(replay):
    """The probe made again: (steps of the tuned model that it recommends, [(timestep, images)] of its calls
    of the denoiser)."""
    plain, o, seen = replay.plain, replay.o, replay.seen
    order = torch.randperm(len(TRAIN), generator=generator_of(o.seed, "probe")).tolist()
    prompts = [TRAIN[i] for i in order[: o.probe_prompts] for _ in range(2)]
    numbers = [(i, j) for i in range(o.probe_prompts) for j in range(2)]
    seeds = [seed_of(o.seed, "probe", i, j) for i, j in numbers]
    plain.seeds += seeds
    states, steps = plain.sample(prompts, seeds, 0), len(plain.grid)

    pictures = iter(replay.pictures["probe",])
    rewards = np.zeros((steps, o.probe_prompts, 2, o.probe_restarts))
    for first in range(0, len(seeds), o.sample_batch):
        batch = range(first, min(first + o.sample_batch, len(seeds)))
        for step in range(1, steps):
            for restart in range(o.probe_restarts):
                again = [seed_of(seeds[n], step, restart) for n in batch]
                plain.seeds += again
                generators = [torch.Generator().manual_seed(seed) for seed in again]
                x, words = states[step][list(batch)], [prompts[n] for n in batch]
                for k in range(step, steps):
                    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
                    x = plain.step(x, k, words, False, noise)
                for n, x_0 in zip(batch, x):
                    pixels, prompt = next(pictures)
                    gap = np.abs(pixels.astype(int) - plain.picture(x_0))
                    assert prompt == prompts[n] and gap.max() <= 1 and (gap > 0).sum() <= 6
                    rewards[step][numbers[n]][restart] = worth(o.reward, pixels, prompt)
    assert next(pictures, None) is None

    rows = []
    for step in range(1, steps):
        shares = [pairs_share(np.delete(rewards[step], i, 0)) for i in range(o.probe_prompts)]
        error = math.sqrt((len(shares) - 1) * np.mean((shares - np.mean(shares)) ** 2))
        t = plain.grid[step]
        row = {"step": step, "timestep": t, "switch": t / 1000, "unresolved": pairs_share(rewards[step])}
        rows.append(row | {"se": error})
    with open(seen.folder / "probe.csv") as file:
        written = [{name: float(v) for name, v in row.items()} for row in csv.DictReader(file)]
    results = json.loads((seen.folder / "results.json").read_text())["probe"]
    for stored in (written, results, replay.state["probe"]):
        for mine, theirs in zip(rows, stored, strict=True):
            assert list(theirs) == list(mine) and theirs == pytest.approx(mine, rel=1e-4, abs=1e-6)
    good = [row for row in rows if row["unresolved"] + row["se"] <= o.probe_limit]
    chosen = good[0]
    for out in seen.out:
        printed = re.findall(r"^ +(\d) +(\d+) +(\d\.\d+) +(-?[\d.]+) +([\d.]+)$", out, re.M)
        for line, row in zip(printed, rows, strict=True):
            assert [float(word) for word in line] == pytest.approx(list(row.values()), abs=0.0051)
        reason = f"the noisiest level with V(t) + s.e. at most {o.probe_limit:g}"
        assert f"  recommended: --switch {chosen['switch']:g}, {reason}\n" in out
    (axis,) = [f.axes[0] for f in seen.figures if "V(t)" in f.axes[0].get_ylabel()][-1:]
    curve, limit = (drawn.lines[0].get_xydata() for drawn in axis.containers)
    assert np.allclose(curve, [(row["switch"], row["unresolved"]) for row in rows], atol=1e-6)
    assert np.allclose(limit, [(row["switch"], o.probe_limit) for row in rows])
    (bars,) = axis.containers[0].lines[2]
    for (below, above), row in zip(bars.get_segments(), rows, strict=True):
        assert above[1] - below[1] == pytest.approx(2 * row["se"], abs=1e-5)

    calls = []
    for first in range(0, len(seeds), o.sample_batch):
        size = min(o.sample_batch, len(seeds) - first)
        for step in range(1, steps):
            calls.append((plain.grid[step - 1], size))
            calls += [(t, size) for _ in range(o.probe_restarts) for t in plain.grid[step:]]
    replay.probe = rows
    return chosen["step"], calls


# ---------------------------------------------------------------- runs

SETTINGS = SETTINGS | {"data": "xs"}


def test_from_the_probe_to_the_images(tiny_v, tmp_path, monkeypatch):
    """The states at the recommended switch are trained on, at the levels above it. Interrupted in the second
    round's updates: the probe is not made again."""
    settings = SETTINGS | {
        "steps": 5,
        "switch": "auto",
        "probe_prompts": 4,
        "probe_restarts": 3,
        "probe_limit": 0.75,
        "rounds": 2,
        "top_k": 2,
        "prompt_dropout": 0.25,
        "lr": 0.03,
    }
    phases = [
        ("probe",),
        ("base",),
        ("sample", 0),
        ("update", 0),
        ("eval", 0),
        ("sample", 1),
        ("update", 1, 1),
    ]
    phases += [("base",), ("update", 1), ("eval", 1)]
    options = {"stops": [("step", 3)]}
    replay, seen, results = replayed(settings, tiny_v, "v", tmp_path, monkeypatch, phases, **options)
    assert results.keys() == {"probe"} and results["probe"][2]["switch"] * 1000 == replay.switch
    row = replay.probe[1]  # noisier, and not recommended because of its error
    assert row["unresolved"] < 0.75 < row["unresolved"] + row["se"]


def test_interrupted_twice(tiny_epsilon, tmp_path, monkeypatch):
    """In the second round's updates, and while the third samples. --resume restores the weights, the
    optimiser, the scaler, the accepted images and the rows. The clean images are trained on, at the levels
    above the switch, with guidance in the loss; gradients are clipped and scaled; the base is sampled, only
    the newest images are trained on; two rewards are summed."""
    settings = SETTINGS | {
        "seed": 8,
        "data": "x0",
        "switch": 0.3,
        "eta": 0.5,
        "guidance": 2.5,
        "reward": "0.5*own.py:likes+2*own.py:colours",
        "eval_rewards": "own.py:colours,own.py:likes,jpeg_compressibility",
        "rule": "threshold",
        "threshold": 0.3,
        "accumulate": False,
        "reference": "base",
        "lora_alpha": 300.0,
        "lr": 3e-4,
        "micro_batch": 3,
        "gradient_checkpointing": True,
        "prompt_dropout": 0.2,
        "eval_every": 2,
        "save_accepted": False,
    }
    phases = [("base",), ("sample", 0), ("update", 0), ("sample", 1), ("update", 1, 1)]
    phases += [("base",), ("update", 1), ("eval", 1), ("sample", 2, 2)]
    phases += [("base",), ("sample", 2), ("update", 2), ("eval", 2)]
    options = {"stops": [("step", 3), ("score", 14)], "scale": 1024.0, "switch_at": 2}
    replay, seen, results = replayed(
        settings, tiny_epsilon, "epsilon", tmp_path, monkeypatch, phases, **options
    )
    assert results == {"probe": None}
    assert replay.state["scaler"]["scale"] == 1024 * 2**3
    accepted = [len(kept) for kept in replay.kept]
    assert [row["images_trained_on"] for row in replay.rows] == accepted and len(set(accepted)) > 1
    norms = [update.norm for updates in replay.updates.values() for update in updates]
    assert min(norms) > 1.1  # all are clipped
    assert [math.isnan(row["reward_held_out"]) for row in replay.rows] == [True, False, False]


def test_exponential(tiny_v, tmp_path, monkeypatch):
    """One step of the tuned model, states near the noise, the conditional loss, no evaluation between the
    rounds."""
    settings = SETTINGS | {
        "seed": 2**40,
        "switch": 0.8,
        "guidance": 3.0,
        "guided_loss": False,
        "rule": "exponential",
        "beta": 1.5,
        "reward_max": 1.0,
        "rounds": 2,
        "lr": 0.03,
        "eval_every": 0,
    }
    phases = [("base",), *((kind, r) for r in range(2) for kind in ("sample", "update")), ("eval", 1)]
    replay, seen, _ = replayed(settings, tiny_v, "v", tmp_path, monkeypatch, phases, switch_at=1)
    rewards = [[worth("own.py:likes", *p) for p in replay.pictures["sample", r]] for r in range(2)]
    above = [sum(reward > 1 for reward in values) for values in rewards]
    said = re.findall(
        r"warning: (\d+) of 12 rewards are above --reward_max 1 \(largest (\S+)\)", seen.error[0]
    )
    assert [int(n) for n, _ in said] == above and all(above)


def test_bfloat16(tiny_v, tmp_path, monkeypatch):
    half = {"dtype": "bfloat16", "switch": 0.4, "rounds": 1, "updates": 1, "guidance": 3.0, "eval_every": 0}
    settings = SETTINGS | half
    seen = watched(settings, tiny_v, tmp_path, monkeypatch, "pgraft.py")
    assert_bfloat16(Plain(settings, tiny_v, "v"), seen, "x_s", level=249, above=249)
