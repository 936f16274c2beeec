"""Inverse Noise Correction: better initial noise for a frozen flow model, learnt from pictures alone, without a reward.
Paper: "Fine-Tuning Diffusion Models via Intermediate Distribution Shaping", arXiv 2510.02692.   Run: python inverse_noise_correction.py

Notation  x_sigma = (1 - sigma) x + sigma eps, sigma from 1 (noise) to 0 (picture); the frozen model's velocity v(x, sigma) estimates
          eps - x; 1 = sigma_0 > ... > sigma_N = 0 the grid; T the sampler with these N steps; Q the law of z = T^-1(picture).
Equations (1) T:     x_{k+1} = x_k + (sigma_{k+1} - sigma_k) v(x_k, sigma_k),  k = 0..N-1
          (2) T^-1:  for k = N-1..0 iterate  x <- x_{k+1} - (sigma_{k+1} - sigma_k) v(x, sigma_k)  until x stands still: that is x_k
          (3) corrector u: y_t = cos(pi t / 2) eps + sin(pi t / 2) w, loss E |u(y_t, t) - dy_t / dt|^2, w the standardised z; the
              exact u is 0 if Q is Gaussian, so that a network which starts at 0 starts as the Gaussian control
Sampling  eps -> M Euler steps of u -> w -> z -> T -> picture: T of Q is the law of the pictures, whatever v and N are.
Choices that the paper leaves open: the interpolant (3); z is standardised by its mean and covariance, or by its deviation alone where
there are too few pictures for a covariance (--normalise); u = a + b y with a and b from the network, which is also told |y|, because its
normalisation layers would hide it and inverted noises differ from a Gaussian in their norm first of all; equation (2) is solved with
Anderson acceleration (a fifth fewer calls, and it converges where the plain iteration does not); the averaged weights with the best
held-out loss are kept.
"""

import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from tqdm import tqdm

import rewards as run  # rewards.py: besides metrics, arguments, run folder, tables, pictures
from common import ROOT, check_device, derived_seed, draw_noise
from rewards import frechet_distance, frechet_features
from shapes import flow as flows
from shapes import flow_data
from shapes.flow import Flow, count_flops, fit

LIMITS = {"steps": (2, 1000), "pictures": (20, 10**7), "eval_pictures": (20, 10**6), "size": (1, 1024), "channels": (1, 10**6)}
LIMITS |= dict.fromkeys(("updates", "base_updates", "max_iterations", "corrector_steps", "checkpoint_every"), (1, 10**9))
LIMITS |= {"base_lr": (1e-12, 1), "longer_lr": (1e-12, 1), "data_noise": (0, 10), "reference_share": (0.05, 0.95)}
LIMITS |= {"grid_power": (0.1, 10), "memory": (0, 20), "tolerance": (1e-7, 1), "max_failed": (0, 1), "held_out": (0.01, 0.9)}
LISTS = {"eval_steps": (int, 1, 10**4), "eval_powers": (float, 0.1, 10), "eval_corrector_steps": (int, 1, 10**4)}
CHOICES = {"features": ("shapes", "pixels", "inception"), "normalise": ("", "scale", "gaussian")}
MOST_COVARIANCE = 4096  # numbers in a picture; beyond, their covariance would be larger than any model here


