"""Image files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from utils.runs import InputError


def read_images(files: list[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    """(n, *shape) in [-1, 1]. shape: (1 or 3, height, width). The middle square of each image is resized.
    InputError for a file that cannot be read."""
    images = []
    for file in tqdm(files, desc="read images", leave=False, mininterval=1):
        try:
            image = Image.open(file).convert("L" if shape[0] == 1 else "RGB")
        except Exception as error:  # PIL raises many kinds for a damaged file
            raise InputError(f"--data {file}: cannot be read ({error})") from None
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize(shape[1:], Image.Resampling.LANCZOS)
        images.append(
            torch.from_numpy(np.array(image)).view(*shape[1:], shape[0]).permute(2, 0, 1) / 127.5 - 1
        )
    return torch.stack(images)
