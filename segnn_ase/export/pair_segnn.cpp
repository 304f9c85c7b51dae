/* pair_style segnn of LAMMPS: a potential of `segnn export` as a plugin, parted among processes.

   This file includes headers of LAMMPS: what is compiled from it is under LAMMPS' licence, GPL-2.0. It is the only one
   of which that is true: everything else of segnn_ase is under the MIT licence.

       plugin load pair_segnn.so
       pair_style segnn [check N warn|stop] [charge Q] [spin M]
       pair_coeff * * model.segnn Si O

   Ghosts reach out to one cutoff. What senders know goes to their ghosts before each message (forward communication),
   and gradients come back (reverse communication): no atom's network is computed twice. */
#include <dlfcn.h>
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "atom.h"
#include "comm.h"
#include "compute.h"
#include "error.h"
#include "fix.h"
#include "force.h"
#include "group.h"
#include "lammps.h"
#include "library.h"
#include "memory.h"
#include "modify.h"
#include "neigh_list.h"
#include "neighbor.h"
#include "pair.h"
#include "segnn.h"
#include "update.h"
#include "utils.h"

using namespace LAMMPS_NS;

#define FUNCTIONS(DO) \
  DO(open) DO(close) DO(message) DO(cutoff) DO(species) DO(n_cues) DO(cue) DO(set_threads) DO(begin) DO(tell) \
  DO(n_stages) DO(run) DO(exchange) DO(get) DO(put) DO(finish) DO(outside)

namespace {

struct Library { /* the functions of the libsegnn.so beside a model */
#define POINTER(name) decltype(&segnn_##name) name;
  FUNCTIONS(POINTER)
};

class PairSEGNN : public Pair {
 public:
  explicit PairSEGNN(LAMMPS *);
  ~PairSEGNN() override;
  void settings(int, char **) override;
  void coeff(int, char **) override;
  void init_style() override;
  double init_one(int, int) override { return cutoff; }
  void compute(int, int) override;
  int pack_forward_comm(int, int *, double *, int, int *) override;
  void unpack_forward_comm(int, int, double *) override;
  int pack_reverse_comm(int, int, double *) override;
  void unpack_reverse_comm(int, int *, double *) override;

 private:
  enum { NEVER, WARN, STOP };
  Library library{};
  segnn *model = nullptr;
  double cutoff = 0.0, charge = 0.0, spin = 1.0;
  bool given_charge = false, given_spin = false;
  int every = 100, verdict = WARN, n_cues = 0, stage = 0;
  bigint looked_at = -1;          /* the step, -1: not in this run; minimisers try many structures in one */
  std::size_t bytes = 0;          /* of an atom, in the present exchange */
  std::vector<int> kinds;         /* species of each type, or -1: another pair style's */
  std::vector<int> own, local;    /* own atoms as LAMMPS counts them; of each atom its row in the library, or -1 */
  std::vector<int> species, rows;
  std::vector<int64_t> first, senders;
  std::vector<double> vectors, told, energies, forces, virials;

