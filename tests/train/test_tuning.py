"""Fine-tuning: elements are added, what was known is kept or at least measured, and committees are taken."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.frames import emt_atoms, water_frames
from helpers.systems import copper
from helpers.trainings import configured, leave_out_plots, weights

from segnn_ase.base.errors import ConfigError, DataError
from segnn_ase.calculator import SEGNNCalculator
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.data.references import ReferenceEnergies
from segnn_ase.store.model_file import Committee, load_committee, load_with_metadata, save_committee, save_potential
from segnn_ase.store.tensors import checksum, load_tensors
from segnn_ase.train import loop
from segnn_ase.train.evaluation import evaluate_files
from segnn_ase.train.prepare import read_data
from segnn_ase.train.pull import Pull, add_pull
from segnn_ase.train.settings import TrainConfig
from segnn_ase.train.start import finetune, train
from segnn_ase.train.tuning import all_are_lone, from_trained, shift_beside
from segnn_ase.trust.domain import DomainCheck, merged


@pytest.fixture(autouse=True, scope="module")
def without_plots():
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        yield


@pytest.fixture(scope="module")
def water(tmp_path_factory) -> str:
    """A potential of water."""
    folder = tmp_path_factory.mktemp("water")
    config = configured(folder, water_frames(16), epochs=4)
    train(config, progress=False)
    return config.out


@pytest.fixture(scope="module")
def bare(water, tmp_path_factory) -> str:
    """The same without structures in its file, as the shipped ones."""
    potential, metadata = load_with_metadata(water)
    potential.examples = None
    path = tmp_path_factory.mktemp("bare") / "bare.pt"
    save_potential(path, potential, metadata=metadata)
    return str(path)


def tuning(folder, frames, *, data=None, finetune=None, **settings) -> TrainConfig:
    """Settings of a tiny fine-tuning."""
    config = configured(folder, frames, model={}, data=data, **{"accelerate": "off", **settings})
    return TrainConfig.parse({**config.model_dump(exclude_unset=True), "finetune": finetune or {}})


def oxide(n: int, seed: int = 0) -> list[Atoms]:
    """Copper with oxygen and copper alone, labelled by EMT: the compositions determine both E0."""
    images = emt_atoms(n, copper, seed=seed)

    def with_oxygen() -> Atoms:
        atoms = copper()
        atoms.numbers[0] = 8
        return atoms

    return [*images, *emt_atoms(n, with_oxygen, seed=seed)]


# new elements


def test_an_element_is_added_with_one_command(tmp_path, water, capfd):
    old = str(tmp_path / "water.xyz")  # with hydrogen, which no new frame has
    ase.io.write(old, water_frames(3, seed=1))
    config = tuning(tmp_path, oxide(4), epochs=2, data={"test": old})
    errors = finetune(water, config)
    before = evaluate_files(water, [old])[old]["forces_rmse"]
    assert errors[old]["forces_rmse_before"] == pytest.approx(before, rel=1e-4)
    text = capfd.readouterr().err
    assert "new elements: Cu; they begin with random weights" in text
    assert "rank 3 of 3" in text  # with the water of before
    potential = load_with_metadata(config.out)[0]
    assert potential.symbols == ["H", "O", "Cu"] and potential.domain.closest.shape == (3, 3)
    assert errors["train"]["energy_rmse"] < 1.0  # eV/atom: E0 of copper is found
    atoms = oxide(1, seed=7)[0]
    atoms.calc = SEGNNCalculator(config.out)
    assert np.isfinite(atoms.get_potential_energy())


def test_without_a_step_what_was_known_is_the_same(tmp_path, water):
    config = tuning(tmp_path, emt_atoms(8, copper), epochs=1, learning_rate=1e-12)
    finetune(water, config, progress=False)
    frame = water_frames(1, seed=5)[0]
    forces, energies = [], []
    for model in (water, config.out):
        atoms = Atoms(frame.numbers, frame.positions, calculator=SEGNNCalculator(model, dtype="float64"))
        forces.append(atoms.get_forces()), energies.append(atoms.get_potential_energy())
    np.testing.assert_allclose(forces[0], forces[1], atol=1e-6)
    assert energies[0] == pytest.approx(energies[1], abs=1e-5)


def test_the_domain_of_before_is_a_part_of_the_new_one(tmp_path, water):
    config = tuning(tmp_path, emt_atoms(8, copper), epochs=1)
    finetune(water, config, progress=False)
    old, new = (load_with_metadata(model)[0].domain for model in (water, config.out))
    assert torch.equal(new.closest[:2, :2], old.closest) and torch.isinf(new.closest[2, :2]).all()
    assert new.neighbors[:2].tolist() == old.neighbors.tolist() and new.neighbors[2, 0] > 0
    assert new.surroundings.landscape.fewest.tolist() == [*old.surroundings.landscape.fewest.tolist(), 4]
    for atoms, inside in ((water_frames(1)[0], True), (emt_atoms(1, copper)[0], True), (molecule("OH"), False)):
        mine = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        mine.calc = SEGNNCalculator(config.out, domain="ignore")
        mine.get_potential_energy()
        assert bool(mine.calc.results["outside_domain"]) != inside, atoms
    assert DomainCheck(load_with_metadata(config.out)[0]).novelty is not None


def labelled(symbols: str, energy: float):
    atoms = Atoms(symbols, np.arange(3 * len(Atoms(symbols))).reshape(-1, 3))
    atoms.calc = SinglePointCalculator(atoms, energy=energy)
    return frame_from_atoms(atoms)


def test_what_compositions_leave_open_is_given_to_the_new_element():
    alike = [labelled("CuO2", 5.0), labelled("Cu2O4", 10.0)]
    shift = shift_beside(alike, [], [29])
    assert shift.rank == 1 and shift.values[29] == pytest.approx(5.0, abs=1e-3)
    assert shift.values[8] == pytest.approx(0.0, abs=1e-3)
    told_apart = shift_beside([*alike, labelled("CuO", 6.0)], [], [29])
    assert told_apart.rank == 2 and told_apart.values == {8: pytest.approx(-1.0), 29: pytest.approx(7.0)}


def test_what_compositions_leave_open_leaves_the_energies_of_old_structures_alone():
    water, peroxide = np.array([8, 1, 1]), np.array([8, 8, 1, 1])
    shift = shift_beside([labelled("OH2", 3.0)], [peroxide], []).values
    assert 2 * shift[1] + shift[8] == pytest.approx(3.0, abs=1e-4)
    assert 2 * shift[1] + 2 * shift[8] == pytest.approx(0.0, abs=1e-4)
    told = shift_beside([labelled("OH2", 3.0)], [water], [])  # where they contradict, the new ones are right
    assert 2 * told.values[1] + told.values[8] == pytest.approx(3.0, abs=1e-4) and told.rank == 1


# what was known


def test_a_potential_stores_structures_of_its_training(water):
    found = load_with_metadata(water)[0].examples.atoms()
    assert len(found) == 13 and {str(atoms.symbols) for atoms in found} == {"OH2"}


def test_stored_structures_keep_what_was_known(tmp_path, water, capfd):
    errors, frames = {}, water_frames(8, seed=3)
    for atoms in frames:  # another water: all forces are half as large
        atoms.calc.results["forces"] = 0.5 * atoms.calc.results["forces"]
    for keep in ("old", "nothing"):
        (tmp_path / keep).mkdir()
        settings = {"epochs": 12, "learning_rate": 0.02, "data": {"valid_fraction": 0.0}}
        config = tuning(tmp_path / keep, frames, finetune={"keep": keep}, **settings)
        errors[keep] = finetune(water, config)
    text = capfd.readouterr().err
    assert (
        "13 structures of its own training: 16 of 36 with their copies are learned in an epoch, 4 are measured" in text
    )
    assert "13 structures of its own training: none is learned, 13 are measured" in text
    assert "drift: forces on 4 of 13 structures of its own training changed by" in text
    assert 0 < errors["old"]["drift"]["forces_rmse"] < 0.7 * errors["nothing"]["drift"]["forces_rmse"]
    assert errors["old"]["drift"]["forces_rmse_before"] is None
    domains = {keep: load_with_metadata(tmp_path / keep / "model.pt")[0].domain for keep in errors}
    assert domains["nothing"].frames == 8 < domains["old"].frames  # what was not kept is not claimed


@pytest.mark.parametrize("factor, kept", [(1.0, True), (20.0, False)])
def test_labels_that_contradict_what_is_known_are_not_mixed_with_it(tmp_path, water, capfd, factor, kept):
    frames = water_frames(12)[:8]  # of the training
    for atoms in frames:
        atoms.calc.results["forces"] = factor * atoms.calc.results["forces"]
    finetune(water, tuning(tmp_path, frames, data={"refuse_flaws": False}, epochs=1))
    text = capfd.readouterr().err
    assert ("16 of 36 with their copies are learned in an epoch" in text) == kept
    assert ("seem to be of another level of theory" in text) != kept


def test_old_frames_are_learned_and_measured_before_and_after(tmp_path, water, capfd):
    ase.io.write(tmp_path / "old.xyz", water_frames(24, seed=9))
    settings = {"replay": str(tmp_path / "old.xyz"), "replay_frames": 5}
    config = tuning(tmp_path, emt_atoms(4, copper), finetune=settings, data={"valid_fraction": 0.0})
    errors = finetune(water, config)
    text = capfd.readouterr().err
    assert "24 old frames: 5 of 18 are learned in an epoch, 6 are measured" in text and "rmse before" in text
    ase.io.write(tmp_path / "held.xyz", water_frames(24, seed=9)[::4])
    expected = evaluate_files(water, [str(tmp_path / "held.xyz")])[str(tmp_path / "held.xyz")]
    assert errors["old"]["forces_rmse_before"] == pytest.approx(expected["forces_rmse"], rel=1e-4)
    assert load_with_metadata(config.out)[1]["errors"] == errors and "drift" not in errors


def test_without_anything_old_it_says_so(tmp_path, bare, capfd):
    config = tuning(tmp_path, water_frames(4), epochs=1)
    errors = finetune(bare, config)
    assert "nothing is known of the old data: give --replay or --structures" in capfd.readouterr().err
    assert set(errors) == {"train", "valid"} and errors["train"]["forces_rmse_before"] > 0


def test_structures_without_labels_are_labelled_by_the_potential_as_it_begins(tmp_path, water):
    bare = [Atoms(a.numbers, a.positions) for a in water_frames(8, seed=4)]
    ase.io.write(tmp_path / "bare.xyz", bare)
    moved = water_frames(6, seed=3)
    for atoms in moved:
        atoms.calc.results["energy"] += 30.0  # of another level of theory
    config = tuning(tmp_path, moved, finetune={"structures": str(tmp_path / "bare.xyz")}, epochs=1, learning_rate=1e-12)
    errors = finetune(water, config, progress=False)
    assert errors["drift"]["energy_rmse"] < 1e-5 and errors["drift"]["forces_rmse"] < 1e-5


def test_the_pull_is_the_gradient_of_half_the_squared_distance():
    weights = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    towards = [torch.randn(3, 4, dtype=torch.float64) for _ in weights]
    loss = sum(w.pow(3).sum() for w in weights)
    penalty = sum((w - start).square().sum() for w, start in zip(weights, towards, strict=True))
    expected = torch.autograd.grad(loss + 0.5 * 0.7 * penalty, weights)
    loss = sum(w.pow(3).sum() for w in weights)
    loss.backward()
    add_pull(weights, Pull(0.7, towards))
    for weight, gradient in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


def test_a_strong_pull_holds_the_weights(tmp_path, water):
    distance = []
    for strength in (0.0, 1e3):
        folder = tmp_path / str(strength)
        folder.mkdir()
        settings = {"keep": "nothing", "l2_sp": strength}
        config = tuning(folder, water_frames(8, seed=3), finetune=settings, epochs=8, learning_rate=0.02)
        finetune(water, config, progress=False)
        old, new = weights(water), weights(config.out)
        distance.append(sum(float((new[name] - old[name]).square().sum()) for name in old) ** 0.5)
    assert distance[1] < 0.5 * distance[0]


# going on


def test_a_fine_tuning_that_was_killed_goes_on_to_the_same_bits(tmp_path, water):
    class Killed(BaseException):
        pass

    results = []
    for kill in (None, 3):
        folder = tmp_path / str(kill)
        folder.mkdir()
        settings = {"l2_sp": 0.1, "replay_frames": 4}
        config = tuning(folder, oxide(3), finetune=settings, epochs=3, save_minutes=0.0)
        if kill:
            calls = []

            def step(*args, original=loop.next_step, calls=calls):
                calls.append(1)
                if len(calls) > 3:
                    raise Killed
                return original(*args)

            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                patch.setattr(loop, "next_step", step)
                finetune(water, config, progress=False)
        finetune(water, config, progress=False)
        content = load_tensors(config.out)
        content["metadata"] = None  # has the paths
        results.append(checksum(content))
    assert results[0] == results[1]


def test_other_settings_are_another_fine_tuning(tmp_path, water):
    finetune(water, tuning(tmp_path, water_frames(4), epochs=1), progress=False)
    for change, message in (
        ({"l2_sp": 0.5}, r"finetune.l2_sp = 0.0 \(now 0.5\)"),
        ({"keep": "nothing"}, r"finetune.keep = 'auto' \(now 'nothing'\)"),
        ({"replay_frames": 3}, r"finetune.replay_frames = None \(now 3\)"),
    ):
        with pytest.raises(ConfigError, match=f"belongs to a training with {message}"):
            finetune(water, tuning(tmp_path, None, finetune=change, epochs=1), progress=False)


# what is refused


def test_elements_of_test_frames_alone_are_refused(tmp_path, water):
    ase.io.write(tmp_path / "test.xyz", emt_atoms(2, copper))
    config = tuning(tmp_path, water_frames(4), data={"test": str(tmp_path / "test.xyz")})
    with pytest.raises(DataError, match=r"has Cu .* fine-tune one on frames of those that it lacks"):
        finetune(water, config, progress=False)


def test_nothing_old_cannot_be_kept(tmp_path, bare):
    config = tuning(tmp_path, water_frames(4), finetune={"keep": "old"})
    with pytest.raises(ConfigError, match=r"'finetune.keep' is 'old', but nothing old .* --replay or --structures"):
        finetune(bare, config, progress=False)
    ase.io.write(tmp_path / "one.xyz", water_frames(1, seed=9))
    config = tuning(tmp_path, None, finetune={"keep": "old", "structures": str(tmp_path / "one.xyz")})
    with pytest.raises(ConfigError, match=r"nothing old is there to learn"):
        finetune(bare, config, progress=False)


# committees


def test_a_committee_is_fine_tuned_member_by_member(tmp_path, capfd):
    (tmp_path / "first").mkdir(), (tmp_path / "second").mkdir()
    first = configured(tmp_path / "first", water_frames(8), committee=2, epochs=1)
    train(first, progress=False)
    ase.io.write(tmp_path / "old.xyz", water_frames(8, seed=9))
    settings = {"replay": str(tmp_path / "old.xyz")}
    config = tuning(tmp_path / "second", oxide(3), finetune=settings, epochs=1)
    errors = finetune(first.out, config)
    assert "member 2 of 2" in capfd.readouterr().err
    committee = load_committee(config.out)
    assert [p.symbols for p in committee.potentials] == [["H", "O", "Cu"]] * 2 and committee.factors
    a, b = (p.readout.last.last.weight for p in committee.potentials)
    assert not torch.equal(a, b) and set(errors) == {"valid", "old"}
    assert errors["old"]["forces_rmse_before"] > 0
    other = tuning(tmp_path / "second", None, finetune=settings, committee=3)
    with pytest.raises(ConfigError, match=r"'training.committee' is 3, but .* has 2 potentials, each of which"):
        finetune(first.out, other, progress=False)


def test_a_lone_atom_beside_the_frames_spoils_no_energies(tmp_path, water, capfd):
    """E0 was a fit: with that of atoms in its place the potential does not know energies of its structures."""
    frames = water_frames(8, seed=5)
    alone = [Atoms(symbol) for symbol in "HO"]
    for atoms, energy in zip(alone, (-20.0, -40.0), strict=True):
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
    job = from_trained(
        config := tuning(tmp_path, [*frames, *alone], data={"refuse_flaws": False}),
        read_data(config, lambda text: None, load_with_metadata(water)[0]),
        *load_with_metadata(water),
        lambda text: None,
    )
    (own,) = [some for some in job.data.beside if some.name == "drift"]
    assert own.replayed and all(not torch.isfinite(item.labels.energy).any() for item in own.replayed)
    assert all(torch.isfinite(item.labels.forces).all() for item in own.replayed)


def test_the_start_is_not_overwritten(tmp_path, water):
    content = Path(water).read_bytes()
    config = tuning(tmp_path, water_frames(4)).model_copy(update={"out": water})
    with pytest.raises(ConfigError, match="which this training would overwrite; expected another out"):
        finetune(water, config, progress=False)
    both = str(tmp_path / "both.pt")
    start = load_with_metadata(water)[0]
    save_committee(both, Committee([start, start], dict.fromkeys(("energy", "forces", "stress"), 1.0), {}))
    with pytest.raises(ConfigError, match="which this training would overwrite; expected another out"):
        finetune(both, config.model_copy(update={"out": both}), progress=False)
    Path(tmp_path / "both.1.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="which this training would overwrite; expected another out"):
        finetune(str(tmp_path / "both.1.pt"), config.model_copy(update={"out": str(tmp_path / "both.1.pt")}))
    assert Path(water).read_bytes() == content


@pytest.mark.parametrize(
    ("before", "added", "values", "of_atoms", "after"),
    [
        (True, [], None, False, True),
        (True, [], {1: 0.0, 8: 0.0}, False, True),
        (True, [], {1: 0.1, 8: -0.2}, False, False),  # fitted to energies of molecules
        (True, [], {8: -0.2}, True, True),
        (False, [], {1: 0.1, 8: -0.2}, True, True),
        (False, [], {1: 0.1}, True, False),
        (True, [29], {29: -1.0}, True, True),
        (True, [29], {1: 0.0, 8: 0.0, 29: -1.0}, False, False),
        (True, [29], None, False, False),
    ],
)
def test_whether_energies_of_lone_atoms_are_known(before, added, values, of_atoms, after):
    shift = None if values is None else ReferenceEnergies(values, "", None, None, of_atoms)
    assert all_are_lone([1, 8, *added], shift, added, before=before) is after


def test_a_new_element_without_isolated_atom_is_no_lone_atom(tmp_path, water):
    potential = load_with_metadata(water)[0]
    assert (
        merged(potential.domain._replace(lone_atoms=False), potential.domain._replace(lone_atoms=True)).lone_atoms
        is False
    )


def test_structures_may_carry_labels_that_nobody_reads(tmp_path, water):
    old = water_frames(4, seed=3)
    for atoms in old:
        atoms.info["energy_unit"], atoms.calc.results["energy"] = "cm^-1", np.nan
    ase.io.write(tmp_path / "old.extxyz", old)
    finetune(water, tuning(tmp_path, water_frames(4, seed=5), finetune={"structures": str(tmp_path / "old.extxyz")}))
    assert "drift" in load_with_metadata(tmp_path / "model.pt")[1]["errors"]
