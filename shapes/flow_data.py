"""The world of the embedded flow model, and the network whose features the Frechet distance compares.

An image is 8 x 8, grey, values about [-1, 1]: a circle, square or triangle of any place, size and grey on a
darker flat ground. Every pixel has noise: strong inside the shape (standard deviation 0.4), weak on the
ground (0.1). A sampler with few steps weakens weak noise more than strong noise. So its inverse needs more
noise where the ground is, by an amount that depends on the image.
"""

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F

SIZE, SHAPES = 8, ("circle", "square", "triangle")
WORLD = (1, SIZE, SIZE)  # shape of its images
GROUND_NOISE, TEXTURE_NOISE = 0.1, 0.4  # standard deviations
FLOW = Path(__file__).resolve().parent / "flow"  # the embedded flow model and features.safetensors
LABELS = (
    "x",
    "y",
    "radius",
    "ground",
    "fill",
    "ground noise",
    "texture noise",
    "softness",
    "smoothness",
)


def draw(count: int, seed: int, vary: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(images (count, 1, 8, 8) float32, which of SHAPES (count,) int64, LABELS (count, 9) float32, in the
    world's own units).

    vary: images that are wrong in the ways in which a sampler errs, for the feature network: noise too weak
    or too strong, edges too soft, noise that is smooth in space. Otherwise softness and smoothness are 0 and
    the noise levels are constant.
    """
    rng = np.random.default_rng(seed)
    kind, radius = rng.integers(3, size=count), rng.uniform(1.6, 3, count)
    x, y = (rng.uniform(radius, SIZE - radius) for _ in range(2))
    ground, fill = rng.uniform(-0.8, -0.3, count), rng.uniform(0.2, 0.8, count)
    ground_noise, texture_noise = np.full(count, GROUND_NOISE), np.full(count, TEXTURE_NOISE)
    softness, smoothness = np.zeros(count), np.zeros(count)
    if vary:
        ground_noise, texture_noise = (
            level * np.exp(rng.uniform(-1, 1, count)) for level in (ground_noise, texture_noise)
        )
        softness, smoothness = np.maximum(rng.uniform(-1, 1, (2, count)), 0)  # half of the images have none
    parts = [slice(i, i + 500) for i in range(0, count, 500)]
    cover = torch.cat([_cover(kind[part], x[part], y[part], radius[part]) for part in parts])
    white = torch.from_numpy(rng.standard_normal((count, 1, SIZE, SIZE), np.float32))
    columns = [x, y, radius, ground, fill, ground_noise, texture_noise, softness, smoothness]
    labels = torch.from_numpy(np.stack(columns, 1)).float()
    ground, fill, weak, strong, soft, smooth = labels[:, 3:, None, None, None].unbind(1)
    cover = (1 - soft) * cover + soft * _blur(cover)
    # the mean of nine pixels has a third of their deviation
    noise = (1 - smooth).sqrt() * white + smooth.sqrt() * 3 * _blur(white)
    images = ground * (1 - cover) + fill * cover + (weak + (strong - weak) * cover) * noise
    return images, torch.from_numpy(kind), labels


def _cover(kind, x, y, radius) -> torch.Tensor:
    """The share of every pixel that the shape covers, (count, 1, 8, 8), from 4 x 4 points a pixel.
    Arguments: (count,)."""
    kind, x, y, radius = (values[:, None, None] for values in (kind, x, y, radius))
    fine = (np.arange(4 * SIZE, dtype=np.float32) + 0.5) / 4
    dx, dy = fine[None, None, :] - x, fine[None, :, None] - y
    circle, square = dx**2 + dy**2 <= radius**2, np.maximum(abs(dx), abs(dy)) <= 0.85 * radius
    triangle = (dy <= 0.8 * radius) & (dy >= 1.8 * abs(dx) - radius)
    inside = np.where(kind == 0, circle, np.where(kind == 1, square, triangle))
    return torch.from_numpy(inside.reshape(-1, 1, SIZE, 4, SIZE, 4).mean((3, 5), dtype=np.float32))


def _blur(images: torch.Tensor) -> torch.Tensor:
    """Mean over 3 x 3 pixels."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1)


class FeatureNet(torch.nn.Module):
    """64 features of an image (batch, 1, 8, 8), standardised on the world's images.
    Shape and LABELS can be read from them."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential()
        for inputs, outputs, stride in ((1, 32, 1), (32, 48, 1), (48, 64, 2), (64, 64, 1)):
            self.body.extend([torch.nn.Conv2d(inputs, outputs, 3, stride, 1), torch.nn.SiLU()])
        self.body.extend([torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 64)])
        answers = len(SHAPES) + len(LABELS)
        self.head = torch.nn.Sequential(
            torch.nn.SiLU(), torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, answers)
        )
        self.register_buffer("centre", torch.zeros(64))
        self.register_buffer("scale", torch.ones(64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features, (batch, 64)."""
        return (self.body(images) - self.centre) * self.scale

    def answers(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of SHAPES (batch, 3) and standardised LABELS (batch, 9)."""
        return self.head(self.body(images)).split((len(SHAPES), len(LABELS)), 1)

    @classmethod
    def load(cls, file: Path = FLOW / "features.safetensors") -> "FeatureNet":
        """The network in the file, frozen, in float32."""
        net = cls()
        net.load_state_dict(
            {name: value.float() for name, value in safetensors.torch.load_file(file).items()}
        )
        return net.eval().requires_grad_(False)
