"""The built-in rewards, the --reward language and the statistics reported beside every reward."""

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import REWARDS, Reward, as_numbers, diversity, image_statistics, read_rewards, split
from shapes.render import paint
from utils.runs import InputError

PROMPT = "a red circle left of a blue square"
RIGHT = paint([("red", "circle", 8.0, 16.0, 5.4), ("blue", "square", 24.0, 16.0, 5.4)], 128)
MISPLACED = paint([("red", "circle", 24.0, 16.0, 5.4), ("blue", "square", 8.0, 16.0, 5.4)], 128)
GREY = Image.new("RGB", (32, 32), (128, 128, 128))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
IMAGES = [RIGHT, MISPLACED, GREY, NOISE]
PROMPTS = [PROMPT] * 4


def user_file(folder, body, name="own.py"):
    """A reward file whose function `score` has the given body; the spec of that function."""
    (folder / name).write_text(
        f"import numpy as np\nimport torch\n\ndef score(images, prompts):\n    {body}\n"
    )
    return f"{folder / name}:score"


# ---------------------------------------------------------------- built-in rewards


def test_every_reward_is_a_float_tensor():
    assert len(REWARDS) == 6
    for name, reward in REWARDS.items():
        if name == "ocr":  # tests/test_ocr.py
            continue
        values = reward(IMAGES, PROMPTS)
        assert values.shape == (4,) and values.dtype == torch.float32 and values.isfinite().all(), name
        assert torch.equal(values.flip(0), reward(IMAGES[::-1], PROMPTS))  # each image on its own


def test_shapes_rewards():
    assert REWARDS["shapes_strict"](IMAGES, PROMPTS).tolist() == [1, 0, 0, 0]
    graded = REWARDS["shapes_graded"](IMAGES, PROMPTS)
    assert graded[:3].tolist() == pytest.approx([1, 5 / 6, 0]) and 0 <= graded[3] < 5 / 6
    fit = REWARDS["shapes_fit"](IMAGES, PROMPTS)
    assert fit[0] > 0.95 and fit[1] > 0.95 and fit[2] == 0 and 0 <= fit[3] < 0.9
    swapped = ["a blue square left of a red circle"] * 4  # every image is judged by its own prompt
    assert REWARDS["shapes_strict"](IMAGES, [PROMPT, *swapped[1:]]).tolist() == [1, 1, 0, 0]
    assert torch.equal(REWARDS["shapes_fit"](IMAGES, swapped), fit)  # but this one by none


def test_jpeg_rewards():
    less, more = (
        REWARDS[f"jpeg_{name}"](IMAGES, PROMPTS) for name in ("compressibility", "incompressibility")
    )
    assert torch.equal(less, -more) and (more > 0).all()
    assert less[2] > less[0] > less[3]  # blank, two objects, noise
    assert 0.3 < more[2] < 1 < more[3] < 4  # kB, not bytes


# ---------------------------------------------------------------- the language of --reward


@pytest.mark.parametrize(
    "spec, weights",
    [
        ("shapes_graded", {"shapes_graded": 1}),
        ("0.7*shapes_graded+0.3*jpeg_compressibility", {"shapes_graded": 0.7, "jpeg_compressibility": 0.3}),
        ("  0.7*shapes_graded  +  shapes_fit ", {"shapes_graded": 0.7, "shapes_fit": 1}),
        ("shapes_strict+-0.5*shapes_fit", {"shapes_strict": 1, "shapes_fit": -0.5}),
        ("-2*jpeg_compressibility", {"jpeg_compressibility": -2}),
        ("0.5 * shapes_fit", {"shapes_fit": 0.5}),
        ("1e-2*shapes_fit+0.5*shapes_fit", {"shapes_fit": 0.51}),
    ],
)
def test_weighted_sum(spec, weights):
    reward = Reward(spec)
    assert reward.spec == spec
    by_hand = sum(weight * REWARDS[name](IMAGES, PROMPTS) for name, weight in weights.items())
    values = reward(IMAGES, PROMPTS)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, by_hand)


@pytest.mark.parametrize(
    "body",
    [
        "return [len(p) + i.width for i, p in zip(images, prompts)]",
        "return np.array([len(p) + i.width for i, p in zip(images, prompts)])",
        "return torch.tensor([float(len(p) + i.width) for i, p in zip(images, prompts)], requires_grad=True)",
    ],
)
def test_user_function(tmp_path, body):
    spec = user_file(tmp_path, body)
    images, prompts = [GREY, GREY.resize((8, 8))], ["ab", "abcd"]
    assert Reward(spec)(images, prompts).tolist() == [34, 12]
    mixed = Reward(f"0.5*{spec}+jpeg_incompressibility")(images, prompts)
    assert not mixed.requires_grad
    torch.testing.assert_close(
        mixed, torch.tensor([17.0, 6.0]) + REWARDS["jpeg_incompressibility"](images, prompts)
    )


