"""Molecular dynamics on ASE's integrators: log, trajectory, guards, and a restart that goes on bit for bit.

Every output is appended in whole records. The restart file holds the state of the dynamics together with the
lengths that log and trajectory had; resuming first cuts both back to these lengths. So wherever a run was
killed, the same call ends with the same files as if it never had been.
"""

from collections.abc import Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

from segnn_ase.base.errors import ConfigError
from segnn_ase.base.figures import plot_energy_drift, plot_rdf
from segnn_ase.base.files import existing_file
from segnn_ase.md.analysis import radial_distribution
from segnn_ase.md.run import MDResult


def read_structure(path: "str | Path") -> Atoms:
    """Read the last frame of a file. Raises FileNotFoundError, or ConfigError for what ASE cannot read."""
    existing_file(path, "structure")
    try:
        return ase.io.read(path, -1)
    except Exception as error:  # ASE raises anything on a bad file
        raise ConfigError(
            f"structure is {str(path)!r}, which ASE cannot read: {type(error).__name__}: {error}"
        ) from error


def plot_run(result: MDResult, prefix: "str | Path", *, pairs: Sequence[str] = ()) -> list[Path]:
    """Draw energy and temperature, and the radial distribution of `pairs` over the trajectory; returns the files."""
    n_atoms = len(ase.io.read(result.trajectory, 0)) if result.trajectory else 1
    conserved = result.log["conserved"]
    energy = conserved if np.isfinite(conserved).all() else result.log["total"]
    written = [Path(f"{prefix}_energy.png")]
    plot_energy_drift(
        written[0], result.log["time_fs"], energy / n_atoms, result.log["temperature"], result.energy_slope
    )
    if pairs:
        curves = radial_distribution(ase.io.iread(result.trajectory), pairs, r_max=6.0)
        written.append(Path(f"{prefix}_rdf.png"))
        plot_rdf(written[1], curves)
    return written
