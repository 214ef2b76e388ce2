"""Command line and YAML file → a job's settings, flags winning; jsonargparse does it from the dataclasses."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn, TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

from patchsae_ray.errors import first_line, nearest
from patchsae_ray.settings import FolderSettings

set_parsing_settings(docstring_parse_attribute_docstrings=True)

S = TypeVar("S", bound=FolderSettings)


_CHOICE = re.compile(r'Parser key "(\w+)":\s+Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)')
"""What jsonargparse says of a value that is none of a setting's choices."""

_KIND = re.compile(r"""Parser key "(\w+)":\s+Expected a <class '(bool|int|float)'>\. Got value: (.*)""")
_KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number"}


class _Parser(ArgumentParser):
    """One line and exit code 2 for whatever is wrong, with the nearest name where one is misspelt."""

    given: Sequence[str] = ()

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_args(args, *others, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [action.dest for action in self._actions]
        line = first_line(Exception(message.replace("\n", " ")))
        choice = _CHOICE.search(line)
        if choice:
            line = f"--{choice[1]} {choice[3]}: one of {choice[2].replace(chr(39), '')} would be right"
        kind = _KIND.search(line)
        if kind:
            line = f"--{kind[1]} {kind[3]}: {_KINDS[kind[2]]} would be right"
        words = [word.strip("'\".,:[]").removeprefix("--").split("=")[0] for word in line.split()]
        unknown = [word for word in words if word and word not in known and nearest(word, known)]
        says_unknown = any(
            marker in line.lower() for marker in ("unrecognized", "not accepted", "does not accept", "no action")
        )
        if "is not accepted" in line and "--config" in self.given[:-1]:
            line = f"{self.given[self.given.index('--config') + 1]}: {line}"
        sys.stderr.write(f"error: {line}{nearest(unknown[0], known) if unknown and says_unknown else ''}\n")
        sys.exit(2)


def build_parser(settings_class: type[FolderSettings]) -> ArgumentParser:
    """The command line of a job: a flag for every field, --config and --print_config."""
    parser = _Parser(description=settings_class.__doc__, allow_abbrev=False)
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
    if defaults is not None:
        shows = ("--print_config", "--help", "-h")  # shown once the defaults are in
        first = parser.parse_args([argument for argument in arguments if not argument.startswith(shows)])
        parser.set_defaults(defaults(_from_namespace(settings_class, first)))
    return _from_namespace(settings_class, parser.parse_args(arguments))


def _from_namespace(settings_class: type[S], parsed: Any) -> S:
    return settings_class(**{field.name: parsed[field.name] for field in fields(settings_class)})
