"""Image files."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.runs import InputError


def open_upright(file: Path) -> Image.Image:
    """The image, or the first of several, as a viewer shows it: grey of 16 bits scaled to 8, turned as EXIF
    says, transparent parts in front of white. Mode L or another that PIL converts to L and RGB. ValueError
    for pixels without a known range."""
    image = Image.open(file)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image, np.float64) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def read_images(files: list[Path], shape: tuple[int, int, int]) -> torch.Tensor:
    """(n, *shape) in [-1, 1]. shape: (1 or 3, height, width). The middle square of each image, seen as
    open_upright says, is resized. InputError for a file that cannot be read."""
    images = []
    for file in tqdm(files, desc="read images", leave=False, mininterval=1):
        try:
            image = open_upright(file).convert("L" if shape[0] == 1 else "RGB")
        except Exception as error:  # PIL raises many kinds for a damaged file
            raise InputError(f"--data {file}: cannot be read ({error})") from None
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize(shape[1:], Image.Resampling.LANCZOS)
        images.append(
            torch.from_numpy(np.array(image)).view(*shape[1:], shape[0]).permute(2, 0, 1) / 127.5 - 1
        )
    return torch.stack(images)
