"""Named systems on which backends and potentials are tested; a bug report becomes a named system.

All of them hold only the elements of `SPECIES` and have no pair within 1e-9 Å of `CUTOFF`, but for the
one that says so.
"""

from contextlib import contextmanager

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk, fcc111, graphene, molecule
from e3nn import o3

CUTOFF = 4.0  # Å
SPECIES = [1, 6, 8, 29]

TRICLINIC = np.array([[4.6, 0.3, -0.4], [1.7, 5.1, 0.2], [-1.2, 1.9, 4.9]])


def rattled(atoms: Atoms, seed: int = 0, stdev: float = 0.1) -> Atoms:
    """Return the atoms with normal displacements of stdev Å."""
    atoms = atoms.copy()
    atoms.rattle(stdev, rng=np.random.default_rng(seed))
    return atoms


def one_atom() -> Atoms:
    return Atoms("C", positions=[[1.0, 2.0, 3.0]])


def water() -> Atoms:
    return molecule("H2O")


def ethanol() -> Atoms:
    return rattled(molecule("CH3CH2OH"))


def collinear() -> Atoms:
    return molecule("C2H2")


def dimer_at_cutoff() -> Atoms:
    """Exactly at the cutoff, hence no pair: the contract is distance < cutoff."""
    return Atoms("CO", positions=[[0, 0, 0], [CUTOFF, 0, 0]])


def two_fragments() -> Atoms:
    """Two molecules out of each other's sight."""
    far = ethanol()
    far.translate([30.0, -20.0, 10.0])
    return water() + far


def wire() -> Atoms:
    """Periodic along y only; the other cell vectors are zero."""
    return Atoms("CHCO", [[0, 0, 0], [0.9, 0.4, 0], [0.1, 1.4, 0.3], [0, 2.7, 1]], cell=[0, 3.8, 0], pbc=(0, 1, 0))


def tilted_wire() -> Atoms:
    """Periodic along a vector that is parallel to no axis."""
    return Atoms("CuO", [[0, 0, 0], [1.5, 1.0, -0.5]], cell=[[0, 0, 0], [0, 0, 0], [1.9, 1.6, 1.2]], pbc=(0, 0, 1))


def slab() -> Atoms:
    """Two layers, periodic in the plane; the third cell vector is zero."""
    atoms = fcc111("Cu", (2, 1, 2), a=3.6)
    atoms.cell[2] = 0
    return rattled(atoms, 1)


def slab_in_vacuum() -> Atoms:
    """The third cell vector is there but not periodic."""
    return rattled(fcc111("Cu", (1, 2, 3), a=3.6, vacuum=6.0), 2)


def sheet() -> Atoms:
    return rattled(graphene(vacuum=5.0), 3)


def mixed_pbc() -> Atoms:
    """A skewed cell, periodic along its first and third vectors only."""
    return Atoms("CHOCu", [[0, 0, 0], [1, 0.2, 0], [2, 2.1, 1], [0, 2.6, 2.2]], cell=TRICLINIC, pbc=(1, 0, 1))


def triclinic() -> Atoms:
    return Atoms("CHOCuC", [[0, 0, 0], [1, 0.3, 0], [1.6, 2.1, 1], [0, 3, 2.2], [3, 4, 3.3]], cell=TRICLINIC, pbc=True)


def left_handed() -> Atoms:
    """The triclinic crystal with two lattice vectors exchanged: determinant < 0."""
    atoms = triclinic()
    atoms.set_cell(TRICLINIC[[1, 0, 2]])
    return atoms


def left_handed_slab() -> Atoms:
    return Atoms(
        "CuCO", [[0, 0, 0], [1.5, 1, 0.7], [1, 2, -0.8]], cell=[[0, 3.1, 0], [2.9, 0.8, 0], [0, 0, 9]], pbc=(1, 1, 0)
    )


