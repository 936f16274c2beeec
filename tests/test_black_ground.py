"""benchmarks/black_ground.py: a flow for which the noise of its samples and of its inverse are known."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import black_ground
from common import Flow, derived_seed
from conftest import assert_one_line, run_inside, seeded
from fashion.images import FOLDER
from inverse_noise_correction import Corrector, euler_sample

FLAT, VARIED = 0.05, 0.5  # deviations of the images for which the flow is exact: left half, right half


def exact_flow(size):
    """The exact velocity for images whose pixels are independent: N(-1, FLAT^2) in the left half,
    N(0, VARIED^2) in the right one."""
    left = (torch.arange(size) < size // 2).expand(1, 1, size, size)
    mean, variance = -1.0 * left, torch.where(left, FLAT**2, VARIED**2)

    def velocity(x, sigma):
        sigma = sigma.view(-1, 1, 1, 1)
        slope = (sigma - (1 - sigma) * variance) / (sigma**2 + (1 - sigma) ** 2 * variance)
        return slope * (x - (1 - sigma) * mean) - mean

    def grid(steps, power):
        return torch.linspace(1, 0, steps + 1) ** power

    return SimpleNamespace(velocity=velocity, grid=grid, shape=(1, size, size))


def gain(std, sigmas):
    """The deviation of T(N(0, 1)) for the exact velocity of N(0, std^2)."""
    factor = 1.0
    for now, after in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        slope = (now - (1 - now) * std**2) / (now**2 + (1 - now) ** 2 * std**2)
        factor *= 1 + (after - now) * slope
    return factor


@pytest.mark.parametrize("steps, power", [(8, 1.0), (5, 1.3)])
def test_noise_of_flat_ground(steps, power):
    """The inverse divides the images' noise by the gain of the sampler, which is not the same where they are
    flat. With as much noise as the sampler itself leaves there the inverted noise is standard."""
    flow, size = exact_flow(8), 8
    flat, varied = (gain(std, flow.grid(steps, power)) for std in (FLAT, VARIED))
    images = torch.full((3000, 1, size, size), -1.0)
    images[..., size // 2 :] = VARIED * torch.randn(3000, 1, size, size // 2, generator=seeded())
    images[..., size // 2 :].clamp_(min=black_ground.BLACK)  # no black ground there
    varied *= VARIED / images[..., size // 2 :].std().item()
    assert black_ground.black_ground(images).sum() == 3000 * size * (size // 2 - 1)
    rows = black_ground.measure(flow, images, steps, power, (0.0, flat, 3 * flat))
    assert [row["data_noise"] for row in rows] == [0.0, flat, 3 * flat]
    for row in rows:
        assert (row["steps"], row["power"], row["left_out"]) == (steps, power, 0.0) and row["calls"] > steps
        assert row["own"] == pytest.approx(flat, rel=0.02)
        assert row["ground"] == pytest.approx(row["data_noise"] / flat, rel=0.02, abs=0.02)
        # of the five columns elsewhere one is flat: the neighbour of the other half
        square = (row["ground"] ** 2 + 4 * (VARIED**2 + row["data_noise"] ** 2) / varied**2) / 5
        assert row["elsewhere"] == pytest.approx(square**0.5, rel=0.03)
        square = (3 * row["ground"] ** 2 + 5 * row["elsewhere"] ** 2) / 8  # all columns
        assert row["all"] == pytest.approx(square**0.5, rel=0.01)
    assert rows[1]["ground"] == pytest.approx(1, rel=0.02) and rows[2]["ground"] > 2.9


def test_images_that_are_left_out():
    """They are counted, and their noises do not count. Those of the others stay with their images."""
    flow = exact_flow(4)
    images = torch.full((11, 1, 4, 4), -1.0)
    images[..., 2:] = 0.3
    images[0], images[[2, 3, 7]] = torch.nan, 0.3  # the first is left out, three have no black ground
    (row,) = black_ground.measure(flow, images, 4, 1.0, (0.01,))
    flat = gain(FLAT, flow.grid(4, 1.0))
    assert row["left_out"] == pytest.approx(1 / 11)
    assert row["ground"] == pytest.approx(0.01 / flat, rel=0.5) and row["elsewhere"] > 20


FLAGS = "--images 20 --updates 2 --batch 4 --lr 0.1 --corrector_network unet:4 --steps 2 --grid_power 0.8"
FLAGS += " --tolerance 1 --max_failed 1 --no-longer --eval_images 20 --eval_steps 2 --data_noise 0.3"


@pytest.mark.parametrize("normalise", ["gaussian", "scale"])
def test_runs(normalise, monkeypatch, tmp_path):
    """The noises of a run, split by the images that they become; beside them the rows of the flow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(black_ground, "RESULT", tmp_path / "black_ground.json")
    monkeypatch.setattr(black_ground, "SAMPLERS", ((2, 1.0), (3, 0.8)))
    monkeypatch.setattr(black_ground, "DATA_NOISE", (0.3, 0.2))
    monkeypatch.setattr(black_ground, "IMAGES", 6)
    argv = [*FLAGS.split(), "--normalise", normalise, "--output", "run", "--device", "cpu"]
    code, _, error = run_inside(argv, "inverse_noise_correction.py")
    assert code == 0, error
    assert black_ground.main([Path("run")]) == 0
    record = json.loads((tmp_path / "black_ground.json").read_text())
    assert record["command"] == "python benchmarks/black_ground.py run" and record["hardware"]
    kinds = [(row["steps"], row["power"], row["data_noise"]) for row in record["rows"]]
    assert kinds == [(2, 1.0, 0.3), (2, 1.0, 0.2), (3, 0.8, 0.3), (3, 0.8, 0.2)]

    flow = Flow.load(str(FOLDER), "cpu")
    sigmas = flow.grid(2, 0.8)
    corrector = Corrector.load("run/corrector", flow.network, flow.scheduler)
    noises = torch.load("run/inversion/000000.pt")["noise"]
    eps = torch.stack([torch.randn(1, 16, 16, generator=seeded(derived_seed("eval", i))) for i in range(6)])
    expected = {"inverted": noises[:6], "scale only": noises[10:].square().mean().sqrt() * eps}
    if normalise == "gaussian":
        expected["gaussian"] = corrector.destandardise(eps)
    expected["corrector"] = corrector(eps)
    assert [row["arm"] for row in record["runs"]] == list(expected)
    for row in record["runs"]:
        z = expected[row["arm"]]
        dark = euler_sample(flow.velocity, z, sigmas) < black_ground.BLACK
        ground = torch.zeros_like(dark)
        for i, j in itertools.product(range(16), range(16)):
            ground[..., i, j] = dark[..., max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].all(3).all(2)
        assert (row["run"], row["data_noise"]) == ("run", 0.3) and ground.any() and not ground.all()
        for name, where in {"ground": ground, "elsewhere": ~ground}.items():
            assert row[name] == pytest.approx(z[where].std().item(), rel=1e-4)


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert black_ground.main([tmp_path / "none"]) == 2
    assert_one_line(2, capsys.readouterr().err, "none: no finished run")
