"""The whole network in compiled code, for evaluation: atomic energies and their gradient without PyTorch's overhead.

Runs the plan of `plan.py`. Chunks of atoms go through all the steps between two messages, so that what is in between
stays in the cache; several threads share the chunks, and the edges of a message.
"""

import ctypes
import itertools
import math
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from segnn_ase.compiled.build import load_libraries, load_library
from segnn_ase.compiled.c_code import prelude
from segnn_ase.compiled.expressions import Expr, Formula
from segnn_ase.compiled.kernels import Topology
from segnn_ase.compiled.passes import Buffer, Product, Rows, make_plan, on_edges
from segnn_ase.model.irreps import raise_degree
from segnn_ase.structure.graph import Graph

CHUNK = 32  # atoms
HEADROOM = 1.15  # of the buffers, so that they do not grow at every step
EDGE_WORK = 20  # of an edge, in the units of `kernels.WORK_PER_THREAD`: 1,500 edges are worth a thread
SLOTS = 48  # tensors of one step
_PLACES = {"weights": 0, "node": 0, "edge": 0, "scratch": 1, "shared": 2}


class _Slot(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_int64), ("place", ctypes.c_int64)]


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("n_in", ctypes.c_int64),
        ("n_out", ctypes.c_int64),
        ("slots", _Slot * SLOTS),
        ("matrix", ctypes.c_int64 * 9),
    ]


class Edges(NamedTuple):
    """The pairs of a graph that are shorter than the cutoff, in order."""

    vectors: Tensor  # (E, 3) Å, in the engine's dtype
    src: Tensor  # (E,) senders
    first: Tensor  # (N + 1,) see `kernels.Topology`
    close: bool  # whether there are pairs shorter than their core radius

    @property
    def dst(self) -> Tensor:
        return torch.repeat_interleave(self.first.diff())