def very_skewed() -> Atoms:
    """A cubic lattice in a far from reduced cell."""
    return Atoms("CuO", [[0, 0, 0], [1.6, 1.5, 1.7]], cell=[[3.4, 0, 0], [10.2, 3.4, 0], [-6.8, 13.6, 3.4]], pbc=True)


def needle() -> Atoms:
    """One cell vector much shorter than the cutoff, another much longer."""
    return Atoms("CH", [[0.3, 0.2, 1.0], [0.9, 1.5, 2.0]], cell=[[1.8, 0, 0], [0.4, 5.0, 0], [0, 0, 14.0]], pbc=True)


def tiny_cell() -> Atoms:
    """One atom whose neighbours are all its own images."""
    atoms = bulk("Cu", "fcc", a=3.6)
    atoms.set_cell(atoms.cell @ np.array([[1.0, 0.06, 0], [0, 0.97, 0.05], [0.02, 0, 1.03]]))
    return atoms


def diamond() -> Atoms:
    """A perfect crystal: no forces."""
    return bulk("C", "diamond", a=3.57)


def copper() -> Atoms:
    """A perfect crystal in a cubic cell."""
    return bulk("Cu", "fcc", a=3.6, cubic=True)


def rattled_copper() -> Atoms:
    return rattled(copper(), 4)


def vacuum() -> Atoms:
    """A molecule in a periodic box much larger than the cutoff."""
    atoms = water()
    atoms.set_cell([12.0, 13.0, 14.0])
    atoms.pbc = True
    return atoms


def outside() -> Atoms:
    """Atoms several cells away from the cell, one on its face, one a rounding error below zero."""
    atoms = triclinic()
    shifts = np.array([[0, 0, 0], [2, -3, 0], [-1, 0, 4], [0, 5, 0], [-2, -2, -2]])
    atoms.positions += shifts @ TRICLINIC
    atoms.positions[0] = -1e-17
    return atoms


NAMED = {
    build.__name__: build
    for build in (
        one_atom,
        water,
        ethanol,
        collinear,
        dimer_at_cutoff,
        two_fragments,
        wire,
        tilted_wire,
        slab,
        slab_in_vacuum,
        sheet,
        mixed_pbc,
        triclinic,
        left_handed,
        left_handed_slab,
        very_skewed,
        needle,
        tiny_cell,
        diamond,
        copper,
        rattled_copper,
        vacuum,
        outside,
    )
}
MOLECULES = [name for name, build in NAMED.items() if not build().pbc.any()]
PERIODIC = [name for name in NAMED if name not in MOLECULES]
WITH_VOLUME = [name for name, build in NAMED.items() if abs(np.linalg.det(build().cell.array)) > 0]
PERFECT = ["diamond", "copper", "one_atom"]


def squeezed() -> list[Atoms]:
    """A pair at every depth of the core, several at one atom, and next to them structures that have none."""
    crowd = Atoms("CHOCuH", [[0, 0, 0], [0, 0.6, 0.1], [0.9, -0.2, 0], [-0.5, -1.3, 0.4], [0.1, 0.2, -1.02]])
    dense = rattled(copper(), 2)
    dense.set_cell(0.8 * dense.cell.array, scale_atoms=True)
    return [crowd, vacuum(), dense, ethanol(), Atoms("CO", [[0, 0, 0], [0.2, 0, 0]])]


def random_gas(n_atoms: int, neighbors: float, cutoff: float, seed: int) -> Atoms:
    """A periodic cube of random atoms at least 1 Å apart with this mean number of neighbours."""
    rng = np.random.default_rng(seed)
    side = (n_atoms / (neighbors / (4 / 3 * np.pi * cutoff**3))) ** (1 / 3)
    positions = np.zeros((0, 3))
    while len(positions) < n_atoms:
        trial = rng.uniform(0, side, 3)
        d = positions - trial
        if not len(d) or np.linalg.norm(d - side * np.round(d / side), axis=1).min() > 1.0:
            positions = np.vstack([positions, trial])
    return Atoms(rng.choice(SPECIES, n_atoms), positions, cell=[side] * 3, pbc=True)


