/* Fingerprints of atoms and the nearest landmarks, see `model/fingerprints.py` and `model/newness.py`.

   Behind `vectors.h` for float32, after what `newness.py` writes: RADIAL, LMAX, HARMONICS, MIXED, COMPONENTS, FOLDED,
   BLOCK, LANES, GROUP, HARMONICS_OF and DEGREES. */
#define UNROLL _Pragma("GCC unroll 16")
#define STRIP 2 /* vectors of landmarks that are compared with a group of atoms at a time */
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
  const float *rows, *structure_rows;
  const double *limits;
} Tables; /* bonds: squares of their lengths; counts: fewest and most of them; rows: as `at`, one landmark after the other;
             limits: of the newness of any atom, of their mean, and of the structure */
typedef struct { /* atoms and their pairs, sorted by receivers and within the cutoff */
  int64_t n, wide; /* whether vectors are in float64 */
  double cutoff;
  const void *vectors;
  const int64_t *first, *senders, *kind;
  int64_t *order, *bonds, *known; /* room: n + GROUP species, (n, species), n + species; known: the landmarks that the
                                     atoms, and the elements' means, were nearest to, -1 for none */
  float *y, *out; /* room: (n, COMPONENTS), 2 n + species */
  double *summary;
} Structure;
typedef float Row __attribute__((vector_size(4 * MIXED), may_alias));

typedef struct { /* pairs of one atom, side by side */
  int64_t n, kind[LANES];
  float r[3][LANES], harmonics[HARMONICS][LANES], radial[RADIAL][LANES];
} Pairs;

/* for `newness.py`: Python must see the same structures */
void layout(int64_t *out) {
  const int64_t found[] = {sizeof(Tables), sizeof(Structure), offsetof(Structure, summary)};
  memcpy(out, found, sizeof found);
}

/* what lies side by side for all pairs, pair by pair: numbers that were just stored one by one wait to be loaded */
static void turn(const float (*from)[LANES], float (*to)[HARMONICS], int64_t n) {
#if defined(__clang__)
  for (int64_t e = 0; e < n; e++)
    UNROLL for (int m = 0; m < HARMONICS; m++) to[e][m] = from[m][e];
#else
  for (int64_t e = 0; e < n; e += W)
    for (int m = 0; m < HARMONICS; m += W) {
      V x[W];
      UNROLL for (int k = 0; k < W; k++) x[k] = load(from[m + k] + e, W);
      UNROLL for (int step = 1; step < W; step *= 2) { /* blocks of step x step change places */
        I low, high;
        for (int k = 0; k < W; k++) {
          low[k] = k & step ? W + k - step : k;
          high[k] = k & step ? W + k : k + step;
        }
        UNROLL for (int k = 0; k < W; k++) {
          if (k & step) continue;
          const V a = x[k], b = x[k + step];
          x[k] = __builtin_shuffle(a, b, low);
          x[k + step] = __builtin_shuffle(a, b, high);
        }
      }
      UNROLL for (int k = 0; k < W; k++) store(to[e + k] + m, x[k], W);
    }
#endif
}

/* add to c (channels * RADIAL, HARMONICS) and to the crowding */
static void add_pairs(const Tables *t, float inverse_cutoff, Pairs *pairs, float *c, float *crowding) {
  V sum_of_envelopes = {0};
  for (int e = 0; e < LANES; e += W) {
    const V r0 = load(pairs->r[0] + e, W), r1 = load(pairs->r[1] + e, W), r2 = load(pairs->r[2] + e, W);
    const V d = root(at_least(r0 * r0 + r1 * r1 + r2 * r2, CLOSEST * CLOSEST)), inverse = 1 / d;
    const V x = d * inverse_cutoff, cube = x * x * x, twice = 4 * x - 2;
    V f[RADIAL], y[HARMONICS];
    f[0] = choose(x > 1, (V){0}, 1 - cube * cube * (28 + x * (-48 + 21 * x)));
    f[1] = 0.5f * twice * f[0];
    sum_of_envelopes += f[0];
    UNROLL for (int n = 2; n < RADIAL; n++) f[n] = twice * f[n - 1] - f[n - 2];
    HARMONICS_OF(r0 * inverse, r1 * inverse, r2 * inverse)
    UNROLL for (int n = 0; n < RADIAL; n++) store(pairs->radial[n] + e, f[n], W);
    UNROLL for (int m = 0; m < HARMONICS; m++) store(pairs->harmonics[m] + e, y[m], W);
  }
  *crowding += lanes(sum_of_envelopes);
  float y[LANES][HARMONICS];
  turn(pairs->harmonics, y, pairs->n);
  for (int64_t q = 0; q < t->channels; q++, c += RADIAL * HARMONICS) {
    V sum[RADIAL][HARMONICS / W];
    float weight[LANES];
    int64_t own[LANES], n_own = 0; /* pairs of this channel: most have one for each element */
    for (int64_t e = 0; e < pairs->n; e++) {
      weight[e] = t->weights[pairs->kind[e] * t->channels + q];
      own[n_own] = e;
      n_own += weight[e] != 0;
    }
    UNROLL for (int n = 0; n < RADIAL; n++)
      UNROLL for (int m = 0; m < HARMONICS / W; m++) sum[n][m] = load(c + n * HARMONICS + m * W, W);
    for (int64_t k = 0; k < n_own; k++) {
      const int64_t e = own[k];
      UNROLL for (int m = 0; m < HARMONICS / W; m++) {
        const V x = weight[e] * load(y[e] + m * W, W);
        UNROLL for (int n = 0; n < RADIAL; n++) sum[n][m] += pairs->radial[n][e] * x;
      }
    }
    UNROLL for (int n = 0; n < RADIAL; n++)
      UNROLL for (int m = 0; m < HARMONICS / W; m++) store(c + n * HARMONICS + m * W, sum[n][m], W);
  }
}

