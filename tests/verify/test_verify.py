"""The certificate: sound potentials pass every line, broken ones fail on the line that names what is wrong."""

import json
from mmap import mmap

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, diamond100, molecule
from ase.calculators.calculator import Calculator
from helpers.command_line import segnn
from helpers.systems import NAMED, left_handed, outside, rattled, slab, tiny_cell, triclinic, water, wire
from matplotlib.image import imread

from segnn_ase import calculator
from segnn_ase.base.errors import ConfigError, StructureError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.compiled import cpu_evaluation
from segnn_ase.compiled.cpu_evaluation import CpuEvaluator
from segnn_ase.model import edges as edge_functions
from segnn_ase.model import network
from segnn_ase.model import predict as prediction
from segnn_ase.store.description import describe_model
from segnn_ase.store.model_file import load_committee, load_with_metadata, save_potential
from segnn_ase.store.shipped import find_model
from segnn_ase.structure import neighbors
from segnn_ase.structure.skin import SkinNeighbors
from segnn_ase.verify.certificate import Check, as_plain, table, write
from segnn_ase.verify.run import verify

STEPS = 20  # at constant energy; too few for the slope to say much, which has a test of its own


def far_molecule() -> Atoms:
    """Hundreds of Å outside a cell that is not periodic."""
    atoms = water()
    atoms.set_cell([5.0, 6.0, 7.0])
    atoms.positions += (300.0, -200.0, 100.0)
    return atoms


def strangers() -> Atoms:
    """No neighbours at all."""
    return Atoms("HCO", [[10.0 * k, 0.3, 0] for k in range(3)])


def many_coppers() -> Atoms:
    """More atoms than compiled code is checked on before it is used."""
    return rattled(bulk("Cu", cubic=True).repeat((3, 3, 2)), 5, 0.05)


def dense_copper() -> Atoms:
    return rattled(bulk("Cu", a=3.2, cubic=True), 5, 0.05)  # 42 neighbours within 4 Å


@pytest.fixture
def fast(small_potential):
    """Made before a test breaks anything: it is shared, and calibrated when it is made."""
    return small_potential("fast")


def failed_lines(certificate) -> set[str]:
    """The names of the lines that fail, without the quantity and precision they are about."""
    return {name.split(",")[0].removesuffix(" (float32)") for name in certificate.failed}


def line(certificate, name: str) -> Check:
    return next(check for check in certificate.checks if check.name == name)


@pytest.mark.parametrize(
    "build, dtype",
    [
        (slab, "float64"),
        (slab, "float32"),
        (wire, "float64"),
        (left_handed, "float64"),
        (left_handed, "float32"),
        (tiny_cell, "float64"),
        (tiny_cell, "float32"),
        (far_molecule, "float64"),
        (far_molecule, "float32"),
        (strangers, "float32"),
        (outside, "float64"),
        (NAMED["one_atom"], "float64"),
    ],
)
def test_a_sound_potential_passes_on_every_kind_of_structure(small_potential, build, dtype):
    atoms = build()
    before = atoms.copy()
    certificate = verify(small_potential("segnn"), atoms, dtype=dtype, steps=STEPS)
    assert not certificate.failed, table(certificate)
    assert certificate.context["dtype"] == dtype
    assert (line(certificate, "stress = dE/dstrain / V").passed is True) == bool(atoms.pbc.all())
    assert (line(certificate, "total torque").passed is True) == (not atoms.pbc.any())
    assert atoms.calc is None and atoms == before


def reference(name: str) -> Atoms:
    """The smallest of the reference structures."""
    return min(ase.io.read(find_model(name).parent / "reference.xyz", ":"), key=len)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["silicon-pbe", "water-pbe0", "acetylacetone-pbe"])
def test_shipped_potentials(name, dtype):
    certificate = verify(name, reference(name), dtype=dtype, steps=60)
    assert not certificate.failed, table(certificate)
    assert certificate.context["code"] == CpuEvaluator.name
    assert line(certificate, "fast = slow, forces").value > 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("silicon-pbe", "float64", marks=pytest.mark.slow),
        pytest.param("water-pbe0", "float32", marks=pytest.mark.slow),
        pytest.param("silicon-pbe", "float32", marks=pytest.mark.proof),
        pytest.param("water-pbe0", "float64", marks=pytest.mark.proof),
    ],
)
def test_shipped_potentials_on_large_structures(name, dtype):
    atoms = max(ase.io.read(find_model(name).parent / "reference.xyz", ":"), key=len)
    certificate = verify(name, atoms, dtype=dtype)
    assert not certificate.failed, table(certificate)


