"""The embedded flow's images, its feature network, and the script that makes both and the flow."""

import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from common import Flow, check_flow, derived_seed, model_hash
from conftest import assert_one_line, run_inside, seeded
from fashion import train
from fashion.features import CLASSES, FeatureNet
from fashion.images import FOLDER, reference_images, sheet, training_images
from inverse_noise_correction import euler_sample, frechet_distance, new_network
from utils.runs import InputError

INC = "inverse_noise_correction.py"


def idx(array):
    """An IDX file: two zeros, 8 for bytes, the number of dimensions, the dimensions, the data."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder like Fashion-MNIST's with 300 training and 200 test images, and their arrays."""
    rng, folder, arrays = np.random.default_rng(0), tmp_path / "mnist", {}
    folder.mkdir()
    for name, count in (("train", 300), ("t10k", 200)):
        arrays[name] = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        for part, array in zip(("images-idx3", "labels-idx1"), arrays[name]):
            packed = gzip.compress(idx(array)) if name == "train" else idx(array)
            (folder / f"{name}-{part}-ubyte{'.gz' * (name == 'train')}").write_bytes(packed)
    return folder, arrays


def short(**changed):
    few = {"device": "cpu", "updates": 2, "batch": 4, "feature_updates": 2, "network": "unet:4,8"}
    return few | changed


def test_embedded_images():
    images, reference = training_images(), reference_images()
    assert images.shape == (20_000, 1, 16, 16) and reference.shape == (10_000, 1, 16, 16)
    for part in (images, reference):
        assert part.dtype == torch.float32 and part.min() == -1 and part.max() == 1
        assert len(part.flatten(1).unique(dim=0)) > 0.99 * len(part)
    # clothes fill the middle and leave the corners black
    assert images[..., 6:10, 6:10].mean() > 0 and images[..., :1, :1].mean() < -0.95
    both = torch.cat([images, reference]).flatten(1).unique(dim=0)
    assert len(both) > 0.99 * (
        len(images) + len(reference)
    )  # no test image is among the training images here


def test_sheet_shows_the_images_in_order():
    levels = np.random.default_rng(0).integers(0, 256, (300, 16, 16), np.uint8)
    picture = np.array(sheet(levels))
    assert picture.shape == (48, 1600)
    for i in (0, 1, 99, 100, 250):
        row, column = divmod(i, 100)
        assert (picture[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] == levels[i]).all()


def test_shrink_is_the_mean_of_the_covered_pixels():
    """28 = 16 x 1.75: every pixel of the original counts in one pixel."""
    image = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    owner = np.ceil((np.arange(28) + 0.5) / 1.75) - 1  # the pixel that its centre lies in
    expected = [[image[owner == y][:, owner == x].mean() for x in range(16)] for y in range(16)]
    assert np.abs(train.shrink(image, 16) - np.array(expected)).max() <= 1  # rounded twice
    assert (train.shrink(image, 28) == image).all()


@pytest.mark.parametrize("size", [16, 28])
def test_feature_net_round_trip(size, tmp_path):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net, images = FeatureNet(size), torch.randn(5, 1, size, size)
    save_file({name: value.half() for name, value in net.state_dict().items()}, tmp_path / "f.safetensors")
    loaded = FeatureNet.load(tmp_path / "f.safetensors")
    assert loaded(images).shape == (5, 64) and torch.allclose(loaded(images), net(images), atol=1e-2)
    assert loaded.classify(images).shape == (5, len(CLASSES))
    assert torch.equal(loaded.classify(images), loaded.head(loaded(images)))


def test_embedded_features_and_size():
    """They tell real images from images with the faults of a sampler."""
    net, images, reference = FeatureNet.load(), training_images()[:2000], reference_images()[:4000]
    features = net(reference)
    floor = frechet_distance(features, net(images))
    noise = 0.2 * torch.randn(images.shape, generator=seeded())
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    for faulty in (images + noise, 0.85 * images, blurred):
        assert frechet_distance(features, net(faulty)) > 1.5 * floor
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 7e6


