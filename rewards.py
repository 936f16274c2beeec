"""Rewards, and what surrounds a method: all that needs neither its model nor its loss, a few of its formulas included (equations (2),
(3) of graft.py). In this order:

    rewards of a picture; rewards that are models; the language of --reward; statistics of pictures; the Frechet distance;
    what an acceptance rule makes of the rewards; the command line; which settings go together; prompts; the run folder and its
    checkpoints; what a run prints, draws and writes: of all scripts, of pgraft.py, noise_ppo.py, inverse_noise_correction.py

A reward is a function, `reward(images, prompts) -> tensor`. images: list of n PIL pictures, prompts: list of n strings, result: float32
tensor (n,), larger is better. A reward may be anything: no gradient is needed.

On the command line (--reward, --eval_rewards) a reward is a name from REWARDS or MODELS, a model's name with a checkpoint of
your own, `clip(folder or hub id)`, a function of your own, `path/to/file.py:function`, or a weighted sum of such:
"0.7*pickscore+0.3*my.py:score". Nothing inside parentheses is split: "0.5*(c++/my.py:score)+clip(models/a+b)".
"""

import contextlib
import csv
import dataclasses
import errno
import functools
import importlib.util
import io
import json
import math
import os
import re
import sys
import threading
import time
import traceback
import zipfile
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from common import DTYPES, FAMILIES, LORA_FILE, ROOT, InputError, check_device, check_model_name, derived_seed, draw_noise
from shapes import flow_data
from shapes.check import check
from shapes.flow import asked_levels
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


# ---------------------------------------------------------------- rewards that are models
# Each of the five functions at the end loads its model and returns a reward. checkpoint: a folder or a hub id.

VIT_H, VIT_L = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
BASE = {  # default checkpoints that are to be used with the tokenizer and picture processor, or the CLIP model, of another
    "yuvalkirstain/PickScore_v1": VIT_H,
    "adams-story/HPSv2-hf": VIT_H,
    "trl-lib/ddpo-aesthetic-predictor": VIT_L,
}


def load_frozen(model_class, checkpoint, device, dtype):
    """The model for inference. ValueError if its config.json or weights are missing: transformers would take a default size,
    and make the weights up at random."""
    from transformers.utils import cached_file

    if cached_file(checkpoint, "config.json") is None:
        raise ValueError("has no config.json")
    model, report = model_class.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"has no weights for {min(report['missing_keys'])} of a {model_class.__name__}")
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(checkpoint, vocabulary, **options):
    """The tokenizer of a model with that vocabulary size. ValueError if its files are missing: transformers would make up an
    empty one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
    if len(tokenizer) < vocabulary / 2:  # some models have room for more than the tokenizer's
        raise ValueError(f"the tokenizer in {checkpoint} has {len(tokenizer)} words, the model {vocabulary}")
    return tokenizer


@functools.cache  # one copy, whichever rewards use it
def load_clip(checkpoint, processor, device, dtype):
    """(CLIPModel, tokenizer, picture processor), the latter two from the folder or hub id `processor`."""
    from transformers import AutoImageProcessor, CLIPModel

    model = load_frozen(CLIPModel, checkpoint, device, dtype)
    tokenizer = load_tokenizer(processor, model.config.text_config.vocab_size)
    # backend: the pixels shall not depend on whether torchvision is installed
    return model, tokenizer, AutoImageProcessor.from_pretrained(processor, backend="pil")


def image_embeddings(model, processor, images):
    """n pictures -> (n, width) float32, each of length 1."""
    pixels = processor([i.convert("RGB") for i in images], return_tensors="pt").pixel_values
    embeddings = model.get_image_features(pixels.to(model.device, model.dtype)).pooler_output  # projected already
    return F.normalize(embeddings.float(), dim=1)


def text_embeddings(model, tokenizer, prompts):
    """n prompts, each cut at the model's number of tokens (77) -> (n, width) float32, each of length 1."""
    most = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=most, return_tensors="pt").to(model.device)
    return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=1)


def clip(checkpoint, device, dtype):
    """Cosine similarity of picture and prompt, in [-1, 1], as a rule 0.15 to 0.35: CLIPScore (arXiv 2104.08718) without its
    factor 2.5 and its cut at 0."""
    model, tokenizer, processor = load_clip(checkpoint, BASE.get(checkpoint, checkpoint), device, dtype)
    return lambda images, prompts: (
        image_embeddings(model, processor, images) * text_embeddings(model, tokenizer, prompts)
    ).sum(1)


def pickscore(checkpoint, device, dtype):
    """exp(logit_scale) * cosine similarity, as a rule 17 to 24; a difference d between two pictures of a prompt means that
    the first is preferred with probability 1 / (1 + exp(-d)). PickScore, arXiv 2305.01569. (Others divide by 26.)"""
    cosine = clip(checkpoint, device, dtype)
    scale = load_clip(checkpoint, BASE.get(checkpoint, checkpoint), device, dtype)[0].logit_scale.float().exp()
    return lambda images, prompts: scale * cosine(images, prompts)


def hpsv2(checkpoint, device, dtype):
    """Cosine similarity, in [-1, 1], as a rule 0.2 to 0.3: HPSv2, arXiv 2306.09341, whose tables show 100 times this."""
    return clip(checkpoint, device, dtype)


def aesthetic(checkpoint, device, dtype):
    """LAION's aesthetic predictor, about 1 to 10, as a rule 4 to 7, whatever the prompt: a linear stack on the normalised
    embedding of CLIP ViT-L/14 (github.com/christophschuhmann/improved-aesthetic-predictor; used by DDPO, arXiv 2305.13301).
    A checkpoint of your own holds aesthetic-model.pth and the CLIP model that it belongs to."""
    from transformers.utils import cached_file

    base = BASE.get(checkpoint, checkpoint)
    model, _, processor = load_clip(base, base, device, dtype)
    linear, dropout = torch.nn.Linear, torch.nn.Dropout  # no dropout here, but the names in the file count these layers
    layers = [linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)]
    head = torch.nn.Sequential(*layers, linear(64, 16), linear(16, 1)).eval().requires_grad_(False)
    weights = torch.load(cached_file(checkpoint, "aesthetic-model.pth"), map_location="cpu", weights_only=True)
    head.load_state_dict({name.removeprefix("layers."): value for name, value in weights.items()})
    head.to(device)  # float32
    return lambda images, prompts: head(image_embeddings(model, processor, images)).squeeze(1)


def vqa(checkpoint, device, dtype):
    """P("Yes"), in [0, 1], as the first token of the answer to 'Does this image show "<prompt>"?', by a model of the Qwen-VL
    family (2, 2.5, 3). VQAScore, arXiv 2404.01291; not comparable with that paper's numbers, which are CLIP-FlanT5's, nor
    between checkpoints."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, ProcessorMixin

    kind = AutoConfig.from_pretrained(checkpoint).model_type
    if not (kind.startswith("qwen") and "vl" in kind):
        raise ValueError(f"is a {kind}, not of the Qwen-VL family")
    model = load_frozen(AutoModelForImageTextToText, checkpoint, device, dtype)
    # the processor in one piece would need torchvision, for videos
    tokenizer = load_tokenizer(checkpoint, model.config.text_config.vocab_size, padding_side="left")
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    template = ProcessorMixin.get_processor_dict(checkpoint)[0].get("chat_template")
    placeholder = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    yes = tokenizer.encode("Yes", add_special_tokens=False)
    if len(yes) != 1:
        raise ValueError("has a tokenizer that splits the word Yes")

    def reward(images, prompts):
        pixels = processor([i.convert("RGB") for i in images], return_tensors="pt").to(model.device)
        counts = pixels["image_grid_thw"].prod(1) // processor.merge_size**2  # (n,) tokens of each picture
        texts = []
        for prompt, count in zip(prompts, counts.tolist()):
            question = {"type": "text", "text": f'Does this image show "{prompt}"?'}
            chat = [{"role": "user", "content": [{"type": "image"}, question]}]
            text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)
            texts.append(text.replace(placeholder, placeholder * count, 1))
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        of_picture = (tokens["input_ids"] == model.config.image_token_id).int()
        logits = model(**tokens, **pixels, mm_token_type_ids=of_picture, logits_to_keep=1).logits  # (n, 1, vocabulary)
        return logits[:, -1].float().softmax(1)[:, yes[0]]

    return reward


MODELS = {  # name: (function, default checkpoint)
    "clip": (clip, VIT_L),
    "pickscore": (pickscore, "yuvalkirstain/PickScore_v1"),
    "hpsv2": (hpsv2, "adams-story/HPSv2-hf"),
    "aesthetic": (aesthetic, "trl-lib/ddpo-aesthetic-predictor"),
    "vqa": (vqa, "Qwen/Qwen2-VL-2B-Instruct"),
}


@functools.cache  # a reward that stands in several sums is loaded once
def load_model(name, checkpoint, device, dtype):
    """The reward `name` of MODELS."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # its notes while loading would bury the settings
    logging.disable_progress_bar()
    return MODELS[name][0](checkpoint, device, dtype)


# ---------------------------------------------------------------- the language of --reward and --eval_rewards


def split(text: str, separator: str) -> list[str]:
    """The pieces between separators that stand in no parentheses."""
    pieces, depth = [""], 0
    for character in text:
        depth = max(0, depth + {"(": 1, ")": -1}.get(character, 0))
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


