"""The gradient of a loss on energies and forces in compiled code: `program.py` forward, back, along, and back again.

With lambda = dE/dx for every array x of the program (E the weighted sum of epsilon), forces are lambda at the edges. A
loss L(epsilon, lambda_edges) has a = dL/d epsilon and v = dL/d lambda_edges; then dL/dW = d/dW (a . epsilon + dE/dt),
with dE/dt the derivative of E when the edges move along v: the arrays' tangents x' go forward, and

    mu_in = mu_out . dy/dx + lambda_out . d(y')/dx,    dL/dW = x mu + x' lambda

go back: forward over reverse, without a second graph.
"""

import ctypes
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from segnn_ase.compiled.build import load_libraries, load_library
from segnn_ase.compiled.cpu import SLOTS, _pointers, _Slot, _source, _Step
from segnn_ase.compiled.network_steps import Array, Product, Rows, View, Weight, make_program
from segnn_ase.model.edges import first_edges
from segnn_ase.structure.graph import Graph, edge_vectors

ROLES = ("value", "lam", "tangent", "mu")


class TrainingEngine:
    def __init__(self, potential):
        self.potential, self.dtype, self.cutoff = potential, potential.dtype, potential.cutoff
        self.program = make_program(potential)
        self.library = load_library(_source(self.dtype, potential.config.lmax_attr))
        self.width = self.library.width()
        self.capacity: dict[str, int] = {"pair": 0, "node": 0, "edge": 0}
        self.room: dict[str, int] = {}
        self.functions = self._compile()
        self.arrays, self.weights = self._collect()
        self.c_type = ctypes.c_float if self.dtype is torch.float32 else ctypes.c_double
        self._make_weights()

    # what there is

    def _steps(self):
        for where, steps in self.program.segments:
            for step in steps:
                yield where, step

    def _compile(self) -> dict:
        wanted = {}
        for _, step in self._steps():
            if isinstance(step, Rows):
                op = step.operation
                fixed = replace(op, inputs=tuple(replace(o, constant=o.constant or o.weight) for o in op.inputs))
                for order in (0, 1, "tangent", "dual"):
                    wanted[op, order] = fixed if order == 1 else op
        libraries = load_libraries([(operation, order) for (_, order), operation in wanted.items()], self.dtype)
        return dict(zip(wanted, libraries, strict=True))

    def _collect(self):
        arrays: dict[Array, None] = {}
        weights: list[Weight] = []
        for _, step in self._steps():
            if isinstance(step, Product):
                weights += [w for w in (step.weight, step.bias) if w is not None]
                found = [v.array for v in (step.a, step.c, step.d) if v is not None]
            else:
                weights += [x for x in step.inputs if isinstance(x, Weight)]
                found = [x for x in (*step.inputs, *step.outputs) if isinstance(x, Array)]
            arrays |= dict.fromkeys(found)
        return list(arrays), weights

    def _make_weights(self) -> None:
        """Room for the weights as they are used, and for their gradients, one behind the other."""
        sizes = [w.parameter.numel() for w in self.weights]
        self.gradient = torch.zeros(sum(sizes) + self.width, dtype=self.dtype)
        pieces = self.gradient[: sum(sizes)].split(sizes)
        self.gradients = {id(w): g for w, g in zip(self.weights, pieces, strict=True)}
        self.scaled: dict[int, Tensor] = {}
        self.packs: list[tuple] = []
        self.packed: dict[tuple, Tensor] = {}
        for _, step in self._steps():
            if isinstance(step, Product):
                p = step.weight.parameter
                K, N = p.shape
                for transposed, (k, n) in ((False, (K, N)), (True, (N, K))):
                    out = torch.zeros(k * -(-n // self.width) * self.width, dtype=self.dtype)
                    self.packed[id(step), transposed] = out
                    strides = (1, N) if transposed else (N, 1)
                    self.packs.append((k, n, p, *strides, step.weight.scale, out))
                if step.bias is not None:
                    n = step.bias.parameter.numel()
                    out = torch.zeros(-(-n // self.width) * self.width, dtype=self.dtype)
                    self.packed[id(step), "bias"] = out
                    self.packs.append((1, n, step.bias.parameter, n, 1, step.bias.scale, out))
            else:
                for w in step.inputs:
                    if isinstance(w, Weight):
                        self.scaled[id(w)] = torch.empty_like(w.parameter.detach()).contiguous()

    def _load_weights(self) -> None:
        for k, n, p, sk, sn, scale, out in self.packs:
            self.library.pack(
                ctypes.c_int64(k),
                ctypes.c_int64(n),
                ctypes.c_void_p(p.data_ptr()),
                ctypes.c_int64(sk),
                ctypes.c_int64(sn),
                self.c_type(scale),
                ctypes.c_void_p(out.data_ptr()),
            )
        for w in self.weights:
            if id(w) in self.scaled:
                torch.mul(w.parameter.detach(), w.scale, out=self.scaled[id(w)])

    # memory

    def _reserve(self, counts: dict[str, int]) -> None:
        if all(counts[k] <= self.capacity[k] for k in counts):
            return
        self.capacity = dict.fromkeys(counts, 0)  # until all is there: what is half made must not be used
        grown = {k: max(int(1.1 * counts[k]), self.room.get(k, 0)) for k in counts}
        self.memory, self.room = {}, grown
        for role in ROLES:
            sizes = [grown[a.where] * a.size for a in self.arrays]
            self.memory[role] = torch.zeros(sum(sizes) + 4 * self.width, dtype=self.dtype)
            for array, piece in zip(self.arrays, self.memory[role][: sum(sizes)].split(sizes), strict=True):
                self.memory[role, array] = piece.view(grown[array.where], array.size)
        self._make_passes()
        self.capacity = grown

    def of(self, role: str, array: Array) -> Tensor:
        return self.memory[role, array]

    def _slot(self, role: str, array: "Array | None", offset: int = 0) -> _Slot:
        if array is None:
            return _Slot(None, 0, 0)
        tensor = self.of(role, array)
        return _Slot(tensor.data_ptr() + offset * tensor.element_size(), array.size, 0)

    def _fixed(self, tensor: Tensor) -> _Slot:
        return _Slot(tensor.data_ptr(), 0, 0)

    # passes

    def _make_passes(self) -> None:
        self.passes = {}
        for role in ROLES:
            segments = []
            forward = role in ("value", "tangent")
            listed = self.program.segments if forward else reversed(self.program.segments)
            for where, steps in listed:
                made = []
                for step in steps if forward else reversed(steps):
                    made += self._product(role, step) if isinstance(step, Product) else [self._rows(role, step)]
                segments.append((where, (_Step * len(made))(*made)))
            self.passes[role] = segments

    def _matrix(self, slots: list[_Slot], numbers: list[int]) -> _Step:
        c = _Step()
        for k, slot in enumerate(slots):
            c.slots[k] = slot
        c.matrix[:] = [*numbers, *[0] * (9 - len(numbers))]
        return c

    def _product(self, role: str, step: Product) -> list[_Step]:
        a, c, d = step.a, step.c, step.d
        K, N = step.weight.parameter.shape
        none = _Slot(None, 0, 0)

        def at(of: str, view: View | None) -> _Slot:
            return none if view is None else self._slot(of, view.array, view.offset)

        if role in ("value", "tangent"):
            bias = self.packed.get((id(step), "bias")) if role == "value" else None
            bias = none if bias is None else self._fixed(bias)
            slots = [at(role, a), self._fixed(self.packed[id(step), False]), bias, at(role, d), at(role, c)]
            return [self._matrix(slots, [a.rows, K, N, a.stride, d.stride if d else 0, c.stride, int(step.add), 0])]
        made = []
        if d is not None:
            made.append(
                self._matrix([none, at(role, c), none, none, at(role, d)], [c.rows, 0, N, 0, c.stride, d.stride, 0, 3])
            )
        if role == "lam" or not a.array.geometry:
            slots = [at(role, c), self._fixed(self.packed[id(step), True]), none, none, at(role, a)]
            made.append(self._matrix(slots, [c.rows, N, K, c.stride, 0, a.stride, 1, 0]))
        if role == "mu":
            g = self._fixed(self.gradients[id(step.weight)])
            for left, right in (("value", "mu"), ("tangent", "lam")):
                made.append(
                    self._matrix(
                        [at(left, a), at(right, c), none, none, g], [a.rows, K, N, a.stride, c.stride, 0, 0, 1]
                    )
                )
            if step.bias is not None:
                g = self._fixed(self.gradients[id(step.bias)])
                made.append(self._matrix([none, at("mu", c), none, none, g], [c.rows, 0, N, 0, c.stride, 0, 0, 2]))
        return made

    def _rows(self, role: str, step: Rows) -> _Step:
        order = {"value": 0, "lam": 1, "tangent": "tangent", "mu": "dual"}[role]
        inputs = [
            self._fixed(self.scaled[id(x)]) if isinstance(x, Weight) else self._slot("value", x) for x in step.inputs
        ]

        def inputs_of(of):
            return [_Slot(None, 0, 0) if isinstance(x, Weight) else self._slot(of, x) for x in step.inputs]

        def outputs_of(of):
            return [self._slot(of, x) for x in step.outputs]

        if role == "value":
            slots_in, slots_out = inputs, outputs_of("value")
        elif role == "lam":
            slots_in, slots_out = [*inputs, *outputs_of("lam")], inputs_of("lam")
        elif role == "tangent":
            slots_in, slots_out = [*inputs, *inputs_of("tangent")], outputs_of("tangent")
        else:
            slots_in = [*inputs, *inputs_of("tangent"), *outputs_of("lam"), *outputs_of("mu")]
            slots_out = [
                self._fixed(self.gradients[id(x)]) if isinstance(x, Weight) else self._slot("mu", x)
                for x in step.inputs
            ]
        c = _Step()
        c.n_in, c.n_out = len(slots_in), len(slots_out)
        if c.n_in + c.n_out > SLOTS:
            raise ValueError(f"a step with {c.n_in + c.n_out} tensors; the engine has room for {SLOTS}")
        for k, slot in enumerate([*slots_in, *slots_out]):
            c.slots[k] = slot
        c.rows = ctypes.cast(self.functions[step.operation, order].rows, ctypes.c_void_p)
        c.matrix[0] = role in ("value", "tangent")
        return c

    def step(self, graph: Graph, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Evaluate a loss and put its gradient into the parameters' `grad`, where they require one.

        loss_of gets the atomic energies (N,) eV, float64, and the edge gradients dE/dr_ij (E, 3) eV/Å, and returns a
        scalar that PyTorch can differentiate with respect to both. Edges are sorted by receiver.
        """
        potential, program = self.potential, self.program
        n, species = len(graph.numbers), len(potential.species)
        kind = torch.cat([potential.species_index[graph.numbers], torch.arange(species)])  # a lonely atom of each
        vectors = edge_vectors(graph).detach().to(self.dtype).contiguous()
        if not bool((graph.edge_dst[1:] >= graph.edge_dst[:-1]).all()):
            raise ValueError("edges must be sorted by receiver")
        first, src = first_edges(graph.edge_dst, n + species), graph.edge_src.contiguous()
        edge_pair = torch.arange(len(src)) if graph.edge_pair is None else graph.edge_pair
        chosen, pair = torch.unique(edge_pair, return_inverse=True)
        counts = {"node": n + species, "edge": len(vectors), "pair": len(chosen)}
        self._reserve(counts)
        self._load_weights()
        parts, unused = (first, src, pair), torch.empty_like(src)
        links = (_pointers([*parts, unused]), _pointers([*parts, kind]))
        self.memory["lam"].zero_()
        geometry = _Geometry(self, vectors, links[0], n + species)
        radial = _Radial(vectors[chosen], potential.config.n_radial, self.cutoff)
        self.of("value", program.radial)[: len(chosen)] = radial.values
        self._run("value", counts, links)
        epsilon = self.of("value", program.epsilon)[: n + species, 0].clone().requires_grad_()

        self.of("lam", program.epsilon)[:n, 0] = potential.per_species(kind[:n])[1]
        self._run("lam", counts, links)
        g = geometry.gradient()
        g[chosen] += radial.gradient(self.of("lam", program.radial)[: len(chosen)])
        g = g.requires_grad_()
        energies, repulsion = potential.with_repulsion(
            graph, kind[:n], vectors, potential.in_eV(kind[:n], epsilon[:n], epsilon[n:])
        )
        loss = loss_of(energies, g if repulsion is None else g + repulsion)
        slopes, direction = torch.autograd.grad(loss, [epsilon, g])

        self.memory["tangent"].zero_()
        geometry.tangents(direction.contiguous())
        self.of("tangent", program.radial)[: len(chosen)] = radial.tangents(direction[chosen])
        self._run("tangent", counts, links)
        self.gradient.zero_()
        self.memory["mu"].zero_()
        self.of("mu", program.epsilon)[: n + species, 0] = slopes
        self._run("mu", counts, links)
        for w in self.weights:
            if w.parameter.requires_grad:
                w.parameter.grad = self.gradients[id(w)].view_as(w.parameter) * w.scale
        return loss.detach()

    def _run(self, role: str, counts: dict[str, int], links: tuple) -> None:
        n = counts["node"]
        bounds = (ctypes.c_int64 * 2)(0, n)
        for where, steps in self.passes[role]:
            if where == "edge":
                self.library.run_edges(steps, 1, bounds, links[0], ctypes.c_int64(n))
            else:
                rows = ctypes.c_int64(counts[where])
                self.library.run_nodes(steps, ctypes.c_int64(len(steps)), rows, 1, links[1])


class _Geometry:
    """Harmonics, envelope and node attributes of edges, put where the program expects them, and their derivatives."""

    def __init__(self, engine: TrainingEngine, vectors: Tensor, links, n: int):
        self.engine, self.vectors, self.links, self.n = engine, vectors, links, n
        self.numbers = (ctypes.c_double * 3)(engine.cutoff, engine.cutoff, 1.0)
        self.fraction, self.slope = (torch.zeros(len(vectors), dtype=engine.dtype) for _ in range(2))
        self.values = [vectors, *self._places("value", self.fraction)]
        self.bounds = (ctypes.c_int64 * 2)(0, n)
        self.gradients = self._places("lam", self.slope)
        engine.library.geometry(1, self.bounds, links, self.numbers, _pointers(self.values), _pointers(self.gradients))

    def _places(self, role: str, fraction: Tensor) -> list[Tensor]:
        program, of = self.engine.program, self.engine.of
        return [of(role, program.harmonics), of(role, program.envelope), fraction, of(role, program.attributes)]

    def gradient(self) -> Tensor:
        """With respect to the vectors, from those that the program left: (E, 3)."""
        g = torch.empty_like(self.vectors)
        self.engine.library.geometry_gradient(
            1,
            self.bounds,
            self.links,
            self.numbers,
            _pointers(self.values),
            _pointers(self.gradients),
            _pointers([g]),
        )
        return g

    def tangents(self, direction: Tensor) -> None:
        """Derivatives along a direction (E, 3) of the vectors, for the program."""
        harmonics, envelope, _, attributes = self._places("tangent", self.fraction)
        self.engine.library.geometry_tangent(
            ctypes.c_int64(self.n),
            self.links,
            self.numbers,
            _pointers(self.values),
            ctypes.c_void_p(direction.data_ptr()),
            _pointers([harmonics, envelope, attributes]),
        )


class _Radial:
    """Bessel functions of pairs, `layers.bessel`, and their derivatives."""

    def __init__(self, vectors: Tensor, n: int, cutoff: float):
        distance = vectors.square().sum(1, keepdim=True).clamp_min(1e-12).sqrt()
        self.unit = vectors / distance
        k = math.pi / cutoff * torch.arange(1, n + 1, dtype=vectors.dtype)
        scale = math.sqrt(2.0 / cutoff) / distance
        self.values = scale * torch.sin(k * distance)
        self.slopes = scale * k * torch.cos(k * distance) - self.values / distance

    def gradient(self, weights: Tensor) -> Tensor:
        return (weights * self.slopes).sum(1, keepdim=True) * self.unit

    def tangents(self, direction: Tensor) -> Tensor:
        return self.slopes * (direction * self.unit).sum(1, keepdim=True)
