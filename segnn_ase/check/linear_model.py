"""A crude potential, linear in its coefficients, that is fitted in a second: it tells whether labels belong together.

Energies are sums over pairs (functions of the distance) and over atoms (squares of the first three moments of the
neighbourhood); forces and stress follow by hand-made derivatives with the same coefficients, so that energies,
forces and stress of one potential can be compared in sign and unit.
"""

from collections.abc import Iterator
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np
from ase import Atoms
from scipy.sparse import csr_matrix

from segnn_ase.check.pairs import CUTOFF, Pairs

SHORTEST = 0.8  # Å, where the radial functions begin
MOMENT_FUNCTIONS = 4
FOLDS = 4
RIDGE = 1e-4


class Features(NamedTuple):
    """What the K coefficients are multiplied with; float32 where there are many."""

    energy: np.ndarray  # (n, K) eV
    forces: list[np.ndarray]  # n of (3 N, K) eV/Å
    stress: np.ndarray  # (n, 9, K) eV/Å^3; NaN without a volume


class Fit(NamedTuple):
    """Every structure predicted by a fit that has not seen it, in the units of the energies."""

    energy: np.ndarray  # (n,) eV/atom, without what a fit to the composition explains
    forces: list[np.ndarray]  # n of (3 N,) eV/Å
    stress: np.ndarray  # (n, 3, 3) eV/Å^3


