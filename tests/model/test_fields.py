"""T18 for a uniform electric field: its conjugates are exact, symmetric, and obey the sum rules."""

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet
from helpers.systems import rattled

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError, StructureError
from segnn_ase.compiled.choose import choose_evaluator, choose_loss_gradient
from segnn_ase.data.batches import collate_items, make_item
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.data.pulled import without_pull
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator, with_born
from segnn_ase.model.responses import nearest_branch
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import load_potential, save_potential
from segnn_ase.structure.cue_settings import Cue
from segnn_ase.structure.cues import told
from segnn_ase.structure.graph import Graph, collate, graph_from_atoms, with_pairs
from segnn_ase.structure.ions import net_charge
from segnn_ase.train.loss import loss_of
from segnn_ase.train.potential_goal import some_directions
from segnn_ase.train.settings import OptimConfig

FIELD = np.array([0.1, -0.2, 0.05])
SMALL = {"hidden_irreps": "8x0e+8x1o+4x2e", "radial_hidden": (8,), "n_radial": 4, "cutoff": 3.5, "lmax_attr": 2}


def potential_for(*more: str, dtype=torch.float64, told_to: Atoms | None = None, **settings) -> Potential:
    config = model_config(cues=["external_field", *more], **{**SMALL, **settings})
    potential = Potential(config, [8, 12], scales=[0.1, 0.1], reference_energies=[-1.0, -2.0])
    potential.responses.scales[:] = torch.tensor([0.7, 1.3])
    potential.responses.usual[:] = torch.tensor([1.0, 2.0])
    atoms = with_moments(crystal()) if "initial_magmoms" in more else crystal()
    potential.calibrate(graph_of(potential, atoms if told_to is None else told_to))
    return potential.to(dtype)


def graph_of(potential: Potential, atoms: Atoms) -> Graph:
    return told(with_pairs(graph_from_atoms(atoms, potential.cutoff)), atoms, potential.config.cues)


def in_field(atoms: Atoms, field=FIELD) -> Atoms:
    atoms = atoms.copy()
    atoms.info["external_field"] = np.array(field)
    return atoms


def crystal() -> Atoms:
    return in_field(rattled(bulk("MgO", "rocksalt", 4.2, cubic=True)))


def with_moments(atoms: Atoms) -> Atoms:
    atoms.set_initial_magnetic_moments(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    return atoms


def cluster() -> Atoms:
    return in_field(Atoms("Mg3O2", [[0, 0, 0], [2.1, 0.3, 0], [0.8, 2.0, 0.4], [1.1, 0.9, 1.6], [2.4, 2.3, 1.1]]))


@pytest.fixture(params=["off", "require"])
def calculator(request):
    return SEGNNCalculator(potential_for(), accelerate=request.param)


def found(calc: SEGNNCalculator, name: str, atoms: Atoms):
    return calc.get_property(name, atoms.copy())


def slope(of, h: float):
    return (of(-2 * h) - 8 * of(-h) + 8 * of(h) - of(2 * h)) / (12 * h)


@pytest.mark.parametrize("make", [crystal, cluster])
@pytest.mark.parametrize("mirrored", [False, True])
def test_T18a_a_field_turns_with_the_atoms(calculator, make, mirrored):
    atoms = make()
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))
    q *= (-1 if mirrored else 1) * np.linalg.det(q)
    turned = in_field(atoms, FIELD @ q.T)
    turned.set_cell(turned.cell.array @ q.T)
    turned.positions = turned.positions @ q.T
    assert found(calculator, "energy", turned) == pytest.approx(found(calculator, "energy", atoms), abs=1e-10)
    for name in ("forces", "dipole"):
        assert np.allclose(found(calculator, name, turned), found(calculator, name, atoms) @ q.T, atol=1e-9)
    assert np.allclose(
        found(calculator, "polarizability", turned), q @ found(calculator, "polarizability", atoms) @ q.T, atol=1e-9
    )
    born = np.einsum("ai,nij,bj->nab", q, found(calculator, "born_effective_charges", atoms), q)
    assert np.allclose(found(calculator, "born_effective_charges", turned), born, atol=1e-9)


