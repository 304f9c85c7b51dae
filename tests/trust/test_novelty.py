"""Surroundings: the same however a structure is written down, in C as in PyTorch, and told from others."""

import copy
import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from helpers.domains import characterized, contact, training_set
from helpers.systems import CUTOFF, NAMED, SPECIES, rattled
from scipy.spatial.transform import Rotation

from segnn_ase import SEGNNCalculator
from segnn_ase.base.errors import AccelerationWarning, ModelFileError
from segnn_ase.compiled import newness as in_c
from segnn_ase.compiled.newness import CompiledNewness, PlainNewness, chosen_newness
from segnn_ase.model.fingerprints import CHANNELS, COMPONENTS, coefficients, element_channels
from segnn_ase.model.newness import Newness, newness
from segnn_ase.store.model_file import load_potential, save_potential
from segnn_ase.store.tensors import load_tensors, save_tensors
from segnn_ase.structure.graph import graph_from_atoms, select
from segnn_ase.trust import landmarks, novelty
from segnn_ase.trust.novelty import NoveltyCheck, measure_surroundings

EDGE = 4.05


def index_of(species) -> torch.Tensor:
    index = torch.full((119,), -1)
    index[torch.tensor(species)] = torch.arange(len(species))
    return index


def known_from(frames: list[Atoms], species=SPECIES, before=None):
    graphs = [graph_from_atoms(atoms, CUTOFF) for atoms in frames]
    return measure_surroundings(graphs, index_of(species), species, CUTOFF, before)


def crystal(seed: int, scale: float = 1.0, stdev: float = 0.05) -> Atoms:
    return rattled(bulk("Cu", a=EDGE * scale, cubic=True), seed, stdev)


def frames() -> list[Atoms]:
    found = [crystal(n, scale) for n, scale in enumerate(np.linspace(0.99, 1.01, 12))]
    return found + [rattled(molecule("CH3CH2OH"), n, 0.03) for n in range(12)]


@pytest.fixture(scope="module")
def known():
    return known_from(frames())


def judged(known, atoms: Atoms, species=SPECIES) -> Newness:
    graph = graph_from_atoms(atoms, CUTOFF)
    return newness(known, graph, index_of(species)[graph.numbers], CUTOFF)


def ways(known, atoms: Atoms) -> dict[str, str]:
    check, kind = NoveltyCheck(known, ["H", "C", "O", "Cu"], 100), index_of(SPECIES).numpy()[atoms.numbers]
    new = judged(known, atoms)
    found = check(atoms.numbers, kind, new)
    assert check.knows(new) == (not found)
    return {way.kind: way.reason for way in found}


def test_invariant_under_everything_that_changes_nothing(known):
    atoms = rattled(molecule("CH3CH2OH"), 50, 0.04)
    expected = judged(known, atoms)
    turned, order = atoms.copy(), np.random.default_rng(0).permutation(len(atoms))
    turned.positions = Rotation.random(random_state=1).apply(atoms.positions) @ np.diag([1, 1, -1]) + [3, -2, 9]
    found = judged(known, turned[order])
    np.testing.assert_allclose(found.atoms, expected.atoms[order], rtol=1e-9)
    np.testing.assert_allclose(found.structure, expected.structure, rtol=1e-9)
    np.testing.assert_array_equal(found.bonds, expected.bonds[order])
    assert found.crowding == pytest.approx(expected.crowding, rel=1e-12)
    cell = crystal(60)
    np.testing.assert_allclose(judged(known, cell.repeat(2)).atoms, np.tile(judged(known, cell).atoms, 8), rtol=1e-9)


def test_smooth_where_an_atom_crosses_the_cutoff():
    channels, values = element_channels(2), []
    for d in (CUTOFF - 1e-4, CUTOFF + 1e-4):
        graph = graph_from_atoms(Atoms("CO", [[0, 0, 0], [d, 0, 0]]), CUTOFF)
        values.append(coefficients(graph, torch.tensor([0, 1]), channels, CUTOFF))
    assert (values[0] - values[1]).abs().max() < 1e-9 and not values[1].any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NAMED)
def test_c_gives_what_pytorch_gives(known, name, threads):
    graph = graph_from_atoms(NAMED[name](), CUTOFF + 0.3)  # with pairs of the skin
    kind = index_of(SPECIES)[graph.numbers]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = CompiledNewness(known, CUTOFF)(graph, kind)
    finally:
        torch.set_num_threads(before)
    for got, right in zip(found, newness(known, graph, kind, CUTOFF), strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)


