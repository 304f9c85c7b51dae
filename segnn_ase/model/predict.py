"""Energy, forces and stress of structures: what is asked of every evaluator, and the plain one, which is the oracle."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from ase import Atoms
from torch import Tensor

from segnn_ase.model.electrostatics import LongRange, strained, stress_of_charges
from segnn_ase.model.elements import Elements
from segnn_ase.model.network import Operations
from segnn_ase.model.newness import KnownSurroundings, Newness
from segnn_ase.model.potential import Potential
from segnn_ase.model.responses import Responses
from segnn_ase.model.watch import Judgement, Watched
from segnn_ase.structure.graph import (
    Graph,
    edge_vectors,
    select,
    sum_over_atoms,
    sum_over_structure_edges,
    volume,
    within,
)


class Prediction(NamedTuple):
    energy: Tensor  # (B,) eV, float64
    energies: Tensor  # (N,) eV, float64
    forces: Tensor | None  # (N, 3) eV/Å
    stress: Tensor | None  # (B, 3, 3) eV/Å^3, ASE's sign
    edge_gradients: Tensor | None  # (E, 3) dE/dr_ij, eV/Å, of the pairs within the cutoff; None where none is kept
    features: Tensor | None  # (N, d) invariant descriptors
    neighbors: Tensor | None = None  # (N,) atoms within the cutoff, where they were counted on the way
    close: "bool | Tensor | None" = None  # whether atoms are closer than their core radius, likewise; () on a GPU
    cue_gradients: Tensor | None = None  # (N, width) dE/dcues, eV, of potentials with cues
    dipole: Tensor | None = None  # (B, 3) e Å, in the field that there is, of potentials that know fields
    polarizability: Tensor | None = None  # (B, 3, 3) e Å^2/V
    charges: Tensor | None = None  # (N,) e, of potentials with electrostatics
    born: Tensor | None = None  # (N, 3, 3) e, d mu_i / d r_j, see `with_born`
    dipole_slopes: Tensor | None = None  # (N, 3) d(u . mu)/dr, e, where they are asked for along directions u


class Evaluator(ABC):
    """Evaluates structures with the weights that a potential had when this was made: an immutable snapshot."""

    name: str  # in words, for messages

    @abstractmethod
    def __call__(
        self, graph: Graph, *, forces: bool = True, stress: bool = False, along: Tensor | None = None
    ) -> Prediction:
        """Forces and virial come from one gradient g_ij = dE/dr_ij: F_i = sum_j (g_ij - g_ji), and
        stress = (1 / V) sum_ij r_ij (x) g_ij, symmetrised. The stress of a cell without volume is NaN.
        Pairs beyond the cutoff do nothing where the model is smooth. along (B, 3): directions u of which the slopes of
        u . mu are wanted. Raises ValueError for unknown elements.
        """

    def pairwise(self, graph: Graph) -> Tensor:
        """dE/dr_ij (E, 3) eV/Å of each pair of a graph, all of which are within the cutoff."""
        return self(graph).edge_gradients

    def without_core(self) -> "Evaluator":
        """The same without core repulsion, whose large forces would hide what differs between two evaluators."""
        bare = copy.copy(self)
        bare.elements = self.elements._replace(repels=False)
        return bare

    elements: Elements

    def judge(self, graph: Graph, p: Prediction, volume: float | None, watched: Watched) -> Judgement | None:
        """Whether one structure, of which p was predicted, keeps to what is watched, and how far p may be off, in one
        pass; None where there is no code for that. volume: Å^3 where it is periodic in three directions."""
        return None

    def newness(self, graph: Graph, kind: Tensor, known: KnownSurroundings) -> Newness | None:
        """How new the surroundings of the atoms of one structure are, whose elements are kind (N,), where `judge` does
        not say it; None where there is no code for that."""
        return None


Loss = Callable[[Prediction], Tensor]  # a scalar that PyTorch can differentiate

# (graph, loss, *, forces, stress) -> the loss; leaves its gradient in the `grad` of the parameters that require one
LossGradient = Callable[..., Tensor]


class PlainLossGradient:
    """The gradient of a loss by autograd, with the weights that the potential has at each call."""

    def __init__(self, potential: Potential, operations: Operations | None = None, *, name: str = "plain PyTorch"):
        self.name, self._potential, self._operations = name, potential, operations

    def __call__(
        self, graph: Graph, loss_of: Loss, *, forces: bool, stress: bool, along: Tensor | None = None
    ) -> Tensor:
        potential, wanted = self._potential.train(), {"forces": forces, "stress": stress, "along": along}
        loss = loss_of(predict(potential, graph, **wanted, operations=self._operations))
        loss.backward()
        return loss.detach()


class PlainEvaluator(Evaluator):
    """Evaluation by plain PyTorch, or layer by layer with other operations."""

    def __init__(self, potential: Potential, operations: Operations | None = None, *, name: str = "plain PyTorch"):
        self.name, self._operations = name, operations
        self._potential = copy.deepcopy(potential).eval().requires_grad_(False)
        self.elements = self._potential.elements(self._potential.lonely_epsilon(operations))

    def __call__(
        self, graph: Graph, *, forces: bool = True, stress: bool = False, along: Tensor | None = None
    ) -> Prediction:
        self.elements.kinds(graph.numbers)  # refuses others
        near, known = within(graph, self._potential.cutoff), {"elements": self.elements, "operations": self._operations}
        return predict(self._potential, near, forces=forces, stress=stress, along=along, **known)


def predict(
    potential: Potential,
    graph: Graph,
    *,
    forces: bool = True,
    stress: bool = False,
    along: Tensor | None = None,
    elements: Elements | None = None,
    operations: Operations | None = None,
) -> Prediction:
    """Evaluate a potential by autograd, as `Evaluator` says; never by code that knows older weights.

    In training mode the results keep their graph for a second derivative. elements: constants that are known, see
    `Potential.atomic_energies`; operations: what does the work of the layers, plain PyTorch if None.
    """
    wanted, training = forces or stress or along is not None, potential.training
    vectors = edge_vectors(graph).detach().to(potential.dtype)
    cues = potential.cues_in(graph)
    with torch.set_grad_enabled(wanted or training):
        # as precise as they are told: charges that add up to zero shall do so in float32, too
        inputs, placed, moved = [vectors] if cues is None else [vectors, graph.cues.detach().clone()], graph, []
        if potential.charges is not None:
            placed, moved = strained(graph)
            placed = placed._replace(cues=None if cues is None else inputs[1])
        for x in (*inputs, *moved):
            x.requires_grad_(wanted)
        told = None if cues is None else inputs[1].to(cues)
        given = {"cues": told, "elements": elements, "operations": operations}
        energies, features, responses = potential.atomic_energies(placed, vectors, **given)
        slopes = None
        if along is not None and responses is not None and responses.dipole is not None:
            turned = (responses.dipole * along.to(responses.dipole)).sum()
            (slopes,) = torch.autograd.grad(turned, vectors, create_graph=training, retain_graph=True)
        found = (
            torch.autograd.grad(energies.sum(), [*inputs, *moved], create_graph=training, materialize_grads=True)
            if wanted
            else [None, None]
        )
    if not training:
        energies, features = energies.detach(), features.detach()
        responses = responses and Responses(*(x if x is None else x.detach() for x in responses))
    p = assemble(graph, vectors, energies, found[0], features, forces=forces, stress=stress)
    if moved and wanted:
        p = p._replace(**pushed_apart(p, -found[-2], found[-1], graph))
    if responses is not None:
        p = p._replace(**responses._asdict(), dipole_slopes=slopes_of(graph, slopes))
    return p if cues is None or not wanted else p._replace(cue_gradients=found[1].double())


def in_any_order(evaluate: Callable[..., Prediction], graph: Graph, **wanted: Any) -> Prediction:
    """By who needs pairs that are sorted by receiver."""
    order = torch.argsort(graph.edge_dst, stable=True)
    found = evaluate(select(graph, order), **wanted)
    g = found.edge_gradients
    return found if g is None else found._replace(edge_gradients=torch.empty_like(g).index_copy(0, order, g))


def with_born(evaluate: Callable[..., Prediction], graph: Graph, **wanted: bool) -> Prediction:
    """A prediction with Born charges, by the slopes of the three components of the dipole."""
    axes = torch.eye(3, dtype=torch.float64, device=graph.positions.device)
    first, *others = (axis.expand(graph.n_graphs, 3) for axis in axes)
    found = [evaluate(graph, **wanted, along=first), *(evaluate(graph, forces=False, along=u) for u in others)]
    return found[0]._replace(born=torch.stack([p.dipole_slopes for p in found], dim=1), dipole_slopes=None)


def slopes_of(graph: Graph, g: Tensor | None) -> Tensor | None:
    """dy/dr_i (N, 3) from dy/dr_ij (E, 3)."""
    if g is None:
        return None
    zero = g.new_zeros(len(graph.numbers), 3, dtype=torch.float64)
    return zero.index_add(0, graph.edge_src, g.double()).index_add(0, graph.edge_dst, -g.double())


def assemble(
    graph: Graph,
    vectors: Tensor,
    energies: Tensor,
    g: Tensor | None,
    features: Tensor | None,
    *,
    forces: bool,
    stress: bool,
) -> Prediction:
    """Totals, forces and stress from atomic energies (N,) and g = dE/dr_ij (E, 3), differentiable in both."""
    f = s = None
    g = None if g is None else g.double()
    if forces:
        zero = g.new_zeros(len(graph.numbers), 3)
        f = zero.index_add(0, graph.edge_dst, g).index_add(0, graph.edge_src, -g)
    if stress:
        s = stress_of(sum_over_structure_edges(vectors.detach().double()[:, :, None] * g[:, None], graph), graph)
    return Prediction(sum_over_atoms(energies, graph), energies, f, s, g, features)


def with_charges(p: Prediction, added: LongRange, graph: Graph) -> Prediction:
    """A prediction, whose derivatives are along the slope of the charges' energy, with what they add besides."""
    energies = p.energies + added.energies
    changes = {"energy": sum_over_atoms(energies, graph), "energies": energies, "charges": added.charges}
    changes |= pushed_apart(p, added.forces, added.virial, graph)
    if p.cue_gradients is not None and added.cue_slope is not None:
        changes["cue_gradients"] = p.cue_gradients + added.cue_slope
    return p._replace(**changes)