/* c of one atom, its bonds (n_species), and its crowding */
static float coefficients(const Structure *s, const Tables *t, int64_t i, float *c, int64_t *bonds) {
  const float *lengths = t->bonds + s->kind[i] * t->species, far = 2 * s->cutoff;
  const double *wide = s->wide ? s->vectors : NULL;
  const float *narrow = s->vectors;
  float crowding = 0;
  Pairs pairs;
  memset(c, 0, t->channels * RADIAL * HARMONICS * sizeof(float));
  memset(bonds, 0, t->species * sizeof(int64_t));
  for (int64_t e = s->first[i], last = s->first[i + 1]; e < last; e += LANES) {
    pairs.n = last - e < LANES ? last - e : LANES;
    for (int64_t q = 0; q < pairs.n; q++) {
      const int64_t k = pairs.kind[q] = s->kind[s->senders[e + q]];
      float square = 0;
      UNROLL for (int a = 0; a < 3; a++) {
        const float x = wide ? (float)wide[3 * (e + q) + a] : narrow[3 * (e + q) + a];
        pairs.r[a][q] = x;
        square += x * x;
      }
      bonds[k] += square < lengths[k];
    }
    for (int64_t q = pairs.n; q < LANES; q++) UNROLL for (int a = 0; a < 3; a++) pairs.r[a][q] = far;
    add_pairs(t, 1 / s->cutoff, &pairs, c, &crowding);
  }
  return crowding;
}

/* the power spectrum of an atom of element k without its mean, p (FOLDED): what is symmetric is there once */
static void spectrum(const Tables *t, int64_t k, const float *c, float *p) {
  static const int degree[] = DEGREES;
  const int64_t rows = t->channels * RADIAL;
  const float *mixing = t->mixing + k * (LMAX + 1) * rows * MIXED, *mean = t->mean + k * FOLDED;
  Row mixed[HARMONICS] = {{0}};
  for (int64_t q = 0; q < rows; q++)
    UNROLL for (int m = 0; m < HARMONICS; m++) {
      Row x;
      memcpy(&x, mixing + (degree[m] * rows + q) * MIXED, sizeof x);
      mixed[m] += c[q * HARMONICS + m] * x;
    }
  float each[HARMONICS][MIXED];
  memcpy(each, mixed, sizeof each);
  for (int a = 0; a < MIXED; a++) *p++ = each[0][a] - *mean++;
  for (int l = 0, m = 0; l <= LMAX; m += 2 * l + 1, l++) {
    float square[MIXED][MIXED];
    UNROLL for (int a = 0; a < MIXED; a++) {
      Row sum = {0};
      for (int q = m; q < m + 2 * l + 1; q++) sum += each[q][a] * mixed[q];
      sum *= 1.0f / (2 * l + 1);
      memcpy(square[a], &sum, sizeof sum);
    }
    for (int a = 0; a < MIXED; a++)
      for (int b = a; b < MIXED; b++) *p++ = square[a][b] - *mean++;
  }
}

