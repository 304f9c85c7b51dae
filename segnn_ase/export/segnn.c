/* The functions of segnn.h for one potential, whose network is in network.h: what `compiled/cpu_runtime.c` does there in
   the memory of PyTorch is done here in a memory of its own. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include "segnn.h"
#include "network.h"  /* first of all the declarations of the runtime */
#include "runtime.c"
#include "plan.h"

#define HEADROOM 1.15 /* of the memory, so that it does not grow at every step */
#define ALIGNED 64    /* bytes: a line of the cache */
#define CLOSEST 0.05  /* Angstrom: atoms that are closer are at one place */
#define HEADER 32     /* bytes: magic, key, length, checksum */

struct segnn {
  Numbers numbers;                 /* of the file */
  T *raw, *weights, *memory;       /* as in the file; in panels; rows */
  T *panels[N_PANELS + 1];
  char *content;
  int64_t room[3], n_threads;      /* rows of nodes, pairs and edges, and threads, that there is memory for */
  size_t rows[N_STORAGES];         /* of each storage */
  T *storage[N_STORAGES];
  Step *steps;
  Segment segments[N_SEGMENTS];
  T isolated[N_SPECIES];
  /* of the atoms */
  Graph graph;
  int64_t n_all, *first, *src, *knot, *kinds, n_first, n_edge_room, n_core, core_room;
  struct core { int64_t edge, i; double vector[3], energy; } *core; /* what is within a core */
  double *energies;
  int most_threads, begun, ran;
  char message[256];
};

static int failed(segnn *s, int code, const char *format, ...) {
  va_list given;
  va_start(given, format);
  vsnprintf(s->message, sizeof s->message, format, given);
  va_end(given);
  s->begun = s->ran = 0;
  return code;
}

int segnn_version(void) { return SEGNN_VERSION; }
const char *segnn_message(const segnn *s) { return s->message; }
double segnn_cutoff(const segnn *s) { (void)s; return CUTOFF; }
int segnn_n_species(const segnn *s) { (void)s; return N_SPECIES; }
int segnn_bytes(const segnn *s) { (void)s; return sizeof(T); }
int segnn_n_cues(const segnn *s) { (void)s; return N_CUES; }
int segnn_n_stages(const segnn *s) { (void)s; return N_STAGES; }

const char *segnn_symbol(const segnn *s, int k) {
  (void)s;
  return k >= 0 && k < N_SPECIES ? symbols[k] : NULL;
}

const char *segnn_cue(const segnn *s, int k) {
  (void)s;
  return k >= 0 && k < N_CUES ? cue_names[k] : NULL;
}

int segnn_species(const segnn *s, const char *symbol) {
  (void)s;
  for (int k = 0; symbol && k < N_SPECIES; k++)
    if (!strcmp(symbol, symbols[k])) return k;
  return -1;
}

int segnn_set_threads(segnn *s, int threads) {
  if (threads < 1) return failed(s, SEGNN_WRONG_ARGUMENT, "threads is %d; expected 1 or more", threads);
#ifdef _OPENMP
  s->most_threads = threads;
#endif
  return SEGNN_OK;
}

static uint32_t checksum(const unsigned char *x, size_t n) { /* CRC-32 as in zlib */
  uint32_t crc = 0xffffffffu;
  while (n--) {
    crc ^= *x++;
    for (int k = 0; k < 8; k++) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
  }
  return ~crc;
}

/* the content behind the header, or NULL and why */
static char *read_content(const char *path, char *error, size_t size) {
  char *content = NULL;
  unsigned char header[HEADER];
  uint64_t key, length;
  uint32_t sum;
  FILE *file = path ? fopen(path, "rb") : NULL;
  if (!file) {
    snprintf(error, size, "%s cannot be opened", path ? path : "NULL");
    return NULL;
  }
  if (fread(header, 1, HEADER, file) != HEADER || memcmp(header, MAGIC, 8)) {
    snprintf(error, size, "%s is no file of numbers of a potential, as segnn export writes them", path);
    goto end;
  }
  memcpy(&key, header + 8, 8); memcpy(&length, header + 16, 8); memcpy(&sum, header + 24, 4);
  if (key != KEY || length != sizeof(Numbers) + N_RAW * sizeof(T)) {
    snprintf(error, size, "%s belongs to another library: export the potential again, library and numbers", path);
    goto end;
  }
  content = malloc(length);
  if (!content) {
    snprintf(error, size, "there is no memory for %s", path);
    goto end;
  }
  if (fread(content, 1, length, file) != length || fgetc(file) != EOF ||
      checksum((unsigned char *)content, length) != sum) {
    snprintf(error, size, "%s is damaged: its checksum is another", path);
    free(content);
    content = NULL;
  }
end:
  fclose(file);
  return content;
}