def test_c_with_more_elements_than_channels():
    species = [1, 6, 7, 8, 9, 16, 17]
    assert len(species) > CHANNELS
    training = [rattled(molecule(m), n, 0.03) for m in ("CH3SH", "CH3CONH2", "C2Cl4", "C2F4") for n in range(3)]
    known = known_from(training, species)
    for atoms in training[::3]:
        graph = graph_from_atoms(atoms, CUTOFF)
        kind = index_of(species)[graph.numbers]
        found, right = CompiledNewness(known, CUTOFF)(graph, kind), newness(known, graph, kind, CUTOFF)
        np.testing.assert_allclose(found.atoms, right.atoms, rtol=1e-3, atol=1e-3)
        assert found.crowding == pytest.approx(right.crowding, rel=1e-5)
        assert max(right.used(known.landscape.limits)) < 1


def test_pairs_in_any_order_and_wrong_code_go_to_pytorch(known, monkeypatch):
    graph = graph_from_atoms(crystal(3), CUTOFF)
    kind = index_of(SPECIES)[graph.numbers]
    backwards = graph._replace(
        edge_src=graph.edge_src.flip(0), edge_dst=graph.edge_dst.flip(0), edge_shift=graph.edge_shift.flip(0)
    )
    assert CompiledNewness(known, CUTOFF)(backwards, kind) is None
    assert chosen_newness(CompiledNewness, known, CUTOFF, backwards, kind) is None  # not used before it was compared
    assert isinstance(chosen_newness(CompiledNewness, known, CUTOFF, graph, kind), CompiledNewness)
    wrong = CompiledNewness.__call__
    monkeypatch.setattr(CompiledNewness, "__call__", lambda *given: wrong(*given)._replace(crowding=0.5))
    with pytest.warns(AccelerationWarning, match="compiled newness of surroundings: not used, as crowding differs"):
        assert isinstance(chosen_newness(CompiledNewness, known, CUTOFF, graph, kind), PlainNewness)
    monkeypatch.setattr(in_c, "_load_newness", lambda: (_ for _ in ()).throw(in_c.CompilerError("no compiler")))
    with pytest.warns(AccelerationWarning, match="no compiler"):
        assert isinstance(chosen_newness(CompiledNewness, known, CUTOFF, graph, kind), PlainNewness)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_atoms_on_one_spot_and_lone_ones(known, dtype):
    spot = Atoms("CuCu", [[0, 0, 0], [0, 0, 0]])
    for atoms in (spot, Atoms("Cu"), Atoms("CuO", [[0, 0, 0], [0, 0, 30]])):
        assert np.isfinite(judged(known, atoms).atoms).all() and ways(known, atoms)


def test_what_is_like_the_training_is_known(known):
    for atoms in (*frames(), crystal(91), crystal(92).repeat(2), rattled(molecule("CH3CH2OH"), 93, 0.03)):
        assert ways(known, atoms) == {}


def test_every_novelty_is_named(known):
    ethanol, radical, stretched, thin = (molecule("CH3CH2OH") for _ in range(4))
    del radical[int(np.flatnonzero(ethanol.numbers == 1)[1])]
    stretched.positions *= 1.08
    found = ways(known, radical)
    assert "has 2 H within" in found["bonds"] or "has 1 H within" in found["bonds"]
    assert "surroundings" in ways(known, stretched)
    simple = rattled(bulk("Cu", "sc", a=2.55).repeat(2), 1, 0.02)
    assert "times as far from" in ways(known, simple)["structure"]
    thin = bulk("Cu", a=1.25 * EDGE, cubic=True)
    assert ways(known, molecule("H2O"))["thin"].startswith("the atoms have fewer neighbours")
    assert "structure" in ways(known, thin)


def test_bonds_are_told_only_where_distances_leave_a_gap(known):
    lengths = known.bonds.lengths()
    h, c, o, cu = range(4)
    assert 1.2 < lengths[c, h] < 1.9 and lengths[c, h] == lengths[h, c]
    assert lengths[cu, o] == 0 and lengths[c, o] > 1.5
    assert known.bonds.counts[o, c].tolist() == [1, 1] and known.bonds.counts[c, h].tolist() == [2, 3]
    dense = [Atoms("CH", [[0, 0, 0], [d, 0, 0]]) for d in np.arange(0.9, 2.0, 0.05)]
    assert known_from(dense).bonds.lengths()[c, h] == 0
    assert known_from(dense, before=known).bonds.lengths()[c, h] == 0  # no gap any more


