"""Constraints that hold nothing count as none, wherever constraints matter."""

import numpy as np
import pytest
from ase.build import molecule
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixInternals,
    FixScaled,
    Hookean,
)
from helpers.dynamics import VARIANTS, config, contents, crystal, run, state
from helpers.frames import emt_atoms
from helpers.systems import copper

from segnn_ase.base.constraints import without_idle_constraints
from segnn_ase.base.errors import ConfigError
from segnn_ase.check.doctor import check_frames
from segnn_ase.check.findings import Sets
from segnn_ase.data.frames import frame_from_atoms

IDLE = {
    "no atoms": lambda: FixAtoms([]),
    "mask of none": lambda: FixAtoms(mask=[False] * 32),
    "no direction": lambda: FixCartesian([0, 1], mask=(False, False, False)),
    "no atoms in directions": lambda: FixCartesian([]),
    "scaled": lambda: FixScaled([3], mask=(False, False, False)),
    "line": lambda: FixedLine([], (0, 0, 1)),
    "plane": lambda: FixedPlane([], (0, 0, 1)),
    "no bonds": lambda: FixBondLengths(np.zeros((0, 2), int)),
    "no internals": lambda: FixInternals(),
}
ACTING = {
    "atoms": lambda: FixAtoms([2]),
    "direction": lambda: FixCartesian([0], mask=(False, True, False)),
    "scaled": lambda: FixScaled([3], mask=(True, False, False)),
    "line": lambda: FixedLine([1], (0, 0, 1)),
    "bond": lambda: FixBondLengths([(0, 1)]),
    "centre": FixCom,
    "spring": lambda: Hookean(a1=0, a2=1, k=5.0, rt=3.0),
    "internals": lambda: FixInternals(bonds=[[2.5, [0, 1]]]),
}


@pytest.mark.parametrize("name", IDLE)
def test_dynamics_is_that_without(tmp_path, name):
    """The same momenta, degrees of freedom and files; and it goes on with and without."""
    plain, held = crystal(), crystal()
    held.set_constraint(IDLE[name]())
    settings = [config(tmp_path / folder, steps=4, ensemble="bussi", temperature=300) for folder in "ab"]
    run(plain, settings[0])
    run(held, settings[1])
    assert state(plain) == state(held) and len(held.constraints) == 1
    assert contents(settings[0]) == contents(settings[1])
    longer = settings[1].model_copy(update={"steps": 6})
    assert run(crystal(), longer).steps == 6


@pytest.mark.parametrize("variant", ["nhc", "npt", "npt_full"])
def test_ensembles_that_cannot_hold_constraints(tmp_path, variant):
    held = crystal()
    held.set_constraint([FixAtoms([]), FixCartesian([])])
    assert run(held, config(tmp_path, steps=3, temperature=300, **VARIANTS[variant])).steps == 3
    held.set_constraint([FixAtoms([]), FixAtoms([0])])
    with pytest.raises(ConfigError, match="cannot hold constraints"):
        run(held, config(steps=3, temperature=300, **VARIANTS[variant]))


@pytest.mark.parametrize("name", ACTING)
def test_those_that_hold_something(name):
    atoms = crystal()
    atoms.set_constraint([FixAtoms([]), ACTING[name]()])
    before = atoms.constraints
    with without_idle_constraints(atoms):
        assert atoms.constraints == before[1:]
    assert atoms.constraints == before


@pytest.mark.parametrize("name", [name for name in IDLE if "mask" not in name])
def test_forces_of_frames_stay_as_they_are(name):
    frames = []
    for build in (copper, lambda: molecule("CH3CH2OH")):
        for n, atoms in enumerate(emt_atoms(3, build)):
            atoms.calc.results["forces"][0] = 0.0
            atoms.calc.results["forces"] -= atoms.calc.results["forces"].mean(axis=0)
            atoms.set_constraint(IDLE[name]())
            frames.append(frame_from_atoms(atoms, source=f"a.xyz, frame {n}"))
    assert all(np.isfinite(f.forces).all() and f.reading.cut == "" for f in frames)
    assert not [f for f in check_frames(Sets(frames)) if f.code == "constrained forces"]