static int64_t panel_length(const Panel *p) { return p->inner * ((p->outer + W - 1) / W) * W; }
static int64_t padded(int64_t n) { return (1 + (n + ALIGNED - 1) / ALIGNED) * ALIGNED; }

static void *aligned(size_t numbers) {
  const size_t bytes = (numbers * sizeof(T) / ALIGNED + 2) * ALIGNED;
  void *p = aligned_alloc(ALIGNED, bytes);
  if (p) memset(p, 0, bytes);
  return p;
}

static int pack_weights(segnn *s) {
  int64_t length = 0;
  for (int k = 0; k < N_PANELS; k++) length += padded(panel_length(panels + k));
  T *at = s->weights = aligned(length);
  if (!at) return 0;
  for (int k = 0; k < N_PANELS; k++) {
    const Panel *p = panels + k;
    s->panels[k] = at;
    pack(p->inner, p->outer, s->raw + p->raw, p->transposed ? 1 : p->outer, p->transposed ? p->inner : 1, p->scale, at);
    at += padded(panel_length(p));
  }
  return 1;
}

static void set_steps(segnn *s) {
  Step *step = s->steps;
  for (int k = 0; k < N_SEGMENTS; k++) {
    const PlannedSegment *segment = planned_segments + k;
    s->segments[k] = (Segment){segment->where, segment->summed, segment->n_steps, step};
    for (int64_t n = 0; n < segment->n_steps; n++, step++) {
      const PlannedStep *p = planned_steps + (step - s->steps);
      *step = (Step){.op = p->op, .function = (void *)p->function, .n_in = p->n_in, .n_out = p->n_out, .rows = p->rows,
                     .inner = p->inner, .outer = p->outer, .a_stride = p->a_stride, .d_stride = p->d_stride,
                     .c_stride = p->c_stride, .add = p->add};
      for (int64_t q = 0; q < p->n_in + p->n_out; q++) {
        const PlannedSlot *x = planned_slots + p->first_slot + q;
        Slot *to = step->slots + q;
        if (x->of == IN_PANELS) *to = (Slot){.base = s->panels[x->number]};
        else if (x->of == AS_IT_IS) *to = (Slot){.base = s->raw + x->number};
        else if (x->of == IN_STORAGE)
          *to = (Slot){s->storage[x->number] + x->offset, storages[x->number].size, x->memory, x->where, x->clear};
        else *to = (Slot){0};
      }
    }
  }
}

/* memory for so many atoms, edges and threads */
static int reserve(segnn *s, int64_t nodes, int64_t edges, int64_t threads) {
  if (nodes <= s->room[0] && edges <= s->room[EDGE] && threads <= s->n_threads) return 1;
  if (nodes > s->room[0]) s->room[0] = 1 + (int64_t)(HEADROOM * nodes);
  if (edges > s->room[EDGE]) s->room[EDGE] = 1 + (int64_t)(HEADROOM * edges);
  if (threads > s->n_threads) s->n_threads = threads;
  size_t length = 0;
  for (int k = 0; k < N_STORAGES; k++) {
    const Storage *x = storages + k;
    const int64_t rows = x->where == SCRATCHED ? s->n_threads * CHUNK : s->room[x->where];
    s->rows[k] = rows * (x->is_private ? s->n_threads : 1);
    length += padded(s->rows[k] * x->size);
  }
  free(s->memory);
  T *at = s->memory = aligned(length);
  if (!at) {
    memset(s->storage, 0, sizeof s->storage);
    memset(s->room, 0, sizeof s->room);
    s->n_threads = 0;
    return 0;
  }
  for (int k = 0; k < N_STORAGES; k++) {
    s->storage[k] = at;
    at += padded(s->rows[k] * storages[k].size);
  }
  set_steps(s);
  return 1;
}

