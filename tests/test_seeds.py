"""common.derived_seed: which keys the scripts use, whether two of a run can give one seed, and that none do.

numpy's SeedSequence turns a key into words of 32 bits (a text into the words of its bytes as a number, least
first) and fills up to four words with zeros. So two keys give one seed if and only if these words are equal,
but for chance (2^-63 a pair). `collision` says whether two kinds of key can have the same words, for all
values that the settings allow. Of the keys that meet in a run there is one such pair, and it is harmless:
  - With --seed 1702257004, the number of the text "eval", training image (r, i, 0) has the noise of
    evaluation image (r, i), which is of another prompt; training molecule or page (r, 0, 0) has that of
    evaluation molecule or page r. No other of the 2^63 seeds does that.
Chance counts for more in torch, whose CPU generator reads 32 of the 63 bits: among the 31,608 images and
updates of a run of noise_ppo.py, two share their noise with a probability of 11 %. With seed 0 these are
images (24, 155, 5) and (25, 174, 3), of two prompts and iterations.
"""

import ast
import itertools
import sys

import numpy as np
import pytest
import torch

import graft
import inverse_noise_correction
import layouts.model
import molecules.model
import noise_ppo
import pgraft
from awm import Args as AwmArgs
from common import derived_seed
from conftest import ROOT, arguments_for, run_inside
from ddpo import Args as DdpoArgs
from diffusion_nft import Args as NftArgs
from layouts import pgraft_layouts
from molecules import graft_molecules
from utils.runs import InputError

# ---------------------------------------------------------------- the keys in the source

