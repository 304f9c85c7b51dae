"""The typed errors and warnings of the package: every error raised on purpose is a `SEGNNError`."""

import sys


class SEGNNError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(SEGNNError, ValueError):
    """A setting is unknown, missing or out of range."""


class StructureError(SEGNNError, ValueError):
    """A structure cannot be evaluated: unknown element, NaN position, overlapping atoms, bad cell."""


class DataError(SEGNNError, ValueError):
    """Labelled frames are missing, inconsistent or useless."""


class ModelFileError(SEGNNError, ValueError):
    """A file is not a readable model of this package."""


class OutputError(SEGNNError, OSError):
    """A file cannot be written: no space, no permission, no folder, another writer. What was there before is intact."""


class DeviceError(SEGNNError, RuntimeError):
    """The requested device does not exist here."""


class MDError(SEGNNError, RuntimeError):
    """A simulation was stopped by a guard, or cannot be resumed from its restart file."""


class OutOfTime(SEGNNError, RuntimeError):
    """`max_minutes` are over: everything is saved, and the same call goes on."""


class ProcessError(SEGNNError, RuntimeError):
    """Another one of several processes that work together has ended."""


class LabelError(SEGNNError, RuntimeError):
    """A reference has no label for a structure: it failed, gave no numbers, took too long or ended."""


class ReferenceStartError(SEGNNError, RuntimeError):
    """The reference that is to label structures does not start: nothing is wrong with the structures."""


class MissingExtraError(SEGNNError, ImportError):
    """A setting or a model needs an optional library that is not installed."""


class AccelerationError(SEGNNError, RuntimeError):
    """Fused kernels were required but cannot be compiled here, or do not reproduce plain PyTorch."""


class DomainError(SEGNNError, ValueError):
    """A structure is outside what the potential was trained on."""


class DomainWarning(UserWarning):
    """A structure is outside what the potential was trained on: its results may be worth nothing."""


class AccelerationWarning(UserWarning):
    """Plain PyTorch is used where fused kernels were expected: slower, the same numbers."""


class UnusedInputWarning(UserWarning):
    """A structure says something that its potential knows nothing of, and that changes no number."""


def expect(good: bool, argument: str, value, expected: str) -> None:
    """Raise ConfigError with the argument, its value and what is expected, unless it is good."""
    if not good:
        raise ConfigError(f"{argument} is {in_short(value)}; expected {expected}")


def in_short(value) -> str:
    """The value on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def level_of_caller() -> int:
    """The stack level of the first caller that is neither this package nor ASE, seen from this function's caller."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("segnn_ase", "ase"):
        frame, level = frame.f_back, level + 1
    return level