static int more(void **p, int64_t bytes) { /* room for them; what was there is kept */
  void *found = realloc(*p, bytes > 0 ? bytes : 1);
  if (!found) return 0;
  *p = found;
  return 1;
}
#define MORE(p, count) more((void **)&(p), (int64_t)(count) * (int64_t)sizeof *(p))

/* room in the lists of atoms and edges */
static int make_lists(segnn *s, int64_t n_all, int64_t edges) {
  if (n_all + 1 > s->n_first) {
    const int64_t rows = 1 + (int64_t)(HEADROOM * (n_all + 1));
    s->n_first = 0;
    if (!MORE(s->first, rows) || !MORE(s->kinds, rows) || !MORE(s->energies, rows)) return 0;
    s->n_first = rows;
  }
  if (edges > s->n_edge_room) {
    const int64_t rows = 1 + (int64_t)(HEADROOM * edges);
    s->n_edge_room = 0;
    if (!MORE(s->src, rows) || !MORE(s->knot, rows)) return 0;
    s->n_edge_room = rows;
  }
  return reserve(s, n_all, edges, s->graph.threads);
}

segnn *segnn_open(const char *path, char *error, size_t size) {
  char none[1];
  if (!error || !size) error = none, size = sizeof none;
  error[0] = 0;
  char *content = read_content(path, error, size);
  if (!content) return NULL;
  segnn *s = calloc(1, sizeof *s);
  if (s) {
    s->content = content;
    memcpy(&s->numbers, content, sizeof s->numbers);
    s->raw = aligned(N_RAW);
    s->steps = calloc(N_STEPS, sizeof *s->steps);
    s->most_threads = s->graph.threads = 1;
  } else
    free(content);
  if (!s || !s->raw || !s->steps) goto fail;
  memcpy(s->raw, content + sizeof s->numbers, N_RAW * sizeof(T));
  free(s->content);
  s->content = NULL;
  if (!pack_weights(s)) goto fail;
  /* epsilon of an atom of each species without neighbours: such an atom then has exactly E0 */
  int species[N_SPECIES];
  int64_t alone[N_SPECIES + 1] = {0};
  for (int k = 0; k < N_SPECIES; k++) species[k] = k;
  if (segnn_begin(s, N_SPECIES, N_SPECIES, species, alone, NULL, NULL)) goto fail;
  for (int k = 0; k < N_STAGES; k++) segnn_run(s, k);
  memcpy(s->isolated, s->storage[EPSILON], sizeof s->isolated);
  s->begun = s->ran = 0;
  return s;
fail:
  snprintf(error, size, "there is no memory for the potential of %s", path);
  segnn_close(s);
  return NULL;
}

void segnn_close(segnn *s) {
  if (!s) return;
  void *all[] = {s->content, s->raw, s->weights, s->memory, s->steps, s->first, s->src, s->knot, s->kinds,
                 s->core, s->energies};
  for (size_t k = 0; k < sizeof all / sizeof *all; k++) free(all[k]);
  free(s);
}

/* Repulsion of a pair within its core radius, half of which the receiver has, and the network sees the pair further
   apart: `model/repulsion.py` has the formulas. Returns the factor of the vector that is seen; slope: of that */
static double seen_from(double d, double radius, double *slope) {
  const double width = CORE_BLUR * radius, y = fmin(fmax((radius - d) / width, 0), 1), y3 = y * y * y;
  const double seen = fmax(d, radius - width) + width * y3 * y * (2.5 - 3 * y + y * y);
  const double rise = y < 1 ? 1 - y3 * (10 - 15 * y + 6 * y * y) : 0;
  *slope = rise / d - seen / (d * d);
  return seen / d;
}

