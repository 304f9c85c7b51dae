"""Properties that the shipped potentials predict, beside DFT and experiment with their sources (`published.py`).

python benchmarks/properties.py silicon-pbe               # lattice, C_ij, vacancy, surfaces, phonons, melt
python benchmarks/properties.py water-pbe0 --ps 50        # some 2 hours on one thread: structure, diffusion, H bonds
python benchmarks/properties.py molybdenum-pbe --model trained.pt

Each group of properties is kept in a folder of the model's own below --work, and so are the runs: the same command goes
on where it was stopped, and with more picoseconds from there. The melt moves for a fifth of them.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ase.io
import crystals
import numpy as np
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.md.analysis import DiffusionCoefficient
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.vibrations import VibrationsData
from crystals import Measured
from published import PUBLISHED, Published
from report import print_table, save

from segnn_ase import SEGNNCalculator
from segnn_ase.md.analysis import radial_distribution
from segnn_ase.md.run import run_md
from segnn_ase.md.settings import MDConfig
from segnn_ase.store.shipped import find_model
from segnn_ase.structure.neighbors import neighbor_list

Curves = dict[str, list[list[float]]]  # by pair: r in Å, and g
SPAN = {"O-O": (2.0, 3.3), "O-H": (1.4, 2.4), "H-H": (1.9, 3.0), "Si-Si": (1.8, 3.3)}  # Å, where the peak is looked for
VISCOSITY = 4.9e-4  # Pa s, of water at 330 K (IAPWS 2008)


class Run(NamedTuple):
    """What is asked for."""

    model: Path
    folder: Path
    ps: float

    def calculator(self, dtype: str) -> SEGNNCalculator:
        return SEGNNCalculator(str(self.model), dtype=dtype, domain="ignore")


def of_crystal(measure: Callable, crystal: crystals.Crystal) -> Callable[[Run], tuple[Measured, Curves]]:
    return lambda run: (measure(crystal, run.calculator("float64"), run.folder), {})


def moved(run: Run, name: str, atoms: Atoms, ps: float, **settings) -> list[Atoms]:
    """Frames of a run that goes on where it was, every 25 fs."""
    timestep = settings.pop("timestep")
    files = {kind: str(run.folder / f"{name}.{end}") for kind, end in (("trajectory", "traj"), ("log", "csv"))}
    every = round(25 / timestep)
    steps = max(round(1000 * ps / timestep), every)
    config = MDConfig(
        steps=steps, timestep=timestep, save_every=every, restart=str(run.folder / f"{name}.npz"), **files, **settings
    )
    run_md(atoms, config)
    return ase.io.read(files["trajectory"], ":")[1:]


def peak(r: np.ndarray, g: np.ndarray, span: tuple[float, float]) -> tuple[float, float]:
    """Position (Å) and height of the largest value in the span, of the parabola through it and its neighbours."""
    inside = np.flatnonzero((r > span[0]) & (r < span[1]))
    n = inside[g[inside].argmax()]
    a, b, c = np.polyfit(r[n - 1 : n + 2] - r[n], g[n - 1 : n + 2], 2)
    shift = -b / (2 * a) if a < 0 else 0.0
    return float(r[n] + shift), float(c + b * shift / 2)


def structure_of(frames: list[Atoms], pairs: list[str], bins: int) -> Curves:
    curves = radial_distribution(frames, pairs, r_max=6.0, bins=bins)
    return {pair: [r.tolist(), g.tolist()] for pair, (r, g) in curves.items()}


def peaks(curves: Curves) -> Measured:
    found = {}
    for pair, (r, g) in curves.items():
        position, height = peak(np.array(r), np.array(g), SPAN[pair])
        found |= {f"{pair}, first peak": (position, "Å"), f"{pair}, height": (height, "")}
    return found


def melt(run: Run, cells: int = 2) -> tuple[Measured, Curves]:
    """Silicon at 3,000 K and the density of the crystal, as in the data; the first half of the run is left out."""
    atoms = bulk("Si", cubic=True, a=5.469).repeat(cells)
    atoms.calc = run.calculator("float32")
    frames = moved(run, "melt", atoms, run.ps / 5, ensemble="langevin", temperature=3000, timestep=1.0)
    curves = structure_of(frames[len(frames) // 2 :], ["Si-Si"], bins=100)
    position, height = peak(*map(np.array, curves["Si-Si"]), SPAN["Si-Si"])
    return {"melt, first peak": (position, "Å"), "melt, height": (height, "")}, curves


def water(run: Run) -> tuple[Measured, Curves]:
    """64 molecules at 330 K: a tenth of the time with friction, then with a thermostat that leaves diffusion alone."""
    atoms = ase.io.read(find_model("water-pbe0").parent / "reference.xyz", "0")
    atoms.calc = run.calculator("float32")
    moved(run, "warm", atoms, run.ps / 10, ensemble="langevin", temperature=330, timestep=0.5)
    gentle = {"ensemble": "bussi", "temperature": 330, "tdamp": 1000.0, "velocities": "keep"}
    frames = moved(run, "run", atoms, run.ps, timestep=0.5, **gentle)
    curves = structure_of(frames, ["O-O", "O-H", "H-H"], bins=120)
    temperature = float(np.mean([frame.get_temperature() for frame in frames]))
    D, spread = diffusion(frames, interval=25.0)
    found = {
        **peaks(curves),
        "hydrogen bonds of a molecule": (hydrogen_bonds(frames), ""),
        "diffusion": (D, "1e-9 m^2/s"),
        "diffusion, spread of segments": (spread, "1e-9 m^2/s"),
        "diffusion, infinite box": (D + of_the_box(temperature, atoms.cell.lengths()[0]), "1e-9 m^2/s"),
        "temperature": (temperature, "K"),
    }
    return found, curves


def diffusion(frames: list[Atoms], interval: float, segments: int = 5) -> tuple[float, float]:
    """Of the oxygens by ASE, from the mean squared displacements in segments of frames `interval` fs apart."""
    oxygens = np.flatnonzero(frames[0].numbers == 8).tolist()
    analysis = DiffusionCoefficient(frames, interval * units.fs, atom_indices=oxygens)
    analysis.calculate(number_of_segments=segments if len(frames) >= 10 * segments else 1)
    (D,), (spread,) = analysis.get_diffusion_coefficients()
    return float(D * 1e4 * units.fs), float(spread * 1e4 * units.fs)  # Å^2 per ASE's time to 1e-9 m^2/s


def of_the_box(temperature: float, length: float) -> float:
    """What a periodic cube of that edge (Å) takes from D: 2.837 k T / (6 pi eta L), Yeh and Hummer (2004)."""
    return float(1e9 * 2.837297 * units._k * temperature / (6 * np.pi * VISCOSITY * length * 1e-10))


def hydrogen_bonds(frames: list[Atoms], longest: float = 3.5, widest: float = 30.0) -> float:
    """Bonds of a molecule, given and taken: O-O within 3.5 Å and H-O-O within 30°, Luzar and Chandler (1996)."""
    return float(np.mean([_hydrogen_bonds(frame, longest, widest) for frame in frames]))


def _hydrogen_bonds(frame: Atoms, longest: float, widest: float) -> float:
    i, j, S = neighbor_list(frame.positions, frame.cell.array, frame.pbc, longest)
    vectors = frame.positions[j] - frame.positions[i] + S @ frame.cell.array
    lengths, oxygen = np.linalg.norm(vectors, axis=1), frame.numbers == 8
    bound = np.flatnonzero(oxygen[i] & ~oxygen[j] & (lengths < 1.3))
    pairs = np.flatnonzero(oxygen[i] & oxygen[j])
    unit = vectors / lengths[:, None]
    cosines = unit[bound] @ unit[pairs].T  # (O-H bonds, O-O pairs)
    given = (i[bound][:, None] == i[pairs]) & (cosines > np.cos(np.radians(widest)))
    return 2 * given.sum() / oxygen.sum()


def molecule(run: Run) -> tuple[Measured, Curves]:
    """Acetylacetone: harmonic vibrations, and the barrier between both places of the hydrogen."""
    atoms = ase.io.read(find_model("acetylacetone-pbe").parent / "reference.xyz", "0")
    atoms.calc = run.calculator("float64")
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=1000)
    hydrogen, near, far = shared_hydrogen(atoms)
    modes = VibrationsData.from_2d(atoms, atoms.calc.get_hessian(atoms))
    frequencies = modes.get_frequencies()
    along = atoms.positions[hydrogen] - atoms.positions[near]
    stretch = np.abs(modes.get_modes()[:, hydrogen] @ along).argmax()
    found = {
        "lowest vibration": (float(frequencies[6].real - frequencies[6].imag), "1/cm"),
        "enol O-H stretch": (float(frequencies[stretch].real), "1/cm"),
        "highest C-H stretch": (float(frequencies[-1].real), "1/cm"),
        "H-transfer barrier": (barrier(atoms, hydrogen, near, far), "eV"),
    }
    return found, {}


def shared_hydrogen(atoms: Atoms) -> tuple[int, int, int]:
    """The hydrogen between two oxygens, and these, the nearer first."""
    hydrogens, oxygens = np.flatnonzero(atoms.numbers == 1), np.flatnonzero(atoms.numbers == 8)
    distances = atoms.get_all_distances()[np.ix_(hydrogens, oxygens)]
    n = distances.sum(axis=1).argmin()
    near, far = oxygens[distances[n].argsort()]
    return int(hydrogens[n]), int(near), int(far)


def barrier(atoms: Atoms, hydrogen: int, near: int, far: int) -> float:
    """By a climbing elastic band, eV above the start."""
    other = atoms.copy()
    away = other.positions[near] - other.positions[far]
    other.positions[hydrogen] = other.positions[far] + 1.02 * away / np.linalg.norm(away)
    other.calc = atoms.calc
    BFGS(other, logfile=None).run(fmax=1e-3, steps=1000)
    images = [atoms.copy(), *(atoms.copy() for _ in range(7)), other.copy()]
    for image in images:
        image.calc = atoms.calc
    band = NEB(images, climb=True, allow_shared_calculator=True, method="improvedtangent")
    band.interpolate("idpp")
    FIRE(band, logfile=None).run(fmax=0.01, steps=500)
    energies = [image.get_potential_energy() for image in images]
    return float(max(energies) - energies[0])


def solid(crystal: crystals.Crystal, *more: str) -> dict[str, Callable]:
    names = ("lattice", "elastic", "vacancy", "surfaces", *more)
    return {name: of_crystal(getattr(crystals, name), crystal) for name in names}


GROUPS = {
    "silicon-pbe": {**solid(crystals.SILICON, "phonons"), "melt": melt},
    "molybdenum-pbe": solid(crystals.MOLYBDENUM),
    "lithium-pbe": solid(crystals.LITHIUM),
    "water-pbe0": {"water": water},
    "acetylacetone-pbe": {"molecule": molecule},
}
TIMED = ("melt", "water")  # groups that are read out of a run of --ps


def measured(name: str, groups: list[str], run: Run) -> tuple[Measured, Curves]:
    """All groups, each from its file if it is there."""
    values: Measured = {}
    curves: Curves = {}
    for group in groups:
        done = run.folder / (f"{group}-{run.ps:g}ps.json" if group in TIMED else f"{group}.json")
        if not done.exists():
            print(f"{group} ...", flush=True)
            done.write_text(json.dumps(GROUPS[name][group](run)))
        found = json.loads(done.read_text())
        values |= {key: tuple(value) for key, value in found[0].items()}
        curves |= found[1]
    return values, curves


def table(name: str, values: Measured, stored: Measured) -> list[dict]:
    """A row for each property; what is stored with the potential of its DFT frames stands for published DFT."""
    rows = []
    for key, (value, unit) in values.items():
        dft, experiment = PUBLISHED[name].get(key, Published())
        row = {"potential": name, "property": key, "unit": unit, "model": value}
        row |= {"dft": dft and dft.value, "experiment": experiment and experiment.value}
        sources = [found.source for found in (dft, experiment) if found]
        if key in stored:
            row["dft"] = stored[key][0]
            sources.insert(0, "data: its frames, with quantum nuclei")
        rows.append({**row, "sources": "; ".join(sources)})
    return rows


def stored_curves(model: Path) -> Curves:
    """Radial distribution functions of the DFT frames, where they come with the potential."""
    path = model.parent / "rdf_dft.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return {pair: [found["r"], g] for pair, g in found["g"].items()}


def draw(out: str, rows: list[dict], curves: Curves, dft: Curves) -> None:
    """How far the model is from DFT and experiment, in per cent, and its radial distribution functions."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, 1 + len(curves), figsize=(6 + 4 * len(curves), 4), layout="constrained", squeeze=False
    )
    names = [row["property"] for row in rows if row["dft"] or row["experiment"]]
    for kind, label, marker in (("dft", "from DFT", "o"), ("experiment", "from experiment", "x")):
        some = [row for row in rows if row[kind]]
        off = [100 * (row["model"] / row[kind] - 1) for row in some]
        axes[0, 0].plot(off, [names.index(row["property"]) for row in some], marker, label=label)
    axes[0, 0].axvline(0, color="gray", linewidth=0.8)
    axes[0, 0].set(yticks=range(len(names)), yticklabels=names, xlabel="the potential is off by [%]")
    axes[0, 0].invert_yaxis()
    axes[0, 0].legend()
    for axis, (pair, (r, g)) in zip(axes[0, 1:], curves.items(), strict=True):
        axis.plot(r, g, label="potential")
        if pair in dft:
            axis.plot(*dft[pair], "--", label="DFT")
        axis.set(xlabel="r [Å]", ylabel=f"g({pair})", xlim=(0, 6), ylim=(0, 4))
        axis.legend()
    figure.savefig(f"{out}.png", dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("potential", choices=GROUPS)
    parser.add_argument("--model", help="file, where it is not the shipped one")
    parser.add_argument("--groups", nargs="+", help="some of the groups of properties")
    parser.add_argument("--ps", type=float, default=50.0, help="of molecular dynamics")
    parser.add_argument("--work", type=Path, default=Path("properties"))
    parser.add_argument("--out", default="properties")
    a = parser.parse_args()
    groups = a.groups or list(GROUPS[a.potential])
    if not set(groups) <= set(GROUPS[a.potential]):
        parser.error(f"--groups {' '.join(groups)}: expected some of {', '.join(GROUPS[a.potential])}")
    torch.set_num_threads(1)
    model = find_model(a.model or a.potential)
    folder = a.work / f"{a.potential}-{hashlib.sha256(model.read_bytes()).hexdigest()[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    values, curves = measured(a.potential, groups, Run(model, folder, a.ps))
    dft = stored_curves(find_model(a.potential)) if a.potential == "water-pbe0" else {}
    rows = table(a.potential, values, peaks(dft))
    columns = {"property": "", "model": ".4g", "dft": ".4g", "experiment": ".4g", "unit": "", "sources": ""}
    print_table(rows, columns)
    draw(a.out, rows, curves, dft)
    save(a.out, rows, {key: str(value) for key, value in vars(a).items()})


if __name__ == "__main__":
    main()
