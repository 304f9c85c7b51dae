/* A SEGNN potential as a C library, written by `segnn export`: energies, forces and virials of atoms whose pairs are
   given, without Python or PyTorch. MIT licence, as segnn_ase.

   Units are eV and Å. A handle is for one thread at a time; any number of handles may be used side by side. Functions
   that evaluate or take something give 0 (SEGNN_OK), or what went wrong, of which segnn_message tells; an evaluation
   that was going on is then over.

   All in one call, for the atoms of one process: segnn_evaluate. In pieces, where atoms are parted among processes:
   segnn_begin with the own atoms first and behind them those of others (ghosts) that are within the cutoff of an own
   one; then for each stage segnn_run and what segnn_exchange asks for; then segnn_finish. */
#ifndef SEGNN_H
#define SEGNN_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SEGNN_API __attribute__((visibility("default")))
#else
#define SEGNN_API
#endif

#define SEGNN_VERSION 1 /* of these functions */
typedef struct segnn segnn;

enum { SEGNN_OK = 0, SEGNN_NO_MEMORY = 1, SEGNN_WRONG_ARGUMENT = 2, SEGNN_NOT_FINITE = 3 };
enum { SEGNN_NO_EXCHANGE = 0, SEGNN_FORWARD = 1, SEGNN_REVERSE = 2 };
enum { SEGNN_CLOSE = 1, SEGNN_CROWD = 2, SEGNN_NEW = 4, SEGNN_FORCE = 8 }; /* flags of segnn_outside */

SEGNN_API int segnn_version(void); /* SEGNN_VERSION of the library */

/* Open the file of numbers that was exported with this library. NULL where it cannot be used: then `error`, which has
   room for `size` characters, says why. */
SEGNN_API segnn *segnn_open(const char *path, char *error, size_t size);
SEGNN_API void segnn_close(segnn *s); /* NULL is allowed */
SEGNN_API const char *segnn_message(const segnn *s); /* of what went wrong last, until the next call */

SEGNN_API double segnn_cutoff(const segnn *s);               /* Å */
SEGNN_API int segnn_n_species(const segnn *s);
SEGNN_API const char *segnn_symbol(const segnn *s, int species); /* such as "Si"; NULL beyond the last */
SEGNN_API int segnn_species(const segnn *s, const char *symbol); /* -1 for an element that it does not know */
SEGNN_API int segnn_bytes(const segnn *s);                   /* of a number in the network: 4 or 8 */
SEGNN_API int segnn_n_cues(const segnn *s);                  /* numbers that it is told of each atom; 0 without cues */
SEGNN_API const char *segnn_cue(const segnn *s, int k);      /* what number k is, such as "initial_charges" */
SEGNN_API int segnn_set_threads(segnn *s, int threads);      /* at most so many, where there is OpenMP; 1 at first */

/* Energy, and what is not NULL of: energies of the atoms (n), forces (n, 3), virial of all (3, 3), and of each atom (n,
   3, 3), whose sum that is: -sum_j r_ij dE/dr_ij for the receiver i.
   species (n): numbers as of segnn_species. Pairs in order of their receivers i: those of atom i are first[i] ...
   first[i + 1] - 1, with senders (0 ... n - 1; the atom whose image it is) and vectors r_ij from i to j (pairs, 3);
   both directions of each pair; those beyond the cutoff are left out here. Atoms are told nothing: see segnn_tell. */
SEGNN_API int segnn_evaluate(segnn *s, int64_t n, const int *species, const int64_t *first, const int64_t *senders,
                             const double *vectors, double *energy, double *energies, double *forces, double *virial,
                             double *virials);

/* The same in pieces. n own atoms, n_all with those of others; species (n_all); senders are 0 ... n_all - 1. */
SEGNN_API int segnn_begin(segnn *s, int64_t n, int64_t n_all, const int *species, const int64_t *first,
                          const int64_t *senders, const double *vectors);
/* What it is told of the atoms, (n_all, segnn_n_cues), called behind segnn_begin. Where this is not called nothing is
   told: charges, moments and the total charge are 0, a multiplicity is 1. */
SEGNN_API int segnn_tell(segnn *s, const double *cues);
SEGNN_API int segnn_n_stages(const segnn *s);
SEGNN_API int segnn_run(segnn *s, int stage);
/* What is to be done behind a stage. FORWARD: what segnn_get takes from own atoms goes to their ghosts, by segnn_put.
   REVERSE: what segnn_get takes from ghosts goes to the atoms that they are copies of, where segnn_put adds it.
   bytes: of an atom. */
SEGNN_API int segnn_exchange(const segnn *s, int stage, size_t *bytes);
SEGNN_API int segnn_get(segnn *s, int stage, int64_t count, const int *atoms, void *buffer);
SEGNN_API int segnn_put(segnn *s, int stage, int64_t count, const int *atoms, const void *buffer);
/* As segnn_evaluate, of the own atoms; but forces (n_all, 3): those on ghosts are to be added to their atoms. */
SEGNN_API int segnn_finish(segnn *s, double *energy, double *energies, double *forces, double *virial, double *virials);

/* How many own atoms were outside of what the training data covered in the last evaluation, and flags for each, where
   that is not NULL: closer to another, with more or fewer neighbours, in new surroundings (leverage), with larger
   forces. Among parted atoms each process sees its own alone. forces (n, 3), or NULL. -1 for a potential without a
   domain, and without an evaluation. elsewhere: whether other processes have pairs; 0 where all atoms are here: then all
   may be alone, which some training data cover. */
SEGNN_API int64_t segnn_outside(segnn *s, const double *forces, int elsewhere, int *flags);

#ifdef __cplusplus
}
#endif
#endif
