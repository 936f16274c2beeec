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


# ---------------------------------------------------------------- the limits of the checker


def with_blob(colour, rows=slice(8, 20), columns=slice(8, 20), background=128):
    """A plain image with a rectangle, as numbers (32, 32, 3)."""
    pixels = np.full((32, 32, 3), background, np.uint8)
    pixels[rows, columns] = colour
    return pixels


def found_in(pixels):
    return find_objects(Image.fromarray(pixels))


def test_least_contrast():
    """A pixel of an object differs by more than 40 in one channel, up or down."""
    for channel in range(3):
        for sign in (1, -1):
            for step, count in ((40, 0), (41, 1)):
                colour = np.full(3, 128)
                colour[channel] += sign * step
                assert len(found_in(with_blob(colour))) == count


def test_least_size():
    red = COLOURS["red"]
    assert len(found_in(with_blob(red, slice(8, 11), slice(8, 12)))) == 1  # 12 pixels
    pixels = with_blob(red, slice(8, 11), slice(8, 12))
    pixels[8, 8] = 128
    assert found_in(pixels) == []


def test_objects_that_touch_at_a_corner_are_two():
    for corner in (slice(12, 16), slice(4, 8)):
        pixels = with_blob(COLOURS["red"], slice(8, 12), slice(8, 12))
        pixels[corner, 12:16] = COLOURS["red"]
        assert len(found_in(pixels)) == 2


def test_winding_objects_are_one():
    for turns in range(4):
        pixels = with_blob(128)
        for row in range(4, 28, 4):  # a snake: right, down, left, down
            pixels[row, 4:28] = COLOURS["blue"]
            pixels[row : row + 5, 4 if row % 8 else 27] = COLOURS["blue"]
        pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        assert len(found_in(pixels)) == 1


def test_background_is_the_median():
    """Of each channel: neither the mean nor a corner."""
    pixels = with_blob(COLOURS["yellow"], background=100)
    pixels[:8] = 130  # a quarter of the image, within the contrast of 100
    (found,) = found_in(pixels)
    assert (found.colour, found.shape) == ("yellow", "square")
    assert len(found_in(with_blob((255, 255, 255), slice(0, 14), slice(0, 32), 64))) == 1


def test_largest_distance_from_a_colour():
    """60 of the median from the named colour."""
    for colour, channel, sign in (("red", 0, -1), ("green", 2, -1), ("blue", 1, -1), ("yellow", 2, 1)):
        for step, name in ((60, colour), (61, None)):
            value = np.array(COLOURS[colour])
            value[channel] += sign * step
            (found,) = found_in(with_blob(value, background=240 if colour != "yellow" else 64))
            assert found.colour == name


