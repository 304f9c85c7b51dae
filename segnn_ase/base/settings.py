"""Validated settings: frozen, unknown keys are errors, and every mistake is one sentence."""

import difflib
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from segnn_ase.base.errors import ConfigError, in_short
from segnn_ase.base.files import existing_file


class Settings(BaseModel):
    """Frozen settings; any mistake is a `ConfigError` that names the key and the remedy."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, **values):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(type(self), item, "") for item in error.errors())) from None

    # pydantic makes settings within settings without this __init__, so that their mistakes name their section
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def parse(cls, values: dict, *, section: str = ""):
        """Validate a plain dict. Raises ConfigError listing every wrong key with what was expected."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(cls, item, section) for item in error.errors())) from None


def _explain(cls: Any, item: Any, section: str) -> str:
    location = [str(part) for part in item["loc"]]
    name = ".".join([section, *location] if section else location)
    if item["type"] == "missing":
        return f"setting {name!r} is missing"
    if item["type"] == "extra_forbidden":
        for part in item["loc"][:-1]:
            if not isinstance(part, int):  # a number tells which of several sections of one kind
                cls = _section(cls.model_fields[part].annotation)
        known = list(cls.model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"unknown setting {name!r}: {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"setting {name!r} is {in_short(item['input'])}: {message}" if location else message


def _section(annotation: Any) -> Any:
    """The settings within a type: of sections that may be left out, and of several of them."""
    if hasattr(annotation, "model_fields"):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def read_toml(path: "str | Path") -> dict:
    """Read a TOML file. Raises FileNotFoundError, or ConfigError with the line of a mistake."""
    path = existing_file(path, "config")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors begin with a mark
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits, and of deep nesting
        raise ConfigError(f"config {str(path)!r} is not valid TOML: {error}") from None
