"""Labels under every usual name, in the unit that the file states, and never one of two chosen in silence."""

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.units import Bohr, GPa, Hartree, Rydberg, kcal, kJ, mol
from helpers.frames import emt_atoms
from helpers.systems import copper

from segnn_ase.base.errors import DataError
from segnn_ase.base.label_names import means_virial, usual_name
from segnn_ase.data.frames import (
    check_labels,
    frame_from_atoms,
    is_isolated_atom,
    label_table,
    read_frames,
    with_isolated_atoms,
)
from segnn_ase.data.labels import LabelKeys
from segnn_ase.data.references import reference_energies
from segnn_ase.data.units import parse_unit


def crystal() -> Atoms:
    return emt_atoms(1, copper)[0]


def stored(results: dict, atoms: Atoms | None = None, **names) -> Atoms:
    """A bare structure with values of `results`, or those given, under other names: names = {new: old or value}."""
    out = (atoms or crystal()).copy()
    for new, old in names.items():
        value = results[old] if isinstance(old, str) and old in results else old
        store = (
            out.arrays if isinstance(value, np.ndarray) and value.shape == (len(out), 3) and len(out) != 3 else out.info
        )
        store[new] = value
    return out


def full_stress(atoms: Atoms) -> np.ndarray:
    return frame_from_atoms(atoms).stress


PREFIXED = [f"{prefix}_{{}}" for prefix in ("REF", "ref", "Ref", "dft", "DFT", "target", "TARGET", "reference", "pbe")]
PREFIXED += ["{}", "DFT-{}", "vasp.{}", "label_{}"]


@pytest.mark.parametrize("form", PREFIXED)
@pytest.mark.parametrize("case", [str, str.upper, str.capitalize])
def test_labels_under_every_usual_name(tmp_path, form, case):
    atoms = crystal()
    results, true = atoms.calc.results, frame_from_atoms(atoms)
    for energy in ("energy", "energies", "total_energy", "E"):
        for forces in ("forces", "force", "F"):
            bare = stored(results, **{form.format(case(energy)): "energy", form.format(case(forces)): "forces"})
            frame = frame_from_atoms(bare)
            assert frame.energy == true.energy and np.array_equal(frame.forces, true.forces), bare.info
            assert not frame.reading.rivals and not frame.reading.unread
    ase.io.write(tmp_path / "a.xyz", bare)
    assert np.allclose(read_frames(tmp_path / "a.xyz")[0].forces, true.forces, atol=1e-7)


@pytest.mark.parametrize("form", PREFIXED)
@pytest.mark.parametrize("name", ["stress", "stresses", "Stress", "virial", "virials", "VIRIALS", "Virial"])
def test_virial_and_stress_are_told_apart_by_name(tmp_path, form, name):
    atoms = crystal()
    stress = full_stress(atoms)
    value = -atoms.get_volume() * stress if "vir" in name.lower() else stress
    bare = stored({}, **{form.format(name): value, "energy": -1.0})
    assert np.allclose(frame_from_atoms(bare).stress, stress, atol=1e-12)
    ase.io.write(tmp_path / "a.xyz", bare)
    assert np.allclose(read_frames(tmp_path / "a.xyz")[0].stress, stress, atol=1e-9)


@pytest.mark.parametrize("name", ["REF_virials", "my_virial", "theVirial", "virial"])
@pytest.mark.parametrize("key", ["stress", "virial"])
def test_a_virial_behind_either_key(name, key):
    atoms = crystal()
    stress = full_stress(atoms)
    bare = stored({}, **{name: -atoms.get_volume() * stress})
    assert np.allclose(frame_from_atoms(bare, LabelKeys(**{key: name})).stress, stress, atol=1e-12)


def test_a_key_of_virials_that_does_not_say_so_and_a_stress_that_says_virial():
    atoms = crystal()
    stress = full_stress(atoms)
    bare = stored({}, W=-atoms.get_volume() * stress, virial_stress=stress)
    assert np.allclose(frame_from_atoms(bare, LabelKeys(virial="W")).stress, stress, atol=1e-12)
    assert np.allclose(frame_from_atoms(bare, LabelKeys(stress="virial_stress")).stress, stress, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    ["mace_energy", "MACE_forces", "kinetic_energy", "energy_cutoff", "force_field", "E_total", "pred_energy", "e_f"],
)
def test_names_that_are_no_labels_of_a_calculation(name):
    assert usual_name(name) is None


@pytest.mark.parametrize(
    ("name", "is_virial"), [("virial", True), ("virial_stress", False), ("W", False), ("stress", False)]
)
def test_what_means_virial(name, is_virial):
    assert means_virial(name) == is_virial


