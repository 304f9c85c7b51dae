"""The backbone with any steerable features in and out, its heads, and what a potential refuses."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import covalent_radii
from e3nn import o3
from e3nn.o3 import Irreps
from helpers.systems import CUTOFF, NAMED, SPECIES, ethanol, float64_default, join_irreps, rotation, triclinic, water

from segnn_ase.base.errors import ConfigError, StructureError
from segnn_ase.model.elements import check_elements, parse_species
from segnn_ase.model.irreps import parse_irreps
from segnn_ase.model.network import SEGNN, EnergyReadout
from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import predict
from segnn_ase.model.published import SteerableHead
from segnn_ase.model.repulsion import core_repulsion
from segnn_ase.model.settings import model_config
from segnn_ase.structure.graph import collate, edge_vectors, graph_from_atoms

LMAX = 2
ATTR = Irreps.spherical_harmonics(LMAX)
SMALL = {"cutoff": CUTOFF, "lmax_attr": LMAX, "radial_hidden": (16,)}
HIDDEN = ["8x0e+8x1o+8x2e", "12x0e+3x1o+6x2e", "8x0e+4x0o+4x1e+4x1o", "8x0e"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def published(hidden: str = HIDDEN[0], **settings):
    return model_config("segnn2022", hidden_irreps=hidden, **SMALL, **settings)


CONFIGS = [  # the published network and the smooth one, for each kind of hidden irreps
    pytest.param(config, id=f"{config.message}-{hidden}")
    for hidden in HIDDEN
    for config in (published(hidden), model_config(hidden_irreps=hidden, **SMALL))
]


def turn(x, irreps, matrix):
    """D(matrix) on features in e3nn's layout, in the order in which the irreps are written."""
    with float64_default():
        return x @ Irreps(irreps).D_from_matrix(torch.from_numpy(matrix)).T


class Bodies:
    """Charged bodies as in the paper's N-body experiment: a complete graph with features, velocities, charges."""

    def __init__(self, irreps_in: str, n: int = 5):
        self.irreps_in = irreps_in
        self.positions, self.velocities = torch.randn(2, n, 3, dtype=torch.float64)
        self.features = torch.randn(n, Irreps(irreps_in).dim, dtype=torch.float64)
        self.charges = torch.randn(n, dtype=torch.float64)
        self.dst, self.src = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
        self.dst, self.src = self.dst[self.dst != self.src], self.src[self.dst != self.src]

    def inputs(self, matrix=np.eye(3), *, charges: bool):  # noqa: B008 - not changed
        """Everything rotated; velocities enter as harmonics in the node attributes, charges as edge scalars."""
        rotate = torch.from_numpy(matrix).T
        harmonics = o3.spherical_harmonics(ATTR, self.velocities @ rotate, True, normalization="component")
        harmonics[:, 0] = 0
        positions = self.positions @ rotate
        return {
            "features": turn(self.features, self.irreps_in, matrix),
            "vectors": positions[self.src] - positions[self.dst],
            "edge_src": self.src,
            "edge_dst": self.dst,
            "node_attr": harmonics,
            "edge_scalars": (self.charges[self.src] * self.charges[self.dst])[:, None] if charges else None,
        }


def run(segnn: SEGNN, head: SteerableHead, bodies: Bodies, matrix=np.eye(3)):  # noqa: B008 - not changed
    inputs = bodies.inputs(matrix, charges=segnn.config.message == "published")
    history, attributes = segnn(**inputs)
    return head(history[-1], attributes)


def network(config, irreps_in: str, irreps_out: str, level: str = "node"):
    segnn = SEGNN(config, irreps_in, n_edge_scalars=int(config.message == "published")).double()
    return segnn, SteerableHead(config, irreps_out, level=level).double()


