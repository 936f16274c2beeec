"""The diffusion model of layouts: a transformer on the boxes of a page, its noise levels, its LoRA.

A page is a row of up to 12 boxes: centre and size, mapped to about [-2, 2], and half a one-hot of the class.
The condition is the multiset of classes: how many boxes of each the page has. The network is a transformer
without positions, so that the order of boxes does not matter. Attention sees how the edges of two boxes
differ, because whether boxes are aligned or overlap is decided by pairs. Level and condition enter by
adaptive layer norm, zero at first, as in DiT (arXiv 2212.09748). It predicts v = alpha eps - sigma x_0.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

from utils.processes import LOCAL_SIZE
from utils.runs import InputError, write_atomically

HERE = Path(__file__).resolve().parent
EMBEDDED = str(HERE / "base.safetensors")  # the embedded model
PAGES = HERE / "pages.npz"  # held-out pages, and the multisets of classes that a run samples
TUNED_FILE = "tuned.safetensors"  # what pgraft_layouts.py leaves
Device = Literal["auto", "cpu", "cuda"]  # auto: CUDA if there is one
CLASSES = ("title", "text", "list", "figure", "other")
BOXES = 12  # the most boxes of a page
CHANNELS = 4 + len(CLASSES)  # of a box: centre x, centre y, width, height, class
MIDDLE = (0.5, 0.5, 0.5, 0.15)  # of centre x, centre y, width, height, as shares of the page
SCALE = 4.0  # of the page; makes places about as large as the noise
HALF = 0.5  # a box's class is this times a one-hot
SIZES = {"width": 128, "pair_width": 32, "heads": 4, "layers": 6}  # of the embedded model
WAVES = 16  # sines that describe a level
EDGE_WAVES = 4  # sines that describe an edge, each twice as fast as the last


# ---------------------------------------------------------------- the space of pages


def page_of(boxes: torch.Tensor, kind: torch.Tensor) -> torch.Tensor:
    """x_0 (n, rows, 9) of boxes (n, rows, 4), centre and size as shares of the page, and kind (n, rows), -1
    for a gap."""
    one_hot = nn.functional.one_hot(kind.long() + 1, len(CLASSES) + 1)[..., 1:]  # a gap is all zeros
    place = (boxes - boxes.new_tensor(MIDDLE)) * SCALE * (kind >= 0).unsqueeze(-1)
    return torch.cat([place, HALF * one_hot], -1)


def boxes_of(x_0: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(boxes (n, rows, 4), kind (n, rows)) of x_0 (n, rows, 9): what page_of takes. Sizes are at least 0."""
    mask = box_mask(counts, x_0.shape[1])
    place = x_0[..., :4] / SCALE + x_0.new_tensor(MIDDLE)
    boxes = torch.cat([place[..., :2], place[..., 2:].clamp(min=0)], -1) * mask
    return boxes, torch.where(mask[..., 0] > 0, x_0[..., 4:].argmax(-1), -1)


def counts_of(kind: torch.Tensor) -> torch.Tensor:
    """The condition (n, 5), how many boxes of each class, of kind (n, rows), -1 for a gap."""
    return torch.stack([(kind == c).sum(-1) for c in range(len(CLASSES))], -1)


def box_mask(counts: torch.Tensor, rows: int) -> torch.Tensor:
    """(batch, rows, 1), 1 for a box and 0 for a gap; gaps are last. counts: (batch, 5)."""
    return (torch.arange(rows, device=counts.device) < counts.sum(1, keepdim=True)).float().unsqueeze(2)


# ---------------------------------------------------------------- the network


def edges(place: torch.Tensor) -> torch.Tensor:
    """(..., 2, 3) left, middle, right and top, middle, bottom of place (..., 4), as shares of the page, the
    middle of the page at 0."""
    centre = place[..., :2] / SCALE
    half = torch.stack([(place[..., i] / SCALE + MIDDLE[i]) / 2 for i in (2, 3)], -1)
    return torch.stack([centre - half, centre, centre + half], -1)


