"""Cost of an MD step against size: our presets in every mode, beside peers in the same run.

    python benchmarks/md_step.py --peer nequip-S=path/to/nequip/bin/python

Every calculator runs in a process of its own, on one core, in turn; several rounds, of which the fastest counts. The
figure to compare is CPU time, as machines are shared; with `--device cuda` it is the wall time. A peer's environment
needs the peer, ASE and numpy.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from report import plot_lines, print_table, save

SYSTEMS = ["acetylacetone", "water192", "water1536", "water12288"]
SLOW = {"fast:torch", "segnn:torch"}  # gigabytes for the largest


def measure(python: str, name: str, systems: list[str], a: argparse.Namespace) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "MKL_NUM_THREADS": str(a.threads)}
    command = [
        python,
        str(Path(__file__).with_name("step.py")),
        name,
        *systems,
        "--dtype",
        a.dtype,
        "--device",
        a.device,
    ]
    if a.core is not None:
        command = ["taskset", "-c", a.core, *command]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = ["fast", "segnn", "fast:layers", "segnn:layers", "fast:torch", "segnn:torch"]
    parser.add_argument("--calculators", nargs="+", default=ours, help="see calculators.py")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="nequip-S or mace-64x0e")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", help="pin to this core, or list of cores (taskset)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", default="md_step")
    a = parser.parse_args()
    peers = dict(text.split("=", 1) for text in a.peer)
    figure = "cpu_ms" if a.device == "cpu" else "wall_ms"
    best: dict[tuple, dict] = {}
    for _ in range(a.rounds):
        for name in [*a.calculators, *peers]:
            large = [s for s in a.systems if s != SYSTEMS[-1]]
            for row in measure(
                peers.get(name, sys.executable), name, large if name in SLOW | set(peers) else a.systems, a
            ):
                key = (name, row["system"])
                if key not in best or row[figure] < best[key][figure]:
                    best[key] = row
    rows = list(best.values())
    for row in rows:
        row["us_per_atom"] = 1e3 * row[figure] / row["atoms"]
        for peer in peers:
            other = best.get((peer, row["system"]))
            row[f"vs {peer}"] = other and other[figure] / row[figure]
    columns = {"calculator": "", "atoms": "d", "cpu_ms": ".2f", "wall_ms": ".2f", "us_per_atom": ".1f"}
    columns |= {"peak_MB": ".0f", "start_s": ".1f"} | {f"vs {peer}": ".2f" for peer in peers}
    print_table(rows, columns)
    labels = ("atoms", f"{'CPU' if figure == 'cpu_ms' else 'wall'} time of a step [ms]")
    plot_lines(a.out, rows, group="calculator", x="atoms", y=figure, labels=labels)
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
