"""Put a trained model into its folder, with its two reference structures and its card; for maintainers.

    python potentials/ship.py water-pbe0 path/to/trained.pt [path/to/dft_frames.xyz]
    python potentials/ship.py --characterize water-pbe0 folder/of/the/data
    python potentials/ship.py --card water-pbe0 [conservation.json] [properties.json]

The second only measures again, on the frames that train.toml names, what the training covered and how far
predictions may be off. The third only writes the card's numbers: those of the model file, and those of files that
the benchmarks of these names wrote. A new potential is an entry of `POTENTIALS`, and a folder with train.toml and card.

The file stores no structures of the training, which are other people's, but some of short dynamics of the model itself:
fine-tuning keeps what it knows of them. The reference structures are the project's own, too, `starts.py`: built,
relaxed and moved with the model itself; energies, forces and stress are the model's in float64. Where an entry has
pairs, their radial distribution functions in the DFT frames are summarised too.
"""

import contextlib
import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ase.io
import cards
import numpy as np
import starts
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.langevin import Langevin
from ase.optimize import FIRE

from segnn_ase import SEGNNCalculator
from segnn_ase.base.settings import read_toml
from segnn_ase.md.analysis import radial_distribution
from segnn_ase.store.description import describe_model
from segnn_ase.store.model_file import load_committee, load_with_metadata, save_potential
from segnn_ase.structure.stored import StoredStructures, stored
from segnn_ase.train.characterize import characterize
from segnn_ase.train.evaluation import evaluator_of
from segnn_ase.train.prepare import prepare
from segnn_ase.train.settings import TrainConfig

HERE = Path(__file__).parent


class Structure(NamedTuple):
    """A structure that is built, relaxed and moved by Langevin dynamics."""

    build: Callable[[], Atoms]
    fmax: float | None = None  # eV/Å, of the relaxation; None: there is none
    temperature: float = 300.0  # K
    steps: int = 0  # of the dynamics
    molecules: bool = False  # whether every bond must last, and none be added


class Shipped(NamedTuple):
    """What differs between the potentials."""

    first: Structure  # from which the dynamics of the stored structures begins
    second: Structure
    temperatures: tuple[int, ...]  # K, of the stored structures: those of the training
    timestep: float = 0.5  # fs
    pairs: tuple[str, ...] = ()  # whose radial distribution functions in the DFT frames are kept


def of_crystal(symbol: str, a: float, n: int, temperature: float, temperatures: tuple[int, ...]) -> Shipped:
    """n^3 cubic cells with a lattice constant a (Å), moved, and the strained primitive cell."""
    moved = Structure(partial(starts.crystal, symbol, a, n), 0.5, temperature, 200)
    return Shipped(moved, Structure(partial(starts.strained_crystal, symbol, a)), temperatures, timestep=2.0)


def of_electrolyte(temperature: float, n: int, density: float) -> Structure:
    return Structure(partial(starts.electrolyte, n, density), 0.5, temperature, 4000, molecules=True)


POTENTIALS = {
    "acetylacetone-pbe": Shipped(
        Structure(starts.acetylacetone, 0.01), Structure(starts.acetylacetone, 0.01, 300, 400), (300, 600)
    ),
    "ecemc-pbe": Shipped(of_electrolyte(500, 4, 0.85), of_electrolyte(600, 1, 0.95), (500, 750)),
    "lithium-pbe": of_crystal("Li", 3.43, 3, 300, (300, 600)),
    "molybdenum-pbe": of_crystal("Mo", 3.17, 3, 600, (300, 1000, 3000)),
    "silicon-pbe": of_crystal("Si", 5.47, 2, 600, (300, 1000, 3000)),
    "water-pbe0": Shipped(
        Structure(starts.water_box, 0.5, 330, 5000, molecules=True),
        Structure(starts.water_dimer),
        (300, 400),
        pairs=("O-O", "O-H", "H-H"),
    ),
}


def made(structure: Structure, timestep: float, calculator: SEGNNCalculator) -> Atoms:
    """Build, relax and move; positions in the digits of the file."""
    atoms = structure.build()
    built = atoms.copy()
    atoms.calc = calculator
    if structure.fmax is not None:
        FIRE(atoms, logfile=None).run(fmax=structure.fmax, steps=500)
    move(atoms, timestep, structure.temperature, structure.steps, np.random.default_rng(1))
    if structure.molecules:
        starts.check_molecules(atoms, built)
    return Atoms(atoms.numbers, np.round(atoms.positions, 6), cell=atoms.cell, pbc=atoms.pbc)