def differences(edge: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """(b, n, n, 40) what a box sees of another: how equal edges and opposite edges differ, at four scales,
    one of which follows the noise. edge: (b, n, 2, 3), sigma: (b,)."""
    mine, other = edge.unsqueeze(2), edge.unsqueeze(1)  # of the box that looks; of the one it looks at
    opposite = mine[..., ::2] - other[..., ::2].flip(-1)  # (b, n, n, 2, 2) left to right, right to left
    apart = torch.cat([mine - other, opposite], 4).flatten(3)  # (b, n, n, 10)
    noise = sigma.view(-1, 1, 1, 1) / SCALE  # as a share of the page
    return torch.cat([(apart / scale).tanh() for scale in (1.0, 0.1, 0.02, 2 * noise + 0.005)], 3)


class Layer(nn.Module):
    """Attention among the boxes of a page, then a perceptron for each box; both modulated, as in DiT."""

    def __init__(self, width: int, pair_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.bias = nn.Linear(pair_width, heads)
        self.mixed = nn.Linear(width + heads * pair_width, width)
        self.hidden = nn.Linear(width, 4 * width)
        self.hidden_out = nn.Linear(4 * width, width)
        self.modulation = nn.Parameter(torch.zeros(6, 1, width))  # added to what all layers share

    def forward(self, states, pairs, gaps, modulation):
        """states: (b, n, width), pairs: (b, n, n, pair_width), gaps: (b, 1, 1, n) -inf for a gap, modulation:
        (b, 6, 1, width)."""
        shift, scale, gate, shift_2, scale_2, gate_2 = (modulation + self.modulation).unbind(1)
        normed = self.norm(states) * (1 + scale) + shift
        q, k, v = (
            self.qkv(normed).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (b, heads, n, .)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3]) + self.bias(pairs).permute(0, 3, 1, 2) + gaps
        weight = scores.softmax(3)  # (b, heads, n, n)
        seen = torch.einsum("bhij,bijp->bihp", weight, pairs).flatten(2)  # (b, n, heads x pair_width)
        received = (weight @ v).transpose(1, 2).flatten(2)  # (b, n, width)
        states = states + gate * self.mixed(torch.cat([received, seen], 2))
        hidden = nn.functional.silu(self.hidden(self.norm(states) * (1 + scale_2) + shift_2))
        return states + gate_2 * self.hidden_out(hidden)


class Network(nn.Module):
    """(x, level, counts) -> v, like x. A permutation of the boxes of x does the same to v."""

    def __init__(self, width: int, pair_width: int, heads: int, layers: int):
        super().__init__()
        self.box = nn.Linear(CHANNELS + 12 * EDGE_WAVES, width)
        self.box_out = nn.Linear(width, width)
        self.number = nn.Embedding(BOXES + 1, width)
        self.counts = nn.Embedding(len(CLASSES) * (BOXES + 1), width)
        self.level = nn.Linear(4 * WAVES, width)
        self.level_out = nn.Linear(width, width)
        self.pair = nn.Linear(40, 2 * pair_width)
        self.pair_level = nn.Linear(width, 2 * pair_width)
        self.pair_out = nn.Linear(2 * pair_width, pair_width)
        self.modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(Layer(width, pair_width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, CHANNELS)
        for layer in (self.modulation, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, level, counts, seen):
        """x: (batch, rows, 9), level: (batch,) in [0, 1], from page to noise, counts: (batch, 5), seen:
        (batch,) 1, or 0 where the network sees only the number of boxes. There may be any number of rows for
        gaps. Nothing here waits for the device."""
        mask = box_mask(counts, x.shape[1])
        gaps = torch.zeros_like(mask).masked_fill(mask == 0, -math.inf).view(len(x), 1, 1, -1)
        # the logarithm tells low levels apart
        angles = torch.stack([level * (math.pi / 2), (level + 0.01).log() / 2], 1)  # (batch, 2)
        angles = (angles.unsqueeze(2) * torch.arange(1, WAVES + 1, device=x.device)).flatten(1)
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        rows = counts + (BOXES + 1) * torch.arange(len(CLASSES), device=x.device)  # of the embedding
        asked = self.counts(rows).sum(1) * seen.unsqueeze(1)
        condition = self.level_out(nn.functional.silu(self.level(waves)))
        condition = nn.functional.silu(condition + self.number(counts.sum(1)) + asked)  # (batch, width)
        edge = edges(x[..., :4])  # (batch, rows, 2, 3)
        angles = (edge.unsqueeze(4) * (math.pi * 2 ** torch.arange(EDGE_WAVES, device=x.device))).flatten(2)
        states = nn.functional.silu(self.box(torch.cat([x, angles.sin(), angles.cos()], 2)))
        states = self.box_out(states)
        apart = differences(edge, (level * (math.pi / 2)).sin())
        pairs = self.pair(apart) + self.pair_level(condition).view(len(x), 1, 1, -1)
        pairs = self.pair_out(nn.functional.silu(pairs))
        modulation = self.modulation(condition).unflatten(1, (6, 1, -1))
        for layer in self.layers:
            states = layer(states, pairs, gaps, modulation)
        return self.out(self.norm(states)) * mask


# ---------------------------------------------------------------- the network, its levels and its LoRA


class Model:
    """A network, frozen, and what P-GRAFT needs of it. switch: the level above which the network was tuned,
    and below which the base model goes on; 0 of a network for all levels."""

    def __init__(self, network: Network, sizes: dict, switch: float, device: str):
        self.sizes, self.switch, self.device = sizes, switch, device
        self.network = network.to(device).eval().requires_grad_(False)

    @classmethod
    def new(cls, sizes: dict, device: str) -> "Model":
        """A network with random weights."""
        return cls(Network(**sizes), sizes, 0.0, device)

    @classmethod
    def load(cls, name: str, device: str) -> "Model":
        """The network in the file `name`, in float32. InputError if it cannot be loaded."""
        try:
            with safetensors.safe_open(name, "pt") as file:
                sizes, switch = json.loads(file.metadata()["sizes and switch"])
                network = Network(**sizes)
                network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})
        except Exception as error:  # a missing or damaged file makes the loaders raise many kinds
            raise InputError(
                f"--model {name}: cannot be loaded ({error}); give a file that layouts/train.py or "
                "layouts/pgraft_layouts.py has written"
            ) from None
        return cls(network, sizes, switch, device)

    def predict(self, x, level, counts, seen=None) -> torch.Tensor:
        """v, like x. x: (batch, rows, 9), level: () or (batch,), counts: (batch, 5). seen: (batch,), 0 where
        the network is to see only the number of boxes; None: nowhere."""
        seen = torch.ones(len(x), device=x.device) if seen is None else seen
        return self.network(x, level.expand(len(x)), counts, seen)

    def levels(self, steps: int) -> list:
        """The levels at which the sampler's steps start, from noise on. The last step ends at 0. Their roots
        are evenly spaced: the exact place of a box is decided at low levels."""
        return [round(((steps - k) / steps) ** 2, 9) for k in range(steps)]  # so that --switch can name them

    def alpha_sigma(self, level: float | torch.Tensor) -> tuple:
        """alpha and sigma, cos and sin of level pi / 2. Floats for a number, tensors for a tensor."""
        if isinstance(level, torch.Tensor):
            return (level * (math.pi / 2)).cos(), (level * (math.pi / 2)).sin()
        return math.cos(level * math.pi / 2), math.sin(level * math.pi / 2)

    # ------------------------------------------------------------ LoRA

    def add_lora(self, rank: int, alpha: float, seed: int) -> list[torch.nn.Parameter]:
        """Add a LoRA to every linear layer, without effect at first; returns its parameters."""
        from peft import LoraConfig, inject_adapter_in_model

        layers = [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear)]
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights="gaussian")
        inject_adapter_in_model(config, self.network)
        return list(self.lora().values())

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA's parameters by name."""
        return {n: p for n, p in self.network.named_parameters() if "lora_" in n}

    def lora_layers(self) -> list[nn.Module]:
        """The layers that have a LoRA."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        return [m for m in self.network.modules() if isinstance(m, BaseTunerLayer)]

    @contextlib.contextmanager
    def lora_merged(self):
        """Inside, the LoRA is merged into the weights: as fast as the plain model. Afterwards the weights are
        restored bit by bit."""
        layers = self.lora_layers()
        saved = [layer.get_base_layer().weight.detach().clone() for layer in layers]
        try:
            for layer in layers:
                layer.merge()
            yield
        finally:
            for layer, weight in zip(layers, saved):
                layer.get_base_layer().weight.data.copy_(weight)
                layer.merged_adapters.clear()  # unmerge() would subtract and leave rounding errors

    @contextlib.contextmanager
    def lora_off(self):
        """Inside, the model is the base model."""
        for layer in self.lora_layers():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.lora_layers():
                layer.enable_adapters(True)  # also makes the parameters trainable again

    def save_tuned(self, folder: Path, switch: float) -> None:
        """Write tuned.safetensors: the network with the LoRA merged, tuned above the level `switch`."""
        with self.lora_merged():
            state = {k: v for k, v in self.network.state_dict().items() if "lora_" not in k}
            weights = {name.replace("base_layer.", ""): value for name, value in state.items()}
            save_weights(weights, self.sizes, folder / TUNED_FILE, switch)


def save_weights(weights: dict[str, torch.Tensor], sizes: dict, path: Path, switch: float = 0.0) -> None:
    """Atomically write the weights of a network, its sizes and its switch, as `load` reads them."""
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    metadata = {"sizes and switch": json.dumps([sizes, switch])}  # of several the order is random
    write_atomically(path, safetensors.torch.save(weights, metadata))


# ---------------------------------------------------------------- as in common.py


def check_device(device: str) -> str:
    """The device that will be used, "cuda" or "cpu". InputError without CUDA."""
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: no CUDA device found; use --device cpu, or install a CUDA build of torch"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and LOCAL_SIZE > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node {LOCAL_SIZE}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "start as many processes, or use --device cpu"
        )
    return device


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on nothing but the key, so that one image or update can be made again alone.

    A key of fewer than four 32-bit words is filled up with zeros, so short keys that differ only by zeros at
    the end give the same seed. tests/test_seeds.py lists the keys in use and searches for collisions.
    """
    words = [w if isinstance(w, int) else int.from_bytes(w.encode(), "big") for w in key]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def draw_noise(seeds: list[int], steps: int) -> torch.Tensor:
    """(steps + 1, n, BOXES, 9): the initial noise, then one draw a step, from a CPU generator a seed."""
    generators = (torch.Generator().manual_seed(s) for s in seeds)
    return torch.stack([torch.randn(steps + 1, BOXES, CHANNELS, generator=g) for g in generators], 1)


def check_finite(where: str, loss: float, norm: float) -> None:
    """InputError for a loss or gradient norm that is NaN or Inf."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(f"{where}: loss {loss}, gradient norm {norm}; lower --lr")
