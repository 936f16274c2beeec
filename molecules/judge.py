"""The judge: from atoms in space to a molecule of RDKit, or to none if no molecule looks like that.

Hydrogens are not there: RDKit adds as many as the valences leave free. Two atoms are bonded if their distance
is below the length of a single bond + MARGIN. Bond orders are those that fit the distances best of all that
exceed no valence (`bond_orders`). An atom has two double bonds or a triple bond only if its neighbours are
in line with it (`is_linear`). Typical lengths are those of EDM (arXiv 2203.17003, appendix). A molecule
is stable if its atoms are connected, no distance contradicts its bond order (`fits`) and RDKit's sanitisation
accepts it.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from rdkit import Chem, RDLogger

from molecules.model import ELEMENTS, SCALE

RDLogger.DisableLog("rdApp.*")  # it prints a line for every molecule that it refuses
VALENCES = {"C": 4, "N": 3, "O": 2, "F": 1}
LENGTHS = {  # pm, of single, double, triple bonds
    "CC": (154, 134, 120),
    "CN": (147, 129, 116),
    "CO": (143, 120, 113),
    "CF": (135,),
    "NN": (145, 125, 110),
    "NO": (140, 121),
    "NF": (136,),
    "OO": (148, 121),
    "OF": (142,),
    "FF": (142,),
}
MARGIN = 10  # pm, by which a single bond may be longer than typical; EDM's
SHORTER = 8  # pm, by which the shortest bond of two elements may be shorter than typical
LINE = 150  # degrees, from which on three atoms are in line
ORDERS = (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)


def lengths(a: str, b: str) -> tuple:
    """Typical bond lengths of two elements in pm, single bond first."""
    return LENGTHS.get(a + b) or LENGTHS[b + a]


def bond_orders(elements: list[str], bonds: list[tuple], linear: list[bool]) -> list[int] | None:
    """The order of every bond: the best fit to the distances of all that exceed no valence; None if there is
    none. bonds: (atom, atom, distance in pm). linear: of an atom, whether it may take part in two pi bonds.

    A higher order counts by how much the bond is shorter than half way between its typical length and that of
    the order before. So in a ring of six equal bonds of 139 pm three are double.
    """
    free = [VALENCES[e] for e in elements]
    for a, b, _ in bonds:
        free[a] -= 1
        free[b] -= 1
    if min(free) < 0:
        return None
    free = [most if may else min(most, 1) for most, may in zip(free, linear)]
    gains = []  # of each bond, for orders 1, 2, 3 as far as each step gains
    for a, b, distance in bonds:
        typical, gain = lengths(elements[a], elements[b]), [0.0]
        for shorter, longer in zip(typical[1:], typical):
            if (step := (shorter + longer) / 2 - distance) <= 0:
                break
            gain.append(gain[-1] + step)
        gains.append(gain)
    open_bonds = sorted((i for i, gain in enumerate(gains) if len(gain) > 1), key=lambda i: -gains[i][-1])
    # what the bonds from n on can add at most: it bounds the search
    rest = [sum(gains[i][-1] for i in open_bonds[n:]) for n in range(len(open_bonds) + 1)]
    best, orders = [-1.0, None], [1] * len(bonds)

    def search(n, total):
        if total + rest[n] <= best[0]:
            return
        if n == len(open_bonds):
            best[:] = total, orders.copy()
            return
        a, b, _ = bonds[open_bonds[n]]
        most = min(len(gains[open_bonds[n]]) - 1, free[a], free[b])
        for more in range(most, -1, -1):
            orders[open_bonds[n]] = 1 + more
            free[a], free[b] = free[a] - more, free[b] - more
            search(n + 1, total + gains[open_bonds[n]][more])
            free[a], free[b] = free[a] + more, free[b] + more
        orders[open_bonds[n]] = 1

    search(0, 0.0)
    return best[1]


def is_linear(atom: int, place: np.ndarray, bonds: list[tuple]) -> bool:
    """Whether an atom may take part in two pi bonds: its two neighbours are in line with it, as in CC#N or
    C=C=C. Other numbers of neighbours do not matter: of three, the valence says enough. bonds: as of
    bond_orders."""
    neighbours = [b if a == atom else a for a, b, _ in bonds if atom in (a, b)]
    if len(neighbours) != 2:
        return True
    first, second = place[neighbours] - place[atom]
    return first @ second < np.cos(np.radians(LINE)) * np.linalg.norm(first) * np.linalg.norm(second)


def fits(typical: tuple, order: int, distance: float) -> bool:
    """Whether a distance does not contradict a bond order. typical: of the elements, as in LENGTHS; pm."""
    if distance < typical[-1] - SHORTER:
        return False
    return order == len(typical) or distance > typical[order]


class Judged(NamedTuple):
    """A judged molecule."""

    molecule: Chem.Mol | None  # None: fragments, an exceeded valence, or refused by RDKit's sanitisation
    stable: bool  # no distance contradicts its bond order
    key: str  # the canonical SMILES, "" without a molecule

    @property
    def valid(self) -> bool:
        """Whether there is a molecule."""
        return self.molecule is not None


def elements_of(x_0: torch.Tensor) -> list[str]:
    """The elements of the atoms x_0 (n, 7)."""
    return [ELEMENTS[i] for i in x_0[:, 3:].argmax(1).tolist()]


def judge(x_0: torch.Tensor) -> Judged:
    """The molecule that x_0 (n, 7) shows, the rows of its n atoms."""
    place = SCALE * x_0[:, :3].double().numpy()
    elements = elements_of(x_0)
    apart = 100 * np.sqrt(np.square(place[:, None] - place[None]).sum(2))
    bonds = [
        (a, b, apart[a, b])
        for a in range(len(elements))
        for b in range(a)
        if apart[a, b] < lengths(elements[a], elements[b])[0] + MARGIN
    ]
    orders = bond_orders(elements, bonds, [is_linear(i, place, bonds) for i in range(len(elements))])
    if orders is None:
        return Judged(None, False, "")
    molecule = Chem.RWMol()
    for element in elements:
        molecule.AddAtom(Chem.Atom(element))
    for (a, b, _), order in zip(bonds, orders):
        molecule.AddBond(a, b, ORDERS[order - 1])
    if Chem.SanitizeMol(molecule, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
        return Judged(None, False, "")
    if len(Chem.GetMolFrags(molecule)) > 1:
        return Judged(None, False, "")
    stable = all(
        fits(lengths(elements[a], elements[b]), order, distance)
        for (a, b, distance), order in zip(bonds, orders)
    )
    molecule = molecule.GetMol()
    return Judged(molecule, stable, Chem.MolToSmiles(molecule))


def key_of(smiles: str) -> str:
    """The canonical SMILES of a SMILES, without stereochemistry, which the judge does not see."""
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def known_hash(key: str) -> bytes:
    """6 bytes for a canonical SMILES: two of QM9's keys have the same with a probability of 3e-5."""
    return hashlib.sha256(key.encode()).digest()[:6]