static double repulsion(double d, double radius, double zi, double zj, double *slope) {
  static const double c[] = {0.18175, 0.50986, 0.28022, 0.02817}, b[] = {3.19980, 0.94229, 0.40290, 0.20162};
  const double a = (pow(zi, 0.23) + pow(zj, 0.23)) / 0.46850, width = CORE_SWITCH * radius;
  double phi = 0, fall = 0;
  for (int k = 0; k < 4; k++) {
    const double part = c[k] * exp(-b[k] * a * d);
    phi += part;
    fall -= b[k] * a * part;
  }
  const double y = fmin(fmax((radius - d) / width, 0), 1), on = y * y * y * (10 - 15 * y + 6 * y * y);
  const double rise = y > 0 && y < 1 ? -30 * y * y * (1 - y) * (1 - y) / width : 0, v = COULOMB * zi * zj / d;
  *slope = v * (fall * on + phi * rise - phi * on / d);
  return v * phi * on;
}

static int add_core(segnn *s, int64_t edge, int64_t i, const double *r) {
  if (s->n_core == s->core_room) {
    const int64_t room = 16 + 2 * s->core_room;
    if (!MORE(s->core, room)) return 0;
    s->core_room = room;
  }
  s->core[s->n_core++] = (struct core){edge, i, {r[0], r[1], r[2]}, 0};
  return 1;
}

/* the pairs within the cutoff, and what is in a core */
static int place(segnn *s, const int *species, const int64_t *first, const int64_t *senders, const double *vectors,
                 int64_t most) {
  Graph *g = &s->graph;
  T *to = s->storage[VECTORS];
  int64_t kept = 0;
  s->n_core = 0;
  for (int64_t i = 0; i < g->n; i++) {
    s->first[i] = kept;
    for (int64_t e = first[i]; e < first[i + 1]; e++) {
      const double *r = vectors + 3 * e, square = r[0] * r[0] + r[1] * r[1] + r[2] * r[2];
      if (square >= CUTOFF * CUTOFF || kept == most) continue; /* most: as counted before, which may round otherwise */
      const int64_t j = senders[e];
      double d = sqrt(square), factor = 1, slope;
      const double radius = s->numbers.core[species[i]][species[j]];
      if (REPELS && d < radius) {
        if (!add_core(s, kept, i, r)) return 0;
        factor = seen_from(d, radius, &slope);
        d *= factor;
      }
      const double knot = d / KNOT_DISTANCE;
      s->src[kept] = j;
      s->knot[kept] = knot < LAST_KNOT ? (int64_t)knot : LAST_KNOT;
      for (int k = 0; k < 3; k++) to[3 * kept + k] = factor * r[k];
      kept++;
    }
  }
  s->first[g->n] = g->n_edges = kept;
  return 1;
}

static int wrong_atoms(segnn *s, int64_t n, int64_t n_all, const int *species, const int64_t *first,
                       const int64_t *senders, const double *vectors) {
  if (n < 0 || n_all < n) return failed(s, SEGNN_WRONG_ARGUMENT, "n is %lld of n_all %lld atoms; expected 0 or more, and "
                                        "as many or fewer", (long long)n, (long long)n_all);
  if ((n_all && !species) || !first) return failed(s, SEGNN_WRONG_ARGUMENT, "species or first is NULL");
  if (first[0]) return failed(s, SEGNN_WRONG_ARGUMENT, "first[0] is %lld; expected 0", (long long)first[0]);
  for (int64_t i = 0; i < n_all; i++)
    if (species[i] < 0 || species[i] >= N_SPECIES)
      return failed(s, SEGNN_WRONG_ARGUMENT, "species of atom %lld is %d; expected 0 to %d", (long long)i, species[i],
                    N_SPECIES - 1);
  for (int64_t i = 0; i < n; i++)
    if (first[i + 1] < first[i])
      return failed(s, SEGNN_WRONG_ARGUMENT, "first falls behind atom %lld; expected pairs in order", (long long)i);
  if (first[n] && (!senders || !vectors)) return failed(s, SEGNN_WRONG_ARGUMENT, "senders or vectors is NULL");
  for (int64_t e = 0; e < first[n]; e++) {
    if (senders[e] < 0 || senders[e] >= n_all)
      return failed(s, SEGNN_WRONG_ARGUMENT, "the sender of pair %lld is %lld; expected 0 to %lld", (long long)e,
                    (long long)senders[e], (long long)n_all - 1);
    if (!isfinite(vectors[3 * e]) || !isfinite(vectors[3 * e + 1]) || !isfinite(vectors[3 * e + 2]))
      return failed(s, SEGNN_NOT_FINITE, "the vector of pair %lld is not finite", (long long)e);
    const double *r = vectors + 3 * e;
    if (r[0] * r[0] + r[1] * r[1] + r[2] * r[2] < CLOSEST * CLOSEST)
      return failed(s, SEGNN_WRONG_ARGUMENT, "pair %lld has its atoms at one place: they are closer than %g Angstrom",
                    (long long)e, CLOSEST);
  }
  return SEGNN_OK;
}

