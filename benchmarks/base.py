"""The base model without any training: what guidance, noise temperature and best-of-n give, and how fast it
samples.

Run: python benchmarks/base.py rewards                       (10 minutes on two threads)
     OMP_NUM_THREADS=1 python benchmarks/base.py speed       (a minute)
Results, in benchmarks/results:
  base.json            rewards by setting. Settings are chosen on prompts_valid.txt; the held-out rewards are
                       reported. Calls: U-Net evaluations for each image that is kept (guidance above 1
                       evaluates the U-Net twice a step).
  sampler_speed.json   seconds for the same 64 images by the stock pipeline's call and by graft.sample
                       (10 steps, guidance 1, eta 1, decoded), medians of 9 alternating repetitions
"""

import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import EMBEDDED, ROOT, Model, derived_seed, draw_noise
from graft import sample
from rewards import REWARDS, diversity
from utils.prompts import EVAL_PROMPTS, TRAIN_PROMPTS, read_prompts
from utils.runs import write_json

RESULTS = ROOT / "benchmarks" / "results"
PROMPT_SETS = {"valid": str(ROOT / "benchmarks" / "prompts_valid.txt"), "held_out": EVAL_PROMPTS}
METRICS = ("shapes_strict", "shapes_graded", "shapes_fit", "jpeg_compressibility")
SETTINGS = [
    *({"guidance": g} for g in (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)),
    *({"temperature": s} for s in (0.4, 0.6, 0.8, 0.9)),
    *({"eta": 0.0, "temperature": s} for s in (0.4, 0.6, 0.8, 1.0)),
]
SAMPLES = 4  # images per prompt
BEST_OF = 16  # images per prompt from which the best of fewer are taken too
STEPS = 10
BATCH = 64


@torch.no_grad()
def sample_images(model, prompts, samples, tag, guidance=1.0, eta=1.0, temperature=1.0):
    """`samples` PIL images of every prompt, and the prompt of each image. Both lists go prompt by prompt.

    tag: a word that all seeds depend on. temperature: factor of all noise, that of the steps included."""
    seeds = [derived_seed(tag, i, j) for i in range(len(prompts)) for j in range(samples)]
    repeated = [p for p in prompts for _ in range(samples)]
    images = []
    for k in range(0, len(seeds), BATCH):
        noise = temperature * draw_noise(seeds[k : k + BATCH], STEPS, model.latent_shape, model.dtype)
        text = model.encode(repeated[k : k + BATCH])
        images += model.decode(sample(model, noise, text, guidance, eta))
    return images, repeated


def mean_and_se(values):
    """[mean, standard error], rounded. values: (prompts,)."""
    return [round(values.mean().item(), 4), round((values.std() / len(values) ** 0.5).item(), 4)]


def measure_rewards(settings=SETTINGS):
    """Rewards of the settings, then of the best of n."""
    model = Model(EMBEDDED, "cpu", torch.float32)
    prompt_sets = {name: read_prompts(file, "") for name, file in PROMPT_SETS.items()}
    rows = []
    for setting in settings:
        row = setting | {"calls": STEPS * (2 if setting.get("guidance", 1) > 1 else 1)}
        for name, prompts in prompt_sets.items():
            images, repeated = sample_images(model, prompts, SAMPLES, "eval", **setting)
            for metric in METRICS:
                scores = REWARDS[metric](images, repeated).view(-1, SAMPLES)  # (prompts, samples)
                row[f"{name} {metric}"] = mean_and_se(scores.mean(1))
            spread = [diversity(images[i : i + SAMPLES]) for i in range(0, len(images), SAMPLES)]
            row[f"{name} diversity"] = mean_and_se(torch.tensor(spread))
        rows.append(row)
        print(row, flush=True)
    images, repeated = sample_images(model, prompt_sets["held_out"], BEST_OF, "best")
    for metric in ("shapes_strict", "jpeg_compressibility"):
        scores = REWARDS[metric](images, repeated).view(-1, BEST_OF)  # (prompts, samples)
        for n in (1, 2, 4, 8, 16):
            best = scores.view(len(scores), -1, n).amax(2).mean(1)  # (prompts,)
            rows.append({"best_of": n, "calls": STEPS * n, f"held_out {metric}": mean_and_se(best)})
            print(rows[-1], flush=True)
    return {
        "command": "python benchmarks/base.py rewards",
        "seed": "each image has a seed derived from the numbers of prompt and sample",
        "rows": rows,
    }


def measure_speed():
    """Median seconds of each way to sample the same images."""
    prompts, seeds = read_prompts(TRAIN_PROMPTS, "")[:BATCH], range(BATCH)
    model = Model(EMBEDDED, "cpu", torch.float32)

    def ours():
        noise = draw_noise(seeds, STEPS, model.latent_shape, model.dtype)
        return model.decode(sample(model, noise, model.encode(prompts), 1.0, 1.0))

    def stock():
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "eta": 1.0}
        return model.pipeline(prompts, generator=generators, **options).images

    def merged():
        with model.lora_merged():
            return ours()

    def medians(functions, repetitions=10):
        times = {name: [] for name in functions}
        for repetition in range(repetitions):
            for name, function in functions.items():
                start = time.perf_counter()
                with torch.no_grad():
                    function()
                if repetition:  # the first one warms up
                    times[name].append(time.perf_counter() - start)
        return {name: round(statistics.median(seconds), 3) for name, seconds in times.items()}

    seconds = medians({"stock pipeline call": stock, "ours": ours})
    model.add_lora(16, 16.0, "all", 0)
    seconds |= medians({"ours, LoRA merged (as graft.py samples)": merged, "ours, LoRA not merged": ours})
    machine = {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
    return {"command": "OMP_NUM_THREADS=1 python benchmarks/base.py speed", **seconds, **machine}


def main(part: tyro.conf.Positional[Literal["rewards", "speed"]]):
    """Measure the rewards or the speed of the base model without any training."""
    if part == "rewards":
        write_json(RESULTS / "base.json", measure_rewards())
    else:
        seconds = measure_speed()
        print(seconds)
        write_json(RESULTS / "sampler_speed.json", seconds)


if __name__ == "__main__":
    tyro.cli(main)
