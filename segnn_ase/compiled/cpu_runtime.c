/* What is the same for every network: matrix products, the order of steps, pairs, forces, leverages.

   Compiled behind `vectors.h` and what `runtime.py` writes before it: CHUNK atoms, SLOTS tensors of a step, the
   structures Slot, Step, Segment, Graph and Limits, their operation codes and kinds of memory. */
typedef void (*rows_function)(int64_t, int64_t, const int64_t *const *, const T *const *, T *const *);
typedef void (*newness_function)(const void *, const void *, int);
#define UNROLL _Pragma("GCC unroll 16")
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)")
#define SIMD _Pragma("omp simd")
#define PRAGMA(x) _Pragma(#x)
#define SUM(x) PRAGMA(omp simd reduction(+:x))
#else
#define PARALLEL
#define SIMD
#define SUM(x)
#endif

/* for `runtime.load_runtime`: Python must see the same structures */
void layout(int64_t *out) {
  const int64_t found[] = {sizeof(T), W, CHUNK, sizeof(Slot), sizeof(Step), offsetof(Step, slots),
                           sizeof(Segment), sizeof(Graph), sizeof(Limits)};
  memcpy(out, found, sizeof found);
}

/* the columns of a panel that is not full, from the sums of R rows in `part` */
static __attribute__((noinline)) void write_part(int R, int columns, const T *part, int64_t width, const T *d,
                                                 int64_t ldd, T *c, int64_t ldc, int add) {
  for (int r = 0; r < R; r++) for (int n = 0; n < columns; n++)
    c[r * ldc + n] = part[r * width + n] + (d ? d[r * ldd + n] : 0) + (add ? c[r * ldc + n] : 0);
}

/* R rows of c = a b + bias + d (+ c): b (K, NV vectors), all sums in registers */
typedef void micro(int64_t K, const T *restrict a, int64_t lda, int64_t step, const T *restrict b, int64_t ldb,
                   const T *bias, const T *d, int64_t ldd, T *c, int64_t ldc, int add, int columns);
#define MICRO(NV, R) \
static __attribute__((noinline)) void micro_##NV##_##R( \
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
  write_part(R, columns, part, NV * W, d, ldd, c, ldc, add); \
}
#define UP_TO_6(DO, NV) DO(NV, 1) DO(NV, 2) DO(NV, 3) DO(NV, 4) DO(NV, 5) DO(NV, 6)
#define UP_TO_8(DO, NV) UP_TO_6(DO, NV) DO(NV, 7) DO(NV, 8)
UP_TO_8(MICRO, 1) UP_TO_8(MICRO, 2) UP_TO_8(MICRO, 3) UP_TO_6(MICRO, 4)
#define NAME(NV, R) micro_##NV##_##R,
static micro *const micros[4][8] = {{UP_TO_8(NAME, 1)}, {UP_TO_8(NAME, 2)}, {UP_TO_8(NAME, 3)}, {UP_TO_6(NAME, 4)}};
static const int most_rows[4] = {8, 8, 8, 6};

/* b packed in panels, or with ldb > 0 rows of that stride, behind which W numbers can be read. Rows are cut evenly:
   what is left over by the largest blocks would keep the machine half busy, and a molecule has few */
static void product(int64_t rows, int64_t K, int64_t N, const T *a, int64_t lda, int64_t step, const T *b, int64_t ldb,
                    const T *bias, const T *d, int64_t ldd, T *c, int64_t ldc, int add) {
  int64_t left = (N + W - 1) / W;
  while (left > 0) {
    const int64_t n = (left + 3) / 4, v = (left + n - 1) / n, most = most_rows[v - 1];
    const int columns = N < v * W ? N : v * W;
    for (int64_t i = 0, blocks = (rows + most - 1) / most; blocks > 0; blocks--) {
      const int64_t high = (rows - i + blocks - 1) / blocks;
      micros[v - 1][high - 1](K, a + i * lda, lda, step, b, ldb ? ldb : v * W, bias, d ? d + i * ldd : d, ldd,
                              c + i * ldc, ldc, add, columns);
      i += high;
    }
    left -= v; N -= columns; b += ldb ? v * W : K * v * W; c += v * W;
    if (bias) bias += v * W;
    if (d) d += v * W;
  }
}

