"""A run goes on with the same potential and the same files only, and says what is another one."""

import os
import shutil
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import LinearCombinationCalculator, SumCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCom
from helpers.dynamics import Morse, config, contents, crystal, run, state
from helpers.potentials import tiny_potential

from segnn_ase import SEGNNCalculator, save_potential
from segnn_ase.base.errors import ConfigError, MDError, SEGNNError
from segnn_ase.md.subject import forces_std, outside_domain

SILENT = {"domain": "ignore", "accelerate": "off"}


def water(calc, *constraints, charges=None, moments=None) -> Atoms:
    atoms = molecule("H2O")
    atoms.calc = calc
    atoms.set_constraint(list(constraints))
    atoms.set_initial_charges(charges)
    atoms.set_initial_magnetic_moments(moments)
    return atoms


def tiny(seed=0):
    return SEGNNCalculator(tiny_potential(seed), **SILENT)


def lennard_jones(**settings):
    return LennardJones(**{"rc": 5.0, "sigma": 1.0, "epsilon": 0.1, **settings})


def summed(*calcs, weights=None):
    return LinearCombinationCalculator(list(calcs), list(weights)) if weights else SumCalculator(list(calcs))


def rattled() -> Atoms:
    atoms = crystal()
    atoms.rattle(0.05, seed=1)
    return atoms


# what the run was begun with, what it is gone on with, what is said
OTHERS = {
    "potential": (lambda: water(tiny()), lambda: water(tiny(1)), r"calculator\.weights was .* and is "),
    "scales": (
        lambda: water(SEGNNCalculator(tiny_potential(), **SILENT)),
        lambda: water(SEGNNCalculator(scaled(tiny_potential()), **SILENT)),
        r"calculator\.weights was",
    ),
    "precision": (
        lambda: water(tiny()),
        lambda: water(SEGNNCalculator(tiny_potential(), dtype="float32", **SILENT)),
        r"calculator\.dtype was '\"float64\"' and is '\"float32\"'",
    ),
    "committee": (
        lambda: water(tiny()),
        lambda: water(SEGNNCalculator([tiny_potential(), tiny_potential(1)], **SILENT)),
        r"calculator\.weights was",
    ),
    "calculator": (lambda: water(tiny()), lambda: water(EMT()), "calculator was 'SEGNNCalculator' and is 'EMT'"),
    "parameter": (
        lambda: water(lennard_jones()),
        lambda: water(lennard_jones(epsilon=0.2)),
        r"calculator\.epsilon was '0\.1' and is '0\.2'",
    ),
    "forces": (rattled, lambda: deeper(rattled()), "there the forces were others, by up to"),
    "part of a sum": (
        lambda: water(summed(tiny(), lennard_jones(sigma=0.9))),
        lambda: water(summed(tiny(), lennard_jones(sigma=1.1))),
        r"calculator 2\.sigma was '0\.9' and is '1\.1'",
    ),
    "weight of a part": (
        lambda: water(summed(tiny(), lennard_jones(), weights=(1, 1))),
        lambda: water(summed(tiny(), lennard_jones(), weights=(1, 0.5))),
        r"calculator 2 was 'LennardJones' and is '0\.5 LennardJones'",
    ),
    "without a part": (
        lambda: water(summed(tiny(), lennard_jones())),
        lambda: water(tiny()),
        "calculator was None and is 'SEGNNCalculator'",
    ),
    "constraint": (
        lambda: water(EMT()),
        lambda: water(EMT(), FixAtoms([0])),
        "constraints was 'none' and is .*FixAtoms",
    ),
    "no constraint": (lambda: water(EMT(), FixAtoms([0])), lambda: water(EMT()), "constraints was .* and is 'none'"),
    "other atoms fixed": (
        lambda: water(EMT(), FixAtoms([0])),
        lambda: water(EMT(), FixAtoms([1])),
        r"constraints was .*\[0\].* and is .*\[1\]",
    ),
    "other constraint": (
        lambda: water(EMT(), FixCom()),
        lambda: water(EMT(), FixBondLength(0, 1)),
        "constraints was .*FixCom.* and is .*FixBondLength",
    ),
    "charges": (lambda: water(EMT()), lambda: water(EMT(), charges=[-1, 1, 0]), "charges was 'none' and is"),
    "moments": (lambda: water(EMT(), moments=[1, 0, 0]), lambda: water(EMT()), "magnetic moments was .* and is 'none'"),
    "atoms": (lambda: water(EMT()), lambda: heavy(water(EMT())), "the masses of the atoms are others"),
    "order": (lambda: water(EMT()), lambda: water(EMT())[[1, 0, 2]], "the numbers of the atoms are others"),
}