@pytest.mark.parametrize("make", [crystal, cluster])
def test_T18c_conjugates_are_derivatives(calculator, make):
    """By finite fields and displacements; of a polynomial of the field they are exact."""
    atoms, u = make(), np.array([0.48, 0.6, 0.64])
    mu, alpha, born = (found(calculator, n, atoms) for n in ("dipole", "polarizability", "born_effective_charges"))
    energies = slope(lambda x: found(calculator, "energies", in_field(atoms, FIELD + x * u)), 1e-2)
    assert u @ mu == pytest.approx(-energies.sum(), abs=1e-9)
    assert np.allclose(slope(lambda x: found(calculator, "dipole", in_field(atoms, FIELD + x * u)), 1e-2), alpha @ u)
    forces = slope(lambda x: found(calculator, "forces", in_field(atoms, FIELD + x * u)), 1e-2)
    assert np.allclose(np.einsum("i,nij->nj", u, born), forces, atol=1e-8)
    v = np.random.default_rng(1).normal(size=(len(atoms), 3))

    def dipole(x):
        moved = atoms.copy()
        moved.positions += x * v
        return found(calculator, "dipole", moved)

    assert np.allclose(np.einsum("nij,nj->i", born, v), slope(dipole, 2e-4), atol=1e-6)


def test_T18d_symmetry_and_sum_rule(calculator):
    for atoms in (crystal(), cluster()):
        alpha, born = (found(calculator, name, atoms) for name in ("polarizability", "born_effective_charges"))
        assert np.array_equal(alpha, alpha.T)
        assert np.abs(born.sum(axis=0)).max() < 1e-9
        assert np.abs(found(calculator, "forces", atoms).sum(axis=0)).max() < 1e-10 * max(1, np.abs(born).max())


def test_T18e_torques_balance(calculator):
    atoms = cluster()
    forces, mu = found(calculator, "forces", atoms), found(calculator, "dipole", atoms)
    torque = np.cross(atoms.positions, forces).sum(axis=0) - np.cross(mu, FIELD)
    assert np.abs(torque).max() < 1e-9 * max(1, np.abs(forces).max())


def test_T18f_a_lone_atom_is_polarized(calculator):
    alone = Atoms("Mg", [[0.1, 0.2, 0.3]])
    assert found(calculator, "energy", alone) == -2.0
    energies = [found(calculator, "energy", in_field(alone, sign * FIELD)) for sign in (1, -1)]
    assert energies[0] == energies[1] != -2.0
    alpha = found(calculator, "polarizability", alone)
    assert np.allclose(alpha, alpha[0, 0] * np.eye(3), atol=1e-12)
    assert energies[0] == pytest.approx(-2.0 - 0.5 * alpha[0, 0] * FIELD @ FIELD, abs=1e-12)