def test_two_user_files_of_one_name(tmp_path):
    specs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        specs.append(user_file(tmp_path / name, f"return [{len(specs) + 1}.0] * len(images)"))
    assert Reward("+10*".join(specs))([GREY], [""]).tolist() == [21]


@pytest.mark.parametrize("name", ["c++", "a*b", "a,b", "a (b)", "plain"])
def test_parentheses_keep_a_path_together(tmp_path, name):
    (tmp_path / name).mkdir()
    spec = user_file(tmp_path / name, "return [3.0] * len(images)")
    reward, other = read_rewards(f"0.5*({spec})+2*jpeg_incompressibility", f"({spec}),shapes_fit")[:2]
    jpeg = REWARDS["jpeg_incompressibility"](IMAGES, PROMPTS)
    torch.testing.assert_close(reward(IMAGES, PROMPTS), 1.5 + 2 * jpeg)
    assert [part[1] for part in reward.parts] == [spec, "jpeg_incompressibility"]
    assert other(IMAGES, PROMPTS).tolist() == [3.0] * 4
    if name == "c++":
        with pytest.raises(InputError, match="in parentheses"):
            Reward(spec)


@pytest.mark.parametrize(
    "spec, culprit",
    [
        ("beauty", "'beauty'"),
        ("clip(a/b", "'clip(a/b'"),
        ("clip)", "'clip)'"),
        ("clip()", "''"),
        ("2*3*shapes_fit", "'2*3*shapes_fit'"),
        ("", "''"),
        ("shapes_fit+", "''"),
        ("shapes_fit+sharpness", "'sharpness'"),
        ("much*shapes_fit", "'much*shapes_fit'"),
        ("nan*shapes_fit", "'nan*shapes_fit'"),
        ("*shapes_fit", "shapes_fit"),
        ("absent/file.py:score", "no file absent/file.py"),
        ("own.py", "path/to/file.py:function"),  # without a function
    ],
)
def test_bad_specs(spec, culprit):
    for flag in ("--reward", "--eval_rewards"):
        with pytest.raises(InputError) as error:
            Reward(spec, flag)
        assert str(error.value).startswith(f"{flag} {spec}:") and culprit in str(error.value)


