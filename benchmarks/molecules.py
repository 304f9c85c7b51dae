"""Dipole, polarizability, gap and charges of small molecules, labelled by GFN2-xTB here: errors per preset and seed.

python benchmarks/molecules.py --presets fast segnn segnn2022 --epochs 60 --seeds 3
python benchmarks/molecules.py --presets fast --targets dipole polarizability --epochs 60

A thousand molecules of 3 to 14 atoms: those of the G2 set with H, C, N, O and F and closed shells, 18 to 19 of each,
displaced by 0.06 Å and turned at random; 900 to learn from, 100 to be tested on. The polarizability is the slope of the
dipole in a field, by central differences. "new": errors on twelve molecules of which no copy was learned. Each target
is learned alone, with a tenth of the frames to choose the model by. Needs tblite (pip install tblite). Every run has a
folder of its own below OUT, where it goes on when it was stopped; a run that is there is not repeated.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.collections import g2
from ase.units import Bohr, Hartree
from report import plot_lines, print_table, save
from xtb import calculated

from segnn_ase.properties import PropertyTraining, train_properties

FRAMES, TEST = 1000, 100
DISPLACED = 0.06  # Å
FIELD = 1e-3  # atomic units
OPEN_SHELL = {"O2", "O3", "CH2_s1A1d", "CH2_s3B1d", "NH"}  # or hardly closed
NEW = 12  # molecules that are kept back
TARGETS = {"dipole": "e Å", "polarizability": "Å^3", "gap": "eV", "charges": "e"}


def names() -> list[str]:
    """Molecules of the set that are used, in a fixed order."""
    usable = [n for n in g2.names if set(g2[n].symbols) <= set("HCNOF") and n not in OPEN_SHELL]
    closed = [n for n in usable if len(g2[n]) > 2 and sum(g2[n].numbers) % 2 == 0]
    return [closed[k] for k in np.random.default_rng(1).permutation(len(closed))]


def labelled(atoms: Atoms) -> Atoms:
    """The structure with its labels: dipole e Å, polarizability Å^3, gap eV, charges e."""
    ground = calculated(atoms)
    levels, occupations = ground.get("orbital-energies"), ground.get("orbital-occupations")
    filled = occupations > 1e-3
    slopes = []
    for axis in np.eye(3):
        up, down = (calculated(atoms, sign * FIELD * axis).get("dipole") for sign in (1, -1))
        slopes.append((up - down) / (2 * FIELD))
    atoms.info["dipole"] = ground.get("dipole") * Bohr
    atoms.info["polarizability"] = 0.5 * (np.array(slopes) + np.array(slopes).T) * Bohr**3
    atoms.info["gap"] = float(levels[~filled].min() - levels[filled].max()) * Hartree
    atoms.arrays["charges"] = ground.get("charges")
    return atoms


def displaced(some: list[str], count: int, rng: np.random.Generator) -> list[Atoms]:
    frames = []
    for k in range(count):
        atoms = molecule(some[k % len(some)])
        atoms.positions += DISPLACED * rng.normal(size=atoms.positions.shape)
        atoms.rotate(rng.uniform(0, 360), rng.normal(size=3))
        frames.append(labelled(atoms))
    return [frames[k] for k in rng.permutation(count)]


def files_of(work: Path, count: int, test: int) -> dict[str, Path]:
    """Frames to learn from, to be tested on, and of new molecules; made once."""
    paths = {name: work / f"{name}-{count}.xyz" for name in ("train", "test", "new")}
    if not all(path.exists() for path in paths.values()):
        every, rng = names(), np.random.default_rng(0)
        frames = displaced(every[NEW:], count, rng)
        parts = {"train": frames[test:], "test": frames[:test], "new": displaced(every[:NEW], test, rng)}
        for name, path in paths.items():
            ase.io.write(path, parts[name])
    return paths


def measure(a: argparse.Namespace, preset: str, target: str, seed: int, files: dict[str, Path]) -> dict:
    folder = Path(a.out) / f"{preset}-{target}-{a.epochs}-{seed}"
    known = folder / "row.json"
    if known.exists():
        return json.loads(known.read_text())
    training = {"epochs": a.epochs, "learning_rate": a.learning_rate, "seed": seed, "batch_size": 10, "device": "cpu"}
    data = {"train": str(files["train"]), "test": [str(files["test"]), str(files["new"])], "target": target}
    config = {"out": str(folder / "model.pt"), "data": data, "model": {"preset": preset}, "training": training}
    start = time.process_time()
    errors = train_properties(PropertyTraining.parse(config))
    row = {"preset": preset, "target": target, "seed": seed, "cpu_s": time.process_time() - start}
    for name in ("test", "new"):
        row |= {name: errors[str(files[name])][f"{target}_mae"]}
    known.write_text(json.dumps(row))
    return row


def spread_of(files: dict[str, Path], target: str) -> float:
    """Mean absolute deviation of the test labels' components from their mean: what knowing nothing gives."""
    frames = ase.io.read(files["test"], ":")
    values = [np.asarray(f.calc.results.get(target, f.info.get(target))) for f in frames]
    rows = np.concatenate([v.reshape(-1, 1) if target == "charges" else v.reshape(1, -1) for v in values])
    return float(np.abs(rows - rows.mean(axis=0)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["segnn"])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of which a tenth is for the test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="molecules")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    Path(a.out).mkdir(parents=True, exist_ok=True)
    files = files_of(Path(a.out), a.frames, a.frames // 10)
    for path in files.values():
        print(f"{path}: sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    rows = []
    for target in a.targets:
        unit = TARGETS[target]
        rows.append({"preset": "their mean", "target": target, "unit": unit, "test": spread_of(files, target)})
        for preset in a.presets:
            runs = [measure(a, preset, target, seed, files) for seed in range(a.seeds)]
            means = {name: float(np.mean([run[name] for run in runs])) for name in ("test", "new", "cpu_s")}
            spread = float(np.std([run["test"] for run in runs], ddof=1)) if len(runs) > 1 else None
            row = {"preset": preset, "target": target, "unit": unit, "seeds": len(runs)}
            rows.append({**row, **means, "±": spread})
    columns = {"preset": "", "target": "", "unit": "", "seeds": "d", "test": ".4f", "±": ".4f", "new": ".4f"}
    print_table(rows, {**columns, "cpu_s": ".0f"})
    mine = [{**row, "run": f"{row['preset']}, {row['target']}"} for row in rows if "cpu_s" in row]
    plot_lines(a.out, mine, group="run", x="cpu_s", y="test", labels=("CPU time [s]", "mean absolute error"))
    save(a.out, rows, {k: str(v) for k, v in vars(a).items()})


if __name__ == "__main__":
    main()
