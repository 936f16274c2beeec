"""layouts/train.py and layouts/pdf.py: data, the split, augmentation, training by hand, a whole training."""

import sys

import numpy as np
import pytest
import torch

from conftest import assert_one_line, run_inside
from layouts import train
from layouts.judge import FeatureNet, alignment, overlap
from layouts.model import BOXES, Model, boxes_of, counts_of, page_of
from layouts.pdf import OTHER, TEXT, TITLE, blocks_of, class_of, join
from layouts.pgraft_layouts import denoising_loss
from utils.runs import InputError

SIZES = {"width": 8, "pair_width": 4, "heads": 2, "layers": 1}


def some_pages(n=60, manuals=12):
    """What read_manuals returns, of columns of boxes."""
    rng = np.random.default_rng(0)
    boxes, kind = np.zeros((n, BOXES, 4)), np.full((n, BOXES), -1, np.int8)
    for i in range(n):
        for j in range(rng.integers(3, 9)):
            boxes[i, j] = 0.5, 0.1 + 0.1 * j, 0.6, 0.05 + 0.03 * rng.random()
            kind[i, j] = rng.integers(5)
    boxes = np.rint(65535 * boxes).astype(np.uint16)
    return {"boxes": boxes, "kind": kind, "group": np.arange(n, dtype=np.int32) % manuals}


@pytest.fixture
def manuals(tmp_path, monkeypatch):
    """A folder of files that pretend to be manuals of two pages each, one of which all have."""
    for name in ("b.pdf", "deep/a.pdf", "c.txt"):
        (tmp_path / "manuals" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "manuals" / name).write_text("")
    monkeypatch.chdir(tmp_path)

    def read_document(file, seed):
        own = np.array([[0.5, 0.3 + 0.1 * seed, 0.5, 0.1], [1.02, 0.8, 0.2, 0.1]])
        return [(0, own, [1, 3]), (1, np.array([[0.5, 0.5, 0.2, 0.2]]), [0])]

    monkeypatch.setattr("layouts.pdf.read_document", read_document)
    return tmp_path