def pushed_apart(p: Prediction, forces: Tensor | None, virial: Tensor | None, graph: Graph) -> dict[str, Tensor]:
    """Forces and stress with the forces (N, 3) and the virial (B, 3, 3) of charges, which no pairs have."""
    found = {}
    if p.forces is not None and forces is not None:
        found["forces"] = p.forces + forces
    if p.stress is not None and virial is not None:
        found["stress"] = p.stress + stress_of_charges(virial, graph)
    return found


def atomic_virials(graph: Graph, g: Tensor) -> Tensor:
    """sum_j r_ij (x) dE/dr_ij (N, 3, 3) eV, half of every pair for either end, from g = dE/dr_ij (E, 3); not symmetric.

    Their sum over a structure is its stress times its volume. The sum is physics, the parts are a choice.
    """
    half = 0.5 * edge_vectors(graph).detach()[:, :, None] * g.double()[:, None]
    zero = half.new_zeros(len(graph.numbers), 3, 3)
    return zero.index_add(0, graph.edge_dst, half).index_add(0, graph.edge_src, half)


def stress_of(virial: Tensor, graph: Graph) -> Tensor:
    """Stress (B, 3, 3) eV/Å^3 from sums of r (x) dE/dr over the pairs of each structure (B, 3, 3) eV."""
    size = volume(graph)[:, None, None]
    # a cell without volume divides by 1, not 0: its NaN must not reach the gradients of the others in a batch
    s = 0.5 * (virial + virial.transpose(1, 2)) / torch.where(size > 0, size, 1.0)
    return s.masked_fill(size == 0, math.nan)


