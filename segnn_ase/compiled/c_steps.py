"""Steps as the C runtime takes them (`runtime.CStep`), with places and weights where it has addresses."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from segnn_ase.compiled.derivatives import Operation
from segnn_ase.compiled.passes import Storage
from segnn_ase.compiled.runtime import KINDS, SLOTS, Memory, Op
from segnn_ase.compiled.steps import MatrixProduct, Place, RowOperation, Segment, Step, View, Weight, WeightGradient


class Panels(NamedTuple):
    """Weights of matrix products, cut into panels."""

    weight: Weight
    transposed: bool = False


class GradientOf(NamedTuple):
    """Where the gradient of a weight is added up."""

    weight: Weight


class TensorInC(NamedTuple):
    """What a step reads or writes: from number `offset` of a row on."""

    of: Place | Weight | Panels | GradientOf | None
    offset: int = 0
    memory: Memory = Memory.WHOLE
    where: int = 0  # of KINDS, the rows that edges add to
    clear: bool = False  # nothing was there before


class StepInC(NamedTuple):
    """A step: its tensors, of which the first n_in are read, the numbers of `CStep`, and its function."""

    tensors: list[TensorInC]
    n_in: int
    numbers: dict[str, Any]
    function: tuple[Operation, int | str] | None = None


NOTHING = TensorInC(None)


def steps_in_c(segments: list[Segment], storage: Mapping[Place, Storage]) -> list[list[StepInC]]:
    """The steps of each segment. Raises ValueError for one with more tensors than the runtime has room for."""
    there: set[Place] = set()  # what edges have added to
    found = [[_step_in_c(step, storage, there) for step in segment.steps] for segment in segments]
    most = max((len(step.tensors) for steps in found for step in steps), default=0)
    if most > SLOTS:
        raise ValueError(f"a step with {most} tensors; the runtime has room for {SLOTS}")
    return found


def _step_in_c(step: Step, storage: Mapping[Place, Storage], there: set[Place]) -> StepInC:
    if isinstance(step, RowOperation):
        return _rows(step, storage, there)
    return _product(step, storage) if isinstance(step, MatrixProduct) else _weight_gradient(step, storage)


def _rows(step: RowOperation, storage: Mapping[Place, Storage], there: set[Place]) -> StepInC:
    inputs = [TensorInC(x) if isinstance(x, Weight) else _tensor(x, storage) for x in step.inputs]
    outputs = []
    for k, x in enumerate(step.outputs):
        if isinstance(x, Weight):
            outputs.append(TensorInC(GradientOf(x), memory=Memory.SUMMED))
        elif x is not None and step.operation.edges:
            where = KINDS.index(x.array.where)
            outputs.append(TensorInC(x, memory=memory_of(step, k), where=where, clear=x not in there))
        else:
            outputs.append(_tensor(x, storage))
    there.update(x for x in step.outputs if isinstance(x, Place) and step.operation.edges)
    return StepInC([*inputs, *outputs], len(inputs), {"op": Op.ROWS}, (step.operation, step.order))


def _product(step: MatrixProduct, storage: Mapping[Place, Storage]) -> StepInC:
    inner, outer = shape_of(step.weight, step.transposed)
    bias = NOTHING if step.bias is None else TensorInC(Panels(step.bias))
    weight = TensorInC(Panels(step.weight, step.transposed))
    tensors = [_view(step.a, storage), weight, bias, _view(step.d, storage), _view(step.c, storage)]
    strides = {"a_stride": step.a.stride, "d_stride": step.d.stride if step.d else 0, "c_stride": step.c.stride}
    numbers = {"rows": step.a.rows, "inner": inner, "outer": outer, "add": step.add, **strides}
    return StepInC(tensors, 4, {"op": Op.PRODUCT, **numbers})


def _weight_gradient(step: WeightGradient, storage: Mapping[Place, Storage]) -> StepInC:
    inner, outer = shape_of(step.weight, False)
    numbers = {"rows": step.g.rows, "inner": inner, "outer": outer, "d_stride": step.g.stride}
    tensors = [_view(step.g, storage), TensorInC(GradientOf(step.weight), memory=Memory.SUMMED)]
    if step.a is None:
        return StepInC(tensors, 1, {"op": Op.BIAS_GRADIENT, **numbers})
    numbers |= {"op": Op.WEIGHT_GRADIENT, "a_stride": step.a.stride}
    return StepInC([_view(step.a, storage), *tensors], 2, numbers)


def _view(view: View | None, storage: Mapping[Place, Storage]) -> TensorInC:
    return NOTHING if view is None else _tensor(view.array, storage, view.offset)


def _tensor(place: Place | None, storage: Mapping[Place, Storage], offset: int = 0) -> TensorInC:
    if place is None:
        return NOTHING
    return TensorInC(place, offset, Memory.SCRATCH if storage[place].where == "scratch" else Memory.WHOLE)


def memory_of(step: RowOperation, output: int) -> Memory:
    """How the threads of a step on edges share one of its outputs."""
    operation = step.operation
    if not operation.edges:
        return Memory.WHOLE
    if step.order in (0, "tangent"):
        return Memory.RECEIVERS
    places = {o.where for o in operation.inputs if o.tensor == output}
    return Memory.WHOLE if places == {"row"} else Memory.PRIVATE


def privately(segments: list[Segment], storage: Mapping[Place, Storage]) -> set[Storage]:
    """Of which every thread has a copy."""
    return {
        storage[x]
        for segment in segments
        for step in segment.steps
        if isinstance(step, RowOperation)
        for k, x in enumerate(step.outputs)
        if isinstance(x, Place) and memory_of(step, k) is Memory.PRIVATE
    }


def shape_of(weight: Weight, transposed: bool) -> tuple[int, int]:
    """(inner, outer) of a matrix product with a weight, or of a bias."""
    shape = weight.parameter.shape
    inner, outer = shape if len(shape) == 2 else (1, shape[0])
    return (outer, inner) if transposed else (inner, outer)