class Reward:
    """A weighted sum of rewards, callable like each of them. `parts` holds (weight, name, function); the function of a model
    that is not loaded yet is None, and `models` has its {name: (name in MODELS, checkpoint)}."""

    def __init__(self, spec: str, flag: str = "--reward"):
        """spec: as at the top of this file. InputError, naming `flag`, for anything else. Loads no model."""
        self.spec, self.flag, self.parts, self.models = spec, flag, [], {}
        for term in split(spec, "+"):
            *weight, name = split(term, "*")
            try:
                weight = float("*".join(weight)) if weight else 1.0
            except ValueError:
                weight = math.nan
            if not math.isfinite(weight):
                raise InputError(f"{flag} {spec}: the weight in {term!r} is no number")
            if name.startswith("(") and name.endswith(")"):
                name = name[1:-1].strip()
            kind, _, checkpoint = name.removesuffix(")").partition("(")
            if name in REWARDS:
                function = REWARDS[name]
            elif kind in MODELS and name in (kind, f"{kind}({checkpoint})"):
                function, self.models[name] = None, (kind, checkpoint if name != kind else MODELS[kind][1])
                if not is_checkpoint(self.models[name][1]):
                    raise InputError(f"{flag} {spec}: {checkpoint!r} is no folder, and no hub id of the form owner/name")
            elif ".py:" in name:
                function = load_function(name, flag)
            else:
                raise InputError(
                    f"{flag} {spec}: no reward {name!r}; take {', '.join([*REWARDS, *MODELS])} or path/to/file.py:function "
                    "(in parentheses if there is a + or * in it)"
                )
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

    def load(self, device: str = "auto", dtype: str = "float32", batch: int = 16) -> None:
        """Load the models among the parts, to judge `batch` pictures at a time. InputError, naming the flag, if one fails."""
        device = check_device(device, dtype, "reward_")
        if batch < 1:
            raise InputError(f"--reward_batch {batch}: must be at least 1")
        for i, (weight, name, _) in enumerate(self.parts):
            if name in self.models:
                kind, checkpoint = self.models[name]
                try:
                    function = load_model(kind, checkpoint, device, DTYPES[dtype])
                except Exception as error:  # a broken folder makes the loaders raise many kinds
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    raise InputError(
                        f"{self.flag} {self.spec}: {checkpoint} cannot be loaded ({reason}); "
                        f"another checkpoint is given as '{kind}(folder or hub id)'"
                    ) from None
                self.parts[i] = (weight, name, in_batches(function, batch))

    def scores(self, images: list[Image.Image], prompts: list[str], known: dict | None = None) -> dict[str, torch.Tensor]:
        """{spec: (n,) float32} and, of a sum, {part: (n,)} without its weight. known: scores of these pictures, not computed
        again. InputError, naming the part and the prompt, if a part returns another shape or NaN or Inf."""
        if any(function is None for _, _, function in self.parts):
            self.load()
        parts, total = {}, torch.zeros(len(images))
        for weight, name, function in self.parts:
            if name not in parts:
                parts[name] = known[name] if known and name in known else checked(name, function, images, prompts)
            total += weight * parts[name]
        return {self.spec: total} | (parts if len(self.parts) > 1 else {})

    def __call__(self, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
        """(n,) float32: the weighted sum."""
        return self.scores(images, prompts)[self.spec]


def read_rewards(reward: str, eval_rewards: str) -> list[Reward]:
    """The reward to maximise, then those of the list eval_rewards, separated by commas. Loads no model."""
    others = [spec for spec in split(eval_rewards, ",") if spec and spec != reward]
    return [Reward(reward, "--reward"), *(Reward(spec, "--eval_rewards") for spec in others)]


def score(rewards: list[Reward], images: list[Image.Image], prompts: list[str]) -> dict[str, torch.Tensor]:
    """{name: (n,)} of all rewards and of the parts of sums. What stands in several of them is computed once."""
    found = {}
    for reward in rewards:
        found |= reward.scores(images, prompts, found)
    return found


def checked(name: str, function, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """function(images, prompts), (n,) float32 on the CPU; InputError, naming the reward `name`, for anything else."""
    try:
        values = torch.as_tensor(function(images, prompts)).detach().float().cpu()
    except Exception as error:  # the user's function may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(f"reward {name}: {type(error).__name__}: {error} ({where.filename}, line {where.lineno})") from error
    if values.shape != (len(images),):
        raise InputError(
            f"reward {name}: returned shape {tuple(values.shape)} for {len(images)} pictures, "
            f"must be ({len(images)},); first prompt {prompts[0]!r}"
        )
    if not values.isfinite().all():
        bad = int((~values.isfinite()).nonzero()[0])
        raise InputError(f"reward {name}: returned {values[bad].item()} for the prompt {prompts[bad]!r}")
    return values


def in_batches(function, size: int):
    """The reward `function`, `size` pictures at a time, without gradients."""

    @torch.no_grad()
    def reward(images, prompts):
        return torch.cat([function(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)])

    return reward


def is_checkpoint(name: str) -> bool:
    """Whether it is a folder or looks like a hub id, owner/name."""
    hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    return name != "" and (Path(name).is_dir() or hub_id and not Path(name).exists())


def load_function(spec: str, flag: str):
    """The function of "path/to/file.py:name"; InputError if there is none."""
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise InputError(f"{flag} {spec}: no file {file}; give path/to/file.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        raise InputError(f"{flag} {spec}: {file} does not load ({type(error).__name__}: {error})") from None
    if not callable(getattr(module, name, None)):
        raise InputError(f"{flag} {spec}: {file} has no function {name!r}")
    return getattr(module, name)


# ---------------------------------------------------------------- statistics of pictures, reported beside every reward


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
    """(n,) int64 keys that alike pictures share: which of 8 x 8 grey cells are brighter than their mean. From 64 x 64 pixels at
    most, as most pictures of a run are kept, so that a picture's key does not depend on its place in the run."""
    small = (i.resize((min(64, i.width), min(64, i.height))).convert("L").resize((8, 8)) for i in images)
    cells = torch.stack([torch.from_numpy(np.asarray(i, np.float32)) for i in small]).flatten(1)
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


# ---------------------------------------------------------------- what an acceptance rule makes of the rewards

RANKING = ("topk", "preference")  # rules for which only the order of the rewards counts


def reshaped_reward(quantile, num_samples, top_k):
    """rhat of "the top_k best of num_samples", up to a constant, at quantile U in [0, 1], any shape. Equation (2) of graft.py."""
    u = torch.as_tensor(quantile, dtype=torch.float64)
    terms = [math.comb(num_samples - 1, j) * u ** (num_samples - 1 - j) * (1 - u) ** j for j in range(top_k)]
    return torch.stack(terms).sum(0).log()


def implied_kl(num_samples, top_k):
    """KL(accepted || sampled) in nats of "the top_k best of num_samples", for a reward without ties. Equation (3) of graft.py."""
    if top_k == 1:
        return math.log(num_samples) - (num_samples - 1) / num_samples
    nodes = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    density = num_samples / top_k * reshaped_reward(nodes, num_samples, top_k).exp()
    return torch.xlogy(density, density).mean().item()


def estimated_kl(rewards, rule, *, top_k=1, threshold=None, beta=None):
    """KL(accepted || sampled) in nats of a rule on rewards (prompts, samples). topk and preference: implied_kl, an upper
    bound if rewards tie; others: from the acceptance probabilities, mean over the prompts that can accept."""
    if rule in RANKING:
        return implied_kl(rewards.shape[1], top_k) if rule == "topk" else implied_kl(2, 1)
    if rule == "none":
        return 0.0
    if rule == "threshold":
        chance = (rewards >= threshold).double()
    else:
        chance = ((rewards - rewards.max(1, True).values) / beta).double().exp()
    weight = (chance / chance.mean(1, keepdim=True))[chance.sum(1) > 0]
    return torch.xlogy(weight, weight).mean().item() if len(weight) else math.nan


# ---------------------------------------------------------------- the command line

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)  # what a disk says, not a bug
# settings left out: of the embedded model, SD 1.x and 2.x, SD XL, SD 3; steps and guidance as in the stock call
DEFAULTS = {
    "steps": (10, 50, 50, 28),
    "guidance": (1.0, 7.5, 5.0, 7.0),
    "eta": (1.0, 1.0, 1.0, 0.0),
    "sample_batch": (64, 8, 4, 4),
    "micro_batch": (64, 2, 1, 1),
    "lora_targets": ("all", *["attention"] * 3),
    "lr": (1e-3, 1e-4, 1e-4, 1e-4),
    "reward": ("shapes_strict", *["jpeg_compressibility"] * 3),
    "eval_rewards": ("shapes_strict,shapes_graded,shapes_fit,jpeg_compressibility", *["jpeg_compressibility"] * 3),
}
LIMITS = {  # least, most
    **dict.fromkeys("prompts_per_round guidance sample_batch updates batch micro_batch reward_batch".split(), (1, 10**6)),
    **dict.fromkeys(("rounds", "samples", "epochs"), (1, 10**4)),
    "top_k": (1, "samples"),
    "steps": (1, 999),
    "eta": (0, 1),
    "eval_samples": (2, 10**4),
    "eval_every": (0, 10**9),
    "lora_rank": (1, 1024),
    "lora_alpha": (1e-6, 1e6),
    "lr": (1e-12, 1),
    "clip": (1e-9, 1e9),
    "prompt_dropout": (0, 0.99),
    "seed": (0, 2**63 - 1),
    "probe_restarts": (2, 10**4),
    "probe_limit": (0, 1),
    "probe_prompts": (2, 10**9),
}
CHOICES = {"reference": ("newest", "base"), "rule": (*RANKING, "exponential", "threshold", "none")}


def complete(args, defaults: dict = {}, limits: dict = {}, choices: dict = {}) -> None:
    """Fill in the settings that were left out and check every argument of which a table can say what is right; InputError.

    The tables hold what a script adds to those above or has otherwise. defaults: {setting: (of the embedded model, then of
    FAMILIES in their order)}; limits and choices: as in check_tables.
    """
    args.device = check_device(args.device, args.dtype)
    check_output(args.output, args.resume)
    if not is_checkpoint(args.model):
        raise InputError(f"--model {args.model}: no such folder, and no hub id of the form owner/name")
    embedded = Path(args.model).resolve() == ROOT / "shapes" / "pipeline"
    column = [*FAMILIES].index(check_model_name(args.model)) + 1
    for name, values in (DEFAULTS | defaults).items():
        if getattr(args, name, 0) is None:
            setattr(args, name, values[0 if embedded else column])
    check_tables(args, limits, choices)
    if hasattr(args, "rule"):
        check_rule(args)


def check_tables(args, limits: dict, choices: dict) -> None:
    """InputError for an argument that the tables above, or these in their place, do not allow. limits: {setting: (least, most)}, a
    name in place of a number is that setting's value; choices: {setting: its values}."""
    for name, (least, most) in (LIMITS | limits).items():
        if hasattr(args, name):
            most = getattr(args, most) if isinstance(most, str) else most
            if not least <= getattr(args, name) <= most:
                raise InputError(f"--{name} {getattr(args, name)}: must be between {least} and {most}")
    for name, allowed in (CHOICES | choices).items():
        if getattr(args, name, allowed[0]) not in allowed:
            raise InputError(f"--{name} {getattr(args, name)}: must be one of {', '.join(filter(None, allowed))}")


def numbers(args, name: str, kind: type, least: float, most: float) -> list:
    """The numbers of a setting such as "2,4", each an int or a float (`kind`) from least to most; InputError."""
    try:
        found = [kind(part) for part in getattr(args, name).split(",") if part.strip()]
    except ValueError:
        found = [float("nan")]
    if not all(least <= n <= most for n in found):
        wanted = "whole numbers" if kind is int else "numbers"
        raise InputError(f"--{name} {getattr(args, name)}: give {wanted} from {least:g} to {most:g}, separated by commas")
    return found


def run_script(main, cls) -> None:
    """main(args) with the command line's arguments. InputError, what the disk says and lack of memory end the program with one line
    and exit code 2, Ctrl-C with 130; after the disk's errors and Ctrl-C the line says how to continue."""
    # the thread of tensorboard's writer prints what it raises again in the main thread
    threading.excepthook = lambda seen: isinstance(seen.exc_value, OSError) or threading.__excepthook__(seen)
    try:
        main(parse_arguments(cls))
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, Exception) as error:
        found = " ".join(str(error).split())
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", found):  # CUDA, CPU
            print(f"error: out of memory ({found}): lower the batch sizes or numbers", file=sys.stderr)
            sys.exit(2)
        command = f"Continue with: python {sys.argv[0]} --resume"
        folder = Path(HELD[0].lock_file).parent if HELD else None
        then = f"{command} {folder}" if folder and (folder / "args.json").is_file() else "Nothing was written."
        if isinstance(error, KeyboardInterrupt):
            print(f"\ninterrupted. {then}", file=sys.stderr)
            sys.exit(130)
        if not any(os.strerror(code) in str(error) for code in DISK_ERRORS):  # libraries wrap it in errors of their own
            raise
        print(f"error: {found}: make room or allow access; nothing saved is lost. {then}", file=sys.stderr)
        sys.exit(2)


def parse_arguments(cls, argv: list[str] | None = None):
    """Command line -> dataclass. tyro's boxed messages become one line. With --resume the stored arguments are the
    defaults, and any other value given beside it is an error."""
    argv = sys.argv[1:] if argv is None else argv

    def cli(default):
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                return tyro.cli(cls, args=argv, default=default)
        except SystemExit as stop:
            if stop.code in (0, None):
                raise
            lines = [line.strip("│╭╮╰╯ ") for line in errors.getvalue().splitlines()[1:]]  # without the title
            message, below, *_ = (part for part in re.split("[─-]{9,}", "\n".join(lines)) if part.strip())
            near = re.findall(r"^--(\S+)", below, re.M) if "Perhaps you meant" in below else []
            hint = f"perhaps you meant {', '.join('--' + name.replace('-', '_') for name in near)}; " if near else ""
            raise InputError(f"{message} ({hint}see --help)") from None

    args = cli(cls())
    if not args.resume:
        return args
    stored_file = Path(args.resume) / "args.json"
    if not stored_file.is_file():
        raise InputError(f"--resume {args.resume}: no run there (no args.json); give the folder that the run printed")
    try:
        stored = cls(**{**json.loads(stored_file.read_text(encoding="utf-8")), "resume": args.resume})
        for field in dataclasses.fields(cls):
            value = getattr(stored, field.name)
            if not isinstance(value, (int, float, str, type(None)) if field.default is None else type(field.default)):
                raise ValueError(f"{field.name} is {value!r}")
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--resume {args.resume}: args.json is damaged or of another script ({error}); start a new run"
        ) from None
    args = cli(stored)
    for field in dataclasses.fields(cls):
        if getattr(args, field.name) != getattr(stored, field.name):
            raise InputError(
                f"--{field.name} {getattr(args, field.name)} differs from the run in {args.resume} "
                f"({getattr(stored, field.name)}): leave it out, or start a new run"
            )
    return args