@torch.no_grad()
def test_embedded_flow_draws_clothes():
    """Its images are told by the feature network as confidently as real ones, and are of many classes."""
    flow, net = Flow.load(str(FOLDER), "cpu"), FeatureNet.load()
    assert check_flow(str(FOLDER)) == flow.shape == (1, 16, 16)
    noise = torch.randn(64, 1, 16, 16, generator=seeded())
    sampled = euler_sample(flow.velocity, noise, flow.grid(16, 1.0))
    surest, kind = net.classify(sampled).softmax(1).max(1)
    assert surest.mean() > net.classify(reference_images()[:200]).softmax(1).amax(1).mean() - 0.1
    assert len(kind.unique()) >= 7
    assert net.classify(noise).softmax(1).amax(1).mean() < surest.mean() - 0.1


def test_training_script(mnist, tmp_path, capsys, monkeypatch):
    """A few updates: what it writes is what the scripts load, and another seed gives another flow."""
    folder, arrays = mnist
    monkeypatch.setattr(train, "SHEETS", {"train": 200, "reference": 200})
    trained_on, train_flow = [], train.train_flow
    monkeypatch.setattr(
        train, "train_flow", lambda args, images: trained_on.append(images) or train_flow(args, images)
    )
    train.main(train.Args(out=tmp_path / "all", mnist=folder, **short()))
    train.main(
        train.Args(out=tmp_path / "other", mnist=folder, seed=1, features=False, images=False, **short())
    )
    assert "of the test images right" in capsys.readouterr().out
    shrunk = torch.from_numpy(np.stack([train.shrink(image, 16) for image in arrays["train"][0]]))
    clean = shrunk[:, None].float() / 127.5 - 1
    assert trained_on[0].shape == (300, 1, 16, 16)  # all training images, with noise
    assert (trained_on[0] - clean).std().item() == pytest.approx(0.02, rel=0.02)
    for name, count in (("train", 200), ("reference", 200)):
        levels = np.array(Image.open(tmp_path / "all" / f"{name}.png"))
        assert levels.shape == (16 * count // 100, 1600)
        assert (levels[:16, :16] == train.shrink(arrays[train.FILES[name]][0][0], 16)).all()
    assert check_flow(str(tmp_path / "all")) == (1, 16, 16)
    first, other = (Flow.load(str(tmp_path / name), "cpu") for name in ("all", "other"))
    assert model_hash(first.network) != model_hash(other.network)
    assert next(first.network.parameters()).dtype == torch.float32
    for name in ("unet/diffusion_pytorch_model.safetensors", "features.safetensors"):  # as they are stored
        assert {value.dtype for value in load_file(tmp_path / "all" / name).values()} == {torch.float16}
    assert sorted(file.name for file in (tmp_path / "other").iterdir()) == ["scheduler", "unet"]
    assert FeatureNet.load(tmp_path / "all" / "features.safetensors")(clean).shape == (300, 64)
    with pytest.raises(InputError, match="unet exists: remove it or choose another --out"):
        train.main(train.Args(out=tmp_path / "all", mnist=folder, **short()))
    with pytest.raises(InputError, match="features.safetensors exists"):
        train.main(train.Args(out=tmp_path / "all", mnist=folder, flow=False, images=False, **short()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_of_the_flow(dtype, capsys, monkeypatch):
    """Three updates, computed again: the draws, equation (4), clipping, AdamW, the average, the losses.
    With bfloat16 the network's products are rounded, the weights and what AdamW keeps are not."""
    images = torch.rand(7, 1, 8, 8, generator=seeded()) * 40 - 20  # far out, so that gradients are clipped
    args = train.Args(
        out="unused", device="cpu", seed=3, updates=3, batch=5, lr=0.3, network="unet:4,8", dtype=dtype
    )
    products = []
    monkeypatch.setattr(F, "conv2d", lambda *a, conv2d=F.conv2d: products.append(conv2d(*a)) or products[-1])
    trained = train.train_flow(args, images).network
    assert {product.dtype for product in products} == {getattr(torch, dtype)}
    assert {p.dtype for p in trained.parameters()} == {torch.float32}

    torch.manual_seed(3)
    network = new_network("unet:4,8", 8, 1, 1)
    average = {name: p.detach().clone() for name, p in network.named_parameters()}
    first = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    torch.manual_seed(derived_seed(3, "flow"))
    losses, norms = [], []
    for i in range(3):
        x = images[torch.randint(7, (5,))]
        eps, sigma = torch.randn(5, 1, 8, 8), torch.rand(5)
        level = sigma.view(5, 1, 1, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            velocity = network((1 - level) * x + level * eps, 1000 * sigma).sample
        loss = ((velocity - (eps - x)) ** 2).mean()
        network.zero_grad()
        loss.backward()
        norms.append(sum(p.grad.square().sum() for p in network.parameters()).sqrt().item())
        losses.append(loss.item())
        rate = 0.3 * (i + 1) / 100 * (1 + np.cos(np.pi * i / 3)) / 2
        for name, p in network.named_parameters():
            gradient = p.grad / max(1.0, norms[-1])
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            m, v = first[name] / (1 - 0.9 ** (i + 1)), second[name] / (1 - 0.999 ** (i + 1))
            p.data -= rate * m / (v.sqrt() + 1e-8)
            average[name] = average[name] + (1 - (i + 1) / (i + 10)) * (p.data - average[name])
    assert min(norms) > 1
    compared = 0
    for name, p in trained.named_parameters():
        if second[name].max().sqrt() > 1e-9:  # Adam makes steps of rounding errors where the gradient is 0
            torch.testing.assert_close(p, average[name], rtol=1e-5, atol=1e-6)
            compared += 1
    assert compared >= 20
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("flow: update")]
    assert [line.split(", ")[:2] for line in lines] == [
        [f"flow: update {i + 1}", f"loss {loss:.4f}"] for i, loss in enumerate(losses)
    ]
    assert not any(p.requires_grad for p in trained.parameters()) and not trained.training


def test_mean_losses_are_of_a_tenth(capsys, monkeypatch):
    """The last one is of what is left."""
    losses = iter(range(25))
    monkeypatch.setattr(train, "flow_loss", lambda v, x, eps, sigma: 0 * v(x, sigma).sum() + next(losses))
    args = train.Args(out="unused", device="cpu", updates=25, batch=2, network="unet:4,8")
    train.train_flow(args, torch.rand(7, 1, 8, 8, generator=seeded()))
    lines = [line.split(", ") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [f"flow: update {i}" for i in (*range(2, 25, 2), 25)]
    assert [line[1] for line in lines] == [f"loss {i + 0.5:.4f}" for i in range(0, 24, 2)] + ["loss 24.0000"]


def test_loss_that_is_no_number():
    images = torch.full((4, 1, 8, 8), torch.nan)
    args = train.Args(out="unused", device="cpu", updates=2, batch=2, network="unet:4,8")
    with pytest.raises(InputError, match="flow, update 1: loss nan; lower the learning rate 0.001"):
        train.train_flow(args, images)


def test_another_size(mnist, tmp_path, monkeypatch, capsys):
    """--size 28: the images are not shrunk; inverse_noise_correction.py takes them and their judge from
    --data, not those of fashion/, and refuses damaged files in one line."""
    folder, arrays = mnist
    monkeypatch.setattr(train, "SHEETS", {"train": 300, "reference": 200})
    monkeypatch.chdir(tmp_path)
    args = train.Args(out=tmp_path / "big", mnist=folder, size=28, **short())
    train.main(args)
    clean = {name: torch.from_numpy(part[0])[:, None].float() / 127.5 - 1 for name, part in arrays.items()}
    assert check_flow("big") == (1, 28, 28)
    assert torch.equal(training_images(tmp_path / "big"), clean["train"])
    assert torch.equal(reference_images(tmp_path / "big"), clean["t10k"])

    flags = "--images 40 --sample_batch 40 --eval_images 20 --updates 1 --corrector_network unet:4 --batch 4"
    flags += " --steps 2 --eval_steps 2 --eval_corrector_steps 1 --max_failed 1 --tolerance 1 --no-longer"
    flags += " --data_noise 0"
    run = [*flags.split(), "--data", "big", "--device", "cpu"]
    code, out, error = run_inside([*run, "--model", "big", "--output", "run"], INC)
    assert code == 0, error
    assert "against 200, Frechet distance on the features 'fashion'" in out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    net = FeatureNet.load(tmp_path / "big" / "features.safetensors")
    floor = frechet_distance(net(clean["t10k"]), net(clean["train"][-20:]))
    assert results["floor"] == pytest.approx(floor, rel=1e-4, abs=1e-9)
    stored = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert {"big/train.png", "big/reference.png", "big/features.safetensors"} <= set(stored)

    code, _, error = run_inside([*run, "--output", "other"], INC)  # the model of fashion/
    assert_one_line(code, error, "--data big: its images are (1, 28, 28), the model's (1, 16, 16)")
    for name, damage in (
        ("reference.png", lambda file: file.write_bytes(file.read_bytes()[:500])),
        ("train.png", lambda file: Image.new("L", (1001, 40)).save(file)),
        ("features.safetensors", lambda file: file.write_bytes(b"none")),
    ):
        kept = (tmp_path / "big" / name).read_bytes()
        damage(tmp_path / "big" / name)
        code, _, error = run_inside([*run, "--model", "big", "--output", "other"], INC)
        assert_one_line(code, error, f"big/{name}: ")
        assert "make it again by fashion.train" in error and not (tmp_path / "other").exists()
        (tmp_path / "big" / name).write_bytes(kept)
    (tmp_path / "big" / "features.safetensors").unlink()  # now a folder of two pictures
    code, _, error = run_inside([*run, "--model", "big", "--output", "other"], INC)
    assert_one_line(code, error, "--data big: 2 images are too few")


def test_feature_network_learns_the_classes(mnist):
    """Of images whose class is their grey."""
    classes = torch.arange(10).repeat(30)
    images = (classes / 4.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).contiguous()
    args = train.Args(out="unused", device="cpu", feature_updates=300, batch=64)
    net = train.train_features(args, images, classes)
    assert (net.classify(images).argmax(1) == classes).float().mean() > 0.9


@pytest.mark.parametrize("damage", ["missing", "cut", "not packed"])
def test_damaged_files_of_fashion_mnist(mnist, damage, tmp_path):
    file = mnist[0] / "train-images-idx3-ubyte.gz"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100] if damage == "cut" else b"no gzip")
    named = "holds no train-images-idx3-ubyte; install" if damage == "missing" else "cannot be read"
    with pytest.raises(InputError, match=named):
        train.main(train.Args(out=tmp_path / "new", mnist=mnist[0], **short()))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--mnist missing", "--mnist missing: holds no train-images-idx3-ubyte; install Debian's package"),
        ("--data missing", "--data missing: no such folder"),
        ("--data empty", "--data empty: 0 images are too few, 20 to invert and 20 as reference are needed"),
        ("--data empty --channels 2", "--channels 2: must be 1 (grey) or 3 (RGB)"),
        ("--data empty --size 0", "--size 0: must be between 1 and 1024"),
        ("--size 32", "--size 32: the images of Fashion-MNIST have 28 pixels a side"),
        ("--data empty --no-flow", "--no-flow: of --data only a flow can be trained"),
        ("--data empty --size 10 --network unet:4,4,4", "--network unet:4,4,4: 3 levels need a size that 4"),
        ("--network unet:3", "--network unet:3: give unet: or token: and numbers"),
        ("--updates 0", "--updates 0: must be between 1 and"),
    ],
)
def test_bad_input_of_the_training_script(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code, _, error = run_inside([*flags.split(), "--out", "new"], "fashion/train.py")
    assert_one_line(code, error, named)
    assert not (tmp_path / "new").exists()
