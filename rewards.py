"""Rewards: functions of images, models, the language of --reward, and statistics that betray reward hacking.

A reward is a function, `reward(images, prompts) -> tensor`. images: list of n PIL images. prompts: list of n
strings; those of a prompt file have its other columns too, `prompt.metadata`. Result: float32 tensor (n,),
larger is better. A reward may be anything: no gradient is needed.

On the command line (--reward, --eval_rewards) a reward is a name from REWARDS or MODELS, a model's name with
a checkpoint of your own, `clip(folder or hub id)`, a function of your own, `path/to/file.py:function`, or a
weighted sum of such: "0.7*pickscore+0.3*my.py:score". Nothing inside parentheses is split:
"0.5*(c++/my.py:score)+clip(models/a+b)".
"""

import copy
import functools
import importlib.util
import inspect
import io
import math
import re
import traceback
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common import DTYPES, check_device, is_checkpoint
from shapes.check import check
from shapes.render import parse
from utils.runs import InputError
from utils.user_code import UserModule

# ---------------------------------------------------------------- rewards of an image


def shapes_strict(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """1 if the image shows exactly what the shapes prompt says and nothing else, else 0."""
    return torch.tensor([float(check(i, p).strict) for i, p in zip(images, prompts)])


def shapes_graded(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """Share in [0, 1] of six things right: two colours, two shapes, the relation, exactly two objects."""
    return torch.tensor([check(i, p).graded for i, p in zip(images, prompts)])


def shapes_fit(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """How cleanly the objects are drawn, whatever the prompt: overlap in [0, 1] of outlines with ideal
    shapes. A rendered image has 0.99."""
    return torch.tensor([check(i, p).fit for i, p in zip(images, prompts)])


def jpeg_kilobytes(image: Image.Image) -> float:
    """Size of the image as a JPEG file (quality 95) in units of 1000 bytes."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.tell() / 1000


def jpeg_compressibility(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """Minus the size as a JPEG in kB, below 0 (as in DDPO, arXiv 2305.13301)."""
    return -torch.tensor([jpeg_kilobytes(i) for i in images])


def jpeg_incompressibility(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """The size as a JPEG in kB, above 0."""
    return torch.tensor([jpeg_kilobytes(i) for i in images])


OCR_PACKAGES = ("rapidocr", "onnxruntime")  # not in requirements.txt
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


def target_text(prompt: str) -> str:
    """The text that an image of the prompt is to show, in lower case without spaces: the column `target` of
    its row, or else what stands between its first quotation marks. "" if there is none."""
    texts = [getattr(prompt, "metadata", {}).get("target"), *map("".join, QUOTED.findall(prompt))]
    text = next((str(text) for text in texts if text), "")
    return "".join(text.split()).lower()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: the least number of letters to insert, delete or replace."""
    row = list(range(len(b) + 1))  # of the first i letters of a to the first j of b
    for i, letter in enumerate(a, 1):
        before, row = row, [i]
        for j, other in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != other)))
    return row[-1]


def text_score(seen: str, wanted: str) -> float:
    """1 if `wanted` is a part of `seen`, else 1 - edit distance / length of `wanted`, at least 0. Both in
    lower case, without spaces. As in Flow-GRPO (arXiv 2505.05470)."""
    if wanted in seen:
        return 1.0
    return 1 - min(edit_distance(seen, wanted), len(wanted)) / len(wanted)


@functools.cache
def text_reader():
    """RapidOCR's detector and recogniser, without its classifier of upside-down lines. Their models are in
    the package."""
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.use_cls": False, "Global.log_level": "critical"})


