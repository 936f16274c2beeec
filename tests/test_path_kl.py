"""benchmarks/path_kl.py: the KL of two Gaussian chains against their joint densities; run folders of graft.py
and pgraft.py; what it refuses."""

import contextlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import path_kl
from conftest import arguments_for, run_inside, seeded
from pgraft import Args as PgraftArgs
from utils.prompts import read_prompt_sets


class Pair:
    """A model of one number for which everything is known: predicts eps = weight x; of the base another."""

    prediction_type, device = "epsilon", "cpu"

    def __init__(self, tuned, base):
        self.tuned, self.base, self.off = tuned, base, False

    def timesteps(self, steps):
        return [3, 2, 1, 0][:steps]

    def predict(self, x, t, text, guidance):
        return (self.base if self.off else self.tuned) * x

    def alpha_sigma(self, t):
        alpha = {3: 0.2, 2: 0.5, 1: 0.8, 0: 0.95, -1: 1.0}[t]
        return alpha, (1 - alpha**2) ** 0.5

    @contextlib.contextmanager
    def lora_off(self):
        self.off = True
        yield
        self.off = False


def chain(weights, eta):
    """Mean factors and standard deviations of the steps of DDIM (arXiv 2010.02502, 12 and 16)."""
    levels = [Pair(0, 0).alpha_sigma(t) for t in (3, 2, 1, 0, -1)]
    steps = []
    for weight, (alpha, sigma), (after, sigma_after) in zip(weights, levels, levels[1:]):
        std = eta * sigma_after / sigma * max(1 - alpha**2 / after**2, 0) ** 0.5
        factor = after * (1 - sigma * weight) / alpha + max(sigma_after**2 - std**2, 0) ** 0.5 * weight
        steps.append((factor, std))
    return steps


def covariance(steps):
    """Of (x_0, x_1, x_2, x_3), the states that have a density."""
    matrix = torch.zeros(4, 4, dtype=torch.float64)  # state = matrix @ draws
    matrix[0, 0] = 1
    for k, (factor, std) in enumerate(steps[:3]):
        matrix[k + 1] = factor * matrix[k]
        matrix[k + 1, k + 1] = std
    return matrix @ matrix.T


@pytest.mark.parametrize("switch_at", [4, 2])
def test_kl_of_gaussian_chains(switch_at):
    """The mean over paths is the KL of the two joint Gaussians. The last step, which is certain, is left out;
    from the switch on both chains step alike."""
    eta, n = 0.8, 200_000
    tuned = chain([0.5] * switch_at + [0.3] * (4 - switch_at), eta)
    p, q = (
        torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), covariance(steps))
        for steps in (tuned, chain([0.3] * 4, eta))
    )
    expected = torch.distributions.kl_divergence(p, q).item()
    noise = torch.randn(5, n, 1, generator=seeded())
    args = SimpleNamespace(guidance=1.0, eta=eta)
    values = path_kl.path_kl(Pair(0.5, 0.3), noise, None, args, switch_at)
    assert values.shape == (n,) and values.mean().item() == pytest.approx(expected, rel=0.02)
    assert path_kl.path_kl(Pair(0.3, 0.3), noise, None, args, 4).abs().max() == 0


def test_a_sampler_without_noise_is_refused():
    noise = torch.randn(5, 3, 1, generator=seeded())
    with pytest.raises(path_kl.InputError, match="has no noise"):
        path_kl.path_kl(Pair(0.5, 0.3), noise, None, SimpleNamespace(guidance=1.0, eta=0.0), 4)


def test_run_folders(tiny_arguments, tmp_path, monkeypatch, capsys):
    """Entries are added to the file; P-GRAFT's steps without LoRA add nothing; an error is one line."""
    monkeypatch.chdir(tmp_path)
    for script, flags in (("graft.py", []), ("pgraft.py", ["--switch", "0.6"])):
        argv = [*arguments_for(PgraftArgs, tiny_arguments), "--eta", "1", *flags]
        code, _, error = run_inside([*argv, "--output", f"runs/{script[:-3]}"], script)
        assert code == 0, error
    (tmp_path / "result.json").write_text(json.dumps({"old/one": {"kl": 1.0, "se": 0.1}}))
    monkeypatch.setattr(path_kl, "RESULT", tmp_path / "result.json")
    monkeypatch.setattr(sys, "argv", "path_kl.py runs/graft runs/pgraft --device cpu".split())
    assert path_kl.main() == 0
    stored = json.loads((tmp_path / "result.json").read_text())
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--jobs", "2"])
    assert path_kl.main() == 0  # in two processes, whose threads may round differently
    for name, entry in json.loads((tmp_path / "result.json").read_text()).items():
        assert entry == pytest.approx(stored[name], rel=1e-4)
    assert stored.keys() == {"old/one", "runs/graft", "runs/pgraft"} and stored["old/one"]["kl"] == 1
    assert all(stored[f"runs/{name}"][key] > 0 for name in ("graft", "pgraft") for key in ("kl", "se"))
    # without its switch the same LoRA is further from the base
    (tmp_path / "runs" / "pgraft" / "pgraft.json").rename("away.json")
    monkeypatch.setattr(sys, "argv", sys.argv[:-2])
    assert path_kl.main() == 0
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["runs/graft"] == stored["runs/graft"]
    assert again["runs/pgraft"]["kl"] > stored["runs/pgraft"]["kl"]
    # the mean over prompts of their two paths, and its standard error over prompts
    monkeypatch.setattr(
        path_kl, "path_kl", lambda model, noise, *_: torch.arange(noise.shape[1]).float() ** 2
    )
    args = json.loads((tmp_path / "runs" / "graft" / "args.json").read_text())
    n = len(read_prompt_sets(args["prompts"], args["eval_prompts"])[1])
    pairs = np.array([((2 * p) ** 2 + (2 * p + 1) ** 2) / 2 for p in range(n)])
    entry = path_kl.measure(tmp_path / "runs" / "graft", "cpu")
    assert entry == pytest.approx({"kl": pairs.mean(), "se": pairs.std(ddof=1) / n**0.5})
    monkeypatch.setattr(sys, "argv", ["path_kl.py", "runs"])
    assert path_kl.main() == 2 and "error: runs: has no args.json" in capsys.readouterr().err
