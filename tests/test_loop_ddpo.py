"""benchmarks/ddpo.py: short real runs, computed again here from stock diffusers, torch and numpy alone.

Nothing of the project takes part in the second computation: seeds, schedule, sampler, density, advantages,
loss, gradient, AdamW, evaluation, metrics.csv and results.json are written out below. The reward is a hash of
image and prompt, so that an image or prompt in another place gives another number. The arithmetic is the
same, so the images are equal in every pixel.
"""

import contextlib
import copy
import csv
import hashlib
import io
import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import utils.figures
import utils.runs
from conftest import read_scalars, run_inside, stock, stock_pipeline

SCRIPT = "benchmarks/ddpo.py"
TRAIN = [  # of different lengths, so that prompts in another order show
    "a red circle left of a blue square",
    "a green square",
    "a blue square below a red square and above a yellow triangle",
    "a yellow triangle above a green circle",
    "red",
    "a green triangle right of a red triangle",
    "two blue circles",
]
HELD_OUT = [
    "a blue circle above a green square",
    "a red circle",
    "green",
    "a yellow square left of a yellow circle",
    "a triangle below a triangle below a triangle",
    "three red squares",
]
LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
CALLS = []  # (reward, [image], [prompt]) of every call of a reward


# ---------------------------------------------------------------- rewards that see every swap


def hashed(name, image, prompt):
    """A number in [0, 1) of the pixels and the prompt; of one prompt the same for all images."""
    if prompt == TRAIN[1] and name == "first":
        return 0.25
    digest = hashlib.sha256(f"{name} {prompt}".encode() + image.tobytes()).digest()
    return int.from_bytes(digest[:3], "big") / 2**24  # exact in float32


