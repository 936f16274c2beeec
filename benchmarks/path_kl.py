"""How far tuned models have gone from the base: the KL of their sampling paths, in nats an image.

Run: python benchmarks/path_kl.py runs/compare/awm__*    (run folders of graft.py, pgraft.py, awm.py, ...)
Result: benchmarks/results/path_kl.json, in which the folders that are named replace their entries:
{"<parent>/<name>": {"kl": mean over the held-out prompts, "se": its standard error over prompts}}.

A step of the stochastic sampler is N(m(x_k, c), s_k^2), equation (1) of ddpo.py, and s_k is the same in both
models. So along paths of the tuned model
  (1) KL(tuned path || base path) = E sum_k |m_tuned(x_k, c) - m_base(x_k, c)|^2 / (2 s_k^2)
exactly; in continuous time this is Girsanov's theorem. It bounds the KL of the two distributions of the state
at the path's end from above. That end is the state before the last step where that step has no noise, as in
the embedded model: of the images themselves nothing is said. Steps in which P-GRAFT's LoRA is off add
nothing.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import (
    LORA_FILE,
    ROOT,
    SWITCH_FILE,
    check_device,
    derived_seed,
    draw_noise,
    load_model,
    read_switch,
)
from ddpo import step_distribution
from pgraft import switch_step
from utils.prompts import read_prompt_sets
from utils.runs import InputError, write_json

RESULT = ROOT / "benchmarks" / "results" / "path_kl.json"
IMAGES = 2  # paths a held-out prompt
BATCH = 128  # paths sampled at a time


@torch.no_grad()
def path_kl(model, noise, text, args, switch_at):
    """Equation (1), one path each. noise: (steps + 1, batch, c, h, w) -> (batch,) nats. The first `switch_at`
    steps have the LoRA, the others the base model. InputError for a sampler without noise."""
    grid, noise = model.timesteps(len(noise) - 1), noise.to(model.device, torch.float32)
    x, total, random = noise[0], torch.zeros(noise.shape[1], device=model.device), 0
    for k in range(len(grid)):
        with model.lora_off():
            base, std = step_distribution(model, x, k, grid, text, args.guidance, args.eta)
        tuned = base
        if k < switch_at:
            tuned, _ = step_distribution(model, x, k, grid, text, args.guidance, args.eta)
        if std > 0:
            total += (tuned - base).square().flatten(1).sum(1) / (2 * std**2)
            random += 1
        x = tuned + std * noise[k + 1]
    if not random:
        raise InputError("the sampler has no noise (eta 0): its paths have no density")
    return total


def measure(folder, device):
    """{"kl", "se"} of a run folder, on the held-out prompts and fixed seeds.
    InputError for a folder without a LoRA."""
    if not (folder / LORA_FILE).is_file() or not (folder / "args.json").is_file():
        raise InputError(f"{folder}: has no args.json and {LORA_FILE}; give the folder of a finished run")
    stored = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    args = SimpleNamespace(**stored | {"device": device})
    model = load_model(args)
    model.load_lora(str(folder))
    grid, switch_at = model.timesteps(args.steps), args.steps
    if (folder / SWITCH_FILE).is_file():
        switch_at = switch_step(grid, read_switch(str(folder), "another folder", model))
    _, prompts = read_prompt_sets(args.prompts, args.eval_prompts)
    model.remember(["", *prompts])
    seeds = [derived_seed("eval", i, j) for i in range(len(prompts)) for j in range(IMAGES)]
    repeated, values = [prompt for prompt in prompts for _ in range(IMAGES)], []
    for i in range(0, len(seeds), BATCH):
        noise = draw_noise(seeds[i : i + BATCH], args.steps, model.latent_shape, model.dtype)
        values.append(path_kl(model, noise, model.encode(repeated[i : i + BATCH]), args, switch_at).cpu())
    by_prompt = torch.cat(values).view(-1, IMAGES).mean(1)  # (prompts,)
    return {"kl": by_prompt.mean().item(), "se": by_prompt.std().item() / math.sqrt(len(by_prompt))}


def main() -> int:
    """Returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args()
    try:
        device, measure_all = check_device(given.device, "float32"), map
        with contextlib.ExitStack() as stack:
            if given.jobs > 1:  # CUDA forbids forking
                pool = ProcessPoolExecutor(given.jobs, mp_context=multiprocessing.get_context("spawn"))
                measure_all = stack.enter_context(pool).map
            for folder, entry in zip(given.folders, measure_all(measure, given.folders, repeat(device))):
                stored = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
                stored[f"{folder.parent.name}/{folder.name}"] = entry
                write_json(RESULT, dict(sorted(stored.items())))
                print(f"{folder}: {entry['kl']:.3f} +- {entry['se']:.3f} nats", flush=True)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