# ---------------------------------------------------------------- which settings go together


def check_rule(args) -> None:
    """InputError if --rule lacks its parameter or is given another's, or the numbers of pictures do not divide."""
    for name, rule in (("top_k", "topk"), ("threshold", "threshold"), ("beta", "exponential"), ("reward_max", "exponential")):
        if args.rule != rule and getattr(args, name) != getattr(type(args), name):
            raise InputError(f"--{name} {getattr(args, name)}: is of --rule {rule}, not {args.rule}; leave out one of the two")
    if args.batch % min(args.micro_batch, args.batch):
        raise InputError(f"--micro_batch {args.micro_batch}: must divide --batch {args.batch}")
    if args.rule == "threshold" and args.threshold is None:
        raise InputError("--rule threshold needs --threshold, the least reward to accept")
    if args.rule == "exponential" and not (args.beta or 0) > 0:
        raise InputError("--rule exponential needs --beta above 0, in units of the reward")
    for name in ("threshold", "beta", "reward_max"):
        if not math.isfinite(getattr(args, name) or 0):
            raise InputError(f"--{name} {getattr(args, name)}: must be a finite number")
    if args.rule == "preference" and args.samples % 2:
        raise InputError(f"--samples {args.samples}: must be even for --rule preference")


def check_switch(args) -> None:
    """InputError for arguments of pgraft.py on the switch, the probe or --evaluate that do not fit each other or what is on disk."""
    if args.probe and args.evaluate:
        raise InputError("--probe --evaluate: the probe is of the base model and trains nothing; give one of the two")
    probes = args.probe or args.switch == "auto" and not args.evaluate
    if probes and args.eta == 0:
        raise InputError("--eta 0: a deterministic sampler has nothing to probe; give --eta above 0, or --switch a level")
    if probes and args.steps < 2:
        raise InputError(f"--steps {args.steps}: no level lies between noise and picture; give at least 2")
    try:
        level = 0.5 if args.switch == "auto" else float(args.switch)
    except ValueError:
        level = math.nan
    if not 0 < level < 1:
        raise InputError(f"--switch {args.switch}: must be auto or a level t / T between 0 and 1, both excluded")
    if args.evaluate:
        check_lora(args.evaluate, "--evaluate")
    if args.evaluate and args.switch == "auto":
        read_switch(args.evaluate, "the level with --switch")


def check_lora(folder: str, flag: str) -> None:
    """InputError, naming `flag`, if there is no LoRA in the folder."""
    if not (Path(folder) / LORA_FILE).is_file():
        raise InputError(f"{flag} {folder}: has no {LORA_FILE}; give the folder of a finished graft.py or pgraft.py run")


def read_lora(args) -> None:
    """Check --lora of noise_ppo.py and fill in its --switch_timestep: that of the run's pgraft.json, else -1 (the LoRA is on in all steps)."""
    if not args.lora and args.switch_timestep is not None:
        raise InputError(f"--switch_timestep {args.switch_timestep:g}: is of a LoRA; give --lora, the folder of its run")
    if not args.lora:
        return
    check_lora(args.lora, "--lora")
    if args.switch_timestep is None:
        switched = (Path(args.lora) / "pgraft.json").is_file()
        args.switch_timestep = read_switch(args.lora, "--switch_timestep") if switched else -1.0
    if not -1 <= args.switch_timestep <= 999:
        raise InputError(f"--switch_timestep {args.switch_timestep:g}: must be between -1 and 999")


def default_features(data: str) -> str:
    """--features of inverse_noise_correction.py, left out: for the embedded pictures their own, else the standard ones if installed."""
    return "shapes" if not data else "inception" if importlib.util.find_spec("torch_fidelity") else "pixels"