int segnn_begin(segnn *s, int64_t n, int64_t n_all, const int *species, const int64_t *first, const int64_t *senders,
                const double *vectors) {
  Graph *g = &s->graph;
  int64_t n_pairs = 0;
  int wrong = wrong_atoms(s, n, n_all, species, first, senders, vectors);
  if (wrong) return wrong;
  for (int64_t e = 0; e < first[n]; e++) {
    const double *r = vectors + 3 * e;
    n_pairs += r[0] * r[0] + r[1] * r[1] + r[2] * r[2] < CUTOFF * CUTOFF;
  }
  g->n = n;
  s->n_all = n_all;
  g->threads = 1 + n_pairs / EDGES_PER_THREAD;
  if (g->threads > s->most_threads) g->threads = s->most_threads;
  if (!make_lists(s, n_all, n_pairs)) return failed(s, SEGNN_NO_MEMORY, "there is no memory for %lld atoms",
                                                       (long long)n_all);
  for (int64_t i = 0; i < n_all; i++) s->kinds[i] = species[i];
  if (!place(s, species, first, senders, vectors, n_pairs)) return failed(s, SEGNN_NO_MEMORY, "there is no memory for pairs");
  g->first = s->first; g->src = s->src; g->knot = s->knot; g->kind = s->kinds;
  g->vectors = s->storage[VECTORS]; g->gradient = s->storage[GRADIENT]; g->epsilon = s->storage[EPSILON];
  g->features = s->storage[FEATURES]; g->weight = s->storage[WEIGHTS];
  T *weight = g->weight;
  for (int64_t i = 0; i < n; i++) weight[i] = s->numbers.scale[species[i]];
  if (N_CUES) memset(s->storage[CUES], 0, n_all * N_CUES * sizeof(T));
  s->begun = 1;
  s->ran = 0;
  s->message[0] = 0;
  return SEGNN_OK;
}

int segnn_tell(segnn *s, const double *cues) {
  if (!s->begun || s->ran) return failed(s, SEGNN_WRONG_ARGUMENT, "segnn_tell is called; expected segnn_begin before");
  T *to = s->storage[CUES];
  for (int64_t k = 0; k < s->n_all * N_CUES; k++) { /* N_CUES is not 0 here */
    if (!isfinite(cues[k])) return failed(s, SEGNN_NOT_FINITE, "a cue of atom %lld is not finite", (long long)(k / N_CUES));
    to[k] = (cues[k] - cue_zeros[k % N_CUES]) / cue_units[k % N_CUES];
  }
  return SEGNN_OK;
}

static int wrong_stage(segnn *s, int stage) {
  return stage >= 0 && stage < N_STAGES ? 0 : failed(s, SEGNN_WRONG_ARGUMENT, "stage is %d; expected 0 to %d", stage,
                                                     N_STAGES - 1);
}

int segnn_run(segnn *s, int stage) {
  if (wrong_stage(s, stage)) return SEGNN_WRONG_ARGUMENT;
  if (!s->begun || s->ran != stage)
    return failed(s, SEGNN_WRONG_ARGUMENT, "stage %d is run; expected segnn_begin, and then all stages in order", stage);
  const Stage *p = stages + stage;
  if (p->direction == SEGNN_REVERSE) /* what comes back starts from zero */
    for (int k = 0; k < p->n_exchanged; k++) {
      const int x = exchanged[p->first_exchanged + k];
      memset(s->storage[x] + s->graph.n * storages[x].size, 0, (s->n_all - s->graph.n) * storages[x].size * sizeof(T));
    }
  run_parted(&s->graph, s->segments + p->first_segment, p->n_segments, s->n_all);
  s->ran++;
  return SEGNN_OK;
}

