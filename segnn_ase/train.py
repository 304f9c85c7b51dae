"""Training and fine-tuning: one loop, to be read from top to bottom.

Everything random is a function of the seed and the epoch, so a killed training goes on with the same
command and, on one CPU thread, ends with the same bits.
"""

import copy
import csv
import io
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from segnn_ase import plot
from segnn_ase.accelerate import accelerate_training
from segnn_ase.assess import (
    characterize,
    committee_residuals,
    error_table,
    errors_of,
    evaluate,
    plot_parities,
    residuals,
    speed_up,
    spread_factor,
)
from segnn_ase.checkpoint import (
    COMMITTEE,
    Committee,
    checksum,
    load_tensors,
    load_with_metadata,
    save_committee,
    save_potential,
    save_tensors,
)
from segnn_ase.config import (
    ConfigError,
    DataError,
    ModelFileError,
    OptimConfig,
    OutOfTime,
    SEGNNError,
    TrainConfig,
    expect,
    model_config,
)
from segnn_ase.data import (
    Frame,
    LabelKeys,
    check_labels,
    check_species,
    energy_scale,
    label_table,
    read_frames,
    reference_energies,
    species_of,
    split_frames,
)
from segnn_ase.doctor import Sets, warn_or_refuse
from segnn_ase.files import clear_leftovers, progress_bar, stop_on_signal, write_atomically
from segnn_ase.graph import collate, edge_vectors
from segnn_ase.items import (
    Item,
    asked_for,
    collate_items,
    loss_and_prediction,
    loss_of,
    make_item,
    smallest_distances,
)
from segnn_ase.potential import Potential, assemble, parse_species, predict, resolve_device
from segnn_ase.stability import Stability, stability
from segnn_ase.training_engine import TrainingEngine

STATE_FORMAT = "segnn_ase training state"
BAR = "{percentage:3.0f}%|{bar}| epoch {n:.2f}/{total} [{elapsed}<{remaining}{postfix}]"
FINETUNE_DEFAULTS = {"epochs": 50, "learning_rate": 0.002, "weight_decay": 0.0}  # for settings that are not given


@dataclass
class Progress:
    """Where a training stands; with the seed it determines everything that follows."""

    epoch: int = 0
    batch: int = 0  # within the epoch
    step: int = 0
    loss: float = 0.0  # summed over the epoch's batches
    rate: float = 0.0  # learning rate of the last step
    best: float = math.inf  # validation loss of the model that is kept
    survived: float = 0.0  # and of its rollouts
    history: list[dict] = field(default_factory=list)


class Training(NamedTuple):
    """What a training works on, prepared once."""

    potential: Potential
    train: list[Item]
    valid: list[Item]
    test: dict[str, list[Item]]
    closest: dict[tuple[int, int], float]  # Å, see `smallest_distances`
    lone_atoms: bool  # whether E0 are energies of lone atoms
    before: Potential | None  # that is fine-tuned
    metadata: dict
    fingerprint: dict  # of settings, data and starting point


def train(config: TrainConfig, *, progress: bool = True) -> dict:
    """Train a potential from scratch and write it to config.out. Returns the errors on every set.

    Beside out = model.pt are written model.last.pt, model.csv, model.resume.pt and plots; a committee's members are
    model.1.pt, model.2.pt and so on. Raises DataError, ConfigError and FileNotFoundError for what cannot be trained
    on, OutOfTime when `max_minutes` are over.
    """
    expect(isinstance(config, TrainConfig), "config", config, "a TrainConfig, as by TrainConfig.parse(a dict)")
    deadline = deadline_of(config.training)
    if config.training.committee > 1:
        return train_committee(config, deadline, progress=progress)
    return run_training(config, prepare(config, report=_printer(progress)), deadline, progress=progress)


def train_committee(config: TrainConfig, deadline: float, *, progress: bool) -> dict:
    """Train potentials that differ in their seeds on the same frames, and put them into one file.

    Their spread is too small by a factor that is measured on the validation set and kept with them.
    """
    output_files(config.out)  # refuses other names
    refuse_all_but_committees(config.out)
    report, members = _printer(progress), [member_config(config, k) for k in range(1, config.training.committee + 1)]
    for k, member in enumerate(members, 1):
        report(f"member {k} of {len(members)}")
        job = prepare(member, split_seed=config.training.seed, report=report if k == 1 else lambda text: None)
        run_training(member, job, deadline, progress=progress)
    return finish_committee(config, members, job, progress=progress)