def ocr(images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """How well the image shows the text that the prompt asks for, in [0, 1]: text_score of target_text and
    all lines that are read, from top to bottom."""
    scores = []
    for image, prompt in zip(images, prompts):
        pixels = np.asarray(image.convert("RGB"))[..., ::-1]  # (height, width, 3), blue first
        lines = text_reader()(np.ascontiguousarray(pixels)).txts or ()
        scores.append(text_score("".join("".join(lines).split()).lower(), target_text(prompt)))
    return torch.tensor(scores)


REWARDS = {
    f.__name__: f
    for f in (shapes_strict, shapes_graded, shapes_fit, jpeg_compressibility, jpeg_incompressibility, ocr)
}


# ---------------------------------------------------------------- rewards that are models
# clip, pickscore, hpsv2, aesthetic and vqa load a model and return a reward. checkpoint: folder or hub id.

VIT_H, VIT_L = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"
COMPANIONS = {  # checkpoints that use the tokenizer and image processor (the last: the CLIP) of another
    "yuvalkirstain/PickScore_v1": VIT_H,
    "adams-story/HPSv2-hf": VIT_H,
    "trl-lib/ddpo-aesthetic-predictor": VIT_L,
}


def load_frozen(model_class, checkpoint, device, dtype):
    """The model for inference. ValueError if its config.json or weights are missing: transformers would take
    a default size and random weights."""
    from transformers.utils import cached_file

    if cached_file(checkpoint, "config.json") is None:
        raise ValueError("has no config.json")
    model, report = model_class.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"has no weights for {min(report['missing_keys'])} of a {model_class.__name__}")
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(checkpoint, vocabulary, **options):
    """The tokenizer of a model with that vocabulary size. ValueError if its files are missing: transformers
    would return an empty one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
    if len(tokenizer) < vocabulary / 2:  # some models have more embeddings than the tokenizer has words
        raise ValueError(f"the tokenizer in {checkpoint} has {len(tokenizer)} words, the model {vocabulary}")
    return tokenizer


@functools.cache  # one copy, whichever rewards use it
def load_clip(checkpoint, processor, device, dtype):
    """(CLIPModel, tokenizer, image processor), the latter two from the folder or hub id `processor`."""
    from transformers import AutoImageProcessor, CLIPModel

    model = load_frozen(CLIPModel, checkpoint, device, dtype)
    tokenizer = load_tokenizer(processor, model.config.text_config.vocab_size)
    # backend: the pixels must not depend on whether torchvision is installed
    return model, tokenizer, AutoImageProcessor.from_pretrained(processor, backend="pil")


def image_embeddings(model, processor, images):
    """n images -> (n, width) float32, each of length 1."""
    pixels = processor([i.convert("RGB") for i in images], return_tensors="pt").pixel_values
    embeddings = model.get_image_features(
        pixels.to(model.device, model.dtype)
    ).pooler_output  # projected already
    return F.normalize(embeddings.float(), dim=1)


def text_embeddings(model, tokenizer, prompts):
    """n prompts, each cut at the model's number of tokens (77) -> (n, width) float32, each of length 1."""
    most = model.config.text_config.max_position_embeddings
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=most, return_tensors="pt").to(
        model.device
    )
    return F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=1)


def clip(checkpoint, device, dtype):
    """Cosine similarity of image and prompt, in [-1, 1], usually 0.15 to 0.35: CLIPScore (arXiv 2104.08718)
    without its factor 2.5 and its cut at 0."""
    model, tokenizer, processor = load_clip(checkpoint, COMPANIONS.get(checkpoint, checkpoint), device, dtype)
    return lambda images, prompts: (
        image_embeddings(model, processor, images) * text_embeddings(model, tokenizer, prompts)
    ).sum(1)


def pickscore(checkpoint, device, dtype):
    """exp(logit_scale) * cosine similarity, usually 17 to 24. If the scores of two images of a prompt differ
    by d, the first is preferred with probability 1 / (1 + exp(-d)). PickScore, arXiv 2305.01569. (Others
    divide by 26.)"""
    cosine = clip(checkpoint, device, dtype)
    scale = (
        load_clip(checkpoint, COMPANIONS.get(checkpoint, checkpoint), device, dtype)[0]
        .logit_scale.float()
        .exp()
    )
    return lambda images, prompts: scale * cosine(images, prompts)


def hpsv2(checkpoint, device, dtype):
    """Cosine similarity, in [-1, 1], usually 0.2 to 0.3:
    HPSv2, arXiv 2306.09341, whose tables show 100 times this."""
    return clip(checkpoint, device, dtype)