int segnn_exchange(const segnn *s, int stage, size_t *bytes) {
  size_t found = 0;
  if (stage < 0 || stage >= N_STAGES) return SEGNN_NO_EXCHANGE;
  const Stage *p = stages + stage;
  for (int k = 0; k < p->n_exchanged; k++) found += storages[exchanged[p->first_exchanged + k]].size * sizeof(T);
  if (bytes) *bytes = found;
  (void)s;
  return p->direction;
}

/* whether rows can be exchanged behind a stage */
static int wrong_exchange(segnn *s, int stage, int64_t count, const int *atoms) {
  if (wrong_stage(s, stage)) return SEGNN_WRONG_ARGUMENT;
  if (!s->begun || s->ran != stage + 1)
    return failed(s, SEGNN_WRONG_ARGUMENT, "atoms are exchanged behind stage %d; expected it to be the last that ran", stage);
  for (int64_t n = 0; n < count; n++)
    if (atoms[n] < 0 || atoms[n] >= s->n_all)
      return failed(s, SEGNN_WRONG_ARGUMENT, "atom %d is exchanged; expected 0 to %lld", atoms[n], (long long)s->n_all - 1);
  return SEGNN_OK;
}

int segnn_get(segnn *s, int stage, int64_t count, const int *atoms, void *buffer) {
  if (wrong_exchange(s, stage, count, atoms)) return SEGNN_WRONG_ARGUMENT;
  const Stage *p = stages + stage;
  char *to = buffer;
  for (int64_t n = 0; n < count; n++)
    for (int k = 0; k < p->n_exchanged; k++) {
      const int x = exchanged[p->first_exchanged + k];
      const size_t size = storages[x].size * sizeof(T);
      memcpy(to, s->storage[x] + atoms[n] * storages[x].size, size);
      to += size;
    }
  return SEGNN_OK;
}

int segnn_put(segnn *s, int stage, int64_t count, const int *atoms, const void *buffer) {
  if (wrong_exchange(s, stage, count, atoms)) return SEGNN_WRONG_ARGUMENT;
  const Stage *p = stages + stage;
  const char *from = buffer;
  for (int64_t n = 0; n < count; n++)
    for (int k = 0; k < p->n_exchanged; k++) {
      const int x = exchanged[p->first_exchanged + k];
      const int64_t size = storages[x].size;
      T *to = s->storage[x] + atoms[n] * size;
      if (p->direction == SEGNN_FORWARD) memcpy(to, from, size * sizeof(T));
      else
        for (int64_t q = 0; q < size; q++) {
          T one;
          memcpy(&one, from + q * sizeof(T), sizeof one);
          to[q] += one;
        }
      from += size * sizeof(T);
    }
  return SEGNN_OK;
}

/* the gradient with respect to the true vectors of what is in a core, and its repulsion */
static void take_core(segnn *s) {
  T *vectors = s->graph.vectors, *gradient = s->graph.gradient;
  for (int64_t n = 0; n < s->n_core; n++) {
    struct core *c = s->core + n;
    const int64_t i = s->kinds[c->i], j = s->kinds[s->src[c->edge]];
    const double *r = c->vector, radius = s->numbers.core[i][j];
    const double d = sqrt(r[0] * r[0] + r[1] * r[1] + r[2] * r[2]);
    double slope, rise, dot = 0;
    const double factor = seen_from(d, radius, &slope);
    c->energy = 0.5 * repulsion(d, radius, atomic_numbers[i], atomic_numbers[j], &rise);
    for (int k = 0; k < 3; k++) dot += gradient[3 * c->edge + k] * r[k];
    for (int k = 0; k < 3; k++) {
      gradient[3 * c->edge + k] = factor * gradient[3 * c->edge + k] + (dot * slope + 0.5 * rise) * r[k] / d;
      vectors[3 * c->edge + k] = r[k];
    }
  }
}

