"""Figures of a run: grids of images, curves, panels. Plotting only; each is written atomically as PNG."""

import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

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
        axes[r, 0].set_title(prompts[r], fontsize=8, loc="left")
    axes[0, per_prompt].set_title(title, fontsize=8, loc="left")
    for axis in axes.flat:
        axis.set_axis_off()
    save_figure(figure, path)


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
    left.set(xlabel="round", ylabel=reward, xticks=[r["round"] for r in rows])
    left.legend()
    right.plot(losses, linewidth=0.8)
    right.set(xlabel="update", ylabel="denoising loss")
    save_figure(figure, path)


def save_panels(path: Path, panels: list[tuple[str, str, dict]], log_x: bool = False) -> None:
    """Panels side by side, each (x label, y label, {line: (x, y) or (x, y, standard errors)}).
    NaN is left out."""
    figure = Figure(figsize=(4.5 * len(panels), 3), layout="constrained")
    for axis, (x_label, y_label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, columns in lines.items():
            points = [point for point in zip(*columns) if not np.isnan(point[1])]
            if points:
                axis.errorbar(*zip(*points), fmt="o-", markersize=3, linewidth=1, capsize=2, label=label)
        axis.set(xlabel=x_label, ylabel=y_label)
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
    figure.savefig(buffer, dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())
