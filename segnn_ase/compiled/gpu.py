"""The whole network on a GPU, for evaluation: atomic energies and their gradient, without autograd in between.

Runs the plan of `plan.py` with the operations compiled by Triton and matrix products by PyTorch, in tensors of fixed
places and sizes: no number is read back, so that a step can be captured in a CUDA graph (`captured.py`).
"""

import itertools
from threading import Lock

import torch
from torch import Tensor

from segnn_ase.compiled.derivatives import Operation
from segnn_ase.compiled.kernels import Kernel, Topology
from segnn_ase.compiled.passes import Buffer, Product, Rows, View, make_plan
from segnn_ase.model.edges import first_edges, node_attributes, tabulated_edges


class DeviceEngine:
    """Evaluation of a potential's network with tabulated radial functions. Raises CompilerError.

    The weights are those at the time of making. What `engine.Engine` is on the CPU.
    """

    def __init__(self, potential):
        segnn = potential.segnn
        self.dtype, self.device = potential.dtype, potential.device
        self.cutoff, self.step, self.lmax = potential.cutoff, segnn.table_step, potential.config.lmax_attr
        self.plan = make_plan(potential)
        self._kernels: dict[Operation, Kernel] = {}
        self._weights: dict[Buffer, Tensor] = {}
        self._matrices: dict[int, tuple[Tensor, Tensor | None]] = {}  # weight and bias of each product
        self._capacity = (-1, -1)
        self._lock = Lock()
        species = torch.arange(len(potential.species), device=self.device)
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        self.isolated = self(species, torch.zeros(0, 3, device=self.device), none, none, None)[0]

    def __call__(self, species: Tensor, vectors: Tensor, src: Tensor, dst: Tensor, weight: Tensor | None):
        """epsilon (N,), invariant features (N, channels), and the gradient of sum_i weight_i epsilon_i with respect to
        r_ij = vectors (E, 3), or None without a weight. Pairs may lie beyond the cutoff: they do nothing."""
        with self._lock:
            return self._evaluate(species, vectors, src, dst, weight)

    def _evaluate(self, species: Tensor, vectors: Tensor, src: Tensor, dst: Tensor, weight: Tensor | None):
        plan, n = self.plan, len(species)
        self._reserve(n, len(vectors))
        with torch.enable_grad():
            vectors = vectors.detach().to(self.dtype).requires_grad_(weight is not None)
            near = vectors.detach().square().sum(1) < self.cutoff**2
            order = torch.argsort(torch.where(near, dst, n), stable=True)  # by receiver; those beyond the cutoff last
            topology = Topology(n, first_edges(dst, n, near.long()), src[order])
            edges = tabulated_edges(
                vectors[order], dst[order], topology, cutoff=self.cutoff, lmax=self.lmax, table_step=self.step
            )
            geometry = (edges.harmonics, edges.envelope, edges.fraction, node_attributes(edges, smooth=True))
        places = (plan.harmonics, plan.envelope, plan.fraction, plan.attributes)
        gradients = (plan.g_harmonics, plan.g_envelope, plan.g_fraction, plan.g_attributes)
        for buffer, g, x in zip(places, gradients, geometry, strict=True):
            buffer.tensor.copy_(x.detach())
            g.tensor.zero_()
        self._run(edges.topology._replace(knot=species), edges.topology, weight)
        found = plan.epsilon.tensor[:, 0].clone(), plan.features.buffer.tensor.clone()
        if weight is None:
            return *found, None
        moving = [(x, g.tensor) for x, g in zip(geometry, gradients, strict=True) if x.requires_grad]
        return *found, torch.autograd.grad([x for x, _ in moving], vectors, [g for _, g in moving])[0]

    def _run(self, nodes: Topology, edges: Topology, weight: Tensor | None) -> None:
        plan = self.plan
        segments = plan.segments
        if weight is None:
            segments = [*segments[: plan.n_forward - 1], segments[plan.n_forward - 1][: plan.n_last]]
        else:
            plan.weight.tensor[:, 0] = weight
        for step in itertools.chain(*segments):
            if isinstance(step, Rows):
                self._rows(step, edges if step.operation.edges else nodes)
            else:
                self._product(step)

    def _reserve(self, n: int, n_edges: int) -> None:
        if self._capacity == (n, n_edges):
            return
        self._capacity = (-1, -1)  # until all is there: what is half made must not be used
        rows = {"node": n, "scratch": n, "shared": n, "edge": n_edges}
        for buffer in self.buffers():
            if buffer.kind == "weights":
                if buffer not in self._weights:
                    self._weights[buffer] = buffer.tensor.detach().to(self.device, self.dtype, copy=True).contiguous()
            elif buffer.tensor is None or len(buffer.tensor) != rows[buffer.kind]:
                with torch.inference_mode(False):  # the buffers outlive this call
                    buffer.tensor = torch.zeros(rows[buffer.kind], buffer.size, dtype=self.dtype, device=self.device)
        self._capacity = (n, n_edges)

    def buffers(self) -> list[Buffer]:
        return [*self.plan.given(), *(b for step in itertools.chain(*self.plan.segments) for b in step.buffers())]

    def _tensor(self, buffer: Buffer | None) -> Tensor | None:
        return None if buffer is None else self._weights.get(buffer, buffer.tensor)

    def _rows(self, step: Rows, topology: Topology) -> None:
        if step.operation not in self._kernels:
            self._kernels[step.operation] = Kernel(step.operation)
        outputs = [self._tensor(b) for b in step.outputs]
        if step.operation.edges:  # what several programs add to; gradients of edges go on adding up
            for buffer, x in zip(step.outputs, outputs, strict=True):
                if buffer is not None and buffer.kind != "edge":
                    x.zero_()
        inputs = [self._tensor(b) for b in step.inputs]
        self._kernels[step.operation].launch(step.order, topology, inputs, outputs)

    def _product(self, step: Product) -> None:
        a, c = _matrix(step.a, step.weight.shape[0]), _matrix(step.c, step.weight.shape[1])
        if id(step) not in self._matrices:
            moved = (None if w is None else w.to(self.device, self.dtype) for w in (step.weight, step.bias))
            self._matrices[id(step)] = tuple(moved)
        weight, bias = self._matrices[id(step)]
        d = None if step.d is None else _matrix(step.d, step.weight.shape[1])
        added = [x for x in (d, c if step.add else None, bias) if x is not None]
        if not added:
            torch.mm(a, weight, out=c)
            return
        total = torch.addmm(added[0], a, weight)
        for x in added[1:]:
            total += x
        c.copy_(total)


def _matrix(view: View, width: int) -> Tensor:
    """The rows of a view, (atoms * rows, width), in place."""
    return view.buffer.tensor.view(-1, view.stride)[:, view.offset : view.offset + width]
