"""The network whose features the Frechet distance compares. It was trained to tell the ten classes of
Fashion-MNIST."""

from pathlib import Path

import safetensors.torch
import torch

FILE = Path(__file__).resolve().parent / "features.safetensors"
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")


class FeatureNet(torch.nn.Module):
    """64 features of an image (batch, 1, 16, 16), from which its class can be read."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential()
        for inputs, outputs, stride in ((1, 32, 1), (32, 48, 2), (48, 64, 2), (64, 64, 1)):
            self.body.extend([torch.nn.Conv2d(inputs, outputs, 3, stride, 1), torch.nn.SiLU()])
        self.body.extend([torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 64)])
        self.head = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Linear(64, len(CLASSES)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The features, (batch, 64)."""
        return self.body(images)

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of CLASSES, (batch, 10)."""
        return self.head(self.body(images))

    @classmethod
    def load(cls, file: Path = FILE) -> "FeatureNet":
        """The network in the file, frozen, in float32."""
        net = cls()
        weights = safetensors.torch.load_file(file)
        net.load_state_dict({name: value.float() for name, value in weights.items()})
        return net.eval().requires_grad_(False)
