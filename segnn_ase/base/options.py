"""Options of a command made from the fields of settings: name, type, range, choices, default and help stand there once.

An option that is not given sets nothing. What is given is validated by the settings, with their own errors.
"""

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from segnn_ase.base.settings import Settings

BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


class Options(NamedTuple):
    """Settings, or some of their fields, that a command takes as options."""

    settings: type[Settings]
    only: tuple[str, ...] = ()  # fields; all of them where it is empty
    defaults: Mapping[str, Any] = {}  # those of the command, to be told, where they are others than the settings'


def with_options(**sections: Options) -> Callable[[Callable], Callable]:
    """Replace the parameters of a command named as the sections by options, and pass what was given: {field: value}."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**values):
            given = {name: _given(options, values) for name, options in sections.items()}
            return command(**values, **given)

        own = inspect.signature(command).parameters.values()
        made = [_parameter(f, o, name) for name, o in sections.items() for f in _fields(o)]
        parameters = [*(p for p in own if p.name not in sections), *made]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _fields(options: Options) -> tuple[str, ...]:
    return options.only or tuple(options.settings.model_fields)


def _given(options: Options, values: dict[str, Any]) -> dict[str, Any]:
    """Take what was given for these settings out of the values of the command line."""
    taken = {name: values.pop(name) for name in _fields(options)}
    given = {name: value for name, value in taken.items() if value is not None and value != []}
    for name, value in given.items():
        if _is_table(options.settings.model_fields[name].annotation):
            given[name] = {key: text for key, _, text in (item.partition("=") for item in value)}
    return given


def _parameter(name: str, options: Options, section: str) -> inspect.Parameter:
    field = options.settings.model_fields[name]
    default = options.defaults.get(name, field.get_default(call_default_factory=True))
    option = typer.Option(
        help=_help(field, default),
        metavar=_metavar(field.annotation),
        show_default=False,  # it stands in the help, as the option itself has none
        rich_help_panel=section.capitalize(),
    )
    annotation = Annotated[_kind(field.annotation) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _help(field: FieldInfo, default: Any) -> str:
    bounds = [(word, getattr(item, key, None)) for item in field.metadata for key, word in BOUNDS.items()]
    limits = ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    facts = "required" if field.is_required() else f"default {_words(default)}"
    text = f"{field.description} ({facts}; {limits})" if limits else f"{field.description} ({facts})"
    return text.replace("[", "\\[")  # Rich would read it as a style


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple | list):
        return ", ".join(map(_words, value)) or "none"
    if value == {}:
        return "none"
    return "none" if value is None else str(value)


def _kind(annotation: Any) -> Any:
    """The type of an option on the command line: several values are given by repeating it."""
    annotation = _without_none(annotation)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(inner[0])
    if origin is tuple and Ellipsis not in inner:
        return types.GenericAlias(tuple, tuple(map(_kind, inner)))
    if origin is tuple:
        return types.GenericAlias(list, (_kind(inner[0]),))
    if origin is dict:
        return list[str]
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return str  # which it makes itself of
    return str if origin is Literal else annotation


def _metavar(annotation: Any) -> str | None:
    annotation = _without_none(annotation)
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    inner = get_args(annotation)
    if inner and isinstance(inner[0], type) and issubclass(inner[0], Settings):
        return "NAME[,SETTING=VALUE]"
    return "NAME=VALUE" if _is_table(annotation) else None


def _is_table(annotation: Any) -> bool:
    return get_origin(_without_none(annotation)) is dict


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    (inner,) = (kind for kind in get_args(annotation) if kind is not type(None))
    return inner
