"""Train the embedded flow model and the feature network of the Frechet distance, or a flow of other images.

Run: python -m shapes.train_flow                                     (both, into shapes/flow/)
     python -m shapes.train_flow --seed 1 --no-features --out flow1  (another base for the experiments)
     python -m shapes.train_flow --data my_images --size 32 --channels 3 --out my_flow
Result: transformer/ or unet/, and scheduler/, in diffusers format (DiTTransformer2DModel or UNet2DModel,
FlowMatchEulerDiscreteScheduler), for --model of inverse_noise_correction.py; and features.safetensors. The
flow learns equation (4) of inverse_noise_correction.py with sigma uniform. The feature network learns to
answer which shape an image shows, where, how large, how grey, how noisy its ground and its texture are, how
soft its edges and how smooth its noise. What is trained on the embedded world is stored in half precision.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
import tyro

from common import FLOW_NETWORKS, Device, Flow, check_device, derived_seed
from inverse_noise_correction import (
    add_data_noise,
    check_network,
    find_enough_images,
    fit,
    flow_objective,
    frechet_distance,
    new_network,
    split_images,
)
from shapes.flow_data import FLOW, WORLD, FeatureNet, draw
from utils.images import read_images
from utils.runs import InputError, check_range, write_atomically


@dataclass
class Args:
    """Train the embedded flow model and the feature network, or a flow of a folder of images."""

    out: Path = FLOW  # folder for the result; no part of it may be there already
    seed: int = 0  # seed of everything
    flow: bool = True  # train the flow
    features: bool = True  # train the feature network, of the embedded world only
    device: Device = "auto"  # auto: CUDA if there is one

    data: str = ""  # folder of images; left out: the embedded world of shapes
    size: int = 16  # with --data: pixels of a side
    channels: int = 1  # with --data: 1 grey, 3 RGB
    data_noise: float = 0.0  # with --data: as in inverse_noise_correction.py
    reference_share: float = 0.5  # with --data: share not trained on, for inverse_noise_correction.py
    images: int = 100_000  # of the embedded world, for each network

    network: str = ""  # see new_network; left out: token:128,128,128, with --data unet:32,64,64
    updates: int = 10_000  # optimiser updates of the flow
    batch: int = 256  # images per update of the flow
    lr: float = 1e-3  # AdamW learning rate: warm-up, then cosine to 0
    feature_updates: int = 8000  # updates of the feature network, 64 images each

    def __post_init__(self):
        """InputError for a value out of range, or for settings that do not go together."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "size", 1, 1024)
        check_range(self, "data_noise", 0, 10)
        check_range(self, "reference_share", 0.05, 0.95)
        check_range(self, "images", 20, 10**7)
        check_range(self, "updates", 1, 10**9)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_range(self, "feature_updates", 1, 10**9)
        if self.channels not in (1, 3):
            raise InputError(f"--channels {self.channels}: must be 1 (grey) or 3 (RGB)")
        if self.data and not self.flow:
            raise InputError("--no-flow: of --data only a flow can be trained")


