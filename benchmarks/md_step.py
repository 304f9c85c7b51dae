"""Cost of an MD step against size: our presets in every mode, beside peers in the same run.

    python benchmarks/md_step.py --peer nequip-S=path/to/nequip/bin/python
    python benchmarks/md_step.py --calculators segnn segnn+initial_charges segnn+initial_magmoms segnn+external_field

Every calculator lives in a process of its own, on one core. They are asked in turn, A B C A B C, for a block of steps
at a time, so that a machine whose load changes is the same for all. Printed are the median of all steps; the spread,
half of what lies between the quartiles of the blocks' medians; and for each reference the median over the rounds of
its time by that of the calculator: how many times as fast as the reference. The figure to compare is CPU time, as
machines are shared; with `--device cuda` it is the wall time. A peer's environment needs the peer, ASE and numpy. What
fails is named, and the others go on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from calculators import CONVERTED, DESCRIPTORS, PEERS
from report import plot_lines, print_table, save

SYSTEMS = ["acetylacetone", "water192", "water1536", "water12288"]
OURS = ["fast", "segnn", "fast:layers", "segnn:layers", "fast:torch", "segnn:torch"]
SLOW = {"fast:torch", "segnn:torch"}  # gigabytes for the largest


class Worker(NamedTuple):
    """A calculator in its process, and what it said of itself."""

    name: str
    process: subprocess.Popen
    errors: IO[str]
    hello: dict


def start(name: str, python: str, a: argparse.Namespace) -> Worker | None:
    threads = {"OMP_NUM_THREADS": str(a.threads), "MKL_NUM_THREADS": str(a.threads)}
    command = [python, str(Path(__file__).with_name("step.py")), name, "--dtype", a.dtype, "--device", a.device]
    command = command if a.core is None else ["taskset", "-c", a.core, *command]
    errors = tempfile.TemporaryFile("w+")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
    begin = time.perf_counter()
    try:
        process = subprocess.Popen(command, env={**os.environ, **threads}, **pipes)
    except OSError as error:
        return _failed(name, "start", str(error))
    worker = Worker(name, process, errors, {})
    hello = _answer(worker)
    if "error" in hello:
        return _failed(name, "start", hello["error"])
    return worker._replace(hello={**hello, "start_s": time.perf_counter() - begin})


def ask(worker: Worker, **request) -> dict:
    """Its answer, which has "error" where it failed."""
    try:
        print(json.dumps(request), file=worker.process.stdin, flush=True)
    except OSError:  # it has ended; the answer says why
        pass
    return _answer(worker)


def _answer(worker: Worker) -> dict:
    if line := worker.process.stdout.readline():
        return json.loads(line)
    code = worker.process.wait()
    worker.errors.seek(0)
    last = worker.errors.read().strip().splitlines()[-1:]
    return {"error": f"its process ended with code {code}: {''.join(last)}"}


def _failed(name: str, where: str, error: str) -> None:
    print(f"{name}, {where}: {error}", file=sys.stderr)


def measure(system: str, workers: list[Worker], rounds: int, seconds: float) -> list[dict]:
    """Rows of one system: of each calculator the times of its blocks (CPU and wall time of each step, ms)."""
    rows = {}
    for worker in workers:
        answer = ask(worker, system=system)
        rows[worker.name] = {"calculator": worker.name, "system": system, **worker.hello, **answer, "blocks": []}
    for _ in range(rounds):
        for worker in workers:
            row = rows[worker.name]
            if "error" not in row:
                answer = ask(worker, system=system, seconds=seconds)
                row["blocks"] += [answer.pop("times", None)]
                row |= answer
    for name, row in rows.items():
        if "error" in row:
            _failed(name, system, row["error"])
    return [_summary(row) for row in rows.values() if "error" not in row]


def _summary(row: dict) -> dict:
    cpu, wall = np.concatenate([np.array(block) for block in row["blocks"]]).T
    column = 0 if row["device"] == "cpu" else 1
    medians = [float(np.median(np.array(block)[:, column])) for block in row["blocks"]]
    low, middle, high = np.percentile(medians, [25, 50, 75])
    figures = {"cpu_ms": float(np.median(cpu)), "wall_ms": float(np.median(wall)), "steps": len(cpu)}
    figures |= {"rounds": medians, "spread_pct": float(50 * (high - low) / middle)}
    figures["us_per_atom"] = 1e3 * (figures["cpu_ms"] if column == 0 else figures["wall_ms"]) / row["atoms"]
    kept = {key: value for key, value in row.items() if key != "blocks"}
    start = None if row["calculator"] in CONVERTED else row["start_s"] + row["first_ms"] / 1e3
    return {**kept, **figures, "start_s": start}


def add_ratios(rows: list[dict], references: list[str]) -> list[str]:
    """How many times as fast as each reference, round by round, and the median of that; the references that were
    measured."""
    measured = {row["calculator"] for row in rows}
    references = [name for name in references if name in measured]
    for row in rows:
        for name in references:
            there = (r for r in rows if r["system"] == row["system"] and r["calculator"] == name)
            other = next(there, None)
            row[f"vs {name}"] = other and float(np.median(np.divide(other["rounds"], row["rounds"])))
    return references


def fits(name: str, system: str) -> bool:
    """Whether it is asked: for what has its elements, and for the largest where it does not take gigabytes."""
    if name in DESCRIPTORS:
        return system.startswith("silicon")
    return system != SYSTEMS[-1] or name not in SLOW | set(PEERS)


def run(a: argparse.Namespace, peers: dict[str, str]) -> list[dict]:
    started = (start(name, peers.get(name, sys.executable), a) for name in [*a.calculators, *peers])
    workers, rows = [worker for worker in started if worker], []
    for worker in workers:
        print(worker.name, *(" ".join(pair) for pair in worker.hello["versions"].items()), sep=", ")
    for system in a.systems:
        able = [worker for worker in workers if worker.process.poll() is None and fits(worker.name, system)]
        rows += measure(system, able, a.rounds, a.seconds)
    for worker in workers:
        worker.process.stdin.close()
        worker.process.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calculators", nargs="*", default=OURS, help="see calculators.py")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(PEERS))
    parser.add_argument("--reference", nargs="+", help="names to compare with; all peers, or else the first calculator")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, help="smallest first, for the peak of memory")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--core", help="pin to this core, or list of cores (taskset)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a block")
    parser.add_argument("--out", default="md_step")
    a = parser.parse_args()
    peers = dict(text.split("=", 1) for text in a.peer)
    rows = run(a, peers)
    if not rows:
        raise SystemExit("nothing was measured")
    references = add_ratios(rows, a.reference or list(peers) or a.calculators[:1])
    columns = {"system": "", "calculator": "", "dtype": "", "atoms": "d", "cpu_ms": ".2f", "wall_ms": ".2f"}
    columns |= {"spread_pct": ".1f", "us_per_atom": ".1f", "peak_MB": ".0f", "start_s": ".1f"}
    print_table(rows, columns | {f"vs {name}": ".2f" for name in references})
    figure = "cpu_ms" if a.device == "cpu" else "wall_ms"
    labels = ("atoms", f"{'CPU' if figure == 'cpu_ms' else 'wall'} time of a step [ms]")
    plot_lines(a.out, rows, group="calculator", x="atoms", y=figure, labels=labels)
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
