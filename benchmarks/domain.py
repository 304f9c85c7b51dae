"""What the comparison with the training data finds: structures outside that are flagged, frames inside that are not.

python benchmarks/domain.py FOLDER [--only silicon]

FOLDER: the sets that the shipped potentials were trained on (`mlearn_Si`, `acac`, `water_pbe0`). Structures outside
are named, and made here; where there are several of a name, such as the frames of a run, the first that is flagged ends
it. Some of them turn out to be covered by the training: these are listed, but not counted. Printed are also the rank
correlations of the expected error of the forces and of the newness with the true error of the forces.
"""

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np
from ase import Atoms, units
from ase.build import bulk, diamond100, graphene, molecule
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.optimize import FIRE
from report import print_table
from scipy.stats import spearmanr

from segnn_ase import SEGNNCalculator
from segnn_ase.model.newness import newness
from segnn_ase.structure.graph import graph_from_atoms

A = 5.468  # Å, silicon
CELL = 12.444661  # Å, water


class Set(NamedTuple):
    name: str
    kind: str  # outside, covered or inside
    frames: list[Atoms]


def run(atoms: Atoms, calc, kelvin: float, fs: float, timestep: float, frames: int, friction: float = 0.02):
    """Frames of a Langevin run, evenly apart."""
    atoms, rng, out = atoms.copy(), np.random.default_rng(0), []
    atoms.calc = calc
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=rng)
    langevin = {"temperature_K": kelvin, "friction": friction / units.fs, "rng": rng, "fixcm": False}
    dynamics = Langevin(atoms, timestep * units.fs, **langevin)
    for _ in range(frames):
        dynamics.run(round(fs / timestep / frames))
        out.append(atoms.copy())
    return out


def strained(atoms: Atoms, f) -> list[Atoms]:
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ np.array(f), scale_atoms=True)
    return [atoms]


def silicon(calc, folder: Path) -> Iterator[Set]:
    si = bulk("Si", a=A, cubic=True).repeat(2)
    eye, shear = np.eye(3), np.eye(3)[[1, 0, 2]] * [[1], [0], [0]]
    crystals = {
        "fcc": bulk("Si", "fcc", a=3.86).repeat(3),
        "bcc": bulk("Si", "bcc", a=3.09).repeat(3),
        "hcp": bulk("Si", "hcp", a=2.74, c=4.47).repeat(3),
        "beta-tin": Atoms(
            "Si4", scaled_positions=[[0, 0, 0], [0.5, 0, 0.25], [0.5, 0.5, 0.5], [0, 0.5, 0.75]],
            cell=[4.81, 4.81, 2.65], pbc=True,
        ).repeat((2, 2, 3)),
        "simple cubic": bulk("Si", "sc", a=2.53).repeat(4),
        "simple cubic, 2.6 Å": bulk("Si", "sc", a=2.6).repeat(4),
        "simple hexagonal": Atoms("Si", cell=[2.7, 2.7, 2.54, 90, 90, 120], pbc=True).repeat((3, 3, 3)),
        "fcc, 4.1 Å": bulk("Si", "fcc", a=4.1).repeat(3),
    }  # fmt: skip
    for name, atoms in crystals.items():
        yield Set(name, "outside", [atoms])
        if name in ("fcc", "bcc", "hcp", "beta-tin"):
            yield Set(f"{name}, 6 % longer", "outside", strained(atoms, 1.06 * eye))
    yield Set("silicene", "outside", [graphene("Si2", a=2.46 * 1.57, vacuum=8.0, size=(3, 3, 1))])
    for factor in (1.1, 1.2):
        yield Set(f"volume times {factor**3:.2f}", "outside", strained(si, factor * eye))
    yield Set("strained by -10 %", "covered", strained(si, np.diag([0.9, 1, 1])))
    yield Set("strained by 10 %", "covered", strained(si, np.diag([1.1, 1, 1])))
    for percent in (20, 30):
        yield Set(f"strained by {percent} %", "outside", strained(si, np.diag([1 + percent / 100, 1, 1])))
    yield Set("strained by 30 %, thinner", "outside", strained(si, np.diag([1.3, 0.85, 0.85])))
    for slope in (0.1, 0.2, 0.3):
        yield Set(f"sheared by {slope}", "covered" if slope < 0.21 else "outside", strained(si, eye + slope * shear))
    for kelvin in (3000, 5000):
        yield Set(f"{kelvin} K, 0.2 ps", "outside", run(si, calc, kelvin, 200, 1.0, 4))
    yield from interstitials(si, calc)
    yield Set("Si(100)-1x1", "outside", [slab()])
    yield Set("dimer", "outside", [Atoms("Si2", [[0, 0, 0], [2.2, 0, 0]])])
    cluster = bulk("Si", a=A, cubic=True)
    cluster.pbc = False
    yield Set("cluster of 8", "outside", [cluster])
    yield Set("crystal", "inside", [si.copy(), bulk("Si", a=A, cubic=True).repeat(3)])
    yield Set("strained by 1 and 2 %", "inside", strained(si, 1.01 * eye) + strained(si, np.diag([1.02, 1, 1])))
    vacancy = si.copy()
    del vacancy[5]
    for name, atoms, kelvin in (("crystal", si, 300), ("crystal", si, 800), ("vacancy", vacancy, 300)):
        yield Set(f"{name}, {kelvin} K", "inside", run(atoms, calc, kelvin, 600, 2.0, 6))
    yield Set("test.xyz", "inside", ase.io.read(folder / "mlearn_Si" / "test.xyz", ":"))


