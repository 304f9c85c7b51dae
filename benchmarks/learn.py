"""What a loop that chooses its labels is worth beside as many frames at random, and what pretraining is.

python benchmarks/learn.py                # ethanol by GFN2-xTB at 300 K: 30 and 60 labels, three seeds
python benchmarks/learn.py --molecule CH3CONH2 --labels 60 --seeds 1
python benchmarks/learn.py --reference pyscf --pretraining gfn2-xtb --test 100    # pip install pyscf

`segnn learn` with a budget of labels, from one structure, against trainings on frames drawn at random from 20 ps of
dynamics by GFN2-xTB at the same temperature (whose steps are not counted as labels), all with as many epochs; the loop
pays for its relaxation, its controls, and the frames that it holds out to measure itself. With a cheaper reference to
begin with, one loop learns that (--minutes), and both go on from its potential; a third way is from scratch. Errors
(rms) on dynamics by GFN2-xTB from another seed, 100 fs apart, labelled by the reference. What exists in the working
folder (--work) is not done again. What the reference costs beside a potential:

python benchmarks/md_step.py --calculators fast gfn2-xtb --reference gfn2-xtb --systems alkane62 alkane200
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from report import print_table
from xtb import sampled

from segnn_ase.learn import LearnConfig, learn
from segnn_ase.learn.pretraining import loop_of_pretraining
from segnn_ase.learn.references import resolve_reference
from segnn_ase.learn.worker import made
from segnn_ase.train import TrainConfig, evaluate_files, finetune, train

KELVIN = 300
APART, FAR_APART = 20, 100  # fs, between frames of a pool, and of the test
COLUMNS = {"labels": "d", "seed": "d", "how": "s", "learned": "d", "E": ".2f", "F": ".1f"}


def labelled(frames: Sequence[Atoms], reference: str) -> list[Atoms]:
    known = resolve_reference(reference)
    for frame in frames:
        calculator = made(known.factory, dict(known.arguments), known.strict)
        forces, energy = calculator.get_forces(frame), calculator.get_potential_energy(frame)
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=forces)
    return list(frames)


def kept(path: Path, make) -> Path:
    if not path.exists():
        write(path, make())
    return path


def errors_of(model: Path, test: Path) -> dict:
    found = evaluate_files(str(model), [str(test)])[str(test)]
    return {"E": 1e3 * found["energy_rmse"], "F": 1e3 * found["forces_rmse"]}  # meV/atom, meV/Å


def pretrained(args: argparse.Namespace, work: Path, start: Path) -> Path | None:
    """The potential of the cheaper reference, where one is asked for, as a loop begins with it."""
    if args.pretraining is None:
        return None
    usual = {"pretraining": args.pretraining, "aim": {"forces": 30.0}}
    config = LearnConfig.parse(settings_of(args, start, work / "begin.pt") | usual)
    learn(loop_of_pretraining(config, args.minutes, are_molecules=True), progress=False)
    return config.pretrained


def settings_of(args: argparse.Namespace, start: Path, out: Path) -> dict:
    return {
        "out": str(out),
        "structures": str(start),
        "reference": args.reference,
        "conditions": {"temperature": KELVIN},
        "aim": {"forces": args.aim},
        "model": {"preset": "fast"},
    }


def by_choice(
    args: argparse.Namespace, work: Path, start: Path, begin: Path | None, labels: int, seed: int
) -> tuple[Path, int]:
    out = work / f"chosen-{labels}-{seed}-{args.structures // labels}.pt"
    config = settings_of(args, start, out) | {
        "budget": {"labels": labels, "minutes": args.minutes},
        "training": {"epochs": args.structures // labels},
        "seed": seed,
    }
    if begin is not None:
        config |= {"pretraining": {"model": str(begin)}, "model": {}}
    learn(LearnConfig.parse(config), progress=False)
    last = max((out.with_suffix(".learn")).glob("final-*/train.xyz"), key=lambda path: path.stat().st_mtime)
    return out, len(read(last, ":"))


def at_random(
    args: argparse.Namespace, work: Path, start: Path, begin: Path | None, labels: int, seed: int
) -> tuple[Path, int]:
    how, most = "scratch" if args.pretraining and begin is None else "random", max(args.labels)
    out, source = (work / f"{how}-{labels}-{seed}-{args.structures // labels}.{kind}" for kind in ("pt", "xyz"))
    pool = kept(
        work / f"pool-{seed}.xyz", lambda: sampled(read(start), args.pool, kelvin=KELVIN, seed=seed, every=APART)
    )
    frames = read(pool, ":")
    chosen = np.random.default_rng(seed).permutation(len(frames))[:most]
    known = kept(work / f"random-{seed}-{most}.xyz", lambda: labelled([frames[n] for n in chosen], args.reference))
    kept(source, lambda: read(known, f":{labels}"))
    if not out.exists():
        training = {"epochs": args.structures // labels, "seed": seed}
        config = {"out": str(out), "data": {"train": str(source)}, "training": training}
        if begin is None:
            train(TrainConfig.parse({**config, "model": {"preset": "fast"}}), progress=False)
        else:
            finetune(str(begin), TrainConfig.parse(config), progress=False)
    return out, labels


def compare_labels(args: argparse.Namespace) -> list[dict]:
    work = args.work / args.molecule / args.reference
    work.mkdir(parents=True, exist_ok=True)
    start = kept(work / "start.xyz", lambda: molecule(args.molecule))
    frames = partial(sampled, read(start), args.test, kelvin=KELVIN, seed=10_001, every=FAR_APART)
    test = kept(work / "test.xyz", lambda: labelled(frames(), args.reference))
    begin = pretrained(args, work, start)
    ways = {
        "chosen": partial(by_choice, args, work, start, begin),
        "random": partial(at_random, args, work, start, begin),
    }
    if begin is not None:
        ways["scratch"] = partial(at_random, args, work, start, None)
    rows = []
    for seed in range(args.seeds):
        for labels in args.labels:
            for how, make in ways.items():
                model, learned = make(labels, seed)
                row = {"labels": labels, "seed": seed, "how": how, "learned": learned, **errors_of(model, test)}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--molecule", default="CH3CH2OH", help="of ASE's set g2")
    parser.add_argument("--reference", default="gfn2-xtb", help="short name of `segnn learn`")
    parser.add_argument("--pretraining", help="short name of a cheaper reference to begin with")
    parser.add_argument("--labels", type=int, nargs="+", default=[30, 60])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--structures", type=int, default=20_000, help="that a training sees, in all epochs")
    parser.add_argument("--pool", type=int, default=1000, help="frames that random ones are drawn from")
    parser.add_argument("--test", type=int, default=200, help="frames of the test")
    parser.add_argument("--aim", type=float, default=5.0, help="meV/Å, of the loops: small, that all labels are made")
    parser.add_argument("--minutes", type=float, default=15.0, help="budget of a loop")
    parser.add_argument("--work", type=Path, default=Path("learn_labels"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    print_table(compare_labels(args), COLUMNS)
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