def member_config(config: TrainConfig, k: int) -> TrainConfig:
    """The settings of the k-th member, from 1: a seed and a file of its own."""
    settings = config.training.model_copy(update={"committee": 1, "seed": config.training.seed + k - 1})
    return config.model_copy(update={"out": str(Path(config.out).with_suffix(f".{k}.pt")), "training": settings})


def deadline_of(settings: OptimConfig) -> float:
    return math.inf if settings.max_minutes is None else time.monotonic() + 60 * settings.max_minutes


def finetune(model: str, config: TrainConfig, *, progress: bool = True) -> dict:
    """Go on from a trained model on new frames: E0 are shifted to the new level of theory, the rest is `train`."""
    expect(isinstance(config, TrainConfig), "config", config, "a TrainConfig, as by TrainConfig.parse(a dict)")
    if config.training.committee > 1:
        raise ConfigError(
            f"setting 'training.committee' is {config.training.committee}: fine-tune the members one by one"
        )
    if config.model:
        raise ConfigError(f"setting 'model' is {config.model}: fine-tuning keeps the architecture of {model}")
    given = config.training.model_dump(exclude_unset=True)
    config = config.model_copy(update={"training": OptimConfig(**{**FINETUNE_DEFAULTS, **given})})
    start = load_with_metadata(model)
    deadline = deadline_of(config.training)
    return run_training(config, prepare(config, start=start, report=_printer(progress)), deadline, progress=progress)


def run_training(config: TrainConfig, job: Training, deadline: float, *, progress: bool) -> dict:
    settings, files = config.training, output_files(config.out)
    clear_leftovers([config.out, *files.values()])
    potential = job.potential.to(resolve_device(settings.device))
    smallest = min(job.train, key=lambda item: len(item.graph.edge_src) or math.inf)
    engine = accelerate_training(potential, smallest.graph.to(potential.device), settings.accelerate)
    averaged = copy.deepcopy(potential).requires_grad_(False)
    weights = trainable(potential, settings.freeze)
    parameters, means = list(weights.values()), [dict(averaged.named_parameters())[name] for name in weights]
    optimizer = make_optimizer(parameters, settings)
    done = Progress()
    if files["resume"].is_file():
        done = load_state(files["resume"], job, potential, averaged, optimizer)
    else:  # first of all files: wherever it is killed, there is a training to go on with
        save_state(files["resume"], job, potential, averaged, optimizer, done)
    writer = tensorboard_writer(files["tensorboard"]) if settings.tensorboard else None

    bar = progress_bar(shown=progress, total=settings.epochs, bar_format=BAR)
    with stop_on_signal() as stopped, bar:
        bar.update(done.epoch)
        last_save = time.monotonic()
        while done.epoch < settings.epochs and not out_of_patience(done.history, settings.patience):
            batches = make_batches(job.train, settings, epoch=done.epoch)
            potential.train()
            while done.batch < len(batches):
                fraction = (done.epoch + done.batch / len(batches)) / settings.epochs
                done.rate = learning_rate(done.step, fraction, settings)
                batch = collate_items([job.train[n] for n in batches[done.batch]])
                loss = training_step(potential, engine, parameters, optimizer, batch, settings, done.rate)
                done.step, done.batch, done.loss = done.step + 1, done.batch + 1, done.loss + loss
                update_average(means, parameters, done.step, settings.ema_decay)
                bar.update(done.epoch + done.batch / len(batches) - bar.n)
                late = time.monotonic() > deadline
                if stopped or late or time.monotonic() - last_save > 60 * settings.save_minutes:
                    save_state(files["resume"], job, potential, averaged, optimizer, done)
                    last_save = time.monotonic()
                if stopped or late:
                    reason = KeyboardInterrupt if stopped else OutOfTime
                    raise reason(f"stopped in epoch {done.epoch + 1}; the same command goes on from {files['resume']}")
            check_finite(done, len(batches), settings)
            done.epoch, done.batch = done.epoch + 1, 0
            if done.epoch % settings.validate_every == 0 or done.epoch == settings.epochs:
                row = validate(averaged, job, settings, done, len(batches))
                done.history.append(row)
                bar.set_postfix_str(summary(row))
                if better(row, done, settings):
                    done.best, done.survived = row["valid_loss"], row["survived"] or 0.0
                    save_potential(config.out, averaged, metadata={**job.metadata, "epoch": done.epoch})
                write_history(files["csv"], done.history)
                log_scalars(writer, row)
            done.loss = 0.0
            if time.monotonic() - last_save > 60 * settings.save_minutes:
                save_state(files["resume"], job, potential, averaged, optimizer, done)
                last_save = time.monotonic()
        save_state(files["resume"], job, potential, averaged, optimizer, done)
        if stopped:  # in the last validation
            raise KeyboardInterrupt(f"stopped; the same command goes on from {files['resume']}")
    save_potential(files["last"], averaged, metadata={**job.metadata, "epoch": done.epoch})
    return finish(config, job, done.history, files, progress=progress)