# file: {arguments of derived_seed: the kinds of key that they make}; a new call is added here and to RUNS
CALLS = {
    "common": {
        "'eval', 0, 0": ["eval prompt sample"],  # in printed code
        "seed, 'prompts', order": ["SEED prompts round"],
    },
    "graft": {
        "'eval', i, j": ["eval prompt sample"],
        "args.seed, r, i, j": ["SEED round prompt sample"],
        "args.seed, 'accept', r": ["SEED accept round"],
        "args.seed, 'update', r": ["SEED update round"],
    },
    "pgraft": {
        "args.seed, 'probe', i, j": ["SEED probe prompt sample"],
        "seed, step, j": ["HASH step sample"],  # of the derived seed of a prompt of the probe
        "'eval', i, j": ["eval prompt sample"],
        "args.seed, 'probe'": ["SEED probe"],
        "args.seed, r, i, j": ["SEED round prompt sample"],
        "args.seed, 'accept', r": ["SEED accept round"],
        "args.seed, 'update', r": ["SEED update round"],
    },
    "noise_ppo": {
        "tag, i, j": ["eval prompt sample", "temperature prompt sample"],
        "'eval', 0, 0": ["eval prompt sample"],
        "args.seed, it, i, j": ["SEED round prompt sample"],
        "args.seed, 'update', it": ["SEED update round"],
    },
    "inverse_noise_correction": {
        "*key, i": ["SEED corrector image", "SEED longer image"],  # in fit, also of fashion/train.py
        "'held out'": ["held_out"],
        "'eval', number": ["eval image"],
        "'split'": ["split"],
        "'data noise', name": [f"data_noise {name}" for name in ("reference", "train", "invert", "floor")],
        "'eval', 0": ["eval image"],
        "'statistics', i": ["statistics image"],
    },
    "benchmarks/ddpo": {
        "args.seed, r, i, j": ["SEED round prompt sample"],
        "args.seed, 'update', r": ["SEED update round"],
    },
    "benchmarks/diffusion_nft": {
        "args.seed, r, i, j": ["SEED round prompt sample"],
        "args.seed, 'update', r": ["SEED update round"],
    },
    "benchmarks/awm": {
        "args.seed, r, i, j": ["SEED round prompt sample"],
        "args.seed, 'update', r": ["SEED update round"],
    },
    "benchmarks/path_kl": {"'eval', i, j": ["eval prompt sample"]},
    "benchmarks/black_ground": {"'eval', i": ["eval image"]},
    "benchmarks/base": {"tag, i, j": ["eval prompt sample", "best prompt sample"]},
    "molecules/graft_molecules": {
        "'eval', i": ["eval molecule"],
        "args.seed, r, i, j": ["SEED round group sample"],
        "args.seed, 'accept', r": ["SEED accept round"],
        "args.seed, 'update', r": ["SEED update round"],
    },
    "layouts/pgraft_layouts": {
        "args.seed, 'probe', i, j": ["SEED probe group sample"],
        "seed, step, j": ["HASH step sample"],  # of the derived seed of a multiset of the probe
        "'eval', i": ["eval page"],
        "args.seed, 'probe'": ["SEED probe"],
        "args.seed, 'groups', r": ["SEED groups round"],
        "args.seed, r, i, j": ["SEED round group sample"],
        "args.seed, 'accept', r": ["SEED accept round"],
        "args.seed, 'update', r": ["SEED update round"],
    },
    "layouts/train": {
        "seed, 'split'": ["SEED split"],
        "args.seed, 'train'": ["SEED train"],
        "args.seed, 'features'": ["SEED features"],
        "'check', j": ["check page"],
    },
    "fashion/train": {"args.seed, 'flow'": ["SEED flow"]},
    "molecules/train": {
        "args.seed, 'train'": ["SEED train"],
        "args.seed, 'check'": ["SEED check"],
        "'check', j": ["check molecule"],
    },
}
TUNING = ["eval prompt sample", "SEED prompts round", "SEED round prompt sample", "SEED update round"]
RUNS = {  # script: the kinds of key that meet in one of its runs
    "graft": [*TUNING, "SEED accept round"],
    "pgraft": [*TUNING, "SEED accept round", "SEED probe", "SEED probe prompt sample", "HASH step sample"],
    "noise_ppo": [*TUNING, "temperature prompt sample"],
    "inverse_noise_correction": sum(CALLS["inverse_noise_correction"].values(), []),
    "benchmarks/ddpo": TUNING,
    "benchmarks/diffusion_nft": TUNING,
    "benchmarks/awm": TUNING,
    "benchmarks/path_kl": ["eval prompt sample"],
    "benchmarks/base": ["eval prompt sample", "best prompt sample"],
    "benchmarks/judges": [
        "eval image",
        *CALLS["inverse_noise_correction"]["'data noise', name"],
    ],
    "benchmarks/black_ground": ["eval image", "data_noise invert"],
    "benchmarks/evaluate": ["eval prompt sample"],
    "fashion/train": ["SEED feature_network image", "SEED flow", "split", "data_noise train"],
    "molecules/graft_molecules": sum(CALLS["molecules/graft_molecules"].values(), []),
    "molecules/train": sum(CALLS["molecules/train"].values(), []),
    "layouts/pgraft_layouts": sum(CALLS["layouts/pgraft_layouts"].values(), []),
    "layouts/train": sum(CALLS["layouts/train"].values(), []),
}
NUMBERS = {  # part of a key: its least and largest value; every one is a word of 32 bits
    "round": (0, 10**5),  # round, iteration; order of the prompts
    "prompt": (0, 10**9),  # no file has more
    "sample": (0, 10**4),  # sample, restart
    "step": (1, 999),
    "image": (0, 10**9),  # image, update
    "molecule": (0, 10**6),
    "page": (0, 10**6),
    "group": (0, 10**6),
}
# Keys that begin alike and differ in length. The longer one has more than four words.
UNEVEN = {("SEED probe", "SEED probe prompt sample"), ("SEED probe", "SEED probe group sample")}


