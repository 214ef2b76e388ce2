"""Command line and YAML file → a job's settings, flags winning; jsonargparse does it from the dataclasses."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from patchsae_ray.errors import UserError, first_line, nearest
from patchsae_ray.settings import FolderSettings
from patchsae_ray.yamls import load_yaml

set_parsing_settings(docstring_parse_attribute_docstrings=True)

S = TypeVar("S", bound=FolderSettings)


_VALUE = re.compile(r'Parser key "(\w+)":.*?(?:Expected a .*?Got value: |Given value: |Exceeds the limit)(.*)', re.DOTALL)
"""What jsonargparse says of a value that is not of its setting's kind."""

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_LISTS = ("threshold", "topk", "workers")
"""Settings that are text because they may hold several numbers; a file may give them as numbers too."""


def _wanted(kind: Any) -> str:
    """What would be right for a field of this type."""
    kinds = [one for one in get_args(kind) or (kind,) if one is not type(None)]
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, kinds))}"
    return " or ".join(_wanted(one) if get_args(one) else _KINDS.get(one, str(one)) for one in kinds)


class _Parser(ArgumentParser):
    """One line and exit code 2 for whatever is wrong, with the nearest name where one is misspelt."""

    given: Sequence[str] = ()
    kinds: dict[str, Any]
    """Setting → its type."""
    files: dict[str, dict[str, Any]]
    """File of --config → its settings."""

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [action.dest for action in self._actions]
        line = first_line(Exception(message.replace("\n", " ")))
        odd = _VALUE.search(message)
        if odd and odd[1] in self.kinds:
            line = self._wrong_value(odd[1], odd[2])
        words = [word.strip("'\".,:[]").removeprefix("--").split("=")[0] for word in line.split()]
        unknown = [word for word in words if word and word not in known and nearest(word, known)]
        says_unknown = any(
            marker in line.lower() for marker in ("unrecognized", "not accepted", "does not accept", "no action")
        )
        if "is not accepted" in line:
            named = [path for path, settings in self.files.items() if set(settings) & set(words)]
            line = f"{named[0]}: {line}" if named else line
        sys.stderr.write(f"error: {line}{nearest(unknown[0], known) if unknown and says_unknown else ''}\n")
        sys.exit(2)

    def _wrong_value(self, name: str, said: str) -> str:
        """The line on a setting's wrong value: from which file or flag, and what would be right."""
        flags = [
            after if argument == f"--{name}" else argument.partition("=")[2]
            for argument, after in zip(self.given, [*self.given[1:], ""], strict=True)
            if argument.partition("=")[0] == f"--{name}"
        ]
        path = next((path for path, settings in self.files.items() if name in settings and (not flags)), "")
        value = str(self.files[path][name]) if path else (flags[-1] if flags else said.strip())
        shown = first_line(Exception(value))[:80] if value else "''"
        return f"{f'{path}: ' if path else ''}--{name} {shown}: {_wanted(self.kinds[name])} would be right"


def _as_text(name: str, value: Any) -> Any:
    """A value of a file; numbers become text where the setting may hold several of them."""
    parts = value if isinstance(value, list) else [value]
    numbers = all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in parts)
    return ",".join(map(str, parts)) if name in _LISTS and parts and numbers else value


def _with_files(arguments: Sequence[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """The arguments with the settings of --config's files in place of their paths, and these by path.

    Raises: UserError where a file is not there, or no YAML mapping.
    """
    changed, files, waiting = [], dict[str, dict[str, Any]](), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        flag, equals, path = argument.partition("=")
        if flag != "--config" or not (equals or waiting):
            changed.append(argument)
            continue
        path = path if equals else waiting.pop(0)
        try:
            settings = load_yaml(path, Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"--config {path}: {error.strerror}; a YAML file of settings would be right") from error
        if settings is not None and not isinstance(settings, dict):
            raise UserError(f"--config {path}: a mapping of settings would be right")
        files[path] = {str(name): _as_text(str(name), value) for name, value in (settings or {}).items()}
        changed.append(f"--config={yaml.safe_dump(files[path], sort_keys=False)}")
    return changed, files


def build_parser(settings_class: type[FolderSettings]) -> _Parser:
    """The command line of a job: a flag for every field, --config and --print_config."""
    parser = _Parser(description=settings_class.__doc__, allow_abbrev=False)
    parser.kinds = {field.name: field.type for field in fields(settings_class)}
    parser.files = {}
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings; flags win over it.")
    parser.add_class_arguments(settings_class, sub_configs=False)
    for action in parser._actions:
        if action.dest in _boolean_fields(settings_class):
            # PatchSAE's bare --use_ghost_grads, and also --use_ghost_grads false
            action.nargs, action.const = "?", True
    return parser


def _boolean_fields(settings_class: type[FolderSettings]) -> set[str]:
    return {field.name for field in fields(settings_class) if field.type in (bool, "bool")}


Defaults = Callable[[Any], dict[str, Any]]
"""Settings by flags and file alone → better defaults for some of the fields."""


def parse(settings_class: type[S], arguments: Sequence[str] | None = None, defaults: Defaults | None = None) -> S:
    """Command line → settings. Flags win over --config, --config over `defaults`, those over the fields' own."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(settings_class)
    try:
        arguments, files = _with_files(arguments)
    except UserError as error:
        parser.error(str(error))
    parser.files.update(files)
    if defaults is not None:
        shows = ("--print_config", "--help", "-h")  # shown once the defaults are in
        first = parser.parse_args([argument for argument in arguments if not argument.startswith(shows)])
        parser.set_defaults(defaults(_from_namespace(settings_class, first)))
    return _from_namespace(settings_class, parser.parse_args(arguments))


def _from_namespace(settings_class: type[S], parsed: Any) -> S:
    return settings_class(**{field.name: parsed[field.name] for field in fields(settings_class)})
