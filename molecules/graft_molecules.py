"""GRAFT on molecules in space: graft.py for another kind of data, with de-duplication.

Run: python -m molecules.graft_molecules

What differs from graft.py
    Data: a molecule x_0 of n heavy atoms, (ATOMS, 7) with gaps (model.py); c, the number n, is the condition.
    Noise and samples have coordinates with the mean zero: (4) and (5) hold in that space
    Reward: a function of an RDKit molecule, if the judge (judge.py) finds a stable one. Others have the
    reward -inf, or 0 of the reward `stable`; only the rule `none` accepts them
    De-duplication: of the molecules with one canonical SMILES that the rule accepts, one is kept, drawn at
    random; none, if an earlier round has kept one
    Equation (6): with that, one of C(x) accepted copies of x is kept, so (1) holds with
        rhat(x) = log E[A | X = x] - log C(x)
    The learning rate falls to 0 in every round: a constant one ruins a small model within a few
    The table counts molecules: valid, stable, distinct, not in QM9
    Nothing here concerns prompts, guidance, precision or families of models
Notation
    x_t = alpha_t x_0 + sigma_t eps,  alpha_t^2 + sigma_t^2 = 1
    p the model that is sampled; r(x) the reward; M samples x_i a group
    a rule accepts x_i with probability A_i; X and A: one sample and its acceptance probability
Equations, numbered as in graft.py
    (1) accepted samples follow  argmax_q  E_q[rhat] - KL(q || p),  rhat(x) = log E[A | X = x]
    (2) K best of M:  rhat = log sum_{j<K} C(M-1, j) U^(M-1-j) (1-U)^j,  U = P(r(X') <= r(x)),  X' ~ p,
        ties broken at random
    (3) KL(accepted || p) = integral_0^1 f log f du,  f = (M/K) exp(rhat);
        K = 1: log M - (M-1)/M;  better of a pair: M = 2
    (4) loss  E |prediction(x_t, t, c) - target|^2,  target v = alpha_t eps - sigma_t x_0
    (5) step to the next level ('):  x' = alpha' x_0 + sqrt(sigma'^2 - std^2) eps + std w,
        std = eta sigma' / sigma sqrt(sigma^2 - (alpha sigma' / alpha')^2),  w ~ N(0, I),
        x_0 and eps as predicted. This is DDIM
"""

