"""Layers against e3nn, against edge-by-edge loops, and under rotations and reflections."""

import math

import pytest
import torch
from e3nn import nn as e3nn_nn
from e3nn import o3
from e3nn.math import normalize2mom
from e3nn.o3 import Irreps
from helpers.systems import CUTOFF, NAMED, float64_default, join_irreps, rotation, split_irreps, wigner

from segnn_ase.model.edges import bessel, envelope, make_edges, neighbor_table, node_attributes
from segnn_ase.model.interactions import Message, SelfProduct, Update, powers_by_steps
from segnn_ase.model.irreps import SCALAR, Kind, kinds, parse_irreps, spherical_kinds
from segnn_ase.model.layers import ChannelBlocks, Gate, SteerableLinear
from segnn_ase.model.published import PublishedMessage
from segnn_ase.model.scalars import MLP, Dense, second_moment_scale, sigmoid, silu
from segnn_ase.structure.graph import edge_vectors, graph_from_atoms

EVEN, UNEVEN, PARITIES = "8x0e+8x1o+8x2e", "16x0e+8x1o+4x2e", "8x0e+4x0o+4x1e+4x1o"
IRREPS = [EVEN, UNEVEN, PARITIES, "6x0e"]
LMAX = 3
ATTR = Irreps.spherical_harmonics(LMAX)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def double(layer):
    """The layer in float64 with every parameter random, biases too."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer.double()


def random_features(irreps, n: int = 5):
    return split_irreps(torch.randn(n, parse_irreps(irreps).dim, dtype=torch.float64), parse_irreps(irreps))


def rotated(features, kinds_, matrix):
    return tuple(torch.einsum("xy,nyc->nxc", wigner(*k, matrix), x) for x, k in zip(features, kinds_, strict=True))


def rotated_attributes(a, matrix):
    blocks = zip(a.split([k.dim for k in spherical_kinds(LMAX)], dim=1), spherical_kinds(LMAX), strict=True)
    return torch.cat([x @ wigner(*k, matrix).T for x, k in blocks], dim=1)


def assert_features_close(actual, expected, atol: float = 1e-10):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


all_rotations = pytest.mark.parametrize(
    "matrix",
    [rotation(0), rotation(1, improper=True), -rotation(0) @ rotation(0).T],
    ids=["proper", "improper", "inversion"],
)


def edges_of(name: str, matrix=None):
    graph = graph_from_atoms(NAMED[name](), CUTOFF)
    vectors = edge_vectors(graph)
    vectors = vectors if matrix is None else vectors @ torch.from_numpy(matrix).T
    return make_edges(vectors, graph.edge_src, graph.edge_dst, len(graph.numbers), cutoff=CUTOFF, lmax=LMAX, n_radial=8)


def message_layer(irreps, *, linear: bool = False) -> Message:
    return double(Message(parse_irreps(irreps), spherical_kinds(LMAX), linear=linear, n_radial=8, hidden=(16,)))


@pytest.mark.parametrize(("ours", "theirs"), [(silu, torch.nn.functional.silu), (sigmoid, torch.sigmoid)])
def test_activations_have_unit_second_moment(ours, theirs):
    z = torch.randn(10**6, dtype=torch.float64)
    assert ours(z).square().mean().item() == pytest.approx(1, abs=5e-3)
    # e3nn's constant is a Monte Carlo estimate
    assert second_moment_scale(theirs) == pytest.approx(normalize2mom(theirs).cst, rel=5e-3)


@pytest.mark.parametrize(("layer", "widths"), [(Dense, (300, 200)), (MLP, (300, 200, 150))])
def test_dense_layers_keep_unit_variance(layer, widths):
    assert layer(*widths)(torch.randn(2000, 300)).square().mean().item() == pytest.approx(1, abs=0.15)


def e3nn_twin(layer: SteerableLinear) -> o3.FullyConnectedTensorProduct:
    """e3nn's fully connected tensor product with the weights of a SteerableLinear (its bias is not in it)."""
    with float64_default():
        tp = o3.FullyConnectedTensorProduct(layer.irreps_in, ATTR, layer.irreps_out)
    row = [0] * len(layer.irreps_out)
    weights = []
    for instruction in tp.instructions:
        k, channels = instruction.i_out, layer.irreps_in[instruction.i_in1].mul
        weights.append(layer.weights[k][row[k] : row[k] + channels])
        row[k] += channels
    assert row == [len(w) for w in layer.weights]
    with torch.no_grad():
        tp.weight.copy_(torch.cat([w.flatten() for w in weights]))
    return tp