  std::string open(const std::string &);
  void end_all(const std::string &);
  void close();
  void allocate();
  void number_atoms();
  void list_pairs();
  void tell();
  void add_up(double, const double *);
  void look_outside();
  void refuse_others();
  void refuse_lost_pairs();
  bool excludes_own();
  bool bonds_own();
  void tell_of(const char *, bool, bool);
  void check(int);
  int taken(int, const int *, double *);
  void given(int, const int *, const double *);
};

PairSEGNN::PairSEGNN(LAMMPS *lmp) : Pair(lmp) {
  single_enable = 0;
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_NOTAVAIL; /* not a sum of terms that each belong to few atoms */
}

PairSEGNN::~PairSEGNN() {
  close();
  if (allocated) {
    memory->destroy(setflag);
    memory->destroy(cutsq);
  }
}

void PairSEGNN::close() { /* its code stays: threads of OpenMP may still be in it */
  if (model) library.close(model);
  model = nullptr;
}

void PairSEGNN::settings(int count, char **words) {
  every = 100;
  verdict = WARN;
  given_charge = given_spin = false;
  for (int k = 0; k < count;) {
    const std::string word = words[k];
    if (word == "check" && k + 1 < count && !strcmp(words[k + 1], "no")) {
      verdict = NEVER;
      k += 2;
    } else if (word == "check" && k + 2 < count) {
      every = utils::inumeric(FLERR, words[k + 1], false, lmp);
      const std::string what = words[k + 2];
      if (every < 1 || (what != "warn" && what != "stop"))
        error->all(FLERR, "pair_style segnn check is {} {}; expected a number of steps, and warn or stop", every, what);
      verdict = what == "stop" ? STOP : WARN;
      k += 3;
    } else if ((word == "charge" || word == "spin") && k + 1 < count) {
      double &value = word == "spin" ? spin : charge;
      value = utils::numeric(FLERR, words[k + 1], false, lmp);
      (word == "spin" ? given_spin : given_charge) = true;
      if (value != std::floor(value) || (word == "spin" && value < 1))
        error->all(FLERR, "pair_style segnn {} is {}; expected {}", word, words[k + 1],
                   word == "spin" ? "the multiplicity, 1 for a singlet" : "a whole number of electrons");
      k += 2;
    } else
      error->all(FLERR, "pair_style segnn has {}; expected check N warn|stop, check no, charge Q or spin M", word);
  }
}

void PairSEGNN::allocate() {
  const int n = atom->ntypes;
  allocated = 1;
  memory->create(setflag, n + 1, n + 1, "pair:setflag");
  memory->create(cutsq, n + 1, n + 1, "pair:cutsq");
  for (int i = 0; i <= n; i++) std::fill(setflag[i], setflag[i] + n + 1, 0);
}

/* what is wrong with it */
std::string PairSEGNN::open(const std::string &path) {
  const auto slash = path.rfind('/');
  std::string file = (slash == std::string::npos ? "." : path.substr(0, slash)) + "/libsegnn.so";
  if (char *const whole = realpath(file.c_str(), nullptr)) { /* what is open by the same relative name is another */
    file = whole;
    free(whole);
  }
  void *handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) return "there is no library of the model " + path + ": " + dlerror();
  const auto version = reinterpret_cast<decltype(&segnn_version)>(dlsym(handle, "segnn_version"));
  if (!version || version() != SEGNN_VERSION)
    return file + " is of another version than this plugin: export both by one segnn export";
#define LOOK_UP(name) library.name = reinterpret_cast<decltype(library.name)>(dlsym(handle, "segnn_" #name));
  FUNCTIONS(LOOK_UP)
  char why[512] = "";
  model = library.open(path.c_str(), why, sizeof why);
  return why;
}

/* End with the sentence of the first rank that has one. */
void PairSEGNN::end_all(const std::string &problem) {
  int rank = problem.empty() ? comm->nprocs : comm->me, first_rank = 0;
  MPI_Allreduce(&rank, &first_rank, 1, MPI_INT, MPI_MIN, world);
  if (first_rank == comm->nprocs) return;
  char words[1024] = "";
  problem.copy(words, sizeof words - 1);
  MPI_Bcast(words, sizeof words, MPI_CHAR, first_rank, world);
  error->all(FLERR, "pair_coeff: {}", words);
}

void PairSEGNN::coeff(int count, char **words) {
  const int n = atom->ntypes;
  if (count != 3 + n || strcmp(words[0], "*") || strcmp(words[1], "*"))
    error->all(FLERR, "pair_coeff of segnn has {} words; expected * * model.segnn and an element for each of {} types",
               count, n);
  if (!allocated) allocate();
  for (int i = 1; i <= n; i++) std::fill(setflag[i], setflag[i] + n + 1, 0);
  close();
  end_all(open(words[2]));
  kinds.assign(n + 1, -1);
  for (int type = 1; type <= n; type++) {
    const std::string element = words[2 + type];
    if (element == "NULL") continue;
    kinds[type] = library.species(model, element.c_str());
    if (kinds[type] < 0) error->all(FLERR, "pair_coeff: the potential of {} does not know {}", words[2], element);
  }
  for (int i = 1; i <= n; i++)
    for (int j = i; j <= n; j++) setflag[i][j] = kinds[i] >= 0 && kinds[j] >= 0;
  cutoff = library.cutoff(model);
  n_cues = library.n_cues(model);
  std::size_t most[3] = {0, 0, 0};
  for (int k = 0; k < library.n_stages(model); k++) {
    const int direction = library.exchange(model, k, &bytes);
    if (direction != SEGNN_NO_EXCHANGE) most[direction] = std::max(most[direction], bytes);
  }
  comm_forward = static_cast<int>((most[SEGNN_FORWARD] + sizeof(double) - 1) / sizeof(double));
  comm_reverse = static_cast<int>((most[SEGNN_REVERSE] + sizeof(double) - 1) / sizeof(double));
}

