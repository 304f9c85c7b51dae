"""A potential as a C library: the same numbers, all at once and parted among processes, and nothing wrong gets in."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from helpers.command_line import assert_one_line_error, segnn
from helpers.exported import Handle, parted, pointers, room_for
from helpers.potentials import TINY, build_potential, tiny_potential
from helpers.systems import NAMED, ethanol, rattled_copper

from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.export.evaluator import LibraryEvaluator, library_problem
from segnn_ase.export.library import LIBRARY, NUMBERS, compile_library, export
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import load_potential
from segnn_ase.structure.cues import told
from segnn_ase.structure.graph import graph_from_atoms
from segnn_ase.trust.domain import DomainCheck, neighbor_counts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The default network with few channels, in float64, and its library."""
    potential = build_potential("segnn")
    return SimpleNamespace(potential=potential, files=export(potential, tmp_path_factory.mktemp("library") / "segnn"))


@pytest.fixture(scope="module")
def silicon(tmp_path_factory):
    """The shipped potential, by the command."""
    folder = tmp_path_factory.mktemp("silicon") / "library"
    done = segnn("export", "silicon-pbe", "--out", str(folder))
    assert done.exit_code == 0 and "segnn.h tells how to call it" in done.stdout
    return SimpleNamespace(folder=folder, library=folder / LIBRARY, numbers=folder / NUMBERS)


def rattled_silicon(size: int = 2):
    atoms = bulk("Si", cubic=True) * (size, 1, 1)
    atoms.rattle(0.1, seed=1)
    return atoms


def exact(potential, atoms, **wanted):
    graph = told(graph_from_atoms(atoms, potential.cutoff), atoms, potential.config.cues)
    return PlainEvaluator(potential)(graph, stress=bool(atoms.cell.rank == 3), **wanted)


