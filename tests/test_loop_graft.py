"""The whole loop of graft.py, made again: tiny real runs beside the plain loops of replay.py."""

import math
import re

import pytest
import torch

from replay import SETTINGS, TRAIN, Plain, Replay, assert_bfloat16, watched, worth


def replayed(settings, model, kind, cwd, monkeypatch, phases, **options):
    """The run, shown to be what its arguments say: (comparison, what the run did)."""
    seen = watched(settings, model, cwd, monkeypatch, "graft.py", **options)
    plain = Plain(settings, model, kind)
    replay, o = Replay(plain, seen, phases), plain.o
    assert len(replay.state["accepted"]) == o.rounds
    replay.evaluate(("base",), 0)
    for r in range(o.rounds):
        accepted = replay.sample(r, 0 if o.reference == "base" else o.steps, {"latents": -1})
        assert accepted["sample"].tolist() == [j for _, j, _, _ in replay.kept[r]]
        kept = replay.state["accepted"][0 if o.accumulate else r : r + 1]
        latents = [x for part in kept for x in part["latents"]]
        prompts = [TRAIN[i] for part in kept for i in part["prompt"].tolist()]
        replay.update(r, latents, prompts)
        if ("eval", r) in phases:
            replay.evaluate(("eval", r), o.steps)

    def lora(phase, step):
        return "off" if phase[0] == "base" or phase[0] == "sample" and o.reference == "base" else "merged"

    replay.assert_calls(lora)
    assert replay.assert_reports() == {}
    replay.assert_telling()
    return replay, seen


def test_the_best_of_each_prompt(tiny_v, tmp_path, monkeypatch):
    """Later rounds sample the newest model and train on what all rounds accepted. The third round begins a
    new order of the prompts. A share of the prompts is dropped."""
    settings = SETTINGS | {"top_k": 2, "prompt_dropout": 0.3, "lr": 0.03}
    phases = [("base",), *((kind, r) for r in range(3) for kind in ("sample", "update", "eval"))]
    replay, seen = replayed(settings, tiny_v, "v", tmp_path, monkeypatch, phases)
    rounds = [replay.plain.chosen(r) for r in range(3)]
    assert not set(rounds[0]) & set(rounds[1]) and set(rounds[2]) & set(rounds[0] + rounds[1])
    assert [row["images_trained_on"] for row in replay.rows] == [6, 12, 18]
    norms = [update.norm for updates in replay.updates.values() for update in updates]
    assert max(norms) < 1  # nothing is clipped
    assert "warning" not in seen.error[0]


