"""The rewards that are models, on small random models of the real classes, against a second, plain
computation."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import rewards
from conftest import run_inside
from rewards import MODELS, Reward, read_rewards, score
from shapes.render import paint
from shapes.train import TOKENS, make_tokenizer
from utils.runs import InputError

QWEN = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PROMPTS = [
    "a red circle left of a blue square",
    "a blue square",
    "a red red circle above a green square, " * 6,
    "a",
    "",
]
IMAGES = [
    paint([("red", "circle", 8.0, 16.0, 5.4), ("blue", "square", 24.0, 16.0, 5.4)], 128),
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)),
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 75, 3), np.uint8)),
    Image.new("RGBA", (50, 50), (10, 200, 30, 255)),
    Image.new("L", (64, 30), 90),
]


@pytest.fixture(scope="module")
def clip_outputs(clip_folder):
    """CLIPModel's own answer for all IMAGES and PROMPTS, from pixels made here."""
    from transformers import CLIPModel, CLIPTokenizer

    pixels = []
    for image in IMAGES:
        scale = 24 / min(image.size)
        image = image.convert("RGB").resize(
            [int(side * scale) for side in image.size], Image.Resampling.BICUBIC
        )
        left, top = (image.width - 24) // 2, (image.height - 24) // 2
        values = (
            torch.tensor(np.asarray(image.crop((left, top, left + 24, top + 24)), np.float32)).permute(
                2, 0, 1
            )
            / 255
        )
        mean, std = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])
        pixels.append((values - mean[:, None, None]) / std[:, None, None])
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(
        PROMPTS, padding="max_length", truncation=True, max_length=TOKENS
    )
    model = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens.input_ids), torch.stack(pixels), torch.tensor(tokens.attention_mask))


@pytest.fixture(scope="module", params=QWEN)
def qwen_folder(request, tmp_path_factory):
    """A folder with a model of the Qwen-VL family, laid out as the published ones are."""
    import transformers
    from transformers import AddedToken, Qwen2Tokenizer, Qwen2VLImageProcessorPil

    folder, kind = tmp_path_factory.mktemp(request.param), QWEN[request.param]
    make_tokenizer(folder)  # its alphabet is GPT-2's
    alphabet = [token for token in json.loads((folder / "vocab.json").read_text()) if len(token) == 1]
    pieces = [*alphabet, "Ye", "Yes"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(pieces)}, merges=[("Y", "e"), ("Ye", "s")]
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True) for t in SPECIAL]}
    )
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    patch = 16 if kind == "Qwen3VL" else 14
    pixels = {"min_pixels": (2 * patch) ** 2, "max_pixels": (6 * patch) ** 2, "patch_size": patch}
    Qwen2VLImageProcessorPil(**pixels).save_pretrained(folder)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))

    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "head_dim": 8}
    text |= {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 2, "num_heads": 2, "patch_size": patch}
    vision |= {
        "Qwen2VL": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 1},
        "Qwen2_5_VL": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        "Qwen3VL": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    }[kind]
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")
    }
    ids |= {
        f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>")
        for end in ("start", "end")
    }
    # as in the published 2B model
    ids["tie_word_embeddings"] = text["tie_word_embeddings"] = kind == "Qwen2VL"
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) == (kind != "Qwen2VL")  # noqa: SIM118
    return folder


def loaded(spec, **options):
    reward = Reward(spec)
    reward.load(device="cpu", **options)
    return reward


# ---------------------------------------------------------------- against a second computation


def test_clip_scores(clip_folder, clip_outputs):
    logits = clip_outputs.logits_per_image.diag()
    expected = {"pickscore": logits, "clip": logits / np.exp(3), "hpsv2": logits / np.exp(3)}
    assert expected["clip"].std() > 0.01 and expected["clip"].abs().max() < 1
    for name, values in expected.items():
        scores = loaded(f"{name}({clip_folder})")(IMAGES, PROMPTS)
        assert scores.dtype == torch.float32 and not scores.requires_grad
        torch.testing.assert_close(scores, values, atol=4e-4 if name == "pickscore" else 2e-5, rtol=0)


def test_aesthetic_score(clip_folder, clip_outputs):
    x = clip_outputs.image_embeds.double().T  # (768, n), of length 1 each
    torch.testing.assert_close(x.norm(dim=0), torch.ones(len(IMAGES), dtype=torch.float64))
    head = {name: value.double() for name, value in torch.load(clip_folder / "aesthetic-model.pth").items()}
    for i in (0, 2, 4, 6, 7):
        x = head[f"layers.{i}.weight"] @ x + head[f"layers.{i}.bias"][:, None]
    assert x.std() > 0.005
    reward = loaded(f"aesthetic({clip_folder})")
    torch.testing.assert_close(reward(IMAGES, PROMPTS).double(), x[0], atol=1e-4, rtol=0)
    assert torch.equal(reward(IMAGES, PROMPTS), reward(IMAGES, PROMPTS[::-1]))  # whatever the prompt


