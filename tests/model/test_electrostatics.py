"""Latent charges: lattice sums that are known, exact derivatives, and Coulomb's law beyond the cutoff."""

import math

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet
from ase.stress import voigt_6_to_full_3x3_stress
from helpers.systems import rattled
from scipy.special import erf, erfc

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, DataError, StructureError
from segnn_ase.compiled.choose import choose_evaluator, choose_loss_gradient
from segnn_ase.model.coulomb import COULOMB, TOLERANCE, coulomb_energies
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator, PlainLossGradient
from segnn_ase.model.settings import model_config
from segnn_ase.properties import PropertyModel
from segnn_ase.properties.targets import Target
from segnn_ase.store.model_file import load_potential, save_potential
from segnn_ase.structure import cues as of_structures
from segnn_ase.structure.cue_settings import Cue
from segnn_ase.structure.cues import refuse_sums
from segnn_ase.structure.graph import Graph, collate, graph_from_atoms, with_pairs
from segnn_ase.train import TrainConfig, train
from segnn_ase.train.evaluation import evaluate_files
from segnn_ase.verify import verify

SMALL = {"hidden_irreps": "8x0e+8x1o", "radial_hidden": (8,), "n_radial": 4, "cutoff": 3.5, "lmax_attr": 2}
# of the distance of neighbours: Madelung's constants of NaCl, CsCl and ZnS
MADELUNG = {"rocksalt": 1.747564594633, "cesiumchloride": 1.762674773070, "zincblende": 1.638055053388}
NEAREST = {"rocksalt": 0.5, "cesiumchloride": 0.75**0.5, "zincblende": 0.75**0.5 / 2}


def potential_for(*cues: str, dtype=torch.float64, told: Atoms | None = None, **settings) -> Potential:
    config = model_config(cues=cues, **{**SMALL, "electrostatics": "latent", **settings})
    potential = Potential(config, [11, 17], scales=[0.1, 0.1], reference_energies=[-1.0, -2.0], seed=3)
    potential.set_core({(11, 11): 2.5, (11, 17): 1.8, (17, 17): 2.5})
    potential.calibrate(graph_of(potential, told_all(crystal()) if told is None else told))
    return potential.to(dtype)


def told_all(atoms: Atoms, seed: int = 0) -> Atoms:
    atoms.info["charge"] = seed - 1
    rng = np.random.default_rng(seed)
    atoms.arrays["initial_magmoms"] = rng.normal(size=(len(atoms), 3))
    charges = rng.normal(size=len(atoms))
    atoms.set_initial_charges(charges - charges.mean() if sum(atoms.pbc) == 2 else charges)
    return atoms


def graph_of(potential: Potential, atoms: Atoms) -> Graph:
    return of_structures.told(with_pairs(graph_from_atoms(atoms, potential.cutoff)), atoms, potential.config.cues)


def crystal() -> Atoms:
    return rattled(bulk("NaCl", "rocksalt", 5.4, cubic=True))


def slab() -> Atoms:
    atoms = crystal()
    atoms.cell += np.array([[0, 0, 0.3], [0.2, 0, -0.4], [0, 0, 0]])  # askew, and not across z
    atoms.pbc = (True, True, False)
    return atoms


def cluster() -> Atoms:
    return Atoms("Na2Cl2Na", [[0, 0, 0], [2.5, 0.3, 0], [0.8, 2.6, 0.4], [3.1, 2.8, 0.2], [9, 9, 9]])


@pytest.fixture(params=["off", "require"])
def calculator(request):
    return SEGNNCalculator(potential_for(), accelerate=request.param, domain="ignore")


def found(calc: SEGNNCalculator, name: str, atoms: Atoms):
    return calc.get_property(name, atoms.copy())


def slope(of, h: float):
    return (of(-2 * h) - 8 * of(-h) + 8 * of(h) - of(2 * h)) / (12 * h)


