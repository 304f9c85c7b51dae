/* Energy and forces of the atoms of an xyz file, by a potential as a library.

   ./example model.segnn atoms.xyz            of a molecule
   ./example model.segnn atoms.xyz LX LY LZ   of a periodic box with these edges, in Angstrom

   All pairs are looked at, which is fast enough for some thousand atoms: programs for more have lists of neighbours. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include "segnn.h"

typedef struct {
  int64_t *first, *senders, count, room;
  double *vectors;
} Pairs;

static void *checked(void *p) {
  if (!p) {
    fprintf(stderr, "there is no memory\n");
    exit(1);
  }
  return p;
}

static void add_pair(Pairs *p, int64_t sender, const double *r) {
  if (p->count == p->room) {
    p->room = 2 * p->room + 64;
    p->senders = checked(realloc(p->senders, (size_t)p->room * sizeof *p->senders));
    p->vectors = checked(realloc(p->vectors, 3 * (size_t)p->room * sizeof *p->vectors));
  }
  p->senders[p->count] = sender;
  for (int k = 0; k < 3; k++) p->vectors[3 * p->count + k] = r[k];
  p->count++;
}

/* Both directions of all pairs within the cutoff, images included; box: its edges, or 0 where it is not periodic */
static Pairs pairs_of(int64_t n, const double *x, const double *box, double cutoff) {
  Pairs p = {NULL, NULL, 0, 0, NULL};
  int images[3];
  p.first = checked(malloc((size_t)(n + 1) * sizeof *p.first));
  for (int k = 0; k < 3; k++) images[k] = box[k] > 0 ? (int)(cutoff / box[k]) + 1 : 0;
  for (int64_t i = 0; i < n; i++) {
    p.first[i] = p.count;
    for (int64_t j = 0; j < n; j++)
      for (int a = -images[0]; a <= images[0]; a++)
        for (int b = -images[1]; b <= images[1]; b++)
          for (int c = -images[2]; c <= images[2]; c++) {
            const int shift[3] = {a, b, c};
            double r[3], square = 0;
            if (i == j && !a && !b && !c) continue;
            for (int k = 0; k < 3; k++) {
              const double d = x[3 * j + k] - x[3 * i + k];
              r[k] = (box[k] > 0 ? d - box[k] * floor(d / box[k] + 0.5) : d) + shift[k] * box[k];
              square += r[k] * r[k];
            }
            if (square < cutoff * cutoff) add_pair(&p, j, r);
          }
  }
  p.first[n] = p.count;
  return p;
}

static double edge_of(const char *text) {
  char *end;
  const double x = strtod(text, &end);
  if (*end || end == text || !(x > 0 && x < 1e6)) {
    fprintf(stderr, "an edge of the box is %s; expected a length in Angstrom\n", text);
    exit(1);
  }
  return x;
}

static int64_t read_atoms(const char *path, const segnn *s, int **species, double **x) {
  char symbol[16], line[4096];
  long n = 0;
  FILE *file = fopen(path, "r");
  if (!file || !fgets(line, sizeof line, file) || sscanf(line, "%ld", &n) != 1 || n < 1 || n > 10000000 ||
      !fgets(line, sizeof line, file)) {
    fprintf(stderr, "%s is no xyz file\n", path);
    exit(1);
  }
  *species = checked(malloc((size_t)n * sizeof **species));
  *x = checked(malloc(3 * (size_t)n * sizeof **x));
  for (long i = 0; i < n; i++) {
    double *r = *x + 3 * i;
    if (!fgets(line, sizeof line, file) || sscanf(line, "%15s %lf %lf %lf", symbol, r, r + 1, r + 2) != 4) {
      fprintf(stderr, "%s ends before atom %ld\n", path, i);
      exit(1);
    }
    if (((*species)[i] = segnn_species(s, symbol)) < 0) {
      fprintf(stderr, "the potential does not know %s\n", symbol);
      exit(1);
    }
  }
  fclose(file);
  return n;
}

int main(int count, char **given) {
  char error[256];
  int *species;
  double *x, box[3] = {0, 0, 0}, energy, virial[9];
  if (count != 3 && count != 6) {
    fprintf(stderr, "usage: %s model.segnn atoms.xyz [LX LY LZ]\n", given[0]);
    return 1;
  }
  segnn *s = segnn_open(given[1], error, sizeof error);
  if (!s) {
    fprintf(stderr, "%s\n", error);
    return 1;
  }
  if (segnn_n_cues(s)) {
    fprintf(stderr, "this potential is told %s of each atom, of which this example knows nothing\n", segnn_cue(s, 0));
    segnn_close(s);
    return 1;
  }
  for (int k = 0; k < 3 && count == 6; k++) box[k] = edge_of(given[3 + k]);
  const int64_t n = read_atoms(given[2], s, &species, &x);
  Pairs p = pairs_of(n, x, box, segnn_cutoff(s));
  double *forces = checked(malloc(3 * (size_t)n * sizeof *forces));
  const int wrong = segnn_evaluate(s, n, species, p.first, p.senders, p.vectors, &energy, NULL, forces, virial, NULL);
  if (wrong) fprintf(stderr, "%s\n", segnn_message(s));
  else {
    printf("energy %.12g eV\n", energy);
    for (int64_t i = 0; i < n; i++)
      printf("%s %.12g %.12g %.12g\n", segnn_symbol(s, species[i]), forces[3 * i], forces[3 * i + 1], forces[3 * i + 2]);
    const int64_t outside = segnn_outside(s, forces, 0, NULL);
    if (outside > 0) printf("%lld atoms are outside of what the training data covered\n", (long long)outside);
  }
  free(x); free(species); free(forces); free(p.first); free(p.senders); free(p.vectors);
  segnn_close(s);
  return wrong ? 1 : 0;
}
