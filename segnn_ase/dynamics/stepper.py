"""`TimeStepper`: where bodies are a fixed time later, by one pass of a network."""

import math
from typing import Annotated, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from segnn_ase.base.errors import StructureError, expect
from segnn_ase.dynamics.egnn import EGNN
from segnn_ase.dynamics.settings import FAR, StepperConfig
from segnn_ase.model.edges import CLOSEST, bessel
from segnn_ase.model.irreps import multiplicities, parse_irreps, spherical_harmonics
from segnn_ase.model.network import SEGNN
from segnn_ase.model.published import SteerableHead
from segnn_ase.structure.graph import Per, sum_over_atoms

NEAR = 0.05  # keeps inverse distances finite; of the scale of positions
FIRST = 0.1  # of the scale of displacements, which the network says before it is trained
BESSEL, MORE = 8, 5  # functions of the distance and other invariants of a pair, with `pair_functions` = "many"
EQUIVARIANT, COMPONENTS = ("2x1o+1x0e", "1x1o"), ("7x0e", "3x0e")  # position, velocity and speed; what is said of it
STEERING = 0.5  # of harmonics of the velocity beside those of neighbours: with all of them layers amplify each other


class Bodies(NamedTuple):
    """Systems of bodies as one graph; see `structure.graph.Graph`."""

    positions: Annotated[Tensor, Per("node")]  # (N, 3)
    velocities: Annotated[Tensor, Per("node")]  # (N, 3)
    charges: Annotated[Tensor, Per("node")]  # (N,) or masses
    edge_src: Annotated[Tensor, Per("edge", "node")]  # (E,) senders j
    edge_dst: Annotated[Tensor, Per("edge", "node")]  # (E,) receivers i
    batch: Annotated[Tensor, Per("node", "structure")]  # (N,) system of each body
    n_graphs: int

    def to(self, device) -> "Bodies":
        return type(self)(*(x.to(device) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]


def bodies(positions: np.ndarray, velocities: np.ndarray, charges: np.ndarray, neighbors: int | None = None) -> Bodies:
    """One system: (n, 3), (n, 3), (n,). neighbors: so many nearest bodies send to each; None: all others.

    Raises StructureError where the numbers are not finite or the shapes do not fit.
    """
    x, v, q = (torch.as_tensor(np.asarray(values, dtype=float)) for values in (positions, velocities, charges))
    n = len(x)
    if x.shape != (n, 3) or v.shape != (n, 3) or q.shape != (n,) or n < 2:
        shapes = ", ".join(str(tuple(values.shape)) for values in (x, v, q))
        raise StructureError(f"positions, velocities and charges are {shapes}; expected (n, 3), (n, 3), (n,), n > 1")
    if not all(bool(torch.isfinite(values).all()) for values in (x, v, q)):
        raise StructureError("positions, velocities or charges are not finite; expected numbers")
    distances = torch.cdist(x, x).fill_diagonal_(math.inf)
    near = distances.topk(min(neighbors or n - 1, n - 1), largest=False).indices.sort(dim=1).values
    receivers = torch.arange(n)[:, None].expand_as(near)
    zeros = torch.zeros(n, dtype=torch.long)
    return Bodies(x, v, q, near.flatten(), receivers.flatten(), zeros, 1)


class Scales(NamedTuple):
    """Root mean squares of components over the training set: what the network sees and gives is of the order of one."""

    position: float  # from the centre
    velocity: float
    displacement: float


UNIT = Scales(1.0, 1.0, 1.0)


class TimeStepper(nn.Module):
    """x(t + dt) = x(t) + network(x - mean x, v, q), in units of `scales`; Brandstetter et al., ICLR 2022, section 5.1.

    With `steps` in the settings it goes a part of the way so many times, with the same weights. Positions enter
    relative to the mean of their system, so that the result moves and turns with the bodies.
    """

    def __init__(self, config: StepperConfig, *, scales: Scales = UNIT, seed: int = 0):
        super().__init__()
        expect(isinstance(config, StepperConfig), "config", config, "a StepperConfig")
        self.config, self.scales = config, Scales(*map(float, scales))
        backbone, pairs = config.backbone(), MORE + BESSEL if config.pair_functions == "many" else 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if config.network == "egnn":
                width = multiplicities(parse_irreps(config.hidden_irreps))[0]
                self.egnn = EGNN(width, config.interactions, 1, pairs, features=config.features)
                return
            given, out = EQUIVARIANT if config.equivariant else COMPONENTS
            linear = config.message == "linear"  # which has no scalars of pairs: charges are features of bodies
            given = f"{given}+1x0e" if linear else given
            self.segnn = SEGNN(backbone, given, n_edge_scalars=0 if linear else pairs)
            self.head = SteerableHead(backbone, f"{out}+{out}" if config.moves_velocities else out)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, graph: Bodies) -> Tensor:
        """Positions later, (N, 3), float64; with `velocities` in the settings these beside them, (N, 6)."""
        part = self.scales.displacement / self.config.steps
        for _ in range(self.config.steps):
            moved = self._moved(graph)
            state = torch.cat([graph.positions, graph.velocities], dim=1)[:, : moved.shape[1]] + part * moved.double()
            graph = graph._replace(positions=state[:, :3], velocities=state[:, 3:])
        return state if self.config.velocities else state[:, :3]

    def _moved(self, graph: Bodies) -> Tensor:
        """How far bodies and their velocities move, (N, 3) or (N, 6)."""
        if self.config.network == "egnn":
            x, v, q = self._centred(graph)
            scalars = self.pair_scalars(x[graph.edge_src] - x[graph.edge_dst], v, q, graph)
            return self.egnn(length(v), x, v, graph.edge_src, graph.edge_dst, scalars) - x
        history, a = self.segnn(**self._inputs(graph))
        return self.head(history[-1], a)

    @torch.no_grad()
    def calibrate(self, graph: Bodies) -> None:
        """Set the norms of the messages from a batch, see `SEGNN.calibrate`, and let the last weights begin small."""
        if self.config.network == "segnn":
            inputs = self._inputs(graph)
            self.segnn.calibrate(**inputs)
            history, a = self.segnn(**inputs)
            size = float(self.head(history[-1], a).square().mean().sqrt())
            for weight in self.head.second.weights:
                weight.mul_(FIRST / size if size else 1.0)

    def step(self, positions: np.ndarray, velocities: np.ndarray, charges: np.ndarray) -> np.ndarray:
        """Positions of one system later, (n, 3); with `velocities` in the settings these beside them, (n, 6).

        positions and velocities (n, 3), charges or masses (n,). Raises StructureError for what is no system.
        """
        graph = bodies(positions, velocities, charges, self.config.neighbors)
        with torch.no_grad():
            return self(graph.to(self.device)).cpu().numpy()

    def _inputs(self, graph: Bodies) -> dict:
        """What the steerable network takes."""
        x, v, q = self._centred(graph)
        speed, vectors, linear = length(v), x[graph.edge_src] - x[graph.edge_dst], self.config.message == "linear"
        steered = None
        if self.config.velocity_attribute:
            harmonics = spherical_harmonics(v / speed, self.config.lmax_attr)
            steered = torch.cat([torch.zeros_like(speed), STEERING * harmonics[:, 1:]], dim=1)
        return {
            "features": torch.cat([x, v, speed, *([q[:, None]] if linear else [])], dim=1),
            "vectors": vectors,
            "edge_src": graph.edge_src,
            "edge_dst": graph.edge_dst,
            "node_attr": steered,
            "edge_scalars": None if linear else self.pair_scalars(vectors, v, q, graph),
        }

    def _centred(self, graph: Bodies) -> tuple[Tensor, Tensor, Tensor]:
        """Positions from the centre of their system, velocities and charges, in the precision of the weights."""
        position, velocity, _ = self.scales
        values = (graph.positions - centre_of(graph)) / position, graph.velocities / velocity, graph.charges
        x, v, q = (value.to(self.dtype) for value in values)
        return x, v, q

    def pair_scalars(self, vectors: Tensor, v: Tensor, q: Tensor, graph: Bodies) -> Tensor:
        """Invariants of each pair, (E, n), beside the squared distance."""
        product = (q[graph.edge_src] * q[graph.edge_dst])[:, None]
        if self.config.pair_functions == "published":
            return product
        d = length(vectors)
        inverse = 1 / (d + NEAR)
        relative = v[graph.edge_src] - v[graph.edge_dst]
        receding = (vectors * relative).sum(1, keepdim=True) / d
        more = receding, length(relative), product, product * inverse, inverse
        return torch.cat([*more, bessel(d.clamp_max(FAR), BESSEL, FAR)], dim=1)


def length(vectors: Tensor) -> Tensor:
    """(n, 1); never zero, so that nothing that is derived from it explodes."""
    return vectors.square().sum(1, keepdim=True).clamp_min(CLOSEST**2).sqrt()


def centre_of(graph: Bodies) -> Tensor:
    """The mean position of its system for each body, (N, 3)."""
    count = torch.bincount(graph.batch, minlength=graph.n_graphs)[:, None]
    return (sum_over_atoms(graph.positions, graph) / count)[graph.batch]
