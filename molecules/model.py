"""The diffusion model of molecules: an E(3)-equivariant network, its noise levels, its LoRA.

A molecule is a row of up to 9 heavy atoms, hydrogens left out: coordinates in units of SCALE and half a
one-hot of the element. The network is an EGNN (arXiv 2102.09844) that sees distances only, with a state for
every pair of atoms. It predicts v = alpha eps - sigma x_0 in the space in which the coordinates of a molecule
have the mean zero, as in EDM (arXiv 2203.17003).
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
KNOWN = HERE / "known.npy"  # hashes of the molecules of QM9
TUNED_FILE = "tuned.safetensors"  # what graft_molecules.py leaves
Device = Literal["auto", "cpu", "cuda"]  # auto: CUDA if there is one
ELEMENTS = ("C", "N", "O", "F")
ATOMS = 9  # the most heavy atoms of a molecule
CHANNELS = 3 + len(ELEMENTS)  # of an atom: coordinates, element
SCALE = 1.5  # Angstrom; makes coordinates about as large as the noise
HALF = 0.5  # an atom's element is this times a one-hot
SIZES = {"width": 160, "pair_width": 64, "layers": 6}  # of the embedded model
RADII = 24  # Gaussians that describe a distance
WAVES = 16  # sines that describe a level


# ---------------------------------------------------------------- the space of molecules


def atom_mask(count: torch.Tensor, rows: int) -> torch.Tensor:
    """(batch, rows, 1), 1 for an atom and 0 for a gap. count: (batch,) atoms of each molecule."""
    return (torch.arange(rows, device=count.device) < count[:, None]).float().unsqueeze(2)


def project(x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """x (batch, rows, 7) with each molecule's coordinates moved to the mean zero, and gaps set to zero."""
    mask = atom_mask(count, x.shape[1])
    mean = (x[..., :3] * mask).sum(1, keepdim=True) / count.view(-1, 1, 1)
    return torch.cat([x[..., :3] - mean, x[..., 3:]], 2) * mask


# ---------------------------------------------------------------- the network


class Radial(nn.Module):
    """Distances (..., 1) in units of SCALE -> (..., RADII) Gaussians: narrow ones at the lengths of bonds and
    between next neighbours, wide ones for the rest."""

    def __init__(self):
        super().__init__()
        centres = torch.cat([torch.linspace(0.6, 2.1, 16), torch.linspace(0, 7, RADII - 16)])
        widths = torch.tensor([0.1] * 16 + [1.0] * (RADII - 16))
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("widths", widths, persistent=False)

    def forward(self, distance: torch.Tensor) -> torch.Tensor:
        return (-0.5 * ((distance - self.centres) / self.widths).square()).exp()


