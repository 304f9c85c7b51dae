/* Fingerprints of atoms and the nearest landmarks, see `model/fingerprints.py` and `model/newness.py`.

   Behind `vectors.h` for float32, after what `newness.py` writes: RADIAL, LMAX, HARMONICS, MIXED, COMPONENTS, SPECTRUM, BLOCK, LANES, and
   HARMONICS_OF. */
#define UNROLL _Pragma("GCC unroll 16")
#define SUMS 4
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(threads) if (threads > 1)")
#define SIMD _Pragma("omp simd")
#else
#define PARALLEL
#define SIMD
#endif
typedef struct { /* of all elements, one behind the other */
  int64_t species, channels, points, structures; /* numbers of them, of the last two multiples of BLOCK */
  const float *weights, *mixing, *mean, *axes, *at, *closeness, *structure_at, *structure_closeness, *fewest, *bonds;
  const int64_t *counts;
} Tables; /* bonds: squares of their lengths; counts: fewest and most of them */
typedef struct {
  int64_t n, pairs;
  double cutoff;
  const double *positions, *cell, *shifts;
  const int64_t *receivers, *senders, *kind;
} Structure;

typedef struct { /* pairs of one atom, side by side */
  int64_t n, kind[LANES];
  float crowding, r[3][LANES], harmonics[HARMONICS][LANES], radial[RADIAL][LANES];
} Pairs;

/* add to c (channels * RADIAL, HARMONICS) */
static void add_pairs(const Tables *t, float inverse_cutoff, Pairs *pairs, float *c) {
  for (int e = 0; e < LANES; e += W) {
    const V r0 = load(pairs->r[0] + e, W), r1 = load(pairs->r[1] + e, W), r2 = load(pairs->r[2] + e, W);
    const V d = root(at_least(r0 * r0 + r1 * r1 + r2 * r2, CLOSEST * CLOSEST)), inverse = 1 / d;
    const V x = d * inverse_cutoff, cube = x * x * x, twice = 4 * x - 2;
    V f[RADIAL], y[HARMONICS];
    f[0] = 1 - cube * cube * (28 + x * (-48 + 21 * x));
    f[1] = 0.5f * twice * f[0];
    UNROLL for (int n = 2; n < RADIAL; n++) f[n] = twice * f[n - 1] - f[n - 2];
    HARMONICS_OF(r0 * inverse, r1 * inverse, r2 * inverse)
    UNROLL for (int n = 0; n < RADIAL; n++) store(pairs->radial[n] + e, f[n], W);
    UNROLL for (int m = 0; m < HARMONICS; m++) store(pairs->harmonics[m] + e, y[m], W);
  }
  float y[LANES][HARMONICS]; /* all before any is read: what was just stored cannot be loaded as a vector */
  for (int e = 0; e < LANES; e++)
    UNROLL for (int m = 0; m < HARMONICS; m++) y[e][m] = pairs->harmonics[m][e];
  for (int64_t e = 0; e < pairs->n; e++) pairs->crowding += pairs->radial[0][e];
  for (int64_t q = 0; q < t->channels; q++, c += RADIAL * HARMONICS) {
    V sum[RADIAL][HARMONICS / W];
    UNROLL for (int n = 0; n < RADIAL; n++)
      UNROLL for (int m = 0; m < HARMONICS / W; m++) sum[n][m] = load(c + n * HARMONICS + m * W, W);
    for (int64_t e = 0; e < pairs->n; e++) {
      const float w = t->weights[pairs->kind[e] * t->channels + q];
      UNROLL for (int m = 0; m < HARMONICS / W; m++) {
        const V x = w * load(y[e] + m * W, W);
        UNROLL for (int n = 0; n < RADIAL; n++) sum[n][m] += pairs->radial[n][e] * x;
      }
    }
    UNROLL for (int n = 0; n < RADIAL; n++)
      UNROLL for (int m = 0; m < HARMONICS / W; m++) store(c + n * HARMONICS + m * W, sum[n][m], W);
  }
  pairs->n = 0;
}

