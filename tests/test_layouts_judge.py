"""layouts/judge.py: alignment and overlap of known pages, features, disturbances, the Frechet distance."""

import math

import pytest
import torch

from layouts.judge import DISTURBANCES, FeatureNet, alignment, frechet_distance, overlap
from layouts.model import BOXES
from layouts.train import disturb


def page(*boxes):
    """(boxes (1, 12, 4), kind (1, 12)) of (class, left, top, right, bottom)."""
    places, kind = torch.zeros(1, BOXES, 4), torch.full((1, BOXES), -1)
    for i, (k, left, top, right, bottom) in enumerate(boxes):
        places[0, i] = torch.tensor([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])
        kind[0, i] = k
    return places, kind


GRID = [(1, 0.1 + 0.4 * i, 0.1 + 0.3 * j, 0.4 + 0.4 * i, 0.3 + 0.3 * j) for i in range(2) for j in range(3)]


def test_a_perfect_grid():
    assert alignment(*page(*GRID)).abs().max() < 1e-3 and overlap(*page(*GRID)).abs().max() < 1e-4


def test_an_empty_page():
    assert alignment(*page()).tolist() == [0] == overlap(*page()).tolist()


def test_one_box_is_aligned():
    assert alignment(*page(GRID[0])).tolist() == [0] == overlap(*page(GRID[0])).tolist()


def test_two_boxes_that_overlap():
    """A quarter of the one, half of the other: (0.25 + 0.5) / 2."""
    boxes = page((1, 0.0, 0.0, 0.4, 0.4), (2, 0.2, 0.2, 0.4, 0.6))
    assert overlap(*boxes).item() == pytest.approx(100 * (0.25 + 0.5) / 2, rel=1e-4)
    assert overlap(*page((1, 0, 0, 0.5, 0.5), (1, 0.5, 0, 1, 0.5))).abs().max() < 1e-4  # they touch
    inside = page((1, 0.0, 0.0, 1.0, 1.0), (2, 0.2, 0.2, 0.3, 0.3), (3, 0.5, 0.5, 0.5, 0.5))
    assert overlap(*inside).item() == pytest.approx(100 * (0.01 + 1) / 3, rel=1e-3)  # of no area: none


def test_alignment_by_hand():
    """The nearest edges: left and left 0.02 apart, for both boxes; a third one has 0.03 to the bottom."""
    boxes = page((1, 0.1, 0.1, 0.5, 0.2), (1, 0.12, 0.5, 0.9, 0.6))
    assert alignment(*boxes).item() == pytest.approx(-100 * math.log(1 - 0.02), rel=1e-3)
    boxes = page((1, 0.1, 0.1, 0.5, 0.2), (1, 0.12, 0.5, 0.9, 0.6), (1, 0.3, 0.47, 0.35, 0.63))
    expected = -100 * (2 * math.log(1 - 0.02) + 0) / 3
    boxes[0][0, 2] = torch.tensor([0.71, 0.59, 0.05, 0.08])  # bottom 0.63, 0.03 below the second's
    expected = -100 * (2 * math.log(1 - 0.02) + math.log(1 - 0.03)) / 3
    assert alignment(*boxes).item() == pytest.approx(expected, rel=1e-3)


def test_only_the_same_edges_are_compared():
    """The right edge of one at the left edge of the other is no alignment."""
    boxes = page((1, 0.1, 0.1, 0.3, 0.2), (1, 0.3, 0.45, 0.9, 0.8))
    assert alignment(*boxes).item() == pytest.approx(-100 * math.log(1 - 0.2), rel=1e-3)


def test_order_and_gaps_do_not_matter():
    boxes, kind = page(*GRID[:3], (0, 0.37, 0.21, 0.83, 0.55))
    order = torch.tensor([3, 7, 0, 2, 11, 1, 4, 5, 6, 8, 9, 10])
    filled = boxes + 0.3 * (kind < 0).unsqueeze(2)
    net = random_net()
    for function in (alignment, overlap, lambda b, k: net(b, k)[0]):
        value = function(boxes, kind)
        assert torch.allclose(function(boxes[:, order], kind[:, order]), value, atol=1e-4)
        assert torch.allclose(function(filled, kind), value, atol=1e-4)
        assert torch.allclose(function(boxes[:, :4], kind[:, :4]), value, atol=1e-4)


def random_net():
    torch.manual_seed(0)
    return FeatureNet().eval().requires_grad_(False)


def test_features_depend_on_places_and_classes():
    boxes, kind = page(*GRID[:4])
    net = random_net()
    assert net(boxes, kind).shape == (1, 64) and net.classify(boxes, kind).shape == (1, len(DISTURBANCES))
    other = kind.clone()
    other[0, 1] = 3
    assert (net(boxes, other) - net(boxes, kind)).abs().max() > 1e-3
    moved = boxes.clone()
    moved[0, 0, 0] += 0.01
    assert (net(moved, kind) - net(boxes, kind)).abs().max() > 1e-3


def test_disturbances():
    boxes, kind = (
        part.repeat(400, 1, 1)[:, :, :] if part.dim() == 3 else part.repeat(400, 1) for part in page(*GRID)
    )
    kind[:, :3] = 2
    boxes[::2, :6] += 0.001
    for which, name in enumerate(DISTURBANCES):
        new, kinds = disturb(boxes, kind, torch.full((400,), which), torch.Generator().manual_seed(1))
        changed = (new != boxes)[:, :6]
        assert not new[:, 6:].any() and torch.equal(kinds < 0, kind < 0)
        share = changed.any(2).float().mean().item()
        if name == "none":
            assert torch.equal(new, boxes) and torch.equal(kinds, kind)
        if name in ("moved", "resized"):
            assert changed[..., :2].any() == (name == "moved") and changed[..., 2:].any() == (
                name == "resized"
            )
            assert share == pytest.approx(0.35, abs=0.05) and torch.equal(kinds, kind)
        if name == "kinds":
            assert share == 0 and not torch.equal(kinds, kind)
            assert torch.equal(kinds.sort(1).values, kind.sort(1).values)
        if name == "swapped":
            assert 0.1 < share < 0.3 and torch.equal(kinds, kind)  # half of the pages are alike


def test_frechet_distance_of_normal_distributions():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(200_000, 2, generator=generator) * torch.tensor([1.0, 3.0])
    other = torch.randn(200_000, 2, generator=generator) * torch.tensor([2.0, 3.0]) + torch.tensor([0.0, 0.5])
    assert frechet_distance(one, other) == pytest.approx((2 - 1) ** 2 + 0.25, rel=0.03)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
    assert frechet_distance(one @ turn, other @ turn) == pytest.approx(frechet_distance(one, other), rel=1e-3)


def test_the_stored_network_tells_disturbed_pages():
    import numpy as np

    from layouts.model import PAGES

    with np.load(PAGES) as file:
        boxes = torch.from_numpy(file["boxes"][:1000] / np.float32(np.iinfo(file["boxes"].dtype).max))
        kind = torch.from_numpy(file["kind"][:1000]).long()
    which = torch.arange(1000) % len(DISTURBANCES)
    disturbed = disturb(boxes, kind, which, torch.Generator().manual_seed(0))
    net = FeatureNet.load()
    assert (net.classify(*disturbed).argmax(1) == which).float().mean() > 0.45
