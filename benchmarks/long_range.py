"""Ions and water far apart, labelled by GFN2-xTB here: what a cutoff leaves out, and latent charges bring back.

python benchmarks/long_range.py --minutes 5 --frames 1000 --energy-weight 1.0

Ammonium with water and formate with water, so many frames of each with 2.6 to 12 Å between the centres, turned at
random, in one potential that is told the total charge, with and without `electrostatics = "latent"`. Printed are the
largest errors along a straight line from 10 to 20 Å, whole and but for a constant, and root mean squares on 100
further frames of each. Needs tblite (pip install tblite). A potential that is there is not trained again.
"""

import argparse
from pathlib import Path

import ase.io
import matplotlib
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, Hartree
from report import print_table, save
from xtb import calculated

from segnn_ase import SEGNNCalculator
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DISPLACED, NEAREST, FARTHEST = 0.03, 2.6, 12.0  # Å
TEST = 100  # frames of each ion
LINE = np.arange(10.0, 20.1, 0.5)  # Å
BOTH = {"latent charges": {"electrostatics": "latent"}, "cutoff": {}}


def ions() -> dict[str, tuple[Atoms, int]]:
    formate = molecule("HCOOH")
    oxygens = [k for k, symbol in enumerate(formate.symbols) if symbol == "O"]
    acid = min((k for k, s in enumerate(formate.symbols) if s == "H"), key=lambda k: nearest(formate, k, oxygens))
    del formate[acid]
    ammonium = Atoms("NH4", 0.594 * np.array([[0, 0, 0], [1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]]))
    return {"ammonium": (centred(ammonium), 1), "formate": (centred(formate), -1)}


def nearest(atoms: Atoms, k: int, others: list[int]) -> float:
    return float(atoms.get_distances(k, others).min())


def centred(atoms: Atoms) -> Atoms:
    atoms.positions -= atoms.get_center_of_mass()
    return atoms


def labelled(ion: Atoms, other: Atoms, place: np.ndarray, charge: int) -> Atoms:
    other = other.copy()
    other.positions += place
    both = ion + other
    found = calculated(both, charge=charge)
    forces = -found.get("gradient") * Hartree / Bohr
    both.calc = SinglePointCalculator(both, energy=float(found.get("energy")) * Hartree, forces=forces)
    both.info["charge"] = charge
    return both


def some_frames(ion: Atoms, charge: int, count: int, rng: np.random.Generator) -> list[Atoms]:
    found: list[Atoms] = []
    while len(found) < count:
        parts = [centred(one.copy()) for one in (ion, molecule("H2O"))]
        for one in parts:
            one.positions += DISPLACED * rng.normal(size=one.positions.shape)
            one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        place = rng.normal(size=3)
        place *= rng.uniform(NEAREST, FARTHEST) / np.linalg.norm(place)
        apart = np.linalg.norm(parts[0].positions[:, None] - parts[1].positions - place, axis=2)
        if apart.min() > 1.5:
            found.append(labelled(*parts, place, charge))
    return found


def line_of(ion: Atoms, charge: int) -> list[Atoms]:
    return [labelled(ion, centred(molecule("H2O")), np.array([0.0, 0.0, d]), charge) for d in LINE]


def trained(work: Path, name: str, model: dict, training: dict) -> Path:
    out = work / f"{name.replace(' ', '_')}.pt"
    if not out.exists():
        settings = {"cues": ["charge"], **model}
        data, training = {"train": [str(work / "train.xyz")]}, {"rollout_steps": 0, **training}
        train(TrainConfig.parse({"data": data, "model": settings, "training": training, "out": str(out)}))
    return out


def missed(model: Path, frames: list[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """Errors of energies, eV, and of forces, eV/Å."""
    calculator, energies, forces = SEGNNCalculator(model, domain="ignore", dtype="float64"), [], []
    for atoms in frames:
        copy = atoms.copy()
        copy.calc = calculator
        energies.append(copy.get_potential_energy() - atoms.get_potential_energy())
        forces.append(np.ravel(copy.get_forces() - atoms.get_forces()))
    return np.array(energies), np.concatenate(forces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--frames", type=int, default=400, help="to train on, of each ion")
    parser.add_argument("--energy-weight", type=float, help="default: that of the package")
    parser.add_argument("--patience", type=int, help="in epochs; default: that of the package")
    parser.add_argument("--out", default="long_range")
    a = parser.parse_args()
    work, rng, known, rows = Path(a.out), np.random.default_rng(0), ions(), []
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "test.xyz").exists():
        for part, count in (("train", a.frames), ("test", TEST)):
            ase.io.write(work / f"{part}.xyz", [f for one in known.values() for f in some_frames(*one, count, rng)])
    given = {"minutes": a.minutes, "energy_weight": a.energy_weight, "patience": a.patience}
    training = {name: value for name, value in given.items() if value is not None}
    tests = ase.io.read(work / "test.xyz", ":")
    fig, axes = plt.subplots(1, len(known), figsize=(9, 3.5), sharey=True)
    for ax, (ion, one) in zip(axes, known.items(), strict=True):
        frames = line_of(*one)
        reference = np.array([f.get_potential_energy() for f in frames])
        ax.plot(LINE, 1e3 * (reference - reference[-1]), "k.", label="GFN2-xTB")
        for name, model in BOTH.items():
            path = trained(work, name, model, training)
            along, _ = missed(path, frames)
            energies, forces = missed(path, [f for f in tests if f.info["charge"] == one[1]])
            ax.plot(LINE, 1e3 * (reference + along - reference[-1]), label=name)
            rms = {"energy": 1e3 * np.sqrt(np.mean(energies**2)), "forces": 1e3 * np.sqrt(np.mean(forces**2))}
            worst = {"line": 1e3 * np.abs(along).max(), "slope": 1e3 * np.ptp(along) / 2}
            rows.append({"ion": ion, "model": name, **worst, **rms})
        ax.set(xlabel="distance [Å]", title=f"{ion} and water")
    axes[0].set_ylabel("energy [meV]")
    axes[0].legend()
    fig.tight_layout()
    fig.savefig(f"{a.out}.png", dpi=150)
    print_table(rows, {"ion": "", "model": "", "line": ".1f", "slope": ".1f", "energy": ".1f", "forces": ".1f"})
    print("from 10 to 20 Å: largest error, and but for a constant, meV; frames of tests: meV, meV/Å")
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