@pytest.mark.parametrize(
    "text, culprit",
    [
        ("def other(images, prompts):\n    return [0]\n", "no function 'score'"),
        ("score = 3\n", "no function 'score'"),
        ("def score(:\n", "SyntaxError"),
        ("import absent_module\n", "absent_module"),
        ("raise RuntimeError('no weights')\n", "no weights"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    ],
)
def test_bad_user_files(tmp_path, text, culprit):
    file = tmp_path / "own.py"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        Reward(f"{file}:score", "--eval_rewards")
    assert str(error.value).startswith(f"--eval_rewards {file}:score:") and culprit in str(error.value)


@pytest.mark.parametrize(
    "body, culprit",
    [
        ("return [1.0]", "(1,)"),
        ("return 1.0", "()"),
        ("return np.zeros((len(images), 1))", "(2, 1)"),
        ("return [0.0, float('nan')]", "nan"),
        ("return [0.0, float('inf')]", "inf"),
        ("return torch.tensor([0.0, -float('inf')])", "-inf"),
    ],
)
def test_bad_results(tmp_path, body, culprit):
    spec = user_file(tmp_path, body)
    with pytest.raises(InputError) as error:
        Reward(f"shapes_fit+2*{spec}")([RIGHT, RIGHT], [PROMPT, PROMPT.replace("red", "green")])
    message = str(error.value)
    assert spec in message and culprit in message
    # the prompt of the bad image, or the first where there is none such
    assert (PROMPT.replace("red", "green") if "inf" in culprit or "nan" in culprit else PROMPT) in message


@pytest.mark.parametrize(
    "body, culprit",
    [
        ("raise KeyError('embedding')", "KeyError: 'embedding'"),
        ("return None", "returned None; a reward returns a number for each image"),
        ("return ['good'] * len(images)", "returned a list of str; a reward returns a number"),
    ],
)
def test_failing_user_function(tmp_path, body, culprit):
    spec = user_file(tmp_path, body)
    with pytest.raises(InputError) as error:
        Reward(spec)([GREY], [PROMPT])
    assert f"reward {spec}: " in str(error.value) and culprit in str(error.value)


def test_check_prompts(tmp_path):
    good, bad = [PROMPT, PROMPT.replace("left of", "above")], "a cat on a mat"
    for spec in ("shapes_strict", "jpeg_compressibility+0.1*shapes_fit"):
        Reward(spec).check_prompts(good, "--prompts")
        with pytest.raises(InputError, match=f"^--eval_prompts: '{bad}'"):
            Reward(spec).check_prompts([*good, bad], "--eval_prompts")
    others = f"jpeg_compressibility+{user_file(tmp_path, 'return [0.0] * len(images)')}"
    Reward(others).check_prompts([bad], "--prompts")  # for these any prompt will do


# ---------------------------------------------------------------- statistics


def test_image_statistics():
    half = np.zeros((16, 16, 3), np.uint8)
    half[:, 8:] = 255
    cases = {
        "black": (Image.new("RGB", (16, 16)), 0, 0, 0),
        "white": (Image.new("RGB", (16, 16), "white"), 1, 0, 0),
        "red": (Image.new("RGB", (16, 16), (255, 0, 0)), 0.299, 0, 1),  # luma of ITU-R 601
        "half": (Image.fromarray(half), 0.5, 0.5, 0),
        "pale": (Image.new("RGB", (16, 16), (255, 128, 128)), 0.651, 0, 0.498),
        "grey mode": (Image.new("L", (16, 16), 51), 0.2, 0, 0),
    }
    images = [image for image, *_ in cases.values()]
    statistics = image_statistics(images)
    for column, name in enumerate(("brightness", "contrast", "saturation"), 1):
        assert statistics[name].dtype == torch.float32
        expected = [values[column] for values in cases.values()]
        assert statistics.pop(name).tolist() == pytest.approx(expected, abs=0.003)
    assert torch.equal(
        statistics.pop("jpeg_kb"), REWARDS["jpeg_incompressibility"](images, [""] * len(images))
    )
    assert not statistics


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (200, 100)])
def test_diversity(size):
    black, white = Image.new("RGB", size), Image.new("RGB", size, "white")
    red = Image.new("RGB", size, (255, 0, 0))
    assert diversity([black]) == 0 and diversity([RIGHT] * 3) == 0
    assert diversity([black, white]) == pytest.approx(1)
    assert diversity([black, red]) == pytest.approx((1 / 3) ** 0.5)  # one channel of three
    assert diversity([black, black, white]) == pytest.approx(2 / 3)  # pairs 0, 1, 1


def test_files_that_a_reward_reads(tmp_path):
    """They are hashed into the run: its code and checkpoints on the disk, not those of the hub."""
    (tmp_path / "own.py").write_text("def score(images, prompts):\n    return [0.0 for _ in images]\n")
    (tmp_path / "model").mkdir()
    reward = Reward(f"{tmp_path}/own.py:score+clip({tmp_path}/model)+pickscore+aesthetic(some/checkpoint)")
    assert reward.files() == [f"{tmp_path}/own.py", f"{tmp_path}/model"]


def test_scores_are_a_copy():
    """A reward may write into its own tensor or array later."""
    tensor, array = torch.ones(2), np.ones(2, np.float32)
    scores = [as_numbers("own", values) for values in (tensor, array)]
    tensor += 1
    array += 1
    assert all(values.tolist() == [1, 1] for values in scores)


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("a+b", ["a", "b"]),
        ("(a+b)+c", ["(a+b)", "c"]),
        (" f(a+(b+c)) + d ", ["f(a+(b+c))", "d"]),
        ("a)+b", ["a)", "b"]),  # closes nothing
        ("(a+b", ["(a+b"]),
        ("", [""]),
    ],
)
def test_pieces_between_separators(text, pieces):
    assert split(text, "+") == pieces


def test_rewards_of_a_run():
    """The one that is optimised comes first and is not scored twice."""
    given = "shapes_fit, jpeg_compressibility,,2*shapes_fit"
    assert [r.spec for r in read_rewards("jpeg_compressibility", given)] == [
        "jpeg_compressibility",
        "shapes_fit",
        "2*shapes_fit",
    ]


def test_diversity_of_images_that_are_not_square():
    """As many pixels as they have, up to 64 a side."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 2, 3), np.uint8)
    rms = np.sqrt(((pixels[0] / 255 - pixels[1] / 255) ** 2).mean())
    assert diversity([Image.fromarray(p) for p in pixels]) == pytest.approx(rms, rel=1e-5)


@pytest.mark.parametrize("weight", ["inf", "-inf", "nan", "x", ""])
def test_weights_that_are_no_numbers(weight):
    with pytest.raises(InputError, match="--reward .*: the weight in .* is not a number"):
        Reward(f"shapes_fit+{weight}*jpeg_compressibility")