@pytest.mark.parametrize("irreps_out", [*IRREPS, "3x1o", "2x3o+1x1e"])
@pytest.mark.parametrize("irreps_in", [*IRREPS, "2x1o+5x2e"])
def test_steerable_linear_equals_e3nn(irreps_in, irreps_out):
    layer = double(SteerableLinear(parse_irreps(irreps_in), spherical_kinds(LMAX), parse_irreps(irreps_out)))
    f, a = random_features(irreps_in), torch.randn(5, 16, dtype=torch.float64)
    if layer.bias is not None:
        torch.nn.init.zeros_(layer.bias)
    expected = e3nn_twin(layer)(join_irreps(f), a)
    torch.testing.assert_close(join_irreps(layer(f, a)), expected, rtol=0, atol=1e-11)


def test_steerable_linear_adds_its_bias_to_the_scalars_only():
    layer = double(SteerableLinear(parse_irreps(EVEN), spherical_kinds(LMAX), parse_irreps(EVEN)))
    f, a = random_features(EVEN), torch.randn(5, 16, dtype=torch.float64)
    with_bias, bias = layer(f, a), layer.bias.detach().clone()
    torch.nn.init.zeros_(layer.bias)
    without = layer(f, a)
    assert_features_close(with_bias, (without[0] + bias, *without[1:]), atol=1e-13)


@all_rotations
@pytest.mark.parametrize("irreps", IRREPS)
def test_steerable_linear_is_equivariant(irreps, matrix):
    irreps = parse_irreps(irreps)
    layer = double(SteerableLinear(irreps, spherical_kinds(LMAX), irreps))
    f, a = random_features(irreps), torch.randn(5, 16, dtype=torch.float64)
    out = layer(rotated(f, kinds(irreps), matrix), rotated_attributes(a, matrix))
    assert_features_close(out, rotated(layer(f, a), kinds(irreps), matrix))


def e3nn_gate(irreps: Irreps) -> e3nn_nn.Gate:
    """e3nn's gate with our normalisation constants: scalars (silu), gates (sigmoid), gated."""
    gated = Irreps([(mul, ir) for mul, ir in irreps if ir != o3.Irrep("0e")])
    gates = Irreps([(gated.num_irreps, "0e")]) if gated else Irreps("")
    scalars = Irreps([(mul, ir) for mul, ir in irreps if ir == o3.Irrep("0e")])
    with float64_default():
        gate = e3nn_nn.Gate(scalars, [torch.nn.functional.silu], gates, [torch.sigmoid] if gated else [], gated)
    for activation, own in ((gate.act_scalars, torch.nn.functional.silu), (gate.act_gates, torch.sigmoid)):
        for act in activation.acts:
            act.cst = second_moment_scale(own)
    return gate


def apply_e3nn_gate(f, irreps: Irreps):
    """e3nn's gate takes sorted irreps, as ours, and returns 0e before the others."""
    position = kinds(irreps).index(SCALAR)
    order = [position, *(k for k in range(len(irreps)) if k != position)]
    out = split_irreps(e3nn_gate(irreps)(join_irreps(f)), Irreps([irreps[k] for k in order]))
    return tuple(out[order.index(k)] for k in range(len(irreps)))


@pytest.mark.parametrize("irreps", [EVEN, UNEVEN, PARITIES])
def test_gate_equals_e3nn(irreps):
    irreps = parse_irreps(irreps)
    gate = Gate(irreps)
    f = random_features(gate.irreps_in)
    assert gate.irreps_in == e3nn_gate(irreps).irreps_in.simplify()
    assert_features_close(gate(f), apply_e3nn_gate(f, irreps), atol=1e-12)


def test_gate_of_scalars_is_silu():
    (f,) = random_features("6x0e")
    assert_features_close(Gate(parse_irreps("6x0e"))((f,)), (silu(f),), atol=0)


@all_rotations
@pytest.mark.parametrize("irreps", IRREPS)
def test_gate_is_equivariant(irreps, matrix):
    gate = Gate(parse_irreps(irreps))
    f = random_features(gate.irreps_in)
    out = gate(rotated(f, gate.kinds, matrix))
    assert_features_close(out, rotated(gate(f), gate.kinds, matrix))


