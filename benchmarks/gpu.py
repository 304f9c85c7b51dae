"""Everything that is to be known about a GPU, in one command of a few minutes: tests, kernels, steps, training.

    python benchmarks/gpu.py --out gpu_h100

Prints tables, and writes one JSON file, anew after each part. First all kernels are compiled by several processes
beside each other, then the tests that need a GPU run, and then, with nothing beside it, everything is timed: the card's
own rates, whole MD steps against size (`md_step.py`), training steps (`train_step.py`), the kernels of an evaluation,
neighbour lists. The times of kernels are those of `torch.profiler`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from calculators import build
from report import machine, print_table
from systems import system
from torch.profiler import ProfilerActivity, profile

HERE = Path(__file__).parent
TESTS = [
    "tests/test_gpu.py",
    "tests/compiled/test_triton.py",
    "tests/structure/test_neighbors.py",
    "tests/test_calculator.py",
]
QUIET: dict = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
SELECTED = "gpu or triton or cuda"  # in the names of tests and their files
SMALL, LARGE = "acetylacetone", ["acetylacetone", "water192", "water1536", "water12288", "water98304"]


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def compile_all(presets: list[str], out: Path) -> None:
    """Each preset in both precisions, evaluation and training, beside each other; kernels are kept by Triton."""
    short = ["--device", "cuda", "--rounds", 1]
    commands = {}
    for preset in presets:
        train = [*short, "--presets", preset, "--batches", SMALL, "--steps", 1, "--out", out / f"warm_{preset}"]
        commands[f"{preset} training"] = python(HERE / "train_step.py", *train)
        for dtype in ("float32", "float64"):
            step = ["--calculators", preset, "--systems", SMALL, "--seconds", 0.1, "--dtype", dtype]
            step += ["--out", out / f"warm_{preset}_{dtype}"]
            commands[f"{preset} {dtype}"] = python(HERE / "md_step.py", *short, *step)
    begun = time.time()
    running = {name: subprocess.Popen(c, **QUIET) for name, c in commands.items()}
    for name, process in running.items():
        _, said = process.communicate()
        failed = said.strip()[-400:] if process.returncode else ""
        print(f"{name} compiled after {time.time() - begun:.0f} s {failed}", flush=True)


def rates() -> dict:
    """Measured: GB/s of a copy, read and written, and TFLOP/s of float32 and float64 matrix products."""
    x = torch.randn(2**28, device="cuda")
    y = torch.empty_like(x)
    found = {"copy_GB/s": 2 * x.nbytes / milliseconds(lambda: y.copy_(x)) / 1e6}
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        found[f"{dtype}_TFLOP/s".removeprefix("torch.")] = 2 * 8192**3 / milliseconds(lambda a=a: a @ a) / 1e9
    return found


def milliseconds(run: Callable, n: int = 5) -> float:
    run()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(n):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / n


def profiled(name: str, systems: list[str], dtype: str, n: int = 10) -> list[dict]:
    """Of n steps: wall time, time in kernels, how many kernels, and which take the most."""
    rows, calculator = [], build(name, dtype, "cuda")
    for which in systems:
        atoms = system(which)
        atoms.calc = calculator

        def step(atoms=atoms):
            atoms.positions[0, 0] += 1e-4
            atoms.get_forces()

        for _ in range(4):
            step()
        begin = time.perf_counter()
        for _ in range(n):
            step()
        wall = 1e3 * (time.perf_counter() - begin) / n
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            for _ in range(n):
                step()
        kernels: dict[str, list[float]] = defaultdict(list)
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kernels[event.name].append(event.time_range.elapsed_us() / 1e3 / n)
        times = sorted(((sum(t), len(t) / n, k) for k, t in kernels.items()), reverse=True)
        row = {"calculator": name, "dtype": dtype, "system": which, "atoms": len(atoms), "wall_ms": wall}
        row |= {"kernels_ms": sum(t for t, *_ in times), "kernels": sum(c for _, c, _ in times), "most": times[:40]}
        rows.append(row)
        print(f"{name} {dtype} {which}: {wall:.2f} ms, {row['kernels']:.0f} kernels {row['kernels_ms']:.2f} ms")
        for t, count, kernel in times[:14]:
            print(f"    {t:8.4f} ms {count:6.1f} x {kernel[:110]}")
    return rows


def neighbors(systems: list[str], cutoff: float = 5.5) -> list[dict]:
    from segnn_ase.structure.neighbors import device_neighbor_list

    rows = []
    for name in systems:
        atoms = system(name)
        given = (atoms.positions, atoms.cell.array, atoms.pbc, cutoff, torch.device("cuda"))
        ms = milliseconds(lambda given=given: device_neighbor_list(*given), 2)
        rows.append({"system": name, "atoms": len(atoms), "list_ms": ms})
    print_table(rows, {"system": "", "atoms": "d", "list_ms": ".2f"})
    return rows


def json_of(command: list[str], out: Path) -> list[dict]:
    Path(f"{out}.json").unlink(missing_ok=True)
    subprocess.run([*command, "--out", str(out)], stdout=subprocess.DEVNULL)
    return json.loads(Path(f"{out}.json").read_text())["rows"] if Path(f"{out}.json").exists() else []


def run_tests(workers: int) -> str:
    """Failures are printed; returns pytest's last line."""
    chosen = ["-q", "-n", workers, "-m", "not proof", "-W", "default", *TESTS, "-k", SELECTED]
    done = subprocess.run(python("-m", "pytest", *chosen), cwd=HERE.parent, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    print("\n".join(line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))))
    return lines[-1] if lines else done.stderr.strip()[-400:]