def test_the_rounding_of_energies_of_equal_atoms_fails_nothing():
    """In an ideal slab many atoms round alike, and their errors add up."""
    found = verify("silicon-pbe", diamond100("Si", (2, 2, 6), a=5.47, vacuum=8), seed=0, steps=20)
    check = line(found, "forces = -dE/dr (float32)")
    assert check.passed and check.value < 0.6 * check.tolerance


def test_a_committee(small_potential, new_potential):
    members = [small_potential("fast"), new_potential("fast", torch.float32, 1)]
    certificate = verify(members, triclinic(), dtype="float64", steps=STEPS)
    assert not certificate.failed, table(certificate)
    assert certificate.context["model"] == "a Potential, a Potential"


@pytest.mark.parametrize("build, own", [(triclinic, True), (far_molecule, False)])
def test_a_hard_mean_of_the_neighbours_fails_at_the_cutoff(fast, monkeypatch, build, own):
    attributes = network.node_attributes
    monkeypatch.setattr(
        network, "node_attributes", lambda edges, *, smooth, lmax: attributes(edges, smooth=False, lmax=lmax)
    )
    certificate = verify(fast, build(), accelerate="off", steps=STEPS)
    assert "cutoff" in failed_lines(certificate) <= {"cutoff", "NVE"}  # pairs cross the cutoff in a hot crystal
    assert line(certificate, "cutoff, last neighbour, energy").value > 1e-3
    name = "cutoff, own pairs, energy" if own else "cutoff, one of many, energy"
    assert name in certificate.failed