@dataclass
class Args:
    """Inverse Noise Correction: invert pictures through a flow model and learn the law of their noises."""

    seed: int = 0  # seed of the training run; evaluation noises and reference pictures do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: str = "auto"  # auto (CUDA if there is one), cpu or cuda; everything is computed in float32

    model: str = str(ROOT / "shapes" / "flow")  # folder with unet/ or transformer/, and scheduler/ (FlowMatchEulerDiscrete)
    data: str = ""  # folder of pictures; left out: the embedded world of shapes
    data_noise: float = 0.0  # standard deviation of noise added to every picture, values in [-1, 1]; helps the inversion
    reference_share: float = 0.5  # share of --data kept for the Frechet distance, never trained on

    train_base: bool = False  # first train a flow on the pictures; --model is then not used
    size: int = 16  # --train_base: pixels of a side
    channels: int = 1  # --train_base: 1 grey, 3 RGB
    base_network: str = "unet:32,64,64"  # --train_base: see new_network in shapes/flow.py
    base_updates: int = 8000  # --train_base: optimiser updates
    base_lr: float = 1e-3  # --train_base: AdamW learning rate

    steps: int = 6  # N, Euler steps of the sampler that is inverted and corrected
    grid_power: float = 1.0  # sigma_k = (1 - k / N)^power, before the scheduler's own shift; 1: even steps
    sample_batch: int = 500  # pictures inverted or sampled at a time

    pictures: int = 20_000  # pictures to invert, at most
    tolerance: float = 1e-3  # a step of the inversion has converged when its pixels change by less (root mean square)
    max_iterations: int = 60  # model calls per step of the inversion, at most
    memory: int = 2  # changes that Anderson acceleration combines; 0: the plain fixed-point iteration
    max_failed: float = 0.1  # stop if a larger share of the pictures does not converge

    corrector_network: str = "token:64,64"  # see shapes/flow.py; for pictures above 8 x 8 such as "unet:16,32,32"
    corrector_steps: int = 4  # M, Euler steps of the corrector
    normalise: str = ""  # gaussian or scale; left out: gaussian if there are ten noises for each number of a picture
    held_out: float = 0.1  # share of the inverted noises that choose the weights and are not trained on
    updates: int = 4000  # optimiser updates of the corrector
    batch: int = 256  # pictures per update, also of the base
    lr: float = 1e-3  # AdamW learning rate of the corrector, warm-up, then cosine to 0
    checkpoint_every: int = 250  # updates between two checkpoints

    features: str = ""  # shapes (embedded pictures), pixels (means over 8 x 8 fields) or inception (needs torch-fidelity)
    eval_pictures: int = 4000  # pictures per row of the table
    eval_steps: str = ""  # steps of the base alone, beside N; left out: as many as the corrected sampler's FLOPs buy, 2N, 4N
    eval_powers: str = "0.7,1.4"  # other grids on which the base is shown, with as many steps as the corrected FLOPs buy
    eval_corrector_steps: str = "2,8"  # other M with which the corrector is shown
    longer: bool = True  # control: train the base on for as many FLOPs as inversion and corrector took
    longer_lr: float = 5e-4  # its learning rate


# ================================================================ equations: tensors in, tensors out


@torch.no_grad()
def euler_sample(velocity, noise, sigmas):
    """T, equation (1). velocity(x (batch, ...), sigma (batch,)); noise (batch, ...); sigmas (N + 1,) from 1 to 0 -> (batch, ...)."""
    x = noise
    for now, after in zip(sigmas, sigmas[1:]):
        x = x + (after - now) * velocity(x, now.expand(len(x)))
    return x


@dataclass
class Inversion:
    """What euler_invert found."""

    noise: torch.Tensor  # (batch, ...), that right side of the last step; without meaning where not converged
    residual: torch.Tensor  # (batch,) root mean square of right side of (2) - x at the last guess x, in the worst step
    iterations: list  # (N,) model calls of the slowest sample in each step
    converged: torch.Tensor  # (batch,) bool
    contraction: list  # (N,) |change of the right side of (2)| / |change of x|, a sample's largest, median over the samples
    calls: int  # model calls, summed over the samples


@torch.no_grad()
def euler_invert(velocity, x, sigmas, max_iterations, tolerance, memory=2):
    """T^-1, equation (2). x: (batch, ...), sigmas as in euler_sample -> Inversion. Only samples that have neither converged in
    the step nor failed in an earlier one cost model calls. memory: 0 is the plain iteration, which needs a contraction; above 0
    the last changes are combined (Anderson acceleration, doi 10.1137/10078356X, each sample by itself), which does not."""
    shape, x = x.shape, x.flatten(1)  # (batch, d)
    residual = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    iterations, contraction, calls = [], [], 0
    for now, after in reversed(list(zip(sigmas, sigmas[1:]))):
        guess, slope, change = x.clone(), torch.full_like(residual, math.nan), torch.full_like(residual, math.inf)
        tried = active = (residual <= tolerance).nonzero().squeeze(1)  # (active,) indices
        count, history = 0, []
        while len(active) and count < max_iterations:
            old = guess[active]
            v = velocity(old.unflatten(1, shape[1:]), now.expand(len(active))).flatten(1)
            new = x[active] - (after - now) * v
            calls, count = calls + len(active), count + 1
            change[active] = (new - old).square().mean(1).sqrt()
            history = [*history, torch.stack([old, new])][-1 - max(memory, 1) :]  # each (2, active, d)
            moves = torch.stack(history).diff(dim=0)  # (moves, 2, active, d)
            if len(moves):
                length = moves[-1].norm(dim=2)  # (2, active)
                slope[active] = torch.fmax(slope[active], length[1] / length[0])
            guess[active] = new
            unfinished = (change[active] > tolerance) & change[active].isfinite()
            active, history = active[unfinished], [pair[:, unfinished] for pair in history]
            if memory and len(moves):
                guess[active] = anderson(new[unfinished], old[unfinished], moves[:, :, unfinished])
        residual[tried] = torch.maximum(residual[tried], change[tried])
        iterations.append(count)
        contraction.append(slope.nanmedian().item())
        x = guess
    return Inversion(x.view(shape), residual, iterations[::-1], residual <= tolerance, contraction[::-1], calls)


