"""The reward ocr: the distance of texts, what a prompt asks for, and reading rendered text with rapidocr."""

import functools
import importlib.util
import itertools
import json
import random
import socket
from types import SimpleNamespace

import pytest
from PIL import Image, ImageDraw, ImageFont

import rewards
from conftest import assert_one_line, run_inside
from rewards import Reward, edit_distance, ocr, target_text, text_score
from utils.prompts import Prompt, read_prompts
from utils.runs import InputError

needs_rapidocr = pytest.mark.skipif(not importlib.util.find_spec("rapidocr"), reason="needs rapidocr")


def render(text, size=256, letters=40, ground="white", ink="black"):
    image = Image.new("RGB", (size, size), ground)
    font = ImageFont.load_default(letters)
    ImageDraw.Draw(image).text((size // 20, size // 3), text, fill=ink, font=font)
    return image


# ---------------------------------------------------------------- the score


@functools.cache
def recursive(a, b):
    """The definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(recursive(a[1:], b) + 1, recursive(a, b[1:]) + 1, recursive(a[1:], b[1:]) + (a[0] != b[0]))


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("flaw", "lawn") == 2
    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]
    draw = random.Random(0)
    words += ["".join(draw.choices("abc", k=draw.randrange(7))) for _ in range(20)]
    for a in words:
        for b in words:
            assert edit_distance(a, b) == recursive(a, b), (a, b)


@pytest.mark.parametrize(
    "seen, wanted, score",
    [
        ("hello", "hello", 1),
        ("say hello to all".replace(" ", ""), "hello", 1),  # more around it costs nothing
        ("", "hello", 0),
        ("hallo", "hello", 4 / 5),
        ("helo", "hello", 4 / 5),
        ("xyz", "hello", 0),
        ("a long text without it".replace(" ", ""), "hello", 0),  # a distance above the length counts as it
        ("h", "hello", 1 / 5),
        ("grüße", "grüsse", 4 / 6),
    ],
)
def test_text_score(seen, wanted, score):
    assert text_score(seen, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    "prompt, row, text",
    [
        ('a sign that says "Hello World"', {}, "helloworld"),
        ('"One" and "Two"', {}, "one"),
        ("a sign that says “Hello World”", {}, "helloworld"),
        ('a sign that says "Hello World"', {"target": "Other  TEXT\n"}, "othertext"),
        ("a sign", {"target": 42}, "42"),
        ('a sign "Yes"', {"target": ""}, "yes"),
        ('a sign "Yes"', {"target": None}, "yes"),
        ("a sign", {}, ""),
        ('6" of snow', {}, ""),
        ('"" and "x"', {}, "x"),
        ("it's a dog's", {}, ""),
    ],
)
def test_target_text(prompt, row, text):
    assert target_text(Prompt(prompt, row)) == text
    if not row:
        assert target_text(prompt) == text


# ---------------------------------------------------------------- what is refused


def test_missing_packages(monkeypatch):
    for name in rewards.OCR_PACKAGES:
        monkeypatch.setattr(rewards, "OCR_PACKAGES", ("json", f"no_{name}"))
        with pytest.raises(InputError) as error:
            Reward("0.5*ocr+shapes_fit", "--eval_rewards")
        words = f"--eval_rewards 0.5*ocr+shapes_fit: needs the package no_{name}; pip install json no_{name}"
        assert str(error.value) == words
    Reward("shapes_fit")


@needs_rapidocr
def test_prompts_without_a_text(tiny_arguments, tmp_path, monkeypatch):
    reward = Reward("ocr", "--eval_rewards")
    reward.check_prompts(['a sign "yes"', Prompt("a sign", {"target": "yes"})], "--prompts")
    with pytest.raises(InputError) as error:
        reward.check_prompts(['a sign "yes"', "a sign"], "--prompts")
    assert str(error.value).startswith("--prompts: 'a sign' has no text for --eval_rewards ocr; put it in")
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, "--reward", "ocr"])
    assert_one_line(code, error, "has no text for --reward ocr; put it in quotation marks, or into a column")


# ---------------------------------------------------------------- reading


@needs_rapidocr
def test_rendered_text(capfd, monkeypatch):
    """Without a network, and without a word on the terminal."""

    def refuse(*_):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    rewards.text_reader.cache_clear()
    images = [
        render("Hello World"),
        render("HELLO\nWORLD", 320, 60, "navy", "yellow"),
        render("World Hello"),
        render("Hello Wurld"),
        Image.new("RGB", (256, 256), "grey"),
        render("helloworld").convert("L"),
        render("Hello World").resize((512, 256)),
    ]
    prompts = ['a wall with "Hello World" on it'] * len(images)
    values = Reward("ocr")(images, prompts).tolist()
    assert values == pytest.approx([1, 1, 0.2, 0.9, 0, 1, 1])
    assert Reward("ocr")(images[:1], [Prompt("a wall", {"target": "hello worm"})]).item() == pytest.approx(
        text_score("helloworld", "helloworm")
    )
    assert capfd.readouterr() == ("", "")


@needs_rapidocr
def test_in_a_run(tiny_arguments, tmp_path, monkeypatch):
    """As a reward that is reported, of prompts with a column `target`."""
    shapes = ["a red circle left of a blue square", "a green square above a red circle"]
    rows = [{"prompt": p, "target": "stop"} for p in shapes]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [target_text(p) for p in read_prompts(str(tmp_path / "prompts.jsonl"), "")] == ["stop"] * 2
    monkeypatch.chdir(tmp_path)
    flags = "--prompts prompts.jsonl --eval_prompts prompts.jsonl --rounds 1 --eval_rewards ocr".split()
    code, out, error = run_inside([*tiny_arguments, *flags, "--output", "run"])
    assert code == 0 and "ocr" in out, error
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    (row,) = [row for row in table if row["metric"] == "ocr"]
    assert 0 <= row["tuned"] <= 1


def test_the_reader_gets_blue_first(monkeypatch):
    """As OpenCV has it, with which the reader was trained."""
    seen = []
    monkeypatch.setattr("rewards.text_reader", lambda: lambda p: seen.append(p) or SimpleNamespace(txts=None))
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    assert ocr([image], ['"A"']).tolist() == [0.0]  # nothing was read
    assert seen[0].shape == (2, 3, 3) and seen[0][1, 2].tolist() == [30, 20, 10]