def check_pictures(args, shape: tuple, most: int) -> None:
    """InputError if the pictures, features or covariance (of `most` numbers) that inverse_noise_correction.py is to use do not suit a
    model of pictures of that shape."""
    if shape[0] not in (1, 3):
        given = f"--channels {shape[0]}" if args.train_base else f"--model {args.model}: {shape[0]} channels"
        raise InputError(f"{given}: must be 1 (grey) or 3 (RGB)")
    d = math.prod(shape)
    if args.normalise == "gaussian" and d > most:
        raise InputError(f"--normalise gaussian: {d} numbers in a picture are too many, {most} at most; take scale")
    world = flow_data.WORLD
    if not args.data and shape != world:
        raise InputError(f"--data: the embedded pictures are {world}, the model's {shape}; give a folder of pictures")
    if args.features == "shapes" and shape != world:
        raise InputError(f"--features shapes: judges pictures of shape {world} only, not {shape}; use pixels or inception")
    if args.features == "inception" and not importlib.util.find_spec("torch_fidelity"):
        raise InputError("--features inception: needs the package torch-fidelity (pip install torch-fidelity), or use pixels")


# ---------------------------------------------------------------- prompts

PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")


def read_task(args) -> tuple[list[str], list[str], list[Reward]]:
    """(training prompts, held-out prompts, rewards): rewards[0] is optimised, all are reported. InputError for prompts and
    names before any model loads."""
    prompts = read_prompts(args.prompts, "--prompts")
    if args.eval_prompts or args.prompts == type(args).prompts:
        held_out = read_prompts(args.eval_prompts or str(ROOT / "shapes" / "prompts_eval.txt"), "--eval_prompts")
    else:
        prompts, held_out = [p for i, p in enumerate(prompts) if i % 10], prompts[::10]
    if not prompts or len(held_out) < 2:
        flag = f"--eval_prompts {args.eval_prompts}" if args.eval_prompts else f"--prompts {args.prompts}"
        raise InputError(f"{flag}: too few to hold out two for evaluation; add more or give --eval_prompts")
    warn_of_overlap(prompts, held_out)
    rewards = read_rewards(args.reward, args.eval_rewards)
    for reward in rewards:
        reward.check_prompts(prompts, "--prompts")
        reward.check_prompts(held_out, "--eval_prompts")
    for reward in rewards:
        reward.load(args.reward_device, args.reward_dtype, args.reward_batch)
    return prompts, held_out, rewards


def read_prompts(file: str, flag: str) -> list[str]:
    """Prompts of a .txt file (one a line), or of a column of a .csv, .tsv or .jsonl file, in order; InputError if there are none.

    The column is given as file.csv:column; left out, it is the first of PROMPT_COLUMNS there is, in capitals or not. A .tsv
    file has no quoting: in PartiPrompts.tsv a quotation mark at the start belongs to the prompt.
    """
    name, _, column = file.rpartition(":")
    if Path(name).suffix not in (".csv", ".tsv", ".jsonl"):
        name, column = file, ""
    path, kind = Path(name), Path(name).suffix
    if kind not in (".txt", ".csv", ".tsv", ".jsonl"):
        raise InputError(
            f"{flag} {file}: give a .txt file (one prompt a line), or .csv, .tsv or .jsonl with a column `prompt`"
        )
    if not path.is_file():
        raise InputError(f"{flag} {file}: no such file; give the path of one")
    lines = []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), 1):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise InputError(f"{flag} {file}: line {number} is not UTF-8; save the file as UTF-8") from None
    if kind == ".txt":
        prompts = lines
    elif kind == ".jsonl":
        prompts = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    column = column or choose_column(row.keys())
                    prompts.append(row[column] + "")
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise InputError(f'{flag} {file}: line {number} is not {{"{column or "prompt"}": "..."}}') from None
    else:
        options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
        try:
            reader = csv.DictReader(lines, **options)
            columns, rows = reader.fieldnames or [], list(reader)
        except csv.Error as error:
            raise InputError(f"{flag} {file}: is no proper {kind} file ({error})") from None
        chosen = column or choose_column(columns)
        if rows and chosen not in columns:
            raise InputError(
                f"{flag} {file}: no column {chosen or 'prompt'!r} in the first line, which has {', '.join(columns)}; "
                f"choose one as {path.name}:column"
            )
        prompts = [row[chosen] or "" for row in rows]
    prompts = [" ".join(part.strip() for part in p.split("\n")).strip() for p in prompts]
    prompts = [p for p in prompts if p]
    if not prompts:
        raise InputError(f"{flag} {file}: holds no prompt; write at least one into it, or give another file")
    return prompts


def choose_column(columns) -> str | None:
    """The first of PROMPT_COLUMNS among the names, whether in capitals or not."""
    named = {c.strip().lower(): c for c in reversed(list(columns))}
    return next((named[p] for p in PROMPT_COLUMNS if p in named), None)


def warn_of_overlap(prompts: list[str], held_out: list[str]) -> None:
    """Print a warning if prompts are trained on and held out at once."""
    trained = {p.casefold() for p in prompts}
    both = [p for p in held_out if p.casefold() in trained]
    if both:
        print(
            f"warning: {len(both)} of the {len(held_out)} held-out prompts are trained on as well, {both[0]!r} for one; "
            "what is reported as held out is then not quite",
            file=sys.stderr,
        )


def schedule_prompts(count: int, per_round: int, rounds: int, seed: int) -> list[list[int]]:
    """For each round the indices of its prompts: slices of a random order of all prompts, of a new one when too few are left."""
    per_round, schedule = min(per_round, count), []
    for r in range(rounds):
        order, place = divmod(r, count // per_round)
        generator = torch.Generator().manual_seed(derived_seed(seed, "prompts", order))
        schedule.append(torch.randperm(count, generator=generator)[place * per_round : (place + 1) * per_round].tolist())
    return schedule


# ---------------------------------------------------------------- the run folder and its checkpoints

LOCK = ".lock"  # a file in it
HELD, WRITER = [], []  # the newest run's lock and tensorboard writer, until the process ends or makes the next


def check_output(output: str, resume: str) -> None:
    """InputError if --output holds anything already (unless the run is resumed) or cannot be made."""
    if resume:
        return
    path = Path(output)
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--output {output}: {there} is no folder that can be written to; give a new folder")
    # what is left of a run that was killed before it had begun is nothing
    if not output or not path.exists() or {p.name for p in path.iterdir()} <= {"args.json.part", LOCK}:
        return
    if (path / "args.json").is_file():
        raise InputError(f"--output {output}: holds a run already; continue it with --resume {output}, or give a new folder")
    raise InputError(f"--output {output}: exists and is not a run; give a new folder")


def make_run_folder(args, script: str, model: str, seed: int) -> Path:
    """The folder of this run, with args.json: the one to resume, --output, or a new one under runs/. Until the process ends or
    makes the next folder, no other process can have it: InputError."""
    named = f"runs/{script}__{Path(model).name}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(args.resume or args.output or named)
    while WRITER:
        WRITER.pop().close()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder, "--resume" if args.resume else "--output")
        if not args.resume:
            check_output(str(folder), "")  # again: another process may have been faster
            write_atomically(folder / "args.json", json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    except OSError as error:
        if args.resume:
            raise  # run_script says what to do
        raise InputError(f"--output {folder}: cannot be written ({error.strerror}); give another folder") from None
    return folder


def lock(folder: Path, flag: str) -> None:
    """Keep other processes from running in `folder`; the system ends that with the process, even a killed one."""
    while HELD:
        HELD.pop().release()
    HELD.append(filelock.FileLock(folder / LOCK, fallback_to_soft=False))  # a file alone would outlive a killed process
    try:
        HELD[0].acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"{flag} {folder}: in use by another process; wait for it, or give another folder") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):  # of some network file systems
            raise
        print(f"warning: {folder} cannot be locked ({error.strerror}); start no second run in it", file=sys.stderr)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, fsync, rename: at every moment `path` is the old file or the new one, never a part."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_checkpoint(folder: Path, state: dict, name: str = "checkpoint.pt") -> None:
    """Atomically write `state` (tensors, numbers, strings, lists, dicts) and the run's arguments to the file `name`."""
    buffer = io.BytesIO()
    torch.save(state | {"args": (folder / "args.json").read_text(encoding="utf-8")}, buffer)
    write_atomically(folder / name, buffer.getvalue())


