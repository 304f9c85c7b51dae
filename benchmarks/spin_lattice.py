"""A synthetic Hamiltonian of spins and lattice, learned with and without spin-orbit coupling, and without moments.

python benchmarks/spin_lattice.py --minutes 5 --frames 600

Dimers, trimers, clusters and a small rattled crystal with moments in random directions,

    E = sum_i<j [ V(d) + J(d) m_i.m_j + A(d) (m_i.u)(m_j.u) + D_ij.(m_i x m_j) ] + sum_i sum_j K(d) (m_i.u)^2,

u along r_ij, D_ij = sum_k w(d_ik) w(d_jk) r_ik x r_jk (Moriya's rule), all smooth at 4 Å; A, D and K are spin-orbit
coupling, and left out without it. Errors are root mean squares on frames that were never seen, in percent of those of
the labels (energies less their mean); told nothing: the same network without moments.
"""

import argparse
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list
from report import print_table, save

from segnn_ase import SEGNNCalculator
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import train

CUTOFF = 4.0  # Å


def envelope(d: torch.Tensor) -> torch.Tensor:
    x = (d / CUTOFF).clamp_max(1.0)
    return (1.0 - x**2) ** 3


def energy_of(r: torch.Tensor, m: torch.Tensor, i, j, shift: torch.Tensor, *, spin_orbit: bool) -> torch.Tensor:
    """eV; pairs i -> j with the lattice shift (E, 3) Å, both directions of each."""
    vectors = r[j] - r[i] + shift
    d = vectors.norm(dim=1)
    u, w = vectors / d[:, None], envelope(d)
    along, other = (m[i] * u).sum(1), (m[j] * u).sum(1)
    pair = w * (4.0 * torch.exp(-2.0 * (d - 1.5)) - 0.3) + 0.10 * w * torch.cos(1.5 * d) * (m[i] * m[j]).sum(1)
    if not spin_orbit:
        return 0.5 * pair.sum()
    moriya = r.new_zeros(())
    for a in range(len(r)):  # k: pairs k -> i and k -> j
        own = (i == a).nonzero()[:, 0]
        x, weight, spins = vectors[own], w[own], m[j[own]]
        axis = torch.linalg.cross(x[:, None].expand(-1, len(own), 3), x[None].expand(len(own), -1, 3))
        turn = torch.linalg.cross(spins[:, None].expand_as(axis), spins[None].expand_as(axis))
        moriya = moriya + 0.5 * (weight[:, None] * weight[None] * (axis * turn).sum(2)).sum()
    return 0.5 * (pair + 0.05 * w * along * other).sum() + 0.01 * moriya + 0.04 * (w * along**2).sum()


def frame(seed: int, *, spin_orbit: bool) -> Atoms:
    rng = np.random.default_rng(seed)
    kind = ("dimer", "trimer", "cluster", "crystal")[seed % 4]
    if kind == "crystal":
        atoms = bulk("Fe", "sc", 2.4).repeat(2)
        atoms.rattle(0.12, rng=rng)
    else:
        n = {"dimer": 2, "trimer": 3, "cluster": 5}[kind]
        places = [np.zeros(3)]
        while len(places) < n:
            new = places[rng.integers(len(places))] + rng.normal(size=3) * 1.6
            apart = np.linalg.norm(new - np.array(places), axis=1)
            if 1.8 < apart.min() < 3.2:
                places.append(new)
        atoms = Atoms(f"Fe{n}", places)
    m = rng.normal(size=(len(atoms), 3))
    m *= rng.uniform(1.5, 2.5, len(atoms))[:, None] / np.linalg.norm(m, axis=1)[:, None]
    i, j, shifts = neighbor_list("ijS", atoms, CUTOFF)
    r, spins = (torch.tensor(x, requires_grad=True) for x in (atoms.positions, m))
    pairs = (torch.as_tensor(x) for x in (i, j, shifts @ atoms.cell.array))
    energy = energy_of(r, spins, *pairs, spin_orbit=spin_orbit)
    gradient, turning = torch.autograd.grad(energy, [r, spins])
    atoms.set_initial_magnetic_moments(m)
    atoms.arrays["magnetic_forces"] = -turning.numpy()
    atoms.calc = SinglePointCalculator(atoms, energy=energy.item(), forces=-gradient.numpy())
    return atoms


def settings_of(*, spin_orbit: bool, told: bool) -> dict:
    """Of the network."""
    cue = {"name": "initial_magmoms", "spin_orbit": spin_orbit, "scale": 2.0}
    hidden = {"hidden_irreps": "32x0e+32x1o+32x1e+32x2e"} if spin_orbit else {}
    return {"cutoff": CUTOFF, "core_repulsion": False, **(hidden | {"cues": [cue]} if told else {})}


def errors_of(model: Path, frames: list[Atoms], *, told: bool) -> dict:
    calculator = SEGNNCalculator(model, domain="ignore")
    missed: dict[str, list] = {"energy": [], "forces": [], "magnetic forces": []}
    sizes: dict[str, list] = {name: [] for name in missed}
    for atoms in frames:
        labels = atoms.get_potential_energy(), atoms.get_forces(), atoms.arrays["magnetic_forces"]
        other = atoms.copy()
        if not told:
            del other.arrays["initial_magmoms"]
        other.calc = calculator
        forces = calculator.get_property("magnetic_forces", other) if told else np.zeros_like(labels[2])
        found = other.get_potential_energy(), other.get_forces(), forces
        for name, a, b in zip(missed, labels, found, strict=True):
            size = len(atoms) ** 0.5 if name == "energy" else 1.0
            missed[name].append(np.ravel(a - b) / size)
            sizes[name].append(np.ravel(a) / size)
    rms = {name: np.sqrt(np.mean(np.concatenate(x) ** 2)) for name, x in missed.items()}
    whole = {name: np.concatenate(x) for name, x in sizes.items()}
    whole["energy"] = whole["energy"] - whole["energy"].mean()
    return {f"{name}, %": 100 * rms[name] / np.sqrt(np.mean(whole[name] ** 2)) for name in missed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--epochs", type=int, help="instead of minutes, at a rate of 0.03, without patience")
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--out", default="benchmarks/results/spin_lattice")
    a = parser.parse_args()
    out, rows = Path(a.out), []
    out.mkdir(parents=True, exist_ok=True)
    for name, spin_orbit in (("exchange", False), ("spin-orbit", True)):
        train_set, test_set = (
            [frame(seed, spin_orbit=spin_orbit) for seed in range(first, first + n)]
            for first, n in ((0, a.frames), (10**6, 200))
        )
        file = out / f"{name}.xyz"
        ase.io.write(file, train_set)
        for told in (True, False):
            model = out / f"{name}-{'told' if told else 'blind'}.pt"
            config = settings_of(spin_orbit=spin_orbit, told=told)
            length = (
                {"epochs": a.epochs, "learning_rate": 0.03, "patience": a.epochs}
                if a.epochs
                else {"minutes": a.minutes}
            )
            settings = {**length, "rollout_steps": 0}
            values = {"data": {"train": [str(file)]}, "model": config, "training": settings, "out": str(model)}
            if not model.exists():
                train(TrainConfig.parse(values))
            rows.append(
                {"Hamiltonian": name, "told": "moments" if told else "nothing"} | errors_of(model, test_set, told=told)
            )
    columns = dict.fromkeys(("energy, %", "forces, %", "magnetic forces, %"), ".2f")
    print_table(rows, {"Hamiltonian": "", "told": "", **columns})
    save(str(out), rows, vars(a))


if __name__ == "__main__":
    main()