class Engine:
    """Compiled evaluation of a potential's network with tabulated radial functions. Raises CompilerError.

    The weights are those at the time of making. Calls share buffers, so one waits for the other.
    """

    def __init__(self, potential):
        segnn = potential.segnn
        self.dtype, self.cutoff = potential.dtype, potential.cutoff
        self.step = segnn.table_step
        self.n_knots = round(self.cutoff / self.step)
        self.plan = make_plan(potential)
        self.library = load_library(_source(self.dtype, potential.config.lmax_attr))
        self.library.edges.restype = ctypes.c_int64
        self.library.watch.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 8
        self.width = self.library.width()
        self.capacity = (-1, -1, 0)
        self._rows = self._compile()
        self._segments: list[tuple[bool, ctypes.Array]] = []
        self._packed: dict = {}
        self._own: dict[Buffer, Tensor] = {}
        self._lock = Lock()
        species = torch.arange(len(potential.species))
        none, alone = torch.zeros(0, dtype=torch.long), torch.zeros(len(species) + 1, dtype=torch.long)
        self.isolated = self(species, torch.zeros(0, 3), none, alone, None)[0]  # epsilon of one lonely atom

    def edges(self, graph: Graph, species: Tensor, radii: Tensor | None) -> Edges | None:
        """The edges of a graph whose pairs are sorted by receiver, else None; radii (species, species) Å of cores."""
        n, n_pairs = len(species), len(graph.edge_src)
        src, first = torch.empty(n_pairs, dtype=torch.long), torch.empty(n + 1, dtype=torch.long)
        vectors = torch.empty(n_pairs, 3, dtype=self.dtype)
        core = None if radii is None else radii.double().square().contiguous()
        given = [graph.positions.double(), graph.cell.double(), graph.edge_shift.double(), core]
        links = [graph.batch, graph.edge_dst, graph.edge_src, species]
        given, links = ([None if x is None else x.contiguous() for x in xs] for xs in (given, links))
        close = ctypes.c_int64()
        kept = self.library.edges(
            *(ctypes.c_int64(k) for k in (n, n_pairs, 0 if radii is None else len(radii))),
            ctypes.c_double(self.cutoff**2),
            _pointers(given),
            _pointers([*links, first, src]),
            _pointers([vectors]),
            ctypes.byref(close),
        )
        return None if kept < 0 else Edges(vectors[:kept], src[:kept], first, close.value > 0)

    def gather(self, graph: Graph, edges: Edges, g: Tensor, *, stress: bool) -> tuple[Tensor, Tensor | None]:
        """Forces (N, 3) and, with `stress`, virials sum r (x) g (B, 3, 3), float64, from g = dE/dr_ij."""
        n = len(graph.numbers)
        forces = torch.zeros(n, 3, dtype=torch.float64)
        virial = torch.zeros(graph.n_graphs, 3, 3, dtype=torch.float64) if stress else None
        self.library.gather(
            ctypes.c_int64(n),
            _pointers([graph.batch.contiguous(), edges.first, edges.src]),
            _pointers([edges.vectors, g.contiguous()]),
            _pointers([forces, virial]),
        )
        return forces, virial

    def watch(
        self, given: "list[Tensor | None]", forms: Tensor | None, limits: int, numbers: ctypes.Array
    ) -> tuple[bool, np.ndarray]:
        """Whether atoms are within their limits, and how far predictions may be off, in one pass; see `watch.py`.

        given: numbers of neighbours (N,) int64, energy and forces (N, 3) float64, features (N, n); forms (2, n, n):
        `Uncertainty.atoms` and `.frames`; limits: address of fewest and most neighbours (2, N) float64; numbers: seven
        doubles, alpha, beta, gamma, lowest and highest energy, largest force and leverage. The second result has
        leverages (N), sigma_E, and sigma of forces (N, 3); it is empty without forms.
        """
        n, k, features = len(given[0]), 0, given[3]
        if forms is not None:
            k = features.shape[1]
            if forms.shape != (2, k, k) or not forms.dtype == features.dtype == self.dtype:
                raise ValueError(f"forms are {forms.dtype} {tuple(forms.shape)} for {k} features of {features.dtype}")
        out = np.empty(4 * n + 1 if k else 0)
        addresses = [None if x is None else x.data_ptr() for x in (*given, forms)]
        inside = self.library.watch(n, k, *addresses, limits, numbers, out.__array_interface__["data"][0])
        return bool(inside), out

    def __call__(self, species: Tensor, vectors: Tensor, src: Tensor, first: Tensor, weight: Tensor | None):
        """epsilon (N,), invariant features (N, channels), and the gradient of sum_i weight_i epsilon_i with respect to
        r_ij = vectors (E, 3), or None without a weight; edges are sorted by receiver, see `kernels.Topology`."""
        with self._lock:
            return self._run(species, vectors, src, first, weight)

    def _run(self, species, vectors, src, first, weight):
        n, n_edges = len(species), len(src)
        topology = Topology(n, first, src)
        bounds = topology.parts(True, EDGE_WORK)
        threads = len(bounds) - 1
        self._reserve(n, n_edges, threads)
        plan, lib = self.plan, self.library
        vectors = vectors.to(self.dtype).contiguous()
        knot = torch.empty(n_edges, dtype=torch.long)
        gradient = None
        geometry = [vectors, *(b.tensor for b in (plan.harmonics, plan.envelope, plan.fraction, plan.attributes))]
        gradients = [b.tensor for b in (plan.g_harmonics, plan.g_envelope, plan.g_fraction, plan.g_attributes)]
        numbers = (ctypes.c_double * 3)(self.cutoff, self.step, self.n_knots)
        cuts = (ctypes.c_int64 * len(bounds))(*bounds)
        links = _pointers([first, src, src, knot])
        species_links = _pointers([first, src, src, species])
        lib.geometry(threads, cuts, links, numbers, _pointers(geometry), _pointers(gradients))
        if weight is not None:
            plan.weight.tensor[:n, 0] = weight
        last = plan.n_forward if weight is None else len(self._segments)
        for k, (by_edges, steps) in enumerate(self._segments[:last]):
            if by_edges:
                lib.run_edges(steps, threads, cuts, links, ctypes.c_int64(n))
            else:
                count = plan.n_last if weight is None and k == last - 1 else len(steps)
                lib.run_nodes(steps, ctypes.c_int64(count), ctypes.c_int64(n), threads, species_links)
        if weight is not None:
            gradient = torch.empty_like(vectors)
            lib.geometry_gradient(
                threads, cuts, links, numbers, _pointers(geometry), _pointers(gradients), _pointers([gradient])
            )
        return plan.epsilon.tensor[:n, 0].clone(), plan.features.buffer.tensor[:n].clone(), gradient

    def _reserve(self, n: int, n_edges: int, threads: int) -> None:
        nodes, edges, parts = self.capacity
        if n <= nodes and n_edges <= edges and threads <= parts:
            return
        self.capacity = (-1, -1, 0)  # until all is there: what is half made must not be used
        grown = (max(nodes, math.ceil(HEADROOM * n)), max(edges, math.ceil(HEADROOM * n_edges)), max(parts, threads))
        with torch.inference_mode(False):  # the buffers outlive this call
            self._make_buffers(grown)
        self.capacity = grown

    def _make_buffers(self, capacity: tuple[int, int, int]) -> None:
        self._room = capacity
        self._segments = [(on_edges(segment), self._steps(segment)) for segment in self.plan.segments]
        for buffer in self.plan.given():
            self._tensor(buffer)

    def _tensor(self, buffer: Buffer) -> Tensor:
        nodes, edges, parts = self._room
        if buffer.kind == "weights":
            if buffer not in self._own:  # a copy: weights that change later are those of another engine
                self._own[buffer] = buffer.tensor.detach().to(self.dtype, copy=True).contiguous()
            return self._own[buffer]
        rows = {"node": nodes, "edge": edges, "scratch": parts * CHUNK, "shared": parts * nodes}[buffer.kind]
        if buffer.tensor is None or len(buffer.tensor) < rows:
            buffer.tensor = torch.empty(max(rows, 1), buffer.size, dtype=self.dtype)
        return buffer.tensor

    def _steps(self, steps: list) -> ctypes.Array:
        out = (_Step * len(steps))()
        for c, step in zip(out, steps, strict=True):
            if isinstance(step, Rows):
                slots = [self._slot(b) for b in (*step.inputs, *step.outputs)]
                c.n_in, c.n_out = len(step.inputs), len(step.outputs)
                c.rows = ctypes.cast(self._rows[step.operation, step.order], ctypes.c_void_p)
                c.matrix[0] = step.order == 0  # on edges: clear the receivers' rows before
            else:
                slots = self._product(step, c.matrix)
            if len(slots) > SLOTS:
                raise ValueError(f"a step with {len(slots)} tensors; the engine has room for {SLOTS}")
            for k, slot in enumerate(slots):
                c.slots[k] = slot
        return out

    def _slot(self, buffer: Buffer | None, offset: int = 0) -> _Slot:
        if buffer is None:
            return _Slot(None, 0, 0)
        tensor = self._tensor(buffer)
        return _Slot(tensor.data_ptr() + offset * tensor.element_size(), buffer.size, _PLACES[buffer.kind])

    def _compile(self) -> dict:
        """The functions of all row operations, compiled side by side where they are not in the cache."""
        steps = itertools.chain(*self.plan.segments)
        wanted = {(step.operation, step.order) for step in steps if isinstance(step, Rows)}
        libraries = load_libraries(wanted, self.dtype)
        return {key: library.rows for key, library in zip(wanted, libraries, strict=True)}

    def _product(self, step: Product, matrix) -> list[_Slot]:
        weight, bias = self._pack(step)
        strides = [step.a.stride, 0 if step.d is None else step.d.stride, step.c.stride]
        matrix[:] = [step.a.rows, *step.weight.shape, *strides, int(step.add), 0, 0]
        fixed = [_Slot(None if w is None else w.data_ptr(), 0, 0) for w in (weight, bias)]
        given = _Slot(None, 0, 0) if step.d is None else self._slot(step.d.buffer, step.d.offset)
        return [self._slot(step.a.buffer, step.a.offset), *fixed, given, self._slot(step.c.buffer, step.c.offset)]

    def _pack(self, step: Product) -> tuple[Tensor, Tensor | None]:
        """The weight cut into panels of up to four vectors of columns, each contiguous, padded with zeros."""
        if id(step) not in self._packed:
            rows, columns = step.weight.shape
            vectors = -(-columns // self.width)
            padded = torch.zeros(rows, vectors * self.width, dtype=self.dtype)
            padded[:, :columns] = step.weight
            bias = None
            if step.bias is not None:
                bias = torch.zeros(vectors * self.width, dtype=self.dtype)
                bias[:columns] = step.bias
            widths = [self.width * w for w in panels(vectors)]
            packed = torch.cat([p.reshape(-1) for p in padded.split(widths, dim=1)])
            self._packed[id(step)] = (packed, bias)
        return self._packed[id(step)]


def panels(vectors: int) -> list[int]:
    """Cut a number of vectors into panels of at most four, as equal as can be."""
    out = []
    while vectors:
        out.append(-(-vectors // -(-vectors // 4)))
        vectors -= out[-1]
    return out


def _pointers(tensors: "list[Tensor | None]") -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def harmonics_formula(lmax: int) -> tuple[Formula, list[Expr], list[Expr | None], list[Expr | None]]:
    """Y^1 ... Y^lmax of a unit vector u, the gradient of their sum with weights g, and their derivatives along w."""
    f = Formula()
    unit = [f.input("u", k, "V") for k in range(3)]
    level = [f.mul(f.const(math.sqrt(3.0)), x) for x in unit]
    values = []
    for l in range(1, lmax + 1):
        values += level
        table = raise_degree(l).table
        outer = [f.mul(y, x) for y in level for x in unit]
        level = [
            f.add(*(f.mul(f.const(c), o) for c, o in zip(column, outer, strict=True) if abs(c) > 1e-12))
            for column in table.T.tolist()
        ]
    seeds = [f.input("g", r, "V") for r in range(len(values))]
    gradient = f.gradients(list(zip(values, seeds, strict=True)), unit) if values else [None] * 3
    along: dict[int, Expr | None] = {x.index: f.input("w", k, "V") for k, x in enumerate(unit)}
    return f, values, gradient, f.tangents(values, along)


def _printed(f: Formula, wanted: list[Expr]) -> str:
    lines = []

    def name(e: Expr) -> str:
        return f"((T){e.args[0]!r})" if e.op == "const" else f"v{e.index}"

    for e in f.needed([w for w in wanted if w is not None]):
        if e.op == "in":
            lines.append(f"const V v{e.index} = {e.args[0]}[{e.args[1]}];")
        elif e.op != "const":
            lines.append(f"const V v{e.index} = {(' + ' if e.op == 'add' else ' * ').join(map(name, e.args))};")
    return "\n    ".join(lines)


def _source(dtype: torch.dtype, lmax: int) -> str:
    f, values, gradient, tangents = harmonics_formula(lmax)

    def code(wanted: list[Expr | None], to: str, first: int) -> str:
        lines = (f"{to}[{k}] = " + ("(V){0};" if e is None else f"v{e.index};") for k, e in enumerate(wanted, first))
        return "\n    ".join([_printed(f, wanted), *lines])

    runtime = _RUNTIME
    runtime = runtime.replace("HARMONICS_FORWARD", code(values, "y", 1))
    runtime = runtime.replace("HARMONICS_BACKWARD", code(gradient, "gu", 0))
    runtime = runtime.replace("HARMONICS_TANGENT", code(tangents, "dy", 1))
    return f"{prelude(dtype)}\n#define DIM {(lmax + 1) ** 2}\n#define CHUNK {CHUNK}\n#define SLOTS {SLOTS}\n{runtime}"


_RUNTIME = r"""
typedef void (*rows_function)(int64_t, int64_t, const int64_t *const *, const T *const *, T *const *);
typedef struct { T *base; int64_t size, place; } Slot;
typedef struct { rows_function rows; int64_t n_in, n_out; Slot slots[SLOTS]; int64_t matrix[9]; } Step;
#define UNROLL _Pragma("GCC unroll 16")
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)")
#define SIMD _Pragma("omp simd")
#else
#define PARALLEL
#define SIMD
#endif

int width(void) { return W; }

/* R rows of c = a b + bias + d (+ c): b (K, NV vectors), all sums in registers */
#define MICRO(R, NV) \
static __attribute__((noinline)) void micro_##R##_##NV( \
    int64_t K, const T *restrict a, int64_t lda, int64_t step, const T *restrict b, int64_t ldb, const T *bias, \
    const T *d, int64_t ldd, T *c, int64_t ldc, int add, int columns) { \
  V sum[R][NV]; \
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) \
    sum[r][v] = bias ? load(bias + v * W, W) : (V){0}; \
  for (int64_t k = 0; k < K; k++) { \
    V x[NV]; \
    UNROLL for (int v = 0; v < NV; v++) x[v] = load(b + k * ldb + v * W, W); \
    UNROLL for (int r = 0; r < R; r++) { \
      const T s = a[r * lda + k * step]; \
      UNROLL for (int v = 0; v < NV; v++) sum[r][v] += s * x[v]; \
    } \
  } \
  if (columns == NV * W) { \
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) { \
      T *to = c + r * ldc + v * W; \
      if (d) sum[r][v] += load(d + r * ldd + v * W, W); \
      if (add) sum[r][v] += load(to, W); \
      store(to, sum[r][v], W); \
    } \
    return; \
  } \
  T part[R * NV * W]; \
  UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < NV; v++) \
    store(part + (r * NV + v) * W, sum[r][v], W); \
  for (int r = 0; r < R; r++) for (int n = 0; n < columns; n++) \
    c[r * ldc + n] = part[r * NV * W + n] + (d ? d[r * ldd + n] : 0) + (add ? c[r * ldc + n] : 0); \
}
#define PANEL(NV, R) \
MICRO(R, NV) MICRO(4, NV) MICRO(2, NV) MICRO(1, NV) \
static void panel_##NV(int64_t rows, int64_t K, const T *a, int64_t lda, int64_t step, const T *b, int64_t ldb, \
    const T *bias, const T *d, int64_t ldd, T *c, int64_t ldc, int add, int columns) { \
  int64_t i = 0; \
  for (; i + R <= rows; i += R) \
    micro_##R##_##NV(K, a + i * lda, lda, step, b, ldb, bias, d ? d + i * ldd : d, ldd, c + i * ldc, ldc, add, \
      columns); \
  for (; i + 4 <= rows; i += 4) \
    micro_4_##NV(K, a + i * lda, lda, step, b, ldb, bias, d ? d + i * ldd : d, ldd, c + i * ldc, ldc, add, \
      columns); \
  for (; i + 2 <= rows; i += 2) \
    micro_2_##NV(K, a + i * lda, lda, step, b, ldb, bias, d ? d + i * ldd : d, ldd, c + i * ldc, ldc, add, \
      columns); \
  for (; i < rows; i++) \
    micro_1_##NV(K, a + i * lda, lda, step, b, ldb, bias, d ? d + i * ldd : d, ldd, c + i * ldc, ldc, add, \
      columns); \
}
PANEL(1, 14)
PANEL(2, 12)
PANEL(3, 8)
PANEL(4, 6)

/* b packed in panels, or with ldb > 0 rows of that stride, behind which W numbers can be read */
static void product(int64_t rows, int64_t K, int64_t N, const T *a, int64_t lda, int64_t step, const T *b, int64_t ldb,
                    const T *bias, const T *d, int64_t ldd, T *c, int64_t ldc, int add) {
  int64_t left = (N + W - 1) / W;
  while (left > 0) {
    const int64_t n = (left + 3) / 4, v = (left + n - 1) / n;
    const int columns = N < v * W ? N : v * W;
    const int64_t stride = ldb ? ldb : v * W;
#define CASE(NV) case NV: panel_##NV(rows, K, a, lda, step, b, stride, bias, d, ldd, c, ldc, add, columns); break;
    switch (v) { CASE(1) CASE(2) CASE(3) CASE(4) }
    left -= v; N -= columns; b += ldb ? v * W : K * v * W; c += v * W;
    if (bias) bias += v * W;
    if (d) d += v * W;
  }
}

/* scratch of a chunk that begins with atom `low` lies at `scratch` */
static void run_step(const Step *s, int64_t low, int64_t high, int64_t scratch, const int64_t *const *links) {
  T *p[SLOTS];
  if (s->rows) {
    for (int64_t k = 0; k < s->n_in + s->n_out; k++) {
      const Slot *x = s->slots + k;
      p[k] = x->base && x->place == 1 ? x->base + (scratch - low) * x->size : x->base;
    }
    s->rows(low, high, links, (const T *const *)p, p + s->n_in);
    return;
  }
  for (int k = 0; k < 5; k++) {
    const Slot *x = s->slots + k;
    p[k] = x->base ? x->base + (x->place == 1 ? scratch : low) * x->size : x->base;
  }
  const int64_t *m = s->matrix, rows = (high - low) * m[0];
  switch (m[7]) {
    case 0: product(rows, m[1], m[2], p[0], m[3], 1, p[1], 0, p[2], p[3], m[4], p[4], m[5], (int)m[6]); break;
    case 1: /* c (K, N) += a' b: gradient of the weights */
      product(m[1], rows, m[2], p[0], 1, m[3], p[1], m[4], NULL, NULL, 0, p[4], m[2], 1); break;
    case 2: /* c (N) += the sum of the rows of b: gradient of the bias */
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < m[2]; k++) p[4][k] += p[1][r * m[4] + k];
      break;
    case 3: /* c += b */
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < m[2]; k++) p[4][r * m[5] + k] += p[1][r * m[4] + k];
  }
}

/* scaled weights (K, N), or their transpose, in the panels of `product` */
void pack(int64_t K, int64_t N, const T *w, int64_t sk, int64_t sn, T scale, T *out) {
  int64_t left = (N + W - 1) / W, begin = 0;
  while (left > 0) {
    const int64_t n = (left + 3) / 4, v = (left + n - 1) / n;
    for (int64_t k = 0; k < K; k++)
      for (int64_t q = 0; q < v * W; q++) *out++ = begin + q < N ? scale * w[k * sk + (begin + q) * sn] : 0;
    left -= v; begin += v * W;
  }
}

void run_nodes(const Step *steps, int64_t n_steps, int64_t n, int threads, const int64_t *const *links) {
  PARALLEL
  for (int t = 0; t < threads; t++)
    for (int64_t low = t * CHUNK; low < n; low += (int64_t)threads * CHUNK)
      for (int64_t k = 0; k < n_steps; k++)
        run_step(steps + k, low, low + CHUNK < n ? low + CHUNK : n, (int64_t)t * CHUNK, links);
}

/* what is added to rows of the receivers is cleared before; what is added to those of the senders too ("shared") has
   a copy for every thread, all added to the first at the end */
void run_edges(const Step *s, int threads, const int64_t *bounds, const int64_t *const *links, int64_t n) {
  const Slot *out = s->slots + s->n_in;
  PARALLEL
  for (int t = 0; t < threads; t++) {
    T *p[SLOTS];
    for (int64_t k = 0; k < s->n_in; k++)
      p[k] = s->slots[k].base;
    for (int64_t k = 0; k < s->n_out; k++) {
      p[s->n_in + k] = out[k].base;
      if (!out[k].base) continue;
      if (out[k].place == 2) {
        p[s->n_in + k] += t * n * out[k].size;
        memset(p[s->n_in + k], 0, n * out[k].size * sizeof(T));
      } else if (s->matrix[0])
        memset(out[k].base + bounds[t] * out[k].size, 0, (bounds[t + 1] - bounds[t]) * out[k].size * sizeof(T));
    }
    s->rows(bounds[t], bounds[t + 1], links, (const T *const *)p, p + s->n_in);
  }
  if (threads == 1) return;
  PARALLEL
  for (int t = 0; t < threads; t++)
    for (int64_t k = 0; k < s->n_out; k++) {
      if (!out[k].base || out[k].place != 2) continue;
      const int64_t all = n * out[k].size, low = all * t / threads, high = all * (t + 1) / threads;
      for (int other = 1; other < threads; other++) {
        T *restrict to = out[k].base, *restrict from = out[k].base + other * all;
        for (int64_t m = low; m < high; m++) to[m] += from[m];
      }
    }
}

/* the pairs (sorted by receiver) that are shorter than the cutoff, and how many are within a core; -1 if not sorted.
   given: positions, cells, shifts, squares of core radii; links: batch, receivers, senders, species, and out: first
   edges and senders */
int64_t edges(int64_t n, int64_t n_pairs, int64_t n_species, double cutoff2, const double **given, int64_t **links,
              T **out, int64_t *close) {
  const double *r = given[0], *core = given[3];
  int64_t kept = 0, at = 0, *first = links[4];
  first[0] = *close = 0;
  for (int64_t e = 0; e < n_pairs; e++) {
    const int64_t i = links[1][e], j = links[2][e];
    if (i < at) return -1;
    while (at < i) first[++at] = kept;
    const double *h = given[1] + 9 * links[0][i], *s = given[2] + 3 * e;
    double v[3];
    for (int k = 0; k < 3; k++) v[k] = r[3 * j + k] - r[3 * i + k] + (s[0] * h[k] + s[1] * h[3 + k] + s[2] * h[6 + k]);
    const double square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
    if (square >= cutoff2) continue; /* NaN is kept, and seen in the energy */
    if (core && square < core[links[3][i] * n_species + links[3][j]]) ++*close;
    links[5][kept] = j;
    for (int k = 0; k < 3; k++) out[0][3 * kept + k] = v[k];
    kept++;
  }
  while (at < n) first[++at] = kept;
  return kept;
}

/* forces and virials (B, 3, 3) from the gradient of every edge; links: batch, first edges, senders */
void gather(int64_t n, int64_t **links, T **in, double **out) {
  double *forces = out[0], *virial = out[1];
  for (int64_t i = 0; i < n; i++) {
    double sum[3] = {0}, w[9] = {0};
    for (int64_t e = links[1][i]; e < links[1][i + 1]; e++) {
      const T *g = in[1] + 3 * e, *r = in[0] + 3 * e;
      double *other = forces + 3 * links[2][e];
      for (int k = 0; k < 3; k++) {
        sum[k] += g[k];
        other[k] -= g[k];
        for (int m = 0; m < 3; m++) w[3 * m + k] += (double)r[m] * g[k];
      }
    }
    for (int k = 0; k < 3; k++) forces[3 * i + k] += sum[k];
    if (virial)
      for (int k = 0; k < 9; k++) virial[9 * links[0][i] + k] += w[k];
  }
}

/* see `Engine.watch`; NaN is outside, and so are atoms without any neighbours among them, for which there are rules */
int watch(int64_t n, int64_t k, const int64_t *counts, const double *energy, const double *forces, const T *features,
          const T *forms, const double *limits, const double *numbers, double *out) {
  T sum[k + 1], to[k + 1];
  int inside = *energy >= numbers[3] && *energy <= numbers[4];
  int64_t neighbors = 0;
  for (int64_t i = 0; i < n; i++) {
    neighbors += counts[i];
    inside &= counts[i] >= limits[i] && counts[i] <= limits[n + i];
  }
  for (int64_t q = 0; forces && q < 3 * n; q++) inside &= __builtin_fabs(forces[q]) <= numbers[5];
  inside &= neighbors > 0;
  if (!k) return inside;
  memset(sum, 0, sizeof sum);
  for (int64_t i = 0; i <= n; i++) { /* at last the sum of all */
    const T *x = i < n ? features + i * k : sum, *form = forms + (i < n ? 0 : k * k);
    double square = 0;
    memset(to, 0, sizeof to);
    for (int64_t r = 0; r < k; r++) {
      const T factor = x[r];
      SIMD for (int64_t q = 0; q < k; q++) to[q] += factor * form[r * k + q];
    }
    for (int64_t q = 0; q < k; q++) square += (double)to[q] * to[q];
    out[i] = __builtin_sqrt(square);
    if (i == n) break;
    SIMD for (int64_t q = 0; q < k; q++) sum[q] += x[q];
    inside &= out[i] <= numbers[6];
    const double force = numbers[1] * __builtin_pow(out[i], numbers[2]);
    for (int64_t q = 0; q < 3; q++) out[n + 1 + 3 * i + q] = force;
  }
  out[n] *= numbers[0];
  return inside;
}

/* unit vectors of n <= W edges, and their lengths; two atoms on one spot have no direction, see `make_edges` */
INLINE void lanes_of(const T *r, int n, V *u, T *d) {
  T x[3][W];
  for (int l = 0; l < W; l++) {
    const T *p = r + 3 * (l < n ? l : 0);
    const T square = p[0] * p[0] + p[1] * p[1] + p[2] * p[2];
    d[l] = sizeof(T) == 4 ? __builtin_sqrtf(square > (T)1e-12 ? square : (T)1e-12)
                          : __builtin_sqrt(square > (T)1e-12 ? square : (T)1e-12);
    for (int k = 0; k < 3; k++) x[k][l] = p[k] / d[l];
  }
  for (int k = 0; k < 3; k++) u[k] = load(x[k], W);
}

INLINE T envelope_slope(T x) { return x < 1 ? x * x * x * x * x * (-168 + 336 * x - 168 * x * x) : 0; }

/* in: vectors, harmonics, envelope, fraction, attributes; gradients of the latter four are cleared */
void geometry(int threads, const int64_t *bounds, int64_t **links, const double *numbers, T **in, T **gradients) {
  const int64_t *first = links[0];
  const T cutoff = numbers[0], inverse = 1 / numbers[1];
  const int64_t last = numbers[2] - 1;
  PARALLEL
  for (int t = 0; t < threads; t++) {
    const int64_t begin = first[bounds[t]], end = first[bounds[t + 1]];
    for (int64_t e = begin; e < end; e += W) {
      const int n = end - e < W ? end - e : W;
      V u[3], y[DIM];
      T d[W];
      lanes_of(in[0] + 3 * e, n, u, d);
      y[0] = (V){0} + 1;
      HARMONICS_FORWARD
      for (int l = 0; l < n; l++) {
        for (int r = 0; r < DIM; r++) in[1][(e + l) * DIM + r] = y[r][l];
        const T near = d[l] < cutoff ? d[l] : cutoff, x = near / cutoff, x3 = x * x * x;
        in[2][e + l] = 1 - x3 * x3 * (28 - 48 * x + 21 * x * x);
        const T scaled = near * inverse;
        const int64_t knot = scaled < last ? (int64_t)scaled : last;
        links[3][e + l] = knot;
        in[3][e + l] = scaled - knot;
      }
    }
    memset(gradients[0] + begin * DIM, 0, (end - begin) * DIM * sizeof(T));
    memset(gradients[1] + begin, 0, (end - begin) * sizeof(T));
    memset(gradients[2] + begin, 0, (end - begin) * sizeof(T));
    memset(gradients[3] + bounds[t] * DIM, 0, (bounds[t + 1] - bounds[t]) * DIM * sizeof(T));
    for (int64_t i = bounds[t]; i < bounds[t + 1]; i++) {
      T sum[DIM] = {0};
      for (int64_t e = first[i]; e < first[i + 1]; e++)
        for (int r = 0; r < DIM; r++) sum[r] += in[2][e] * in[1][e * DIM + r];
      for (int r = 0; r < DIM; r++) in[4][i * DIM + r] = r ? sum[r] / (1 + sum[0]) : 1;
    }
  }
}

/* derivatives of harmonics, envelope and attributes along a direction of the vectors; in: as `geometry` leaves them */
void geometry_tangent(int64_t n, int64_t **links, const double *numbers, T **in, T *direction, T **out) {
  const int64_t *first = links[0];
  const T cutoff = numbers[0];
  for (int64_t e = 0; e < first[n]; e += W) {
    const int m = first[n] - e < W ? first[n] - e : W;
    V u[3], w[3], dy[DIM];
    T d[W], lane[3][W], along[W];
    lanes_of(in[0] + 3 * e, m, u, d);
    for (int l = 0; l < W; l++) {
      const T *v = direction + 3 * (e + (l < m ? l : 0));
      along[l] = u[0][l] * v[0] + u[1][l] * v[1] + u[2][l] * v[2];
      for (int k = 0; k < 3; k++) lane[k][l] = (v[k] - u[k][l] * along[l]) / d[l];
    }
    for (int k = 0; k < 3; k++) w[k] = load(lane[k], W);
    dy[0] = (V){0};
    HARMONICS_TANGENT
    for (int l = 0; l < m; l++) {
      for (int r = 0; r < DIM; r++) out[0][(e + l) * DIM + r] = dy[r][l];
      out[1][e + l] = envelope_slope(d[l] / cutoff) / cutoff * along[l];
    }
  }
  for (int64_t i = 0; i < n; i++) {
    T sum[DIM] = {0}, total = 1;
    for (int64_t e = first[i]; e < first[i + 1]; e++) {
      total += in[2][e];
      for (int r = 0; r < DIM; r++) sum[r] += out[1][e] * in[1][e * DIM + r] + in[2][e] * out[0][e * DIM + r];
    }
    for (int r = 0; r < DIM; r++) out[2][i * DIM + r] = r ? (sum[r] - in[4][i * DIM + r] * sum[0]) / total : 0;
  }
}

/* from the gradients of harmonics, envelope, fraction and attributes to that of the vectors */
void geometry_gradient(int threads, const int64_t *bounds, int64_t **links, const double *numbers, T **in,
                       T **gradients, T **out) {
  const int64_t *first = links[0];
  const T cutoff = numbers[0], inverse = 1 / numbers[1];
  PARALLEL
  for (int t = 0; t < threads; t++) {
    for (int64_t i = bounds[t]; i < bounds[t + 1]; i++) {
      T total = 0, gs[DIM];
      for (int64_t e = first[i]; e < first[i + 1]; e++) total += in[2][e];
      gs[0] = 0;
      for (int r = 1; r < DIM; r++) {
        gs[r] = gradients[3][i * DIM + r] / (1 + total);
        gs[0] -= gs[r] * in[4][i * DIM + r];
      }
      for (int64_t e = first[i]; e < first[i + 1]; e++) {
        T gu = 0;
        for (int r = 0; r < DIM; r++) {
          gradients[0][e * DIM + r] += in[2][e] * gs[r];
          gu += gs[r] * in[1][e * DIM + r];
        }
        gradients[1][e] += gu;
      }
    }
    const int64_t begin = first[bounds[t]], end = first[bounds[t + 1]];
    for (int64_t e = begin; e < end; e += W) {
      const int n = end - e < W ? end - e : W;
      V u[3], gu[3], g[DIM];
      T d[W], lane[DIM][W];
      lanes_of(in[0] + 3 * e, n, u, d);
      for (int l = 0; l < W; l++)
        for (int r = 1; r < DIM; r++) lane[r - 1][l] = gradients[0][(e + (l < n ? l : 0)) * DIM + r];
      for (int r = 0; r < DIM - 1; r++) g[r] = load(lane[r], W);
      HARMONICS_BACKWARD
      const V along = gu[0] * u[0] + gu[1] * u[1] + gu[2] * u[2];
      for (int l = 0; l < n; l++) {
        const T x = d[l] / cutoff;
        const T push = gradients[1][e + l] * envelope_slope(x) / cutoff + (x < 1 ? gradients[2][e + l] * inverse : 0);
        for (int k = 0; k < 3; k++) out[0][3 * (e + l) + k] = (gu[k][l] - u[k][l] * along[l]) / d[l] + u[k][l] * push;
      }
    }
  }
}
"""