def train_features(args: Args) -> FeatureNet:
    """The trained feature network. Half of its images are the world's own, half are wrong in the ways of a
    sampler (`vary` of draw)."""
    torch.manual_seed(args.seed)
    net = FeatureNet().to(args.device)
    parts = [
        draw(args.images // 2, derived_seed(args.seed, "features", int(vary)), vary) for vary in (False, True)
    ]
    images, kinds, labels = (torch.cat(columns).to(args.device) for columns in zip(*parts))
    labels = (labels - labels.mean(0)) / labels.std(0)

    def loss(generator):
        index = torch.randint(len(images), (64,), generator=generator)
        logits, answers = net.answers(images[index])
        return F.cross_entropy(logits, kinds[index]) + (answers - labels[index]).square().mean()

    updates = args.feature_updates
    for _ in fit(net, loss, updates, 1e-3, (args.seed, "feature network"), {}, updates):
        pass
    net.half().float()  # what is saved
    with torch.no_grad():
        values = torch.cat([net(part) for part in images[: args.images // 2].split(500)])
        net.centre.copy_(values.mean(0))
        net.scale.copy_(1 / values.std(0).clamp(min=1e-3))
    return net


@torch.no_grad()
def report_features(net: FeatureNet, device: str, count: int) -> None:
    """Print the accuracy on new images,
    and the Frechet distance of data from data and from images with a known fault."""
    images, kinds, labels = (part.to(device) for part in draw(count // 5, derived_seed("feature test"), True))
    logits, answers = net.answers(images)
    right = (logits.argmax(1) == kinds).float().mean()
    labels = (labels - labels.mean(0)) / labels.std(0)
    explained = [torch.corrcoef(torch.stack(pair))[0, 1].square().item() for pair in zip(answers.T, labels.T)]
    print(f"features: shape right {right:.3f}, explained variance {', '.join(f'{e:.2f}' for e in explained)}")
    reference, fresh = (draw(n, derived_seed("feature test", n))[0].to(device) for n in (count, count // 5))
    tenth = count // 50
    faults = {
        "none": fresh,
        "5 % less contrast": 0.95 * fresh,
        "noise 0.03 added": fresh + 0.03 * torch.randn_like(fresh),
        "moved by a pixel": fresh.roll(1, 3),
        "tenth replaced by noise": torch.cat([fresh[tenth:], torch.randn_like(fresh[:tenth])]),
    }
    for name, faulty in faults.items():
        print(f"  Frechet distance, fault: {name:<24} {frechet_distance(net(reference), net(faulty)):.4f}")


def train_flow(args: Args, shape: tuple, files: list[Path]) -> Flow:
    """The trained flow of the files, without those that inverse_noise_correction.py keeps as reference, or of
    the embedded world. shape: of an image. The mean losses are printed."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(args.seed)
    network = new_network(args.network, shape[1], shape[0], shape[0])
    flow = Flow(network, FlowMatchEulerDiscreteScheduler(), args.device)
    if files:
        images = split_images(read_images(files, shape), args.reference_share)[1]
        images = add_data_noise(images, args.data_noise, "train")
    else:
        images = draw(args.images, derived_seed(args.seed, "flow"))[0]
    loss, state = flow_objective(flow, images, args.batch), {}
    for _ in fit(flow.network, loss, args.updates, args.lr, (args.seed, "flow"), state, args.updates):
        pass
    losses = torch.tensor(state["losses"])
    tenths = losses.split(max(1, len(losses) // 10))[:10]
    print("flow: loss by tenth of the training " + " ".join(f"{part.mean():.4f}" for part in tenths))
    return flow


def save_flow(flow: Flow, folder: Path) -> None:
    """Write the network and the scheduler in diffusers format."""
    part = next(part for part, name in FLOW_NETWORKS.items() if name == type(flow.network).__name__)
    flow.network.save_pretrained(folder / part)
    flow.scheduler.save_pretrained(folder / "scheduler")


def main(args: Args) -> None:
    args.device = check_device(args.device, "float32")
    args.network = args.network or ("unet:32,64,64" if args.data else "token:128,128,128")
    args.features = args.features and not args.data
    shape = (args.channels, args.size, args.size) if args.data else WORLD
    check_network(args.network, shape[1], "--network")
    parts = [*FLOW_NETWORKS, "scheduler"] if args.flow else []
    for part in [*parts, *(["features.safetensors"] if args.features else [])]:
        if (args.out / part).exists():
            raise InputError(f"{args.out / part} exists: remove it or choose another --out")
    files = find_enough_images(args.data, args.reference_share)
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.features:
        net = train_features(args)
        report_features(net, args.device, min(10_000, args.images))
        weights = {name: value.half().cpu().contiguous() for name, value in net.state_dict().items()}
        write_atomically(args.out / "features.safetensors", safetensors.torch.save(weights))
    if args.flow:
        flow = train_flow(args, shape, files)
        if not args.data:
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
