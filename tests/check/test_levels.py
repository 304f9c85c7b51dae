"""Two levels of theory are told from two kinds of structures: crystal, surface and melt at one level."""

from functools import cache

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.md.verlet import VelocityVerlet
from ase.units import fs, kB

from segnn_ase.check.doctor import examine
from segnn_ase.check.findings import Finding, Sets
from segnn_ase.data.frames import Frame, frame_from_atoms

SOLIDS = {
    "Cu": (lambda: bulk("Cu", cubic=True), EMT, 300, 4000),
    "Al": (lambda: bulk("Al", cubic=True), EMT, 300, 4000),
    "CuAu": (
        lambda: Atoms("CuAuCuAu", bulk("Cu", cubic=True, a=3.85).positions, cell=[3.85] * 3, pbc=True),
        EMT,
        300,
        5000,
    ),
    "LJ": (
        lambda: bulk("Ar", cubic=True),
        lambda: LennardJones(sigma=3.4, epsilon=0.1, rc=7.0, smooth=True),
        300,
        3000,
    ),
}


def dynamics(atoms: Atoms, calculator, temperature: float, *, warm: int) -> list[Atoms]:
    """A dozen labelled frames at about half the temperature, which the velocities have at the start."""
    atoms, images = atoms.copy(), []
    atoms.calc = calculator
    spread = np.sqrt(2 * temperature * kB * atoms.get_masses())[:, None]
    atoms.set_momenta(spread * np.random.default_rng(0).normal(size=(len(atoms), 3)))
    run = VelocityVerlet(atoms, 4 * fs)
    run.run(warm)
    for _ in range(12):
        run.run(6)
        image = atoms.copy()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}
        image.calc = SinglePointCalculator(image, **results)
        images.append(image)
    return images


@cache
def phases(name: str) -> dict[str, list[Frame]]:
    """Crystal, surface in a vacuum and melt, at one level."""
    build, calculator, cold, hot = SOLIDS[name]
    crystal = build().repeat(2)
    surface, wide = crystal.copy(), crystal.copy()
    surface.cell[2, 2] += 10.0
    wide.set_cell(1.05 * crystal.cell.array, scale_atoms=True)
    images = {
        "crystal": dynamics(crystal, calculator(), cold, warm=30),
        "surface": dynamics(surface, calculator(), cold, warm=30),
        "melt": dynamics(wide, calculator(), hot, warm=120),
    }
    return {
        kind: [frame_from_atoms(atoms, source=f"{kind}.xyz, frame {n}") for n, atoms in enumerate(some)]
        for kind, some in images.items()
    }


PARTS = ("crystal melt", "crystal surface", "surface melt", "crystal surface melt")


def frames_of(name: str, part: str) -> list[Frame]:
    return [frame for kind in part.split() for frame in phases(name)[kind]]


def found_in(frames: list[Frame]) -> list[Finding]:
    return [f for f in examine(Sets(frames)).findings if f.code in ("mixed levels", "energies apart")]


@pytest.mark.parametrize("name", SOLIDS)
def test_phases_of_one_level_are_no_error(name):
    seen = [f for part in PARTS for every in (1, 2) for f in found_in(frames_of(name, part)[::every])]
    assert seen and {f.severity for f in seen} == {"note"}  # the forces do see some of them apart


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", SOLIDS)
def test_two_levels_among_phases(name, part):
    """A third of the frames of every phase has another constant an atom: each of them is named, and no other."""
    frames = frames_of(name, part)
    shifted = [f._replace(energy=f.energy + 0.1 * len(f.atoms)) if n % 3 == 0 else f for n, f in enumerate(frames)]
    (finding,) = found_in(shifted)
    assert (finding.code, finding.severity) == ("mixed levels", "error")
    assert finding.frames == tuple(f.source for f in frames[::3])


def test_ions_are_no_other_level():
    """Where frames say that these energies are of another total charge; without a word they are an error."""
    frames = frames_of(next(iter(SOLIDS)), PARTS[0])
    ions = {
        n: frame._replace(energy=frame.energy + 0.1 * len(frame.atoms)) for n, frame in enumerate(frames) if n % 3 == 0
    }
    for told, severity in (({("info", "charge"): 1}, "note"), (None, "error")):
        some = [ions[n]._replace(told=told) if n in ions else frame for n, frame in enumerate(frames)]
        (finding,) = found_in(some)
        assert finding.severity == severity and (
            "nothing to do where the potential is told (--cues charge)" in finding.advice
        ) is (severity == "note")


def with_another_pair_term(frame: Frame) -> Frame:
    """As another functional: 130 to 300 meV/atom, forces and stress with them, by 20 to 50 less at the surface."""
    atoms = frame.atoms.copy()
    atoms.calc = LennardJones(sigma=1.8, epsilon=0.1, rc=6.0, smooth=True)
    return frame._replace(
        energy=frame.energy + atoms.get_potential_energy(),
        forces=frame.forces + atoms.get_forces(),
        stress=frame.stress + atoms.get_stress(voigt=False),
    )


@pytest.mark.parametrize("name", ["Cu", "Al", "CuAu"])
def test_two_functionals_among_phases(name):
    frames = frames_of(name, "crystal surface melt")
    mixed = [with_another_pair_term(f) if n % 3 == 0 else f for n, f in enumerate(frames)]
    (finding,) = found_in(mixed)
    assert finding.code == "mixed levels"
    assert finding.frames == tuple(f.source for f in frames[::3])
