"""A training whose teacher labels more structures: which ones, by what, and who may be a teacher."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from helpers.frames import emt_atoms, water_frames
from helpers.systems import copper
from helpers.trainings import TINY, configured, leave_out_plots, weights

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import ConfigError
from segnn_ase.data.batches import make_item
from segnn_ase.data.frames import frame_from_atoms
from segnn_ase.model.potential import Potential
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import load_committee, load_with_metadata, save_potential
from segnn_ase.store.shipped import find_model
from segnn_ase.store.tensors import checksum
from segnn_ase.train import loop, teacher
from segnn_ase.train.prepare import prepare
from segnn_ase.train.start import finetune, train


@pytest.fixture(autouse=True, scope="module")
def without_plots():
    with pytest.MonkeyPatch.context() as patch:
        leave_out_plots(patch)
        yield


@pytest.fixture(scope="module")
def committee(tmp_path_factory) -> str:
    """Two potentials of water."""
    config = configured(tmp_path_factory.mktemp("water"), water_frames(12, seed=3), epochs=60, committee=2)
    train(config, progress=False)
    return config.out


def taught(folder, by, **settings):
    """Settings of a training on a few frames, and what a model says of others."""
    folder.mkdir(exist_ok=True)
    images, data = water_frames(8, seed=3), {"teacher": by, "taught": 12}
    return configured(folder, images, data=data, **{"epochs": 2, "accelerate": "off", **settings})


# which structures, and their labels


class Springs(Calculator):
    """Each atom is held at its place by a spring, eV/Å^2."""

    implemented_properties = ("energy", "forces")

    def __init__(self, places: np.ndarray, k: float):
        super().__init__()
        self.places, self.k = places, k

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        x = atoms.positions - self.places
        self.results = {"energy": 0.5 * self.k * np.sum(x**2), "forces": -self.k * x}


@pytest.mark.parametrize("temperature", [300.0, 2000.0])
def test_a_structure_tells_its_temperature(temperature):
    rng, k = np.random.default_rng(0), 5.0
    places = rng.uniform(0, 10, (500, 3))
    atoms = Atoms("Cu500", places + rng.normal(0, (units.kB * temperature / k) ** 0.5, places.shape))
    found = teacher.configurational_temperature(atoms, Springs(places, k), rng)
    assert found == pytest.approx(temperature, rel=4 * (2 / 1500) ** 0.5)  # of a sum of 1500 squares
    cold = teacher.configurational_temperature(Atoms("Cu500", places), Springs(places, k), rng)
    unstable = teacher.configurational_temperature(atoms, Springs(places, -k), rng)
    assert cold == unstable == teacher.COLDEST


def test_labels_are_the_mean_of_the_members(tmp_path, committee):
    job = prepare(taught(tmp_path, committee, model={**TINY, "cutoff": 3.0}), report=lambda _: None)
    (found,) = job.data.beside
    assert job.data.chosen_by == job.data.held_out  # frames alone choose the model
    items = [*found.replayed, *found.held]
    assert found.name == teacher.TAUGHT and len(found.held) >= 2 and found.each_epoch == len(found.replayed)
    places = [item.atoms.positions for item in job.data.train]
    members = [SEGNNCalculator(p, domain="ignore", accelerate="off") for p in load_committee(committee).potentials]
    for item in items:
        assert min(np.abs(item.atoms.positions - x).max() for x in places) > 1e-3  # it has moved
        results = [m.evaluate([item.atoms])[0] for m in members]
        energy, forces = (np.mean([r[name] for r in results], axis=0) for name in ("energy", "forces"))
        assert float(item.labels.energy[0]) == pytest.approx(energy, abs=1e-5)
        assert np.allclose(item.labels.forces, forces, atol=1e-5)


def test_teachers_take_turns_at_the_temperatures_of_the_frames(tmp_path, committee, monkeypatch):
    seen, told = [], []

    def noted(atoms, timestep, temperature, *rest, make=teacher.dynamics_of):
        seen.append((atoms.calc, temperature))
        return make(atoms, timestep, temperature, *rest)

    def known(*arguments, measure=teacher.configurational_temperature):
        told.append(measure(*arguments))
        return told[-1]

    monkeypatch.setattr(teacher, "dynamics_of", noted)
    monkeypatch.setattr(teacher, "configurational_temperature", known)
    job = prepare(taught(tmp_path, committee), report=lambda _: None)
    calculators, temperatures = zip(*seen, strict=True)
    assert len(seen) == len(job.data.train) and list(temperatures) == told and len(set(told)) > 1
    assert len(set(map(id, calculators))) == 2
    assert all(one is not other for one, other in itertools.pairwise(calculators))


def test_periodic_structures_have_a_stress(tmp_path):
    atoms = ase.io.read(find_model("silicon-pbe").parent / "reference.xyz", 1)
    config = configured(tmp_path, [atoms], model={"cutoff": 5.0}, data={"teacher": "silicon-pbe"}, accelerate="off")
    start = make_item(frame_from_atoms(atoms), 5.0)
    again = teacher.Visited(start, 300.0, [frame_from_atoms(atoms.copy())])
    (found,) = teacher.agreed([again], load_committee("silicon-pbe").potentials, 1.0, config)
    assert np.allclose(found.stress, start.labels.stress[0], atol=1e-4)
    assert np.allclose(found.forces, start.labels.forces, atol=1e-3)


def test_structures_on_which_the_members_disagree_are_left_out(tmp_path, committee):
    members, config = load_committee(committee).potentials, taught(tmp_path, committee)
    starts = [make_item(frame_from_atoms(atoms), members[0].cutoff) for atoms in water_frames(8, seed=5)]
    near = [teacher.Visited(start, 300.0, [teacher._unlabelled(start.atoms)]) for start in starts]
    far = starts[0].atoms.copy()
    far.positions *= 0.75
    near[0].frames.append(teacher._unlabelled(far))
    kept = teacher.agreed(near, members, 1e3, config)
    assert len(kept) == 8 and not any(np.allclose(frame.atoms.positions, far.positions) for frame in kept)
    assert len(teacher.agreed(near, members[:1], 1e3, config)) == 9  # nobody is there to disagree
    hot = [one._replace(start=make_item(teacher._unlabelled(far), members[0].cutoff)) for one in near[:1]]
    assert len(teacher.agreed(hot + near[1:], members, 1e3, config)) == 9  # no more than where its dynamics began


# the training


def test_a_taught_training_and_its_table(tmp_path, committee, capfd):
    config = taught(tmp_path, committee)
    errors = train(config, progress=True)
    said = capfd.readouterr()
    assert "labelled by the mean of 2 potentials" in said.out + said.err
    assert errors[teacher.TAUGHT]["forces_rmse"] > 0
    potential, metadata = load_with_metadata(config.out)
    assert metadata["training"]["data"]["teacher"] == committee and metadata["errors"].keys() == errors.keys()
    (tmp_path / "alone").mkdir()
    lonely = configured(tmp_path / "alone", water_frames(8, seed=3), epochs=2, accelerate="off")
    train(lonely, progress=False)
    other = load_with_metadata(lonely.out)[0]
    assert checksum(dict(potential.state_dict())) != checksum(dict(other.state_dict()))
    assert len(potential.examples.sizes) == len(other.examples.sizes)  # of its frames, not of the teacher's
    assert potential.reference_energies == other.reference_energies


def test_a_committee_has_one_teacher(tmp_path, committee):
    config = taught(tmp_path, committee, committee=2, epochs=1)
    errors = train(config, progress=False)
    assert errors[teacher.TAUGHT]["forces_rmse"] > 0 and len(load_committee(config.out).potentials) == 2


def test_it_goes_on_to_the_same_bits_with_the_same_teacher_only(tmp_path, committee, monkeypatch):
    whole, parts = (taught(tmp_path / name, committee, epochs=3) for name in ("whole", "parts"))
    train(whole, progress=False)
    steps = []

    def killed(*arguments, step=loop.next_step):
        steps.append(step(*arguments))
        if len(steps) == 5:
            raise MemoryError
        return steps[-1]

    monkeypatch.setattr(loop, "next_step", killed)
    with pytest.raises(MemoryError):
        train(parts.model_copy(update={"training": parts.training.model_copy(update={"save_minutes": 0.0})}))
    one = str(tmp_path / "one.pt")
    save_potential(one, load_committee(committee).potentials[0])
    with pytest.raises(ConfigError, match=r"belongs to a training with .*data\.teacher"):
        train(taught(tmp_path / "parts", one, epochs=3), progress=False)
    train(parts, progress=False)
    ends = [weights(config.out) for config in (whole, parts)]
    assert checksum(ends[0]) == checksum(ends[1])


# who may be a teacher


def test_a_teacher_knows_all_elements(tmp_path, committee):
    config = configured(tmp_path, emt_atoms(4, copper), data={"teacher": committee})
    with pytest.raises(ConfigError, match="knows H, O; the frames have Cu, too: expected a potential of all"):
        train(config, progress=False)


def test_a_teacher_learned_the_same_labels(tmp_path, committee):
    potential = load_committee(committee).potentials[0]
    potential.dispersion = "d3bj:pbe"
    path = str(tmp_path / "dispersed.pt")
    save_potential(path, potential)
    with pytest.raises(ConfigError, match=r"dispersion 'd3bj:pbe' was taken off, .* is None; expected the same"):
        train(taught(tmp_path, path), progress=False)


def test_dynamics_of_a_teacher_that_knows_nothing_of_the_frames(tmp_path, committee, monkeypatch):
    monkeypatch.setattr(teacher, "nearest_of", lambda *_: 0.0)  # atoms meet
    with pytest.raises(ConfigError, match=r"teacher.*: 0 structures of its dynamics can be learned, expected two"):
        train(taught(tmp_path, committee), progress=False)


def test_a_teacher_of_other_labels(tmp_path):
    with pytest.raises(ConfigError, match=r"'water-pbe0', whose energies of the training frames are off by 1[5-6]\d"):
        train(taught(tmp_path, "water-pbe0"), progress=False)


def test_a_teacher_whose_energies_jump(tmp_path):
    path = str(tmp_path / "published.pt")
    save_potential(path, Potential(model_config("segnn2022", hidden_irreps="4x0e+4x1o", cutoff=3.0), [1, 8]))
    with pytest.raises(ConfigError, match=r"'data.teacher' is .*, whose energies jump"):
        train(taught(tmp_path, path), progress=False)


def test_a_teacher_is_not_overwritten(tmp_path, committee):
    before = Path(committee).read_bytes()
    for name, members in (("model.pt", 1), ("model.pt", 2), ("model.2.pt", 2), ("model.1.last.pt", 2)):
        shutil.copy(committee, tmp_path / name)
        with pytest.raises(ConfigError, match=rf"'data\.teacher' is .*{name}'.*would overwrite; expected another out"):
            train(taught(tmp_path, str(tmp_path / name), committee=members), progress=False)
        assert (tmp_path / name).read_bytes() == before


def test_large_frames_are_fewer():
    def starts(n: int, atoms: int) -> list:
        return [SimpleNamespace(atoms=[0] * atoms)] * n

    assert teacher.usual_number(starts(5, 9)) == 50
    assert teacher.usual_number(starts(400, 15)) == 500
    assert teacher.usual_number(starts(400, 192)) == 104
    assert teacher.usual_number(starts(0, 1)) == 2


def test_what_is_refused(tmp_path, committee):
    with pytest.raises(ConfigError, match=r"'data.taught' is 5, but there is no data.teacher"):
        train(configured(tmp_path, water_frames(4), data={"taught": 5}), progress=False)
    with pytest.raises(FileNotFoundError, match="nobody"):
        train(taught(tmp_path, "nobody.pt"), progress=False)
    config = taught(tmp_path, committee, model={})
    first = str(tmp_path / "first.pt")
    save_potential(first, load_committee(committee).potentials[0])
    for name in ("teacher", "taught"):
        data = config.data.model_copy(update={"teacher": None, "taught": None, name: getattr(config.data, name)})
        with pytest.raises(ConfigError, match=rf"'data.{name}' is .*: fine-tuning has no teacher.*finetune.structures"):
            finetune(first, config.model_copy(update={"data": data}), progress=False)
