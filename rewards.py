"""Rewards: `reward(images, prompts) -> tensor`. images: list of n PIL pictures, prompts: list of n strings, result: float32
tensor (n,), larger is better. A reward may be anything: no gradient is needed.

On the command line (--reward, --eval_rewards) a reward is a name from REWARDS, a function of your own as
`path/to/file.py:function`, or a weighted sum of such: "0.7*shapes_graded+0.3*my.py:score".
"""

import importlib.util
import io
import math
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import InputError
from shapes import flow_data
from shapes.check import check
from shapes.render import parse


def shapes_strict(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """1 if the picture shows exactly what the shapes prompt says and nothing else, else 0."""
    return torch.tensor([float(check(i, p).strict) for i, p in zip(images, prompts)])


def shapes_graded(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """Share in [0, 1] of six things right: two colours, two shapes, the relation, exactly two objects."""
    return torch.tensor([check(i, p).graded for i, p in zip(images, prompts)])


def shapes_fit(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """How cleanly the objects are drawn, whatever the prompt: overlap in [0, 1] of outlines with ideal shapes (a rendered one has 0.99)."""
    return torch.tensor([check(i, p).fit for i, p in zip(images, prompts)])


def jpeg_kilobytes(image: Image.Image) -> float:
    """Size of the picture as a JPEG file (quality 95) in units of 1000 bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.tell() / 1000


def jpeg_compressibility(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """Minus the size as a JPEG in kB, below 0 (as in DDPO, arXiv 2305.13301)."""
    return -torch.tensor([jpeg_kilobytes(i) for i in images])


def jpeg_incompressibility(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """The size as a JPEG in kB, above 0."""
    return torch.tensor([jpeg_kilobytes(i) for i in images])


REWARDS = {f.__name__: f for f in (shapes_strict, shapes_graded, shapes_fit, jpeg_compressibility, jpeg_incompressibility)}


class Reward:
    """A weighted sum of rewards, callable like each of them. `parts` holds (weight, name, function)."""

    def __init__(self, spec: str, flag: str = "--reward"):
        """spec: "name", "path/to/file.py:function" or "w*one+w*other". InputError, naming `flag`, for anything else."""
        self.spec, self.parts = spec, []
        for term in spec.split("+"):
            weight, star, name = (part.strip() for part in term.rpartition("*"))
            try:
                weight = float(weight) if star else 1.0
            except ValueError:
                weight = math.nan
            if not math.isfinite(weight):
                raise InputError(f"{flag} {spec}: the weight in {term.strip()!r} is no number")
            if name in REWARDS:
                function = REWARDS[name]
            elif ".py:" in name:
                function = load_function(name, flag)
            else:
                raise InputError(f"{flag} {spec}: no reward {name!r}; take {', '.join(REWARDS)} or path/to/file.py:function")
            self.parts.append((weight, name, function))

    def check_prompts(self, prompts: list[str], flag: str) -> None:
        """InputError if a shapes reward is to judge a prompt that it does not understand."""
        if any(name in REWARDS and name.startswith("shapes_") for _, name, _ in self.parts):
            for prompt in prompts:
                try:
                    parse(prompt)
                except ValueError as error:
                    raise InputError(
                        f"{flag}: {error}; for other prompts choose another --reward and --eval_rewards"
                    ) from None

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """(n,) float32. InputError, naming the reward and the prompt, if a part returns another shape or NaN or Inf."""
        total = torch.zeros(len(images))
        for weight, name, function in self.parts:
            try:
                values = torch.as_tensor(function(images, prompts)).detach().float().cpu()
            except Exception as error:  # the user's function may raise anything
                where = traceback.extract_tb(error.__traceback__)[-1]
                raise InputError(
                    f"reward {name}: {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
                ) from error
            if values.shape != (len(images),):
                raise InputError(
                    f"reward {name}: returned shape {tuple(values.shape)} for {len(images)} pictures, "
                    f"must be ({len(images)},); first prompt {prompts[0]!r}"
                )
            if not values.isfinite().all():
                bad = int((~values.isfinite()).nonzero()[0])
                raise InputError(f"reward {name}: returned {values[bad].item()} for the prompt {prompts[bad]!r}")
            total += weight * values
        return total


def load_function(spec: str, flag: str):
    """The function of "path/to/file.py:name"; InputError if there is none."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise InputError(f"{flag} {spec}: no file {file}")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise InputError(f"{flag} {spec}: {file} does not load ({type(error).__name__}: {error})") from None
    if not callable(getattr(module, name, None)):
        raise InputError(f"{flag} {spec}: {file} has no function {name!r}")
    return getattr(module, name)


# ---------------------------------------------------------------- what is reported beside every reward


def image_statistics(images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Statistics that betray reward hacking, each (n,): mean brightness, contrast (standard deviation of the grey picture) and
    mean HSV saturation in [0, 1], and the size as a JPEG in kB."""
    grey = [np.asarray(i.convert("L"), float) / 255 for i in images]
    return {
        "brightness": torch.tensor([g.mean() for g in grey]).float(),
        "contrast": torch.tensor([g.std() for g in grey]).float(),
        "saturation": torch.tensor([np.asarray(i.convert("HSV"), float)[..., 1].mean() / 255 for i in images]).float(),
        "jpeg_kb": torch.tensor([jpeg_kilobytes(i) for i in images]).float(),
    }


def diversity(images: list[Image.Image]) -> float:
    """Mean root-mean-square pixel distance, in [0, 1], over all pairs of pictures (of one prompt), at most 64 x 64 pixels each."""
    size = (min(64, images[0].width), min(64, images[0].height))
    pixels = torch.stack([torch.from_numpy(np.asarray(i.convert("RGB").resize(size), np.float32) / 255) for i in images])
    distances = torch.pdist(pixels.flatten(1)) / pixels[0].numel() ** 0.5
    return distances.mean().item() if len(images) > 1 else 0.0


def average_hash(images: list[Image.Image]) -> torch.Tensor:
    """(n,) int64 keys that alike pictures share: which of 8 x 8 grey cells are brighter than their mean."""
    cells = torch.stack([torch.from_numpy(np.asarray(i.convert("L").resize((8, 8)), np.float32)) for i in images]).flatten(1)
    return ((cells > cells.mean(1, keepdim=True)).long() << torch.arange(64)).sum(1)


# ---------------------------------------------------------------- Frechet distance


def frechet_features(name, device, batch):
    """A function: pictures (n, channels, height, width) in [-1, 1] -> features (n, d), a batch at a time. name: shapes, pixels, inception."""
    if name == "shapes":
        net = flow_data.FeatureNet.load().to(device)
    elif name == "pixels":

        def net(x):
            return F.adaptive_avg_pool2d(x, min(8, x.shape[-1])).flatten(1)
    else:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()

        def net(x):
            bytes_ = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
            return inception(bytes_.expand(-1, 3, -1, -1))[0]

    @torch.no_grad()
    def features(pictures):
        return torch.cat([net(part.to(device)).float().cpu() for part in pictures.split(batch)])

    return features


def frechet_distance(a, b):
    """|m_1 - m_2|^2 + tr(S_1 + S_2 - 2 (S_1^(1/2) S_2 S_1^(1/2))^(1/2)) of two sets of features (n, d) and (m, d), in float64."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(torch.cov(a.T).reshape(a.shape[1], -1))
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ torch.cov(b.T).reshape(root.shape) @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross).item()
