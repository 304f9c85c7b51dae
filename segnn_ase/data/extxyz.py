"""Extended XYZ as people write it: keys in another case, and what ASE would drop without a word."""

import io
import re
from collections.abc import Iterable, Iterator

from ase.io.formats import get_compression, open_with_compression

from segnn_ase.base.errors import DataError

HEADER = ("Lattice", "Properties", "pbc")
COLUMNS = {name.lower(): name for name in ("species", "pos", "symbols", "positions", "numbers", "Z")}
CELLS = r"cell|box|unit_?cell|lattice_?vectors|lattice_?parameters|abc"


def is_extxyz(name: str) -> bool:
    return get_compression(name)[0].lower().endswith((".xyz", ".extxyz"))


def open_extxyz(name: str) -> io.StringIO:
    """The text of a file, headers as ASE reads them. Raises DataError where ASE would drop a cell or columns."""
    with open_with_compression(name) as file:
        return io.StringIO("".join(tidied(file, name)))


def tidied(lines: Iterable[str], name: str) -> Iterator[str]:
    """Go through frames; what is none is passed on, for ASE to complain of."""
    lines, number = iter(lines), 0
    for count in lines:
        yield count
        if not count.strip().isdecimal():
            continue  # the vectors that may follow a frame
        comment, first = next(lines, ""), next(lines, "") if int(count) else ""
        yield tidy_header(comment, first, f"{name}, frame {number}")
        yield first
        number += 1
        for _ in range(int(count) - 1):
            yield next(lines, "")


def tidy_header(comment: str, first: str, where: str) -> str:
    """A comment line with the keys as ASE knows them. first: the line of the first atom."""
    for key in HEADER:
        if not re.search(rf"(^|\s){key}\s*=", comment):
            comment = re.sub(rf"(^|\s){key}(\s*=)", rf"\g<1>{key}\2", comment, count=1, flags=re.IGNORECASE)
    found = re.search(r"""(^|\s)Properties\s*=\s*["']?([^\s"']+)""", comment)
    fields = found[2].split(":") if found else "species:S:1:pos:R:3".split(":")
    if found:
        fields[::3] = [COLUMNS.get(field.lower(), field) for field in fields[::3]]
        comment = comment[: found.start(2)] + ":".join(fields) + comment[found.end(2) :]
    check_columns(fields, first, where)
    other = re.search(rf"""(?:^|\s)({CELLS})\s*=\s*["'\[{{]""", comment, flags=re.IGNORECASE)
    if other and not re.search(r"(^|\s)(Lattice|pbc)\s*=", comment):
        raise DataError(f'{where} has a {other[1]}, but no Lattice: write it as Lattice="ax ay az bx by bz cx cy cz"')
    return comment


def check_columns(fields: list[str], first: str, where: str) -> None:
    """Raise DataError where there are no positions or more columns than names, which ASE would not say."""
    sizes = fields[2::3]
    if not all(size.isdecimal() for size in sizes):
        return  # ASE says so
    if not {"pos", "positions"} & set(fields[::3]):
        raise DataError(f"{where} has no positions: Properties={':'.join(fields)} names no pos:R:3")
    columns, named = len(first.split()), sum(map(int, sizes))
    if columns > named:
        raise DataError(
            f"{where} has {columns} columns, but Properties={':'.join(fields)} names {named}: name the others, as in "
            "Properties=species:S:1:pos:R:3:forces:R:3"
        )