@pytest.mark.parametrize(("irreps", "widths"), [(EVEN, [8]), (UNEVEN, [4, 4, 8]), (PARITIES, [4, 4]), ("6x0e", [6])])
def test_channel_blocks_come_back_together(irreps, widths):
    blocks, f = ChannelBlocks(parse_irreps(irreps)), random_features(irreps)
    cut = blocks.split(f)
    assert [blocks.width(b) for b in range(len(cut))] == widths
    for b, block in enumerate(cut):
        assert [x.shape[1:] for x in block] == [(k.dim, blocks.width(b)) for k in blocks.kinds_of(b)]
        assert SCALAR in blocks.kinds_of(b)
    assert_features_close(blocks.join(cut), f, atol=0)


def test_envelope_and_two_derivatives_vanish_at_one():
    for value, tolerance in ((1.0, 1e-10), (1.0 - 1e-9, 1e-6), (1.0 + 1e-9, 0.0), (3.0, 0.0)):
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        u = envelope(x)
        (du,) = torch.autograd.grad(u, x, create_graph=True)
        (ddu,) = torch.autograd.grad(du, x) if du.requires_grad else (du,)
        assert max(abs(u.item()), abs(du.item()), abs(ddu.item())) <= tolerance


def test_envelope_is_the_polynomial_of_the_design_and_falls():
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(envelope(x), 1 - 28 * x**6 + 48 * x**7 - 21 * x**8, rtol=0, atol=1e-13)
    assert envelope(x[0]) == 1
    assert (envelope(x).diff() <= 1e-13).all()


def test_bessel_functions_are_orthonormal_in_a_ball():
    d = (torch.arange(20000, dtype=torch.float64)[:, None] + 0.5) / 20000 * CUTOFF
    b = bessel(d, 8, CUTOFF)
    overlap = b.T @ (b * d**2) * CUTOFF / len(d)
    torch.testing.assert_close(overlap, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)