def by_hand(folder, image, prompt):
    """P(Yes) of one image: the text written out, no padding, no logits left out."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)(image.convert("RGB"), return_tensors="pt")
    _, height, width = pixels["image_grid_thw"][0].tolist()
    placeholder = "<|vision_start|>" + "<|image_pad|>" * (height * width // 4) + "<|vision_end|>"
    text = (
        f'<|im_start|>user\n{placeholder}Does this image show "{prompt}"?<|im_end|>\n<|im_start|>assistant\n'
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits[0, -1].double()
    shares = (logits - logits.max()).exp()
    return shares[tokenizer.convert_tokens_to_ids("Yes")] / shares.sum()


def test_vqa_score(qwen_folder):
    prompts = [*PROMPTS[:4], "curly {braces} and a\nline"]
    expected = torch.stack([by_hand(qwen_folder, image, prompt) for image, prompt in zip(IMAGES, prompts)])
    scores = loaded(f"vqa({qwen_folder})")(IMAGES, prompts)
    assert (0 < scores).all() and (scores < 1).all() and scores.std() > 0.02 * scores.mean()
    torch.testing.assert_close(scores.double(), expected, atol=0, rtol=1e-3)


def test_vqa_inputs_are_the_processors(qwen_folder, monkeypatch):
    """What the model is given equals what the family's own processor makes, which needs torchvision."""
    pytest.importorskip("torchvision")
    from transformers import AutoProcessor, Qwen2VLImageProcessorPil

    processor = AutoProcessor.from_pretrained(qwen_folder)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(qwen_folder)
    processor.tokenizer.padding_side = "left"
    texts = []
    for prompt in PROMPTS:
        content = [{"type": "image"}, {"type": "text", "text": f'Does this image show "{prompt}"?'}]
        chat = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
    images = [image.convert("RGB") for image in IMAGES]
    expected = processor(images=images, text=texts, padding=True, return_tensors="pt")

    original, seen = rewards.load_frozen, {}

    def watched(*args):
        model = original(*args)
        model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
        return model

    monkeypatch.setattr(rewards, "load_frozen", watched)
    rewards.vqa(str(qwen_folder), "cpu", torch.float32)(IMAGES, PROMPTS)
    assert seen.pop("logits_to_keep") == 1 and seen.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(seen[name].to(values.dtype), values), name


# ---------------------------------------------------------------- what must not matter, and what must


def test_neither_batch_nor_order_matters(clip_folder, qwen_folder):
    for name in MODELS:
        spec = f"{name}({qwen_folder if name == 'vqa' else clip_folder})"
        whole = loaded(spec, batch=16)(IMAGES, PROMPTS)
        assert len(whole.unique()) == len(IMAGES)
        for batch in (1, 2):
            torch.testing.assert_close(
                loaded(spec, batch=batch)(IMAGES, PROMPTS), whole, atol=1e-5, rtol=1e-4
            )
        order = [3, 0, 4, 2, 1]
        shuffled = loaded(spec, batch=3)([IMAGES[i] for i in order], [PROMPTS[i] for i in order])
        torch.testing.assert_close(shuffled, whole[order], atol=1e-5, rtol=1e-4)