def calls_in(file):
    """The arguments of every call of derived_seed in a file."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    nodes = [node for node in nodes if ast.unparse(node.func).endswith("derived_seed")]
    return {", ".join(ast.unparse(part) for part in node.args) for node in nodes}


def test_every_call_is_in_the_table():
    rooms = (".", "utils", "shapes", "fashion", "molecules", "layouts", "benchmarks")
    files = [file for room in rooms for file in (ROOT / room).glob("*.py")]
    found = {file.relative_to(ROOT).with_suffix("").as_posix(): calls_in(file) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {n: set(c) for n, c in CALLS.items()}
    # nobody gives the function another name, and the kinds of all calls meet somewhere
    sources = [file.read_text(encoding="utf-8") for file in files]
    assert not any("derived_seed as" in source or "= derived_seed" in source for source in sources)
    kinds = {kind for calls in CALLS.values() for kinds in calls.values() for kind in kinds}
    assert kinds <= {kind for run in RUNS.values() for kind in run}


def test_numbers_are_in_their_ranges():
    """The largest values of NUMBERS are those that the settings allow."""
    inc = inverse_noise_correction.Args
    most = [
        (cls, name, 10**4)
        for cls in (graft.Args, pgraft.Args, DdpoArgs, NftArgs, AwmArgs)
        for name in ("rounds", "samples")
    ]
    most += [(cls, "eval_samples", 10**4) for cls in (graft.Args, pgraft.Args, noise_ppo.Args, DdpoArgs)]
    most += [(graft_molecules.Args, "rounds", 10**4), (graft_molecules.Args, "eval_molecules", 10**6)]
    most += [(graft_molecules.Args, "groups_per_round", 10**6), (graft_molecules.Args, "samples", 10**4)]
    pages = pgraft_layouts.Args
    most += [(pages, "rounds", 10**4), (pages, "samples", 10**4), (pages, "probe_restarts", 10**4)]
    most += [(pages, "groups_per_round", 10**6), (pages, "probe_groups", 10**6), (pages, "steps", 999)]
    most += [(noise_ppo.Args, "iterations", 10**5), (noise_ppo.Args, "samples", 10**4)]
    most += [(pgraft.Args, "probe_restarts", 10**4), (graft.Args, "steps", 999), (pgraft.Args, "steps", 999)]
    most += [(inc, "updates", 10**9), (inc, "images", 10**7), (inc, "eval_images", 10**6)]
    most += [(cls, "seed", 2**63 - 1) for cls in (graft.Args, pgraft.Args, noise_ppo.Args, DdpoArgs, inc)]
    for cls, name, largest in most:
        assert getattr(cls(**{name: largest}), name) == largest
        with pytest.raises(InputError, match=f"--{name} {largest + 1}: must be between"):
            cls(**{name: largest + 1})


def alike(shorter, longer):
    """Whether a kind has the words and numbers of a shorter one at the same places."""
    one, other = shorter.split(), longer.split()
    return len(one) < len(other) and one == other[: len(one)]


def test_keys_that_begin_alike_have_one_length():
    pairs = {pair for kinds in RUNS.values() for pair in itertools.permutations(kinds, 2) if alike(*pair)}
    assert pairs == UNEVEN


# ---------------------------------------------------------------- what a key becomes


def words_of(part):
    """The 32-bit words of a number or text, least first."""
    number = part if isinstance(part, int) else int.from_bytes(part.encode(), "big")
    words = [number % 2**32]
    while number := number // 2**32:
        words.append(number % 2**32)
    return words


def test_a_seed_is_that_of_the_words_with_zeros():
    """As the search below supposes."""
    keys = [(0,), (1, 2), ("eval", 3, 4), (5, "update", 6), (2**40 + 3, 1, 2, 3), ("temperature", 0, 1)]
    for key in [*keys, (7, "probe", 0, 0), ("data noise", "reference")]:
        words = [word for part in key for word in words_of(part)]
        for padded in (words, words + [0] * (4 - len(words))):
            state = np.random.SeedSequence(padded).generate_state(1, np.uint64)
            assert derived_seed(*key) == int(state[0]) // 2
        longer = np.random.SeedSequence([*words, 0]).generate_state(1, np.uint64)
        assert (derived_seed(*key) == int(longer[0]) // 2) == (len(words) < 4)
    assert derived_seed(1, 2) == derived_seed(1, 2, 0, 0) != derived_seed(1, 2, 0, 0, 0)


def places(kind, large):
    """The words of a kind of key: a number, or (name, least, largest). large: a seed of two words."""
    words = []
    for part in kind.split():
        if part in ("SEED", "HASH"):
            words += [(f"{part} low", 0, 2**32 - 1)] + [(f"{part} high", 1, 2**31 - 1)] * large
        elif part in NUMBERS:
            words.append((part, *NUMBERS[part]))
        else:
            words += words_of(part.replace("_", " "))
    return words + [0] * (4 - len(words))


def collision(one, other, large):
    """{word of the seed: the value it must have} if two kinds of key can have the same words; else None."""
    first, second = places(one, large), places(other, large)
    if len(first) != len(second):
        return None
    needed = {}
    for pair in zip(first, second):
        bounds = [place[1:] if isinstance(place, tuple) else (place, place) for place in pair]
        least, largest = max(b[0] for b in bounds), min(b[1] for b in bounds)
        if least > largest:
            return None
        for place in pair:
            if least == largest and isinstance(place, tuple) and place[0].startswith("SEED"):
                if needed.setdefault(place[0], least) != least:
                    return None
    return needed


def test_no_two_keys_of_a_run_collide():
    """But for one seed: see above."""
    found = {}
    for script, kinds in RUNS.items():
        for pair in itertools.combinations(dict.fromkeys(kinds), 2):
            for large in (False, True):
                needed = collision(*pair, large)
                # the seeds of a probe's restarts are random numbers
                if needed is not None and "HASH" not in f"{pair}":
                    found.setdefault(pair, []).append((script, needed))
    tuned = ("graft", "pgraft", "noise_ppo", "benchmarks/ddpo", "benchmarks/diffusion_nft", "benchmarks/awm")
    unlucky = {"SEED low": 1702257004}
    assert found == {
        ("eval prompt sample", "SEED round prompt sample"): [(script, unlucky) for script in tuned],
        ("eval molecule", "SEED round group sample"): [("molecules/graft_molecules", unlucky)],
        ("eval page", "SEED round group sample"): [("layouts/pgraft_layouts", unlucky)],
    }
    assert derived_seed(1702257004, 2, 3, 0) == derived_seed("eval", 2, 3)
    assert derived_seed(0, "flow") == derived_seed(0, "flow", 0)


def test_search_finds_what_is_there():
    assert collision("SEED update round", "SEED update", False) == {} == collision("a", "a image", True)
    assert (
        collision("a image", "b image", False)
        is None
        is collision("SEED probe", "SEED probe step step", True)
    )
    assert collision("SEED round", "eval step", False) == {"SEED low": 1702257004}
    assert collision("SEED round SEED", "eval step a", False) is None  # one seed is not two words
    assert (
        collision("SEED round", "temperature", True) is None
    )  # the third word of the text is larger than a round


# ---------------------------------------------------------------- short runs


EVALUATION = ("evaluate", "final_evaluation")  # functions
# the draws on which the corrector's weights are chosen are the same each time; operations are counted on any
REPEATED = ("held_out_loss", "update_flops")
SEED = 7
FLAGS = {
    "graft": "--rounds 3 --rule exponential --beta 1",
    "pgraft": "--rounds 3 --switch auto --probe_prompts 3 --probe_restarts 2",
    "noise_ppo": "--iterations 3 --prompts_per_iteration 3 --minibatch 5 --eval_steps 4 5",
    "inverse_noise_correction": "--device cpu --images 40 --eval_images 20 --updates 12 --batch 8 --steps 3"
    " --corrector_network token:8 --checkpoint_every 2 --tolerance 1 --sample_batch 20"
    " --eval_steps 3 --eval_corrector_steps 2",
    "benchmarks/ddpo": "--rounds 3 --epochs 2",
    "layouts/pgraft_layouts": "--device cpu --rounds 3 --groups_per_round 6 --samples 3 --steps 3 --updates 2"
    " --batch 4 --eval_pages 80 --probe_groups 3 --probe_restarts 2",
    "benchmarks/diffusion_nft": "--rounds 3",
    "benchmarks/awm": "--rounds 3",
    "molecules/graft_molecules": "--device cpu --rounds 3 --atoms 1 2 --groups_per_round 6 --samples 3"
    " --steps 3 --updates 2 --batch 4 --eval_molecules 20",
}


@pytest.fixture
def seeds(monkeypatch):
    """What the scripts ask for: keys of derived_seed, and the seeds of generators, each with the names of the
    functions that were running."""
    seen = {"keys": [], "generators": []}

    def running():
        frame, names = sys._getframe(2), set()
        while frame:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        return names

    def recorded_seed(*key):
        seen["keys"].append((key, running()))
        return derived_seed(*key)

    class Generator(torch.Generator):
        def manual_seed(self, seed):
            seen["generators"].append((seed, running()))
            return super().manual_seed(seed)

    default_rng = np.random.default_rng

    def recorded_rng(seed=None):
        seen["generators"].append((seed, running()))
        return default_rng(seed)

    copies = (derived_seed, molecules.model.derived_seed, layouts.model.derived_seed)
    for module in [
        module for module in sys.modules.values() if getattr(module, "derived_seed", None) in copies
    ]:
        if module.__name__ != __name__:
            monkeypatch.setattr(module, "derived_seed", recorded_seed)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(np.random, "default_rng", recorded_rng)
    return seen


def is_of(kind, key):
    """Whether a key is of that kind."""
    parts = kind.split()

    def fits(part, value):
        if part == "SEED":
            return value == SEED
        if part in NUMBERS or part == "HASH":
            return isinstance(value, int) and (
                part == "HASH" or NUMBERS[part][0] <= value <= NUMBERS[part][1]
            )
        return value == part.replace("_", " ")

    return len(parts) == len(key) and all(map(fits, parts, key))


@pytest.mark.parametrize("script", FLAGS)
def test_no_noise_is_drawn_twice(script, seeds, tiny_arguments, tmp_path, monkeypatch):
    """No seed of a run's training occurs twice, none is of the evaluation, whose seeds do not depend on the
    run's. All keys are of the kinds of RUNS."""
    monkeypatch.chdir(tmp_path)
    args_class = {"noise_ppo": noise_ppo.Args, "benchmarks/ddpo": DdpoArgs, "pgraft": pgraft.Args}
    args_class |= {"benchmarks/diffusion_nft": NftArgs, "benchmarks/awm": AwmArgs}
    argv = arguments_for(args_class.get(script, graft.Args), tiny_arguments)
    # with no pipeline
    others = ("inverse_noise_correction", "molecules/graft_molecules", "layouts/pgraft_layouts")
    argv = ([] if script in others else argv) + FLAGS[script].split()
    code, _, error = run_inside([*argv, "--seed", str(SEED), "--output", "run"], f"{script}.py")
    assert code == 0, error
    evaluation = {seed for seed, names in seeds["generators"] if names & set(EVALUATION)}
    repeated = {seed for seed, names in seeds["generators"] if names & set(REPEATED)}
    training = [s for s, names in seeds["generators"] if not names & {*EVALUATION, *REPEATED}]
    assert evaluation and len(training) > 30 and None not in training
    assert len(training) == len({seed % 2**32 for seed in training})  # torch reads 32 bits
    groups = [{seed % 2**32 for seed in group} for group in (evaluation, repeated, training)]
    assert not any(a & b for a, b in itertools.combinations(groups, 2))

    kinds = dict.fromkeys(RUNS[script], 0)
    for key, names in seeds["keys"]:
        fitting = [kind for kind in kinds if is_of(kind, key)]
        assert fitting, f"{key}: of no kind in RUNS"
        kinds.update({kind: kinds[kind] + 1 for kind in fitting})
        if names & set(EVALUATION):
            assert isinstance(key[0], str), f"{key}: evaluation must not depend on the run's seed"
    assert {kind for kind, count in kinds.items() if not count} <= {"split"}  # which is of --data
    # every seed but that of counting operations is derived
    assert set(training) | evaluation <= {derived_seed(*key) for key, _ in seeds["keys"]}
