"""`PropertyModel`: the steerable network with heads that read out irreps, of every atom or of a whole structure."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor, nn

from segnn_ase.base.errors import expect
from segnn_ase.data.batches import pack
from segnn_ase.model.elements import check_elements, species_index
from segnn_ase.model.network import SEGNN, Operations
from segnn_ase.model.published import SteerableHead
from segnn_ase.model.settings import ModelConfig
from segnn_ase.properties.targets import UNKNOWN, Target, refuse_unreachable
from segnn_ase.structure.graph import Graph, collate, edge_vectors, graph_from_atoms, sum_over_atoms, with_pairs

AT_ONCE, EDGES_AT_ONCE = 32, 100_000  # structures, unless one has more pairs


class Constants(NamedTuple):
    """What of a property is known before the network learns: a share of each element, and the size of the rest."""

    references: list[list[float]]  # (n_species, scalars) of each atom, in the unit of the labels
    scales: list[float]  # (dim,) of what the network says of an atom; equal within an irrep
    size: float  # root mean square of what the references leave, for the loss


class PropertyModel(nn.Module):
    """y_i = reference[Z_i] + scale * head(f_i; a_i) in irreps, of each atom, or its sum or mean over a structure; of
    charges that add up to nothing in all labels, less their mean.

    Features f and attributes a are those of the SEGNN (Brandstetter et al., ICLR 2022, section 4); any `ModelConfig`
    serves, smooth or as published. Only components 0e have references. species: atomic numbers; constants: one for
    each target, without them zero and one. Raises ConfigError for irreps that the network cannot give.
    """

    species_index: Tensor

    def __init__(
        self,
        config: ModelConfig,
        species: list[int],
        targets: Sequence[Target],
        *,
        constants: Sequence[Constants] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        expect(isinstance(config, ModelConfig), "config", config, "a ModelConfig")
        told = [cue.name for cue in config.cues]
        expect(not told, "model.cues", told, "none: models of properties are told nothing but the structure")
        expect(config.electrostatics == "none", "model.electrostatics", config.electrostatics, "'none' for properties")
        expect(bool(targets), "targets", targets, "at least one")
        refuse_unreachable(list(targets), config)
        known = len(set(species)) == len(species) > 0 and all(0 < z <= 118 for z in species)
        expect(known, "species", species, "different atomic numbers from 1 to 118, at least one")
        self.config, self.species, self.targets = config, list(species), list(targets)
        none = [Constants([[0.0] * len(t.scalars) for _ in species], [1.0] * t.dim, 1.0) for t in targets]
        self.constants = none if constants is None else list(constants)
        self.register_buffer("species_index", species_index(self.species), persistent=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.segnn = SEGNN(config, f"{len(species)}x0e")
            self.heads = nn.ModuleList(SteerableHead(config, target.irreps) for target in targets)

    @property
    def device(self) -> torch.device:
        return self.species_index.device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def cutoff(self) -> float:
        return self.config.cutoff

    def forward(self, graph: Graph, operations: Operations | None = None) -> list[Tensor]:
        """Components of irreps of each target, (B, dim) or of atoms (N, dim), float64, in the unit of the labels."""
        parts = zip(self.of_atoms(graph, operations), self.targets, strict=True)
        return [self._pooled(y, target, graph) for y, target in parts]

    def of_atoms(self, graph: Graph, operations: Operations | None = None) -> list[Tensor]:
        """The same of every atom, (N, dim), before anything is added up."""
        kind = self.species_index[graph.numbers]
        history, a = self.segnn(**self._inputs(graph, kind), operations=operations)
        found = []
        for head, target, (references, scales, _) in zip(self.heads, self.targets, self.constants, strict=True):
            y = head(history[-1], a).double()
            y = y * y.new_tensor(scales)
            if target.scalars:
                known = y.new_tensor(references)[kind]
                y = y.index_add(1, torch.tensor(target.scalars, device=y.device), known)
            found.append(y)
        return found

    def _pooled(self, y: Tensor, target: Target, graph: Graph) -> Tensor:
        if target.pooling == "free":
            return y
        total = sum_over_atoms(y, graph)
        if target.pooling == "sum":
            return total
        mean = total / torch.bincount(graph.batch, minlength=graph.n_graphs).clamp_min(1)[:, None]
        return mean if target.pooling == "mean" else y - mean[graph.batch]

    def _inputs(self, graph: Graph, kind: Tensor) -> dict[str, Any]:
        one_hot = nn.functional.one_hot(kind, len(self.species)).to(self.dtype) * len(self.species) ** 0.5
        return {
            "features": one_hot,
            "vectors": edge_vectors(graph).to(self.dtype),
            "edge_src": graph.edge_src,
            "edge_dst": graph.edge_dst,
            "edge_pair": graph.edge_pair,
        }

    @torch.no_grad()
    def calibrate(self, graph: Graph) -> None:
        """Set the norms of the messages from a batch of training structures, and the heads' outputs to about one."""
        inputs = self._inputs(graph, self.species_index[graph.numbers])
        self.segnn.calibrate(**inputs)
        history, a = self.segnn(**inputs)
        for head in cast("list[SteerableHead]", self.heads):
            for x, weight in zip(head.layout_out.split(head(history[-1], a)), head.second.weights, strict=True):
                size = float(x.square().mean().sqrt())
                if size > 0:
                    weight.div_(size)

    def predict(self, atoms: Atoms) -> dict[str, np.ndarray]:
        """Properties by name, in the form and the unit of the labels: a number, (3,) or (3, 3), of atoms (N, ...).

        Raises StructureError for unknown elements and what has no neighbours to search.
        """
        return self.predict_all([atoms])[0]

    def predict_all(self, structures: Sequence[Atoms]) -> list[dict[str, np.ndarray]]:
        """The same of many structures, some of them at once."""
        for atoms in structures:
            expect(isinstance(atoms, Atoms), "atoms", atoms, "Atoms")
            check_elements([chemical_symbols[z] for z in self.species], self.species, atoms.numbers, **UNKNOWN)
        found = []
        for first in range(0, len(structures), AT_ONCE):  # graphs of all would fill the memory
            graphs = [with_pairs(graph_from_atoms(a, self.cutoff)) for a in structures[first : first + AT_ONCE]]
            for numbers in pack(list(range(len(graphs))), [len(g.edge_src) for g in graphs], AT_ONCE, EDGES_AT_ONCE):
                found += self._predict_some([graphs[n] for n in numbers])
        return found

    @torch.no_grad()
    def _predict_some(self, graphs: list[Graph]) -> list[dict[str, np.ndarray]]:
        graph, sizes = collate(graphs), [len(g.numbers) for g in graphs]
        found: list[dict[str, np.ndarray]] = [{} for _ in graphs]
        for target, components in zip(self.targets, self(graph.to(self.device)), strict=True):
            values = target.labels(components.cpu())
            parts = values.split(sizes) if target.per == "atom" else values
            for one, part in zip(found, parts, strict=True):
                one[target.name] = part.numpy()
        return found