def by_structure(batch: Prediction, structures: list[Atoms]) -> list[Prediction]:
    """The prediction of each structure of a batch; stress for those that have one."""
    sizes = [len(atoms) for atoms in structures]

    def split(x: Tensor | None) -> Sequence:
        return [None] * len(sizes) if x is None else x.split(sizes)

    names = ("energies", "forces", "features", "neighbors", "cue_gradients", "charges", "born")  # of atoms
    parts = zip(*(split(getattr(batch, name)) for name in names), strict=True)
    out = []
    for b, (atoms, of_atoms) in enumerate(zip(structures, parts, strict=True)):
        stress = batch.stress[b : b + 1] if batch.stress is not None and atoms.pbc.all() else None
        close = False if batch.close is False else None
        of_structure = {name: getattr(batch, name) for name in ("energy", "dipole", "polarizability")}
        own = {name: None if x is None else x[b : b + 1] for name, x in of_structure.items()}
        own |= dict(zip(names, of_atoms, strict=True))
        out.append(Prediction(**own, stress=stress, edge_gradients=None, close=close))
    return out


def hessian(potential: Potential, graph: Graph) -> Tensor:
    """d^2 E / dr dr, (3N, 3N) eV/Å^2, by differentiating the forces row by row; float64."""
    positions = graph.positions.detach().requires_grad_()
    with torch.enable_grad():
        energy, _ = potential(graph._replace(positions=positions))
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        rows = [
            torch.autograd.grad(component, positions, retain_graph=True)[0].flatten()
            for component in gradient.flatten()
        ]
    return torch.stack(rows)
