"""Trains a peer's potential for a given time and measures it; to be run by the Python of the peer's environment.

/path/to/mace/bin/python benchmarks/train_peer.py mace FOLDER     # as benchmarks/accuracy.py does

FOLDER has train.xyz, valid.xyz and test0.xyz, test1.xyz and so on with REF_energy and REF_forces, and task.json with
minutes, seed and the energies of isolated atoms by symbol (or null). Writes errors.json there: for each test, energy
per atom (eV) and forces (eV/Å), rmse and mae. Recipes are those of the peers' documentation, with 64x0e+64x1o channels
(MACE) and 4 layers of 32 channels to l = 1 (NequIP), which do best in times as short. MACE's number of epochs is chosen
to fill the time, since its second stage comes last.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import numpy as np
from ase.data import atomic_numbers

MACE = {
    "model": "MACE",
    "num_channels": 64,
    "max_L": 1,
    "r_max": 5.0,
    "batch_size": 5,
    "valid_batch_size": 10,
    "lr": 0.01,
    "ema_decay": 0.99,
    "energy_weight": 1,
    "forces_weight": 100,
    "scheduler": "ReduceLROnPlateau",
    "device": "cpu",
    "default_dtype": "float32",
}
FLAGS = ("ema", "amsgrad")
SHORT = 2  # epochs that tell how long one takes


def tests_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("test*.xyz"))


def errors(energies: np.ndarray, forces: list[np.ndarray], path: Path) -> dict:
    images = ase.io.read(path, ":", format="extxyz")
    dE = np.array([(e - a.info["REF_energy"]) / len(a) for e, a in zip(energies, images, strict=True)])
    dF = np.concatenate([(f - a.arrays["REF_forces"]).ravel() for f, a in zip(forces, images, strict=True)])
    found = {}
    for name, delta in (("energy", dE), ("forces", dF)):
        found |= {f"{name}_rmse": float(np.sqrt(np.mean(delta**2))), f"{name}_mae": float(np.mean(np.abs(delta)))}
    return found


def run_mace(task: dict, folder: Path) -> list[dict]:
    E0 = task["isolated"] and {atomic_numbers[name]: value for name, value in task["isolated"].items()}

    def train(name: str, epochs: int) -> float:
        stage = min(max(round(0.75 * epochs), 1), epochs - 1)
        options = MACE | {"name": name, "seed": task["seed"], "max_num_epochs": epochs, "work_dir": folder}
        options |= {"train_file": folder / "train.xyz", "valid_file": folder / "valid.xyz", "start_stage_two": stage}
        options |= {"E0s": "average" if E0 is None else str(E0), "energy_key": "REF_energy", "forces_key": "REF_forces"}
        flags = [f"--{flag}" for flag in (*FLAGS, "stage_two")]
        command = [sys.executable, "-m", "mace.cli.run_train", *flags, *(f"--{k}={v}" for k, v in options.items())]
        start = time.monotonic()
        subprocess.run(command, check=True)
        return time.monotonic() - start

    first, second = train("first", SHORT), train("second", 2 * SHORT)
    each = max((second - first) / SHORT, 1e-3)
    train("model", max(int((60 * task["minutes"] - (first - SHORT * each)) / each), 2))
    from mace.calculators import MACECalculator

    (model,) = folder.rglob("model_stagetwo.model")
    return by_calculator(MACECalculator(model_paths=[str(model)], device="cpu", default_dtype="float32"), folder)


def by_calculator(calculator, folder: Path) -> list[dict]:
    found = []
    for path in tests_in(folder):
        energies, forces = [], []
        for atoms in ase.io.read(path, ":", format="extxyz"):
            atoms.calc = calculator
            energies.append(atoms.get_potential_energy())
            forces.append(atoms.get_forces())
        found.append(errors(np.array(energies), forces, path))
    return found


def nequip_config(task: dict, folder: Path) -> dict:
    images = ase.io.read(folder / "train.xyz", ":", format="extxyz")
    names = sorted({symbol for atoms in images for symbol in atoms.get_chemical_symbols()})
    E0 = task["isolated"]
    coefficients = {"total_energy": 1.0, "forces": 1.0}
    metrics = {"_target_": "nequip.train.EnergyForceMetrics", "coeffs": {"total_energy_mae": 1.0, "forces_mae": 1.0}}
    statistics = "${training_data_stats:%s}"
    loader = {"_target_": "torch.utils.data.DataLoader", "batch_size": 5}
    minutes = task["minutes"]
    monitor = "val0_epoch/weighted_sum"
    keys = {"energy": "REF_energy", "forces": "REF_forces"}
    return {
        "run": ["train", "test"],
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule",
            "seed": task["seed"],
            "train_file_path": str(folder / "train.xyz"),
            "val_file_path": str(folder / "valid.xyz"),
            "test_file_path": [str(path) for path in tests_in(folder)],
            "ase_args": {"format": "extxyz"},
            "key_mapping": {"REF_energy": "total_energy", "REF_forces": "forces"},
            "include_keys": list(keys.values()),
            "transforms": [
                {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", "model_type_names": names},
                {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": 5.0},
            ],
            "train_dataloader": loader | {"shuffle": True},
            "val_dataloader": loader | {"batch_size": 10},
            "test_dataloader": loader | {"batch_size": 10},
            "stats_manager": {
                "_target_": "nequip.data.CommonDataStatisticsManager",
                "dataloader_kwargs": {"batch_size": 10},
                "type_names": names,
            },
        },
        "trainer": {
            "_target_": "lightning.Trainer",
            "accelerator": "cpu",
            "enable_checkpointing": True,
            "max_epochs": 100000,
            "max_time": f"00:{int(minutes // 60):02d}:{int(minutes % 60):02d}:{round(60 * (minutes % 1)):02d}",
            "logger": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder)},
            "callbacks": [
                {
                    "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "dirpath": str(folder),
                    "monitor": monitor,
                    "save_last": True,
                    "filename": "best",
                }
            ],
        },
        "training_module": {
            "_target_": "nequip.train.EMALightningModule",
            "ema_decay": 0.999,
            "loss": {"_target_": "nequip.train.EnergyForceLoss", "per_atom_energy": True, "coeffs": coefficients},
            "train_metrics": metrics,
            "val_metrics": metrics,
            "test_metrics": metrics,
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01},
            "lr_scheduler": {
                "scheduler": {
                    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau",
                    "factor": 0.6,
                    "patience": 5,
                    "threshold": 0.2,
                    "min_lr": 1e-6,
                },
                "monitor": monitor,
                "interval": "epoch",
                "frequency": 1,
            },
            "model": {
                "_target_": "nequip.model.NequIPGNNModel",
                "seed": task["seed"],
                "model_dtype": "float32",
                "type_names": names,
                "r_max": 5.0,
                "num_layers": 4,
                "l_max": 1,
                "parity": True,
                "num_features": 32,
                "radial_mlp_depth": 2,
                "radial_mlp_width": 64,
                "avg_num_neighbors": statistics % "num_neighbors_mean",
                "per_type_energy_scales": statistics % "per_type_forces_rms",
                "per_type_energy_shifts": statistics % "per_atom_energy_mean"
                if E0 is None
                else {name: E0[name] for name in names},
            },
        },
    }


def run_nequip(task: dict, folder: Path) -> list[dict]:
    import yaml

    (folder / "config.yaml").write_text(yaml.safe_dump(nequip_config(task, folder)))
    command = ["-cp", str(folder.absolute()), "-cn", "config.yaml", f"hydra.run.dir={folder.absolute()}"]
    subprocess.run([str(Path(sys.executable).parent / "nequip-train"), *command], check=True)
    lines = [path.read_text().splitlines() for path in sorted(folder.rglob("metrics.csv"))]
    names, values = lines[-1][0].split(","), lines[-1][-1].split(",")
    last = {name: float(value) for name, value in zip(names, values, strict=True) if value}
    found = []
    for n in range(len(tests_in(folder))):
        row = {}
        for kind in ("rmse", "mae"):
            row[f"energy_{kind}"] = last[f"test{n}_epoch/per_atom_energy_{kind}"]
            row[f"forces_{kind}"] = last[f"test{n}_epoch/forces_{kind}"]
        found.append(row)
    return found


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2]).absolute()
    found = {"mace": run_mace, "nequip": run_nequip}[kind](json.loads((folder / "task.json").read_text()), folder)
    (folder / "errors.json").write_text(json.dumps({"errors": found}))


if __name__ == "__main__":
    main()