def test_a_wider_gap_is_narrowed_by_new_data(known):
    again = known_from([Atoms("CH", [[0, 0, 0], [d, 0, 0]]) for d in (1.1, 1.2, 1.25, 1.3, 1.12)], before=known)
    old, new = known.bonds.gaps[1, 0].tolist(), again.bonds.gaps[1, 0].tolist()
    assert new[0] >= 1.29 > old[0] and new[1] == old[1]
    assert again.bonds.counts[1, 0].tolist() == [1, 3]


def test_fine_tuning_adds_surroundings_and_forgets_none(known):
    new = [rattled(molecule("C2H2"), n, 0.03) for n in range(8)]
    assert all(ways(known, atoms) for atoms in new)
    both = known_from(new, before=known)
    for atoms in (*new, rattled(molecule("C2H2"), 77, 0.03), *frames()):
        assert ways(both, atoms) == {}
    assert torch.equal(both.landscape.fingerprints.axes, known.landscape.fingerprints.axes)
    few = known_from(new[:2], before=known)
    assert all(ways(few, atoms) == {} for atoms in (*new[:2], *frames()))
    alone = known_from(new)
    hydrogen = known_from(frames()[:12], before=alone)  # copper is an element that the first never had
    assert ways(hydrogen, crystal(91)) == {} and ways(hydrogen, new[0]) == {}


def test_few_frames_say_nothing():
    assert known_from(frames()[:4]) is None
    assert known_from([rattled(molecule("CO"), 1).copy() for _ in range(20)]) is None  # one and the same
    assert known_from(frames()[:5]) is not None


def test_a_kind_of_frames_that_is_one_fold_s_does_not_make_all_known():
    """A lone frame of another element cannot be judged by the others: the limits must not follow it."""
    one = [*frames()[:12], Atoms("CO", [[0, 0, 0], [0, 0, 1.15]])]
    known = known_from(one)
    assert max(known.landscape.limits) < 20
    assert ways(known, crystal(5)) == {} and "structure" in ways(
        known, rattled(bulk("Cu", "sc", a=2.55).repeat(2), 1, 0.02)
    )


def test_few_frames_do_not_make_others_of_their_kind_new():
    """Of 16 frames the one that is furthest out is no limit: others of the same distribution are beyond."""
    new = 0
    for first in (0, 100, 200):
        few = known_from([rattled(molecule("H2O"), first + n, 0.1) for n in range(16)])
        others = (judged(few, rattled(molecule("H2O"), n, 0.1)) for n in range(50_000, 50_030))
        new += sum(max(other.used(few.landscape.limits)) > 1 for other in others)
    assert new <= 1  # of 90
    assert max(judged(few, molecule("H2O2")).used(few.landscape.limits)) > 1


def test_limits_are_wider_only_after_few_frames(known):
    wider = [landmarks.wider_of_few(n) for n in range(2, 101)]
    assert all(np.diff(wider) < 0) and landmarks.wider_of_few(10) == pytest.approx(2)
    assert wider[-1] == landmarks.wider_of_few(400) == 1
    low, high = known.crowding
    atoms = crystal(3)
    thin = judged(known, atoms)._replace(crowding=low - 0.4 * (high - low))
    symbols, kind = ["H", "C", "O", "Cu"], index_of(SPECIES).numpy()[atoms.numbers]
    many, few = NoveltyCheck(known, symbols, 100), NoveltyCheck(known, symbols, 6)
    assert [way.kind for way in many(atoms.numbers, kind, thin)] == ["thin"] and not many.knows(thin)
    assert few(atoms.numbers, kind, thin) == [] and few.knows(thin)


def test_the_few_frames_of_a_fine_tuning_do_not_make_all_known(known):
    new = [rattled(molecule("C2H2"), n, 0.1) for n in range(6)]
    both = known_from(new, before=known)
    assert both.landscape.limits == known.landscape.limits
    assert max(known_from(new).landscape.limits) > 2 * max(known.landscape.limits)  # what these alone would allow
    assert ways(both, rattled(molecule("C2H2"), 77, 0.1)) == {}
    for other in (rattled(bulk("Cu", "sc", a=2.55).repeat(2), 1, 0.02), crystal(3, stdev=0.25), molecule("CH3OCH3")):
        assert max(judged(both, other).used(both.landscape.limits)) > 1