def move(atoms: Atoms, timestep: float, temperature: float, steps: int, rng: np.random.Generator) -> None:
    common = {"temperature_K": temperature, "friction": 0.02 / units.fs, "fixcm": False}
    Langevin(atoms, timestep * units.fs, rng=rng, **common).run(steps)


def labelled(atoms: Atoms, exact: SEGNNCalculator) -> Atoms:
    """With the results of the model."""
    atoms.calc = exact
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def own_structures(entry: Shipped, start: Atoms, calculator: SEGNNCalculator) -> StoredStructures | None:
    """Structures of short dynamics of the model itself, at temperatures of its training."""
    found = []
    for temperature in entry.temperatures:
        atoms = start.copy()
        atoms.calc = calculator
        for n in range(24):
            move(atoms, entry.timestep, temperature, 200, np.random.default_rng([temperature, n]))
            found.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
        if entry.first.molecules:
            starts.check_molecules(atoms, start)
    return stored(found)


def without_folders(metadata: dict) -> dict:
    """Shorten the paths of the maintainer's machine to folder/file."""

    def short(path: str) -> str:
        return "/".join(Path(path).parts[-2:])

    training = copy.deepcopy(metadata["training"])
    training["out"] = Path(training["out"]).name
    data = training["data"]
    data.update({key: [short(path) for path in data[key]] for key in ("train", "valid", "test")})
    data["isolated_atoms"] = data["isolated_atoms"] and short(data["isolated_atoms"])
    errors = {short(path): values for path, values in metadata["errors"].items()}
    return {**metadata, "training": training, "errors": errors}


def measure_again(name: str, folder: str) -> None:
    path = HERE / name / "model.pt"
    potential, metadata = load_with_metadata(path)
    with contextlib.chdir(folder):
        settings = read_toml(HERE / name / "train.toml")
        # a name of its own: no training is to be gone on with
        job = prepare(TrainConfig.parse({**settings, "out": "measured_again.pt"}), report=print)
    data, evaluate = job.data, evaluator_of(potential, job.data.train)
    characterize(potential, data.train, data.valid, data.closest, lone_atoms=job.lone_atoms, evaluate=evaluate)
    start = ase.io.read(HERE / name / "reference.xyz", 0)
    calculator = SEGNNCalculator(potential, domain="ignore")
    potential.examples = own_structures(POTENTIALS[name], start, calculator)
    save_potential(path, potential, metadata=metadata)
    print(describe_model(*load_committee(path)))


def curves_of(frames: list[Atoms], pairs: tuple[str, ...]) -> dict:
    """Radial distribution functions, rounded, for rdf_dft.json."""
    curves = radial_distribution(frames, pairs, r_max=6.0, bins=120)
    g = {pair: np.round(g, 4).tolist() for pair, (_, g) in curves.items()}
    return {"frames": len(frames), "r": np.round(curves[pairs[0]][0], 4).tolist(), "g": g}


def main(name: str, trained: str, frames: str | None = None) -> None:
    entry, folder = POTENTIALS[name], HERE / name
    potential, metadata = load_with_metadata(trained)
    fast, exact = (SEGNNCalculator(trained, dtype=dtype, domain="ignore") for dtype in ("float32", "float64"))
    kept = [made(structure, entry.timestep, fast) for structure in (entry.first, entry.second)]
    ase.io.write(folder / "reference.xyz", [labelled(atoms.copy(), exact) for atoms in kept])
    potential.examples = own_structures(entry, kept[0], fast)
    save_potential(folder / "model.pt", potential, metadata=without_folders(metadata))
    if entry.pairs and frames:
        (folder / "rdf_dft.json").write_text(json.dumps(curves_of(ase.io.read(frames, ":"), entry.pairs)))
    cards.write_card(folder)


def write_card(name: str, *results: str) -> None:
    cards.write_card(HERE / name, *results)


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same structures in every run
    first, *rest = sys.argv[1:]
    commands = {"--characterize": measure_again, "--card": write_card}
    commands[first](*rest) if first in commands else main(first, *rest)
