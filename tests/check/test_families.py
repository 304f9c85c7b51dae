"""Copies, near copies and blocks of a trajectory stay on one side of a split."""

from collections import Counter

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet
from ase.units import fs, kB
from helpers.frames import emt_atoms
from helpers.systems import rotation, transformed

from segnn_ase.check.doctor import check_frames
from segnn_ase.check.families import families
from segnn_ase.check.findings import Sets
from segnn_ase.data.frames import Frame, frame_from_atoms, split_frames


def framed(images: list[Atoms], energies=None) -> list[Frame]:
    energies = np.zeros(len(images)) if energies is None else energies
    frames = [frame_from_atoms(a, source=f"x.xyz, frame {n}") for n, a in enumerate(images)]
    return [f._replace(energy=float(e)) for f, e in zip(frames, energies, strict=True)]


def moved(atoms: Atoms, size: float) -> Atoms:
    out = atoms.copy()
    out.rattle(size, rng=np.random.default_rng(1))
    return out


def copper() -> Atoms:
    return bulk("Cu", cubic=True).repeat((2, 2, 1))


COPIES = {
    "turned": lambda a: transformed(a, rotation(3), (1.0, 2.0, 3.0)),
    "mirrored": lambda a: transformed(a, rotation(3, improper=True)),
    "permuted": lambda a: a[np.random.default_rng(0).permutation(len(a))],
    "moved": lambda a: moved(a, 0.02),
}


def with_copies(build, copy) -> list[Frame]:
    """Twenty structures with three copies each, shuffled."""
    images = [a for a in emt_atoms(20, build) for a in (a, copy(a), copy(copy(a)))]
    energies = np.repeat(np.arange(20.0), 3)
    order = np.random.default_rng(5).permutation(60)
    return framed([images[n] for n in order], energies[order])


def across(frames: list[Frame], families: list[int] | None, fraction: float = 0.2) -> set[str]:
    """What is told of a split; the number drawn is right to a family."""
    train, valid = split_frames(frames, fraction, 0, families)
    assert len(train) + len(valid) == len(frames)
    assert 0 < len(valid) <= max(1, round(fraction * len(frames)))
    return {f.code for f in check_frames(Sets(train, valid)) if "across" in f.code or f.code == "interleaved split"}


@pytest.mark.parametrize("build", [lambda: molecule("CH3CH2OH"), copper], ids=["molecule", "crystal"])
@pytest.mark.parametrize("copy", COPIES)
def test_copies_stay_together(copy, build):
    """Nothing is told of the split then."""
    frames = with_copies(build, COPIES[copy])
    found = families(frames, 12)
    assert Counter(Counter(found).values()) == {3: 20}
    assert {len({f.energy for f, k in zip(frames, found, strict=True) if k == n}) for n in set(found)} == {1}
    assert across(frames, None) and not across(frames, found)


def copper_dynamics(n: int) -> list[Atoms]:
    atoms, images = copper(), []
    atoms.calc = EMT()
    spread = np.sqrt(1200 * kB * atoms.get_masses())[:, None]
    atoms.set_momenta(spread * np.random.default_rng(0).normal(size=(16, 3)))
    run = VelocityVerlet(atoms, 5 * fs)
    run.attach(lambda: images.append(atoms.copy()))
    run.run(n - 1)
    return images


def test_a_trajectory_is_split_in_blocks():
    frames = framed(copper_dynamics(80))
    found = np.array(families(frames, 16))
    assert "interleaved split" in across(frames, None) and "interleaved split" not in across(frames, found.tolist())
    assert (np.diff(np.flatnonzero(np.diff(found))) >= 9).all()  # contiguous blocks
    assert len(set(found)) == 1 + np.count_nonzero(np.diff(found)) == 8


def test_other_frames_are_drawn_one_by_one():
    frames = framed(emt_atoms(30, lambda: molecule("CH3CH2OH")), np.arange(30))
    assert len(set(families(frames, 3))) == 30
    assert split_frames(frames, 0.2, 3, families(frames, 6)) == split_frames(frames, 0.2, 3)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_sets_of_nothing_but_copies_can_be_split(count):
    """Of ten equal crystals and two others: the equal ones stay in training, if they can."""
    equal = framed([bulk("Cu", cubic=True)] * 10)
    others = framed(emt_atoms(2, lambda: bulk("Cu", cubic=True)), [1.0, 2.0])
    train, valid = split_frames(equal, count / 10, 0, families(equal, count))
    assert not valid and len(train) == 10  # a copy says nothing that is not learned
    train, valid = split_frames(equal + others, count / 12, 0, families(equal + others, count))
    assert {f.energy for f in valid} <= {1.0, 2.0} and len(valid) == min(count, 2)


def test_isolated_atoms_and_empty_sets_have_families():
    assert families([], 0) == []
    assert len(set(families(framed([Atoms("H"), Atoms("H"), Atoms("O")]), 1))) == 3


def test_the_only_frames_of_an_element_are_learned():
    frames = framed([molecule("H2O"), molecule("CO2")], [0.0, 1.0])
    assert split_frames(frames, 0.5, 0)[1] == []
    frames = framed([*emt_atoms(9, lambda: bulk("Cu", cubic=True)), bulk("Au", cubic=True)], np.arange(10))
    for seed in range(10):
        train, valid = split_frames(frames, 0.3, seed)
        assert len(valid) in (2, 3) and any("Au" in f.atoms.symbols for f in train)
        lone = framed([Atoms("Au"), Atoms("Cu")], [0.0, 0.0])
        assert "Au" not in {s for f in split_frames(frames + lone, 0.3, seed)[1] for s in f.atoms.symbols}


def test_what_is_alike_is_drawn_together_where_nothing_is_as_few():
    frames = framed(emt_atoms(8, lambda: bulk("Cu", cubic=True)), np.arange(8))
    train, valid = split_frames(frames, 0.2, 0, [0, 0, 0, 0, 0, 1, 1, 1])
    assert [f.energy for f in valid] == [5, 6, 7] and len(train) == 5
    assert len(split_frames(frames[:1], 0.9, 0)[0]) == 1
