"""Clebsch-Gordan coefficients of real spherical harmonics in e3nn's convention, by Racah's formula.

e3nn is where the convention comes from and what the tests compare with. Its import takes more time than a first
evaluation of forces, so the coefficients are computed here.
"""

import math
from fractions import Fraction
from functools import cache
from math import factorial

import numpy as np

HALF = 0.5**0.5


@cache
def real_clebsch_gordan(l1: int, l2: int, l3: int) -> np.ndarray:
    """Coefficients (2l1+1, 2l2+1, 2l3+1) of l1 (x) l2 -> l3, orthonormal in the last index.

    e3nn's `wigner_3j` times sqrt(2 l3 + 1): C^real = Q1 Q2 Q3* C, with the unitary Q of `_real_basis`.
    """
    q1, q2, q3 = map(_real_basis, (l1, l2, l3))
    table = np.einsum("ai,bj,cm,abc->ijm", q1, q2, q3.conj(), _complex_clebsch_gordan(l1, l2, l3))
    real = table.real.copy()
    real[np.abs(real) < 1e-14] = 0.0  # rounding of what cancels
    real.flags.writeable = False
    return real


def _real_basis(l: int) -> np.ndarray:
    """Real harmonics (columns) in complex ones (rows), m = -l ... l, times (-i)^l: couplings are then real."""
    q = np.zeros((2 * l + 1, 2 * l + 1), dtype=complex)
    q[l, l] = 1.0
    for m in range(1, l + 1):
        sign = (-1) ** m
        q[l - m, l + m], q[l - m, l - m] = HALF, -1j * HALF
        q[l + m, l + m], q[l + m, l - m] = sign * HALF, 1j * sign * HALF
    return (-1j) ** l * q


def _complex_clebsch_gordan(l1: int, l2: int, l3: int) -> np.ndarray:
    """<l1 m1 l2 m2 | l3 m3> with the phases of Condon and Shortley, (2l1+1, 2l2+1, 2l3+1)."""
    table = np.zeros((2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1))
    for m1 in range(-l1, l1 + 1):
        for m2 in range(max(-l2, -l3 - m1), min(l2, l3 - m1) + 1):
            table[l1 + m1, l2 + m2, l3 + m1 + m2] = _racah(l1, l2, l3, m1, m2)
    return table


def _racah(l1: int, l2: int, l3: int, m1: int, m2: int) -> float:
    """One coefficient: the root of a fraction times a sum of fractions, both exact."""
    m3 = m1 + m2
    of_degrees = Fraction(
        (2 * l3 + 1) * factorial(l3 + l1 - l2) * factorial(l3 - l1 + l2) * factorial(l1 + l2 - l3),
        factorial(l1 + l2 + l3 + 1),
    )
    of_orders = math.prod(factorial(l + m) * factorial(l - m) for l, m in ((l1, m1), (l2, m2), (l3, m3)))
    first, last = max(0, l2 - l3 - m1, l1 - l3 + m2), min(l1 + l2 - l3, l1 - m1, l2 + m2)
    total = sum(
        _term(k, l1 + l2 - l3 - k, l1 - m1 - k, l2 + m2 - k, l3 - l2 + m1 + k, l3 - l1 - m2 + k)
        for k in range(first, last + 1)
    )
    return math.copysign(math.sqrt(of_degrees * of_orders * total**2), total)


def _term(k: int, *others: int) -> Fraction:
    return Fraction((-1) ** k, factorial(k) * math.prod(map(factorial, others)))