@pytest.mark.parametrize("more", [(), ("initial_magmoms",)])
def test_T18h_energy_is_conserved_in_a_field(more):
    """Also with moments, which stay as they are."""
    atoms = with_moments(cluster()) if more else cluster()
    atoms.calc = SEGNNCalculator(potential_for(*more), accelerate="require", domain="ignore")
    for step in (4, 2):  # fs; the fluctuation falls with the square of the step
        moving = atoms.copy()
        moving.calc = atoms.calc
        rng = np.random.default_rng(0)
        moving.set_velocities(rng.normal(scale=0.01, size=(len(atoms), 3)))
        dynamics, energies = VelocityVerlet(moving, 0.02 * step * units.fs), []
        for _ in range(400 // step):
            dynamics.run(1)
            energies.append(moving.get_total_energy())
        spread = np.std(energies)
        if step == 4:
            before = spread
    assert spread < 0.35 * before


def test_without_a_field_it_is_the_default_and_changes_are_seen():
    calculator, atoms = SEGNNCalculator(potential_for()), crystal()
    atoms.calc = calculator
    before = atoms.get_potential_energy()
    atoms.info["external_field"][2] += 0.1  # in place
    assert atoms.get_potential_energy() != before
    del atoms.info["external_field"]
    without = atoms.get_potential_energy()
    assert found(calculator, "energy", in_field(atoms, np.zeros(3))) == without
    assert np.allclose(atoms.get_dipole_moment(), found(calculator, "dipole", atoms))


@pytest.mark.parametrize("field", [[0.1, 0.2], "x", [0, 0, np.nan], 0.1])
def test_what_is_no_field_is_refused(field):
    atoms = crystal()
    atoms.info["external_field"] = field
    with pytest.raises(StructureError, match="three finite numbers"):
        found(SEGNNCalculator(potential_for()), "energy", atoms)


def ion(charge: int = 1) -> Atoms:
    atoms = cluster()
    atoms.info["charge"] = charge
    return atoms


def test_a_field_pulls_a_net_charge_as_a_whole():
    calculator, shift, here = SEGNNCalculator(potential_for("charge")), np.array([3.0, -7.0, 2.0]), ion(2)
    moved = here.copy()
    moved.positions += shift
    assert np.allclose(found(calculator, "forces", here).sum(axis=0), 2.0 * FIELD, atol=1e-12)
    change = found(calculator, "energy", moved) - found(calculator, "energy", here)
    assert change == pytest.approx(-2.0 * FIELD @ shift, abs=1e-10)
    assert found(calculator, "free_energy", here) == found(calculator, "energy", here)
    assert found(calculator, "energies", here).sum() == pytest.approx(found(calculator, "energy", here), abs=1e-11)
    dipoles = (found(calculator, "dipole", atoms) for atoms in (moved, here))
    assert np.allclose(np.subtract(*dipoles), 2.0 * shift, atol=1e-12)
    assert np.allclose(found(calculator, "born_effective_charges", here).sum(axis=0), 2.0 * np.eye(3), atol=1e-12)


def test_T18c_derivatives_of_an_ion_are_those_of_differences():
    calculator, here, rng = SEGNNCalculator(potential_for("charge")), ion(-1), np.random.default_rng(0)
    u, v = rng.normal(size=3), rng.normal(size=here.positions.shape)

    def stepped(x: float, y: float) -> Atoms:
        atoms = in_field(here, FIELD + x * u)
        atoms.positions += y * v
        return atoms

    by_field = slope(lambda x: found(calculator, "energy", stepped(x, 0.0)), 1e-2)
    assert found(calculator, "dipole", here) @ u == pytest.approx(-by_field, abs=1e-9)
    by_place = slope(lambda y: found(calculator, "energy", stepped(0.0, y)), 1e-3)
    assert np.sum(found(calculator, "forces", here) * v) == pytest.approx(-by_place, abs=1e-7)
    dipoles = slope(lambda y: found(calculator, "dipole", stepped(0.0, y)), 1e-3)
    born = found(calculator, "born_effective_charges", here)
    assert np.allclose(np.einsum("nij,nj->i", born, v), dipoles, atol=1e-7)


def test_labels_of_ions_are_learned_without_the_pull():
    """So that a network, which is the same wherever a structure stands, can learn them."""
    potential = potential_for("charge")
    calculator, here = SEGNNCalculator(potential), ion()
    here.positions += [5.0, 0.0, -3.0]
    names = ("energy", "forces", "dipole", "polarizability", "born_effective_charges")
    results = {name: found(calculator, name, here) for name in names}
    here.calc = SinglePointCalculator(here, **{name: results[name] for name in names[:3]})
    here.info |= {"polarizability": results["polarizability"]}
    here.arrays["born_effective_charges"] = results["born_effective_charges"].reshape(-1, 9)
    (frame,) = without_pull([frame_from_atoms(here)], potential.config.cues)
    item = make_item(frame, potential.cutoff, potential.config.cues)
    said = with_born(PlainEvaluator(potential), item.graph, forces=True, stress=False)
    for name in ("energy", "forces", "dipole", "polarizability", "born"):
        assert torch.allclose(getattr(item.labels, name), getattr(said, name), atol=1e-9), name


def test_derivatives_by_charges_know_the_pull():
    """Where the net charge is their sum, they change what is pulled, also of a neutral structure; labels likewise."""
    crystal_told = crystal()
    crystal_told.set_initial_charges(np.zeros(len(crystal_told)))
    cues = ("initial_charges", "charge"), ("initial_charges",)
    potential = [potential_for(*names, told_to=crystal_told) for names in cues]
    atoms = cluster()
    atoms.positions += [3.0, 1.0, 4.0]
    atoms.set_initial_charges([0.3, -0.1, 0.2, -0.2, -0.2])
    v = np.random.default_rng(0).normal(size=len(atoms))
    for one, whose in zip(potential, (False, True), strict=True):
        calculator = SEGNNCalculator(one)

        def charged(x: float) -> Atoms:
            other = atoms.copy()
            other.set_initial_charges(atoms.get_initial_charges() + x * v)
            return other

        by_charges = slope(lambda x, of=calculator: found(of, "energy", charged(x)), 1e-3)
        label = found(calculator, "electronegativities", atoms)
        assert label @ v == pytest.approx(by_charges, abs=1e-8)
        labelled = atoms.copy()
        labelled.arrays["electronegativities"] = label
        labelled.calc = SinglePointCalculator(labelled, energy=found(calculator, "energy", atoms))
        (frame,) = without_pull([frame_from_atoms(labelled)], one.config.cues)
        taken_off = label - frame.told["arrays", "electronegativities"]
        assert np.allclose(taken_off, -FIELD @ atoms.positions.mean(axis=0) if whose else 0.0)


def test_what_the_net_charge_is():
    atoms = cluster()
    charges = [Cue.model_validate(text) for text in ("initial_charges", "charge,default=1")]
    assert (net_charge(atoms, []), net_charge(atoms, charges), net_charge(atoms, charges[:1])) == (0.0, 1.0, 0.0)
    atoms.set_initial_charges(np.full(5, 0.4))
    assert (net_charge(atoms, []), net_charge(atoms, charges), net_charge(atoms, charges[:1])) == (0.0, 1.0, 2.0)
    for said, charge in ((None, 2.0), (-1, -1.0), (np.array([3.0]), 3.0)):
        atoms.info["charge"] = said
        assert net_charge(atoms, charges[:1]) == charge
    for wrong in (np.nan, "neutral", [1, 2], np.inf):
        atoms.info["charge"] = wrong
        with pytest.raises(StructureError, match=r"charge'\] is .*expected an integer"):
            net_charge(atoms, charges)
        with pytest.raises(StructureError, match=r"charge'\] is .*expected an integer"):
            found(SEGNNCalculator(potential_for()), "energy", Atoms(cluster(), info=atoms.info))


def test_virials_of_a_pulled_ion_are_refused():
    calculator, atoms = SEGNNCalculator(potential_for("charge")), ion()
    for ask in (calculator.get_virials, calculator.get_heat_flux, lambda x: calculator.get_property("stresses", x)):
        with pytest.raises(PropertyNotImplementedError, match="of an ion in a field"):
            ask(atoms)
        assert np.isfinite(ask(in_field(atoms, np.zeros(3)))).all()


def test_a_periodic_net_charge_in_a_field_is_refused():
    calculator, atoms = SEGNNCalculator(potential_for("charge")), ion()
    atoms.pbc, atoms.cell = True, 10 * np.eye(3)
    with pytest.raises(StructureError, match="net charge of 1 e in a field and is periodic"):
        found(calculator, "energy", atoms)
    without = in_field(atoms, np.zeros(3))
    assert found(calculator, "energy", without) != 0.0
    assert found(calculator, "polarizability", without).shape == (3, 3)
    for name in ("dipole", "born_effective_charges"):  # which depend on the choice of the cell
        with pytest.raises(PropertyNotImplementedError):
            found(calculator, name, without)


def test_ions_conserve_energy_in_a_field():
    """As well as a time step of velocity Verlet does, whose error falls with its square; and are pulled away."""

    def errors(timestep: float) -> float:
        atoms = ion()
        atoms.calc = SEGNNCalculator(potential_for("charge"), domain="ignore")
        dynamics, energies = VelocityVerlet(atoms, timestep * units.fs), []
        for _ in range(int(25 / timestep)):
            dynamics.run(1)
            energies.append(atoms.get_total_energy())
        pull = atoms.get_momenta().sum(axis=0) / (25 * units.fs)
        assert np.allclose(pull, FIELD, rtol=1e-6)
        return float(np.ptp(energies))

    assert errors(0.5) / errors(0.25) == pytest.approx(4.0, rel=0.1)


def test_a_batch_may_come_first():
    found = SEGNNCalculator(potential_for()).evaluate([cluster(), crystal()], ("energy", "dipole"))
    for results, atoms in zip(found, (cluster(), crystal()), strict=True):
        for name in ("energy", "dipole"):
            assert np.allclose(results[name], SEGNNCalculator(potential_for()).get_property(name, atoms), atol=1e-6)


def test_features_that_give_no_polarizability_are_refused():
    with pytest.raises(ConfigError, match="1o and 2e"):
        model_config("fast", cues=["external_field"])


@pytest.mark.parametrize("hidden", [SMALL["hidden_irreps"], "6x0e+6x1o+6x2e", "6x0e+6x1o+3x1e+6x2e"])
@pytest.mark.parametrize(
    ("interactions", "dtype"),
    [
        (1, torch.float32),
        (2, torch.float64),
        pytest.param(1, torch.float64, marks=pytest.mark.proof),
        pytest.param(2, torch.float32, marks=pytest.mark.proof),
    ],
)
def test_T16_compiled_code_is_right(hidden, interactions, dtype):
    """Also for pairs within the core, whose repulsion is no part of the dipole."""
    potential = potential_for("charge", dtype=dtype, hidden_irreps=hidden, interactions=interactions)
    close = cluster()
    close.positions[1] = close.positions[0] + [0.3, 0.2, 0.9]
    graphs = [graph_of(potential, a) for a in (crystal(), cluster(), close)]
    evaluator, plain = choose_evaluator(potential, graphs[0], "require"), PlainEvaluator(potential)
    assert evaluator.name == "the network in C"
    graph, tolerance = collate(graphs), 1e-9 if dtype is torch.float64 else 2e-4
    a, b = (with_born(one, graph) for one in (evaluator, plain))
    for name in ("energies", "forces", "dipole", "polarizability", "born", "cue_gradients"):
        x, y = getattr(a, name), getattr(b, name)
        size = max(1.0 if name == "born" else 0.0, float(y.abs().max()))  # charges: what is left of terms of about one
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance * size), name
    assert choose_evaluator(potential, graphs[0], "require", tables=False).name == "compiled layers"
    assert choose_loss_gradient(potential, graphs[0], "require").name == "all passes in C"