def test_image_and_prompt_matter(clip_folder, qwen_folder):
    for name in MODELS:
        reward = loaded(f"{name}({qwen_folder if name == 'vqa' else clip_folder})")
        values = reward([IMAGES[0], IMAGES[1], IMAGES[0]], [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
        assert values[0] != values[1] and (values[0] != values[2]) == (name != "aesthetic")


def test_batches_are_of_the_size_asked_for(clip_folder, monkeypatch):
    sizes = []
    original = rewards.image_embeddings
    monkeypatch.setattr(
        rewards, "image_embeddings", lambda *args: sizes.append(len(args[2])) or original(*args)
    )
    loaded(f"clip({clip_folder})", batch=2)(IMAGES, PROMPTS)
    assert sizes == [2, 2, 1]


def test_dtype(clip_folder, qwen_folder):
    for name in MODELS:
        spec = f"{name}({qwen_folder if name == 'vqa' else clip_folder})"
        exact, rough = (loaded(spec, dtype=dtype)(IMAGES, PROMPTS) for dtype in ("float32", "bfloat16"))
        assert rough.dtype == torch.float32 and not torch.equal(exact, rough)
        torch.testing.assert_close(rough, exact, atol=0.02 * exact.abs().max().item(), rtol=0.05)
    model = rewards.load_clip(str(clip_folder), str(clip_folder), "cpu", torch.bfloat16)[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not any(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(clip_folder, qwen_folder):
    for name in MODELS:
        reward = Reward(f"{name}({qwen_folder if name == 'vqa' else clip_folder})")
        reward.load(device="cuda")
        on_cpu = loaded(reward.spec)(IMAGES, PROMPTS)
        torch.testing.assert_close(reward(IMAGES, PROMPTS), on_cpu, atol=1e-3, rtol=1e-2)


# ---------------------------------------------------------------- sums, and what is loaded when


def test_sum_and_its_parts(clip_folder):
    spec = f"0.7*clip({clip_folder})+-2*jpeg_incompressibility+clip({clip_folder})"
    reward = Reward(spec)  # loads at its first call
    clip, jpeg = (
        loaded(f"clip({clip_folder})")(IMAGES, PROMPTS),
        rewards.jpeg_incompressibility(IMAGES, PROMPTS),
    )
    torch.testing.assert_close(reward(IMAGES, PROMPTS), 1.7 * clip - 2 * jpeg)
    scores = score([reward], IMAGES, PROMPTS)
    assert list(scores) == [spec, f"clip({clip_folder})", "jpeg_incompressibility"]  # the sum first
    assert torch.equal(scores[f"clip({clip_folder})"], clip) and torch.equal(
        scores["jpeg_incompressibility"], jpeg
    )


def test_everything_is_computed_once(clip_folder, monkeypatch):
    calls = []
    original = rewards.image_embeddings
    monkeypatch.setattr(rewards, "image_embeddings", lambda *args: calls.append(1) or original(*args))
    clip, jpeg = f"clip({clip_folder})", "jpeg_compressibility"
    some = read_rewards(f"{clip}+{jpeg}", f" {clip} ,2*{jpeg},,{jpeg}")
    assert [reward.spec for reward in some] == [f"{clip}+{jpeg}", clip, f"2*{jpeg}", jpeg]
    scores = score(some, IMAGES, PROMPTS)
    assert len(calls) == 1
    assert list(scores) == [f"{clip}+{jpeg}", clip, jpeg, f"2*{jpeg}"]
    torch.testing.assert_close(scores[f"2*{jpeg}"], 2 * scores[jpeg])


def test_a_checkpoint_is_loaded_once(clip_folder, monkeypatch):
    folder, loads = f"({clip_folder})", []
    rewards.load_clip.cache_clear()
    rewards.load_model.cache_clear()
    original = rewards.load_frozen
    monkeypatch.setattr(rewards, "load_frozen", lambda *args: loads.append(args) or original(*args))
    some = read_rewards(
        f"0.7*pickscore{folder}+0.3*clip{folder}", f"clip{folder},aesthetic{folder},hpsv2{folder}"
    )
    assert len(some) == 4 and not loads  # reading loads nothing
    for reward in some:
        reward.load(device="cpu")
    assert len(loads) == 1
    some[0].load(device="cpu", dtype="bfloat16")
    assert len(loads) == 2


def test_default_checkpoints_take_the_processor_of_their_base(clip_folder, monkeypatch):
    given = []
    clip = rewards.load_clip(str(clip_folder), str(clip_folder), "cpu", torch.float32)
    monkeypatch.setattr(rewards, "load_clip", lambda *args: given.append(args[:2]) or clip)
    monkeypatch.setattr("transformers.utils.cached_file", lambda _, name: clip_folder / name)
    large, huge = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    expected = {
        "clip": (large, large),
        "pickscore": ("yuvalkirstain/PickScore_v1", huge),
        "aesthetic": (large, large),
    }
    for name, files in (expected | {"hpsv2": ("adams-story/HPSv2-hf", huge)}).items():
        MODELS[name][0](MODELS[name][1], "cpu", torch.float32)
        assert set(given) == {files}
        given.clear()
        MODELS[name][0](str(clip_folder), "cpu", torch.float32)
        assert set(given) == {(str(clip_folder), str(clip_folder))}
        given.clear()


@pytest.mark.parametrize(
    "checkpoint", ["", "gpt2", "/absent/folder", "./a/b", "../a", "~/clip", "a/b/c", "owner/"]
)
def test_no_checkpoint(checkpoint):
    with pytest.raises(InputError, match="neither a folder nor a hub id") as error:
        Reward(f"shapes_fit+clip({checkpoint})", "--eval_rewards")
    assert str(error.value).startswith(f"--eval_rewards shapes_fit+clip({checkpoint}): {checkpoint!r}")


def damaged(folder, to, damage):
    """A copy of a checkpoint with a fault; the word that the message must contain."""
    shutil.copytree(folder, to)
    weights = to / "model.safetensors"
    if damage == "no weights":
        weights.unlink()
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            (to / name).unlink(missing_ok=True)
    elif damage == "no config":
        (to / "config.json").unlink()
    elif damage == "half a model":
        from safetensors.torch import load_file, save_file

        kept = {name: value for name, value in load_file(weights).items() if "text_model" not in name}
        save_file(kept, weights, {"format": "pt"})
    elif damage == "no head":
        (to / "aesthetic-model.pth").unlink()
    elif damage == "other head":
        torch.save({"layers.0.weight": torch.zeros(3, 3)}, to / "aesthetic-model.pth")
    return to


@pytest.mark.parametrize(
    "damage, reason",
    [
        ("no weights", ""),
        ("cut weights", ""),
        ("no tokenizer", ""),
        ("no config", "has no config.json"),
        ("half a model", "has no weights for text_model"),
    ],
)
def test_damaged_checkpoint(clip_folder, tmp_path, damage, reason):
    folder = damaged(clip_folder, tmp_path / "clip", damage)
    for name in ("clip", "pickscore", "hpsv2", "aesthetic"):
        with pytest.raises(InputError) as error:
            loaded(f"shapes_fit+{name}({folder})")
        message = str(error.value)
        assert message.startswith(f"--reward shapes_fit+{name}({folder}): {folder} cannot be loaded (")
        assert message.endswith(f"'{name}(folder or hub id)'") and "\n" not in message and reason in message


@pytest.mark.parametrize("damage", ["no head", "other head"])
def test_damaged_aesthetic_head(clip_folder, tmp_path, damage):
    folder = damaged(clip_folder, tmp_path / "clip", damage)
    loaded(f"clip({folder})")
    with pytest.raises(InputError, match="cannot be loaded"):
        loaded(f"aesthetic({folder})")


def test_model_of_another_class(clip_folder, qwen_folder):
    with pytest.raises(InputError, match="is a clip, not of the Qwen-VL family"):
        loaded(f"vqa({clip_folder})")
    with pytest.raises(InputError, match="cannot be loaded"):
        loaded(f"clip({qwen_folder})")


@pytest.mark.parametrize("name", MODELS)
def test_default_checkpoint_that_cannot_be_had(name, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as error:
        loaded(name)
    assert str(error.value).startswith(f"--reward {name}: {MODELS[name][1]} cannot be loaded (")


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("script", ["graft.py", "pgraft.py", "noise_ppo.py"])
def test_run_reports_every_part(script, clip_folder, tiny_arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [f"clip({clip_folder})", "jpeg_compressibility"]
    spec = f"0.7*{parts[0]}+0.3*{parts[1]}"
    short = {
        "graft.py": "--rounds 1 --updates 1",
        "pgraft.py": "--rounds 1 --updates 1 --switch 0.5",
        "noise_ppo.py": "--iterations 1 --no-controls --eval_steps 4 --clip 1e-3 "
        "--prompts_per_iteration 3 --samples 4",
    }[script]
    argv = tiny_arguments if script != "noise_ppo.py" else tiny_arguments[: tiny_arguments.index("--rounds")]
    rest = ["--reward", spec, "--eval_rewards", f"{parts[0]},aesthetic({clip_folder})", "--eval_samples", "2"]
    code, out, error = run_inside([*argv, *short.split(), *rest, "--steps", "4", "--output", "run"], script)
    assert code == 0, error
    (row,) = csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines())
    total = float(row["reward" if script == "noise_ppo.py" else "reward_sampled"])
    assert total == pytest.approx(0.7 * float(row[parts[0]]) + 0.3 * float(row[parts[1]]), abs=1e-6)
    table = {
        row.pop("metric"): row for row in json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    }
    assert {spec, *parts, f"aesthetic({clip_folder})", "brightness"} <= table.keys()
    for column in {"base", "tuned", "standard", "learnt"} & table[spec].keys():
        by_parts = 0.7 * table[parts[0]][column] + 0.3 * table[parts[1]][column]
        assert table[spec][column] == pytest.approx(by_parts, abs=1e-6)
    for name in (spec, *parts):
        assert f"\n{name}" in out


@pytest.mark.parametrize("words, complete", [(0, False), (40, False), (60, True), (100, True)])
def test_a_tokenizer_with_too_few_words(monkeypatch, words, complete):
    """Without its files transformers makes an empty one; some models have more embeddings than words."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: range(words))
    if complete:
        assert rewards.load_tokenizer("folder", 100) == range(words)
    else:
        with pytest.raises(ValueError, match=f"the tokenizer in folder has {words} words, the model 100"):
            rewards.load_tokenizer("folder", 100)
