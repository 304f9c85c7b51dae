"""Figures from arrays: parity, learning curve, energy drift, RDF, datasets. Nothing global is touched."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from segnn_ase.base.errors import ConfigError, expect
from segnn_ase.base.files import write_atomically

# Okabe and Ito's palette, told apart with any kind of colour vision
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FORMATS = (".png", ".pdf", ".svg")
RATIOS = (1e-8, 1e4)  # shown of measured / tolerance
VIEW = 75.0  # degrees above the plane of x and y, from which structures are looked at
MANY = 3000  # points; more are drawn as a density
ERRORS = {  # column of the history: label, unit, factor
    "valid_energy_rmse": ("energy", "meV/atom", 1e3),
    "valid_force_rmse": ("forces", "meV/Å", 1e3),
    "valid_forces_rmse": ("forces", "meV/Å", 1e3),
    "valid_stress_rmse": ("stress", "meV/Å³", 1e3),
}


def plot_parity(path: "str | Path", reference, predicted, *, label: str, unit: str) -> None:
    """Draw predicted against reference values, with RMSE and MAE; many points as a density.

    reference, predicted: arrays of one shape in `unit`; label: what they are, such as "forces".
    """
    x, y = _numbers(reference), _numbers(predicted)
    if x.shape != y.shape or not len(x) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ConfigError(f"{label}: {len(x)} reference and {len(y)} predicted values; expected as many finite ones")
    figure = _figure(4.2, 4.0)
    axes = _panel(figure, (1, 1, 1), f"reference {label} / {unit}", f"predicted {label} / {unit}")
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    margin = 0.04 * (high - low) or 1.0
    limits = (low - margin, high + margin)
    if len(x) > MANY:
        density = axes.hexbin(x, y, gridsize=90, extent=limits * 2, bins="log", cmap="viridis", mincnt=1, linewidths=0)
        figure.colorbar(density, ax=axes, label="points", shrink=0.8)
    else:
        axes.scatter(x, y, s=14, color=COLORS[0], alpha=0.5, linewidths=0)
    axes.plot(limits, limits, color="0.3", lw=0.8, zorder=0.5)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    rmse, mae = np.sqrt(np.mean((y - x) ** 2)), np.mean(np.abs(y - x))
    text = f"RMSE {rmse:.3g} {unit}\nMAE {mae:.3g} {unit}\n{len(x)} values"
    axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=8.5)
    _save(figure, path)


def plot_calibration(path: "str | Path", predicted, errors, *, label: str, unit: str, bins: int = 12) -> None:
    """Draw errors against the standard deviations that were predicted for them, with the RMSE of equal groups.

    predicted, errors: arrays of one shape in `unit`. Where the estimate is right, the groups lie on the diagonal.
    """
    std, error = np.ravel(predicted).astype(float), np.abs(np.ravel(errors).astype(float))
    if std.shape != error.shape or not len(std) or not (np.isfinite(std).all() and np.isfinite(error).all()):
        raise ConfigError(f"{label}: {len(std)} deviations and {len(error)} errors; expected as many finite ones")
    figure = _figure(4.6, 4.0)
    axes = _panel(figure, (1, 1, 1), f"predicted deviation of {label} / {unit}", f"error / {unit}")
    order = np.argsort(std)
    groups = [group for group in np.array_split(order, min(bins, len(order))) if len(group)]
    x = np.array([np.sqrt(np.mean(std[group] ** 2)) for group in groups])
    y = np.array([np.sqrt(np.mean(error[group] ** 2)) for group in groups])
    shown = order[:: max(1, len(order) // MANY)]
    axes.scatter(std[shown], error[shown], s=4, color=COLORS[5], alpha=0.4, linewidths=0, label="single errors")
    axes.plot(x, y, color=COLORS[0], marker="o", ms=4, lw=1.2, label=f"RMSE of {len(groups)} groups")
    positive = np.concatenate([x[x > 0], y[y > 0], std[std > 0]])
    if len(positive):
        limits = (positive.min() / 2, positive.max() * 2)
        axes.plot(limits, limits, color="0.3", lw=0.8, zorder=0.5)
        axes.set(xscale="log", yscale="log", xlim=limits, ylim=(limits[0] / 10, limits[1]))
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    _save(figure, path)


def plot_learning_curve(path: "str | Path", history: Sequence[Mapping]) -> None:
    """Draw losses, validation errors and learning rate against the epoch; columns that are absent are left out.

    history: rows with "epoch" and any of "train_loss", "valid_loss", "lr" and the keys of `ERRORS`
    (eV/atom, eV/Å, eV/Å^3); values may be None.
    """
    rows = isinstance(history, Sequence) and all(isinstance(row, Mapping) for row in history)
    expect(rows, "history", history, "a list of dicts, one for each epoch")
    if not history:
        raise ConfigError("history is empty: there is no epoch to plot")
    epoch = _column(history, "epoch")
    if not np.isfinite(epoch).all():
        raise ConfigError("history has rows without 'epoch'; expected one in each")
    losses = [("training", "train_loss", 1.0), ("validation", "valid_loss", 1.0)]
    errors = [(f"{label} / {unit}", key, factor) for key, (label, unit, factor) in ERRORS.items()]
    panels = [("loss", losses), ("validation RMSE", errors), ("learning rate", [("", "lr", 1.0)])]
    curves = [(title, _positive(history, columns)) for title, columns in panels]
    curves = [(title, known) for title, known in curves if known]
    figure = _figure(5.6, 1.0 + 1.9 * len(curves))
    for row, (title, known) in enumerate(curves):
        axes = _panel(figure, (len(curves), 1, row + 1), "epoch" if row == len(curves) - 1 else "", title)
        axes.set_yscale("log", nonpositive="mask")
        for color, (name, values) in zip(COLORS, known.items(), strict=False):
            axes.plot(epoch, values, color=color, label=name, lw=1.4, marker="o" if len(epoch) < 30 else None, ms=2.5)
        if any(known):
            axes.legend(fontsize=8, frameon=False)
    _save(figure, path)


def plot_energy_drift(path: "str | Path", time_fs, total_energy_per_atom, temperature, slope: float) -> None:
    """Draw the conserved energy (eV/atom), its fitted slope (eV/atom/ps) and the temperature (K) against time (fs)."""
    time, energy = _numbers(time_fs) / 1000, _numbers(total_energy_per_atom)  # ps
    if not 0 < len(time) == len(energy) == np.size(temperature):
        sizes = f"total_energy_per_atom {len(energy)}, temperature {np.size(temperature)}"
        raise ConfigError(f"time_fs has {len(time)} values, {sizes}; expected as many of each, at least one")
    figure = _figure(5.6, 4.6)
    upper = _panel(figure, (2, 1, 1), "", "$E - E_0$ / meV/atom")
    upper.plot(time, 1e3 * (energy - energy[0]), color=COLORS[0], lw=0.8)
    if np.isfinite(slope):
        line = energy.mean() - energy[0] + slope * (time - time.mean())
        upper.plot(time, 1e3 * line, color=COLORS[1], lw=2.0, ls="--", label=f"slope {slope:.2g} eV/atom/ps")
        upper.legend(fontsize=8.5, frameon=False)
    lower = _panel(figure, (2, 1, 2), "time / ps", "temperature / K")
    lower.plot(time, temperature, color=COLORS[2], lw=1.0)
    _save(figure, path)


def plot_rdf(path: "str | Path", curves: Mapping[str, tuple], reference: Mapping[str, tuple] | None = None) -> None:
    """Draw radial distribution functions {"O-O": (r in Å, g)}; those of the reference are dashed."""
    for name, given in (("curves", curves), ("reference", reference or {})):
        good = isinstance(given, Mapping) and all(isinstance(c, list | tuple) and len(c) == 2 for c in given.values())
        expect(good, name, given, "a dict of pairs, r in Å and g")
    if not curves and not reference:
        raise ConfigError("curves is empty: there is nothing to draw")
    figure = _figure(5.2, 3.6)
    axes = _panel(figure, (1, 1, 1), "r / Å", "g(r)")
    axes.axhline(1.0, color="0.6", lw=0.8, zorder=0.5)
    names = list(dict.fromkeys([*curves, *(reference or {})]))
    colors = {name: COLORS[k % len(COLORS)] for k, name in enumerate(names)}
    for name, (r, g) in curves.items():
        axes.plot(r, g, color=colors[name], lw=1.6, label=name)
    for name, (r, g) in (reference or {}).items():
        axes.plot(r, g, color=colors[name], lw=1.4, ls="--", label=f"{name}, reference")
    axes.margins(x=0)
    axes.set_ylim(0, min(axes.get_ylim()[1], 5.0))  # bonds inside molecules would dwarf the liquid
    axes.legend(fontsize=8.5, frameon=False)
    _save(figure, path)


def plot_rounds(path: "str | Path", rows: Sequence[Mapping], aim: float) -> None:
    """Draw errors of forces (meV/Å) and runs that passed against the labels of the rounds of a loop.

    rows: with "labels", "forces", "expected" (None where not known), "runs", "stops", "late"; aim: meV/Å.
    """
    labels = _column(rows, "labels")
    figure = _figure(5.6, 4.6)
    upper = _panel(figure, (2, 1, 1), "", "forces RMSE / meV/Å")
    for color, (name, key) in zip(COLORS, (("measured", "forces"), ("expected by itself", "expected")), strict=False):
        upper.plot(labels, _column(rows, key), color=color, label=name, lw=1.4, marker="o", ms=3.5)
    upper.axhline(aim, color="0.4", lw=1.0, ls="--", label="aim")
    upper.set_yscale("log", nonpositive="mask")
    upper.legend(fontsize=8.5, frameon=False)
    lower = _panel(figure, (2, 1, 2), "labels", "runs that passed / %")
    passed = [100 * (1 - (len(row["stops"]) + len(row["late"])) / row["runs"]) for row in rows]
    lower.plot(labels, passed, color=COLORS[2], lw=1.4, marker="o", ms=3.5)
    lower.set_ylim(-3, 103)
    _save(figure, path)


def plot_certificate(path: "str | Path", ratios: Mapping[str, float], time_fs, energy_per_atom) -> None:
    """Draw how far each check is from its tolerance (measured / tolerance), and the energy (eV/atom) of the NVE run."""
    values = np.clip(np.nan_to_num(list(ratios.values()), nan=np.inf), *RATIOS)
    figure = _figure(7.0, 2.6 + 0.14 * len(values))
    upper, lower = figure.subplots(2, 1, height_ratios=[max(0.14 * len(values), 1.0), 1.6])
    _style(upper, "measured / tolerance", "")
    rows = np.arange(len(values))
    colors = [COLORS[1] if value > 1 else COLORS[2] for value in values]
    upper.barh(rows, np.log10(values / RATIOS[0]), color=colors, height=0.7)
    ticks = np.arange(0, np.log10(RATIOS[1] / RATIOS[0]) + 1, 2)
    labels = [f"$10^{{{round(t + np.log10(RATIOS[0]))}}}$" for t in ticks]
    upper.set(xlim=(0, ticks[-1]), ylim=(len(values) - 0.4, -0.6), xticks=ticks, xticklabels=labels)
    upper.set_yticks(rows, list(ratios), fontsize=6.5)
    upper.axvline(-np.log10(RATIOS[0]), color="0.2", lw=1.2)
    _style(lower, "time / fs", "$E - E_0$ / meV/atom")
    energy = np.asarray(energy_per_atom, dtype=float)
    lower.plot(time_fs, 1e3 * (energy - energy[0]), color=COLORS[0], lw=0.8)
    _save(figure, path)


def plot_dataset(
    path: "str | Path",
    energies: Mapping[str, np.ndarray],
    forces: Mapping[str, np.ndarray],
    distances: Mapping[str, np.ndarray],
    agreement: "tuple[np.ndarray, np.ndarray] | None" = None,
) -> None:
    """Draw a dataset on one page: energies, force norms, pair distances, energies against those the forces promise.

    energies: eV/atom of each frame of each set, in order; forces: norms, eV/Å; distances: Å, of pairs such as "O-H";
    agreement: energies expected and given, eV/atom. What is empty is left out.
    """
    figure = _figure(8.4, 6.4)
    axes = _panel(figure, (2, 2, 1), "frame", "energy - composition / eV/atom")
    start = 0
    for color, (name, values) in zip(COLORS, energies.items(), strict=False):
        axes.plot(np.arange(start, start + len(values)), values, ".", ms=3, color=color, label=name)
        start += len(values)
    if energies:
        axes.legend(fontsize=8, frameon=False)
    axes = _panel(figure, (2, 2, 2), "|force| / eV/Å", "atoms")
    axes.set_yscale("log")
    for color, (name, values) in zip(COLORS, forces.items(), strict=False):
        axes.hist(values, bins=80, histtype="step", color=color, label=name)
    axes = _panel(figure, (2, 2, 3), "r / Å", "pairs / r²")
    for k, (name, r) in enumerate(distances.items()):
        counts, edges = np.histogram(r, bins=150)
        middle = (edges[1:] + edges[:-1]) / 2
        scaled = counts / middle**2
        axes.plot(middle, scaled / max(scaled.max(), 1e-12), color=COLORS[k % len(COLORS)], lw=1.0, label=name)
    if distances:
        axes.legend(fontsize=7, frameon=False, ncols=2)
    if agreement is not None:
        axes = _panel(figure, (2, 2, 4), "energy promised by the forces / meV/atom", "energy given / meV/atom")
        x, y = (1e3 * np.asarray(values) for values in agreement)
        axes.plot(x, y, ".", ms=3, color=COLORS[0])
        axes.axline((0, 0), slope=1, color="0.3", lw=0.8)
    _save(figure, path)


def plot_spectra(path: "str | Path", spectra: Mapping[str, tuple]) -> None:
    """Draw intensities against wavenumbers, cm^-1, one panel each. spectra: {label of the axis: (wavenumbers,
    intensities)}."""
    figure = _figure(6.4, 0.6 + 2.4 * len(spectra))
    for row, (label, (x, y)) in enumerate(spectra.items()):
        below = "wavenumber / cm⁻¹" if row == len(spectra) - 1 else ""
        axes = _panel(figure, (len(spectra), 1, row + 1), below, label)
        axes.plot(_numbers(x), _numbers(y), color=COLORS[row % len(COLORS)], lw=1.2)
        axes.set_xlim(0, min(4500.0, float(np.max(x))))
    _save(figure, path)


class Glyphs(NamedTuple):
    """Functions on the sphere around atoms."""

    positions: np.ndarray  # (N, 3) Å
    symbols: Sequence[str]  # (N,)
    bonds: Sequence[tuple[int, int]]  # pairs of atoms
    directions: np.ndarray  # (n, m, 3) from pole to pole and around
    values: np.ndarray  # (N, n, m)


def plot_glyphs(path: "str | Path", glyphs: Glyphs, *, size: float = 0.75) -> None:
    """Draw functions on the sphere: the distance from the atom is |F|, blue where it is positive, else red.

    size: Å, of the largest.
    """
    from mpl_toolkits.mplot3d.proj3d import proj_transform  # type: ignore[import-untyped]

    largest = float(np.abs(glyphs.values).max()) or 1.0
    figure = _figure(6.4, 4.8)
    axes: Any = figure.add_subplot(projection="3d", proj_type="ortho")
    for a, b in glyphs.bonds:
        axes.plot(*glyphs.positions[[a, b]].T, color="0.6", lw=1.6, zorder=0)
    for place, values in zip(glyphs.positions, glyphs.values, strict=True):
        surface = place + (size / largest * np.abs(values))[:, :, None] * glyphs.directions
        colors = np.where(values > 0, COLORS[0], COLORS[1])
        axes.plot_surface(*surface.transpose(2, 0, 1), facecolors=colors, rstride=1, cstride=1, lw=0, alpha=0.85)
    low, high = glyphs.positions.min(axis=0) - size, glyphs.positions.max(axis=0) + size
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), zlim=(low[2], high[2]))
    axes.set_box_aspect(high - low, zoom=1.25)
    axes.view_init(elev=VIEW, azim=-90)
    axes.set_axis_off()
    figure.set_layout_engine("none")
    axes.set_position((0.0, 0.0, 1.0, 1.0))
    for place, symbol in zip(glyphs.positions, glyphs.symbols, strict=True):  # on the paper: surfaces would hide them
        x, y, _ = proj_transform(*place, axes.get_proj())
        axes.annotate(symbol, (x, y), fontsize=8, weight="bold", color="white", ha="center", va="center", zorder=1e6)
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=180, layout="constrained")  # inches
    FigureCanvasAgg(figure)
    return figure


def _panel(figure: Figure, place: tuple[int, int, int], xlabel: str, ylabel: str) -> Axes:
    axes = figure.add_subplot(*place)
    _style(axes, xlabel, ylabel)
    return axes


def _style(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel, fontsize=10)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.tick_params(labelsize=9, color="0.5")
    axes.grid(color="0.9", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _numbers(values) -> np.ndarray:
    """Flat floats; what is no number becomes NaN."""
    try:
        return np.ravel(values).astype(float)
    except (TypeError, ValueError):
        return np.full(np.size(values), np.nan)


def _column(history: Sequence[Mapping], key: str) -> np.ndarray:
    return np.array([row.get(key) for row in history], dtype=float)  # None becomes NaN


def _positive(history: Sequence[Mapping], columns: Sequence[tuple[str, str, float]]) -> dict[str, np.ndarray]:
    values = [(name, factor * _column(history, key)) for name, key, factor in columns]
    return {name: v for name, v in values if (v > 0).any()}  # the axes are logarithmic


def _save(figure: Figure, path: "str | Path") -> None:
    expect(isinstance(path, str | os.PathLike), "figure path", path, "a path")
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"figure path is {str(path)!r}; expected a name that ends in {', '.join(FORMATS)}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix[1:])
    write_atomically(path, buffer.getvalue())