@pytest.mark.parametrize("improper", [False, True], ids=["rotation", "reflection"])
@pytest.mark.parametrize("config", CONFIGS)
def test_nbody_network_is_equivariant(config, improper):
    """Position and velocity (vectors) and a charge in, a displacement out."""
    bodies, matrix = Bodies("1x0e+2x1o"), rotation(2, improper=improper)
    segnn, head = network(config, "1x0e+2x1o", "1x1o")
    out = run(segnn, head, bodies)
    assert out.shape == (5, 3)
    assert out.abs().max() > 1e-3
    torch.testing.assert_close(run(segnn, head, bodies, matrix), turn(out, "1x1o", matrix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("irreps_in", ["2x1o+1x0e", "1x0e+2x1o+1x0e", "1x2e+1x1o+3x0e"])
@pytest.mark.parametrize(
    "config", [published(), model_config(hidden_irreps=HIDDEN[0], **SMALL)], ids=lambda c: c.message
)
def test_features_go_in_as_their_irreps_are_written(config, irreps_in):
    """In the caller's order, not in a sorted one: else a component of a vector is taken for a scalar."""
    bodies, matrix = Bodies(irreps_in), rotation(3)
    segnn, head = network(config, irreps_in, "1x1o")
    out = run(segnn, head, bodies)
    torch.testing.assert_close(run(segnn, head, bodies, matrix), turn(out, "1x1o", matrix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("irreps_out", ["1x1o+2x0e", "2x0e+1x1o", "1x2e+1x1o+1x0e"])
def test_features_come_out_as_their_irreps_are_written(irreps_out):
    bodies, matrix = Bodies("1x0e+2x1o"), rotation(4)
    segnn, head = network(published(), "1x0e+2x1o", irreps_out)
    out = run(segnn, head, bodies)
    assert out.shape == (5, Irreps(irreps_out).dim)
    torch.testing.assert_close(run(segnn, head, bodies, matrix), turn(out, irreps_out, matrix), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["velocities", "charges"])
def test_velocities_and_charges_matter(name):
    bodies = Bodies("1x0e+2x1o")
    segnn, head = network(published(), "1x0e+2x1o", "1x1o")
    before = run(segnn, head, bodies)
    setattr(bodies, name, getattr(bodies, name).flip(0))
    assert (run(segnn, head, bodies) - before).abs().max() > 1e-3


def molecules(config, irreps_in: str = "1x0e"):
    """Node features after the last interaction for a batch of three molecules: (batch, history, attributes)."""
    batch = collate([graph_from_atoms(atoms, CUTOFF) for atoms in (water(), ethanol(), water())])
    segnn = SEGNN(config, irreps_in).double()
    features = batch.numbers[:, None].double() / 8
    return batch, *segnn(features, edge_vectors(batch), batch.edge_src, batch.edge_dst)


@pytest.mark.parametrize("config", CONFIGS)
def test_graph_head_averages_over_the_nodes_of_each_graph(config):
    batch, history, attributes = molecules(config)
    torch.manual_seed(1)
    per_graph = SteerableHead(config, "2x0e", level="graph").double()
    per_node = SteerableHead(config, "2x0e").double()
    per_node.load_state_dict(per_graph.state_dict())
    out, nodes = per_graph(history[-1], attributes, batch.batch, batch.n_graphs), per_node(history[-1], attributes)
    expected = torch.stack([nodes[batch.batch == b].mean(0) for b in range(3)])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(out[0], out[2], rtol=0, atol=1e-11)
    torch.testing.assert_close(per_graph(history[-1], attributes)[0], nodes.mean(0), rtol=0, atol=1e-12)


def test_graph_scalars_are_invariant_and_pseudoscalars_change_sign():
    config = published(HIDDEN[2])
    bodies, mirror = Bodies("1x0e+1x1o+1x1e"), rotation(5, improper=True)
    segnn, head = network(config, "1x0e+1x1o+1x1e", "1x0e+1x0o", level="graph")
    out, mirrored = run(segnn, head, bodies), run(segnn, head, bodies, mirror)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert out.abs().min() > 1e-6
    torch.testing.assert_close(mirrored, out * signs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", CONFIGS)
def test_history_has_the_hidden_irreps_of_every_interaction(config):
    batch, history, attributes = molecules(config)
    assert len(history) == config.interactions
    assert {join_irreps(f).shape for f in history} == {(len(batch.numbers), parse_irreps(config.hidden_irreps).dim)}
    assert attributes.shape == (len(batch.numbers), ATTR.dim)
    assert (attributes[:, 0] == 1).all()


def test_readout_is_extensive():
    """Atomic energies of two molecules side by side are those of each alone."""
    config = model_config(hidden_irreps=HIDDEN[0], **SMALL)
    readout = EnergyReadout(config).double()
    torch.manual_seed(2)
    batch, history, _ = molecules(config)
    epsilon = readout(history)
    torch.testing.assert_close(epsilon[batch.batch == 0], epsilon[batch.batch == 2], rtol=0, atol=1e-11)
    torch.manual_seed(2)
    potential = Potential(config, SPECIES).double().eval()
    far = water()
    far.translate([200, 0, 0])
    energies = [predict(potential, graph_from_atoms(a, CUTOFF)).energy.item() for a in (water(), water() + far)]
    assert energies[1] == pytest.approx(2 * energies[0], abs=1e-9)


@pytest.mark.parametrize("config", CONFIGS)
def test_calibrate_gives_the_loudest_kind_unit_mean_square(config):
    graph = graph_from_atoms(triclinic(), CUTOFF)
    segnn = SEGNN(config, "1x0e").double()
    weights = {name: w.clone() for name, w in segnn.named_parameters()}
    inputs = (graph.numbers[:, None].double() / 8, edge_vectors(graph), graph.edge_src, graph.edge_dst)
    norms = torch.tensor(segnn.calibrate(*inputs))
    seen = []
    for layer in [*segnn.messages, *segnn.products]:
        layer.register_forward_hook(lambda module, args, out: seen.append((module, out)))
    with torch.no_grad():
        segnn(*inputs)
    for module, out in seen:
        k = int(module in list(segnn.products))
        t = list(segnn.products if k else segnn.messages).index(module)
        mean_square = max(x.square().mean().item() for x in out) / norms[t, k].item() ** 2
        assert mean_square == pytest.approx(1, abs=1e-6)
    assert all(torch.equal(w, weights[name]) for name, w in segnn.named_parameters())


def test_wrong_arguments_are_refused():
    smooth = model_config(hidden_irreps=HIDDEN[0], **SMALL)
    with pytest.raises(ValueError, match="banana"):
        SEGNN(smooth, "banana")
    with pytest.raises(ValueError, match="n_edge_scalars needs message = 'published'"):
        SEGNN(smooth, "1x0e", n_edge_scalars=1)
    with pytest.raises(ValueError, match="level is 'edge'"):
        SteerableHead(smooth, "1x0e", level="edge")


@pytest.mark.parametrize(
    "config", [published(), model_config(hidden_irreps=HIDDEN[0], **SMALL)], ids=lambda c: c.message
)
def test_edge_scalars_that_nothing_reads_are_refused(config):
    """Never silently ignored: a network without inputs for them says so."""
    bodies = Bodies("1x0e")
    with pytest.raises(ValueError, match="edge_scalars"):
        SEGNN(config, "1x0e").double()(**bodies.inputs(charges=True))


def test_missing_edge_scalars_are_named():
    bodies = Bodies("1x0e")
    with pytest.raises(ValueError, match="edge_scalars"):
        SEGNN(published(), "1x0e", n_edge_scalars=1).double()(**bodies.inputs(charges=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"species": []}, "species is"),
        ({"species": [1, 1]}, "species is"),
        ({"species": [0]}, "species is"),
        ({"species": [1, 6], "scales": [1.0]}, "scales is .*2 finite numbers"),
        ({"species": [1], "reference_energies": [float("nan")]}, "reference_energies is .*1 finite"),
    ],
)
def test_potential_refuses_wrong_species(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Potential(model_config(hidden_irreps="4x0e", **SMALL), **arguments)


def test_unknown_elements_name_the_atom():
    potential = Potential(model_config(hidden_irreps="4x0e", **SMALL), [1, 8])
    check_elements(potential.symbols, potential.species, water().numbers)
    with pytest.raises(StructureError, match=r"atom 1 is C,.*trained for H, O"):
        check_elements(potential.symbols, potential.species, np.array([1, 6, 8]))
    assert parse_species(["H", "Cu"]) == [1, 29]
    with pytest.raises(ConfigError, match="Xx"):
        parse_species(["H", "Xx"])


@pytest.mark.parametrize("distance", [0.2, 0.7, 1.2, 1.5, 3.0])
def test_core_repulsion_equals_the_formula(distance):
    """The universal potential of Ziegler, Biersack and Littmark, switched on over a quarter of the core radius."""
    radius = 1.6
    screening = 0.46850 / (29**0.23 + 8**0.23)
    coefficients, exponents = [0.18175, 0.50986, 0.28022, 0.02817], [3.19980, 0.94229, 0.40290, 0.20162]
    phi = np.dot(coefficients, np.exp(-np.array(exponents) * distance / screening))
    y = min(max((radius - distance) / (0.25 * radius), 0.0), 1.0)
    expected = 14.399645 * 29 * 8 / distance * phi * (10 * y**3 - 15 * y**4 + 6 * y**5)
    vector = torch.tensor([[0.0, distance, 0.0]], dtype=torch.float64)
    found = core_repulsion(vector, torch.tensor([29]), torch.tensor([8]), torch.tensor([radius]).double())
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_the_core_begins_below_the_shortest_distance_of_the_data():
    """Nothing changes where there are data; below, the energy of a pair rises, whatever the network says."""
    potential = Potential(model_config(hidden_irreps="4x0e+4x1o", **SMALL), [8, 29]).double().eval()
    bare = Potential(potential.config.model_copy(update={"core_repulsion": False}), [8, 29]).double().eval()
    assert potential.core_radii[0, 1] == pytest.approx(covalent_radii[8] + covalent_radii[29])
    potential.set_core({(8, 29): 2.0})
    bare.load_state_dict(potential.state_dict())
    graphs = [graph_from_atoms(Atoms("CuO", [[0, 0, 0], [0, d, 0]]), CUTOFF) for d in (2.0, 1.91, 1.6, 1.3)]
    extra = [float(predict(potential, g).energy - predict(bare, g).energy) for g in graphs]
    assert extra[:2] == [0.0, 0.0] and 1.0 < extra[2] < extra[3]
    far = Potential(model_config(hidden_irreps="4x0e", **{**SMALL, "cutoff": 2.0}), [14, 55])
    assert far.core_radii.max() == 2.0  # the core ends with the pairs that are found
    far.set_core({(14, 14): 2.3})
    assert far.core_radii.max() == 2.0
    potential.set_core({(8, 29): 2.5, (8, 8): 1.0}, keep_smaller=True)
    assert potential.core_radii.tolist() == [
        [pytest.approx(0.95), pytest.approx(1.9)],
        [pytest.approx(1.9), pytest.approx(2.64)],
    ]


@pytest.mark.parametrize("name", ["ethanol", "triclinic", "one_atom"])
def test_predict_computes_what_is_asked_and_keeps_its_graph_in_training_only(name):
    potential = Potential(model_config(hidden_irreps="4x0e+4x1o", **SMALL), SPECIES).double()
    graph = graph_from_atoms(NAMED[name](), CUTOFF)
    alone = predict(potential.eval(), graph, forces=False)
    assert alone.forces is alone.stress is alone.edge_gradients is None
    with torch.no_grad():
        result = predict(potential, graph)
    assert not any(x.requires_grad for x in result if x is not None)
    assert result.forces.dtype == result.energy.dtype == torch.float64
    torch.testing.assert_close(result.energy, alone.energy)
    training = predict(potential.train(), graph)
    assert training.energy.requires_grad
    torch.testing.assert_close(training.forces.detach(), result.forces)
