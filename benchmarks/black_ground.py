"""How much --data_noise? What the inverse makes of the images' noise on black ground, and what the flow's own
samples have there.

Run: python benchmarks/black_ground.py runs/inc/default__0 runs/inc/largest__0    (runs of
     benchmarks/run.py inc; without any only the flow's own rows are made)
Result: benchmarks/results/black_ground.json: "rows", one for each sampler and noise of the embedded flow;
"runs", one for each kind of initial noise of each run.

Where an image is flat, it is nothing but this noise. Let T of N(0, I) leave noise of deviation g there. Then
for images with noise of deviation d the inverse needs initial noise of about d / g there, whatever it needs
elsewhere. Initial noise that does not know where the image is flat, as one scale for all, has the mean of
both: too much elsewhere if d / g is the larger one, which becomes grain.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import ROOT, Flow, derived_seed, draw_noise
from fashion.images import FOLDER, training_images
from inverse_noise_correction import Args, Corrector, add_data_noise, euler_invert, euler_sample
from utils.runs import InputError, load_checkpoint, write_json

RESULT = ROOT / "benchmarks" / "results" / "black_ground.json"
SAMPLERS = ((8, 1.0), (8, 0.7), (16, 1.0), (64, 1.0))  # (steps, power of the grid)
DATA_NOISE = (0.02, 0.01, 0.005, 0.001)  # the last is the paper's
IMAGES = 250  # images inverted, and samples drawn
BLACK = -0.9  # black ground: the pixels that are darker than this, with all their neighbours


def black_ground(images):
    """Which pixels of images (n, 1, height, width) are black ground: bool, same shape."""
    return F.max_pool2d(images, 3, stride=1, padding=1) < BLACK


def deviations(z, ground):
    """The deviation of noises z (n, 1, height, width) where `ground` is true, and elsewhere."""
    return {"ground": z[ground].std().item(), "elsewhere": z[~ground].std().item()}


def standard_noise(flow, count):
    """N(0, I) of fixed seeds, (count, *shape)."""
    seeds = [derived_seed("eval", i) for i in range(count)]
    return draw_noise(seeds, 0, flow.shape, torch.float32)[0]


def measure(flow, images, steps, power, noises):
    """Rows {"steps", "power", "own": the deviation of T(N(0, I)) on its black ground, "data_noise",
    "left_out": share of the images that cannot be inverted, "calls": of the model for an image, "ground",
    "elsewhere" and "all": the deviation of the inverted noises on the images' black ground, on the other
    pixels and on all}, one for each of `noises`. images: (n, 1, height, width)."""
    sigmas = flow.grid(steps, power)
    samples = euler_sample(flow.velocity, standard_noise(flow, len(images)), sigmas)
    own, ground, rows = samples[black_ground(samples)].std().item(), black_ground(images), []
    for std in noises:
        noisy = add_data_noise(images, std, "invert")
        inversion = euler_invert(flow.velocity, noisy, sigmas, Args.max_iterations, Args.tolerance)
        z = inversion.noise[inversion.converged]
        row = {"steps": steps, "power": power, "own": own, "data_noise": std}
        row |= {"left_out": 1 - len(z) / len(images), "calls": inversion.calls / len(images)}
        row |= deviations(z, ground[inversion.converged]) | {"all": z.std().item()}
        rows.append(row)
        print(row, flush=True)
    return rows


def measure_run(folder):
    """Rows {"run", "data_noise", "arm": kind of initial noise, "ground" and "elsewhere": its deviation on the
    black ground of the images that T makes of it, and on the other pixels} of a run's folder."""
    stored = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    flow = Flow.load(stored["model"], "cpu")
    sigmas = flow.grid(stored["steps"], stored["grid_power"])
    corrector = Corrector.load(folder / "corrector", flow.network, flow.scheduler)
    files = sorted((folder / "inversion").glob("*.pt"))
    batches = [load_checkpoint(folder, f"inversion/{file.name}")["noise"] for file in files]
    eps = standard_noise(flow, IMAGES)
    noises = {"inverted": torch.cat(batches)[:IMAGES], "scale only": corrector.settings["scale"] * eps}
    if corrector.gaussian:
        noises["gaussian"] = corrector.destandardise(eps)
    noises["corrector"] = corrector(eps)
    rows = []
    for arm, z in noises.items():
        ground = black_ground(euler_sample(flow.velocity, z, sigmas))
        row = {"run": folder.name, "data_noise": stored["data_noise"], "arm": arm} | deviations(z, ground)
        rows.append(row)
        print(row, flush=True)
    return rows


def main(folders) -> int:
    """Returns the exit code."""
    try:
        for folder in folders:
            if not (folder / "corrector" / "corrector.json").is_file():
                raise InputError(f"{folder}: no finished run of inverse_noise_correction.py")
        runs = [row for folder in folders for row in measure_run(folder)]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    flow, images = Flow.load(str(FOLDER), "cpu"), training_images(FOLDER)[:IMAGES]
    rows = [row for steps, power in SAMPLERS for row in measure(flow, images, steps, power, DATA_NOISE)]
    record = {
        "command": " ".join(["python benchmarks/black_ground.py", *map(str, folders)]),
        "hardware": f"{platform.processor() or platform.machine()}, torch CPU float32",
        "rows": rows,
        "runs": runs,
    }
    write_json(RESULT, record)
    return 0


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folders", nargs="*", type=Path, help="run folders of inverse_noise_correction.py")
    sys.exit(main(parser.parse_args().folders))