def test_manuals_are_read_once(manuals, monkeypatch):
    data = train.load_data(manuals / "new" / "layouts.npz", str(manuals / "manuals"))
    assert data["group"].tolist() == [0, 0, 1] and data["boxes"].dtype == np.uint16  # equal pages count once
    assert data["kind"][0].tolist() == [1, 3] + [-1] * 10 and data["kind"][1].tolist() == [0] + [-1] * 11
    assert data["boxes"][0, 1].tolist() == [65535, 52428, 13107, 6554] and not data["boxes"][0, 2:].any()
    monkeypatch.setattr(train, "read_manuals", lambda folder: pytest.fail("read again"))
    assert len(train.load_data(manuals / "new" / "layouts.npz", "")["kind"]) == 3
    (manuals / "new" / "layouts.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="--data .*layouts.npz: is damaged .*; remove it"):
        train.load_data(manuals / "new" / "layouts.npz", "")


def test_missing_manuals(manuals, monkeypatch):
    with pytest.raises(InputError, match="--pdfs none: no PDF files there; layouts/README.md names"):
        train.read_manuals("none")
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pymupdf", None)  # as if it were not installed
    with pytest.raises(InputError, match="pip install pymupdf, or give --data"):
        train.read_manuals(str(manuals / "manuals"))


def test_whole_manuals_are_held_out():
    data = some_pages()
    rows, held_out = train.split(data, 0)
    assert sorted([*rows, *held_out]) == list(range(60)) and len(held_out) == 10
    assert not set(data["group"][rows]) & set(data["group"][held_out])
    assert list(held_out) != sorted(held_out)


def test_pages_are_moved_as_a_whole():
    data = some_pages(20)
    boxes, kind = torch.from_numpy(data["boxes"] / np.float32(65535)), torch.from_numpy(data["kind"]).long()
    x_0, counts = page_of(boxes, kind), counts_of(kind)
    change = 2 * torch.rand(20, 4) - 1
    places, kinds = boxes_of(train.shaken(x_0, counts, change), counts)
    scale = 1 + train.STRETCH * change[:, None, :2]
    expected = (boxes[..., :2] - 0.5) * scale + 0.5 + train.SHIFT * change[:, None, 2:]
    assert torch.equal(kinds, kind)
    assert torch.allclose(places[..., :2], expected * (kind >= 0).unsqueeze(2), atol=1e-5)
    assert torch.allclose(places[..., 2:], boxes[..., 2:] * scale, atol=1e-5)
    for measure in (alignment, overlap):
        assert torch.allclose(measure(places, kinds), measure(boxes, kind), atol=0.02)


def test_learning_rate():
    rates = [train.learning_rate(i, 10_000, 2.0) for i in range(10_000)]
    assert rates[0] == 0.004 and max(rates) == 2.0 == rates[500] and rates[5250] == pytest.approx(1.0)
    assert 0 < rates[-1] < 1e-4


def test_training_by_hand():
    """Two updates of AdamW, and the average of the weights after them."""
    data = some_pages()
    boxes, kind = torch.from_numpy(data["boxes"] / np.float32(65535)), torch.from_numpy(data["kind"]).long()
    x_0, counts = page_of(boxes, kind), counts_of(kind)
    args = train.Args(updates=2, batch=5, lr=1e-2, device="cpu", ema=0.9)
    model, plain = (Model.new(SIZES, "cpu") for _ in range(2))
    plain.network.load_state_dict(model.network.state_dict())
    train.train(model, x_0, counts, args)
    parameters = [p.requires_grad_() for p in plain.network.parameters()]
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    torch.manual_seed(train.derived_seed(0, "train"))
    for update, rate in enumerate((1e-2, 0.5e-2)):  # of two updates none is for the warm-up
        index = torch.randint(60, (5,))
        pages = train.shaken(x_0[index], counts[index], 2 * torch.rand(5, 4) - 1)
        noise, level = torch.randn(pages.shape), (1 - torch.rand(5)) ** 1.5
        seen = (torch.rand(5) >= 0.1).float()
        loss = denoising_loss(plain, pages, (1.0, 0.0), counts[index], level, noise, seen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (update + 1) / (update + 10))
        averaged = [decay * a + (1 - decay) * p.detach() for a, p in zip(averaged, parameters)]
    for mine, theirs in zip(averaged, model.network.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


TINY = "--data layouts.npz --updates 5 --batch 4 --width 8 --pair_width 4 --heads 2 --layers 1 --check 6"
TINY += " --steps 3 --feature_updates 3 --device cpu"


def test_a_whole_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = some_pages()
    (tmp_path / "layouts.npz").write_bytes(train.npz(**data))
    argv = [*TINY.split(), "--out", "new"]
    code, out, error = run_inside(argv, "layouts/train.py")
    assert code == 0, error
    assert "50 pages to train on, 10 held out" in out and "sampled: alignment" in out and "held out: " in out
    model = Model.load("new/base.safetensors", "cpu")
    assert model.sizes == SIZES and model.switch == 0
    rows, held_out = train.split(data, 0)
    with np.load("new/pages.npz") as file:
        assert np.array_equal(file["boxes"], data["boxes"][held_out])
        assert np.array_equal(file["kind"], data["kind"][held_out])
        assert np.array_equal(file["counts"], counts_of(torch.from_numpy(data["kind"][rows]).long()))
    net = FeatureNet.load(tmp_path / "new" / "features.safetensors")
    assert net(torch.rand(2, BOXES, 4), torch.ones(2, BOXES).long()).shape == (2, 64)
    assert_one_line(*run_inside(argv, "layouts/train.py")[::2], "new/base.safetensors exists")
    code, _, error = run_inside([*TINY.split(), "--batch", "0"], "layouts/train.py")
    assert_one_line(code, error, "--batch 0: must be between")
    code, _, error = run_inside([*TINY.split(), "--heads", "3"], "layouts/train.py")
    assert_one_line(code, error, "--heads 3: must divide --width 8")


# ---------------------------------------------------------------- from lines to blocks


def line(text, left, top, right, size=10.0, bold=0.0, mono=0.0):
    box = (left, top, right, top + size)
    return {"box": box, "size": size, "text": text, "length": len(text), "bold": bold, "mono": mono}


def test_classes_of_lines():
    for kind, one in (
        (TITLE, line("1 Introduction", 100, 200, 200, size=14)),
        (TITLE, line("Options", 100, 200, 150, bold=1.0)),
        (TEXT, line("The package does this.", 100, 200, 400)),
        (OTHER, line("\\usepackage{this}", 100, 200, 300, mono=1.0)),
        (OTHER, line("Figure 3: A tree", 100, 200, 300)),
        (OTHER, line("12", 290, 780, 300)),
        (OTHER, line("The manual", 290, 20, 350)),
    ):
        assert class_of(one, 10.0, 842.0) == kind, one["text"]


def test_lines_become_blocks():
    lines = [line("Title", 100, 100, 200, size=14)] + [
        line("A text.", 100, 130 + 12 * i, 400) for i in range(3)
    ]
    lines += [line("Another paragraph.", 100, 200, 400)]
    assert blocks_of(lines, 10.0, 842.0) == [
        [TITLE, (100, 100, 200, 114)], [TEXT, (100, 130, 400, 164)], [TEXT, (100, 200, 400, 210)]
    ]  # fmt: skip
    parts = join(
        [line("left", 100, 130, 150), line("and right", 152, 130, 200), line("apart", 300, 130, 340)]
    )
    assert [(part["text"], part["box"]) for part in parts] == [
        ("left and right", (100, 130, 200, 140)), ("apart", (300, 130, 340, 140))
    ]  # fmt: skip