def energy_of(charges, atoms: Atoms, smearing: float) -> float:
    q, x, h = (torch.as_tensor(np.asarray(v, dtype=float)) for v in (charges, atoms.positions, atoms.cell.array))
    return float(coulomb_energies(q, x, h[atoms.pbc] if atoms.pbc.any() else None, smearing).sum())


@pytest.mark.parametrize("structure", MADELUNG)
@pytest.mark.parametrize("cubic", [False, True])
def test_madelung_constants(structure, cubic):
    atoms = bulk("NaCl", structure, a=5.0, cubic=cubic and structure != "cesiumchloride")
    charges = np.where(atoms.numbers == 11, 1.0, -1.0)
    energy = energy_of(charges, atoms, 0.4) / (len(atoms) / 2)
    assert -energy * NEAREST[structure] * 5.0 / COULOMB == pytest.approx(MADELUNG[structure], abs=1e-6)


def test_a_molecule_in_a_large_box_is_alone():
    """But for the dipole p of its images in a conductor, -2 pi p^2 / 3 V."""
    atoms, charges = cluster()[:4], np.array([0.7, -0.4, -0.5, 0.2])
    box = Atoms(atoms.numbers, atoms.positions, cell=[60.0] * 3, pbc=True)
    off = energy_of(charges, box, 1.5) - energy_of(charges, atoms, 1.5)
    p = charges @ atoms.positions
    assert off == pytest.approx(-2 * math.pi / 3 * COULOMB * (p @ p) / box.get_volume(), rel=0.02)


@pytest.mark.parametrize("size", [8.0, 20.0])
def test_a_net_charge_in_a_cell_is_that_of_a_point_in_a_background(size):
    """-2.837297 k q^2 / 2L in a cube, whatever its width (Leslie and Gillan, J. Phys. C 18, 973 (1985))."""
    for smearing in (0.5, 1.0):
        energy = energy_of([1.0], Atoms("Na", cell=[size] * 3, pbc=True), smearing)
        assert energy == pytest.approx(-2.837297 * COULOMB / (2 * size), rel=1e-6)


def test_waves_come_and_go_without_a_jump():
    """A perfect crystal whose shell (3, 1, 1), all of one phase, crosses the longest wave that counts."""
    atoms = bulk("NaCl", "rocksalt", 5.0, cubic=True)
    charges = np.where(atoms.numbers == 11, 1.0, -1.0)
    longest, energies = math.sqrt(-2 * math.log(TOLERANCE)) / 1.5, []
    for n in (11, 19, 27):
        at = 2 * math.pi * math.sqrt(n) / longest
        for off in (-1e-9, 1e-9):
            atoms.set_cell([at + off] * 3, scale_atoms=True)
            energies.append(energy_of(charges, atoms, 1.5))
        assert energies[-1] == pytest.approx(energies[-2], abs=1e-8)


def test_a_skewed_cell_is_the_same_and_too_many_waves_are_refused():
    atoms, rng = crystal(), np.random.default_rng(0)
    charges = rng.normal(size=len(atoms))
    skewed = atoms.copy()
    skewed.set_cell(atoms.cell.array + np.outer([0, 40, 40], atoms.cell.array[0]))
    assert energy_of(charges, skewed, 1.5) == pytest.approx(energy_of(charges, atoms, 1.5), abs=1e-9)
    with pytest.raises(StructureError, match=r"need .* numbers; expected at most"):
        energy_of(charges, Atoms(atoms.numbers, atoms.positions, cell=[300.0] * 3, pbc=True), 0.3)
    with pytest.raises(StructureError, match="5000 charges in a molecule; expected at most 4082"):
        energy_of(np.zeros(5000), Atoms("Na5000", np.zeros((5000, 3))), 1.5)


def test_points_that_are_apart_obey_coulombs_law():
    pair = Atoms("NaCl", [[0, 0, 0], [0, 0, 12.0]])
    assert energy_of([1.0, -0.5], pair, 1.0) == pytest.approx(-0.5 * COULOMB / 12.0, rel=1e-12)
    near = energy_of([1.0, -0.5], Atoms("NaCl", [[0, 0, 0], [0, 0, 1e-9]]), 1.0)
    assert near == pytest.approx(-0.5 * COULOMB * math.sqrt(2 / math.pi), rel=1e-6)