def training_step(
    potential: Potential,
    engine: TrainingEngine | None,
    parameters: list,
    optimizer,
    batch: Item,
    settings: OptimConfig,
    rate: float,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    if engine is not None and any(asked_for(batch.labels).values()):
        loss = loss_by_engine(engine, batch, settings)
    else:
        loss = loss_and_prediction(potential, batch, settings)[0]
        loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    optimizer.step()
    return float(loss.detach())


def loss_by_engine(engine: TrainingEngine, batch: Item, settings: OptimConfig) -> Tensor:
    """The loss, with its gradient left in the parameters' `grad`."""
    graph, labels = batch.graph, batch.labels
    asked, vectors = asked_for(labels), edge_vectors(graph)

    def loss(energies: Tensor, g: Tensor) -> Tensor:
        return loss_of(assemble(graph, vectors, energies, g, None, **asked), graph, labels, settings)

    return engine.step(graph, loss)


def learning_rate(step: int, fraction: float, settings: OptimConfig) -> float:
    """Linear warm-up over steps, times a linear decay to zero over the whole training."""
    warmup = min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    return settings.learning_rate * warmup * (1.0 - fraction)


@torch.no_grad()
def update_average(means: list[Tensor], parameters: list[Tensor], step: int, decay: float) -> None:
    """Exponential moving average of the weights, shorter at the start."""
    torch._foreach_lerp_(means, parameters, 1.0 - min(decay, (1 + step) / (10 + step)))


def make_optimizer(parameters: list, settings: OptimConfig) -> torch.optim.Optimizer:
    options = {"lr": settings.learning_rate, "betas": (0.9, settings.beta2), "fused": True}
    if settings.weight_decay > 0:
        return torch.optim.AdamW(parameters, **options, weight_decay=settings.weight_decay)
    return torch.optim.Adam(parameters, **options)


def trainable(potential: Potential, freeze: tuple[str, ...]) -> dict[str, Tensor]:
    """Named parameters that are not frozen. Raises ConfigError for a name that freezes nothing."""
    names = [name for name, _ in potential.named_parameters()]
    for prefix in freeze:
        if not any(name == prefix or name.startswith(prefix + ".") for name in names):
            parts = sorted({".".join(name.split(".")[:3]) for name in names})
            raise ConfigError(f"freeze has {prefix!r}, which is no part of the model; parts are {', '.join(parts)}")
    frozen = {n for n in names if any(n == prefix or n.startswith(prefix + ".") for prefix in freeze)}
    for name, parameter in potential.named_parameters():
        parameter.requires_grad_(name not in frozen)
    kept = {name: p for name, p in potential.named_parameters() if name not in frozen}
    if not kept:
        raise ConfigError(f"freeze is {list(freeze)}: nothing is left to train")
    return kept


def make_batches(items: list[Item], settings: OptimConfig, *, epoch: int) -> list[list[int]]:
    """Shuffle by seed and epoch, then cut into batches of indices by structures or by a budget of edges."""
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(items)).tolist()
    if settings.max_edges is not None:
        return pack_by_edges(order, [len(item.graph.edge_src) for item in items], settings.max_edges)
    return [order[n : n + settings.batch_size] for n in range(0, len(order), settings.batch_size)]


def pack_by_edges(order: list[int], edges: list[int], budget: int) -> list[list[int]]:
    """Fill each batch until the next structure would exceed the budget; a larger structure is a batch of its own."""
    groups: list[list[int]] = [[]]
    total = 0
    for n in order:
        if groups[-1] and total + edges[n] > budget:
            groups.append([])
            total = 0
        groups[-1].append(n)
        total += edges[n]
    return groups