def md_steps(a: argparse.Namespace, dtype: str, out: Path) -> list[dict]:
    steps = python(HERE / "md_step.py", "--device", "cuda", "--rounds", 1, "--threads", 4, "--dtype", dtype)
    rows = json_of([*steps, "--calculators", *a.presets, "--systems", *a.systems], out.parent / f"md_{dtype}")
    print_table(rows, {"calculator": "", "dtype": "", "atoms": "d", "wall_ms": ".3f", "peak_MB": ".0f"})
    return rows


def train_steps(presets: list[str], out: Path) -> list[dict]:
    steps = python(HERE / "train_step.py", "--device", "cuda", "--rounds", 1, "--presets", *presets)
    rows = json_of(steps, out.parent / "train")
    times = dict.fromkeys(("torch_ms", "layers_ms", "engine_ms", "soap_ms"), ".1f")
    print_table(rows, {"preset": "", "frames": "d", "atoms": "d", **times})
    return rows


def profiles(a: argparse.Namespace) -> list[dict]:
    rows = [row for p in a.presets for row in profiled(p, ["acetylacetone", "water1536", "water12288"], "float32")]
    return rows + [row for name in a.shipped for row in profiled(name, ["water192", "water12288"], "float32")]


PARTS: dict[str, Callable] = {
    "tests": lambda a, out: run_tests(a.workers),
    "rates": lambda a, out: rates(),
    "md_float32": lambda a, out: md_steps(a, "float32", out),
    "train": lambda a, out: train_steps(a.presets, out),
    "profile": lambda a, out: profiles(a),
    "neighbors": lambda a, out: neighbors(a.systems[1:]),
    "md_float64": lambda a, out: md_steps(a, "float64", out),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["fast", "segnn"])
    parser.add_argument("--shipped", nargs="+", default=["water-pbe0"], help="with domain and uncertainty")
    parser.add_argument("--systems", nargs="+", default=LARGE)
    parser.add_argument("--skip", nargs="+", default=[], choices=PARTS)
    parser.add_argument("--workers", type=int, default=8, help="for tests")
    parser.add_argument("--out", default="gpu")
    a = parser.parse_args()
    out, found = Path(a.out).resolve(), {"device": torch.cuda.get_device_name(), "machine": machine()}
    begun = time.time()
    compile_all(a.presets, out.parent)
    for part in [p for p in PARTS if p not in a.skip]:
        found[part] = PARTS[part](a, out)
        if isinstance(found[part], str | dict):
            print(found[part])
        print(f"{part}: done after {time.time() - begun:.0f} s", flush=True)
        Path(f"{out}.json").write_text(json.dumps(found, indent=1))
    print(f"wrote {out}.json after {time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