@pytest.mark.parametrize("name", NAMED)
def test_it_gives_what_plain_pytorch_gives(small, name):
    atoms, handle = NAMED[name](), Handle(small.files)
    right, found = exact(small.potential, atoms), handle.evaluate(atoms)
    assert found.energy == pytest.approx(right.energy.item(), abs=1e-10)
    np.testing.assert_allclose(found.energies, right.energies, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found.forces, right.forces, rtol=0, atol=1e-9)
    np.testing.assert_allclose(found.virials.sum(0), found.virial, rtol=0, atol=1e-11)
    if right.stress is not None and bool(right.stress.isfinite().all()):
        stress = -(found.virial + found.virial.T) / 2 / atoms.cell.volume
        np.testing.assert_allclose(stress, right.stress[0], rtol=1e-8, atol=1e-11)  # of tables
    handle.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_atoms_parted_among_processes_have_the_same_energies_forces_and_virials(small, threads):
    atoms = rattled_copper() * (3, 2, 2)
    handles, rng = [Handle(small.files) for _ in range(4)], np.random.default_rng(0)
    for handle in handles:
        handle.do("segnn_set_threads", threads)
    whole = handles[0].evaluate(atoms)
    for owners in (4, 3):  # the last one has no atoms
        found = parted(handles, atoms, rng.integers(0, owners, len(atoms)))
        assert found.energy == pytest.approx(whole.energy, abs=1e-10)
        for a, b in zip(found[1:], whole[1:], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


def test_what_atoms_are_told_goes_with_them(tmp_path):
    cues = ["initial_charges", "spin", {"name": "initial_magmoms", "spin_orbit": True, "scale": 2.0}]
    config = model_config(**{**TINY, "hidden_irreps": "4x0e+4x1o+4x1e", "cues": cues})
    potential, atoms, rng = Potential(config, [1, 6, 8]).double(), ethanol(), np.random.default_rng(0)
    charges, moments = rng.normal(size=len(atoms)), rng.normal(size=(len(atoms), 3))
    atoms.set_initial_charges(charges)
    atoms.set_initial_magnetic_moments(moments)
    atoms.info["spin"] = 3
    potential.calibrate(told(graph_from_atoms(atoms, potential.cutoff), atoms, potential.config.cues))
    files = export(potential.eval(), tmp_path / "cues")
    handles, right = [Handle(files) for _ in range(2)], exact(potential, atoms)
    names = [handles[0].c.segnn_cue(handles[0].s, k).decode() for k in range(5)]
    assert names == ["initial_charges", "spin", *(f"initial_magmoms_{axis}" for axis in "xyz")]
    values = np.column_stack([charges, np.full(len(atoms), 3.0), moments])
    found = parted(handles, atoms, np.arange(len(atoms)) % 2, values)
    assert found.energy == pytest.approx(right.energy.item(), abs=1e-10)
    np.testing.assert_allclose(found.forces, right.forces, rtol=0, atol=1e-9)
    assert abs(handles[0].evaluate(atoms).energy - found.energy) > 1e-3  # told nothing
    values[4, 1] = np.nan
    with pytest.raises(ValueError, match="cue of atom 4 is not finite"):
        parted(handles[:1], atoms, np.zeros(len(atoms), dtype=int), values)


def test_atoms_in_contact_are_kept_apart_in_the_same_way(small):
    handle, atoms = Handle(small.files), ethanol()
    radius = float(small.potential.core_radii.max())
    for distance in (0.99, 0.93, 0.8, 0.3):  # of the largest core radius
        atoms.positions[1] = atoms.positions[0] + [distance * radius, 0, 0]
        right, found = exact(small.potential, atoms), handle.evaluate(atoms)
        assert found.energy == pytest.approx(right.energy.item(), abs=1e-9)
        np.testing.assert_allclose(found.forces, right.forces, rtol=1e-11, atol=1e-9)


def test_what_is_outside_of_the_training_data_is_told_of_each_atom(silicon):
    handle, potential = Handle(silicon), load_potential("silicon-pbe")
    inside = bulk("Si", cubic=True) * 2
    atoms = inside.copy()
    atoms.positions[0] += [0.9, 0.3, 0.1]
    del atoms[40]
    for structure in (inside, atoms):
        forces = handle.evaluate(structure).forces
        count, flags = handle.outside(forces)
        graph = graph_from_atoms(structure, potential.cutoff)
        limits, p = DomainCheck(potential).limits(graph.numbers), PlainEvaluator(potential)(graph)
        neighbors = neighbor_counts(graph, potential.cutoff).numpy()
        crowded = (neighbors < limits.neighbors[0]) | (neighbors > limits.neighbors[1])
        new = potential.uncertainty.to(p.features).leverage(p.features).numpy() > limits.leverage
        pushed = (p.forces.abs() > limits.force).any(1).numpy()
        assert count == (flags != 0).sum()
        assert (flags & 2 != 0).tolist() == crowded.tolist()
        assert (flags & 4 != 0).tolist() == new.tolist()
        assert (flags & 8 != 0).tolist() == pushed.tolist()
    assert count > 0 and flags[0] & 1
    assert handle.evaluate(inside) and handle.outside(np.zeros((len(inside), 3)))[0] == 0


def test_what_it_is_given_wrongly_is_refused_with_the_reason(small):
    handle, atoms = Handle(small.files), ethanol()
    species, (first, senders, vectors) = handle.species(atoms), handle.pairs(atoms)
    wrong = {
        "species of atom 2 is 9; expected 0 to 3": (np.where(np.arange(9) == 2, 9, species).astype(np.intc),),
        "the sender of pair 3 is 77": (species, first, np.where(np.arange(len(senders)) == 3, 77, senders)),
        r"first\[0\] is 1": (species, first + 1),
        "first falls behind atom 0": (species, np.where(np.arange(10) == 1, -1, first)),
        "the vector of pair 0 is not finite": (species, first, senders, np.full_like(vectors, np.nan)),
    }
    for message, given in wrong.items():
        given = [*given, *(species, first, senders, vectors)[len(given) :]]
        with pytest.raises(ValueError, match=message):
            handle.do("segnn_evaluate", len(atoms), *pointers(given), *pointers(room_for(len(atoms))))
    with pytest.raises(ValueError, match="species or first is NULL"):
        handle.do("segnn_begin", 3, 3, None, None, None, None)
    with pytest.raises(ValueError, match="n is 4 of n_all 3 atoms"):
        handle.do("segnn_begin", 4, 3, *pointers([species, first, senders, vectors]))
    with pytest.raises(ValueError, match="stage 0 is run; expected segnn_begin"):
        handle.do("segnn_run", 0)
    with pytest.raises(ValueError, match="expected all stages before"):
        handle.do("segnn_finish", *pointers(room_for(9)))
    with pytest.raises(ValueError, match="threads is 0; expected 1 or more"):
        handle.do("segnn_set_threads", 0)
    assert handle.c.segnn_species(handle.s, b"Xx") == -1 and handle.c.segnn_symbol(handle.s, 9) is None
    assert handle.evaluate(atoms).energy == pytest.approx(exact(small.potential, atoms).energy.item(), abs=1e-10)
    apart = handle.evaluate(atoms[:1])
    assert apart.energy == small.potential.reference_energies[small.potential.species.index(atoms.numbers[0])]


def test_numbers_that_are_damaged_or_of_another_potential_are_refused(small, silicon, tmp_path):
    data, rng = small.files.numbers.read_bytes(), np.random.default_rng(0)
    tried = SimpleNamespace(library=small.files.library, numbers=tmp_path / "tried.segnn")
    for place in [*range(28), *rng.integers(28, len(data), 500)]:
        if 28 <= place < 32:  # fills the header up
            continue
        tried.numbers.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|no file of numbers|another library"):
            Handle(tried)
    for content in (b"", data[:20], data[:-1], data + b"0"):
        tried.numbers.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged|no file of numbers"):
            Handle(tried)
    with pytest.raises(ValueError, match="belongs to another library: export the potential again"):
        Handle(SimpleNamespace(library=small.files.library, numbers=silicon.numbers))
    with pytest.raises(ValueError, match="cannot be opened"):
        Handle(SimpleNamespace(library=small.files.library, numbers=tmp_path / "none"))
    with pytest.raises(ModelFileError, match="another library"):
        LibraryEvaluator(small.files.library, silicon.numbers, small.potential)


def test_a_library_that_is_wrong_is_noticed(small, tmp_path):
    assert library_problem(small.files.library, small.files.numbers, small.potential) is None
    other = build_potential("segnn")
    with torch.no_grad():
        next(other.segnn.messages[1].out.parameters())[0, 0] += 0.1
    assert "differ by" in library_problem(small.files.library, small.files.numbers, other)


def test_names_in_a_file_are_no_code(tmp_path):
    name = 'my "q"}; \\ int x\n'
    config = model_config(**{**TINY, "hidden_irreps": "4x0e", "cues": [{"name": name, "kind": "scalar"}]})
    potential, atoms = Potential(config, [1, 6, 8]).double(), ethanol()
    atoms.arrays[name] = np.arange(9.0)
    potential.calibrate(told(graph_from_atoms(atoms, potential.cutoff), atoms, potential.config.cues))
    handle = Handle(export(potential.eval(), tmp_path / "named"))
    assert handle.c.segnn_cue(handle.s, 0).decode() == name
    shutil.rmtree(tmp_path / "named")
    potential.calibrate(told(graph_from_atoms(atoms, potential.cutoff), atoms, potential.config.cues))
    with torch.no_grad():
        potential.segnn.norms *= 2.0
    export(potential, tmp_path / "named")  # what is held against PyTorch is not the first one


def test_errors_of_the_command_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent")
    assert_one_line_error(segnn("export", "silicon-pbe", "--out", tmp_path / "none"), "no library is made: CC is")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("CC", "false")
    assert_one_line_error(segnn("export", "silicon-pbe", "--out", tmp_path / "none"), "does not compile the library")


def test_atoms_at_one_place_are_refused(small):
    handle, atoms = Handle(small.files), ethanol()
    for distance in (0.0, 1e-9, 0.04):
        atoms.positions[1] = atoms.positions[0] + [distance, 0, 0]
        with pytest.raises(ValueError, match=r"has its atoms at one place|closer"):
            handle.evaluate(atoms)


def test_rows_are_exchanged_only_where_there_are_some(small):
    handle, atoms = Handle(small.files), ethanol()
    given, one, buffer = [handle.species(atoms), *handle.pairs(atoms)], np.array([9], dtype=np.intc), np.zeros(10**5)
    with pytest.raises(ValueError, match="expected it to be the last that ran"):
        handle.do("segnn_get", 0, 1, *pointers([one, buffer]))
    handle.do("segnn_begin", 9, 9, *pointers(given))
    handle.do("segnn_run", 0)
    with pytest.raises(ValueError, match="atom 9 is exchanged; expected 0 to 8"):
        handle.do("segnn_put", 0, 1, *pointers([one, buffer]))
    with pytest.raises(ValueError, match="stage is 99"):
        handle.do("segnn_get", 99, 1, *pointers([one, buffer]))


def test_what_a_library_does_not_carry_is_refused_by_name(tmp_path, small):
    for settings, named in (
        ({"electrostatics": "latent"}, "electrostatics = 'latent'"),
        ({"cues": ["external_field"], "hidden_irreps": "4x0e+4x1o+4x2e"}, "the cue external_field"),
        ({"density_weighting": True}, "density_weighting = true"),
    ):
        with pytest.raises(ConfigError, match=f"{named}, which a library does not carry"):
            export(tiny_potential(**settings), tmp_path / "none")
    with pytest.raises(ConfigError, match="message = 'published', which a library does not carry"):
        export(build_potential("segnn2022"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="which is there already; expected the name of a new folder"):
        export(small.potential, small.files.folder)


OPENS = """
#include "segnn.h"
int main(int count, char **given) { /* opens, evaluates and closes a thousand times */
  const int species[] = {0, 1};
  const int64_t first[] = {0, 1, 2}, senders[] = {1, 0};
  const double vectors[] = {1, 0, 0, -1, 0, 0};
  double energy, forces[6];
  char error[256];
  for (int k = 0; k < 1000; k++) {
    segnn *s = segnn_open(given[count - 1], error, sizeof error);
    if (!s || segnn_evaluate(s, 2, species, first, senders, vectors, &energy, 0, forces, 0, 0)) return 1;
    segnn_close(s);
  }
  return 0;
}
"""


def test_a_program_in_c_without_a_complaint_of_compiler_or_sanitizers(tmp_path):
    """The library itself is compiled with them too."""
    potential = tiny_potential()
    folder = export(potential, tmp_path / "library").folder
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    kernels = sorted(path.name for path in folder.glob("rows_*.c"))
    parts = [f"{Path(name).stem}.o" for name in (*kernels, "segnn.c")]
    (folder / "opens.c").write_text(OPENS)
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror"]
    for command in (
        ["gcc", *checks, "-std=gnu11", "-w", "-c", *kernels, "segnn.c"],
        *(["gcc", *checks, *strict, f"{name}.c", *parts, "-o", name, "-lm"] for name in ("example", "opens")),
    ):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    for atoms in (ethanol(), bulk("Cu", cubic=True) * 2):
        atoms.rattle(0.05, seed=1)
        ase.io.write(folder / "atoms.xyz", atoms, format="xyz")
        box = [str(x) for x in atoms.cell.lengths()] if atoms.pbc.all() else []
        done = subprocess.run(["./example", NUMBERS, "atoms.xyz", *box], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        energy, *lines = done.stdout.splitlines()
        right = exact(potential, atoms)
        assert float(energy.split()[1]) == pytest.approx(right.energy.item(), abs=1e-6)
        forces = [[float(x) for x in line.split()[1:]] for line in lines[: len(atoms)]]
        np.testing.assert_allclose(forces, right.forces, rtol=0, atol=1e-6)
    done = subprocess.run(["./example", NUMBERS, "none.xyz"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "none.xyz is no xyz file\n"  # and no leak
    done = subprocess.run(["./opens", NUMBERS], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_the_sources_compile_again_where_they_are(small, tmp_path):
    folder = Path(shutil.copytree(small.files.folder, tmp_path / "again"))
    (folder / LIBRARY).unlink()
    compile_library(folder, portable=True)
    assert library_problem(folder / LIBRARY, folder / NUMBERS, small.potential) is None
    (folder / LIBRARY).unlink()  # it is loaded
    (folder / LIBRARY).write_bytes(b"of another processor")  # newer than all sources
    subprocess.run(["make"], cwd=folder, check=True, capture_output=True)
    assert library_problem(folder / LIBRARY, folder / NUMBERS, small.potential) is None