def elements(count: int = 89) -> Atoms:
    """The first so many elements, each once, in a skewed cell; atoms 1.9 Å apart or more. Not for `SPECIES`."""
    sites = np.stack(np.meshgrid(range(5), range(5), range(4), indexing="ij"), axis=-1).reshape(-1, 3)[:count]
    order = np.random.default_rng(7).permutation(count) + 1
    cell = np.diag([5, 5, 4]) @ np.array([[2.6, 0, 0], [0.5, 2.7, 0], [-0.4, 0.3, 2.6]])
    return rattled(Atoms(order, sites / [5, 5, 4] @ cell, cell=cell, pbc=True), 8)


def rotation(seed: int, *, improper: bool = False) -> np.ndarray:
    """A random rotation, or a rotation times a reflection, (3, 3)."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.linalg.det(q) * (-1 if improper else 1)


@contextmanager
def float64_default():
    """e3nn builds its constants in the default dtype: float32 would limit its products to 1e-7."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def wigner(l: int, p: int, matrix: np.ndarray) -> torch.Tensor:
    """e3nn's D of the irrep (l, p) for a proper or improper rotation, (2l + 1, 2l + 1)."""
    with float64_default():
        return o3.Irrep(l, p).D_from_matrix(torch.from_numpy(matrix))


def transformed(atoms: Atoms, matrix: np.ndarray, shift=(0.0, 0.0, 0.0)) -> Atoms:
    """Apply r -> matrix r + shift to positions, and the matrix to the lattice vectors."""
    atoms = atoms.copy()
    atoms.set_cell(atoms.cell.array @ matrix.T)
    atoms.positions = atoms.positions @ matrix.T + np.asarray(shift)
    return atoms


def brute_force(positions, cell, pbc, cutoff: float):
    """Every pair in every image that could be in reach: sorted rows (i, j, S), and the pair nearest to the cutoff.

    The oracle of all neighbour lists. With r = r_j - r_i and h_k* the dual vector of h_k, |r + S h| < cutoff needs
    |r h_k* + S_k| < cutoff |h_k*|: for every pair all shifts of this box and one more on each side are tried.
    """
    positions, cell = np.asarray(positions, dtype=float), np.asarray(cell, dtype=float)
    pbc = np.broadcast_to(pbc, 3)
    between = positions[None] - positions[:, None]
    dual = np.zeros((3, 3))
    dual[:, pbc] = np.linalg.pinv(cell[pbc])
    reach = np.where(pbc, np.ceil(cutoff * np.linalg.norm(dual, axis=0)) + 1, 0).astype(int)
    steps = np.stack(np.meshgrid(*(np.arange(-m, m + 1) for m in reach), indexing="ij"), axis=-1).reshape(-1, 3)
    shifts = steps - np.round(between @ dual).astype(int)[:, :, None]  # (N, N, images, 3)
    distance = np.linalg.norm(between[:, :, None] + shifts @ np.where(pbc[:, None], cell, 0.0), axis=3)
    itself = np.eye(len(positions), dtype=bool)[:, :, None] & (shifts == 0).all(axis=3)
    distance[itself] = np.inf
    near = distance < cutoff
    i, j, _ = near.nonzero()
    rows = sorted(zip(i.tolist(), j.tolist(), *shifts[near].T.tolist(), strict=True))
    return rows, np.abs(distance - cutoff).min()


def split_irreps(x: torch.Tensor, irreps: o3.Irreps) -> tuple[torch.Tensor, ...]:
    """e3nn's flat layout (n, irreps.dim) to one (n, 2l + 1, mul) tensor per entry."""
    blocks = x.split([mul * ir.dim for mul, ir in irreps], dim=1)
    return tuple(b.view(len(x), mul, ir.dim).transpose(1, 2) for b, (mul, ir) in zip(blocks, irreps, strict=True))


def join_irreps(features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Inverse of `split_irreps`."""
    return torch.cat([block.transpose(1, 2).flatten(1) for block in features], dim=1)
