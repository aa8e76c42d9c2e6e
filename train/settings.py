"""Reads the options of a command out of a dataclass: their flags, types, defaults and how a text becomes a value.

Knows nothing of any command-line library; `cli.py` makes a command of what is read here.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Literal, Union

# In the order in which a text is tried: the narrow types first, any text last.
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "text"}
_METAVARS = {bool: "true|false", int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}
BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Setting:
    """One option of a command, read from one field of a dataclass."""

    path: tuple[str, ...]  # ("lr",), or ("model", "num_layers") for a field of a nested dataclass
    kinds: tuple[type, ...]  # the members of the field's type, None left out
    many: bool
    optional: bool
    choices: tuple[str, ...] | None
    help: str
    default: Any
    positional: bool

    @property
    def name(self) -> str:
        return "__".join(self.path)

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path)

    @property
    def label(self) -> str:
        """What an error message calls this option."""
        return self.path[-1] if self.positional else self.flag

    @property
    def is_switch(self) -> bool:
        return self.kinds == (bool,) and not self.many

    @property
    def metavar(self) -> str:
        words = [word for kind, word in _METAVARS.items() if kind in self.kinds]
        if self.choices:
            words[-1] = "|".join(self.choices)
        return "|".join(words) + ("..." if self.many else "")

    @property
    def expected(self) -> str:
        """The accepted values in words, for error messages."""
        words = [word for kind, word in _EXPECTED.items() if kind in self.kinds]
        if self.choices:
            words[-1] = self.choices[0] if len(self.choices) == 1 else f"one of {', '.join(self.choices)}"
        return " or ".join(words + ["none"] * self.optional)

    @property
    def default_note(self) -> str:
        if self.default is MISSING:
            return "  [required]"
        if self.default is None or self.default in ("", [], ()):
            return ""
        if isinstance(self.default, bool):
            return f"  [default: {str(self.default).lower()}]"
        return f"  [default: {' '.join(map(str, self.default)) if self.many else self.default}]"

    def value(self, text: str) -> Any:
        """The typed value of one text; ValueError if it is none of the accepted ones."""
        if self.optional and text.lower() == "none":
            return None
        for kind in (k for k in _EXPECTED if k in self.kinds):
            try:
                return self._as(kind, text)
            except ValueError:
                continue
        raise ValueError(text)

    def _as(self, kind: type, text: str) -> Any:
        if kind is bool:
            if text.lower() not in BOOLEANS:
                raise ValueError(text)
            return BOOLEANS[text.lower()]
        if kind is str and self.choices and text not in self.choices:
            raise ValueError(text)
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError(text)
        return value


def settings_of(config_class: type, tables: Mapping[str, type], prefix: tuple[str, ...] = ()) -> Iterator[Setting]:
    """Every option of a dataclass, in order, with those of nested dataclasses in the place of their field.

    Args:
        config_class: a dataclass; fields made with `options.option` bring help, choices and `positional`.
        tables: for fields of another type: the dataclass whose fields become this field's dotted flags.
        prefix: the path of `config_class` itself, when it is nested.
    """
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        path = (*prefix, field.name)
        if nested := tables.get(field.name) or dataclass_in(hints[field.name]):
            yield from settings_of(nested, {}, path)
            continue
        kinds, many, optional, literals = _kinds(hints[field.name], ".".join(path))
        yield Setting(
            path=path,
            kinds=kinds,
            many=many,
            optional=optional,
            choices=field.metadata.get("choices") or literals or None,
            help=field.metadata.get("help", ""),
            default=default_of(field),
            positional=field.metadata.get("positional", False),
        )


def default_of(field: dataclasses.Field) -> Any:
    """A field's default, or `dataclasses.MISSING`."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def dataclass_in(hint: Any) -> type | None:
    """The dataclass of a type `X` or `X | None`, else None."""
    members = [m for m in _members(hint) if m is not types.NoneType]
    return members[0] if len(members) == 1 and dataclasses.is_dataclass(members[0]) else None


def _kinds(hint: Any, name: str) -> tuple[tuple[type, ...], bool, bool, tuple[str, ...]]:
    """A type hint as (plain types, is a list, may be None, literal choices)."""
    members = _members(hint)
    optional = types.NoneType in members
    members = [m for m in members if m is not types.NoneType]
    many = len(members) == 1 and typing.get_origin(members[0]) in (list, tuple)
    if many:
        members = [m for m in typing.get_args(members[0])[:1] for m in _members(m)]
    literals = tuple(str(a) for m in members if typing.get_origin(m) is Literal for a in typing.get_args(m))
    kinds = tuple(str if typing.get_origin(m) is Literal else m for m in members)
    if not kinds or any(kind not in _EXPECTED for kind in kinds):
        raise TypeError(f"option {name}: no command-line form for the type {hint}")
    return kinds, many, optional, literals


def _members(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]
