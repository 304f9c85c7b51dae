"""Cost of a training step: compiled code against plain PyTorch, on frames made here.

    python benchmarks/train_step.py

A step is the loss of energies and forces, its gradient with respect to all weights, and Adam; the batches are five
frames of acetylacetone (the default recipe; `--frames` of them), and one of 64 water molecules; `engine_ms` is all
passes in C, or by Triton, and `soap_ms` the same with the optimiser of trainings instead of Adam. With `--device cuda`
times are wall times.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from calculators import random_potential
from report import plot_lines, print_table, save
from systems import system

from segnn_ase.compiled.cpu_training import CpuLossGradient
from segnn_ase.compiled.gpu_training import GpuLossGradient
from segnn_ase.compiled.layers import FUSED
from segnn_ase.model.predict import PlainLossGradient
from segnn_ase.structure.graph import collate, graph_from_atoms, with_pairs
from segnn_ase.train.optimizers import Soap
from segnn_ase.train.settings import OptimConfig

BATCHES = {"acetylacetone": 5, "water192": 1}


def batch(name: str, size: int, cutoff: float):
    graphs = []
    for seed in range(size):
        atoms = system(name)
        atoms.rattle(0.05, rng=np.random.default_rng(seed))
        graphs.append(with_pairs(graph_from_atoms(atoms, cutoff)))
    return collate(graphs)


def loss_of(prediction) -> torch.Tensor:
    return prediction.energy.square().mean() + prediction.forces.square().mean()


def adam(weights: list) -> Callable:
    return torch.optim.Adam(weights, lr=1e-4).step


def soap(weights: list) -> Callable:
    settings = OptimConfig()
    betas, every = (settings.beta1, settings.beta2), settings.turn_every
    return partial(Soap(weights, betas=betas, weight_decay=settings.weight_decay, every=every).step, 1e-4)


def step_ms(potential, gradient, optimizer: Callable, graph, steps: int) -> float:
    move, times = optimizer(list(potential.parameters())), []
    clock = time.perf_counter if potential.device.type == "cuda" else time.process_time
    for _ in range(steps + 2):
        begin = clock()
        potential.zero_grad(set_to_none=True)
        gradient(graph, loss_of, forces=True, stress=False)
        move()
        if potential.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (clock() - begin))
    return float(np.median(times[2:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["segnn", "fast"])
    parser.add_argument("--batches", nargs="+", default=list(BATCHES), choices=BATCHES)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--frames", type=int, default=BATCHES["acetylacetone"], help="of acetylacetone in a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="train_step")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    rows = []
    for preset in a.presets:
        for name in a.batches:
            size = a.frames if name == "acetylacetone" else BATCHES[name]
            slow = random_potential(preset).train().to(a.device)
            layers, whole, other = (copy.deepcopy(slow) for _ in range(3))
            graph = batch(name, size, slow.cutoff).to(a.device)
            runs = {
                "torch_ms": (slow, PlainLossGradient(slow), adam),
                "layers_ms": (layers, PlainLossGradient(layers, FUSED), adam),
            }
            engine = CpuLossGradient if a.device == "cpu" else GpuLossGradient
            runs |= {"engine_ms": (whole, engine(whole), adam), "soap_ms": (other, engine(other), soap)}
            rounds = [[step_ms(*run, graph, a.steps) for run in runs.values()] for _ in range(a.rounds)]
            best = dict(zip(runs, np.min(rounds, axis=0).tolist(), strict=True))
            row = {"preset": preset, "atoms": len(graph.numbers), "frames": size, **best}
            rows.append(row | {"torch / best": best["torch_ms"] / min(best.values())})
    columns = {"preset": "", "frames": "d", "atoms": "d", **dict.fromkeys(best, ".1f"), "torch / best": ".2f"}
    print_table(rows, columns)
    labels = ("atoms in a batch", "time of a step [ms]")
    plot_lines(a.out, rows, group="preset", x="atoms", y="engine_ms", labels=labels)
    save(a.out, rows, vars(a))


if __name__ == "__main__":
    main()