def radial_functions(r: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussians as wide as they are far apart, (E, count), cut off smoothly, and their derivatives."""
    centres = np.geomspace(SHORTEST, CUTOFF, count)
    widths = centres * ((CUTOFF / SHORTEST) ** (1 / (count - 1)) - 1)
    x = (r[:, None] - centres) / widths
    u = (1 - (r / CUTOFF) ** 2)[:, None]
    bump = np.exp(-x * x / 2) * u**2
    return bump * u, bump * (-6 * r[:, None] / CUTOFF**2 - x / widths * u)


def pair_terms(r: np.ndarray, unit: np.ndarray, count: int):
    """Value (E, K) and derivative by the vector (E, 3, K) of functions of the distance; half for each direction."""
    value, slope = radial_functions(r, count)
    return value / 2, unit[:, :, None] * slope[:, None, :] / 2


def moment_terms(i: np.ndarray, r: np.ndarray, unit: np.ndarray, n_atoms: int):
    """Squares |M_l|^2 of M_l = sum_j g(r) u^l, l = 0, 1, 2: each pair's share in them and the derivative by its vector.

    With s = M_l : u^l, d|M_l|^2 / dr = 2 g' s u + 2 l g / r (M_l : u^(l-1) - s u), and sum_j g s = |M_l|^2.
    """
    g, slope = radial_functions(r, MOMENT_FUNCTIONS)
    over_r = g / r[:, None]
    to_atom = csr_matrix((np.ones(len(i)), (i, np.arange(len(i)))), shape=(n_atoms, len(i)))
    powers = (np.ones((len(r), 1)), unit, (unit[:, :, None] * unit[:, None, :]).reshape(-1, 9))
    values, derivatives = [], []
    for degree, power in enumerate(powers):
        width = power.shape[1]
        shares = (power[:, :, None] * g[:, None, :]).reshape(len(r), width * MOMENT_FUNCTIONS)
        moments = (to_atom @ shares).reshape(n_atoms, width, MOMENT_FUNCTIONS)[i]
        if degree == 2:
            across = np.einsum("eabk,eb->eak", moments.reshape(-1, 3, 3, MOMENT_FUNCTIONS), unit)
        else:
            across = moments if degree == 1 else np.zeros((len(r), 3, MOMENT_FUNCTIONS))
        along = moments[:, 0] if degree == 0 else np.einsum("eak,ea->ek", across, unit)
        radial = (slope * along - degree * over_r * along)[:, None, :] * unit[:, :, None]
        values.append(g * along)
        derivatives.append(2 * radial + 2 * degree * over_r[:, None, :] * across)
    return np.concatenate(values, axis=1), np.concatenate(derivatives, axis=2)


def blocks_of(pairs: Pairs, species: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Groups of pairs by their elements: indices of the pairs, their terms and the derivatives."""
    r = np.maximum(np.linalg.norm(pairs.vectors, axis=1), 1e-3)  # atoms on one spot are reported elsewhere
    unit = pairs.vectors / r[:, None]
    centre, neighbour = pairs.numbers[pairs.i], pairs.numbers[pairs.j]
    kinds = list(combinations_with_replacement(species, 2))
    count = int(np.clip(160 // len(kinds), 4, 16))
    for a, b in kinds:
        chosen = np.flatnonzero(((centre == a) & (neighbour == b)) | ((centre == b) & (neighbour == a)))
        yield chosen, *pair_terms(r[chosen], unit[chosen], count)
    for a in species:
        for group in [[b] for b in species] if len(species) <= 3 else [species]:
            chosen = np.flatnonzero((centre == a) & np.isin(neighbour, group))
            yield chosen, *moment_terms(pairs.i[chosen], r[chosen], unit[chosen], len(pairs.numbers))


def features_of(structures: list[Atoms], pairs: Pairs, species: list[int]) -> Features:
    """Features of a few structures, whose pairs are all held at once; see `concatenated`."""
    n_atoms, energy, forces, virial = len(pairs.numbers), [], [], []
    for chosen, value, derivative in blocks_of(pairs, species):
        i, j = pairs.i[chosen], pairs.j[chosen]
        width, ones, columns = value.shape[1], np.ones(len(chosen)), np.arange(len(chosen))
        by_frame = csr_matrix((ones, (pairs.frame[i], columns)), shape=(len(structures), len(chosen)))
        ends = csr_matrix((np.r_[ones, -ones], (np.r_[i, j], np.r_[columns, columns])), shape=(n_atoms, len(chosen)))
        outer = pairs.vectors[chosen][:, :, None, None] * derivative[:, None, :, :]
        energy.append(by_frame @ value)
        forces.append((ends @ derivative.reshape(len(chosen), 3 * width)).reshape(3 * n_atoms, width).astype("f4"))
        virial.append((by_frame @ outer.reshape(len(chosen), 9 * width)).reshape(-1, 9, width))
    volumes = np.array([abs(np.linalg.det(a.cell.array)) if a.pbc.all() else np.nan for a in structures])
    cuts = 3 * np.cumsum([len(atoms) for atoms in structures])[:-1]
    stress = np.concatenate(virial, axis=2) / volumes[:, None, None]
    return Features(np.concatenate(energy, axis=1), np.split(np.concatenate(forces, axis=1), cuts), stress)


def concatenated(parts: list[Features]) -> Features:
    """Those of all structures, one behind the other."""
    energy, forces, stress = zip(*parts, strict=True)
    return Features(np.concatenate(energy), [one for part in forces for one in part], np.concatenate(stress))


class Equations(NamedTuple):
    """Normal equations of energies and of forces, one of each a fold, with what they were made from."""

    features: Features
    projected: np.ndarray  # (n, K) features an atom, without what the composition explains
    energies: np.ndarray  # (n,) eV/atom, likewise; NaN without a label
    basis: np.ndarray  # (known, rank) orthonormal, of what the composition explains
    fold: np.ndarray  # (n,)
    gram: np.ndarray  # (2, FOLDS, K, K) of energies and of forces
    moment: np.ndarray  # (2, FOLDS, K)
    square: np.ndarray  # (2, FOLDS) of the labels


def equations_of(
    features: Features, structures: list[Atoms], energies: np.ndarray, forces: list, species: list[int]
) -> Equations:
    """Prepare the fits. energies (n,) eV with NaN, forces n of (N, 3) eV/Å or None, where there is no label."""
    sizes = np.array([len(atoms) for atoms in structures], dtype=float)
    counts = np.array([[np.sum(atoms.numbers == z) for z in species] for atoms in structures]) / sizes[:, None]
    known = np.isfinite(energies)
    basis, strength, _ = np.linalg.svd(counts[known], full_matrices=False)
    basis = basis[:, strength > 1e-8 * strength.max(initial=0)]
    projected, reference = features.energy / sizes[:, None], energies / sizes
    projected[known] -= basis @ (basis.T @ projected[known])
    reference[known] -= basis @ (basis.T @ reference[known])
    fold, K = np.arange(len(sizes)) % FOLDS, features.energy.shape[1]
    gram, moment, square = np.zeros((2, FOLDS, K, K)), np.zeros((2, FOLDS, K)), np.zeros((2, FOLDS))
    for k in range(FOLDS):
        x, y = projected[known & (fold == k)], reference[known & (fold == k)]
        gram[0, k], moment[0, k], square[0, k] = x.T @ x, x.T @ y, y @ y
    for k, x, label in zip(fold, features.forces, forces, strict=True):
        if label is not None:
            x, y = of_known(x, label)
            gram[1, k] += x.T @ x
            moment[1, k] += x.T @ y
            square[1, k] += y @ y
    return Equations(features, projected, reference, basis, fold, gram, moment, square)


def of_known(features: np.ndarray, forces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, K) and force components (n,) of a structure without those that are NaN."""
    y = forces.ravel()
    known = np.isfinite(y)
    return (features, y) if known.all() else (features[known], y[known])


def with_energies(equations: Equations, energies: np.ndarray) -> Equations:
    """The same with other energies, (n,) eV/atom, known for the same structures."""
    q, moment, square = equations, equations.moment.copy(), equations.square.copy()
    known = np.isfinite(q.energies)
    reference = np.where(known, energies, np.nan)
    reference[known] -= q.basis @ (q.basis.T @ reference[known])
    for k in range(FOLDS):
        part = known & (q.fold == k)
        moment[0, k], square[0, k] = q.projected[part].T @ reference[part], reference[part] @ reference[part]
    return q._replace(energies=reference, moment=moment, square=square)


def without_forces(equations: Equations, forces: dict[int, np.ndarray]) -> Equations:
    """The same without the forces, (N, 3) eV/Å, of some structures."""
    q, gram, moment, square = equations, equations.gram.copy(), equations.moment.copy(), equations.square.copy()
    for n, label in forces.items():
        (x, y), k = of_known(q.features.forces[n], label), q.fold[n]
        gram[1, k] -= x.T @ x
        moment[1, k] -= x.T @ y
        square[1, k] -= y @ y
    return q._replace(gram=gram, moment=moment, square=square)


def fit_folds(equations: Equations, *, factor: float = 1.0, energies: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients (FOLDS, K) from the other folds, and the parts of energies and of forces that they explain.

    Forces are divided by `factor`; both labels count relative to their variance, energies times the weight `energies`.
    """
    q, scaling = equations, np.array([1.0, factor])
    total = q.square.sum(1)
    weights = np.divide([energies, 1.0], total, out=np.zeros(2), where=total > 0)
    gram = np.einsum("t,tfkl->fkl", weights * scaling**2, q.gram)
    moment = np.einsum("t,tfk->fk", weights * scaling, q.moment)
    size = np.sqrt(np.diagonal(gram.sum(0)))
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 1e-9 * size.max(initial=0))
    matrices = scale[:, None] * (gram.sum(0) - gram) * scale + RIDGE * np.eye(len(scale))
    right = scale * (moment.sum(0) - moment)
    c = scale * np.linalg.solve(matrices, right[:, :, None])[:, :, 0]
    missed = np.einsum("fk,tfkl,fl->t", c, q.gram, c, optimize=True) * scaling**2
    missed += total - 2 * scaling * np.einsum("fk,tfk->t", c, q.moment)
    return c, 1 - np.divide(missed, total, out=np.ones(2), where=total > 0)


def apply_folds(equations: Equations, coefficients: np.ndarray) -> Fit:
    """Every structure by the coefficients of its fold, which come from the others."""
    own, features = coefficients[equations.fold], equations.features
    return Fit(
        energy=np.einsum("nk,nk->n", equations.projected, own),
        forces=[f @ c for f, c in zip(features.forces, own, strict=True)],
        stress=np.einsum("nsk,nk->ns", features.stress, own).reshape(-1, 3, 3),
    )
