"""From the PDF manuals of TeX Live to boxes with classes: the data of layouts/train.py.

Lines of text that follow each other closely become a block. A block's class follows from its fonts and its
first word (`class_of`), images and drawings become figures (`figures_of`). Only places and classes are kept,
no text. Needs PyMuPDF (pip install pymupdf).
"""

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

from layouts.model import BOXES, CLASSES

TITLE, TEXT, LIST, FIGURE, OTHER = range(len(CLASSES))
LEAST_BOXES = 3  # pages with fewer are left out, and pages with more than BOXES
PAGES_A_DOCUMENT = 30  # at most, drawn at random, so that no manual dominates
LEAST_SIDE = 0.006  # of the page, of a box that counts
LEAST_FIGURE = 0.01  # of the page's area
MARGIN = 0.075  # of the page's height: single lines nearer to its ends are running heads and page numbers
ITEM = re.compile(r"^([•◦▪■●○▶►∗*·–—‣⋄-]|\(?[0-9]{1,2}[.)]|\(?[a-z][.)])(\s|$)")
NUMBER = re.compile(r"^[-–—\s]*([0-9]{1,4}|[ivxlIVXL]{1,6})[-–—\s]*$")  # of a page
CAPTION = re.compile(r"^(fig(ure|\.)|table|tab\.|listing|example|code)\s*[0-9A-Z.:]+", re.IGNORECASE)
BOLD, MONO = 16, 8  # bits of a span's flags


def lines_of(blocks: list[dict]) -> list[dict]:
    """The lines of a page's text blocks, as PyMuPDF gives them: box, size of the font, text, bold, mono."""
    lines = []
    for block in blocks:
        for line in block.get("lines", ()):
            spans = [span for span in line["spans"] if span["text"].strip()]
            if not spans or abs(line["dir"][1]) > 0.1:  # text that is turned
                continue
            length = sum(len(span["text"]) for span in spans)
            box = np.array([span["bbox"] for span in spans])
            share = {
                name: sum(len(span["text"]) for span in spans if span["flags"] & bit) / length
                for name, bit in (("bold", BOLD), ("mono", MONO))
            }
            lines.append(
                {
                    "box": (box[:, 0].min(), box[:, 1].min(), box[:, 2].max(), box[:, 3].max()),
                    "size": max(spans, key=lambda span: len(span["text"]))["size"],
                    "text": " ".join("".join(span["text"] for span in spans).split()),
                    "length": length,
                }
                | share
            )
    return lines


def join(lines: list[dict]) -> list[dict]:
    """Lines on one level with less than a letter between them are one line."""
    joined = []
    for line in sorted(lines, key=lambda line: (round(line["box"][3]), line["box"][0])):
        for other in reversed(joined[-4:]):
            a, b = other["box"], line["box"]
            level = min(a[3], b[3]) - max(a[1], b[1]) > 0.5 * min(a[3] - a[1], b[3] - b[1])
            if level and -1 < b[0] - a[2] < 2.5 * line["size"]:
                total = other["length"] + line["length"]
                for name in ("bold", "mono"):
                    other[name] = (other[name] * other["length"] + line[name] * line["length"]) / total
                other["size"] = max(other, line, key=lambda part: part["length"])["size"]
                other |= {"box": union(a, b), "text": f"{other['text']} {line['text']}", "length": total}
                break
        else:
            joined.append(dict(line))
    return joined


def union(a: tuple, b: tuple) -> tuple:
    """The least box around two boxes (left, top, right, bottom)."""
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


def area(box: tuple) -> float:
    """0 of a box whose right or bottom edge comes first."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def common_area(a: tuple, b: tuple) -> float:
    """Area of the intersection."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def class_of(line: dict, body: float, height: float) -> int:
    """The class of a line on its own. body: the document's usual size of letters; height: of the page."""
    top, bottom = line["box"][1] / height, line["box"][3] / height
    if bottom < MARGIN or top > 1 - MARGIN:
        return OTHER  # running head
    if NUMBER.match(line["text"]) and not 0.15 < top < 0.8:
        return OTHER
    if line["size"] > 1.12 * body or (line["bold"] > 0.9 and len(line["text"]) < 70):
        return TITLE
    if CAPTION.match(line["text"]) or line["mono"] > 0.7:
        return OTHER
    return LIST if ITEM.match(line["text"]) else TEXT