void PairSEGNN::init_style() {
  if (!model) error->all(FLERR, "pair_style segnn has no model; expected pair_coeff * * model.segnn and elements");
  if (strcmp(update->unit_style, "metal"))
    error->all(FLERR, "pair_style segnn has eV and Angstrom; units are {}, expected metal", update->unit_style);
  if (!force->newton_pair) error->all(FLERR, "pair_style segnn sends gradients to owners; expected newton on");
  refuse_others();
  refuse_lost_pairs();
  looked_at = -1;
  bool knows_charge = false, knows_spin = false;
  for (int k = 0; k < n_cues; k++) {
    const std::string name = library.cue(model, k);
    if (name == "initial_charges" && !atom->q_flag)
      error->all(FLERR, "the potential is told charges; expected an atom_style that has them, such as charge");
    if (name.rfind("initial_magmoms_", 0) == 0 && !atom->sp_flag)
      error->all(FLERR, "the potential is told moments; expected atom_style spin");
    if (name != "initial_charges" && name.rfind("initial_magmoms_", 0) && name != "charge" && name != "spin")
      error->all(FLERR, "the potential is told {} of each atom, which LAMMPS does not have", name);
    knows_charge |= name == "charge";
    knows_spin |= name == "spin";
  }
  tell_of("charge", knows_charge, given_charge);
  tell_of("spin", knows_spin, given_spin);
  check(library.set_threads(model, std::max(1, comm->nthreads)));
  neighbor->add_request(this, NeighConst::REQ_FULL);
  /* pair_style hybrid asks for its own buffers before it knows the models */
  force->pair->comm_forward = std::max(force->pair->comm_forward, comm_forward);
  force->pair->comm_reverse = std::max(force->pair->comm_reverse, comm_reverse);
}

/* what takes something of it for what it is not */
void PairSEGNN::refuse_others() {
  for (int k = 0; k < modify->nfix; k++)
    if (utils::strmatch(modify->fix[k]->style, "^gcmc") || utils::strmatch(modify->fix[k]->style, "^widom"))
      error->all(FLERR, "fix {} leaves atoms that it tries out in the energy of pair_style segnn: expected none",
                 modify->fix[k]->style);
  for (int k = 0; k < modify->ncompute; k++)
    if (utils::strmatch(modify->compute[k]->style, "^heat/flux"))
      error->all(FLERR, "compute {} needs forces between pairs, of which those of pair_style segnn are no sum: expected "
                        "none; SEGNNCalculator has the heat flux", modify->compute[k]->style);
}

void PairSEGNN::refuse_lost_pairs() {
  if (neighbor->includegroup || atom->firstgroupname || excludes_own())
    error->all(FLERR, "pair_style segnn needs all pairs of its atoms; expected no neigh_modify exclude or include of "
                      "these, and no atom_modify first");
  if (bonds_own())
    error->all(FLERR, "pair_style segnn needs the pairs of its atoms' bonds, too; expected special_bonds lj/coul 1 1 1");
}

