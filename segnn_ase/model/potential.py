"""`Potential`: elements, embedding, readout and reference energies around the network; an ordinary `nn.Module`."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.data import chemical_symbols, covalent_radii
from torch import Tensor, nn

from segnn_ase.base.errors import expect
from segnn_ase.model.electrostatics import ChargeReadout, charges_of
from segnn_ase.model.elements import Elements, species_index
from segnn_ase.model.irreps import Features
from segnn_ase.model.network import SEGNN, EnergyReadout, Operations
from segnn_ase.model.repulsion import CORE_MARGIN, core_of, seen_by_network, with_repulsion
from segnn_ase.model.responses import ResponseReadout, Responses, in_field
from segnn_ase.model.settings import ModelConfig
from segnn_ase.structure.cues import width_of
from segnn_ase.structure.graph import Graph, edge_vectors, sum_over_atoms
from segnn_ase.structure.stored import StoredStructures


class OfAtoms(NamedTuple):
    """What the network says of N atoms."""

    epsilon: Tensor  # (N,)
    features: Tensor  # (N, channels), the last scalars
    read: Tensor | None = None  # (N, 9) of their dipoles and polarizabilities, or (N, 1) of their charges


class Potential(nn.Module):
    """E = sum_i E0[Z_i] + scale[Z_i] (eps_i - eps_iso[Z_i]) + core repulsion, summed in float64.

    eps_iso is the same network on one lonely atom, so an isolated atom has exactly E0. Where two atoms come closer
    than any in the training data the network is blind, and `core_repulsion` keeps them apart.
    species: atomic numbers; reference_energies E0 and scales in eV, one for each species; seed: of the random weights,
    which leave PyTorch's own generator alone.
    `dispersion` says what was taken off the labels that it learned: `SEGNNCalculator` adds it, this network does not.
    Raises ConfigError for lists of different lengths.
    """

    def __init__(
        self,
        config: ModelConfig,
        species: list[int],
        *,
        reference_energies: list[float] | None = None,
        scales: list[float] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        expect(isinstance(config, ModelConfig), "config", config, "a ModelConfig")
        known = isinstance(species, Iterable) and all(isinstance(z, int | np.integer) and 0 < z <= 118 for z in species)
        known = known and 0 < len(set(species)) == len(species)
        expect(known, "species", species, "different atomic numbers from 1 to 118, at least one")
        expect(isinstance(seed, int | np.integer) and 0 <= seed < 2**63, "seed", seed, "an integer from 0 to 2^63 - 1")
        species = [int(z) for z in species]
        self.config, self.species = config, species
        self.scales = self._per_species("scales", scales, 1.0)
        self.reference_energies = self._per_species("reference_energies", reference_energies, 0.0)
        self.register_buffer("species_index", species_index(species), persistent=False)
        radii = torch.as_tensor(covalent_radii, dtype=torch.float32)[torch.tensor(species)]
        self.register_buffer("core_radii", (radii[:, None] + radii).clamp_max(config.cutoff))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(seed))
            self.segnn = SEGNN(config, f"{len(species)}x0e")
            self.readout = EnergyReadout(config)
            self.responses = ResponseReadout(config, len(species)) if config.in_field else None
            self.charges = charges_of(config)
        self.domain = None  # a `domain.Domain`: what the training structures covered
        self.uncertainty = None  # an `uncertainty.Uncertainty`
        self.examples: StoredStructures | None = None  # some of the training structures
        self.dispersion: str | None = None  # what its labels had besides, as "d3bj:pbe": `SEGNNCalculator` adds it

    def _per_species(self, name: str, values, default: float) -> list[float]:
        n = len(self.species)
        values = [default] * n if values is None else values
        good = isinstance(values, Iterable) and all(isinstance(v, int | float | np.number) for v in values)
        good = good and len(values) == n and all(math.isfinite(v) for v in values)
        expect(good, name, values, f"{n} finite numbers, one per species")
        return [float(v) for v in values]

    @property
    def dtype(self) -> torch.dtype:
        return self.readout.last.last.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.species_index.device

    @property
    def besides(self) -> ResponseReadout | ChargeReadout | None:  # what is read out of the features besides energies
        return self.responses if self.charges is None else self.charges

    @property
    def cutoff(self) -> float:
        return self.config.cutoff

    @property
    def symbols(self) -> list[str]:
        return [chemical_symbols[z] for z in self.species]

    @property
    def core(self) -> Tensor | None:  # radii (n_species, n_species) Å, where there is core repulsion
        return self.core_radii if self.config.core_repulsion else None

    def stamp(self) -> tuple:
        """Another one when a weight, buffer or constant is another, however it was changed: by the bytes of all."""
        tensors = [x.detach().cpu() for x in (*self.parameters(), *self.buffers())]
        bits = (hash(x.numpy().tobytes()) for x in tensors)
        return (self.dtype, self.device, *bits, *self.reference_energies, *self.scales)

    def set_core(self, closest: dict[tuple[int, int], float], *, keep_smaller: bool = False) -> None:
        """Let the core repulsion begin just below the shortest distances of the training data.

        closest: Å, for pairs of atomic numbers; a pair that never met keeps the length of a bond, the sum of the
        covalent radii. With `keep_smaller` a radius is only lowered: for data that come on top of others.
        """
        for (a, b), distance in closest.items():
            i, j = self.species.index(a), self.species.index(b)
            radius = min(CORE_MARGIN * distance, self.cutoff)
            if keep_smaller:
                radius = min(radius, float(self.core_radii[i, j]))
            self.core_radii[i, j] = self.core_radii[j, i] = radius

    def calibrate(self, graph: Graph) -> list[float]:
        """Set the messages' norms from a batch of training structures; see `SEGNN.calibrate`."""
        return self.segnn.calibrate(**self._inputs(graph))

    def features(self, graph: Graph) -> list[Features]:
        """The steerable features of atoms after each interaction, one (N, 2l + 1, channels) per irrep."""
        return self.segnn(**self._inputs(graph))[0]

    def _inputs(self, graph: Graph) -> dict[str, Any]:
        """What the network takes."""
        return {
            "features": self._one_hot(self.species_index[graph.numbers]),
            "vectors": edge_vectors(graph).to(self.dtype),
            "edge_src": graph.edge_src,
            "edge_dst": graph.edge_dst,
            "cues": self.cues_in(graph),
        }

    def cues_in(self, graph: Graph) -> Tensor | None:
        """The cues of a graph, (N, width); None for a potential without. Raises ValueError for a graph without them."""
        if not width_of(self.config.cues):
            return None
        if graph.cues is None:
            raise ValueError(f"the graph has no cues; expected those of {[cue.name for cue in self.config.cues]}")
        return graph.cues.to(self.dtype)

    def _one_hot(self, kind: Tensor) -> Tensor:
        """Unit-variance species features (N, n_species)."""
        return nn.functional.one_hot(kind, len(self.species)).to(self.dtype) * len(self.species) ** 0.5

    def elements(self, isolated: Tensor | None = None) -> Elements:
        """The present constants of the elements; isolated (n_species,): epsilon of lonely atoms, if it is known."""
        reference, scale = torch.tensor([self.reference_energies, self.scales], dtype=torch.float64, device=self.device)
        isolated = self.lonely_epsilon() if isolated is None else isolated
        core = self.core_radii, self.config.core_repulsion
        return Elements(tuple(self.symbols), self.species_index, reference, scale, isolated, *core)

    @torch.no_grad()
    def lonely_epsilon(self, operations: Operations | None = None) -> Tensor:
        """Epsilon of one lonely atom of each species (n_species,)."""
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        vectors = torch.zeros(0, 3, dtype=self.dtype, device=self.device)
        # one by one, as they come later: matrix products of another size round differently
        kinds = [none.new_tensor([k]) for k in range(len(self.species))]
        cues = self.no_cues(1)
        return torch.cat(
            [self.epsilon(kind, vectors, none, none, cues=cues, operations=operations).epsilon for kind in kinds]
        )

    def no_cues(self, n: int) -> Tensor | None:
        """Cues of n atoms of which nothing is told; None for a potential without."""
        width = width_of(self.config.cues)
        return torch.zeros(n, width, dtype=self.dtype, device=self.device) if width else None

    def epsilon(
        self,
        kind: Tensor,
        vectors: Tensor,
        edge_src: Tensor,
        edge_dst: Tensor,
        *,
        edge_pair: Tensor | None = None,
        cues: Tensor | None = None,
        operations: Operations | None = None,
    ) -> OfAtoms:
        """What the network says of atoms of species `kind` (N,)."""
        given = {"edge_pair": edge_pair, "cues": cues, "operations": operations}
        history, _ = self.segnn(self._one_hot(kind), vectors, edge_src, edge_dst, **given)
        read = None if self.besides is None else self.besides(history)
        return OfAtoms(self.readout(history), history[-1][self.readout.scalar][:, 0], read)

    def atomic_energies(
        self,
        graph: Graph,
        vectors: Tensor,
        *,
        cues: Tensor | None = None,
        elements: Elements | None = None,
        operations: Operations | None = None,
    ) -> tuple[Tensor, Tensor, Responses | None]:
        """Atomic energies (N,) eV in float64, the last features' scalars, and responses to a field or charges, from
        r_ij (E, 3) Å of any dtype, and the cues (N, width) in the potential's own, or else of the graph.

        elements: constants that are known; without them one lonely atom of each species rides along, and energies
        are differentiable in all weights.
        """
        kind, vectors = self.species_index[graph.numbers], vectors.to(self.dtype)
        core = core_of(graph, kind, vectors, self.core if elements is None else elements.core)
        n, alone = len(kind), torch.arange(len(self.species) if elements is None else 0, device=self.device)
        cues, nothing = self.cues_in(graph) if cues is None else cues, self.no_cues(len(alone))
        told = None if cues is None or nothing is None else torch.cat([cues, nothing])
        epsilon, features, read = self.epsilon(
            torch.cat([kind, alone]),
            seen_by_network(vectors, core),
            graph.edge_src,
            graph.edge_dst,
            edge_pair=graph.edge_pair,
            cues=told,
            operations=operations,
        )
        elements = self.elements(epsilon[n:]) if elements is None else elements
        energies, responses = elements.energies(kind, epsilon[:n]), None
        if self.responses is not None and read is not None:
            added, responses = in_field(graph, self.responses.of_atoms(kind, read[:n]))
            energies = energies + added
        elif self.charges is not None and read is not None:
            responses = Responses(charges=self.charges.charges(read[:n], graph))
            energies = energies + self.charges.energies(responses.charges, graph)
        return with_repulsion(energies, vectors, core), features[:n], responses

    def forward(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """Total energies (B,) and atomic energies (N,), eV, float64; differentiable in positions, cell and weights."""
        energies = self.atomic_energies(graph, edge_vectors(graph))[0]
        return sum_over_atoms(energies, graph), energies
