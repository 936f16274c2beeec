"""The world of the unconditional flow model, the network whose features the Frechet distance compares, and folders of pictures.

A picture is 8 x 8, grey, values about [-1, 1]: a circle, square or triangle of any place, size and grey on a darker flat ground.
Every pixel carries noise: strong inside the shape (standard deviation 0.4), weak on the ground (0.1). A sampler with few steps weakens
weak noise more than strong noise, so its inverse needs more noise where the ground is; how much depends on the picture.
"""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import InputError, derived_seed

SIZE, SHAPES = 8, ("circle", "square", "triangle")
WORLD = (1, SIZE, SIZE)  # shape of its pictures
GROUND_NOISE, TEXTURE_NOISE = 0.1, 0.4  # standard deviations
FLOW = Path(__file__).parent / "flow"  # the embedded flow model and features.safetensors
LABELS = ("x", "y", "radius", "ground", "fill", "ground noise", "texture noise", "softness", "smoothness")


def draw(count: int, seed: int, vary: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(pictures (count, 1, 8, 8) float32, which of SHAPES (count,) int64, LABELS (count, 9) float32, in the world's own units).

    vary: pictures that are wrong in the ways in which a sampler errs, for the feature network: noise too weak or too strong, edges too
    soft, noise that is smooth in space. softness and smoothness are 0 otherwise, and the noise levels constants.
    """
    rng = np.random.default_rng(seed)
    kind, radius = rng.integers(3, size=count), rng.uniform(1.6, 3, count)
    x, y = (rng.uniform(radius, SIZE - radius) for _ in range(2))
    ground, fill = rng.uniform(-0.8, -0.3, count), rng.uniform(0.2, 0.8, count)
    ground_noise, texture_noise = np.full(count, GROUND_NOISE), np.full(count, TEXTURE_NOISE)
    softness, smoothness = np.zeros(count), np.zeros(count)
    if vary:
        ground_noise, texture_noise = (level * np.exp(rng.uniform(-1, 1, count)) for level in (ground_noise, texture_noise))
        softness, smoothness = np.maximum(rng.uniform(-1, 1, (2, count)), 0)  # half of the pictures have none
    cover = torch.cat(
        [_cover(kind[i : i + 500], x[i : i + 500], y[i : i + 500], radius[i : i + 500]) for i in range(0, count, 500)]
    )
    white = torch.from_numpy(rng.standard_normal((count, 1, SIZE, SIZE), np.float32))
    columns = np.stack([x, y, radius, ground, fill, ground_noise, texture_noise, softness, smoothness], 1)
    labels = torch.from_numpy(columns).float()
    ground, fill, weak, strong, soft, smooth = labels[:, 3:, None, None, None].unbind(1)
    cover = (1 - soft) * cover + soft * _blur(cover)
    noise = (1 - smooth).sqrt() * white + smooth.sqrt() * 3 * _blur(white)  # the mean of nine has a third of the deviation
    pictures = ground * (1 - cover) + fill * cover + (weak + (strong - weak) * cover) * noise
    return pictures, torch.from_numpy(kind), labels


def _cover(kind, x, y, radius) -> torch.Tensor:
    """Which share of every pixel the shape covers, (count, 1, 8, 8), from 4 x 4 points a pixel. Arguments: (count,)."""
    kind, x, y, radius = (values[:, None, None] for values in (kind, x, y, radius))
    fine = (np.arange(4 * SIZE, dtype=np.float32) + 0.5) / 4
    dx, dy = fine[None, None, :] - x, fine[None, :, None] - y
    circle, square = dx**2 + dy**2 <= radius**2, np.maximum(abs(dx), abs(dy)) <= 0.85 * radius
    triangle = (dy <= 0.8 * radius) & (dy >= 1.8 * abs(dx) - radius)
    inside = np.where(kind == 0, circle, np.where(kind == 1, square, triangle))
    return torch.from_numpy(inside.reshape(-1, 1, SIZE, 4, SIZE, 4).mean((3, 5), dtype=np.float32))


def _blur(pictures: torch.Tensor) -> torch.Tensor:
    """Mean over 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="reflect"), 3, 1)


