"""Whether torchrun, or what sets the same environment variables, started several processes; without PyTorch."""

import os
import time

from segnn_ase.base.errors import AccelerationError, DeviceError, ProcessError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 5.0  # s
OF_ONE = (AccelerationError, DeviceError, ProcessError)  # what can happen to one of them alone; the rest happens to all


def are_several() -> bool:
    """Whether there are others that work together with this one."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def is_said(error: BaseException) -> bool:
    """Whether the first of them tells the user of an error, too; `of_all`: it has sent it to all."""
    return are_several() and os.environ["RANK"] != "0" and (not isinstance(error, OF_ONE) or hasattr(error, "of_all"))


def let_first_speak() -> None:
    """Wait a little: a launcher ends all as soon as one has ended."""
    time.sleep(PATIENCE)
