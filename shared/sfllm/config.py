"""Settings from flag, environment, YAML file and default, in that order.

A service's settings are one frozen msgspec struct: each field has a type, bounds, a
default and a description, and this module makes the command line, the environment
variables (`SFLLM_<FLAG>`), the YAML keys and `--help` from it.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import configargparse
import msgspec
import yaml

ENV_PREFIX = "SFLLM_"

SECRET = {"secret": True}
"""`Meta(extra=SECRET)` marks a setting that must not appear on a command line, where everyone can read it."""

_ENV_ALIASES = {"SFLLM_MODEL_PATH": "SFLLM_MODEL"}

T = TypeVar("T", bound="Settings")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of a service's settings. A subclass's docstring heads its group in `--help`."""


class _Option(typing.NamedTuple):
    """One field of a settings struct as the command line sees it."""

    name: str
    group: str
    type: Any
    default: Any
    help: str
    secret: bool

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def options(cls: type[Settings]) -> list[_Option]:
    """The options of a settings struct, grouped by the class that defines each."""
    groups: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        heading = (base.__doc__ or "").strip().split("\n", 1)[0].rstrip(".")
        for name in inspect.get_annotations(base):
            groups.setdefault(name, heading)
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in msgspec.structs.fields(cls):
        hint = hints[field.name]
        description = ""
        secret = False
        if typing.get_origin(hint) is Annotated:
            metas = [meta for meta in hint.__metadata__ if isinstance(meta, msgspec.Meta)]
            description = next((meta.description for meta in metas if meta.description), "")
            secret = any(meta.extra == SECRET for meta in metas)
            hint = hint.__origin__
        found.append(_Option(field.name, groups[field.name], hint, field.default, description, secret))
    return found


def parse(
    cls: type[T],
    *,
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    known: Sequence[type[Settings]] = (),
) -> T:
    """Read settings of type `cls`; print a readable error and exit with 2 when a value is wrong.

    `known` are further settings whose keys a shared YAML file may contain.
    """
    parser = _parser(cls, prog, description)
    arguments = list(sys.argv[1:] if argv is None else argv)
    namespace = parser.parse_args(
        args=arguments,
        env_vars=_normalised(os.environ if environ is None else environ),
    )
    _warn_of_secrets(cls, arguments)
    values = vars(namespace)
    config = values.pop("config")
    if config:
        _check_keys(parser, Path(config), [cls, *known])
    return _convert(parser, cls, values)


def to_arguments(settings: Settings, cls: type[Settings]) -> list[str]:
    """The command line that gives a process of `cls` the values that `settings` shares with it.

    Secrets are not on it: see `to_variables`.
    """
    arguments: list[str] = []
    for option in options(cls):
        value = getattr(settings, option.name, None)
        if value is None or value == option.default or option.secret:
            continue
        if isinstance(value, bool):
            arguments.append(option.flag if value else f"--no-{option.flag[2:]}")
        elif isinstance(value, tuple):
            arguments.append(f"{option.flag}={','.join(str(item) for item in value)}")
        else:
            arguments.append(f"{option.flag}={value}")
    return arguments


def to_variables(settings: Settings, cls: type[Settings]) -> dict[str, str]:
    """The environment variables that give a process of `cls` the secrets that `settings` shares with it."""
    values = {
        option.variable: getattr(settings, option.name, None) for option in options(cls) if option.secret
    }
    return {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
        if value
    }


class _SettingsFile(configargparse.YAMLConfigFileParser):  # type: ignore[misc] # it has no types
    """YAML whose keys may be written like the flag or like the field, with `-` or with `_`."""

    def parse(self, stream: Any) -> dict[str, Any]:
        return {str(key).replace("_", "-"): value for key, value in super().parse(stream).items()}


def _parser(cls: type[Settings], prog: str, description: str) -> configargparse.ArgParser:
    parser = configargparse.ArgParser(
        prog=prog,
        description=description,
        config_file_parser_class=_SettingsFile,
        ignore_unknown_config_file_keys=True,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        add_env_var_help=False,
        add_config_file_help=False,
        allow_abbrev=False,
        epilog="A flag goes before its environment variable, that before the file, that before the default.",
    )
    parser.add(
        "--config",
        is_config_file=True,
        env_var=f"{ENV_PREFIX}CONFIG",
        metavar="FILE",
        help="YAML file of settings",
    )
    groups: dict[str, Any] = {}
    for option in options(cls):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add(groups[option.group], option)
    return parser


def _add(group: Any, option: _Option) -> None:
    required = option.default is msgspec.NODEFAULT
    shown = "" if required or option.default in (None, "", ()) else f", default {_shown(option.default)}"
    keywords: dict[str, Any] = {
        "dest": option.name,
        "env_var": option.variable,
        "default": None if required else option.default,
        "help": f"{option.help} [{option.variable}{shown}]".replace("%", "%%"),
    }
    base = _without_none(option.type)
    if base is bool:
        keywords["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(base) is typing.Literal:
        keywords["choices"] = list(typing.get_args(base))
    elif typing.get_origin(base) is tuple:
        keywords |= {"nargs": "+", "metavar": "VALUE"}
    else:
        keywords["metavar"] = {int: "N", float: "X"}.get(base, "TEXT")
    group.add_argument(option.flag, **keywords)


def _convert(parser: argparse.ArgumentParser, cls: type[T], values: dict[str, Any]) -> T:
    for option in options(cls):
        value = values[option.name]
        if typing.get_origin(_without_none(option.type)) is tuple and value is not None:
            items = [value] if isinstance(value, str) else value
            values[option.name] = [part for item in items for part in str(item).split(",") if part]
        elif value is None and option.default is msgspec.NODEFAULT:
            parser.error(f"{option.flag} is required")
    try:
        return msgspec.convert(values, type=cls, strict=False)
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `$.")
        parser.error(f"--{path.rstrip('`').replace('_', '-')}: {text[0].lower()}{text[1:]}" if path else text)


def _warn_of_secrets(cls: type[Settings], arguments: Sequence[str]) -> None:
    given = {argument.partition("=")[0] for argument in arguments}
    for option in options(cls):
        if option.secret and option.flag in given:
            text = f"{option.flag}: everyone on this machine can read it there; set {option.variable} instead"
            print(f"warning: {text}", file=sys.stderr)


def _check_keys(parser: argparse.ArgumentParser, path: Path, known: Sequence[type[Settings]]) -> None:
    """Refuse misspelt keys: silently ignored settings are the worst kind."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    names = {option.name for cls in known for option in options(cls)}
    unknown = sorted(str(key) for key in content if str(key).replace("-", "_") not in names)
    if unknown:
        parser.error(f"{path}: unknown settings {', '.join(unknown)}")


def _normalised(environ: Mapping[str, str]) -> dict[str, str]:
    variables = dict(environ)
    for alias, name in _ENV_ALIASES.items():
        if alias in variables:
            variables.setdefault(name, variables[alias])
    return variables


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _shown(default: Any) -> str:
    return " ".join(str(item) for item in default) if isinstance(default, tuple) else str(default).lower()
