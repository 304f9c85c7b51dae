"""`segnn learn` and `segnn select`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segnn_ase.base.errors import ConfigError
from segnn_ase.base.settings import read_toml
from segnn_ase.commands.shared import Device, Out, Overwrite, Threads, app, prepare_process, reported_errors
from segnn_ase.learn.references import REFERENCES
from segnn_ase.model.settings import PRESETS

if TYPE_CHECKING:
    from segnn_ase.learn.settings import LearnConfig

SMOOTH = [name for name in PRESETS if name != "segnn2022"]
GIVEN = {  # option: section and setting
    "reference": ("reference", "calculator"),
    "workers": ("reference", "workers"),
    "temperature": ("conditions", "temperature"),
    "pressure": ("conditions", "pressure"),
    "picoseconds": ("conditions", "picoseconds"),
    "aim": ("aim", "forces"),
    "labels": ("budget", "labels"),
    "minutes": ("budget", "minutes"),
    "preset": ("model", "preset"),
}


@app.command(
    "learn", epilog="Example: segnn learn salt.cif --reference sevennet-l3i5 --temperature 300:1200 --out salt.pt"
)
def learn_command(
    given: Annotated[
        list[str], typer.Argument(help="structures that ASE reads, or a TOML file", metavar="STRUCTURE...|TOML")
    ],
    reference: Annotated[
        str | None, typer.Option(help=f"what labels frames, required: {', '.join(REFERENCES)}, or module:Class")
    ] = None,
    pretraining: Annotated[
        str | None,
        typer.Option(
            help="cheaper reference that is learned first, or a model to begin with (file or shipped); default: none"
        ),
    ] = None,
    temperature: Annotated[
        list[str] | None, typer.Option(help="K; 300:1200 means 300, 750 and 1200; default: 300")
    ] = None,
    pressure: Annotated[
        list[float] | None, typer.Option(help="GPa, at which the volume moves; default: the cell stays")
    ] = None,
    picoseconds: Annotated[
        float | None, typer.Option(help="ps that must run at every condition without a stop; default: 10")
    ] = None,
    aim: Annotated[float | None, typer.Option(help="meV/Å, rms error on its own dynamics; default: 40")] = None,
    labels: Annotated[
        int | None, typer.Option(help="labels in all, 20 or more, within --minutes; default: as these allow")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="minutes in all, roughly; default: 60")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="from which model settings start; default: segnn",
            metavar="|".join(SMOOTH),
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="processes of --reference that label side by side; default: 1")
    ] = None,
    out: Out = None,
    threads: Threads = None,
):
    """Learn a potential from a structure and anything that labels frames: labels, trainings and dynamics in turn.

    The same command goes on where it was stopped. Everything is kept in a folder beside the model, and a report tells
    what was found. All settings: a TOML file.
    """
    options = locals()
    with reported_errors():
        from segnn_ase.learn.loop import learn
        from segnn_ase.learn.settings import LearnConfig

        prepare_process(threads)
        config = LearnConfig.parse(_with_options(_settings_in(given), options))
        found = learn(_on_threads(config, threads) if threads else config)
        verdict = "the aim is reached" if found.reached else f"the aim is not reached: {found.why}"
        typer.echo(f"{verdict}; {found.labels} labels, {found.minutes:.1f} minutes")
        typer.echo(f"wrote {found.model} and {found.report}")


def _with_options(values: dict, options: dict) -> dict:
    """The settings of a file, or none, with options before them. Raises ConfigError without a reference."""
    if isinstance(values.get("reference"), str):
        values["reference"] = {"calculator": values["reference"]}
    for name, (section, setting) in GIVEN.items():
        if options[name] not in (None, []):
            known = values.get(section, {})
            if isinstance(known, dict):  # what is no table is refused by `parse`
                values[section] = {**known, setting: options[name]}
    if options["pretraining"] is not None:
        values["pretraining"] = _pretraining_in(values, options["pretraining"])
    if not values.get("reference"):
        raise ConfigError(f"reference is missing: give --reference, {', '.join(REFERENCES)}, or module:Class")
    return values if options["out"] is None else {**values, "out": options["out"]}


def _on_threads(config: "LearnConfig", threads: int) -> "LearnConfig":
    """With as many for references that are not given theirs."""
    own, first = config.reference, config.pretraining
    config = config.model_copy(update={"reference": own.on_threads(threads)})
    if first is None or first.reference is None:
        return config
    cheaper = first.model_copy(update={"reference": first.reference.on_threads(threads)})
    return config.model_copy(update={"pretraining": cheaper})


def _pretraining_in(values: dict, given: str):
    """The table of a file with this reference or model in place of its own."""
    from segnn_ase.learn.settings import PretrainingConfig

    table: Any = values.get("pretraining")
    first: dict[str, Any] = PretrainingConfig.named(given)
    if not isinstance(table, dict):
        return first
    reference = table.get("reference")
    if isinstance(reference, dict) and "reference" in first:
        first = {"reference": {**reference, "calculator": given}}
    return {**{name: value for name, value in table.items() if name not in ("reference", "model")}, **first}


def _settings_in(given: list[str]) -> dict:
    """Settings of a TOML file, or structures alone."""
    for path in given:
        if path.replace(".", "").isdecimal() and not Path(path).exists():
            raise ConfigError(f"structures has {path!r}, and there is no such file; several temperatures: 300,600")
    tables = [path for path in given if Path(path).suffix == ".toml"]
    if not tables:
        return {"structures": given}
    if len(given) > 1:
        raise ConfigError(f"given are {', '.join(given)}; expected one TOML file, which names the structures, or these")
    return read_toml(tables[0])


@app.command("select", epilog="Example: segnn select frames.xyz --model cu-al.pt --n 50 --out selected.xyz")
def select_command(
    frames: Annotated[list[str], typer.Argument(help="structures of any format of ASE")],
    model: Annotated[str, typer.Option(help="model file or name of a shipped potential")],
    n: Annotated[int | None, typer.Option(min=1, help="how many; default: 50, or all of fewer")] = None,
    out: Annotated[str, typer.Option(help="new file, .xyz or .extxyz")] = "selected.xyz",
    device: Device = "auto",
    overwrite: Overwrite = False,
    threads: Threads = None,
):
    """Write the structures that a potential would learn most from, no two of a kind, the most informative first."""
    with reported_errors():
        from segnn_ase.learn.selection import select_frames

        prepare_process(threads)
        typer.echo("\n".join(select_frames(model, frames, out, n, device=device, overwrite=overwrite)))