/* c of one atom, its bonds (n_species), and its crowding */
static float coefficients(const Structure *s, const Tables *t, int64_t i, int64_t first, int64_t last, float *c,
                          int64_t *bonds) {
  const double *h = s->cell, *r = s->positions, *x = s->shifts;
  const float *lengths = t->bonds + s->kind[i] * t->species;
  Pairs pairs = {0};
  memset(c, 0, t->channels * RADIAL * HARMONICS * sizeof(float));
  memset(bonds, 0, t->species * sizeof(int64_t));
  for (int64_t e = first; e < last; e++) {
    const int64_t j = s->senders[e];
    double v[3], square = 0;
    for (int k = 0; k < 3; k++) {
      v[k] = r[3 * j + k] - r[3 * i + k] + (x[3 * e] * h[k] + x[3 * e + 1] * h[3 + k] + x[3 * e + 2] * h[6 + k]);
      square += v[k] * v[k];
    }
    if (square >= s->cutoff * s->cutoff) continue;
    for (int k = 0; k < 3; k++) pairs.r[k][pairs.n] = v[k];
    bonds[s->kind[j]] += square < lengths[s->kind[j]];
    pairs.kind[pairs.n++] = s->kind[j];
    if (pairs.n == LANES) add_pairs(t, 1 / s->cutoff, &pairs, c);
  }
  if (pairs.n) add_pairs(t, 1 / s->cutoff, &pairs, c);
  return pairs.crowding;
}

/* the fingerprint (COMPONENTS) of an atom of element k */
static void fingerprint(const Tables *t, int64_t k, const float *c, float *out) {
  const int64_t rows = t->channels * RADIAL;
  float p[SPECTRUM] = {0};
  for (int l = 0, m = 0; l <= LMAX; l++)
    for (const int end = (l + 1) * (l + 1); m < end; m++) {
      const float *mixing = t->mixing + (k * (LMAX + 1) + l) * rows * MIXED;
      float mixed[MIXED] = {0}, *square = p + MIXED + l * MIXED * MIXED;
      for (int64_t q = 0; q < rows; q++)
        SIMD for (int a = 0; a < MIXED; a++) mixed[a] += mixing[q * MIXED + a] * c[q * HARMONICS + m];
      if (m == 0) memcpy(p, mixed, sizeof mixed);
      for (int a = 0; a < MIXED; a++) {
        const float factor = mixed[a] / (2 * l + 1);
        SIMD for (int b = 0; b < MIXED; b++) square[a * MIXED + b] += factor * mixed[b];
      }
    }
  const float *mean = t->mean + k * SPECTRUM, *axes = t->axes + k * SPECTRUM * COMPONENTS;
  V sum[SUMS][COMPONENTS / W] = {{{0}}}; /* several, as each addition waits for the one before */
  for (int64_t q = 0; q < SPECTRUM; q += SUMS, axes += SUMS * COMPONENTS)
    UNROLL for (int u = 0; u < SUMS; u++) {
      const float x = p[q + u] - mean[q + u];
      UNROLL for (int a = 0; a < COMPONENTS / W; a++) sum[u][a] += x * load(axes + u * COMPONENTS + a * W, W);
    }
  UNROLL for (int a = 0; a < COMPONENTS / W; a++) {
    V whole = sum[0][a];
    UNROLL for (int u = 1; u < SUMS; u++) whole += sum[u][a];
    store(out + a * W, whole, W);
  }
}

