"""Infrared and Raman spectra from dipoles and polarizabilities along a trajectory of classical dynamics."""

import math
from typing import NamedTuple

import numpy as np
import scipy.constants as si
from scipy.signal import welch

from segnn_ase.base.errors import ConfigError, expect

PER_CM = 100 * si.c  # Hz of one cm^-1
FEWEST = 64  # frames
ROTATION = 200.0  # cm^-1, below which molecules turn
SEEN = 0.9  # of the highest frequency that frames resolve: at all of it, differences see nothing
KM_PER_MOL = 0.1 * si.N_A  # of m^2, km/mol/cm^-1


class Spectrum(NamedTuple):
    """Intensities against wavenumbers, cm^-1, up to what the time between frames resolves."""

    wavenumbers: np.ndarray  # (n,) cm^-1
    intensities: np.ndarray  # (n,)
    resolution: float  # cm^-1, full width of a line by the window alone


def infrared(dipoles, timestep: float, temperature: float, *, resolution: float = 10.0) -> Spectrum:
    """Molar absorption, km/mol/cm^-1, per structure: N_A / (12 eps0 c kT) times the power of d mu/dt.

    From sigma(w) = pi beta w^2 / (3 c eps0) C(w), C the transform of <mu(0) mu(t)> / 2 pi, which has the harmonic
    quantum correction (Ramirez et al., J. Chem. Phys. 121, 3973 (2004)); the index of refraction is 1. The area of a
    band of a harmonic molecule is its intensity, N_A / (12 eps0 c^2) (d mu/dQ)^2.

    dipoles (T, 3) e Å, of a cell without jumps by a quantum (see `unfolded`); timestep: fs between them; temperature:
    K; resolution: cm^-1, of a Hann window whose spectra are averaged. Raises ConfigError for too few frames or numbers
    that are none.
    """
    dipoles = numbers_along(dipoles, (3,))
    check_numbers(len(dipoles), timestep, temperature, resolution)
    frequencies, power, width = power_of_rate(dipoles, timestep, resolution)
    factor = si.e**2 * si.angstrom**2 / (12 * si.epsilon_0 * si.c * si.k * temperature)  # m^2 per (e Å)^2 / s
    return Spectrum(frequencies / PER_CM, KM_PER_MOL * factor * power.sum(axis=1), width)


def raman(
    polarizabilities, timestep: float, temperature: float, *, resolution: float = 10.0, laser: float = 532.0
) -> Spectrum:
    """Raman intensity of polarised light at a right angle, the largest above 200 cm^-1 being 1: 45 a'^2 + 7 gamma'^2.

    Times (w_laser - w)^4 / w / (1 - exp(-h w / kT)), of the powers of d alpha/dt (Thomas et al., Phys. Chem. Chem.
    Phys. 15, 6608 (2013)). polarizabilities (T, 3, 3) in any unit; timestep: fs; temperature: K; resolution:
    cm^-1; laser: wavelength, nm. Raises ConfigError for too few frames or numbers that are none.
    """
    alpha = numbers_along(polarizabilities, (3, 3))
    check_numbers(len(alpha), timestep, temperature, resolution, laser)
    mean, xx, yy, zz = np.trace(alpha, axis1=1, axis2=2) / 3, *(alpha[:, k, k] for k in range(3))
    off = [0.5 * (alpha[:, a, b] + alpha[:, b, a]) for a, b in ((0, 1), (1, 2), (2, 0))]
    # gamma^2 = 1/2 sum (differences of the diagonal)^2 + 3 sum (off the diagonal)^2
    parts = [mean, *(0.5**0.5 * x for x in (xx - yy, yy - zz, zz - xx)), *(3**0.5 * x for x in off)]
    frequencies, power, width = power_of_rate(np.stack(parts, axis=1), timestep, resolution)
    scattered = (45 * power[:, 0] + 7 * power[:, 1:].sum(axis=1)) / 45
    bose = -np.expm1(-si.h * frequencies[1:] / (si.k * temperature))
    shifted = np.maximum(1e7 / laser - frequencies[1:] / PER_CM, 0.0) ** 4
    intensities = np.concatenate([[0.0], scattered[1:] * shifted / (frequencies[1:] * bose)])
    wavenumbers = frequencies / PER_CM
    largest = intensities[wavenumbers > ROTATION].max(initial=0.0) or 1.0
    return Spectrum(wavenumbers, intensities / largest, width)


def unfolded(dipoles, cells, pbc=(True, True, True)) -> np.ndarray:
    """Dipoles (T, 3) e Å of periodic cells without jumps by a quantum, e times a lattice vector.

    cells (3, 3) Å, or one for each frame. Each is moved by quanta of periodic directions to be nearest to the one
    before.
    """
    dipoles, cells = np.array(dipoles, dtype=float), np.broadcast_to(cells, (len(dipoles), 3, 3))
    for n in range(1, len(dipoles)):
        away = np.linalg.solve(cells[n].T, dipoles[n] - dipoles[n - 1])
        dipoles[n] -= np.where(pbc, np.rint(away), 0.0) @ cells[n]
    return dipoles


def power_of_rate(values: np.ndarray, timestep: float, resolution: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Frequencies (n,) Hz, the one-sided power spectra of dx/dt (n, k) per Hz, and the resolution that there is, cm^-1.

    By central differences, whose loss at high frequencies is made up for; the area of each is <(dx/dt)^2>.
    """
    step = timestep * si.femto
    rates = (values[2:] - values[:-2]) / (2 * step)
    length = math.ceil(1.5 / (resolution * PER_CM * step))  # a Hann window's lines are 1.5 bins wide
    length = min(len(rates), max(length, 16))
    frequencies, power = welch(rates, 1 / step, nperseg=length, detrend="constant", axis=0)
    angle = 2 * np.pi * frequencies * step
    known = angle < SEEN * np.pi
    lost = np.sinc(angle[known] / np.pi) ** 2
    return frequencies[known], power[known] / lost[:, None], 1.5 / (length * step * PER_CM)


def highest_wavenumber(timestep: float) -> float:
    """cm^-1, that frames so many fs apart resolve; what is above comes out below."""
    return SEEN / (2 * timestep * si.femto * PER_CM)


def numbers_along(values, shape: tuple[int, ...]) -> np.ndarray:
    """The values as an array (T, *shape). Raises ConfigError."""
    try:
        array = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        array = np.zeros(0)
    wanted = ", ".join(map(str, ("T", *shape)))
    expect(array.shape[1:] == shape and bool(np.isfinite(array).all()), "values", values, f"finite numbers ({wanted})")
    return array


def check_numbers(
    frames: int, timestep: float, temperature: float, resolution: float, laser: float | None = None
) -> None:
    """Raise ConfigError for what gives no spectrum."""
    if frames < FEWEST:
        raise ConfigError(f"there are {frames} frames; expected at least {FEWEST} for a spectrum")
    for name, value, unit in (
        ("timestep", timestep, "fs"),
        ("temperature", temperature, "K"),
        ("resolution", resolution, "cm^-1"),
    ):
        good = isinstance(value, int | float | np.number) and 0 < value < math.inf
        expect(good, name, value, f"a positive number, {unit}")
    if laser is not None:
        good = isinstance(laser, int | float | np.number) and 100 <= laser <= 100_000
        expect(good, "laser", laser, "a wavelength, nm, from 100 to 100,000")
