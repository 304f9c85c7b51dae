"""Labels of what belongs to cues: which of several is taken, in which unit, and what is refused."""

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from segnn_ase.base.errors import DataError
from segnn_ase.data.batches import make_item
from segnn_ase.data.convert import convert
from segnn_ase.data.frames import changes_of, frame_from_atoms, read_frames
from segnn_ase.model.settings import model_config

FIELD, MOMENTS, SPIN = (model_config(cues=[name]).cues for name in ("external_field", "initial_magmoms", "spin"))


def water(info=(), arrays=(), results=()) -> Atoms:
    atoms = molecule("H2O")
    atoms.info |= {"energy": -1.0, **dict(info)}
    atoms.arrays |= dict(arrays)
    if results:
        atoms.calc = SinglePointCalculator(atoms)
        atoms.calc.results |= dict(results)
    return atoms


def labels_of(atoms: Atoms, cues=FIELD):
    return make_item(frame_from_atoms(atoms), 3.0, cues).labels


@pytest.mark.parametrize(
    "kind, one, other", [("dipole", "dipole", "polarization"), ("dipole", "polarization", "dipole")]
)
def test_prefixes_go_before_calculators_and_these_before_plain_names(kind, one, other):
    """Whichever of its names a label has."""
    ref, of_calculator, plain = np.eye(3)
    atoms = water({f"dft_{one}": 5 * ref, f"REF_{one}": ref, other: plain}, results={other: of_calculator})
    for expected, name in ((ref, f"REF_{one}"), (5 * ref, f"dft_{one}"), (of_calculator, None)):
        assert np.array_equal(labels_of(atoms).dipole[0], expected)
        atoms.info.pop(name, None)
    atoms.calc = None
    assert np.array_equal(labels_of(atoms).dipole[0], plain)


def test_born_charges_behind_a_prefix_go_before_those_of_a_calculator():
    ref, other = np.random.default_rng(0).normal(size=(2, 3, 3, 3))
    atoms = water(arrays={"REF_born_charges": ref.reshape(3, 9)}, results={"born_effective_charges": other})
    assert np.array_equal(labels_of(atoms).born, ref)
    atoms.arrays["REF_born_charges"] = ref.reshape(9, 3)[:3]
    with pytest.raises(DataError, match="born_effective_charges has shape"):
        labels_of(atoms)
    atoms.arrays.pop("REF_born_charges")
    atoms.calc.results["born_effective_charges"] = other.reshape(9, 3)
    with pytest.raises(DataError, match="born_effective_charges has shape"):
        labels_of(atoms)


def test_what_each_atom_has_is_no_label_of_the_molecule():
    """Nine atoms would have nine numbers."""
    alpha = np.diag([1.0, 2.0, 3.0])
    atoms = molecule("CH3CH2OH")
    atoms.info |= {"energy": -1.0, "polarizability": alpha}
    atoms.arrays["polarizability"] = np.arange(9.0)
    assert np.array_equal(labels_of(atoms).polarizability[0], alpha)


@pytest.mark.parametrize(
    "kind, unit, factor",
    [
        ("dipole", "Debye", units.Debye),
        ("dipole", "e*Å", 1.0),
        ("dipole", "e Angstrom", 1.0),
        ("dipole", "a.u.", units.Bohr),
        ("polarizability", "Bohr^3", units.Bohr**2 / units.Hartree),
        ("polarizability", "Å**3", 1 / 14.399645),
        ("polarizability", "e Å²/V", 1.0),
    ],
)
@pytest.mark.parametrize("prefix", ["", "REF_"])
def test_stated_units_are_converted_and_told(kind, unit, factor, prefix):
    value = np.arange(3.0) if kind == "dipole" else np.arange(9.0).reshape(3, 3)
    frame = frame_from_atoms(water({f"{prefix}{kind}": value, f"{prefix}{kind}_unit": unit}))
    label = getattr(make_item(frame, 3.0, FIELD).labels, kind)[0]
    np.testing.assert_allclose(label, factor * value, rtol=1e-6)
    assert (f"{kind}: in {unit} as 1 frames say, converted" in changes_of([frame])) == (factor != 1.0)


