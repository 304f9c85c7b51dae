"""An exported library seen through ctypes: all at once, and parted among made-up processes."""

import ctypes
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from typing import NamedTuple

import numpy as np
from ase import Atoms

from segnn_ase.structure.graph import edge_vectors, graph_from_atoms

FORWARD, REVERSE = 1, 2
FUNCTIONS = {
    "segnn_open": (c_void_p, [c_char_p, c_char_p, c_size_t]),
    "segnn_close": (None, [c_void_p]),
    "segnn_message": (c_char_p, [c_void_p]),
    "segnn_cutoff": (c_double, [c_void_p]),
    "segnn_n_species": (c_int, [c_void_p]),
    "segnn_symbol": (c_char_p, [c_void_p, c_int]),
    "segnn_species": (c_int, [c_void_p, c_char_p]),
    "segnn_bytes": (c_int, [c_void_p]),
    "segnn_n_cues": (c_int, [c_void_p]),
    "segnn_cue": (c_char_p, [c_void_p, c_int]),
    "segnn_set_threads": (c_int, [c_void_p, c_int]),
    "segnn_n_stages": (c_int, [c_void_p]),
    "segnn_run": (c_int, [c_void_p, c_int]),
    "segnn_exchange": (c_int, [c_void_p, c_int, POINTER(c_size_t)]),
    "segnn_begin": (c_int, [c_void_p, c_int64, c_int64, *[c_void_p] * 4]),
    "segnn_tell": (c_int, [c_void_p, c_void_p]),
    "segnn_get": (c_int, [c_void_p, c_int, c_int64, c_void_p, c_void_p]),
    "segnn_put": (c_int, [c_void_p, c_int, c_int64, c_void_p, c_void_p]),
    "segnn_finish": (c_int, [c_void_p, *[c_void_p] * 5]),
    "segnn_evaluate": (c_int, [c_void_p, c_int64, *[c_void_p] * 9]),
    "segnn_outside": (c_int64, [c_void_p, c_void_p, c_int, c_void_p]),
}


class Results(NamedTuple):
    """eV, eV/Å; virials (n, 3, 3) eV."""

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    virial: np.ndarray
    virials: np.ndarray


def room_for(n: int, n_all: int | None = None) -> Results:
    forces = np.full((n if n_all is None else n_all, 3), np.nan)
    return Results(np.full(1, np.nan), np.full(n, np.nan), forces, np.full((3, 3), np.nan), np.full((n, 3, 3), np.nan))


def pointers(arrays) -> list:
    return [x if x is None else x.ctypes.data for x in arrays]


class Handle:
    """An open potential."""

    def __init__(self, exported):
        self.c = ctypes.CDLL(str(exported.library))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.c, name)
            function.restype, function.argtypes = result, arguments
        error = ctypes.create_string_buffer(256)
        self.s = self.c.segnn_open(str(exported.numbers).encode(), error, len(error))
        if not self.s:
            raise ValueError(error.value.decode())

    def close(self) -> None:
        self.c.segnn_close(self.s)
        self.s = None

    def do(self, name: str, *given) -> None:
        if getattr(self.c, name)(self.s, *given):
            raise ValueError(self.c.segnn_message(self.s).decode())

    @property
    def cutoff(self) -> float:
        return self.c.segnn_cutoff(self.s)

    def species(self, atoms: Atoms) -> np.ndarray:
        return np.array([self.c.segnn_species(self.s, x.encode()) for x in atoms.symbols], dtype=np.intc)

    def pairs(self, atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """first, senders and vectors; some beyond the cutoff too."""
        graph = graph_from_atoms(atoms, self.cutoff + 0.3)
        order = np.argsort(graph.edge_dst.numpy(), kind="stable")
        counts = np.bincount(graph.edge_dst.numpy(), minlength=len(atoms))
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        vectors = edge_vectors(graph).double().numpy()
        return first, graph.edge_src.numpy()[order], np.ascontiguousarray(vectors[order])

    def evaluate(self, atoms: Atoms) -> Results:
        found, given = room_for(len(atoms)), (self.species(atoms), *self.pairs(atoms))
        self.do("segnn_evaluate", len(atoms), *pointers(given), *pointers(found))
        return found._replace(energy=float(found.energy[0]))

    def outside(self, forces: np.ndarray, elsewhere: bool = False) -> tuple[int, np.ndarray]:
        flags = np.full(len(forces), -1, dtype=np.intc)
        forces_at, flags_at = pointers([forces, flags])
        return self.c.segnn_outside(self.s, forces_at, elsewhere, flags_at), flags


def parted(handles: list[Handle], atoms: Atoms, owner: np.ndarray, cues: np.ndarray | None = None) -> Results:
    """As `Handle.evaluate`, with the atoms of `owner` k in handle k, and all others that they see as its ghosts."""
    first, senders, vectors = handles[0].pairs(atoms)
    species, parts = handles[0].species(atoms), []
    for k, handle in enumerate(handles):
        own = np.flatnonzero(owner == k)
        rows = np.concatenate([np.arange(first[i], first[i + 1]) for i in own] or [[]]).astype(np.int64)
        ghosts = np.setdiff1d(senders[rows], own)
        known = np.concatenate([own, ghosts]).astype(np.int64)
        local = np.zeros(len(atoms), dtype=np.int64)
        local[known] = np.arange(len(known))
        starts = np.concatenate([[0], np.cumsum(np.diff(first)[own])]).astype(np.int64)
        given = [species[known], starts, local[senders[rows]], np.ascontiguousarray(vectors[rows])]
        handle.do("segnn_begin", len(own), len(known), *pointers(given))
        if cues is not None:
            told = np.ascontiguousarray(cues[known])
            handle.do("segnn_tell", told.ctypes.data)
        parts.append((handle, own, known))
    for stage in range(handles[0].c.segnn_n_stages(handles[0].s)):
        for handle, *_ in parts:
            handle.do("segnn_run", stage)
        _exchange(parts, stage, len(atoms))
    total = room_for(len(atoms))
    energy, virial, forces = 0.0, np.zeros((3, 3)), np.zeros((len(atoms), 3))
    for handle, own, known in parts:
        found = room_for(len(own), len(known))
        handle.do("segnn_finish", *pointers(found))
        energy, virial = energy + float(found.energy[0]), virial + found.virial
        np.add.at(forces, known, found.forces)
        total.energies[own], total.virials[own] = found.energies, found.virials
    return total._replace(energy=energy, virial=virial, forces=forces)


def _exchange(parts: list, stage: int, n: int) -> None:
    size = c_size_t()
    direction = parts[0][0].c.segnn_exchange(parts[0][0].s, stage, byref(size))
    if not direction:
        return
    for handle, own, known in parts:  # from here ...
        mine = np.arange(len(own)) if direction == FORWARD else np.arange(len(own), len(known))
        buffer = np.zeros((len(mine), size.value), dtype=np.uint8)
        handle.do("segnn_get", stage, len(mine), *pointers([mine.astype(np.intc), buffer]))
        for other, its_own, its_known in parts:  # ... to there
            theirs = its_known[len(its_own) :] if direction == FORWARD else its_own
            there = {atom: k + (len(its_own) if direction == FORWARD else 0) for k, atom in enumerate(theirs)}
            both = [(row, there[atom]) for row, atom in enumerate(known[mine]) if atom in there]
            if both:
                rows, to = (np.array(x) for x in zip(*both, strict=True))
                sent = np.ascontiguousarray(buffer[rows])
                other.do("segnn_put", stage, len(to), *pointers([to.astype(np.intc), sent]))
