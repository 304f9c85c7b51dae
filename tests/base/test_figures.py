"""Figures: valid files with the right content, written whole, without touching global state."""

import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from segnn_ase.base.figures import (
    Glyphs,
    plot_certificate,
    plot_energy_drift,
    plot_glyphs,
    plot_learning_curve,
    plot_parity,
    plot_rdf,
)

RNG = np.random.default_rng(0)
HISTORY = [
    {
        "epoch": n,
        "train_loss": 2.0 / n,
        "valid_loss": 3.0 / n,
        "valid_energy_rmse": 0.01 / n if n > 2 else None,
        "valid_forces_rmse": 0.1 / n,
        "valid_stress_rmse": None,
        "lr": 0.01 * (1 - n / 41),
    }
    for n in range(1, 41)
]
R = np.linspace(0.05, 8, 100)
CURVES = {"O-O": (R, 1 + np.sin(2 * R) / R), "O-H": (R, 1 + np.cos(3 * R) / (1 + R))}


def parity(path, n=500):
    reference = RNG.normal(size=(n, 3))
    plot_parity(path, reference, reference + 0.05 * RNG.normal(size=(n, 3)), label="forces", unit="eV/Å")


def density(path):
    parity(path, 4000)


def one_point(path):
    plot_parity(path, [1.0], [1.0], label="energy", unit="eV/atom")


def learning_curve(path):
    plot_learning_curve(path, HISTORY)


def short_learning_curve(path):
    plot_learning_curve(path, [{"epoch": 1, "valid_loss": 0.5, "valid_force_rmse": 0.1, "lr": 0.0}])


def energy_drift(path):
    time_fs = np.arange(0, 5000, 5.0)
    energy = -3.0 + 1e-9 * time_fs + 1e-5 * RNG.normal(size=len(time_fs))
    plot_energy_drift(path, time_fs, energy, 300 + 20 * RNG.normal(size=len(time_fs)), 1e-6)


def drift_without_slope(path):
    plot_energy_drift(path, [0.0, 1.0], [1.0, 1.1], [300.0, 310.0], float("nan"))


def rdf(path):
    plot_rdf(path, CURVES)


def rdf_with_reference(path):
    plot_rdf(path, {"O-O": CURVES["O-O"]}, reference={"O-O": (R, 0.9 * CURVES["O-O"][1]), "H-H": CURVES["O-H"]})


def certificate(path):
    plot_certificate(path, {"zero": 0.0, "small": 1e-5, "wrong": 30.0, "very": np.inf}, np.arange(9.0), R[:9])


def certificate_without_a_run(path):
    plot_certificate(path, {"lost": float("nan")}, [0.0], [float("nan")])


def glyphs(path):
    directions = np.random.default_rng(0).normal(size=(5, 6, 3))
    values = np.random.default_rng(1).normal(size=(2, 5, 6))
    plot_glyphs(path, Glyphs(np.array([[0.0, 0, 0], [1.0, 0, 0]]), ["C", "O"], [(0, 1)], directions, values))


FIGURES = [parity, density, one_point, learning_curve, short_learning_curve, energy_drift, drift_without_slope]
FIGURES += [rdf, rdf_with_reference, glyphs, certificate, certificate_without_a_run]


@pytest.mark.parametrize("draw", FIGURES)
def test_figure_is_a_picture(tmp_path, draw):
    settings = dict(matplotlib.rcParams)
    draw(tmp_path / "new" / "figure.png")
    pixels = imread(tmp_path / "new" / "figure.png")
    assert pixels.ndim == 3 and min(pixels.shape[:2]) > 300
    assert (pixels[..., :3].min(axis=2) < 0.5).mean() > 0.002  # something is drawn
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["figure.png"]
    assert dict(matplotlib.rcParams) == settings


@pytest.mark.parametrize("suffix, magic", [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_format_follows_the_name(tmp_path, suffix, magic):
    rdf(tmp_path / f"rdf{suffix}")
    assert (tmp_path / f"rdf{suffix}").read_bytes().startswith(magic)


def test_pyplot_is_not_imported():
    code = "import sys, segnn_ase.base.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
