"""Train the embedded diffusion model of layouts and the network that judges them, on pages of TeX manuals.

Run: python -m layouts.train --pdfs <folder of manuals>                        (into layouts/)
     python -m layouts.train --pdfs <folder> --device cuda --out base1 --seed 1 (another base)
Result: base.safetensors, the averaged weights in half precision; features.safetensors, the network of
judge.py; pages.npz, held-out pages and the multisets of classes of the others. The pages are read once from
PDF manuals of Debian packages (README.md in this folder) by pdf.py: --data keeps their boxes. Every sixth
manual is held out. The network learns v of equations (4) to (6) of pgraft_layouts.py with s = 0, at levels
u^1.5, u uniform: exact places are learnt at low levels.
"""

import io
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import tyro

from layouts.judge import DISTURBANCES, FeatureNet, alignment, frechet_distance, overlap
from layouts.model import (
    BOXES,
    HERE,
    MIDDLE,
    SCALE,
    SIZES,
    Device,
    Model,
    box_mask,
    boxes_of,
    check_device,
    counts_of,
    derived_seed,
    draw_noise,
    page_of,
    save_weights,
)
from layouts.pgraft_layouts import denoising_loss, sample
from utils.runs import InputError, check_range, write_atomically

FILES = ("base.safetensors", "features.safetensors", "pages.npz")
HELD_OUT = 6  # one manual of so many is held out
SHIFT, STRETCH = 0.015, 0.05  # pages are moved and stretched by at most so much in training
BLIND = 0.1  # share of the pages of which the network sees only the number of boxes


