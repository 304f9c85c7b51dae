"""Whether torchrun, or what sets the same environment variables, started several processes; without PyTorch."""

import os
import time

from segnn_ase.base.errors import ConfigError, OutOfTime

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_ALL = (ConfigError, OutOfTime, KeyboardInterrupt)  # happen to all of them alike, or are agreed upon
PATIENCE = 5.0  # s


def are_several() -> bool:
    """Whether there are others that work together with this one."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def is_said(error: BaseException) -> bool:
    """Whether the first of them tells the user of an error, too; `of_all`: it has sent it to all."""
    return are_several() and os.environ["RANK"] != "0" and (isinstance(error, OF_ALL) or hasattr(error, "of_all"))


def let_first_speak() -> None:
    """Wait a little: a launcher ends all as soon as one has ended."""
    time.sleep(PATIENCE)
