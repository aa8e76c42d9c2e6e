"""Turns a dataclass of options (see `options.py`) into a command. The only file that imports click.

`parse` returns what was given on the command line and nothing else, so that a caller can put presets and a
configuration file below it. `run_command` is the whole of a simple command: parse, build the dataclass, call main.

What a command accepts, beyond click's own habits:
- every flag with underscores or dashes: `--batch_size 4`, `--batch-size=4`;
- booleans as `--flag`, `--no_flag`, `--flag true`, `--flag=false`;
- lists as `--input A B C`, repeated flags, or both; a list ends at the next flag or at `--`;
- a field that is itself a dataclass as dotted flags: `--model.num_layers 4`;
- `none` for a field whose type includes None.
"""

import dataclasses
import difflib
import os
import select
import sys
import typing
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING
from typing import Any

import click
from click.core import ParameterSource

from moe_engine.train.errors import InputError, RankLost
from moe_engine.train.settings import BOOLEANS, Setting, dataclass_in, default_of, settings_of

Tables = Sequence[tuple[str, type]]
_HELP_FLAGS = ("--help", "-h")


def run_command(
    prog: str,
    config_class: type,
    main: Callable[[Any], int | None],
    argv: Sequence[str] | None = None,
    doc: str = "",
    tables: Tables = (),
) -> int:
    """Parse `argv`, build a `config_class`, call `main(config)`, return the exit status.

    Args:
        prog: the command's name in `--help`.
        config_class: a dataclass whose fields were made with `options.option`.
        main: the command itself; None counts as 0.
        argv: the arguments without the program name; `sys.argv[1:]` when None.
        doc: what `--help` says first.
        tables: `(field, dataclass)` pairs: that field becomes the dotted flags of that dataclass, and its value is
            a dict of those given. A field whose own type is a dataclass needs no entry and is built as one.

    Returns:
        main's status; 2 after an InputError; 1 where another rank is lost; 130 after Ctrl-C; 141 when the reader of our
        output has gone.
    """
    return guarded(lambda: main(build(config_class, parse(prog, config_class, argv, doc, tables))))


def guarded(body: Callable[[], int | None]) -> int:
    """Run a command's body and turn the ways in which it may end into at most one line and an exit status."""
    _fill_standard_descriptors()
    try:
        status = body()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankLost as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Quiet only where our own output is the broken pipe (`moe-train | head`), not some worker's.
        if not _reader_has_gone():
            raise
        return 141
    except SystemExit as request:  # `--help` ends here, with status 0
        if not isinstance(request.code, int):
            raise
        return request.code


def parse(
    prog: str, config_class: type, argv: Sequence[str] | None = None, doc: str = "", tables: Tables = ()
) -> dict[str, Any]:
    """The values given explicitly on the command line, typed, as a nested dict: `{"lr": 3e-4, "model": {"top_k": 2}}`.

    Missing required options are no error here (a configuration file may hold them): `build` reports those.

    Raises:
        InputError: an unknown flag, a missing or bad value, an unexpected argument.
        SystemExit: with status 0, after `--help` was printed.
    """
    settings = {s.name: s for s in settings_of(config_class, dict(tables))}
    help_option = click.Option(
        _HELP_FLAGS, is_flag=True, expose_value=False, is_eager=True, callback=_print_help, help="Show this and exit."
    )
    command = _Command(
        prog, params=[*map(_parameter, settings.values()), help_option], help=doc or None, add_help_option=False
    )
    arguments = _expand(sys.argv[1:] if argv is None else argv, settings.values())
    try:
        context = command.make_context(prog, arguments, max_content_width=110)
    except click.exceptions.Exit as request:
        raise SystemExit(request.exit_code) from None
    except click.BadParameter as error:
        raise InputError(error.message) from None
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        raise InputError(message[0].lower() + message[1:]) from None

    given: dict[str, Any] = {}
    for name, setting in settings.items():
        value = context.params[name]
        # Older clicks count an empty positional list as given.
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE and value != ():
            table = given
            for key in setting.path[:-1]:
                table = table.setdefault(key, {})
            table[setting.path[-1]] = list(value) if setting.many else value
    return given


def build(config_class: type, values: dict[str, Any]) -> Any:
    """A `config_class` from a nested dict of values, everything else at its default.

    Raises:
        InputError: a required field is missing.
    """
    hints = typing.get_type_hints(config_class)
    arguments = {}
    for field in dataclasses.fields(config_class):
        default = default_of(field)
        if field.name in values:
            value, nested = values[field.name], dataclass_in(hints[field.name])
            if nested and isinstance(value, dict):
                value = _replace(default, value) if dataclasses.is_dataclass(default) else build(nested, value)
            arguments[field.name] = value
        elif default is MISSING:
            label = field.name if field.metadata.get("positional") else f"--{field.name}"
            purpose = field.metadata.get("help")
            raise InputError(f"{label} is required" + (f": {purpose}" if purpose else ""))
    return config_class(**arguments)