def test_neighbor_table_gives_every_edge_a_slot_of_its_receiver():
    dst = torch.tensor([3, 0, 3, 1, 3, 0])
    slot, width = neighbor_table(dst, 5)
    assert width == 3
    assert len(set(slot.tolist())) == len(dst)
    assert torch.equal(slot // width, dst)


def test_edges_fill_their_slots_in_any_order():
    graph = graph_from_atoms(NAMED["mixed_pbc"](), CUTOFF)
    order = torch.randperm(len(graph.edge_dst))
    src, dst, vectors = graph.edge_src[order], graph.edge_dst[order], edge_vectors(graph)[order]
    edges = make_edges(vectors, src, dst, len(graph.numbers), cutoff=CUTOFF, lmax=LMAX, n_radial=8)
    torch.testing.assert_close(edges.distance[edges.slot, 0], vectors.norm(dim=1))
    expected = o3.spherical_harmonics(ATTR, vectors, normalize=True, normalization="component")
    torch.testing.assert_close(edges.harmonics[edges.slot], expected, rtol=0, atol=1e-12)
    assert torch.equal(edges.src[edges.slot], src)
    assert edges.mask.sum() == len(src) < len(edges.src)
    assert (edges.envelope[edges.mask == 0] == 0).all()
    values = torch.randn(len(src), 2, dtype=torch.float64)
    by_receiver = values.new_zeros(len(graph.numbers), 2).index_add(0, dst, values)
    torch.testing.assert_close(edges.sum_neighbors(edges.to_slots(values)), by_receiver)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("name", ["ethanol", "triclinic", "one_atom"])
def test_node_attributes_equal_a_loop(name, smooth):
    graph = graph_from_atoms(NAMED[name](), CUTOFF)
    a = node_attributes(edges_of(name), smooth=smooth)
    for atom in range(len(graph.numbers)):
        r = edge_vectors(graph)[graph.edge_dst == atom]
        x = r.norm(dim=1, keepdim=True) / CUTOFF
        u = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8 if smooth else torch.ones_like(x)
        total = u.sum() + 1 if smooth else max(u.sum(), 1)
        y = o3.spherical_harmonics(ATTR, r, normalize=True, normalization="component")
        expected = (u * y).sum(0) / total
        expected[0] = 1
        torch.testing.assert_close(a[atom], expected, rtol=0, atol=1e-12)


def coupled(f, a, kind_f: Kind, kind_a: Kind, kind_out: Kind):
    """One Clebsch-Gordan path of f (2l+1, c) and a (2l+1,) with unit variance, by e3nn's wigner_3j."""
    table = o3.wigner_3j(kind_f.l, kind_a.l, kind_out.l, dtype=torch.float64) * math.sqrt(kind_out.dim)
    return torch.einsum("xc,y,xym->mc", f, a, table)


def allowed(a: Kind, b: Kind, c: Kind) -> bool:
    return abs(a.l - b.l) <= c.l <= a.l + b.l and a.p * b.p == c.p


def paths_of(members):
    """(left, attribute, out) in the order of the weights: by left, out, attribute."""
    return [(a, b, c) for a in members for c in members for b in spherical_kinds(LMAX) if allowed(a, b, c)]


def block_message(message: Message, b: int, x, y, rho, u: float):
    """Message on one edge in block b: (left, attribute, out) -> (2l+1, c). x: kind -> (2l+1, c); y: kind -> (2l+1,)."""
    members = message.blocks.kinds_of(b)
    paths = paths_of(members)
    into = {k: [p for p in paths if p[2] == k] for k in members}
    first = {p: coupled(x[p[0]], y[p[1]], *p) * rho[n] / math.sqrt(len(into[p[2]])) for n, p in enumerate(paths)}
    if message.linear:
        return {(k,): u * sum(first[p] for p in into[k]) for k in members}
    scalars = [
        sum(w * first[p] for w, p in zip(message.mix[b][o], into[SCALAR], strict=True)) + message.bias[b][o]
        for o in range(len(members))
    ]
    gates = iter(scalars[1:])
    h = {k: silu(scalars[0]) if k == SCALAR else sum(first[p] for p in into[k]) * sigmoid(next(gates)) for k in members}
    return {p: u * coupled(h[p[0]], y[p[1]], *p) / math.sqrt(len(into[p[2]])) for p in paths}


def message_edge_by_edge(message: Message, f, graph):
    """The docstring of `Message` in loops over edges, blocks and paths; all weights on edges."""
    names = message.blocks.kinds
    n = len(graph.numbers)
    sums = [{} for _ in range(n)]  # per atom: (block, path) -> (2l+1, c)
    for i, j, r in zip(graph.edge_dst.tolist(), graph.edge_src.tolist(), edge_vectors(graph), strict=True):
        x = r.norm() / CUTOFF
        harmonics = o3.spherical_harmonics(ATTR, r, normalize=True, normalization="component")
        y = dict(zip(spherical_kinds(LMAX), harmonics.split([k.dim for k in spherical_kinds(LMAX)]), strict=True))
        u = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
        basis = math.sqrt(2 / CUTOFF) * torch.sin(math.pi * x * torch.arange(1, 9)) / (x * CUTOFF)
        factors = message.radial(basis).split(message.n_factors)
        pair = {}
        for k, dense, features in zip(names, message.pair, f, strict=True):
            w = dense.weight * len(dense.weight) ** -0.5
            half = w.shape[1] // 2
            both = (features[i] @ w[:, :half] + features[j] @ w[:, half:]) / math.sqrt(2)
            pair[k] = features[j] @ w if message.linear else both
        for b, (low, high) in enumerate(message.blocks.ranges):
            cut = {k: pair[k][:, low:high] for k in message.blocks.kinds_of(b)}
            for path, value in block_message(message, b, cut, y, factors[b].view(-1, high - low), u).items():
                sums[i][b, path] = sums[i].get((b, path), 0) + value
    out = []
    for k, dense in zip(names, message.out, strict=True):
        rows = []
        for atom in range(n):
            parts = [value for (_, path), value in sorted_paths(message, sums[atom]) if path[-1] == k]
            x = torch.cat(parts, dim=1) if parts else torch.zeros(k.dim, len(dense.weight)).double()
            rows.append(x @ (dense.weight * len(dense.weight) ** -0.5))
        out.append(torch.stack(rows))
    return out


def sorted_paths(message: Message, sums: dict):
    """Sums in the order of the last weights: by block, then left kind, then attribute."""
    order = message.blocks.kinds
    return sorted(sums.items(), key=lambda item: (item[0][0], order.index(item[0][1][0]), item[0][1][1:2]))


@pytest.mark.parametrize("linear", [False, True], ids=["steerable", "linear"])
@pytest.mark.parametrize("irreps", IRREPS)
def test_message_equals_edge_by_edge_reference(irreps, linear):
    """The structure has atoms with different numbers of neighbours, hence empty slots, and one atom is lonely."""
    atoms = NAMED["mixed_pbc"]()
    atoms.append("H")
    atoms.positions[-1] = (100, 0, 0)
    graph = graph_from_atoms(atoms, CUTOFF)
    edges = make_edges(
        edge_vectors(graph), graph.edge_src, graph.edge_dst, len(atoms), cutoff=CUTOFF, lmax=LMAX, n_radial=8
    )
    assert (edges.mask == 0).sum() > edges.width
    message, f = message_layer(irreps, linear=linear), random_features(irreps, len(atoms))
    assert_features_close(message(f, edges), message_edge_by_edge(message, f, graph), 1e-11)


@all_rotations
@pytest.mark.parametrize("linear", [False, True], ids=["steerable", "linear"])
@pytest.mark.parametrize("irreps", IRREPS)
def test_message_is_equivariant(irreps, linear, matrix):
    message, k = message_layer(irreps, linear=linear), kinds(parse_irreps(irreps))
    edges, turned = edges_of("ethanol"), edges_of("ethanol", matrix)
    f = random_features(irreps, edges.n_atoms)
    out = message(rotated(f, k, matrix), turned)
    assert_features_close(out, rotated(message(f, edges), k, matrix))


@pytest.mark.parametrize("irreps", [EVEN, UNEVEN, PARITIES])
def test_message_without_edges_is_zero(irreps):
    message, edges = message_layer(irreps), edges_of("one_atom")
    assert all((x == 0).all() for x in message(random_features(irreps, 1), edges))


def e3nn_layer(layer: SteerableLinear, f, a):
    """TP with e3nn, and the bias: features to features."""
    out = list(split_irreps(e3nn_twin(layer)(join_irreps(f), a), layer.irreps_out))
    out[layer.scalar] = out[layer.scalar] + layer.bias
    return tuple(out)


@pytest.mark.parametrize("n_edge_scalars", [0, 2])
@pytest.mark.parametrize("irreps", [EVEN, UNEVEN, PARITIES])
def test_published_message_equals_e3nn(irreps, n_edge_scalars):
    """m_i = sum_j phi_2( phi_1( f_i + f_j + |r|^2 + scalars; a_ij ); a_ij ), each phi a TP and a gate."""
    irreps, graph, edges = parse_irreps(irreps), graph_from_atoms(NAMED["mixed_pbc"](), CUTOFF), edges_of("mixed_pbc")
    message = double(PublishedMessage(irreps, LMAX, n_edge_scalars=n_edge_scalars))
    f = random_features(irreps, edges.n_atoms)
    scalars = torch.randn(len(graph.edge_src), n_edge_scalars, dtype=torch.float64)
    i, j, r = graph.edge_dst, graph.edge_src, edge_vectors(graph)
    a = o3.spherical_harmonics(ATTR, r, normalize=True, normalization="component")
    extra = torch.cat([r.square().sum(1, keepdim=True), scalars], dim=1)[:, None]
    pair = [
        torch.cat([x[i], x[j], extra] if k == SCALAR else [x[i], x[j]], dim=2)
        for k, x in zip(kinds(irreps), f, strict=True)
    ]
    h = apply_e3nn_gate(e3nn_layer(message.first, pair, a), irreps)
    m = apply_e3nn_gate(e3nn_layer(message.second, h, a), irreps)
    expected = [x.new_zeros(edges.n_atoms, *x.shape[1:]).index_add(0, i, x) for x in m]
    edge_scalars = edges.to_slots(scalars) if n_edge_scalars else None
    assert_features_close(message(f, edges, edge_scalars), expected)


@all_rotations
@pytest.mark.parametrize("irreps", IRREPS)
def test_published_message_is_equivariant(irreps, matrix):
    message, k = double(PublishedMessage(parse_irreps(irreps), LMAX, n_edge_scalars=0)), kinds(parse_irreps(irreps))
    edges, turned = edges_of("ethanol"), edges_of("ethanol", matrix)
    f = random_features(irreps, edges.n_atoms)
    out = message(rotated(f, k, matrix), turned)
    # d^2 is up to 16 Å^2 and both layers are random: the numbers are in the thousands
    assert_features_close(out, rotated(message(f, edges), k, matrix), 1e-9)


@all_rotations
@pytest.mark.parametrize("order, bound", [(2, 0.0), (3, 0.0), (3, 0.7)])
@pytest.mark.parametrize("irreps", IRREPS)
def test_self_product_is_equivariant(irreps, order, bound, matrix):
    product, k = double(SelfProduct(parse_irreps(irreps), order, bound)), kinds(parse_irreps(irreps))
    m = random_features(irreps)
    assert_features_close(product(rotated(m, k, matrix)), rotated(product(m), k, matrix))


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("irreps", IRREPS)
def test_self_product_is_a_polynomial_of_its_order(irreps, order):
    """p(s m) is a polynomial in s of that degree without constant term, and all powers are there."""
    product, m = double(SelfProduct(parse_irreps(irreps), order)), random_features(irreps)
    s = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    values = torch.stack([join_irreps(product(tuple(x * v for x in m))).flatten() for v in s])
    powers = torch.stack([s**k for k in range(1, order + 1)], dim=1)
    fit = torch.linalg.lstsq(powers, values).solution
    torch.testing.assert_close(powers @ fit, values, rtol=0, atol=1e-10)
    assert (fit.abs().amax(dim=1) > 0.01).all()


def test_powers_are_scaled_once_for_each_product():
    torch.manual_seed(0)
    product, scaled = (double(SelfProduct(parse_irreps("4x0e+4x1o"), 3, 0.7, p)) for p in (1.0, 0.3))
    scaled.load_state_dict(product.state_dict())
    m = random_features("4x0e+4x1o")
    for p, (whole, part) in enumerate(zip(powers_by_steps(product, m), powers_by_steps(scaled, m), strict=True), 1):
        assert_features_close(part, tuple(x * 0.3**p for x in whole))


def test_self_product_of_scalars_is_an_ordinary_polynomial():
    product = double(SelfProduct(parse_irreps("4x0e"), 3))
    (m,) = random_features("4x0e")
    square = m**2 * product.weights[0][0] / math.sqrt(3)
    cube = square * m * product.weights[1][0] / math.sqrt(5)
    weight = product.linear[0].weight / math.sqrt(12)
    assert_features_close(product((m,)), (torch.cat([m, square, cube], dim=2) @ weight,), atol=1e-12)


def test_bounded_powers_are_those_of_small_messages_and_do_not_grow_with_large_ones():
    torch.manual_seed(0)
    free, bounded = (double(SelfProduct(parse_irreps("4x0e+4x1o"), 3, bound)) for bound in (0.0, 2.0))
    bounded.load_state_dict(free.state_dict())
    m = random_features("4x0e+4x1o")

    def powers(product, size):
        return [torch.cat(power, dim=1) for power in powers_by_steps(product, tuple(size * x for x in m))]

    for one, other in zip(powers(free, 1e-3), powers(bounded, 1e-3), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)
    for large, larger in zip(powers(bounded, 1e3), powers(bounded, 1e4), strict=True):
        torch.testing.assert_close(large, larger, rtol=1e-4, atol=1e-4)
        assert float(large.detach().abs().max()) < 2.0**3 * 20


@all_rotations
@pytest.mark.parametrize("irreps", IRREPS)
def test_update_is_equivariant(irreps, matrix):
    update, k = double(Update(parse_irreps(irreps), spherical_kinds(LMAX))), kinds(parse_irreps(irreps))
    f, m, a = random_features(irreps), random_features(irreps), torch.randn(5, 16, dtype=torch.float64)
    out = update(rotated(f, k, matrix), rotated(m, k, matrix), rotated_attributes(a, matrix))
    assert_features_close(out, rotated(update(f, m, a), k, matrix))


@pytest.mark.parametrize("irreps", [EVEN, UNEVEN, PARITIES])
def test_update_equals_e3nn(irreps):
    irreps = parse_irreps(irreps)
    update = double(Update(irreps, spherical_kinds(LMAX)))
    f, m, a = random_features(irreps), random_features(irreps), torch.randn(5, 16, dtype=torch.float64)
    both = tuple(torch.cat(x, dim=2) for x in zip(f, m, strict=True))
    change = e3nn_layer(update.second, apply_e3nn_gate(e3nn_layer(update.first, both, a), irreps), a)
    assert_features_close(update(f, m, a), [x + y / 2**0.5 for x, y in zip(f, change, strict=True)])
