"""The steps of a `Potential`'s network (`steps.py`), one function a layer.

Irreps with different numbers of channels go block by block of channels, as in `ChannelBlocks`, and where kinds do not
meet, group by group of kinds with as many channels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from segnn_ase.compiled import formulas
from segnn_ase.compiled.derivatives import Operation, relaid
from segnn_ase.compiled.geometry import Geometry
from segnn_ase.compiled.species_steps import first_features, product_of_embedded
from segnn_ase.compiled.splines import RadialTables
from segnn_ase.compiled.steered_steps import GEOMETRY, parted, steered_linear, steered_map
from segnn_ase.compiled.steps import Array, MatrixProduct, NetworkSteps, RowOperation, Segment, Step, View, Weight
from segnn_ase.model.interactions import Message, SelfProduct, Update
from segnn_ase.model.irreps import SCALAR, kinds, multiplicities, spherical_kinds
from segnn_ase.model.readouts import Readout
from segnn_ase.model.scalars import MLP, SIGMOID_SCALE, SILU_SCALE, Dense

WEIGHT = {"weight": True}


def supported(potential: nn.Module) -> bool:
    """Whether `make_steps` knows this network: all but the published message and weights of senders."""
    return potential.config.message != "published" and not potential.config.density_weighting


def make_steps(potential: nn.Module, tables: RadialTables | None = None) -> NetworkSteps:
    """Steps of a network; radial functions by their MLPs, or from tables, one for each interaction."""
    return _Network(potential, tables).steps()


class _Network:
    """Arrays and steps of a network while they are made; `now` are those on nodes since the last segment on edges."""

    def __init__(self, potential: nn.Module, tables: RadialTables | None):
        self.potential, self.segnn, self.tables = potential, potential.segnn, tables
        self.fixed = tables is not None  # the weights: what follows the embedding is made of it now
        self.kinds, self.mul = kinds(self.segnn.irreps), multiplicities(self.segnn.irreps)
        self.dims, self.scalar = [kind.dim for kind in self.kinds], self.kinds.index(SCALAR)
        self.attr = spherical_kinds(potential.config.lmax_attr)
        self.norms: list[list[float]] = self.segnn.norms.tolist()
        width, self.geometry = self.mul[self.scalar], Geometry(potential.config, tables)
        self.network = NetworkSteps(
            vectors=self.geometry.vectors,
            pair_vectors=self.geometry.pair_vectors,
            epsilon=Array("node", 1),
            features=View(Array("node", width), 1, width),
            cues=self.geometry.cues,
            read=tuple(Array("node", kind.dim) for kind in potential.besides.places) if potential.besides else (),
            segments=self.geometry.segments(),
        )
        self.now: list[Step] = [self.geometry.normalised()]

    def steps(self) -> NetworkSteps:
        radial = self.tables.coefficients if self.tables else self.radial()
        both = self.nodes(1 if self.fixed else 2)  # features, and beside them what is received
        if not self.fixed:
            self.embed(both)
        depth = len(self.segnn.messages)
        for t in range(depth):
            powers = self.receive(t, both, radial[t])
            self.multiply(t, powers, both)
            both = self.update(t, both, last=t == depth - 1)
            if self.network.read:
                scalars = self.network.features if t == depth - 1 else self.view(self.scalar, both[self.scalar])
                views = [scalars if k == self.scalar else self.view(k, x) for k, x in enumerate(both)]
                self.now += _read_out(self.potential.besides, t, views, self.network.read)
            if t < depth - 1:
                x = self.view(self.scalar, both[self.scalar])
                self.now.append(MatrixProduct(x, _dense(self.potential.readout.linear[t]), self.epsilon, add=t > 0))
        self.now += _mlp(self.potential.readout.last, self.network.features, self.epsilon, add=depth > 1)
        self.network.segments.append(Segment("node", self.now))
        return self.network

    # arrays

    @property
    def epsilon(self) -> View:
        return View(self.network.epsilon, 1, 1)

    def nodes(self, times: int = 1) -> list[Array]:
        """One array for each kind, with some times its channels."""
        return [Array("node", dim * times * m) for dim, m in zip(self.dims, self.mul, strict=True)]

    def view(self, k: int, array: Array, offset: int = 0) -> View:
        return View(array, self.dims[k], array.size // self.dims[k], offset)

    def received(self, k: int, both: list[Array]) -> View:
        """Beside the features, if there are some."""
        return self.view(k, both[k], both[k].size // self.dims[k] - self.mul[k])

    def groups(self) -> list[list[int]]:
        """Kinds with as many channels."""
        return [[k for k, m in enumerate(self.mul) if m == count] for count in sorted(set(self.mul), reverse=True)]

    # layers

    def radial(self) -> list[Array]:
        """rho of all pairs, of every interaction."""
        basis, factors, n = self.geometry.radial, [], self.geometry.radial.size
        steps: list[Step] = [self.geometry.radial_functions()]
        for message in self.segnn.messages:
            factors.append(Array("pair", sum(message.n_factors)))
            steps += _mlp(message.radial, View(basis, 1, n), View(factors[-1], 1, factors[-1].size))
        self.network.segments.append(Segment("pair", steps))
        return factors

    def embed(self, out: list[Array], layers: "Iterable[Dense]" = ()) -> None:
        """First features, or with layers, one for each kind, what these make of them."""
        maps = [layer.weight.detach().double() * layer.weight.shape[0] ** -0.5 for layer in layers]
        views = {k: self.view(k, x) for k, x in enumerate(out)}
        self.now += first_features(self.segnn.embedding, self.geometry.attributes, views, maps or None)

    def receive(self, t: int, both: list[Array], factors: "Array | Tensor") -> list[Array]:
        """A message and what follows on its receivers; returns arrays that begin with it, with room for its powers."""
        message: Message = self.segnn.messages[t]
        pair, order = self.nodes(1 if message.linear else 2), self.potential.config.body_order
        if self.fixed and t == 0:
            self.embed(pair, message.pair)
        else:
            for k, dense in enumerate(message.pair):
                self.now.append(MatrixProduct(self.view(k, both[k]), _dense(dense), self.view(k, pair[k])))
        self.network.segments.append(Segment("node", self.now))
        widths = [dense.weight.shape[0] for dense in message.out]
        sent = [Array("node", dim * width) for dim, width in zip(self.dims, widths, strict=True)]
        for b in range(len(message.couplings)):
            self.network.segments.append(Segment("edge", [self.message_block(message, b, pair, factors, sent)]))
        sent, self.now = (sent, []) if self.fixed else _as_paths(message, self.dims, sent)
        into = self.nodes(order) if order > 1 else both
        for k, dense in enumerate(message.out):
            out = self.view(k, into[k]) if order > 1 else self.received(k, both)
            weight = _dense(dense, 1.0 / self.norms[t][0])
            weight = _of_sent(message, k, weight) if self.fixed else weight
            self.now.append(MatrixProduct(self.view(k, sent[k]), weight, out))
        return into

    def message_block(
        self, message: Message, b: int, pair: list[Array], factors: "Array | Tensor", sent: list[Array]
    ) -> RowOperation:
        coupling, channels, members = message.couplings[b], message.blocks.width(b), message.blocks.members[b]
        tabulated, low = isinstance(factors, Tensor), message.blocks.ranges[b][0]
        given: dict = {"tabulated": tabulated, "terms": self.segnn.message_terms}
        if message.linear:
            operation = formulas.linear_message(coupling, channels, **given)
        else:
            operation = formulas.message(coupling, channels, SILU_SCALE, SIGMOID_SCALE, **given)
        changes: dict = {
            "harmonics": GEOMETRY,
            "envelope": GEOMETRY,
            "fraction": GEOMETRY,
            "mix": WEIGHT,
            "bias": WEIGHT,
        }
        if self.geometry.cues:
            changes |= {f"cues_{end}": {"size": self.geometry.cues.size} for end in ("receiver", "sender")}
        first, width = sum(message.n_factors[:b]), sum(message.n_factors)
        changes["rho"] = _moved(operation, "rho", first, width)
        changes["table"] = _moved(operation, "table", first, width, rows=message.n_factors[b])
        for position, k in enumerate(members):
            stride = pair[k].size // self.dims[k]
            changes[f"receiver{position}"] = _within(self.dims[k], stride, low)
            changes[f"sender{position}"] = _within(self.dims[k], stride, low + stride - self.mul[k])
            changes[f"out{position}"] = _sent_by(message, b, position, self.dims[k], sent[k].size // self.dims[k])
        rho = (Weight(_for_ladders(message, factors)), self.geometry.fraction) if tabulated else (factors,)
        weights = () if message.linear else (Weight(message.mix[b]), Weight(message.bias[b]))
        told = (self.geometry.cues,) if self.segnn.message_terms else ()
        inputs = (*(pair[k] for k in members), *rho, self.geometry.harmonics, self.geometry.envelope, *weights, *told)
        return RowOperation(relaid(operation, **changes), inputs, tuple(sent[k] for k in members))

    def multiply(self, t: int, powers: list[Array], both: list[Array]) -> None:
        """Self-products of what was received, and their sum beside the features."""
        if not self.segnn.products:
            return
        layer: SelfProduct = self.segnn.products[t]
        for b, members in enumerate(layer.blocks.members):
            low, width = layer.blocks.ranges[b][0], layer.blocks.width(b)
            changes: dict = {}
            for position, k in enumerate(members):
                dim, stride = self.dims[k], layer.order * self.mul[k]
                changes[f"m{position}"] = _within(dim, stride, low)
                for q in range(layer.order - 1):
                    changes[f"w{q}"] = WEIGHT
                    changes[f"power{q}_{position}"] = _within(dim, stride, (q + 1) * self.mul[k] + low)
            operation = relaid(formulas.self_product(layer.couplings(b), width, layer.scales, layer.bound), **changes)
            arrays = tuple(powers[k] for k in members)
            weights = tuple(Weight(power[b]) for power in layer.weights)
            self.now.append(RowOperation(operation, (*arrays, *weights), arrays * (layer.order - 1)))
        for k, dense in enumerate(layer.linear):
            out = self.received(k, both)
            weight = _dense(dense, 1.0 / self.norms[t][1])
            self.now.append(MatrixProduct(self.view(k, powers[k]), weight, out))

    def update(self, t: int, both: list[Array], *, last: bool) -> list[Array]:
        """New features; of the last only what something is read of."""
        update: Update = self.segnn.updates[t]
        widths, a, embedded = multiplicities(update.gate.irreps_in), self.geometry.attributes, self.fixed and t == 0
        opened = [Array("node", dim * width) for dim, width in zip(self.dims, widths, strict=True)]
        inside, first = {k: self.view(k, x) for k, x in enumerate(opened)}, steered_map(update.first)
        if embedded:
            of_features, first = parted(first, self.mul)
            self.now += product_of_embedded(self.segnn.embedding, of_features, a, inside)
        self.now += steered_linear(first, both, a, inside, add=embedded)
        gated, new = self.gate(opened), self.nodes(1 if last else 2)
        out = {k: self.view(k, x) for k, x in enumerate(new)}
        if last:
            wanted = {self.scalar} if not self.network.read else {*self.potential.besides.places.values()}
            out = {k: self.network.features if k == self.scalar else out[k] for k in sorted(wanted)}
        if embedded:
            self.now += first_features(self.segnn.embedding, a, out)
        before = {} if embedded else {k: self.view(k, both[k]) for k in out}
        self.now += steered_linear(steered_map(update.second, 0.5**0.5), gated, a, out, before, add=embedded)
        return new

    def gate(self, opened: list[Array]) -> list[Array]:
        gated = self.nodes()
        if len(self.groups()) == 1:
            operation = formulas.gate(self.kinds, self.mul[0], SILU_SCALE, SIGMOID_SCALE)
            self.now.append(RowOperation(operation, tuple(opened), tuple(gated)))
            return gated
        scalars, at = opened[self.scalar], self.mul[self.scalar]
        own = relaid(formulas.activation(at, SILU_SCALE), x={"size": scalars.size})
        self.now.append(RowOperation(own, (scalars,), (gated[self.scalar],)))
        for k, kind in enumerate(self.kinds):
            if k != self.scalar:
                place = {"size": scalars.size, "offsets": (at,)}
                operation = relaid(formulas.opened(kind.dim, self.mul[k], SIGMOID_SCALE), gate=place)
                self.now.append(RowOperation(operation, (opened[k], scalars), (gated[k],)))
                at += self.mul[k]
        return gated


def _read_out(layer: Readout, t: int, features: list[View], read: tuple[Array, ...]) -> list[Step]:
    """What is read out of the features after an interaction, but their energy."""
    found = zip(layer.places.values(), layer.layers[t], read, strict=True)
    return [MatrixProduct(features[k], _dense(dense), View(x, x.size, 1), add=t > 0) for k, dense, x in found]


def _within(dim: int, stride: int, offset: int = 0) -> dict:
    """Layout of features (n, dim, stride) whose channels start at offset."""
    return {"size": dim * stride, "offsets": tuple(m * stride + offset for m in range(dim))}


def _moved(operation: Operation, name: str, first: int, width: int, rows: int = 0) -> dict:
    """An operand's components as part of rows of `width` numbers, from `first` on; several rows of `rows` follow."""
    operand = next((o for o in operation.inputs if o.name == name), None)
    if operand is None:
        return {}
    rows = rows or width
    return {"size": width, "offsets": tuple(o // rows * width + first + o % rows for o in operand.offsets)}


def _as_paths(message: Message, dims: list[int], sent: list[Array]) -> tuple[list[Array], list[Step]]:
    """What is received, from the ladders that are sent, and the steps to it."""
    if message.linear:  # a sum of paths already
        return sent, []
    steps: list[Step] = []
    paths = [Array("node", x.size) for x in sent]
    for b, members in enumerate(message.blocks.members):
        layouts = [_sent_by(message, b, p, dims[k], sent[k].size // dims[k]) for p, k in enumerate(members)]
        changes = {f"{side}{p}": layout for p, layout in enumerate(layouts) for side in ("in", "out")}
        operation = relaid(formulas.recombined(message.couplings[b], message.blocks.width(b)), **changes)
        steps.append(RowOperation(operation, *(tuple(x[k] for k in members) for x in (sent, paths))))
    return paths, steps


def _of_sent(message: Message, k: int, weight: Weight) -> Weight:
    """Weights of the paths into a kind as those of the ladders that are sent, to do without `recombined`."""
    if message.linear:
        return weight
    rows, mixed = weight.parameter.detach().double(), []
    for b, members in enumerate(message.blocks.members):
        if k in members:
            matrix = formulas.recombination(message.couplings[b], members.index(k))
            size = len(matrix) * message.blocks.width(b)
            mixed.append((matrix.T.to(rows) @ rows[:size].unflatten(0, (len(matrix), -1)).flatten(1)).view(size, -1))
            rows = rows[size:]
    return Weight(torch.cat(mixed), weight.scale)


def _for_ladders(message: Message, table: Tensor) -> Tensor:
    """A table (rows, rho of all blocks) as the messages' formulas take it."""
    blocks = zip(table.split(message.n_factors, dim=1), message.couplings, strict=True)
    parts = []
    for rho, coupling in blocks:
        mixed = formulas.radial_mixture(coupling, linear=message.linear).to(table)
        parts.append((mixed @ rho.unflatten(1, (len(mixed), -1))).flatten(1))
    return torch.cat(parts, 1)


def _dense(layer: Dense, scale: float = 1.0) -> Weight:
    return Weight(layer.weight, scale * layer.weight.shape[0] ** -0.5)


def _mlp(layers: MLP, x: View, out: View, *, add: bool = False) -> list[Step]:
    made: list[Step] = []
    for layer in layers.layers:
        width = layer.weight.shape[1]
        before, after = (Array(x.array.where, width) for _ in range(2))
        made.append(MatrixProduct(x, _dense(layer), View(before, 1, width), bias=Weight(layer.bias)))
        made.append(RowOperation(formulas.activation(width, SILU_SCALE), (before,), (after,)))
        x = View(after, 1, width)
    return [*made, MatrixProduct(x, _dense(layers.last), out, add=add)]


def _sent_by(message: Message, b: int, position: int, dim: int, stride: int) -> dict:
    """Where a block's paths into a kind go: behind those of the blocks before, (2l+1, all paths and channels)."""
    k = message.blocks.members[b][position]
    paths = [
        0 if k not in members else 1 if message.linear else c.paths_into(members.index(k))
        for members, c in zip(message.blocks.members, message.couplings, strict=True)
    ]
    before, width = sum(n * message.blocks.width(q) for q, n in enumerate(paths[:b])), message.blocks.width(b)
    offsets = (m * stride + before + p * width for m in range(dim) for p in range(paths[b]))
    return {"size": dim * stride, "offsets": tuple(offsets)}