def test_interrupted_twice(tiny_epsilon, tmp_path, monkeypatch):
    """In the second round's updates, and while the third samples. --resume restores the weights, the
    optimiser, the scaler, the accepted images and the rows. With guidance in the loss, gradients that are
    clipped and scaled; the base is sampled, only the newest images are trained on; two rewards are summed."""
    settings = SETTINGS | {
        "seed": 8,
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
    options = {"stops": [("step", 3), ("score", 14)], "scale": 1024.0}
    replay, seen = replayed(settings, tiny_epsilon, "epsilon", tmp_path, monkeypatch, phases, **options)
    assert replay.state["scaler"]["scale"] == 1024 * 2**3
    accepted = [len(kept) for kept in replay.kept]
    assert [row["images_trained_on"] for row in replay.rows] == accepted and len(set(accepted)) > 1
    norms = [update.norm for updates in replay.updates.values() for update in updates]
    assert min(norms) > 1.1  # all are clipped
    assert [math.isnan(row["reward_held_out"]) for row in replay.rows] == [True, False, False]
    assert all(line.startswith("\ninterrupted.") or "\ninterrupted." in line for line in seen.error[:2])


def test_exponential_with_rewards_above_the_bound(tiny_v, tmp_path, monkeypatch):
    """--reward_max is said to be too low. Without noise in the sampler, the conditional loss, no evaluation
    between the rounds."""
    settings = SETTINGS | {
        "seed": 2**40,
        "eta": 0.0,
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
    replay, seen = replayed(settings, tiny_v, "v", tmp_path, monkeypatch, phases)
    rewards = [[worth("own.py:likes", *p) for p in replay.pictures["sample", r]] for r in range(2)]
    above = [sum(reward > 1 for reward in values) for values in rewards]
    assert all(above)
    said = re.findall(
        r"warning: (\d+) of 12 rewards are above --reward_max 1 \(largest (\S+)\)", seen.error[0]
    )
    assert [int(n) for n, _ in said] == above
    assert [float(most) for _, most in said] == pytest.approx([max(v) for v in rewards], rel=1e-3)
    everything = {"round", "kl"} & replay.rows[0].keys()
    assert len(everything) == 2 and all(row["kl"] < 0.7 for row in replay.rows)


def test_bfloat16(tiny_v, tmp_path, monkeypatch):
    settings = SETTINGS | {"dtype": "bfloat16", "rounds": 1, "updates": 1, "guidance": 3.0, "eval_every": 0}
    seen = watched(settings, tiny_v, tmp_path, monkeypatch, "graft.py")
    assert_bfloat16(Plain(settings, tiny_v, "v"), seen, "latents")


def test_infinite_gradients_are_skipped(tiny_v, tmp_path, monkeypatch):
    """As with float16: the scale falls until the gradients are finite; only then the weights move."""
    changes = {"rounds": 1, "updates": 12, "lora_alpha": 3e5, "lr": 1e-6, "eval_every": 0}
    settings = SETTINGS | changes | {"save_accepted": False}
    seen = watched(settings, tiny_v, tmp_path, monkeypatch, "graft.py", scale=2.0**127)
    state = torch.load(seen.folder / "checkpoint.pt", weights_only=True)
    assert 0 < len(seen.weights) < 12 and state["scaler"]["scale"] < 2.0**127
    assert all(p.isfinite().all() for step in (*seen.gradients, *seen.weights) for p in step)
    assert all(torch.equal(p, q) for p, q in zip(seen.weights[-1], state["lora"].values(), strict=True))


# ---------------------------------------------------------------- sampled and accepted


def test_twenty_best_of_a_hundred(tiny_v, tmp_path, monkeypatch):
    """The binomial coefficients of equation (2) exceed every whole number of torch."""
    settings = SETTINGS | {
        "samples": 100,
        "top_k": 20,
        "prompts_per_round": 1,
        "steps": 2,
        "sample_batch": 64,
        "rounds": 1,
        "updates": 1,
    }
    seen = watched(settings, tiny_v, tmp_path, monkeypatch, "graft.py")
    plain = Plain(settings | {"steps": 4}, tiny_v, "v")
    assert "KL(accepted || base) 1.42 nats if no rewards tie" in seen.out[0]
    state = torch.load(seen.folder / "checkpoint.pt", weights_only=True)
    sampled = seen.scored["likes"][10:110]  # between the two evaluations
    rewards = [worth("own.py:likes", *p) for p in sampled]
    assert state["accepted"][0]["reward"].min().item() == pytest.approx(sorted(rewards)[-20], rel=1e-5)
    assert state["rows"][0]["kl"] == pytest.approx(plain.kl(rewards, []), rel=1e-6)
    assert state["rows"][0]["kl"] == pytest.approx(1.4243, abs=1e-3)
    assert state["rows"][0]["acceptance_rate"] == 0.2


@pytest.mark.parametrize("rule", [{"rule": "topk", "top_k": 2}, {"rule": "preference"}], ids=str)
def test_equal_rewards(tiny_v, tmp_path, monkeypatch, rule):
    """Ties are broken at random, flat groups are left out and counted."""
    settings = SETTINGS | {
        "reward": "own.py:coarse",
        "rounds": 1,
        "prompts_per_round": 7,
        "updates": 1,
    }
    settings |= rule
    seen = watched(settings, tiny_v, tmp_path, monkeypatch, "graft.py")
    phases = [("base",), ("sample", 0), ("update", 0), ("eval", 0)]
    replay = Replay(Plain(settings, tiny_v, "v"), seen, phases)
    replay.sample(0, 0, {"latents": -1})
    ((mine,), (theirs,)) = replay.rows, replay.state["rows"]
    assert {name: theirs[name] for name in mine} == pytest.approx(mine, rel=1e-5, abs=1e-6) and 0 < mine[
        "flat_groups"
    ] < 1
    replay.assert_accepted()
    rewards = [reward for kept in replay.kept for *_, reward in kept]
    assert len(set(rewards)) > 2
