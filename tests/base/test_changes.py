"""What has changed in a structure: as ASE's `compare_atoms` says, but for what differs by less than its tolerance."""

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator, compare_atoms
from helpers.systems import triclinic

from segnn_ase.base.changes import changes
from segnn_ase.base.threads import SharedCalculator


def shifted(array: np.ndarray, by: float = 1e-9) -> None:
    array.flat[-1] += by


def with_charges(atoms: Atoms) -> None:
    atoms.set_initial_charges(np.arange(float(len(atoms))))


CHANGES = {
    "nothing": lambda atoms: None,
    "positions": lambda atoms: shifted(atoms.positions),
    "cell": lambda atoms: shifted(atoms.cell.array),
    "numbers": lambda atoms: shifted(atoms.numbers, 1),
    "pbc": lambda atoms: atoms.set_pbc([True, False, True]),
    "charges": with_charges,
    "charges of zero": lambda atoms: atoms.set_initial_charges(),
    "magnetic moments": lambda atoms: atoms.set_initial_magnetic_moments(np.ones((len(atoms), 3))),
    "an atom less": lambda atoms: atoms.pop(),
    "several": lambda atoms: (atoms.rattle(0.1), with_charges(atoms), atoms.set_cell(2 * atoms.cell)),
    "what is no input": lambda atoms: (
        atoms.set_tags(1),
        atoms.info.update(a=1),
        atoms.set_velocities(atoms.positions),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("charged", [False, True])
def test_changes_are_those_that_ase_finds(change, charged):
    before = triclinic()
    if charged:
        before.set_initial_charges(np.ones(len(before)))
    after = before.copy()
    CHANGES[change](after)
    for a, b in ((before, after), (after, before)):
        assert set(changes(a, b)) == set(compare_atoms(a, b))


def test_without_a_structure_before_everything_has_changed():
    assert changes(None, triclinic()) == compare_atoms(None, triclinic())


def test_the_last_bit_counts():
    before = triclinic()
    after = before.copy()
    after.positions[0, 0] = np.nextafter(after.positions[0, 0], np.inf)
    assert changes(before, after) == ["positions"]


def test_a_tolerance_is_kept_where_it_is_asked_for():
    calculator, atoms = SharedCalculator(), triclinic()
    calculator.atoms = atoms.copy()
    shifted(atoms.positions)
    assert calculator.check_state(atoms) == ["positions"]
    assert calculator.check_state(atoms, tol=1e-6) == Calculator.check_state(calculator, atoms, tol=1e-6) == []
