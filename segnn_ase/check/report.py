"""`Report`: all that was found in the data of a training, as Markdown and as a figure."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from segnn_ase.base.figures import plot_dataset
from segnn_ase.base.files import write_atomically
from segnn_ase.check.consistency import Judged
from segnn_ase.check.findings import Finding, Sets, fit_residuals, sentence
from segnn_ase.check.pairs import Pairs
from segnn_ase.data.frames import label_table

SEVERITIES = ("error", "warning", "note")


class Report(NamedTuple):
    """What was found; `images` are the readable structures of the training files as ASE reads them."""

    findings: list[Finding]
    sets: Sets
    judged: Judged | None
    drawn: Pairs  # of some of the frames, for the figure
    images: dict[str, Atoms]

    @property
    def errors(self) -> list[Finding]:
        return [f for f in self.findings if f.severity == "error"]

    def markdown(self, figure: str | None = None) -> str:
        """The whole report; figure: path of a picture to show."""
        counts = Counter(f.severity for f in self.findings)
        lines = ["# Data report", "", ", ".join(f"{counts[s]} {s}{'s' * (counts[s] != 1)}" for s in SEVERITIES), ""]
        for name in ("train", "valid", "test"):
            if frames := getattr(self.sets, name):
                lines += [f"{name}: {len(frames)} frames", "", "```", label_table(frames), "```", ""]
        for severity in SEVERITIES:
            for f in (f for f in self.findings if f.severity == severity):
                lines += [f"- **{severity}: {f.code}.** {sentence(f)}"]
        return "\n".join([*lines, "", f"![overview]({figure})"] if figure else lines) + "\n"


def write_report(report: Report, path: "str | Path") -> list[str]:
    """Write the report as Markdown and its figure beside it; returns the names of both."""
    figure = Path(path).with_suffix(".png")
    plot_report(report, figure)
    write_atomically(path, report.markdown(figure.name).encode())
    return [str(path), str(figure)]


def plot_report(report: Report, path: "str | Path") -> None:
    """Draw what was found in the data on one page."""
    named = {name: getattr(report.sets, name) for name in ("train", "valid", "test") if getattr(report.sets, name)}
    alone = {name: [f for f in frames if len(f.atoms) > 1 and f.energy is not None] for name, frames in named.items()}
    residuals = fit_residuals([f for frames in alone.values() for f in frames])
    parts = np.split(residuals, np.cumsum([len(frames) for frames in alone.values()], dtype=int))[: len(alone)]
    forces = {
        name: np.concatenate([norms_of(f.forces) for f in frames if f.forces is not None])
        for name, frames in named.items()
        if any(f.forces is not None for f in frames)
    }
    agreement = None
    if report.judged is not None:
        known = np.isfinite(report.judged.equations.energies)
        agreement = report.judged.forces_only.energy[known], report.judged.equations.energies[known]
    plot_dataset(path, dict(zip(alone, parts, strict=True)), forces, distances_by_elements(report.drawn), agreement)


def norms_of(forces: np.ndarray) -> np.ndarray:
    """Norms of the forces that are known, eV/Å."""
    norms = np.linalg.norm(forces, axis=1)
    return norms[np.isfinite(norms)]


def distances_by_elements(pairs: Pairs) -> dict[str, np.ndarray]:
    """Distances, Å, by the elements of the two atoms."""
    a, b = np.sort([pairs.numbers[pairs.i], pairs.numbers[pairs.j]], axis=0)
    r = np.linalg.norm(pairs.vectors, axis=1)
    kinds = sorted(set(zip(a.tolist(), b.tolist(), strict=True)))
    return {f"{chemical_symbols[x]}-{chemical_symbols[y]}": r[(a == x) & (b == y)] for x, y in kinds}
