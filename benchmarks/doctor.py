"""False errors of the doctor on sound data, and how many mixtures of two levels of theory it finds.

python benchmarks/doctor.py FOLDER

FOLDER: files .xyz of sound sets, in folders or not; those named *isolated* are left out. Each set and its parts (by
`config_type`, by size of the forces, sparse, small) must be without an error. A third of the frames of a set, at
random, then gets another level: a constant an atom, or another functional, mimicked by a pair potential that changes
energies, forces and stress.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
from report import print_table

from segnn_ase.check.doctor import examine
from segnn_ase.check.findings import Finding, Sets
from segnn_ase.check.pairs import pairs_of
from segnn_ase.data.frames import Frame, frame_from_atoms

OFFSETS = (10, 20, 30, 100)  # meV/atom
CHANGES = (30, 100)  # meV/atom on average, of another functional
LEAST = 16  # frames of a part: fewer are not judged
MOST = 300, 14_000  # frames and atoms of a set: of larger ones every second, third, ... frame is taken


def read(path: Path) -> tuple[list[Frame], np.ndarray]:
    """Frames and what their file calls their kinds."""
    images = ase.io.read(path, ":")
    images = images[:: max(-(-len(images) // MOST[0]), -(-sum(map(len, images)) // MOST[1]))]
    frames = [frame_from_atoms(atoms, source=f"{path}, frame {n}") for n, atoms in enumerate(images)]
    return frames, np.array([atoms.info.get("config_type", "") for atoms in images])


def parts(frames: list[Frame], kinds: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Sound subsets by name, as indices."""
    n, rng = len(frames), np.random.default_rng(0)
    forces = np.array([0.0 if f.forces is None else np.sqrt(np.mean(f.forces**2)) for f in frames])
    order = np.argsort(forces, kind="stable")
    chosen = {"whole": np.arange(n)}
    for kind in sorted(set(kinds)) if len(set(kinds)) > 1 else []:
        chosen |= {kind: np.flatnonzero(kinds == kind), f"without {kind}": np.flatnonzero(kinds != kind)}
    chosen |= {"smallest forces": np.sort(order[: n // 2]), "largest forces": np.sort(order[n // 2 :])}
    chosen |= {"both ends": np.sort(np.r_[order[: n // 4], order[-n // 4 :]]), "every third": np.arange(0, n, 3)}
    chosen |= {"first half": np.arange(n // 2), "second half": np.arange(n // 2, n)}
    for size in (20, 40, 80):
        chosen[f"{size} at random"] = np.sort(rng.permutation(n)[:size])
    for name, indices in chosen.items():
        if len(indices) >= LEAST and (name == "whole" or len(indices) < n):
            yield name, indices


def errors_of(frames: list[Frame]) -> list[Finding]:
    return [finding for finding in examine(Sets(frames)).findings if finding.severity == "error"]


def another_level(frame: Frame, offset: float) -> Frame:
    """offset: eV/atom."""
    return frame._replace(energy=frame.energy + offset * len(frame.atoms))


def repulsion(frame: Frame) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces (N, 3) and stress (3, 3) of sum_pairs exp(-r) (1 - (r / 5)^2)^3, r in Å, without a unit."""
    pairs = pairs_of(frame.atoms)
    r = np.linalg.norm(pairs.vectors, axis=1)
    u = 1 - (r / 5) ** 2
    slope = -np.exp(-r) * (u**3 + 6 * u**2 * r / 25)
    by_vector = slope[:, None] * pairs.vectors / r[:, None]  # each pair comes twice
    forces = np.zeros((len(frame.atoms), 3))
    np.add.at(forces, pairs.i, by_vector)
    volume = frame.atoms.cell.volume if frame.atoms.pbc.all() else np.nan
    return (np.exp(-r) * u**3).sum() / 2, forces, pairs.vectors.T @ by_vector / 2 / volume


def another_functional(frame: Frame, strength: float) -> Frame:
    energy, forces, stress = repulsion(frame)
    if frame.forces is None:
        return frame._replace(energy=frame.energy + strength * energy)
    changed = frame._replace(energy=frame.energy + strength * energy, forces=frame.forces + strength * forces)
    return changed if frame.stress is None else changed._replace(stress=frame.stress + strength * stress)


def mixtures(frames: list[Frame]) -> Iterator[tuple[str, list[Frame], set[str]]]:
    """Name, frames, and which of them are of another level."""
    chosen = set(np.random.default_rng(1).permutation(len(frames))[: len(frames) // 3].tolist())
    sources = {frames[n].source for n in chosen}
    for size in OFFSETS:
        yield str(size), [another_level(f, 1e-3 * size) if n in chosen else f for n, f in enumerate(frames)], sources
    usual = np.mean([repulsion(f)[0] / len(f.atoms) for f in frames])
    for size in CHANGES:
        strength = 1e-3 * size / usual
        mixed = [another_functional(f, strength) if n in chosen else f for n, f in enumerate(frames)]
        yield f"functional {size}", mixed, sources


def found(frames: list[Frame], sources: set[str]) -> bool:
    """Is an error of mixed levels told, with nine of ten frames right?"""
    for finding in errors_of(frames):
        if finding.code == "mixed levels":
            wrong = len(sources.symmetric_difference(finding.frames))
            return min(wrong, len(frames) - wrong) <= len(frames) / 10
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows, told = [], []
    for path in sorted(p for p in folder.glob("**/*.xyz") if "isolated" not in p.name):
        frames, kinds = read(path)
        row = {"set": str(path.relative_to(folder)), "frames": len(frames), "parts": 0, "false errors": 0}
        for name, indices in parts(frames, kinds):
            errors = errors_of([frames[n] for n in indices])
            row["parts"] += 1
            row["false errors"] += bool(errors)
            told += [f"{row['set']}, {name}: {f.code}: {f.message}" for f in errors]
        if len(frames) >= LEAST:
            row |= {name: "yes" if found(mixed, sources) else "no" for name, mixed, sources in mixtures(frames)}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    names = [name for row in rows for name in row]
    columns = dict.fromkeys(dict.fromkeys(names), "")
    print("sound parts with a false error, and mixtures found: by a constant [meV/atom], or by another functional")
    print_table(rows, columns)
    judged = [row for row in rows if str(OFFSETS[0]) in row]
    print(f"false errors: {sum(r['false errors'] for r in rows)} of {sum(r['parts'] for r in rows)} parts")
    for name in list(columns)[4:]:
        print(f"found, {name}: {sum(row[name] == 'yes' for row in judged)} of {len(judged)} sets")
    print("\n".join(told))


if __name__ == "__main__":
    main()
