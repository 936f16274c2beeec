"""The images of the embedded flow: Fashion-MNIST, shrunk to 16 x 16 grey pixels.

train.png holds the first 20,000 images of its training set, reference.png the 10,000 of its test set. Both
are sheets with 100 images in a row, 8 bits a pixel.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

SHAPE = (1, 16, 16)
FOLDER = Path(__file__).resolve().parent
COLUMNS = 100  # images in a row of a sheet


def as_tensor(levels: np.ndarray) -> torch.Tensor:
    """Images (n, 16, 16) uint8 as (n, 1, 16, 16) float32 in [-1, 1]."""
    return torch.from_numpy(levels.reshape(-1, *SHAPE)).float() / 127.5 - 1


def read_sheet(file: Path) -> torch.Tensor:
    """The images of a sheet, (n, 1, 16, 16) float32 in [-1, 1]."""
    size = SHAPE[1]
    levels = np.array(Image.open(file))  # (rows * 16, columns * 16)
    return as_tensor(levels.reshape(-1, size, levels.shape[1] // size, size).swapaxes(1, 2))


def sheet(levels: np.ndarray) -> Image.Image:
    """The sheet of images (n, 16, 16) uint8. n: a multiple of 100."""
    size = SHAPE[1]
    rows = levels.reshape(-1, COLUMNS, size, size).swapaxes(1, 2)  # (rows, 16, columns, 16)
    return Image.fromarray(rows.reshape(-1, COLUMNS * size))


def training_images() -> torch.Tensor:
    """(20000, 1, 16, 16) in [-1, 1]."""
    return read_sheet(FOLDER / "train.png")


def reference_images() -> torch.Tensor:
    """(10000, 1, 16, 16) in [-1, 1], none of which the flow or the feature network was trained on."""
    return read_sheet(FOLDER / "reference.png")