def first(images, prompts):
    CALLS.append(("first", list(images), list(prompts)))
    return torch.tensor(
        [hashed("first", image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    )


def second(images, prompts):
    CALLS.append(("second", list(images), list(prompts)))
    return torch.tensor(
        [hashed("second", image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    )


def write_files(folder):
    """Prompts and rewards."""
    (folder / "train.txt").write_text("\n".join(TRAIN) + "\n")
    (folder / "held_out.txt").write_text("\n".join(HELD_OUT) + "\n")
    (folder / "reward.py").write_text("from test_loop_ddpo import first, second\n")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working directory, with prompts and rewards."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    return tmp_path


# ---------------------------------------------------------------- seeds, noise, order


def seed_of(*key):
    words = [part if isinstance(part, int) else int.from_bytes(part.encode(), "big") for part in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) // 2


def noise_of(seeds, draws, shape=(4, 8, 8)):
    """`draws` tensors (seeds, *shape): each seed has a generator of its own."""
    columns = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        columns.append([torch.randn(shape, generator=generator) for _ in range(draws)])
    return [torch.stack([column[k] for column in columns]) for k in range(draws)]


def rounds_of(count, per_round, rounds, seed):
    """The indices of the prompts of each round."""
    result, order, number = [], [], 0
    for _ in range(rounds):
        if len(order) < per_round:
            generator = torch.Generator().manual_seed(seed_of(seed, "prompts", number))
            order, number = torch.randperm(count, generator=generator).tolist(), number + 1
        result.append(order[:per_round])
        order = order[per_round:]
    return result


# ---------------------------------------------------------------- the model


class Twin:
    """The pipeline in stock diffusers, with a LoRA of peft on a second U-Net. The first stays the base."""

    def __init__(self, folder, steps):
        self.pipe = stock_pipeline(folder)
        self.base = self.pipe.unet.eval().requires_grad_(False)
        self.tuned = copy.deepcopy(self.base)
        self.text = {}
        self.use(self.pipe.scheduler, steps)

    def use(self, scheduler, steps):
        """Timesteps and noise levels, the last behind the last step."""
        scheduler.set_timesteps(steps)
        self.grid = scheduler.timesteps.tolist()
        bars = [float(scheduler.alphas_cumprod[t]) for t in self.grid] + [
            float(scheduler.final_alpha_cumprod)
        ]
        self.levels = [(math.sqrt(bar), math.sqrt(1 - bar)) for bar in bars]

    def add_lora(self, rank, alpha, layers, seed):
        from peft import LoraConfig

        torch.manual_seed(seed)
        self.scale = alpha / rank
        options = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": list(layers),
            "init_lora_weights": "gaussian",
        }
        self.tuned.add_adapter(LoraConfig(**options))
        self.lora = {n: p for n, p in self.tuned.named_parameters() if "lora_" in n}
        assert len(self.lora) == 2 * sum(
            n.endswith(tuple(f".{name}" for name in layers)) for n in self.layers()
        )

    def layers(self):
        return [n for n, m in self.base.named_modules() if isinstance(m, torch.nn.Linear)]

    @torch.no_grad()
    def learn_text(self, prompts):
        options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        states = self.pipe.encode_prompt(prompt=prompts, **options)[0]
        self.text.update(zip(prompts, states))

    def texts(self, prompts):
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.text]
        if new:
            self.learn_text(new)
        return torch.stack([self.text[prompt] for prompt in prompts])

    @torch.no_grad()
    def merged(self):
        """A plain U-Net with the weights  W + alpha / rank B A."""
        unet = copy.deepcopy(self.base)
        for name, module in unet.named_modules():
            if f"{name}.lora_A.default.weight" in self.lora:
                a, b = (self.lora[f"{name}.lora_{x}.default.weight"] for x in "AB")
                module.weight += (b @ a) * self.scale
        return unet

    def step(self, unet, x, k, text, guidance, eta):
        """Mean and standard deviation of the state after step k: DDIM (arXiv 2010.02502, 12 and 16)."""
        (alpha, sigma), (after, sigma_after) = self.levels[k], self.levels[k + 1]
        t = torch.tensor(self.grid[k])
        if guidance == 1:
            output = unet(x, t, encoder_hidden_states=text).sample
        else:
            both = torch.cat([self.text[""].expand(len(x), -1, -1), text])
            without, given = unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
            output = without + guidance * (given - without)
        if self.pipe.scheduler.config.prediction_type == "epsilon":
            clean, eps = (x - sigma * output) / alpha, output
        else:
            clean, eps = alpha * x - sigma * output, alpha * output + sigma * x
        std = eta * sigma_after / sigma * math.sqrt(max(0, sigma**2 - (alpha * sigma_after / after) ** 2))
        return after * clean + math.sqrt(max(0, sigma_after**2 - std**2)) * eps, std

    @torch.no_grad()
    def trajectory(self, unets, noise, text, guidance, eta):
        """All states, and the log-densities of the steps that have one. unets: one, or one a step."""
        states, densities = [noise[0]], []
        unets = unets if isinstance(unets, list) else [unets] * len(self.grid)
        for k in range(len(self.grid)):
            mean, std = self.step(unets[k], states[k], k, text, guidance, eta)
            states.append(mean + std * noise[k + 1])
            if std > 0:
                densities.append(density(states[k + 1], mean, std))
        return states, densities

    @torch.no_grad()
    def images(self, latents):
        pixels = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        pixels = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return [Image.fromarray((p * 255).round().astype("uint8")) for p in pixels]

    def sampled(self, unets, prompts, seeds, args, temperature=1, start=None):
        """(images, states, densities), a batch at a time; the latter two image by image.
        start(draw, number): the initial noise of an image, from its own draw."""
        images, states, densities = [], [], []
        for i in range(0, len(seeds), args.sample_batch):
            draws = noise_of(seeds[i : i + args.sample_batch], len(self.grid) + 1)
            noise = [temperature * draw for draw in draws]
            if start:
                noise[0] = torch.stack([start(draw, i + n) for n, draw in enumerate(noise[0])])
            text = self.texts(prompts[i : i + args.sample_batch])
            x, old = self.trajectory(unets, noise, text, args.guidance, args.eta)
            images += self.images(x[-1])
            states += [[state[n] for state in x] for n in range(len(text))]
            densities += [[value[n] for value in old] for n in range(len(text))]
        return images, states, densities


def density(x, mean, std):
    """Mean over the numbers of a latent of their normal log-densities."""
    each = -0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    return each.flatten(1).mean(1)


# ---------------------------------------------------------------- what is reported of images


def jpeg_size(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return len(file.getvalue()) / 1000


def numbers_of(image, prompt, names=("first", "second")):
    """Every metric of one image."""
    grey, hsv = (np.asarray(image.convert(mode), float) / 255 for mode in ("L", "HSV"))
    numbers = {name: hashed(name, image, prompt) for name in names}
    numbers |= {"brightness": grey.mean(), "contrast": grey.std(), "saturation": hsv[..., 1].mean()}
    return numbers | {"jpeg_kb": jpeg_size(image)}


def distance(images):
    """Mean over the pairs of their root-mean-square distance."""
    pixels = [np.asarray(image, float) / 255 for image in images]
    pairs = [(a, b) for n, a in enumerate(pixels) for b in pixels[:n]]
    return sum(math.sqrt(((a - b) ** 2).mean()) for a, b in pairs) / len(pairs)


def by_prompt(images, prompts, per_prompt, names=("first", "second")):
    """{metric: [of each prompt, the mean over its images]}"""
    table = {}
    for n, prompt in enumerate(prompts):
        own = images[n * per_prompt : (n + 1) * per_prompt]
        numbers = [numbers_of(image, prompt, names) for image in own]
        for name in numbers[0]:
            table.setdefault(name, []).append(sum(row[name] for row in numbers) / per_prompt)
        table.setdefault("diversity", []).append(distance(own))
    return table


def paired(before, after, columns=("base", "tuned", "difference")):
    """The rows of results.json."""
    rows = []
    for name in before:
        gains = [b - a for a, b in zip(before[name], after[name], strict=True)]
        values = (statistics.mean(before[name]), statistics.mean(after[name]), statistics.mean(gains))
        se = statistics.stdev(gains) / math.sqrt(len(gains))
        rows.append({"metric": name, **dict(zip((*columns, "se"), (*values, se), strict=True))})
    return rows


# ---------------------------------------------------------------- DDPO


def ddpo(folder, args):
    """The run: what the rewards were asked, the updates, rows, table, LoRA and images of the grid."""
    twin, settings = Twin(folder, args.steps), SimpleNamespace(**vars(args))
    twin.add_lora(args.lora_rank, args.lora_alpha, args.layers, args.seed)
    parameters = list(twin.lora.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0)
    schedule = rounds_of(len(TRAIN), args.prompts_per_round, args.rounds, args.seed)
    twin.learn_text([""])
    twin.learn_text([*HELD_OUT, *(TRAIN[i] for i in sorted({i for indices in schedule for i in indices}))])
    asked, updates, rows, seeds, begun = [], [], [], [], []
    eval_seeds = [seed_of("eval", i, j) for i in range(len(HELD_OUT)) for j in range(args.eval_samples)]

    def evaluated(unet):
        prompts = [prompt for prompt in HELD_OUT for _ in range(args.eval_samples)]
        images, _, _ = twin.sampled(unet, prompts, eval_seeds, settings)
        for i in range(0, len(images), args.sample_batch):
            part = slice(i, i + args.sample_batch)
            asked.extend((name, images[part], prompts[part]) for name in ("first", "second"))
        return by_prompt(images, HELD_OUT, args.eval_samples), images

    base, base_images = evaluated(twin.base)
    for r in range(args.rounds):
        begun.append((len(asked), len(updates)))
        prompts = [TRAIN[i] for i in schedule[r] for _ in range(args.samples)]
        round_seeds = [seed_of(args.seed, r, i, j) for i in schedule[r] for j in range(args.samples)]
        seeds += round_seeds
        images, states, old = twin.sampled(twin.merged(), prompts, round_seeds, settings)
        for i in range(0, len(images), args.sample_batch):
            part = slice(i, i + args.sample_batch)
            asked.append(("first", images[part], prompts[part]))
        rewards = [hashed("first", image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        advantages = []
        for n in range(0, len(rewards), args.samples):
            own = torch.tensor(rewards[n : n + args.samples])
            for value in own:
                a = (value - own.mean()) / max(own.std(correction=0), torch.tensor(1e-6))
                advantages.append(max(-args.advantage_max, min(args.advantage_max, a.item())))

        generator = torch.Generator().manual_seed(seed_of(args.seed, "update", r))
        losses, clipped, moved = [], [], []
        for order in [torch.randperm(len(images), generator=generator).tolist() for _ in range(args.epochs)]:
            for start in range(0, len(order), args.batch):
                chosen = order[start : start + args.batch]
                for small in range(0, len(chosen), args.micro_batch):
                    part = chosen[small : small + args.micro_batch]
                    text = twin.texts([prompts[n] for n in part])
                    for k in range(len(old[0])):
                        x, after = (torch.stack([states[n][at] for n in part]) for at in (k, k + 1))
                        mean, std = twin.step(twin.tuned, x, k, text, args.guidance, args.eta)
                        new = density(after, mean, std)
                        ratio = torch.exp(new - torch.stack([old[n][k] for n in part]))
                        a = torch.tensor([advantages[n] for n in part])
                        gain = torch.minimum(ratio * a, ratio.clamp(1 - args.clip, 1 + args.clip) * a)
                        # the mean over the update's trajectories and steps
                        (-gain.sum() / len(chosen) / len(old[0])).backward()
                        losses += [-gain.mean().item()] * len(part)
                        distances = [abs(value - 1) for value in ratio.tolist()]
                        clipped += [d > args.clip for d in distances]
                        moved += distances
                norm = torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]).norm()
                for p in parameters:
                    p.grad *= torch.clamp(1 / (norm + 1e-6), max=1)
                gradients = [p.grad.clone() for p in parameters]
                optimizer.step()
                optimizer.zero_grad()
                updates.append((gradients, [p.detach().clone() for p in parameters]))

        mean = {"loss": losses, "clip_fraction": clipped, "ratio_moved": moved}
        row = {"round": r + 1, "reward_sampled": statistics.mean(rewards)}
        row |= {name: sum(values) / len(values) for name, values in mean.items()}
        row |= {"samples": (r + 1) * len(images)} | dict.fromkeys(
            ("reward_held_out", "diversity_held_out"), math.nan
        )
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            tuned, tuned_images = evaluated(twin.merged())
            row["reward_held_out"] = statistics.mean(tuned["first"])
            row["diversity_held_out"] = statistics.mean(tuned["diversity"])
        rows.append(row)
    assert len({seed % 2**32 for seed in seeds + eval_seeds}) == len(seeds) + len(eval_seeds)
    result = {"asked": asked, "updates": updates, "rows": rows, "begun": begun, "table": paired(base, tuned)}
    return SimpleNamespace(**result, lora=twin.lora, grid=(base_images, tuned_images))


# ---------------------------------------------------------------- the runs


COMMON = "--prompts train.txt --eval_prompts held_out.txt --device cpu --eval_samples 2 --steps 5"
COMMON += " --reward reward.py:first --eval_rewards reward.py:second"
# numbers of prompts, samples and images differ, and none divides the batches
RUNS = {
    "epsilon": "--seed 5 --rounds 3 --prompts_per_round 3 --samples 4 --sample_batch 7 --eval_every 2"
    " --guidance 1 --batch 5 --micro_batch 2 --lr 5e-3 --clip 5e-3"
    " --lora_rank 4 --lora_alpha 100 --lora_targets attention",
    "v": "--seed 6 --rounds 2 --prompts_per_round 5 --samples 3 --sample_batch 4 --eval_every 0"
    " --guidance 2.5 --eta 0.6 --epochs 2 --advantage_max 0.9 --batch 8 --micro_batch 3 --lr 1e-2 --clip 1e-3"
    " --lora_rank 3 --lora_alpha 3 --lora_targets to_q,to_out.0",
}
DEFAULTS = {"eta": 1.0, "epochs": 1, "advantage_max": 5.0, "steps": 5, "eval_samples": 2}


def settings(words):
    """The arguments as the independent computation reads them."""
    words = words.split()
    given = {f.removeprefix("--"): v for f, v in zip(words[::2], words[1::2], strict=True)}
    targets = given.pop("lora_targets")
    given = {name: float(v) if {".", "e"} & set(v) else int(v) for name, v in given.items()}
    return SimpleNamespace(
        **DEFAULTS | given, layers=LAYERS if targets == "attention" else targets.split(",")
    )


@contextlib.contextmanager
def recorded():
    """Inside: (gradients, weights after) of every optimiser step, and the images of every grid."""
    seen, save_grid = SimpleNamespace(updates=[], grids=[]), utils.figures.save_grid
    CALLS.clear()

    def before(optimizer, *_):
        seen.updates.append([[p.grad.clone() for p in optimizer.param_groups[0]["params"]]])

    def after(optimizer, *_):
        seen.updates[-1].append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    def grid(path, base, tuned, *rest):
        seen.grids.append((path.name, base, tuned, *rest))
        save_grid(path, base, tuned, *rest)

    hooks = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    utils.figures.save_grid = grid
    try:
        yield seen
    finally:
        utils.figures.save_grid = save_grid
        for hook in hooks:
            hook.remove()


def assert_close(found, expected, tolerance=1e-6):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


def assert_equal_images(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))


def assert_same_calls(found, expected):
    """The rewards were asked about the same images with the same prompts, in the same order."""
    for (name, images, prompts), (other, other_images, other_prompts) in zip(found, expected, strict=True):
        assert (name, prompts) == (other, other_prompts)
        assert_equal_images(images, other_images)


def assert_same_updates(found, expected):
    assert len(found) == len(expected)
    for (gradients, weights), (other_gradients, other_weights) in zip(found, expected):
        assert_close(gradients, other_gradients)
        assert_close(weights, other_weights)
    assert max(g.abs().max() for g in found[0][0]) > 1e-3


def assert_same_rows(folder, expected):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(row) for row in rows] == [list(row) for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx(other, rel=1e-6, abs=1e-9, nan_ok=True)


def assert_same_scalars(folder, expected):
    """The same numbers went to TensorBoard, by round."""
    scalars = read_scalars(folder)
    assert scalars.keys() == expected[0].keys()
    for name, points in scalars.items():
        assert [step for step, _ in points] == [row["round"] for row in expected]
        values = [row[name] for row in expected]
        assert [value for _, value in points] == pytest.approx(values, rel=1e-5, abs=1e-8, nan_ok=True)


def assert_same_table(folder, expected):
    results = json.loads((folder / "results.json").read_text())
    assert set(results) >= {"table", "seconds"} and results["seconds"] > 0
    names = {"first": "reward.py:first", "second": "reward.py:second"}
    for row, other in zip(results["table"], expected, strict=True):
        assert row["metric"] == names.get(other["metric"], other["metric"])
        assert list(row) == list(other)
        assert list(row.values())[1:] == pytest.approx(list(other.values())[1:], rel=1e-6, abs=1e-7)
    # two different models were compared
    assert all(abs(change) > 1e-6 and se > 0 for *_, change, se in (r.values() for r in results["table"]))


def assert_same_lora(folder, expected):
    from safetensors.torch import load_file

    stored = load_file(folder / "pytorch_lora_weights.safetensors")
    names = {
        n.replace(".default", "").replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        for n in expected
    }
    assert stored.keys() == {f"unet.{n}" for n in names}
    for name, parameter in expected.items():
        name = name.replace(".default", "").replace("lora_A", "lora.down").replace("lora_B", "lora.up")
        assert_close([stored[f"unet.{name}"]], [parameter.detach()])


@pytest.fixture(scope="module")
def expected(tiny_epsilon, tiny_v):
    """{name: what the independent computation gives}"""
    folders = {"epsilon": tiny_epsilon, "v": tiny_v}
    return {name: (folders[name], ddpo(folders[name], settings(words))) for name, words in RUNS.items()}


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_twin_samples_as_stock_diffusers_does(tiny_epsilon, tiny_v, kind):
    """The sampler above is the stock pipeline's."""
    folder, seeds = {"epsilon": tiny_epsilon, "v": tiny_v}[kind], [3, 4, 5]
    twin = Twin(folder, 5)
    for prompts in ([""], TRAIN[:3]):
        twin.learn_text(prompts)
    for guidance, eta in ((1, 1), (2.5, 0.6)):
        states, _ = twin.trajectory(twin.base, noise_of(seeds, 6), twin.texts(TRAIN[:3]), guidance, eta)
        stock_latents = stock(stock_pipeline(folder), TRAIN[:3], seeds, 5, guidance, eta)
        assert (states[-1] - stock_latents).abs().max() < 1e-4 * stock_latents.abs().max()


def assert_expected(folder, seen, wanted):
    """What the run left in the folder, and its last grid."""
    assert_same_rows(folder, wanted.rows)
    assert_same_scalars(folder, wanted.rows)
    assert_same_table(folder, wanted.table)
    assert_same_lora(folder, wanted.lora)
    if seen.grids:
        file, base, tuned, prompts, per_prompt = seen.grids[-1]
        assert (file, prompts, per_prompt) == ("grid.png", HELD_OUT, 2)
        assert_equal_images([*base, *tuned], [*wanted.grid[0][:24], *wanted.grid[1][:24]])


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(files, expected, name):
    model, wanted = expected[name]
    with recorded() as seen:
        code, _, error = run_inside([*f"{COMMON} {RUNS[name]} --model {model} --output run".split()], SCRIPT)
    assert code == 0, error
    assert_same_calls(CALLS, wanted.asked)
    assert_same_updates(seen.updates, wanted.updates)
    assert_expected(files / "run", seen, wanted)
    assert len(seen.grids) == sum(not math.isnan(row["reward_held_out"]) for row in wanted.rows)
    # every case that the loop knows has occurred
    norms = [sum(g.square().sum() for g in gradients).sqrt().item() for gradients, _ in seen.updates]
    assert min(norms) < 0.9 and (max(norms) > 0.99) == (name == "epsilon")  # cut off at 1, and not
    assert 0 < wanted.rows[-1]["clip_fraction"] < 1 and wanted.rows[-1]["ratio_moved"] > 1e-4


@pytest.mark.parametrize("after", [1, 2])
def test_stopped_and_resumed(files, expected, monkeypatch, after):
    """After one of two rounds, and after both. The base is evaluated again, now with a LoRA to switch off."""
    model, wanted = expected["v"]
    saved, save = [], utils.runs.save_checkpoint

    def stop(folder, state):
        save(folder, state)
        saved.append(1)
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(utils.runs, "save_checkpoint", stop)
    with recorded() as seen:
        code, _, error = run_inside(f"{COMMON} {RUNS['v']} --model {model} --output run".split(), SCRIPT)
        assert code == 130 and "--resume run" in error
        CALLS.clear()
        seen.grids.clear()
        code, _, error = run_inside(["--resume", "run"], SCRIPT)
    assert code == 0, error
    first_round, first_calls = wanted.begun[0][0], [*wanted.begun, (len(wanted.asked), 0)][after][0]
    assert_same_calls(CALLS, wanted.asked[:first_round] + wanted.asked[first_calls:])
    assert_same_updates(seen.updates, wanted.updates)
    assert_expected(files / "run", seen, wanted)
