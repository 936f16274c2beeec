"""The world of the embedded flow model, its feature network, and the script that trains both."""

import pytest
import torch

from common import Flow, check_flow, model_hash
from conftest import assert_one_line, run_inside, seeded
from inverse_noise_correction import frechet_distance
from shapes import flow_data, train_flow
from shapes.flow_data import FeatureNet, draw
from utils.runs import InputError


def test_world():
    images, kinds, labels = draw(600, 3)
    assert images.shape == (600, 1, 8, 8) and images.dtype == torch.float32
    assert labels.shape == (600, len(flow_data.LABELS))
    assert set(kinds.tolist()) == {0, 1, 2} and torch.equal(images, draw(600, 3)[0])
    x, y, radius, ground, fill = labels[:, :5].T.round(decimals=3)[..., None, None]
    rows, columns = torch.meshgrid(torch.arange(8) + 0.5, torch.arange(8) + 0.5, indexing="ij")
    distance = ((rows - y) ** 2 + (columns - x) ** 2).sqrt()
    outside, inside = distance > 1.3 * radius + 1, distance < 0.3 * radius
    residual = images[:, 0] - torch.where(outside, ground, fill)
    assert residual[outside].std().item() == pytest.approx(flow_data.GROUND_NOISE, rel=0.02)
    assert residual[inside].std().item() == pytest.approx(flow_data.TEXTURE_NOISE, rel=0.05)
    assert residual[outside].mean().abs() < 0.01 and residual[inside].mean().abs() < 0.03
    varied, _, wrong = draw(600, 3, vary=True)
    assert wrong[:, 5].std() > 0.02 and (wrong[:, 7] == 0).double().mean().item() == pytest.approx(
        0.5, abs=0.1
    )
    assert not torch.equal(varied, images)
    assert (labels[:, 5:7].std(0) == 0).all() and (labels[:, 7:] == 0).all()


def test_feature_net_round_trip(tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net, images = FeatureNet(), torch.randn(5, 1, 8, 8)
    net.scale.fill_(3)
    save_file({name: value.half() for name, value in net.state_dict().items()}, tmp_path / "f.safetensors")
    loaded = FeatureNet.load(tmp_path / "f.safetensors")
    assert loaded(images).shape == (5, 64) and torch.allclose(loaded(images), net(images), atol=1e-2)


def test_embedded_features_and_size():
    net = FeatureNet.load()
    images, kinds, labels = draw(1000, 12345)
    logits, answers = net.answers(images)
    assert (logits.argmax(1) == kinds).float().mean() > 0.9
    pairs = zip(answers.T[:5], labels.T[:5])
    correlation = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]
    assert min(correlation[:4]) > 0.9 and correlation[4] > 0.65  # the texture hides the shape's grey
    reference, floor = net(draw(5000, 1)[0]), net(draw(1000, 2)[0])
    noisier = net(draw(1000, 2)[0] + 0.05 * torch.randn(1000, 1, 8, 8, generator=seeded()))
    assert frechet_distance(reference, noisier) > 1.5 * frechet_distance(reference, floor)
    assert sum(f.stat().st_size for f in flow_data.FLOW.rglob("*") if f.is_file()) <= 4e6


def test_training_script(tmp_path):
    """A few updates: what it writes is what the scripts load, and another seed gives another flow."""
    short = {"device": "cpu", "images": 100, "updates": 2, "batch": 4, "feature_updates": 2}
    short["network"] = "token:8,8"
    train_flow.main(train_flow.Args(out=tmp_path / "flow", **short))
    train_flow.main(train_flow.Args(out=tmp_path / "other", seed=1, features=False, **short))
    assert check_flow(str(tmp_path / "flow")) == (1, 8, 8)
    first, other = (Flow.load(str(tmp_path / name), "cpu") for name in ("flow", "other"))
    assert model_hash(first.network) != model_hash(other.network)
    assert next(first.network.parameters()).dtype == torch.float32
    assert not (tmp_path / "other" / "features.safetensors").exists()
    features = FeatureNet.load(tmp_path / "flow" / "features.safetensors")(draw(2000, 1)[0])
    assert torch.allclose(features.std(0), torch.ones(64), atol=0.6)
    with pytest.raises(InputError, match="transformer exists: remove it or choose another --out"):
        train_flow.main(train_flow.Args(out=tmp_path / "flow", **short))
    with pytest.raises(InputError, match="features.safetensors exists"):
        train_flow.main(train_flow.Args(out=tmp_path / "flow", flow=False, **short))


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--data missing", "--data missing: no such folder"),
        ("--data empty", "--data empty: 0 images are too few, 20 to invert and 20 as reference are needed"),
        ("--data empty --channels 2", "--channels 2: must be 1 (grey) or 3 (RGB)"),
        ("--data empty --size 0", "--size 0: must be between 1 and 1024"),
        ("--data empty --no-flow", "--no-flow: of --data only a flow can be trained"),
        ("--data empty --size 10 --network unet:4,4,4", "--network unet:4,4,4: 3 levels need a size that 4"),
        ("--network unet:3", "--network unet:3: give unet: or token: and numbers"),
        ("--updates 0", "--updates 0: must be between 1 and"),
    ],
)
def test_bad_input_of_the_training_script(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, error = run_inside([*flags.split(), "--out", "new"], "shapes/train_flow.py")
    assert_one_line(code, error, named)
    assert not (tmp_path / "new").exists()