def anderson(new, old, moves):
    """The next guess: new = g(old) minus the combination of the last moves that cancels most of new - old. new, old: (batch, d),
    moves: (number, 2, batch, d), the last changes of old and of new."""
    change = (moves[:, 1] - moves[:, 0]).transpose(0, 1)  # (batch, number, d)
    gram = change @ change.mT
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(gram.dtype).tiny  # (batch,)
    gram = gram + ridge[:, None, None] * torch.eye(len(moves)).to(gram)
    weight = torch.linalg.solve(gram, change @ (new - old).unsqueeze(2))  # (batch, number, 1)
    return new - (moves[:, 1].transpose(0, 1) * weight).sum(1)


def interpolant(eps, w, t):
    """(y_t, dy_t / dt) of equation (3). eps, w: (batch, ...), t: (batch,) in [0, 1]."""
    angle = 0.5 * math.pi * t.view(-1, *[1] * (w.dim() - 1))
    return angle.cos() * eps + angle.sin() * w, 0.5 * math.pi * (angle.cos() * w - angle.sin() * eps)


@torch.no_grad()
def correct(velocity, noise, steps):
    """M = steps Euler steps of dy / dt = velocity(y (batch, ...), t (batch,)) from t = 0 to 1 -> (batch, ...)."""
    y = noise
    for m in range(steps):
        y = y + velocity(y, torch.full((len(y),), m / steps, dtype=y.dtype, device=y.device)) / steps
    return y


def gaussian_of(z):
    """{mean (d,), root of the covariance and that root's inverse (d, d), both symmetric} of z (n, ...), d the numbers in one."""
    flat = z.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(flat.T).reshape(flat.shape[1], -1))
    values = values.clamp(min=1e-6 * values.max().item()).sqrt()
    law = {"mean": flat.mean(0), "root": vectors * values @ vectors.T, "inverse": vectors / values @ vectors.T}
    return {name: part.float() for name, part in law.items()}


def match_norms(eps, norms):
    """eps (n, ...) from N(0, I) with its lengths moved to the law of `norms` (m,), order kept: |eps|^2 is chi-squared."""
    length = eps.flatten(1).norm(dim=1)  # (n,)
    quantile = torch.special.gammainc(torch.tensor(eps[0].numel() / 2).to(length), length.square() / 2)
    return eps * (torch.quantile(norms, quantile) / length).view(-1, *[1] * (eps.dim() - 1))


# ================================================================ corrector


