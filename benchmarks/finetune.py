"""What fine-tuning gives with few frames, and what it costs of what the potential knew.

python benchmarks/finetune.py FOLDER            # of the data: acac/, rmd17/, mlearn_Si/, mlearn_Mo/, water_pbe0/
python benchmarks/finetune.py FOLDER --cases si-mo --modes scratch plain pseudo --frames 10 30 100 --seeds 3

Each case has some new frames (30; a tenth of them to validate), a potential that knows something else, and test frames
of both:

- acac-600K: acetylacetone at 300 K (450 frames), then 600 K
- ethanol: the same, then another molecule
- si-mo: silicon (214 frames), then molybdenum, an element that it does not know
- water-xtb: liquid water by the shipped PBE0 potential, then the same by GFN1-xTB, labelled here (3 s a frame; needs
  tblite): another level of theory

The other potentials to start from are trained here first. All trainings of a case on as many frames see as many
structures, old or new, and so take alike long. Modes: from scratch; plain; with structures that the potential has
stored and labels itself; with old frames replayed; with old structures that it labels itself (pseudo), of the data or
of short dynamics of its own (own-md); with a penalty on the distance from the old weights; with frozen parts; with new
elements that begin like the nearest one. Forces and energies: rmse; last_F is that of the last weights, not of those
that the validation frames chose. Results are kept in the working folder (--work), so that the same command goes on, and
drawn: a learning curve of each case.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.md.langevin import Langevin
from report import plot_lines, print_table

from segnn_ase import SEGNNCalculator
from segnn_ase.train import TrainConfig, evaluate_files, finetune, train

COLUMNS = {
    "case": "s",
    "mode": "s",
    "frames": "d",
    "seed": "d",
    "new_E": ".1f",
    "new_F": ".1f",
    "last_F": ".1f",
    "old_E": ".1f",
}
COLUMNS |= {"old_F": ".1f", "old_F_before": ".1f", "cpu_s": ".0f"}
HALF = 27  # old structures, of 30 frames as many as new ones
FROZEN = ("segnn.embedding", "segnn.messages.0", "segnn.products.0", "segnn.updates.0")


class Case(NamedTuple):
    base: str  # name of a training in `BASES`, or of a shipped potential
    train: str  # the new frames are some of these, evenly from first to last
    test: str
    old: str  # frames of the old training
    old_test: str
    seen: int  # structures, in all epochs, with up to 30 frames; up to five times as many with more
    relabelled: bool = False  # whether the new labels are made here


ACAC_OLD = ("acac/train_300K.xyz@:450:7", "acac/test_300K.xyz@::10")
CASES = {
    "acac-600K": Case("acac-300K", "acac/train_600K.xyz", "acac/test_600K.xyz@::10", *ACAC_OLD, 10_000),
    "ethanol": Case("acac-300K", "rmd17/ethanol_train.xyz", "rmd17/ethanol_test.xyz@::10", *ACAC_OLD, 10_000),
    "si-mo": Case(
        "silicon",
        "mlearn_Mo/train.xyz",
        "mlearn_Mo/test.xyz",
        "mlearn_Si/train.xyz@::4",
        "mlearn_Si/test.xyz",
        4_000,
    ),
    "water-xtb": Case(
        "water-pbe0",
        "water_pbe0/train.xyz",
        "water_pbe0/test.xyz@::4",
        "water_pbe0/train.xyz@::8",
        "water_pbe0/test.xyz@::4",
        2_000,
        relabelled=True,
    ),
}
BASES = {  # frames, isolated atoms, epochs
    "acac-300K": ("acac/train_300K.xyz", "acac/isolated_atoms.xyz", 120),
    "silicon": ("mlearn_Si/train.xyz", None, 26),
}
MODES = {  # settings of [finetune] and of [training]; {old} stands for the old frames
    "scratch": (None, {"learning_rate": 0.03}),
    "plain": ({"keep": "nothing"}, {}),
    "stored": ({"keep": "old"}, {}),
    "replay": ({"replay": "{old}"}, {}),
    "pseudo": ({"structures": "{old}"}, {}),
    "unrattled": ({"structures": "{old}", "rattled": 0}, {}),
    "own-md": ({"structures": "{own}"}, {}),
    "pseudo-half": ({"structures": "{old}", "replay_frames": HALF}, {}),
    "l2-sp-1e-3": ({"keep": "nothing", "l2_sp": 1e-3}, {}),
    "l2-sp-1e-1": ({"keep": "nothing", "l2_sp": 1e-1}, {}),
    "frozen": ({"keep": "nothing"}, {"freeze": FROZEN}),
    "nearest": ({"structures": "{old}", "new_elements": "nearest"}, {}),
}


def base_of(name: str, folder: Path, work: Path, scale: float) -> str:
    """The starting potential, which is shipped, or trained once."""
    if name not in BASES:
        return name
    out, (frames, atoms, epochs) = work / f"{name}.pt", BASES[name]
    if out.with_suffix(".last.pt").exists():  # which is written in the end
        return str(out)
    data = {"train": str(folder / frames), "isolated_atoms": atoms and str(folder / atoms)}
    training = fixed(max(round(scale * epochs), 1)) | {"learning_rate": 0.03}
    train(TrainConfig.parse({"out": str(out), "data": data, "training": training}))
    return str(out)


def fixed(epochs: int) -> dict:
    """Settings of a training of this length, no shorter."""
    return {"epochs": epochs, "patience": epochs, "rollout_steps": 0}


def own_structures(base: str, frames: Path, out: Path) -> str:
    """A file of structures from short dynamics of a potential itself, from one old structure: no other is needed."""
    if not out.exists():
        atoms, found = all_of(frames)[0], []
        atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        atoms.calc = SEGNNCalculator(base, domain="ignore")
        for n in range(64):
            rng, temperature = np.random.default_rng(n), 300 if n < 32 else 600
            dynamics = Langevin(
                atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False
            )
            dynamics.run(100)
            found.append(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
        write(out, found)
    return str(out)


def frames_of(case: Case, frames: int, folder: Path, work: Path) -> tuple[str, str, str]:
    """Files of the new frames, of their test frames, and of old test frames."""
    train, test = folder / case.train, folder / case.test
    if case.relabelled:
        test = labelled(all_of(test), work / f"{case.base}-test.xyz")
    out = work / f"{train.stem if not case.relabelled else case.base}-{frames}.xyz"
    if not out.exists():
        found = all_of(train)
        if len(found) < frames:
            raise SystemExit(f"{train} has {len(found)} frames; --frames asks for {frames}")
        chosen = [found[n] for n in np.linspace(0, len(found) - 1, frames).round().astype(int)]
        labelled(chosen, out) if case.relabelled else write(out, chosen)
    return str(out), str(test), str(folder / case.old_test)


def all_of(path: Path) -> list[Atoms]:
    """The frames of a file, or those that an index behind @ says."""
    return read(str(path), None if "@" in path.name else ":")


def labelled(frames: list[Atoms], out: Path) -> Path:
    """A file of the frames with energies and forces of GFN1-xTB."""
    if not out.exists():
        from tblite.ase import TBLite

        for atoms in frames:
            atoms.calc = TBLite(method="GFN1-xTB", verbosity=0)
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        write(out, frames)
    return out


def epochs_of(mode: str, frames: int, seen: float) -> int:
    """So many as all trainings on these frames see alike many structures."""
    keeping, _ = MODES[mode]
    new = frames - max(round(0.1 * frames), 1)
    old = 0 if keeping is None or keeping.get("keep") == "nothing" else keeping.get("replay_frames", max(2 * new, 16))
    return max(round(seen * min(max(frames / 30, 1), 5) / (new + old)), 1)


def measure(name: str, mode: str, frames: int, seed: int, folder: Path, work: Path, scale: float) -> dict:
    case, (keeping, changes) = CASES[name], MODES[mode]
    new, *tests = frames_of(case, frames, folder, work)
    scratch = keeping is None
    training = {**fixed(epochs_of(mode, frames, scale * case.seen)), "seed": seed, **changes}
    values = {
        "out": str(work / f"{name}.{mode}.{frames}.{seed}.pt"),
        "data": {"train": new, "test": tests[:1] if scratch else tests},
        "training": training,
    }
    base = base_of(case.base, folder, work, scale)
    start = time.process_time()
    if scratch:
        errors = train(TrainConfig.parse(values))
    else:
        files = {"{old}": str(folder / case.old)}
        if "{own}" in keeping.values():
            files["{own}"] = own_structures(base, folder / case.old, work / f"{name}.own.xyz")
        old = {key: files.get(value, value) for key, value in keeping.items()}
        errors = finetune(base, TrainConfig.parse({**values, "finetune": old}))
    row = {"case": name, "mode": mode, "frames": frames, "seed": seed, "cpu_s": time.process_time() - start}
    for kind, path in zip(("new", "old"), tests, strict=True):
        for letter, quantity in (("E", "energy"), ("F", "forces")):
            value = errors.get(path, {}).get(f"{quantity}_rmse")
            row[f"{kind}_{letter}"] = None if value is None else 1e3 * value
    before = None if scratch else errors[tests[1]]["forces_rmse_before"]
    last = evaluate_files(values["out"].replace(".pt", ".last.pt"), tests[:1])[tests[0]]["forces_rmse"]
    return {**row, "last_F": 1e3 * last, "old_F_before": before and 1e3 * before}


def means_over_seeds(rows: list[dict]) -> list[dict]:
    """Errors of forces of each mode and number of frames, in the order of the latter."""
    keys = sorted({(row["frames"], row["mode"]) for row in rows})
    found = {key: [row["new_F"] for row in rows if (row["frames"], row["mode"]) == key] for key in keys}
    return [{"frames": n, "mode": mode, "new_F": float(np.mean(F))} for (n, mode), F in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--frames", nargs="*", type=int, default=[30])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of epochs")
    parser.add_argument("--work", type=Path, default=Path("finetune"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    known = args.work / "rows.json"
    rows = [{"frames": 30, **row} for row in (json.loads(known.read_text()) if known.exists() else [])]
    for name, mode, frames, seed in itertools.product(args.cases, args.modes, args.frames, range(args.seeds)):
        key = {"case": name, "mode": mode, "frames": frames, "seed": seed}
        if any(row.items() >= key.items() for row in rows) or (mode == "nearest" and name != "si-mo"):
            continue
        rows.append(measure(name, mode, frames, seed, args.folder, args.work, args.scale))
        known.write_text(json.dumps(rows, indent=1))
        print_table(rows[-1:], COLUMNS)
    print("E: meV/atom, F: meV/Å, rmse")
    print_table(rows, COLUMNS)
    for name in args.cases:
        curve = means_over_seeds([row for row in rows if row["case"] == name])
        labels = ("new frames", "forces [meV/Å]")
        plot_lines(str(args.work / name), curve, group="mode", x="frames", y="new_F", labels=labels)


if __name__ == "__main__":
    main()
