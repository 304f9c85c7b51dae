"""Structures that a potential can evaluate."""

from ase import Atoms
from ase.data import chemical_symbols

from segnn_ase.base.errors import StructureError, expect
from segnn_ase.model.elements import check_elements
from segnn_ase.model.potential import Potential
from segnn_ase.structure.cues import refuse_sums, told
from segnn_ase.structure.graph import Graph, edge_vectors
from segnn_ase.structure.skin import SkinGraphs

CLOSEST_ALLOWED = 0.05  # Å; nearer than this two atoms are on one spot


def graph_of(atoms: Atoms | None, graphs: SkinGraphs, potential: Potential) -> Graph:
    """The graph of a structure. Raises ConfigError, and StructureError for one that cannot be evaluated."""
    expect(atoms is None or isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
    if atoms is None or len(atoms) == 0:
        raise StructureError("atoms is empty: there is nothing to evaluate")
    check_elements(potential.symbols, potential.species, atoms.numbers)
    if potential.charges is not None:
        refuse_sums(atoms, potential.config.cues, potential.config.electrostatics)  # before anything is chosen by them
    cell = atoms.cell.array
    graph = graphs(atoms.numbers, atoms.positions, cell, atoms.pbc)
    if not graphs.apart(CLOSEST_ALLOWED, cell):
        check_distances(atoms, graph)
    return told(graph, atoms, potential.config.cues)


def check_distances(atoms: Atoms, graph: Graph) -> None:
    squares = edge_vectors(graph).square().sum(1)
    if len(squares) and float(squares.min()) < CLOSEST_ALLOWED**2:
        e = int(squares.argmin())
        ends = (int(graph.edge_dst[e]), int(graph.edge_src[e]))
        a, b = (f"{chemical_symbols[atoms.numbers[k]]} {k}" for k in ends)
        raise StructureError(
            f"atoms {a} and {b} are {float(squares[e]) ** 0.5:.3g} Å apart (less than {CLOSEST_ALLOWED} Å): two atoms "
            "on one spot. Remove duplicates (ase.geometry.get_duplicate_atoms), or check cell and pbc."
        )
