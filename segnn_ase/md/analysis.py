"""What is read out of runs, and drawn: radial distribution functions, slopes, speeds."""

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.md.outputs import MDResult
from segnn_ase.structure.neighbors import neighbor_list


def nanoseconds_per_day(timestep: float, ms_per_step: float) -> float:
    """Convert a time step in fs and its cost in ms."""
    return timestep * 86.4 / ms_per_step


def energy_slope(time_fs, energy_per_atom) -> float:
    """Return the slope in eV/atom/ps of a line fitted to energies at times in fs; NaN for fewer than two."""
    time_ps, energy = np.asarray(time_fs, dtype=float) / 1000, np.asarray(energy_per_atom, dtype=float)
    if len(time_ps) < 2:
        return math.nan
    centred = time_ps - time_ps.mean()
    return float(centred @ (energy - energy.mean()) / (centred @ centred))


def check_pairs(pairs: Sequence[str], frame: Atoms | None = None, n: int = 0) -> None:
    """Raise ConfigError for pairs that are none, and where the n-th frame has no radial distribution of them."""
    expect(isinstance(pairs, Sequence) and not isinstance(pairs, str), "pairs", pairs, "a list such as ['O-H']")
    for pair in pairs:
        if not isinstance(pair, str) or len(pair.split("-")) != 2 or not all(pair.split("-")):
            raise ConfigError(f"pair {pair!r} was given; expected two elements such as 'O-H'")
    if frame is None:
        return
    expect(isinstance(frame, Atoms), f"frame {n}", frame, "Atoms")
    if not frame.pbc.all():
        raise ConfigError(f"pbc of frame {n} is {frame.pbc.tolist()}; g(r) needs three periodic directions")
    for pair in pairs:
        if not set(pair.split("-")) <= set(frame.get_chemical_symbols()):
            raise ConfigError(f"pair {pair!r} is not in a frame of {frame.get_chemical_formula()}")


def radial_distribution(
    frames: Iterable[Atoms], pairs: Sequence[str], r_max: float, bins: int = 200, *, weights=None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Average the partial radial distribution functions of pairs such as "O-H" over periodic frames.

    g_AB(r) = <n_B(r)> V / (N_B 4 pi r^2 dr), n_B the B atoms in a shell around an A atom. All periodic images
    are counted, also those of the atom itself, so r_max (Å) may exceed the cell, and the integral of
    N_B/V g 4 pi r^2 dr is the coordination number; for like pairs a fluid levels off at 1 - 1/N within half
    the cell. weights: (n,), how often each frame counts; none: all once. Returns {pair: (centres of the bins in Å, g)}.

    Raises ConfigError for pairs, numbers and weights that cannot be meant.
    """
    check_pairs(pairs)
    good = isinstance(r_max, int | float | np.number) and 0 < r_max < math.inf
    expect(good, "r_max", r_max, "a positive number of Å")
    expect(
        type(bins) is not bool and isinstance(bins, int | np.integer) and bins > 0, "bins", bins, "a positive integer"
    )
    frames = [frames] if isinstance(frames, Atoms) else frames
    expect(isinstance(frames, Iterable) and not isinstance(frames, str), "frames", frames, "Atoms, or several of them")
    edges = np.linspace(0.0, r_max, bins + 1)
    known = None if weights is None else np.atleast_1d(np.asarray(weights, dtype=float))
    total, count = np.zeros((len(pairs), bins)), 0
    for frame in frames:
        check_pairs(pairs, frame, count)
        weight = 1.0 if known is None else float(known[count]) if count < len(known) else 0.0
        total += weight * _of_frame(frame, pairs, edges)
        count += 1
    if not count:
        raise ConfigError("frames is empty: there is nothing to average")
    if known is not None:
        meant = known.shape == (count,) and np.isfinite(known).all() and (known >= 0).all() and known.sum() > 0
        expect(bool(meant), "weights", weights, f"{count} numbers, one of each frame, none below zero and not all zero")
    r, mean = (edges[1:] + edges[:-1]) / 2, total / (count if known is None else known.sum())
    return {pair: (r, g) for pair, g in zip(pairs, mean, strict=True)}


def _of_frame(frame: Atoms, pairs: Sequence[str], edges: np.ndarray) -> np.ndarray:
    """Return g of each pair (len(pairs), bins) in one frame; edges of the bins in Å."""
    i, j, S = neighbor_list(frame.positions, frame.cell.array, frame.pbc, float(edges[-1]))
    distances = np.linalg.norm(frame.positions[j] - frame.positions[i] + S @ frame.cell.array, axis=1)
    symbols = np.array(frame.get_chemical_symbols())
    shells = 4 / 3 * np.pi * np.diff(edges**3)  # Å^3
    rows = []
    for pair in pairs:
        a, b = pair.split("-")
        number = (symbols == a).sum() * (symbols == b).sum()
        chosen = distances[(symbols[i] == a) & (symbols[j] == b)]
        rows.append(np.histogram(chosen, edges)[0] * frame.get_volume() / (number * shells))
    return np.array(rows).reshape(len(pairs), len(shells))


def plot_run(result: MDResult, prefix: "str | Path", *, pairs: Sequence[str] = ()) -> list[Path]:
    """Draw energy per atom and temperature, and g(r) of `pairs` over the trajectory; returns the files.

    Raises ConfigError, before anything is drawn, for pairs of a run without a trajectory.
    """
    from segnn_ase.base import figures  # a run without figures does not wait for Matplotlib

    expect(isinstance(result, MDResult), "result", result, "what run_md returns")
    expect(isinstance(prefix, str | os.PathLike), "prefix", prefix, "the start of a path")
    curves = {}
    if pairs:
        expect(result.trajectory is not None, "pairs", pairs, "none for a run without a trajectory")
        curves = radial_distribution(ase.io.iread(str(result.trajectory)), pairs, r_max=6.0)
    log = result.log
    energy = log["conserved"] if np.isfinite(log["conserved"]).all() else log["total"]
    written = [Path(f"{prefix}_energy.png")]
    figures.plot_energy_drift(
        written[0], log["time_fs"], energy / result.n_atoms, log["temperature"], result.energy_slope
    )
    if curves:
        written.append(Path(f"{prefix}_rdf.png"))
        figures.plot_rdf(written[1], curves)
    return written
