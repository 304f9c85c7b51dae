"""Where the linear maps of channels are applied: values are those of plain PyTorch in `test_cpu_evaluation.py`."""

import pytest
import torch

from segnn_ase.compiled.network_steps import make_steps
from segnn_ase.compiled.splines import radial_tables
from segnn_ase.compiled.steps import MatrixProduct, steps_of
from segnn_ase.model.irreps import multiplicities


def products(segments) -> list[MatrixProduct]:
    return [step for step in steps_of(segments) if isinstance(step, MatrixProduct)]


def multiplications(found: list[MatrixProduct]) -> int:
    """For each atom."""
    return sum(step.a.rows * step.weight.parameter.numel() for step in found)


@pytest.mark.parametrize("variant", ["fast", "segnn", "uneven", "parities"])
def test_weights_act_where_there_are_fewer_components(variant, new_potential):
    potential = new_potential(variant)
    found = products(make_steps(potential).segments)
    for update in potential.segnn.updates[:-1]:
        for linear in (update.first, update.second):
            c, into, out = linear.coupling, multiplicities(linear.irreps_in), multiplicities(linear.irreps_out)
            paths = [(min(c.left[i].dim, c.out[k].dim), into[i] * out[k]) for i, _, k in c.paths]
            own = [step for step in found if any(step.weight.whole is w for w in linear.weights)]
            assert multiplications(own) == sum(rows * size for rows, size in paths)


@pytest.mark.parametrize("variant", ["fast", "segnn", "uneven"])
def test_what_the_weights_make_of_the_first_features_is_made_once(variant, new_potential):
    potential = new_potential(variant)
    trained, fixed = make_steps(potential), make_steps(potential, radial_tables(potential))
    assert not products(fixed.segments[:2])  # before the first message
    first, others = potential.segnn.updates[0].first, potential.segnn.messages[0].pair
    seen = [step.weight.whole for step in products(fixed.segments)]
    assert not any(w is dense.weight for w in seen for dense in others)
    assert not any(w is x for w in seen for x in first.weights)  # but their half for messages
    on_nodes = [step for step in products(trained.segments) if step.a.array.where == "node"]
    saved = sum(kind.dim * dense.weight.numel() for kind, dense in zip(first.coupling.left, others, strict=True))
    saved += multiplications([step for step in on_nodes if any(step.weight.whole is x for x in first.weights)]) // 2
    assert multiplications(products(fixed.segments)) == multiplications(on_nodes) - saved


def test_parts_of_a_weight_have_gradients_of_their_own(new_potential):
    """Rows of one parameter in several steps: each of them once."""
    potential = new_potential("segnn")
    rows: dict = {}
    for step in products(make_steps(potential).segments):
        if step.weight.rows is not None:
            rows.setdefault(step.weight.whole, []).append(step.weight.rows)
    assert rows
    for whole, parts in rows.items():
        used = torch.cat([torch.arange(len(whole))[part] for part in parts])
        assert used.sort().values.tolist() == list(range(len(whole)))