/* whether neigh_modify takes pairs away of which both atoms are its own */
bool PairSEGNN::excludes_own() {
  bool found = false;
  for (int k = 0; k < neighbor->nex_type; k++)
    found |= kinds[neighbor->ex1_type[k]] >= 0 && kinds[neighbor->ex2_type[k]] >= 0;
  std::vector<int> bits; /* of groups, by two, both of which must have own atoms */
  for (int k = 0; k < neighbor->nex_group; k++)
    for (const int *which : {neighbor->ex1_group, neighbor->ex2_group}) bits.push_back(group->bitmask[which[k]]);
  for (int k = 0; k < neighbor->nex_mol; k++) bits.insert(bits.end(), 2, group->bitmask[neighbor->ex_mol_group[k]]);
  std::vector<int> here(bits.size() + 1, 0), anywhere(bits.size() + 1, 0);
  for (int i = 0; i < atom->nlocal; i++)
    for (std::size_t k = 0; k < bits.size() && kinds[atom->type[i]] >= 0; k++)
      here[k] |= (atom->mask[i] & bits[k]) != 0;
  MPI_Allreduce(here.data(), anywhere.data(), static_cast<int>(here.size()), MPI_INT, MPI_MAX, world);
  for (std::size_t k = 0; k < bits.size(); k += 2) found |= anywhere[k] && anywhere[k + 1];
  return found;
}

/* whether special_bonds takes pairs of its own atoms away */
bool PairSEGNN::bonds_own() {
  int here = 0, anywhere = 0;
  for (int k = 1; k < 4 && atom->molecular != Atom::ATOMIC; k++) {
    if (force->special_lj[k] != 0.0 || force->special_coul[k] != 0.0) continue;
    for (int i = 0; i < atom->nlocal; i++)
      if (kinds[atom->type[i]] >= 0)
        here |= atom->molecular == Atom::TEMPLATE || atom->nspecial[i][k - 1] > (k > 1 ? atom->nspecial[i][k - 2] : 0);
  }
  MPI_Allreduce(&here, &anywhere, 1, MPI_INT, MPI_MAX, world);
  return anywhere != 0;
}

/* what is told of the whole must be given where the potential knows it, and changes nothing elsewhere */
void PairSEGNN::tell_of(const char *name, bool known, bool is_given) {
  if (known && !is_given)
    error->all(FLERR, "the potential is told the {} of the whole; expected pair_style segnn {} and its value", name, name);
  if (is_given && !known && comm->me == 0)
    error->warning(FLERR, "pair_style segnn {} changes nothing: the potential is not told of it", name);
}

void PairSEGNN::check(int wrong) {
  if (wrong) error->one(FLERR, "pair_style segnn: {}", library.message(model));
}

/* own atoms first, as they stand in the list, then ghosts; species of all */
void PairSEGNN::number_atoms() {
  const int n_all = atom->nlocal + atom->nghost;
  for (int i = 1; i <= atom->ntypes && list->ijskip; i++)
    for (int j = 1; j <= atom->ntypes; j++)
      if (kinds[i] >= 0 && kinds[j] >= 0 && list->ijskip[i][j])
        error->all(FLERR, "pair_style segnn needs all pairs of its types; types {} and {} are another style's", i, j);
  own.assign(list->ilist, list->ilist + list->inum);
  own.erase(std::remove_if(own.begin(), own.end(), [this](int i) { return kinds[atom->type[i]] < 0; }), own.end());
  local.assign(n_all, -1);
  species.clear();
  for (const int i : own) {
    local[i] = static_cast<int>(species.size());
    species.push_back(kinds[atom->type[i]]);
  }
  for (int i = atom->nlocal; i < n_all; i++)
    if (kinds[atom->type[i]] >= 0) {
      local[i] = static_cast<int>(species.size());
      species.push_back(kinds[atom->type[i]]);
    }
}

void PairSEGNN::list_pairs() {
  double *const *const x = atom->x;
  std::size_t most = 0, n = 0;
  for (const int i : own) most += list->numneigh[i];
  if (senders.size() < most) {
    senders.resize(most);
    vectors.resize(3 * most);
  }
  first.assign(1, 0);
  for (const int i : own) {
    const int *neighbors = list->firstneigh[i];
    for (int k = 0; k < list->numneigh[i]; k++) {
      const int j = neighbors[k] & NEIGHMASK;
      double *const r = vectors.data() + 3 * n;
      for (int q = 0; q < 3; q++) r[q] = x[j][q] - x[i][q];
      if (local[j] < 0 || r[0] * r[0] + r[1] * r[1] + r[2] * r[2] >= cutoff * cutoff) continue;
      senders[n++] = local[j];
    }
    first.push_back(static_cast<int64_t>(n));
  }
}

