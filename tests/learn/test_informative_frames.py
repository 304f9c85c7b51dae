"""The most informative structures: by the definition, no two of a kind, and `segnn select`."""

import ase.io
import numpy as np
import pytest
from ase.build import bulk
from helpers.command_line import segnn

from segnn_ase import SEGNNCalculator
from segnn_ase.learn.selection import informative, learned_form, select_frames


def information(features, known):
    inner = np.eye(len(features)) + features @ np.linalg.inv(known) @ features.T
    return np.linalg.slogdet(inner)[1] / len(features)


def test_it_is_the_greedy_choice():
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(n, 6)) * rng.uniform(0.1, 2, 6) for n in rng.integers(1, 9, 30)]
    known = np.diag(rng.uniform(0.5, 2.0, 6))
    chosen, gains = informative(features, 12, known)
    so_far = known.copy()
    for n, gain in zip(chosen, gains, strict=True):
        left = [k for k in range(30) if k not in chosen[: chosen.index(n)]]
        best = max(left, key=lambda k: information(features[k], so_far))
        assert n == best and gain == pytest.approx(information(features[n], so_far))
        so_far += features[n].T @ features[n]
    learned = [features[n] for n in chosen[:5]]
    assert informative(features, 7, known, learned)[0] != chosen[:7]
    rest, _ = informative([f for n, f in enumerate(features) if n not in chosen[:5]], 1, known, learned)
    assert [n for n in range(30) if n not in chosen[:5]][rest[0]] == chosen[5]


def test_copies_come_last():
    rng = np.random.default_rng(1)
    kinds = [rng.normal(size=(4, 40)) for _ in range(4)]
    chosen, gains = informative([*kinds, *kinds, *kinds], 12)
    assert {n % 4 for n in chosen[:4]} == {0, 1, 2, 3}
    assert gains == sorted(gains, reverse=True) and gains[3] > 5 * gains[4]
    assert informative([], 3) == ([], []) and len(informative(kinds, 9)[0]) == 4


def test_select_finds_the_odd_ones(tmp_path):
    rng, frames = np.random.default_rng(0), []
    for n in range(30):
        frames.append(bulk("Si", cubic=True))
        frames[-1].positions += (0.5 if n in (7, 19) else 0.03) * rng.normal(size=(8, 3))
        frames[-1].info["mine"] = n
    ase.io.write(tmp_path / "all.xyz", frames)
    told = select_frames("silicon-pbe", tmp_path / "all.xyz", tmp_path / "some.xyz", 5)
    found = [atoms.info["mine"] for atoms in ase.io.read(tmp_path / "some.xyz", ":")]
    assert set(found[:2]) == {7, 19} and len(found) == 5 and "wrote 5 frames" in told[-1]
    assert learned_form(SEGNNCalculator("silicon-pbe")).shape[0] > 10


def test_the_command_and_its_errors(tmp_path):
    frames = [bulk("Si", cubic=True) for _ in range(3)]
    ase.io.write(tmp_path / "all.xyz", frames)
    out = tmp_path / "some.xyz"
    run = ("select", tmp_path / "all.xyz", "--model", "silicon-pbe", "--out", out)
    assert segnn(*run, "--n", 2).exit_code == 0 and len(ase.io.read(out, ":")) == 2
    assert "exists" in segnn(*run, "--n", 2).stderr
    assert "n is 9; expected 1 to 3" in segnn(*run, "--n", 9, "--overwrite").stderr
    assert "ends in .xyz" in segnn(*run[:-1], tmp_path / "some.traj").stderr
    ase.io.write(tmp_path / "gold.xyz", [*frames, bulk("Au", cubic=True)])
    result = segnn("select", tmp_path / "gold.xyz", "--model", "silicon-pbe", "--n", 2, "--out", out, "--overwrite")
    assert result.exit_code == 1 and "gold.xyz, frame 3" in result.stderr and "Au" in result.stderr
