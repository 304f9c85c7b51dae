"""What a network does with one structure, forward and back, as a list of steps for `engine.py`.

All but the messages act on single atoms. Two kinds of steps are enough: row operations (`operations.py`), whose
gradients are compiled from the same formulas, and matrix products with the weights. Everything is evaluated with the
weights that the network has when the plan is made.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor, nn

from segnn_ase import operations
from segnn_ase.codegen import Operation
from segnn_ase.layers import SIGMOID_SCALE, SILU_SCALE, Dense, SteerableLinear
from segnn_ase.o3 import SCALAR, Coupling, kinds, multiplicities, spherical_kinds


@dataclass(eq=False)
class Buffer:
    """Numbers for every atom ("node"), for the atoms of one chunk ("scratch"), or for every edge ("edge"); `size` for
    each. A fixed one ("weights") has its tensor. "shared" is a node buffer that several threads add to."""

    kind: str
    size: int = 0
    tensor: Tensor | None = None


class View(NamedTuple):
    """Features in a buffer: `rows` rows an atom, `stride` apart, with the channels from `offset` on."""

    buffer: Buffer
    rows: int
    stride: int
    offset: int = 0


@dataclass(frozen=True)
class Rows:
    """An operation (order 0) or its gradient (order 1) on every atom or edge; one buffer for each of its tensors."""

    operation: Operation
    order: int
    inputs: list[Buffer]
    outputs: list[Buffer | None]


@dataclass(frozen=True)
class Product:
    """c = a weight + bias + d, or c += the same."""

    a: View
    weight: Tensor  # (K, N)
    c: View
    bias: Tensor | None = None
    d: View | None = None
    add: bool = False


@dataclass
class Plan:
    """Segments to be run one after the other: steps on atoms, or one step on edges.

    The first are given the geometry (harmonics, envelope, fraction: edges; attributes: atoms) and leave `epsilon` and
    `features`; all together leave the gradients of the sum of `weight` * epsilon.
    """

    harmonics: Buffer
    envelope: Buffer
    fraction: Buffer
    attributes: Buffer
    g_harmonics: Buffer
    g_envelope: Buffer
    g_fraction: Buffer
    g_attributes: Buffer
    epsilon: Buffer
    weight: Buffer
    features: View
    segments: list["list[Rows | Product] | Rows"] = field(default_factory=list)
    n_forward: int = 0  # segments that the energies need; the last of them goes on into the gradient
    n_last: int = 0  # steps of it that they need


def supported(potential: nn.Module) -> bool:
    """Whether `make_plan` knows this network: a steerable or linear message, as many channels for every irrep."""
    config = potential.config
    return config.message != "published" and len(set(multiplicities(potential.segnn.irreps))) == 1


def relaid(operation: Operation, **changes: dict) -> Operation:
    """The same operation with other fields for some operands: {name: {field: value}}."""

    def moved(operands):
        return tuple(replace(o, **changes.get(o.name, {})) for o in operands)

    return replace(operation, inputs=moved(operation.inputs), outputs=moved(operation.outputs))


def beside(dim: int, stride: int, offset: int = 0) -> dict:
    """Layout of features (n, dim, stride) whose channels start at offset."""
    return {"size": dim * stride, "offsets": tuple(m * stride + offset for m in range(dim))}


class _Layer:
    """One interaction: what it keeps for the way back, and its weights as they are used."""

    def __init__(self, segnn, t: int, n_kinds: int):
        self.message, self.update = segnn.messages[t], segnn.updates[t]
        self.product = segnn.products[t] if segnn.products else None
        norms = segnn.norms[t].detach().double()
        self.pair = [_weight(dense) for dense in self.message.pair]
        self.out = [_weight(dense) / norms[0] for dense in self.message.out]
        self.powers = [_weight(dense) / norms[1] for dense in self.product.linear] if self.product else []
        self.first = [_tensor_product_weight(self.update.first, k) for k in range(n_kinds)]
        self.second = [_tensor_product_weight(self.update.second, k) * 0.5**0.5 for k in range(n_kinds)]


def _weight(dense: Dense) -> Tensor:
    w = dense.weight.detach().double()
    return w * w.shape[0] ** -0.5


def _tensor_product_weight(linear: SteerableLinear, k: int) -> Tensor:
    w = linear.weights[k].detach().double()
    return w * max(len(w), 1) ** -0.5


def make_plan(potential: nn.Module) -> Plan:
    """Steps of a network whose radial functions are tabulated; see `supported`."""
    segnn, readout, config = potential.segnn, potential.readout, potential.config
    kinds_ = kinds(segnn.irreps)
    n_kinds, channels = len(kinds_), multiplicities(segnn.irreps)[0]
    dims, scalar = [kind.dim for kind in kinds_], kinds_.index(SCALAR)
    attr = spherical_kinds(config.lmax_attr)
    n_attr, depth = (config.lmax_attr + 1) ** 2, config.interactions
    last = depth - 1

    def nodes(width: int, kind: str = "node") -> list[Buffer]:
        return [Buffer(kind, dim * width) for dim in dims]

    def views(buffers: list[Buffer], stride: int, offset: int = 0) -> list[View]:
        return [View(b, dim, stride, offset) for b, dim in zip(buffers, dims, strict=True)]

    both = [nodes(2 * channels) for _ in range(depth)]  # features and message side by side
    features = View(Buffer("node", channels), 1, channels)
    edge_sizes = (n_attr, 1, 1)
    geometry, g_geometry = ([Buffer("edge", size) for size in edge_sizes] for _ in range(2))
    a, g_a = Buffer("node", n_attr), Buffer("node", n_attr)
    epsilon, weight = Buffer("node", 1), Buffer("node", 1)
    eps, g_eps = View(epsilon, 1, 1), View(weight, 1, 1)
    plan = Plan(*geometry, a, *g_geometry, g_a, epsilon, weight, features)

    added = {"added": True}
    embedding = relaid(
        operations.embedding(segnn.embedding.coupling, channels),
        a=added,
        **{f"out{k}": beside(dims[k], 2 * channels) for k in range(n_kinds)},
    )
    table = segnn.embedding
    species = len(potential.species)
    constants = [  # species are one-hot features of unit variance
        *(
            Buffer("weights", tensor=_tensor_product_weight(table, k) * species**0.5)
            for k in range(n_kinds)
            if len(table.weights[k])
        ),
        Buffer("weights", tensor=table.bias.detach()),
    ]
    stack = [_Layer(segnn, t, n_kinds) for t in range(depth)]
    widths = multiplicities(stack[0].update.gate.irreps_in)
    gate = operations.gate(kinds_, channels, SILU_SCALE, SIGMOID_SCALE)
    first = relaid(operations.product(stack[0].update.first.coupling, 2 * channels), a=added)
    second = [relaid(operations.product(layer.update.second.coupling, channels), a=added) for layer in stack]
    # of the last features only the scalars are read
    second[last] = relaid(operations.product(Coupling(kinds_, attr, (SCALAR,)), channels), a=added)
    reached = [list(range(n_kinds))] * last + [[scalar]]
    message = _message(config, stack[0].message, channels)
    n_sent = 1 if stack[0].message.linear else 2
    n_paths = [1 if stack[0].message.linear else stack[0].message.couplings[0].paths_into(k) for k in range(n_kinds)]
    sent = [Buffer("node", d * n * channels) for d, n in zip(dims, n_paths, strict=True)]
    g_pair = nodes(n_sent * channels, "shared")
    power = _powers(stack[0].product, kinds_, channels)
    order = config.body_order
    pair = [nodes(n_sent * channels) for _ in stack]
    powers = [nodes(order * channels) for _ in stack]
    gated_in = [[Buffer("node", d * w) for d, w in zip(dims, widths, strict=True)] for _ in stack]
    gated = [nodes(channels) for _ in stack]
    scratch = {
        "first": [Buffer("scratch", o.size) for o in first.outputs],
        "second": [[Buffer("scratch", o.size) for o in operation.outputs] for operation in second],
    }

    def message_inputs(t: int) -> list[Buffer]:
        layer = stack[t].message
        tensors = [Buffer("weights", tensor=layer.tables[0])]
        gates = [] if layer.linear else [Buffer("weights", tensor=w[0].detach()) for w in (layer.mix, layer.bias)]
        return [*pair[t], *tensors, plan.fraction, plan.harmonics, plan.envelope, *gates]

    def self_inputs(t: int) -> list[Buffer]:
        return [*powers[t], *(Buffer("weights", tensor=w[0].detach()) for w in stack[t].product.weights)]

    def pairs(t: int) -> list[Product]:
        f = views(both[t], 2 * channels)
        return [Product(f[k], stack[t].pair[k], View(pair[t][k], dims[k], n_sent * channels)) for k in range(n_kinds)]

    # forward
    steps: list[Rows | Product] = [Rows(embedding, 0, [*constants, a], both[0]), *pairs(0)]
    for t, layer in enumerate(stack):
        plan.segments += [steps, Rows(message, 0, message_inputs(t), sent)]
        steps = []
        f, m = views(both[t], 2 * channels), views(both[t], 2 * channels, channels)
        out = views(powers[t], order * channels) if layer.product else m
        for k in range(n_kinds):
            steps.append(Product(View(sent[k], dims[k], n_paths[k] * channels), layer.out[k], out[k]))
        if layer.product:
            steps.append(Rows(power, 0, self_inputs(t), [b for _ in range(order - 1) for b in powers[t]]))
            for k in range(n_kinds):
                steps.append(Product(View(powers[t][k], dims[k], order * channels), layer.powers[k], m[k]))
        steps.append(Rows(first, 0, [*both[t], a], scratch["first"]))
        for k in range(n_kinds):
            size = scratch["first"][k].size // dims[k]
            bias = layer.update.first.bias.detach() if k == scalar else None
            inside = View(gated_in[t][k], dims[k], widths[k])
            steps.append(Product(View(scratch["first"][k], dims[k], size), layer.first[k], inside, bias=bias))
        steps.append(Rows(gate, 0, gated_in[t], gated[t]))
        steps.append(Rows(second[t], 0, [*gated[t], a], scratch["second"][t]))
        for buffer, k in zip(scratch["second"][t], reached[t], strict=True):
            bias = layer.update.second.bias.detach() * 0.5**0.5 if k == scalar else None
            new = features if t == last else View(both[t + 1][k], dims[k], 2 * channels)
            steps.append(
                Product(View(buffer, dims[k], buffer.size // dims[k]), layer.second[k], new, bias=bias, d=f[k])
            )
        if t < last:
            steps += pairs(t + 1)
            steps.append(
                Product(View(both[t + 1][scalar], 1, 2 * channels), _weight(readout.linear[t]), eps, add=t > 0)
            )
    forward, backward, g_features = _readout(readout, features, eps, g_eps, started=depth > 1)
    plan.n_forward, plan.n_last = len(plan.segments) + 1, len(steps) + len(forward)
    steps += [*forward, *backward]

    # back
    g_both = [nodes(2 * channels) for _ in range(2)]
    g_first, g_inside, g_gated = (
        scratch["first"],
        [Buffer("scratch", d * w) for d, w in zip(dims, widths, strict=True)],
        nodes(channels, "scratch"),
    )
    g_powers = nodes(order * channels, "scratch")
    for t in reversed(range(depth)):
        layer, own = stack[t], g_both[t % 2]
        incoming = {k: View(g_both[(t + 1) % 2][k], dims[k], 2 * channels) for k in range(n_kinds)}
        if t == last:
            incoming = {scalar: g_features}
        for buffer, k in zip(scratch["second"][t], reached[t], strict=True):
            steps.append(Product(incoming[k], layer.second[k].T, View(buffer, dims[k], buffer.size // dims[k])))
        steps.append(Rows(second[t], 1, [*gated[t], a, *scratch["second"][t]], [*g_gated, g_a]))
        steps.append(Rows(gate, 1, [*gated_in[t], *g_gated], g_inside))
        for k in range(n_kinds):
            size = g_first[k].size // dims[k]
            steps.append(
                Product(View(g_inside[k], dims[k], widths[k]), layer.first[k].T, View(g_first[k], dims[k], size))
            )
        steps.append(Rows(first, 1, [*both[t], a, *g_first], [*own, g_a]))
        g_m = views(own, 2 * channels, channels)
        if layer.product:
            for k in range(n_kinds):
                steps.append(Product(g_m[k], layer.powers[k].T, View(g_powers[k], dims[k], order * channels)))
            given = [b for _ in range(order - 1) for b in g_powers]
            steps.append(Rows(power, 1, [*self_inputs(t), *given], [*g_powers, *[None] * (order - 1)]))
            g_m = views(g_powers, order * channels)
        for k in range(n_kinds):
            steps.append(Product(g_m[k], layer.out[k].T, View(sent[k], dims[k], n_paths[k] * channels)))
        constant = [None] * (0 if layer.message.linear else 2)
        gradients = [*g_pair, None, plan.g_fraction, plan.g_harmonics, plan.g_envelope, *constant]
        plan.segments += [steps, Rows(message, 1, [*message_inputs(t), *sent], gradients)]
        steps = []
        g_f = views(own, 2 * channels)
        for k in range(n_kinds):
            back = View(g_pair[k], dims[k], n_sent * channels)
            steps.append(Product(back, layer.pair[k].T, g_f[k], d=incoming.get(k), add=True))
        if t > 0:
            steps.append(Product(g_eps, _weight(readout.linear[t - 1]).T, g_f[scalar], add=True))
    none = [None] * len(constants)
    plan.segments.append([*steps, Rows(embedding, 1, [*constants, a, *g_both[0]], [*none, g_a])])
    return plan


def _message(config, message, channels: int) -> Operation:
    coupling = message.couplings[0]
    if message.linear:
        operation = operations.linear_message(coupling, channels, tabulated=True)
    else:
        operation = operations.message(coupling, channels, SILU_SCALE, SIGMOID_SCALE, tabulated=True)
    return relaid(operation, **{name: {"added": True} for name in ("fraction", "harmonics", "envelope")})


def _powers(product, kinds_, channels: int) -> Operation | None:
    """The self-products with all powers side by side, (n, 2l+1, order * channels)."""
    if product is None:
        return None
    couplings = tuple(power[0] for power in [product.square, product.cube][: product.order - 1])
    operation = operations.self_product(couplings, channels, product.scales)
    stride = product.order * channels
    changes: dict = {f"m{k}": {**beside(kind.dim, stride), "added": True} for k, kind in enumerate(kinds_)}
    for q in range(product.order - 1):
        changes[f"w{q}"] = {"constant": True}
        for k, kind in enumerate(kinds_):
            changes[f"power{q}_{k}"] = beside(kind.dim, stride, (q + 1) * channels)
    return relaid(operation, **changes)


def _readout(readout, features: View, eps: View, g_eps: View, *, started: bool) -> tuple[list, list, View]:
    """The MLP on the last scalars, added to epsilon if others were before; its way back, and where that ends."""
    forward: list = []
    backward: list = []
    x, trail = features, []
    for layer in readout.last.layers:
        width = layer.weight.shape[1]
        before, after = (Buffer("scratch", width) for _ in range(2))
        activation = operations.activation(width, SILU_SCALE)
        forward.append(Product(x, _weight(layer), View(before, 1, width), bias=layer.bias.detach()))
        forward.append(Rows(activation, 0, [before], [after]))
        trail.append((layer, activation, before))
        x = View(after, 1, width)
    final = _weight(readout.last.last)
    forward.append(Product(x, final, eps, add=started))
    g = View(Buffer("scratch" if trail else "node", len(final)), 1, len(final))
    backward.append(Product(g_eps, final.T, g))
    while trail:
        layer, activation, before = trail.pop()
        w = _weight(layer)
        g_before = Buffer("scratch", w.shape[1])
        backward.append(Rows(activation, 1, [before, g.buffer], [g_before]))
        # the last one is needed after the message's way back too
        g = View(Buffer("scratch" if trail else "node", w.shape[0]), 1, w.shape[0])
        backward.append(Product(View(g_before, 1, w.shape[1]), w.T, g))
    return forward, backward, g
