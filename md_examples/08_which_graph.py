"""Which atoms send messages to which, and why only one choice makes a force field: a molecule is pulled apart.

The methyl group of acetylacetone goes away from the rest, 1.5 to 7 Å, and the same shipped potential is evaluated on
graphs that are made in three ways: all neighbours within its radius, the nearest eight, and pairs as far apart as
covalent bonds are. Told are the largest jump of the energy, and what is missing at the end: the energy there, less what
the forces did on the way. The fourth row is a network as published, with random weights, whose messages end at the
radius without an envelope. Dynamics on any graph but the first heat up or cool down by what is missing.

SEGNN_STEPS: points on the way (1000).
"""

import os
import warnings

import ase.io
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from ase.data import covalent_radii

from segnn_ase.model.potential import Potential
from segnn_ase.model.predict import PlainEvaluator
from segnn_ase.model.settings import model_config
from segnn_ase.store.model_file import load_potential
from segnn_ase.store.shipped import find_model
from segnn_ase.structure.graph import collate, edge_vectors, graph_from_atoms, select, within

warnings.filterwarnings("ignore", "The number of")
POINTS, AT_ONCE = int(os.environ.get("SEGNN_STEPS", 1000)), 100
NEAREST, BOND = 8, 1.3  # neighbours; times the sum of covalent radii
FARTHEST = 7.0  # Å


def within_radius(graph, cutoff):
    return within(graph, cutoff)


def nearest(graph, cutoff):
    """The nearest neighbours of each atom, however far they are."""
    distance, keep = edge_vectors(graph).norm(dim=1), torch.zeros(len(graph.edge_dst), dtype=torch.bool)
    for atom in range(len(graph.numbers)):
        own = (graph.edge_dst == atom).nonzero()[:, 0]
        keep[own[distance[own].argsort()[:NEAREST]]] = True
    return within(select(graph, keep), cutoff)


def bonded(graph, cutoff):
    radii = torch.as_tensor(covalent_radii)[graph.numbers]
    longest = BOND * (radii[graph.edge_src] + radii[graph.edge_dst])
    return within(select(graph, edge_vectors(graph).norm(dim=1) < longest), cutoff)


def pulled(atoms, carbon, group, other):
    """Structures along the way, the distances of the two carbons, and the direction."""
    direction = atoms.positions[carbon] - atoms.positions[other]
    first = np.linalg.norm(direction)
    direction /= first
    distances = np.linspace(first, FARTHEST, POINTS)
    structures = []
    for distance in distances:
        moved = atoms.copy()
        moved.positions[group] += (distance - first) * direction
        structures.append(moved)
    return structures, distances, direction


def methyl(atoms):
    """A carbon with three hydrogens, all four atoms, and the carbon that it is bonded to."""
    apart = atoms.get_all_distances()
    for carbon in (k for k in range(len(atoms)) if atoms.numbers[k] == 6):
        hydrogens = [k for k in range(len(atoms)) if atoms.numbers[k] == 1 and apart[carbon, k] < 1.3]
        if len(hydrogens) == 3:
            (other,) = (k for k in range(len(atoms)) if atoms.numbers[k] == 6 and 0 < apart[carbon, k] < 1.8)
            return carbon, [carbon, *hydrogens], other
    raise ValueError("there is no methyl group")


def along(evaluate, potential, structures, graph_of, group, direction):
    """Energies and the forces on the group along the direction."""
    energies, forces = [], []
    for n in range(0, len(structures), AT_ONCE):
        part = structures[n : n + AT_ONCE]
        graphs = [graph_of(graph_from_atoms(atoms, 12.0), potential.cutoff) for atoms in part]
        found = evaluate(collate(graphs))
        energies.append(found.energy.numpy())
        forces.append(found.forces.reshape(len(part), -1, 3)[:, group].sum(1).numpy() @ direction)
    return np.concatenate(energies), np.concatenate(forces)


def main():
    shipped = load_potential("acetylacetone-pbe", dtype="float64")
    atoms = ase.io.read(find_model("acetylacetone-pbe").with_name("reference.xyz"), 0)
    published = Potential(model_config("segnn2022"), shipped.species).double().eval()
    published.calibrate(within(graph_from_atoms(atoms, 5.0), 5.0))
    carbon, group, other = methyl(atoms)
    structures, distances, direction = pulled(atoms, carbon, group, other)
    ways = {
        "radius and envelope": (shipped, within_radius),
        f"nearest {NEAREST}": (shipped, nearest),
        f"bonds up to {BOND:g} covalent": (shipped, bonded),
        "radius, as published": (published, within_radius),
    }
    figure, axes = plt.subplots(len(ways), 1, figsize=(6, 8), sharex=True, layout="constrained")
    print(f"{'graph':24s} {'largest jump, meV':>18s} {'missing at the end, meV':>24s}")
    for axis, (name, (potential, graph_of)) in zip(axes, ways.items(), strict=True):
        evaluate = PlainEvaluator(potential).without_core()
        energies, forces = along(evaluate, potential, structures, graph_of, group, direction)
        work = -0.5 * (forces[1:] + forces[:-1]) * np.diff(distances)
        steps = np.diff(energies) - work
        print(f"{name:24s} {1e3 * np.abs(steps).max():18.3g} {1e3 * abs(steps.sum()):24.3g}")
        axis.plot(distances, energies - energies[-1], lw=1.4, label="energy")
        integrated = np.concatenate([[0.0], np.cumsum(work)])
        axis.plot(distances, integrated - integrated[-1], "--", lw=1.2, label="work of the forces")
        axis.set(ylabel="eV", title=name)
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("distance of the two carbons / Å")
    figure.savefig("which_graph.png", dpi=150)
    print("wrote which_graph.png")


if __name__ == "__main__":
    main()
