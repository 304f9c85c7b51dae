"""One calculator in several threads: each gets what is its own."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from helpers.dynamics import config, contents, run
from helpers.potentials import tiny_potential

from segnn_ase import SEGNNCalculator

THREADS = 4


@pytest.fixture(scope="module")
def calc():
    return SEGNNCalculator(tiny_potential(), domain="ignore", accelerate="off")


def structure(k: int) -> Atoms:
    atoms = (molecule("CH3CH2OH"), molecule("CH3COCH3"), molecule("H2O"), bulk("Cu", cubic=True))[k % 4]
    atoms.rattle(0.05, seed=k)
    return atoms


def energy_and_forces(atoms: Atoms, calc) -> tuple:
    atoms = atoms.copy()
    atoms.calc = calc
    stress = atoms.get_stress() if atoms.pbc.all() else np.zeros(6)
    return atoms.get_potential_energy(), atoms.get_forces(), stress, calc.results["forces"]


ASKED = {
    "energy and forces": energy_and_forces,
    "evaluate": lambda atoms, calc: [x["forces"] for x in calc.evaluate([atoms, atoms])],
    "hessian": lambda atoms, calc: (calc.get_hessian(atoms),),
    "descriptors": lambda atoms, calc: (calc.get_descriptors(atoms),),
    "pairs": lambda atoms, calc: calc.get_pairs(atoms),
}


@pytest.mark.parametrize("name", ASKED)
def test_every_thread_gets_what_it_asked_for(calc, name):
    ask, frames = ASKED[name], [structure(k) for k in range(12 if name == "hessian" else 60)]
    right = [ask(atoms, calc) for atoms in frames]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda atoms: ask(atoms, calc), frames))
    for one, other in zip(found, right, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_allclose(x, y, atol=1e-9)


def test_runs_in_threads_with_one_calculator(calc, tmp_path):
    def simulate(name: str, k: int) -> list[bytes]:
        atoms = structure(k)
        atoms.calc = calc
        settings = config(tmp_path / f"{name}{k}", ensemble="langevin", timestep=0.2, steps=10, log_every=1)
        run(atoms, settings)
        return [np.loadtxt(line.split(b",")[:3], dtype=float) for line in contents(settings)[0].splitlines()[1:]]

    alone = [simulate("alone", k) for k in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(lambda k: simulate("together", k), range(THREADS)))
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_new_thread_has_no_results(calc):
    atoms = structure(0)
    atoms.calc = calc
    atoms.get_potential_energy()
    seen = []
    thread = threading.Thread(target=lambda: seen.append((calc.atoms, calc.results)))
    thread.start()
    thread.join()
    assert seen == [(None, {})] and calc.results["energy"] == atoms.get_potential_energy()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda calc: pickle.loads(pickle.dumps(calc))])
def test_a_copy_has_a_lock_and_results_of_its_own(calc, duplicate):
    atoms = structure(0)
    atoms.calc = calc
    energy = atoms.get_potential_energy()
    other = duplicate(calc)
    assert other.lock is not calc.lock and other.results["energy"] == energy
    other.reset()
    assert calc.results["energy"] == energy and other.results == {}


def test_an_error_in_one_thread_does_not_stop_the_others(calc):
    right = energy_and_forces(structure(0), calc)[0]

    def ask(k: int):
        atoms = Atoms("Au") if k % 2 else structure(0)
        try:
            return energy_and_forces(atoms, calc)[0]
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(ask, range(20)))
    np.testing.assert_allclose(found[::2], right)
    assert all("is Au, which this potential does not know" in text for text in found[1::2])