def _replace(base: Any, values: dict[str, Any]) -> Any:
    """`dataclasses.replace` that descends into fields that are dataclasses themselves."""
    changes = {}
    for name, value in values.items():
        inner = getattr(base, name)
        descend = dataclasses.is_dataclass(inner) and isinstance(value, dict)
        changes[name] = _replace(inner, value) if descend else value
    return dataclasses.replace(base, **changes)


class _Value(click.ParamType):
    """Converts one text by its setting, with an error that names the flag, what was expected and what came."""

    name = "value"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.setting.value(value)
        except ValueError:
            message = f"{self.setting.label}: expected {self.setting.expected}, got {value!r}"
            raise click.BadParameter(message) from None


class _Command(click.Command):
    """A command whose help lists the dotted options of each table under a heading of their own."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.params:
            if (record := param.get_help_record(ctx)) is not None:
                table, dot, _ = param.opts[0].lstrip("-").rpartition(".")
                sections.setdefault(f"Options of [{table}]" if dot else "Options", []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=38)


def _parameter(setting: Setting) -> click.Parameter:
    if setting.positional:
        metavar = f"[{setting.path[-1].upper()}]" + ("..." if setting.many else "")
        count = -1 if setting.many else 1
        return click.Argument([setting.name], nargs=count, required=False, type=_Value(setting), metavar=metavar)
    text = setting.help + setting.default_note
    if setting.is_switch:
        return click.Option([setting.name, f"{setting.flag}/--no_{setting.flag[2:]}"], default=None, help=text)
    names = [setting.name, setting.flag]
    return click.Option(names, type=_Value(setting), multiple=setting.many, metavar=setting.metavar, help=text)


def _print_help(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(ctx.get_help())
        ctx.exit()


def _expand(argv: Sequence[str], settings: Collection[Setting]) -> list[str]:
    """Rewrite the accepted spellings into the ones that click reads: `--flag=value`, `--flag`, `--no_flag`."""
    flags = {s.flag: s for s in settings if not s.positional}
    negations = [f"--no_{flag[2:]}" for flag, s in flags.items() if s.is_switch]
    known = {*flags, *negations, *_HELP_FLAGS}
    result, rest = [], list(argv)
    while rest:
        token = rest.pop(0)
        flag, (_, equals, value) = _spelled(token), token.partition("=")
        if token == "--":
            return [*result, token, *rest]
        if flag not in known:
            if token.startswith("-") and token != "-" and not token[1].isdigit():
                raise InputError(_no_such_flag(token.partition("=")[0], known))
            result.append(token)
        elif flag not in flags:
            if equals:
                raise InputError(f"{flag} takes no value, got {value!r}")
            result.append(flag)
        elif flags[flag].is_switch:
            if not equals and rest and rest[0].lower() in BOOLEANS:
                equals, value = "=", rest.pop(0)
            if equals and value.lower() not in BOOLEANS:
                raise InputError(f"{flag}: expected true or false, got {value!r}")
            result.append(flag if not equals or BOOLEANS[value.lower()] else f"--no_{flag[2:]}")
        elif equals:
            result.append(f"{flag}={value}")
        else:
            if not rest or rest[0] == "--" or _spelled(rest[0]) in known:
                raise InputError(f"{flag} needs a value ({flags[flag].expected})")
            result.append(f"{flag}={rest.pop(0)}")
            while flags[flag].many and rest and (rest[0] == "-" or not rest[0].startswith("-")):
                result.append(f"{flag}={rest.pop(0)}")
    return result


def _spelled(token: str) -> str:
    """The flag in a token with underscores, as it is declared; anything else unchanged."""
    return "--" + token[2:].partition("=")[0].replace("-", "_") if token.startswith("--") else token


def _no_such_flag(token: str, known: Collection[str]) -> str:
    wanted = "--" + token.lstrip("-").replace("-", "_")
    near = difflib.get_close_matches(wanted, sorted(known), n=1, cutoff=0.6)
    return f"no such flag {token}; " + (f"did you mean {near[0]}?" if near else "see --help for all of them")


def _fill_standard_descriptors() -> None:
    """Hold the numbers of standard streams that are closed (`>&-`): a file would get them and their text."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one


def _reader_has_gone() -> bool:
    """True if standard output or error is a pipe with no reader; what it still holds is dropped, for a quiet exit."""
    gone = False
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            gone = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return gone
