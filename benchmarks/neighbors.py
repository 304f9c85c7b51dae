"""Cost of the neighbour list against size: matscipy, torch-cluster where installed, and the skin's reuse.

python benchmarks/neighbors.py
"""

import argparse
import importlib.util
import time

import numpy as np
import torch
from report import plot_lines, print_table, save
from systems import system

from segnn_ase.structure.neighbors import device_neighbor_list, neighbor_list
from segnn_ase.structure.skin import SkinNeighbors

CUTOFF = 5.0  # Å


def median_ms(repeats: int, call, *arguments, clock=time.process_time) -> float:
    times = []
    for _ in range(repeats + 1):
        begin = clock()
        call(*arguments)
        if clock is not time.process_time:
            torch.cuda.synchronize()
        times.append(1e3 * (clock() - begin))
    return float(np.median(times[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=["acetylacetone", "water192", "water1536", "water12288"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", default="neighbors")
    a = parser.parse_args()
    torch.set_num_threads(1)
    backends = ["matscipy"] + ["torch_cluster"] * (importlib.util.find_spec("torch_cluster") is not None)
    rows = []
    for name in a.systems:
        atoms = system(name)
        place = (atoms.positions, atoms.cell.array, atoms.pbc)
        for backend in backends:
            ms = median_ms(a.repeats, neighbor_list, *place, CUTOFF, backend)
            rows.append({"method": backend, "atoms": len(atoms), "cpu_ms": ms})
        if torch.cuda.is_available() and len(backends) > 1:
            cuda = torch.device("cuda")
            ms = median_ms(a.repeats, device_neighbor_list, *place, CUTOFF, cuda, clock=time.perf_counter)
            rows.append({"method": "torch_cluster, GPU (wall)", "atoms": len(atoms), "cpu_ms": ms})
        skin = SkinNeighbors(CUTOFF, 0.5, "matscipy")
        skin(*place)
        ms = median_ms(a.repeats, skin, *place)
        rows.append({"method": "skin, reused", "atoms": len(atoms), "cpu_ms": ms})
    for row in rows:
        row["us_per_atom"] = 1e3 * row["cpu_ms"] / row["atoms"]
    print_table(rows, {"method": "", "atoms": "d", "cpu_ms": ".2f", "us_per_atom": ".2f"})
    labels = ("atoms", "CPU time [ms]")
    plot_lines(a.out, rows, group="method", x="atoms", y="cpu_ms", labels=labels)
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