void PairSEGNN::tell() {
  if (!n_cues) return;
  told.assign(species.size() * n_cues, 0.0);
  for (int k = 0; k < n_cues; k++) {
    const std::string name = library.cue(model, k);
    const int axis = name.back() - 'x';
    for (std::size_t i = 0; i < local.size(); i++) {
      if (local[i] < 0) continue;
      double &to = told[local[i] * n_cues + k];
      if (name == "initial_charges") to = atom->q[i];
      else if (name == "charge") to = charge;
      else if (name == "spin") to = spin;
      else to = atom->sp[i][3] * atom->sp[i][axis];
    }
  }
  check(library.tell(model, told.data()));
}

void PairSEGNN::compute(int eflag, int vflag) {
  ev_init(eflag, vflag);
  /* atoms may have come with bonds, or into groups, since the run began */
  const bool may_lose = atom->molecular != Atom::ATOMIC || neighbor->nex_type || neighbor->nex_group || neighbor->nex_mol;
  if (neighbor->ago == 0 && may_lose) refuse_lost_pairs();
  number_atoms();
  list_pairs();
  const auto n = static_cast<int64_t>(own.size()), n_all = static_cast<int64_t>(species.size());
  check(library.begin(model, n, n_all, species.data(), first.data(), senders.data(), vectors.data()));
  tell();
  for (stage = 0; stage < library.n_stages(model); stage++) {
    check(library.run(model, stage));
    const int direction = library.exchange(model, stage, &bytes);
    if (direction == SEGNN_FORWARD) comm->forward_comm(this);
    if (direction == SEGNN_REVERSE) comm->reverse_comm(this);
  }
  double energy = 0.0, sum[9] = {0.0};
  forces.resize(3 * n_all + 1);
  if (eflag_atom) energies.resize(n + 1);
  if (vflag_atom) virials.resize(9 * n + 1);
  check(library.finish(model, &energy, eflag_atom ? energies.data() : nullptr, forces.data(),
                       vflag_global ? sum : nullptr, vflag_atom ? virials.data() : nullptr));
  add_up(energy, sum);
  const bigint since = update->ntimestep - looked_at;
  if (verdict != NEVER && (looked_at < 0 || since < 0 || since >= every)) look_outside();
}

void PairSEGNN::add_up(double energy, const double *sum) {
  static const int rows[6] = {0, 1, 2, 0, 0, 1}, columns[6] = {0, 1, 2, 1, 2, 2}; /* xx yy zz xy xz yz */
  for (std::size_t i = 0; i < local.size(); i++)
    for (int k = 0; k < 3 && local[i] >= 0; k++) atom->f[i][k] += forces[3 * local[i] + k];
  if (eflag_global) eng_vdwl += energy;
  for (std::size_t k = 0; k < own.size() && eflag_atom; k++) eatom[own[k]] += energies[k];
  for (int q = 0; q < 6; q++) {
    const int a = 3 * rows[q] + columns[q], b = 3 * columns[q] + rows[q];
    if (vflag_global) virial[q] += 0.5 * (sum[a] + sum[b]);
    for (std::size_t k = 0; k < own.size() && vflag_atom; k++)
      vatom[own[k]][q] += 0.5 * (virials[9 * k + a] + virials[9 * k + b]);
  }
}