def test_units_that_are_not_known_are_refused():
    with pytest.raises(DataError, match="its dipole is in 'furlong', which is no known unit"):
        frame_from_atoms(water({"dipole": np.zeros(3), "dipole_unit": "furlong"}))
    with pytest.raises(DataError, match=r"its external_field is in 'a\.u\.', which is no known unit"):
        frame_from_atoms(water({"external_field": np.ones(3), "external_field_unit": "a.u."}))


@pytest.mark.parametrize(
    "cues, info, arrays, name",
    [
        (FIELD, {"dipole": np.ones(3)}, {}, "dipole"),
        (FIELD, {"external_field": np.ones(3)}, {}, "external_field"),
        (MOMENTS, {}, {"initial_magmoms": np.ones(3), "magnetic_forces": np.ones(3)}, "magnetic_forces"),
    ],
)
def test_beside_energies_in_other_units_labels_state_theirs(cues, info, arrays, name):
    atoms = water({"energy_unit": "Hartree", **info}, arrays)
    with pytest.raises(DataError, match=f"its energy is in 'Hartree', but nothing is said of its {name}"):
        labels_of(atoms, cues)
    labels_of(atoms, ())  # of who is not told
    atoms.info[f"{name}_unit"] = {"dipole": "Debye", "external_field": "V/Å", "magnetic_forces": "eV/muB"}[name]
    labels_of(atoms, cues)


def test_conversion_loses_no_unit(tmp_path):
    """Of labels that say nothing, once energies are in eV."""
    ase.io.write(tmp_path / "ha.xyz", water({"energy_unit": "Hartree", "dipole": np.ones(3)}))
    with pytest.raises(DataError, match="nothing is said of its dipole"):
        convert(tmp_path / "ha.xyz", tmp_path / "new.xyz")
    ase.io.write(tmp_path / "ha.xyz", water({"energy_unit": "Hartree", "dipole": np.ones(3), "dipole_unit": "Debye"}))
    convert(tmp_path / "ha.xyz", tmp_path / "new.xyz")
    (frame,) = read_frames(tmp_path / "new.xyz")
    assert frame.energy == pytest.approx(-units.Hartree)
    np.testing.assert_allclose(make_item(frame, 3.0, FIELD).labels.dipole[0], units.Debye)


def test_magnetic_forces_along_no_axis_are_of_moments_along_none():
    atoms = water(arrays={"initial_magmoms": np.ones(3), "magnetic_forces": np.full(3, 0.1)})
    assert bool(labels_of(atoms, MOMENTS).cue_gradients[:, 2].isfinite().all())
    atoms.arrays["initial_magmoms"] = np.tile([1.0, 0.0, 0.0], (3, 1))
    with pytest.raises(DataError, match="magnetic_forces have shape"):
        labels_of(atoms, MOMENTS)


def test_electrons_are_counted_with_the_charge_that_is_told():
    """In a training as by the calculator: of atoms.info, or the sum of the charges, if that is a whole number."""
    radical = molecule("H2O")
    radical.info |= {"energy": -1.0, "charge": 1, "spin": 2}
    labels_of(radical, SPIN)
    radical.info["spin"] = 1
    with pytest.raises(DataError, match="spin'] is 1 with 9 electrons"):
        labels_of(radical, SPIN)
    told = model_config(cues=["spin", "initial_charges"]).cues
    ion = water({"spin": 2}, {"initial_charges": np.array([0.4, 0.3, 0.3])})
    labels_of(ion, told)
    ion.info["spin"] = 1
    with pytest.raises(DataError, match="spin'] is 1 with 9 electrons"):
        labels_of(ion, told)
    ion.arrays["initial_charges"] = np.array([0.2, 0.1, 0.1])
    labels_of(ion, told)
