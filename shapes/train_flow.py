"""Train the embedded flow model and the feature network of the Frechet distance, or a flow of another seed.

Run: python -m shapes.train_flow                                     (both, into shapes/flow/)
     python -m shapes.train_flow --seed 1 --no-features --out flow1  (another base for the experiments)
Result: transformer/ and scheduler/ in diffusers format (DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler), features.safetensors,
all in half precision. The flow learns E |v(x_sigma, sigma) - (eps - x)|^2 with sigma uniform. The feature network learns to answer which shape a
picture shows, where, how large, how grey, how noisy its ground and its texture are, how soft its edges and how smooth its noise.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
import tyro

from common import check_device, derived_seed
from rewards import frechet_distance, write_atomically
from shapes.flow import Flow, fit, flow_objective
from shapes.flow_data import FLOW, WORLD, FeatureNet, draw


@dataclass
class Args:
    """Train the embedded flow model and the feature network."""

    out: Path = FLOW
    """Folder for transformer/, scheduler/ and features.safetensors; parts that are there already must be removed first."""
    seed: int = 0
    """Seed of everything."""
    flow: bool = True
    """Train the flow."""
    features: bool = True
    """Train the feature network."""
    network: str = "token:128,128,128"
    """The flow's network, see new_network in shapes/flow.py."""
    pictures: int = 100000
    """Training pictures of each network."""
    updates: int = 10000
    """Updates of the flow."""
    batch: int = 256
    """Pictures per update of the flow."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    feature_updates: int = 8000
    """Updates of the feature network, 64 pictures each."""
    device: str = "auto"
    """auto, cpu or cuda."""


def train_features(args: Args) -> FeatureNet:
    """Half of the pictures are the world's own, half are wrong in the ways of a sampler (flow_data.draw, vary)."""
    torch.manual_seed(args.seed)
    net = FeatureNet().to(args.device)
    parts = [draw(args.pictures // 2, derived_seed(args.seed, "features", int(vary)), vary) for vary in (False, True)]
    pictures, kinds, labels = (torch.cat(columns).to(args.device) for columns in zip(*parts))
    labels = (labels - labels.mean(0)) / labels.std(0)

    def error(index):
        logits, answers = net.answers(pictures[index])
        return F.cross_entropy(logits, kinds[index]) + (answers - labels[index]).square().mean()

    def loss(generator):
        return error(torch.randint(len(pictures), (64,), generator=generator))

    for _ in fit(net, loss, args.feature_updates, 1e-3, (args.seed, "feature network"), {}, args.feature_updates):
        pass
    net.half().float()  # what is saved
    with torch.no_grad():
        values = torch.cat([net(part) for part in pictures[: args.pictures // 2].split(500)])
        net.centre.copy_(values.mean(0))
        net.scale.copy_(1 / values.std(0).clamp(min=1e-3))
    return net


@torch.no_grad()
def report_features(net: FeatureNet, device: str, count: int) -> None:
    """Accuracy on new pictures; the Frechet distance of data against data and against pictures with a known fault."""
    pictures, kinds, labels = (part.to(device) for part in draw(count // 5, derived_seed("feature test"), True))
    logits, answers = net.answers(pictures)
    right = (logits.argmax(1) == kinds).float().mean()
    labels = (labels - labels.mean(0)) / labels.std(0)
    explained = [torch.corrcoef(torch.stack(pair))[0, 1].square().item() for pair in zip(answers.T, labels.T)]
    print(f"features: shape right {right:.3f}, explained variance {', '.join(f'{e:.2f}' for e in explained)}")
    reference, fresh = (draw(n, derived_seed("feature test", n))[0].to(device) for n in (count, count // 5))
    faults = {"none": fresh, "5 % less contrast": 0.95 * fresh, "noise 0.03 added": fresh + 0.03 * torch.randn_like(fresh)}
    faults["moved by a pixel"] = fresh.roll(1, 3)
    faults["tenth replaced by noise"] = torch.cat([fresh[count // 50 :], torch.randn_like(fresh[: count // 50])])
    for name, faulty in faults.items():
        print(f"  Frechet distance, fault: {name:<24} {frechet_distance(net(reference), net(faulty)):.4f}")


def main(args: Args) -> None:
    args.device = check_device(args.device, "float32")
    for wanted, part in ((args.flow, "scheduler"), (args.features, "features.safetensors")):
        if wanted and (args.out / part).exists():
            raise SystemExit(f"{args.out / part} exists: remove it or choose another --out")
    start = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.features:
        net = train_features(args)
        report_features(net, args.device, min(10_000, args.pictures))
        weights = {name: value.half().cpu().contiguous() for name, value in net.state_dict().items()}
        write_atomically(args.out / "features.safetensors", safetensors.torch.save(weights))
    if args.flow:
        torch.manual_seed(args.seed)
        flow = Flow.new(args.network, WORLD, args.device)
        pictures = draw(args.pictures, derived_seed(args.seed, "flow"))[0]
        loss, state = flow_objective(flow, pictures, args.batch), {}
        for _ in fit(flow.network, loss, args.updates, args.lr, (args.seed, "flow"), state, args.updates):
            pass
        losses = torch.tensor(state["losses"])
        tenth = max(1, len(losses) // 10)
        print("flow: loss by tenth of the training " + " ".join(f"{part.mean():.4f}" for part in losses.split(tenth)[:10]))
        flow.network.half()
        flow.save(args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) / 1e6
    print(f"{args.out}: {size:.1f} MB, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
