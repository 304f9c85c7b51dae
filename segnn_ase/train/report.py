"""How good a potential is: its errors on labelled structures, those it expects itself, and what its data covered."""

import csv
import io
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from segnn_ase.base import figures
from segnn_ase.base.files import write_atomically


def plot_parities(out: Path, name: str, values: dict[str, np.ndarray]) -> None:
    for quantity, unit in (("energy", "eV/atom"), ("forces", "eV/Å"), ("stress", "eV/Å³")):
        reference = values[f"{quantity}_reference"]
        if len(reference):
            path = out.with_suffix(f".parity_{quantity}_{name}.png")
            figures.plot_parity(path, reference, values[f"{quantity}_predicted"], label=quantity, unit=unit)
            std = values.get(f"{quantity}_std", ())
            if len(std):
                path = out.with_suffix(f".calibration_{quantity}_{name}.png")
                error = values[f"{quantity}_predicted"] - reference
                figures.plot_calibration(path, std, error, label=quantity, unit=unit)


def error_table(errors: dict[str, dict]) -> str:
    """RMSE and MAE of every set, in the units that papers use, and the RMSE that the potential itself expects."""
    columns = [("energy", "meV/atom", 1e3), ("forces", "meV/Å", 1e3), ("stress", "meV/Å³", 1e3)]
    heads = [f"{f'{n} [{u}] rmse':>26s} {'mae':>9s}" for n, u, _ in columns]
    lines = [f"{'set':24s}" + "".join(heads) + f"{'forces: rmse expected':>26s}"]
    for name, values in errors.items():
        cells = []
        for quantity, _, factor in columns:
            rmse, mae = values[f"{quantity}_rmse"], values[f"{quantity}_mae"]
            cells.append(f"{'-':>26s} {'-':>9s}" if rmse is None else f"{factor * rmse:26.3f} {factor * mae:9.3f}")
        expected = values.get("forces_std")
        cells.append(f"{'-':>26s}" if expected is None else f"{1e3 * expected:26.3f}")
        lines.append(f"{Path(name).name[-24:]:24s}" + "".join(cells))
    return "\n".join(lines)


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


def printer(progress: bool):
    """Print around the progress bar, or not at all."""
    return (lambda text: tqdm.write(text, file=sys.stderr)) if progress else (lambda text: None)