def aesthetic(checkpoint, device, dtype):
    """LAION's aesthetic predictor, about 1 to 10, usually 4 to 7, whatever the prompt: linear layers on the
    normalised embedding of CLIP ViT-L/14 (github.com/christophschuhmann/improved-aesthetic-predictor; used by
    DDPO, arXiv 2305.13301). A checkpoint of your own holds aesthetic-model.pth and the CLIP model that it
    belongs to."""
    from transformers.utils import cached_file

    base = COMPANIONS.get(checkpoint, checkpoint)
    model, _, processor = load_clip(base, base, device, dtype)
    linear, dropout = torch.nn.Linear, torch.nn.Dropout  # not used here, but the names in the file count them
    layers = [linear(768, 1024), dropout(0.2), linear(1024, 128), dropout(0.2), linear(128, 64), dropout(0.1)]
    head = torch.nn.Sequential(*layers, linear(64, 16), linear(16, 1)).eval().requires_grad_(False)
    weights = torch.load(
        cached_file(checkpoint, "aesthetic-model.pth"), map_location="cpu", weights_only=True
    )
    head.load_state_dict({name.removeprefix("layers."): value for name, value in weights.items()})
    head.to(device)  # float32
    return lambda images, prompts: head(image_embeddings(model, processor, images)).squeeze(1)


