"""The `segnn` command: a few lines a sub-command, heavy imports where they are used."""

import ctypes
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from segnn_ase.base.errors import OutOfTime, SEGNNError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="SEGNN interatomic potentials: train, fine-tune, evaluate and run molecular dynamics.",
)
OUT_OF_TIME = 75  # exit status: sysexits.h calls it a temporary failure, try again
Paths = Annotated[list[str] | None, typer.Option(help="frames that ASE reads; may be repeated")]
Text = Annotated[str | None, typer.Option()]
Number = Annotated[float | None, typer.Option()]
Count = Annotated[int | None, typer.Option()]
Minutes = Annotated[float | None, typer.Option(help="of wall-clock time; exit status 75: the same command goes on")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores")]


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="TOML file with \\[data], \\[model] and \\[training]")] = None,
    train: Paths = None,
    valid: Paths = None,
    test: Paths = None,
    out: Text = None,
    preset: Annotated[str | None, typer.Option(help="segnn, fast, tfn, egnn, schnet")] = None,
    cutoff: Annotated[float | None, typer.Option(help="Å")] = None,
    isolated_atoms: Annotated[str | None, typer.Option(help="file with one frame per element, for E0")] = None,
    energy_key: Text = None,
    forces_key: Text = None,
    stress_key: Text = None,
    epochs: Count = None,
    batch_size: Count = None,
    max_edges: Count = None,
    learning_rate: Number = None,
    energy_weight: Number = None,
    forces_weight: Number = None,
    stress_weight: Number = None,
    patience: Count = None,
    seed: Count = None,
    committee: Annotated[int | None, typer.Option(help="potentials that differ in their seeds")] = None,
    max_minutes: Minutes = None,
    device: Text = None,
    dtype: Text = None,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard")] = None,
    threads: Threads = None,
):
    """Train a potential; options override the TOML file. The same command goes on where it was stopped."""
    given = {name: value for name, value in locals().items() if value is not None}
    with reported_errors():
        from segnn_ase.train.start import train as run

        _prepare_process(threads)
        run(_train_config(given))


@app.command()
def finetune(
    model: Annotated[str, typer.Argument(help="model file or name of a shipped potential")],
    train: Paths = None,
    valid: Paths = None,
    test: Paths = None,
    out: Text = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with \\[data] and \\[training]")] = None,
    energy_key: Text = None,
    forces_key: Text = None,
    stress_key: Text = None,
    epochs: Count = None,
    batch_size: Count = None,
    learning_rate: Number = None,
    freeze: Annotated[list[str] | None, typer.Option(help="part to keep, such as segnn.messages.0")] = None,
    seed: Count = None,
    max_minutes: Minutes = None,
    device: Text = None,
    threads: Threads = None,
):
    """Go on from a trained model on new frames, also of another level of theory."""
    given = {name: value for name, value in locals().items() if value is not None and name != "model"}
    with reported_errors():
        from segnn_ase.train.start import finetune as run

        _prepare_process(threads)
        run(model, _train_config(given))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="model file or name of a shipped potential")],
    frames: Annotated[list[str], typer.Argument(help="labelled frames")],
    energy_key: Text = None,
    forces_key: Text = None,
    stress_key: Text = None,
    device: str = "auto",
    threads: Threads = None,
):
    """Print the errors of a model on labelled frames."""
    with reported_errors():
        from segnn_ase.data.frames import LabelKeys
        from segnn_ase.train.evaluation import evaluate_files
        from segnn_ase.train.report import error_table

        _prepare_process(threads)
        keys = LabelKeys(energy=energy_key, forces=forces_key, stress=stress_key)
        typer.echo(error_table(evaluate_files(model, frames, keys=keys, device=device)))