def test_files_keep_dipoles(tmp_path):
    potential = potential_for()
    save_potential(tmp_path / "model.pt", potential)
    again = SEGNNCalculator(load_potential(tmp_path / "model.pt"))
    for name in ("energy", "dipole", "polarizability"):
        assert np.array_equal(found(again, name, crystal()), found(SEGNNCalculator(potential), name, crystal()))


def labelled(atoms: Atoms, **labels) -> Atoms:
    atoms = atoms.copy()
    for name, value in labels.items():
        (atoms.arrays if name.startswith("born") else atoms.info)[name] = value
    return atoms


def test_labels_are_read_by_their_names():
    cues, rng = model_config(cues=["external_field"], **SMALL).cues, np.random.default_rng(0)
    mu, alpha, born = rng.normal(size=3), rng.normal(size=(3, 3)), rng.normal(size=(8, 3, 3))
    for dipole, charges in (("dipole", "born_effective_charges"), ("polarization", "born_charges")):
        values = {dipole: mu, "polarizability": alpha.ravel(), charges: born.reshape(8, 9)}
        labels = make_item(frame_from_atoms(labelled(crystal(), energy=1.0, **values)), 3.5, cues).labels
        for name, value in (("dipole", mu[None]), ("polarizability", alpha[None]), ("born", born)):
            assert np.array_equal(getattr(labels, name), value)
    nothing = make_item(frame_from_atoms(labelled(crystal(), energy=1.0, dipole=mu)), 3.5).labels
    assert bool(nothing.dipole.isnan().all())  # of who is not told of fields
    with pytest.raises(Exception, match="dipole has shape"):
        make_item(frame_from_atoms(labelled(crystal(), energy=1.0, dipole=[1.0, 2.0])), 3.5, cues)