class Corrector:
    """eps -> z, equation (3). It belongs to one sampler T, named in `settings`, and load() refuses any other. In use:
    corrector = Corrector.load(folder, network, scheduler);  latents = corrector(torch.randn(n, channels, height, width))."""

    def __init__(self, network, settings, law):
        """law: {} (then z is divided by settings["scale"]) or {"mean", "root", "inverse"} of gaussian_of. network: a stock one that
        takes a channel more than a picture has and returns twice as many."""
        self.network, self.settings, self.law = network, settings, law

    def velocity(self, y, t):
        """u = a + b y. y: (batch, channels, height, width), t: (batch,)."""
        square = y.square().mean((1, 2, 3), keepdim=True)  # 1 on average
        shell = (square - 1) * (y[0].numel() / 2) ** 0.5  # |y|^2, standardised: mean 0, variance 1 for standard noise
        a, b = flows.predict(self.network, torch.cat([y, shell.expand_as(y[:, :1])], 1), 1000 * (1 - t)).chunk(2, 1)
        return a + b * y

    def standardise(self, z):
        """z -> w of equation (3), (n, ...)."""
        if not self.law:
            return z / self.settings["scale"]
        return ((z.flatten(1) - self.law["mean"]) @ self.law["inverse"]).view_as(z)

    def destandardise(self, w):
        """w -> z."""
        if not self.law:
            return w * self.settings["scale"]
        return (self.law["mean"] + w.flatten(1) @ self.law["root"]).view_as(w)

    @torch.no_grad()
    def __call__(self, noise, steps=None):
        """noise: (batch, channels, height, width) from N(0, I) -> initial noise for the sampler, the same shape."""
        steps = steps or self.settings["corrector_steps"]
        return self.destandardise(correct(self.velocity, noise, steps))

    def save(self, folder):
        self.network.save_pretrained(folder)
        if self.law:
            law = safetensors.torch.save({name: part.cpu() for name, part in self.law.items()})
            run.write_atomically(folder / "law.safetensors", law)
        run.write_atomically(folder / "corrector.json", json.dumps(self.settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder, network, scheduler):
        """The corrector saved in `folder`, for a flow's network and its scheduler, whose set_timesteps has been called.
        InputError if it was learnt for another network or grid."""
        from diffusers import AutoModel

        settings = flows.read_settings(Path(folder), network, scheduler)
        device = str(next(network.parameters()).device)
        gaussian = settings["normalise"] == "gaussian"
        law = safetensors.torch.load_file(Path(folder) / "law.safetensors", device) if gaussian else {}
        return cls(AutoModel.from_pretrained(str(folder)).to(device).requires_grad_(False), settings, law)


def invert_pictures(flow, pictures, sigmas, args, folder):
    """Equation (2) for all pictures, a file in folder/inversion per batch. Returns (noises of the converged (n, *shape), report)."""
    (folder / "inversion").mkdir(exist_ok=True)
    parts, failed = [], 0
    for i in tqdm(range(0, len(pictures), args.sample_batch), desc="invert", unit="batch", leave=False, mininterval=1):
        part = run.load_checkpoint(folder, f"inversion/{i:06d}.pt")
        if not part:
            x = pictures[i : i + args.sample_batch].to(args.device)
            found = euler_invert(flow.velocity, x, sigmas, args.max_iterations, args.tolerance, args.memory)
            z = found.noise[found.converged]
            error = euler_sample(flow.velocity, z, sigmas) - x[found.converged]
            part = {"noise": z, "error": error.square().flatten(1).mean(1).sqrt(), "residual": found.residual[found.converged]}
            part |= {"iterations": torch.tensor(found.iterations), "contraction": torch.tensor(found.contraction)}
            part["counts"] = torch.tensor([len(x), found.calls])
            part = {k: v.cpu().contiguous() for k, v in part.items()}
            run.save_checkpoint(folder, part, f"inversion/{i:06d}.pt")
        parts.append(part)
        failed += part["counts"][0].item() - len(part["noise"])
        run.check_inverted(parts, failed, args.max_failed * len(pictures))
    return torch.cat([part["noise"] for part in parts]), run.inversion_report(parts)


def train_corrector(corrector, held, learnt_from, args, state, save):
    """Fit equation (3) to the noises learnt_from (n, *shape); the network ends with the averaged weights whose loss on the noises held
    (m, *shape) was least. state: {} or what save() stored. Returns the floating-point operations."""
    network = corrector.network
    held, learnt_from = corrector.standardise(held), corrector.standardise(learnt_from)  # from here on w

    def loss(generator, w=None):
        w = learnt_from[torch.randint(len(learnt_from), (args.batch,), generator=generator)] if w is None else w
        eps = torch.randn(w.shape, generator=generator).to(args.device)
        t = torch.rand(len(w), generator=generator).to(args.device)
        y, target = interpolant(eps, w, t)
        return (corrector.velocity(y, t) - target).square().mean()

    @torch.no_grad()
    def held_out():
        generator = torch.Generator().manual_seed(derived_seed("held out"))
        parts = held.repeat(4, 1, 1, 1).split(args.sample_batch)  # four draws of eps and t for each
        return sum(loss(generator, part).item() * len(part) for part in parts) / (4 * len(held))

    if not state:
        state.update(best=held_out(), final=copy.deepcopy(network.state_dict()))
        # identity: the loss of u = 0, which leaves eps as it is, the scale-only or Gaussian control
        state["rows"] = [{"update": 0, "loss": math.nan, "held_out": state["best"], "identity": state["best"]}]
    flops = args.updates * flows.update_flops(network, loss)
    # fit (shapes/flow.py): AdamW and a running average of the weights; it stops every checkpoint_every updates, the average in place
    for update in fit(network, loss, args.updates, args.lr, (args.seed, "corrector"), state, args.checkpoint_every):
        value, recent = held_out(), state["losses"][state["rows"][-1]["update"] :]
        if value < state["best"]:
            state.update(best=value, final=copy.deepcopy(network.state_dict()))
        state["rows"].append(state["rows"][0] | {"update": update, "loss": sum(recent) / len(recent), "held_out": value})
        save()
    network.load_state_dict(state["final"])
    return flops


def evaluate(flow, start, sigmas, reference, features, args):
    """Sample args.eval_pictures from start(eps), fixed seeds. Returns {"fd", "flops" and "seconds" of a picture, "pictures": eight}."""
    pictures, seconds = [], 0.0
    seeds = [derived_seed("eval", number) for number in range(args.eval_pictures)]
    for i in range(0, len(seeds), args.sample_batch):
        eps = draw_noise(seeds[i : i + args.sample_batch], 0, flow.shape, torch.float32)[0].to(args.device)
        begun = time.perf_counter()
        pictures.append(euler_sample(flow.velocity, start(eps), sigmas).cpu())
        seconds += time.perf_counter() - begun
    pictures = torch.cat(pictures)
    fd = frechet_distance(reference, features(pictures)) if pictures.isfinite().all() else math.nan
    flops = count_flops(lambda: euler_sample(flow.velocity, start(eps[:1]), sigmas))
    return {"fd": fd, "flops": flops, "seconds": seconds / len(pictures), "pictures": pictures[:8].clone()}


# ================================================================ the run


def prepare(args):
    """Check every argument before any model loads and fill in what was left out.
    Returns (shape of a picture, files of --data, {setting of LISTS: its numbers})."""
    run.check_output(args.output, args.resume)
    args.device = check_device(args.device, "float32")
    args.features = args.features or run.default_features(args.data)
    run.check_tables(args, LIMITS, CHOICES)
    lists = {name: run.numbers(args, name, *limits) for name, limits in LISTS.items()}
    shape = (args.channels, args.size, args.size) if args.train_base else flows.check_flow(args.model)
    flows.check_networks(args, shape)
    run.check_pictures(args, shape, MOST_COVARIANCE)
    return shape, flow_data.find_pictures(args.data, args.reference_share), lists


def main(args):
    shape, files, lists = prepare(args)
    # each (n, c, h, w): "invert" to learn from, "train" for --train_base and --longer, "reference" for the Frechet distance,
    # "floor": other pictures, whose distance from the reference is what perfect samples would have
    pictures = flow_data.load_pictures(args, shape, files)
    features = frechet_features(args.features, args.device, args.sample_batch)
    torch.manual_seed(args.seed)
    flow = Flow.new(args.base_network, shape, args.device) if args.train_base else Flow.load(args.model, args.device)
    sigmas = flow.grid(args.steps, args.grid_power)
    folder = run.make_run_folder(args, "inverse_noise_correction", "own" if args.train_base else args.model, args.seed)
    state = run.load_checkpoint(folder) if args.resume else None
    state = state or {"base": {}, "corrector": {}, "longer": {}, "rows": [], "seconds": 0.0}
    begun = time.perf_counter() - state["seconds"]

    def checkpoint():
        state["seconds"] = time.perf_counter() - begun
        run.save_checkpoint(folder, state)

    torch.manual_seed(args.seed)
    network = flows.new_network(args.corrector_network, shape[1], shape[0] + 1, 2 * shape[0], zero=True).to(args.device)
    print(run.describe_correction(args, flow, network, pictures, folder), flush=True)

    # ------------------------------------------------------------ BASE
    if args.train_base:
        loss, trained = flows.flow_objective(flow, pictures["train"], args.batch), state["base"]
        for _ in fit(flow.network, loss, args.base_updates, args.base_lr, (args.seed, "base"), trained, args.checkpoint_every):
            checkpoint()
        flow.save(folder / "flow")
        args.model = str(folder / "flow")
        print(f"  base       trained, loss {torch.tensor(trained['losses'][-200:]).mean():.4f}", flush=True)

    # ------------------------------------------------------------ INVERT
    one = torch.zeros(1, *shape).to(args.device)  # a picture, to count operations
    call_flops = count_flops(lambda: flow.velocity(one, sigmas[:1]))  # of a model call
    noises, report = invert_pictures(flow, pictures["invert"], sigmas, args, folder)
    report["flops"] = report["calls"] * call_flops
    run.print_inversion(report)

    # ------------------------------------------------------------ CORRECT
    count = max(10, round(args.held_out * len(noises)))
    held, learnt_from = noises[:count].to(args.device), noises[count:].to(args.device)
    scale = learnt_from.square().mean().sqrt().item()
    law = gaussian_of(learnt_from) if math.prod(shape) <= MOST_COVARIANCE else {}
    enough = law and len(learnt_from) >= 10 * math.prod(shape)
    args.normalise = args.normalise or ("gaussian" if enough else "scale")
    settings = {"model_hash": flows.model_hash(flow.network), "steps": args.steps, "grid_power": args.grid_power}
    settings |= {"sigmas": sigmas.tolist(), "timesteps": flow.scheduler.timesteps.tolist(), "scale": scale}
    settings |= {"corrector_steps": args.corrector_steps, "normalise": args.normalise}
    corrector = Corrector(network, settings, law if args.normalise == "gaussian" else {})
    learnt = state["corrector"]

    def log():
        run.log(folder, learnt["rows"], learnt["update"], time.perf_counter() - begun)
        checkpoint()

    flops = train_corrector(corrector, held, learnt_from, args, learnt, log)
    cost = {"inversion": report["flops"], "corrector": flops}
    corrector.save(folder / "corrector")
    best, identity = learnt["best"], learnt["rows"][0]["held_out"]
    print(f"  corrector  held-out loss {best:.4f}, {identity:.4f} with velocity 0", flush=True)

    # ------------------------------------------------------------ TRAIN THE BASE ON (control)
    if args.longer:
        longer = Flow(copy.deepcopy(flow.network), flow.scheduler, args.device)
        loss, key = flows.flow_objective(longer, pictures["train"], args.batch), (args.seed, "longer")
        updates = max(1, round(sum(cost.values()) / flows.update_flops(longer.network, loss)))
        for _ in fit(longer.network, loss, updates, args.longer_lr, key, state["longer"], args.checkpoint_every):
            checkpoint()
        print(f"  control    base trained on for {updates} updates, as many FLOPs as inversion and corrector took", flush=True)

    # ------------------------------------------------------------ EVALUATE
    reference = features(pictures["reference"])
    floor = frechet_distance(reference, features(pictures["floor"]))
    n, corrected_flops = args.steps, count_flops(lambda: euler_sample(flow.velocity, corrector(one), sigmas))  # of a sample
    matched = math.ceil(corrected_flops / call_flops)  # steps of the base at the cost of a corrected sample, or a little more
    steps = sorted({n, *(lists["eval_steps"] or (matched, 2 * n, 4 * n))})
    starts = {"scale only": lambda eps: scale * eps}
    if law:
        gaussian = Corrector(None, settings, law)  # only standardises: it has no network
        norms = gaussian.standardise(learnt_from).flatten(1).norm(dim=1)  # (n,)
        starts["gaussian"] = gaussian.destandardise
        starts["gaussian, norms matched"] = lambda eps: gaussian.destandardise(match_norms(eps, norms))
    starts["corrector"] = corrector
    for m in lists["eval_corrector_steps"]:
        starts[f"corrector, M = {m}"] = lambda eps, m=m: corrector(eps, m)
    # (row, flow, steps, grid power, what makes the initial noise of eps); --grid_power is of the grid of N steps, the base's other
    # numbers of steps are even ones, the base trained on always has --grid_power
    arms = [("base", flow, k, args.grid_power if k == n else 1.0, torch.clone) for k in steps]
    arms += [(f"base, grid power {power:g}", flow, matched, power, torch.clone) for power in lists["eval_powers"]]
    if args.longer:
        arms += [("base trained on", longer, k, args.grid_power, torch.clone) for k in sorted({n, matched})]
    arms += [(name, flow, n, args.grid_power, start) for name, start in starts.items()]
    for name, sampler, k, power, start in arms[len(state["rows"]) :]:  # a run that was stopped has the first rows
        row = evaluate(sampler, start, sampler.grid(k, power), reference, features, args)
        state["rows"].append({"arm": name, "steps": k} | row)
        checkpoint()

    # ------------------------------------------------------------ SHOW
    checkpoint()
    results = {"floor": floor, "steps": n, "matched_steps": matched, "inversion": report, "scale": scale}
    results |= {"training_flops": cost, "seconds": {"total": state["seconds"]}}
    results["corrector"] = {"held_out": best, "identity": identity, "flops": corrected_flops - n * call_flops}
    run.show_correction(folder, results, state["rows"], noises, starts, pictures["floor"], args)
    files = "corrector/, results.json, metrics.csv, curve.png, grid.png, noise.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {files}. To use the corrector:\n")
    print(run.corrector_code(args, flow, folder / "corrector"))


if __name__ == "__main__":
    run.run_script(main, Args)
