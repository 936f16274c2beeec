"""The shapes world: prompt files; renderer and checker against each other and against images made by hand;
the embedded pipeline."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from shapes import render as render_module
from shapes.check import AREA, check, find_objects
from shapes.render import (
    COLOURS,
    PROMPT_FILES,
    RELATIONS,
    REVERSED,
    SHAPES,
    all_scenes,
    half_extent,
    paint,
    parse,
    prompt_of,
    render,
)

SCENES = all_scenes()
PIPELINE = Path(__file__).resolve().parents[1] / "shapes" / "pipeline"
needs_pipeline = pytest.mark.skipif(not PIPELINE.is_dir(), reason="shapes/pipeline is not trained yet")
# FIRST is left of SECOND
FIRST, SECOND = (("red", "circle", 8.0, 16.0, 5.4), ("blue", "square", 24.0, 16.0, 5.4))
PROMPT = "a red circle left of a blue square"


def rendered(scenes, seed):
    rng = np.random.default_rng(seed)
    return [render(*scene, rng) for scene in scenes]


def wrong_prompts(scene):
    """Every prompt that differs from the scene's in one property, and the one with the objects swapped."""
    first, relation, second = scene
    for i, one in enumerate((first, second)):
        for other in [(c, one[1]) for c in COLOURS if c != one[0]] + [
            (one[0], s) for s in SHAPES if s != one[1]
        ]:
            yield prompt_of(other, relation, second) if i == 0 else prompt_of(first, relation, other)
    yield from (prompt_of(first, r, second) for r in RELATIONS if r != relation)
    yield prompt_of(second, relation, first)


def edited(image, mask, colour):
    """The image with the pixels of a boolean mask (rows, columns) set to a colour."""
    pixels = np.array(image)
    pixels[mask] = colour
    return Image.fromarray(pixels)


# ---------------------------------------------------------------- prompts


def test_prompt_files():
    train, held_out = (
        PROMPT_FILES[name].read_text(encoding="utf-8").splitlines() for name in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (400, 128)
    assert sorted(train + held_out) == sorted(prompt_of(*scene) for scene in SCENES)
    assert len(set(train + held_out)) == len(SCENES) == 528
    for side in (train, held_out):
        scenes = {parse(prompt) for prompt in side}
        # both wordings on one side
        assert {(b, REVERSED[relation], a) for a, relation, b in scenes} == scenes


def test_reversed_wording_is_of_the_same_scene():
    for relation, direction in RELATIONS.items():
        assert tuple(-d for d in direction) == RELATIONS[REVERSED[relation]]


def test_parse():
    for scene in SCENES:
        assert parse(prompt_of(*scene)) == scene
    assert parse("  A Red circle LEFT of a blue square\n") == (
        ("red", "circle"),
        "left of",
        ("blue", "square"),
    )


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a cat",
        "a red circle",
        "a red circle near a blue square",
        "a red circle left of a blue hexagon",
        "a purple circle left of a blue square",
        "a red circle left of a square",
        "red circle left of a blue square",
        "a red circle left of a big blue square",
        "a red circle left of a blue square above a green circle",
    ],
)
def test_parse_refuses(prompt):
    with pytest.raises(ValueError, match="is not a shapes prompt") as error:
        parse(prompt)
    assert repr(prompt) in str(error.value)
    with pytest.raises(ValueError):
        check(paint([FIRST, SECOND], 128), prompt)


# ------------------------------------------------ the renderer, by pixels: the checker shares its tables


def test_directions_in_pixels():
    for relation, x, y in (("left of", -1, 0), ("right of", 1, 0), ("above", 0, -1), ("below", 0, 1)):
        for seed in range(20):
            (image,) = rendered([(("red", "circle"), relation, ("blue", "square"))], seed)
            pixels = np.asarray(image, int)
            red, blue = (pixels[..., c] - pixels[..., 2 - c] > 80 for c in (0, 2))
            dy, dx = np.argwhere(red).mean(0) - np.argwhere(blue).mean(0)
            assert x * dx + y * dy > abs(y * dx) + abs(x * dy)


