"""What is asked for, how it is judged, how it is shown: prompts, rewards, metrics, and a run's tables, pictures and code.

A reward is a function, `reward(images, prompts) -> tensor`. images: list of n PIL pictures, prompts: list of n strings, result: float32
tensor (n,), larger is better. A reward may be anything: no gradient is needed.

On the command line (--reward, --eval_rewards) a reward is a name from REWARDS or MODELS, a model's name with a checkpoint of
your own, `clip(folder or hub id)`, a function of your own, `path/to/file.py:function`, or a weighted sum of such:
"0.7*pickscore+0.3*my.py:score". Nothing inside parentheses is split: "0.5*(c++/my.py:score)+clip(models/a+b)".
"""

import csv
import functools
import importlib.util
import io
import json
import math
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from common import DTYPES, ROOT, InputError, check_device, derived_seed, write_atomically
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
    return torch.nn.functional.normalize(embeddings.float(), dim=1)


def text_embeddings(model, tokenizer, prompts):
    """n prompts, each cut at the model's number of tokens (77) -> (n, width) float32, each of length 1."""
    most = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=most, return_tensors="pt").to(model.device)
    return torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=1)


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
    return hub_id or name != "" and Path(name).is_dir()


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


# ---------------------------------------------------------------- what is asked for: rule, prompts, rewards

PROMPT_COLUMNS = ("prompt", "prompts", "caption", "text")


def check_rule(args) -> None:
    """InputError if --rule lacks its parameter, or the numbers of pictures do not divide."""
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


def read_task(args) -> tuple[list[str], list[str], list[Reward]]:
    """(training prompts, held-out prompts, rewards): rewards[0] is optimised, all are reported. InputError before any loads."""
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


# ---------------------------------------------------------------- statistics of initial noises


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


# ---------------------------------------------------------------- a run's settings, tables, pictures, code


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


def describe(title: str, args, model, per_round: int, held_out: list, kl: float | None, more: str = "") -> str:
    """The checked, derived settings of a run that accepts and tunes a LoRA. kl: nats, None if the rewards decide; more: a line."""
    rule = {"topk": f"{args.top_k} best of {args.samples}", "preference": "better of two"}.get(args.rule, args.rule)
    kl = "estimated in every round" if kl is None else f"{kl:.2f} nats at most (ties lower it)"
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


def write_metrics(folder: Path, writer, state: dict, base: dict, reward: str) -> None:
    """metrics.csv and curves.png of all rounds; the newest goes to the tensorboard `writer`. base: the base's {metric: (prompts,)}."""
    write_csv(folder / "metrics.csv", state["rows"])
    save_curves(folder / "curves.png", state["rows"], state["losses"], base[reward].mean().item(), reward)
    for name, value in state["rows"][-1].items():
        writer.add_scalar(name, value, state["round"])


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
            kept = [point for point in zip(*columns) if not np.isnan(point[1])]
            if kept:
                axis.errorbar(*zip(*kept), fmt="o-", markersize=3, linewidth=1, capsize=2, label=label)
        axis.set(xlabel=x_label, ylabel=y_label)
        if log_x:
            ticks = sorted({x for columns in lines.values() for x in columns[0]})
            axis.set(xscale="log", xticks=ticks, xticklabels=ticks)
            axis.minorticks_off()
        axis.legend(fontsize=7)
    save_figure(figure, path)


def save_probe(folder: Path, rows: list[dict], limit: float, reward: str) -> None:
    """V(t) of P-GRAFT's probe with its standard error against the level: probe.csv, probe.png."""
    write_csv(folder / "probe.csv", rows)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(*([row[name] for row in rows] for name in ("switch", "unresolved", "se")), fmt="o-", capsize=3)
    axis.axhline(limit, linestyle=":", color="grey")
    axis.set(xlabel="level t / T (1: noise)", ylabel=f"V(t) of {reward}", ylim=(0, None), xlim=(1, 0))
    save_figure(figure, folder / "probe.png")


def show_steps(folder: Path, rows: list[dict], results: dict, args) -> None:
    """Noise PPO's gain.png, curves.png, and the two tables of its final evaluation, printed."""
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


def stock_switch(level: str) -> str:
    """Lines of Python that switch the LoRA of `pipe` off in the steps that start at the timestep `level` or below."""
    return f"""def base_from_the_switch_on(pipe, i, t, kwargs):  # called after step i
    if i + 1 == (pipe.scheduler.timesteps > {level}).sum():
        pipe.disable_lora()
    return kwargs

pipe.enable_lora()  # before every call: the last one has switched it off"""


# ---------------------------------------------------------------- the same for inverse_noise_correction.py


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