class FeatureNet(torch.nn.Module):
    """64 features of a picture (batch, 1, 8, 8), from which shape and LABELS can be read; standardised on the world's pictures."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential()
        for inputs, outputs, stride in ((1, 32, 1), (32, 48, 1), (48, 64, 2), (64, 64, 1)):
            self.body.extend([torch.nn.Conv2d(inputs, outputs, 3, stride, 1), torch.nn.SiLU()])
        self.body.extend([torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 64)])
        self.head = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 12))
        self.register_buffer("centre", torch.zeros(64))
        self.register_buffer("scale", torch.ones(64))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return (self.body(pictures) - self.centre) * self.scale  # (batch, 64)

    def answers(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of SHAPES (batch, 3) and standardised LABELS (batch, 9)."""
        return self.head(self.body(pictures)).split((len(SHAPES), len(LABELS)), 1)

    @classmethod
    def load(cls, file: Path = FLOW / "features.safetensors") -> "FeatureNet":
        net = cls()
        net.load_state_dict({name: value.float() for name, value in safetensors.torch.load_file(file).items()})
        return net.eval().requires_grad_(False)


# ---------------------------------------------------------------- the pictures of a run


def find_pictures(data, reference_share):
    """The picture files in the folder `data` and in its folders, [] if that is ""; InputError if they are too few to share out."""
    if data and not Path(data).is_dir():
        raise InputError(f"--data {data}: no such folder")
    endings = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    files = sorted(f for f in Path(data).rglob("*") if f.suffix.lower() in endings) if data else []
    kept = round(reference_share * len(files))
    if data and min(kept, len(files) - kept) < 20:
        raise InputError(f"--data {data}: {len(files)} pictures are too few, 20 to invert and 20 as reference are needed")
    return files


def load_pictures(args, shape, files):
    """{"invert": to learn the noises of, "train": to train a base on, "reference" and "floor": for the Frechet distance}, each
    (n, *shape) in [-1, 1]. Of a folder, "reference" shares no picture with the others. args: of inverse_noise_correction.py."""
    if not args.data:
        sizes = {"invert": args.pictures, "reference": 5 * args.eval_pictures, "floor": args.eval_pictures}
        if args.train_base or args.longer:
            sizes["train"] = 20_000
        own = {"invert": (args.seed,), "train": (args.seed,)}  # the others are the same for every run
        pictures = {name: draw(size, derived_seed(name, *own.get(name, ())))[0] for name, size in sizes.items()}
    else:
        loaded = []
        for file in tqdm(files, desc="read pictures", leave=False, mininterval=1):
            try:
                image = Image.open(file).convert("L" if shape[0] == 1 else "RGB")
            except Exception as error:  # PIL raises many kinds for a damaged file
                raise InputError(f"--data {file}: cannot be read ({error})") from None
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side)).resize(shape[1:], Image.Resampling.LANCZOS)
            loaded.append(torch.from_numpy(np.array(image)).view(*shape[1:], shape[0]).permute(2, 0, 1) / 127.5 - 1)
        generator = torch.Generator().manual_seed(derived_seed("split"))
        loaded = torch.stack(loaded)[torch.randperm(len(loaded), generator=generator)]
        kept = round(args.reference_share * len(loaded))
        pictures = {"reference": loaded[:kept], "train": loaded[kept:]}
        pictures |= {"invert": loaded[kept:][: args.pictures], "floor": loaded[kept:][: args.eval_pictures]}
    for name, x in pictures.items():  # the same noise on both sides of every comparison
        generator = torch.Generator().manual_seed(derived_seed("data noise", name))
        pictures[name] = x + args.data_noise * torch.randn(x.shape, generator=generator)
    return pictures