/* by thread t; scratch of a chunk that begins with item `low` lies at `scratch` */
static void run_step(const Step *s, int64_t t, int64_t low, int64_t high, int64_t scratch,
                     const int64_t *const *links) {
  T *p[SLOTS];
  const Slot *x = s->slots;
  if (s->op == ROWS) {
    const rows_function rows = (rows_function)s->function;
    for (int64_t k = 0; k < s->n_in + s->n_out; k++) {
      const int64_t shift = x[k].memory == SCRATCH ? scratch - low : x[k].memory == SUMMED ? t : 0;
      p[k] = x[k].base ? (T *)x[k].base + shift * x[k].size : NULL;
    }
    rows(low, high, links, (const T *const *)p, p + s->n_in);
    return;
  }
  for (int64_t k = 0; k < s->n_in + s->n_out; k++) {
    const int64_t row = x[k].memory == SCRATCH ? scratch : x[k].memory == SUMMED ? t : low;
    p[k] = x[k].base ? (T *)x[k].base + row * x[k].size : NULL;
  }
  const int64_t rows = (high - low) * s->rows;
  switch (s->op) {
    case PRODUCT: /* a, packed weight, bias, d; c */
      product(rows, s->inner, s->outer, p[0], s->a_stride, 1, p[1], 0, p[2], p[3], s->d_stride, p[4], s->c_stride,
              (int)s->add);
      break;
    case WEIGHT_GRADIENT: /* a, g; dW (inner, outer) += a' g */
      product(s->inner, rows, s->outer, p[0], 1, s->a_stride, p[1], s->d_stride, NULL, NULL, 0, p[2], s->outer, 1);
      break;
    case BIAS_GRADIENT: /* g; db (outer) += the sum of its rows */
      for (int64_t r = 0; r < rows; r++)
        for (int64_t k = 0; k < s->outer; k++) p[1][k] += p[0][r * s->d_stride + k];
  }
}

/* scaled weights (K, N), or their transpose, in the panels of `product` */
void pack(int64_t K, int64_t N, const T *w, int64_t sk, int64_t sn, double factor, T *out) {
  const T scale = (T)factor;
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
        run_step(steps + k, t, low, low + CHUNK < n ? low + CHUNK : n, (int64_t)t * CHUNK, links);
}

/* rows of the receivers belong to one thread (RECEIVERS); of what is added to at other places (PRIVATE) every thread
   has a copy, all added to the first at the end. Both are cleared before, if nothing was there. counts: rows in all,
   of places of each kind */
void run_edges(const Step *s, int threads, const int64_t *bounds, const int64_t *const *links, const int64_t *counts) {
  const Slot *out = s->slots + s->n_in;
  PARALLEL
  for (int t = 0; t < threads; t++) {
    T *p[SLOTS];
    for (int64_t k = 0; k < s->n_in; k++) p[k] = s->slots[k].base;
    for (int64_t k = 0; k < s->n_out; k++) {
      const int64_t all = counts[out[k].where] * out[k].size;
      T *const to = p[s->n_in + k] = out[k].base;
      if (!to) continue;
      if (out[k].memory == SUMMED)
        p[s->n_in + k] += t * out[k].size;
      else if (out[k].memory == PRIVATE) {
        p[s->n_in + k] += t * all;
        if (t || out[k].clear) memset(to + t * all, 0, all * sizeof(T));
      } else if (out[k].memory == RECEIVERS && out[k].clear)
        memset(to + bounds[t] * out[k].size, 0, (bounds[t + 1] - bounds[t]) * out[k].size * sizeof(T));
    }
    ((rows_function)s->function)(bounds[t], bounds[t + 1], links, (const T *const *)p, p + s->n_in);
  }
  if (threads == 1) return;
  PARALLEL
  for (int t = 0; t < threads; t++)
    for (int64_t k = 0; k < s->n_out; k++) {
      if (!out[k].base || out[k].memory != PRIVATE) continue;
      const int64_t all = counts[out[k].where] * out[k].size, low = all * t / threads, high = all * (t + 1) / threads;
      for (int other = 1; other < threads; other++) {
        T *restrict to = out[k].base, *restrict from = (T *)out[k].base + other * all;
        for (int64_t m = low; m < high; m++) to[m] += from[m];
      }
    }
}

/* all of a pass; counts: of nodes, pairs and edges, as in KINDS, on which steps are done; rows: of which there are
   numbers, more where senders are among others' nodes */
void run_pass(const Segment *s, int64_t n_segments, int threads, const int64_t *bounds, const int64_t *const *on_edges,
              const int64_t *const *on_nodes, const int64_t *counts, const int64_t *rows) {
  for (; n_segments--; s++)
    if (s->summed) run_edges(s->steps, threads, bounds, on_edges, rows);
    else run_nodes(s->steps, s->n_steps, counts[s->where], threads, s->where == EDGE ? on_edges : on_nodes);
}

/* the pairs (sorted by receiver) that are shorter than the cutoff: `first`, `src`, `knot` and `vectors`, as far as there
   is room, how many they are, -1 where they are not sorted, how many are within a core, and how many threads they are
   worth; the scale of each atom, its weight in the energy. Whether there was room */
