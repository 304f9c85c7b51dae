"""Counts of atoms in XYZ files, before ASE believes them: it reads as many lines, also behind the end of the file."""

from itertools import islice
from pathlib import Path

from ase.io.formats import filetype, open_with_compression

MANY = 1_000_000  # atoms; smaller counts that are wrong take ASE no time
FORMATS = ("extxyz", "xyz")
COLUMNS = 10_000  # of one property


def refuse_impossible_counts(path: "str | Path") -> None:
    """Raise ValueError for an XYZ file with a frame of more atoms than lines follow. Other files are left alone."""
    if filetype(str(path)) not in FORMATS:
        return
    with open_with_compression(str(path)) as file:
        n = 0
        while (line := file.readline()).strip():
            if line.lstrip().startswith("VEC"):
                continue
            try:
                count = int(line)
            except ValueError:  # ASE says what is wrong
                return
            refuse_wide_properties(file.readline(), n)
            following = sum(1 for _ in islice(file, min(max(count, 0), 2**62)))
            if following < count and count > MANY:
                raise ValueError(f"frame {n} says that it has {count} atoms, but {following} lines follow")
            n += 1


def refuse_wide_properties(comment: str, frame: int) -> None:
    """Raise ValueError where a property has absurdly many columns, for which ASE makes room."""
    _, found, text = comment.partition("Properties=")
    for width in text.split()[0].strip("\"'").split(":")[2::3] if found and text.split() else ():
        if width.isdecimal() and (len(width) > 9 or int(width) > COLUMNS):
            raise ValueError(f"frame {frame} says that a property has {width[:20]} columns")
