"""Names of labels, of units and of what a calculation gave."""

import numpy as np
import pytest

from segnn_ase.base.label_names import is_result, looks_like, unit_of_what, usual_name


@pytest.mark.parametrize(
    ("name", "kind", "prefix"),
    [
        ("energy", "energy", ""),
        ("REF_Energy", "energy", "ref"),
        ("DFTenergy", "energy", "dft"),
        ("TotalEnergy", "energy", ""),
        ("ab_initio_forces", "forces", "ab_initio"),
        ("pbe0_energy", "energy", "pbe0"),
        ("target_free_energies", "free_energy", "target"),
        ("f", "forces", ""),
        ("REF_virials", "virial", "ref"),
        ("Stress_Tensor", "stress", ""),
    ],
)
def test_usual_names(name, kind, prefix):
    assert usual_name(name) == (kind, prefix)


@pytest.mark.parametrize("name", ["", "hf", "dft", "reff", "mace_energy", "energy_of", "forces_mask", "freeenergyx"])
def test_other_names(name):
    assert usual_name(name) is None


@pytest.mark.parametrize("value", [[[1], [1, 2]], {"a": 1}, None, "text", object()])
def test_values_of_any_kind_are_looked_at(value):
    assert looks_like("energy", value, 3) is None
    assert is_result("energy", value, 3) and not is_result("note", value, 3)


@pytest.mark.parametrize(
    ("name", "what"), [("energy_unit", "energy"), ("Units", ""), ("REF_forces-units", "ref_forces"), ("unitary", None)]
)
def test_units(name, what):
    assert unit_of_what(name) == what


@pytest.mark.parametrize(("name", "result"), [("initial_charges", False), ("mace_charges", True), ("numbers", False)])
def test_results(name, result):
    assert is_result(name, np.ones(3), 3) == result