def test_plurals_are_of_atoms_where_they_have_a_value_for_each():
    atoms = crystal()
    atoms.arrays["energies"], atoms.arrays["stresses"] = np.ones(4), np.ones((4, 6))
    atoms.info["energies"], atoms.info["virials"] = np.ones(4), np.ones((4, 3, 3))
    frame = frame_from_atoms(atoms)
    assert frame.energy == atoms.calc.results["energy"] and not frame.reading.rivals
    assert np.array_equal(frame.stress, full_stress(crystal()))


def test_one_letter_is_a_label_where_its_value_is():
    atoms = stored({}, E=np.array([0.0, 0.0, 0.1]), F=3)
    atoms.info["forces"] = np.ones((4, 3))
    frame = frame_from_atoms(atoms)
    assert frame.energy is None and np.array_equal(frame.forces, np.ones((4, 3)))


def test_a_switch_is_no_energy():
    with pytest.raises(DataError, match=r"energy of frame .from energy. is True; expected numbers"):
        frame_from_atoms(stored({}, energy=True))


# two sources


def test_two_sources_that_differ_are_told():
    atoms = crystal()
    atoms.info["REF_energy"], atoms.arrays["REF_forces"] = -3.0, np.ones((4, 3))
    atoms.info["dft_virial"] = 0.1 * np.eye(3)
    frame = frame_from_atoms(atoms)
    assert frame.energy == -3.0 and frame.origins == ("REF_energy", "REF_forces", "dft_virial")
    table = label_table([frame, frame])
    away = 250 * abs(atoms.calc.results["energy"] + 3)
    assert (
        f"energy: REF_energy is taken; 2 of 2 frames have calculator energy, too, up to {away:.3g} meV/atom away"
        in table
    )
    assert "forces: REF_forces is taken" in table and "stress: dft_virial is taken" in table


def test_two_sources_that_agree_are_not_told():
    atoms = crystal()
    results = atoms.calc.results
    atoms.info["REF_energy"], atoms.arrays["ref_forces"] = results["energy"] + 1e-9, results["forces"]
    frame = frame_from_atoms(atoms)
    assert not frame.reading.rivals and len(label_table([frame]).splitlines()) == 5


def test_a_second_source_that_cannot_be_read_is_told():
    atoms = crystal()
    atoms.info["REF_energy"] = "low"
    atoms.info["DFT_energy"] = -3.0
    with pytest.raises(DataError, match="'low'; expected numbers"):
        frame_from_atoms(atoms)
    atoms.info = {"REF_energy": -3.0, "dft_energy": "low"}
    assert "have dft_energy, too, which cannot be read" in label_table([frame_from_atoms(atoms)])


@pytest.mark.parametrize("prefix", ["", "REF_"])
@pytest.mark.parametrize("in_info", [True, False])
def test_forces_are_the_derivative_of_the_free_energy(prefix, in_info):
    atoms = crystal()
    results = atoms.calc.results
    energy = results["energy"]
    if in_info:
        atoms = stored(results, **{f"{prefix}energy": energy + 0.02, f"{prefix}free_energy": energy})
        atoms.arrays[f"{prefix}forces"] = results["forces"]
    elif prefix:
        return
    else:
        results["energy"], results["free_energy"] = energy + 0.02, energy
    frame = frame_from_atoms(atoms)
    assert frame.energy == energy and "free_energy" in frame.origins[0]
    text = label_table([frame, frame_from_atoms(crystal())])
    assert (
        "1 of 2 frames have" in text and "up to 5 meV/atom away (spread 0 meV/atom); forces are the derivative" in text
    )


def test_a_free_energy_without_forces_is_one_of_several():
    """Of molecules it may be that at 298 K."""
    atoms = stored({}, molecule("H2O"), energy=-14.0, free_energy=-13.8)
    frame = frame_from_atoms(atoms)
    assert frame.energy == -14.0 and [r.name for r in frame.reading.rivals] == ["free_energy"]


def test_a_free_energy_of_the_same_value_is_the_energy():
    atoms = crystal()
    atoms.calc.results["free_energy"] = atoms.calc.results["energy"]
    frame = frame_from_atoms(atoms)
    assert frame.origins[0] == "calculator energy" and not frame.reading.rivals


def test_nothing_found_names_what_looks_like_a_label():
    with pytest.raises(DataError, match=r"name yours .*'E_total'.* look like labels"):
        check_labels([frame_from_atoms(stored({}, E_total=-3.0))])


