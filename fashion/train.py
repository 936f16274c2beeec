"""Make the folder fashion/ again from Fashion-MNIST's own files, or train a flow of other images.

Run: python -m fashion.train --out my_fashion                            (flow, features and images)
     python -m fashion.train --seed 1 --no-features --no-images --out flow1  (another flow for experiments)
     python -m fashion.train --size 28 --network unet:64,128,128 --out fashion28  (not shrunk; for a GPU)
     python -m fashion.train --data my_images --size 32 --channels 3 --out my_flow
Fashion-MNIST: the four files of https://github.com/zalandoresearch/fashion-mnist, which Debian's package
dataset-fashion-mnist installs (MIT licence).
Result, in --out: unet/ or transformer/, and scheduler/, in diffusers format (UNet2DModel or
DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler), for --model of inverse_noise_correction.py; for
Fashion-MNIST also features.safetensors, train.png and reference.png, and the folder is then one for --data
too. The flow learns equation (4) of inverse_noise_correction.py with sigma uniform. On CUDA an update is one
graph, for it is hundreds of small operations. The feature network learns the classes. Both networks of
Fashion-MNIST are stored in half precision.
"""

import gzip
import io
import math
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from common import FLOW_NETWORKS, Device, Flow, check_device, derived_seed
from fashion.features import FeatureNet
from fashion.images import as_tensor, sheet
from inverse_noise_correction import (
    add_data_noise,
    check_network,
    find_enough_images,
    fit,
    flow_loss,
    frechet_distance,
    new_network,
    split_images,
)
from utils.images import read_images
from utils.runs import InputError, check_range, write_atomically

SHEETS = {"train": 20_000, "reference": 10_000}  # images in each
FILES = {"train": "train", "reference": "t10k"}  # names of their files begin with


@dataclass
class Args:
    """Train the embedded flow and the feature network on Fashion-MNIST, or a flow of a folder of images."""

    out: Path  # folder for the result; no part of it may be there already
    mnist: Path = Path("/usr/share/datasets/fashion-mnist")  # folder of the four files, .gz or not
    seed: int = 0  # seed of everything
    flow: bool = True  # train the flow
    features: bool = True  # train the feature network, of Fashion-MNIST only
    images: bool = True  # write the sheets of images, of Fashion-MNIST only
    device: Device = "auto"  # auto: CUDA or MPS if there is one

    data: str = ""  # folder of images; left out: Fashion-MNIST
    size: int = 16  # pixels of a side; Fashion-MNIST has 28
    channels: int = 1  # with --data: 1 grey, 3 RGB
    data_noise: float = 0.02  # standard deviation of noise added to the images that the flow learns
    reference_share: float = 0.5  # with --data: share not trained on, for inverse_noise_correction.py

    network: str = "unet:24,48,48"  # see new_network
    updates: int = 16_000  # optimiser updates of the flow
    batch: int = 128  # images per update
    lr: float = 1e-3  # AdamW learning rate: warm-up, then cosine to 0
    # of the flow's calls in training (autocast); bfloat16 suits a GPU, or a CPU with AMX, on which it is
    # nearly twice as fast
    dtype: Literal["float32", "bfloat16"] = "float32"
    feature_updates: int = 3000  # updates of the feature network

    def __post_init__(self):
        """InputError for a value out of range, or for settings that do not go together."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "size", 1, 1024)
        check_range(self, "data_noise", 0, 10)
        check_range(self, "reference_share", 0.05, 0.95)
        check_range(self, "updates", 1, 10**9)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_range(self, "feature_updates", 1, 10**9)
        if self.channels not in (1, 3):
            raise InputError(f"--channels {self.channels}: must be 1 (grey) or 3 (RGB)")
        if not self.data and self.size > 28:
            raise InputError(f"--size {self.size}: the images of Fashion-MNIST have 28 pixels a side")
        if self.data and not self.flow:
            raise InputError("--no-flow: of --data only a flow can be trained")


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The numbers of an IDX file of bytes, or of the same file packed by gzip. InputError if there is none,
    or if it is damaged."""
    file = next((f for f in (folder / f"{name}.gz", folder / name) if f.is_file()), None)
    if file is None:
        raise InputError(
            f"--mnist {folder}: holds no {name}; install Debian's package dataset-fashion-mnist, or give a "
            "folder with the four files of Fashion-MNIST"
        )
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        dimensions = data[3]
        shape = np.frombuffer(data, ">i4", dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"--mnist {file}: cannot be read ({error})") from None


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """An image (28, 28) uint8 as (size, size): each pixel is the mean of those whose centres it covers."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def read_fashion(folder: Path, name: str, size: int) -> tuple[np.ndarray, torch.Tensor]:
    """(images (n, size, size) uint8, classes (n,)) of "train" or "reference". InputError: see read_idx."""
    images = read_idx(folder, f"{FILES[name]}-images-idx3-ubyte")
    classes = read_idx(folder, f"{FILES[name]}-labels-idx1-ubyte")
    return np.stack([shrink(image, size) for image in images]), torch.from_numpy(classes.astype(np.int64))


def train_features(args: Args, images: torch.Tensor, classes: torch.Tensor) -> FeatureNet:
    """The network, trained to tell the classes (n,) of images (n, 1, size, size)."""
    torch.manual_seed(args.seed)
    net = FeatureNet(images.shape[2]).to(args.device)

    def loss(generator):
        index = torch.randint(len(images), (args.batch,), generator=generator)
        return F.cross_entropy(net.classify(images[index].to(args.device)), classes[index].to(args.device))

    updates = args.feature_updates
    for _ in fit(net, loss, updates, 1e-3, (args.seed, "feature network"), {}, updates):
        pass
    return net.half().float()  # what is saved


@torch.no_grad()
def report_features(net: FeatureNet, device: str, images: dict, classes: torch.Tensor) -> None:
    """Print the share of test images that are told right, and the Frechet distance of the test images from
    training images, some with a known fault. images: {"train" and "reference": (n, 1, 16, 16)}."""
    reference, fresh = images["reference"].to(device), images["train"][:4000].to(device)
    right = (net.classify(reference).argmax(1) == classes.to(device)).float().mean()
    print(f"features: {right:.1%} of the test images right")
    tenth = len(fresh) // 10
    faults = {
        "none": fresh,
        "5 % less contrast": 0.95 * fresh,
        "noise 0.05 added": fresh + 0.05 * torch.randn_like(fresh),
        "moved by a pixel": fresh.roll(1, 3),
        "tenth replaced by noise": torch.cat([fresh[tenth:], torch.randn_like(fresh[:tenth])]),
    }
    for name, faulty in faults.items():
        distance = frechet_distance(net(reference).cpu(), net(faulty).cpu())  # MPS has no float64
        print(f"  Frechet distance, fault: {name:<24} {distance:.3f}")


def train_flow(args: Args, images: torch.Tensor) -> Flow:
    """The flow of images (n, channels, size, size), trained; it has the averaged weights. Mean losses are
    printed. InputError for a loss that is NaN or Inf."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(args.seed)
    network = new_network(args.network, images.shape[2], images.shape[1], images.shape[1])
    flow = Flow(network, FlowMatchEulerDiscreteScheduler(), args.device)
    images, cuda = images.to(args.device), args.device == "cuda"
    parameters = list(flow.network.requires_grad_(True).parameters())
    average = [p.detach().clone() for p in parameters]
    rate, total = torch.zeros(2, device=args.device)  # the learning rate; the sum of the losses
    optimizer = torch.optim.AdamW(
        parameters, lr=rate if cuda else 0.0, weight_decay=0.0, capturable=cuda, foreach=True
    )

    def update_once():
        x = images[torch.randint(len(images), (args.batch,), device=args.device)]  # (batch, c, h, w)
        eps, sigma = torch.randn_like(x), torch.rand(args.batch, device=args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = flow_loss(flow.velocity, x, eps, sigma)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total.add_(loss.detach())

    torch.manual_seed(derived_seed(args.seed, "flow"))
    replay = captured(update_once) if cuda else update_once
    total.zero_()
    start, tenth = time.perf_counter(), max(1, args.updates // 10)
    for i in range(args.updates):
        value = args.lr * min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / args.updates))
        rate.fill_(value)
        if not cuda:
            optimizer.param_groups[0]["lr"] = value
        replay()
        decay = min(0.999, (i + 1) / (i + 10))  # of the running average; short at first
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        if (i + 1) % tenth == 0 or i + 1 == args.updates:
            mean, left = total.item() / ((i % tenth) + 1), args.updates - i - 1
            if not math.isfinite(mean):
                raise InputError(f"flow, update {i + 1}: loss {mean}; lower the learning rate {args.lr:g}")
            left *= (time.perf_counter() - start) / (i + 1)
            print(f"flow: update {i + 1}, loss {mean:.4f}, {left:.0f} s left", flush=True)
            total.zero_()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    flow.network.eval().requires_grad_(False)
    return flow


