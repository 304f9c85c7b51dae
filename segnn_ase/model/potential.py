"""`Potential`: elements, embedding, readout, reference energies; energy, forces and stress by autograd."""

import math
from collections.abc import Iterable
from threading import Lock

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from torch import Tensor, nn

from segnn_ase.base.errors import ConfigError, StructureError, expect
from segnn_ase.compiled.build import runs_on_triton
from segnn_ase.compiled.cpu import Engine
from segnn_ase.compiled.gpu import DeviceEngine
from segnn_ase.compiled.passes import supported
from segnn_ase.model.network import SEGNN, EnergyReadout
from segnn_ase.model.repulsion import CORE_MARGIN, core_repulsion
from segnn_ase.model.settings import ModelConfig
from segnn_ase.structure.graph import Graph, edge_vectors, sum_over_atoms


class Potential(nn.Module):
    """E = sum_i E0[Z_i] + scale[Z_i] (eps_i - eps_iso[Z_i]) + core repulsion, summed in float64.

    eps_iso is the same network on one lonely atom, so an isolated atom has exactly E0. Where two atoms come closer
    than any in the training data the network is blind, and `core_repulsion` keeps them apart.
    species: atomic numbers; reference_energies E0 and scales in eV, one for each species.
    Raises ConfigError for lists of different lengths.
    """

    def __init__(
        self,
        config: ModelConfig,
        species: list[int],
        *,
        reference_energies: list[float] | None = None,
        scales: list[float] | None = None,
    ):
        super().__init__()
        expect(isinstance(config, ModelConfig), "config", config, "a ModelConfig")
        known = isinstance(species, Iterable) and all(isinstance(z, int | np.integer) and 0 < z <= 118 for z in species)
        known = known and 0 < len(set(species)) == len(species)
        expect(known, "species", species, "different atomic numbers from 1 to 118, at least one")
        species = [int(z) for z in species]
        self.config, self.species = config, species
        self.scales = self._per_species("scales", scales, 1.0)
        self.reference_energies = self._per_species("reference_energies", reference_energies, 0.0)
        index = torch.full((119,), -1, dtype=torch.long)
        index[torch.tensor(species)] = torch.arange(len(species))
        self.register_buffer("species_index", index, persistent=False)
        radii = torch.as_tensor(covalent_radii, dtype=torch.float32)[torch.tensor(species)]
        self.register_buffer("core_radii", (radii[:, None] + radii).clamp_max(config.cutoff))
        self.segnn = SEGNN(config, f"{len(species)}x0e")
        self.readout = EnergyReadout(config)
        self.domain = None  # a `domain.Domain`: what the training structures covered
        self.uncertainty = None  # an `uncertainty.Uncertainty`
        self._isolated: tuple[tuple, Tensor] | None = None
        self._table: tuple[tuple, Tensor] | None = None
        self.compiled = False
        self._engine: Engine | DeviceEngine | None = None
        self._making = Lock()

    def __getstate__(self) -> dict:
        # compiled code and its addresses stay in their process
        return {**self.__dict__, "_engine": None, "_making": None}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__({**state, "_making": Lock()})

    @property
    def engine(self) -> "Engine | DeviceEngine | None":
        """The network in compiled code, where `compiled` is set and it has been tabulated for evaluation."""
        if self.training or not self.compiled or self.segnn.table_step is None:
            return None
        if self._engine is None:
            with self._making:
                if self._engine is None:
                    self._engine = DeviceEngine(self) if runs_on_triton(self.device) else Engine(self)
        return self._engine

    def compile_network(self, on: bool = True) -> bool:
        """Evaluate by `engine.py` from now on, with the present weights and radial tables; whether it does."""
        self._engine = None
        self.compiled = on and supported(self) and self.segnn.table_step is not None
        return self.compiled

    def train(self, mode: bool = True) -> "Potential":
        if mode:
            self.compile_network(False)
        return super().train(mode)

    def load_state_dict(self, *args, **keywords):
        self.compile_network(False)
        self.segnn.tabulate(False)
        return super().load_state_dict(*args, **keywords)

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
    def cutoff(self) -> float:
        return self.config.cutoff

    @property
    def symbols(self) -> list[str]:
        return [chemical_symbols[z] for z in self.species]

    def _apply(self, fn, *args, **kwargs):
        self._isolated = None
        self.compile_network(False)
        self.segnn.accelerate(False)
        return super()._apply(fn, *args, **kwargs)

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

    def forward(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """Total energies (B,) and atomic energies (N,), eV, float64; differentiable in positions and cell."""
        energies = self.atomic_energies(graph, edge_vectors(graph))[0]
        return sum_over_atoms(energies, graph), energies

    @torch.no_grad()
    def _isolated_epsilon(self) -> Tensor:
        """eps_iso of each species, evaluated again when a weight has changed since."""
        key = (
            self.dtype,
            self.device,
            self.segnn.fused,
            *(x._version for x in self.parameters()),
            *(x._version for x in self.buffers()),
        )
        if self._isolated is None or self._isolated[0] != key:
            none = torch.zeros(0, dtype=torch.long, device=self.device)
            vectors = torch.zeros(0, 3, dtype=self.dtype, device=self.device)
            # one by one, as they come later: matrix products of another size round differently
            alone = [
                self.segnn(self._one_hot(none.new_tensor([k])), vectors, none, none)[0]
                for k in range(len(self.species))
            ]
            self._isolated = (key, torch.cat([self.readout(history) for history in alone]))
        return self._isolated[1]

    def calibrate(self, graph: Graph) -> list[float]:
        """Set the messages' norms from a batch of training structures; see `SEGNN.calibrate`."""
        vectors = edge_vectors(graph).to(self.dtype)
        one_hot = self._one_hot(self.species_index[graph.numbers])
        return self.segnn.calibrate(one_hot, vectors, graph.edge_src, graph.edge_dst)

    def _one_hot(self, kind: Tensor) -> Tensor:
        """Unit-variance species features (N, n_species)."""
        return nn.functional.one_hot(kind, len(self.species)).to(self.dtype) * len(self.species) ** 0.5

    def atomic_energies(self, graph: Graph, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Atomic energies (N,) eV in float64 and the last features' scalars, from r_ij (E, 3) Å of any dtype."""
        kind = self.species_index[graph.numbers]
        n = len(kind)
        vectors = vectors.to(self.dtype)
        if self.training:  # one atom of each species without neighbours rides along
            kind = torch.cat([kind, torch.arange(len(self.species), device=kind.device)])
        one_hot = self._one_hot(kind)
        history, _ = self.segnn(one_hot, vectors, graph.edge_src, graph.edge_dst, edge_pair=graph.edge_pair)
        epsilon, kind = self.readout(history), kind[:n]
        isolated = epsilon[n:] if self.training else self._isolated_epsilon()
        energies = self.in_eV(kind, epsilon[:n], isolated)
        close, repulsion = self._repulsion(graph, kind, vectors)
        if close is not None:
            energies = energies.index_add(0, graph.edge_dst[close], repulsion)
        return energies, history[-1][self.readout.scalar][:n, 0]

    def in_eV(self, kind: Tensor, epsilon: Tensor, isolated: Tensor) -> Tensor:
        """Atomic energies (N,) eV, float64, from epsilon (N,) and that of one lonely atom of each species."""
        reference, scale = self.per_species(kind)
        return reference + scale * (epsilon - isolated[kind]).double()

    def constants(self) -> tuple:
        """Tensors that evaluations read besides the weights; a recording (`captured.py`) must keep them."""
        return self._table, self._isolated

    def per_species(self, kind: Tensor) -> Tensor:
        """Reference energies and scales of atoms, (2, N) eV, float64."""
        key = (kind.device, *self.reference_energies, *self.scales)
        if self._table is None or self._table[0] != key:  # made once: to copy it stops a GPU
            table = torch.tensor([self.reference_energies, self.scales], dtype=torch.float64, device=kind.device)
            self._table = (key, table)
        return self._table[1][:, kind]

    def _repulsion(self, graph: Graph, kind: Tensor, vectors: Tensor) -> tuple:
        """Edges shorter than their core radius, and the receivers' halves of the repulsion (eV, float64)."""
        if not self.config.core_repulsion:
            return None, None
        radii = self.core_radii[kind[graph.edge_dst], kind[graph.edge_src]]
        close = slice(None)  # on a GPU a look at the number of close pairs costs more than to evaluate all
        if vectors.device.type == "cpu":
            close = (vectors.detach().square().sum(1) < radii.square()).nonzero()[:, 0]
            if not len(close):
                return None, None
        ends = graph.numbers[graph.edge_dst[close]], graph.numbers[graph.edge_src[close]]
        return close, 0.5 * core_repulsion(vectors[close], *ends, radii[close]).double()

    def with_repulsion(
        self, graph: Graph, kind: Tensor, vectors: Tensor, energies: Tensor, *, gradient: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Add the core repulsion to atomic energies; its gradient dE/dr_ij (E, 3), or None if no atoms are close."""
        with torch.set_grad_enabled(gradient):
            vectors = vectors.detach().requires_grad_(gradient)
            close, repulsion = self._repulsion(graph, kind, vectors)
            if close is None:
                return energies, None
            g = torch.autograd.grad(repulsion.sum(), vectors)[0] if gradient else None
        return energies.index_add(0, graph.edge_dst[close], repulsion.detach()), g


def check_species(potential: Potential, numbers: np.ndarray) -> None:
    """Raise StructureError naming the first atom whose element the potential does not know."""
    if set(potential.species).issuperset(numbers.tolist()):
        return
    atom = int(np.flatnonzero(~np.isin(numbers, potential.species))[0])
    if not 0 <= numbers[atom] < len(chemical_symbols):
        raise StructureError(f"atom {atom} has the atomic number {numbers[atom]}; expected an element")
    raise StructureError(
        f"atom {atom} is {chemical_symbols[numbers[atom]]}, which this potential does not know; "
        f"it was trained for {', '.join(potential.symbols)}. Train or fine-tune one with that element."
    )


def parse_species(symbols: list[str]) -> list[int]:
    """Atomic numbers of chemical symbols. Raises ConfigError naming what is not an element."""
    wrong = [s for s in symbols if s not in atomic_numbers]
    if wrong:
        raise ConfigError(f"species has {wrong}; expected chemical symbols such as 'H' or 'Si'")
    return [atomic_numbers[s] for s in symbols]
