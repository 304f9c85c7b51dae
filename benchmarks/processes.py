"""What several processes gain in training: time of a step of one and of more of them, as torchrun starts them.

    python benchmarks/processes.py
    python benchmarks/processes.py --processes 1 2 4 --frames 4 --preset fast

Frames are 64 water molecules each, labelled by the potential `water-pbe0`; a step is one of `segnn train`, with so many
of them, gradient, exchange and SOAP. Each process has one thread. Numbers of processes take turns; told are medians
over all rounds, and which part of a step passes in exchanging
gradients and waiting for the slowest.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import ase.io
import numpy as np
from ase.calculators.singlepoint import SinglePointCalculator
from report import print_table, save
from systems import system

STEPS, LEFT_OUT = 12, 3  # in a round; the first fill caches


def write_frames(path: Path, count: int) -> None:
    from segnn_ase import SEGNNCalculator

    calculator, frames = SEGNNCalculator("water-pbe0", domain="ignore"), []
    for seed in range(count):
        atoms = system("water192")
        atoms.rattle(0.02, rng=np.random.default_rng(seed))
        labels = {name: calculator.get_property(name, atoms) for name in ("energy", "forces")}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        frames.append(atoms)
    ase.io.write(path, frames)


def measure(folder: Path, preset: str, frames: int) -> None:
    """One round, in each of the processes; the first writes the times of its steps, s."""
    from segnn_ase.base import processes
    from segnn_ase.train import loop, together
    from segnn_ase.train.settings import TrainConfig
    from segnn_ase.train.start import train

    steps, exchanged, step, added_up = [], [], loop.next_step, processes.added_up

    def timed(found: list, work, *arguments):
        begin = time.perf_counter()
        value = work(*arguments)
        found.append(time.perf_counter() - begin)
        return value

    loop.next_step = lambda *arguments: timed(steps, step, *arguments)
    together.processes.added_up = lambda values: timed(exchanged, added_up, values)
    training = {"epochs": STEPS, "batch_size": frames, "max_edges": 10**7, "learning_rate": 0.003, "rollout_steps": 0}
    data = {"train": str(folder / "frames.traj"), "valid": str(folder / "valid.traj"), "refuse_flaws": False}
    model, training = {"preset": preset}, {**training, "validate_every": STEPS, "device": "cpu"}
    out = str(folder / "run" / "model.pt")
    train(TrainConfig.parse({"out": out, "data": data, "model": model, "training": training}), progress=False)
    if processes.is_first():
        (folder / "found.json").write_text(json.dumps([steps[LEFT_OUT:], sum(exchanged) / sum(steps)]))


def round_of(folder: Path, count: int, arguments) -> tuple[list[float], float]:
    shutil.rmtree(folder / "run", ignore_errors=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, __file__, "--inside", str(folder), "--preset", arguments.preset]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["--frames", str(arguments.frames)]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    return json.loads((folder / "found.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--frames", type=int, default=4, help="in a step")
    parser.add_argument("--preset", default="segnn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="processes")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        measure(arguments.inside, arguments.preset, arguments.frames)
        return
    steps, shares = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_frames(folder / "frames.traj", arguments.frames)
        write_frames(folder / "valid.traj", 1)
        for _ in range(arguments.rounds):
            for count in arguments.processes:
                times, share = round_of(folder, count, arguments)
                steps[count].append(float(np.median(times)))
                shares[count].append(share)
    first = float(np.median(steps[arguments.processes[0]]))
    rows = [
        {
            "processes": count,
            "step_ms": 1e3 * float(np.median(steps[count])),
            "faster": first / float(np.median(steps[count])),
            "exchange_percent": 100 * float(np.median(shares[count])),
        }
        for count in arguments.processes
    ]
    print_table(rows, {"processes": "d", "step_ms": ".0f", "faster": ".2f", "exchange_percent": ".1f"})
    save(arguments.out, rows, vars(arguments))


if __name__ == "__main__":
    main()
