"""Training and fine-tuning: one loop, to be read from top to bottom.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same
command and, on one CPU thread, ends with the same bits.
"""

from pathlib import Path

from segnn_ase.base.devices import resolve_device
from segnn_ase.base.errors import ConfigError, ModelFileError
from segnn_ase.store.model_file import COMMITTEE, Committee, load_with_metadata, save_committee
from segnn_ase.store.tensors import load_tensors
from segnn_ase.train.evaluation import committee_residuals, errors_of, speed_up, spread_factor
from segnn_ase.train.job import Training, output_files
from segnn_ase.train.loop import run_training
from segnn_ase.train.prepare import prepare
from segnn_ase.train.report import error_table, plot_parities, printer
from segnn_ase.train.settings import TrainConfig


def train_committee(config: TrainConfig, deadline: float, *, progress: bool) -> dict:
    """Train potentials that differ in their seeds on the same frames, and put them into one file.

    Their spread is too small by a factor that is measured on the validation set and kept with them.
    """
    output_files(config.out)  # refuses other names
    refuse_all_but_committees(config.out)
    report, members = printer(progress), [member_config(config, k) for k in range(1, config.training.committee + 1)]
    for k, member in enumerate(members, 1):
        report(f"member {k} of {len(members)}")
        job = prepare(member, split_seed=config.training.seed, report=report if k == 1 else lambda text: None)
        run_training(member, job, deadline, progress=progress)
    return finish_committee(config, members, job, progress=progress)


def member_config(config: TrainConfig, k: int) -> TrainConfig:
    """The settings of the k-th member, from 1: a seed and a file of its own."""
    settings = config.training.model_copy(update={"committee": 1, "seed": config.training.seed + k - 1})
    return config.model_copy(update={"out": str(Path(config.out).with_suffix(f".{k}.pt")), "training": settings})


def refuse_all_but_committees(out: str) -> None:
    """Raise ConfigError for a file that is there and is no committee."""
    if not Path(out).exists():
        return
    try:
        known = load_tensors(out).get("format") == COMMITTEE
    except ModelFileError:
        known = False
    if not known:
        raise ConfigError(f"out is {out!r}, which exists and is no committee to go on with: rename or remove it")


def finish_committee(config: TrainConfig, members: list[TrainConfig], job: Training, *, progress: bool) -> dict:
    """Measure the spread of the members against their errors, and write the committee's file."""
    potentials = [load_with_metadata(member.out)[0] for member in members]
    for potential in potentials:
        speed_up(potential.to(resolve_device(config.training.device)), job.train, config.training.accelerate)
    values = committee_residuals(potentials, job.valid or job.train, config.training)
    factors = {name: spread_factor(values, name) for name in ("energy", "forces", "stress")}
    metadata = {"training": config.model_dump(mode="json")}
    errors = {}
    for name, items in {"valid": job.valid, **job.test}.items():
        if items:
            found = committee_residuals(potentials, items, config.training, factors)
            errors[name] = {k: v for k, v in errors_of(found).items() if k != "loss"}
            plot_parities(Path(config.out), Path(name).stem, found)
    save_committee(config.out, Committee(potentials, factors, {**metadata, "errors": errors}))
    printer(progress)(f"{error_table(errors)}\nwrote {config.out}")
    return errors