@app.command()
def check(
    frames: Annotated[list[str], typer.Argument(help="training frames")],
    valid: Paths = None,
    test: Paths = None,
    isolated_atoms: Annotated[str | None, typer.Option(help="file with one frame per element, for E0")] = None,
    energy_key: Text = None,
    forces_key: Text = None,
    stress_key: Text = None,
    out: Annotated[Path | None, typer.Option(help="report in Markdown, with a figure beside it")] = None,
    fix: Annotated[str | None, typer.Option(help="new file for the frames, repaired where that is safe")] = None,
):
    """Find what would spoil a training: labels, units, signs, copies, outliers. Exit status 1 if there is an error."""
    with reported_errors():
        from segnn_ase.check.doctor import check as run
        from segnn_ase.check.repair import repair
        from segnn_ase.check.report import write_report
        from segnn_ase.data.frames import LabelKeys

        keys = LabelKeys(energy=energy_key, forces=forces_key, stress=stress_key)
        report = run(frames, valid=valid or (), test=test or (), isolated_atoms=isolated_atoms, keys=keys)
        typer.echo(report.markdown())
        if out is not None:
            typer.echo(f"wrote {', '.join(write_report(report, out))}")
        if fix is not None:
            typer.echo("\n".join(repair(report, fix, keys)))
        sys.exit(1 if report.errors else 0)


@app.command()
def info(model: Annotated[str, typer.Argument(help="model file or name of a shipped potential")]):
    """Show what a model is: elements, settings, reference energies, measured errors."""
    with reported_errors():
        from segnn_ase.store.model_file import describe, load_committee

        typer.echo(describe(load_committee(model)))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="model file or name of a shipped potential")],
    structure: Annotated[str, typer.Argument(help="file that ASE reads; its last frame is used")],
    device: str = "auto",
    dtype: Text = None,
    accelerate: Annotated[str, typer.Option(help="auto, off, require: compiled code")] = "auto",
    neighbor_backend: Annotated[str, typer.Option(help="auto, matscipy, torch_cluster")] = "auto",
    steps: Annotated[int | None, typer.Option(help="at constant energy; default: by the size")] = None,
    seed: int = 0,
    json: Annotated[Path | None, typer.Option(help="file for the lines as JSON")] = None,
    png: Annotated[Path | None, typer.Option(help="file for a figure")] = None,
    store: Annotated[bool, typer.Option("--store", help="write the result into the model file")] = False,
    threads: Threads = None,
):
    """Check symmetries, derivatives, smoothness and more on a structure; exit status 1 where one does not hold."""
    given = {name: value for name, value in locals().items() if name in VERIFY_OPTIONS}
    with reported_errors():
        from segnn_ase.md.outputs import read_structure
        from segnn_ase.store.model_file import load_with_metadata
        from segnn_ase.verify.certificate import table, write
        from segnn_ase.verify.run import verify as run

        _prepare_process(threads)
        if store:
            load_with_metadata(model)  # refuses what cannot keep it, before all the work
        certificate = run(model, read_structure(structure), progress=True, **given)
        typer.echo(table(certificate))
        for path in write(certificate, json=json, png=png, model=model if store else None):
            typer.echo(f"wrote {path}")
        sys.exit(0 if certificate.passed else 1)