@dataclass
class Args:
    """Train the embedded diffusion model of layouts and the network that judges them."""

    out: Path = HERE  # folder for the result; no part of it may be there already
    pdfs: str = ""  # folder of the PDF manuals; only needed if --data is not there
    data: Path = Path("runs/layouts.npz")  # the boxes of the manuals' pages; made from --pdfs if not there
    seed: int = 0  # seed of everything
    device: Device = "auto"  # auto: CUDA if there is one

    width: int = SIZES["width"]  # of a box's state
    pair_width: int = SIZES["pair_width"]  # of a pair's state
    heads: int = SIZES["heads"]  # of attention
    layers: int = SIZES["layers"]  # of the transformer
    updates: int = 24_907  # optimiser updates
    batch: int = 512  # pages per update
    lr: float = 2e-3  # AdamW learning rate: warm-up, then cosine to 0
    ema: float = 0.999  # decay of the averaged weights, which are the ones saved
    feature_updates: int = 2500  # of the network that judges
    check: int = 1000  # pages sampled at the end
    steps: int = 20  # of the sampler at the end

    def __post_init__(self):
        """InputError for a value out of range."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "width", 1, 1024)
        check_range(self, "pair_width", 1, 1024)
        check_range(self, "heads", 1, 64)
        check_range(self, "layers", 1, 64)
        check_range(self, "updates", 1, 10**9)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_range(self, "ema", 0, 1)
        check_range(self, "feature_updates", 1, 10**9)
        check_range(self, "check", 1, 10**6)
        check_range(self, "steps", 1, 999)
        if self.width % self.heads:
            raise InputError(f"--heads {self.heads}: must divide --width {self.width}")


# ---------------------------------------------------------------- data


def read_manuals(folder: str) -> dict[str, np.ndarray]:
    """The pages of the PDF files below a folder: boxes (n, BOXES, 4) uint16, centre and size as shares of the
    page x 65535, kind (n, BOXES) int8, -1 for a gap, group (n,) int32, the manual's number. Of equal pages
    one is kept. InputError without PDF files or PyMuPDF."""
    from layouts.pdf import read_document

    files = sorted(Path(folder).rglob("*.pdf")) if folder else []
    if not files:
        raise InputError(f"--pdfs {folder}: no PDF files there; layouts/README.md names the packages")
    pages, seen = [], set()
    for group, file in enumerate(files):
        try:
            found = read_document(file, group)
        except ImportError:
            raise InputError("PyMuPDF is missing: pip install pymupdf, or give --data") from None
        for _, boxes, kind in found:
            place = np.zeros((BOXES, 4), np.uint16)
            place[: len(kind)] = np.rint(np.clip(boxes, 0, 1) * 65535)
            kinds = np.array([*kind, *[-1] * (BOXES - len(kind))], np.int8)
            key = (place >> 8).tobytes() + kinds.tobytes()
            if key not in seen:
                seen.add(key)
                pages.append((place, kinds, group))
    boxes, kind, group = zip(*pages)
    return {"boxes": np.stack(boxes), "kind": np.stack(kind), "group": np.array(group, np.int32)}


def load_data(path: Path, pdfs: str) -> dict[str, np.ndarray]:
    """What read_manuals returns, from the file `path`, which is written first if it is not there.
    InputError if it is damaged."""
    if not path.exists():
        start = time.perf_counter()
        data = read_manuals(pdfs)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, npz(**data))
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.0f} s", flush=True)
    try:
        with np.load(path) as file:
            return {name: file[name] for name in ("boxes", "kind", "group")}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
        raise InputError(f"--data {path}: is damaged ({error}); remove it") from None


def npz(**arrays: np.ndarray) -> bytes:
    """The content of a compressed .npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def split(data: dict[str, np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of the pages to train on, of the held-out pages, in random order): every sixth manual that has
    pages is held out."""
    manuals = np.unique(data["group"])
    rng = np.random.default_rng(derived_seed(seed, "split"))
    held_out = np.isin(data["group"], rng.permutation(manuals)[::HELD_OUT])
    return np.flatnonzero(~held_out), rng.permutation(np.flatnonzero(held_out))


# ---------------------------------------------------------------- the base


def learning_rate(update: int, updates: int, peak: float, warmup: int = 500) -> float:
    """Linear warm-up, then cosine to zero."""
    warmup = min(warmup, updates // 10)
    if update < warmup:
        return peak * (update + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (update - warmup) / (updates - warmup)))


def shaken(x_0: torch.Tensor, counts: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Pages x_0 (n, rows, 9), each stretched about the middle of the page and moved as a whole: what is
    aligned stays aligned. change: (n, 4) in [-1, 1], of the width, of the height, to the right, downwards."""
    scale = 1 + STRETCH * change[:, None, :2]  # (n, 1, 2)
    centre = x_0[..., :2] * scale + SCALE * SHIFT * change[:, None, 2:]
    size = [
        (x_0[..., i : i + 1] + SCALE * MIDDLE[i]) * scale[..., i - 2 : i - 1] - SCALE * MIDDLE[i]
        for i in (2, 3)
    ]
    return torch.cat([centre, *size, x_0[..., 4:]], 2) * box_mask(counts, x_0.shape[1])


def train(model: Model, x_0: torch.Tensor, counts: torch.Tensor, args: Args) -> None:
    """Train the model's network in place; it ends with the averaged weights. x_0: (n, BOXES, 9), counts:
    (n, 5). On CUDA an update is one graph, for it is hundreds of small operations."""
    x_0, counts = x_0.to(args.device), counts.to(args.device)
    parameters = [p.requires_grad_() for p in model.network.parameters()]
    averaged = [p.detach().clone() for p in parameters]
    rate = torch.zeros((), device=args.device)
    cuda = args.device == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=rate if cuda else 0.0, weight_decay=0.0, capturable=cuda, foreach=True
    )
    total = torch.zeros((), device=args.device)

    def update_once():
        index = torch.randint(len(x_0), (args.batch,), device=args.device)
        asked = counts[index]
        pages = shaken(x_0[index], asked, 2 * torch.rand(args.batch, 4, device=args.device) - 1)
        noise = torch.randn(pages.shape, device=args.device)
        level = (1 - torch.rand(args.batch, device=args.device)) ** 1.5
        seen = (torch.rand(args.batch, device=args.device) >= BLIND).float()
        loss = denoising_loss(model, pages, (1.0, 0.0), asked, level, noise, seen)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total.add_(loss.detach())

    torch.manual_seed(derived_seed(args.seed, "train"))
    replay = captured(update_once) if cuda else update_once
    total.zero_()
    start, every = time.perf_counter(), max(1, args.updates // 20)
    for update in range(args.updates):
        value = learning_rate(update, args.updates, args.lr)
        rate.fill_(value)
        if not cuda:
            optimizer.param_groups[0]["lr"] = value
        replay()
        decay = min(args.ema, (update + 1) / (update + 10))
        torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
        if (update + 1) % every == 0:
            left = (time.perf_counter() - start) / (update + 1) * (args.updates - update - 1)
            print(f"  update {update + 1}: loss {total.item() / every:.4f}, {left:.0f} s left", flush=True)
            total.zero_()
    with torch.no_grad():
        torch._foreach_copy_(parameters, averaged)
    model.network.requires_grad_(False)


def captured(update_once):
    """A function that does what `update_once` does, as one CUDA graph. The learning rate must be 0 now."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            update_once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update_once()
    return graph.replay


def report(model: Model, net: FeatureNet, boxes: torch.Tensor, kind: torch.Tensor, args: Args) -> None:
    """Print what the judge says of sampled pages with the classes of held-out ones, and of the held-out pages
    themselves. boxes, kind: of all held-out pages; the Frechet distances are to those after the first."""
    n = min(args.check, len(boxes) // 2)
    counts, drawn = counts_of(kind[:n]), []
    for i in range(0, n, 500):
        part = counts[i : i + 500]
        noise = draw_noise([derived_seed("check", j) for j in range(i, i + len(part))], args.steps)
        drawn.append(boxes_of(sample(model, noise, part, 1.0, args.steps)[1].cpu(), part))
    reference = net(boxes[n:], kind[n:])
    for name, (places, kinds) in (
        ("sampled", [torch.cat(parts) for parts in zip(*drawn)]),
        ("held out", (boxes[:n], kind[:n])),
    ):
        match = (counts_of(kinds) == counts).all(1).float().mean()
        print(
            f"{name}: alignment {alignment(places, kinds).mean():.3f}, "
            f"overlap {overlap(places, kinds).mean():.2f}, classes as asked {match:.3f}, "
            f"Frechet distance {frechet_distance(net(places, kinds), reference):.3f}"
        )


# ---------------------------------------------------------------- the network that judges


def disturb(boxes, kind, which, generator=None):
    """Pages (n, rows, 4) disturbed in the way `which` (n,), numbers of DISTURBANCES: not at all; some boxes
    moved; some resized; the classes of a page dealt anew; some boxes replaced by those of another page in the
    same row. Returns (boxes, kind). "Some" is a third of a page's boxes."""
    n, rows = kind.shape
    device = boxes.device

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    spread = 10 ** (-2.3 + 1.3 * torch.rand(n, 1, 1, generator=generator, device=device))  # 0.005 to 0.1
    some = (torch.rand(n, rows, 1, generator=generator, device=device) < 0.35) & (kind >= 0).unsqueeze(2)
    which = which.view(-1, 1, 1)
    moved = boxes[..., :2] + spread * normal(n, rows, 2) * (some & (which == 1))
    resized = boxes[..., 2:] * (4 * spread * normal(n, rows, 2)).exp().where(some & (which == 2), 1.0)
    order = torch.rand(n, rows, generator=generator, device=device).masked_fill(kind < 0, 2).argsort(1)
    dealt = torch.where(which[..., 0] == 3, kind.gather(1, order), kind)
    other = torch.randperm(n, generator=generator, device=device)
    swapped = some & (which == 4) & (kind[other] >= 0).unsqueeze(2)
    boxes = torch.cat([moved, resized.clamp(max=1)], 2)
    return boxes.where(~swapped, boxes[other]), dealt


def train_features(boxes: torch.Tensor, kind: torch.Tensor, args: Args) -> FeatureNet:
    """A FeatureNet on the CPU that tells how pages were disturbed. boxes: (n, BOXES, 4), kind: (n, BOXES)."""
    torch.manual_seed(derived_seed(args.seed, "features"))
    boxes, kind = boxes.to(args.device), kind.to(args.device)
    net = FeatureNet().to(args.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    for update in range(args.feature_updates):
        optimizer.param_groups[0]["lr"] = learning_rate(update, args.feature_updates, 2e-3)
        index = torch.randint(len(boxes), (256,), device=args.device)
        which = torch.randint(len(DISTURBANCES), (256,), device=args.device)
        logits = net.classify(*disturb(boxes[index], kind[index], which))
        loss = torch.nn.functional.cross_entropy(logits, which)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.cpu().eval().requires_grad_(False)


def main(args: Args) -> None:
    args.device = check_device(args.device)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    for name in FILES:
        if (args.out / name).exists():
            raise InputError(f"{args.out / name} exists: remove it or choose another --out")
    data = load_data(args.data, args.pdfs)
    start = time.perf_counter()
    rows, held_out = split(data, args.seed)
    boxes, kind = torch.from_numpy(data["boxes"] / np.float32(65535)), torch.from_numpy(data["kind"]).long()
    counts = counts_of(kind)
    args.out.mkdir(parents=True, exist_ok=True)
    parts = {"boxes": data["boxes"][held_out], "kind": data["kind"][held_out]}
    write_atomically(args.out / "pages.npz", npz(counts=counts[rows].numpy().astype(np.uint8), **parts))
    print(f"{len(rows)} pages to train on, {len(held_out)} held out", flush=True)

    net = train_features(boxes[rows], kind[rows], args)
    weights = {name: value.half() for name, value in net.state_dict().items()}
    metadata = {"layers": str(len(net.layers))}
    write_atomically(args.out / "features.safetensors", safetensors.torch.save(weights, metadata))
    which = torch.arange(len(held_out)) % len(DISTURBANCES)
    disturbed = disturb(boxes[held_out], kind[held_out], which, torch.Generator().manual_seed(0))
    right = net.classify(*disturbed).argmax(1) == which
    shares = ", ".join(
        f"{name} {right[which == i].float().mean():.2f}" for i, name in enumerate(DISTURBANCES)
    )
    print(f"judge: recognised of held-out pages {shares}; {time.perf_counter() - start:.0f} s", flush=True)

    torch.manual_seed(args.seed)
    sizes = {name: getattr(args, name) for name in ("width", "pair_width", "heads", "layers")}
    model = Model.new(sizes, args.device)
    print(f"{sum(p.numel() for p in model.network.parameters()):,} parameters", flush=True)
    train(model, page_of(boxes[rows], kind[rows]), counts[rows], args)
    model.network.half().float()  # what is saved
    weights = {name: value.half() for name, value in model.network.state_dict().items()}
    save_weights(weights, sizes, args.out / "base.safetensors")
    print(f"{args.out}: {time.perf_counter() - start:.0f} s", flush=True)
    report(model, net, boxes[held_out], kind[held_out], args)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, use_underscores=True))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