import math
import sys
import time
import traceback
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs an older one is to read why it fails)
    print("error: Python 3.11 or newer is needed, this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import numpy as np
import torch
from PIL import Image
from rdkit import Chem
from rdkit.Chem import QED, Crippen, Draw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # torchrun and --resume give the file

from molecules.judge import elements_of, judge, known_hash
from molecules.model import (
    ATOMS,
    EMBEDDED,
    KNOWN,
    SCALE,
    TUNED_FILE,
    Device,
    Model,
    check_device,
    check_finite,
    derived_seed,
    draw_noise,
    project,
)
from utils.figures import GRID_IMAGES, save_curves, save_grid
from utils.processes import gather, own_share, several_processes, sum_gradients
from utils.runs import (
    InputError,
    check_inputs,
    check_output,
    check_range,
    log_metrics,
    make_run_folder,
    print_table,
    restore,
    run_script,
    write_atomically,
    write_json,
)
from utils.user_code import UserModule

Rule = Literal["topk", "preference", "exponential", "threshold", "none"]
RANKING = ("topk", "preference")  # rules for which only the order of the rewards counts
PROPERTIES = {"stable": lambda molecule: 1.0, "logp": Crippen.MolLogP, "qed": QED.qed}  # of a stable molecule
GRID_COLUMNS = 4  # molecules of a row of grid.png, all of one number of atoms
BLOCKS = 20  # of the jackknife


@dataclass
class Args:
    """GRAFT on molecules: sample, judge, accept by a rule, drop copies, fine-tune a LoRA on the rest."""

    seed: int = 0  # seed of the training run; evaluation molecules do not depend on it
    output: str = ""  # run folder; left out: runs/<script>__<model>__<seed>__<time>
    resume: str = ""  # run folder to continue; every other argument is taken from it
    device: Device = "auto"  # auto: CUDA if there is one

    model: str = EMBEDDED  # .safetensors that molecules/train.py or a run of this script has written
    atoms: tuple[int, ...] = (9,)  # numbers of heavy atoms to sample, each equally often: 7 8 9
    eval_molecules: int = 1000  # molecules of an evaluation
    eval_every: int = 1  # rounds between evaluations; 0: only before and after

    steps: int = 50  # steps of the sampler
    eta: float = 1.0  # 0: deterministic; 1: as random as DDPM
    sample_batch: int = 250  # molecules sampled at a time

    reward: str = "logp"  # to maximise: stable, logp, qed or file.py:function of an RDKit molecule

    rounds: int = 3  # times to sample, accept and update
    groups_per_round: int = 250  # groups of molecules of one number of atoms, sampled in a round
    samples: int = 8  # M, samples per group
    rule: Rule = "topk"  # which samples are accepted; none: all of them, the control
    top_k: int = 2  # K of the rule topk
    threshold: float | None = None  # least accepted reward of the rule threshold
    beta: float | None = None  # temperature of the rule exponential, in units of the reward
    reward_max: float | None = None  # upper bound of the reward for exponential; None: each group's best
    deduplicate: bool = True  # accept no molecule twice in a run
    accumulate: bool = True  # train on what all rounds accepted, not only on the newest round's
    reference: Literal["newest", "base"] = "newest"  # the model that rounds after the first sample

    lora_rank: int = 16  # rank of the LoRA, which is on every linear layer
    lora_alpha: float = 16.0  # the LoRA is scaled by alpha / rank
    updates: int = 200  # optimiser updates per round
    batch: int = 96  # molecules per update
    lr: float = 2e-4  # AdamW learning rate at the start of a round; falls to 0 by its end
    save_accepted: bool = False  # write a round's accepted stable molecules to <run>/accepted001.smi and .xyz

    def __post_init__(self):
        """InputError for a value out of range, or for settings that do not go together."""
        check_range(self, "seed", 0, 2**63 - 1)
        check_range(self, "eval_molecules", BLOCKS, 10**6)
        check_range(self, "eval_every", 0, 10**9)
        check_range(self, "steps", 1, 10**4)
        check_range(self, "eta", 0, 1)
        check_range(self, "sample_batch", 1, 10**6)
        check_range(self, "rounds", 1, 10**4)
        check_range(self, "groups_per_round", 1, 10**6)
        check_range(self, "samples", 1, 10**4)
        check_range(self, "top_k", 1, self.samples)
        check_range(self, "lora_rank", 1, 1024)
        check_range(self, "lora_alpha", 1e-6, 1e6)
        check_range(self, "updates", 1, 10**6)
        check_range(self, "batch", 1, 10**6)
        check_range(self, "lr", 1e-12, 1)
        check_rule(self)
        if not self.atoms or not all(1 <= n <= ATOMS for n in self.atoms):
            raise InputError(f"--atoms {' '.join(map(str, self.atoms))}: must be from 1 to {ATOMS}")


def check_rule(args):
    """InputError if --rule lacks its parameter or is given another rule's,
    or if the samples do not divide."""
    rules = {"top_k": "topk", "threshold": "threshold", "beta": "exponential", "reward_max": "exponential"}
    for name, rule in rules.items():
        value = getattr(args, name)
        if args.rule != rule and value != getattr(type(args), name):
            raise InputError(
                f"--{name} {value}: works only with --rule {rule}, not {args.rule}; leave out one of the two"
            )
        if not math.isfinite(value or 0):
            raise InputError(f"--{name} {value}: must be a finite number")
    if args.rule == "threshold" and args.threshold is None:
        raise InputError("--rule threshold needs --threshold, the least reward to accept")
    if args.rule == "exponential" and not (args.beta or 0) > 0:
        raise InputError("--rule exponential needs --beta above 0, in units of the reward")
    if args.rule == "topk" and args.samples == 1:
        raise InputError("--samples 1: leaves nothing to choose from; give at least 2, or another --rule")
    if args.rule == "preference" and args.samples % 2:
        raise InputError(f"--samples {args.samples}: must be even for --rule preference")


# ================================================================ equations: tensors in, tensors out


def accept(rewards, rule, *, top_k=1, threshold=None, beta=None, reward_max=None, generator=None):
    """Which samples a rule accepts. rewards: (prompts, samples) -> bool mask of the same shape.

    "topk": the top_k best of each row, ties broken at random. "preference": the better of each consecutive
    pair. Rows (pairs) whose rewards are all equal are skipped. "exponential": each with probability
    exp((r - reward_max) / beta); reward_max is the reward's known upper bound, without one the row's maximum.
    "threshold": r >= threshold. "none": all. ValueError for a rule without its parameter.
    Source: arXiv 2510.02692, generalised rejection sampling; equations (1) and (2).
    """
    samples = rewards.shape[1]
    # breaks ties; tosses the coin of exponential
    chance = torch.rand(rewards.shape, generator=generator).to(rewards.device)
    if rule in RANKING:
        size, best = (samples, top_k) if rule == "topk" else (2, 1)  # the best of every `size` samples
        if samples % size or not 1 <= best <= size:
            raise ValueError(f"{rule} cannot take the {best} best of {size} from {samples} samples")
        groups = rewards.reshape(-1, size)  # (groups, size)
        mask = _rank(groups, chance.reshape(-1, size)) < best
        return (mask & (groups != groups[:, :1]).any(1, keepdim=True)).reshape(rewards.shape)
    if rule == "exponential":
        if beta is None or beta <= 0:
            raise ValueError("exponential needs beta > 0")
        bound = rewards.max(1, keepdim=True).values if reward_max is None else reward_max
        return chance < ((rewards - bound) / beta).exp()
    if rule == "threshold":
        if threshold is None:
            raise ValueError("threshold needs threshold")
        return rewards >= threshold
    if rule == "none":
        return torch.ones_like(rewards, dtype=torch.bool)
    raise ValueError(f"rule {rule!r} must be topk, preference, exponential, threshold or none")


def _rank(rewards, chance):
    """Place of each entry in its row, 0 the largest; ties in the order of `chance`.
    (rows, n) -> integer (rows, n)."""
    order = chance.argsort(1)
    order = order.gather(1, torch.argsort(rewards.gather(1, order), dim=1, descending=True, stable=True))
    return order.argsort(1)


def reshaped_reward(quantile, num_samples, top_k):
    """rhat of "the top_k best of num_samples" at quantile U in [0, 1], any shape. Equation (2)."""
    u, others = torch.as_tensor(quantile, dtype=torch.float64), num_samples - 1
    rhat = torch.full_like(u, -math.inf)
    for j in range(top_k):  # in logarithms: the binomial coefficients overflow
        log_count = math.lgamma(others + 1) - math.lgamma(j + 1) - math.lgamma(others - j + 1)
        rhat = torch.logaddexp(rhat, log_count + torch.xlogy(others - j, u) + torch.xlogy(j, 1 - u))
    return rhat


def implied_kl(num_samples, top_k):
    """KL(accepted || sampled) in nats of "the top_k best of num_samples", for a reward without ties.
    Equation (3)."""
    if top_k == 1:
        return math.log(num_samples) - (num_samples - 1) / num_samples
    nodes = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    density = num_samples / top_k * reshaped_reward(nodes, num_samples, top_k).exp()
    return torch.xlogy(density, density).mean().item()


def estimated_kl(rewards, rule, *, top_k=1, threshold=None, beta=None, reward_max=None):
    """KL(accepted || sampled) in nats, of images with their prompts, from a round's rewards (prompts,
    samples). NaN if nothing can be accepted.

    topk and preference: of the rewards, as if every prompt had the round's distribution of them; of many
    rewards without ties that is equation (3). threshold: -log of the acceptance rate. exponential: from the
    acceptance probabilities; without reward_max they depend on the group too: then it is an upper bound.
    """
    if rule in RANKING:
        samples, best = (rewards.shape[1], top_k) if rule == "topk" else (2, 1)
        _, count = rewards.flatten().unique(return_counts=True)  # (values,) from the least on
        share = count.double() / rewards.numel()
        u = torch.cat([torch.zeros(1, dtype=torch.float64), share.cumsum(0)]).clamp(max=1)  # (values + 1,)
        # b of a group's samples, with binomial probability, are among the share u of the least rewards; of
        # these the rule accepts b - (samples - best), if that is above 0
        b = torch.arange(samples - best, samples + 1, dtype=torch.float64)[:, None]  # (best + 1, 1)
        n = torch.tensor(samples, dtype=torch.float64)
        log_chance = (n + 1).lgamma() - (b + 1).lgamma() - (n - b + 1).lgamma()
        chance = (log_chance + torch.xlogy(b, u) + torch.xlogy(n - b, 1 - u)).exp()
        accepted = ((b - (samples - best)) * chance).sum(0).diff()  # (values,) of a group
        accepted = (accepted - best * share**samples).clamp(min=0)  # groups of one value are skipped
        density = accepted / accepted.sum() / share  # of the accepted relative to the sampled
        return (share * torch.xlogy(density, density)).sum().item()
    if rule == "exponential":
        bound = rewards.max(1, keepdim=True).values if reward_max is None else reward_max
        chance = ((rewards - bound) / beta).double().exp().clamp(max=1)
    else:
        chance = (rewards >= (-math.inf if rule == "none" else threshold)).double()
    density = chance / chance.mean()
    return torch.xlogy(density, density).mean().item()


def deduplicate(mask, keys, seen, generator=None):
    """Equation (6): of the accepted molecules with one key, one, drawn at random; none with a key in `seen`.
    mask: (n,) bool -> (n,) bool. keys: n canonical SMILES; molecules without one ("") are nobody's copies."""
    kept, taken = torch.zeros_like(mask), set(seen)
    for i in torch.randperm(len(mask), generator=generator).tolist():
        if mask[i] and (keys[i] == "" or keys[i] not in taken):
            kept[i] = True
            taken.add(keys[i])
    return kept


def deduplication_kl(accepted, kept):
    """KL(kept || accepted by the rule) in nats, of the shares of keys. accepted, kept: lists of keys. NaN if
    nothing is kept."""
    before, after = Counter(accepted), Counter(kept)
    shares = [(n / len(kept), before[key] / len(accepted)) for key, n in after.items()]
    return sum(q * math.log(q / p) for q, p in shares) if kept else math.nan


def training_target(x_0, noise, alpha_t, sigma_t, prediction_type):
    """(x_t, target) of the denoising loss, equation (4). x_0, noise: (batch, ...); alpha_t, sigma_t:
    (batch,). prediction_type: "epsilon", "v_prediction" or "flow"."""
    alpha_t, sigma_t = (level.view(-1, *[1] * (x_0.dim() - 1)) for level in (alpha_t, sigma_t))
    x_t = alpha_t * x_0 + sigma_t * noise
    targets = {"epsilon": noise, "v_prediction": alpha_t * noise - sigma_t * x_0, "flow": noise - x_0}
    return x_t, targets[prediction_type]


# ================================================================ sampling


@torch.no_grad()
def sample(model, noise, count, eta):
    """Equation (5). noise: (steps + 1, batch, ATOMS, 7), count: (batch,) -> clean x_0 (batch, ATOMS, 7).

    DDIM is arXiv 2010.02502, equation 12.
    """
    rows = int(count.max())  # the others are gaps
    noise, count = noise[:, :, :rows].to(model.device), count.to(model.device)
    grid = model.levels(len(noise) - 1)
    times = torch.tensor(grid, device=model.device)  # one transfer, none inside the loop
    x = project(noise[0], count)
    for k, t in enumerate(grid):
        alpha, sigma = model.alpha_sigma(t)
        alpha_next, sigma_next = model.alpha_sigma(grid[k + 1] if k + 1 < len(grid) else 0)
        prediction = model.predict(x, times[k], count)
        x_0, eps = alpha * x - sigma * prediction, alpha * prediction + sigma * x  # v = alpha eps - sigma x_0
        std = eta * sigma_next / sigma * math.sqrt(max(sigma**2 - (alpha * sigma_next / alpha_next) ** 2, 0))
        w = project(noise[k + 1], count)
        x = alpha_next * x_0 + math.sqrt(max(sigma_next**2 - std**2, 0)) * eps + std * w
    return torch.nn.functional.pad(x, (0, 0, 0, ATOMS - rows))


def sample_and_judge(model, reward, counts, seeds, args, label):
    """Molecules of `counts` (n) atoms with the seeds (n), a batch at a time. Returns x_0 (n, ATOMS, 7),
    {reward or statistic: (n,)} and the judged molecules. reward: a function of one stable molecule."""
    molecules = []
    starts = own_share(range(0, len(counts), args.sample_batch))  # of this process, under torchrun
    for i in tqdm(starts, desc=label, unit="batch", leave=False, mininterval=1):
        batch = slice(i, i + args.sample_batch)
        noise = draw_noise(seeds[batch], args.steps)  # (steps + 1, batch, ATOMS, 7)
        molecules.append(sample(model, noise, torch.tensor(counts[batch]), args.eta).cpu())
    x_0 = torch.cat(gather(molecules))  # of all batches, in order
    if not x_0.isfinite().all():
        raise InputError(f"{label}: NaN or Inf in the molecules; use a lower --lr")
    judged = [judge(x[:n]) for x, n in zip(x_0, counts)]
    lowest = 0.0 if args.reward == "stable" else -math.inf  # of what is not stable
    values = [reward(j.molecule) if j.stable else lowest for j in own_share(judged)]
    scores = {"reward": torch.tensor(gather(values))}  # of all processes, in order
    scores["valid"] = torch.tensor([float(j.valid) for j in judged])
    scores["stable"] = torch.tensor([float(j.stable) for j in judged])
    return x_0, scores, judged


# ================================================================ loss


def denoising_loss(model, x_0, count, t, noise):
    """Equation (4), mean over all numbers of all atoms.
    x_0, noise: (batch, rows, 7), count, t: (batch,)."""
    alpha, sigma = model.alpha_sigma(t)
    noise = project(noise, count)
    x_t, target = training_target(x_0, noise, alpha, sigma, model.prediction_type)
    error = (model.predict(x_t, t, count) - target).square()
    return error.sum() / (count.sum() * x_0.shape[2])


# ================================================================ evaluation


def evaluate(model, reward, known, args, label):
    """Fixed seeds. Returns (a row (valid, stable, key, new, reward, logP, QED) for each molecule, images of
    grid.png, (x_0, judged molecules)). logP and QED are of stable molecules, else NaN."""
    numbers = range(args.eval_molecules)
    counts = [args.atoms[i // GRID_COLUMNS % len(args.atoms)] for i in numbers]
    seeds = [derived_seed("eval", i) for i in numbers]
    x_0, scores, judged = sample_and_judge(model, reward, counts, seeds, args, label)
    rows = []
    for j, value in zip(judged, scores["reward"].tolist()):
        properties = [PROPERTIES[name](j.molecule) if j.stable else math.nan for name in ("logp", "qed")]
        new = j.stable and known_hash(j.key) not in known
        rows.append((j.valid, j.stable, j.key, new, value, *properties))
    images = [draw(j, value) for j, value in zip(judged[:GRID_IMAGES], scores["reward"].tolist())]
    return rows, images, (x_0, judged)


def measures(rows):
    """{measure: number} of the rows of `evaluate`. How many are distinct depends on how many are sampled."""
    valid = [row for row in rows if row[0]]
    stable = [row for row in rows if row[1]]
    keys = {row[2] for row in stable}
    new = {row[2] for row in stable if row[3]}

    def mean(column):  # of those that have one
        values = [row[column] for row in rows if math.isfinite(row[column])]
        return sum(values) / len(values) if values else math.nan

    return {
        "reward": mean(4),
        "valid": len(valid) / len(rows),
        "stable": len(stable) / len(rows),
        "unique_of_valid": len({row[2] for row in valid}) / len(valid) if valid else math.nan,
        "distinct_stable": len(keys) / len(rows),
        "new_of_distinct": len(new) / len(keys) if keys else math.nan,
        "logp": mean(5),
        "qed": mean(6),
    }


def results_table(base, tuned):
    """Rows {metric, base, tuned, difference, se} of what evaluate returned for both. se: standard error of
    the difference, by the jackknife over BLOCKS blocks of molecules with equal seeds."""
    before, after = measures(base), measures(tuned)
    without = []  # differences without one of the blocks
    for block in range(BLOCKS):
        rest = [
            measures([row for i, row in enumerate(rows) if i % BLOCKS != block]) for rows in (base, tuned)
        ]
        without.append({name: rest[1][name] - rest[0][name] for name in before})
    table = []
    for name in before:
        difference = after[name] - before[name]
        values = np.array([part[name] for part in without])
        se = math.sqrt((BLOCKS - 1) * values.var())
        table.append({"metric": name, "base": before[name], "tuned": after[name]})
        table[-1] |= {"difference": difference, "se": se}
    return table


def draw(judged, value):
    """An image of a judged molecule with its reward."""
    size = (220, 135)
    if not judged.valid:
        return Image.new("RGB", size, "lightgrey")
    legend = f"{value:.2f}" if judged.stable else "not stable"
    return Draw.MolToImage(judged.molecule, size=size, legend=legend)


def save_molecules(folder, name, x_0, judged):
    """Write the stable molecules to folder/name.smi, a SMILES a line, and folder/name.xyz, their heavy atoms
    in Angstrom."""
    smiles, blocks = "", ""
    for x, j in zip(x_0, judged):
        if j.stable:
            smiles += f"{j.key}\n"
            atoms = zip(elements_of(x[: j.molecule.GetNumAtoms()]), (SCALE * x[:, :3]).tolist())
            lines = [f"{element} {a:.4f} {b:.4f} {c:.4f}\n" for element, (a, b, c) in atoms]
            blocks += f"{len(lines)}\n{j.key}\n{''.join(lines)}"
    write_atomically(folder / f"{name}.smi", smiles)
    write_atomically(folder / f"{name}.xyz", blocks)


# ================================================================ what a run prints and logs


def describe(args, model, folder):
    """The checked, derived settings, printed before the run."""
    rules = {"topk": f"{args.top_k} best of {args.samples}", "preference": "better of two"}
    kl = "estimated in every round"
    if args.rule in RANKING:  # then it does not depend on the rewards
        group, best = (args.samples, args.top_k) if args.rule == "topk" else (2, 1)
        kl = f"{implied_kl(group, best):.2f} nats if no rewards tie"
    reference = "base" if args.reference == "base" or args.rounds == 1 else "model of the round"
    size = sum(p.numel() for p in model.lora().values())
    molecules = args.rounds * args.groups_per_round * args.samples
    copies = "dropped" if args.deduplicate else "kept"
    return f"""GRAFT of molecules -> {folder}
  model      {args.model}, {model.prediction_type}, on {args.device}{several_processes()}
  LoRA       rank {args.lora_rank}, alpha {args.lora_alpha:g}: {size:,} parameters
  sampling   {args.rounds} rounds x {args.groups_per_round} groups x {args.samples} = {molecules} molecules \
of {", ".join(map(str, args.atoms))} atoms, {args.steps} steps, eta {args.eta:g}
  acceptance {rules.get(args.rule, args.rule)} by {args.reward}; copies {copies}; KL(accepted || \
{reference}) {kl}
  update     {args.rounds} rounds x {args.updates} = {args.rounds * args.updates} updates x {args.batch} \
molecules, lr {args.lr:g}
  evaluation {args.eval_molecules} molecules, base and tuned on equal seeds"""


def sampled_row(number, args, rewards, ruled, index, scores, keys, options):
    """The columns of metrics.csv about a round's sampling. InputError if nothing was accepted.

    rewards: (groups, samples); ruled: (m,) what the rule accepted among all samples, index: (n,) what is left
    of it without copies; scores: {reward or statistic: (groups x samples,)}; keys: list of canonical SMILES;
    options: of the rule.
    """
    above = (rewards > (math.inf if args.reward_max is None else args.reward_max)).sum().item()
    if above:
        print(
            f"warning: {above} of {rewards.numel()} rewards are above --reward_max {args.reward_max:g} "
            f"(largest {rewards.max():.4g}) and count as equal to it; give the reward's true upper bound",
            file=sys.stderr,
        )
    ranked = rewards  # of exponential without the groups that have no stable molecule, so no best reward
    if args.rule == "exponential":
        ranked = rewards[rewards.amax(1) > -math.inf]
    group = 2 if args.rule == "preference" else args.samples  # the samples among which a rule ranks
    groups = rewards.view(len(rewards), -1, group)  # (groups, subgroups, group)
    flat = ((groups.amax(2) == groups.amin(2)) & (args.rule in RANKING)).double().mean().item()
    if len(ruled) == 0:
        advice = "raise --samples or take another reward" + ", or lower --threshold" * (
            args.rule == "threshold"
        )
        raise InputError(
            f"--rule {args.rule} accepted nothing: {flat:.0%} of the groups had equal rewards, the best "
            f"reward was {rewards.max():.4g}; {advice}"
        )
    if len(index) == 0 and not args.accumulate:
        raise InputError(
            f"round {number} accepted only molecules that earlier rounds had accepted: give --accumulate, "
            "--no-deduplicate or fewer --rounds"
        )
    stable = scores["stable"].bool().tolist()
    return {
        "round": number,
        "reward_sampled": mean_of_stable(rewards.flatten()),
        "reward_accepted": mean_of_stable(rewards.flatten()[index]),
        "acceptance_rate": len(index) / rewards.numel(),
        "flat_groups": flat,
        "kl": estimated_kl(ranked, args.rule, **options),
        "deduplication_kl": deduplication_kl([keys[i] for i in ruled], [keys[i] for i in index]),
        "valid": scores["valid"].mean().item(),
        "stable": scores["stable"].mean().item(),
        "distinct_stable": len({key for key, s in zip(keys, stable) if s}) / len(keys),
    }


def mean_of_stable(rewards):
    """Mean of the rewards (n,) that are not -inf; NaN if all are."""
    return rewards[rewards > -math.inf].mean().item()


def print_round(state, rounds, speed):
    """One line on the newest of the rounds."""
    row, left = state["rows"][-1], state["seconds"] / state["round"] * (rounds - state["round"])
    rates = f"{row['acceptance_rate']:.1%}; {row['flat_groups']:.0%} of groups without signal"
    rewarded = f"reward {row['reward_sampled']:.3f}, accepted {row['reward_accepted']:.3f} ({rates})"
    held_out = f"held-out reward {row['reward_held_out']:.3f}, stable {row['stable_held_out']:.3f}, "
    held_out += f"distinct {row['distinct_stable_held_out']:.3f}, training loss {row['loss']:.4f}"
    print(f"  round {state['round']}/{rounds}  {rewarded}, {held_out}, {speed}{left:.0f} s left", flush=True)


# ================================================================ the run


def read_reward(spec):
    """The reward `spec` of one stable RDKit molecule, a function that returns a finite number. One of the
    user's file gets copies, and cannot change the run. InputError if there is none, and from the function for
    anything else."""
    if spec in PROPERTIES:
        return PROPERTIES[spec]
    file, _, name = spec.rpartition(":")
    if not Path(file).is_file():
        raise InputError(
            f"--reward {spec}: no file {file}; give {', '.join(PROPERTIES)} or path/to/file.py:function"
        )
    try:
        user = UserModule(file)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's file may raise anything, and may exit
        raise InputError(f"--reward {spec}: {file} does not load ({type(error).__name__}: {error})") from None
    function = getattr(user.module, name, None)
    if not callable(function):
        raise InputError(f"--reward {spec}: {file} has no function {name!r}")

    def reward(molecule):
        smiles = Chem.MolToSmiles(molecule)
        try:
            with user.running(zlib.crc32(smiles.encode())):  # a resumed run sees the same random numbers
                value = float(function(Chem.Mol(molecule)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the user's function may raise anything, and may exit
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"reward {spec}: {type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            ) from error
        if not math.isfinite(value):
            raise InputError(f"reward {spec}: is {value} for {smiles}; must be finite")
        return value

    return reward


def read_known():
    """The set of hashes of known.npy."""
    return {bytes(row) for row in np.load(KNOWN)}


def main(args):
    check_output(args.output, args.resume)
    args.device = check_device(args.device)
    own = [] if args.reward in PROPERTIES else [args.reward.rpartition(":")[0]]  # the file of a reward
    inputs = check_inputs(args.resume, [args.model, KNOWN, *own])
    reward, known = read_reward(args.reward), read_known()
    model = Model.load(args.model, args.device)
    parameters = model.add_lora(args.lora_rank, args.lora_alpha, args.seed)
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(args.device, enabled=False)
    folder = make_run_folder(args, "graft_molecules", args.model, args.seed, inputs)
    print(describe(args, model, folder), flush=True)

    # state: {round, rows, losses, accepted, seconds, tuned}; save() stores it with LoRA and optimiser
    state, save = restore(args, folder, model, optimizer, scaler)
    run_start = time.perf_counter() - state["seconds"]

    # ------------------------------------------------------------ BASELINE
    with model.lora_off():
        base, base_images, molecules = evaluate(model, reward, known, args, "evaluate base")
    save_molecules(folder, "base", *molecules)
    base_reward = measures(base)["reward"]
    print(f"  base       held-out {args.reward} {base_reward:.3f}", flush=True)

    for r in range(state["round"], args.rounds):
        speed = ""
        if len(state["accepted"]) == r:  # not so if the run was stopped after it had accepted
            # ---------------------------------------------------- SAMPLE, SCORE
            start, label = time.perf_counter(), f"sample {r + 1}"
            groups = range(args.groups_per_round)
            counts = [args.atoms[i % len(args.atoms)] for i in groups for _ in range(args.samples)]  # (n,)
            seeds = [derived_seed(args.seed, r, i, j) for i in groups for j in range(args.samples)]
            with model.lora_off() if args.reference == "base" else model.lora_merged():
                x_0, scores, judged = sample_and_judge(model, reward, counts, seeds, args, label)
            speed = f"{len(seeds) / (time.perf_counter() - start):.0f} molecules/s, "
            rewards = scores["reward"].view(-1, args.samples)  # (groups, samples)

            # ---------------------------------------------------- ACCEPT
            options = {"top_k": args.top_k, "threshold": args.threshold}
            options |= {"beta": args.beta, "reward_max": args.reward_max}
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "accept", r))
            mask = accept(rewards, args.rule, **options, generator=generator).flatten()  # (n,)
            if args.rule != "none":
                mask &= scores["stable"].bool()
            ruled = mask.nonzero().squeeze(1)  # (accepted by the rule,)
            keys = [j.key for j in judged]
            if args.deduplicate:
                seen = {key for accepted in state["accepted"] for key in accepted["keys"]}
                mask = deduplicate(mask, keys, seen, generator)
            index = mask.nonzero().squeeze(1)  # (accepted,)
            accepted = {"x_0": x_0[index], "count": torch.tensor(counts)[index]}
            accepted["keys"] = [keys[i] for i in index]
            state["accepted"].append(accepted | {"reward": rewards.flatten()[index]})
            state["rows"].append(sampled_row(r + 1, args, rewards, ruled, index, scores, keys, options))
            if args.save_accepted:
                save_molecules(folder, f"accepted{r + 1:03d}", x_0[index], [judged[i] for i in index])
            save()

        # -------------------------------------------------------- UPDATE
        kept = state["accepted"] if args.accumulate else state["accepted"][-1:]
        data = torch.cat([a["x_0"] for a in kept])[:, : max(args.atoms)]  # (n, rows, 7), without empty rows
        data_counts = torch.cat([a["count"] for a in kept])  # (n,)
        generator = torch.Generator().manual_seed(derived_seed(args.seed, "update", r))
        epochs = math.ceil(args.updates * args.batch / len(data))
        order = torch.cat([torch.randperm(len(data), generator=generator) for _ in range(epochs)])
        losses = []
        for update in tqdm(range(args.updates), desc=f"update {r + 1}", leave=False, mininterval=1):
            optimizer.param_groups[0]["lr"] = args.lr * (1 - update / args.updates)
            index = order[update * args.batch : (update + 1) * args.batch]  # (batch,)
            x_0 = data[index].to(args.device)  # (batch, rows, 7)
            count = data_counts[index].to(args.device)  # (batch,)
            noise = torch.randn(x_0.shape, generator=generator).to(args.device)
            t = torch.rand(args.batch, generator=generator).to(args.device)  # (batch,)
            losses.append(0.0)
            part = own_share(torch.arange(args.batch))  # of this process, under torchrun; it may be empty
            if len(part):
                loss = denoising_loss(model, x_0[part], count[part], t[part], noise[part])
                loss = loss * count[part].sum() / count.sum()
                loss.backward()
                losses[-1] = loss.item()
            losses[-1] = sum_gradients(parameters, losses[-1])
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            check_finite(f"round {r + 1}, update {update + 1}", losses[-1], norm)
            optimizer.step()
            optimizer.zero_grad()

        # -------------------------------------------------------- EVALUATE, LOG
        row = state["rows"][-1]
        row |= {"molecules_trained_on": len(data), "loss": sum(losses) / len(losses)}
        row |= {f"{name}_held_out": math.nan for name in measures(base)}  # of a round without evaluation
        if r + 1 == args.rounds or args.eval_every and (r + 1) % args.eval_every == 0:
            with model.lora_merged():
                tuned, tuned_images, molecules = evaluate(model, reward, known, args, f"evaluate {r + 1}")
            state["tuned"] = tuned
            row |= {f"{name}_held_out": value for name, value in measures(tuned).items()}
            save_molecules(folder, "tuned", *molecules)
        state["losses"] += losses
        state["round"] = r + 1
        model.save_tuned(folder)
        log_metrics(folder, state["rows"], state["round"], time.perf_counter() - run_start)
        if not math.isnan(row["reward_held_out"]):
            titles = [f"{args.atoms[i % len(args.atoms)]} atoms" for i in range(GRID_IMAGES // GRID_COLUMNS)]
            save_grid(folder / "grid.png", base_images, tuned_images, titles, GRID_COLUMNS)
        save_curves(folder / "curves.png", state["rows"], state["losses"], base_reward, args.reward)
        save()
        print_round(state, args.rounds, speed)

    # ------------------------------------------------------------ SHOW
    table = results_table(base, state["tuned"])
    write_json(folder / "results.json", {"table": table, "seconds": state["seconds"]})
    print_table(table, f"{args.eval_molecules} molecules", f"   ({args.reward} was optimised)")
    files = f"{TUNED_FILE}, results.json, metrics.csv, .smi and .xyz files, grid.png, curves.png"
    print(f"\n{state['seconds']:.0f} s. In {folder}: {files}. To use it:\n")
    print(f"""import torch
from molecules.graft_molecules import sample
from molecules.judge import judge
from molecules.model import Model, derived_seed, draw_noise
model = Model.load({str((folder / TUNED_FILE).resolve())!r}, {args.device!r})
noise, atoms = draw_noise([derived_seed("eval", 0)], {args.steps}), {args.atoms[0]}
print(judge(sample(model, noise, torch.tensor([atoms]), {args.eta})[0, :atoms].cpu()))""")


if __name__ == "__main__":
    run_script(main, Args, shared=True)
