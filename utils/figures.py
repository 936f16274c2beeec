"""Figures of a run: grids of images, curves, panels. Plotting only; each is written atomically as PNG."""

import functools
import io
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

if os.environ.get("MPLBACKEND"):  # as notebooks set it for their children, matplotlib refuses it at import
    os.environ["MPLBACKEND"] = "agg"

from matplotlib.figure import Figure

from utils.processes import FIRST
from utils.runs import write_atomically

GRID_IMAGES = 24  # images of a run that keep their full size, for grid.png: six prompts x 4


def shrink(images: list[Image.Image], first: int) -> list[Image.Image]:
    """The images, of which `first` is the first's number in the run. Those from GRID_IMAGES on are shrunk to
    at most 64 x 64 pixels: a run keeps thousands, only to measure their diversity."""
    sizes = [
        i.size if first + k < GRID_IMAGES else (min(64, i.width), min(64, i.height))
        for k, i in enumerate(images)
    ]
    return [i if i.size == size else i.resize(size) for i, size in zip(images, sizes)]


def keeps_the_run(draw):
    """Decorator of functions that draw to a path: what goes wrong in drawing is a warning, for a figure is
    not worth the run. Errors of the disk stay errors."""

    @functools.wraps(draw)
    def guarded(path: Path, *args, **options):
        try:
            draw(path, *args, **options)
        except OSError:
            raise
        except Exception as error:  # matplotlib raises many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"warning: {path} was not drawn ({reason}); the run goes on without it", file=sys.stderr)

    return guarded


def plain(text: str) -> str:
    """A text of the user's for a figure, in which no sign means a formula; at most 150 characters of it."""
    text = text if len(text) <= 150 else text[:149] + "…"
    return text.replace("$", r"\$")


@keeps_the_run
def save_grid(
    path: Path,
    base: list[Image.Image],
    tuned: list[Image.Image],
    prompts: list[str],
    per_prompt: int,
    title: str = "tuned, same seeds (base on the left)",
) -> None:
    """Up to six prompts, one a row: left the base's images, right the tuned model's.
    Both lists go prompt by prompt."""
    rows = min(6, len(prompts), len(base) // per_prompt)
    figure = Figure(figsize=(2.2 * per_prompt, 1.35 * rows))
    axes = figure.subplots(rows, 2 * per_prompt, squeeze=False)
    for r in range(rows):
        for c in range(per_prompt):
            axes[r, c].imshow(base[r * per_prompt + c])
            axes[r, per_prompt + c].imshow(tuned[r * per_prompt + c])
        axes[r, 0].set_title(plain(prompts[r]), fontsize=8, loc="left")
    axes[0, per_prompt].set_title(plain(title), fontsize=8, loc="left")
    for axis in axes.flat:
        axis.set_axis_off()
    save_figure(figure, path)


@keeps_the_run
def save_curves(path: Path, rows: list[dict], losses: list[float], base: float, reward: str) -> None:
    """Left: reward by round of accepted, sampled and held-out images (round 0: the base's).
    Right: loss by update."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("accepted", "sampled"):
        left.plot([r["round"] for r in rows], [r[f"reward_{name}"] for r in rows], "o-", label=name)
    held_out = {0: base} | {r["round"]: r["reward_held_out"] for r in rows}
    held_out = {r: reward for r, reward in held_out.items() if not np.isnan(reward)}
    left.plot(held_out.keys(), held_out.values(), "s-", label="held out, after the round")
    left.set(xlabel="round", ylabel=plain(reward), xticks=[r["round"] for r in rows])
    left.legend()
    right.plot(losses, linewidth=0.8)
    right.set(xlabel="update", ylabel="denoising loss")
    save_figure(figure, path)


@keeps_the_run
def save_panels(path: Path, panels: list[tuple[str, str, dict]], log_x: bool = False) -> None:
    """Panels side by side, each (x label, y label, {line: (x, y) or (x, y, standard errors)}).
    NaN is left out."""
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for axis, (x_label, y_label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, columns in lines.items():
            points = [point for point in zip(*columns) if not np.isnan(point[1])]
            if points:
                style = {"fmt": "o-", "markersize": 3, "linewidth": 1, "capsize": 2}
                axis.errorbar(*zip(*points), **style, label=plain(label))
        axis.set(xlabel=plain(x_label), ylabel=plain(y_label))
        if log_x:
            ticks = sorted({x for columns in lines.values() for x in columns[0]})
            axis.set(xscale="log", xticks=ticks, xticklabels=ticks)
            axis.minorticks_off()
        axis.legend(fontsize=7)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Atomically write a figure as PNG."""
    if not FIRST:
        return
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # characters that the font lacks are drawn as boxes
        figure.savefig(buffer, dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