def test_shapes_and_colours_in_pixels():
    for shape in SHAPES:
        mask = np.asarray(paint([("red", shape, 16.0, 16.0, 10.0)], 0))[..., 0] > 112
        rows = mask.sum(1)[mask.any(1)]
        assert mask.sum() == pytest.approx(100 * AREA[shape], rel=0.04)  # the table of the checker
        if shape == "square":
            assert (rows == rows[0]).all() and len(rows) == rows[0]
        elif shape == "circle":
            assert (rows == rows[::-1]).all() and rows.max() == len(rows) >= 2 * rows[0]
        else:
            assert (np.diff(rows) >= 0).all() and rows[-1] > len(rows) > rows[0]  # point up
    for colour, (r, g, b) in COLOURS.items():
        strong = {
            "red": r - max(g, b),
            "green": g - max(r, b),
            "blue": b - max(r, g),
            "yellow": min(r, g) - b,
        }
        assert max(strong, key=strong.get) == colour


def test_render_depends_on_the_generator_alone():
    first, again, other = (rendered(SCENES[:1], seed)[0] for seed in (0, 0, 1))
    assert first == again and first != other
    assert first.size == (32, 32) and first.mode == "RGB"


# ---------------------------------------------------------------- render -> check


@pytest.mark.parametrize("seed", range(3))
def test_rendered_scenes_are_right(seed):
    for scene, image in zip(SCENES, rendered(SCENES, seed)):
        result = check(image, prompt_of(*scene))
        assert result.strict is True and result.graded == 1 and 0.9 < result.fit <= 1
        other = (scene[2], REVERSED[scene[1]], scene[0])
        assert seed or check(image, prompt_of(*other)) == result  # the other wording


def test_one_wrong_property_is_noticed():
    scenes = SCENES[::3]  # every object, colour, shape and relation in every place
    for scene, image in zip(scenes, rendered(scenes, 10)):
        prompts = list(wrong_prompts(scene))
        assert len(prompts) == 14
        for prompt in prompts:
            result = check(image, prompt)
            assert not result.strict and result.graded == 5 / 6


def test_graded_counts_what_is_right():
    image = paint([FIRST, SECOND], 128)
    grades = {
        PROMPT: 6,
        "a green circle left of a blue square": 5,
        "a green triangle left of a blue square": 4,
        "a green triangle above a blue square": 3,
        "a green triangle above a yellow square": 2,
        "a green triangle above a yellow triangle": 1,
    }
    for prompt, right in grades.items():
        assert check(image, prompt).graded == pytest.approx(right / 6)
        assert check(image, prompt).strict is (right == 6)


def test_objects_are_recognised():
    first, second = sorted(find_objects(paint([FIRST, SECOND], 90)), key=lambda o: o.x)
    assert (first.colour, first.shape) == FIRST[:2] and (second.colour, second.shape) == SECOND[:2]
    assert (first.x, first.y, second.x, second.y) == pytest.approx((8, 16, 24, 16), abs=0.2)
    assert first.fit > 0.95


def test_a_diagonal_is_no_relation():
    # more above than left
    image = paint([("red", "circle", 8.0, 8.0, 5.4), ("blue", "square", 22.0, 24.0, 5.4)], 128)
    assert not check(image, PROMPT).strict
    assert check(image, "a red circle above a blue square").strict


# ---------------------------------------------------------------- wrong images


@pytest.mark.parametrize("background", [70, 128, 230])
def test_number_of_objects(background):
    assert check(paint([FIRST, SECOND], background), PROMPT).strict
    for colour in COLOURS:
        for shape in SHAPES:
            third = [(colour, shape, 16.0, y, 3.5) for y in (5.0, 27.0)]
            for extra in ([third[0]], [third[1]], third):
                result = check(paint([FIRST, SECOND, *extra], background), PROMPT)
                assert not result.strict and result.graded == 5 / 6
    for one in (FIRST, SECOND):
        result = check(paint([one], background), PROMPT)
        assert not result.strict and result.graded == pytest.approx(2 / 6)


