"""An exported library as an evaluator: how it is held against plain PyTorch before it is handed out."""

import ctypes
from ctypes import c_char_p, c_double, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from segnn_ase.base.errors import ModelFileError
from segnn_ase.compiled.choose import CERTAIN, LEEWAY, TABLE_TOLERANCE, thrown_together
from segnn_ase.compiled.guard import Quantity, difference, in_float64
from segnn_ase.export.plan import numbers_of
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import Evaluator, PlainEvaluator, Prediction, stress_of
from segnn_ase.structure.graph import Graph, edge_vectors, graph_from_atoms, sum_over_atoms, within

FUNCTIONS = {  # of segnn.h that are used here: result and arguments
    "segnn_open": (c_void_p, (c_char_p, c_char_p, c_size_t)),
    "segnn_close": (None, (c_void_p,)),
    "segnn_message": (c_char_p, (c_void_p,)),
    "segnn_species": (c_int, (c_void_p, c_char_p)),
    "segnn_cutoff": (c_double, (c_void_p,)),
    "segnn_n_stages": (c_int, (c_void_p,)),
    "segnn_begin": (c_int, (c_void_p, c_int64, c_int64, *[c_void_p] * 4)),
    "segnn_tell": (c_int, (c_void_p, c_void_p)),
    "segnn_run": (c_int, (c_void_p, c_int)),
    "segnn_finish": (c_int, (c_void_p, *[c_void_p] * 5)),
}
EXAMPLES = 3  # of the training structures, on which a library is tried


class LibraryEvaluator(Evaluator):
    """Energies, forces and stress by a library and its numbers. Raises ModelFileError where they cannot be opened.

    potential: that was exported, for its elements and the units of its cues.
    """

    name = "the exported library"

    def __init__(self, library: Path, numbers: Path, potential: Potential):
        self._c = ctypes.CDLL(str(library.resolve()))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        error = ctypes.create_string_buffer(512)
        self._s = self._c.segnn_open(str(numbers).encode(), error, len(error))
        if not self._s:
            raise ModelFileError(error.value.decode(errors="replace"))
        self.elements = PlainEvaluator(potential).elements
        self._cues = np.array([[zero, unit] for _, zero, unit in numbers_of(potential.config.cues)])

    def __del__(self):
        if getattr(self, "_s", None):
            self._c.segnn_close(self._s)

    def _do(self, name: str, *given) -> None:
        pointers = [x.ctypes.data if isinstance(x, np.ndarray) else x for x in given]
        if getattr(self._c, name)(self._s, *pointers):
            raise ValueError(self._c.segnn_message(self._s).decode(errors="replace"))

    def __call__(
        self, graph: Graph, *, forces: bool = True, stress: bool = False, along: Tensor | None = None
    ) -> Prediction:
        n, order = len(graph.numbers), torch.argsort(graph.edge_dst, stable=True)
        kind = self.elements.kinds(graph.numbers).numpy().astype(np.intc)
        first = np.concatenate([[0], np.bincount(graph.edge_dst.numpy(), minlength=n).cumsum()]).astype(np.int64)
        senders = np.ascontiguousarray(graph.edge_src[order].numpy())
        vectors = np.ascontiguousarray(edge_vectors(graph)[order].double().numpy())
        self._do("segnn_begin", n, n, kind, first, senders, vectors)
        if graph.cues is not None and len(self._cues):
            zero, unit = self._cues.T
            self._do("segnn_tell", np.ascontiguousarray(graph.cues.numpy() * unit + zero))
        for stage in range(self._c.segnn_n_stages(self._s)):
            self._do("segnn_run", stage)
        energy, energies, pushes = np.empty(1), np.empty(n), np.empty((n, 3))
        virial, virials = np.empty((3, 3)), np.empty((n, 3, 3))
        self._do("segnn_finish", energy, energies, pushes, virial, virials)
        each = torch.from_numpy(energies)
        found = Prediction(sum_over_atoms(each, graph), each, None, None, None, None)
        if forces:
            found = found._replace(forces=torch.from_numpy(pushes))
        if stress:
            found = found._replace(stress=stress_of(-sum_over_atoms(torch.from_numpy(virials), graph), graph))
        return found


def library_problem(library: Path, numbers: Path, potential: Potential) -> str | None:
    """What a library gives otherwise than plain PyTorch, on some training structures and on atoms thrown together, in
    words, or None."""
    found = LibraryEvaluator(library, numbers, potential)
    exact, plain = PlainEvaluator(in_float64(potential)), PlainEvaluator(potential)
    for k, graph in enumerate(_tried(potential)):
        tolerance = TABLE_TOLERANCE[potential.dtype] * (1 if k else LEEWAY)  # far from all that it has learned
        usual = partial(_energies_and_forces, plain, graph)
        problem = difference(_energies_and_forces(found, graph), usual, _energies_and_forces(exact, graph), tolerance)
        if problem is not None:
            return problem
    return None


def _tried(potential: Potential) -> list[Graph]:
    found = [thrown_together(potential, np.random.default_rng(0))]
    if potential.examples is not None and not potential.config.cues:  # what these were told is not kept
        found += [graph_from_atoms(atoms, potential.cutoff) for atoms in potential.examples.atoms()[:EXAMPLES]]
    return [within(graph, CERTAIN * potential.cutoff) for graph in found]


def _energies_and_forces(evaluator: Evaluator, graph: Graph) -> dict[str, Quantity]:
    p = evaluator(graph)
    reference = evaluator.elements.reference[evaluator.elements.index[graph.numbers]]
    terms = float((p.energies.detach() - reference).abs().max())
    forces = torch.zeros(0, 3) if p.forces is None else p.forces
    push = max(terms, float(forces.abs().max()))
    return {"energies": Quantity(p.energies.detach(), max(terms, 1e-3)), "forces": Quantity(forces, max(push, 1e-3))}