# units


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("eV", 1), ("kcal/mol", kcal / mol), ("kJ mol^-1", kJ / mol), ("Hartree", Hartree), ("Ha", Hartree),
        ("Ry", Rydberg),
        ("meV", 1e-3), ("kcal/mol/Ang", kcal / mol), ("kJ/(mol*nm)", kJ / mol / 10), ("Ha/bohr", Hartree / Bohr),
        ("eV/Å", 1), ("eV/Angstrom^3", 1), ("eV/A3", 1), ("GPa", GPa), ("kbar", 0.1 * GPa), ("eV per Ang", 1),
        ("kcal mol^-1 Å^-1", kcal / mol), ("Hartree/Bohr**3", Hartree / Bohr**3), ("nm", 10), ("Bohr", Bohr),
    ],
)  # fmt: skip
def test_units(text, value):
    assert parse_unit(text).value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "MeV/walrus", "MeV", "eV/atom", "walrus", "eV//", "3 eV", "1e3"])
def test_no_units(text):
    found = parse_unit(text)
    assert found is None or (found.energy, found.length) == (0, 0)


@pytest.mark.parametrize("unit", ["kcal/mol", "Hartree", "kJ/mol"])
@pytest.mark.parametrize("prefix", ["", "REF_"])
def test_units_that_a_structure_states(tmp_path, unit, prefix):
    atoms, factor = crystal(), parse_unit(unit).value
    true = frame_from_atoms(atoms)
    bare = stored({}, **{f"{prefix}energy": true.energy / factor, f"{prefix}forces": true.forces / factor})
    bare.info |= {f"{prefix}virial": -atoms.get_volume() * true.stress / factor}
    bare.info |= {f"{prefix}energy_unit": unit, "Forces_units": f"{unit}/Ang", f"{prefix}virial_unit": unit}
    ase.io.write(tmp_path / "a.xyz", bare)
    (frame,) = read_frames(tmp_path / "a.xyz")
    assert frame.energy == pytest.approx(true.energy) and np.allclose(frame.forces, true.forces, atol=1e-7)
    assert np.allclose(frame.stress, true.stress)
    assert f"energy: in {unit} as 1 frames say, converted" in label_table([frame])


def schnetpack(path, images: list[Atoms], energy: str, forces: str, distance: str, names=("energy", "forces")) -> None:
    """A database as SchNetPack writes it, in these units."""
    with ase.db.connect(path) as database:
        database.metadata = {
            "_distance_unit": distance,
            "_property_unit_dict": {names[0]: energy, names[1]: forces},
        }
        scale = parse_unit(distance).value
        for atoms in images:
            bare = Atoms(atoms.numbers, atoms.positions / scale, cell=atoms.cell / scale, pbc=atoms.pbc)
            results = atoms.calc.results
            labels = [
                np.array([results["energy"]]) / parse_unit(energy).value,
                results["forces"] / parse_unit(forces).value,
            ]
            database.write(bare, data=dict(zip(names, labels, strict=True)))


@pytest.mark.parametrize(
    ("energy", "forces", "distance"),
    [
        ("kcal/mol", "kcal/mol/Ang", "Ang"),
        ("Hartree", "Hartree/Bohr", "Bohr"),
        ("eV", "eV/Ang", "Ang"),
        ("kJ/mol", "kJ/mol/nm", "nm"),
        ("Ha", "Ha/Ang", "Angstrom"),
    ],
)
@pytest.mark.parametrize("names", [("energy", "forces"), ("my_energy", "my_forces"), ("E", "F")])
def test_units_of_a_database_of_schnetpack(tmp_path, energy, forces, distance, names):
    images = emt_atoms(3, copper)
    schnetpack(tmp_path / "a.db", images, energy, forces, distance, names)
    keys = LabelKeys(energy=names[0], forces=names[1]) if "my" in names[0] else None
    for frame, atoms in zip(read_frames(tmp_path / "a.db", keys), images, strict=True):
        assert frame.energy == pytest.approx(atoms.calc.results["energy"])
        assert np.allclose(frame.forces, atoms.calc.results["forces"])
        assert np.allclose(frame.atoms.positions, atoms.positions) and np.allclose(frame.atoms.cell, atoms.cell)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"energy_unit": "walrus"}, "energy is in 'walrus', which is no known unit of it"),
        ({"energy_unit": "kcal/mol/Ang", "forces_unit": "eV/Ang"}, "energy is in 'kcal/mol/Ang'"),
        ({"energy_unit": "eV", "forces_unit": "GPa"}, "forces is in 'GPa', .* convert it to eV/Å"),
        ({"energy_unit": "kcal/mol"}, "energy is in 'kcal/mol', but nothing of its forces: state forces_unit"),
        ({"forces_unit": "Ha/Bohr"}, "forces is in 'Ha/Bohr', but nothing of its energy"),
        ({"units": "real"}, "its units are 'real': convert"),
        ({"energy_unit": "eV/atom", "forces_unit": "eV/Å"}, "energy is in 'eV/atom'"),
    ],
)
def test_units_that_are_not_known_are_refused_by_name(info, message):
    atoms = stored({}, energy=-1.0, forces=np.ones((4, 3)))
    atoms.info |= info
    with pytest.raises(DataError, match=f"frame says that its {message}|frame says that {message}"):
        frame_from_atoms(atoms)


