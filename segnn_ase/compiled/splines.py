"""Radial tables: rho depends on the distance only, so at inference a spline replaces its MLP on edges.

The spline is a uniform quintic B-spline, four times continuously differentiable; forces are the exact
derivative of the tabulated energy, so the dynamics conserves energy as before. The table depends on the
model alone, never on a structure: a restarted simulation meets the same one.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from segnn_ase.model.edges import bessel
from segnn_ase.model.potential import Potential
from segnn_ase.model.scalars import MLP

DEGREE = 5
# of the largest value and of the largest slope; in float32 the rounding of a finer table, divided by its step, would
# add more to slopes than the finer step removes
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-6}
FIRST, LAST = 64, 8192  # numbers of intervals tried
MARGIN = 60  # knots on either side; what is wrong at an end decays by 0.43 from knot to knot


class RadialTables(NamedTuple):
    """Splines of several functions on [0, cutoff] with the same knots.

    step: distance of the knots, Å. coefficients: (n + DEGREE, F) for each function; the DEGREE + 1 that start with
    row k give its values between knots k and k + 1. error: the largest found, relative to the largest value.
    """

    step: float
    coefficients: list[Tensor]
    error: float


def tabulate(functions: list[Callable[[Tensor], Tensor]], cutoff: float, tolerance: float) -> RadialTables:
    """Tabulate functions (n, 1) Å -> (n, F), in float64, with as many knots as the tolerance asks for.

    The functions must be smooth a little beyond both ends too. Raises ValueError if one is too rough.
    """
    intervals, error = FIRST, np.inf
    while intervals <= LAST:
        step = cutoff / intervals
        coefficients = [_coefficients(function, step, intervals) for function in functions]
        error = max(_error(f, c, step, tolerance) for f, c in zip(functions, coefficients, strict=True))
        if error <= tolerance:
            return RadialTables(step, [torch.from_numpy(c) for c in coefficients], error)
        intervals *= 2
    raise ValueError(f"radial functions are too rough to tabulate: error {error:.1e} with {LAST} knots")


def radial_tables(potential: Potential) -> RadialTables:
    """Tables of the radial functions of every interaction, as exact as the potential's precision deserves."""
    config = potential.config
    mlps = [copy.deepcopy(m.radial).cpu().double().requires_grad_(False) for m in potential.segnn.messages]

    def function(mlp: MLP) -> Callable[[Tensor], Tensor]:
        # even in d and finite at 0, where only the formula is 0 / 0
        return lambda d: mlp(bessel(d + 1e-12, config.n_radial, config.cutoff))

    return tabulate([function(mlp) for mlp in mlps], config.cutoff, TOLERANCE[potential.dtype])


@cache
def spline_pieces(degree: int = DEGREE) -> np.ndarray:
    """Uniform B-splines on one interval: row q has the polynomial in t, 0 <= t < 1, lowest power first, that
    multiplies coefficient k + q on interval k (Cox-de Boor recursion)."""
    pieces = np.ones((1, 1))
    for p in range(1, degree + 1):
        new = np.zeros((p + 1, p + 1))
        for q in range(p + 1):
            if q > 0:  # (t + p - q) / p times the piece before
                new[q, :p] += (p - q) / p * pieces[q - 1]
                new[q, 1:] += pieces[q - 1] / p
            if q < p:  # (q + 1 - t) / p times the same piece
                new[q, :p] += (q + 1) / p * pieces[q]
                new[q, 1:] -= pieces[q] / p
        pieces = new
    return pieces


def _coefficients(function, step: float, intervals: int) -> np.ndarray:
    """Coefficients (intervals + DEGREE, F) of the spline through the function's values at the knots."""
    half = DEGREE // 2
    knots = step * torch.arange(-MARGIN, intervals + 1 + MARGIN, dtype=torch.float64)
    values = function(knots[:, None]).numpy()
    at_knot = spline_pieces()[:DEGREE, 0]
    bands = np.repeat(at_knot[:, None], len(knots), axis=1)
    inner = solve_banded((half, half), bands, values)
    return np.ascontiguousarray(inner[MARGIN - half : MARGIN + intervals + half + 1])


def _error(function, coefficients: np.ndarray, step: float, enough: float, delta: float = 1e-6) -> float:
    """Largest error of values and slopes, at three places between all knots, relative to the largest; one that is
    above `enough` will do."""
    intervals = len(coefficients) - DEGREE
    windows = [coefficients[q : q + intervals] for q in range(DEGREE + 1)]
    knots = step * torch.arange(intervals, dtype=torch.float64)[:, None]
    worst = 0.0
    for t in (0.25, 0.07, 0.5):  # where a spline that is too coarse is seen first
        powers = t ** np.arange(DEGREE + 1)
        slopes = np.arange(1, DEGREE + 1) * powers[:-1] / step
        found = sum(w * c for w, c in zip(spline_pieces() @ powers, windows, strict=True))
        slope = sum(w * c for w, c in zip(spline_pieces()[:, 1:] @ slopes, windows, strict=True))
        d = knots + t * step
        # central differences in float64: their own error is about 1e-10
        expected = ((function(d + delta) - function(d - delta)) / (2 * delta)).numpy()
        for right, left in ((function(d).numpy(), found), (expected, slope)):
            worst = max(worst, np.abs(right - left).max() / max(np.abs(right).max(), 1e-300))
        if worst > enough:
            break
    return float(worst)