def scaled(potential):
    potential.scales = [1.01 * scale for scale in potential.scales]
    return potential


def deeper(atoms: Atoms) -> Atoms:
    class Deeper(Morse):
        def calculate(self, *arguments, **options):
            super().calculate(*arguments, **options)
            self.results = {name: 1.1 * value for name, value in self.results.items()}

    Deeper.__name__ = "Morse"  # nothing but the forces tells
    atoms.calc = Deeper()
    return atoms


def heavy(atoms: Atoms) -> Atoms:
    atoms.set_masses([18, 2, 2])
    return atoms


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_is_not_gone_on_with_by_another(tmp_path, name):
    begun, other, message = OTHERS[name]
    settings = config(tmp_path, ensemble="langevin", timestep=0.2, steps=4, log_every=1, save_every=1)
    run(begun(), settings)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    atoms = other()
    atoms.calc = atoms.calc or EMT()
    where = state(atoms)
    with pytest.raises(ConfigError, match=rf"restart is .*md\.npz', written by another run: .*{message}") as error:
        run(atoms, settings.model_copy(update={"steps": 8}))
    assert "\n" not in str(error.value) and state(atoms) == where
    assert before == [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    run(begun(), settings.model_copy(update={"steps": 8}))
    assert len(ase.io.read(settings.trajectory, ":")) == 9


def test_what_does_not_change_the_forces_may_be_another(tmp_path):
    """The file's place, the skin, what is said of the domain, other positions."""
    settings = config(tmp_path, steps=4, timestep=0.2)
    for name in ("a.pt", "b.pt"):
        save_potential(tmp_path / name, tiny_potential())
    run(water(SEGNNCalculator(tmp_path / "a.pt", **SILENT)), settings)
    (tmp_path / "a.pt").unlink()
    atoms = water(SEGNNCalculator(tmp_path / "b.pt", skin=0.1, domain="warn", accelerate="off"))
    atoms.rattle(0.1)
    assert run(atoms, settings.model_copy(update={"steps": 8})).steps == 8


# files that others touch while the run goes on


def moved(path: Path) -> None:
    path.rename(path.with_name("old"))


def replaced_by_an_edited_copy(path: Path) -> None:
    """As sed -i does: of the same size, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 8] ^= 1
    path.rename(path.with_name("old"))
    path.write_bytes(data)


def edited_in_place(path: Path) -> None:
    data = path.read_bytes()
    path.with_name("old").write_bytes(data)
    with path.open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"999")


def cut_short(path: Path) -> None:
    shutil.copy(path, path.with_name("old"))
    os.truncate(path, path.stat().st_size * 2 // 3)


def emptied(path: Path) -> None:
    shutil.copy(path, path.with_name("old"))
    path.write_bytes(b"")


def appended(path: Path) -> None:
    shutil.copy(path, path.with_name("old"))
    with path.open("ab") as file:
        file.write(b"more\n")


def made_a_folder(path: Path) -> None:
    path.rename(path.with_name("old"))
    path.mkdir()


TOUCHED = {
    moved: "moved away or removed",
    replaced_by_an_edited_copy: "another file of .* bytes is in its place",
    edited_in_place: "was edited",
    cut_short: r"was cut from \d+ to \d+ bytes",
    emptied: r"was cut from \d+ to 0 bytes",
    appended: "was edited",
    made_a_folder: "it is a folder",
}


@pytest.mark.parametrize("frames", ["md.extxyz", "md.traj"])
@pytest.mark.parametrize("name", ["log", "trajectory"])
@pytest.mark.parametrize("touch", TOUCHED, ids=lambda touch: touch.__name__)
def test_a_file_that_others_touch_stops_the_run_which_goes_on_with_the_old_one(tmp_path, touch, name, frames):
    every = {"log_every": 1, "save_every": 1, "checkpoint_every": 5}
    settings = config(tmp_path / "a", frames, steps=20, **every)
    undisturbed = config(tmp_path / "b", frames, steps=20, **every)
    run(crystal(), undisturbed)
    path = Path(getattr(settings, name))
    with pytest.raises(MDError, match=rf"{path.name}': .*{TOUCHED[touch]}.* the same call goes on from .*md\.npz") as e:
        run(crystal(plan={30: lambda: touch(path)}), settings)
    assert "restore the file" in str(e.value) and "\n" not in str(e.value)
    if touch in (moved, emptied, made_a_folder):  # what the restart file needs is still missing
        with pytest.raises(SEGNNError, match=path.name):
            run(crystal(), settings)
    if path.is_dir():
        path.rmdir()
    path.with_name("old").replace(path)
    run(crystal(), settings)
    if frames == "md.traj":
        read = [[f.positions.tolist() for f in ase.io.read(s.trajectory, ":")] for s in (settings, undisturbed)]
        assert read[0] == read[1] and len(read[0]) == 21
    else:
        assert contents(settings) == contents(undisturbed)


@pytest.mark.parametrize("restart", [True, False])
def test_a_file_that_goes_after_its_last_record_is_missed_in_the_end(tmp_path, restart):
    settings = config(tmp_path, steps=19, save_every=10)
    settings = settings if restart else settings.model_copy(update={"restart": None})
    path = Path(settings.trajectory)
    with pytest.raises(MDError, match=r"md\.extxyz': it was moved away"):
        run(crystal(plan={15: lambda: moved(path)}), settings)


# guards behind sums


def guarded(calc, **guard):
    atoms = crystal()
    atoms.calc = calc
    return run(atoms, config(steps=2, **guard))


class Trusting(Morse):
    """Says how far it trusts itself."""

    def __init__(self, std, ways=()):
        super().__init__()
        self.std, self.ways = std, list(ways)

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        self.results |= {"forces_std": np.full((32, 3), self.std), "outside_domain": self.ways}


class Way:
    reason, help = "too dense", "of high pressure"


@pytest.mark.parametrize(
    "make",
    [
        lambda calc: summed(calc, Morse()),
        lambda calc: summed(Morse(), summed(calc, Morse())),
        lambda calc: summed(Morse(), calc, weights=(1, 0.5)),
    ],
    ids=["sum", "sum in a sum", "weights"],
)
def test_guards_see_through_sums(make):
    assert guarded(make(Trusting(0.1)), max_forces_std=0.2, stop_outside_domain=True).steps == 2
    with pytest.raises(MDError, match=r"forces are uncertain by (2|4) eV/Å"):
        guarded(make(Trusting(4.0)), max_forces_std=1.5)
    with pytest.raises(MDError, match="outside what the potential was trained on: too dense"):
        guarded(make(Trusting(0.1, [Way])), stop_outside_domain=True)
    log = guarded(make(Trusting(4.0, [Way])), log_every=1).log
    assert (log["outside"] == 1).all() and np.isfinite(log["forces_std"]).all()


def test_the_deviations_of_two_parts_add_up():
    calc = summed(Trusting(0.25, [Way]), Trusting(0.5, [Way]), weights=(1.0, -2.0))
    atoms = crystal()
    atoms.calc = calc
    atoms.get_forces()
    np.testing.assert_allclose(forces_std(calc), np.full((32, 3), 1.25))
    assert outside_domain(calc) == [Way, Way]


def test_a_sum_without_trust_and_a_wrapper_are_named():
    class Wrapper(Morse):
        """Of another package, around a potential."""

    for calc, name in ((summed(Morse(), Morse()), "SumCalculator"), (Wrapper(), "Wrapper")):
        with pytest.raises(ConfigError, match=rf"{name} gives no 'forces_std': it is neither a committee"):
            guarded(calc, max_forces_std=1.0)
        with pytest.raises(ConfigError, match=rf"{name} gives no 'outside_domain': .* calculator around it hides it"):
            guarded(calc, stop_outside_domain=True)


def test_a_shipped_potential_in_a_sum_is_guarded():
    atoms = bulk("Si", cubic=True)
    atoms.rattle(0.02, seed=1)
    for limit, stops in ((10.0, False), (1e-6, True)):
        atoms.calc = summed(SEGNNCalculator("silicon-pbe", **SILENT), LennardJones(epsilon=1e-4, sigma=2.2, rc=5.0))
        if stops:
            with pytest.raises(MDError, match="forces are uncertain"):
                run(atoms, config(steps=2, max_forces_std=limit))
        else:
            run(atoms, config(steps=2, max_forces_std=limit))
