"""`python -m segnn_ase` is `segnn`."""

from segnn_ase.cli import app

if __name__ == "__main__":
    app()
