"""The images of the embedded flow: Fashion-MNIST, shrunk to 16 x 16 grey pixels.

train.png holds the first 20,000 images of its training set, reference.png the 10,000 of its test set. Both
are sheets with 100 images in a row, 8 bits a pixel. Another folder that train.py made may hold larger images.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from utils.runs import InputError

FOLDER = Path(__file__).resolve().parent
SHEETS = ("train.png", "reference.png")
COLUMNS = 100  # images in a row of a sheet


def as_tensor(levels: np.ndarray) -> torch.Tensor:
    """Images (n, size, size) uint8 as (n, 1, size, size) float32 in [-1, 1]."""
    return torch.from_numpy(levels).unsqueeze(1).float() / 127.5 - 1


def open_sheet(file: Path) -> Image.Image:
    """The sheet in the file, 8 bits a pixel. InputError if it holds none."""
    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, SyntaxError) as error:  # PIL's kinds for a damaged file
        raise InputError(f"{file}: cannot be read ({error}); make it again by fashion.train") from None
    if picture.mode != "L" or picture.width % COLUMNS or picture.height % (picture.width // COLUMNS):
        raise InputError(f"{file}: is no sheet of images; make it again by fashion.train")
    return picture


def image_shape(folder: Path) -> tuple[int, int, int]:
    """(1, size, size) of the images in a folder that train.py made. InputError: see open_sheet."""
    size = open_sheet(folder / SHEETS[0]).width // COLUMNS
    return 1, size, size


def read_sheet(file: Path) -> torch.Tensor:
    """The images of a sheet, (n, 1, size, size) float32 in [-1, 1]. InputError: see open_sheet."""
    levels = np.array(open_sheet(file))  # (rows * size, columns * size)
    size = levels.shape[1] // COLUMNS
    return as_tensor(levels.reshape(-1, size, COLUMNS, size).swapaxes(1, 2).reshape(-1, size, size))


def sheet(levels: np.ndarray) -> Image.Image:
    """The sheet of images (n, size, size) uint8. n: a multiple of 100."""
    size = levels.shape[1]
    rows = levels.reshape(-1, COLUMNS, size, size).swapaxes(1, 2)  # (rows, size, columns, size)
    return Image.fromarray(rows.reshape(-1, COLUMNS * size))


def training_images(folder: Path = FOLDER) -> torch.Tensor:
    """(20000, 1, 16, 16) in [-1, 1]."""
    return read_sheet(folder / SHEETS[0])


def reference_images(folder: Path = FOLDER) -> torch.Tensor:
    """(10000, 1, 16, 16) in [-1, 1], none of which the flow or the feature network was trained on."""
    return read_sheet(folder / SHEETS[1])