def captured(update_once):
    """A function that does what `update_once` does, as one CUDA graph. The learning rate must be 0 now."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update_once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_once()
    return graph.replay


def save_flow(flow: Flow, folder: Path) -> None:
    """Write the network and the scheduler in diffusers format."""
    part = next(part for part, name in FLOW_NETWORKS.items() if name == type(flow.network).__name__)
    flow.network.save_pretrained(folder / part)
    flow.scheduler.save_pretrained(folder / "scheduler")


def parts_of(args: Args) -> list[str]:
    """What the run will write in --out."""
    fashion = {"features.safetensors": args.features} | {f"{name}.png": args.images for name in SHEETS}
    return [*FLOW_NETWORKS, "scheduler"] * args.flow + [
        name for name, wanted in fashion.items() if wanted and not args.data
    ]


def main(args: Args) -> None:
    args.device = check_device(args.device, "float32")
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    shape = (args.channels if args.data else 1, args.size, args.size)
    check_network(args.network, shape[1], "--network")
    for part in parts_of(args):
        if (args.out / part).exists():
            raise InputError(f"{args.out / part} exists: remove it or choose another --out")
    files = find_enough_images(args.data, args.reference_share)
    start = time.perf_counter()
    if files:
        images = split_images(read_images(files, shape), args.reference_share)[1]
    else:
        levels = {name: read_fashion(args.mnist, name, args.size) for name in SHEETS}  # (images, classes)
        images = as_tensor(levels["train"][0])
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count in SHEETS.items() if args.images and not files else ():
        picture = io.BytesIO()
        sheet(levels[name][0][:count]).save(picture, "PNG", optimize=True)
        write_atomically(args.out / f"{name}.png", picture.getvalue())
    if args.features and not files:
        net = train_features(args, images, levels["train"][1])
        known = {name: as_tensor(part) for name, (part, _) in levels.items()}
        report_features(net, args.device, known, levels["reference"][1])
        weights = {name: value.half().cpu().contiguous() for name, value in net.state_dict().items()}
        write_atomically(args.out / "features.safetensors", safetensors.torch.save(weights))
    if args.flow:
        flow = train_flow(args, add_data_noise(images, args.data_noise, "train"))
        if not files:
            flow.network.half()
        save_flow(flow, args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) / 1e6
    print(f"{args.out}: {size:.1f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, use_underscores=True))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