int find_edges(Graph *g) {
  const double *r = g->positions, *cells = g->cell, *shifts = g->shifts, *core = g->core, *scale = g->scale;
  const double cutoff2 = g->cutoff * g->cutoff, inverse = 1 / g->knot_distance;
  const int64_t *batch = g->batch, *receivers = g->receivers, *senders = g->senders, *kind = g->kind;
  int64_t kept = 0, at = 0, *first = g->first, *src = g->src, *knots = g->knot;
  T *vectors = g->vectors, *weight = g->weight;
  for (int64_t i = 0; i < g->n; i++) weight[i] = scale[kind[i]];
  first[0] = g->close = 0;
  for (int64_t e = 0; e < g->n_pairs; e++) {
    const int64_t i = receivers[e], j = senders[e];
    if (i < at) { g->n_edges = -1; return 0; }
    while (at < i) first[++at] = kept;
    const double *h = cells + 9 * batch[i], *s = shifts + 3 * e;
    double v[3];
    for (int k = 0; k < 3; k++) v[k] = r[3 * j + k] - r[3 * i + k] + (s[0] * h[k] + s[1] * h[3 + k] + s[2] * h[6 + k]);
    const double square = v[0] * v[0] + v[1] * v[1] + v[2] * v[2];
    if (square >= cutoff2) continue; /* NaN is kept, and seen in the energy */
    if (square < core[kind[i] * g->n_species + kind[j]]) g->close++;
    if (kept < g->room) {
      const double knot = __builtin_sqrt(square) * inverse;
      src[kept] = j;
      knots[kept] = knot < g->last_knot ? (int64_t)knot : g->last_knot; /* NaN: the last */
      for (int k = 0; k < 3; k++) vectors[3 * kept + k] = v[k];
    }
    kept++;
  }
  while (at < g->n) first[++at] = kept;
  g->n_edges = kept;
  g->threads = 1 + kept / g->edges_per_thread;
  if (g->threads > g->most_threads) g->threads = g->most_threads;
  return kept <= g->room && g->threads <= g->room_for_threads;
}

/* a pass over what was found; every thread has receivers with as many edges as the others; n_all: of nodes, those of
   others included */
static void run_parted(const Graph *g, const Segment *segments, int64_t n_segments, int64_t n_all) {
  const int64_t *first = g->first, threads = g->threads;
  const int64_t *const on_edges[] = {first, g->src, g->src, g->knot}, *const on_nodes[] = {first, g->src, g->src, g->kind};
  const int64_t counts[] = {g->n, 0, g->n_edges}, rows[] = {n_all, 0, g->n_edges}; /* as in KINDS */
  int64_t bounds[threads + 1];
  bounds[0] = 0;
  for (int64_t t = 1, i = 0; t < threads; t++) {
    while (i < g->n && first[i] < g->n_edges * t / threads) i++;
    bounds[t] = i;
  }
  bounds[threads] = g->n;
  run_pass(segments, n_segments, threads, bounds, on_edges, on_nodes, counts, rows);
}

void run_found(const Graph *g, const Segment *segments, int64_t n_segments) {
  run_parted(g, segments, n_segments, g->n);
}

/* forces and virials (B, 3, 3) from the gradient of every edge */
static void gather(const Graph *g) {
  const int64_t *batch = g->batch, *first = g->first, *src = g->src;
  const T *gradient = g->gradient, *vectors = g->vectors;
  double *forces = g->forces, *virial = g->virial;
  memset(forces, 0, 3 * g->n * sizeof(double));
  if (virial) memset(virial, 0, 9 * g->n_graphs * sizeof(double));
  for (int64_t i = 0; i < g->n; i++) {
    double sum[3] = {0}, w[9] = {0};
    for (int64_t e = first[i]; e < first[i + 1]; e++) {
      const T *of = gradient + 3 * e, *r = vectors + 3 * e;
      double *other = forces + 3 * src[e];
      for (int k = 0; k < 3; k++) {
        sum[k] += of[k];
        other[k] -= of[k];
        for (int m = 0; m < 3; m++) w[3 * m + k] += (double)r[m] * of[k];
      }
    }
    for (int k = 0; k < 3; k++) forces[3 * i + k] += sum[k];
    if (virial)
      for (int k = 0; k < 9; k++) virial[9 * batch[i] + k] += w[k];
  }
}

/* what evaluation returns, from what a pass has left: energies of structures and of atoms, to which `added` is added if
   it is there, features, and where there is room for forces, these, virials and gradients */