def slab() -> Atoms:
    atoms = diamond100("Si", (1, 1, 8), a=A, vacuum=6.0).repeat((2, 2, 1))
    atoms.pbc = True
    return atoms


def interstitials(si: Atoms, calc) -> Iterator[Set]:
    sites = {"tetrahedral": [0.5, 0.5, 0.5], "hexagonal": [0.375] * 3, "tetrahedral, other": [0.25, 0.25, 0.75]}
    first = {}
    for n, (name, site) in enumerate(sites.items()):
        added = si + Atoms("Si", [A * np.array(site)])
        added.rattle(0.05, seed=n)
        first[f"interstitial, {name}"] = added
    for n, direction in enumerate([[1, 0, 0], [1, 1, 0]]):
        step = 1.15 * np.array(direction) / np.linalg.norm(direction)
        added = si + Atoms("Si", [si.positions[10] - step])
        added.positions[10] += step
        added.rattle(0.03, seed=n)
        first[f"interstitial, split {direction}"] = added
    for name, atoms in first.items():
        yield Set(name, "outside", [atoms])
        relaxed = atoms.copy()
        relaxed.calc = calc
        FIRE(relaxed, logfile=None).run(fmax=0.05, steps=60)
        yield Set(f"{name}, relaxed", "outside", [relaxed.copy()])


def acetylacetone(calc, folder: Path) -> Iterator[Set]:
    tests = {name: ase.io.read(folder / "acac" / f"test_{name}.xyz", ":") for name in ("300K", "600K")}
    some = [Atoms(a.numbers, a.positions) for a in tests["300K"][:30:10]]
    for name in ("CH3COCH3", "CH3CH2OH", "C6H6", "H2O", "CH3OH", "CH4"):
        yield Set(name, "outside", [molecule(name)])
    for factor in (1.1, 1.05, 0.95, 0.92):
        yield Set(f"bonds times {factor}", "outside", [Atoms(a.numbers, a.positions * factor) for a in some])
    for n in np.flatnonzero(some[0].numbers == 1)[[0, 2, 4, 6]].tolist():
        radical = some[0].copy()
        del radical[n]
        yield Set(f"radical without H {n}", "outside", [radical])
    for kelvin in (1000, 1500):
        yield Set(f"{kelvin} K, 2 ps", "outside", run(some[0], calc, kelvin, 2000, 0.5, 8, 0.01))
    other = some[0].copy()
    other.translate([0, 0, 4.0])
    yield Set("two, 4 Å apart", "outside", [some[0] + other])
    oxygen = some[0].positions[some[0].numbers == 8][0]
    yield Set("protonated", "outside", [some[0] + Atoms("H", [oxygen + np.array([0, 0, 0.98])])])
    relaxed = some[0].copy()
    relaxed.calc = calc
    FIRE(relaxed, logfile=None).run(fmax=0.01, steps=300)
    yield Set("relaxed", "inside", [relaxed.copy()])
    yield Set("300 K, 4 ps", "inside", run(some[0], calc, 300, 4000, 0.5, 20, 0.01))
    for name, frames in tests.items():
        yield Set(f"test_{name}.xyz", "inside", frames)


def water(calc, folder: Path) -> Iterator[Set]:
    tests = ase.io.read(folder / "water_pbe0" / "test.xyz", ":")
    liquid = Atoms(tests[0].numbers, tests[0].positions, cell=tests[0].cell, pbc=True)
    hydroxide, hydronium = liquid.copy(), liquid.copy()
    del hydroxide[int(np.flatnonzero(liquid.numbers == 1)[3])]
    hydronium += Atoms("H", [liquid.positions[liquid.numbers == 8][7] + [0, 0, 1.0]])
    yield Set("OH-", "outside", [hydroxide])
    yield Set("H3O+", "outside", [hydronium])
    for percent in (25, 10):
        thin = apart(liquid, (100 / (100 - percent)) ** (1 / 3))
        yield Set(f"{percent} % thinner", "outside", [thin, *run(thin, calc, 330, 200, 0.5, 2)])
    for radius in (3, 4, 5):
        yield Set(f"cavity, {radius} Å", "outside", [cavity(liquid, radius)])
    for kelvin in (450, 600):
        yield Set(f"{kelvin} K, 0.3 ps", "outside", run(liquid, calc, kelvin, 300, 0.5, 3))
    surface = liquid.copy()
    surface.cell[2, 2] += 12
    yield Set("surface", "outside", [surface])
    yield Set("bonds times 1.05", "outside", strained(liquid, 1.05 * np.eye(3)))
    yield Set("molecule", "outside", [molecule("H2O")])
    two = [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0], [0, 2.9, 0], [0.5, 3.5, 0.6], [-0.6, 3.4, 0.5]]
    yield Set("dimer", "outside", [Atoms("OHHOHH", two)])
    for kelvin in (300, 330):
        yield Set(f"{kelvin} K, 0.5 ps", "inside", run(liquid, calc, kelvin, 500, 0.5, 5))
    yield Set("test.xyz", "inside", tests)