def test_dipoles_of_cells_count_up_to_lattice_vectors():
    """Those along which they repeat: along none of a molecule in a box, and not across a slab."""
    atoms, rng = crystal(), np.random.default_rng(0)
    atoms.set_cell(atoms.cell.array @ [[1.0, 0.2, 0.1], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]], scale_atoms=True)
    mu = torch.as_tensor(rng.normal(size=(1, 3)))
    label = mu + torch.tensor([[3.0, -2.0, 7.0]], dtype=torch.float64) @ torch.as_tensor(atoms.cell.array)
    graph = graph_from_atoms(atoms, 3.5)
    assert torch.allclose(nearest_branch(label, mu, graph), mu)
    assert bool(nearest_branch(label * torch.nan, mu, graph).isnan().all())
    atoms.pbc = False
    assert torch.equal(nearest_branch(label, mu, graph_from_atoms(atoms, 3.5)), label)
    in_plane = mu + torch.tensor([[3.0, -2.0, 0.0]], dtype=torch.float64) @ torch.as_tensor(atoms.cell.array)
    atoms.pbc = (True, True, False)
    for vacuum in (atoms.cell[2], 3 * atoms.cell[2], np.zeros(3)):
        atoms.cell[2] = vacuum
        slab = graph_from_atoms(atoms, 3.5)
        assert torch.allclose(nearest_branch(in_plane, mu, slab), mu)
        across = torch.tensor([[0.0, 0.0, 7.0]], dtype=torch.float64)
        assert torch.allclose((nearest_branch(mu + across, mu, slab) - mu)[0, 2], across[0, 2])


