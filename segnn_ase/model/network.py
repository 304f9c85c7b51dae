"""`SEGNN`, the backbone: steerable features in, steerable features out."""

import copy

import torch
from e3nn.o3 import Irreps
from torch import Tensor, nn

from segnn_ase.compiled.splines import TOLERANCE, RadialTables, tabulate
from segnn_ase.model.edges import Edges, bessel, make_edges, node_attributes, sorted_edges
from segnn_ase.model.interactions import Message, SelfProduct, Update
from segnn_ase.model.irreps import SCALAR, Features, Layout, kinds, multiplicities, parse_irreps, spherical_kinds
from segnn_ase.model.layers import SteerableLinear
from segnn_ase.model.published import PublishedMessage
from segnn_ase.model.scalars import MLP, Dense
from segnn_ase.model.settings import ModelConfig


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
        lmax = config.lmax_attr
        self.embedding = SteerableLinear(self.layout_in.irreps, spherical_kinds(lmax), self.irreps)
        if config.message == "published":
            layers = [PublishedMessage(self.irreps, lmax, n_edge_scalars=n_edge_scalars) for _ in self._interactions]
        else:
            layers = [
                Message(
                    self.irreps,
                    lmax,
                    linear=config.message == "linear",
                    n_radial=config.n_radial,
                    hidden=config.radial_hidden,
                )
                for _ in self._interactions
            ]
        self.messages = nn.ModuleList(layers)
        self.register_buffer("norms", torch.tensor([[4.0, 1.0]]).repeat(config.interactions, 1))
        powers = self._interactions if config.body_order > 1 else ()
        self.products = nn.ModuleList(SelfProduct(self.irreps, config.body_order) for _ in powers)
        self.updates = nn.ModuleList(Update(self.irreps, lmax) for _ in self._interactions)
        self.fused = False
        self.table_step: float | None = None

    def accelerate(self, on: bool = True) -> None:
        """Let fused kernels do the work of the layers that have one; on the CPU or a GPU."""
        self.tabulate(False)
        for module in self.modules():
            if hasattr(module, "fused"):
                module.fused = on

    def tabulate(self, on: bool = True) -> RadialTables | None:
        """Let the fused kernels take the radial functions from tables, for evaluation only; see `tables`."""
        self.table_step = None
        if not (on and self._sorts):
            return None
        functions = [self._radial_function(message) for message in self.messages]
        found = tabulate(functions, self.config.cutoff, TOLERANCE[self.norms.dtype])
        for message, coefficients in zip(self.messages, found.coefficients, strict=True):
            message.tabulate(coefficients)
        self.table_step = found.step
        return found

    def _radial_function(self, message: Message):
        mlp = copy.deepcopy(message.radial).cpu().double().requires_grad_(False)
        # even in d and finite at 0, where only the formula is 0 / 0
        return lambda d: mlp(bessel(d + 1e-12, self.config.n_radial, self.config.cutoff))

    def train(self, mode: bool = True) -> "SEGNN":
        if mode:
            self.tabulate(False)
        return super().train(mode)

    @property
    def _sorts(self) -> bool:
        return self.fused and self.config.message != "published"

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
    ) -> tuple[list[Features], Tensor]:
        """Return the node features after each interaction and the node attributes (N, (lmax_attr + 1)^2).

        features (N, irreps_in.dim) in e3nn's layout of irreps_in as written; vectors r_ij (E, 3); edge_src j and
        edge_dst i (E,).
        node_attr (N, (lmax_attr + 1)^2) is added to the node attributes (the harmonics of a velocity, say);
        edge_scalars (E, n_edge_scalars) enter the published message beside d^2. edge_pair (E,), of the graph, saves
        time only.
        """
        config = self.config
        self._check_edge_scalars(edge_scalars, len(edge_dst))
        basis = {"cutoff": config.cutoff, "lmax": config.lmax_attr, "n_radial": config.n_radial}
        if self._sorts:
            edges = sorted_edges(
                vectors, edge_src, edge_dst, len(features), edge_pair=edge_pair, table_step=self.table_step, **basis
            )
        else:
            edges = make_edges(vectors, edge_src, edge_dst, len(features), **basis)
        a = node_attributes(edges, smooth=config.smooth)
        if node_attr is not None:
            a = a + node_attr
        f = self.embedding(self.layout_in.split(features), a)
        context = self._context(edges, edge_scalars)
        history = []
        for t in self._interactions:
            m = self._scaled(self.messages[t](f, edges, *context), self.norms[t, 0])
            if self.products:
                m = self._scaled(self.products[t](m), self.norms[t, 1])
            f = self.updates[t](f, m, a)
            history.append(f)
        return history, a

    def _check_edge_scalars(self, edge_scalars: Tensor | None, n_edges: int) -> None:
        given = (n_edges, 0) if edge_scalars is None else tuple(edge_scalars.shape)
        expected = (n_edges, self.n_edge_scalars)
        if given != expected:
            raise ValueError(f"edge_scalars has shape {given}; expected {expected}, by n_edge_scalars of the model")

    @staticmethod
    def _scaled(m: Features, norm: Tensor) -> Features:
        return tuple(x / norm for x in m)

    @torch.no_grad()
    def calibrate(self, *inputs, **keywords) -> list[list[float]]:
        """Set `norms` so that messages and self-products have unit mean square on this input (that of `forward`)."""
        for t in self._interactions:
            for k, layer in enumerate([self.messages[t], *self.products[t : t + 1]]):
                seen: list[Tensor] = []
                hook = layer.register_forward_hook(lambda module, args, out, seen=seen: seen.extend(out))
                self(*inputs, **keywords)
                hook.remove()
                # the loudest kind counts: a kind that is silent for symmetry must not amplify the others
                rms = max(float(x.square().mean()) for x in seen) ** 0.5 if len(seen[0]) else 0.0
                self.norms[t, k] = rms if rms > 1e-3 else 1.0
        return self.norms.tolist()

    def _context(self, edges: Edges, edge_scalars: Tensor | None) -> tuple:
        if self._sorts:
            return (None,)
        if self.config.message != "published":
            # all interactions share the coupling of their irreps with a_ij
            return ([c.matrices(edges.harmonics) for c in self.messages[0].couplings],)
        if edge_scalars is not None:
            edge_scalars = edges.to_slots(edge_scalars)
        return edges.harmonics, edge_scalars


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
