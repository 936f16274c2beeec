"""The network whose features the Frechet distance compares. It was trained to tell the ten classes of
Fashion-MNIST."""

import math
from pathlib import Path

import safetensors.torch
import torch

from utils.runs import InputError

FILE = Path(__file__).resolve().parent / "features.safetensors"
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


class FeatureNet(torch.nn.Module):
    """64 features of an image (batch, 1, size, size), from which its class can be read."""

    def __init__(self, size: int = 16):
        super().__init__()
        self.body = torch.nn.Sequential()
        for inputs, outputs, stride in ((1, 32, 1), (32, 48, 2), (48, 64, 2), (64, 64, 1)):
            self.body.extend([torch.nn.Conv2d(inputs, outputs, 3, stride, 1), torch.nn.SiLU()])
        self.body.extend([torch.nn.Flatten(), torch.nn.Linear(64 * math.ceil(size / 4) ** 2, 64)])
        self.head = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(64, len(CLASSES)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features, (batch, 64)."""
        return self.body(images)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of CLASSES, (batch, 10)."""
        return self.head(self.body(images))

    @classmethod
    def load(cls, file: Path = FILE) -> "FeatureNet":
        """The network in the file, frozen, in float32. InputError if it holds none."""
        try:
            weights = safetensors.torch.load_file(file)
            net = cls(4 * math.isqrt(weights["body.9.weight"].shape[1] // 64))
            net.load_state_dict({name: value.float() for name, value in weights.items()})
        except (OSError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{file}: holds no feature network ({error}); make it again by fashion.train"
            ) from None
        return net.eval().requires_grad_(False)