/* fingerprints y (GROUP, COMPONENTS) of atoms of element k from their spectra */
static void project(const Tables *t, int64_t k, const float (*p)[FOLDED], float (*y)[COMPONENTS]) {
  const float *axes = t->axes + k * FOLDED * COMPONENTS;
  for (int a = 0; a < COMPONENTS; a += 2 * W) {
    V sum[GROUP][2] = {{{0}}};
    for (int64_t q = 0; q < FOLDED; q++)
      UNROLL for (int v = 0; v < 2; v++) {
        const V axis = load(axes + q * COMPONENTS + a + v * W, W);
        UNROLL for (int u = 0; u < GROUP; u++) sum[u][v] += p[u][q] * axis;
      }
    UNROLL for (int u = 0; u < GROUP; u++) UNROLL for (int v = 0; v < 2; v++) store(y[u] + a + v * W, sum[u][v], W);
  }
}

/* the smallest distance over width of each of R points y (R, size); points (n / BLOCK, size, BLOCK), closeness (n):
   1 / width^2 */
INLINE void nearest(const int R, const float *y, const int size, int64_t n, const float *points, const float *closeness,
                    float *out, int64_t *which) {
  V smallest[R], strip[R]; /* and the strip where it was found */
  UNROLL for (int u = 0; u < R; u++) smallest[u] = (V){0} + INFINITY, strip[u] = (V){0};
  for (int64_t b = 0; b < n; b += STRIP * W) {
    const float *at = points + b / BLOCK * BLOCK * size + b % BLOCK;
    V sum[R][STRIP];
    UNROLL for (int u = 0; u < R; u++) UNROLL for (int q = 0; q < STRIP; q++) sum[u][q] = (V){0};
    for (int a = 0; a < size; a++)
      UNROLL for (int q = 0; q < STRIP; q++) {
        const V point = load(at + a * BLOCK + q * W, W);
        UNROLL for (int u = 0; u < R; u++) {
          const V x = point - y[u * size + a];
          sum[u][q] += x * x;
        }
      }
    UNROLL for (int q = 0; q < STRIP; q++)
      UNROLL for (int u = 0; u < R; u++) {
        const V scaled = sum[u][q] * load(closeness + b + q * W, W);
        strip[u] = choose(scaled < smallest[u], (V){0} + (float)(b + q * W), strip[u]);
        smallest[u] = choose(scaled < smallest[u], scaled, smallest[u]);
      }
  }
  for (int u = 0; u < R; u++) {
    int lane = 0;
    for (int q = 1; q < W; q++) lane = smallest[u][q] < smallest[u][lane] ? q : lane;
    out[u] = __builtin_sqrtf(smallest[u][lane]); /* of NaN: infinite */
    which[u] = (int64_t)strip[u][lane] + lane;
  }
}

/* distance over width of y (size) from one landmark */
INLINE float distance(const float *y, const int size, const float *row, float closeness) {
  V sum = {0};
  for (int a = 0; a < size; a += W) {
    const V x = load(row + a, W) - load(y + a, W);
    sum += x * x;
  }
  const float square = lanes(sum) * closeness;
  return square >= 0 ? __builtin_sqrtf(square) : INFINITY;
}

/* the nearest landmark of up to GROUP atoms of one element; fewer end with -1 */
static void search(const Structure *s, const Tables *t, const int64_t *atoms) {
  float y[GROUP][COMPONENTS] = {{0}}, found[GROUP];
  int64_t which[GROUP];
  const int64_t row = s->kind[atoms[0]] * t->points;
  for (int u = 0; u < GROUP && atoms[u] >= 0; u++) memcpy(y[u], s->y + atoms[u] * COMPONENTS, sizeof y[u]);
  nearest(GROUP, y[0], COMPONENTS, t->points, t->at + row * COMPONENTS, t->closeness + row, found, which);
  for (int u = 0; u < GROUP && atoms[u] >= 0; u++) {
    s->out[atoms[u]] = found[u];
    s->known[atoms[u]] = which[u];
  }
}

/* fingerprints of up to GROUP atoms of one element, and how far they are from the landmarks that they are known by, or
   from the nearest; fewer end with -1 */
static void look_at(const Structure *s, const Tables *t, const int64_t *atoms) {
  float c[t->channels * RADIAL * HARMONICS], p[GROUP][FOLDED] = {{0}}, y[GROUP][COMPONENTS];
  const int64_t k = s->kind[atoms[0]], row = k * t->points;
  int all_known = 1;
  for (int u = 0; u < GROUP && atoms[u] >= 0; u++) {
    const int64_t i = atoms[u];
    s->out[s->n + i] = coefficients(s, t, i, c, s->bonds + i * t->species);
    spectrum(t, k, c, p[u]);
    all_known &= s->known[i] >= 0;
  }
  project(t, k, p, y);
  for (int u = 0; u < GROUP && atoms[u] >= 0; u++) {
    memcpy(s->y + atoms[u] * COMPONENTS, y[u], sizeof y[u]);
    const int64_t by = row + s->known[atoms[u]];
    if (all_known) s->out[atoms[u]] = distance(y[u], COMPONENTS, t->rows + by * COMPONENTS, t->closeness[by]);
  }
  if (!all_known) search(s, t, atoms);
}