void PairSEGNN::look_outside() {
  looked_at = update->ntimestep;
  const bigint pairs = first.back();
  bigint everywhere = 0, all = 0;
  MPI_Allreduce(&pairs, &everywhere, 1, MPI_LMP_BIGINT, MPI_SUM, world);
  const bigint here = library.outside(model, nullptr, everywhere > pairs, nullptr);
  if (here < 0) { /* on all ranks alike */
    const char *told = "pair_style segnn: the model has no domain of training data to look at; expected check no";
    if (verdict == STOP) error->all(FLERR, told);
    if (comm->me == 0) error->warning(FLERR, told);
    verdict = NEVER;
    return;
  }
  MPI_Allreduce(&here, &all, 1, MPI_LMP_BIGINT, MPI_SUM, world);
  if (!all) return;
  if (verdict == STOP)
    error->all(FLERR, "pair_style segnn: at step {} the training data do not cover the surroundings of {} atoms",
               update->ntimestep, all);
  if (comm->me == 0)
    error->warning(FLERR, "pair_style segnn: at step {} the training data do not cover the surroundings of {} atoms",
                   update->ntimestep, all);
}

/* rows of atoms, as LAMMPS counts them, into a buffer, or back; those of other pair styles are left out of both */
int PairSEGNN::taken(int count, const int *atoms, double *buffer) {
  char *const to = reinterpret_cast<char *>(buffer);
  for (int k = 0; k < count; k++)
    if (local[atoms[k]] >= 0) check(library.get(model, stage, 1, &local[atoms[k]], to + k * bytes));
  return static_cast<int>((count * bytes + sizeof(double) - 1) / sizeof(double));
}

void PairSEGNN::given(int count, const int *atoms, const double *buffer) {
  const char *const from = reinterpret_cast<const char *>(buffer);
  for (int k = 0; k < count; k++)
    if (local[atoms[k]] >= 0) check(library.put(model, stage, 1, &local[atoms[k]], from + k * bytes));
}

static const int *counted_from(std::vector<int> &rows, int begin, int count) {
  rows.resize(count + 1);
  for (int k = 0; k < count; k++) rows[k] = begin + k;
  return rows.data();
}

int PairSEGNN::pack_forward_comm(int n, int *atoms, double *buffer, int, int *) { return taken(n, atoms, buffer); }
void PairSEGNN::unpack_reverse_comm(int n, int *atoms, double *buffer) { given(n, atoms, buffer); }
int PairSEGNN::pack_reverse_comm(int n, int begin, double *buffer) {
  return taken(n, counted_from(rows, begin, n), buffer);
}
void PairSEGNN::unpack_forward_comm(int n, int begin, double *buffer) {
  given(n, counted_from(rows, begin, n), buffer);
}

/* what the loader of plugins expects: `lammpsplugin.h` is not among the headers that are installed */
struct Plugin {
  const char *version, *style, *name, *info, *author;
  void *(*creator)(LAMMPS *);
  void *handle;
};

void *make_pair(LAMMPS *lmp) { return static_cast<Pair *>(new PairSEGNN(lmp)); }

}    // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void *given, void *handle, void *add) {
  auto *const lmp = static_cast<LAMMPS *>(given);
  if (LAMMPS_HEADERS && lmp->num_ver != LAMMPS_HEADERS)
    lmp->error->all(FLERR, "pair_segnn.so was compiled for LAMMPS {}, this is {}: run segnn export --lammps again",
                    LAMMPS_HEADERS, lmp->num_ver);
#ifdef MPI_STUBS
  const bool parallel = false;
#else
  const bool parallel = true;
#endif
  if ((lammps_config_has_mpi_support() != 0) != parallel)
    lmp->error->all(FLERR, "pair_segnn.so was compiled {} MPI, this LAMMPS was not: run segnn export --lammps with its "
                           "headers and compiler", parallel ? "with" : "without");
  if (lammps_extract_setting(lmp, "tagint") != (int) sizeof(tagint) ||
      lammps_extract_setting(lmp, "bigint") != (int) sizeof(bigint))
    lmp->error->all(FLERR, "pair_segnn.so has integers of other sizes than this LAMMPS: export with the right CXXFLAGS, "
                           "such as -DLAMMPS_BIGBIG");
  Plugin plugin{LAMMPS_HEADERS ? lmp->version : "unknown",
                "pair",
                "segnn",
                "steerable E(3)-equivariant graph network",
                "segnn_ase",
                make_pair,
                handle};
  reinterpret_cast<void (*)(Plugin *, void *)>(add)(&plugin, given);
}
