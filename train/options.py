"""Declaring a command's options as dataclass fields, with no dependency on a command-line library.

`cli.py` turns such a dataclass into a command; everything else (the loop, tests, TOML files) uses it as plain data.
"""

from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Sequence[str] | None = None,
    positional: bool = False,
    default_factory: Any = MISSING,
) -> Any:
    """A dataclass field that is also a command-line option.

    Args:
        default: the value when the option is not given; without one the option is required.
        help: one line for `--help`.
        choices: the accepted values of a string option.
        positional: an argument without a flag (for lists: any number of them).
        default_factory: as in `dataclasses.field`.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices else None, "positional": positional}
    if default_factory is not MISSING:
        return field(default_factory=default_factory, metadata=metadata)
    return field(default=default, metadata=metadata)