@pytest.mark.parametrize("make", [crystal, cluster, slab])
def test_forces_and_stress_are_derivatives(calculator, make):
    atoms, rng = make(), np.random.default_rng(1)
    v, strain = rng.normal(size=atoms.positions.shape), rng.normal(size=(3, 3))
    strain = 0.5 * (strain + strain.T)

    def moved(x):
        other = atoms.copy()
        other.positions += x * v
        return found(calculator, "energy", other)

    def deformed(x):
        other = atoms.copy()
        other.set_cell(other.cell.array @ (np.eye(3) + x * strain), scale_atoms=True)
        return found(calculator, "energy", other)

    assert -np.sum(found(calculator, "forces", atoms) * v) == pytest.approx(slope(moved, 1e-3), abs=2e-7)
    if atoms.pbc.all():
        stress = voigt_6_to_full_3x3_stress(found(calculator, "stress", atoms))
        assert atoms.cell.volume * np.sum(stress * strain) == pytest.approx(slope(deformed, 1e-4), abs=2e-6)


def test_charges_add_up_and_lone_atoms_keep_their_energy(calculator):
    for atoms in (crystal(), cluster(), slab()):
        charges = found(calculator, "charges", atoms)
        assert abs(charges.sum()) < 1e-12 and np.abs(charges).max() > 1e-3
        assert np.abs(found(calculator, "forces", atoms).sum(axis=0)).max() < 1e-10
    for alone in (Atoms("Na"), Atoms("Na", cell=[9, 9, 9], pbc=True)):
        assert found(calculator, "energy", alone) == -1.0
        assert found(calculator, "charges", alone) == 0.0


def test_the_total_charge_is_that_of_the_structure():
    calculator, ion = SEGNNCalculator(potential_for("charge"), domain="ignore"), cluster()
    ion.info["charge"] = -2
    assert found(calculator, "charges", ion).sum() == pytest.approx(-2.0, abs=1e-12)
    ion.info["charge"] = 0
    assert found(calculator, "charges", ion).sum() == pytest.approx(0.0, abs=1e-12)


def test_charges_of_atoms_that_are_given_are_the_total():
    atoms = cluster()
    atoms.set_initial_charges([1.0, 0, 0.5, 0, 0])
    calculator = SEGNNCalculator(potential_for("initial_charges", told=atoms), domain="ignore")
    assert found(calculator, "charges", atoms).sum() == pytest.approx(1.5, abs=1e-12)


def test_a_change_of_directions_is_seen(calculator):
    atoms = crystal()
    atoms.calc = calculator
    energies = []
    for pbc in (True, False, True, False):
        atoms.pbc = pbc
        energies.append(atoms.get_potential_energy())
    assert energies[0] == energies[2] != energies[1] == energies[3]


def test_a_committee_turns_charges_alike():
    """The energy of a neutral structure is the same with all charges turned round."""
    one, other = potential_for(), potential_for()
    with torch.no_grad():
        for weight in other.charges.parameters():
            weight.neg_()
    alone, both = (SEGNNCalculator(x, domain="ignore") for x in (one, [one, other]))
    assert found(both, "energy", cluster()) == pytest.approx(found(alone, "energy", cluster()), abs=1e-12)
    assert np.allclose(found(both, "charges", cluster()), found(alone, "charges", cluster()), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "charge"), [(crystal, 0), (cluster, 0), (cluster, 1), (slab, 0), (slab, None)])
