"""The judge of layouts: alignment, overlap, and the network whose features the Frechet distance compares.

Alignment and overlap are those of LayoutGAN++ (arXiv 2108.00871), times 100 as in the tables of LayoutDM
(arXiv 2303.08137); smaller is better, 0 is the best. The feature network was trained to tell how a page was
disturbed (`disturb` of train.py), if it was.
"""

import json
from pathlib import Path

import safetensors
import torch
from torch import nn

from layouts.model import CLASSES, EDGE_WAVES, Layer, differences, edges, page_of

FEATURES = Path(__file__).resolve().parent / "features.safetensors"
WIDTH = 64  # features of a page
DISTURBANCES = ("none", "moved", "resized", "kinds", "swapped")  # what the network tells apart
LARGEST = 0.99  # distance of edges that counts: pages are 1 high, boxes outside them may be further apart


# ---------------------------------------------------------------- alignment and overlap


def sides(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(left and top, right and bottom), each (..., 2), of boxes (..., 4), centre and size."""
    return boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2


def alignment(boxes: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """(n,) mean over a page's boxes of -log(1 - d), times 100; d is the least distance of one of the box's
    six edges and middles to that of another box. 0 of a page with one box. boxes: (n, rows, 4) centre and
    size as shares of the page; kind: (n, rows), -1 for a gap (LayoutGAN++'s code takes gaps for boxes)."""
    low, high = sides(boxes)
    lines = torch.cat([low, boxes[..., :2], high], 2).transpose(1, 2)  # (n, 6, rows)
    apart = (lines.unsqueeze(3) - lines.unsqueeze(2)).abs()  # (n, 6, rows, rows)
    nobody = (kind < 0).unsqueeze(1) | torch.eye(kind.shape[1], dtype=torch.bool, device=kind.device)
    least = apart.masked_fill(nobody.unsqueeze(1), torch.inf).amin((1, 3))  # (n, rows)
    alone = (kind < 0) | least.isinf()
    terms = -torch.log1p(-least.clamp(max=LARGEST)).masked_fill(alone, 0)
    return 100 * terms.sum(1) / (kind >= 0).sum(1).clamp(min=1)


def overlap(boxes: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """(n,) mean over a page's boxes of the shares of the box that the other boxes cover, added up, times 100.
    A box without area has none. boxes, kind: as of `alignment`."""
    low, high = sides(boxes)
    inner = torch.minimum(high.unsqueeze(2), high.unsqueeze(1)) - torch.maximum(
        low.unsqueeze(2), low.unsqueeze(1)
    )
    common = inner.clamp(min=0).prod(3)  # (n, rows, rows)
    there = (kind >= 0).to(boxes)
    others = there.unsqueeze(2) * there.unsqueeze(1) * (1 - torch.eye(kind.shape[1], device=kind.device))
    area = boxes[..., 2:].prod(2).unsqueeze(2)
    share = torch.where(area > 0, common / area.clamp(min=1e-12), 0)
    return 100 * (share * others).sum((1, 2)) / there.sum(1).clamp(min=1)


# ---------------------------------------------------------------- features


class FeatureNet(nn.Module):
    """64 features of a page with at least one box: (boxes (n, rows, 4), kind (n, rows)) -> (n, 64). The order
    of boxes and gaps do not matter."""

    def __init__(self, layers: int = 3):
        super().__init__()
        self.box = nn.Linear(4 + len(CLASSES) + 12 * EDGE_WAVES, WIDTH)
        self.pair = nn.Linear(40, 32)
        self.pair_out = nn.Linear(32, 16)
        self.layers = nn.ModuleList(Layer(WIDTH, 16, 4) for _ in range(layers))
        for layer in self.layers:  # gates of 1: nothing else modulates
            nn.init.ones_(layer.modulation[2]), nn.init.ones_(layer.modulation[5])
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, len(DISTURBANCES))

    def forward(self, boxes: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """The features, (n, 64)."""
        x, there = page_of(boxes, kind), (kind >= 0).unsqueeze(2)
        gaps = torch.zeros_like(boxes[..., 0]).masked_fill(kind < 0, -torch.inf).view(len(x), 1, 1, -1)
        edge = edges(x[..., :4])
        powers = torch.pi * 2 ** torch.arange(EDGE_WAVES, device=x.device)
        angles = (edge.unsqueeze(4) * powers).flatten(2)
        states = self.box(torch.cat([x, angles.sin(), angles.cos()], 2))
        pairs = self.pair_out(
            nn.functional.silu(self.pair(differences(edge, torch.zeros_like(boxes[:, 0, 0]))))
        )
        none = torch.zeros(len(x), 6, 1, WIDTH, device=x.device)
        for layer in self.layers:
            states = layer(states, pairs, gaps, none)
        states = self.norm(states) * there
        largest = states.masked_fill(~there, -torch.inf).amax(1)
        mean = states.sum(1) / there.sum(1)
        return self.out(torch.cat([mean, largest], 1))

    def classify(self, boxes: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
        """Logits of DISTURBANCES, (n, 5)."""
        return self.head(nn.functional.silu(self(boxes, kind)))

    @classmethod
    def load(cls, file: Path = FEATURES) -> "FeatureNet":
        """The network in the file, frozen, in float32."""
        with safetensors.safe_open(file, "pt") as stored:
            net = cls(json.loads(stored.metadata()["layers"]))
            net.load_state_dict({name: stored.get_tensor(name).float() for name in stored.keys()})
        return net.eval().requires_grad_(False)


def frechet_distance(features: torch.Tensor, reference: torch.Tensor) -> float:
    """Frechet distance of two normal distributions with the means and covariances of features (n, d) and
    (m, d): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))."""
    (mean, cov), (mean_r, cov_r) = ((f.double().mean(0), f.double().T.cov()) for f in (features, reference))
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_r @ root).clamp(min=0).sqrt().sum()
    return ((mean - mean_r).square().sum() + cov.trace() + cov_r.trace() - 2 * cross).item()
