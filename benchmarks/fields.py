"""A molecule in electric fields, and its ions, labelled by GFN2-xTB here: errors with and without what is told.

python benchmarks/fields.py --minutes 5

Ethanol along dynamics at 500 K: 500 frames in fields of up to 0.2 V/Å in random directions, with energies, forces,
dipoles and polarizabilities, learned with `external_field`, and the same structures without a field, learned without.
Acetaldehyde along dynamics at 500 K, each structure with charges of -1, 0 and +1, in one potential that is told
`charge`, and one potential for each; and the same in fields, in one that is told both. Errors are root mean squares on
200 frames of another trajectory. Needs tblite (pip install tblite). A potential that is there is not trained again.
"""

import argparse
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, Hartree
from report import print_table, save
from xtb import ATOMIC_FIELD, calculated, sampled

from segnn_ase import SEGNNCalculator
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import train

TRAIN, TEST, KELVIN = 500, 200, 500.0
MOST_FIELD = 0.2  # V/Å
STEP = 2e-3  # atomic units, of the field, for polarizabilities
CHARGES = (-1, 0, 1)


def labelled(atoms: Atoms, field: np.ndarray | None = None, charge: int = 0) -> Atoms:
    """A copy with energy, forces and dipole; with a field, V/Å, the polarizability, e Å²/V, too."""
    atoms, given = atoms.copy(), np.zeros(3) if field is None else field / ATOMIC_FIELD
    found = calculated(atoms, given, charge)
    forces = -found.get("gradient") * Hartree / Bohr
    atoms.calc = SinglePointCalculator(atoms, energy=float(found.get("energy")) * Hartree, forces=forces)
    if field is not None:
        slopes = []
        for axis in STEP * np.eye(3):
            up, down = (calculated(atoms, given + sign * axis, charge).get("dipole") for sign in (1, -1))
            slopes.append((up - down) * Bohr / (2 * STEP * ATOMIC_FIELD))
        alpha = 0.5 * (np.array(slopes) + np.array(slopes).T)
        atoms.info |= {"external_field": field, "dipole": found.get("dipole") * Bohr, "polarizability": alpha}
    if charge:
        atoms.info["charge"] = charge
    return atoms


def some_field(rng: np.random.Generator) -> np.ndarray:
    direction = rng.normal(size=3)
    return MOST_FIELD * rng.uniform() ** (1 / 3) * direction / np.linalg.norm(direction)


def frames_of(work: Path) -> dict[str, dict[str, Path]]:
    """Files to learn from and to be tested on, of each set; made once."""
    sets = ["field", "no field", *(f"charge {q:+d}" for q in CHARGES), "charges", "ions in fields"]
    paths = {name: {part: work / f"{name.replace(' ', '_')}_{part}.xyz" for part in ("train", "test")} for name in sets}
    if all(path.exists() for parts in paths.values() for path in parts.values()):
        return paths
    rng, made = np.random.default_rng(0), {}
    for seed, (part, count) in enumerate((("train", TRAIN), ("test", TEST))):
        structures = sampled(molecule("CH3CH2OH"), count, kelvin=KELVIN, seed=seed)
        made["field", part] = [labelled(atoms, some_field(rng)) for atoms in structures]
        made["no field", part] = [labelled(atoms) for atoms in structures]
        structures = sampled(molecule("CH3CHO"), count, kelvin=KELVIN, seed=10 + seed)
        for q in CHARGES:
            made[f"charge {q:+d}", part] = [labelled(atoms, charge=q) for atoms in structures]
        apart = np.random.default_rng(20 + seed)  # so that the others stay as they were
        made["ions in fields", part] = [labelled(x, some_field(apart), q) for q in CHARGES for x in structures]
        made["charges", part] = [atoms for q in CHARGES for atoms in made[f"charge {q:+d}", part]]
    for (name, part), frames in made.items():
        ase.io.write(paths[name][part], frames)
    return paths


def trained(work: Path, name: str, file: Path, minutes: float, model: dict) -> Path:
    out = work / f"{name.replace(' ', '_')}.pt"
    if not out.exists():
        training = {"minutes": minutes, "rollout_steps": 0}
        values = {"data": {"train": [str(file)]}, "model": model, "training": training, "out": str(out)}
        train(TrainConfig.parse(values))
    return out


def errors_of(model: Path, file: Path) -> dict:
    """Root mean squares of all components; of the polarizability in percent of its size."""
    calculator, missed, size = SEGNNCalculator(model, domain="ignore"), {}, []
    for atoms in ase.io.read(file, ":"):
        pairs = {"energy": (atoms.get_potential_energy(), 1e3), "forces": (atoms.get_forces(), 1e3)}
        if "dipole" in calculator.implemented_properties:
            alpha = atoms.info["polarizability"]
            pairs |= {"dipole": (atoms.get_dipole_moment(), 1.0), "polarizability": (alpha, 1.0)}
            size.append(np.ravel(alpha))
        for of, (label, unit) in pairs.items():
            found = calculator.get_property(of, atoms.copy())
            missed.setdefault(of, []).append(unit * np.ravel(np.reshape(found, np.shape(label)) - label))
    rms = {of: float(np.sqrt(np.mean(np.concatenate(x) ** 2))) for of, x in missed.items()}
    if size:
        rms["polarizability"] *= 100 / float(np.sqrt(np.mean(np.concatenate(size) ** 2)))
    return rms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of each training, thrice that for all charges")
    parser.add_argument("--out", default="fields")
    a = parser.parse_args()
    work, rows = Path(a.out), []
    work.mkdir(parents=True, exist_ok=True)
    files = frames_of(work)
    told = {"field": {"cues": ["external_field"]}, "no field": {}, "charges": {"cues": ["charge"]}}
    told["ions in fields"] = {"cues": ["charge", "external_field"]}
    for name in ("no field", "field", *(f"charge {q:+d}" for q in CHARGES), "charges", "ions in fields"):
        minutes = a.minutes * (len(CHARGES) if name in ("charges", "ions in fields") else 1)
        model = trained(work, name, files[name]["train"], minutes, told.get(name, {}))
        tests = [f"charge {q:+d}" for q in CHARGES] if name == "charges" else [name]
        rows += [{"learned": name, "test": test} | errors_of(model, files[test]["test"]) for test in tests]
    columns = {"energy": ".1f", "forces": ".1f", "dipole": ".4f", "polarizability": ".2f"}
    print_table(rows, {"learned": "", "test": "", **columns})
    print("energy meV, forces meV/Å, dipole e Å, polarizability %")
    save(str(work / "fields"), rows, vars(a))


if __name__ == "__main__":
    main()