def molecules_of(liquid: Atoms) -> dict[int, list[int]]:
    """Hydrogens of each oxygen."""
    oxygens, found = np.flatnonzero(liquid.numbers == 8), {}
    for h in np.flatnonzero(liquid.numbers == 1).tolist():
        nearest = int(oxygens[liquid.get_distances(h, oxygens, mic=True).argmin()])
        found.setdefault(nearest, []).append(h)
    return found


def apart(liquid: Atoms, factor: float) -> Atoms:
    """Molecules as they are, their distances times a factor."""
    atoms = liquid.copy()
    atoms.set_cell(liquid.cell * factor)
    for oxygen, hydrogens in molecules_of(liquid).items():
        atoms.positions[oxygen] = liquid.positions[oxygen] * factor
        for h in hydrogens:
            atoms.positions[h] = atoms.positions[oxygen] + liquid.get_distance(oxygen, h, mic=True, vector=True)
    return atoms


def cavity(liquid: Atoms, radius: float) -> Atoms:
    centre = liquid.cell.array.sum(0) / 2
    gone = []
    for oxygen, hydrogens in molecules_of(liquid).items():
        d = liquid.positions[oxygen] - centre
        if np.linalg.norm(d - CELL * np.round(d / CELL)) < radius:
            gone += [oxygen, *hydrogens]
    atoms = liquid.copy()
    del atoms[gone]
    return atoms


SYSTEMS = {
    "silicon": ("silicon-pbe", silicon),
    "acetylacetone": ("acetylacetone-pbe", acetylacetone),
    "water": ("water-pbe0", water),
}


def judge(calc, one: Set) -> dict:
    """How many frames are flagged, and why."""
    found = [[way.kind for way in r["outside_domain"]] for r in calc.evaluate(one.frames)]
    flagged = [ways for ways in found if ways]
    return {
        "structure": one.name,
        "is": one.kind,
        "frames": len(found),
        "flagged": len(flagged),
        "why": ", ".join(sorted({kind for ways in flagged for kind in ways})),
    }


def rank_correlations(calc, frames: list[Atoms]) -> dict[str, float]:
    """Of what is expected with the true rms error of the forces."""
    potential = calc.potentials[0]
    known, errors, scores = potential.domain.surroundings, [], {"forces_std": [], "newness": []}
    for atoms, r in zip(frames, calc.evaluate(frames), strict=True):
        graph = graph_from_atoms(atoms, potential.cutoff)
        new = newness(known, graph, potential.species_index[graph.numbers], potential.cutoff)
        errors.append(np.sqrt(np.mean((r["forces"] - atoms.calc.results["forces"]) ** 2)))
        scores["forces_std"].append(np.sqrt(np.mean(r["forces_std"] ** 2)))
        scores["newness"].append(max(new.used(known.landscape.limits)))
    return {name: float(spearmanr(values, errors)[0]) for name, values in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=SYSTEMS)
    parser.add_argument("--potential", help="another one than the shipped")
    a = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for system in [a.only] if a.only else SYSTEMS:
        name, sets = SYSTEMS[system]
        calc = SEGNNCalculator(a.potential or name, domain="ignore")
        rows += [{"system": system, **judge(calc, one)} for one in sets(calc, a.folder)]
        if system == "acetylacetone":
            ranks = rank_correlations(calc, ase.io.read(a.folder / "acac" / "test_600K.xyz", "::3"))
            print("rank correlations with the error of the forces, 600 K:", {k: round(v, 3) for k, v in ranks.items()})
    print_table(rows, {"system": "", "structure": "", "is": "", "frames": "d", "flagged": "d", "why": ""})
    outside = [row for row in rows if row["is"] == "outside"]
    inside = [row for row in rows if row["is"] == "inside"]
    tests = [row for row in inside if row["structure"].startswith("test")]
    print(f"outside: {sum(row['flagged'] > 0 for row in outside)} of {len(outside)} structures flagged")
    for name, of in (("test frames", tests), ("all frames inside", inside)):
        print(f"{name}: {sum(row['flagged'] for row in of)} of {sum(row['frames'] for row in of)} flagged")


if __name__ == "__main__":
    main()
