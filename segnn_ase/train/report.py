"""What a training tells: tables, the history of its errors, figures, TensorBoard."""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from segnn_ase.base import figures
from segnn_ase.base.errors import MissingExtraError
from segnn_ase.base.files import write_atomically
from segnn_ase.data.batches import Item
from segnn_ase.train.evaluation import errors_of

UNITS = {"energy": "eV/atom", "forces": "eV/Å", "stress": "eV/Å³"}
RESPONSES = {  # what belongs to cues, and its unit
    "cue_gradients": "eV for a cue of its scale",
    "dipole": "e Å",
    "polarizability": "e Å²/V",
    "born": "e",
}


def printer(progress: bool):
    """Print around the progress bar, or not at all."""
    return (lambda text: tqdm.write(text, file=sys.stderr)) if progress else (lambda text: None)


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


@contextmanager
def tensorboard(folder: Path, wanted: bool) -> Iterator[Callable[[dict], None]]:
    """A function that logs a row of the history, or does nothing."""
    if not wanted:
        yield lambda row: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard = true needs tensorboard: pip install 'segnn-ase[tensorboard]'") from error

    def log(row: dict) -> None:
        for name, value in row.items():
            if value is not None:
                writer.add_scalar(name, value, row["step"])
        writer.flush()

    with SummaryWriter(str(folder)) as writer:
        yield log


def measure_sets(out: str, sets: dict[str, list[Item]], residuals: Callable[[list[Item]], dict]) -> dict[str, dict]:
    """The errors on each set that has structures; figures of all but those that were trained on are drawn."""
    errors = {}
    for name, items in sets.items():
        if items:
            values = residuals(items)
            errors[name] = {k: v for k, v in errors_of(values).items() if k != "loss"}
            if name != "train":
                plot_parities(Path(out), short_name(name, list(sets)), values)
    return errors


def short_name(name: str, names: list[str]) -> str:
    """The name of a set in that of a file: see `_slug`; numbered where those of others are the same."""
    slugs = [_slug(other, names) for other in names]
    place = names.index(name)
    same = slugs[:place].count(slugs[place])
    return f"{slugs[place]}_{same + 1}" if same else slugs[place]


def _slug(name: str, names: list[str]) -> str:
    """The last parts of a path, as many as tell it from the others, in letters that every file system takes."""
    for parts in range(1, len(Path(name).parts) + 1):
        mine, *others = (Path(other).with_suffix("").parts[-parts:] for other in (name, *names))
        if others.count(mine) == 1:
            break
    else:
        mine = Path(name).parts
    return re.sub(r"[^\w.-]+", "_", "_".join(mine)).strip("_")


def plot_parities(out: Path, name: str, values: dict[str, np.ndarray]) -> None:
    for quantity, unit in (UNITS | RESPONSES).items():
        reference, predicted, std = (values.get(f"{quantity}_{of}", ()) for of in ("reference", "predicted", "std"))
        if len(reference):
            path = out.with_suffix(f".parity_{quantity}_{name}.png")
            figures.plot_parity(path, reference, predicted, label=quantity.replace("_", " "), unit=unit)
        if len(std):
            path = out.with_suffix(f".calibration_{quantity}_{name}.png")
            figures.plot_calibration(path, std, predicted - reference, label=quantity, unit=unit)


def error_table(errors: dict[str, dict]) -> str:
    """RMSE and MAE of every set, in the units that papers use, the RMSE that the potential itself expects, and
    those of the one that was fine-tuned."""
    columns = [("energy", "meV/atom"), ("forces", "meV/Å"), ("stress", "meV/Å³")]
    heads = [f"{f'{quantity} [{unit}] rmse':>26s} {'mae':>9s}" for quantity, unit in columns]
    tuned = any("forces_rmse_before" in values for values in errors.values())
    before = f"{'rmse before: energy':>22s} {'forces':>9s}" if tuned else ""
    lines = [f"{'set':24s}" + "".join(heads) + f"{'forces: rmse expected':>26s}{before}"]
    for name, values in errors.items():
        cells = [f"{milli(values[f'{q}_rmse']):>26s} {milli(values[f'{q}_mae']):>9s}" for q, _ in columns]
        if tuned:
            old = [milli(values.get(f"{q}_rmse_before")) for q in ("energy", "forces")]
            before = f"{old[0]:>22s} {old[1]:>9s}"
        lines.append(
            f"{Path(name).name[-24:]:24s}" + "".join(cells) + f"{milli(values.get('forces_std')):>26s}{before}"
        )
    lines += [line for name, values in errors.items() for line in _of_responses(name, values)]
    lines += [_outside(name, values) for name, values in errors.items() if values.get("outside")]
    return "\n".join(lines)


def _of_responses(name: str, values: dict) -> list[str]:
    found = [f"{k} {values[f'{k}_rmse']:.3g} {unit}" for k, unit in RESPONSES.items() if f"{k}_rmse" in values]
    return [f"{Path(name).name[-24:]:24s}rmse of components: {', '.join(found)}"] if found else []


def _outside(name: str, values: dict) -> str:
    ways = ", ".join(f"{kind} {n}" for kind, n in sorted(values["outside_ways"].items()))
    return (
        f"{Path(name).name}: {values['outside']} frames are outside what the potential was trained on ({ways}); what "
        f"is expected is for the others. Forces outside, rmse [meV/Å]: {milli(values['forces_rmse_outside'])}"
    )


def milli(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.3f}"
