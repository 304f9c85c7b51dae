"""The steps of the embedding, and of the linear maps that follow it at once.

The first features are numbers of a species times a node's attributes, so that a linear map W of channels is one of
those numbers: it is done once, when the steps are made, where weights are not to change any more.
"""

import torch
from torch import Tensor

from segnn_ase.compiled import steered_formulas
from segnn_ase.compiled.derivatives import relaid
from segnn_ase.compiled.steered_steps import GEOMETRY, SteeredMap, components, rows_of_paths
from segnn_ase.compiled.steps import Array, RowOperation, Step, View, Weight
from segnn_ase.model.irreps import SCALAR, Coupling, multiplicities
from segnn_ase.model.layers import SteerableLinear

WEIGHT = {"weight": True, "constant": False}


def first_features(
    layer: SteerableLinear, a: Array, out: dict[int, View], maps: "list[Tensor] | None" = None
) -> list[Step]:
    """First features of the kinds that are wanted, (channels in, channels) `maps` of them."""
    coupling, steps = layer.coupling, []

    def weight(k: int, rows: slice) -> Weight:
        return _weight(layer, k, rows) if maps is None else Weight(_of_path(layer, k, rows) @ maps[k])

    bias = Weight(layer.bias if maps is None else _exact(layer.bias) @ maps[coupling.out.index(SCALAR)])
    widths = {k: layer.weights[k].shape[1] if maps is None else maps[k].shape[1] for k in out}
    for width in dict.fromkeys(widths.values()):
        group = [k for k in out if widths[k] == width]
        part = Coupling(coupling.left, coupling.right, [coupling.out[k] for k in group])
        operation = steered_formulas.embedding(part, width)
        names = {o.name: WEIGHT for o in operation.inputs if o.name != "a"}
        places = {f"out{p}": components(out[k]) for p, k in enumerate(group)}
        operation = relaid(operation, a=GEOMETRY, **names, **places)
        inputs = (*(weight(k, rows) for k in group for rows in _paths(layer, k)), bias, a)
        steps.append(RowOperation(operation, inputs, tuple(out[k].array for k in group)))
    return steps


def product_of_embedded(layer: SteerableLinear, linear: SteeredMap, a: Array, out: dict[int, View]) -> list[Step]:
    """out[k] = TP(f; a) of the first features f, without the bias of the TP."""
    coupling, steps = linear.coupling, []
    for width in dict.fromkeys(linear.width):
        outs = [k for k in out if linear.width[k] == width]
        part = Coupling(coupling.left, coupling.right, [coupling.out[k] for k in outs])
        operation = steered_formulas.embedded_product(layer.coupling, part, width)
        places = {f"out{p}": components(out[k]) for p, k in enumerate(outs)}
        operation = relaid(operation, a=GEOMETRY, table=WEIGHT, bias=WEIGHT, **places)
        tables = _of_paths(layer, linear, outs)
        steps.append(RowOperation(operation, (*map(Weight, tables), a), tuple(out[k].array for k in outs)))
    return steps


def _of_paths(layer: SteerableLinear, linear: SteeredMap, outs: list[int]) -> tuple[Tensor, Tensor]:
    """What the paths into some kinds make of the numbers of each species, (species, paths * channels), and of the
    bias, for the paths that begin at scalars."""
    bias, table, of_bias = _exact(layer.bias), [], []
    for path, rows in zip(linear.coupling.paths, rows_of_paths(linear), strict=True):
        if path.out not in outs:
            continue
        mixed = _exact(linear.weights[path.out])[rows] * linear.scales[path.out]
        table += [_of_path(layer, path.left, own) @ mixed for own in _paths(layer, path.left)]
        if path.left == layer.scalar:
            of_bias.append(bias @ mixed)
    width = table[0].shape[1] if table else linear.width[outs[0]]
    table = table or [bias.new_zeros(multiplicities(layer.irreps_in)[0], width)]
    return torch.cat(table, 1), torch.cat(of_bias) if of_bias else bias.new_zeros(0)


def _paths(layer: SteerableLinear, k: int) -> list[slice]:
    """Rows of the weights of each path of an embedding into a kind: those of the species."""
    species = multiplicities(layer.irreps_in)[0]
    return [slice(first, first + species) for first in range(0, len(layer.weights[k]), species)]


def _scale(layer: SteerableLinear, k: int) -> float:
    return len(_paths(layer, k)) ** -0.5


def _weight(layer: SteerableLinear, k: int, rows: slice) -> Weight:
    whole = layer.weights[k]
    return Weight(whole, _scale(layer, k), None if len(_paths(layer, k)) == 1 else rows)


def _of_path(layer: SteerableLinear, k: int, rows: slice) -> Tensor:
    return _exact(layer.weights[k])[rows] * _scale(layer, k)


def _exact(x: Tensor) -> Tensor:
    return x.detach().double()