class Layer(nn.Module):
    """One round of messages between all pairs of atoms. Changes coordinates, atom states and pair states."""

    def __init__(self, width: int, pair_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.sender = nn.Linear(width, pair_width)
        self.receiver = nn.Linear(width, pair_width)
        self.radial = Radial()
        self.pair = nn.Linear(pair_width + RADII, pair_width)
        self.message = nn.Linear(pair_width, pair_width)
        self.gate = nn.Linear(pair_width, 1)
        self.move = nn.Linear(pair_width, pair_width)
        self.move_out = nn.Linear(pair_width, 1, bias=False)
        self.update = nn.Linear(width + pair_width, width)
        self.update_out = nn.Linear(width, width)

    def forward(self, place, states, pairs, pair_mask):
        """place: (b, n, 3), states: (b, n, width), pairs: (b, n, n, pair_width), pair_mask: (b, n, n, 1)."""
        apart = place.unsqueeze(2) - place.unsqueeze(1)  # (b, n, n, 3)
        distance = (apart.square().sum(3, keepdim=True) + 1e-8).sqrt()
        normed = self.norm(states)
        ends = self.receiver(normed).unsqueeze(2) + self.sender(normed).unsqueeze(1)
        hidden = nn.functional.silu(ends + self.pair(torch.cat([pairs, self.radial(distance)], 3)))
        pairs = pairs + nn.functional.silu(self.message(hidden))
        received = (pairs * (self.gate(pairs).sigmoid() * pair_mask)).sum(2) / 4  # (b, n, pair_width)
        weight = self.move_out(nn.functional.silu(self.move(pairs))) * pair_mask
        place = place + (apart / (distance + 1) * weight).sum(2) / 4
        hidden = nn.functional.silu(self.update(torch.cat([normed, received], 2)))
        return place, states + self.update_out(hidden), pairs


class Network(nn.Module):
    """(x, level, count) -> v, like x. Rotations, reflections and permutations of x do the same to v."""

    def __init__(self, width: int, pair_width: int, layers: int):
        super().__init__()
        self.elements = nn.Linear(len(ELEMENTS), width)
        self.count = nn.Embedding(ATOMS + 1, width)
        self.level = nn.Linear(2 * WAVES, width)
        self.level_out = nn.Linear(width, width)
        self.pair_width = pair_width
        self.layers = nn.ModuleList(Layer(width, pair_width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, len(ELEMENTS))
        torch.nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor, level: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """x: (batch, rows, 7), level: (batch,) in [0, 1], from molecule to noise, count: (batch,). There may
        be any number of rows for gaps."""
        rows = x.shape[1]
        mask = atom_mask(count, rows)
        # no atom sends to itself, and no gap sends
        pair_mask = mask.unsqueeze(1) * (1 - torch.eye(rows, device=x.device))[..., None]
        angles = level[:, None] * (math.pi / 2 * torch.arange(1, WAVES + 1, device=x.device))
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        condition = self.level_out(nn.functional.silu(self.level(waves))) + self.count(count)
        place, states = x[..., :3], self.elements(x[..., 3:]) + condition.unsqueeze(1)
        pairs = x.new_zeros(len(x), rows, rows, self.pair_width)
        for layer in self.layers:
            place, states, pairs = layer(place, states, pairs, pair_mask)
        return project(torch.cat([place - x[..., :3], self.out(self.norm(states))], 2), count)


# ---------------------------------------------------------------- the network, its levels and its LoRA


class Model:
    """A network, frozen, and what GRAFT needs of it. name: of the file that holds it."""

    def __init__(self, name: str, network: Network, sizes: dict, device: str):
        self.name, self.sizes, self.device = name, sizes, device
        self.prediction_type = "v_prediction"
        self.network = network.to(device).eval().requires_grad_(False)

    @classmethod
    def new(cls, sizes: dict, device: str) -> "Model":
        """A network with random weights."""
        return cls("", Network(**sizes), sizes, device)

    @classmethod
    def load(cls, name: str, device: str) -> "Model":
        """The network in the file `name`, in float32. InputError if it cannot be loaded."""
        try:
            with safetensors.safe_open(name, "pt") as file:
                sizes = json.loads(file.metadata()["sizes"])
                network = Network(**sizes)
                network.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})
        except Exception as error:  # a missing or damaged file makes the loaders raise many kinds
            raise InputError(
                f"--model {name}: cannot be loaded ({error}); give a file that molecules/train.py or "
                "molecules/graft_molecules.py has written"
            ) from None
        return cls(name, network, sizes, device)

    def predict(self, x: torch.Tensor, level: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """v, like x. x: (batch, rows, 7), level: () or (batch,), count: (batch,)."""
        return self.network(x, level.expand(len(x)), count)

    def levels(self, steps: int) -> list:
        """The levels at which the sampler's steps start, from noise on. The last step ends at 0."""
        return [1 - k / steps for k in range(steps)]

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

    def save_tuned(self, folder: Path) -> None:
        """Write tuned.safetensors: the network with the LoRA merged, for --model and `load`."""
        with self.lora_merged():
            state = {k: v for k, v in self.network.state_dict().items() if "lora_" not in k}
            weights = {name.replace("base_layer.", ""): value for name, value in state.items()}
            save_weights(weights, self.sizes, folder / TUNED_FILE)


def save_weights(weights: dict[str, torch.Tensor], sizes: dict, path: Path) -> None:
    """Atomically write the weights of a network and its sizes, as `load` reads them."""
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_atomically(path, safetensors.torch.save(weights, {"sizes": json.dumps(sizes)}))


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
    """(steps + 1, n, ATOMS, 7): the initial noise, then one draw a step, from a CPU generator a seed."""
    generators = (torch.Generator().manual_seed(s) for s in seeds)
    return torch.stack([torch.randn(steps + 1, ATOMS, CHANNELS, generator=g) for g in generators], 1)


def check_finite(where: str, loss: float, norm: float) -> None:
    """InputError for a loss or gradient norm that is NaN or Inf."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise InputError(f"{where}: loss {loss}, gradient norm {norm}; lower --lr")
