"""What a user would try before any training: guidance, noise temperature and best-of-n on the base model.

Run: python benchmarks/base_shapes.py   (about 10 minutes on two threads)
Result: benchmarks/results/base.json. Settings are chosen on benchmarks/prompts_valid.txt; the held-out figures are reported.
Calls: U-Net evaluations per picture that is kept (guidance above 1 evaluates the U-Net twice a step).
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import graft  # noqa: E402
from common import Model, derived_seed, draw_noise  # noqa: E402
from rewards import REWARDS, diversity  # noqa: E402

SAMPLES = 4
STEPS = 10


@torch.no_grad()
def pictures(model, prompts, samples, tag, guidance=1.0, eta=1.0, temperature=1.0):
    """samples PIL pictures of every prompt, prompt by prompt; every noise, also that of the steps, is scaled by temperature."""
    jobs = [(p, derived_seed(tag, i, j)) for i, p in enumerate(prompts) for j in range(samples)]
    images = []
    for k in range(0, len(jobs), 64):
        asked, seeds = zip(*jobs[k : k + 64])
        noise = temperature * draw_noise(seeds, STEPS, model.latent_shape, model.dtype)
        images += model.decode(graft.sample(model, noise, model.encode(list(asked)), guidance, eta))
    return images, [p for p, _ in jobs]


def mean_and_se(values):
    """values: (prompts,)."""
    return round(values.mean().item(), 4), round((values.std() / len(values) ** 0.5).item(), 4)


def main():
    model = Model(str(ROOT / "shapes" / "pipeline"), "cpu", torch.float32)
    sets = {
        "valid": (ROOT / "benchmarks" / "prompts_valid.txt").read_text().split("\n")[:-1],
        "held_out": (ROOT / "shapes" / "prompts_eval.txt").read_text().split("\n")[:-1],
    }
    settings = [{"guidance": g} for g in (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)]
    settings += [{"temperature": s} for s in (0.4, 0.6, 0.8, 0.9)] + [
        {"eta": 0.0, "temperature": s} for s in (0.4, 0.6, 0.8, 1.0)
    ]
    rows = []
    for setting in settings:
        row = {**setting, "calls": STEPS * (2 if setting.get("guidance", 1) > 1 else 1)}
        for name, prompts in sets.items():
            images, asked = pictures(model, prompts, SAMPLES, "eval", **setting)
            for reward in ("shapes_strict", "shapes_graded", "shapes_fit", "jpeg_compressibility"):
                row[f"{name} {reward}"] = mean_and_se(REWARDS[reward](images, asked).view(-1, SAMPLES).mean(1))
            spread = torch.tensor([diversity(images[i : i + SAMPLES]) for i in range(0, len(images), SAMPLES)])
            row[f"{name} diversity"] = mean_and_se(spread)
        rows.append(row)
        print(row, flush=True)
    images, asked = pictures(model, sets["held_out"], 16, "best")
    for reward in ("shapes_strict", "jpeg_compressibility"):
        scores = REWARDS[reward](images, asked).view(-1, 16)
        for n in (1, 2, 4, 8, 16):
            best = scores.view(len(scores), 16 // n, n).amax(2).mean(1)
            rows.append({"best_of": n, "calls": STEPS * n, f"held_out {reward}": mean_and_se(best)})
            print(rows[-1], flush=True)
    result = {
        "command": "python benchmarks/base_shapes.py",
        "seed": "per-picture seeds derived from the prompt's number",
        "rows": rows,
    }
    (ROOT / "benchmarks" / "results" / "base.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