/* the smallest distance over width; y (size), points (size, n), closeness: 1 / width^2 */
INLINE float nearest(const float *y, const int size, int64_t n, const float *points, const float *closeness) {
  V smallest = (V){0} + INFINITY;
  for (int64_t b = 0; b < n; b += BLOCK) {
    V sum[BLOCK / W] = {{0}};
    for (int a = 0; a < size; a++)
      UNROLL for (int q = 0; q < BLOCK / W; q++) {
        const V x = load(points + a * n + b + q * W, W) - y[a];
        sum[q] += x * x;
      }
    UNROLL for (int q = 0; q < BLOCK / W; q++) {
      const V scaled = sum[q] * load(closeness + b + q * W, W);
      smallest = choose(scaled < smallest, scaled, smallest);
    }
  }
  float least = smallest[0];
  for (int q = 1; q < W; q++) least = smallest[q] < least ? smallest[q] : least;
  return __builtin_sqrtf(least); /* of NaN: infinite */
}

/* mean and spread of the fingerprints of element k against those of structures; 0 without any such atom */
static float compare(const Structure *s, const Tables *t, int64_t k, const float *y) {
  float summary[2 * COMPONENTS] = {0}, *mean = summary, *spread = summary + COMPONENTS, count = 0;
  for (int64_t i = 0; i < s->n; i++) {
    if (s->kind[i] != k) continue;
    count++;
    SIMD for (int a = 0; a < COMPONENTS; a++) mean[a] += y[i * COMPONENTS + a];
  }
  if (!count) return 0;
  for (int a = 0; a < COMPONENTS; a++) mean[a] /= count;
  for (int64_t i = 0; i < s->n; i++) {
    if (s->kind[i] != k) continue;
    SIMD for (int a = 0; a < COMPONENTS; a++) {
      const float x = y[i * COMPONENTS + a] - mean[a];
      spread[a] += x * x;
    }
  }
  for (int a = 0; a < COMPONENTS; a++) spread[a] = SPREAD * logf(__builtin_sqrtf(spread[a] / count) + LEAST);
  const float scatter = t->fewest[k] > count ? __builtin_sqrtf(t->fewest[k] / count) : 1;
  const int64_t row = k * t->structures;
  return nearest(summary, 2 * COMPONENTS, t->structures, t->structure_at + 2 * row * COMPONENTS,
                 t->structure_closeness + row) / scatter;
}

/* newness and crowding of atoms (2, n), newness of elements of the structure, and bonds (n, species); -1 for pairs that
   are not sorted. summary: largest and mean newness of atoms, largest of the structure, mean crowding, and how many
   numbers of bonds are others than before. Room: first for n + 1 numbers, y for n COMPONENTS */
int newness(const Structure *s, const Tables *t, int threads, int64_t *first, float *y, float *out, int64_t *bonds,
            double *summary) {
  int64_t at = 0, n = s->n;
  first[0] = 0;
  for (int64_t e = 0; e < s->pairs; e++) {
    if (s->receivers[e] < at) return -1;
    while (at < s->receivers[e]) first[++at] = e;
  }
  while (at < n) first[++at] = s->pairs;
  PARALLEL
  for (int64_t i = 0; i < n; i++) {
    float c[t->channels * RADIAL * HARMONICS], *own = y + i * COMPONENTS;
    const int64_t k = s->kind[i], row = k * t->points;
    out[n + i] = coefficients(s, t, i, first[i], first[i + 1], c, bonds + i * t->species);
    fingerprint(t, k, c, own);
    out[i] = nearest(own, COMPONENTS, t->points, t->at + row * COMPONENTS, t->closeness + row);
  }
  memset(summary, 0, 5 * sizeof(double));
  for (int64_t i = 0; i < n; i++) {
    const int64_t *counts = t->counts + 2 * s->kind[i] * t->species, *own = bonds + i * t->species;
    if (!(out[i] <= summary[0])) summary[0] = out[i];
    summary[1] += out[i] / n;
    summary[3] += out[n + i] / n;
    for (int64_t k = 0; k < t->species; k++) summary[4] += own[k] < counts[2 * k] || own[k] > counts[2 * k + 1];
  }
  for (int64_t k = 0; k < t->species; k++) {
    out[2 * n + k] = compare(s, t, k, y);
    if (!(out[2 * n + k] <= summary[2])) summary[2] = out[2 * n + k];
  }
  return 0;
}
