"""Time of our sampler against the stock pipeline's call for the same 64 pictures (10 steps, guidance 1, eta 1, decoded).

Run: OMP_NUM_THREADS=1 python benchmarks/sampler_speed.py   (about a minute)
Result: benchmarks/results/sampler_speed.json, medians of 9 alternating repetitions in seconds.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import graft  # noqa: E402
from common import Model, draw_noise  # noqa: E402

prompts = (ROOT / "shapes" / "prompts_train.txt").read_text().splitlines()[:64]
model = Model(str(ROOT / "shapes" / "pipeline"), "cpu", torch.float32)


def ours():
    noise = draw_noise(range(64), 10, model.latent_shape, model.dtype)
    return model.decode(graft.sample(model, noise, model.encode(prompts), 1.0, 1.0))


def stock():
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    return model.pipeline(prompts, num_inference_steps=10, guidance_scale=1.0, eta=1.0, generator=generators).images


def merged():
    with model.lora_merged():
        return ours()


def measure(functions):
    times = {name: [] for name in functions}
    for repetition in range(10):
        for name, function in functions.items():
            start = time.perf_counter()
            with torch.no_grad():
                function()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(t), 3) for name, t in times.items()}


result = measure({"stock pipeline call": stock, "ours": ours})
model.add_lora(16, 16.0, "all", 0)
result |= measure({"ours, LoRA merged (as graft.py samples)": merged, "ours, LoRA not merged": ours})
result |= {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
print(json.dumps(result, indent=1))
(ROOT / "benchmarks" / "results" / "sampler_speed.json").write_text(json.dumps(result, indent=1) + "\n")