def validate(averaged: Potential, job: Training, settings: OptimConfig, done: Progress, n: int) -> dict:
    errors = evaluate(averaged, job.valid or job.train, settings)
    row = {"epoch": done.epoch, "step": done.step, "lr": done.rate, "train_loss": done.loss / n}
    row |= {f"valid_{name}": value for name, value in errors.items()}
    return row | rollouts(averaged, job, settings, done)


def rollouts(averaged: Potential, job: Training, settings: OptimConfig, done: Progress) -> dict:
    """Short dynamics from a validation frame, always the same one, where they are due; None where they are not."""
    every = settings.rollout_every or max(settings.epochs // 5, 1)
    last = max((row["epoch"] for row in done.history if row["survived"] is not None), default=0)
    due = done.epoch // every > last // every or done.epoch == settings.epochs
    starts = [item.atoms for item in job.valid or job.train if len(item.atoms) > 1]
    if not (settings.rollout_steps and due and starts and averaged.config.smooth):
        return dict.fromkeys(Stability._fields)
    start = starts[np.random.default_rng(settings.seed).integers(len(starts))]
    found = stability(
        averaged,
        start,
        job.closest,
        steps=settings.rollout_steps,
        temperature=settings.rollout_temperature,
        seed=settings.seed,
        accelerate="off" if settings.accelerate == "off" else "auto",
    )
    return {name: value if math.isfinite(value) else None for name, value in found._asdict().items()}


def better(row: dict, done: Progress, settings: OptimConfig) -> bool:
    """Whether a model is to be kept instead of the one before."""
    if settings.select == "loss":
        return row["valid_loss"] < done.best
    if row["survived"] is None:  # only until a rollout has been
        return not done.survived and done.best == math.inf
    return (-row["survived"], row["valid_loss"]) < (-done.survived, done.best)


def prepare(
    config: TrainConfig,
    *,
    start: tuple[Potential, dict] | None = None,
    split_seed: int | None = None,
    report=print,
) -> Training:
    """Read the data, show what was found, and build the potential (or shift the one to start from).

    split_seed: of the draw of the validation set; None takes that of the training.
    """
    data, settings = config.data, config.training
    refuse_overwriting(config.out)
    resolve_device(settings.device)  # refuse before reading
    keys = LabelKeys(energy=data.energy_key, forces=data.forces_key, stress=data.stress_key)
    frames = read_frames(list(data.train), keys)
    if data.valid:
        valid = read_frames(list(data.valid), keys)
    else:
        frames, valid = split_frames(frames, data.valid_fraction, settings.seed if split_seed is None else split_seed)
    tests = {path: read_frames(path, keys) for path in data.test}
    check_labels(frames)
    if data.valid:
        check_labels(valid)
    report(f"training set: {len(frames)} frames\n{label_table(frames)}")
    if valid:
        report(f"validation set: {len(valid)} frames")
    species = species_of(frames) if start is None else start[0].species
    for name, others in (("training", frames), ("validation", valid), *((f"test {p}", t) for p, t in tests.items())):
        check_species(others, species, name)
    cutoff = model_config(**config.model).cutoff if start is None else start[0].cutoff
    train_items = [make_item(frame, cutoff) for frame in frames]
    closest = smallest_distances(train_items)
    valid_items = [make_item(frame, cutoff) for frame in valid]
    test_items = {path: [make_item(frame, cutoff) for frame in test] for path, test in tests.items()}
    from_atoms = start is None and data.reference_energies is None and data.isolated_atoms
    isolated = read_frames(data.isolated_atoms, LabelKeys(energy=data.energy_key)) if from_atoms else None
    sets = Sets(frames, valid, [f for test in tests.values() for f in test], isolated)
    warn_or_refuse(sets, report, refuse=data.refuse_flaws)
    if start is None:
        potential, lone_atoms = fresh_potential(config, frames, species, train_items, report)
        potential.set_core(closest)
        before = origin = None
    else:
        before = copy.deepcopy(start[0])
        lone_atoms = before.domain is not None and before.domain.lone_atoms
        potential = start[0].to(getattr(torch, settings.dtype))
        potential.requires_grad_(True)
        potential.domain = potential.uncertainty = None  # measured again at the end
        potential.set_core(closest, keep_smaller=True)
        shift_references(potential, frames, train_items, settings, report)
        origin = {k: v for k, v in start[1].items() if k != "fine_tuned_from"}
    metadata = {"training": config.model_dump(mode="json"), "fine_tuned_from": origin}
    identity = fingerprint(config, [train_items, valid_items], origin)
    return Training(potential, train_items, valid_items, test_items, closest, lone_atoms, before, metadata, identity)


def fresh_potential(
    config: TrainConfig, frames: list[Frame], species: list[int], items: list[Item], report
) -> tuple[Potential, bool]:
    """An untrained potential, and whether its reference energies are those of lone atoms."""
    data, settings = config.data, config.training
    table = None
    if data.reference_energies is not None:
        table = dict(zip(parse_species(list(data.reference_energies)), data.reference_energies.values(), strict=True))
    isolated = None
    if data.isolated_atoms is not None:
        isolated = read_frames(data.isolated_atoms, LabelKeys(energy=data.energy_key))
    references = reference_energies(frames, species, table=table, isolated=isolated)
    report(references.report())
    scale = energy_scale(frames, references.values)
    torch.manual_seed(settings.seed)
    potential = Potential(
        model_config(**config.model),
        species,
        reference_energies=[references.values[z] for z in species],
        scales=[scale] * len(species),
    ).to(getattr(torch, settings.dtype))
    # from the whole set: frames often come sorted by kind, and norms from crystals alone explode in a melt
    potential.calibrate(collate([item.graph for item in items[:: -(-len(items) // 64)]]))
    report(
        f"energy scale {scale:.3f} eV; {sum(p.numel() for p in potential.parameters())} parameters; "
        f"{np.mean([len(item.graph.edge_src) / len(item.graph.numbers) for item in items]):.1f} neighbours per atom"
    )
    return potential, references.of_atoms


def shift_references(potential: Potential, frames: list[Frame], items: list[Item], settings: OptimConfig, report):
    """Move E0 by the mean difference between the new labels and the old model, by composition."""
    differences = []
    potential.eval()
    for frame, item in zip(frames, items, strict=True):
        if frame.energy is not None:
            energy = float(predict(potential, item.graph, forces=False).energy[0])
            differences.append(frame._replace(energy=frame.energy - energy))
    if not differences:
        return
    present = species_of(differences)
    shift = reference_energies(differences, present)
    report(f"shift of {shift.report()}")
    potential.reference_energies = [
        e + shift.values.get(z, 0.0) for z, e in zip(potential.species, potential.reference_energies, strict=True)
    ]


def output_files(out: str) -> dict[str, Path]:
    """Every file that a training writes, by what it is."""
    path = Path(out)
    if path.suffix != ".pt":
        raise ConfigError(f"out is {out!r}; expected a name that ends in .pt")
    names = {
        "last": "last.pt",
        "resume": "resume.pt",
        "csv": "csv",
        "curve": "learning_curve.png",
        "tensorboard": "tensorboard",
    }
    return {kind: path.with_suffix(f".{ending}") for kind, ending in names.items()}


def refuse_overwriting(out: str) -> None:
    """Raise ConfigError for a model that is there without the resume file of its training."""
    if Path(out).exists() and not output_files(out)["resume"].exists():
        raise ConfigError(f"out is {out!r}, which exists and is no training to go on with: rename or remove it")


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


def fingerprint(config: TrainConfig, sets: list[list[Item]], origin: dict | None) -> dict:
    """What must be the same for a training to go on: settings, data and the model that it started from."""
    data = [[list(item.graph) + list(item.labels) for item in items] for items in sets]
    return {"settings": decisive_settings(config), "data": checksum(data), "start": checksum(origin)}


def decisive_settings(config: TrainConfig) -> dict:
    """The settings without those that change no bit of the outcome."""
    settings = config.model_dump(mode="json")
    for section, name in (("training", "save_minutes"), ("training", "max_minutes"), ("data", "refuse_flaws")):
        settings[section].pop(name)
    return settings


def save_state(path: Path, job: Training, potential, averaged, optimizer, done: Progress) -> None:
    state = {
        "format": STATE_FORMAT,
        "fingerprint": job.fingerprint,
        "weights": potential.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(done),
    }
    save_tensors(path, state)


def load_state(path: Path, job: Training, potential, averaged, optimizer) -> Progress:
    """Restore a training. Raises ConfigError when the file belongs to other settings or data."""
    state = load_tensors(path, "resume file")
    if state.get("format") != STATE_FORMAT:
        raise ModelFileError(f"{path} is a {state.get('format')!r}, not a {STATE_FORMAT!r}")
    try:
        return restore_state(path, state, job, potential, averaged, optimizer)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SEGNNError):
            raise
        raise ModelFileError(
            f"{path} is damaged or was written by another version: {' '.join(str(error).split())}. "
            "Delete it to start again."
        ) from error


def restore_state(path: Path, state: dict, job: Training, potential, averaged, optimizer) -> Progress:
    here, there = job.fingerprint, state.get("fingerprint")
    if there != here:
        same = there["settings"] == here["settings"]
        what = "other data or another model to start from" if same else ", ".join(_differing(there, here))
        raise ConfigError(
            f"{path} belongs to a training with {what}: choose another out, or delete that file to start again"
        )
    done = Progress(**state["progress"])
    if min(done.epoch, done.batch, done.step) < 0 or done.step > 0 == len(state["optimizer"]["state"]):
        raise ValueError(f"progress is {done}")
    potential.load_state_dict(state["weights"])
    averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    for parameter, moments in optimizer.state.items():
        if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
            raise ValueError("the optimizer's moments have other shapes than the weights")
    return done


def _differing(there: dict, here: dict) -> list[str]:
    old, new = there["settings"], here["settings"]
    flat = [(f"{s}.{k}", old[s].get(k), v) for s in ("data", "model", "training") for k, v in new[s].items()]
    return [f"{name} = {before!r} (now {now!r})" for name, before, now in flat if before != now] or ["other settings"]


def out_of_patience(history: list[dict], patience: int | None) -> bool:
    """True when none of the last `patience` epochs improved the validation loss."""
    if patience is None or not history:
        return False
    best = min(history, key=lambda row: row["valid_loss"])
    return history[-1]["epoch"] - best["epoch"] >= patience


def check_finite(done: Progress, n: int, settings: OptimConfig) -> None:
    if not math.isfinite(done.loss):
        raise DataError(
            f"the loss is {done.loss / n} in epoch {done.epoch + 1}: lower learning_rate "
            f"(now {settings.learning_rate}), or look for frames with huge forces"
        )


def summary(row: dict) -> str:
    parts = [f"loss {row['train_loss']:.3g}/{row['valid_loss']:.3g}"]
    parts += [f"E {1e3 * row['valid_energy_rmse']:.2f} meV/atom"] if row["valid_energy_rmse"] is not None else []
    parts += [f"F {1e3 * row['valid_forces_rmse']:.1f} meV/Å"] if row["valid_forces_rmse"] is not None else []
    if row["survived"] is not None:
        parts.append(f"MD {row['nve_ps']:.2f}+{row['hot_ps']:.2f} ps")
    return " ".join(parts)


def write_history(path: Path, history: list[dict]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_atomically(path, buffer.getvalue().encode())


def tensorboard_writer(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard = true needs tensorboard: pip install 'segnn-ase[tensorboard]'") from error
    return SummaryWriter(str(folder))


def log_scalars(writer, row: dict) -> None:
    if writer is not None:
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(name, value, row["step"])
        writer.flush()


def finish(config: TrainConfig, job: Training, history: list[dict], files: dict, *, progress: bool) -> dict:
    """Evaluate the best model on every set, store its errors in the file, write plots, print the table."""
    potential, metadata = load_with_metadata(config.out)
    potential = potential.to(resolve_device(config.training.device))
    speed_up(potential, job.train, config.training.accelerate)
    characterize(potential, job.train, job.valid, job.closest, lone_atoms=job.lone_atoms, before=job.before)
    sets = {"train": job.train, "valid": job.valid, **job.test}
    errors = {}
    for name, items in sets.items():
        if not items:
            continue
        values = residuals(potential, items, config.training)
        errors[name] = {k: v for k, v in errors_of(values).items() if k != "loss"}
        if name != "train":
            stem = Path(name).stem
            alone = sum(Path(other).stem == stem for other in sets) == 1
            plot_parities(Path(config.out), stem if alone else "_".join(Path(name).parts[-2:]), values)
    save_potential(config.out, potential, metadata={**metadata, "errors": errors})
    if len(history) > 1:
        plot.plot_learning_curve(files["curve"], history)
    _printer(progress)(f"{error_table(errors)}\nwrote {config.out}")
    return errors


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
    _printer(progress)(f"{error_table(errors)}\nwrote {config.out}")
    return errors


def _printer(progress: bool):
    """Print around the progress bar, or not at all."""
    return (lambda text: tqdm.write(text, file=sys.stderr)) if progress else (lambda text: None)
