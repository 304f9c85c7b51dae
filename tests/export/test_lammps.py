"""The pair style in LAMMPS: what the ASE calculator gives, on any number of ranks, and nothing wrong without a word."""

import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from helpers import lammps
from helpers.command_line import assert_one_line_error, segnn
from helpers.potentials import TINY, build_potential
from helpers.systems import NAMED, rattled_copper

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import AccelerationError, ConfigError
from segnn_ase.export.lammps import Headers, compile_plugin, find_headers, input_lines
from segnn_ase.export.library import export
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.structure.cues import told
from segnn_ase.structure.graph import graph_from_atoms

ELEMENTS = ["H", "C", "O", "Cu"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The default network with few channels, in float64, with a plugin."""
    potential = build_potential("segnn")
    folder = tmp_path_factory.mktemp("plugin") / "model"
    return SimpleNamespace(potential=potential, folder=folder, files=export(potential, folder, lammps=find_headers()))


@pytest.fixture
def work(small, tmp_path):
    (tmp_path / "model").symlink_to(small.folder)
    return tmp_path


def assert_same(found: lammps.Found, potential, atoms: Atoms, *, digits: float = 1e-10) -> None:
    calculator = SEGNNCalculator(potential, domain="ignore")
    right = calculator.get_property("energy", atoms)
    assert found.energy == pytest.approx(right, abs=digits)
    np.testing.assert_allclose(found.energies, calculator.results["energies"], rtol=0, atol=digits)
    np.testing.assert_allclose(found.forces, calculator.get_property("forces", atoms), rtol=0, atol=10 * digits)
    if atoms.pbc.all():
        stress = calculator.get_property("stress", atoms)
        largest = max(float(np.abs(stress).max()), 1e-3)
        np.testing.assert_allclose(found.stress, stress, rtol=0, atol=100 * digits * largest)
        np.testing.assert_allclose(found.stresses.sum(0) / atoms.cell.volume, found.stress, atol=1e-8 * largest)


def in_lammps(name: str) -> Atoms | None:
    try:
        return lammps.as_lammps_has_it(NAMED[name]())
    except ValueError:
        return None


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("ranks, threads", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", [name for name in NAMED if in_lammps(name) is not None])
def test_it_gives_what_the_calculator_gives(small, work, name, ranks, threads):
    """Also where a rank has no atom, and where atoms lie on the border."""
    atoms = in_lammps(name)
    assert_same(lammps.evaluate(work, atoms, ELEMENTS, ranks=ranks, threads=threads), small.potential, atoms)


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_in_single_precision_it_gives_the_same_but_for_rounding(tmp_path_factory, tmp_path, small, ranks):
    """Energies of atoms and forces of all systems, whatever rounding does to each."""
    folder = tmp_path_factory.mktemp("single") / "model"
    export(deepcopy(small.potential).float(), folder, lammps=find_headers())
    (tmp_path / "model").symlink_to(folder)
    for name in (name for name in NAMED if in_lammps(name) is not None):
        atoms = in_lammps(name)
        found = lammps.evaluate(tmp_path, atoms, ELEMENTS, ranks=ranks)
        calculator = SEGNNCalculator(small.potential, domain="ignore")
        for kind, values in (("energies", found.energies), ("forces", found.forces)):
            right = calculator.get_property(kind, atoms)
            size = max(1.0, float(np.abs(right).max()))
            np.testing.assert_allclose(values, right, rtol=0, atol=1e-5 * size, err_msg=name)


@pytest.mark.engines
@pytest.mark.slow
def test_what_was_cut_and_changed_between_steps_is_known(small, work):
    """Types that change, atoms that go and come, several runs: each is as if it began there."""
    atoms = lammps.as_lammps_has_it(rattled_copper() * (2, 2, 2))
    lines = [*lammps.setup(work, atoms, ELEMENTS), *lammps.MEASURED, "fix 1 all nve", "velocity all create 300 1"]
    lines += ["run 5", "set atom 3 type 1", "run 3", "group gone id 7 9", "delete_atoms group gone compress no"]
    lines += ["create_atoms 2 single 3.1 3.2 3.3", "run 3", "write_data end.data", "undump d", *lammps.MEASURED[-2:]]
    lammps.run(work, [*lines, "run 0"], ranks=2)
    end, forces = read_data(work / "end.data"), np.loadtxt(work / "found.txt", skiprows=9)
    calculator = SEGNNCalculator(small.potential, domain="ignore")
    right = calculator.get_property("forces", end)
    np.testing.assert_allclose(forces[:, 1:4], right, rtol=0, atol=1e-6)  # of positions in a file
    assert len(end) == len(atoms) - 1 and set(end.symbols) == {"H", "C", "Cu"}


@pytest.mark.engines
@pytest.mark.slow
def test_pairs_that_are_another_styles_are_missed(work):
    atoms = lammps.as_lammps_has_it(rattled_copper())
    lines = lammps.setup(work, atoms, ["Cu", "O"])[:-2]
    lines += ["pair_style hybrid segnn lj/cut 5.0", "pair_coeff * * segnn model/model.segnn Cu O"]
    lines += ["pair_coeff 2 2 lj/cut 0.01 2.0", "run 0"]
    assert "types 2 and 2 are another style's" in lammps.run(work, lines, ranks=2, fails=True)


def read_data(path) -> Atoms:
    from ase.io.lammpsdata import read_lammps_data

    kinds = {k + 1: Atoms(x).numbers[0] for k, x in enumerate(ELEMENTS)}
    return read_lammps_data(path, Z_of_type=kinds, atom_style="atomic", sort_by_id=True)


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_beside_other_pair_styles(small, work, ranks):
    """With hybrid its atoms are those that have an element, and other styles are added."""
    copper = rattled_copper() * (2, 2, 1)
    atoms = lammps.as_lammps_has_it(copper + Atoms("O2", [[1.1, 0.9, 1.0], [3.0, 5.1, 2.7]]))
    lines = lammps.setup(work, atoms, ["Cu", "O"])[:-2]
    lines += [
        "neigh_modify exclude type 2 2",
        "pair_style hybrid/overlay segnn check no lj/cut 5.0",
        "pair_coeff * * segnn model/model.segnn Cu NULL",
        "pair_coeff * * lj/cut 0.0 1.0",
        "pair_coeff 1 2 lj/cut 0.01 2.0",
    ]
    lammps.run(work, [*lines, *lammps.MEASURED, "run 0"], ranks=ranks)
    found = np.loadtxt(work / "found.txt", skiprows=9)[:, 1:4]
    alone = atoms[atoms.symbols == "Cu"]
    expected = np.zeros((len(atoms), 3))
    expected[: len(alone)] = SEGNNCalculator(small.potential, domain="ignore").get_property("forces", alone)
    lines[-4:] = ["pair_style lj/cut 5.0", "pair_coeff * * 0.0 1.0", "pair_coeff 1 2 0.01 2.0"]
    lammps.run(work, [*lines, *lammps.MEASURED, "run 0"])
    expected += np.loadtxt(work / "found.txt", skiprows=9)[:, 1:4]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.engines
@pytest.mark.slow
def test_energy_is_conserved_and_a_restart_goes_on(small, work):
    atoms = lammps.as_lammps_has_it(rattled_copper() * (2, 2, 2))
    begin = lammps.setup(work, atoms, ELEMENTS)
    go = ["fix 1 all nve", "timestep 0.0001", "thermo_style custom step etotal", "thermo 20"]
    go += ["thermo_modify format float %.15g"]
    half = ["velocity all create 300 1 loop geom", "run 20", "write_restart half.restart", "run 40"]
    whole = table(lammps.run(work, [*begin, *go, *half], ranks=2))
    again = table(lammps.run(work, ["read_restart half.restart", *begin[-3:], *go, "run 40"], ranks=2))
    assert np.ptp(whole[:, 1]) / len(atoms) < 1e-4
    np.testing.assert_allclose(again[-1], whole[-1], rtol=0, atol=1e-7)


def table(output: str) -> np.ndarray:
    rows = [row.split() for row in output.splitlines()]
    return np.array([[float(x) for x in row] for row in rows if len(row) == 2 and row[0].isdigit() and "." in row[1]])


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize(("bonded", "refused"), [("3 4", False), ("1 2", True)])
def test_bonds_take_no_pairs_of_its_atoms_away(work, bonded, refused):
    """With special_bonds 0 0 0, LAMMPS' default; those of other pair styles' atoms may."""
    lines = lammps.setup(work, lammps.as_lammps_has_it(rattled_copper()), ["Cu", "O"])
    box = ["region box block 0 12 0 12 0 12", "create_box 2 box bond/types 1 extra/bond/per/atom 1"]
    box[-1] += " extra/special/per/atom 1"
    places = [(1, 1, 1, 1), (1, 1, 1, 3.5), (2, 6, 6, 6), (2, 6, 6, 7.2)]
    box += [f"create_atoms {kind} single {x} {y} {z}" for kind, x, y, z in places]
    own = {"read_data data.lammps": box, "atom_style atomic": ["atom_style bond"]}
    lines = [new for line in lines[:-2] for new in own.get(line, [line])]
    lines += ["bond_style zero", "bond_coeff 1 1.2"]
    lines += [f"create_bonds single/bond 1 {bonded}", "pair_style hybrid/overlay segnn check no lj/cut 5.0"]
    lines += ["pair_coeff * * segnn model/model.segnn Cu NULL", "pair_coeff * * lj/cut 0.01 1.0", "run 0"]
    found = lammps.run(work, lines, ranks=2, fails=refused)
    assert ("the pairs of its atoms' bonds, too; expected special_bonds lj/coul 1 1 1" in found) is refused


@pytest.mark.engines
@pytest.mark.slow
def test_bonds_that_come_during_a_run_are_noticed(work):
    """Molecules that are deposited bring theirs, whose pairs the next list lacks."""
    (work / "pair.txt").write_text(
        "# two atoms\n\n2 atoms\n1 bonds\n\nCoords\n\n1 0 0 0\n2 2.5 0 0\n\nTypes\n\n1 1\n2 1\n\nBonds\n\n1 1 1 2\n"
    )
    lines = lammps.setup(work, lammps.as_lammps_has_it(rattled_copper()), ["Cu"])
    box = ["region box block 0 15 0 15 0 15", "create_box 1 box bond/types 1 extra/bond/per/atom 1"]
    box[-1] += " extra/special/per/atom 2"
    box += ["create_atoms 1 single 1 1 1", "molecule pair pair.txt"]
    own = {"read_data data.lammps": box, "atom_style atomic": ["atom_style bond"]}
    lines = [new for line in lines for new in own.get(line, [line])]
    lines += ["bond_style zero", "bond_coeff 1 2.5", "region top block 6 9 6 9 6 9", "fix 1 all nve"]
    lines += ["fix 2 all deposit 1 0 2 1234 region top near 1.0 mol pair"]
    assert "the pairs of its atoms' bonds, too" in lammps.run(work, [*lines, "run 10"], fails=True)
    lines.insert(-6, "special_bonds lj/coul 1 1 1")
    lammps.run(work, [*lines, "run 10"])


@pytest.mark.engines
@pytest.mark.slow
def test_a_second_model_by_the_same_relative_name_is_another(small, work, tmp_path_factory):
    """After `shell cd`, in one process."""
    other = tmp_path_factory.mktemp("other")
    export(build_potential("tfn"), other)
    lines = lammps.setup(work, lammps.as_lammps_has_it(rattled_copper()), ELEMENTS)
    both = []
    for folder in (small.folder, other):
        here = {"data.lammps": str(work / "data.lammps"), "model/pair": f"{small.folder}/pair", "model/model": "model"}
        for line in [f"shell cd {folder}", *lines, "run 0", "clear"]:
            for old, new in here.items():
                line = line.replace(f" {old}", f" {new}")
            both.append(line)
    lammps.run(work, both)


@pytest.mark.engines
@pytest.mark.slow
def test_cues_are_charges_moments_and_settings(tmp_path):
    cues = ["initial_charges", "charge"]
    potential = Potential(model_config(**{**TINY, "cues": cues}), [1, 6, 8, 29]).double()
    atoms = lammps.as_lammps_has_it(rattled_copper())
    atoms.set_initial_charges(np.linspace(-0.5, 0.5, len(atoms)))
    atoms.info["charge"] = 2
    potential.calibrate(told(graph_from_atoms(atoms, potential.cutoff), atoms, potential.config.cues))
    export(potential.eval(), tmp_path / "model", lammps=find_headers())
    found = lammps.evaluate(tmp_path, atoms, ELEMENTS, ranks=2, style="charge", pair="charge 2")
    assert_same(found, potential, atoms)
    for words, wrong in (
        ("", "told the charge of the whole; expected pair_style segnn charge"),
        ("charge 0.5", "is 0.5"),
    ):
        lines = lammps.setup(tmp_path, atoms, ELEMENTS, style="charge", pair=words)
        assert wrong in lammps.run(tmp_path, [*lines, "run 0"], ranks=2, fails=True)
    lines = lammps.setup(tmp_path, atoms, ELEMENTS)
    assert "told charges; expected an atom_style that has them" in lammps.run(tmp_path, [*lines, "run 0"], fails=True)


@pytest.mark.engines
@pytest.mark.slow
def test_moments_are_those_of_spins(tmp_path):
    cues = ["spin", {"name": "initial_magmoms", "spin_orbit": True, "scale": 2.0}]
    config = model_config(**{**TINY, "hidden_irreps": "4x0e+4x1o+4x1e", "cues": cues})
    potential, atoms = Potential(config, [29]).double(), rattled_copper()
    moments = np.random.default_rng(0).normal(size=(len(atoms), 3))
    atoms.set_initial_magnetic_moments(moments)
    atoms.info["spin"] = 3
    potential.calibrate(told(graph_from_atoms(atoms, potential.cutoff), atoms, potential.config.cues))
    export(potential.eval(), tmp_path / "model", lammps=find_headers())
    lines = lammps.setup(tmp_path, atoms, ["Cu"], pair="spin 3")
    box = [f"region box block 0 {atoms.cell[0, 0]} 0 {atoms.cell[1, 1]} 0 {atoms.cell[2, 2]}", "create_box 1 box"]
    for k, (place, moment) in enumerate(zip(atoms.positions, moments, strict=True)):
        box.append("create_atoms 1 single {:.17g} {:.17g} {:.17g}".format(*place % atoms.cell.lengths()))
        size = np.linalg.norm(moment)
        box.append("set atom {} spin/atom {:.17g} {:.17g} {:.17g} {:.17g}".format(k + 1, size, *moment / size))
    lines = [box if "read_data" in x else [x.replace("style atomic", "style spin")] for x in lines]
    lines = [x for group in lines for x in group]
    lammps.run(tmp_path, [*lines, *lammps.MEASURED, "run 0"], ranks=2)
    found = np.loadtxt(tmp_path / "found.txt", skiprows=9)[:, 1:4]
    calculator = SEGNNCalculator(potential, domain="ignore")
    np.testing.assert_allclose(found, calculator.get_property("forces", atoms), rtol=0, atol=1e-9)


@pytest.mark.engines
@pytest.mark.slow
def test_what_has_no_meaning_is_refused(work):
    lines = lammps.setup(work, lammps.as_lammps_has_it(rattled_copper()), ELEMENTS)
    asked = ["compute c all centroid/stress/atom NULL virial", "compute r all reduce sum c_c[1]"]
    asked.append("thermo_style custom step c_r")
    assert "does not support compute centroid/stress/atom" in lammps.run(work, [*lines, *asked, "run 0"], fails=True)


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize(
    "change, told_then",
    [
        (("units metal", "units real"), "units are real, expected metal"),
        (("atom_style atomic", "atom_style atomic\nnewton off"), "expected newton on"),
        (("H C O Cu", "H C O Xx"), "does not know Xx"),
        (("H C O Cu", "H C O"), "expected * * model.segnn and an element for each of 4 types"),
        (("model/model.segnn", "nowhere/model.segnn"), "there is no library of the model nowhere/model.segnn"),
        (("model/model.segnn", "model/segnn.h"), "is no file of numbers of a potential"),
        (("pair_style segnn", "pair_style segnn check 0 warn"), "expected a number of steps, and warn or stop"),
        (("pair_style segnn", "pair_style segnn quickly"), "expected check N warn|stop, check no"),
        (("pair_style segnn", "pair_style segnn spin 0"), "segnn spin is 0; expected the multiplicity"),
        (("pair_style segnn", "pair_style segnn check 1 stop"), "has no domain of training data"),
        (
            ("pair_coeff *", "group some type 4\nneigh_modify exclude group some all\npair_coeff *"),
            "exclude or include",
        ),
        (("pair_coeff *", "neigh_modify exclude type 1 1\npair_coeff *"), "expected no neigh_modify exclude"),
        (
            ("pair_coeff *", "group some type 4\natom_modify first some\nneigh_modify include some\npair_coeff *"),
            "exclude or include",
        ),
        (("pair_coeff *", "group some type 4\natom_modify first some\ncomm_modify group some\npair_coeff *"), "first"),
        (("pair_coeff *", "fix g all gcmc 10 100 0 4 29494 300 -1.0 0.5\npair_coeff *"), "fix gcmc leaves atoms"),
        (
            (
                "pair_coeff *",
                "compute ke all ke/atom\ncompute pe all pe/atom\ncompute s all stress/atom NULL virial\n"
                "compute j all heat/flux ke pe s\npair_coeff *",
            ),
            "compute heat/flux needs forces between pairs",
        ),
        (("pair_coeff * * model/model.segnn H C O Cu", ""), "All pair coeffs are not set"),
    ],
)
def test_what_is_wrong_ends_all_ranks_with_a_sentence(work, change, told_then):
    atoms = lammps.as_lammps_has_it(rattled_copper())
    text = "\n".join(lammps.setup(work, atoms, ELEMENTS))
    assert change[0] in text
    assert told_then in lammps.run(work, [text.replace(*change), "run 0"], ranks=2, fails=True)


@pytest.mark.engines
@pytest.mark.slow
def test_damaged_numbers_and_another_library_are_refused(small, work, tmp_path):
    (work / "model").unlink()
    shutil.copytree(small.folder, work / "model")
    atoms, numbers = lammps.as_lammps_has_it(rattled_copper()), work / "model" / "model.segnn"
    content = numbers.read_bytes()
    for wrong in (content[:-9], content[:200] + bytes([content[200] ^ 1]) + content[201:]):
        numbers.write_bytes(wrong)
        assert "is damaged" in lammps.run(work, [*lammps.setup(work, atoms, ELEMENTS), "run 0"], ranks=2, fails=True)
    numbers.write_bytes(content[:8] + bytes([content[8] ^ 1]) + content[9:])
    lines = [*lammps.setup(work, atoms, ELEMENTS), "run 0"]
    assert "belongs to another library" in lammps.run(work, lines, ranks=2, fails=True)
    shutil.copy(work / "model" / "pair_segnn.so", work / "model" / "libsegnn.so")
    assert "is of another version than this plugin" in lammps.run(work, lines, ranks=2, fails=True)


@pytest.mark.engines
@pytest.mark.slow
def test_what_is_new_is_told_or_stops_the_run(tmp_path):
    done = segnn("export", "silicon-pbe", "--out", str(tmp_path / "model"), "--lammps", "--dtype", "float64")
    assert done.exit_code == 0 and f"plugin load {tmp_path / 'model' / 'pair_segnn.so'}" in done.stdout
    atoms = lammps.as_lammps_has_it(bulk("Si", cubic=True) * 2)
    inside = lammps.evaluate(tmp_path, atoms, ["Si"], ranks=2)
    assert "training data do not cover" not in inside.output
    assert_same(inside, "silicon-pbe", atoms, digits=2e-5)
    atoms.positions[0] += 1.2
    assert "do not cover the surroundings" in lammps.evaluate(tmp_path, atoms, ["Si"], ranks=2).output
    lines = [*lammps.setup(tmp_path, atoms, ["Si"], pair="check 1 stop"), "run 5"]
    assert "at step 0 the training data do not cover" in lammps.run(tmp_path, lines, ranks=2, fails=True)
    lines = [*lammps.setup(tmp_path, atoms, ["Si"], pair="check 1000 stop"), "reset_timestep 7", "run 0"]
    assert "at step 7 the training data do not" in lammps.run(tmp_path, lines, ranks=2, fails=True)
    atoms.positions[0] -= 1.2
    lines = [*lammps.setup(tmp_path, atoms, ["Si"], pair="check 1 stop"), "run 0", "group one id 1"]
    lines += ["displace_atoms one move 1.2 1.2 1.2", "run 0"]  # the step is 0 again
    assert "do not cover" in lammps.run(tmp_path, lines, ranks=2, fails=True)
    lines = [*lammps.setup(tmp_path, atoms, ["Si"], pair="check no charge 1"), "run 5"]
    found = lammps.run(tmp_path, lines, ranks=2)
    assert "do not cover" not in found and "charge changes nothing" in found


def headers_in(folder):
    """Made up: what is looked for, and nothing else."""
    place = folder / "site-packages" / "lammps" / "include" / "lammps"
    place.mkdir(parents=True)
    (place / "pair.h").write_text("")
    return place


def test_headers_are_found_with_those_of_mpi(tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"pair\.h is not"):
        find_headers(tmp_path)
    place = headers_in(tmp_path)
    with pytest.raises(ConfigError, match=r"no mpi\.h belongs to"):
        find_headers(place)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "mpi.h").write_text("")
    told_there = tmp_path / "site-packages" / "lammps" / "pkgconfig" / "liblammps.pc"
    told_there.parent.mkdir()
    told_there.write_text("Name: liblammps\nVersion: 2025.7.22.4\n")
    expected = Headers(place, tmp_path / "include", ("c++",), 20250722)
    assert find_headers(place) == expected == find_headers(tmp_path / "site-packages" / "lammps")
    told_there.write_text("Version: 20240829\n")
    assert find_headers(place).version == 20240829
    (place / "version.h").write_text('#define LAMMPS_VERSION "2 Aug 2023"\n')
    assert find_headers(place).version == 20230802


def test_headers_that_are_none_end_with_a_sentence(tmp_path):
    done = segnn("export", "silicon-pbe", "--out", str(tmp_path / "model"), "--headers", str(tmp_path))
    assert_one_line_error(done, "expected a folder with LAMMPS' headers")
    assert not (tmp_path / "model").exists()


def test_what_the_compiler_says_is_told(tmp_path):
    (tmp_path / "pair_segnn.cpp").write_text("#error not today\n")
    with pytest.raises(AccelerationError, match="not today"):
        compile_plugin(tmp_path, Headers(tmp_path, None, ("c++",), 0))
    with pytest.raises(AccelerationError, match="no-such-compiler does not compile"):
        compile_plugin(tmp_path, Headers(tmp_path, None, ("no-such-compiler",), 0))


def test_lines_of_an_input():
    lines = input_lines(Path("/some/where"), "model.segnn", [8, 14])
    assert lines[-1] == "pair_coeff * * /some/where/model.segnn O Si"
    assert input_lines(Path("/my work"), "model.segnn", [8])[0] == "plugin load '/my work/pair_segnn.so'"
