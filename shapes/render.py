"""The shapes world: prompts such as "a red circle left of a blue square" and the images they describe.

A scene is (first object, relation, second object). The prompt fixes the two colours, the two shapes and the
relation. It leaves free the radii, the exact places and the grey of the background. Images are 32 x 32 RGB.
Write the prompt lists again: python -m shapes.render
"""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32  # pixels, both sides
COLOURS = {  # RGB
    "red": (225, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = {  # (x, y) of first minus second
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
REVERSED = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RADIUS = (5.0, 5.75)  # pixels
BACKGROUND = (64, 240)  # grey level
GAP = 3.0  # least distance in pixels between the two objects' boxes
PROMPT_FILES = {name: Path(__file__).parent / f"prompts_{name}.txt" for name in ("train", "eval")}


def prompt_of(first: tuple[str, str], relation: str, second: tuple[str, str]) -> str:
    """The prompt of a scene; objects are (colour, shape)."""
    return f"a {first[0]} {first[1]} {relation} a {second[0]} {second[1]}"


def parse(prompt: str) -> tuple[tuple[str, str], str, tuple[str, str]]:
    """(first object, relation, second object) of a prompt; ValueError if it is not one of this world."""
    for relation in RELATIONS:
        first, found, second = prompt.strip().lower().partition(f" {relation} ")
        if found:
            objects = [tuple(part.split()[1:]) for part in (first, second) if part.startswith("a ")]
            if len(objects) == 2 and all(len(o) == 2 and o[0] in COLOURS and o[1] in SHAPES for o in objects):
                return objects[0], relation, objects[1]
    raise ValueError(
        f"{prompt!r} is not a shapes prompt: a <{'|'.join(COLOURS)}> <{'|'.join(SHAPES)}> "
        f"<{'|'.join(RELATIONS)}> a <colour> <shape>"
    )


def all_scenes() -> list[tuple[tuple[str, str], str, tuple[str, str]]]:
    """All 12 x 11 x 4 = 528 scenes of two different objects, in a fixed order."""
    objects = [(c, s) for c in COLOURS for s in SHAPES]
    return [(a, r, b) for a in objects for b in objects if a != b for r in RELATIONS]


def half_extent(shape: str, radius: float) -> tuple[float, float]:
    """Half width and half height in pixels of a shape's bounding box."""
    width, height = {"circle": (1.0, 1.0), "square": (0.886, 0.886), "triangle": (1.126, 0.975)}[shape]
    return width * radius, height * radius


def inside(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Boolean mask of the points (x, y), in pixels from the centre of the bounding box (y down),
    inside the shape."""
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "square":  # the circle's area
        return np.maximum(abs(x), abs(y)) <= 0.886 * radius
    half_height = 0.975 * radius  # an equilateral triangle, point up
    return (y <= half_height) & (y >= 3**0.5 * abs(x) - half_height)


def coverage(shape: str, cx: float, cy: float, radius: float, samples: int = 4) -> np.ndarray:
    """Share of each pixel that the shape covers, (SIZE, SIZE), from samples x samples points a pixel."""
    grid = (np.arange(SIZE * samples) + 0.5) / samples
    mask = inside(shape, grid[None, :] - cx, grid[:, None] - cy, radius)
    return mask.reshape(SIZE, samples, SIZE, samples).mean((1, 3))


def paint(objects: list[tuple[str, str, float, float, float]], background: float) -> Image.Image:
    """Image of objects (colour, shape, centre x, centre y, radius) on a plain grey background."""
    pixels = np.full((SIZE, SIZE, 3), float(background))
    for colour, shape, cx, cy, radius in objects:
        share = coverage(shape, cx, cy, radius)[..., None]
        pixels = (1 - share) * pixels + share * np.array(COLOURS[colour], float)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def render(
    first: tuple[str, str], relation: str, second: tuple[str, str], rng: np.random.Generator
) -> Image.Image:
    """A random image of the scene: what the prompt leaves free is drawn from `rng`."""
    dx, dy = RELATIONS[relation]
    axis = 0 if dx else 1
    radii = rng.uniform(*RADIUS, 2)
    extents = np.array([half_extent(first[1], radii[0]), half_extent(second[1], radii[1])])  # (object, axis)
    low, high = 1 + extents, SIZE - 1 - extents  # where the centres may lie
    least = extents[:, axis].sum() + GAP
    sign = dx + dy  # -1: the first object has the smaller coordinate
    centres = np.empty((2, 2))
    before, after = (0, 1) if sign < 0 else (1, 0)
    centres[before, axis] = rng.uniform(low[before, axis], high[after, axis] - least)
    centres[after, axis] = rng.uniform(centres[before, axis] + least, high[after, axis])
    other = 1 - axis
    distance = abs(centres[0, axis] - centres[1, axis])
    centres[0, other] = rng.uniform(low[0, other], high[0, other])
    reach = 0.5 * distance  # keeps the direction clear
    centres[1, other] = rng.uniform(
        max(low[1, other], centres[0, other] - reach), min(high[1, other], centres[0, other] + reach)
    )
    objects = [(*o, *centres[i], radii[i]) for i, o in enumerate((first, second))]
    return paint(objects, rng.uniform(*BACKGROUND))


def write_prompts(seed: int = 0, eval_pairs: int = 64) -> None:
    """Split the 528 prompts into train and eval.
    The two wordings of one scene ("A left of B", "B right of A") stay together."""
    pairs = {}
    for a, r, b in all_scenes():
        same = min((a, r, b), (b, REVERSED[r], a))
        pairs.setdefault(same, []).append(prompt_of(a, r, b))
    groups = list(pairs.values())
    order = np.random.default_rng(seed).permutation(len(groups))
    for name, chosen in (("eval", order[:eval_pairs]), ("train", order[eval_pairs:])):
        prompts = [p for i in chosen for p in groups[i]]
        np.random.default_rng(seed).shuffle(prompts)
        PROMPT_FILES[name].write_text("\n".join(prompts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_prompts()