def load_checkpoint(folder: Path, name: str = "checkpoint.pt") -> dict | None:
    """What save_checkpoint wrote last, or None if the run was stopped before. InputError if one bit of it is not what was written,
    or if args.json is not what it was then."""
    path, refused = folder / name, f"--resume {folder}: {name}"
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:  # torch does not look at the checksums
            if file.testzip():
                raise ValueError("checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many kinds for a damaged file
        raise InputError(f"{refused} is damaged ({type(error).__name__}: {error}); start a new run") from None
    if state.pop("args", None) != (folder / "args.json").read_text(encoding="utf-8"):
        raise InputError(f"{refused} was made with another args.json; put that back, or start a new run")
    return state


def make_adamw(parameters: list, lr: float, eight_bit: bool) -> torch.optim.Optimizer:
    """AdamW without weight decay, or bitsandbytes' with its state in 8 bits; InputError without that package."""
    try:
        kind = importlib.import_module("bitsandbytes.optim").AdamW8bit if eight_bit else torch.optim.AdamW
    except ImportError as error:
        raise InputError(f"--optimizer_8bit needs the package bitsandbytes ({error}); pip install bitsandbytes") from None
    return kind(parameters, lr=lr, weight_decay=0.0)


def restore(args, folder: Path, model, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> tuple:
    """(state, save) of a run that tunes a LoRA: what it has done so far, with --resume as stored (the LoRA, the optimiser and the
    scaler are then set back too), and the function that stores all of it."""
    state = load_checkpoint(folder) if args.resume else None
    if state:
        for name, parameter in model.lora().items():
            parameter.data.copy_(state["lora"][name])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    else:
        state = {"round": 0, "rows": [], "losses": [], "accepted": [], "seconds": 0.0}
    state["begun"] = time.perf_counter() - state["seconds"]

    def save():
        state.update(lora={n: p.detach().cpu() for n, p in model.lora().items()}, optimizer=optimizer.state_dict())
        state.update(scaler=scaler.state_dict(), seconds=time.perf_counter() - state["begun"])
        save_checkpoint(folder, {name: value for name, value in state.items() if name != "begun"})

    return state, save


# ---------------------------------------------------------------- what a run prints, draws and writes

SHOWN = 24  # pictures that are kept whole, for grid.png: six prompts x 4


def shrunk(images: list[Image.Image], number: int) -> list[Image.Image]:
    """The pictures, the first being the `number`-th of all; from SHOWN on at most 64 x 64 pixels of each are kept."""
    return [p if number + j < SHOWN else p.resize((min(64, p.width), min(64, p.height))) for j, p in enumerate(images)]


def paired_table(base: dict, tuned: dict, columns: tuple = ("base", "tuned", "difference")) -> list[dict]:
    """Rows {metric, *columns, se} of {metric: (prompts,)}; se: the standard error over prompts of the mean paired difference."""
    rows = []
    for name in base:
        change = tuned[name] - base[name]
        numbers = (base[name].mean(), tuned[name].mean(), change.mean(), change.std() / len(change) ** 0.5)
        rows.append({"metric": name} | dict(zip((*columns, "se"), map(float, numbers))))
    return rows


def write_results(folder: Path, base: dict, tuned: dict, reward: str, seconds: float, **more) -> None:
    """results.json with the paired table of {metric: (prompts,)} and `more`; the table is printed."""
    table = paired_table(base, tuned)
    write_atomically(folder / "results.json", json.dumps({"table": table, "seconds": seconds, **more}, indent=2) + "\n")
    print_table(table, "held-out prompts", f"   ({reward} was optimised)")


def print_table(table: list[dict], title: str, remark: str = "") -> None:
    """What paired_table returned."""
    _, first, second, *_ = table[0]
    print(f"\n{title:<34}{first:>9}{second:>9}{'difference':>12}   s.e.{remark}")
    for metric, one, other, difference, se in (row.values() for row in table):
        print(f"{metric:<34}{one:>9.3f}{other:>9.3f}{difference:>+12.3f}  {se:.3f}")


def describe(title: str, args, model, per_round: int, held_out: list, more: str = "") -> str:
    """The checked, derived settings of a run that accepts and tunes a LoRA. more: a line."""
    rule = {"topk": f"{args.top_k} best of {args.samples}", "preference": "better of two"}.get(args.rule, args.rule)
    kl = "estimated in every round"
    if args.rule in RANKING:  # then it does not depend on the rewards
        kl = f"{estimated_kl(torch.zeros(1, args.samples), args.rule, top_k=args.top_k):.2f} nats at most (ties lower it)"
    of = "base" if args.reference == "base" or args.rounds == 1 else "model of the round"
    guided = "" if args.guidance == 1 else ", guided loss" if args.guided_loss else ", conditional loss"
    numbers = sum(p.numel() for p in model.lora().values())
    return f"""{title}
  model      {args.model}, {model.prediction_type}, {args.dtype} on {args.device}
  LoRA       rank {args.lora_rank}, alpha {args.lora_alpha:g}, {args.lora_targets}: {numbers:,} parameters
  sampling   {args.rounds} rounds x {per_round} prompts x {args.samples} = {args.rounds * per_round * args.samples} pictures, \
{args.steps} steps, guidance {args.guidance:g}, eta {args.eta:g}
  acceptance {rule} by {args.reward}; KL(accepted || {of}) {kl}
{more}  update     {args.rounds} rounds x {args.updates} = {args.rounds * args.updates} updates x {args.batch} pictures, lr {args.lr:g}{guided}
  evaluation {len(held_out)} held-out prompts x {args.eval_samples} pictures, base and tuned on the same seeds"""


def sampled_row(number: int, args, table: torch.Tensor, index: torch.Tensor, scores: dict, pictures: list) -> dict:
    """What metrics.csv says of a round's sampling. table: rewards (prompts, samples), index: of the accepted among all samples (n,),
    scores: {reward: (prompts x samples,)}. InputError if nothing was accepted."""
    groups = table.view(len(table), -1, 2 if args.rule == "preference" else args.samples)  # what a rule ranks
    flat = ((groups.amax(2) == groups.amin(2)) & (args.rule in RANKING)).double().mean().item()  # no reward differs
    if len(index) == 0:
        share = f"{flat:.0%} of the groups had equal rewards, the best reward was {table.max():.4g}"
        raise InputError(f"--rule {args.rule} accepted nothing: {share}; raise --samples or take another reward")
    spread = [diversity(pictures[i : i + args.samples]) for i in range(0, len(pictures), args.samples)]
    row = {"round": number, "reward_sampled": table.mean().item(), "reward_accepted": table.flatten()[index].mean().item()}
    row |= {"acceptance_rate": len(index) / table.numel(), "flat_groups": flat}
    row |= {"kl": estimated_kl(table, args.rule, top_k=args.top_k, threshold=args.threshold, beta=args.beta)}
    row |= {"diversity": sum(spread) / len(spread)}
    return row | {name: values.mean().item() for name, values in scores.items() if name != args.reward}


def write_metrics(folder: Path, state: dict, base: dict, reward: str) -> None:
    """metrics.csv and curves.png of all rounds, tensorboard's events of the newest. base: the base's {metric: (prompts,)}."""
    log(folder, state["rows"], state["round"], time.perf_counter() - state["begun"])
    save_curves(folder / "curves.png", state["rows"], state["losses"], base[reward].mean().item(), reward)


def log(folder: Path, rows: list[dict], step: int, seconds: float) -> None:
    """metrics.csv with all rows; tensorboard's events of the newest and, there alone since no two runs agree in them, the seconds since
    the run began."""
    write_csv(folder / "metrics.csv", rows)
    if not WRITER:
        WRITER.append(SummaryWriter(str(folder / "tensorboard"), purge_step=step))
    for name, value in (rows[-1] | {"seconds": seconds}).items():
        WRITER[0].add_scalar(name, value, step)
    WRITER[0].flush()


def check_finite(where: str, loss: float, norm: float, scaler: torch.amp.GradScaler) -> None:
    """InputError for a loss or gradient norm that is NaN or Inf. float16: an infinite gradient is no error while the scale can
    fall; scaler.step skips the update."""
    if not (math.isfinite(loss) and (math.isfinite(norm) or scaler.get_scale() > 1)):
        raise InputError(f"{where}: loss {loss}, gradient norm {norm}; lower --lr or use --dtype float32 or bfloat16")


def print_round(state: dict, rounds: int, speed: str) -> None:
    """One line on the newest of the rounds."""
    row, left = state["rows"][-1], state["seconds"] / state["round"] * (rounds - state["round"])
    rates = f"{row['acceptance_rate']:.1%}; {row['flat_groups']:.0%} of groups without signal"
    rewarded = f"reward {row['reward_sampled']:.3f}, accepted {row['reward_accepted']:.3f} ({rates})"
    held = f"held-out {row['reward_held_out']:.3f}, loss {row['loss']:.4f}"
    print(f"  round {state['round']}/{rounds}  {rewarded}, {held}, {speed}{left:.0f} s left", flush=True)


def save_accepted(folder: Path, model, latents: torch.Tensor, rounds: list[dict], prompts: list[str], batch: int) -> None:
    """Write the newest round's accepted pictures from their clean latents (n, c, h, w), then the metadata.jsonl (file_name,
    text, reward) of all rounds. rounds: {prompt, reward}, each (n,), of every round; with {sample} the names hold both numbers."""
    folder.mkdir(exist_ok=True)
    rows = []
    for r, accepted in enumerate(rounds):
        places = [f"{i:06d}" for i in range(len(accepted["prompt"]))]
        if "sample" in accepted:  # so that no two shards use the same name
            places = [
                f"{prompt:06d}_{sample:03d}"
                for prompt, sample in zip(*(accepted[name].tolist() for name in ("prompt", "sample")))
            ]
        for place, prompt, reward in zip(places, accepted["prompt"].tolist(), accepted["reward"].tolist()):
            rows.append({"file_name": f"round{r + 1:03d}_{place}.png", "text": prompts[prompt], "reward": reward})
    new = rows[-len(latents) :]
    for i in range(0, len(new), batch):
        for row, image in zip(new[i:], model.decode(latents[i : i + batch])):
            image.save(folder / row["file_name"])
    write_atomically(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict]) -> None:
    """Atomically write rows with the first row's columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def save_grid(
    path: Path,
    base: list,
    tuned: list,
    prompts: list[str],
    per_prompt: int,
    title: str = "tuned, same seeds (base on the left)",
) -> None:
    """Up to six prompts, one a row: left the base's pictures, right the tuned model's with the same seeds. Lists prompt by prompt."""
    rows = min(6, len(prompts), len(base) // per_prompt)
    figure = Figure(figsize=(2.2 * per_prompt, 1.35 * rows))
    axes = figure.subplots(rows, 2 * per_prompt, squeeze=False)
    for r in range(rows):
        for c in range(per_prompt):
            axes[r, c].imshow(base[r * per_prompt + c])
            axes[r, per_prompt + c].imshow(tuned[r * per_prompt + c])
        axes[r, 0].set_title(prompts[r], fontsize=8, loc="left")
    axes[0, per_prompt].set_title(title, fontsize=8, loc="left")
    for axis in axes.flat:
        axis.set_axis_off()
    save_figure(figure, path)


def save_curves(path: Path, rows: list[dict], losses: list[float], base: float, reward: str) -> None:
    """Reward by round of the accepted, the sampled and the held-out pictures (round 0: the base's); loss by update."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("accepted", "sampled"):
        left.plot([r["round"] for r in rows], [r[f"reward_{name}"] for r in rows], "o-", label=name)
    held_out = {0: base} | {r["round"]: r["reward_held_out"] for r in rows}
    held_out = {k: v for k, v in held_out.items() if not np.isnan(v)}
    left.plot(held_out.keys(), held_out.values(), "s-", label="held out, after the round")
    left.set(xlabel="round", ylabel=reward, xticks=[r["round"] for r in rows])
    left.legend()
    right.plot(losses, linewidth=0.8)
    right.set(xlabel="update", ylabel="denoising loss")
    save_figure(figure, path)


def save_panels(path: Path, panels: list[tuple[str, str, dict]], log_x: bool = False) -> None:
    """Panels side by side, each (x label, y label, {line: (x, y) or (x, y, standard errors)}); NaN values are left out."""
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for axis, (x_label, y_label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, columns in lines.items():
            points = [point for point in zip(*columns) if not np.isnan(point[1])]
            if points:
                axis.errorbar(*zip(*points), fmt="o-", markersize=3, linewidth=1, capsize=2, label=label)
        axis.set(xlabel=x_label, ylabel=y_label)
        if log_x:
            ticks = sorted({x for columns in lines.values() for x in columns[0]})
            axis.set(xscale="log", xticks=ticks, xticklabels=ticks)
            axis.minorticks_off()
        axis.legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Atomically write a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def stock_code(model, more: str = "") -> str:
    """Lines of Python that load the model in stock diffusers as `pipe`; more: options of the DDIM scheduler."""
    name, flow = str(Path(model.name).resolve()) if Path(model.name).exists() else model.name, model.prediction_type == "flow"
    options = f"dtype={model.dtype}" + "".join(f", {key}=None" for key in model.left_out)
    lines = ["import torch; from diffusers import " + ("" if flow else "DDIMScheduler, ") + model.family]
    lines += [f"pipe = {model.family}.from_pretrained({name!r}, {options}).to({model.device!r})"]
    ddim = f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {more}clip_sample=False)"
    return "\n".join(lines if flow else [*lines, ddim])


def stock_call(model, prompt: str, args, more: str = "") -> str:
    """The call that makes the evaluation's first picture; more: further arguments. Stock flows know no eta."""
    eta, remark = f"eta={args.eta}, ", ""
    if model.prediction_type == "flow":
        eta, remark = "", "# the stock flow is deterministic: not the picture of this run\n" if args.eta else ""
    call = f"pipe({prompt!r}, num_inference_steps={args.steps}, guidance_scale={args.guidance}, {eta}"
    generator = f"generator=torch.Generator().manual_seed({derived_seed('eval', 0, 0)})"
    return f'{remark}{call}{generator}{more}).images[0].save("tuned.png")'


# ---------------------------------------------------------------- of pgraft.py: the probe, the switch


def recommend(rows: list[dict], limit: float) -> tuple[float, str]:
    """(timestep of the recommended switch, the reason): the noisiest level with V(t) + its standard error <= limit."""
    if all(math.isnan(row["unresolved"]) for row in rows):
        raise InputError("the probe saw no reward differ; raise --probe_prompts or take another --reward")
    for row in rows:
        if row["unresolved"] + row["se"] <= limit:
            return row["timestep"], f"the noisiest level with V(t) + s.e. at most {limit:g}"
    return rows[-1]["timestep"], f"the cleanest level: V(t) + s.e. is nowhere at most {limit:g}"


def show_probe(folder: Path, rows: list[dict], args, switch: float, reason: str) -> None:
    """V(t) of P-GRAFT's probe with its standard error against the level: printed, probe.csv, probe.png. switch, reason: recommended."""
    write_csv(folder / "probe.csv", rows)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(*([row[name] for row in rows] for name in ("switch", "unresolved", "se")), fmt="o-", capsize=3)
    axis.axhline(args.probe_limit, linestyle=":", color="grey")
    axis.set(xlabel="level t / T (1: noise)", ylabel=f"V(t) of {args.reward}", ylim=(0, None), xlim=(1, 0))
    save_figure(figure, folder / "probe.png")
    print("\n  step  timestep  --switch   V(t)   s.e.   (the share of the reward that the state leaves open)")
    for row in rows:
        print("  {step:4d}  {timestep:8.0f}  {switch:8.3f}  {unresolved:5.2f}  {se:5.2f}".format(**row))
    print(f"  recommended: --switch {switch:g}, {reason}", flush=True)


def describe_switch(args, prompts: int) -> str:
    """The line of a pgraft.py run on its switch; prompts: how many there are to train on."""
    tried = f"{min(args.probe_prompts, prompts)} prompts x 2 states x {args.probe_restarts} restarts"
    level = f"chosen by probing {tried} at each level" if args.switch == "auto" else args.switch
    return f"  switch     {level}; trained on {args.data} noised to the levels above it\n"


def save_switch(folder: Path, model, timestep: float, args) -> None:
    """pgraft.json: what must travel with the LoRA. The level is a training timestep, so it holds for any number of steps."""
    alpha, sigma = model.alpha_sigma(timestep)
    scheduler = dict(model.pipeline.scheduler.config)
    content = {"switch_timestep": timestep, "switch": timestep / model.train_timesteps, "alpha": alpha, "sigma": sigma}
    content |= {"rule": "the LoRA is on in the steps that start at a timestep above switch_timestep, off in the others"}
    content |= {"model": args.model, "prediction_type": model.prediction_type, "scheduler": scheduler}
    content |= {name: getattr(args, name) for name in ("steps", "guidance", "eta", "data")}
    write_atomically(folder / "pgraft.json", json.dumps(content, indent=2) + "\n")


def read_switch(folder: str, instead: str, model=None) -> float:
    """The timestep of the switch in a run's pgraft.json; InputError, which tells to give `instead`, if there is none, if it is damaged,
    or if the model has another noise level there."""
    path = Path(folder) / "pgraft.json"
    if not path.is_file():
        raise InputError(f"{path}: does not exist; give the folder of a finished pgraft.py run, or {instead}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        timestep, level = float(stored["switch_timestep"]), float(stored["sigma"])
        if not math.isfinite(timestep):
            raise ValueError("no number")
    except (ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"{path}: is damaged; give {instead}") from None
    if model:
        sigma = model.alpha_sigma(timestep)[1] if 0 <= timestep < model.train_timesteps else math.nan
        if not abs(sigma - level) < 1e-3:
            raise InputError(
                f"{path} does not fit the model: noise level {level:.4f} at timestep {timestep:g}, the model has {sigma:.4f}; "
                f"give --model {stored.get('model')}"
            )
    return timestep


def stock_switch(level: str) -> str:
    """Lines of Python that switch the LoRA of `pipe` off in the steps that start at the timestep `level` or below."""
    return f"""def base_from_the_switch_on(pipe, i, t, kwargs):  # called after step i
    if i + 1 == (pipe.scheduler.timesteps > {level}).sum():
        pipe.disable_lora()
    return kwargs

pipe.enable_lora()  # before every call: the last one has switched it off"""


def evaluate_saved(args, model, held_out: list[str], switch: float, switch_at: int, evaluate) -> None:
    """pgraft.py --evaluate: base and tuned model on the held-out prompts, the LoRA in that folder on for the first `switch_at` steps.
    switch: the timestep; evaluate: (tuned, label) -> ({metric: (prompts,)}, pictures)."""
    begun = time.perf_counter()
    if switch_at == 0:
        raise InputError(f"--steps {args.steps}: no step starts above the switch, timestep {switch:g}; give more")
    model.load_lora(args.evaluate)
    model.remember(["", *held_out])
    folder = make_run_folder(args, "pgraft_evaluate", args.model, args.seed)
    print(f"P-GRAFT, evaluation of {args.evaluate} -> {folder}")
    print(f"  tuned model for {switch_at} of {args.steps} steps, base model from timestep {switch:g} on", flush=True)
    base, base_pictures = evaluate(False, "evaluate base")
    tuned, pictures = evaluate(True, "evaluate tuned")
    save_grid(folder / "grid.png", base_pictures, pictures, held_out, args.eval_samples)
    seconds, where = time.perf_counter() - begun, {"steps": args.steps, "switch_at": switch_at, "switch_timestep": switch}
    write_results(folder, base, tuned, args.reward, seconds, **where)
    print(f"\n{seconds:.0f} s. In {folder}: results.json, grid.png. To use the LoRA:\n")
    print(pgraft_code(model, args.evaluate, None if args.switch == "auto" else switch, held_out[0], args))


def pgraft_code(model, weights: str | Path, switch: float | None, prompt: str, args) -> str:
    """The evaluation's first picture of P-GRAFT in stock diffusers. weights: folder of the LoRA; switch: a timestep, None: pgraft.json's."""
    weights = Path(weights).resolve()
    level = switch or f'json.load(open({str(weights / "pgraft.json")!r}))["switch_timestep"]'
    return f"""import json; {stock_code(model)}
pipe.load_lora_weights({str(weights)!r})
switch = {level}

{stock_switch("switch")}
{stock_call(model, prompt, args, ", callback_on_step_end=base_from_the_switch_on")}"""


# ---------------------------------------------------------------- of noise_ppo.py


def describe_noise(args, model, policy: torch.nn.Module, per_iteration: int, held_out: list, folder: Path) -> str:
    """The checked, derived settings of a run of noise_ppo.py."""
    pictures, numbers = per_iteration * args.samples, sum(p.numel() for p in policy.parameters())
    share = numbers / sum(p.numel() for p in model.denoiser.parameters())
    learns = "sigma stays 1" if args.mean_only else "mu stays 0" if args.std_only else "mu and sigma"
    return f"""Noise PPO -> {folder}
  model      {args.model}, {model.prediction_type}, {args.dtype} on {args.device}, frozen{f", with the LoRA of {args.lora}" if args.lora else ""}
  policy     {args.policy}, {learns}: {numbers:,} parameters, {share:.1%} of the denoiser's; noise {tuple(model.latent_shape)}
  sampling   {args.iterations} iterations x {per_iteration} prompts x {args.samples} = {args.iterations * pictures} pictures, \
{args.steps} steps, guidance {args.guidance:g}, reward {args.reward}
  update     {args.epochs} epochs in minibatches of {min(args.minibatch, pictures)}, clip {args.clip:g} on the ratio of the \
{args.reduction} log-density, KL weight {args.kl_weight:g}, lr {args.lr:g}
  evaluation {len(held_out)} held-out prompts x {args.eval_samples} pictures at {args.eval_steps} steps, the same seeds for all noises"""


def explained_variance(rewards: torch.Tensor, samples: int) -> float:
    """1 - Var(r - baseline) / Var(r), the baseline being the mean of the prompt's other pictures. rewards: (prompts x samples,)."""
    group = rewards.view(-1, samples)
    residual = (group - group.mean(1, keepdim=True)) * samples / (samples - 1)
    return 1 - (residual.square().mean() / rewards.var(correction=0)).item()


def policy_statistics(
    mean: torch.Tensor, log_std: torch.Tensor, log_ratio: torch.Tensor, kl: torch.Tensor
) -> dict[str, float]:
    """What an update of noise PPO did. mean, log_std: of the new policy (n, c, h, w); log_ratio: log new - log old density of what was
    sampled (n,), in nats; kl: to N(0, I) (n,), in nats."""
    return {
        "approximate_kl": 0.5 * log_ratio.square().mean().item(),  # KL(old || new) in nats, to second order
        "kl_per_dimension": kl.mean().item() / mean[0].numel(),
        "mean_rms": mean.square().mean().sqrt().item(),
        "mean_rms_own": (mean - mean.mean(0)).square().mean().sqrt().item(),  # what is the prompt's own, not shared by all
        "std": log_std.exp().mean().item(),
        "std_spread": log_std.exp().std().item(),
    }


def print_iteration(row: dict, iterations: int, seconds: float) -> None:
    """One line on an iteration of noise PPO; seconds: since the beginning."""
    left = seconds / row["iteration"] * (iterations - row["iteration"])
    rewarded = f"reward {row['reward']:.3f}, held-out {row['reward_held_out']:.3f}"
    moved = f"clipped {row['clip_fraction']:.0%}, KL {row['kl_per_dimension']:.3f} a dimension"
    print(f"  iteration {row['iteration']}/{iterations}  {rewarded}, {moved}, {left:.0f} s left", flush=True)


def steps_row(steps: int, found: dict, table: list[dict], args) -> dict:
    """Noise PPO's final evaluation at one number of steps. found: {initial noise: {metric: (prompts,)}}, table: of paired_table."""
    row = {"steps": steps, "calls": steps * (2 if args.guidance > 1 else 1)}
    row |= {key: table[0][key] for key in ("standard", "learnt", "gain", "se")}
    row |= {name: means[args.reward].mean().item() for name, means in found.items() if name not in row}
    row |= {name: values.mean().item() for name, values in found["standard"].items() if name.startswith("best_of")}
    row["diversity_kept"] = (found["learnt"]["diversity"].mean() / found["standard"]["diversity"].mean()).item()
    return row | {"means": {name: {k: v.mean().item() for k, v in means.items()} for name, means in found.items()}}


def show_steps(folder: Path, rows: list[dict], results: dict, pictures: dict, prompts: list[str], args) -> None:
    """Noise PPO's grid.png, gain.png, curves.png, and the two tables of its final evaluation, printed. pictures: {noise: list}."""
    title = "learnt noise, same random draws (standard noise on the left)"
    save_grid(folder / "grid.png", pictures["standard"], pictures["learnt"], prompts, args.eval_samples, title)
    by_steps = results["by_steps"]
    columns = {name: [row[name] for row in by_steps] for name in by_steps[0] if name != "means"}
    steps, gain = columns.pop("steps"), (columns["gain"], columns.pop("se"))
    lines = {name: (steps, values) for name, values in columns.items() if name not in ("calls", "gain", "diversity_kept")}
    panels = [("steps", args.reward, lines), ("steps", "gain ± s.e.", {"learnt - standard": (steps, *gain)})]
    save_panels(folder / "gain.png", panels, log_x=True)
    panels = []
    for names in (
        ("reward", "reward_held_out"),
        ("clip_fraction", "explained_variance"),
        ("kl_per_dimension", "mean_rms", "std"),
    ):
        lines = {name: ([row["iteration"] for row in rows], [row[name] for row in rows]) for name in names}
        panels.append(("iteration", args.reward if "reward" in names else "", lines))
    save_panels(folder / "curves.png", panels)

    print(f"\nheld-out {args.reward} (best of n: n times the calls, n scores a picture)")
    print("steps" + "".join(f"{name:>16}" for name in columns))
    for i, n in enumerate(steps):
        cells = [f"{values[i]:.3f}" for values in columns.values()]
        cells[0], cells[3] = str(columns["calls"][i]), f"{gain[0][i]:+.3f} ± {gain[1][i]:.3f}"
        print(f"{n:>5}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"KL to standard noise {results['kl']:.1f} nats, {results['kl_per_dimension']:.3f} a dimension")
    print_table(results["table"], f"at {args.steps} steps")


def noise_code(model, folder: Path, prompt: str, args) -> str:
    """The evaluation's first picture with the policy of noise_ppo.py in `folder` and stock diffusers."""
    lora, callback = "", ""
    if args.lora:
        lora = f"\npipe.load_lora_weights({str(Path(args.lora).resolve())!r})"
    if args.lora and args.switch_timestep >= 0:
        callback = ", callback_on_step_end=base_from_the_switch_on"
        lora += "\n\n" + stock_switch(f"{args.switch_timestep:g}")
    call = f"pipe({prompt!r}, latents=latents, num_inference_steps={args.steps}, guidance_scale={args.guidance}{callback})"
    return f"""{stock_code(model, 'timestep_spacing="trailing", ')}{lora}
import sys; sys.path.insert(0, {str(ROOT)!r}); from noise_ppo import NoisePolicy
policy = NoisePolicy.load({str(folder.resolve())!r}, pipe)
latents = policy.sample({prompt!r}, torch.Generator().manual_seed({derived_seed("eval", 0, 0)}))
{call}.images[0].save("learnt.png")"""


# ---------------------------------------------------------------- of inverse_noise_correction.py


def noise_statistics(z: torch.Tensor) -> dict[str, float]:
    """Numbers that tell z (n, channels, height, width) from N(0, I)."""
    z = z.double()
    square = z.flatten(1).square().mean(1)  # (n,) 1 for N(0, I)
    centred = (z - z.mean(0)) / z.std(0)  # every pixel standardised
    energy = (centred.square() - 1) / centred.square().std()

    def neighbours(values, lag):
        across, down = values[..., lag:] * values[..., :-lag], values[..., lag:, :] * values[..., :-lag, :]
        return (0.5 * (across.mean() + down.mean())).item()

    return {
        "norm": square.sqrt().mean().item(),  # divided by the square root of the dimension
        "norm_spread": square.sqrt().std().item(),
        "mean": z.mean().item(),
        "variance": z.var(0).mean().item(),
        "kurtosis": (centred**4).mean().item(),  # 3 for any Gaussian
        "correlation_1": neighbours(centred, 1),  # of neighbours
        "correlation_2": neighbours(centred, 2),
        "energy_correlation_1": neighbours(energy, 1),  # of neighbours' squares: that correlation squared for any Gaussian
        "energy_correlation_2": neighbours(energy, 2),
    }


def save_noises(path: Path, noises: dict[str, torch.Tensor], statistics: dict[str, dict]) -> None:
    """Figure of {name: noises (n, channels, height, width)} beside each other and where the first deviate; statistics: of each."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    norms, values, lags, where = figure.subplots(1, 4)
    for name, z in noises.items():
        norms.hist(z.flatten(1).square().mean(1).sqrt().numpy(), 40, histtype="step", density=True, label=name)
        values.hist(z.flatten()[:100_000].numpy(), np.linspace(-6, 6, 61), histtype="step", density=True, label=name)
        lags.plot((1, 2), [statistics[name]["correlation_1"], statistics[name]["correlation_2"]], "o-", label=name)
    norms.set(xlabel="norm / sqrt(dimension)", ylabel="density")
    values.set(xlabel="value", ylabel="density", yscale="log")
    lags.set(xlabel="distance in pixels", ylabel="correlation", xticks=(1, 2))
    norms.legend(fontsize=7)
    first, z = next(iter(noises.items()))
    figure.colorbar(where.imshow(z.std(0).mean(0).numpy()), ax=where, label=f"deviation of {first} noise by pixel")
    save_figure(figure, path)


def save_frechet_curve(path: Path, rows: list[dict], floor: float) -> None:
    """Frechet distance ("fd") against operations a picture ("flops") of rows, a line for each "arm"; floor: of data against data."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis, lines = figure.subplots(), {}
    for row in rows:
        lines.setdefault(row["arm"], []).append((row["flops"] / 1e6, row["fd"]))
    for name, points in lines.items():
        axis.plot(*zip(*points), "o-" if name.startswith("base") else "s", markersize=4, linewidth=1, label=name)
    axis.axhline(floor, color="grey", linewidth=0.8, linestyle=":", label="data against data")
    axis.set(xscale="log", yscale="log", xlabel="MFLOP per picture", ylabel="Frechet distance")
    axis.legend(fontsize=7)
    save_figure(figure, path)


def save_strips(path: Path, strips: dict[str, torch.Tensor]) -> None:
    """{title: pictures (n, channels, height, width) in [-1, 1]}, a row of the figure each."""
    figure = Figure(figsize=(1.2 * max(map(len, strips.values())), 1.4 * len(strips)))
    for axis, (title, pictures) in zip(figure.subplots(len(strips), 1), strips.items()):
        strip = F.pad(pictures.clamp(-1, 1), (1, 1, 1, 1), value=1.0).permute(1, 2, 0, 3).flatten(2)  # (c, h, n w)
        axis.imshow(((strip + 1) / 2).permute(1, 2, 0).expand(-1, -1, 3).numpy())
        axis.set_title(title, fontsize=8, loc="left")
        axis.set_axis_off()
    save_figure(figure, path)


def describe_correction(args, flow, network: torch.nn.Module, pictures: dict, folder: Path) -> str:
    """The checked, derived settings of a run of inverse_noise_correction.py; network: the corrector's."""
    model = f"trained here, {args.base_updates} updates" if args.train_base else args.model
    size, corrector_size = (sum(p.numel() for p in part.parameters()) for part in (flow.network, network))
    return f"""Inverse Noise Correction -> {folder}
  model      {model}: {type(flow.network).__name__}, {size:,} parameters, pictures {tuple(flow.shape)}, float32 on {args.device}
  sampler    Euler, {args.steps} steps, grid power {args.grid_power:g}
  inversion  {len(pictures["invert"])} pictures, data noise {args.data_noise:g}, tolerance {args.tolerance:g}, \
at most {args.max_iterations} iterations a step
  corrector  {corrector_size:,} parameters, {args.corrector_steps} steps, {args.updates} updates x {args.batch}, lr {args.lr:g}
  evaluation {args.eval_pictures} pictures a row against {len(pictures["reference"])}, Frechet distance on the features {args.features!r}"""


def check_inverted(parts: list[dict], failed: int, most: float) -> None:
    """InputError if more than `most` pictures failed, of the batches that inverse_noise_correction.py has inverted so far."""
    if failed > most:
        tried = sum(part["counts"][0].item() for part in parts)
        worst = ", ".join(f"{c:.2f}" for c in torch.stack([part["contraction"] for part in parts]).nanmean(0))
        raise InputError(
            f"{failed} of the first {tried} pictures could not be inverted (median contraction of the steps {worst}; the "
            "smaller the better, with --memory 0 below 1): use more --steps, more --data_noise, a --grid_power above 1 or more "
            "--max_iterations"
        )


def inversion_report(parts: list[dict]) -> dict:
    """What was inverted, for results.json, from the batches that inverse_noise_correction.py keeps. InputError if too little was."""
    pictures, calls = (sum(part["counts"][i].item() for part in parts) for i in (0, 1))
    inverted = sum(len(part["noise"]) for part in parts)
    if inverted < 20:
        raise InputError(f"only {inverted} pictures could be inverted: give more")
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("error", "residual")}
    report = {"pictures": pictures, "left_out": pictures - inverted, "calls": calls}
    report |= {"largest_residual": joined["residual"].max().item(), "round_trip_error": joined["error"].mean().item()}
    report["largest_round_trip_error"] = joined["error"].max().item()
    report["iterations"] = torch.stack([part["iterations"] for part in parts]).double().mean(0).tolist()
    report["contraction"] = torch.stack([part["contraction"] for part in parts]).double().nanmean(0).tolist()
    return report


def print_inversion(report: dict) -> None:
    """One line on what inversion_report returned."""
    contraction = ", ".join(f"{c:.2f}" for c in report["contraction"])
    error, left_out = f"|T(z) - x| {report['round_trip_error']:.1e}", f"{report['left_out']} of {report['pictures']} left out"
    print(f"  inverted   {left_out}, {report['calls']} model calls, {error}, median contraction {contraction}", flush=True)


def show_correction(
    folder: Path, results: dict, rows: list, inverted: torch.Tensor, starts: dict, data: torch.Tensor, args
) -> None:
    """results.json, to which the rows of the table and the statistics of the noises are added, pictures, and the tables, printed.
    inverted: noises (n, channels, height, width); starts: {name: what makes initial noise of eps}; data: pictures to compare with."""
    eps = draw_noise([derived_seed("statistics", i) for i in range(len(inverted))], 0, inverted.shape[1:], torch.float32)[0]
    noises = {"inverted": inverted, "standard": eps}
    for name, start in starts.items():
        if name in ("gaussian", "corrector"):
            noises[name] = torch.cat([start(part.to(args.device)).cpu() for part in eps.split(args.sample_batch)])
    results = {"table": [{k: row[k] for k in ("arm", "steps", "fd", "flops")} for row in rows]} | results
    results["noise"] = {name: noise_statistics(z) for name, z in noises.items()}
    results["seconds"]["per_picture"] = [row["seconds"] for row in rows]
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    save_frechet_curve(folder / "curve.png", results["table"], results["floor"])
    save_noises(folder / "noise.png", noises, results["noise"])
    strips, main_arms = {"data": data[:8]}, ("base", "scale only", "gaussian", "corrector")
    strips |= {f"{row['arm']}, {row['steps']} steps": row["pictures"] for row in rows if row["arm"] in main_arms}
    save_strips(folder / "grid.png", strips | {f"noise: {name}": z[:8] / 3 for name, z in noises.items()})
    print_correction(results)


def print_correction(results: dict) -> None:
    """The tables of results.json: Frechet distances, statistics of the noises."""
    print(f"\n{'':<26}{'steps':>6}{'MFLOP':>11}{'ms':>8}{'Frechet distance':>18}")
    for row, seconds in zip(results["table"], results["seconds"]["per_picture"]):
        print(f"{row['arm']:<26}{row['steps']:>6}{row['flops'] / 1e6:>11.1f}{1e3 * seconds:>8.2f}{row['fd']:>18.4f}")
    print(f"{'data against data':<51}{results['floor']:>18.4f}")
    print("(MFLOP and ms: of one picture)\n\n" + f"{'noise':<24}" + "".join(f"{name:>12}" for name in results["noise"]))
    for name in results["noise"]["inverted"]:
        print(f"{name:<24}" + "".join(f"{found[name]:>12.3f}" for found in results["noise"].values()))


def corrector_code(args, flow, folder: Path) -> str:
    """Code that samples a picture with the corrector in `folder` and the stock scheduler."""
    kind, part = type(flow.network).__name__, "unet" if hasattr(flow.network, "conv_in") else "transformer"
    one = f"torch.tensor([{getattr(flow.network.config, 'num_embeds_ada_norm', 0)}], device=device)"
    call = "network(x, t)" if part == "unet" else f"network(x, t.expand(1), {one})"
    return f"""import sys, torch; from diffusers import FlowMatchEulerDiscreteScheduler, {kind}; from PIL import Image
sys.path.insert(0, {str(ROOT)!r}); from inverse_noise_correction import Corrector
device, model = {args.device!r}, {str(Path(args.model).resolve())!r}
network = {kind}.from_pretrained(model, subfolder={part!r}).to(device)
scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(model, subfolder="scheduler")
scheduler.set_timesteps(sigmas={asked_levels(args.steps, args.grid_power)}, device=device)
corrector = Corrector.load({str(folder.resolve())!r}, network, scheduler)  # refuses another model or grid
x = corrector(torch.randn(1, {", ".join(map(str, flow.shape))}, generator=torch.Generator().manual_seed({derived_seed("eval", 0)})).to(device))
with torch.no_grad():
    for t in scheduler.timesteps:
        x = scheduler.step({call}.sample, t, x).prev_sample
pixels = ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu()
Image.fromarray(pixels.squeeze(2).numpy()).save("corrected.png")"""
