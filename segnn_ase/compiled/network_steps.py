"""The network as a list of steps with its parameters, from which `plan.py` and `training_engine.py` derive the rest.

Forward steps only: row operations (`operations.py`) and matrix products, on pairs of atoms (radial functions), on
atoms, or on edges (messages). All but the messages act on single atoms.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from segnn_ase.compiled import formulas
from segnn_ase.compiled.derivatives import Operation
from segnn_ase.model.irreps import SCALAR, Coupling, kinds, multiplicities, spherical_kinds
from segnn_ase.model.scalars import SIGMOID_SCALE, SILU_SCALE


@dataclass(eq=False)
class Array:
    """Numbers for every pair, atom or edge; `size` for each."""

    where: str
    size: int
    geometry: bool = False  # does not depend on the weights


class View(NamedTuple):
    array: Array
    rows: int
    stride: int
    offset: int = 0


class Weight(NamedTuple):
    """A parameter, or a table of radial functions, as it is used: times scale, cut to shape."""

    parameter: Tensor
    scale: float = 1.0


@dataclass(frozen=True)
class Product:
    a: View
    weight: Weight
    c: View
    bias: Weight | None = None
    d: View | None = None
    add: bool = False


@dataclass(frozen=True)
class Rows:
    operation: Operation
    inputs: list["Array | Weight"]
    outputs: list[Array]


@dataclass
class Program:
    """Segments ("pair", "node" or "edge", steps) that take the geometry to `epsilon` and `features`."""

    radial: Array  # Bessel functions of pairs, or with tables
    fraction: Array  # of the way of an edge to the next knot
    harmonics: Array
    envelope: Array
    attributes: Array
    epsilon: Array
    features: View
    segments: list[tuple[str, list]] = field(default_factory=list)


WEIGHT, GEOMETRY = {"weight": True}, {"geometry": True}


def relaid(operation: Operation, **changes: dict) -> Operation:
    """The same operation with other fields for some operands: {name: {field: value}}."""

    def moved(operands):
        return tuple(replace(o, **changes.get(o.name, {})) for o in operands)

    return replace(operation, inputs=moved(operation.inputs), outputs=moved(operation.outputs))


def beside(dim: int, stride: int, offset: int = 0) -> dict:
    """Layout of features (n, dim, stride) whose channels start at offset."""
    return {"size": dim * stride, "offsets": tuple(m * stride + offset for m in range(dim))}


def make_program(potential: nn.Module, *, tabulated: bool = False) -> Program:
    """Steps of a network that `plan.supported` knows; its radial functions by their MLPs, or tabulated."""
    segnn, readout, config = potential.segnn, potential.readout, potential.config
    kinds_ = kinds(segnn.irreps)
    n_kinds, channels = len(kinds_), multiplicities(segnn.irreps)[0]
    dims, scalar = [kind.dim for kind in kinds_], kinds_.index(SCALAR)
    attr, depth, order = spherical_kinds(config.lmax_attr), config.interactions, config.body_order
    last = depth - 1
    n_attr = (config.lmax_attr + 1) ** 2
    linear = config.message == "linear"
    norms = segnn.norms.tolist()

    def nodes(width: int) -> list[Array]:
        return [Array("node", dim * width) for dim in dims]

    def views(arrays: list[Array], stride: int, offset: int = 0) -> list[View]:
        return [View(b, dim, stride, offset) for b, dim in zip(arrays, dims, strict=True)]

    def dense(layer, scale: float = 1.0) -> Weight:
        return Weight(layer.weight, scale * layer.weight.shape[0] ** -0.5)

    def tensor_product(linear, k: int, scale: float = 1.0) -> Weight:
        return Weight(linear.weights[k], scale * max(len(linear.weights[k]), 1) ** -0.5)

    def mlp(layers, x: View, out: View, *, add: bool = False) -> list[Rows | Product]:
        made: list[Rows | Product] = []
        for layer in layers.layers:
            width = layer.weight.shape[1]
            before, after = (Array(x.array.where, width) for _ in range(2))
            made.append(Product(x, dense(layer), View(before, 1, width), bias=Weight(layer.bias)))
            made.append(Rows(formulas.activation(width, SILU_SCALE), [before], [after]))
            x = View(after, 1, width)
        return [*made, Product(x, dense(layers.last), out, add=add)]

    features = View(Array("node", channels), 1, channels)
    epsilon = Array("node", 1)
    eps = View(epsilon, 1, 1)
    program = Program(
        radial=Array("pair", config.n_radial, geometry=True),
        fraction=Array("edge", 1, geometry=True),
        harmonics=Array("edge", n_attr, geometry=True),
        envelope=Array("edge", 1, geometry=True),
        attributes=Array("node", n_attr, geometry=True),
        epsilon=epsilon,
        features=features,
    )
    a = program.attributes

    # radial functions, on pairs
    rho: list[list[Array | Weight]] = []
    steps: list[Rows | Product] = []
    for message in segnn.messages:
        if tabulated:
            rho.append([Weight(message.tables[0]), program.fraction])
            continue
        factors = Array("pair", message.radial.last.weight.shape[1])
        rho.append([factors])
        steps += mlp(message.radial, View(program.radial, 1, config.n_radial), View(factors, 1, factors.size))
    if steps:
        program.segments.append(("pair", steps))

    coupling = segnn.messages[0].couplings[0]
    if linear:
        message_operation = formulas.linear_message(coupling, channels, tabulated=tabulated)
    else:
        message_operation = formulas.message(coupling, channels, SILU_SCALE, SIGMOID_SCALE, tabulated=tabulated)
    summed = GEOMETRY | {"added": True}
    message_operation = relaid(
        message_operation, harmonics=summed, envelope=summed, fraction=summed, mix=WEIGHT, bias=WEIGHT
    )
    n_sent = 1 if linear else 2
    n_paths = [1 if linear else coupling.paths_into(k) for k in range(n_kinds)]
    widths = multiplicities(segnn.updates[0].gate.irreps_in)
    gate = formulas.gate(kinds_, channels, SILU_SCALE, SIGMOID_SCALE)
    steering = {"a": GEOMETRY | {"added": True}}
    first = formulas.product(segnn.updates[0].first.coupling, 2 * channels)
    first = relaid(first, **steering, **{f"f{k}": {"added": True} for k in range(n_kinds)})
    power = None
    if order > 1:
        layer = segnn.products[0]
        couplings = tuple(p[0] for p in [layer.square, layer.cube][: order - 1])
        stride = order * channels
        changes: dict = {f"m{k}": {**beside(d, stride), "added": True} for k, d in enumerate(dims)}
        for q in range(order - 1):
            changes[f"w{q}"] = WEIGHT
            changes |= {f"power{q}_{k}": beside(d, stride, (q + 1) * channels) for k, d in enumerate(dims)}
        power = relaid(formulas.self_product(couplings, channels, layer.scales), **changes)

    both = [nodes(2 * channels) for _ in range(depth)]
    table = segnn.embedding
    embedding = formulas.embedding(table.coupling, channels)
    names = {o.name: WEIGHT | {"constant": False} for o in embedding.inputs if o.name != "a"}
    embedding = relaid(
        embedding, **steering, **names, **{f"out{k}": beside(dims[k], 2 * channels) for k in range(n_kinds)}
    )
    species = len(potential.species)
    constants = [tensor_product(table, k, species**0.5) for k in range(n_kinds) if len(table.weights[k])]
    steps = [Rows(embedding, [*constants, Weight(table.bias), a], both[0])]
    started = False
    for t in range(depth):
        message, update = segnn.messages[t], segnn.updates[t]
        f, m = views(both[t], 2 * channels), views(both[t], 2 * channels, channels)
        pair = nodes(n_sent * channels)
        steps += [
            Product(f[k], dense(message.pair[k]), View(pair[k], dims[k], n_sent * channels)) for k in range(n_kinds)
        ]
        sent = [Array("node", d * n * channels) for d, n in zip(dims, n_paths, strict=True)]
        weights = [] if linear else [Weight(message.mix[0]), Weight(message.bias[0])]
        geometry_arrays = [program.harmonics, program.envelope]
        program.segments += [
            ("node", steps),
            ("edge", [Rows(message_operation, [*pair, *rho[t], *geometry_arrays, *weights], sent)]),
        ]
        steps = []
        powers = nodes(order * channels)
        out = views(powers, order * channels) if order > 1 else m
        for k in range(n_kinds):
            x = View(sent[k], dims[k], n_paths[k] * channels)
            steps.append(Product(x, dense(message.out[k], 1.0 / norms[t][0]), out[k]))
        if order > 1:
            layer = segnn.products[t]
            own = [Weight(w[0]) for w in layer.weights]
            steps.append(Rows(power, [*powers, *own], [b for _ in range(order - 1) for b in powers]))
            for k in range(n_kinds):
                x = View(powers[k], dims[k], order * channels)
                steps.append(Product(x, dense(layer.linear[k], 1.0 / norms[t][1]), m[k]))
        products = [Array("node", o.size) for o in first.outputs]
        inside = [Array("node", d * w) for d, w in zip(dims, widths, strict=True)]
        steps.append(Rows(first, [*both[t], a], products))
        for k in range(n_kinds):
            bias = Weight(update.first.bias) if k == scalar else None
            x = View(products[k], dims[k], products[k].size // dims[k])
            steps.append(Product(x, tensor_product(update.first, k), View(inside[k], dims[k], widths[k]), bias=bias))
        gated = nodes(channels)
        steps.append(Rows(gate, inside, gated))
        reached, into = list(range(n_kinds)), kinds_
        if t == last:  # of the last features only the scalars are read
            reached, into = [scalar], (SCALAR,)
        second = relaid(formulas.product(Coupling(kinds_, attr, into), channels), **steering)
        products = [Array("node", o.size) for o in second.outputs]
        steps.append(Rows(second, [*gated, a], products))
        half = 0.5**0.5
        for array, k in zip(products, reached, strict=True):
            bias = Weight(update.second.bias, half) if k == scalar else None
            new = features if t == last else View(both[t + 1][k], dims[k], 2 * channels)
            x = View(array, dims[k], array.size // dims[k])
            steps.append(Product(x, tensor_product(update.second, k, half), new, bias=bias, d=f[k]))
        if t < last:
            x = View(both[t + 1][scalar], 1, 2 * channels)
            steps.append(Product(x, dense(readout.linear[t]), eps, add=started))
            started = True
    program.segments.append(("node", [*steps, *mlp(readout.last, features, eps, add=started)]))
    return program
