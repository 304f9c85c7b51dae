"""The check of dispersion: what a calculator adds to its network. All other lines but the trajectory are without it."""

import numpy as np
from ase import Atoms

from segnn_ase.structure.dispersion import dispersion_of
from segnn_ase.verify.certificate import Check
from segnn_ase.verify.states import Sizes, State, Subject, compared, judged, moved, state_of, without

EXACT = Sizes(1e-9, 1e-9, 1e-9)
STEP, STRAIN = 1e-2, 1e-3  # Å; long, as neighbours that cease to count at 21 Å are jumps of some 1e-8 eV
FORCES, STRESS = 1e-4, 1e-5  # eV/Å and eV/Å^3: what these make of differences


def dispersion(s: Subject) -> list[Check]:
    """Total = network + dispersion, in float64; forces and stress of the latter against differences of its energy."""
    if s.dispersion is None:
        return []
    total, note = s.make(dtype="float64", dispersion=s.dispersion), f"float64; {s.dispersion} by dftd3"
    structures = [s.atoms, _displaced(s), _unwrapped(s)]
    found = [state_of(total, atoms) for atoms in structures]
    expected = [_sum(state_of(s.double, atoms), s.dispersion, atoms) for atoms in structures]
    difference = max(abs(state.energy - state.energies.sum()) for state in found)
    return [
        *compared("total = network + dispersion", zip(found, expected, strict=True), EXACT, note),
        judged("total = sum over atoms", difference, EXACT.energy, "eV"),
        *_derivatives(s, s.dispersion),
    ]


def _displaced(s: Subject) -> Atoms:
    atoms = s.atoms.copy()
    atoms.rattle(0.05, rng=s.rng)
    return atoms


def _unwrapped(s: Subject) -> Atoms:
    """Cells away, and out of the box where it is not periodic."""
    atoms = moved(s.atoms, np.eye(3), (3.1, -40.7, 12.3))
    atoms.positions += (s.rng.integers(-3, 4, (len(atoms), 3)) * atoms.pbc) @ atoms.cell.array
    return atoms


def _sum(network: State, name: str, atoms: Atoms) -> State:
    added = dispersion_of(name, atoms)
    stress = None if network.stress is None else network.stress + added.virial / atoms.get_volume()
    return network._replace(energy=network.energy + added.energy, forces=network.forces + added.forces, stress=stress)


def _derivatives(s: Subject, name: str) -> list[Check]:
    here, v, strain = dispersion_of(name, s.atoms), s.rng.normal(size=(len(s.atoms), 3)), s.rng.normal(size=(3, 3))
    v, strain = v / np.linalg.norm(v), (strain + strain.T) / np.linalg.norm(strain + strain.T)

    def slope(h: float, build) -> float:
        e = [dispersion_of(name, build(k * h), derivatives=False).energy for k in (-2, -1, 1, 2)]
        return (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h)

    error = abs((here.forces * v).sum() + slope(STEP, lambda x: moved(s.atoms, np.eye(3), x * v)))
    lines = [judged("dispersion, forces = -dE/dr", error, FORCES, "eV/Å", "one random direction")]
    if not s.atoms.pbc.all():
        return [*lines, without("dispersion, stress = dE/dstrain / V", "not defined")]
    error = abs((here.virial * strain).sum() - slope(STRAIN, lambda x: moved(s.atoms, np.eye(3) + x * strain)))
    error /= s.atoms.get_volume()
    return [*lines, judged("dispersion, stress = dE/dstrain / V", error, STRESS, "eV/Å³", "one random strain")]