def blocks_of(lines: list[dict], body: float, height: float) -> list[list]:
    """[class, box] of lines in reading order: a line joins the block above if it is close, below it, and of
    its class. A line of text goes on with a list if it is indented like its items' text."""
    blocks = []  # [class, box, whether it begins as a caption]
    for line in sorted(lines, key=lambda line: (line["box"][1], line["box"][0])):
        kind, box = class_of(line, body, height), line["box"]
        for block in reversed(blocks):
            above = block[1]
            apart = box[1] - above[3]
            overlap = min(above[2], box[2]) - max(above[0], box[0])
            near = -0.6 * line["size"] < apart < (1.0 if kind != TITLE else 0.5) * body
            same = kind == block[0] or (kind == TEXT and block[0] == LIST and box[0] > above[0] + 0.3 * body)
            caption = kind == TEXT and block[0] == OTHER and block[2] and apart < 0.4 * body
            if near and (same or caption) and overlap > 0.2 * min(above[2] - above[0], box[2] - box[0]):
                block[1] = union(above, box)
                break
        else:
            blocks.append([kind, box, bool(CAPTION.match(line["text"]))])
    return [[kind, box] for kind, box, _ in blocks]


def figures_of(page, lines: list[dict]) -> tuple[list[tuple], list[tuple]]:
    """(figures, frames) of a page: images and groups of drawings that hold little text; groups that hold
    much, which are frames around text."""
    whole = area(tuple(page.rect))
    boxes = [tuple(image["bbox"]) for image in page.get_image_info()]
    drawings = page.get_drawings()
    if 0 < len(drawings) <= 3000:
        boxes += [tuple(box) for box in page.cluster_drawings(drawings=drawings)]
    figures, frames = [], []
    for box in boxes:
        if not LEAST_FIGURE * whole < area(box) < 0.7 * whole:
            continue
        text = sum(common_area(line["box"], box) for line in lines)
        (frames if text > 0.25 * area(box) else figures).append(box)
    return figures, frames


def page_boxes(page, lines: list[dict], body: float) -> tuple[np.ndarray, list[int]] | None:
    """(boxes (n, 4): centre and size as shares of the page, classes) of a page, in reading order; None for a
    page that is left out: not upright, too few or too many boxes, or boxes that overlap. lines: of lines_of;
    body: as of class_of."""
    width, height = page.rect.width, page.rect.height
    if page.rotation or height < width:
        return None
    lines = join(lines)
    figures, frames = figures_of(page, lines)
    outside = [
        line
        for line in lines
        if not any(common_area(line["box"], figure) > 0.6 * area(line["box"]) for figure in figures)
    ]
    found = blocks_of(outside, body, height)
    found += [[FIGURE, box] for box in figures]
    for frame in frames:  # what stands in a frame is one box
        held = [block for block in found if common_area(block[1], frame) > 0.6 * area(block[1])]
        if held:
            kind = Counter(block[0] for block in held).most_common(1)[0][0]
            found = [block for block in found if not any(block is other for other in held)]
            found.append([OTHER if kind == TEXT else kind, tuple(frame)])
    size = np.array([width, height, width, height])
    kept = []
    for kind, box in sorted(found, key=lambda block: -area(block[1])):
        box = tuple(np.clip(np.array(box) / size, 0, 1))
        if box[2] - box[0] < LEAST_SIDE or box[3] - box[1] < LEAST_SIDE:
            continue
        shared = [common_area(box, other) / area(box) for _, other in kept]
        if any(share > 0.7 for share in shared):  # a part of a larger box
            continue
        if any(share > 0.03 for share in shared):
            return None
        kept.append((kind, box))
    if not LEAST_BOXES <= len(kept) <= BOXES:
        return None
    kept.sort(key=lambda block: (block[1][1], block[1][0]))
    edges = np.array([box for _, box in kept])
    boxes = np.concatenate([(edges[:, :2] + edges[:, 2:]) / 2, edges[:, 2:] - edges[:, :2]], 1)
    return boxes, [kind for kind, _ in kept]


def read_document(file: Path, seed: int) -> list[tuple[int, np.ndarray, list[int]]]:
    """(number of the page, boxes, classes) of at most PAGES_A_DOCUMENT pages of a PDF; [] if damaged."""
    import pymupdf

    pymupdf.TOOLS.mupdf_display_errors(False)
    pymupdf.TOOLS.mupdf_display_warnings(False)
    try:
        document = pymupdf.open(file)
        count = document.page_count
    except (RuntimeError, ValueError):  # what PyMuPDF raises for damaged files
        return []
    with document:
        if document.needs_pass:
            return []
        chosen = sorted(random.Random(seed).sample(range(count), min(count, PAGES_A_DOCUMENT)))
        # {number of the page: its lines}
        lines = {n: lines_of(document[n].get_text("dict", flags=3)["blocks"]) for n in chosen}
        sizes = Counter()
        for line in (line for of_page in lines.values() for line in of_page):
            sizes[round(line["size"], 1)] += line["length"]
        if not sizes:
            return []
        body = sizes.most_common(1)[0][0]
        found = {n: page_boxes(document[n], lines[n], body) for n in chosen}
        return [(n, *page) for n, page in found.items() if page]