def test_copies_do_not_make_the_others_new():
    """Turned copies have the same fingerprints: how far others are from it must not become zero."""
    cells = [bulk("Cu", a=EDGE, cubic=True) for _ in range(30)]
    scales = np.repeat(np.linspace(0.97, 1.03, 10), 3)
    for n, (cell, scale) in enumerate(zip(cells, scales, strict=True)):
        strain = np.ones(3)
        strain[n % 3] = scale
        cell.set_cell(cell.cell.array * strain, scale_atoms=True)
    known = known_from(cells)
    between = bulk("Cu", a=EDGE, cubic=True)
    between.set_cell(between.cell.array * [1.0, 0.9833, 1.0], scale_atoms=True)
    assert ways(known, between) == {}


def test_more_frames_than_are_looked_at(monkeypatch):
    monkeypatch.setattr(novelty, "FRAMES", 10)
    monkeypatch.setattr(landmarks, "ATOMS", 20)
    monkeypatch.setattr(landmarks, "LANDMARKS", 7)
    known = known_from(frames())
    assert known.landscape.atoms.points.shape == (4, 7, COMPONENTS)
    assert known.bonds.counts[1, 0].tolist() == [2, 3]  # of all frames


SPOILT = {
    "axes": ("fingerprints", lambda x: x["axes"][:, :-1]),
    "mixing": ("fingerprints", lambda x: x["mixing"][..., :-1]),
    "mean": ("fingerprints", lambda x: x["mean"] * float("nan")),
    "channels": ("fingerprints", lambda x: x["channels"][:, :1]),
    "points": ("atoms", lambda x: x["points"][:, :, :-1]),
    "widths": ("structures", lambda x: x["widths"] * 0.0),
    "gaps": ("bonds", lambda x: x["gaps"][0]),
    "counts": ("bonds", lambda x: x["counts"].double() * float("inf")),
}


@pytest.mark.parametrize("name", [*SPOILT, "limits", "crowding", "fewest", "missing"])
def test_spoilt_surroundings_of_a_file_are_refused(known, name, small_potential, tmp_path):
    path, potential = tmp_path / "model.pt", copy.deepcopy(small_potential("fast"))
    characterized(potential, training_set())
    save_potential(path, potential)
    assert load_potential(path).domain.surroundings is not None
    content = load_tensors(path)
    around = content["domain"]["surroundings"]
    if name in SPOILT:
        place, change = SPOILT[name]
        around[place][name] = change(around[place])
    elif name == "fewest":
        around[name] = around[name][:-1]
    elif name == "missing":
        del around["bonds"]
    else:
        around[name] = [1.0]
    save_tensors(path, content)
    with pytest.raises(ModelFileError, match="does not describe a model"):
        load_potential(path)


def test_a_file_from_before_knows_nothing_of_surroundings(small_potential, tmp_path):
    path, potential = tmp_path / "model.pt", copy.deepcopy(small_potential("fast"))
    characterized(potential, training_set())
    save_potential(path, potential)
    content = load_tensors(path)
    for name in ("surroundings", "virial", "fewest_atoms"):
        del content["domain"][name]
    save_tensors(path, content)
    old = load_potential(path)
    assert old.domain.surroundings is None and old.domain.virial is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = SEGNNCalculator(old, domain="ignore").evaluate([contact()])[0]["outside_domain"]
    assert "distance" in {way.kind for way in found} and not {"bonds", "surroundings"} & {way.kind for way in found}
    tuned = copy.deepcopy(old)
    characterized(tuned, training_set())
    assert tuned.domain.surroundings is not None  # measured anew, not fine-tuned


def test_pairs_left_out_are_new(known):
    """What sees no neighbours where the training had some is not inside."""
    graph = graph_from_atoms(crystal(5), CUTOFF)
    lonely = select(graph, torch.zeros(len(graph.edge_src), dtype=torch.bool))
    kind = index_of(SPECIES)[graph.numbers]
    assert max(newness(known, lonely, kind, CUTOFF).used(known.landscape.limits)) > 1
