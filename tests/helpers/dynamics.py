"""Molecular dynamics in milliseconds: a pair potential that fails on demand, and its crystal."""

import time
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator, all_changes

from helpers.systems import rattled
from segnn_ase import SEGNNCalculator
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig

CUTOFF, DEPTH, WIDTH, REST = 3.4, 0.3, 1.4, 2.55  # Å, eV, 1/Å, Å


class Morse(Calculator):
    """A smooth pair potential of all pairs, without memory of earlier structures.

    It computes only what is asked, and rounds forces otherwise when asked for the stress: the worst that a
    restart can meet. `plan` maps the number of an evaluation to what happens in it.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012 - ASE's interface

    def __init__(self, plan=None, delay: float = 0.0):
        super().__init__()
        self.plan, self.delay, self.count = plan or {}, delay, 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        self.atoms = atoms.copy()
        self.count += 1
        if self.delay:
            time.sleep(self.delay)
        kick = self.plan[self.count]() if self.count in self.plan else 0.0
        i, j = np.triu_indices(len(atoms), 1)
        vectors = atoms.positions[j] - atoms.positions[i]
        if atoms.pbc.all():
            cell = atoms.cell.array
            vectors -= np.round(vectors @ np.linalg.inv(cell)) @ cell
        r = np.linalg.norm(vectors, axis=1)
        near = r < CUTOFF
        i, j, r, vectors = i[near], j[near], r[near], vectors[near]
        growth = np.exp(-WIDTH * (r - REST))
        switch = 1 - (r / CUTOFF) ** 6
        morse, slope = DEPTH * (growth**2 - 2 * growth), 2 * DEPTH * WIDTH * (growth - growth**2)
        energy = float(np.sum(morse * switch**3))
        pull = (slope * switch**3 - 18 * morse * switch**2 * r**5 / CUTOFF**6)[:, None] * vectors / r[:, None]
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, pull)
        np.add.at(forces, j, -pull)
        self.results = {"energy": energy, "free_energy": energy}
        if "forces" in properties or "stress" in properties:
            self.results["forces"] = forces + (kick or 0.0)
        if "stress" in properties:
            self.results["forces"] = forces * (1 + 4e-16)
            virial = pull.T @ vectors / atoms.get_volume()
            self.results["stress"] = virial.flat[[0, 4, 8, 5, 2, 1]]


def crystal(**options) -> Atoms:
    atoms = bulk("Cu", a=3.6, cubic=True) * 2
    atoms.calc = Morse(**options)
    return atoms


def trimer(**options) -> Atoms:
    atoms = Atoms("Cu3", positions=[[0, 0, 0], [2.5, 0, 0], [1.3, 2.2, 0]])
    atoms.calc = Morse(**options)
    return atoms


VARIANTS = {  # of every ensemble
    "nve": {"ensemble": "nve"},
    "langevin": {"ensemble": "langevin"},
    "bussi": {"ensemble": "bussi"},
    "nhc": {"ensemble": "nhc"},
    "npt": {"ensemble": "npt", "pressure": 1.0},
    "npt_full": {"ensemble": "npt", "npt_cell": "full", "pressure": 1.0},
}


def config(folder: Path | None = None, frames: str = "md.extxyz", **settings) -> MDConfig:
    if folder is not None:
        names = {"log": "md.csv", "trajectory": frames, "restart": "md.npz"}
        settings = {name: str(folder / file) for name, file in names.items()} | settings
    return MDConfig.parse({"ensemble": "nve", "timestep": 2.0, "tdamp": 50.0, "pdamp": 200.0, **settings})


def run(atoms: Atoms, settings: MDConfig, **options):
    return run_md(atoms, settings, progress=False, **options)


def state(atoms: Atoms) -> tuple[bytes, ...]:
    return tuple(x.tobytes() for x in (atoms.positions, atoms.get_momenta(), atoms.cell.array))


def contents(settings: MDConfig) -> list[bytes]:
    return [Path(path).read_bytes() for path in (settings.log, settings.trajectory)]


def counted_dynamics(folder: Path, count=lambda: None, *, steps: int) -> None:
    """Langevin dynamics of a molecule by ../potential.pt with a skin; `count` is called after each evaluation."""

    class Counted(SEGNNCalculator):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            count()

    atoms = rattled(molecule("CH3CH2OH"), 1, 0.02)
    atoms.calc = Counted(folder.parent / "potential.pt", skin=0.3)
    names = {"log": folder / "md.csv", "trajectory": folder / "md.xyz", "restart": folder / "md.npz"}
    every = {"log_every": 1, "save_every": 1, "checkpoint_every": 5}
    settings = MDConfig(ensemble="langevin", timestep=0.5, friction=0.05, steps=steps, **every, **names)
    run_md(atoms, settings, progress=False)
