"""What a loop that chooses its labels is worth beside as many frames at random.

python benchmarks/learn.py                # ethanol by GFN2-xTB at 300 K: 30 and 60 labels, three seeds
python benchmarks/learn.py --molecule CH3CONH2 --labels 60 --seeds 1

`segnn learn` with a budget of labels, from one structure, against trainings on frames drawn at random from
dynamics of the reference at the same temperature (20 ps; their steps are not counted as labels), both with as many
epochs; the loop pays for its relaxation, its controls, and the frames that it holds out to measure itself. Errors (rms)
on dynamics of the reference from another seed. What exists in the working folder (--work) is not done again. What
the reference costs beside a potential:

python benchmarks/md_step.py --calculators fast gfn2-xtb --reference gfn2-xtb --systems alkane62 alkane200
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from report import print_table
from xtb import Xtb, sampled

from segnn_ase.learn import LearnConfig, learn
from segnn_ase.train import TrainConfig, evaluate_files, train

KELVIN = 300
APART = 20  # fs, between frames
COLUMNS = {"labels": "d", "seed": "d", "how": "s", "learned": "d", "E": ".2f", "F": ".1f"}


def labelled(frames: Sequence[Atoms]) -> list[Atoms]:
    for frame in frames:
        calculator = Xtb()
        energy, forces = calculator.get_potential_energy(frame), calculator.get_forces(frame)
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
    return list(frames)


def kept(path: Path, make) -> Path:
    if not path.exists():
        write(path, make())
    return path


def errors_of(model: Path, test: Path) -> dict:
    found = evaluate_files(str(model), [str(test)])[str(test)]
    return {"E": 1e3 * found["energy_rmse"], "F": 1e3 * found["forces_rmse"]}  # meV/atom, meV/Å


def by_choice(work: Path, start: Path, labels: int, seed: int, epochs: int, minutes: float) -> tuple[Path, int]:
    out = work / f"chosen-{labels}-{seed}-{epochs}.pt"
    config = {
        "out": str(out),
        "structures": str(start),
        "reference": "gfn2-xtb",
        "conditions": {"temperature": KELVIN},
        "aim": {"forces": 5.0},
        "budget": {"labels": labels, "minutes": minutes},
        "model": {"preset": "fast"},
        "training": {"epochs": epochs},
        "seed": seed,
    }
    learn(LearnConfig.parse(config), progress=False)
    last = max((out.with_suffix(".learn")).glob("final-*/train.xyz"), key=lambda path: path.stat().st_mtime)
    return out, len(read(last, ":"))


def at_random(work: Path, pool: Path, labels: int, seed: int, epochs: int) -> tuple[Path, int]:
    out, source = work / f"random-{labels}-{seed}-{epochs}.pt", work / f"random-{labels}-{seed}.xyz"
    frames = read(pool, ":")
    chosen = np.random.default_rng(seed).permutation(len(frames))[:labels]
    kept(source, lambda: [frames[n] for n in sorted(chosen)])
    if not out.exists():
        training = {"epochs": epochs, "seed": seed}
        config = {"out": str(out), "data": {"train": str(source)}, "model": {"preset": "fast"}, "training": training}
        train(TrainConfig.parse(config), progress=False)
    return out, labels


def compare_labels(args: argparse.Namespace) -> list[dict]:
    work = args.work / args.molecule
    work.mkdir(parents=True, exist_ok=True)
    start = kept(work / "start.xyz", lambda: molecule(args.molecule))
    test = kept(
        work / "test.xyz", lambda: labelled(sampled(read(start), args.test, kelvin=KELVIN, seed=10_001, every=50))
    )
    rows = []
    for seed in range(args.seeds):
        pool = kept(
            work / f"pool-{seed}.xyz",
            lambda seed=seed: labelled(sampled(read(start), args.pool, kelvin=KELVIN, seed=seed, every=APART)),
        )
        for labels in args.labels:
            epochs = args.structures // labels
            ways = {
                "chosen": lambda labels=labels, seed=seed, e=epochs: by_choice(
                    work, start, labels, seed, e, args.minutes
                ),
                "random": lambda labels=labels, seed=seed, e=epochs, pool=pool: at_random(work, pool, labels, seed, e),
            }
            for how, make in ways.items():
                model, learned = make()
                row = {"labels": labels, "seed": seed, "how": how, "learned": learned, **errors_of(model, test)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="CH3CH2OH", help="of ASE's set g2")
    parser.add_argument("--labels", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--structures", type=int, default=20_000, help="that a training sees, in all epochs")
    parser.add_argument("--pool", type=int, default=1000, help="frames that random ones are drawn from")
    parser.add_argument("--test", type=int, default=200, help="frames of the test")
    parser.add_argument("--minutes", type=float, default=15.0, help="budget of a loop")
    parser.add_argument("--work", type=Path, default=Path("learn_labels"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    print_table(compare_labels(args), COLUMNS)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
