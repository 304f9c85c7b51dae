"""`SEGNN`, the backbone: steerable features in, steerable features out; and the readout of energies."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segnn_ase.model.cues import kinds_of, message_terms, scalars_alone, steering, update_terms
from segnn_ase.model.edges import Edges, inverse_density, make_edges, node_attributes
from segnn_ase.model.interactions import (
    Message,
    Powers,
    Received,
    SelfProduct,
    Update,
    powers_by_steps,
    received_by_steps,
    steering_of,
)
from segnn_ase.model.irreps import (
    SCALAR,
    Features,
    Irreps,
    Layout,
    kinds,
    multiplicities,
    parse_irreps,
    spherical_kinds,
)
from segnn_ase.model.layers import Product, SteerableLinear, steered
from segnn_ase.model.published import PublishedMessage
from segnn_ase.model.scalars import MLP, Dense
from segnn_ase.model.settings import ModelConfig
from segnn_ase.structure.cues import width_of


class SEGNN(nn.Module):
    """Steerable E(3)-equivariant graph network (Brandstetter et al., ICLR 2022, arXiv 2110.02905).

    The settings choose between the smooth message-passing potential and the network as published; see
    `ModelConfig`. In each interaction the sum over neighbours and its self-products are divided by
    `norms`, their root mean square on training structures, set once by `calibrate` before training.
    """

    def __init__(
        self,
        config: ModelConfig,
        irreps_in: "str | Irreps",
        *,
        n_edge_scalars: int = 0,
    ):
        super().__init__()
        if n_edge_scalars and config.message != "published":
            raise ValueError("n_edge_scalars needs message = 'published': only there are they concatenated to d^2")
        self.config = config
        self.n_edge_scalars = n_edge_scalars
        self.layout_in, self.irreps = Layout(irreps_in), parse_irreps(config.hidden_irreps)
        lmax, harmonics = config.lmax_attr, spherical_kinds(config.lmax_attr)
        self.update_terms, self.message_terms = update_terms(config.cues), message_terms(config.cues)
        attr, on_edges = (harmonics + kinds_of(terms) for terms in (self.update_terms, self.message_terms))
        self.embedding = SteerableLinear(self.layout_in.irreps, attr, self.irreps)
        if config.message == "published":
            layers = [PublishedMessage(self.irreps, lmax, n_edge_scalars=n_edge_scalars) for _ in self._interactions]
        else:
            layers = [
                Message(
                    self.irreps,
                    on_edges,
                    linear=config.message == "linear",
                    n_radial=config.n_radial,
                    hidden=config.radial_hidden,
                    gating=scalars_alone(self.message_terms),
                )
                for _ in self._interactions
            ]
        self.messages = nn.ModuleList(layers)
        self.register_buffer("norms", torch.tensor([[4.0, 1.0]]).repeat(config.interactions, 1))
        powers = self._interactions if config.body_order > 1 else ()
        self.products = nn.ModuleList(self._self_product() for _ in powers)
        self.updates = nn.ModuleList(Update(self.irreps, attr) for _ in self._interactions)
        self._calibrating = False

    def _self_product(self) -> SelfProduct:
        config = self.config
        return SelfProduct(self.irreps, config.body_order, config.bound, config.power_scale)

    @property
    def _interactions(self) -> range:
        return range(self.config.interactions)

    def forward(
        self,
        features: Tensor,
        vectors: Tensor,
        edge_src: Tensor,
        edge_dst: Tensor,
        *,
        node_attr: Tensor | None = None,
        edge_scalars: Tensor | None = None,
        edge_pair: Tensor | None = None,
        cues: Tensor | None = None,
        operations: "Operations | None" = None,
    ) -> tuple[list[Features], Tensor]:
        """Return the node features after each interaction and the node attributes (N, (lmax_attr + 1)^2), with those of
        the cues behind.

        features (N, irreps_in.dim) in e3nn's layout of irreps_in as written; vectors r_ij (E, 3); edge_src j and
        edge_dst i (E,).
        node_attr (N, (lmax_attr + 1)^2) is added to the node attributes (the harmonics of a velocity, say);
        edge_scalars (E, n_edge_scalars) enter the published message beside d^2. edge_pair (E,), of the graph, saves
        time only. cues (N, width) are those of `model.cues`, where the settings have some. operations: what does the
        work; plain PyTorch if None.
        """
        self._check_edge_scalars(edge_scalars, len(edge_dst))
        self._check_cues(cues, len(features))
        operations = operations or PLAIN
        published = self.config.message == "published"  # which knows one layout of edges only
        make = plain_edges if published else operations.edges
        edges = make(self, vectors, edge_src, edge_dst, len(features), edge_pair, cues)
        a = node_attributes(edges, smooth=self.config.smooth, lmax=self.config.lmax_attr)
        if cues is not None:
            a = torch.cat([a, steering(self.update_terms, cues, cues)], dim=1)
        if node_attr is not None:
            a = a + node_attr
        if edge_scalars is not None:
            edge_scalars = edges.to_slots(edge_scalars)
        sparse = inverse_density(edges) if self.config.density_weighting else None
        given = (edge_scalars, operations.product) if published else (operations.message, sparse)
        f = self.embedding(self.layout_in.split(features), a, operations.product)
        history = []
        for t in self._interactions:
            m = self._scaled(self.messages[t](f, edges, *given), t, 0)
            if self.products:
                m = self._scaled(self.products[t](m, operations.self_product), t, 1)
            f = self.updates[t](f, m, a, operations.product)
            history.append(f)
        return history, a

    def _check_edge_scalars(self, edge_scalars: Tensor | None, n_edges: int) -> None:
        given = (n_edges, 0) if edge_scalars is None else tuple(edge_scalars.shape)
        expected = (n_edges, self.n_edge_scalars)
        if given != expected:
            raise ValueError(f"edge_scalars has shape {given}; expected {expected}, by n_edge_scalars of the model")

    def _check_cues(self, cues: Tensor | None, n_nodes: int) -> None:
        given = (n_nodes, 0) if cues is None else tuple(cues.shape)
        expected = (n_nodes, width_of(self.config.cues))
        if given != expected:
            raise ValueError(f"cues have shape {given}; expected {expected}, by the cues in the settings of the model")

    def _scaled(self, m: Features, t: int, k: int) -> Features:
        if self._calibrating:
            # the loudest kind counts: a kind that is silent for symmetry must not amplify the others
            rms = max(float(x.square().mean()) for x in m) ** 0.5 if len(m[0]) else 0.0
            self.norms[t, k] = rms if rms > 1e-3 else 1.0
        return tuple(x / self.norms[t, k] for x in m)

    @torch.no_grad()
    def calibrate(self, *inputs, **keywords) -> list[list[float]]:
        """Set `norms` so that messages and self-products have unit mean square on this input (that of `forward`)."""
        self._calibrating = True
        try:
            self(*inputs, **keywords)
        finally:
            self._calibrating = False
        return self.norms.tolist()


class Operations(NamedTuple):
    """What does the work of the layers: these functions, or others that give the same."""

    edges: (
        Callable  # (network, vectors, edge_src, edge_dst, n_atoms, edge_pair, cues) -> edges, as `message` takes them
    )
    message: Received
    product: Product
    self_product: Powers


def plain_edges(
    network: SEGNN,
    vectors: Tensor,
    edge_src: Tensor,
    edge_dst: Tensor,
    n_atoms: int,
    edge_pair: Tensor | None,
    cues: Tensor | None = None,
) -> Edges:
    """Edges in a padded table; plain PyTorch evaluates the radial functions of both directions of a pair."""
    c = network.config
    edges = make_edges(vectors, edge_src, edge_dst, n_atoms, cutoff=c.cutoff, lmax=c.lmax_attr, n_radial=c.n_radial)
    if c.message == "published":
        return edges
    if cues is not None:
        own = torch.arange(n_atoms, device=cues.device).repeat_interleave(edges.width)
        beside = steering(network.message_terms, cues[own], cues[edges.src])
        edges = edges._replace(harmonics=torch.cat([edges.harmonics, beside], dim=1))
    return edges._replace(steering=steering_of(network.messages[0].couplings, edges))  # the same in all interactions


PLAIN = Operations(plain_edges, received_by_steps, steered, powers_by_steps)


class EnergyReadout(nn.Module):
    """epsilon_i from the scalars: linear in those of every interaction but the last, an MLP on the last."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        irreps = parse_irreps(config.hidden_irreps)
        self.scalar = kinds(irreps).index(SCALAR)
        self.width = width = multiplicities(irreps)[self.scalar]
        self.linear = nn.ModuleList(Dense(width, 1) for _ in range(config.interactions - 1))
        self.last = MLP(width, config.readout_hidden, 1)

    def forward(self, history: list[Features]) -> Tensor:
        scalars = [f[self.scalar][:, 0] for f in history]
        epsilon = self.last(scalars[-1])
        for dense, x in zip(self.linear, scalars[:-1], strict=True):
            epsilon = epsilon + dense(x)
        return epsilon[:, 0]
