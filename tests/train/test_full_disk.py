"""A disk that is full at any write of a training: a typed error, the last good files, and the same end later."""

import errno
import os

import pytest
from helpers.frames import water_frames
from helpers.trainings import configured, history, weights

from segnn_ase.base import figures
from segnn_ase.base.errors import OutputError
from segnn_ase.store.tensors import checksum, load_tensors
from segnn_ase.train.start import train

PARTS = ("model.resume.pt", "model.pt", "model.csv", "model.last.pt", "model.parity_forces_valid.png")


class Disk:
    """Writes to the disk: the one of a number is refused, in `fsync` or `replace` in turn."""

    def __init__(self, patch: pytest.MonkeyPatch, refused: int | None = None):
        self.names: list[str] = []
        self.refused, self.original = refused, os.replace
        patch.setattr(os, "fsync", self.fsync)
        patch.setattr(os, "replace", self.replace)

    def fsync(self, number: int) -> None:
        if len(self.names) == self.refused and self.refused % 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def replace(self, source, target) -> None:
        if len(self.names) == self.refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.names.append(os.path.basename(target))
        self.original(source, target)


def trained(folder, refused: int | None = None) -> list[str]:
    """Train on the disk; returns the files that were written, in order."""
    settings = configured(folder, save_minutes=0, epochs=2, batch_size=6, accelerate="off")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "plot_calibration", lambda *_, **__: None)
        patch.setattr(figures, "plot_learning_curve", lambda *_, **__: None)
        plotted = lambda path, *_, **__: figures.write_atomically(path, b"a figure")  # noqa: E731
        patch.setattr(figures, "plot_parity", plotted)
        disk = Disk(patch, refused)
        train(settings, progress=False)
    return disk.names


@pytest.mark.slow
def test_every_write_of_a_training_may_fail(tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    configured(whole, water_frames(6))
    order = trained(whole)
    assert set(PARTS) <= set(order)
    for number, name in enumerate(order):
        folder = tmp_path / str(number)
        folder.mkdir()
        configured(folder, water_frames(6))
        with pytest.raises(OutputError, match=rf"cannot write '.*{name}': No space left on device; .* is intact"):
            trained(folder, number)
        assert {path.name for path in folder.iterdir()} == {"train.traj", *order[:number]}
        for path in folder.glob("*.pt"):
            load_tensors(path)
        trained(folder)
        for file in ("model.pt", "model.last.pt"):
            assert checksum(weights(folder / file)) == checksum(weights(whole / file)), (number, file)
        assert history(folder / "model.pt") == history(whole / "model.pt")
        assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