/* mean and spread of the fingerprints of element k against those of structures; 0 without any such atom */
static float compare(const Structure *s, const Tables *t, int64_t k) {
  float summary[2 * COMPONENTS] = {0}, *mean = summary, *spread = summary + COMPONENTS, count = 0, found;
  int64_t *known = s->known + s->n + k;
  for (int64_t i = 0; i < s->n; i++) {
    if (s->kind[i] != k) continue;
    count++;
    SIMD for (int a = 0; a < COMPONENTS; a++) mean[a] += s->y[i * COMPONENTS + a];
  }
  if (!count) return 0;
  for (int a = 0; a < COMPONENTS; a++) mean[a] /= count;
  for (int64_t i = 0; i < s->n; i++) {
    if (s->kind[i] != k) continue;
    SIMD for (int a = 0; a < COMPONENTS; a++) {
      const float x = s->y[i * COMPONENTS + a] - mean[a];
      spread[a] += x * x;
    }
  }
  for (int a = 0; a < COMPONENTS; a++) spread[a] = SPREAD * logf(__builtin_sqrtf(spread[a] / count) + LEAST);
  const float scatter = t->fewest[k] > count ? __builtin_sqrtf(t->fewest[k] / count) : 1;
  const int64_t row = k * t->structures, by = row + *known;
  if (*known >= 0) {
    found = distance(summary, 2 * COMPONENTS, t->structure_rows + 2 * by * COMPONENTS, t->structure_closeness[by]);
    if (found / scatter <= t->limits[2]) return found / scatter;
  }
  nearest(1, summary, 2 * COMPONENTS, t->structures, t->structure_at + 2 * row * COMPONENTS,
          t->structure_closeness + row, &found, known);
  return found / scatter;
}

/* atoms of one element after the other, in groups that are filled up with -1: how many groups */
static int64_t grouped(const Structure *s, const Tables *t) {
  int64_t used = 0;
  for (int64_t k = 0; k < t->species; k++) {
    for (int64_t i = 0; i < s->n; i++)
      if (s->kind[i] == k) s->order[used++] = i;
    while (used % GROUP) s->order[used++] = -1;
  }
  return used / GROUP;
}

/* the largest and the mean newness of the atoms; whether both are within their limits */
static int within_limits(const Structure *s, const Tables *t) {
  double *largest = s->summary, *mean = largest + 1;
  *largest = *mean = 0;
  for (int64_t i = 0; i < s->n; i++) {
    if (!(s->out[i] <= *largest)) *largest = s->out[i];
    *mean += s->out[i];
  }
  *mean /= s->n;
  return *largest <= t->limits[0] && *mean <= t->limits[1];
}

/* out: newness and crowding of atoms (2, n), newness of elements of the structure; bonds (n, species); summary: largest
   and mean newness of atoms, largest of the structure, mean crowding, and how many numbers of bonds are others than
   before. What is known by a landmark has its distance from that one, which is no less than its newness, as long as that
   is within the limits. Pairs are sorted by their receivers, and within the cutoff */
void newness(const Structure *s, const Tables *t, int threads) {
  const int64_t n = s->n, groups = grouped(s, t);
  double *summary = s->summary;
  memset(summary, 0, 5 * sizeof(double));
  PARALLEL
  for (int64_t g = 0; g < groups; g++) look_at(s, t, s->order + g * GROUP);
  if (!within_limits(s, t)) {
    PARALLEL
    for (int64_t g = 0; g < groups; g++) search(s, t, s->order + g * GROUP);
    within_limits(s, t);
  }
  for (int64_t i = 0; i < n; i++) {
    const int64_t *counts = t->counts + 2 * s->kind[i] * t->species, *own = s->bonds + i * t->species;
    summary[3] += s->out[n + i];
    for (int64_t k = 0; k < t->species; k++) summary[4] += own[k] < counts[2 * k] || own[k] > counts[2 * k + 1];
  }
  summary[3] /= n;
  for (int64_t k = 0; k < t->species; k++) {
    const float found = s->out[2 * n + k] = compare(s, t, k);
    if (!(found <= summary[2])) summary[2] = found;
  }
}