def vqa(checkpoint, device, dtype):
    """P("Yes"), in [0, 1], as the first token of the answer to 'Does this image show "<prompt>"?', by a model
    of the Qwen-VL family (2, 2.5, 3). VQAScore, arXiv 2404.01291. Not comparable between checkpoints, nor
    with that paper's numbers, which are CLIP-FlanT5's."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, ProcessorMixin

    model_type = AutoConfig.from_pretrained(checkpoint).model_type
    if not (model_type.startswith("qwen") and "vl" in model_type):
        raise ValueError(f"is a {model_type}, not of the Qwen-VL family")
    model = load_frozen(AutoModelForImageTextToText, checkpoint, device, dtype)
    # the model's own processor would need torchvision, for videos
    tokenizer = load_tokenizer(checkpoint, model.config.text_config.vocab_size, padding_side="left")
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    template = ProcessorMixin.get_processor_dict(checkpoint)[0].get("chat_template")
    placeholder = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    yes = tokenizer.encode("Yes", add_special_tokens=False)
    if len(yes) != 1:
        raise ValueError("has a tokenizer that splits the word Yes")

    def reward(images, prompts):
        pixels = processor([i.convert("RGB") for i in images], return_tensors="pt").to(model.device)
        counts = pixels["image_grid_thw"].prod(1) // processor.merge_size**2  # (n,) tokens of each image
        texts = []
        for prompt, count in zip(prompts, counts.tolist()):
            question = {"type": "text", "text": f'Does this image show "{prompt}"?'}
            chat = [{"role": "user", "content": [{"type": "image"}, question]}]
            text = tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=True
            )
            texts.append(text.replace(placeholder, placeholder * count, 1))
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        is_image = (tokens["input_ids"] == model.config.image_token_id).int()
        logits = model(
            **tokens, **pixels, mm_token_type_ids=is_image, logits_to_keep=1
        ).logits  # (n, 1, vocabulary)
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

    logging.set_verbosity_error()  # what it prints while loading would bury the run's settings
    logging.disable_progress_bar()
    return MODELS[name][0](checkpoint, device, dtype)


# ---------------------------------------------------------------- rewards of the user's own

IN_A_FILE = "a reward takes (images, prompts) or (images, prompts, metadata)"
RETURNS = (
    "a reward returns a number for each image, in a list, an array or a tensor, or (numbers, dictionary)"
)


@functools.cache  # a file that several rewards name is run once
def load_module(path: Path, source: bytes) -> UserModule:
    """The module of a file with this content."""
    return UserModule(path)


def takes(function, count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # one written in C, whose signature is not known
        return count == 2
    return True


def wants_metadata(function) -> bool:
    """Whether the function's third argument is the prompts' metadata, not a setting with a default."""
    if not takes(function, 3) or not takes(function, 2):
        return takes(function, 3)
    return "metadata" in list(inspect.signature(function).parameters)[2:3]


class OwnReward:
    """A function of the user's file, callable like every reward. It gets copies, and cannot change the run.

    A function without arguments, or with `device` alone, makes the reward, as in the files of ddpo-pytorch
    and Flow-GRPO. What it returns gets the images as there: a float32 tensor (n, 3, height, width) in [0, 1].
    """

    def __init__(self, spec: str, flag: str):
        """spec: "path/to/file.py:name". InputError, naming `flag`, if there is no such reward."""
        self.spec, self.flag, self.tensor_on = spec, flag, None
        file, _, name = spec.rpartition(":")
        if not Path(file).is_file():
            raise InputError(f"{flag} {spec}: no file {file}; give path/to/file.py:function")
        try:
            self.user = load_module(Path(file).resolve(), Path(file).read_bytes())
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's file may raise anything, and may exit
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{flag} {spec}: {file} does not load ({reason})") from None
        self.function = getattr(self.user.module, name, None)
        if not callable(self.function):
            raise InputError(f"{flag} {spec}: {file} has no function {name!r}")
        self.is_factory = not takes(self.function, 2) and not takes(self.function, 3)
        if self.is_factory and not takes(self.function, 0) and not self.takes_device():
            arguments = inspect.signature(self.function)
            raise InputError(f"{flag} {spec}: {name}{arguments} cannot be called; {IN_A_FILE}")

    def takes_device(self) -> bool:
        """Whether the function is a factory with one argument, `device`."""
        return takes(self.function, 1) and list(inspect.signature(self.function).parameters)[0] == "device"

    def load(self, device: str) -> None:
        """Call the factory, if it is one. InputError if it fails, or returns no reward."""
        if not self.is_factory:
            return
        arguments = (torch.device(device),) if self.takes_device() else ()
        try:
            with self.user.running():
                function = self.function(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise InputError(f"{self.flag} {self.spec}: {reason_of(error)}") from None
        if not callable(function) or not (takes(function, 2) or takes(function, 3)):
            raise InputError(f"{self.flag} {self.spec}: returned a {type(function).__name__}; {IN_A_FILE}")
        self.tensor_on = None if inspect.isclass(self.function) else device
        self.function, self.is_factory = function, False

    def __call__(self, images: list[Image.Image], prompts: list[str]):
        """What the user's function returns. Its random numbers depend on the images, not on what was drawn
        before: a resumed run sees the same."""
        seed = zlib.crc32(b"".join(i.tobytes() for i in images))
        if self.tensor_on is None:
            arguments = [[i.copy() for i in images]]
        else:
            pixels = np.stack([np.asarray(i.convert("RGB")) for i in images])  # (n, height, width, 3)
            arguments = [torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.tensor_on).float() / 255]
        arguments.append([str(p) for p in prompts])
        if wants_metadata(self.function):
            arguments.append([copy.deepcopy(getattr(p, "metadata", {})) for p in prompts])
        with self.user.running(seed):
            return self.function(*arguments)


def reason_of(error: BaseException) -> str:
    """What a user's function raised, and where."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    ended = "it ends the program, " if isinstance(error, SystemExit) else ""
    return f"{ended}{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"


# ---------------------------------------------------------------- the language of --reward and --eval_rewards


def split(text: str, separator: str) -> list[str]:
    """The pieces of text between separators. Separators inside parentheses do not count."""
    pieces, depth = [""], 0
    for character in text:
        depth = max(0, depth + {"(": 1, ")": -1}.get(character, 0))
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces]


