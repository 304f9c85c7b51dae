"""Reference energies that contradict one another are told, not chosen from."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from segnn_ase.base.errors import DataError
from segnn_ase.data.frames import Frame, with_isolated_atoms
from segnn_ase.data.references import (
    energies_of_isolated_atoms,
    energy_scale,
    reference_energies,
    without_some_atoms,
)

WATER = [1, 8]


def frame(atoms: Atoms, energy: float, source: str) -> Frame:
    return Frame(atoms, energy, np.zeros((len(atoms), 3)), None, source, (None, None, None))


FRAMES = [
    frame(molecule("H2O"), -14.0, "train.xyz, frame 0"),
    frame(Atoms("H"), -1.5, "train.xyz, frame 1"),
    frame(Atoms("O"), -2.5, "train.xyz, frame 2"),
]


def test_two_energies_of_one_isolated_atom_are_refused():
    other = frame(Atoms("H"), -1.25, "train.xyz, frame 7")
    told = r"an isolated atom of H has different energies: -1.5 eV \(train.xyz, frame 1\) and -1.25 eV "
    with pytest.raises(DataError, match=told + r"\(train.xyz, frame 7\)"):
        reference_energies([*FRAMES, other], WATER)


def test_an_isolated_atom_among_the_frames_that_is_not_that_of_the_file_is_refused():
    isolated = [frame(Atoms("H"), -1.5, "atoms.xyz, frame 0"), frame(Atoms("O"), -3.0, "atoms.xyz, frame 1")]
    with pytest.raises(DataError, match=r"of O .*-2.5 eV \(train.xyz, frame 2\) and -3.0 eV \(atoms.xyz, frame 1\)"):
        reference_energies(FRAMES, WATER, isolated=isolated)


@pytest.mark.parametrize("place", ["frames", "isolated"])
def test_a_table_that_is_not_what_the_isolated_atoms_say_is_refused(place):
    frames, isolated = (FRAMES, None) if place == "frames" else (FRAMES[:1], FRAMES[1:])
    told = r"of H has different energies: -1.6 eV \(reference_energies\) and -1.5 eV \(train.xyz, frame 1\)"
    with pytest.raises(DataError, match=told):
        reference_energies(frames, WATER, table={1: -1.6, 8: -2.5}, isolated=isolated)


def test_a_table_of_other_elements_contradicts_nothing():
    found = reference_energies(FRAMES[:2], WATER, table={1: -1.5, 8: -9.0, 29: 3.0})
    assert found.values == {1: -1.5, 8: -9.0}


def test_the_same_energies_within_rounding_contradict_nothing():
    again = [frame(Atoms("H"), -1.5 + 5e-7, "train.xyz, frame 7"), frame(Atoms("O"), -2.5, "atoms.xyz, frame 0")]
    assert reference_energies([*FRAMES, *again], WATER).values == {1: -1.5, 8: -2.5}
    typed = {1: -1.5004, 8: -2.5}  # to three digits
    assert reference_energies(FRAMES, WATER, table=typed).values == typed


def told(one: Frame, **values) -> Frame:
    return one._replace(told={("info", name): value for name, value in values.items()})


def test_isolated_atoms_may_differ_in_what_a_potential_is_told():
    """E0 is that of which nothing is told, or else the lowest, but never that of ions; the others are learned."""
    ions = [told(frame(Atoms("H"), e, f"ions.xyz, frame {q}"), charge=q) for q, e in ((1, 12.1), (-1, -2.3))]
    assert reference_energies([*FRAMES, *ions], WATER, names=["charge"]).values == {1: -1.5, 8: -2.5}
    assert energies_of_isolated_atoms(ions, names=["charge"]) == {}
    states = [told(frame(Atoms("O"), e, f"o.xyz, frame {s}"), spin=s) for s, e in ((3, -2.0), (5, -1.8))]
    assert energies_of_isolated_atoms(states, names=["spin"]) == {8: -2.0}
    atoms = [told(one, charge=0, spin=1) for one in FRAMES[1:]]
    assert energies_of_isolated_atoms([*atoms, *ions], names=["charge", "spin"]) == {1: -1.5, 8: -2.5}
    with pytest.raises(DataError, match="different energies"):  # who is told nothing cannot learn them
        reference_energies([*FRAMES, *ions], WATER)
    again = told(frame(Atoms("H"), 12.0, "ions.xyz, frame 2"), charge=1)
    with pytest.raises(DataError, match=r"12.1 eV \(ions.xyz, frame 1\) and 12.0 eV"):
        reference_energies([*FRAMES, *ions, again], WATER, names=["charge"])


def test_isolated_atoms_of_some_elements_alone_are_no_part_of_a_fit():
    """They would move E0 of the others, and could not be learned."""
    frames = [of_formula(f"Al{n}Cu{4 - n}", -3.5 * n - 3.7 * (4 - n)) for n in range(5)]
    lone = of_formula("Al", -0.2)._replace(atoms=Atoms("Al"))
    fit = reference_energies([*frames, lone], [13, 29])
    assert fit.values == pytest.approx({13: -3.5, 29: -3.7}) and fit.residual == pytest.approx(0.0, abs=1e-9)
    assert without_some_atoms([*frames, lone], ()) == frames
    copper = lone._replace(atoms=Atoms("Cu"), energy=-0.1)
    assert without_some_atoms([*frames, lone, copper], ()) == [*frames, lone, copper]
    assert without_some_atoms([lone], ()) == [lone]


def test_a_charged_atom_gives_no_E0_to_who_is_not_told():
    proton = told(frame(Atoms("H"), 0.0, "train.xyz, frame 7"), charge=1)
    with pytest.raises(DataError, match=r"train.xyz, frame 7: the isolated atom of H has a charge.*--cues charge"):
        reference_energies([FRAMES[0], proton, FRAMES[2]], WATER)
    assert reference_energies([FRAMES[0], proton, FRAMES[2]], WATER, names=["charge"]).method == "least squares"


def test_crystals_beyond_the_cutoff_are_told_from_atoms():
    cells = [frame(Atoms("Cs", cell=[a] * 3, pbc=True), e, f"cs.xyz, frame {a}") for a, e in ((5.2, -0.8), (5.6, -0.7))]
    cells = with_isolated_atoms(cells, 5.0)
    with pytest.raises(DataError, match=r"keep the one that is to be E0, or raise the cutoff above 5.6 Å"):
        energies_of_isolated_atoms(cells)


def test_energies_of_isolated_atoms_leave_out_what_is_none():
    in_crystal = frame(Atoms("H", cell=[2, 2, 2], pbc=True), -3.0, "train.xyz, frame 3")
    assert energies_of_isolated_atoms([*FRAMES, in_crystal]) == {1: -1.5, 8: -2.5}
    assert energies_of_isolated_atoms(FRAMES[:1]) == {}


def of_formula(symbols: str, energy: float) -> Frame:
    return Frame(Atoms(symbols, np.eye(len(Atoms(symbols)), 3) * 3.0), energy, None, None, "f", (None, None, None))


def test_a_rare_element_with_a_huge_energy_is_found():
    """A ridge that is small beside all frames is not small beside ten: E0(Br) was 17 eV off."""
    rng = np.random.default_rng(0)
    values = {"H": -13.6, "C": -1035.0, "O": -2043.0, "Br": -70045.0}
    formulas = [f"C{rng.integers(1, 6)}H{rng.integers(1, 9)}O{rng.integers(1, 3)}" for _ in range(500)]
    formulas += [f"{f}Br" for f in formulas[:5]]
    frames = [of_formula(f, sum(values[s] for s in Atoms(f).symbols)) for f in formulas]
    found = reference_energies(frames, [1, 6, 8, 35])
    assert found.rank == 4 and found.residual < 1e-6
    assert np.allclose(list(found.values.values()), list(values.values()), atol=1e-4)


def test_a_scale_of_energies_is_none_of_rounding():
    frames = [of_formula("ArNe", -2.0), of_formula("Ar2", -3.0)]
    E0 = reference_energies(frames, [10, 18]).values
    assert energy_scale(frames, E0) == 1.0
    frames += [of_formula("Ar2", -3.4)]
    assert 0.05 < energy_scale(frames, reference_energies(frames, [10, 18]).values) < 0.2
