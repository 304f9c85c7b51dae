"""Data files that say more than they hold, or more than there can be."""

import gzip
import resource
import time
from itertools import pairwise

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from helpers.command_line import assert_one_line_error, segnn

from segnn_ase.base.errors import DataError
from segnn_ase.check.doctor import check
from segnn_ase.data.frames import read_frames

FRAME = "1\nenergy=-1.0\nH 0 0 0\n"
WIDE = "1\nProperties=species:S:1:pos:R:3:forces:R:{} energy=1\nH 0 0 0 1 1 1\n"
GIGANTIC = {
    "count": ("999999999999\n\nH 0 0 0\n", "frame 0 says that it has 999999999999 atoms, but 1 lines follow"),
    "second count": (FRAME + "99999999999\n\nH 0 0 0\n", "frame 1 says that it has 99999999999 atoms, but 1 lines"),
    "count of 400 digits": ("9" * 400 + "\n\nH 0 0 0\n", "frame 0 says that it has 9999"),
    "count of 5000 digits": ("9" * 5000 + "\n\nH 0 0 0\n", "cannot be read by ASE"),
    "count with a sign": ("+99999999999\n\nH 0 0 0\n", "frame 0 says that it has 99999999999 atoms"),
    "count with underscores": ("99_999_999_999\n\nH 0 0 0\n", "frame 0 says that it has 99999999999 atoms"),
    "count alone": ("99999999999", "frame 0 says that it has 99999999999 atoms, but 0 lines follow"),
    "columns": (WIDE.format(999999999), "frame 0 says that a property has 999999999 columns"),
    "columns of 30 digits": (WIDE.format("9" * 30), "frame 0 says that a property has 99999999999999999999 columns"),
    "columns of the second": (FRAME + WIDE.format(10**8), "frame 1 says that a property has 100000000 columns"),
}


def refused_at_once(path, message: str) -> None:
    begin, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=rf"{path.name}' cannot be read by ASE: .*{message}|{message}"):
        read_frames(path)
    assert time.perf_counter() - begin < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


@pytest.mark.parametrize("name", GIGANTIC)
def test_gigantic_counts_are_refused_at_once(tmp_path, name):
    text, message = GIGANTIC[name]
    (tmp_path / "frames.xyz").write_text(text)
    refused_at_once(tmp_path / "frames.xyz", message)
    report = check(tmp_path / "frames.xyz")
    assert any("cannot be read by ASE" in finding.message for finding in report.errors)
    assert_one_line_error(segnn("md", tmp_path / "frames.xyz", "--model", "water-pbe0"), "which ASE cannot read")


@pytest.mark.parametrize("suffix", [".extxyz", ".xyz.gz", ".dat"])
def test_gigantic_counts_by_other_names(tmp_path, suffix):
    path = tmp_path / f"frames{suffix}"
    data = (
        GIGANTIC["count"][0].replace("\n\n", '\nProperties=species:S:1:pos:R:3 Lattice="9 0 0 0 9 0 0 0 9"\n').encode()
    )
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    refused_at_once(path, "frame 0 says that it has 999999999999 atoms|cannot be read")


def test_honest_files_are_read(tmp_path):
    """Large ones too, blanks at the end and vectors behind the atoms."""
    for text in (FRAME * 3, FRAME + "\n\n", "1\nenergy=1\nH 0 0 0\nVEC1 9 0 0\nVEC2 0 9 0\nVEC3 0 0 9\n" * 2):
        (tmp_path / "frames.xyz").write_text(text)
        assert len(read_frames(tmp_path / "frames.xyz")) == text.count("energy")
    ase.io.write(tmp_path / "large.xyz", many := Atoms("H1000", np.random.default_rng(0).random((1000, 3)) * 90))
    (tmp_path / "labelled.xyz").write_text((tmp_path / "large.xyz").read_text().replace("pbc=", "energy=1 pbc="))
    assert len(read_frames(tmp_path / "labelled.xyz")[0].atoms) == len(many)


# labels and elements


def labelled(**labels) -> Atoms:
    atoms = molecule("H2O", cell=[9] * 3, pbc=True)
    atoms.info.update({f"REF_{name}": value for name, value in labels.items() if name != "forces"})
    if "forces" in labels:
        atoms.arrays["REF_forces"] = labels["forces"]
    return atoms


def forces(value: float, atom: int) -> np.ndarray:
    array = np.zeros((3, 3))
    array[atom, 1] = value
    return array


@pytest.mark.parametrize(
    "labels, message",
    [
        ({"energy": 1e300}, r"energy of .*frame 2 \(from REF_energy\) is 1e\+300; expected up to 1e\+12"),
        ({"energy": -1e13}, r"energy of .*frame 2 .* is -1e\+13; expected"),
        ({"energy": 1.0, "forces": forces(1e300, 2)}, r"forces of .*frame 2 .* is 1e\+300 of atom 2; expected up to"),
        ({"energy": 1.0, "forces": forces(-1e20, 0)}, r"forces of .*frame 2 .* is -1e\+20 of atom 0; expected"),
        ({"energy": 1.0, "stress": np.full(6, 1e300)}, r"stress of .*frame 2 .* is 1e\+300; expected up to"),
    ],
)
def test_labels_beyond_all_matter_are_named_by_frame(tmp_path, labels, message):
    ase.io.write(tmp_path / "frames.xyz", [labelled(energy=-1.0)] * 2 + [labelled(**labels)])
    with pytest.raises(DataError, match=message):
        read_frames(tmp_path / "frames.xyz")


@pytest.mark.parametrize("number", [119, 120, 1000, 2**31, -1])
def test_elements_that_are_none_are_named_by_frame(tmp_path, number):
    odd = labelled(energy=-1.0)
    odd.numbers[1] = number
    ase.io.write(tmp_path / "frames.traj", [labelled(energy=-1.0), odd])
    what = f"has the atomic number {number}" if number > 0 else "has no element"
    with pytest.raises(DataError, match=f"frame 1 is no structure: atom 1 {what}"):
        read_frames(tmp_path / "frames.traj")


# XML that unfolds


def entities(levels: int, width: int = 10) -> str:
    names = "abcdefghijklmnop"[:levels]
    first = '<!ENTITY a "' + "x" * 50 + '">'
    rest = "".join(f'<!ENTITY {y} "{f"&{x};" * width}">' for x, y in pairwise(names))
    return f"<?xml version='1.0'?><!DOCTYPE m [{first}{rest}]><modeling>&{names[-1]};</modeling>"


BOMBS = {
    "billion laughs": entities(9),
    "quadratic": f"<!DOCTYPE m [<!ENTITY a '{'x' * 100_000}'>]><modeling>{'&a;' * 20_000}</modeling>",
    "of a file": "<!DOCTYPE m [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><modeling>&a;</modeling>",
    "of itself": "<!DOCTYPE m [<!ENTITY a '&b;'><!ENTITY b '&a;'>]><modeling>&a;</modeling>",
    "deep": "<modeling>" + "<a>" * 100_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_xml_that_unfolds_is_refused(tmp_path, name):
    path = tmp_path / "vasprun.xml"
    path.write_text(BOMBS[name])
    refused_at_once(path, "")