@pytest.mark.parametrize("blob", [(0, 0, 0), (128, 128, 128), (255, 255, 255), (160, 40, 200)])
def test_a_blob_of_no_colour_is_an_extra_object(blob):
    for background in (70, 185, 200):
        assert max(abs(b - background) for b in blob) > 50  # it can be seen
        for side in (4, 6):
            mask = np.zeros((32, 32), bool)
            mask[3 : 3 + side, 14 : 14 + side] = True
            result = check(edited(paint([FIRST, SECOND], background), mask, blob), PROMPT)
            assert not result.strict and result.graded < 1


@pytest.mark.parametrize("edge", [6.5, 8.0])  # about a third, and a half
def test_partly_overpainted_object_has_no_colour(edge):
    for colour in COLOURS:
        for shape in SHAPES:
            one, two = (colour, shape, 8.0, 16.0, 5.4), SECOND if colour != "blue" else ("red", *SECOND[1:])
            prompt = prompt_of(one[:2], "left of", two[:2])
            for background in (70, 150, 230):
                image = paint([one, two], background)
                assert check(image, prompt).strict
                left = (abs(np.asarray(image, int) - background).max(-1) > 20) & (np.arange(32) < edge)
                for over in {*COLOURS.values(), (0, 0, 0), (255, 255, 255)} - {COLOURS[colour]}:
                    # white on it is too faint to be part of the object
                    if background != 230 or over != (255, 255, 255):
                        result = check(edited(image, left, over), prompt)
                        assert not result.strict and result.graded < 1


@pytest.mark.parametrize(
    "nearest, colour",  # purple, orange, black, cyan
    [("blue", (150, 40, 200)), ("yellow", (240, 130, 30)), ("green", (0, 0, 0)), ("green", (40, 210, 200))],
)
def test_other_colours_have_no_name(nearest, colour):
    image = paint([(nearest, *FIRST[1:]), SECOND], 128)
    # all but its edge
    mask = (abs(np.asarray(image, int) - COLOURS[nearest]).max(-1) < 5) & (np.arange(32) < 16)
    prompt = prompt_of((nearest, "circle"), "left of", SECOND[:2])
    assert check(image, prompt).strict and not check(edited(image, mask, colour), prompt).strict


def test_ugly_objects_have_no_shape():
    cross = np.zeros((32, 32), bool)
    cross[15:17, 2:14] = cross[10:22, 7:9] = True  # thin, of the right colour
    result = check(edited(paint([SECOND], 128), cross, COLOURS["red"]), PROMPT)
    assert not result.strict and result.graded == pytest.approx(5 / 6)
    assert result.fit < check(paint([FIRST, SECOND], 128), PROMPT).fit - 0.1


@pytest.mark.parametrize("mode, colour", [("RGB", (0, 0, 0)), ("RGB", COLOURS["red"]), ("L", 200)])
def test_a_blank_image_gives_nothing(mode, colour):
    result = check(Image.new(mode, (32, 32), colour), PROMPT)
    assert result.strict is False and result.graded == 0 and result.fit == 0


# ---------------------------------------------------------------- distortions


def noisy(image):
    rng = np.random.default_rng(int(np.asarray(image, int).sum()))
    pixels = np.asarray(image, float) + rng.normal(0, 10, (32, 32, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).round().astype(np.uint8))


def jpeg(image):
    buffer = io.BytesIO()
    # default 4:2:0 chroma blurs corners: 95 % remain right
    image.save(buffer, "JPEG", quality=90, subsampling=0)
    return Image.open(buffer)


DISTORTIONS = {
    "noise": noisy,
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(0.7)),
    "jpeg": jpeg,
    "256 px": lambda image: image.resize((256, 256)),
    "256 px, nearest": lambda image: image.resize((256, 256), Image.Resampling.NEAREST),
}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distortions_change_no_verdict(name):
    scenes = SCENES[::2]
    images = [DISTORTIONS[name](image) for image in rendered(scenes, 20)]
    right = [check(image, prompt_of(*scene)).strict for image, scene in zip(images, scenes)]
    assert np.mean(right) >= 0.97
    wrong = []
    for i, (image, scene) in enumerate(zip(images, scenes)):
        prompts = list(wrong_prompts(scene))
        # all kinds of errors in turn
        wrong += [check(image, prompts[j % len(prompts)]).strict for j in (i, i + 5)]
    assert np.mean(wrong) < 0.02