def test_messages_without_envelope_fail_at_the_cutoff(fast, monkeypatch):
    monkeypatch.setattr(edge_functions, "envelope", torch.ones_like)
    certificate = verify(fast, slab(), accelerate="off", steps=STEPS)
    assert failed_lines(certificate) == {"cutoff"}
    assert {"cutoff, one of many, energy", "cutoff, own pairs, forces"} <= set(certificate.failed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_published_network_fails_at_the_cutoff(small_potential, dtype):
    certificate = verify(small_potential("segnn2022"), water(), dtype=dtype, steps=STEPS)
    assert failed_lines(certificate) == {"cutoff"}
    if dtype == "float32":
        assert "cutoff, last neighbour (float32), energy" in certificate.failed


def test_a_neighbour_cap_is_counted(fast, monkeypatch):
    complete = neighbors.BACKENDS["matscipy"]

    def capped(positions, cell, pbc, cutoff):
        i, j, S = complete(positions, cell, pbc, cutoff)
        distance = np.linalg.norm(positions[j] + S @ cell - positions[i], axis=1)
        order = np.lexsort((distance, i))
        rank = np.empty(len(i), int)
        rank[order] = np.arange(len(i)) - np.searchsorted(i[order], i[order])
        return i[rank < 32], j[rank < 32], S[rank < 32]

    monkeypatch.setitem(neighbors.BACKENDS, "matscipy", capped)
    certificate = verify(fast, dense_copper(), dtype="float64", steps=STEPS)
    missing = line(certificate, "neighbours, missing or too many")
    assert not missing.passed and missing.value > 20 and "ASE finds" in missing.note
    assert {"neighbours of ASE, energy", "neighbours of ASE, forces"} <= set(certificate.failed)
    # which ones are cut depends on the skin, and so do batch and cache, which are compared with none
    assert not failed_lines(certificate) & {"rotation", "permutation", "total force", "fast = slow", "cutoff"}


def test_a_stress_of_the_wrong_sign_fails_against_the_strain_only(fast, monkeypatch):
    stress = prediction.stress_of
    for module in (prediction, cpu_evaluation):
        monkeypatch.setattr(module, "stress_of", lambda virial, graph: -stress(virial, graph))
    certificate = verify(fast, left_handed(), steps=STEPS)
    assert certificate.failed == ["stress = dE/dstrain / V"]


def test_forces_of_compiled_code_that_are_wrong_only_for_many_atoms(fast, monkeypatch):
    """The guard of the compiled code looks at 64 atoms of a large structure."""
    evaluate = CpuEvaluator.__call__

    def wrong(self, graph, **asked):
        p = evaluate(self, graph, **asked)
        return p if p.forces is None or len(p.forces) <= 64 else p._replace(forces=-p.forces)

    monkeypatch.setattr(CpuEvaluator, "__call__", wrong)
    certificate = verify(fast, many_coppers(), accelerate="require", steps=STEPS)
    assert "fast = slow, forces" in certificate.failed and "forces = -dE/dr" in certificate.failed
    # in a batch the pair of atoms beside the many is wrong too
    assert failed_lines(certificate) <= {"fast = slow", "forces = -dE/dr", "NVE", "batch = single"}
    assert line(certificate, "fast = slow, energy").passed and line(certificate, "fast = slow, stress").passed


def test_stress_of_compiled_code_that_is_wrong(fast, monkeypatch):
    evaluate = CpuEvaluator.__call__

    def wrong(self, graph, **asked):
        p = evaluate(self, graph, **asked)
        return p if p.stress is None else p._replace(stress=-p.stress)

    monkeypatch.setattr(CpuEvaluator, "__call__", wrong)
    certificate = verify(fast, triclinic(), accelerate="require", dtype="float32", steps=STEPS)
    assert certificate.failed == ["stress = dE/dstrain / V", "fast = slow, stress"]


def test_a_skin_that_ignores_wraps(fast, monkeypatch):
    def blind(self, positions, cell, pbc):
        same = self._found is not None and self._pbc == pbc.tobytes() and self._positions.shape == positions.shape
        if not same or not np.array_equal(cell, self._cell):
            return False
        moved = positions - self._positions
        if pbc.all():
            moved -= np.round(np.linalg.solve(cell.T, moved.T).T) @ cell
        return bool(((moved**2).sum(1) <= (0.5 * self.skin) ** 2).all())

    monkeypatch.setattr(SkinNeighbors, "_holds", blind)
    certificate = verify(fast, triclinic(), steps=STEPS)
    assert {"skin = no skin, energy", "skin = no skin, forces"} <= set(certificate.failed)
    # one atom is outside the cell: the list is stale from when it was wrapped to when the cell is strained
    assert failed_lines(certificate) <= {"skin = no skin", "wrapped = unwrapped", "stress = dE/dstrain / V"}


@pytest.mark.parametrize("change", ["cell", "numbers"])
def test_a_cache_that_misses_a_change(fast, monkeypatch, change):
    check_state = Calculator.check_state

    def forgetful(self, atoms, tol=1e-15):
        return [x for x in check_state(self, atoms, tol) if x != change]

    monkeypatch.setattr(SEGNNCalculator, "check_state", forgetful)
    certificate = verify(fast, triclinic(), steps=STEPS)
    assert "stale cache, energy" in certificate.failed
    assert not failed_lines(certificate) & {"rotation", "forces = -dE/dr", "neighbours", "fast = slow", "NVE"}


def test_forces_that_are_no_gradient(fast, monkeypatch):
    """Forces a hundredth too large: equivariant, zero in sum, and energy is made out of nothing."""
    results = calculator._results

    def stretched(members, factors):
        found = results(members, factors)
        if "forces" in found:
            found["forces"] = 1.01 * found["forces"]
        return found

    monkeypatch.setattr(calculator, "_results", stretched)
    certificate = verify(fast, triclinic(), steps=100)
    assert {"forces = -dE/dr", "NVE, fluctuation"} <= set(certificate.failed)
    assert failed_lines(certificate) <= {"forces = -dE/dr", "NVE", "neighbours of ASE", "fast = slow"}


def test_memory_that_is_not_given_back(fast, monkeypatch):
    kept, results = [], calculator._results

    def leaking(members, factors):
        kept.append(mmap(-1, 2**20))  # pages of its own: the allocator may have some to spare
        kept[-1].write(b"1" * 2**20)
        return results(members, factors)

    monkeypatch.setattr(calculator, "_results", leaking)
    certificate = verify(fast, water(), steps=60)
    growth = line(certificate, "memory growth")
    assert certificate.failed == ["memory growth"] and 800 < growth.value < 3000


def test_what_goes_wrong_later_is_a_line_that_fails(fast, monkeypatch):
    def refused(*_, **__):
        raise StructureError("no batches today")

    monkeypatch.setattr(SEGNNCalculator, "evaluate", refused)
    certificate = verify(fast, water(), steps=STEPS)
    assert certificate.failed == ["batches", "skin", "cache"]
    assert line(certificate, "skin").note == "no batches today"


@pytest.mark.parametrize(
    "build, message",
    [(Atoms, "atoms is empty"), (lambda: molecule("NH3"), "atom 0 is N, which this potential does not know")],
)
def test_structures_that_cannot_be_evaluated(small_potential, build, message):
    with pytest.raises(StructureError, match=message):
        verify(small_potential("fast"), build())


def test_wrong_options(small_potential):
    with pytest.raises(ConfigError, match="steps is 3; expected at least 20"):
        verify(small_potential("fast"), water(), steps=3)
    with pytest.raises(ConfigError, match="accelerate is 'fast'"):
        verify(small_potential("fast"), water(), accelerate="fast")


@pytest.fixture(scope="module")
def certificate(small_potential):
    return verify(small_potential("fast"), slab(), steps=STEPS)


def test_the_table_has_a_line_for_each_check(certificate):
    text = table(certificate)
    for check in certificate.checks:
        (row,) = [row for row in text.splitlines() if row.startswith(f"{check.name} ")]
        assert ("pass" in row) == (check.passed is True) and ("n.a." in row) == (check.value is None)
        assert check.note in row
    assert "Cu4, pbc TTF" in text and text.endswith("checks hold")
    broken = certificate._replace(checks=(Check("walrus", 2.0, 1.0, "eV", False, "too heavy"),))
    assert "FAIL    too heavy" in table(broken) and table(broken).endswith("0 of 1 checks hold")


def test_files(certificate, tmp_path):
    odd = certificate._replace(checks=(*certificate.checks, Check("walrus", float("nan"), 0.0, "eV", False)))
    written = write(odd, json=tmp_path / "a.json", png=tmp_path / "a.png")
    assert sorted(written) == sorted(tmp_path.iterdir())
    read = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert [check["name"] for check in read["checks"]] == [check.name for check in odd.checks]
    assert read["checks"][-1]["value"] is None and read["passed"] is False
    assert {"torch", "ase", "segnn_ase"} <= read["versions"].keys() and read["ms_per_step"] > 0
    assert min(imread(tmp_path / "a.png").shape[:2]) > 300


@pytest.mark.slow
def test_the_command_stores_what_it_found(small_potential, tmp_path):
    save_potential(tmp_path / "m.pt", small_potential("fast"), metadata={"errors": {"test": {"forces_rmse": 0.5}}})
    ase.io.write(tmp_path / "a.xyz", [water(), triclinic()])
    command = ["verify", tmp_path / "m.pt", tmp_path / "a.xyz", "--steps", STEPS, "--store"]
    for dtype in ("float64", "float32", "float64"):
        result = segnn(*command, "--dtype", dtype, "--json", tmp_path / "a.json")
        assert result.exit_code == 0, result.output
        assert "C2HCuO, pbc TTT" in result.stdout and f"wrote {tmp_path / 'a.json'}" in result.stdout
    after, metadata = load_with_metadata(tmp_path / "m.pt")
    assert metadata["errors"] == {"test": {"forces_rmse": 0.5}} and len(metadata["verified"]) == 2
    for name, weight in small_potential("fast").state_dict().items():
        assert torch.equal(weight, after.state_dict()[name])
    page = segnn("info", tmp_path / "m.pt").stdout
    assert page.count("verified    ") == 2 and "on C2HCuO, pbc TTT, float64, cpu: all " in page


def test_the_command_fails_where_a_check_does(small_potential, tmp_path):
    save_potential(tmp_path / "m.pt", small_potential("segnn2022"))
    ase.io.write(tmp_path / "a.xyz", water())
    result = segnn("verify", tmp_path / "m.pt", tmp_path / "a.xyz", "--steps", STEPS, "--store")
    assert result.exit_code == 1 and "FAIL" in result.stdout and "Traceback" not in result.output
    assert "fails cutoff, last neighbour, energy; cutoff" in describe_model(*load_committee(tmp_path / "m.pt"))
    result = segnn("verify", tmp_path / "m.pt", tmp_path / "no.xyz")
    assert result.exit_code == 1 and result.stderr.splitlines()[-1].startswith("error: structure is")


def test_the_summary_is_plain(certificate, small_potential, tmp_path):
    save_potential(tmp_path / "m.pt", small_potential("fast"), metadata={"verified": {"a": as_plain(certificate)}})
    stored = load_with_metadata(tmp_path / "m.pt")[1]["verified"]["a"]
    assert stored["checks"][0]["name"] == certificate.checks[0].name and stored["passed"] is True
