"""What `segnn learn` makes of systems that are no textbook case, each from one structure and a universal potential.

python benchmarks/own_systems.py                              # pip install sevenn; three loops of 20 minutes
python benchmarks/own_systems.py --systems mixture --minutes 40 --temperature 300 350 --work mixtures

perovskite  CH3NH3PbI3, cubic, 2x2x2: five elements in 96 atoms, whose ions turn
interface   water between layers of MgO(001): 111 atoms
mixture     ethanol and water, 1 to 3, liquid: 108 atoms, of which molecules are placed on a lattice at first

A row tells how a loop ended (or the error that says why not), its labels, and errors (rms) of the potential on frames
of its own dynamics, at all conditions and at the worst, beside the aim; the reports tell the rest. A loop that was
stopped goes on by the same command.
"""

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.geometry import get_distances
from ase.spacegroup import crystal
from report import print_table, save

from segnn_ase.base.errors import SEGNNError
from segnn_ase.learn import LearnConfig, learn

COLUMNS = {
    "system": "s",
    "atoms": "d",
    "labels": "d",
    "minutes": ".0f",
    "E": ".2f",
    "F": ".1f",
    "worst": ".1f",
    "told": "s",
}
PER_GRAM = units.kg / 1000  # amu
NEAREST, TRIES = 1.4, 10_000  # Å between atoms of two molecules, and how often one is turned


def packed(names: Sequence[str], cell: np.ndarray, rng: np.random.Generator) -> Atoms:
    """Molecules in random order on the sites of a lattice that fills an orthorhombic cell (3,) Å, each turned until no
    atom is nearer than 1.4 Å to another molecule's."""
    per_side = np.ones(3, int)
    while per_side.prod() < len(names):
        per_side[np.argmax(cell / per_side)] += 1
    sites = rng.permutation(np.array(list(np.ndindex(*per_side))))[: len(names)]
    found = Atoms(cell=cell, pbc=True)
    for name, site in zip(rng.permutation(names), sites, strict=True):
        found += next(filter(partial(is_apart, found), placed(str(name), (site + 0.5) * cell / per_side, rng)))
    return found


def placed(name: str, place: np.ndarray, rng: np.random.Generator) -> Iterator[Atoms]:
    for _ in range(TRIES):
        one = molecule(name)
        one.euler_rotate(*rng.uniform(0, 360, 3))
        one.positions += place - one.get_center_of_mass()
        yield one
    raise SystemExit(f"{name} has no room at {place}")


def is_apart(others: Atoms, one: Atoms) -> bool:
    if not len(others):
        return True
    return get_distances(one.positions, others.positions, others.cell, others.pbc)[1].min() > NEAREST


def perovskite(rng: np.random.Generator) -> Atoms:
    """Lead and iodine of the cubic phase at 330 K (a = 6.31 Å), methylammonium in any direction."""
    a = 6.31
    frame = crystal(["Pb", "I"], [(0, 0, 0), (0.5, 0, 0)], spacegroup=221, cellpar=[a, a, a, 90, 90, 90]).repeat(2)
    for site in np.ndindex(2, 2, 2):
        one = methylammonium()
        one.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
        one.positions += a * (np.array(site) + 0.5) - one.get_center_of_mass()
        frame += one
    return frame


def methylammonium() -> Atoms:
    """Staggered: C-N 1.49, C-H 1.09, N-H 1.03 Å, tetrahedral."""
    z, r = np.cos(np.radians(70.53)), np.sin(np.radians(70.53))
    angles = np.radians([0, 120, 240])
    ring = np.stack([r * np.cos(angles), r * np.sin(angles), np.full(3, z)], axis=1)
    up, down = 1.03 * ring + [0, 0, 1.49], -1.09 * ring
    return Atoms("CNH6", [[0, 0, 0], [0, 0, 1.49], *up, *down])


def interface(rng: np.random.Generator) -> Atoms:
    """Three layers of MgO (a = 4.21 Å), and between them and their images 10 Å with the water of 9 Å of the liquid, 3 Å
    of which the surfaces keep free at first."""
    a, gap = 4.21, 9.0
    solid = crystal(["Mg", "O"], [(0, 0, 0), (0.5, 0.5, 0.5)], spacegroup=225, cellpar=[a, a, a, 90, 90, 90]).repeat(
        (2, 2, 2)
    )
    solid = solid[solid.positions[:, 2] < 1.25 * a]
    side = np.array([2 * a, 2 * a, gap])
    count = round(0.997 * side.prod() * 1e-24 * PER_GRAM / molecule("H2O").get_masses().sum())
    water = packed(["H2O"] * count, side - [0, 0, 2.0], rng)
    water.positions[:, 2] += a + 2.0
    solid.set_cell([2 * a, 2 * a, a + gap + 1.0])
    return solid + water


def mixture(rng: np.random.Generator) -> Atoms:
    """6 ethanol and 18 water at 0.92 g/cm^3."""
    names = ["CH3CH2OH"] * 6 + ["H2O"] * 18
    mass = sum(molecule(name).get_masses().sum() for name in names)
    return packed(names, np.full(3, (mass / PER_GRAM / 0.92 * 1e24) ** (1 / 3)), rng)


SYSTEMS = {"perovskite": perovskite, "interface": interface, "mixture": mixture}


def learned(name: str, args: argparse.Namespace) -> dict:
    start = args.work / f"{name}.extxyz"
    if not start.exists():
        SYSTEMS[name](np.random.default_rng(0)).write(start)
    values = {
        "out": str(args.work / f"{name}.pt"),
        "structures": str(start),
        "reference": args.reference,
        "conditions": {"temperature": args.temperature, "picoseconds": args.picoseconds},
        "aim": {"forces": args.aim},
        "budget": {"minutes": args.minutes},
        "model": {"preset": "fast"},
    }
    row = {"system": name, "atoms": len(SYSTEMS[name](np.random.default_rng(0)))}
    try:
        found = learn(LearnConfig.parse(values))
    except SEGNNError as error:
        return row | {"told": f"{type(error).__name__}: {error}"}
    known = found.errors or {"energy": None, "forces": None, "by_condition": {}}
    errors = {"E": known["energy"], "F": known["forces"]}
    worst = max(known["by_condition"].values(), default=None)
    told = {"worst": worst, "told": found.why or "the aim is reached"}
    return row | {"labels": found.labels, "minutes": found.minutes} | errors | told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--reference", default="sevennet-0", help="short name of `segnn learn`")
    parser.add_argument("--temperature", nargs="+", type=float, default=[330.0], help="K")
    parser.add_argument("--picoseconds", type=float, default=5.0)
    parser.add_argument("--aim", type=float, default=60.0, help="meV/Å")
    parser.add_argument("--minutes", type=float, default=20.0, help="of a loop")
    parser.add_argument("--work", type=Path, default=Path("own_systems"))
    parser.add_argument("--out", default="own_systems")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [learned(name, args) for name in args.systems]
    print_table(rows, COLUMNS)
    save(args.out, rows, {name: value for name, value in vars(args).items() if name != "work"})


if __name__ == "__main__":
    main()
