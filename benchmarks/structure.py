"""Figures of the package's structure: folders, modules, lines, imports, lengths, names.

python benchmarks/structure.py                 # of this checkout
python benchmarks/structure.py BEFORE AFTER    # of several, one column each

Lines are those of the files; a function's are those from its first to its last without its docstring. An import goes
from a module to a module, however many names it takes. A room is a folder, or a module on the top level; imports run
downwards where the room imported from lies on a lower floor of `FLOORS`. Needs nothing but Python.
"""

import argparse
import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import NamedTuple

PACKAGE = "segnn_ase"
FLOORS = (
    "base",
    "structure",
    "model data md",
    "compiled trust check inspection",
    "store",
    "calculator",
    "train verify export engines",
    "dynamics properties learn",
    "prediction drawing spectrum torchsim",
    "commands",
    "cli",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
BEFORE = 12413  # lines before there were folders
LONGEST_MODULE, LONGEST_FUNCTION, LONGEST_CLASS = 450, 60, 200


class Import(NamedTuple):
    importer: str
    module: str  # that is imported
    name: str  # from it; "" where it is the module itself


class Length(NamedTuple):
    lines: int
    where: str


def read_package(checkout: Path) -> dict[str, str]:
    """{module: source}; a folder's own module ends in `.__init__`."""
    files = sorted((checkout / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(checkout).with_suffix("").parts): path.read_text() for path in files}


def room_of(module: str) -> str:
    """The folder of a module, or its own name on the top level; the package itself is "__init__"."""
    return [*module.split("."), "__init__"][1]


def rooms_of(package: Iterable[str]) -> set[str]:
    return {room_of(module) for module in package} - {"__init__"}


def imports_of(importer: str, source: str, modules: Iterable[str]) -> set[Import]:
    """What a module imports from the package, anywhere in its source."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {Import(importer, a.name, "") for a in node.names if a.name.partition(".")[0] == PACKAGE}
        elif isinstance(node, ast.ImportFrom):
            found |= {_imported_from(importer, node, alias.name, modules) for alias in node.names}
    return {i for i in found if i.module.partition(".")[0] in (PACKAGE, "")}


def _imported_from(importer: str, node: ast.ImportFrom, name: str, modules: Iterable[str]) -> Import:
    source = "" if node.level else str(node.module)  # relative imports have no module's name
    inner = f"{source}.{name}"
    return Import(importer, inner, "") if inner in modules else Import(importer, source, name)


def all_imports(package: dict[str, str]) -> set[Import]:
    return {i for module, source in package.items() for i in imports_of(module, source, package)}


def runs_downwards(found: Import) -> bool:
    """Whether the room imported from is this one or lies on a lower floor; everyone may ask for the version."""
    here, there = room_of(found.importer), room_of(found.module)
    if here == there or (there, found.name) == ("__init__", "__version__"):
        return True
    if here == "__init__":
        return there == "base"
    return FLOOR.get(there, len(FLOORS)) < FLOOR.get(here, -1)


def circle(package: dict[str, str], imports: Iterable[Import]) -> list[str]:
    """Modules that import each other, directly or not, and those that need them; empty where there is no circle."""
    needs = {module: {i.module for i in imports if i.importer == module} & set(package) for module in package}
    while free := {module for module, others in needs.items() if not others & needs.keys()}:
        needs = {module: others for module, others in needs.items() if module not in free}
    return sorted(needs)


def floors_in_use(package: dict[str, str], imports: Iterable[Import]) -> int:
    """The length of the longest chain of rooms that import one another."""
    needs: dict[str, set[str]] = {room: set() for room in rooms_of(package)}
    for i in imports:
        if room_of(i.importer) in needs:
            needs[room_of(i.importer)] |= {room_of(i.module)} & needs.keys() - {room_of(i.importer)}
    floors = 0
    while needs:
        free = {room for room, others in needs.items() if not others & needs.keys()} or set(needs)
        needs = {room: others for room, others in needs.items() if room not in free}
        floors += 1
    return floors


def length_of(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines of a definition without its docstring."""
    docstring = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    return _lines(node) - (_lines(docstring) if docstring else 0)


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def lengths(package: dict[str, str], *kinds: type) -> list[Length]:
    """Of every definition of these kinds, shortest first, nested ones too."""
    nodes = ((module, node) for module, source in package.items() for node in ast.walk(ast.parse(source)))
    return sorted(Length(length_of(node), f"{module}.{node.name}") for module, node in nodes if isinstance(node, kinds))


def functions(package: dict[str, str]) -> list[Length]:
    return lengths(package, ast.FunctionDef, ast.AsyncFunctionDef)


def classes(package: dict[str, str]) -> list[Length]:
    return lengths(package, ast.ClassDef)


def module_lengths(package: dict[str, str]) -> list[Length]:
    return sorted(Length(source.count("\n"), module) for module, source in package.items())


def names_in_two_modules(package: dict[str, str]) -> dict[str, list[str]]:
    """{class or function defined on the top level of several modules: those modules}."""
    homes = defaultdict(list)
    for module, source in package.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                homes[node.name].append(module)
    return {name: modules for name, modules in sorted(homes.items()) if len(modules) > 1}


def lines_of_c(checkout: Path) -> int:
    files = [path for path in (checkout / PACKAGE).rglob("*.[ch]")]
    return sum(path.read_text().count("\n") for path in files)


def figures(checkout: Path) -> dict[str, object]:
    """Every figure of a checkout by what it is, in the order of the table."""
    package = read_package(checkout)
    python, c = sum(length.lines for length in module_lengths(package)), lines_of_c(checkout)
    return {
        "folders": len({room_of(m) for m in package if m.count(".") > 1}),
        "modules": len(package),
        "lines of Python": python,
        "lines of C": c,
        f"lines against {BEFORE}": f"{(python + c) / BEFORE - 1:+.1%}",
        **_figures_of_imports(package),
        **_figures_of_lengths(package),
        "names in two modules": len(names_in_two_modules(package)),
    }


def _figures_of_imports(package: dict[str, str]) -> dict[str, object]:
    imports = all_imports(package)
    across = {i for i in imports if room_of(i.importer) != room_of(i.module)}
    wrong = {i for i in across if not runs_downwards(i)}
    placed = rooms_of(package) <= FLOOR.keys()
    return {
        "imports": len({i[:2] for i in imports}),
        "imports across rooms": len({i[:2] for i in across}),
        "pairs of rooms": len({(room_of(i.importer), room_of(i.module)) for i in across}),
        "floors in use": floors_in_use(package, imports),
        "imports upwards or sideways": len({i[:2] for i in wrong}) if placed else "no floors",
        "modules in circles": len(circle(package, imports)),
    }


def _figures_of_lengths(package: dict[str, str]) -> dict[str, object]:
    long = functions(package)
    lines, modules = [length.lines for length in long], module_lengths(package)
    return {
        "functions": len(lines),
        "function, median": round(median(lines)),
        "function, 90 of 100 within": lines[int(0.9 * (len(lines) - 1))],
        "function, longest": _named(long[-1]),
        f"functions above {LONGEST_FUNCTION}": sum(n > LONGEST_FUNCTION for n in lines),
        "class, longest": _named(classes(package)[-1]),
        "module, longest": _named(modules[-1]),
        f"modules above {LONGEST_MODULE}": sum(length.lines > LONGEST_MODULE for length in modules),
    }


def _named(length: Length) -> str:
    return f"{length.lines} {length.where.removeprefix(f'{PACKAGE}.')}"


def print_columns(titles: list[str], columns: list[dict[str, object]]) -> None:
    table = [["", *titles], *([figure, *(str(c[figure]) for c in columns)] for figure in columns[0])]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *rest in table:
        cells = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def print_faults(checkout: Path) -> None:
    """What the figures of one checkout count, by name."""
    package = read_package(checkout)
    for i in sorted(all_imports(package)):
        if not runs_downwards(i):
            print(f"upwards or sideways: {i.importer} imports {i.module} {i.name}".rstrip())
    for name, modules in names_in_two_modules(package).items():
        print(f"in two modules: {name} in {', '.join(modules)}")
    limits = ((functions, LONGEST_FUNCTION), (classes, LONGEST_CLASS), (module_lengths, LONGEST_MODULE))
    for measure, limit in limits:
        for length in measure(package):
            if length.lines > limit:
                print(f"above {limit} lines: {length.where}, {length.lines}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).resolve().parent.parent])
    parser.add_argument("--faults", action="store_true", help="name what is upwards, twice or too long in the last one")
    a = parser.parse_args()
    print_columns([path.resolve().name for path in a.checkouts], [figures(path) for path in a.checkouts])
    if a.faults:
        print_faults(a.checkouts[-1])


if __name__ == "__main__":
    main()
