"""The checker: reads the pixels of a finished image and says whether it shows what its prompt asks for.

How: the background is the median colour. The pixels that differ from it form connected objects. An object's
colour is the median of its core. Its outline is the pixels that are more than half of that colour. Its shape
is the template, of the same area and centre, that overlaps best. It takes about a millisecond an image.

Limits: a separate blob under 12 pixels, or within 40 grey levels of the background, is not seen. A blob that
touches an object may pass as part of it. Chroma subsampling (JPEG 4:2:0) rounds corners: squares and
triangles then read as circles.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from shapes.render import COLOURS, RELATIONS, SHAPES, SIZE, coverage, parse

CONTRAST = 40  # least difference from the background in some channel, of 255, of an object's pixel
SPECK = 12  # pixels; anything smaller is noise, not an object
COLOUR_TOLERANCE = 60  # RGB distance within which the core's median counts as the named colour
COLOUR_SPREAD = 80  # RGB distance from the named colour within which a pixel of the core has that colour
PURITY = 0.8  # least share of an object's core that has it: no two-coloured objects
FIT = 0.7  # least overlap (intersection over union) of an outline with the best template
AREA = {"circle": np.pi, "square": (2 * 0.886) ** 2, "triangle": 0.975**2 * 4 / 3**0.5}  # of radius 1
# of radius 1, below the middle of the bounding box
CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 0.975 / 3}
_Y, _X = np.mgrid[:SIZE, :SIZE] + 0.5
_NAMES = list(COLOURS)
_VALUES = np.array([COLOURS[c] for c in _NAMES], float)


@dataclass(frozen=True)
class Found:
    """One object seen in an image. `colour` or `shape` is None if the pixels fit no name well enough."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    fit: float  # overlap with the best template, in [0, 1]


@dataclass(frozen=True)
class Check:
    """strict: everything right and nothing extra. graded: share in [0, 1] of six things right (two colours,
    two shapes, the relation, exactly two objects). fit: mean template overlap of the objects, in [0, 1],
    whatever the prompt."""

    strict: bool
    graded: float
    fit: float


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Index arrays (n, 2), (row, column), of the 4-connected parts of a boolean (SIZE, SIZE) mask."""
    left = {(int(r), int(c)) for r, c in np.argwhere(mask)}
    parts = []
    while left:
        todo, part = [left.pop()], []
        while todo:
            r, c = todo.pop()
            part.append((r, c))
            for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
                if near in left:
                    left.remove(near)
                    todo.append(near)
        parts.append(np.array(part))
    return parts


def find_objects(image: Image.Image) -> list[Found]:
    """All objects in the image, largest first."""
    pixels = np.asarray(
        image.convert("RGB").resize((SIZE, SIZE)) if image.size != (SIZE, SIZE) else image.convert("RGB"),
        float,
    )
    background = np.median(pixels.reshape(-1, 3), 0)
    difference = pixels - background
    objects = []
    parts = [p for p in _components(abs(difference).max(-1) > CONTRAST) if len(p) >= SPECK]
    for part in sorted(parts, key=len, reverse=True):
        mask = np.zeros((SIZE + 2, SIZE + 2), bool)
        mask[part[:, 0] + 1, part[:, 1] + 1] = True
        core = mask[1:-1, 1:-1] & mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
        mask = mask[1:-1, 1:-1]
        colours = pixels[core if core.any() else mask]
        median = np.median(colours, 0)
        index = int(np.linalg.norm(median - _VALUES, axis=-1).argmin())
        alike = np.linalg.norm(colours - _VALUES[index], axis=-1) <= COLOUR_SPREAD
        pure = np.linalg.norm(median - _VALUES[index]) <= COLOUR_TOLERANCE and alike.mean() >= PURITY
        direction = median - background
        near = np.pad(mask, 1)
        near = near[1:-1, 1:-1] | near[2:, 1:-1] | near[:-2, 1:-1] | near[1:-1, 2:] | near[1:-1, :-2]
        # how much of each pixel is object
        share = np.clip(difference @ direction / (direction @ direction), 0, 1) * near
        area = share.sum()
        cx, cy = (share * _X).sum() / area, (share * _Y).sum() / area
        overlap = {}
        for shape in SHAPES:
            radius = (area / AREA[shape]) ** 0.5
            template = coverage(shape, cx, cy - CENTROID[shape] * radius, radius)
            overlap[shape] = np.minimum(share, template).sum() / np.maximum(share, template).sum()
        best = max(overlap, key=overlap.get)
        objects.append(
            Found(
                _NAMES[index] if pure else None,
                best if overlap[best] >= FIT else None,
                float(cx),
                float(cy),
                float(overlap[best]),
            )
        )
    return objects


@cache
def _scene(prompt: str):
    return parse(prompt)


def check(image: Image.Image, prompt: str) -> Check:
    """Compare one image with its prompt. ValueError if the prompt is not one of this world."""
    first, relation, second = _scene(prompt)
    found = find_objects(image)
    if not found:
        return Check(False, 0.0, 0.0)
    best = 0
    for i, a in enumerate(found[:4]):  # the reading of the image that is kindest to the prompt
        best = max(
            best,
            (a.colour == first[0]) + (a.shape == first[1]),
            (a.colour == second[0]) + (a.shape == second[1]),
        )
        for j, b in enumerate(found[:4]):
            if i != j:
                dx, dy = a.x - b.x, a.y - b.y
                along, across = (dx, dy) if RELATIONS[relation][0] else (dy, dx)
                right = along * sum(RELATIONS[relation]) > abs(across)
                points = (
                    (a.colour == first[0])
                    + (a.shape == first[1])
                    + (b.colour == second[0])
                    + (b.shape == second[1])
                )
                best = max(best, int(points + right))
    best += len(found) == 2
    return Check(best == 6, best / 6, float(np.mean([o.fit for o in found])))