def test_directions_of_born_charges_are_unbiased_and_the_same_for_the_same_weights():
    """Over directions the loss of a step is that of all components."""
    potential = potential_for()
    rng = np.random.default_rng(0)
    frames = [labelled(a, energy=1.0, born_charges=rng.normal(size=(len(a), 9))) for a in (crystal(), cluster())]
    batch = collate_items([make_item(frame_from_atoms(a), 3.5, potential.config.cues) for a in frames])
    first = some_directions(potential, batch)
    assert torch.equal(first, some_directions(potential, batch))
    settings = OptimConfig(energy_weight=0.0, forces_weight=1e-9, born_weight=2.0)
    plain, losses = PlainEvaluator(potential), []
    for k in range(300):
        with torch.no_grad():
            potential.readout.last.last.weight[0] += 1e-3
        along = some_directions(potential, batch)
        assert k or not torch.equal(first, along)
        losses.append(float(loss_of(plain(batch.graph, along=along), batch.graph, batch.labels, settings, along)))
    expected = float(loss_of(with_born(plain, batch.graph), batch.graph, batch.labels, settings))
    assert np.mean(losses) == pytest.approx(expected, abs=4 * np.std(losses) / 300**0.5)
    assert (
        some_directions(potential, batch._replace(labels=batch.labels._replace(born=batch.labels.born * torch.nan)))
        is None
    )


def test_molecule_has_no_dipole_by_symmetry():
    potential = potential_for()
    far = Atoms("O2", [[0, 0, 0], [0, 0, 1.2]])
    assert np.abs(found(SEGNNCalculator(potential), "dipole", far)).max() < 1e-12