void finish(const Graph *g) {
  const double *reference = g->reference, *scale = g->scale, *added = g->added;
  const int64_t *batch = g->batch, *kinds = g->kind;
  const T *epsilon = g->epsilon, *isolated = g->isolated, *gradient = g->gradient;
  double *energy = g->energy, *energies = g->energies, *gradients = g->gradients;
  memset(energy, 0, g->n_graphs * sizeof(double));
  for (int64_t i = 0; i < g->n; i++) {
    const int64_t kind = kinds[i];
    const T above = epsilon[i] - isolated[kind];
    energies[i] = reference[kind] + scale[kind] * (double)above;
    if (added) energies[i] += added[i];
    energy[batch[i]] += energies[i];
  }
  memcpy(g->descriptors, g->features, g->n * g->width * sizeof(T));
  if (!g->forces) return;
  gather(g);
  for (int64_t k = 0; k < 3 * g->n_edges; k++) gradients[k] = gradient[k];
}

/* all of an evaluation, in one call; 0 where `find_edges` had no room, and where there are cores in contact */
int evaluate(Graph *g, const Segment *segments, int64_t n_segments) {
  if (!find_edges(g) || (g->repels && g->close)) return 0;
  run_found(g, segments, n_segments);
  finish(g);
  return 1;
}

static double length(const T *x, int64_t k) {
  T square = 0;
  SUM(square) for (int64_t q = 0; q < k; q++) square += x[q] * x[q];
  return __builtin_sqrt(square);
}

/* leverages of atoms, and what follows from them; whether none is above its limit. out: see `Evaluator.judge` */
static int deviations(const Limits *l, const T *features, double *out) {
  const int64_t n = l->n, k = l->width, panels = (k + W - 1) / W * W * k;
  const T *forms = l->forms;
  T to[CHUNK * k], sum[k];
  int inside = 1;
  memset(sum, 0, sizeof sum);
  for (int64_t low = 0; low < n; low += CHUNK) {
    const int64_t rows = low + CHUNK < n ? CHUNK : n - low;
    const T *x = features + low * k;
    product(rows, k, k, x, k, 1, forms, 0, NULL, NULL, 0, to, k, 0);
    for (int64_t i = 0; i < rows; i++) {
      SIMD for (int64_t q = 0; q < k; q++) sum[q] += x[i * k + q];
      const double leverage = out[low + i] = length(to + i * k, k);
      const double force = l->beta * __builtin_pow(leverage, l->gamma);
      inside &= leverage <= l->leverage;
      for (int64_t q = 0; q < 3; q++) out[n + 1 + 3 * (low + i) + q] = force;
    }
  }
  product(1, k, k, sum, k, 1, forms + panels, 0, NULL, NULL, 0, to, k, 0);
  out[n] = l->alpha * length(to, k);
  return inside;
}

static int virial_inside(const Limits *l, const double *forces, const double *stress, const double *positions,
                         double volume) {
  double virial = 0;
  if (!stress && !positions) return 1;
  if (stress) virial = (stress[0] + stress[4] + stress[8]) * volume;
  else for (int64_t q = 0; q < 3 * l->n; q++) virial -= positions[q] * forces[q];
  virial /= l->n;
  return virial >= l->lowest_virial && virial <= l->highest_virial;
}

/* see `Evaluator.judge`: whether a structure is within its limits, all of it in one call; NaN is outside, and so are
   atoms without any neighbours among them, for which there are rules. stress and positions: one of them where there is a
   virial; volume: NaN where there is none; first: pairs of the atoms, and where the last
   ones end; newness: of `newness.c` with its arguments and results, or none; out: of deviations */
int watch(const Limits *l, const int64_t *first, const double *energy, const double *forces, const double *stress,
          const double *positions, double volume, const T *features, double *out, newness_function newness,
          const void *structure, const void *tables, int threads, const double *summary) {
  const int64_t n = l->n;
  const double *fewest = l->neighbors, *most = fewest + n;
  int inside = *energy >= l->lowest_energy && *energy <= l->highest_energy && !(volume < l->volume);
  inside &= first[n] > 0;
  for (int64_t i = 0; i < n; i++) inside &= first[i + 1] - first[i] >= fewest[i] && first[i + 1] - first[i] <= most[i];
  for (int64_t q = 0; forces && q < 3 * n; q++) inside &= __builtin_fabs(forces[q]) <= l->force;
  inside &= virial_inside(l, forces, stress, positions, volume);
  if (newness) { /* as `NoveltyCheck.knows` */
    newness(structure, tables, threads);
    inside &= summary[0] / l->largest <= 1 && summary[1] / l->mean <= 1 && summary[2] / l->most <= 1;
    inside &= summary[3] >= l->crowding && summary[4] == 0;
  }
  if (l->forms) inside &= deviations(l, features, out);
  return inside;
}