def test_largest_distance_of_a_pixel_and_least_share():
    """80 of the pixels in the core from the named colour, for 80 % of them. The core has 10 x 10 pixels."""
    red = np.array(COLOURS["red"])
    for step, share, name in ((80, 25, "red"), (81, 25, None), (81, 20, "red"), (81, 21, None)):
        pixels = with_blob(red)
        for n in range(share):
            pixels[9 + n // 10, 9 + n % 10] = red - (step, 0, 0)
        (found,) = found_in(pixels)
        assert found.colour == name, (step, share)
    pixels = with_blob(red)
    pixels[8, 8:20] = pixels[19, 8:20] = pixels[8:20, 8] = pixels[8:20, 19] = (
        40,
        40,
        40,
    )  # the rim is not core
    assert found_in(pixels)[0].colour == "red"


def test_colour_is_the_median_of_the_core():
    """Not the mean. And of an object without a core, of all its pixels."""
    pixels = with_blob(COLOURS["green"])
    pixels[9:11, 9:19] = (255, 0, 255)  # 20 of the 100 pixels of the core: the mean is 62 from green
    assert found_in(pixels)[0].colour == "green"
    assert found_in(with_blob(COLOURS["blue"], slice(8, 10), slice(8, 16)))[0].colour == "blue"


def test_least_overlap():
    """A shape has a name from 0.7 on. Rectangles from square to long."""
    overlaps = []
    for height in range(4, 15):
        for width in range(height, 28):
            found = found_in(with_blob(COLOURS["red"], slice(2, 2 + height), slice(2, 2 + width)))[0]
            assert (found.shape is None) == (found.fit < 0.7)
            overlaps.append(found.fit)
    assert any(0.7 <= o < 0.72 for o in overlaps) and any(0.68 < o < 0.7 for o in overlaps)


def test_overlap_of_a_square_that_is_not_one():
    """Of a rectangle with a square of its area and centre, written out: intersection over union."""
    for height, width in ((8, 12), (12, 8), (10, 12)):
        found = found_in(with_blob(COLOURS["red"], slice(8, 8 + height), slice(8, 8 + width)))[0]
        assert (found.x, found.y) == pytest.approx((8 + width / 2, 8 + height / 2), abs=1e-6)
        side = (height * width) ** 0.5
        common = min(side, height) * min(side, width)
        assert found.fit == pytest.approx(common / (2 * height * width - common), abs=0.03)


def test_objects_beside_each_other_keep_to_themselves():
    """An object's outline takes no pixels of another of the same colour, but half a pixel around itself."""
    one, two = ("red", "circle", 8.3, 16.0, 5.4), ("red", "triangle", 22.6, 15.5, 5.4)
    alone = [find_objects(paint([each], 128))[0] for each in (one, two)]
    both = sorted(find_objects(paint([one, two], 128)), key=lambda found: found.x)
    assert [(f.colour, f.shape) for f in both] == [("red", "circle"), ("red", "triangle")]
    for found, single in zip(both, alone):
        assert (found.x, found.y, found.fit) == pytest.approx((single.x, single.y, single.fit), abs=1e-9)
    # places between pixels are read from the partly covered ones
    assert (both[0].x, both[0].y) == pytest.approx((8.3, 16.0), abs=0.05)
    # a triangle's centre of gravity is below the middle of its box
    assert (both[1].x, both[1].y) == pytest.approx((22.6, 15.5 + 0.975 / 3 * 5.4), abs=0.1)


def test_largest_first():
    radii = {4.0: "red", 6.0: "blue", 5.0: "green"}
    places = [(6.0, 6.0), (22.0, 8.0), (10.0, 24.0)]
    objects = [(colour, "circle", *at, radius) for (radius, colour), at in zip(radii.items(), places)]
    assert [found.colour for found in find_objects(paint(objects, 200))] == ["blue", "green", "red"]


def test_the_four_largest_objects_are_read():
    """A scene of the third and the fourth counts; one that needs the fifth does not."""
    first, second = ("red", "circle", 5.0, 27.0, 4.0), ("blue", "square", 27.0, 27.0, 3.8)
    larger = [("yellow", "triangle", x, 6.0, 5.0) for x in (7.0, 25.0)]
    image = paint([*larger, first, second], 128)
    assert len(find_objects(image)) == 4
    assert (
        check(image, PROMPT).graded == 5 / 6
        and check(image, "a blue square right of a red circle").graded == 5 / 6
    )
    further = ("yellow", "triangle", 16.0, 26.0, 4.6)
    image = paint([*larger, further, first, second], 128)
    assert len(find_objects(image)) == 5 and check(image, PROMPT).graded < 5 / 6


def test_fit_is_the_mean_over_all_objects():
    objects = [FIRST, SECOND, ("green", "triangle", 16.0, 5.0, 4.0)]
    for count in (1, 2, 3):
        image = paint(objects[:count], 128)
        fits = [found.fit for found in find_objects(image)]
        assert len(fits) == count and check(image, PROMPT).fit == pytest.approx(np.mean(fits), abs=1e-12)
    assert len({round(fit, 6) for fit in fits}) == 3


def test_relation_needs_more_along_than_across():
    """Just flatter than the diagonal is beside, just steeper is above."""
    for dy, relation in ((11.0, "left of"), (13.0, "above")):
        image = paint([("red", "circle", 9.0, 9.0, 5.0), ("blue", "circle", 21.0, 9.0 + dy, 5.0)], 128)
        right = [r for r in RELATIONS if check(image, f"a red circle {r} a blue circle").strict]
        assert right == [relation]


def test_one_object_is_read_as_either():
    for prompt in (PROMPT, "a blue square left of a red circle"):
        assert check(paint([FIRST], 128), prompt).graded == pytest.approx(2 / 6)
        assert check(paint([SECOND], 128), prompt).graded == pytest.approx(2 / 6)
    # an object is not both of the scene
    assert check(paint([FIRST], 128), "a red circle left of a red circle").graded == pytest.approx(2 / 6)


def test_pixels_are_measured_from_the_named_colour():
    """Not from the object's own."""
    red = np.array(COLOURS["red"])
    for step, name in ((80, "red"), (81, None)):
        pixels = with_blob(red - (50, 0, 0), background=240)
        pixels[9:12, 9:19] = red - (step, 0, 0)  # 30 of 100 pixels, at most 31 from the median
        assert found_in(pixels)[0].colour == name


def test_an_off_colour_takes_nothing_from_the_outline():
    """A pixel counts by its share of the object's own colour."""
    pure = found_in(with_blob(COLOURS["red"], background=240))[0]
    for change in ((-50, 0, 0), (0, 50, 0), (20, -30, -30)):
        found = found_in(with_blob(np.array(COLOURS["red"]) + change, background=240))[0]
        assert (found.x, found.y, found.fit) == pytest.approx((pure.x, pure.y, pure.fit), abs=1e-9)


def test_faint_pixels_at_every_side_count():
    """A row beside the object that is a quarter covered, too faint to be of it, moves its centre."""
    for turns in range(4):
        pixels = with_blob((228, 128, 128))
        pixels[8:20, 20] = (153, 128, 128)  # 25 of 100
        (found,) = found_in(np.ascontiguousarray(np.rot90(pixels, turns)))
        moved = (144 * 14 + 3 * 20.5) / 147 - 14  # 144 whole pixels, 12 quarters
        # the middle of 8..20 is 14, turned about 16
        dx, dy = ((-2 + moved, -2), (-2, 2 - moved), (2 - moved, 2), (2, -2 + moved))[turns]
        assert (found.x, found.y) == pytest.approx((16 + dx, 16 + dy), abs=1e-6)


def test_shares_are_between_nothing_and_all():
    """Pixels stronger than the object's colour count once, those weaker than the ground not at all."""
    plain = found_in(with_blob((208, 128, 128)))[0]
    pixels = with_blob((208, 128, 128))
    pixels[10:12, 10:14] = (250, 128, 128)
    pixels[8:20, 20] = (98, 128, 128)
    (found,) = found_in(pixels)
    assert (found.x, found.y, found.fit) == pytest.approx((plain.x, plain.y, plain.fit), abs=1e-9)


def test_larger_images_are_averaged():
    pixels = np.full((64, 64, 3), 128, np.uint8)
    pixels[16:40, 16:40:2], pixels[16:40, 17:40:2] = 198, 58
    assert find_objects(Image.fromarray(pixels)) == []


def test_images_of_other_modes_and_sizes():
    image = paint([FIRST, SECOND], 128)
    for other in (image.convert("RGBA"), image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)):
        for size in (32, 64):
            assert check(other.resize((size, size), 0), PROMPT).strict
    assert check(Image.new("LA", (20, 40)), PROMPT).graded == 0


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


def test_background_is_the_median_and_not_a_corner():
    image = paint([("red", "circle", 10, 16, 5.5), ("blue", "square", 23, 16, 5.5)], 200)
    pixels = np.asarray(image).copy()
    pixels[0, 0] = COLOURS["blue"]  # one wrong pixel
    objects = find_objects(Image.fromarray(pixels))
    assert sorted((o.colour, o.shape) for o in objects) == [("blue", "square"), ("red", "circle")]


def test_half_extents_of_a_triangle():
    width, height = half_extent("triangle", 10.0)
    assert (width, height) == pytest.approx((11.26, 9.75))


def test_prompt_files_are_what_the_script_writes(monkeypatch, tmp_path):
    files = {name: tmp_path / f"{name}.txt" for name in render_module.PROMPT_FILES}
    stored = {name: path.read_bytes() for name, path in render_module.PROMPT_FILES.items()}
    monkeypatch.setattr(render_module, "PROMPT_FILES", files)
    render_module.write_prompts()
    assert {name: path.read_bytes() for name, path in files.items()} == stored
