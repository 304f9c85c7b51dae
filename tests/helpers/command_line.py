"""The command line within this process, and a configuration for it."""

from typer.testing import CliRunner

from segnn_ase import cli

TOML = """
out = "model.pt"
[data]
train = "train.xyz"
valid_fraction = 0.25
[model]
hidden_irreps = "4x0e+4x1o"
lmax_attr = 1
cutoff = 3.0
n_radial = 4
radial_hidden = [8]
[training]
epochs = 3
device = "cpu"
"""


def segnn(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def assert_one_line_error(result, message: str) -> None:
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1], result.stderr
    assert "Traceback" not in result.output and not result.stdout