def test_positions_in_another_unit(tmp_path):
    atoms = crystal().copy()
    bohr = Atoms(atoms.numbers, atoms.positions / Bohr, cell=atoms.cell / Bohr, pbc=True, info={"length_unit": "Bohr"})
    bohr.info["energy"] = -1.0
    ase.io.write(tmp_path / "a.xyz", bohr)
    (frame,) = read_frames(tmp_path / "a.xyz")
    assert np.allclose(frame.atoms.positions, atoms.positions, atol=1e-7) and np.allclose(frame.atoms.cell, atoms.cell)
    bohr.info["length_unit"] = "eV"
    ase.io.write(tmp_path / "a.xyz", bohr)
    with pytest.raises(DataError, match="length is in 'eV'"):
        read_frames(tmp_path / "a.xyz")


# isolated atoms


def lone(box: float | None, **info) -> Atoms:
    atoms = Atoms("Cu", info=info) if box is None else Atoms("Cu", cell=[box] * 3, pbc=True, info=info)
    atoms.calc = SinglePointCalculator(atoms, energy=3.51, forces=np.zeros((1, 3)))
    return atoms


@pytest.mark.parametrize("key", ["config_type", "Config_Type"])
@pytest.mark.parametrize(
    "name", ["IsolatedAtom", "isolated_atom", "isolated atom", "ISOLATED", "single-atom", "isolated_atoms"]
)
@pytest.mark.parametrize("box", [None, 4.0, 8.0, 12.0])
def test_isolated_atoms_by_name(tmp_path, key, name, box):
    ase.io.write(tmp_path / "a.xyz", [*emt_atoms(3, copper), lone(box, **{key: name})])
    assert reference_energies(read_frames(tmp_path / "a.xyz"), [29]).values == {29: 3.51}


@pytest.mark.parametrize("box", [None, 6.5, 8.0, 12.0])
def test_isolated_atoms_by_their_box(box):
    assert is_isolated_atom(frame_from_atoms(lone(box)))


def test_isolated_atoms_by_the_cutoff():
    frame = frame_from_atoms(lone(5.0))
    assert not is_isolated_atom(frame)
    assert not is_isolated_atom(with_isolated_atoms([frame], 5.5)[0])
    assert is_isolated_atom(with_isolated_atoms([frame], 4.5)[0])


def test_a_skewed_box_is_as_long_as_its_shortest_vector():
    atoms = lone(12.0)
    atoms.set_cell([[12, 0, 0], [11, 4, 0], [0, 0, 12]])
    assert not is_isolated_atom(frame_from_atoms(atoms))
    atoms.pbc = (False, False, True)
    assert is_isolated_atom(frame_from_atoms(atoms))


@pytest.mark.parametrize("element", ["Cs", "Cu", "Xe", "Na"])
def test_crystals_of_one_atom_are_not_isolated(element):
    structure = "bcc" if element in ("Cs", "Na") else "fcc"
    assert not is_isolated_atom(frame_from_atoms(bulk(element, structure, a={"Xe": 6.2}.get(element))))


def test_two_atoms_are_not_isolated_whatever_they_are_called():
    atoms = emt_atoms(1, lambda: molecule("H2"))[0]
    atoms.info["config_type"] = "IsolatedAtom"
    assert not is_isolated_atom(frame_from_atoms(atoms))


# cells


@pytest.mark.parametrize("pbc", [True, (True, False, False), (False, False, True)])
def test_periodic_without_a_cell_is_refused(pbc):
    atoms = Atoms("CuCu", [[0, 0, 0], [0, 0, 2.5]], pbc=pbc, info={"energy": -1.0})
    with pytest.raises(DataError, match=r"frame: cell is .* span no volume, but pbc is .*write Lattice="):
        frame_from_atoms(atoms)
