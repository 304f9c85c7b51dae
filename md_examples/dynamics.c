/* Velocity Verlet of a molecule, with a potential that segnn export wrote: no Python, no PyTorch.

   ./dynamics model.segnn molecule.txt STEPS TIMESTEP

   molecule.txt: the number of atoms, then of each its element, mass (amu), position (Angstrom) and velocity
   (Angstrom/fs); TIMESTEP in fs. Prints of each step the potential and the total energy in eV, at last the positions. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include "segnn.h"

#define MOST 256                       /* atoms: all pairs are given, and the library leaves the far ones out */
#define ACCELERATION 9.648533290732e-3 /* Angstrom/fs^2 of eV/Angstrom/amu, by the constants that ASE has */

static int n, species[MOST];
static double mass[MOST], x[MOST][3], v[MOST][3], forces[MOST][3];
static int64_t first[MOST + 1], senders[MOST * (MOST - 1)];
static double vectors[MOST * (MOST - 1)][3];

static void fail(const char *why) {
  fprintf(stderr, "%s\n", why);
  exit(1);
}

static void read_molecule(const char *path, const segnn *s) {
  char symbol[8];
  FILE *file = fopen(path, "r");
  if (!file || fscanf(file, "%d", &n) != 1 || n < 1 || n > MOST) fail("expected a file with 1 to 256 atoms");
  for (int i = 0; i < n; i++) {
    if (fscanf(file, "%7s %lf %lf %lf %lf %lf %lf %lf", symbol, mass + i, x[i], x[i] + 1, x[i] + 2, v[i], v[i] + 1,
               v[i] + 2) != 8)
      fail("expected element, mass, position and velocity of each atom");
    if ((species[i] = segnn_species(s, symbol)) < 0) fail("the potential does not know an element");
  }
  fclose(file);
}

/* Potential energy; forces are written */
static double evaluate(segnn *s) {
  double energy;
  int64_t pairs = 0;
  for (int i = 0; i < n; i++) {
    first[i] = pairs;
    for (int j = 0; j < n; j++) {
      if (i == j) continue;
      for (int k = 0; k < 3; k++) vectors[pairs][k] = x[j][k] - x[i][k];
      senders[pairs++] = j;
    }
  }
  first[n] = pairs;
  if (segnn_evaluate(s, n, species, first, senders, vectors[0], &energy, NULL, forces[0], NULL, NULL))
    fail(segnn_message(s));
  if (segnn_outside(s, forces[0], 0, NULL) > 0) fail("an atom is outside of what the training data covered");
  return energy;
}

static void kick(double time) {
  for (int i = 0; i < n; i++)
    for (int k = 0; k < 3; k++) v[i][k] += time * ACCELERATION * forces[i][k] / mass[i];
}

static double kinetic(void) {
  double energy = 0;
  for (int i = 0; i < n; i++)
    for (int k = 0; k < 3; k++) energy += 0.5 / ACCELERATION * mass[i] * v[i][k] * v[i][k];
  return energy;
}

int main(int count, char **given) {
  char error[256], *end;
  if (count != 5) fail("usage: dynamics model.segnn molecule.txt STEPS TIMESTEP");
  const long steps = strtol(given[3], &end, 10);
  if (*end || steps < 1) fail("expected a number of steps");
  const double dt = strtod(given[4], &end);
  if (*end || !(dt > 0)) fail("expected a time step above 0 fs");
  segnn *s = segnn_open(given[1], error, sizeof error);
  if (!s) fail(error);
  if (segnn_n_cues(s)) fail("this potential is told more of atoms than their elements");
  read_molecule(given[2], s);
  evaluate(s);
  for (long step = 1; step <= steps; step++) {
    kick(dt / 2);
    for (int i = 0; i < n; i++)
      for (int k = 0; k < 3; k++) x[i][k] += dt * v[i][k];
    const double energy = evaluate(s);
    kick(dt / 2);
    printf("%.12g %.12g\n", energy, energy + kinetic());
  }
  for (int i = 0; i < n; i++) printf("%.12g %.12g %.12g\n", x[i][0], x[i][1], x[i][2]);
  segnn_close(s);
  return 0;
}