class Reward:
    """A weighted sum of rewards, callable like each of them.

    parts: [(weight, name, function)]; the function of a model that is not loaded yet is None.
    models: {name: (name in MODELS, checkpoint)}.
    """

    def __init__(self, spec: str, flag: str = "--reward"):
        """spec: as described at the top of this file. InputError, naming `flag`, for anything else.
        Loads no model."""
        self.spec, self.flag, self.parts, self.models, self.loaded = spec, flag, [], {}, False
        for term in split(spec, "+"):
            *weight, name = split(term, "*")
            try:
                weight = float("*".join(weight)) if weight else 1.0
            except ValueError:
                weight = math.nan
            if not math.isfinite(weight):
                raise InputError(f"{flag} {spec}: the weight in {term!r} is not a number")
            if name.startswith("(") and name.endswith(")"):
                name = name[1:-1].strip()
            model, _, checkpoint = name.removesuffix(")").partition("(")
            if name in REWARDS:
                function = REWARDS[name]
                missing = [p for p in OCR_PACKAGES if name == "ocr" and not importlib.util.find_spec(p)]
                if missing:
                    raise InputError(
                        f"{flag} {spec}: needs the package {missing[0]}; pip install {' '.join(OCR_PACKAGES)}"
                    )
            elif model in MODELS and name in (model, f"{model}({checkpoint})"):
                function, self.models[name] = None, (model, checkpoint if name != model else MODELS[model][1])
                if not is_checkpoint(self.models[name][1]):
                    raise InputError(
                        f"{flag} {spec}: {checkpoint!r} is neither a folder nor a hub id owner/name"
                    )
            elif ".py:" in name:
                function = OwnReward(name, flag)
            else:
                raise InputError(
                    f"{flag} {spec}: no reward {name!r}; take {', '.join([*REWARDS, *MODELS])} or "
                    "path/to/file.py:function (in parentheses if there is a + or * in it)"
                )
            self.parts.append((weight, name, function))

    def files(self) -> list[str]:
        """The files and folders that it reads: .py files, checkpoints on the disk."""
        code = [name.rpartition(":")[0] for _, name, _ in self.parts if ".py:" in name]
        return code + [checkpoint for _, checkpoint in self.models.values() if Path(checkpoint).is_dir()]

    def check_prompts(self, prompts: list[str], flag: str) -> None:
        """InputError if a shapes reward is to judge a prompt that it does not understand, or ocr one without
        a text."""
        if any(name == "ocr" for _, name, _ in self.parts):
            for prompt in prompts:
                if not target_text(prompt):
                    raise InputError(
                        f"{flag}: {str(prompt)!r} has no text for {self.flag} ocr; put it in quotation "
                        "marks, or into a column `target`"
                    )
        if any(name in REWARDS and name.startswith("shapes_") for _, name, _ in self.parts):
            for prompt in prompts:
                try:
                    parse(prompt)
                except ValueError as error:
                    raise InputError(
                        f"{flag}: {error}; for other prompts choose another --reward and --eval_rewards"
                    ) from None

    def load(self, device: str = "auto", dtype: str = "float32", batch: int = 16) -> None:
        """Load the models among the parts, to score `batch` images at a time.
        InputError, naming the flag, if one fails."""
        device = check_device(device, dtype, "reward_")
        for i, (weight, name, own) in enumerate(self.parts):
            if isinstance(own, OwnReward):
                own.load(device)
            if name == "ocr":
                try:
                    text_reader()
                except Exception as error:  # a broken package may raise anything
                    raise InputError(f"{self.flag} {self.spec}: rapidocr does not load ({error})") from None
            if name in self.models:
                model, checkpoint = self.models[name]
                try:
                    function = load_model(model, checkpoint, device, DTYPES[dtype])
                except Exception as error:  # a broken folder makes the loaders raise many models
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    raise InputError(
                        f"{self.flag} {self.spec}: {checkpoint} cannot be loaded ({reason}); "
                        f"another checkpoint is given as '{model}(folder or hub id)'"
                    ) from None
                self.parts[i] = (weight, name, in_batches(function, batch))
        self.loaded = True

    def scores(
        self, images: list[Image.Image], prompts: list[str], known: dict | None = None
    ) -> dict[str, torch.Tensor]:
        """{spec: (n,) float32} and, of a sum, {part: (n,)} without its weight. known: scores of these images,
        which are not computed again. InputError, naming the part and the prompt, if a part returns another
        shape, NaN or Inf."""
        if not self.loaded:
            self.load()
        parts, total = {}, torch.zeros(len(images))
        for weight, name, function in self.parts:
            if name not in parts:
                parts[name] = (
                    known[name] if known and name in known else checked(name, function, images, prompts)
                )
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
    """{name: (n,)} of all rewards and of the parts of sums. A part of several sums is computed once."""
    scores = {}
    for reward in rewards:
        scores |= reward.scores(images, prompts, scores)
    return scores