@pytest.mark.parametrize("kind", ["latent", "given"])
def test_verify_passes(make, charge, kind):
    atoms = make()[:4] if make is cluster else make()
    cue = "charge" if charge is not None and kind == "latent" else "initial_charges"
    if cue == "initial_charges":
        charges = np.tile([0.3, -0.3], len(atoms) // 2)
        atoms.set_initial_charges(charges + (charge or 0) / len(atoms))
    else:
        atoms.info["charge"] = charge
    model = potential_for(cue, told=None if cue == "charge" else atoms, electrostatics=kind)
    assert not verify(model, atoms, dtype="float64").failed


def test_beyond_the_cutoff_atoms_attract_by_their_charges(calculator):
    """Charges follow their surroundings, which are the same at all these distances."""

    def dimer(d):
        return Atoms("NaClNaCl", [[0, 0, 0], [2.5, 0, 0], [0.4, d, 0.3], [0.1, d + 1.5, 2.0]])

    energies = []
    for d in (9.0, 14.0):
        q, x = found(calculator, "charges", dimer(d)), dimer(d).positions
        assert np.allclose(q, found(calculator, "charges", dimer(20.0)), atol=1e-12)
        apart = np.linalg.norm(x[:2, None] - x[2:], axis=2)
        energies.append(found(calculator, "energy", dimer(d)) - COULOMB * np.sum(q[:2, None] * q[2:] / apart))
    assert energies[0] == pytest.approx(energies[1], abs=1e-7)


def test_a_batch_is_one_by_one(calculator):
    structures = [crystal(), cluster(), slab(), Atoms("Na")]
    together = calculator.evaluate(structures, ("energy", "forces", "charges"))
    for results, atoms in zip(together, structures, strict=True):
        for name in ("energy", "forces", "charges"):
            assert np.allclose(results[name], found(calculator, name, atoms), atol=1e-9), name


@pytest.mark.parametrize("n", [2, 3])
def test_a_supercell_has_the_energy_of_its_cells(calculator, n):
    atoms = crystal()
    assert found(calculator, "energy", atoms * (1, 1, n)) == pytest.approx(n * found(calculator, "energy", atoms))
    forces = found(calculator, "forces", atoms)
    assert np.allclose(found(calculator, "forces", atoms * (1, 1, n)), np.tile(forces, (n, 1)), atol=1e-8)


GIVEN = ("initial_magmoms", "initial_charges,scale=0.5", "charge")


@pytest.mark.parametrize("cues", [(), ("charge",), ("initial_magmoms", "charge"), GIVEN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_T16_compiled_code_is_right(cues, dtype):
    """Also of pairs within the core, lone atoms and ions, and of all gradients of a loss."""
    kind = "given" if cues is GIVEN else "latent"
    potential, close = potential_for(*cues, dtype=dtype, electrostatics=kind), cluster()
    close.positions[1] = close.positions[0] + [0.3, 0.2, 0.9]
    structures = [told_all(atoms, k) for k, atoms in enumerate([crystal(), slab(), cluster(), close, Atoms("Na")])]
    graphs = [graph_of(potential, atoms) for atoms in structures]
    graph, tolerance = collate(graphs), 1e-9 if dtype is torch.float64 else 3e-4
    evaluator, plain = choose_evaluator(potential, graphs[0], "require"), PlainEvaluator(potential)
    assert evaluator.name == "the network in C"
    a, b = (one(graph, stress=True) for one in (evaluator, plain))
    for name in ("energies", "forces", "stress", "charges", *(["cue_gradients"] if cues else [])):
        x, y = getattr(a, name).nan_to_num(), getattr(b, name).nan_to_num()
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance * float(y.abs().max())), name
    assert torch.allclose(evaluator(graph, forces=False).energy, a.energy, atol=1e-5)
    assert not any(x.requires_grad for x in (*a, *b) if isinstance(x, torch.Tensor))

    def loss(p):
        told = 0.0 if p.cue_gradients is None else p.cue_gradients.square().sum()
        return 0.1 * (p.energy.square().sum() + p.forces.square().mean() + p.stress[0].square().sum() + told)

    gradients = []
    passes = choose_loss_gradient(potential.train(), graphs[0], "require")
    assert passes.name == "all passes in C"
    if dtype is torch.float32:  # compared within rounding where it was chosen
        return
    for way in (passes, PlainLossGradient(potential)):
        potential.zero_grad(set_to_none=True)
        way(graph, loss, forces=True, stress=True)
        gradients.append({n: w.grad.clone() for n, w in potential.named_parameters() if w.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any("charges" in name for name in gradients[0])
    for name, y in gradients[1].items():
        assert torch.allclose(gradients[0][name], y, rtol=tolerance, atol=tolerance * float(y.abs().max())), name


def test_given_charges_are_those_of_the_structure():
    """Their energy is added to that of a network, and what it changes with them to the electronegativities."""
    potential = potential_for(*GIVEN, told=told_all(crystal()), electrostatics="given", smearing=0.8)
    without = potential_for(*GIVEN, told=told_all(crystal()), electrostatics="none")
    without.load_state_dict({k: x for k, x in potential.state_dict().items() if not k.startswith("charges")})
    both = [SEGNNCalculator(p, domain="ignore") for p in (potential, without)]
    for make in (crystal, cluster, slab):
        atoms = told_all(make(), 1)
        charges = atoms.get_initial_charges()
        added = energy_of(charges, atoms, 0.8)
        assert np.array_equal(found(both[0], "charges", atoms), charges)
        energies = [found(calculator, "energy", atoms) for calculator in both]
        assert energies[0] - energies[1] == pytest.approx(added, abs=1e-9)
        potentials = np.subtract(*(found(calculator, "electronegativities", atoms) for calculator in both))
        assert potentials @ charges == pytest.approx(2 * added, abs=1e-8)
        forces = np.subtract(*(found(calculator, "forces", atoms) for calculator in both))
        v = np.random.default_rng(0).normal(size=forces.shape)

        def moved(x: float, atoms=atoms, charges=charges, v=v) -> float:
            other = atoms.copy()
            other.positions += x * v
            return energy_of(charges, other, 0.8)

        assert np.sum(forces * v) == pytest.approx(-slope(moved, 1e-3), abs=1e-6)


def test_given_charges_need_to_be_given():
    with pytest.raises(ConfigError, match="initial_charges is no cue"):
        model_config(electrostatics="given", cues=["charge"])
    calculator = SEGNNCalculator(potential_for(*GIVEN, told=told_all(crystal()), electrostatics="given"))
    atoms = told_all(cluster())
    del atoms.arrays["initial_charges"]
    with pytest.raises(StructureError, match="initial_charges"):
        found(calculator, "energy", atoms)


@pytest.mark.parametrize("make", [crystal, cluster, slab])
def test_hessian(make):
    calculator, atoms = SEGNNCalculator(potential_for(), domain="ignore"), make()
    hessian, v = calculator.get_hessian(atoms), np.random.default_rng(0).normal(size=atoms.positions.shape)

    def forces(x):
        other = atoms.copy()
        other.positions += x * v
        return found(calculator, "forces", other)

    assert np.allclose(hessian @ v.ravel(), -slope(forces, 1e-3).ravel(), atol=1e-5)


def test_energy_is_conserved():
    atoms = cluster()[:4]
    atoms.calc = SEGNNCalculator(potential_for(), accelerate="require", domain="ignore")
    atoms.set_velocities(np.random.default_rng(0).normal(scale=0.01, size=(4, 3)))
    spreads = []
    for step in (4, 2):
        moving = atoms.copy()
        moving.calc = atoms.calc
        dynamics, energies = VelocityVerlet(moving, 0.25 * step * units.fs), []
        for _ in range(400 // step):
            dynamics.run(1)
            energies.append(moving.get_total_energy())
        spreads.append(np.std(energies))
    assert spreads[1] < 0.35 * spreads[0]


def test_wires_and_slabs_with_a_net_charge_are_refused(tmp_path):
    wire, charged = crystal(), slab()
    wire.pbc, charged.info["charge"] = (False, False, True), 1
    wrong = {
        "wire": (wire, r"pbc is \[.*make a wire a crystal"),
        "charged": (charged, "the slab has a net charge of 1 e"),
    }
    save_potential(tmp_path / "known.pt", potential_for("charge"))
    for name, (atoms, text) in wrong.items():
        with pytest.raises(StructureError, match=text):
            found(SEGNNCalculator(tmp_path / "known.pt", domain="ignore"), "energy", atoms)
        atoms.calc = SinglePointCalculator(atoms, energy=-3.0, forces=0.2 * atoms.positions)
        path = tmp_path / f"{name}.xyz"
        ase.io.write(path, [*map(crystal_with_labels, range(3)), atoms])
        model = {**SMALL, "electrostatics": "latent", "cues": ["charge"]}
        with pytest.raises(DataError, match=rf"{name}\.xyz.*{text}"):
            values = {"data": {"train": str(path)}, "model": model, "out": str(tmp_path / "model.pt")}
            train(TrainConfig.parse(values), progress=False)
        with pytest.raises(DataError, match=text):
            evaluate_files(tmp_path / "known.pt", str(path))
    with pytest.raises(StructureError, match=r"net charge of 0\.5 e"):
        energy_of([0.5, 0, 0, 0, 0], slab()[:5], 1.5)


def of_parry(charges, atoms: Atoms, smearing: float) -> float:
    """Energy of a slab by waves in two directions and pairs in the third (Parry, Surf. Sci. 49, 433 (1975))."""
    a, b = atoms.cell.array[:2]
    normal = np.cross(a, b)
    area = np.linalg.norm(normal)
    apart = atoms.positions[:, None] - atoms.positions
    z, energy = apart @ normal / area, 0.0
    for n in np.ndindex(31, 31):
        k = 2 * np.pi * (np.array(n) - 15) @ np.linalg.pinv(atoms.cell.array[:2]).T
        if size := np.linalg.norm(k):
            sides = [
                np.exp(s * size * z) * erfc(smearing * size / 2**0.5 + s * z / (smearing * 2**0.5)) for s in (1, -1)
            ]
            energy += charges @ (np.pi / size * np.cos(apart @ k) * sum(sides)) @ charges
    level = z * erf(z / (smearing * 2**0.5)) + smearing * (2 / np.pi) ** 0.5 * np.exp(-0.5 * (z / smearing) ** 2)
    itself = (2 / np.pi) ** 0.5 / smearing * charges @ charges
    return 0.5 * COULOMB * ((energy - 2 * np.pi * charges @ level @ charges) / area - itself)


@pytest.mark.parametrize("smearing", [0.6, 1.5])
def test_slabs_have_the_energy_of_parry(smearing):
    atoms, rng = slab(), np.random.default_rng(0)
    charges = rng.normal(size=len(atoms))
    charges -= charges.mean()
    energy = energy_of(charges, atoms, smearing)
    assert energy == pytest.approx(of_parry(charges, atoms, smearing), abs=1e-8)
    turned = atoms.copy()
    turned.rotate(50, (1, 2, 3), rotate_cell=True)
    turned.positions += [3.0, -2.0, 40.0]
    turned.cell[2] = [0, 0, 0]
    assert energy_of(charges, turned, smearing) == pytest.approx(energy, abs=1e-8)
    turned.positions += np.outer([0, 3, 0, -2, 0, 0, 1, 0], turned.cell[0])  # the same by other images
    assert energy_of(charges, turned, smearing) == pytest.approx(energy, abs=1e-8)
    skewed = turned.copy()
    skewed.cell[1] += 9 * turned.cell[0]
    assert energy_of(charges, skewed, smearing) == pytest.approx(energy, abs=1e-8)


def test_energies_of_atoms_in_slabs_have_no_origin():
    calculator, here = SEGNNCalculator(potential_for(), domain="ignore"), slab()
    there = here.copy()
    there.positions += [1.0, 2.0, 300.0]
    energies = found(calculator, "energies", here)
    assert np.allclose(found(calculator, "energies", there), energies, atol=1e-9)
    assert energies.sum() == pytest.approx(found(calculator, "energy", here), abs=1e-9)


def test_large_slabs_are_compiled_whatever_charge_a_part_of_them_has():
    """Code is tried on 64 of its atoms."""
    atoms = bulk("NaCl", "rocksalt", 5.4, cubic=True) * (3, 3, 1)
    atoms.pbc = (True, True, False)
    atoms.set_initial_charges(np.where(atoms.positions[:, 0] > 8.0, 1.0, -1.0))
    assert atoms.get_initial_charges().sum() == 0
    told = crystal()
    told.set_initial_charges(0.1 * np.arange(len(told)))
    potential = potential_for("initial_charges", told=told)
    graph = graph_of(potential, atoms)
    assert choose_evaluator(potential, graph, "require").name == "the network in C"
    assert choose_loss_gradient(potential.train(), graph, "require").name == "all passes in C"


@pytest.mark.parametrize("electrostatics", ["given", "latent"])
@pytest.mark.parametrize("accelerate", ["off", "require"])
def test_neutral_slabs_are_neutral_in_float32(electrostatics, accelerate):
    atoms = bulk("NaCl", "rocksalt", 5.4, cubic=True) * (3, 3, 1)
    atoms.pbc = (True, True, False)
    atoms.set_initial_charges(np.tile([2.1, 1.575, *3 * [-1.225]], 15)[: len(atoms) // 5 * 5].tolist() + 2 * [0.0])
    assert abs(np.float32(atoms.get_initial_charges()).sum(dtype=float)) > 1e-6 > abs(atoms.get_initial_charges().sum())
    potential = potential_for("initial_charges", told=atoms, electrostatics=electrostatics, dtype=torch.float32)
    calculator = SEGNNCalculator(potential, accelerate=accelerate, domain="ignore")
    assert np.isfinite(found(calculator, "forces", atoms)).all()


def test_the_charge_of_a_slab_is_that_which_the_potential_takes():
    """That of the cue `charge`, its default where it is absent, and of `initial_charges` where that is none."""
    atoms = slab()
    atoms.set_initial_charges(np.full(8, 0.25))
    for cues, default, refused in ((["charge"], 0, False), (["initial_charges"], 0, True), (["charge"], 1, True)):
        charge = [Cue(name=name, default=default) if name == "charge" else Cue(name=name) for name in cues]
        if not refused:
            assert refuse_sums(atoms, charge, "latent") is None
            continue
        with pytest.raises(StructureError, match="the slab has a net charge"):
            refuse_sums(atoms, charge, "latent")
    refuse_sums(atoms, [Cue(name="charge", default=0), Cue(name="initial_charges")], "latent")
    with pytest.raises(StructureError, match="net charge of 2 e"):  # of those that are summed up
        refuse_sums(atoms, [Cue(name="charge", default=0), Cue(name="initial_charges")], "given")


def test_sheets_of_charges_are_a_capacitor():
    """2 pi k q^2 / A is the force between them at any distance."""
    energies = [
        energy_of([1.0, -1.0], Atoms("NaCl", [[0, 0, 0], [1.7, 0, d]], cell=[5, 5, 0], pbc=(1, 1, 0)), 0.5)
        for d in (20, 70, 320)
    ]
    assert np.diff(energies) == pytest.approx(2 * math.pi * COULOMB / 25 * np.array([50, 250]), rel=1e-9)


def test_a_slab_of_salt_has_the_energy_of_its_sheets():
    """Neutral (001) layers hardly see each other: two more of them have that of the crystal."""
    energies = []
    for layers in (4, 6):
        atoms = bulk("NaCl", "rocksalt", 5.0, cubic=True).repeat((1, 1, layers // 2))
        atoms.pbc = (True, True, False)
        energies.append(energy_of(np.where(atoms.numbers == 11, 1.0, -1.0), atoms, 0.4))
    per_pair = (energies[1] - energies[0]) / 4
    assert -per_pair * 2.5 / COULOMB == pytest.approx(MADELUNG["rocksalt"], abs=1e-4)


def crystal_with_labels(seed: int) -> Atoms:
    atoms = crystal()
    atoms.rattle(0.05, seed=seed)
    atoms.calc = SinglePointCalculator(atoms, energy=-3.0 - 0.01 * seed, forces=0.1 * atoms.positions)
    return atoms


def test_what_pairs_cannot_say_is_refused(calculator):
    for ask in (calculator.get_heat_flux, calculator.get_virials):
        with pytest.raises(PropertyNotImplementedError, match="electrostatics"):
            ask(crystal())
    with pytest.raises(ConfigError, match="expected one of both"):
        model_config(electrostatics="latent", cues=["external_field"])
    with pytest.raises(ConfigError, match=r"model\.electrostatics is 'latent'"):
        PropertyModel(model_config(electrostatics="latent"), [1], [Target("gap", "structure", (), "1x0e", "mean")])


def test_files_keep_charges(tmp_path):
    save_potential(tmp_path / "model.pt", potential_for(smearing=1.0))
    again = SEGNNCalculator(load_potential(tmp_path / "model.pt"), domain="ignore")
    for name in ("energy", "charges", "forces"):
        here = SEGNNCalculator(potential_for(smearing=1.0), domain="ignore")
        assert np.array_equal(found(again, name, cluster()), found(here, name, cluster()))


@pytest.mark.slow
@pytest.mark.parametrize("known", [["latent"], pytest.param(["latent", "given"], marks=pytest.mark.proof)])
def test_it_learns_what_a_cutoff_hides(tmp_path, known):
    """Pairs of stiff molecules whose charges attract, 3 to 8 Å apart, by a network that sees 3 Å."""
    frames, truth = [], torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for seed in range(120):
        rng = np.random.default_rng(seed)
        parts = [Atoms("NaCl", [[0, 0, 0], [0, 0, rng.uniform(2.3, 2.7)]]) for _ in range(2)]
        for one in parts:
            one.rotate(rng.uniform(0, 180), rng.normal(size=3))
        parts[1].positions += rng.uniform(5.5, 8.0) * np.array([1.0, 0, 0])
        atoms = parts[0] + parts[1]
        atoms.set_initial_charges(truth.numpy())
        x = torch.tensor(atoms.positions, requires_grad=True)
        pairs = coulomb_energies(truth, x, None, 1.0).sum()
        spring = sum((x[a] - x[a + 1]).norm().sub(2.5).square() for a in (0, 2))
        energy = pairs + 2.0 * spring
        (gradient,) = torch.autograd.grad(energy, x)
        atoms.calc = SinglePointCalculator(atoms, energy=energy.item(), forces=-gradient.numpy())
        frames.append(atoms)
    ase.io.write(tmp_path / "train.xyz", frames[:100])
    ase.io.write(tmp_path / "test.xyz", frames[100:])
    errors = {}
    for name in [*known, "none"]:
        cues = [] if name == "latent" else ["initial_charges"]
        model = {**SMALL, "cutoff": 3.0, "electrostatics": name, "core_repulsion": False, "cues": cues}
        training = {"epochs": 240, "learning_rate": 0.01, "batch_size": 5, "device": "cpu", "rollout_steps": 0}
        data = {"train": str(tmp_path / "train.xyz"), "test": str(tmp_path / "test.xyz")}
        values = {"data": data, "model": model, "training": training, "out": str(tmp_path / f"{name}.pt")}
        errors[name] = train(TrainConfig.parse(values), progress=False)[str(tmp_path / "test.xyz")]["forces_rmse"]
    assert all(errors[name] < 0.4 * errors["none"] for name in known)
    bare = Atoms(frames[0].numbers, frames[0].positions)
    pair = SEGNNCalculator(tmp_path / "latent.pt", domain="ignore").get_property("charges", bare)
    assert np.allclose(pair, truth, atol=0.1) or np.allclose(pair, -truth, atol=0.1)