# ---------------------------------------------------------------- the embedded pipeline


@needs_pipeline
def test_pipeline_is_small():
    assert sum(file.stat().st_size for file in PIPELINE.rglob("*") if file.is_file()) <= 10e6


@needs_pipeline
def test_vae_keeps_rendered_scenes_right():
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKL.from_pretrained(PIPELINE / "vae", dtype=torch.float32)
    scenes = SCENES[::2]
    pixels = (
        torch.from_numpy(np.stack([np.asarray(i) for i in rendered(scenes, 30)])).permute(0, 3, 1, 2) / 127.5
        - 1
    )
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    assert latents.shape[1:] == (4, 8, 8) and 0.8 < latents.std() < 1.2  # what the noise schedule expects
    images = VaeImageProcessor().postprocess(decoded, output_type="pil")
    right = [check(image, prompt_of(*scene)).strict for image, scene in zip(images, scenes)]
    assert np.mean(right) >= 0.95


@needs_pipeline
def test_tokenizer_knows_the_world():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    words = {word for scene in SCENES for word in prompt_of(*scene).split()}
    assert len(words) == 13  # a, 4 colours, 3 shapes, left, right, of, above, below
    ids = {word: tokenizer(word).input_ids for word in words}
    assert all(len(i) == 3 for i in ids.values())  # start, the word, end
    assert len({i[1] for i in ids.values()}) == len(words)
    longest = tokenizer(PROMPT).input_ids
    assert longest == [ids["a"][0], *(ids[word][1] for word in PROMPT.split()), ids["a"][2]]
    assert len(longest) <= tokenizer.model_max_length
    strange = tokenizer("a pürple ☃ zebra", truncation=True, padding="max_length").input_ids
    assert len(strange) == tokenizer.model_max_length and max(strange) < len(tokenizer)
    assert strange[1] == ids["a"][1] and len(set(strange)) > 5  # the rest falls to bytes


# ---------------------------------------------------------------- decisions of the checker and the renderer


def test_pixels_that_touch_at_a_corner_are_two_objects():
    pixels = np.full((32, 32, 3), 128, np.uint8)
    pixels[6:12, 6:12] = COLOURS["red"]
    pixels[12:18, 12:18] = COLOURS["red"]
    assert len(find_objects(Image.fromarray(pixels))) == 2


def test_background_is_the_median_and_not_a_corner():
    image = paint([("red", "circle", 10, 16, 5.5), ("blue", "square", 23, 16, 5.5)], 200)
    pixels = np.asarray(image).copy()
    pixels[0, 0] = COLOURS["blue"]  # one wrong pixel
    objects = find_objects(Image.fromarray(pixels))
    assert sorted((o.colour, o.shape) for o in objects) == [("blue", "square"), ("red", "circle")]


def test_objects_come_largest_first():
    image = paint([("red", "circle", 9, 16, 3.5), ("blue", "circle", 22, 16, 7.0)], 200)
    assert [o.colour for o in find_objects(image)] == ["blue", "red"]
    many = [("red", "circle", x, y, 2.6) for x in (4, 10, 16, 22, 28) for y in (4, 28)]  # above the four read
    crowded = paint([*many, ("blue", "square", 10, 16, 4.5), ("green", "circle", 22, 16, 4.5)], 200)
    assert check(crowded, "a blue square left of a green circle").graded == 5 / 6  # all but the number


def test_an_object_is_not_its_own_partner():
    one = paint([("red", "circle", 16, 16, 5.5)], 200)
    assert check(one, "a red circle left of a red square").graded == 2 / 6


def test_half_extents_of_a_triangle():
    width, height = half_extent("triangle", 10.0)
    assert (width, height) == pytest.approx((11.26, 9.75))


def test_prompt_files_are_what_the_script_writes(monkeypatch, tmp_path):
    files = {name: tmp_path / f"{name}.txt" for name in render_module.PROMPT_FILES}
    stored = {name: path.read_bytes() for name, path in render_module.PROMPT_FILES.items()}
    monkeypatch.setattr(render_module, "PROMPT_FILES", files)
    render_module.write_prompts()
    assert {name: path.read_bytes() for name, path in files.items()} == stored