def checked(name: str, function, images: list[Image.Image], prompts: list[str]) -> torch.Tensor:
    """function(images, prompts), (n,) float32 on the CPU;
    InputError, naming the reward `name`, for anything else."""
    try:
        values = function(images, prompts)
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's function may raise anything, and may exit
        raise InputError(f"reward {name}: {reason_of(error)}") from error
    values = as_numbers(name, values)
    if values.shape != (len(images),):
        raise InputError(
            f"reward {name}: returned shape {tuple(values.shape)} for {len(images)} images, "
            f"must be ({len(images)},); first prompt {prompts[0]!r}"
        )
    if not values.isfinite().all():
        bad = int((~values.isfinite()).nonzero()[0])
        raise InputError(f"reward {name}: returned {values[bad].item()} for the prompt {prompts[bad]!r}")
    return values


def as_numbers(name: str, values) -> torch.Tensor:
    """What a reward returned, or the first of (numbers, info), as a new float32 tensor on the CPU.
    InputError, naming the reward `name`, for anything but numbers."""
    if isinstance(values, tuple) and len(values) == 2:
        if isinstance(values[0], (list, tuple)) or getattr(values[0], "ndim", 0):
            values = values[0]
    kind = "None" if values is None else f"a {type(values).__name__}"
    if isinstance(values, (list, tuple)) and len(values):
        kind += f" of {type(values[0]).__name__}"
    if inspect.iscoroutine(values):
        values.close()  # else Python warns that nobody awaited it
    try:
        numbers = torch.as_tensor(values)
        if numbers.is_complex():
            raise TypeError
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"reward {name}: returned {kind}; {RETURNS}") from None
    # a copy: the reward may change its own tensor later
    return numbers.detach().to("cpu", torch.float32, copy=True)


def in_batches(function, size: int):
    """The reward `function`, applied to `size` images at a time, without gradients."""

    @torch.no_grad()
    def reward(images, prompts):
        return torch.cat(
            [function(images[i : i + size], prompts[i : i + size]) for i in range(0, len(images), size)]
        )

    return reward


# ---------------------------------------------------------------- statistics, reported beside every reward


def image_statistics(images: list[Image.Image]) -> dict[str, torch.Tensor]:
    """Statistics that betray reward hacking, each (n,): mean brightness, contrast (standard deviation of the
    grey image) and mean HSV saturation in [0, 1], and the size as a JPEG in kB."""
    grey = [np.asarray(i.convert("L"), float) / 255 for i in images]
    return {
        "brightness": torch.tensor([g.mean() for g in grey]).float(),
        "contrast": torch.tensor([g.std() for g in grey]).float(),
        "saturation": torch.tensor(
            [np.asarray(i.convert("HSV"), float)[..., 1].mean() / 255 for i in images]
        ).float(),
        "jpeg_kb": torch.tensor([jpeg_kilobytes(i) for i in images]).float(),
    }


def diversity(images: list[Image.Image]) -> float:
    """Mean over all pairs of images (of one prompt) of their root-mean-square pixel distance, in [0, 1].
    Images are shrunk to at most 64 x 64 pixels."""
    size = (min(64, images[0].width), min(64, images[0].height))
    pixels = torch.stack(
        [torch.from_numpy(np.asarray(i.convert("RGB").resize(size), np.float32) / 255) for i in images]
    )
    distances = torch.pdist(pixels.flatten(1)) / pixels[0].numel() ** 0.5
    return distances.mean().item() if len(images) > 1 else 0.0
