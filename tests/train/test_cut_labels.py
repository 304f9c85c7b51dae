"""Forces that are masked have no effect on a training; two sources are told where a model is evaluated."""

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from helpers.command_line import segnn
from helpers.frames import emt_atoms
from helpers.systems import copper
from helpers.trainings import configured, history, weights

from segnn_ase.train.start import train


def masked(value: float) -> list[Atoms]:
    """Crystals whose first two atoms have forces of this value, which do not count."""
    images = []
    for atoms in emt_atoms(8, copper):
        forces = atoms.calc.results["forces"].copy()
        forces[:2] = value
        atoms.calc = SinglePointCalculator(atoms, **{**atoms.calc.results, "forces": forces})
        atoms.info["forces_mask"] = np.array([0, 0, 1, 1])
        images.append(atoms)
    return images


def test_masked_forces_change_no_weight(tmp_path):
    errors, found = [], []
    for value in (0.3, -700.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        config = configured(folder, masked(value), tensorboard=False)
        errors.append(train(config, progress=False))
        found.append(weights(config.out))
        assert all(np.isfinite(float(row["valid_forces_rmse"])) for row in history(config.out))
    assert errors[0] == errors[1] and errors[0]["train"]["forces_rmse"] < 10
    assert all((a == b).all() for a, b in zip(found[0].values(), found[1].values(), strict=True))


@pytest.mark.parametrize("away", [0.0, 2.0])
def test_evaluation_tells_of_two_sources(tmp_path, monkeypatch, away):
    monkeypatch.chdir(tmp_path)
    images = emt_atoms(4, copper)
    train(configured(tmp_path, images, epochs=1), progress=False)
    for atoms in images:
        atoms.info["REF_energy"] = atoms.calc.results["energy"] + away
    ase.io.write("b.xyz", images)
    result = segnn("evaluate", "model.pt", "b.xyz")
    assert ("calculator energy, too, up to 500 meV/atom away" in result.stdout) == bool(away)