@app.command()
def md(
    structure: Annotated[str, typer.Argument(help="file that ASE reads; its last frame is the start")],
    model: Annotated[list[str], typer.Option(help="model file or shipped name; several make a committee")],
    out: Annotated[str, typer.Option(help="prefix of every file that is written")] = "md",
    ensemble: Annotated[str, typer.Option(help="nve, langevin, nhc, npt")] = "langevin",
    temperature: Annotated[float, typer.Option(help="K")] = 300.0,
    pressure: Annotated[float, typer.Option(help="GPa, npt")] = 0.0,
    timestep: Annotated[float, typer.Option(help="fs")] = 0.5,
    steps: int = 1000,
    friction: Annotated[float, typer.Option(help="1/fs, langevin")] = 0.01,
    seed: int = 0,
    save_every: Annotated[int, typer.Option(help="steps between frames")] = 100,
    log_every: int = 10,
    stop_outside_domain: Annotated[
        bool, typer.Option("--stop-outside-domain", help="stop at a structure outside the training data")
    ] = False,
    max_forces_std: Annotated[float | None, typer.Option(help="eV/Å; stop at more uncertain forces")] = None,
    max_minutes: Minutes = None,
    rdf: Annotated[list[str] | None, typer.Option(help="pair for a radial distribution, such as O-H")] = None,
    device: str = "auto",
    dtype: Text = None,
    accelerate: Annotated[str, typer.Option(help="auto, off, require: compiled code on the CPU")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the files of an earlier run")] = False,
    threads: Threads = None,
):
    """Run molecular dynamics; the same command goes on where it was stopped."""
    given = {name: value for name, value in locals().items() if name in MD_OPTIONS}
    with reported_errors():
        from segnn_ase.calculator import SEGNNCalculator
        from segnn_ase.md.analysis import check_pairs
        from segnn_ase.md.outputs import plot_run, read_structure
        from segnn_ase.md.run import run_md
        from segnn_ase.md.settings import MDConfig

        _prepare_process(threads)
        files = {"trajectory": f"{out}.xyz", "log": f"{out}.csv", "restart": f"{out}.npz"}
        config = MDConfig.parse({**given, **files})
        atoms = read_structure(structure)
        if rdf:
            check_pairs(rdf, atoms)
        models = model if len(model) > 1 else model[0]
        atoms.calc = SEGNNCalculator(models, device=device, dtype=dtype, accelerate=accelerate)
        result = run_md(atoms, config, overwrite=overwrite)
        written = plot_run(result, out, pairs=rdf or ())
        typer.echo(summary_of(result))
        typer.echo(f"wrote {', '.join([*files.values(), *map(str, written)])}")


def summary_of(result) -> str:
    """What a run of molecular dynamics was like, in one line; leaves out what there is not."""
    parts = [f"mean temperature {result.mean_temperature:.1f} K"]
    if math.isfinite(result.ms_per_step):
        parts = [f"{result.ms_per_step:.2f} ms/step", f"{result.ns_per_day:.3f} ns/day", *parts]
    else:
        parts = ["already complete", *parts]
    if math.isfinite(result.energy_slope):
        parts.append(f"slope of the conserved energy {1e3 * result.energy_slope:.3g} meV/atom/ps")
    outside, spread = result.log["outside"], result.log["forces_std"]
    if (spread >= 0).any():
        parts.append(f"forces uncertain by up to {max(spread[spread >= 0]):.2g} eV/Å")
    if (outside > 0).any():
        parts.append(f"{int((outside > 0).sum())} of {len(outside)} logged steps outside the training data")
    return ", ".join(parts)


class reported_errors:
    """Turn the package's and the system's errors into one line on stderr, exit status 1; bugs keep their traceback."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OutOfTime):
            typer.echo(str(error), err=True)
            sys.exit(OUT_OF_TIME)
        if isinstance(error, SEGNNError | OSError | ImportError):
            typer.echo(f"error: {error}", err=True)
            sys.exit(1)
        if isinstance(error, KeyboardInterrupt):
            typer.echo(str(error) or "interrupted", err=True)
            sys.exit(130)
        return False


VERIFY_OPTIONS = "device dtype accelerate neighbor_backend steps seed".split()
MD_OPTIONS = (
    "ensemble temperature pressure timestep steps friction seed save_every log_every stop_outside_domain "
    "max_forces_std max_minutes"
).split()
DATA_OPTIONS = ("train", "valid", "test", "isolated_atoms", "energy_key", "forces_key", "stress_key")
TRAINING_OPTIONS = (
    "epochs batch_size max_edges learning_rate energy_weight forces_weight stress_weight patience seed committee "
    "max_minutes device dtype "
    "tensorboard freeze"
).split()


def _train_config(given: dict):
    """Merge TOML file and options, which go first."""
    from segnn_ase.base.settings import read_toml
    from segnn_ase.train.settings import TrainConfig

    values = read_toml(given["config"]) if "config" in given else {}
    sections = {
        "data": {name: given[name] for name in DATA_OPTIONS if name in given},
        "model": {name: given[name] for name in ("preset", "cutoff") if name in given},
        "training": {name: given[name] for name in TRAINING_OPTIONS if name in given},
    }
    for name, options in sections.items():
        section = values.get(name, {})
        if isinstance(section, dict):  # what is no table is refused by `parse`
            values[name] = {**section, **options}
    if "out" in given:
        values["out"] = given["out"]
    return TrainConfig.parse(values)


def _prepare_process(threads: int | None) -> None:
    """Settings that belong to a process of our own, never to the library: threads and the memory allocator."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if sys.platform == "linux":
        # glibc gives blocks of over 128 kB back to the system after every use; getting them again, page by page,
        # costs a quarter of a training step
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
