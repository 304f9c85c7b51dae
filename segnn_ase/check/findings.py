"""`Finding`, a flaw in plain words; `Sets`, the frames that are looked at; numbers that several checks go by."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from segnn_ase.check.surroundings import Surroundings
from segnn_ase.data.frames import Frame, species_of

LABELS = ("energy", "forces", "stress")
FEW = 0.05  # part of the frames that may be a mistake; more are meant


class Finding(NamedTuple):
    """One flaw, in plain words."""

    code: str
    severity: str  # error: would spoil a training; warning: look at it; note
    message: str
    frames: tuple[str, ...] = ()  # sources of those concerned
    advice: str = ""
    # where that is safe: ("drop",), ("scale stress", factor), ("shift stress", eV/Å^3) or ("key", label, name)
    repair: tuple = ()


class Sets(NamedTuple):
    """Frames by their use."""

    train: Sequence[Frame]
    valid: Sequence[Frame] = ()
    test: Sequence[Frame] = ()
    isolated: Sequence[Frame] | None = None
    around: Sequence[Surroundings] = ()  # of `all`, once they were looked at
    known: Sequence[int] = ()  # elements that the potential to be fine-tuned knows

    @property
    def all(self) -> list[Frame]:
        return [*self.train, *self.valid, *self.test]


def sentence(finding: Finding) -> str:
    where = f" [{where_of(finding.frames)}]" if finding.frames else ""
    return f"{finding.message}{where}." + (f" {finding.advice}." if finding.advice else "")


def where_of(sources: tuple[str, ...], most: int = 12) -> str:
    """Frames grouped by file, runs of numbers joined: "train.xyz: 3, 7-9"."""
    files: dict[str, list[int]] = {}
    for source in sources:
        path, _, number = source.rpartition(", frame ")
        files.setdefault(path or source, []).append(int(number) if path else 0)
    texts = []
    for path, numbers in files.items():
        runs: list[list[int]] = []
        for n in sorted(set(numbers)):
            if runs and n == runs[-1][-1] + 1:
                runs[-1].append(n)
            else:
                runs.append([n])
        parts = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs]
        more = f" and {len(parts) - most} more" if len(parts) > most else ""
        texts.append(f"{path}: frame {', '.join(parts[:most])}{more}")
    return "; ".join(texts)


def sources_of(frames: list[Frame], chosen) -> tuple[str, ...]:
    return tuple(frame.source for frame, yes in zip(frames, chosen, strict=True) if yes)


def energies_per_atom(frames: list[Frame]) -> np.ndarray:
    return np.array([np.nan if f.energy is None else f.energy / len(f.atoms) for f in frames])


def fit_residuals(frames: list[Frame]) -> np.ndarray:
    """Energies an atom, eV, less a fit of E0 that leaves out what is far off."""
    species, energies = species_of(frames), energies_per_atom(frames)
    if not frames:
        return energies
    counts = np.array([[np.mean(f.atoms.numbers == z) for z in species] for f in frames])
    residuals, trusted = energies, np.isfinite(energies)
    for _ in range(4):
        residuals = energies - counts @ np.linalg.lstsq(counts[trusted], energies[trusted], rcond=1e-8)[0]
        trusted = robust_score(residuals, 1e-3) < 10
    return residuals


def robust_score(values: np.ndarray, floor: float) -> np.ndarray:
    """Distance from the median in units of the typical one, which is at least `floor`."""
    away = np.abs(values - np.median(values))
    return away / max(1.4826 * np.median(away), floor)


def numbered(frames: list[Frame], chosen: set[int]) -> tuple[str, ...]:
    return tuple(frames[n].source for n in sorted(chosen))