static void collect(segnn *s, double *forces, double *virial, double *virials) {
  const Graph *g = &s->graph;
  const T *gradient = g->gradient, *vectors = g->vectors;
  if (forces) memset(forces, 0, 3 * s->n_all * sizeof *forces);
  if (virial) memset(virial, 0, 9 * sizeof *virial);
  for (int64_t i = 0; i < g->n; i++) {
    double own[9] = {0};
    for (int64_t e = s->first[i]; e < s->first[i + 1]; e++) {
      const T *of = gradient + 3 * e, *r = vectors + 3 * e;
      for (int k = 0; k < 3; k++) {
        if (forces) {
          forces[3 * i + k] += of[k];
          forces[3 * s->src[e] + k] -= of[k];
        }
        for (int q = 0; q < 3; q++) own[3 * q + k] -= (double)r[q] * of[k];
      }
    }
    for (int k = 0; k < 9 && virial; k++) virial[k] += own[k];
    if (virials) memcpy(virials + 9 * i, own, sizeof own);
  }
}

int segnn_finish(segnn *s, double *energy, double *energies, double *forces, double *virial, double *virials) {
  const Graph *g = &s->graph;
  if (!s->begun || s->ran != N_STAGES)
    return failed(s, SEGNN_WRONG_ARGUMENT, "segnn_finish is called; expected all stages before");
  const T *epsilon = g->epsilon;
  take_core(s);
  double sum = 0;
  for (int64_t i = 0; i < g->n; i++) {
    const int64_t kind = s->kinds[i];
    const T above = epsilon[i] - s->isolated[kind];
    s->energies[i] = s->numbers.reference[kind] + s->numbers.scale[kind] * (double)above;
  }
  for (int64_t n = 0; n < s->n_core; n++) s->energies[s->core[n].i] += s->core[n].energy;
  for (int64_t i = 0; i < g->n; i++) sum += s->energies[i];
  collect(s, forces, virial, virials);
  s->begun = 0;
  if (!isfinite(sum)) return failed(s, SEGNN_NOT_FINITE, "the energy is not finite");
  if (energies) memcpy(energies, s->energies, g->n * sizeof *energies);
  if (energy) *energy = sum;
  return SEGNN_OK;
}

int segnn_evaluate(segnn *s, int64_t n, const int *species, const int64_t *first, const int64_t *senders,
                   const double *vectors, double *energy, double *energies, double *forces, double *virial,
                   double *virials) {
  int wrong = segnn_begin(s, n, n, species, first, senders, vectors);
  for (int k = 0; k < N_STAGES && !wrong; k++) wrong = segnn_run(s, k);
  return wrong ? wrong : segnn_finish(s, energy, energies, forces, virial, virials);
}

int64_t segnn_outside(segnn *s, const double *forces, int elsewhere, int *flags) {
  const Numbers *x = &s->numbers;
  const T *features = s->graph.features, *vectors = s->graph.vectors;
  int64_t outside = 0;
  if (!HAS_DOMAIN || s->ran != N_STAGES) return -1;
  for (int64_t i = 0; i < s->graph.n; i++) {
    const int64_t kind = s->kinds[i], count = s->first[i + 1] - s->first[i];
    int found = count < x->neighbors[0][kind] || count > x->neighbors[1][kind] ? SEGNN_CROWD : 0;
    for (int64_t e = s->first[i]; e < s->first[i + 1]; e++) {
      const double r0 = vectors[3 * e], r1 = vectors[3 * e + 1], r2 = vectors[3 * e + 2];
      const double least = x->closest[kind][s->kinds[s->src[e]]];
      if (r0 * r0 + r1 * r1 + r2 * r2 < least * least) found |= SEGNN_CLOSE;
    }
    double square = 0;
    for (int64_t q = 0; q < HAS_FORM * WIDTH; q++) {
      double sum = 0;
      for (int64_t k = 0; k < WIDTH; k++) sum += features[i * WIDTH + k] * x->form[k * HAS_FORM][q];
      square += sum * sum;
    }
    if (!(sqrt(square) <= x->leverage)) found |= SEGNN_NEW;
    for (int k = 0; k < 3 && forces; k++)
      if (!(fabs(forces[3 * i + k]) <= x->force)) found |= SEGNN_FORCE;
    if (ALONE_IS_INSIDE && !elsewhere && !s->graph.n_edges) found = 0; /* all are alone */
    if (flags) flags[i] = found;
    outside += found != 0;
  }
  return outside;
}
