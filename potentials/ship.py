"""Put a trained model into its folder, with its two reference structures; for maintainers.

    python potentials/ship.py water-pbe0 path/to/trained.pt [path/to/dft_frames.xyz]
    python potentials/ship.py --characterize water-pbe0 folder/of/the/data

The second only measures again, on the frames that train.toml names, what the training covered and how far
predictions may be off.

The file stores no structures of the training, which are other people's, but some of short dynamics of the model itself:
fine-tuning keeps what it knows of them. The reference structures are the project's own, too: a short MD with the model
itself from a built or relaxed start, and a small strained or stretched structure; energies, forces and stress are the
model's in float64. For water the radial distribution functions of the DFT frames are summarised too.
"""

import contextlib
import copy
import json
import sys
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import get_distances
from ase.md.langevin import Langevin
from ase.neighborlist import neighbor_list
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
TEMPERATURES = {"acetylacetone-pbe": (300, 600), "silicon-pbe": (300, 1000, 3000), "water-pbe0": (300, 400)}  # K


def water_box(n: int = 4, spacing: float = 12.444661 / 4, closest: float = 1.7) -> Atoms:
    """n^3 randomly turned molecules on a cubic lattice at the density of the training data.

    A molecule is turned until it is `closest` Å from the others: from overlapping ones a relaxation finds H2.
    """
    rng = np.random.default_rng(0)
    box = Atoms(cell=[n * spacing] * 3, pbc=True)
    for site in np.ndindex(n, n, n):
        while True:
            one = molecule("H2O")
            one.euler_rotate(*rng.uniform(0, 360, 3), center="COM")
            one.translate(spacing * (np.array(site) + 0.5) - one.get_center_of_mass())
            distances = get_distances(one.positions, box.positions, cell=box.cell, pbc=True)[1] if len(box) else None
            if distances is None or distances.min() > closest:
                break
        box += one
    return box


def check_molecules(atoms: Atoms) -> None:
    """Every hydrogen is bound to one oxygen, two to each."""
    i = neighbor_list("i", atoms, {("O", "H"): 1.3})
    assert (np.bincount(i, minlength=len(atoms)) == np.where(atoms.numbers == 8, 2, 1)).all(), "a molecule broke"
    assert not len(neighbor_list("i", atoms, {("H", "H"): 1.2})), "two hydrogens met"


def settled(atoms: Atoms, calculator, temperature: float, steps: int) -> Atoms:
    """Relax roughly, then run Langevin dynamics."""
    atoms.calc = calculator
    FIRE(atoms, logfile=None).run(fmax=0.5, steps=100)
    dynamics = Langevin(
        atoms,
        0.5 * units.fs,
        temperature_K=temperature,
        friction=0.02 / units.fs,
        rng=np.random.default_rng(1),
        fixcm=False,
    )
    dynamics.run(steps)
    return atoms


def structures(name: str, calculator, start: Atoms | None) -> list[Atoms]:
    if name == "water-pbe0":
        cluster = Atoms(
            "OHHOHH", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0], [0, 2.9, 0], [0.5, 3.5, 0.6], [-0.6, 3.4, 0.5]]
        )
        cluster.set_cell([8, 8, 8])
        cluster.pbc = True
        liquid = settled(water_box(), calculator, 330, 5000)
        check_molecules(liquid)
        return [liquid, cluster]
    if name == "silicon-pbe":
        strained = bulk("Si", a=5.47)
        strained.set_cell(strained.cell @ np.array([[1.02, 0.01, 0], [0, 0.99, 0.02], [0, 0, 1.01]]), scale_atoms=True)
        return [settled(bulk("Si", cubic=True, a=5.47).repeat(2), calculator, 600, 200), strained]
    start.calc = calculator
    FIRE(start, logfile=None).run(fmax=0.01, steps=500)
    relaxed = start.copy()
    return [relaxed, settled(start.copy(), calculator, 300, 400)]


def own_structures(name: str, start: Atoms, calculator) -> StoredStructures | None:
    """Structures of short dynamics of the model itself, at temperatures of its training."""
    found = []
    for temperature in TEMPERATURES[name]:
        atoms = start.copy()
        atoms.calc = calculator
        for n in range(24):
            timestep = 2.0 if name == "silicon-pbe" else 0.5
            rng = np.random.default_rng([temperature, n])
            dynamics = Langevin(
                atoms, timestep * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False
            )
            dynamics.run(200)
            found.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
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
    potential.examples = own_structures(name, start, SEGNNCalculator(potential, domain="ignore"))
    save_potential(path, potential, metadata=metadata)
    print(describe_model(*load_committee(path)))


def main(name: str, trained: str, frames: str | None = None) -> None:
    folder = HERE / name
    potential, metadata = load_with_metadata(trained)
    torch.manual_seed(0)
    fast, exact = SEGNNCalculator(trained), SEGNNCalculator(trained, dtype="float64")
    data = ase.io.read(frames, ":") if frames else []
    # acetylacetone: only connectivity is taken from the data, the geometry is relaxed with the model
    start = Atoms(data[0].numbers, data[0].positions) if data else None
    kept = []
    for atoms in structures(name, fast, start):
        atoms = Atoms(atoms.numbers, np.round(atoms.positions, 6), cell=atoms.cell, pbc=atoms.pbc)
        atoms.calc = exact
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if atoms.pbc.all():
            results["stress"] = atoms.get_stress()
        atoms.calc = SinglePointCalculator(atoms, **results)
        kept.append(atoms)
    ase.io.write(folder / "reference.xyz", kept)
    potential.examples = own_structures(name, kept[0], fast)
    save_potential(folder / "model.pt", potential, metadata=without_folders(metadata))
    if name == "water-pbe0" and data:
        curves = radial_distribution(data, ["O-O", "O-H", "H-H"], r_max=6.0, bins=120)
        summary = {
            "frames": len(data),
            "r": np.round(curves["O-O"][0], 4).tolist(),
            "g": {pair: np.round(g, 4).tolist() for pair, (_, g) in curves.items()},
        }
        (folder / "rdf_dft.json").write_text(json.dumps(summary))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--characterize"]:
        measure_again(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
